"""Ablations of MoME: what is left, what is ignored, sizes."""

from __future__ import annotations

import io

import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.fusion import FusionModel
from morphome.models.hazard import nll_loss
from morphome.models.mome import MoME
from morphome.models.mome_ablations import MoMEGenes, MoMENoMoE, MoMEWSI

GROUPS = {"a": 5, "b": 3, "c": 9}
#: Columns of the six gene families in the MCAT table of TCGA-BLCA.
BLCA = dict(zip("abcdef", (94, 334, 521, 468, 1496, 479), strict=True))
SMALL = {"dim": 16, "heads": 2, "landmarks": 16}
VARIANTS = {
    "no_moe": lambda **s: MoMENoMoE(12, GROUPS, 4, **SMALL, **s),
    "no_moe_fixed": lambda **s: MoMENoMoE(12, GROUPS, 4, variant="fixed:TransFusion", **SMALL, **s),
    "wsi": lambda **s: MoMEWSI(12, 4, **SMALL, **s),
    "wsi_learned_ref": lambda **s: MoMEWSI(12, 4, variant="learned_ref", **SMALL, **s),
    "genes": lambda **s: MoMEGenes(GROUPS, 4, **SMALL, **s),
}
every = pytest.mark.parametrize("name", VARIANTS)


def make(name: str, seed: int = 0, **settings) -> torch.nn.Module:
    torch.manual_seed(seed)
    return VARIANTS[name](**settings)


def patient(n: int = 20, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        path=torch.randn(n, 12, generator=generator),
        groups=tuple(torch.randn(size, generator=generator) for size in GROUPS.values()),
        patient_id=f"P{seed}",
    )


def test_parameter_counts_of_the_published_size():
    with torch.device("meta"):
        full, frozen = MoME(1024, BLCA, 4), MoME(1024, BLCA, 4, tokens="frozen_random")
        models = {
            "no_moe": MoMENoMoE(1024, BLCA, 4),
            "no_moe_fixed": MoMENoMoE(1024, BLCA, 4, variant="fixed:TransFusion"),
            "wsi": MoMEWSI(1024, 4),
            "wsi_learned_ref": MoMEWSI(1024, 4, variant="learned_ref"),
            "genes": MoMEGenes(BLCA, 4),
        }
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    layers, genes, path = 4 * 4_205_852, 3_315_712, 1024 * 512 + 512
    assert counts["no_moe"] == 21_716_348 - layers + 512 == 4_893_452
    assert counts["no_moe_fixed"] == counts["no_moe"] + 4 * 1_049_864
    assert counts["wsi"] == counts["no_moe"] - genes == 1_577_740
    assert counts["genes"] == counts["no_moe"] - path
    size = sum(p.numel() for p in full.parameters())
    assert counts["wsi_learned_ref"] == size - genes + 512
    assert sum(p.numel() for p in frozen.parameters()) == 21_716_348


def test_without_moe_only_the_head_mixes():
    model, bag = make("no_moe").eval(), patient()
    with torch.no_grad():
        path = torch.relu(model.project.linear(bag.path))
        tokens = torch.cat([model.cls, path, model.groups(bag.groups)])
        expected = model.classifier(model.fusion(tokens)[:1])
        torch.testing.assert_close(model(bag)["logits"], expected)
    assert not any(name.startswith("layers") for name in model.state_dict())
    assert model.encode(bag).z["path"].shape == (20, 16) and model(bag)["aux"] == {}


def test_the_fixed_variant_is_mome_with_one_expert():
    torch.manual_seed(3)
    full = MoME(12, GROUPS, 4, router="fixed:TransFusion", **SMALL).eval()
    model = make("no_moe_fixed", seed=3).eval()
    with torch.no_grad():
        out = model(patient())
        assert torch.equal(out["logits"], full(patient())["logits"])
    assert out["aux"] == {}


def test_slides_alone_and_genes_alone_by_definition():
    bag = patient()
    wsi, genes = make("wsi").eval(), make("genes").eval()
    with torch.no_grad():
        tokens = torch.cat([wsi.cls, torch.relu(wsi.project.linear(bag.path))])
        torch.testing.assert_close(wsi(bag)["logits"], wsi.classifier(wsi.fusion(tokens)[:1]))
        tokens = torch.cat([genes.cls, genes.groups(bag.groups)])
        torch.testing.assert_close(genes(bag)["logits"], genes.classifier(genes.fusion(tokens)[:1]))


def test_a_learned_token_stands_for_the_genes():
    model = make("wsi_learned_ref", router="soft").eval()
    full = MoME(12, {"one": 1}, 4, router="soft", **SMALL).eval()
    full.load_state_dict(model.state_dict(), strict=False)
    full.embed = lambda batch: (full.project(batch.path), model.ref)
    with torch.no_grad():
        out = model(patient())
        torch.testing.assert_close(out["logits"], full(patient())["logits"])
    assert set(out["aux"]["routing"]) == set(model.layers)


@pytest.mark.parametrize("name", ["wsi", "wsi_learned_ref"])
def test_slides_alone_ignore_genes_bit_exactly(name):
    model, a, b = make(name).eval(), patient(seed=1), patient(seed=2)
    with torch.no_grad():
        expected = model(Batch(path=a.path, patient_id="P"))["logits"]
        for groups in (a.groups, b.groups, ()):
            assert torch.equal(model(Batch(a.path, None, groups, patient_id="P"))["logits"], expected)
    assert not any("groups" in key for key in model.state_dict())


def test_genes_alone_ignore_slides_bit_exactly():
    model, a, b = make("genes").eval(), patient(seed=1), patient(7, seed=2)
    with torch.no_grad():
        expected = model(Batch(groups=a.groups))["logits"]
        assert torch.equal(model(Batch(a.path, None, a.groups))["logits"], expected)
        assert torch.equal(model(Batch(b.path, None, a.groups))["logits"], expected)
        assert not torch.equal(model(Batch(groups=b.groups))["logits"], expected)


@every
@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_any_bag_and_evaluation_is_repeatable(name, n):
    model, other = make(name).eval(), make(name, seed=9).eval()
    bag = patient(n)
    with torch.no_grad():
        first = model(bag)["logits"]
        assert first.shape == (1, 4) and bool(torch.isfinite(first).all())
        labelled = Batch(bag.path, bag.pos, bag.groups, bin=3, event=1, patient_id=bag.patient_id)
        assert torch.equal(first, model(labelled)["logits"])
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(first, other(bag)["logits"])


@every
@pytest.mark.parametrize("attention", ["nystrom_masked", "nystrom_compat", "exact"])
def test_gradients_reach_every_parameter(name, attention):
    settings = {"router": "soft"} if name == "wsi_learned_ref" else {}
    model = make(name, attention=attention, **settings)
    for seed in range(4):
        out = model(patient(seed=seed))
        assert out["extra_losses"] == {} and out["attn"] == {}
        nll_loss(out["logits"], torch.tensor([seed]), torch.tensor([1])).backward()
    for key, p in model.named_parameters():
        assert not p.requires_grad or bool((p.grad != 0).any()), key


@pytest.mark.parametrize("name", ["wsi", "wsi_learned_ref"])
def test_slides_alone_hand_out_the_class_token(name):
    model = make(name)
    out = model(patient())
    assert out["aux"]["pooled"].shape == (1, 16) and out["aux"]["pooled"].requires_grad
    assert torch.equal(model.classifier(out["aux"]["pooled"]), out["logits"])
    # without genes there is nothing to balance
    assert not isinstance(model, FusionModel)


@every
def test_patch_order_matters_where_stated(name):
    bag = patient(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    mixed = Batch(bag.path[order], None, bag.groups, patient_id=bag.patient_id)
    settings = [{}] if name == "genes" else [{}, {"attention": "exact", "value_conv": False}]
    for chosen in settings:
        model = make(name, **chosen).eval()
        assert model.order_sensitive == (name != "genes" and not chosen)
        with torch.no_grad():
            difference = (model(bag)["logits"] - model(mixed)["logits"]).abs().max().item()
        assert (difference > 2e-6) == model.order_sensitive


def test_random_router_of_the_learned_token_takes_the_seed():
    model = make("wsi_learned_ref", router="random", router_seed=7)
    assert int(model.state_dict()["layers.gene1.router_seed"]) == 7


def test_wrong_settings_and_inputs_are_refused():
    for name, settings in (("no_moe", {"variant": "soft"}), ("wsi", {"variant": "zero"})):
        cls = {"no_moe": lambda **s: MoMENoMoE(12, GROUPS, 4, **s), "wsi": lambda **s: MoMEWSI(12, 4, **s)}[name]
        with pytest.raises(MorphomeError, match="variant"):
            cls(**settings)
    with pytest.raises(MorphomeError, match="tokens"):
        make("genes", tokens="zero")
    with pytest.raises(MorphomeError, match="P4: no gene groups"):
        make("genes")(Batch(path=patient().path, patient_id="P4"))
    with pytest.raises(MorphomeError, match="P4: no patch features"):
        make("wsi")(Batch(groups=patient().groups, patient_id="P4"))
    with pytest.raises(MorphomeError, match="P4: no gene groups"):
        make("no_moe")(Batch(path=patient().path, patient_id="P4"))
