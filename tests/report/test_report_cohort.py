"""What the page says of the cohort: flow with records, hospitals, sources of the tables, gene groups, the GDC."""

from __future__ import annotations

import dataclasses
import html
import re

import pandas as pd
import pytest

from morphome.report import cohort_tables, cohort_view, words
from morphome.report.build import run_report
from morphome.report.inputs import load_report


@pytest.fixture(scope="module")
def made(make_inputs, tmp_path_factory):
    """``(data, text of the page, folder)`` of a cohort as the GDC gives it."""
    inputs, out = make_inputs(gdc=True, only=["random", "clinical_cox"]), tmp_path_factory.mktemp("cohort")
    run_report(settings=inputs.config, inputs=inputs, out=out)
    return load_report(inputs), (out / "report.html").read_text(encoding="utf-8"), out


@pytest.fixture
def data(made):
    return dataclasses.replace(made[0])


def csv(made, name: str) -> pd.DataFrame:
    return pd.read_csv(made[2] / "tables" / f"{name}.csv", keep_default_na=False)


def plain(text: object) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", str(text))).split())


def section(text: str, name: str) -> str:
    return re.search(rf'<section id="{name}".*?</section>', text, re.S)[0]


# -- the flow ---------------------------------------------------------------------------------------------------


def test_flow_opens_with_the_records_and_keeps_slides_in_their_lane(data):
    boxes = cohort_view.flow(data)
    assert [(b["unit"], b["kind"], b["n"]) for b in boxes[:3]] == [
        ("records", "start", 1052),
        ("patients", "start", 1046),
        ("patients", "loss", 1026),
    ]
    assert boxes[0]["joined"] == "6 further records of 3 patients joined"
    assert boxes[0]["ids"] == ["TCGA-AB-1000", "TCGA-AB-1006", "TCGA-AB-1012"]  # each once
    assert boxes[0]["excluded"] == 0  # nobody was left out
    lanes = [(b["unit"], b["lane"]) for b in boxes]
    first = lanes.index(("slides", "branch lane lane-first"))
    assert all(lane == "" for _, lane in lanes[:first])
    assert ("patients", "lane") in lanes[first:]  # "with a slide" stands between two steps of slides
    assert lanes[-2:] == [("patients", ""), ("patients", "")]
    checked = {b["name"]: b["checked"] for b in boxes if b["checked"]}
    assert checked["with follow-up time"] == ["time not below zero"]


def test_one_record_per_patient_needs_no_box(data):
    records = {
        "name": "one record per patient",
        "unit": "records",
        "before": 9,
        "after": 9,
        "excluded": [],
        "reason": "",
    }
    listed = {"name": "listed in the clinical table", "unit": "patients", "before": 9, "after": 9, "excluded": []}
    boxes = cohort_view.flow(dataclasses.replace(data, flow=[records, listed]))
    assert [(b["unit"], b["kind"]) for b in boxes] == [("patients", "start"), ("patients", "end")]


def test_records_open_the_diagram_wherever_their_step_stands(data):
    flow = [data.flow[1], data.flow[0], *data.flow[2:]]
    assert cohort_view.flow(dataclasses.replace(data, flow=flow))[0]["unit"] == "records"


def test_many_excluded_ids_are_cut_on_the_page_and_whole_in_the_csv(made):
    data, text, _ = made
    box = next(b for b in cohort_view.flow(data) if b["excluded"] == 900)
    assert (len(box["ids"]), box["more"]) == (cohort_view.MOST_IDS, 860)
    assert "and 860 more (flow.csv)" in plain(text)
    assert text.count("TCGA-AB-0003") == 2  # as a patient and as its slide, once each
    table = csv(made, "flow").set_index("step")
    assert len(table.loc["with follow-up time", "excluded_ids"].split(";")) == 900
    assert table.loc["records joined by patient", "unit"] == "records"
    assert (table["before"] - table["after"] == table["excluded"]).all()


# -- hospitals --------------------------------------------------------------------------------------------------


def test_every_patient_event_and_slide_is_counted_once(made):
    data, table = made[0], csv(made, "sites")
    assert table["patients_analysed"].sum() == data.n_patients == 40
    assert table["events"].sum() == data.n_events
    lost = {p for s in data.flow if s["unit"] == "patients" for p in s["excluded"]}
    assert table["patients_left_out"].sum() == len(lost) == 1006
    assert (table["patients_listed"] == table["patients_analysed"] + table["patients_left_out"]).all()
    assert table["slides_listed"].sum() == len(data.listed) == 19 + 40 + 30
    assert (table["slides_listed"] == table["slides_used"] + table["slides_left_out"]).all()
    assert table["slides_used"].sum() == 18  # one of the 19 cannot be read
    for reasons, count in (("patient_reasons", "patients_left_out"), ("slide_reasons", "slides_left_out")):
        told = table[reasons].map(lambda t: sum(int(n.replace(",", "")) for n in re.findall(r"\(([\d,]+)\)", t)))
        assert (told == table[count]).all()


def test_codes_of_one_hospital_are_joined_and_patients_left_out_find_it(made):
    table = csv(made, "sites").set_index("site")
    row = table.loc["Hospital <A> & Sons"]
    assert row["site_codes"] == "AB;CD"
    # Of the thousand who were left out before the cohort's table was written, those of code AB belong here.
    assert row["patients_left_out"] == 334 + 5 + 1
    assert row["patient_reasons"].startswith("time missing (300), time zero (20), ")
    assert "no usable slide (1)" in row["patient_reasons"] and "the file cannot be read (1)" in row["slide_reasons"]
    assert table.loc["QQ", ["patients_analysed", "patients_listed"]].tolist() == [0, 333]
    assert "Hospital &lt;A&gt; &amp; Sons" in made[1]


def test_a_code_of_two_hospitals_is_no_guess(data):
    people = data.everybody.copy()
    people.loc[people["patient_id"] == "TCGA-AB-1006", "site"] = "Another hospital"
    table = cohort_tables.sites(dataclasses.replace(data, everybody=people, patients=people[people.index < 40]))
    counts = table.set_index("site")["patients_left_out"]
    assert counts["AB"] == 334 + 5 and counts["Hospital <A> & Sons"] == 1 and counts["Another hospital"] == 0


def test_ids_without_a_barcode_have_no_code(data):
    flow = [{"name": "with time", "unit": "patients", "before": 41, "after": 40, "excluded": ["P1"], "reason": ""}]
    table = cohort_tables.sites(dataclasses.replace(data, flow=flow)).set_index("site")
    assert table.loc[cohort_tables.NO_SITE, "patient_reasons"] == "with time (1)"


def test_many_hospitals_are_summed_below_the_largest(made):
    one = csv(made, "sites").iloc[[0]]
    table = pd.concat([one.assign(site=f"S{i}") for i in range(30)], ignore_index=True)
    view = cohort_view.sites(table)
    assert len(view.rows) == cohort_view.MOST_SITES + 1 and "all in sites.csv" in view.caption
    last = view.rows[-1]
    assert last[0] == "15 other hospitals"
    assert last[1] == f"{15 * one['patients_analysed'].iloc[0]} of {15 * one['patients_listed'].iloc[0]:,}"
    assert len(cohort_view.sites(table.head(16)).rows) == 16
    assert cohort_view.sites(table.head(0)) is None


def test_slides_are_counted_without_the_list_of_the_cohort(data):
    table = cohort_tables.sites(dataclasses.replace(data, listed=None))
    assert table["slides_used"].sum() == 18  # the places of the analysed patients' slides


# -- where the tables come from ---------------------------------------------------------------------------------


def test_sources_hold_every_table_and_every_kind_asked_for(made):
    data, table = made[0], csv(made, "sources")
    assert table["table"].tolist() == [
        *("clinical", "covariates", "slides"),
        *("rna", "mut", "cnv", "expression"),
        *("slides", "rna", "mut", "cnv"),
    ]
    rows = table[table["kind"] == "panel"].set_index("table")
    assert rows.loc["rna", ["files", "patients", "genes"]].tolist() == ["40", "40", "5"]
    # One patient of the mutation table is not in the analysis.
    assert rows.loc["mut", ["patients", "patients_analysed"]].tolist() == ["38", "37"]
    assert rows.loc["rna", ["value_type", "unit", "format"]].tolist() == [
        *("log2_tpm_plus_1", "log2(TPM + 1)", "star_counts")
    ]
    assert rows.loc["rna", "left_out"] == "further file of the same patient (12)"  # a reason with 0 is none
    assert "counted as mutated: Missense Mutation, Splice Site" in rows.loc["mut", "rules"]
    assert rows.loc["mut", "notes"] == "by class: Silent 9667"
    asked = table[table["kind"] == "gdc"].set_index("table")
    assert asked["bytes"].tolist() == ["42500000000", "220000000", "410000", "12000000"]
    assert (asked["data_release"] == "45.0").all()
    assert asked.loc["rna", "notes"] == "52 files were on disk already"
    assert asked.loc["cnv", "left_out"] == "workflow AscatNGS (40)"
    assert set(data.panels["rna"]["patients"]) == set(data.patients["patient_id"])


def test_a_rule_that_several_tables_share_is_said_once(made):
    shown = section(made[1], "cohort")
    rule = "Of a patient&#39;s samples 01 before 03 before 06, then the lowest vial, then the smallest file id."
    assert shown.count(f"</b> {rule}</li>") == 1
    view = cohort_view.sources(made[0], cohort_tables.sources(made[0]))["view"]
    letters = {plain(row[0]).split(" ")[0]: re.findall(r">(\w)</a>", str(row[0])) for row in view.rows}
    assert letters["copy"] == ["a"] and letters["mutations"][0] == "a" and len(letters["mutations"]) == 2
    assert "To 7 digits; 3 counts." in view.notes  # one rule, whatever its punctuation


def test_the_page_shows_sources_once_and_escapes_them(made):
    text = made[1]
    assert "nan" not in plain(section(text, "cohort")).split()
    assert "<script" not in text and "Left out: ." not in text
    cohort = plain(section(text, "cohort"))
    assert "results/ demo/ gdc/ clinical.tsv gdc_clinical" in cohort and "44 matched" not in cohort
    assert "40 matched." in cohort
    assert "listed under Cohort" in plain(section(text, "provenance"))


def test_what_was_asked_of_the_gdc_is_told(data):
    told = " ".join(cohort_view.sources(data, cohort_tables.sources(data))["gdc"])
    assert told == (
        "TCGA-HNSC of the Genomic Data Commons, data release 45.0, asked 2026-11-21 19:20 UTC (the server was at "
        "46.1). The release is pinned (gdc.data_release: 45.0). 528 patients; slides 71 files, 42 GB; RNA 52 files, "
        "220 MB; mutations 37 files, < 1 MB; copy number 40 files, 12 MB; 43 GB in all. Left out, or taken in an older "
        "version: slides: first released after 45.0 (3); copy number: workflow AscatNGS (40). Withdrawn <files>."
    )
    query = {"projects": ["A", "B"], "pin": "latest", "left_out": {"damaged": 2}, "pinned": "elsewhere"}
    told = " ".join(cohort_view.sources(dataclasses.replace(data, query=query), pd.DataFrame({"kind": []}))["gdc"])
    assert told.startswith("A and B of the Genomic Data Commons. The release is not pinned: asked again later, ")
    assert "Left out, or taken in an older version: damaged (2)." in told and "those of an earlier run" in told


def test_a_run_without_panels_and_query_says_nothing_of_them(make_inputs, tmp_path):
    inputs = make_inputs(only=["random"], groups=False)
    run_report(settings=inputs.config, inputs=inputs, out=tmp_path)
    text = section((tmp_path / "report.html").read_text(encoding="utf-8"), "cohort")
    assert "Genomic Data Commons" not in text and 'id="gene-groups"' not in text and 'id="sites"' in text
    table = pd.read_csv(tmp_path / "tables" / "sources.csv", keep_default_na=False)
    assert table[["table", "kind", "source"]].to_numpy().tolist() == [["source", "cohort", "clinical.tsv"]]
    assert pd.read_csv(tmp_path / "tables" / "gene_groups.csv").empty


# -- gene groups ------------------------------------------------------------------------------------------------


def test_gene_groups_of_the_csv_are_those_of_the_file(made):
    data, table = made[0], csv(made, "gene_groups").set_index("group")
    assert list(table.index) == list(data.groups["match"])
    kept = set(table.index[table["kept"].astype(str) == "True"])
    assert kept == set(data.groups["groups"]) and len(kept) == 28
    row = table.loc["PATH_06/<x>"]
    numbers = ["asked", "matched_genes", "columns", "columns_rna", "columns_mut", "columns_cnv", "n_unmatched"]
    assert row[numbers].tolist() == [8, 5, 6, 5, 1, 0, 2]
    assert (row["unmatched"], row["n_not_symbols"], row["not_symbols"]) == ("G5;Z6", 1, "18S rRNA")
    assert table.loc["PATH_01/<x>", "n_repeated"] == 2
    assert "fewer than molecular.groups.min_genes = 2" in table.loc["PATH_00/<x>", "reason"]


def test_the_groups_that_lost_most_are_shown_first(made):
    data, text, _ = made
    shown = cohort_view.gene_groups(data, cohort_tables.gene_groups(data))
    view = shown["view"]
    assert shown["folded"] and len(view.rows) == cohort_view.MOST_GROUPS and "all in gene_groups.csv" in view.caption
    assert view.row_classes[:13] == ["failed"] * 13 and not any(view.row_classes[13:])
    assert view.notes == ["Dropped: fewer genes with a column than molecular.groups.min_genes = 2"]
    assert [c.label for c in view.columns][4:7] == ["… RNA", "… mutations", "… copy number"]
    long = next(row for row in view.rows if "Aromatic" in str(row[0]))
    assert long[-1] == "W0, W1, W2, W3, W4, W5 and 84 more"
    assert shown["sentences"][0] == (
        "28 of 41 gene groups are used (sets/h.gmt). Together they ask for 137 genes; 5 (4 %) have a column."
    )
    assert "PATH_00/&lt;x&gt;" in text and text.count('id="gene-groups"') == 1


def test_groups_of_an_older_file_are_still_shown(make_inputs):
    data = load_report(make_inputs(only=["random"]))
    table = cohort_tables.gene_groups(data)
    assert table["kept"].tolist() == [True, True, False] and table["columns_rna"].isna().all()
    shown = cohort_view.gene_groups(data, table)
    assert [row[1:4] for row in shown["view"].rows] == [["30", "28 (93 %)", "71"]] * 2 + [["–", "–", "–"]]
    assert not shown["folded"] and len(shown["view"].columns) == 5
    assert shown["view"].notes == ["Dropped: no gene matched"]
    assert shown["sentences"][0] == "2 of 3 gene groups are used."


# -- words ------------------------------------------------------------------------------------------------------


def test_sizes_in_words():
    assert [words.size(n) for n in (0, 2e6, 14e6, 2.1e9, 320.4e9)] == ["< 1 MB", "2.0 MB", "14 MB", "2.1 GB", "320 GB"]


@pytest.mark.parametrize(
    ("value_type", "unit", "shown"),
    [
        ("zscore", "z-score", "z-scores"),
        ("as_given", "as given", "as given"),
        ("gistic", "GISTIC level, -2 to 2", "GISTIC level, -2 to 2"),
        ("copy_number", "total copies", "copy numbers total copies"),
        ("something_new", "", "something new"),
        ("", "", ""),
    ],
)
def test_values_say_their_unit_once(value_type, unit, shown):
    assert plain(cohort_view._values(value_type, unit)) == shown


def test_moments_of_the_query():
    assert (
        words.moment("2026-11-21T19:20:05+00:00") == words.moment("2026-11-21T19:20:05.123Z") == "2026-11-21 19:20 UTC"
    )
    assert words.moment("yesterday") == "yesterday"


def test_reasons_without_their_brackets():
    step = {"name": "with a slide", "reason": "no slide (cohort.require lists 'wsi')"}
    assert cohort_tables.brief_reason(step) == "no slide"
    assert cohort_tables.brief_reason({"name": "with a slide", "reason": ""}) == "with a slide"
    assert cohort_tables.brief_reason({"name": "x", "reason": "time missing (a; b (c))"}).startswith("time missing")


def test_tables_are_the_same_for_rows_in_another_order(data):
    shuffled = dataclasses.replace(
        data,
        listed=data.listed.sample(frac=1, random_state=1),
        patients=data.patients.sample(frac=1, random_state=2),
    )
    for table in (cohort_tables.sites, cohort_tables.sources, cohort_tables.gene_groups):
        pd.testing.assert_frame_equal(table(data), table(shuffled))


def test_counts_are_whole_numbers_in_the_files(made):
    for name in ("sources", "sites", "gene_groups"):
        table = pd.read_csv(made[2] / "tables" / f"{name}.csv", dtype=str, keep_default_na=False)
        cells = table.drop(columns="data_release", errors="ignore").to_numpy().ravel()
        assert not [cell for cell in cells if re.fullmatch(r"\d+\.\d*", cell)], name
