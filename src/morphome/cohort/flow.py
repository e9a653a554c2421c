"""Who stays and who goes on the way from the clinical table to the cohort, each step counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from morphome.cohort.barcode import site_of
from morphome.cohort.clinical_shape import COVARIATES, ON_THE_WAY, ClinicalTable


def drop_unusable(clinical: ClinicalTable) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Patients with a usable outcome, and every reason for leaving someone out as one step of the flow.

    Order: records of one patient joined (unit "records", only where the source has several; its ``excluded`` names a
    patient once per surplus row), then patients: redacted (Liu et al. 2018), no event status, no time, time
    below zero, time zero. A reason with several causes counts each of them.

    Returns:
        table with int64 ``event`` and finite positive ``time_months``; steps ``{"name", "unit", "before",
        "after", "excluded", "reason"}``.
    """
    table = clinical.table
    steps = []
    if clinical.n_records > len(table):
        surplus = table["patient_id"].repeat(table["records"] - 1).tolist()
        reason = "further rows of a patient who is listed already"
        steps.append(flow_step("records joined by patient", "records", clinical.n_records, surplus, reason))
    steps.append(flow_step("listed in the clinical table", "patients", len(table), [], ""))
    time = table["time_months"]
    rules = [
        ("not redacted", table["redacted"], "redacted by TCGA"),
        ("with event status", table["event"].isna(), "event status missing"),
        ("with follow-up time", time.isna(), "time missing"),
        ("with time not below zero", time < 0, "time negative"),
        ("with time above zero", time == 0, "time zero"),
    ]
    for name, bad, reason in rules:
        bad = bad.loc[table.index]
        lost = table[bad]
        text = reason + (_causes(lost["why"]) if reason.endswith("missing") else "")
        steps.append(flow_step(name, "patients", len(table), lost["patient_id"].tolist(), text))
        table = table[~bad]
    table = table.drop(columns=list(ON_THE_WAY)).reset_index(drop=True)
    return table.astype({"event": np.int64}), steps


def _causes(why: pd.Series) -> str:
    """``" (dead without days to death: 2; alive without follow-up: 1)"``, the commonest first; empty for no cause."""
    counts = Counter(cause for cause in why if cause)
    shown = [f"{cause}: {counts[cause]}" for cause in sorted(counts, key=lambda cause: (-counts[cause], cause))]
    return f" ({'; '.join(shown)})" if shown else ""


def fill_covariates(patients: pd.DataFrame, covariates: ClinicalTable) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Age, sex, stage and grade of ``covariates`` put over those of ``patients``, joined by ``patient_id``.

    A value of the second table wins, a missing one leaves what was there; nobody is dropped. The same holds for its
    ``site``: a table that names each patient's institution joins the several site codes that one hospital may have. A
    second table that knows no more than the code in the barcode leaves the site as it was.

    Returns:
        table; notes with ``matched``, ``unmatched`` (ids) and per column ``filled`` (was missing) and
        ``overridden`` (was another value); ages that differ by at most one year count as equal.
    """
    second = covariates.table.set_index("patient_id").reindex(patients["patient_id"])
    present = patients["patient_id"].isin(covariates.table["patient_id"])
    notes: dict[str, Any] = {
        "matched": int(present.sum()),
        "unmatched": patients.loc[~present, "patient_id"].tolist(),
        "redacted": patients.loc[second["redacted"].eq(True).to_numpy(), "patient_id"].tolist(),
        "columns": {},
    }
    out = patients.copy()
    for name in COVARIATES:
        new = second[name].to_numpy(object)
        old = patients[name].to_numpy(object)
        has_new, has_old = ~pd.isna(new), ~pd.isna(old)
        both = has_new & has_old
        differs = np.zeros(len(new), bool)
        if name == "age_years":
            differs[both] = np.abs(new[both].astype(float) - old[both].astype(float)) > 1.0
        else:
            differs[both] = new[both] != old[both]
        notes["columns"][name] = {
            "filled": int((has_new & ~has_old).sum()),
            "overridden": int(differs.sum()),
            "missing": int((~has_new & ~has_old).sum()),
        }
        merged = np.where(has_new, new, old)
        out[name] = (
            pd.Series(np.where(pd.isna(merged), None, merged), dtype=object, index=out.index)
            if name == "sex"
            else merged.astype(np.float64)
        )
    code = np.array([site_of(patient) for patient in patients["patient_id"]], object)
    site, old = second["site"].to_numpy(object), patients["site"].to_numpy(object)
    given = ~pd.isna(site) & (site != "unknown") & (site != code) & (site != old)
    out["site"] = np.where(given, site, old)
    notes["sites_given"] = int(given.sum())
    return out, notes


def flow_step(name: str, unit: str, before: int, excluded: list[str], reason: str) -> dict[str, Any]:
    """One step of the cohort's flow; ``excluded`` ids are sorted."""
    lost = sorted(excluded)
    after = before - len(lost)
    return {"name": name, "unit": unit, "before": before, "after": after, "excluded": lost, "reason": reason}
