"""Outcomes from a cBioPortal study and from a Xena hub."""

from __future__ import annotations

import numpy as np
import pytest

from morphome.cohort.clinical import read_clinical
from morphome.cohort.values import status_of
from morphome.errors import MorphomeError

# --- cBioPortal ------------------------------------------------------------------------------------------

COLUMNS = ("PATIENT_ID", "OS_STATUS", "OS_MONTHS", "DFS_STATUS", "DFS_MONTHS", "AGE", "SEX")
PATIENTS = [
    ("TCGA-05-0001", "1:DECEASED", "12.5", "1:Recurred/Progressed", "3", "60", "Female"),
    ("TCGA-05-0002", "0:LIVING", "30", "0:DiseaseFree", "[Not Available]", "", "Male"),
    ("TEST_PATIENT", "[Not Available]", "", "", "", "", ""),
]


def study(tmp_path, samples=None, columns=COLUMNS, rows=PATIENTS, patients="data_clinical_patients.txt", meta=True):
    folder = tmp_path / "study"
    folder.mkdir(exist_ok=True)
    words = ["a description"] * len(columns)
    if "OS_MONTHS" in columns:
        words[columns.index("OS_MONTHS")] = "Months since diagnosis"
    above = "".join("#" + "\t".join(cells) + "\n" for cells in (columns, words, ["STRING"] * len(columns), ["1"] * 5))
    (folder / patients).write_text(above + "\n".join("\t".join(row) for row in (columns, *rows)) + "\n")
    if meta:
        (folder / "meta_patients.txt").write_text(f"datatype: PATIENT_ATTRIBUTES\ndata_filename: {patients}\n")
    if samples:
        (folder / "data_clinical_sample.txt").write_text("#a\n" * 4 + "\n".join("\t".join(r) for r in samples) + "\n")
    return folder


def test_cbioportal_study(tmp_path):
    folder = study(tmp_path)
    found = read_clinical("cbioportal", folder)
    assert found.table["patient_id"].tolist() == ["TCGA-05-0001", "TCGA-05-0002", "TEST_PATIENT"]
    assert found.table["site"].tolist() == ["05", "05", "unknown"]
    np.testing.assert_array_equal(found.table["time_months"], [12.5, 30, np.nan])
    np.testing.assert_array_equal(found.table["event"], [1, 0, np.nan])
    assert found.table["why"].tolist() == ["", "", "OS_STATUS is [Not Available]"]
    assert found.table["sex"].tolist() == ["female", "male", None]
    assert found.notes["time_zero"] == 'as the study says of OS_MONTHS: "Months since diagnosis"'
    assert found.notes["end_point_columns"] == "OS from OS_STATUS and OS_MONTHS"
    again = read_clinical("cbioportal", folder / "data_clinical_patients.txt")
    assert again.table.equals(found.table)


def test_cbioportal_disease_free_survival_is_dfi(tmp_path):
    found = read_clinical("cbioportal", study(tmp_path), endpoint="DFI")
    np.testing.assert_array_equal(found.table["event"], [1, 0, np.nan])
    assert found.table["why"].tolist() == ["", "DFS_MONTHS is [Not Available]", "DFS_STATUS is empty"]
    assert found.notes["end_point_columns"] == "DFI from DFS_STATUS and DFS_MONTHS"
    with pytest.raises(MorphomeError, match=r"no columns 'PFS_STATUS'(.|\n)*PFI; the study has: OS, DFI"):
        read_clinical("cbioportal", study(tmp_path), endpoint="PFI")


def test_cbioportal_without_descriptions_does_not_say_when_time_begins(tmp_path):
    folder = study(tmp_path)
    path = folder / "data_clinical_patients.txt"
    bare = "".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith("#"))
    path.write_text(bare)
    assert read_clinical("cbioportal", folder).notes["time_zero"] == "not stated"
    path.write_text(bare.replace("DFS_", "PFS_"))
    found = read_clinical("cbioportal", folder, endpoint="PFI")
    assert found.notes["end_point_columns"] == "PFI from PFS_STATUS and PFS_MONTHS"


def test_cbioportal_samples_add_what_the_patients_lack(tmp_path):
    samples = [
        ("PATIENT_ID", "SAMPLE_ID", "GRADE", "AGE", "TISSUE_SOURCE_SITE", "CANCER_TYPE_ACRONYM"),
        ("TCGA-05-0001", "TCGA-05-0001-01", "G3", "99", "UCSF", "LUAD"),
        ("TCGA-05-0001", "TCGA-05-0001-06", "", "99", "UCSF", "LUAD"),
        ("TCGA-05-0002", "TCGA-05-0002-01", "G1", "99", "", "LUSC"),
        ("TCGA-05-0002", "TCGA-05-0002-02", "G2", "99", "", "LUSC"),
        ("TCGA-05-0009", "TCGA-05-0009-01", "G2", "99", "", "LUSC"),
    ]
    folder = study(tmp_path, samples)
    found = read_clinical("cbioportal", folder)
    assert found.table["patient_id"].tolist() == ["TCGA-05-0001", "TCGA-05-0002", "TEST_PATIENT"]
    np.testing.assert_array_equal(found.table["grade"], [3, np.nan, np.nan])  # samples that differ give nothing
    np.testing.assert_array_equal(found.table["age_years"], [60, np.nan, np.nan])  # the table of patients decides
    assert found.table["site"].tolist() == ["University of California San Francisco", "05", "unknown"]
    assert found.notes["sample_cells_that_differ"] == {"GRADE": 1}
    assert (found.notes["samples"], found.notes["patients_with_several_samples"]) == (5, 2)
    kept = read_clinical("cbioportal", folder, types=["LUSC"])
    assert kept.table["patient_id"].tolist() == ["TCGA-05-0002"] and kept.notes["rows_of_other_types"] == 2


def test_cbioportal_errors(tmp_path):
    rows = [("P1", "1:DECEASED", "12", "", "", "", ""), ("P2", "0:DECEASED", "12", "", "", "", "")]
    said = r"'0:DECEASED' in column 'OS_STATUS' .patient P2.(.|\n)*as 1:DECEASED and 0:LIVING"
    with pytest.raises(MorphomeError, match=said):
        read_clinical("cbioportal", study(tmp_path, rows=rows))
    with pytest.raises(MorphomeError, match="patient P1 occurs twice"):
        read_clinical("cbioportal", study(tmp_path, rows=rows[:1] * 2))
    with pytest.raises(MorphomeError, match="does not say of which cancer type"):
        read_clinical("cbioportal", study(tmp_path), types=["LUAD"])
    with pytest.raises(MorphomeError, match="no column 'PATIENT_ID'"):
        read_clinical("cbioportal", study(tmp_path, columns=("ID", *COLUMNS[1:])))
    (tmp_path / "study" / "data_clinical_patients.txt").unlink()
    with pytest.raises(
        MorphomeError, match=r"meta_patients\.txt: names data_clinical_patients\.txt, which is not there"
    ):
        read_clinical("cbioportal", tmp_path / "study")
    with pytest.raises(MorphomeError, match="no table of patients"):
        read_clinical("cbioportal", tmp_path)
    with pytest.raises(MorphomeError, match="no age, sex, stage or grade"):
        folder = study(tmp_path, columns=COLUMNS[:5], rows=[row[:5] for row in PATIENTS])
        read_clinical("cbioportal", folder, outcome=False)


def test_cbioportal_without_meta_file_takes_the_usual_name(tmp_path):
    folder = study(tmp_path, patients="data_clinical_patient.txt", meta=False)
    assert len(read_clinical("cbioportal", folder).table) == 3


@pytest.mark.parametrize(
    ("text", "status"),
    [
        *[("1:DECEASED", 1), ("0:LIVING", 0), ("DECEASED", 1), ("LIVING", 0), ("1:Recurred/Progressed", 1)],
        *[("0:DiseaseFree", 0), ("0:ALIVE OR DEAD TUMOR FREE", 0), ("1:DEAD WITH TUMOR", 1), ("0:CENSORED", 0)],
        *[("1:PROGRESSION", 1), ("1:some new word", 1), ("1", 1), ("0:", 0), ("", np.nan), ("[Not Available]", np.nan)],
    ],
)
def test_status(text, status):
    assert status_of(text) == pytest.approx(status, nan_ok=True)


@pytest.mark.parametrize("text", ["2:DECEASED", "0:DECEASED", "1:LIVING", "lost", "1.5", "10"])
def test_no_status(text):
    with pytest.raises(ValueError, match="not a status"):
        status_of(text)


# --- Xena ------------------------------------------------------------------------------------------------


def xena(tmp_path, text, name="x.tsv"):
    path = tmp_path / name
    path.write_text(text.replace(" ", "\t"))
    return path


def test_xena_samples_are_joined_by_patient(tmp_path):
    text = (
        "sample OS _PATIENT OS.time\n"
        "TCGA-05-0002-11A 0 TCGA-05-0002 100\nTCGA-05-0002-01A 0 TCGA-05-0002 100.0\n"
        "TCGA-05-0001-01A 1 TCGA-05-0001 609\nTCGA-05-0003-01A  TCGA-05-0003 \n"
    )
    found = read_clinical("xena", xena(tmp_path, text))
    assert found.table["patient_id"].tolist() == ["TCGA-05-0001", "TCGA-05-0002", "TCGA-05-0003"]
    np.testing.assert_allclose(found.table["time_months"], [609 / 30.4375, 100 / 30.4375, np.nan])
    np.testing.assert_array_equal(found.table["event"], [1, 0, np.nan])
    assert found.table["records"].tolist() == [1, 2, 1] and found.n_records == 4
    assert found.table["why"].tolist() == ["", "", "OS is empty"]
    rows = [line.split(" ") for line in text.splitlines()]
    bare = "\n".join(" ".join([row[0], row[1], row[3]]) for row in rows) + "\n"
    assert read_clinical("xena", xena(tmp_path, bare)).table.equals(found.table)  # patients from the barcodes


def test_xena_errors(tmp_path):
    head = "sample _PATIENT OS OS.time\n"
    with pytest.raises(MorphomeError, match=r"samples of patient P1 differ in column 'OS\.time'"):
        read_clinical("xena", xena(tmp_path, head + "S1 P1 0 10\nS2 P1 0 11\n"))
    with pytest.raises(MorphomeError, match="samples of patient P1 differ in column 'OS'"):
        read_clinical("xena", xena(tmp_path, head + "S1 P1 0 10\nS2 P1 1 10\n"))
    with pytest.raises(MorphomeError, match=r"no column 'PFI'(.|\n)*end points OS"):
        read_clinical("xena", xena(tmp_path, head + "S1 P1 0 10\n"), endpoint="PFI")
    with pytest.raises(MorphomeError, match="'S1' in column 'sample' is no TCGA barcode"):
        read_clinical("xena", xena(tmp_path, "sample OS OS.time\nS1 0 10\n"))


def test_xena_table_of_all_cancers(tmp_path):
    path = tmp_path / "all.tsv"
    path.write_text(
        "sample\t_PATIENT\tcancer type abbreviation\tage_at_initial_pathologic_diagnosis\tgender\t"
        "ajcc_pathologic_tumor_stage\tPFI\tPFI.time\tRedaction\n"
        "TCGA-05-0001-01\tTCGA-05-0001\tSKCM\t60\tMALE\tStage IIA\t1\t609\t\n"
        "TCGA-05-0001-06\tTCGA-05-0001\tSKCM\t60\tMALE\tStage IIA\t1\t609\t\n"
        "TCGA-05-0002-01\tTCGA-05-0002\tLUAD\t61\tFEMALE\tStage I\t0\t30\tRedacted\n"
    )
    found = read_clinical("xena", path, endpoint="PFI", types=["SKCM"])
    assert found.table.loc[0, ["age_years", "sex", "stage", "event"]].tolist() == [60, "male", 2, 1]
    assert "metastases" in found.notes["time_zero"] and found.notes["rows_of_other_types"] == 1
    assert read_clinical("xena", path, endpoint="PFI").table["redacted"].tolist() == [False, True]


# --- types -----------------------------------------------------------------------------------------------


def test_types_of_own_and_portal_tables(tmp_path):
    own = tmp_path / "own.csv"
    own.write_text("patient_id,time,event,type\nA,1,1,HNSC\nB,2,0,luad\n")
    assert read_clinical("csv", own, types=["LUAD"]).table["patient_id"].tolist() == ["B"]
    own.write_text("patient_id,time,event\nA,1,1\n")
    with pytest.raises(MorphomeError, match=r"does not say of which cancer type(.|\n)*TCGA-CDR"):
        read_clinical("csv", own, types=["LUAD"])
    slides = tmp_path / "p.csv"
    slides.write_text("case_id,slide_id,survival_months,censorship,oncotree_code\nA,a,1,1,LUAD\n")
    with pytest.raises(MorphomeError, match="porpoise"):
        read_clinical("porpoise", slides, types=["LUAD"])
    head = "cases.submitter_id\tdemographic.vital_status\tdemographic.days_to_death\tproject.project_id\t"
    gdc = tmp_path / "clinical.tsv"
    gdc.write_text(head + "diagnoses.days_to_last_follow_up\nA\tDead\t3\tTCGA-HNSC\t1\nB\tDead\t3\tTCGA-LUAD\t1\n")
    assert read_clinical("gdc_clinical", gdc, types=["HNSC"]).table["patient_id"].tolist() == ["A"]
    assert len(read_clinical("gdc_clinical", gdc).table) == 2
