"""From the predictions of all runs to tables: out-of-fold rows, metrics, summary, curves, groups, pairs, branches.

The unit is the patient: one row per patient and repeat. A patient whom a model did not score leaves every array of
that model. What cannot be computed is NaN with a reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from morphome.errors import MorphomeError, MorphomeWarning
from morphome.evaluation.branches import branch_table
from morphome.evaluation.intervals import (
    Interval,
    Weights,
    bootstrap_weights,
    fold_mean,
    percentile_interval,
    stratified_c,
)
from morphome.evaluation.metrics import METRICS, FoldPredictions, fold_metrics
from morphome.evaluation.risk_groups import compare_groups, group_curves
from morphome.files import read_json, read_parquet, write_parquet
from morphome.survival import TIED_TOLERANCE, Metric

#: Rows are compared in pairs with this model.
REFERENCE_MODEL = "clinical_cox"
_TRAINING_ROLES = ("train", "inner_val")


@dataclass
class Row:
    """One row of the model table: its folds by (repeat, fold) and their metrics."""

    name: str
    model: str
    folds: dict[tuple[int, int], FoldPredictions]
    metrics: dict[tuple[int, int], dict[str, Metric]]

    @property
    def repeats(self) -> list[list[FoldPredictions]]:
        """Folds of each repeat."""
        return [
            [self.folds[key] for key in sorted(self.folds) if key[0] == repeat]
            for repeat in sorted({r for r, _ in self.folds})
        ]


def run_evaluate(*, settings: Mapping[str, Any], predictions: Sequence[Path], split_facts: Path, out: Path) -> None:
    """Write ``oof, metrics, summary, km, risk_groups, comparisons, branches`` (parquet) into ``out``.

    Args:
        settings: ``{"evaluation": {"bootstrap", "seed", …}}``.
        predictions: ``morphome.predictions`` of every model x repeat x fold.
        split_facts: ``morphome.split_facts``; its horizon holds.

    Raises:
        MorphomeError: runs that do not belong together: another horizon, a missing fold, a patient tested twice in
            one repeat, outcomes that differ between runs.
    """
    facts = read_json(split_facts, "morphome.split_facts")
    rows, notes = load_rows(predictions, facts.get("horizon_months"), facts.get("horizon_reason") or "")
    tables = evaluate(rows, settings["evaluation"]["bootstrap"], settings["evaluation"]["seed"])
    for text in notes:
        warnings.warn(MorphomeWarning(text), stacklevel=2)
    extra = {"horizon_months": facts.get("horizon_months"), "warnings": notes}
    for name, table in tables.items():
        write_parquet(table, Path(out) / f"{name}.parquet", f"morphome.{name}", settings, extra)


def load_rows(
    predictions: Sequence[Path], horizon: float | None, horizon_reason: str = ""
) -> tuple[list[Row], list[str]]:
    """Read and check the predictions; rows in the order in which their first file is given, and remarks."""
    found: dict[str, Row] = {}
    outcomes: dict[str, tuple[float, int]] = {}
    for path in predictions:
        table = read_parquet(path, "morphome.predictions")
        meta = table.attrs
        if not _same(meta.get("horizon_months"), horizon):
            raise MorphomeError(
                f"{path}: was made for a horizon of {meta.get('horizon_months')} months; the folds say {horizon}",
                "train this model again (Snakemake does it by itself)",
            )
        row = found.setdefault(meta["name"], Row(meta["name"], meta["model"], {}, {}))
        key = (int(meta["repeat"]), int(meta["fold"]))
        if key in row.folds:
            raise MorphomeError(
                f"{path}: repeat {key[0]}, fold {key[1]} of '{row.name}' is given twice", "give it once"
            )
        for patient, time, event in zip(table["patient_id"], table["time_months"], table["event"], strict=True):
            if outcomes.setdefault(patient, (time, event)) != (time, event):
                raise MorphomeError(
                    f"{path}: patient {patient} has another outcome than in other runs", "train the older runs again"
                )
        row.folds[key] = _fold(path, table, np.asarray(meta["times_months"], float), horizon, horizon_reason)
    if not found:
        raise MorphomeError("no predictions to evaluate", "train at least one model")
    rows = list(found.values())
    notes = _check_rows(rows)
    for row in rows:
        row.metrics = {key: fold_metrics(fold) for key, fold in row.folds.items()}
    return rows, notes


def _fold(path: Path, table: pd.DataFrame, grid: np.ndarray, horizon: float | None, reason: str) -> FoldPredictions:
    table = table.sort_values("patient_id")
    twice = table.loc[table["patient_id"].duplicated(), "patient_id"]
    if len(twice):
        raise MorphomeError(f"{path}: patient {twice.iloc[0]} has two rows", "one row per patient: train it again")
    test, train = table[table["role"] == "test"], table[table["role"].isin(_TRAINING_ROLES)]
    if test.empty or train.empty:
        raise MorphomeError(f"{path}: no {'test' if test.empty else 'training'} rows", "train this model again")
    curves = np.array(test["survival"].tolist(), dtype=np.float64).reshape(len(test), -1)
    if curves.shape[1] != len(grid):
        raise MorphomeError(
            f"{path}: survival curves have {curves.shape[1]} points, the time grid {len(grid)}", "train it again"
        )
    return FoldPredictions(
        patient_id=test["patient_id"].to_numpy(dtype=object),
        time=test["time_months"].to_numpy(np.float64),
        event=test["event"].to_numpy().astype(bool),
        risk=test["risk"].to_numpy(np.float64),
        survival=curves,
        grid=grid,
        train_time=train["time_months"].to_numpy(np.float64),
        train_event=train["event"].to_numpy().astype(bool),
        train_risk=train["risk"].to_numpy(np.float64),
        horizon=horizon,
        horizon_reason=reason,
        branch_risk={
            column.removeprefix("risk_"): test[column].to_numpy(np.float64)
            for column in test
            if column.startswith("risk_")
        },
    )


def _check_rows(rows: Sequence[Row]) -> list[str]:
    """Every row has the same folds; every patient is tested once per repeat. Returns remarks for the reader."""
    notes = []
    place: dict[tuple[int, str], tuple[int, str]] = {}  # (repeat, patient): fold and the first row that says so
    all_keys = {key for row in rows for key in row.folds}
    everyone: dict[tuple[int, int], set[str]] = {key: set() for key in all_keys}
    for row in rows:
        if missing := sorted(all_keys - set(row.folds)):
            raise MorphomeError(
                f"'{row.name}' has no predictions for repeat {missing[0][0]}, fold {missing[0][1]}",
                "train the missing folds; a model is not judged on some of the folds",
            )
        tested: set[tuple[int, str]] = set()
        for (repeat, fold), data in row.folds.items():
            everyone[repeat, fold] |= set(data.patient_id)
            for patient in data.patient_id:
                if (repeat, patient) in tested:
                    raise MorphomeError(
                        f"'{row.name}': patient {patient} is tested twice in repeat {repeat} (again in fold {fold})",
                        "every patient is tested once per repeat: make the folds again",
                    )
                tested.add((repeat, patient))
                known, first = place.setdefault((repeat, patient), (fold, row.name))
                if known != fold:
                    raise MorphomeError(
                        f"patient {patient} is tested in fold {known} of repeat {repeat} by '{first}', but in fold "
                        f"{fold} by '{row.name}'",
                        "the runs come from different folds: train the older ones again",
                    )
    for row in rows:
        constant = sum(len(d.risk) > 1 and np.ptp(d.risk) <= TIED_TOLERANCE for d in row.folds.values())
        if constant:
            notes.append(f"'{row.name}' gives all test patients the same risk in {constant} of {len(row.folds)} folds")
        lost = sorted({p for key, data in row.folds.items() for p in everyone[key] - set(data.patient_id)})
        if lost:
            names = ", ".join(lost[:5]) + (", …" if len(lost) > 5 else "")
            notes.append(
                f"'{row.name}' did not score {len(lost)} patients that others did ({names}); they are left out"
            )
    return notes


def evaluate(rows: Sequence[Row], resamples: int, seed: int) -> dict[str, pd.DataFrame]:
    """The tables by name; bootstrap weights are shared by all rows and repeats (none with ``resamples`` 0)."""
    weights = shared_weights(rows, resamples, seed) if resamples else None
    return {
        "oof": pd.concat([_oof(row) for row in rows], ignore_index=True),
        "metrics": pd.DataFrame([m for row in rows for m in _metric_rows(row)]),
        "summary": pd.DataFrame([s for row in rows for s in summarise(row, weights)]),
        **_group_tables(rows),
        "comparisons": compare(rows, weights),
        "branches": branch_table(rows, weights),
    }


def shared_weights(rows: Sequence[Row], resamples: int, seed: int) -> Weights:
    """One set of bootstrap weights: drawn within the test folds of the first repeat."""
    fold_of: dict[str, int] = {}
    # Keys come sorted, so the first repeat decides; later repeats only add patients it lacks.
    for key in sorted({key for row in rows for key in row.folds}):
        for row in rows:
            for patient in row.folds[key].patient_id:
                fold_of.setdefault(patient, key[1])
    return bootstrap_weights(fold_of, resamples, seed)


def summarise(row: Row, weights: Weights | None) -> list[dict[str, Any]]:
    """One summary per metric: the value over all folds with its bootstrap interval and the spread over folds.

    A mean over some of the folds would be a number about easier folds: with a fold missing there is none.
    """
    found = []
    horizon = next(iter(row.folds.values())).horizon
    for metric in METRICS:
        values = {key: row.metrics[key][metric] for key in sorted(row.folds)}
        per_fold = np.array([m.value for m in values.values()])
        usable = np.isfinite(per_fold)
        resampled = np.array([])
        if metric == "harrell_c":
            value = float(stratified_c(row.repeats)[0])
            if weights is not None and np.isfinite(value):
                resampled = stratified_c(row.repeats, weights)
            method = "pairs within test folds, mean over repeats"
        else:
            value = float(per_fold.mean()) if usable.all() else np.nan
            if weights is not None and usable.all():
                resampled = fold_mean([row.folds[key] for key in values], metric, weights)
            method = "mean over test folds"
        interval = percentile_interval(resampled) if np.isfinite(value) else Interval(np.nan, np.nan)
        if len(resampled):
            method += f"; 95 % percentile interval of {len(resampled)} patient bootstraps within folds"
        found.append(
            {
                "name": row.name,
                "model": row.model,
                "metric": metric,
                "horizon_months": np.nan if metric == "harrell_c" or horizon is None else horizon,
                "value": value,
                "lower": interval.lower,
                "upper": interval.upper,
                "sd_folds": float(per_fold.std(ddof=1)) if usable.all() and len(per_fold) > 1 else np.nan,
                "n_folds": len(per_fold),
                "n_missing": int((~usable).sum()),
                "method": method,
                "reason": _reasons({key: m.reason for key, m in values.items()}, interval.reason),
            }
        )
    return found


def _reasons(per_fold: Mapping[tuple[int, int], str], interval: str) -> str:
    """Which folds have no value and why, then why there is no interval; ``per_fold`` has "" where all is well."""
    several = len({repeat for repeat, _ in per_fold}) > 1
    where: dict[str, list[str]] = {}
    for (repeat, fold), reason in per_fold.items():
        if reason:
            where.setdefault(reason, []).append(f"repeat {repeat} fold {fold}" if several else f"fold {fold}")
    missing = sum(len(folds) for folds in where.values())
    parts = []
    if len(where) == 1 and missing == len(per_fold):
        parts.append(next(iter(where)))
    elif where:
        told = [f"{reason} ({', '.join(folds)})" for reason, folds in where.items()]
        parts.append(f"missing in {missing} of {len(per_fold)} folds: {', '.join(told)}")
    if interval:
        parts.append(f"no interval: {interval}")
    return "; ".join(parts)


def compare(rows: Sequence[Row], weights: Weights | None) -> pd.DataFrame:
    """Paired differences in stratified C against the clinical Cox row, on the patients that both scored."""
    columns = ["name_a", "name_b", "delta_c", "lower", "upper", "n_patients", "reason"]
    reference = next((row for row in rows if row.model == REFERENCE_MODEL), None)
    found = []
    for row in rows:
        if reference is None or row is reference:
            continue
        a, b, patients = [], [], set()
        for folds_a, folds_b in zip(row.repeats, reference.repeats, strict=True):
            common = [set(x.patient_id) & set(y.patient_id) for x, y in zip(folds_a, folds_b, strict=True)]
            a.append([fold.only(both) for fold, both in zip(folds_a, common, strict=True)])
            b.append([fold.only(both) for fold, both in zip(folds_b, common, strict=True)])
            patients |= set().union(*common)
        delta = float((stratified_c(a) - stratified_c(b))[0])
        interval = Interval(np.nan, np.nan, "" if np.isfinite(delta) else "one of the two has no stratified C")
        if np.isfinite(delta):
            resampled = np.array([]) if weights is None else stratified_c(a, weights) - stratified_c(b, weights)
            interval = percentile_interval(resampled)
        found.append([row.name, reference.name, delta, interval.lower, interval.upper, len(patients), interval.reason])
    return pd.DataFrame(found, columns=columns).astype(
        {"delta_c": "float64", "lower": "float64", "upper": "float64", "n_patients": "int64"}
    )


def _oof(row: Row) -> pd.DataFrame:
    parts = []
    for (repeat, fold), data in sorted(row.folds.items()):
        part = pd.DataFrame({"patient_id": data.patient_id, "time_months": data.time})
        part["event"] = data.event.astype("int8")
        part["risk"] = data.risk
        part["threshold"] = data.threshold
        part["high_risk"] = data.risk > data.threshold
        part["survival_at_horizon"] = data.survival_at_horizon
        part.insert(0, "fold", np.int32(fold))
        part.insert(0, "repeat", np.int32(repeat))
        parts.append(part)
    table = pd.concat(parts, ignore_index=True).astype({"repeat": "int32", "fold": "int32"})
    table.insert(0, "model", row.model)
    table.insert(0, "name", row.name)
    return table


def _metric_rows(row: Row) -> list[dict[str, Any]]:
    return [
        {
            "name": row.name,
            "model": row.model,
            "repeat": repeat,
            "fold": fold,
            "metric": metric,
            "horizon_months": np.nan if metric == "harrell_c" else row.folds[repeat, fold].horizon or np.nan,
            "value": row.metrics[repeat, fold][metric].value,
            "reason": row.metrics[repeat, fold][metric].reason,
        }
        for repeat, fold in sorted(row.folds)
        for metric in METRICS
    ]


def _group_tables(rows: Sequence[Row]) -> dict[str, pd.DataFrame]:
    """Curves and comparison of the risk groups of the first repeat, pooled over its folds."""
    curves, groups = [], []
    for row in rows:
        folds = row.repeats[0]
        time = np.concatenate([f.time for f in folds])
        event = np.concatenate([f.event for f in folds])
        high = np.concatenate([f.risk > f.threshold for f in folds])
        known = np.concatenate([np.isfinite(f.risk) & np.isfinite(f.threshold) for f in folds])
        stratum = np.concatenate([np.full(len(f.time), k) for k, f in enumerate(folds)])
        time, event, high, stratum = time[known], event[known], high[known], stratum[known]
        curve = group_curves(time, event, high)
        curve.insert(0, "model", row.model)
        curve.insert(0, "name", row.name)
        curves.append(curve)
        found = compare_groups(time, event, high, stratum, folds[0].horizon)
        if lost := int((~known).sum()):
            found["reason"] = "; ".join(filter(None, [found["reason"], f"{lost} patients have no finite risk"]))
        groups.append({"name": row.name, "model": row.model, **found})
    return {"km": pd.concat(curves, ignore_index=True), "risk_groups": pd.DataFrame(groups)}


def _same(a: float | None, b: float | None) -> bool:
    return a is b if a is None or b is None else bool(np.isclose(a, b, rtol=1e-12))
