"""``protocol: published``: what the original codes did, and nothing of it under ``honest``."""

from __future__ import annotations

import numpy as np
import pytest

from morphome.errors import MorphomeError
from morphome.files import read_json, read_parquet
from morphome.models import hazard
from morphome.survival import harrell
from morphome.training.checkpoint import load_model
from morphome.training.loop import Loop
from morphome.training.preprocess import ColumnScaler
from morphome.training.run import load_run, run_train
from morphome.training.trainer import NeuralModel


@pytest.fixture(scope="module")
def files(planted, tmp_path_factory):
    return planted().write(tmp_path_factory.mktemp("cohort"))


@pytest.fixture
def run(files, settings_of, tmp_path, monkeypatch):
    """Train; folder, predictions, history, and the loops that ran."""
    loops = []
    plain = Loop.run
    monkeypatch.setattr(Loop, "run", lambda self, *args: loops.append(self) or plain(self, *args))

    def start(key, cohort=files, **training):
        out = tmp_path / f"{key} {len(loops)}"
        how = {"protocol": "published", "epoch_rule": "oracle_outer_best", "epochs": 5, **training}
        run_train(settings=settings_of(key, **how), **cohort, name=key, repeat=0, fold=0, out=out, threads=1)
        predictions = read_parquet(out / "predictions.parquet", "morphome.predictions").set_index("patient_id")
        history = read_parquet(out / "history.parquet", "morphome.history")
        return out, predictions, history, loops[-1]

    return start


def concordance(predictions, *roles):
    part = predictions[predictions["role"].isin(roles)]
    return harrell(part["time_months"].to_numpy(), part["event"].to_numpy(), part["risk"].to_numpy()).c


@pytest.mark.parametrize("edges", ["quantile", "horizon"])
def test_bins_of_all_patients_training_on_two_roles_choice_on_the_test_fold(edges, run):
    out, predictions, history, loop = run("abmil_fusion", bin_edges=edges, learning_rate=0.05, patience=1)
    last = 12.0 if edges == "horizon" else None
    found = load_model(out / "model.safetensors")[0]["fitted/bin_edges"]
    outcomes = {who: part[["time_months", "event"]].to_numpy().T for who, part in predictions.groupby("role")}
    everybody = predictions["time_months"].to_numpy(), predictions["event"].to_numpy()
    np.testing.assert_array_equal(found, hazard.bin_edges(*everybody, 3, "all", last))
    assert (found[:1] != hazard.bin_edges(*outcomes["train"], 3, "train", last)[:1]).all()
    # The inner part is trained on, the test part is what the epoch is chosen on, without patience.
    roles = predictions["role"]
    assert set(loop.train.ids) == set(roles.index[roles != "test"])
    assert set(loop.chosen_on.ids) == set(roles.index[roles == "test"])
    assert len(history) == 5
    chosen = history[history["chosen"]].squeeze()
    assert chosen["inner_c"] == history["inner_c"].max() == concordance(predictions, "test")
    facts = read_json(out / "run.json", "morphome.run")
    assert facts["n_fitted"] == (roles != "test").sum()
    assert facts["training"]["protocol"] == "published"
    risk, _ = load_run(out).predict(loop.fold)
    np.testing.assert_array_equal(risk, predictions["risk"])


def test_scalers_and_levels_are_fitted_on_the_two_roles(run):
    out, predictions, _, loop = run("deep_sets_fusion")
    seen = sorted(predictions.index[predictions["role"] != "test"])
    arrays = load_model(out / "model.safetensors")[0]
    raw = loop.fold.gene_matrix(loop.inputs.columns, seen)
    np.testing.assert_array_equal(arrays["fitted/genes/mean"], ColumnScaler.fit(raw).mean)
    part = predictions.loc[seen]
    bins = hazard.bin_index(part["time_months"], arrays["fitted/bin_edges"])
    logits = loop.evaluate(seen, 0).main
    np.testing.assert_allclose(arrays["fitted/baseline_offsets"], hazard.baseline_offsets(logits, bins, part["event"]))


@pytest.mark.parametrize("key", ["abmil", "deepsurv"])
def test_the_last_epoch(key, run):
    _, predictions, history, _ = run(key, epoch_rule="last", learning_rate=0.05)
    assert list(history["chosen"]) == [False] * 4 + [True]
    assert history["inner_c"].iloc[-1] == concordance(predictions, "test")


@pytest.mark.parametrize(("protocol", "rule"), [("published", "last"), ("honest", "inner_best"), ("honest", "last")])
def test_test_outcomes_reach_the_model_under_published_only(protocol, rule, run, planted, tmp_path):
    """The leak that the protocol is marked for: with other outcomes of the test patients, another model."""
    cohort = planted()
    roles = cohort.splits[cohort.splits["fold"] == 0].set_index("patient_id")["role"]
    patients = cohort.patients.copy()
    test = patients["patient_id"].map(roles) == "test"
    patients.loc[test, "time_months"] *= 2.3
    other = cohort.with_(patients=patients).write(tmp_path / "other")
    how = {"protocol": protocol, "epoch_rule": rule, "epochs": 2}
    models = [run("abmil", **how)[0], run("abmil", cohort=other, **how)[0]]
    same = len({(out / "model.safetensors").read_bytes() for out in models}) == 1
    assert same == (protocol == "honest")


def test_distillation_is_refused(settings_of):
    training = settings_of("abmil", protocol="published", epoch_rule="last", distil={"teacher": "mcat"})
    with pytest.raises(MorphomeError, match="published"):
        NeuralModel("abmil", {}, training["model"]["training"], seed=1)
