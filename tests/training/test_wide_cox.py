"""Ridge Cox on wide tables against the general fit and against the gradient written out."""

from __future__ import annotations

import numpy as np
import pytest

from morphome import survival
from morphome.errors import MorphomeError
from morphome.training.wide_cox import fit_ridge_path

RIDGES = [3.0, 300.0, 0.3, 30.0]


def cohort(n: int, p: int, seed: int = 0):
    """Standard normal columns, times with many ties, about half of them events."""
    rng = np.random.default_rng(seed)
    Z = rng.normal(size=(n, p))
    time = np.ceil(8 * rng.exponential(size=n) / np.exp(0.5 * Z[:, 0])) + 1
    return Z, time, (rng.uniform(size=n) < 0.5).astype("int64")


@pytest.mark.parametrize("p", [5, 40, 120])
def test_equal_to_the_general_fit(p):
    Z, time, event = cohort(40, p)
    path = fit_ridge_path(Z, time, event, RIDGES)
    assert path.converged.all()
    for ridge, coef in zip(RIDGES, path.coef, strict=True):
        general = survival.fit_cox_ridge(Z, time, event, ridge, ties="breslow")
        np.testing.assert_allclose(coef, general.coef, atol=2e-5)


def test_the_gradient_vanishes():
    Z, time, event = cohort(30, 70, seed=1)
    for ridge, beta in zip(RIDGES, fit_ridge_path(Z, time, event, RIDGES).coef, strict=True):
        weight = np.exp(Z @ beta)
        gradient = -ridge * beta
        for i in np.flatnonzero(event):
            at_risk = time >= time[i]
            gradient += Z[i] - weight[at_risk] @ Z[at_risk] / weight[at_risk].sum()
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_order_of_rows_and_of_penalties_does_not_matter():
    Z, time, event = cohort(40, 60, seed=2)
    path = fit_ridge_path(Z, time, event, RIDGES)
    rows = np.random.default_rng(0).permutation(40)
    again = fit_ridge_path(Z[rows], time[rows], event[rows], RIDGES[::-1])
    np.testing.assert_allclose(again.coef[::-1], path.coef, atol=1e-6)
    np.testing.assert_allclose(fit_ridge_path(Z, time, event, RIDGES[2:3]).coef[0], path.coef[2], atol=1e-6)


def test_weak_penalties_and_huge_columns_converge():
    """Patients that the columns separate fully, and columns a thousand times too large."""
    Z, time, event = cohort(30, 90, seed=3)
    path = fit_ridge_path(1000 * Z, time, event, [1e-3, 1.0, 1e6])
    assert path.converged.all()
    assert np.isfinite(path.coef).all()
    assert (np.diff(np.linalg.norm(path.coef, axis=1)) < 0).all()


def test_columns_of_zeros_get_zero_and_no_event_is_refused():
    Z, time, event = cohort(30, 50, seed=4)
    Z[:, 7] = 0
    assert abs(fit_ridge_path(Z, time, event, [1.0]).coef[0, 7]) < 1e-14
    assert not fit_ridge_path(np.zeros((30, 50)), time, event, [1.0]).coef.any()
    with pytest.raises(MorphomeError, match="none of 30 training patients"):
        fit_ridge_path(Z, time, 0 * event, [1.0])
    with pytest.raises(ValueError, match="positive"):
        fit_ridge_path(Z, time, event, [1.0, 0.0])
