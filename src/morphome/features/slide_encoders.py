"""Models of a whole slide: the features that each demands, and a runner where its publisher documents one.

A slide model is trained on the vectors of one patch encoder, in one variant, at one resolution. Other vectors of the
same length go through it without an error and mean nothing, so a mismatch is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphome.errors import MorphomeError
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


def require_bags(slide_key: str, kinds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Refuse feature files that a slide encoder was not trained on, by what the files say.

    Args:
        kinds: with ``encoder``, ``dim`` and ``patch_um`` each, as :func:`morphome.features.inspect.inspect_features`
            gives them.

    Returns:
        What the files do not say and so was not checked.

    Raises:
        MorphomeError: another encoder, dimension or tile size, or no such slide encoder.
    """
    slide, unknown = slide_encoder_spec(slide_key), []
    wanted = [encoder_spec(name) for name in slide.patch_encoders]
    names = " or ".join(f"{spec.name} ({spec.dim} values)" for spec in wanted)
    for kind in kinds:
        named, dim, patch_um = kind["encoder"], kind["dim"], kind["patch_um"]
        fits = [spec for spec in wanted if spec.dim == dim and named in (spec.name, spec.key, "unknown")]
        if not fits:
            raise MorphomeError(
                f"slide encoder '{slide_key}' takes features of {names}, not of {named} ({dim} values)",
                f"encode the slides with features.encoder: {wanted[0].name}",
            )
        if named == "unknown":
            unknown.append("which encoder made the features")
        if slide.patch_um is None:
            continue
        low, high = slide.patch_um
        if patch_um is None:
            unknown.append("the size of a tile in microns")
        elif not low - 1 <= patch_um <= high + 1:
            raise MorphomeError(
                f"slide encoder '{slide_key}' was trained on tiles of {low:g} to {high:g} um, not of {patch_um:g} um",
                "encode the slides again with tiling.patch_px and mpp_target of that size",
            )
    return sorted(set(unknown))


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
        features: (N, D) of the patch encoder that :func:`require_bags` accepts.
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
