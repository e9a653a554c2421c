"""From level-0 regions to tiles of the encoder's size: one read, one resize, and no tile lost in silence."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from morphome.slides.box import box_resize, can_box, copy_rgb
from morphome.slides.reader import SlideError, SlideReader

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

#: Most tiles of one block: 64 tiles of 256 px are 12.6 MB.
BLOCK_TILES = 64


@dataclass(frozen=True)
class PatchShape:
    """How a tile is read and resized.

    Attributes:
        side_x_px, side_y_px: size at level 0.
        patch_px: side of the finished tile, which is square.
        half: decode JPEG tiles at half their size (the 4 x 4 low frequencies of each 8 x 8 block), then resize.
    """

    side_x_px: int
    side_y_px: int
    patch_px: int
    half: bool = False

    @property
    def name(self) -> str:
        """The resize in one word for the record: :func:`resize_name`, with ``half+`` before it for half decode."""
        if self.half:
            return "half+" + resize_name(self.side_x_px // 2, self.side_y_px // 2, self.patch_px)
        return resize_name(self.side_x_px, self.side_y_px, self.patch_px)


@dataclass(frozen=True)
class Block:
    """Tiles that were read together.

    Attributes:
        tiles: uint8 (n, patch_px, patch_px, 3), those that could be read, in order.
        ok: bool (m,), which of the m tiles that were asked for these are.
        seconds: time that the reading took.
        n_retried: tiles that were read a second time.
    """

    tiles: np.ndarray
    ok: np.ndarray
    seconds: float
    n_retried: int


def read_patch(reader: SlideReader, x: int, y: int, shape: PatchShape) -> np.ndarray:
    """One tile with its upper left corner at level-0 ``x``, ``y``: one read, one resize.

    The pixels do not depend on the reader: its shortcuts (``read_mean``, ``read_rgbx``) only save copies.

    Returns:
        uint8 (patch_px, patch_px, 3).

    Raises:
        SlideError: the region cannot be read; ``no_half_decode`` where half decode is asked of a reader without it.
    """
    width, height, patch_px = shape.side_x_px, shape.side_y_px, shape.patch_px
    if shape.half:
        if not getattr(reader, "can_halve", False):
            raise _no_half_decode(reader)
        return resize_patch(reader.read_half(x, y, width, height), patch_px)
    name = resize_name(width, height, patch_px)
    if name == "none" or not hasattr(reader, "read_rgbx"):
        return resize_patch(reader.read_level0(x, y, width, height), patch_px)
    if name == "reduce" and width == height and hasattr(reader, "read_mean"):
        patch = reader.read_mean(x, y, width, height, width // patch_px)
        if patch is not None:
            return patch
    region = reader.read_rgbx(x, y, width, height)
    if name == "box" and can_box(width, height, patch_px):
        return box_resize(region, patch_px)
    return _resize(Image.frombuffer("RGBX", (width, height), region, "raw", "RGBX", 0, 1), name, patch_px)


def row_blocks(coords: ArrayLike, max_tiles: int = BLOCK_TILES) -> list[slice]:
    """Consecutive runs of a row-major tile list whose tiles share rows of native tiles.

    Whole rows of tiles go together while they fit; a row longer than ``max_tiles`` is cut into equal parts. One after
    the other the slices cover the list, so the order of tiles is kept.

    Args:
        coords: (N, 2) level-0 x, y, sorted by y, then x.
    """
    y = np.asarray(coords).reshape(-1, 2)[:, 1]
    starts = np.flatnonzero(np.diff(y, prepend=np.nan)).tolist()
    blocks: list[slice] = []
    begin = 0  # of the block that is being filled
    for start, end in itertools.pairwise([*starts, len(y)]):
        if end - begin > max_tiles and start > begin:
            blocks.append(slice(begin, start))
            begin = start
        if end - start > max_tiles:
            parts = -(-(end - start) // max_tiles)
            cuts = [start + (end - start) * i // parts for i in range(parts + 1)]
            blocks += [slice(a, b) for a, b in itertools.pairwise(cuts)]
            begin = end
    if begin < len(y):
        blocks.append(slice(begin, len(y)))
    return blocks


def read_block(reader: SlideReader, coords: ArrayLike, shape: PatchShape, retry: Callable[[], SlideReader]) -> Block:
    """Read tiles one after the other.

    A tile that fails is tried once more with ``retry()``, a fresh OpenSlide reader, then left out and marked in
    ``ok``; it is never replaced by white.

    Args:
        coords: (m, 2) level-0 x, y.
    """
    started = time.perf_counter()
    places = np.asarray(coords).reshape(-1, 2).tolist()
    tiles = np.empty((len(places), shape.patch_px, shape.patch_px, 3), np.uint8)
    ok = np.zeros(len(places), bool)
    n_read = n_retried = 0
    for i, (x, y) in enumerate(places):
        try:
            tiles[n_read] = read_patch(reader, x, y, shape)
        except SlideError:
            n_retried += 1
            try:
                with retry() as fresh:
                    tiles[n_read] = read_patch(fresh, x, y, shape)
            except SlideError:
                continue
        ok[i] = True
        n_read += 1
    return Block(tiles[:n_read], ok, time.perf_counter() - started, n_retried)


def resize_patch(region: np.ndarray, patch_px: int) -> np.ndarray:
    """Resize uint8 (H, W, 3) to (patch_px, patch_px, 3) in one step, by the filter of :func:`resize_name`."""
    height, width = region.shape[:2]
    name = resize_name(width, height, patch_px)
    return region if name == "none" else _resize(Image.fromarray(region), name, patch_px)


def _resize(image: Image.Image, name: str, patch_px: int) -> np.ndarray:
    """The filter ``name`` on an RGB or RGBX picture."""
    if name == "reduce":
        small = image.reduce((image.width // patch_px, image.height // patch_px))
    else:
        filters = {"box": Image.Resampling.BOX, "bilinear": Image.Resampling.BILINEAR}
        small = image.resize((patch_px, patch_px), filters[name])
    pixels = np.asarray(small)
    if small.mode == "RGB":
        return pixels
    out = np.empty((patch_px, patch_px, 3), np.uint8)
    copy_rgb(pixels, out)
    return out


def _no_half_decode(reader: SlideReader) -> SlideError:
    why = f" ({reader.choice.reason})" if reader.choice.reason else ""
    return SlideError(
        "no_half_decode",
        f"{reader.facts.path}: tiling.half_decode asks for half-size JPEG decoding, which the reader "
        f"'{reader.choice.name}' does not have{why}",
        "set tiling.half_decode to false, or take the slide out of the sheet",
    )


def resize_name(side_x_px: int, side_y_px: int, patch_px: int) -> str:
    """Which filter brings a region to the patch size.

    ``none``; ``reduce``, the exact area mean over whole pixels; ``box``, the area mean where a pixel belongs to
    the one output pixel that holds its centre; ``bilinear`` where the region is smaller than the patch.
    """
    if side_x_px == side_y_px == patch_px:
        return "none"
    if side_x_px % patch_px == 0 and side_y_px % patch_px == 0:
        return "reduce"
    return "box" if min(side_x_px, side_y_px) >= patch_px else "bilinear"
