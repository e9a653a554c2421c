"""Unbalanced optimal transport between two sets of tokens, regularised by entropy.

Chizat, Peyré, Schmitzer, Vialard, "Scaling algorithms for unbalanced optimal transport problems", Math. Comp. 87
(2018) 2563. Written from the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from morphome.errors import MorphomeError

REGULARISERS = ("entropy", "kl")
#: Convergence is looked at every so many iterations: a look costs a round trip to the device.
_LOOK = 10


def transport_cost(h: Tensor, g: Tensor) -> Tensor:
    """C = |h_n - g_t|^2 / max, in float64, after the smallest feature of each row is taken from that row.

    Args:
        h: (N, d).
        g: (T, d).

    Returns:
        (N, T) in [0, 1]; zero where all rows are equal. No gradient.
    """
    h, g = (x.detach().double() for x in (h, g))
    h, g = h - h.amin(1, keepdim=True), g - g.amin(1, keepdim=True)
    cost = (h.square().sum(1)[:, None] + g.square().sum(1) - 2 * h @ g.T).clamp(min=0)
    largest = cost.max()
    return cost / torch.where(largest > 0, largest, 1.0)


def transport_plan(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    tau: float,
    regulariser: str = "entropy",
    iterations: int = 1000,
    tolerance: float = 1e-6,
) -> Tensor:
    """diag(u) K diag(v) with u = (a / K v)^kappa, v = (b / K^T u)^kappa, kappa = tau / (tau + epsilon).

    The minimum over P >= 0 of <P, C> + epsilon R(P) + tau KL(P 1 | a) + tau KL(P^T 1 | b), where R is the negative
    entropy (``entropy``, K = exp(-C / epsilon)) or KL(P | a b^T) (``kl``, K = exp(-C / epsilon) a b^T). Marginals are
    kept in part only, so the mass of the plan is below 1.

    Args:
        cost: (N, T), about 0 ... 1.
        a, b: masses, (N,) and (T,), positive.
        epsilon: weight of the regulariser; too small a value (below about 0.002) underflows.
        tau: weight of the marginals.
        regulariser: ``entropy`` or ``kl``.
        iterations: at most.
        tolerance: stop when u and v change by less, relative to their largest value.

    Returns:
        The plan (N, T), float64, without gradient.

    Raises:
        MorphomeError: unknown regulariser; a plan that is not finite.
    """
    if regulariser not in REGULARISERS:
        raise MorphomeError(f"ot_reg_type: {regulariser!r} is not known", f"choose one of {', '.join(REGULARISERS)}")
    cost, a, b = (x.detach().double() for x in (cost, a, b))
    kernel = torch.exp(-cost / epsilon)
    if regulariser == "kl":
        kernel = kernel * a[:, None] * b
    kappa = tau / (tau + epsilon)
    u, v = torch.ones_like(a), torch.ones_like(b)
    for iteration in range(1, iterations + 1):
        before = u, v
        u = (a / (kernel @ v)) ** kappa
        v = (b / (u @ kernel)) ** kappa
        if iteration % _LOOK == 0:
            change = torch.stack([(x - y).abs().max() / x.max() for x, y in zip((u, v), before, strict=True)]).max()
            if change.item() < tolerance:
                break
    plan = u[:, None] * kernel * v
    if not bool(torch.isfinite(plan).all()):
        raise MorphomeError(
            f"the optimal transport plan is not finite with epsilon {epsilon:g}",
            "raise epsilon, for example to .05; look for patch features that are not finite",
        )
    return plan
