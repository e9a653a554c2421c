"""The direct decoder: bit for bit OpenSlide's pixels, bounded memory, and never grey garbage."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from morphome.slides import tiled_jpeg
from morphome.slides.open import open_slide
from morphome.slides.openslide_reader import OpenSlideReader
from morphome.slides.reader import ReaderChoice, SlideError
from morphome.slides.tiff_directory import NotDirectError, read_directory
from morphome.slides.tiled_jpeg import TiledJpegReader

TILE_SIDES = (16, 48, 64, 112)


def direct(path) -> TiledJpegReader:
    with OpenSlideReader(path) as reference:
        return TiledJpegReader(read_directory(reference.facts), reference.facts, ReaderChoice("tiled_jpeg"))


@pytest.fixture(scope="module")
def slide(jpeg_tiff, tmp_path_factory):
    path = tmp_path_factory.mktemp("jpeg") / "slide.tif"
    return jpeg_tiff.write(path, jpeg_tiff.texture(403, 290), levels=(2, 4))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_same_pixels_as_openslide(jpeg_tiff, tmp_path, data):
    """Sizes, tile shapes, subsampling, colour space, tables and places, also partly or wholly outside."""
    width, height = data.draw(st.integers(17, 230)), data.draw(st.integers(17, 170))
    ycbcr = data.draw(st.booleans())
    path = jpeg_tiff.write(
        tmp_path / "slide.tif",
        jpeg_tiff.texture(width, height, data.draw(st.integers(0, 9))),
        (data.draw(st.sampled_from(TILE_SIDES)), data.draw(st.sampled_from(TILE_SIDES))),
        ycbcr=ycbcr,
        subsampling=data.draw(st.sampled_from(["444", "422", "420"])) if ycbcr else "444",
        tables=data.draw(st.booleans()),
        quality=data.draw(st.sampled_from([30, 75, 95])),
        bigtiff=data.draw(st.booleans()),
    )
    with OpenSlideReader(path) as reference, direct(path) as reader:
        for _ in range(4):
            place = data.draw(st.integers(-40, width + 10)), data.draw(st.integers(-40, height + 10))
            size = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 150))
            expected = reference.read_level0(*place, *size)
            np.testing.assert_array_equal(reader.read_level0(*place, *size), expected)
            picture = np.asarray(reader.read_rgbx(*place, *size))
            np.testing.assert_array_equal(picture[..., :3], expected)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("tile", [(64, 64), (48, 112)])
def test_means_of_native_tiles_are_the_means_of_the_region(jpeg_tiff, tmp_path, factor, tile):
    path = jpeg_tiff.write(tmp_path / "slide.tif", jpeg_tiff.texture(403, 290), tile)
    with OpenSlideReader(path) as reference, direct(path) as reader:
        for x, y, side in [(0, 0, 64), (factor * 7, factor * 11, 64), (factor * 25, 0, 160), (400 - 64, 288 - 64, 64)]:
            expected = Image.fromarray(reference.read_level0(x, y, side, side)).reduce(factor)
            np.testing.assert_array_equal(reader.read_mean(x, y, side, side, factor), np.asarray(expected))
        assert reader.read_mean(1, 0, 64, 64, factor) is None
        assert reader.read_mean(0, 0, 65, 64, factor) is None
        assert reader.read_mean(396, 0, 64, 64, factor) is None
        assert reader.read_mean(-4, 0, 64, 64, factor) is None
        assert reader.read_mean(0, 0, 48, 48, 3) is None


@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_half_decode_is_close_to_the_mean_of_2_x_2(jpeg_tiff, tmp_path, subsampling):
    """Smooth colours, as in tissue; at sharp coloured edges half-size chroma of 4:2:0 is coarser by design."""
    y, x = np.mgrid[:240, :320]
    image = np.stack([150 + 70 * np.sin(x / 17 + k) * np.cos(y / (13 + k)) for k in range(3)], axis=-1)
    path = jpeg_tiff.write(tmp_path / "slide.tif", image.astype(np.uint8), subsampling=subsampling)
    with direct(path) as reader:
        full = reader.read_level0(34, 18, 200, 150).astype(float)
        half = reader.read_half(34, 18, 200, 150)
        assert half.shape == (75, 100, 3)
        error = half - full.reshape(75, 2, 100, 2, 3).mean(axis=(1, 3))
        assert 10 * np.log10(255**2 / (error**2).mean()) > 40
        for place in [(1, 0, 64, 64), (0, 1, 64, 64), (0, 0, 65, 64), (0, 0, 64, 65)]:
            with pytest.raises(SlideError) as caught:
                reader.read_half(*place)
            assert caught.value.code == "no_half_decode"


def test_each_native_tile_is_decoded_once_and_memory_is_bounded(slide, monkeypatch):
    decoded = []
    original = TiledJpegReader._decode

    def counting(self, number, tile):
        decoded.append(number)
        return original(self, number, tile)

    monkeypatch.setattr(TiledJpegReader, "_decode", counting)
    with direct(slide) as reader:
        for y in range(0, 290 - 80, 80):
            for x in range(0, 403 - 80, 80):
                reader.read_level0(x, y, 80, 80)
                # One row of 7 native tiles and the 2 x 2 of one read, in buffers that are used again.
                assert reader._cache.n_bytes <= (9 + 4 + 1) * 64 * 64 * 3
        assert sorted(decoded) == sorted(set(decoded))


def test_a_small_cache_still_gives_the_right_pixels(slide, monkeypatch):
    monkeypatch.setattr(tiled_jpeg, "CACHE_BYTES", 3 * 64 * 64 * 3)
    with OpenSlideReader(slide) as reference, direct(slide) as reader:
        np.testing.assert_array_equal(reader.read_level0(3, 5, 390, 280), reference.read_level0(3, 5, 390, 280))
        assert reader._cache.n_bytes <= 3 * 64 * 64 * 3


def test_kinds_of_reads_may_be_mixed(slide):
    with OpenSlideReader(slide) as reference, direct(slide) as reader:
        expected = reference.read_level0(20, 30, 64, 64)
        for _ in range(2):
            np.testing.assert_array_equal(reader.read_level0(20, 30, 64, 64), expected)
            assert reader.read_half(20, 30, 64, 64).shape == (32, 32, 3)
            np.testing.assert_array_equal(
                reader.read_mean(20, 30, 64, 64, 2), np.asarray(Image.fromarray(expected).reduce(2))
            )


@pytest.mark.parametrize("damage", ["count", "zeros", "end"])
def test_a_damaged_tile_raises_and_its_neighbours_do_not(jpeg_tiff, tmp_path, damage):
    path = jpeg_tiff.write(tmp_path / "slide.tif", jpeg_tiff.texture(403, 290))
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tags = tiff.pages[0].tags
        counts, offsets = list(tags["TileByteCounts"].value), tags["TileOffsets"].value
        at, count = offsets[9], counts[9]
        if damage == "count":
            counts[9] //= 2
            tags["TileByteCounts"].overwrite(counts)
    if damage != "count":
        content = bytearray(path.read_bytes())
        begin, end = (at, at + count) if damage == "zeros" else (at + count * 2 // 3, at + count - 2)
        content[begin:end] = bytes(end - begin)
        path.write_bytes(content)
    with direct(path) as reader, OpenSlideReader(path) as reference:
        for read in (reader.read_level0, reference.read_level0, reader.read_half, reader.read_rgbx):
            with pytest.raises(SlideError) as caught:
                read(128, 64, 64, 64)
            assert caught.value.code == "unreadable"
            assert str(path) in caught.value.problem
        np.testing.assert_array_equal(reader.read_level0(192, 64, 64, 64), reference.read_level0(192, 64, 64, 64))


def test_a_file_that_became_shorter(jpeg_tiff, tmp_path):
    path = jpeg_tiff.write(tmp_path / "slide.tif", jpeg_tiff.texture(403, 290))
    with direct(path) as reader:
        path.write_bytes(path.read_bytes()[:4000])
        with pytest.raises(SlideError, match="the file ends early"):
            reader.read_level0(300, 200, 64, 64)


def test_a_stream_of_another_size_is_refused(jpeg_tiff, tmp_path):
    """A tile that decodes to fewer or more pixels than its place is damage, not something to stretch."""
    path = jpeg_tiff.write(tmp_path / "slide.tif", jpeg_tiff.texture(403, 290))
    for side in (48, 80):
        with direct(path) as reader:
            stream = jpeg_tiff.split(jpeg_tiff.encode(jpeg_tiff.texture(side, side)))[1]
            other = path.with_name(f"{side}.bin")
            other.write_bytes(b"\0" * 8 + stream)
            table = reader.directory
            forged = replace(table, path=other, offsets=(8,) * len(table.offsets), counts=(len(stream),) * 35)
            with TiledJpegReader(forged, reader.facts, reader.choice) as small, pytest.raises(SlideError) as caught:
                small.read_level0(0, 0, 64, 64)
            assert caught.value.code == "unreadable"


SEGMENTS = {
    "jfif": b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00",
    "adobe rgb": b"\xff\xee\x00\x0eAdobe\x00d\x00\x00\x00\x00\x00",
    "adobe ycbcr": b"\xff\xee\x00\x0eAdobe\x00d\x00\x00\x00\x00\x01",
    "behind a comment": b"\xff\xfe\x00\x04hi\xff\xff\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00",
}


@pytest.mark.parametrize("ycbcr", [True, False])
@pytest.mark.parametrize("name", SEGMENTS)
def test_application_segments_do_not_overrule_the_directory(jpeg_tiff, tmp_path, monkeypatch, name, ycbcr):
    """Tiles that say another colour space than the tag: the tag decides, as in OpenSlide."""
    original = jpeg_tiff.split

    def with_segment(stream):
        tables, image = original(stream)
        return tables, image[:2] + SEGMENTS[name] + image[2:]

    monkeypatch.setattr(jpeg_tiff, "split", with_segment)
    path = jpeg_tiff.write(tmp_path / "a.tif", jpeg_tiff.texture(200, 150), ycbcr=ycbcr, subsampling="444")
    with OpenSlideReader(path) as reference, direct(path) as reader:
        np.testing.assert_array_equal(reader.read_level0(0, 0, 200, 150), reference.read_level0(0, 0, 200, 150))


@pytest.mark.parametrize("levels", [(), (2, 4)])
@pytest.mark.parametrize("size", [(403, 290), (201, 145), (100, 72), (50, 36), (13, 9), (1, 1)])
def test_overviews_with_and_without_a_pyramid(jpeg_tiff, tmp_path, levels, size):
    image = np.kron(jpeg_tiff.texture(51, 37), np.ones((8, 8, 1), np.uint8))[:290, :403]
    path = jpeg_tiff.write(tmp_path / "slide.tif", image, quality=95, levels=levels)
    with direct(path) as reader:
        overview = reader.overview(*size)
    assert overview.shape == (size[1], size[0], 3)
    exact = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)).astype(int)
    assert np.abs(overview - exact).mean() < (4 if not levels else 12)  # levels of the test are every n-th pixel
    assert np.abs(overview.mean() - image.mean()) < 2


def test_a_file_without_a_pyramid_is_decoded_small(jpeg_tiff, tmp_path, monkeypatch):
    path = jpeg_tiff.write(tmp_path / "slide.tif", jpeg_tiff.texture(403, 290))
    monkeypatch.setattr(OpenSlideReader, "overview", None)
    with direct(path) as reader:
        reader.overview(16, 11)
        assert 0 < reader._cache.n_bytes <= 3 * 35 * 8 * 8


def test_threads_have_readers_of_their_own(slide):
    with OpenSlideReader(slide) as reference, direct(slide) as reader:
        places = [(x, y, 90, 70) for y in range(0, 290, 40) for x in range(0, 403, 60)]
        expected = [reference.read_level0(*place) for place in places]

        def work(start):
            with reader.another() as mine:
                assert mine.directory is reader.directory
                return [mine.read_level0(*place) for place in places[start::3]]

        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(work, range(3)))
        for start, part in enumerate(found):
            for a, b in zip(part, expected[start::3], strict=True):
                np.testing.assert_array_equal(a, b)


def test_closing_twice_is_allowed_and_reading_afterwards_is_an_error(slide):
    reader = direct(slide)
    reader.close()
    reader.close()
    with pytest.raises(SlideError):
        reader.read_level0(0, 0, 10, 10)


def test_a_directory_that_is_not_direct_says_why(synthetic, painted, tmp_path):
    path = synthetic.write_tiff(tmp_path / "raw.tif", painted)
    with OpenSlideReader(path) as reference, pytest.raises(NotDirectError, match="compression none"):
        read_directory(reference.facts)


@pytest.mark.parametrize("name", ["svs/CMU-1-Small-Region.svs", "tiff/CMU-1-Small-Region.jpeg.tiff"])
def test_real_slides_are_equal_to_the_last_bit(shared_data, name):
    path = shared_data / "wsi" / name
    with open_slide(path) as reader, OpenSlideReader(path) as reference:
        assert (reader.choice.name, reader.choice.max_difference) == ("tiled_jpeg", 0)
        whole = (0, 0, reader.facts.width_px, reader.facts.height_px)
        np.testing.assert_array_equal(reader.read_level0(*whole), reference.read_level0(*whole))
        mean = np.asarray(Image.fromarray(reference.read_level0(200, 300, 512, 512)).reduce(2))
        np.testing.assert_array_equal(reader.read_mean(200, 300, 512, 512, 2), mean)
        difference = np.abs(reader.overview(111, 148).astype(int) - reference.overview(111, 148))
        assert difference.mean() < 1
