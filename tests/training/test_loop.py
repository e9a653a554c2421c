"""The loop of the trainer: steps, optimisers, schedules, precision, the thread that makes batches, cost and memory."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import morphome.training.ahead as ahead_module
import morphome.training.loop as loop_module
import morphome.training.trainer as trainer
from morphome.errors import MorphomeError
from morphome.models.path_gptomic import PathGPTOmic
from morphome.models.registry import Dims, build
from morphome.survival import harrell
from morphome.training.balance import BranchHeads
from morphome.training.data import derive_seed, load_fold
from morphome.training.loop import Loop
from morphome.training.optim import learning_rate, make_optimizer, set_rates
from morphome.training.trainer import NeuralModel, torch_state

TIMES = np.linspace(1.0, 6.0, 4)
FUSED = ["deep_sets_fusion", "path_gptomic"]


@pytest.fixture(scope="module")
def fold(planted, tmp_path_factory):
    files = planted().write(tmp_path_factory.mktemp("cohort"))
    files.pop("split_facts")
    return load_fold(**files, repeat=0, fold=0)[0]


@pytest.fixture
def trained(fold, settings_of):
    def train(key, **training):
        entry = settings_of(key, **{"epochs": 2, **training})["model"]
        model = NeuralModel(key, entry["settings"], entry["training"], seed=11)
        model.fit(fold, [])
        return model

    return train


def weights(model):
    return {k: v for k, v in model.arrays().items() if k.startswith("weights/")}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# -- what a step is -----------------------------------------------------------------------------------------
def plain_training(model, fold, epochs):
    """The recipe written out: one Adam over all parameters, no plug-in, no thread, no heads, no first pass apart."""
    training, objective, train = model.training, model.objective, fold.outcomes("train")
    with torch_state(1, derive_seed(model.seed, "weights")):
        module = build(model.key, model.settings, model.dims)
        rate, decay = training["learning_rate"], training["weight_decay"]
        optimizer = torch.optim.Adam(module.parameters(), lr=rate, weight_decay=decay, fused=True)
        orders = Loop("x", module, objective, model.inputs, fold, train, train, training, model.seed)
        for epoch in range(1, epochs + 1):
            module.train()
            place = 0
            for members in orders.windows(epoch):

                def forward(k, place=place, members=members, epoch=epoch):
                    draw = derive_seed(model.seed, "step", epoch, place + k)
                    batch = model.inputs.batch(fold, train.ids[members[k]], training=True, draw=draw)
                    torch.manual_seed(draw)
                    return module(batch)

                optimizer.zero_grad()
                n = len(members)
                if objective.whole_window:
                    with torch.no_grad():
                        h = torch.cat([forward(k)["log_risk"][0] for k in range(n)]).double()
                    h.requires_grad_()
                    loss = objective.loss(h, train.time[members], train.event[members])
                    for k, g in enumerate(torch.autograd.grad(loss, h)[0].float()):
                        (g * forward(k)["log_risk"].squeeze()).backward()
                else:
                    for k, i in enumerate(members):
                        output = forward(k)
                        loss = objective.loss(output["logits"], train.time[i], train.event[i])
                        ((loss + sum(output["extra_losses"].values())) / n).backward()
                optimizer.step()
                place += n
    return {f"weights/{k}": v.numpy() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("key", [*FUSED, "abmil"])
def test_training_is_that_of_one_plain_adam_bit_for_bit(key, trained, fold):
    """Groups of parameters, heads on the branches and the thread change nothing under the rule none."""
    model = trained(key, epoch_rule="last")
    assert same(weights(model), plain_training(model, fold, 2))


def test_extra_losses_of_a_cox_window_are_divided_by_its_size(fold, settings_of, monkeypatch):
    """See also test_trainer, for hazard heads: gradient of the mean over patients of the auxiliary losses."""
    grads = []
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self: grads.append(self.param_groups[0]["params"][0].grad.clone())
    )

    class Only(nn.Module):
        needs, supports, head = frozenset({"path"}), frozenset(), "cox"

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([2.0]))

        def forward(self, batch):
            size = float(len(batch.path))
            return {"log_risk": 0.0 * self.w.view(1, 1), "extra_losses": {"a": size * self.w[0], "b": self.w[0] ** 2}}

    monkeypatch.setattr(trainer, "network", lambda key: Only)
    monkeypatch.setattr(trainer, "build", lambda key, settings, dims: Only())
    training = settings_of("abmil", epochs=1, optimizer="sgd", max_patches=99, epoch_rule="last")["model"]["training"]
    NeuralModel("only", {}, training, seed=1).fit(fold, [])
    sizes = [len(fold.bag(i)[0]) for i in fold.ids("train")]
    assert len(grads) == 1
    torch.testing.assert_close(grads[0], torch.tensor([np.mean(sizes) + 4.0], dtype=torch.float32))


def test_a_rule_may_leave_patients_out_of_a_step(fold, trained, monkeypatch):
    """None from the plug-in: no gradient of this patient; the branches' mean losses are those of the others."""
    plain, seen, left = loop_module.Balance.forward, [], fold.ids("train")[::3]
    end = loop_module.Balance.end_window

    def forward(self, batch):
        return None if batch.patient_id in left else plain(self, batch)

    monkeypatch.setattr(loop_module.Balance, "forward", forward)
    monkeypatch.setattr(
        loop_module.Balance, "end_window", lambda self, values: seen.append(dict(values)) or end(self, values)
    )
    for key in FUSED:
        seen.clear()
        model = trained(key, epochs=1, accumulation=999, sampler="shuffle", max_patches=999, learning_rate=1e-12)
        assert len(seen) == 1
        assert all(0.1 < value < 5 for value in seen[0].values())
        assert math.isfinite(model.history["train_loss"].item())
    # Nobody is left: the averages of the rule stay, and nothing is learnt.
    monkeypatch.setattr(loop_module.Balance, "forward", lambda self, batch: None)
    for key in FUSED:
        seen.clear()
        trained(key, epochs=1)
        assert all(math.isnan(value) for values in seen for value in values.values())


# -- optimisers ---------------------------------------------------------------------------------------------
TRAINING = {"optimizer": "adam", "learning_rate": 0.1, "weight_decay": 0.5}


def test_groups_of_parameters(tiny_models):
    with torch.random.fork_rng(devices=[]):
        module = build("deep_sets_fusion", tiny_models["deep_sets_fusion"], Dims(8, {}, 3, n_omic=5))
    heads = BranchHeads(module, 3)
    groups = make_optimizer(module, heads.parameters(), TRAINING).param_groups
    assert [group["branch"] for group in groups] == ["path", "omic", "shared", "beside"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.5, 0.5, 0.0]
    found = [id(p) for group in groups[:3] for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in module.parameters())
    assert {id(p) for p in groups[3]["params"]} == {id(p) for p in heads.parameters()}
    assert len(make_optimizer(nn.Linear(2, 1), [], TRAINING).param_groups) == 1


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adam", lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.5)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5)),
        ("radam", lambda p: torch.optim.RAdam(p, lr=0.1, weight_decay=0.5)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5)),
    ],
)
def test_kinds_of_optimiser(name, reference):
    """Six steps as torch's own; a frozen weight stays, decay or not."""
    ends = []
    for make in (lambda m: make_optimizer(m, [], {**TRAINING, "optimizer": name}), lambda m: reference(m.parameters())):
        module = nn.Linear(3, 2)
        with torch.no_grad():
            for k, p in enumerate(module.parameters(), start=1):
                p.copy_(torch.linspace(-k, k, p.numel()).view_as(p))
        module.bias.requires_grad_(False)
        optimizer = make(module)
        for step in range(6):
            optimizer.zero_grad()
            module(torch.full((1, 3), 1.0 + step)).square().sum().backward()
            optimizer.step()
        ends.append(module)
    torch.testing.assert_close(ends[0].weight, ends[1].weight)
    assert ends[0].bias.tolist() == [-2.0, 2.0]


def test_rates_of_epochs():
    training = {"learning_rate": 0.4, "warmup_epochs": 3, "epochs": 7, "schedule": "cosine"}
    expected = [0.1, 0.2, 0.3, 0.4, 0.2 * (1 + math.sqrt(0.5)), 0.2, 0.2 * (1 - math.sqrt(0.5))]
    np.testing.assert_allclose([learning_rate(e, training) for e in range(1, 8)], expected)
    constant = {**training, "schedule": "constant"}
    np.testing.assert_allclose([learning_rate(e, constant) for e in range(1, 8)], [0.1, 0.2, 0.3] + [0.4] * 4)
    assert learning_rate(1, {**training, "warmup_epochs": 0}) == 0.4
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "branch": b} for b in ("path", "shared")])
    set_rates(optimizer, 0.4, {"path": 0.25})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.4]


def test_the_schedule_reaches_the_optimiser(trained, monkeypatch):
    rates = []
    plain = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a: rates.append({g["lr"] for g in self.param_groups}) or plain(self, *a),
    )
    how = {"epochs": 4, "warmup_epochs": 1, "schedule": "cosine", "optimizer": "adamw", "epoch_rule": "last"}
    model = trained("abmil", accumulation=99, **how)
    assert rates == [{rate} for rate in model.history["learning_rate"]]
    np.testing.assert_allclose(model.history["learning_rate"], [0.0025, 0.005, 0.00375, 0.00125])


# -- precision ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", [*FUSED, "abmil"])
def test_bf16_trains_in_mixed_precision_and_predicts_in_fp32(key, trained, fold, monkeypatch):
    seen = []
    plain = nn.Linear.forward

    def spy(self, x):
        out = plain(self, x)
        seen.append((torch.is_grad_enabled(), out.dtype))
        return out

    reference = trained(key)
    monkeypatch.setattr(nn.Linear, "forward", spy)
    inside = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor,
        "backward",
        lambda self, *a, **k: inside.append(torch.is_autocast_enabled("cpu")) or backward(self, *a, **k),
    )
    model = trained(key, precision="bf16")
    assert {kind for grad, kind in seen if grad} == {torch.bfloat16}
    seen.clear()
    risk, _ = model.predict(fold, fold.ids(), TIMES)
    assert {kind for _, kind in seen} == {torch.float32}
    assert np.isfinite(risk).all()
    assert all(v.dtype == np.float32 for v in weights(model).values())
    assert not any(inside)
    assert not torch.is_autocast_enabled("cpu")
    # Another arithmetic, the same training.
    assert not same(weights(model), weights(reference))
    for name, value in weights(model).items():
        np.testing.assert_allclose(value, weights(reference)[name], atol=0.03)


def test_a_loss_that_is_not_finite_leaves_no_autocast_behind(trained, fold, monkeypatch):
    bad, encode = fold.ids("train")[4], PathGPTOmic.encode

    def broken(self, batch):
        encoded = encode(self, batch)
        encoded.z["path"] = encoded.z["path"] * (math.nan if batch.patient_id == bad else 1.0)
        return encoded

    monkeypatch.setattr(PathGPTOmic, "encode", broken)
    # The window's common loss is that of all its patients; the message names the one that is to blame.
    with pytest.raises(MorphomeError, match=f"epoch 1, patient {bad}"):
        trained("path_gptomic", precision="bf16")
    assert not torch.is_autocast_enabled("cpu")


# -- branches -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", FUSED)
def test_branch_risks_are_those_of_the_chosen_epoch_and_follow_patients(key, trained, fold):
    model = trained(key, epochs=6, learning_rate=0.05, patience=6)
    assert model.best_epoch < 6  # else the last heads would do
    inner = fold.outcomes("inner_val")
    model.predict(fold, inner.ids, TIMES)
    chosen = model.history[model.history["chosen"]].squeeze()
    for u in ("path", "omic"):
        assert harrell(inner.time, inner.event, model.branch_risks[u]).c == chosen[f"inner_c_{u}"]
    ids = fold.ids()
    model.predict(fold, ids, TIMES)
    everybody = {u: dict(zip(ids, values, strict=True)) for u, values in model.branch_risks.items()}
    turned = ids[::-1][3:]
    model.predict(fold, turned, TIMES)
    for u, values in model.branch_risks.items():
        assert len(set(values)) > len(ids) / 2
        assert list(values) == [everybody[u][i] for i in turned]


# -- batches made ahead -------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", FUSED)
def test_the_thread_changes_no_bit(key, trained, fold, monkeypatch):
    found = []
    for worth in (0.0, math.inf):
        monkeypatch.setattr(ahead_module, "WORTH_A_THREAD", worth)
        model = trained(key)
        risk, curves = model.predict(fold, fold.ids(), TIMES)
        found.append({**model.arrays(), "risk": risk, "curves": np.nan_to_num(curves)})
    assert same(*found)


# -- cost ---------------------------------------------------------------------------------------------------
class Least(nn.Module):
    """As little arithmetic as a model can have."""

    needs, supports, head = frozenset({"path"}), frozenset(), "hazard"

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(1, 3))

    def forward(self, batch):
        return {"logits": self.logits * 1.0}


def test_the_loop_costs_little_per_patient(fold, settings_of, monkeypatch):
    monkeypatch.setattr(trainer, "network", lambda key: Least)
    monkeypatch.setattr(trainer, "build", lambda key, settings, dims: Least())
    training = settings_of("abmil", accumulation=32, epoch_rule="last")["model"]["training"]
    model = NeuralModel("least", {}, training, seed=1)
    model.fit(fold, [])
    train = fold.outcomes("train")
    with torch_state(1, 1):
        loop = Loop("least", model.module, model.objective, model.inputs, fold, train, train, training, 1)
        loop._epoch(1, 0.01)
        times = []
        for epoch in range(2, 12):
            start = time.process_time()
            loop._epoch(epoch, 0.01)
            times.append((time.process_time() - start) / len(train.ids))
    assert min(times) < 0.002


MEMORY = """
import resource
import numpy as np, pandas as pd, torch
from types import SimpleNamespace
from morphome.models.batch import Batch
from morphome.models.registry import Dims, build
from morphome.training.outputs import evaluate
from morphome.training.objective import HazardObjective

torch.set_num_threads(1)
genes = tuple(torch.randn(n) for n in (20, 30, 10))
fold = SimpleNamespace(table=pd.DataFrame({"role": "test"}, index=["P"]))
path, objective = torch.randn(100_000, 256), HazardObjective(np.array([1.0, 2.0, 3.0]))
models = {"abmil": {"dim": 32, "attention_dim": 16}, "mome": {"dim": 32, "heads": 2, "landmarks": 8}}
for key, settings in models.items():
    module = build(key, settings, Dims(256, {"a": 20, "b": 30, "c": 10}, 4))
    for n in (500, 100_000):
        batch = Batch(path=path[:n], pos=torch.zeros(n, 3), groups=genes, patient_id="P")
        evaluate("m", module, objective, SimpleNamespace(batch=lambda fold, i: batch), fold, ["P"], 1)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_of_a_large_bag():
    """100,000 patches: activations of width 32 are 13 MB each; a matrix of patches by patches would be 40 GB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    peak = [float(line) for line in done.stdout.split()]
    assert peak[1] - peak[0] < 250  # ABMIL
    assert peak[3] - peak[1] < 500  # MoME, beyond that


def test_evaluation_keeps_no_graph(fold, trained):
    model = trained("deep_sets_fusion")
    loop = Loop(
        "x", model.module, model.objective, model.inputs, fold, *[fold.outcomes("train")] * 2, model.training, 1
    )
    seen = []
    plain = model.module.encode
    loop.module.encode = lambda batch: seen.append(plain(batch)) or seen[-1]
    loop.evaluate(fold.ids("inner_val"), 1)
    assert seen
    assert not any(value.requires_grad for encoded in seen for value in encoded.z.values())


def test_the_error_of_pseudo_inverses_is_in_the_history(fold, settings_of):
    """Only where Nyström attention ran: with few landmarks it does on these bags, with many it is exact."""
    for landmarks, there in ((2, True), (64, False)):
        entry = settings_of("transmil", epochs=1)["model"]
        settings = {**entry["settings"], "landmarks": landmarks, "attention": "nystrom_masked"}
        model = NeuralModel("transmil", settings, entry["training"], seed=1)
        model.fit(fold, [])
        assert ("pinv_error" in model.history) == there
        if there:
            assert 0 <= model.history["pinv_error"].item() < 1
