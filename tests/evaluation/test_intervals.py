"""Stratified C on published predictions, and a bootstrap that agrees with theory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pandas as pd
import pytest

from morphome.evaluation.intervals import (
    bootstrap_weights,
    fold_mean,
    percentile_interval,
    stratified_c,
)
from morphome.evaluation.metrics import FoldPredictions, fold_metrics, pair_terms
from morphome.survival import fit_cox_ridge, harrell

#: Newer versions of pandas keep full precision by themselves.
pytestmark = pytest.mark.filterwarnings("ignore:The 'float_precision' argument is deprecated")


def _published(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, float_precision="round_trip")
    table["event"] = 1 - table["censorship"]
    return table


def _fold(part: pd.DataFrame) -> FoldPredictions:
    part = part.sort_values("case_id")
    n = len(part)
    return FoldPredictions(
        part["case_id"].to_numpy(), part["survival_months"].to_numpy(), part["event"].to_numpy().astype(bool),
        part["risk"].to_numpy(), np.full((n, 1), np.nan), np.array([1.0]), np.array([]), np.array([]),
        np.array([]), None,
    )  # fmt: skip


def test_mcat_published_predictions(shared_data):
    """110 of 110 published values, from published risks (ICCV 2021, 11 models x 2 cohorts x 5 folds)."""
    results = shared_data / "results"
    table = _published(results / "mcat_iccv2021_val_predictions_blca_luad.csv.gz")
    published = pd.read_csv(results / "mcat_iccv2021_summary_latest_blca_luad.csv", float_precision="round_trip")
    published = published.set_index(["model", "cohort", "folds"])["val_cindex"]
    assert len(published) == 110
    for key, part in table.groupby(["model", "cohort", "fold"]):
        assert harrell(part["survival_months"], part["event"], part["risk"]).c == pytest.approx(
            published[key], abs=1e-12
        )


def test_mcat_stratified_c(shared_data):
    table = _published(shared_data / "results" / "mcat_iccv2021_val_predictions_blca_luad.csv.gz")
    for cohort, value in (("blca", 0.6245), ("luad", 0.6201)):
        part = table[table["model"].str.startswith("MCAT") & (table["cohort"] == cohort)]
        folds = [_fold(rows) for _, rows in part.groupby("fold")]
        assert stratified_c([folds])[0] == pytest.approx(value, abs=5e-5)


def test_constant_published_model(shared_data):
    """Deep Sets on slides gave one number to all patients of BLCA: exactly one half."""
    table = _published(shared_data / "results" / "mcat_iccv2021_val_predictions_blca_luad.csv.gz")
    part = table[(table["model"] == "DSsm_nll_surv_a0.0_5foldcv_gc32_sig") & (table["cohort"] == "blca")]
    folds = [_fold(rows) for _, rows in part.groupby("fold")]
    assert all(fold_metrics(fold)["harrell_c"].value == 0.5 for fold in folds)
    assert stratified_c([folds])[0] == 0.5


def test_patch_gcn_inflated_cells(shared_data):
    """A skipped patient was scored as a row of zeros: 4 of 25 published values are .019 to .028 too high."""
    results = shared_data / "results"
    table = _published(results / "patchgcn_miccai2021_val_predictions_blca.csv.gz")
    published = pd.read_csv(results / "patchgcn_miccai2021_summary_latest_blca.csv", float_precision="round_trip")
    published = published.set_index(["model", "cohort", "folds"])["val_cindex"]
    off = {}
    for key, part in table.groupby(["model", "cohort", "fold"]):
        right = harrell(part["survival_months"], part["event"], part["risk"]).c
        if abs(right - published[key]) > 1e-9:
            off[key] = published[key] - right
            with_zeros = part[["survival_months", "event", "risk"]].to_numpy(float)
            time, event, risk = np.vstack([with_zeros, [0.0, 1.0, 0.0]]).T
            assert harrell(time, event, risk).c == pytest.approx(published[key], abs=1e-6)
    assert len(published) == 25
    assert len(off) == 4
    assert all(0.019 <= excess <= 0.0285 for excess in off.values())


@pytest.mark.parametrize(("cohort", "value"), [("blca", 0.614), ("gbmlgg", 0.768), ("hnsc", 0.555), ("ucec", 0.572)])
def test_age_and_sex_on_published_folds(shared_data, cohort, value):
    """Ridge Cox on age and sex, out of fold: fit, folds and stratified C together give the reference row."""
    with ZipFile(shared_data / "tables" / "porpoise" / f"tcga_{cohort}_all_clean.csv.zip") as archive:
        columns = ["case_id", "survival_months", "censorship", "age", "is_female"]
        table = pd.read_csv(archive.open(archive.namelist()[0]), usecols=columns).drop_duplicates("case_id")
    table = table.assign(event=1 - table["censorship"]).set_index("case_id", drop=False).rename_axis(None)
    folds = []
    for k in range(5):
        lists = pd.read_csv(shared_data / "splits" / "porpoise_5foldcv" / f"tcga_{cohort}" / f"splits_{k}.csv")
        train, test = table.loc[lists["train"].dropna()], table.loc[lists["val"].dropna()]
        known = train["age"].fillna(train["age"].median())
        design = [
            np.c_[(part["age"].fillna(train["age"].median()) - known.mean()) / known.std(), part["is_female"]]
            for part in (train, test)
        ]
        fit = fit_cox_ridge(design[0], train["survival_months"], train["event"], 1.0, "breslow")
        folds.append(_fold(test.assign(risk=fit.risk(design[1]))))
    assert stratified_c([folds])[0] == pytest.approx(value, abs=0.002)


def _jackknife_se(a: list[FoldPredictions], b: list[FoldPredictions]) -> float:
    """Infinitesimal jackknife of a paired difference in stratified C."""
    excess, pairs, terms = 0.0, 0.0, []
    for fold_a, fold_b in zip(a, b, strict=True):
        of_a, of_b = pair_terms(fold_a, "harrell_c"), pair_terms(fold_b, "harrell_c")
        d = of_a.top - of_b.top
        terms.append((d.sum(0) + d.sum(1), of_a.bottom.sum(0) + of_a.bottom.sum(1)))
        excess, pairs = excess + d.sum(), pairs + of_a.bottom.sum()
    influence = np.concatenate([(d - excess / pairs * c) / pairs for d, c in terms])
    return float(np.sqrt((influence**2).sum()))


def test_paired_bootstrap_agrees_with_the_jackknife(shared_data):
    table = _published(shared_data / "results" / "mcat_iccv2021_val_predictions_blca_luad.csv.gz")
    table = table[table["cohort"] == "blca"]
    mcat, rival = (
        [_fold(rows) for _, rows in table[table["model"].str.startswith(name)].groupby("fold")]
        for name in ("MCAT", "SNN")
    )
    fold_of = {p: k for k, fold in enumerate(mcat) for p in fold.patient_id}
    weights = bootstrap_weights(fold_of, 2000, seed=1)
    paired = stratified_c([mcat], weights) - stratified_c([rival], weights)
    assert paired.std(ddof=1) == pytest.approx(_jackknife_se(mcat, rival), abs=0.0015)
    # Pairing matters: independent draws would be wider.
    unpaired = stratified_c([mcat], weights) - stratified_c([rival], bootstrap_weights(fold_of, 2000, seed=2))
    assert unpaired.std() > 1.1 * paired.std()


def test_weights_are_drawn_within_folds_and_repeat():
    fold_of = {f"P{i:02d}": i % 3 for i in range(30)}
    weights = bootstrap_weights(fold_of, 50, seed=1)
    members = np.array([p for p in fold_of if fold_of[p] == 1])
    assert (weights.of(members).sum(axis=1) == 10).all()
    backwards = bootstrap_weights(dict(reversed(fold_of.items())), 50, seed=1)
    assert (backwards.of(members) == weights.of(members)).all()
    assert not (bootstrap_weights(fold_of, 50, seed=2).of(members) == weights.of(members)).all()


def test_stratified_c_ignores_pairs_between_folds(planted):
    folds = [planted.data(planted.oracle, fold=k) for k in range(3)]
    moved = [dataclasses.replace(f, risk=f.risk + 100.0 * k) for k, f in enumerate(folds)]
    assert stratified_c([moved])[0] == pytest.approx(stratified_c([folds])[0], abs=1e-12)
    counts = [harrell(f.time, f.event, f.risk) for f in folds]
    by_hand = sum(c.concordant + c.tied_risk / 2 for c in counts) / sum(c.comparable for c in counts)
    assert stratified_c([folds])[0] == pytest.approx(by_hand, abs=1e-12)
    assert stratified_c([folds, folds])[0] == pytest.approx(by_hand, abs=1e-12)


def test_a_fold_without_risks_is_not_skipped(planted):
    folds = [planted.data(planted.oracle, fold=k) for k in range(3)]
    folds[1] = dataclasses.replace(folds[1], risk=folds[1].risk * np.nan)
    assert np.isnan(stratified_c([folds])).all()


def test_fold_mean_with_equal_weights_is_the_mean(planted):
    folds = [planted.data(planted.oracle, fold=k) for k in range(3)]
    fold_of = {p: k for k, fold in enumerate(folds) for p in fold.patient_id}
    weights = bootstrap_weights(fold_of, 1, seed=1)
    ones = dataclasses.replace(weights, values=np.ones_like(weights.values))
    for metric in ("uno_c", "auc", "ibs", "ipa"):
        by_hand = np.mean([fold_metrics(fold)[metric].value for fold in folds])
        assert fold_mean(folds, metric, ones)[0] == pytest.approx(by_hand, abs=1e-12)


def test_interval_needs_resamples():
    assert percentile_interval(np.array([])).reason == "no bootstrap asked for"
    assert "only 1 of 3" in percentile_interval(np.array([1.0, np.nan, np.nan])).reason
    found = percentile_interval(np.arange(1001.0))
    assert (found.lower, found.upper, found.reason) == (25.0, 975.0, "")


def test_bootstrap_standard_error_is_near_theory(planted_cohort):
    """Near 0.25/√events for C = .75."""
    cohort = planted_cohort(n=400, spread=1.177, seed=11)
    folds = [cohort.data(cohort.oracle, fold=k) for k in range(3)]
    weights = bootstrap_weights({p: k for k, f in enumerate(folds) for p in f.patient_id}, 500, seed=1)
    se = stratified_c([folds], weights).std(ddof=1)
    assert se == pytest.approx(0.25 / np.sqrt(cohort.event.sum()), rel=0.25)
