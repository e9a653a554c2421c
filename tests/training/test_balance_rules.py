"""Rules on the pace of a branch: factors against their formulas, learning rate against gradient, dropped branches."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from morphome.models.fusion import BRANCHES
from morphome.training.balance import BranchHeads, make_balance

spec = importlib.util.spec_from_file_location("balance_loop", Path(__file__).with_name("balance_loop.py"))
loop = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loop)
Loop, Tokens, CoxTokens, Split = loop.Loop, loop.Tokens, loop.CoxTokens, loop.Split


def rule(**settings):
    """A rule in its first epoch, with a small model."""
    module = loop.model(Tokens)
    balance = make_balance(module, BranchHeads(module, loop.K), settings, seed=3)
    balance.start_epoch(1)
    return balance


def window(balance, path, omic):
    """The factors of a window with these losses."""
    balance.end_window({"path": path, "omic": omic})
    return balance.k["path"], balance.k["omic"]


def test_the_branch_that_is_ahead_slows_down():
    balance = rule(rule="ogm_cox", alpha=0.8)
    k = window(balance, 1.0, 1.5)
    assert k == pytest.approx((1 - math.tanh(0.8 * (math.exp(0.5) - 1)), 1.0))
    assert balance.multipliers() == dict(zip(BRANCHES, k, strict=True))
    # The next window counts a tenth.
    k = window(balance, 3.0, 1.5)
    assert balance.average == pytest.approx({"path": 1.2, "omic": 1.5})
    assert k == pytest.approx((1 - math.tanh(0.8 * (math.exp(0.3) - 1)), 1.0))
    assert balance.rho()["path"] * balance.rho()["omic"] == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("form", ["continuous", "ogm"])
@pytest.mark.parametrize("rho", ["log_ratio", "loss_ratio", "cindex", "shapley"])
def test_equal_branches_keep_their_pace(rho, form):
    balance = rule(rule="ogm_cox", rho=rho, form=form, alpha=5.0)
    assert window(balance, 1.3, 1.3) == (1.0, 1.0)


def test_forms_and_ratios_of_ogm():
    assert window(rule(rule="ogm_cox", form="ogm"), 1.5, 1.0) == pytest.approx((1.0, 1 - math.tanh(math.exp(0.5))))
    assert window(rule(rule="ogm_cox", rho="loss_ratio"), 1.0, 1.5) == pytest.approx((1 - math.tanh(0.5), 1.0))
    balance = rule(rule="ogm_cox", rho="cindex")
    assert window(balance, 1.0, 1.5) == (1.0, 1.0)
    balance.end_epoch({"path": 0.6, "omic": 0.65})
    assert window(balance, 1.0, 1.5) == pytest.approx((1.0, 1 - math.tanh(0.5)))
    balance.end_epoch({"path": math.nan, "omic": 0.9})
    assert window(balance, 1.0, 1.5) == pytest.approx((1.0, 1 - math.tanh(0.5)))
    # A branch without skill does not divide by zero.
    balance.end_epoch({"path": 0.6, "omic": 0.4})
    assert window(balance, 1.0, 1.5) == pytest.approx((1 - math.tanh(9.0), 1.0))


def test_a_window_without_loss_keeps_the_factors():
    balance = rule(rule="ogm_cox")
    assert window(balance, math.nan, math.nan) == (1.0, 1.0)
    k = window(balance, 1.0, 1.5)
    assert window(balance, math.nan, math.nan) == k != (1.0, 1.0)


def test_a_rule_acts_in_its_epochs_only():
    balance = rule(rule="ogm_cox", start_epoch=2, end_epoch=3)
    acted = []
    for epoch in range(1, 5):
        balance.start_epoch(epoch)
        acted.append(window(balance, 1.0, 2.0) != (1.0, 1.0))
        assert (balance.multipliers()["path"] < 1) == acted[-1]
    assert acted == [False, True, True, False]


def test_agm_compares_with_the_history():
    balance = rule(rule="agm", alpha=0.5)
    assert window(balance, 1.0, 1.4) == (1.0, 1.0)
    # Means over both windows: 0.8 and 1.4.
    k = window(balance, 0.6, 1.4)
    assert k == pytest.approx(
        (math.exp(0.5 * (math.exp(0.6) - math.exp(0.8))), math.exp(0.5 * (math.exp(-0.6) - math.exp(-0.8))))
    )
    assert k[0] < 1 < k[1]
    assert window(balance, math.nan, 1.0) == (1.0, 1.0)
    opposite = rule(rule="agm", alpha=0.5, sign="opposite")
    window(opposite, 1.0, 1.4)
    assert window(opposite, 0.6, 1.4) == pytest.approx(k[::-1])


def test_agm_is_capped_above():
    balance = rule(rule="agm", alpha=0.1)
    for _ in range(9):
        window(balance, 0.0, 5.0)
    assert window(balance, 5.0, 0.0)[0] == pytest.approx(math.exp(0.1 * 7))


def test_pdmp_speeds_up_the_better_branch():
    balance = rule(rule="pdmp", ratio=3.0)
    assert window(balance, 1.0, 2.0) == (1.0, 1.0)
    for c, expected in [((0.6, 0.7), (1.0, 3.0)), ((math.nan, 0.7), (1.0, 3.0)), ((0.8, 0.7), (3.0, 1.0))]:
        balance.end_epoch(dict(zip(BRANCHES, c, strict=True)))
        assert window(balance, 1.0, 2.0) == expected
    balance.end_epoch({"path": 0.7, "omic": 0.7})
    assert window(balance, 1.0, 2.0) == (1.0, 1.0)


def constant(apply_to, optimiser, kind=Tokens):
    """Weights after training with the constant factor 3 on the slides' branch."""
    tried = Loop(kind, {"rule": "pdmp", "ratio": 3.0, "apply_to": apply_to}, optimiser)
    tried.balance.end_epoch({"path": 0.8, "omic": 0.6})
    tried.run(2)
    return tried.weights()


@pytest.mark.parametrize("kind", [Tokens, CoxTokens])
def test_adam_cancels_a_constant_factor_on_the_gradient(kind):
    plain, cancelled, changed = (
        dict(weights)
        for weights in (
            loop.plain_weights(kind, "plain_adam"),
            *(constant(apply_to, "plain_adam", kind) for apply_to in ("grad", "lr")),
        )
    )
    if kind.head == "cox":
        for weights in (plain, cancelled, changed):
            # Cox is blind to it: its gradient is 0 but for rounding, which Adam blows up.
            del weights["out.bias"]
    assert loop.near(cancelled, plain, atol=2e-5)
    assert not loop.near(changed, plain, atol=5e-3)


@pytest.mark.parametrize("kind", [Tokens, CoxTokens])
def test_with_plain_sgd_both_agree(kind):
    by_gradient, by_rate = (constant(apply_to, "sgd", kind) for apply_to in ("grad", "lr"))
    assert loop.near(by_gradient, by_rate, atol=1e-6)
    assert not loop.near(by_gradient, loop.plain_weights(kind, "sgd"), atol=1e-3)


def test_factors_on_the_gradient_spare_all_else():
    reference, tried = (Loop(Tokens, s) for s in (None, {"rule": "ogm_cox", "apply_to": "grad", "alpha": 3.0}))
    for each in (reference, tried):
        if each.balance:
            each.balance.start_epoch(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            each.gradients(loop.patients())
    k = tried.balance.k
    assert min(k.values()) < 1 == max(k.values())
    before = dict(reference.module.named_parameters())
    for name, p in tried.module.named_parameters():
        assert torch.equal(p.grad, before[name].grad * k.get(name.split(".")[0], 1.0)), name


def test_noise_has_the_spread_of_the_gradient_and_its_own_generator():
    balance = rule(rule="ogm_cox", ge_noise="std", alpha=2.0, apply_to="grad")
    shape = balance.module.path.weight.shape
    draws = []
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    k = 1 - math.tanh(2 * (math.exp(0.25) - 1))
    for _ in range(300):
        balance.module.path.weight.grad = g.clone()
        balance.module.omic.weight.grad = None
        window(balance, 1.0, 1.25)
        draws.append(balance.module.path.weight.grad - k * g)
    assert torch.equal(torch.get_rng_state(), before)
    noise = torch.stack(draws)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.06)
    assert noise.std().item() == pytest.approx(g.std().item(), rel=0.05)
    assert balance.module.omic.weight.grad is None


def test_attributions_add_up_to_the_fused_score():
    balance = rule(rule="ogm_cox", rho="shapley")
    module = balance.module
    for batch, _ in loop.patients()[:3]:
        module.train()
        before = torch.get_rng_state()
        encoded = module.encode(batch)
        after_encode = torch.get_rng_state()
        balance.watch(encoded)
        assert torch.equal(torch.get_rng_state(), after_encode)
        torch.set_rng_state(before)
        balance.forward(batch)
    balance.end_window({"path": 1.0, "omic": 1.0})
    module.eval()
    encoded = module.encode(loop.patients()[5][0])
    parts = balance.watch(encoded)
    mean = balance._mean
    none = module.fuse(encoded.z | {u: mean[u].expand_as(encoded.z[u]) for u in BRANCHES})
    assert torch.allclose(parts["path"] + parts["omic"] - none, module.fuse(encoded.z), atol=1e-6)
    # At the mean embedding a branch says nothing.
    at_mean = encoded.z | {"omic": mean["omic"].expand_as(encoded.z["omic"])}
    assert torch.allclose(balance._attribution(at_mean)["omic"], none, atol=1e-6)


def test_opm_drops_the_leading_branch_only():
    balance = rule(rule="opm", p_exe=1.0, q_0=0.6, **{"lambda": 0.5})
    seen = []
    balance.module.dropout.p = 0.0
    balance.module.fuse = lambda z: seen.append(z) or torch.zeros(1, loop.K)
    batch = loop.patients()[0][0]
    z = balance.module.encode(batch).z
    balance.forward(batch)
    assert all(torch.equal(seen[-1][u], z[u]) for u in z)  # nothing is known yet
    window(balance, 1.0, 1.4)
    q = 0.6 * (1 + 0.5 * math.tanh(math.exp(0.4) - 1))
    assert balance.drop_rates() == {"path": pytest.approx(q), "omic": 0.0}
    kept = 1 - q * 4 / 7
    dropped = 0
    for i in range(400):
        balance.forward(replace(batch, patient_id=f"P{i}"))
        assert torch.allclose(seen[-1]["omic"], z["omic"] / kept)
        assert torch.equal(seen[-1]["register"], z["register"])
        if not seen[-1]["path"].any():
            dropped += 1
        else:
            assert torch.allclose(seen[-1]["path"], z["path"] / kept)
    assert dropped / 400 == pytest.approx(q, abs=0.06)


def test_opm_acts_in_a_share_of_the_windows_and_draws_alike_in_both_passes():
    balance = rule(rule="opm", p_exe=0.4)
    window(balance, 1.0, 1.4)
    acted = []
    for _ in range(300):
        acted.append(balance.drop_rates()["path"] > 0)
        assert balance.drop_rates() == balance.drop_rates()
        window(balance, 1.0, 1.4)
    assert sum(acted) / 300 == pytest.approx(0.4, abs=0.07)
    batch, before = loop.patients()[0][0], torch.get_rng_state()
    with torch.no_grad():
        first = balance.forward(batch)["logits"]
    torch.set_rng_state(before)
    assert torch.equal(balance.forward(batch)["logits"], first)
