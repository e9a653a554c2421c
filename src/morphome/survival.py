"""The one door to scikit-survival: Cox and forest fits, concordance, time-dependent AUC, Brier score, Kaplan-Meier.

Numpy in, numpy out. ``time`` is in any one unit (months in this package), ``event`` is 1 where it happened, a
higher ``risk`` is worse. A number that cannot be computed is NaN with a reason, never an exception.

Convention for the censoring curve G(t) = P(C > t), the same in every metric: Kaplan-Meier of the censoring times of
the TRAINING patients, evaluated at T_i itself (right-continuous; at a tied time events leave before censorings).
Textbooks write G(T_i-); on real data this moves Uno's C and the Brier score by up to 0.001.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from sksurv.compare import compare_survival
from sksurv.ensemble import RandomSurvivalForest
from sksurv.linear_model import CoxnetSurvivalAnalysis, CoxPHSurvivalAnalysis
from sksurv.linear_model.coxph import BreslowEstimator
from sksurv.metrics import concordance_index_censored, concordance_index_ipcw, cumulative_dynamic_auc
from sksurv.nonparametric import kaplan_meier_estimator
from sksurv.util import Surv

from morphome.errors import MorphomeError

#: Risks closer than this are ties.
TIED_TOLERANCE = 1e-8
#: Trees grown at a time: until its few jumps are taken out, every node holds two curves over all training times.
TREES_AT_A_TIME = 25


class Metric(NamedTuple):
    """A value, or NaN with the reason why there is none."""

    value: float
    reason: str = ""


@dataclass(frozen=True)
class Concordance:
    """Harrell's C and the counts behind it.

    Attributes:
        c: concordant plus half the risk ties, over comparable pairs; NaN when there is no comparable pair.
        concordant, discordant, tied_risk: numbers of comparable pairs; ``comparable`` is their sum.
        tied_time: pairs with equal times of which exactly one is an event (they are comparable and counted above).
        reason: why ``c`` is NaN.
    """

    c: float
    concordant: int
    discordant: int
    tied_risk: int
    tied_time: int
    reason: str = ""

    @property
    def comparable(self) -> int:
        """Number of comparable pairs."""
        return self.concordant + self.discordant + self.tied_risk


@dataclass(frozen=True)
class CoxFit:
    """A fitted Cox model; its linear predictor is x.β, not centred.

    Attributes:
        coef: (p,) float64.
        baseline_times, baseline_cumulative_hazard: (m,) Breslow's estimate of the training patients.
        converged: the last Newton step changed the log-likelihood by less than 1e-9 of itself.
    """

    coef: np.ndarray
    baseline_times: np.ndarray
    baseline_cumulative_hazard: np.ndarray
    converged: bool = True

    def risk(self, X: ArrayLike) -> np.ndarray:
        """Linear predictor (n,) of X (n, p); higher = worse."""
        return np.asarray(X, dtype=np.float64) @ self.coef

    def survival(self, X: ArrayLike, times: ArrayLike) -> np.ndarray:
        """S_i(t) = exp(−H0(t)·exp(x_i.β)), (n, T); before the first baseline time H0 = 0, after the last it stays."""
        hazard = step(self.baseline_times, self.baseline_cumulative_hazard, times, before=0.0)
        return np.exp(-np.exp(self.risk(X))[:, None] * hazard[None, :])


# ------------------------------------------------------------------------------------------------- Cox models


def fit_cox_ridge(X: ArrayLike, time: ArrayLike, event: ArrayLike, ridge: float, ties: str = "efron") -> CoxFit:
    """Ridge Cox model: minimises −ℓ(β) + ½·ridge·‖β‖², ℓ the partial log-likelihood (not divided by n).

    Args:
        X: (n, p), finite; time: (n,); event: (n,); ridge: ≥ 0; ties: "efron" or "breslow".

    Raises:
        MorphomeError: no event, or a likelihood without a finite maximum (a constant or separating column at ridge 0).
    """
    X = np.asarray(X, dtype=np.float64)
    time, event = _outcome(time, event)
    if not event.any():
        raise MorphomeError(
            f"a Cox model cannot be fitted: none of {len(time)} training patients has an event",
            "use fewer folds, another end point, or more patients",
        )
    model = CoxPHSurvivalAnalysis(alpha=float(ridge), ties=ties)
    try:
        with warnings.catch_warnings(record=True) as caught, np.errstate(all="ignore"):
            warnings.simplefilter("always")
            model.fit(X, _surv(time, event))
    except (ValueError, np.linalg.LinAlgError) as problem:
        raise _cox_failed(X, ridge, problem) from problem
    coef = np.asarray(model.coef_, dtype=np.float64)
    if not np.isfinite(coef).all():
        raise _cox_failed(X, ridge, "coefficients are not finite")
    converged = not any("converge" in str(w.message) for w in caught)
    return CoxFit(coef, *breslow(X @ coef, time, event), converged)


def _cox_failed(X: np.ndarray, ridge: float, problem: object) -> MorphomeError:
    constant = np.flatnonzero(np.ptp(X, axis=0) == 0)
    where = f"; column(s) {constant.tolist()} do not vary" if len(constant) else ""
    return MorphomeError(
        f"the Cox model with ridge {ridge:g} on {X.shape[1]} columns has no finite solution ({problem}){where}",
        "use a larger ridge, or drop columns without variance",
    )


def fit_coxnet(
    X: ArrayLike,
    time: ArrayLike,
    event: ArrayLike,
    l1_ratio: float,
    n_alphas: int | None = None,
    alphas: Sequence[float] | None = None,
    alpha_min_ratio: float | str = "auto",
) -> list[tuple[float, np.ndarray]]:
    """Elastic-net Cox path (Simon et al. 2011, J Stat Softw 39(5); Breslow ties).

    Minimises −(1/n)·ℓ(β) + α(l1_ratio·‖β‖₁ + ½(1−l1_ratio)·‖β‖²), for each α.

    Args:
        X: (n, p), already on comparable scales; l1_ratio: in (0, 1].
        n_alphas: length of an automatic path (100 by default), from the α that removes every column down to
            ``alpha_min_ratio`` of it. alphas: these penalties instead.

    Returns:
        ``(α, coef (p,))`` by falling α. Penalties too small for a stable fit are missing at the end.

    Raises:
        MorphomeError: no event, or no penalty of the path gives a finite fit.
    """
    X = np.asarray(X, dtype=np.float64)
    time, event = _outcome(time, event)
    if not event.any():
        raise MorphomeError(
            f"an elastic-net Cox model cannot be fitted: none of {len(time)} training patients has an event",
            "use fewer folds, another end point, or more patients",
        )
    outcome = _surv(time, event)
    asked = None if alphas is None else sorted({float(a) for a in alphas}, reverse=True)
    ratio = alpha_min_ratio
    for _ in range(12):
        model = CoxnetSurvivalAnalysis(
            n_alphas=n_alphas or 100, alphas=asked, alpha_min_ratio=ratio, l1_ratio=float(l1_ratio)
        )
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")  # an empty model at the top of the path is no problem
                model.fit(X, outcome)
        except ArithmeticError:
            # Weights overflow at the weakly penalised end: leave that end off.
            if asked is None:
                ratio = min(0.9, 3.0 * (0.01 if isinstance(ratio, str) else float(ratio)))
            else:
                asked = asked[: max(1, int(0.75 * len(asked)))] if len(asked) > 1 else asked
        else:
            pairs = zip(model.alphas_, model.coef_.T, strict=True)
            return [(float(alpha), np.array(coef, dtype=np.float64)) for alpha, coef in pairs]
    raise MorphomeError(
        "the elastic-net Cox model has no finite solution for any penalty tried",
        "check the molecular table for extreme values, or clip it",
    )


def fit_survival_forest(
    X: ArrayLike, time: ArrayLike, event: ArrayLike, *, trees: int, min_leaf: int, seed: int
) -> dict[str, np.ndarray]:
    """Random survival forest: bootstrap trees, log-rank splits among √p columns (Ishwaran et al. 2008, AoAS 2:841).

    Args:
        X: (n, p), finite; time: (n,); event: (n,).
        min_leaf: least number of different patients in a leaf; seed: decides every draw.

    Returns:
        The arrays of :class:`morphome.training.forest.SurvivalForest`, by name.

    Raises:
        MorphomeError: no event.
    """
    X = np.asarray(X, dtype=np.float64)
    time, event = _outcome(time, event)
    if not event.any():
        raise MorphomeError(
            f"a survival forest cannot be grown: none of {len(time)} training patients has an event",
            "use fewer folds, another end point, or more patients",
        )
    draws = np.random.default_rng(seed)
    event_times = np.unique(time[event])
    # A censoring counts as at the last event before it: the same patients at risk at every event, so the same splits
    # and curves, on a shorter list of times. Those before the first event are at risk at none.
    place = np.searchsorted(event_times, time, side="right") - 1
    outcome = _surv(np.where(place >= 0, event_times[place], 0.5 * event_times[0]), event)
    parts: dict[str, list[np.ndarray]] = {}
    start = 0
    for first in range(0, trees, TREES_AT_A_TIME):
        forest = RandomSurvivalForest(
            n_estimators=min(TREES_AT_A_TIME, trees - first),
            min_samples_leaf=min_leaf,
            max_features="sqrt",
            random_state=int(draws.integers(2**31)),
            n_jobs=1,
        ).fit(X, outcome)
        at = np.searchsorted(forest.unique_times_, event_times)
        for grown in forest.estimators_:
            tree = grown.tree_
            leaf = np.asarray(tree.children_left) < 0
            hazard = np.where(leaf[:, None], np.asarray(tree.value)[:, at, 0], 0.0)
            rise = np.diff(hazard, axis=1, prepend=0.0)
            node, place = np.nonzero(rise)
            found = {
                "root": np.array([start]),
                "left": np.where(leaf, -1, tree.children_left + start),
                "right": np.where(leaf, -1, tree.children_right + start),
                # The library marks leaves by a negative column.
                "feature": np.where(leaf, 0, tree.feature),
                "threshold": np.where(leaf, 0.0, tree.threshold),
                "jump_node": node + start,
                "jump_time": place,
                "jump": rise[node, place],
            }
            for name, values in found.items():
                parts.setdefault(name, []).append(np.asarray(values))
            start += len(leaf)
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    return {name: v.astype(np.int64) if v.dtype.kind == "i" else v for name, v in joined.items()} | {
        "event_times": event_times
    }


def breslow(risk: ArrayLike, time: ArrayLike, event: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Breslow's baseline cumulative hazard H0(t) = Σ_{t_k ≤ t} d_k / Σ_{j: T_j ≥ t_k} exp(risk_j).

    Args:
        risk: (n,) linear predictor.

    Returns:
        Unique observed times (m,) and H0 there (m,); zero throughout without events.
    """
    time, event = _outcome(time, event)
    risk = np.asarray(risk, dtype=np.float64)
    with np.errstate(over="ignore"):
        fitted = BreslowEstimator().fit(risk, event, time)
    found = fitted.cum_baseline_hazard_
    return np.asarray(found.x, dtype=np.float64), np.asarray(found.y, dtype=np.float64)


# --------------------------------------------------------------------------------------------- discrimination


def harrell(time: ArrayLike, event: ArrayLike, risk: ArrayLike) -> Concordance:
    """Harrell's C = Σ δ_i 1{T_i<T_j}[1{M_i>M_j} + ½·1{M_i=M_j}] / Σ δ_i 1{T_i<T_j}, and its counts.

    A pair with T_i = T_j counts when exactly one is an event; risks closer than 1e-8 are ties.
    """
    time, event = _outcome(time, event)
    risk = np.asarray(risk, dtype=np.float64)
    reason = _no_risk(risk)
    if not reason and len(time) < 2:
        reason = "fewer than two patients"
    if not reason and not event.any():
        reason = f"no event among {len(time)} patients"
    if reason:
        return Concordance(np.nan, 0, 0, 0, 0, reason)
    try:
        with np.errstate(invalid="ignore"):
            found = concordance_index_censored(event, time, risk, tied_tol=TIED_TOLERANCE)
    except ValueError:  # NoComparablePairException is one
        return Concordance(np.nan, 0, 0, 0, 0, "no comparable pair")
    concordant, discordant, tied_risk, tied_time = (int(v) for v in found[1:])
    if concordant + discordant + tied_risk == 0:
        return Concordance(np.nan, 0, 0, 0, tied_time, "no comparable pair")
    return Concordance(float(found[0]), concordant, discordant, tied_risk, tied_time)


def uno(
    train_time: ArrayLike,
    train_event: ArrayLike,
    time: ArrayLike,
    event: ArrayLike,
    risk: ArrayLike,
    tau: float,
) -> Metric:
    """Uno's C(τ): like Harrell's, each pair weighted by δ_i 1{T_i<τ} / G(T_i)² (Uno et al. 2011, Stat Med 30:1105).

    Args:
        train_time, train_event: training patients, for G. tau: horizon; ``np.inf`` for none (unstable).
    """
    train_time, train_event = _outcome(train_time, train_event)
    time, event = _outcome(time, event)
    risk = np.asarray(risk, dtype=np.float64)
    if reason := _no_risk(risk) or _no_horizon(tau):
        return Metric(np.nan, reason)
    early = event & (time < tau)
    if not early.any():
        return Metric(np.nan, f"no event before {tau:g}")
    if reason := _bad_weights(train_time, train_event, time[early]):
        return Metric(np.nan, reason)
    if np.isfinite(tau):
        time, event = truncate(time, event, tau)
    try:
        with np.errstate(invalid="ignore"):
            found = concordance_index_ipcw(
                _surv(train_time, train_event),
                _surv(time, event),
                risk,
                tau=tau if np.isfinite(tau) else None,
                tied_tol=TIED_TOLERANCE,
            )
    except ValueError as problem:
        return Metric(np.nan, str(problem))
    return Metric(float(found[0])) if np.isfinite(found[0]) else Metric(np.nan, "no comparable pair")


def auc_at(
    train_time: ArrayLike,
    train_event: ArrayLike,
    time: ArrayLike,
    event: ArrayLike,
    risk: ArrayLike,
    tau: float,
) -> Metric:
    """Cumulative-dynamic AUC(τ): cases T_i ≤ τ with an event weigh 1/G(T_i), controls have T_j > τ.

    AUC = Σ_ij w_i 1{T_j>τ}[1{M_i>M_j} + ½·1{M_i=M_j}] / (Σ w_i · #controls) (Uno et al. 2007, JASA 102:527; Hung
    and Chiang 2010). The test patients are truncated just beyond τ first: the library would otherwise refuse a fold
    because of an event long after τ.
    """
    train_time, train_event = _outcome(train_time, train_event)
    time, event = _outcome(time, event)
    risk = np.asarray(risk, dtype=np.float64)
    if reason := _no_risk(risk) or _no_horizon(tau):
        return Metric(np.nan, reason)
    case = event & (time <= tau)
    if not case.any():
        return Metric(np.nan, f"no case up to {tau:g}")
    if not (time > tau).any():
        return Metric(np.nan, f"no control beyond {tau:g}")
    if reason := _bad_weights(train_time, train_event, time[case]):
        return Metric(np.nan, reason)
    time, event = truncate(time, event, tau)
    try:
        found, _ = cumulative_dynamic_auc(
            _surv(train_time, train_event), _surv(time, event), risk, [tau], tied_tol=TIED_TOLERANCE
        )
    except ValueError as problem:
        return Metric(np.nan, str(problem))
    return Metric(float(found[0]))


# --------------------------------------------------------------------------------------------------- accuracy


def brier_contributions(
    train_time: ArrayLike,
    train_event: ArrayLike,
    time: ArrayLike,
    event: ArrayLike,
    survival: ArrayLike,
    times: ArrayLike,
) -> tuple[np.ndarray, str]:
    """Each patient's share of the Brier score; the mean over patients is BS(t) (Graf et al. 1999, Stat Med 18:2529).

    b_i(t) = S_i(t)² 1{T_i≤t, δ_i=1}/G(T_i) + (1−S_i(t))² 1{T_i>t}/G(t). Written out here because the library gives
    only the mean (the bootstrap needs the shares) and refuses times before the first test patient's time.

    Args:
        survival: (n, T) probabilities at ``times`` (T,), increasing.

    Returns:
        (n, T) float64 and a reason; all NaN with a reason when they cannot be computed.
    """
    train_time, train_event = _outcome(train_time, train_event)
    time, event = _outcome(time, event)
    times = np.atleast_1d(np.asarray(times, dtype=np.float64))
    survival = np.asarray(survival, dtype=np.float64).reshape(len(time), len(times))
    empty = np.full(survival.shape, np.nan)
    if not len(times):
        return empty, "no time points"
    missing = np.isnan(survival).any(axis=0)
    if missing.any():
        first = times[np.flatnonzero(missing)[0]]
        return empty, f"survival is not identified from {first:g} on"
    # Truncation: what happens after the last time point needs no weight.
    time, event = truncate(time, event, times[-1])
    case = event[:, None] & (time[:, None] <= times[None, :])
    control = time[:, None] > times[None, :]
    needed = np.concatenate([time[event], times[control.any(axis=0)]])
    if reason := _bad_weights(train_time, train_event, needed):
        return empty, reason
    knots, g = censoring_km(train_time, train_event)
    at_own = np.ones(len(time))
    at_own[event] = step(knots, g, time[event], before=1.0)
    at_times = step(knots, g, times, before=1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        died = np.where(case, survival**2 / at_own[:, None], 0.0)
        alive = np.where(control, (1.0 - survival) ** 2 / at_times[None, :], 0.0)
    return died + alive, ""


def integrate(curves: np.ndarray, times: ArrayLike) -> np.ndarray:
    """Mean height of curves (…, T) over the range of ``times``, by the trapezoid rule."""
    times = np.asarray(times, dtype=np.float64)
    width = np.diff(times)
    return ((curves[..., 1:] + curves[..., :-1]) * (0.5 * width)).sum(axis=-1) / (times[-1] - times[0])


# --------------------------------------------------------------------------------- curves and their comparison


def kaplan_meier(time: ArrayLike, event: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Unique observed times (m,) and Kaplan-Meier S(t) there (m,)."""
    time, event = _outcome(time, event)
    times, survival = kaplan_meier_estimator(event, time)
    return np.asarray(times, dtype=np.float64), np.asarray(survival, dtype=np.float64)


def kaplan_meier_interval(time: ArrayLike, event: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Times, S(t) and its pointwise 95 % limits on the log(−log) scale; NaN limits where S(t) is 1 or 0."""
    time, event = _outcome(time, event)
    with np.errstate(all="ignore"):
        times, survival, limits = kaplan_meier_estimator(event, time, conf_type="log-log")
    fixed = (survival >= 1.0) | (survival <= 0.0)
    lower, upper = (np.where(fixed, np.nan, side) for side in limits)
    return times, survival, lower, upper


def censoring_km(time: ArrayLike, event: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Unique observed times (m,) and G(t) = P(C > t) there (m,); at a tied time events leave first."""
    time, event = _outcome(time, event)
    times, g = kaplan_meier_estimator(event, time, reverse=True)
    return np.asarray(times, dtype=np.float64), np.asarray(g, dtype=np.float64)


def logrank(
    time: ArrayLike, event: ArrayLike, group: ArrayLike, strata: ArrayLike | None = None
) -> tuple[float, float, str]:
    """Two-group log-rank test, stratified when ``strata`` is given: χ² = (Σ_s U_s)² / Σ_s V_s with 1 df.

    Returns:
        χ², p and a reason; NaN when no stratum has both groups at risk at an event.
    """
    time, event = _outcome(time, event)
    group = np.asarray(group).astype(bool)
    strata = np.zeros(len(time), dtype=int) if strata is None else np.asarray(strata)
    difference = variance = 0.0
    for stratum in np.unique(strata):
        rows = strata == stratum
        if not event[rows].any() or len(np.unique(group[rows])) < 2:
            continue
        try:
            with np.errstate(invalid="ignore", divide="ignore"):
                found = compare_survival(_surv(time[rows], event[rows]), group[rows], return_stats=True)
        except np.linalg.LinAlgError:  # variance 0: never both groups at risk at an event
            continue
        difference += float(found[2]["statistic"].iloc[0])
        variance += float(found[3][0, 0])
    if variance <= 0:
        return np.nan, np.nan, "no stratum has both groups at risk at an event"
    chi2 = difference**2 / variance
    return chi2, float(stats.chi2.sf(chi2, 1)), ""


# ---------------------------------------------------------------------------------------------------- helpers


def step(knots: ArrayLike, values: ArrayLike, at: ArrayLike, before: float) -> np.ndarray:
    """Right-continuous step function: the value at the last knot ≤ ``at``; ``before`` ahead of the first knot."""
    place = np.searchsorted(np.asarray(knots), np.atleast_1d(np.asarray(at, dtype=np.float64)), side="right")
    return np.concatenate([[before], np.asarray(values, dtype=np.float64)])[place]


def truncate(time: np.ndarray, event: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes as seen just after τ: T' = min(T, τ+ε), δ' = δ·1{T ≤ τ}; ε = 1e-9·τ keeps controls beyond τ."""
    return np.minimum(time, tau * (1.0 + 1e-9)), event & (time <= tau)


def censoring_at(train_time: ArrayLike, train_event: ArrayLike, at: ArrayLike) -> np.ndarray:
    """G at the times ``at``; NaN beyond the last training time unless G has reached 0 there."""
    knots, g = censoring_km(train_time, train_event)
    at = np.atleast_1d(np.asarray(at, dtype=np.float64))
    found = step(knots, g, at, before=1.0)
    return np.where((at > knots[-1]) & (g[-1] > 0), np.nan, found)


def _bad_weights(train_time: np.ndarray, train_event: np.ndarray, at: np.ndarray) -> str:
    """Why G cannot weigh these times, or nothing."""
    if len(train_time) < 2 or not train_event.any():
        return "no event among the training patients"
    g = censoring_at(train_time, train_event, at)
    if np.isnan(g).any():
        return f"the follow-up of the training fold ends at {train_time.max():g}, before {np.max(at):g}"
    if (g <= 0).any():
        return f"the censoring curve of the training fold is 0 at {np.min(np.asarray(at)[g <= 0]):g}"
    return ""


def _no_risk(risk: np.ndarray) -> str:
    bad = int((~np.isfinite(risk)).sum())
    return f"{bad} of {len(risk)} risks are not finite" if bad else ""


def _no_horizon(tau: float | None) -> str:
    return "no horizon" if tau is None or np.isnan(tau) or tau <= 0 else ""


def _outcome(time: ArrayLike, event: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    time, event = np.asarray(time, dtype=np.float64), np.asarray(event)
    if time.shape != event.shape or time.ndim != 1:
        raise ValueError(f"time {time.shape} and event {event.shape} must be two columns of equal length")
    return time, event.astype(bool)


def _surv(time: np.ndarray, event: np.ndarray) -> np.ndarray:
    return Surv.from_arrays(event, time)
