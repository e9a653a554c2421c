"""What one model reached on one test fold, and the per-patient and per-pair terms behind each number.

The numbers come from :mod:`morphome.survival`; the terms restate them as sums over patients or pairs, so that a
bootstrap only has to reweight (see :mod:`morphome.evaluation.intervals`). Both agree to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from morphome.survival import (
    TIED_TOLERANCE,
    Metric,
    auc_at,
    brier_contributions,
    censoring_at,
    harrell,
    integrate,
    kaplan_meier,
    step,
    uno,
)

METRICS = ("harrell_c", "uno_c", "auc", "ibs", "ipa")


@dataclass(frozen=True)
class FoldPredictions:
    """Predictions of one model on one test fold, and the training outcomes that weigh them.

    Attributes:
        patient_id, time, event, risk: (n,) test patients, sorted by id; months, bool, higher = worse.
        survival: (n, T) S_i(t) on ``grid`` (T,) months.
        train_time, train_event, train_risk: (m,) training patients (inner validation included).
        horizon: τ in months, None without one; horizon_reason says why.
        branch_risk: risk (n,) that each branch of a fused model gives alone, by branch.
    """

    patient_id: np.ndarray
    time: np.ndarray
    event: np.ndarray
    risk: np.ndarray
    survival: np.ndarray
    grid: np.ndarray
    train_time: np.ndarray
    train_event: np.ndarray
    train_risk: np.ndarray
    horizon: float | None
    horizon_reason: str = ""
    branch_risk: Mapping[str, np.ndarray] = field(default_factory=dict)

    def only(self, patients: set[str]) -> FoldPredictions:
        """The same fold with these test patients alone."""
        keep = np.array([p in patients for p in self.patient_id], dtype=bool)
        if keep.all():
            return self
        parts = {k: getattr(self, k)[keep] for k in ("patient_id", "time", "event", "risk", "survival")}
        parts["branch_risk"] = {branch: risk[keep] for branch, risk in self.branch_risk.items()}
        return FoldPredictions(**{**self.__dict__, **parts})

    @property
    def threshold(self) -> float:
        """Median risk of the training fold; NaN when it is not finite."""
        finite = len(self.train_risk) and np.isfinite(self.train_risk).all()
        return float(np.median(self.train_risk)) if finite else np.nan

    @property
    def survival_at_horizon(self) -> np.ndarray:
        """S_i(τ) (n,); NaN without a horizon or when the grid does not end there."""
        curves, _, reason = self.curves()
        return np.full(len(self.time), np.nan) if reason else curves[:, -1]

    def curves(self) -> tuple[np.ndarray, np.ndarray, str]:
        """S_i(t) and the grid up to τ, and why they cannot be used."""
        if self.horizon is None:
            return self.survival, self.grid, self.horizon_reason or "no horizon"
        within = self.grid <= self.horizon * (1 + 1e-9)
        grid = self.grid[within]
        if len(grid) < 2 or not np.isclose(grid[-1], self.horizon, rtol=1e-9):
            return self.survival, self.grid, f"the run's time grid does not end at the horizon ({self.horizon:g})"
        return self.survival[:, within], grid, ""


@dataclass(frozen=True)
class Pairs:
    """A concordance as sums over ordered pairs: Σ w_i w_j top_ij / Σ w_i w_j bottom_ij."""

    top: np.ndarray
    bottom: np.ndarray

    def sums(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numerators and denominators (B,) under patient weights (B, n)."""
        return tuple(((weights @ part) * weights).sum(axis=1) for part in (self.top, self.bottom))


@dataclass(frozen=True)
class Means:
    """IBS as a mean of patients' shares, and the same of the training fold's Kaplan-Meier curve."""

    model: np.ndarray
    marginal: np.ndarray


def fold_metrics(fold: FoldPredictions) -> dict[str, Metric]:
    """Harrell's C, Uno's C(τ), AUC(τ), IBS(τ) and IPA(τ) = 1 − IBS/IBS of the training Kaplan-Meier curve."""
    counts = harrell(fold.time, fold.event, fold.risk)
    found = {"harrell_c": Metric(counts.c, counts.reason)}
    if fold.horizon is None:
        missing = Metric(np.nan, fold.horizon_reason or "no horizon")
        return found | {name: missing for name in METRICS[1:]}
    data = (fold.train_time, fold.train_event, fold.time, fold.event, fold.risk, fold.horizon)
    found["uno_c"], found["auc"] = uno(*data), auc_at(*data)
    means, reason = brier_terms(fold)
    if means is None:
        return found | {"ibs": Metric(np.nan, reason), "ipa": Metric(np.nan, reason)}
    model, marginal = float(means.model.mean()), float(means.marginal.mean())
    found["ibs"] = Metric(model)
    found["ipa"] = Metric(1.0 - model / marginal) if marginal > 0 else Metric(np.nan, "the marginal curve has IBS 0")
    return found


def brier_terms(fold: FoldPredictions) -> tuple[Means | None, str]:
    """Each patient's share of IBS(τ), for the model and for the training fold's Kaplan-Meier curve."""
    curves, grid, reason = fold.curves()
    if reason:
        return None, reason
    data = (fold.train_time, fold.train_event, fold.time, fold.event)
    shares, reason = brier_contributions(*data, curves, grid)
    if reason:
        return None, reason
    curve = step(*kaplan_meier(fold.train_time, fold.train_event), grid, before=1.0)
    marginal, _ = brier_contributions(*data, np.tile(curve, (len(fold.time), 1)), grid)
    return Means(integrate(shares, grid), integrate(marginal, grid)), ""


def pair_terms(fold: FoldPredictions, metric: str) -> Pairs:
    """The pairs of ``harrell_c``, ``uno_c`` or ``auc`` (formulas in :mod:`morphome.survival`).

    Row i is the patient with the event, column j the one who should have the lower risk.
    """
    gap = fold.risk[:, None] - fold.risk[None, :]
    right = np.where(np.abs(gap) <= TIED_TOLERANCE, 0.5, (gap > 0).astype(np.float64))
    time, event = fold.time, fold.event
    if metric == "auc":
        weight = np.where(event & (time <= fold.horizon), 1.0, 0.0) / _own_g(fold)
        bottom = weight[:, None] * (time > fold.horizon)[None, :]
        return Pairs(bottom * right, bottom)
    later = (time[:, None] < time[None, :]) | ((time[:, None] == time[None, :]) & ~event[None, :])
    bottom = (event[:, None] & later).astype(np.float64)
    if metric == "uno_c":
        bottom *= (np.where(event & (time < fold.horizon), 1.0, 0.0) / _own_g(fold) ** 2)[:, None]
    return Pairs(bottom * right, bottom)


def _own_g(fold: FoldPredictions) -> np.ndarray:
    """G(T_i) of patients with an event up to τ, 1 for all others (they have no weight)."""
    needed = fold.event & (fold.time <= fold.horizon)
    g = np.ones(len(fold.time))
    if needed.any():
        g[needed] = censoring_at(fold.train_time, fold.train_event, fold.time[needed])
    return g
