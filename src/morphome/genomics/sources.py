"""Molecular tables by format: which reader serves which panel."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from morphome.cohort.barcode import TUMOUR_CODES
from morphome.errors import MorphomeError, MorphomeWarning
from morphome.genomics.cbioportal import read_cbioportal
from morphome.genomics.consequences import consequences
from morphome.genomics.gdc_files import (
    STAR_VALUES,
    choose_files,
    read_gene_level,
    read_star_counts,
    rule_for_files,
)
from morphome.genomics.maf import read_mafs, read_one_maf
from morphome.genomics.matrix import AS_GIVEN, RULES, is_log, is_zscore
from morphome.genomics.own_tables import read_csv_panel, read_porpoise_panel
from morphome.genomics.panel import Panel, tidy
from morphome.genomics.xena import read_xena

#: Formats that every panel can have; the others hold one kind of value only.
_OPEN = ("csv", "xena", "cbioportal")
#: Values of RNA above this, without a word that they are logarithms, are amounts (2 to the 1000 is no amount).
_MOST_LOG = 1000.0
#: Formats whose files the GDC sample sheet names.
_BY_SHEET = ("star_counts", "maf", "gdc_gene_level")
FORMATS = {
    "rna": ("star_counts", "porpoise", *_OPEN),
    "mut": ("maf", "porpoise", *_OPEN),
    "cnv": ("gdc_gene_level", "porpoise", *_OPEN),
    "expression": ("star_counts", *_OPEN),
}


def read_panel(panel: str, table: Mapping[str, Any], sheet: Path | None, codes: Sequence[str] = TUMOUR_CODES) -> Panel:
    """A molecular table of any format, sorted by patient and gene.

    Args:
        panel: ``rna``, ``mut``, ``cnv`` or ``expression``.
        table: ``{"format", "path"[, "workflow", "values", "consequences", "file", "unit", "probemap"]}`` of the
            configuration; each format reads the keys that it knows. ``log2`` (rna) takes log2(x + 1).
        sheet: ``molecular.sheet``, the GDC sample sheet, where the format needs it.
        codes: ``cohort.sample_types``, preferred first.

    Raises:
        MorphomeError: naming the file or the key: a format that does not hold this panel, a bad file, or values that
            no encoder of RNA can read (``expression``).
    """
    setting, format_name, path = f"molecular.{panel}", table["format"], Path(table["path"])
    if format_name not in FORMATS[panel]:
        held = [name for name, formats in FORMATS.items() if format_name in formats]
        raise MorphomeError(
            f"{setting}.format: {format_name} files hold {', '.join(held) or 'no panel'}, not {panel}",
            f"one of {', '.join(FORMATS[panel])}" + (f", or move the entry to molecular.{held[0]}" if held else ""),
        )
    by_sheet = format_name in _BY_SHEET and sheet is not None
    if not path.exists() and not by_sheet:
        raise MorphomeError(f"{path}: not found ({setting}.path)", f"check {setting}.path")
    found = _read(panel, table, sheet, codes, setting)
    found.notes.setdefault("left_out", {})
    found = tidy(found, setting)
    path = path / found.notes["file"] if path.is_dir() and "file" in found.notes else path
    if panel == "expression":
        _check_amounts(found, path, setting)
    if table.get("log2"):
        _take_log2(found, path, setting)
    elif panel == "rna" and format_name in _OPEN:
        _warn_of_amounts(found, path, setting)
    return found


def _read(panel: str, table: Mapping[str, Any], sheet: Path | None, codes: Sequence[str], setting: str) -> Panel:
    format_name, path, unit, log2 = table["format"], Path(table["path"]), table.get("unit"), bool(table.get("log2"))
    rule = consequences(table.get("consequences"))
    if format_name == "porpoise":
        return read_porpoise_panel(path, panel, setting)
    if format_name == "csv":
        return read_csv_panel(path, setting, unit)
    if format_name == "cbioportal":
        file = table.get("file")
        return read_cbioportal(path, panel, setting, file=file, unit=unit, log2=log2, rule=rule, codes=codes)
    if format_name == "xena":
        probemap = Path(table["probemap"]) if table.get("probemap") else None
        return read_xena(path, panel, setting, unit=unit, log2=log2, probemap=probemap, rule=rule, codes=codes)
    if format_name == "maf" and path.is_file():
        return read_one_maf(path, rule, codes)
    values = table.get("values") or ("counts" if panel == "expression" else "log2_tpm")
    if values not in STAR_VALUES:
        raise MorphomeError(f"{setting}.values: '{values}' is not known", f"one of {', '.join(STAR_VALUES)}")
    if path.is_file():  # it need not exist: the sheet's Local Path may name files elsewhere
        raise MorphomeError(
            f"{path}: not a folder ({setting}.path)", f"format {format_name} reads a folder of GDC files"
        )
    coded, left_out = choose_files(format_name, path, sheet, setting, table.get("workflow"), codes)
    files = {patient: file for patient, (file, _) in coded.items()}
    if format_name == "star_counts":
        found = read_star_counts(files, values)
    elif format_name == "maf":
        found = read_mafs(files, rule, {patient: code for patient, (_, code) in coded.items()})
    else:
        found = read_gene_level(files)
    found.notes |= {"left_out": left_out, "rule_for_samples": rule_for_files(codes)}
    return found


def _check_amounts(panel: Panel, path: Path, setting: str) -> None:
    """Refuse values that are no amounts: encoders of RNA take counts or TPM, never logarithms or z-scores.

    Raises:
        MorphomeError: naming the file and the first cell below zero, or the unit.
    """
    remedy = "give counts or TPM (format star_counts does), or use the table as molecular.rna"
    if panel.unit == AS_GIVEN:
        raise MorphomeError(
            f"{path}: the table does not say what its values are, and {setting}.unit is not set",
            f'set {setting}.unit to what they are, "counts" or "TPM"; encoders of RNA take no logarithms or z-scores',
        )
    if not _linear(panel):
        raise MorphomeError(f"{path}: values in {panel.unit} are no counts or TPM ({setting})", remedy)
    _refuse_negative(panel, path, setting, remedy)


def _take_log2(panel: Panel, path: Path, setting: str) -> None:
    """log2(x + 1) of values on a linear scale, in place; symbols that occurred twice are summed by now.

    Raises:
        MorphomeError: z-scores, logarithms already, or a value below zero.
    """
    remedy = f"remove {setting}.log2"
    if not _linear(panel):
        raise MorphomeError(f"{path}: {setting}.log2 is set, but the values are in {panel.unit} already", remedy)
    _refuse_negative(panel, path, f"{setting}.log2", remedy)
    panel.values = np.log2(panel.values + np.float32(1.0))
    unit = "x" if panel.unit == AS_GIVEN else panel.unit.rstrip(". ")
    panel.value_type, panel.unit = "log2_plus_1", f"log2({unit} + 1)"
    panel.notes["rule_for_values"] = f"log2(x + 1) of the table's values ({setting}.log2)"
    if "rule_for_symbols" in panel.notes:
        panel.notes["rule_for_symbols"] = RULES["sum_log2"]


def _warn_of_amounts(panel: Panel, path: Path, setting: str) -> None:
    """Warn when values of RNA look like amounts on a linear scale: few genes then outweigh all others."""
    if not _linear(panel) or not (panel.values > _MOST_LOG).any():
        return
    largest = float(np.nanmax(panel.values))
    unit = "no unit stated" if panel.unit == AS_GIVEN else panel.unit
    text = f"{path}: values up to {largest:g} ({unit}) look like amounts on a linear scale"
    warnings.warn(MorphomeWarning(f"{text}; set {setting}.log2 to true to read log2(x + 1)"), stacklevel=3)


def _linear(panel: Panel) -> bool:
    """False for values whose unit or type says that they are logarithms or z-scores."""
    return not (panel.value_type == "zscore" or is_log(panel.unit) or is_zscore(panel.unit))


def _refuse_negative(panel: Panel, path: Path, setting: str, remedy: str) -> None:
    below = np.argwhere(panel.values < 0)
    if below.size:
        row, column = (int(place) for place in below[0])
        raise MorphomeError(
            f"{path}: {len(below)} values are negative, as {panel.values[row, column]:g} of {panel.genes[column]} for "
            f"patient {panel.patients[row]}; z-scores or logarithms? ({setting})",
            remedy,
        )
