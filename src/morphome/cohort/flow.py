"""Who stays and who goes on the way from the clinical table to the cohort, each step counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from morphome.cohort.clinical import COVARIATES, ClinicalTable


def drop_unusable(clinical: ClinicalTable) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Patients with a usable outcome, and every reason for leaving someone out as one step of the flow.

    Order: redacted, no event status, no time, time not above zero (Liu et al. 2018 for the first).

    Returns:
        table with int64 ``event`` and finite positive ``time_months``; steps ``{"name", "unit", "before",
        "after", "excluded", "reason"}``.
    """
    table = clinical.table
    steps = [flow_step("listed in the clinical table", "patients", len(table), [], "")]
    rules = [
        ("not redacted", table["redacted"], "redacted by TCGA"),
        ("with event status", table["event"].isna(), "event status missing"),
        ("with follow-up time", table["time_months"].isna(), "time missing"),
        ("with time above zero", ~(table["time_months"] > 0), "time zero or negative"),
    ]
    for name, bad, reason in rules:
        bad = bad.loc[table.index]
        lost = table[bad]
        why = sorted(set(lost["why"]) - {""}) if reason.endswith("missing") else []
        text = reason + (f" ({'; '.join(why)})" if why else "")
        steps.append(flow_step(name, "patients", len(table), lost["patient_id"].tolist(), text))
        table = table[~bad]
    table = table.drop(columns=["redacted", "why"]).reset_index(drop=True)
    return table.astype({"event": np.int64}), steps


def fill_covariates(patients: pd.DataFrame, covariates: ClinicalTable) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Age, sex, stage and grade of ``covariates`` put over those of ``patients``, joined by ``patient_id``.

    A value of the second table wins, a missing one leaves what was there; nobody is dropped. The same holds for its
    ``site``: a table that names each patient's institution joins the several site codes that one hospital may have.

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
    site = second["site"].to_numpy(object)
    given = ~pd.isna(site) & (site != "unknown") & (site != patients["site"].to_numpy(object))
    out["site"] = np.where(given, site, patients["site"].to_numpy(object))
    notes["sites_given"] = int(given.sum())
    return out, notes


def flow_step(name: str, unit: str, before: int, excluded: list[str], reason: str) -> dict[str, Any]:
    """One step of the cohort's flow; ``excluded`` ids are sorted."""
    lost = sorted(excluded)
    after = before - len(lost)
    return {"name": name, "unit": unit, "before": before, "after": after, "excluded": lost, "reason": reason}
