"""DeepSurv: size, formula, independence of other patients, a planted gene."""

from __future__ import annotations

import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.deepsurv import DeepSurv
from morphome.models.hazard import cox_loss

D = 9
SMALL = {"dim": 8, "layers": 2}
NORMS = ["layer", "none"]


def make(seed: int = 0, **changes) -> DeepSurv:
    torch.manual_seed(seed)
    return DeepSurv(D, **{**SMALL, **changes})


def patient(seed: int = 1, **parts) -> Batch:
    x = torch.randn(D, generator=torch.Generator().manual_seed(seed))
    return Batch(**{"omic_all": x, "patient_id": "P0", **parts})


def log_risk(model: DeepSurv, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch)["log_risk"]


def test_parameter_count():
    with torch.device("meta"):
        default, plain = DeepSurv(3062), DeepSurv(3062, norm="none", layers=3)
    assert sum(p.numel() for p in default.parameters()) == 200_512
    assert sum(p.numel() for p in plain.parameters()) == 3062 * 64 + 64 + 2 * (64 * 64 + 64) + 64


@pytest.mark.parametrize("norm", NORMS)
def test_evaluation_is_the_formula(norm):
    model, batch = make(norm=norm).eval(), patient()
    x = batch.omic_all
    step = 4 if norm == "layer" else 3
    with torch.no_grad():
        for i in range(0, 2 * step, step):
            x = model.hidden[i].weight @ x + model.hidden[i].bias
            if norm == "layer":
                x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
            x = x.clamp(min=0)
        expected = float(model.classifier.weight[0] @ x)
    out = log_risk(model, batch)
    assert out.shape == (1, 1)
    assert out.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_every_parameter_gets_a_gradient_and_training_drops_units(norm):
    model = make(norm=norm)
    assert not torch.equal(model(patient())["log_risk"], model(patient())["log_risk"])
    risks = torch.cat([model(patient(seed))["log_risk"] for seed in range(12)])
    cox_loss(risks, torch.arange(1.0, 13.0), torch.tensor([1, 0] * 6)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert bool((p.grad != 0).any()), name
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())


def test_evaluation_is_repeatable_saved_whole_and_blind_to_labels():
    model, other = make(), make(seed=9)
    assert not torch.equal(log_risk(model, patient()), log_risk(other, patient()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(log_risk(model, patient()), log_risk(other, patient()))
    assert torch.equal(log_risk(model, patient()), log_risk(model, patient(bin=2, event=1)))


def test_a_planted_gene_is_found():
    model = make(dropout=0.0)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(20):
        batches = [patient(20 * step + i) for i in range(20)]
        time = torch.stack([torch.exp(-2 * b.omic_all[3]) for b in batches])
        optimiser.zero_grad()
        cox_loss(torch.cat([model(b)["log_risk"] for b in batches]), time, torch.ones(20)).backward()
        optimiser.step()
    new = [patient(seed) for seed in range(1000, 1040)]
    found, truth = torch.tensor([[log_risk(model, b).item(), b.omic_all[3].item()] for b in new]).T
    pairs = truth[:, None] > truth[None]
    assert (found[:, None] > found[None])[pairs].float().mean().item() > 0.75


def test_what_does_not_fit_is_refused():
    with pytest.raises(MorphomeError, match="norm"):
        make(norm="batch")
    with pytest.raises(MorphomeError, match="0 layers"):
        make(layers=0)
    with pytest.raises(MorphomeError, match=r"P0.*expected \(9,\)"):
        make()(patient(omic_all=torch.randn(D + 1)))
    with pytest.raises(MorphomeError, match="P0"):
        make()(patient(omic_all=None))
