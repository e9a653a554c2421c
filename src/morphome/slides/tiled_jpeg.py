"""The fast reader: the JPEG tiles of a TIFF decoded without OpenSlide, bit for bit what OpenSlide shows.

OpenSlide spends about three quarters of a read on compositing and copying. Here each native tile is read with one
``pread``, decoded once by libjpeg-turbo and kept until the tiles beside and below have had their part of it. Which
files it may read is decided by :mod:`morphome.slides.tiff_directory` and, by comparison of pixels, in
:mod:`morphome.slides.parity`.
"""

from __future__ import annotations

import os

import numpy as np
import simplejpeg
from PIL import Image

from morphome.slides.box import copy_rgb
from morphome.slides.jpeg_stream import tile_stream
from morphome.slides.openslide_reader import OpenSlideReader
from morphome.slides.overview import TOLERANCE, area_mean, level_for
from morphome.slides.reader import ReaderChoice, SlideError, SlideFacts
from morphome.slides.tiff_directory import JpegDirectory

#: Most bytes of decoded tiles that one reader keeps.
CACHE_BYTES = 256 << 20
#: Overviews without a pyramid decode at one of these scales, and at 1 where they are fine.
_SCALES = (8, 4, 2)
#: Decoded pixels per pixel of an overview, along a side: a pixel belongs as a whole to one pixel of the overview.
_LEAST_PX = 3
#: OpenSlide reads about a tenth as many pixels per second as a scaled decode passes over.
_OPENSLIDE_COST = 10.0
#: Factors of exact means, and by how many bits a sum of so many pixels squared is shifted.
_MEAN_FACTORS = {2: 2, 4: 4}
_RGB, _RGBX, _MEAN, _SCALED = "rgb", "rgbx", "mean", "scaled"


class TiledJpegReader:
    """Level 0 of a tiled JPEG TIFF. One thread at a time; :meth:`another` gives each thread its own.

    Args:
        directory: where the tiles lie.
        facts: those of OpenSlide for the same file.

    Raises:
        SlideError: ``unreadable``, the file cannot be opened any more.
    """

    can_halve = True

    def __init__(self, directory: JpegDirectory, facts: SlideFacts, choice: ReaderChoice) -> None:
        self.facts, self.choice, self.directory = facts, choice, directory
        self._file = -1
        try:
            self._file = os.open(directory.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise SlideError(
                "unreadable", f"{directory.path}: {error.strerror}", "check the rights of the file and its disk"
            ) from None
        self._cache = _TileCache(CACHE_BYTES)
        self._kind: tuple[str, int] = ("", 0)

    def read_level0(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Region of level 0 as uint8 (height, width, 3); what lies outside the slide is white.

        Raises:
            SlideError: ``unreadable``, a tile of the region is damaged or missing from the file.
        """
        self._use(_RGB, 1)
        return self._region(x, y, width, height, 3)

    def read_rgbx(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """The same as uint8 (height, width, 4) with a byte of padding: one pixel in 32 bits, as resizing wants it."""
        self._use(_RGBX, 1)
        return self._region(x, y, width, height, 4)

    def read_mean(self, x: int, y: int, width: int, height: int, factor: int) -> np.ndarray | None:
        """Exact area mean over ``factor`` x ``factor`` pixels, uint8 (height / factor, width / factor, 3).

        Bit for bit Pillow's ``reduce`` of the region, but each native tile is averaged once. None for factors other
        than 2 and 4, where native tiles do not divide so, or where the region reaches outside the slide.
        """
        table = self.directory
        if factor not in _MEAN_FACTORS:
            return None
        if any(n % factor for n in (x, y, width, height, table.tile_w, table.tile_h)):
            return None
        if x < 0 or y < 0 or x + width > table.width_px or y + height > table.height_px:
            return None
        self._use(_MEAN, factor)
        return self._region(x // factor, y // factor, width // factor, height // factor, 3)

    def read_half(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Region of level 0 at half size, uint8 (height / 2, width / 2, 3), from the low DCT frequencies.

        Within about 5 grey levels of the mean of 2 x 2 pixels, at less than half the cost. All numbers must be even.

        Raises:
            SlideError: ``unreadable``; ``no_half_decode`` for odd numbers.
        """
        if any(n % 2 for n in (x, y, width, height)):
            raise SlideError(
                "no_half_decode",
                f"{self.directory.path}: half-size decoding needs even places and sizes, not {width} x {height} px "
                f"at ({x}, {y})",
                "set tiling.half_decode to false",
            )
        self._use(_SCALED, 2)
        return self._region(x // 2, y // 2, width // 2, height // 2, 3)

    def overview(self, width: int, height: int) -> np.ndarray:
        """The whole slide area-averaged to uint8 (height, width, 3).

        Through OpenSlide's pyramid where the file has one. Without a pyramid every tile of level 0 is decoded, at
        1/8, 1/4 or 1/2 of its size where at least three of those pixels make one of the overview.
        """
        facts, table = self.facts, self.directory
        down = facts.level_downsamples[level_for(facts, width, height)]
        factor = min(facts.width_px / width, facts.height_px / height)
        scale = next((s for s in _SCALES if s * _LEAST_PX <= factor * TOLERANCE), 1)
        if down**2 >= _OPENSLIDE_COST:
            with OpenSlideReader(facts.path, self.choice) as pyramid:
                return pyramid.overview(width, height)
        self._use(_SCALED if scale > 1 else _RGB, scale)

        def read(x: int, y: int, w: int, h: int) -> Image.Image:
            return Image.fromarray(self._region(x, y, w, h, 3))

        return area_mean(read, table.width_px / scale, table.height_px / scale, width, height)

    def another(self) -> TiledJpegReader:
        """A second reader of the same file for another thread; the directory is shared."""
        return TiledJpegReader(self.directory, self.facts, self.choice)

    def close(self) -> None:
        """Let go of the file and the decoded tiles."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._cache.clear()

    def __enter__(self) -> TiledJpegReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)

    def _use(self, kind: str, factor: int) -> None:
        """Decoded tiles of one kind at a time are kept."""
        if self._kind == (kind, factor):
            return
        self._kind = (kind, factor)
        table = self.directory
        shape = (table.tile_h // factor, table.tile_w // factor, 4 if kind == _RGBX else 3)
        self._cache.start(shape, table.columns)
        if kind == _MEAN:
            self._whole = np.empty((table.tile_h, table.tile_w, 4), np.uint8)
            self._sums = np.empty((shape[0], table.tile_w * 4), np.uint16)
            self._totals = np.empty(shape[:2], np.uint64)

    def _region(self, x: int, y: int, width: int, height: int, bands: int) -> np.ndarray:
        """Assemble a region from tiles; all numbers in pixels of the kind that is in use."""
        table, cache, factor = self.directory, self._cache, self._kind[1]
        tile_w, tile_h = table.tile_w // factor, table.tile_h // factor
        # A scaled level ends with the pixel that holds the last pixel of level 0.
        left, right = max(x, 0), min(x + width, -(-table.width_px // factor))
        top, bottom = max(y, 0), min(y + height, -(-table.height_px // factor))
        out = np.empty((height, width, bands), np.uint8)
        if (left, top, right, bottom) != (x, y, x + width, y + height):
            out[...] = 255
        if left >= right or top >= bottom:
            return out
        first_column, last_column = left // tile_w, (right - 1) // tile_w
        first_row, last_row = top // tile_h, (bottom - 1) // tile_h
        cache.expect((last_row - first_row + 1) * (last_column - first_column + 1))
        for row in range(first_row, last_row + 1):
            y0, is_last = row * tile_h, row == last_row
            a, b = max(top, y0), min(bottom, y0 + tile_h)
            number = row * table.columns + first_column
            for column in range(first_column, last_column + 1):
                x0 = column * tile_w
                tile = cache.get(number, is_last)
                if tile is None:
                    tile = cache.buffer()
                    self._decode(number, tile)
                    cache.put(number, tile, is_last)
                c, d = max(left, x0), min(right, x0 + tile_w)
                out[a - y : b - y, c - x : d - x] = tile[a - y0 : b - y0, c - x0 : d - x0]
                number += 1
        return out

    def _decode(self, number: int, tile: np.ndarray) -> None:
        """Decode one native tile into ``tile``."""
        table, (kind, factor) = self.directory, self._kind
        count = table.counts[number]
        try:
            data = os.pread(self._file, count, table.offsets[number])
            if len(data) != count:
                raise ValueError("the file ends early")
            stream = tile_stream(table.header, data)
            if kind == _MEAN:
                _expect_shape(simplejpeg.decode_jpeg(stream, "RGBX", buffer=self._whole), self._whole.shape)
                self._mean_into(tile, factor)
            elif kind == _SCALED:
                height, width = tile.shape[:2]
                _expect_shape(
                    simplejpeg.decode_jpeg(
                        stream, "RGB", min_height=height, min_width=width, min_factor=factor, buffer=tile
                    ),
                    tile.shape,
                )
            else:
                colours = "RGB" if kind == _RGB else "RGBX"
                _expect_shape(simplejpeg.decode_jpeg(stream, colours, buffer=tile), tile.shape)
        except (ValueError, OSError) as error:
            row, column = divmod(number, table.columns)
            raise SlideError(
                "unreadable",
                f"{table.path}: the native tile in row {row}, column {column} of level 0 (pixels from "
                f"({column * table.tile_w}, {row * table.tile_h})) cannot be decoded: {error}",
                "fetch the file again and compare its md5, or take the slide out of the sheet",
            ) from None

    def _mean_into(self, tile: np.ndarray, factor: int) -> None:
        """Area mean of the decoded native tile, rounded half up; twice as fast as Pillow's ``reduce`` and a copy.

        Rows are added as 16-bit numbers, then whole pixels (four of them in 64 bits) from left to right.
        """
        height, width = tile.shape[:2]
        rows = self._whole.reshape(height, factor, -1)
        sums, totals = self._sums, self._totals
        np.add(rows[:, 0], rows[:, 1], out=sums, dtype=np.uint16)
        for i in range(2, factor):
            np.add(sums, rows[:, i], out=sums)
        pixels = sums.view(np.uint64)
        np.add(pixels[:, ::factor], pixels[:, 1::factor], out=totals)
        for i in range(2, factor):
            np.add(totals, pixels[:, i::factor], out=totals)
        means = totals.view(np.uint16)
        means += factor * factor // 2
        means >>= _MEAN_FACTORS[factor]
        copy_rgb(means.reshape(height, width, 4), tile)


class _TileCache:
    """Decoded native tiles, bounded in bytes, in buffers that are used again.

    Tiles are asked for from left to right and row by row of larger tiles. The lowest row of native tiles that a
    read touches is ``kept`` for the row below, one row at most; those above it are only ``near``, for the next
    read to the right.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._shape: tuple[int, int, int] = (0, 0, 0)
        self.clear()

    def clear(self) -> None:
        self._kept: dict[int, np.ndarray] = {}
        self._near: dict[int, np.ndarray] = {}
        self._free: list[np.ndarray] = []
        self._most_near = 1

    def start(self, shape: tuple[int, int, int], columns: int) -> None:
        """Forget all and keep tiles of this shape from now on."""
        self.clear()
        self._shape = shape
        # Half of the bytes for each of the two, and at least two tiles.
        self._most = max(1, self._limit_bytes // 2 // (shape[0] * shape[1] * shape[2]))
        self._most_kept = max(1, min(columns + 2, self._most))

    def expect(self, tiles: int) -> None:
        """The next read touches so many tiles."""
        self._most_near = min(tiles, self._most)

    def get(self, number: int, is_last: bool) -> np.ndarray | None:
        tile = self._kept.get(number)
        if tile is None:
            return self._near.get(number)
        if not is_last:  # the row below has come: this was its second and last use
            del self._kept[number]
            self._store(self._near, number, tile, self._most_near)
        return tile

    def buffer(self) -> np.ndarray:
        return self._free.pop() if self._free else np.empty(self._shape, np.uint8)

    def put(self, number: int, tile: np.ndarray, is_last: bool) -> None:
        if is_last:
            self._store(self._kept, number, tile, self._most_kept)
        else:
            self._store(self._near, number, tile, self._most_near)

    def _store(self, part: dict[int, np.ndarray], number: int, tile: np.ndarray, most: int) -> None:
        while len(part) >= most:
            self._free.append(part.pop(next(iter(part))))
        part[number] = tile

    @property
    def n_bytes(self) -> int:
        """Bytes of all tiles and of the buffers that wait."""
        return sum(t.nbytes for t in (*self._kept.values(), *self._near.values(), *self._free))


def _expect_shape(decoded: np.ndarray, shape: tuple[int, ...]) -> None:
    if decoded.shape != shape:
        raise ValueError(f"a stream of {decoded.shape[1]} x {decoded.shape[0]} px, not {shape[1]} x {shape[0]}")
