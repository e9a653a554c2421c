"""Shared blocks against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models import layers


def test_dropout_keeps_the_asked_share_and_the_mean():
    torch.manual_seed(0)
    x = torch.ones(400, 500)
    for p in (0.1, 0.25, 0.5):
        out = layers.Dropout(p)(x)
        assert (out == 0).float().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / x.numel()))
        assert out.max().item() == pytest.approx(1 / (1 - p), rel=1e-4)
    mask, kept = layers.keep_mask(torch.ones(3, 5), 0.25)
    assert mask.shape == (3, 5) and kept == 0.75


def test_dropout_masks_are_independent_between_neighbours():
    torch.manual_seed(1)
    mask, _ = layers.keep_mask(torch.ones(100_000), 0.25)
    centred = mask - mask.mean()
    for lag in (1, 2, 3, 4, 8):
        assert abs((centred[lag:] * centred[:-lag]).mean().item() / centred.var().item()) < 0.015


def test_dropout_is_seeded_and_off_in_evaluation():
    x = torch.ones(50)
    for block in (layers.Dropout(0.25), layers.AlphaDropout(0.25)):
        torch.manual_seed(3)
        a = block(x)
        torch.manual_seed(3)
        assert torch.equal(a, block(x))
        assert not torch.equal(a, block(x))
        assert block.eval()(x) is x
    with pytest.raises(MorphomeError, match="dropout"):
        layers.Dropout(1.0)


def test_alpha_dropout_keeps_mean_and_variance_and_equals_the_formula():
    torch.manual_seed(0)
    x = torch.randn(400, 500)
    out = layers.AlphaDropout(0.25)(x)
    assert out.mean().item() == pytest.approx(0, abs=0.02)
    assert out.std().item() == pytest.approx(1, abs=0.02)
    # dropped units all have one value, kept ones are a linear map of x; both as torch computes them
    torch.manual_seed(0)
    reference = torch.nn.AlphaDropout(0.25)(torch.zeros(10_000)).unique()
    torch.testing.assert_close(layers.AlphaDropout(0.25)(torch.zeros(10_000)).unique(), reference)


def test_rms_norm():
    x = torch.randn(4, 6)
    norm = layers.RMSNorm(6)
    torch.nn.init.normal_(norm.weight)
    expected = x / torch.sqrt((x**2).mean(1, keepdim=True) + 1e-6) * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_group_encoder_is_one_snn_pair_per_group():
    torch.manual_seed(0)
    encoder = layers.GroupEncoder([3, 1, 7], 8).eval()
    groups = tuple(torch.randn(n) for n in (3, 1, 7))
    out = encoder(groups)
    for g, x in enumerate(groups):
        hidden = torch.nn.functional.elu(encoder.first[g](x))
        torch.testing.assert_close(out[g], torch.nn.functional.elu(encoder.second[g](hidden)))
    with pytest.raises(MorphomeError, match="gene groups"):
        encoder(groups[:2])


def test_group_encoder_stands_in_for_missing_genes_only_when_asked():
    torch.manual_seed(0)
    encoder, groups = layers.GroupEncoder([3, 1], 8).eval(), (torch.randn(3), torch.randn(1))
    with pytest.raises(MorphomeError, match="0 gene groups"):
        encoder(None)
    names, before = list(encoder.state_dict()), encoder(groups)
    encoder.add_missing()
    assert list(encoder.state_dict()) == ["missing", *names] and torch.equal(encoder(groups), before)
    tokens = encoder(None)
    assert tokens.shape == (2, 8) and not torch.equal(tokens[0], tokens[1])
    assert 0 < tokens.abs().max() < 10 * layers.MISSING_SD


def test_gated_attention_pools_with_its_weights():
    torch.manual_seed(0)
    pool = layers.GatedAttention(6, 5, 3).eval()
    h = torch.randn(9, 6)
    pooled, weights = pool(h)
    scores = pool.score(torch.tanh(pool.tanh(h)) * torch.sigmoid(pool.gate(h)))
    torch.testing.assert_close(weights, scores.exp() / scores.exp().sum(0))
    torch.testing.assert_close(pooled, torch.einsum("nc,nd->cd", weights, h))


@pytest.mark.parametrize(("norm", "extra"), [("rms", 16), ("layer", 32)])
def test_trans_layer_is_a_weighted_residual(norm, extra):
    torch.manual_seed(0)
    layer = layers.TransLayer(16, norm, layers.ADMIN_OMEGA, {"heads": 2, "landmarks": 8}).eval()
    attention = sum(p.numel() for p in layer.attention.parameters())
    assert sum(p.numel() for p in layer.parameters()) - attention == extra
    x = torch.randn(5, 16)
    torch.testing.assert_close(layer(x), 1.7595671 * x + layer.attention(layer.norm(x)[None])[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(layer(x, keep=(1, 3)), layer(x)[1:3], atol=1e-6, rtol=1e-6)


def test_rms_norm_has_the_gradients_of_its_formula():
    generator = torch.Generator().manual_seed(2)
    norm = layers.RMSNorm(6).double()
    with torch.no_grad():
        norm.weight.copy_(torch.rand(6, generator=generator) + 0.5)
    for shape in ((4, 6), (2, 3, 6), (6,)):
        x = torch.randn(*shape, generator=generator).double().requires_grad_()
        weight = torch.randn(*shape, generator=generator).double()
        expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight
        torch.testing.assert_close(norm(x), expected)
        ours, theirs = (torch.autograd.grad((y * weight).sum(), [x, norm.weight]) for y in (norm(x), expected))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    norm.weight.requires_grad_(False)
    norm(x).sum().backward()
    assert norm.weight.grad is None and bool((x.grad != 0).any())


def test_rms_norm_is_in_float32_inside_autocast():
    norm, x = layers.RMSNorm(32), torch.randn(5, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(x).dtype == torch.float32
        assert torch.equal(norm(x), norm(x.float()))
