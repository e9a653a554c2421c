"""Mutations from MAF files: one per patient as the GDC hands them out, or one of many samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from morphome.cohort.barcode import TUMOUR_CODES, try_barcode
from morphome.errors import MorphomeError
from morphome.genomics.consequences import Consequences, consequences
from morphome.genomics.panel import Panel
from morphome.genomics.reading import places_of, read_columns
from morphome.genomics.samples import require_samples, rule_for_samples

#: Variants of such a status are no somatic mutations of the tumour.
NOT_SOMATIC = frozenset({"germline", "loh", "none", "wildtype", "redacted"})
_SETTING = "molecular.mut"


def read_mafs(
    files: Mapping[str, Path], rule: Consequences | None = None, sample_codes: Mapping[str, str] | None = None
) -> Panel:
    """0/1 per gene from one MAF per patient: 1 when a variant of the wanted classes is listed.

    A patient whose file has no rows has no mutation (all 0); a patient without a file is absent. Genes are those
    mutated in at least one patient; no filter by frequency (that would be fitted).

    Args:
        files: patient to file.
        rule: which variants count; default protein-changing ones.
        sample_codes: patient to the sample code that the sheet gives to the file ("01"; "" when it does not say).

    Raises:
        MorphomeError: naming the file: damaged, a missing column, or a barcode of another patient or sample code.
    """
    rule = rule or consequences(None)
    hits: dict[str, set[str]] = {}
    gene_ids: dict[str, str] = {}
    for patient, file in files.items():
        table = maf_table(file)
        code = (sample_codes or {}).get(patient, "")
        others = {name for name in table["Tumor_Sample_Barcode"].unique() if not _belongs(name, patient, code)}
        if others:
            raise MorphomeError(
                f"{file}: holds sample {min(others)}, but the sample sheet says patient {patient}"
                + (f", sample code {code}" if code else ""),
                "check molecular.sheet, or download the file again",
            )
        kept = keep_variants(table, rule)
        hits[patient] = set(kept["Hugo_Symbol"])
        gene_ids.update(ensembl_ids(kept))
    rule.check(_SETTING)
    return binary_panel(hits, rule, gene_ids, len(files), {})


def read_one_maf(path: Path, rule: Consequences | None = None, codes: Sequence[str] = TUMOUR_CODES) -> Panel:
    """0/1 per gene from one MAF of many samples; the sample of a patient is chosen by its barcode.

    A patient without any row (silent ones count) is absent: one MAF does not say who was sequenced without a
    finding.

    Args:
        path: the MAF, gzip or not.
        rule: which variants count; default protein-changing ones.
        codes: TCGA sample codes, preferred first.

    Raises:
        MorphomeError: naming the file: missing, damaged, a missing column, no tumour sample.
    """
    rule = rule or consequences(None)
    table = maf_table(path)
    chosen, left_out = require_samples(table["Tumor_Sample_Barcode"].unique(), codes, path, _SETTING)
    return panel_of_samples(table, chosen, rule, {"left_out": left_out, "rule_for_samples": rule_for_samples(codes)})


def panel_of_samples(
    table: pd.DataFrame, chosen: Mapping[str, str], rule: Consequences, notes: dict[str, Any]
) -> Panel:
    """0/1 per gene of the chosen samples of a MAF; a chosen sample without a row has no mutation.

    Args:
        table: as :func:`maf_table` gives it.
        chosen: patient to sample.

    Raises:
        MorphomeError: the rule names a class that nothing knows.
    """
    mine = table["Tumor_Sample_Barcode"].isin(set(chosen.values()))
    kept = keep_variants(table[mine], rule)
    rule.check(_SETTING)
    by_sample = {sample: set(rows) for sample, rows in kept.groupby("Tumor_Sample_Barcode")["Hugo_Symbol"]}
    hits = {patient: by_sample.get(sample, set()) for patient, sample in chosen.items()}
    notes = {**notes, "variants_of_samples_left_out": int((~mine).sum())}
    return binary_panel(hits, rule, ensembl_ids(kept), 1, notes)


def maf_table(path: Path, setting: str = "MAF") -> pd.DataFrame:
    """``Hugo_Symbol``, ``Variant_Classification``, ``Tumor_Sample_Barcode`` (and ``Gene``, ``Mutation_Status``).

    Symbols as in ``ERCC5|aaa`` are cut at the bar.

    Raises:
        MorphomeError: naming the file.
    """
    wanted = ["Hugo_Symbol", "Variant_Classification", "Tumor_Sample_Barcode"]
    table = read_columns(path, setting, wanted, ("Gene", "Mutation_Status"))
    return table.assign(Hugo_Symbol=table["Hugo_Symbol"].str.split("|").str[0].str.strip())


def keep_variants(table: pd.DataFrame, rule: Consequences) -> pd.DataFrame:
    """Rows that make a gene mutated; those passed over are counted in ``rule``."""
    if "Mutation_Status" in table.columns:
        other = table["Mutation_Status"].str.strip().str.lower().isin(NOT_SOMATIC)
        for status, count in table.loc[other, "Mutation_Status"].value_counts().items():
            rule.passed_over[f"status {status}"] += int(count)
        table = table[~other]
    nameless = table["Hugo_Symbol"].isin(("", "Unknown", "?"))
    if nameless.any():
        rule.passed_over["no gene symbol"] += int(nameless.sum())
        table = table[~nameless]
    return table[np.array(rule.tally(table["Variant_Classification"]), bool)]


def ensembl_ids(table: pd.DataFrame) -> dict[str, str]:
    """Symbol to Ensembl ids of the column ``Gene``; empty without one."""
    if "Gene" not in table.columns:
        return {}
    pairs = table.loc[table["Gene"].str.startswith("ENSG"), ["Hugo_Symbol", "Gene"]].drop_duplicates()
    return places_of(pairs["Hugo_Symbol"].to_numpy(str), pairs["Gene"].to_numpy(str))[2] if len(pairs) else {}


def binary_panel(
    hits: Mapping[str, set[str]], rule: Consequences, gene_ids: Mapping[str, str], n_files: int, notes: dict[str, Any]
) -> Panel:
    """Patients x mutated genes, 1 where a patient's set holds the gene."""
    patients = sorted(hits)
    genes = sorted(set().union(*hits.values()))
    place = {gene: number for number, gene in enumerate(genes)}
    values = np.zeros((len(patients), len(genes)), np.float32)
    for row, patient in enumerate(patients):
        values[row, [place[gene] for gene in hits[patient]]] = 1.0
    return Panel(patients, genes, values, "binary", rule.unit, dict(gene_ids), n_files, {**notes, **rule.notes()})


def _belongs(barcode: str, patient: str, code: str) -> bool:
    """False for a barcode of another patient, or of another sample code where both are known."""
    parts = try_barcode(barcode)
    if parts is None or try_barcode(patient) is None:
        return True
    return parts.patient == patient.upper() and (not code or parts.sample_code in ("", code))
