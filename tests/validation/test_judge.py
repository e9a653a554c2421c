"""The bounds on made-up results: every check passes, fails and steps aside where it should."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from morphome.models.catalog import ModelInfo, models
from morphome.validation.judge import (
    COLUMNS,
    NULL_BAND,
    S3_GAIN,
    S3_LEAST,
    X1_LEAST,
    band,
    judge,
    kind_of,
    markdown,
    oracle_limit,
    slack,
)
from morphome.validation.planted import oracle_c

GOOD = {
    "net": {
        "S3": 0.85,
        "X1": 0.72,
        "X1_easy": 0.71,
        "S0": 0.51,
        "mixed": 0.74,
        "permuted": 0.49,
        "S4": 0.63,
        "S4/site": 0.50,
    },
    "bags": {"S3": 0.75, "X1": 0.49, "S0": 0.52, "mixed": 0.51, "permuted": 0.50, "S4": 0.62, "S4/site": 0.47},
    "genes": {"S3": 0.73, "X1": 0.50, "S0": 0.48, "permuted": 0.52},
    "stage": {"S3": 0.66, "X1": 0.53, "S0": 0.50, "permuted": 0.49},
    "late": {"S3": 0.84, "X1": 0.51, "S0": 0.50, "mixed": 0.72, "permuted": 0.49, "S4": 0.60, "S4/site": 0.49},
    "dice": {"S3": 0.50, "X1": 0.51, "S0": 0.50, "permuted": 0.49},
}
KINDS = {
    "net": "fusion",
    "bags": "slides",
    "genes": "genes",
    "stage": "clinical",
    "late": "late fusion",
    "dice": "control",
}


def made_up(problem: str = "", **changes: float) -> pd.DataFrame:
    """Scores of three seeds around GOOD; ``net_S3=0.5`` changes one value."""
    rows = []
    for model, values in GOOD.items():
        for name, c in values.items():
            cohort, _, scheme = name.partition("/")
            c = changes.get(f"{model}_{name.replace('/', '_')}", c)
            rows += [
                {
                    "model": model,
                    "kind": KINDS[model],
                    "cohort": cohort,
                    "scheme": scheme or "random",
                    "seed": seed,
                    "c": c + 0.004 * (seed - 1),
                    "problem": problem if model == "net" else "",
                }
                for seed in range(3)
            ]
    return pd.DataFrame(rows)


def verdicts(table: pd.DataFrame) -> dict[tuple[str, str, str], str]:
    return {(row.model, row.scenario, row.check): row.verdict for row in table.itertuples()}


@pytest.fixture(scope="module")
def good() -> pd.DataFrame:
    """The judgement of results that are as they should be."""
    return judge(made_up(), 400, 3, 5)


def test_good_results_fail_nowhere(good):
    assert list(good.columns) == list(COLUMNS)
    assert not (good["verdict"] == "fail").any()
    assert not good.duplicated(["model", "scenario", "check"]).any()
    assert set(good["model"]) == set(GOOD)
    aside = good[good["verdict"] == "not applicable"]
    assert (aside["reason"] != "").all()
    assert (good.loc[good["verdict"] == "pass", "reason"] == "").all()


def test_values_are_means_over_the_seeds(good):
    found = verdicts(good)
    assert found["net", "X1", "C at least"] == "pass"
    row = good[(good["model"] == "net") & (good["scenario"] == "X1") & (good["check"] == "C at least")].iloc[0]
    assert row["value"] == pytest.approx(0.72)
    assert row["bound"] == pytest.approx(X1_LEAST)
    gain = good[(good["model"] == "net") & good["check"].str.contains("best single")].iloc[0]
    assert gain["value"] == pytest.approx(0.85 - 0.75)
    assert gain["bound"] == pytest.approx(S3_GAIN)


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({"net_S3": 0.79}, ("net", "S3", "C at least")),
        ({"net_S3": 0.83, "bags_S3": 0.79}, ("net", "S3", "C above the best single modality by")),
        ({"net_S3": 0.95}, ("net", "S3", "C at most that of the true hazard (97.5 % point)")),
        ({"net_X1": 0.64}, ("net", "X1", "C at least")),
        ({"net_X1": 0.83}, ("net", "X1", "C at most that of the true hazard (97.5 % point)")),
        ({"net_X1_easy": 0.64}, ("net", "X1_easy", "C at least")),
        ({"net_X1_easy": 0.83}, ("net", "X1_easy", "C at most that of the true hazard (97.5 % point)")),
        ({"net_S0": 0.60}, ("net", "S0", "C near one half")),
        ({"net_mixed": 0.80}, ("net", "mixed", "C at most that of genes alone plus")),
        ({"net_permuted": 0.40}, ("net", "permuted", "C near one half")),
        ({"net_S4_site": 0.62}, ("net", "S4", "C of random folds above that of whole sites by")),
        ({"net_S4_site": 0.66}, ("net", "S4", "C of whole sites near one half")),
        ({"bags_S3": 0.69}, ("bags", "S3", "C at least")),
        ({"bags_X1": 0.62}, ("bags", "X1", "C near one half")),
        ({"bags_mixed": 0.61}, ("bags", "mixed", "C near one half")),
        ({"bags_S4": 0.50}, ("bags", "S4", "C of random folds above that of whole sites by")),
        ({"genes_S3": 0.65}, ("genes", "S3", "C at least")),
        ({"genes_X1": 0.60}, ("genes", "X1", "C near one half")),
        ({"genes_permuted": 0.62}, ("genes", "permuted", "C near one half")),
        ({"stage_S3": 0.54}, ("stage", "S3", "C at least")),
        ({"dice_S3": 0.60}, ("dice", "S3", "C near one half")),
        ({"late_S3": 0.78}, ("late", "S3", "C at least")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value[1] if len(value) else "",
)
def test_each_bound_can_be_missed(change, failing):
    table = judge(made_up(**change), 400, 3, 5)
    assert verdicts(table)[failing] == "fail"
    row = table[(table["model"] == failing[0]) & (table["scenario"] == failing[1]) & (table["check"] == failing[2])]
    assert row["reason"].iloc[0]


def test_late_fusion_is_reported_in_x1_and_not_failed(good):
    row = good[(good["model"] == "late") & (good["scenario"] == "X1") & (good["check"] == "C at least")].iloc[0]
    assert row["verdict"] == "not applicable"
    assert row["value"] == pytest.approx(0.51)


def test_comparisons_step_aside_without_the_other_models():
    alone = made_up()
    found = verdicts(judge(alone[alone["model"] == "net"], 400, 3, 5))
    assert found["net", "S3", "C above the best single modality by"] == "not applicable"
    assert found["net", "mixed", "C at most that of genes alone plus"] == "not applicable"
    assert found["net", "S3", "C at least"] == "pass"


def test_a_fit_that_failed_fails_the_model_with_its_reason():
    table = judge(made_up(problem="the loss is nan"), 400, 3, 5)
    mine = table[(table["model"] == "net") & (table["verdict"] == "fail")]
    assert len(mine) == len(table[table["model"] == "net"])
    assert (mine["reason"] == "the loss is nan").sum() >= len(mine) - 2  # comparisons name the other model too
    assert not (table.loc[table["model"] != "net", "verdict"] == "fail").any()


def test_a_missing_value_is_no_pass():
    table = judge(made_up(net_S0=math.nan), 400, 3, 5)
    assert verdicts(table)["net", "S0", "C near one half"] == "fail"


def test_bounds_are_stated_for_400_patients_and_three_seeds():
    assert slack(400, 3) == 0.0
    assert slack(2000, 3) == 0.0
    assert slack(150, 1) == pytest.approx(2 * (0.42 / math.sqrt(150) - 0.42 / math.sqrt(1200)))
    assert band(NULL_BAND, 400) == band(NULL_BAND, 900) == NULL_BAND
    assert band(NULL_BAND, 100) == pytest.approx(2 * NULL_BAND)
    table = judge(made_up(net_S3=S3_LEAST["fusion"] - 0.02), 150, 1, 5)
    assert verdicts(table)["net", "S3", "C at least"] == "pass"


def test_the_oracles_limit_narrows_with_seeds():
    one, three = oracle_limit("S3", 400, 1, 5), oracle_limit("S3", 400, 3, 5)
    assert oracle_c("S3", 400, 5).mean() < three < one
    assert one == pytest.approx(np.quantile(oracle_c("S3", 400, 5), 0.975), abs=0.002)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("random", "control"),
        ("clinical_cox", "clinical"),
        ("clinical_genes", "clinical"),
        ("rsf", "clinical"),
        ("ridge_genes", "genes"),
        ("snn", "genes"),
        ("mome_genes", "genes"),
        ("mean_pool_cox", "slides"),
        ("abmil", "slides"),
        ("mcat", "fusion"),
        ("porpoise", "fusion"),
        ("late_fusion", "late fusion"),
        ("ghanet", "slides"),
        ("deepsurv", "genes"),
        ("mmp", "fusion"),
    ],
)
def test_kinds_of_the_registry(key, kind):
    assert kind_of(models()[key]) == kind


def test_late_fusion_has_a_kind_of_its_own():
    needs = frozenset({"path", "omic_all"})
    assert kind_of(ModelInfo("late_fusion", "Late fusion", "", needs, "module", "Class")) == "late fusion"
    assert kind_of(ModelInfo("other", "Other", "", needs, "module", "Class")) == "fusion"


def test_the_table_for_people_shows_values_and_failures():
    text = markdown(judge(made_up(net_X1=0.58), 400, 3, 5), 400, 3, 5)
    assert "**0.580** (bound 0.650)" in text
    assert "- net, X1, C at least: 0.580; below 0.650." in text
    assert "(0.510)" in text  # late fusion in X1: reported, not judged
    assert text.count("\n| ") == 1 + len(GOOD)
