"""Files of the encode step: tiles in, features out, and whether a slide is done."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from morphome.errors import MorphomeError
from morphome.features.feed import SlideWork
from morphome.features.registry import EncoderSpec, encoder_spec, fingerprint_sha256, precision_of
from morphome.features.weights import weights_id
from morphome.files import atomic_h5, check_stamp, read_json, settings_hash, stamp
from morphome.slides.openslide_reader import slide_sample
from morphome.slides.patches import PatchShape
from morphome.slides.reader import ReaderChoice

if TYPE_CHECKING:
    from morphome.features.encode import EncodeJob

FEATURES_FORMAT = "morphome.tile-features"


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


@dataclass(frozen=True)
class Planned:
    """What is known of a slide before a pixel is read.

    Attributes:
        coords: int32 (N, 2), tiles that were planned, and what the tile step wrote beside them.
        status: ``status``, ``reason_code`` and ``reason`` of the tile step.
        work: the tiles to read; None where there are none. Where the tile step took OpenSlide, perhaps because a
            tile showed other pixels, this step takes it too.
        tiles_key: hash of the planned tiles and of the tissue mask behind them.
    """

    job: EncodeJob
    spec: EncoderSpec
    coords: np.ndarray
    coords_attrs: dict[str, Any]
    tile_attrs: dict[str, Any]
    status: dict[str, str]
    shape: PatchShape
    work: SlideWork | None
    tiles_key: str
    fingerprint: str
    precision: str
    weights_sha256: str
    code: str

    @property
    def dct_scale(self) -> int:
        """2 where JPEG tiles are decoded at half their size."""
        return 2 if self.shape.half else 1


def read_tiles(job: EncodeJob, features: Mapping[str, Any], code: str) -> Planned:
    """Plan a slide from its tile file.

    Args:
        features: the whole section of the configuration.
        code: hash of the code of the encode step.

    Raises:
        MorphomeError: the file is of another format, slide or tile size, or the encoder's weights are refused.
    """
    path = Path(job.tiles_h5)
    try:
        with h5py.File(path, "r", locking=False) as handle:
            attrs = dict(handle.attrs)
            check_stamp(attrs, path, "morphome.tiles")
            coords, coords_attrs = handle["coords"][()], dict(handle["coords"].attrs)
    except (OSError, KeyError) as error:
        raise MorphomeError(f"{path}: cannot be read as a tile file: {error}", "run the tile step again") from None
    if attrs["slide_id"] != job.slide_id:
        raise MorphomeError(
            f"{path}: tiles of slide '{attrs['slide_id']}', not '{job.slide_id}'", "check the arguments"
        )
    tiling = job.settings["tiling"]
    sides = (int(coords_attrs["side_x_px"]), int(coords_attrs["side_y_px"]))
    shape = PatchShape(*sides, int(coords_attrs["patch_size"]), half=bool(tiling["half_decode"]))
    status = {name: str(attrs[name]) for name in ("status", "reason_code", "reason")}
    work = None
    if status["status"] == "ok" and len(coords):
        reader = "openslide" if attrs.get("reader") == "openslide" else job.settings["slides"]["reader"]
        work = SlideWork(
            job.slide_id, Path(job.slide_path), coords, shape, reader, str(attrs["slide_sha256_head"])
        )  # fmt: skip
    tiles_key = hashlib.sha256(np.ascontiguousarray(coords).tobytes() + str(coords_attrs["mask_sha256"]).encode())
    return Planned(
        job, encoder_spec(features["encoder"]), coords, coords_attrs, attrs, status, shape, work,
        tiles_key.hexdigest(), fingerprint_sha256(features, tiling), precision_of(features), weights_id(features), code,
    )  # fmt: skip


def finished(plan: Planned) -> dict[str, Any] | None:
    """The record of a slide whose files are there and belong to these tiles, settings and code; else None.

    A slide that failed, or of which tiles could not be read, is tried again: its file may have been fetched anew, or
    a disk have come back.
    """
    job = plan.job
    try:
        with h5py.File(job.h5_out, "r", locking=False) as handle:
            attrs, fingerprint = dict(handle.attrs), handle["features"].attrs["encoder_fingerprint_sha256"]
            n_tiles = len(handle["features"])
        check_stamp(attrs, Path(job.h5_out), FEATURES_FORMAT, job.settings)
        read_json(job.timing_out, "morphome.timing", job.settings)
        asked = {
            "slide_id": job.slide_id,
            "status": "ok",
            "n_tiles_failed": 0,
            "code": plan.code,
            "tiles_key": plan.tiles_key,
            "slide_sha256_head": slide_sample(Path(job.slide_path)),
        }
        if plan.work is not None and plan.work.reader == "openslide":
            asked["reader"] = "openslide"
        if fingerprint != plan.fingerprint or any(attrs.get(name) != value for name, value in asked.items()):
            return None
    except (OSError, KeyError, MorphomeError):
        return None
    names = ("status", "reason_code", "reason", "content_key")
    return {"slide_id": job.slide_id, "n_tiles": n_tiles, **{k: str(attrs[k]) for k in names}, "skipped": True}


def write_features(
    plan: Planned, encoded: Encoded, status: Mapping[str, str], choice: ReaderChoice | None, arithmetic: str
) -> str:
    """Write contiguous datasets with TRIDENT's attribute names and ours; returns the content key.

    Raises:
        MorphomeError: the file cannot be written; nothing of it stays.
    """
    job, tiling = plan.job, {k: v for k, v in plan.job.settings["tiling"].items() if k != "masks"}
    reason = choice.reason if choice else ""
    if choice and choice.name == plan.tile_attrs.get("reader") == "openslide":
        reason = str(plan.tile_attrs.get("reader_reason", reason))  # why the tile step took it
    key = ":".join([
        str(plan.tile_attrs["slide_sha256_head"]),
        settings_hash(tiling),
        str(plan.coords_attrs["mask_sha256"]),
        hashlib.sha256(np.ascontiguousarray(encoded.coords).tobytes()).hexdigest(),
        plan.fingerprint[:12],
    ])  # fmt: skip
    content_key = hashlib.sha256(key.encode()).hexdigest()[:32]
    shape = plan.shape
    with atomic_h5(Path(job.h5_out)) as handle:
        handle.attrs.update(stamp(FEATURES_FORMAT, job.settings))
        handle.attrs.update({
            **status,
            "slide_id": job.slide_id,
            "n_tiles_planned": len(plan.coords),
            "n_tiles_failed": len(encoded.failed),
            "content_key": content_key,
            "code": plan.code,
            "tiles_key": plan.tiles_key,
            "slide_sha256_head": plan.tile_attrs["slide_sha256_head"],
            "reader": choice.name if choice else "",
            "reader_reason": reason,
            "dct_scale": plan.dct_scale,
            "resize": shape.name if min(shape.side_x_px, shape.side_y_px) else "",
        })  # fmt: skip
        handle["features"] = encoded.features
        handle["features"].attrs.update({
            "name": job.slide_id,
            "savetodir": "",
            "encoder": plan.spec.key,
            "encoder_version": plan.spec.version,
            "encoder_fingerprint": plan.fingerprint[:12],
            "encoder_fingerprint_sha256": plan.fingerprint,
            "weights_sha256": plan.weights_sha256,
            "output_variant": plan.spec.variant,
            "precision": plan.precision,
            "arithmetic": arithmetic,
        })  # fmt: skip
        handle["coords"] = encoded.coords
        handle["coords"].attrs.update(plan.coords_attrs)
        handle["sharpness"] = encoded.sharpness
        handle["failed_coords"] = encoded.failed
    return content_key
