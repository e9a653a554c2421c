"""From level-0 regions to tiles of the encoder's size: one read, one resize."""

from __future__ import annotations

import numpy as np
from PIL import Image

from morphome.slides.reader import SlideReader


def read_patch(reader: SlideReader, x: int, y: int, side_x_px: int, side_y_px: int, patch_px: int) -> np.ndarray:
    """One tile: ``side_x_px`` x ``side_y_px`` at level 0, one resize, uint8 (patch_px, patch_px, 3).

    Raises:
        SlideError: the region cannot be read.
    """
    return resize_patch(reader.read_level0(x, y, side_x_px, side_y_px), patch_px)


def resize_patch(region: np.ndarray, patch_px: int) -> np.ndarray:
    """Resize uint8 (H, W, 3) to (patch_px, patch_px, 3) in one step, by the filter of :func:`resize_name`."""
    height, width = region.shape[:2]
    name = resize_name(width, height, patch_px)
    if name == "none":
        return region
    image = Image.fromarray(region)
    if name == "reduce":
        return np.asarray(image.reduce((width // patch_px, height // patch_px)))
    filters = {"box": Image.Resampling.BOX, "bilinear": Image.Resampling.BILINEAR}
    return np.asarray(image.resize((patch_px, patch_px), filters[name]))


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
