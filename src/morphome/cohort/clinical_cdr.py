"""Outcomes of TCGA-CDR (Liu et al., Cell 2018;173:400, Table S1), and of Xena, which hands it out by sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from morphome.cohort.barcode import site_of, try_barcode
from morphome.cohort.clinical_shape import (
    ClinicalTable,
    events,
    keep_types,
    numbers,
    require_columns,
    shape,
    stages,
    time_zero,
    why_missing,
)
from morphome.cohort.institutions import CDR_SITES_SHEET, institutions_of_sheet
from morphome.cohort.tables import read_text_table
from morphome.cohort.values import DAYS_PER_MONTH, convert, grade_of, is_missing, sex_of, word_of
from morphome.errors import MorphomeError

_SHEET = "TCGA-CDR"
_REMEDY = f"take TCGA-CDR-SupplementalTableS1.xlsx with its sheet '{_SHEET}'"
_IDS = "bcr_patient_barcode"
_AGE, _SEX = "age_at_initial_pathologic_diagnosis", "gender"
_STAGES = ("ajcc_pathologic_tumor_stage", "clinical_stage")
_GRADE, _HISTOLOGY, _REDACTION = "histological_grade", "histological_type", "Redaction"
_COVARIATE_COLUMNS = (_AGE, _SEX, *_STAGES, _HISTOLOGY, _GRADE)
_XENA_PATIENT, _XENA_SAMPLE, _XENA_TYPE = "_PATIENT", "sample", "cancer type abbreviation"


def read_cdr(path: Path, endpoint: str | None, types: Sequence[str] | None) -> ClinicalTable:
    """One row per patient. ``endpoint`` None reads covariates only.

    The institution of a patient is known from the sheet of sites that lies beside the table in the same file; a
    table saved as text has none, and the site is then the code of the barcode.
    """
    wanted = [_IDS, *_COVARIATE_COLUMNS, _REDACTION, *([endpoint, f"{endpoint}.time"] if endpoint else [])]
    places: dict[str, str] = {}
    if path.suffix.lower() in (".xlsx", ".xls"):
        raw, places = _read_book(path)
    else:
        raw = read_text_table(path, "tcga_cdr", {*wanted, "type"})
    require_columns(raw, wanted, path, "tcga_cdr", _REMEDY)
    raw, found_types, notes = keep_types(raw, "type" if "type" in raw else None, types, path, "tcga_cdr")
    found = _from_cdr_columns(raw, _IDS, path, endpoint, found_types, places)
    found.notes = {"rows": len(raw), **notes, **found.notes}
    if not places:
        found.notes["institutions"] = f"no sheet '{CDR_SITES_SHEET}': sites are the codes in the barcodes"
    return found


def read_xena(path: Path, endpoint: str, types: Sequence[str] | None) -> ClinicalTable:
    """One row per sample (``sample``, ``_PATIENT``, ``OS``, ``OS.time`` in days ...); a patient's rows must agree."""
    raw = read_text_table(path, "xena")
    if _XENA_PATIENT not in raw:
        require_columns(raw, [_XENA_SAMPLE], path, "xena", "take a survival table of a Xena hub")
        raw[_XENA_PATIENT] = [_patient_of(sample, path) for sample in raw[_XENA_SAMPLE]]
    time = f"{endpoint}.time"
    has = [name for name in ("OS", "DSS", "DFI", "PFI") if name in raw and f"{name}.time" in raw]
    require_columns(raw, [endpoint, time], path, "xena", f"this table has the end points {', '.join(has) or '-'}")
    raw, found_types, notes = keep_types(raw, _XENA_TYPE if _XENA_TYPE in raw else None, types, path, "xena")
    if raw[_XENA_PATIENT].map(is_missing).any():
        raise MorphomeError(f"{path}: a row has no patient id ({_XENA_PATIENT})", "fill the id or remove the row")
    grouped = raw.map(lambda cell: None if is_missing(cell) else cell).groupby(_XENA_PATIENT, sort=True)
    for name in (endpoint, time):
        # As numbers: 365 and 365.0 are one time.
        values = numbers(raw, name, path, _XENA_PATIENT) if name == time else events(raw, name, path, _XENA_PATIENT)
        clash = values.groupby(raw[_XENA_PATIENT]).nunique().gt(1)
        if clash.any():
            raise MorphomeError(
                f"{path}: samples of patient {clash.index[clash.to_numpy()][0]} differ in column '{name}'",
                "a patient has one outcome; correct or remove the row",
            )
    people = grouped.first().reset_index()
    for name in (*_COVARIATE_COLUMNS, _REDACTION):
        if name not in people:
            people[name] = ""
    found = _from_cdr_columns(people, _XENA_PATIENT, path, endpoint, found_types, {})
    found.table["records"] = grouped.size().to_numpy()
    found.notes = {"rows": len(raw), **notes, **found.notes}
    return found


def _patient_of(sample: object, path: Path) -> str:
    barcode = try_barcode(str(sample))
    if barcode is None:
        raise MorphomeError(
            f"{path}: '{sample}' in column '{_XENA_SAMPLE}' is no TCGA barcode and there is no column {_XENA_PATIENT}",
            f"add the column {_XENA_PATIENT} with the patient of every sample",
        )
    return barcode.patient


def _read_book(path: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """The table and, where the book has that sheet, the institution of every site code."""
    try:
        with pd.ExcelFile(path) as book:
            raw = pd.read_excel(book, sheet_name=_SHEET, dtype=object, keep_default_na=False)
            sites = None
            if CDR_SITES_SHEET in book.sheet_names:
                sites = pd.read_excel(book, CDR_SITES_SHEET, header=None, dtype=object, keep_default_na=False)
    except FileNotFoundError:
        raise MorphomeError(f"{path}: file not found (tcga_cdr)", "check the path") from None
    except (ValueError, OSError, KeyError) as error:
        raise MorphomeError(f"{path}: cannot be read as TCGA-CDR: {error}", _REMEDY) from None
    return raw, {} if sites is None else institutions_of_sheet(sites, path)


def _from_cdr_columns(
    raw: pd.DataFrame, ids: str, path: Path, endpoint: str | None, types: set[str], places: dict[str, str]
) -> ClinicalTable:
    stage, lost_stage = stages(*(raw[name] for name in _STAGES))
    grade, lost_grade = convert(raw[_GRADE], grade_of)
    columns: dict[str, Any] = {}
    if endpoint:
        columns["event"] = events(raw, endpoint, path, ids)
        columns["time_months"] = numbers(raw, f"{endpoint}.time", path, ids) / DAYS_PER_MONTH
        columns["why"] = why_missing(raw, endpoint, f"{endpoint}.time")
    table = shape(
        raw[ids],
        **columns,
        site=[places.get(code, code) for code in map(site_of, raw[ids].map(str))],
        age_years=numbers(raw, _AGE, path, ids),
        sex=raw[_SEX].map(sex_of),
        stage=stage,
        grade=grade,
        histology=raw[_HISTOLOGY].map(word_of),
        redacted=[str(cell).strip().lower() == "redacted" for cell in raw[_REDACTION]],
    )
    notes = {"stage_words_without_number": lost_stage, "grade_words_without_number": lost_grade}
    return ClinicalTable(table, notes={"time_zero": time_zero(types), **notes})
