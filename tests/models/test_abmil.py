"""ABMIL: size, attention, invariance."""

from __future__ import annotations

import torch

from morphome.models.abmil import ABMIL
from morphome.models.batch import Batch


def test_parameter_count():
    with torch.device("meta"):
        model = ABMIL(1024, 4)
    assert sum(p.numel() for p in model.parameters()) == 920_069


def test_attention_sums_to_one_and_follows_the_patches():
    torch.manual_seed(0)
    model = ABMIL(10, 4, dim=16, attention_dim=8, head_dim=8).eval()
    x = torch.randn(40, 10)
    order = torch.randperm(40)
    with torch.no_grad():
        a, b = model(Batch(path=x)), model(Batch(path=x[order]))
    weights = a["attn"]["gated"]
    assert weights.shape == (40,)
    assert abs(weights.sum().item() - 1) < 1e-5
    torch.testing.assert_close(weights[order], b["attn"]["gated"])
    torch.testing.assert_close(a["logits"], b["logits"])


def test_the_pooled_bag_is_handed_out_with_its_gradient():
    torch.manual_seed(0)
    model = ABMIL(10, 4, dim=16, attention_dim=8, head_dim=8).eval()
    x = torch.randn(40, 10)
    out = model(Batch(path=x))
    pooled = (out["attn"]["gated"][:, None] * torch.relu(model.project.linear(x))).sum(0)
    torch.testing.assert_close(out["aux"]["pooled"], pooled[None])
    out["aux"]["pooled"].sum().backward()
    assert bool(model.project.linear.weight.grad.any()) and model.classifier.weight.grad is None


def test_genes_are_ignored():
    torch.manual_seed(0)
    model = ABMIL(10, 4, dim=16, attention_dim=8, head_dim=8).eval()
    x = torch.randn(5, 10)
    with torch.no_grad():
        assert torch.equal(model(Batch(path=x))["logits"], model(Batch(x, None, (x[0],)))["logits"])
