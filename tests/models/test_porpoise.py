"""PORPOISE and its Kronecker fusion: sizes, formulas, options, invariances, planted signals."""

from __future__ import annotations

import math

import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.hazard import nll_loss, risk
from morphome.models.kron import KronFusion
from morphome.models.porpoise import PORPOISE, PorpoiseAMIL

D_IN, D = 12, 11
SMALL = {"dim": 16, "attention_dim": 8, "fusion_dim": 32, "scale": 2}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(seed: int = 0, **settings) -> PORPOISE:
    torch.manual_seed(seed)
    return PORPOISE(D_IN, D, 4, **(SMALL | settings))


def patient(n: int = 20, seed: int = 0, **parts) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    path = torch.randn(n, D_IN, generator=generator)
    return Batch(path=path, omic_all=torch.randn(D, generator=generator), patient_id=f"P{seed}", **parts)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_the_published_size():
    with torch.device("meta"):
        model = PORPOISE(1024, 2208, 4)
        legacy = PORPOISE(1024, 2208, 4, launcher_legacy=True)
        bilinear = PORPOISE(1024, 2208, 4, bilinear_gate=True)
    amil = PorpoiseAMIL(1024, 4)
    assert count(model) == 2_078_661
    assert count(model.fusion.reduce[0].gate) == 512 * 32 + 32
    assert count(legacy) == 2_078_661 - 2 * (512 * 32 + 32) - 512 * 256
    assert count(bilinear) == 2_078_661 + 2 * 32 * (256 * 256 - 512)
    assert count(amil) == 920_069 - (512 * 256 + 256) - (256 * 4 + 4) + 512 * 4 + 4


# -- the fusion -------------------------------------------------------------------------------------------------
def affine(layer: torch.nn.Linear, x: list[float]) -> list[float]:
    rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in rows]


def relu(x: list[float]) -> list[float]:
    return [max(v, 0.0) for v in x]


def gate_of(gate: torch.nn.Module | None, u: list[float], v: list[float], width: int) -> list[float]:
    if gate is None:
        return [1.0] * width
    if isinstance(gate, torch.nn.Bilinear):
        tables = zip(gate.weight.tolist(), gate.bias.tolist(), strict=True)
        z = [sum(a * t[i][j] * b for i, a in enumerate(u) for j, b in enumerate(v)) + c for t, c in tables]
    else:
        z = affine(gate, u + v)
    return [1 / (1 + math.exp(-s)) for s in z]


def slow_fusion(fusion: KronFusion, u: list[float], v: list[float]) -> list[float]:
    """The formula of KronFusion, number by number."""
    parts = []
    for own, part in zip((u, v), fusion.reduce, strict=True):
        hidden = relu(affine(part.hidden, own))
        gate = gate_of(part.gate, u, v, len(hidden))
        parts.append([*relu(affine(part.out, [g * h for g, h in zip(gate, hidden, strict=True)])), 1.0])
    k = [a * b for a in parts[0] for b in parts[1]]
    e = relu(affine(fusion.first, k))
    return relu(affine(fusion.second, e + u + v if fusion.skip else e))


@pytest.mark.parametrize("gates", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("bilinear", [True, False])
def test_fusion_is_the_formula(gates, skip, bilinear):
    fusion = KronFusion(8, 6, 12, scale=2, gates=gates, skip=skip, bilinear_gate=bilinear).eval()
    for p in fusion.parameters():
        torch.nn.init.uniform_(p, -0.5, 0.7)
    u, v = torch.randn(8), torch.randn(6)
    with torch.no_grad():
        out = fusion(u, v)
    assert bool(out.any())
    torch.testing.assert_close(out, torch.tensor(slow_fusion(fusion, u.tolist(), v.tolist())), atol=1e-4, rtol=1e-4)


def test_the_product_contains_both_vectors_and_a_constant():
    fusion = KronFusion(32, 24, 5).eval()
    u, v = torch.randn(32), torch.randn(24)
    with torch.no_grad():
        k = fusion.product(u, v).view(32 // 8 + 1, 24 // 8 + 1)
        o1, o2 = (part(u, v) for part in fusion.reduce)
    torch.testing.assert_close(k[:-1, -1], o1)
    torch.testing.assert_close(k[-1, :-1], o2)
    assert k[-1, -1].item() == 1
    torch.testing.assert_close(k[:-1, :-1], o1[:, None] * o2[None])


def test_swapping_the_vectors_changes_the_result():
    fusion = KronFusion(16, 16, 5, scale=4).eval()
    u, v = torch.randn(16), torch.randn(16)
    with torch.no_grad():
        assert not torch.allclose(fusion(u, v), fusion(v, u), atol=1e-3)


def test_dropout_of_the_parts_and_of_the_product():
    fusion = KronFusion(16, 16, 400, scale=4, dropout=0.25)
    seen = []
    fusion.first.register_forward_hook(lambda _m, given, _out: seen.append(given[0]))
    for _ in range(200):
        fusion(torch.randn(16), torch.randn(16))
    constant = torch.stack(seen)[:, -1]  # 1 x 1 in the product, whatever the parts are
    torch.testing.assert_close(constant.unique(), torch.tensor([0, 4 / 3]))
    assert 0.6 < (constant > 0).float().mean().item() < 0.9
    part, ones = fusion.reduce[0], torch.ones(16)
    torch.nn.init.zeros_(part.out.weight)
    torch.nn.init.ones_(part.out.bias)
    values = torch.cat([part(ones, ones) for _ in range(50)])
    torch.testing.assert_close(values.unique(), torch.tensor([0, 4 / 3]))


def test_encoder_dropout_is_that_of_mcat():
    fusion = KronFusion(16, 16, 400, scale=4, dropout=0.0, encoder_dropout=0.25)
    torch.nn.init.ones_(fusion.second.bias)
    torch.nn.init.zeros_(fusion.second.weight)
    out = fusion(torch.randn(16), torch.randn(16))
    torch.testing.assert_close(out.unique(), torch.tensor([0, 4 / 3]))
    assert 0.65 < (out > 0).float().mean().item() < 0.85


# -- the network ------------------------------------------------------------------------------------------------
def test_evaluation_is_the_formula():
    model = make().eval()
    batch = patient(7)
    with torch.no_grad():
        out = model(batch)
        h = torch.relu(batch.path @ model.project.linear.weight.T + model.project.linear.bias)
        scores = [
            model.pool.score(torch.tanh(model.pool.tanh(row)) * torch.sigmoid(model.pool.gate(row))).exp() for row in h
        ]
        weights = torch.cat(scores) / sum(scores)
        path = torch.relu(model.hidden.linear(sum(w * row for w, row in zip(weights, h, strict=True))))
        genes = batch.omic_all
        for layer in model.genes.layers:
            genes = torch.nn.functional.elu(layer.linear(genes))
        fused = torch.tensor(slow_fusion(model.fusion, path.tolist(), genes.tolist()))
        logits = model.classifier(fused)
    assert len(model.genes.layers) == 2
    torch.testing.assert_close(out["attn"]["gated"], weights)
    torch.testing.assert_close(out["logits"], logits[None], atol=1e-5, rtol=1e-4)
    z = model.encode(batch).z
    torch.testing.assert_close(z["path"], path[None])
    torch.testing.assert_close(z["omic"], genes[None])


def test_launcher_legacy_turns_gates_skip_and_input_dropout_off():
    legacy, ours = make(launcher_legacy=True), make()
    assert [part.gate for part in legacy.fusion.reduce] == [None, None]
    assert not legacy.fusion.skip and legacy.dropinput.p == 0
    assert all(part.gate is not None for part in ours.fusion.reduce)
    assert ours.fusion.skip and ours.dropinput.p == 0.1
    spelled = make(gate_path=False, gate_omic=False, skip=False, dropinput=0.0).eval()
    with torch.no_grad():
        assert torch.equal(legacy.eval()(patient())["logits"], spelled(patient())["logits"])
    assert make(gate_omic=False).fusion.reduce[0].gate is not None
    assert make(gate_omic=False).fusion.reduce[1].gate is None


@pytest.mark.parametrize("n", [1, 2, 3, 60])
def test_any_bag_in_any_order(n):
    model = make().eval()
    bag = patient(n)
    order = torch.randperm(n)
    with torch.no_grad():
        a = model(bag)
        b = model(Batch(path=bag.path[order], omic_all=bag.omic_all))
    assert a["logits"].shape == (1, 4) and -4 <= risk(a["logits"]).item() <= 0
    assert a["attn"]["gated"].shape == (n,) and a["attn"]["gated"].sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(a["logits"], b["logits"], atol=1e-6, rtol=0)
    torch.testing.assert_close(a["attn"]["gated"][order], b["attn"]["gated"], atol=1e-6, rtol=0)


def test_penalty_covers_genes_and_fusion_in_training_only():
    model = make(l1=0.5)
    expected = sum(float(p.detach().abs().sum()) for part in (model.genes, model.fusion) for p in part.parameters())
    penalty = model(patient())["extra_losses"]["l1"]
    assert penalty.item() == pytest.approx(0.5 * expected, rel=1e-5)
    penalty.backward()
    assert model.project.linear.weight.grad is None
    assert model.eval()(patient())["extra_losses"] == {}
    assert make(l1=0.0)(patient())["extra_losses"] == {}
    stand_in = make(l1=0.5)
    stand_in.genes.add_missing()
    assert stand_in(patient())["extra_losses"]["l1"].item() == penalty.item()


@pytest.mark.parametrize("bilinear", [True, False])
def test_every_parameter_gets_a_gradient_within_a_few_patients(bilinear):
    model = make(bilinear_gate=bilinear, l1=0.0)
    for seed in range(6):
        logits = model(patient(5, seed))["logits"]
        nll_loss(logits, torch.tensor([seed % 4]), torch.tensor([seed % 2])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and bool((p.grad != 0).any()), name


@pytest.mark.parametrize("build", [make, lambda seed=0: PorpoiseAMIL(D_IN, 4, dim=16, attention_dim=8)])
def test_evaluation_is_repeatable_saved_whole_and_blind_to_labels(build):
    model, other = build().eval(), build(seed=9).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        first = model(patient())["logits"]
        assert torch.equal(first, model(patient())["logits"])
        assert torch.equal(first, other(patient())["logits"])
        assert torch.equal(first, model(patient(bin=2, event=1))["logits"])


def test_dropinput_drops_patch_features_in_training():
    model = make(dropinput=0.5, dropout=0.0, l1=0.0)
    assert not torch.equal(model(patient())["logits"], model(patient())["logits"])
    still = make(dropinput=0.0, dropout=0.0, l1=0.0)
    assert torch.equal(still(patient())["logits"], still(patient())["logits"])


def planted(seed: int, where: str) -> tuple[Batch, bool]:
    """A patient who dies early when one column is raised: of all patches, or of the molecular values."""
    batch, early = patient(6, seed), seed % 2 == 0
    column = batch.path[:, 2] if where == "slides" else batch.omic_all[3:4]
    column += 1.5 if early else -1.5
    return batch, early


def order_of_risks(model: torch.nn.Module, where: str) -> float:
    """Share of pairs (early, late) of 60 new patients in which the early one has the larger risk."""
    model.eval()
    with torch.no_grad():
        rows = [
            (risk(model(batch)["logits"]).item(), yes) for batch, yes in (planted(s, where) for s in range(500, 560))
        ]
    early, late = [r for r, yes in rows if yes], [r for r, yes in rows if not yes]
    return sum((a > b) + 0.5 * (a == b) for a in early for b in late) / (len(early) * len(late))


@pytest.mark.parametrize("where", ["slides", "genes"])
def test_planted_signal_is_found_in_each_modality(where):
    model = make(dropout=0.0, dropinput=0.0, l1=0.0)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(100):
        batch, early = planted(step, where)
        loss = nll_loss(model(batch)["logits"], torch.tensor([0 if early else 3]), torch.tensor([1]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert order_of_risks(model, where) > 0.75


def test_amil_is_gated_attention_and_one_linear_map():
    model = PorpoiseAMIL(D_IN, 4, dim=16, attention_dim=8).eval()
    batch = patient(6)
    with torch.no_grad():
        out = model(batch)
        h = torch.relu(model.project.linear(batch.path))
        pooled = (out["attn"]["gated"][:, None] * h).sum(0)
        torch.testing.assert_close(out["logits"][0], model.classifier(pooled))
        torch.testing.assert_close(out["aux"]["pooled"], pooled[None])
    assert out["attn"]["gated"].sum().item() == pytest.approx(1, abs=1e-5)


def test_amil_starts_xavier_normal_with_biases_0():
    model = PorpoiseAMIL(300, 4, dim=200, attention_dim=100)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    for weight in (model.project.linear.weight, model.pool.tanh.weight):
        assert weight.std().item() == pytest.approx(math.sqrt(2 / sum(weight.shape)), rel=0.03)


def test_what_does_not_fit_is_refused():
    with pytest.raises(MorphomeError, match="P0"):
        make()(Batch(path=torch.randn(3, D_IN), omic_all=torch.randn(D + 1), patient_id="P0"))
    with pytest.raises(MorphomeError, match="P0"):
        make()(Batch(path=torch.randn(3, D_IN + 1), omic_all=torch.randn(D), patient_id="P0"))
    with pytest.raises(MorphomeError, match="P7"):
        make()(Batch(path=torch.randn(3, D_IN), patient_id="P7"))
    with pytest.raises(MorphomeError, match="P7"):
        PorpoiseAMIL(D_IN, 4, dim=8)(Batch(patient_id="P7"))
    with pytest.raises(MorphomeError, match="scale 64"):
        make(scale=64)
