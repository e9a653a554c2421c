"""Encoders: one row per encoder with everything that shapes its vectors, and the fingerprint of that row.

The rows are data (``data/encoders.yaml``). Standard library and PyYAML only: the workflow asks for fingerprints while
it builds its graph.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from morphome.errors import MorphomeError

ENCODERS_PATH = Path(__file__).parent / "data" / "encoders.yaml"
#: Keys of the tiling section that do not choose the tiles of every slide.
_PER_SLIDE_KEYS = ("mpp_overrides", "masks")
PRECISIONS = ("fp32", "bf16", "fp16")
LOADERS = ("local", "random", "timm", "resnet", "ctranspath", "transformers", "titan_conch", "conch", "musk")
#: Facts of a row that no vector depends on, or that the checksum of the weights stands for.
_NOT_IN_FINGERPRINT = (
    "licence", "licence_url", "gated", "supported_mpp", "source", "revision", "weights_sha256", "weights_md5", "files",
    "extra_files", "pickled", "remote_code", "min_versions", "packages", "params_m", "gflop", "notes", "variants",
)  # fmt: skip


@dataclass(frozen=True)
class EncoderSpec:
    """Everything about an encoder that its vectors or its use depend on; nothing about it lives elsewhere.

    Attributes:
        key: name in the configuration, without the variant.
        version: raised with every change of morphome's that alters vectors.
        dim, variant, pooling: length of a vector, name of the output that is taken, and how it is made.
        variants: every output on offer, ``{name: (dim, pooling)}``; the first is the default one.
        input_px: sides of the tiles that it takes; empty takes any ``tiling.patch_px``.
        supported_mpp: least and largest ``tiling.mpp_target`` for which it is meant, microns per pixel.
        mean, std: normalisation of RGB in [0, 1]; None where the encoder does not normalise.
        resize: filter of the publisher's own transform ("none" where there is none). Tiles of morphome come at the
            side asked for and are not resized again.
        precision: arithmetic of the forward pass: fp32, bf16 or fp16.
        loader, arch, arch_kwargs: what builds the network. prefix_tokens: class token and registers before the
            patch tokens. unwrap, convert: keys to descend in a checkpoint, and the translation of its names.
        source, revision: ``hf:<owner>/<name>`` and a commit, or an address; empty when there is none.
        files, extra_files: alternatives for the weights, and what the model needs beside them (patterns).
        weights_sha256, weights_md5: checksums that are accepted; both empty for a row that is not pinned.
        licence, licence_url, gated: of the weights; ``gated`` needs an account that accepted the licence.
        pickled: the checkpoint may hold more than tensors. remote_code: its publisher's code is run.
        min_versions, packages: ``{package: least version}``; ``{module: what pip installs}``.
        params_m, gflop: millions of parameters, GFLOP a tile; None where nobody counted.
    """

    key: str
    dim: int
    licence: str
    version: str = "1"
    loader: str = "local"
    variant: str = "default"
    pooling: str = "none"
    variants: dict[str, tuple[int, str]] = field(default_factory=dict)
    input_px: tuple[int, ...] = ()
    supported_mpp: tuple[float, float] = (0.25, 1.2)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    resize: str = "none"
    precision: str = "fp32"
    arch: str = ""
    arch_kwargs: dict[str, Any] = field(default_factory=dict)
    prefix_tokens: int = 1
    unwrap: tuple[str, ...] = ()
    convert: str = ""
    source: str = ""
    revision: str = ""
    files: tuple[str, ...] = ()
    extra_files: tuple[str, ...] = ()
    weights_sha256: tuple[str, ...] = ()
    weights_md5: tuple[str, ...] = ()
    licence_url: str = ""
    gated: bool = False
    pickled: bool = False
    remote_code: bool = False
    min_versions: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    params_m: float | None = None
    gflop: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """``key``, or ``key:variant`` when the variant is not the default one."""
        default = next(iter(self.variants), self.variant)
        return self.key if self.variant == default else f"{self.key}:{self.variant}"

    @property
    def has_weights(self) -> bool:
        """The encoder needs a file of weights."""
        return bool(self.files)

    @property
    def pinned(self) -> bool:
        """The registry knows a checksum of the weights."""
        return bool(self.weights_sha256 or self.weights_md5)

    @property
    def dimension_names(self) -> tuple[str, ...]:
        """A name per dimension; ``<name>_0`` ... for encoders whose dimensions mean nothing by themselves."""
        if self.key == "stain_texture":
            from morphome.features.dimensions import DIMENSIONS

            return tuple(d.name for d in DIMENSIONS)
        return tuple(f"{self.name}_{i}" for i in range(self.dim))


_ROW_KEYS = {f.name for f in fields(EncoderSpec)} - {"dim", "variant", "pooling", "mean", "std"}
_ROW_KEYS |= {"norm", "default_variant"}
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("key", "version", "loader", "resize", "precision", "arch", "convert", "source"), str),
    **dict.fromkeys(("revision", "licence", "licence_url", "norm", "default_variant"), str),
    **dict.fromkeys(("gated", "pickled", "remote_code"), bool),
    **dict.fromkeys(("arch_kwargs", "min_versions", "packages", "variants"), dict),
    **dict.fromkeys(("unwrap", "files", "extra_files", "weights_sha256", "weights_md5", "notes"), list),
    **dict.fromkeys(("input_px", "supported_mpp"), list),
    **dict.fromkeys(("params_m", "gflop"), (int, float)),
    "prefix_tokens": int,
}

_ITEMS: dict[str, type | tuple[type, ...]] = {"input_px": int, "supported_mpp": (int, float)}


def read_registry(path: Path = ENCODERS_PATH) -> dict[str, EncoderSpec]:
    """Rows of a registry file by key, each checked.

    Raises:
        MorphomeError: naming the row and key that is unknown, missing, of the wrong type or twice there.
    """
    content = registry_content(path)
    specs: dict[str, EncoderSpec] = {}
    for row in content["encoders"]:
        spec = _spec(row, content["norms"], path)
        if spec.key in specs:
            raise _bad(path, spec.key, "stands twice")
        specs[spec.key] = spec
    return specs


def registry_content(path: Path = ENCODERS_PATH) -> dict[str, Any]:
    """The registry file as read: ``norms``, ``encoders`` and ``slide_encoders``."""
    # The C loader is ten times as fast, which matters because every start of the command line reads the file.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    if not isinstance(content, dict) or set(content) != {"norms", "encoders", "slide_encoders"}:
        raise MorphomeError(f"{path}: needs norms, encoders and slide_encoders, and nothing else", "mend the file")
    return content


def _bad(path: Path, key: str, why: str) -> MorphomeError:
    return MorphomeError(f"{path}: encoder '{key}': {why}", "mend the row")


def _spec(row: Mapping[str, Any], norms: Mapping[str, Any], path: Path) -> EncoderSpec:
    """One checked row, with its default variant."""
    key = str(row.get("key", "(without a key)"))
    if unknown := sorted(set(row) - _ROW_KEYS):
        raise _bad(path, key, f"unknown keys {unknown}; known are {sorted(_ROW_KEYS)}")
    if missing := sorted({"key", "loader", "variants", "default_variant", "licence"} - set(row)):
        raise _bad(path, key, f"{missing} missing")
    for name, value in row.items():
        if not isinstance(value, _TYPES[name]) or (isinstance(value, bool) and _TYPES[name] is not bool):
            raise _bad(path, key, f"{name}: {value!r} is of the wrong type")
        if isinstance(value, list) and not all(isinstance(item, _ITEMS.get(name, str)) for item in value):
            raise _bad(path, key, f"{name}: {value!r} holds an item of the wrong type")
    if not re.fullmatch(r"[a-z0-9_]+", key):
        raise _bad(path, key, "a key has small letters, digits and _ only")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    default = values.pop("default_variant")
    variants = {name: (v["dim"], v["pooling"]) for name, v in values["variants"].items()}
    if default not in variants:
        raise _bad(path, key, f"default_variant '{default}' is not among its variants")
    values["variants"] = {default: variants[default], **variants}
    if (norm := values.pop("norm", None)) is not None:
        if norm not in norms:
            raise _bad(path, key, f"norm '{norm}' is not among {sorted(norms)}")
        values["mean"], values["std"] = tuple(norms[norm]["mean"]), tuple(norms[norm]["std"])
    spec = EncoderSpec(dim=variants[default][0], variant=default, pooling=variants[default][1], **values)
    _check_values(spec, path)
    return spec


def _check_values(spec: EncoderSpec, path: Path) -> None:
    rules = {
        f"loader '{spec.loader}' is not among {LOADERS}": spec.loader in LOADERS,
        f"precision '{spec.precision}' is not among {PRECISIONS}": spec.precision in PRECISIONS,
        "dimensions must be positive": all(isinstance(d, int) and d > 0 for d, _ in spec.variants.values()),
        "supported_mpp needs a smaller and a larger number": len(spec.supported_mpp) == 2
        and 0 < spec.supported_mpp[0] < spec.supported_mpp[1],
        "input_px needs positive whole numbers": all(isinstance(p, int) and p > 0 for p in spec.input_px),
        "a source is hf:owner/name or an address": not spec.source
        or bool(re.fullmatch(r"hf:[^/ ]+/[^/ ]+|(https?|file)://\S+", spec.source)),
        "a sha256 has 64 hex digits": all(re.fullmatch("[0-9a-f]{64}", s) for s in spec.weights_sha256),
        "an md5 has 32 hex digits": all(re.fullmatch("[0-9a-f]{32}", s) for s in spec.weights_md5),
        "an encoder with weights names files, norm and input_px": spec.loader in ("local", "random")
        or bool(spec.files and spec.mean and spec.input_px),
        "licence must say something": bool(spec.licence),
    }
    for why, holds in rules.items():
        if not holds:
            raise _bad(path, spec.key, why)


ENCODERS: dict[str, EncoderSpec] = read_registry()


@functools.cache
def encoder_spec(name: str) -> EncoderSpec:
    """The row of an encoder.

    Args:
        name: ``key`` for its default variant, or ``key:variant``.

    Raises:
        MorphomeError: no such encoder or variant.
    """
    key, _, variant = name.partition(":")
    if key not in ENCODERS:
        close = difflib.get_close_matches(key, ENCODERS, n=1) or [k for k in ENCODERS if k.startswith(key) and key]
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise MorphomeError(
            f"features.encoder: there is no encoder '{key}'{hint}", f"choose one of: {', '.join(sorted(ENCODERS))}"
        )
    return with_variant(ENCODERS[key], variant) if variant else ENCODERS[key]


def with_variant(spec: EncoderSpec, variant: str) -> EncoderSpec:
    """The row with another of its outputs.

    Raises:
        MorphomeError: it has no such variant.
    """
    if variant not in spec.variants:
        known = ", ".join(f"{spec.key}:{v}" for v in spec.variants)
        raise MorphomeError(
            f"features.encoder: encoder '{spec.key}' has no variant '{variant}'", f"choose one of: {known}"
        )
    dim, pooling = spec.variants[variant]
    return replace(spec, variant=variant, dim=dim, pooling=pooling)


def precision_of(features: Mapping[str, Any]) -> str:
    """The arithmetic of the forward pass: ``features.precision``, or what the row declares."""
    asked = features.get("precision", "declared")
    return encoder_spec(features["encoder"]).precision if asked == "declared" else asked


def spec_facts(spec: EncoderSpec) -> dict[str, Any]:
    """The facts of a row that shape its vectors, without the weights themselves."""
    return {f.name: getattr(spec, f.name) for f in fields(spec) if f.name not in _NOT_IN_FINGERPRINT}


def fingerprint_facts(features: Mapping[str, Any], tiling: Mapping[str, Any]) -> dict[str, Any]:
    """All that turns pixels of known size into vectors; the fingerprint is its hash.

    Which tiles are chosen (tissue share, mask) is not part of it: vectors of the same encoder at the same physical
    size may be used together. Nor are the reader, the device, the runtime, the batch and the number of threads.

    Raises:
        MorphomeError: no such encoder, or its weights are absent or refused.
    """
    from morphome.features.weights import weights_id

    spec = encoder_spec(features["encoder"])
    return _facts(spec, weights_id(features), precision_of(features), *_tile_facts(tiling))


def _tile_facts(tiling: Mapping[str, Any]) -> tuple[int, float, int]:
    return int(tiling["patch_px"]), float(tiling["mpp_target"]), 2 if tiling.get("half_decode") else 1


def _facts(
    spec: EncoderSpec, weights: str, precision: str, patch_px: int, mpp_target: float, dct_scale: int
) -> dict[str, Any]:
    return {
        "encoder": {**spec_facts(spec), "precision": precision},
        "weights_sha256": weights,
        "patch_px": patch_px,
        "mpp_target": mpp_target,
        "patch_um": patch_px * mpp_target,
        "tile_resize": "area",
        "dct_scale": dct_scale,
    }


def fingerprint(features: Mapping[str, Any], tiling: Mapping[str, Any]) -> str:
    """First 12 hex digits of :func:`fingerprint_sha256`: the name of a folder of features.

    Args:
        features, tiling: sections of the configuration; of ``features`` only ``encoder``, ``precision``, ``weights``
            and ``allow_unpinned`` count, of ``tiling`` only ``patch_px``, ``mpp_target`` and ``half_decode``.

    Raises:
        MorphomeError: as :func:`fingerprint_facts`.
    """
    return fingerprint_sha256(features, tiling)[:12]


def fingerprint_sha256(features: Mapping[str, Any], tiling: Mapping[str, Any]) -> str:
    """sha256 of :func:`fingerprint_facts` as canonical JSON; raises as :func:`fingerprint`."""
    from morphome.features.weights import weights_id

    return _fingerprint(features["encoder"], weights_id(features), precision_of(features), *_tile_facts(tiling))


@functools.cache
def _fingerprint(encoder: str, weights: str, precision: str, *tile_facts: Any) -> str:
    # Kept: the graph of a cohort of thousands of slides asks for the same hash thousands of times.
    return _sha256(_facts(encoder_spec(encoder), weights, precision, *tile_facts))


def tiling_key(tiling: Mapping[str, Any]) -> str:
    """Folder name of a tiling, for example ``256px_0.5mpp_ab12cd``; overrides of single slides do not count."""
    shared = {key: value for key, value in tiling.items() if key not in _PER_SLIDE_KEYS}
    numbers = {k: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in shared.items()}
    size = re.sub(r"0+$", "", f"{float(tiling['mpp_target']):.4f}").rstrip(".")
    return f"{int(tiling['patch_px'])}px_{size}mpp_{_sha256(numbers)[:6]}"


def _sha256(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
