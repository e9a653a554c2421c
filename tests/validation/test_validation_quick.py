"""A small part of the validation on every push: S3 and X1 with quick models, bounds widened to 150 patients."""

from __future__ import annotations

import pandas as pd
import pytest

from morphome.validation import settings
from morphome.validation.judge import NULL_BAND, S3_LEAST, band, slack
from morphome.validation.run import validate

pytestmark = pytest.mark.workflow

N, FOLDS = 150, 2
QUICK = ("random", "clinical_cox", "mean_pool_cox", "ridge_genes", "deep_sets")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Quick models on S3 and X1, and a fused network on S3."""
    out = tmp_path_factory.mktemp("validation")
    with pytest.MonkeyPatch.context() as patch:
        for key in ("porpoise", "deep_sets"):
            patch.setitem(settings.MODELS, key, {**settings.MODELS.get(key, {}), "training": {"epochs": 10}})
        parts = [
            validate(QUICK, ["S3", "X1"], out, n=N, seeds=1, folds=FOLDS, cores=2),
            validate(["porpoise"], ["S3"], out, n=N, seeds=1, folds=FOLDS, cores=2),
        ]
    return pd.concat(parts, ignore_index=True)


def values(table, scenario):
    rows = table[(table["scenario"] == scenario) & table["value"].notna() & ~table["check"].str.contains("above the")]
    return dict(zip(rows["model"], rows["value"], strict=True))


def test_every_model_finds_its_part_of_s3(table):
    reached = values(table, "S3")
    kinds = dict(zip(table["model"], table["kind"], strict=True))
    for model in QUICK[1:]:
        assert reached[model] >= S3_LEAST[kinds[model]] - slack(N, 1), (model, reached)


def test_nothing_is_found_where_one_modality_knows_nothing(table):
    reached = values(table, "X1")
    for model in ("random", "mean_pool_cox", "ridge_genes", "deep_sets"):
        assert abs(reached[model] - 0.5) <= band(NULL_BAND, N), (model, reached)


def test_nothing_passes_the_true_hazard(table):
    rows = table[table["check"].str.contains("true hazard")]
    assert len(rows) == 2 * len(QUICK) + 1
    assert (rows["verdict"] == "pass").all()


def test_a_fused_network_learns_in_a_few_epochs(table):
    # 60 training patients: it must reach what one modality gives; the bound of fusion is for 400 patients.
    rows = table[(table["model"] == "porpoise") & (table["check"] == "C at least")]
    assert set(rows["kind"]) == {"fusion"}
    assert rows["value"].iloc[0] >= S3_LEAST["genes"] - slack(N, 1)
