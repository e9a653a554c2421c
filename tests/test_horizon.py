"""The horizon rule (its values on published folds stand in tests/test_splits.py)."""

from __future__ import annotations

import numpy as np
import pytest

from morphome.horizon import choose_horizon, horizon_table


def _cohort(n: int = 400) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(1)
    death, censored = rng.exponential(40, n), rng.uniform(5, 90, n)
    return np.minimum(death, censored), death <= censored, [np.arange(n)[k::5] for k in range(5)]


def test_auto_takes_the_largest_that_passes():
    time, event, folds = _cohort()
    found = choose_horizon("auto", time, event, folds)
    passed = [row["horizon_months"] for row in found["horizon_table"] if row["accepted"]]
    assert found["horizon_months"] == max(passed) == found["horizon_rule_months"]
    assert found["horizon_accepted"] is True
    assert "not 60 months" in found["horizon_reason"]


def test_every_limit_counts():
    time, event, folds = _cohort()
    row = horizon_table(time, event, folds, [24.0])[0]
    assert row["accepted"] and row["reason"] == ""
    assert row["cases"] == (event & (time <= 24)).sum() and row["controls"] == (time > 24).sum()
    assert row["cases"] + row["controls"] + row["censored_before"] == 400
    # One fold without controls is enough to lose the horizon.
    early = np.flatnonzero(time <= 24)
    poor = [early[:40], np.setdiff1d(np.arange(400), early[:40])]
    row = horizon_table(time, event, poor, [24.0])[0]
    assert row["reason"] == "0 < 10 patients beyond it in a test fold"
    row = horizon_table(time[:80], event[:80], [np.arange(40), np.arange(40, 80)], [24.0])[0]
    assert "< 50 cases" in row["reason"] and not row["accepted"]
    late = horizon_table(time, event, folds, [80.0])[0]
    assert "G = 0.1" in late["reason"]
    assert horizon_table(np.minimum(time, 50.0), event & (time <= 50), folds, [60.0])[0]["reason"].startswith(
        ("beyond", "G")
    )


def test_at_the_horizon_itself():
    """A death at τ is a case; a patient censored at τ is neither case nor control."""
    row = horizon_table([10, 10, 11, 5], [1, 0, 0, 0], [np.arange(4)], [10.0])[0]
    assert (row["cases"], row["controls"], row["censored_before"]) == (1, 1, 2)


def test_none_passes():
    time, event, _ = _cohort(60)
    found = choose_horizon("auto", time, event, [np.arange(60)[k::3] for k in range(3)])
    assert found["horizon_months"] is None and found["horizon_accepted"] is None
    assert "no horizon passes the rule (12 months:" in found["horizon_reason"]


@pytest.mark.parametrize(("asked", "accepted"), [(18.0, True), (80.0, False), (24, True)])
def test_a_configured_horizon_is_taken_and_judged(asked, accepted):
    time, event, folds = _cohort()
    found = choose_horizon(asked, time, event, folds)
    assert found["horizon_months"] == float(asked)
    assert found["horizon_accepted"] is accepted
    assert ("would accept" if accepted else "would not accept") in found["horizon_reason"]
    assert float(asked) in [row["horizon_months"] for row in found["horizon_table"]]
    assert found["horizon_rule_months"] == choose_horizon("auto", time, event, folds)["horizon_months"]
