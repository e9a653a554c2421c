"""Which reader a slide gets, the comparison that decides, and what damaged or forged files may never do."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from morphome.errors import MorphomeError
from morphome.slides import open as module
from morphome.slides.open import open_slide
from morphome.slides.openslide_reader import OpenSlideReader
from morphome.slides.parity import PLACES, probe_places
from morphome.slides.patches import PatchShape, read_block
from morphome.slides.reader import SlideError, SlideFacts, check_size
from morphome.slides.tiff_directory import read_directory

APERIO = "Aperio Image Library v12.0.15\r\n403x290 (64x64) JPEG/RGB Q=70|AppMag = 40|MPP = 0.25"


@pytest.fixture
def slide(jpeg_tiff, tmp_path):
    # With a pyramid: OpenSlide hashes the coarsest level when it opens a file.
    return jpeg_tiff.write(tmp_path / "slide.svs", jpeg_tiff.texture(403, 290), description=APERIO, levels=(4,))


def test_a_tiled_jpeg_slide_gets_the_direct_decoder_with_the_facts_of_openslide(slide):
    with open_slide(slide) as reader, OpenSlideReader(slide) as reference:
        assert (reader.choice.name, reader.choice.reason, reader.choice.max_difference) == ("tiled_jpeg", "", 0)
        assert PLACES - 1 <= reader.choice.n_probed <= PLACES
        assert reader.facts == reference.facts
        assert reader.facts.properties["openslide.mpp-x"] == "0.25"
        assert reader.another().choice == reader.choice


def test_openslide_may_be_asked_for(slide):
    with open_slide(slide, "openslide") as reader:
        assert (type(reader), reader.choice.reason) == (OpenSlideReader, "asked for")
    with pytest.raises(MorphomeError, match=r"slides\.reader"):
        open_slide(slide, "fastest")


@pytest.mark.parametrize(("wrong_part", "words"), [
    ("tables", "differs by up to"), ("offsets", "direct decoding failed where OpenSlide reads"),
])  # fmt: skip
def test_a_decoder_that_shows_other_pixels_is_not_used(slide, monkeypatch, wrong_part, words):
    """A quantisation table with one wrong number, and a directory that points to the wrong places."""

    def wrong(facts):
        table = read_directory(facts)
        if wrong_part == "offsets":
            return replace(table, offsets=tuple(at + 1 for at in table.offsets))
        header = bytearray(table.header)
        header[header.index(b"\xff\xdb\x00\x43") + 5 + 9] += 5
        return replace(table, header=bytes(header))

    monkeypatch.setattr(module, "read_directory", wrong)
    with open_slide(slide) as reader, OpenSlideReader(slide) as reference:
        assert reader.choice.name == "openslide"
        assert words in reader.choice.reason
        np.testing.assert_array_equal(reader.read_level0(0, 0, 64, 64), reference.read_level0(0, 0, 64, 64))


def edit(path, **tags):
    """Overwrite tags of the first directory; values are made from the old ones."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name, make in tags.items():
            tag = tiff.pages[0].tags[name]
            tag.overwrite(make(list(tag.value)))
    return path


@pytest.mark.parametrize(("tag", "make", "words"), [
    ("TileByteCounts", lambda v: [0 if i == 20 else n for i, n in enumerate(v)], "1 tiles without data"),
    ("TileOffsets", lambda v: [1 << 31 if i == 3 else n for i, n in enumerate(v)], "1 tiles lie outside the file"),
])  # fmt: skip
def test_what_the_directory_decides_for_openslide(slide, tag, make, words):
    with open_slide(edit(slide, **{tag: make})) as reader:
        assert reader.choice.name == "openslide"
        assert words in reader.choice.reason


def test_other_compression_is_for_openslide(synthetic, painted, tmp_path):
    with open_slide(synthetic.write_tiff(tmp_path / "raw.tif", painted)) as reader:
        assert (reader.choice.name, reader.choice.reason) == ("openslide", "compression none (1), not JPEG")


def test_places_are_tissue_spread_over_the_slide(slide):
    with OpenSlideReader(slide) as reference:
        table = read_directory(reference.facts)
    # 7 x 5 tiles: glass but for two columns.
    counts = tuple(900 if number % 7 in (2, 5) else 100 for number in range(35))
    places = probe_places(replace(table, counts=counts))
    assert places == probe_places(replace(table, counts=counts))
    assert {x // 64 for x, *_ in places[:-1]} == {2, 5}
    assert {y // 64 for _, y, *_ in places} == {0, 1, 2, 3, 4}
    x, y, width, height = places[-1]
    assert (x + width, y + height) == (403, 290)


def test_a_damaged_place_says_nothing_about_the_decoder(slide):
    edit(slide, TileByteCounts=lambda v: [n // 2 if i < 20 else n for i, n in enumerate(v)])
    with open_slide(slide) as reader:
        assert reader.choice.name == "tiled_jpeg"
        assert 0 < reader.choice.n_probed < PLACES
    edit(slide, TileByteCounts=lambda v: [n // 2 for n in v])
    with open_slide(slide) as reader:
        assert (reader.choice.name, reader.choice.n_probed) == ("openslide", 0)


@settings(max_examples=60, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.integers(0, 2), cut=st.none() | st.floats(0, 1),
       flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255), st.booleans()), max_size=5))  # fmt: skip
def test_any_damage_gives_pixels_or_a_slide_error(damageable, tmp_path, kind, cut, flips):
    content = bytearray(damageable[kind])
    for where, value, in_directory in flips:
        # Half of the flips hit the last 800 bytes, which hold the directory.
        span = min(800, len(content)) if in_directory else len(content)
        content[len(content) - 1 - int(where * (span - 1))] = value
    path = tmp_path / "damaged.tif"
    path.write_bytes(content if cut is None else content[: int(cut * len(content))])
    try:
        with open_slide(path) as reader:
            width, height = reader.facts.width_px, reader.facts.height_px
            block = read_block(
                reader, [(0, 0), (width - 32, height - 32)], PatchShape(64, 64, 32), lambda: OpenSlideReader(path)
            )
            assert len(block.tiles) == block.ok.sum()
            if width * height < 1 << 22:
                assert reader.overview(20, 10).shape == (10, 20, 3)
    except SlideError as error:
        assert error.code in {"unreadable", "unsupported_format", "implausible_size"}
        assert str(path) in error.problem


@pytest.fixture(scope="module")
def damageable(jpeg_tiff, tmp_path_factory):
    """Contents of three small files: direct, OME-TIFF for libvips, and tiles without compression."""
    folder, image = tmp_path_factory.mktemp("whole"), jpeg_tiff.texture(200, 130)
    jpeg_tiff.write(folder / "0.tif", image, description=APERIO)
    tifffile.imwrite(folder / "1.tif", image, ome=True, photometric="rgb", compression="zlib", metadata={"axes": "YXS"})
    tifffile.imwrite(folder / "2.tif", image, photometric="rgb", tile=(64, 64), metadata=None)
    return [(folder / f"{i}.tif").read_bytes() for i in range(3)]


@pytest.mark.parametrize("tags", [
    {"ImageWidth": 2**31 - 1}, {"ImageWidth": 2**31 - 1, "ImageLength": 2**31 - 1}, {"ImageLength": 10**7},
    {"TileWidth": 1 << 30}, {"TileWidth": 1 << 14, "TileLength": 1 << 14}, {"ImageWidth": 1 << 20},
])  # fmt: skip
@pytest.mark.parametrize("jpeg", [True, False])
def test_a_forged_size_allocates_nothing(jpeg_tiff, tmp_path, tags, jpeg):
    path = tmp_path / "forged.tif"
    if jpeg:
        jpeg_tiff.write(path, jpeg_tiff.texture(403, 290))
    else:
        tifffile.imwrite(path, jpeg_tiff.texture(403, 290), photometric="rgb", tile=(64, 64), metadata=None)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name, value in tags.items():
            tiff.pages[0].tags[name].overwrite(value, dtype=4)
    tracemalloc.start()
    try:
        with open_slide(path) as reader:
            reader.read_level0(0, 0, 64, 64)
    except SlideError as error:
        assert error.code in {"unreadable", "unsupported_format", "implausible_size"}
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20 << 20


@pytest.mark.parametrize(("size", "tile", "refused"), [
    ((200_000, 150_000), (512, 512), False), ((3_000_000, 10), (512, 512), True),
    ((2_000_000, 2_000_000), (512, 512), True), ((1000, 1000), (1 << 20, 64), False),
    ((1000, 1000), (1 << 24, 64), True),
])  # fmt: skip
def test_sizes_that_no_scanner_writes(tmp_path, size, tile, refused):
    properties = {f"openslide.level[0].tile-{n}": str(v) for n, v in zip(("width", "height"), tile, strict=True)}
    facts = SlideFacts(tmp_path / "a.svs", "aperio", *size, (size,), (1.0,), (0, 0, *size), properties)
    if not refused:
        check_size(facts)
        return
    with pytest.raises(SlideError) as caught:
        check_size(facts)
    assert caught.value.code == "implausible_size"


DICOM = "dicom/CMU-1-Small-Region_jpeg/1.2.826.0.1.3680043.8.498.35220404935377466417110411569853018212.dcm"


@pytest.mark.parametrize(("name", "outcome", "words"), [
    ("broken/histolab_broken.svs", "unreadable", "1001 bytes"),
    ("broken/openslide_small_16x16.svs", "tiled_jpeg", ""),
    ("broken/openslide_unopenable.tiff", "unreadable", "52479"),
    ("broken/openslide_unreadable.svs", "openslide", "no place that OpenSlide reads"),
    (DICOM, "unsupported_format", "YBR_FULL"),
    ("dicom/cytomine_biopsy.dcm", "openslide", "format dicom"),
    ("dicom/google_j2k_camelyon.dcm", "openslide", "format dicom"),
    ("dicom/google_jpeg_camelyon.dcm", "openslide", "format dicom"),
    ("ndpi/test3-DAPI-2-(387).ndpi", "openslide", "format hamamatsu"),
    ("svs/CMU-1-Small-Region.svs", "tiled_jpeg", ""),
    ("svs/TCGA-CR-7395-01A-01-TS1.svs", "openslide", "JPEG 2000 (33005)"),
    ("tiff/CMU-1-Small-Region.jpeg.tiff", "tiled_jpeg", ""),
    ("tiff/XYC_jpeg.ome.tiff", "vips", "OpenSlide refuses the file"),
    ("tiff/slaid_patch_rgba_256.tif", "openslide", "compression none (1)"),
])  # fmt: skip
def test_readers_of_real_slides(shared_data, name, outcome, words):
    path = shared_data / "wsi" / name
    if outcome in ("unreadable", "unsupported_format"):
        with pytest.raises(SlideError) as caught:
            open_slide(path)
        assert caught.value.code == outcome
        assert words in caught.value.problem
    else:
        with open_slide(path) as reader:
            assert reader.choice.name == outcome
            assert words in reader.choice.reason
