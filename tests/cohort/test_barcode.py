"""TCGA barcodes by their parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphome.cohort.barcode import cut_suffix, parse_barcode, sample_name, site_of, try_barcode
from morphome.errors import MorphomeError

UUID = "195576CF-B739-4BD9-B15B-4A70AE287D3E"


def test_slide_barcode_with_uuid_and_ending():
    found = parse_barcode(f"TCGA-2F-A9KO-01Z-00-DX1.{UUID}.svs")
    assert found.patient == "TCGA-2F-A9KO"
    assert (found.site, found.sample_code, found.vial, found.portion) == ("2F", "01", "Z", "00")
    assert (found.slide, found.slide_type) == ("DX1", "DX")


def test_site_keeps_its_leading_zero():
    assert site_of("TCGA-05-4249") == "05"
    assert site_of("HOSPITAL-7") == "unknown"


def test_site_bs_is_no_bottom_slide():
    """Site BS of UCEC: searching for '-BS' would call this diagnostic slide a frozen one."""
    assert parse_barcode("TCGA-BS-A0T9-01Z-00-DX1").slide_type == "DX"
    assert parse_barcode("TCGA-A5-A0G1-01A-01-BSA").slide_type == "BS"


def test_aliquot_barcode():
    found = parse_barcode("TCGA-CS-4938-01B-11D-1893-08")
    assert (found.vial, found.portion, found.analyte, found.plate, found.centre) == ("B", "11", "D", "1893", "08")
    assert found.slide_type == ""


def test_lower_case_file_name():
    assert parse_barcode("tcga-cr-7395-01a-01-ts1.svs").patient == "TCGA-CR-7395"


@pytest.mark.parametrize("text", ["", "TCGA", "TCGA-2F", "TCGA-2F-A9KOX", "CPTAC-2F-A9KO", "TCGA-2F-A9KO-1Z"])
def test_other_text_is_no_barcode(text):
    assert try_barcode(text) is None
    with pytest.raises(MorphomeError, match="not a TCGA barcode"):
        parse_barcode(text)


def test_suffix_is_cut_as_a_suffix():
    assert cut_suffix("slide_vss.svs") == "slide_vss"
    assert cut_suffix("a.OME.TIFF") == "a"
    assert cut_suffix(f"TCGA-2F-A9KO-01Z-00-DX1.{UUID}") == f"TCGA-2F-A9KO-01Z-00-DX1.{UUID}"
    assert cut_suffix(".svs") == ".svs"


@given(st.text(alphabet="svS.x1", min_size=1, max_size=12))
def test_cutting_an_ending_gives_back_the_name(name):
    assert cut_suffix(name + ".svs") == name
    assert cut_suffix(name + ".ndpi") == name


def test_sample_name_says_what_the_code_means():
    assert sample_name("02") == "02 (recurrent solid tumour)"
    assert sample_name("77") == "77"
