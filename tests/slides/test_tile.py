"""The tile step on small slides: files, attributes, failures."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
from PIL import Image, ImageFilter

from morphome.files import read_json, stamp
from morphome.slides import tile as tile_step
from morphome.slides.openslide_reader import OpenSlideReader
from morphome.slides.reader import ReaderChoice, SlideError
from morphome.slides.thumbnail import DROPPED
from morphome.slides.tile import run_tile

OUTPUTS = {"h5_out": "h5", "qc_out": "json", "geojson_out": "geojson", "thumbnail_out": "jpg"}


@pytest.fixture
def tile(synthetic, tmp_path):
    """Run the step; the quality record, datasets and attributes."""

    def run(path, slide="S", folder="tiles", **changes):
        settings = {"tiling": synthetic.tiling(**changes), "slides": synthetic.SLIDES}
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
    assert data["fold_fraction"].max() == data["blood_fraction"].max() == 0
    assert all(data[name].dtype == np.float32 and len(data[name]) == n for name in set(data) - {"coords"})
    assert (qc["reader"], attrs["reader"], qc["mask_source"], attrs["mask_source"]) == (
        *["openslide"] * 2,
        *["made"] * 2,
    )
    assert qc["reader_reason"] == attrs["reader_reason"] != ""
    assert (qc["fold_fraction"], qc["blood_fraction"], qc["n_dropped_fold"], qc["n_dropped_blood"]) == (0, 0, 0, 0)
    assert qc["white_fraction"] == pytest.approx(1 - np.pi * 0.42**2, abs=0.02)
    assert (qc["black_fraction"], qc["n_holes"]) == (0, 0)
    assert qc["glass_rgb"] == pytest.approx([243, 242, 244], abs=2)
    assert 0.2 < qc["stain_saturation"] < 0.6
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


def damaged_tissue(synthetic):
    """Tissue with a fold and a pool of blood, and where they are in level-0 pixels (1000 x 760 px of 0.5 microns)."""
    image = synthetic.paint().astype(np.float32)
    fold, blood = np.s_[256:448, 320:384], np.s_[256:448, 576:640]
    image[fold] = 243 * (image[fold] / 243) ** 5
    image[blood] = (214, 72, 84)
    return np.clip(image, 0, 255).astype(np.uint8)


def test_folds_and_blood_stay_with_their_numbers_unless_refused(tile, synthetic, tmp_path):
    path = synthetic.write_tiff(tmp_path / "s.tif", damaged_tissue(synthetic))
    qc, data, *_ = tile(path, "all")
    at = {tuple(c): i for i, c in enumerate(data["coords"].tolist())}
    folded, bloody = [[(x, y) for y in (256, 320, 384)] for x in (320, 576)]
    assert min(data["fold_fraction"][at[c]] for c in folded) > 0.5
    assert min(data["blood_fraction"][at[c]] for c in bloody) > 0.8
    assert all(data["tissue"][at[c]] > 0.95 for c in folded + bloody)
    elsewhere = [i for c, i in at.items() if c not in folded + bloody]
    assert data["fold_fraction"][elsewhere].max() < 0.2
    assert data["blood_fraction"][elsewhere].max() < 0.2
    assert (qc["n_dropped_fold"], qc["n_dropped_blood"]) == (0, 0)
    assert qc["fold_fraction"] == pytest.approx(64 * 192 / (np.pi * 420 * 319), rel=0.4)
    assert qc["blood_fraction"] == pytest.approx(64 * 192 / (np.pi * 420 * 319), rel=0.2)

    less, rest, *_ = tile(path, "less", max_fold_fraction=0.4, max_blood_fraction=0.4)
    assert (less["n_dropped_fold"], less["n_dropped_blood"]) == (3, 3)
    assert {tuple(c) for c in rest["coords"].tolist()} == set(at) - set(folded) - set(bloody)
    assert less["fold_fraction"] == qc["fold_fraction"]


def test_the_picture_shows_what_was_left_out(tile, synthetic, tmp_path):
    image = damaged_tissue(synthetic)
    image[64:192, 320:704] = (28, 58, 158)
    path = synthetic.write_tiff(tmp_path / "s.tif", image)
    kept, dropped = (
        np.asarray(Image.open(tile(path, name, **limits)[4]["thumbnail_out"])).astype(int)
        for name, limits in (("kept", {"max_pen_fraction": 1.0}), ("dropped", {"max_blood_fraction": 0.5}))
    )
    swatch = dropped[8:12, 8:12].mean(axis=(0, 1))
    assert np.abs(swatch - DROPPED["pen"]).max() < 30
    assert np.abs(kept[8:12, 8:12] - dropped[8:12, 8:12]).mean() > 50
    scale = 512 / 1000
    tint = dropped[int(270 * scale) : int(310 * scale), int(585 * scale) : int(630 * scale)].mean(axis=(0, 1))
    plain = kept[int(270 * scale) : int(310 * scale), int(585 * scale) : int(630 * scale)].mean(axis=(0, 1))
    assert tint == pytest.approx(plain + (np.array(DROPPED["blood"]) - plain) * 110 / 255, abs=12)


class OtherReader(OpenSlideReader):
    """A fast reader that shows ``off`` grey levels more in the lower half, or fails there."""

    off: int | None = 0

    def __init__(self, path, choice=None):
        super().__init__(path, ReaderChoice("tiled_jpeg", "", 8, 0))

    def read_level0(self, x, y, width, height):
        region = super().read_level0(x, y, width, height)
        if y < 380:
            return region
        if self.off is None:
            raise SlideError("unreadable", "no such tile")
        return region - np.uint8(self.off)

    def overview(self, width, height):
        return super().overview(width, height) if not self.off else np.zeros((height, width, 3), np.uint8) + 243


@pytest.mark.parametrize(("off", "why"), [(0, ""), (3, "by up to 3 grey levels"), (None, "no such tile")])
def test_a_reader_that_shows_other_pixels_is_left_for_openslide(tile, slide, monkeypatch, off, why):
    monkeypatch.setattr(OtherReader, "off", off)
    expected = tile(slide, "reference")
    monkeypatch.setattr(tile_step, "open_slide", lambda path, reader: OtherReader(path))
    if off:  # its overview shows glass only: at least one tile is needed to notice
        monkeypatch.setattr(OtherReader, "overview", OpenSlideReader.overview)
    qc, data, attrs, *_ = tile(slide, "chosen")
    assert qc["status"] == "ok"
    assert qc["reader"] == attrs["reader"] == ("openslide" if why else "tiled_jpeg")
    assert why in qc["reader_reason"]
    assert qc["parity_n"] > 8
    assert qc["parity_max_difference"] == (off or 0)
    np.testing.assert_array_equal(data["coords"], expected[1]["coords"])


def test_tiles_that_cannot_be_read_are_no_blurred_tiles(tile, synthetic, painted, tmp_path, monkeypatch):
    """They stay planned, so that the encode step counts them as failed."""
    # Large enough that the overview comes from the coarser level.
    path = synthetic.write_tiff(tmp_path / "s.tif", np.kron(painted, np.ones((3, 3, 1), np.uint8)), tile=256)
    monkeypatch.setattr(tile_step, "READ_TEST_TILES", 1)
    limits = {"patch_px": 256, "min_sharpness": 1e-6}
    whole = tile(path, "whole", **limits)
    synthetic.damage_tiles(path, [3 * 12 + 4])
    qc, data, *_ = tile(path, "damaged", **limits)
    assert (qc["status"], qc["n_tiles"], qc["n_dropped_blur"]) == ("ok", whole[0]["n_tiles"], 0)
    assert data["coords"][np.isnan(data["sharpness"])].tolist() == [[1024, 768]]


def test_the_steps_start_without_heavy_imports(loaded_by):
    """A process per slide: torch, pandas and matplotlib would cost more than the slide."""
    heavy = {"torch", "pandas", "matplotlib", "sklearn", "pyarrow", "sksurv"}
    assert not loaded_by("morphome.slides.tile", "morphome.features.encode") & heavy
