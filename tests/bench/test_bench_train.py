"""The measurement of training: both ways train the same function, and the report says what it did."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from morphome.bench import train
from morphome.bench.train import Ours, Plain, Trial, bench_train, plain, read_settings, write_cohort
from morphome.errors import MorphomeError
from morphome.models import layers

GROUPS = {"a": 3, "b": 4}
SMALL = {"dim": 16, "heads": 2, "landmarks": 8}


def trial(model: str = "mome", bag: int = 20, precision: str = "fp32", **settings) -> Trial:
    return Trial(model, settings, 16, 12, bag, 6, precision, GROUPS, 1)


def test_what_is_reported():
    asked = {
        "patients": 16,
        "bag": 20,
        "dim": 6,
        "rounds": 1,
        "timed": 4,
        "groups": GROUPS,
        "settings": SMALL,
        "memory": False,
    }
    found = json.loads(json.dumps(bench_train(**asked), allow_nan=False))
    assert {name: found[name] for name in ("model", "patients", "bag", "dim", "rounds", "timed", "precision")} == {
        **{name: asked[name] for name in ("patients", "bag", "dim", "rounds", "timed")},
        "model": "mome",
        "precision": "fp32",
    }
    assert found["extrapolated"] is True
    assert found["ratio"] == pytest.approx(found["peer"] / found["ours"])
    assert found["ratio_wall"] == pytest.approx(found["peer_wall"] / found["ours_wall"])
    assert found["ratio_of_rounds"] == [pytest.approx(found["ratio"])] * 2
    assert found["max_difference"] < 1e-5
    assert not any(name.endswith("peak_mb") for name in found)
    assert found["ours_bags_mb"] == pytest.approx(16 * 20 * (6 * 2 + 12) / 1e6)


def test_the_peak_is_that_of_a_process_of_its_own(tmp_path, monkeypatch):
    asked = _written(trial(**SMALL), tmp_path)
    # A process that has loaded torch and trained; what this one holds beside is not its own.
    ballast = np.ones(50_000_000)
    assert 100 < train._peak("peer", asked, tmp_path) < train.peak_mb() - ballast.nbytes / 2e6
    with pytest.raises(MorphomeError, match="the process for the memory of 'ours' failed"):
        monkeypatch.setattr(train.sys, "executable", "false")
        train._peak("ours", asked, tmp_path)


def test_the_time_of_an_epoch_is_that_of_the_timed_patients_times_their_share(monkeypatch):
    times = train.interleaved(1, {"peer": lambda: None, "ours": lambda: None})
    times.seconds.update(peer=[6.0, 8.0, 7.0], ours=[2.0, 2.0, 2.0])
    times.wall_seconds.update(peer=[9.0] * 3, ours=[3.0] * 3)
    monkeypatch.setattr(train, "interleaved", lambda rounds, ways: times)
    asked = {"patients": 40, "bag": 3, "dim": 2, "timed": 10, "groups": GROUPS, "settings": SMALL, "memory": False}
    found = bench_train(**asked)
    assert (found["peer"], found["ours"], found["peer_wall"], found["ours_wall"]) == (28.0, 8.0, 36.0, 12.0)
    assert (found["ratio"], found["ratio_of_rounds"]) == (3.5, [3.0, 4.0])
    assert bench_train(**{**asked, "patients": 12, "timed": 99})["extrapolated"] is False


@pytest.mark.parametrize("settings", [{}, {"router": "soft"}, {"residual": "both"}])
@pytest.mark.parametrize("bag", [5, 20])
def test_the_plain_network_is_the_same_function(settings, bag, tmp_path):
    """In training too, gradients included: without dropout both give the gradients of our code."""
    asked = trial(bag=bag, dropout=0.0, attention_dropout=0.0, **SMALL, **settings)
    write_cohort(asked, tmp_path)
    way = Plain(asked, tmp_path)
    assert way.difference() < 1e-5
    batch, gradients = way.batch(1), []
    for module in (way.module.train(), way.reference.train()):
        (module(batch)["logits"] * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    theirs, ours = gradients
    reached = [name for name, g in ours.items() if g is not None and bool((g != 0).any())]
    assert any("gate" in name for name in reached) and any("attention" in name for name in reached)
    for name, g in theirs.items():
        other = ours[name] if ours[name] is not None else torch.zeros(())
        torch.testing.assert_close(g if g is not None else torch.zeros(()), other + 0 * (0 if g is None else g))


def test_the_plain_network_has_the_dropout_of_torch_and_the_same_weights(tmp_path):
    ours = Ours(_written(trial(**SMALL), tmp_path), tmp_path)
    before, network = ours.module(), plain(ours.module())
    assert not any(isinstance(part, layers.Dropout) for part in network.modules())
    kinds = [type(part) for part in network.modules() if isinstance(part, torch.nn.modules.dropout._DropoutNd)]
    assert {torch.nn.Dropout, torch.nn.AlphaDropout} == set(kinds)
    state = network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in before.state_dict().items())


@pytest.mark.parametrize(("model", "settings"), [("abmil", {"dim": 16}), ("transmil", SMALL), ("mome", SMALL)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_ways_learn(model, settings, precision, tmp_path):
    asked = _written(trial(model, 6, precision, **settings), tmp_path)
    for way in (Ours(asked, tmp_path), Plain(asked, tmp_path)):
        module = way.loop.module if isinstance(way, Ours) else way.module
        before = {name: p.clone() for name, p in module.named_parameters()}
        first = way()
        assert math.isfinite(first) and first > 0
        changed = [name for name, p in module.named_parameters() if not torch.equal(p, before[name])]
        assert "classifier.weight" in changed


def test_a_bag_of_the_plain_loop_is_that_of_the_trainer(tmp_path):
    asked = _written(trial("abmil", 9), tmp_path)
    ours, theirs = Ours(asked, tmp_path), Plain(asked, tmp_path)
    batch, other = ours.inputs.batch(ours.fold, "P00003", training=True), theirs.batch(3)
    assert torch.equal(batch.path, other.path) and torch.equal(batch.pos, other.pos.to(batch.pos))
    assert np.unique(batch.pos[:, 1:], axis=0).shape == (9, 2)


def test_a_cox_head_is_trained_on_whole_windows(tmp_path):
    asked = _written(trial("deepsurv", 3, dim=8), tmp_path)
    way = Plain(asked, tmp_path)
    assert math.isfinite(way()) and way.ours.objective.whole_window


def test_what_is_refused():
    with pytest.raises(MorphomeError, match="too few"):
        bench_train(patients=5)
    with pytest.raises(MorphomeError, match="precision"):
        bench_train(precision="int8")
    assert read_settings('{"dim": 8}') == {"dim": 8}
    for text in ("[1]", "dim: 8"):
        with pytest.raises(MorphomeError, match="JSON object"):
            read_settings(text)
    with pytest.raises(MorphomeError, match="baseline"):
        bench_train("random")


def _written(asked: Trial, folder) -> Trial:
    write_cohort(asked, folder)
    return asked
