"""Data sets of UCSC Xena."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from morphome.errors import MorphomeError, MorphomeWarning
from morphome.genomics.matrix import is_log, is_zscore, merge_symbols, value_type_of
from morphome.genomics.sources import read_panel

SAMPLES = "TCGA-05-0001-01A\tTCGA-05-0002-01A\tTCGA-05-0002-11A"
ENSEMBL = (
    f"Ensembl_ID\t{SAMPLES}\nENSG01.4\t1\t2\t9\nENSG02.1\t3\tNA\t9\nENSG03.7\t1\t0\t9\nENSG01.4_PAR_Y\t5\t5\t5\n"
    "N_unmapped\t7\t7\t7\n__no_feature\t8\t8\t8\n"
)
PROBES = "#id\tgene\tchrom\tchromStart\tchromEnd\tstrand\nENSG01.4\tGA\tchr1\t1\t2\t+\nENSG02.2\tGB\tchr1\t1\t2\t+\n"


def read(tmp_path, text, panel="rna", name="x.tsv", codes=("01", "03", "06"), **more):
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return read_panel(panel, {"format": "xena", "path": str(tmp_path / name), **more}, None, codes)


def test_ensembl_ids_become_symbols_by_the_probe_map(tmp_path):
    (tmp_path / "probes.tsv").write_text(PROBES + "ENSG03.7\tGA\tchr2\t1\t2\t+\n")
    table = {"unit": "log2(count+1)", "probemap": str(tmp_path / "probes.tsv")}
    panel = read(tmp_path, ENSEMBL, name="x.tsv.gz", **table)
    assert panel.patients == ["TCGA-05-0001", "TCGA-05-0002"] and panel.genes == ["GA", "GB"]
    # GA is the sum of two genes before the logarithm: (2 - 1) + (2 - 1) + 1 = 3 and (4 - 1) + (1 - 1) + 1 = 4
    np.testing.assert_allclose(panel.values, np.float32([[np.log2(3), 3], [2, np.nan]]), rtol=1e-6)
    assert panel.gene_ids == {"GA": "ENSG01.4;ENSG03.7", "GB": "ENSG02.1"}  # versions may differ
    assert panel.unit == "log2(count+1)" and panel.value_type == "as_given"
    assert panel.notes["left_out"] == {"sample type 11 (solid tissue normal)": 1}
    assert panel.notes["rows_left_out"] == 3 and "ensembl_ids_without_symbol" not in panel.notes


def test_ensembl_ids_stay_without_a_probe_map(tmp_path):
    with pytest.warns(
        MorphomeWarning, match=r"x\.tsv: 3 genes are named by Ensembl ids(.|\n)*molecular\.rna\.probemap"
    ):
        panel = read(tmp_path, ENSEMBL)
    assert panel.genes == ["ENSG01", "ENSG02", "ENSG03"] and panel.gene_ids["ENSG01"] == "ENSG01.4"
    assert panel.unit == "as given" and panel.notes["ensembl_ids_without_symbol"] == 3
    assert "molecular.rna.probemap" in panel.notes["gene_names"]
    (tmp_path / "probes.tsv").write_text(PROBES)
    panel = read(tmp_path, ENSEMBL, probemap=str(tmp_path / "probes.tsv"))
    assert panel.genes == ["ENSG03", "GA", "GB"] and panel.notes["ensembl_ids_without_symbol"] == 1


def test_both_orientations(tmp_path):
    rows = [["sample", "GA", "GB"], ["TCGA-05-0002-01", "3", ""], ["TCGA-05-0001-01", "1", "2"]]
    down = "\n".join("\t".join(row) for row in rows) + "\n"
    across = "\n".join("\t".join(row) for row in zip(*rows, strict=True)) + "\n"
    for text in (down, across):
        panel = read(tmp_path, text)
        assert panel.patients == ["TCGA-05-0001", "TCGA-05-0002"] and panel.genes == ["GA", "GB"]
        np.testing.assert_array_equal(panel.values, np.float32([[1, 2], [3, np.nan]]))


def test_logarithm_of_linear_values(tmp_path):
    text = f"sample\t{SAMPLES}\nGA\t1\t3\t9\nGA\t2000\t0\t9\nGB\t0\t\t9\n"
    panel = read(tmp_path, text, log2=True)  # the word of the configuration is enough: rows are summed
    np.testing.assert_allclose(panel.values, np.float32([[np.log2(2002), 0], [2, np.nan]]), rtol=1e-6)
    assert (panel.value_type, panel.unit) == ("log2_plus_1", "log2(x + 1)")
    assert read(tmp_path, text, unit="TPM", log2=True).unit == "log2(TPM + 1)"
    with pytest.warns(MorphomeWarning, match=r"values up to 1000\.5 \(no unit stated\)(.|\n)*molecular\.rna\.log2"):
        panel = read(tmp_path, text)
    assert panel.values[0].tolist() == [1000.5, 0]  # nothing says that these add up: the mean
    linear = read(tmp_path, text, "expression", unit="TPM")
    with pytest.warns(MorphomeWarning, match=r"up to 2001 \(TPM\)"):
        np.testing.assert_array_equal(read(tmp_path, text, unit="TPM").values, linear.values)
    assert linear.values[0].tolist() == [2001, 0]
    assert read(tmp_path, text, unit="log10(RSEM + 1)").value_type == "as_given"  # says so: no warning
    with pytest.raises(MorphomeError, match=r"log2 is set, but the values are in log10\(RSEM \+ 1\) already"):
        read(tmp_path, text, unit="log10(RSEM + 1)", log2=True)
    assert read(tmp_path, text.replace("2000", "1000"), log2=False).values[0].tolist() == [500.5, 0]


def test_samples_of_other_projects_are_counted(tmp_path):
    panel = read(tmp_path, "sample\tGTEX-1117F-0226\tTCGA-05-0001-01\tTARGET-10-1\nGA\t1\t2\t3\n")
    assert panel.values.tolist() == [[2]] and panel.notes["left_out"] == {"no TCGA barcode": 2}


@pytest.mark.parametrize(
    ("text", "panel", "words"),
    [
        ("sample\tS1\tS2\nGA\t1\t2\n", "rna", r"neither the columns \(S1, S2\) nor the rows \(GA\) are TCGA barcodes"),
        ("sample\tGA\nTCGA-05-0001-01\t1\nTCGA-05-0001-01\t1\n", "rna", "'TCGA-05-0001-01' occurs twice"),
        ("sample\tTCGA-05-0001-11\nGA\t1\n", "rna", r"no sample of the tumour under study \(codes 01, 03, 06\)"),
        ("sample\tTCGA-05-0001-01\nGA\tx\n", "rna", "'x' in row 'GA', column 'TCGA-05-0001-01' is not a number"),
        ("sample\tTCGA-05-0001-01\nGA\tinf\n", "rna", "value of GA for patient TCGA-05-0001 is infinite"),
        ("sample\tTCGA-05-0001-01\nGA\t2\n", "mut", "values other than 0 and 1"),
        ("gene\teffect\tsample\nGA\tmissense_variant\tTCGA-05-0001-11A\n", "mut", "no sample of the tumour"),
        ("", "rna", "the table is empty"),
    ],
)
def test_bad_data_sets_are_named(tmp_path, text, panel, words):
    with pytest.raises(MorphomeError, match=words) as caught:
        read(tmp_path, text, panel)
    assert f"molecular.{panel}" in str(caught.value)


def test_probe_map_without_its_columns(tmp_path):
    (tmp_path / "probes.tsv").write_text("probe\tname\nENSG01.4\tGA\n")
    with pytest.raises(MorphomeError, match=r"no column 'id' \(molecular\.rna\.probemap\)"):
        read(tmp_path, ENSEMBL, probemap=str(tmp_path / "probes.tsv"))


LIST = [
    ("Sample_ID", "gene", "chrom", "effect"),
    ("TCGA-05-0001-01A", "TP53", "chr17", "stop_gained"),
    ("TCGA-05-0001-01A", "TTN", "chr2", "synonymous_variant"),
    ("TCGA-05-0001-11A", "KRAS", "chr12", "missense_variant"),
    ("TCGA-05-0002-01A", "TTN", "chr2", "missense_variant;splice_region_variant"),
    ("TCGA-05-0003-01A", "TTN", "chr2", "intron_variant"),
]


def test_list_of_mutations(tmp_path):
    text = "\n".join("\t".join(row) for row in LIST) + "\n"
    panel = read(tmp_path, text, "mut")
    assert panel.patients == ["TCGA-05-0001", "TCGA-05-0002", "TCGA-05-0003"] and panel.genes == ["TP53", "TTN"]
    assert panel.values.tolist() == [[1, 0], [0, 1], [0, 0]]
    assert panel.notes["variants_kept"] == {"missense_variant": 1, "stop_gained": 1}
    assert panel.notes["variants_passed_over"] == {"intron_variant": 1, "synonymous_variant": 1}
    assert read(tmp_path, text, "mut", consequences="truncating").genes == ["TP53"]
    assert read(tmp_path, text, "mut", consequences=["Missense_Mutation"]).genes == ["TTN"]
    legacy = text.replace("stop_gained", "Nonsense_Mutation").replace("Sample_ID", "#sample")
    assert read(tmp_path, legacy, "mut").values.tolist() == panel.values.tolist()


def test_gene_level_mutations(tmp_path):
    panel = read(tmp_path, f"sample\t{SAMPLES}\nGA\t0\t1\t1\nGA\t1\t0\t1\nGB\t0\t0\t1\n", "mut")
    assert panel.value_type == "binary" and panel.values.tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("unit", "value_type"),
    [
        ("log2(TPM + 1)", "log2_tpm_plus_1"),
        ("log2(tpm+0.001)", "as_given"),
        ("TPM", "tpm"),
        ("Counts", "counts"),
        ("copy number", "copy_number"),
        ("beta", "as_given"),
    ],
)
def test_units(unit, value_type):
    assert value_type_of(unit) == value_type


@pytest.mark.parametrize(
    ("unit", "log", "zscore"),
    [
        *[
            ("log2(TPM + 1)", True, False),
            ("LOG10(x)", True, False),
            ("ln(RPKM + 1)", True, False),
            ("Ln", True, False),
        ],
        *[("log(counts)", True, False), ("log1p", True, False), ("mRNA, log-ratio", True, False)],
        *[("RSEM_log2", True, False), ("lncRNA counts", False, False), ("from the catalogue", False, False)],
        *[("TPM", False, False), ("mRNA z-Scores (RNA Seq)", False, True), ("zscores", False, True)],
    ],
)
def test_words_for_logarithms_and_z_scores(unit, log, zscore):
    assert (is_log(unit), is_zscore(unit)) == (log, zscore)


@pytest.mark.parametrize(
    ("rule", "offset", "expected"),
    [
        ("sum", 0.0, [5, 4]),
        ("average", 0.0, [2.5, 4]),
        ("max", 0.0, [3, 4]),
        ("sum_log2", 1.0, [np.log2(2**2 + 2**3 - 1), 4]),
        ("sum_log2", 0.001, [np.log2(2**2 + 2**3 - 0.001), 4]),
    ],
)
def test_rows_that_share_a_symbol(rule, offset, expected):
    values = np.float32([[2, np.nan, np.nan], [7, 8, 9], [3, 4, np.nan]])
    genes, merged, repeated = merge_symbols(np.array(["B", "A", "B"]), values, rule, offset)
    assert genes == ["A", "B"] and repeated == 1
    np.testing.assert_array_equal(merged[:, 0], [7, 8, 9])
    np.testing.assert_allclose(merged[:, 1], [*expected, np.nan], rtol=1e-6)
