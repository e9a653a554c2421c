"""MMP: size, the EM step, attention and transport, fitted prototypes, invariances, planted signal."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.hazard import cox_loss
from morphome.models.mmp import MMP, TokenNetworks, em_step
from morphome.models.parts import TrainingSample

GROUPS = {"a": 5, "b": 3, "c": 9}
SMALL = {"dim": 16, "embedding_dim": 4, "prototypes": 4}
CENTRES = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(seed: int = 0, missing_tokens: bool = False, **settings) -> MMP:
    torch.manual_seed(seed)
    return MMP(12, GROUPS, {"prototypes": CENTRES}, missing_tokens, **(SMALL | settings))


def patient(n: int = 20, seed: int = 0, **parts) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        path=torch.randn(n, 12, generator=generator),
        groups=tuple(torch.randn(size, generator=generator) for size in GROUPS.values()),
        patient_id=f"P{seed}",
        **parts,
    )


def risk(model: MMP, batch: Batch) -> float:
    with torch.no_grad():
        return model(batch)["log_risk"].item()


def test_parameter_count_of_the_published_size():
    """Outside the pathway networks only their number counts."""
    sizes = {f"p{i}": 142 for i in range(50)}
    with torch.device("meta"):
        model = MMP(1024, sizes, {"prototypes": np.zeros((16, 1024), np.float32)})
    outside = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.pathways.parameters())
    assert outside == 3_427_936


def slow_em(x: list[list[float]], m: list[list[float]], tau: float, v: float):
    q = []
    for row in x:
        scores = [math.exp(-0.5 * sum((a - b) ** 2 for a, b in zip(row, centre, strict=True))) for centre in m]
        q.append([s / sum(scores) for s in scores])
    pi, mu, sigma = [], [], []
    for k, centre in enumerate(m):
        s = sum(row[k] for row in q)
        pi.append((s + tau) / (len(x) + len(m) * tau))
        means, squares = [], []
        for d, c in enumerate(centre):
            first = sum(w[k] * row[d] for w, row in zip(q, x, strict=True))
            second = sum(w[k] * row[d] ** 2 for w, row in zip(q, x, strict=True))
            means.append((first + tau * c) / (s + tau))
            squares.append((second + tau * (v + c**2)) / (s + tau) - means[-1] ** 2)
        mu.append(means)
        sigma.append(squares)
    return [torch.tensor(a, dtype=torch.float64) for a in (pi, mu, sigma, q)]


def test_em_step_is_the_formula():
    x, m = torch.randn(7, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    for a, b in zip(em_step(x, m, 0.7, 1.3), slow_em(x.tolist(), m.tolist(), 0.7, 1.3), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n", [1, 2, 5000])
def test_em_step_is_a_mixture_whatever_the_order(n):
    """Also with features far from 0, where E x^2 - mu^2 would cancel in float32, and with equal patches."""
    x = torch.randn(n, 6) * 0.01 + 300
    x[: n // 2] = x[0].clone()
    centres = x[torch.arange(4) % n] + torch.randn(4, 6) * 0.1
    order = torch.randperm(n)
    first, second = em_step(x, centres, 1.0, 1.0), em_step(x[order], centres, 1.0, 1.0)
    pi, mu, sigma, q = first
    assert pi.sum().item() == pytest.approx(1, abs=1e-6) and bool((sigma >= 0).all())
    torch.testing.assert_close(q.sum(1), torch.ones(n))
    # The prior of weight 1 and variance 1 is 1 of about n / 4 + 1 parts.
    assert sigma.max().item() < 1.5 and (mu - 300).abs().max().item() < 1
    for a, b in zip((pi, mu, sigma, q[order]), second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_token_has_its_own_network():
    networks = TokenNetworks(3, 4, 0.1).eval()
    for p in networks.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(3, 4)
    with torch.no_grad():
        out = networks(x)
        for i, row in enumerate(x.tolist()):
            mean = sum(row) / 4
            sd = math.sqrt(sum((a - mean) ** 2 for a in row) / 4 + 1e-5)
            y = torch.tensor([(a - mean) / sd for a in row]) * networks.scale[i] + networks.shift[i]
            y = networks.weights[0][i] @ y + networks.biases[0][i]
            y = torch.tensor([a * 0.5 * (1 + math.erf(a / math.sqrt(2))) for a in y.tolist()])
            torch.testing.assert_close(out[i], networks.weights[1][i] @ y + networks.biases[1][i])


@pytest.mark.parametrize("legacy", [False, True])
def test_attention_is_the_formula(legacy):
    """Row by row; legacy: for a prototype the scores of pathways are themselves a softmax."""
    model = make(double_softmax_legacy=legacy)
    tokens = torch.randn(7, 20)
    with torch.no_grad():
        out, weights = model.mix(tokens)
        q, k, v = (tokens @ layer.weight.T for layer in (model.query, model.key, model.value))
    for i in range(7):
        scores = [sum(a * b for a, b in zip(q[i].tolist(), k[j].tolist(), strict=True)) / 10**0.5 for j in range(7)]
        if legacy and i >= 3:
            inner = [math.exp(s) for s in scores[:3]]
            scores[:3] = [s / sum(inner) for s in inner]
        row = torch.tensor([math.exp(s) for s in scores])
        row /= row.sum()
        torch.testing.assert_close(weights[i], row)
        torch.testing.assert_close(out[i], row @ v)


def test_transport_crosses_modalities_only_and_every_token_reads_a_mean():
    model = make(fusion="ot")
    assert not hasattr(model, "query")
    tokens = torch.randn(7, 20)
    with torch.no_grad():
        out, weights = model.mix(tokens)
    assert not weights[:3, :3].any() and not weights[3:, 3:].any()
    torch.testing.assert_close(weights.sum(1), torch.ones(7))
    torch.testing.assert_close(out, weights @ (tokens @ model.value.weight.T))
    # What is near gets more than what is far.
    near = tokens.clone()
    near[3] = near[0]
    with torch.no_grad():
        assert model.mix(near)[1][0, 3] > 0.5


@pytest.mark.parametrize(("kind", "width"), [("random", 4), ("modality", 2), ("proto", 7)])
def test_embeddings_tell_tokens_apart(kind, width):
    model = make(token_embedding=kind)
    assert model.embedding.shape == (7, width)
    assert model.norm.normalized_shape == (16 + width,) and model.classifier.in_features == 2 * ((16 + width) // 2)
    assert isinstance(model.embedding, torch.nn.Parameter) == (kind == "random")
    if kind == "modality":
        assert model.embedding.tolist() == [[1, 0]] * 3 + [[0, 1]] * 4
    assert math.isfinite(risk(model.eval(), patient()))


def test_evaluation_is_the_formula():
    model, batch = make().eval(), patient(9)
    with torch.no_grad():
        pi, mu, sigma, _ = slow_em(batch.path.tolist(), CENTRES.tolist(), 1.0, 1.0)
        rows = [x for x in model.pathways(batch.groups)]
        for k in range(4):
            rows.append(model.project.weight @ torch.cat([pi[k : k + 1], mu[k], sigma[k]]).float() + model.project.bias)
        tokens = torch.stack([model.norm(torch.cat([x, e])) for x, e in zip(rows, model.embedding, strict=True)])
        out = model.networks(model.mix(tokens)[0])
        p = sum(model.norm_omic(x) for x in out[:3]) / 3
        h = sum(model.norm_path(x) for x in out[3:]) / 4
        expected = (model.classifier.weight[0] * torch.cat([p, h])).sum()
        torch.testing.assert_close(model(batch)["log_risk"], expected[None, None], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fusion", ["attention", "ot"])
@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_any_bag_in_any_order(n, fusion):
    model, bag = make(fusion=fusion).eval(), patient(n)
    order = torch.randperm(n)
    with torch.no_grad():
        a, b = model(bag), model(replace(bag, path=bag.path[order]))
    assert a["log_risk"].shape == (1, 1) and bool(torch.isfinite(a["log_risk"]).all())
    torch.testing.assert_close(a["log_risk"], b["log_risk"], atol=1e-6, rtol=0)
    assert a["attn"]["prototypes"].shape == (n, 4) and a["attn"]["tokens"].shape == (7, 7)
    torch.testing.assert_close(a["attn"]["prototypes"][order], b["attn"]["prototypes"])
    assert a["attn"]["mixture"].sum().item() == pytest.approx(1, abs=1e-6)


def test_the_fusion_sees_nothing_but_z():
    model, batch = make().eval(), patient()
    with torch.no_grad():
        encoded = model.encode(batch)
        assert {u: tuple(x.shape) for u, x in encoded.z.items()} == {"path": (4, 16), "omic": (3, 16)}
        assert torch.equal(model.fuse(encoded.z), model(batch)["log_risk"])
        other = encoded.z | {"path": model.encode(patient(seed=1)).z["path"]}
        mixed = model(replace(batch, path=patient(seed=1).path))["log_risk"]
        assert torch.equal(model.output(encoded, other)["log_risk"], mixed)
    owned = [id(p) for parameters in model.branch_parameters().values() for p in parameters]
    assert len(owned) == len(set(owned)) and model.branch_widths == {"path": 16, "omic": 16}


@pytest.mark.parametrize("fusion", ["attention", "ot"])
def test_every_parameter_gets_a_gradient_within_a_few_patients(fusion):
    model = make(fusion=fusion, missing_tokens=True)
    batches = [replace(patient(6, seed), groups=None) if seed == 3 else patient(6, seed) for seed in range(8)]
    risks = torch.cat([model(batch)["log_risk"] for batch in batches])
    cox_loss(risks, torch.arange(8.0), torch.ones(8)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and bool((p.grad != 0).any()), name


def test_evaluation_is_repeatable_saved_whole_and_blind_to_labels():
    model = make().eval()
    other = MMP(12, GROUPS, {"prototypes": CENTRES * 0}, **SMALL).eval()
    other.load_state_dict(model.state_dict())
    before = torch.get_rng_state()
    first = risk(model, patient())
    assert first == risk(model, patient()) == risk(other, patient()) == risk(model, patient(bin=2, event=1))
    assert torch.equal(before, torch.get_rng_state())
    assert model(patient())["extra_losses"] == {}


def test_tokens_for_missing_genes_are_asked_for():
    plain, model = make().eval(), make(missing_tokens=True).eval()
    assert risk(plain, patient()) == risk(model, patient())
    extra = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert extra == 3 * 16
    without = replace(patient(), groups=None)
    assert math.isfinite(risk(model, without)) and risk(model, without) != risk(model, patient())
    with pytest.raises(MorphomeError, match="P0"):
        plain(without)


def sample(patches: np.ndarray, seed: int = 2**40) -> TrainingSample:
    none = np.zeros(0)
    return TrainingSample(none, none, none, (), lambda most: patches[:most], seed)


def test_prototypes_are_the_centres_of_training_patches():
    """Four clusters far apart: each has its centre, twice the same, and the model is rebuilt from them alone."""
    rng = np.random.default_rng(0)
    truth = np.eye(4, 12) * 20
    patches = (np.repeat(truth, 50, 0) + rng.normal(size=(200, 12))).astype(np.float32)[rng.permutation(200)]
    settings = {"prototypes": 4, "kmeans_patches": 150, "kmeans_restarts": 2}
    parts = MMP.fit_parts(settings, sample(patches))
    found = parts["prototypes"]
    assert found.dtype == np.float32 and np.array_equal(found, MMP.fit_parts(settings, sample(patches))["prototypes"])
    distance = np.linalg.norm(found[:, None] - truth, axis=2)
    assert sorted(distance.argmin(1)) == [0, 1, 2, 3] and distance.min(1).max() < 1.5
    model = MMP(12, GROUPS, parts, **SMALL)
    assert np.array_equal(model.centres.numpy(), found)


def test_what_does_not_fit_is_refused():
    with pytest.raises(MorphomeError, match="too few"):
        MMP.fit_parts({"prototypes": 4, "kmeans_patches": 9, "kmeans_restarts": 1}, sample(np.ones((9, 2), np.float32)))
    with pytest.raises(MorphomeError, match="given: none"):
        MMP(12, GROUPS, {}, **SMALL)
    with pytest.raises(MorphomeError, match=r"\(4, 12\)"):
        MMP(13, GROUPS, {"prototypes": CENTRES}, **SMALL)
    with pytest.raises(MorphomeError, match="token_embedding"):
        make(token_embedding="none")
    with pytest.raises(MorphomeError, match="fusion"):
        make(fusion="sum")
    with pytest.raises(MorphomeError, match="P0"):
        make()(replace(patient(), path=torch.randn(3, 13)))


def planted(seed: int, where: str) -> tuple[Batch, bool]:
    """A patient who dies early when one column is raised: of all patches, or of one pathway."""
    batch, early = patient(6, seed), seed % 2 == 0
    column = batch.path[:, 2] if where == "slides" else batch.groups[1][:1]
    column += 2.0 if early else -2.0
    return batch, early


@pytest.mark.parametrize("where", ["genes", "slides"])
def test_planted_signal_is_found(where):
    model = make(dropout=0.0, feedforward_dropout=0.0)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(12):
        cohort = [planted(8 * step + i, where) for i in range(8)]
        risks = torch.cat([model(batch)["log_risk"] for batch, _ in cohort])
        time = torch.tensor([1.0 if early else 5.0 for _, early in cohort])
        optimiser.zero_grad()
        cox_loss(risks, time, torch.ones(8)).backward()
        optimiser.step()
    model.eval()
    tested = [planted(seed, where) for seed in range(500, 540)]
    early, late = ([risk(model, b) for b, is_early in tested if is_early == side] for side in (True, False))
    assert sum(a > b for a in early for b in late) / (len(early) * len(late)) > 0.8
