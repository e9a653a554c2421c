"""MCAT and the attention blocks it shares: sizes, formulas against torch's own layers, invariance."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from torch import nn

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.coattention import CrossAttention, EncoderLayer, TokenPool
from morphome.models.hazard import nll_loss
from morphome.models.mcat import MCAT

GROUPS = {"a": 5, "b": 3, "c": 9}
#: Columns of the six gene families in the MCAT table of TCGA-BLCA.
BLCA = dict(zip("abcdef", (94, 334, 521, 468, 1496, 479), strict=True))
SMALL = {"dim": 16, "heads": 2, "feedforward": 24, "attention_dim": 8}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(seed: int = 0, **settings) -> MCAT:
    torch.manual_seed(seed)
    return MCAT(12, GROUPS, 4, **(SMALL | settings))


def patient(n: int = 20, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        path=torch.randn(n, 12, generator=generator),
        groups=tuple(torch.randn(size, generator=generator) for size in GROUPS.values()),
        patient_id=f"P{seed}",
    )


def test_parameter_count_of_the_published_size():
    with torch.device("meta"):
        model = MCAT(1024, BLCA, 4)
    assert sum(p.numel() for p in model.parameters()) == 4_492_038


@pytest.mark.parametrize(("n", "t"), [(3, 40), (40, 3), (4, 4), (1, 5), (5, 1)])
def test_cross_attention_is_one_headed_attention_whichever_side_is_longer(n, t):
    ours, theirs = CrossAttention(16), nn.MultiheadAttention(16, 1, batch_first=True)
    nn.init.normal_(ours.inputs.bias)
    nn.init.normal_(ours.out.bias)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.inputs.weight,
            "in_proj_bias": ours.inputs.bias,
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        }
    )
    queries, memory = torch.randn(n, 16), torch.randn(t, 16)
    out, weights, scores = ours(queries, memory)
    expected, expected_weights = theirs(queries[None], memory[None], memory[None])
    torch.testing.assert_close(out, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights, expected_weights[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(scores.softmax(-1), weights)
    # raw scores, not merely something with the same softmax
    (wq, wk, _), (bq, bk, _) = ours.inputs.weight.chunk(3), ours.inputs.bias.chunk(3)
    torch.testing.assert_close(scores, (queries @ wq.T + bq) @ (memory @ wk.T + bk).T / 4, atol=1e-5, rtol=1e-5)


def encoder_as_torch(ours: EncoderLayer) -> nn.TransformerEncoderLayer:
    theirs = nn.TransformerEncoderLayer(16, ours.heads, 24, 0.0, batch_first=True)
    names = {
        "self_attn.in_proj_": "inputs.",
        "self_attn.out_proj.": "out.",
        "linear1.": "first.",
        "linear2.": "second.",
        "norm1.": "norm_attention.",
        "norm2.": "norm_feedforward.",
    }
    state = ours.state_dict()
    theirs.load_state_dict({a + end: state[b + end] for a, b in names.items() for end in ("weight", "bias")})
    return theirs


def test_encoder_layer_is_the_post_norm_layer_of_torch():
    ours = EncoderLayer(16, 2, 24)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(6, 16)
    # in training mode of torch without dropout, so that its plain path is compared
    torch.testing.assert_close(ours.eval()(x), encoder_as_torch(ours).train()(x[None])[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ours.train()(x), ours.eval()(x))


def test_forward_by_definition():
    model = make().eval()
    batch = patient()
    with torch.no_grad():
        out = model(batch)
        h = torch.relu(model.project.linear(batch.path))
        g = model.groups(batch.groups)
        tokens, a, _ = model.coattention(g, h)
        pooled = []
        for part, x in ((model.path_pool, tokens), (model.gene_pool, g)):
            for layer in part.encoder:
                x = layer(x)
            gate = torch.tanh(part.pool.tanh(x)) * torch.sigmoid(part.pool.gate(x))
            weights = part.pool.score(gate)[:, 0].softmax(0)
            pooled.append(torch.relu(part.hidden.linear(sum(w * row for w, row in zip(weights, x, strict=True)))))
        hidden = torch.relu(model.fusion.first(torch.cat(pooled)))
        logits = model.classifier(torch.relu(model.fusion.second(hidden)))
    torch.testing.assert_close(out["logits"][0], logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out["attn"]["coattention"], a)


@pytest.mark.parametrize("n", [1, 2, 3, 300])
@pytest.mark.parametrize("fusion", ["concat", "bilinear"])
def test_attention(n, fusion):
    out = make(fusion=fusion)(patient(n))
    assert out["logits"].shape == (1, 4) and bool(torch.isfinite(out["logits"]).all())
    attention = out["attn"]
    assert attention["coattention"].shape == attention["coattention_raw"].shape == (3, n)
    torch.testing.assert_close(attention["coattention"].sum(1), torch.ones(3))
    torch.testing.assert_close(attention["coattention_raw"].softmax(1), attention["coattention"])
    for name in ("gated_path", "gated_genes"):
        assert attention[name].shape == (3,) and attention[name].sum().item() == pytest.approx(1, abs=1e-5)
    assert not any(x.requires_grad for x in attention.values())


def test_the_order_of_patches_does_not_matter_and_attention_follows_it():
    model = make().eval()
    bag = patient(60)
    order = torch.randperm(60)
    with torch.no_grad():
        a, b = model(bag), model(replace(bag, path=bag.path[order]))
    torch.testing.assert_close(a["logits"], b["logits"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(a["attn"]["coattention"][:, order], b["attn"]["coattention"], atol=1e-6, rtol=1e-5)
    assert not model.order_sensitive


@pytest.mark.parametrize("fusion", ["concat", "bilinear"])
def test_every_parameter_learns(fusion):
    # 64: the product then has 8 units per modality, which do not all die at the start
    model = make(fusion=fusion, dim=64)
    for seed in range(8):
        nll_loss(model(patient(seed=seed))["logits"], torch.tensor([seed % 4]), torch.tensor([seed % 2])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and bool((p.grad != 0).any()), name


def test_both_modalities_count():
    model = make().eval()
    batch, other = patient(seed=0), patient(seed=1)
    with torch.no_grad():
        logits = model(batch)["logits"]
        assert not torch.allclose(logits, model(replace(batch, path=other.path))["logits"], atol=1e-5)
        for g in range(3):
            groups = tuple(b if i == g else a for i, (a, b) in enumerate(zip(batch.groups, other.groups, strict=True)))
            assert not torch.allclose(logits, model(replace(batch, groups=groups))["logits"], atol=1e-6), g


def test_evaluation_is_repeatable_blind_to_labels_and_survives_saving():
    model, other = make().eval(), make(seed=9).eval()
    batch = patient(33)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    with torch.no_grad():
        first = model(batch)["logits"]
        assert torch.equal(first, model(replace(batch, bin=3, event=1))["logits"])
        assert not torch.equal(first, other(batch)["logits"])
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(first, other(batch)["logits"])


def test_branches_are_encoder_and_pool_of_a_modality_and_share_the_co_attention():
    model = make()
    branches = {name: {id(p) for p in ps} for name, ps in model.branch_parameters().items()}
    parts = {"path": (model.project, model.path_pool), "omic": (model.groups, model.gene_pool)}
    for name, modules in parts.items():
        assert branches[name] == {id(p) for module in modules for p in module.parameters()}
    shared = {id(p) for p in model.parameters()} - branches["path"] - branches["omic"]
    assert {id(p) for p in model.coattention.parameters()} < shared


@pytest.mark.parametrize("settings", [{"heads": 3}, {"fusion": "sum"}, {"fusion": "bilinear", "dim": 4}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(MorphomeError, match=r"models\.mcat"):
        make(**settings)


def test_a_patient_without_genes_or_with_other_groups_is_refused():
    with pytest.raises(MorphomeError, match="P0"):
        make()(replace(patient(), groups=None))
    with pytest.raises(MorphomeError, match="2 gene groups"):
        make()(replace(patient(), groups=patient().groups[:2]))


def test_dropout_is_of_the_probability_set():
    """No block keeps a dropout of its own: with 0, training and evaluation agree."""
    model = make(dropout=0.0, fusion="bilinear")
    assert torch.equal(model.train()(patient())["logits"], model.eval()(patient())["logits"])
    pool = TokenPool(16, 2, 24, 8, 0.5)
    assert {m.p for m in pool.modules() if hasattr(m, "p")} == {0.5}
