"""Outcomes and covariates from every format; times in months, event 1 = happened."""

from __future__ import annotations

import gzip
import zipfile

import numpy as np
import openpyxl
import pandas as pd
import pytest

from morphome.cohort.clinical import read_clinical
from morphome.cohort.flow import drop_unusable, fill_covariates
from morphome.cohort.values import grade_of, is_missing, stage_of
from morphome.errors import MorphomeError, MorphomeWarning


def steps_of(steps):
    return {step["name"]: step["excluded"] for step in steps if step["excluded"]}


# --- words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        *[("Stage I", 1), ("Stage IA", 1), ("stage ib1", 1), ("Stage IS", 1), ("IS", 1), ("Stage II", 2), ("IIa", 2)],
        *[("Stage IIA2", 2), ("Stage IIIC1", 3), ("III", 3), ("Stage IVB", 4), ("IVa", 4), ("3", 3), ("2.0", 2)],
        *[("Stage X", np.nan), ("I/II NOS", np.nan), ("Stage 0", np.nan), ("[Not Available]", np.nan), ("5", np.nan)],
        *[("'--", np.nan), ("", np.nan), ("Stage V", np.nan), (None, np.nan)],
    ],
)
def test_stage(text, stage):
    assert stage_of(text) == pytest.approx(stage, nan_ok=True)


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("G1", 1),
        ("G4", 4),
        ("GX", np.nan),
        ("Grade II", 2),
        ("High Grade", 3),
        ("Low Grade", 1),
        ("GB", np.nan),
        ("2", 2),
    ],
)
def test_grade(text, grade):
    assert grade_of(text) == pytest.approx(grade, nan_ok=True)


@pytest.mark.parametrize("text", ["'--", "[Not Available]", "[Unknown]|[Not Evaluated]", "", None, np.nan, "#N/A"])
def test_missing_words(text):
    assert is_missing(text)


def test_zero_is_a_value():
    assert not is_missing("0") and not is_missing(0)


# --- own table -------------------------------------------------------------------------------------------


def test_csv_table(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text(
        "patient_id,time,event,age,sex,stage,grade,site\n"
        "B,365.25,1,60,F,Stage IIIA,G2,05\nA,30.4375,0,,male,Stage X,,07\nC,0,1,50,female,1,3,05\n"
        "D,,1,50,female,1,3,05\nE,10,,50,female,1,3,\n"
    )
    table, steps = drop_unusable(read_clinical("csv", path, time_unit="days"))
    assert table["patient_id"].tolist() == ["A", "B"]
    assert table["time_months"].tolist() == [1.0, 12.0]
    assert table["event"].tolist() == [0, 1] and table["event"].dtype == np.int64
    assert table["sex"].tolist() == ["male", "female"]
    assert table["stage"].tolist()[1] == 3 and np.isnan(table["stage"][0])
    assert table["site"].tolist() == ["07", "05"]  # text, leading zero kept
    assert steps_of(steps) == {
        "with event status": ["E"],
        "with follow-up time": ["D"],
        "with time above zero": ["C"],
    }
    assert [step["after"] for step in steps] == [5, 5, 4, 3, 2]


def test_csv_months_and_barcode_site(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("patient_id,time,event\nTCGA-05-4249,12,0\nX,3,1\n")
    table = read_clinical("csv", path).table
    assert table["time_months"].tolist() == [12.0, 3.0]
    assert table["site"].tolist() == ["05", "unknown"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("patient_id,time\nA,1\n", "no column 'event'"),
        ("patient_id,time,event\n", "no patients"),
        ("patient_id,time,event\nA,1,2\n", "patient A.* is not 0 or 1"),
        ("patient_id,time,event\nA,long,1\n", "'long' in column 'time' .patient A. is not a number"),
        ("patient_id,time,event\nA,inf,1\n", "is not a number"),
        ("patient_id,time,event\nA,1,1\nA,2,1\n", "patient A occurs twice"),
        ("patient_id,time,event\n,1,1\n", "no patient id"),
        ("patient_id,time,event,age\nA,1,1,21900\n", "age of patient A"),
        ("patient_id,time,event,sex\nA,1,1,2\n", "'2' in column 'sex'"),
        ("", "empty"),
    ],
)
def test_bad_csv_is_named(tmp_path, text, words):
    path = tmp_path / "own.csv"
    path.write_text(text)
    with pytest.raises(MorphomeError, match=words) as caught:
        read_clinical("csv", path)
    assert str(path) in str(caught.value)


EVENT_WORDS = [
    *[("TRUE", 1), ("false", 0), ("Dead", 1), ("ALIVE", 0), ("1:DECEASED", 1), ("0:LIVING", 0), ("Deceased", 1)],
    *[("1.0", 1), ("", np.nan), ("unknown", np.nan)],
]


def test_event_words(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("patient_id,time,event\n" + "".join(f"P{n:02},1,{w}\n" for n, (w, _) in enumerate(EVENT_WORDS)))
    np.testing.assert_array_equal(read_clinical("csv", path).table["event"], [value for _, value in EVENT_WORDS])


def test_unknown_event_words_are_refused_with_their_own_remedy(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("patient_id,time,event\nA,1,relapsed\n")
    with pytest.raises(MorphomeError, match=r"'relapsed' in column 'event' .patient A. is not 0 or 1") as caught:
        read_clinical("csv", path)
    assert "1 = happened, 0 = censored" in caught.value.remedy and "empty" not in str(caught.value)
    path.write_text("patient_id,time,event\nA,1,Dead\n")
    with pytest.raises(MorphomeError, match="'Dead'"):  # vital status says nothing about progression
        read_clinical("csv", path, endpoint="PFI")


def test_censorship_does_not_read_words_of_the_vital_status(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("case_id,slide_id,survival_months,censorship\nA,a,1,Dead\n")
    with pytest.raises(MorphomeError, match="1 = censored, 0 = happened"):
        read_clinical("porpoise", path)


def test_days_declared_as_months_are_refused(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("patient_id,time,event\nA,1825,1\nB,30,0\n")
    with pytest.raises(MorphomeError, match=r"largest time is 1825.*cohort\.time_unit"):
        read_clinical("csv", path)
    assert read_clinical("csv", path, time_unit="days").notes == {"rows": 2}
    path.write_text("patient_id,time,event\nA,120,1\nB,30,0\n")
    with pytest.warns(MorphomeWarning, match=r"cohort\.time_unit is days, but the largest time is 120"):
        assert "120 days" in read_clinical("csv", path, time_unit="days").notes["time_unit"]


def test_words_of_stage_and_grade_that_are_not_understood_are_told(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("patient_id,time,event,stage,grade\nA,1,1,T2N0,GX\nB,1,0,T2N0,well\nC,1,0,Stage X,G2\n")
    with pytest.warns(MorphomeWarning) as told:
        notes = read_clinical("csv", path).notes
    texts = [str(w.message) for w in told]
    assert "2 cells of stage could not be read and count as missing: 'T2N0' (2)" in texts[0]
    assert "'well' (1)" in texts[1] and "GX" not in texts[1] and len(texts) == 2
    assert notes["stage_words_without_number"] == {"Stage X": 1, "T2N0": 2}
    assert notes["grade_words_without_number"] == {"GX": 1, "well": 1}


def test_tables_of_another_shape_say_how_to_save_them(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("patient_id;time;event\nA;1,5;1\n")
    for name in ("csv", "gdc_clinical", "porpoise"):
        with pytest.raises(MorphomeError, match=r"own\.csv: .*semicolons(.|\n)*commas or tabs"):
            read_clinical(name, path)
    path.write_bytes("patient_id,time,event,histology\nA,1,1,x\nB,1,1,Müller\n".encode("latin-1"))
    with pytest.raises(MorphomeError, match=r"own\.csv, line 3: not UTF-8(.|\n)*save the table as UTF-8"):
        read_clinical("csv", path)
    path.write_text(",".join(f"column{n}" for n in range(500)) + "\n")
    with pytest.raises(MorphomeError, match=r"column5, \.\.\. .500 in all.") as caught:
        read_clinical("csv", path)
    assert len(str(caught.value)) < 400


def test_missing_file_is_named(tmp_path):
    for name in ("csv", "gdc_clinical", "porpoise", "tcga_cdr"):
        with pytest.raises(MorphomeError, match=r"no\.xlsx"):
            read_clinical(name, tmp_path / "no.xlsx")


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
        "with time above zero": ["TCGA-05-0005"],
    }
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
    table = read_clinical("gdc_clinical", gdc_file(tmp_path, rows, header)).table
    assert table.loc[0, ["sex", "stage", "age_years"]].tolist() == ["female", 1.0, 61.0]
    assert table["time_months"][0] == pytest.approx(900 / 30.4375)


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


def cdr_file(tmp_path, rows, sheet="TCGA-CDR"):
    book = openpyxl.Workbook()
    page = book.active
    page.title = sheet
    page.append(
        [
            *("", "bcr_patient_barcode", "age_at_initial_pathologic_diagnosis", "gender"),
            *("ajcc_pathologic_tumor_stage", "clinical_stage", "histological_type", "histological_grade"),
            *("Redaction", "OS", "OS.time", "PFI", "PFI.time"),
        ]
    )
    for row in rows:
        page.append(["1", *row])
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


# --- PORPOISE shape --------------------------------------------------------------------------------------

ROWS = (
    ",case_id,slide_id,age,site,survival_months,censorship,is_female,oncotree_code,train,TP53_mut\n"
    "0,TCGA-05-0001,TCGA-05-0001-01Z-00-DX1.U.svs,60,5,20.5,0,1,LUAD,1,1\n"
    "1,TCGA-05-0001,TCGA-05-0001-01Z-00-DX2.U.svs,60,5,20.5,0,1,LUAD,1,1\n"
    "2,TCGA-05-0002,TCGA-05-0002-01Z-00-DX1.vss,,5,3,1,0,LUAD,1,0\n"
)


def test_porpoise_one_row_per_slide(tmp_path):
    path = tmp_path / "t.csv.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../dataset_csv/t.csv.zip", ROWS)  # a member name that must not be used
    found = read_clinical("porpoise", path)
    assert found.table["patient_id"].tolist() == ["TCGA-05-0001", "TCGA-05-0002"]
    assert found.table["event"].tolist() == [1.0, 0.0]  # censorship 0 = event
    assert found.table["sex"].tolist() == ["female", "male"]
    assert found.table["site"].tolist() == ["05", "05"]  # from the barcode: the column lost its zero
    assert np.isnan(found.table["age_years"][1])
    assert found.slides["slide_id"].tolist() == [
        "TCGA-05-0001-01Z-00-DX1.U",
        "TCGA-05-0001-01Z-00-DX2.U",
        "TCGA-05-0002-01Z-00-DX1.vss",
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.csv.zip"]


def test_porpoise_errors(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(ROWS.replace("DX2.U.svs,60,5,20.5", "DX2.U.svs,60,5,20.6"))
    with pytest.raises(MorphomeError, match="TCGA-05-0001 differ in column 'survival_months'"):
        read_clinical("porpoise", path)
    path.write_text(ROWS)
    with pytest.raises(MorphomeError, match=r"endpoint is DSS(.|\n)*tcga_cdr"):
        read_clinical("porpoise", path, endpoint="DSS")
    path.write_text(ROWS.replace("censorship", "event"))
    with pytest.raises(MorphomeError, match="no column 'censorship'"):
        read_clinical("porpoise", path)
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.csv", ROWS)
        archive.writestr("b.csv", ROWS)
    with pytest.raises(MorphomeError, match="holds 2 files"):
        read_clinical("porpoise", tmp_path / "two.zip")


# --- covariates ------------------------------------------------------------------------------------------


def test_covariates_fill_and_override(tmp_path):
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("patient_id,time,event,age,stage,sex\nA,1,1,60,1,F\nB,1,0,,2,\nC,1,0,50,,M\n")
    second.write_text("patient_id,age,stage,sex\nB,70,3,M\nA,60.5,,M\nZ,1,1,M\n")
    patients, _ = drop_unusable(read_clinical("csv", first))
    merged, notes = fill_covariates(patients, read_clinical("csv", second, outcome=False))
    assert merged["patient_id"].tolist() == ["A", "B", "C"]
    assert merged["age_years"].tolist() == [60.5, 70.0, 50.0]
    np.testing.assert_array_equal(merged["stage"], [1.0, 3.0, np.nan])
    assert merged["sex"].tolist() == ["male", "male", "male"]
    assert (notes["matched"], notes["unmatched"]) == (2, ["C"])
    assert notes["columns"]["stage"] == {"filled": 0, "overridden": 1, "missing": 1}
    assert notes["columns"]["age_years"] == {"filled": 1, "overridden": 0, "missing": 0}
    assert notes["columns"]["sex"] == {"filled": 1, "overridden": 1, "missing": 0}
    np.testing.assert_array_equal(merged[["time_months", "event"]], patients[["time_months", "event"]])


def test_covariates_may_name_the_institution(tmp_path):
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("patient_id,time,event\nTCGA-AA-0001,1,1\nTCGA-BB-0002,1,0\nTCGA-CC-0003,1,0\n")
    second.write_text("patient_id,age,site\nTCGA-BB-0002,60,Mayo\nTCGA-AA-0001,61,Mayo\n")
    patients, _ = drop_unusable(read_clinical("csv", first))
    assert patients["site"].tolist() == ["AA", "BB", "CC"]
    merged, notes = fill_covariates(patients, read_clinical("csv", second, outcome=False))
    assert merged["site"].tolist() == ["Mayo", "Mayo", "CC"]
    assert notes["sites_given"] == 2


def test_covariates_table_without_covariates(tmp_path):
    path = tmp_path / "b.csv"
    path.write_text("patient_id,x\nA,1\n")
    with pytest.raises(MorphomeError, match="none of the columns age"):
        read_clinical("csv", path, outcome=False)


# --- real tables -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cdr(shared_data):
    return read_clinical("tcga_cdr", shared_data / "tables" / "tcga_cdr" / "TCGA-CDR-SupplementalTableS1.xlsx")


def porpoise(shared_data, cohort):
    return read_clinical("porpoise", shared_data / "tables" / "porpoise" / f"tcga_{cohort}_all_clean.csv.zip")


@pytest.mark.parametrize(
    ("cohort", "slides", "patients", "deaths"),
    [
        ("hnsc", 437, 416, 197),
        ("blca", 437, 373, 169),
        ("ucec", 538, 480, 75),
        ("luad", 515, 453, 158),
        ("brca", 1022, 956, 130),
        ("gbmlgg", 1011, 569, 187),
    ],
)
def test_real_porpoise_counts_and_cdr_events(shared_data, cdr, cohort, slides, patients, deaths):
    found = porpoise(shared_data, cohort)
    table, _ = drop_unusable(found)
    assert (len(found.slides), len(table), table["event"].sum()) == (slides, patients, deaths)
    joined = table.merge(cdr.table, on="patient_id", suffixes=("", "_cdr"))
    assert len(joined) == patients
    assert (joined["event"] == joined["event_cdr"]).all()


def test_real_cdr_counts(cdr):
    table = cdr.table
    assert len(table) == 11160
    assert table["time_months"].isna().sum() == 66
    assert table["event"].isna().sum() == 9
    assert (table["time_months"] == 0).sum() == 108
    assert table["redacted"].sum() == 57
    kept, steps = drop_unusable(cdr)
    assert steps[0]["before"] - sum(len(step["excluded"]) for step in steps) == len(kept)
    assert cdr.notes["stage_words_without_number"]["Stage X"] == 13


@pytest.mark.parametrize(
    ("cohort", "with_stage"),
    # BRCA: 945 have a stage text, 11 of them "Stage X"; HNSC: pathologic or clinical
    [("blca", 371), ("luad", 446), ("brca", 934), ("ucec", 480), ("gbmlgg", 0)],
)
def test_real_stage_counts(shared_data, cdr, cohort, with_stage):
    patients, _ = drop_unusable(porpoise(shared_data, cohort))
    merged, notes = fill_covariates(patients, cdr)
    assert merged["stage"].notna().sum() == with_stage
    assert notes["unmatched"] == []
    assert notes["columns"]["sex"]["overridden"] == 0 and notes["columns"]["age_years"]["overridden"] == 0


def test_real_gdc_clinical(shared_data, cdr):
    found = read_clinical("gdc_clinical", shared_data / "gdc" / "clinical_tsv" / "BLCA_clinical.tsv.gz")
    assert (len(found.table), found.notes["rows"]) == (386, 772)
    table, steps = drop_unusable(found)
    assert len(table) == 379
    assert len(steps_of(steps)["with follow-up time"]) == 2  # dead without days_to_death
    assert table["stage"].notna().sum() == 377
    joined = table.merge(cdr.table, on="patient_id", suffixes=("", "_cdr"))
    agree = joined["event"] == joined["event_cdr"]
    assert len(joined) == 379 and agree.mean() > 0.98
