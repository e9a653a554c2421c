"""ABMIL with genes: gated attention over the patches, fused with a network over all molecular columns.

The two rows "AMIL, concat" and "AMIL, bilinear" of Chen et al., ICCV 2021 (MCAT); Ilse, Tomczak, Welling,
"Attention-based deep multiple instance learning", ICML 2018.
"""

from __future__ import annotations

from torch import Tensor

from morphome.models.bag_fusion import BagFusion
from morphome.models.layers import GatedAttention


class ABMILFusion(BagFusion):
    """:class:`~morphome.models.abmil.ABMIL` and two SNN layers, fused; invariant to the order of the patches.

    1,967,109 parameters with ``concat`` and 2,297,285 with ``bilinear`` at d_in = 1024, D = 3062, K = 4.

    Args:
        d_in: width of the patch features.
        n_omic: D, molecular columns.
        n_bins: K.
        missing_tokens: own one learned vector for patients without molecular values.
        dim: width of a projected patch.
        attention_dim: hidden width of the gated attention.
        fusion_dim: width of the slides' vector, the genes' vector and the fused one.
        fusion: ``concat`` or ``bilinear``.
        dropout: of all blocks.

    Raises:
        MorphomeError: unknown fusion, or a width that the product cannot reduce; no molecular column.
    """

    def __init__(
        self,
        d_in: int,
        n_omic: int,
        n_bins: int,
        missing_tokens: bool = False,
        *,
        dim: int = 512,
        attention_dim: int = 256,
        fusion_dim: int = 256,
        fusion: str = "concat",
        dropout: float = 0.25,
    ) -> None:
        sizes = {"dim": dim, "fusion_dim": fusion_dim, "fusion": fusion, "dropout": dropout}
        super().__init__("abmil_fusion", d_in, n_omic, n_bins, missing_tokens, **sizes)
        self.pool = GatedAttention(dim, attention_dim, 1, dropout)

    def pool_patches(self, h: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(N, dim) -> (1, dim) and ``gated`` (N,), which sums to 1."""
        pooled, weights = self.pool(h)
        return pooled, {"gated": weights.squeeze(1).detach()}
