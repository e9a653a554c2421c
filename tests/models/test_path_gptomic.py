"""Path-GPTOmic: size, formulas, the exact split of the log risk, parts that are absent."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.hazard import cox_loss
from morphome.models.path_gptomic import RNA_DIRECT, RNA_HIDDEN, PathGPTOmic

D_IN, RNA, CNV, MUT = 10, 12, 7, 5
SMALL = {"dim": 16, "attention_dim": 8, "path_dim": 16, "snn_dim": 8, "mlp_dim": 16, "gene_dim": 12}
POOLS = ["attention", "mean"]


def make(seed: int = 0, n_rna: int = RNA, n_cnv: int = CNV, n_mut: int = MUT, **changes) -> PathGPTOmic:
    torch.manual_seed(seed)
    missing = changes.pop("missing_tokens", False)
    return PathGPTOmic(D_IN, n_rna, n_cnv, n_mut, missing, **{**SMALL, **changes})


def patient(n: int = 6, seed: int = 1, n_rna: int = RNA, **parts) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    path, rna, cnv, mut = (torch.randn(s, generator=rng) for s in ((n, D_IN), (n_rna,), (CNV,), (MUT,)))
    return Batch(**{"path": path, "rna": rna, "cnv": cnv, "mut": mut, "patient_id": "P0", **parts})


def log_risk(model: PathGPTOmic, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch)["log_risk"]


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def linear(a: int, b: int) -> int:
    return a * b + b


def test_parameter_counts():
    with torch.device("meta"):
        full = PathGPTOmic(1024, 128, 477, 174)
        rna_only = PathGPTOmic(1024, 128)
        raw = PathGPTOmic(1024, 5000)
        mean = PathGPTOmic(1024, 128, pool="mean")
    path = linear(1024, 512) + 2 * linear(512, 256) + linear(256, 1) + linear(512, 128)
    mlp = linear(3 * 128, 256) + linear(256, 128)
    assert count(full) == path + linear(477, 128) + linear(174, 128) + mlp + 256 == 1_068_673
    assert count(rna_only) == path + linear(128, 256) + linear(256, 128) + 256
    assert count(raw) - count(rna_only) == linear(5000, RNA_HIDDEN) + (RNA_HIDDEN - 128) * 256
    assert count(mean) == count(rna_only) - path + linear(1024, 128)


@pytest.mark.parametrize("pool", POOLS)
def test_evaluation_is_the_formula(pool):
    model, batch = make(pool=pool).eval(), patient(7)
    with torch.no_grad():
        out = model(batch)
        if pool == "mean":
            pooled = sum(batch.path) / 7
        else:
            h = F.relu(batch.path @ model.project.linear.weight.T + model.project.linear.bias)
            scores = [
                model.pool.score(torch.tanh(model.pool.tanh(x)) * torch.sigmoid(model.pool.gate(x))).exp() for x in h
            ]
            weights = torch.cat(scores) / sum(scores)
            pooled = sum(w * x for w, x in zip(weights, h, strict=True))
            torch.testing.assert_close(out["attn"]["gated"], weights)
        f_path = F.relu(model.hidden.linear(pooled))
        snn = [F.elu(model.panels[part].linear(getattr(batch, part))) for part in ("cnv", "mut")]
        f_genes = torch.cat([*snn, batch.rna])
        for layer in model.mlp:
            f_genes = F.relu(layer.linear(f_genes))
        expected = float(model.classifier.weight[0] @ torch.cat([f_path, f_genes]))
    assert model.classifier.bias is None
    assert out["log_risk"].shape == (1, 1)
    assert out["log_risk"].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pool", POOLS)
def test_the_log_risk_is_the_sum_of_the_branches(pool):
    model = make(pool=pool).eval()
    with torch.no_grad():
        one, other = model.encode(patient(seed=1)), model.encode(patient(seed=2))
        scores = model.branch_scores(one.z)
        assert {u: tuple(s.shape) for u, s in scores.items()} == {"path": (1, 1), "omic": (1, 1)}
        assert torch.equal(scores["path"] + scores["omic"], model.fuse(one.z))
        # A branch's score depends on nothing of the other.
        mixed = model.branch_scores({"path": one.z["path"], "omic": other.z["omic"]})
    assert torch.equal(mixed["path"], scores["path"])
    assert not torch.equal(mixed["omic"], scores["omic"])
    assert {u: v.shape[-1] for u, v in one.z.items()} == model.branch_widths == {"path": 16, "omic": 12}


def test_tokens_of_a_branch_are_averaged():
    model, z = make().eval(), {"path": torch.randn(3, 16), "omic": torch.randn(5, 12)}
    with torch.no_grad():
        means = {u: v.mean(0, keepdim=True) for u, v in z.items()}
        torch.testing.assert_close(model.fuse(z), model.fuse(means))


def test_gradient_of_the_cox_loss_is_the_martingale_residual_per_branch():
    """dL/dtheta_u = -(1/N_e) sum_k m_k ds_k^u/dtheta_u with m from Breslow's formula, sum m = 0."""
    model = make(dropout=0.0).double()
    time, event = torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0]), torch.tensor([1, 1, 0, 1, 0])
    whole = [patient(5, seed) for seed in range(5)]
    batches = [Batch(path=b.path.double(), rna=b.rna.double(), cnv=b.cnv.double(), mut=b.mut.double()) for b in whole]
    risks = torch.cat([model(b)["log_risk"] for b in batches])
    weight = model.panels["cnv"].linear.weight
    (found,) = torch.autograd.grad(cox_loss(risks, time, event, "breslow"), weight, retain_graph=True)
    e = risks.detach().exp().flatten()
    jump = {i: 1 / e[time >= time[i]].sum() for i in range(5) if event[i]}
    m = torch.stack([event[k] - e[k] * sum(j for i, j in jump.items() if time[i] <= time[k]) for k in range(5)])
    assert m.sum().abs().item() < 1e-12
    scores = torch.cat([model.branch_scores(model.encode(b).z)["omic"] for b in batches]).flatten()
    (expected,) = torch.autograd.grad(-(m * scores).sum() / 3, weight)
    torch.testing.assert_close(found, expected)
    assert bool(found.any())


@pytest.mark.parametrize(("n_cnv", "n_mut"), [(0, MUT), (CNV, 0), (0, 0)])
def test_a_panel_without_columns_is_not_built(n_cnv, n_mut):
    model = make(n_cnv=n_cnv, n_mut=n_mut)
    wanted = [name for name, n in (("cnv", n_cnv), ("mut", n_mut)) if n]
    assert list(model.panels) == wanted
    absent = {name: None for name in ("cnv", "mut") if name not in wanted}
    assert torch.equal(log_risk(model, patient()), log_risk(model, patient(**absent)))
    assert model.mlp[0].linear.in_features == RNA + 8 * len(wanted)


@pytest.mark.parametrize(
    ("n_rna", "hidden", "width"),
    [(64, 0, 0), (RNA_DIRECT, 0, 0), (RNA_DIRECT + 1, 0, RNA_HIDDEN), (3000, 20, 20), (64, 20, 20)],
)
def test_wide_rna_goes_through_an_snn(n_rna, hidden, width):
    model = make(n_rna=n_rna, rna_hidden=hidden)
    assert (0 if model.rna is None else model.rna.linear.out_features) == width
    assert model.mlp[0].linear.in_features == (width or n_rna) + 16
    assert log_risk(model, patient(n_rna=n_rna)).shape == (1, 1)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_any_bag_in_any_order(pool, n):
    model, bag = make(pool=pool), patient(n)
    found = log_risk(model, bag)
    assert found.shape == (1, 1)
    assert bool(torch.isfinite(found).all())
    assert torch.equal(found, log_risk(model, bag))
    torch.testing.assert_close(found, log_risk(model, patient(n, path=bag.path[torch.randperm(n)])), atol=1e-6, rtol=0)


@pytest.mark.parametrize("pool", POOLS)
def test_every_parameter_gets_a_gradient_in_a_window_of_patients(pool):
    model = make(pool=pool, rna_hidden=9)
    risks = torch.cat([model(patient(5, seed))["log_risk"] for seed in range(12)])
    time, event = torch.arange(1.0, 13.0), torch.tensor([1, 0] * 6)
    cox_loss(risks, time, event).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert bool((p.grad != 0).any()), name


def test_branches_own_their_parameters():
    model = make(rna_hidden=9, missing_tokens=True)
    branches = model.branch_parameters()
    ids = {u: {id(p) for p in ps} for u, ps in branches.items()}
    assert not ids["path"] & ids["omic"]
    rest = {name for name, p in model.named_parameters() if id(p) not in ids["path"] | ids["omic"]}
    assert rest == {"classifier.weight"}
    scores = model.branch_scores(model.encode(patient()).z)
    grads = torch.autograd.grad(scores["omic"].sum(), branches["path"], retain_graph=True, allow_unused=True)
    assert all(g is None for g in grads)
    grads = torch.autograd.grad(scores["path"].sum(), branches["omic"], allow_unused=True)
    assert all(g is None for g in grads)


@pytest.mark.parametrize("pool", POOLS)
def test_saved_whole_and_blind_to_labels(pool):
    model, other = make(pool=pool), make(seed=9, pool=pool)
    assert not torch.equal(log_risk(model, patient()), log_risk(other, patient()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(log_risk(model, patient()), log_risk(other, patient()))
    assert torch.equal(log_risk(model, patient()), log_risk(model, patient(bin=2, event=1)))


def test_a_learned_vector_stands_in_for_missing_genes():
    plain, model = make(), make(missing_tokens=True)
    assert count(model) == count(plain) + 12
    assert torch.equal(log_risk(plain, patient()), log_risk(model, patient()))
    none = {"rna": None, "cnv": None, "mut": None}
    with torch.no_grad():
        model.missing.fill_(0.3)
    assert torch.equal(model.encode(patient(**none)).z["omic"], model.missing)
    model(patient(**none))["log_risk"].sum().backward()
    assert bool(model.missing.grad.any())
    assert model.mlp[0].linear.weight.grad is None
    with pytest.raises(MorphomeError, match=r"P0.*\(rna\)"):
        model(patient(rna=None))
    with pytest.raises(MorphomeError, match="P0"):
        plain(patient(**none))


@pytest.mark.parametrize("where", ["path", "rna", "cnv"])
def test_planted_signal_is_found_in_each_part(where):
    def planted(seed: int) -> tuple[Batch, float]:
        batch, sign = patient(6, seed), 1.0 if seed % 2 else -1.0
        (batch.path[:, 2] if where == "path" else getattr(batch, where)[1:2]).add_(1.5 * sign)
        return batch, sign

    model = make(dropout=0.0)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(12):
        cases = [planted(16 * step + i) for i in range(16)]
        risks = torch.cat([model(b)["log_risk"] for b, _ in cases])
        time = torch.tensor([10.0 - 8 * sign + 0.01 * i for i, (_, sign) in enumerate(cases)])
        optimiser.zero_grad()
        cox_loss(risks, time, torch.ones(16)).backward()
        optimiser.step()
    new = [planted(seed) for seed in range(500, 540)]
    found = torch.tensor([log_risk(model, b).item() for b, _ in new])
    early = torch.tensor([sign > 0 for _, sign in new])
    assert (found[early][:, None] > found[~early][None]).float().mean().item() > 0.75


def test_what_does_not_fit_is_refused():
    with pytest.raises(MorphomeError, match="pool"):
        make(pool="max")
    with pytest.raises(MorphomeError, match="RNA"):
        make(n_rna=0)
    with pytest.raises(MorphomeError, match="P0"):
        make()(patient(path=torch.randn(3, D_IN + 1)))
    with pytest.raises(MorphomeError, match=r"P0.*\(rna\).*expected \(12,\)"):
        make()(patient(rna=torch.randn(RNA + 1)))
    with pytest.raises(MorphomeError, match=r"P0.*\(cnv\)"):
        make()(patient(cnv=None))
