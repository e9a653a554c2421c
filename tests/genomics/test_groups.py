"""Gene groups and their columns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphome.cohort.tables import header_of, read_bytes
from morphome.errors import MorphomeError
from morphome.genomics.groups import MOST_NAMES, is_symbol, match_groups, read_groups

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
    assert found["match"]["g"] == {
        **{"asked": 3, "matched_genes": 2, "columns": 3, "panels": {"rna": 2, "cnv": 1, "mut": 0}},
        **{"n_unmatched": 1, "unmatched": ["X"], "n_not_symbols": 0, "not_symbols": []},
    }


def test_min_genes_drops_with_a_reason():
    found = match_groups({"g": ["A"], "h": ["A", "B"], "none": ["Z"]}, {"rna": ["A", "B"]}, min_genes=2)
    assert list(found["groups"]) == ["h"]
    assert set(found["dropped"]) == {"g", "none"} and "0 of 1 genes" in found["dropped"]["none"]
    assert set(found["match"]) == {"g", "h", "none"}


def test_min_genes_counts_genes_and_no_columns():
    panels = {"rna": ["A"], "mut": ["A"], "cnv": ["A"]}
    found = match_groups({"g": ["A", "B"]}, panels, min_genes=2)
    assert found["match"]["g"]["columns"] == 3
    assert found["groups"] == {} and found["dropped"]["g"].startswith("1 of 2 genes matched a column")


def test_counts_for_encoders_make_no_groups():
    with_counts = match_groups({"g": ["A", "B"]}, {"rna": ["A"], "expression": ["A", "B"]})
    assert with_counts == match_groups({"g": ["A", "B"]}, {"rna": ["A"]})
    assert with_counts["match"]["g"]["unmatched"] == ["B"]


def test_what_no_table_has_is_listed_and_no_alias_is_guessed():
    asked = ["tp53", "P53", "18S rRNA", "MARCHF1", "1-Mar", *(f"X{i}" for i in range(40))]
    found = match_groups({"g": asked, "h": ["TP53", "P53"]}, {"rna": ["TP53", "MARCH1"]}, min_genes=0)
    facts = found["match"]["g"]
    assert facts["matched_genes"] == 0 and facts["n_unmatched"] == 43
    assert facts["unmatched"] == ["tp53", "P53", "MARCHF1", *(f"X{i}" for i in range(17))]
    assert len(facts["unmatched"]) == MOST_NAMES
    assert (facts["n_not_symbols"], facts["not_symbols"]) == (2, ["18S rRNA", "1-Mar"])
    overall = found["overall"]  # P53 stands in both groups and is one gene
    assert (overall["asked"], overall["matched_genes"], overall["panels"]) == (46, 1, {"rna": 1})


def test_a_name_that_is_no_symbol_still_matches_its_own_column():
    found = match_groups({"g": ["18S rRNA"]}, {"rna": ["18S rRNA"]})
    assert found["match"]["g"]["n_not_symbols"] == 0 and len(found["groups"]["g"]) == 1


@pytest.mark.parametrize("name", ["TP53", "HLA-DRB1", "C1orf61", "AC092881.1", "7SK", "ENSG00000141510.18", "HOXA@"])
def test_symbols(name):
    assert is_symbol(name)


@pytest.mark.parametrize(
    "name", ["18S rRNA", "EPAS1 (HIF2A)", "UL112/UL113", "1-Mar", "Sep-02", "2020", "", "-", "A,B"]
)
def test_no_symbols(name):
    assert not is_symbol(name)


def test_leading_comment_lines_are_passed_over(tmp_path):
    note = "# six gene families\n# licence: see the source, all rights, reserved\n"
    (tmp_path / "g.csv").write_text(f"{note}one,two\nA,B\n\nC,\n")
    (tmp_path / "g.tsv").write_text(f"{note}one\ttwo\nA\tB\nC\t\n")
    (tmp_path / "g.gmt").write_text(f"{note}one\tx\tA\tC\n# and between\ntwo\tx\tB\n")
    for name in ("g.csv", "g.tsv", "g.gmt"):
        assert read_groups(tmp_path / name) == ({"one": ["A", "C"], "two": ["B"]}, {})
    (tmp_path / "g.csv").write_text(f"{note}one,two\nA\n")
    with pytest.raises(MorphomeError, match="line 4: 1 cells, but the header has 2"):
        read_groups(tmp_path / "g.csv")
    (tmp_path / "g.csv").write_text(note)
    with pytest.raises(MorphomeError, match="empty"):
        read_groups(tmp_path / "g.csv")


def test_row_numbers_of_pandas_are_no_group(tmp_path):
    (tmp_path / "g.csv").write_text(',one\n0,A\n1,"B"\n')
    assert read_groups(tmp_path / "g.csv")[0] == {"one": ["A", "B"]}


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


def columns_of(path):
    """Genes per panel by the endings of the columns, and the columns that have no ending."""
    header, _ = header_of(read_bytes(path, "x"), path, "x")
    ends = {"rna": "_rnaseq", "cnv": "_cnv", "mut": "_mut"}
    panels = {panel: [name[: -len(end)] for name in header if name.endswith(end)] for panel, end in ends.items()}
    return panels, [name for name in header if not name.endswith(tuple(ends.values()))]


def sizes(groups, panels):
    return [facts["columns"] for facts in match_groups(groups, panels, 0)["match"].values()]


def test_real_group_files(shared_data):
    groups, repeated = read_groups(shared_data / "genesets" / "mcat_signatures.csv")
    assert [len(genes) for genes in groups.values()] == [82, 328, 513, 443, 1536, 452]
    assert repeated == {"Cell Differentiation Markers": 9}
    assert match_groups(groups, {})["overall"]["asked"] == 3047
    hallmarks, _ = read_groups(shared_data / "genesets" / "h.all.v7.0.symbols.gmt")
    facts = match_groups(hallmarks, {}, 0)
    assert (len(hallmarks), facts["overall"]["asked"]) == (50, 4384)
    assert sum(group["asked"] for group in facts["match"].values()) == 7322


def test_real_reactome_has_members_that_are_no_genes(shared_data):
    groups, _ = read_groups(shared_data / "genesets" / "ReactomePathways.gmt")
    facts = match_groups(groups, {"rna": ["EGFR"]}, 0)["overall"]
    assert (len(groups), facts["asked"], facts["matched_genes"], facts["n_not_symbols"]) == (1448, 11194, 1, 17)
    assert {"18S rRNA", "SARS coronavirus, complete genome"} <= set(facts["not_symbols"])


@pytest.mark.parametrize(
    ("name", "count", "slots", "genes", "matched"),
    [
        ("hallmarks_signatures", 50, 7110, 4241, 819),
        ("combine_signatures", 331, 9745, 4999, 1577),
        ("xena_signatures", 281, 2635, 1577, 1577),
    ],
)
def test_real_pathways(shared_data, name, count, slots, genes, matched):
    groups, repeated = read_groups(shared_data / "genesets" / "survpath" / f"{name}.csv")
    table = shared_data / "tables" / "survpath" / "rna_xena_blca.csv.gz"
    header, _ = header_of(read_bytes(table, "x"), table, "x")
    found = match_groups(groups, {"rna": header[1:]})
    assert len(groups) == count and not repeated and not found["dropped"]
    assert sum(facts["asked"] for facts in found["match"].values()) == slots
    assert (found["overall"]["asked"], found["overall"]["matched_genes"]) == (genes, matched)


@pytest.mark.parametrize(
    ("cohort", "with_mutations", "without"),
    [
        ("hnsc", [88, 330, 516, 427, 178, 438], [84, 318, 507, 425, 167, 437]),
        ("ucec", [20, 63, 78, 28, 150, 9], [0, 2, 0, 0, 2, 0]),
    ],
)
def test_real_six_families_with_mutations_and_without(shared_data, cohort, with_mutations, without):
    """The sizes of all six tables are asserted with the whole reading, in test_panels.py."""
    groups, _ = read_groups(shared_data / "genesets" / "mcat_signatures.csv")
    panels, _ = columns_of(shared_data / "tables" / "porpoise" / f"tcga_{cohort}_all_clean.csv.zip")
    assert sizes(groups, panels) == with_mutations
    assert sizes(groups, {**panels, "mut": []}) == without


@pytest.mark.parametrize(
    ("table", "asked"),
    [
        ("sig/tcga_blca", [94, 334, 521, 468, 1496, 479]),
        ("sig/tcga_luad", [89, 334, 534, 471, 1510, 482]),
        ("sig/tcga_ucec", [3, 24, 21, 22, 65, 15]),
        ("full/tcga_ucec", [3, 24, 21, 22, 65, 15]),
    ],
)
def test_real_mcat_tables_have_the_published_sizes_and_no_mutations(shared_data, table, asked):
    groups, _ = read_groups(shared_data / "genesets" / "mcat_signatures.csv")
    panels, bare = columns_of(shared_data / "tables" / "mcat" / f"{table}_all_clean.csv.zip")
    assert panels["mut"] == [] and sizes(groups, panels) == asked
    if table.startswith("full"):  # its mutations have bare names: with them the groups are other groups
        assert sizes(groups, {**panels, "mut": bare}) == [58, 226, 361, 204, 853, 96]
