"""How much of what genes add a student of slides alone keeps.

gap closed = (C_student - C_wsi) / (C_multi - C_wsi): 0 for a student no better than slides alone, 1 for one as good as
the model that has the genes. A ratio over a difference that may be 0 says nothing, so it is given only where the
interval of the denominator lies above 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from morphome.errors import MorphomeError
from morphome.evaluation.intervals import Interval, Weights, percentile_interval, stratified_c
from morphome.evaluation.metrics import FoldPredictions


@dataclass(frozen=True)
class Resampled:
    """A number and what it is in each bootstrap resample (B,); numbers of the same :class:`Weights` are paired."""

    value: float
    resamples: np.ndarray


@dataclass(frozen=True)
class GapClosed:
    """Gap closed with its 95 % interval, NaN with a reason; and the gap C_multi - C_wsi itself."""

    value: float
    interval: Interval
    gap: float
    gap_interval: Interval

    @property
    def reason(self) -> str:
        """Why there is no value; empty where there is one."""
        return self.interval.reason if np.isnan(self.value) else ""


def resampled_c(repeats: Sequence[Sequence[FoldPredictions]], weights: Weights) -> Resampled:
    """Stratified C of a model, and in each resample; ``weights`` must be those of all models to be compared."""
    return Resampled(float(stratified_c(repeats)[0]), stratified_c(repeats, weights))


def gap_closed(c_student: Resampled, c_wsi: Resampled, c_multi: Resampled) -> GapClosed:
    """(C_student - C_wsi) / (C_multi - C_wsi) with a paired patient bootstrap.

    Args:
        c_student: predicts from slides alone, taught with genes; c_wsi: slides alone; c_multi: slides and genes.
            All three with the same bootstrap weights.

    Raises:
        MorphomeError: different numbers of resamples.
    """
    if not len(c_student.resamples) == len(c_wsi.resamples) == len(c_multi.resamples):
        raise MorphomeError(
            "gap closed: the three models have different numbers of resamples",
            "use the same bootstrap weights for all of them",
        )
    gap = c_multi.value - c_wsi.value
    gaps = c_multi.resamples - c_wsi.resamples
    gap_interval = percentile_interval(gaps)
    reason = gap_interval.reason
    if not reason and gap_interval.lower <= 0:
        reason = (
            f"C of slides and genes minus C of slides alone has the interval {gap_interval.lower:.3f} to "
            f"{gap_interval.upper:.3f}: there is no gap to close"
        )
    if not reason and not (np.isfinite(c_student.value) and gap > 0):
        reason = "the C of a model could not be computed, or genes add nothing on the patients as they are"
    if reason:
        return GapClosed(np.nan, Interval(np.nan, np.nan, reason), gap, gap_interval)
    closed = np.full(len(gaps), np.nan)
    # Fewer than 1 in 40 resamples have no gap; they have no ratio either.
    np.divide(c_student.resamples - c_wsi.resamples, gaps, out=closed, where=gaps > 0)
    return GapClosed((c_student.value - c_wsi.value) / gap, percentile_interval(closed), gap, gap_interval)
