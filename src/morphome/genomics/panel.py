"""A molecular table in memory: patients x genes, with what its values are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from morphome.errors import MorphomeError


@dataclass
class Panel:
    """One kind of measurement of every patient.

    Attributes:
        patients: ids, unique.
        genes: symbols, unique.
        values: float32 (patients, genes); NaN = not measured.
        value_type: ``log2_tpm_plus_1``, ``log2_plus_1``, ``tpm``, ``counts``, ``zscore``, ``binary``, ``gistic``,
            ``log2_ratio``, ``copy_number`` or ``as_given``.
        unit: for a reader.
        gene_ids: symbol to Ensembl ids (joined by ";"), where the source has them.
        n_files: files read.
        notes: counts and rules for the reader.
    """

    patients: list[str]
    genes: list[str]
    values: np.ndarray
    value_type: str
    unit: str
    gene_ids: dict[str, str] = field(default_factory=dict)
    n_files: int = 1
    notes: dict[str, Any] = field(default_factory=dict)


def sum_repeats(values: np.ndarray, order: np.ndarray, size: int) -> np.ndarray:
    """Sum of ``values`` (n,) over equal places ``order`` (n,) -> float64 (size,)."""
    return np.bincount(order, weights=values, minlength=size)


def average_repeats(values: np.ndarray, order: np.ndarray, size: int) -> np.ndarray:
    """Mean of the values that are not NaN per place; NaN where there is none -> float64 (size,)."""
    there = ~np.isnan(values)
    count = np.bincount(order[there], minlength=size)
    total = np.bincount(order[there], weights=values[there], minlength=size)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def tidy(panel: Panel, setting: str) -> Panel:
    """Patients and genes sorted; genes and patients without any value dropped, with their number in the notes.

    Which cells are empty is all that this looks at: nothing is fitted.

    Raises:
        MorphomeError: an infinite value, or nothing left.
    """
    if np.isinf(panel.values).any():
        row, column = (int(place[0]) for place in np.nonzero(np.isinf(panel.values)))
        raise MorphomeError(
            f"{setting}: the value of {panel.genes[column]} for patient {panel.patients[row]} is infinite",
            "correct the table; leave a cell empty when it was not measured",
        )
    measured = ~np.isnan(panel.values)
    genes = measured.any(axis=0)
    patients = measured.any(axis=1) if panel.genes else np.ones(len(panel.patients), bool)
    if not panel.patients or not genes.any():
        raise MorphomeError(f"{setting}: no gene with a value in the table", f"check {setting}.path")
    rows = np.array(sorted(np.flatnonzero(patients), key=lambda number: panel.patients[number]), dtype=np.int64)
    columns = np.array(sorted(np.flatnonzero(genes), key=lambda number: panel.genes[number]), dtype=np.int64)
    kept = [panel.genes[number] for number in columns]
    notes = {
        **panel.notes,
        "genes_without_value": int((~genes).sum()),
        "patients_without_value": [panel.patients[number] for number in np.flatnonzero(~patients)],
    }
    return Panel(
        [panel.patients[number] for number in rows],
        kept,
        np.ascontiguousarray(panel.values[np.ix_(rows, columns)]),
        panel.value_type,
        panel.unit,
        {gene: panel.gene_ids[gene] for gene in kept if gene in panel.gene_ids},
        panel.n_files,
        notes,
    )
