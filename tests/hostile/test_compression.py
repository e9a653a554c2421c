"""Tiles that are no plain JPEG: what OpenSlide opens is tiled, what it refuses is named."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from morphome.slides.open import open_slide
from morphome.slides.reader import SlideError

#: Number of the compression and the colours of its streams: Aperio's 33003 holds YCbCr, 33005 RGB.
J2K_YCBCR, J2K_RGB, J2K_PLAIN = 33003, 33005, 34712


def j2k(files, mode: str):
    """Encoder of raw, lossless JPEG 2000 codestreams of RGB or YCbCr components."""

    def encode(pixels: np.ndarray) -> bytes:
        if mode == "YCbCr":
            pixels = np.asarray(Image.fromarray(pixels).convert("YCbCr"))
        return files.encoded(pixels, "JPEG2000", no_jp2=True, mct=0)

    return encode


@pytest.mark.parametrize(("compression", "mode"), [(J2K_YCBCR, "YCbCr"), (J2K_RGB, "RGB")])
def test_jpeg_2000_tiles_are_read_through_openslide(tile, encode, files, tmp_path, compression, mode):
    path = files.svs(tmp_path / "j2k.svs", encode=j2k(files, mode), compression=compression, photometric=files.RGB)
    with open_slide(path) as slide:
        assert slide.choice.name == "openslide"
        region = slide.read_level0(0, 0, 512, 384)
    assert np.abs(region.astype(int) - files.board()).max() <= (0 if mode == "RGB" else 3)
    assert tile(path).record["n_tiles"] == 24
    assert encode(path).result == ("ok", "")


def test_a_damaged_jpeg_2000_tile_is_an_error(tile, files, tmp_path):
    def broken(streams):
        # Only the header is left: its decoder may not fill the rest in.
        return [s[:60] if number == 19 else s for number, s in enumerate(streams)]

    encode = j2k(files, "RGB")
    path = files.svs(tmp_path / "j2k.svs", encode=encode, compression=J2K_RGB, photometric=files.RGB, streams=broken)
    outcome = tile(path, min_sharpness=1e-9)
    assert outcome.result[0] == "failed" or len(outcome.data["coords"]) == 23
    if outcome.result[0] == "failed":
        outcome.refused("unreadable", str(path))


@pytest.mark.parametrize("kind", ["png", "webp", "j2k plain", "unknown", "none", "zero"])
@pytest.mark.parametrize("vendor", ["aperio", "generic"])
def test_other_compressions(tile, files, tmp_path, kind, vendor):
    """Read with the true pixels, or refused with the file and the number of the compression."""
    encode, number = {
        "png": (lambda p: files.encoded(p, "PNG"), 34933),
        "webp": (lambda p: files.encoded(p, "WEBP", lossless=True), files.WEBP),
        "j2k plain": (j2k(files, "RGB"), J2K_PLAIN),
        "unknown": (files.jpeg, 52479),
        "none": (lambda p: p.tobytes(), 1),
        "zero": (files.jpeg, 0),
    }[kind]
    path = files.svs(
        tmp_path / "odd.svs", encode=encode, compression=number, photometric=files.RGB,
        description=None if vendor == "aperio" else "",
    )  # fmt: skip
    outcome = tile(path, mpp_overrides={"S": 0.5})
    if outcome.result[0] == "ok":
        assert kind in {"none", "webp"}
        with open_slide(path) as slide:
            assert slide.choice.name in {"openslide", "vips"}
            np.testing.assert_array_equal(slide.read_level0(0, 0, 512, 384), files.board())
        return
    assert kind != "none"
    assert outcome.result[1] in {"unreadable", "unsupported_format"}
    outcome.refused(outcome.result[1], str(path), *([str(number)] if kind == "unknown" else []))
    # OpenSlide alone refuses as well.
    alone = tile(path, reader="openslide", mpp_overrides={"S": 0.5})
    alone.refused(alone.result[1], str(path), "bytes, first bytes")


@pytest.mark.parametrize("damage", ["missing", "zeros", "cut"])
def test_a_file_that_libvips_reads_is_not_filled_in(tile, files, tmp_path, damage):
    """WebP tiles that are lost: libvips may fill them with black or white, which must not pass for tissue."""

    def broken(streams):
        lost = {"missing": None, "zeros": bytes(len(streams[19])), "cut": streams[19][:40]}[damage]
        return [lost if number == 19 else s for number, s in enumerate(streams)]

    path = files.svs(
        tmp_path / "webp.tif", encode=lambda p: files.encoded(p, "WEBP", lossless=True), compression=files.WEBP,
        photometric=files.RGB, description="", streams=broken,
    )  # fmt: skip
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_level0(0, 0, 512, 64), files.board()[:64])
        try:
            found = slide.read_level0(192, 128, 64, 64)
        except SlideError as error:
            assert str(path) in error.problem
        else:
            np.testing.assert_array_equal(found, files.board()[128:192, 192:256])


@pytest.mark.parametrize("number", [7, 33003, 33005])
def test_a_compression_that_the_streams_contradict(tile, files, tmp_path, number):
    """The tag says one thing, the streams are another: an error at the first pixel, no grey picture."""
    encode = files.jpeg if number != 7 else j2k(files, "RGB")
    path = files.svs(tmp_path / "lie.svs", encode=encode, compression=number, photometric=files.RGB)
    outcome = tile(path)
    outcome.refused(outcome.result[1], str(path))
    assert outcome.result[1] in {"unreadable", "unsupported_format"}
