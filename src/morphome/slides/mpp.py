"""Microns per pixel of level 0: every source a file offers, which one is used, and whether it may be trusted.

Objective power is not resolution: of 2,460 public TCGA slides 94 say power 20 at 0.2325 microns per pixel. It is
used only on request (``tiling.mpp_missing: assume_from_power``), and is otherwise compared, not believed. Every
source is kept, none is rounded, and where nothing is known nothing is guessed: the slide is listed with a remedy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from morphome.slides.grid import mpp_effective, side_px
from morphome.slides.reader import SlideError, SlideFacts
from morphome.slides.tiff_directory import TIFF_ERRORS, NotDirectError, first_page

#: Level-0 microns per pixel that a scanner can have.
PLAUSIBLE_MPP = (0.1, 1.2)
#: Sources may differ by this share of the smaller one.
SOURCES_AGREE = 0.02
#: Range of mpp x power / 10 that is no conflict.
POWER_RATIO = (0.85, 1.15)
#: Resolution tags that programs write when they know none: no word against a source that is meant.
SCREEN_DPI = (72, 96)
ANISOTROPY_FLAG, ANISOTROPY_REFUSE = 0.01, 0.05
#: Level 0 may be coarser than asked by this factor.
COARSER = 1.05
#: A level's size may differ from level 0 over its downsample by this many pixels or this share, whichever is more.
LEVEL_PX, LEVEL_SHARE = 2, 0.001
#: Factors between two sources that come from units, and not from optics.
_UNIT_FACTORS = {
    2.54: "inches and centimetres",
    10.0: "millimetres and centimetres",
    25.4: "inches and millimetres",
    100.0: "centimetres and metres",
    1000.0: "microns and nanometres or millimetres",
}
_UNIT_UM = {"inch": 25_400.0, "centimeter": 10_000.0}
_OME_UNIT_UM = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "um": 1.0, "μm": 1.0, "nm": 1e-3}
_DICOM_SPACING = "PixelMeasuresSequence[0].PixelSpacing"


@dataclass
class MppAudit:
    """Where the resolution of a slide came from and what was made of it; fields as in the audit table.

    Attributes:
        mpp_source: the source that is used; ``override``, ``assumed_from_power`` and ``assumed_for_cohort`` are ours.
        all_sources: (mpp_x, mpp_y) of each source, in the order of preference.
        resolution_unit: unit of the TIFF resolution tag; "absent" where the file has a resolution and no unit.
        power_ratio: mean mpp x objective power / 10; 1 for an optic that is what its name says.
        anisotropy: ``|mpp_x / mpp_y - 1|``.
        level_downsamples: real factors of the levels, level 0 first.
        mpp_effective, deviation_pct: what a tile is read at (mean of both axes), and its distance from what was
            asked in percent; ``deviation_x_pct`` and ``deviation_y_pct`` per axis.
        verdict: "ok", "flag" or "quarantine"; with "quarantine", ``reason_code`` and ``reason`` say why.
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
    resolution_unit: str = ""
    objective_power: float | None = None
    power_ratio: float | None = None
    anisotropy: float | None = None
    level_downsamples: list[float] = field(default_factory=list)
    side_x_px: int | None = None
    side_y_px: int | None = None
    mpp_effective: float | None = None
    deviation_pct: float | None = None
    deviation_x_pct: float | None = None
    deviation_y_pct: float | None = None
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
        tiling: ``patch_px``, ``mpp_target``, ``mpp_missing`` ("refuse", "assume_from_power" or a number for every
            slide without a source), ``mpp_overrides`` (by slide id, a number or x and y), ``allow_upsampling`` and
            ``half_decode``.

    Returns:
        The audit row; with the verdict "quarantine", code and reason of the first check that failed.
    """
    audit = MppAudit(slide_id, facts.vendor, facts.width_px, facts.height_px, float(tiling["mpp_target"]))
    audit.level_downsamples = [float(down) for down in facts.level_downsamples]
    power = _number(facts.properties.get("openslide.objective-power"))
    audit.objective_power = power if power and power > 0 else None
    properties = _with_true_unit(facts)
    audit.resolution_unit = properties.get("tiff.ResolutionUnit", "")
    audit.all_sources = mpp_sources(properties)
    override, missing = tiling["mpp_overrides"].get(slide_id), tiling["mpp_missing"]
    if override is not None:
        x, y = override if isinstance(override, (list, tuple)) else (override, override)
        audit.all_sources = {"override": (float(x), float(y)), **audit.all_sources}
    elif not audit.all_sources and isinstance(missing, (int, float)):
        _assume(audit, "assumed_for_cohort", float(missing))
    elif not audit.all_sources and audit.objective_power and missing == "assume_from_power":
        _assume(audit, "assumed_from_power", 10 / audit.objective_power)
    try:
        _judge(audit, facts, tiling)
    except SlideError as error:
        audit.verdict, audit.reason_code, audit.reason = "quarantine", error.code, str(error)
    else:
        audit.verdict = "flag" if audit.flags else "ok"
    return audit


def _assume(audit: MppAudit, source: str, mpp: float) -> None:
    audit.all_sources = {source: (mpp, mpp)}
    audit.flags.append(source)


def _judge(audit: MppAudit, facts: SlideFacts, tiling: Mapping[str, Any]) -> None:
    """Fill in the audit, check by check; a check that fails raises :class:`SlideError`."""
    name, override = f"slide '{audit.slide_id}' ({facts.path})", f"tiling.mpp_overrides: {{'{audit.slide_id}': ...}}"
    if not audit.all_sources:
        raise _missing(audit, name, override)
    audit.mpp_source, (x, y) = next(iter(audit.all_sources.items()))
    audit.mpp_x, audit.mpp_y = x, y
    correct = "correct tiling.mpp_missing" if audit.mpp_source == "assumed_for_cohort" else (
        f"set the true value in {override}")  # fmt: skip
    low, high = PLAUSIBLE_MPP
    if not (low <= x <= high and low <= y <= high):
        raise SlideError(
            "implausible_mpp",
            f"{name}: {x:g} x {y:g} microns per pixel from '{audit.mpp_source}' is outside {low:g} to {high:g}"
            + _looks_like_a_unit(audit),
            correct,
        )
    if audit.mpp_source != "override":
        _check_agreement(audit, name, correct)
    audit.power_ratio = (x + y) / 2 * audit.objective_power / 10 if audit.objective_power else None
    if audit.power_ratio is None or not POWER_RATIO[0] <= audit.power_ratio <= POWER_RATIO[1]:
        audit.flags.append("power_conflict")
    audit.anisotropy = abs(x / y - 1)
    if audit.anisotropy > ANISOTROPY_REFUSE:
        raise SlideError("anisotropic_mpp", f"{name}: {x:g} x {y:g} microns per pixel differ by more than 5 %",
                         correct)  # fmt: skip
    if audit.anisotropy > ANISOTROPY_FLAG:
        audit.flags.append("anisotropic")
    target = audit.mpp_target
    if max(x, y) > COARSER * target:
        if not tiling["allow_upsampling"]:
            raise SlideError(
                "too_coarse",
                f"{name}: {max(x, y):g} microns per pixel is coarser than the {target:g} asked for",
                "raise tiling.mpp_target, or set tiling.allow_upsampling",
            )
        audit.flags.append("upsampled")
    _check_levels(audit, facts, name)
    _set_sides(audit, name, int(tiling["patch_px"]), bool(tiling["half_decode"]))


def _missing(audit: MppAudit, name: str, override: str) -> SlideError:
    power = f"objective power {audit.objective_power:g}" if audit.objective_power else "no objective power"
    unit = {"none": "its unit is 'none'", "absent": "it has no unit", "unknown": "its unit is not known"}
    no_unit = unit.get(audit.resolution_unit)
    beside = f"; a TIFF resolution is no source when {no_unit}" if no_unit else ""
    return SlideError(
        "missing_mpp",
        f"{name}: the file does not say its microns per pixel ({power}{beside})",
        f"set it for this slide in {override}, or for all slides that do not say it in tiling.mpp_missing: NUMBER"
        + (" (or assume_from_power)" if audit.objective_power else ""),
    )


def _set_sides(audit: MppAudit, name: str, patch: int, half: bool) -> None:
    """Sides of a tile in whole level-0 pixels, and how far what is read lies from what was asked."""
    x, y, target = audit.mpp_x, audit.mpp_y, audit.mpp_target
    audit.side_x_px, audit.side_y_px = side_px(patch, target, x, even=half), side_px(patch, target, y, even=half)
    read_x, read_y = mpp_effective(audit.side_x_px, x, patch), mpp_effective(audit.side_y_px, y, patch)
    audit.mpp_effective = (read_x + read_y) / 2
    audit.deviation_pct = 100 * (audit.mpp_effective / target - 1)
    audit.deviation_x_pct, audit.deviation_y_pct = 100 * (read_x / target - 1), 100 * (read_y / target - 1)
    if half and min(audit.side_x_px, audit.side_y_px) < 2 * patch:
        raise SlideError(
            "half_decode_too_fine",
            f"{name}: a tile is {audit.side_x_px} x {audit.side_y_px} level-0 pixels, fewer than twice the {patch} of "
            "tiling.patch_px, so that its half-size picture would have to be enlarged",
            f"set tiling.half_decode to false, or tiling.mpp_target to {2 * max(x, y):g} or more",
        )


def _check_agreement(audit: MppAudit, name: str, correct: str) -> None:
    for other, (x, y) in audit.all_sources.items():
        if other == "tiff_resolution" and any(x == y == _UNIT_UM["inch"] / dpi for dpi in SCREEN_DPI):
            audit.flags.append("screen_resolution")
            continue
        factor = max(x / audit.mpp_x, audit.mpp_x / x, y / audit.mpp_y, audit.mpp_y / y) if min(x, y) > 0 else math.inf
        if factor - 1 > SOURCES_AGREE:
            raise SlideError(
                "conflicting_mpp",
                f"{name}: '{audit.mpp_source}' says {audit.mpp_x:g} x {audit.mpp_y:g} microns per pixel, "
                f"'{other}' says {x:g} x {y:g}{_unit_error(x / audit.mpp_x, y / audit.mpp_y)}",
                correct,
            )


def _unit_error(ratio_x: float, ratio_y: float) -> str:
    """What to say when both axes are apart by a factor that only units explain; empty otherwise."""
    for factor, how in _UNIT_FACTORS.items():
        for wanted in (factor, 1 / factor):
            if max(abs(ratio_x / wanted - 1), abs(ratio_y / wanted - 1)) <= SOURCES_AGREE:
                return f": a factor of {factor:g}, as between {how}, so a unit error"
    return ""


def _looks_like_a_unit(audit: MppAudit) -> str:
    """Whether an implausible value is a unit error beside another source, or beside what the power suggests."""
    x, y = audit.mpp_x, audit.mpp_y
    if x <= 0 or y <= 0:
        return ""
    for other, (other_x, other_y) in audit.all_sources.items():
        if text := _unit_error(other_x / x, other_y / y):
            return f"; '{other}' says {other_x:g} x {other_y:g}{text}"
    if audit.objective_power:
        expected = 10 / audit.objective_power
        if text := _unit_error(expected / x, expected / y):
            return f"; objective power {audit.objective_power:g} goes with about {expected:g}{text}"
    return ""


def _check_levels(audit: MppAudit, facts: SlideFacts, name: str) -> None:
    """No level is empty or larger than level 0; a size that does not fit its downsample (2.001 is not 2) is flagged."""
    width, height = facts.width_px, facts.height_px
    for (w, h), down in zip(facts.level_sizes, facts.level_downsamples, strict=True):
        if min(w, h) < 1 or w > width or h > height:
            raise SlideError("bad_levels", f"{name}: a level of {w} x {h} px beside a level 0 of {width} x {height} px",
                             "take the slide out of the sheet, or convert it again")  # fmt: skip
        # Levels are whole pixels, rounded either way. Levels that are padded to whole tiles do not fit and are flagged.
        fits = all(
            abs(full / down - part) <= max(LEVEL_PX, LEVEL_SHARE * part) for full, part in ((width, w), (height, h))
        )
        if not fits and "level_sizes" not in audit.flags:
            audit.flags.append("level_sizes")


def _with_true_unit(facts: SlideFacts) -> dict[str, str]:
    """The properties, with the unit "absent" where the TIFF names none.

    OpenSlide then says "inch", the default of the format, and for a generic TIFF derives microns per pixel from it;
    files without a unit mean anything, so neither is a source.
    """
    properties = dict(facts.properties)
    if properties.get("tiff.ResolutionUnit") != "inch" or "tiff.XResolution" not in properties:
        return properties
    if _unit_tag_is_absent(facts.path):
        properties["tiff.ResolutionUnit"] = "absent"
        if facts.vendor == "generic-tiff":
            properties.pop("openslide.mpp-x", None)
            properties.pop("openslide.mpp-y", None)
    return properties


def _unit_tag_is_absent(path: Path) -> bool:
    """True when the first directory of a TIFF has no ResolutionUnit tag; a file that is not there or no TIFF: False."""
    try:
        with first_page(path) as page:
            return "ResolutionUnit" not in page.tags
    except (NotDirectError, *TIFF_ERRORS):
        return False


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
