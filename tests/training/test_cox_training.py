"""Training on windows of patients: the gradient of a window, and how patients are dealt into windows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models.registry import build
from morphome.training.cox_objective import EVENTS_PER_WINDOW, CoxObjective, windows
from morphome.training.data import derive_seed, load_fold
from morphome.training.loop import Loop
from morphome.training.objective import EpochChoice
from morphome.training.trainer import NeuralModel, torch_state

TIMES = np.linspace(1.0, 6.0, 4)


@pytest.fixture(scope="module")
def files(planted, tmp_path_factory):
    return planted(n=60).write(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def fold(files):
    return load_fold(**{k: v for k, v in files.items() if k != "split_facts"}, repeat=0, fold=0)[0]


def with_events(fold, train, inner=None):
    """The same fold with events of the first so many training and inner patients only."""
    other = fold.with_roles(dict(fold.table["role"]))
    for role, count in (("train", train), ("inner_val", inner)):
        if count is not None:
            ids = list(other.ids(role))
            other.table.loc[ids, "event"] = [float(i < count) for i in range(len(ids))]
    return other


def fitted(fold, settings_of, tiny_models, key, **training):
    training = settings_of(key, **{"epochs": 2, **training})["model"]["training"]
    model = NeuralModel(key, tiny_models[key], training, seed=5)
    notes: list[str] = []
    model.fit(fold, notes)
    return model, notes


# -- the gradient -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", ["path_gptomic", "deepsurv"])
def test_the_step_gets_the_gradient_of_the_whole_window(key, fold, settings_of, tiny_models, monkeypatch):
    """All graphs of a window at once, with the dropout masks and the patches of the two passes, and autograd."""
    how = {"cox_window": 8, "learning_rate": 1e-12, "weight_decay": 0.0, "max_patches": 7}
    monkeypatch.setattr("morphome.training.cox_objective.EVENTS_PER_WINDOW", 3)
    model, _ = fitted(fold, settings_of, tiny_models, key, epochs=1, **how)
    train, got = fold.outcomes("train"), []
    with torch_state(1, derive_seed(model.seed, "weights")):
        module = build(key, model.settings, model.dims)
        loop = Loop("x", module, model.objective, model.inputs, fold, train, train, model.training, model.seed)
        monkeypatch.setattr(loop.optimizer, "step", lambda: got.append([p.grad.clone() for p in module.parameters()]))
        mean = loop._epoch(1, 0.1)
        dealt = loop.windows(1)
        assert len(dealt) == len(got) > 2
        place, losses = 0, []
        module.train()
        for members, grads in zip(dealt, got, strict=True):
            module.zero_grad()
            h = []
            for k, i in enumerate(members):
                draw = derive_seed(model.seed, "step", 1, place + k)
                batch = model.inputs.batch(fold, train.ids[i], training=True, draw=draw)
                torch.manual_seed(draw)
                h.append(module(batch)["log_risk"].squeeze())
            place += len(members)
            loss = model.objective.loss(torch.stack(h).double(), train.time[members], train.event[members])
            losses.append(loss.item() * len(members))
            loss.backward()
            for g, p in zip(grads, module.parameters(), strict=True):
                torch.testing.assert_close(g, p.grad, atol=1e-6, rtol=1e-4)
            assert max(g.abs().max() for g in grads) > 1e-3
    # Without the drawn masks the gradient is another one: the test above tells them apart.
    module.eval()
    module.zero_grad()
    h = torch.cat([module(model.inputs.batch(fold, train.ids[i]))["log_risk"][0] for i in dealt[-1]])
    model.objective.loss(h.double(), train.time[dealt[-1]], train.event[dealt[-1]]).backward()
    assert any((g - p.grad).abs().max() > 1e-3 for g, p in zip(got[-1], module.parameters(), strict=True))
    np.testing.assert_allclose(mean, sum(losses) / len(train.ids), rtol=1e-6)


def test_coefficients_against_the_formula():
    """dL/dh = -(event - exp(h) sum over event times up to t of 1 / sum at risk) / events, without ties; sum 0."""
    rng = np.random.default_rng(1)
    time, event, h = rng.permutation(12) + 1.0, rng.integers(0, 2, 12), rng.normal(size=12)
    g, loss = CoxObjective().coefficients(torch.from_numpy(h), time, event)
    at_risk = np.array([np.exp(h[time >= t]).sum() for t in time])
    level = np.array([(event / at_risk)[time <= t].sum() for t in time])
    np.testing.assert_allclose(g, -(event - np.exp(h) * level) / event.sum())
    np.testing.assert_allclose(loss, -(event * (h - np.log(at_risk))).sum() / event.sum())
    assert abs(g.sum()) < 1e-12
    for few in (slice(0, 1), slice(0, 0), event == 0):
        g, loss = CoxObjective().coefficients(torch.from_numpy(h)[few], time[few], event[few])
        assert g.shape == h[few].shape
        assert not g.any()
        assert loss == 0


# -- windows ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [2, 7, 64, 100, 300, 1000])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
def test_everybody_is_dealt_once_and_events_are_spread(n, share):
    rng = np.random.default_rng(n)
    event = (rng.uniform(size=n) < share).astype("int64")
    dealt = windows(event, 64, rng)
    assert sorted(np.concatenate(dealt)) == list(range(n))
    sizes, events = [len(w) for w in dealt], [int(event[w].sum()) for w in dealt]
    assert max(sizes) - min(sizes) <= 1
    assert max(events) - min(events) <= 1
    assert min(sizes) >= min(n, 64)
    assert len(dealt) == 1 or min(events) >= EVENTS_PER_WINDOW
    # As many windows as both conditions leave.
    assert len(dealt) == max(1, min(n // 64, event.sum() // EVENTS_PER_WINDOW))


def test_windows_are_drawn_anew_and_mixed():
    event = np.repeat([1, 0], [40, 160])
    first, second = (windows(event, 64, np.random.default_rng(seed)) for seed in (1, 2))
    assert any((a != b).any() for a, b in zip(map(np.sort, first), map(np.sort, second), strict=True))
    # Events do not come first in a window.
    assert any(event[w][:5].sum() < 5 for w in first)


# -- few events ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", ["path_gptomic", "mmp"])
def test_one_event_is_enough_to_run(key, fold, settings_of, tiny_models):
    model, _ = fitted(with_events(fold, 1), settings_of, tiny_models, key, epoch_rule="last")
    risk, curves = model.predict(fold, fold.ids(), TIMES)
    assert np.isfinite(risk).all()
    assert ((curves >= 0) & (curves <= 1)).all()
    # One event says too little of a branch: its moving average has not begun.
    assert not any(column.startswith("loss_") for column in model.history)
    assert model.history["grad_norm_path"].gt(0).all()


@pytest.mark.parametrize("key", ["deepsurv", "abmil"])
def test_no_event_is_an_error_that_names_the_fold(key, fold, settings_of, tiny_models):
    with pytest.raises(MorphomeError, match=r"repeat 0, fold 0: no event among the training patients"):
        fitted(with_events(fold, 0), settings_of, tiny_models, key)


def test_inner_patients_without_event_choose_nothing(fold, settings_of, tiny_models):
    """Neither C nor a partial likelihood is there: the last epoch is kept, and the notes say so."""
    model, notes = fitted(with_events(fold, 20, 0), settings_of, tiny_models, "deepsurv", epochs=4, patience=1)
    assert model.best_epoch == 4
    assert any("the epoch was the last one" in note for note in notes)
    # A hazard head still has a loss.
    model, notes = fitted(with_events(fold, 20, 0), settings_of, tiny_models, "abmil", epochs=4, patience=4)
    best = model.history["inner_loss"].idxmin()
    assert model.best_epoch == model.history.loc[best, "epoch"]
    assert any("chosen by its loss" in note for note in notes)


def test_choice_without_c_and_loss():
    choice = EpochChoice("inner_best", 1)
    assert all(choice.update(epoch, math.nan, math.nan) and not choice.stop for epoch in (1, 2, 3))
    assert choice.epoch == 3
