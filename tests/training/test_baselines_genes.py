"""Rows on genes: values computed another way, and nothing seen that must not be."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from morphome import survival
from morphome.errors import MorphomeError
from morphome.files import write_parquet
from morphome.training import baselines_genes
from morphome.training.baselines_genes import ClinicalGenes, RandomForest, RidgeGenes, principal_axes
from morphome.training.checkpoint import load_model, save_model
from morphome.training.data import load_fold
from morphome.training.inner_cv import inner_cv_scores, inner_membership
from morphome.training.preprocess import ColumnScaler

GENE_BASELINES = {model.key: model for model in (RidgeGenes, ClinicalGenes, RandomForest)}
KEYS = list(GENE_BASELINES)
CLINICAL = {"covariates": ["age", "sex", "stage"], "ridge": 1.0}
RIDGE = {"panels": ["rna"], "ridges_per_column": [0.1, 1.0, 10.0], "inner_folds": 3, "clip": 5.0}
FOREST = {"trees": 10, "min_leaf": 5, "components": 4, "panels": ["rna"], "clip": 5.0}
SMALL = {
    "ridge_genes": RIDGE,
    "clinical_genes": {**CLINICAL, **RIDGE},
    "rsf": {"covariates": CLINICAL["covariates"], **FOREST},
}
TIMES = np.array([0.0, 5.0, 10.0])


def fitted(key, fold, seed=5, **changes):
    model = GENE_BASELINES[key]({**SMALL[key], **changes}, {"seed": 1}, seed)
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


def held_out_scores(fold, data, ridge, seed=5):
    """Out-of-fold x·β by the general Cox fit."""
    membership = inner_membership(fold, data, 3, seed, [])
    values = fold.gene_matrix(fold.panel_columns(["rna"]), data.ids)
    score = np.empty(len(data.ids))
    for k in range(3):
        held = membership == k
        scaler = ColumnScaler.fit(values[~held], 5.0)
        z = scaler.transform(values[~held])
        beta = survival.fit_cox_ridge(z, data.time[~held], data.event[~held], ridge, ties="breslow").coef
        score[held] = scaler.transform(values[held]) @ beta
    return score, membership


def test_ridge_is_chosen_by_the_out_of_fold_score(fold):
    model, notes = fitted("ridge_genes", fold)
    data = fold.outcomes("train", "inner_val")
    ridges = [90.0, 9.0, 0.9]  # 9 columns times 10, 1 and 0.1
    scores = []
    for ridge in ridges:
        score, membership = held_out_scores(fold, data, ridge)
        scores += list(inner_cv_scores(data, membership, 1, lambda _, held, s=score: s[held][None]))
    history = model.history
    np.testing.assert_allclose(history["inner_c"], scores, atol=1e-9)
    assert list(history["setting"].str.split(" ").str[0]) == ["ridge=90", "ridge=9", "ridge=0.9"]
    best = int(np.argmax(scores))
    assert list(history["chosen"]) == [i == best for i in range(3)]
    z = model._design(fold, data.ids)
    whole = survival.fit_cox_ridge(z, data.time, data.event, ridges[best], ties="breslow")
    np.testing.assert_allclose(model.arrays()["weights/coef"], whole.coef, atol=2e-5)
    assert not notes


def test_ridge_finds_the_planted_genes_and_predicts_the_test_patients(fold, planted):
    model, _ = fitted("ridge_genes", fold)
    coef = model.arrays()["weights/coef"]
    assert coef[:4].min() > np.abs(coef[4:]).max()
    ids = fold.ids("test")
    truth = planted(n=90).patients.set_index("patient_id").loc[list(ids)]
    risk, curves = model.predict(fold, ids, TIMES)
    assert survival.harrell(truth["time_months"], truth["event"], risk).c > 0.65
    assert (curves[:, 0] == 1).all()
    assert (np.diff(curves, axis=1) <= 0).all()


def test_equal_scores_take_the_strongest_penalty(fold, monkeypatch):
    monkeypatch.setattr(baselines_genes, "inner_cv_scores", lambda *a: np.array([0.6, 0.7, 0.7]))
    model, _ = fitted("ridge_genes", fold)
    assert list(model.history["chosen"]) == [False, True, False]


@pytest.mark.parametrize("key", ["ridge_genes", "clinical_genes"])
def test_inner_folds_keep_sites_together_when_the_outer_ones_do(key, load, planted, monkeypatch):
    cohort = planted(n=90)
    patients = cohort.patients.assign(site=[f"S{i % 8}" for i in range(90)])
    by_site = load(cohort.with_(patients=patients), "site")
    seen = []

    def spy(*given):
        seen.append(inner_membership(*given))
        return seen[-1]

    monkeypatch.setattr(baselines_genes, "inner_membership", spy)
    fitted(key, by_site)
    site = by_site.table.loc[list(by_site.ids("train", "inner_val")), "site"].to_numpy()
    assert len(seen) == 1
    assert len(set(seen[0])) == 3
    assert all(len(set(seen[0][site == s])) == 1 for s in set(site))


def test_late_fusion_is_a_cox_model_on_out_of_fold_scores(fold):
    model, _ = fitted("clinical_genes", fold, ridges_per_column=[1.0])
    data = fold.outcomes("train", "inner_val")
    score, _ = held_out_scores(fold, data, 9.0)
    clinical = model._encoder.transform(fold.table.loc[list(data.ids)])
    design = np.column_stack([clinical, (score - score.mean()) / score.std()])
    expected = survival.fit_cox_ridge(design, data.time, data.event, 1.0)
    np.testing.assert_allclose(model.arrays()["weights/coef"], expected.coef, atol=1e-4)
    genes, _ = fitted("ridge_genes", fold, ridges_per_column=[1.0])
    ids = fold.ids("test")
    later = (genes.predict(fold, ids, TIMES)[0] - score.mean()) / score.std()
    full = np.column_stack([model._encoder.transform(fold.table.loc[list(ids)]), later])
    np.testing.assert_allclose(model.predict(fold, ids, TIMES)[0], full @ expected.coef, atol=1e-3)
    assert model.n_parameters == len(expected.coef) + 9


def test_late_fusion_gives_noise_no_weight(load, planted):
    """300 columns of noise fit the training patients almost fully; scores out of fold show that they say nothing."""
    cohort = planted(n=90)
    rng = np.random.default_rng(8)
    noise = pd.DataFrame(rng.normal(size=(90, 300)).astype("f4"), columns=[f"N{j:03d}" for j in range(300)])
    noise.insert(0, "patient_id", cohort.patients["patient_id"])
    fold = load(cohort.with_(panels={**cohort.panels, "rna": noise}))
    model, _ = fitted("clinical_genes", fold, ridges_per_column=[0.1])
    data = fold.outcomes("train", "inner_val")
    genes, _ = fitted("ridge_genes", fold, ridges_per_column=[0.1])
    inside = genes.predict(fold, data.ids, TIMES)[0]
    assert survival.harrell(data.time, data.event, inside).c > 0.95
    assert abs(model.arrays()["weights/coef"][-1]) < 0.35
    naive = survival.fit_cox_ridge((inside / inside.std())[:, None], data.time, data.event, 1.0)
    assert naive.coef[0] > 1.2


def test_a_gene_score_that_does_not_vary_is_left_out(fold, monkeypatch):
    monkeypatch.setattr(baselines_genes.RidgeGenes, "_held_out", lambda self, values, *a: np.zeros((3, len(values))))
    model, notes = fitted("clinical_genes", fold)
    assert any("does not vary out of fold" in note for note in notes)
    assert model.arrays()["weights/coef"][-1] == 0
    assert np.isfinite(model.predict(fold, fold.ids(), TIMES)[0]).all()


def test_all_events_in_one_inner_fold(fold, monkeypatch):
    """Nothing can be fitted without that fold: its patients get a score of 0, and the strongest penalty is taken."""

    def by_event(_fold, data, *_):
        return 1 - data.event

    monkeypatch.setattr(baselines_genes, "inner_membership", by_event)
    model, notes = fitted("ridge_genes", fold)
    assert list(model.history["chosen"]) == [True, False, False]
    assert any("the strongest penalty" in note for note in notes)


def test_forest_sees_clinical_columns_and_components(fold):
    model, notes = fitted("rsf", fold)
    data = fold.outcomes("train", "inner_val")
    design = model._design(fold, data.ids)
    rows = fold.table.loc[list(data.ids)]
    np.testing.assert_array_equal(design[:, :-4], model._encoder.transform(rows))
    z = ColumnScaler.fit(fold.gene_matrix(fold.panel_columns(["rna"]), data.ids), 5.0).transform(
        fold.gene_matrix(fold.panel_columns(["rna"]), data.ids)
    )
    assert np.allclose(np.cov(design[:, -4:].T) - np.diag(np.var(design[:, -4:], axis=0, ddof=1)), 0, atol=1e-10)
    np.testing.assert_allclose(
        np.var(design[:, -4:], axis=0, ddof=1), np.linalg.eigvalsh(np.cov(z.T))[::-1][:4], rtol=1e-9
    )
    hazard = model._forest.cumulative_hazard(design)
    risk, curves = model.predict(fold, data.ids, TIMES)
    np.testing.assert_allclose(risk, hazard.sum(axis=1))
    assert (curves[:, 0] == 1).all()
    assert model.n_parameters == model._forest.n_splits > 10
    assert notes == []
    assert len(model._forest.root) == 10
    np.testing.assert_array_equal(fitted("rsf", fold)[0].predict(fold, data.ids, TIMES)[0], risk)
    assert (fitted("rsf", fold, seed=6)[0].predict(fold, data.ids, TIMES)[0] != risk).any()


def test_components_never_exceed_patients_or_columns(fold):
    z = np.random.default_rng(1).normal(size=(12, 30))
    axes = principal_axes(z, 500)
    assert axes.shape == (30, 11)
    np.testing.assert_allclose(axes.T @ axes, np.eye(11), atol=1e-12)
    assert (axes[np.abs(axes).argmax(axis=0), range(11)] > 0).all()
    model, notes = fitted("rsf", fold, components=50, min_leaf=60)
    assert model.arrays()["fitted/pca/axes"].shape == (9, 9)
    assert any("no tree" in note for note in notes)


@pytest.mark.parametrize("key", KEYS)
def test_a_saved_model_repeats_its_predictions(key, fold, tmp_path):
    model, _ = fitted(key, fold)
    save_model(tmp_path / "m.safetensors", model.arrays(), {"fitted": model.facts()}, {})
    arrays, facts = load_model(tmp_path / "m.safetensors")
    again = GENE_BASELINES[key](SMALL[key], {"seed": 1}, 5)
    again.restore(arrays, facts["fitted"])
    ids = fold.ids()
    risk, curves = model.predict(fold, ids, TIMES)
    found, found_curves = again.predict(fold, ids, TIMES)
    np.testing.assert_array_equal(found, risk)
    np.testing.assert_array_equal(found_curves, curves)
    # A patient's numbers do not depend on who else is asked for.
    alone = [model.predict(fold, [i], TIMES)[0][0] for i in ids[:8]]
    np.testing.assert_array_equal(alone, risk[:8])
    assert again.n_parameters == model.n_parameters > 0
    assert model.history["chosen"].sum() == 1


@pytest.mark.parametrize("key", KEYS)
def test_values_of_test_patients_touch_nothing_that_is_fitted(key, load, planted):
    cohort = planted()
    test = set(load(cohort).ids("test"))
    rna = cohort.panels["rna"].copy()
    rows = rna["patient_id"].isin(test)
    rna.loc[rows, [f"G{j}" for j in range(9)]] = 7.0
    patients = cohort.patients.copy()
    patients.loc[patients["patient_id"].isin(test), ["time_months", "age_years"]] = 1.5
    one, _ = fitted(key, load(cohort))
    other, _ = fitted(key, load(cohort.with_(patients=patients, panels={**cohort.panels, "rna": rna})))
    for name, values in one.arrays().items():
        np.testing.assert_array_equal(other.arrays()[name], values, err_msg=name)


@pytest.mark.parametrize("key", KEYS)
def test_patients_without_a_row_and_constant_tables(key, load, planted):
    cohort = planted()
    _, notes = fitted(key, load(cohort.with_(panels={"rna": cohort.panels["rna"].iloc[3:]})))
    assert any("3 patients have no row in 'rna'" in note for note in notes)
    flat = cohort.panels["rna"][["patient_id"]].assign(G0=np.float32(2.0))
    with pytest.raises(MorphomeError, match="no column of rna varies"):
        fitted(key, load(cohort.with_(panels={"rna": flat}, groups={})))
