"""Outcomes of ``clinical.tsv``, as the GDC portal exports it and as step ``manifest`` writes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from morphome.cohort.clinical_shape import ClinicalTable, first_of, keep_types, numbers, shape, stages, time_zero
from morphome.cohort.institutions import sites
from morphome.cohort.tables import read_text_table
from morphome.cohort.values import DAYS_PER_MONTH, DAYS_PER_YEAR, convert, grade_of, is_missing, sex_of, word_of
from morphome.errors import MorphomeError

#: Column names of older and newer releases; the first that exists is read.
_COLUMNS = {
    "patient_id": ("case_submitter_id", "cases.submitter_id"),
    "project": ("project_id", "project.project_id", "cases.project.project_id"),
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
    "classification": ("classification_of_tumor", "diagnoses.classification_of_tumor"),
    "site_name": ("tissue_source_site.name", "cases.tissue_source_site.name"),
}
_NEEDED = ("patient_id", "vital", "death", "contact")
#: What a diagnosis says of the tumour: taken from the primary one alone where a patient has one that is marked.
_OF_DIAGNOSIS = (
    *("age_days", "stage_pathologic", "stage_figo", "stage_clinical", "grade", "grade_cns"),
    "histology",
)
_NO_VISITS = (
    "the table has no column of follow-up visits (follow_ups.days_to_follow_up); the time of the living ends at the "
    "last contact of their diagnoses, which may be earlier"
)
_TIME_ZERO = "the case's index date, for TCGA the initial pathological diagnosis"


def read_gdc(path: Path, types: Sequence[str] | None) -> ClinicalTable:
    """A case has one row per diagnosis, treatment and follow-up; they are joined by patient.

    Time is days to death of the dead, else the latest contact: the larger of the last follow-up of the diagnoses and
    of the visits, which releases of the GDC have moved to and fro.
    """
    raw = read_text_table(path, "gdc_clinical", {name for names in _COLUMNS.values() for name in names})
    names = first_of(_COLUMNS, raw)
    for key in _NEEDED:
        if names[key] is None:
            raise MorphomeError(
                f"{path}: no column {' or '.join(_COLUMNS[key])} (gdc_clinical)",
                "take clinical.tsv as the GDC portal exports it ('Clinical' button of the cohort, TSV)",
            )
    if (no_id := raw[names["patient_id"]].map(is_missing)).any():
        line = int(np.flatnonzero(no_id)[0]) + 2
        raise MorphomeError(f"{path}, line {line}: no patient id", "fill the id or remove the row")
    raw, found_types, notes = keep_types(raw, names["project"], types, path, "gdc_clinical")
    rows = pd.DataFrame({key: raw[name] if name else "" for key, name in names.items()}, dtype=object)
    for key in ("death", "contact", "visit", "age_days", "age"):
        rows[key] = numbers(rows.rename(columns={key: names[key] or key}), names[key] or key, path, "patient_id")
    rows = rows.map(lambda cell: None if is_missing(cell) else cell)
    patients = rows["patient_id"]
    primary = rows["primary"].map(lambda cell: str(cell).strip().lower() in ("true", "yes", "1"))
    # Diagnoses that came later than that flag, or without it, tell of which kind the tumour is.
    unmarked = ~primary.groupby(patients).transform("any")
    primary |= unmarked & (rows["classification"].map(lambda cell: str(cell).strip().lower()) == "primary")
    another = ~primary & primary.groupby(patients).transform("any")
    rows.loc[another, list(_OF_DIAGNOSIS)] = None

    grouped = rows.groupby("patient_id", sort=True)
    clash = grouped[["vital", "death"]].nunique().gt(1).any(axis=1)
    if clash.any():
        raise MorphomeError(
            f"{path}: rows of patient {clash.index[clash.to_numpy()][0]} differ in vital status or days to death",
            "export the table again, or remove the wrong row",
        )
    unlike = grouped[list(_OF_DIAGNOSIS)].nunique().gt(1).any(axis=1)
    first = grouped.first()  # first value that is not missing, per column
    latest = grouped[["contact", "visit"]].max().astype(float).max(axis=1)
    vital = first["vital"].map(lambda word: str(word).strip().lower())
    dead, alive = vital == "dead", vital == "alive"
    days = first["death"].astype(float).where(dead, latest.where(alive))
    age = (first["age_days"].astype(float) / DAYS_PER_YEAR).fillna(first["age"].astype(float))
    stage, lost_stage = stages(first["stage_pathologic"], first["stage_figo"], first["stage_clinical"])
    grade, lost_grade = convert(first["grade"], grade_of)
    table = shape(
        first.index.to_series(),
        time_months=days / DAYS_PER_MONTH,
        event=pd.Series(np.select([dead, alive], [1.0, 0.0], np.nan), index=first.index),
        site=sites(first.index, first["site_name"]),
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
        records=grouped.size(),
    )
    words = {"stage_words_without_number": lost_stage, "grade_words_without_number": lost_grade}
    notes["patients_with_unlike_diagnoses"] = int(unlike.sum())  # the first row's cell that says something counts
    if names["visit"] is None:
        notes["no_follow_up_column"] = _NO_VISITS
    notes = {"rows": len(rows), **notes, "time_zero": time_zero(found_types, _TIME_ZERO), **words}
    return ClinicalTable(table.reset_index(drop=True), notes=notes)
