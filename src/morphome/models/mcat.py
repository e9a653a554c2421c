"""MCAT: multimodal co-attention transformer.

Chen et al., "Multimodal Co-Attention Transformer for Survival Prediction in Gigapixel Whole Slide Images", ICCV
2021, 4015-4025. Every gene group reads the patches by attention; what it read and the groups themselves pass two
small transformers. Written from the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from morphome.models.batch import Batch, require
from morphome.models.coattention import CrossAttention, TokenPool, check_sizes, make_fusion
from morphome.models.layers import FC, GroupEncoder


class MCAT(nn.Module):
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

    needs = frozenset({"path", "omic_groups"})
    supports: frozenset[str] = frozenset()
    head = "hazard"
    order_sensitive = False

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
        super().__init__()
        check_sizes("mcat", dim, heads, fusion)
        self.d_in = d_in
        self.project = FC(d_in, dim, dropout)
        self.groups = GroupEncoder(list(group_sizes.values()), dim, dropout)
        self.coattention = CrossAttention(dim)
        self.path_pool = TokenPool(dim, heads, feedforward, attention_dim, dropout)
        self.gene_pool = TokenPool(dim, heads, feedforward, attention_dim, dropout)
        self.fusion = make_fusion(fusion, dim, dropout)
        self.classifier = nn.Linear(dim, n_bins)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """H (N, d) and G (T, d) of one patient."""
        require(batch, self.needs, self.d_in)
        return self.project(batch.path), self.groups(batch.groups)

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

    def branch_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters that only one modality passes before fusion."""
        return {"path": list(self.project.parameters()), "omic": list(self.groups.parameters())}
