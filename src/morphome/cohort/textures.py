"""Periodic H&E-like textures of the simulated tissue: how much haematoxylin and eosin lies where.

A texture is 1,440 px square and made of 3 x 3 blocks of 480 px (2 x 2 native tiles of 240 px). All three share the
same stroma; in the other two classes every block is a nest within it, as carcinoma grows, so that blocks of any
class stand side by side without a seam. Sizes are in microns and become pixels by the slide's own microns per
pixel. Colours follow Beer-Lambert with stain vectors near the reference of Macenko et al. (ISBI 2009, p. 1107).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft

BLOCK_PX = 480
BLOCKS = 3
TEXTURE_PX = BLOCK_PX * BLOCKS
#: Classes of tissue, in the order of their numbers.
AGGRESSIVE, BENIGN, STROMA = 0, 1, 2
CLASSES = ("aggressive", "benign", "stroma")
GLASS_RGB = 243.0
#: Largest concentration that a texture can hold; 8 bits span 0 to this.
MOST = 3.0
HAEMATOXYLIN, EOSIN = (0.610, 0.715, 0.345), (0.150, 0.870, 0.470)

Field = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Stain:
    """Optical density per unit of concentration: rows haematoxylin and eosin, columns red, green, blue."""

    density: NDArray[np.float64]

    def colours(self) -> Bytes:
        """RGB of every pair of 8-bit concentrations, uint8 (65536, 3), at ``256 * haematoxylin + eosin``."""
        level = np.arange(256) / 255 * MOST
        amount = np.stack(np.meshgrid(level, level, indexing="ij"), axis=-1).reshape(-1, 2)
        return np.rint(GLASS_RGB * np.exp(-amount @ self.density)).astype(np.uint8)


def draw_stain(rng: np.random.Generator, base: Stain | None = None, spread: float = 1.0) -> Stain:
    """A hospital's stain, or (with ``base``) a stain near another one.

    Args:
        spread: 1 for the difference between hospitals: about 4 % in direction and 15 % in strength.
    """
    rows = np.array([HAEMATOXYLIN, EOSIN]) if base is None else base.density
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    moved = np.clip(rows / lengths + spread * 0.04 * rng.standard_normal((2, 3)), 0.01, None)
    gain = np.exp(spread * 0.15 * np.clip(rng.standard_normal((2, 1)), -1.6, 1.6))
    return Stain(moved / np.linalg.norm(moved, axis=1, keepdims=True) * lengths * gain)


def textures(rng: np.random.Generator, mpp: float) -> list[NDArray[np.uint16]]:
    """Concentrations (1,440 x 1,440, packed as ``256 * haematoxylin + eosin``) of the three classes."""
    fine, coarse = _noise(rng, 1.2 / mpp), _noise(rng, 6.0 / mpp)
    grain = 1 + 0.22 * fine  # chromatin is grainy
    stroma_h, stroma_e = _fibres(rng, mpp, fine, coarse)
    _in_blocks(_stroma, stroma_h, stroma_e, None, rng, mpp)
    nests = _nests(rng, mpp)
    h = 0.20 + 0.05 * coarse + 0.03 * fine
    e = 0.36 + 0.07 * coarse + 0.04 * fine
    _in_blocks(_aggressive, h, e, nests, rng, mpp)
    made = [(stroma_h + nests * (h - stroma_h), stroma_e + nests * (e - stroma_e))]
    nests = _nests(rng, mpp)
    h = 0.08 + 0.02 * coarse + 0.02 * fine
    e = 0.40 + 0.07 * coarse + 0.04 * fine
    _in_blocks(_benign, h, e, nests, rng, mpp)
    made.append((stroma_h + nests * (h - stroma_h), stroma_e + nests * (e - stroma_e)))
    made.append((stroma_h, stroma_e))
    return [_to_bytes(h * grain) << 8 | _to_bytes(e) for h, e in made]


def _in_blocks(
    painter: Callable[..., None], h: Field, e: Field, nests: Field | None, rng: np.random.Generator, mpp: float
) -> None:
    """Paint every block of the maps in place (a block is a view of them)."""
    for row in range(BLOCKS):
        for column in range(BLOCKS):
            y, x = row * BLOCK_PX, column * BLOCK_PX
            part = (slice(y, y + BLOCK_PX), slice(x, x + BLOCK_PX))
            painter(h[part], e[part], None if nests is None else nests[part], rng, mpp)


def _nests(rng: np.random.Generator, mpp: float) -> Field:
    """1 inside the nest of each block, 0 in the septa between them; never 1 at a block's border."""
    middle = (np.arange(TEXTURE_PX, dtype=np.float32) % BLOCK_PX + 0.5) / (BLOCK_PX / 2) - 1
    square = np.abs(middle) ** 5
    distance = (square[:, None] + square[None, :]) ** np.float32(1 / 5)
    wavy = distance + 0.04 * np.clip(_noise(rng, 13 / mpp), -1.7, 1.7)
    return _edge((wavy - 0.92) * (BLOCK_PX / 2), 2.0)


def _fibres(rng: np.random.Generator, mpp: float, fine: Field, coarse: Field) -> tuple[Field, Field]:
    """Wavy collagen: the phase of a wave is moved by smooth noise, so that the texture stays periodic."""
    x = np.arange(TEXTURE_PX, dtype=np.float32) / TEXTURE_PX
    y = x[:, None]
    turns = round(TEXTURE_PX * mpp / 8)  # a fibre about every 8 um
    waves = np.sin(2 * np.pi * (turns * y + round(turns / 3) * x) + 4.5 * _noise(rng, 22 / mpp) + 0.6 * coarse)
    e = 0.46 + 0.11 * waves + 0.08 * coarse + 0.05 * fine
    return np.full_like(e, 0.04), e.astype(np.float32)


def _aggressive(h: Field, e: Field, nest: Field, rng: np.random.Generator, mpp: float) -> None:
    """Crowded, large, dark, uneven nuclei, some with a nucleolus; now and then a mitosis."""
    radii = np.clip(rng.normal(5.2, 1.1, _count(8300, mpp)), 3.4, 8.0) / mpp
    for y, x, radius in _places(radii, 0.86, rng):
        if nest[int(y), int(x)] < 1:
            continue
        mitosis = rng.random() < 0.03
        dark = 2.2 if mitosis else rng.uniform(1.15, 1.75)
        aspect = rng.uniform(0.35, 0.5) if mitosis else rng.uniform(0.68, 1.0)
        _stamp(h, y, x, radius * (0.8 if mitosis else 1), aspect, rng, dark, 0.13)
        if not mitosis and rng.random() < 0.6:
            offset = rng.uniform(-0.3, 0.3, 2) * radius
            _stamp(h, y + offset[0], x + offset[1], 1.1 / mpp, 1.0, rng, dark + 0.7, 0.05)


def _benign(h: Field, e: Field, nest: Field, rng: np.random.Generator, mpp: float) -> None:
    """Glands: an empty lumen with a ring of even nuclei, and even nuclei between the glands."""
    xx = np.arange(BLOCK_PX, dtype=np.float32)
    yy = xx[:, None]
    free = nest >= 1
    lumina = rng.uniform(7, 12, _count(280, mpp)) / mpp
    nuclei: list[tuple[float, float, float]] = []
    for y, x, outer in _places(lumina + 13 / mpp, 1.0, rng):
        inner = outer - 13 / mpp
        distance = np.hypot(yy - y, xx - x) / inner
        bumps = 1 + 0.12 * np.sin(3 * np.arctan2(yy - y, xx - x) + rng.uniform(0, 6))
        inside = _edge((distance - bumps) * inner, 2.0)
        h *= 1 - inside
        e *= 1 - 0.93 * inside
        free = free & (distance * inner >= outer)
        ring = inner + 6.5 / mpp
        count = int(2 * np.pi * ring * mpp / 8.2)
        start = rng.uniform(0, 6)
        for step in range(count):
            angle = start + 2 * np.pi * step / count
            nuclei.append((y + ring * np.sin(angle), x + ring * np.cos(angle), angle))
    for y, x, angle in nuclei:
        _stamp(h, y, x, rng.normal(3.0, 0.15) / mpp, 0.8, rng, rng.uniform(0.7, 0.9), 0.03, angle)
    radii = np.full(_count(4200, mpp), 2.9) / mpp
    for y, x, radius in _places(radii, 1.35, rng):
        if free[int(y), int(x)]:
            _stamp(h, y, x, radius, 0.9, rng, rng.uniform(0.65, 0.85), 0.03)


def _stroma(h: Field, e: Field, nest: None, rng: np.random.Generator, mpp: float) -> None:
    """Few thin spindle nuclei along the fibres."""
    radii = rng.uniform(4.5, 7.0, _count(900, mpp)) / mpp
    for y, x, radius in _places(radii, 1.0, rng):
        _stamp(h, y, x, radius, rng.uniform(0.2, 0.32), rng, rng.uniform(0.8, 1.2), 0.04, rng.normal(-0.32, 0.3))


def _count(per_mm2: float, mpp: float) -> int:
    """Number in a block of something of which there are so many per square millimetre."""
    return round(per_mm2 * (BLOCK_PX * mpp / 1000) ** 2)


def _places(radii: NDArray[np.float64], closeness: float, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """(y, x, radius) of discs in a block that keep ``closeness`` x the sum of their radii apart.

    Largest first, each with up to 30 tries; what finds no place is left out.
    """
    found = np.empty((0, 3))
    for radius in np.sort(radii)[::-1]:
        tries = radius + rng.random((30, 2)) * (BLOCK_PX - 2 * radius)
        gaps = np.hypot(tries[:, None, 0] - found[None, :, 0], tries[:, None, 1] - found[None, :, 1])
        fits = (gaps >= closeness * (radius + found[None, :, 2])).all(axis=1)
        if fits.any():
            y, x = tries[np.argmax(fits)]
            found = np.vstack([found, (y, x, radius)])
    return [tuple(row) for row in found.tolist()]


def _stamp(
    h: Field,
    y: float,
    x: float,
    radius: float,
    aspect: float,
    rng: np.random.Generator,
    amount: float,
    roughness: float,
    angle: float | None = None,
) -> None:
    """Lay one nucleus (an ellipse with a bumpy outline, long half-axis ``radius`` px) over the map, in place."""
    angle = rng.uniform(0, np.pi) if angle is None else angle
    low = (max(0, int(y - radius) - 3), max(0, int(x - radius) - 3))
    high = (min(h.shape[0], int(y + radius) + 4), min(h.shape[1], int(x + radius) + 4))
    dy = np.arange(low[0], high[0], dtype=np.float32)[:, None] - np.float32(y)
    dx = np.arange(low[1], high[1], dtype=np.float32)[None, :] - np.float32(x)
    u = dx * np.float32(np.cos(angle)) + dy * np.float32(np.sin(angle))
    v = (dy * np.float32(np.cos(angle)) - dx * np.float32(np.sin(angle))) / np.float32(aspect)
    distance = np.hypot(u, v)
    around = np.arctan2(v, u)
    a, b = rng.uniform(-1, 1, 2) * roughness
    outline = 0.93 * (1 + a * np.sin(2 * around + 1) + b * np.sin(3 * around)) * radius
    cover = _edge(distance - outline, 2.0)
    part = h[low[0] : high[0], low[1] : high[1]]
    # A rim a little darker than the middle, as chromatin lies on the nuclear membrane.
    shade = amount * (0.82 + 0.18 * (distance / outline) ** 2)
    part += cover * (np.maximum(part, shade) - part)


def _edge(distance: Field, softness_px: float) -> Field:
    """1 inside (negative distance), 0 outside, a soft step between."""
    return np.clip(0.5 - distance / (2 * softness_px), 0, 1)


def _noise(rng: np.random.Generator, scale_px: float) -> Field:
    """Periodic Gaussian noise, standard deviation 1, correlated over about ``scale_px``."""
    white = fft.rfft2(rng.standard_normal((TEXTURE_PX, TEXTURE_PX), dtype=np.float32))
    fy = fft.fftfreq(TEXTURE_PX).astype(np.float32)[:, None]
    fx = fft.rfftfreq(TEXTURE_PX).astype(np.float32)[None, :]
    white *= np.exp(-2 * np.float32(np.pi * scale_px / 2.4) ** 2 * (fy**2 + fx**2))
    noise = fft.irfft2(white, s=(TEXTURE_PX, TEXTURE_PX))
    return (noise / noise.std()).astype(np.float32)


def _to_bytes(field: Field) -> NDArray[np.uint16]:
    return np.rint(np.clip(field, 0, MOST) * np.float32(255 / MOST)).astype(np.uint16)
