"""Metrics of one fold: their terms repeat the library's values, and every gap has its reason."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from sksurv.metrics import integrated_brier_score
from sksurv.util import Surv

from morphome import survival
from morphome.evaluation.metrics import METRICS, brier_terms, fold_metrics, pair_terms


@pytest.mark.parametrize("model", ["oracle", "random", "constant"])
@pytest.mark.parametrize("fold", [0, 1, 2])
def test_terms_repeat_the_library(planted, model, fold):
    data = planted.data(getattr(planted, model), fold=fold)
    data = dataclasses.replace(data, risk=np.round(data.risk, 1), time=np.round(data.time) + 0.5)  # ties
    metrics = fold_metrics(data)
    once = np.ones((1, len(data.time)))
    for metric in ("harrell_c", "uno_c", "auc"):
        top, bottom = pair_terms(data, metric).sums(once)
        assert top[0] / bottom[0] == pytest.approx(metrics[metric].value, abs=1e-12)
    counts = survival.harrell(data.time, data.event, data.risk)
    assert pair_terms(data, "harrell_c").bottom.sum() == counts.comparable
    terms, reason = brier_terms(data)
    assert reason == ""
    assert terms.model.mean() == metrics["ibs"].value
    assert metrics["ipa"].value == pytest.approx(1 - terms.model.mean() / terms.marginal.mean(), abs=1e-14)


@pytest.mark.parametrize("model", ["oracle", "random", "constant"])
def test_integrated_brier_score_of_the_library(planted, model):
    """The library refuses times before the first test patient, so the grid starts there."""
    data = planted.data(getattr(planted, model))
    inside = data.grid > data.time.min()
    data = dataclasses.replace(data, grid=data.grid[inside], survival=data.survival[:, inside])
    test = survival.truncate(data.time, data.event, data.horizon)
    both = [Surv.from_arrays(e, t) for t, e in ((data.train_time, data.train_event), test)]
    library = integrated_brier_score(*both, data.survival, data.grid)
    assert fold_metrics(data)["ibs"].value == pytest.approx(library, abs=1e-12)


def test_whole_weights_are_repeated_patients(planted):
    """A weight of 2 is the patient listed twice (whose two copies are no pair)."""
    data = planted.data(planted.oracle)
    n = len(data.time)
    weights = np.random.default_rng(2).integers(0, 3, n)
    rows = np.repeat(np.arange(n), weights)
    for metric in ("harrell_c", "uno_c", "auc"):
        top, bottom = pair_terms(data, metric).sums(weights[None, :].astype(float))
        part = {k: getattr(data, k)[rows] for k in ("patient_id", "time", "event", "risk", "survival")}
        again = fold_metrics(dataclasses.replace(data, **part))[metric]
        assert top[0] / bottom[0] == pytest.approx(again.value, abs=1e-12)


def test_oracle_random_constant(planted):
    oracle, noise, flat = (fold_metrics(planted.data(m)) for m in (planted.oracle, planted.random, planted.constant))
    assert oracle["harrell_c"].value > 0.7 and oracle["auc"].value > 0.75 and oracle["ipa"].value > 0.1
    assert noise["ipa"].value < 0
    assert flat["harrell_c"].value == flat["uno_c"].value == flat["auc"].value == 0.5
    assert flat["ipa"].value == pytest.approx(0.0, abs=1e-12)
    flipped = planted.data(planted.oracle)
    turned = fold_metrics(dataclasses.replace(flipped, risk=-flipped.risk))
    for metric in ("harrell_c", "uno_c", "auc"):
        assert turned[metric].value == pytest.approx(1 - oracle[metric].value, abs=1e-12)


def test_units_do_not_matter(planted):
    data = planted.data(planted.oracle)
    days = {k: getattr(data, k) * 30.4375 for k in ("time", "grid", "train_time")}
    again = fold_metrics(dataclasses.replace(data, horizon=data.horizon * 30.4375, **days))
    for metric, found in fold_metrics(data).items():
        assert again[metric].value == pytest.approx(found.value, abs=1e-9)


def test_only_keeps_every_array_in_step(planted):
    data = planted.data(planted.oracle)
    gone = set(data.patient_id[[3, 7]])
    less = data.only(set(data.patient_id) - gone)
    assert len(less.time) == len(less.risk) == len(less.survival) == len(data.time) - 2
    assert not gone & set(less.patient_id)
    assert data.only(set(data.patient_id)) is data


@pytest.mark.parametrize(
    ("change", "missing", "reason"),
    [
        ({"horizon": None, "horizon_reason": "too few controls"}, METRICS[1:], "too few controls"),
        ({"horizon": 1e-6}, METRICS[1:], "no event before|no case|time grid"),
        ({"horizon": 23.0}, ("ibs", "ipa"), "time grid does not end at the horizon"),
        ({"event": False}, ("harrell_c", "uno_c", "auc"), "no event|no case"),
        ({"train_event": False}, METRICS[1:], "no event among the training patients"),
        ({"risk": np.nan}, ("harrell_c", "uno_c", "auc"), "risks are not finite"),
        ({"survival": np.nan}, ("ibs", "ipa"), "not identified"),
    ],
)
def test_gaps_have_reasons(planted, change, missing, reason):
    data = planted.data(planted.oracle)
    full = {
        k: np.full_like(getattr(data, k), v) if isinstance(getattr(data, k), np.ndarray) else v
        for k, v in change.items()
    }
    found = fold_metrics(dataclasses.replace(data, **full))
    assert set(found) == set(METRICS)
    for metric, value in found.items():
        assert math.isnan(value.value) == bool(value.reason) == (metric in missing), metric
        if value.reason:
            assert any(part in value.reason for part in reason.split("|"))


def test_curves_beyond_the_last_edge_are_not_scored(planted):
    data = planted.data(planted.oracle)
    curves = data.survival.copy()
    curves[:, 80:] = np.nan
    found = fold_metrics(dataclasses.replace(data, survival=curves))
    assert math.isnan(found["ibs"].value)
    assert "not identified from" in found["ibs"].reason
    assert np.isfinite(found["auc"].value)


def test_threshold_is_the_training_median(planted):
    data = planted.data(planted.oracle)
    assert data.threshold == np.median(data.train_risk)
    assert math.isnan(dataclasses.replace(data, train_risk=np.array([1.0, np.nan])).threshold)
    assert data.survival_at_horizon == pytest.approx(data.survival[:, -1])
    assert np.isnan(dataclasses.replace(data, horizon=None).survival_at_horizon).all()
