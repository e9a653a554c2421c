"""The horizon τ of AUC, Brier score and Uno's C: fixed for a cohort before any model is run.

τ is the largest of 12, 24, 36 and 60 months with G(τ) ≥ 0.35, at least 50 cases up to τ and 50 patients beyond τ in
the cohort, and at least 10 of each in every outer test fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from morphome.survival import censoring_at

CANDIDATES_MONTHS = (12.0, 24.0, 36.0, 60.0)
MIN_G = 0.35
MIN_COHORT = 50
MIN_FOLD = 10


def horizon_table(
    time: ArrayLike, event: ArrayLike, test_folds: Sequence[np.ndarray], candidates: Sequence[float]
) -> list[dict[str, Any]]:
    """What each candidate horizon would rest on.

    Args:
        time: (n,) months; event: (n,), 1 = happened; test_folds: row numbers of each outer test fold, all repeats.
        candidates: months.

    Returns:
        One row per candidate: ``horizon_months, g`` (Kaplan-Meier of the censoring time of the cohort; NaN beyond
        follow-up), ``cases`` (events ≤ τ), ``controls`` (patients beyond τ), ``censored_before, min_cases_per_fold,
        min_controls_per_fold, accepted, reason``.
    """
    time, event = np.asarray(time, dtype=np.float64), np.asarray(event).astype(bool)
    rows = []
    for tau in candidates:
        case, control = event & (time <= tau), time > tau
        g = float(censoring_at(time, event, tau)[0])
        per_case = min((int(case[fold].sum()) for fold in test_folds), default=0)
        per_control = min((int(control[fold].sum()) for fold in test_folds), default=0)
        faults = []
        if not g >= MIN_G:
            faults.append(f"G = {g:.3f} < {MIN_G}" if np.isfinite(g) else "beyond follow-up")
        for found, least, what in (
            (int(case.sum()), MIN_COHORT, "cases"),
            (int(control.sum()), MIN_COHORT, "patients beyond it"),
            (per_case, MIN_FOLD, "cases in a test fold"),
            (per_control, MIN_FOLD, "patients beyond it in a test fold"),
        ):
            if found < least:
                faults.append(f"{found} < {least} {what}")
        rows.append(
            {
                "horizon_months": float(tau),
                "g": g,
                "cases": int(case.sum()),
                "controls": int(control.sum()),
                "censored_before": int((~event & (time <= tau)).sum()),
                "min_cases_per_fold": per_case,
                "min_controls_per_fold": per_control,
                "accepted": not faults,
                "reason": "; ".join(faults),
            }
        )
    return rows


def choose_horizon(
    setting: float | str, time: ArrayLike, event: ArrayLike, test_folds: Sequence[np.ndarray]
) -> Mapping[str, Any]:
    """The horizon of a cohort by the rule ("auto"), or the configured one with the rule's opinion beside it.

    Args:
        setting: "auto" or months. The rest as in :func:`horizon_table`.

    Returns:
        ``horizon_months`` (None when no candidate passes), ``horizon_reason``, ``horizon_accepted`` (the rule's
        verdict on the horizon in use; None without one), ``horizon_rule_months`` (what "auto" would take) and
        ``horizon_table``.
    """
    asked = None if setting == "auto" else float(setting)
    candidates = sorted({*CANDIDATES_MONTHS, *([] if asked is None else [asked])})
    table = horizon_table(time, event, test_folds, candidates)
    by_rule = max((r["horizon_months"] for r in table if r["accepted"] and r["horizon_months"] in CANDIDATES_MONTHS),
                  default=None)  # fmt: skip
    if asked is not None:
        row = next(r for r in table if r["horizon_months"] == asked)
        verdict = "the rule would accept it" if row["accepted"] else f"the rule would not accept it: {row['reason']}"
        reason, accepted, months = f"configured ({verdict})", row["accepted"], asked
    elif by_rule is not None:
        larger = [r for r in table if r["horizon_months"] > by_rule]
        why = "".join(f"; not {r['horizon_months']:g} months: {r['reason']}" for r in larger)
        reason, accepted, months = f"largest horizon that the folds carry{why}", True, by_rule
    else:
        why = "; ".join(f"{r['horizon_months']:g} months: {r['reason']}" for r in table)
        reason, accepted, months = f"no horizon passes the rule ({why})", None, None
    return {
        "horizon_months": months,
        "horizon_reason": reason,
        "horizon_accepted": accepted,
        "horizon_rule_months": by_rule,
        "horizon_table": table,
    }
