"""An encoder without weights: stain, texture and nuclei of a tile in 64 numbers that a reader can name.

Stains are separated by colour deconvolution (Ruifrok & Johnston 2001); texture is told by grey-level co-occurrence
(Haralick et al. 1973) and local binary patterns (Ojala et al. 2002); nuclei are connected pieces of haematoxylin
above a threshold; fibres by the structure tensor. Each value is ``(raw - centre) / scale`` with the constants of
:data:`morphome.features.dimensions.DIMENSIONS`, which are fixed and were never fitted to a cohort, then clipped to +-8.

All is measured on the *work image*: the tile area-averaged to about 128 px a side, 1 micron per pixel for the
default tiling (256 px at 0.5). Lengths and areas below are in pixels of the work image. Only integers are summed
where order could matter, so that results do not depend on threads or batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.feature import graycomatrix

from morphome.features.dimensions import DIMENSIONS, FIBRE_BLOCK_PX, NUCLEUS_MIN_PX, WHITE
from morphome.slides.quality import laplacian_variance

if TYPE_CHECKING:
    from morphome.features.registry import EncoderSpec

#: Side of the work image, about.
WORK_PX = 128
#: Optical densities of haematoxylin, eosin and the residual (DAB) in R, G, B (Ruifrok & Johnston 2001).
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
#: Stain amounts (decadic optical density) that map to code 255; codes go with the square root, which spreads the
#: faint amounts where most of a section lies.
CODE_MAX = (1.28, 0.64, 0.64)
CLIP = 8.0
LEVELS = 16
#: Least and largest threshold of nuclei, in amounts of haematoxylin; between them Otsu's threshold of the tile.
NUCLEI_MIN, NUCLEI_MAX = 0.10, 0.60
_ANGLES = (0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)


class StainTexture:
    """The encoder; see the module for what it measures."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec

    def encode(self, tiles: np.ndarray) -> np.ndarray:
        """Vectors float32 (B, 64) of tiles uint8 (B, H, W, 3); a tile does not depend on its batch."""
        if tiles.ndim != 4 or tiles.shape[-1] != 3 or tiles.dtype != np.uint8:
            raise ValueError(f"tiles are {tiles.dtype} {tiles.shape}, not uint8 (B, H, W, 3)")
        out = np.empty((len(tiles), len(DIMENSIONS)), np.float32)
        for i, tile in enumerate(tiles):
            out[i] = raw_values(tile)
        return np.clip((out - _CENTRE) / _SCALE, -CLIP, CLIP)


_CENTRE = np.array([d.centre for d in DIMENSIONS], np.float32)
_SCALE = np.array([d.scale for d in DIMENSIONS], np.float32)


def raw_values(tile: np.ndarray) -> np.ndarray:
    """The 64 measures of one tile before centring and scaling, float64, in the units of :data:`DIMENSIONS`.

    Args:
        tile: uint8 (H, W, 3), at least 8 px a side.
    """
    image = Image.fromarray(tile)
    times = max(1, round(max(tile.shape[:2]) / WORK_PX))
    image = image.reduce(times) if times > 1 else image
    rgb, luma = np.asarray(image), np.asarray(image.convert("L"))
    codes = stain_codes(rgb)
    stains = [_histogram(code) for code in codes]
    values = [*_brightness(rgb, luma)]
    values += [*_moments(stains[0], 0), *_moments(stains[1], 1)]
    residual = _moments(stains[2], 2)
    values += [residual[0], residual[1], residual[4]]
    values += [*_cooccurrence(codes[0], (1, 4)), *_cooccurrence(codes[1], (1,))]
    values.append(_correlation(codes[0], codes[1]))
    values += [*_local_patterns(luma)]
    values += [*_nuclei(codes[0], stains[0])]
    values += [_coarseness(codes[0], 4), _coarseness(codes[0], FIBRE_BLOCK_PX), _coarseness(codes[1], FIBRE_BLOCK_PX)]
    values += [float(np.log10(1 + laplacian_variance(luma))), _red_blue(rgb)]
    values += [*_fibres(luma)]
    return np.array(values)


def stain_codes(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Amounts of haematoxylin, eosin and residual as codes uint8 (H, W): ``255 sqrt(amount / CODE_MAX)``."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    tables = ((_UNMIX[0, i].take(red) + _UNMIX[1, i].take(green) + _UNMIX[2, i].take(blue)) for i in range(3))
    # The amount as one of 4,096 steps, then its code from a table: no square root per pixel.
    return tuple(_CODES.take(np.clip(t, 0, 4095).astype(np.int16)) for t in tables)


def _unmixing() -> np.ndarray:
    """Steps of amount (of 4,095) that a value of one channel adds to one stain: float32 (channel, stain, 256)."""
    density = -np.log10((np.arange(256) + 1) / 256)
    inverse = np.linalg.inv(STAINS)
    return (inverse[:, :, None] * density / np.array(CODE_MAX)[None, :, None] * 4095).astype(np.float32)


_UNMIX = _unmixing()
_CODES = np.round(255 * np.sqrt(np.arange(4096) / 4095)).astype(np.uint8)
_AMOUNT = (np.arange(256) / 255.0) ** 2


def _histogram(code: np.ndarray) -> np.ndarray:
    return np.bincount(code.ravel(), minlength=256)


def _moments(counts: np.ndarray, stain: int) -> tuple[float, ...]:
    """Mean, standard deviation, 10, 50 and 90 % quantiles (OD) and skewness from a histogram of codes."""
    share = counts / counts.sum()
    amount = _AMOUNT * CODE_MAX[stain]
    mean = float(share @ amount)
    deviation = amount - mean
    sd = float(np.sqrt(share @ deviation**2))
    skew = float(share @ deviation**3) / sd**3 if sd > 1e-3 else 0.0
    ranks = np.searchsorted(np.cumsum(counts), np.array([0.1, 0.5, 0.9]) * counts.sum())
    return mean, sd, *amount[np.minimum(ranks, 255)].tolist(), skew


def _brightness(rgb: np.ndarray, luma: np.ndarray) -> tuple[float, ...]:
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    most = np.maximum(np.maximum(red, green), blue)
    least = np.minimum(np.minimum(red, green), blue)
    saturation = (most - least) / np.maximum(most, 1).astype(np.float32)
    counts = _histogram((saturation * 255 + 0.5).astype(np.uint8))
    bright = _histogram(luma)
    white = float((least > WHITE).mean())
    return *_mean_sd(counts, np.arange(256) / 255), *_mean_sd(bright, np.arange(256) / 255), white


def _mean_sd(counts: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    share = counts / counts.sum()
    mean = float(share @ values)
    return mean, float(np.sqrt(max(share @ values**2 - mean**2, 0.0)))


def _cooccurrence(code: np.ndarray, distances: tuple[int, ...]) -> list[float]:
    """Contrast, homogeneity, correlation, entropy (bit) and energy for each distance."""
    levels = code // (256 // LEVELS)
    counts = graycomatrix(levels, distances, _ANGLES, levels=LEVELS, symmetric=True).sum(axis=3, dtype=np.int64)
    values: list[float] = []
    for i in range(len(distances)):
        p = counts[:, :, i] / max(counts[:, :, i].sum(), 1)
        margin = p.sum(axis=0)
        mean = margin @ np.arange(LEVELS)
        variance = margin @ (np.arange(LEVELS) - mean) ** 2
        covariance = (p * _PRODUCT).sum() - mean**2
        values += [
            float((p * _SQUARED).sum()),
            float((p / (1 + _SQUARED)).sum()),
            float(covariance / variance) if variance > 1e-9 else 1.0,
            float(-(p * np.log2(np.where(p > 0, p, 1))).sum()),
            float(np.sqrt((p**2).sum())),
        ]
    return values


_PRODUCT = np.multiply.outer(np.arange(LEVELS), np.arange(LEVELS))
_SQUARED = np.subtract.outer(np.arange(LEVELS), np.arange(LEVELS)) ** 2


def _pattern_bins() -> np.ndarray:
    """Bin (0 to 9) of each 8-bit pattern: number of ones where they form one arc, else 9."""
    bins = np.empty(256, np.uint8)
    for pattern in range(256):
        bits = [(pattern >> i) & 1 for i in range(8)]
        changes = sum(bits[i] != bits[i - 1] for i in range(8))
        bins[pattern] = sum(bits) if changes <= 2 else 9
    return bins


_BINS = _pattern_bins()
#: The eight neighbours in the order of the circle.
_CIRCLE = ((0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0), (0, 1))


def _local_patterns(luma: np.ndarray) -> np.ndarray:
    """Shares (10,) of rotation-invariant uniform patterns of the 3 x 3 neighbourhood (square, not interpolated)."""
    height, width = luma.shape[0] - 2, luma.shape[1] - 2
    centre = luma[1:-1, 1:-1]
    pattern = np.zeros((height, width), np.uint8)
    for bit, (down, right) in enumerate(_CIRCLE):
        brighter = luma[down : down + height, right : right + width] >= centre
        pattern |= brighter.view(np.uint8) << np.uint8(bit)
    return np.bincount(_BINS, weights=np.bincount(pattern.ravel(), minlength=256), minlength=10) / pattern.size


_SHAPE_NAMES = (
    *("log_area", "log_area_sd", "log_area_p90", "elongation"),
    *("contrast", "inner_sd", "gap", "gap_cv", "largest"),
)


def _nuclei(code: np.ndarray, counts: np.ndarray) -> tuple[float, ...]:
    """Cover, number, size, shape, stain and spacing of nuclei; typical values where a tile has fewer than two."""
    least, most = (np.sqrt(v / CODE_MAX[0]) * 255 for v in (NUCLEI_MIN, NUCLEI_MAX))
    threshold = min(max(_otsu(counts), least), most)
    smooth = _mean3(code)
    labels, n = ndimage.label(smooth > 9 * threshold)
    y, x = np.nonzero(labels)
    label = labels[y, x]
    area = np.bincount(label, minlength=n + 1)
    nuclei = np.flatnonzero(area >= NUCLEUS_MIN_PX)
    nuclei = nuclei[nuclei > 0]
    pixels = code.size
    inside = np.isin(label, nuclei)
    amount = _AMOUNT * CODE_MAX[0]
    inner = np.bincount(code[y[inside], x[inside]], minlength=256)
    share = inner.sum() / pixels
    density = 1000 * len(nuclei) / pixels
    if len(nuclei) < 2:
        rest = {d.name: d.centre for d in DIMENSIONS}
        return share, density, *(rest[f"nuclei_{name}"] for name in _SHAPE_NAMES)
    outer = counts - inner
    mean_in, sd_in = _mean_sd(inner, amount)
    mean_out = float(outer @ amount) / max(int(outer.sum()), 1)
    log_area = np.log(area[nuclei])
    centre_x, centre_y, elongation = _shapes(label, x, y, area, nuclei)
    gap = _nearest(centre_x, centre_y)
    largest = float(area[nuclei].max() / area[nuclei].sum())
    return (
        share, density, float(log_area.mean()), float(log_area.std()), float(np.quantile(log_area, 0.9)),
        float(elongation.mean()), mean_in - mean_out, sd_in, float(gap.mean()), float(gap.std() / gap.mean()),
        largest,
    )  # fmt: skip


def _shapes(
    label: np.ndarray, x: np.ndarray, y: np.ndarray, area: np.ndarray, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres and elongation of the chosen pieces from their moments."""

    def total(weights: np.ndarray) -> np.ndarray:
        return np.bincount(label, weights=weights, minlength=len(area))[chosen]

    n = area[chosen]
    centre_x, centre_y = total(x) / n, total(y) / n
    # 1/12 is the moment of a pixel itself: a line one pixel wide has a width.
    xx = total(x * x) / n - centre_x**2 + 1 / 12
    yy = total(y * y) / n - centre_y**2 + 1 / 12
    xy = total(x * y) / n - centre_x * centre_y
    half = np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    middle = (xx + yy) / 2
    return centre_x, centre_y, 1 - np.sqrt(np.maximum(middle - half, 0) / (middle + half))


def _nearest(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of each point to the nearest other one."""
    squared = (x[:, None] - x) ** 2 + (y[:, None] - y) ** 2
    np.fill_diagonal(squared, np.inf)
    return np.sqrt(squared.min(axis=1))


def _otsu(counts: np.ndarray) -> float:
    """Otsu's threshold of a histogram, as the code of the last bin of the lower class."""
    below = counts.cumsum().astype(float)
    above = below[-1] - below
    total = (counts * np.arange(256)).cumsum().astype(float)
    between = below * above
    valid = between > 0
    between[valid] *= (total[valid] / below[valid] - (total[-1] - total[valid]) / above[valid]) ** 2
    return float(np.argmax(between))


def _mean3(code: np.ndarray) -> np.ndarray:
    """Sum over the 3 x 3 neighbourhood with repeated borders, int16."""
    padded = np.pad(code, 1, mode="edge").astype(np.int16)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson correlation of two codes; 0 where one is constant. Whole numbers below 2^53: exact in any order."""
    a, b = first.ravel().astype(np.float64), second.ravel().astype(np.float64)
    n, sum_a, sum_b = a.size, int(a.sum()), int(b.sum())
    variance = (n * int(a @ a) - sum_a**2) * (n * int(b @ b) - sum_b**2)
    return (n * int(a @ b) - sum_a * sum_b) / variance**0.5 if variance else 0.0


def _red_blue(rgb: np.ndarray) -> float:
    return float(int(rgb[..., 0].sum(dtype=np.int64)) - int(rgb[..., 2].sum(dtype=np.int64))) / rgb[..., 0].size / 255


def _coarseness(code: np.ndarray, block: int) -> float:
    """Log of the standard deviation of block means over that of pixels; 0 for an even or a tiny tile."""
    spread = _mean_sd(_histogram(code), np.arange(256.0))[1]
    rows, columns = code.shape[0] // block, code.shape[1] // block
    if spread < 0.5 or rows * columns < 4:
        return 0.0
    sums = code[: rows * block, : columns * block].reshape(rows, block, columns, block)
    means = sums.sum(axis=(1, 3), dtype=np.int64) / block**2
    return float(np.log(max(means.std() / spread, 1e-2)))


def _fibres(luma: np.ndarray) -> tuple[float, float]:
    """Coherence of the structure tensor, energy-weighted over blocks and over the whole tile (0 none, 1 parallel)."""
    wide = luma.astype(np.int16)
    dx, dy = (wide[1:-1, 2:] - wide[1:-1, :-2]).astype(np.int32), (wide[2:, 1:-1] - wide[:-2, 1:-1]).astype(np.int32)
    products = (dx * dx, dy * dy, dx * dy)
    block = min(FIBRE_BLOCK_PX, *dx.shape)
    rows, columns = dx.shape[0] // block, dx.shape[1] // block
    xx, yy, xy = (
        p[: rows * block, : columns * block].reshape(rows, block, columns, block).sum(axis=(1, 3), dtype=np.int64)
        for p in products
    )
    energy = float((xx + yy).sum())
    if energy == 0:
        return 0.0, 0.0
    local = float(np.hypot(xx - yy, 2 * xy).sum()) / energy
    whole = float(np.hypot(float((xx - yy).sum()), 2 * float(xy.sum()))) / energy
    return local, whole
