"""Microns per pixel of level 0: every source a file offers, which one is used, and whether it may be trusted.

Objective power is not resolution: of 2,460 public TCGA slides 94 say power 20 at 0.2325 microns per pixel. It is
used only on request (``tiling.mpp_missing: assume_from_power``), and is otherwise compared, not believed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from morphome.slides.grid import mpp_effective, side_px
from morphome.slides.reader import SlideError, SlideFacts

#: Level-0 microns per pixel that a scanner can have.
PLAUSIBLE_MPP = (0.1, 1.2)
#: Sources may differ by this share of the smaller one.
SOURCES_AGREE = 0.02
#: Range of mpp x power / 10 that is no conflict.
POWER_RATIO = (0.85, 1.15)
ANISOTROPY_FLAG, ANISOTROPY_REFUSE = 0.01, 0.05
#: Level 0 may be coarser than asked by this factor.
COARSER = 1.05
_UNIT_UM = {"inch": 25_400.0, "centimeter": 10_000.0}
_OME_UNIT_UM = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "um": 1.0, "μm": 1.0, "nm": 1e-3}
_DICOM_SPACING = "PixelMeasuresSequence[0].PixelSpacing"


@dataclass
class MppAudit:
    """Where the resolution of a slide came from and what was made of it; fields as in the audit table.

    ``verdict`` is "ok", "flag" or "quarantine"; with "quarantine", ``reason_code`` and ``reason`` say why.
    ``all_sources`` maps each source to (mpp_x, mpp_y), in the order of preference.
    """

    slide_id: str
    vendor: str
    width_px: int
    height_px: int
    mpp_target: float
    mpp_x: float | None = None
    mpp_y: float | None = None
    mpp_source: str = ""
    all_sources: dict[str, tuple[float, float]] = field(default_factory=dict)
    objective_power: float | None = None
    power_ratio: float | None = None
    anisotropy: float | None = None
    side_x_px: int | None = None
    side_y_px: int | None = None
    mpp_effective: float | None = None
    deviation_pct: float | None = None
    verdict: str = "ok"
    flags: list[str] = field(default_factory=list)
    reason_code: str = ""
    reason: str = ""


def mpp_sources(properties: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """Every source of microns per pixel in a file's properties, best first: (mpp_x, mpp_y).

    A source needs both axes and numbers that can be read; a resolution tag without a unit is no source.
    """
    found: dict[str, tuple[float, float]] = {}

    def add(name: str, x: float | None, y: float | None) -> None:
        if x is not None and y is not None:
            found[name] = (x, y)

    def number(key: str) -> float | None:
        return _number(properties.get(key))

    add("openslide", number("openslide.mpp-x"), number("openslide.mpp-y"))
    add("aperio", number("aperio.MPP"), number("aperio.MPP"))
    for key in properties:
        if key.startswith("mirax.") and key.endswith(".MICROMETER_PER_PIXEL_X") and "LAYER_0_LEVEL_0_SECTION" in key:
            add("mirax", number(key), number(key[:-1] + "Y"))
        if key.endswith(_DICOM_SPACING + "[0]"):
            # Row spacing first (down the slide), then column spacing; millimetres.
            y, x = number(key), number(key[:-2] + "1]")
            add("dicom", None if x is None else x * 1000, None if y is None else y * 1000)
    add("ome", *_ome(properties.get("tiff.ImageDescription", "")))
    um = _UNIT_UM.get(properties.get("tiff.ResolutionUnit", ""))
    x, y = number("tiff.XResolution"), number("tiff.YResolution")
    if um is not None and x and y:
        add("tiff_resolution", um / x, um / y)
    return found


def audit_mpp(slide_id: str, facts: SlideFacts, tiling: Mapping[str, Any]) -> MppAudit:
    """Choose the microns per pixel of a slide and judge it.

    Args:
        facts: what the file says.
        tiling: ``patch_px``, ``mpp_target``, ``mpp_missing``, ``mpp_overrides`` and ``allow_upsampling``.

    Returns:
        The audit row; with the verdict "quarantine", code and reason of the first check that failed.
    """
    audit = MppAudit(slide_id, facts.vendor, facts.width_px, facts.height_px, float(tiling["mpp_target"]))
    power = _number(facts.properties.get("openslide.objective-power"))
    audit.objective_power = power if power and power > 0 else None
    audit.all_sources = mpp_sources(facts.properties)
    override = tiling["mpp_overrides"].get(slide_id)
    if override is not None:
        audit.all_sources = {"override": (float(override), float(override)), **audit.all_sources}
    elif not audit.all_sources and audit.objective_power and tiling["mpp_missing"] == "assume_from_power":
        assumed = 10 / audit.objective_power
        audit.all_sources = {"assumed_from_power": (assumed, assumed)}
        audit.flags.append("assumed_from_power")
    try:
        _judge(audit, facts, tiling)
    except SlideError as error:
        audit.verdict, audit.reason_code, audit.reason = "quarantine", error.code, str(error)
    else:
        audit.verdict = "flag" if audit.flags else "ok"
    return audit


def _judge(audit: MppAudit, facts: SlideFacts, tiling: Mapping[str, Any]) -> None:
    """Fill in the audit, check by check; a check that fails raises :class:`SlideError`."""
    name, override = f"slide '{audit.slide_id}' ({facts.path})", f"tiling.mpp_overrides: {{'{audit.slide_id}': ...}}"
    if not audit.all_sources:
        power = f"objective power {audit.objective_power:g}" if audit.objective_power else "no objective power"
        raise SlideError(
            "missing_mpp",
            f"{name}: the file does not say its microns per pixel ({power})",
            f"set it in {override}" + ("" if not audit.objective_power else ", or tiling.mpp_missing"),
        )
    audit.mpp_source, (x, y) = next(iter(audit.all_sources.items()))
    audit.mpp_x, audit.mpp_y = x, y
    low, high = PLAUSIBLE_MPP
    if not (low <= x <= high and low <= y <= high):
        raise SlideError(
            "implausible_mpp",
            f"{name}: {x:g} x {y:g} microns per pixel from '{audit.mpp_source}' is outside {low:g} to {high:g}",
            f"set the true value in {override}",
        )
    if audit.mpp_source != "override":
        _check_agreement(audit, name, override)
    audit.power_ratio = (x + y) / 2 * audit.objective_power / 10 if audit.objective_power else None
    if audit.power_ratio is None or not POWER_RATIO[0] <= audit.power_ratio <= POWER_RATIO[1]:
        audit.flags.append("power_conflict")
    audit.anisotropy = abs(x / y - 1)
    if audit.anisotropy > ANISOTROPY_REFUSE:
        raise SlideError("anisotropic_mpp", f"{name}: {x:g} x {y:g} microns per pixel differ by more than 5 %",
                         f"set the true value in {override}")  # fmt: skip
    if audit.anisotropy > ANISOTROPY_FLAG:
        audit.flags.append("anisotropic")
    target, patch = audit.mpp_target, int(tiling["patch_px"])
    if max(x, y) > COARSER * target:
        if not tiling["allow_upsampling"]:
            raise SlideError(
                "too_coarse",
                f"{name}: {max(x, y):g} microns per pixel is coarser than the {target:g} asked for",
                "raise tiling.mpp_target, or set tiling.allow_upsampling",
            )
        audit.flags.append("upsampled")
    _check_levels(audit, facts, name)
    audit.side_x_px, audit.side_y_px = side_px(patch, target, x), side_px(patch, target, y)
    audit.mpp_effective = (mpp_effective(audit.side_x_px, x, patch) + mpp_effective(audit.side_y_px, y, patch)) / 2
    audit.deviation_pct = 100 * (audit.mpp_effective / target - 1)


def _check_agreement(audit: MppAudit, name: str, override: str) -> None:
    for other, (x, y) in audit.all_sources.items():
        factor = max(x / audit.mpp_x, audit.mpp_x / x, y / audit.mpp_y, audit.mpp_y / y) if min(x, y) > 0 else math.inf
        if factor - 1 > SOURCES_AGREE:
            raise SlideError(
                "conflicting_mpp",
                f"{name}: '{audit.mpp_source}' says {audit.mpp_x:g} x {audit.mpp_y:g} microns per pixel, "
                f"'{other}' says {x:g} x {y:g}",
                f"set the true value in {override}",
            )


def _check_levels(audit: MppAudit, facts: SlideFacts, name: str) -> None:
    width, height = facts.width_px, facts.height_px
    for (w, h), down in zip(facts.level_sizes, facts.level_downsamples, strict=True):
        if min(w, h) < 1 or w > width or h > height:
            raise SlideError("bad_levels", f"{name}: a level of {w} x {h} px beside a level 0 of {width} x {height} px",
                             "take the slide out of the sheet, or convert it again")  # fmt: skip
        off = max(abs(width / down - w), abs(height / down - h))
        # Levels are whole pixels, and some formats pad them to whole tiles.
        if off > max(2, 0.02 * max(w, h)) and "level_sizes" not in audit.flags:
            audit.flags.append("level_sizes")


def _number(text: str | None) -> float | None:
    try:
        value = float(str(text).strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _ome(description: str) -> tuple[float | None, float | None]:
    """PhysicalSizeX/Y of OME-XML in microns, with its unit (microns where it names none)."""
    if "PhysicalSizeX" not in description:
        return None, None
    values = []
    for axis in "XY":
        size = re.search(rf'\bPhysicalSize{axis}="([^"]*)"', description)
        unit = re.search(rf'\bPhysicalSize{axis}Unit="([^"]*)"', description)
        um = _OME_UNIT_UM.get(unit.group(1) if unit else "µm")
        value = _number(size.group(1)) if size else None
        values.append(value * um if value is not None and um is not None else None)
    return values[0], values[1]
