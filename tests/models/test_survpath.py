"""SurvPath: size, formulas, what reads what, invariances, planted genes."""

from __future__ import annotations

import math

import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.hazard import nll_loss, risk
from morphome.models.survpath import FeedForward, PathwayPatchAttention, SurvPath

GROUPS = {"a": 5, "b": 3, "c": 9}
SMALL = {"dim": 16, "attention_dim": 8, "head_dim": 8}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(seed: int = 0, **settings) -> SurvPath:
    torch.manual_seed(seed)
    return SurvPath(12, GROUPS, 4, **(SMALL | settings))


def patient(n: int = 20, seed: int = 0, **parts) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        path=torch.randn(n, 12, generator=generator),
        groups=tuple(torch.randn(size, generator=generator) for size in GROUPS.values()),
        patient_id=f"P{seed}",
        **parts,
    )


def test_parameter_counts_of_the_published_size():
    """331 pathways with 9,745 columns: only their number and sum matter for the count."""
    sizes = {f"p{i}": 29 for i in range(330)} | {"p330": 9745 - 330 * 29}
    with torch.device("meta"):
        model = SurvPath(1024, sizes, 4)
    total = sum(p.numel() for p in model.parameters())
    assert total == 24_768_068
    assert total - sum(p.numel() for p in model.pathways.parameters()) == 411_460


def test_attention_is_the_formula():
    """Scores, softmax and sums token by token in double precision."""
    layer = PathwayPatchAttention(6, 4).double()
    tokens = torch.randn(7, 6, dtype=torch.float64)
    t = 3
    with torch.no_grad():
        out, pathways, patches = layer(tokens, t)
        q, k, v = (tokens @ w.weight.T for w in (layer.query, layer.key, layer.value))
    assert pathways.shape == (3, 7) and patches.shape == (4, 3) and out.shape == (7, 4)
    for i in range(7):
        seen = range(7) if i < t else range(t)
        scores = [math.exp(sum(a * b for a, b in zip(q[i].tolist(), k[j].tolist(), strict=True)) / 2) for j in seen]
        weights = [s / sum(scores) for s in scores]
        expected = sum(w * v[j] for w, j in zip(weights, seen, strict=True))
        torch.testing.assert_close(out[i], expected)
        row = pathways[i] if i < t else patches[i - t]
        torch.testing.assert_close(row, torch.tensor(weights, dtype=torch.float64))


def test_feedforward_is_the_formula():
    layer = FeedForward(5, 0.1).eval()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(5)

    def norm(values: list[float], norm_layer: torch.nn.LayerNorm) -> list[float]:
        mean = sum(values) / 5
        sd = math.sqrt(sum((a - mean) ** 2 for a in values) / 5 + 1e-5)
        rows = zip(values, norm_layer.weight.tolist(), norm_layer.bias.tolist(), strict=True)
        return [(a - mean) / sd * g + b for a, g, b in rows]

    def affine(linear: torch.nn.Linear, values: list[float]) -> list[float]:
        rows = zip(linear.weight.tolist(), linear.bias.tolist(), strict=True)
        return [sum(w * a for w, a in zip(row, values, strict=True)) + b for row, b in rows]

    hidden = [a * 0.5 * (1 + math.erf(a / math.sqrt(2))) for a in affine(layer.first, norm(x.tolist(), layer.norm_in))]
    expected = norm(affine(layer.second, hidden), layer.norm_out)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_evaluation_is_the_formula():
    model = make().eval()
    batch = patient(4)
    with torch.no_grad():
        elu = torch.nn.functional.elu
        first, second = model.pathways.first, model.pathways.second
        rows = [elu(b(elu(a(x)))) for a, b, x in zip(first, second, batch.groups, strict=True)]
        rows += [model.project.weight @ x + model.project.bias for x in batch.path]
        tokens = torch.stack([model.norm(row) for row in rows])
        z = [model.feedforward(row) for row in model.attention(tokens, 3)[0]]
        e = torch.cat([sum(z[:3]) / 3, sum(z[3:]) / 4])
        expected = model.classifier(torch.relu(model.hidden(e)))
        torch.testing.assert_close(model(batch)["logits"], expected[None], atol=1e-5, rtol=1e-5)
        halves = model.encode(batch).z
    torch.testing.assert_close(torch.cat([halves["omic"], halves["path"]], 1), e[None], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 60])
def test_any_bag_in_any_order(n):
    model = make().eval()
    bag = patient(n)
    order = torch.randperm(n)
    with torch.no_grad():
        a = model(bag)
        b = model(Batch(path=bag.path[order], groups=bag.groups))
    assert a["logits"].shape == (1, 4) and -4 <= risk(a["logits"]).item() <= 0
    assert a["attn"]["pathways"].shape == (3, 3 + n) and a["attn"]["patches"].shape == (n, 3)
    for rows in a["attn"].values():
        torch.testing.assert_close(rows.sum(1), torch.ones(len(rows)))
    torch.testing.assert_close(a["logits"], b["logits"], atol=1e-6, rtol=0)
    torch.testing.assert_close(a["attn"]["patches"][order], b["attn"]["patches"], atol=1e-6, rtol=0)


def test_a_patch_reads_pathways_only():
    """The output of a patch is the same whatever the other patches are; that of a pathway is not."""
    model = make().eval()
    path, other = torch.randn(6, 16), torch.randn(6, 16)
    other[0] = path[0]
    genes = torch.randn(3, 16)
    with torch.no_grad():
        a, _, _ = model.attention(torch.cat([genes, path]), 3)
        b, _, _ = model.attention(torch.cat([genes, other]), 3)
        alone, _, _ = model.attention(torch.cat([genes, path[:1]]), 3)
        new_genes, _, _ = model.attention(torch.cat([torch.randn(3, 16), path]), 3)
    torch.testing.assert_close(a[3], b[3])
    torch.testing.assert_close(a[3], alone[3])
    assert not torch.allclose(a[:3], b[:3], atol=1e-3)
    assert not torch.allclose(a[3], new_genes[3], atol=1e-3)


def test_every_parameter_gets_a_gradient_within_a_few_patients():
    model = make()
    for seed in range(8):
        logits = model(patient(5, seed))["logits"]
        nll_loss(logits, torch.tensor([seed % 4]), torch.tensor([seed % 2])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and bool((p.grad != 0).any()), name


def test_evaluation_is_repeatable_saved_whole_and_blind_to_labels():
    model, other = make().eval(), make(seed=9).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        first = model(patient())["logits"]
        assert torch.equal(first, model(patient())["logits"])
        assert torch.equal(first, other(patient())["logits"])
        assert torch.equal(first, model(patient(bin=2, event=1))["logits"])
    assert model(patient())["extra_losses"] == {}


def planted(seed: int, where: str) -> tuple[Batch, bool]:
    """A patient who dies early when one column is raised: of all patches, or of one pathway."""
    batch, early = patient(6, seed), seed % 2 == 0
    column = batch.path[:, 2] if where == "slides" else batch.groups[1][:1]
    column += 1.5 if early else -1.5
    return batch, early


def without(batch: Batch, where: str) -> Batch:
    """One modality replaced by zeros, which is the mean of standardised columns."""
    if where == "slides":
        return Batch(path=torch.zeros_like(batch.path), groups=batch.groups)
    return Batch(path=batch.path, groups=tuple(torch.zeros_like(x) for x in batch.groups))


def order_of_risks(model: SurvPath, where: str, without_it: bool) -> float:
    """Share of pairs (early, late) of 60 new patients in which the early one has the larger risk."""
    early, late = [], []
    with torch.no_grad():
        for seed in range(500, 560):
            batch, yes = planted(seed, where)
            batch = without(batch, where) if without_it else batch
            (early if yes else late).append(risk(model(batch)["logits"]).item())
    return sum((a > b) + 0.5 * (a == b) for a in early for b in late) / (len(early) * len(late))


@pytest.mark.parametrize("where", ["genes", "slides"])
def test_planted_signal_is_found_and_lost_with_its_modality(where):
    model = make(dropout=0.0, feedforward_dropout=0.0)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(120):
        batch, early = planted(step, where)
        loss = nll_loss(model(batch)["logits"], torch.tensor([0 if early else 3]), torch.tensor([1]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    assert order_of_risks(model, where, without_it=False) > 0.75
    assert abs(order_of_risks(model, where, without_it=True) - 0.5) < 0.2


def test_what_does_not_fit_is_refused():
    with pytest.raises(MorphomeError, match="P7"):
        make()(Batch(path=torch.randn(3, 12), patient_id="P7"))
    with pytest.raises(MorphomeError, match="P0"):
        make()(Batch(path=torch.randn(3, 13), groups=patient().groups, patient_id="P0"))
    with pytest.raises(MorphomeError, match="gene groups"):
        make()(Batch(path=torch.randn(3, 12), groups=patient().groups[:2]))
