"""The slide writer: OpenSlide and tifffile must see an Aperio file with the pixels that went in."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image
from scipy import ndimage

from morphome.cohort.svs_writer import TILE_PX, SlideImage, write_svs

ROWS, COLUMNS = 7, 9
WIDTH, HEIGHT = COLUMNS * TILE_PX - 48, ROWS * TILE_PX - 160


def _tile(number: int) -> np.ndarray:
    """A smooth pattern in brightness with a slope in colour, different for every number."""
    smooth = ndimage.gaussian_filter(np.random.default_rng(number).normal(size=(TILE_PX, TILE_PX)), 20)
    slope = np.linspace(-20, 20, TILE_PX)[:, None]
    grey = 150 + 30 * smooth / smooth.std() + 8 * number
    return np.clip(np.stack([grey + slope, grey, grey - slope], axis=-1), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def slide() -> SlideImage:
    index = np.random.default_rng(0).integers(0, 4, (ROWS, COLUMNS))
    label = np.full((120, 100, 3), 250, np.uint8)
    return SlideImage([_tile(k) for k in range(4)], index, WIDTH, HEIGHT, 0.2497, label)


@pytest.fixture(scope="module")
def path(slide, tmp_path_factory):
    path = tmp_path_factory.mktemp("svs") / "one.svs"
    write_svs(path, slide, properties={"Filename": "one"}, quality=90)
    return path


def test_openslide_sees_an_aperio_slide(path):
    with openslide.OpenSlide(path) as opened:
        assert opened.properties["openslide.vendor"] == "aperio"
        assert opened.level_dimensions == (
            (WIDTH, HEIGHT),
            (WIDTH // 4, HEIGHT // 4),
            (WIDTH // 16, HEIGHT // 16),
        )
        assert opened.level_downsamples == (1.0, 4.0, 16.0)
        assert float(opened.properties["openslide.mpp-x"]) == 0.2497
        assert float(opened.properties["openslide.mpp-y"]) == 0.2497
        assert opened.properties["openslide.objective-power"] == "40"
        assert opened.properties["aperio.Filename"] == "one"
        assert opened.properties["openslide.level[0].tile-width"] == str(TILE_PX)
        assert set(opened.associated_images) == {"thumbnail", "label", "macro"}
        assert opened.associated_images["label"].size == (100, 120)
        assert opened.associated_images["thumbnail"].size == (WIDTH // 16, HEIGHT // 16)


def test_level_0_shows_the_tiles(path, slide):
    truth = np.concatenate([np.concatenate([slide.tiles[k] for k in row], axis=1) for row in slide.index], axis=0)[
        :HEIGHT, :WIDTH
    ]
    with openslide.OpenSlide(path) as opened:
        seen = np.asarray(opened.read_region((0, 0), 0, (WIDTH, HEIGHT)).convert("RGB"))
    assert np.abs(seen.astype(int) - truth).mean() < 2.5  # JPEG
    assert np.abs(seen.astype(int).mean((0, 1)) - truth.mean((0, 1))).max() < 0.5


@pytest.mark.parametrize(("level", "factor"), [(1, 4), (2, 16)])
def test_levels_are_area_means(path, level, factor):
    with openslide.OpenSlide(path) as opened:
        whole = opened.read_region((0, 0), 0, (WIDTH, HEIGHT)).convert("RGB")
        seen = np.asarray(opened.read_region((0, 0), level, opened.level_dimensions[level]).convert("RGB"))
    means = np.asarray(whole.reduce(factor))[: seen.shape[0], : seen.shape[1]]
    difference = np.abs(seen.astype(int) - means)
    assert difference.mean() < 3  # JPEG, and its ringing on the borders between the test's tiles
    shifted = np.abs(np.roll(seen, 1, axis=0).astype(int) - means)
    assert difference.mean() < 0.5 * shifted.mean()


def test_equal_tiles_are_stored_once(path):
    with tifffile.TiffFile(path) as file:
        assert file.is_bigtiff and file.is_svs
        first = file.pages[0]
        assert len(first.dataoffsets) == ROWS * COLUMNS
        assert len(set(first.dataoffsets)) == 4
        assert first.is_tiled and not file.pages[1].is_tiled
        assert first.jpegtables is not None
        tables = bytes(first.jpegtables)
        file.filehandle.seek(first.dataoffsets[COLUMNS + 2])
        stream = file.filehandle.read(first.databytecounts[COLUMNS + 2])
    # With the tables put back, the stream is a complete JPEG for any decoder.
    tile = np.asarray(Image.open(io.BytesIO(tables[:-2] + stream[2:])).convert("RGB"))
    with openslide.OpenSlide(path) as opened:
        seen = opened.read_region((2 * TILE_PX, TILE_PX), 0, (TILE_PX, TILE_PX)).convert("RGB")
    assert np.abs(np.asarray(seen).astype(int) - tile).max() <= 3


def test_damaged_tiles_fail_and_the_rest_reads(slide, tmp_path):
    damaged = dataclasses.replace(slide, damaged=frozenset({0}))
    path = tmp_path / "damaged.svs"
    write_svs(path, damaged, properties={})
    row, column = np.argwhere(slide.index == 0)[0]
    with openslide.OpenSlide(path) as opened:
        assert opened.get_thumbnail((50, 50)).getextrema()[0][0] > 0
        opened.read_region((0, 0), 1, opened.level_dimensions[1])
        with pytest.raises(openslide.OpenSlideError):
            opened.read_region((int(column) * TILE_PX, int(row) * TILE_PX), 0, (TILE_PX, TILE_PX))


def test_same_bytes_twice(slide, path, tmp_path):
    again = tmp_path / "again.svs"
    write_svs(again, slide, properties={"Filename": "one"}, quality=90)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "change",
    [{"width_px": WIDTH + 1}, {"height_px": (ROWS + 1) * TILE_PX}, {"tiles": [np.zeros((9, 9, 3), np.uint8)]}],
)
def test_wrong_sizes(slide, change, tmp_path):
    with pytest.raises(ValueError, match=r"px|shape"):
        write_svs(tmp_path / "no.svs", dataclasses.replace(slide, **change), properties={})
    assert not list(tmp_path.iterdir())


def test_pillow_reduce_is_the_area_mean():
    """The levels rest on it."""
    image = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    means = image.reshape(2, 4, 2, 4, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(Image.fromarray(image).reduce(4)) - means).max() <= 0.51
