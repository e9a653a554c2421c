"""Tables with a row per patient or slide: own CSV files and the published tables of PORPOISE and MCAT."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from morphome.cohort.barcode import try_barcode
from morphome.cohort.slide_sheet import few_names
from morphome.cohort.tables import header_of, one_row_per_patient, read_bytes, read_porpoise
from morphome.errors import MorphomeError
from morphome.genomics.matrix import AS_GIVEN, RULE_ZSCORE, value_type_of
from morphome.genomics.panel import Panel

#: Column endings and values of the PORPOISE tables.
_PORPOISE = {
    "rna": ("_rnaseq", "zscore", "z-score"),
    "cnv": ("_cnv", "gistic", "GISTIC level, -2 to 2"),
    "mut": ("_mut", "binary", "1 = mutated"),
}
#: Columns of these tables that are no genes, beside unnamed ones.
_CLINICAL = frozenset(
    {
        *("case_id", "slide_id", "site", "is_female", "oncotree_code", "age", "train", "disc_label", "label"),
        *("survival_months", "censorship", "sex", "gender", "race", "stage", "grade"),
    }
)
#: Derived columns of the PORPOISE tables: no genes.
_NOT_GENES = {"mut": {"RAS"}}
#: What a gene symbol looks like; "C1orf112", "HLA-A" and "snoU13" do, "is_alive" does not.
_SYMBOL = re.compile(r"(?=.*[A-Z])(?:sno)?[A-Z0-9]+(?:orf[0-9]+[A-Z0-9]*)?(?:[-.@_][A-Za-z0-9]+)*")
#: First columns of tables with a row per gene.
GENE_HEADERS = frozenset(
    {"gene", "genes", "gene_id", "gene_name", "gene_symbol", "symbol", "hugo_symbol", "geneid", "ensembl_id"}
)


def read_porpoise_panel(path: Path, panel: str, setting: str) -> Panel:
    """The columns ``<gene>_rnaseq``, ``_cnv`` or ``_mut`` of a table with one row per slide.

    MCAT's tables name mutation columns by the bare gene. Such columns are taken when the table has no ``_mut``
    column: named like a symbol, no clinical column, and nothing but 0, 1 and empty cells in them.

    Raises:
        MorphomeError: naming the file: no such columns, mutations other than 0 and 1, or rows of a patient that
            differ.
    """
    suffix, value_type, unit = _PORPOISE[panel]
    notes: dict[str, Any] = {}
    rows = read_porpoise(path, setting, suffix)
    columns = [name for name in rows.columns if name.endswith(suffix)]
    genes = [name[: -len(suffix)] for name in columns]
    if panel == "mut":
        notes["rule_for_columns"] = f"columns that end with {suffix}"
        if not columns:
            rows, columns, passed_over = _bare_mutations(path, setting, rows)
            genes = columns
            notes["rule_for_columns"] = "columns of bare gene names that hold 0 and 1 only (the table has no _mut)"
            notes["columns_passed_over"] = passed_over
    kept = [number for number, gene in enumerate(genes) if gene not in _NOT_GENES.get(panel, set())]
    if not kept:
        bare = " and no column of a bare gene name holds mutations" if panel == "mut" else ""
        raise MorphomeError(
            f"{path}: no column ends with '{suffix}'{bare} ({setting})",
            f"this table has no such values: leave {setting} out",
        )
    people = one_row_per_patient(rows, path)
    values = people[columns].to_numpy(np.float32)[:, kept]
    known = values[~np.isnan(values)]
    if panel == "mut" and not np.isin(known, (0.0, 1.0)).all():
        raise MorphomeError(f"{path}: a '{suffix}' column holds values other than 0 and 1", f"check {setting}.path")
    notes |= {
        "slides": len(rows),
        "not_genes": sorted(set(genes) & _NOT_GENES.get(panel, set())),
        "rule_for_samples": "as published: one profile per patient, the same on all slides",
    }
    if value_type == "zscore":
        notes["rule_for_values"] = RULE_ZSCORE
    kept_genes = [genes[number] for number in kept]
    return Panel(people["case_id"].tolist(), kept_genes, values, value_type, unit, {}, 1, notes)


def _bare_mutations(path: Path, setting: str, ids: pd.DataFrame) -> tuple[pd.DataFrame, list[str], list[str]]:
    """``ids`` with the columns of bare gene names; their names; columns without a suffix that were passed over."""
    raw = read_bytes(path, setting)
    header, delimiter = header_of(raw, path, setting)
    endings = tuple(suffix for suffix, _, _ in _PORPOISE.values())
    plain = [
        name
        for name in header
        if name
        and name.lower() not in _CLINICAL
        and not name.lower().startswith(("unnamed", "survival", "censorship"))
        and not name.endswith(endings)
    ]
    named = [name for name in plain if _SYMBOL.fullmatch(name)]
    if not named:
        return ids, [], plain
    try:
        table = pd.read_csv(io.BytesIO(raw), sep=delimiter, usecols=named, low_memory=False)[named]
    except (ValueError, pd.errors.ParserError) as error:
        raise MorphomeError(f"{path}: cannot be read: {error} ({setting})", f"check {setting}.path") from None
    numbers = table.select_dtypes(["number", "bool"])
    values = numbers.to_numpy(np.float32)
    binary = (np.isnan(values) | (values == 0) | (values == 1)).all(axis=0)
    kept = numbers.columns[binary].tolist()
    mutations = pd.DataFrame(values[:, binary], index=ids.index, columns=kept)
    taken = set(kept)
    return pd.concat([ids, mutations], axis=1), kept, [name for name in plain if name not in taken]


def read_csv_panel(path: Path, setting: str, unit: str | None = None) -> Panel:
    """Own table: ``patient_id`` (or an unnamed first column, as pandas writes an index) and one column a gene.

    Raises:
        MorphomeError: naming the file and the column or line.
    """
    raw = read_bytes(path, setting)
    header, delimiter = header_of(raw, path, setting)
    ids = "patient_id" if "patient_id" in header else header[0] if header[0] in ("", "Unnamed: 0") else None
    if ids is None:
        turned = header[0].lower() in GENE_HEADERS or any(try_barcode(name) for name in header)
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
    patients = _patients(table.iloc[:, position], path, setting)
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
    notes = {"rule_for_samples": "as given: one row per patient"}
    unit = unit or AS_GIVEN
    names = [str(name) for name in genes.columns]
    return Panel(patients, names, genes.to_numpy(np.float32), value_type_of(unit), unit, notes=notes)


def _patients(cells: pd.Series, path: Path, setting: str) -> list[str]:
    """Ids of a column, refused when one is empty, occurs twice or is a sample's."""
    if cells.isna().any():
        row = int(np.flatnonzero(cells.isna())[0]) + 2
        raise MorphomeError(f"{path}, line {row}: no patient id ({setting})", "fill the id or remove the row")
    patients = cells.astype(str).str.strip()
    if patients.duplicated().any():
        twice = patients[patients.duplicated()].iloc[0]
        raise MorphomeError(f"{path}: patient {twice} occurs twice ({setting})", "keep one row per patient")
    samples = [name for name in patients if (parts := try_barcode(name)) and parts.sample_code]
    if samples:
        raise MorphomeError(
            f"{path}: '{samples[0]}' is a sample, not a patient ({setting})",
            "choose one sample per patient and write the first 12 characters into patient_id",
        )
    return patients.tolist()
