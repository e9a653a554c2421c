"""Outcomes and clinical covariates from the formats people have, in one shape.

| format | one row is | time | end points |
|---|---|---|---|
| ``gdc_clinical`` | case x treatment (clinical.tsv of the GDC portal) | days | OS |
| ``tcga_cdr`` | patient (Liu et al., Cell 2018;173:400, Table S1) | days | OS, DSS, DFI, PFI |
| ``porpoise`` | slide (tables of MCAT and PORPOISE) | months | OS |
| ``csv`` | patient (own table) | ``cohort.time_unit`` | as the user says |

Everywhere ``event = 1`` means that the end point happened, and months are days / 30.4375.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from morphome.cohort.barcode import site_of
from morphome.cohort.slide_sheet import few_names
from morphome.cohort.tables import one_row_per_patient, read_porpoise, read_text_table
from morphome.cohort.values import (
    DAYS_PER_MONTH,
    DAYS_PER_YEAR,
    convert,
    event_of,
    grade_of,
    is_missing,
    not_understood,
    number,
    sex_of,
    stage_of,
    word_of,
)
from morphome.errors import MorphomeError, MorphomeWarning

COVARIATES = ("age_years", "sex", "stage", "grade")
#: Times beyond this, given as months, are days; a longest time below this, given as days, may be months.
_MOST_MONTHS, _LEAST_DAYS = 600, 200
_CDR_SHEET = "TCGA-CDR"
_CDR_COLUMNS = (
    *("bcr_patient_barcode", "age_at_initial_pathologic_diagnosis", "gender", "ajcc_pathologic_tumor_stage"),
    *("clinical_stage", "histological_type", "histological_grade", "Redaction"),
)
#: Column names of the portal's clinical.tsv, older and newer releases; the first that exists is read.
_GDC_COLUMNS = {
    "patient_id": ("case_submitter_id", "cases.submitter_id"),
    "vital": ("vital_status", "demographic.vital_status"),
    "death": ("days_to_death", "demographic.days_to_death"),
    "contact": ("days_to_last_follow_up", "diagnoses.days_to_last_follow_up"),
    "visit": ("follow_ups.days_to_follow_up", "days_to_follow_up"),
    "age_days": ("age_at_diagnosis", "diagnoses.age_at_diagnosis"),
    "age": ("age_at_index", "demographic.age_at_index"),
    "sex": ("sex_at_birth", "demographic.sex_at_birth", "gender", "demographic.gender"),
    "stage_pathologic": ("ajcc_pathologic_stage", "diagnoses.ajcc_pathologic_stage"),
    "stage_figo": ("figo_stage", "diagnoses.figo_stage"),
    "stage_clinical": ("ajcc_clinical_stage", "diagnoses.ajcc_clinical_stage"),
    "grade": ("tumor_grade", "diagnoses.tumor_grade"),
    "grade_cns": ("who_cns_grade", "diagnoses.who_cns_grade"),
    "histology": ("primary_diagnosis", "diagnoses.primary_diagnosis"),
    "primary": ("diagnosis_is_primary_disease", "diagnoses.diagnosis_is_primary_disease"),
}


@dataclass
class ClinicalTable:
    """Patients of one source before any is dropped.

    Attributes:
        table: one row per patient, sorted by ``patient_id``: ``site``, ``time_months`` (NaN when missing, may be
            <= 0), ``event`` (0, 1, NaN), ``age_years``, ``sex``, ``stage``, ``grade``, ``histology``,
            ``redacted`` (bool), ``why`` (why time or event is missing; may be empty).
        slides: ``slide_id``, ``patient_id`` where the source lists slides, else None.
        notes: counts for the reader (words of stage and grade that gave no number ...).
    """

    table: pd.DataFrame
    slides: pd.DataFrame | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def read_clinical(
    format_name: str, path: Path, *, endpoint: str = "OS", time_unit: str = "months", outcome: bool = True
) -> ClinicalTable:
    """Read patients of any format into one shape; nobody is dropped here (see :func:`drop_unusable`).

    Args:
        format_name: ``gdc_clinical``, ``tcga_cdr``, ``porpoise`` or ``csv``.
        endpoint: ``OS``, ``DSS``, ``DFI`` or ``PFI``.
        time_unit: unit of the time column of a csv table, ``days`` or ``months``.
        outcome: False reads covariates only; time and event are then NaN and need not exist.

    Raises:
        MorphomeError: naming the file and the column, row or patient; or an end point the format does not have.
    """
    path = Path(path)
    if outcome and endpoint != "OS" and format_name in ("gdc_clinical", "porpoise"):
        raise MorphomeError(
            f"{path}: format {format_name} holds overall survival only, but cohort.endpoint is {endpoint}",
            "take cohort.clinical.format tcga_cdr (TCGA-CDR has OS, DSS, DFI and PFI), or cohort.endpoint OS",
        )
    if format_name == "tcga_cdr":
        found = _read_cdr(path, endpoint if outcome else None)
    elif format_name == "gdc_clinical":
        found = _read_gdc(path)
    elif format_name == "porpoise":
        found = _read_porpoise(path)
    else:
        found = _read_csv(path, endpoint, time_unit, outcome)
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


def _frame(ids: pd.Series, **columns: Any) -> pd.DataFrame:
    """The common shape; columns that a format lacks are missing values."""
    ids = ids.astype(object).map(lambda cell: str(cell).strip())
    empty: dict[str, Any] = {
        "site": [site_of(patient) for patient in ids],
        **dict.fromkeys(("time_months", "event", "age_years", "stage", "grade"), np.nan),
        **dict.fromkeys(("sex", "histology"), None),
        "redacted": False,
        "why": "",
    }
    table = pd.DataFrame({"patient_id": ids, **empty, **columns})
    for name in ("sex", "histology"):
        table[name] = pd.Series([None if is_missing(c) else c for c in table[name]], dtype=object, index=table.index)
    return table


def _numbers(table: pd.DataFrame, name: str, path: Path, ids: str) -> pd.Series:
    """Column as float64; a word that is neither a number nor a missing word is an error naming the patient."""
    values = np.full(len(table), np.nan)
    for row, cell in enumerate(table[name]):
        try:
            values[row] = number(cell)
        except ValueError:
            raise MorphomeError(
                f"{path}: '{cell}' in column '{name}' (patient {table[ids].iloc[row]}) is not a number",
                "correct the cell, or leave it empty when the value is missing",
            ) from None
    return pd.Series(values, index=table.index)


def _events(
    table: pd.DataFrame, name: str, path: Path, ids: str, code: str = "1 = happened, 0 = censored", vital: bool = False
) -> pd.Series:
    """Column of 0, 1 and NaN (see :func:`event_of`); anything else is an error whose remedy is ``code``."""
    values = np.full(len(table), np.nan)
    for row, cell in enumerate(table[name]):
        try:
            values[row] = event_of(cell, vital)
        except ValueError:
            more = "; TRUE/FALSE" + (", Dead/Alive and 1:DECEASED/0:LIVING" if vital else "") + " are read as well"
            raise MorphomeError(
                f"{path}: '{cell}' in column '{name}' (patient {table[ids].iloc[row]}) is not 0 or 1",
                f"code as {code}{more}",
            ) from None
    return pd.Series(values, index=table.index)


def _months(times: pd.Series, time_unit: str, path: Path, notes: dict[str, Any]) -> pd.Series:
    """Times of an own table in months, after a look at whether they can have the unit that they are said to have."""
    longest = times.max()
    if time_unit == "months":
        if longest > _MOST_MONTHS:
            raise MorphomeError(
                f"{path}: the largest time is {longest:g}, which would be {longest / 12:.0f} years: "
                "cohort.time_unit is months",
                "set cohort.time_unit to days, or correct the column 'time'",
            )
        return times
    if longest < _LEAST_DAYS:
        notes["time_unit"] = f"the largest time is {longest:g} days; are these months?"
        text = f"{path}: cohort.time_unit is days, but the largest time is {longest:g}"
        warnings.warn(MorphomeWarning(f"{text}; if these are months, set cohort.time_unit to months"), stacklevel=4)
    return times / DAYS_PER_MONTH


def _stages(*columns: pd.Series) -> tuple[pd.Series, dict[str, int]]:
    """First column that gives a number; words of the first column that gave none are counted."""
    stage, lost = convert(columns[0], stage_of)
    for other in columns[1:]:
        stage = stage.fillna(convert(other, stage_of)[0])
    return stage, lost


def _read_cdr(path: Path, endpoint: str | None) -> ClinicalTable:
    wanted = [*_CDR_COLUMNS, *([endpoint, f"{endpoint}.time"] if endpoint else [])]
    if path.suffix.lower() in (".xlsx", ".xls"):
        try:
            raw = pd.read_excel(path, sheet_name=_CDR_SHEET, dtype=object, keep_default_na=False)
        except FileNotFoundError:
            raise MorphomeError(f"{path}: file not found (tcga_cdr)", "check the path") from None
        except (ValueError, OSError, KeyError) as error:
            raise MorphomeError(
                f"{path}: cannot be read as TCGA-CDR: {error}",
                f"take TCGA-CDR-SupplementalTableS1.xlsx with its sheet '{_CDR_SHEET}'",
            ) from None
    else:
        raw = read_text_table(path, "tcga_cdr", set(wanted))
    if missing := [name for name in wanted if name not in raw]:
        raise MorphomeError(
            f"{path}: no column '{missing[0]}' (tcga_cdr)",
            f"take TCGA-CDR-SupplementalTableS1.xlsx with its sheet '{_CDR_SHEET}'",
        )
    ids = "bcr_patient_barcode"
    stage, lost_stage = _stages(raw["ajcc_pathologic_tumor_stage"], raw["clinical_stage"])
    grade, lost_grade = convert(raw["histological_grade"], grade_of)
    columns: dict[str, Any] = {}
    if endpoint:
        columns["event"] = _events(raw, endpoint, path, ids)
        columns["time_months"] = _numbers(raw, f"{endpoint}.time", path, ids) / DAYS_PER_MONTH
    table = _frame(
        raw[ids],
        **columns,
        age_years=_numbers(raw, "age_at_initial_pathologic_diagnosis", path, ids),
        sex=raw["gender"].map(sex_of),
        stage=stage,
        grade=grade,
        histology=raw["histological_type"].map(word_of),
        redacted=[str(cell).strip().lower() == "redacted" for cell in raw["Redaction"]],
    )
    notes = {"stage_words_without_number": lost_stage, "grade_words_without_number": lost_grade}
    return ClinicalTable(table, notes=notes)


def _read_gdc(path: Path) -> ClinicalTable:
    known = {name for names in _GDC_COLUMNS.values() for name in names}
    raw = read_text_table(path, "gdc_clinical", known)
    names = {key: next((n for n in choices if n in raw), None) for key, choices in _GDC_COLUMNS.items()}
    for key in ("patient_id", "vital", "death", "contact"):
        if names[key] is None:
            raise MorphomeError(
                f"{path}: no column {' or '.join(_GDC_COLUMNS[key])} (gdc_clinical)",
                "take clinical.tsv as the GDC portal exports it ('Clinical' button of the cohort, TSV)",
            )
    rows = pd.DataFrame({key: raw[name] if name else "" for key, name in names.items()}, dtype=object)
    if (no_id := rows["patient_id"].map(is_missing)).any():
        line = int(np.flatnonzero(no_id)[0]) + 2
        raise MorphomeError(f"{path}, line {line}: no patient id", "fill the id or remove the row")
    for key in ("death", "contact", "visit", "age_days", "age"):
        rows[key] = _numbers(rows.rename(columns={key: names[key] or key}), names[key] or key, path, "patient_id")
    # A case has one row per treatment and per diagnosis; the primary diagnosis goes first where it is marked.
    rows["second"] = ~rows["primary"].str.lower().isin(["true", "yes", "1"])
    rows = rows.sort_values("second", kind="stable")
    rows = rows.map(lambda cell: None if is_missing(cell) else cell)
    grouped = rows.groupby("patient_id", sort=True)
    clash = grouped[["vital", "death"]].nunique().gt(1).any(axis=1)
    if clash.any():
        raise MorphomeError(
            f"{path}: rows of patient {clash.index[clash.to_numpy()][0]} differ in vital status or days to death",
            "export the table again, or remove the wrong row",
        )
    first = grouped.first()  # first value that is not missing, per column
    latest = grouped[["contact", "visit"]].max().astype(float).max(axis=1)
    vital = first["vital"].map(lambda word: str(word).strip().lower())
    dead, alive = vital == "dead", vital == "alive"
    days = first["death"].astype(float).where(dead, latest.where(alive))
    age = (first["age_days"].astype(float) / DAYS_PER_YEAR).fillna(first["age"].astype(float))
    stage, lost_stage = _stages(first["stage_pathologic"], first["stage_figo"], first["stage_clinical"])
    grade, lost_grade = convert(first["grade"], grade_of)
    table = _frame(
        first.index.to_series(),
        time_months=days / DAYS_PER_MONTH,
        event=pd.Series(np.select([dead, alive], [1.0, 0.0], np.nan), index=first.index),
        age_years=age,
        sex=first["sex"].map(sex_of),
        stage=stage,
        grade=grade.fillna(convert(first["grade_cns"], grade_of)[0]),
        histology=first["histology"].map(word_of),
        why=np.select(
            [~(dead | alive), dead & days.isna(), alive & days.isna()],
            ["vital status neither alive nor dead", "dead without days to death", "alive without follow-up"],
            "",
        ),
    )
    words = {"stage_words_without_number": lost_stage, "grade_words_without_number": lost_grade}
    notes = {"rows": len(rows), **words}
    return ClinicalTable(table.reset_index(drop=True), notes=notes)


def _read_porpoise(path: Path) -> ClinicalTable:
    rows = read_porpoise(path, "porpoise")
    people = one_row_per_patient(rows, path)
    nothing = pd.Series([""] * len(people), dtype=object)
    women = people.assign(is_female=people.get("is_female", nothing))
    women = _events(women, "is_female", path, "case_id", "1 = female, 0 = male")
    censored = _events(people, "censorship", path, "case_id", "1 = censored, 0 = happened")
    table = _frame(
        people["case_id"],
        time_months=_numbers(people, "survival_months", path, "case_id"),
        event=1.0 - censored,
        age_years=_numbers(people.assign(age=people.get("age", nothing)), "age", path, "case_id"),
        sex=women.map({1.0: "female", 0.0: "male"}),
        histology=people.get("oncotree_code", nothing).map(word_of),
    )
    slides = rows[["slide_id", "case_id"]].rename(columns={"case_id": "patient_id"})
    return ClinicalTable(table, slides=slides.astype(object), notes={"rows": len(rows)})


def _read_csv(path: Path, endpoint: str, time_unit: str, outcome: bool) -> ClinicalTable:
    raw = read_text_table(path, "csv")
    needed = ["patient_id", *(["time", "event"] if outcome else [])]
    if missing := [name for name in needed if name not in raw]:
        raise MorphomeError(
            f"{path}: no column '{missing[0]}' (csv); found: {few_names(raw.columns)}",
            "an own table has the columns patient_id, time, event and, if known, age, sex, stage, grade, site",
        )
    if not outcome and not {"age", "sex", "stage", "grade"} & set(raw):
        raise MorphomeError(f"{path}: none of the columns age, sex, stage, grade (csv)", "add at least one of them")
    columns: dict[str, Any] = {}
    notes: dict[str, Any] = {"rows": len(raw)}
    if outcome:
        columns["time_months"] = _months(_numbers(raw, "time", path, "patient_id"), time_unit, path, notes)
        columns["event"] = _events(raw, "event", path, "patient_id", vital=endpoint == "OS")
    if "age" in raw:
        columns["age_years"] = _numbers(raw, "age", path, "patient_id")
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
    table = _frame(raw["patient_id"], **columns)
    if "site" in raw:
        table["site"] = [word_of(cell) or fallback for cell, fallback in zip(raw["site"], table["site"], strict=True)]
    return ClinicalTable(table, notes=notes)


def source_note(role: str, table: Mapping[str, Any], found: ClinicalTable) -> dict[str, Any]:
    """What the flow says about a clinical source: role, format, path, patients, counts."""
    return {"role": role, **table, "patients": len(found.table), **found.notes}
