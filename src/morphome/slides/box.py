"""Pillow's box resize of a tile, bit for bit, in half its time, for tiles that shrink by a factor below three.

Most slides are no whole multiple of the resolution asked for (508 or 519 level-0 pixels to 256), and Pillow's general
resize then costs as much as the decoding. Here an output pixel is the mean of one, two or three pixels along each
axis. Two packed RGBX pixels are averaged at once in 32 bits; the few means of three are taken apart.
"""

from __future__ import annotations

import functools
import threading

import numpy as np

#: More pixels than this per output pixel and axis are left to Pillow.
MOST_TAPS = 3
#: Sides may differ by this share, the anisotropy up to which a slide is used.
MOST_UNEQUAL = 0.05
#: Pillow's fixed-point weights have so many bits (8 bits of a pixel and 2 of headroom less than 32).
_BITS = 22
_THIRD = int(0.5 + (1 << _BITS) / 3)
_HALVES = np.uint32(0xFEFEFEFE)
_ONE = np.uint32(1)
_LOCAL = threading.local()


def can_box(width: int, height: int, patch_px: int) -> bool:
    """Whether :func:`box_resize` takes a region of this size."""
    # Pillow 13 takes columns first where a region is much higher than wide; no slide that is used is.
    square = abs(width - height) <= MOST_UNEQUAL * min(width, height)
    return square and max(width, height) <= MOST_TAPS * patch_px and min(width, height) >= patch_px


def box_resize(region: np.ndarray, patch_px: int) -> np.ndarray:
    """Resize a contiguous uint8 (H, W, 4) region to uint8 (patch_px, patch_px, 3).

    The same numbers as ``PIL.Image.resize(..., BOX)``: first along rows, rounded to 8 bits, then along columns.
    """
    height, width = region.shape[:2]
    wide, tall = _work(height, patch_px), _work(patch_px, patch_px)
    rows = _shrink(region.view(np.uint32)[..., 0], 1, taps(width, patch_px), wide)
    small = _shrink(rows, 0, taps(height, patch_px), tall)
    pixels = small.view(np.uint8).reshape(patch_px, patch_px, 4)
    out = np.empty((patch_px, patch_px, 3), np.uint8)
    copy_rgb(pixels, out)
    return out


def copy_rgb(rgbx: np.ndarray, out: np.ndarray) -> None:
    """The first three bands of (H, W, 4) into uint8 (H, W, 3), several times faster than one assignment."""
    for band in range(3):
        out[..., band] = rgbx[..., band]


@functools.cache
def taps(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which pixels make an output pixel, as Pillow decides it: those whose centre lies in it.

    Returns:
        First pixel of each output pixel, second (the first again where there is only one), and the numbers of the
        output pixels that have three.
    """
    scale = n_in / n_out
    centre = (np.arange(n_out) + 0.5) * scale
    low = np.maximum((centre - 0.5 * scale + 0.5).astype(np.intp), 0)
    high = np.minimum((centre + 0.5 * scale + 0.5).astype(np.intp), n_in)
    # Rounding may give a pixel too many on either side; its weight is then 0.
    low += (low - centre + 0.5) * (1 / scale) <= -0.5
    high -= (high - 1 - centre + 0.5) * (1 / scale) > 0.5
    return low, np.minimum(low + 1, high - 1), np.flatnonzero(high - low == MOST_TAPS)


def _shrink(
    packed: np.ndarray, axis: int, chosen: tuple[np.ndarray, np.ndarray, np.ndarray], work: tuple[np.ndarray, ...]
) -> np.ndarray:
    """Means along one axis of packed RGBX pixels, uint32; the result is the first of ``work``."""
    first, second, three = chosen
    mean, other, spare = work
    packed.take(first, axis, out=mean, mode="clip")
    packed.take(second, axis, out=other, mode="clip")
    # (a + b + 1) >> 1 in every byte: a | b less half of the bits in which they differ.
    np.bitwise_xor(mean, other, out=spare)
    np.bitwise_and(spare, _HALVES, out=spare)
    np.right_shift(spare, _ONE, out=spare)
    np.bitwise_or(mean, other, out=mean)
    np.subtract(mean, spare, out=mean)
    if len(three):
        total = sum(_bytes(packed.take(first[three] + i, axis)) for i in range(MOST_TAPS))
        exact = ((total * np.uint32(_THIRD) + np.uint32(1 << (_BITS - 1))) >> np.uint32(_BITS)).astype(np.uint8)
        at = (slice(None), three) if axis else (three, slice(None))
        mean[at] = exact.view(np.uint32)[..., 0]
    return mean


def _bytes(packed: np.ndarray) -> np.ndarray:
    return packed.view(np.uint8).reshape(*packed.shape, 4).astype(np.uint32)


def _work(rows: int, columns: int) -> tuple[np.ndarray, ...]:
    """Three buffers of this thread, used again for every tile: new memory would cost more than the arithmetic."""
    kept = _LOCAL.__dict__.setdefault("kept", {})
    if (rows, columns) not in kept:
        if len(kept) > 4:  # another slide has other sizes
            kept.clear()
        kept[rows, columns] = tuple(np.empty((rows, columns), np.uint32) for _ in range(3))
    return kept[rows, columns]
