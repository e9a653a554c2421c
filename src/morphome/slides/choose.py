"""Which places of a slide become tiles: the tissue mask, from whatever source, and what is left out and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from morphome.slides.artefacts import find_blood, find_folds
from morphome.slides.grid import area_share, tile_grid
from morphome.slides.masks import read_mask
from morphome.slides.mpp import MppAudit
from morphome.slides.openslide_reader import OpenSlideReader
from morphome.slides.patches import PatchShape, read_block, row_blocks
from morphome.slides.quality import sharpness
from morphome.slides.reader import SlideReader
from morphome.slides.segmenters import DEFAULT, load_segmenter
from morphome.slides.tissue import TissueMask, count_holes, drop_fragments, find_tissue, prepare, tidy_mask

#: Per-tile numbers besides the coordinates, each float32 (N,); shares are of the tile's area.
MEASURES = ("tissue", "pen_fraction", "fold_fraction", "blood_fraction", "sharpness")
#: Why tiles are left out, in the order in which they are asked: a tile counts once.
REASONS = ("pen", "fold", "blood", "blur")


@dataclass
class Tiles:
    """Tiles that were kept, in row-major order, and those that were left out.

    Attributes:
        coords: int32 (N, 2), level-0 x, y.
        measures: one float32 (N,) for each name of :data:`MEASURES`; sharpness is NaN where it was not measured.
        dropped: coordinates of the tiles left out, by reason.
        fold_fraction, blood_fraction: shares of the tissue, None without tissue.
    """

    coords: np.ndarray
    measures: dict[str, np.ndarray]
    dropped: dict[str, np.ndarray] = field(default_factory=dict)
    fold_fraction: float | None = None
    blood_fraction: float | None = None

    @classmethod
    def none(cls) -> Tiles:
        """No tiles."""
        return cls(np.zeros((0, 2), np.int32), {name: np.zeros(0, np.float32) for name in MEASURES})

    def n_dropped(self, reason: str) -> int:
        """How many tiles were left out for one of :data:`REASONS`."""
        return len(self.dropped.get(reason, ()))


def make_mask(reader: SlideReader, audit: MppAudit, overview: np.ndarray, tiling: Mapping[str, Any]) -> TissueMask:
    """Tissue of a slide: the user's corrected file, else a learned segmenter's, else by saturation.

    Args:
        overview: uint8 (h, w, 3) of the whole slide on the mask grid.
        tiling: ``masks`` is the corrected file of this slide, where there is one.

    Raises:
        SlideError: ``not_brightfield`` or ``bad_mask``.
        MorphomeError: the segmenter is unknown or its weights are not right.
    """
    facts = reader.facts
    um_x = facts.width_px * audit.mpp_x / overview.shape[1]
    um_y = facts.height_px * audit.mpp_y / overview.shape[0]
    name = tiling["segmenter"]
    if name == DEFAULT:
        made = find_tissue(overview, um_x, um_y, tiling)
    else:
        ready = prepare(overview, um_x, um_y)  # before the weights are loaded: it refuses what is not brightfield
        weights = tiling.get("segmenter_weights")
        learned = learned_mask(reader, audit, name, Path(weights) if weights else None, overview.shape[:2])
        made = tidy_mask(learned, ready, tiling, source=name)
    if not tiling.get("masks"):
        return made
    corrected = read_mask(Path(tiling["masks"]), made.mask, facts.width_px, facts.height_px)
    _, n = drop_fragments(corrected, 0)
    return replace(made, mask=corrected, n_fragments=n, n_holes=count_holes(corrected), source="geojson")


def learned_mask(
    reader: SlideReader, audit: MppAudit, name: str, weights: Path | None, shape: tuple[int, int]
) -> np.ndarray:
    """A learned segmenter's mask, made at its own resolution, on the mask grid: bool ``shape``."""
    segmenter = load_segmenter(name, weights)
    facts = reader.facts
    width = min(facts.width_px, max(1, round(facts.width_px * audit.mpp_x / segmenter.mpp)))
    height = min(facts.height_px, max(1, round(facts.height_px * audit.mpp_y / segmenter.mpp)))
    found = np.asarray(segmenter(reader.overview(width, height)))
    if found.shape != (height, width) or found.dtype != bool:
        raise TypeError(f"segmenter '{name}' gave {found.dtype} {found.shape}, not bool {(height, width)}")
    image = Image.fromarray(found.astype(np.uint8) * 255)
    return np.asarray(image.resize(shape[::-1], Image.Resampling.BOX)) >= 128


def choose_tiles(reader: SlideReader, audit: MppAudit, mask: TissueMask, tiling: Mapping[str, Any]) -> Tiles:
    """Tiles with enough tissue, without the ink, folds, blood and blur that the settings refuse."""
    facts, side = reader.facts, (audit.side_x_px, audit.side_y_px)
    size = (facts.width_px, facts.height_px)
    coords = tile_grid(*size, *side, bounds=facts.bounds)
    fold, blood = find_folds(mask.overview, mask.mask), find_blood(mask.overview, mask.mask)
    tissue, pen, folded, bloody = (area_share(m, coords, *side, *size) for m in (mask.mask, mask.pen, fold, blood))
    enough = (tissue >= tiling["min_tissue"]) & (tissue > 0)
    # Ink hides tissue: a tile half under ink counts as dropped for the ink, not as glass. But where a user has drawn
    # the tissue, ink is no reason against it.
    hidden = tissue + pen >= tiling["min_tissue"] if mask.pen.any() else enough
    inked = hidden & (pen > tiling["max_pen_fraction"]) & (mask.source != "geojson")
    dropped = {"pen": coords[inked]}
    left = enough & ~inked
    for reason, share, most in (
        ("fold", folded, tiling["max_fold_fraction"]),
        ("blood", bloody, tiling["max_blood_fraction"]),
    ):
        over = left & (share > most)
        dropped[reason] = coords[over]
        left &= ~over
    kept = np.flatnonzero(left)
    sharp = np.full(len(kept), np.nan, np.float32)
    if tiling["min_sharpness"] > 0:
        sharp = measure_sharpness(reader, coords[kept], audit, tiling)
    # NaN is no blur: a tile that cannot be read stays planned, and is counted as failed where it is encoded.
    blurred = sharp < tiling["min_sharpness"]
    dropped["blur"] = coords[kept[blurred]]
    kept, sharp = kept[~blurred], sharp[~blurred]
    values = (tissue[kept], pen[kept], folded[kept], bloody[kept], sharp)
    n = int(mask.mask.sum())
    shares = (float(fold.sum() / n), float(blood.sum() / n)) if n else (None, None)
    return Tiles(coords[kept], dict(zip(MEASURES, values, strict=True)), dropped, *shares)


def measure_sharpness(
    reader: SlideReader, coords: np.ndarray, audit: MppAudit, tiling: Mapping[str, Any]
) -> np.ndarray:
    """Sharpness of tiles at the target resolution, float32 (N,); NaN where a tile cannot be read."""
    shape = PatchShape(audit.side_x_px, audit.side_y_px, int(tiling["patch_px"]), bool(tiling["half_decode"]))
    sharp = np.full(len(coords), np.nan, np.float32)
    # A handle of its own: OpenSlide keeps an error for the rest of a handle's life.
    with reader.another() as own:
        for part in tqdm(row_blocks(coords), desc="sharpness", disable=None):
            block = read_block(own, coords[part], shape, lambda: OpenSlideReader(reader.facts.path))
            sharp[np.arange(part.start, part.stop)[block.ok]] = [sharpness(tile) for tile in block.tiles]
    return sharp
