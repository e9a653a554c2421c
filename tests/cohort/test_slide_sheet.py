"""Own sheets of slides and GDC sample sheets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from morphome.cohort.slide_sheet import check_slide_id, read_slide_sheet
from morphome.errors import MorphomeError

GDC = "File ID\tFile Name\tData Category\tData Type\tProject ID\tCase ID\tSample ID\tSample Type\n"


def gdc_row(name, case, sample, kind="Primary Tumor", file_id="id", data_type="Slide Image"):
    return f"{file_id}\t{name}\tBiospecimen\t{data_type}\tTCGA-BLCA\t{case}\t{sample}\t{kind}\n"


def sheet(tmp_path: Path, text: str, name: str = "sheet.tsv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_own_sheet_csv_and_tsv_agree(tmp_path):
    (tmp_path / "b.svs").write_bytes(b"x")
    text = "slide_id,patient_id,path\ns1,P1,/data/a.svs\ns2,P2,b.svs\ns3,P2,nowhere.svs\n"
    chosen, left_out = read_slide_sheet(sheet(tmp_path, text, "a.csv"))
    assert left_out == []
    assert [row.slide_id for row in chosen] == ["s1", "s2", "s3"]
    # absolute as given; beside the sheet when it is there; else as written (working directory)
    assert [row.path for row in chosen] == ["/data/a.svs", str(tmp_path / "b.svs"), "nowhere.svs"]
    again, _ = read_slide_sheet(sheet(tmp_path, "\ufeff" + text.replace(",", "\t"), "a.tsv"))
    assert again == chosen


def test_working_directory_goes_before_the_folder_of_the_sheet(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for folder in (tmp_path, tmp_path / "sub"):
        (folder / "a.svs").write_bytes(b"x")
    path = sheet(tmp_path / "sub", "slide_id,patient_id,path\ns1,P1,a.svs\n")
    monkeypatch.chdir(tmp_path)
    assert read_slide_sheet(path)[0][0].path == "a.svs"


def test_own_sheet_is_not_filtered_but_says_what_the_barcode_says(tmp_path):
    path = sheet(tmp_path, "slide_id,patient_id,path\nTCGA-CR-7395-11A-01-TS1,TCGA-CR-7395,/a.svs\n")
    chosen, _ = read_slide_sheet(path)
    assert (chosen[0].sample_type, chosen[0].slide_type, chosen[0].reason) == ("11", "TS", "")


def test_gdc_sheet_chooses_diagnostic_slides_of_the_tumour(tmp_path):
    rows = [
        gdc_row("TCGA-2F-A9KO-01Z-00-DX1.U1.svs", "TCGA-2F-A9KO", "TCGA-2F-A9KO-01Z"),
        gdc_row("TCGA-2F-A9KO-01A-01-TS1.U2.svs", "TCGA-2F-A9KO", "TCGA-2F-A9KO-01A"),
        gdc_row("TCGA-2F-A9KO-02Z-00-DX1.U3.svs", "TCGA-2F-A9KO", "TCGA-2F-A9KO-02Z", "Recurrent Tumor"),
        gdc_row("TCGA-2F-A9KP-11Z-00-DX1.U4.svs", "TCGA-2F-A9KP", "TCGA-2F-A9KP-11Z", "Solid Tissue Normal"),
        gdc_row("TCGA-2F-A9KP-06Z-00-DX1.U5.svs", "TCGA-2F-A9KP", "TCGA-2F-A9KP-06Z", "Metastatic"),
        gdc_row("two.svs", "TCGA-2F-A9KP, TCGA-2F-A9KQ", "TCGA-2F-A9KP-01Z, TCGA-2F-A9KQ-01Z"),
        gdc_row("rna.tsv", "TCGA-2F-A9KP", "TCGA-2F-A9KP-01A", data_type="Gene Expression Quantification"),
    ]
    chosen, left_out = read_slide_sheet(sheet(tmp_path, GDC + "".join(rows)), tmp_path)
    assert [row.slide_id for row in chosen] == ["TCGA-2F-A9KO-01Z-00-DX1.U1", "TCGA-2F-A9KP-06Z-00-DX1.U5"]
    assert {row.slide_id[-2:]: row.reason for row in left_out} == {
        "U2": "not a diagnostic slide (TS: frozen section)",
        "U3": "sample type 02 (recurrent solid tumour)",
        "U4": "sample type 11 (solid tissue normal)",
        "wo": "tissue of several patients",
    }


def test_gdc_sheet_without_barcodes_takes_the_words(tmp_path):
    header = GDC.replace("Sample Type", "Tissue Type\tTumor Descriptor")
    rows = [
        gdc_row("C3L-1.svs", "C3L-1", "C3L-1-21, C3L-1-21", "Tumor, Tumor\tPrimary, Primary"),
        gdc_row("C3L-2.svs", "C3L-2", "C3L-2-26", "Normal\tNot Applicable"),
    ]
    chosen, left_out = read_slide_sheet(sheet(tmp_path, header + "".join(rows)), tmp_path)
    assert [(row.slide_id, row.sample_type) for row in chosen] == [("C3L-1", "01")]
    assert [(row.slide_id, row.sample_type) for row in left_out] == [("C3L-2", "11")]


def test_gdc_files_lie_under_their_id_or_plainly(tmp_path):
    name = "TCGA-2F-A9K{}-01Z-00-DX1.svs"
    rows = [gdc_row(name.format(k), f"TCGA-2F-A9K{k}", f"TCGA-2F-A9K{k}-01Z", file_id=f"id{k}") for k in "ABC"]
    (tmp_path / "idA").mkdir()
    (tmp_path / "idA" / name.format("A")).write_bytes(b"x")
    (tmp_path / name.format("B")).write_bytes(b"x")
    chosen, _ = read_slide_sheet(sheet(tmp_path, GDC + "".join(rows)), tmp_path)
    assert [row.path for row in chosen] == [
        str(tmp_path / "idA" / name.format("A")),
        str(tmp_path / name.format("B")),
        str(tmp_path / "idC" / name.format("C")),  # not there: where it would be fetched to
    ]


@pytest.mark.parametrize(
    "bad", ["a/b", "../x", ".hidden", "-x", "", "a..b", "x" * 151, "a\\b", "{x}", " x", "x ", "x.", "ü"]
)
def test_unsafe_slide_ids_are_refused(bad):
    with pytest.raises(MorphomeError, match="sheet, line 3: slide id"):
        check_slide_id(bad, "sheet, line 3")


@pytest.mark.parametrize("good", ["a", "test3-DAPI-2-(387)", "Slide 1", "TCGA-2F-A9KO-01Z-00-DX1.195576CF", "x" * 150])
def test_ordinary_slide_ids_are_taken(good):
    assert check_slide_id(good, "x") == good


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slide_id,patient_id\na,P\n", "no column 'path'"),
        ("slide_id,patient_id,path\n", "no slides"),
        ("", "empty"),
        ("slide_id,patient_id,path\na,P,x\na,Q,y\n", "'a' occurs twice .patients P and Q"),
        ("slide_id,patient_id,path\na,P\n", "line 2: 2 cells, but the header has 3"),
        ("slide_id,patient_id,path\na,,x\n", "line 2: slide 'a' has no patient_id"),
        ("slide_id,patient_id,path\na,P,x\nb,P,\n", "line 3: slide 'b' has no path"),
        ("slide_id,patient_id,path\na/b,P,x\n", "line 2: slide id 'a/b'"),
        ("slide_id,path,path\na,b,c\n", "'path' occurs twice"),
        (
            "slide_id,patient_id,path\na,P,x\nb,Q,y\nc,R,./x\n",
            "lines 2 and 4: .*'a' of patient P and .*'c' of patient R",
        ),
        ("slide_id,patient_id,path\na,P,x\nb,Q,{y}.svs\n", "line 3: .*braces(.|\n)*rename"),
        ("slide_id,patient_id,path\n{a},P,x\n", "line 2: slide id '{a}'"),
        ("slide_id;patient_id;path\na;P;x\n", "semicolons(.|\n)*commas or tabs"),
        (GDC + gdc_row("TCGA-2F-A9KO-01Z-00-DX1.svs", "", ""), "line 2: no Case ID"),
        (GDC + gdc_row("../x.svs", "TCGA-2F-A9KO", ""), "line 2: '../x.svs' is not a plain file name"),
        (GDC + gdc_row("x.svs", "TCGA-2F-A9KO", "", file_id=".."), "not a plain file name"),
    ],
)
def test_bad_sheets_are_named(tmp_path, text, words):
    path = sheet(tmp_path, text)
    with pytest.raises(MorphomeError, match=words) as caught:
        read_slide_sheet(path, tmp_path)
    assert str(path) in str(caught.value)


def test_a_link_to_a_listed_slide_is_the_same_file(tmp_path):
    (tmp_path / "a.svs").write_bytes(b"x")
    (tmp_path / "b.svs").symlink_to(tmp_path / "a.svs")
    path = sheet(tmp_path, "slide_id,patient_id,path\na,P,a.svs\nb,P,b.svs\n")
    with pytest.raises(MorphomeError, match="the same file is listed twice"):
        read_slide_sheet(path)
    assert len(read_slide_sheet(path, require_path=False)[0]) == 2  # paths are not used there


def test_a_latin_1_sheet_is_named_with_its_line(tmp_path):
    path = tmp_path / "s.csv"
    path.write_bytes("slide_id,patient_id,path\na,Müller,x\n".encode("latin-1"))
    with pytest.raises(MorphomeError, match=r"s\.csv, line 2: not UTF-8(.|\n)*save the table as UTF-8"):
        read_slide_sheet(path)


def test_missing_sheet_and_missing_folder(tmp_path):
    with pytest.raises(MorphomeError, match=r"slides\.sheet"):
        read_slide_sheet(tmp_path / "no.tsv")
    path = sheet(tmp_path, GDC + gdc_row("a.svs", "P", ""))
    with pytest.raises(MorphomeError, match=r"slides\.folder"):
        read_slide_sheet(path)
    assert read_slide_sheet(path, require_path=False)[0][0].path == ""


def test_reads_without_heavy_imports(loaded_by):
    """The workflow reads sheets while it builds its graph."""
    assert not loaded_by("morphome.cohort.slide_sheet") & {"pandas", "numpy", "torch", "h5py", "pyarrow"}


def test_real_sample_sheet(shared_data):
    chosen, left_out = read_slide_sheet(shared_data / "gdc" / "gdc_sample_sheet.tsv", Path("slides"))
    assert (len(chosen), len(left_out)) == (927, 13)
    assert Counter(row.reason for row in left_out) == {
        "sample type 11 (solid tissue normal)": 12,
        "sample type 05 (additional new primary)": 1,
    }
    assert all(row.patient_id == row.slide_id[:12] for row in chosen)
    assert "TCGA-KM-A7QA" in {row.patient_id for row in chosen}  # "Primary Tumor, Primary Tumor"
