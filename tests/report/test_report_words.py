"""Technical texts in a reader's words: nothing said twice, nothing lost, names that stay unique."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from morphome.report import history, sections, tables, words
from morphome.report.inputs import load_report
from morphome.report.limits import limitations

UUID = "1CC70B9C-D4D9-4451-BFB4-27DBD33F5662"


def missing(*reasons: str, repeat: int = 0) -> pd.DataFrame:
    return pd.DataFrame({"repeat": repeat, "fold": range(len(reasons)), "reason": reasons})


def test_reasons_that_differ_in_numbers_are_said_once():
    late = missing(*(f"survival is not identified from {t} on" for t in ("16.8606", "16.4", "22.3879")))
    assert words.reasons(pd.concat([late, late]), 24.0, 3) == [
        "the model gives no survival probability after month 16.9, 16.4 and 22.4 (folds 0, 1 and 2); "
        "the horizon is 24 months"
    ]
    many = missing(*(f"survival is not identified from {t}.25 on" for t in range(10, 20)))
    assert "after month 10.2 to 19.2 (10 folds)" in words.reasons(many, None)[0]
    few = missing("no event among 12 patients", "no case up to 24", "no event among 9 patients")
    assert words.reasons(few, 24.0, 4) == [
        "missing in 2 of 4 folds (folds 0 and 2): no event among 9 and 12 patients",
        "missing in 1 of 4 folds (fold 1): no case up to 24",
    ]
    assert words.reasons(few, 24.0, 8, repeats=2)[1] == "missing in 1 of 8 folds (fold r0 f1): no case up to 24"
    assert words.reasons(missing("", ""), 24.0) == []


def test_messages_of_runs_that_differ_in_numbers_are_one_note(data):
    runs = [
        dataclasses.replace(
            r, facts={**r.facts, "warnings": [f"{16 + r.fold} columns set to 0 (repeat 0, fold {r.fold})"]}
        )
        for r in data.runs_of("mome")
    ]
    texts = [flag.text for flag in limitations(dataclasses.replace(data, runs=runs)) if "columns" in flag.text]
    assert texts == ["16, 17 and 18 columns set to 0 [mome/r0/f0, mome/r0/f1, mome/r0/f2]"]


def test_lists_in_words():
    assert [words.listed(list("abc")[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]


def test_tidy_rounds_numbers_but_no_names():
    assert words.tidy("alpha=0.745835 from 16.8606 of 48 on") == "alpha=0.746 from 16.9 of 48 on"
    kept = "a1.2345.svs and numpy 1.26.4 and 1 2 3"
    assert words.tidy(kept) == kept


def test_slide_names_are_short_and_unique():
    ids = [f"TCGA-0A-S18A-01Z-00-DX1.{UUID}", f"TCGA-0A-S18A-01Z-00-DX2.{UUID}", "biopsy-7.ndpi"]
    assert list(words.slide_names(ids).values()) == ["TCGA-0A-S18A DX1", "TCGA-0A-S18A DX2", "biopsy-7.ndpi"]
    twice = [ids[0], f"TCGA-0A-S18A-02Z-00-DX1.{UUID}"]
    assert words.slide_names(twice) == {i: i for i in twice}


@pytest.mark.parametrize(
    ("reason", "what", "remedy"),
    [
        ("a/b/S1.svs: opens, but: no\n  Remedy: fetch  it", "opens, but: no", "fetch it"),
        ("C:\\\\a\\\\S1.svs: no", "no", ""),
        ("S2.svs: another file", "S2.svs: another file", ""),
        ("", "", ""),
    ],
)
def test_failure_is_parted_from_its_remedy(reason, what, remedy):
    assert words.failure(reason, "S1") == (what, remedy)


def test_codes_lose_their_underscores_and_texts_do_not():
    assert words.codes("no_features: 3, unreadable: 1") == "no features: 3, unreadable: 1"
    assert words.codes("see slides.max_failed: 3 and more") == "see slides.max_failed: 3 and more"


@pytest.fixture(scope="module")
def data(make_inputs):
    return load_report(make_inputs())


def test_sees_is_in_readers_words(data):
    table = tables.model_table(data).set_index("name")
    assert table["sees"].to_dict() == {
        "random": "",
        "clinical_cox": "clinical",
        "mean_pool_cox": "slides",
        "coxnet_genes": "genes",
        "mome": "genes + slides",
    }
    assert table.loc["coxnet_genes", "gene_tables"] == "RNA" and table.loc["mean_pool_cox", "gene_tables"] == ""


def test_note_of_a_missing_metric_says_every_reason_once(data):
    metrics, summary = data.metrics.copy(), data.summary.copy()
    at = (metrics["name"] == "mome") & (metrics["metric"] == "ibs")
    metrics.loc[at, "value"] = np.nan
    metrics.loc[at, "reason"] = [f"survival is not identified from {t} on" for t in (16.8606, 16.4, 22.3879)]
    row = (summary["name"] == "mome") & (summary["metric"] == "ibs")
    summary.loc[row, ["value", "reason"]] = [np.nan, "survival is not identified from 16.8606 on and 2 other reasons"]
    changed = dataclasses.replace(data, metrics=metrics, summary=summary)
    view = sections.models(changed, tables.model_table(changed), tables.against_clinical(changed))["view"]
    assert any("16.9, 16.4 and 22.4 (folds 0, 1 and 2)" in note for note in view.notes)
    assert not any("other reasons" in note for note in view.notes)
    texts = [flag.text for flag in limitations(changed)]
    assert any(t.startswith("IBS of mome could not be computed in 3 of 3 folds: the model gives no") for t in texts)


def test_redacted_patients_in_the_analysis_are_flagged(data):
    who = data.patients["patient_id"].iloc[0]
    changed = dataclasses.replace(data, sources=[{"role": "covariates", "redacted": [who, "TCGA-ZZ-0000"]}])
    texts = [flag.text for flag in limitations(changed) if "redacted" in flag.text]
    assert len(texts) == 1 and texts[0].startswith("1 analysed patient is marked as redacted") and who in texts[0]
    assert not any("redacted" in flag.text for flag in limitations(data))


def test_how_a_model_was_trained(data):
    text = history.how(data.runs_of("mome"))
    assert text.startswith("4 time bins, last edge at the horizon; 7 patients of inner validation, 20 to train on")
    paths = history.training(data)["paths"]
    assert any("chosen alpha = " in p["text"] for p in paths)
