"""Folds and blood, found on the overview at the resolution of the mask: rough, and without reading more pixels.

Both are judged against the slide's own stain, so that a dark section is not all fold and a red one not all blood.
They are shares to look at and, where asked, limits; they are no segmentation of lesions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from morphome.slides.pen import EIGHT

if TYPE_CHECKING:
    from morphome.slides.tissue import Overview

#: A fold is as dark and saturated as this slide's median tissue would be in this many layers.
FOLD_LAYERS = 1.6
#: Saturation minus brightness below which nothing is a fold, however pale the slide.
FOLD_FLOOR = 0.0
#: Blood is at least this saturated, or this many times as saturated as the median tissue, whichever is more; but a
#: slide full of blood must not hide it.
BLOOD_SATURATION, BLOOD_TIMES_MEDIAN, BLOOD_SATURATION_MOST = 0.45, 1.2, 0.6
#: Red cells let red light through (share of the glass's); haematoxylin does not.
BLOOD_RED = 0.55
#: Smaller spots are nuclei in clumps, pigment or capillaries.
MIN_MM2 = 0.002


def find_folds(overview: Overview, tissue: np.ndarray) -> np.ndarray:
    """Folds and other dark, dense tissue: bool (h, w), within ``tissue``.

    Light falls with each layer of tissue (Beer-Lambert), so that a fold is darker and more saturated at once:
    saturation minus brightness (Bautista and Yagi, J Pathol Inform 2010;1:25; with a limit per slide as in Kothari et
    al., J Pathol Inform 2013;4:22). The limit here is that of the slide's median tissue in :data:`FOLD_LAYERS` layers.
    Crowded nuclei are dark as well and can be taken for a fold on a slide that is mostly pale.
    """
    tissue = tissue & ~overview.pen
    if not tissue.any():
        return tissue
    through = median_colour(overview, tissue) / 255.0
    limit = max(FOLD_FLOOR, _saturation_minus_brightness(through**FOLD_LAYERS))
    value = overview.rgb.max(axis=2) / np.float32(255)
    dark = ndimage.median_filter(overview.saturation - value, 3, mode="nearest")  # single nuclei are no fold
    return _large(tissue & (dark > limit), MIN_MM2 / overview.pixel_mm2)


def find_blood(overview: Overview, tissue: np.ndarray) -> np.ndarray:
    """Blood: bool (h, w), within ``tissue``; red to orange, saturated, and letting red through.

    Red cells take eosin and no haematoxylin, and haemoglobin absorbs blue: their hue lies near pure red (345 to 25
    degrees), that of eosin alone in the pinks (320 to 345 degrees).
    """
    tissue = tissue & ~overview.pen
    if not tissue.any():
        return tissue
    red, green, blue = (overview.rgb[..., i].astype(np.int16) for i in range(3))
    spread = np.maximum(red - np.minimum(green, blue), 1)
    hue = (red > green) & (red > blue) & (blue - green < 0.25 * spread) & (green - blue < 0.42 * spread)
    median = float(np.median(overview.saturation[tissue]))
    limit = min(max(BLOOD_SATURATION, BLOOD_TIMES_MEDIAN * median), BLOOD_SATURATION_MOST)
    blood = tissue & hue & (overview.saturation > limit) & (red > BLOOD_RED * 255)
    return _large(blood, MIN_MM2 / overview.pixel_mm2)


def median_colour(overview: Overview, tissue: np.ndarray) -> np.ndarray:
    """Median red, green and blue of the tissue, float (3,)."""
    return np.median(overview.rgb[tissue].astype(np.float32), axis=0)


def _saturation_minus_brightness(through: np.ndarray) -> float:
    return float(1 - through.min() / through.max() - through.max())


def _large(mask: np.ndarray, min_px: float) -> np.ndarray:
    """Pieces (8-connected) of at least ``min_px`` pixels."""
    labels, _ = ndimage.label(mask, EIGHT)
    keep = np.bincount(labels.ravel()) >= min_px
    keep[0] = False
    return keep[labels]
