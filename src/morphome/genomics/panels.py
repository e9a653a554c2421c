"""Step ``genes``: molecular tables in one shape, and the gene groups that models read from them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from morphome.cohort.barcode import TUMOUR_CODES
from morphome.cohort.slide_sheet import few_names
from morphome.errors import MorphomeError, MorphomeWarning
from morphome.files import write_json, write_parquet
from morphome.genomics.groups import GROUP_PANELS, match_groups, read_groups
from morphome.genomics.sources import read_panel

#: ``expression`` is for encoders of RNA only: no gene group reads it.
PANELS = ("rna", "mut", "cnv", "expression")


def run_genes(*, settings: Mapping[str, Any], panels_out: Mapping[str, Path], groups_out: Path | None) -> None:
    """Read the configured molecular tables and gene groups.

    Args:
        settings: ``{"molecular": {"sheet", "rna", "mut", "cnv", "expression", "groups"}, "cohort":
            {"sample_types"}}`` as configured; without sample types those of the barcode module.
        panels_out: panel name to ``morphome.panel``: ``patient_id`` and one float32 column per gene symbol,
            sorted; NaN = not measured; patients without a file are absent. Extra: ``panel``, ``value_type``,
            ``unit``, ``gene_ids``, ``n_files``, ``format``, ``source``, ``sample_types``, ``notes`` (with
            ``rule_for_samples``, ``left_out`` and the format's own counts).
        groups_out: ``morphome.groups`` (see :func:`morphome.genomics.groups.match_groups`); without configured
            groups its ``groups`` are empty.

    Raises:
        MorphomeError: naming the file or key: a table that cannot be read, or no group with a column.
        ValueError: ``panels_out`` does not name exactly the configured panels.
    """
    molecular = settings["molecular"]
    configured = [panel for panel in PANELS if panel in molecular]
    if set(configured) != set(panels_out):
        raise ValueError(f"panels configured: {configured}, outputs asked: {sorted(panels_out)}")
    sheet = Path(molecular["sheet"]) if "sheet" in molecular else None
    codes = tuple(settings.get("cohort", {}).get("sample_types", TUMOUR_CODES))
    genes: dict[str, list[str]] = {}
    patients: dict[str, list[str]] = {}
    for name in configured:
        panel = read_panel(name, molecular[name], sheet, codes)
        table = pd.DataFrame(panel.values, columns=panel.genes, copy=False)
        table.insert(0, "patient_id", panel.patients)
        extra = {
            "panel": name,
            "value_type": panel.value_type,
            "unit": panel.unit,
            "gene_ids": panel.gene_ids,
            "n_files": panel.n_files,
            "format": molecular[name]["format"],
            "source": molecular[name]["path"],
            "sample_types": list(codes),
            "notes": panel.notes,
        }
        write_parquet(table, panels_out[name], "morphome.panel", settings, extra)
        if name in GROUP_PANELS:
            genes[name], patients[name] = panel.genes, panel.patients
    if groups_out is not None:
        write_json(_groups(molecular, genes, patients), groups_out, "morphome.groups", settings)


def _groups(
    molecular: Mapping[str, Any], genes: Mapping[str, list[str]], patients: Mapping[str, list[str]]
) -> dict[str, Any]:
    if "groups" not in molecular:
        return {"groups": {}, "match": {}, "overall": {}, "dropped": {}, "source": None, "repeated": {}}
    path, min_genes = molecular["groups"]["path"], molecular["groups"]["min_genes"]
    groups, repeated = read_groups(Path(path))
    content = match_groups(groups, genes, min_genes)
    if not content["groups"]:
        asked = {gene: None for members in groups.values() for gene in members}
        having = "; ".join(f"{panel}: {few_names(names, 3)}" for panel, names in genes.items())
        turned = [panel for panel, ids in patients.items() if any(name in asked for name in ids)]
        wanted = f"{min_genes} gene" + ("" if min_genes == 1 else "s")
        raise MorphomeError(
            f"{path}: no group has {wanted} with a column in the molecular tables; "
            f"the groups ask for {few_names(asked, 3)}; the tables have {having or 'nothing'}",
            f"the rows of molecular.{turned[0]} are genes: turn the table, one row per patient"
            if turned
            else "write gene symbols alike in both, or lower molecular.groups.min_genes",
        )
    if dropped := content["dropped"]:
        reasons = "; ".join(f"'{name}': {reason}" for name, reason in list(dropped.items())[:3])
        more = f"; and {len(dropped) - 3} more (groups.json says why)" if len(dropped) > 3 else ""
        said = f"{len(dropped)} of {len(groups)} gene groups dropped: {reasons}{more}"
        warnings.warn(MorphomeWarning(said), stacklevel=2)
    return {**content, "source": path, "repeated": repeated}
