"""The design of the simulated cohort: names and choices that stand before anything has run."""

from __future__ import annotations

import uuid

import pytest

from morphome.cohort.barcode import parse_barcode
from morphome.cohort.design import design
from morphome.cohort.gene_families import FAMILIES, choose_genes, gene_groups, signal_genes
from morphome.errors import MorphomeError

SIMULATE = {"patients": 48, "sites": 6, "second_slide_share": 0.17, "bad_slides": 1, "seed": 7}


def test_standard_library_only(loaded_by):
    assert not loaded_by("morphome.cohort.design") & {"numpy", "pandas", "PIL", "openslide", "scipy"}


def test_default_cohort():
    plan = design(SIMULATE)
    assert (len(plan.patients), len(plan.slides), len(plan.without_slide)) == (48, 56, 1)
    assert plan.patients == sorted(set(plan.patients))
    assert set(plan.without_slide).isdisjoint(plan.patients)
    per_site = [sum(plan.sites[p] == site for p in plan.patients) for site in set(plan.sites.values())]
    assert per_site == [8] * 6
    for slide in plan.slides:
        barcode = parse_barcode(slide.slide_id)
        assert (barcode.patient, barcode.sample_code) == (slide.patient_id, "01")
        assert barcode.slide_type == "DX"
        assert barcode.site == plan.sites[slide.patient_id]
        assert slide.file_name == slide.slide_id + ".svs"
    assert len(plan.files) == len(set(plan.files)) == 6 + 56 + 48 + 46 + 48


def test_ids_are_uuids_and_unique():
    plan = design(SIMULATE)
    ids = [slide.file_id for slide in plan.slides] + [file.file_id for file in plan.molecular]
    assert len(set(ids)) == len(ids)
    assert all(uuid.UUID(one).version == 4 for one in ids)


def test_bad_slides_take_no_patient_away():
    plan = design({**SIMULATE, "bad_slides": 8})
    assert sum(slide.damaged for slide in plan.slides) == 8
    assert {slide.patient_id for slide in plan.slides if not slide.damaged} == set(plan.patients)
    assert not any(slide.damaged and (slide.pen or slide.blurred) for slide in plan.slides)


def test_same_settings_same_design_other_seed_other_patients():
    assert design(SIMULATE) == design(dict(SIMULATE))
    # Known ids: the choice must not move with the Python version or the machine.
    assert design(SIMULATE).patients[0] == "TCGA-0A-S4ES"
    assert set(design({**SIMULATE, "seed": 8}).patients).isdisjoint(design(SIMULATE).patients)


@pytest.mark.parametrize("change", [{"sites": 27, "patients": 100}, {"sites": 13, "patients": 12}])
def test_too_many_sites(change):
    with pytest.raises(MorphomeError, match=r"simulate\.sites"):
        design({**SIMULATE, **change})


def test_too_many_bad_slides():
    with pytest.raises(MorphomeError, match=r"simulate\.bad_slides"):
        design({**SIMULATE, "bad_slides": 57})


@pytest.mark.parametrize("count", [60, 200, 230])
def test_genes_and_groups(count):
    genes = choose_genes(count)
    assert len(set(genes)) == len(genes) == count
    groups = gene_groups(genes)
    assert list(groups) == list(FAMILIES) and all(groups.values())
    assert signal_genes() <= set(genes) and len(signal_genes()) == 20
    members = [gene for group in groups.values() for gene in group]
    assert set(members) <= set(genes)
    if count >= 200:
        assert len(members) > len(set(members))  # the groups overlap
