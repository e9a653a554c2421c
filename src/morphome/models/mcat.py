"""MCAT: multimodal co-attention transformer.

Chen et al., "Multimodal Co-Attention Transformer for Survival Prediction in Gigapixel Whole Slide Images", ICCV
2021, 4015-4025. Every gene group reads the patches by attention; what it read and the groups themselves pass two
small transformers. Written from the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping

from morphome.models.batch import Batch
from morphome.models.coattention import CoAttentionModel, CrossAttention


class MCAT(CoAttentionModel):
    """Gene-guided co-attention; invariant to the order of the patches.

    ``H = FC(X)``, ``G = stack_g SNN(SNN(x_g))``, ``C = MHA1(G, H)`` (T, d), then for C and G each two post-norm
    encoder layers, gated attention and FC; concatenation, two ReLU layers, K hazard logits. 4,492,038 parameters
    with the six families of the MCAT table of TCGA-BLCA, d_in = 1024 and K = 4.

    Args:
        d_in: width of the patch features.
        group_sizes: columns per gene group.
        n_bins: K.
        dim: d.
        heads: of the encoder layers; divides ``dim``.
        feedforward: hidden width of the encoder layers.
        attention_dim: hidden width of the gated attention.
        fusion: ``concat`` or ``bilinear`` (gated Kronecker product).
        dropout: of all blocks.

    Raises:
        MorphomeError: unknown fusion, or ``heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        d_in: int,
        group_sizes: Mapping[str, int],
        n_bins: int,
        *,
        dim: int = 256,
        heads: int = 8,
        feedforward: int = 512,
        attention_dim: int = 256,
        fusion: str = "concat",
        dropout: float = 0.25,
    ) -> None:
        super().__init__(
            "mcat",
            d_in,
            group_sizes,
            n_bins,
            dim=dim,
            heads=heads,
            feedforward=feedforward,
            attention_dim=attention_dim,
            fusion=fusion,
            dropout=dropout,
        )
        self.coattention = CrossAttention(dim)

    def forward(self, batch: Batch) -> dict:
        """One patient -> logits (1, K) and attention.

        ``attn["coattention"]`` (T, N): rows sum to 1; ``attn["coattention_raw"]`` (T, N): the same before the
        softmax; ``attn["gated_path"]``, ``attn["gated_genes"]`` (T,): weights of the two poolings.

        Raises:
            MorphomeError: the patient has no patch features or gene groups, or of other shapes.
        """
        path, genes = self.encode(batch)
        tokens, weights, scores = self.coattention(genes, path)
        u, path_weights = self.path_pool(tokens)
        v, gene_weights = self.gene_pool(genes)
        return {
            "logits": self.classifier(self.fusion(u, v)),
            "extra_losses": {},
            "attn": {
                "coattention": weights.detach(),
                "coattention_raw": scores.detach(),
                "gated_path": path_weights.detach(),
                "gated_genes": gene_weights.detach(),
            },
            "aux": {},
        }
