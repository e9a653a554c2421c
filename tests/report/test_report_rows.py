"""Rows of the published protocol, encoders of RNA, and what a row has beside plain training."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from morphome.files import read_json, write_json
from morphome.report import branches, history, optimistic, tables
from morphome.report.build import run_report
from morphome.report.inputs import Run, _set_apart, load_report
from morphome.report.judge import judge
from morphome.report.limits import limitations
from morphome.report.records import provenance


def publish(inputs, name: str, **facts) -> None:
    """Make a row of the factory one of the published protocol."""
    for folder in inputs.runs:
        content = read_json(folder / "run.json", "morphome.run")
        if content["name"] == name:
            content.pop("stamp")
            content["training"] |= {"protocol": "published", "epoch_rule": "oracle_outer_best"}
            write_json({**content, **facts}, folder / "run.json", "morphome.run", {})


def test_a_published_row_is_in_no_other_table(make_inputs, tmp_path):
    inputs = make_inputs()
    publish(inputs, "mome")
    data = load_report(inputs)
    assert "mome" not in data.names and "mome" not in judge(data).headline
    everything = {**tables.all_tables(data), "branches": branches.table(data)}
    for key, table in everything.items():
        text = table.to_csv()
        assert ("mome" in text) == (key == "published_protocol"), key
    # The pairs of the others stay: the clinical row against each.
    assert sorted(tables.against_clinical(data)["name"]) == ["coxnet_genes", "mean_pool_cox", "random"]
    run_report(settings=inputs.config, inputs=inputs, out=tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="published"' in page and '<a href="#published">' in page
    assert "none in this run" in page


def test_a_published_row_stands_beside_the_first_honest_row_of_its_model(make_inputs):
    inputs = make_inputs(only=["clinical_cox", "mean_pool_cox", "mome"])
    publish(inputs, "mome", model="mean_pool_cox", constant_prediction=True)
    data = load_report(inputs)
    data.optimistic.summary = data.optimistic.summary.assign(model="mean_pool_cox")
    found = optimistic.table(data).iloc[0]
    assert found["honest_name"] == "mean_pool_cox" and found["runs_constant"] == 3
    assert found["difference"] == pytest.approx(found["optimistic_c"] - found["honest_c"])
    view = optimistic.section(optimistic.table(data))
    assert view.notes == ["every patient got the same risk in 3 runs: C is 0.5 there whatever the model saw"]


def test_remarks_on_a_published_row_go_with_it(make_inputs):
    data = load_report(make_inputs())
    summary = data.summary.copy()
    summary.attrs = {"warnings": ["'mome' did not score 2 patients", "'mean_pool_cox' did not score 2 patients"]}
    runs = [dataclasses.replace(r, facts={**r.facts, "training": {"protocol": "published"}}) for r in data.runs]
    told, rest, apart = _set_apart({"summary": summary}, [r for r in runs if r.name == "mome"])
    assert told["summary"].attrs["warnings"] == ["'mean_pool_cox' did not score 2 patients"]
    assert rest == [] and set(apart.summary["name"]) == {"mome"}


FACTS = {
    "title": "BulkRNABert",
    "licence": "CC BY-NC-SA 4.0",
    "weights_licence": "CC BY-NC-SA 4.0 (non-commercial)",
    "pretraining_saw_tcga": "depends",
    "reference": "Gélard et al. 2025",
    "weights": {"sha256": "ab" * 32, "grade": "not known"},
    "match_rate": 0.4,
    "mlp_a": {"requested": "features", "used": "identity", "reason": "no cells"},
    "warnings": ["slow"],
    "width": 256,
    "patients": 40,
}


def with_encoder(data, facts=None, **section):
    return dataclasses.replace(data, config={**data.config, "molecular": {"encoder": section}}, encoder=facts)


@pytest.fixture(scope="module")
def data(make_inputs):
    return load_report(make_inputs(only=["clinical_cox", "mome"]))


def said(data, level: str) -> str:
    return "\n".join(flag.text for flag in limitations(data) if flag.level == level)


def test_an_encoder_in_place_of_another_is_a_serious_limitation(data):
    data = with_encoder(data, requested="scgpt", name="pca", reason="the folder is empty")
    assert "requested scGPT, used pca in its place (the folder is empty)" in said(data, "serious")
    assert any("requested scGPT, used pca" in text for text in judge(data).warnings)
    text = provenance(data, "x")["rna_encoder"]
    assert text == "requested scgpt, used pca (the folder is empty); fitted inside each training fold"


def test_rows_left_out_without_their_encoder_are_a_serious_limitation(data):
    data = with_encoder(data, requested="scgpt", name="scgpt", reason="gone", left_out=["a", "b"])
    assert "requested scGPT, used none (gone). a and b need it and were left out of this run." in said(data, "serious")
    assert provenance(data, "x")["rna_encoder"] == "requested scgpt, used none: gone"


def test_an_encoder_that_is_used_is_told_with_licence_weights_and_match(data):
    data = with_encoder(data, FACTS, requested="bulkrnabert", name="bulkrnabert", reason="")
    assert "RNA encoder" not in said(data, "serious")
    cautions = said(data, "caution")
    for words in ("trained on TCGA", "checksum of its weights", "only 40 % of the genes", "used identity (no cells)"):
        assert words in cautions
    assert "RNA encoder BulkRNABert: slow." in said(data, "note")
    text = provenance(data, "x")["rna_encoder"]
    for words in ("non-commercial", f"sha256 {'ab' * 8}, checksum not known", "knows 40.0 %", "saw TCGA: depends"):
        assert words in text
    plain = dataclasses.replace(data, config={**data.config, "molecular": {}}, encoder=None)
    assert "RNA encoder" not in said(plain, "caution") and provenance(plain, "x")["rna_encoder"] == ""


def run_of(data, table: pd.DataFrame, **training) -> Run:
    run = data.runs_of("mome")[0]
    return dataclasses.replace(run, history=table, facts={**run.facts, "training": training})


def table_of(*settings: str, kept: str = "", **columns) -> pd.DataFrame:
    """Three epochs per setting; the second of the setting kept is the chosen one."""
    parts = []
    for k, setting in enumerate(settings or [""]):
        part = pd.DataFrame({"epoch": [1, 2, 3], "train_loss": [3.0, 2.0, 1.0], "inner_loss": 1.0})
        part["inner_c"] = [0.5, 0.6 + k / 10, 0.5]
        part["chosen"] = [False, setting == kept, False]
        parts.append(part.assign(**({"setting": setting} if settings else {}), **columns))
    return pd.concat(parts, ignore_index=True)


def test_of_a_search_the_curves_are_those_of_the_setting_that_was_kept(data, monkeypatch):
    found = run_of(data, table_of("learning_rate=0.1", "learning_rate=0.2", kept="learning_rate=0.2"))
    monkeypatch.setattr(type(data), "runs_of", lambda self, name: [found] if name == "mome" else [])
    card = history.training(data)["curves"][0]
    assert "chosen epoch: fold 0: 2 of 3" in card["text"]
    assert [row[1:] for row in card["search"].rows] == [["0.600", "0 runs"], ["0.700", "1 run"]]
    assert len(history._kept(found)) == 3 and set(history._kept(found)["setting"]) == {"learning_rate=0.2"}


def test_without_a_search_there_is_no_table_of_one(data):
    assert all(card["search"] is None for card in history.training(data)["curves"])


def test_a_cox_head_has_windows_and_no_time_bins(data):
    run = run_of(data, table_of(), time_bins=4, bin_edges="quantile", sampler="class_balanced", cox_window=64)
    assert "4 time bins" in history.how([run]) and "drawn evenly" in history.how([run])
    text = history.how([dataclasses.replace(run, facts={**run.facts, "head": "cox"})])
    assert "Cox head: exact partial likelihood of windows of 64 patients" in text
    assert "time bins" not in text and "drawn evenly" not in text


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"distil": {"teacher": "mcat", "loss": "kd_logit", "weight": 0.5}}, "hazards of every time bin by mcat"),
        ({"distil": {"teacher": "mcat", "loss": "kd_risk_rank", "weight": 1}}, "differences of log risks by mcat"),
        ({"distil": {"teacher": None, "loss": "gene_aux", "weight": 1}}, "also learns scores of the gene groups"),
        ({"modality_dropout": 0.2}, "genes left out in 20 % of the training steps"),
    ],
)
def test_what_a_row_has_beside_plain_training_is_told(data, training, words):
    assert words in history.how([run_of(data, table_of(), **training)])
    assert words not in history.how([run_of(data, table_of(), distil=None, balance={"rule": "none"})])


def test_branches_are_told_at_the_chosen_epoch(data):
    branches = {"rho": 1.1, "inner_c_path": 0.61, "inner_c_omic": 0.52, "k_path": [1.0, 0.8, 0.6], "k_omic": 1.0}
    run = run_of(data, table_of(**branches), balance={"rule": "ogm_cox"})
    assert "slides and genes balanced by ogm_cox" in history.how([run])
    text = history._branches([run])
    assert "slides 0.610, genes 0.520; factors of the learning rates: slides 0.80, genes 1.00" in text
    joint = run_of(data, table_of(**{**branches, "k_path": 1.0, "inner_c_omic": np.nan}))
    assert "factors" not in history._branches([joint]) and "genes –" in history._branches([joint])
    assert history._branches([run_of(data, table_of())]) == ""


def test_branches_beside_networks_of_one_modality(make_inputs, monkeypatch):
    data = load_report(make_inputs())
    # No network of slides or genes alone among these rows: nothing to compare with.
    assert branches.table(data)["gap"].isna().all()
    monkeypatch.setattr(branches, "is_neural", lambda run: True)
    found = branches.table(data).set_index("branch")
    assert list(found.loc[["path", "omic"], "alone"]) == ["mean_pool_cox", "coxnet_genes"]
    c = data.metric("mean_pool_cox", "harrell_c")["value"]
    assert found.at["path", "gap"] == pytest.approx(c - 0.58)
    readings = [row[-1] for row in branches.section(branches.table(data)).rows]
    assert readings == ["balancing cannot help" if gap < 0.01 else "behind the network alone" for gap in found["gap"]]
    assert branches.section(branches.table(load_report(make_inputs(only=["clinical_cox"])))) is None
