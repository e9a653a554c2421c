"""Sources of microns per pixel and the verdict on a slide."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from morphome.slides.grid import side_px
from morphome.slides.mpp import audit_mpp, mpp_sources
from morphome.slides.openslide_reader import OpenSlideReader
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


@pytest.mark.parametrize(
    ("dpi", "flags", "code"),
    [(72, ["screen_resolution"], ""), (96, ["screen_resolution"], ""), (300, [], "conflicting_mpp")],
)
def test_a_screens_resolution_is_no_word_against_a_scanners(synthetic, dpi, flags, code):
    known = {
        **mpp(0.25, power=40),
        "tiff.XResolution": str(dpi),
        "tiff.YResolution": str(dpi),
        "tiff.ResolutionUnit": "inch",
    }
    audit = judge(synthetic, known)
    assert (audit.reason_code, audit.mpp_x) == (code, 0.25)
    assert not code or audit.verdict == "quarantine"
    assert code or audit.flags == flags


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


def test_a_value_for_the_cohort_is_used_only_where_nothing_is_known(synthetic):
    audit = judge(synthetic, {"openslide.objective-power": 40}, mpp_missing=0.2527)
    assert (audit.mpp_source, audit.mpp_x, audit.mpp_y) == ("assumed_for_cohort", 0.2527, 0.2527)
    assert (audit.verdict, audit.flags) == ("flag", ["assumed_for_cohort"])
    assert judge(synthetic, mpp(0.5, power=20), mpp_missing=0.2527).mpp_source == "openslide"
    assert judge(synthetic, {}, mpp_missing=0.3, mpp_overrides={"S": 0.25}).mpp_source == "override"
    doubtful = judge(synthetic, {"openslide.objective-power": 20}, mpp_missing=0.25)
    assert doubtful.flags == ["assumed_for_cohort", "power_conflict"]
    wrong = judge(synthetic, {}, mpp_missing=40.0)
    assert wrong.reason_code == "implausible_mpp" and "tiling.mpp_missing" in wrong.reason


def test_an_override_may_name_both_axes(synthetic):
    audit = judge(synthetic, {}, mpp_overrides={"S": [0.25, 0.2525]})
    assert (audit.mpp_x, audit.mpp_y, audit.side_x_px, audit.side_y_px) == (0.25, 0.2525, 512, 507)
    assert audit.all_sources == {"override": (0.25, 0.2525)}


def test_the_message_of_a_missing_mpp_names_both_keys_and_the_unit(synthetic):
    properties = {**tags("40000", "40000", "none"), "openslide.objective-power": 20}
    audit = judge(synthetic, properties, slide="Q-7")
    for words in ("slide 'Q-7'", "tiling.mpp_overrides: {'Q-7': ...}", "tiling.mpp_missing: NUMBER", "power 20",
                  "assume_from_power", "unit is 'none'"):  # fmt: skip
        assert words in audit.reason
    assert audit.resolution_unit == "none"
    assert "assume_from_power" not in judge(synthetic, {}).reason


@pytest.mark.parametrize(("other", "factor"), [
    (2.5, "10"), (0.025, "10"), (25.0, "100"), (0.635, "2.54"), (250.0, "1000"),
])  # fmt: skip
def test_a_unit_error_between_sources_is_named(synthetic, other, factor):
    audit = judge(synthetic, mpp(0.25, power=40, **{"aperio.MPP": other}))
    assert audit.reason_code == "conflicting_mpp"
    assert f"a factor of {factor}, as between" in audit.reason
    assert "'aperio' says" in audit.reason
    plain = judge(synthetic, mpp(0.25, power=40, **{"aperio.MPP": 0.4}))
    assert plain.reason_code == "conflicting_mpp" and "unit error" not in plain.reason


def test_an_implausible_value_is_told_from_a_unit_error(synthetic):
    beside = judge(synthetic, mpp(0.00499, **{"aperio.MPP": 0.499}))
    assert beside.reason_code == "implausible_mpp" and "'aperio' says 0.499" in beside.reason
    assert "a factor of 100" in beside.reason
    power = judge(synthetic, mpp(0.00499, power=20))
    assert "power 20 goes with about 0.5" in power.reason and "a factor of 100" in power.reason
    assert "unit error" not in judge(synthetic, mpp(352.8, power=20)).reason


def test_a_source_of_zero_is_no_match_for_a_true_one(synthetic):
    assert judge(synthetic, mpp(0.25, power=40, **{"aperio.MPP": 0})).reason_code == "conflicting_mpp"


def test_nothing_is_rounded_and_both_axes_are_told(synthetic):
    audit = judge(synthetic, mpp(0.25271234567890123, 0.2518, power=40))
    assert audit.mpp_x == 0.25271234567890123
    assert audit.deviation_x_pct == pytest.approx(100 * (audit.side_x_px * audit.mpp_x / 256 / 0.5 - 1), abs=1e-12)
    assert audit.deviation_y_pct == pytest.approx(100 * (audit.side_y_px * audit.mpp_y / 256 / 0.5 - 1), abs=1e-12)
    assert audit.deviation_x_pct != audit.deviation_y_pct
    assert audit.deviation_pct == pytest.approx((audit.deviation_x_pct + audit.deviation_y_pct) / 2, abs=1e-12)


@pytest.mark.parametrize(("value", "target", "side", "code"), [
    (0.25, 0.5, 512, ""), (0.2512, 0.5, 510, "half_decode_too_fine"), (0.2502, 0.5, 512, ""), (0.2468, 1.0, 1038, ""),
    (0.5, 1.0, 512, ""), (0.5014, 1.0, 510, "half_decode_too_fine"), (0.497, 1.0, 516, ""),
])  # fmt: skip
def test_half_size_decoding_needs_even_sides_of_two_pixels_a_pixel(synthetic, value, target, side, code):
    audit = judge(synthetic, mpp(value, power=round(10 / value)), half_decode=True, mpp_target=target)
    assert (audit.side_x_px, audit.side_y_px, audit.reason_code) == (side, side, code)
    assert audit.deviation_pct == pytest.approx(100 * (side * value / 256 / target - 1))
    if code:
        assert audit.verdict == "quarantine"
        assert "tiling.half_decode to false" in audit.reason
        assert f"mpp_target to {2 * value:g}" in audit.reason
        mended = judge(synthetic, mpp(value, power=round(10 / value)), half_decode=True, mpp_target=2 * value)
        assert mended.reason_code == ""


def test_a_downsample_that_is_not_that_of_the_sizes_is_flagged(synthetic):
    def with_downsamples(sizes, downs, size=(88860, 71340)):
        made = dataclasses.replace(
            facts(mpp(0.25, power=40), size=size), level_sizes=(size, *sizes), level_downsamples=(1.0, *downs)
        )
        return audit_mpp("S", made, synthetic.tiling(patch_px=256))

    # 2.001 is not 2: the size says which it is.
    right = with_downsamples([(44407, 35652)], [2.001])
    assert (right.flags, right.level_downsamples) == ([], [1.0, 2.001])
    assert with_downsamples([(44407, 35652)], [2.0]).flags == []  # 23 px of 44,407: within 0.1 %
    assert with_downsamples([(44320, 35580)], [2.0]).flags == ["level_sizes"]
    # Padded to whole tiles of 512.
    assert with_downsamples([(44544, 35840)], [2.0]).flags == ["level_sizes"]
    # The last levels of a pyramid are a few pixels.
    assert with_downsamples([(2, 2), (1, 1)], [44430.0, 88860.0], size=(88860, 88859)).flags == []


@pytest.fixture(scope="module")
def tiff_without_unit(tmp_path_factory):
    """A TIFF with a resolution; its ResolutionUnit tag is turned into one that nobody reads."""
    path = tmp_path_factory.mktemp("tiff") / "plain.tif"
    tifffile.imwrite(
        path, np.full((64, 64, 3), 200, np.uint8), tile=(16, 16), resolution=(40000, 40000), resolutionunit="INCH"
    )
    content = bytearray(path.read_bytes())
    at = content.index((296).to_bytes(2, "little") + (3).to_bytes(2, "little"))
    content[at : at + 2] = (297).to_bytes(2, "little")
    bare = path.with_name("bare.tif")
    bare.write_bytes(content)
    return path, bare


def test_a_resolution_without_a_unit_is_no_source_although_openslide_takes_inches(synthetic, tiff_without_unit):
    plain, bare = tiff_without_unit
    for path, unit, sources in ((plain, "inch", ["openslide", "tiff_resolution"]), (bare, "absent", [])):
        with OpenSlideReader(path) as reader:
            assert reader.facts.properties["openslide.mpp-x"] == "0.63500000000000001"
            audit = audit_mpp("S", reader.facts, synthetic.tiling(mpp_target=1.0))
        assert (audit.resolution_unit, list(audit.all_sources)) == (unit, sources)
    assert audit.reason_code == "missing_mpp" and "it has no unit" in audit.reason
    # Another vendor's own value stands: it does not come from the tag.
    own = dataclasses.replace(
        facts({**mpp(0.25, power=40), **tags("40000", "40000", "inch")}), path=bare, vendor="aperio"
    )
    assert list(audit_mpp("S", own, synthetic.tiling(patch_px=256)).all_sources) == ["openslide"]


@given(mpp=st.floats(0.1, 1.2), patch=st.integers(16, 1024), target=st.floats(0.1, 4.0))
def test_an_even_side_is_the_nearest_even_number(mpp, patch, target):
    side, exact = side_px(patch, target, mpp, even=True), patch * target / mpp
    assert side % 2 == 0 and side >= 2
    assert abs(side - exact) <= 1 + 1e-9 or side == 2
    assert abs(side - side_px(patch, target, mpp)) <= 1
