"""Deep Sets with genes: pooled patches, fused with a network over all molecular columns.

The two rows "Deep Sets, concat" and "Deep Sets, bilinear" of Chen et al., ICCV 2021 (MCAT); Zaheer et al., "Deep
Sets", NeurIPS 2017. On pooling by the plain sum see :mod:`morphome.models.deep_sets`.
"""

from __future__ import annotations

from torch import Tensor

from morphome.errors import MorphomeError
from morphome.models.bag_fusion import BagFusion
from morphome.models.deep_sets import POOLS, pool_set


class DeepSetsFusion(BagFusion):
    """:class:`~morphome.models.deep_sets.DeepSets` and two SNN layers, fused; invariant to the order of the patches.

    1,704,196 parameters with ``concat`` and 2,034,372 with ``bilinear`` at d_in = 1024, D = 3062, K = 4.

    Args:
        d_in: width of the patch features.
        n_omic: D, molecular columns.
        n_bins: K.
        missing_tokens: own one learned vector for patients without molecular values.
        dim: width of an encoded patch.
        fusion_dim: width of the slides' vector, the genes' vector and the fused one.
        pool: ``mean``, ``sum`` (published) or ``sum_over_sqrtN``; the last two depend on how many patches are drawn.
        fusion: ``concat`` or ``bilinear``.
        dropout: of all blocks.

    Raises:
        MorphomeError: unknown pool or fusion, or a width that the product cannot reduce; no molecular column.
    """

    def __init__(
        self,
        d_in: int,
        n_omic: int,
        n_bins: int,
        missing_tokens: bool = False,
        *,
        dim: int = 512,
        fusion_dim: int = 256,
        pool: str = "mean",
        fusion: str = "concat",
        dropout: float = 0.25,
    ) -> None:
        if pool not in POOLS:
            raise MorphomeError(f"models.deep_sets_fusion.pool: {pool!r} is not known", f"one of {', '.join(POOLS)}")
        sizes = {"dim": dim, "fusion_dim": fusion_dim, "fusion": fusion, "dropout": dropout}
        super().__init__("deep_sets_fusion", d_in, n_omic, n_bins, missing_tokens, **sizes)
        self.pool = pool

    def pool_patches(self, h: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(N, dim) -> (1, dim); there is no attention."""
        return pool_set(h, self.pool), {}
