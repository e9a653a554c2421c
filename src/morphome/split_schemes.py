"""How patients come into folds: by whole sites, at random within strata of the outcome, or by published lists.

Every function takes patients sorted by id and gives row numbers or fold numbers for them, so that the order of the
rows in a file cannot matter. Outcomes are used to balance folds only, never to choose who is analysed.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix, lil_matrix

from morphome.errors import MorphomeError

#: An inner validation part with fewer events decides nothing.
MIN_INNER_EVENTS = 4
#: Site-grouped inner parts outside these multiples of the asked fraction are replaced by a patient-wise draw.
INNER_SIZE_RANGE = (0.5, 2.0)
#: The search stops after this many nodes, which (unlike a time limit) gives the same folds on every machine.
_NODE_LIMIT = 400
#: Safety net only, about a second is usual: folds must not depend on a clock, so running into it is an error.
_TIME_LIMIT_S = 60.0
#: ``status`` of scipy's milp after the time limit (the node limit has no status of its own, only a message).
_OUT_OF_TIME = 1
_RELATIVE_GAP = 0.02
#: Pairs of sites tried when a repeat would be the same as an earlier one.
_PAIRS_TRIED = 6
#: Cost of one event missing to the required minimum, against one event off the balanced number.
_SHORTAGE_WEIGHT = 10.0
#: Cost of a whole cohort of patients off balance, in events of the whole cohort.
_PATIENT_WEIGHT = 0.2


# ------------------------------------------------------------------------------------------ site-preserved folds


def assign_sites(
    events: np.ndarray,
    patients: np.ndarray,
    event_targets: np.ndarray,
    patient_targets: np.ndarray,
    min_events: np.ndarray,
    cost: np.ndarray,
) -> tuple[np.ndarray, str]:
    """Put whole sites into bins by a small integer programme (HiGHS), else greedily.

    Minimises Σ_k |events_k − target_k| (beyond rounding) + 0.2·(share of patients off target, in events; 3 % are
    free) + 10·(events missing to ``min_events``) + Σ cost of the chosen places.

    Args:
        events, patients: (S,) per site; event_targets, patient_targets, min_events: (K,) per bin.
        cost: (S, K) random preferences, small against 1 event in total; they choose among equally good answers.

    Returns:
        Bin (S,) of each site, and how it was found: "integer programme" (within 2 % of the optimum), "integer
        programme, stopped at the node limit" or "greedy".

    Raises:
        MorphomeError: the clock ran out, so that another machine would give other folds.
    """
    n_sites, n_bins = len(events), len(event_targets)
    total_events, total_patients = max(1, int(events.sum())), max(1, int(patients.sum()))
    n_place = n_sites * n_bins
    n = n_place + 3 * n_bins  # places, events off, patients off, events short
    objective = np.concatenate(
        [
            cost.ravel(),
            np.ones(n_bins),
            np.full(n_bins, _PATIENT_WEIGHT * total_events / total_patients),
            np.full(n_bins, _SHORTAGE_WEIGHT),
        ]
    )
    rules = lil_matrix((n_sites + 5 * n_bins, n))
    lower, upper = np.full(rules.shape[0], -np.inf), np.full(rules.shape[0], np.inf)
    for s in range(n_sites):
        rules[s, s * n_bins : (s + 1) * n_bins] = 1.0
        lower[s] = upper[s] = 1.0
    row = n_sites
    for k in range(n_bins):
        here = np.arange(n_sites) * n_bins + k
        for counts, target, slack, free in (
            (events, event_targets[k], n_place + k, 0.0),
            (patients, patient_targets[k], n_place + n_bins + k, 0.03),
        ):
            rules[row, here], rules[row, slack] = counts, -1.0
            upper[row] = np.ceil(target * (1 + free) - 1e-9)
            rules[row + 1, here], rules[row + 1, slack] = counts, 1.0
            lower[row + 1] = np.floor(target * (1 - free) + 1e-9)
            row += 2
        rules[row, here], rules[row, n_place + 2 * n_bins + k] = events, 1.0
        lower[row] = min_events[k]
        row += 1
    whole = np.zeros(n)
    whole[:n_place] = 1
    limit = np.full(n, np.inf)
    limit[:n_place] = 1.0
    found = milp(
        objective,
        constraints=LinearConstraint(csr_matrix(rules), lower, upper),
        integrality=whole,
        bounds=Bounds(np.zeros(n), limit),
        options={"node_limit": _NODE_LIMIT, "mip_rel_gap": _RELATIVE_GAP, "time_limit": _TIME_LIMIT_S},
    )
    if found.status == _OUT_OF_TIME:
        raise MorphomeError(
            f"putting {n_sites} sites into {n_bins} parts took longer than {_TIME_LIMIT_S:g} s; what was found by then "
            "depends on the speed of this machine",
            "lower splits.folds, or set splits.scheme to 'random'",
        )
    at_limit = "Solution limit" in found.message  # HiGHS calls its node limit so
    if found.x is None or (found.status != 0 and not at_limit):
        return _greedy(events, patients, event_targets, patient_targets), "greedy"
    how = "integer programme, stopped at the node limit" if at_limit else "integer programme"
    return found.x[:n_place].reshape(n_sites, n_bins).argmax(axis=1), how


def _greedy(
    events: np.ndarray, patients: np.ndarray, event_targets: np.ndarray, patient_targets: np.ndarray
) -> np.ndarray:
    """Largest site first, each to the bin that lacks most events (then patients)."""
    bins = np.zeros(len(events), dtype=np.int64)
    left_events, left_patients = event_targets.astype(float), patient_targets.astype(float)
    for s in sorted(range(len(events)), key=lambda s: (-events[s], -patients[s], s)):
        k = max(range(len(left_events)), key=lambda k: (left_events[k], left_patients[k], -k))
        bins[s] = k
        left_events[k] -= events[s]
        left_patients[k] -= patients[s]
    return bins


def balanced_targets(events: np.ndarray, patients: np.ndarray, folds: int) -> tuple[np.ndarray, np.ndarray]:
    """Events and patients that each of ``folds`` can hope for when sites stay whole.

    A site with more events than its share fills a fold by itself; the others share the rest evenly.
    """
    order = sorted(range(len(events)), key=lambda s: (-events[s], s))
    left_events, left_patients, left_folds = float(events.sum()), float(patients.sum()), folds
    alone: list[int] = []
    for s in order:
        if left_folds <= 1 or events[s] <= left_events / left_folds:
            break
        alone.append(s)
        left_events -= events[s]
        left_patients -= patients[s]
        left_folds -= 1
    even = (left_events / left_folds, left_patients / left_folds)
    pairs = [(float(events[s]), float(patients[s])) for s in alone] + [even] * left_folds
    return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])


@dataclass
class SiteFolds:
    """Folds of one repeat: ``fold`` (n,) of each patient, how they were found, remarks for the reader."""

    fold: np.ndarray
    how: str
    notes: list[str] = field(default_factory=list)


def site_folds(
    site: Sequence[str],
    event: np.ndarray,
    folds: int,
    min_events: int,
    seed: int,
    repeat: int,
    earlier: Sequence[np.ndarray] = (),
) -> SiteFolds:
    """Folds that no site is split over, with events (then patients) as even as whole sites allow.

    Args:
        site: (n,) of patients sorted by id; event: (n,). earlier: fold vectors of the repeats before this one; a
            repeat does not take the same folds again unless nothing else leaves ``min_events`` in every fold.

    Raises:
        MorphomeError: fewer sites than folds.
    """
    names, index = np.unique(np.asarray(site, dtype=str), return_inverse=True)
    if len(names) < folds:
        raise MorphomeError(
            f"splits.scheme 'site' needs at least {folds} sites for {folds} folds; there are {len(names)} "
            f"({', '.join(names[:10])})",
            "lower splits.folds, or set splits.scheme to 'random'",
        )

    def solve(index: np.ndarray, stream: int) -> SiteFolds:
        n = int(index.max()) + 1
        events = np.bincount(index, weights=event, minlength=n).astype(np.int64)
        patients = np.bincount(index, minlength=n).astype(np.int64)
        # At most one event in total: balance comes before variety.
        cost = np.random.default_rng([seed, repeat, stream, 101]).random((n, folds)) / n
        targets = balanced_targets(events, patients, folds)
        bins, how = assign_sites(events, patients, *targets, np.full(folds, float(min_events)), cost)
        # An empty fold is no fold: the emptiest bins take the smallest sites of the fullest.
        return SiteFolds(_fill_empty(bins, patients, folds)[index], how)

    result = solve(index, 0)
    known = {_partition(fold) for fold in earlier}
    if _partition(result.fold) not in known:
        return result
    # Two sites that were always apart are kept together: the folds must then differ from all earlier ones.
    site_fold = [np.array([fold[index == s][0] for s in range(len(names))]) for fold in earlier]
    pairs = [
        (a, b)
        for a in range(len(names))
        for b in range(a + 1, len(names))
        if len(names) > folds and all(where[a] != where[b] for where in site_fold)
    ]
    np.random.default_rng([seed, repeat, 102]).shuffle(pairs)
    tried = []
    for stream, (a, b) in enumerate(pairs[:_PAIRS_TRIED], start=1):
        merged = np.where(index == b, a, index)
        tried.append(solve(np.unique(merged, return_inverse=True)[1], stream))
    counts = [np.bincount(other.fold, event, folds) for other in tried]
    fit = [i for i, count in enumerate(counts) if count.min() >= min_events]
    if fit:
        return tried[min(fit, key=lambda i: (np.ptp(counts[i]), i))]
    result.notes.append(f"repeat {repeat} has the same folds as an earlier one: there are too few sites to vary them")
    return result


def _fill_empty(bins: np.ndarray, patients: np.ndarray, folds: int) -> np.ndarray:
    bins = bins.copy()
    for k in range(folds):
        if (bins == k).any():
            continue
        crowded = [s for s in range(len(bins)) if (bins == bins[s]).sum() > 1]
        bins[min(crowded, key=lambda s: (patients[s], s))] = k
    return bins


def _partition(fold: np.ndarray) -> tuple[int, ...]:
    """The partition without its labels: folds renumbered by first appearance."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(int(k), len(first)) for k in fold)


# --------------------------------------------------------------------------------------- random and inner parts


def random_folds(time: np.ndarray, event: np.ndarray, folds: int, seed: int, repeat: int) -> np.ndarray:
    """Fold (n,) of patients sorted by id, stratified by event x tercile of time; sizes differ by one at most."""
    rng = np.random.default_rng([seed, repeat, 202])
    tercile = np.searchsorted(np.quantile(time, [1 / 3, 2 / 3]), time, side="right")
    fold = np.empty(len(time), dtype=np.int64)
    start = 0
    for stratum in [(1, 0), (1, 1), (1, 2), (0, 0), (0, 1), (0, 2)]:
        members = rng.permutation(np.flatnonzero((event == stratum[0]) & (tercile == stratum[1])))
        fold[members] = (start + np.arange(len(members))) % folds
        start += len(members)
    return fold


@dataclass
class Inner:
    """Inner validation part of one training fold.

    Attributes:
        member: (n,) bool over the training rows given.
        how: "whole sites" or "patients"; note: why sites were not kept whole, if they should have been.
    """

    member: np.ndarray
    how: str
    note: str = ""


def inner_by_patient(event: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Members (n,) bool: ``fraction`` of those with and of those without an event (at least one of each)."""
    member = np.zeros(len(event), dtype=bool)
    for outcome in (1, 0):
        rows = np.flatnonzero(event == outcome)
        if len(rows) > 1:
            size = min(len(rows) - 1, max(1, round(fraction * len(rows))))
            member[rng.permutation(rows)[:size]] = True
    return member


def inner_by_site(site: Sequence[str], event: np.ndarray, fraction: float, seed: Sequence[int]) -> Inner:
    """Whole sites that hold about ``fraction`` of the events and patients of a training fold.

    Falls back to :func:`inner_by_patient` (and says so) with fewer than 3 sites, fewer than 4 events in the inner
    part, or when whole sites are too coarse (less than half or more than twice the fraction).
    """
    rng = np.random.default_rng([*seed, 303])
    names, index = np.unique(np.asarray(site, dtype=str), return_inverse=True)
    if len(names) < 3:
        note = f"the training fold has {len(names)} sites; whole sites for inner validation need 3"
        return Inner(inner_by_patient(event, fraction, rng), "patients", note)
    events = np.bincount(index, weights=event, minlength=len(names)).astype(np.int64)
    patients = np.bincount(index, minlength=len(names)).astype(np.int64)
    shares = np.array([fraction, 1 - fraction])
    least = np.array([min(MIN_INNER_EVENTS, events.sum()), 0], dtype=float)
    cost = rng.random((len(names), 2)) / len(names)
    bins, _ = assign_sites(events, patients, events.sum() * shares, patients.sum() * shares, least, cost)
    chosen = bins == 0
    size, found = patients[chosen].sum() / patients.sum(), int(events[chosen].sum())
    low, high = INNER_SIZE_RANGE
    if found < MIN_INNER_EVENTS:
        note = (
            f"whole sites near {fraction:.0%} of the training fold hold {found} events (fewer than {MIN_INNER_EVENTS})"
        )
    elif not low * fraction <= size <= high * fraction:
        note = f"whole sites would give {size:.0%} of the training fold instead of {fraction:.0%}"
    else:
        return Inner(chosen[index], "whole sites")
    return Inner(inner_by_patient(event, fraction, rng), "patients", note)


# ---------------------------------------------------------------------------------------------- published folds


@dataclass
class PublishedFold:
    """One ``splits_<k>.csv``: its two lists of patients; ``val`` is the test fold (there is no other)."""

    train: list[str]
    test: list[str]


def read_published(folder: Path, folds: int) -> list[PublishedFold]:
    """Read ``splits_0.csv … splits_<folds-1>.csv``: columns ``train`` and ``val``, padded with blanks.

    Raises:
        MorphomeError: missing files, columns or patients; another number of files; a patient in both lists of one
            file or in the ``val`` lists of two.
    """
    folder = Path(folder)
    files = sorted(folder.glob("splits_*.csv"))
    wanted = [folder / f"splits_{k}.csv" for k in range(folds)]
    if {f.name for f in files} != {f.name for f in wanted}:
        raise MorphomeError(
            f"{folder}: splits.folds = {folds} needs splits_0.csv to splits_{folds - 1}.csv; found "
            f"{', '.join(f.name for f in files) or 'none'}",
            "check splits.folder and set splits.folds to the number of files",
        )
    result = [_read_fold(path) for path in wanted]
    seen: dict[str, int] = {}
    for k, fold in enumerate(result):
        for patient in fold.test:
            if patient in seen:
                raise MorphomeError(
                    f"{wanted[k]}: patient {patient} is in 'val' here and in splits_{seen[patient]}.csv",
                    "every patient may be tested once; use a folder of one cross-validation",
                )
            seen[patient] = k
    return result


def _read_fold(path: Path) -> PublishedFold:
    with path.open(newline="", encoding="utf-8-sig") as handle:
        rows = list(csv.DictReader(handle))
    columns = set(rows[0]) if rows else set()
    if not {"train", "val"} <= columns:
        raise MorphomeError(
            f"{path}: needs the columns 'train' and 'val'; has {', '.join(sorted(c for c in columns if c)) or 'none'}",
            "use split files as MCAT, PORPOISE and SurvPath publish them",
        )
    if any(_patient(row.get("test")) for row in rows):
        raise MorphomeError(
            f"{path}: has a 'test' column with patients; folds with three parts are not supported",
            "rename 'test' to 'val' and put the old 'val' into 'train' (the inner validation is drawn from it)",
        )
    lists = {c: [p for row in rows if (p := _patient(row.get(c)))] for c in ("train", "val")}
    for column, patients in lists.items():
        if len(set(patients)) < len(patients):
            twice = sorted({p for p in patients if patients.count(p) > 1})
            raise MorphomeError(f"{path}: {column} names {', '.join(twice[:5])} twice", "list every patient once")
    both = sorted(set(lists["train"]) & set(lists["val"]))
    if both:
        raise MorphomeError(
            f"{path}: {len(both)} patients are in 'train' and in 'val' ({', '.join(both[:5])})",
            "a patient must be on one side only",
        )
    return PublishedFold(lists["train"], lists["val"])


def _patient(value: str | None) -> str:
    value = (value or "").strip()
    return "" if value.lower() in {"nan", "na"} else value
