"""Inner folds of the baselines: by patient, by site, and the score over them."""

from __future__ import annotations

import numpy as np
import pytest

from morphome import survival
from morphome.files import write_parquet
from morphome.training import baselines
from morphome.training.data import Outcomes, load_fold
from morphome.training.inner_cv import inner_cv_scores, inner_folds, inner_membership, inner_site_folds
from morphome.training.run import make_model

CHOOSERS = ["coxnet_genes", "mean_pool_cox"]


def outcomes(n: int, seed: int = 0) -> Outcomes:
    rng = np.random.default_rng(seed)
    ids = tuple(f"P{i}" for i in range(n))
    return Outcomes(ids, rng.exponential(size=n) + 0.1, (rng.uniform(size=n) < 0.4).astype("int64"))


def test_inner_folds_are_stratified_and_follow_the_id_not_the_row():
    data = outcomes(53)
    folds = inner_folds(data, 5, seed=3)
    assert np.ptp(np.bincount(folds)) <= 1
    assert np.ptp(np.bincount(folds[data.event == 1])) <= 1
    order = np.random.default_rng(1).permutation(53)
    shuffled = Outcomes(tuple(data.ids[i] for i in order), data.time[order], data.event[order])
    np.testing.assert_array_equal(inner_folds(shuffled, 5, seed=3), folds[order])
    assert (inner_folds(data, 5, seed=4) != folds).any()


def test_inner_scores_are_stratified_c():
    data = outcomes(40)
    folds = inner_folds(data, 4, seed=2)

    def perfect_and_reversed_and_constant(fit, held):
        assert not set(fit) & set(held)
        t = data.time[held]
        return np.stack([-t, t, np.zeros(len(t)), np.full(len(t), np.nan)])

    scores = inner_cv_scores(data, folds, 4, perfect_and_reversed_and_constant)
    np.testing.assert_array_equal(scores[:3], [1.0, 0.0, 0.5])
    assert np.isnan(scores[3])
    risk = np.random.default_rng(4).normal(size=40)
    counts = [survival.harrell(data.time[folds == k], data.event[folds == k], risk[folds == k]) for k in range(4)]
    expected = sum(c.concordant for c in counts) / sum(c.comparable for c in counts)
    np.testing.assert_allclose(inner_cv_scores(data, folds, 1, lambda _, held: risk[held][None]), [expected])


@pytest.fixture(scope="module")
def load(planted, tmp_path_factory):
    """``load(scheme, sites)``: fold 0 of the planted cohort with splits of that scheme and patients of these sites."""

    def get(scheme, sites):
        cohort = planted()
        patients = cohort.patients.assign(site=[f"S{i % sites}" for i in range(len(cohort.patients))])
        files = cohort.with_(patients=patients).write(tmp_path_factory.mktemp("cohort"))
        write_parquet(cohort.splits, files["splits"], "morphome.splits", {}, {"scheme": scheme})
        files.pop("split_facts")
        return load_fold(**files, repeat=0, fold=0)[0]

    return get


def test_whole_sites_and_even_events():
    data = outcomes(200, seed=1)
    rng = np.random.default_rng(2)
    site = np.array([f"S{i}" for i in rng.choice(17, size=200, p=rng.dirichlet(np.full(17, 2.0)))])
    folds = inner_site_folds(data, site, 4, seed=3)
    assert all(len(set(folds[site == s])) == 1 for s in site)
    assert set(folds) == set(range(4))
    # Longest first: no two folds differ by more than the events of one site.
    most = max(data.event[site == s].sum() for s in site)
    assert np.ptp(np.bincount(folds, weights=data.event)) <= most
    order = rng.permutation(200)
    shuffled = Outcomes(tuple(data.ids[i] for i in order), data.time[order], data.event[order])
    np.testing.assert_array_equal(inner_site_folds(shuffled, site[order], 4, seed=3), folds[order])


def test_sites_by_hand_and_those_without_events_fill_up_the_patients():
    # Events of patients: A 4 of 4, B 3 of 3, C 2 of 3, D 2 of 2, E 0 of 3, F 0 of 1.
    site = np.array(list("AAAABBBCCCDDEEEF"))
    event = np.array([1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    data = Outcomes(tuple(f"P{i}" for i in range(16)), np.ones(16), event)
    folds = dict(zip(site.tolist(), inner_site_folds(data, site, 2, seed=1).tolist(), strict=True))
    # Events 4|0, 4|3, 4|5, 6|5 with 6|6 patients; then E to the fewer events, F to the fewer patients.
    assert folds == {"A": 0, "B": 1, "C": 1, "D": 0, "E": 1, "F": 0}
    few = inner_site_folds(Outcomes(data.ids, data.time, (site == "A").astype(int)), site, 5, seed=1)
    assert set(few) == set(range(5))


@pytest.mark.parametrize("key", CHOOSERS)
def test_inner_folds_keep_sites_together_when_the_outer_ones_do(key, load, settings_of, monkeypatch):
    """What the models hand to the score: no site is on both sides of any inner fold."""
    fold = load("site", 7)
    assert fold.scheme == "site"
    seen = []

    def spy(data, membership, n, score_fold):
        def watched(fit, held):
            site = fold.table.loc[list(data.ids), "site"].to_numpy()
            seen.append((set(site[fit]), set(site[held])))
            return score_fold(fit, held)

        return inner_cv_scores(data, membership, n, watched)

    monkeypatch.setattr(baselines, "inner_cv_scores", spy)
    settings = settings_of(key)["model"]
    notes: list[str] = []
    make_model(key, settings["settings"], settings["training"], seed=5).fit(fold, notes)
    assert len(seen) == settings["settings"]["inner_folds"]
    assert all(fit and held and not fit & held for fit, held in seen)
    assert not any("inner folds" in note for note in notes)


def test_too_few_sites_fall_back_to_patients_with_a_note(load):
    fold = load("site", 2)
    data = fold.outcomes("train", "inner_val")
    notes: list[str] = []
    folds = inner_membership(fold, data, 3, 9, notes)
    np.testing.assert_array_equal(folds, inner_folds(data, 3, 9))
    assert len(notes) == 1
    assert "2 sites" in notes[0]
    assert "3 inner folds" in notes[0]
    assert "repeat 0, fold 0" in notes[0]


@pytest.mark.parametrize("scheme", ["random", "published"])
def test_other_schemes_draw_by_patient(scheme, load):
    fold = load(scheme, 7)
    data = fold.outcomes("train", "inner_val")
    notes: list[str] = []
    np.testing.assert_array_equal(inner_membership(fold, data, 3, 9, notes), inner_folds(data, 3, 9))
    assert notes == []


def test_no_more_inner_folds_than_events(load):
    fold = load("random", 7)
    data = fold.outcomes("train", "inner_val")
    rare = data._replace(event=np.where(np.cumsum(data.event) <= 3, data.event, 0))
    assert set(inner_membership(fold, rare, 10, 9, [])) == {0, 1, 2}
