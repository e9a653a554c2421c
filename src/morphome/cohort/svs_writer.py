"""A small writer of Aperio-like whole-slide images: BigTIFF, 240-px JPEG tiles, levels 1, 4 and 16.

The file has the shape of a scanned SVS: tiled full image, stripped thumbnail, tiled levels, label, macro, and
abbreviated JPEG streams whose tables stand once in the tag JPEGTables. Equal tiles are stored once and share
their offset, which makes large simulated slides small and quick to write. (TIFF 6.0; BigTIFF; TIFF Technical
Note 2 for JPEG; Aperio's image description.)
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from morphome.files import atomic_path

TILE_PX = 240
DOWNSAMPLES = (1, 4, 16)
_ASCII, _SHORT, _LONG, _LONG8, _UNDEFINED = 2, 3, 4, 16, 7
_BYTES = {_ASCII: 1, _SHORT: 2, _LONG: 4, _LONG8: 8, _UNDEFINED: 1}
_CODES = {_SHORT: "H", _LONG: "I", _LONG8: "Q"}
_REDUCED, _REDUCED_MACRO = 1, 9
_LIBRARY = "Aperio Image Library v12.0.15"

Rgb = NDArray[np.uint8]


@dataclass(frozen=True)
class SlideImage:
    """What a slide shows, as distinct tiles and where they lie.

    Attributes:
        tiles: distinct level-0 tiles, each uint8 (240, 240, 3).
        index: which tile lies where, int (rows, columns).
        width_px, height_px: size at level 0; multiples of 16, at most columns x 240 and rows x 240.
        mpp: microns per pixel at level 0.
        label: associated image of the paper label, uint8 (height, width, 3).
        damaged: numbers of tiles whose level-0 data are to be undecodable.
    """

    tiles: Sequence[Rgb]
    index: NDArray[np.int64]
    width_px: int
    height_px: int
    mpp: float
    label: Rgb
    damaged: frozenset[int] = frozenset()


def write_svs(path: Path, slide: SlideImage, *, properties: Mapping[str, str], quality: int = 75) -> None:
    """Write a slide that OpenSlide opens as vendor ``aperio`` with three levels and three associated images.

    Levels 4 and 16 are area means of the undamaged level-0 tiles before compression (16 from the rounded 4).

    Args:
        properties: further ``key = value`` items of the image description (``AppMag`` and ``MPP`` are added).
        quality: JPEG quality, 1 to 100.

    Raises:
        ValueError: size not a multiple of 16, larger than the tiles, or tiles of another shape.
    """
    _check(slide)
    width, height = slide.width_px, slide.height_px
    described = "|".join(
        f"{key} = {value}" for key, value in {"AppMag": "40", **properties, "MPP": f"{slide.mpp:.4f}"}.items()
    )
    size = f"{width}x{height}"
    jpeg = f"JPEG/YCC Q={quality}"
    writer = _Writer(quality)
    levels = _levels(slide)
    thumbnail = _fit(_crop(levels[-1], width, height, 16), 1024)
    writer.tiled(
        *_stored(writer, slide),
        (width, height),
        f"{_LIBRARY} \r\n{size} [0,0 {size}] ({TILE_PX}x{TILE_PX}) {jpeg}|{described}",
        reduced=False,
    )
    writer.stripped(thumbnail, f"{_LIBRARY} \n{size} -> {thumbnail.shape[1]}x{thumbnail.shape[0]} - |{described}", 0)
    for level, factor in zip(levels, DOWNSAMPLES[1:], strict=True):
        small = (width // factor, height // factor)
        writer.tiled(
            *_cut(writer, level, small),
            small,
            f"{_LIBRARY} \r\n{size} [0,0 {size}] ({TILE_PX}x{TILE_PX}) -> {small[0]}x{small[1]} {jpeg}",
            reduced=True,
        )
    for name, image, kind in (
        ("label", slide.label, _REDUCED),
        ("macro", _macro(thumbnail), _REDUCED_MACRO),
    ):
        writer.stripped(image, f"{_LIBRARY} \n{name} {image.shape[1]}x{image.shape[0]}", kind)
    with atomic_path(path) as temporary:
        temporary.write_bytes(writer.finish())


def _check(slide: SlideImage) -> None:
    rows, columns = slide.index.shape
    if slide.width_px % 16 or slide.height_px % 16:
        raise ValueError(f"size {slide.width_px} x {slide.height_px} px is not a multiple of 16")
    if slide.width_px > columns * TILE_PX or slide.height_px > rows * TILE_PX:
        raise ValueError(f"size {slide.width_px} x {slide.height_px} px is larger than the grid of tiles")
    wrong = [tile.shape for tile in slide.tiles if tile.shape != (TILE_PX, TILE_PX, 3)]
    if wrong:
        raise ValueError(f"a tile has the shape {wrong[0]}, not {(TILE_PX, TILE_PX, 3)}")


def _levels(slide: SlideImage) -> list[Rgb]:
    """The whole image at 1/4 and 1/16: area means of the distinct tiles, put together."""
    rows, columns = slide.index.shape
    # Columns of a few tiles: fewer calls than tile by tile, and still in the processor's cache.
    columns_of_8 = (np.concatenate(slide.tiles[i : i + 8]) for i in range(0, len(slide.tiles), 8))
    stack = np.concatenate([np.asarray(Image.fromarray(column).reduce(4)) for column in columns_of_8])
    levels = []
    for factor in DOWNSAMPLES[1:]:
        side = TILE_PX // factor
        if levels:
            stack = np.asarray(Image.fromarray(stack).reduce(4))
        small = stack.reshape(len(slide.tiles), side, side, 3)
        levels.append(small[slide.index].transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 3))
    return levels


def _stored(writer: _Writer, slide: SlideImage) -> tuple[list[int], list[int]]:
    """Offsets and lengths of the level-0 tiles that lie inside the image, row by row."""
    places = {}
    for number in np.unique(slide.index).tolist():
        stream = writer.compress(slide.tiles[number])
        # Zeros are no JPEG stream: the file opens, and only reading these tiles fails.
        places[number] = writer.place(bytes(len(stream)) if number in slide.damaged else stream)
    rows, columns = -(-slide.height_px // TILE_PX), -(-slide.width_px // TILE_PX)
    found = [places[number] for number in slide.index[:rows, :columns].ravel().tolist()]
    return [offset for offset, _ in found], [length for _, length in found]


def _cut(writer: _Writer, image: Rgb, size: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Offsets and lengths of the tiles of a lower level; equal ones (glass) are stored once."""
    rows, columns = -(-size[1] // TILE_PX), -(-size[0] // TILE_PX)
    lack = (max(0, rows * TILE_PX - image.shape[0]), max(0, columns * TILE_PX - image.shape[1]))
    padded = np.pad(image, ((0, lack[0]), (0, lack[1]), (0, 0)), mode="edge")
    known: dict[bytes, tuple[int, int]] = {}
    found = []
    for row in range(rows):
        for column in range(columns):
            tile = padded[row * TILE_PX : (row + 1) * TILE_PX, column * TILE_PX : (column + 1) * TILE_PX]
            stream = writer.compress(np.ascontiguousarray(tile))
            if stream not in known:
                known[stream] = writer.place(stream)
            found.append(known[stream])
    return [offset for offset, _ in found], [length for _, length in found]


class _Writer:
    """Collects data blocks and directories; all positions are known when a block is placed."""

    def __init__(self, quality: int) -> None:
        self._quality = quality
        # Little endian, BigTIFF (43), 8-byte offsets; the first directory's place is filled in at the end.
        self._data = bytearray(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        self._directories: list[dict[int, tuple[int, object]]] = []
        self._tables, _ = _split_jpeg(self._encode(np.zeros((16, 16, 3), np.uint8)))

    def place(self, block: bytes) -> tuple[int, int]:
        """Append a block at an even position; its offset and length."""
        if len(self._data) % 2:
            self._data.append(0)
        offset = len(self._data)
        self._data += block
        return offset, len(block)

    def compress(self, image: Rgb) -> bytes:
        """The abbreviated JPEG stream of an image; its tables are those of every other stream of this file."""
        tables, stream = _split_jpeg(self._encode(image))
        if tables != self._tables:
            raise ValueError("the JPEG library chose other tables for this image")
        return stream

    def _encode(self, image: Rgb) -> bytes:
        return simplejpeg.encode_jpeg(image, quality=self._quality, colorspace="RGB", colorsubsampling="422")

    def tiled(self, offsets: list[int], lengths: list[int], size: tuple[int, int], text: str, *, reduced: bool) -> None:
        """Add a directory of 240-px tiles."""
        layout = {
            322: (_SHORT, [TILE_PX]),
            323: (_SHORT, [TILE_PX]),
            324: (_LONG8, offsets),
            325: (_LONG, lengths),
        }
        self._add(size, text, _REDUCED if reduced else 0, layout)

    def stripped(self, image: Rgb, text: str, kind: int) -> None:
        """Add a directory with the whole image as one strip."""
        offset, length = self.place(self.compress(np.ascontiguousarray(image)))
        height, width = image.shape[:2]
        layout = {273: (_LONG8, [offset]), 278: (_LONG, [height]), 279: (_LONG, [length])}
        self._add((width, height), text, kind, layout)

    def _add(self, size: tuple[int, int], text: str, kind: int, layout: dict[int, tuple[int, object]]) -> None:
        self._directories.append(
            {
                254: (_LONG, [kind]),
                256: (_LONG, [size[0]]),
                257: (_LONG, [size[1]]),
                258: (_SHORT, [8, 8, 8]),
                259: (_SHORT, [7]),  # JPEG
                262: (_SHORT, [6]),  # YCbCr
                270: (_ASCII, text.encode("ascii") + b"\0"),
                277: (_SHORT, [3]),
                284: (_SHORT, [1]),
                347: (_UNDEFINED, self._tables),
                530: (_SHORT, [2, 1]),
                **layout,
            }
        )

    def finish(self) -> bytes:
        """The whole file."""
        link = 8  # where the offset of the next directory is to be written
        for directory in self._directories:
            entries = b""
            for tag, (kind, value) in sorted(directory.items()):
                raw = value if isinstance(value, bytes) else struct.pack(f"<{len(value)}{_CODES[kind]}", *value)
                count = len(raw) // _BYTES[kind]
                inline = raw if len(raw) <= 8 else struct.pack("<Q", self.place(raw)[0])
                entries += struct.pack("<HHQ", tag, kind, count) + inline.ljust(8, b"\0")
            offset, _ = self.place(struct.pack("<Q", len(directory)) + entries + bytes(8))
            self._data[link : link + 8] = struct.pack("<Q", offset)
            link = offset + 8 + len(entries)
        return bytes(self._data)


def _split_jpeg(stream: bytes) -> tuple[bytes, bytes]:
    """(tables stream, abbreviated image stream) of a complete baseline JPEG stream.

    Quantisation (DQT) and Huffman (DHT) segments go to the tables; application segments are dropped, because the
    colour space stands in the TIFF tags.
    """
    tables, image = [b"\xff\xd8"], [b"\xff\xd8"]
    position = 2
    while True:
        marker = stream[position + 1]
        length = int.from_bytes(stream[position + 2 : position + 4], "big")
        segment = stream[position : position + 2 + length]
        if marker == 0xDA:  # start of scan: the rest is image data and the end marker
            image.append(stream[position:])
            return b"".join(tables) + b"\xff\xd9", b"".join(image)
        if marker in (0xDB, 0xC4):
            tables.append(segment)
        elif not 0xE0 <= marker <= 0xEF:
            image.append(segment)
        position += 2 + length


def _crop(image: Rgb, width: int, height: int, factor: int) -> Rgb:
    return image[: height // factor, : width // factor]


def _fit(image: Rgb, side: int) -> Rgb:
    """The image, made smaller where its longer side exceeds ``side``."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
    return np.asarray(picture)


def _macro(thumbnail: Rgb) -> Rgb:
    """The whole glass slide: a field for the label on the left, the tissue on the right."""
    macro = Image.new("RGB", (1280, 431), (236, 236, 238))
    macro.paste((250, 250, 250), (0, 0, 360, 431))
    small = Image.fromarray(_fit(thumbnail, 380))
    macro.paste(small, (460, (431 - small.height) // 2))
    return np.asarray(macro)
