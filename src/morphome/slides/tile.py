"""The tile step: resolution, tissue, tile grid and quality record of one slide.

A slide that cannot be used never stops a cohort: it gets zero tiles, the status "failed" and a reason.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image
from tqdm import tqdm

from morphome.files import atomic_path, file_head, stamp, write_json, write_text
from morphome.slides.grid import area_share, tile_grid
from morphome.slides.mpp import MppAudit, audit_mpp
from morphome.slides.openslide_reader import OpenSlideReader
from morphome.slides.patches import read_patch
from morphome.slides.quality import sharpness
from morphome.slides.reader import SlideError, SlideReader
from morphome.slides.thumbnail import THUMBNAIL_PX, draw_refusal, draw_thumbnail, write_thumbnail
from morphome.slides.tissue import TissueMask, find_tissue, outline, to_geojson

#: Tiles read before a slide is accepted, spread over the slide.
READ_TEST_TILES = 5


@dataclass
class Tiles:
    """Tiles that were kept, in row-major order, and how many were left out."""

    coords: np.ndarray
    tissue: np.ndarray
    sharpness: np.ndarray
    pen_fraction: np.ndarray
    n_dropped_pen: int = 0
    n_dropped_blur: int = 0

    @classmethod
    def none(cls) -> Tiles:
        """No tiles."""
        return cls(np.zeros((0, 2), np.int32), *(np.zeros(0, np.float32) for _ in range(3)))


def run_tile(
    *,
    slide_path: Path,
    slide_id: str,
    settings: Mapping[str, Any],
    h5_out: Path,
    qc_out: Path,
    geojson_out: Path,
    thumbnail_out: Path,
) -> None:
    """Tile one slide.

    Args:
        slide_path: the slide file, or the folder of a DICOM series.
        settings: section ``tiling``.
        h5_out: ``morphome.tiles``; ``coords`` int32 (N, 2) in level-0 pixels, row-major, and per tile ``tissue``,
            ``pen_fraction`` and ``sharpness`` (NaN where it is not measured here).
        qc_out: ``morphome.slide_qc``.
        geojson_out: tissue polygons in level-0 pixels, for QuPath.
        thumbnail_out: JPEG with the outline and the tiles.

    A slide that cannot be used does not raise: the outputs say "failed" with a reason code and a text.
    """
    started = time.perf_counter()
    tiling = settings["tiling"]
    qc = _empty_qc(slide_id, tiling)
    tiles, polygons, audit, mask = Tiles.none(), [], None, None
    try:
        with OpenSlideReader(Path(slide_path)) as reader:
            facts = reader.facts
            qc["slide_sha256_head"] = file_head(facts.path)
            audit = audit_mpp(slide_id, facts, tiling)
            qc |= asdict(audit)
            if audit.verdict == "quarantine":
                raise SlideError(audit.reason_code, audit.reason)
            fine, coarse = _overviews(reader, audit, tiling["mask_mpp"])
            um_x = facts.width_px * audit.mpp_x / coarse.shape[1]
            um_y = facts.height_px * audit.mpp_y / coarse.shape[0]
            mask = find_tissue(coarse, um_x, um_y, tiling)
            qc |= _mask_record(mask)
            polygons = outline(mask.mask, facts.width_px, facts.height_px)
            tiles = _choose_tiles(reader, audit, mask, tiling)
            _read_test(reader, tiles.coords, audit)
            qc |= _tile_record(tiles)
            if len(tiles.coords) < tiling["min_tiles"]:
                _too_few(slide_id, tiles, mask, tiling)
            picture = draw_thumbnail(
                fine, polygons, tiles.coords, audit.side_x_px, audit.side_y_px, facts.width_px, facts.height_px
            )
    except SlideError as error:
        qc |= {"status": "failed", "reason_code": error.code, "reason": str(error)}
        tiles = Tiles.none()
        qc["n_tiles"] = 0
        picture = draw_refusal(slide_id, error.code, str(error))
    _write_tiles(h5_out, slide_id, tiles, qc, audit, mask, settings)
    write_text(json.dumps(to_geojson(polygons), separators=(",", ":")) + "\n", geojson_out)
    write_thumbnail(picture, thumbnail_out)
    qc["seconds"] = round(time.perf_counter() - started, 3)
    write_json(qc, qc_out, "morphome.slide_qc", settings)


def _overviews(reader: SlideReader, audit: MppAudit, mask_mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """A fine overview for the picture and a coarse one of about ``mask_mpp`` for the mask, from one read."""
    facts = reader.facts
    width = max(1, round(facts.width_px * audit.mpp_x / mask_mpp))
    height = max(1, round(facts.height_px * audit.mpp_y / mask_mpp))
    most = min(facts.width_px // width, facts.height_px // height)
    times = max(1, min(math.ceil(THUMBNAIL_PX / max(width, height)), most))
    fine = reader.overview(width * times, height * times)
    return fine, fine if times == 1 else np.asarray(Image.fromarray(fine).reduce(times))


def _choose_tiles(reader: SlideReader, audit: MppAudit, mask: TissueMask, tiling: Mapping[str, Any]) -> Tiles:
    """Tiles with enough tissue, without ink and, where asked, sharp."""
    facts, side = reader.facts, (audit.side_x_px, audit.side_y_px)
    size = (facts.width_px, facts.height_px)
    coords = tile_grid(*size, *side, bounds=facts.bounds)
    tissue = area_share(mask.mask, coords, *side, *size)
    pen = area_share(mask.pen, coords, *side, *size)
    # Ink hides tissue: a tile half under ink counts as dropped for the ink, not as glass.
    enough = tissue + pen >= tiling["min_tissue"] if mask.pen.any() else tissue >= tiling["min_tissue"]
    inked = enough & (pen > tiling["max_pen_fraction"])
    kept = np.flatnonzero((tissue >= tiling["min_tissue"]) & (tissue > 0) & ~inked)
    sharp = np.full(len(kept), np.nan, np.float32)
    if tiling["min_sharpness"] > 0:
        for i, (x, y) in enumerate(tqdm(coords[kept].tolist(), desc="sharpness", disable=None)):
            sharp[i] = sharpness(read_patch(reader, x, y, *side, int(tiling["patch_px"])))
    blurred = sharp < tiling["min_sharpness"]
    kept, sharp = kept[~blurred], sharp[~blurred]
    return Tiles(coords[kept], tissue[kept], sharp, pen[kept], int(inked.sum()), int(blurred.sum()))


def _read_test(reader: SlideReader, coords: np.ndarray, audit: MppAudit) -> None:
    """Read a few tiles at level 0: a file can open, give its overview and still fail here."""
    picks = np.unique(np.linspace(0, len(coords) - 1, READ_TEST_TILES).round().astype(int)) if len(coords) else []
    for x, y in coords[picks].tolist() if len(coords) else []:
        reader.read_level0(x, y, audit.side_x_px, audit.side_y_px)


def _too_few(slide_id: str, tiles: Tiles, mask: TissueMask, tiling: Mapping[str, Any]) -> None:
    code = "no_tissue" if not mask.mask.any() else "too_few_tiles"
    raise SlideError(
        code,
        f"slide '{slide_id}': {len(tiles.coords)} tiles (tiling.min_tiles: {tiling['min_tiles']}) from "
        f"{mask.tissue_mm2:.3g} mm2 of tissue; {tiles.n_dropped_pen} left out for ink, "
        f"{tiles.n_dropped_blur} for blur",
        "look at the thumbnail; lower tiling.min_tissue or tiling.min_tiles, or take the slide out of the sheet",
    )


def _empty_qc(slide_id: str, tiling: Mapping[str, Any]) -> dict[str, Any]:
    """The quality record before anything is known: every key is there, whatever fails."""
    audit = MppAudit(slide_id, "", 0, 0, float(tiling["mpp_target"]), verdict="")
    unknown = {"width_px": None, "height_px": None}
    measures = ("tissue_mm2", "tissue_fraction", "n_fragments", "pen_fraction", "saturation_threshold", "mask_sha256")
    counts = {"n_tiles": 0, "n_dropped_pen": 0, "n_dropped_blur": 0, "sharpness_median": None}
    return {
        "status": "ok", **asdict(audit), **unknown, **dict.fromkeys(measures), **counts,
        "slide_sha256_head": None, "seconds": None,
    }  # fmt: skip


def _mask_record(mask: TissueMask) -> dict[str, Any]:
    return {
        "tissue_mm2": mask.tissue_mm2,
        "tissue_fraction": mask.tissue_fraction,
        "n_fragments": mask.n_fragments,
        "pen_fraction": mask.pen_fraction,
        "saturation_threshold": mask.saturation_threshold,
        "mask_sha256": mask.sha256,
    }


def _tile_record(tiles: Tiles) -> dict[str, Any]:
    measured = tiles.sharpness[np.isfinite(tiles.sharpness)]
    return {
        "n_tiles": len(tiles.coords),
        "n_dropped_pen": tiles.n_dropped_pen,
        "n_dropped_blur": tiles.n_dropped_blur,
        "sharpness_median": float(np.median(measured)) if len(measured) else None,
    }


def _write_tiles(
    path: Path,
    slide_id: str,
    tiles: Tiles,
    qc: Mapping[str, Any],
    audit: MppAudit | None,
    mask: TissueMask | None,
    settings: Mapping[str, Any],
) -> None:
    with atomic_path(path) as temporary, h5py.File(temporary, "w", locking=False) as handle:
        handle.attrs.update(stamp("morphome.tiles", settings))
        names = ("slide_id", "status", "reason_code", "reason")
        handle.attrs.update({name: qc[name] for name in names})
        handle.attrs["slide_sha256_head"] = qc["slide_sha256_head"] or ""
        handle["coords"] = tiles.coords
        for name in ("tissue", "sharpness", "pen_fraction"):
            handle[name] = getattr(tiles, name)
        handle["coords"].attrs.update(_coords_attrs(slide_id, audit, mask, settings["tiling"]))


def _coords_attrs(
    slide_id: str, audit: MppAudit | None, mask: TissueMask | None, tiling: Mapping[str, Any]
) -> dict[str, Any]:
    """TRIDENT's nine names, then ours. Magnifications are nominal (10 / mpp), for tools that ask for them."""
    audit = audit or MppAudit(slide_id, "", 0, 0, float(tiling["mpp_target"]))

    def number(value: float | None) -> float:
        return math.nan if value is None else float(value)

    return {
        "patch_size": int(tiling["patch_px"]),
        "patch_size_level0": audit.side_x_px or 0,
        "level0_magnification": 10 / audit.mpp_x if audit.mpp_x else math.nan,
        "target_magnification": 10 / audit.mpp_target,
        "overlap": 0,
        "name": slide_id,
        "savetodir": "",
        "level0_width": audit.width_px,
        "level0_height": audit.height_px,
        "mpp_level0_x": number(audit.mpp_x),
        "mpp_level0_y": number(audit.mpp_y),
        "mpp_source": audit.mpp_source,
        "mpp_target": audit.mpp_target,
        "mpp_effective": number(audit.mpp_effective),
        "side_x_px": audit.side_x_px or 0,
        "side_y_px": audit.side_y_px or 0,
        "min_tissue": float(tiling["min_tissue"]),
        "mask_sha256": mask.sha256 if mask else "",
    }
