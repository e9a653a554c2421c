"""Who is left out of a clinical table, in which order and why; covariates of a second table."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from morphome.cohort.clinical import ClinicalTable, read_clinical
from morphome.cohort.clinical_shape import shape
from morphome.cohort.flow import drop_unusable, fill_covariates
from morphome.errors import MorphomeError


def clinical(**columns):
    """A table of seven patients, all usable unless ``columns`` say otherwise."""
    ids = pd.Series([f"P{n}" for n in range(7)])
    return ClinicalTable(shape(ids, **{"time_months": 5.0, "event": 1.0, **columns}))


def test_every_reason_is_a_step_of_its_own():
    nan = np.nan
    found = clinical(
        redacted=[True, False, False, False, False, False, False],
        event=[nan, nan, nan, 1, 0, 1, 0],
        time_months=[nan, nan, 5, nan, -2, 0, 7],
        why=["", "x is empty", "x is [Unknown]", "no contact", "", "", ""],
        records=[3, 1, 2, 1, 1, 1, 1],
    )
    assert found.n_records == 10
    table, steps = drop_unusable(found)
    assert table["patient_id"].tolist() == ["P6"]
    assert [(s["name"], s["unit"], s["before"], s["after"], s["excluded"]) for s in steps] == [
        ("records joined by patient", "records", 10, 7, ["P0", "P0", "P2"]),
        ("listed in the clinical table", "patients", 7, 7, []),
        ("not redacted", "patients", 7, 6, ["P0"]),
        ("with event status", "patients", 6, 4, ["P1", "P2"]),
        ("with follow-up time", "patients", 4, 3, ["P3"]),
        ("with time not below zero", "patients", 3, 2, ["P4"]),
        ("with time above zero", "patients", 2, 1, ["P5"]),
    ]
    assert [s["reason"] for s in steps[2:]] == [
        "redacted by TCGA",
        "event status missing (x is [Unknown]: 1; x is empty: 1)",
        "time missing (no contact: 1)",
        "time negative",
        "time zero",
    ]
    assert not {"redacted", "why", "records"} & set(table) and table["event"].dtype == np.int64


def test_causes_are_counted_and_the_commonest_comes_first():
    _, steps = drop_unusable(clinical(event=np.nan, why=["b", "a", "b", "", "c", "b", "a"]))
    reason = next(s["reason"] for s in steps if s["name"] == "with event status")
    assert reason == "event status missing (b: 3; a: 2; c: 1)"


def test_one_record_per_patient_needs_no_joining():
    table, steps = drop_unusable(clinical())
    assert len(table) == 7 and {step["unit"] for step in steps} == {"patients"}


@pytest.mark.parametrize("seed", range(20))
def test_steps_add_up_for_any_table(seed):
    rng = np.random.default_rng(seed)
    ids = pd.Series([f"P{n:03}" for n in rng.permutation(200)])
    found = ClinicalTable(
        shape(
            ids,
            time_months=rng.choice([np.nan, -1.0, 0.0, 1e-9, 3.0], 200),
            event=rng.choice([np.nan, 0.0, 1.0], 200),
            redacted=rng.random(200) < 0.1,
            records=rng.integers(1, 5, 200),
        )
    )
    table, steps = drop_unusable(found)
    for step in steps:
        assert step["before"] - len(step["excluded"]) == step["after"] and step["excluded"] == sorted(step["excluded"])
    for first, second in pairwise(steps):
        assert first["after"] == second["before"]
    lost = [patient for step in steps if step["unit"] == "patients" for patient in step["excluded"]]
    assert sorted([*lost, *table["patient_id"]]) == sorted(ids)
    assert (table["time_months"] > 0).all() and table["event"].isin([0, 1]).all()


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


def institutions_of(tmp_path, name, rows):
    path = tmp_path / name
    path.write_text("patient_id,time,event,age,institution\n" + "".join(f"{p},1,1,60,{place}\n" for p, place in rows))
    return read_clinical("csv", path)


def test_institutions_are_carried_over_and_codes_do_not_undo_them(tmp_path):
    known = institutions_of(
        tmp_path, "a.csv", [("TCGA-08-0001", "UCSF"), ("TCGA-RY-0002", "UCSF"), ("TCGA-QQ-0003", "")]
    )
    coded = institutions_of(tmp_path, "b.csv", [("TCGA-08-0001", ""), ("TCGA-RY-0002", ""), ("TCGA-QQ-0003", "Yale")])
    ucsf = "University of California San Francisco"
    merged, notes = fill_covariates(drop_unusable(known)[0], coded)
    assert merged["patient_id"].tolist() == ["TCGA-08-0001", "TCGA-QQ-0003", "TCGA-RY-0002"]
    assert merged["site"].tolist() == [ucsf, "Yale University", ucsf]
    assert notes["sites_given"] == 1
    merged, notes = fill_covariates(drop_unusable(coded)[0], known)
    assert merged["site"].tolist() == [ucsf, "Yale University", ucsf]
    assert notes["sites_given"] == 2
