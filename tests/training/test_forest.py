"""The saved survival forest against the library that grew it."""

from __future__ import annotations

import numpy as np
import pytest
from sksurv.ensemble import RandomSurvivalForest
from sksurv.util import Surv

from morphome import survival
from morphome.errors import MorphomeError
from morphome.training.forest import SurvivalForest


@pytest.fixture(scope="module")
def cohort():
    """90 patients, 6 columns of which the first matters, tied and censored times."""
    rng = np.random.default_rng(5)
    X = rng.normal(size=(90, 6))
    time = np.ceil(10 * rng.exponential(size=90) / np.exp(1.5 * X[:, 0])) / 2
    event = rng.uniform(size=90) < 0.6
    time[0], event[0] = 0.1, False  # Censored before anybody has an event.
    return X, time, event


def grow(cohort, **changes):
    X, time, event = cohort
    return SurvivalForest(
        **survival.fit_survival_forest(X, time, event, **{"trees": 12, "min_leaf": 8, "seed": 4} | changes)
    )


def test_equal_to_the_library(cohort, monkeypatch):
    """Two batches of trees: each is the library's forest of the seed drawn for it."""
    X, time, event = cohort
    monkeypatch.setattr(survival, "TREES_AT_A_TIME", 7)
    ours = grow(cohort)
    draws = np.random.default_rng(4)
    new = np.random.default_rng(6).normal(size=(25, 6))
    mortality, hazard = [], []
    for trees in (7, 5):
        seed = int(draws.integers(2**31))
        theirs = RandomSurvivalForest(n_estimators=trees, min_samples_leaf=8, random_state=seed)
        theirs.fit(X, Surv.from_arrays(event, time))
        mortality.append(trees * theirs.predict(new))
        curves = theirs.predict_cumulative_hazard_function(new, return_array=True)
        hazard.append(trees * curves[:, np.isin(theirs.unique_times_, time[event])])
    assert len(ours.root) == 12
    np.testing.assert_array_equal(ours.event_times, np.unique(time[event]))
    np.testing.assert_allclose(ours.cumulative_hazard(new), sum(hazard) / 12, atol=1e-12)
    np.testing.assert_allclose(ours.risk(new), sum(mortality) / 12, rtol=1e-12)


def test_rows_end_where_the_rules_send_them(cohort):
    forest = grow(cohort)
    x = cohort[0][:10]
    for i, row in enumerate(x.astype(np.float32)):
        for tree, node in enumerate(forest.root):
            while forest.left[node] >= 0:
                side = forest.left if row[forest.feature[node]] <= forest.threshold[node] else forest.right
                node = side[node]
            assert forest.leaves(x)[i, tree] == node


def test_curves_fall_and_risk_is_their_sum(cohort):
    X, time, event = cohort
    forest = grow(cohort)
    hazard = forest.cumulative_hazard(X)
    assert (np.diff(hazard, axis=1) >= 0).all()
    np.testing.assert_allclose(forest.risk(X), hazard.sum(axis=1))
    last = forest.event_times[-1]
    curves = forest.survival(X, np.array([0.0, forest.event_times[3], last, last + 9]))
    np.testing.assert_array_equal(curves[:, 0], 1.0)
    np.testing.assert_allclose(curves[:, 1], np.exp(-hazard[:, 3]))
    np.testing.assert_array_equal(curves[:, 2], curves[:, 3])
    assert survival.harrell(time, event, forest.risk(X)).c > 0.75


def test_leaves_have_patients_enough_and_the_seed_decides(cohort):
    forest = grow(cohort, trees=30)
    again = grow(cohort, trees=30)
    for name, values in forest.arrays("f").items():
        np.testing.assert_array_equal(values, again.arrays("f")[name])
    assert (grow(cohort, trees=30, seed=5).risk(cohort[0]) != forest.risk(cohort[0])).any()
    leaf = forest.leaves(cohort[0])
    sizes = [np.unique(column, return_counts=True)[1].min() for column in leaf.T]
    assert min(sizes) >= 8  # at least those drawn into the leaf end in it


def test_a_row_is_predicted_alone_as_among_others(cohort):
    forest = grow(cohort)
    together = forest.risk(cohort[0])
    np.testing.assert_array_equal([forest.risk(row[None])[0] for row in cohort[0]], together)
    restored = SurvivalForest.restore(forest.arrays("weights/forest"), "weights/forest")
    np.testing.assert_array_equal(restored.risk(cohort[0]), together)


def test_trees_without_a_split_are_one_curve_per_tree(cohort):
    forest = grow(cohort, min_leaf=60)
    assert forest.n_splits == 0
    assert np.ptp(forest.risk(cohort[0])) == 0
    with pytest.raises(MorphomeError, match="none of 90 training patients"):
        survival.fit_survival_forest(cohort[0], cohort[1], np.zeros(90), trees=2, min_leaf=5, seed=1)
