"""Bulk expression as tokens for scGPT, without any chance in it.

A patient's amounts (TPM or counts) become bins by rank, for a fixed panel of genes with zeros included. scGPT's own
tokeniser draws a random share of the genes that are not zero, and a random bin where values tie; here the genes are
chosen by a rule and the draw is replaced by its middle (r = 1/2).

Bins follow from ranks alone and are counted in whole numbers, so that neither a factor on all values nor the order of
a table's columns changes them.

Reference: Cui et al. 2024, scGPT, Nature Methods 21 (value binning).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from morphome.errors import MorphomeError

GENES = ("families", "disjoint_panels", "top_variance")
BIN_SCOPES = ("expressed_profile", "panel")
#: Least share of genes that must be found on the other side.
LEAST_MATCH = 0.60
CLS = "<cls>"
_N_SHOWN = 20
_AMOUNTS = "give counts or TPM (molecular.expression); z-scores and logarithms have no bins"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of a checkpoint.

    Attributes:
        ids: symbol to row of the embedding, special tokens included.
        special: names of the tokens that are no genes.
        pad: name of the token that stands for nothing.
        pad_value: value of ``<cls>`` and of padding.
        n_bins: number of values, zero included: non-zero values fall into 1 ... n_bins - 1.
    """

    ids: Mapping[str, int]
    special: frozenset[str]
    pad: str
    pad_value: float
    n_bins: int

    @property
    def genes(self) -> dict[str, int]:
        """Tokens that are genes."""
        return {name: number for name, number in self.ids.items() if name not in self.special}


@dataclass(frozen=True)
class Match:
    """Columns of a table that have a token, by rising token.

    Attributes:
        columns, tokens: (m,) int64.
        genes: names as the table has them, (m,).
        facts: ``genes`` of the table, ``exact``, ``by_case``, ``by_id``, ``n_unmatched``, ``unmatched`` (the first
            20).
    """

    columns: np.ndarray
    tokens: np.ndarray
    genes: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """Tokens of one patient and one panel; ``<cls>`` stands first.

    Attributes:
        ids: (L,) int64.
        values: (L,) float32: bins, and ``pad_value`` at ``<cls>`` and where a gene was not measured.
        padding: (L,) bool, True where nothing was measured.
    """

    ids: np.ndarray
    values: np.ndarray
    padding: np.ndarray


def bin_by_rank(values: np.ndarray, n_bins: int) -> np.ndarray:
    """Bins of one sample: 0 for zero, 1 ... n_bins - 1 for the others by their rank among the values above zero.

    With the edges e_k = quantile k / (n_bins - 2), k = 0 ... n_bins - 2, of the values above zero (linear
    interpolation), left = #{e <= x} and right = #{e < x}, the bin is ceil((left + right) / 2). An edge at place
    h = k (n - 1) / (n_bins - 2) of the sorted values lies at or below x where h is at or below the last place that x
    takes, and below x where h is below its first place; so the counts need no edge, only whole numbers.

    Args:
        values: (n,) amounts, NaN = not measured.
        n_bins: 51 as published.

    Returns:
        (n,) int64; -1 where not measured.

    Raises:
        MorphomeError: a value is negative or infinite.
    """
    values = np.asarray(values, dtype=np.float64)
    measured = ~np.isnan(values)
    known = values[measured]
    if known.size and (known.min() < 0 or np.isinf(known).any()):
        raise MorphomeError(f"{int((known < 0).sum())} values of the sample are negative or infinite", _AMOUNTS)
    out = np.where(measured, 0, -1).astype(np.int64)
    above = measured & (values > 0)
    x = values[above]
    if not x.size:
        return out
    ranked = np.sort(x)
    first, last = np.searchsorted(ranked, x, "left"), np.searchsorted(ranked, x, "right") - 1
    steps, gaps = n_bins - 2, len(x) - 1
    if gaps == 0:
        left, right = np.array([steps + 1]), np.array([0])
    else:
        left, right = steps * last // gaps + 1, -(-steps * first // gaps)
    out[above] = (left + right + 1) // 2
    return out


def match_genes(genes: Sequence[str], vocabulary: Vocabulary, gene_ids: Mapping[str, str] | None = None) -> Match:
    """Columns that have a token: the same symbol; else the only one that differs in small and capital letters alone;
    else the Ensembl id (without version), where the table has ids and the vocabulary is one of ids.

    No alias is guessed. A token is given to one column only, a better match first.

    Args:
        genes: symbols of the table, unique.
        gene_ids: symbol to Ensembl ids, joined by ";".
    """
    tokens = vocabulary.genes
    folded: dict[str, list[str]] = {}
    for name in tokens:
        folded.setdefault(name.casefold(), []).append(name)
    alone = {key: names[0] for key, names in folded.items() if len(names) == 1}
    found: dict[int, int] = {}
    taken: set[int] = set()
    counts = dict.fromkeys(("exact", "by_case", "by_id"), 0)

    def by_id(gene: str) -> int | None:
        ids = [part.partition(".")[0] for part in (gene_ids or {}).get(gene, "").split(";") if part]
        # Values of several genes under one symbol were added up: they are those of no single id.
        return tokens.get(ids[0]) if len(ids) == 1 else None

    ways = {"exact": tokens.get, "by_case": lambda gene: tokens.get(alone.get(gene.casefold(), "")), "by_id": by_id}
    for way, ask in ways.items():
        # In the order of the names, so that the order of the table has no say in who comes first.
        for column in sorted(range(len(genes)), key=lambda c: genes[c]):
            token = ask(genes[column])
            if column not in found and token is not None and token not in taken:
                found[column] = token
                taken.add(token)
                counts[way] += 1
    order = sorted(found, key=found.__getitem__)
    lost = sorted(gene for column, gene in enumerate(genes) if column not in found)
    facts = {"genes": len(genes), **counts, "n_unmatched": len(lost), "unmatched": lost[:_N_SHOWN]}
    return Match(
        np.array(order, dtype=np.int64),
        np.array([found[column] for column in order], dtype=np.int64),
        tuple(genes[column] for column in order),
        facts,
    )


def check_match(matched: int, asked: int, what: str) -> float:
    """Share of genes that were found.

    Args:
        what: names both sides, for the message.

    Raises:
        MorphomeError: less than :data:`LEAST_MATCH`.
    """
    rate = matched / asked if asked else 0.0
    if rate < LEAST_MATCH:
        raise MorphomeError(
            f"{what}: {matched} of {asked} genes match ({rate:.0%}); at least {LEAST_MATCH:.0%} are needed",
            "give HGNC symbols of protein-coding genes, not Ensembl ids, probe names or another species",
        )
    return rate


class BulkTokeniser:
    """Turns a patient's amounts into the tokens of one panel, or of several panels that share no gene.

    Args:
        vocabulary: of the checkpoint.
        genes: symbols of the bulk table, unique.
        gene_ids: symbol to Ensembl ids, where the table has them.
        mode: ``families`` or ``top_variance``: one panel of the genes in ``chosen``; ``disjoint_panels``: every
            gene with a token, in as few panels of nearly equal size as ``panel_size`` allows.
        chosen: the genes of the one panel. A list that was found from values (top variance) must come from training
            patients; this class fits nothing.
        panel_size: most genes of a panel (``disjoint_panels``); scGPT was trained on 1,199 and ``<cls>``.
        bin_scope: ``expressed_profile``: bins among all values of the patient that have a token, as upstream;
            ``panel``: among the genes of each panel.

    Attributes:
        match: the columns of the table that have a token.
        panels: per panel the places in ``match``.
        facts: match rate and panels, for the record.

    Raises:
        MorphomeError: too few genes match, or no gene was chosen.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        genes: Sequence[str],
        gene_ids: Mapping[str, str] | None = None,
        *,
        mode: str = "disjoint_panels",
        chosen: Sequence[str] = (),
        panel_size: int = 1199,
        bin_scope: str = "expressed_profile",
    ) -> None:
        if mode not in GENES or bin_scope not in BIN_SCOPES:
            raise MorphomeError(
                f"genes '{mode}', bin_scope '{bin_scope}'", f"genes is one of {GENES}, bin_scope one of {BIN_SCOPES}"
            )
        self.vocabulary, self.bin_scope = vocabulary, bin_scope
        self.match = match_genes(genes, vocabulary, gene_ids)
        self.panels = self._chosen(mode, chosen) if mode != "disjoint_panels" else self._disjoint(panel_size)
        asked = len(set(chosen)) if mode != "disjoint_panels" else len(genes)
        used = sum(len(panel) for panel in self.panels)
        what = "gene groups, expression table and vocabulary" if chosen else "expression table and vocabulary"
        self.facts: dict[str, Any] = {
            "match_rate": check_match(used, asked, what),
            "match": self.match.facts,
            "genes": mode,
            "genes_asked": asked,
            "genes_used": used,
            "panels": len(self.panels),
            "bin_scope": bin_scope,
            "bins": f"{vocabulary.n_bins - 1} by rank within the sample, r = 1/2, zero is 0",
        }

    def _chosen(self, mode: str, chosen: Sequence[str]) -> list[np.ndarray]:
        if not chosen:
            raise MorphomeError(
                f"molecular.encoder.genes: {mode} needs a list of genes, and there is none",
                "configure molecular.groups, or set molecular.encoder.genes: disjoint_panels",
            )
        wanted = set(chosen)
        return [np.array([place for place, gene in enumerate(self.match.genes) if gene in wanted], dtype=np.int64)]

    def _disjoint(self, size: int) -> list[np.ndarray]:
        if not self.match.genes:
            return []
        # Symbols in the order of a hash: families with alike names (ZNF..., OR...) spread over the panels.
        shuffled = sorted(
            range(len(self.match.genes)), key=lambda place: hashlib.sha256(self.match.genes[place].encode()).digest()
        )
        parts = np.array_split(np.array(shuffled, dtype=np.int64), -(-len(shuffled) // size))
        return [np.sort(part) for part in parts]

    def rows(self, values: np.ndarray) -> np.ndarray:
        """Values (n, genes of the bulk table) at the genes with a token, (n, m)."""
        return values[:, self.match.columns]

    def align(self, genes: Sequence[str], gene_ids: Mapping[str, str] | None = None) -> tuple[np.ndarray, float]:
        """Columns of another table (single cells) for the genes of this one, and the share of panel genes it has.

        Returns:
            (m,) int64 with -1 where the other table lacks the gene; the share.

        Raises:
            MorphomeError: it lacks too many of the genes that the panels hold.
        """
        other = match_genes(genes, self.vocabulary, gene_ids)
        column_of = dict(zip(other.tokens.tolist(), other.columns.tolist(), strict=True))
        columns = np.array([column_of.get(token, -1) for token in self.match.tokens.tolist()], dtype=np.int64)
        used = np.concatenate(self.panels)
        rate = check_match(int((columns[used] >= 0).sum()), len(used), "genes of the panels and of the single cells")
        return columns, rate

    def encode(self, row: np.ndarray) -> list[Panel]:
        """Tokens of one patient, panel by panel; all patients have the same genes in the same order.

        Args:
            row: (m,) amounts as :meth:`rows` gives them; NaN = not measured.

        Raises:
            MorphomeError: a negative value, or no value at all.
        """
        row = np.asarray(row, dtype=np.float64)
        if not (row > 0).any():
            raise MorphomeError("a sample has no gene above zero", "remove it from the expression table")
        n_bins = self.vocabulary.n_bins
        whole = bin_by_rank(row, n_bins) if self.bin_scope == "expressed_profile" else None
        return [
            self._panel(places, bin_by_rank(row[places], n_bins) if whole is None else whole[places])
            for places in self.panels
        ]

    def _panel(self, places: np.ndarray, bins: np.ndarray) -> Panel:
        vocabulary = self.vocabulary
        lost = np.concatenate([[False], bins < 0])
        ids = np.concatenate([[vocabulary.ids[CLS]], self.match.tokens[places]])
        values = np.concatenate([[vocabulary.pad_value], bins])
        return Panel(
            np.where(lost, vocabulary.ids[vocabulary.pad], ids).astype(np.int64),
            np.where(lost, vocabulary.pad_value, values).astype(np.float32),
            lost,
        )
