"""Where tissue lies on a brightfield slide: deterministic, on the CPU, without weights.

The colour of the slide's own glass is divided out first: a yellow or blue cast then is no stain, and what stays is
light let through by the section (its saturation is the spread of the optical densities of the channels). Tissue is
what is coloured and not ink: saturation above a threshold between the noise of the glass and half of Otsu's
threshold (Otsu 1979). Then closing, small holes filled, small fragments dropped; all lengths and areas are physical.

Adipose tissue is thin walls round clear lumens. Its walls are tissue, its lumens are not, so that a tile of fat has a
small share of tissue; a piece of fat stays whole for the fragment rule although its walls are broken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import ndimage

from morphome.slides.pen import EIGHT, find_pen, window
from morphome.slides.reader import SlideError

#: The threshold of the saturation (0 to 1) is held between these: JPEG noise, smears and the other tint of the glass
#: beyond the cover slip stay below the floor (painted slides: 0.034), pale stroma above the ceiling.
SATURATION_FLOOR, SATURATION_CEILING = 0.045, 0.08
#: Closing bridges gaps of up to twice this.
CLOSING_UM = 16.0
#: Pieces nearer than this to one another are one fragment: the broken walls of fat.
JOIN_UM = 32.0
#: Gaps are closed and small holes filled where, within 1.5 sides of the largest small hole (at least this distance),
#: tissue with its gaps closed is at least this share of tissue and small holes: round a vessel or a gland, not in fat
#: (0.57 to 0.66 on painted slides).
DENSE_UM, DENSE_SHARE = 150.0, 0.85
#: The edge of a cover slip is straight: at least this long, and no further (standard deviation) from a line than this.
LINE_LENGTH_UM, LINE_WIDTH_UM = 1000.0, 25.0
#: Brightness (largest channel, 0 to 255) of the background of a brightfield slide.
DARK_BACKGROUND = 90
#: Glass is at least this bright, and its cast at most this strong.
GLASS_VALUE, GLASS_SATURATION = 170, 0.22
#: Brightness of the glass once its colour is divided out.
CLEAR = 245


@dataclass(frozen=True)
class Overview:
    """An overview made ready: glass neutral, ink found.

    Attributes:
        rgb: uint8 (h, w, 3), divided by the colour of the glass.
        saturation: float32 (h, w) in [0, 1].
        pen: bool (h, w), ink.
        glass: red, green, blue of the glass as scanned; 255 where the slide shows none.
        um_x, um_y: microns per pixel.
    """

    rgb: np.ndarray
    saturation: np.ndarray
    pen: np.ndarray
    glass: tuple[float, float, float]
    um_x: float
    um_y: float

    @property
    def pixel_mm2(self) -> float:
        """Area of a pixel."""
        return self.um_x * self.um_y * 1e-6


@dataclass(frozen=True)
class TissueMask:
    """Tissue and ink on the mask grid, which covers the whole slide.

    Attributes:
        mask: bool (h, w); True where there is tissue.
        pen: bool (h, w); True where there is ink.
        pixel_mm2: area of a mask pixel.
        saturation_threshold: of this slide; NaN where the mask was not made by it.
        n_fragments: pieces of tissue.
        n_holes: holes of the tissue.
        source: ``made`` here, ``geojson`` or the name of a learned segmenter.
        overview: what the mask was made from.
    """

    mask: np.ndarray
    pen: np.ndarray
    pixel_mm2: float
    saturation_threshold: float
    n_fragments: int
    n_holes: int = 0
    source: str = "made"
    overview: Overview | None = field(default=None, repr=False)

    @property
    def tissue_mm2(self) -> float:
        """Area of tissue."""
        return float(self.mask.sum()) * self.pixel_mm2

    @property
    def tissue_fraction(self) -> float:
        """Share of the slide's area that is tissue."""
        return float(self.mask.mean())

    @property
    def pen_fraction(self) -> float:
        """Share of the slide's area that is ink."""
        return float(self.pen.mean())

    @property
    def sha256(self) -> str:
        """Hash of the mask and its shape."""
        return hashlib.sha256(repr(self.mask.shape).encode() + np.packbits(self.mask).tobytes()).hexdigest()


def find_tissue(rgb: np.ndarray, um_x: float, um_y: float, tiling: Mapping[str, Any]) -> TissueMask:
    """Tissue mask of an overview by its saturation.

    Args:
        rgb: uint8 (h, w, 3), the whole slide.
        um_x, um_y: microns per pixel of the overview.
        tiling: ``min_fragment_mm2`` and ``max_hole_mm2``.

    Raises:
        SlideError: ``not_brightfield``.
    """
    overview = prepare(rgb, um_x, um_y)
    mask, threshold = saturation_mask(overview)
    return tidy_mask(mask, overview, tiling, threshold)


def prepare(rgb: np.ndarray, um_x: float, um_y: float) -> Overview:
    """Make the glass neutral and find the ink.

    Raises:
        SlideError: ``not_brightfield``.
    """
    glass = glass_colour(rgb)
    check_brightfield(rgb, glass)
    clear = divide_glass(rgb, glass)
    saturation, value = saturation_value(clear)
    return Overview(clear, saturation, find_pen(clear, saturation, value, um_x, um_y), glass, um_x, um_y)


def saturation_mask(overview: Overview) -> tuple[np.ndarray, float]:
    """Coloured pixels that are no ink, and the threshold that told them from glass."""
    threshold = saturation_threshold(overview.saturation[~overview.pen])
    return (overview.saturation > threshold) & ~overview.pen, threshold


def tidy_mask(
    mask: np.ndarray, overview: Overview, tiling: Mapping[str, Any], threshold: float = np.nan, source: str = "made"
) -> TissueMask:
    """Take out ink, close gaps and fill small holes of dense tissue, drop small fragments."""
    um, pixel_mm2 = (overview.um_x, overview.um_y), overview.pixel_mm2
    mask = mask & ~overview.pen
    mask = fill_gaps(mask, tiling["max_hole_mm2"] / pixel_mm2, *um) & ~overview.pen
    mask = drop_lines(mask, *um)
    mask, n = drop_fragments(mask, tiling["min_fragment_mm2"] / pixel_mm2, window(*(JOIN_UM / 2 / u for u in um)))
    return TissueMask(mask, overview.pen, pixel_mm2, threshold, n, count_holes(mask), source, overview)


def glass_colour(rgb: np.ndarray) -> tuple[float, float, float]:
    """Colour of the empty glass: median of the brightest even, hardly coloured pixels.

    Pure white is left out where there is other glass: scanners fill what they did not scan with it. Light through
    glass may look yellow, blue or green, but not pink: a pink "glass" is pale tissue that covers the whole picture.

    Returns:
        red, green, blue; (255, 255, 255), no correction, where the slide shows no glass.
    """
    saturation, value = saturation_value(rgb)
    green = rgb[..., 1]
    even = ndimage.maximum_filter(green, 3).astype(np.int16) - ndimage.minimum_filter(green, 3) <= 14
    glass = even & (value >= GLASS_VALUE) & (saturation <= GLASS_SATURATION)
    scanned = glass & (rgb.min(axis=2) < 253)
    glass = scanned if scanned.sum() >= 0.01 * rgb[..., 0].size else glass
    if glass.sum() < 0.002 * glass.size:
        return 255.0, 255.0, 255.0
    pixels = rgb[glass].astype(np.float32)
    light = pixels.mean(axis=1)
    bright = np.median(pixels[light >= np.quantile(light, 0.98) - 10], axis=0)
    if bright[1] < 0.975 * min(bright[0], bright[2]):
        return 255.0, 255.0, 255.0
    return float(bright[0]), float(bright[1]), float(bright[2])


def divide_glass(rgb: np.ndarray, glass: tuple[float, float, float]) -> np.ndarray:
    """Light let through by the section, as uint8 with the glass at :data:`CLEAR`; unchanged where glass is 255."""
    if min(glass) >= 255:
        return rgb
    levels = np.arange(256)[:, None] * (CLEAR / np.asarray(glass))
    table = np.clip(levels + 0.5, 0, 255).astype(np.uint8)
    return np.stack([table[rgb[..., i], i] for i in range(3)], axis=2)


def check_brightfield(rgb: np.ndarray, glass: tuple[float, float, float] = (255.0, 255.0, 255.0)) -> None:
    """Refuse fluorescence (dark background) and slides without any colour (phase contrast, darkfield).

    Raises:
        SlideError: ``not_brightfield``.
    """
    saturation, value = saturation_value(rgb)
    dark = float((value < DARK_BACKGROUND / 2).mean())
    if dark > 0.5 or float(np.quantile(value, 0.9)) < DARK_BACKGROUND:
        raise SlideError(
            "not_brightfield",
            f"the background is dark ({dark:.0%} of the slide is nearly black): fluorescence?",
            "take the slide out of the sheet; only stained brightfield slides can be tiled",
        )
    grey = value < min(215, 0.9 * max(glass))
    if grey.mean() > 0.05 and float(np.quantile(saturation[grey], 0.9)) < 0.04:
        raise SlideError(
            "not_brightfield",
            f"{grey.mean():.0%} of the slide is grey and nothing has colour: unstained or phase contrast?",
            "take the slide out of the sheet; only stained brightfield slides can be tiled",
        )


def saturation_value(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """HSV saturation in [0, 1] as float32 and value as uint8, each (h, w)."""
    value, least = rgb.max(axis=2), rgb.min(axis=2)
    return (value - least).astype(np.float32) / np.maximum(value, 1), value


def saturation_threshold(saturation: np.ndarray) -> float:
    """Half of Otsu's threshold over 256 bins of [0, 1], held between the floor and the ceiling.

    Otsu lies midway between glass and the mean of the tissue; half of it keeps what is stained a quarter as much.
    """
    counts = np.bincount((saturation.ravel() * 255 + 0.5).astype(np.intp), minlength=256)[:256].astype(float)
    below = counts.cumsum()
    above = below[-1] - below
    total = (counts * np.arange(256)).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    best = float(np.argmax(np.nan_to_num(between))) / 255 if len(saturation) else 0.0
    return min(max(best / 2, SATURATION_FLOOR), SATURATION_CEILING)


def fill_gaps(mask: np.ndarray, max_hole_px: float, um_x: float, um_y: float) -> np.ndarray:
    """Close narrow gaps and fill small holes of dense tissue; the lumens of fat stay open."""
    closed = _close(mask, CLOSING_UM / um_x, CLOSING_UM / um_y)
    labels, small = small_holes(closed, max_hole_px)
    either = closed | small[labels]
    reach = max(DENSE_UM, 1.5 * (max_hole_px * um_x * um_y) ** 0.5)
    size = window(reach / um_x, reach / um_y)
    tissue, whole = (ndimage.uniform_filter(m.astype(np.float32), size, mode="constant") for m in (closed, either))
    share = tissue / np.maximum(whole, 1e-6)
    mean = np.bincount(labels.ravel(), weights=share.ravel()) / np.bincount(labels.ravel()).clip(1)
    return mask | (closed & (share >= DENSE_SHARE)) | (small & (mean >= DENSE_SHARE))[labels]


def small_holes(mask: np.ndarray, max_px: float) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of background (4-connected) as labels, int (h, w), and which of them are holes of ``max_px`` at most.

    A piece that touches the border of the picture is no hole.
    """
    labels, _ = ndimage.label(~mask)
    small = np.bincount(labels.ravel()) <= max_px
    small[0] = False
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    small[np.unique(edge)] = False
    return labels, small


def drop_fragments(mask: np.ndarray, min_px: float, join: tuple[int, int] = (1, 1)) -> tuple[np.ndarray, int]:
    """Drop pieces of fewer than ``min_px`` pixels; the mask and the number of pieces left.

    Args:
        join: rows and columns by which pieces are grown before those that touch (8-connected) count as one.
    """
    grown = mask if join == (1, 1) else ndimage.maximum_filter(mask, join, mode="constant")
    labels, n = ndimage.label(grown, EIGHT)
    if n == 0:
        return mask, 0
    large = np.bincount(labels.ravel(), weights=mask.ravel()) >= max(min_px, 1)
    large[0] = False
    return large[labels] & mask, int(large.sum())


def drop_lines(mask: np.ndarray, um_x: float, um_y: float) -> np.ndarray:
    """Drop pieces that are long, thin and straight, as no section is: edges of cover slips with coloured fringes."""
    labels, n = ndimage.label(mask, EIGHT)
    if n == 0:
        return mask
    rows, columns = np.nonzero(labels)
    piece = labels[rows, columns]
    y, x = rows * um_y, columns * um_x

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(piece, values, n + 1) / np.bincount(piece, minlength=n + 1).clip(1)

    xx, yy, xy = mean(x * x) - mean(x) ** 2, mean(y * y) - mean(y) ** 2, mean(x * y) - mean(x) * mean(y)
    # Axes of the ellipse of each piece; a line of length L has a standard deviation of L / sqrt(12) along itself.
    root = np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    along, across = (xx + yy) / 2 + root, np.maximum((xx + yy) / 2 - root, 0)
    line = (along >= LINE_LENGTH_UM**2 / 12) & (across <= LINE_WIDTH_UM**2)
    line[0] = False
    return mask & ~line[labels]


def count_holes(mask: np.ndarray) -> int:
    """Number of pieces of background that tissue encloses."""
    return int(small_holes(mask, mask.size)[1].sum())


def _close(mask: np.ndarray, radius_x: float, radius_y: float) -> np.ndarray:
    """Binary closing by a rectangle; the border does not erode."""
    size = window(radius_x, radius_y)
    pad = [(s // 2, s // 2) for s in size]
    grown = ndimage.maximum_filter(np.pad(mask, pad), size, mode="constant")
    closed = ndimage.minimum_filter(grown, size, mode="constant", cval=1)
    return closed[pad[0][0] : pad[0][0] + mask.shape[0], pad[1][0] : pad[1][0] + mask.shape[1]]
