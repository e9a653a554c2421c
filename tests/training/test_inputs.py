"""What a model is given: encoders of RNA, genes at training only, parts fitted on the training fold."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from morphome.errors import MorphomeError
from morphome.files import write_parquet
from morphome.models.registry import network
from morphome.training.data import FoldData, load_fold
from morphome.training.inputs import Inputs
from morphome.training.run import load_run, run_train
from morphome.training.trainer import NeuralModel

ENCODERS = [{"name": "snn_raw"}, {"name": "pca", "components": 4}, {"name": "pathway_mean"}, {"name": "scgpt"}]


def names(encoder):
    return encoder["name"]


@pytest.fixture(scope="module")
def files(planted, tmp_path_factory):
    return planted().write(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def encoded(planted, tmp_path_factory):
    """Vectors of a frozen encoder, and the same with others for the test patients."""
    cohort, folder = planted(), tmp_path_factory.mktemp("encoded")
    rng = np.random.default_rng(2)
    ids = cohort.patients["patient_id"]
    table = pd.DataFrame({"patient_id": ids, **{f"e{j}": rng.normal(size=len(ids)).astype("f4") for j in range(12)}})
    write_parquet(table, folder / "encoded.parquet", "morphome.encoded", {})
    return folder / "encoded.parquet"


@pytest.fixture
def fold_of(files, encoded):
    def make(encoder, **changes):
        tables = {k: v for k, v in {**files, **changes}.items() if k != "split_facts"}
        if encoder["name"] == "scgpt":
            tables["panels"] = {**tables["panels"], "encoded": encoded}
        return load_fold(**tables, repeat=0, fold=0, rna_encoder=encoder)[0]

    return make


# -- encoders of RNA ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("encoder", ENCODERS, ids=names)
def test_path_gptomic_with_every_kind_of_encoder(encoder, files, encoded, fold_of, settings_of, tmp_path):
    fold = fold_of(encoder)
    panels = {**files["panels"], **({"encoded": encoded} if encoder["name"] == "scgpt" else {})}
    settings = {**settings_of("path_gptomic"), "encoder": encoder}
    tables = {**files, "panels": panels}
    run_train(settings=settings, **tables, name="p", repeat=0, fold=0, out=tmp_path, threads=1)
    predictions = pd.read_parquet(tmp_path / "predictions.parquet")
    model = load_run(tmp_path)
    risk, _ = model.predict(fold)
    np.testing.assert_array_equal(risk, predictions["risk"])
    # RNA: 9 genes, 4 components, 3 groups, 12 values of the frozen encoder; 5 mutations; no copy numbers.
    width = {"snn_raw": 9, "pca": 4, "pathway_mean": 3, "scgpt": 12}[encoder["name"]]
    assert (model.model.dims.n_rna, model.model.dims.n_mut, model.model.dims.n_cnv) == (width, 5, 0)
    assert model.model.dims.group_sizes == {}
    train = np.stack([model.model.inputs.batch(fold, i).rna.numpy() for i in fold.ids("train")])
    assert train.shape[1] == width
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-5)
    if encoder["name"] == "pca":
        covariance = np.cov(train.T, ddof=0)
        np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-5)
    if encoder["name"] == "pathway_mean":
        columns = [("rna", g) for g in ("G2", "G3", "G5")]
        raw = fold.gene_matrix([c for c in model.model.inputs.columns if tuple(c) in columns], fold.ids("train"))
        z = (raw - raw.mean(axis=0)) / raw.std(axis=0)
        np.testing.assert_allclose(train[:, list(fold.groups).index("growth")], z.mean(axis=1), atol=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS, ids=names)
def test_encoders_see_training_patients_only(encoder, fold_of, planted, settings_of, tmp_path):
    """Other genes of the other patients: nothing that is fitted changes."""
    cohort = planted()
    roles = cohort.splits[cohort.splits["fold"] == 0].set_index("patient_id")["role"]
    panels = {}
    for name, panel in cohort.panels.items():
        rows = panel["patient_id"].map(roles) != "train"
        panels[name] = panel.copy()
        panels[name].loc[rows, list(panel.columns[1:])] = 7.0
    other = cohort.with_(panels=panels).write(tmp_path)
    found = []
    for fold in (fold_of(encoder), fold_of(encoder, panels=other["panels"])):
        inputs = Inputs("k", network("path_gptomic").needs, frozenset(), 9, False, "cpu", 1)
        inputs.fit(fold, fold.outcomes("train"), [])
        found.append((inputs.arrays(), inputs.batch(fold, fold.ids("train")[0]).rna))
    assert found[0][0].keys() == found[1][0].keys()
    assert all(np.array_equal(value, found[1][0][name]) for name, value in found[0][0].items())
    assert torch.equal(found[0][1], found[1][1])


def test_no_rna_at_all_is_an_error_for_people(fold_of, files, settings_of, tiny_models):
    fold = fold_of({"name": "snn_raw"}, panels={"mut": files["panels"]["mut"]})
    training = settings_of("path_gptomic")["model"]["training"]
    with pytest.raises(MorphomeError, match="needs RNA"):
        NeuralModel("path_gptomic", tiny_models["path_gptomic"], training, seed=1).fit(fold, [])


# -- genes ---------------------------------------------------------------------------------------------------
def test_values_of_a_patient_do_not_depend_on_who_else_is_there(fold_of, monkeypatch):
    fold = fold_of({"name": "pca", "components": 4})
    inputs = Inputs("k", frozenset({"rna", "mut", "omic_groups", "omic_all"}), frozenset(), 9, False, "cpu", 1)
    inputs.fit(fold, fold.outcomes("train"), [])
    few = fold.with_roles({fold.ids("test")[3]: "test", fold.ids("test")[1]: "test"})
    for patient in few.ids():
        inputs.forget()
        among_all = inputs.batch(fold, patient)
        inputs.forget()
        alone = inputs.batch(few, patient)
        for part in ("rna", "mut", "omic_all"):
            assert torch.equal(getattr(among_all, part), getattr(alone, part))
        assert all(torch.equal(a, b) for a, b in zip(among_all.groups, alone.groups, strict=True))
    # Read in parts, the last of them shorter.
    before = {i: inputs.batch(fold, i).omic_all for i in fold.ids()}
    monkeypatch.setattr("morphome.training.inputs.PATIENTS_READ", 5)
    inputs.forget()
    assert len(before) % 5
    assert all(torch.equal(inputs.batch(fold, i).omic_all, values) for i, values in before.items())


def test_genes_at_training_only(files, settings_of, tmp_path):
    """G-HANet learns from the genes, and predicts where there is neither a panel nor a group."""
    run_train(settings=settings_of("ghanet"), **files, name="g", repeat=0, fold=0, out=tmp_path / "run", threads=1)
    tables = {k: v for k, v in files.items() if k != "split_facts"}
    whole = load_fold(**tables, repeat=0, fold=0)[0]
    slides = load_fold(**{**tables, "panels": {}, "groups": None}, repeat=0, fold=0)[0]
    stranger = FoldData(slides.table[["patient_id", "slide_ids"]].reset_index(drop=True), index=files["index"])
    model = load_run(tmp_path / "run")
    predictions = pd.read_parquet(tmp_path / "run" / "predictions.parquet")
    for fold in (whole, slides, stranger):
        np.testing.assert_array_equal(model.predict(fold)[0], predictions["risk"])
        batch = model.model.inputs.batch(fold, "P-003")
        assert batch.groups is None
    assert model.model.inputs.batch(whole, "P-003", training=True).groups is not None
    assert model.model.needs == {"path"}


# -- fitted parts --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", ["deep_attn_misl", "mmp", "ghanet"])
def test_fitted_parts_come_back_from_the_model_file_alone(key, files, settings_of, tmp_path, monkeypatch):
    run_train(settings=settings_of(key), **files, name=key, repeat=0, fold=0, out=tmp_path / "run", threads=1)
    predictions = pd.read_parquet(tmp_path / "run" / "predictions.parquet")
    (tmp_path / "file").mkdir()
    shutil.move(tmp_path / "run" / "model.safetensors", tmp_path / "file")

    def never(*_):
        raise AssertionError("fitted again")

    monkeypatch.setattr(network(key), "fit_parts", never)
    model = load_run(tmp_path / "file")
    fold = load_fold(**{k: v for k, v in files.items() if k != "split_facts"}, repeat=0, fold=0)[0]
    risk, curves = model.predict(fold)
    np.testing.assert_array_equal(risk, predictions["risk"])
    np.testing.assert_array_equal(curves, np.stack(predictions["survival"]))
    assert model.model.inputs.parts


def test_patches_for_parts_are_drawn_evenly_from_training_bags(fold_of):
    fold = fold_of({"name": "snn_raw"})
    inputs = Inputs("k", frozenset({"path"}), frozenset(), 9, False, "cpu", 1)
    train = fold.outcomes("train")
    inputs.fit(fold, train, [])
    bags = {i: {row.tobytes() for row in fold.bag(i)[0]} for i in fold.ids()}
    drawn = [row.tobytes() for row in inputs._patches(fold, train, 3 * len(train.ids))]
    counts = [sum(row in bags[i] for row in drawn) for i in train.ids]
    assert counts == [3] * len(train.ids)
    assert len(set(drawn)) == len(drawn)
    assert len(inputs._patches(fold, train, 5)) == 5
    assert len(inputs._patches(fold, train)) == sum(len(bags[i]) for i in train.ids)


def test_width_of_features_without_reading_them_twice(fold_of, monkeypatch):
    fold = fold_of({"name": "snn_raw"})
    read = []
    plain = FoldData._read_bag
    monkeypatch.setattr(FoldData, "_read_bag", lambda self, i: read.append(i) or plain(self, i))
    inputs = Inputs("k", frozenset({"path"}), frozenset(), 4, False, "cpu", 1)
    inputs.fit(fold, fold.outcomes("train"), [])
    first = fold.ids("train")[0]
    batch = inputs.batch(fold, first, training=True, draw=3)
    assert (inputs.d_in, batch.path.shape, batch.pos.shape) == (8, (4, 8), (4, 3))
    assert batch.path.dtype == torch.float32
    assert read == [first]
