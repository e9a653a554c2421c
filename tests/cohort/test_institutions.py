"""One name per institution, whatever the site lists call it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from morphome.cohort import institutions as module
from morphome.cohort.institutions import ALIASES, institution_of, institutions_of_sheet, sites
from morphome.errors import MorphomeError


@pytest.mark.parametrize(
    ("names", "institution"),
    [
        (["UCSF", "ucsf ", "University of California, San Francisco"], "University of California San Francisco"),
        (["MD Anderson", "M.D. Anderson Cancer Center"], None),
        (["MD Anderson", "MD  Anderson Cancer Center", "UT MD Anderson"], "MD Anderson Cancer Center"),
        (["UNC", "University of North Carolina"], "University of North Carolina"),
        (["St. Joseph's Hospital (AZ)", "St Joseph’s Hospital AZ"], "St. Joseph's Hospital (Arizona)"),
        (
            ["St Joseph's Medical Center (MD)", "St. Joseph's Medical Center-(MD)"],
            "St. Joseph's Medical Center (Maryland)",
        ),
        (["Fondazione-Besta", "Besta"], "Fondazione IRCCS Istituto Neurologico Carlo Besta"),
        (["BLN - Cleveland Clinic", "Cleveland Clinic Foundation"], "Cleveland Clinic"),
        (["Asterand"], "Asterand"),
        (["Mayo", "Mayo Clinic - Rochester"], "Mayo Clinic Rochester"),
        (["Mayo Clinic Arizona"], "Mayo Clinic Arizona"),
        (["Washington University - CALGB"], "Washington University - CALGB"),
        (["Hospital of Nobody's  Town"], "Hospital of Nobody's Town"),
    ],
)
def test_names(names, institution):
    found = {institution_of("05", name) for name in names}
    if institution is None:
        assert len(found) == 2  # a spelling that the list does not have is left as it is
    else:
        assert found == {institution}


@pytest.mark.parametrize("name", ["", None, "[Not Available]", "'--", float("nan")])
def test_a_site_without_a_name_is_its_code(name):
    assert institution_of(" NA", name) == "NA"


def test_the_list_is_consistent():
    raw = yaml.safe_load(ALIASES.read_text(encoding="utf-8"))
    assert len(raw) > 40 and all(names and all(isinstance(n, str) for n in names) for names in raw.values())
    for institution, names in raw.items():
        for name in (institution, *names):
            assert institution_of("05", name) == institution
            assert institution_of("05", name.upper()) == institution
    assert list(raw) == sorted(raw, key=str.lower)


def test_a_name_under_two_institutions_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "institutions.yaml"
    path.write_text("A Hospital: [Alpha]\nB Hospital: [alpha.]\n")
    monkeypatch.setattr(module, "ALIASES", path)
    module._aliases.cache_clear()
    try:
        with pytest.raises(MorphomeError, match=r"'alpha\.' stands under 'A Hospital' and under 'B Hospital'"):
            institution_of("05", "Alpha")
    finally:
        module._aliases.cache_clear()


def test_site_of_a_patient():
    patients = ["TCGA-08-0001", "TCGA-RY-0002", "TCGA-QQ-0003", "P4", "P5"]
    names = ["UCSF", "ucsf", None, "[Not Available]", "Yale"]
    ucsf = "University of California San Francisco"
    assert sites(patients, names) == [ucsf, ucsf, "QQ", "unknown", "Yale University"]


def of_sheet(rows):
    return institutions_of_sheet(
        pd.DataFrame([[*row, "", "", ""][:3] for row in rows], dtype=object), Path("sites.xlsx")
    )


HEADER = ["TSS Code", "Source Site", "Disease type"]


def test_codes_of_a_sheet():
    rows = [["Weblink", "x"], [], HEADER, [1, "IGC"], [50, "Roswell"], ["NA", "UNC"], ["ry", "UCSF"], ["ZZ", None], []]
    assert of_sheet(rows) == {
        "01": "International Genomics Consortium",
        "50": "Roswell Park Comprehensive Cancer Center",
        "NA": "University of North Carolina",
        "RY": "University of California San Francisco",
    }


def test_bad_sheets_are_named():
    with pytest.raises(MorphomeError, match=r"sites\.xlsx: no columns 'TSS Code' and 'Source Site'"):
        of_sheet([["Code", "Name"], ["01", "x"]])
    with pytest.raises(MorphomeError, match="'01' has two names, 'Roswell Park Comprehensive Cancer Center' and 'Yale"):
        of_sheet([HEADER, ["01", "Roswell"], [1, "Roswell Park"], ["01", "Yale"]])
