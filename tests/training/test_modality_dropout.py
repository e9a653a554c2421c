"""``training.modality_dropout``: learned tokens in the place of genes, in training and for patients without any."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from morphome.errors import MorphomeError
from morphome.models.catalog import models
from morphome.models.registry import network
from morphome.training.data import load_fold
from morphome.training.run import load_run, run_train
from morphome.training.trainer import NeuralModel

TIMES = np.linspace(1.0, 6.0, 4)
#: Gene groups, one vector, parts with an exact split; hazard and Cox heads.
KEYS = ["mcat", "mome", "deep_sets_fusion", "path_gptomic"]
UNABLE = [key for key, row in models().items() if row.kind == "neural" and "missing_omic" not in network(key).supports]
GENES = ("groups", "omic_all", "rna", "cnv", "mut")


def bare(batch):
    return all(getattr(batch, part) is None for part in GENES)


@pytest.fixture(scope="module")
def files(planted, tmp_path_factory):
    """Three patients have no row in any molecular table, one has none of RNA only."""
    cohort = planted()
    roles = cohort.splits[cohort.splits["fold"] == 0].set_index("patient_id")["role"]
    without = [roles.index[roles == role][1] for role in ("train", "inner_val", "test")]
    half = roles.index[roles == "test"][2]
    panels = {
        name: panel[~panel["patient_id"].isin([*without, *([half] if name == "rna" else [])])]
        for name, panel in cohort.panels.items()
    }
    return cohort.with_(panels=panels).write(tmp_path_factory.mktemp("cohort")), without, half


@pytest.fixture(scope="module")
def fold(files):
    return load_fold(**{k: v for k, v in files[0].items() if k != "split_facts"}, repeat=0, fold=0)[0]


@pytest.fixture
def trained(fold, settings_of):
    def train(key, **training):
        entry = settings_of(key, **{"epochs": 2, "modality_dropout": 0.5, **training})["model"]
        model = NeuralModel(key, entry["settings"], entry["training"], seed=4)
        notes: list[str] = []
        model.fit(fold, notes)
        return model, notes

    return train


@pytest.fixture
def seen(monkeypatch):
    """Every batch of genes and slides that a model was given: (in training, with gradient, batch)."""
    rows = []

    def spy(key):
        model = network(key)
        plain = model.encode

        def encode(self, batch):
            rows.append((self.training, torch.is_grad_enabled(), batch))
            return plain(self, batch)

        monkeypatch.setattr(model, "encode", encode)
        return rows

    return spy


@pytest.mark.parametrize("key", KEYS)
def test_the_tokens_are_learned_in_training_only(key, trained, seen, fold, files):
    rows = seen(key)
    model, _ = trained(key, epochs=3)
    without, n = files[1], len(fold.ids("train"))
    measured = [bare(b) for training, grad, b in rows if training and grad and b.patient_id not in without]
    assert 0.25 < np.mean(measured) < 0.75
    assert {b.patient_id for training, _, b in rows if not training and bare(b)} == set(without[:2])
    assert all(bare(b) for _, _, b in rows if b.patient_id in without)
    # Parts go together: a model never sees the RNA of a patient without the rest.
    present = {tuple(getattr(b, part) is None for part in GENES) for _, _, b in rows if not bare(b)}
    assert len(present) == 1
    if network(key).head == "cox":  # the second pass leaves out what the first has left out
        passes = {grad: [(b.patient_id, bare(b)) for t, g, b in rows if t and g == grad] for grad in (False, True)}
        assert passes[False] == passes[True]
        assert len(passes[True]) == 3 * n
    plain, _ = trained(key, modality_dropout=0.0, epochs=1)
    own = set(model.module.state_dict()) - set(plain.module.state_dict())
    assert len(own) == 1
    (token,) = (model.module.state_dict()[name] for name in own)
    with torch.random.fork_rng(devices=[]):
        start = model._untrained().state_dict()[own.pop()]
    assert (token != start).any(dim=-1).all()
    assert model.n_parameters == plain.n_parameters + token.numel()


@pytest.mark.parametrize("key", KEYS)
def test_patients_without_genes_are_predicted_by_the_tokens(key, trained, fold, files, settings_of, tmp_path):
    tables, without, half = files
    settings = settings_of(key, modality_dropout=0.5)
    run_train(settings=settings, **tables, name=key, repeat=0, fold=0, out=tmp_path, threads=1)
    run = load_run(tmp_path)
    risk = dict(zip(fold.ids(), run.predict(fold)[0], strict=True))
    model = run.model
    for patient in (*without, half, fold.ids("test")[0]):
        batch = model.inputs.batch(fold, patient)
        assert bare(batch) == (patient in without)
        nothing = dataclasses.replace(batch, **dict.fromkeys(GENES))
        with torch.no_grad():
            by_token = model.module(nothing)[model.objective.output].double().numpy()
        assert (model.objective.risk(by_token)[0] == risk[patient]) == (patient in without)


def test_without_it_they_get_the_training_medians(trained, fold, files):
    model, notes = trained("mcat", modality_dropout=0.0)
    batch = model.inputs.batch(fold, files[1][2])
    assert not bare(batch)
    assert any("3 patients have no row in 'mut': they get the training medians" in note for note in notes)
    assert any("4 patients have no row in 'rna': they get the training medians" in note for note in notes)
    with_tokens, notes = trained("mcat", epochs=1)
    assert any("they get a learned token" in note for note in notes)
    # Medians in their place are no measurements: scales come from the measured patients alone.
    ids = [i for i in fold.ids("train") if i not in files[1]]
    raw = fold.gene_matrix(with_tokens.inputs.columns, ids)
    filled = np.where(np.isnan(raw), np.nanmedian(raw, axis=0), raw)
    np.testing.assert_allclose(with_tokens.inputs.scaler.mean, filled.mean(axis=0))


def test_dropping_does_not_depend_on_the_patches_drawn(trained, seen):
    """The same patients lose their genes whatever ``max_patches`` is."""
    rows, found = seen("mcat"), []
    for most in (3, 9999):
        rows.clear()
        trained("mcat", max_patches=most, epochs=1)
        found.append([(b.patient_id, bare(b)) for training, _, b in rows if training])
    assert found[0] == found[1]


@pytest.mark.parametrize("key", UNABLE)
def test_models_without_tokens_are_refused(key, settings_of):
    training = settings_of(key, modality_dropout=0.3)["model"]["training"]
    with pytest.raises(MorphomeError, match="no learned tokens"):
        NeuralModel(key, {}, training, seed=1)
