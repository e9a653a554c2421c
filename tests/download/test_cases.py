"""Patients as the GDC answers, and the table that the clinical reader takes."""

from __future__ import annotations

import csv

import pytest

from morphome.cohort.clinical import read_clinical
from morphome.cohort.values import DAYS_PER_MONTH
from morphome.download.api import Gdc
from morphome.download.cases import COLUMNS, FIELDS, MISSING, clinical_tsv, find_cases
from morphome.errors import MorphomeError


def table(records):
    rows = list(csv.reader(clinical_tsv(records).splitlines(), delimiter="\t"))
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def test_cases_of_one_project_in_the_fields_of_today(gdc):
    records = [gdc.case_record("TCGA-AA-0001"), gdc.case_record("TCGA-BB-0001", project="TCGA-READ")]
    with gdc.GdcServer([], records, max_page=1) as server, Gdc(server.url) as api:
        found = find_cases(api, "TCGA-COAD")
    assert [case["submitter_id"] for case in found] == ["TCGA-AA-0001"]
    assert "demographic.gender" not in FIELDS
    assert server.bodies[0][1]["sort"] == "case_id:asc"
    row = table(found)[0]
    assert list(row) == list(COLUMNS)
    assert row["project.project_id"] == "TCGA-COAD"
    assert (row["tissue_source_site.code"], row["tissue_source_site.name"]) == ("AA", "Greenfield Hospital")
    assert (row["demographic.vital_status"], row["demographic.days_to_death"]) == ("Alive", MISSING)
    assert row["diagnoses.diagnosis_is_primary_disease"] == "true"


def test_an_unknown_project_is_named_with_a_hint(gdc):
    with (
        gdc.GdcServer([], [gdc.case_record()]) as server,
        Gdc(server.url) as api,
        pytest.raises(MorphomeError, match="the GDC knows nobody in 'HNSC'") as caught,
    ):
        find_cases(api, "HNSC")
    assert "TCGA-HNSC" in caught.value.remedy


def test_one_row_per_case_diagnosis_and_follow_up(gdc):
    diagnoses = [
        {"diagnosis_is_primary_disease": False, "ajcc_pathologic_stage": "Stage IV"},
        {"diagnosis_is_primary_disease": True, "ajcc_pathologic_stage": "Stage I", "days_to_last_follow_up": 100.0},
    ]
    records = [
        gdc.case_record("TCGA-AA-0002", diagnoses=diagnoses, follow_ups=[700, 30, 4000, 100]),
        gdc.case_record("TCGA-AA-0001", diagnoses=[]),
    ]
    rows = table(records)
    assert [row["cases.submitter_id"] for row in rows] == ["TCGA-AA-0001", *["TCGA-AA-0002"] * 8]
    assert [row["diagnoses.ajcc_pathologic_stage"] for row in rows] == [MISSING, *["Stage I"] * 4, *["Stage IV"] * 4]
    assert [row["follow_ups.days_to_follow_up"] for row in rows] == [MISSING, *["30", "100", "700", "4000"] * 2]
    assert rows[1]["diagnoses.days_to_last_follow_up"] == "100"


def test_grades_of_brain_tumours_are_asked_for_and_read(gdc, tmp_path):
    diagnoses = [{"diagnosis_is_primary_disease": True, "tumor_grade": None, "who_cns_grade": "Grade III"}]
    with gdc.GdcServer([], [gdc.case_record("TCGA-AA-0001", diagnoses=diagnoses)]) as server, Gdc(server.url) as api:
        text = clinical_tsv(find_cases(api, "TCGA-COAD"))
    (tmp_path / "clinical.tsv").write_text(text)
    assert read_clinical("gdc_clinical", tmp_path / "clinical.tsv").table["grade"].tolist() == [3]


def test_gaps_and_odd_text_keep_the_columns(gdc):
    record = gdc.case_record(site_name='A "big"\tplace\nof 2 lines', follow_ups=[None])
    del record["demographic"]
    row = table([record, {"submitter_id": "TCGA-AA-0009", "diagnoses": None}])[0]
    assert row["tissue_source_site.name"] == 'A "big" place of 2 lines'
    assert row["demographic.vital_status"] == row["follow_ups.days_to_follow_up"] == MISSING


def test_a_case_without_a_name_is_refused(gdc):
    with (
        gdc.GdcServer([], [gdc.case_record(submitter_id=None)]) as server,
        Gdc(server.url) as api,
        pytest.raises(MorphomeError, match="has no submitter_id"),
    ):
        find_cases(api, "TCGA-COAD")


def test_the_clinical_reader_takes_the_table(gdc, tmp_path):
    records = [
        gdc.case_record("TCGA-AA-0001", vital_status="Dead", days_to_death=365, stage="Stage III", age_days=21915),
        gdc.case_record("TCGA-AA-0002", days_to_last_follow_up=100, follow_ups=[800, 400], sex="male"),
        gdc.case_record("TCGA-AB-0003", vital_status="Not Reported"),
    ]
    path = tmp_path / "clinical.tsv"
    path.write_text(clinical_tsv(records))
    found = read_clinical("gdc_clinical", path).table.set_index("patient_id")
    assert list(found.index) == ["TCGA-AA-0001", "TCGA-AA-0002", "TCGA-AB-0003"]
    assert found["event"].tolist()[:2] == [1.0, 0.0]
    assert found["event"].isna().tolist() == [False, False, True]
    # The living are followed to the latest of both: the last contact of the diagnosis, and the follow-ups.
    assert found["time_months"].tolist()[:2] == [365 / DAYS_PER_MONTH, 800 / DAYS_PER_MONTH]
    assert found["stage"].tolist()[0] == 3
    assert found["age_years"].tolist()[0] == pytest.approx(60.0, abs=0.01)
    assert found["sex"].tolist()[:2] == ["female", "male"]
