"""MCAT: multimodal co-attention transformer.

Chen et al., "Multimodal Co-Attention Transformer for Survival Prediction in Gigapixel Whole Slide Images", ICCV
2021, 4015-4025. Every gene group reads the patches by attention; what it read and the groups themselves pass two
small transformers. Written from the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping

from morphome.models.batch import Batch
from morphome.models.coattention import CoAttentionModel, CrossAttention
from morphome.models.fusion import Encoded


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
        missing_tokens: build learned tokens that stand in for G of a patient without genes.

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
        missing_tokens: bool = False,
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
            missing_tokens=missing_tokens,
        )
        self.coattention = CrossAttention(dim)
        if missing_tokens:
            self.groups.add_missing()

    def encode(self, batch: Batch) -> Encoded:
        """One patient -> ``z`` h_P (1, d) and h_G (1, d), and attention.

        ``attn["coattention"]`` (T, N): rows sum to 1; ``attn["coattention_raw"]`` (T, N): the same before the
        softmax; ``attn["gated_path"]``, ``attn["gated_genes"]`` (T,): weights of the two poolings.

        Raises:
            MorphomeError: the patient has no patch features or gene groups, or of other shapes.
        """
        path, genes = self.embed(batch)
        tokens, weights, scores = self.coattention(genes, path)
        u, path_weights = self.path_pool(tokens)
        v, gene_weights = self.gene_pool(genes)
        return Encoded(
            {"path": u, "omic": v},
            attn={
                "coattention": weights.detach(),
                "coattention_raw": scores.detach(),
                "gated_path": path_weights.detach(),
                "gated_genes": gene_weights.detach(),
            },
        )
