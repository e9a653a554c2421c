"""The section on slides: every slide and tile is counted, every odd one is named, and nothing claimed unaudited."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from morphome.files import read_parquet
from morphome.report import judge, limits, resolution, slide_tables, slides, words
from morphome.report.build import run_report
from morphome.report.inputs import load_report, slide_places

ARCHIVE = Path(__file__).parents[1] / "data" / "archives" / "v1"
SPEC = [
    "slide_id", "vendor", "width_px", "height_px", "mpp_x", "mpp_y", "mpp_source", "all_sources_json",
    "objective_power", "power_ratio", "anisotropy", "mpp_target", "side_x_px", "side_y_px", "mpp_effective",
    "deviation_pct", "verdict", "reason",
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(make_inputs):
    return make_inputs(mixed=True, only=["random", "clinical_cox"])


@pytest.fixture(scope="module")
def page(inputs, tmp_path_factory):
    """``(text of the slide section, folder)`` of a run with every kind of trouble."""
    out = tmp_path_factory.mktemp("slides-report")
    run_report(settings=inputs.config, inputs=inputs, out=out)
    text = (out / "report.html").read_text(encoding="utf-8")
    return text[text.index('<section id="slides"') : text.index('<section id="times"')], out


@pytest.fixture(scope="module")
def read_once(inputs):
    return load_report(inputs)


@pytest.fixture
def data(read_once):
    """A run that a test may change."""
    return copy.deepcopy(read_once)


def plain(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def rows(view):
    return [[plain(str(cell)) for cell in row] for row in view.rows]


def test_counts_stand_on_top_and_add_up(data, page):
    counts = slide_tables.count_slides(data)
    assert (counts.found, counts.opened, counts.n_lost) == (19, 18, 4)
    assert sum(counts.verdicts.values()) == 19
    assert counts.verdicts == {"ok": 8, "flag": 8, "quarantine": 2, "not opened": 1}
    assert counts.flags == {
        "no_power": 3, "power_conflict": 2, "anisotropic": 1, "assumed_for_cohort": 1, "assumed_from_power": 1,
    }  # fmt: skip
    assert counts.lost == {"missing_mpp": 1, "conflicting_mpp": 1, "unreadable": 1, "too_many_failed_tiles": 1}
    assert counts.planned == counts.read + counts.failed + counts.unused
    assert (counts.failed, counts.unused) == (11, 81)
    head, lines = slides.summary(data)
    assert head == f"15 of 19 slides gave features, from {counts.read:,} tiles."
    said = dict(lines)
    assert said["Files"] == "19 found, 18 could be opened."
    assert said["Resolution"].startswith("8 passed; 8 kept with a flag (no objective power to compare with (3), ")
    assert said["Resolution"].endswith("; 2 set aside.")
    assert "too many tiles could not be read (1)" in said["Set aside"]
    assert said["Tiles"].startswith(f"{counts.planned:,} planned, {counts.read:,} encoded; 11 (0.3")
    text = plain(page[0])
    for part in (head, *said.values()):
        assert part in text


def test_the_verdict_says_what_is_missing_or_assumed(data):
    verdict = judge.judge(data)
    fact = next(f for f in verdict.facts if f.label == "Slides with features")
    counts = slide_tables.count_slides(data)
    assert fact.value == "15"
    assert fact.detail == (
        f"4 gave none; 2 with an assumed resolution; 11 of {counts.planned:,} tiles could not be read"
    )
    warned = " ".join(verdict.warnings)
    assert "4 (21 %) of 19 slides gave no features" in warned
    assert warned.count("not measured but assumed") == 2
    # 0.3 % of the tiles is told among the limitations; more than 1 % reaches the top.
    level = {f.text: f.level for f in limits.limitations(data)}
    assert next(v for t, v in level.items() if t.startswith("11 tiles of")) == "caution"
    assert any(t.startswith("In 2 slides the objective power contradicts") for t in level)
    data.audit.loc[data.audit["n_tiles_failed"] == 9, ["n_tiles_failed", "n_tiles_planned"]] = 90
    assert any("92 tiles of" in text for text in judge.judge(data).warnings)


def test_a_few_lost_slides_are_a_caution(data):
    # One of 21 is below the share, one of 19 above it.
    data.audit["status"] = ["failed", *["ok"] * 18]
    assert any("1 (5 %) of 19 slides" in text for text in judge.judge(data).warnings)
    data.audit = pd.concat([data.audit, data.audit.tail(2).assign(slide_id=["Y1", "Y2"])], ignore_index=True)
    assert not any("gave no features" in text for text in judge.judge(data).warnings)
    assert any("1 (5 %) of 21 slides" in flag.text for flag in limits.limitations(data))


def test_mpp_audit_has_a_row_per_slide_with_every_digit(data, page):
    table = pd.read_csv(page[1] / "tables" / "mpp_audit.csv", keep_default_na=False)
    assert list(table)[: len(SPEC)] == SPEC
    assert table["slide_id"].tolist() == sorted(data.audit["slide_id"])
    assert set(table["width_px"]) == {"12000", ""} and set(table["side_x_px"]) > {"508", "551"}
    by_id = table.set_index("slide_id")
    ours = data.audit.set_index("slide_id")
    shown = pd.to_numeric(by_id["deviation_pct"], errors="coerce")
    np.testing.assert_array_equal(shown, ours.loc[by_id.index, "deviation_pct"].to_numpy(dtype=float))
    assert by_id.loc["TCGA-AB-9999-01Z-00-DX1", "verdict"] == "not opened"
    assert "unreadable" in by_id.loc["TCGA-AB-9999-01Z-00-DX1", "reason_code"]
    missing = by_id.loc["TCGA-AB-1000-01Z-00-DX1"]
    assert (missing["verdict"], missing["reason_code"], missing["mpp_x"]) == ("quarantine", "missing_mpp", "")
    assert json.loads(by_id.loc["TCGA-AB-1006-01Z-00-DX1", "all_sources_json"])["tiff_resolution"] == [25.21, 25.21]
    # Lost for its tiles, not for its resolution: the reason of the one is not given for the other.
    tiles = by_id.loc["TCGA-JK-1010-01Z-00-DX1"]
    assert (tiles["verdict"], tiles["reason"], tiles["reason_code"]) == ("ok", "", "")
    assert by_id.loc["TCGA-EF-1002-01Z-00-DX1", ["site", "patient_id"]].tolist() == ["EF", "TCGA-EF-1002"]


def test_flagged_and_refused_slides_are_named_with_what_was_found(data):
    view = resolution.resolution(data, words.slide_names(data.audit["slide_id"]))["flagged"]
    table = {row[0]: row for row in rows(view)}
    assert len(table) == 10
    assert [row[2] for row in rows(view)] == ["set aside"] * 2 + ["kept"] * 8
    assert table["TCGA-AB-1006 DX1"][-1] == (
        "Two sources of microns per pixel disagree; also in the file: TIFF resolution 25.21."
    )
    assert table["TCGA-EF-1002 DX1"][1:] == [
        "EF", "kept", "0.2325", "OpenSlide", "20", "0.47", "Objective power contradicts the microns per pixel.",
    ]  # fmt: skip
    assert table["TCGA-LM-1005 DX1"][-1] == "No objective power to compare with."
    assert table["TCGA-AB-1012 DX1"][3] == "0.2521 × 0.256"
    assert table["TCGA-CD-1001 DX1"][4] == "assumed from power"


def test_sentences_on_resolution(data):
    said = resolution.resolution(data, {})["sentences"]
    assert said[0] == (
        "Level 0 lies between 0.2325 and 0.5014 µm per pixel in 17 slides (median 0.25); "
        "sources: OpenSlide (15), no source (2), assumed for the cohort (1), assumed from power (1)."
    )
    far = slide_tables.deviations(slide_tables.mpp_audit(data))
    assert len(far) == 16  # neither those set aside nor the one that never opened
    axis = data.audit[["deviation_x_pct", "deviation_y_pct"]].abs().to_numpy(dtype=float)
    assert far.max() == np.nanmax(axis)
    assert said[1].startswith(f"Tiles were read within {far.max():.2g} % of the 0.5 µm per pixel asked for")
    assert said[2] == (
        "In 2 slides the objective power contradicts the microns per pixel and in 3 slides the file names no "
        "objective power to compare with; the microns per pixel are used, the power is not."
    )
    assert said[3].startswith("Not measured but assumed: 1 slide by one value for every slide")
    data.audit = data.audit.assign(flags="", verdict="ok", mpp_source="aperio", deviation_pct=0.0)
    data.audit[["deviation_x_pct", "deviation_y_pct"]] = 0.0
    said = resolution.resolution(data, {})["sentences"]
    assert said[1].startswith("Tiles were read at exactly the 0.5 µm per pixel asked for in all 19 slides")
    assert said[2].startswith("Objective power agrees") and len(said) == 3


def texts_of(svg):
    return re.findall(r"<text[^>]*>\s*([^<]+?)\s*</text>", str(svg))


def test_histogram_has_a_row_per_site_with_its_number(data):
    svg = resolution.resolution(data, {})["figure"]
    found = texts_of(svg)
    assert found.count("n = 3") == 5
    for text in ("all slides", "AB", "LM", "n = 19 (2 without a value)", "n = 3 (1 without a value)", "asked: 0.5"):
        assert text in found
    for kind in ("passed", "kept with a flag", "set aside"):
        assert kind in found
    # Verdicts differ in more than their colour.
    assert str(svg).count("<pattern") == 2
    assert "Slides per row: all slides: 19; AB: 3; " in svg


def test_small_sites_share_a_row_and_odd_values_are_counted_beside_it(data):
    ids = data.audit["slide_id"]
    data.places = {slide: (slide, f"S{i:02}") for i, slide in enumerate(ids)}
    data.places[ids[1]] = data.places[ids[2]] = ("p", "BIG")
    data.audit.loc[5, ["mpp_x", "mpp_y"]] = 352.8
    found = texts_of(resolution.resolution(data, {})["figure"])
    sites = [t for t in found if re.fullmatch(r"S\d\d|BIG", t)]
    assert len(sites) == resolution.MOST_SITES - 1 and sites[0] == "BIG"
    assert "5 other sites" in found
    assert "n = 19 (1 off the axis, 2 without a value)" in found


def test_one_site_or_no_value_needs_no_more_than_it_has(data):
    data.places = {slide: ("p", "ONLY") for slide in data.audit["slide_id"]}
    assert "ONLY" not in texts_of(resolution.resolution(data, {})["figure"])
    data.audit[["mpp_x", "mpp_y"]] = np.nan
    found = resolution.resolution(data, {})
    assert found["figure"] is None and found["sentences"][0] == "No slide has a value."


def test_failed_tiles_are_listed_worst_first(data, page):
    view = slides.slides(data, slide_tables.slides(data))["failed_tiles"]
    assert [row[0] for row in rows(view)] == ["TCGA-JK-1010 DX1", "TCGA-CD-1007 DX1"]
    assert rows(view)[0][1:] == ["90", "9", "10 %", "set aside"]
    assert rows(view)[1][4] == "kept without them"
    assert "every planned tile could be read" not in page[0]
    data.audit["n_tiles_failed"] = 0
    assert slides.slides(data, slide_tables.slides(data))["failed_tiles"] is None
    assert "; none failed; " in dict(slides.summary(data)[1])["Tiles"]


def test_readers_are_told_with_their_reasons(data, monkeypatch):
    view = slides.slides(data, slide_tables.slides(data))["readers"]
    table = rows(view)
    assert [row[:2] for row in table] == [
        ["JPEG tiles decoded directly (tiled_jpeg)", "15"], ["OpenSlide", "2"], ["OpenSlide", "1"],
    ]  # fmt: skip
    assert table[0][3:] == ["", "120 regions, no difference"]
    assert table[1][3:] == ["1 and 2 of 8 regions differ from OpenSlide", "16 regions, up to 3 grey levels apart"]
    assert table[2][3:] == ["the file is no TIFF", ""]
    many = data.audit.assign(reader="openslide", reader_reason=[f"odd {chr(97 + i)}" for i in range(19)])
    monkeypatch.setattr(slides, "MOST_READER_ROWS", 5)
    shown = rows(slides.slides(data, many)["readers"])
    assert len(shown) == 6 and shown[-1][:2] == ["other reasons", "14"]
    assert sum(int(row[1]) for row in shown) == 19


def test_speed_is_summed_over_slides_with_what_limited_it(data, page):
    said = slides.throughput(data, {})
    tiles = sum(t["n_tiles"] for t in data.timings)
    slowest = min(t["n_tiles"] for t in data.timings if t["n_tiles"]) / 1.4
    assert said[0].startswith(f"15 slides with {tiles:,} tiles were encoded in 27 s, summed over slides, on cpu (")
    assert f": {tiles / 15 / 1.4:.3g} tiles per second (per slide " in said[0]
    assert said[0].endswith(f", {slowest:.3g}).") and "slowest TCGA-" in said[0]
    # 0.5 s of reading by two threads against 0.8 s of encoding, in each of 19 records.
    assert said[1] == (
        "Reading took 10 s, summed over its threads; the encoder worked for 15 s and stood waiting for tiles for 4 s. "
        "The slower side, and so the limit, was the encoder."
    )
    assert said[2] == "One processor core for reading would keep one such encoder busy."
    assert said[1] in plain(page[0])
    for timing in data.timings:
        timing["seconds_read"] = 3.2
    assert slides.throughput(data, {})[1].endswith("was reading the slides.")
    assert "About 4 processor cores" in slides.throughput(data, {})[2]
    del data.timings[1]["reading_threads"]
    assert slides.throughput(data, {})[1] == (
        "What limited the speed is not known: 1 of 15 slides have records of an older version."
    )
    data.timings = []
    assert slides.throughput(data, {}) == []


def test_gallery_shows_flags_and_reasons(page):
    text = page[0]
    assert '<span class="chip">flag</span>' in text
    assert "The file does not say its microns per pixel." in text
    assert "then: too many tiles could not be read" in text or "Too many tiles could not be read." in text


def test_imported_features_have_no_audit_and_the_page_says_so(make_inputs, tmp_path):
    inputs = make_inputs(external=True, only=["random"])
    run_report(settings=inputs.config, inputs=inputs, out=tmp_path)
    text = plain((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "The features were imported, so there is no audit of them." in text
    assert "Slides whose resolution was flagged" not in text
    assert "The resolution of a slide is" not in text
    table = pd.read_csv(tmp_path / "tables" / "mpp_audit.csv", keep_default_na=False)
    assert len(table) == 19 and set(table["verdict"]) == {"not audited"}
    assert (table["mpp_x"] == "").all() and table["reason"].str.contains("imported").all()
    data = load_report(inputs)
    assert slide_tables.count_slides(data).verdicts == {}


def test_an_audit_of_the_first_version_is_still_reported(data):
    data.audit = read_parquet(ARCHIVE / "features" / "audit.parquet", "morphome.slide_audit")
    table = slide_tables.mpp_audit(data)
    assert len(table) == len(data.audit) and set(table["verdict"]) <= {"ok", "flag", "quarantine", "not opened"}
    assert table["deviation_x_pct"].isna().all() and table["all_sources_json"].isna().all()
    assert table["deviation_pct"].notna().any()
    shown = slides.slides(data, slide_tables.slides(data))
    assert shown["readers"] is None and shown["resolution"]["figure"]
    assert slides.summary(data)[0].endswith(f"of {len(data.audit)} slides gave features, from "
                                            f"{data.audit['n_tiles'].sum():,} tiles.")  # fmt: skip


def test_places_of_slides_whose_patients_were_left_out():
    analysed = pd.DataFrame({"patient_id": ["P1"], "site": ["AA"], "slide_ids": [np.array(["P1-a"])]})
    assert slide_places(analysed) == {"P1-a": ("P1", "AA")}
    listed = pd.DataFrame({"slide_id": ["P1-a", "P2-a", "P3-a"], "patient_id": ["P1", "P2", "P3"]})
    everybody = pd.DataFrame({"patient_id": ["P1", "P2"], "site": ["AA", "BB"]})
    assert slide_places(analysed, listed) == {"P1-a": ("P1", "AA"), "P2-a": ("P2", ""), "P3-a": ("P3", "")}
    assert slide_places(analysed, listed, everybody)["P2-a"] == ("P2", "BB")


def test_every_code_that_the_steps_give_is_said_in_words():
    source = Path(slides.__file__).parents[1]
    text = "".join(p.read_text() for p in [*(source / "slides").glob("*.py"), *(source / "features").glob("*.py")])
    codes = set(re.findall(r'SlideError\(\s*"(\w+)"', text))
    assert {"missing_mpp", "unreadable"} <= codes
    unsaid = codes - set(words.CODES)
    assert not unsaid, f"add these reason codes to CODES in report/words.py: {sorted(unsaid)}"
