"""The tables behind the page, as data frames: what the page shows is rounded from these, and they go to CSV."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from morphome.report import cohort_tables, optimistic, slide_tables
from morphome.report import format as fmt
from morphome.report.inputs import ReportData
from morphome.survival import TIED_TOLERANCE, censoring_km

METRICS = ("harrell_c", "uno_c", "auc", "ibs", "ipa")
#: What a run may say that it needs, in a reader's words.
_NEEDS = {"clinical": "clinical", "path": "slides"} | dict.fromkeys(
    ("omic_groups", "omic_all", "panels", "rna", "cnv", "mut"), "genes"
)
PANELS = {"rna": "RNA", "mut": "mutations", "cnv": "copy number"}
_ROMAN = {1: "I", 2: "II", 3: "III", 4: "IV"}

#: Two-sided 5 %, power 80 %: detectable difference = 2.80 standard errors; a 95 % interval spans 2 x 1.96 of them.
_DETECTABLE_PER_WIDTH = 2.80 / (2 * 1.96)


def sees(data: ReportData, name: str) -> list[str]:
    """What a row's model gets to see, out of clinical, genes, slides; empty for the random score."""
    runs = data.runs_of(name)
    needs = runs[0].facts.get("needs", []) if runs else []
    found = {_NEEDS.get(need, str(need)) for need in needs}
    return [kind for kind in ("clinical", "genes", "slides") if kind in found] + sorted(
        found - {"clinical", "genes", "slides"}
    )


def panels(data: ReportData, name: str) -> list[str]:
    """Molecular tables that a row's model reads, where the run or the gene groups name them."""
    if "genes" not in sees(data, name):
        return []
    runs = data.runs_of(name)
    found = set((runs[0].facts.get("settings") or {}).get("panels") or [])
    if not found and "omic_groups" in runs[0].facts.get("needs", []):
        columns = [c for group in ((data.groups or {}).get("groups") or {}).values() for c in group]
        found = {c["panel"] for c in columns if isinstance(c, dict) and "panel" in c}
    if "omic_all" in runs[0].facts.get("needs", []):
        found |= set(data.panels) - {"expression"}
    return [label for key, label in PANELS.items() if key in found] + sorted(found - set(PANELS))


def constant_folds(data: ReportData, name: str) -> list[tuple[int, int]]:
    """``(repeat, fold)`` where a row gave all patients the same risk, by its run or by its predictions."""
    found = {(r.repeat, r.fold) for r in data.runs_of(name) if r.facts.get("constant_prediction")}
    for key, risk in data.oof[data.oof["name"] == name].groupby(["repeat", "fold"])["risk"]:
        if len(risk) > 1 and np.ptp(risk.to_numpy(dtype=float)) <= TIED_TOLERANCE:
            found.add((int(key[0]), int(key[1])))
    return sorted(found)


def model_table(data: ReportData) -> pd.DataFrame:
    """One row per model: every metric with its interval, spread over folds and reason, and what it cost."""
    rows = []
    for name in data.names:
        runs = data.runs_of(name)
        row: dict[str, Any] = {
            "name": name,
            "model": data.model_of(name),
            "sees": " + ".join(sees(data, name)),
            "gene_tables": " + ".join(panels(data, name)),
            "horizon_months": data.horizon,
        }
        for metric in METRICS:
            found = data.metric(name, metric)
            row[metric] = found.get("value", np.nan)
            for key in ("lower", "upper", "sd_folds", "n_folds", "n_missing", "method", "reason"):
                row[f"{metric}_{key}"] = found.get(key, "" if key in {"method", "reason"} else np.nan)
        parameters = [r.facts.get("n_parameters") for r in runs if r.facts.get("n_parameters") is not None]
        row["n_parameters"] = float(np.median(parameters)) if parameters else np.nan
        row["train_seconds"] = float(sum(r.facts.get("seconds_total") or 0.0 for r in runs)) if runs else np.nan
        row["runs_constant"] = len(constant_folds(data, name))
        rows.append(row)
    return pd.DataFrame(rows)


def against_clinical(data: ReportData) -> pd.DataFrame:
    """Paired differences in stratified C, turned so that the reference is the clinical Cox row where there is one.

    Returns:
        ``name, reference, delta_c, lower, upper, detectable_delta_c, n_patients, reason``: the difference
        name − reference, and the true difference that these patients would show with power 80 % (2.80 SE, SE from
        the interval's width).
    """
    rows = []
    for row in data.comparisons.itertuples():
        name, reference, delta, low, high = row.name_a, row.name_b, row.delta_c, row.lower, row.upper
        if data.model_of(name) == "clinical_cox" and data.model_of(reference) != "clinical_cox":
            name, reference, delta, low, high = reference, name, -delta, -high, -low
        detectable = _DETECTABLE_PER_WIDTH * (high - low)
        patients, reason = getattr(row, "n_patients", np.nan), str(getattr(row, "reason", "") or "")
        rows.append([name, reference, delta, low, high, detectable, patients, reason])
    columns = ["name", "reference", "delta_c", "lower", "upper", "detectable_delta_c", "n_patients", "reason"]
    table = pd.DataFrame(rows, columns=columns)
    order = {name: i for i, name in enumerate(data.names)}
    return table.sort_values("name", key=lambda s: s.map(order), kind="stable").reset_index(drop=True)


def reverse_km_median(time: np.ndarray, event: np.ndarray) -> float:
    """Median follow-up in the unit of ``time`` by the reverse Kaplan-Meier estimate (Schemper and Smith 1996).

    Censorings are the events here; a patient whose event falls on the same time has left before. NaN when the curve
    does not reach one half.
    """
    times, left = censoring_km(time, event)
    reached = times[left <= 0.5 + 1e-12]
    return float(reached[0]) if len(reached) else float("nan")


def baseline(data: ReportData) -> pd.DataFrame:
    """Patients' characteristics overall, by outcome and by test fold of the first repeat; texts as in the page."""
    people = data.patients
    happened = people["event"].astype(bool)
    groups: dict[str, pd.DataFrame] = {"All": people, "Event": people[happened], "Censored": people[~happened]}
    first = data.splits[(data.splits["repeat"] == data.splits["repeat"].min()) & (data.splits["role"] == "test")]
    if data.folds <= 6:
        for fold, ids in first.groupby("fold")["patient_id"]:
            groups[f"Fold {fold}"] = people[people["patient_id"].isin(ids)]

    rows: list[dict[str, str]] = []

    def add(what: str, level: str, cell) -> None:
        rows.append({"characteristic": what, "level": level, **{g: cell(t) for g, t in groups.items()}})

    add("Patients", "n", lambda t: fmt.count(len(t)))
    add("Events", "n (%)", lambda t: fmt.share(int(t["event"].sum()), len(t)))

    def follow_up(t: pd.DataFrame) -> str:
        # Among patients chosen by their outcome the estimate means nothing.
        mixed = t["event"].nunique() > 1
        return fmt.number(reverse_km_median(t["time_months"], t["event"]), 1) if mixed else ""

    add("Follow-up", "reverse-KM median, months", follow_up)
    add("Observed time", "median [quartiles], months", lambda t: fmt.spread(t["time_months"], 1))
    if _known(people, "age_years"):
        add("Age", "median [quartiles], years", lambda t: fmt.spread(t["age_years"]))
        _missing_row(add, people, "age_years", "Age")
    if _known(people, "sex"):
        for level in sorted(people["sex"].dropna().unique()):
            add("Sex", str(level), lambda t, v=level: fmt.share(int((t["sex"] == v).sum()), len(t)))
        _missing_row(add, people, "sex", "Sex")
    for column, label in (("stage", "Stage"), ("grade", "Grade")):
        if _known(people, column):
            for level in sorted(people[column].dropna().unique()):
                shown = _ROMAN.get(int(level), f"{level:g}") if column == "stage" else f"G{level:g}"
                add(label, shown, lambda t, c=column, v=level: fmt.share(int((t[c] == v).sum()), len(t)))
            _missing_row(add, people, column, label)
    if _known(people, "histology"):
        common = people["histology"].value_counts()
        for level in sorted(common.index[:5], key=lambda v: (-common[v], v)):
            add("Histology", str(level), lambda t, v=level: fmt.share(int((t["histology"] == v).sum()), len(t)))
        if len(common) > 5:
            rest = set(common.index[5:])
            add("Histology", f"{len(rest)} others", lambda t: fmt.share(int(t["histology"].isin(rest).sum()), len(t)))
        _missing_row(add, people, "histology", "Histology")
    add("Sites", "n", lambda t: fmt.count(t["site"].nunique()))
    if "n_slides" in people and people["n_slides"].sum():
        add("Slides per patient", "median [quartiles]", lambda t: fmt.spread(t["n_slides"]))
        add("Tiles per patient", "median [quartiles]", lambda t: fmt.spread(t["n_tiles"]))
    for column, label in (("has_rna", "RNA"), ("has_mut", "Mutations"), ("has_cnv", "Copy number")):
        if column in people and people[column].any():
            add(label, "measured", lambda t, c=column: fmt.share(int(t[c].sum()), len(t)))
    return pd.DataFrame(rows)


def _known(table: pd.DataFrame, column: str) -> bool:
    return column in table and bool(table[column].notna().any())


def _missing_row(add, people: pd.DataFrame, column: str, label: str) -> None:
    if people[column].isna().any():
        add(label, "missing", lambda t: fmt.share(int(t[column].isna().sum()), len(t)))


def flow(data: ReportData) -> pd.DataFrame:
    """Exclusion steps in order."""
    return pd.DataFrame(
        [
            {
                "step": step["name"],
                "unit": step.get("unit", "patients"),
                "before": int(step["before"]),
                "after": int(step["after"]),
                "excluded": int(step["before"]) - int(step["after"]),
                "reason": step.get("reason", ""),
                "excluded_ids": ";".join(str(i) for i in step.get("excluded", [])),
            }
            for step in data.flow
        ],
        columns=["step", "unit", "before", "after", "excluded", "reason", "excluded_ids"],
    )


def splits(data: ReportData) -> pd.DataFrame:
    """Patients, events and sites of every fold, and how many test sites also lie in training."""
    people = data.patients.set_index("patient_id")[["site", "event", "time_months"]]
    joined = data.splits.join(people, on="patient_id", how="inner")
    rows = []
    for (repeat, fold), part in joined.groupby(["repeat", "fold"]):
        row: dict[str, Any] = {"repeat": repeat, "fold": fold}
        for role in ("train", "inner_val", "test"):
            members = part[part["role"] == role]
            row[f"{role}_patients"], row[f"{role}_events"] = len(members), int(members["event"].sum())
            row[f"{role}_sites"] = members["site"].nunique()
        test, rest = part[part["role"] == "test"], part[part["role"] != "test"]
        row["test_sites_also_in_training"] = len(set(test["site"]) & set(rest["site"]))
        tau = data.horizon
        row["test_cases_by_horizon"] = (
            np.nan if tau is None else int(((test["time_months"] <= tau) & (test["event"] == 1)).sum())
        )
        row["test_controls_beyond_horizon"] = np.nan if tau is None else int((test["time_months"] > tau).sum())
        per_site = test["site"].value_counts()
        named = sorted(per_site.index, key=lambda s: (-per_site[s], s))
        row["test_site_list"] = ";".join(f"{site}:{per_site[site]}" for site in named)
        rows.append(row)
    return pd.DataFrame(rows)


def risk_groups(data: ReportData) -> pd.DataFrame:
    """Risk groups. χ² describes; its p is left out: groups made by cross-validation do not have its distribution."""
    table = data.risk_groups.drop(columns="logrank_p", errors="ignore")
    known = table["note"].iloc[0] if "note" in table and len(table) else ""
    return table.assign(note=f"{known or 'descriptive: cross-validated groups'}; no p-value")


def run_times(data: ReportData) -> pd.DataFrame:
    """One row per slide encoded and one per training run."""
    rows = [
        {
            "step": "encode",
            "item": t.get("slide_id"),
            "seconds": t.get("seconds_total"),
            "tiles": t.get("n_tiles"),
            "tiles_per_second": t.get("tiles_per_second"),
            "seconds_read": t.get("seconds_read"),
            "seconds_encode": t.get("seconds_encode"),
        }
        for t in data.timings
    ]
    for name in data.names:
        for run in data.runs_of(name):
            f = run.facts
            rows.append(
                {
                    "step": "train",
                    "item": f"{name}/r{run.repeat}/f{run.fold}",
                    "seconds": f.get("seconds_total"),
                    "epochs": f.get("epochs_run"),
                    "seconds_per_epoch": f.get("seconds_per_epoch"),
                    "parameters": f.get("n_parameters"),
                    "device": f.get("device"),
                    "threads": f.get("threads"),
                }
            )
    columns = ["step", "item", "seconds", "tiles", "tiles_per_second", "seconds_read", "seconds_encode"]
    columns += ["epochs", "seconds_per_epoch", "parameters", "device", "threads"]
    return pd.DataFrame(rows, columns=columns)


def expert_use(data: ReportData) -> pd.DataFrame:
    """Share of patients per expert, by model, repeat, fold, epoch, layer and role."""
    columns = ["model_name", "repeat", "fold", "epoch", "layer", "role", "expert", "name", "n", "share"]
    columns += ["probability", "entropy", "chosen"]
    found = [
        run.routing.assign(model_name=name, repeat=run.repeat, fold=run.fold)[columns]
        for name in data.names
        for run in data.runs_of(name)
        if len(run.routing)
    ]
    table = pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)
    return table.rename(columns={"name": "expert_name"})


def all_tables(data: ReportData) -> dict[str, pd.DataFrame]:
    """Every table that is written as CSV, by file name."""
    return {
        "model_table": model_table(data),
        "metrics_per_fold": data.metrics,
        "baseline": baseline(data),
        "flow": flow(data),
        "splits": splits(data),
        "slides": slide_tables.slides(data),
        "mpp_audit": slide_tables.mpp_audit(data),
        "risk_groups": risk_groups(data),
        "comparisons": against_clinical(data),
        "run_times": run_times(data),
        "expert_use": expert_use(data),
        "sources": cohort_tables.sources(data),
        "gene_groups": cohort_tables.gene_groups(data),
        "sites": cohort_tables.sites(data),
        "published_protocol": optimistic.table(data),
    }
