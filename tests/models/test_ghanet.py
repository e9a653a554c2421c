"""G-HANet: size, formulas, chosen genes, gradients, invariances, genes read off the slides."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.ghanet import GHANet, differing_columns, reconstruction_r
from morphome.models.ghanet_blocks import HeadAttention, scaled_cosine_error, top_share
from morphome.models.hazard import nll_loss, risk
from morphome.models.parts import TrainingSample

GROUPS = {"a": 5, "b": 3, "c": 9}
PARTS = {"group_0": np.array([0, 3]), "group_1": np.array([1]), "group_2": np.array([2, 5, 8])}
SMALL = {"dim": 16, "heads": 4, "feedforward": 24, "attention_dim": 8, "head_dim": 6}
SETTINGS = {"p_value": 0.05, "min_genes": 8, "low_risk_bin": 2}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(seed: int = 0, parts: dict | None = None, **settings) -> GHANet:
    torch.manual_seed(seed)
    return GHANet(12, GROUPS, 4, PARTS if parts is None else parts, **(SMALL | settings))


def patient(n: int = 20, seed: int = 0, genes: bool = True, **parts) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    path = torch.randn(n, 12, generator=generator)
    groups = tuple(torch.randn(size, generator=generator) for size in GROUPS.values()) if genes else None
    return Batch(path=path, groups=groups, patient_id=f"P{seed}", **parts)


def survival_loss(out: dict, seed: int = 0) -> torch.Tensor:
    return nll_loss(out["logits"], torch.tensor([seed % 4]), torch.tensor([seed % 2]))


def sample(groups: tuple[np.ndarray, ...], bins: np.ndarray, event: np.ndarray) -> TrainingSample:
    return TrainingSample(np.asarray(bins) + 1.0, event, bins, groups, lambda most: np.empty((0, 12), np.float32), 0)


def test_parameter_counts_of_the_published_size():
    """The published count holds a second cross-attention, which is used here only when it is asked for."""
    sizes = dict(zip("abcdef", (94, 334, 521, 468, 1495, 479), strict=True))
    with torch.device("meta"):
        model, twice = GHANet(1024, sizes, 4, {}), GHANet(1024, sizes, 4, {}, share_cross_attention=False)
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, model.cab, model.hsb, twice, twice.cab)]
    assert counts == [17_909_060 - 1_049_088, 10_514_944 - 1_049_088 + 513 * 3391, 5_654_533, 17_909_060, 12_254_527]


# -- formulas ------------------------------------------------------------------------------------------------
def slow_attention(layer: HeadAttention, queries: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, list]:
    """Head by head and query by query, with every row of the memory projected."""
    q, k, v = queries @ layer.query.weight.T, memory @ layer.key.weight.T, memory @ layer.value.weight.T
    width = q.shape[1] // layer.heads
    rows, scores = [], []
    for i in range(len(q)):
        parts = []
        for h in range(layer.heads):
            at = slice(h * width, (h + 1) * width)
            s = torch.stack([q[i, at] @ k[n, at] for n in range(len(k))]) / math.sqrt(width)
            scores.append(s)
            parts.append(sum(w * v[n, at] for n, w in enumerate(s.exp() / s.exp().sum())))
        rows.append(layer.out.weight @ torch.cat(parts) + layer.out.bias)
    return torch.stack(rows), scores


def norm(layer: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def feedforward(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    hidden = layer.first(x)
    half = hidden.shape[-1] // 2
    return layer.second(hidden[..., :half] * gelu(hidden[..., half:]))


@pytest.mark.parametrize("share", [True, False])
def test_evaluation_is_the_formula(share):
    model = make(share_cross_attention=share).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 0.3)
    cab, hsb = model.cab, model.hsb
    x = patient(11).path.double()
    k = int(0.2 * 11)
    with torch.no_grad():
        out = model(Batch(path=x))
        hr = norm(cab.norm_patches, torch.relu(cab.project.linear(x)))
        a1, _ = slow_attention(cab.attention, norm(cab.norm_tokens, cab.tokens), hr)
        f1 = a1 + feedforward(cab.first_feedforward, norm(cab.norm_first, a1))
        second = cab.attention if share else cab.second_attention
        a2, scores = slow_attention(second, norm(cab.norm_again, cab.tokens + f1), hr)
        f2 = a2 + feedforward(cab.second_feedforward, norm(cab.norm_second, a2))
        fg = norm(cab.norm_out, f2)
        for g in range(3):
            decoder = cab.decoders[str(g)]
            expected = decoder.out(torch.nn.functional.elu(norm(decoder.norm, decoder.hidden(fg[g]))))
            torch.testing.assert_close(out["aux"]["reconstruction"][g], expected)

        h = torch.relu(norm(hsb.norm_patches, hsb.project(x)))
        a = hsb.score(torch.tanh(hsb.tanh(h)) * torch.sigmoid(hsb.gate(h)))[:, 0].exp()
        morph = a / a.sum()
        rows = []
        for g in range(3):
            mean = sum(scores[4 * g : 4 * g + 4]) / 4
            best = sorted(range(11), key=lambda n, mean=mean: -mean[n])[:k]
            total = sum(mean[n].exp() for n in best)
            gen = torch.stack([mean[n].exp() / total if n in best else mean[n] * 0 for n in range(11)])
            torch.testing.assert_close(out["attn"]["genes"][g], gen)
            rows.append(sum((gen[n] + morph[n]) / 2 * h[n] for n in range(11)))
        z = torch.stack(rows)
        mixed = torch.relu(norm(hsb.norm_mix_first, hsb.mix_first(z)))
        mixed = torch.relu(norm(hsb.norm_mix_second, hsb.mix_second(mixed))) + z
        f = (mixed + fg) / 2
        f = slow_attention(hsb.attention, f, f)[0] + f
        f = feedforward(hsb.feedforward, norm(hsb.norm_feedforward, f)) + f
        v = torch.cat([torch.relu(norm(hsb.norm_hidden, hsb.hidden(row))) for row in f])
    torch.testing.assert_close(out["attn"]["gated"], morph)
    torch.testing.assert_close(out["aux"]["pooled"][0], v)
    torch.testing.assert_close(out["logits"][0], hsb.classifier(v))


def test_losses_are_the_formula():
    """Recomputed from what the model predicted: same weights, no dropout."""
    model = make(dropout=0.0, gamma=2.0, reconstruction_weight=0.7).train()
    batch = patient(9)
    with torch.no_grad():
        out = model(batch)
    mse = sce = 0.0
    for x, z, at in zip(out["aux"]["reconstruction"], batch.groups, PARTS.values(), strict=True):
        a, b = x.tolist(), z[at].tolist()
        mse += sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / len(a)
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        sce += (1 - dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))) ** 2
    assert set(out["extra_losses"]) == {"mse", "sce"}
    assert out["extra_losses"]["mse"].item() == pytest.approx(0.7 * mse, rel=1e-5)
    assert out["extra_losses"]["sce"].item() == pytest.approx(0.7 * sce, rel=1e-4)


def test_cosine_error_stays_finite_at_the_ends():
    x = torch.randn(50, requires_grad=True)
    for target in (x.detach(), -x.detach(), torch.zeros(50)):
        value = scaled_cosine_error(x, target, 1.5)
        assert bool(torch.isfinite(value)) and bool(torch.isfinite(torch.autograd.grad(value, x)[0]).all())
    assert scaled_cosine_error(x, -x.detach(), 3.0).item() == pytest.approx(8, rel=1e-4)


@pytest.mark.parametrize("n", [1, 2, 4, 5, 29, 100])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 1.0])
def test_genes_look_at_the_best_share_of_the_patches(n, ratio):
    scores = torch.randn(6, n)
    weights = top_share(scores, ratio)
    k = max(1, int(ratio * n))
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    assert (weights > 0).sum(1).tolist() == [k] * 6
    for row, w in zip(scores, weights, strict=True):
        assert set(torch.nonzero(w).flatten().tolist()) == set(row.argsort(descending=True)[:k].tolist())
    # Ties with the last place are kept.
    assert (top_share(torch.zeros(2, n), ratio) > 0).all()


# -- chosen genes --------------------------------------------------------------------------------------------
def test_chosen_genes_are_those_of_the_t_test():
    """Column by column with the test of scipy on the values themselves; censored before bin 2 are ignored."""
    rng = np.random.default_rng(0)
    bins, event = rng.integers(0, 4, 60), rng.integers(0, 2, 60)
    high, low = (bins < 2) & (event == 1), bins >= 2
    assert (~high & ~low).any()
    first, second = rng.normal(size=(60, 40)), rng.normal(size=(60, 12))
    first[high, :15] += np.linspace(0.2, 3, 15)
    first[~high & ~low, 30:] += 50  # patients of no class
    p = [stats.ttest_ind(x[high], x[low], equal_var=False).pvalue for x in (first, second)]
    parts = GHANet.fit_parts(SETTINGS, sample((first, second), bins, event))
    assert parts["group_0"].tolist() == np.flatnonzero(p[0] < 0.05).tolist() and len(parts["group_0"]) >= 8
    # Fewer than eight are significant in the second group.
    assert (p[1] < 0.05).sum() < 8
    assert parts["group_1"].tolist() == sorted(np.argsort(p[1])[:8].tolist())
    assert all(part.dtype == np.int64 for part in parts.values())
    # A patient's place among the rows is immaterial.
    order = rng.permutation(60)
    again = GHANet.fit_parts(SETTINGS, sample((first[order], second[order]), bins[order], event[order]))
    assert all(np.array_equal(parts[key], again[key]) for key in parts)


def test_constant_columns_are_never_chosen_and_a_group_can_end_up_empty():
    rng = np.random.default_rng(1)
    high = np.arange(20) < 10
    values = rng.normal(size=(20, 3))
    values[:, 1] = 0.0
    assert differing_columns(values, high, ~high, 1e-12, 8).tolist() == [0, 2]
    # Equal within both classes, but not between them: as different as can be.
    values[:, 1] = high
    assert differing_columns(values, high, ~high, 1e-12, 0).tolist() == [1]

    bins, event = np.where(high, 0, 3), np.ones(20, dtype=int)
    noise = rng.normal(size=(20, 5))
    noise[10:] = noise[:10]  # both classes alike: p = 1
    groups = (values[:, [0, 1]] * [0, 1], noise[:, :3], rng.normal(size=(20, 9)) + 3 * high[:, None])
    parts = GHANet.fit_parts(SETTINGS | {"min_genes": 0}, sample(groups, bins, event))
    assert [len(part) for part in parts.values()] == [1, 0, 9]
    model = GHANet(12, {"a": 2, "b": 3, "c": 9}, 4, parts, **SMALL)
    batch = Batch(path=torch.randn(6, 12), groups=tuple(torch.randn(m) for m in (2, 3, 9)))
    out = model(batch)
    assert [len(x) for x in out["aux"]["reconstruction"]] == [1, 0, 9] and list(model.cab.decoders) == ["0", "2"]
    assert all(bool(torch.isfinite(loss)) for loss in out["extra_losses"].values())


def test_parts_alone_rebuild_the_model():
    model = make(min_genes=3)
    other = GHANet(12, {}, 4, PARTS, **SMALL).eval()
    other.load_state_dict(model.state_dict())
    batch = patient()
    with torch.no_grad():
        assert torch.equal(model.eval()(batch)["logits"], other(batch)["logits"])
    assert [at.tolist() for at in other.columns] == [at.tolist() for at in PARTS.values()]
    assert [at.tolist() for at in make(parts={}).columns] == [list(range(m)) for m in GROUPS.values()]


def test_what_cannot_be_fitted_or_does_not_fit_is_refused():
    values = np.zeros((6, 3))
    bins = np.array([0, 3, 3, 3, 3, 3])
    with pytest.raises(MorphomeError, match="too few for a t-test"):
        GHANet.fit_parts(SETTINGS, sample((values,), bins, np.ones(6, dtype=int)))
    with pytest.raises(MorphomeError, match="gene groups"):
        GHANet.fit_parts(SETTINGS, sample((), bins, np.ones(6, dtype=int)))
    with pytest.raises(MorphomeError, match="gene groups"):
        GHANet(12, {}, 4, {}, **SMALL)
    with pytest.raises(MorphomeError, match="do not fit"):
        make(parts=PARTS | {"group_1": np.array([3])})
    for settings, word in (({"heads": 3}, "heads"), ({"ratio": 0.0}, "ratio"), ({"morph_attention": False}, "weight")):
        with pytest.raises(MorphomeError, match=word):
            make(**settings, cab=False)
    with pytest.raises(MorphomeError, match="P7"):
        make()(Batch(path=torch.randn(3, 11), patient_id="P7"))
    with pytest.raises(MorphomeError, match="P0"):
        make()(patient(genes=False))
    short = patient()
    with pytest.raises(MorphomeError, match="2 gene groups, expected 3"):
        make()(Batch(path=short.path, groups=short.groups[:2]))
    with pytest.raises(MorphomeError, match="gene group 2 has 3 columns"):
        make()(Batch(path=short.path, groups=(*short.groups[:2], short.groups[1])))


# -- behaviour -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_any_bag_in_any_order(n):
    model = make().eval()
    x = patient(n).path
    order = torch.randperm(n)
    with torch.no_grad():
        a, b = model(Batch(path=x)), model(Batch(path=x[order]))
    assert a["logits"].shape == (1, 4) and -4 <= risk(a["logits"]).item() <= 0
    assert a["attn"]["genes"].shape == (3, n) and a["attn"]["gated"].shape == (n,) and a["extra_losses"] == {}
    torch.testing.assert_close(a["attn"]["genes"].sum(1), torch.ones(3))
    assert abs(a["attn"]["gated"].sum().item() - 1) < 1e-5
    torch.testing.assert_close(a["logits"], b["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(a["attn"]["genes"][:, order], b["attn"]["genes"], atol=1e-5, rtol=0)
    for x, y in zip(a["aux"]["reconstruction"], b["aux"]["reconstruction"], strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=0)


def test_evaluation_reads_neither_genes_nor_labels_and_is_saved_whole():
    model, other = make().eval(), make(seed=9).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        first = model(patient(genes=False))["logits"]
        assert torch.equal(first, model(patient(genes=False))["logits"])
        assert torch.equal(first, other(patient(genes=False))["logits"])
        for groups in (patient().groups, (torch.full((1,), math.nan),)):
            batch = Batch(path=patient().path, groups=groups, bin=2, event=1)
            assert torch.equal(first, model(batch)["logits"]) and model(batch)["extra_losses"] == {}


def test_genes_change_the_loss_in_training_and_nothing_else():
    model = make(dropout=0.0)
    batch, other = patient(), Batch(path=patient().path, groups=patient(seed=1).groups)
    with torch.no_grad():
        a, b = model(batch), model(other)
    assert torch.equal(a["logits"], b["logits"])
    assert a["extra_losses"]["mse"] != b["extra_losses"]["mse"]


def gradients(model: GHANet, loss: torch.Tensor) -> set[str]:
    """Names of the parameters that the loss moves."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}


def test_the_survival_loss_reaches_the_genes_through_what_they_read_not_through_where_they_look():
    model = make(dropout=0.0)
    moved = gradients(model, survival_loss(model(patient())))
    assert {"cab.tokens", "cab.project.linear.weight", "hsb.project.weight", "hsb.score.weight"} <= moved
    assert not any("decoders" in name for name in moved)
    # Without Fg only W_gen is left between the branches, and no gradient passes it.
    alone = make(dropout=0.0, gene_fusion=False)
    moved = gradients(alone, survival_loss(alone(patient())))
    assert moved and all(name.startswith("hsb.") for name in moved)
    moved = gradients(model, sum(model(patient())["extra_losses"].values()))
    assert moved and all(name.startswith("cab.") for name in moved)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"share_cross_attention": False},
        {"gene_attention": False},
        {"morph_attention": False},
        {"gene_fusion": False},
        {"mse": False},
        {"sce": False},
        {"cab": False},
        {"ratio": 1.0, "gamma": 1.0},
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient_within_a_few_patients(settings):
    """Of the model as it is and of each ablation: a part that an ablation does not use is not built."""
    model = make(**settings)
    for seed in range(8):
        out = model(patient(5, seed))
        (survival_loss(out, seed) + sum(out["extra_losses"].values())).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and bool((p.grad != 0).any()), name
    assert set(out["extra_losses"]) == {
        name for name in ("mse", "sce") if settings.get(name, True) and settings.get("cab", True)
    }
    assert ("reconstruction" in out["aux"]) == settings.get("cab", True)


def test_without_weight_the_genes_are_not_asked_for():
    model = make(reconstruction_weight=0.0)
    assert model(patient(genes=False))["extra_losses"] == {}


# -- planted genes -------------------------------------------------------------------------------------------
def test_reconstruction_r_is_the_mean_over_the_genes_of_a_group():
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(30, 5)), rng.normal(size=(30, 3)), rng.normal(size=(30, 9)))
    x = [rng.normal(size=(30, 2)) + z[0][:, [0, 3]], np.zeros((30, 1)), z[2][:, [2, 5, 8]].copy()]
    x[2][:, 1] = 4.0  # no r, left out
    r = reconstruction_r(x, z, tuple(PARTS.values()))
    slow = [np.corrcoef(x[0][:, i], z[0][:, c])[0, 1] for i, c in enumerate((0, 3))]
    assert r[0] == pytest.approx(np.mean(slow)) and math.isnan(r[1]) and r[2] == pytest.approx(1)


WEIGHTS = torch.randn(len(PARTS), 9, generator=torch.Generator().manual_seed(5))


def planted(seed: int) -> Batch:
    """Genes are linear in the mean patch: one column of the patches moves all of a group, and time follows one."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randn(3, generator=generator)
    path = torch.randn(15, 12, generator=generator)
    path[:, :3] += level
    mean = path[:, :3].mean(0)
    noise = [0.3 * torch.randn(m, generator=generator) for m in GROUPS.values()]
    groups = tuple(mean[g] * WEIGHTS[g, : len(e)].sign() + e for g, e in enumerate(noise))
    return Batch(path=path, groups=groups, bin=int(level[0] < 0) * 3, event=1)


def test_planted_genes_are_read_off_the_slides():
    model = make(dropout=0.0, dim=32, feedforward=32)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.003)
    for step in range(150):
        optimiser.zero_grad()
        for seed in range(4 * step, 4 * step + 4):
            batch = planted(seed)
            out = model(batch)
            loss = nll_loss(out["logits"], torch.tensor([batch.bin]), torch.tensor([1]))
            ((loss + sum(out["extra_losses"].values())) / 4).backward()
        optimiser.step()
    model.eval()
    test = [planted(seed) for seed in range(5000, 5080)]
    with torch.no_grad():
        outs = [model(Batch(path=batch.path)) for batch in test]
    predicted = [np.stack([out["aux"]["reconstruction"][g].numpy() for out in outs]) for g in range(3)]
    actual = [np.stack([batch.groups[g].numpy() for batch in test]) for g in range(3)]
    assert reconstruction_r(predicted, actual, model.columns).min() > 0.5
    # Genes of other patients: nothing left.
    shuffled = [np.roll(z, 1, axis=0) for z in actual]
    assert np.abs(reconstruction_r(predicted, shuffled, model.columns)).max() < 0.4
    risks = [risk(out["logits"]).item() for out in outs]
    pairs = [
        (a > b) + 0.5 * (a == b)
        for (a, x), (b, y) in itertools.product(zip(risks, test, strict=True), repeat=2)
        if x.bin < y.bin
    ]
    assert sum(pairs) / len(pairs) > 0.75


def test_what_was_not_measured_is_no_target():
    """NaN among the genes of a patient leaves the loss; a column measured in few patients is still tested on them."""
    values = np.random.default_rng(0).normal(size=(40, 3))
    high = np.arange(40) < 20
    values[high, 0] += 3.0
    full = differing_columns(values, high, ~high, 0.01, 0)
    values[::4, 0], values[:, 2] = np.nan, np.nan
    np.testing.assert_array_equal(differing_columns(values, high, ~high, 0.01, 0), full)
    np.testing.assert_array_equal(full, [0])
