"""Patient bootstrap: one set of weights for all models and repeats, so that differences are paired.

Patients are drawn with replacement within the test folds of the first repeat; a pair of patients weighs w_i·w_j.
The interval covers the choice of test patients, not the variability of training (it is slightly too short).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from morphome.evaluation.metrics import FoldPredictions, brier_terms, pair_terms

#: With fewer usable resamples an interval would describe the resamples that happened to work.
_LEAST_USABLE = 0.9


@dataclass(frozen=True)
class Weights:
    """Bootstrap weights (B, n) and the column of each patient."""

    values: np.ndarray
    column: Mapping[str, int]

    def of(self, patients: np.ndarray) -> np.ndarray:
        """Weights (B, len(patients)) of these patients."""
        return self.values[:, [self.column[p] for p in patients]]


@dataclass(frozen=True)
class Interval:
    """95 % percentile limits, NaN with a reason."""

    lower: float
    upper: float
    reason: str = ""


def bootstrap_weights(fold_of: Mapping[str, int], resamples: int, seed: int) -> Weights:
    """Multinomial weights of every patient, drawn within folds.

    Args:
        fold_of: test fold of each patient in the first repeat.

    Returns:
        Weights whose row sums within a fold equal the fold's size; they depend on patients, folds and seed only.
    """
    patients = sorted(fold_of)
    column = {p: i for i, p in enumerate(patients)}
    values = np.zeros((resamples, len(patients)))
    for fold in sorted(set(fold_of.values())):
        members = [column[p] for p in patients if fold_of[p] == fold]
        rng = np.random.default_rng([seed, fold])
        values[:, members] = rng.multinomial(len(members), np.full(len(members), 1.0 / len(members)), size=resamples)
    return Weights(values, column)


def percentile_interval(values: np.ndarray) -> Interval:
    """2.5 % and 97.5 % points of the resamples that could be computed."""
    usable = values[np.isfinite(values)]
    if not len(values):
        return Interval(np.nan, np.nan, "no bootstrap asked for")
    if len(usable) < _LEAST_USABLE * len(values):
        return Interval(np.nan, np.nan, f"only {len(usable)} of {len(values)} resamples could be computed")
    lower, upper = np.quantile(usable, [0.025, 0.975])
    return Interval(float(lower), float(upper))


def stratified_c(repeats: Sequence[Sequence[FoldPredictions]], weights: Weights | None = None) -> np.ndarray:
    """Σ_k concordant_k / Σ_k comparable_k over pairs within a test fold, averaged over repeats.

    Args:
        repeats: the folds of each repeat. weights: bootstrap weights; every patient once without them.

    Returns:
        (B,) values, (1,) without weights; NaN when a repeat has no comparable pair or a risk is not finite.
    """
    found = []
    for folds in repeats:
        top, bottom = 0.0, 0.0
        for fold in folds:
            if not np.isfinite(fold.risk).all():
                bottom = np.nan
                continue
            w = np.ones((1, len(fold.time))) if weights is None else weights.of(fold.patient_id)
            t, b = pair_terms(fold, "harrell_c").sums(w)
            top, bottom = top + t, bottom + b
        found.append(_ratio(top, bottom))
    return np.mean(found, axis=0)


def fold_mean(folds: Sequence[FoldPredictions], metric: str, weights: Weights) -> np.ndarray:
    """Mean over folds (equal weights) of ``uno_c``, ``auc``, ``ibs`` or ``ipa`` in every resample, (B,).

    Args:
        folds: the folds of all repeats; the metric itself can be computed in each.

    A resample in which a fold happens to have no case or no control uses the other folds.
    """
    found = np.full((len(folds), len(weights.values)), np.nan)
    for row, fold in enumerate(folds):
        w = weights.of(fold.patient_id)
        if metric in {"uno_c", "auc"}:
            found[row] = _ratio(*pair_terms(fold, metric).sums(w))
            continue
        terms, _ = brier_terms(fold)
        if terms is not None:
            model, marginal = w @ terms.model, w @ terms.marginal
            found[row] = model / w.sum(axis=1) if metric == "ibs" else 1.0 - _ratio(model, marginal)
    usable = np.isfinite(found)
    return _ratio(np.where(usable, found, 0.0).sum(axis=0), usable.sum(axis=0).astype(float))


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    top, bottom = np.atleast_1d(np.asarray(top, float)), np.atleast_1d(np.asarray(bottom, float))
    return np.divide(top, bottom, out=np.full(np.broadcast_shapes(top.shape, bottom.shape), np.nan), where=bottom > 0)
