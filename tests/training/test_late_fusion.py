"""Late fusion of clinical covariates, genes and slides: the scores are out of fold, and no test outcome is seen."""

from __future__ import annotations

import numpy as np
import pytest

from morphome import survival
from morphome.files import write_parquet
from morphome.training import baselines, baselines_genes
from morphome.training.baselines import MeanPoolCox
from morphome.training.baselines_genes import RidgeGenes
from morphome.training.checkpoint import load_model, save_model
from morphome.training.data import load_fold
from morphome.training.inner_cv import inner_membership
from morphome.training.late_fusion import LateFusion
from morphome.training.preprocess import ColumnScaler

SETTINGS = {
    "covariates": ["age", "sex", "stage"],
    "ridge": 1.0,
    "panels": ["rna"],
    "ridges_per_column": [0.1, 1.0, 10.0],
    "clip": 5.0,
    "statistics": "mean_sd",
    "components": 6,
    "ridges": [3.0, 30.0],
    "inner_folds": 3,
}
ONE = {"ridges_per_column": [1.0], "ridges": [30.0]}
TIMES = np.array([0.0, 5.0, 10.0])


def fitted(fold, row=LateFusion, seed=5, **changes):
    model = row({**SETTINGS, **changes}, {"seed": 1}, seed)
    notes: list[str] = []
    model.fit(fold, notes)
    return model, notes


@pytest.fixture(scope="module")
def load(planted, tmp_path_factory):
    """``load(cohort, scheme)``: fold 0 of a planted cohort."""

    def get(cohort=None, scheme="random"):
        cohort = planted(n=90) if cohort is None else cohort
        files = cohort.write(tmp_path_factory.mktemp("cohort"))
        write_parquet(cohort.splits, files["splits"], "morphome.splits", {}, {"scheme": scheme})
        files.pop("split_facts")
        return load_fold(**files, repeat=0, fold=0)[0]

    return get


@pytest.fixture(scope="module")
def fold(load):
    return load()


def slide_scores(fold, data, seed=5):
    """Out-of-fold x·β of the slides, every step written out."""
    membership = inner_membership(fold, data, 3, seed, [])
    bags = [fold.bag(i)[0].astype(float) for i in data.ids]
    pooled = np.array([np.concatenate([bag.mean(0), bag.std(0)]) for bag in bags])
    score = np.empty(len(data.ids))
    for k in range(3):
        held = membership == k
        scaler = ColumnScaler.fit(pooled[~held])
        z = scaler.transform(pooled[~held])
        axes = np.linalg.svd(z - z.mean(0))[2][:6].T
        beta = survival.fit_cox_ridge(z @ axes, data.time[~held], data.event[~held], 30.0).coef
        score[held] = scaler.transform(pooled[held]) @ axes @ beta
    return score


def gene_scores(fold, data, seed=5):
    """Out-of-fold x·β of the genes by the general Cox fit."""
    membership = inner_membership(fold, data, 3, seed, [])
    values = fold.gene_matrix(fold.panel_columns(["rna"]), data.ids)
    score = np.empty(len(data.ids))
    for k in range(3):
        held = membership == k
        scaler = ColumnScaler.fit(values[~held], 5.0)
        z = scaler.transform(values[~held])
        beta = survival.fit_cox_ridge(z, data.time[~held], data.event[~held], 9.0, ties="breslow").coef
        score[held] = scaler.transform(values[held]) @ beta
    return score


def test_it_is_a_cox_model_on_out_of_fold_scores(fold):
    model, notes = fitted(fold, **ONE)
    data = fold.outcomes("train", "inner_val")
    rows = fold.table.loc[list(data.ids)]
    scores = [gene_scores(fold, data), slide_scores(fold, data)]
    design = np.column_stack([model._encoder.transform(rows), *((s - s.mean()) / s.std() for s in scores)])
    expected = survival.fit_cox_ridge(design, data.time, data.event, 1.0)
    np.testing.assert_allclose(model.arrays()["weights/coef"], expected.coef, atol=1e-4)
    assert notes == []
    # Later patients get the scores of the rows of that name.
    ids = fold.ids("test")
    rows = [fitted(fold, row, **ONE)[0].predict(fold, ids, TIMES)[0] for row in (RidgeGenes, MeanPoolCox)]
    later = [(r - s.mean()) / s.std() for r, s in zip(rows, scores, strict=True)]
    full = np.column_stack([model._encoder.transform(fold.table.loc[list(ids)]), *later])
    np.testing.assert_allclose(model.predict(fold, ids, TIMES)[0], full @ expected.coef, atol=1e-3)
    assert model.n_parameters == len(expected.coef) + 9 + 6
    assert list(model.history["setting"]) == ["ridge=1; genes ridge=9 (1 per column); slides ridge=30"]


def test_it_finds_both_planted_signals(load, planted):
    cohort = planted(n=120, seed=1)
    fold = load(cohort)
    model, _ = fitted(fold)
    coef = model.arrays()["weights/coef"]
    assert coef[-2:].min() > 0.2  # log hazard ratio per SD of the genes' and of the slides' score
    ids = fold.ids("test")
    truth = cohort.patients.set_index("patient_id").loc[list(ids)]
    risk, curves = model.predict(fold, ids, TIMES)
    parts = [fitted(fold, row)[0].predict(fold, ids, TIMES)[0] for row in (RidgeGenes, MeanPoolCox)]
    c = [survival.harrell(truth["time_months"], truth["event"], r).c for r in (risk, *parts)]
    assert c[0] > max(c[1:])
    assert c[0] > 0.7
    assert (curves[:, 0] == 1).all()
    assert (np.diff(curves, axis=1) <= 0).all()


def test_outcomes_of_test_patients_touch_nothing(load, planted):
    cohort = planted()
    fold = load(cohort)
    test = list(fold.ids("test"))
    patients = cohort.patients.set_index("patient_id", drop=False)
    order = np.random.default_rng(2).permutation(len(test))
    shuffled = patients.copy()
    for column in ("time_months", "event"):
        shuffled.loc[test, column] = patients.loc[test, column].to_numpy()[order]
    assert not shuffled["time_months"].equals(patients["time_months"])
    other = load(cohort.with_(patients=shuffled.reset_index(drop=True)))
    (one, _), (two, _) = fitted(fold), fitted(other)
    for name, values in one.arrays().items():
        np.testing.assert_array_equal(two.arrays()[name], values, err_msg=name)
    for a, b in zip(one.predict(fold, test, TIMES), two.predict(other, test, TIMES), strict=True):
        np.testing.assert_array_equal(a, b)
    # The same permutation among training patients does change it.
    train = list(fold.ids("train"))
    moved = patients.copy()
    moved.loc[train, "time_months"] = patients.loc[train, "time_months"].to_numpy()[::-1]
    third, _ = fitted(load(cohort.with_(patients=moved.reset_index(drop=True))))
    assert (third.arrays()["weights/coef"] != one.arrays()["weights/coef"]).any()


def test_values_of_test_patients_touch_nothing_that_is_fitted(load, planted):
    cohort = planted()
    test = set(load(cohort).ids("test"))
    rna = cohort.panels["rna"].copy()
    rna.loc[rna["patient_id"].isin(test), [f"G{j}" for j in range(9)]] = 7.0
    bags = {slide: bag + (4.0 if slide.rsplit("-", 1)[0] in test else 0.0) for slide, bag in cohort.bags.items()}
    one, _ = fitted(load(cohort))
    other, _ = fitted(load(cohort.with_(bags=bags, panels={**cohort.panels, "rna": rna})))
    for name, values in one.arrays().items():
        np.testing.assert_array_equal(other.arrays()[name], values, err_msg=name)


def test_a_saved_model_repeats_its_predictions(fold, tmp_path):
    model, _ = fitted(fold)
    save_model(tmp_path / "m.safetensors", model.arrays(), {"fitted": model.facts()}, {})
    arrays, facts = load_model(tmp_path / "m.safetensors")
    again = LateFusion(SETTINGS, {"seed": 1}, 5)
    again.restore(arrays, facts["fitted"])
    ids = fold.ids()
    risk, curves = model.predict(fold, ids, TIMES)
    found, found_curves = again.predict(fold, ids, TIMES)
    np.testing.assert_array_equal(found, risk)
    np.testing.assert_array_equal(found_curves, curves)
    alone = [model.predict(fold, [i], TIMES)[0][0] for i in ids[:8]]
    np.testing.assert_array_equal(alone, risk[:8])
    assert again.n_parameters == model.n_parameters > 0
    assert again.facts() == model.facts()
    assert set(again.arrays()) == set(model.arrays())
    assert model.history["chosen"].sum() == 1


def test_a_score_that_does_not_vary_is_left_out(fold, monkeypatch):
    monkeypatch.setattr(RidgeGenes, "_held_out", lambda self, values, *a: np.zeros((3, len(values))))
    model, notes = fitted(fold)
    assert any("score of the genes does not vary out of fold" in note for note in notes)
    assert model.arrays()["weights/coef"][-2] == 0
    assert model.arrays()["weights/coef"][-1] != 0
    assert np.isfinite(model.predict(fold, fold.ids(), TIMES)[0]).all()


def test_both_parts_draw_the_same_inner_folds_by_site(load, planted, monkeypatch):
    cohort = planted(n=90)
    patients = cohort.patients.assign(site=[f"S{i % 8}" for i in range(90)])
    by_site = load(cohort.with_(patients=patients), "site")
    seen = []

    def spy(*given):
        seen.append(inner_membership(*given))
        return seen[-1]

    monkeypatch.setattr(baselines, "inner_membership", spy)
    monkeypatch.setattr(baselines_genes, "inner_membership", spy)
    fitted(by_site)
    assert len(seen) == 2
    np.testing.assert_array_equal(*seen)
    site = by_site.table.loc[list(by_site.ids("train", "inner_val")), "site"].to_numpy()
    assert all(len(set(seen[0][site == s])) == 1 for s in set(site))


def test_remarks_of_both_parts_stand_once(load, planted):
    cohort = planted(n=90)
    two_sites = cohort.patients.assign(site=[f"S{i % 2}" for i in range(90)])
    few = load(cohort.with_(patients=two_sites), "site")
    _, notes = fitted(few)
    assert sum("too few for 3 inner folds by site" in note for note in notes) == 1


def test_the_mean_pool_row_has_a_score_for_every_patient(fold, monkeypatch):
    """Where all events lie in one inner fold, that fold's patients get 0: nothing can be fitted without them."""
    monkeypatch.setattr(baselines, "inner_membership", lambda fold, data, *_: 1 - data.event)
    model = MeanPoolCox(SETTINGS, {"seed": 1}, 5)
    data = fold.outcomes("train", "inner_val")
    score = model.fit_scores(fold, [])
    assert (score[data.event == 1] == 0).all()
    assert (score[data.event == 0] != 0).all()
