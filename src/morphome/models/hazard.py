"""The discrete-hazard head, its loss, its time bins and its survival curve; and the Cox loss.

Notation: K time bins, ``Y`` the bin of a patient's time, ``h_k = sigmoid(logit_k)`` the hazard of bin k,
``S_k = prod_{j<=k} (1 - h_j)`` the survival at the END of bin k, ``S_{-1} = 1``. Everything is computed in log
space, so nothing is clamped.

References: Zadeh and Schmid, IEEE TPAMI 43 (2021) 3126 (likelihood of discrete hazards); Breslow, Biometrics 30
(1974) 89 and Efron, JASA 72 (1977) 557 (ties in the Cox likelihood); King and Zeng, Political Analysis 9 (2001) 137
(intercepts after outcome-dependent sampling).
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import expit
from torch import Tensor

from morphome.errors import MorphomeError, MorphomeWarning


def log_hazard(logits: Tensor) -> Tensor:
    """log h_k, (B, K), from logits (B, K)."""
    return F.logsigmoid(logits)


def log_survival(logits: Tensor) -> Tensor:
    """log S_k = sum_{j<=k} log(1 - h_j), (B, K), from logits (B, K)."""
    return F.logsigmoid(-logits).cumsum(-1)


def hazards(logits: Tensor) -> Tensor:
    """h_k in (0, 1), (B, K), from logits (B, K)."""
    return torch.sigmoid(logits)


def survival(logits: Tensor) -> Tensor:
    """S_k at the end of bin k, (B, K), from logits (B, K)."""
    return log_survival(logits).exp()


def risk(logits: Tensor) -> Tensor:
    """risk = -sum_k S_k in [-K, 0], larger is worse; (B,) from logits (B, K)."""
    return -survival(logits).sum(-1)


def nll_loss(logits: Tensor, bins: Tensor, event: Tensor, beta: float = 0.0) -> Tensor:
    """Negative log-likelihood of discrete hazards, mean over patients.

    With c = 1 - event: ``L_cens = -c log S_Y``, ``L_unc = -(1 - c)(log S_{Y-1} + log h_Y)`` and
    ``L = (1 - beta) L_cens + L_unc``. A single patient is allowed.

    Args:
        logits: (B, K).
        bins: bin index Y, 0 ... K-1, (B,) integer.
        event: 1 = the end point was observed, 0 = censored, (B,).
        beta: down-weights the censored part; evaluation always uses 0.

    Returns:
        A scalar.

    Raises:
        MorphomeError: shapes do not fit.
    """
    if logits.ndim != 2 or bins.shape != logits.shape[:1] or event.shape != logits.shape[:1]:
        raise MorphomeError(
            f"nll_loss: logits {tuple(logits.shape)}, bins {tuple(bins.shape)}, event {tuple(event.shape)}",
            "give logits (B, K), bins (B,) and event (B,)",
        )
    index = bins.long().unsqueeze(-1)
    event = event.to(logits.dtype)
    log_one_minus = F.logsigmoid(-logits)
    log_s = log_one_minus.cumsum(-1)
    at = log_s.gather(-1, index).squeeze(-1)
    # S_{Y-1} is the sum without its own bin: no shifted copy and no special case for Y = 0.
    before = (log_s - log_one_minus).gather(-1, index).squeeze(-1)
    log_h = F.logsigmoid(logits).gather(-1, index).squeeze(-1)
    censored = -(1 - event) * at
    uncensored = -event * (before + log_h)
    return ((1 - beta) * censored + uncensored).mean()


def bin_edges(time: ArrayLike, event: ArrayLike, n_bins: int, where: str, last_edge: float | None = None) -> np.ndarray:
    """Inner edges q_1 ... q_{K-1}: the k/K quantiles (linear) of the times of the uncensored patients.

    The outer edges are -inf and +inf and are not returned. Fit on training patients only. With ``last_edge`` (the
    horizon) q_{K-1} is that time and the others are the k/(K-1) quantiles of the events before it, so that S is
    identified up to the horizon; plain quantiles leave the last 1/K of the events, and often the horizon, beyond
    the last edge.

    Args:
        time: months, (n,).
        event: 1 = observed, (n,).
        n_bins: K >= 2.
        where: what the patients are, for messages, e.g. ``"repeat 0, fold 3"``.
        last_edge: months; fixed before any model is fitted.

    Returns:
        (K-1,) float64, strictly increasing.

    Raises:
        MorphomeError: no event, or duplicate edges; names ``where``.
    """
    times = np.asarray(time, dtype=np.float64)[np.asarray(event).astype(bool)]
    if times.size == 0:
        raise MorphomeError(f"{where}: no event among the training patients", "use fewer or larger folds")
    if last_edge is None:
        edges = np.quantile(times, np.arange(1, n_bins) / n_bins)
    else:
        early = times[times < last_edge]
        inner = (
            np.quantile(early, np.arange(1, n_bins - 1) / (n_bins - 1)) if early.size else np.full(n_bins - 2, np.nan)
        )
        edges = np.append(inner, last_edge)
    if not np.all(np.diff(edges) > 0) or not np.all(np.isfinite(edges)):
        raise MorphomeError(
            f"{where}: the {n_bins} time bins have duplicate or non-finite edges "
            f"({', '.join(f'{e:g}' for e in edges)} months, {times.size} events)",
            "lower training.time_bins, or use fewer folds",
        )
    return edges


def bin_index(time: ArrayLike, edges: ArrayLike) -> np.ndarray:
    """Y = #{k : time >= q_k}, (n,) int64; bins are closed on the left. ``edges`` as from :func:`bin_edges`."""
    return np.searchsorted(np.asarray(edges, dtype=np.float64), np.asarray(time, dtype=np.float64), "right")


def baseline_offsets(logits: ArrayLike, bins: ArrayLike, event: ArrayLike) -> np.ndarray:
    """One offset b_k per bin such that expected and observed events agree: sum w_ik sigmoid(logit_ik + b_k) = d_k.

    The sum runs over those at risk in bin k, Y >= k. Who is censored in the bin counts half (w = 1/2, else 1): the
    actuarial convention of life tables. :func:`nll_loss` counts such a patient as surviving the whole bin, which
    lifts survival where bins are years wide. d_k, the events with Y = k, is kept 0.5 away from 0 and from the number
    at risk, where b_k would be infinite. The order of patients in a bin is kept.

    Args:
        logits: (n, K). bins: Y, (n,). event: 1 = observed, (n,).

    Returns:
        (K,) float64; 0 for a bin that nobody reaches.
    """
    logits, bins = np.asarray(logits, dtype=np.float64), np.asarray(bins)
    event = np.asarray(event).astype(bool)
    offsets = np.zeros(logits.shape[1])
    for k in range(logits.shape[1]):
        reached = bins >= k
        at_risk = logits[reached, k]
        if not at_risk.size:
            continue
        weight = np.where(~event & (bins == k), 0.5, 1.0)[reached]
        total = weight.sum()
        low = min(0.5, total / 2)
        observed = min(max(float((event & (bins == k)).sum()), low), total - low)
        # 40 beyond the extreme logit every hazard is 0 or 1 in double precision.
        offsets[k] = brentq(
            lambda b, x=at_risk, w=weight, d=observed: w @ expit(x + b) - d, -40 - at_risk.max(), 40 - at_risk.min()
        )
    return offsets


def survival_curve(log_s: Tensor, edges: ArrayLike, times: ArrayLike) -> Tensor:
    """S(t) at arbitrary times: log S interpolated linearly between bin edges (constant hazard rate in a bin).

    The knots are S(0) = 1 and S(q_k) = S_{k-1} for the finite edges q_1 ... q_{K-1}: the first bin spans 0 ... q_1.
    The last bin has no finite end, so S beyond q_{K-1} is not identified and is NaN. Times below 0 give 1.

    Args:
        log_s: log S_k, (B, K), from :func:`log_survival`.
        edges: q_1 ... q_{K-1}, months, positive and strictly increasing.
        times: months, (T,).

    Returns:
        (B, T) float64.

    Raises:
        MorphomeError: edges that do not fit K, or are not finite, positive and increasing.
    """
    log_s = log_s.detach().double()
    knots = torch.as_tensor(np.asarray(edges, dtype=np.float64), device=log_s.device)
    if knots.shape != (log_s.shape[-1] - 1,):
        raise MorphomeError(
            f"survival_curve: {knots.numel()} edges for {log_s.shape[-1]} bins", "give K - 1 inner edges"
        )
    knots = F.pad(knots, (1, 0))
    if not bool(torch.isfinite(knots).all()) or bool((knots.diff() <= 0).any()):
        raise MorphomeError(
            f"survival_curve: edges {np.asarray(edges).tolist()} are not finite, positive and increasing",
            "survival times must be above 0; fit the edges with bin_edges",
        )
    t = torch.as_tensor(np.asarray(times, dtype=np.float64), device=log_s.device)
    values = F.pad(log_s[:, :-1], (1, 0))
    left = (torch.searchsorted(knots, t, right=True) - 1).clamp(0, knots.numel() - 2)
    share = ((t - knots[left]) / (knots[left + 1] - knots[left])).clamp(min=0)
    curve = torch.exp(values[:, left] + share * (values[:, left + 1] - values[:, left]))
    return curve.masked_fill(t > knots[-1], float("nan"))


def cox_loss(log_risk: Tensor, time: Tensor, event: Tensor, ties: str = "efron") -> Tensor:
    """Negative log partial likelihood of Cox's model divided by the number of events; order of rows is immaterial.

    Risk sets are ``{j : t_j >= t_i}``. In log space (log-sum-exp) throughout.

    Args:
        log_risk: (B,) or (B, 1).
        time: months, (B,).
        event: 1 = observed, (B,).
        ties: ``"efron"`` or ``"breslow"``.

    Returns:
        A scalar; 0 (still attached to the graph) with a warning when the batch has no event.

    Raises:
        MorphomeError: a batch of one, whose loss is 0 whatever the model says; unknown ``ties``; shapes.
    """
    h = log_risk.reshape(-1)
    if ties not in ("efron", "breslow"):
        raise MorphomeError(f"cox_loss: ties={ties!r}", "choose efron or breslow")
    if time.shape != h.shape or event.shape != h.shape:
        raise MorphomeError(
            f"cox_loss: {h.numel()} risks, time {tuple(time.shape)}, event {tuple(event.shape)}",
            "give one risk, time and event per patient",
        )
    if h.numel() < 2:
        raise MorphomeError(
            "cox_loss: a batch of one patient has loss 0 for every model", "use a window of at least 2 patients"
        )
    event = event.bool()
    if not bool(event.any()):
        warnings.warn(MorphomeWarning("cox_loss: no event in the batch; its loss is 0"), stacklevel=2)
        return h.sum() * 0.0

    order = torch.argsort(time, descending=True, stable=True)
    h, event = h[order], event[order]
    _, group, size = torch.unique_consecutive(time[order], return_inverse=True, return_counts=True)
    # Sorted from late to early, so the risk set of a time is everything up to the last row of its tie group.
    log_at_risk = torch.logcumsumexp(h, 0)[size.cumsum(0) - 1]

    died, died_group = h[event], group[event]
    denominator = log_at_risk[died_group]
    if ties == "efron":
        # Deaths of one group are consecutive: l = 0, 1, ... d - 1 within the group.
        deaths = torch.bincount(died_group, minlength=size.numel())
        first = (deaths.cumsum(0) - deaths)[died_group]
        rank = torch.arange(died.numel(), device=h.device) - first
        top = torch.full_like(log_at_risk, -torch.inf)
        top = top.scatter_reduce(0, died_group, died.detach(), "amax")
        total = torch.zeros_like(log_at_risk).index_add(0, died_group, (died - top[died_group]).exp())
        log_deaths = top[died_group] + total[died_group].log()
        share = rank.to(h.dtype) / deaths[died_group].to(h.dtype)
        # share < 1 and the deaths are part of the risk set, so the argument of log1p stays above -1.
        denominator = denominator + torch.log1p(-share * (log_deaths - denominator).clamp(max=0).exp())
    return -(died - denominator).sum() / died.numel()
