"""Builders of hostile slides: a TIFF writer that writes what it is told, however wrong, and odd JPEG streams.

Nothing here checks anything: sizes may contradict the tiles, offsets may point anywhere, tags may be missing.
"""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ASCII, SHORT, LONG, RATIONAL, UNDEFINED, LONG8 = 2, 3, 4, 5, 7, 16
_BYTES = {ASCII: 1, SHORT: 2, LONG: 4, RATIONAL: 8, UNDEFINED: 1, LONG8: 8}
_CODES = {SHORT: "H", LONG: "I", LONG8: "Q"}
#: Tag numbers that tests change.
WIDTH, HEIGHT, COMPRESSION, PHOTOMETRIC, DESCRIPTION = 256, 257, 259, 262, 270
TILE_WIDTH, TILE_HEIGHT, OFFSETS, COUNTS = 322, 323, 324, 325
TABLES, SUBSAMPLING, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 347, 530, 282, 283, 296
JPEG, WEBP = 7, 50001
YCBCR, RGB = 6, 2
GLASS, TISSUE = (243, 242, 244), (200, 120, 170)

Page = dict[int, tuple[int, Any]]
#: A complete 64 x 64 px JPEG stream (4:2:0), a board of two stains: arithmetic coding, then 12 bits per sample.
_QUANTISATION = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5a"
    "YVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0"
)
ARITHMETIC = base64.b64decode(
    _QUANTISATION
    + "//yQARCABAAEADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwDSRmoe5sRiGm9DKyOq8uVscoEPuDGoBNwnIAUulF03"
    "LmdhyR8W2TkOcCL9PvlhawbnALedivhBVT73Sv/Z"
)
TWELVE_BIT = base64.b64decode(
    _QUANTISATION
    + "//wQARDABAAEADASIAAhEBAxEB/8QAGAABAQEBAQAAAAAAAAAAAAAAAQAGAwr/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/8QAGAEBAQEBAQAA"
    "AAAAAAAAAAAABAUCCQr/xAAVEQEBAAAAAAAAAAAAAAAAAAAAAf/aAAwDAQACEQMRAD8A8/CSctq98jHghUozXghBpbHpJUozoCDqy14IQqUy"
    "AIVKM14IQqU6JI6sseCFSjNeCEGlseklSjOgIOrLXghCpTIAhUozXghCpT//2Q=="
)


def board(width: int = 512, height: int = 384, seed: int = 0) -> np.ndarray:
    """Stained tissue with a margin of glass, uint8 (height, width, 3): enough for tens of tiles of 64 px."""
    rng = np.random.default_rng(seed)
    image = np.empty((height, width, 3), np.uint8)
    image[:] = GLASS
    inside = image[height // 8 : -height // 8, width // 8 : -width // 8]
    blocks = rng.integers(-30, 30, (inside.shape[0] // 8 + 1, inside.shape[1] // 8 + 1, 1))
    inside[:] = np.array(TISSUE) + blocks.repeat(8, 0).repeat(8, 1)[: inside.shape[0], : inside.shape[1]]
    return image


def cut(image: np.ndarray, tile: int) -> list[np.ndarray]:
    """Tiles row by row, those over the border padded with its last pixels."""
    rows, columns = -(-image.shape[0] // tile), -(-image.shape[1] // tile)
    lack = ((0, rows * tile - image.shape[0]), (0, columns * tile - image.shape[1]), (0, 0))
    whole = np.pad(image, lack, mode="edge")
    return [whole[r * tile : (r + 1) * tile, c * tile : (c + 1) * tile] for r in range(rows) for c in range(columns)]


def jpeg(pixels: np.ndarray, mode: str = "RGB", **options: Any) -> bytes:
    """A complete JPEG stream; ``options`` as of Pillow (``progressive``, ``restart_marker_rows``, ``keep_rgb`` ...)."""
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, "JPEG", **{"quality": 75, "subsampling": 0, **options})
    return stream.getvalue()


def encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    """A stream by Pillow's format of that name, such as WEBP or JPEG2000."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def page(
    width: int,
    height: int,
    tiles: Sequence[bytes | None],
    *,
    tile: int = 64,
    compression: int = JPEG,
    photometric: int = YCBCR,
    description: str = "",
    reduced: bool = False,
    changes: Mapping[int, tuple[int, Any] | None] | None = None,
) -> Page:
    """The directory of a tiled image.

    Args:
        tiles: streams row by row; None is a tile that is not there (offset and byte count 0).
        changes: tags to set, ``{number: (type, values)}``, or to leave out, ``{number: None}``, whatever the above.
    """
    tags: dict[int, tuple[int, Any] | None] = {
        254: (LONG, [int(reduced)]),
        WIDTH: (LONG, [width]),
        HEIGHT: (LONG, [height]),
        258: (SHORT, [8, 8, 8]),
        COMPRESSION: (SHORT, [compression]),
        PHOTOMETRIC: (SHORT, [photometric]),
        277: (SHORT, [3]),
        284: (SHORT, [1]),
        TILE_WIDTH: (SHORT, [tile]),
        TILE_HEIGHT: (SHORT, [tile]),
        # Streams until the file is written, then their offsets; the same with their lengths.
        OFFSETS: (LONG8, list(tiles)),
        COUNTS: (LONG8, list(tiles)),
    }
    if compression == JPEG and photometric == YCBCR:
        tags[SUBSAMPLING] = (SHORT, [1, 1])
    if description:
        tags[DESCRIPTION] = (ASCII, description.encode() + b"\0")
    tags.update(changes or {})
    return {number: value for number, value in tags.items() if value is not None}


def write_tiff(path: Path, pages: Sequence[Page], *, big: bool = False, directories_first: bool = False) -> Path:
    """Write the directories; equal streams lie in the file once, those of the last page first."""
    head = 16 if big else 8
    streams: dict[bytes, int] = {}
    end = 0
    for tags in reversed(pages):
        for _, values in tags.values():
            for value in values:
                if isinstance(value, bytes) and value not in streams:
                    streams[value] = end
                    end += len(value) + len(value) % 2
    body = b"".join(stream + b"\0" * (len(stream) % 2) for stream in streams)
    if directories_first:
        start = head + len(_directories(pages, head, streams, 0, big)[0])
        directories, first = _directories(pages, head, streams, start, big)
        parts = directories + body
    else:
        directories, first = _directories(pages, head + len(body), streams, head, big)
        parts = body + directories
    header = struct.pack("<2sHHHQ", b"II", 43, 8, 0, first) if big else struct.pack("<2sHI", b"II", 42, first)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + parts)
    return path


def _directories(
    pages: Sequence[Page], at: int, streams: Mapping[bytes, int], start: int, big: bool
) -> tuple[bytes, int]:
    """All directories from position ``at``, for streams that lie from position ``start``; place of the first one."""
    word, room = ("Q", 8) if big else ("I", 4)
    out, first, link = bytearray(), 0, None

    def number(value: Any, tag: int) -> int:
        if value is None:
            return 0
        if not isinstance(value, bytes):
            return int(value)
        return start + streams[value] if tag == OFFSETS else len(value)

    for tags in pages:
        entries = b""
        for tag, (kind, value) in sorted(tags.items()):
            kind_here = LONG if kind == LONG8 and not big else kind
            if kind in (ASCII, UNDEFINED):
                raw = value
            elif kind == RATIONAL:
                raw = b"".join(struct.pack("<II", *pair) for pair in value)
            else:
                raw = struct.pack(f"<{len(value)}{_CODES[kind_here]}", *(number(v, tag) for v in value))
            inline = raw
            if len(raw) > room:
                inline = struct.pack(f"<{word}", at + len(out))
                out += raw + b"\0" * (len(raw) % 2)
            entries += struct.pack(f"<HH{word}", tag, kind_here, len(raw) // _BYTES[kind_here]) + inline.ljust(
                room, b"\0"
            )
        place = at + len(out)
        if link is None:
            first = place
        else:
            out[link : link + room] = struct.pack(f"<{word}", place)
        out += struct.pack("<Q" if big else "<H", len(tags)) + entries + bytes(room)
        link = len(out) - room
    return bytes(out), first


def aperio(width: int, height: int, mpp: str = "0.5000", power: str = "20", more: str = "") -> str:
    """ImageDescription of level 0 of an SVS; numbers are texts, so that they may be no numbers."""
    facts = "".join(f"|{key} = {value}" for key, value in (("AppMag", power), ("MPP", mpp)) if value)
    return (
        f"Aperio Image Library v12.0.15 \r\n{width}x{height} [0,0 {width}x{height}] (64x64) JPEG/RGB Q=75{facts}{more}"
    )


def svs(
    path: Path,
    image: np.ndarray | None = None,
    *,
    tile: int = 64,
    levels: Sequence[int] = (4,),
    encode: Callable[[np.ndarray], bytes] = jpeg,
    photometric: int = YCBCR,
    compression: int = JPEG,
    mpp: str = "0.5000",
    power: str = "20",
    description: str | None = None,
    streams: Callable[[list[Any]], Sequence[bytes | None]] = list,
    changes: Mapping[int, tuple[int, Any] | None] | None = None,
    big: bool = False,
    directories_first: bool = False,
) -> Path:
    """A valid Aperio slide of 512 x 384 px, mpp 0.5, unless told otherwise.

    Args:
        encode: pixels of a tile to its stream, for all levels.
        streams: gets the streams of level 0 and returns those to write.
        changes: tags of level 0.
        description: of level 0; "" for a generic tiled TIFF.
    """
    image = board() if image is None else image
    height, width = image.shape[:2]
    text = aperio(width, height, mpp, power) if description is None else description
    first = streams([encode(t) for t in cut(image, tile)])
    common = {"tile": tile, "compression": compression, "photometric": photometric}
    pages = [page(width, height, first, description=text, changes=changes, **common)]
    for factor in levels:
        size = (max(1, width // factor), max(1, height // factor))
        small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
        about = text and f"{text.splitlines()[0]}\r\n{width}x{height} -> {size[0]}x{size[1]} JPEG/RGB Q=75"
        pages.append(page(*size, [encode(t) for t in cut(small, tile)], description=about, reduced=True, **common))
    return write_tiff(path, pages, big=big, directories_first=directories_first)


def blank(path: Path, side: int, *, tile: int = 240, levels: Sequence[int] = (4, 16)) -> Path:
    """Glass of ``side`` x ``side`` px as a BigTIFF SVS; all tiles of the file share one stream."""
    stream = jpeg(np.full((tile, tile, 3), GLASS, np.uint8))
    pages = []
    for factor in (1, *levels):
        size = side // factor
        text = (
            aperio(side, side, "0.2500", "40")
            if factor == 1
            else f"Aperio Image Library\r\n{side}x{side} -> {size}x{size}"
        )
        tiles = [stream] * (-(-size // tile)) ** 2
        pages.append(page(size, size, tiles, tile=tile, description=text, reduced=factor > 1))
    return write_tiff(path, pages, big=True)


def insert_segments(stream: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG stream with marker segments (marker's second byte, content) right after its start."""
    extra = b"".join(bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments)
    return stream[:2] + extra + stream[2:]


def split_tables(stream: bytes) -> tuple[bytes, bytes]:
    """(tables-only stream, stream without its tables and application segments) of a complete JPEG stream."""
    tables, rest, at = [stream[:2]], [stream[:2]], 2
    while stream[at + 1] != 0xDA:
        segment = stream[at : at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")]
        (tables if segment[1] in (0xDB, 0xC4) else [] if 0xE0 <= segment[1] <= 0xEF else rest).append(segment)
        at += len(segment)
    return b"".join(tables) + b"\xff\xd9", b"".join(rest) + stream[at:]
