"""Deep Sets: size, the three poolings, invariance."""

from __future__ import annotations

import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models import hazard
from morphome.models.batch import Batch
from morphome.models.deep_sets import POOLS, DeepSets


def small(**settings) -> DeepSets:
    torch.manual_seed(0)
    return DeepSets(10, 4, **{"dim": 16, "head_dim": 8} | settings)


def logits(model: DeepSets, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(Batch(path=x))["logits"]


def test_parameter_count():
    with torch.device("meta"):
        model = DeepSets(1024, 4)
    assert sum(p.numel() for p in model.parameters()) == 657_156


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_formula(pool, n):
    model = small(pool=pool)
    x = torch.randn(n, 10)
    w = model.state_dict()
    total = torch.zeros(16)
    for patch in x:
        total += (w["project.linear.weight"] @ patch + w["project.linear.bias"]).clamp(min=0)
    pooled = total / {"mean": n, "sum": 1, "sum_over_sqrtN": n**0.5}[pool]
    hidden = (w["hidden.linear.weight"] @ pooled + w["hidden.linear.bias"]).clamp(min=0)
    expected = w["classifier.weight"] @ hidden + w["classifier.bias"]
    torch.testing.assert_close(logits(model, x), expected.unsqueeze(0))
    torch.testing.assert_close(model(Batch(path=x))["aux"]["pooled"], pooled.unsqueeze(0))


@pytest.mark.parametrize("pool", POOLS)
def test_order_of_the_patches_is_immaterial(pool):
    model = small(pool=pool)
    x = torch.randn(40, 10)
    torch.testing.assert_close(logits(model, x), logits(model, x.flip(0)))


def test_the_mean_alone_ignores_that_every_patch_is_there_twice():
    x = torch.randn(7, 10)
    for pool in POOLS:
        model = small(pool=pool)
        same = torch.allclose(logits(model, x), logits(model, torch.cat([x, x])), atol=1e-6)
        assert same == (pool == "mean"), pool


def test_large_bags_saturate_the_published_sum_only():
    x = torch.randn(20_000, 10)
    assert logits(small(pool="sum"), x).abs().max() > 100
    assert logits(small(), x).abs().max() < 2


@pytest.mark.parametrize("pool", POOLS)
def test_every_parameter_gets_a_gradient_and_labels_are_not_read(pool):
    model = small(pool=pool)
    for seed in range(4):
        batch = Batch(path=torch.randn(3, 10))
        hazard.nll_loss(model(batch)["logits"], torch.tensor([seed]), torch.tensor([seed % 2])).backward()
    for name, p in model.named_parameters():
        assert bool((p.grad != 0).any()), name
    x, model = torch.randn(5, 10), model.eval()
    out = model(Batch(path=x, bin=2, event=1))
    assert torch.equal(out["logits"], model(Batch(path=x))["logits"])
    assert out["extra_losses"] == {} and out["attn"] == {}


def test_a_saved_model_predicts_the_same():
    a, b = small(pool="sum"), DeepSets(10, 4, dim=16, head_dim=8, pool="sum")
    b.load_state_dict(a.state_dict())
    x = torch.randn(5, 10)
    assert torch.equal(logits(a, x), logits(a, x))
    assert torch.equal(logits(a, x), logits(b, x))


def test_unknown_pool_and_wrong_width_are_refused():
    with pytest.raises(MorphomeError, match="'max' is not known"):
        small(pool="max")
    with pytest.raises(MorphomeError, match="P3"):
        small()(Batch(path=torch.randn(2, 9), patient_id="P3"))
