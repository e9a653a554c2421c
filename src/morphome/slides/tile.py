"""The tile step: resolution, tissue, tile grid and quality record of one slide.

A slide that cannot be used never stops a cohort: it gets zero tiles, the status "failed" and a reason.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from morphome.files import atomic_h5, file_sample, file_sha256, stamp, write_json, write_text
from morphome.slides.choose import MEASURES, REASONS, Tiles, choose_tiles, make_mask
from morphome.slides.masks import outline, to_geojson
from morphome.slides.mpp import MppAudit, audit_mpp
from morphome.slides.open import open_slide
from morphome.slides.openslide_reader import OpenSlideReader
from morphome.slides.patches import PatchShape, read_patch
from morphome.slides.reader import ReaderChoice, SlideError, SlideReader
from morphome.slides.thumbnail import THUMBNAIL_PX, draw_refusal, draw_thumbnail, write_thumbnail
from morphome.slides.tissue import TissueMask, saturation_value

#: Tiles read before a slide is accepted, spread over the slide.
READ_TEST_TILES = 5


class OtherPixelsError(Exception):
    """The chosen reader shows other pixels than OpenSlide; ``choice`` says so and takes OpenSlide."""

    def __init__(self, choice: ReaderChoice) -> None:
        self.choice = choice
        super().__init__(choice.reason)


@dataclass
class _Slide:
    """What is known of a slide so far; whatever fails, it is written."""

    slide_id: str
    qc: dict[str, Any]
    tiles: Tiles = field(default_factory=Tiles.none)
    polygons: list[Any] = field(default_factory=list)
    audit: MppAudit | None = None
    mask: TissueMask | None = None
    picture: Image.Image | None = None


def run_tile(
    *,
    slide_path: Path,
    slide_id: str,
    settings: Mapping[str, Any],
    h5_out: Path,
    qc_out: Path,
    geojson_out: Path,
    thumbnail_out: Path,
    made_from: Mapping[str, str] | None = None,
) -> None:
    """Tile one slide.

    Args:
        slide_path: the slide file, or the folder of a DICOM series.
        settings: section ``tiling`` and ``slides.reader``. ``tiling.masks`` is, where it is set, the corrected tissue
            mask of this slide (GeoJSON); :func:`morphome.slides.masks.read_mask` says how it is read.
        h5_out: ``morphome.tiles``; ``coords`` int32 (N, 2) in level-0 pixels, row-major, and per tile ``tissue``,
            ``pen_fraction``, ``fold_fraction``, ``blood_fraction`` (shares of its area) and ``sharpness`` (NaN where
            it is not measured here).
        qc_out: ``morphome.slide_qc``.
        geojson_out: tissue polygons in level-0 pixels, for QuPath.
        thumbnail_out: JPEG with the outline and the tiles.
        made_from: kept in the quality record, for whoever asks whether the files are still right.

    A slide that cannot be used does not raise: the outputs say "failed" with a reason code and a text.

    Raises:
        MorphomeError: the settings are wrong, such as an unknown segmenter, or an output cannot be written.
    """
    started = time.perf_counter()
    tiling = settings["tiling"]
    slide = _Slide(slide_id, _empty_qc(slide_id, tiling))
    try:
        try:
            with open_slide(Path(slide_path), settings["slides"]["reader"]) as reader:
                _tile(slide, reader, tiling)
        except OtherPixelsError as other:
            # The overview may be wrong as well: everything once more, by the reference.
            slide = _Slide(slide_id, _empty_qc(slide_id, tiling))
            with OpenSlideReader(Path(slide_path), other.choice) as reader:
                _tile(slide, reader, tiling)
    except SlideError as error:
        reason = _named(error, slide_id, slide_path)
        slide.qc |= {"status": "failed", "reason_code": error.code, "reason": reason, "n_tiles": 0}
        slide.tiles = Tiles.none()
        slide.picture = draw_refusal(slide_id, error.code, reason)
    _write_tiles(h5_out, slide, settings)
    write_text(json.dumps(to_geojson(slide.polygons), separators=(",", ":")) + "\n", geojson_out)
    write_thumbnail(slide.picture, thumbnail_out)
    slide.qc["seconds"] = round(time.perf_counter() - started, 3)
    slide.qc["made_from"] = dict(made_from or {})
    write_json(slide.qc, qc_out, "morphome.slide_qc", settings)


def _tile(slide: _Slide, reader: SlideReader, tiling: Mapping[str, Any]) -> None:
    """Fill in a slide, step by step, so that what was found before a failure is kept."""
    facts, qc = reader.facts, slide.qc
    qc |= _reader_record(reader.choice) | {"slide_sha256_head": file_sample(facts.path)}
    slide.audit = audit = audit_mpp(slide.slide_id, facts, tiling)
    qc |= asdict(audit)
    if audit.verdict == "quarantine":
        raise SlideError(audit.reason_code, audit.reason)
    fine, coarse = _overviews(reader, audit, tiling["mask_mpp"])
    qc |= _light_record(coarse)
    slide.mask = mask = make_mask(reader, audit, coarse, tiling)
    qc |= _mask_record(mask, tiling)
    slide.polygons = outline(mask.mask, facts.width_px, facts.height_px)
    slide.tiles = tiles = choose_tiles(reader, audit, mask, tiling)
    qc |= _reader_record(_read_test(reader, tiles.coords, audit, tiling)) | _tile_record(tiles)
    if len(tiles.coords) < tiling["min_tiles"]:
        _too_few(slide, tiling)
    side, size = (audit.side_x_px, audit.side_y_px), (facts.width_px, facts.height_px)
    slide.picture = draw_thumbnail(fine, slide.polygons, tiles.coords, *side, *size, tiles.dropped)


def _overviews(reader: SlideReader, audit: MppAudit, mask_mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """A fine overview for the picture and a coarse one of about ``mask_mpp`` for the mask, from one read."""
    facts = reader.facts
    width = max(1, round(facts.width_px * audit.mpp_x / mask_mpp))
    height = max(1, round(facts.height_px * audit.mpp_y / mask_mpp))
    most = min(facts.width_px // width, facts.height_px // height)
    times = max(1, min(math.ceil(THUMBNAIL_PX / max(width, height)), most))
    fine = reader.overview(width * times, height * times)
    return fine, fine if times == 1 else np.asarray(Image.fromarray(fine).reduce(times))


def _read_test(reader: SlideReader, coords: np.ndarray, audit: MppAudit, tiling: Mapping[str, Any]) -> ReaderChoice:
    """Read a few tiles at level 0: a file can open, give its overview and still fail here.

    Tiles of another reader than OpenSlide are compared with OpenSlide's, where it opens the file.

    Returns:
        The reader's choice, with these tiles among the compared ones.

    Raises:
        OtherPixelsError: a tile differs.
        SlideError: a tile cannot be read.
    """
    choice, side = reader.choice, (audit.side_x_px, audit.side_y_px)
    if not len(coords):
        return choice
    picks = coords[np.unique(np.linspace(0, len(coords) - 1, READ_TEST_TILES).round().astype(int))].tolist()
    if tiling["half_decode"]:
        read_patch(reader, *picks[0], PatchShape(*side, int(tiling["patch_px"]), half=True))
    reference = _reference(reader)
    if reference is None:
        for x, y in picks:
            reader.read_level0(x, y, *side)
        return choice
    n, largest = choice.n_probed, choice.max_difference or 0
    with reference:
        for x, y in picks:
            expected = reference.read_level0(x, y, *side)
            try:
                found = reader.read_level0(x, y, *side)
            except SlideError as error:
                why = f"direct decoding failed where OpenSlide reads: {error.problem}"
                raise OtherPixelsError(ReaderChoice("openslide", why, n, largest)) from None
            n, difference = n + 1, int(np.abs(expected.astype(np.int16) - found).max())
            largest = max(largest, difference)
            if difference:
                why = f"the tile at ({x}, {y}) differs from OpenSlide's by up to {difference} grey levels"
                raise OtherPixelsError(ReaderChoice("openslide", why, n, largest))
    return ReaderChoice(choice.name, choice.reason, n, largest)


def _reference(reader: SlideReader) -> OpenSlideReader | None:
    """OpenSlide on the same file; None where it is the reader itself or does not open the file."""
    if reader.choice.name == "openslide":
        return None
    try:
        return OpenSlideReader(reader.facts.path)
    except SlideError:
        return None


def _named(error: SlideError, slide_id: str, path: Path) -> str:
    """The message of an error; it begins with the slide where it does not name the file by itself."""
    if str(path) in error.problem:
        return str(error)
    return str(SlideError(error.code, f"slide '{slide_id}' ({path}): {error.problem}", error.remedy))


def _too_few(slide: _Slide, tiling: Mapping[str, Any]) -> None:
    mask, tiles = slide.mask, slide.tiles
    left_out = ", ".join(f"{tiles.n_dropped(reason)} for {reason}" for reason in REASONS)
    raise SlideError(
        "no_tissue" if not mask.mask.any() else "too_few_tiles",
        f"{len(tiles.coords)} tiles (tiling.min_tiles: {tiling['min_tiles']}) from "
        f"{mask.tissue_mm2:.3g} mm2 of tissue; left out: {left_out}",
        "look at the thumbnail; lower tiling.min_tissue or tiling.min_tiles, correct the mask in QuPath "
        "(tiling.masks), or take the slide out of the sheet",
    )


def _empty_qc(slide_id: str, tiling: Mapping[str, Any]) -> dict[str, Any]:
    """The quality record before anything is known: every key is there, whatever fails."""
    audit = MppAudit(slide_id, "", 0, 0, float(tiling["mpp_target"]), verdict="")
    unknown = dict.fromkeys(
        (
            "width_px", "height_px", "reader", "reader_reason", "parity_n", "parity_max_difference",
            "white_fraction", "grey_fraction", "black_fraction", "mask_source", "segmenter_weights_sha256",
            "tissue_mm2", "tissue_fraction", "n_fragments", "n_holes", "pen_fraction", "fold_fraction",
            "blood_fraction", "stain_saturation", "glass_rgb", "saturation_threshold", "mask_sha256",
            "sharpness_median", "sharpness_p05", "slide_sha256_head", "seconds",
        )
    )  # fmt: skip
    counts = {"n_tiles": 0, **{f"n_dropped_{reason}": 0 for reason in REASONS}}
    return {"status": "ok", **asdict(audit), **unknown, **counts}


def _reader_record(choice: ReaderChoice) -> dict[str, Any]:
    return {
        "reader": choice.name,
        "reader_reason": choice.reason,
        "parity_n": choice.n_probed,
        "parity_max_difference": choice.max_difference,
    }


def _light_record(overview: np.ndarray) -> dict[str, Any]:
    """Shares of the slide that are white, grey or black, with limits as common as they are arbitrary."""
    saturation, value = saturation_value(overview)
    colourless = saturation < 0.1
    return {
        "white_fraction": float((colourless & (value >= 220)).mean()),
        "grey_fraction": float((colourless & (value < 220) & (value >= 50)).mean()),
        "black_fraction": float((value < 50).mean()),
    }


def _mask_record(mask: TissueMask, tiling: Mapping[str, Any]) -> dict[str, Any]:
    stain = mask.overview.saturation[mask.mask]
    weights = tiling.get("segmenter_weights")
    learned = mask.source not in ("made", "geojson")
    return {
        "mask_source": mask.source,
        "segmenter_weights_sha256": file_sha256(Path(weights)) if weights and learned else None,
        "tissue_mm2": mask.tissue_mm2,
        "tissue_fraction": mask.tissue_fraction,
        "n_fragments": mask.n_fragments,
        "n_holes": mask.n_holes,
        "pen_fraction": mask.pen_fraction,
        # Mean HSV saturation of the tissue once the glass is neutral: low on a faded slide.
        "stain_saturation": float(stain.mean()) if len(stain) else None,
        "glass_rgb": list(mask.overview.glass),
        "saturation_threshold": mask.saturation_threshold,
        "mask_sha256": mask.sha256,
    }


def _tile_record(tiles: Tiles) -> dict[str, Any]:
    measured = tiles.measures["sharpness"]
    measured = measured[np.isfinite(measured)]
    return {
        "n_tiles": len(tiles.coords),
        **{f"n_dropped_{reason}": tiles.n_dropped(reason) for reason in REASONS},
        "fold_fraction": tiles.fold_fraction,
        "blood_fraction": tiles.blood_fraction,
        "sharpness_median": float(np.median(measured)) if len(measured) else None,
        "sharpness_p05": float(np.quantile(measured, 0.05)) if len(measured) else None,
    }


def _write_tiles(path: Path, slide: _Slide, settings: Mapping[str, Any]) -> None:
    with atomic_h5(path) as handle:
        handle.attrs.update(stamp("morphome.tiles", settings))
        names = ("slide_id", "status", "reason_code", "reason")
        handle.attrs.update({name: slide.qc[name] for name in names})
        for name in ("slide_sha256_head", "reader", "reader_reason", "mask_source"):
            handle.attrs[name] = slide.qc[name] or ""
        handle["coords"] = slide.tiles.coords
        for name in MEASURES:
            handle[name] = slide.tiles.measures[name]
        handle["coords"].attrs.update(_coords_attrs(slide, settings["tiling"]))


def _coords_attrs(slide: _Slide, tiling: Mapping[str, Any]) -> dict[str, Any]:
    """TRIDENT's nine names, then ours. Magnifications are nominal (10 / mpp), for tools that ask for them."""
    audit = slide.audit or MppAudit(slide.slide_id, "", 0, 0, float(tiling["mpp_target"]))

    def number(value: float | None) -> float:
        return math.nan if value is None else float(value)

    return {
        "patch_size": int(tiling["patch_px"]),
        "patch_size_level0": audit.side_x_px or 0,
        "level0_magnification": 10 / audit.mpp_x if audit.mpp_x else math.nan,
        "target_magnification": 10 / audit.mpp_target,
        "overlap": 0,
        "name": slide.slide_id,
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
        "mask_sha256": slide.mask.sha256 if slide.mask else "",
    }
