"""Outcomes and covariates from clinical.tsv of the GDC and from TCGA-CDR."""

from __future__ import annotations

import gzip

import numpy as np
import openpyxl
import pandas as pd
import pytest

from morphome.cohort.clinical import read_clinical
from morphome.cohort.flow import drop_unusable
from morphome.download.cases import clinical_tsv
from morphome.errors import MorphomeError


def steps_of(steps):
    return {step["name"]: step["excluded"] for step in steps if step["excluded"]}


# --- GDC portal ------------------------------------------------------------------------------------------

GDC = (
    "case_submitter_id\tvital_status\tdays_to_death\tdays_to_last_follow_up\tgender\tage_at_diagnosis\t"
    "ajcc_pathologic_stage\ttreatment_type\n"
)


def gdc_file(tmp_path, rows, header=GDC):
    path = tmp_path / "clinical.tsv"
    path.write_text(header + "".join("\t".join(row) + "\n" for row in rows))
    return path


def test_gdc_clinical(tmp_path):
    none = "'--"
    rows = [
        ("TCGA-05-0001", "Dead", "609", none, "male", "21915", "Stage IIA", "a"),
        ("TCGA-05-0001", "Dead", "609", "100", "male", "21915", "Stage IIA", "b"),
        ("TCGA-05-0002", "Alive", none, "100", "female", none, none, "a"),
        ("TCGA-05-0002", "Alive", none, "1000", "female", none, none, "b"),
        ("TCGA-05-0003", "Dead", none, "50", "male", none, none, "a"),
        ("TCGA-05-0004", "Not Reported", none, "50", "not reported", none, none, "a"),
        ("TCGA-05-0005", "Alive", none, "-64", "male", none, none, "a"),
        ("TCGA-05-0006", "Alive", none, none, "male", none, none, "a"),
    ]
    found = read_clinical("gdc_clinical", gdc_file(tmp_path, rows))
    table, steps = drop_unusable(found)
    assert table["patient_id"].tolist() == ["TCGA-05-0001", "TCGA-05-0002"]
    assert table["event"].tolist() == [1, 0]
    np.testing.assert_allclose(table["time_months"], [609 / 30.4375, 1000 / 30.4375], rtol=1e-15)
    assert table["age_years"][0] == pytest.approx(60.0) and np.isnan(table["age_years"][1])
    assert table["stage"][0] == 2 and table["sex"].tolist() == ["male", "female"]
    assert steps_of(steps) == {
        "with event status": ["TCGA-05-0004"],
        "with follow-up time": ["TCGA-05-0003", "TCGA-05-0006"],
        "with time not below zero": ["TCGA-05-0005"],
        "records joined by patient": ["TCGA-05-0001", "TCGA-05-0002"],
    }
    assert "may be earlier" in found.notes["no_follow_up_column"]
    reasons = {step["name"]: step["reason"] for step in steps}
    assert "dead without days to death" in reasons["with follow-up time"]


def test_gdc_clinical_new_column_names_and_primary_diagnosis(tmp_path):
    header = (
        "cases.submitter_id\tdemographic.vital_status\tdemographic.days_to_death\tdiagnoses.days_to_last_follow_up\t"
        "demographic.sex_at_birth\tdiagnoses.figo_stage\tdiagnoses.diagnosis_is_primary_disease\t"
        "follow_ups.days_to_follow_up\tdemographic.age_at_index\n"
    )
    rows = [
        ("P1", "Alive", "'--", "10", "female", "Stage IV", "false", "900", "61"),
        ("P1", "Alive", "'--", "10", "female", "Stage IB", "true", "'--", "61"),
    ]
    found = read_clinical("gdc_clinical", gdc_file(tmp_path, rows, header))
    table = found.table
    assert found.notes["patients_with_unlike_diagnoses"] == 0 and "no_follow_up_column" not in found.notes
    assert table.loc[0, ["sex", "stage", "age_years"]].tolist() == ["female", 1.0, 61.0]
    assert table["time_months"][0] == pytest.approx(900 / 30.4375)


def test_a_second_diagnosis_does_not_fill_gaps_of_the_primary_one(tmp_path):
    header = GDC.replace("treatment_type", "diagnosis_is_primary_disease")
    rows = [
        ("P1", "Alive", "'--", "900", "male", "29220", "Stage IV", "false"),
        ("P1", "Alive", "'--", "10", "male", "21915", "'--", "true"),
        ("P2", "Alive", "'--", "10", "male", "'--", "Stage I", "'--"),
        ("P2", "Alive", "'--", "10", "male", "'--", "Stage II", "'--"),
    ]
    found = read_clinical("gdc_clinical", gdc_file(tmp_path, rows, header))
    table = found.table.set_index("patient_id")
    assert np.isnan(table.loc["P1", "stage"]) and table.loc["P1", "age_years"] == pytest.approx(60.0)
    assert table.loc["P1", "time_months"] == pytest.approx(900 / 30.4375)  # every contact counts
    assert table.loc["P2", "stage"] == 1 and found.notes["patients_with_unlike_diagnoses"] == 1


def test_the_kind_of_tumour_tells_the_primary_diagnosis_where_no_flag_does(tmp_path):
    kind = "diagnoses.classification_of_tumor\tdiagnoses.diagnosis_is_primary_disease"
    header = GDC.replace("treatment_type", kind)
    rows = [
        ("P1", "Alive", "'--", "9", "male", "29220", "Stage IV", "metastasis", "'--"),
        ("P1", "Alive", "'--", "9", "male", "21915", "Stage I", "primary", "'--"),
        ("P2", "Alive", "'--", "9", "male", "29220", "Stage IV", "metastasis", "'--"),
        ("P3", "Alive", "'--", "9", "male", "29220", "Stage IV", "primary", "false"),  # the flag decides
        ("P3", "Alive", "'--", "9", "male", "21915", "Stage II", "primary", "true"),
    ]
    table = read_clinical("gdc_clinical", gdc_file(tmp_path, rows, header)).table
    assert table["stage"].tolist() == [1, 4, 2] and table["age_years"].round().tolist() == [60, 80, 60]


def test_the_table_that_the_query_writes_is_read(tmp_path):
    visits = [{"days_to_follow_up": 100}, {"days_to_follow_up": 800}]
    first = {"diagnosis_id": "b", "diagnosis_is_primary_disease": True, "tumor_grade": "G2", "age_at_diagnosis": 21915}
    second = {"diagnosis_id": "a", "diagnosis_is_primary_disease": False, "tumor_grade": "G4"}
    site = {"code": "CV", "name": "MD Anderson Cancer Center"}
    case = {"project": {"project_id": "TCGA-HNSC"}, "tissue_source_site": site}
    cases = [
        {
            **case,
            "submitter_id": "TCGA-CV-0001",
            "demographic": {"vital_status": "Alive", "sex_at_birth": "female"},
            "diagnoses": [second, first],
            "follow_ups": visits,
        },
        {**case, "submitter_id": "TCGA-CV-0002", "demographic": {"vital_status": "Dead", "days_to_death": 30.0}},
        {"submitter_id": "TCGA-CV-0003", "project": {"project_id": "TCGA-LUAD"}},
    ]
    path = tmp_path / "clinical.tsv"
    path.write_text(clinical_tsv(cases))
    found = read_clinical("gdc_clinical", path)
    assert found.table["records"].tolist() == [4, 1, 1]
    assert found.table.loc[0, ["sex", "grade", "event"]].tolist() == ["female", 2.0, 0.0]
    np.testing.assert_allclose(found.table["time_months"], [800 / 30.4375, 30 / 30.4375, np.nan])
    assert found.table["site"].tolist() == ["MD Anderson Cancer Center"] * 2 + ["CV"]
    assert found.table["why"].tolist() == ["", "", "vital status neither alive nor dead"]
    assert read_clinical("gdc_clinical", path, types=["LUAD"]).table["patient_id"].tolist() == ["TCGA-CV-0003"]


def test_gdc_clinical_names_the_institution(tmp_path):
    header = GDC.replace("treatment_type", "tissue_source_site.name")
    rows = [
        ("TCGA-08-0001", "Dead", "30", "'--", "male", "'--", "'--", "UCSF"),
        ("TCGA-08-0001", "Dead", "30", "'--", "male", "'--", "'--", "UCSF"),
        ("TCGA-RY-0002", "Dead", "30", "'--", "male", "'--", "'--", "University of California, San Francisco"),
        ("TCGA-QQ-0003", "Dead", "30", "'--", "male", "'--", "'--", "'--"),
    ]
    table = read_clinical("gdc_clinical", gdc_file(tmp_path, rows, header)).table
    place = "University of California San Francisco"
    assert table["site"].tolist() == [place, "QQ", place]


def test_gdc_clinical_gzip_equals_plain(tmp_path):
    path = gdc_file(tmp_path, [("P1", "Dead", "30", "'--", "male", "'--", "'--", "a")])
    packed = tmp_path / "clinical.tsv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    pd.testing.assert_frame_equal(
        read_clinical("gdc_clinical", path).table, read_clinical("gdc_clinical", packed).table
    )


def test_gdc_clinical_errors(tmp_path):
    path = gdc_file(tmp_path, [("P1", "Dead", "30", "'--", "male", "'--", "'--", "a")])
    with pytest.raises(MorphomeError, match="tcga_cdr"):
        read_clinical("gdc_clinical", path, endpoint="PFI")
    clash = gdc_file(tmp_path, [("P1", "Dead", d, "'--", "male", "'--", "'--", "a") for d in ("30", "31")])
    with pytest.raises(MorphomeError, match="patient P1 differ"):
        read_clinical("gdc_clinical", clash)
    with pytest.raises(MorphomeError, match="no patient id"):
        read_clinical("gdc_clinical", gdc_file(tmp_path, [("'--", "Dead", "30", "", "", "", "", "")]))
    with pytest.raises(MorphomeError, match="no column vital_status"):
        read_clinical("gdc_clinical", gdc_file(tmp_path, [("P1", "3")], "case_submitter_id\tdays_to_death\n"))


def test_damaged_gzip_is_named(tmp_path):
    path = tmp_path / "clinical.tsv.gz"
    path.write_bytes(gzip.compress(b"case_submitter_id\tvital_status\n" * 100)[:40])
    with pytest.raises(MorphomeError, match=r"clinical\.tsv\.gz: damaged"):
        read_clinical("gdc_clinical", path)


# --- TCGA-CDR --------------------------------------------------------------------------------------------


def cdr_file(tmp_path, rows, sheet="TCGA-CDR", sites=(), types=()):
    book = openpyxl.Workbook()
    page = book.active
    page.title = sheet
    page.append(
        [
            *("", "bcr_patient_barcode", "age_at_initial_pathologic_diagnosis", "gender"),
            *("ajcc_pathologic_tumor_stage", "clinical_stage", "histological_type", "histological_grade"),
            *("Redaction", "OS", "OS.time", "PFI", "PFI.time"),
            *(["type"] if types else []),
        ]
    )
    for number, row in enumerate(rows):
        page.append(["1", *row, *types[number : number + 1]])
    if sites:
        names = book.create_sheet("TSS_Info")
        for row in (["Weblink", "somewhere", ""], [], ["TSS Code", "Source Site", "Disease type"], *sites):
            names.append(row)
    path = tmp_path / "cdr.xlsx"
    book.save(path)
    return path


def test_tcga_cdr(tmp_path):
    na = "[Not Available]"
    path = cdr_file(
        tmp_path,
        [
            ["TCGA-05-0001", 60, "FEMALE", "Stage IIIA", na, "x", "G3", None, 1, 609, 1, 61],
            ["TCGA-05-0002", na, "MALE", "[Not Applicable]", "Stage IB1", "x", "GX", None, 0, 487, na, na],
            ["TCGA-05-0003", 60, "MALE", na, na, "x", na, "Redacted", 1, 609, 1, 61],
            ["TCGA-05-0004", 60, "MALE", na, na, "x", na, None, 1, "#N/A", 0, 30],
            ["TCGA-05-0005", 60, "MALE", na, na, "x", na, None, 0, 0, 0, 0],
        ],
    )
    table, steps = drop_unusable(read_clinical("tcga_cdr", path))
    assert table["patient_id"].tolist() == ["TCGA-05-0001", "TCGA-05-0002"]
    assert table["stage"].tolist() == [3, 1]  # pathologic, else clinical
    assert table["time_months"].tolist() == [609 / 30.4375, 487 / 30.4375]
    assert steps_of(steps) == {
        "not redacted": ["TCGA-05-0003"],
        "with follow-up time": ["TCGA-05-0004"],
        "with time above zero": ["TCGA-05-0005"],
    }
    table, steps = drop_unusable(read_clinical("tcga_cdr", path, endpoint="PFI"))
    assert table["patient_id"].tolist() == ["TCGA-05-0001", "TCGA-05-0004"]
    assert steps_of(steps)["with event status"] == ["TCGA-05-0002"]
    with pytest.raises(MorphomeError, match="no column 'DSS'"):
        read_clinical("tcga_cdr", path, endpoint="DSS")
    with pytest.raises(MorphomeError, match="TCGA-CDR"):
        read_clinical("tcga_cdr", cdr_file(tmp_path, [], sheet="Other"))


def cdr_row(patient, stage="Stage I"):
    return [patient, 60, "MALE", stage, "[Not Applicable]", "x", "G3", None, 1, 609, 1, 61]


def test_tcga_cdr_keeps_the_types_asked_for(tmp_path):
    rows = [cdr_row(f"TCGA-05-000{n}", "Stage I" if n < 3 else "T2N0") for n in range(4)]
    path = cdr_file(tmp_path, rows, types=["HNSC", "SKCM", "HNSC", "LUAD"])
    found = read_clinical("tcga_cdr", path, types=["TCGA-HNSC"])  # no warning about the stage of another type
    assert found.table["patient_id"].tolist() == ["TCGA-05-0000", "TCGA-05-0002"]
    assert (found.notes["types"], found.notes["rows_of_other_types"]) == (["HNSC"], 2)
    assert "metastases" not in found.notes["time_zero"]
    assert "metastases" in read_clinical("tcga_cdr", path, types=["SKCM", "HNSC"]).notes["time_zero"]
    with pytest.raises(MorphomeError, match=r"nobody of type 'HNSCC'(.|\n)*there are: HNSC, LUAD, SKCM"):
        read_clinical("tcga_cdr", path, types=["HNSCC"])


def test_tcga_cdr_names_institutions(tmp_path):
    rows = [cdr_row(patient) for patient in ("TCGA-05-0001", "TCGA-NA-0002", "TCGA-CV-0003", "TCGA-ZZ-0004")]
    sites = [[5, "Indivumed", "x"], ["NA", "UNC", "y"], ["CV", "MD Anderson", "z"]]
    found = read_clinical("tcga_cdr", cdr_file(tmp_path, rows, sites=sites))
    names = ["Indivumed", "MD Anderson Cancer Center", "University of North Carolina", "ZZ"]
    assert found.table["site"].tolist() == names
    assert "institutions" not in found.notes
    found = read_clinical("tcga_cdr", cdr_file(tmp_path, rows))
    assert found.table["site"].tolist() == ["05", "CV", "NA", "ZZ"]
    assert "no sheet 'TSS_Info'" in found.notes["institutions"]
