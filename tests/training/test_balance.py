"""Balance of the modalities: the plug-in interface, the rule "none", and what holds for every rule."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models import hazard
from morphome.models.fusion import BRANCHES
from morphome.training.balance import BranchHeads, balance_rules, make_balance, ratio

spec = importlib.util.spec_from_file_location("balance_loop", Path(__file__).with_name("balance_loop.py"))
loop = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loop)
Loop, Tokens, CoxTokens, Split, SplitHazard = loop.Loop, loop.Tokens, loop.CoxTokens, loop.Split, loop.SplitHazard

RULES = list(balance_rules())
INNER = {"path": 0.7, "omic": 0.6}
#: Settings with which a rule changes nothing.
NEUTRAL = {
    "none": {"rule": "none"},
    "ogm_cox alpha": {"rule": "ogm_cox", "alpha": 0.0},
    "ogm_cox alpha, grad": {"rule": "ogm_cox", "alpha": 0.0, "apply_to": "grad"},
    "ogm_cox alpha, ogm": {"rule": "ogm_cox", "alpha": 0.0, "form": "ogm", "rho": "loss_ratio"},
    "ogm_cox alpha, shapley": {"rule": "ogm_cox", "alpha": 0.0, "rho": "shapley"},
    "agm alpha": {"rule": "agm", "alpha": 0.0},
    "agm alpha, grad": {"rule": "agm", "alpha": 0.0, "apply_to": "grad"},
    "pdmp k = 1": {"rule": "pdmp", "ratio": 1.0},
    "pdmp k = 1, grad": {"rule": "pdmp", "ratio": 1.0, "apply_to": "grad"},
    "aux beta": {"rule": "aux", "beta": 0.0, "omega": "equal"},
    "pmr weight": {"rule": "pmr_surv", "weight": 0.0},
    "opm q": {"rule": "opm", "q_0": 0.0},
    "opm never": {"rule": "opm", "p_exe": 0.0},
    "rank weight": {"rule": "rank_distill", "weight": 0.0},
    "dgl later": {"rule": "dgl", "start_epoch": 3},
    "mmpareto over": {"rule": "mmpareto", "start_epoch": 0, "end_epoch": 0},
    "agm later": {"rule": "agm", "alpha": 9.0, "start_epoch": 3},
}


@pytest.mark.parametrize("kind", [Tokens, CoxTokens, Split, SplitHazard])
@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_none_is_the_loop_without_plug_ins(kind, optimiser, monkeypatch):
    monkeypatch.setattr(Tokens, "extra", 0.1)
    plain = Loop(kind, None, optimiser)
    plain.run(2)
    watched = Loop(kind, {"rule": "none"}, optimiser)
    before = {key: value.clone() for key, value in watched.heads.state_dict().items()}
    watched.run(2, inner_c=INNER)
    assert loop.equal(plain.weights(), watched.weights())
    assert not loop.equal(plain.weights(), loop.model(kind).state_dict())
    for key, value in watched.heads.state_dict().items():
        assert not torch.equal(value, before[key]) or (kind.head == "cox" and key.endswith("bias")), key


@pytest.mark.parametrize("accumulation", [1, 32])
@pytest.mark.parametrize("name", NEUTRAL)
def test_a_rule_without_strength_is_none_bit_for_bit(name, accumulation):
    tried = Loop(Tokens, NEUTRAL[name], accumulation=accumulation)
    tried.run(2, inner_c=INNER)
    assert loop.equal(loop.plain_weights(Tokens, accumulation=accumulation), tried.weights())


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_rule_without_strength_is_none_in_cox_windows(name):
    tried = Loop(CoxTokens, NEUTRAL[name])
    tried.run(1, inner_c=INNER)
    assert loop.equal(loop.plain_weights(CoxTokens, epochs=1), tried.weights())


@pytest.mark.parametrize("kind", [Tokens, Split])
@pytest.mark.parametrize("rule", [r for r in RULES if r != "none"])
def test_every_rule_changes_the_training(rule, kind):
    """And logs what it watches; every weight stays finite."""
    tried = Loop(kind, {"rule": rule})
    log = tried.run(2, inner_c=INNER)
    assert not loop.near(loop.plain_weights(kind), tried.weights(), atol=1e-6)
    assert all(bool(torch.isfinite(w).all()) for w in tried.weights().values())
    wanted = {"rho", *(f"{part}_{u}" for part in ("k", "loss", "grad_norm") for u in BRANCHES)}
    assert wanted <= log.keys() and all(math.isfinite(value) for value in log.values())
    assert all(log[f"grad_norm_{u}"] > 0 for u in BRANCHES)


@pytest.mark.parametrize("accumulation", [1, 32])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_runs_with_accumulation(rule, accumulation):
    tried = Loop(Tokens, {"rule": rule}, accumulation=accumulation)
    log = tried.run(1, inner_c=INNER)
    assert tried.balance.step == math.ceil(len(loop.patients()) / accumulation)
    assert all(math.isfinite(value) for value in log.values())
    assert all(bool(torch.isfinite(w).all()) for w in tried.weights().values())


SHAPLEY = {"rule": "ogm_cox", "rho": "shapley", "ge_noise": "std"}
CINDEX = {"rule": "ogm_cox", "rho": "cindex", "apply_to": "grad"}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((Tokens, settings) for settings in (*({"rule": r} for r in RULES), SHAPLEY, CINDEX)),
        *((CoxTokens, {"rule": r}) for r in ("ogm_cox", "opm", "pmr_surv", "rank_distill")),
    ],
    ids=str,
)
def test_a_resumed_run_continues_bit_for_bit(kind, settings):
    whole, first, second = (Loop(kind, settings) for _ in range(3))
    expected = whole.run(2, inner_c=INNER)
    first.run(1, inner_c=INNER)
    state = first.state()
    assert all(isinstance(value, (torch.Tensor, float, int)) for value in state[-1].values())
    second.load(state)
    assert second.balance.log() == first.balance.log()
    assert second.run(1, first=2, inner_c=INNER) == expected
    assert loop.equal(whole.weights(), second.weights())
    assert second.balance.state_dict().keys() == whole.balance.state_dict().keys()


def test_heads_start_from_a_generator_of_their_own():
    module = loop.model(Tokens)
    before = torch.get_rng_state()
    heads = BranchHeads(module, loop.K, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert loop.equal(heads.state_dict(), BranchHeads(module, loop.K, seed=4).state_dict())
    assert not loop.equal(heads.state_dict(), BranchHeads(module, loop.K, seed=5).state_dict())
    assert [tuple(p.shape) for p in heads.parameters()] == [(3, 4), (3,), (3, 3), (3,)]
    assert not {id(p) for p in heads.parameters()} & {id(p) for p in module.parameters()}
    z = {"path": torch.randn(5, 4), "omic": torch.randn(2, 3)}
    assert torch.allclose(heads(z, detach=False)["path"], heads.linear["path"](z["path"]).mean(0, keepdim=True))


@pytest.mark.parametrize("kind", [Split, SplitHazard])
def test_an_exact_split_needs_no_weights_and_adds_up(kind):
    module = loop.model(kind)
    heads = BranchHeads(module, module.out.out_features)
    assert not list(heads.parameters())
    encoded = module.encode(loop.patients()[0][0])
    parts = heads(encoded.z, detach=False)
    assert torch.allclose(parts["path"] + parts["omic"] + module.out.bias, module.fuse(encoded.z), atol=1e-6)
    assert not any(score.requires_grad for score in heads(encoded.z, detach=True).values())


def test_unknown_rules_and_foreign_settings_are_refused():
    module = loop.model(Tokens)
    heads = BranchHeads(module, loop.K)
    assert type(make_balance(module, heads, {}, 0)) is balance_rules()["none"]
    for settings, words in [
        ({"rule": "ogm"}, "no rule 'ogm'.*mmpareto"),
        ({"rule": "dgl", "alpha": 1.0}, "alpha means nothing for the rule 'dgl'.*settings of 'dgl': start_epoch"),
        ({"rule": "none", "start_epoch": 2}, "start_epoch means nothing for the rule 'none'"),
        ({"rule": "agm", "form": "ogm", "gamma": 1.0}, "form, gamma means nothing"),
        ({"rule": "agm", "start_epoch": 5, "end_epoch": 4}, "end_epoch 4 lies before start_epoch 5"),
    ]:
        with pytest.raises(MorphomeError, match=f"(?s){words}"):
            make_balance(module, heads, settings, 0)


def test_losses_and_norms_of_the_log_are_those_of_the_windows():
    watched = Loop(Tokens, {"rule": "none"}, accumulation=32)
    watched.balance.start_epoch(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values = [watched.gradients(loop.patients()) for _ in range(2)]
    log = watched.balance.log()
    parameters = watched.module.branch_parameters()
    second = {u: float(loop.gradient(parameters[u]).norm()) for u in BRANCHES}
    for u in BRANCHES:
        assert log[f"loss_{u}"] == pytest.approx(sum(v[u] for v in values) / 2)
        assert log[f"k_{u}"] == 1.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        watched.gradients(loop.patients(), finish=False)
    first = {u: float(loop.gradient(parameters[u]).norm()) for u in BRANCHES}
    for u in BRANCHES:
        assert log[f"grad_norm_{u}"] == pytest.approx((first[u] + second[u]) / 2, rel=1e-5)


def test_windows_without_a_loss_leave_the_averages():
    balance = Loop(CoxTokens, {"rule": "none"}).balance
    balance.end_window({"path": 2.0, "omic": 3.0})
    balance.end_window({"path": math.nan, "omic": math.nan})
    balance.end_window({"path": 1.0, "omic": 3.0})
    assert balance.average == pytest.approx({"path": 1.9, "omic": 3.0})
    assert balance.log()["loss_path"] == 1.5 and balance.step == 3


def test_the_ratio_of_both_branches_multiplies_to_one():
    for losses in ({"path": 0.4, "omic": 1.7}, {"path": 2.0, "omic": 0.1}, {"path": 0.0, "omic": 900.0}):
        rho = ratio(losses)
        assert rho["path"] * rho["omic"] == pytest.approx(1.0, rel=1e-12)
    assert ratio({"path": 1.0, "omic": 1.5})["path"] == pytest.approx(math.exp(0.5))


def test_the_cox_gradient_is_the_martingale_residual():
    """dL/dh_k = -m_k / N_e with sum_k m_k = 0, so that it depends on both branches through their sum only."""
    time = torch.tensor([5.0, 2.0, 2.0, 7.0, 1.0, 3.0, 9.0], dtype=torch.float64)
    event = torch.tensor([1, 1, 1, 0, 0, 1, 1])
    s = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    h = s.sum(0)
    gradient = torch.autograd.grad(hazard.cox_loss(h, time, event, "breslow"), s)[0]
    at_risk = [h[time >= t].exp().sum() for t in time]
    cumulative = torch.stack(
        [sum((1 / at_risk[i] for i in range(7) if event[i] and time[i] <= t), torch.zeros(())) for t in time]
    )
    m = event - h.exp() * cumulative
    assert abs(m.sum().item()) < 1e-9
    for branch in gradient:
        assert torch.allclose(branch, -m.detach() / event.sum(), atol=1e-9)
    shifted = torch.autograd.grad(hazard.cox_loss(s.sum(0) + 3, time, event, "breslow"), s)[0]
    assert torch.allclose(shifted, gradient, atol=1e-9)
