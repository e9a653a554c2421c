"""One simulated slide: where tissue lies, which class each block is, pen marks and blur, as distinct tiles.

Most tiles are shared windows of periodic textures; only tiles on the outline of the tissue and under a pen mark
or a blurred region are painted one by one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from morphome.cohort.svs_writer import TILE_PX, SlideImage
from morphome.cohort.textures import (
    AGGRESSIVE,
    BENIGN,
    BLOCK_PX,
    BLOCKS,
    GLASS_RGB,
    STROMA,
    Bytes,
    Stain,
)

#: Side of an analysis tile in microns (256 px at 0.5 microns per pixel).
ANALYSIS_TILE_UM = 128.0
OUTSIDE = -1
_SAMPLES = 4  # samples of the outline per tile side
_TILES_PER_BLOCK = BLOCK_PX // TILE_PX
_PERIOD = BLOCKS * _TILES_PER_BLOCK
_MARGIN = 2  # blocks of glass around the tissue
Pairs = NDArray[np.uint16]
_PEN_RGB = {"blue": (28, 58, 158), "green": (22, 118, 66), "black": (34, 33, 38)}


@dataclass(frozen=True)
class Layout:
    """Blocks of a slide.

    Attributes:
        classes: int8 (rows, columns); 0 aggressive, 1 benign, 2 stroma, -1 no tissue.
        nearest: the same with every block outside filled by its nearest tissue block.
    """

    classes: NDArray[np.int8]
    nearest: NDArray[np.int8]

    @property
    def counts(self) -> list[int]:
        """Number of tissue blocks of each class."""
        return [int((self.classes == kind).sum()) for kind in (AGGRESSIVE, BENIGN, STROMA)]


def draw_layout(rng: np.random.Generator, tiles: int, mpp: float, aggressive_share: float) -> Layout:
    """Draw the tissue and its classes.

    Args:
        tiles: tissue area in analysis tiles of 128 um.
        mpp: microns per pixel at level 0.
        aggressive_share: probability that a block is aggressive; the number of such blocks is binomial, and so is
            that of benign blocks among the others (probability one half). The classes lie in patches.
    """
    blocks = max(4, round(tiles * (ANALYSIS_TILE_UM / (mpp * BLOCK_PX)) ** 2))
    stretch = rng.uniform(0.8, 1.25)
    inner = np.sqrt(blocks * 1.6)
    rows, columns = (int(np.ceil(inner * s)) + 2 * _MARGIN for s in (stretch, 1 / stretch))
    y, x = np.mgrid[0:rows, 0:columns]
    centres = 1 if rng.random() < 0.6 else 2
    away = np.full((rows, columns), np.inf)
    for _ in range(centres):
        cy, cx = (rng.uniform(0.5 - 0.13 * (centres - 1), 0.5 + 0.13 * (centres - 1), 2) * (rows, columns)) - 0.5
        away = np.minimum(away, np.hypot((y - cy) / rows, (x - cx) / columns))
    away += 0.07 * _smooth(rng, (rows, columns), 2.2)
    border = (y < _MARGIN) | (x < _MARGIN) | (y >= rows - _MARGIN) | (x >= columns - _MARGIN)
    away[border] = np.inf
    chosen = np.argsort(away, axis=None, kind="stable")[:blocks]
    classes = np.full(rows * columns, OUTSIDE, np.int8)
    aggressive = rng.binomial(blocks, aggressive_share)
    benign = rng.binomial(blocks - aggressive, 0.5)
    order = chosen[np.argsort(_smooth(rng, (rows, columns), 0.7).ravel()[chosen], kind="stable")]
    rest = order[aggressive:]
    rest = rest[np.argsort(_smooth(rng, (rows, columns), 0.7).ravel()[rest], kind="stable")]
    classes[order[:aggressive]] = AGGRESSIVE
    classes[rest[:benign]] = BENIGN
    classes[rest[benign:]] = STROMA
    classes = classes.reshape(rows, columns)
    nearest = ndimage.distance_transform_edt(classes == OUTSIDE, return_distances=False, return_indices=True)
    return Layout(classes, classes[tuple(nearest)])


@dataclass
class Mosaic:
    """Distinct tiles and where they lie, while a slide is being painted."""

    index: NDArray[np.int64]
    tiles: list[Bytes] = field(default_factory=list)

    def add(self, tile: Bytes) -> int:
        self.tiles.append(np.ascontiguousarray(tile))
        return len(self.tiles) - 1

    def region(self, top: int, left: int, rows: int, columns: int) -> Bytes:
        """Pixels of a rectangle of tiles."""
        parts = [
            np.concatenate([self.tiles[i] for i in self.index[row, left : left + columns]], axis=1)
            for row in range(top, top + rows)
        ]
        return np.concatenate(parts, axis=0)

    def replace(self, top: int, left: int, pixels: Bytes, changed: NDArray[np.bool_]) -> None:
        """Put back those tiles of a rectangle whose pixels ``changed`` touches."""
        for row in range(pixels.shape[0] // TILE_PX):
            for column in range(pixels.shape[1] // TILE_PX):
                part = (
                    slice(row * TILE_PX, (row + 1) * TILE_PX),
                    slice(column * TILE_PX, (column + 1) * TILE_PX),
                )
                if changed[part].any():
                    self.index[top + row, left + column] = self.add(pixels[part])


def paint_slide(
    rng: np.random.Generator,
    layout: Layout,
    maps: list[Pairs],
    stain: Stain,
    mpp: float,
    *,
    pen: str = "",
    blurred: bool = False,
    damaged: bool = False,
) -> SlideImage:
    """Paint a slide.

    Args:
        maps: stain concentrations of the three classes (:func:`morphome.cohort.textures.textures`).
        pen: colour of a pen mark (blue, green, black) or empty.
        blurred: put a part of the tissue out of focus.
        damaged: make every level-0 tile with tissue undecodable.
    """
    mosaic, cover = _tissue(rng, layout, maps, stain)
    if blurred:
        _blur(rng, mosaic, layout)
    if pen:
        _pen(rng, mosaic, layout, _PEN_RGB[pen])
    rows, columns = mosaic.index.shape
    broken = set(np.unique(mosaic.index[cover]).tolist()) if damaged else set()
    return SlideImage(
        tiles=mosaic.tiles,
        index=mosaic.index,
        # Not a whole number of tiles, as in scanned slides; a multiple of 16, so that all levels are exact.
        width_px=columns * TILE_PX - 16 * int(rng.integers(1, 14)),
        height_px=rows * TILE_PX - 16 * int(rng.integers(1, 14)),
        mpp=mpp,
        label=_label(rng),
        damaged=frozenset(broken),
    )


def _tissue(
    rng: np.random.Generator, layout: Layout, maps: list[Pairs], stain: Stain
) -> tuple[Mosaic, NDArray[np.bool_]]:
    """Glass, tissue and its outline; and which tiles hold tissue."""
    colours = stain.colours()
    turns, flip = int(rng.integers(4)), bool(rng.integers(2))
    turned = [_turn(part, turns, flip) for part in maps]
    shape = tuple(n * _TILES_PER_BLOCK for n in layout.classes.shape)
    mosaic = Mosaic(np.zeros(shape, np.int64))
    glass = [mosaic.add(tile) for tile in _glass()]
    outline = _outline(rng, layout)
    kinds = np.kron(layout.nearest, np.ones((_TILES_PER_BLOCK,) * 2, np.int8))
    spread = _interpolation()
    plain: dict[tuple[int, int, int], int] = {}
    windows: dict[tuple[int, int, int], Pairs] = {}
    cover = np.zeros(shape, bool)
    for row, column in np.ndindex(*shape):
        near = outline[row * _SAMPLES : (row + 1) * _SAMPLES + 2, column * _SAMPLES : (column + 1) * _SAMPLES + 2]
        mosaic.index[row, column] = glass[(row * 7 + column * 3) % 4]
        if near.max() <= 0.49:
            continue
        cover[row, column] = True
        key = (int(kinds[row, column]), row % _PERIOD, column % _PERIOD)
        if key not in plain:
            part = tuple(slice(k * TILE_PX, (k + 1) * TILE_PX) for k in key[1:])
            windows[key] = turned[key[0]][part]
            plain[key] = mosaic.add(np.take(colours, windows[key], axis=0))
        if near.min() >= 0.51:
            mosaic.index[row, column] = plain[key]
            continue
        # Less stain towards the edge, none on the glass.
        alpha = np.clip((spread @ near @ spread.T - 0.5) * 60 + 0.5, 0, 1)
        h, e = ((part * alpha).astype(np.uint16) for part in (windows[key] >> 8, windows[key] & 255))
        mosaic.index[row, column] = mosaic.add(np.take(colours, h << 8 | e, axis=0))
    return mosaic, cover


def _outline(rng: np.random.Generator, layout: Layout) -> NDArray[np.float32]:
    """Smooth field, tissue where above one half: 4 samples per tile and one more on every side."""
    per_block = _SAMPLES * _TILES_PER_BLOCK
    solid = np.kron(layout.classes != OUTSIDE, np.ones((per_block, per_block), np.float32))
    smooth = ndimage.gaussian_filter(solid, 3.5)
    smooth += 0.09 * _smooth(rng, solid.shape, 1.8) * 4 * smooth * (1 - smooth)
    return np.pad(smooth, 1, mode="edge").astype(np.float32)


def _interpolation() -> NDArray[np.float32]:
    """(240, 6): linear interpolation of a tile's pixels from its four samples and their neighbours."""
    step = TILE_PX / _SAMPLES
    position = (np.arange(TILE_PX) + 0.5) / step + 0.5
    low = np.floor(position).astype(int)
    weights = np.zeros((TILE_PX, _SAMPLES + 2), np.float32)
    weights[np.arange(TILE_PX), low] = 1 - (position - low)
    weights[np.arange(TILE_PX), low + 1] += position - low
    return weights


def _blur(rng: np.random.Generator, mosaic: Mosaic, layout: Layout) -> None:
    """Put a disc of about 3.5 tiles radius, centred on tissue, out of focus."""
    radius = int(min(4, (min(mosaic.index.shape) - 3) // 2))
    row, column = _tissue_tile(rng, layout)
    top = int(np.clip(row - radius, 0, mosaic.index.shape[0] - 2 * radius - 1))
    left = int(np.clip(column - radius, 0, mosaic.index.shape[1] - 2 * radius - 1))
    sharp = mosaic.region(top, left, 2 * radius + 1, 2 * radius + 1)
    soft = Image.fromarray(sharp).filter(ImageFilter.GaussianBlur(7))
    away = np.arange(sharp.shape[0], dtype=np.float32) - sharp.shape[0] / 2
    alpha = np.clip(((radius - 0.1) * TILE_PX - np.hypot(away[:, None], away)) / 150, 0, 1)
    mask = Image.fromarray(np.rint(255 * alpha).astype(np.uint8))
    mosaic.replace(top, left, np.asarray(Image.composite(soft, Image.fromarray(sharp), mask)), alpha > 0)


def _pen(rng: np.random.Generator, mosaic: Mosaic, layout: Layout, ink_rgb: tuple[int, int, int]) -> None:
    """Draw one curved stroke of a felt pen from the glass into the tissue."""
    rows, columns = mosaic.index.shape
    end = np.array(_tissue_tile(rng, layout), float)
    solid = np.argwhere(layout.classes != OUTSIDE) * _TILES_PER_BLOCK
    middle = solid.mean(axis=0)
    out = end - middle
    out = out / max(np.linalg.norm(out), 1e-6)
    start = np.clip(end + out * rng.uniform(6, 9), 0.5, (rows - 1.5, columns - 1.5))
    bend = (start + end) / 2 + rng.uniform(-2.5, 2.5) * np.array([-out[1], out[0]])
    steps = np.linspace(0, 1, 24)[:, None]
    path = (1 - steps) ** 2 * start + 2 * steps * (1 - steps) * bend + steps**2 * end
    width = rng.uniform(0.5, 0.8)
    top, left = np.clip(np.floor(path.min(axis=0) - width), 0, None).astype(int)
    bottom, right = np.minimum(np.ceil(path.max(axis=0) + width).astype(int) + 1, (rows, columns))
    # The stroke is drawn at 1/8 and enlarged: its edge is soft as ink on glass is.
    side = TILE_PX // 8
    points = [((x - left) * side, (y - top) * side) for y, x in path.tolist()]
    stroke = Image.new("L", ((right - left) * side, (bottom - top) * side))
    ImageDraw.Draw(stroke).line(points, fill=255, width=round(width * side), joint="curve")
    for row, column in np.ndindex(int(bottom - top), int(right - left)):
        box = (column * side, row * side, (column + 1) * side, (row + 1) * side)
        if stroke.crop(box).getextrema()[1] == 0:
            continue
        ink = stroke.resize((TILE_PX, TILE_PX), Image.Resampling.BILINEAR, box=box)
        alpha = 0.88 / 255 * np.asarray(ink, np.float32)[..., None]
        under = mosaic.tiles[mosaic.index[top + row, left + column]].astype(np.float32)
        # Ink absorbs: what lies under it shines through a little.
        inked = under * (1 - alpha) + alpha * np.array(ink_rgb, np.float32) * (0.75 + 0.25 * under / GLASS_RGB)
        mosaic.index[top + row, left + column] = mosaic.add(np.rint(inked).astype(np.uint8))


def _tissue_tile(rng: np.random.Generator, layout: Layout) -> tuple[int, int]:
    """Row and column of a random tile of tissue."""
    blocks = np.argwhere(layout.classes != OUTSIDE)
    row, column = blocks[rng.integers(len(blocks))] * _TILES_PER_BLOCK
    return int(row), int(column)


def _turn(part: Pairs, turns: int, flip: bool) -> Pairs:
    turned = np.rot90(part, turns)
    return np.ascontiguousarray(turned[:, ::-1] if flip else turned)


@functools.cache
def _glass() -> tuple[Bytes, ...]:
    """Four tiles of empty glass with the noise of a sensor."""
    rng = np.random.default_rng(243)
    noise = rng.normal(GLASS_RGB, 1.0, (4, TILE_PX, TILE_PX, 1)) + rng.normal(0, 0.6, (4, TILE_PX, TILE_PX, 3))
    return tuple(np.rint(np.clip(noise, 0, 255)).astype(np.uint8))


def _smooth(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> NDArray[np.float64]:
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), scale)
    return noise / max(noise.std(), 1e-12)


def _label(rng: np.random.Generator) -> Bytes:
    """A paper label with a made-up square code and no writing."""
    label = np.full((463, 387, 3), 250, np.uint8)
    code = np.kron(rng.integers(0, 2, (16, 16)), np.ones((12, 12)))[..., None]
    label[60:252, 97:289] = np.where(code > 0, 20, 250)
    label[330:350, 60:327] = (60, 90, 170)
    return label
