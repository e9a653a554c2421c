"""STAR counts and gene-level copy number as the GDC hands them out, and the choice of their files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from morphome.errors import MorphomeError
from morphome.genomics.gdc_files import choose_files
from morphome.genomics.sources import read_panel

HEADER = "File ID\tFile Name\tData Category\tData Type\tProject ID\tCase ID\tSample ID\tSample Type\n"
RNA, MAF, CNV = "Gene Expression Quantification", "Masked Somatic Mutation", "Gene Level Copy Number"


class Folder:
    """A folder of GDC files with its sample sheet."""

    def __init__(self, root: Path, kind: str) -> None:
        self.root, self.kind, self.sheet = root, kind, root / "sheet.tsv"
        self.sheet.write_text(HEADER)

    def add(self, file_id: str, name: str, case: str, sample: str, content: bytes | None, nested: bool = True):
        with self.sheet.open("a") as handle:
            handle.write(f"{file_id}\t{name}\tx\t{self.kind}\tTCGA-X\t{case}\t{sample}\tPrimary Tumor\n")
        if content is not None:
            place = self.root / file_id if nested else self.root
            place.mkdir(exist_ok=True)
            (place / name).write_bytes(content)
        return self

    def read(self, panel: str, format_name: str, **more):
        return read_panel(panel, {"format": format_name, "path": str(self.root), **more}, self.sheet)


def star(*genes: tuple[str, str, str]) -> bytes:
    """A STAR-count file with ``(gene_id, gene_name, tpm)``."""
    lines = [
        "# gene-model: GENCODE v36",
        "gene_id\tgene_name\tgene_type\tunstranded\tstranded_first\tstranded_second\ttpm_unstranded\tfpkm_unstranded",
        *(f"N_{word}\t\t\t9\t9\t9\t\t" for word in ("unmapped", "multimapping", "noFeature", "ambiguous")),
        *(f"{gene_id}\t{name}\tprotein_coding\t1\t1\t1\t{tpm}\t0" for gene_id, name, tpm in genes),
    ]
    return ("\n".join(lines) + "\n").encode()


A = ("ENSG001.1", "GA", "3.0")
B = ("ENSG002.4", "GB", "1.0")
B_TWIN = ("ENSG003.1", "GB", "6.0")
PAR = ("ENSG001.1_PAR_Y", "GA", "100.0")


def test_star_counts(tmp_path):
    folder = Folder(tmp_path, RNA)
    folder.add("u2", "two.tsv", "TCGA-05-0002", "TCGA-05-0002-01A", star(B_TWIN, A, B), nested=False)
    folder.add("u1", "one.tsv", "TCGA-05-0001", "TCGA-05-0001-01A", star(A, ("ENSG002.4", "GB", "0"), B_TWIN, PAR))
    panel = folder.read("rna", "star_counts")
    assert panel.patients == ["TCGA-05-0001", "TCGA-05-0002"] and panel.genes == ["GA", "GB"]
    assert panel.values.dtype == np.float32
    # TPM of the two genes called GB are summed before the logarithm; PAR_Y and N_ rows are gone
    np.testing.assert_allclose(panel.values, [[2.0, np.log2(7)], [2.0, 3.0]], rtol=1e-6)
    assert (panel.value_type, panel.n_files) == ("log2_tpm_plus_1", 2)
    assert panel.gene_ids == {"GA": "ENSG001.1", "GB": "ENSG002.4;ENSG003.1"}


def test_one_file_per_patient_by_the_stated_rule(tmp_path):
    folder = Folder(tmp_path, RNA)
    tpm = {"u9": "01A", "u3": "01B", "u1": "11A", "u2": "02A", "u4": "01A"}
    for number, (file_id, code) in enumerate(tpm.items()):
        folder.add(file_id, "x.tsv", "TCGA-05-0001", f"TCGA-05-0001-{code}", star(("ENSG1.1", "G", f"{number}")))
    folder.add("u5", "x.tsv", "TCGA-05-0002", "TCGA-05-0002-02A", star(("ENSG1.1", "G", "1")))
    folder.add("u6", "x.tsv", "TCGA-05-0003", "TCGA-05-0003-06A", star(("ENSG1.1", "G", "15")))
    panel = folder.read("rna", "star_counts")
    assert panel.patients == ["TCGA-05-0001", "TCGA-05-0003"]  # 0002 has a recurrence only
    np.testing.assert_allclose(panel.values[:, 0], [np.log2(5), 4.0])  # 01A, and u4 before u9
    assert panel.notes["left_out"] == {"further file of the same patient": 2, "no sample of the tumour under study": 3}


def test_a_file_of_two_tumour_samples_ranks_by_its_better_one(tmp_path):
    folder = Folder(tmp_path, RNA)
    pair = "TCGA-05-0001, TCGA-05-0001"
    folder.add("u1", "x.tsv", "TCGA-05-0001", "TCGA-05-0001-01B", star(("ENSG1.1", "G", "0")))
    folder.add("u2", "x.tsv", pair, "TCGA-05-0001-06A, TCGA-05-0001-01A", star(("ENSG1.1", "G", "3")))
    folder.add("u3", "x.tsv", "TCGA-05-0001", "TCGA-05-0001-06A", star(("ENSG1.1", "G", "7")))
    assert folder.read("rna", "star_counts").values.tolist() == [[2]]  # u2: its 01A comes before 01B
    coded, _ = choose_files("star_counts", tmp_path, folder.sheet, "molecular.rna")
    assert coded == {"TCGA-05-0001": (tmp_path / "u2" / "x.tsv", "01")}
    coded, _ = choose_files("star_counts", tmp_path, folder.sheet, "molecular.rna", codes=("06", "01"))
    assert coded == {"TCGA-05-0001": (tmp_path / "u2" / "x.tsv", "06")}  # the smaller File ID of two 06A


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "file not found"),
        (b"", "no column 'gene_id'"),
        (b"# only a comment", "no column 'gene_id'"),
        (b"gene_id\tgene_name\n", "no column 'tpm_unstranded'"),
        (star(), "no genes"),
        (star(A, ("ENSG002.4", "GB", "")), "tpm_unstranded of ENSG002.4"),
        (star(A, ("ENSG002.4", "GB", "-1")), "tpm_unstranded of ENSG002.4"),
        (star(A, A), "occurs twice"),
        (star(A), "1 genes, other ones than"),
        (gzip.compress(star(A, B), mtime=0)[:30], "damaged"),
    ],
)
def test_bad_rna_files_are_named(tmp_path, content, words):
    folder = Folder(tmp_path, RNA)
    folder.add("u1", "good.tsv", "TCGA-05-0001", "TCGA-05-0001-01A", star(A, B))
    folder.add("u2", "bad.tsv", "TCGA-05-0002", "TCGA-05-0002-01A", content)
    with pytest.raises(MorphomeError, match=words) as caught:
        folder.read("rna", "star_counts")
    assert "bad.tsv" in str(caught.value)


def test_sheet_errors(tmp_path):
    table = {"format": "star_counts", "path": str(tmp_path)}
    with pytest.raises(MorphomeError, match=r"molecular\.sheet"):
        read_panel("rna", table, None)
    folder = Folder(tmp_path, MAF)
    folder.add("u1", "a.maf.gz", "TCGA-05-0001", "TCGA-05-0001-01A", b"")
    with pytest.raises(MorphomeError, match="no file of data type 'Gene Expression Quantification'"):
        read_panel("rna", table, folder.sheet)
    (tmp_path / "own.tsv").write_text("slide_id\tpatient_id\tpath\na\tb\tc\n")
    with pytest.raises(MorphomeError, match="not a GDC sample sheet"):
        read_panel("rna", table, tmp_path / "own.tsv")


def test_star_values(tmp_path):
    folder = Folder(tmp_path, RNA)
    rows = star(A, B, B_TWIN).decode().replace("\t1\t1\t1\t", "\t16777217\t1\t1\t")
    folder.add("u1", "x.tsv", "TCGA-05-0001", "TCGA-05-0001-01A", rows.encode())
    tpm = folder.read("rna", "star_counts", values="tpm")
    assert (tpm.value_type, tpm.unit, tpm.values.tolist()) == ("tpm", "transcripts per million", [[3, 7]])
    counts = folder.read("rna", "star_counts", values="counts")
    assert (counts.value_type, counts.unit) == ("counts", "reads")
    # neither 16,777,217 nor 33,554,434, the sum of the two genes called GB, is a float32
    assert counts.values.tolist() == [[16777216, 33554432]]
    assert counts.notes["rounded"].startswith("2 counts above 16,777,216")
    with pytest.raises(MorphomeError, match=r"molecular\.rna\.values: 'fpkm'(.|\n)*log2_tpm, tpm, counts"):
        folder.read("rna", "star_counts", values="fpkm")


def test_local_path_and_size_of_the_sheet(tmp_path):
    elsewhere = tmp_path / "elsewhere" / "mine.tsv"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(star(A))
    sheet = tmp_path / "sheet.tsv"
    head = HEADER.rstrip("\n") + "\tWorkflow Type\tFile Size\tLocal Path\n"
    row = f"u1\tx.tsv\tx\t{RNA}\tTCGA-X\tTCGA-05-0001\tTCGA-05-0001-01A\tPrimary Tumor\tSTAR - Counts\t{{}}\t{{}}\n"
    table = {"format": "star_counts", "path": str(tmp_path / "not" / "there")}
    sheet.write_text(head + row.format(elsewhere.stat().st_size, elsewhere))
    assert read_panel("rna", table, sheet).values.tolist() == [[2]]
    sheet.write_text(head + row.format(7, elsewhere))
    with pytest.raises(MorphomeError, match=r"mine\.tsv: \d+ bytes, but .*sheet\.tsv says 7 \(patient TCGA-05-0001"):
        read_panel("rna", table, sheet)
    sheet.write_text(head + row.format("", ""))
    with pytest.raises(MorphomeError, match=r"x\.tsv: file not found, neither in its folder u1"):
        read_panel("rna", table, sheet)


def test_sample_types_choose_files(tmp_path):
    folder = Folder(tmp_path, RNA)
    for file_id, sample, tpm in (("u1", "01A", "1"), ("u2", "06A", "3"), ("u3", "02A", "7")):
        folder.add(file_id, "x.tsv", "TCGA-05-0001", f"TCGA-05-0001-{sample}", star(("ENSG1.1", "G", tpm)))
    table = {"format": "star_counts", "path": str(tmp_path)}
    for codes, value in ((("01", "03", "06"), 1), (("06", "01"), 2), (("02",), 3)):
        panel = read_panel("rna", table, folder.sheet, codes)
        assert panel.values.tolist() == [[value]]
        assert panel.notes["rule_for_samples"].startswith(f"sample code {codes[0]}")
    with pytest.raises(MorphomeError, match=r"codes 05(.|\n)*cohort\.sample_types"):
        read_panel("rna", table, folder.sheet, ("05",))


def cnv(*genes: tuple[str, str, str]) -> bytes:
    """A gene-level copy-number file with ``(gene_id, gene_name, copy_number)``."""
    head = "gene_id\tgene_name\tchromosome\tstart\tend\tcopy_number\tmin_copy_number\tmax_copy_number"
    return "\n".join([head, *(f"{i}\t{g}\tchr1\t1\t2\t{c}\t{c}\t{c}" for i, g, c in genes), ""]).encode()


def test_copy_number_empty_is_not_zero(tmp_path):
    folder = Folder(tmp_path, CNV)
    genes = [("ENSG1.1", "GA", "2"), ("ENSG2.1", "GB", ""), ("ENSG3.1", "GC", ""), ("ENSG4.1", "GA", "4")]
    folder.add("u1", "x.gene_level_copy_number.v36.tsv", "TCGA-05-0001", "TCGA-05-0001-01A", cnv(*genes))
    genes[1], genes[3] = ("ENSG2.1", "GB", "0"), ("ENSG4.1", "GA", "")
    folder.add("u2", "x.gene_level_copy_number.v36.tsv", "TCGA-05-0002", "TCGA-05-0002-01A", cnv(*genes))
    panel = folder.read("cnv", "gdc_gene_level")
    assert panel.genes == ["GA", "GB"] and panel.value_type == "copy_number"
    np.testing.assert_array_equal(panel.values, [[3, np.nan], [2, 0]])
    assert panel.notes["genes_without_value"] == 1  # GC


def test_copy_number_workflows_are_not_mixed(tmp_path):
    folder = Folder(tmp_path, CNV)
    for number, workflow in enumerate(("ascat3", "absolute_liftover", "ascat2")):
        name = f"TCGA-X.0-1-2.{workflow}.gene_level_copy_number.v36.tsv"
        folder.add(f"u{number}", name, "TCGA-05-0001", "TCGA-05-0001-01A", cnv(("ENSG1.1", "GA", f"{number}")))
    with pytest.raises(MorphomeError, match=r"absolute_liftover, ascat2, ascat3(.|\n)*molecular\.cnv\.workflow"):
        folder.read("cnv", "gdc_gene_level")
    assert folder.read("cnv", "gdc_gene_level", workflow="ASCAT3").values.tolist() == [[0]]
    assert folder.read("cnv", "gdc_gene_level", workflow="ABSOLUTE LiftOver").values.tolist() == [[1]]
    with pytest.raises(MorphomeError, match="no file of workflow 'AscatNGS'"):
        folder.read("cnv", "gdc_gene_level", workflow="AscatNGS")


def test_bad_copy_number_is_named(tmp_path):
    folder = Folder(tmp_path, CNV)
    folder.add("u1", "x.tsv", "TCGA-05-0001", "TCGA-05-0001-01A", cnv(("ENSG1.1", "GA", "two")))
    with pytest.raises(MorphomeError, match=r"x\.tsv: copy_number of ENSG1\.1"):
        folder.read("cnv", "gdc_gene_level")


def test_several_patients_in_one_file_are_left_out(tmp_path):
    folder = Folder(tmp_path, RNA)
    folder.add("u1", "a.tsv", "TCGA-05-0001", "TCGA-05-0001-01A", star(A))
    folder.add("u2", "b.tsv", "TCGA-05-0001, TCGA-05-0002", "", star(A))
    coded, left_out = choose_files("star_counts", tmp_path, folder.sheet, "molecular.rna")
    files = {patient: file for patient, (file, _) in coded.items()}
    assert list(files) == ["TCGA-05-0001"] and left_out == {"several patients in one file": 1}
