"""The reading benchmark: the same tiles both ways, equal pixels, honest numbers."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from morphome.bench.read import bench_read, dense_area
from morphome.bench.rounds import interleaved
from morphome.cohort.svs_writer import TILE_PX, SlideImage, write_svs
from morphome.errors import MorphomeError
from morphome.slides.open import open_slide


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """A 40x slide of 1,920 px with texture in its lower right half."""
    rng = np.random.default_rng(0)
    tissue = np.clip(rng.normal((200, 130, 180), 20, (6, TILE_PX, TILE_PX, 3)), 0, 255).astype(np.uint8)
    tiles = [np.full((TILE_PX, TILE_PX, 3), 243, np.uint8), *tissue]
    index = np.zeros((8, 8), np.int64)
    index[2:, 2:] = rng.integers(1, 7, (6, 6))
    path = tmp_path_factory.mktemp("bench") / "slide.svs"
    label = np.full((64, 64, 3), 250, np.uint8)
    write_svs(path, SlideImage(tiles, index, 1920, 1920, 0.25, label), properties={})
    return path


def test_the_same_tiles_both_ways(slide):
    result = bench_read(slide, rounds=2, tiles=4)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["reader"], result["rounds"], result["threads"]) == ("tiled_jpeg", 2, 1)
    full, mean, box, half = result["rows"]
    assert [row["resize"] for row in result["rows"]] == ["none", "reduce", "box", "half+none"]
    for row in result["rows"]:
        assert row["n_tiles"] == 4
        assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
        assert row["ratio_of_rounds"][0] <= row["ratio_of_rounds"][1]
        assert min(row["our_openslide"], row["ours_wall"], row["peer_wall"]) > 0
    assert full["max_difference"] == mean["max_difference"] == box["max_difference"] == 0
    assert full["psnr_db"] is None
    assert half["max_difference"] > 0
    # Noise of single pixels is what half decode shows least well.
    assert half["psnr_db"] > 30


def test_more_threads_read_the_same_tiles(slide):
    result = bench_read(slide, rounds=1, tiles=4, threads=2)
    assert [row["max_difference"] for row in result["rows"]][:3] == [0, 0, 0]
    assert result["threads"] == 2


def test_the_densest_area_is_measured(slide):
    with open_slide(slide) as reader:
        coords = dense_area(reader, 256, 16)
        with pytest.raises(MorphomeError, match="smaller than a tile"):
            dense_area(reader, 4096, 16)
    assert len(coords) == 16
    assert coords.min() >= 256
    assert (np.diff(coords[:, 1]) >= 0).all()


def test_a_reader_without_half_decode_says_so(synthetic, tmp_path):
    image = synthetic.paint(1100, 1100)
    path = synthetic.write_tiff(tmp_path / "raw.tif", image, tile=256)
    row = bench_read(path, rounds=1, tiles=4)["rows"][3]
    assert row["ours"] is row["ratio"] is None
    assert "no half decode" in row["reason"]


def test_rounds_are_interleaved_and_the_first_does_not_count():
    calls = []

    def burn():
        end = time.process_time() + 0.01
        while time.process_time() < end:
            pass

    def ours():
        calls.append("ours")

    def peer():
        calls.append("peer")
        burn()

    result = interleaved(3, {"ours": ours, "peer": peer})
    assert calls == ["ours", "peer", "peer", "ours"] * 2
    assert {name: len(seconds) for name, seconds in result.seconds.items()} == {"ours": 3, "peer": 3}
    assert result.median("peer") >= 0.01
    assert result.ratio() > 3
    with pytest.raises(ValueError, match="at least 1"):
        interleaved(0, {"ours": ours})
