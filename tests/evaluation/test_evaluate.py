"""The six tables from prediction files: oracle, noise and constant models, pairs, lost patients, contradictions."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from morphome.errors import MorphomeError, MorphomeWarning
from morphome.evaluation.evaluate import run_evaluate
from morphome.evaluation.metrics import METRICS, fold_metrics
from morphome.files import read_parquet

SETTINGS = {"evaluation": {"horizon_months": "auto", "bootstrap": 200, "seed": 1}}
TABLES = {
    "oof": ["name", "model", "repeat", "fold", "patient_id", "time_months", "event", "risk", "threshold", "high_risk",
            "survival_at_horizon"],
    "metrics": ["name", "model", "repeat", "fold", "metric", "horizon_months", "value", "reason"],
    "summary": ["name", "model", "metric", "horizon_months", "value", "lower", "upper", "sd_folds", "n_folds",
                "n_missing", "method", "reason"],
    "km": ["name", "model", "group", "time_months", "survival", "lower", "upper", "at_risk", "events"],
    "risk_groups": ["name", "model", "n_high", "n_low", "events_high", "events_low", "hazard_ratio", "hr_lower",
                    "hr_upper", "logrank_chi2", "logrank_p", "rmst_high_months", "rmst_low_months", "note", "reason"],
    "comparisons": ["name_a", "name_b", "delta_c", "lower", "upper", "n_patients", "reason"],
}  # fmt: skip


def _run(cohort, folder, paths, settings=SETTINGS) -> dict[str, pd.DataFrame]:
    run_evaluate(settings=settings, predictions=paths, split_facts=cohort.facts(folder), out=folder / "evaluation")
    return {name: read_parquet(folder / "evaluation" / f"{name}.parquet", f"morphome.{name}") for name in TABLES}


def _summary(tables: dict, name: str, metric: str) -> pd.Series:
    rows = tables["summary"]
    return rows[(rows["name"] == name) & (rows["metric"] == metric)].iloc[0]


@pytest.fixture(scope="module")
def tables(planted_cohort, tmp_path_factory) -> dict[str, pd.DataFrame]:
    """Five rows on 240 patients, 3 folds x 2 repeats."""
    cohort, folder = planted_cohort(repeats=2), tmp_path_factory.mktemp("evaluate")
    blend = lambda rows, train: (cohort.eta[rows] + cohort.noise[rows], cohort.oracle(rows, train)[1])  # noqa: E731
    paths = cohort.write(folder, "random", cohort.random, "random")
    paths += cohort.write(folder, "clinical", blend, "clinical_cox")
    paths += cohort.write(folder, "oracle", cohort.oracle)
    paths += cohort.write(folder, "constant", cohort.constant)
    paths += cohort.write(folder, "twin", blend)
    with pytest.warns(MorphomeWarning, match="'constant' gives all test patients the same risk in 6 of 6 folds"):
        return _run(cohort, folder, paths) | {"cohort": cohort}


def test_columns(tables):
    for name, columns in TABLES.items():
        assert list(tables[name].columns) == columns
    assert list(dict.fromkeys(tables["summary"]["name"])) == ["random", "clinical", "oracle", "constant", "twin"]
    assert len(tables["summary"]) == 5 * len(METRICS)
    assert len(tables["metrics"]) == 5 * 6 * len(METRICS)


def test_each_patient_once_per_repeat(tables):
    oof = tables["oof"]
    assert len(oof) == 5 * 2 * 240
    assert not oof.duplicated(["name", "repeat", "patient_id"]).any()
    oracle = oof[oof["name"] == "oracle"]
    truth = dict(zip(tables["cohort"].ids, tables["cohort"].eta, strict=True))
    assert (oracle["risk"] == oracle["patient_id"].map(truth)).all()  # full precision
    assert ((oracle["risk"] > oracle["threshold"]) == oracle["high_risk"]).all()
    assert oracle["survival_at_horizon"].between(0, 1).all()


def test_metrics_use_the_whole_training_fold(tables):
    """G, threshold and marginal curve come from all that is not tested, inner validation included."""
    cohort, found = tables["cohort"], tables["metrics"].set_index(["name", "repeat", "fold", "metric"])["value"]
    oof = tables["oof"].set_index(["name", "repeat", "fold"])["threshold"]
    for repeat, fold in ((0, 0), (1, 2)):
        data = cohort.data(cohort.oracle, repeat, fold)
        for metric, value in fold_metrics(data).items():
            assert found["oracle", repeat, fold, metric] == value.value
        assert set(oof.loc[("oracle", repeat, fold)]) == {data.threshold}


def test_oracle_and_null(tables):
    oracle, noise = _summary(tables, "oracle", "harrell_c"), _summary(tables, "random", "harrell_c")
    assert 0.70 < oracle["value"] < 0.85
    assert oracle["lower"] < oracle["value"] < oracle["upper"]
    assert abs(noise["value"] - 0.5) < 0.09
    assert noise["lower"] < 0.5 < noise["upper"]
    assert _summary(tables, "oracle", "ipa")["lower"] > 0
    assert _summary(tables, "random", "ipa")["upper"] < 0
    assert abs(_summary(tables, "random", "auc")["value"] - 0.5) < 0.1
    for metric in METRICS:
        row = _summary(tables, "oracle", metric)
        assert row["lower"] < row["value"] < row["upper"] and row["n_missing"] == 0 and row["reason"] == ""
        assert row["n_folds"] == 6 and row["sd_folds"] > 0
        assert "200 patient bootstraps" in row["method"]


def test_constant_model_is_exactly_one_half(tables):
    for metric in ("harrell_c", "uno_c", "auc"):
        row = _summary(tables, "constant", metric)
        assert row["value"] == row["lower"] == row["upper"] == 0.5
    assert _summary(tables, "constant", "ipa")["value"] == pytest.approx(0.0, abs=1e-12)
    groups = tables["risk_groups"].set_index("name").loc["constant"]
    assert groups["n_high"] == 0 and np.isnan(groups["hazard_ratio"])
    assert "no two groups" in groups["reason"]
    assert set(tables["km"].loc[tables["km"]["name"] == "constant", "group"]) == {"low"}


def test_comparisons_are_paired(tables):
    found = tables["comparisons"].set_index("name_a")
    assert set(found.index) == {"random", "oracle", "constant", "twin"}
    assert (found["name_b"] == "clinical").all() and (found["n_patients"] == 240).all()
    twin = found.loc["twin"]
    assert twin["delta_c"] == twin["lower"] == twin["upper"] == 0.0
    assert found.loc["oracle", "lower"] > 0
    assert found.loc["random", "upper"] < 0
    c = {n: _summary(tables, n, "harrell_c")["value"] for n in ("oracle", "clinical")}
    assert found.loc["oracle", "delta_c"] == pytest.approx(c["oracle"] - c["clinical"], abs=1e-12)


def test_risk_groups_of_the_first_repeat(tables):
    groups = tables["risk_groups"].set_index("name")
    assert (groups["n_high"] + groups["n_low"] == 240).all()
    assert groups.loc["oracle", "hr_lower"] > 1.5
    assert groups.loc["random", "hr_lower"] < 1.2
    assert groups.loc["oracle", "logrank_p"] < 1e-6
    km = tables["km"]
    start = km[(km["name"] == "oracle") & (km["time_months"] == 0)].set_index("group")
    assert start.loc["high", "at_risk"] == groups.loc["oracle", "n_high"]


def test_order_of_files_and_rows_does_not_matter(planted, tmp_path):
    def backwards(table, repeat, fold):
        return table.iloc[::-1]

    first = _run(planted, tmp_path / "a", planted.write(tmp_path / "a", "m", planted.oracle))
    paths = planted.write(tmp_path / "b", "m", planted.oracle, change=backwards)
    second = _run(planted, tmp_path / "b", paths[::-1])
    for name in TABLES:
        pd.testing.assert_frame_equal(first[name], second[name])
    assert first["comparisons"].empty


def test_without_bootstrap(planted, tmp_path):
    settings = {"evaluation": {**SETTINGS["evaluation"], "bootstrap": 0}}
    paths = planted.write(tmp_path, "a", planted.oracle) + planted.write(tmp_path, "b", planted.random, "clinical_cox")
    found = _run(planted, tmp_path, paths, settings)
    assert found["summary"]["value"].notna().all()
    assert found["summary"][["lower", "upper"]].isna().all(axis=None)
    assert found["summary"]["reason"].str.contains("no bootstrap asked for").all()
    assert found["comparisons"]["lower"].isna().all()


def test_no_horizon(planted_cohort, tmp_path):
    cohort = planted_cohort(tau=None)
    found = _run(cohort, tmp_path, cohort.write(tmp_path, "m", cohort.oracle))
    assert np.isfinite(_summary(found, "m", "harrell_c")["value"])
    for metric in METRICS[1:]:
        row = _summary(found, "m", metric)
        assert np.isnan(row["value"]) and row["reason"] == "no horizon passes the rule"
        assert row["n_missing"] == row["n_folds"] == 3
    assert found["oof"]["survival_at_horizon"].isna().all()


def test_curves_that_end_early(planted, tmp_path):
    def cut(table, repeat, fold):
        if fold == 1:
            table["survival"] = [np.where(np.arange(100) < 90, s, np.nan) for s in table["survival"]]
        return table

    found = _run(planted, tmp_path, planted.write(tmp_path, "m", planted.oracle, change=cut))
    row = _summary(found, "m", "ibs")
    # No mean over the two other folds.
    assert np.isnan(row[["value", "lower", "upper", "sd_folds"]].astype(float)).all()
    assert row["n_missing"] == 1 and row["n_folds"] == 3
    assert row["reason"].startswith("missing in 1 of 3 folds: survival is not identified from")
    assert row["reason"].endswith("(fold 1)")
    for metric in ("harrell_c", "uno_c", "auc"):
        whole = _summary(found, "m", metric)
        assert whole["n_missing"] == 0 and np.isfinite(whole["value"]) and whole["reason"] == ""
    per_fold = found["metrics"].query("metric == 'ibs'")["value"]
    assert np.isfinite(per_fold).tolist() == [True, False, True]


def test_reason_names_the_folds_of_every_repeat(planted_cohort, tmp_path):
    cohort = planted_cohort(repeats=2)

    def cut(table, repeat, fold):
        if (repeat, fold) in {(0, 2), (1, 0)}:
            table["survival"] = [np.where(np.arange(100) < 90, s, np.nan) for s in table["survival"]]
        return table

    found = _run(cohort, tmp_path, cohort.write(tmp_path, "m", cohort.oracle, change=cut))
    row = _summary(found, "m", "ipa")
    assert np.isnan(row["value"]) and row["n_missing"] == 2
    assert row["reason"].startswith("missing in 2 of 6 folds: ")
    assert row["reason"].endswith("(repeat 0 fold 2, repeat 1 fold 0)")


@pytest.mark.parametrize("keys", [("clinical_cox", "abmil"), ("abmil", "clinical_cox")])
def test_a_skipped_patient_leaves_every_array(planted, tmp_path, keys):
    """No row of zeros in its place (the fault behind inflated published values)."""
    gone = planted.ids[int(np.flatnonzero(planted.event == 1)[0])]

    def skip(table, repeat, fold):
        return table[table["patient_id"] != gone]

    paths = planted.write(tmp_path, "all", planted.oracle, keys[0])
    paths += planted.write(tmp_path, "some", planted.oracle, keys[1], change=skip)
    with pytest.warns(
        MorphomeWarning, match=f"'some' did not score 1 patients that others did \\({gone}\\); they are left out"
    ):
        found = _run(planted, tmp_path, paths)
    oof = found["oof"]
    assert (oof["name"] == "some").sum() == 239 and gone not in set(oof.loc[oof["name"] == "some", "patient_id"])
    groups = found["risk_groups"].set_index("name")
    assert groups.loc["some", "n_high"] + groups.loc["some", "n_low"] == 239
    # The comparison uses the patients that both scored.
    row = found["comparisons"].iloc[0]
    assert row["n_patients"] == 239 and row["delta_c"] == row["lower"] == row["upper"] == 0.0
    assert found["summary"].attrs["warnings"]


def test_risks_that_are_not_finite(planted, tmp_path):
    def spoil(table, repeat, fold):
        if fold == 2:
            table.loc[table["role"] == "test", "risk"] = np.nan
        return table

    found = _run(planted, tmp_path, planted.write(tmp_path, "m", planted.oracle, change=spoil))
    row = _summary(found, "m", "harrell_c")
    assert np.isnan(row["value"]) and row["n_missing"] == 1 and "risks are not finite" in row["reason"]
    groups = found["risk_groups"].iloc[0]
    assert groups["n_high"] + groups["n_low"] == 160 and "80 patients have no finite risk" in groups["reason"]


def test_contradictions_are_refused(planted, planted_cohort, tmp_path):
    good = planted.write(tmp_path / "good", "m", planted.oracle)

    def refuse(paths, match):
        with pytest.raises(MorphomeError, match=match):
            _run(planted, tmp_path, paths)

    refuse([], "no predictions")
    refuse([*good, good[0]], "is given twice")
    refuse(
        good[:2] + planted.write(tmp_path / "more", "n", planted.random), "'m' has no predictions for repeat 0, fold 2"
    )
    other = planted_cohort(tau=36.0)
    refuse(other.write(tmp_path / "tau", "m", other.oracle), "made for a horizon of 36.0 months; the folds say 24.0")

    def late(table, repeat, fold):
        return table.assign(time_months=table["time_months"] + fold)

    refuse(planted.write(tmp_path / "late", "m", planted.oracle, change=late), "P0000 has another outcome")

    def twice(table, repeat, fold):
        return pd.concat([table, table[table["role"] == "test"].iloc[:1]])

    refuse(planted.write(tmp_path / "twice", "m", planted.oracle, change=twice), "has two rows")

    def again(table, repeat, fold):
        table.loc[0, "role"] = "test"
        return table

    refuse(planted.write(tmp_path / "again", "m", planted.oracle, change=again), "P0000 is tested twice in repeat 0")

    class Refolded(planted_cohort):
        """The same patients in other folds, as after another seed."""

        def role(self, repeat, fold):
            self.fold = np.sort(self.fold, axis=1)
            return super().role(repeat, fold)

    moved = Refolded()
    with pytest.raises(MorphomeError) as error:
        _run(planted, tmp_path, good + moved.write(tmp_path / "moved", "n", moved.oracle))
    assert re.match(
        r"patient P\d{4} is tested in fold \d of repeat 0 by 'm', but in fold \d by 'n'$", error.value.problem
    )
    assert error.value.remedy == "the runs come from different folds: train the older ones again"

    def untested(table, repeat, fold):
        return table[table["role"] != "test"]

    refuse(planted.write(tmp_path / "none", "m", planted.oracle, change=untested), "no test rows")
