"""Models of a whole slide: the features that each demands, and a runner where its publisher documents one.

A slide model is trained on the vectors of one patch encoder, in one variant, at one resolution. Other vectors of the
same length go through it without an error and mean nothing, so a mismatch is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphome.errors import MorphomeError
from morphome.features.fit import MPP_TOLERANCE
from morphome.features.registry import ENCODERS_PATH, encoder_spec, registry_content

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class SlideEncoderSpec:
    """A model of a whole slide.

    Attributes:
        patch_encoders: features that it takes, as ``features.encoder`` names them; any one of them.
        dim: length of the slide's vector; None where it follows the patch encoder or is not published.
        patch_um: least and largest side of a tile, microns; None where its publisher names none.
        source, runner: where its weights are, and the way that :func:`embed_slide` runs it; empty without one.
        licence, licence_url, gated, remote_code, notes: as of a patch encoder.
    """

    key: str
    patch_encoders: tuple[str, ...]
    licence: str
    dim: int | None = None
    patch_um: tuple[float, float] | None = None
    source: str = ""
    runner: str = ""
    remote_code: bool = False
    licence_url: str = ""
    gated: bool = False
    notes: tuple[str, ...] = ()


def read_slide_encoders(path: Path = ENCODERS_PATH) -> dict[str, SlideEncoderSpec]:
    """Rows of the registry file by key, each checked.

    Raises:
        MorphomeError: an unknown or missing key in a row, or a patch encoder that the registry does not know.
    """
    known, specs = {f.name for f in fields(SlideEncoderSpec)}, {}
    for row in registry_content(path)["slide_encoders"]:
        key = row.get("key", "(without a key)")
        if (unknown := sorted(set(row) - known)) or (missing := {"key", "patch_encoders", "licence"} - set(row)):
            wrong = f"unknown keys {unknown}" if unknown else f"{sorted(missing)} missing"
            raise MorphomeError(f"{path}: slide encoder '{key}': {wrong}", "mend the row")
        if key in specs:
            raise MorphomeError(f"{path}: slide encoder '{key}' stands twice", "mend the row")
        for name in row["patch_encoders"]:
            encoder_spec(name)
        if not all(isinstance(note, str) for note in row.get("notes", ())):
            raise MorphomeError(f"{path}: slide encoder '{key}': a note is no text", "put it in quotes")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
        specs[key] = SlideEncoderSpec(**values)
    return specs


SLIDE_ENCODERS: dict[str, SlideEncoderSpec] = read_slide_encoders()


def slide_encoder_spec(key: str) -> SlideEncoderSpec:
    """The row of a slide encoder.

    Raises:
        MorphomeError: no such slide encoder.
    """
    if key not in SLIDE_ENCODERS:
        raise MorphomeError(f"there is no slide encoder '{key}'", f"choose one of: {', '.join(SLIDE_ENCODERS)}")
    return SLIDE_ENCODERS[key]


def require_patch_encoder(slide_key: str, features: Mapping[str, Any], tiling: Mapping[str, Any]) -> None:
    """Refuse features that a slide encoder was not trained on.

    Args:
        features, tiling: sections of the configuration that the features were made with; ``encoder``, ``patch_px``
            and ``mpp_target`` count.

    Raises:
        MorphomeError: another encoder or variant, other tiles, or no such slide encoder.
    """
    slide = slide_encoder_spec(slide_key)
    found = encoder_spec(features["encoder"])
    wanted = [encoder_spec(name) for name in slide.patch_encoders]
    if found not in wanted:
        names = " or ".join(spec.name for spec in wanted)
        same = [spec for spec in wanted if spec.key == found.key]
        why = f" (its variant of {same[0].dim} values, yours has {found.dim})" if same else ""
        raise MorphomeError(
            f"slide encoder '{slide_key}' takes features of {names}{why}, not of {found.name}",
            f"encode the slides with features.encoder: {wanted[0].name}",
        )
    patch_px, mpp_target = int(tiling["patch_px"]), float(tiling["mpp_target"])
    patch_um = patch_px * mpp_target
    if slide.patch_um is None:
        return
    low, high = slide.patch_um
    if not low * (1 - MPP_TOLERANCE) <= patch_um <= high * (1 + MPP_TOLERANCE):
        wanted_um = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        raise MorphomeError(
            f"slide encoder '{slide_key}' was trained on tiles of {wanted_um} um, not of {patch_um:g} um "
            f"(tiling.patch_px {patch_px} at mpp_target {mpp_target:g})",
            f"encode the slides with tiling.patch_px: {patch_px} and mpp_target: {low / patch_px:.4g}",
        )


def embed_slide(
    slide_key: str,
    folder: Path,
    features: np.ndarray,
    coords: np.ndarray,
    side_level0_px: int,
    *,
    trust_remote_code: bool = False,
) -> np.ndarray:
    """One vector of a slide, float32 (dim,), by the publisher's own code from a local folder.

    Args:
        folder: files of ``source``, config.json and code included.
        features: (N, D) of the patch encoder that :func:`require_patch_encoder` accepts.
        coords: int (N, 2), x and y of the tiles at level 0.
        side_level0_px: side of a tile at level 0.
        trust_remote_code: needed, as code of the folder is run.

    Raises:
        MorphomeError: no runner for this slide encoder, no trust, wrong shapes, or a vector that is not finite.
    """
    slide = slide_encoder_spec(slide_key)
    if slide.runner not in ("titan", "prism"):
        raise MorphomeError(
            f"slide encoder '{slide_key}' is not run by morphome", f"use its own package ({slide.licence_url})"
        )
    if not trust_remote_code:
        raise MorphomeError(
            f"slide encoder '{slide_key}' runs code of its publisher ({slide.licence_url})",
            "read what it ships; if you trust it, set features.trust_remote_code: true",
        )
    dims = sorted({encoder_spec(name).dim for name in slide.patch_encoders})
    if features.ndim != 2 or features.shape[1] not in dims or coords.shape != (len(features), 2):
        raise MorphomeError(
            f"slide encoder '{slide_key}' takes features (N, {dims[0]}) and coordinates (N, 2), not "
            f"{features.shape} and {coords.shape}",
            "give the features and coordinates of one slide",
        )
    from morphome.vision import ensure_torchvision

    ensure_torchvision()
    import torch
    import transformers

    network = transformers.AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
    network = network.float().eval()
    tiles = torch.as_tensor(features, dtype=torch.float32)[None]
    with torch.inference_mode():
        if slide.runner == "titan":
            places = torch.as_tensor(coords, dtype=torch.int64)[None]
            vector = network.encode_slide_from_patch_features(tiles, places, side_level0_px)
        else:
            vector = network.slide_representations(tiles)["image_embedding"]
    out = vector.float().reshape(-1).numpy()
    if out.shape != (slide.dim,) or not torch.isfinite(vector).all():
        raise MorphomeError(
            f"slide encoder '{slide_key}' gave {out.shape[0]} values (finite: {bool(torch.isfinite(vector).all())}), "
            f"not {slide.dim} finite ones",
            "check that the folder holds the published model",
        )
    return out
