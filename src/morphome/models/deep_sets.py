"""Deep Sets on the slides alone: patches are encoded one by one, pooled, and the pool is encoded again.

Zaheer et al., "Deep Sets", NeurIPS 2017, in the sizes of the MCAT family: FC(d_in -> dim) per patch, pooling,
FC(dim -> head_dim), K hazard logits. The published pooling is the plain sum. It grows with the number of patches:
a bag of thousands saturates the head, and the published runs ended at C = 0.5 exactly, one score for everybody, in
three of five cohorts. The default here is the mean; ``sum`` reproduces the published row.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.models.batch import Batch, require
from morphome.models.layers import FC

POOLS = ("mean", "sum", "sum_over_sqrtN")


def pool_set(h: Tensor, pool: str) -> Tensor:
    """Encoded patches (N, d) -> (1, d) by ``mean``, ``sum`` or ``sum_over_sqrtN``."""
    pooled = h.mean(0, keepdim=True) if pool == "mean" else h.sum(0, keepdim=True)
    return pooled / math.sqrt(h.shape[0]) if pool == "sum_over_sqrtN" else pooled


class DeepSets(nn.Module):
    """phi, pool, rho; invariant to the order of the patches. 657,156 parameters at d_in = 1024, K = 4.

    Args:
        d_in: width of the patch features.
        n_bins: K.
        dim: width of an encoded patch.
        head_dim: width before the classifier.
        pool: ``mean``, ``sum`` (published) or ``sum_over_sqrtN``, the sum divided by the square root of the number
            of patches. The last two depend on how many patches are drawn: give them all of them in training too.
        dropout: of both blocks.

    Raises:
        MorphomeError: unknown ``pool``.
    """

    needs = frozenset({"path"})
    supports = frozenset({"wsi_only_inference"})
    head = "hazard"
    order_sensitive = False

    def __init__(
        self,
        d_in: int,
        n_bins: int,
        *,
        dim: int = 512,
        head_dim: int = 256,
        pool: str = "mean",
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise MorphomeError(f"models.deep_sets.pool: {pool!r} is not known", f"one of {', '.join(POOLS)}")
        self.d_in = d_in
        self.pool = pool
        self.project = FC(d_in, dim, dropout)
        self.hidden = FC(dim, head_dim, dropout)
        self.classifier = nn.Linear(head_dim, n_bins)

    def forward(self, batch: Batch) -> dict:
        """One patient -> logits (1, K) and ``aux["pooled"]`` (1, dim); there is no attention.

        Raises:
            MorphomeError: the patient has no patch features, or of another width.
        """
        require(batch, self.needs, self.d_in)
        h = self.project(batch.path)
        pooled = pool_set(h, self.pool)
        logits = self.classifier(self.hidden(pooled))
        return {"logits": logits, "extra_losses": {}, "attn": {}, "aux": {"pooled": pooled}}
