"""The gap closed by a student of slides alone."""

from __future__ import annotations

import numpy as np
import pytest

from morphome.errors import MorphomeError
from morphome.evaluation.intervals import bootstrap_weights
from morphome.evaluation.missing import Resampled, gap_closed, resampled_c


@pytest.fixture(scope="module")
def c_of(planted):
    """``c_of(share)``: C of a model whose risk is that share of the truth, the rest noise."""
    weights = bootstrap_weights(dict(zip(planted.ids, planted.fold[0], strict=True)), 300, 1)

    def made(share, seed=0):
        noise = np.random.default_rng(seed).standard_normal(planted.n)

        def model(rows, train):
            risk = share * planted.eta[rows] + (1 - share) * noise[rows]
            return risk, np.full((len(rows), len(planted.grid)), np.nan)

        return resampled_c([[planted.data(model, 0, f) for f in range(planted.folds)]], weights)

    return made


def test_a_student_between_slides_and_both(c_of):
    wsi, student, multi = c_of(0.15), c_of(0.35), c_of(1.0)
    found = gap_closed(student, wsi, multi)
    assert found.value == pytest.approx((student.value - wsi.value) / (multi.value - wsi.value))
    assert 0 < found.interval.lower < found.value < found.interval.upper < 1 and not found.reason
    assert found.gap == multi.value - wsi.value and found.gap_interval.lower > 0
    # Paired: resamples of the parts, not of each alone.
    ratio = (student.resamples - wsi.resamples) / (multi.resamples - wsi.resamples)
    np.testing.assert_allclose([found.interval.lower, found.interval.upper], np.quantile(ratio, [0.025, 0.975]))
    # 0 and 1 exactly, without any width.
    for taught, value in ((wsi, 0.0), (multi, 1.0)):
        found = gap_closed(taught, wsi, multi)
        assert (found.value, found.interval.lower, found.interval.upper) == (value, value, value)


def test_no_gap_no_ratio(c_of):
    wsi, student = c_of(0.3), c_of(0.5)
    for multi in (c_of(0.3, seed=4), c_of(0.0)):  # as good as slides alone; worse
        found = gap_closed(student, wsi, multi)
        assert np.isnan(found.value) and np.isnan(found.interval.lower)
        assert "no gap to close" in found.reason and np.isfinite(found.gap_interval.lower)


def test_what_cannot_be_computed_has_a_reason(c_of):
    wsi, student, multi = c_of(0.15), c_of(0.35), c_of(1.0)
    broken = Resampled(np.nan, np.full(300, np.nan))
    assert "could not be computed" in gap_closed(broken, wsi, multi).reason
    assert "0 of 300" in gap_closed(student, wsi, broken).reason
    none = np.empty(0)
    found = gap_closed(*(Resampled(c.value, none) for c in (student, wsi, multi)))
    assert np.isnan(found.value) and "no bootstrap" in found.reason
    with pytest.raises(MorphomeError, match="different numbers of resamples"):
        gap_closed(student, wsi, Resampled(0.7, none))
    # Resamples without a gap are left out of the interval, not turned into huge ratios.
    gaps = np.r_[np.full(99, 0.1), -0.01]
    base = np.full(100, 0.6)
    found = gap_closed(Resampled(0.65, base + 0.05), Resampled(0.6, base), Resampled(0.7, base + gaps))
    assert found.value == pytest.approx(0.5) and found.interval.lower == pytest.approx(0.5)
