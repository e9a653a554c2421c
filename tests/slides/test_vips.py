"""Ordinary TIFF and OME-TIFF images that OpenSlide refuses, and what is no brightfield image."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
from PIL import Image

from morphome.slides.mpp import mpp_sources
from morphome.slides.open import open_slide
from morphome.slides.reader import SlideError


@pytest.fixture(scope="module")
def image(jpeg_tiff):
    return jpeg_tiff.texture(640, 480)


def ome(path, image, mpp=0.25, **options):
    """An OME-TIFF with two coarser levels in sub-directories."""
    metadata = {"axes": "YXS", "PhysicalSizeX": mpp, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": mpp,
                "PhysicalSizeYUnit": "µm"}  # fmt: skip
    shared = {"photometric": "rgb", "tile": (128, 128), **options}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(image, subifds=2, metadata=metadata, **shared)
        for factor in (4, 8):
            level = np.asarray(Image.fromarray(image[..., :3]).reduce(factor))
            tiff.write(level, subfiletype=1, metadata=None, **shared)
    return path


def test_an_ome_tiff_with_its_pyramid_and_resolution(image, tmp_path):
    with open_slide(ome(tmp_path / "a slide.ome.tiff", image, compression="zlib")) as reader:
        facts = reader.facts
        assert reader.choice.name == "vips"
        assert reader.choice.reason == "compression deflate (8), not JPEG; its pyramid stands in sub-directories"
        assert facts.vendor == "ome-tiff"
        assert facts.level_sizes == ((640, 480), (160, 120), (80, 60))
        assert facts.level_downsamples == (1.0, 4.0, 8.0)
        assert mpp_sources(facts.properties)["ome"] == (0.25, 0.25)
        np.testing.assert_array_equal(reader.read_level0(100, 50, 300, 200), image[50:250, 100:400])
        exact = np.asarray(Image.fromarray(image).reduce(8))
        assert np.abs(reader.overview(80, 60).astype(int) - exact).max() <= 1
        # A level is read, not level 0.
        reader._regions[0] = None
        reader.overview(40, 30)


def test_what_lies_outside_is_white(image, tmp_path):
    with open_slide(ome(tmp_path / "slide.ome.tiff", image)) as reader:
        region = reader.read_level0(600, -10, 60, 30)
        assert (region[:10] == 255).all()
        assert (region[:, 40:] == 255).all()
        np.testing.assert_array_equal(region[10:, :40], image[:20, 600:])
        assert (reader.read_level0(700, 0, 10, 10) == 255).all()


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_stripped_files(image, tmp_path, compression):
    path = tmp_path / "plain.tif"
    Image.fromarray(image).save(path, compression=compression, resolution_unit=3, resolution=20000.0)
    with open_slide(path) as reader:
        assert (reader.choice.name, reader.facts.vendor) == ("vips", "tiff")
        assert mpp_sources(reader.facts.properties) == {"tiff_resolution": (0.5, 0.5)}
        np.testing.assert_array_equal(reader.read_level0(0, 0, 640, 480), image)
        np.testing.assert_array_equal(reader.read_level0(321, 123, 64, 32), image[123:155, 321:385])


def test_separate_planes(image, tmp_path):
    path = tmp_path / "planes.tif"
    planes = np.ascontiguousarray(np.moveaxis(image, -1, 0))
    tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate", metadata=None)
    with open_slide(path) as reader:
        np.testing.assert_array_equal(reader.read_level0(10, 20, 200, 100), image[20:120, 10:210])


def test_transparent_pixels_become_white(image, tmp_path):
    with_alpha = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
    with_alpha[:240, :, 3] = 0
    path = tmp_path / "alpha.tif"
    Image.fromarray(with_alpha).save(path)
    with open_slide(path) as reader:
        region = reader.read_level0(0, 0, 640, 480)
    assert (region[:240] == 255).all()
    np.testing.assert_array_equal(region[240:], image[240:])


@pytest.mark.parametrize(("pixels", "options", "words"), [
    (np.zeros((3, 64, 64), np.uint8), {"photometric": "minisblack"}, "1 channel(s) of 8 bits"),
    (np.zeros((64, 64, 3), np.uint16), {"photometric": "rgb"}, "3 channel(s) of 16 bits"),
    (np.zeros((64, 64), np.uint8), {"photometric": "minisblack"}, "fluorescence"),
    (np.zeros((5, 64, 64), np.uint8), {"photometric": "minisblack", "planarconfig": "separate"}, "5 channel(s)"),
    (np.zeros((64, 64, 3), np.float32), {"photometric": "rgb"}, "32 bits"),
])  # fmt: skip
def test_what_is_no_brightfield_image_is_refused(tmp_path, pixels, options, words):
    path = tmp_path / "channels.ome.tif"
    tifffile.imwrite(path, pixels, metadata=None, **options)
    with pytest.raises(SlideError) as caught:
        open_slide(path)
    assert caught.value.code == "unsupported_format"
    assert words in caught.value.problem
    assert str(path) in caught.value.problem
    assert "8-bit RGB" in str(caught.value)


def test_openslide_asked_for_does_not_fall_back(image, tmp_path):
    Image.fromarray(image).save(tmp_path / "plain.tif")
    with pytest.raises(SlideError) as caught:
        open_slide(tmp_path / "plain.tif", "openslide")
    assert caught.value.code == "unsupported_format"
    with open_slide(ome(tmp_path / "slide.ome.tiff", image), "openslide") as reader:
        assert (reader.choice.name, len(reader.facts.level_sizes)) == ("openslide", 1)


def test_damaged_pixels_raise(image, tmp_path):
    path = ome(tmp_path / "slide.ome.tiff", image, compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        at, count = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    content = bytearray(path.read_bytes())
    content[at + count - 200 : at + count] = b"\xff" * 200
    path.write_bytes(content)
    with open_slide(path) as reader:
        with pytest.raises(SlideError) as caught:
            reader.read_level0(0, 0, 64, 64)
        assert caught.value.code == "unreadable"
        np.testing.assert_array_equal(reader.read_level0(256, 256, 64, 64), image[256:320, 256:320])


def test_the_file_is_read_anew_when_it_has_changed(image, tmp_path):
    path = tmp_path / "plain.tif"
    for turn in (image, image[::-1]):
        Image.fromarray(np.ascontiguousarray(turn)).save(path)
        with open_slide(path) as reader:
            np.testing.assert_array_equal(reader.read_level0(0, 0, 640, 480), turn)


def test_threads_have_readers_of_their_own(image, tmp_path):
    with open_slide(ome(tmp_path / "slide.ome.tiff", image, compression="zlib")) as reader:

        def work(start):
            with reader.another() as mine:
                return [
                    (mine.read_level0(x, y, 96, 96) == image[y : y + 96, x : x + 96]).all()
                    for x in range(start, 500, 53) for y in range(0, 380, 61)
                ]  # fmt: skip

        with ThreadPoolExecutor(3) as pool:
            assert all(all(part) for part in pool.map(work, range(3)))
        assert reader.read_level0(0, 0, 8, 8).shape == (8, 8, 3)


def test_a_closed_reader_still_gives_another(image, tmp_path):
    reader = open_slide(ome(tmp_path / "slide.ome.tiff", image))
    reader.close()
    with reader.another() as mine:
        assert (mine.choice, mine.facts) == (reader.choice, reader.facts)
        np.testing.assert_array_equal(mine.read_level0(8, 8, 100, 100), image[8:108, 8:108])


def test_libvips_is_loaded_only_when_it_is_needed(loaded_by):
    assert "pyvips" not in loaded_by("morphome.slides.open")


def test_a_real_ome_tiff_opens_and_does_not_say_its_resolution(shared_data):
    with open_slide(shared_data / "wsi" / "tiff" / "XYC_jpeg.ome.tiff") as reader:
        assert (reader.choice.name, reader.facts.width_px, reader.facts.height_px) == ("vips", 512, 512)
        assert mpp_sources(reader.facts.properties) == {}
        assert reader.read_level0(0, 0, 512, 512).std() > 5
