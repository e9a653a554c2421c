"""Outcomes of a cBioPortal study: its table of patients, with what its table of samples adds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from morphome.cohort.clinical_shape import (
    ClinicalTable,
    events,
    first_of,
    keep_types,
    numbers,
    shape,
    stages,
    time_zero,
    why_missing,
)
from morphome.cohort.institutions import sites
from morphome.cohort.tables import header_of, read_bytes, read_facts
from morphome.cohort.values import convert, grade_of, is_missing, sex_of, word_of
from morphome.errors import MorphomeError

#: Our name of an end point and the portal's, in the order of preference.
_ENDPOINTS = {"OS": ("OS",), "DSS": ("DSS",), "DFI": ("DFI", "DFS"), "PFI": ("PFI", "PFS")}
_COLUMNS = {
    "age": ("AGE", "AGE_AT_DIAGNOSIS", "DIAGNOSIS_AGE"),
    "sex": ("SEX", "GENDER"),
    "stage": ("AJCC_PATHOLOGIC_TUMOR_STAGE", "TUMOR_STAGE", "STAGE", "CLINICAL_STAGE"),
    "grade": ("GRADE", "TUMOR_GRADE", "HISTOLOGICAL_GRADE", "NEOPLASM_HISTOLOGIC_GRADE"),
    "histology": ("ONCOTREE_CODE", "HISTOLOGICAL_DIAGNOSIS", "CANCER_TYPE_DETAILED"),
    "site_name": ("TISSUE_SOURCE_SITE",),
    "type": ("CANCER_TYPE_ACRONYM",),
}
_ID, _SAMPLE = "PATIENT_ID", "SAMPLE_ID"
_PARTS = {
    "PATIENT_ATTRIBUTES": ("data_clinical_patient.txt", "data_clinical_patients.txt"),
    "SAMPLE_ATTRIBUTES": ("data_clinical_sample.txt", "data_clinical_samples.txt"),
}
_REMEDY = "name the folder of a cBioPortal study, or its data_clinical_patient.txt"


@dataclass(frozen=True)
class _Part:
    """One clinical file: its cells as text, and what the lines above the header say of each column."""

    table: pd.DataFrame
    words: dict[str, str]


def read_cbioportal(path: Path, endpoint: str | None, types: Sequence[str] | None) -> ClinicalTable:
    """One row per patient; times are months as the study gives them, ``<X>_STATUS`` begins with 0 or 1.

    Columns that the table of patients lacks are looked up in the table of samples beside it. The samples of one
    patient must then agree, else the cell stays empty (they are other tumours).
    """
    patients_file = _find(path, "PATIENT_ATTRIBUTES") if path.is_dir() else path
    if patients_file is None:
        raise MorphomeError(f"{path}: no table of patients in the study (cbioportal)", _REMEDY)
    part = _read(patients_file)
    raw = part.table
    if _ID not in raw:
        raise MorphomeError(f"{patients_file}: no column '{_ID}' (cbioportal)", _REMEDY)
    notes: dict[str, Any] = {"rows": len(raw)}
    samples_file = _find(patients_file.parent, "SAMPLE_ATTRIBUTES")
    if samples_file is not None and samples_file != patients_file:
        raw = _with_samples(raw, _read(samples_file).table, samples_file, notes)
    names = first_of(_COLUMNS, raw)
    raw, found_types, of_types = keep_types(raw, names["type"], types, patients_file, "cbioportal")
    columns: dict[str, Any] = {}
    start = "not stated"
    if endpoint:
        name = next((n for n in _ENDPOINTS[endpoint] if {f"{n}_STATUS", f"{n}_MONTHS"} <= set(raw)), None)
        if name is None:
            has = [
                n for n, words in _ENDPOINTS.items() if any({f"{w}_STATUS", f"{w}_MONTHS"} <= set(raw) for w in words)
            ]
            raise MorphomeError(
                f"{patients_file}: no columns '{_ENDPOINTS[endpoint][-1]}_STATUS' and '…_MONTHS' (cbioportal), but "
                f"cohort.endpoint is {endpoint}; the study has: {', '.join(has) or 'no end point'}",
                "choose another cohort.endpoint, or cohort.clinical.format tcga_cdr",
            )
        status, time = f"{name}_STATUS", f"{name}_MONTHS"
        columns["event"] = events(raw, status, patients_file, _ID, "1:… for an event and 0:… for none", "status")
        notes["end_point_columns"] = f"{endpoint} from {status} and {time}"
        columns["time_months"] = numbers(raw, time, patients_file, _ID)
        columns["why"] = why_missing(raw, status, time)
        said = part.words.get(time, "")
        start = f'as the study says of {time}: "{said}"' if said else start
    empty = pd.Series("", index=raw.index, dtype=object)

    def column(key: str) -> pd.Series:
        return raw[names[key]] if names[key] else empty

    if not endpoint and not any(names[key] for key in ("age", "sex", "stage", "grade")):
        raise MorphomeError(f"{path}: the study has no age, sex, stage or grade (cbioportal)", "take another table")
    stage, lost_stage = stages(column("stage"))
    grade, lost_grade = convert(column("grade"), grade_of)
    table = shape(
        raw[_ID],
        **columns,
        site=sites(raw[_ID], column("site_name")),
        age_years=numbers(raw, names["age"], patients_file, _ID) if names["age"] else np.nan,
        sex=column("sex").map(sex_of),
        stage=stage,
        grade=grade,
        histology=column("histology").map(word_of),
    )
    words = {"stage_words_without_number": lost_stage, "grade_words_without_number": lost_grade}
    return ClinicalTable(table, notes={**notes, **of_types, "time_zero": time_zero(found_types, start), **words})


def _find(folder: Path, datatype: str) -> Path | None:
    """The clinical file of a study: what a ``meta_*.txt`` of this datatype names, else the usual file name."""
    for meta in sorted(folder.glob("meta_*.txt")):
        said = read_facts(meta)
        if said.get("datatype") == datatype and said.get("data_filename"):
            # Only the last part: a study's files lie beside its meta files.
            file = folder / Path(said["data_filename"]).name
            if not file.exists():
                raise MorphomeError(
                    f"{meta}: names {file.name}, which is not there (cbioportal)", "copy the whole study"
                )
            return file
    return next((folder / name for name in _PARTS[datatype] if (folder / name).exists()), None)


def _read(path: Path) -> _Part:
    """A clinical file; four lines that begin with ``#`` tell names, descriptions, kinds and priorities of columns."""
    raw = read_bytes(path, "cbioportal")
    above: list[bytes] = []
    while raw.startswith(b"#") or raw.startswith(b"\xef\xbb\xbf#"):
        line, _, raw = raw.partition(b"\n")
        above.append(line)
    header, delimiter = header_of(raw, path, "cbioportal")
    try:
        table = pd.read_csv(io.BytesIO(raw), sep=delimiter, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, pd.errors.ParserError) as error:
        raise MorphomeError(f"{path}: cannot be read as a table: {error} (cbioportal)", _REMEDY) from None
    words: dict[str, str] = {}
    if len(above) > 1:
        cells = above[1].decode("utf-8", errors="replace").lstrip("\ufeff#").rstrip("\r").split(delimiter)
        words = {name: cell.strip() for name, cell in zip(header, cells, strict=False)}
    return _Part(table.rename(columns=str.strip).astype(object), words)


def _with_samples(people: pd.DataFrame, samples: pd.DataFrame, path: Path, notes: dict[str, Any]) -> pd.DataFrame:
    """``people`` with the columns of ``samples`` that it lacks, joined by patient."""
    if _ID not in samples:
        raise MorphomeError(f"{path}: no column '{_ID}' (cbioportal)", _REMEDY)
    known = {name for names in _COLUMNS.values() for name in names}
    more = [name for name in samples if name in known and name not in people]
    per_patient = samples.groupby(_ID)[_ID].size()
    notes["samples"] = len(samples)
    notes["patients_with_several_samples"] = int((per_patient > 1).sum())
    if not more:
        return people
    cells = samples[[_ID, *more]].map(lambda cell: None if is_missing(cell) else cell).groupby(_ID)
    first = cells.first().where(cells.nunique().le(1), None)
    notes["sample_cells_that_differ"] = {n: int(c) for n, c in cells.nunique().gt(1).sum().items() if c}
    joined = first.reindex(people[_ID])
    return people.assign(**{name: joined[name].to_numpy(object) for name in more})
