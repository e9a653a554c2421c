"""Single cells from .h5ad files, their mixtures, and MLP-A."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch
from scipy import sparse

from morphome.errors import MorphomeError
from morphome.rna.cells import Cells, read_cells
from morphome.rna.mixing import MLPA, Regulated, draw_mixtures, mix, mixture_rows, regulate, train_mlp_a
from morphome.rna.tokenise import BulkTokeniser

SETTINGS = {
    "cell_type": "kind", "layer": None, "symbols": "symbol", "per_type": 10, "mixing": "pairs", "mixes": 120,
    "most_cells": 5, "epochs": 60, "batch": 32, "learning_rate": 1e-3, "seed": 3,
}  # fmt: skip


@pytest.mark.parametrize("form", ["csr_matrix", "csc_matrix", "dense"])
def test_cells_are_drawn_evenly_from_every_layout(tmp_path, make, form):
    path = make.write_cells(tmp_path / "cells.h5ad", form=form)
    cells = read_cells(path, "kind", symbols="symbol", per_type=11)
    assert np.bincount(cells.labels).tolist() == [11] * 6  # type a has 11 left: its first cell has no type
    assert (cells.total, cells.types[0], cells.genes[-1]) == (71, "type a", "GENE0")
    # Every type is high in its own genes: rows and labels belong together.
    sums = np.array([cells.counts[cells.labels == t].mean(0).A1 for t in range(6)])
    assert (sums[:, :59].argmax(0) == np.arange(59) % 6).all()


def test_labels_may_be_plain_text_and_genes_the_index(tmp_path, make):
    cells = read_cells(make.write_cells(tmp_path / "cells.h5ad"), "plain", per_type=3, seed=1)
    assert (len(cells.labels), cells.total, cells.genes[0]) == (18, 72, "ENSG0")


def _old(path):
    with h5py.File(path, "a") as handle:
        del handle["obs"]
        handle["obs"] = np.zeros(3, dtype=[("index", "S4")])


def _text(path):
    path.write_text("no HDF5")


@pytest.mark.parametrize(
    ("make_file", "change", "column", "said"),
    [
        ({}, None, "cluster", "no column 'cluster'; it has _index, kind, plain"),
        ({"types": 4}, None, "kind", "4 cell types"),
        ({"log": True}, None, "kind", "no counts"),
        ({}, _old, "kind", "an old layout"),
        ({}, _text, "kind", "not a readable"),
    ],
    ids=["column", "types", "logarithms", "layout", "damaged"],
)
def test_files_that_will_not_do_are_refused(tmp_path, make, make_file, change, column, said):
    path = make.write_cells(tmp_path / "cells.h5ad", **make_file)
    if change:
        change(path)
    with pytest.raises(MorphomeError, match=said):
        read_cells(path, column)
    if said == "no counts":
        with pytest.raises(MorphomeError, match="no layers/raw"):
            read_cells(path, column, layer="raw")


@pytest.mark.parametrize("mixing", ["pairs", "dirichlet"])
def test_weights_of_mixtures_sum_to_one(mixing):
    weights = draw_mixtures(40, 300, mixing, 8, 0)
    np.testing.assert_allclose(weights.sum(1), 1)
    sizes = np.diff(weights.indptr)
    assert set(sizes.tolist()) == ({2} if mixing == "pairs" else set(range(2, 9)))
    assert all(len(set(row.indices)) == len(row.indices) for row in weights)
    assert (weights != draw_mixtures(40, 300, mixing, 8, 0)).nnz == 0
    assert (weights != draw_mixtures(40, 300, mixing, 8, 1)).nnz > 0
    if mixing == "pairs":  # shares of the first of two cells are uniform
        np.testing.assert_allclose(np.sort(weights.data[::2]).mean(), 0.5, atol=0.06)
    with pytest.raises(MorphomeError, match="one of pairs"):
        draw_mixtures(4, 1, "sum", 2, 0)


def test_mixtures_are_of_cells_of_one_library_size():
    counts = sparse.csr_matrix(np.array([[2.0, 2, 0], [0, 300, 100], [10, 0, 0]], np.float32))
    cells = Cells(["A", "B", "C"], list("pqrst"), np.array([4, 0, 4]), counts, 3)
    weights = sparse.csr_matrix(np.array([[0.25, 0.75, 0], [0.5, 0, 0.5]]))
    x, y = mix(cells, weights)
    expected = 0.25 * np.array([5e3, 5e3, 0]) + 0.75 * np.array([0, 7500, 2500])
    np.testing.assert_allclose(x.toarray()[0], expected, rtol=1e-6)
    np.testing.assert_allclose(y, [[0.75, 0, 0, 0, 0.25], [0, 0, 0, 0, 1]])


def test_mixtures_at_the_genes_of_the_bulk_table(tiny, make):
    tokeniser = BulkTokeniser(tiny.vocabulary, make.genes[:5])
    x = sparse.csr_matrix(np.array([[1.0, 2, 4, 8, 16, 32]]))
    rows, rate = mixture_rows(x, ["GENE3", "GENE1", "GENE0", "GENE3", "", "GENE2"], tokeniser)
    np.testing.assert_array_equal(rows[0], [4, 2, 32, 9, np.nan])
    assert (len(list(rows)), rate) == (1, 0.8)


def test_network_is_the_published_shape():
    network = MLPA(512, 7)
    assert sum(p.numel() for p in network.parameters()) == 512 * 128 + 128 + 128 * 128 + 128 + 128 * 7 + 7
    features, logits = network.eval()(torch.zeros(3, 512))
    assert (features.shape, logits.shape) == ((3, 128), (3, 7))
    assert (features >= 0).all()


def test_mlp_a_reads_cell_types_from_mixtures(tmp_path, make, tiny):
    """On the tiny random scGPT: better than the mean of the types on mixtures it has not seen."""
    path = make.write_cells(tmp_path / "cells.h5ad")
    tokeniser = BulkTokeniser(tiny.vocabulary, make.genes)
    settings = SETTINGS | {"path": str(path), "mixes": 300}
    found = regulate(tiny, tokeniser, settings)
    assert found.facts["mse_held_out"] < 0.7 * found.facts["mse_constant"]
    assert (found.facts["types"][0], found.facts["mixtures"]) == ("type a", 300)
    assert found.facts["genes_match_rate"] == pytest.approx(59 / 60)
    again = regulate(tiny, tokeniser, settings)
    assert all(torch.equal(v, again.network.state_dict()[n]) for n, v in found.network.state_dict().items())
    bulk = tiny.embed(tokeniser, np.random.default_rng(0).poisson(9, (4, 60)).astype(float))
    logits = found.apply(bulk, "logits")
    assert (logits.shape, found.apply(bulk, "features").shape) == ((4, 6), (4, 128))
    assert found.apply(bulk, "identity") is bulk
    assert np.array_equal(found.apply(bulk[2:3], "logits"), logits[2:3])
    with pytest.raises(MorphomeError, match="one of features"):
        found.apply(bulk, "hidden")


def test_training_leaves_the_global_random_state_alone():
    random = np.random.default_rng(0)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    network, _ = train_mlp_a(random.normal(size=(40, 8)), np.eye(5)[random.integers(0, 5, 40)], SETTINGS)
    assert torch.equal(torch.rand(1), expected)
    assert not network.training


def test_embeddings_of_mixtures_are_kept_for_the_same_question_only(tmp_path, make, tiny, monkeypatch):
    path = make.write_cells(tmp_path / "cells.h5ad")
    tokeniser, cache = BulkTokeniser(tiny.vocabulary, make.genes), tmp_path / "kept.parquet"
    settings = SETTINGS | {"path": str(path), "epochs": 1, "mixes": 20}
    calls = []
    embed = tiny.embed
    monkeypatch.setattr(tiny, "embed", lambda *args, **named: calls.append(1) or embed(*args, **named))
    first = regulate(tiny, tokeniser, settings, cache=cache)
    again = regulate(tiny, tokeniser, settings | {"epochs": 2}, cache=cache)
    assert len(calls) == 1
    assert isinstance(again, Regulated)
    third = regulate(tiny, tokeniser, settings, cache=cache)
    assert third.facts == first.facts
    regulate(tiny, tokeniser, settings | {"seed": 4}, cache=cache)
    assert len(calls) == 2
    make.write_cells(path, form="dense", per_type=13)
    regulate(tiny, tokeniser, settings | {"seed": 4}, cache=cache)
    assert len(calls) == 3
