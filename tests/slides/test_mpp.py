"""Sources of microns per pixel and the verdict on a slide."""

from __future__ import annotations

from pathlib import Path

import pytest

from morphome.slides.mpp import audit_mpp, mpp_sources
from morphome.slides.reader import SlideFacts


def facts(properties, size=(4000, 3000), levels=((1000, 750),)):
    sizes = (size, *levels)
    return SlideFacts(
        path=Path("a slide [1].svs"),
        vendor="test",
        width_px=size[0],
        height_px=size[1],
        level_sizes=sizes,
        level_downsamples=tuple((size[0] / max(w, 1) + size[1] / max(h, 1)) / 2 for w, h in sizes),
        bounds=(0, 0, *size),
        properties={k: str(v) for k, v in properties.items()},
    )


def mpp(x, y=None, power=None, **more):
    found = {"openslide.mpp-x": x, "openslide.mpp-y": x if y is None else y, **more}
    return found if power is None else {**found, "openslide.objective-power": power}


def judge(synthetic, properties, slide="S", levels=((1000, 750),), **changes):
    settings = synthetic.tiling(patch_px=256, **changes)
    return audit_mpp(slide, facts(properties, levels=levels), settings)


def test_a_plain_slide_passes(synthetic):
    audit = judge(synthetic, mpp(0.25, power=40))
    assert (audit.verdict, audit.flags, audit.mpp_source) == ("ok", [], "openslide")
    assert (audit.side_x_px, audit.side_y_px, audit.mpp_effective) == (512, 512, 0.5)
    assert audit.deviation_pct == 0
    assert audit.power_ratio == 1


def test_a_missing_mpp_names_the_slide_and_the_key(synthetic):
    audit = judge(synthetic, {"openslide.objective-power": 40}, slide="TCGA-CR-7395")
    assert (audit.verdict, audit.reason_code) == ("quarantine", "missing_mpp")
    assert "TCGA-CR-7395" in audit.reason
    assert "tiling.mpp_overrides" in audit.reason
    assert audit.side_x_px is None


def test_power_is_a_source_only_when_asked(synthetic):
    audit = judge(synthetic, {"openslide.objective-power": 40}, mpp_missing="assume_from_power")
    assert (audit.mpp_source, audit.mpp_x, audit.verdict) == ("assumed_from_power", 0.25, "flag")
    assert "assumed_from_power" in audit.flags
    without = judge(synthetic, {}, mpp_missing="assume_from_power")
    assert without.reason_code == "missing_mpp"
    known = judge(synthetic, mpp(0.5, power=40), mpp_missing="assume_from_power")
    assert known.mpp_source == "openslide"


@pytest.mark.parametrize(("value", "code"), [
    (0.1, ""), (0.0999, "implausible_mpp"), (352.8, "implausible_mpp"), (0.00499, "implausible_mpp"),
    (28.97, "implausible_mpp"), (1.21, "implausible_mpp"), (0, "implausible_mpp"), (-0.25, "implausible_mpp"),
])  # fmt: skip
def test_only_plausible_values_pass(synthetic, value, code):
    assert judge(synthetic, mpp(value)).reason_code == code


@pytest.mark.parametrize(
    ("other", "code"), [(0.2549, ""), (0.2452, ""), (0.2552, "conflicting_mpp"), (0.244, "conflicting_mpp")]
)
def test_sources_agree_within_two_per_cent(synthetic, other, code):
    audit = judge(synthetic, mpp(0.25, power=40, **{"aperio.MPP": other}))
    assert audit.reason_code == code
    assert list(audit.all_sources) == ["openslide", "aperio"]


def test_an_override_wins_over_every_source(synthetic):
    audit = judge(synthetic, mpp(0.00499, **{"aperio.MPP": 3}), mpp_overrides={"S": 0.499, "T": 0.1})
    assert (audit.verdict, audit.mpp_source, audit.mpp_x) == ("flag", "override", 0.499)
    assert list(audit.all_sources) == ["override", "openslide", "aperio"]
    assert judge(synthetic, mpp(0.25), mpp_overrides={"S": 40.0}).reason_code == "implausible_mpp"


@pytest.mark.parametrize(("value", "power", "flagged"), [
    (0.2325, 20, True), (0.16437, 40, True), (0.23, 40, False), (0.25, None, True), (0.286, 40, False),
    (0.29, 40, True),
])  # fmt: skip
def test_a_power_that_does_not_fit_is_flagged_and_kept(synthetic, value, power, flagged):
    audit = judge(synthetic, mpp(value, power=power))
    assert ("power_conflict" in audit.flags) == flagged
    assert audit.verdict == ("flag" if flagged else "ok")
    assert audit.mpp_x == value


@pytest.mark.parametrize(("y", "flags", "code"), [
    (0.2520, [], ""), (0.2530, ["anisotropic"], ""), (0.2620, ["anisotropic"], ""), (0.2640, [], "anisotropic_mpp"),
])  # fmt: skip
def test_anisotropy(synthetic, y, flags, code):
    audit = judge(synthetic, mpp(0.25, y, power=40))
    assert (audit.flags, audit.reason_code) == (flags, code)
    if not code:
        assert (audit.side_x_px, audit.side_y_px) == (512, round(128 / y))


def test_a_coarse_slide_needs_upsampling_allowed(synthetic):
    assert judge(synthetic, mpp(0.525, power=20)).reason_code == ""
    assert judge(synthetic, mpp(0.526, power=20)).reason_code == "too_coarse"
    allowed = judge(synthetic, mpp(0.971, power=10), allow_upsampling=True)
    assert (allowed.verdict, allowed.flags) == ("flag", ["upsampled"])
    assert judge(synthetic, mpp(0.971, power=10), mpp_target=1.0).verdict == "ok"


@pytest.mark.parametrize("levels", [((5000, 750),), ((1000, 0),)])
def test_impossible_levels_are_refused(synthetic, levels):
    assert judge(synthetic, mpp(0.25, power=40), levels=levels).reason_code == "bad_levels"


def test_uneven_levels_are_flagged(synthetic):
    assert judge(synthetic, mpp(0.25, power=40), levels=((2000, 1499),)).flags == []
    assert judge(synthetic, mpp(0.25, power=40), levels=((2000, 1000),)).flags == ["level_sizes"]


_MIRAX = "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_"
_DICOM = "dicom.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing"
_OME = '<OME><Pixels PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="0.5"/></OME>'


def tags(x, y, unit):
    return {"tiff.XResolution": x, "tiff.YResolution": y, "tiff.ResolutionUnit": unit}


@pytest.mark.parametrize(("properties", "name", "expected"), [
    ({"aperio.MPP": "0.2527"}, "aperio", (0.2527, 0.2527)),
    ({_MIRAX + "X": "0.23", _MIRAX + "Y": "0.24"}, "mirax", (0.23, 0.24)),
    ({_DICOM + "[0]": "0.0005", _DICOM + "[1]": "0.00025"}, "dicom", (0.25, 0.5)),
    ({"tiff.ImageDescription": _OME}, "ome", (0.25, 0.5)),
    (tags("40000", "20000", "centimeter"), "tiff_resolution", (0.25, 0.5)),
    (tags("72", "72", "inch"), "tiff_resolution", (352.7777, 352.7777)),
])  # fmt: skip
def test_each_source(properties, name, expected):
    found = mpp_sources(properties)
    assert list(found) == [name]
    assert found[name] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("properties", [
    {"tiff.XResolution": "1", "tiff.YResolution": "1", "tiff.ResolutionUnit": "none"},
    {"tiff.XResolution": "0", "tiff.YResolution": "0", "tiff.ResolutionUnit": "inch"},
    {"openslide.mpp-x": "0.25"}, {"aperio.MPP": "about 0.25"}, {"openslide.mpp-x": "nan", "openslide.mpp-y": "nan"},
    {"tiff.ImageDescription": 'PhysicalSizeX="1" PhysicalSizeXUnit="furlong" PhysicalSizeY="1"'},
])  # fmt: skip
def test_what_is_no_source(properties):
    assert mpp_sources(properties) == {}
