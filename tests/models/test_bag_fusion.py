"""Fusion rows of ABMIL and Deep Sets: size, formulas, branches, patients without genes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from morphome.errors import MorphomeError
from morphome.models.abmil_fusion import ABMILFusion
from morphome.models.bag_fusion import BagFusion
from morphome.models.batch import Batch
from morphome.models.deep_sets_fusion import DeepSetsFusion
from morphome.models.hazard import nll_loss, risk

D_IN, D = 10, 9
MODELS = {"abmil": (ABMILFusion, {"attention_dim": 8}), "deep_sets": (DeepSetsFusion, {})}
BOTH = pytest.mark.parametrize("kind", list(MODELS))
FUSIONS = pytest.mark.parametrize("fusion", ["concat", "bilinear"])


def make(kind: str, seed: int = 0, missing_tokens: bool = False, **changes) -> BagFusion:
    torch.manual_seed(seed)
    model, small = MODELS[kind]
    return model(D_IN, D, 4, missing_tokens, **{"dim": 16, "fusion_dim": 48, **small, **changes})


def patient(n: int = 6, seed: int = 1, **parts) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    path, genes = torch.randn(n, D_IN, generator=rng), torch.randn(D, generator=rng)
    return Batch(**{"path": path, "omic_all": genes, "patient_id": "P0", **parts})


def logits(model: BagFusion, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch)["logits"]


def linear(a: int, b: int) -> int:
    return a * b + b


def test_parameter_counts():
    with torch.device("meta"):
        found = [
            sum(p.numel() for p in model(1024, 3062, 4, fusion=fusion).parameters())
            for model, _ in MODELS.values()
            for fusion in ("concat", "bilinear")
        ]
    genes = linear(3062, 256) + linear(256, 256)
    concat = linear(512, 256) + linear(256, 256)
    gates, parts = 2 * linear(512, 32), 2 * (linear(256, 32) + linear(32, 32))
    kron = gates + parts + linear(33 * 33, 256) + linear(256 + 512, 256)
    # The bag networks of 920,069 and 657,156 parameters; both have the classifier 256 -> 4.
    assert found == [bag + genes + fusion for bag in (920_069, 657_156) for fusion in (concat, kron)]
    assert found == [1_967_109, 2_297_285, 1_704_196, 2_034_372]


@BOTH
@FUSIONS
def test_evaluation_is_the_formula(kind, fusion):
    model, batch = make(kind, fusion=fusion).eval(), patient(7)
    with torch.no_grad():
        out = model(batch)
        h = F.relu(model.project.linear(batch.path))
        weights = out["attn"]["gated"] if kind == "abmil" else torch.full((7,), 1 / 7)
        path = F.relu(model.hidden.linear(sum(w * x for w, x in zip(weights, h, strict=True))))
        genes = batch.omic_all
        for layer in model.genes.layers:
            genes = F.elu(layer.linear(genes))
        if fusion == "concat":
            fused = F.relu(model.fusion.second(F.relu(model.fusion.first(torch.cat([path, genes])))))
        else:
            product = model.fusion.product
            o1, o2 = (torch.cat([part(path, genes), torch.ones(1)]) for part in product.reduce)
            k = torch.stack([a * b for a in o1 for b in o2])
            fused = F.relu(product.second(torch.cat([F.relu(product.first(k)), path, genes])))
        expected = model.classifier(fused)
    assert len(model.genes.layers) == 2
    torch.testing.assert_close(out["logits"][0], expected, atol=1e-6, rtol=1e-5)


def test_attention_is_gated_and_sums_to_1():
    model, batch = make("abmil").eval(), patient(7)
    with torch.no_grad():
        found, h = model(batch)["attn"]["gated"], F.relu(model.project.linear(batch.path))
        scores = model.pool.score(torch.tanh(model.pool.tanh(h)) * torch.sigmoid(model.pool.gate(h)))
    torch.testing.assert_close(found, scores.flatten().exp() / scores.exp().sum())
    assert found.sum().item() == pytest.approx(1, abs=1e-6)


def test_pools_of_deep_sets():
    """n equal patches: the mean is one of them, the sum n times it, the third sqrt(n) times it."""
    h = torch.rand(1, 16)
    pooled = {p: make("deep_sets", pool=p).pool_patches(h.repeat(9, 1))[0] for p in ("mean", "sum", "sum_over_sqrtN")}
    torch.testing.assert_close(pooled["mean"], h)
    torch.testing.assert_close(pooled["sum"], 9 * h)
    torch.testing.assert_close(pooled["sum_over_sqrtN"], 3 * h)


@BOTH
@FUSIONS
@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_any_bag_in_any_order(kind, fusion, n):
    model, bag = make(kind, fusion=fusion), patient(n)
    found = logits(model, bag)
    assert found.shape == (1, 4)
    assert -4 <= risk(found).item() <= 0
    assert torch.equal(found, logits(model, bag))
    torch.testing.assert_close(found, logits(model, patient(n, path=bag.path[torch.randperm(n)])), atol=1e-6, rtol=0)


@BOTH
@FUSIONS
def test_every_parameter_gets_a_gradient_within_a_few_patients(kind, fusion):
    model = make(kind, fusion=fusion, missing_tokens=True)
    for seed in range(8):
        genes = {"omic_all": None} if seed % 2 else {}
        out = model(patient(5, seed, **genes))["logits"]
        nll_loss(out, torch.tensor([seed % 4]), torch.tensor([seed % 3 % 2])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert bool((p.grad != 0).any()), name


@BOTH
@FUSIONS
def test_branches_own_their_parameters(kind, fusion):
    model = make(kind, fusion=fusion, missing_tokens=True)
    branches = model.branch_parameters()
    ids = {u: {id(p) for p in ps} for u, ps in branches.items()}
    assert not ids["path"] & ids["omic"]
    rest = {name.split(".")[0] for name, p in model.named_parameters() if id(p) not in ids["path"] | ids["omic"]}
    assert rest == {"fusion", "classifier"}
    assert {name for name, p in model.named_parameters() if id(p) in ids["omic"]} >= {"missing"}
    z = model.encode(patient()).z
    assert {u: v.shape[-1] for u, v in z.items()} == model.branch_widths
    for own, other in (("path", "omic"), ("omic", "path")):
        grads = torch.autograd.grad(z[own].sum(), branches[other], retain_graph=True, allow_unused=True)
        assert all(g is None for g in grads)


@BOTH
def test_saved_whole_and_blind_to_labels(kind):
    model, other = make(kind), make(kind, seed=9)
    assert not torch.equal(logits(model, patient()), logits(other, patient()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, patient()), logits(other, patient()))
    assert torch.equal(logits(model, patient()), logits(model, patient(bin=2, event=1)))


@BOTH
def test_a_learned_vector_stands_in_for_missing_genes(kind):
    plain, model = make(kind), make(kind, missing_tokens=True)
    assert torch.equal(logits(plain, patient()), logits(model, patient()))
    assert set(model.state_dict()) - set(plain.state_dict()) == {"missing"}
    with torch.no_grad():
        model.missing.fill_(0.4)
    assert torch.equal(model.encode(patient(omic_all=None)).z["omic"], model.missing)
    with pytest.raises(MorphomeError, match="P0"):
        plain(patient(omic_all=None))


@BOTH
@FUSIONS
@pytest.mark.parametrize("where", ["slides", "genes"])
def test_planted_signal_is_found_in_each_modality(kind, fusion, where):
    def planted(seed: int) -> tuple[Batch, bool]:
        batch, early = patient(6, seed), seed % 2 == 0
        (batch.path[:, 2] if where == "slides" else batch.omic_all[3:4]).add_(1.5 if early else -1.5)
        return batch, early

    model = make(kind, fusion=fusion, dropout=0.0)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(100):
        batch, early = planted(step)
        loss = nll_loss(model(batch)["logits"], torch.tensor([0 if early else 3]), torch.tensor([1]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    new = [planted(seed) for seed in range(500, 540)]
    found = torch.cat([risk(logits(model, b)) for b, _ in new])
    early = torch.tensor([yes for _, yes in new])
    assert (found[early][:, None] > found[~early][None]).float().mean().item() > 0.75


@BOTH
def test_what_does_not_fit_is_refused(kind):
    with pytest.raises(MorphomeError, match="fusion"):
        make(kind, fusion="sum")
    with pytest.raises(MorphomeError, match="fusion_dim: 4"):
        make(kind, fusion="bilinear", fusion_dim=4)
    with pytest.raises(MorphomeError, match="P0"):
        make(kind)(patient(omic_all=torch.randn(D + 1)))
    with pytest.raises(MorphomeError, match="P0"):
        make(kind)(patient(path=torch.randn(3, D_IN + 1)))


def test_an_unknown_pool_is_refused():
    with pytest.raises(MorphomeError, match=r"deep_sets_fusion\.pool"):
        make("deep_sets", pool="max")
