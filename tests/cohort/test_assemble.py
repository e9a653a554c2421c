"""Who is analysed: joins by id, every loss counted."""

from __future__ import annotations

import pandas as pd
import pytest

from morphome.cohort.assemble import run_assemble
from morphome.errors import MorphomeError
from morphome.files import read_json, read_parquet, write_json, write_parquet


@pytest.fixture
def tables(tmp_path):
    """Three patients: A with two slides (one bad), B with one, C with a bad one; RNA for A and C."""
    patients = pd.DataFrame(
        {"patient_id": ["A", "B", "C"], "site": "x", "time_months": [1.0, 2.0, 3.0], "event": [1, 0, 1]}
    )
    slides = pd.DataFrame(
        {
            "slide_id": ["A2", "A1", "B1", "C1", "D1"],
            "patient_id": ["A", "A", "B", "C", "D"],
            "included": [True, True, True, True, True],
            "reason": "",
        }
    )
    index = pd.DataFrame(
        {
            "slide_id": ["C1", "B1", "A2", "A1"],
            "n_tiles": [0, 5, 0, 7],
            "status": ["failed", "ok", "failed", "ok"],
            "reason_code": ["missing_mpp", "", "unreadable", ""],
            "reason": ["no mpp", "", "broken", ""],
        }
    )
    paths = {name: tmp_path / f"{name}.parquet" for name in ("patients", "slides", "index", "rna")}
    write_parquet(patients, paths["patients"], "morphome.patients", {})
    write_parquet(slides, paths["slides"], "morphome.slides", {})
    write_parquet(index, paths["index"], "morphome.feature_index", {})
    rna = pd.DataFrame({"patient_id": ["C", "A"], "TP53": [0.0, 1.0]})
    write_parquet(rna, paths["rna"], "morphome.panel", {})
    write_json({"steps": []}, tmp_path / "flow.json", "morphome.flow", {})
    return tmp_path, paths


def assemble(tables, require):
    folder, paths = tables
    run_assemble(
        settings={"cohort": {"require": require}},
        patients=paths["patients"],
        slides=paths["slides"],
        flow=folder / "flow.json",
        index=paths["index"],
        panels={"rna": paths["rna"]},
        patients_out=folder / "out.parquet",
        flow_out=folder / "out.json",
    )
    return read_parquet(folder / "out.parquet", "morphome.analysis"), read_json(folder / "out.json", "morphome.flow")


def test_every_loss_is_a_counted_step(tables):
    table, flow = assemble(tables, ["wsi", "rna"])
    assert table["patient_id"].tolist() == ["A"]
    assert [list(ids) for ids in table["slide_ids"]] == [["A1"]]
    assert table["n_tiles"].tolist() == [7]
    steps = {step["name"]: step for step in flow["steps"]}
    assert steps["slides with features"]["excluded"] == ["A2", "C1"]  # D1 has no patient and was counted before
    assert "missing_mpp: 1" in steps["slides with features"]["reason"]
    assert steps["patients with a usable slide"]["excluded"] == ["C"]
    assert steps["patients with RNA"]["excluded"] == ["B"]
    assert (flow["n_patients"], flow["n_events"]) == (1, 1)


def test_what_is_not_required_is_kept_as_missing(tables):
    table, _ = assemble(tables, ["rna"])
    assert table["patient_id"].tolist() == ["A", "C"]
    assert table["has_wsi"].tolist() == [True, False]
    assert table["n_tiles"].tolist() == [7, 0]


def test_nobody_left_is_an_error_that_names_the_key(tables):
    with pytest.raises(MorphomeError, match=r"cohort\.require"):
        assemble(tables, ["wsi", "cnv"])


def test_nobody_left_shows_ids_of_both_sides(tables):
    _, paths = tables
    rna = pd.DataFrame({"patient_id": ["c-1", "a-1", "b-1"], "TP53": [0.0, 1.0, 1.0]})
    write_parquet(rna, paths["rna"], "morphome.panel", {})
    words = r"'rna' left nobody; patients until then: 'A', 'B' \(of 2\); with RNA: 'a-1', 'b-1' \(of 3\)"
    with pytest.raises(MorphomeError, match=words):
        assemble(tables, ["wsi", "rna"])
    with pytest.raises(MorphomeError, match="with copy number: nobody"):
        assemble(tables, ["cnv"])


def test_nobody_left_without_a_usable_slide_says_why(tables):
    _, paths = tables
    index = read_parquet(paths["index"], "morphome.feature_index").assign(status="failed", reason_code="unreadable")
    write_parquet(index, paths["index"], "morphome.feature_index", {})
    with pytest.raises(MorphomeError, match=r"with a usable slide: nobody \(unreadable: 4\)"):
        assemble(tables, ["wsi"])
