"""Step genes: panels of single tables, and the whole step."""

from __future__ import annotations

import json

import numpy as np
import pytest

from morphome.errors import MorphomeError, MorphomeWarning
from morphome.files import parquet_meta, read_json, read_parquet
from morphome.genomics.groups import match_groups, read_groups
from morphome.genomics.panels import run_genes
from morphome.genomics.sources import read_panel

PORPOISE = (
    "Unnamed: 0,case_id,slide_id,survival_months,censorship,GB_rnaseq,GA_rnaseq,GA_cnv,TP53_mut,RAS_mut\n"
    "0,TCGA-05-0002,s3.svs,1,0,-0.5,1.25,-2,1,1\n"
    "1,TCGA-05-0001,s1.svs,1,0,0.5,36893.5,,0,0\n"
    "2,TCGA-05-0001,s2.svs,1,0,0.5,36893.5,,0,0\n"
)


def table_file(tmp_path, text, name="t.csv"):
    path = tmp_path / name
    path.write_text(text)
    return {"format": "porpoise" if "case_id" in text else "csv", "path": str(path)}


def test_porpoise_panels(tmp_path):
    table = table_file(tmp_path, PORPOISE)
    rna = read_panel("rna", table, None)
    assert rna.patients == ["TCGA-05-0001", "TCGA-05-0002"] and rna.genes == ["GA", "GB"]
    np.testing.assert_array_equal(rna.values, np.array([[36893.5, 0.5], [1.25, -0.5]], np.float32))
    assert rna.value_type == "zscore"
    mut = read_panel("mut", table, None)
    assert mut.genes == ["TP53"] and mut.notes["not_genes"] == ["RAS"]  # RAS_mut is derived, no gene
    cnv = read_panel("cnv", table, None)
    assert cnv.patients == ["TCGA-05-0002"] and cnv.value_type == "gistic"
    assert cnv.notes["patients_without_value"] == ["TCGA-05-0001"]


BARE = (
    "case_id,slide_id,site,is_female,age,survival_months,censorship,train,alive,is_smoker,TMB,GA_cnv,GA,C1orf9,RAS\n"
    "P1,s1.svs,1,1,60,1,0,1,1,0,2,1,1,,1\nP2,s2.svs,1,0,60,1,0,0,0,1,3,-1,0,1,0\n"
)


def test_mutations_under_bare_gene_names(tmp_path):
    table = table_file(tmp_path, BARE)
    panel = read_panel("mut", table, None)
    assert panel.genes == ["C1orf9", "GA"] and panel.notes["not_genes"] == ["RAS"]
    np.testing.assert_array_equal(panel.values, np.float32([[np.nan, 1], [1, 0]]))
    # no symbol, or more than two values: named, not taken
    assert panel.notes["columns_passed_over"] == ["alive", "is_smoker", "TMB"]
    assert "bare gene names" in panel.notes["rule_for_columns"]
    suffixed = read_panel("mut", table_file(tmp_path, BARE.replace("RAS", "TP53_mut")), None)
    assert suffixed.genes == ["TP53"] and "_mut" in suffixed.notes["rule_for_columns"]
    assert read_panel("cnv", table, None).genes == ["GA"]


def test_porpoise_errors(tmp_path):
    with pytest.raises(MorphomeError, match=r"TCGA-05-0001 differ in column 'GA_rnaseq'"):
        read_panel("rna", table_file(tmp_path, PORPOISE.replace("s2.svs,1,0,0.5,36893.5", "s2.svs,1,0,0.5,7")), None)
    with pytest.raises(MorphomeError, match=r"no column ends with '_rnaseq'(.|\n)*leave molecular\.rna out"):
        read_panel("rna", table_file(tmp_path, PORPOISE.replace("_rnaseq", "_x")), None)
    with pytest.raises(MorphomeError, match="other than 0 and 1"):
        read_panel("mut", table_file(tmp_path, PORPOISE.replace("-2,1,1", "-2,2,1")), None)
    with pytest.raises(MorphomeError, match=r"t\.csv: cannot be read"):
        read_panel("rna", table_file(tmp_path, PORPOISE.replace("1.25", "high")), None)


def test_csv_panel(tmp_path):
    text = "gb,patient_id,GA\n1,P2,0.5\n,P1,1e3\n"
    panel = read_panel("rna", table_file(tmp_path, text), None)
    assert panel.patients == ["P1", "P2"] and panel.genes == ["GA", "gb"]
    np.testing.assert_array_equal(panel.values, np.array([[1000, np.nan], [0.5, 1]], np.float32))
    assert panel.value_type == "as_given"
    unnamed = read_panel("rna", table_file(tmp_path, ",GA\n007,1\nP1,2\n"), None)
    assert unnamed.patients == ["007", "P1"]  # ids stay text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,GA\nP1,1\n", "no column 'patient_id'"),
        ("gene,TCGA-05-0001\nGA,1\n", "turn the table"),
        ("Hugo_Symbol,P1,P2\nGA,1,2\n", "turn the table"),
        ("patient_id;GA\nP1;1\n", "semicolons"),
        ("patient_id,GA\nP1,1\nP1,2\n", "patient P1 occurs twice"),
        ("patient_id,GA\n,1\n", "line 2: no patient id"),
        ("patient_id,GA,GA\nP1,1,2\n", "'GA' occurs twice"),
        ("patient_id,GA\nP1,high\n", "column 'GA' is not numeric: 'high'"),
        ("patient_id,GA\nP1,inf\n", "value of GA for patient P1 is infinite"),
        ("patient_id,GA\nP1,\n", "no gene with a value"),
        ("patient_id\nP1\n", "no gene with a value"),
        ("patient_id,GA\nTCGA-05-0001-01A,1\n", "is a sample, not a patient"),
    ],
)
def test_bad_csv_panels_are_named(tmp_path, text, words):
    with pytest.raises(MorphomeError, match=words) as caught:
        read_panel("rna", table_file(tmp_path, text), None)
    assert "molecular.rna" in str(caught.value)


def test_paths_are_checked(tmp_path):
    with pytest.raises(MorphomeError, match=r"molecular\.rna\.path"):
        read_panel("rna", {"format": "csv", "path": str(tmp_path / "no.csv")}, None)
    (tmp_path / "file").write_text("x")
    with pytest.raises(MorphomeError, match="not a folder"):
        read_panel("rna", {"format": "star_counts", "path": str(tmp_path / "file")}, None)


def test_the_step_writes_panels_and_groups(tmp_path):
    table = table_file(tmp_path, PORPOISE)
    (tmp_path / "g.gmt").write_text("one\tx\tTP53\tGA\nfew\tx\tGB\nnone\tx\tZZ\n")
    settings = {"molecular": {"rna": table, "mut": table, "groups": {"path": str(tmp_path / "g.gmt"), "min_genes": 2}}}
    out = {panel: tmp_path / f"{panel}.parquet" for panel in ("rna", "mut")}
    with pytest.warns(MorphomeWarning, match="2 of 3 gene groups dropped: 'few': 1 of 1 genes.*'none': 0 of 1"):
        run_genes(settings=settings, panels_out=out, groups_out=tmp_path / "groups.json")
    rna = read_parquet(out["rna"], "morphome.panel", settings)
    assert rna.columns.tolist() == ["patient_id", "GA", "GB"]
    assert (rna.dtypes.iloc[1:] == np.float32).all() and rna["patient_id"].tolist() == ["TCGA-05-0001", "TCGA-05-0002"]
    meta = parquet_meta(out["rna"])
    assert (meta["panel"], meta["value_type"], meta["n_files"]) == ("rna", "zscore", 1)
    groups = read_json(tmp_path / "groups.json", "morphome.groups", settings)
    assert groups["groups"] == {"one": [{"panel": "rna", "gene": "GA"}, {"panel": "mut", "gene": "TP53"}]}
    assert set(groups["dropped"]) == {"few", "none"}

    settings["molecular"]["groups"]["min_genes"] = 3
    with pytest.raises(MorphomeError, match=r"no group has 3 genes with a column"):
        run_genes(settings=settings, panels_out=out, groups_out=tmp_path / "groups.json")
    with pytest.raises(ValueError, match="panels configured"):
        run_genes(settings=settings, panels_out={"rna": out["rna"]}, groups_out=None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            ",P1,P2\nTP53,1,2\nGA,3,4\n",
            r"no group has 1 gene with a column in .*ask for TP53, MYC; .*rna: P1, P2(.|\n)*turn the table",
        ),
        ("patient_id,ENSG1\nP1,1\n", r"ask for TP53, MYC; .*rna: ENSG1(.|\n)*alike in both"),
    ],
)
def test_groups_that_match_nothing_show_both_sides(tmp_path, text, words):
    (tmp_path / "g.gmt").write_text("one\tx\tTP53\tMYC\n")
    groups = {"path": str(tmp_path / "g.gmt"), "min_genes": 1}
    settings = {"molecular": {"rna": table_file(tmp_path, text), "groups": groups}}
    with pytest.raises(MorphomeError, match=words):
        run_genes(settings=settings, panels_out={"rna": tmp_path / "p"}, groups_out=tmp_path / "g.json")


def test_without_groups_the_file_says_so(tmp_path):
    run_genes(settings={"molecular": {}}, panels_out={}, groups_out=tmp_path / "groups.json")
    assert json.loads((tmp_path / "groups.json").read_text())["groups"] == {}


@pytest.mark.parametrize(
    ("cohort", "panels", "sizes"),
    [
        ("hnsc", ("rna", "mut", "cnv"), [88, 330, 516, 427, 178, 438]),
        ("blca", ("rna", "mut", "cnv"), [102, 336, 518, 434, 199, 444]),
        ("luad", ("rna", "mut", "cnv"), [94, 334, 531, 471, 218, 440]),
        ("ucec", ("mut", "cnv"), [20, 63, 78, 28, 150, 9]),
        ("brca", ("rna", "mut", "cnv"), [93, 330, 529, 460, 223, 450]),
        ("gbmlgg", ("rna", "mut", "cnv"), [87, 310, 496, 413, 138, 427]),
    ],
)
def test_real_group_sizes(tmp_path, shared_data, cohort, panels, sizes):
    path = shared_data / "tables" / "porpoise" / f"tcga_{cohort}_all_clean.csv.zip"
    table = {"format": "porpoise", "path": str(path)}
    groups = {"path": str(shared_data / "genesets" / "mcat_signatures.csv"), "min_genes": 1}
    settings = {"molecular": {**dict.fromkeys(panels, table), "groups": groups}}
    out = {panel: tmp_path / f"{panel}.parquet" for panel in panels}
    run_genes(settings=settings, panels_out=out, groups_out=tmp_path / "groups.json")
    found = read_json(tmp_path / "groups.json", "morphome.groups")
    assert [len(columns) for columns in found["groups"].values()] == sizes
    if cohort == "hnsc":
        shapes = {panel: read_parquet(out[panel], "morphome.panel").shape for panel in panels}
        # 174 mutation columns less RAS; patient_id besides
        assert shapes == {"rna": (416, 1558), "mut": (416, 174), "cnv": (416, 478)}


@pytest.mark.parametrize(
    ("file", "panel", "patients", "genes"),
    [
        ("mcat/sig/tcga_blca", "rna", 373, 2814),
        ("mcat/sig/tcga_blca", "cnv", 373, 248),
        ("mcat/sig/tcga_luad", "rna", 453, 2812),
        ("mcat/sig/tcga_luad", "cnv", 453, 284),
        ("mcat/sig/tcga_ucec", "cnv", 480, 123),
        ("mcat/full/tcga_ucec", "cnv", 480, 935),
        ("porpoise/tcga_ucec", "cnv", 480, 5),
    ],
)
def test_real_column_counts(shared_data, file, panel, patients, genes):
    path = shared_data / "tables" / f"{file}_all_clean.csv.zip"
    found = read_panel(panel, {"format": "porpoise", "path": str(path)}, None)
    assert found.values.shape == (patients, genes)


def test_real_mutations_under_bare_names_agree_with_the_suffixed_ones(shared_data):
    """PORPOISE's 1,405 genes are all among MCAT's; calls differ in one patient, whose recurrence MCAT also took."""
    bare, suffixed = (
        read_panel("mut", {"format": "porpoise", "path": str(shared_data / "tables" / file)}, None)
        for file in ("mcat/full/tcga_ucec_all_clean.csv.zip", "porpoise/tcga_ucec_all_clean.csv.zip")
    )
    assert bare.values.shape == (480, 8137) and suffixed.values.shape == (480, 1405)
    assert bare.notes["columns_passed_over"] == [] and "columns_passed_over" not in suffixed.notes
    patients = sorted(set(bare.patients) & set(suffixed.patients))
    genes = sorted(set(bare.genes) & set(suffixed.genes))
    pair = [
        panel.values[np.ix_([panel.patients.index(p) for p in patients], [panel.genes.index(g) for g in genes])]
        for panel in (bare, suffixed)
    ]
    assert (len(patients), len(genes)) == (480, 1405)
    differ = np.argwhere(pair[0] != pair[1])
    assert len(differ) == 19 and {patients[row] for row, _ in differ} == {"TCGA-BK-A139"}
    assert (pair[0] >= pair[1]).all()
    groups, _ = read_groups(shared_data / "genesets" / "mcat_signatures.csv")
    # the published groups look for <gene>_mut and hold none of these
    sizes = [len(columns) for columns in match_groups(groups, {"mut": bare.genes})["groups"].values()]
    assert sizes == [55, 202, 340, 182, 788, 81]


@pytest.mark.parametrize("file", ["sig/tcga_blca", "sig/tcga_luad", "sig/tcga_ucec"])
def test_real_mcat_tables_without_mutations(shared_data, file):
    path = shared_data / "tables" / "mcat" / f"{file}_all_clean.csv.zip"
    with pytest.raises(MorphomeError, match="no column of a bare gene name holds mutations"):
        read_panel("mut", {"format": "porpoise", "path": str(path)}, None)


def test_real_ucec_has_no_rna(shared_data):
    path = shared_data / "tables" / "porpoise" / "tcga_ucec_all_clean.csv.zip"
    with pytest.raises(MorphomeError, match="_rnaseq"):
        read_panel("rna", {"format": "porpoise", "path": str(path)}, None)
