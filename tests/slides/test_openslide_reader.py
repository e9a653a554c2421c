"""Opening slides, overviews by blocks, and what is said about files that are none."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from morphome.slides import openslide_reader as module
from morphome.slides import overview
from morphome.slides.openslide_reader import OpenSlideReader
from morphome.slides.patches import PatchShape, read_patch, resize_name, resize_patch
from morphome.slides.reader import SlideError


@pytest.fixture(scope="module")
def slide(synthetic, painted, tmp_path_factory):
    return synthetic.write_tiff(tmp_path_factory.mktemp("slides") / "a slide [1] (2).tif", painted)


def test_facts_and_pixels_of_a_name_with_brackets_and_spaces(slide, painted):
    with OpenSlideReader(slide) as reader:
        assert (reader.facts.width_px, reader.facts.height_px) == (1000, 760)
        assert reader.facts.level_sizes == ((1000, 760), (250, 190))
        assert reader.facts.bounds == (0, 0, 1000, 760)
        region = reader.read_level0(13, 401, 77, 50)
    assert region.dtype == np.uint8
    np.testing.assert_array_equal(region, painted[401:451, 13:90])


@pytest.mark.parametrize("size", [(250, 190), (100, 76), (63, 48), (1, 1)])
def test_an_overview_is_the_area_mean(slide, painted, size):
    with OpenSlideReader(slide) as reader:
        overview = reader.overview(*size)
    assert overview.shape == (size[1], size[0], 3)
    exact = np.asarray(Image.fromarray(painted).resize(size, Image.Resampling.BOX)).astype(int)
    assert np.abs(overview - exact).mean() < 3
    assert np.abs(overview.mean() - painted.mean()) < 1


def test_an_overview_does_not_depend_on_the_blocks(slide, monkeypatch):
    with OpenSlideReader(slide) as reader:
        whole = reader.overview(83, 61)
        monkeypatch.setattr(overview.area_mean, "__defaults__", (60,))
        blocks = reader.overview(83, 61)
    assert np.abs(whole.astype(int) - blocks).max() <= 1


def test_a_file_without_a_pyramid_has_an_overview(synthetic, painted, tmp_path):
    path = synthetic.write_tiff(tmp_path / "flat.tif", painted, levels=())
    with OpenSlideReader(path) as reader:
        np.testing.assert_allclose(
            reader.overview(100, 76), painted.reshape(76, 10, 100, 10, 3).mean(axis=(1, 3)), atol=1.01
        )


def test_transparent_pixels_become_white(synthetic, tmp_path):
    image = np.full((128, 128, 4), 100, np.uint8)
    image[..., 3] = 255
    image[:64, :, 3] = 0
    with OpenSlideReader(synthetic.write_tiff(tmp_path / "rgba.tif", image, levels=())) as reader:
        region = reader.read_level0(0, 0, 128, 128)
    assert (region[:64] == 255).all()
    assert (region[64:] == 100).all()


@pytest.mark.parametrize(("content", "code", "words"), [
    (np.random.default_rng(0).bytes(1001), "unreadable", "1001 bytes"),
    (b"<html><head><title>404 Not Found</title></head></html>", "unreadable", "<html><head><title>404"),
    (b"", "unreadable", "0 bytes"),
    (b"\0" * 128 + b"DICM" + b"\0" * 50, "unsupported_format", "DICOM"),
])  # fmt: skip
def test_files_that_are_no_slides(tmp_path, content, code, words):
    path = tmp_path / "page.svs"
    path.write_bytes(content)
    with pytest.raises(SlideError) as caught:
        OpenSlideReader(path)
    assert caught.value.code == code
    assert words in caught.value.problem
    assert str(path) in caught.value.problem


def test_a_missing_file_and_an_empty_folder(tmp_path):
    for path in (tmp_path / "none.svs", tmp_path):
        with pytest.raises(SlideError) as caught:
            OpenSlideReader(path)
        assert caught.value.code == "missing_file"


def test_a_striped_tiff_is_refused_as_a_format(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "striped.tif")
    with pytest.raises(SlideError) as caught:
        OpenSlideReader(tmp_path / "striped.tif")
    assert caught.value.code == "unsupported_format"


def test_a_folder_gives_its_first_slide_that_opens(synthetic, painted, tmp_path):
    (tmp_path / "0.txt").write_text("not a slide")
    synthetic.write_tiff(tmp_path / "1.tif", painted, levels=())
    with OpenSlideReader(tmp_path) as reader:
        assert reader.facts.path.name == "1.tif"


def test_a_tile_that_cannot_be_read_names_its_place(synthetic, painted, tmp_path):
    path = synthetic.write_tiff(tmp_path / "broken.tif", painted)
    synthetic.damage_tiles(path, [0])
    with OpenSlideReader(path) as reader:
        with pytest.raises(SlideError) as caught:
            read_patch(reader, 0, 0, PatchShape(64, 64, 64))
        assert caught.value.code == "unreadable"
        assert "(0, 0) of level 0" in caught.value.problem


@pytest.mark.parametrize(("sides", "patch", "name"), [
    ((256, 256), 256, "none"), ((512, 512), 256, "reduce"), ((768, 512), 256, "reduce"), ((519, 519), 256, "box"),
    ((257, 256), 256, "box"), ((223, 223), 224, "bilinear"), ((256, 250), 256, "bilinear"),
])  # fmt: skip
def test_one_resize_by_the_named_filter(sides, patch, name):
    assert resize_name(*sides, patch) == name
    region = np.random.default_rng(1).integers(0, 256, (sides[1], sides[0], 3), dtype=np.uint8)
    out = resize_patch(region, patch)
    assert out.shape == (patch, patch, 3)
    assert abs(out.mean() - region.mean()) < 1


def test_reduction_by_whole_numbers_is_the_exact_area_mean():
    region = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    exact = region.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(resize_patch(region, 32) - exact).max() <= 0.5


def test_broken_bounds_mean_the_whole_slide():
    names = ("x", "y", "width", "height")
    for values, expected in [
        ((10, 20, 30, 40), (10, 20, 30, 40)),
        ((10, 20, 900, 900), (10, 20, 90, 60)),
        ((500, 0, 10, 10), (0, 0, 100, 80)),
        (("a", 0, 10, 10), (0, 0, 100, 80)),
    ]:
        properties = {f"openslide.bounds-{n}": str(v) for n, v in zip(names, values, strict=True)}
        assert module._bounds(properties, 100, 80) == expected
