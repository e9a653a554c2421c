"""The planted outcome: two latents, a log hazard ratio, Weibull times and uniform censoring.

Bender, Augustin & Blettner, Statistics in Medicine 2005;24:1713 (simulating Cox times):
``T = (-log U / (lambda exp(eta)))**(1/nu)`` with ``U ~ Unif(0,1)``, ``nu = 1.2`` and ``lambda = (30 months)**-nu``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from morphome.cohort.values import DAYS_PER_MONTH

Array = NDArray[np.float64]

NU = 1.2
SCALE_MONTHS = 30.0
CENSOR_FROM_MONTHS = 1.0
LATENT_CORRELATION = 0.2
#: Scenario -> coefficients of z1 (morphology), z2 (genes) and their product.
COEFFICIENTS = {"S0": (0.0, 0.0, 0.0), "S1": (0.7, 0.7, 0.0), "S2": (0.7, 0.7, 0.5), "S3": (1.8, 1.8, 0.0)}
#: Half the difference of the log hazard between agreeing and opposed signs of the latents in scenario X1.
X1_EFFECT = 1.6
_SAMPLE = 400_000


@dataclass(frozen=True)
class Outcomes:
    """Planted truth and what a study would have observed; every field has one value per patient.

    Attributes:
        z1, z2: latents of morphology and of the genes, each N(0,1).
        eta: true log hazard ratio.
        time_event_months, time_censor_months: both times, of which a study sees the earlier.
        days: observed time, whole days, at least 1.
        event: 1 = happened.
    """

    z1: Array
    z2: Array
    eta: Array
    time_event_months: Array
    time_censor_months: Array
    days: NDArray[np.int64]
    event: NDArray[np.int64]


def draw_outcomes(count: int, scenario: str, censoring: float, seed: int) -> Outcomes:
    """Draw a planted cohort.

    Args:
        count: number of patients.
        scenario: S0, S1, S2, S3 or X1 (only the sign of z1 z2 matters; the latents are then uncorrelated).
        censoring: asked share of censored patients; the share of a small cohort varies around it.
        seed: other seeds give other patients of the same population.
    """
    rng = np.random.default_rng([seed, 1])
    z1, z2, eta = _latents(count, scenario, rng)
    event_time = _event_times(eta, rng)
    limit = censoring_limit(scenario, censoring)
    uniform = rng.random(count)
    censor_time = CENSOR_FROM_MONTHS + uniform * (limit - CENSOR_FROM_MONTHS)
    event = event_time <= censor_time
    days = np.maximum(1, np.rint(np.minimum(event_time, censor_time) * DAYS_PER_MONTH)).astype(np.int64)
    return Outcomes(z1, z2, eta, event_time, censor_time, days, event.astype(np.int64))


def censoring_limit(scenario: str, censoring: float) -> float:
    """Upper end (months) of the uniform censoring time that censors the asked share, by bisection.

    The share is an average over a sample of 400,000 event times with P(C < T | T) in closed form. Infinity when
    nothing is to be censored.
    """
    if censoring <= 0:
        return float("inf")
    rng = np.random.default_rng(20050601)
    _, _, eta = _latents(_SAMPLE, scenario, rng)
    times = _event_times(eta, rng)

    def share(limit: float) -> float:
        return float(np.clip((times - CENSOR_FROM_MONTHS) / (limit - CENSOR_FROM_MONTHS), 0, 1).mean())

    low, high = CENSOR_FROM_MONTHS + 1e-6, 1e6
    for _ in range(60):
        # Geometric steps: the answer may lie anywhere between a day and centuries.
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if share(middle) > censoring else (low, middle)
    return high


def harrell_c(time: Array, event: NDArray[np.int64], risk: Array) -> float:
    """Harrell's C; NaN without a comparable pair.

    A pair counts when the earlier time is an event; at equal times when exactly one of the two is one. Tied risks
    count one half (Harrell et al., Statistics in Medicine 1996;15:361). Written out because the environment that
    makes the demo cohort has no scikit-survival; a test holds it against lifelines.
    """
    earlier = time[:, None] < time[None, :]
    tied = (time[:, None] == time[None, :]) & (event[None, :] == 0)
    comparable = (event[:, None] == 1) & (earlier | tied)
    difference = risk[:, None] - risk[None, :]
    concordant = (difference > 0) + 0.5 * (difference == 0)
    pairs = comparable.sum()
    return float((concordant * comparable).sum() / pairs) if pairs else float("nan")


def uncensored_oracle_c(scenario: str) -> float:
    """Limit of Harrell's C of the true log hazard without censoring: E[expit(|eta_i - eta_j|)].

    P(T_i < T_j | eta) = expit(eta_i - eta_j) under proportional hazards. For Gaussian eta by Gauss-Legendre
    quadrature, for X1 in closed form, for S2 as an average over 400,000 pairs (standard error below 0.0003).
    """
    if scenario == "X1":
        # Two values, each with probability one half: half of the pairs are ties.
        return 0.25 + 0.5 / (1 + float(np.exp(-2 * X1_EFFECT)))
    b1, b2, b12 = COEFFICIENTS[scenario]
    if b12 == 0:
        sigma = np.sqrt(b1**2 + b2**2 + 2 * LATENT_CORRELATION * b1 * b2)
        nodes, weights = np.polynomial.legendre.leggauss(200)
        z = 5 * (nodes + 1)  # |Z| from 0 to 10; only half of the line, because |Z| has a kink at 0
        weights = weights * np.exp(-(z**2) / 2)
        values = 1 / (1 + np.exp(-z * np.sqrt(2) * sigma))
        return float((weights * values).sum() / weights.sum())
    _, _, eta = _latents(2 * _SAMPLE, scenario, np.random.default_rng(20050602))
    return float((1 / (1 + np.exp(-np.abs(eta[:_SAMPLE] - eta[_SAMPLE:])))).mean())


def _latents(count: int, scenario: str, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    z1, other = rng.standard_normal((2, count))
    if scenario == "X1":
        return z1, other, X1_EFFECT * np.sign(z1 * other)
    z2 = LATENT_CORRELATION * z1 + np.sqrt(1 - LATENT_CORRELATION**2) * other
    b1, b2, b12 = COEFFICIENTS[scenario]
    return z1, z2, b1 * z1 + b2 * z2 + b12 * z1 * z2


def _event_times(eta: Array, rng: np.random.Generator) -> Array:
    return SCALE_MONTHS * (-np.log1p(-rng.random(eta.size)) * np.exp(-eta)) ** (1 / NU)
