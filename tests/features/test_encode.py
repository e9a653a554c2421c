"""The encode step: order, failed tiles, attributes, determinism."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from morphome.errors import MorphomeError
from morphome.features import encode as module
from morphome.features.encode import run_encode, to_float16
from morphome.features.registry import fingerprint, load
from morphome.files import read_json
from morphome.slides.openslide_reader import OpenSlideReader
from morphome.slides.patches import read_patch
from morphome.slides.reader import SlideError
from morphome.slides.tile import run_tile


@pytest.fixture
def encode(synthetic, tmp_path):
    """Tile and encode a slide; data, attributes and the file."""

    def run(path, slide="S", name="f", tiled=None, features=None, **changes):
        tiling = synthetic.tiling(**changes)
        tiles = tmp_path / "tiles" / f"{slide}.h5"
        if tiled is None or not tiles.exists():
            ends = {"qc_out": ".json", "geojson_out": ".geojson", "thumbnail_out": ".jpg"}
            outputs = {key: tiles.with_suffix(end) for key, end in ends.items()}
            run_tile(slide_path=tiled or path, slide_id=slide, settings={"tiling": tiling}, h5_out=tiles, **outputs)
        settings = {"tiling": tiling, "features": {**synthetic.FEATURES, **(features or {})}}
        out = tmp_path / name / f"{slide}.h5"
        timing = out.with_suffix(".json")
        run_encode(slide_path=path, slide_id=slide, tiles_h5=tiles, settings=settings, h5_out=out, timing_out=timing)
        with h5py.File(out) as handle:
            data = {key: handle[key][()] for key in handle}
            attrs = {key: dict(handle[key].attrs) for key in ("features", "coords")}
            attrs["file"] = dict(handle.attrs)
            attrs["contiguous"] = handle["features"].chunks is None
        return data, attrs, out, read_json(timing, "morphome.timing", settings), settings

    return run


@pytest.fixture
def slide(synthetic, painted, tmp_path):
    return synthetic.write_tiff(tmp_path / "a slide [1].tif", painted)


def test_every_planned_tile_is_encoded_in_order(encode, slide):
    data, attrs, _, timing, settings = encode(slide, "a slide (1)")
    n = len(data["coords"])
    assert data["features"].shape == (n, 64)
    assert data["features"].dtype == np.float16
    assert data["coords"].dtype == np.int32
    assert attrs["contiguous"]
    assert (data["sharpness"] > 0).all()
    assert len(data["failed_coords"]) == 0
    file = attrs["file"]
    assert (file["format"], file["status"], file["slide_id"]) == ("morphome.tile-features", "ok", "a slide (1)")
    assert (file["n_tiles_planned"], file["n_tiles_failed"], file["resize"]) == (n, 0, "none")
    assert len(file["content_key"]) == 32
    assert attrs["features"]["encoder"] == "stain_texture"
    assert attrs["features"]["encoder_fingerprint"] == fingerprint(settings["features"], settings["tiling"])
    assert attrs["features"]["name"] == attrs["coords"]["name"] == "a slide (1)"
    assert attrs["coords"]["patch_size_level0"] == 64
    assert timing["n_tiles"] == n
    assert 0 < timing["seconds_read"] + timing["seconds_encode"] < timing["seconds_total"]
    with OpenSlideReader(slide) as reader:
        for i in (0, n // 2, n - 1):
            x, y = data["coords"][i].tolist()
            expected = load("stain_texture").encode(read_patch(reader, x, y, 64, 64, 64)[None])[0]
            np.testing.assert_array_equal(data["features"][i], expected.astype(np.float16))


def test_bytes_do_not_depend_on_the_run_or_the_batch(encode, slide, monkeypatch):
    first = encode(slide, name="first")[2].read_bytes()
    monkeypatch.setattr(module, "BATCH", 7)
    assert encode(slide, name="second")[2].read_bytes() == first


def test_a_failed_slide_stays_failed(encode, tmp_path):
    data, attrs, _, timing, _ = encode(tmp_path / "gone.svs")
    assert (attrs["file"]["status"], attrs["file"]["reason_code"]) == ("failed", "missing_file")
    assert data["features"].shape == (0, 64)
    assert timing["tiles_per_second"] is None


def test_an_empty_slide_is_an_empty_bag(encode, synthetic, tmp_path):
    path = synthetic.write_tiff(tmp_path / "glass.tif", np.full((400, 400, 3), 243, np.uint8))
    data, attrs, *_ = encode(path, min_tiles=0)
    assert attrs["file"]["status"] == "ok"
    assert data["features"].shape == (0, 64)


def test_a_tile_that_fails_once_is_read_again(encode, slide, monkeypatch):
    whole = encode(slide, name="whole")[0]
    calls = {"n": 0}

    def fails_once(reader, x, y, *size):
        calls["n"] += 1
        if calls["n"] == 5:
            raise SlideError("unreadable", "once")
        return read_patch(reader, x, y, *size)

    monkeypatch.setattr(module, "read_patch", fails_once)
    data, attrs, *_ = encode(slide, name="again", tiled=slide)
    assert attrs["file"]["n_tiles_failed"] == 0
    np.testing.assert_array_equal(data["features"], whole["features"])


def failing(bad):
    def read(reader, x, y, *size):
        if (x, y) in bad:
            raise SlideError("unreadable", "always")
        return read_patch(reader, x, y, *size)

    return read


def test_a_tile_that_fails_twice_is_recorded_and_never_white(encode, slide, monkeypatch):
    whole, first, *_ = encode(slide, name="whole")
    bad = tuple(whole["coords"][3].tolist())
    monkeypatch.setattr(module, "read_patch", failing({bad}))
    data, attrs, *_ = encode(slide, name="some", tiled=slide, features={"max_failed_tiles": 0.1})
    n = len(whole["coords"])
    assert (attrs["file"]["n_tiles_planned"], attrs["file"]["n_tiles_failed"]) == (n, 1)
    assert data["failed_coords"].tolist() == [list(bad)]
    np.testing.assert_array_equal(data["features"], np.delete(whole["features"], 3, axis=0))
    np.testing.assert_array_equal(data["coords"], np.delete(whole["coords"], 3, axis=0))
    assert attrs["file"]["content_key"] != first["file"]["content_key"]


def test_too_many_failed_tiles_fail_the_slide(encode, slide, monkeypatch):
    coords = encode(slide, name="whole")[0]["coords"]
    monkeypatch.setattr(module, "read_patch", failing({tuple(c) for c in coords[:9].tolist()}))
    data, attrs, *_ = encode(slide, name="some", tiled=slide, features={"max_failed_tiles": 0.05})
    file = attrs["file"]
    assert (file["status"], file["reason_code"], file["n_tiles_failed"]) == ("failed", "too_many_failed_tiles", 9)
    assert f"9 of {len(coords)} tiles" in file["reason"]
    assert len(data["features"]) == 0
    np.testing.assert_array_equal(data["failed_coords"], coords[:9])


def test_really_unreadable_tiles_are_found(encode, synthetic, painted, tmp_path):
    """OpenSlide keeps an error for the life of a handle: the tiles after a bad one must still be read."""
    image = np.kron(painted, np.ones((3, 3, 1), np.uint8))
    good, bad = (synthetic.write_tiff(tmp_path / name, image, tile=192) for name in ("good.tif", "bad.tif"))
    synthetic.damage_tiles(bad, [5 * 16 + 7])  # column 7, row 5 of 16 columns
    whole = encode(good, "good", patch_px=192)[0]
    data, attrs, *_ = encode(bad, "bad", patch_px=192, features={"max_failed_tiles": 0.05})
    assert attrs["file"]["status"] == "ok", attrs["file"]["reason"]
    assert data["failed_coords"].tolist() == [[7 * 192, 5 * 192]]
    kept = (whole["coords"] != [7 * 192, 5 * 192]).any(axis=1)
    np.testing.assert_array_equal(data["features"], whole["features"][kept])


def test_another_file_than_the_tiled_one_is_refused(encode, slide, synthetic, tmp_path):
    other = synthetic.write_tiff(tmp_path / "other.tif", synthetic.paint(seed=5))
    attrs = encode(other, tiled=slide)[1]
    assert (attrs["file"]["status"], attrs["file"]["reason_code"]) == ("failed", "slide_changed")


def test_tiles_of_another_slide_are_refused(synthetic, encode, slide, tmp_path):
    encode(slide, "A")
    with pytest.raises(MorphomeError, match="tiles of slide 'A', not 'B'"):
        run_encode(
            slide_path=slide,
            slide_id="B",
            tiles_h5=tmp_path / "tiles" / "A.h5",
            settings={"tiling": synthetic.tiling(), "features": synthetic.FEATURES},
            h5_out=tmp_path / "B.h5",
            timing_out=tmp_path / "B.json",
        )


def test_an_encoder_refuses_a_resolution_it_is_not_meant_for(encode, slide):
    with pytest.raises(MorphomeError, match="mpp_target: 4"):
        encode(slide, mpp_target=4.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, 70_000])
def test_values_beyond_float16_are_errors(value):
    features = np.zeros((3, 4), np.float32)
    features[1, 2] = value
    with pytest.raises(MorphomeError, match=r"slide 'S'.*\[2\]"):
        to_float16(features, "S")
