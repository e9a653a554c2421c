"""Per-patient files as the GDC hands them out: which file of a patient is read, STAR counts, gene-level copy number.

Which file of a patient is read (a rule, nothing fitted): the first of the configured sample codes (by default 01,
else 03, else 06; recurrences, new primaries and normals are not used); of several samples the lowest vial (A before
B: frozen before FFPE); of several files of that sample the smallest File ID.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from morphome.cohort.barcode import TUMOUR_CODES
from morphome.cohort.slide_sheet import cases_of, check_file_name, is_gdc, locate, read_rows, sample_codes
from morphome.errors import MorphomeError
from morphome.genomics.panel import Panel, average_repeats, sum_repeats
from morphome.genomics.reading import places_of, read_columns

_DATA_TYPES = {
    "star_counts": "Gene Expression Quantification",
    "maf": "Masked Somatic Mutation",
    "gdc_gene_level": "Gene Level Copy Number",
}
#: Setting ``values`` of STAR counts: column, value type, unit.
STAR_VALUES = {
    "log2_tpm": ("tpm_unstranded", "log2_tpm_plus_1", "log2(TPM + 1)"),
    "tpm": ("tpm_unstranded", "tpm", "transcripts per million"),
    "counts": ("unstranded", "counts", "reads"),
}
_CNV_WORKFLOW = re.compile(r"(?:^|[._])([A-Za-z0-9_]+)\.gene_level_copy_number\.", re.IGNORECASE)


def rule_for_files(codes: Sequence[str]) -> str:
    """The rule of this module in words."""
    return f"sample code {', then '.join(codes)}; the lowest vial; the smallest File ID"


def choose_files(
    format_name: str,
    path: Path,
    sheet: Path | None,
    setting: str,
    workflow: str | None = None,
    codes: Sequence[str] = TUMOUR_CODES,
) -> tuple[dict[str, tuple[Path, str]], dict[str, int]]:
    """One file per patient by the rule of this module.

    Args:
        path: folder of the files, ``<path>/<File ID>/<File Name>`` or ``<path>/<File Name>``.
        sheet: GDC sample sheet; may list files of other data types, which are passed over. A row with a
            ``Local Path`` names its file itself.
        workflow: keep the files of this workflow only (copy number).
        codes: TCGA sample codes of the tumour under study, preferred first.

    Returns:
        patient to file and its sample code ("" when the sheet does not say it), sorted by patient; counts of files
        left out by reason.

    Raises:
        MorphomeError: no sheet, not a GDC sheet, no such files in it, a file that is not there or of another size
            than the sheet's ``File Size`` (named), or files of several workflows without a choice.
    """
    rows = _rows_of(format_name, sheet, setting)
    left_out: Counter[str] = Counter()
    if format_name == "gdc_gene_level":
        rows = _one_workflow(rows, workflow, setting, left_out)
    best: dict[str, tuple[tuple[Any, ...], dict[str, str]]] = {}
    for row in rows:
        file_id, name = check_file_name(row, sheet)
        cases = cases_of(row)
        if len(cases) != 1:
            left_out["several patients in one file" if cases else "no patient"] += 1
            continue
        found = sample_codes(row)
        tumours = [(codes.index(code), vial) for code, vial in found if code in codes]
        if found and not tumours:
            left_out["no sample of the tumour under study"] += 1
            continue
        rank = (*(min(tumours) if tumours else (len(codes), "")), file_id, name)
        if cases[0] in best:
            left_out["further file of the same patient"] += 1
        if cases[0] not in best or rank < best[cases[0]][0]:
            best[cases[0]] = (rank, row)
    if not best:
        raise MorphomeError(
            f"{sheet}: no '{_DATA_TYPES[format_name]}' file of a tumour sample (codes {', '.join(codes)}) ({setting}): "
            f"{dict(left_out)}",
            "check the sample sheet and cohort.sample_types",
        )
    chosen = {patient: best[patient][1] for patient in sorted(best)}
    files = {patient: _place(path, row) for patient, row in chosen.items()}
    absent = [patient for patient, file in files.items() if not file.is_file()]
    if absent:
        row = chosen[absent[0]]
        raise MorphomeError(
            f"{files[absent[0]]}: file not found, neither in its folder {row.get('File ID', '')} nor beside it; "
            f"{len(absent)} of {len(files)} files of {setting} are missing (patient {absent[0]})",
            f"download the files of {sheet} into {path}, or remove their rows from the sheet",
        )
    for patient, file in files.items():
        size = chosen[patient].get("File Size", "")
        if size.isdigit() and file.stat().st_size != int(size):
            raise MorphomeError(
                f"{file}: {file.stat().st_size} bytes, but {sheet} says {size} (patient {patient}, {setting})",
                "the file is not whole, or another one: move it away and download it again",
            )
    known = {patient: rank[0] for patient, (rank, _) in best.items() if rank[0] < len(codes)}
    coded = {patient: (file, codes[known[patient]] if patient in known else "") for patient, file in files.items()}
    return coded, dict(sorted(left_out.items()))


def read_star_counts(files: Mapping[str, Path], values: str = "log2_tpm") -> Panel:
    """Expression per gene symbol from augmented STAR counts.

    The TPM or counts of genes that share a symbol are summed within the sample; ``N_*`` rows and the pseudo-autosomal
    copies on Y (``_PAR_Y``, no reads of their own) are dropped. Values are float32: counts above 16,777,216 are
    rounded to 7 digits, and the notes say how many.

    Args:
        files: patient to file.
        values: ``log2_tpm``: log2(TPM + 1); ``tpm``: ``tpm_unstranded``; ``counts``: ``unstranded``.

    Raises:
        MorphomeError: naming the file: damaged, a missing column, a value that is no number >= 0, or other genes
            than the first file.
    """
    column, value_type, unit = STAR_VALUES[values]
    genes, matrix, gene_ids, rounded = _gene_matrix(files, column, sum_repeats, may_be_empty=False)
    what = "counts" if values == "counts" else "TPM"
    notes: dict[str, Any] = {"rule_for_symbols": f"{what} of genes that share a symbol are summed"}
    if values == "log2_tpm":
        matrix += np.float32(1.0)
        np.log2(matrix, out=matrix)
    if values == "counts" and rounded:
        notes["rounded"] = f"{rounded} counts above 16,777,216 are rounded to 7 digits"
    return Panel(list(files), genes, matrix, value_type, unit, gene_ids, len(files), notes)


def read_gene_level(files: Mapping[str, Path]) -> Panel:
    """Integer total copy number per gene symbol; an empty cell is not covered (NaN), never zero.

    Genes that share a symbol are averaged within the sample over those that are covered.

    Raises:
        MorphomeError: naming the file, as for :func:`read_star_counts`.
    """
    genes, values, gene_ids, _ = _gene_matrix(files, "copy_number", average_repeats, may_be_empty=True)
    notes = {"rule_for_symbols": "copy numbers of genes that share a symbol are averaged"}
    return Panel(list(files), genes, values, "copy_number", "total copies", gene_ids, len(files), notes)


def _rows_of(format_name: str, sheet: Path | None, setting: str) -> list[dict[str, str]]:
    """Rows of the sample sheet with files of the format's data type."""
    if sheet is None:
        raise MorphomeError(
            f"{setting}: format {format_name} needs the GDC sample sheet of its files",
            "set molecular.sheet to the sample sheet from the GDC portal",
        )
    header, rows = read_rows(sheet, "molecular.sheet")
    if not is_gdc(header):
        raise MorphomeError(
            f"{sheet}: not a GDC sample sheet (columns File ID, File Name, Case ID) (molecular.sheet)",
            "download 'Sample Sheet' from the GDC portal's cart",
        )
    kind = _DATA_TYPES[format_name]
    rows = [row for row in rows if row.get("Data Type", kind).lower() == kind.lower()]
    if not rows:
        raise MorphomeError(
            f"{sheet}: no file of data type '{kind}' (molecular.sheet, needed by {setting})",
            f"add these files to the sheet, or leave {setting} out",
        )
    return rows


def _place(path: Path, row: dict[str, str]) -> Path:
    local = row.get("Local Path", "")
    return Path(local) if local else locate(path, row.get("File ID", ""), row.get("File Name", ""))


def _one_workflow(
    rows: list[dict[str, str]], workflow: str | None, setting: str, left_out: Counter[str]
) -> list[dict[str, str]]:
    names = [row.get("Workflow Type") or _workflow_in(row.get("File Name", "")) for row in rows]
    known = sorted({name for name in names if name})
    if workflow is None:
        if len(set(names)) > 1:
            raise MorphomeError(
                f"{setting}: the sheet lists copy numbers of several workflows ({', '.join(known)}); their values "
                "cannot be mixed",
                f"set {setting}.workflow to one of them",
            )
        return rows
    kept = [row for row, name in zip(rows, names, strict=True) if _plain(name) == _plain(workflow)]
    if not kept:
        raise MorphomeError(
            f"{setting}.workflow: no file of workflow '{workflow}'; the sheet lists: {', '.join(known) or 'none'}",
            f"set {setting}.workflow to one of them, or leave it out when the file names do not say",
        )
    if len(kept) < len(rows):
        left_out["other workflow"] += len(rows) - len(kept)
    return kept


def _workflow_in(file_name: str) -> str:
    """``ascat3`` of ``TCGA-BLCA.<uuid>.ascat3.gene_level_copy_number.v36.tsv``; empty when it is not there."""
    match = _CNV_WORKFLOW.search(file_name)
    word = match.group(1) if match else ""
    return word if re.search(r"ascat|absolute|liftover", word, re.IGNORECASE) else ""


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _gene_matrix(
    files: Mapping[str, Path],
    column: str,
    combine: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    may_be_empty: bool,
) -> tuple[list[str], np.ndarray, dict[str, str], int]:
    """Symbols, float32 (files, symbols), the symbols' Ensembl ids, and how many sums above 2**24 were rounded."""
    first_ids: np.ndarray | None = None
    first_rows = first_wanted = np.empty(0)
    first_file = next(iter(files.values()))
    rounded = 0
    for number, file in enumerate(files.values()):
        table = read_columns(file, "GDC gene file", ["gene_id", "gene_name", column])
        rows = table["gene_id"].to_numpy(str)
        as_first = first_ids is not None and np.array_equal(rows, first_rows)
        if as_first:  # files of one release list the same genes in one order: checked once
            wanted = first_wanted
        else:
            wanted = np.char.startswith(rows, "ENSG") & ~np.char.endswith(rows, "_PAR_Y")
            ids = rows[wanted]
            if not len(ids) or len(np.unique(ids)) < len(ids):
                raise MorphomeError(f"{file}: no genes, or a gene id that occurs twice", "download the file again")
        table = table[wanted]
        if first_ids is None:
            first_ids, first_rows, first_wanted = ids, rows, wanted
            names = table["gene_name"].to_numpy(str)
            plain = np.array([gene_id.split(".")[0] for gene_id in ids])
            genes, order, gene_ids = places_of(np.where(names == "", plain, names), ids)
            values = np.zeros((len(files), len(genes)), np.float32)
        elif not as_first:
            table = _same_order(table, ids, first_ids, file, first_file)
        cells = pd.to_numeric(table[column], errors="coerce").to_numpy(np.float64)
        good = np.isfinite(cells) & (cells >= 0)
        if may_be_empty:
            good |= (table[column] == "").to_numpy(bool)
        if not good.all():
            bad = table["gene_id"].iloc[int(np.flatnonzero(~good)[0])]
            raise MorphomeError(f"{file}: {column} of {bad} is not a number >= 0", "download the file again")
        sums = combine(cells, order, len(genes))
        values[number] = sums
        rounded += int(((sums > 2**24) & (values[number] != sums)).sum())
    return genes, values, gene_ids, rounded


def _same_order(
    table: pd.DataFrame, ids: np.ndarray, first_ids: np.ndarray, file: Path, first_file: Path
) -> pd.DataFrame:
    if len(ids) != len(first_ids) or set(ids) != set(first_ids):
        raise MorphomeError(
            f"{file}: {len(ids)} genes, other ones than in {first_file} ({len(first_ids)} genes)",
            "take all files of one gene model (the GDC uses GENCODE v36 since release 32)",
        )
    return table.set_index("gene_id").loc[first_ids].reset_index()
