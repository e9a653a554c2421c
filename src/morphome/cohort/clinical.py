"""Outcomes and clinical covariates from the formats people have, in one shape.

| format | one row is | time | end points |
|---|---|---|---|
| ``gdc_clinical`` | case x diagnosis x treatment (clinical.tsv of the GDC portal) | days | OS |
| ``tcga_cdr`` | patient (Liu et al., Cell 2018;173:400, Table S1) | days | OS, DSS, DFI, PFI |
| ``porpoise`` | slide (tables of MCAT, PORPOISE and SurvPath) | months | OS; DSS, PFI where the table has them |
| ``cbioportal`` | patient (folder of a study) | months | OS, DSS, DFI (DFS), PFI (PFS), what the study has |
| ``xena`` | sample (survival table of a Xena hub) | days | OS, DSS, DFI, PFI, what the table has |
| ``csv`` | patient (own table) | ``cohort.time_unit`` | as the user says |

Everywhere ``event = 1`` means that the end point happened. Days become months by / 30.4375; months that a source gives
are left as they are (PORPOISE's are of 30.44 days, SurvPath's of 30: the notes then say so).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from morphome.cohort.clinical_cbioportal import read_cbioportal
from morphome.cohort.clinical_cdr import read_cdr, read_xena
from morphome.cohort.clinical_gdc import read_gdc
from morphome.cohort.clinical_shape import (
    COVARIATES,
    ClinicalTable,
    events,
    keep_types,
    months,
    numbers,
    shape,
    time_zero,
    why_missing,
)
from morphome.cohort.institutions import sites
from morphome.cohort.slide_sheet import few_names
from morphome.cohort.tables import one_row_per_patient, read_porpoise, read_text_table
from morphome.cohort.values import convert, grade_of, is_missing, not_understood, sex_of, stage_of, word_of
from morphome.errors import MorphomeError, MorphomeWarning

__all__ = ["COVARIATES", "ClinicalTable", "read_clinical", "source_note"]

#: Time and censoring of each end point in tables of the PORPOISE shape; SurvPath's have all three.
_PORPOISE_ENDPOINTS = {
    "OS": ("survival_months", "censorship"),
    "DSS": ("survival_months_dss", "censorship_dss"),
    "PFI": ("survival_months_pfi", "censorship_pfi"),
}
_TAKE_CDR = "take cohort.clinical.format tcga_cdr (TCGA-CDR has OS, DSS, DFI and PFI), or cohort.endpoint OS"
#: Times of this many patients, all whole numbers of days in months of 30 days, are no accident (months with two
#: decimals are so for one patient in ten).
_FEWEST, _WHOLE_DAYS = 20, 0.01


def read_clinical(
    format_name: str,
    path: Path,
    *,
    endpoint: str = "OS",
    time_unit: str = "months",
    outcome: bool = True,
    types: Sequence[str] | None = None,
) -> ClinicalTable:
    """Read patients of any format into one shape; nobody is dropped here (see :func:`drop_unusable`).

    Args:
        format_name: ``gdc_clinical``, ``tcga_cdr``, ``porpoise``, ``cbioportal``, ``xena`` or ``csv``.
        path: file; of ``cbioportal`` the study's folder or its table of patients.
        endpoint: ``OS``, ``DSS``, ``DFI`` or ``PFI``.
        time_unit: unit of the time column of a csv table, ``days`` or ``months``.
        outcome: False reads covariates only; time and event are then NaN and need not exist.
        types: cancer types to keep ("HNSC"), others are not read any further; None keeps all.

    Raises:
        MorphomeError: naming the file and the column, row or patient; an end point that the format does not have; a
            type that does not occur.
    """
    path = Path(path)
    wanted = endpoint if outcome else None
    if wanted not in (None, "OS") and format_name == "gdc_clinical":
        raise MorphomeError(
            f"{path}: format {format_name} holds overall survival only, but cohort.endpoint is {endpoint}", _TAKE_CDR
        )
    if format_name == "tcga_cdr":
        found = read_cdr(path, wanted, types)
    elif format_name == "gdc_clinical":
        found = read_gdc(path, types)
    elif format_name == "porpoise":
        found = _read_porpoise(path, wanted, types)
    elif format_name == "cbioportal":
        found = read_cbioportal(path, wanted, types)
    elif format_name == "xena":
        found = read_xena(path, endpoint, types)
    else:
        found = _read_csv(path, endpoint, time_unit, outcome, types)
    table = found.table
    if table.empty:
        raise MorphomeError(f"{path}: no patients in the table (format {format_name})", "check the file")
    if (table["patient_id"] == "").any():
        raise MorphomeError(f"{path}: a row has no patient id", "fill the id or remove the row")
    repeated = table.loc[table["patient_id"].duplicated(), "patient_id"]
    if len(repeated):
        raise MorphomeError(
            f"{path}: patient {repeated.iloc[0]} occurs twice ({len(repeated)} repeated rows)",
            "keep one row per patient",
        )
    if not outcome:
        table["time_months"] = table["event"] = np.nan
        table["why"] = ""
        found.notes.pop("time_zero", None)
    _warn_of_words(path, found.notes)
    found.table = table.sort_values("patient_id").reset_index(drop=True)
    return found


def _warn_of_words(path: Path, notes: Mapping[str, Any]) -> None:
    """Warn of words of stage and grade that were not understood; all words without a number stay in the notes."""
    for name in ("stage", "grade"):
        lost = not_understood(notes.get(f"{name}_words_without_number", {}))
        if lost:
            words = sorted(lost, key=lambda word: (-lost[word], word))
            shown = few_names([f"'{word}' ({lost[word]})" for word in words])
            text = f"{path}: {sum(lost.values())} cells of {name} could not be read and count as missing: {shown}"
            warnings.warn(MorphomeWarning(f"{text}; write {name} as 1, 2, 3 or 4"), stacklevel=3)


def _read_porpoise(path: Path, endpoint: str | None, types: Sequence[str] | None) -> ClinicalTable:
    rows = read_porpoise(path, "porpoise")
    keep_types(rows, None, types, path, "porpoise")
    time, censorship = _PORPOISE_ENDPOINTS.get(endpoint or "OS", ("", ""))
    if time not in rows or censorship not in rows:
        has = [name for name, columns in _PORPOISE_ENDPOINTS.items() if set(columns) <= set(rows)]
        raise MorphomeError(
            f"{path}: this table (porpoise) has the end points {', '.join(has)}, but cohort.endpoint is {endpoint}",
            _TAKE_CDR,
        )
    people = one_row_per_patient(rows, path)
    nothing = pd.Series([""] * len(people), dtype=object)
    women = people.assign(is_female=people.get("is_female", nothing))
    women = events(women, "is_female", path, "case_id", "1 = female, 0 = male")
    censored = events(people, censorship, path, "case_id", "1 = censored, 0 = happened")
    times = numbers(people, time, path, "case_id")
    codes = people.get("oncotree_code", nothing)
    table = shape(
        people["case_id"],
        time_months=times,
        event=1.0 - censored,
        why=why_missing(people, censorship, time),
        age_years=numbers(people.assign(age=people.get("age", nothing)), "age", path, "case_id"),
        sex=women.map({1.0: "female", 0.0: "male"}),
        histology=codes.map(word_of),
        records=rows.groupby("case_id").size().reindex(people["case_id"]).to_numpy(),
    )
    notes = {"rows": len(rows), "time_zero": time_zero(codes.map(str))}
    days = (times * 30.0).dropna()
    if len(days) >= _FEWEST and (days - days.round()).abs().max() < _WHOLE_DAYS:
        notes["month_days"] = (
            "the table's months are of 30 days (every time is a whole number of them); times are left as they are, "
            "1.5 % longer than months of 30.4375 days"
        )
    slides = rows[["slide_id", "case_id"]].rename(columns={"case_id": "patient_id"})
    return ClinicalTable(table, slides=slides.astype(object), notes=notes)


def _read_csv(path: Path, endpoint: str, time_unit: str, outcome: bool, types: Sequence[str] | None) -> ClinicalTable:
    raw = read_text_table(path, "csv")
    needed = ["patient_id", *(["time", "event"] if outcome else [])]
    if missing := [name for name in needed if name not in raw]:
        raise MorphomeError(
            f"{path}: no column '{missing[0]}' (csv); found: {few_names(raw.columns)}",
            "an own table has the columns patient_id, time, event and, if known, age, sex, stage, grade, site, type",
        )
    if not outcome and not {"age", "sex", "stage", "grade"} & set(raw):
        raise MorphomeError(f"{path}: none of the columns age, sex, stage, grade (csv)", "add at least one of them")
    raw, _, of_types = keep_types(raw, "type" if "type" in raw else None, types, path, "csv")
    columns: dict[str, Any] = {}
    notes: dict[str, Any] = {"rows": len(raw), **of_types}
    if outcome:
        columns["time_months"] = months(numbers(raw, "time", path, "patient_id"), time_unit, path, notes)
        columns["event"] = events(raw, "event", path, "patient_id", reading="vital" if endpoint == "OS" else "numbers")
        columns["why"] = why_missing(raw, "event", "time")
        notes["time_zero"] = "as the own table has it"
    if "age" in raw:
        columns["age_years"] = numbers(raw, "age", path, "patient_id")
        odd = raw.loc[(columns["age_years"] < 0) | (columns["age_years"] > 120), "patient_id"]
        if len(odd):
            raise MorphomeError(f"{path}: age of patient {odd.iloc[0]} is not in 0-120", "give ages in years")
    if "sex" in raw:
        columns["sex"] = raw["sex"].map(sex_of)
        for word, sex in zip(raw["sex"], columns["sex"], strict=True):
            if sex is None and not is_missing(word):
                raise MorphomeError(f"{path}: '{word}' in column 'sex' is not known", "write female or male")
    for name, rule in (("stage", stage_of), ("grade", grade_of)):
        if name in raw:
            columns[name], notes[f"{name}_words_without_number"] = convert(raw[name], rule)
    if "histology" in raw:
        columns["histology"] = raw["histology"].map(word_of)
    if "institution" in raw:
        columns["site"] = sites(raw["patient_id"], raw["institution"])
    table = shape(raw["patient_id"], **columns)
    if "site" in raw:
        table["site"] = [word_of(cell) or fallback for cell, fallback in zip(raw["site"], table["site"], strict=True)]
    return ClinicalTable(table, notes=notes)


def source_note(role: str, table: Mapping[str, Any], found: ClinicalTable) -> dict[str, Any]:
    """What the flow says about a clinical source: role, format, path, patients, counts."""
    return {"role": role, **table, "patients": len(found.table), **found.notes}
