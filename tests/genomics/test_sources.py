"""Every source of molecular values ends in the same table; which format serves which panel."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from morphome.errors import MorphomeError, MorphomeWarning
from morphome.files import parquet_meta, read_parquet
from morphome.genomics.panels import PANELS, run_genes
from morphome.genomics.sources import FORMATS, read_panel

PATIENTS = [f"TCGA-05-000{number}" for number in (1, 2, 3)]
GENES = ["GA", "GB", "GC"]
#: Patients x genes, one of them not measured where the source can say so.
TPM = np.array([[3.0, 0.0, 15.0], [1.0, 7.0, 0.0], [0.0, 31.0, 1.0]])
MUTATED = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0]])
COPIES = np.array([[2, 1, -1], [0, np.nan, 2], [-2, 0, 1]])
SHEET = "File ID\tFile Name\tData Category\tData Type\tProject ID\tCase ID\tSample ID\n"
#: Samples that must not be taken: a normal, a recurrence, a later vial.
OTHERS = [f"{PATIENTS[0]}-11A", f"{PATIENTS[1]}-02A", f"{PATIENTS[2]}-01B"]


def tsv(rows: list[list[object]]) -> str:
    return "".join("\t".join("" if cell is None else str(cell) for cell in row) + "\n" for row in rows)


def cell(value: float) -> object:
    return "" if np.isnan(value) else f"{value:g}"


def gdc_folder(root: Path, data_type: str, texts: list[str], ending: str) -> dict[str, Any]:
    """One file per patient, and one of a normal sample that is a copy of the first."""
    sheet = SHEET
    for number, (patient, text) in enumerate(zip([*PATIENTS, PATIENTS[0]], [*texts, texts[0]], strict=True)):
        sample = f"{patient}-01A" if number < len(PATIENTS) else OTHERS[0]
        (root / f"u{number}").mkdir()
        (root / f"u{number}" / f"x{ending}").write_text(text)
        sheet += f"u{number}\tx{ending}\tx\t{data_type}\tTCGA-X\t{patient}\t{sample}\n"
    (root / "sheet.tsv").write_text(sheet)
    return {"path": str(root)}


def star(root: Path) -> dict[str, Any]:
    header = ["gene_id", "gene_name", "gene_type", "unstranded", "stranded_first", "stranded_second", "tpm_unstranded"]
    texts = [
        "# gene-model: GENCODE v36\n"
        + tsv([header, *([f"ENSG{n}.1", gene, "x", 1, 1, 1, row[n]] for n, gene in enumerate(GENES))])
        for row in TPM
    ]
    return {"format": "star_counts", **gdc_folder(root, "Gene Expression Quantification", texts, ".tsv")}


def csv(values: np.ndarray, **more: str) -> Callable[[Path], dict[str, Any]]:
    def write(root: Path) -> dict[str, Any]:
        rows = [[patient, *map(cell, row)] for patient, row in zip(PATIENTS, values, strict=True)]
        (root / "t.tsv").write_text(tsv([["patient_id", *GENES], *rows[::-1]]))
        return {"format": "csv", "path": str(root / "t.tsv"), **more}

    return write


def porpoise(values: np.ndarray, suffix: str) -> Callable[[Path], dict[str, Any]]:
    def write(root: Path) -> dict[str, Any]:
        header = ["", "case_id", "slide_id", "survival_months", "censorship", "train", "is_female"]
        rows = [
            [number, patient, f"s{number}_{slide}.svs", 1, 0, 1, 0, *map(cell, row)]
            for number, (patient, row) in enumerate(zip(PATIENTS, values, strict=True))
            for slide in range(2)
        ]
        (root / "t.csv").write_text(tsv([[*header, *(gene + suffix for gene in GENES)], *rows]).replace("\t", ","))
        return {"format": "porpoise", "path": str(root / "t.csv")}

    return write


def wide(values: np.ndarray, first: list[str], ends: str) -> list[list[object]]:
    """Genes x samples, with columns of samples that must not be taken."""
    samples = [*OTHERS[::-1], *(f"{patient}-{ends}" for patient in PATIENTS)]
    rows = [
        [gene, *([7] * (len(first) - 1)), *([9] * len(OTHERS)), *map(cell, values[:, n])]
        for n, gene in enumerate(GENES)
    ]
    return [[*first, *samples], *rows]


def cbioportal(values: np.ndarray, kind: str, form: str) -> Callable[[Path], dict[str, Any]]:
    def write(root: Path) -> dict[str, Any]:
        meta = f"genetic_alteration_type: {kind}\ndatatype: {form}\nstable_id: p\ndata_filename: data_p.txt\n"
        (root / "meta_p.txt").write_text(meta + "profile_description: Made up.\n")
        table = wide(values, ["Hugo_Symbol", "Entrez_Gene_Id"], "01")
        if form == "DISCRETE_LONG":
            long = [["Hugo_Symbol", "Entrez_Gene_Id", "Sample_Id", "Value"]]
            long += [
                [row[0], 7, sample, value]
                for row in table[1:]
                for sample, value in zip(table[0][2:], row[2:], strict=True)
                if sample not in OTHERS
            ]
            table = long
        (root / "data_p.txt").write_text(tsv(table))
        return {"format": "cbioportal", "path": str(root)}

    return write


def xena(values: np.ndarray, turned: bool = False, **more: str) -> Callable[[Path], dict[str, Any]]:
    def write(root: Path) -> dict[str, Any]:
        table = wide(values, ["sample"], "01A")
        table = [list(row) for row in zip(*table, strict=True)] if turned else table
        (root / "x.tsv.gz").write_bytes(gzip.compress(tsv(table).encode()))
        return {"format": "xena", "path": str(root / "x.tsv.gz"), **more}

    return write


def variants(names: list[str], ends: str, kinds: tuple[str, str]) -> list[list[object]]:
    """A line per mutation, and a silent one for each patient, so that all are known to have been sequenced."""
    rows: list[list[object]] = [names]
    for patient, row in zip(PATIENTS, MUTATED, strict=True):
        rows.append(["GA", kinds[1], f"{patient}-{ends}"])
        rows += [[gene, kinds[0], f"{patient}-{ends}"] for gene, hit in zip(GENES, row, strict=True) if hit]
    return [*rows, *(["GZ", kinds[0], other] for other in OTHERS)]


MAF = ["Hugo_Symbol", "Variant_Classification", "Tumor_Sample_Barcode"]


def one_maf(root: Path) -> dict[str, Any]:
    (root / "all.maf").write_text("#v\n" + tsv(variants(MAF, "01A-11D-1893-08", ("Splice_Site", "Silent"))))
    return {"format": "maf", "path": str(root / "all.maf")}


def mafs(root: Path) -> dict[str, Any]:
    rows = variants(MAF, "01A-11D-1893-08", ("Nonsense_Mutation", "Intron"))
    texts = [tsv([MAF, *(row for row in rows if str(row[2]).startswith(f"{p}-01A"))]) for p in PATIENTS]
    return {"format": "maf", **gdc_folder(root, "Masked Somatic Mutation", texts, ".maf")}


def cbioportal_maf(root: Path) -> dict[str, Any]:
    """Silent lines are left out here: the case list says who was sequenced."""
    meta = "genetic_alteration_type: MUTATION_EXTENDED\ndatatype: MAF\ndata_filename: data_mutations.txt\n"
    (root / "meta_mutations.txt").write_text(meta)
    rows = [row for row in variants(MAF, "01", ("Missense_Mutation", "Silent")) if row[1] != "Silent"]
    (root / "data_mutations.txt").write_text("#version 2.4\n" + tsv(rows))
    (root / "case_lists").mkdir()
    listed = "\t".join(f"{patient}-01" for patient in PATIENTS)
    (root / "case_lists" / "cases_sequenced.txt").write_text(f"stable_id: s_sequenced\ncase_list_ids: {listed}\n")
    return {"format": "cbioportal", "path": str(root)}


def xena_variants(root: Path) -> dict[str, Any]:
    kinds = ("missense_variant;splice_region_variant", "synonymous_variant")
    (root / "x.tsv").write_text(tsv(variants(["gene", "effect", "sample"], "01A", kinds)))
    return {"format": "xena", "path": str(root / "x.tsv")}


def gene_level(root: Path) -> dict[str, Any]:
    header = ["gene_id", "gene_name", "chromosome", "copy_number"]
    texts = [
        tsv([header, *([f"ENSG{n}.1", gene, "chr1", cell(row[n] + 2)] for n, gene in enumerate(GENES))])
        for row in COPIES
    ]
    return {"format": "gdc_gene_level", **gdc_folder(root, "Gene Level Copy Number", texts, ".tsv")}


LOG = np.log2(TPM + 1)
LOG_UNIT = "log2(tpm+1)"
SOURCES = {
    "rna star": ("rna", star, LOG, "log2_tpm_plus_1"),
    "rna csv": ("rna", csv(LOG), LOG, "as_given"),
    "rna porpoise": ("rna", porpoise(LOG, "_rnaseq"), LOG, "zscore"),
    "rna cbioportal": ("rna", cbioportal(TPM, "MRNA_EXPRESSION", "CONTINUOUS"), TPM, "as_given"),
    "rna cbioportal z": ("rna", cbioportal(LOG, "MRNA_EXPRESSION", "Z-SCORE"), LOG, "zscore"),
    "rna xena": ("rna", xena(LOG, unit=LOG_UNIT), LOG, "log2_tpm_plus_1"),
    "rna xena turned": ("rna", xena(LOG, turned=True), LOG, "as_given"),
    "mut mafs": ("mut", mafs, MUTATED, "binary"),
    "mut one maf": ("mut", one_maf, MUTATED, "binary"),
    "mut csv": ("mut", csv(MUTATED), MUTATED, "as_given"),
    "mut porpoise": ("mut", porpoise(MUTATED, "_mut"), MUTATED, "binary"),
    "mut porpoise bare": ("mut", porpoise(MUTATED, ""), MUTATED, "binary"),
    "mut cbioportal": ("mut", cbioportal_maf, MUTATED, "binary"),
    "mut xena": ("mut", xena_variants, MUTATED, "binary"),
    "cnv gene level": ("cnv", gene_level, COPIES + 2, "copy_number"),
    "cnv csv": ("cnv", csv(COPIES), COPIES, "as_given"),
    "cnv porpoise": ("cnv", porpoise(COPIES, "_cnv"), COPIES, "gistic"),
    "cnv cbioportal": ("cnv", cbioportal(COPIES, "COPY_NUMBER_ALTERATION", "DISCRETE"), COPIES, "gistic"),
    "cnv cbioportal long": ("cnv", cbioportal(COPIES, "COPY_NUMBER_ALTERATION", "DISCRETE_LONG"), COPIES, "gistic"),
    "cnv cbioportal log2": ("cnv", cbioportal(COPIES, "COPY_NUMBER_ALTERATION", "LOG2-VALUE"), COPIES, "log2_ratio"),
    "cnv xena": ("cnv", xena(COPIES), COPIES, "as_given"),
    "expression csv": ("expression", csv(TPM, unit="RSEM"), TPM, "as_given"),
    "expression cbioportal": ("expression", cbioportal(TPM, "MRNA_EXPRESSION", "CONTINUOUS"), TPM, "as_given"),
    "expression xena": ("expression", xena(TPM, unit="TPM"), TPM, "tpm"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_ends_in_the_same_table(tmp_path, name):
    panel, write, values, value_type = SOURCES[name]
    table = write(tmp_path)
    sheet = {"sheet": str(tmp_path / "sheet.tsv")} if (tmp_path / "sheet.tsv").exists() else {}
    out = tmp_path / "out.parquet"
    settings = {"molecular": {**sheet, panel: table}, "cohort": {"sample_types": ["01", "03", "06"]}}
    run_genes(settings=settings, panels_out={panel: out}, groups_out=None)
    found = read_parquet(out, "morphome.panel", settings)
    expected = pd.DataFrame(values.astype(np.float32), columns=GENES)
    expected.insert(0, "patient_id", PATIENTS)
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, rtol=1e-6)
    assert (found.dtypes[GENES] == np.float32).all()
    meta = parquet_meta(out)
    assert {"panel", "value_type", "unit", "gene_ids", "n_files", "format", "source", "sample_types", "notes"} <= set(
        meta
    )
    assert (meta["panel"], meta["value_type"], meta["format"]) == (panel, value_type, table["format"])
    assert meta["unit"] and meta["notes"]["rule_for_samples"] and "left_out" in meta["notes"]


def test_every_format_of_every_panel_is_in_this_list(tmp_path):
    tried = {("expression", "star_counts")}  # the test below
    for name, (panel, write, *_) in SOURCES.items():
        (tmp_path / name).mkdir()
        tried.add((panel, write(tmp_path / name)["format"]))
    assert tried == {(panel, name) for panel in PANELS for name in FORMATS[panel]}


def test_expression_from_star_counts(tmp_path):
    table = star(tmp_path)
    panel = read_panel("expression", table, tmp_path / "sheet.tsv")
    assert (panel.value_type, panel.unit) == ("counts", "reads") and panel.values.tolist() == [[1, 1, 1]] * 3
    tpm = read_panel("expression", {**table, "values": "tpm"}, tmp_path / "sheet.tsv")
    assert tpm.value_type == "tpm"
    np.testing.assert_array_equal(tpm.values, TPM.astype(np.float32))
    with pytest.raises(MorphomeError, match=r"values in log2\(TPM \+ 1\) are no counts or TPM(.|\n)*molecular\.rna"):
        read_panel("expression", {**table, "values": "log2_tpm"}, tmp_path / "sheet.tsv")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (csv(TPM), r"does not say what its values are, and molecular\.expression\.unit is not set(.|\n)*counts"),
        (xena(TPM), r"does not say what its values are, and molecular\.expression\.unit is not set(.|\n)*TPM"),
        (csv(LOG, unit="ln(TPM + 1)"), r"values in ln\(TPM \+ 1\) are no counts"),
        (csv(LOG, unit="Log10 RSEM"), r"values in Log10 RSEM are no counts"),
        (csv(LOG, unit="mRNA z-scores"), r"values in mRNA z-scores are no counts"),
        (csv(COPIES, unit="TPM"), r"2 values are negative, as -1 of GC for patient TCGA-05-0001"),
        (xena(LOG, unit="log2(count+1)"), r"values in log2\(count\+1\) are no counts"),
        (cbioportal(COPIES, "MRNA_EXPRESSION", "CONTINUOUS"), "are negative"),
        (cbioportal(LOG, "MRNA_EXPRESSION", "Z-SCORE"), r"no profile of MRNA_EXPRESSION \(CONTINUOUS\)"),
    ],
)
def test_expression_refuses_what_is_no_amount(tmp_path, write, words):
    with pytest.raises(MorphomeError, match=words) as caught:
        read_panel("expression", write(tmp_path), None)
    assert "molecular.expression" in str(caught.value)


def test_expression_is_in_no_gene_group(tmp_path):
    (tmp_path / "g.gmt").write_text("one\tx\tGA\tGB\n")
    table = csv(TPM, unit="TPM")(tmp_path)
    groups = {"path": str(tmp_path / "g.gmt"), "min_genes": 1}
    settings = {"molecular": {"rna": table, "expression": table, "groups": groups}}
    out = {panel: tmp_path / f"{panel}.parquet" for panel in ("rna", "expression")}
    run_genes(settings=settings, panels_out=out, groups_out=tmp_path / "groups.json")
    text = (tmp_path / "groups.json").read_text()
    assert '"rna"' in text and '"expression"' not in text.split('"groups"')[1].split('"match"')[0]
    settings = {"molecular": {"expression": table, "groups": groups}}
    with pytest.raises(MorphomeError, match="no group has 1 gene with a column"):
        run_genes(settings=settings, panels_out={"expression": out["expression"]}, groups_out=tmp_path / "g.json")


def test_own_table_takes_the_logarithm(tmp_path):
    table = csv(TPM, unit="TPM")(tmp_path)
    panel = read_panel("rna", {**table, "log2": True}, None)
    np.testing.assert_allclose(panel.values, LOG.astype(np.float32), rtol=1e-6)
    assert (panel.value_type, panel.unit) == ("log2_plus_1", "log2(TPM + 1)")
    assert "rule_for_symbols" not in panel.notes  # columns are unique there
    large = csv(TPM * 100, unit="TPM")(tmp_path)
    with pytest.warns(MorphomeWarning, match=r"t\.tsv: values up to 3100 \(TPM\)(.|\n)*set molecular\.rna\.log2"):
        read_panel("rna", large, None)
    assert read_panel("rna", {**large, "unit": "z-score"}, None).value_type == "zscore"
    assert read_panel("expression", large, None).value_type == "tpm"


@pytest.mark.parametrize(("panel", "suffix"), [("rna", "_rnaseq"), ("cnv", "_cnv")])
def test_published_z_scores_say_so(tmp_path, panel, suffix):
    notes = read_panel(panel, porpoise(TPM, suffix)(tmp_path), None).notes
    said = "z-scores as published, standardised over all patients of the source table, test folds included"
    assert notes.get("rule_for_values") == (said if panel == "rna" else None)


@pytest.mark.parametrize(
    ("panel", "name", "words"),
    [
        ("mut", "star_counts", r"molecular\.mut\.format: star_counts files hold rna, expression, not mut"),
        ("expression", "porpoise", "porpoise files hold rna, mut, cnv, not expression"),
        ("rna", "nonsense", "hold no panel"),
    ],
)
def test_formats_hold_their_panels_only(tmp_path, panel, name, words):
    with pytest.raises(MorphomeError, match=words):
        read_panel(panel, {"format": name, "path": str(tmp_path)}, None)


def test_other_sample_types_on_request(tmp_path):
    table = xena(TPM)(tmp_path)
    recurrence = read_panel("rna", table, None, ("02",))
    assert recurrence.patients == [PATIENTS[1]] and recurrence.values.tolist() == [[9, 9, 9]]
    both = read_panel("rna", table, None, ("02", "01"))
    assert both.patients == PATIENTS and both.values[1].tolist() == [9, 9, 9]
    assert both.notes["rule_for_samples"].startswith("sample code 02, then 01;")
    with pytest.raises(MorphomeError, match=r"no sample of the tumour under study \(codes 06\)(.|\n)*sample_types"):
        read_panel("rna", table, None, ("06",))


def test_real_survpath_table_is_read_cell_by_cell(shared_data):
    """360 patients x 1,577 genes of log2(x + 0.001): joined by barcode, whatever the order of the rows."""
    path = shared_data / "tables" / "survpath" / "rna_xena_blca.csv.gz"
    panel = read_panel("rna", {"format": "csv", "path": str(path), "unit": "log2(x + 0.001)"}, None)
    assert panel.values.shape == (360, 1577) and panel.patients == sorted(panel.patients)
    assert panel.unit == "log2(x + 0.001)" and "TCGA-C4-A0F6" in panel.patients
    raw = pd.read_csv(path, index_col=0)
    assert raw.index.tolist() != panel.patients
    np.testing.assert_allclose(panel.values, raw.loc[panel.patients, panel.genes].to_numpy(np.float32))
    floor = panel.values < np.log2(0.001) + 0.01
    assert 0.06 < floor.mean() < 0.08
