"""Where tissue lies on a brightfield slide: deterministic, on the CPU, without weights.

Tissue is coloured, not near-white and not ink: HSV saturation above an Otsu threshold (Otsu 1979) that is held
between a floor, below which glass and JPEG noise begin, and a ceiling, above which a slide full of tissue would
lose its pale parts. Then closing, small holes filled, small fragments dropped; all lengths and areas are physical.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from morphome.slides.reader import SlideError

if TYPE_CHECKING:
    from shapely import Geometry

#: Otsu's threshold of the saturation (0 to 1) is held between these.
SATURATION_FLOOR, SATURATION_CEILING = 0.06, 0.10
#: A pixel whose darkest channel is above this is glass.
NEAR_WHITE = 232
#: Closing bridges gaps of up to twice this.
CLOSING_UM = 16.0
#: Ink is drawn: smaller spots of its colours are nuclei, pigment or blood.
PEN_MIN_MM2 = 0.01
#: The pale rim of a pen mark.
PEN_MARGIN_UM = 40.0
#: Brightness (largest channel, 0 to 255) of the background of a brightfield slide.
DARK_BACKGROUND = 90
_EIGHT = np.ones((3, 3), bool)


@dataclass(frozen=True)
class TissueMask:
    """Tissue and ink on the mask grid, which covers the whole slide.

    Attributes:
        mask: bool (h, w); True where there is tissue.
        pen: bool (h, w); True where there is ink.
        pixel_mm2: area of a mask pixel.
        saturation_threshold: of this slide.
        n_fragments: connected pieces of tissue.
    """

    mask: np.ndarray
    pen: np.ndarray
    pixel_mm2: float
    saturation_threshold: float
    n_fragments: int

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
    """Tissue mask of an overview.

    Args:
        rgb: uint8 (h, w, 3), the whole slide.
        um_x, um_y: microns per pixel of the overview.
        tiling: ``min_fragment_mm2`` and ``max_hole_mm2``.

    Raises:
        SlideError: ``not_brightfield``.
    """
    check_brightfield(rgb)
    pixel_mm2 = um_x * um_y * 1e-6
    saturation, value = saturation_value(rgb)
    pen = find_pen(rgb, saturation, value, um_x, um_y)
    threshold = saturation_threshold(saturation[~pen])
    mask = (saturation > threshold) & (rgb.min(axis=2) <= NEAR_WHITE) & ~pen
    mask = _close(mask, CLOSING_UM / um_x, CLOSING_UM / um_y) & ~pen
    mask = fill_holes(mask, tiling["max_hole_mm2"] / pixel_mm2) & ~pen
    mask, n_fragments = drop_fragments(mask, tiling["min_fragment_mm2"] / pixel_mm2)
    return TissueMask(mask, pen, pixel_mm2, threshold, n_fragments)


def check_brightfield(rgb: np.ndarray) -> None:
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
    grey = value < 215
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
    """Otsu's threshold over 256 bins of [0, 1], held between the floor and the ceiling."""
    counts = np.bincount((saturation.ravel() * 255 + 0.5).astype(np.intp), minlength=256)[:256].astype(float)
    below = counts.cumsum()
    above = below[-1] - below
    total = (counts * np.arange(256)).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    best = float(np.argmax(np.nan_to_num(between))) / 255 if len(saturation) else 0.0
    return min(max(best, SATURATION_FLOOR), SATURATION_CEILING)


def find_pen(rgb: np.ndarray, saturation: np.ndarray, value: np.ndarray, um_x: float, um_y: float) -> np.ndarray:
    """Marker ink, bool (h, w): strong blue, green, red and black over an area that only a pen covers.

    Haematoxylin and eosin lie between violet and pink (hues of 250 to 350 degrees); ink is told by hues outside
    that range or by a saturation that a stained section does not reach at several microns per pixel.
    """
    red, green, blue = (rgb[..., i].astype(np.int16) for i in range(3))
    spread = np.maximum(value.astype(np.int16) - rgb.min(axis=2), 1)
    is_green = (green >= red) & (green >= blue - 10) & (saturation > 0.25)
    # Hue of 190 to 245 degrees: blue leads, and green is nearer to blue than violet allows.
    is_blue = (blue > green) & (green - red > -0.08 * spread) & (saturation > 0.45)
    is_red = (red > green) & (saturation > 0.7) & (value > 110) & (blue - green < 0.35 * spread)
    is_black = (value < 72) & (saturation < 0.4)
    ink = is_green | is_blue | is_red | is_black
    labels, n = ndimage.label(ink, _EIGHT)
    if n == 0:
        return ink
    large = np.bincount(labels.ravel()) * (um_x * um_y * 1e-6) >= PEN_MIN_MM2
    large[0] = False
    ink = large[labels]
    if not ink.any():
        return ink
    return ndimage.maximum_filter(ink, _window(PEN_MARGIN_UM / um_x, PEN_MARGIN_UM / um_y), mode="constant")


def fill_holes(mask: np.ndarray, max_px: float) -> np.ndarray:
    """Fill holes (4-connected background that does not touch the border) of at most ``max_px`` pixels."""
    labels, n = ndimage.label(~mask)
    if n == 0:
        return mask
    small = np.bincount(labels.ravel()) <= max_px
    small[0] = False
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    small[np.unique(edge)] = False
    return mask | small[labels]


def drop_fragments(mask: np.ndarray, min_px: float) -> tuple[np.ndarray, int]:
    """Drop 8-connected pieces of fewer than ``min_px`` pixels; the mask and the number of pieces left."""
    labels, n = ndimage.label(mask, _EIGHT)
    if n == 0:
        return mask, 0
    large = np.bincount(labels.ravel()) >= min_px
    large[0] = False
    return large[labels], int(large.sum())


def outline(mask: np.ndarray, width_px: int, height_px: int) -> list[Geometry]:
    """Tissue as polygons with holes in level-0 pixels, one per connected piece, largest first.

    The edges of mask pixels are smoothed by at most one mask pixel.
    """
    import shapely

    runs = _runs(mask)
    if len(runs) == 0:
        return []
    merged = shapely.union_all(shapely.box(runs[:, 0], runs[:, 1], runs[:, 2], runs[:, 3]))
    parts = shapely.get_parts(shapely.simplify(merged, 1.0, preserve_topology=True))
    scale = np.array([width_px / mask.shape[1], height_px / mask.shape[0]])
    scaled = shapely.transform(parts, lambda points: np.round(points * scale, 1))
    scaled = shapely.get_parts(shapely.make_valid(scaled))
    polygons = [p for p in scaled if p.geom_type == "Polygon" and not p.is_empty]
    return sorted(polygons, key=lambda p: (-p.area, p.bounds))


def to_geojson(polygons: list[Geometry]) -> dict[str, Any]:
    """FeatureCollection that QuPath opens: one annotation of the class "Tissue" per polygon."""
    from shapely.geometry import mapping

    properties = {
        "objectType": "annotation",
        "classification": {"name": "Tissue", "color": [0, 128, 96]},
        "isLocked": False,
    }
    features = [
        {"type": "Feature", "id": f"tissue-{number}", "geometry": mapping(p), "properties": properties}
        for number, p in enumerate(polygons, start=1)
    ]
    return {"type": "FeatureCollection", "features": features}


def _runs(mask: np.ndarray) -> np.ndarray:
    """Horizontal runs of a mask as boxes (x0, y0, x1, y1); equal runs of neighbouring rows are merged."""
    padded = np.zeros((mask.shape[0], mask.shape[1] + 2), np.int8)
    padded[:, 1:-1] = mask
    step = np.diff(padded, axis=1)
    rows, starts = np.nonzero(step == 1)
    _, stops = np.nonzero(step == -1)
    order = np.lexsort((rows, stops, starts))
    rows, starts, stops = rows[order], starts[order], stops[order]
    new = np.ones(len(rows), bool)
    new[1:] = (np.diff(starts) != 0) | (np.diff(stops) != 0) | (np.diff(rows) != 1)
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(rows))[: len(first)] - 1
    return np.column_stack([starts[first], rows[first], stops[first], rows[last] + 1]).astype(float)


def _close(mask: np.ndarray, radius_x: float, radius_y: float) -> np.ndarray:
    """Binary closing by a rectangle; the border does not erode."""
    size = _window(radius_x, radius_y)
    pad = [(s // 2, s // 2) for s in size]
    grown = ndimage.maximum_filter(np.pad(mask, pad), size, mode="constant")
    closed = ndimage.minimum_filter(grown, size, mode="constant", cval=1)
    return closed[pad[0][0] : pad[0][0] + mask.shape[0], pad[1][0] : pad[1][0] + mask.shape[1]]


def _window(radius_x: float, radius_y: float) -> tuple[int, int]:
    return 2 * max(0, round(radius_y)) + 1, 2 * max(0, round(radius_x)) + 1
