"""Huge slides and slides without a pyramid: bounded time and memory, measured in a process of their own.

The bounds are several times what a quiet core of a small machine needs.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from morphome.slides.open import open_slide


def peak_kb():
    """Most resident memory of this process since it was started or forked."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


@pytest.fixture
def measured(python, tmp_path):
    """Tile slides in a fresh process: (per slide what came of it, peak memory in MB)."""

    def run(*slides, limit_mb: int = 0):
        done = python("measured_tile.py", str(tmp_path / "measured"), str(limit_mb), *map(str, slides))
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout)
        return found["slides"], found["peak_mb"]

    return run


def test_two_gigapixels_of_glass(measured, files, tmp_path):
    """45,000 x 45,000 px, 35,344 tiles of level 0 that share one stream."""
    path = files.blank(tmp_path / "glass.svs", 45_000)
    assert path.stat().st_size < 1e6
    (found,), peak_mb = measured(path)
    assert (found["status"], found["reason_code"], found["n_tiles"]) == ("failed", "no_tissue", 0)
    assert "0 tiles" in found["reason"]
    assert found["seconds"] < 20
    assert peak_mb < 1000


def test_a_large_slide_without_a_pyramid(measured, files, tmp_path):
    """36 megapixels in one level: the overview is made block by block."""
    path = files.blank(tmp_path / "flat.svs", 6000, levels=())
    (found,), peak_mb = measured(path)
    assert found["reason_code"] == "no_tissue"
    assert found["seconds"] < 20
    assert peak_mb < 800


def test_tissue_without_a_pyramid(tile, encode, files, tmp_path):
    """The same tiles and features as with a pyramid."""
    image = np.tile(files.board(), (2, 2, 1))
    flat, deep = files.svs(tmp_path / "flat.svs", image, levels=()), files.svs(tmp_path / "deep.svs", image)
    one, two = tile(flat, "flat"), tile(deep, "deep")
    np.testing.assert_allclose(one.data["coords"], two.data["coords"])
    assert len(one.data["coords"]) > 90
    np.testing.assert_array_equal(encode(flat, "flat").data["features"], encode(deep, "deep").data["features"])


def test_a_slide_that_is_one_tile(tile, files, tmp_path):
    """A level of a single native tile: cutting it up must not decode it anew for each of its 144 parts."""
    image = np.tile(files.board(), (2, 2, 1))[:768, :768]
    path = files.svs(tmp_path / "one.svs", image, tile=768, levels=())
    started = time.perf_counter()
    outcome = tile(path, min_sharpness=1e-9)
    assert outcome.result == ("ok", "")
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("reader", ["auto", "openslide"])
def test_reading_many_places_does_not_add_up_in_memory(files, tmp_path, in_child, reader):
    """A reader that keeps all it has decoded would hold 400 MB here."""
    path = files.blank(tmp_path / "glass.svs", 12_000, levels=(16,))

    def work() -> str:
        before = peak_kb()
        with open_slide(path, reader) as slide:
            for y in range(0, 12_000, 480):
                for x in range(0, 12_000, 480):
                    slide.read_level0(x, y, 240, 240)
        return str((peak_kb() - before) // 1024)

    code, grown_mb = in_child(work)
    assert code == 0
    assert int(grown_mb) < 300
