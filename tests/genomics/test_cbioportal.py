"""Profiles of a cBioPortal study folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from morphome.errors import MorphomeError, MorphomeWarning
from morphome.genomics.sources import read_panel

EXPRESSION, COPIES, MUTATIONS = "MRNA_EXPRESSION", "COPY_NUMBER_ALTERATION", "MUTATION_EXTENDED"
WIDE = "Hugo_Symbol\tEntrez_Gene_Id\tTCGA-05-0001-01\tTCGA-05-0002-06\tTEST-1\n"


class Study:
    """A study folder that is filled file by file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def profile(self, name: str, kind: str, form: str, text: str | None, **more: str) -> Study:
        facts = {"genetic_alteration_type": kind, "datatype": form, "data_filename": f"data_{name}.txt", **more}
        lines = "".join(f"{key}: {value}\n" for key, value in facts.items())
        (self.folder / f"meta_{name}.txt").write_text(lines)
        if text is not None:
            (self.folder / f"data_{name}.txt").write_text(text)
        return self

    def write(self, name: str, text: str) -> Study:
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(text)
        return self

    def read(self, panel: str, codes=("01", "03", "06"), **more):
        return read_panel(panel, {"format": "cbioportal", "path": str(self.folder), **more}, None, codes)


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)


def test_wide_matrix_symbols_and_missing_cells(study):
    rows = "ERCC5|aaa\t2073\t1\tNA\t3\n?\t9\t5\t5\t5\nSLC35E2\t1\t2\t\t4\nSLC35E2|728661\t2\t4\t8\t[Not Available]\n"
    study.profile(
        "mrna", EXPRESSION, "CONTINUOUS", "#comment\n" + WIDE + rows, profile_description="Expression (RSEM)."
    )
    panel = study.read("rna")
    assert panel.patients == ["TCGA-05-0001", "TCGA-05-0002", "TEST-1"] and panel.genes == ["ERCC5", "SLC35E2"]
    # rows that share a symbol: the sum of what was measured, for rna as for expression
    np.testing.assert_array_equal(panel.values, np.float32([[1, 6], [np.nan, 8], [3, 4]]))
    assert (panel.value_type, panel.unit) == ("as_given", "Expression (RSEM).")
    facts = {"symbols_cut_at_bar": 2, "rows_without_symbol": 1, "symbols_repeated": 1, "file": "data_mrna.txt"}
    assert facts.items() <= panel.notes.items()
    amounts = study.read("expression")
    np.testing.assert_array_equal(amounts.values, panel.values)
    assert amounts.notes["rule_for_symbols"] == panel.notes["rule_for_symbols"]
    assert study.read("rna", unit="log2(TPM+1)").value_type == "log2_tpm_plus_1"
    ratios = (study.folder / "data_mrna.txt").read_text().replace("2\t\t4", "2\t\t-4")
    study.write("data_mrna.txt", ratios)  # values below zero are no amounts: their mean
    np.testing.assert_array_equal(study.read("rna").values, np.float32([[1, 3], [np.nan, 8], [3, -4]]))


def test_logarithm_of_linear_values(study):
    rows = "GA\t1\t1\tNA\t3\nGB\t2\t2000\t\t4\nGB|7\t2\t47\t7\t0\n"
    study.profile("mrna", EXPRESSION, "CONTINUOUS", WIDE + rows, profile_description="Expression (RSEM).")
    panel = study.read("rna", log2=True)
    # rows that share a symbol are summed before: log2(2000 + 47 + 1) = 11
    expected = [[1, 11], [np.nan, 3], [2, np.log2(5)]]
    np.testing.assert_allclose(panel.values, np.float32(expected), rtol=1e-6)
    assert panel.values.dtype == np.float32
    assert (panel.value_type, panel.unit) == ("log2_plus_1", "log2(Expression (RSEM) + 1)")
    assert panel.notes["rule_for_symbols"] == "values of genes that share a symbol are summed before the logarithm"
    assert "molecular.rna.log2" in panel.notes["rule_for_values"]
    said = (
        r"data_mrna\.txt: values up to 2047 \(Expression \(RSEM\)\.\) look like(.|\n)*set molecular\.rna\.log2 to true"
    )
    with pytest.warns(MorphomeWarning, match=said) as told:
        assert study.read("rna").value_type == "as_given"
    assert len(told) == 1
    with pytest.raises(MorphomeError, match=r"molecular\.rna\.log2 is set, but the values are in ln\(x\) already"):
        study.read("rna", unit="ln(x)", log2=True)
    study.write("data_mrna.txt", WIDE + "GA\t1\t1\t-2\t3\n")
    with pytest.raises(MorphomeError, match=r"-2 of GA for patient TCGA-05-0002(.|\n)*remove molecular\.rna\.log2"):
        study.read("rna", log2=True)
    study.profile("mrna", EXPRESSION, "Z-SCORE", WIDE + "GA\t1\t1\t2\t2000\n")
    with pytest.raises(MorphomeError, match="values are in z-score already"):
        study.read("rna", log2=True)
    panel = study.read("rna")  # no warning: z-scores may be large
    assert panel.notes["rule_for_values"].endswith("all patients of the source table, test folds included")


def test_expression_needs_a_unit_where_the_study_says_none(study):
    study.profile("mrna", EXPRESSION, "CONTINUOUS", WIDE + "GA\t1\t1\t2\t3\n")
    with pytest.raises(
        MorphomeError, match=r"data_mrna\.txt: the table does not say(.|\n)*molecular\.expression\.unit is not set"
    ):
        study.read("expression")
    assert study.read("expression", unit="counts").value_type == "counts"


def test_patients_come_from_the_study_and_one_sample_each(study):
    rows = "GA\t1\t1\t2\t3\t4\n"
    head = "Hugo_Symbol\tEntrez_Gene_Id\tTCGA-05-0001-06\tTCGA-05-0001-01\tS2\tS1\n"
    study.profile("mrna", EXPRESSION, "Z-SCORE", head + rows)
    study.write("data_clinical_sample.txt", "#Patient\tSample\nPATIENT_ID\tSAMPLE_ID\nP\tS1\nP\tS2\n")
    study.write("data_clinical_patient.txt", "#Patient\nPATIENT_ID\nP\n")
    panel = study.read("rna")
    assert panel.patients == ["P", "TCGA-05-0001"] and panel.values.tolist() == [[4], [2]]
    assert panel.notes["left_out"] == {"further sample of the same patient": 2}
    assert study.read("rna", ("06", "01")).values.tolist() == [[4], [1]]


def test_several_profiles_need_a_choice(study):
    study.profile("a", EXPRESSION, "CONTINUOUS", WIDE + "GA\t1\t1\t2\t3\n")
    study.profile("b", EXPRESSION, "Z-SCORE", WIDE + "GA\t1\t-1\t-2\t-3\n")
    study.profile("c", "METHYLATION", "CONTINUOUS", WIDE)
    with pytest.raises(MorphomeError, match=r"2 profiles fit molecular\.rna: data_a\.txt \(CONTINUOUS\); data_b\.txt"):
        study.read("rna")
    assert study.read("rna", file="data_b.txt").value_type == "zscore"
    assert study.read("expression", unit="RSEM").values.tolist() == [[1], [2], [3]]  # only one can be amounts
    by_file = read_panel("rna", {"format": "cbioportal", "path": str(study.folder / "data_a.txt")}, None)
    assert by_file.values.tolist() == [[1], [2], [3]]
    with pytest.raises(MorphomeError, match=r"data_c\.txt: holds METHYLATION(.|\n)*MRNA_EXPRESSION"):
        study.read("rna", file="data_c.txt")
    with pytest.raises(MorphomeError, match=r"data_z\.txt: not found \(molecular\.rna\.file\); the study has data_a"):
        study.read("rna", file="data_z.txt")
    study.write("data_own.txt", WIDE + "GA\t1\t5\t6\t7\n")  # no meta file: the user's word is enough
    assert study.read("rna", file="data_own.txt", unit="TPM").value_type == "tpm"


def test_long_copy_number(study):
    rows = ["GA\t1\tTCGA-05-0001-01\t-2", "GB\t2\tTCGA-05-0001-01\t", "GB\t2\tTCGA-05-0002-01\t1"]
    text = "Hugo_Symbol\tEntrez_Gene_Id\tSample_Id\tValue\n" + "\n".join(rows) + "\n"
    study.profile("cna", COPIES, "DISCRETE_LONG", text)
    panel = study.read("cnv")
    assert panel.value_type == "gistic" and panel.patients == ["TCGA-05-0001", "TCGA-05-0002"]
    np.testing.assert_array_equal(panel.values, np.float32([[-2, np.nan], [np.nan, 1]]))
    study.write("data_cna.txt", text + "GA\t1\tTCGA-05-0001-01\t2\n")
    with pytest.raises(MorphomeError, match="two values of GA for sample TCGA-05-0001-01"):
        study.read("cnv")


@pytest.mark.parametrize(
    ("form", "text", "words"),
    [
        ("DISCRETE", WIDE + "GA\t1\t0\t3\t0\n", r"values other than -2, -1\.5"),
        ("LOG2-VALUE", WIDE + "GA\t1\t0.1\thigh\t0\n", r"'high' in row 'GA', column 'TCGA-05-0002-06' is not a number"),
        ("LOG2-VALUE", WIDE + "GA\t1\t0.1\t0.2\t0\nGB\t1\t0.", r"the last line has 3 cells, the header 5"),
        ("LOG2-VALUE", WIDE.replace("TEST-1", "TCGA-05-0001-01"), r"column 'TCGA-05-0001-01' occurs twice"),
        ("LOG2-VALUE", WIDE.replace("Hugo_Symbol", "Gene") + "GA\t1\t1\t1\t1\n", r"no column 'Hugo_Symbol'"),
        ("LOG2-VALUE", "Hugo_Symbol\tTCGA-05-0001-11\nGA\t1\n", r"no sample of the tumour under study"),
        ("LOG2-VALUE", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"pointer of Git LFS"),
        ("LOG2-VALUE", None, r"not found, but the study's meta files name it"),
        ("LOG2-VALUE", "", r"the table is empty"),
        ("SEG", WIDE, r"no profile of COPY_NUMBER_ALTERATION"),
    ],
)
def test_bad_profiles_are_named(study, form, text, words):
    study.profile("cna", COPIES, form, text)
    with pytest.raises(MorphomeError, match=words) as caught:
        study.read("cnv")
    assert str(study.folder) in str(caught.value)


MAF = "#version 2.4\t\t\nHugo_Symbol\tVariant_Classification\tTumor_Sample_Barcode\n"
ROWS = "GA\tMissense_Mutation\tTCGA-05-0001-01\nGB\tNonsense_Mutation\tTCGA-05-0001-06\nGC\tSilent\tTCGA-05-0002-01\n"


def test_mutations_and_who_was_sequenced(study):
    study.profile("mutations", MUTATIONS, "MAF", MAF + ROWS, stable_id="mutations")
    panel = study.read("mut")
    assert panel.patients == ["TCGA-05-0001", "TCGA-05-0002"] and panel.genes == ["GA"]
    assert panel.values.tolist() == [[1], [0]] and panel.notes["patients_without_row"] == 0
    study.write("case_lists/cases_sequenced.txt", "case_list_ids: TCGA-05-0001-01\tTCGA-05-0003-01\tTCGA-05-0004-11\n")
    panel = study.read("mut")
    assert panel.patients == ["TCGA-05-0001", "TCGA-05-0002", "TCGA-05-0003"]
    assert panel.values.tolist() == [[1], [0], [0]] and panel.notes["patients_without_row"] == 1
    assert study.read("mut", ("06",)).genes == ["GB"]
    assert study.read("mut", consequences=["Silent"]).genes == ["GC"]


def test_genes_outside_a_gene_panel_are_not_measured(study):
    rows = ROWS + "GD\tMissense_Mutation\tTCGA-05-0002-01\n"
    study.profile("mutations", MUTATIONS, "MAF", MAF + rows, stable_id="mutations")
    matrix = "SAMPLE_ID\tmutations\nTCGA-05-0001-01\tSMALL\nTCGA-05-0002-01\tWES\n"
    study.write("data_gene_panel_matrix.txt", matrix)
    study.write("data_gene_panel_small.txt", "stable_id: SMALL\ngene_list: GA\tGX\n")
    panel = study.read("mut")
    assert panel.genes == ["GA", "GD"] and panel.notes["patients_with_gene_panel"] == 1
    np.testing.assert_array_equal(panel.values, np.float32([[1, np.nan], [0, 1]]))
    # A mutation that was found stays one, though the panel does not list its gene; the other sample's is not known.
    study.write("data_gene_panel_small.txt", "stable_id: SMALL\ngene_list: GX\n")
    np.testing.assert_array_equal(study.read("mut").values, np.float32([[1, np.nan], [0, 1]]))
    study.write("data_gene_panel_matrix.txt", matrix.replace("SMALL", "OTHER"))
    with pytest.warns(MorphomeWarning, match="gene panels OTHER are not in the study folder"):
        assert study.read("mut").values.tolist() == [[1, 0], [0, 1]]


def test_real_study(shared_data):
    table = {"format": "cbioportal", "path": str(shared_data / "tables" / "cbioportal" / "study_es_0")}

    def read(panel, **more):
        return read_panel(panel, {**table, **more}, None)

    zscore = read("rna", file="data_expression_median_Zscores.txt")
    assert zscore.values.shape == (526, 5) and zscore.value_type == "zscore"
    given = read("rna", file="data_expression_median.txt")
    assert given.values.shape == (526, 6) and given.unit == "Expression levels (Agilent microarray)."
    place = given.genes.index("CREB3L1"), given.patients.index("TCGA-A1-A0SD")
    assert given.values[place[1], place[0]] == np.float32(1.4345)
    with pytest.raises(MorphomeError, match="1202 values are negative"):  # a microarray's log-ratios
        read("expression")
    ratio = read("cnv", file="data_cna_log2.txt")
    assert ratio.values.shape == (778, 7) and "ERCC5" in ratio.genes and ratio.notes["symbols_cut_at_bar"] == 1
    levels = read("cnv", file="data_cna_discrete.txt")
    assert levels.values.shape == (788, 8) and not np.isnan(levels.values).any()
    counts = dict(zip(*np.unique(levels.values, return_counts=True), strict=True))
    assert counts == {-2.0: 14, -1.0: 1491, 0.0: 4561, 1.0: 189, 2.0: 49}
    assert "TEST-A23C" in levels.patients  # made up, and owned by a patient of the study's own table
    mut = read("mut")
    # 30 samples are listed as sequenced; TCGA-A1-A0SB-02 is a recurrence and two made-up samples are a third's patient
    assert mut.values.shape == (28, 10) and mut.notes["patients_without_row"] == 10
    assert mut.notes["left_out"] == {
        "further sample of the same patient": 2,
        "sample type 02 (recurrent solid tumour)": 1,
    }
    brca2 = mut.values[:, mut.genes.index("BRCA2")]
    assert np.nansum(brca2) == 12 and np.isnan(brca2).sum() == 2  # two samples of a panel without the gene
    assert mut.values[mut.patients.index("TCGA-GI-A2C8")].max() == 0
