"""Gene groups: reading them and finding their columns in the molecular tables.

A column is a pair (gene, panel); it belongs to a group when the gene is a member and the panel has the gene.
Columns are sorted by (gene, panel), so that the order does not depend on files. This is the explicit map that
keeps mutations in: looking for "<gene>_mut" in a table with bare gene names finds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morphome.cohort.slide_sheet import check_utf8, read_rows
from morphome.errors import MorphomeError

_SETTING = "molecular.groups.path"


def read_groups(path: Path) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Groups in the order of the file, genes in their order, repeated ones once.

    Args:
        path: ``.gmt`` (name, description, genes; tab separated), else a CSV or TSV with one column per group,
            short columns padded with empty cells or "NaN".

    Returns:
        ``{name: genes}``; ``{name: number of repeated entries}`` for groups that had any.

    Raises:
        MorphomeError: naming the file and line: missing, no group, a group without genes or named twice.
    """
    path = Path(path)
    entries = _gmt(path) if path.suffix.lower() == ".gmt" else _columns(path)
    groups: dict[str, list[str]] = {}
    repeated: dict[str, int] = {}
    for name, genes in entries:
        if name in groups:
            raise MorphomeError(f"{path}: group '{name}' occurs twice ({_SETTING})", "rename one of them")
        if not genes:
            raise MorphomeError(f"{path}: group '{name}' has no genes ({_SETTING})", "remove it")
        groups[name] = list(dict.fromkeys(genes))
        if len(groups[name]) < len(genes):
            repeated[name] = len(genes) - len(groups[name])
    if not groups:
        raise MorphomeError(f"{path}: no gene group ({_SETTING})", "check the file")
    return groups, repeated


def match_groups(
    groups: Mapping[str, Sequence[str]], panels: Mapping[str, Sequence[str]], min_genes: int = 1
) -> dict[str, Any]:
    """Columns of every group.

    Args:
        groups: name to genes (unique within a group; groups may overlap).
        panels: panel name to its genes.
        min_genes: a group with fewer matched columns is dropped.

    Returns:
        ``groups``: ``{name: [{"panel", "gene"}, ...]}``; ``match``: ``{name: {"asked", "matched_genes",
        "columns"}}`` of all groups; ``dropped``: ``{name: reason}``.
    """
    known = {panel: set(genes) for panel, genes in panels.items()}
    content: dict[str, Any] = {"groups": {}, "match": {}, "dropped": {}}
    for name, genes in groups.items():
        pairs = sorted((gene, panel) for gene in genes for panel, having in known.items() if gene in having)
        content["match"][name] = {
            "asked": len(genes),
            "matched_genes": len({gene for gene, _ in pairs}),
            "columns": len(pairs),
        }
        if len(pairs) < min_genes:
            content["dropped"][name] = (
                f"{len(pairs)} of {len(genes)} genes matched a column, fewer than "
                f"molecular.groups.min_genes = {min_genes}"
            )
        else:
            content["groups"][name] = [{"panel": panel, "gene": gene} for gene, panel in pairs]
    return content


def _gmt(path: Path) -> list[tuple[str, list[str]]]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise MorphomeError(f"{path}: file not found ({_SETTING})", f"check {_SETTING}") from None
    check_utf8(raw, path, _SETTING)
    text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name, *rest = line.rstrip("\r").split("\t")
        if len(rest) < 2 or not name.strip():
            raise MorphomeError(
                f"{path}, line {number}: not a GMT line ({_SETTING})", "name, description and genes, tab separated"
            )
        entries.append((name.strip(), [gene.strip() for gene in rest[1:] if gene.strip()]))
    return entries


def _columns(path: Path) -> list[tuple[str, list[str]]]:
    header, rows = read_rows(path, _SETTING)
    names = [name for name in header if name and name != "Unnamed: 0"]
    return [(name, [row[name] for row in rows if row[name] not in ("", "NaN", "nan")]) for name in names]
