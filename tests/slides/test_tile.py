"""The tile step on small slides: files, attributes, failures."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
from PIL import Image, ImageFilter

from morphome.files import read_json, stamp
from morphome.slides.tile import run_tile

OUTPUTS = {"h5_out": "h5", "qc_out": "json", "geojson_out": "geojson", "thumbnail_out": "jpg"}


@pytest.fixture
def tile(synthetic, tmp_path):
    """Run the step; the quality record, datasets and attributes."""

    def run(path, slide="S", folder="tiles", **changes):
        settings = {"tiling": synthetic.tiling(**changes)}
        outputs = {name: tmp_path / folder / f"{slide}.{end}" for name, end in OUTPUTS.items()}
        run_tile(slide_path=path, slide_id=slide, settings=settings, **outputs)
        qc = read_json(outputs["qc_out"], "morphome.slide_qc", settings)
        with h5py.File(outputs["h5_out"]) as handle:
            data = {name: handle[name][()] for name in handle}
            attrs, coords_attrs = dict(handle.attrs), dict(handle["coords"].attrs)
        assert attrs["config_hash"] == stamp("morphome.tiles", settings)["config_hash"]
        return qc, data, attrs, coords_attrs, outputs

    return run


@pytest.fixture(scope="module")
def slide(synthetic, painted, tmp_path_factory):
    return synthetic.write_tiff(tmp_path_factory.mktemp("slides") / "a slide [1].tif", painted)


def test_a_slide_gives_tiles_and_a_record(tile, slide):
    qc, data, attrs, coords, outputs = tile(slide, "a slide (1)")
    n = len(data["coords"])
    assert (qc["status"], qc["reason_code"], qc["n_tiles"]) == ("ok", "", n)
    assert n > 40
    assert data["coords"].dtype == np.int32
    assert (data["tissue"] >= 0.5).all()
    assert data["tissue"].max() == pytest.approx(1.0)
    assert data["pen_fraction"].max() == 0
    assert np.isnan(data["sharpness"]).all()
    assert (np.diff(data["coords"][:, 1].astype(int) * 10_000 + data["coords"][:, 0]) > 0).all()
    assert (attrs["format"], attrs["status"], attrs["slide_id"]) == ("morphome.tiles", "ok", "a slide (1)")
    assert attrs["slide_sha256_head"] == qc["slide_sha256_head"]
    expected = {
        "patch_size": 64, "patch_size_level0": 64, "level0_magnification": 20, "target_magnification": 20,
        "overlap": 0, "name": "a slide (1)", "savetodir": "", "level0_width": 1000, "level0_height": 760,
        "mpp_level0_x": 0.5, "mpp_level0_y": 0.5, "mpp_source": "openslide", "mpp_target": 0.5,
        "mpp_effective": 0.5, "side_x_px": 64, "side_y_px": 64, "min_tissue": 0.5, "mask_sha256": qc["mask_sha256"],
    }  # fmt: skip
    assert set(coords) == set(expected)
    for name, value in expected.items():
        assert coords[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    assert qc["tissue_mm2"] == pytest.approx(np.pi * 420 * 319.2 * 0.25e-6, rel=0.05)
    assert (qc["n_fragments"], qc["verdict"], qc["flags"]) == (1, "flag", ["power_conflict"])
    assert qc["sharpness_median"] is None
    geojson = json.loads(outputs["geojson_out"].read_text())
    assert len(geojson["features"]) == 1
    with Image.open(outputs["thumbnail_out"]) as picture:
        assert picture.format == "JPEG"
        assert max(picture.size) == 512


def test_the_same_physical_tiles_at_another_resolution(tile, synthetic, painted, tmp_path):
    """A slide scanned at twice the resolution gives the same tiles in microns."""
    fine = np.kron(painted[:700, :900], np.ones((2, 2, 1), np.uint8))
    one = tile(synthetic.write_tiff(tmp_path / "1.tif", painted[:700, :900]), "one")
    two = tile(synthetic.write_tiff(tmp_path / "2.tif", fine, mpp=0.25, levels=(4, 16)), "two")
    assert two[3]["side_x_px"] == 128
    np.testing.assert_array_equal(one[1]["coords"] * 2, two[1]["coords"])
    np.testing.assert_allclose(one[1]["tissue"], two[1]["tissue"], atol=0.1)


def test_anisotropic_pixels_give_unequal_sides(tile, synthetic, painted, tmp_path):
    path = synthetic.write_tiff(tmp_path / "s.tif", painted, mpp=None, description=synthetic.aperio(0.4, 25))
    qc, _, _, coords, _ = tile(path, mpp_target=0.5)
    assert (coords["side_x_px"], coords["side_y_px"]) == (80, 80)
    assert (qc["vendor"], qc["verdict"], qc["mpp_source"]) == ("aperio", "ok", "openslide")


def test_outputs_do_not_change_between_runs(tile, slide):
    first, second = tile(slide, folder="first")[4], tile(slide, folder="second")[4]
    for name in ("h5_out", "geojson_out", "thumbnail_out"):
        assert first[name].read_bytes() == second[name].read_bytes(), name


@pytest.mark.parametrize(("changes", "code"), [
    ({"mpp_target": 0.3}, "too_coarse"),
    ({"mpp_overrides": {"S": 2.0}}, "implausible_mpp"),
    ({"min_tissue": 1.0, "min_tiles": 500}, "too_few_tiles"),
    ({"min_fragment_mm2": 50.0}, "no_tissue"),
    ({"patch_px": 2048}, "too_few_tiles"),
])  # fmt: skip
def test_a_slide_that_cannot_be_used_says_why(tile, slide, changes, code):
    qc, data, attrs, _, outputs = tile(slide, **changes)
    assert (qc["status"], qc["reason_code"], qc["n_tiles"]) == ("failed", code, 0)
    assert (attrs["status"], attrs["reason_code"]) == ("failed", code)
    assert data["coords"].shape == (0, 2)
    assert "S" in qc["reason"]
    assert "Remedy" in qc["reason"]
    assert json.loads(outputs["geojson_out"].read_text())["type"] == "FeatureCollection"
    assert Image.open(outputs["thumbnail_out"]).size == (512, 256)


def test_a_missing_file_is_a_failed_slide(tile, tmp_path):
    qc, *_ = tile(tmp_path / "gone.svs")
    assert (qc["status"], qc["reason_code"]) == ("failed", "missing_file")
    assert qc["slide_sha256_head"] is None
    assert qc["mpp_x"] is None


def test_an_empty_slide_is_fine_where_it_is_allowed(tile, synthetic, tmp_path):
    glass = np.full((400, 400, 3), 243, np.uint8)
    path = synthetic.write_tiff(tmp_path / "glass.tif", glass)
    qc, data, *_ = tile(path, min_tiles=0)
    assert (qc["status"], qc["n_tiles"], len(data["coords"])) == ("ok", 0, 0)
    assert tile(path)[0]["reason_code"] == "no_tissue"
    assert tile(path, min_tiles=0, min_tissue=0.0)[0]["n_tiles"] == 0


def test_a_slide_whose_level_0_cannot_be_read_fails_here_and_not_in_training(tile, synthetic, painted, tmp_path):
    image = np.kron(painted, np.ones((3, 3, 1), np.uint8))
    path = synthetic.write_tiff(tmp_path / "damaged.tif", image, tile=256)
    # The overview comes from the coarser level and is fine.
    synthetic.damage_tiles(path, list(range(12 * 9)))
    qc, data, *_ = tile(path)
    assert (qc["status"], qc["reason_code"]) == ("failed", "unreadable")
    assert qc["tissue_mm2"] > 0.05
    assert f"{path.stat().st_size} bytes" in qc["reason"]
    assert len(data["coords"]) == 0


def test_ink_costs_its_tiles_and_is_counted(tile, synthetic, painted, tmp_path):
    inked = painted.copy()
    inked[330:450, 200:800] = (28, 58, 158)
    clean = tile(synthetic.write_tiff(tmp_path / "clean.tif", painted), "clean")
    marked = tile(synthetic.write_tiff(tmp_path / "inked.tif", inked), "inked")
    assert clean[0]["n_dropped_pen"] == 0
    assert marked[0]["n_dropped_pen"] >= 10
    assert marked[0]["pen_fraction"] > 0.02
    assert marked[1]["pen_fraction"].max() <= 0.2
    assert marked[0]["n_tiles"] + marked[0]["n_dropped_pen"] == clean[0]["n_tiles"]


def test_blurred_tiles_are_left_out_only_when_asked(tile, synthetic, painted, tmp_path):
    half = painted.copy()
    blurred = np.asarray(Image.fromarray(painted).filter(ImageFilter.GaussianBlur(6)))
    half[:, 500:] = blurred[:, 500:]
    path = synthetic.write_tiff(tmp_path / "half.tif", half)
    everything = tile(path, "all")
    sharp = tile(path, "sharp", min_sharpness=60.0)
    assert everything[0]["n_dropped_blur"] == 0
    assert sharp[0]["n_dropped_blur"] > 10
    assert sharp[0]["n_tiles"] + sharp[0]["n_dropped_blur"] == everything[0]["n_tiles"]
    assert (sharp[1]["sharpness"] >= 60).all()
    assert sharp[1]["coords"][:, 0].max() < 500
    assert sharp[0]["sharpness_median"] == pytest.approx(np.median(sharp[1]["sharpness"]))


def test_the_steps_start_without_heavy_imports(loaded_by):
    """A process per slide: torch, pandas and matplotlib would cost more than the slide."""
    heavy = {"torch", "pandas", "matplotlib", "sklearn", "pyarrow", "sksurv"}
    assert not loaded_by("morphome.slides.tile", "morphome.features.encode") & heavy
