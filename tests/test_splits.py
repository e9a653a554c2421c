"""Folds: every patient tested once, no site on both sides, equal for equal seeds, whatever the order of the rows."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morphome import split_schemes
from morphome.errors import MorphomeError, MorphomeWarning
from morphome.files import read_json, read_parquet, write_parquet
from morphome.split_schemes import (
    assign_sites,
    balanced_targets,
    inner_by_site,
    random_folds,
    read_published,
    site_folds,
)
from morphome.splits import make_splits, run_split

DEFAULTS = {
    "scheme": "site",
    "folds": 3,
    "repeats": 1,
    "inner_fraction": 0.2,
    "min_events_per_test_fold": 1,
    "seed": 1,
}


def _cohort(n: int = 90, sites: int = 9, seed: int = 0, share: float = 0.5) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "patient_id": [f"P{i:04d}" for i in range(n)],
            "site": [f"S{k}" for k in rng.permutation(np.arange(n) % sites)],
            "time_months": rng.exponential(30, n) + 0.1,
            "event": (rng.random(n) < share).astype(np.int8),
        }
    )


def _settings(**changes) -> dict:
    return DEFAULTS | changes


# ---------------------------------------------------------------------------------------------------- properties


@st.composite
def cohorts(draw):
    """Small cohorts with uneven sites."""
    sites = draw(st.integers(3, 8))
    sizes = draw(st.lists(st.integers(2, 12), min_size=sites, max_size=sites))
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    site = [f"S{k}" for k, size in enumerate(sizes) for _ in range(size)]
    n = len(site)
    event = (rng.random(n) < 0.6).astype(np.int8)
    event[: 2 * sites : 2] = 1
    time = np.round(rng.exponential(20, n), 1) + 0.1
    return pd.DataFrame(
        {"patient_id": [f"P{i:03d}" for i in range(n)], "site": site, "time_months": time, "event": event}
    )


@settings(max_examples=20, deadline=None)
@given(table=cohorts(), scheme=st.sampled_from(["site", "random"]), seed=st.integers(0, 50), repeats=st.integers(1, 2))
def test_invariants(table, scheme, seed, repeats):
    asked = _settings(scheme=scheme, seed=seed, repeats=repeats)
    try:
        splits, facts = make_splits(table, asked, "auto")
    except MorphomeError as error:
        assert "events in the test fold" in str(error)  # the hard stop; nothing else may go wrong
        return
    # Each patient has one role in every fold and is tested once per repeat.
    assert len(splits) == repeats * 3 * len(table)
    assert not splits.duplicated(["repeat", "fold", "patient_id"]).any()
    assert set(splits["role"]) == {"train", "inner_val", "test"}
    tested = splits[splits["role"] == "test"]
    assert (tested.groupby(["repeat", "patient_id"]).size() == 1).all()
    assert tested.groupby("repeat").size().tolist() == [len(table)] * repeats
    site = table.set_index("patient_id")["site"]
    for (repeat, fold), part in splits.groupby(["repeat", "fold"]):
        where = {role: set(part.loc[part["role"] == role, "patient_id"].map(site)) for role in set(part["role"])}
        told = next(f for f in facts["folds"] if (f["repeat"], f["fold"]) == (repeat, fold))
        if scheme == "site":
            assert not where["test"] & (where["train"] | where["inner_val"])
            assert told["test_sites_also_in_training"] == []
            # Inner validation is by whole sites, unless this very fold is named with the fallback.
            fell_back = any(
                text.startswith(f"repeat {repeat}, fold {fold}: ") and text.endswith("inner validation is by patient")
                for text in facts["warnings"]
            )
            assert fell_back or not where["train"] & where["inner_val"]
            assert fell_back or told["inner_val_events"] >= 4
            assert told["inner_by"] == ("patients" if fell_back else "whole sites")
        assert told["test_patients"] == (part["role"] == "test").sum()
        assert told["train_events"] + told["inner_val_events"] + told["test_events"] == facts["n_events"]
    # The order of the rows does not matter, and the same seed gives the same folds.
    shuffled = table.sample(frac=1.0, random_state=seed)
    again, facts_again = make_splits(shuffled, asked, "auto")
    pd.testing.assert_frame_equal(splits, again)
    assert facts == facts_again or repr(facts) == repr(facts_again)  # NaN


def test_columns_and_types():
    splits, _ = make_splits(_cohort(), _settings(repeats=2), "auto")
    assert list(splits.columns) == ["patient_id", "repeat", "fold", "role", "seed"]
    assert splits[["repeat", "fold"]].dtypes.astype(str).tolist() == ["int32", "int32"]
    assert set(splits["repeat"]) == {0, 1} and set(splits["fold"]) == {0, 1, 2}


@pytest.mark.parametrize("scheme", ["site", "random"])
def test_seed_and_repeat_change_the_folds(scheme):
    table = _cohort(120, 12)

    def partition(asked, repeat):
        splits, _ = make_splits(table, asked, "auto")
        part = splits[(splits["role"] == "test") & (splits["repeat"] == repeat)].set_index("patient_id")["fold"]
        return {frozenset(part.index[part == k]) for k in range(3)}

    several = _settings(scheme=scheme, repeats=3)
    found = [partition(several, r) for r in range(3)]
    assert found[0] != found[1] != found[2] != found[0]
    assert partition(_settings(scheme=scheme), 0) == found[0]
    assert partition(_settings(scheme=scheme, seed=2), 0) != found[0]


# ----------------------------------------------------------------------------------------------------- by site


def test_assignment_finds_the_perfect_balance():
    events, patients = np.array([7, 5, 4, 4, 3, 1]), np.array([10, 10, 10, 10, 10, 10])
    bins, how = assign_sites(
        events, patients, *balanced_targets(events, patients, 3), np.ones(3), np.zeros((len(events), 3))
    )
    assert how == "integer programme"
    assert np.bincount(bins, events, 3).tolist() == [8, 8, 8]
    assert np.bincount(bins, patients, 3).tolist() == [20, 20, 20]


def test_search_stopped_by_the_clock_is_refused(monkeypatch):
    """Folds that depend on the speed of a machine are no folds; the node limit gives the same ones everywhere."""
    sites = np.random.default_rng(0).integers(1, 40, 40)
    targets = balanced_targets(sites, 2 * sites, 5)
    cost = np.random.default_rng(1).random((40, 5)) / 40
    monkeypatch.setattr(split_schemes, "_RELATIVE_GAP", 1e-12)
    monkeypatch.setattr(split_schemes, "_NODE_LIMIT", 1)
    bins, how = assign_sites(sites, 2 * sites, *targets, np.ones(5), cost)
    assert how == "integer programme, stopped at the node limit" and set(bins) == set(range(5))
    monkeypatch.setattr(split_schemes, "_TIME_LIMIT_S", 1e-4)
    with pytest.raises(MorphomeError, match="40 sites into 5 parts took longer") as error:
        assign_sites(sites, 2 * sites, *targets, np.ones(5), cost)
    assert "splits.folds" in error.value.remedy and "'random'" in error.value.remedy


def test_a_giant_site_fills_a_fold_and_the_rest_is_even():
    """Half of the deaths in one hospital: the other folds must not be starved beside it."""
    events = np.array([92, 10, 9, 20, 15, 8, 7, 6, 12, 3, 7])
    patients = events * 2
    assert balanced_targets(events, patients, 5)[0] == pytest.approx([92, 24.25, 24.25, 24.25, 24.25])
    site = np.repeat([f"S{k:02d}" for k in range(11)], patients)
    event = np.concatenate([np.arange(n) % 2 for n in patients])
    found = site_folds(site, event, 5, 10, seed=1, repeat=0)
    totals = sorted(np.bincount(found.fold, event, 5).astype(int))
    assert totals[-1] == 92
    assert max(totals[:-1]) - min(totals[:-1]) <= 2


def test_too_few_sites():
    with pytest.raises(MorphomeError, match=r"at least 3 sites for 3 folds; there are 2 \(S0, S1\)") as error:
        make_splits(_cohort(sites=2), _settings(), "auto")
    assert "random" in error.value.remedy


def test_repeats_differ_where_one_balance_is_best():
    """7+1, 5+3, 4+4 deaths is the only even answer; later repeats give up evenness rather than repeat it."""
    site = np.repeat([f"S{k}" for k in range(6)], 10)
    event = np.concatenate([np.arange(10) < deaths for deaths in (7, 5, 4, 4, 3, 1)]).astype(int)
    found = []
    for repeat in range(3):
        result = site_folds(site, event, 3, 3, seed=1, repeat=repeat, earlier=[f.fold for f in found])
        found.append(result)
    assert np.bincount(found[0].fold, event).tolist() == [8, 8, 8]
    assert not any(result.notes for result in found)
    together = [tuple(np.equal.outer(f.fold, f.fold).ravel()) for f in found]
    assert len(set(together)) == 3


def test_repeats_that_cannot_differ_are_told():
    table = _cohort(90, 3)
    _, facts = make_splits(table, _settings(repeats=2), "auto")
    assert any("same folds as an earlier one" in text for text in facts["warnings"])


def test_unknown_sites_stay_together():
    table = _cohort(90, 9)
    table.loc[table["site"] == "S3", "site"] = None
    splits, facts = make_splits(table, _settings(), "auto")
    assert any("10 patients without a known site" in text for text in facts["warnings"])
    lost = set(table.loc[table["site"].isna(), "patient_id"])
    tested = splits[(splits["role"] == "test") & splits["patient_id"].isin(lost)]
    assert tested["fold"].nunique() == 1


def test_inner_part_of_equal_sites_is_always_by_whole_sites():
    """Twelve hospitals alike leave no reason to split one."""
    table = pd.DataFrame(
        {
            "patient_id": [f"P{i:03d}" for i in range(120)],
            "site": [f"S{i // 10:02d}" for i in range(120)],
            "time_months": 1.0 + np.arange(120) % 37,
            "event": np.arange(120) % 2,
        }
    )
    splits, facts = make_splits(table, _settings(repeats=2), "auto")
    assert [f["inner_by"] for f in facts["folds"]] == ["whole sites"] * 6
    assert not any("by patient" in text for text in facts["warnings"])
    roles = splits.merge(table, on="patient_id").groupby(["repeat", "fold", "site"])["role"].nunique()
    assert (roles == 1).all()


def test_inner_part_by_whole_sites():
    site = np.repeat([f"S{k}" for k in range(10)], 20)
    event = np.tile([1, 0], 100)
    inner = inner_by_site(site, event, 0.2, [1, 0, 0])
    assert inner.how == "whole sites"
    assert inner.member.sum() == 40 and event[inner.member].sum() == 20
    assert len(set(site[inner.member])) == 2


@pytest.mark.parametrize(
    ("site", "event", "reason"),
    [
        (["A"] * 40 + ["B"] * 40, [1, 0] * 40, "2 sites"),
        (["A"] * 40 + ["B"] * 40 + ["C"] * 40, [1, 0] * 60, None),
        (["A"] * 10 + ["B"] * 10 + ["C"] * 10, [1] * 3 + [0] * 27, "fewer than 4|< 4"),
        (["A"] * 60 + ["B"] * 60 + ["C"] * 60, ([1] + [0] * 19) * 9, "instead of|< 4"),
    ],
)
def test_inner_part_falls_back_to_patients(site, event, reason):
    site, event = np.array(site), np.array(event)
    inner = inner_by_site(site, event, 0.2, [1, 0, 0])
    if reason is None:
        assert inner.how == "whole sites" and not inner.note
        return
    assert inner.how == "patients"
    assert re.search(reason, inner.note)
    assert 0 < inner.member.sum() < len(site) / 2
    assert event[inner.member].sum() >= 1


# ---------------------------------------------------------------------------------------------- random, limits


def test_random_folds_are_stratified():
    table = _cohort(300, 5, seed=3, share=0.4)
    time, event = table["time_months"].to_numpy(), table["event"].to_numpy()
    fold = random_folds(time, event, 5, seed=1, repeat=0)
    assert np.ptp(np.bincount(fold)) <= 1
    tercile = np.digitize(time, np.quantile(time, [1 / 3, 2 / 3]))
    for e in (0, 1):
        for t in range(3):
            assert np.ptp(np.bincount(fold[(event == e) & (tercile == t)], minlength=5)) <= 1


def test_hard_stop_names_the_fold_and_the_key():
    table = _cohort(60, 6, share=0.2)
    with pytest.raises(MorphomeError) as error:
        make_splits(table, _settings(scheme="random", min_events_per_test_fold=10), "auto")
    assert "repeat 0, fold 0" in error.value.problem
    assert "min_events_per_test_fold = 10" in error.value.problem
    assert "splits.folds" in error.value.remedy


def test_few_events_are_told():
    _, facts = make_splits(_cohort(90), _settings(), "auto")
    assert any("fewer than 20 events" in text for text in facts["warnings"])
    _, facts = make_splits(_cohort(300), _settings(), "auto")
    assert not any("fewer than 20 events" in text for text in facts["warnings"])


def test_two_rows_for_a_patient():
    table = _cohort(30)
    with pytest.raises(MorphomeError, match="P0003 have two rows"):
        make_splits(pd.concat([table, table.iloc[[3]]]), _settings(), "auto")


# -------------------------------------------------------------------------------------------------- the step


def test_run_split_writes_both_files(tmp_path):
    table = _cohort(90)
    patients = tmp_path / "patients.parquet"
    write_parquet(table, patients, "morphome.analysis", {})
    chosen = {"splits": _settings(), "evaluation": {"horizon_months": 24}}
    with pytest.warns(MorphomeWarning):
        run_split(settings=chosen, patients=patients, splits_out=tmp_path / "s.parquet", facts_out=tmp_path / "s.json")
    splits = read_parquet(tmp_path / "s.parquet", "morphome.splits", chosen)
    facts = read_json(tmp_path / "s.json", "morphome.split_facts", chosen)
    assert len(splits) == 270
    assert facts["scheme"] == "site"
    assert facts["horizon_months"] == 24.0
    assert [row["horizon_months"] for row in facts["horizon_table"]] == [12, 24, 36, 60]
    assert "the rule would not accept it" in facts["horizon_reason"]
    assert "before any model is run" in facts["horizon_note"]
    first = (tmp_path / "s.parquet").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MorphomeWarning)
        run_split(settings=chosen, patients=patients, splits_out=tmp_path / "s.parquet", facts_out=tmp_path / "s.json")
    assert (tmp_path / "s.parquet").read_bytes() == first


# ------------------------------------------------------------------------------------------------ published folds


def _write_folds(folder: Path, tests: list[list[str]], everyone: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, val in enumerate(tests):
        train = [p for p in everyone if p not in val]
        rows = {"train": pd.Series(train), "val": pd.Series(val)}
        pd.DataFrame(rows).to_csv(folder / f"splits_{k}.csv")
    return folder


def test_published_folds(tmp_path):
    table = _cohort(60)
    ids = table["patient_id"].tolist()
    listed = [*ids[:57], "GONE-1", "GONE-2"]
    folder = _write_folds(tmp_path, [listed[k::3] for k in range(3)], listed)
    splits, facts = make_splits(table, _settings(scheme="published", folder=str(folder)), "auto")
    assert any(text.startswith("2 patients of the published folds have no data") for text in facts["warnings"])
    assert any(text.startswith("3 patients of the cohort are tested in no published") for text in facts["warnings"])
    assert facts["n_patients"] == 57
    tested = splits[splits["role"] == "test"].set_index("patient_id")["fold"].to_dict()
    assert tested == {p: listed.index(p) % 3 for p in ids[:57]}
    assert set(splits["patient_id"]) == set(ids[:57])


def test_published_folds_that_cannot_be_used(tmp_path):
    table = _cohort(30)
    ids = table["patient_id"].tolist()

    def refuse(folder, match, **changes):
        with pytest.raises(MorphomeError, match=match):
            make_splits(table, _settings(scheme="published", folder=str(folder), **changes), "auto")

    good = _write_folds(tmp_path / "good", [ids[k::3] for k in range(3)], ids)
    refuse(good, "splits.folds = 4 needs", folds=4)
    refuse(good, "splits.repeats = 2", repeats=2)
    refuse(tmp_path / "nowhere", "found none")
    twice = _write_folds(tmp_path / "twice", [ids[:10], ids[9:20], ids[20:]], ids)
    refuse(twice, r"splits_1.csv: patient P0009 is in 'val' here and in splits_0.csv")
    both = _write_folds(tmp_path / "both", [ids[k::3] for k in range(3)], ids)
    frame = pd.read_csv(both / "splits_0.csv", index_col=0)
    frame.loc[0, "train"] = ids[0]
    frame.to_csv(both / "splits_0.csv")
    refuse(both, "'train' and in 'val' \\(P0000")
    wrong = _write_folds(tmp_path / "wrong", [ids[k::3] for k in range(3)], ids)
    pd.read_csv(wrong / "splits_2.csv").rename(columns={"val": "vali"}).to_csv(wrong / "splits_2.csv")
    refuse(wrong, "needs the columns 'train' and 'val'")
    other = _write_folds(tmp_path / "other", [["X"], ["Y"], ["Z"]], ["X", "Y", "Z"])
    refuse(other, "no patient of 'train' is in the cohort")
    with pytest.raises(MorphomeError, match=r"needs splits\.folder"):
        make_splits(table, _settings(scheme="published"), "auto")


# ------------------------------------------------------------------------------------------------------ real data


def _porpoise(shared_data: Path, cohort: str) -> pd.DataFrame:
    with ZipFile(shared_data / "tables" / "porpoise" / f"tcga_{cohort}_all_clean.csv.zip") as archive:
        columns = ["case_id", "survival_months", "censorship"]
        table = pd.read_csv(archive.open(archive.namelist()[0]), usecols=columns).drop_duplicates("case_id")
    return pd.DataFrame(
        {
            "patient_id": table["case_id"],
            "site": table["case_id"].str[5:7],
            "time_months": table["survival_months"],
            "event": (1 - table["censorship"]).astype(np.int8),
        }
    )


def test_published_folds_of_blca(shared_data):
    table = _porpoise(shared_data, "blca")
    folder = shared_data / "splits" / "porpoise_5foldcv" / "tcga_blca"
    splits, facts = make_splits(
        table, _settings(scheme="published", folds=5, folder=str(folder), min_events_per_test_fold=10), "auto"
    )
    assert len(table) == 373
    assert facts["n_patients"] == 373 and facts["n_events"] == 169
    assert [f["test_patients"] for f in facts["folds"]] == [75, 75, 75, 74, 74]
    assert not any("left out" in text for text in facts["warnings"])
    # These folds do not keep hospitals apart, and the facts say so.
    assert all(len(f["test_sites_also_in_training"]) > 10 for f in facts["folds"])
    for k in range(5):
        raw = pd.read_csv(folder / f"splits_{k}.csv")
        part = splits[splits["fold"] == k]
        assert set(part.loc[part["role"] == "test", "patient_id"]) == set(raw["val"].dropna())
        assert set(part.loc[part["role"] != "test", "patient_id"]) == set(raw["train"].dropna())


def test_published_folds_without_some_patients(shared_data):
    """A cohort that misses patients of the lists keeps the rest of the folds."""
    table = _porpoise(shared_data, "blca").iloc[5:]
    folder = shared_data / "splits" / "porpoise_5foldcv" / "tcga_blca"
    _, facts = make_splits(table, _settings(scheme="published", folds=5, folder=str(folder)), "auto")
    assert any(text.startswith("5 patients of the published folds have no data") for text in facts["warnings"])


def test_survpath_folds_share_no_site(shared_data):
    folds = read_published(shared_data / "splits" / "survpath_5foldcv" / "tcga_blca", 5)
    for fold in folds:
        assert not {p[5:7] for p in fold.train} & {p[5:7] for p in fold.test}


#: cases / censored before / beyond τ, G(τ), smallest cases and controls in a test fold; overall survival.
HORIZONS = {
    "blca": (36, 153, 143, 77, 0.441, 29, 12),
    "gbmlgg": (36, 145, 279, 145, 0.397, 27, 27),
    "hnsc": (36, 163, 139, 114, 0.509, 30, 20),
    "luad": (36, 119, 216, 118, 0.414, 23, 23),
}


@pytest.mark.parametrize("cohort", sorted(HORIZONS))
def test_horizons_of_published_folds(shared_data, cohort):
    folder = shared_data / "splits" / "porpoise_5foldcv" / f"tcga_{cohort}"
    _, facts = make_splits(
        _porpoise(shared_data, cohort), _settings(scheme="published", folds=5, folder=str(folder)), "auto"
    )
    row = next(r for r in facts["horizon_table"] if r["horizon_months"] == facts["horizon_months"])
    found = [row[k] for k in ("horizon_months", "cases", "censored_before", "controls")]
    assert [*found, round(row["g"], 3), row["min_cases_per_fold"], row["min_controls_per_fold"]] == list(
        HORIZONS[cohort]
    )


@pytest.mark.parametrize("cohort", ["blca", "hnsc"])
def test_site_folds_of_real_cohorts(shared_data, cohort):
    """Events per fold at least as even as the published greedy assignment (HNSC 92/26/25/22/24)."""
    repeats = 2 if cohort == "hnsc" else 1
    _, facts = make_splits(
        _porpoise(shared_data, cohort), _settings(folds=5, repeats=repeats, min_events_per_test_fold=10), "auto"
    )
    for repeat in range(repeats):
        events = sorted(f["test_events"] for f in facts["folds"] if f["repeat"] == repeat)
        assert events[0] >= (33 if cohort == "blca" else 24)
    assert all(f["test_sites_also_in_training"] == [] for f in facts["folds"])
    assert all(f["inner_by"] == "whole sites" for f in facts["folds"])
