"""Microns per pixel that are wrong, impossible or contradict each other: refused with a remedy, never guessed."""

from __future__ import annotations

import pytest

from morphome.slides.openslide_reader import OpenSlideReader

#: What the Aperio header says, and the reason with which the slide is refused; "" where it is tiled.
APERIO = {
    "0.005": "implausible_mpp", "0.00499": "implausible_mpp", "352.8": "implausible_mpp", "28.97": "implausible_mpp",
    "-0.5": "implausible_mpp", "0": "implausible_mpp", "0.0000": "implausible_mpp", "1e300": "implausible_mpp",
    "1e-320": "implausible_mpp",
    "nan": "missing_mpp", "inf": "missing_mpp", "-inf": "missing_mpp", "": "missing_mpp", "unknown": "missing_mpp",
    "0.5 um": "missing_mpp", "0x1p-1": "", "0.5.0": "missing_mpp",
    "0,5": "", "0.5": "", " 0.5 ": "", "5e-1": "",
}  # fmt: skip


@pytest.mark.parametrize("text", APERIO)
def test_the_header_of_an_aperio_slide(tile, files, tmp_path, text):
    path = files.svs(tmp_path / "slide.svs", mpp=text)
    outcome = tile(path)
    code = APERIO[text]
    if text == "0x1p-1":  # C reads a hexadecimal number, Python does not: tiled or missing, but no guess
        assert outcome.record["mpp_x"] in {0.5, None}
        return
    if not code:
        assert outcome.result == ("ok", ""), outcome.attrs["reason"]
        assert outcome.record["mpp_x"] == outcome.record["mpp_y"] == 0.5
        assert outcome.record["side_x_px"] == 64
        return
    reason = outcome.refused(outcome.result[1], str(path))
    # A number that is not one may count as absent or as absurd, but the slide is refused.
    assert outcome.result[1] in ({code} if code == "missing_mpp" else {code, "missing_mpp"})
    assert "mpp_overrides" in reason
    # And the remedy works.
    assert tile(path, mpp_overrides={"S": 0.5}).result == ("ok", "")


def inches(mpp_x: float, mpp_y: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """X and YResolution in pixels an inch as rational numbers."""
    return ((round(25_400 / mpp_x * 100), 100), (round(25_400 / mpp_y * 100), 100))


def generic(files, path, resolution, unit=2):
    """A generic tiled TIFF: its resolution stands in the tags alone."""
    changes = {
        files.X_RESOLUTION: (files.RATIONAL, [resolution[0]]),
        files.Y_RESOLUTION: (files.RATIONAL, [resolution[1]]),
        files.RESOLUTION_UNIT: None if unit is None else (files.SHORT, [unit]),
    }
    return files.svs(path, description="", changes=changes)


@pytest.mark.parametrize(("x", "y", "code"), [
    (0.5, 0.5, ""), (0.5, 0.504, ""), (0.5, 0.52, ""), (0.5, 0.55, "anisotropic_mpp"), (0.45, 0.5, "anisotropic_mpp"),
    (0.5, 5.0, "implausible_mpp"), (352.8, 352.8, "implausible_mpp"), (0.005, 0.005, "implausible_mpp"),
])  # fmt: skip
def test_resolution_tags_of_a_generic_tiff(tile, files, tmp_path, x, y, code):
    path = generic(files, tmp_path / "slide.tif", inches(x, y))
    outcome = tile(path)
    if code:
        reason = outcome.refused(code, str(path), "microns per pixel")
        assert "mpp_overrides" in reason
        return
    assert outcome.result == ("ok", "")
    assert outcome.record["mpp_y"] == pytest.approx(y, rel=1e-4)
    assert ("anisotropic" in outcome.record["flags"]) == (y > 0.51)


@pytest.mark.parametrize("pair", [(0, 1), (0, 0), (1, 0), (4_294_967_295, 1), (1, 4_294_967_295)])
def test_rational_numbers_that_are_none(tile, files, tmp_path, pair):
    path = generic(files, tmp_path / "slide.tif", (pair, pair))
    outcome = tile(path)
    outcome.refused(outcome.result[1], str(path))
    assert outcome.result[1] in {"missing_mpp", "implausible_mpp"}


@pytest.mark.parametrize("unit", [None, 0, 1, 4, 65_535])
def test_a_resolution_without_a_unit_is_no_source(tile, files, tmp_path, unit):
    """Without a unit TIFF means inches; 72 pixels "an inch" written by a converter are then 352.8 microns."""
    path = generic(files, tmp_path / "slide.tif", ((72, 1), (72, 1)), unit)
    outcome = tile(path)
    outcome.refused(outcome.result[1], str(path))
    assert outcome.result[1] in {"missing_mpp", "implausible_mpp"}


@pytest.mark.parametrize(("tag_mpp", "code"), [
    (0.5, ""), (0.505, ""), (0.25, "conflicting_mpp"), (5.0, "conflicting_mpp"), (50.0, "conflicting_mpp"),
])  # fmt: skip
def test_sources_that_contradict_each_other(tile, files, tmp_path, tag_mpp, code):
    """The header says 0.5, the resolution tags something else."""
    resolution = inches(tag_mpp, tag_mpp)
    path = files.svs(
        tmp_path / "slide.svs",
        changes={
            files.X_RESOLUTION: (files.RATIONAL, [resolution[0]]),
            files.Y_RESOLUTION: (files.RATIONAL, [resolution[1]]),
            files.RESOLUTION_UNIT: (files.SHORT, [2]),
        },
    )
    with OpenSlideReader(path) as slide:
        assert slide.facts.properties["openslide.mpp-x"] == "0.5"
    outcome = tile(path)
    if not code:
        assert outcome.result == ("ok", "")
        return
    reason = outcome.refused(code, str(path), "'openslide' says 0.5", "'tiff_resolution' says")
    assert "mpp_overrides" in reason
    assert tile(path, mpp_overrides={"S": 0.5}).result == ("ok", "")


def test_a_power_that_contradicts_is_flagged_and_not_believed(tile, files, tmp_path):
    """94 public slides say power 20 at 0.2325: the resolution counts."""
    for power in ("20", "40", "5", "-20", "0", "nan", "twenty"):
        outcome = tile(files.svs(tmp_path / "slide.svs", power=power))
        assert outcome.result == ("ok", "")
        assert outcome.record["mpp_x"] == 0.5
        assert ("power_conflict" in outcome.record["flags"]) == (power != "20"), power


@pytest.mark.parametrize("value", [0, -0.5, 0.005, 352.8])
def test_an_override_that_is_impossible(tile, files, tmp_path, value):
    path = files.svs(tmp_path / "slide.svs")
    tile(path, mpp_overrides={"S": value}).refused("implausible_mpp", str(path), "'override'")


def test_a_header_full_of_junk(tile, files, tmp_path):
    """Repeated keys, empty ones, thousands of them, bytes that are no text: the numbers that count still count."""
    for more in ("|MPP = 0.7", "|= = =|||", "|x = " + "y" * 100_000, "|Ünïcode = ☃", "|a = 1" * 5000, "|MPP"):
        outcome = tile(files.svs(tmp_path / "slide.svs", description=files.aperio(512, 384, more=more)))
        if more == "|MPP = 0.7":
            assert outcome.record["mpp_x"] in {0.5, 0.7, None}
        else:
            assert outcome.result == ("ok", ""), (more[:20], outcome.attrs["reason"])
            assert outcome.record["mpp_x"] == 0.5
    bad = files.aperio(512, 384).encode() + b"|Operator = M\xfcller\xff\xfe\0"
    outcome = tile(files.svs(tmp_path / "slide.svs", changes={files.DESCRIPTION: (files.ASCII, bad)}))
    assert outcome.result == ("ok", ""), outcome.attrs["reason"]
