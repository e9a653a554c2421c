"""Small slides for the tests of slides and features: tiled, pyramidal TIFF files that OpenSlide opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tifffile

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
