"""Who is in which repeat, fold and inner validation: written once, read by every model.

The outer test folds judge; the inner validation part, drawn from the training fold only, decides epochs and
settings. Horizon and folds are fixed here, before any model is run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from morphome.errors import MorphomeError, MorphomeWarning
from morphome.files import read_parquet, write_json, write_parquet
from morphome.horizon import choose_horizon
from morphome.split_schemes import (
    Inner,
    inner_by_patient,
    inner_by_site,
    random_folds,
    read_published,
    site_folds,
)

#: Said in the facts and in the report: a horizon chosen after looking at models would flatter them.
HORIZON_NOTE = "The horizon is one constant of the cohort, fixed from outcomes and folds before any model is run."
ROLES = ("train", "inner_val", "test")
#: Fewer events in a test fold make its metrics hard to read.
FEW_EVENTS = 20
_UNKNOWN_SITES = {"", "unknown", "nan", "none"}


def run_split(*, settings: Mapping[str, Any], patients: Path, splits_out: Path, facts_out: Path) -> None:
    """Write the folds (``morphome.splits``) and what they hold (``morphome.split_facts``).

    Args:
        settings: ``{"splits": …, "evaluation": {"horizon_months": …}}``.
        patients: ``morphome.analysis``.

    Raises:
        MorphomeError: a test fold with fewer than ``splits.min_events_per_test_fold`` events, folds that cannot be
            made of these patients, published folds that contradict themselves.
    """
    columns = ["patient_id", "site", "time_months", "event"]
    table = read_parquet(patients, "morphome.analysis", columns=columns)
    splits, facts = make_splits(table, settings["splits"], settings["evaluation"]["horizon_months"])
    for text in facts["warnings"]:
        warnings.warn(MorphomeWarning(text), stacklevel=2)
    extra = {"scheme": facts["scheme"], "horizon_months": facts["horizon_months"]}
    write_parquet(splits, splits_out, "morphome.splits", settings, extra)
    write_json(facts, facts_out, "morphome.split_facts", settings)


def make_splits(
    patients: pd.DataFrame, settings: Mapping[str, Any], horizon: float | str
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Folds of a cohort and the facts about them.

    Args:
        patients: one row per patient: ``patient_id, site, time_months, event``; any order.
        settings: the ``splits`` section. horizon: "auto" or months.

    Returns:
        Long table ``patient_id, repeat, fold, role, seed`` sorted by repeat, fold and patient, where each patient is
        tested once per repeat; and the content of ``morphome.split_facts``.
    """
    scheme, folds, repeats = settings["scheme"], settings["folds"], settings["repeats"]
    table = patients.sort_values("patient_id").reset_index(drop=True)
    if table["patient_id"].duplicated().any():
        twice = sorted(set(table.loc[table["patient_id"].duplicated(), "patient_id"]))
        raise MorphomeError(f"patients {', '.join(twice[:5])} have two rows", "keep one row per patient")
    table["site"] = ["unknown" if str(s).strip().lower() in _UNKNOWN_SITES else str(s) for s in table["site"]]
    notes: list[str] = []
    if scheme == "published":
        table, plan = _published(table, settings, notes)
    else:
        if len(table) < 2 * folds:
            raise MorphomeError(
                f"{len(table)} patients are too few for {folds} folds (splits.folds)", "use fewer folds"
            )
        plan = _drawn(table, settings, notes)
    seed = settings["seed"]
    site, event = table["site"].to_numpy(), table["event"].to_numpy().astype(int)
    ids = table["patient_id"].to_numpy()

    parts, folds_facts, test_rows = [], [], []
    for repeat in range(repeats):
        for fold, (train, test, how) in enumerate(plan[repeat]):
            _check_events(int(event[test].sum()), repeat, fold, settings)
            inner = _inner(site[train], event[train], settings, repeat, fold)
            if inner.note:
                notes.append(f"repeat {repeat}, fold {fold}: {inner.note}; inner validation is by patient")
            role = np.full(len(table), "", dtype=object)
            role[train], role[test] = "train", "test"
            role[train[inner.member]] = "inner_val"
            used = np.flatnonzero(role != "")
            part = pd.DataFrame({"patient_id": ids[used], "role": role[used]})
            part.insert(1, "repeat", np.int32(repeat))
            part.insert(2, "fold", np.int32(fold))
            parts.append(part.assign(seed=np.int64(seed)))
            folds_facts.append({"repeat": repeat, "fold": fold, **_fold_facts(role, site, event, how, inner.how)})
            test_rows.append(test)
    splits = pd.concat(parts, ignore_index=True).astype({"repeat": "int32", "fold": "int32", "seed": "int64"})
    _check_partition(splits, ids, repeats)
    _note_few_events(folds_facts, notes)
    chosen = choose_horizon(horizon, table["time_months"].to_numpy(), event, test_rows)
    if chosen["horizon_months"] is None:
        notes.append(f"horizon: {chosen['horizon_reason']}; AUC, Brier score and Uno's C will be missing")
    elif not chosen["horizon_accepted"]:
        notes.append(f"horizon of {chosen['horizon_months']:g} months: {chosen['horizon_reason']}")
    facts = {
        "scheme": scheme,
        "n_folds": folds,
        "n_repeats": repeats,
        "seed": seed,
        "inner_fraction": settings["inner_fraction"],
        "n_patients": len(table),
        "n_events": int(event.sum()),
        "n_sites": len(set(site)),
        **chosen,
        "horizon_note": HORIZON_NOTE,
        "folds": folds_facts,
        "warnings": notes,
    }
    return splits, facts


_Fold = tuple[np.ndarray, np.ndarray, str]


def _drawn(table: pd.DataFrame, settings: Mapping[str, Any], notes: list[str]) -> list[list[_Fold]]:
    """Rows of training and test part of every fold of every repeat, by site or at random."""
    folds, seed = settings["folds"], settings["seed"]
    site, event = table["site"].to_numpy(), table["event"].to_numpy().astype(int)
    plan, earlier = [], []
    if settings["scheme"] == "site" and (unknown := int((site == "unknown").sum())):
        notes.append(f"{unknown} patients without a known site are kept together as one site")
    for repeat in range(settings["repeats"]):
        if settings["scheme"] == "site":
            found = site_folds(site, event, folds, settings["min_events_per_test_fold"], seed, repeat, earlier)
            earlier.append(found.fold)
            notes += found.notes
            fold, how = found.fold, found.how
        else:
            fold = random_folds(table["time_months"].to_numpy(), event, folds, seed, repeat)
            how = "random, stratified by event and tercile of time"
        plan.append([(np.flatnonzero(fold != k), np.flatnonzero(fold == k), how) for k in range(folds)])
    return plan


def _published(
    table: pd.DataFrame, settings: Mapping[str, Any], notes: list[str]
) -> tuple[pd.DataFrame, list[list[_Fold]]]:
    """Published folds cut down to the patients of the cohort, and the cohort cut down to those tested."""
    if "folder" not in settings:
        raise MorphomeError("splits.scheme 'published' needs splits.folder", "name the folder of splits_<k>.csv")
    if settings["repeats"] != 1:
        raise MorphomeError(
            f"splits.repeats = {settings['repeats']}: published folds are one repeat", "set splits.repeats to 1"
        )
    lists = read_published(Path(settings["folder"]), settings["folds"])
    listed = {p for fold in lists for p in (*fold.train, *fold.test)}
    tested = {p for fold in lists for p in fold.test}
    cohort = set(table["patient_id"])
    for lost, why in (
        (listed - cohort, "patients of the published folds have no data here and were left out"),
        (cohort - tested, "patients of the cohort are tested in no published fold and were left out"),
    ):
        if lost:
            notes.append(f"{len(lost)} {why} ({_some(lost)})")
    table = table[table["patient_id"].isin(tested)].reset_index(drop=True)
    row = {p: i for i, p in enumerate(table["patient_id"])}
    plan = []
    for k, fold in enumerate(lists):
        train, test = (
            np.array(sorted(row[p] for p in part if p in row), dtype=np.int64) for part in (fold.train, fold.test)
        )
        if not len(train) or not len(test):
            empty = "train" if not len(train) else "val"
            raise MorphomeError(
                f"{settings['folder']}/splits_{k}.csv: no patient of '{empty}' is in the cohort",
                "check that the folds belong to this cohort and that both write patients alike (TCGA-XX-XXXX)",
            )
        plan.append((train, test, "published"))
    return table, [plan]


def _inner(site: np.ndarray, event: np.ndarray, settings: Mapping[str, Any], repeat: int, fold: int) -> Inner:
    seed = [settings["seed"], repeat, fold]
    if settings["scheme"] == "site":
        return inner_by_site(site, event, settings["inner_fraction"], seed)
    rng = np.random.default_rng([*seed, 303])
    return Inner(inner_by_patient(event, settings["inner_fraction"], rng), "patients")


def _check_events(events: int, repeat: int, fold: int, settings: Mapping[str, Any]) -> None:
    least = settings["min_events_per_test_fold"]
    if events < least:
        raise MorphomeError(
            f"repeat {repeat}, fold {fold}: {events} events in the test fold, fewer than "
            f"splits.min_events_per_test_fold = {least}",
            "lower splits.folds, use splits.scheme 'random', choose an end point with more events, or lower "
            "splits.min_events_per_test_fold knowing that metrics per fold will be noise",
        )


def _note_few_events(folds: list[dict[str, Any]], notes: list[str]) -> None:
    few = [f for f in folds if f["test_events"] < FEW_EVENTS]
    if few:
        which = ", ".join(f"repeat {f['repeat']} fold {f['fold']}: {f['test_events']}" for f in few[:6])
        more = f" and {len(few) - 6} more" if len(few) > 6 else ""
        notes.append(f"{len(few)} of {len(folds)} test folds have fewer than {FEW_EVENTS} events ({which}{more})")


def _fold_facts(role: np.ndarray, site: np.ndarray, event: np.ndarray, how: str, inner_how: str) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name in ROLES:
        rows = role == name
        facts[f"{name}_patients"], facts[f"{name}_events"] = int(rows.sum()), int(event[rows].sum())
        facts[f"{name}_sites"] = sorted(set(site[rows]))
    shared = set(facts["test_sites"]) & (set(facts["train_sites"]) | set(facts["inner_val_sites"]))
    facts["test_sites_also_in_training"] = sorted(shared)
    facts["inner_sites_also_in_training"] = sorted(set(facts["inner_val_sites"]) & set(facts["train_sites"]))
    return {**facts, "folds_by": how, "inner_by": inner_how}


def _check_partition(splits: pd.DataFrame, ids: np.ndarray, repeats: int) -> None:
    """Every patient is tested exactly once per repeat, and has one role per fold."""
    tested = splits[splits["role"] == "test"]
    if len(tested) != repeats * len(ids) or tested.duplicated(["repeat", "patient_id"]).any():
        raise AssertionError("a patient is not tested exactly once per repeat")
    if splits.duplicated(["repeat", "fold", "patient_id"]).any():
        raise AssertionError("a patient has two roles in one fold")


def _some(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:5])
    return first if len(names) <= 5 else f"{first}, …"
