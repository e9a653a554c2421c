"""The page and its CSV files against the files they are made from."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from morphome.errors import MorphomeError
from morphome.files import read_parquet
from morphome.report import cohort_view, records
from morphome.report import format as fmt
from morphome.report.build import run_report
from morphome.report.inputs import load_report

#: What the factory says about its failed slide: everything that breaks a page that forgets to escape.
NASTY = """<script>alert("x")</script> 'unreadable' & cut off at 12 % "of" the file"""
SECTIONS = ["verdict", "cohort", "splits", "models", "risk", "training", "slides", "times", "limits", "provenance"]
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects what the tests ask: tags, attributes, texts of tables, and whether tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.unbalanced: list[str] = []
        self._table: str | None = None
        self._cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = {k: v or "" for k, v in attrs}
        self.tags.append((tag, given))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "table":
            self._table = given["id"]
            self.tables[self._table] = []
        if tag == "tr" and self._table:
            self.tables[self._table].append([])
        if tag in {"td", "th"} and self._table:
            self.tables[self._table][-1].append("")
            self._cell = True

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.unbalanced.append(tag)
        if tag == "table":
            self._table = None
        if tag in {"td", "th"}:
            self._cell = False

    def handle_data(self, data):
        hidden = {"title", "desc", "text"} & set(self.stack)
        if self._table and self._cell and not hidden:
            self.tables[self._table][-1][-1] += data

    def ids(self) -> list[str]:
        return [a["id"] for _, a in self.tags if "id" in a]

    def row(self, table: str, head: str) -> list[str]:
        return next(r for r in self.tables[table] if r and r[0] == head)


def made(inputs, out: Path) -> tuple[str, Page]:
    run_report(settings=inputs.config, inputs=inputs, out=out)
    text = (out / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def complete(make_inputs, tmp_path_factory):
    """``(inputs, text, page, folder)`` of a run with everything: five models, three folds, a failed slide."""
    inputs, out = make_inputs(), tmp_path_factory.mktemp("report")
    text, page = made(inputs, out)
    return inputs, text, page, out


def test_page_is_sound_html(complete):
    _, text, page, _ = complete
    assert text.lstrip().startswith("<!DOCTYPE html>")
    assert page.unbalanced == [] and page.stack == []
    ids = page.ids()
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for _, a in page.tags if a.get("href", "").startswith("#")}
    assert targets <= set(ids)


def test_page_loads_nothing_from_elsewhere(complete):
    _, text, page, _ = complete
    assert "script" not in {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for key in ("src", "href", "srcset", "data", "poster", "action"):
            value = attributes.get(key, "")
            assert value == "" or value.startswith(("#", "data:")), (tag, key, value[:80])
    assert not re.search(r"url\(\s*['\"]?(?!#)", text)
    assert "@import" not in text and "http://" not in text and "https://" not in text


def test_everything_from_data_is_escaped(complete):
    _, text, page, _ = complete
    for raw in ("<script", "<events>", "<control>", "<median>", "<cohort>", "<group>"):
        assert raw not in text
    assert "&lt;script&gt;" in text
    assert page.row("failed", "TCGA-AB-9999 DX1")[2].startswith(NASTY)


def test_every_section_is_there_and_in_the_navigation(complete):
    _, _, page, _ = complete
    for name in [*SECTIONS, "experts"]:
        assert ("section", name) in [(tag, a.get("id")) for tag, a in page.tags]
        assert any(tag == "a" and a.get("href") == f"#{name}" for tag, a in page.tags)


def test_figures_and_tables_are_accessible(complete):
    _, text, page, _ = complete
    figures = [a for tag, a in page.tags if tag == "svg"]
    assert len(figures) > 10
    assert all(a.get("role") == "img" and (a.get("aria-label") or a.get("aria-labelledby")) for a in figures)
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")
    assert all(a.get("scope") in {"col", "row"} for tag, a in page.tags if tag == "th")
    assert '<html lang="en">' in text


def test_numbers_are_those_of_the_summary(complete):
    inputs, _, page, _ = complete
    summary = read_parquet(inputs.evaluation / "summary.parquet", "morphome.summary")
    head = page.tables["main"][0]
    for row in summary.itertuples():
        label = {"harrell_c": "C [", "uno_c": "Uno C", "auc": "AUC", "ibs": "IBS", "ipa": "IPA"}[row.metric]
        column = next(i for i, text in enumerate(head) if text.startswith(label))
        digits = 2 if row.metric == "ipa" else 3
        shown = page.row("main", row.name)[column]
        assert shown.startswith(fmt.number(row.value, digits)), (row.name, row.metric)
        if row.metric == "harrell_c":
            assert fmt.interval(row.lower, row.upper) in shown
            assert page.row("main", row.name)[head.index("SD folds")] == fmt.number(row.sd_folds)


def test_csv_hold_the_same_at_full_precision(complete):
    inputs, _, page, out = complete
    evaluation = inputs.evaluation
    table = pd.read_csv(out / "tables" / "model_table.csv").set_index("name")
    summary = read_parquet(evaluation / "summary.parquet", "morphome.summary")
    for row in summary.itertuples():
        for key, value in (("", row.value), ("_lower", row.lower), ("_upper", row.upper), ("_sd_folds", row.sd_folds)):
            np.testing.assert_equal(table.loc[row.name, f"{row.metric}{key}"], np.float64(value))
    for name, file in (("metrics_per_fold", "metrics"), ("comparisons", "comparisons")):
        ours = pd.read_csv(out / "tables" / f"{name}.csv")
        theirs = read_parquet(evaluation / f"{file}.parquet", f"morphome.{file}")
        column = "value" if name == "metrics_per_fold" else "delta_c"
        np.testing.assert_array_equal(ours[column].to_numpy(), theirs[column].to_numpy(dtype=float))
    baseline = pd.read_csv(out / "tables" / "baseline.csv", dtype=str, keep_default_na=False)
    assert [r[2:] for r in page.tables["baseline"][1:]] == baseline.iloc[:, 2:].to_numpy().tolist()


def test_flow_and_slides_csv(complete):
    _, _, _, out = complete
    flow = pd.read_csv(out / "tables" / "flow.csv")
    assert flow["before"].tolist() == [43, 41, 41, 40] and flow["excluded"].tolist() == [2, 1, 1, 0]
    assert flow["excluded_ids"][0] == "TCGA-XX-1;TCGA-XX-2"
    slides = pd.read_csv(out / "tables" / "slides.csv")
    assert len(slides) == 19 and (slides["status"] == "failed").sum() == 1
    assert "<script>" in slides.loc[slides["status"] == "failed", "reason"].iloc[0]


def test_flow_diagram_shows_starts_losses_and_the_end(complete):
    inputs, text, _, _ = complete
    steps = [
        ("listed in the clinical table", "patients", 9, 9),
        ("with event status", "patients", 9, 9),
        ("listed", "slides", 12, 12),
        ("file found", "slides", 12, 12),
        ("with age", "patients", 9, 9),
        ("with a slide", "patients", 9, 8),
        ("with time above zero", "patients", 8, 8),
        ("slides with features", "slides", 12, 11),
        ("patients with RNA", "patients", 8, 8),
    ]
    keys = ("name", "unit", "before", "after")
    data = load_report(inputs)
    flow = [dict(zip(keys, s, strict=True)) | {"excluded": ["x"] * (s[2] - s[3]), "reason": "why"} for s in steps]
    boxes = cohort_view.flow(dataclasses.replace(data, flow=flow))
    found = [(b["kind"], b["n"], b["unit"], b["name"], b["checked"]) for b in boxes]
    assert found == [
        ("start", 9, "patients", "listed in the clinical table", ["event status", "age"]),
        ("start", 12, "slides", "listed", ["file found"]),
        ("loss", 8, "patients", "with a slide", ["time above zero"]),
        ("loss", 11, "slides", "with features", []),
        ("end", 40, "patients", f"analysed, {data.n_events} events, 40 slides", ["RNA"]),
    ]
    assert "checked: RNA; none left out" in text


def test_all_promised_tables_are_written(complete):
    from morphome.paths import REPORT_TABLES

    _, _, _, out = complete
    assert {p.stem for p in (out / "tables").glob("*.csv")} == set(REPORT_TABLES)


def test_reason_of_a_missing_metric_stands_below_the_table(complete):
    _, text, page, _ = complete
    cell = page.row("main", "coxnet_genes")[5]
    assert cell == "–a"
    note = re.search(r'<li id="main-n0">(.*?)</li>', text, re.S)
    assert note and "no &lt;control&gt; beyond the horizon" in note[1]


def test_failed_slide_is_named_with_its_reason(complete):
    _, text, page, _ = complete
    row = page.row("failed", "TCGA-AB-9999 DX1")
    assert row[1] == "unreadable" and row[2] == f"{NASTY}Remedy: fetch the file again"
    full = "TCGA-AB-9999-01Z-00-DX1"
    assert ("span", full) in [(tag, a.get("title")) for tag, a in page.tags]
    # Its grey picture is not shown: a card with the code is.
    assert not any("9999" in a["alt"] for tag, a in page.tags if tag == "img")
    assert '<div class="nopicture code">unreadable</div>' in text


def test_no_p_values_with_one_partition(complete):
    _, text, _, out = complete
    _no_p_values(text, out)


def test_no_p_values_with_repeats(make_inputs, tmp_path):
    text, page = made(make_inputs(repeats=2, only=["clinical_cox", "mean_pool_cox"]), tmp_path)
    assert page.unbalanced == []
    _no_p_values(text, tmp_path)


def _no_p_values(text: str, out: Path) -> None:
    """χ² of cross-validated groups describes; a p-value beside it would be read as a test."""
    assert not re.search(r"\bp (=|&lt;|<) ?0", text) and "0.040" not in text and "no p-values" in text
    assert text.count("log-rank χ² 4.2 (descriptive)") >= 2
    table = pd.read_csv(out / "tables" / "risk_groups.csv")
    assert "logrank_p" not in table and (table["logrank_chi2"] == 4.2).all()
    assert table["note"].str.endswith("no p-value").all()


def test_horizon_is_said_to_come_before_the_models(complete):
    _, text, _, _ = complete
    assert "fixed from outcomes and folds before any model is run." in text
    assert "It is also the last edge of the time bins of mome." in text


def test_equal_input_gives_equal_bytes(complete, tmp_path):
    inputs, text, _, out = complete
    again, _ = made(inputs, tmp_path)
    assert again == text
    for path in (out / "tables").glob("*.csv"):
        assert path.read_bytes() == (tmp_path / "tables" / path.name).read_bytes()


def test_optional_parts_may_be_absent(make_inputs, tmp_path):
    inputs = make_inputs(external=True, oracle=False, groups=False, horizon=None, only=["mean_pool_cox"])
    text, page = made(inputs, tmp_path)
    assert page.unbalanced == []
    for name in SECTIONS:
        assert name in page.ids()
    assert "experts" not in page.ids() and "img" not in {tag for tag, _ in page.tags}
    assert "Planted cohort" not in text and "too few events beyond any candidate" in text
    assert "this run has no clinical Cox row" in text
    assert pd.read_csv(tmp_path / "tables" / "comparisons.csv").empty
    assert pd.read_csv(tmp_path / "tables" / "expert_use.csv").empty


def test_a_missing_or_broken_thumbnail_is_no_reason_to_stop(make_inputs, tmp_path):
    inputs = make_inputs(only=["clinical_cox"])
    # The first and the last slide that worked are always shown; the very last one failed.
    (slide, jpg, qc), (_, other, _) = inputs.thumbnails[0], inputs.thumbnails[-2]
    jpg.unlink()
    other.write_bytes(b"\xff\xd8 not a picture" + bytes(200_000))
    thumbnails = [(slide, jpg, qc), *inputs.thumbnails[1:], ("never tiled", tmp_path / "x.jpg", tmp_path / "x.json")]
    text, page = made(dataclasses.replace(inputs, thumbnails=thumbnails), tmp_path)
    assert text.count("no thumbnail") == 2 and page.unbalanced == []


def test_missing_input_is_refused_by_name(make_inputs, tmp_path):
    inputs = make_inputs(only=["random"])
    (inputs.evaluation / "km.parquet").unlink()
    with pytest.raises(MorphomeError, match=r"km\.parquet"):
        run_report(settings=inputs.config, inputs=inputs, out=tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_licence_of_the_encoder_is_printed(complete):
    _, text, _, _ = complete
    assert "stain_texture (licence Apache-2.0)" in text
    assert records._encoder("uni2_h").startswith("uni2_h (licence ")
    assert records._encoder("uni2_h").endswith("; its weights are given to accounts that accepted the licence)")
    assert records._encoder("one of another day") == "one of another day"
