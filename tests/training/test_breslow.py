"""Survival curves from log risks: by hand, against another package, saved and restored."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter, NelsonAalenFitter

from morphome.errors import MorphomeError
from morphome.training.breslow import BreslowBaseline

GRID = np.array([0.0, 0.5, 1.0, 3.0, 6.0, 40.0])


@pytest.fixture
def sample():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(60, 2))
    time = np.ceil(10 * rng.exponential(size=60) / np.exp(x @ [0.8, -0.4]))  # with ties
    return x, time, (rng.uniform(size=60) < 0.6).astype(int)


def test_by_hand():
    """Times 2, 3, 3, 5; e^h = 1, 2, 3, 4; deaths at 2 and twice at 3: H0 = 1/10, then 1/10 + 2/9."""
    baseline = BreslowBaseline.fit(np.log([1, 2, 3, 4])[:, None], [2.0, 3.0, 3.0, 5.0], [1, 1, 1, 0])
    expected = [0, 0, 1 / 10, 1 / 10 + 2 / 9, 1 / 10 + 2 / 9]
    np.testing.assert_allclose(baseline.cumulative_hazard([0.0, 1.9, 2.0, 3.0, 99.0]), expected)
    curves = baseline.survival(np.log([[1.0], [5.0]]), [1.0, 2.0, 4.0])
    np.testing.assert_allclose(curves[0], np.exp([0, -1 / 10, -1 / 10 - 2 / 9]))
    np.testing.assert_allclose(curves[1], curves[0] ** 5)


def test_agrees_with_lifelines(sample):
    """The same linear predictor in a model fitted there; its baseline is that of an average patient."""
    x, time, event = sample
    frame = pd.DataFrame(x, columns=["a", "b"]).assign(time=time, event=event)
    other = CoxPHFitter().fit(frame, "time", "event")
    h = x @ other.params_.to_numpy()
    grid = GRID[2:]  # from the first time on; before it, the other package gives the value there
    curves = BreslowBaseline.fit(h, time, event).survival(h, grid)
    expected = other.predict_survival_function(frame, times=grid).to_numpy().T
    assert time.min() == grid[0]
    assert expected.min() < 0.1
    assert expected.max() > 0.9
    np.testing.assert_allclose(curves, expected, atol=1e-6)


def test_equal_risks_give_nelson_aalen(sample):
    _, time, event = sample
    baseline = BreslowBaseline.fit(np.zeros(60), time, event)
    # The tie formula of discrete deaths is d / n there, as Breslow's.
    other = NelsonAalenFitter(nelson_aalen_smoothing=False).fit(time, event)
    expected = other.predict(GRID).to_numpy()
    np.testing.assert_allclose(baseline.cumulative_hazard(GRID), expected)


def test_a_shift_of_all_log_risks_changes_no_curve(sample):
    x, time, event = sample
    h = x[:, 0]
    one, other = BreslowBaseline.fit(h, time, event), BreslowBaseline.fit(h + 30.0, time, event)
    np.testing.assert_allclose(other.survival(h + 30.0, GRID), one.survival(h, GRID), rtol=1e-9)


def test_curves_of_new_patients(sample):
    x, time, event = sample
    baseline = BreslowBaseline.fit(3 * x[:, 0], time, event)
    curves = baseline.survival(np.float32([-1000, -1, 0, 2, 1000]), GRID)
    assert (curves[:, 0] == 1).all()
    assert ((curves >= 0) & (curves <= 1)).all()
    assert (np.diff(curves, axis=1) <= 0).all()
    assert (np.diff(curves, axis=0) <= 0).all()
    assert (curves[0] == 1).all()
    assert curves[4, -1] == 0


def test_without_an_event_nobody_dies(sample):
    _, time, _ = sample
    assert (BreslowBaseline.fit(np.zeros(60), time, np.zeros(60)).survival([0.0, 3.0], GRID) == 1).all()


def test_saved_and_restored(sample):
    x, time, event = sample
    baseline = BreslowBaseline.fit(x[:, 0], time, event)
    arrays = baseline.arrays()
    assert set(arrays) == {"fitted/baseline/times", "fitted/baseline/cumulative_hazard"}
    again = BreslowBaseline.restore(arrays)
    np.testing.assert_array_equal(again.survival(x[:, 0], GRID), baseline.survival(x[:, 0], GRID))


@pytest.mark.parametrize("value", [np.nan, np.inf, 800.0, -800.0])
def test_a_diverged_network_is_named(value):
    with pytest.raises(MorphomeError, match="fold 3: log risks"):
        BreslowBaseline.fit([0.0, value], [1.0, 2.0], [1, 1], where="fold 3")
