"""MoME: sizes, routers, experts, invariances."""

from __future__ import annotations

import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models import mome
from morphome.models.batch import Batch
from morphome.models.hazard import nll_loss
from morphome.models.mome import EXPERTS, LAYERS, MoME
from morphome.models.nystrom import NystromAttention

GROUPS = {"a": 5, "b": 3, "c": 9}
#: Columns of the six gene families in the MCAT table of TCGA-BLCA.
BLCA = dict(zip("abcdef", (94, 334, 521, 468, 1496, 479), strict=True))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(seed: int = 0, **settings) -> MoME:
    torch.manual_seed(seed)
    return MoME(12, GROUPS, 4, **({"dim": 16, "heads": 2, "landmarks": 16} | settings))


def patient(n: int = 20, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        path=torch.randn(n, 12, generator=generator),
        groups=tuple(torch.randn(size, generator=generator) for size in GROUPS.values()),
        patient_id=f"P{seed}",
    )


def backward(model: MoME, batch: Batch) -> dict:
    out = model(batch)
    nll_loss(out["logits"], torch.tensor([2]), torch.tensor([1])).backward()
    return {name: row["expert"] for name, row in out["aux"]["routing"].items()}


def has_gradient(module: torch.nn.Module) -> bool:
    return any(p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters())


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_the_published_size():
    with torch.device("meta"):
        published = MoME(1024, BLCA, 4, tokens="frozen_random")
        ours = MoME(1024, BLCA, 4)
    layer = published.layers["path1"]
    assert count(layer.experts["TransFusion"]) == 1_049_864
    assert count(layer.experts["BottleneckTransFusion"]) == 2_101_264
    assert count(layer.experts["BottleneckTransFusion"].unused_norm) == 512
    assert count(layer.experts["AddFusion"]) == 526_336
    assert count(layer.experts["DropX2Fusion"]) == 0
    assert count(layer.gate) == 528_388
    assert count(layer) == 4_205_852
    assert count(published) == 21_716_348
    assert count(ours) == 21_716_348 + 512 + 4 * 2 * 512


def test_order_of_the_layers():
    """Pathology first; the gene layer sees the new pathology features."""
    model = make(router="fixed:AddFusion").eval()
    seen = []
    for name, layer in model.layers.items():
        layer.register_forward_hook(lambda _m, a, out, name=name: seen.append((name, a[0], a[1], out[0])))
    with torch.no_grad():
        p0, g0 = model.embed(patient())
        p2, g2, routing, _ = model.exchange(p0, g0)
    (_, x1, r1, p1), (_, x2, r2, g1), (_, x3, r3, q), (_, x4, r4, g) = seen
    assert [row[0] for row in seen] == list(LAYERS) == list(routing)
    assert x1 is p0 and r1 is g0 and x2 is g0 and r2 is p1
    assert x3 is p1 and r3 is g1 and q is p2 and x4 is g1 and r4 is p2 and g is g2


def test_what_reaches_the_fusion_are_the_tokens_after_the_four_layers():
    model = make(router="soft").eval()
    with torch.no_grad():
        p2, g2, _, _ = model.exchange(*model.embed(patient()))
        z = model.encode(patient()).z
        assert torch.equal(z["path"], p2) and torch.equal(z["omic"], g2)
        assert p2.shape == (20, 16) and g2.shape == (3, 16)
        expected = model.classifier(model.fusion(torch.cat([model.cls, p2, g2])))[:1]
        torch.testing.assert_close(model.fuse(z), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"router": "frozen"}, {"residual": "both", "residual_scale": "learned"}, {"tokens": "frozen_random"}],
)
def test_a_branch_is_an_encoder_and_the_expert_layers_of_its_modality(settings):
    model = make(**settings)
    names = {id(p): name for name, p in model.named_parameters()}
    starts = {"path": ("project.", "skip.", "layers.path1.", "layers.path2."), "omic": ("groups.", "layers.gene")}
    for branch, parameters in model.branch_parameters().items():
        found = {names[id(p)] for p in parameters}
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert found == {name for name in trainable if name.startswith(starts[branch])}


@pytest.mark.parametrize("n", [9, 40])
def test_the_error_of_the_pseudo_inverse_is_noted_where_one_was_taken(n):
    model = make(attention="nystrom_masked", router="fixed:TransFusion")
    assert "pinv_error" not in model(patient(40))["aux"]
    model.eval()
    with torch.no_grad():
        model(patient(40))
        aux = model(patient(n))["aux"]
    layers = [m for m in model.modules() if isinstance(m, NystromAttention)]
    if n == 9:  # 13 tokens and 16 landmarks: exact, and nothing is left of the longer bag
        assert "pinv_error" not in aux and all(layer.pinv_error is None for layer in layers)
    else:
        assert aux["pinv_error"] == max(layer.pinv_error for layer in layers)
        assert isinstance(aux["pinv_error"], float) and 0 < aux["pinv_error"] < 1


def test_straight_through_has_the_value_of_the_chosen_expert_and_trains_the_gate():
    model = make().train()
    for p in model.modules():  # dropout off, so that two forwards agree
        if hasattr(p, "p"):
            p.p = 0.0
    layer = model.layers["path1"]
    x, ref = torch.randn(7, 16), torch.randn(3, 16)
    y, chosen, pi = layer(x, ref)
    torch.testing.assert_close(y, layer.experts[EXPERTS[chosen]](x, ref), atol=1e-6, rtol=0)
    # The gradient into pi is <dL/dy, E_e> for every expert, chosen or not: the definition, spelled out.
    weight = torch.randn_like(y)
    gradient = torch.autograd.grad((y * weight).sum(), pi, retain_graph=True)[0]
    expected = torch.stack([(weight * layer.experts[e](x, ref)).sum() for e in EXPERTS])
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)
    onehot = torch.nn.functional.one_hot(torch.tensor(chosen), 4)
    literal_pi = layer.gate(x, ref)
    g = onehot - literal_pi.detach() + literal_pi
    literal = sum(g[e] * layer.experts[name](x, ref) for e, name in enumerate(EXPERTS))
    wanted = [p for p in layer.parameters() if p.requires_grad]
    a = torch.autograd.grad((y * weight).sum(), wanted, allow_unused=True)
    b = torch.autograd.grad((literal * weight).sum(), wanted, allow_unused=True)
    for ours, theirs in zip(a, b, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            (zero if ours is None else ours) + 0 * (zero if theirs is None else theirs),
            (zero if theirs is None else theirs) + 0 * (zero if ours is None else ours),
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize("router", ["straight_through", "frozen", "switch", "soft", "random"])
def test_who_gets_gradients(router):
    model = make(router=router)
    chosen = backward(model, patient())
    for name, layer in model.layers.items():
        learns = router in ("straight_through", "switch", "soft")
        if layer.gate is not None:
            assert has_gradient(layer.gate) == learns
        for e, expert in enumerate(EXPERTS[:3]):
            expected = router == "soft" or e == chosen[name]
            assert has_gradient(layer.experts[expert]) == expected, (name, expert)


@pytest.mark.parametrize("router", ["straight_through", "frozen", "switch", "random", "fixed:AddFusion"])
def test_only_one_expert_runs_at_inference(router):
    model = make(router=router).eval()
    ran = []
    for layer in model.layers.values():
        for name, expert in layer.experts.items():
            expert.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        routing = model(patient())["aux"]["routing"]
    assert ran == [EXPERTS[row["expert"]] for row in routing.values()]


def test_values_of_switch_and_soft():
    x, ref = torch.randn(7, 16), torch.randn(3, 16)
    for router in ("switch", "soft", "frozen"):
        layer = make(router=router).eval().layers["gene1"]
        with torch.no_grad():
            y, chosen, pi = layer(x, ref)
            outputs = torch.stack([layer.experts[e](x, ref) for e in EXPERTS])
        assert pi.shape == (4,) and pi.sum().item() == pytest.approx(1, abs=1e-6) and chosen == pi.argmax()
        expected = {"switch": pi[chosen] * outputs[chosen], "frozen": outputs[chosen]}
        soft = torch.einsum("e,end->nd", pi, outputs)
        torch.testing.assert_close(y, expected.get(router, soft), atol=1e-6, rtol=1e-5)


def test_frozen_gate_is_saved_and_not_trainable():
    layer = make(router="frozen").layers["path1"]
    assert any(name.startswith("gate.") for name in layer.state_dict())
    assert not any(p.requires_grad for p in layer.gate.parameters())


@pytest.mark.parametrize("expert", EXPERTS)
def test_fixed_router(expert):
    model = make(router=f"fixed:{expert}").eval()
    with torch.no_grad():
        p0, g0 = model.embed(patient())
        p2, g2, routing, _ = model.exchange(p0, g0)
    e = EXPERTS.index(expert)
    assert all(row["expert"] == e and row["pi"].argmax() == e for row in routing.values())
    unchanged = torch.equal(p2, p0) and torch.equal(g2, g0)
    assert unchanged == (expert == "DropX2Fusion")


def test_random_router_is_a_saved_hash_of_seed_layer_and_patient():
    model = make(router="random", router_seed=3).eval()
    assert int(model.state_dict()["layers.path1.router_seed"]) == 3

    def draws(m: MoME) -> list[int]:
        with torch.no_grad():
            rows = [m(patient(4, seed))["aux"]["routing"] for seed in range(60)]
        return [row["expert"] for routing in rows for row in routing.values()]

    first = draws(model)
    assert first == draws(model.train()) == draws(make(seed=8, router="random", router_seed=3))
    assert first != draws(make(router="random", router_seed=4))
    shares = torch.bincount(torch.tensor(first), minlength=4) / len(first)
    assert bool((shares > 0.15).all()) and bool((shares < 0.35).all())
    per_layer = torch.tensor(first).view(60, 4)
    assert not torch.equal(per_layer[:, 0], per_layer[:, 1])


def test_experts_by_definition():
    x, ref = torch.randn(7, 16), torch.randn(3, 16)
    experts = make().eval().layers["path1"].experts
    with torch.no_grad():
        assert torch.equal(experts["DropX2Fusion"](x, ref), x)
        fusion = experts["TransFusion"]
        torch.testing.assert_close(fusion(x, ref), fusion.layer(torch.cat([x, ref]))[:7])
        add = experts["AddFusion"]
        expected = add.snn_x(add.norm_x(x)) + add.snn_ref(add.norm_ref(ref)).mean(0, keepdim=True)
        torch.testing.assert_close(add(x, ref), expected)
        neck = experts["BottleneckTransFusion"]
        read = neck.read(torch.cat([neck.bottlenecks, ref]))[:2]
        torch.testing.assert_close(neck(x, ref), neck.write(torch.cat([x, read]))[:7])
        for name in EXPERTS[:3]:
            other = torch.randn_like(ref)
            assert not torch.allclose(experts[name](x, ref), experts[name](x, other)), name


def test_gate_ignores_the_order_of_patches():
    gate = make().eval().layers["path1"].gate
    x, ref = torch.randn(50, 16), torch.randn(3, 16)
    with torch.no_grad():
        a, b = gate(x, ref), gate(x[torch.randperm(50)], ref.flip(0))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize(
    ("attention", "value_conv", "sensitive"),
    [("nystrom_masked", True, True), ("nystrom_masked", False, True), ("exact", True, True), ("exact", False, False)],
)
def test_patch_order(expert, attention, value_conv, sensitive):
    """Landmarks and convolution read the order of the patches; exact attention without convolution does not."""
    model = make(router=f"fixed:{expert}", attention=attention, value_conv=value_conv).eval()
    assert model.order_sensitive == sensitive
    bag = patient(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = model(bag)["logits"] - model(Batch(bag.path[order], None, bag.groups, "P0"))["logits"]
    assert (difference.abs().max().item() > 2e-6) == sensitive


@pytest.mark.parametrize("attention", ["nystrom_masked", "nystrom_compat", "exact"])
@pytest.mark.parametrize("n", [1, 40])
def test_attention_modes_train(attention, n):
    model = make(attention=attention, router="soft")
    backward(model, patient(n))
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_tokens():
    trained, saved = make(), make(tokens="frozen_random")
    assert trained.cls.requires_grad and "cls" in dict(trained.named_parameters())
    assert "cls" not in dict(saved.named_parameters())
    assert "cls" in saved.state_dict()
    assert "layers.gene2.experts.BottleneckTransFusion.bottlenecks" in saved.state_dict()
    assert saved.cls.min() >= 0 and saved.cls.max() < 1


def test_balance_loss_and_its_moving_average():
    model = make(balance_loss=0.5)
    out = model(patient())
    routing = out["aux"]["routing"]
    expected = 0.0
    for row in routing.values():
        share = torch.full((4,), 0.225)
        share[row["expert"]] += 0.1
        expected += 4 * float(share @ row["pi"])
    assert out["extra_losses"]["balance"].item() == pytest.approx(0.5 * expected, rel=1e-5)
    out["extra_losses"]["balance"].backward()
    assert has_gradient(model.layers["path1"].gate)
    assert "layers.path1.share" in model.state_dict()
    before = model.layers["path1"].share.clone()
    assert model.eval()(patient())["extra_losses"] == {}
    assert torch.equal(before, model.layers["path1"].share)
    assert make()(patient())["extra_losses"] == {}


def test_temperature_sharpens_the_gate():
    cold, warm = make(temperature=0.1).eval(), make(temperature=1.0).eval()
    with torch.no_grad():
        a, b = (m(patient())["aux"]["routing"]["path1"]["pi"] for m in (cold, warm))
    torch.testing.assert_close((b.log() * 10).softmax(-1), a, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"router": "hard"}, {"tokens": "zero"}, {"attention": "flash"}, {"router": "frozen", "balance_loss": 0.1}],
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(MorphomeError):
        make(**settings)


def test_nothing_but_the_unused_norm_is_left_untrained():
    untrained = [name for name, p in make().named_parameters() if not p.requires_grad]
    assert len(untrained) == 4 and all(name.endswith("unused_norm.weight") for name in untrained)
    assert mome.ROUTERS[0] == "straight_through"


SKIPS = ("moe_skip", "both")


@pytest.mark.parametrize("router", ["straight_through", "soft", "switch", "random", "fixed:AddFusion"])
@pytest.mark.parametrize("residual", SKIPS)
def test_a_learned_scale_starts_as_the_identity_in_all_four_layers(router, residual):
    model = make(router=router, residual=residual, residual_scale="learned")
    p0, g0 = model.eval().embed(patient())
    p2, g2, _, _ = model.exchange(p0, g0)
    assert torch.equal(p2, p0) and torch.equal(g2, g0)
    chosen = backward(model.train(), patient())
    assert [layer.scale.shape for layer in model.layers.values()] == [torch.Size([])] * 4
    # an expert that was dropped adds nothing, whatever its scale
    for name, layer in model.layers.items():
        dropped = router != "soft" and chosen[name] == EXPERTS.index("DropX2Fusion")
        assert bool(layer.scale.grad != 0) != dropped, name


def test_a_learned_scale_opens_the_way_to_gate_and_experts():
    model = make(router="soft", residual="moe_skip", residual_scale="learned")
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for seed in range(3):
        optimiser.zero_grad()
        backward(model, patient(seed=seed))
        optimiser.step()
    for name, p in model.named_parameters():
        assert not p.requires_grad or bool((p.grad != 0).any()), name


@pytest.mark.parametrize("router", ["soft", "switch", "straight_through"])
def test_the_skip_around_an_expert_layer_adds_x_once(router):
    layer = make(router=router, residual="moe_skip").eval().layers["path1"]
    for _ in range(40):  # several draws, so that the dropped expert is met too
        torch.nn.init.normal_(layer.gate.classifier.weight, std=0.3)
        x, ref = torch.randn(7, 16), torch.randn(3, 16)
        with torch.no_grad():
            y, chosen, pi = layer(x, ref)
            outputs = torch.stack([layer.experts[e](x, ref) for e in EXPERTS[:3]] + [torch.zeros_like(x)])
        added = {"soft": torch.einsum("e,end->nd", pi, outputs), "switch": pi[chosen] * outputs[chosen]}
        torch.testing.assert_close(y, x + added.get(router, outputs[chosen]), atol=1e-5, rtol=1e-5)


def test_the_skip_with_the_dropping_expert_is_x_not_twice_x():
    model = make(router="fixed:DropX2Fusion", residual="moe_skip").eval()
    with torch.no_grad():
        p0, g0 = model.embed(patient())
        p2, g2, _, _ = model.exchange(p0, g0)
    assert torch.equal(p2, p0) and torch.equal(g2, g0)


def test_straight_through_skip_trains_the_gate_with_the_values_of_the_experts():
    model = make(residual="moe_skip", dropout=0.0, attention_dropout=0.0)
    layer = model.layers["path1"]
    x, ref = torch.randn(7, 16), torch.randn(3, 16)
    y, _, pi = layer(x, ref)
    weight = torch.randn_like(y)
    gradient = torch.autograd.grad((y * weight).sum(), pi)[0]
    expected = [(weight * layer.experts[e](x, ref)).sum().item() for e in EXPERTS[:3]] + [0.0]
    torch.testing.assert_close(gradient, torch.tensor(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("residual", ["proj_skip", "both"])
def test_skips_around_the_projections(residual):
    model, bag = make(residual=residual).eval(), patient()
    assert model.skip.bias is None and count(model) == count(make()) + 12 * 16
    with torch.no_grad():
        p0, g0 = model.embed(bag)
        expected = model.project(bag.path) + bag.path @ model.skip.weight.T
        rows = []
        for first, second, x in zip(model.groups.first, model.groups.second, bag.groups, strict=True):
            a = torch.nn.functional.elu(first(x))
            rows.append(torch.nn.functional.elu(second(a)) + a)
    torch.testing.assert_close(p0, expected)
    torch.testing.assert_close(g0, torch.stack(rows))
    names = {id(p) for parameters in model.branch_parameters().values() for p in parameters}
    assert id(model.skip.weight) in names
    with pytest.raises(MorphomeError, match="gene groups"):
        model(Batch(bag.path, None, bag.groups[:2]))


def test_no_residual_is_the_model_as_before():
    plain, named = make(), make(residual="none", residual_scale=1)
    assert list(plain.state_dict()) == list(named.state_dict())
    assert not any("scale" in name or name.startswith("skip") for name in plain.state_dict())


@pytest.mark.parametrize(
    "settings",
    [
        {"residual": "skip"},
        {"residual": "both", "residual_scale": 0.5},
        {"residual_scale": "learned"},
        {"residual": "proj_skip", "residual_scale": "learned"},
        {"residual": "moe_skip", "residual_scale": "learned", "router": "fixed:DropX2Fusion"},
    ],
)
def test_wrong_residuals_are_refused(settings):
    with pytest.raises(MorphomeError, match="residual"):
        make(**settings)


def test_the_gate_chooses_in_float32_inside_autocast():
    layer = make().layers["path1"]
    x, ref = torch.randn(7, 16), torch.randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _, pi = layer(x, ref)
    assert pi.dtype == torch.float32 and pi.sum().item() == pytest.approx(1, abs=1e-6)
    y.float().square().sum().backward()
    assert has_gradient(layer.gate)
