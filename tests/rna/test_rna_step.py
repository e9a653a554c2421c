"""Step encode_rna: files in, one vector per patient and a record out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from morphome.errors import MorphomeError
from morphome.files import read_json, read_parquet
from morphome.rna.scgpt import ScGPTEncoder
from morphome.rna.step import run_encode_rna
from morphome.rna.tokenise import BulkTokeniser

DEFAULTS = {
    "allow_unpinned": True, "genes": "disjoint_panels", "panel_size": 1199, "output": "cls",
    "bin_scope": "expressed_profile", "batch": 16, "device": "cpu", "on_missing": "error", "fallback": "pca",
    "components": 512, "mlp_a": "features",
}  # fmt: skip
CELLS = {
    "cell_type": "kind", "symbols": "symbol", "per_type": 5, "mixing": "dirichlet", "mixes": 30, "most_cells": 6,
    "epochs": 2, "batch": 16, "learning_rate": 1e-3, "seed": 0,
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """Runs the step; gives the table and the record."""

    def call(expression=None, groups=None, **section):
        settings = {"molecular": {"encoder": DEFAULTS | section}}
        out, facts = tmp_path / "out.parquet", tmp_path / "facts.json"
        run_encode_rna(settings=settings, expression=expression, groups=groups, out=out, facts=facts)
        table = read_parquet(out, "morphome.encoded", settings)
        return table, read_json(facts, "morphome.encoder", settings)

    return call


def test_scgpt_without_cells(tmp_path, make, run, scgpt_folder):
    expression = make.write_expression(tmp_path / "expression.parquet")
    table, facts = run(expression, name="scgpt", weights=str(scgpt_folder), panel_size=25)
    assert table.columns.tolist() == ["patient_id", *(f"e{i}" for i in range(64))]
    assert table["patient_id"].tolist() == [f"P{i}" for i in range(1, 7)]
    assert table.attrs["width"] == 64
    given = read_parquet(expression, "morphome.panel").set_index("patient_id").loc[table["patient_id"]]
    model = ScGPTEncoder(scgpt_folder, allow_unpinned=True)
    tokeniser = BulkTokeniser(model.vocabulary, make.genes, panel_size=25)
    expected = model.embed(tokeniser, tokeniser.rows(given.to_numpy()))
    assert np.array_equal(table.iloc[:, 1:].to_numpy(), expected)
    assert (facts["requested"], facts["used"], facts["match_rate"], facts["width"]) == ("scgpt", "scgpt", 1.0, 64)
    assert facts["mlp_a"]["used"] == "identity"
    assert "no annotated single cells" in facts["mlp_a"]["reason"]
    assert (facts["weights"]["grade"], facts["licence"], facts["pretraining_saw_tcga"]) == ("not known", "MIT", "no")
    assert facts["match"]["panels"] == 3


@pytest.mark.parametrize(("export", "width"), [("features", 128), ("logits", 6)])
def test_scgpt_behind_mlp_a(tmp_path, make, run, scgpt_folder, export, width):
    expression = make.write_expression(tmp_path / "expression.parquet")
    cells = CELLS | {"path": str(make.write_cells(tmp_path / "cells.h5ad"))}
    table, facts = run(expression, name="scgpt", weights=str(scgpt_folder), cells=cells, mlp_a=export)
    assert table.shape == (6, width + 1)
    assert (facts["mlp_a"]["used"], len(facts["mlp_a"]["types"])) == (export, 6)
    again, _ = run(expression, name="scgpt", weights=str(scgpt_folder), cells=cells, mlp_a=export)
    pd.testing.assert_frame_equal(table, again, check_exact=True)


def test_genes_of_the_groups(tmp_path, make, run, scgpt_folder):
    expression = make.write_expression(tmp_path / "expression.parquet")
    groups = make.write_groups(tmp_path / "groups.json", {"a": make.genes[:9], "b": [*make.genes[5:12], "ELSEWHERE"]})
    _, facts = run(expression, groups, name="scgpt", weights=str(scgpt_folder), genes="families", output="gene_mean")
    assert (facts["match"]["genes_asked"], facts["match"]["genes_used"]) == (13, 12)
    with pytest.raises(MorphomeError, match="needs gene groups"):
        run(expression, None, name="scgpt", weights=str(scgpt_folder), genes="families")


def test_a_patient_alone_has_the_same_vector(tmp_path, make, run, scgpt_folder):
    """Nothing is fitted on patients: other patients in the table change nothing."""
    whole, _ = run(make.write_expression(tmp_path / "a.parquet"), name="scgpt", weights=str(scgpt_folder))
    fewer, _ = run(make.write_expression(tmp_path / "b.parquet", n=1), name="scgpt", weights=str(scgpt_folder))
    same = whole[whole["patient_id"] == "P6"].iloc[:, 1:].to_numpy()
    assert np.array_equal(fewer.iloc[:, 1:].to_numpy(), same)


@pytest.mark.parametrize("value_type", ["zscore", "log2_tpm_plus_1"])
def test_values_of_another_kind_are_refused(tmp_path, make, run, scgpt_folder, value_type):
    expression = make.write_expression(tmp_path / "expression.parquet", value_type=value_type)
    with pytest.raises(MorphomeError, match="takes TPM or counts"):
        run(expression, name="scgpt", weights=str(scgpt_folder))


def test_negative_values_are_refused(tmp_path, make, run, scgpt_folder):
    from morphome.files import write_parquet

    expression = make.write_expression(tmp_path / "expression.parquet")
    table = read_parquet(expression, "morphome.panel")
    table.loc[2, "GENE4"] = -1.5
    write_parquet(table, expression, "morphome.panel", {}, {"value_type": "counts", "unit": "reads"})
    with pytest.raises(MorphomeError, match=r"-1\.5 of GENE4 for patient P4 is negative"):
        run(expression, name="scgpt", weights=str(scgpt_folder))


def test_bulkrnabert_takes_tpm(tmp_path, make, run):
    folder = make.write_bulkrnabert(tmp_path / "bert")
    counts = make.write_expression(tmp_path / "counts.parquet")
    with pytest.raises(MorphomeError, match="takes TPM"):
        run(counts, name="bulkrnabert", weights=str(folder))
    tpm = make.write_expression(tmp_path / "tpm.parquet", value_type="tpm")
    table, facts = run(tpm, name="bulkrnabert", weights=str(folder))
    assert table.shape == (6, 65)
    assert (facts["match_rate"], facts["pretraining_saw_tcga"]) == (1.0, "depends")
    assert "non-commercial" in facts["weights_licence"]


@pytest.mark.parametrize("form", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("name", ["precomputed", "bulkformer"])
def test_tables_of_the_user(tmp_path, run, form, name):
    given = pd.DataFrame({"x": [1.5, 2.0], "patient_id": ["P2", "P1"], "y": [0, 4]})
    path = tmp_path / f"mine.{form}"
    if form == "parquet":
        given.to_parquet(path)
    else:
        given.to_csv(path, index=False, sep="," if form == "csv" else "\t")
    table, facts = run(name=name, path=str(path))
    assert table.to_numpy().tolist() == [["P1", 2.0, 4.0], ["P2", 1.5, 0.0]]
    assert (facts["used"], facts["preprocessing"]["columns"], facts["width"]) == (name, ["x", "y"], 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("case,a\nP1,1\n", "column patient_id"),
        ("patient_id,a\nP1,1\nP1,2\n", "P1 occurs twice"),
        ("patient_id,a\nP1,\n", "patient P1, column a"),
        ("patient_id,a\nP1,inf\n", "not a finite number"),
        ("patient_id,a\n", "column patient_id and columns"),
        ("", "cannot be read"),
    ],
    ids=["no id", "twice", "empty cell", "infinite", "no rows", "empty"],
)
def test_tables_that_will_not_do(tmp_path, run, text, said):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(MorphomeError, match=said):
        run(name="precomputed", path=str(path))


def test_the_step_is_not_for_encoders_of_the_fold(tmp_path, run):
    with pytest.raises(MorphomeError, match="fitted inside each training fold"):
        run(name="pca")
    with pytest.raises(MorphomeError, match="are not there"):
        run(name="scgpt", weights=str(tmp_path / "gone"), on_missing="fallback")
