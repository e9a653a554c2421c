"""Hazard ratio and curves of risk groups against lifelines, and groups that are none."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter, KaplanMeierFitter

from morphome.evaluation.risk_groups import compare_groups, group_curves, rmst, stratified_cox
from morphome.survival import logrank

#: lifelines' own.
pytestmark = pytest.mark.filterwarnings("ignore:Starting with pandas version 4")


@pytest.fixture(scope="module")
def groups() -> dict:
    rng = np.random.default_rng(4)
    n = 150
    high, fold = rng.random(n) < 0.45, rng.integers(0, 3, n)
    death = rng.exponential(30 * np.exp(-0.7 * high - 0.4 * fold))
    censored = rng.uniform(2, 60, n)
    time = np.ceil(np.minimum(death, censored) / 2)  # many ties
    return {"time": time, "event": death <= censored, "high": high, "fold": fold}


def test_stratified_cox_against_lifelines(groups):
    frame = pd.DataFrame(groups).astype({"high": float})
    other = CoxPHFitter().fit(frame, "time", "event", strata=["fold"], fit_options={"precision": 1e-12})
    found = stratified_cox(groups["high"], groups["time"], groups["event"], groups["fold"])
    assert found.coef == pytest.approx(other.params_["high"], abs=1e-7)
    assert found.se == pytest.approx(other.standard_errors_["high"], abs=1e-7)
    assert found.loglik == pytest.approx(other.log_likelihood_, abs=1e-7)


def test_group_row(groups):
    row = compare_groups(groups["time"], groups["event"], groups["high"], groups["fold"], horizon=12.0)
    assert row["n_high"] + row["n_low"] == 150
    assert row["events_high"] == (groups["event"] & groups["high"]).sum()
    assert 1 < row["hr_lower"] < row["hazard_ratio"] < row["hr_upper"]
    chi2, p, _ = logrank(groups["time"], groups["event"], groups["high"], groups["fold"])
    assert (row["logrank_chi2"], row["logrank_p"]) == (chi2, p)
    assert row["rmst_high_months"] < row["rmst_low_months"] < 12
    assert row["reason"] == "" and row["note"].startswith("descriptive")
    turned = compare_groups(groups["time"], groups["event"], ~groups["high"], groups["fold"], None)
    assert turned["hazard_ratio"] == pytest.approx(1 / row["hazard_ratio"], rel=1e-9)
    assert math.isnan(turned["rmst_high_months"])


def test_curves_against_lifelines(groups):
    found = group_curves(groups["time"], groups["event"], groups["high"])
    assert list(found.columns) == ["group", "time_months", "survival", "lower", "upper", "at_risk", "events"]
    high = found[found["group"] == "high"]
    fit = KaplanMeierFitter().fit(groups["time"][groups["high"]], groups["event"][groups["high"]])
    assert high["survival"].to_numpy() == pytest.approx(fit.survival_function_["KM_estimate"].to_numpy(), abs=1e-12)
    limits = fit.confidence_interval_.to_numpy()
    inside = high["lower"].notna().to_numpy()
    assert high[["lower", "upper"]].to_numpy()[inside] == pytest.approx(limits[inside], abs=1e-9)
    assert high["at_risk"].tolist() == fit.event_table["at_risk"].astype(int).tolist()
    assert high["events"].tolist() == fit.event_table["observed"].astype(int).tolist()
    assert (high["time_months"].iloc[0], high["survival"].iloc[0]) == (0.0, 1.0)


def test_no_groups_and_no_events(groups):
    time, event, fold = groups["time"], groups["event"], groups["fold"]
    none = compare_groups(time, event, np.zeros(150, bool), fold, 12.0)
    assert math.isnan(none["hazard_ratio"]) and math.isnan(none["logrank_p"])
    assert "at or below the training median" in none["reason"]
    assert set(group_curves(time, event, np.zeros(150, bool))["group"]) == {"low"}
    apart = compare_groups(time, event & groups["high"], groups["high"], fold, 12.0)
    assert math.isnan(apart["hazard_ratio"]) and "one group has no event" in apart["reason"]
    assert apart["events_low"] == 0
    assert np.isfinite(apart["logrank_chi2"])
    empty = compare_groups(time, event & False, groups["high"], fold, 12.0)
    assert math.isnan(empty["logrank_chi2"]) and empty["reason"]


def test_rmst():
    # S = 1 to 2, 2/3 to 4, 1/3 to 6: area to 5 is 2 + 4/3 + 1/3.
    assert rmst([2, 4, 6], [1, 1, 1], 5.0) == pytest.approx(2 + 4 / 3 + 1 / 3)
    assert rmst([2, 4, 6], [1, 1, 1], 100.0) == pytest.approx(4.0)
    assert math.isnan(rmst([2, 4, 6], [1, 1, 0], 7.0))
