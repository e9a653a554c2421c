"""MOTCat and its transport plan: sizes, referee values, formulas, invariance."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from morphome.errors import MorphomeError
from morphome.models import hazard
from morphome.models.batch import Batch
from morphome.models.hazard import nll_loss
from morphome.models.motcat import MOTCat, mean_survival
from morphome.models.transport import transport_cost, transport_plan

GROUPS = {"a": 5, "b": 3, "c": 9}
#: Columns of the six gene families in the MCAT table of TCGA-BLCA.
BLCA = dict(zip("abcdef", (94, 334, 521, 468, 1496, 479), strict=True))
SMALL = {"dim": 16, "heads": 2, "feedforward": 24, "attention_dim": 8}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(seed: int = 0, **settings) -> MOTCat:
    torch.manual_seed(seed)
    return MOTCat(12, GROUPS, 4, **(SMALL | settings))


def patient(n: int = 20, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        path=torch.randn(n, 12, generator=generator),
        groups=tuple(torch.randn(size, generator=generator) for size in GROUPS.values()),
        patient_id=f"P{seed}",
    )


def test_parameter_count_of_the_published_size():
    with torch.device("meta"):
        model = MOTCat(1024, BLCA, 4)
    assert sum(p.numel() for p in model.parameters()) == 4_228_870


@pytest.mark.parametrize(("regulariser", "same", "other"), [("entropy", 0.51123, 0.18807), ("kl", 0.32205, 0.11848)])
def test_plan_of_two_points(regulariser, same, other):
    half = torch.full((2,), 0.5)
    plan = transport_plan(1 - torch.eye(2), half, half, 1.0, 1.0, regulariser)
    expected = torch.tensor([[same, other], [other, same]], dtype=torch.float64)
    torch.testing.assert_close(plan, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("regulariser", ["entropy", "kl"])
def test_plan_minimises_its_objective(regulariser):
    """Against a general optimiser on <P, C> + epsilon R(P) + tau (KL of both marginals)."""
    rng = np.random.default_rng(0)
    cost, epsilon, tau = rng.random((4, 3)), 0.2, 0.5
    a, b = np.full(4, 1 / 4), np.full(3, 1 / 3)

    def kl(p, q):
        return float((p * np.log(p / q) - p + q).sum())

    def objective(log_plan):
        p = np.exp(log_plan).reshape(4, 3)
        reference = np.outer(a, b) if regulariser == "kl" else np.ones((4, 3))
        return (p * cost).sum() + epsilon * kl(p, reference) + tau * (kl(p.sum(1), a) + kl(p.sum(0), b))

    plan = transport_plan(*(torch.from_numpy(x) for x in (cost, a, b)), epsilon, tau, regulariser).numpy()
    best = minimize(objective, np.log(np.full(12, 1 / 12)), method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9})
    np.testing.assert_allclose(plan.ravel(), np.exp(best.x), atol=1e-5)


def test_plan_is_the_loop_written_out():
    torch.manual_seed(3)
    cost = torch.rand(7, 3, dtype=torch.float64)
    a, b = [1 / 7] * 7, [1 / 3] * 3
    u, v, kappa = [1.0] * 7, [1.0] * 3, 0.5 / 0.6
    kernel = np.exp(-cost.numpy() / 0.1)
    for _ in range(1000):
        u = [(a[n] / sum(kernel[n, g] * v[g] for g in range(3))) ** kappa for n in range(7)]
        v = [(b[g] / sum(kernel[n, g] * u[n] for n in range(7))) ** kappa for g in range(3)]
    plan = transport_plan(cost, torch.tensor(a), torch.tensor(b), 0.1, 0.5)
    np.testing.assert_allclose(plan.numpy(), np.array(u)[:, None] * kernel * np.array(v), rtol=1e-4)


def test_cost():
    h, g = torch.randn(9, 5), torch.randn(4, 5)
    shifted_h, shifted_g = h - h.min(1, keepdim=True).values, g - g.min(1, keepdim=True).values
    expected = (shifted_h[:, None] - shifted_g).square().sum(-1)
    cost = transport_cost(h.requires_grad_(), g)
    torch.testing.assert_close(cost, (expected / expected.max()).double(), atol=1e-6, rtol=1e-5)
    assert cost.dtype == torch.float64 and not cost.requires_grad and cost.max() == 1
    assert torch.equal(transport_cost(torch.ones(2, 5), torch.ones(3, 5)), torch.zeros(2, 3, dtype=torch.float64))


def test_wrong_transport_is_refused():
    half = torch.full((2,), 0.5)
    with pytest.raises(MorphomeError, match="not finite"):
        transport_plan(1 + torch.eye(2), half, half, 1e-4, 1.0)
    with pytest.raises(MorphomeError, match="ot_reg_type"):
        transport_plan(torch.eye(2), half, half, 1.0, 1.0, "l2")


@pytest.mark.parametrize("renormalise", [False, True])
def test_groups_read_the_patches_by_the_plan(renormalise):
    model = make(renormalise=renormalise).eval()
    seen = []
    model.path_pool.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
    with torch.no_grad():
        out = model(patient(40))
        h, g = model.embed(patient(40))
    plan = out["attn"]["coattention"]
    assert plan.shape == (3, 40) and bool((plan >= 0).all())
    expected = torch.stack([sum(plan[t, n] * h[n] for n in range(40)) for t in range(3)])
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-4)
    # mass about 1/T per group as published; 1 when renormalised
    wanted = 1.0 if renormalise else 1 / 3
    torch.testing.assert_close(plan.sum(1), torch.full((3,), wanted), atol=1e-6 if renormalise else 0.15, rtol=0)
    assert not model.plan(h.requires_grad_(), g).requires_grad


@pytest.mark.parametrize("n", [1, 2, 3, 300])
@pytest.mark.parametrize(
    "settings", [{}, {"ot_reg_type": "kl", "epsilon": 0.05}, {"bag": "micro", "micro_size": 16}, {"fusion": "bilinear"}]
)
def test_any_bag(n, settings):
    out = make(**settings)(patient(n))
    assert out["logits"].shape == (1, 4) and bool(torch.isfinite(out["logits"]).all())
    assert out["attn"]["coattention"].shape == (3, n)
    for name in ("gated_path", "gated_genes"):
        assert out["attn"][name].sum().item() == pytest.approx(1, abs=1e-5)
    assert not any(x.requires_grad for x in out["attn"].values())


@pytest.mark.parametrize("bag", ["whole", "micro"])
def test_patch_order(bag):
    model = make(bag=bag, micro_size=16).eval()
    assert model.order_sensitive == (bag == "micro")
    patches = patient(60)
    order = torch.randperm(60)
    with torch.no_grad():
        difference = model(patches)["logits"] - model(replace(patches, path=patches.path[order]))["logits"]
    assert (difference.abs().max().item() > 1e-6) == model.order_sensitive


def test_micro_batches_average_the_risk_of_their_parts():
    model, whole = make(bag="micro", micro_size=16).eval(), make().eval()
    batch = patient(40)
    parts = model.parts(40, batch.path.device)
    assert [len(p) for p in parts] == [14, 13, 13]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(40))
    with torch.no_grad():
        out = model(batch)
        each = [whole(replace(batch, path=batch.path[p])) for p in parts]
    risk = torch.cat([hazard.risk(row["logits"]) for row in each]).mean()
    assert hazard.risk(out["logits"]).item() == pytest.approx(risk.item(), abs=1e-6)
    for p, row in zip(parts, each, strict=True):
        torch.testing.assert_close(out["attn"]["coattention"][:, p], row["attn"]["coattention"] / 3)
    model.train()
    assert not torch.equal(torch.cat(model.parts(40, batch.path.device)), torch.cat(parts))


def test_every_part_hands_its_own_rows_to_the_fusion():
    model = make(bag="micro", micro_size=16).eval()
    with torch.no_grad():
        z = model.encode(patient(40)).z
        assert z["path"].shape == z["omic"].shape == (3, 16)
        each = [model.fuse({u: rows[i : i + 1] for u, rows in z.items()}) for i in range(3)]
        torch.testing.assert_close(model.fuse(z), mean_survival(torch.cat(each)))
        # one row stands beside every row of the other
        one = {"path": z["path"], "omic": z["omic"][:1]}
        torch.testing.assert_close(model.fuse(one), model.fuse(one | {"omic": z["omic"][:1].expand(3, -1)}))


def test_mean_survival():
    logits = torch.randn(5, 4) * 2
    mean = mean_survival(logits)
    torch.testing.assert_close(hazard.survival(mean)[0], hazard.survival(logits).mean(0))
    assert torch.equal(mean_survival(logits[:1]), logits[:1])
    for y in range(4):
        for event in (0, 1):
            args = torch.tensor([y]), torch.tensor([event])
            each = [nll_loss(row[None], *args) for row in logits]
            assert nll_loss(mean, *args) <= sum(each) / 5
    extreme = mean_survival(torch.tensor([[60.0, -60.0], [-60.0, 60.0]]))
    assert bool(torch.isfinite(extreme).all())


@pytest.mark.parametrize("bag", ["whole", "micro"])
def test_every_parameter_learns(bag):
    model = make(bag=bag, micro_size=8)
    for seed in range(8):
        nll_loss(model(patient(seed=seed))["logits"], torch.tensor([seed % 4]), torch.tensor([seed % 2])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and bool((p.grad != 0).any()), name


@pytest.mark.parametrize("bag", ["whole", "micro"])
def test_evaluation_is_repeatable_blind_to_labels_and_survives_saving(bag):
    model, other = make(bag=bag, micro_size=8).eval(), make(seed=9, bag=bag, micro_size=8).eval()
    batch = patient(33)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    with torch.no_grad():
        first = model(batch)["logits"]
        assert torch.equal(first, model(replace(batch, bin=3, event=1))["logits"])
        assert not torch.equal(first, other(batch)["logits"])
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(first, other(batch)["logits"])


@pytest.mark.parametrize("settings", [{"heads": 3}, {"bag": "all"}, {"ot_reg_type": "l2"}, {"fusion": "sum"}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(MorphomeError, match=r"models\.motcat"):
        make(**settings)
