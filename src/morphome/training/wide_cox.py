"""Ridge Cox models on more columns than patients, for a whole list of penalties at once.

The penalty only sees the length of β, so β lies in the span of the patients' rows. With the thin QR decomposition
Zᵀ = QR the model on Z (n, p) is the same as one on Rᵀ (n, n), and β = Qγ. That is exact, and a
Newton step costs the same for any number of genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from morphome.errors import MorphomeError

MAX_STEPS = 60
#: A Newton step that lowers the objective by less than this share of it is the last one.
TOLERANCE = 1e-11


class RidgePath(NamedTuple):
    """Fits of one design at several penalties.

    Attributes:
        coef: (penalties, p) float64; converged: (penalties,) bool.
    """

    coef: np.ndarray
    converged: np.ndarray


def fit_ridge_path(Z: np.ndarray, time: np.ndarray, event: np.ndarray, ridges: Sequence[float]) -> RidgePath:
    """Minimise −ℓ(β) + ½·ridge·‖β‖² for each ridge, ℓ the partial log-likelihood with Breslow ties (not divided by n).

    Newton steps, halved until the objective falls, from the strongest penalty to the weakest, each from the solution
    before it.

    Args:
        Z: (n, p), finite; time: (n,); event: (n,) 1 = happened; ridges: all > 0, in any order.

    Returns:
        Coefficients in the order of ``ridges``.

    Raises:
        MorphomeError: nobody has an event.
    """
    Z = np.asarray(Z, dtype=np.float64)
    event = np.asarray(event).astype(bool)
    if not event.any():
        raise MorphomeError(
            f"a Cox model cannot be fitted: none of {len(event)} training patients has an event",
            "use fewer folds, another end point, or more patients",
        )
    if min(ridges) <= 0:
        raise ValueError("every ridge must be positive")
    back: np.ndarray | None = None
    design = Z
    if Z.shape[1] > Z.shape[0]:
        back, triangle = np.linalg.qr(Z.T)
        design = triangle.T
    likelihood = _Likelihood(design, np.asarray(time, dtype=np.float64), event)
    gamma = np.zeros(design.shape[1])
    found, converged = np.empty((len(ridges), len(gamma))), np.zeros(len(ridges), dtype=bool)
    for i in sorted(range(len(ridges)), key=lambda k: -ridges[k]):
        gamma, converged[i] = _newton(likelihood, float(ridges[i]), gamma)
        found[i] = gamma
    return RidgePath(found if back is None else found @ back.T, converged)


class _Likelihood:
    """Partial log-likelihood of a design with its derivatives; rows are put in the order of falling time."""

    def __init__(self, design: np.ndarray, time: np.ndarray, event: np.ndarray) -> None:
        order = np.argsort(-time, kind="stable")
        self.x, time, self.event = design[order], time[order], event[order]
        event_times, self.deaths = np.unique(time[self.event], return_counts=True)
        # Patients at risk at event time k are the rows before at_risk[k].
        self.at_risk = np.searchsorted(-time, -event_times, side="right")
        # Patient i is at risk at the event times before known[i].
        self.known = np.searchsorted(event_times, time, side="right")

    def objective(self, gamma: np.ndarray, ridge: float) -> float:
        """−ℓ + ½·ridge·‖γ‖²; infinite where an exponential under- or overflows."""
        h = self.x @ gamma
        top = h.max()
        with np.errstate(all="ignore"):
            sums = np.cumsum(np.exp(h - top))[self.at_risk - 1]
            value = self.deaths @ (np.log(sums) + top) - h[self.event].sum() + 0.5 * ridge * gamma @ gamma
        return float(value) if np.isfinite(value) else np.inf

    def slope(self, gamma: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
        """Gradient and Hessian of :meth:`objective`."""
        h = self.x @ gamma
        weight = np.exp(h - h.max())
        sums = np.cumsum(weight)[self.at_risk - 1]
        rate = np.concatenate([[0.0], np.cumsum(self.deaths / sums)])
        expected = weight * rate[self.known]
        mean = np.cumsum(weight[:, None] * self.x, axis=0)[self.at_risk - 1] / sums[:, None]
        gradient = self.x.T @ (expected - self.event) + ridge * gamma
        rows, means = np.sqrt(expected)[:, None] * self.x, np.sqrt(self.deaths)[:, None] * mean
        hessian = rows.T @ rows - means.T @ means
        hessian[np.diag_indices_from(hessian)] += ridge
        return gradient, hessian


def _newton(likelihood: _Likelihood, ridge: float, start: np.ndarray) -> tuple[np.ndarray, bool]:
    gamma, value = start, likelihood.objective(start, ridge)
    for _ in range(MAX_STEPS):
        gradient, hessian = likelihood.slope(gamma, ridge)
        step = cho_solve(cho_factor(hessian), gradient)
        size = 1.0
        while (lower := likelihood.objective(gamma - size * step, ridge)) > value and size > 1e-8:
            size *= 0.5
        if lower > value:
            # No step goes down any more: rounding, when the step is negligible.
            return gamma, bool(gradient @ step <= 1e-8 * max(1.0, abs(value)))
        gamma, gain, value = gamma - size * step, value - lower, lower
        if gain <= TOLERANCE * max(1.0, abs(value)):
            return gamma, True
    return gamma, False
