"""CLAM-SB and CLAM-MB: sizes, attention, the bag's logits and the instance loss against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models import hazard
from morphome.models.batch import Batch
from morphome.models.clam import CLAMMB, CLAMSB

both = pytest.mark.parametrize("model_class", [CLAMSB, CLAMMB])


def small(model_class: type, seed: int = 0, **settings):
    torch.manual_seed(seed)
    return model_class(10, 4, **{"dim": 16, "attention_dim": 8, "dropout": 0.0} | settings)


def linear(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def plain(model, x: torch.Tensor) -> tuple[list, list, list]:
    """Slow re-computation: projected patches, attention rows (lists of N), and logits."""
    w = model.state_dict()
    h = [linear(w, "project.linear", patch).clamp(min=0) for patch in x]
    scores = [
        linear(w, "pool.score", torch.tanh(linear(w, "pool.tanh", v)) * torch.sigmoid(linear(w, "pool.gate", v)))
        for v in h
    ]
    rows, logits = [], []
    for c in range(len(scores[0])):
        exp = [math.exp(s[c]) for s in scores]
        rows.append([e / sum(exp) for e in exp])
        pooled = sum(a * v for a, v in zip(rows[-1], h, strict=True))
        logits.extend(linear(w, f"classifiers.{c}", pooled).tolist())
    return h, rows, logits


def plain_instance_loss(model, x: torch.Tensor, y: int, k: int, margin: float = 0.0) -> float:
    """Mean over 2 k patches of log(1 + exp(margin + wrong score - right score))."""
    h, rows, _ = plain(model, x)
    row = rows[y] if len(rows) > 1 else rows[0]
    ranked = sorted(range(len(h)), key=lambda n: -row[n])
    total = 0.0
    for label, chosen in ((1, ranked[:k]), (0, ranked[len(ranked) - k :])):
        for n in chosen:
            s = linear(model.state_dict(), f"instance_classifiers.{y}", h[n]).tolist()
            total += math.log1p(math.exp(margin + s[1 - label] - s[label]))
    return total / (2 * k)


@pytest.mark.parametrize(
    ("model_class", "settings", "count"),
    [
        (CLAMSB, {}, 793_869),
        (CLAMMB, {}, 794_640),
        (CLAMSB, {"instance_loss": False}, 793_869 - 4 * 1026),
        (CLAMMB, {"instance_loss": False}, 794_640 - 4 * 1026),
    ],
)
def test_parameter_counts(model_class, settings, count):
    with torch.device("meta"):
        model = model_class(1024, 4, **settings)
    assert sum(p.numel() for p in model.parameters()) == count


@both
@pytest.mark.parametrize("n", [1, 2, 3, 20])
def test_logits_and_attention_equal_the_formulas(model_class, n):
    model = small(model_class).eval()
    x = torch.randn(n, 10)
    with torch.no_grad():
        out = model(Batch(path=x))
    _, rows, logits = plain(model, x)
    torch.testing.assert_close(out["logits"], torch.tensor([logits]))
    attention = out["attn"]["gated"]
    assert attention.shape == ((n,) if model_class is CLAMSB else (4, n))
    torch.testing.assert_close(attention.reshape(-1, n), torch.tensor(rows))
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    h = torch.relu(model.project.linear(x))
    torch.testing.assert_close(out["aux"]["pooled"], (torch.tensor(rows) @ h).mean(0, keepdim=True))


@both
@pytest.mark.parametrize(("n", "k"), [(2, 1), (3, 1), (7, 3), (16, 8), (40, 8)])
@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_instance_loss_equals_the_formula(model_class, n, k, margin):
    model = small(model_class, instance_margin=margin)
    x = torch.randn(n, 10)
    for y in range(4):
        losses = model(Batch(path=x, bin=y, event=1))["extra_losses"]
        expected = 0.3 / 0.7 * plain_instance_loss(model, x, y, k, margin)
        assert losses["instance"].item() == pytest.approx(expected, rel=1e-5)


def test_weight_and_number_of_patches_are_settings():
    x = torch.randn(30, 10)
    model = small(CLAMSB, instance_weight=0.5, instance_patches=3)
    loss = model(Batch(path=x, bin=1, event=1))["extra_losses"]["instance"]
    assert loss.item() == pytest.approx(plain_instance_loss(model, x, 1, 3), rel=1e-5)


@both
def test_equal_attention_puts_no_patch_at_both_ends(model_class):
    """Equal patches: k of each label at the same scores, so the loss is the mean of both labels' losses."""
    model = small(model_class)
    x = torch.randn(1, 10).repeat(6, 1)
    loss = model(Batch(path=x, bin=0, event=1))["extra_losses"]["instance"].item() * 0.7 / 0.3
    h, _, _ = plain(model, x)
    a, b = linear(model.state_dict(), "instance_classifiers.0", h[0]).tolist()
    assert loss == pytest.approx((math.log1p(math.exp(a - b)) + math.log1p(math.exp(b - a))) / 2, rel=1e-5)


@both
def test_who_has_no_instance_loss(model_class):
    x = torch.randn(12, 10)
    model = small(model_class)
    assert set(model(Batch(path=x, bin=2, event=1))["extra_losses"]) == {"instance"}
    assert model(Batch(path=x, bin=2, event=0))["extra_losses"] == {}, "censored"
    assert model(Batch(path=x))["extra_losses"] == {}, "no labels"
    assert model(Batch(path=x[:1], bin=2, event=1))["extra_losses"] == {}, "one patch"
    assert small(model_class, instance_loss=False)(Batch(path=x, bin=2, event=1))["extra_losses"] == {}


@both
def test_labels_are_never_used_in_evaluation(model_class):
    model = small(model_class, dropout=0.25).eval()
    x = torch.randn(12, 10)
    with torch.no_grad():
        plain_out, labelled = model(Batch(path=x)), model(Batch(path=x, bin=3, event=1))
    assert torch.equal(plain_out["logits"], labelled["logits"])
    assert labelled["extra_losses"] == {}


@both
def test_labels_do_not_change_the_logits_in_training(model_class):
    model = small(model_class)
    x = torch.randn(12, 10)
    assert torch.equal(model(Batch(path=x))["logits"], model(Batch(path=x, bin=3, event=1))["logits"])


@both
def test_order_of_the_patches_is_immaterial(model_class):
    model = small(model_class)
    x, order = torch.randn(40, 10), torch.randperm(40)
    a, b = model(Batch(path=x, bin=1, event=1)), model(Batch(path=x[order], bin=1, event=1))
    torch.testing.assert_close(a["logits"], b["logits"])
    torch.testing.assert_close(a["attn"]["gated"][..., order], b["attn"]["gated"])
    torch.testing.assert_close(a["extra_losses"]["instance"], b["extra_losses"]["instance"])


@both
def test_every_parameter_gets_a_gradient_within_eight_patients(model_class):
    model = small(model_class, dropout=0.25)
    for i in range(8):
        out = model(Batch(path=torch.randn(6, 10), bin=i % 4, event=i // 4))
        loss = hazard.nll_loss(out["logits"], torch.tensor([i % 4]), torch.tensor([i // 4]))
        (loss + sum(out["extra_losses"].values())).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and bool((p.grad != 0).any()), name


@both
def test_only_the_classifier_of_the_bin_learns_and_the_projection_with_it(model_class):
    model = small(model_class)
    model(Batch(path=torch.randn(9, 10), bin=2, event=1))["extra_losses"]["instance"].backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    parts = ("weight", "bias")
    expected = {f"{block}.{part}" for block in ("project.linear", "instance_classifiers.2") for part in parts}
    assert learns == expected


@both
def test_a_saved_model_predicts_the_same(model_class):
    a, b = small(model_class).eval(), small(model_class, seed=1).eval()
    b.load_state_dict(a.state_dict())
    x = torch.randn(5, 10)
    with torch.no_grad():
        first = a(Batch(path=x))["logits"]
        assert torch.equal(first, a(Batch(path=x))["logits"])
        assert torch.equal(first, b(Batch(path=x))["logits"])


@both
def test_impossible_settings_and_wrong_widths_are_refused(model_class):
    with pytest.raises(MorphomeError, match=rf"{model_class.key}.instance_weight"):
        small(model_class, instance_weight=1.0)
    with pytest.raises(MorphomeError, match="instance_patches"):
        small(model_class, instance_patches=0)
    with pytest.raises(MorphomeError, match="P3"):
        small(model_class)(Batch(path=torch.randn(2, 9), patient_id="P3"))
