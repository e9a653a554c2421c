"""Does an encoder fit the tiles and settings of a run? Asked when a configuration is checked and before encoding.

Standard library only, as :mod:`morphome.features.registry`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from morphome.errors import MorphomeError
from morphome.features.registry import EncoderSpec, encoder_spec

#: What each loader needs, beyond what a row adds: ``{package: least version}``.
_LIBRARIES = {
    "timm": {"timm": "1.0"},
    "random": {"timm": "1.0"},
    "musk": {"timm": "1.0"},
    "transformers": {"transformers": "4.45"},
    "titan_conch": {"transformers": "4.45"},
}
#: Extras of morphome that bring a package.
_EXTRAS = {"transformers": "morphome[transformers]"}
#: Relative difference of microns per pixel that counts as equal (0.571 stands for 4/7).
MPP_TOLERANCE = 0.005


def encoder_problems(full: Mapping[str, Any]) -> list[str]:
    """What speaks against the encoder of a configuration, one line with a remedy each; empty when all is well.

    Args:
        full: a complete configuration with ``features.source: encode``.
    """
    try:
        spec = encoder_spec(full["features"]["encoder"])
    except MorphomeError as error:
        return [_line(error.problem, error.remedy)]
    problems = [*_tile_problems(spec, full["tiling"]), *_setting_problems(spec, full["features"])]
    return [_line(*problem) for problem in problems]


def check_fit(features: Mapping[str, Any], tiling: Mapping[str, Any]) -> None:
    """Refuse tiles that the encoder does not take, and settings that it cannot run with.

    Raises:
        MorphomeError: no such encoder, or the first thing that :func:`encoder_problems` would name.
    """
    spec = encoder_spec(features["encoder"])
    for problem in (*_tile_problems(spec, tiling), *_setting_problems(spec, features)):
        raise MorphomeError(*problem)


def _tile_problems(spec: EncoderSpec, tiling: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Sides and resolutions that the encoder does not take, as (problem, remedy)."""
    patch_px, mpp_target = int(tiling["patch_px"]), float(tiling["mpp_target"])
    low, high = spec.supported_mpp
    problems = []
    if spec.input_px and patch_px not in spec.input_px:
        sides = " or ".join(str(side) for side in spec.input_px)
        problems.append(
            (
                f"tiling.patch_px: {patch_px}, but features.encoder '{spec.name}' takes {sides}",
                _right_side(spec, patch_px, mpp_target),
            )
        )
    elif not low * (1 - MPP_TOLERANCE) <= mpp_target <= high * (1 + MPP_TOLERANCE):
        problems.append(
            (
                f"tiling.mpp_target: {mpp_target:g}, but features.encoder '{spec.name}' is meant for {low:g} to "
                f"{high:g} microns per pixel",
                "change tiling.mpp_target or the encoder",
            )
        )
    return problems


def _right_side(spec: EncoderSpec, patch_px: int, mpp_target: float) -> str:
    """The remedy for a side that the encoder does not take: the same field of view, else the same resolution."""
    side = min(spec.input_px, key=lambda px: abs(px - patch_px))
    patch_um = patch_px * mpp_target
    mpp = patch_um / side
    same_mpp = f"set tiling.patch_px: {side}"
    if not spec.supported_mpp[0] <= mpp <= spec.supported_mpp[1]:
        return same_mpp
    return (
        f"for the {patch_um:g} um of your tiles set patch_px: {side} and mpp_target: {mpp:.3f}; for your resolution "
        f"of {mpp_target:g} set patch_px: {side} alone ({side * mpp_target:g} um)"
    )


def _setting_problems(spec: EncoderSpec, features: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings that contradict the encoder or one another, as (problem, remedy)."""
    precision, runtime = features.get("precision", "declared"), features.get("runtime", "torch")
    problems = []
    if spec.loader == "local":
        if precision not in ("declared", spec.precision):
            problems.append(
                (
                    f"features.precision: {precision}, but '{spec.key}' always computes in {spec.precision}",
                    "set features.precision: declared",
                )
            )
        if runtime != "torch":
            problems.append(
                (f"features.runtime: {runtime} has no use for '{spec.key}', which is no network",
                 "set features.runtime: torch")
            )  # fmt: skip
    if not spec.has_weights and features.get("weights"):
        problems.append((f"features.weights: '{spec.key}' has no weights", "take features.weights out"))
    if runtime == "openvino" and features.get("device") == "cuda":
        problems.append(
            ("features.runtime: openvino runs on CPUs, but features.device is cuda",
             "set features.runtime: torch, or features.device: cpu")
        )  # fmt: skip
    if not features.get("trust_remote_code"):
        problems += _trust_problems(spec)
    return problems


def _trust_problems(spec: EncoderSpec) -> list[tuple[str, str]]:
    where = f" ({spec.licence_url})" if spec.licence_url else ""
    reasons = {
        "runs code that its publisher ships with the weights": spec.remote_code,
        "is published as a Python pickle (read without running code)": spec.pickled,
    }
    return [
        (
            f"features.encoder: '{spec.key}' {reason}{where}",
            "read what it ships; if you trust it, set features.trust_remote_code: true",
        )
        for reason, applies in reasons.items()
        if applies
    ]


def requirement_problems(spec: EncoderSpec) -> list[tuple[str, str]]:
    """Packages that an encoder needs and that are absent or too old here, as (problem, remedy)."""
    problems = []
    for package, least in {**_LIBRARIES.get(spec.loader, {}), **spec.min_versions}.items():
        pip = f"pip install '{_EXTRAS.get(package, f'{package}>={least}')}'"
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            problems.append((f"encoder '{spec.key}' needs the package {package}, which is not installed", pip))
            continue
        if version_numbers(found) < version_numbers(least):
            problems.append(
                (f"encoder '{spec.key}' needs {package} {least} or newer, but {found} is installed",
                 f"pip install '{package}>={least}'")
            )  # fmt: skip
    for module, pip_name in spec.packages.items():
        if importlib.util.find_spec(module) is None:
            problems.append(
                (f"encoder '{spec.key}' needs the package {module}, which is not installed",
                 f"pip install '{pip_name}'")
            )  # fmt: skip
    return problems


def version_numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: (1, 0, 31) of ``1.0.31.dev0``."""
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", version + ".0")[0].split("."))


def _line(problem: str, remedy: str) -> str:
    return f"{problem}. Remedy: {remedy}"
