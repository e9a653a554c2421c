"""Nyström attention: against the published package, against exact attention, and its invariances."""

from __future__ import annotations

import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models import nystrom
from morphome.models.nystrom import NystromAttention

published = pytest.importorskip("nystrom_attention")


def make(mode: str, dim=32, heads=4, landmarks=8, value_conv=True, seed=0) -> NystromAttention:
    torch.manual_seed(seed)
    return NystromAttention(dim, heads, landmarks, mode, value_conv).eval()


def tokens(n: int, dim=32, batch=1, seed=1) -> torch.Tensor:
    return torch.randn(batch, n, dim, generator=torch.Generator().manual_seed(seed))


def twin(layer: NystromAttention, landmarks: int) -> torch.nn.Module:
    """The published layer with the same weights."""
    dim = layer.out.in_features
    other = published.NystromAttention(
        dim=dim, dim_head=dim // layer.heads, heads=layer.heads, num_landmarks=landmarks, dropout=0.0
    ).eval()
    with torch.no_grad():
        other.to_qkv.weight.copy_(torch.cat([layer.query.weight, layer.key.weight, layer.value.weight]))
        other.to_out[0].load_state_dict(layer.out.state_dict())
        other.res_conv.weight.copy_(layer.value_kernel[:, None, :, None])
    return other


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("n", [1, 5, 8, 9, 40, 61])
def test_compat_equals_the_published_layer(n, batch):
    layer = make("nystrom_compat")
    x = tokens(n, batch=batch)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), twin(layer, 8)(x), atol=2e-5, rtol=1e-4)


def test_parameter_count():
    with torch.device("meta"):
        layer = NystromAttention(512)
    count = 3 * 512**2 + 512**2 + 512 + 33 * 8
    assert sum(p.numel() for p in layer.parameters()) == count == 1_049_352


@pytest.mark.parametrize("n", [16, 64])
def test_masked_equals_compat_where_nothing_is_padded(n):
    masked, compat = make("nystrom_masked"), make("nystrom_compat")
    x = tokens(n)
    with torch.no_grad():
        assert relative(masked(x), compat(x)) < 5e-3


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_short_sequences_are_exact(n):
    x = tokens(n)
    with torch.no_grad():
        torch.testing.assert_close(make("nystrom_masked")(x), make("exact")(x), atol=1e-6, rtol=0)


def test_exact_is_softmax_attention_with_a_convolution():
    layer = make("exact")
    x = tokens(50)
    with torch.no_grad():
        q, k, v = (p(x)[0].unflatten(-1, (4, 8)).transpose(0, 1) for p in (layer.query, layer.key, layer.value))
        out = (q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v
        conv = torch.stack(
            [torch.conv1d(v[h].T[:, None], layer.value_kernel[h, None, None], padding=16)[:, 0].T for h in range(4)]
        )
        expected = layer.out((out + conv).transpose(0, 1).flatten(1))
        torch.testing.assert_close(layer(x)[0], expected, atol=1e-5, rtol=0)


def test_short_sequences_drown_in_padding_only_as_published():
    """Eight tokens and 256 landmarks: relative error of the published layer about .76, ours 0."""
    torch.manual_seed(0)
    layers = {m: NystromAttention(128, 2, 256, m, False).eval() for m in nystrom.MODES}
    for layer in layers.values():
        layer.load_state_dict(layers["exact"].state_dict())
    x = tokens(8, 128)
    with torch.no_grad():
        exact = layers["exact"](x)
        assert relative(layers["nystrom_compat"](x), exact) > 0.3
        assert relative(layers["nystrom_masked"](x), exact) < 1e-6


@pytest.mark.parametrize("value_conv", [True, False])
@pytest.mark.parametrize("n", [1, 8, 9, 63, 64, 65, 200])
def test_auto_is_exact_up_to_eight_tokens_per_landmark(n, value_conv):
    layers = {m: make(m, value_conv=value_conv) for m in ("auto", "exact", "nystrom_masked")}
    x = tokens(n)
    with torch.no_grad():
        out = {mode: layer(x) for mode, layer in layers.items()}
        assert torch.equal(out["auto"], out["exact" if n <= 64 else "nystrom_masked"])
        assert n <= 8 or not torch.equal(out["exact"], out["nystrom_masked"])
        # a row or two are cheaper exactly at any length
        few = layers["auto"](x, keep=(0, 1))
        assert torch.equal(few, layers["exact"](x, keep=(0, 1)))
        torch.testing.assert_close(few, out["exact"][:, :1], atol=1e-5, rtol=1e-4)
    assert (layers["auto"].pinv_error is None) and (layers["nystrom_masked"].pinv_error is None) == (n <= 8)


@pytest.mark.parametrize("mode", nystrom.MODES)
@pytest.mark.parametrize("n", [1, 6, 37, 60])
def test_keep_computes_rows_of_the_whole(mode, n):
    layer, x = make(mode), tokens(n)
    with torch.no_grad():
        whole = layer(x)
        for keep in {(0, 1), (0, min(4, n)), (n // 2, n), (0, n)}:
            torch.testing.assert_close(layer(x, keep=keep), whole[:, keep[0] : keep[1]], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["nystrom_masked", "exact"])
@pytest.mark.parametrize("n", [5, 8, 30, 61])
@pytest.mark.parametrize("extra", [0, 1, 500])
def test_padding_and_batch_mates_change_nothing(mode, n, extra):
    layer, x = make(mode), tokens(n)
    padded = torch.cat([torch.cat([x, 9 * tokens(extra, seed=2)], 1), 5 * tokens(n + extra, seed=3)])
    with torch.no_grad():
        out = layer(padded, lengths=torch.tensor([n, n + extra]))
        torch.testing.assert_close(out[:1, :n], layer(x), atol=1e-5, rtol=0)
        assert bool((out[0, n:] == 0).all())
        # without lengths, whole items do not see each other either
        twice = torch.cat([x, 7 * tokens(n, seed=4)])
        torch.testing.assert_close(layer(twice)[:1], layer(x), atol=1e-5, rtol=0)


def test_an_item_without_tokens_is_zero_not_nan():
    out = make("nystrom_masked")(tokens(4, batch=2), lengths=torch.tensor([0, 4]))
    assert bool((out[0] == 0).all()) and bool(torch.isfinite(out).all())


def test_lengths_are_refused_where_they_have_no_meaning():
    with pytest.raises(MorphomeError, match="lengths"):
        make("nystrom_compat")(tokens(4), lengths=torch.tensor([3]))


@pytest.mark.parametrize("n", [7, 60])
def test_order_dependence(n):
    x = tokens(n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        plain = make("exact", value_conv=False)
        torch.testing.assert_close(plain(x[:, order]), plain(x)[:, order], atol=1e-6, rtol=0)
        conv = make("exact")
        assert relative(conv(x[:, order]), conv(x)[:, order]) > 1e-2
        if n > 8:
            landmarks = make("nystrom_masked", value_conv=False)
            assert relative(landmarks(x[:, order]), landmarks(x)[:, order]) > 1e-3


def test_every_landmark_has_a_token_and_segments_are_contiguous_means():
    x = torch.arange(11, dtype=torch.float64).view(1, 11, 1)
    means = nystrom._segment_means(x, 4).flatten()
    # floor(4 t / 11): tokens 0-2, 3-5, 6-8, 9-10
    assert means.tolist() == [1, 4, 7, 9.5]


def test_pseudo_inverse_inverts_and_scales_per_matrix():
    generator = torch.Generator().manual_seed(6)
    a = (3 * torch.eye(12) + torch.randn(2, 3, 12, 12, generator=generator)).softmax(-1).double()
    z = nystrom.pseudo_inverse(a, 12)
    torch.testing.assert_close(a @ z @ a, a, atol=1e-6, rtol=0)
    alone = nystrom.pseudo_inverse(a[:1], 2)
    torch.testing.assert_close(nystrom.pseudo_inverse(a, 2)[:1], alone)
    assert nystrom.pinv_error(a, z) < 1e-5 < nystrom.pinv_error(a, alone)


def test_error_of_the_pseudo_inverse_and_its_estimate():
    generator = torch.Generator().manual_seed(7)
    a = (4 * torch.eye(48) + 2 * torch.randn(3, 48, 48, generator=generator)).softmax(-1)
    z = nystrom.pseudo_inverse(a, 6)
    rest = a @ z @ a - a
    expected = max((rest[i].square().sum() / a[i].square().sum()).sqrt().item() for i in range(3))
    assert nystrom.pinv_error(a, z) == pytest.approx(expected, rel=1e-4) and expected > 1e-3
    state = torch.get_rng_state()
    assert nystrom.pinv_error(a, z, 16) == nystrom.pinv_error(a, z, 16) == pytest.approx(expected, rel=0.2)
    assert torch.equal(state, torch.get_rng_state())


def test_half_precision_attention_runs_in_float32():
    layer, x = make("nystrom_masked"), tokens(50)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
    with torch.no_grad():
        assert relative(low.float(), layer(x)) < 0.03


def test_settings_are_checked():
    with pytest.raises(MorphomeError, match="attention"):
        make("flash")
    with pytest.raises(MorphomeError, match="heads"):
        NystromAttention(30, 4)


def test_few_rows_have_the_gradients_of_the_whole(monkeypatch):
    """Carrying queries to the tokens is the same function as projecting every token."""
    layer, x = make("exact").double(), tokens(70).double().requires_grad_()
    inputs = [x, *layer.parameters()]
    few = layer(x, keep=(30, 33))
    assert torch.allclose(few, layer(x)[:, 30:33], atol=1e-12)
    weight = torch.randn_like(few)
    monkeypatch.setattr(layer, "_few_rows", None)  # the whole must not take the short way
    whole = layer(x)[:, 30:33]
    a = torch.autograd.grad((few * weight).sum(), inputs)
    b = torch.autograd.grad((whole * weight).sum(), inputs)
    for ours, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("iterations", [0, 1, 2, 6])
@pytest.mark.parametrize("per_matrix", [True, False])
def test_the_applied_pseudo_inverse_is_the_pseudo_inverse_times_the_vectors(iterations, per_matrix):
    generator = torch.Generator().manual_seed(8)
    a = (2 * torch.eye(24) + torch.randn(2, 3, 24, 24, generator=generator)).double().requires_grad_()
    g = torch.randn(2, 3, 24, 5, generator=generator).double().requires_grad_()
    weight = torch.randn(2, 3, 24, 5, generator=generator).double()
    found = nystrom.apply_pseudo_inverse(a.softmax(-1), g, iterations, per_matrix=per_matrix)
    expected = nystrom.pseudo_inverse(a.softmax(-1), iterations, per_matrix=per_matrix) @ g
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-9)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), [a, g]) for out in (found, expected))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-8)
    single = nystrom.apply_pseudo_inverse(a.float().softmax(-1), g.float(), iterations, per_matrix=per_matrix)
    assert relative(single.double(), expected) < 1e-4


@pytest.mark.parametrize("n", [9, 61, 64])
def test_training_and_evaluation_agree(n):
    layer, x = make("nystrom_masked"), tokens(n)
    with torch.no_grad():
        torch.testing.assert_close(layer.train()(x), layer.eval()(x), atol=1e-5, rtol=1e-4)
