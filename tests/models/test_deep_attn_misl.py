"""DeepAttnMISL: size, formulas, clusters, empty clusters, invariances, planted patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.deep_attn_misl import DeepAttnMISL
from morphome.models.hazard import nll_loss, risk
from morphome.models.parts import TrainingSample

SMALL = {"clusters": 4, "dim": 16, "attention_dim": 8, "head_dim": 8}
# Far apart along the first four axes, so that the cluster of a patch is known.
CENTRES = np.eye(4, 10, dtype=np.float32) * 8


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(seed: int = 0, **settings) -> DeepAttnMISL:
    torch.manual_seed(seed)
    return DeepAttnMISL(10, 4, {"centres": CENTRES}, **(SMALL | settings))


def bag(clusters: list[int], seed: int = 0) -> torch.Tensor:
    """One patch near each of the named centres."""
    noise = torch.randn(len(clusters), 10, generator=torch.Generator().manual_seed(seed))
    return torch.from_numpy(CENTRES[clusters]) + noise


def sample(patches: np.ndarray, seed: int = 3) -> TrainingSample:
    none = np.zeros(0)
    return TrainingSample(none, none, none, (), lambda most: patches[:most], seed)


def test_parameter_count():
    with torch.device("meta"):
        model = DeepAttnMISL(1024, 4, {"centres": np.zeros((10, 1024), dtype=np.float32)})
    assert sum(p.numel() for p in model.parameters()) == 8_532_485


@pytest.mark.parametrize("mask_empty", [True, False])
def test_evaluation_is_the_formula(mask_empty):
    """Patch by patch and cluster by cluster; cluster 2 is empty."""
    model = make(mask_empty=mask_empty).eval()
    clusters = [0, 3, 1, 0, 0, 3]
    x = bag(clusters)
    with torch.no_grad():
        out = model(Batch(path=x))
        tokens = []
        for c in range(4):
            rows = []
            for patch, own in zip(x, clusters, strict=True):
                if own == c:
                    first, second = (part.linear for part in model.looks[c])
                    rows.append(torch.relu(second(torch.relu(first(patch)))))
            tokens.append(sum(rows) / len(rows) if rows else torch.zeros(16))
        tokens = [torch.relu(model.project.linear(token)) for token in tokens]
        pool = model.pool
        score = [pool.score(torch.tanh(pool.tanh(t)) * torch.sigmoid(pool.gate(t))).exp().item() for t in tokens]
        if mask_empty:
            score[2] = 0.0
        weights = [s / sum(score) for s in score]
        pooled = sum(w * t for w, t in zip(weights, tokens, strict=True))
        logits = model.classifier(torch.relu(model.hidden.linear(pooled)))
    torch.testing.assert_close(out["logits"][0], logits)
    torch.testing.assert_close(out["aux"]["pooled"][0], pooled)
    torch.testing.assert_close(out["attn"]["clusters"], torch.tensor(weights))
    each = [weights[c] / clusters.count(c) for c in clusters]
    torch.testing.assert_close(out["attn"]["gated"], torch.tensor(each))


@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_any_bag_in_any_order(n):
    model = make().eval()
    x = bag([i % 4 for i in range(n)])
    order = torch.randperm(n)
    with torch.no_grad():
        a, b = model(Batch(path=x)), model(Batch(path=x[order]))
    assert a["logits"].shape == (1, 4) and -4 <= risk(a["logits"]).item() <= 0
    assert abs(a["attn"]["clusters"].sum().item() - 1) < 1e-5
    assert abs(a["attn"]["gated"].sum().item() - 1) < 1e-5
    torch.testing.assert_close(a["logits"], b["logits"], atol=1e-6, rtol=0)
    torch.testing.assert_close(a["attn"]["gated"][order], b["attn"]["gated"], atol=1e-6, rtol=0)


def test_an_empty_cluster_takes_part_only_when_it_is_not_masked():
    """Whatever the layer makes of a row of zeros cannot show while empty clusters are masked."""
    for mask_empty in (True, False):
        model = make(mask_empty=mask_empty).eval()
        x = bag([0, 1])
        with torch.no_grad():
            attention = model(Batch(path=x))["attn"]["clusters"]
        assert bool((attention[:2] > 0).all())
        assert bool((attention[2:] == 0).all()) == mask_empty


def test_a_patch_goes_to_the_nearest_centre():
    model = make()
    x = torch.randn(200, 10) * 5
    slow = [min(range(4), key=lambda c, p=p: float(((p - CENTRES[c]) ** 2).sum())) for p in x.double().numpy()]
    assert model.assign(x).tolist() == slow


def test_centres_are_those_of_the_training_patches():
    rng = np.random.default_rng(0)
    patches = np.concatenate([CENTRES[c] + rng.normal(0, 0.3, (60, 10)) for c in range(4)]).astype(np.float32)
    rng.shuffle(patches)
    settings = {"clusters": 4, "kmeans_patches": 10_000, "kmeans_starts": 3}
    first = DeepAttnMISL.fit_parts(settings, sample(patches))["centres"]
    again = DeepAttnMISL.fit_parts(settings, sample(patches))["centres"]
    assert np.array_equal(first, again) and first.shape == (4, 10) and first.dtype == np.float32
    distance = np.linalg.norm(first[:, None] - CENTRES[None], axis=2)
    assert sorted(distance.argmin(axis=1)) == [0, 1, 2, 3] and distance.min(axis=1).max() < 0.3
    # The number of patches asked for is the setting.
    few = DeepAttnMISL.fit_parts(settings | {"kmeans_patches": 4}, sample(patches))["centres"]
    np.testing.assert_allclose(np.sort(few, axis=0), np.sort(patches[:4], axis=0), atol=1e-5)
    model = DeepAttnMISL(10, 4, {"centres": first}, **SMALL)
    assert model(Batch(path=torch.from_numpy(patches)))["logits"].shape == (1, 4)


def test_too_few_patches_are_refused_and_so_are_missing_centres():
    settings = {"clusters": 4, "kmeans_patches": 10, "kmeans_starts": 1}
    for patches in (CENTRES[:3], np.repeat(CENTRES[:3], 3, axis=0)):
        with pytest.raises(MorphomeError, match="3 distinct training patches for 4 clusters"):
            DeepAttnMISL.fit_parts(settings, sample(patches))
    with pytest.raises(MorphomeError, match="centres"):
        DeepAttnMISL(10, 4, {}, **SMALL)
    with pytest.raises(MorphomeError, match="centres"):
        DeepAttnMISL(11, 4, {"centres": CENTRES}, **SMALL)
    with pytest.raises(MorphomeError, match="P7"):
        make()(Batch(path=torch.randn(3, 11), patient_id="P7"))


def test_every_parameter_gets_a_gradient_within_a_few_patients():
    model = make()
    for seed in range(8):
        logits = model(Batch(path=bag([seed % 4, (seed + 1) % 4, 0], seed)))["logits"]
        nll_loss(logits, torch.tensor([seed % 4]), torch.tensor([seed % 2])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and bool((p.grad != 0).any()), name


def test_evaluation_is_repeatable_saved_whole_and_blind_to_labels_and_genes():
    model = make().eval()
    torch.manual_seed(9)
    other = DeepAttnMISL(10, 4, {"centres": -CENTRES}, **SMALL).eval()
    x = bag([0, 1, 1, 3])
    with torch.no_grad():
        first = model(Batch(path=x))["logits"]
        assert not torch.equal(first, other(Batch(path=x))["logits"])
        other.load_state_dict(model.state_dict())
        assert torch.equal(first, model(Batch(path=x))["logits"])
        assert torch.equal(first, other(Batch(path=x))["logits"])
        assert torch.equal(first, model(Batch(path=x, groups=(x[0],), bin=1, event=1))["logits"])


def test_planted_patches_are_found():
    """Who dies early has one column raised, in one cluster of four only."""
    model = make(dropout=0.0)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)

    def patient(seed: int) -> Batch:
        x = bag([0, 0, 1, 1, 2, 3], seed)
        x[2:4, 7] += 1.5 if seed % 2 == 0 else -1.5
        return Batch(path=x)

    for step in range(120):
        loss = nll_loss(model(patient(step))["logits"], torch.tensor([3 * (step % 2)]), torch.tensor([1]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        risks = [risk(model(patient(seed))["logits"]).item() for seed in range(500, 560)]
    pairs = [(a > b) + 0.5 * (a == b) for a in risks[0::2] for b in risks[1::2]]
    assert sum(pairs) / len(pairs) > 0.8
