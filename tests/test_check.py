"""`morphome check` names what a run would only find hours later."""

from __future__ import annotations

import pytest

from morphome.check import check_tables
from morphome.config import check_config
from morphome.errors import MorphomeError


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A cohort of one slide; changes go into a section."""
    monkeypatch.setenv("MORPHOME_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "a.svs").write_bytes(b"a slide")
    (tmp_path / "sheet.csv").write_text(f"slide_id,patient_id,path\nA,P,{tmp_path / 'a.svs'}\n")
    (tmp_path / "clinical.csv").write_text("patient_id,time,event,site\nP,3,1,X\n")
    (tmp_path / "masks").mkdir()

    def make(**sections):
        return check_config(
            {
                "name": "own",
                "output": str(tmp_path / "results"),
                "cohort": {
                    "clinical": {"format": "csv", "path": str(tmp_path / "clinical.csv")},
                    "time_unit": "months",
                    "require": ["wsi"],
                    "min_events": 1,
                },
                "slides": {"sheet": str(tmp_path / "sheet.csv")},
                "models": {"random": None},
                **sections,
            }
        )

    return make


def test_one_slide_is_fine(config, tmp_path):
    (tmp_path / "masks" / "A.geojson").write_text("{}")
    lines = list(check_tables(config(tiling={"masks": str(tmp_path / "masks"), "mpp_overrides": {"A": 0.25}})))
    assert "1 of 1 slides" in lines


def test_a_mask_of_no_slide_is_named(config, tmp_path):
    (tmp_path / "masks" / "A.svs.geojson").write_text("{}")
    with pytest.raises(MorphomeError, match=r"tiling\.masks: 'A\.svs' is no slide") as caught:
        list(check_tables(config(tiling={"masks": str(tmp_path / "masks")})))
    assert "slide_ids" in caught.value.remedy


def test_an_override_of_no_slide_is_named(config):
    with pytest.raises(MorphomeError, match=r"tiling\.mpp_overrides: 'B' is no slide"):
        list(check_tables(config(tiling={"mpp_overrides": {"B": 0.25}})))


def test_weights_that_are_not_there_are_named(config):
    with pytest.raises(MorphomeError) as caught:
        list(check_tables(config(features={"encoder": "phikon_v2"}, tiling={"patch_px": 224})))
    assert "morphome encoders prefetch phikon_v2" in str(caught.value)
