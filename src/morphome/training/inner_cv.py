"""Cross-validation inside the training part of a fold, by which the baselines choose their penalty.

Its folds are drawn as the outer ones: where the test part holds whole sites back, so does every inner fold. Otherwise
the penalty would be chosen for patients of known sites and used for those of new ones, and come out too weak.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from morphome import survival
from morphome.training.data import FoldData, Outcomes, derive_seed


def inner_membership(fold: FoldData, data: Outcomes, folds: int, seed: int, notes: list[str]) -> np.ndarray:
    """Inner fold (n,) of each patient of ``data``: by site if the outer folds are and there are sites enough.

    Args:
        folds: wanted; fewer when there are fewer events or too few patients.
        notes: gets a remark when patients of one site must be spread although the outer folds are by site.
    """
    folds = max(2, min(folds, int(data.event.sum()), len(data.ids) // 2))
    if fold.scheme != "site":
        return inner_folds(data, folds, seed)
    site = fold.table.loc[list(data.ids), "site"].astype(str).to_numpy()
    count = len(set(site))
    if count < folds:
        notes.append(
            f"{count} sites in training are too few for {folds} inner folds by site: the penalty was chosen on inner "
            f"folds drawn by patient ({fold.where})"
        )
        return inner_folds(data, folds, seed)
    return inner_site_folds(data, site, folds, seed)


def inner_folds(data: Outcomes, folds: int, seed: int) -> np.ndarray:
    """Inner fold (n,) of each patient: stratified by event, by the hash of seed and patient id.

    Row order and the outcomes of others do not matter; every fold gets its share of events (±1).
    """
    fold = np.empty(len(data.ids), dtype=np.int64)
    start = 0
    for stratum in (1, 0):
        members = sorted(np.flatnonzero(data.event == stratum), key=lambda i: derive_seed("inner", seed, data.ids[i]))
        for place, i in enumerate(members):
            fold[i] = (start + place) % folds
        start += len(members)
    return fold


def inner_site_folds(data: Outcomes, site: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """Inner fold (n,) of each patient, no site in two of them: from the site with most events down, each goes to the
    fold with the fewest events; sites without events even out the patients. Equal sites are ordered by a hash.

    Args:
        site: (n,), at least ``folds`` different ones, so that no fold is empty.
    """
    names, index = np.unique(np.asarray(site, dtype=str), return_inverse=True)
    events = np.bincount(index, weights=data.event).astype(np.int64)
    patients = np.bincount(index)
    order = sorted(
        range(len(names)), key=lambda s: (-events[s], -patients[s], derive_seed("inner site", seed, names[s]))
    )
    load = np.zeros((folds, 2), dtype=np.int64)
    place = np.empty(len(names), dtype=np.int64)
    for s in order:
        first, second = (0, 1) if events[s] else (1, 0)
        k = min(range(folds), key=lambda f: (load[f, first], load[f, second], f))
        place[s] = k
        load[k] += events[s], patients[s]
    return place[index]


def inner_cv_scores(
    data: Outcomes,
    membership: np.ndarray,
    n_settings: int,
    score_fold: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Stratified C of each setting: concordant over comparable pairs, both summed within inner folds.

    Args:
        membership: (n,) inner fold of each patient, as from :func:`inner_membership`.
        score_fold: ``(rows to fit, rows held out) -> (n_settings, held out)`` risks; NaN where a fit failed.

    Returns:
        (n_settings,) float64; NaN without any comparable pair.
    """
    concordant, comparable = np.zeros(n_settings), np.zeros(n_settings)
    for k in np.unique(membership):
        fit, held = np.flatnonzero(membership != k), np.flatnonzero(membership == k)
        if not data.event[fit].any() or not data.event[held].any():
            continue
        risks = score_fold(fit, held)
        for s in range(n_settings):
            if np.isnan(risks[s]).any():
                concordant[s] = np.nan
                continue
            pairs = survival.harrell(data.time[held], data.event[held], risks[s])
            concordant[s] += pairs.concordant + 0.5 * pairs.tied_risk
            comparable[s] += pairs.comparable
    return np.where(comparable > 0, concordant / np.maximum(comparable, 1.0), np.nan)
