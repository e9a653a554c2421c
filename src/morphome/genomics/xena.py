"""Data sets of UCSC Xena: a matrix of genes and samples in either orientation, or a list of mutations.

Which side of a matrix holds the samples is decided by where TCGA barcodes stand. Matrices of the GDC hub name genes by
Ensembl id; a probe map (columns ``id`` and ``gene``) turns them into symbols. Lists of mutations have one line per
variant, with Sequence Ontology terms or MAF classes in ``effect``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from morphome.cohort.barcode import TUMOUR_CODES, try_barcode
from morphome.cohort.slide_sheet import few_names
from morphome.errors import MorphomeError, MorphomeWarning
from morphome.genomics.consequences import Consequences
from morphome.genomics.maf import panel_of_samples
from morphome.genomics.matrix import (
    AS_GIVEN,
    RULES,
    Matrix,
    are_amounts,
    clean_symbols,
    merge_rule,
    merge_symbols,
    value_type_of,
)
from morphome.genomics.panel import Panel
from morphome.genomics.reading import places_of, read_columns
from morphome.genomics.samples import require_samples, rule_for_samples

#: Names of the columns of a list of mutations, lowered; the hubs do not agree.
_SAMPLE, _GENE, _EFFECT = ("sample", "sample_id", "sampleid", "#sample"), ("gene", "hugo_symbol"), ("effect",)


def read_xena(
    path: Path,
    panel: str,
    setting: str,
    *,
    unit: str | None = None,
    log2: bool = False,
    probemap: Path | None = None,
    rule: Consequences,
    codes: Sequence[str] = TUMOUR_CODES,
) -> Panel:
    """A panel from one data set, gzip or not.

    Several samples of a patient: see :func:`morphome.genomics.samples.choose_samples`. Genes that share a symbol are
    summed where the unit allows it (amounts on a linear scale, also behind log2(x + c)), else averaged. In a list of
    mutations a patient without any row is absent.

    Args:
        path: the data set.
        panel: rna, mut, cnv or expression.
        setting: ``molecular.<panel>``.
        unit: unit of the values as the hub states it, for example ``log2(tpm+1)``.
        log2: the values of RNA are linear; the caller takes their logarithm.
        probemap: table of ``id`` and ``gene``.
        rule: which variants count.
        codes: TCGA sample codes, preferred first.

    Raises:
        MorphomeError: naming the file: damaged, no TCGA barcodes, no tumour sample, a cell that is no number.
    """
    matrix = Matrix(path, setting, comments=False)
    if panel == "mut" and (columns := _mutation_columns(matrix.header)):
        return _mutations(path, columns, setting, rule, codes)
    unit = unit or ("1 = mutated" if panel == "mut" else AS_GIVEN)
    value_type = "binary" if panel == "mut" else value_type_of(unit)
    ids, chosen, values, left_out = _values(matrix, codes, setting)
    if panel == "mut" and not np.isin(values[~np.isnan(values)], (0.0, 1.0)).all():
        raise MorphomeError(f"{path}: values other than 0 and 1 ({setting})", f"check {setting}.path")
    notes: dict[str, Any] = {"rule_for_samples": rule_for_samples(codes), "left_out": left_out}
    symbols, kept = _symbols(ids, probemap, path, setting, notes)
    linear = are_amounts(panel, value_type, unit, values[kept], log2)
    merge, offset = merge_rule(value_type, unit, linear=linear)
    genes, merged, repeated = merge_symbols(symbols[kept].astype(str), values[kept], merge, offset)
    ensembl = np.array([name if name.startswith("ENSG") else "" for name in ids], dtype=str)
    notes |= {"rule_for_symbols": RULES[merge], "symbols_repeated": repeated}
    gene_ids = places_of(symbols[kept].astype(str), ensembl[kept])[2]
    return Panel(list(chosen), genes, merged, value_type, unit, gene_ids, 1, notes)


def _values(
    matrix: Matrix, codes: Sequence[str], setting: str
) -> tuple[list[str], dict[str, str], np.ndarray, dict[str, int]]:
    """Gene names, patient to sample, float32 (genes, patients), samples left out."""
    names = matrix.names(0)
    across = {name: place for place, name in enumerate(matrix.header) if place and try_barcode(name)}
    down = {name: place for place, name in enumerate(names) if try_barcode(name)}
    if not across and not down:
        raise MorphomeError(
            f"{matrix.path}: neither the columns ({few_names(matrix.header[1:], 3)}) nor the rows "
            f"({few_names(names, 3)}) are TCGA barcodes ({setting})",
            "for other projects write a csv table, one row per patient",
        )
    samples = across if len(across) >= len(down) else down
    if samples is down and len(down) < sum(name in down for name in names):
        twice = next(name for name in down if names.count(name) > 1)
        raise MorphomeError(f"{matrix.path}: sample '{twice}' occurs twice ({setting})", "keep one row per sample")
    chosen, left_out = require_samples(samples, codes, matrix.path, setting)
    strangers = (len(matrix.header) - 1 if samples is across else len(names)) - len(samples)
    if strangers:
        left_out["no TCGA barcode"] = strangers
    places = [samples[sample] for sample in chosen.values()]
    if samples is across:
        return names, chosen, matrix.numbers(places, names), left_out
    genes = [place for place in range(1, len(matrix.header)) if matrix.header[place]]
    return [matrix.header[place] for place in genes], chosen, matrix.numbers(genes, names)[places].T, left_out


def _symbols(
    ids: Sequence[str], probemap: Path | None, path: Path, setting: str, notes: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Symbol of every row and which rows are kept; Ensembl ids lose their version where they stay.

    Rows that count reads outside genes (``N_unmapped`` of STAR, ``__no_feature`` of HTSeq) are no genes.
    """
    clean, cut, empty = clean_symbols(ids)
    names = {} if probemap is None else _probemap(probemap, setting)
    plain = {gene_id.partition(".")[0]: gene for gene_id, gene in names.items()}
    stayed = 0
    kept = clean != ""
    for row, name in enumerate(clean):
        if name.endswith("_PAR_Y") or name.startswith("__") or (name.startswith("N_") and name[2:3].islower()):
            kept[row] = False
            continue
        gene = names.get(name) or plain.get(name.partition(".")[0])
        if gene:
            clean[row] = gene
        elif name.startswith("ENSG"):
            clean[row] = name.partition(".")[0]
            stayed += 1
    notes |= {"symbols_cut_at_bar": cut, "rows_without_symbol": empty, "rows_left_out": int((~kept).sum())}
    if stayed:
        notes["ensembl_ids_without_symbol"] = stayed
        if probemap is None:
            notes["gene_names"] = f"Ensembl ids, no symbols: {setting}.probemap is not set"
            warnings.warn(
                MorphomeWarning(
                    f"{path}: {stayed} genes are named by Ensembl ids, which groups of gene symbols cannot match; set "
                    f"{setting}.probemap to the hub's table of id and gene"
                ),
                stacklevel=2,
            )
    return clean, kept


def _probemap(path: Path, setting: str) -> dict[str, str]:
    table = Matrix(path, f"{setting}.probemap", comments=False)
    lowered = [name.lower().lstrip("#") for name in table.header]
    if missing := [name for name in ("id", "gene") if name not in lowered]:
        raise MorphomeError(
            f"{path}: no column '{missing[0]}' ({setting}.probemap); found: {few_names(table.header)}",
            "a probe map of the hub has the columns id and gene",
        )
    genes = clean_symbols(table.names(lowered.index("gene")))[0].tolist()
    return {probe: gene for probe, gene in zip(table.names(lowered.index("id")), genes, strict=True) if gene}


def _mutation_columns(header: Sequence[str]) -> dict[str, str]:
    """The columns of a list of mutations by their MAF names; empty when this is no such list."""
    lowered = {name.lower(): name for name in reversed(header)}
    wanted = {"Tumor_Sample_Barcode": _SAMPLE, "Hugo_Symbol": _GENE, "Variant_Classification": _EFFECT}
    found = {ours: next((lowered[name] for name in names if name in lowered), "") for ours, names in wanted.items()}
    return {theirs: ours for ours, theirs in found.items()} if all(found.values()) else {}


def _mutations(path: Path, columns: Mapping[str, str], setting: str, rule: Consequences, codes: Sequence[str]) -> Panel:
    table = read_columns(path, setting, list(columns), comments=False).rename(columns=dict(columns))
    chosen, left_out = require_samples(table["Tumor_Sample_Barcode"].unique(), codes, path, setting)
    notes = {
        "rule_for_samples": rule_for_samples(codes),
        "left_out": left_out,
        "rule_for_no_row": "only samples with a row are known",
    }
    return panel_of_samples(table, chosen, rule, notes)
