"""DSMIL: size, both streams against plain formulas, ties, invariance."""

from __future__ import annotations

import math

import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models import hazard
from morphome.models.batch import Batch
from morphome.models.dsmil import DSMIL


def small(seed: int = 0, **settings) -> DSMIL:
    torch.manual_seed(seed)
    return DSMIL(10, 4, **{"dim": 16, "query_dim": 6, "dropout": 0.0} | settings)


def plain(model: DSMIL, x: torch.Tensor) -> tuple[list, list, list]:
    """Slow re-computation patch by patch: logits (K), attention (K, N), critical patches (K)."""
    w = model.state_dict()

    def linear(name, v):
        return w[f"{name}.weight"] @ v + w[f"{name}.bias"]

    h = [linear("project.linear", patch).clamp(min=0) for patch in x]
    c = [linear("instance", v).tolist() for v in h]
    q = [linear("query", v) for v in h]
    v = [linear("value", u) for u in h]
    critical, rows, pooled = [], [], []
    for k in range(len(c[0])):
        critical.append(max(range(len(h)), key=lambda n: c[n][k]))
        exp = [math.exp(float(u @ q[critical[k]]) / math.sqrt(len(u))) for u in q]
        rows.append([e / sum(exp) for e in exp])
        b = sum(a * u for a, u in zip(rows[k], v, strict=True))
        if "norm.weight" in w:
            b = (b - b.mean()) / torch.sqrt(b.var(unbiased=False) + 1e-5) * w["norm.weight"] + w["norm.bias"]
        pooled.append(b)
    logits = []
    for k in range(len(critical)):
        second = sum(float(kernel @ b) for kernel, b in zip(w["bag.weight"][k], pooled, strict=True))
        logits.append((c[critical[k]][k] + second + float(w["bag.bias"][k])) / 2)
    return logits, rows, critical


@pytest.mark.parametrize(("ln", "count"), [(True, 995_720), (False, 994_696)])
def test_parameter_count(ln, count):
    with torch.device("meta"):
        model = DSMIL(1024, 4, ln=ln)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("ln", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 25])
def test_everything_equals_the_formulas(ln, n):
    model = small(ln=ln).eval()
    if ln:  # a fresh norm is the identity in scale and shift
        torch.nn.init.normal_(model.norm.weight)
        torch.nn.init.normal_(model.norm.bias)
    x = 3 * torch.randn(n, 10)
    with torch.no_grad():
        out = model(Batch(path=x))
    logits, rows, critical = plain(model, x)
    torch.testing.assert_close(out["logits"], torch.tensor([logits]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["attn"]["bag"], torch.tensor(rows), rtol=1e-4, atol=1e-6)
    assert out["aux"]["critical"].tolist() == critical
    with torch.no_grad():
        pooled = model.norm(model.value(torch.tensor(rows) @ torch.relu(model.project.linear(x)))).mean(0, keepdim=True)
    torch.testing.assert_close(out["aux"]["pooled"], pooled, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out["attn"]["bag"].sum(1), torch.ones(4))


def test_gradients_equal_those_of_the_unfolded_formulas():
    """Pooling before the value layer and folding the queries change neither values nor gradients."""
    model = small()
    x = 3 * torch.randn(15, 10)
    model(Batch(path=x))["logits"].square().sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    h = model.project(x)
    c, q, v = model.instance(h), model.query(h), model.value(h)
    attention = torch.softmax(q @ q[c.argmax(0)].T / math.sqrt(6), 0)
    second = model.bag(model.norm(attention.T @ v).unsqueeze(0)).squeeze(-1)
    ((c.max(0).values + second) / 2).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_ties_go_to_the_first_patch():
    model = small().eval()
    x = torch.randn(1, 10).repeat(5, 1)
    with torch.no_grad():
        out = model(Batch(path=x))
    assert out["aux"]["critical"].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(out["attn"]["bag"], torch.full((4, 5), 0.2))


def test_order_of_the_patches_is_immaterial():
    model = small().eval()
    x, order = torch.randn(40, 10), torch.randperm(40)
    with torch.no_grad():
        a, b = model(Batch(path=x)), model(Batch(path=x[order]))
    torch.testing.assert_close(a["logits"], b["logits"])
    torch.testing.assert_close(a["attn"]["bag"][:, order], b["attn"]["bag"])
    assert torch.equal(a["aux"]["critical"], order[b["aux"]["critical"]])


def test_every_parameter_gets_a_gradient_within_four_patients():
    model = small(dropout=0.25)
    for i in range(4):
        logits = model(Batch(path=torch.randn(6, 10)))["logits"]
        hazard.nll_loss(logits, torch.tensor([i]), torch.tensor([i % 2])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and bool((p.grad != 0).any()), name


def test_labels_are_not_read_and_a_saved_model_predicts_the_same():
    a, b = small(dropout=0.25).eval(), small(seed=1).eval()
    b.load_state_dict(a.state_dict())
    x = torch.randn(5, 10)
    with torch.no_grad():
        first = a(Batch(path=x))["logits"]
        assert torch.equal(first, a(Batch(path=x, bin=1, event=1))["logits"])
        assert torch.equal(first, b(Batch(path=x))["logits"])


def test_a_wrong_width_is_refused():
    with pytest.raises(MorphomeError, match="P3"):
        small()(Batch(path=torch.randn(2, 9), patient_id="P3"))
