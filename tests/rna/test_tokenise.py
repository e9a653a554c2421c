"""The bulk tokeniser: bins against exact fractions, panels, matching."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from morphome.errors import MorphomeError
from morphome.rna.tokenise import BulkTokeniser, Vocabulary, bin_by_rank, match_genes


def slow_bins(values, n_bins):
    """Edges by exact linear interpolation, counted one by one."""
    above = sorted(Fraction(float(v)) for v in values if v > 0)
    edges = []
    for k in range(n_bins - 1):
        place = Fraction(k * (len(above) - 1), n_bins - 2)
        low = math.floor(place)
        high = min(low + 1, len(above) - 1)
        edges.append(above[low] + (above[high] - above[low]) * (place - low))
    out = []
    for value in values:
        x = Fraction(float(value))
        left, right = sum(e <= x for e in edges), sum(e < x for e in edges)
        out.append(0 if value == 0 else math.ceil(Fraction(1, 2) * (right - left) + left))
    return out


@pytest.mark.parametrize("n_bins", [51, 6])
@pytest.mark.parametrize("n", [1, 2, 7, 99, 50])
@pytest.mark.parametrize("ties", ["none", "many", "all"])
def test_bins_agree_with_exact_fractions(n, ties, n_bins):
    random = np.random.default_rng(n)
    values = {"none": random.gamma(0.5, 3, n), "many": random.poisson(2.0, n) * 1.0, "all": np.full(n, 3.0)}[ties]
    values = np.append(values, [0.0, 5.0])
    assert bin_by_rank(values, n_bins).tolist() == slow_bins(values, n_bins)


def test_bins_agree_with_floating_quantiles_where_nothing_lies_on_an_edge():
    x = np.random.default_rng(0).gamma(0.5, 3, 1000)  # 999 gaps: no edge between the outer two falls on a value
    edges = np.quantile(x, np.linspace(0, 1, 50))
    inner = (x > x.min()) & (x < x.max())
    expected = np.ceil(((edges[None] <= x[:, None]).sum(1) + (edges[None] < x[:, None]).sum(1)) / 2)
    np.testing.assert_array_equal(bin_by_rank(x, 51)[inner], expected[inner])
    assert bin_by_rank(x, 51).min() == 1
    assert bin_by_rank(x, 51).max() == 50


def test_a_factor_or_a_logarithm_changes_no_bin():
    x = np.round(np.random.default_rng(1).gamma(0.5, 30, 500))
    bins = bin_by_rank(x, 51)
    for other in (x * 0.1, x / 7.0, np.log1p(x)):
        np.testing.assert_array_equal(bin_by_rank(other, 51), bins)


def test_zeros_are_zero_and_what_was_not_measured_is_marked():
    assert bin_by_rank(np.array([0.0, np.nan, 0.0]), 51).tolist() == [0, -1, 0]


@pytest.mark.parametrize("bad", [-0.1, np.inf])
def test_values_that_are_no_amounts_are_refused(bad):
    with pytest.raises(MorphomeError, match="negative or infinite"):
        bin_by_rank(np.array([1.0, bad]), 51)


@pytest.fixture
def vocabulary():
    names = [*(f"GENE{i}" for i in range(40)), "C1orf1", "ENSG00000000099", "<pad>", "<cls>"]
    return Vocabulary({n: i for i, n in enumerate(names)}, frozenset({"<pad>", "<cls>"}), "<pad>", -2.0, 51)


def test_genes_match_by_symbol_then_case_then_id(vocabulary):
    table = ["GENE3", "gene3", "C1ORF1", "LOST", "NAMELESS", "<cls>", "TWICE"]
    ids = {"NAMELESS": "ENSG00000000099.7", "TWICE": "ENSG00000000099;ENSG00000000098"}
    match = match_genes(table, vocabulary, ids)
    assert dict(zip(match.genes, match.tokens.tolist(), strict=True)) == {"GENE3": 3, "C1ORF1": 40, "NAMELESS": 41}
    assert match.facts == {
        "genes": 7, "exact": 1, "by_case": 1, "by_id": 1, "n_unmatched": 4,
        "unmatched": ["<cls>", "LOST", "TWICE", "gene3"],
    }  # fmt: skip


def test_too_few_matches_are_refused(vocabulary):
    with pytest.raises(MorphomeError, match="2 of 4 genes match"):
        BulkTokeniser(vocabulary, ["GENE1", "GENE2", "A", "B"])
    assert BulkTokeniser(vocabulary, ["GENE1", "GENE2", "GENE3", "A", "B"]).facts["match_rate"] == 0.6


@pytest.mark.parametrize("scope", ["expressed_profile", "panel"])
def test_panels_cover_every_gene_once(vocabulary, scope):
    genes = [f"GENE{i}" for i in range(40)]
    tokeniser = BulkTokeniser(vocabulary, genes, panel_size=15, bin_scope=scope)
    assert [len(p) for p in tokeniser.panels] == [14, 13, 13]
    row = np.arange(40.0)
    panels = tokeniser.encode(tokeniser.rows(row[None])[0])
    assert sorted(t for p in panels for t in p.ids[1:].tolist()) == list(range(40))
    for panel in panels:
        assert (panel.ids[0], panel.values[0]) == (43, -2.0)
        own = row[panel.ids[1:]]
        expected = slow_bins(own, 51) if scope == "panel" else np.array(slow_bins(row, 51))[panel.ids[1:]]
        np.testing.assert_array_equal(panel.values[1:], expected)


def test_the_order_of_the_table_changes_nothing(vocabulary):
    random = np.random.default_rng(3)
    genes, row = [f"GENE{i}" for i in range(40)], random.poisson(3, 40) * 1.0
    order = random.permutation(40)
    first = BulkTokeniser(vocabulary, genes, panel_size=15)
    other = BulkTokeniser(vocabulary, [genes[i] for i in order], panel_size=15)
    pairs = zip(first.encode(first.rows(row[None])[0]), other.encode(other.rows(row[order][None])[0]), strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.values, b.values)


def test_chosen_genes_make_one_panel_with_zeros(vocabulary):
    genes = [f"GENE{i}" for i in range(40)]
    tokeniser = BulkTokeniser(vocabulary, genes, mode="families", chosen=["GENE7", "GENE2", "GENE7", "ELSEWHERE"])
    (panel,) = tokeniser.encode(np.r_[np.zeros(7), 4.0, np.ones(32)])
    assert panel.ids.tolist() == [43, 2, 7]
    assert panel.values.tolist() == [-2.0, 0.0, 50.0]
    assert tokeniser.facts["match_rate"] == pytest.approx(2 / 3)
    with pytest.raises(MorphomeError, match="needs a list of genes"):
        BulkTokeniser(vocabulary, genes, mode="top_variance")


def test_what_was_not_measured_becomes_padding(vocabulary):
    tokeniser = BulkTokeniser(vocabulary, [f"GENE{i}" for i in range(5)])
    (panel,) = tokeniser.encode(np.array([1.0, np.nan, 2.0, 0.0, 3.0]))
    assert panel.padding.tolist() == [False, False, True, False, False, False]
    assert panel.ids.tolist() == [43, 0, 42, 2, 3, 4]
    assert panel.values[2] == -2.0
    with pytest.raises(MorphomeError, match="no gene above zero"):
        tokeniser.encode(np.zeros(5))


def test_another_table_is_aligned_by_token(vocabulary):
    tokeniser = BulkTokeniser(vocabulary, [f"GENE{i}" for i in range(5)])
    columns, rate = tokeniser.align(["GENE4", "gene1", "GENE0", "X"])
    assert (columns.tolist(), rate) == ([2, 1, -1, -1, 0], 0.6)
    with pytest.raises(MorphomeError, match="single cells: 1 of 5"):
        tokeniser.align(["GENE4"])


def test_unknown_rules_are_refused(vocabulary):
    with pytest.raises(MorphomeError, match="genes is one of"):
        BulkTokeniser(vocabulary, ["GENE1"], mode="random")
