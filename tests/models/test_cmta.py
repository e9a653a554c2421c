"""CMTA: sizes, translation, alignment, copies of the square."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.cmta import CMTA, GeneTransformer
from morphome.models.hazard import nll_loss

GROUPS = {"a": 5, "b": 3, "c": 9}
#: Columns of the six gene families in the MCAT table of TCGA-BLCA.
BLCA = dict(zip("abcdef", (94, 334, 521, 468, 1496, 479), strict=True))
SMALL = {"dim": 16, "gene_dim": 24, "heads": 2, "landmarks": 16}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(seed: int = 0, **settings) -> CMTA:
    torch.manual_seed(seed)
    return CMTA(12, GROUPS, 4, **(SMALL | settings))


def patient(n: int = 20, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    cells = torch.arange(n)
    return Batch(
        path=torch.randn(n, 12, generator=generator),
        pos=torch.stack([torch.zeros(n, dtype=torch.long), cells % 7 * 256, cells // 7 * 256], 1).int(),
        groups=tuple(torch.randn(size, generator=generator) for size in GROUPS.values()),
        patient_id=f"P{seed}",
    )


def class_tokens(model: CMTA) -> dict[str, torch.Tensor]:
    """Filled with the class token of each of the four transformers when the model runs."""
    seen: dict[str, torch.Tensor] = {}
    for name in ("path_encoder", "gene_encoder", "path_decoder", "gene_decoder"):
        getattr(model, name).register_forward_hook(lambda _m, _a, out, name=name: seen.update({name: out[0]}))
    return seen


def test_parameter_count_of_the_published_size():
    model = CMTA(1024, BLCA, 4)
    assert sum(p.numel() for p in model.parameters()) == 8_259_140


def test_forward_by_definition():
    model = make().eval()
    batch = patient()
    with torch.no_grad():
        out = model(batch)
        p = batch.path
        for layer in model.project:
            p = torch.relu(layer.linear(p))
        g = torch.stack(
            [
                torch.nn.functional.elu(b.linear(torch.nn.functional.elu(a.linear(x))))
                for (a, b), x in zip(model.groups, batch.groups, strict=True)
            ]
        )
        c_p, p1 = model.path_encoder(p)
        c_g, g1 = model.gene_encoder(g)
        p2, g2 = model.path_from_genes(p1, g1)[0], model.genes_from_path(g1, p1)[0]
        d_p, d_g = model.path_decoder(p2)[0], model.gene_decoder(g2)[0]
        h = torch.cat([(c_p + d_p) / 2, (c_g + d_g) / 2], 1)
        h = torch.relu(model.fusion.second(torch.relu(model.fusion.first(h))))
        alignment = (c_p - d_p).abs().mean() + (c_g - d_g).abs().mean()
    torch.testing.assert_close(out["logits"], model.classifier(h), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out["aux"]["alignment"], alignment, atol=1e-5, rtol=1e-4)


def test_gene_transformer_by_definition():
    model = GeneTransformer(16, {"heads": 2, "landmarks": 16}).eval()
    x = torch.randn(6, 16)
    with torch.no_grad():
        h = torch.cat([model.cls, x])
        for layer in (model.first, model.second):
            h = h + layer.attention(layer.norm(h)[None])[0]
        cls, tokens = model(x)
    assert cls.shape == (1, 16) and tokens.shape == (6, 16)
    torch.testing.assert_close(torch.cat([cls, tokens]), model.norm(h), atol=1e-6, rtol=1e-5)


def test_alignment_pulls_the_decoders_only():
    model = make(alpha=3.0)
    seen = class_tokens(model)
    out = model(patient())
    loss = out["extra_losses"]["alignment"]
    assert loss.item() == pytest.approx(3 * out["aux"]["alignment"].item()) and loss.item() > 0
    names = list(seen)
    gradients = torch.autograd.grad(loss, [seen[name] for name in names], allow_unused=True, retain_graph=True)
    reached = {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    assert reached == {"path_decoder", "gene_decoder"}
    # the survival loss reaches all four
    gradients = torch.autograd.grad(out["logits"].sum(), [seen[name] for name in names])
    assert all(bool((gradient != 0).any()) for gradient in gradients)
    assert not out["aux"]["alignment"].requires_grad


def test_the_fusion_gets_the_mean_class_tokens():
    model = make().eval()
    seen = class_tokens(model)
    with torch.no_grad():
        z = model.encode(patient()).z
    for branch, name in (("path", "path"), ("omic", "gene")):
        torch.testing.assert_close(z[branch], (seen[f"{name}_encoder"] + seen[f"{name}_decoder"]) / 2)


def test_the_error_of_the_pseudo_inverse_is_noted_in_evaluation():
    model = make(attention="nystrom_masked").eval()
    with torch.no_grad():
        assert set(model(patient(20))["aux"]) == {"alignment", "pinv_error"}
        assert set(model(patient(4))["aux"]) == {"alignment"}


def test_alignment_is_a_loss_of_training_only():
    assert make().eval()(patient())["extra_losses"] == {}
    assert make(alpha=0.0)(patient())["extra_losses"] == {}


@pytest.mark.parametrize("n", [1, 2, 3, 20, 300])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"copies": "keep"},
        {"grid": "true_xy"},
        {"grid": "true_xy", "copies": "keep"},
        {"attention": "nystrom_compat"},
        {"attention": "exact", "value_conv": False},
    ],
)
def test_attention_is_over_the_patches_themselves(n, settings):
    out = make(**settings)(patient(n))
    assert out["logits"].shape == (1, 4) and bool(torch.isfinite(out["logits"]).all())
    to_genes, to_path = out["attn"]["path_from_genes"], out["attn"]["genes_from_path"]
    assert to_genes.shape == (n, 3) and to_path.shape == (3, n)
    torch.testing.assert_close(to_genes.sum(1), torch.ones(n))
    torch.testing.assert_close(to_path.sum(1), torch.ones(3))
    assert not to_genes.requires_grad and not to_path.requires_grad


def test_copies_are_translated_only_when_kept():
    rows = {}
    for copies in ("drop", "keep"):
        model = make(copies=copies).eval()
        model.path_from_genes.register_forward_hook(lambda _m, a, _o, copies=copies: rows.update({copies: a[0]}))
        with torch.no_grad():
            model(patient(20))
    assert rows["drop"].shape == (20, 16) and rows["keep"].shape == (25, 16)
    torch.testing.assert_close(rows["keep"][:20], rows["drop"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "sensitive"),
    [
        ({}, True),
        ({"grid": "true_xy"}, True),
        ({"attention": "exact", "value_conv": False}, True),
        ({"grid": "true_xy", "attention": "exact", "value_conv": False}, False),
    ],
)
def test_patch_order(settings, sensitive):
    model = make(**settings).eval()
    assert model.order_sensitive == sensitive
    bag = patient(60)
    order = torch.randperm(60)
    with torch.no_grad():
        difference = model(bag)["logits"] - model(replace(bag, path=bag.path[order], pos=bag.pos[order]))["logits"]
    assert (difference.abs().max().item() > 1e-5) == sensitive


def test_true_positions_count():
    model = make(grid="true_xy").eval()
    bag = patient(20)
    with torch.no_grad():
        a, b = model(bag)["logits"], model(replace(bag, pos=bag.pos[torch.randperm(20)]))["logits"]
    assert not torch.allclose(a, b, atol=1e-5)
    with pytest.raises(MorphomeError, match="position"):
        model(replace(bag, pos=None))


def test_every_parameter_learns():
    model = make()
    for seed in range(8):
        out = model(patient(seed=seed))
        loss = nll_loss(out["logits"], torch.tensor([seed % 4]), torch.tensor([seed % 2]))
        (loss + out["extra_losses"]["alignment"]).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and bool((p.grad != 0).any()), name


def test_both_modalities_count():
    model = make().eval()
    batch, other = patient(seed=0), patient(seed=1)
    with torch.no_grad():
        logits = model(batch)["logits"]
        for part in ({"path": other.path}, {"groups": other.groups}):
            assert not torch.allclose(logits, model(replace(batch, **part))["logits"], atol=1e-4)


def test_start():
    """Xavier-normal: SD sqrt(2 / (in + out)), for queries, keys and values as one matrix; biases 0."""
    with torch.no_grad():
        model = CMTA(64, GROUPS, 4, dim=64, gene_dim=96, heads=2, landmarks=16)
    linear = model.project[0].linear
    assert linear.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)
    attention = model.path_encoder.first.attention
    for layer in (attention.query, attention.key, attention.value, model.path_from_genes.inputs):
        assert layer.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert not any(bool(m.bias.any()) for m in model.modules() if isinstance(m, torch.nn.Linear) and m.bias is not None)
    assert model.path_encoder.cls.abs().max() < 1e-5 and model.gene_decoder.cls.abs().max() < 1e-5


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


@pytest.mark.parametrize("settings", [{"heads": 3}, {"grid": "hex"}, {"copies": "hide"}, {"attention": "flash"}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(MorphomeError):
        make(**settings)


def test_other_gene_groups_are_refused():
    with pytest.raises(MorphomeError, match="2 gene groups"):
        make()(replace(patient(), groups=patient().groups[:2]))
