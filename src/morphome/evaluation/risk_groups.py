"""High and low risk by the training fold's median: curves, hazard ratio, log-rank test, all stratified by fold.

The cut never sees the test fold. A log-rank p on cross-validated groups is descriptive: the groups of one fold were
made by models trained on the others (Simon et al. 2011, Brief Bioinform 12:203).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from morphome.survival import kaplan_meier, kaplan_meier_interval, logrank, step

NOTE = "descriptive: cross-validated groups"
_Z = 1.959963984540054


class OneCovariate(NamedTuple):
    """β of one covariate, its standard error, ℓ(β), ℓ(0), and why they are NaN."""

    coef: float
    se: float
    loglik: float
    loglik_null: float
    reason: str = ""


def stratified_cox(
    x: ArrayLike, time: ArrayLike, event: ArrayLike, strata: ArrayLike | None = None, ties: str = "efron"
) -> OneCovariate:
    """Cox model of one covariate with a baseline hazard per stratum, by Newton's method with step halving.

    ℓ(β) = Σ_s Σ_k [Σ_{i∈D_k} x_i β − Σ_{l<d_k} log(Σ_{R_k} e^{xβ} − (l/d_k) Σ_{D_k} e^{xβ})], risk sets within the
    stratum (Efron 1977, JASA 72:557); Breslow's version leaves the l/d_k term out.
    """
    x, time = np.asarray(x, dtype=np.float64), np.asarray(time, dtype=np.float64)
    event = np.asarray(event).astype(bool)
    strata = np.zeros(len(x), dtype=int) if strata is None else np.asarray(strata)
    sets = []
    for stratum in np.unique(strata):
        inside = strata == stratum
        for t in np.unique(time[inside & event]):
            sets.append((x[inside & (time >= t)], x[inside & event & (time == t)]))
    null = _derivatives(0.0, sets, ties)
    if not null[2] > 1e-12:
        return OneCovariate(np.nan, np.nan, np.nan, null[0], "the covariate does not vary in any risk set")
    spread = max(float(np.ptp(x)), 1e-300)
    beta, (loglik, slope, curvature) = 0.0, null
    for _ in range(60):
        if abs(beta) * spread > 30.0 or curvature <= 1e-12 * null[2]:
            return OneCovariate(np.nan, np.nan, np.nan, null[0], "no finite hazard ratio: one group has no event")
        move = slope / curvature
        for _ in range(30):
            tried = _derivatives(beta + move, sets, ties)
            if np.isfinite(tried[0]) and tried[0] >= loglik - 1e-12 * abs(loglik):
                break
            move /= 2.0
        beta, (loglik, slope, curvature) = beta + move, tried
        if abs(move) * spread < 1e-10:
            return OneCovariate(beta, float(curvature**-0.5), loglik, null[0])
    return OneCovariate(np.nan, np.nan, np.nan, null[0], "the Cox model of the groups did not converge")


def _derivatives(beta: float, sets: list[tuple[np.ndarray, np.ndarray]], ties: str) -> tuple[float, float, float]:
    """ℓ(β), ℓ'(β), −ℓ''(β)."""
    loglik = slope = curvature = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for at_risk, dying in sets:
            powers = np.stack([np.ones_like(at_risk), at_risk, at_risk**2]) @ np.exp(beta * at_risk)
            share = np.arange(len(dying)) / len(dying) if ties == "efron" else np.zeros(len(dying))
            tied = np.stack([np.ones_like(dying), dying, dying**2]) @ np.exp(beta * dying)
            s0, s1, s2 = powers[:, None] - tied[:, None] * share[None, :]
            loglik += beta * dying.sum() - np.log(s0).sum()
            slope += dying.sum() - (s1 / s0).sum()
            curvature += (s2 / s0 - (s1 / s0) ** 2).sum()
    return float(loglik), float(slope), float(curvature)


def rmst(time: ArrayLike, event: ArrayLike, tau: float) -> float:
    """Restricted mean survival time: the area under the Kaplan-Meier curve up to τ, in the unit of ``time``.

    NaN when follow-up ends before τ and the curve has not reached 0.
    """
    times, survival = kaplan_meier(time, event)
    if times[-1] < tau and survival[-1] > 0:
        return float("nan")
    knots = np.concatenate([[0.0], times[(times > 0) & (times < tau)], [tau]])
    return float((step(times, survival, knots[:-1], before=1.0) * np.diff(knots)).sum())


def group_curves(time: np.ndarray, event: np.ndarray, high: np.ndarray) -> pd.DataFrame:
    """Kaplan-Meier curves of both groups, from month 0 on.

    Returns:
        ``group, time_months, survival, lower, upper, at_risk`` (just before the time), ``events`` (at the time).
    """
    parts = []
    for name, members in (("high", high), ("low", ~high)):
        if not members.any():
            continue
        t, e = time[members], event[members]
        times, survival, lower, upper = kaplan_meier_interval(t, e)
        parts.append(
            pd.DataFrame(
                {
                    "group": name,
                    "time_months": np.concatenate([[0.0], times]),
                    "survival": np.concatenate([[1.0], survival]),
                    "lower": np.concatenate([[np.nan], lower]),
                    "upper": np.concatenate([[np.nan], upper]),
                    "at_risk": np.concatenate([[len(t)], [(t >= u).sum() for u in times]]).astype("int64"),
                    "events": np.concatenate([[0], [(e & (t == u)).sum() for u in times]]).astype("int64"),
                }
            )
        )
    columns = ["group", "time_months", "survival", "lower", "upper", "at_risk", "events"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def compare_groups(
    time: np.ndarray, event: np.ndarray, high: np.ndarray, fold: np.ndarray, horizon: float | None
) -> dict[str, Any]:
    """Counts, hazard ratio high : low (Cox stratified by fold, Efron) and fold-stratified log-rank test.

    Returns:
        One row of ``morphome.risk_groups`` without names; NaN with a reason where a group or its events are missing.
    """
    event, high = event.astype(bool), high.astype(bool)
    row: dict[str, Any] = {
        "n_high": int(high.sum()),
        "n_low": int((~high).sum()),
        "events_high": int(event[high].sum()),
        "events_low": int(event[~high].sum()),
        **dict.fromkeys(("hazard_ratio", "hr_lower", "hr_upper", "logrank_chi2", "logrank_p"), np.nan),
        "rmst_high_months": np.nan,
        "rmst_low_months": np.nan,
        "note": NOTE,
        "reason": "",
    }
    if high.all() or not high.any():
        side = "above" if high.all() else "at or below"
        row["reason"] = f"all patients are {side} the training median: there are no two groups"
        return row
    cox = stratified_cox(high.astype(float), time, event, fold)
    row["hazard_ratio"] = float(np.exp(cox.coef))
    row["hr_lower"], row["hr_upper"] = (float(np.exp(cox.coef + side * _Z * cox.se)) for side in (-1, 1))
    row["logrank_chi2"], row["logrank_p"], why = logrank(time, event, high, fold)
    row["reason"] = "; ".join(dict.fromkeys(text for text in (cox.reason, why) if text))
    if horizon is not None:
        row["rmst_high_months"] = rmst(time[high], event[high], horizon)
        row["rmst_low_months"] = rmst(time[~high], event[~high], horizon)
    return row
