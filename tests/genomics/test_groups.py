"""Gene groups and their columns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphome.errors import MorphomeError
from morphome.genomics.groups import match_groups, read_groups

GENES = st.lists(st.sampled_from("ABCDEFGH"), max_size=8)


def test_gmt_and_columns_agree(tmp_path):
    (tmp_path / "g.gmt").write_text("one/1\tx\tB\tA\tB\ntwo\t\tC\n\n")
    (tmp_path / "g.csv").write_text("one/1,two\nB,C\nA,NaN\nB,\n")
    expected = ({"one/1": ["B", "A"], "two": ["C"]}, {"one/1": 1})
    assert read_groups(tmp_path / "g.gmt") == expected
    assert read_groups(tmp_path / "g.csv") == expected


def test_columns_are_pairs_sorted_by_gene_and_panel():
    found = match_groups({"g": ["B", "A", "X"]}, {"rna": ["A", "B"], "cnv": ["B"], "mut": ["C"]})
    assert found["groups"] == {
        "g": [{"panel": "rna", "gene": "A"}, {"panel": "cnv", "gene": "B"}, {"panel": "rna", "gene": "B"}]
    }
    assert found["match"] == {"g": {"asked": 3, "matched_genes": 2, "columns": 3}}


def test_min_genes_drops_with_a_reason():
    found = match_groups({"g": ["A"], "h": ["A", "B"], "none": ["Z"]}, {"rna": ["A", "B"]}, min_genes=2)
    assert list(found["groups"]) == ["h"]
    assert set(found["dropped"]) == {"g", "none"} and "0 of 1 genes" in found["dropped"]["none"]
    assert set(found["match"]) == {"g", "h", "none"}


@given(group=GENES, rna=GENES, mut=GENES)
def test_a_column_belongs_iff_its_panel_has_the_gene(group, rna, mut):
    group = list(dict.fromkeys(group))
    panels = {"rna": rna, "mut": mut}
    columns = match_groups({"g": group}, panels, min_genes=0)["groups"]["g"]
    pairs = [(column["gene"], column["panel"]) for column in columns]
    assert pairs == sorted(set(pairs))
    assert set(pairs) == {(gene, panel) for gene in group for panel in panels if gene in panels[panel]}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("g.gmt", "one\tx\n", "line 1: not a GMT line"),
        ("g.gmt", "one\tx\tA\none\tx\tB\n", "'one' occurs twice"),
        ("g.gmt", "", "no gene group"),
        ("g.gmt", "one\tx\t\t\n", "'one' has no genes"),
        ("g.csv", "one,one\nA,B\n", "'one' occurs twice"),
        ("g.csv", "one,two\nA,\n", "'two' has no genes"),
        ("g.csv", "", "empty"),
        ("g.csv", "one;two\nA;B\n", "semicolons"),
    ],
)
def test_bad_group_files_are_named(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(MorphomeError, match=words) as caught:
        read_groups(path)
    assert str(path) in str(caught.value)
    with pytest.raises(MorphomeError, match="not found"):
        read_groups(tmp_path / f"missing.{name}")


def test_real_group_files(shared_data):
    groups, repeated = read_groups(shared_data / "genesets" / "mcat_signatures.csv")
    assert [len(genes) for genes in groups.values()] == [82, 328, 513, 443, 1536, 452]
    assert repeated == {"Cell Differentiation Markers": 9}
    hallmarks, _ = read_groups(shared_data / "genesets" / "h.all.v7.0.symbols.gmt")
    assert len(hallmarks) == 50
    assert len({gene for genes in hallmarks.values() for gene in genes}) > 4000
