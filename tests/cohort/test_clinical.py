"""Outcomes and covariates from every format; times in months, event 1 = happened."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from morphome.cohort.clinical import read_clinical
from morphome.cohort.flow import drop_unusable
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
    assert [step["after"] for step in steps] == [5, 5, 4, 3, 3, 2]


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
    assert read_clinical("csv", path, time_unit="days").notes == {"rows": 2, "time_zero": "as the own table has it"}
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


def test_survpath_tables_have_three_end_points(tmp_path):
    path = tmp_path / "t.csv"
    head = "case_id,slide_id,survival_months,censorship,survival_months_dss,censorship_dss,survival_months_pfi,"
    path.write_text(head + "censorship_pfi\nP1,a,20,0,20,1,10,0\nP1,b,20,0,20,1,10,0\nP2,c,9,1,9,1,,\n")
    for endpoint, times, status in (
        ("OS", [20, 9], [1, 0]),
        ("DSS", [20, 9], [0, 0]),
        ("PFI", [10, np.nan], [1, np.nan]),
    ):
        found = read_clinical("porpoise", path, endpoint=endpoint)
        np.testing.assert_array_equal(found.table["time_months"], times)
        np.testing.assert_array_equal(found.table["event"], status)
        assert found.n_records == 3 and len(found.slides) == 3
    assert found.table["why"].tolist() == ["", "censorship_pfi is empty"]
    with pytest.raises(MorphomeError, match=r"has the end points OS, DSS, PFI, but cohort\.endpoint is DFI"):
        read_clinical("porpoise", path, endpoint="DFI")
    path.write_text(path.read_text().replace("P1,b,20,0,20,1,10,0", "P1,b,20,0,20,0,10,0"))
    with pytest.raises(MorphomeError, match="P1 differ in column 'censorship_dss'"):
        read_clinical("porpoise", path)


def test_months_of_thirty_days_are_told(tmp_path):
    path = tmp_path / "t.csv"
    head = "case_id,slide_id,survival_months,censorship\n"
    days = range(100, 130)
    path.write_text(head + "".join(f"P{n},s{n},{n / 30},0\n" for n in days))
    found = read_clinical("porpoise", path)
    assert "months are of 30 days" in found.notes["month_days"]
    assert found.table["time_months"].iloc[0] == pytest.approx(100 / 30)  # left as it is
    path.write_text(head + "".join(f"P{n},s{n},{n / 30.44:.2f},0\n" for n in days))
    assert "month_days" not in read_clinical("porpoise", path).notes
