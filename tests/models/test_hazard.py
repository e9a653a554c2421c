"""Hazard head, NLL, time bins, survival curve and Cox loss against closed forms and published values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from morphome.errors import MorphomeError, MorphomeWarning
from morphome.models import hazard

LN2 = math.log(2)
LOGITS = torch.tensor([[0.5, -1.0, 0.2, 1.0]], dtype=torch.float64)

# Therneau and Grambsch, "Modeling survival data" (2000), appendix E, data set 1.
TIME = torch.tensor([9.0, 1, 1, 6, 6, 8], dtype=torch.float64)
EVENT = torch.tensor([1, 1, 0, 1, 1, 0])
X = torch.tensor([0.0, 1, 1, 1, 0, 0], dtype=torch.float64)


def one(y: int, event: int, beta: float = 0.0) -> float:
    return hazard.nll_loss(LOGITS, torch.tensor([y]), torch.tensor([event]), beta).item()


@pytest.mark.parametrize("event", [0, 1])
@pytest.mark.parametrize("y", range(4))
def test_nll_of_zero_logits_is_a_multiple_of_ln2(y, event):
    loss = hazard.nll_loss(torch.zeros(1, 4), torch.tensor([y]), torch.tensor([event]))
    assert loss.item() == pytest.approx((y + 1) * LN2, abs=1e-6)


def test_nll_referee_values():
    for beta in (0.0, 0.4, 0.5):
        assert one(2, 1, beta) == pytest.approx(1.885477541, abs=2e-9)
    assert one(2, 0, 0.0) == pytest.approx(2.085477541, abs=3e-9)
    assert one(2, 0, 0.4) == pytest.approx(1.251286525, abs=2e-9)
    assert one(2, 0, 0.5) == pytest.approx(1.042738770, abs=2e-9)
    assert hazard.risk(LOGITS).item() == pytest.approx(-0.811208159, abs=2e-9)


def test_nll_is_the_likelihood_of_a_normalised_distribution():
    """Bins 0 ... K-1 as events plus surviving the last bin have total probability 1."""
    logits = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    events = [hazard.nll_loss(logits, torch.tensor([y]), torch.tensor([1])).neg().exp() for y in range(5)]
    survive = hazard.nll_loss(logits, torch.tensor([4]), torch.tensor([0])).neg().exp()
    assert (sum(events) + survive).item() == pytest.approx(1, abs=1e-12)


def test_nll_averages_over_patients_and_survives_extreme_logits():
    logits = LOGITS.repeat(2, 1)
    both = hazard.nll_loss(logits, torch.tensor([2, 2]), torch.tensor([1, 0]))
    assert both.item() == pytest.approx((1.885477541 + 2.085477541) / 2, abs=3e-9)
    extreme = torch.tensor([[200.0, -200, 200, -200]], requires_grad=True)
    loss = hazard.nll_loss(extreme, torch.tensor([3]), torch.tensor([1]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(extreme.grad).all()


def test_nll_refuses_shapes_that_would_broadcast():
    with pytest.raises(MorphomeError, match="nll_loss"):
        hazard.nll_loss(LOGITS, torch.tensor([[2]]), torch.tensor([1]))


def test_survival_and_risk():
    s = hazard.survival(LOGITS)
    expected = torch.cumprod(1 - torch.sigmoid(LOGITS), -1)
    torch.testing.assert_close(s, expected)
    assert -4 <= hazard.risk(LOGITS).item() <= 0
    torch.testing.assert_close(hazard.log_hazard(LOGITS).exp(), hazard.hazards(LOGITS))


def test_bins_use_events_only_and_are_closed_on_the_left():
    time = [1.0, 2, 3, 4, 5, 100, 200]
    event = [1, 1, 1, 1, 1, 0, 0]
    edges = hazard.bin_edges(time, event, 4, "fold 0")
    np.testing.assert_allclose(edges, [2, 3, 4])
    np.testing.assert_array_equal(hazard.bin_index([0.5, 2, 2.99, 3, 4, 200], edges), [0, 1, 1, 2, 3, 3])


def test_duplicate_edges_and_no_events_name_the_fold():
    with pytest.raises(MorphomeError, match="repeat 1, fold 3"):
        hazard.bin_edges([5.0, 5, 5, 5, 9], [1, 1, 1, 1, 1], 4, "repeat 1, fold 3")
    with pytest.raises(MorphomeError, match="fold 2"):
        hazard.bin_edges([5.0, 6], [0, 0], 4, "fold 2")


def test_survival_curve_passes_the_edges_and_ends_there():
    edges = np.array([2.0, 6.0, 7.0])
    log_s = hazard.log_survival(LOGITS)
    s = log_s.exp()[0].numpy()
    curve = hazard.survival_curve(log_s, edges, [0.0, 1.0, 2.0, 4.0, 6.0, 7.0, 7.01])[0].numpy()
    expected = [1, math.sqrt(s[0]), s[0], math.sqrt(s[0] * s[1]), s[1], s[2], np.nan]
    np.testing.assert_allclose(curve, expected, rtol=1e-12)


def test_survival_curve_never_rises_and_k2_works():
    logits = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    curve = hazard.survival_curve(hazard.log_survival(logits), [3.0, 8, 20], np.linspace(0, 20, 50))
    assert bool((curve.diff(dim=1) <= 0).all())
    two = hazard.survival_curve(hazard.log_survival(logits[:, :2]), [3.0], [1.5, 3.0, 4.0])
    assert torch.isnan(two[:, 2]).all() and torch.isfinite(two[:, :2]).all()


def test_survival_curve_refuses_wrong_edges():
    log_s = hazard.log_survival(LOGITS)
    for edges in ([1.0, 2.0], [1.0, 1.0, 2.0], [0.0, 1.0, 2.0], [1.0, 2.0, np.inf]):
        with pytest.raises(MorphomeError, match="survival_curve"):
            hazard.survival_curve(log_s, edges, [1.0])


def loglik(beta: float, ties: str) -> float:
    return -hazard.cox_loss(beta * X, TIME, EVENT, ties).item() * int(EVENT.sum())


BRESLOW_BETA = math.log((3 + math.sqrt(33)) / 2)
EFRON_BETA = math.log(5.348721100)


@pytest.mark.parametrize(
    ("beta", "ties", "value"),
    [
        (0.0, "breslow", -4.564348191),
        (0.0, "efron", -4.276666119),
        (1.475284915, "breslow", -3.824749505),
        (1.676857486, "efron", -3.358974840),
        (1.475284915, "efron", -3.371631662),
    ],
)
def test_cox_referee_values(beta, ties, value):
    assert loglik(beta, ties) == pytest.approx(value, abs=2e-9)


@pytest.mark.parametrize(("ties", "beta"), [("breslow", BRESLOW_BETA), ("efron", EFRON_BETA)])
def test_cox_gradient_is_zero_at_the_published_maximum(ties, beta):
    b = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
    hazard.cox_loss(b * X, TIME, EVENT, ties).backward()
    assert abs(b.grad.item()) < 1e-9


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_cox_closed_form_at_other_betas(ties):
    for beta in (-2.0, 0.7, 3.0):
        r = math.exp(beta)
        expected = 2 * beta - math.log(3 * r + 3)
        expected -= 2 * math.log(r + 3) if ties == "breslow" else math.log((r + 5) / 2) + math.log(r + 3)
        assert loglik(beta, ties) == pytest.approx(expected, abs=1e-12)


def test_cox_does_not_depend_on_the_order_of_rows_nor_on_a_shift():
    generator = torch.Generator().manual_seed(3)
    time = torch.randint(1, 8, (40,), generator=generator).double()
    event = torch.randint(0, 2, (40,), generator=generator)
    h = torch.randn(40, dtype=torch.float64, generator=generator)
    order = torch.randperm(40, generator=generator)
    for ties in ("efron", "breslow"):
        a = hazard.cox_loss(h, time, event, ties)
        b = hazard.cox_loss(h[order, None] + 500, time[order], event[order], ties)
        assert a.item() == pytest.approx(b.item(), abs=1e-10)


def test_cox_breslow_gradient_is_the_martingale_residual():
    generator = torch.Generator().manual_seed(4)
    time = torch.randint(1, 10, (30,), generator=generator).double()
    event = torch.randint(0, 2, (30,), generator=generator)
    h = torch.randn(30, dtype=torch.float64, generator=generator, requires_grad=True)
    hazard.cox_loss(h, time, event, "breslow").backward()
    e = h.detach().exp()
    at_risk = torch.stack([e[time >= t].sum() for t in time])
    baseline = torch.stack([(event / at_risk)[time <= t].sum() for t in time])
    residual = event - e * baseline
    torch.testing.assert_close(h.grad, -residual / event.sum(), atol=1e-9, rtol=0)
    assert abs(h.grad.sum().item()) < 1e-12


def test_cox_batch_of_one_and_batch_without_event():
    with pytest.raises(MorphomeError, match="one patient"):
        hazard.cox_loss(torch.zeros(1, 1), torch.ones(1), torch.ones(1))
    h = torch.zeros(3, requires_grad=True)
    with pytest.warns(MorphomeWarning, match="no event"):
        loss = hazard.cox_loss(h, torch.arange(3.0), torch.zeros(3))
    loss.backward()
    assert loss.item() == 0
    with pytest.raises(MorphomeError, match="ties"):
        hazard.cox_loss(h, torch.arange(3.0), torch.ones(3), "exact")


def test_edges_that_end_at_the_horizon():
    time = np.array([1.0, 2.0, 4.0, 8.0, 30.0, 60.0, 5.0])
    event = np.array([1, 1, 1, 1, 1, 1, 0])
    edges = hazard.bin_edges(time, event, 4, "here", last_edge=24.0)
    # Events before 24 months: 1, 2, 4, 8; their 1/3 and 2/3 quantiles, then the horizon itself.
    np.testing.assert_allclose(edges, [2.0, 4.0, 24.0])
    curve = hazard.survival_curve(torch.log(torch.tensor([[0.9, 0.8, 0.5, 0.1]])), edges, np.array([24.0, 24.1]))
    assert curve[0, 0].item() == pytest.approx(0.5)
    assert torch.isnan(curve[0, 1])


def test_no_event_before_the_horizon_is_an_error():
    with pytest.raises(MorphomeError, match="here"):
        hazard.bin_edges([30.0, 40.0], [1, 1], 4, "here", last_edge=24.0)


def test_baseline_offsets_of_equal_logits_are_the_log_odds_of_the_life_table():
    bins = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    event = np.array([1, 1, 0, 1, 0, 0, 1, 0])
    # At risk 8, 5, 2, of whom 1, 2, 1 are censored in the bin and count half; 2, 1, 1 events.
    h = np.array([2 / 7.5, 1 / 4, 1 / 1.5])
    logits = np.tile([0.3, -2.0, 5.0], (8, 1))
    np.testing.assert_allclose(hazard.baseline_offsets(logits, bins, event), np.log(h / (1 - h)) - logits[0])


def test_baseline_offsets_minimise_the_likelihood_where_nobody_is_censored():
    """Then the gradient of the NLL by the offsets is 0, with logits that differ between patients."""
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(50, 4, dtype=torch.float64, generator=generator)
    bins = torch.randint(0, 4, (50,), generator=generator)
    event = torch.ones(50)
    found = hazard.baseline_offsets(logits, bins, event)
    offsets = torch.tensor(found, requires_grad=True)
    hazard.nll_loss(logits + offsets, bins, event).backward()
    assert offsets.grad[:3].abs().max() < 1e-9  # in the last bin everybody left has the event: kept finite
    assert np.isfinite(found[3])


def test_baseline_offsets_stay_finite_at_no_event_all_events_and_nobody():
    logits = np.array([[500.0, -500.0, 0.0], [-500.0, 500.0, 0.0]])
    offsets = hazard.baseline_offsets(logits, np.array([1, 1]), np.array([1, 1]))
    assert np.isfinite(offsets).all()
    assert offsets[2] == 0
    none, every = (hazard.baseline_offsets(np.zeros((4, 1)), np.zeros(4), np.full(4, e))[0] for e in (0, 1))
    assert none == pytest.approx(math.log(0.5 / 1.5))  # four censored patients count as two
    assert every == pytest.approx(math.log(3.5 / 0.5))
