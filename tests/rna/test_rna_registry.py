"""Which encoder a run uses, decided before anything runs."""

from __future__ import annotations

import pytest

from morphome.errors import MorphomeError
from morphome.rna.registry import ENCODERS, FALLBACKS, FROZEN, facts, resolve

PLAIN = {"on_missing": "error", "fallback": "pca", "mlp_a": "features"}


def test_the_graph_can_ask_without_torch(loaded_by):
    loaded = loaded_by("morphome.rna.registry")
    assert not {"torch", "pandas", "numpy", "h5py", "scipy"} & loaded


def test_rows_state_what_a_report_needs():
    assert set(ENCODERS) == set(FROZEN) | set(FALLBACKS)
    for row in ENCODERS.values():
        assert row.licence
        assert row.weights_licence
        assert row.pretraining_saw_tcga in ("no", "yes", "depends", "unknown")
    assert set(FALLBACKS) == {"snn_raw", "pca", "pathway_mean"}


@pytest.mark.parametrize("name", sorted(FALLBACKS))
def test_encoders_of_the_fold_are_always_there(name):
    found = resolve(PLAIN | {"name": name})
    assert (found.used, found.reason, found.files, found.frozen) == (name, "", (), False)
    assert facts(found)["substituted"] is False


def test_weights_are_looked_for_where_they_lie(tmp_path, monkeypatch, make):
    monkeypatch.setenv("MORPHOME_WEIGHTS", str(tmp_path))
    folder = make.write_scgpt(tmp_path / "scgpt")
    found = resolve(PLAIN | {"name": "scgpt"})
    assert (found.used, found.frozen) == ("scgpt", True)
    assert set(found.files) == {folder / "args.json", folder / "vocab.json", folder / "best_model.pt"}
    (folder / "vocab.json").unlink()
    with pytest.raises(MorphomeError, match=r"holds no vocab\.json"):
        resolve(PLAIN | {"name": "scgpt"})
    other = make.write_scgpt(tmp_path / "mine")
    assert other / "vocab.json" in resolve(PLAIN | {"name": "scgpt", "weights": str(other)}).files


@pytest.mark.parametrize("name", ["scgpt", "bulkrnabert", "bulkformer", "precomputed"])
def test_missing_files_follow_the_rule(tmp_path, name):
    asked = PLAIN | {"name": name, "weights": str(tmp_path / "none")}
    with pytest.raises(MorphomeError, match="on_missing: fallback"):
        resolve(asked)
    fallen = resolve(asked | {"on_missing": "fallback"})
    assert (fallen.requested, fallen.used, fallen.files, fallen.frozen) == (name, "pca", (), False)
    said = facts(fallen)
    assert said["substituted"]
    assert said["reason"]
    assert said["licence"] == "none needed"
    assert resolve(asked | {"on_missing": "fallback", "fallback": "snn_raw"}).used == "snn_raw"
    skipped = resolve(asked | {"on_missing": "skip"})
    assert skipped.used is None
    assert facts(skipped)["reason"] == skipped.reason


@pytest.mark.parametrize("name", ["bulkformer", "precomputed"])
def test_tables_are_taken_where_they_are(tmp_path, name):
    table = tmp_path / "mine.csv"
    table.write_text("patient_id,a\nP1,1\n")
    assert resolve(PLAIN | {"name": name, "path": str(table)}).files == (table,)
    with pytest.raises(MorphomeError, match="does not exist"):
        resolve(PLAIN | {"name": name, "path": str(tmp_path / "gone.csv")})


def test_single_cells_belong_to_the_files(tmp_path, make):
    folder, cells = make.write_scgpt(tmp_path / "scgpt"), tmp_path / "cells.h5ad"
    asked = PLAIN | {"name": "scgpt", "weights": str(folder), "cells": {"path": str(cells)}}
    with pytest.raises(MorphomeError, match=r"cells\.path"):
        resolve(asked)
    assert cells not in resolve(asked | {"mlp_a": "identity"}).files
    cells.write_bytes(b"")
    assert cells in resolve(asked).files


@pytest.mark.parametrize("wrong", [{"name": "geneformer"}, {"on_missing": "maybe"}, {"fallback": "scgpt"}], ids=str)
def test_unknown_words_are_refused(wrong):
    with pytest.raises(MorphomeError, match="one of"):
        resolve(PLAIN | {"name": "pca"} | wrong)
