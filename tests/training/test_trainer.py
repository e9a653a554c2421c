"""The neural trainer alone, with a tiny model of its own that obeys the contract."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import morphome.training.trainer as trainer
from morphome.errors import MorphomeError
from morphome.training.data import load_fold
from morphome.training.loop import Loop
from morphome.training.objective import sampling_weights
from morphome.training.trainer import NeuralModel, torch_state

TIMES = np.linspace(1.0, 6.0, 4)


class Tiny(nn.Module):
    """Mean of the bag to logits; one routing entry; records what it is given."""

    needs = frozenset({"path"})
    supports = frozenset()
    head = "hazard"
    extra = 0.0
    dropout = 0.0

    def __init__(self, d_in: int, n_bins: int) -> None:
        super().__init__()
        self.layer = nn.Linear(d_in, n_bins)
        self.seen: list[tuple[bool, str, int]] = []

    def forward(self, batch):
        self.seen.append((self.training, batch.patient_id, len(batch.path)))
        pooled = batch.path.mean(dim=0, keepdim=True)
        return {
            "logits": self.layer(nn.functional.dropout(pooled, self.dropout, self.training)),
            "extra_losses": {"norm": self.extra * self.layer.weight.sum()},
            "aux": {"routing": {"only": {"expert": 1, "pi": torch.tensor([0.25, 0.5, 0.25, 0.0])}}},
        }


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(trainer, "network", lambda key: Tiny)
    monkeypatch.setattr(trainer, "build", lambda key, settings, dims: Tiny(dims.d_in, dims.n_bins))
    monkeypatch.setattr(Tiny, "extra", 0.0)
    monkeypatch.setattr(Tiny, "dropout", 0.0)


@pytest.fixture(scope="module")
def fold(planted, tmp_path_factory):
    files = planted().write(tmp_path_factory.mktemp("cohort"))
    files.pop("split_facts")
    return load_fold(**files, repeat=0, fold=0)[0]


def trained(fold, settings_of, seed=11, **training):
    training = {**settings_of("abmil")["model"]["training"], **training}
    model = NeuralModel("tiny", {}, training, seed=seed)
    notes: list[str] = []
    model.fit(fold, notes)
    return model, notes


def test_every_window_is_stepped_and_divided_by_its_true_size(tiny, fold, settings_of, monkeypatch):
    """The gradients that the optimiser gets equal those of the mean loss over each window, the last one too."""
    steps = []
    plain = torch.optim.Adam.step

    def spy(self, *args, **kwargs):
        steps.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    monkeypatch.setattr(Tiny, "extra", 0.3)
    original = Loop.windows
    orders = []

    def windows(self, epoch):
        orders.extend(original(self, epoch))
        return orders

    monkeypatch.setattr(Loop, "windows", windows)
    n = len(fold.ids("train"))
    window = n - 3  # two windows, the last one of 3 patients
    model, _ = trained(
        fold, settings_of, epochs=1, accumulation=window, learning_rate=1e-12, weight_decay=0.0, max_patches=999
    )
    assert len(steps) == 2
    train = fold.outcomes("train")
    assert [len(members) for members in orders] == [window, 3]
    for grads, members in zip(steps, orders, strict=True):
        model.module.zero_grad()
        losses = []
        for i in members:
            output = model.module(model.inputs.batch(fold, train.ids[i]))
            loss = model.objective.loss(output["logits"], train.time[i], train.event[i])
            losses.append(loss + output["extra_losses"]["norm"])
        torch.stack(losses).mean().backward()
        for got, parameter in zip(grads, model.module.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, atol=1e-6, rtol=1e-5)


def test_class_balanced_sampling(tiny, fold, settings_of, monkeypatch):
    bins = np.array([0, 0, 0, 1, 1, 2])
    event = np.array([1, 1, 0, 1, 1, 0])  # classes of 2, 1, 2, 1; (1,0), (2,1) and others are empty
    weights = sampling_weights(bins, event)
    np.testing.assert_allclose(weights, [1 / 8, 1 / 8, 1 / 4, 1 / 8, 1 / 8, 1 / 4])
    loops = []
    run = Loop.run
    monkeypatch.setattr(Loop, "run", lambda self, *args: loops.append(self) or run(self, *args))
    model, _ = trained(fold, settings_of, epochs=1)
    train = fold.outcomes("train")
    drawn = [np.concatenate(loops[0].windows(epoch)) for epoch in range(1, 200)]
    assert all(len(order) == len(train.ids) for order in drawn)
    classes = 2 * trainer.hazard.bin_index(train.time, model.objective.edges) + train.event
    share = np.bincount(classes[np.concatenate(drawn)], minlength=6) / sum(map(len, drawn))
    there = np.unique(classes)
    np.testing.assert_allclose(share[there], 1 / len(there), atol=0.03)
    assert (drawn[0] != drawn[1]).any()
    np.testing.assert_array_equal(drawn[0], np.concatenate(loops[0].windows(1)))
    loops[0].training["sampler"] = "shuffle"
    assert sorted(np.concatenate(loops[0].windows(1))) == list(range(len(train.ids)))


def test_subsampling_in_training_only_and_roles_stay_apart(tiny, fold, settings_of):
    model, _ = trained(fold, settings_of, epochs=2, max_patches=7)
    test, inner = set(fold.ids("test")), set(fold.ids("inner_val"))
    n = len(fold.ids("train"))
    epochs, recalibration = model.module.seen[:-n], model.module.seen[-n:]
    for training, patient, size in epochs:
        full = len(fold.bag(patient)[0])
        assert patient not in test
        assert (patient in inner) == (not training)
        assert size == (min(7, full) if training else full)
    assert {p for t, p, _ in epochs if not t} == inner
    # At the end each training patient once, with the whole bag and without dropout.
    assert recalibration == [(False, p, len(fold.bag(p)[0])) for p in fold.ids("train")]
    assert any(len(fold.bag(p)[0]) > 7 for p in fold.ids("train"))


def test_drawn_patches_keep_their_order(tiny, fold, settings_of):
    model, _ = trained(fold, settings_of, epochs=1, max_patches=4)
    patient = fold.ids("train")[0]
    full = fold.bag(patient)[0]
    part = model.inputs.batch(fold, patient, training=True, draw=5).path.numpy()
    at = [int(np.flatnonzero((full == row).all(axis=1))[0]) for row in part]
    assert at == sorted(at)
    assert len(at) == 4


def test_the_chosen_epoch_is_restored(tiny, fold, settings_of):
    """Inner C of the kept weights equals the history's chosen row, and that row is its maximum."""
    model, _ = trained(fold, settings_of, epochs=8, patience=8, learning_rate=0.3)
    history = model.history
    chosen = history[history["chosen"]].squeeze()
    assert chosen["epoch"] == model.best_epoch
    assert chosen["inner_c"] == history["inner_c"].max()
    assert history["inner_c"].nunique() > 1
    inner = fold.outcomes("inner_val")
    logits = model._evaluate(fold, inner.ids, 0).main
    assert model.objective.score(logits, inner) == (chosen["inner_loss"], chosen["inner_c"])


def test_last_epoch_rule_keeps_the_last(tiny, fold, settings_of):
    model, _ = trained(fold, settings_of, epochs=5, epoch_rule="last", learning_rate=0.3)
    assert model.best_epoch == 5
    assert list(model.history["chosen"]) == [False] * 4 + [True]


def test_training_is_deterministic_and_leaves_torch_as_it_was(tiny, fold, settings_of, monkeypatch):
    monkeypatch.setattr(Tiny, "dropout", 0.5)
    torch.manual_seed(123)
    before = torch.get_rng_state().clone()
    first, _ = trained(fold, settings_of, epochs=2)
    torch.rand(3)
    second, _ = trained(fold, settings_of, epochs=2)
    torch.manual_seed(123)
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in first.arrays().items():
        np.testing.assert_array_equal(value, second.arrays()[key])
    other, _ = trained(fold, settings_of, epochs=2, seed=12)
    assert (other.arrays()["weights/layer.weight"] != first.arrays()["weights/layer.weight"]).any()
    state, threads = torch.get_rng_state().clone(), torch.get_num_threads()
    with torch_state(threads + 1, 5):
        torch.rand(1)
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_evaluation_does_not_shift_the_random_numbers_of_training(tiny, fold, settings_of, monkeypatch):
    monkeypatch.setattr(Tiny, "dropout", 0.5)
    first, _ = trained(fold, settings_of, epochs=3, epoch_rule="last")
    plain = Loop.evaluate

    def wasteful(self, *args):
        torch.rand(7)
        return plain(self, *args)

    monkeypatch.setattr(Loop, "evaluate", wasteful)
    second, _ = trained(fold, settings_of, epochs=3, epoch_rule="last")
    np.testing.assert_array_equal(first.arrays()["weights/layer.weight"], second.arrays()["weights/layer.weight"])


def test_a_loss_that_is_not_finite_names_epoch_and_patient(tiny, fold, settings_of, monkeypatch):
    plain = Tiny.forward

    def broken(self, batch):
        output = plain(self, batch)
        if batch.patient_id == fold.ids("train")[0]:
            output["logits"] = output["logits"] * float("nan")
        return output

    monkeypatch.setattr(Tiny, "forward", broken)
    with pytest.raises(MorphomeError, match=rf"repeat 0, fold 0, epoch 1, patient {fold.ids('train')[0]}"):
        trained(fold, settings_of, epochs=1, sampler="shuffle")


@pytest.mark.parametrize("sampler", ["class_balanced", "shuffle"])
def test_curves_are_recalibrated_on_the_chosen_state_and_each_training_patient_once(tiny, fold, settings_of, sampler):
    model, _ = trained(fold, settings_of, epochs=4, learning_rate=0.3, sampler=sampler)
    train = fold.outcomes("train")
    logits = model._evaluate(fold, train.ids, 0).main
    bins = trainer.hazard.bin_index(train.time, model.objective.edges)
    h = 1 / (1 + np.exp(-logits - model.objective.offsets))
    for k in range(h.shape[1]):
        weight = np.where((bins == k) & (train.event == 0), 0.5, 1.0)[bins >= k]
        observed = train.event[bins == k].sum().clip(0.5, weight.sum() - 0.5)
        np.testing.assert_allclose(weight @ h[bins >= k, k], observed)
    np.testing.assert_array_equal(model.arrays()["fitted/baseline_offsets"], model.objective.offsets)
    risk, curves = model.predict(fold, train.ids, model.objective.edges)
    np.testing.assert_allclose(curves, np.cumprod(1 - h, axis=1)[:, :-1])
    np.testing.assert_allclose(risk, -np.cumprod(1 / (1 + np.exp(logits)), axis=1).sum(axis=1))


def test_survival_curves_match_the_hazards_and_stop_at_the_last_edge(tiny, fold, settings_of):
    model, _ = trained(fold, settings_of, epochs=1)
    edges = model.objective.edges
    logits = np.array([[0.5, -1.0, 0.2]])
    times = np.array([0.0, edges[0] / 2, edges[0], edges[1], edges[1] + 1e-6])
    risk, curve = model.objective.prediction(logits, times)
    raw, s = (np.cumprod(1 / (1 + np.exp(logits[0] + b))) for b in (0.0, model.objective.offsets))
    np.testing.assert_allclose(curve[0, :4], [1.0, np.sqrt(s[0]), s[0], s[1]])
    assert np.isnan(curve[0, 4])
    np.testing.assert_allclose(risk, [-raw.sum()])
    assert risk.dtype == np.float64


def test_routing_of_inner_patients_each_epoch_and_of_all_at_the_chosen_one(tiny, fold, settings_of):
    model, _ = trained(fold, settings_of, epochs=3, epoch_rule="last")
    model.predict(fold, fold.ids(), TIMES)
    table = model.diagnostics
    assert set(table.loc[table["epoch"] < 3, "role"]) == {"inner_val"}
    assert set(table.loc[table["epoch"] == 3, "patient_id"]) == set(fold.ids())
    assert len(table) == 2 * len(fold.ids("inner_val")) + len(fold.ids())
    assert list(table.iloc[0][["p0", "p1", "p2", "p3"]]) == [0.25, 0.5, 0.25, 0.0]
    np.testing.assert_allclose(table["entropy"], 1.5 * math.log(2))
    assert (table["expert"] == 1).all()


def test_no_inner_part_is_an_error_unless_the_last_epoch_is_kept(tiny, fold, settings_of, monkeypatch):
    empty = fold.outcomes("inner_val")._replace(ids=(), time=np.empty(0), event=np.empty(0, dtype="int64"))
    plain = type(fold).outcomes
    monkeypatch.setattr(
        type(fold), "outcomes", lambda self, *roles: empty if roles == ("inner_val",) else plain(self, *roles)
    )
    with pytest.raises(MorphomeError, match="inner_val"):
        trained(fold, settings_of, epochs=1)
    model, _ = trained(fold, settings_of, epochs=1, epoch_rule="last")
    assert math.isnan(model.history["inner_c"].item())
