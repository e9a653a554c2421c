"""The choice of the epoch, and survival curves after class-balanced sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from morphome.models import hazard
from morphome.survival import kaplan_meier, step
from morphome.training.objective import EpochChoice, HazardObjective, sampling_weights


def test_epoch_choice():
    choice = EpochChoice("inner_best", patience=3)
    seen = [(0.6, 1.0), (0.7, 1.0), (0.7, 0.9), (0.7, 0.95), (0.65, 0.1), (0.9, 2.0)]
    kept, stops = [], []
    for epoch, (c, loss) in enumerate(seen[:5], start=1):
        kept.append(choice.update(epoch, c, loss))
        stops.append(choice.stop)
    assert kept == [True, True, True, False, False]
    assert stops == [False, False, False, False, True]  # three epochs without a higher C
    assert choice.epoch == 3
    last = EpochChoice("last", patience=1)
    assert all(last.update(e, c, loss) for e, (c, loss) in enumerate(seen, start=1))
    assert (last.epoch, last.stop) == (6, False)
    none = EpochChoice("inner_best", patience=2)
    assert [none.update(e, math.nan, loss) for e, loss in enumerate([3.0, 2.0, 2.5], start=1)] == [True, True, False]
    assert none.epoch == 2


def simulated(last_censoring: float, spread: float, after: float = 0.0, n: int = 6000):
    """Follow-up, K = 4 bins and the logits that a model fitted to class-balanced patients has: the resampled event
    rate of each bin plus ``spread`` times the true log hazard ratio. Censoring is uniform, and starts ``after`` months
    late."""
    rng = np.random.default_rng(4)
    z = rng.normal(size=n)
    death = 30 * (rng.exponential(size=n) / np.exp(spread * z)) ** (1 / 1.2)
    censored = after + rng.uniform(1, last_censoring, n)
    time, event = np.minimum(death, censored), (death <= censored).astype(int)
    edges = hazard.bin_edges(time, event, 4, "here")
    bins = hazard.bin_index(time, edges)
    weight = sampling_weights(bins, event)
    h = np.array([weight[(bins == k) & (event == 1)].sum() / weight[bins >= k].sum() for k in range(4)])
    return time, event, edges, np.log(h / (1 - h)) + spread * z[:, None]


@pytest.mark.parametrize("spread", [0.0, 0.7])
@pytest.mark.parametrize(("last_censoring", "rate", "tolerance"), [(21, 0.25, 0.02), (72, 0.63, 0.02)])
def test_curves_after_balanced_sampling_have_the_level_of_kaplan_meier(last_censoring, rate, tolerance, spread):
    time, event, edges, logits = simulated(last_censoring, spread)
    assert event.mean() == pytest.approx(rate, abs=0.04)
    objective = HazardObjective(edges)
    risk, before = objective.prediction(logits, edges)
    if spread == 0:
        # Without information, whatever the event rate: 7/8, 7/8 x 5/6 and so on from the sampler's own classes.
        np.testing.assert_allclose(before[0], [0.875, 0.729, 0.547], atol=5e-4)
    objective.recalibrate(logits, time, event)
    again, after = objective.prediction(logits, edges)
    km = step(*kaplan_meier(time, event), edges, before=1.0)
    np.testing.assert_allclose(after.mean(axis=0), km, atol=tolerance)
    assert np.abs(before.mean(axis=0) - km).max() > 0.06
    np.testing.assert_array_equal(again, risk)


def test_without_censoring_before_the_last_edge_the_level_is_that_of_kaplan_meier():
    time, event, edges, logits = simulated(1.0 + 1e-9, 0.0, after=25.0)
    objective = HazardObjective(edges)
    objective.recalibrate(logits, time, event)
    _, after = objective.prediction(logits, edges)
    before_the_edges = np.array([(time < edge).mean() for edge in edges])
    np.testing.assert_allclose(after[0], 1 - before_the_edges, atol=1e-9)
    np.testing.assert_allclose(after[0], step(*kaplan_meier(time, event), edges, before=1.0), atol=1e-3)


def test_offsets_vanish_where_the_hazards_are_right():
    time, event, edges, logits = simulated(40, 0.5)
    objective = HazardObjective(edges)
    np.testing.assert_array_equal(objective.offsets, np.zeros(4))
    objective.recalibrate(logits, time, event)
    right = HazardObjective(edges)
    right.recalibrate(logits + objective.offsets, time, event)
    np.testing.assert_allclose(right.offsets, 0, atol=1e-9)
    loss = [o.loss(torch.from_numpy(logits[:1]), 3.0, 1, 0.0) for o in (objective, right)]
    assert loss[0] == loss[1]
