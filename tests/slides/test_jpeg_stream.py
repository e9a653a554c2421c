"""Headers and tiles of JPEG streams: what is kept, what is taken out and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from morphome.slides.jpeg_stream import stream_header, tile_stream


@pytest.mark.parametrize("ycbcr", [True, False])
def test_a_tile_with_shared_tables_becomes_a_whole_stream(jpeg_tiff, ycbcr):
    image = jpeg_tiff.texture(64, 48)
    whole = jpeg_tiff.encode(image, ycbcr, "444")
    tables, tile = jpeg_tiff.split(whole)
    for header, data in [(stream_header(tables, ycbcr=ycbcr), tile), (stream_header(None, ycbcr=ycbcr), whole)]:
        decoded = simplejpeg.decode_jpeg(tile_stream(header, data), "RGB")
        np.testing.assert_array_equal(decoded, simplejpeg.decode_jpeg(whole, "RGB"))


@pytest.mark.parametrize(
    "tables", [b"\xff\xd8", b"\0" * 9, b"\xff\xd8\xff\xdb\x00\x43\x01\xff\xd9", b"\xff\xd8junk\xff\xd9"]
)
def test_damaged_tables(tables):
    with pytest.raises(ValueError, match=r"tables|early|damaged"):
        stream_header(tables, ycbcr=True)


def test_components_and_bits_are_those_of_the_directory(jpeg_tiff):
    header = stream_header(None, ycbcr=True)
    grey = simplejpeg.encode_jpeg(np.zeros((16, 16, 1), np.uint8), colorspace="GRAY", colorsubsampling="Gray")
    with pytest.raises(ValueError, match="1 components of 8 bits"):
        tile_stream(header, grey)
    odd = jpeg_tiff.split(jpeg_tiff.encode(jpeg_tiff.texture(16, 16)))[1]
    adobe = b"\xff\xee\x00\x0eAdobe\x00d\x00\x00\x00\x00\x02"
    with pytest.raises(ValueError, match="colour transform 2"):
        tile_stream(header, odd[:2] + adobe + odd[2:])


@given(st.binary(max_size=80))
def test_any_bytes_give_a_stream_or_a_value_error(data):
    for start in (b"", b"\xff\xd8", b"\xff\xd8\xff\xc0"):
        try:
            assert tile_stream(b"header", start + data).startswith(b"header")
        except ValueError as error:
            assert str(error)
