"""One test file over every registered model: settings, shapes, determinism, gradients, invariances."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch

from morphome.config import schema
from morphome.errors import MorphomeError
from morphome.models import hazard, registry
from morphome.models.batch import Batch
from morphome.models.registry import Dims, build

SMALL = {
    "deep_sets": {"dim": 16, "head_dim": 8},
    "abmil": {"dim": 16, "attention_dim": 8, "head_dim": 8},
    "clam_sb": {"dim": 16, "attention_dim": 8},
    "clam_mb": {"dim": 16, "attention_dim": 8},
    "dsmil": {"dim": 16, "query_dim": 8},
    "transmil": {"dim": 16, "heads": 2, "landmarks": 16},
    "porpoise_amil": {"dim": 16, "attention_dim": 8},
    "snn": {"dim": 16, "layers": 4},
    "porpoise": {"dim": 16, "attention_dim": 8, "fusion_dim": 32, "scale": 2},
    "mcat": {"dim": 16, "heads": 2, "feedforward": 24, "attention_dim": 8},
    "motcat": {"dim": 16, "heads": 2, "feedforward": 24, "attention_dim": 8},
    "cmta": {"dim": 16, "gene_dim": 24, "heads": 2, "landmarks": 16},
    "survpath": {"dim": 16, "attention_dim": 8, "head_dim": 8},
    "mome": {"dim": 16, "heads": 2, "landmarks": 16},
    "mome_no_moe": {"dim": 16, "heads": 2, "landmarks": 16},
    "mome_wsi": {"dim": 16, "heads": 2, "landmarks": 16},
    "mome_genes": {"dim": 16, "heads": 2, "landmarks": 16},
}
GROUPS = {"a": 5, "b": 3, "c": 9}
N_OMIC = 11


def small(key: str, d_in: int = 12, seed: int = 0, **settings) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build(key, SMALL[key] | settings, Dims(d_in, GROUPS, 4, N_OMIC))


def patient(n: int, d_in: int = 12, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        path=torch.randn(n, d_in, generator=generator),
        groups=tuple(torch.randn(size, generator=generator) for size in GROUPS.values()),
        omic_all=torch.randn(N_OMIC, generator=generator),
        patient_id=f"P{seed}",
    )


every = pytest.mark.parametrize("key", list(registry.NEURAL))


def test_every_neural_model_has_a_small_size_here():
    assert set(SMALL) == set(registry.NEURAL)


def test_registry_and_schema_name_the_same_models_and_needs():
    needs = {key: frozenset(part["needs"]) for key, part in schema()["$defs"]["models"].items()}
    assert {key: row.needs for key, row in registry.MODELS.items()} == needs
    assert {key for key, row in registry.MODELS.items() if row.kind == "neural"} == set(registry.NEURAL)


@every
def test_defaults_equal_the_schema(key):
    properties = schema()["$defs"]["models"][key]["properties"]
    assert registry.defaults(key) == {name: value["default"] for name, value in properties.items()}


@every
def test_declarations(key):
    model = registry.NEURAL[key]
    assert model.needs <= {"path", "omic_groups", "omic_all"} and model.needs
    assert model.needs == registry.info(key).needs
    assert model.head in ("hazard", "cox")
    assert isinstance(model.order_sensitive, bool) and isinstance(model.supports, frozenset)


@every
@pytest.mark.parametrize("n", [1, 3, 50, 20_000])
def test_outputs_are_finite_for_any_bag(key, n):
    model = small(key).eval()
    with torch.no_grad():
        out = model(patient(n))
    logits = out["logits"]
    assert logits.shape == (1, 4) and bool(torch.isfinite(logits).all())
    assert -4 <= hazard.risk(logits).item() <= 0
    assert bool(((hazard.hazards(logits) > 0) & (hazard.hazards(logits) < 1)).all())
    assert set(out) == {"logits", "extra_losses", "attn", "aux"}


@every
@pytest.mark.parametrize("d_in", [60, 192])
def test_any_feature_width(key, d_in):
    assert small(key, d_in=d_in)(patient(7, d_in))["logits"].shape == (1, 4)


def trained(key: str) -> torch.nn.Module:
    model = small(key, seed=5)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for seed in range(3):
        loss = hazard.nll_loss(model(patient(20, seed=seed))["logits"], torch.tensor([seed]), torch.tensor([1]))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


@every
def test_same_seed_trains_bit_identically_and_a_round_trip_predicts_identically(key):
    a, b = trained(key), trained(key)
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    buffer = io.BytesIO()
    torch.save(a.state_dict(), buffer)
    buffer.seek(0)
    other = small(key, seed=99)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        first = a.eval()(patient(33))["logits"]
        assert torch.equal(first, a(patient(33))["logits"])
        assert torch.equal(first, other.eval()(patient(33))["logits"])


@every
def test_evaluation_leaves_the_global_random_state_alone(key):
    model = small(key).eval()
    before = torch.get_rng_state()
    with torch.no_grad():
        model(patient(5))
    assert torch.equal(before, torch.get_rng_state())


@every
def test_trainable_parameters_get_gradients_within_32_patients(key):
    """The routed experts of MoME are tested with it: only chosen ones get gradients."""
    model = small(key)
    for seed in range(32):
        # Bins and status cross each other: losses of a model's own may see events only.
        bin_, event = seed % 4, seed // 4 % 2
        out = model(replace(patient(6, seed=seed), bin=bin_, event=event))
        loss = hazard.nll_loss(out["logits"], torch.tensor([bin_]), torch.tensor([event]))
        (loss + sum(out["extra_losses"].values())).backward()
    for name, p in model.named_parameters():
        if p.requires_grad and ".experts." not in name:
            assert p.grad is not None and bool((p.grad != 0).any()), name


@every
def test_patch_order_matters_exactly_where_stated(key):
    model = small(key).eval()
    bag = patient(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = model(bag)["logits"] - model(replace(bag, path=bag.path[order]))["logits"]
    assert (difference.abs().max().item() > 1e-6) == model.order_sensitive


@every
def test_a_batch_without_what_the_model_needs_is_refused_by_patient(key):
    with pytest.raises(MorphomeError, match="P7"):
        small(key)(Batch(patient_id="P7"))
    if "path" in registry.NEURAL[key].needs:
        with pytest.raises(MorphomeError, match="P0"):
            small(key)(patient(4, d_in=13))


def test_unknown_models_settings_and_sizes_are_refused():
    with pytest.raises(MorphomeError, match="'mil' is not a model"):
        build("mil", {}, Dims(12))
    with pytest.raises(MorphomeError, match="baseline"):
        build("random", {}, Dims(12))
    with pytest.raises(MorphomeError, match="width"):
        build("abmil", {"width": 3}, Dims(12))
    with pytest.raises(MorphomeError, match="gene groups"):
        build("mome", {}, Dims(12))
    with pytest.raises(MorphomeError, match="patch features"):
        build("abmil", {}, Dims(0))
