"""What a TIFF file says about its full image, and whether its tiles can be decoded without OpenSlide.

Only the first directory counts: labels, macros, thumbnails and lower levels stand in later ones. (TIFF 6.0 and
BigTIFF.)
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tifffile

from morphome.slides.jpeg_stream import stream_header
from morphome.slides.reader import SlideFacts

#: What tifffile raises on a file that is damaged, forged or no TIFF at all; TiffFileError is a ValueError.
TIFF_ERRORS = (
    ValueError,
    struct.error,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    RecursionError,
    OSError,
)
#: OpenSlide's names of the formats whose level 0 is the first directory, tile by tile.
VENDORS = ("aperio", "generic-tiff", "philips")
#: Largest native tile that is decoded directly, in pixels; scanners write 240 to 2048 a side.
MAX_TILE_PX = 4096 * 4096
#: First bytes of TIFF and BigTIFF files of either byte order.
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_JPEG, _RGB, _YCBCR = 7, 2, 6
_COMPRESSION = {1: "none", 5: "LZW", 8: "deflate", 33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000",
                50001: "WebP"}  # fmt: skip
_LOSSLESS = (1, 5, 8, 32946)


class NotDirectError(Exception):
    """The tiles cannot be decoded directly; the text is the reason for the record."""


@dataclass(frozen=True)
class JpegDirectory:
    """Level 0 of a tiled JPEG TIFF.

    Attributes:
        path: the file.
        width_px, height_px: size of the image.
        tile_w, tile_h: size of a native tile.
        columns, rows: native tiles across and down.
        offsets, counts: place and length of each tile's stream in bytes, row by row.
        header: start of every tile's JPEG stream, see :func:`morphome.slides.jpeg_stream.stream_header`.
    """

    path: Path
    width_px: int
    height_px: int
    tile_w: int
    tile_h: int
    columns: int
    rows: int
    offsets: Sequence[int]
    counts: Sequence[int]
    header: bytes


def is_tiff(path: Path) -> bool:
    """Whether a file starts as TIFF or BigTIFF files do."""
    try:
        with path.open("rb") as handle:
            return handle.read(4) in TIFF_STARTS
    except OSError:
        return False


def description(path: Path) -> str:
    """ImageDescription of the first directory; empty where there is none."""
    try:
        with first_page(path) as page:
            return str(page.description)
    except (NotDirectError, *TIFF_ERRORS):
        return ""


@contextmanager
def first_page(path: Path) -> Iterator[tifffile.TiffPage]:
    """The first directory of a TIFF file.

    Raises:
        NotDirectError: the file or its first directory is no TIFF that tifffile reads.
    """
    # tifffile reports every odd tag of a file to the root logger; what matters comes as an exception.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    try:
        file = tifffile.TiffFile(path)
    except TIFF_ERRORS as error:
        raise NotDirectError(f"not a TIFF file that can be read directly ({_short(error)})") from None
    with file:
        try:
            page = file.pages[0]
            # Touches what is read lazily, so that nothing is raised later.
            page.dataoffsets, page.databytecounts, page.jpegtables, page.is_ome  # noqa: B018
        except TIFF_ERRORS as error:
            raise NotDirectError(f"its first TIFF directory is damaged ({_short(error)})") from None
        yield page


def read_directory(facts: SlideFacts) -> JpegDirectory:
    """Level 0 of a slide that OpenSlide opens, for direct decoding.

    Raises:
        NotDirectError: level 0 is something else than a complete grid of 8-bit RGB or YCbCr JPEG tiles.
    """
    if facts.vendor not in VENDORS:
        raise NotDirectError(f"format {facts.vendor}: its tiles are not those of one TIFF directory")
    with first_page(facts.path) as page:
        try:
            return _directory(facts, page)
        except TIFF_ERRORS as error:
            raise NotDirectError(f"its first TIFF directory is damaged ({_short(error)})") from None


def lossless_sub_directories(path: Path) -> int:
    """Number of coarser levels in sub-directories of a file without compression, or with LZW or deflate."""
    try:
        with first_page(path) as page:
            return len(page.subifds or ()) if int(page.compression) in _LOSSLESS else 0
    except (NotDirectError, *TIFF_ERRORS):
        return 0


def _directory(facts: SlideFacts, page: tifffile.TiffPage) -> JpegDirectory:
    if not page.is_tiled:
        raise NotDirectError("not tiled")
    if int(page.compression) != _JPEG:
        code = int(page.compression)
        raise NotDirectError(f"compression {_COMPRESSION.get(code, 'unknown')} ({code}), not JPEG")
    if (page.bitspersample, page.samplesperpixel, int(page.planarconfig)) != (8, 3, 1) or page.extrasamples:
        raise NotDirectError(f"{page.samplesperpixel} samples of {page.bitspersample} bits, not 3 interleaved of 8")
    photometric = int(page.photometric)
    if photometric not in (_RGB, _YCBCR):
        raise NotDirectError(f"photometric interpretation {photometric}, not RGB or YCbCr")
    width, height, tile_w, tile_h = (
        int(n) for n in (page.imagewidth, page.imagelength, page.tilewidth, page.tilelength)
    )
    if (width, height) != (facts.width_px, facts.height_px):
        raise NotDirectError(f"OpenSlide's level 0 is not the first directory ({width} x {height} px)")
    if not 0 < tile_w * tile_h <= MAX_TILE_PX or tile_w % 8 or tile_h % 8 or page.imagedepth != 1:
        raise NotDirectError(f"native tiles of {tile_w} x {tile_h} px")
    columns, rows = -(-width // tile_w), -(-height // tile_h)
    offsets, counts = page.dataoffsets, page.databytecounts
    if not len(offsets) == len(counts) == columns * rows:
        raise NotDirectError(f"{len(offsets)} tiles in the directory, {columns * rows} in the image")
    missing = sum(1 for n in counts if n == 0)
    if missing:
        raise NotDirectError(f"{missing} tiles without data, which OpenSlide fills from other levels")
    size = facts.path.stat().st_size
    outside = sum(1 for at, n in zip(offsets, counts, strict=True) if at <= 0 or n < 4 or at + n > size)
    if outside:
        raise NotDirectError(f"{outside} tiles lie outside the file")
    try:
        header = stream_header(page.jpegtables, ycbcr=photometric == _YCBCR)
    except ValueError as error:
        raise NotDirectError(f"its JPEG tables are damaged ({error})") from None
    return JpegDirectory(
        facts.path, width, height, tile_w, tile_h, columns, rows, tuple(offsets), tuple(counts), header
    )


def _short(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__
