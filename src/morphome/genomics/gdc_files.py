"""Per-patient files as the GDC hands them out: STAR counts, masked MAF, gene-level copy number.

Which file of a patient is read (a rule, nothing fitted): the sample code 01, else 03, else 06 (recurrences, new
primaries and normals are not used); of several samples the lowest vial (A before B: frozen before FFPE); of
several files of that sample the smallest File ID. In one MAF of many samples the barcodes say more: then the
highest portion and the highest plate decide.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from morphome.cohort.barcode import TUMOUR_CODES, try_barcode
from morphome.cohort.slide_sheet import cases_of, check_file_name, check_utf8, is_gdc, locate, read_rows, sample_codes
from morphome.cohort.tables import read_bytes
from morphome.errors import MorphomeError
from morphome.genomics.panel import Panel, average_repeats, sum_repeats

#: Variant classes that change the protein; everything else (Silent, UTR, intron, flank, RNA) does not count.
PROTEIN_CHANGING = frozenset(
    {
        *("Missense_Mutation", "Nonsense_Mutation", "Nonstop_Mutation", "Translation_Start_Site"),
        *("Frame_Shift_Del", "Frame_Shift_Ins", "In_Frame_Del", "In_Frame_Ins", "Splice_Site"),
    }
)
_DATA_TYPES = {
    "star_counts": "Gene Expression Quantification",
    "maf": "Masked Somatic Mutation",
    "gdc_gene_level": "Gene Level Copy Number",
}
_CNV_WORKFLOW = re.compile(r"(?:^|[._])([A-Za-z0-9_]+)\.gene_level_copy_number\.", re.IGNORECASE)


def choose_files(
    format_name: str, path: Path, sheet: Path | None, setting: str, workflow: str | None = None
) -> tuple[dict[str, Path], dict[str, int]]:
    """One file per patient by the rule of this module.

    Args:
        path: folder of the files, ``<path>/<File ID>/<File Name>`` or ``<path>/<File Name>``.
        sheet: GDC sample sheet; may list files of other data types, which are passed over.
        workflow: keep the files of this workflow only (copy number).

    Returns:
        patient to file, sorted by patient; counts of files left out by reason.

    Raises:
        MorphomeError: no sheet, not a GDC sheet, no such files in it, a file that is not there (named), or files
            of several workflows without a choice.
    """
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
    left_out: Counter[str] = Counter()
    if format_name == "gdc_gene_level":
        rows = _one_workflow(rows, workflow, setting, left_out)
    best: dict[str, tuple[tuple[Any, ...], str, str]] = {}
    for row in rows:
        file_id, name = check_file_name(row, sheet)
        cases = cases_of(row)
        if len(cases) != 1:
            left_out["several patients in one file" if cases else "no patient"] += 1
            continue
        codes = sample_codes(row)
        tumours = [(TUMOUR_CODES.index(code), vial) for code, vial in codes if code in TUMOUR_CODES]
        if codes and not tumours:
            left_out["no sample of the tumour under study"] += 1
            continue
        rank = (*(min(tumours) if tumours else (len(TUMOUR_CODES), "")), file_id, name)
        if cases[0] in best:
            left_out["further file of the same patient"] += 1
        if cases[0] not in best or rank < best[cases[0]][0]:
            best[cases[0]] = (rank, file_id, name)
    if not best:
        raise MorphomeError(
            f"{sheet}: no '{kind}' file of a tumour sample ({setting}): {dict(left_out)}", "check the sample sheet"
        )
    files = {patient: locate(path, best[patient][1], best[patient][2]) for patient in sorted(best)}
    absent = [(patient, file) for patient, file in files.items() if not file.is_file()]
    if absent:
        patient, file = absent[0]
        file_id = best[patient][1]
        raise MorphomeError(
            f"{file}: file not found, nor in its folder {file_id}; {len(absent)} of {len(files)} files of {setting} "
            f"are missing (patient {patient})",
            f"download the files of {sheet} into {path}, or remove their rows from the sheet",
        )
    return files, dict(sorted(left_out.items()))


def read_star_counts(files: Mapping[str, Path]) -> Panel:
    """log2(TPM + 1) per gene symbol, from the column ``tpm_unstranded``.

    The TPM of genes that share a symbol are summed within the sample; ``N_*`` rows and the pseudo-autosomal
    copies on Y (``_PAR_Y``, no reads of their own) are dropped.

    Raises:
        MorphomeError: naming the file: damaged, a missing column, a TPM that is no number >= 0, or other genes
            than the first file.
    """
    genes, tpm, gene_ids = _gene_matrix(files, "tpm_unstranded", sum_repeats, may_be_empty=False)
    notes = {"rule_for_symbols": "TPM of genes that share a symbol are summed"}
    values = np.log2(tpm + np.float32(1.0))
    return Panel(list(files), genes, values, "log2_tpm_plus_1", "log2(TPM + 1)", gene_ids, len(files), notes)


def read_gene_level(files: Mapping[str, Path]) -> Panel:
    """Integer total copy number per gene symbol; an empty cell is not covered (NaN), never zero.

    Genes that share a symbol are averaged within the sample over those that are covered.

    Raises:
        MorphomeError: naming the file, as for :func:`read_star_counts`.
    """
    genes, values, gene_ids = _gene_matrix(files, "copy_number", average_repeats, may_be_empty=True)
    notes = {"rule_for_symbols": "copy numbers of genes that share a symbol are averaged"}
    return Panel(list(files), genes, values, "copy_number", "total copies", gene_ids, len(files), notes)


def read_mafs(files: Mapping[str, Path]) -> Panel:
    """0/1 per gene from one MAF per patient: 1 when a protein-changing variant is listed.

    A patient whose file has no rows has no mutation (all 0); a patient without a file is absent. Genes are those
    mutated in at least one patient; no filter by frequency (that would be fitted).

    Raises:
        MorphomeError: naming the file: damaged, a missing column, or a barcode of another patient.
    """
    hits: dict[str, set[str]] = {}
    for patient, file in files.items():
        table = _maf_table(file)
        others = {barcode for barcode in table["Tumor_Sample_Barcode"].unique() if not _belongs(barcode, patient)}
        if others:
            raise MorphomeError(
                f"{file}: holds sample {min(others)}, but the sample sheet says patient {patient}",
                "check molecular.sheet, or download the file again",
            )
        hits[patient] = _mutated(table)
    return _binary_panel(hits, len(files), {})


def read_one_maf(path: Path) -> Panel:
    """0/1 per gene from one MAF of many samples; the sample of a patient is chosen by its barcode.

    A patient without any row (silent ones count) is absent: one MAF does not say who was sequenced without a
    finding.

    Raises:
        MorphomeError: naming the file: missing, damaged, a missing column, no tumour sample.
    """
    table = _maf_table(path)
    chosen, left_out = choose_samples(sorted(table["Tumor_Sample_Barcode"].unique()))
    if not chosen:
        raise MorphomeError(f"{path}: no sample of the tumour under study ({left_out})", "check molecular.mut.path")
    by_sample = dict(tuple(table.groupby("Tumor_Sample_Barcode")))
    hits = {patient: _mutated(by_sample[sample]) for patient, sample in chosen.items()}
    return _binary_panel(hits, 1, {"left_out": left_out})


def choose_samples(barcodes: list[str]) -> tuple[dict[str, str], dict[str, int]]:
    """One sample barcode per patient: code 01, 03, 06; lowest vial; highest portion, then plate.

    Text that is no TCGA barcode is a patient of its own.

    Returns:
        patient to barcode, sorted by patient; counts of barcodes left out.
    """
    best: dict[str, tuple[tuple[int, str], tuple[str, str, str], str]] = {}
    left_out: Counter[str] = Counter()
    for text in barcodes:
        parts = try_barcode(text)
        if parts is not None and parts.sample_code and parts.sample_code not in TUMOUR_CODES:
            left_out[f"sample type {parts.sample_code}"] += 1
            continue
        patient = parts.patient if parts else text
        code = parts.sample_code if parts else ""
        low = (TUMOUR_CODES.index(code) if code else len(TUMOUR_CODES), parts.vial if parts else "")
        high = (parts.portion, parts.plate, text) if parts else ("", "", text)
        if patient in best:
            left_out["further sample of the same patient"] += 1
            old_low, old_high, _ = best[patient]
            if low > old_low or (low == old_low and high < old_high):
                continue
        best[patient] = (low, high, text)
    return {patient: best[patient][2] for patient in sorted(best)}, dict(sorted(left_out.items()))


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


def _body(path: Path, setting: str) -> bytes:
    """Bytes from the header line on: leading comment lines are cut ('#' inside a line is text)."""
    raw = read_bytes(path, setting)
    start = 0
    while raw[start : start + 1] == b"#":
        end = raw.find(b"\n", start)
        if end < 0:
            return b""
        start = end + 1
    return raw[start:]


def _columns(path: Path, setting: str, wanted: list[str]) -> pd.DataFrame:
    body = _body(path, setting)
    check_utf8(body, path, setting)
    header = body.split(b"\n", 1)[0].decode("utf-8", "replace").rstrip("\r").split("\t")
    if missing := [name for name in wanted if name not in header]:
        raise MorphomeError(
            f"{path}: no column '{missing[0]}' (file of {len(body)} bytes after its comments)",
            "the file is damaged or of another kind: download it again, or check the format in the configuration",
        )
    try:
        return pd.read_csv(
            io.BytesIO(body), sep="\t", usecols=wanted, dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE
        )
    except (ValueError, pd.errors.ParserError) as error:
        raise MorphomeError(f"{path}: cannot be read as a table: {error}", "download the file again") from None


def _gene_matrix(
    files: Mapping[str, Path],
    column: str,
    combine: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    may_be_empty: bool,
) -> tuple[list[str], np.ndarray, dict[str, str]]:
    """Symbols, float32 (files, symbols) and the symbols' Ensembl ids from one gene file per patient."""
    first_ids: np.ndarray | None = None
    first_file = next(iter(files.values()))
    for number, file in enumerate(files.values()):
        table = _columns(file, "GDC gene file", ["gene_id", "gene_name", column])
        ids = table["gene_id"].to_numpy(str)
        wanted = np.char.startswith(ids, "ENSG") & ~np.char.endswith(ids, "_PAR_Y")
        table, ids = table[wanted], ids[wanted]
        if not len(ids) or len(np.unique(ids)) < len(ids):
            raise MorphomeError(f"{file}: no genes, or a gene id that occurs twice", "download the file again")
        if first_ids is None:
            first_ids = ids
            genes, order, gene_ids = _symbols(ids, table["gene_name"].to_numpy(str))
            values = np.zeros((len(files), len(genes)), np.float32)
        elif not np.array_equal(ids, first_ids):
            table = _same_order(table, ids, first_ids, file, first_file)
        text = table[column].to_numpy(str)
        cells = pd.to_numeric(table[column], errors="coerce").to_numpy(np.float64)
        good = np.isfinite(cells) & (cells >= 0)
        if may_be_empty:
            good |= text == ""
        if not good.all():
            bad = table["gene_id"].iloc[int(np.flatnonzero(~good)[0])]
            raise MorphomeError(f"{file}: {column} of {bad} is not a number >= 0", "download the file again")
        values[number] = combine(cells, order, len(genes))
    return genes, values, gene_ids


def _maf_table(path: Path) -> pd.DataFrame:
    return _columns(path, "MAF", ["Hugo_Symbol", "Variant_Classification", "Tumor_Sample_Barcode"])


def _symbols(ids: np.ndarray, names: np.ndarray) -> tuple[list[str], np.ndarray, dict[str, str]]:
    """Sorted unique symbols (the Ensembl id where there is none), each row's place in them, symbol to ids."""
    plain = np.array([gene_id.split(".")[0] for gene_id in ids])
    symbols = np.where(names == "", plain, names)
    genes, order = np.unique(symbols, return_inverse=True)
    found: dict[str, list[str]] = {}
    for symbol, gene_id in zip(symbols.tolist(), ids.tolist(), strict=True):
        found.setdefault(symbol, []).append(gene_id)
    return genes.tolist(), order, {symbol: ";".join(found[symbol]) for symbol in genes.tolist()}


def _same_order(
    table: pd.DataFrame, ids: np.ndarray, first_ids: np.ndarray, file: Path, first_file: Path
) -> pd.DataFrame:
    if len(ids) != len(first_ids) or set(ids) != set(first_ids):
        raise MorphomeError(
            f"{file}: {len(ids)} genes, other ones than in {first_file} ({len(first_ids)} genes)",
            "take all files of one gene model (the GDC uses GENCODE v36 since release 32)",
        )
    return table.set_index("gene_id").loc[first_ids].reset_index()


def _belongs(barcode: str, patient: str) -> bool:
    parts = try_barcode(barcode)
    return parts is None or try_barcode(patient) is None or parts.patient == patient.upper()


def _mutated(table: pd.DataFrame) -> set[str]:
    changed = table["Variant_Classification"].isin(PROTEIN_CHANGING)
    return set(table.loc[changed, "Hugo_Symbol"]) - {"", "Unknown"}


def _binary_panel(hits: Mapping[str, set[str]], n_files: int, notes: dict[str, Any]) -> Panel:
    patients = sorted(hits)
    genes = sorted(set().union(*hits.values()))
    place = {gene: number for number, gene in enumerate(genes)}
    values = np.zeros((len(patients), len(genes)), np.float32)
    for row, patient in enumerate(patients):
        values[row, [place[gene] for gene in hits[patient]]] = 1.0
    notes = {**notes, "rule_for_mutated": sorted(PROTEIN_CHANGING)}
    return Panel(patients, genes, values, "binary", "1 = protein-changing variant", {}, n_files, notes)
