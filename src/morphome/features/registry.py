"""Encoders: one row per encoder with everything that shapes its vectors, and the fingerprint of that row.

Standard library only at module level: the workflow asks for fingerprints while it builds its graph.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from morphome.errors import MorphomeError

if TYPE_CHECKING:
    import numpy as np

#: Keys of the tiling section that do not choose the tiles of every slide.
_PER_SLIDE_KEYS = ("mpp_overrides",)


@dataclass(frozen=True)
class EncoderSpec:
    """Everything about an encoder that its vectors or its use depend on; nothing about it lives elsewhere.

    Attributes:
        key: name in the configuration.
        version: raised with every change that alters vectors.
        dim: length of a vector.
        input_px: side of the tiles that it takes; None takes any ``tiling.patch_px``.
        supported_mpp: least and largest ``tiling.mpp_target`` for which it is meant, microns per pixel.
        mean, std: normalisation of RGB in [0, 1]; None where the encoder does not normalise.
        resize: filter between tile and input; "none" where there is none.
        variant: pooling or output that is taken.
        precision: arithmetic of the forward pass.
        source, revision, weights_sha256: where weights come from; empty for an encoder without weights.
        arch_kwargs: arguments of the architecture.
        licence, licence_url, gated: of the weights; ``gated`` needs an account that accepted the licence.
    """

    key: str
    version: str
    dim: int
    licence: str
    input_px: int | None = None
    supported_mpp: tuple[float, float] = (0.25, 1.0)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    resize: str = "none"
    variant: str = "default"
    precision: str = "fp32"
    source: str = ""
    revision: str = ""
    weights_sha256: str = ""
    licence_url: str = ""
    gated: bool = False
    arch_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def dimension_names(self) -> tuple[str, ...]:
        """A name per dimension; ``<key>_0`` ... for encoders whose dimensions mean nothing by themselves."""
        if self.key == "stain_texture":
            from morphome.features.dimensions import DIMENSIONS

            return tuple(d.name for d in DIMENSIONS)
        return tuple(f"{self.key}_{i}" for i in range(self.dim))


class Encoder(Protocol):
    """An encoder that is ready to run."""

    spec: EncoderSpec

    def encode(self, tiles: np.ndarray) -> np.ndarray:
        """Vectors float32 (B, dim) of tiles uint8 (B, H, W, 3)."""


ENCODERS: dict[str, EncoderSpec] = {
    spec.key: spec
    for spec in (
        EncoderSpec(
            key="stain_texture",
            version="1",
            dim=64,
            licence="Apache-2.0",
            supported_mpp=(0.25, 2.0),
            variant="dimensions",
        ),
    )
}


def encoder_spec(key: str) -> EncoderSpec:
    """The row of an encoder.

    Raises:
        MorphomeError: no such encoder.
    """
    if key not in ENCODERS:
        raise MorphomeError(
            f"features.encoder: there is no encoder '{key}'", f"choose one of: {', '.join(sorted(ENCODERS))}"
        )
    return ENCODERS[key]


def load(key: str) -> Encoder:
    """The encoder, ready to run.

    Raises:
        MorphomeError: no such encoder.
    """
    spec = encoder_spec(key)
    # One plain import per encoder: the hash of the code behind the encode step follows imports.
    from morphome.features.stain_texture import StainTexture

    return {"stain_texture": StainTexture}[key](spec)


def fingerprint_facts(features: Mapping[str, Any], tiling: Mapping[str, Any]) -> dict[str, Any]:
    """All that turns pixels of known size into vectors; the fingerprint is its hash.

    Which tiles are chosen (tissue share, mask) is not part of it: vectors of the same encoder at the same physical
    size may be used together. Nor are the reader and the number of threads, which do not change pixels.
    """
    spec = asdict(encoder_spec(features["encoder"]))
    for name in ("licence", "licence_url", "gated", "supported_mpp"):
        del spec[name]
    patch_px, mpp_target = int(tiling["patch_px"]), float(tiling["mpp_target"])
    return {
        "encoder": spec,
        "patch_px": patch_px,
        "mpp_target": mpp_target,
        "patch_um": patch_px * mpp_target,
        "tile_resize": "area",
        "dct_scale": 1,
    }


def fingerprint(features: Mapping[str, Any], tiling: Mapping[str, Any]) -> str:
    """First 12 hex digits of :func:`fingerprint_sha256`: the name of a folder of features.

    Args:
        features, tiling: sections of the configuration; of ``features`` only ``encoder`` counts.

    Raises:
        MorphomeError: no such encoder.
    """
    return fingerprint_sha256(features, tiling)[:12]


def fingerprint_sha256(features: Mapping[str, Any], tiling: Mapping[str, Any]) -> str:
    """sha256 of :func:`fingerprint_facts` as canonical JSON; raises as :func:`fingerprint`."""
    return _sha256(fingerprint_facts(features, tiling))


def tiling_key(tiling: Mapping[str, Any]) -> str:
    """Folder name of a tiling, for example ``256px_0.5mpp_ab12cd``; overrides of single slides do not count."""
    shared = {key: value for key, value in tiling.items() if key not in _PER_SLIDE_KEYS}
    numbers = {k: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in shared.items()}
    size = re.sub(r"0+$", "", f"{float(tiling['mpp_target']):.4f}").rstrip(".")
    return f"{int(tiling['patch_px'])}px_{size}mpp_{_sha256(numbers)[:6]}"


def _sha256(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
