"""Small slides for the tests of slides and features: tiled, pyramidal TIFF files that OpenSlide opens."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import cKDTree

GLASS = (243, 242, 244)
STROMA, NUCLEUS = (228, 158, 190), (92, 62, 138)
TILING: dict[str, Any] = {
    "patch_px": 64,
    "mpp_target": 0.5,
    "min_tissue": 0.5,
    "mask_mpp": 8.0,
    "min_fragment_mm2": 0.005,
    "max_hole_mm2": 0.002,
    "min_tiles": 1,
    "max_pen_fraction": 0.2,
    "min_sharpness": 0.0,
    "max_fold_fraction": 1.0,
    "max_blood_fraction": 1.0,
    "segmenter": "saturation",
    "half_decode": False,
    "mpp_missing": "refuse",
    "mpp_overrides": {},
    "allow_upsampling": False,
}
SLIDES: dict[str, Any] = {"reader": "auto"}
FEATURES: dict[str, Any] = {
    "source": "encode",
    "encoder": "stain_texture",
    "device": "auto",
    "precision": "declared",
    "runtime": "torch",
    "batch": 64,
    "allow_unpinned": False,
    "trust_remote_code": False,
    "max_failed_tiles": 0.01,
}


def tiling(**changes: Any) -> dict[str, Any]:
    """Settings of the tile step for a small slide."""
    return {**TILING, **changes}


def paint(width: int = 1000, height: int = 760, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """An ellipse of stroma with nuclei on glass, uint8 (height, width, 3); ``scale`` enlarges the nuclei."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = np.empty((height, width, 3), np.float32)
    image[:] = GLASS
    inside = ((x - width / 2) / (width * 0.42)) ** 2 + ((y - height / 2) / (height * 0.42)) ** 2 < 1
    image[inside] = STROMA
    for _ in range(int(width * height / 900)):
        cx, cy, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(4, 7) * scale
        x0, x1, y0, y1 = (int(max(v, 0)) for v in (cx - radius, cx + radius + 1, cy - radius, cy + radius + 1))
        part = (slice(y0, y1), slice(x0, x1))
        disc = ((x[part] - cx) ** 2 + (y[part] - cy) ** 2 < radius**2) & inside[part]
        image[part][disc] = NUCLEUS
    image += rng.normal(0, 4, image.shape[:2])[..., None]
    return np.clip(image, 0, 255).astype(np.uint8)


def write_tiff(
    path: Path,
    image: np.ndarray,
    *,
    mpp: float | None = 0.5,
    unit: str = "CENTIMETER",
    levels: tuple[int, ...] = (4,),
    tile: int = 64,
    description: str | None = None,
) -> Path:
    """Write a generic tiled TIFF; ``levels`` are the factors of the coarser levels, area-averaged.

    Args:
        image: uint8 (H, W, 3) or (H, W, 4).
        mpp: goes into the resolution tags; None leaves them out.
        description: ImageDescription of the first page, such as an Aperio header.
    """
    um = {"CENTIMETER": 10_000.0, "INCH": 25_400.0}[unit]
    resolution = {} if mpp is None else {"resolution": (um / mpp, um / mpp), "resolutionunit": unit}
    path.parent.mkdir(parents=True, exist_ok=True)
    extra = {"extrasamples": ["unassalpha"]} if image.shape[2] == 4 else {}
    with tifffile.TiffWriter(path) as tiff:
        for factor in (1, *levels):
            height, width = image.shape[0] // factor, image.shape[1] // factor
            part = image[: height * factor, : width * factor].astype(np.float32)
            small = part.reshape(height, factor, width, factor, -1).mean(axis=(1, 3)).round().astype(np.uint8)
            tiff.write(
                small, tile=(tile, tile), photometric="rgb", metadata=None, subfiletype=int(factor > 1),
                description=description if factor == 1 else None, **(resolution if factor == 1 else {}), **extra,
            )  # fmt: skip
    return path


def damage_tiles(path: Path, numbers: list[int]) -> None:
    """Make native tiles of level 0 unreadable (they point behind the end of the file)."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tag = tiff.pages[0].tags["TileOffsets"]
        offsets = list(tag.value)
        for number in numbers:
            offsets[number] = 1 << 31
        tag.overwrite(offsets)


def aperio(mpp: float | None = 0.25, power: float | None = 40) -> str:
    """An Aperio ImageDescription."""
    facts = "".join(f"|{k} = {v:g}" for k, v in (("AppMag", power), ("MPP", mpp)) if v is not None)
    return f"Aperio Image Library v12.0.15\r\n1000x760 [0,0 1000x760] (64x64) JPEG/RGB Q=70{facts}"


# --- Overviews that are hard for a tissue finder, painted from stain densities by Beer-Lambert ---

#: Optical densities of haematoxylin and eosin per channel (Ruifrok and Johnston 2001).
HAEMATOXYLIN, EOSIN = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11)
#: Light that ink lets through, per channel; green and blue of two brands each.
INKS = {
    "blue": (0.16, 0.28, 0.68),
    "sky": (0.52, 0.70, 0.93),
    "green": (0.14, 0.50, 0.30),
    "lime": (0.62, 0.88, 0.58),
    "red": (0.83, 0.12, 0.16),
    "black": (0.12, 0.12, 0.13),
}
#: Fine pixels (2 microns) per pixel of an overview (8 microns).
FINE = 4


@dataclass
class Overview:
    """A painted overview with its truth.

    Attributes:
        rgb: uint8 (300, 400, 3) at 8 microns per pixel.
        tissue, ink, fold, blood: bool (300, 400), more than half of the pixel; ink over tissue is ink.
        strands: share of a pixel that is stained, float (300, 400).
        fat: bool (300, 400), adipose tissue with its lumens.
    """

    rgb: np.ndarray
    tissue: np.ndarray
    ink: np.ndarray
    fold: np.ndarray
    blood: np.ndarray
    strands: np.ndarray
    fat: np.ndarray


class Painter:
    """Paints one overview of 2.4 x 3.2 mm. Deterministic for a seed."""

    def __init__(self, seed: int = 0, glass: tuple[int, int, int] = GLASS) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape = (300 * FINE, 400 * FINE)
        self.y, self.x = np.mgrid[: self.shape[0], : self.shape[1]].astype(np.float32)
        # Uneven light, as at the seams of a line scanner.
        light = 1 + 0.006 * np.sin(self.x / 170) + 0.004 * (self.x // 320 % 2)
        self.light = light[..., None] * np.array(glass, np.float32)
        self.h = np.zeros(self.shape, np.float32)
        self.e = np.zeros(self.shape, np.float32)
        self.parts = {name: np.zeros(self.shape, bool) for name in ("tissue", "ink", "fold", "blood", "fat")}

    def blob(self, x: float, y: float, rx: float, ry: float) -> np.ndarray:
        """An irregular ellipse; overview pixels."""
        x, y, rx, ry = (v * FINE for v in (x, y, rx, ry))
        inside = np.zeros(self.shape, bool)
        box = tuple(slice(max(int(c - 1.5 * r), 0), int(c + 1.5 * r) + 2) for c, r in ((y, ry), (x, rx)))
        dy, dx = self.y[box] - y, self.x[box] - x
        turns = np.linspace(-np.pi, np.pi, 721)
        wave = sum(self.rng.uniform(-0.06, 0.06) * np.sin(k * turns + self.rng.uniform(0, 6.3)) for k in range(2, 8))
        reach = (1 + wave)[((np.arctan2(dy, dx) + np.pi) * (720 / (2 * np.pi))).astype(int)]
        inside[box] = (dx / rx) ** 2 + (dy / ry) ** 2 < reach**2
        return inside

    def cloud(self, sigma: float) -> np.ndarray:
        """Smooth noise of mean 0 and standard deviation 1."""
        small = ndimage.gaussian_filter(self.rng.normal(size=(150, 200)), sigma, mode="wrap")
        image = Image.fromarray((small / small.std()).astype(np.float32))
        return np.asarray(image.resize(self.shape[::-1], Image.Resampling.BILINEAR))

    def tissue(self, where: np.ndarray, h: float = 0.25, e: float = 0.22, nuclei: float = 0.5) -> None:
        """Stroma with nuclei: mean densities of the two stains."""
        grain = ndimage.uniform_filter(self.rng.standard_normal(self.shape, np.float32), 4) > 0.12
        self.h[where] = (h * (1 - nuclei + nuclei * 2 * grain) * np.exp(0.3 * self.cloud(6)))[where]
        self.e[where] = (e * np.exp(0.25 * self.cloud(4)))[where]
        self.parts["tissue"] |= where

    def adipose(self, where: np.ndarray, cell_um: float = 90, wall_um: float = 5, e: float = 0.22) -> None:
        """Thin walls between clear lumens, with a few wider septa."""
        for spacing, width in ((cell_um, wall_um), (6 * cell_um, 4 * wall_um)):
            n = int(self.shape[0] * self.shape[1] * 4 / spacing**2)
            seeds = self.rng.uniform(0, 1, (n, 2)) * self.shape
            rows, columns = np.nonzero(where)
            near, _ = cKDTree(seeds).query(np.column_stack([rows, columns]), k=2)
            wall = near[:, 1] - near[:, 0] < width / 2  # twice the distance to the border, in 2-micron pixels
            self.h[rows[wall], columns[wall]] = 0.25 * e
            self.e[rows[wall], columns[wall]] = e
        self.parts["fat"] |= where
        self.parts["tissue"] |= where & ((self.h + self.e) > 0)

    def fade(self, factor: float) -> None:
        """Less of both stains everywhere."""
        self.h *= factor
        self.e *= factor

    def fold(self, where: np.ndarray) -> None:
        """Tissue lies there in two layers."""
        where = where & self.parts["tissue"]
        self.h[where] *= 2
        self.e[where] *= 2
        self.parts["fold"] |= where

    def bleed(self, where: np.ndarray) -> None:
        """Red cells: they take eosin, let red through and absorb blue themselves."""
        self.h[where], self.e[where] = 0.02, 0.5
        self.light[where] *= (0.95, 0.98, 0.45)
        self.parts["tissue"] |= where
        self.parts["blood"] |= where

    def line(self, points: list[tuple[float, float]], width_um: float) -> np.ndarray:
        """A polyline through overview pixels."""
        image = Image.new("L", self.shape[::-1])
        path = [(x * FINE, y * FINE) for x, y in points]
        ImageDraw.Draw(image).line(path, fill=255, width=max(1, round(width_um / 2)), joint="curve")
        return np.asarray(image) > 0

    def copy(self) -> Painter:
        """The same painting, to go on with."""
        return copy.deepcopy(self)

    def pen(self, where: np.ndarray, colour: str) -> None:
        """Ink on the cover slip, streaky and paler at its rim."""
        rim = np.clip(2 * ndimage.uniform_filter(where.astype(np.float32), 17) - 1, 0, 1)
        streaks = 1 - 0.25 * np.clip(self.cloud(2), 0, 1.5) / 1.5
        density = -np.log(np.array(INKS[colour], np.float32))
        self.light[where] *= np.exp(-(rim * streaks)[where][:, None] * density)
        self.parts["ink"] |= where

    def dust(self, n: int = 40) -> None:
        """Specks and fibres that are grey and lie above the tissue's plane."""
        for _ in range(n):
            x, y, r = self.rng.uniform(0, 400), self.rng.uniform(0, 300), self.rng.uniform(0.5, 2.2)
            self.light[self.blob(x, y, r, r * 0.7)] *= self.rng.uniform(0.25, 0.6)
        for _ in range(3):
            walk = np.cumsum(self.rng.normal(0, 6, (12, 2)), axis=0) + self.rng.uniform(40, 260, 2)
            self.light[self.line([tuple(p) for p in walk], 12)] *= (0.62, 0.60, 0.60)

    def cover_slip(self, at: float = 372) -> None:
        """Its edge: a dark line with coloured fringes, and another tint of the glass beyond."""
        self.light[self.x > at * FINE] *= (0.965, 0.96, 0.945)
        for offset, colour in ((-1.6, (0.90, 0.93, 0.99)), (0, (0.55, 0.55, 0.56)), (1.6, (0.99, 0.95, 0.88))):
            tilted = self.line([(at + offset - 2, 0), (at + offset + 3, 300)], 10)
            self.light[tilted] *= colour

    def finish(self, quality: int = 72) -> Overview:
        """Render, add the noise of the camera and JPEG's at 4 microns per pixel, then average to 8."""
        noise = 5 * self.rng.standard_normal(self.shape, np.float32)
        image = np.empty((*self.shape, 3), np.uint8)
        for i in range(3):
            absorbed = np.float32(-HAEMATOXYLIN[i] * np.log(10)) * self.h
            absorbed += np.float32(-EOSIN[i] * np.log(10)) * self.e
            np.exp(absorbed, out=absorbed)
            absorbed *= self.light[..., i]
            absorbed += noise
            image[..., i] = np.clip(absorbed, 0, 255, out=absorbed)
        half = np.asarray(Image.fromarray(image).reduce(2)).astype(np.float32)
        half += self.rng.standard_normal(half.shape, np.float32)
        stream = io.BytesIO()
        Image.fromarray(np.clip(half, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=quality, subsampling=2)
        rgb = np.asarray(Image.open(stream).convert("RGB").reduce(2))
        share = {
            name: np.asarray(Image.fromarray(part.view(np.uint8) * np.uint8(255)).reduce(FINE)) / 255
            for name, part in self.parts.items()
        }
        ink = share["ink"] > 0.5
        tissue = (share["tissue"] > 0.5) & ~ink
        fold, blood, fat = (share[name] > 0.5 for name in ("fold", "blood", "fat"))
        return Overview(rgb, tissue, ink, fold & ~ink, blood & ~ink, share["tissue"], fat)


def iou(found: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two masks."""
    return float((found & truth).sum() / max((found | truth).sum(), 1))
