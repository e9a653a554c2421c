"""What ``morphome encoders`` shows: the registry as a table, and whether an encoder can be used here and now."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from morphome.errors import MorphomeError
from morphome.features.fit import requirement_problems
from morphome.features.registry import ENCODERS, EncoderSpec, encoder_spec
from morphome.features.slide_encoders import SLIDE_ENCODERS
from morphome.features.weights import RECORD_NAME, checksum, find_files, weights_folder, weights_id, weights_path

_BYTES_PER_PARAMETER = 4
_DEFAULT_SIDE_PX = 224


@dataclass(frozen=True)
class Check:
    """One line of doctor.

    Attributes:
        encoder: as it was asked for.
        name: what was looked at: packages, code, access, weights, checksum, disk, forward.
        status: ``ok``, ``warn`` (works, but look at it) or ``fail`` (cannot be used).
        detail, remedy: what was found, and what to do about it; the remedy is empty when all is well.
    """

    encoder: str
    name: str
    status: str
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.status:4}  {self.encoder}  {self.name}: {self.detail}"
        return f"{line}\n      Remedy: {self.remedy}" if self.remedy else line


def encoder_rows() -> list[dict[str, str]]:
    """The registry for people, one row per encoder; every cell is text."""
    return [
        {
            "key": spec.key,
            "dim": " ".join(
                f"{dim}:{name}" if i else str(dim) for i, (name, (dim, _)) in enumerate(spec.variants.items())
            ),
            "input_px": " ".join(map(str, spec.input_px)) or "any",
            "mpp": f"{spec.supported_mpp[0]:g}-{spec.supported_mpp[1]:g}",
            "precision": spec.precision,
            "params_m": "" if spec.params_m is None else f"{spec.params_m:g}",
            "gated": "yes" if spec.gated else "no",
            "pinned": "" if not spec.has_weights else "yes" if spec.pinned else "no",
            "weights": _weights_cell(spec),
            "licence": spec.licence,
            "notes": " ".join(_with_stop(note) for note in spec.notes),
        }
        for spec in ENCODERS.values()
    ]


def slide_encoder_rows() -> list[dict[str, str]]:
    """Slide encoders for people: what each demands."""
    return [
        {
            "key": slide.key,
            "dim": "" if slide.dim is None else str(slide.dim),
            "features of": " or ".join(slide.patch_encoders),
            "patch_um": "" if slide.patch_um is None else "-".join(f"{um:g}" for um in sorted(set(slide.patch_um))),
            "runs here": "yes" if slide.runner else "no",
            "licence": slide.licence,
            "notes": " ".join(_with_stop(note) for note in slide.notes),
        }
        for slide in SLIDE_ENCODERS.values()
    ]


def table_text(rows: Sequence[Mapping[str, str]], columns: Sequence[str] | None = None) -> str:
    """Rows as lines with columns of equal width, headed by their names; fit for a pipe.

    Args:
        columns: those to show, in order; all but ``notes`` by default.
    """
    shown = list(columns or [name for name in rows[0] if name != "notes"])
    lines = [shown, *([row[name] for name in shown] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown))]
    return "\n".join("  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def doctor(keys: Sequence[str], features: Mapping[str, Any] | None = None) -> list[Check]:
    """Whether encoders can be used on this machine, looked at from the packages to a forward pass.

    Args:
        keys: encoders, with or without a variant.
        features: section of a configuration for ``weights``, ``allow_unpinned`` and ``trust_remote_code``; its
            ``encoder`` is ignored.

    Returns:
        Checks in order. An encoder can be used if none of its checks has failed.

    Raises:
        MorphomeError: no such encoder.
    """
    return [check for key in keys for check in _examine(key, dict(features or {}))]


def _examine(name: str, features: dict[str, Any]) -> list[Check]:
    spec, features = encoder_spec(name), {**features, "encoder": name}
    checks = [Check(name, "packages", "fail", *problem) for problem in requirement_problems(spec)]
    if not checks:
        checks.append(Check(name, "packages", "ok", "all there and new enough"))
    trusted = bool(features.get("trust_remote_code")) or not (spec.remote_code or spec.pickled)
    if not trusted:
        what = "runs code of its publisher" if spec.remote_code else "is published as a pickle"
        checks.append(
            Check(name, "code", "warn", f"{what} ({spec.licence_url})",
                  "read it; if you trust it, set features.trust_remote_code: true")
        )  # fmt: skip
    if spec.has_weights:
        checks += _weights_checks(name, spec, features)
    if any(check.status == "fail" for check in checks):
        return checks
    if not trusted:
        return [*checks, Check(name, "forward", "warn", "not tried, as its code is not trusted",
                               "set features.trust_remote_code: true to try it")]  # fmt: skip
    return [*checks, _forward_check(name, spec, features)]


def _weights_checks(name: str, spec: EncoderSpec, features: dict[str, Any]) -> list[Check]:
    try:
        path = weights_path(features)
    except MorphomeError as error:
        absent = Check(name, "weights", "fail", error.problem, error.remedy)
        return [absent, *_access_checks(name, spec), _disk_check(name, spec)]
    checks = [Check(name, "weights", "ok", str(path))]
    first = path if path.is_file() else find_files(spec, path)[0]
    try:
        weights_id({**features, "allow_unpinned": True})
    except MorphomeError as error:
        return [*checks, Check(name, "checksum", "fail", error.problem, error.remedy)]
    if spec.pinned:
        return [*checks, Check(name, "checksum", "ok", "is that of the registry")]
    recorded = " and is that of the fetched file" if (first.parent / RECORD_NAME).exists() else ""
    allowed = bool(features.get("allow_unpinned"))
    return [
        *checks,
        Check(
            name,
            "checksum",
            "warn",
            f"sha256 {checksum(first)}{recorded}; the registry knows none to compare with",
            "" if allowed else "compare it with what the publisher states, then set features.allow_unpinned: true",
        ),
    ]


def _access_checks(name: str, spec: EncoderSpec) -> list[Check]:
    """Whether there is a token for gated weights; the token itself is never shown."""
    if not (spec.gated and spec.source.startswith("hf:")):
        return []
    import huggingface_hub

    if huggingface_hub.get_token():
        return [Check(name, "access", "ok", f"a token is set; the licence must be accepted at {spec.licence_url}")]
    return [
        Check(name, "access", "fail", f"gated ({spec.licence}), and no token is set",
              f"accept the licence at {spec.licence_url}, then set HF_TOKEN or run: hf auth login")
    ]  # fmt: skip


def _disk_check(name: str, spec: EncoderSpec) -> Check:
    """Room for weights that are still to be fetched; their size follows from the number of parameters."""
    folder = weights_folder(spec.key)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if spec.params_m is None:
        return Check(name, "disk", "ok", f"{free / 1e9:.1f} GB free in {existing}; size of the weights not known")
    needed = spec.params_m * 1e6 * _BYTES_PER_PARAMETER
    detail = f"{free / 1e9:.1f} GB free in {existing}, about {needed / 1e9:.1f} GB needed"
    if free < needed:
        return Check(name, "disk", "fail", detail, "make room, or set MORPHOME_WEIGHTS to a folder on another disk")
    return Check(name, "disk", "ok", detail)


def _forward_check(name: str, spec: EncoderSpec, features: dict[str, Any]) -> Check:
    """One synthetic tile through the encoder: as many finite values as the registry says."""
    side = spec.input_px[0] if spec.input_px else _DEFAULT_SIDE_PX
    tile = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    try:
        vector = _vector(tile, features)
    except MorphomeError as error:
        return Check(name, "forward", "fail", error.problem, error.remedy)
    if vector.shape != (1, spec.dim) or not np.isfinite(vector).all():
        return Check(
            name,
            "forward",
            "fail",
            f"a tile gave {vector.shape[-1]} values (finite: {bool(np.isfinite(vector).all())}), not {spec.dim} "
            "finite ones",
            "the weights or the variant do not belong to this encoder",
        )
    return Check(name, "forward", "ok", f"a tile of {side} px gives {spec.dim} finite values")


def _vector(tile: np.ndarray, features: Mapping[str, Any]) -> np.ndarray:
    """Vectors (1, D) of a tile uint8 (1, H, W, 3), in fp32 on the CPU."""
    from morphome.features.encoders import load_encoder

    plain = {"device": "cpu", "precision": "fp32", "runtime": "torch", "batch": 1, "allow_unpinned": True}
    return load_encoder({**features, **plain}).encode(tile)


def _weights_cell(spec: EncoderSpec) -> str:
    if not spec.has_weights:
        return "none needed"
    return "here" if find_files(spec, weights_folder(spec.key)) else "by hand" if not spec.source else "prefetch"


def _with_stop(text: str) -> str:
    return text if text.endswith(".") else f"{text}."
