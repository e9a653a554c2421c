"""SNN: size, formula, start, penalty, planted genes."""

from __future__ import annotations

import math

import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.hazard import nll_loss, risk
from morphome.models.omic import OmicEncoder, l1_norm
from morphome.models.snn import SNNModel

D = 11


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def patient(seed: int = 0, width: int = D, **parts) -> Batch:
    x = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return Batch(omic_all=x, patient_id=f"P{seed}", **parts)


def parameters(**settings) -> int:
    return sum(p.numel() for p in SNNModel(3062, 4, **settings).parameters())


def test_parameter_counts():
    assert parameters() == 982_532
    assert parameters(layers=2) == 982_532 - 2 * (256 * 256 + 256)


def test_evaluation_is_the_formula():
    """logits = W5 ELU(W4 ELU(W3 ELU(W2 ELU(W1 x)))), unit by unit in plain Python."""
    model = SNNModel(3, 2, dim=4).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    x = [0.4, -1.2, 2.0]
    tables = [p.tolist() for p in model.parameters()]
    for weight, bias in zip(tables[::2], tables[1::2], strict=True):
        pre = [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        x = pre if len(pre) == 2 else [v if v > 0 else math.exp(v) - 1 for v in pre]
    with torch.no_grad():
        logits = model(Batch(omic_all=torch.tensor([0.4, -1.2, 2.0])))["logits"]
    assert len(tables) == 10 and logits.shape == (1, 2)
    torch.testing.assert_close(logits, torch.tensor([x]), atol=1e-4, rtol=1e-4)


def test_start_has_variance_one_over_fan_in_and_no_bias():
    model = SNNModel(400, 4, dim=300)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif "classifier" not in name:
            assert p.std().item() * p.shape[1] ** 0.5 == pytest.approx(1, abs=0.02)
            assert p.mean().abs().item() < 1e-3
    assert 0.9 < model.classifier.weight.std().item() * 300**0.5 < 1.1


def test_penalty_in_training_only():
    model = SNNModel(D, 4, dim=8, l1=0.5)
    expected = sum(float(p.detach().abs().sum()) for p in model.parameters())
    penalty = model(patient())["extra_losses"]["l1"]
    assert penalty.item() == pytest.approx(0.5 * expected, rel=1e-5)
    penalty.backward()
    weight = model.classifier.weight
    torch.testing.assert_close(weight.grad, 0.5 * weight.detach().sign())
    assert model.eval()(patient())["extra_losses"] == {}
    assert SNNModel(D, 4, dim=8, l1=0.0)(patient())["extra_losses"] == {}


def test_penalty_passes_over_frozen_parameters():
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert l1_norm(layer).item() == pytest.approx(layer.weight.abs().sum().item())


def test_every_parameter_gets_a_gradient_within_a_few_patients():
    model = SNNModel(D, 4, dim=8, l1=0.0)
    for seed in range(6):
        nll_loss(model(patient(seed))["logits"], torch.tensor([seed % 4]), torch.tensor([seed % 2])).backward()
    assert all(bool((p.grad != 0).any()) for p in model.parameters())


def test_evaluation_is_repeatable_saved_whole_and_blind_to_slides_and_labels():
    model, other = SNNModel(D, 4, dim=8).eval(), SNNModel(D, 4, dim=8).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        first = model(patient())["logits"]
        assert torch.equal(first, model(patient())["logits"])
        assert torch.equal(first, other(patient())["logits"])
        assert torch.equal(first, model(patient(path=torch.randn(3, 5), bin=2, event=1))["logits"])


def test_planted_gene_is_found():
    model = SNNModel(D, 2, dim=8, layers=2, dropout=0.0)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(120):
        batch = patient(step)
        early = batch.omic_all[3] > 0
        loss = nll_loss(model(batch)["logits"], torch.tensor([0 if early else 1]), torch.tensor([1]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        rows = [
            (risk(model(patient(seed))["logits"]).item(), patient(seed).omic_all[3] > 0) for seed in range(500, 560)
        ]
    high, low = [r for r, early in rows if early], [r for r, early in rows if not early]
    right = sum(a > b for a in high for b in low) / (len(high) * len(low))
    assert right > 0.8


def test_what_does_not_fit_is_refused():
    with pytest.raises(MorphomeError, match="P0"):
        SNNModel(D, 4, dim=8)(patient(width=D + 1))
    with pytest.raises(MorphomeError, match="P9"):
        SNNModel(D, 4, dim=8)(Batch(patient_id="P9"))
    with pytest.raises(MorphomeError, match="0 columns"):
        OmicEncoder(0, 8, 2, 0.1)
    with pytest.raises(MorphomeError, match="0 layers"):
        SNNModel(D, 4, layers=0)


def test_the_encoder_stands_in_for_missing_columns_only_when_asked():
    encoder, batch = OmicEncoder(5, 8, 2, 0.1).eval(), Batch(omic_all=torch.randn(5))
    with pytest.raises(MorphomeError, match="P4: no molecular columns"):
        encoder(Batch(patient_id="P4"))
    before = encoder(batch)
    encoder.add_missing()
    assert torch.equal(encoder(batch), before)
    assert encoder(Batch()) is encoder.missing and encoder.missing.shape == (8,)
