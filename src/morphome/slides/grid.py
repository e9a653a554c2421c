"""Tile geometry: pure functions from microns per pixel to level-0 coordinates.

A tile is a physical square, ``patch_um = patch_px x mpp_target``; its side in level-0 pixels follows from the true
microns per pixel of the slide, never from a magnification.
"""

from __future__ import annotations

import math

import numpy as np


def round_half_up(value: float) -> int:
    """Nearest whole number, halves upwards (Python's own ``round`` goes to the even neighbour)."""
    return math.floor(value + 0.5)


def side_px(patch_px: int, mpp_target: float, mpp: float, *, even: bool = False) -> int:
    """Side of a tile in level-0 pixels: ``round(patch_px x mpp_target / mpp)``, at least 1.

    Args:
        patch_px: side of the tile as the encoder sees it.
        mpp_target: microns per pixel asked for.
        mpp: microns per pixel of level 0 along this axis.
        even: the nearest even number instead, at least 2, for tiles that are decoded at half size.
    """
    side = patch_px * mpp_target / mpp
    return max(2, 2 * round_half_up(side / 2)) if even else max(1, round_half_up(side))


def mpp_effective(side: int, mpp: float, patch_px: int) -> float:
    """Microns per pixel that the encoder really sees: ``side x mpp / patch_px``."""
    return side * mpp / patch_px


def tile_grid(
    width_px: int,
    height_px: int,
    side_x_px: int,
    side_y_px: int,
    *,
    overlap: float = 0.0,
    bounds: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """Level-0 corners of all tiles that lie wholly inside the slide, int32 (N, 2) as x, y; row-major (y, then x).

    The grid starts at (0, 0) whatever the bounds are, so that a slide keeps its grid when only its bounds change;
    tiles that are not wholly inside ``bounds`` (x, y, width, height) are left out.

    Args:
        overlap: share of a tile's side that it has in common with the next one, 0 <= overlap < 1.

    Raises:
        ValueError: sides below 1 px or an overlap outside [0, 1).
    """
    if side_x_px < 1 or side_y_px < 1 or not 0 <= overlap < 1:
        raise ValueError(f"sides {side_x_px} x {side_y_px} px, overlap {overlap}")
    left, top, w, h = bounds or (0, 0, width_px, height_px)
    xs = _starts(max(left, 0), min(left + w, width_px), side_x_px, overlap)
    ys = _starts(max(top, 0), min(top + h, height_px), side_y_px, overlap)
    grid_y, grid_x = np.meshgrid(ys, xs, indexing="ij")
    return np.stack([grid_x.ravel(), grid_y.ravel()], axis=1).astype(np.int32)


def _starts(low: int, high: int, side: int, overlap: float) -> np.ndarray:
    stride = max(1, round_half_up(side * (1 - overlap)))
    first = -(-low // stride) * stride
    return np.arange(first, high - side + 1, stride, dtype=np.int64)


def area_share(
    mask: np.ndarray, coords: np.ndarray, side_x_px: int, side_y_px: int, width_px: int, height_px: int
) -> np.ndarray:
    """Share of each tile's area that is set in a coarse mask, float32 (N,) in [0, 1].

    Exact for the mask taken as constant in each of its pixels: the integral image is linear between its nodes, so
    that interpolating it at the tile's corners is the area itself, whatever fraction of a mask pixel is cut.

    Args:
        mask: bool (h, w) that covers the whole slide.
        coords: int (N, 2) level-0 x, y.
        width_px, height_px: size of level 0.
    """
    if len(coords) == 0:
        return np.zeros(0, np.float32)
    rows, columns = mask.shape
    integral = np.zeros((rows + 1, columns + 1))
    integral[1:, 1:] = mask.cumsum(0, dtype=np.float64).cumsum(1)
    x0, y0 = coords[:, 0] * (columns / width_px), coords[:, 1] * (rows / height_px)
    x1, y1 = x0 + side_x_px * (columns / width_px), y0 + side_y_px * (rows / height_px)
    total = (
        _between(integral, y1, x1)
        - _between(integral, y0, x1)
        - _between(integral, y1, x0)
        + _between(integral, y0, x0)
    )
    return np.clip(total / ((x1 - x0) * (y1 - y0)), 0, 1).astype(np.float32)


def _between(integral: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear value of the integral image at fractional nodes."""
    row = np.clip(np.floor(y).astype(int), 0, integral.shape[0] - 2)
    column = np.clip(np.floor(x).astype(int), 0, integral.shape[1] - 2)
    fy, fx = np.clip(y - row, 0, 1), np.clip(x - column, 0, 1)
    upper = integral[row, column] * (1 - fx) + integral[row, column + 1] * fx
    lower = integral[row + 1, column] * (1 - fx) + integral[row + 1, column + 1] * fx
    return upper * (1 - fy) + lower * fy
