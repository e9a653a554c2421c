"""JPEG streams of TIFF tiles: whole streams from a header, shared tables and what a tile holds.

The TIFF tags state the colour space, and OpenSlide believes them. libjpeg, left alone, believes the application
segments of a stream (JFIF, Adobe) and the names of its components. So every application segment is taken out, and
one Adobe segment that says what the tags say is put in front. (ITU-T T.81; TIFF Technical Note 2.)
"""

from __future__ import annotations

import struct

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_QUANTISATION, _HUFFMAN, _SCAN, _ADOBE, _COMMENT, _FILL = 0xDB, 0xC4, 0xDA, 0xEE, 0xFE, 0xFF


def stream_header(tables: bytes | None, *, ycbcr: bool) -> bytes:
    """What goes before every tile: start of image, an Adobe segment with the colour space, and the shared tables.

    Args:
        tables: value of the tag JPEGTables, a stream of tables alone; None or empty where tiles are complete.
        ycbcr: YCbCr, otherwise RGB.

    Raises:
        ValueError: the tables are damaged.
    """
    # Adobe's version 100, no flags; transform 0 is RGB, 1 is YCbCr.
    adobe = b"\xff\xee" + struct.pack(">H5sHHHB", 14, b"Adobe", 100, 0, 0, int(ycbcr))
    kept = b""
    if tables:
        end = tables.rfind(_EOI)
        if tables[:2] != _SOI or end < 2:
            raise ValueError("no stream of tables")
        at = 2
        while at < end:
            marker, length = _segment(tables, at)
            if marker in (_QUANTISATION, _HUFFMAN):
                kept += tables[at : at + length]
            at += length
    return _SOI + adobe + kept


def tile_stream(header: bytes, data: bytes) -> bytes:
    """The whole stream of a tile of three components of 8 bits.

    Raises:
        ValueError: the data do not start as such a stream does.
    """
    if data[:2] != _SOI:
        raise ValueError("no JPEG stream")
    kept, begin, at = header, 2, 2  # data from begin on are not taken over yet
    while True:
        marker, length = _segment(data, at)
        if marker == _SCAN:
            return kept + data[begin:]
        if marker in _FRAMES and (data[at + 4], data[at + 9]) != (8, 3):
            raise ValueError(f"{data[at + 9]} components of {data[at + 4]} bits, not 3 of 8")
        if marker == _ADOBE and data[at + 4 : at + 9] == b"Adobe" and length >= 16 and data[at + 15] > 1:
            # libjpeg warns, and OpenSlide takes every warning for damage.
            raise ValueError(f"colour transform {data[at + 15]} with 3 components")
        if marker in (_FILL, _COMMENT) or 0xE0 <= marker <= 0xEF:
            kept += data[begin:at]
            begin = at + length
        at += length


def _segment(data: bytes, at: int) -> tuple[int, int]:
    """Marker of the segment at a place and the bytes to the next one; a byte that fills is a segment of its own."""
    if at + 4 > len(data):
        raise ValueError("the stream ends early")
    if data[at] != 0xFF:
        raise ValueError("damaged before its first scan")
    marker = data[at + 1]
    if marker == _FILL:
        return marker, 1
    if marker < 0xC0 or 0xD0 <= marker <= 0xD9:
        raise ValueError("damaged before its first scan")
    length = 2 + (data[at + 2] << 8 | data[at + 3])
    if length < 4 or at + length > len(data):
        raise ValueError("the stream ends early")
    if marker in _FRAMES and length < 10:
        raise ValueError("a damaged frame header")
    return marker, length
