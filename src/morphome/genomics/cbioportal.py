"""Molecular profiles of a cBioPortal study folder.

``meta_*.txt`` files say what each data file holds. A profile is one of: a wide matrix (``Hugo_Symbol``,
``Entrez_Gene_Id``, one column per sample), the long form of discrete copy number (one line per gene and sample), or a
MAF. Patients come from the study's table of samples, else from the barcode.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from morphome.cohort.barcode import TUMOUR_CODES
from morphome.cohort.slide_sheet import few_names
from morphome.cohort.tables import read_facts
from morphome.errors import MorphomeError, MorphomeWarning
from morphome.genomics.consequences import Consequences
from morphome.genomics.maf import maf_table, panel_of_samples
from morphome.genomics.matrix import (
    AS_GIVEN,
    RULE_ZSCORE,
    RULES,
    Matrix,
    are_amounts,
    clean_symbols,
    merge_rule,
    merge_symbols,
    value_type_of,
)
from morphome.genomics.panel import Panel
from morphome.genomics.reading import body_of, header_line, read_columns
from morphome.genomics.samples import require_samples, rule_for_samples

#: Panel to the kind of alteration and the forms of it that the panel can be.
_KINDS = {
    "rna": ("MRNA_EXPRESSION", ("CONTINUOUS", "Z-SCORE")),
    "expression": ("MRNA_EXPRESSION", ("CONTINUOUS",)),
    "cnv": ("COPY_NUMBER_ALTERATION", ("DISCRETE", "DISCRETE_LONG", "LOG2-VALUE", "CONTINUOUS")),
    "mut": ("MUTATION_EXTENDED", ("MAF",)),
}
#: Form to value type and unit.
_VALUES = {
    "Z-SCORE": ("zscore", "z-score"),
    "DISCRETE": ("gistic", "GISTIC level, -2 to 2"),
    "DISCRETE_LONG": ("gistic", "GISTIC level, -2 to 2"),
    "LOG2-VALUE": ("log2_ratio", "log2 copy-number ratio"),
}
_LEVELS = (-2.0, -1.5, -1.0, 0.0, 1.0, 2.0)
#: Columns of wide matrices that are no samples.
_ANNOTATION = frozenset({"", "hugo_symbol", "entrez_gene_id", "gene symbol", "locus id", "cytoband"})
#: Names of assays that cover every gene.
_WHOLE = ("WES", "WXS", "WGS", "NA")


@dataclass(frozen=True)
class Profile:
    """One profile of a study: what its meta file says."""

    data: Path
    kind: str
    form: str
    stable_id: str = ""
    description: str = ""


def read_cbioportal(
    path: Path,
    panel: str,
    setting: str,
    *,
    file: str | None = None,
    unit: str | None = None,
    log2: bool = False,
    rule: Consequences,
    codes: Sequence[str] = TUMOUR_CODES,
) -> Panel:
    """A panel from a study folder (or from one data file in it).

    Several samples of a patient: see :func:`morphome.genomics.samples.choose_samples`. Mutations: a patient whose
    sample is listed as sequenced and has no row has no mutation; genes outside the sample's gene panel are not
    measured. Values of rows that share a symbol are summed where they are amounts
    (:func:`morphome.genomics.matrix.are_amounts`), else averaged.

    Args:
        path: folder of the study.
        panel: rna, mut, cnv or expression.
        setting: ``molecular.<panel>``.
        file: name of the data file, where several profiles fit.
        unit: of a profile of form CONTINUOUS; without it the profile's description is the unit.
        log2: the values of RNA are linear; the caller takes their logarithm.
        rule: which variants count.
        codes: TCGA sample codes, preferred first.

    Raises:
        MorphomeError: naming the folder or file: no such profile, several without a choice, or a damaged file.
    """
    folder, file = (path.parent, file or path.name) if path.is_file() else (path, file)
    profile = choose_profile(folder, panel, file, setting)
    patient_of = _patients_of_samples(folder)
    notes: dict[str, Any] = {
        "file": profile.data.name,
        "profile": profile.stable_id,
        "description": profile.description,
        "rule_for_samples": rule_for_samples(codes),
    }
    if panel == "mut":
        return _mutations(folder, profile, patient_of, rule, codes, setting, notes)
    value_type, words = _VALUES.get(profile.form, ("as_given", ""))
    unit = words or unit or profile.description or AS_GIVEN
    value_type = value_type_of(unit) if value_type == "as_given" else value_type
    if value_type == "zscore":
        notes["rule_for_values"] = RULE_ZSCORE
    matrix = Matrix(profile.data, setting)
    lowered = [name.lower() for name in matrix.header]
    read = _long if {"sample_id", "value"} <= set(lowered) else _wide
    symbols, samples, values = read(matrix, lowered, patient_of, codes, setting, notes)
    if value_type == "gistic" and not np.isin(values[~np.isnan(values)], _LEVELS).all():
        raise MorphomeError(
            f"{profile.data}: values other than -2, -1.5, -1, 0, 1, 2 in a profile of form {profile.form} ({setting})",
            "correct the meta file of the study, or name another file",
        )
    merge, offset = merge_rule(value_type, unit, linear=are_amounts(panel, value_type, unit, values, log2))
    clean, cut, empty = clean_symbols(symbols)
    named = clean != ""
    genes, merged, repeated = merge_symbols(clean[named].astype(str), values[named], merge, offset)
    notes |= {
        "rule_for_symbols": RULES[merge],
        "symbols_repeated": repeated,
        "symbols_cut_at_bar": cut,
        "rows_without_symbol": empty,
    }
    return Panel(list(samples), genes, merged, value_type, unit, {}, 1, notes)


def choose_profile(folder: Path, panel: str, file: str | None, setting: str) -> Profile:
    """The one profile of a study that serves a panel.

    Raises:
        MorphomeError: none, several without a choice, a data file that is not there, or a file of another kind.
    """
    kind, forms = _KINDS[panel]
    metas = sorted(folder.glob("meta_*.txt"))
    known = [profile for meta in metas if (profile := _profile(meta)) is not None]
    if file is not None:
        named = folder / file
        if not named.is_file():
            there = sorted(place.name for place in folder.glob("data_*"))
            raise MorphomeError(
                f"{named}: not found ({setting}.file); the study has {few_names(there) or 'no data files'}",
                f"correct {setting}.file",
            )
        mine = [profile for profile in known if profile.data.name == file]
        wrong = [profile for profile in mine if profile.kind != kind or profile.form not in forms]
        if wrong:
            raise MorphomeError(
                f"{named}: holds {wrong[0].kind}, {wrong[0].form}, which is no {panel} table ({setting}.file)",
                f"name a file of {kind} with one of {', '.join(forms)}",
            )
        return mine[0] if mine else Profile(named, kind, "")
    fitting = [profile for profile in known if profile.kind == kind and profile.form in forms]
    if not fitting:
        raise MorphomeError(
            f"{folder}: no profile of {kind} ({', '.join(forms)}) among its {len(metas)} meta files ({setting})",
            f"check {setting}.path, name the data file in {setting}.file, or leave {setting} out",
        )
    if len(fitting) > 1:
        listed = "; ".join(f"{profile.data.name} ({profile.form})" for profile in fitting)
        raise MorphomeError(
            f"{folder}: {len(fitting)} profiles fit {setting}: {listed}", f"name one of them in {setting}.file"
        )
    if not fitting[0].data.is_file():
        raise MorphomeError(
            f"{fitting[0].data}: not found, but the study's meta files name it ({setting})", "download the whole study"
        )
    return fitting[0]


def _profile(meta: Path) -> Profile | None:
    facts = read_facts(meta)
    if not facts.get("data_filename"):
        return None
    return Profile(
        meta.parent / facts["data_filename"],
        facts.get("genetic_alteration_type", ""),
        facts.get("datatype", ""),
        facts.get("stable_id", ""),
        facts.get("profile_description", ""),
    )


def _patients_of_samples(folder: Path) -> dict[str, str]:
    """Sample to patient, from the study's clinical files that name both."""
    owners: dict[str, str] = {}
    for file in sorted(folder.glob("data_clinical*.txt")):
        if {"PATIENT_ID", "SAMPLE_ID"} <= set(header_line(body_of(file, "cBioPortal samples"))):
            table = read_columns(file, "cBioPortal samples", ["PATIENT_ID", "SAMPLE_ID"])
            owners.update(zip(table["SAMPLE_ID"].str.strip(), table["PATIENT_ID"].str.strip(), strict=True))
    return {sample: patient for sample, patient in owners.items() if sample and patient}


def _wide(
    matrix: Matrix,
    lowered: list[str],
    patient_of: dict[str, str],
    codes: Sequence[str],
    setting: str,
    notes: dict[str, Any],
) -> tuple[list[str], dict[str, str], np.ndarray]:
    """Symbols of the rows, patient to sample, float32 (rows, patients)."""
    column = _symbol_column(matrix, lowered, setting)
    places = {name: place for place, name in enumerate(matrix.header) if lowered[place] not in _ANNOTATION}
    chosen, notes["left_out"] = require_samples(places, codes, matrix.path, setting, patient_of)
    symbols = matrix.names(column)
    return symbols, chosen, matrix.numbers([places[sample] for sample in chosen.values()], symbols)


def _long(
    matrix: Matrix,
    lowered: list[str],
    patient_of: dict[str, str],
    codes: Sequence[str],
    setting: str,
    notes: dict[str, Any],
) -> tuple[list[str], dict[str, str], np.ndarray]:
    """As :func:`_wide`, from one line per gene and sample; cells without a line are not measured."""
    symbols = np.array(matrix.names(_symbol_column(matrix, lowered, setting)), dtype=str)
    samples = np.array(matrix.names(lowered.index("sample_id")), dtype=str)
    cells = matrix.numbers([lowered.index("value")], symbols.tolist())[:, 0]
    chosen, notes["left_out"] = require_samples(samples.tolist(), codes, matrix.path, setting, patient_of)
    place = {sample: number for number, sample in enumerate(chosen.values())}
    mine = np.array([sample in place for sample in samples], bool) & ~np.isnan(cells)
    names, rows = np.unique(symbols[mine], return_inverse=True)
    columns = np.array([place[sample] for sample in samples[mine]], dtype=np.int64)
    cells = cells[mine]
    values = np.full((len(names), len(place)), np.nan, np.float32)
    values[rows, columns] = cells
    differ = np.flatnonzero(values[rows, columns] != cells)
    if differ.size:
        row = int(differ[0])
        raise MorphomeError(
            f"{matrix.path}: two values of {names[rows[row]]} for sample {samples[mine][row]} ({setting})",
            "keep one line per gene and sample",
        )
    return names.tolist(), chosen, values


def _symbol_column(matrix: Matrix, lowered: list[str], setting: str) -> int:
    for name in ("hugo_symbol", "gene symbol"):
        if name in lowered:
            return lowered.index(name)
    raise MorphomeError(
        f"{matrix.path}: no column 'Hugo_Symbol' ({setting}); the columns are {few_names(matrix.header, 3)}",
        "a profile of cBioPortal names its genes in that column",
    )


def _mutations(
    folder: Path,
    profile: Profile,
    patient_of: dict[str, str],
    rule: Consequences,
    codes: Sequence[str],
    setting: str,
    notes: dict[str, Any],
) -> Panel:
    table = maf_table(profile.data, setting)
    listed = _sequenced(folder)
    notes["rule_for_no_row"] = (
        "a sample listed as sequenced has no mutation" if listed else "only samples with a row are known"
    )
    samples = {*table["Tumor_Sample_Barcode"].unique(), *listed}
    chosen, notes["left_out"] = require_samples(samples, codes, profile.data, setting, patient_of)
    panel = panel_of_samples(table, chosen, rule, notes)
    panel.notes["patients_without_row"] = len(set(chosen.values()) - set(table["Tumor_Sample_Barcode"]))
    _mask_outside_panels(panel, folder, profile, chosen)
    return panel


def _sequenced(folder: Path) -> list[str]:
    """Samples of the case list of sequenced samples; empty without one."""
    for file in sorted((folder / "case_lists").glob("*.txt")):
        facts = read_facts(file)
        if file.name == "cases_sequenced.txt" or facts.get("stable_id", "").endswith("_sequenced"):
            return facts.get("case_list_ids", "").split()
    return []


def _mask_outside_panels(panel: Panel, folder: Path, profile: Profile, chosen: dict[str, str]) -> None:
    """Set genes outside a sample's gene panel to NaN: they were not looked at."""
    file = folder / "data_gene_panel_matrix.txt"
    if not file.is_file() or profile.stable_id not in header_line(body_of(file, "gene panels")):
        return
    table = read_columns(file, "gene panels", ["SAMPLE_ID", profile.stable_id])
    used = dict(zip(table["SAMPLE_ID"], table[profile.stable_id].str.strip(), strict=True))
    lists = [read_facts(place) for place in sorted(folder.glob("*gene_panel*.txt")) if place != file]
    covered = {facts["stable_id"]: set(facts["gene_list"].split()) for facts in lists if "gene_list" in facts}
    unknown: set[str] = set()
    masked = 0
    for row, patient in enumerate(panel.patients):
        name = used.get(chosen[patient], "NA")
        if name in covered:
            outside = np.array([gene not in covered[name] for gene in panel.genes], bool) & (panel.values[row] == 0)
            panel.values[row, outside] = np.nan
            masked += 1
        elif not name.upper().startswith(_WHOLE):
            unknown.add(name)
    panel.notes["patients_with_gene_panel"] = masked
    if unknown:
        warnings.warn(
            MorphomeWarning(
                f"{file}: gene panels {few_names(sorted(unknown))} are not in the study folder; genes outside them "
                "are taken as not mutated"
            ),
            stacklevel=2,
        )
