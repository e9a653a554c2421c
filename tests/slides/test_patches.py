"""Tiles do not depend on the reader; blocks keep the order; a tile that fails is tried once more and counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphome.slides.open import open_slide
from morphome.slides.openslide_reader import OpenSlideReader
from morphome.slides.patches import PatchShape, read_block, read_patch, resize_patch, row_blocks
from morphome.slides.reader import SlideError


@pytest.fixture(scope="module")
def slide(jpeg_tiff, tmp_path_factory):
    path = tmp_path_factory.mktemp("patches") / "slide.tif"
    return jpeg_tiff.write(path, jpeg_tiff.texture(640, 500), (48, 64))


@pytest.mark.parametrize(("side", "patch", "name"), [
    ((64, 64), 64, "none"), ((128, 128), 64, "reduce"), ((192, 192), 64, "reduce"), ((256, 256), 64, "reduce"),
    ((256, 128), 64, "reduce"), ((127, 127), 64, "box"), ((141, 133), 64, "box"), ((50, 50), 64, "bilinear"),
])  # fmt: skip
def test_a_tile_is_the_same_with_every_reader(slide, side, patch, name):
    shape = PatchShape(*side, patch)
    assert shape.name == name
    with open_slide(slide) as fast, OpenSlideReader(slide) as reference:
        assert fast.choice.name == "tiled_jpeg"
        for x, y in [(0, 0), (64, 48), (77, 131), (640 - side[0], 500 - side[1]), (600, 480)]:
            tile = read_patch(fast, x, y, shape)
            assert (tile.shape, tile.dtype) == ((patch, patch, 3), np.uint8)
            np.testing.assert_array_equal(tile, read_patch(reference, x, y, shape))
            np.testing.assert_array_equal(tile, resize_patch(reference.read_level0(x, y, *side), patch))


def test_half_decode_is_named_and_close(slide):
    shape = PatchShape(256, 256, 64, half=True)
    assert shape.name == "half+reduce"
    assert PatchShape(128, 128, 64, half=True).name == "half+none"
    with open_slide(slide) as reader:
        exact = read_patch(reader, 64, 48, PatchShape(256, 256, 64)).astype(float)
        half = read_patch(reader, 64, 48, shape)
    assert half.shape == (64, 64, 3)
    assert 10 * np.log10(255**2 / ((half - exact) ** 2).mean()) > 40


def test_half_decode_needs_a_reader_that_can(slide):
    with OpenSlideReader(slide) as reader, pytest.raises(SlideError) as caught:
        read_patch(reader, 0, 0, PatchShape(128, 128, 64, half=True))
    assert caught.value.code == "no_half_decode"
    assert "tiling.half_decode" in caught.value.problem


@given(st.lists(st.integers(0, 30), max_size=9), st.integers(1, 20))
def test_blocks_cover_the_list_once_and_in_order(lengths, most):
    coords = np.array([(x, y) for y, n in enumerate(lengths) for x in range(n)], int).reshape(-1, 2)
    blocks = row_blocks(coords, most)
    assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(len(coords)))
    rows = [set(coords[block][:, 1].tolist()) for block in blocks]
    for block, y in zip(blocks, rows, strict=True):
        assert 0 < block.stop - block.start <= most
        # Several rows share a block only where each of them is whole.
        for row in y:
            whole = int((coords[:, 1] == row).sum())
            assert len(y) == 1 or whole <= most


def test_small_rows_go_together_and_long_rows_are_cut():
    coords = [(x, y) for y in range(5) for x in range(3)]
    assert row_blocks(coords, 7) == [slice(0, 6), slice(6, 12), slice(12, 15)]
    assert row_blocks(coords, 2)[:3] == [slice(0, 1), slice(1, 3), slice(3, 4)]
    assert row_blocks([], 7) == []


class Failing:
    """A reader whose reads fail at some places, as long as ``left`` allows."""

    def __init__(self, reader, bad, left=10**6):
        self.reader, self.bad, self.left = reader, bad, left
        self.facts, self.choice = reader.facts, reader.choice

    def read_level0(self, x, y, width, height):
        if (x, y) in self.bad and self.left > 0:
            self.left -= 1
            raise SlideError("unreadable", "damaged")
        return self.reader.read_level0(x, y, width, height)

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_a_block_holds_the_tiles_in_order(slide):
    coords = np.array([(x, y) for y in (0, 64) for x in range(0, 512, 64)])
    shape = PatchShape(64, 64, 64)
    with open_slide(slide) as reader:
        block = read_block(reader, coords, shape, lambda: OpenSlideReader(slide))
        assert block.ok.all()
        assert (block.n_retried, block.tiles.shape) == (0, (16, 64, 64, 3))
        assert block.seconds > 0
        for tile, (x, y) in zip(block.tiles, coords.tolist(), strict=True):
            np.testing.assert_array_equal(tile, reader.read_level0(x, y, 64, 64))
        empty = read_block(reader, np.zeros((0, 2), int), shape, lambda: OpenSlideReader(slide))
        assert (empty.tiles.shape, empty.ok.shape) == ((0, 64, 64, 3), (0,))


def test_a_tile_that_fails_once_is_read_again_by_openslide(slide):
    shape, coords = PatchShape(64, 64, 64), [(0, 0), (64, 0), (128, 0)]
    with OpenSlideReader(slide) as reader:
        block = read_block(Failing(reader, {(64, 0)}), coords, shape, lambda: OpenSlideReader(slide))
        assert (block.ok.tolist(), block.n_retried) == ([True, True, True], 1)
        np.testing.assert_array_equal(block.tiles[1], reader.read_level0(64, 0, 64, 64))


def test_a_tile_that_fails_twice_is_left_out_and_never_white(slide):
    shape, coords = PatchShape(64, 64, 64), [(0, 0), (64, 0), (128, 0)]
    with OpenSlideReader(slide) as reader:
        bad = Failing(reader, {(64, 0)})
        block = read_block(bad, coords, shape, lambda: bad)
        assert (block.ok.tolist(), block.n_retried, len(block.tiles)) == ([True, False, True], 1, 2)
        np.testing.assert_array_equal(block.tiles[1], reader.read_level0(128, 0, 64, 64))

        def gone():
            raise SlideError("missing_file", "gone")

        assert read_block(bad, coords, shape, gone).ok.tolist() == [True, False, True]
