"""Marker ink on a slide, told from stain by its hue.

Haematoxylin and eosin lie between violet and pink (hues of about 250 to 350 degrees). Ink is told by hues outside
that range, or by a saturation that a stained section does not reach at several microns per pixel. A strong core makes
a pen mark; its paler rim is taken with it. Transparent light-blue ink over tissue looks like haematoxylin and stays.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

#: Ink is drawn: smaller spots of its colours are nuclei, pigment or blood.
PEN_MIN_MM2 = 0.01
#: A paler pixel of an ink's colour belongs to a mark that is at most this far away.
PEN_RIM_UM = 120.0
#: Grown round the mark at last: the rim that is too pale for any colour.
PEN_MARGIN_UM = 16.0
EIGHT = np.ones((3, 3), bool)


def find_pen(rgb: np.ndarray, saturation: np.ndarray, value: np.ndarray, um_x: float, um_y: float) -> np.ndarray:
    """Marker ink, bool (h, w): blue, green, red and black over an area that only a pen covers.

    Args:
        rgb: uint8 (h, w, 3), the glass already made neutral.
        saturation: HSV saturation in [0, 1], float (h, w).
        value: largest channel, uint8 (h, w).
        um_x, um_y: microns per pixel.
    """
    strong, weak = _ink_colours(rgb, saturation, value)
    if not strong.any():
        return strong
    near = ndimage.maximum_filter(strong, window(PEN_RIM_UM / um_x, PEN_RIM_UM / um_y), mode="constant")
    labels, _ = ndimage.label(strong | (weak & near), EIGHT)
    area_mm2 = np.bincount(labels.ravel(), weights=strong.ravel()) * (um_x * um_y * 1e-6)
    drawn = area_mm2 >= PEN_MIN_MM2
    drawn[0] = False
    ink = drawn[labels]
    if not ink.any():
        return ink
    return ndimage.maximum_filter(ink, window(PEN_MARGIN_UM / um_x, PEN_MARGIN_UM / um_y), mode="constant")


def _ink_colours(rgb: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that only ink has, and paler ones of the same hues; each bool (h, w)."""
    red, green, blue = (rgb[..., i].astype(np.int16) for i in range(3))
    spread = np.maximum(value.astype(np.int16) - rgb.min(axis=2), 1)
    greenish = (green >= red) & (green >= blue - 10)
    # Hue of 190 to 245 degrees: blue leads, and green is nearer to blue than violet allows. The pale half of that
    # range is haematoxylin as well (a section without eosin), so that it needs a hue below 220 degrees.
    blueish = (blue > green) & (green - red > -0.08 * spread)
    cyan = (blue >= green) & (green - red > 0.33 * spread)
    reddish = (red > green) & (blue - green < 0.35 * spread)
    strong = greenish & (saturation > 0.25)
    strong |= (blueish & (saturation > 0.45)) | (cyan & (saturation > 0.25))
    strong |= reddish & (saturation > 0.7) & (value > 110)
    strong |= (value < 72) & (saturation < 0.4)
    weak = greenish & (saturation > 0.08)
    weak |= blueish & (saturation > 0.10)
    weak |= reddish & (blue - green < 0.15 * spread) & (saturation > 0.12)
    weak |= (value < 150) & (saturation < 0.2)
    return strong, weak


def window(radius_x: float, radius_y: float) -> tuple[int, int]:
    """Rows and columns of a rectangle with these radii in pixels; odd."""
    return 2 * max(0, round(radius_y)) + 1, 2 * max(0, round(radius_x)) + 1
