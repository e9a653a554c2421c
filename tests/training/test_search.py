"""``training.search``: every combination for every network, the best on the inner part is kept."""

from __future__ import annotations

import numpy as np
import pytest

from morphome.errors import MorphomeError
from morphome.files import read_json, read_parquet
from morphome.models.registry import network
from morphome.training.data import load_fold
from morphome.training.loop import Loop
from morphome.training.run import run_train
from morphome.training.trainer import NeuralModel, search_grid

RATES = [1e-6, 0.05, 0.002]


@pytest.fixture(scope="module")
def files(planted, tmp_path_factory):
    return planted().write(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def fold(files):
    return load_fold(**{k: v for k, v in files.items() if k != "split_facts"}, repeat=0, fold=0)[0]


@pytest.fixture
def trained(fold, settings_of):
    def train(key, **training):
        entry = settings_of(key, **{"epochs": 3, **training})["model"]
        model = NeuralModel(key, entry["settings"], entry["training"], seed=4)
        model.fit(fold, [])
        return model

    return train


def test_grid():
    assert search_grid({"search": {}}) == [{}]
    assert search_grid({"search": {"learning_rate": [], "weight_decay": []}}) == [{}]
    assert search_grid({"search": {"learning_rate": [1.0, 2.0], "weight_decay": [0.0, 3.0]}}) == [
        {"learning_rate": 1.0, "weight_decay": 0.0},
        {"learning_rate": 1.0, "weight_decay": 3.0},
        {"learning_rate": 2.0, "weight_decay": 0.0},
        {"learning_rate": 2.0, "weight_decay": 3.0},
    ]


@pytest.mark.parametrize("key", ["abmil", "deepsurv", "deep_sets_fusion"])
@pytest.mark.parametrize("rule", ["inner_best", "last"])
def test_each_trial_is_a_plain_run_and_the_best_is_kept(key, rule, trained, fold):
    """Weights, curves and branches are those of a run with this one setting; nothing of the other trials is left."""
    search = trained(key, epoch_rule=rule, search={"learning_rate": RATES})
    alone = [trained(key, epoch_rule=rule, learning_rate=rate) for rate in RATES]
    found = []
    for rate, model in zip(RATES, alone, strict=True):
        rows = search.history[search.history["setting"] == f"learning_rate={rate:g}"].reset_index(drop=True)
        assert len(rows) == 3  # the same number of epochs for all
        same = ["epoch", "train_loss", "inner_loss", "inner_c"]
        np.testing.assert_array_equal(rows[same], model.history[same])
        chosen = model.history[model.history["chosen"]].squeeze()
        found.append((chosen["inner_c"], -chosen["inner_loss"]))
    assert len(set(found)) == len(RATES)
    best = alone[max(range(len(RATES)), key=found.__getitem__)]
    row = search.history[search.history["chosen"]].squeeze()
    assert row["setting"] == f"learning_rate={RATES[max(range(3), key=found.__getitem__)]:g}"
    assert row["epoch"] == best.best_epoch == search.best_epoch
    for name, value in best.arrays().items():
        np.testing.assert_array_equal(value, search.arrays()[name])
    for model in (search, best):
        model.predict(fold, fold.ids(), np.array([1.0, 2.0]))
    assert search.branch_risks.keys() == best.branch_risks.keys()
    assert bool(search.branch_risks) == (key == "deep_sets_fusion")
    for u, values in best.branch_risks.items():
        np.testing.assert_array_equal(values, search.branch_risks[u])


def test_of_equal_trials_the_first_is_kept(trained):
    model = trained("abmil", search={"learning_rate": [0.01, 0.01]}, epoch_rule="last")
    assert list(model.history["chosen"]) == [False, False, True, False, False, False]


def test_all_trials_begin_alike_with_their_own_settings(trained, monkeypatch):
    seen = []
    plain = Loop.run

    def run(self, *args):
        first = next(iter(self.module.parameters())).detach().clone().numpy()
        seen.append((first, {g["weight_decay"] for g in self.optimizer.param_groups}, self.training["learning_rate"]))
        return plain(self, *args)

    monkeypatch.setattr(Loop, "run", run)
    trained("abmil", epochs=1, search={"learning_rate": [0.01, 0.02], "weight_decay": [0.0, 0.5]})
    assert [(decay, rate) for _, decay, rate in seen] == [({0.0}, 0.01), ({0.5}, 0.01), ({0.0}, 0.02), ({0.5}, 0.02)]
    assert all((first == seen[0][0]).all() for first, _, _ in seen)


def test_parts_and_teachers_are_fitted_once(trained, monkeypatch):
    """What does not depend on the setting is not repeated for each."""
    calls = []
    model = network("deep_attn_misl")
    plain = model.fit_parts.__func__
    monkeypatch.setattr(model, "fit_parts", classmethod(lambda cls, *args: calls.append(1) or plain(cls, *args)))
    trained("deep_attn_misl", epochs=1, search={"learning_rate": [0.01, 0.02]})
    assert len(calls) == 1


def test_the_files_of_a_run_say_which(files, settings_of, tmp_path):
    settings = settings_of("abmil", search={"learning_rate": [0.01, 0.02], "weight_decay": [0.0]})
    run_train(settings=settings, **files, name="abmil", repeat=0, fold=0, out=tmp_path, threads=1)
    history = read_parquet(tmp_path / "history.parquet", "morphome.history")
    facts = read_json(tmp_path / "run.json", "morphome.run")
    assert list(history["setting"]) == [f"learning_rate=0.0{k}, weight_decay=0" for k in (1, 1, 2, 2)]
    assert facts["chosen"] == list(history.loc[history["chosen"], "setting"])
    assert facts["epochs_run"] == len(history) == 4
    assert facts["best_epoch"] == history.loc[history["chosen"], "epoch"].item()


def test_a_search_needs_inner_patients(fold, settings_of):
    roles = {i: role for i, role in fold.table["role"].items() if role != "inner_val"}
    training = settings_of("abmil", epoch_rule="last", search={"learning_rate": [0.1, 0.2]})["model"]["training"]
    with pytest.raises(MorphomeError, match="no setting can be chosen"):
        NeuralModel("abmil", {}, training, seed=1).fit(fold.with_roles(roles), [])
