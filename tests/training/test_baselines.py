"""Linear rows: selection, by-hand values."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from morphome import survival
from morphome.errors import MorphomeError
from morphome.models.catalog import models
from morphome.training import baselines
from morphome.training.data import load_fold
from morphome.training.run import make_model


def fitted(key, cohort, folder, settings, **changes):
    files = cohort.write(folder)
    files.pop("split_facts")
    fold, _ = load_fold(**files, repeat=0, fold=0)
    model = make_model(key, {**settings["model"]["settings"], **changes}, settings["model"]["training"], seed=5)
    notes: list[str] = []
    model.fit(fold, notes)
    return model, fold, notes


def test_registry_agrees_with_the_model_table():
    expected = {key: info.needs for key, info in models().items() if info.kind == "baseline"}
    assert {key: models()[key].load().needs for key in expected} == expected


def test_an_unknown_model_is_refused():
    with pytest.raises(MorphomeError, match="'nope' is not a model"):
        make_model("nope", {}, {}, 1)


def test_random_score_is_stable(planted, settings_of, tmp_path):
    model, fold, _ = fitted("random", planted(), tmp_path, settings_of("random"))
    risk, curves = model.predict(fold, ["P-000", "P-001"], np.array([0.0, 1e3]))
    # Golden: the score of a patient must never change between versions, folds or machines.
    assert risk[0] == 1884935978447862984 / 2**63
    assert 0 <= risk[1] < 1
    train = fold.outcomes("train", "inner_val")
    _, km = survival.kaplan_meier(train.time, train.event)
    assert list(curves[0]) == [1.0, km[-1]]


def test_clinical_cox_solves_its_penalised_likelihood(planted, settings_of, tmp_path):
    """The gradient of the log-likelihood (Efron = Breslow without ties) equals ridge · β at the solution."""
    model, fold, notes = fitted("clinical_cox", planted(), tmp_path, settings_of("clinical_cox"), ridge=2.0)
    assert any("grade" in note for note in notes)
    data = fold.outcomes("train", "inner_val")
    assert len(set(data.time)) == len(data.time)
    design = model._design(fold, data.ids)
    beta = model.arrays()["weights/coef"]
    weight = np.exp(design @ beta)
    gradient = np.zeros(len(beta))
    for i in np.flatnonzero(data.event):
        at_risk = data.time >= data.time[i]
        gradient += design[i] - weight[at_risk] @ design[at_risk] / weight[at_risk].sum()
    np.testing.assert_allclose(gradient, 2.0 * beta, atol=1e-4)
    risk, curves = model.predict(fold, data.ids, np.array([0.0, 5.0, 10.0]))
    np.testing.assert_allclose(risk, design @ beta)
    assert (curves[:, 0] == 1).all()
    assert (np.diff(curves, axis=1) <= 0).all()
    # Breslow by hand.
    jumps = [(data.time[i], 1 / weight[data.time >= data.time[i]].sum()) for i in np.flatnonzero(data.event)]
    hazard = sum(jump for t, jump in jumps if t <= 10.0)
    np.testing.assert_allclose(curves[:, 2], np.exp(-hazard * weight), rtol=1e-6)


def test_coxnet_finds_the_planted_genes_and_ignores_constant_columns(planted, settings_of, tmp_path):
    cohort = planted(n=90)
    rna = cohort.panels["rna"].assign(AAA=np.float32(3.0), ZZZ=np.float32("nan"))
    model, _fold, _ = fitted(
        "coxnet_genes", cohort.with_(panels={**cohort.panels, "rna": rna}), tmp_path, settings_of("coxnet_genes")
    )
    coef = dict(zip([c.gene for c in model._columns], model.arrays()["weights/coef"], strict=True))
    assert coef["AAA"] == coef["ZZZ"] == 0
    signal, noise = sum(coef[f"G{i}"] for i in range(4)), sum(abs(coef[f"G{i}"]) for i in range(4, 9))
    assert signal > 2 * noise
    assert signal > 0
    history = model.history
    assert history["chosen"].sum() == 1
    assert history.loc[history["chosen"], "inner_c"].item() == history["inner_c"].max()
    assert history["setting"].str.startswith("alpha=").all()


def test_a_coxnet_without_any_gene_is_not_chosen(planted, settings_of, tmp_path, monkeypatch):
    """The strongest penalty leaves no gene on all training patients; even the best inner score must not pick it."""

    def best_at_the_strongest(data, membership, n, score_fold):
        return np.linspace(0.9, 0.5, n)

    monkeypatch.setattr(baselines, "inner_cv_scores", best_at_the_strongest)
    model, _fold, _ = fitted("coxnet_genes", planted(n=90), tmp_path, settings_of("coxnet_genes"))
    assert model.arrays()["weights/coef"].any()
    assert model.history["chosen"].to_numpy().argmax() > 0


def test_mean_pool_caps_components_and_is_invariant_to_tile_order(planted, settings_of, tmp_path):
    cohort = planted()
    settings = settings_of("mean_pool_cox")
    model, fold, _ = fitted("mean_pool_cox", cohort, tmp_path / "a", settings, components=500)
    assert model.arrays()["fitted/pca/axes"].shape == (16, 16)  # 8 means and 8 SDs, fewer than n − 1
    few, _, _ = fitted("mean_pool_cox", cohort, tmp_path / "b", settings, components=3)
    axes = few.arrays()["fitted/pca/axes"]
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-10)
    bags = {slide: bag[::-1] for slide, bag in cohort.bags.items()}
    other, fold_other, _ = fitted("mean_pool_cox", cohort.with_(bags=bags), tmp_path / "c", settings, components=500)
    times = np.array([5.0])
    np.testing.assert_allclose(
        other.predict(fold_other, fold.ids(), times)[0], model.predict(fold, fold.ids(), times)[0], atol=1e-8
    )


def test_components_never_exceed_n_minus_1(planted, settings_of, tmp_path):
    cohort = planted(n=18)
    model, fold, _ = fitted("mean_pool_cox", cohort, tmp_path, settings_of("mean_pool_cox"), components=50)
    n = len(fold.ids("train", "inner_val"))
    assert model.arrays()["fitted/pca/axes"].shape[1] == n - 1 < 16


def test_equal_scores_take_the_strongest_penalty(planted, settings_of, tmp_path, monkeypatch):
    import morphome.training.baselines as module

    monkeypatch.setattr(module, "inner_cv_scores", lambda *a: np.array([0.6, 0.7, 0.7]))
    model, _, _ = fitted("mean_pool_cox", planted(), tmp_path, settings_of("mean_pool_cox"))
    assert list(model.history["chosen"]) == [False, False, True]


def test_missing_patients_of_a_panel_are_noted(planted, settings_of, tmp_path):
    cohort = planted()
    rna: pd.DataFrame = cohort.panels["rna"].iloc[3:]
    model, fold, notes = fitted(
        "coxnet_genes", cohort.with_(panels={"rna": rna}), tmp_path, settings_of("coxnet_genes")
    )
    assert any("3 patients have no row in 'rna'" in note for note in notes)
    risk, _ = model.predict(fold, ["P-000", "P-001"], np.array([1.0]))
    assert risk[0] == risk[1]  # both get the medians
