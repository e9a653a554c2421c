"""Encoders that are fitted inside the training fold."""

from __future__ import annotations

import numpy as np
import pytest

from morphome.errors import MorphomeError
from morphome.rna.fold_encoder import FoldRnaEncoder

GROUPS = {"one": [0, 3, 3], "two": [1, 2, 3, 7], "none": []}


@pytest.fixture
def z():
    random = np.random.default_rng(0)
    return random.normal(size=(12, 30)) @ np.diag(np.linspace(3, 0.1, 30))


def test_components_are_those_of_the_covariance(z):
    encoder = FoldRnaEncoder.fit("pca", z, components=4)
    scores = encoder.transform(z)
    values, vectors = np.linalg.eigh(np.cov(z.T, bias=True))
    expected = (z - z.mean(0)) @ vectors[:, ::-1][:, :4] / np.sqrt(values[::-1][:4].mean())
    np.testing.assert_allclose(np.abs(scores), np.abs(expected), atol=1e-8)
    assert scores.var(0).mean() == pytest.approx(1)
    assert (np.diff(scores.var(0)) < 0).all()
    assert (np.take_along_axis(encoder.matrix, np.abs(encoder.matrix).argmax(0)[None], 0) > 0).all()


def test_all_components_keep_the_distances_between_patients(z):
    encoder = FoldRnaEncoder.fit("pca", z, components=512)
    assert encoder.width == 11
    scores = encoder.transform(z)
    apart = [np.linalg.norm(v[:, None] - v[None], axis=2)[np.triu_indices(12, 1)] for v in (z, scores)]
    np.testing.assert_allclose(apart[0] / apart[1], (apart[0] / apart[1])[0])


def test_group_means(z):
    encoder = FoldRnaEncoder.fit("pathway_mean", z, GROUPS)
    assert (encoder.names, encoder.width) == (("one", "two"), 2)
    np.testing.assert_allclose(encoder.transform(z)[:, 0], z[:, [0, 3]].mean(1))
    np.testing.assert_allclose(encoder.transform(z)[:, 1], z[:, [1, 2, 3, 7]].mean(1))
    with pytest.raises(MorphomeError, match="needs gene groups"):
        FoldRnaEncoder.fit("pathway_mean", z, {"none": []})


@pytest.mark.parametrize("kind", ["pca", "pathway_mean", "snn_raw"])
def test_state_survives_and_patients_stand_alone(z, kind):
    encoder = FoldRnaEncoder.fit(kind, z, GROUPS, 5)
    found = encoder.transform(z)
    back = FoldRnaEncoder.restore(encoder.arrays("fitted/rna"), "fitted/rna")
    assert (back.kind, back.names, back.width) == (kind, encoder.names, found.shape[1])
    assert np.array_equal(back.transform(z), found)
    assert np.array_equal(encoder.transform(z[[7, 2]]), found[[7, 2]])
    assert all(array.dtype != object for array in encoder.arrays("a").values())
    if kind == "snn_raw":
        assert np.array_equal(found, z)
    with pytest.raises(ValueError, match="fitted on 30 columns"):
        encoder.transform(z[:, :3])


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(MorphomeError, match="varies"):
        FoldRnaEncoder.fit("pca", np.zeros((5, 3)))
    with pytest.raises(MorphomeError, match="one of snn_raw"):
        FoldRnaEncoder.fit("scgpt", np.eye(3))
