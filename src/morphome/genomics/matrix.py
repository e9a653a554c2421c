"""Matrices of genes and samples as cBioPortal and UCSC Xena publish them: cells, units, symbols that occur twice."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from morphome.cohort.slide_sheet import check_utf8, few_names
from morphome.errors import MorphomeError
from morphome.genomics.reading import body_of, header_line

#: Words for "not measured".
_MISSING = ["", "NA", "N/A", "NaN", "nan", "null", "None", "[Not Available]", "[Not Applicable]"]
_LOG2 = re.compile(r"log2\((.+)\+([0-9.]+)\)")
#: "log2(TPM + 1)", "ln(x)", "log10", "log1p", "log-ratio"; no word that merely holds these letters.
_ANY_LOG = re.compile(r"(?<![a-z])(?:log|ln(?![a-z]))", re.IGNORECASE)
_ZSCORE = re.compile(r"(?<![a-z])z[-_ ]?scores?(?![a-z])", re.IGNORECASE)
#: Unit of a table that does not say any.
AS_GIVEN = "as given"
#: What published z-scores are, for the reader: the test folds have a part in them.
RULE_ZSCORE = "z-scores as published, standardised over all patients of the source table, test folds included"
_UNITS = {
    "log2(tpm+1)": "log2_tpm_plus_1",
    "tpm": "tpm",
    "transcriptspermillion": "tpm",
    "count": "counts",
    "counts": "counts",
    "reads": "counts",
    "z-score": "zscore",
    "zscore": "zscore",
    "copynumber": "copy_number",
    "totalcopies": "copy_number",
    "gistic": "gistic",
}
#: How values of genes that share a symbol become one, in words.
RULES = {
    "sum": "values of genes that share a symbol are summed",
    "sum_log2": "values of genes that share a symbol are summed before the logarithm",
    "average": "values of genes that share a symbol are averaged",
    "max": "a symbol is mutated when one of its rows is",
}


def value_type_of(unit: str) -> str:
    """Value type that a unit says; ``as_given`` for units that are not known."""
    return _UNITS.get(re.sub(r"\s", "", unit).lower(), "as_given")


def is_log(unit: str) -> bool:
    """True for a unit that names a logarithm (log, log2, log10, log1p, ln), in any case."""
    return _ANY_LOG.search(unit) is not None


def is_zscore(unit: str) -> bool:
    """True for a unit that names z-scores."""
    return _ZSCORE.search(unit) is not None


def are_amounts(panel: str, value_type: str, unit: str, values: np.ndarray, log2: bool = False) -> bool:
    """True when values of RNA are amounts on a linear scale, which add up; the same for ``rna`` and ``expression``.

    A unit must say what they are, or ``log2`` that they are linear; values below zero are no amounts.
    """
    if panel not in ("rna", "expression") or value_type == "zscore" or is_log(unit) or is_zscore(unit):
        return False
    return log2 or (unit != AS_GIVEN and not bool((values < 0).any()))


def merge_rule(value_type: str, unit: str, linear: bool = False) -> tuple[str, float]:
    """Rule for symbols that occur twice (a key of :data:`RULES`), and the offset in log2(x + offset).

    Args:
        linear: the values are known to be non-negative amounts that add up (:func:`are_amounts`).
    """
    if value_type == "binary":
        return "max", 0.0
    if linear or value_type in ("tpm", "counts"):
        return "sum", 0.0
    match = _LOG2.fullmatch(re.sub(r"\s", "", unit).lower())
    return ("sum_log2", float(match.group(2))) if match else ("average", 0.0)


def merge_symbols(
    symbols: np.ndarray, values: np.ndarray, rule: str, offset: float = 0.0
) -> tuple[list[str], np.ndarray, int]:
    """One column per symbol.

    Args:
        symbols: (rows,) text.
        values: (rows, samples); NaN = not measured.
        rule: a key of :data:`RULES`; only measured values enter.
        offset: of ``sum_log2``.

    Returns:
        Sorted symbols; float32 (samples, symbols); number of symbols that occurred more than once.
    """
    genes, first, order, counts = np.unique(symbols, return_index=True, return_inverse=True, return_counts=True)
    merged = np.ascontiguousarray(values[first].T, dtype=np.float32)
    rows = np.argsort(order, kind="stable")
    ends = np.cumsum(counts)
    for place in np.flatnonzero(counts > 1):
        block = values[rows[ends[place] - counts[place] : ends[place]]].astype(np.float64)
        there = ~np.isnan(block)
        if rule == "max":
            found = np.where(there, block, -np.inf).max(axis=0)
        elif rule == "sum_log2":
            total = np.where(there, np.exp2(block) - offset, 0.0).sum(axis=0)
            # An offset written with few digits leaves a sum a hair below zero.
            found = np.log2(np.maximum(total, 0.0) + offset) if offset > 0 else np.log2(total)
        else:
            found = np.where(there, block, 0.0).sum(axis=0)
            if rule == "average":
                found = found / np.maximum(there.sum(axis=0), 1)
        merged[:, place] = np.where(there.any(axis=0), found, np.nan)
    return genes.tolist(), merged, int((counts > 1).sum())


def clean_symbols(names: Sequence[str]) -> tuple[np.ndarray, int, int]:
    """Symbols cut at a bar (``ERCC5|aaa``, ``SLC35E2|728661``); "?" and the like become empty.

    Returns:
        Symbols; how many were cut; how many are empty.
    """
    cut = [name.partition("|")[0].strip() for name in names]
    clean = np.array(["" if name in ("?", "NA", "nan", "---") else name for name in cut], dtype=object)
    return clean, sum("|" in name for name in names), int((clean == "").sum())


class Matrix:
    """A tab separated matrix with names in its first columns and numbers in the others.

    Attributes:
        header: names of all columns.
    """

    def __init__(self, path: Path, setting: str, comments: bool = True) -> None:
        """Read the text and its header; ``comments`` as for :func:`morphome.genomics.reading.body_of`.

        Raises:
            MorphomeError: naming the file: missing, damaged, not UTF-8, empty, a column named twice, or cut short.
        """
        self.path, self.setting = path, setting
        self._body = body_of(path, setting, comments)
        check_utf8(self._body, path, setting)
        self.header = [name.strip().strip('"') for name in header_line(self._body)]
        if not self._body.strip():
            raise MorphomeError(f"{path}: the table is empty ({setting})", f"check {setting}")
        seen: set[str] = set()
        for name in self.header:
            if name and name in seen:
                raise MorphomeError(f"{path}: the column '{name}' occurs twice ({setting})", "keep one of them")
            seen.add(name)
        last = self._body.rstrip(b"\r\n").rsplit(b"\n", 1)[-1]
        cells = last.count(b"\t") + 1
        if cells != len(self.header):
            raise MorphomeError(
                f"{path}: the last line has {cells} cells, the header {len(self.header)} ({setting})",
                "the file is cut short or no tab separated matrix: download it again",
            )

    def names(self, column: int) -> list[str]:
        """Cells of one column, as text."""
        table = self._read([column], {"dtype": str, "keep_default_na": False})
        return [cell.strip().strip('"') for cell in table.iloc[:, 0]]

    def numbers(self, columns: Sequence[int], labels: Sequence[str]) -> np.ndarray:
        """float32 (rows, columns) of the columns at these places, in their order; NaN = not measured.

        Args:
            labels: the rows' names, for messages.

        Raises:
            MorphomeError: naming the file and the first cell that is no number.
        """
        reading = {"na_values": _MISSING, "keep_default_na": False}
        try:
            table = self._read(columns, {**reading, "dtype": np.float32})
        except ValueError:
            text = self._read(columns, {**reading, "dtype": str})
            for place in columns:
                cells = text[place]
                bad = pd.to_numeric(cells, errors="coerce").isna() & cells.notna()
                if bad.any():
                    row = int(np.flatnonzero(bad)[0])
                    raise MorphomeError(
                        f"{self.path}: '{few_names([cells.iloc[row]])}' in row '{labels[row]}', column "
                        f"'{self.header[place]}' is not a number ({self.setting})",
                        "leave a cell empty, or write NA, when it was not measured",
                    ) from None
            raise
        return table[list(columns)].to_numpy(np.float32)

    def _read(self, columns: Sequence[int], reading: dict[str, object]) -> pd.DataFrame:
        """Columns named by their places."""
        try:
            return pd.read_csv(
                io.BytesIO(self._body),
                sep="\t",
                header=None,
                skiprows=1,
                names=range(len(self.header)),
                usecols=list(columns),
                index_col=False,
                quoting=csv.QUOTE_NONE,
                **reading,
            )
        except pd.errors.ParserError as error:
            raise MorphomeError(
                f"{self.path}: cannot be read as a table: {error} ({self.setting})", "check the file"
            ) from None
