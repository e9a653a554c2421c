"""Rules that give a branch gradients of its own, against gradients that are computed in one piece."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from morphome.errors import MorphomeError
from morphome.models import hazard
from morphome.models.fusion import BRANCHES
from morphome.training.balance_gradients import pareto, rank_loss

spec = importlib.util.spec_from_file_location("balance_loop", Path(__file__).with_name("balance_loop.py"))
loop = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loop)
Loop, Tokens, CoxTokens, Split, SplitHazard = loop.Loop, loop.Tokens, loop.CoxTokens, loop.Split, loop.SplitHazard
KINDS = [Tokens, CoxTokens, Split, SplitHazard]
WOVEN = [*KINDS, loop.Woven]


def still(tried):
    """The same loop without dropout, in epoch 1."""
    if hasattr(tried.module, "dropout"):
        tried.module.dropout.p = 0.0
    tried.balance.start_epoch(1)
    return tried


def losses(tried, cut=()):
    """Losses of one window of all patients in one graph: main, path, omic, and the scores behind them; ``cut``: what
    reaches the fusion without gradient."""
    members = loop.patients()
    encoded = [tried.module.encode(batch) for batch, _ in members]
    rows = {"main": torch.cat([tried.module.fuse(e.z | {u: e.z[u].detach() for u in cut}) for e in encoded])}
    branches = [tried.heads(e.z, detach=False) for e in encoded]
    rows |= {u: torch.cat([b[u] for b in branches]) for u in BRANCHES}
    time, event = torch.tensor([t for _, t in members]), torch.tensor([b.event for b, _ in members])
    bins = torch.tensor([b.bin for b, _ in members])
    if tried.cox:
        return {key: hazard.cox_loss(s, time, event, "breslow") for key, s in rows.items()}, rows
    return {key: hazard.nll_loss(s, bins, event) for key, s in rows.items()}, rows


def slopes(loss, parameters):
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.reshape(-1) for p, g in zip(parameters, found, strict=True)]
    )


def rest_of(tried):
    exclusive = {id(p) for ps in tried.module.branch_parameters().values() for p in ps}
    return [p for p in tried.module.parameters() if id(p) not in exclusive]


def check_heads(tried, expected):
    """Whatever the rule does with the encoders, the heads learn their own losses in full."""
    for u in BRANCHES if len(list(tried.heads.parameters())) else ():
        own = list(tried.heads.linear[u].parameters())
        assert torch.allclose(loop.gradient(own), slopes(expected[u], own), atol=1e-6)


@pytest.mark.parametrize("kind", WOVEN)
def test_dgl_gives_each_encoder_its_own_loss_only(kind):
    tried = still(Loop(kind, {"rule": "dgl"}))
    tried.gradients(loop.patients())
    expected, _ = losses(tried)
    for u, parameters in tried.module.branch_parameters().items():
        assert torch.allclose(loop.gradient(parameters), slopes(expected[u], parameters), atol=1e-6), u
        assert loop.gradient(parameters).abs().max() > 1e-4
    fusion = [*tried.module.out.parameters()]
    assert torch.allclose(loop.gradient(fusion), slopes(expected["main"], fusion), atol=1e-6)
    check_heads(tried, expected)
    if issubclass(kind, Tokens):
        register = list(tried.module.register.parameters())
        assert torch.allclose(loop.gradient(register), slopes(expected["main"], register), atol=1e-6)
        # The scale before both branches learns from their losses, and from the fused one by way of the third token.
        shared = [tried.module.shared]
        aside, _ = losses(tried, cut=BRANCHES)
        total = expected["path"] + expected["omic"] + aside["main"]
        assert torch.allclose(loop.gradient(shared), slopes(total, shared), atol=1e-6)
        assert slopes(aside["main"], shared).abs().max() > 1e-5


@pytest.mark.parametrize("kind", WOVEN)
def test_dgl_lets_no_gradient_of_the_fused_loss_into_an_encoder(kind):
    tried = still(Loop(kind, {"rule": "dgl"}))
    output = tried.balance.forward(loop.patients()[0][0])
    branches = {u: (0.0 * output["branches"][u]).sum() for u in BRANCHES}
    tried.balance.backward({"main": output[loop.OUTPUT[kind.head]].square().sum(), **branches})
    for parameters in tried.module.branch_parameters().values():
        assert all(p.grad is None or not p.grad.any() for p in parameters)
    assert tried.module.out.weight.grad.abs().max() > 0


def test_dgl_leaves_the_extra_losses_of_the_model_alone(monkeypatch):
    monkeypatch.setattr(Tokens, "extra", 0.3)
    tried = still(Loop(Tokens, {"rule": "dgl"}))
    tried.gradients(loop.patients())
    expected, _ = losses(tried)
    own = list(tried.module.path.parameters())
    penalty = 0.3 * tried.module.path.weight.square().sum()
    assert torch.allclose(loop.gradient(own), slopes(expected["path"] + penalty, own), atol=1e-6)


@pytest.mark.parametrize("kind", WOVEN)
def test_mmpareto_harms_neither_loss(kind):
    """In every window h.g_m >= 0 and h.g_u >= 0 and |h| = gamma |g_m + g_u|; other parameters keep g_m."""
    tried = still(Loop(kind, {"rule": "mmpareto", "gamma": 1.5}))
    for _ in range(3):
        tried.gradients(loop.patients())
        expected, _ = losses(tried)
        cosines = {}
        for u, parameters in tried.module.branch_parameters().items():
            h, main, own = loop.gradient(parameters), *(slopes(expected[key], parameters) for key in ("main", u))
            assert h @ main >= -1e-7 and h @ own >= -1e-7
            assert h.norm().item() == pytest.approx(1.5 * (main + own).norm().item(), rel=1e-3)
            cosines[u] = F.cosine_similarity(main, own, dim=0).item()
            if cosines[u] >= 0:
                assert torch.allclose(h, 1.5 * (main + own), atol=1e-6)
        rest = rest_of(tried)
        assert torch.allclose(loop.gradient(rest), slopes(expected["main"], rest), atol=1e-6)
        check_heads(tried, expected)
        log = tried.balance.log()
        tried.balance.start_epoch(1)
        assert {u: log[f"grad_cos_{u}"] for u in BRANCHES} == pytest.approx(cosines, abs=1e-3)
        tried.optimiser.step()


def test_pareto_is_the_shortest_vector_between_both_gradients():
    rng = np.random.default_rng(0)
    conflicts = 0
    for _, size in product(range(40), (0.1, 1.0, 20.0)):
        m, g = rng.normal(size=4), size * rng.normal(size=4)
        a, b = pareto(m @ m, g @ g, m @ g, 1.3)
        h = a * m + b * g
        assert h @ m >= -1e-9 and h @ g >= -1e-9
        assert np.linalg.norm(h) == pytest.approx(1.3 * np.linalg.norm(m + g))
        if m @ g < 0:
            conflicts += 1
            grid = np.linspace(0, 1, 20001)[:, None]
            between = grid * m + (1 - grid) * g
            shortest = between[np.linalg.norm(between, axis=1).argmin()]
            assert h / np.linalg.norm(h) == pytest.approx(shortest / np.linalg.norm(shortest), abs=5e-3)
    assert conflicts > 20
    assert pareto(1.0, 1.0, -1.0, 1.0) == (0.0, 0.0)
    assert pareto(2.0, 0.0, 0.0, 1.0) == (1.0, 1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("omega", ["gap", "equal"])
def test_aux_is_the_gradient_of_the_sum(omega, kind):
    tried = still(Loop(kind, {"rule": "aux", "beta": 0.7, "omega": omega}))
    tried.balance.average = {"path": 0.5, "omic": 1.3}
    tried.gradients(loop.patients())
    expected, _ = losses(tried)
    weight = {"path": 0.0, "omic": 0.8} if omega == "gap" else {"path": 1.0, "omic": 1.0}
    total = expected["main"] + 0.7 * sum(weight[u] * expected[u] for u in BRANCHES)
    for parameters in tried.module.branch_parameters().values():
        assert torch.allclose(loop.gradient(parameters), slopes(total, parameters), atol=1e-6)
    if issubclass(kind, Tokens):
        assert torch.allclose(loop.gradient([tried.module.shared]), slopes(total, [tried.module.shared]), atol=1e-6)
    # Of an exact split the fusion's own weights learn the fused loss only.
    fusion = list(tried.module.out.parameters())
    assert torch.allclose(loop.gradient(fusion), slopes(expected["main"], fusion), atol=1e-6)
    check_heads(tried, expected)


def test_aux_waits_for_a_first_window():
    tried = still(Loop(Tokens, {"rule": "aux"}))
    assert tried.balance.omega() == {"path": 0.0, "omic": 0.0}


@pytest.mark.parametrize("weak", BRANCHES)
def test_pmr_draws_the_weaker_branch_to_the_prototypes(weak):
    tried = still(Loop(Tokens, {"rule": "pmr_surv", "weight": 0.6}))
    balance, members = tried.balance, loop.patients()
    tried.gradients(members)
    assert not balance.prototypes
    balance.start_epoch(2)
    balance.average = {"path": 1.0, "omic": 1.0, weak: 2.0}
    labels = [2 * batch.bin + batch.event for batch, _ in members]
    features = torch.stack([tried.module.encode(batch).z[weak].mean(0) for batch, _ in members]).detach()
    classes = sorted(set(labels))
    centres = torch.stack([features[[label == j for label in labels]].mean(0) for j in classes])
    for j, centre in zip(classes, centres, strict=True):
        assert torch.allclose(balance.prototypes[j][weak].float(), centre, atol=1e-6)
    for i in (0, 5):
        output = balance.forward(members[i][0])
        p = torch.exp(-((features[i] - centres) ** 2).sum(1))
        expected = -0.6 * torch.log(p[classes.index(labels[i])] / p.sum())
        assert torch.allclose(output["extra_losses"]["pmr"], expected, atol=1e-6)
        tried.module.zero_grad()
        output["extra_losses"]["pmr"].backward()
        other = {"path": "omic", "omic": "path"}[weak]
        assert tried.module.branch_parameters()[weak][0].grad.abs().max() > 0
        assert all(p.grad is None for p in tried.module.branch_parameters()[other])


def test_pmr_counts_a_patient_once_and_needs_the_class():
    tried = still(Loop(CoxTokens, {"rule": "pmr_surv"}))
    tried.gradients(loop.patients())  # both passes of a Cox window
    assert sum(tried.balance._drawn.values()) == len(loop.patients())
    with pytest.raises(MorphomeError, match="P0: no time bin and status"):
        tried.balance.forward(replace(loop.patients()[0][0], bin=None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher", [*BRANCHES, "better"])
def test_rank_distillation_is_the_gradient_of_the_pairs(teacher, kind):
    tried = still(Loop(kind, {"rule": "rank_distill", "teacher": teacher, "weight": 0.4}))
    tried.balance.average = {"path": 1.1, "omic": 0.9}
    members = loop.patients()
    tried.gradients(members)
    expected, rows = losses(tried)
    tutor = "omic" if teacher == "better" else teacher
    student = {"path": "omic", "omic": "path"}[tutor]
    s, tau = (rows[u].reshape(-1) if tried.cox else hazard.risk(rows[u]) for u in (student, tutor))
    pairs = [
        (i, j)
        for i, (batch, t) in enumerate(members)
        for j, (_, later) in enumerate(members)
        if batch.event and t < later
    ]
    total = sum(((s[i] - s[j]) - (tau[i] - tau[j]).detach()) ** 2 for i, j in pairs) / len(pairs)
    branches = tried.module.branch_parameters()
    assert torch.allclose(
        loop.gradient(branches[student]), slopes(expected["main"] + 0.4 * total, branches[student]), atol=1e-6
    )
    assert slopes(total, branches[student]).abs().max() > 1e-4
    assert torch.allclose(loop.gradient(branches[tutor]), slopes(expected["main"], branches[tutor]), atol=1e-6)
    assert tried.balance.log()["rank_loss"] == pytest.approx(total.item(), rel=1e-5)
    check_heads(tried, expected)


def test_rank_loss_without_pairs_is_zero():
    nothing = rank_loss(torch.ones(3), torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3))
    assert nothing[0] == 0 and not nothing[1].any()
    one = rank_loss(torch.tensor([1.0, 0.0]), torch.zeros(2), torch.tensor([1.0, 2.0]), torch.ones(2))
    assert one[0] == 1.0 and one[1].tolist() == [2.0, -2.0]
