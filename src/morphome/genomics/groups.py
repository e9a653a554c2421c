"""Gene groups: reading them and finding their columns in the molecular tables.

A column is a pair (gene, panel); it belongs to a group when the gene is a member and the panel has the gene.
Columns are sorted by (gene, panel), so that the order does not depend on files. This is the explicit map that
keeps mutations in: looking for "<gene>_mut" in a table with bare gene names finds nothing.

Names are compared letter by letter. Older names and aliases are not guessed: what a group asks for and no table has
is listed, and members that can be no symbol at all ("18S rRNA", "POU5F1 (OCT4)", "1-Mar" as a spreadsheet writes
MARCH1) are counted apart.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from morphome.cohort.slide_sheet import check_utf8, delimiter_of
from morphome.errors import MorphomeError

_SETTING = "molecular.groups.path"
#: Panels whose columns make groups. Counts for encoders (``expression``) are read as a whole.
GROUP_PANELS = ("rna", "mut", "cnv")
#: How many names a list of members without a column shows; their number is always whole.
MOST_NAMES = 20
_PADDING = frozenset({"", "NaN", "nan"})
_SYMBOL = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9][A-Za-z0-9._@-]*")
_MONTH = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"
_DATE = re.compile(rf"\d{{1,4}}-({_MONTH})|({_MONTH})-\d{{1,4}}")


def is_symbol(name: str) -> bool:
    """Whether a text can be a gene's symbol or id: letters, digits and ``. _ @ -`` with a letter among them.

    A date ("1-Mar", "Sep-02") is none: a spreadsheet has put it in a symbol's place.
    """
    return bool(_SYMBOL.fullmatch(name)) and not _DATE.fullmatch(name)


def read_groups(path: Path) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Groups in the order of the file, genes in their order, repeated ones once.

    Args:
        path: ``.gmt`` (name, description, genes; tab separated), else a CSV or TSV with one column per group,
            short columns padded with empty cells or "NaN". Lines at the top that start with "#" (a licence, a
            source) are passed over; in a GMT file everywhere.

    Returns:
        ``{name: genes}``; ``{name: number of repeated entries}`` for groups that had any.

    Raises:
        MorphomeError: naming the file and line: missing, no group, a group without genes or named twice.
    """
    path = Path(path)
    text = _text(path)
    entries = _gmt(text, path) if path.suffix.lower() == ".gmt" else _columns(text, path)
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
        panels: panel name to its genes; panels other than :data:`GROUP_PANELS` are passed over.
        min_genes: a group with fewer genes that have a column is dropped; a gene counts once, however many panels
            have it.

    Returns:
        ``groups``: ``{name: [{"panel", "gene"}, ...]}``; ``match``: ``{name: facts}`` of all groups, with ``asked``
        (genes of the group), ``matched_genes``, ``columns``, ``panels`` (columns per panel), ``n_unmatched`` and
        ``unmatched`` (symbols without a column, the first 20 in the group's order), ``n_not_symbols`` and
        ``not_symbols`` (members without a column that are no symbols, likewise); ``overall``: the same of all groups
        together, every gene once; ``dropped``: ``{name: reason}``.
    """
    known = {panel: set(genes) for panel, genes in panels.items() if panel in GROUP_PANELS}
    content: dict[str, Any] = {"groups": {}, "match": {}, "overall": {}, "dropped": {}}
    for name, genes in groups.items():
        pairs = sorted((gene, panel) for gene in genes for panel, having in known.items() if gene in having)
        facts = content["match"][name] = _facts(genes, known)
        if facts["matched_genes"] < min_genes:
            content["dropped"][name] = (
                f"{facts['matched_genes']} of {len(genes)} genes matched a column, fewer than "
                f"molecular.groups.min_genes = {min_genes}"
            )
        else:
            content["groups"][name] = [{"panel": panel, "gene": gene} for gene, panel in pairs]
    content["overall"] = _facts(dict.fromkeys(gene for genes in groups.values() for gene in genes), known)
    return content


def _facts(genes: Iterable[str], known: Mapping[str, set[str]]) -> dict[str, Any]:
    genes = list(genes)
    per_panel = {panel: sum(gene in having for gene in genes) for panel, having in known.items()}
    lost = [gene for gene in genes if not any(gene in having for having in known.values())]
    symbols = [gene for gene in lost if is_symbol(gene)]
    others = [gene for gene in lost if not is_symbol(gene)]
    return {
        "asked": len(genes),
        "matched_genes": len(genes) - len(lost),
        "columns": sum(per_panel.values()),
        "panels": per_panel,
        "n_unmatched": len(symbols),
        "unmatched": symbols[:MOST_NAMES],
        "n_not_symbols": len(others),
        "not_symbols": others[:MOST_NAMES],
    }


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise MorphomeError(f"{path}: file not found ({_SETTING})", f"check {_SETTING}") from None
    except IsADirectoryError:
        raise MorphomeError(f"{path}: is a folder, not a file of groups ({_SETTING})", "name the file") from None
    check_utf8(raw, path, _SETTING)
    return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def _gmt(text: str, path: Path) -> list[tuple[str, list[str]]]:
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, *rest = line.split("\t")
        if len(rest) < 2 or not name.strip():
            raise MorphomeError(
                f"{path}, line {number}: not a GMT line ({_SETTING})", "name, description and genes, tab separated"
            )
        entries.append((name.strip(), [gene.strip() for gene in rest[1:] if gene.strip()]))
    return entries


def _columns(text: str, path: Path) -> list[tuple[str, list[str]]]:
    lines = text.split("\n")
    skipped = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    body = lines[skipped:]
    if not body or not body[0].strip():
        raise MorphomeError(f"{path}: the table is empty ({_SETTING})", "the first line names the groups")
    reader = csv.reader(io.StringIO("\n".join(body)), delimiter=delimiter_of(body[0], path, _SETTING))
    header = [name.strip() for name in next(reader)]
    members: list[list[str]] = [[] for _ in header]
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise MorphomeError(
                f"{path}, line {skipped + reader.line_num}: {len(cells)} cells, but the header has {len(header)} "
                f"({_SETTING})",
                "pad short columns with empty cells; a cell with a comma stands in double quotes",
            )
        for genes, cell in zip(members, cells, strict=True):
            if cell.strip() not in _PADDING:
                genes.append(cell.strip())
    # An unnamed column is the row number that pandas writes.
    return [(name, genes) for name, genes in zip(header, members, strict=True) if name and name != "Unnamed: 0"]
