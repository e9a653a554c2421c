"""Tables of the cohort behind the page: where its tables come from, gene groups, and what every hospital gave."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import pandas as pd

from morphome.cohort.barcode import try_barcode
from morphome.report import words
from morphome.report.inputs import ReportData

#: Where neither a table nor a barcode tells the site.
NO_SITE = "not known"
_SOURCE_COLUMNS = (
    *("table", "kind", "source", "format", "data_release", "files", "bytes", "patients", "patients_analysed", "genes"),
    *("value_type", "unit", "rules", "left_out", "notes"),
)
_SOURCE_COUNTS = ("files", "bytes", "patients", "patients_analysed", "genes")
_GROUP_COLUMNS = (
    *("group", "kept", "asked", "matched_genes", "columns", "columns_rna", "columns_mut", "columns_cnv"),
    *("n_unmatched", "unmatched", "n_not_symbols", "not_symbols", "n_repeated", "reason"),
)
_SITE_COLUMNS = (
    *("site", "site_codes", "patients_listed", "patients_analysed", "events", "patients_left_out", "patient_reasons"),
    *("slides_listed", "slides_used", "slides_left_out", "slide_reasons"),
)


def sources(data: ReportData) -> pd.DataFrame:
    """One row per table that the cohort is made of, and one per kind of file that was asked of the GDC.

    ``kind`` is ``cohort``, ``panel`` or ``gdc``; rules, what was left out and notes are texts.
    """
    analysed = set(data.patients["patient_id"].astype(str))
    rows = [_cohort_source(given) for given in data.sources]
    for name, facts in data.panels.items():
        notes = dict(facts.get("notes") or {})
        left_out = {str(k): v for k, v in (notes.pop("left_out", None) or {}).items() if v}
        kept = rules(notes)
        notes = {key: value for key, value in notes.items() if key not in kept}
        rows.append(
            {
                "table": name,
                "kind": "panel",
                "source": str(facts.get("source") or ""),
                "format": str(facts.get("format") or _configured(data, name).get("format") or ""),
                "files": facts.get("n_files"),
                "patients": len(facts["patients"]),
                "patients_analysed": len(analysed.intersection(facts["patients"])),
                "genes": facts["n_genes"],
                "value_type": str(facts.get("value_type") or ""),
                "unit": str(facts.get("unit") or ""),
                "rules": "; ".join(kept.values()),
                "left_out": words.counted(left_out, {}),
                "notes": "; ".join(words.held(notes)),
            }
        )
    table = pd.DataFrame([*rows, *_asked_of_gdc(data.query or {})], columns=list(_SOURCE_COLUMNS))
    texts = [name for name in table if name not in _SOURCE_COUNTS]
    table[texts] = table[texts].astype(object).where(table[texts].notna(), "")
    return table.astype(dict.fromkeys(_SOURCE_COUNTS, "Int64"))


def rules(notes: Mapping[str, Any]) -> dict[str, str]:
    """The notes of a molecular table that are rules for its reader, as texts: the one for samples first."""
    asked = [key for key in notes if (key.startswith("rule_for_") or key == "rounded") and notes[key]]
    asked.sort(key=lambda key: (key != "rule_for_samples", key))
    return {key: words.rule(key, notes[key]) for key in asked}


def _configured(data: ReportData, panel: str) -> Mapping[str, Any]:
    return (data.config.get("molecular") or {}).get(panel) or {}


def _cohort_source(given: Any) -> dict[str, Any]:
    """A source of the cohort's flow: a table of outcomes, of covariates or of slides."""
    if not isinstance(given, Mapping):
        return {"table": "source", "kind": "cohort", "source": str(given)}
    rest = {k: v for k, v in given.items() if k not in {"role", "path", "format", "patients"}}
    patients = given.get("patients")
    if not isinstance(patients, int) and patients:
        rest["patients"] = patients
    return {
        "table": str(given.get("role") or "source"),
        "kind": "cohort",
        "source": str(given.get("path") or ""),
        "format": str(given.get("format") or ""),
        "patients": patients if isinstance(patients, int) else None,
        "notes": "; ".join(words.held(rest)),
    }


def _asked_of_gdc(query: Mapping[str, Any]) -> list[dict[str, Any]]:
    release = str(query.get("data_release") or "")
    by_kind, overall = left_out_of_query(query)
    rows = []
    for kind, counts in (query.get("kinds") or {}).items():
        here = counts.get("here")
        rows.append(
            {
                "table": str(kind),
                "kind": "gdc",
                "source": "Genomic Data Commons",
                "data_release": release,
                "files": counts.get("files"),
                "bytes": counts.get("bytes"),
                "left_out": words.counted(by_kind.get(str(kind), {}), {}),
                "notes": f"{here} files were on disk already" if here else "",
            }
        )
    if overall:
        told = words.counted(overall, {})
        rows.append({"table": "all kinds", "kind": "gdc", "data_release": release, "left_out": told})
    return rows


def left_out_of_query(query: Mapping[str, Any]) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Files that the query left out, by kind and reason, and those that it does not part by kind."""
    by_kind, overall = {}, {}
    for key, value in (query.get("left_out") or {}).items():
        if isinstance(value, Mapping):
            by_kind[str(key)] = {str(reason): n for reason, n in value.items() if n}
        elif value:
            overall[str(key)] = value
    return by_kind, overall


def gene_groups(data: ReportData) -> pd.DataFrame:
    """One row per gene group in the order of the file: what it asks for, what it got, and whether it is used.

    Lists of names hold the first ones only (the counts are whole); columns per panel are missing in files of an older
    version.
    """
    content = data.groups or {}
    dropped = content.get("dropped") or {}
    repeated = content.get("repeated") or {}
    match = dict(content.get("match") or {})
    rows = []
    for name in [*match, *(name for name in dropped if name not in match)]:
        facts = match.get(name) or {}
        panels = facts.get("panels") or {}
        rows.append(
            {
                "group": name,
                "kept": name not in dropped,
                **{key: facts.get(key) for key in ("asked", "matched_genes", "columns", "n_unmatched")},
                **{f"columns_{panel}": panels.get(panel, 0 if panels else None) for panel in ("rna", "mut", "cnv")},
                "unmatched": ";".join(facts.get("unmatched") or []),
                "n_not_symbols": facts.get("n_not_symbols"),
                "not_symbols": ";".join(facts.get("not_symbols") or []),
                "n_repeated": repeated.get(name, 0),
                "reason": dropped.get(name, ""),
            }
        )
    table = pd.DataFrame(rows, columns=list(_GROUP_COLUMNS))
    counts = [c for c in table if c.startswith(("n_", "columns", "asked", "matched"))]
    return table.astype(dict.fromkeys(counts, "Int64"))


def sites(data: ReportData) -> pd.DataFrame:
    """What every hospital (tissue source site) gave: patients, events and slides, used and left out, with reasons.

    A patient who was left out before the cohort's table was written has no row in it. Its site is then that of the
    other patients with the same site code in their barcodes, else the code itself.
    """
    known = _site_by_patient(data)
    of_code = _site_by_code(known)

    def site(patient: str) -> str:
        code = _code(patient)
        return known.get(patient) or of_code.get(code, code) or NO_SITE

    people = data.patients
    analysed = people["patient_id"].astype(str).tolist()
    events = set(people.loc[people["event"].astype(bool), "patient_id"].astype(str))
    lost = {p: why for p, why in _patients_left_out(data).items() if p not in set(analysed)}
    rows: dict[str, dict[str, Any]] = defaultdict(
        lambda: {"codes": set(), "analysed": 0, "events": 0, "why": Counter(), "used": 0, "lost": Counter()}
    )
    for patient in [*analysed, *lost]:
        row = rows[site(patient)]
        row["codes"] |= {_code(patient)} - {""}
        if patient in lost:
            row["why"][lost[patient]] += 1
        else:
            row["analysed"] += 1
            row["events"] += patient in events
    for patient, reason in _slides(data):
        row = rows[site(patient)]
        row["codes"] |= {_code(patient)} - {""}
        if reason:
            row["lost"][reason] += 1
        else:
            row["used"] += 1
    table = pd.DataFrame(
        [
            {
                "site": name,
                "site_codes": ";".join(sorted(row["codes"])),
                "patients_listed": row["analysed"] + row["why"].total(),
                "patients_analysed": row["analysed"],
                "events": row["events"],
                "patients_left_out": row["why"].total(),
                "patient_reasons": words.counted(row["why"], {}),
                "slides_listed": row["used"] + row["lost"].total(),
                "slides_used": row["used"],
                "slides_left_out": row["lost"].total(),
                "slide_reasons": words.counted(row["lost"], {}),
            }
            for name, row in rows.items()
        ],
        columns=list(_SITE_COLUMNS),
    )
    order = ["patients_analysed", "patients_listed", "site"]
    return table.sort_values(order, ascending=[False, False, True], kind="stable").reset_index(drop=True)


def _code(patient: str) -> str:
    barcode = try_barcode(patient)
    return barcode.site if barcode else ""


def _site_by_patient(data: ReportData) -> dict[str, str]:
    tables = [table for table in (data.everybody, data.patients) if table is not None]
    return {
        str(p): str(s) for t in tables for p, s in zip(t["patient_id"], t["site"], strict=True) if pd.notna(s) and s
    }


def _site_by_code(known: Mapping[str, str]) -> dict[str, str]:
    """Site by code, for codes whose patients all have the same one."""
    found: dict[str, set[str]] = defaultdict(set)
    for patient, site in known.items():
        found[_code(patient)].add(site)
    return {code: next(iter(names)) for code, names in found.items() if code and len(names) == 1}


def _patients_left_out(data: ReportData) -> dict[str, str]:
    """First reason for which the flow left a patient out; joined records leave nobody out."""
    reasons: dict[str, str] = {}
    for step in data.flow:
        if step.get("unit", "patients") == "patients":
            for patient in step.get("excluded", []):
                reasons.setdefault(str(patient), brief_reason(step))
    return reasons


def brief_reason(step: Mapping[str, Any]) -> str:
    """The reason of a step without what it says in brackets; the step's name where it gives none."""
    return _brief(str(step.get("reason") or "")) or str(step["name"])


def _brief(text: str) -> str:
    """``no slide (cohort.require lists 'wsi')`` becomes ``no slide``."""
    return re.split("[;:]", re.sub(r"\s*\([^()]*\)", "", text), maxsplit=1)[0].strip()


def _slides(data: ReportData) -> list[tuple[str, str]]:
    """``(patient, reason)`` of every slide that is known; no reason for those with features of analysed patients."""
    analysed = set(data.patients["patient_id"].astype(str))
    gave, lost = set(), {}
    if "status" in data.audit:
        fine = data.audit["status"].astype(str) == "ok"
        gave = set(data.audit.loc[fine, "slide_id"].astype(str))
        codes = data.audit.get("reason_code", pd.Series("", index=data.audit.index)).fillna("").astype(str)
        lost = {str(s): c for s, c in zip(data.audit.loc[~fine, "slide_id"], codes[~fine], strict=True)}

    def reason(slide: str, patient: str, given: str = "") -> str:
        if given:
            return _brief(given)
        if slide not in gave:
            code = lost.get(slide) or "no features"
            return words.CODES.get(code, code.replace("_", " "))
        return "" if patient in analysed else "patient left out"

    if data.listed is None:
        return [(patient, reason(slide, patient)) for slide, (patient, _) in data.places.items()]
    return [
        (str(row.patient_id), reason(str(row.slide_id), str(row.patient_id), _given(row)))
        for row in data.listed.itertuples()
    ]


def _given(row: Any) -> str:
    """Why the cohort left a slide out; empty for one that it took."""
    return "" if row.included else str(row.reason or "") or "not chosen"
