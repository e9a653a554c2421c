"""The encode step: features of one slide's tiles.

Each tile is read once at level 0, brought to the encoder's size by one area mean, measured for sharpness and
encoded. A tile that cannot be read is tried once more with a fresh reader, then recorded as failed; it is never
replaced by white and never dropped without a count.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from morphome.errors import MorphomeError
from morphome.features.registry import Encoder, encoder_spec, fingerprint, fingerprint_sha256, load
from morphome.files import atomic_path, check_stamp, file_head, settings_hash, stamp, write_json
from morphome.slides.openslide_reader import OpenSlideReader
from morphome.slides.patches import read_patch, resize_name
from morphome.slides.quality import sharpness
from morphome.slides.reader import SlideError

#: Tiles handed to the encoder at once.
BATCH = 64


@dataclass
class Encoded:
    """Vectors of the tiles that could be read, in the order planned, and the coordinates of those that could not."""

    features: np.ndarray
    coords: np.ndarray
    sharpness: np.ndarray
    failed: np.ndarray
    seconds_read: float = 0.0
    seconds_encode: float = 0.0

    @classmethod
    def none(cls, dim: int) -> Encoded:
        """No tiles."""
        coords = np.zeros((0, 2), np.int32)
        return cls(np.zeros((0, dim), np.float16), coords, np.zeros(0, np.float32), coords.copy())


def run_encode(
    *,
    slide_path: Path,
    slide_id: str,
    tiles_h5: Path,
    settings: Mapping[str, Any],
    h5_out: Path,
    timing_out: Path,
) -> None:
    """Encode one slide.

    Args:
        slide_path: the slide file that was tiled.
        tiles_h5: ``morphome.tiles``.
        settings: sections ``tiling`` and ``features`` (``encoder``, ``max_failed_tiles``).
        h5_out: ``morphome.tile-features``; ``features`` float16 (N, D), ``coords`` int32 (N, 2), ``sharpness``
            float32 (N,), ``failed_coords`` int32 (M, 2). A slide that failed has N = 0 and says why.
        timing_out: ``morphome.timing``.

    Raises:
        MorphomeError: the tiles are of another slide or format, the encoder does not fit the tiling, or a vector
            is not finite.
    """
    started = time.perf_counter()
    spec = encoder_spec(settings["features"]["encoder"])
    _check_fit(settings)
    planned, coords_attrs, tile_attrs = _read_tiles(Path(tiles_h5), slide_id)
    status = {name: tile_attrs[name] for name in ("status", "reason_code", "reason")}
    encoded = Encoded.none(spec.dim)
    if status["status"] == "ok" and len(planned):
        try:
            encoded = _encode_tiles(Path(slide_path), slide_id, planned, coords_attrs, load(spec.key), tile_attrs)
            limit = settings["features"]["max_failed_tiles"]
            if len(encoded.failed) > limit * len(planned):
                raise SlideError(
                    "too_many_failed_tiles",
                    f"slide '{slide_id}' ({slide_path}): {len(encoded.failed)} of {len(planned)} tiles cannot be "
                    f"read; features.max_failed_tiles allows {limit:g}",
                    "fetch the file again and compare its md5, or raise features.max_failed_tiles",
                )
        except SlideError as error:
            status = {"status": "failed", "reason_code": error.code, "reason": str(error)}
            failed = encoded.failed if len(encoded.failed) else planned
            encoded = Encoded.none(spec.dim)
            encoded.failed = failed
    facts = {**status, "slide_id": slide_id, "n_tiles_planned": len(planned), "n_tiles_failed": len(encoded.failed)}
    _write(h5_out, encoded, facts, coords_attrs, tile_attrs, settings)
    seconds = time.perf_counter() - started
    n_read = len(encoded.features)
    timing = {
        "slide_id": slide_id,
        "n_tiles": n_read,
        "seconds_total": seconds,
        "seconds_read": encoded.seconds_read,
        "seconds_encode": encoded.seconds_encode,
        "tiles_per_second": n_read / seconds if n_read else None,
        "reader": "openslide",
        "encoder": spec.key,
    }
    write_json(timing, timing_out, "morphome.timing", settings)


def to_float16(features: np.ndarray, slide_id: str) -> np.ndarray:
    """Cast vectors to float16 after a check.

    Raises:
        MorphomeError: a value is NaN, infinite or beyond the largest float16 (65,504).
    """
    if not np.isfinite(features).all() or (np.abs(features) > np.finfo(np.float16).max).any():
        bad = ~np.isfinite(features) | (np.abs(features) > np.finfo(np.float16).max)
        raise MorphomeError(
            f"slide '{slide_id}': {int(bad.sum())} feature values are not finite in float16 "
            f"(dimensions {sorted(set(np.nonzero(bad)[1].tolist()))[:5]})",
            "this is a fault of the encoder: report it with the slide",
        )
    return features.astype(np.float16)


def _check_fit(settings: Mapping[str, Any]) -> None:
    """The encoder takes tiles of this size and resolution."""
    spec, tiling = encoder_spec(settings["features"]["encoder"]), settings["tiling"]
    if spec.input_px is not None and spec.input_px != tiling["patch_px"]:
        raise MorphomeError(
            f"tiling.patch_px: {tiling['patch_px']}, but features.encoder '{spec.key}' takes {spec.input_px}",
            f"set tiling.patch_px to {spec.input_px}",
        )
    low, high = spec.supported_mpp
    if not low <= tiling["mpp_target"] <= high:
        raise MorphomeError(
            f"tiling.mpp_target: {tiling['mpp_target']:g}, but features.encoder '{spec.key}' is meant for "
            f"{low:g} to {high:g} microns per pixel",
            "change tiling.mpp_target or the encoder",
        )


def _read_tiles(path: Path, slide_id: str) -> tuple[np.ndarray, dict[str, Any], dict[str, Any]]:
    """Planned coordinates, their attributes, and the attributes of the tile file."""
    try:
        with h5py.File(path, "r", locking=False) as handle:
            attrs = dict(handle.attrs)
            check_stamp(attrs, path, "morphome.tiles")
            coords, coords_attrs = handle["coords"][()], dict(handle["coords"].attrs)
    except (OSError, KeyError) as error:
        raise MorphomeError(f"{path}: cannot be read as a tile file: {error}", "run the tile step again") from None
    if attrs["slide_id"] != slide_id:
        raise MorphomeError(f"{path}: tiles of slide '{attrs['slide_id']}', not '{slide_id}'", "check the arguments")
    return coords, coords_attrs, attrs


def _encode_tiles(
    path: Path,
    slide_id: str,
    planned: np.ndarray,
    attrs: Mapping[str, Any],
    encoder: Encoder,
    tile_attrs: Mapping[str, Any],
) -> Encoded:
    """Read and encode every tile in order.

    Raises:
        SlideError: the slide cannot be opened, or is another file than the one that was tiled.
    """
    size = (int(attrs["side_x_px"]), int(attrs["side_y_px"]), int(attrs["patch_size"]))
    vectors = np.empty((len(planned), encoder.spec.dim), np.float16)
    sharp = np.empty(len(planned), np.float32)
    read = np.zeros(len(planned), bool)
    batch: list[np.ndarray] = []
    waiting: list[int] = []
    out = Encoded.none(encoder.spec.dim)

    def flush() -> None:
        if batch:
            started = time.perf_counter()
            vectors[waiting] = to_float16(encoder.encode(np.stack(batch)), slide_id)
            out.seconds_encode += time.perf_counter() - started
            batch.clear()
            waiting.clear()

    reader = OpenSlideReader(path)
    try:
        if file_head(reader.facts.path) != tile_attrs["slide_sha256_head"]:
            raise SlideError("slide_changed", f"slide '{slide_id}': {path} is not the file that was tiled",
                             "run the tile step again")  # fmt: skip
        for number, (x, y) in enumerate(tqdm(planned.tolist(), desc=slide_id, disable=None)):
            started = time.perf_counter()
            try:
                tile = read_patch(reader, x, y, *size)
            except SlideError:
                # OpenSlide keeps an error for the rest of a handle's life: only a fresh one can try again.
                reader.close()
                reader = OpenSlideReader(path)
                try:
                    tile = read_patch(reader, x, y, *size)
                except SlideError:
                    reader.close()
                    reader = OpenSlideReader(path)
                    continue
            out.seconds_read += time.perf_counter() - started
            read[number] = True
            sharp[number] = sharpness(tile)
            batch.append(tile)
            waiting.append(number)
            if len(batch) == BATCH:
                flush()
        flush()
    finally:
        reader.close()
    out.features, out.coords, out.sharpness, out.failed = vectors[read], planned[read], sharp[read], planned[~read]
    return out


def _write(
    path: Path,
    encoded: Encoded,
    facts: Mapping[str, Any],
    coords_attrs: Mapping[str, Any],
    tile_attrs: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    """Contiguous datasets with TRIDENT's attribute names and ours."""
    features, tiling = settings["features"], settings["tiling"]
    spec, mark = encoder_spec(features["encoder"]), fingerprint(features, tiling)
    key = ":".join([
        str(tile_attrs["slide_sha256_head"]),
        settings_hash(tiling),
        str(coords_attrs["mask_sha256"]),
        hashlib.sha256(np.ascontiguousarray(encoded.coords).tobytes()).hexdigest(),
        mark,
    ])  # fmt: skip
    with atomic_path(path) as temporary, h5py.File(temporary, "w", locking=False) as handle:
        handle.attrs.update(stamp("morphome.tile-features", settings))
        handle.attrs.update(facts)
        handle.attrs["content_key"] = hashlib.sha256(key.encode()).hexdigest()[:32]
        handle.attrs["reader"] = "openslide"
        handle.attrs["dct_scale"] = 1
        handle.attrs["slide_sha256_head"] = tile_attrs["slide_sha256_head"]
        sides = (int(coords_attrs["side_x_px"]), int(coords_attrs["side_y_px"]))
        handle.attrs["resize"] = resize_name(*sides, int(tiling["patch_px"])) if min(sides) else ""
        handle["features"] = encoded.features
        handle["features"].attrs.update({
            "name": facts["slide_id"],
            "savetodir": "",
            "encoder": spec.key,
            "encoder_version": spec.version,
            "encoder_fingerprint": mark,
            "encoder_fingerprint_sha256": fingerprint_sha256(features, tiling),
            "weights_sha256": spec.weights_sha256,
            "output_variant": spec.variant,
            "precision": spec.precision,
        })  # fmt: skip
        handle["coords"] = encoded.coords
        handle["coords"].attrs.update(coords_attrs)
        handle["sharpness"] = encoded.sharpness
        handle["failed_coords"] = encoded.failed
