"""The shape that every format of outcomes is brought into, and the columns read on the way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from morphome.cohort.barcode import site_of
from morphome.cohort.slide_sheet import few_names
from morphome.cohort.values import DAYS_PER_MONTH, convert, event_of, is_missing, number, stage_of, status_of
from morphome.errors import MorphomeError, MorphomeWarning

COVARIATES = ("age_years", "sex", "stage", "grade")
#: Columns that only serve on the way from a source to the cohort; no manifest has them.
ON_THE_WAY = ("redacted", "why", "records")
DIAGNOSIS = "initial pathological diagnosis"
#: Cohorts whose tumours were mostly sampled long after time zero.
LATE_SAMPLES = {"SKCM": "most samples of SKCM are metastases, taken after that day: patients had to live until then"}
#: Times beyond this, given as months, are days; a longest time below this, given as days, may be months.
_MOST_MONTHS, _LEAST_DAYS = 600, 200
_PROJECT_PREFIX = "TCGA-"
#: How the cells of an event column are read, and what the remedy of :func:`events` says of it.
_READINGS: dict[str, tuple[Callable[[object], float], str]] = {
    "numbers": (event_of, "TRUE/FALSE are read as well"),
    "vital": (partial(event_of, vital=True), "TRUE/FALSE, Dead/Alive and 1:DECEASED/0:LIVING are read as well"),
    "status": (status_of, "with the words of cBioPortal behind the number, as 1:DECEASED and 0:LIVING"),
}


@dataclass
class ClinicalTable:
    """Patients of one source before any is dropped.

    Attributes:
        table: one row per patient, sorted by ``patient_id``: ``site`` (the institution where it is known, else the
            code in the barcode), ``time_months`` (NaN when missing, may be <= 0), ``event`` (0, 1, NaN),
            ``age_years``, ``sex``, ``stage``, ``grade``, ``histology``, ``redacted`` (bool), ``why`` (why event or
            time is missing; may be empty), ``records`` (int64, rows of the source that were joined into this patient).
        slides: ``slide_id``, ``patient_id`` where the source lists slides, else None.
        notes: counts for the reader (words of stage and grade that gave no number ...), ``time_zero`` among them.
    """

    table: pd.DataFrame
    slides: pd.DataFrame | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def n_records(self) -> int:
        """Rows of the source, before rows of one patient were joined."""
        return int(self.table["records"].sum())


def shape(ids: pd.Series, **columns: Any) -> pd.DataFrame:
    """The common shape; columns that a format lacks are missing values."""
    ids = ids.astype(object).map(lambda cell: str(cell).strip())
    empty: dict[str, Any] = {
        "site": [site_of(patient) for patient in ids],
        **dict.fromkeys(("time_months", "event", "age_years", "stage", "grade"), np.nan),
        **dict.fromkeys(("sex", "histology"), None),
        "redacted": False,
        "why": "",
        "records": np.int64(1),
    }
    table = pd.DataFrame({"patient_id": ids, **empty, **columns})
    for name in ("site", "sex", "histology"):
        cells = [None if cell is None or cell != cell else cell for cell in table[name]]
        table[name] = pd.Series(cells, dtype=object, index=table.index)
    return table


def numbers(table: pd.DataFrame, name: str, path: Path, ids: str) -> pd.Series:
    """Column as float64; a word that is neither a number nor a missing word is an error naming the patient."""
    remedy = "correct the cell, or leave it empty when the value is missing"
    return _read(table, name, path, ids, number, "a number", remedy)


def events(
    table: pd.DataFrame,
    name: str,
    path: Path,
    ids: str,
    code: str = "1 = happened, 0 = censored",
    reading: str = "numbers",
) -> pd.Series:
    """Column of 0, 1 and NaN; anything else is an error whose remedy is ``code``.

    Args:
        reading: ``numbers`` (:func:`event_of`), ``vital`` (words of the vital status too) or ``status``
            (:func:`status_of`).
    """
    rule, more = _READINGS[reading]
    return _read(table, name, path, ids, rule, "0 or 1", f"code as {code}; {more}")


def _read(
    table: pd.DataFrame, name: str, path: Path, ids: str, rule: Callable[[object], float], wanted: str, remedy: str
) -> pd.Series:
    """Every cell of a column by ``rule``; one that it refuses is an error naming the file, column and patient."""
    values = np.full(len(table), np.nan)
    for row, cell in enumerate(table[name]):
        try:
            values[row] = rule(cell)
        except ValueError:
            raise MorphomeError(
                f"{path}: '{cell}' in column '{name}' (patient {table[ids].iloc[row]}) is not {wanted}", remedy
            ) from None
    return pd.Series(values, index=table.index)


def why_missing(table: pd.DataFrame, *names: str) -> list[str]:
    """Per row the first of ``names`` (event, then time) that has no value, and what stands there instead."""
    why = [""] * len(table)
    for name in reversed(names):
        for row, cell in enumerate(table[name]):
            if is_missing(cell):
                said = "" if cell is None or cell != cell else str(cell).strip()
                why[row] = f"{name} is {said}" if said else f"{name} is empty"
    return why


def months(times: pd.Series, time_unit: str, path: Path, notes: dict[str, Any]) -> pd.Series:
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


def stages(*columns: pd.Series) -> tuple[pd.Series, dict[str, int]]:
    """First column that gives a number; words of the first column that gave none are counted."""
    stage, lost = convert(columns[0], stage_of)
    for other in columns[1:]:
        stage = stage.fillna(convert(other, stage_of)[0])
    return stage, lost


def time_zero(types: Iterable[str], start: str = DIAGNOSIS) -> str:
    """What day the time runs from, with a remark on cohorts in which that day is long before the sample."""
    remarks = [LATE_SAMPLES[name] for name in sorted(set(types) & set(LATE_SAMPLES))]
    return "; ".join([start, *remarks])


def keep_types(
    raw: pd.DataFrame, column: str | None, types: Sequence[str] | None, path: Path, format_name: str
) -> tuple[pd.DataFrame, set[str], dict[str, Any]]:
    """Rows of the cancer types that are asked for ("HNSC"; "TCGA-HNSC" is the same).

    Args:
        raw: rows as read.
        column: where the type stands; None when the table does not say it.
        types: None keeps all rows.

    Returns:
        The rows, the types found in them, and notes (which types, how many rows of others).

    Raises:
        MorphomeError: no such column, or a type that does not occur (with those that do).
    """
    if column is None:
        if types is None:
            return raw, set(), {}
        raise MorphomeError(
            f"{path}: the table does not say of which cancer type a patient is (cohort.clinical.types, {format_name})",
            "remove cohort.clinical.types, or take a table that names the type, as TCGA-CDR does",
        )
    found = raw[column].map(_type_of)
    if types is None:
        return raw, set(found) - {""}, {}
    wanted = [_type_of(name) for name in types]
    if absent := [name for name in wanted if name not in set(found)]:
        raise MorphomeError(
            f"{path}: nobody of type '{absent[0]}' in column '{column}' (cohort.clinical.types); there are: "
            + few_names(sorted(set(found) - {""}), 40),
            "correct cohort.clinical.types",
        )
    kept = found.isin(wanted)
    notes = {"types": sorted(set(wanted)), "rows_of_other_types": int((~kept).sum())}
    return raw[kept].reset_index(drop=True), set(wanted), notes


def _type_of(cell: object) -> str:
    plain = "" if is_missing(cell) else str(cell).strip().upper()
    return plain.removeprefix(_PROJECT_PREFIX)


def require_columns(raw: pd.DataFrame, needed: Sequence[str], path: Path, format_name: str, remedy: str) -> None:
    """Refuse a table without one of the columns, naming it."""
    if missing := [name for name in needed if name not in raw]:
        raise MorphomeError(f"{path}: no column '{missing[0]}' ({format_name})", remedy)


def first_of(names: Mapping[str, Sequence[str]], raw: pd.DataFrame) -> dict[str, str | None]:
    """For each key the first of its possible column names that the table has."""
    return {key: next((name for name in choices if name in raw), None) for key, choices in names.items()}
