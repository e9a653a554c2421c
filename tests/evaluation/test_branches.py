"""Branches of fused models are scored like models: on test folds, by patient, with paired intervals."""

from __future__ import annotations

import pytest

from morphome.evaluation.branches import COLUMNS, branch_table
from morphome.evaluation.evaluate import evaluate, load_rows


@pytest.fixture(scope="module")
def tables(planted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("branches")

    def branches(table, repeat, fold):
        noise = planted.noise[[list(planted.ids).index(p) for p in table["patient_id"]]]
        return table.assign(risk_path=table["risk"], risk_omic=-table["risk"] + 1e-3 * noise).sample(frac=1.0)

    paths = planted.write(folder, "fused", planted.oracle, "mcat", branches)
    paths += planted.write(folder, "plain", planted.oracle)
    rows, _ = load_rows(paths, planted.tau)
    return rows, evaluate(rows, 60, 1)


def test_a_branch_is_scored_as_a_model_with_its_risks(tables):
    _, found = tables
    table = found["branches"]
    assert list(table.columns) == list(COLUMNS)
    assert list(table["name"]) == ["fused", "fused"] and list(table["branch"]) == ["omic", "path"]
    summary = found["summary"].query("name == 'plain' and metric == 'harrell_c'").squeeze()
    path = table[table["branch"] == "path"].squeeze()
    # The branch of the slides has the risks of the plain row, so its value and interval are those.
    assert (path["harrell_c"], path["lower"], path["upper"]) == (summary["value"], summary["lower"], summary["upper"])
    omic = table[table["branch"] == "omic"].squeeze()
    assert omic["harrell_c"] == pytest.approx(1 - path["harrell_c"], abs=0.01)


def test_no_branches_no_rows(tables):
    rows, _ = tables
    assert branch_table([row for row in rows if row.name == "plain"], None).empty
