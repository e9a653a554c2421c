"""Public cohorts as they were published: patients, events, times, bins, folds, institutions (needs the real data)."""

from __future__ import annotations

import csv
import functools

import numpy as np
import pytest

from morphome.cohort import clinical_cdr
from morphome.cohort.barcode import site_of
from morphome.cohort.clinical import read_clinical
from morphome.cohort.flow import drop_unusable, fill_covariates
from morphome.models.hazard import bin_edges
from morphome.survival import fit_cox_ridge, harrell

#: Slides, patients, deaths of the PORPOISE tables.
COHORTS = {
    "hnsc": (437, 416, 197),
    "blca": (437, 373, 169),
    "ucec": (538, 480, 75),
    "luad": (515, 453, 158),
    "brca": (1022, 956, 130),
    "gbmlgg": (1011, 569, 187),
}
#: First time, inner edges of four bins over the whole cohort and last time, months, as computed elsewhere.
EDGES = {
    "blca": (0.49, 7.62, 13.57, 21.85, 163),
    "luad": (0.13, 10.1, 20.55, 35.44, 238),
    "ucec": (0.07, 12.1, 23.5, 33.9, 225),
    "hnsc": (0.07, 8.8, 13.83, 26.41, 211),
}
#: Events of progression in TCGA-CDR among the patients of the PORPOISE tables; patients without DSS.
CDR_EVENTS = {
    "hnsc": (173, 20),
    "blca": (159, 13),
    "ucec": (108, 0),
    "luad": (185, 32),
    "brca": (125, 18),
    "gbmlgg": (252, 14),
}
#: Harrell's C of age alone, whole cohort.
AGE_C = {"hnsc": 0.556, "blca": 0.611, "ucec": 0.569, "luad": 0.535, "brca": 0.637, "gbmlgg": 0.766}
#: Patients, and events of OS, DSS and PFI, of SurvPath's tables.
SURVPATH = {"blca": (359, 156, 113, 158), "brca": (871, 102, 60, 108), "hnsc": (394, 176, 117, 168)}


@pytest.fixture(scope="module")
def cdr_path(shared_data):
    """TCGA-CDR; the workbook, which takes seconds to read, is read once for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clinical_cdr, "_read_book", functools.cache(clinical_cdr._read_book))
        yield shared_data / "tables" / "tcga_cdr" / "TCGA-CDR-SupplementalTableS1.xlsx"


@pytest.fixture(scope="module")
def cdr(cdr_path):
    """End point -> clinical table of all 33 cancer types."""
    return {endpoint: read_clinical("tcga_cdr", cdr_path, endpoint=endpoint) for endpoint in ("OS", "DSS", "PFI")}


@pytest.fixture(scope="module")
def porpoise(shared_data):
    """Cohort -> clinical table of the PORPOISE shape."""
    folder = shared_data / "tables" / "porpoise"
    return {name: read_clinical("porpoise", folder / f"tcga_{name}_all_clean.csv.zip") for name in COHORTS}


def with_cdr(table, other):
    joined = table.merge(other.table, on="patient_id", suffixes=("", "_cdr"))
    assert len(joined) == len(table)
    return joined


@pytest.mark.parametrize("name", COHORTS)
def test_patients_and_events(porpoise, cdr, name):
    slides, patients, deaths = COHORTS[name]
    found = porpoise[name]
    table, steps = drop_unusable(found)
    assert (len(found.slides), len(table), table["event"].sum()) == (slides, patients, deaths)
    records = steps[0]
    assert (records["unit"], records["before"], records["after"]) == ("records", slides, patients)
    assert len(records["excluded"]) == slides - patients
    joined = with_cdr(table, cdr["OS"])
    assert (joined["event"] == joined["event_cdr"]).all()
    # PORPOISE: days / 30.44 with two decimals, so within 0.01 months of days / 30.4375 but for the longest times.
    days, said = joined["time_months_cdr"] * 30.4375, joined["time_months"]
    assert (said - days / 30.44).abs().max() < 0.0051
    assert (said / joined["time_months_cdr"]).median() == pytest.approx(30.4375 / 30.44, abs=2e-5)
    progressions, without_dss = CDR_EVENTS[name]
    assert with_cdr(table, cdr["PFI"])["event_cdr"].sum() == progressions
    assert with_cdr(table, cdr["DSS"])["event_cdr"].isna().sum() == without_dss


@pytest.mark.parametrize("name", EDGES)
def test_time_bins_of_the_whole_cohort(porpoise, name):
    table, _ = drop_unusable(porpoise[name])
    time = table["time_months"].to_numpy()
    inner = bin_edges(time, table["event"].to_numpy(), 4, name)
    first, *middle, last = EDGES[name]
    np.testing.assert_allclose(inner, middle, atol=0.05)
    assert time.min() == pytest.approx(first) and time.max() == pytest.approx(last, abs=0.5)


@pytest.mark.parametrize(("name", "c"), AGE_C.items())
def test_older_patients_die_sooner(porpoise, name, c):
    """An event flag that is swapped takes the prognosis of age away."""
    table = drop_unusable(porpoise[name])[0].dropna(subset=["age_years"])
    time, event = table["time_months"].to_numpy(), table["event"].to_numpy()
    age = table[["age_years"]].to_numpy() / 10
    fit = fit_cox_ridge(age, time, event, 1e-6)
    assert fit.coef[0] > 0.09  # log hazard ratio of ten years
    assert harrell(time, event, age @ fit.coef).c == pytest.approx(c, abs=0.001) and c > 0.5
    assert harrell(time, 1 - event, age[:, 0]).c < c - 0.015


@pytest.mark.parametrize("name", COHORTS)
def test_patients_of_published_folds_are_known(shared_data, porpoise, name):
    known = set(porpoise[name].table["patient_id"])
    for scheme in ("porpoise", "survpath"):
        folder = shared_data / "splits" / f"{scheme}_5foldcv" / f"tcga_{name}"
        files = sorted(folder.glob("*.csv"))
        assert len(files) == (5 if scheme == "porpoise" or name in SURVPATH else 0)
        if scheme == "survpath" and name in SURVPATH:
            path = shared_data / "tables" / "survpath" / "metadata" / f"tcga_{name}.csv"
            known = set(read_clinical("porpoise", path).table["patient_id"])
        for file in files:
            with file.open() as lines:
                rows = list(csv.DictReader(lines))
            train, val = ({row[part] for row in rows} - {""} for part in ("train", "val"))
            assert train and val and not train & val
            assert train | val <= known
        tested = [row["val"] for file in files for row in csv.DictReader(file.open()) if row["val"]]
        assert len(tested) == len(set(tested))


@pytest.mark.parametrize("name", SURVPATH)
def test_three_end_points_of_survpath_are_those_of_tcga_cdr(shared_data, cdr, name):
    path = shared_data / "tables" / "survpath" / "metadata" / f"tcga_{name}.csv"
    patients, *event_counts = SURVPATH[name]
    for endpoint, count in zip(("OS", "DSS", "PFI"), event_counts, strict=True):
        found = read_clinical("porpoise", path, endpoint=endpoint)
        table, _ = drop_unusable(found)
        assert (len(table), table["event"].sum()) == (patients, count)
        joined = with_cdr(table, cdr[endpoint])
        assert (joined["event"] == joined["event_cdr"]).all()
        # Months of 30 days, to the last digit.
        np.testing.assert_allclose(joined["time_months"] * 30, joined["time_months_cdr"] * 30.4375, rtol=1e-12)
        assert "30 days" in found.notes["month_days"]


def test_cdr_counts(cdr):
    table = cdr["OS"].table
    assert len(table) == 11160
    assert table["time_months"].isna().sum() == 66 and table["event"].isna().sum() == 9
    assert (table["time_months"] == 0).sum() == 108 and table["redacted"].sum() == 57
    kept, steps = drop_unusable(cdr["OS"])
    assert [(step["name"], len(step["excluded"])) for step in steps] == [
        ("listed in the clinical table", 0),
        ("not redacted", 57),
        ("with event status", 9),
        ("with follow-up time", 56),
        ("with time not below zero", 0),
        ("with time above zero", 108),
    ]
    assert len(kept) == 11160 - 57 - 9 - 56 - 108
    assert cdr["OS"].notes["stage_words_without_number"]["Stage X"] == 13


def test_cdr_types(cdr_path):
    found = read_clinical("tcga_cdr", cdr_path, types=["HNSC"])
    assert len(found.table) == 528 and found.notes["rows_of_other_types"] == 11160 - 528
    assert "metastases" not in found.notes["time_zero"]


def test_institutions(cdr_path, cdr):
    """Merged cohorts hold one hospital under several codes; the names of GBMLGG are 38 before aliases."""
    table = cdr["OS"].table.assign(code=[site_of(patient) for patient in cdr["OS"].table["patient_id"]])
    assert table["site"].str.len().gt(2).all()  # names, no codes
    assert table.groupby("code")["site"].nunique().eq(1).all()
    counts = {}
    for name, types in {"COADREAD": ["COAD", "READ"], "GBMLGG": ["GBM", "LGG"], "HNSC": ["HNSC"]}.items():
        ids = read_clinical("tcga_cdr", cdr_path, types=types).table["patient_id"]
        part = table[table["patient_id"].isin(ids)]
        counts[name] = (part["code"].nunique(), part["site"].nunique())
    assert counts == {"COADREAD": (38, 25), "GBMLGG": (46, 32), "HNSC": (28, 28)}
    codes = table.groupby("site")["code"].unique()
    for institution, some in {
        "MD Anderson Cancer Center": {"02", "R8"},
        "University of California San Francisco": {"08", "RY"},
        "University of North Carolina": {"EZ", "OX"},
        "Fondazione IRCCS Istituto Neurologico Carlo Besta": {"27", "QH"},
        "St. Joseph's Hospital (Arizona)": {"32", "RR", "HT"},
    }.items():
        assert some <= set(codes[institution])


def test_institutions_reach_a_cohort_through_its_covariates(porpoise, cdr):
    patients, _ = drop_unusable(porpoise["gbmlgg"])
    merged, notes = fill_covariates(patients, cdr["OS"])
    assert (patients["site"].nunique(), merged["site"].nunique()) == (35, 26)
    assert merged["site"].str.len().gt(2).all() and notes["unmatched"] == []
    hnsc = fill_covariates(drop_unusable(porpoise["hnsc"])[0], cdr["OS"])[0]
    largest = hnsc["site"].value_counts()
    assert largest.index[0] == "MD Anderson Cancer Center"


@pytest.mark.parametrize(
    ("name", "with_stage"),
    # BRCA: 945 have a stage text, 11 of them "Stage X"; HNSC: pathologic, else clinical
    [("blca", 371), ("luad", 446), ("brca", 934), ("ucec", 480), ("gbmlgg", 0), ("hnsc", 416)],
)
def test_stages(porpoise, cdr, name, with_stage):
    merged, notes = fill_covariates(drop_unusable(porpoise[name])[0], cdr["OS"])
    assert merged["stage"].notna().sum() == with_stage
    assert notes["columns"]["sex"]["overridden"] == 0 and notes["columns"]["age_years"]["overridden"] == 0


@pytest.mark.parametrize(
    # Rows, patients, rows of another project (the BRCA file holds one DLBC patient), dead without a day of death,
    # living and dead with a shorter time than in TCGA-CDR: 11 and 7 in all
    ("name", "rows", "patients", "others", "no_death_day", "living_shorter", "dead_shorter"),
    [("BLCA", 772, 386, 0, 2, 2, 0), ("BRCA", 2124, 1062, 2, 1, 3, 6), ("UCEC", 1010, 505, 0, 0, 6, 1)],
)
def test_gdc_clinical(shared_data, cdr, name, rows, patients, others, no_death_day, living_shorter, dead_shorter):
    path = shared_data / "gdc" / "clinical_tsv" / f"{name}_clinical.tsv.gz"
    found = read_clinical("gdc_clinical", path, types=[name])
    assert (found.n_records, len(found.table), found.notes["rows_of_other_types"]) == (rows, patients, others)
    assert len(read_clinical("gdc_clinical", path).table) == patients + others // 2
    assert found.table["site"].str.len().eq(2).all()  # the portal's export names no source site
    table, steps = drop_unusable(found)
    reason = next(step["reason"] for step in steps if step["name"] == "with follow-up time")
    assert (f"dead without days to death: {no_death_day}" in reason) == (no_death_day > 0)
    joined = table.merge(cdr["OS"].table, on="patient_id", suffixes=("", "_cdr"))
    assert len(joined) == len(table)
    known = joined.dropna(subset=["event_cdr", "time_months_cdr"])
    assert len(joined) - len(known) <= 1 and (known["event"] == known["event_cdr"]).all()
    # The portal's export has no column of visits: some of the living are followed for less time than in TCGA-CDR.
    days = (known["time_months"] - known["time_months_cdr"]) * 30.4375
    dead = known["event"] == 1
    assert not (days > 0.5).any() and "no column of follow-up visits" in found.notes["no_follow_up_column"]
    assert ((days < -0.5) & ~dead).sum() == living_shorter and ((days < -0.5) & dead).sum() == dead_shorter


def test_cbioportal_study(shared_data):
    folder = shared_data / "tables" / "cbioportal" / "study_es_0"
    found = read_clinical("cbioportal", folder)
    assert len(found.table) == 841 and found.table["event"].sum() == 87
    assert (found.table["time_months"] <= 0).sum() == 59
    table, steps = drop_unusable(found)
    assert len(table) + sum(len(step["excluded"]) for step in steps) == 841
    assert "diagnosis" in found.notes["time_zero"]
    assert not table["patient_id"].str.startswith("TEST_PATIENT").any()
    assert read_clinical("cbioportal", folder, endpoint="DFI").table["event"].sum() == 57
