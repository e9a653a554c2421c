"""Molecular tables by format: which reader serves which panel, and the readers of single tables."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from morphome.cohort.barcode import try_barcode
from morphome.cohort.slide_sheet import few_names
from morphome.cohort.tables import header_of, one_row_per_patient, read_bytes, read_porpoise
from morphome.errors import MorphomeError
from morphome.genomics.gdc_files import (
    choose_files,
    read_gene_level,
    read_mafs,
    read_one_maf,
    read_star_counts,
)
from morphome.genomics.panel import Panel, tidy

#: Formats that hold one kind of value only.
_PANEL_OF = {"star_counts": "rna", "maf": "mut", "gdc_gene_level": "cnv"}
#: Column endings and values of the PORPOISE tables.
_PORPOISE = {
    "rna": ("_rnaseq", "zscore", "z-score"),
    "cnv": ("_cnv", "gistic", "GISTIC level, -2 to 2"),
    "mut": ("_mut", "binary", "1 = mutated"),
}
#: First columns of tables with a row per gene.
_GENE_HEADERS = frozenset(
    {"gene", "genes", "gene_id", "gene_name", "gene_symbol", "symbol", "hugo_symbol", "geneid", "ensembl_id"}
)
#: Derived columns of the PORPOISE tables: no genes.
_NOT_GENES = {"mut": {"RAS"}}


def read_panel(panel: str, table: Mapping[str, Any], sheet: Path | None) -> Panel:
    """A molecular table of any format, sorted by patient and gene.

    Args:
        panel: ``rna``, ``mut`` or ``cnv``.
        table: ``{"format", "path"[, "workflow"]}`` of the configuration.
        sheet: ``molecular.sheet``, the GDC sample sheet, where the format needs it.

    Raises:
        MorphomeError: naming the file or the key: a format that does not hold this panel, or a bad file.
    """
    setting, format_name, path = f"molecular.{panel}", table["format"], Path(table["path"])
    if _PANEL_OF.get(format_name, panel) != panel:
        raise MorphomeError(
            f"{setting}.format: {format_name} files hold {_PANEL_OF[format_name]}, not {panel}",
            f"move the entry to molecular.{_PANEL_OF[format_name]}, or choose another format",
        )
    if not path.exists():
        raise MorphomeError(f"{path}: not found ({setting}.path)", f"check {setting}.path")
    if format_name == "porpoise":
        found = _read_porpoise_panel(path, panel, setting)
    elif format_name == "csv":
        found = _read_csv_panel(path, setting)
    elif format_name == "maf" and path.is_file():
        found = read_one_maf(path)
    else:
        if not path.is_dir():
            raise MorphomeError(
                f"{path}: not a folder ({setting}.path)", f"format {format_name} reads a folder of GDC files"
            )
        files, left_out = choose_files(format_name, path, sheet, setting, table.get("workflow"))
        reader = {"star_counts": read_star_counts, "maf": read_mafs, "gdc_gene_level": read_gene_level}
        found = reader[format_name](files)
        found.notes["left_out"] = left_out
    return tidy(found, setting)


def _read_porpoise_panel(path: Path, panel: str, setting: str) -> Panel:
    suffix, value_type, unit = _PORPOISE[panel]
    rows = read_porpoise(path, setting, suffix)
    people = one_row_per_patient(rows, path)
    columns = [name for name in people.columns if name.endswith(suffix)]
    genes = [name[: -len(suffix)] for name in columns]
    kept = [number for number, gene in enumerate(genes) if gene not in _NOT_GENES.get(panel, set())]
    if not kept:
        raise MorphomeError(
            f"{path}: no column ends with '{suffix}' ({setting})",
            f"this table has no such values: leave {setting} out",
        )
    values = people[columns].to_numpy(np.float32)[:, kept]
    known = values[~np.isnan(values)]
    if panel == "mut" and not np.isin(known, (0.0, 1.0)).all():
        raise MorphomeError(f"{path}: a '{suffix}' column holds values other than 0 and 1", f"check {setting}.path")
    notes = {"slides": len(rows), "not_genes": sorted(set(genes) & _NOT_GENES.get(panel, set()))}
    kept_genes = [genes[number] for number in kept]
    return Panel(people["case_id"].tolist(), kept_genes, values, value_type, unit, {}, 1, notes)


def _read_csv_panel(path: Path, setting: str) -> Panel:
    """Own table: ``patient_id`` (or an unnamed first column, as pandas writes an index) and one column a gene."""
    raw = read_bytes(path, setting)
    header, delimiter = header_of(raw, path, setting)
    ids = "patient_id" if "patient_id" in header else header[0] if header[0] in ("", "Unnamed: 0") else None
    if ids is None:
        turned = header[0].lower() in _GENE_HEADERS or any(try_barcode(name) for name in header)
        raise MorphomeError(
            f"{path}: no column 'patient_id' ({setting}); the columns are {few_names(header, 3)}",
            "the rows are genes: turn the table, one row per patient" if turned else "name the column of patients",
        )
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise MorphomeError(f"{path}: the column '{twice}' occurs twice ({setting})", "keep one column per gene")
    position = header.index(ids)
    try:
        table = pd.read_csv(io.BytesIO(raw), sep=delimiter, dtype={position: str}, low_memory=False)
    except (ValueError, pd.errors.ParserError) as error:
        raise MorphomeError(f"{path}: cannot be read as a table: {error} ({setting})", "check the file") from None
    patients = table.iloc[:, position]
    if patients.isna().any():
        row = int(np.flatnonzero(patients.isna())[0]) + 2
        raise MorphomeError(f"{path}, line {row}: no patient id ({setting})", "fill the id or remove the row")
    patients = patients.astype(str).str.strip()
    if patients.duplicated().any():
        twice = patients[patients.duplicated()].iloc[0]
        raise MorphomeError(f"{path}: patient {twice} occurs twice ({setting})", "keep one row per patient")
    samples = [name for name in patients if (parts := try_barcode(name)) and parts.sample_code]
    if samples:
        raise MorphomeError(
            f"{path}: '{samples[0]}' is a sample, not a patient ({setting})",
            "choose one sample per patient and write the first 12 characters into patient_id",
        )
    genes = table.drop(columns=table.columns[position])
    texts = [name for name, kind in genes.dtypes.items() if kind.kind not in "fiub"]
    if texts:
        column = genes[texts[0]]
        bad = column[pd.to_numeric(column, errors="coerce").isna() & column.notna()]
        shown = f": '{bad.iloc[0]}'" if len(bad) else ""
        raise MorphomeError(
            f"{path}: column '{texts[0]}' is not numeric{shown} ({setting})",
            "a gene column holds numbers; leave a cell empty when it was not measured",
        )
    values = genes.to_numpy(np.float32)
    return Panel(patients.tolist(), [str(name) for name in genes.columns], values, "as_given", "as given")
