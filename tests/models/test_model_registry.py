"""One test file over every registered model: settings, shapes, determinism, gradients, invariances."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from morphome.config import schema
from morphome.errors import MorphomeError
from morphome.models import hazard, registry
from morphome.models.batch import Batch
from morphome.models.catalog import models
from morphome.models.fusion import OUTPUT
from morphome.models.registry import Dims, build

SMALL = yaml.safe_load((Path(__file__).parents[1] / "data" / "small_models.yaml").read_text(encoding="utf-8"))
KEYS = [key for key, row in models().items() if row.kind == "neural"]
GROUPS = {"a": 5, "b": 3, "c": 9}
N_OMIC = 11


def dims(key: str, d_in: int) -> Dims:
    """Sizes for a model; its centres or prototypes, which bags of standard normal patches all reach."""
    centres = np.random.default_rng(0).normal(size=(4, d_in)).astype(np.float32)
    parts = {"deep_attn_misl": {"centres": centres[:3]}, "mmp": {"prototypes": centres}}.get(key, {})
    return Dims(d_in, GROUPS, 4, N_OMIC, n_rna=7, n_cnv=4, n_mut=3, parts=parts)


def small(key: str, d_in: int = 12, seed: int = 0, **settings) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build(key, SMALL[key] | settings, dims(key, d_in))


def output(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits (1, 4) or log risk (1, 1)."""
    return model(batch)[OUTPUT[model.head]]


def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of a hazard head; for a Cox head what its window would back-propagate, up to a factor."""
    out = model(batch)
    if model.head == "cox":
        main = out["log_risk"].squeeze() * (1.0 if batch.event else -0.5)
    else:
        main = hazard.nll_loss(out["logits"], torch.tensor([batch.bin]), torch.tensor([batch.event]))
    return main + sum(out["extra_losses"].values())


def patient(n: int, d_in: int = 12, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        path=torch.randn(n, d_in, generator=generator),
        groups=tuple(torch.randn(size, generator=generator) for size in GROUPS.values()),
        omic_all=torch.randn(N_OMIC, generator=generator),
        rna=torch.randn(7, generator=generator),
        cnv=torch.randn(4, generator=generator),
        mut=torch.randn(3, generator=generator),
        patient_id=f"P{seed}",
    )


every = pytest.mark.parametrize("key", KEYS)


def test_every_neural_model_has_a_small_size_here():
    assert set(SMALL) == set(models())


def test_the_catalogue_says_what_the_classes_need():
    for key, row in models().items():
        assert row.load().needs == row.needs, key
        if row.kind == "neural":
            assert row.load().head == row.head, key
            assert getattr(row.load(), "trains_with", frozenset()) == row.trains_with, key


@every
def test_defaults_equal_the_schema(key):
    properties = schema()["$defs"]["models"][key]["properties"]
    assert registry.defaults(key) == {name: value["default"] for name, value in properties.items()}


@every
def test_declarations(key):
    model = registry.network(key)
    assert model.needs <= {"path", "omic_groups", "omic_all", "rna", "cnv", "mut"} and model.needs
    assert model.head in ("hazard", "cox")
    assert isinstance(model.order_sensitive, bool) and isinstance(model.supports, frozenset)


@every
@pytest.mark.parametrize("n", [1, 3, 50, 20_000])
def test_outputs_are_finite_for_any_bag(key, n):
    model = small(key).eval()
    with torch.no_grad():
        out = model(patient(n))
    found = out[OUTPUT[model.head]]
    assert found.shape == (1, 4 if model.head == "hazard" else 1) and bool(torch.isfinite(found).all())
    if model.head == "hazard":
        assert -4 <= hazard.risk(found).item() <= 0
        assert bool(((hazard.hazards(found) > 0) & (hazard.hazards(found) < 1)).all())
    assert set(out) == {OUTPUT[model.head], "extra_losses", "attn", "aux"}


@every
@pytest.mark.parametrize("d_in", [60, 192])
def test_any_feature_width(key, d_in):
    model = small(key, d_in=d_in)
    batch = replace(patient(7, d_in), bin=1, event=1)
    assert output(model, batch).shape == (1, 4 if model.head == "hazard" else 1)


def trained(key: str) -> torch.nn.Module:
    model = small(key, seed=5)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for seed in range(3):
        loss(model, replace(patient(20, seed=seed), bin=seed, event=1)).backward()
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
        first = output(a.eval(), patient(33))
        assert torch.equal(first, output(a, patient(33)))
        assert torch.equal(first, output(other.eval(), patient(33)))


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
        loss(model, replace(patient(6, seed=seed), bin=seed % 4, event=seed // 4 % 2)).backward()
    for name, p in model.named_parameters():
        if p.requires_grad and ".experts." not in name:
            assert p.grad is not None and bool((p.grad != 0).any()), name


@every
def test_patch_order_matters_exactly_where_stated(key):
    model = small(key).eval()
    bag = patient(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = output(model, bag) - output(model, replace(bag, path=bag.path[order]))
    assert (difference.abs().max().item() > 1e-6) == model.order_sensitive


@every
def test_a_batch_without_what_the_model_needs_is_refused_by_patient(key):
    with pytest.raises(MorphomeError, match="P7"):
        small(key)(Batch(patient_id="P7"))
    if "path" in registry.network(key).needs:
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
