"""The verdict, the limitations and the numbers behind them."""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pandas as pd
import pytest

from morphome.report import format as fmt
from morphome.report import judge, limits, marks, tables
from morphome.report.inputs import load_report, routing_shares


@pytest.fixture(scope="module")
def read_once(make_inputs):
    return load_report(make_inputs())


@pytest.fixture
def data(read_once):
    """A run that a test may change."""
    return copy.deepcopy(read_once)


def set_c(data, name, value, lower, upper):
    at = (data.summary["name"] == name) & (data.summary["metric"] == "harrell_c")
    data.summary.loc[at, ["value", "lower", "upper"]] = [value, lower, upper]


def set_delta(data, name, delta, lower, upper, turned=False):
    row = ("clinical_cox", name, -delta, -upper, -lower) if turned else (name, "clinical_cox", delta, lower, upper)
    data.comparisons = pd.DataFrame([row], columns=["name_a", "name_b", "delta_c", "lower", "upper"])


def levels(data):
    return {flag.text: flag.level for flag in limits.limitations(data)}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("delta", "lower", "upper", "words"),
    [
        (0.02, -0.05, 0.09, "No difference can be called between mome"),
        (0.08, 0.02, 0.14, "mome ranks patients better than the clinical Cox model on one partition"),
        (-0.08, -0.14, -0.02, "mome ranks patients worse than the clinical Cox model on one partition"),
        (0.02, float("nan"), float("nan"), "No difference can be called between mome"),
    ],
)
def test_headline_follows_the_paired_interval(data, turned, delta, lower, upper, words):
    for name in data.names:
        set_c(data, name, 0.6, 0.55, 0.65)
    set_c(data, "mome", 0.68, 0.6, 0.75)
    set_delta(data, "mome", delta, lower, upper, turned)
    verdict = judge.judge(data)
    assert verdict.headline.startswith(words)
    fact = next(f for f in verdict.facts if "clinical Cox" in f.label)
    assert fact.label == "mome − clinical Cox" and fact.value == fmt.number(delta, sign=True)
    assert ("no difference can be called" in fact.detail) == (not lower > 0 and not upper < 0)
    assert "proof" in verdict.headline or "No difference" in verdict.headline


def test_random_score_is_never_the_best_model(data):
    set_c(data, "random", 0.9, 0.8, 0.99)
    verdict = judge.judge(data)
    assert not verdict.facts[0].detail.startswith("random")
    assert any(text.startswith("Control out of range") for text in verdict.warnings)


def test_interval_with_one_half_is_no_better_than_chance(make_inputs):
    data = load_report(make_inputs(only=["mean_pool_cox"]))
    set_c(data, "mean_pool_cox", 0.6, 0.45, 0.7)
    assert "cannot be told from chance" in judge.judge(data).headline
    set_c(data, "mean_pool_cox", 0.6, 0.51, 0.7)
    assert judge.judge(data).headline.startswith("mean_pool_cox ranks patients better than chance")


def test_no_score_at_all_gives_the_reason(data):
    at = data.summary["metric"] == "harrell_c"
    data.summary.loc[at, ["value", "lower", "upper"]] = np.nan
    data.summary.loc[at, "reason"] = "all test patients censored"
    assert judge.judge(data).headline == "No model could be scored: all test patients censored."


def test_replacing_is_not_adding(data):
    said = " ".join(judge.judge(data).sentences)
    assert "in place of the clinical model" in said


def test_limitations_come_from_flags(data):
    found = levels(data)
    texts = " | ".join(found)
    for words in (
        "Planted cohort",
        "Few events (",
        "Quick split",
        "Fold 2: few <events>",
        "gave every patient the same risk in 1 of 3",
    ):
        assert words in texts
    assert "No external cohort" in texts


def test_limitations_of_random_splits_and_missing_control(make_inputs):
    data = load_report(make_inputs(only=["mome"], oracle=False))
    data.facts["scheme"] = "random"
    data.splits.loc[data.splits["role"] == "test", "fold"] = (
        np.arange((data.splits["role"] == "test").sum()) % 3
    ).astype("int32")
    texts = " | ".join(levels(data))
    assert re.search(r"Folds share hospitals: up to \d of \d sites of a test fold are also in training", texts)
    assert "No clinical Cox row" in texts and "no negative control" in texts and "Planted" not in texts


def test_assumed_resolution_reaches_the_verdict(data):
    data.audit.loc[:2, "mpp_source"] = "assumed_from_power"
    data.audit.loc[3:4, "mpp_source"] = "assumed_for_cohort"
    verdict = judge.judge(data)
    said = [text for text in verdict.warnings if "not measured but assumed" in text]
    assert len(said) == 2
    assert "of 3 slides" in said[1] and "from the objective power" in said[1]
    assert "of 2 slides" in said[0] and "by one value for every slide" in said[0]
    fact = next(f for f in verdict.facts if f.label == "Slides with features")
    assert (fact.value, fact.detail) == ("18", "1 gave none; 5 with an assumed resolution; no tile failed")


@pytest.mark.parametrize("how", ["run", "predictions"])
def test_a_constant_row_is_serious_and_no_rival(data, how):
    for name in data.names:
        set_c(data, name, 0.6, 0.55, 0.65)
    set_c(data, "mean_pool_cox", 0.7, 0.6, 0.8)
    set_delta(data, "mome", 0.01, -0.05, 0.07)
    assert "between" not in judge.judge(data).headline  # mean_pool_cox is the rival, and was not compared
    if how == "run":
        data.runs_of("mean_pool_cox")[1].facts["constant_prediction"] = True
    else:
        at = (data.oof["name"] == "mean_pool_cox") & (data.oof["fold"] == 1)
        data.oof.loc[at, "risk"] = 0.3 + 1e-9 * np.arange(at.sum()) / at.sum()
    assert tables.constant_folds(data, "mean_pool_cox") == [(0, 1)]
    verdict = judge.judge(data)
    assert "between mome, the best other model, and the clinical Cox" in verdict.headline
    assert "mean_pool_cox" not in verdict.facts[0].detail
    assert any(text.startswith("mean_pool_cox gave every patient the same risk in 1 of 3") for text in verdict.warnings)


def test_nothing_is_compared_with_a_constant_row(data):
    def flatten(name):
        data.oof.loc[data.oof["name"] == name, "risk"] = 0.0

    for name in ("mean_pool_cox", "mome"):
        flatten(name)
    assert judge.judge(data).headline.startswith("Nothing can be compared: every model but clinical Cox")
    flatten("clinical_cox")
    assert judge.judge(data).headline.startswith("No model can be judged")
    data.oof.loc[data.oof["name"] == "mome", "risk"] = np.arange((data.oof["name"] == "mome").sum())
    assert judge.judge(data).headline.startswith("Nothing can be compared: the clinical Cox row")


def test_who_was_fitted_on_whom(data):
    found = {text: level for text, level in levels(data).items() if "patients together" in text}
    assert list(found.values()) == ["note"]
    assert next(iter(found)) == (
        "clinical_cox, mean_pool_cox and coxnet_genes were fitted on training and inner validation patients together "
        "(27); mome on the training patients alone (20), because the inner validation (7) is kept for choosing the "
        "epoch."
    )


def test_above_the_oracle_is_suspicious(data):
    set_c(data, "mome", 0.95, 0.9, 0.99)
    assert levels(data)["mome lies above the oracle's C: look for a leak."] == "serious"


def test_detectable_difference():
    # SE .0256 (a 95 % interval of width .1): 2.80 SE = .0714
    assert pytest.approx(0.0714, abs=1e-4) == tables._DETECTABLE_PER_WIDTH * 0.1


def test_reverse_km_median_by_hand():
    # Censored at 2, 4, 6; events at 1, 4. At 2: 4 at risk, 3/4 left. At 4 the event goes first: 2 at risk, 3/8 left.
    assert tables.reverse_km_median(np.array([1, 2, 4, 4, 6.0]), np.array([1, 0, 1, 0, 0])) == 4
    assert math.isnan(tables.reverse_km_median(np.array([1, 2.0]), np.array([1, 1])))


def test_splits_table_counts(data):
    table = tables.splits(data)
    assert (table["train_patients"] + table["inner_val_patients"] + table["test_patients"] == 40).all()
    assert table["test_patients"].sum() == 40 and table["test_events"].sum() == data.n_events
    assert (table["test_sites_also_in_training"] == 0).all()
    late = data.patients["time_months"] > 24
    assert table["test_controls_beyond_horizon"].sum() == late.sum()
    assert table["test_cases_by_horizon"].sum() == (~late & (data.patients["event"] == 1)).sum()


def test_routing_shares_by_hand():
    rows = pd.DataFrame(
        {"epoch": 1, "layer": "p1", "patient_id": list("abcd"), "role": "test", "expert": [0, 0, 3, 0],
         "p0": [0.7, 0.6, 0.1, 0.6], "p1": 0.1, "p2": 0.1, "p3": [0.1, 0.2, 0.7, 0.2], "entropy": [1.0, 1.0, 1.0, 1.4]}
    )  # fmt: skip
    names = ["TransFusion", "BottleneckTransFusion", "AddFusion", "DropX2Fusion"]
    table = routing_shares(rows, pd.DataFrame({"epoch": [0, 1], "chosen": [False, True]}), names)
    assert table["share"].tolist() == [0.75, 0, 0, 0.25] and table["chosen"].all()
    assert table["probability"].tolist() == pytest.approx([0.5, 0.1, 0.1, 0.3])
    assert table["entropy"].iloc[0] == pytest.approx(1.1) and (table["n"] == 4).all()
    assert table["name"].tolist() == names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (fmt.number(0.12345), "0.123"),
        (fmt.number(-0.12345, 2, sign=True), "−0.12"),
        (fmt.number(-0.0001), "0.000"),
        (fmt.number(0.5, 1, sign=True), "+0.5"),
        (fmt.number(float("nan")), "–"),
        (fmt.number(None), "–"),
        (fmt.interval(0.1, float("nan")), ""),
        (fmt.estimate(0.6, 0.5, 0.7, 2), "0.60 [0.50, 0.70]"),
        (fmt.count(21716348), "21,716,348"),
        (fmt.brief(21716348), "21.7 M"),
        (fmt.share(1, 4), "1 (25 %)"),
        (fmt.duration(150), "2.5 min"),
        (fmt.listing(["a", "b", "c"], 2), "a, b and 1 more"),
        (fmt.reading(-0.1, 0.1), "no difference can be called"),
        (fmt.reading(float("nan"), 0.1), "no interval: no difference can be called"),
    ],
)
def test_formats(text, expected):
    assert text == expected


def test_axis_holds_all_values_with_few_ticks():
    for values in ([0.61, 0.63], [0.1, 0.99], [float("nan")], [-0.4, 0.3]):
        scale = marks.scale_for(values, 0.5)
        known = [v for v in values if v == v]
        assert scale.low <= min([*known, 0.5]) and scale.high >= max([*known, 0.5])
        assert 3 <= len(scale.ticks) <= 6 or scale.step == 0.5
