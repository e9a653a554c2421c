"""Roles, joins and what is fitted before a model."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from morphome.errors import MorphomeError
from morphome.training.data import Column, FoldData, derive_seed, load_fold
from morphome.training.preprocess import ClinicalEncoder, ColumnScaler, time_grid


def load(cohort, folder, **changes):
    files = cohort.write(folder)
    files.pop("split_facts")
    return load_fold(**{**files, "repeat": 0, "fold": 0, **changes})


def test_roles_follow_the_splits_and_outcomes_of_test_patients_are_gone(planted, tmp_path):
    cohort = planted()
    fold, outcomes = load(cohort, tmp_path)
    roles = cohort.splits[cohort.splits["fold"] == 0].set_index("patient_id")["role"]
    assert set(fold.ids("test")) == set(roles.index[roles == "test"])
    assert fold.ids() == tuple(sorted(roles.index))
    assert fold.table.loc[list(fold.ids("test")), ["time_months", "event"]].isna().all(axis=None)
    with pytest.raises(MorphomeError, match="test patients"):
        fold.outcomes("train", "test")
    train = fold.outcomes("train")
    truth = cohort.patients.set_index("patient_id")
    assert list(train.time) == list(truth.loc[list(train.ids), "time_months"])
    assert list(outcomes["time_months"]) == list(truth.loc[list(outcomes["patient_id"]), "time_months"])


def test_bags_are_concatenated_over_slides_and_cached_without_change(planted, tmp_path):
    cohort = planted()
    fold, _ = load(cohort, tmp_path)
    first, where = fold.bag("P-000")
    expected = np.concatenate([cohort.bags["P-000-0"], cohort.bags["P-000-1"]]).astype(np.float16)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, expected.astype(np.float32))
    np.testing.assert_array_equal(fold.bag("P-000")[0], first)
    assert sorted(set(where[:, 0])) == [0, 1]


def test_a_full_cache_changes_nothing(planted, tmp_path):
    cohort = planted()
    fold, _ = load(cohort, tmp_path)
    small = FoldData(fold.table.reset_index(drop=True), index=tmp_path / "index.parquet", cache_bytes=0)
    np.testing.assert_array_equal(small.bag("P-003")[0], fold.bag("P-003")[0])
    np.testing.assert_array_equal(small.bag("P-003")[1], fold.bag("P-003")[1])


def test_gene_matrix_joins_by_id_and_says_what_is_missing(planted, tmp_path):
    cohort = planted()
    panel = cohort.panels["rna"]
    cohort = cohort.with_(panels={**cohort.panels, "rna": panel.drop(index=5)})
    fold, _ = load(cohort, tmp_path)
    values = fold.gene_matrix([Column("mut", "G1"), Column("rna", "G2")], ["P-007", "P-005"])
    assert values[0, 1] == panel["G2"][7]
    assert values[0, 0] == cohort.panels["mut"]["G1"][7]
    assert np.isnan(values[1, 1])
    assert fold.without_panel(["rna", "mut"], fold.ids()) == {"rna": 1, "mut": 0}
    with pytest.raises(MorphomeError, match="NOPE"):
        fold.gene_matrix([Column("rna", "NOPE")], ["P-001"])
    with pytest.raises(MorphomeError, match=r"molecular\.cnv"):
        fold.gene_matrix([Column("cnv", "G0")], ["P-001"])


def test_duplicate_patients_and_foreign_splits_are_refused(planted, tmp_path):
    cohort = planted()
    twice = pd.concat([cohort.patients, cohort.patients.head(1)])
    with pytest.raises(MorphomeError, match=r"P-000"):
        load(cohort.with_(patients=twice), tmp_path / "twice")
    with pytest.raises(MorphomeError, match=r"not in .*P-000"):
        load(cohort.with_(patients=cohort.patients.iloc[1:]), tmp_path / "fewer")
    with pytest.raises(MorphomeError, match="repeat 0, fold 9"):
        load(cohort, tmp_path / "fold", fold=9)
    doubled = pd.concat([cohort.panels["rna"], cohort.panels["rna"].tail(1)])
    fold, _ = load(cohort.with_(panels={"rna": doubled}), tmp_path / "panel")
    with pytest.raises(MorphomeError, match="P-035"):
        fold.panel_columns(["rna"])


def test_patients_without_a_role_are_counted(planted, tmp_path):
    cohort = planted()
    fewer = cohort.splits[cohort.splits["patient_id"] != "P-004"]
    fold, _ = load(cohort.with_(splits=fewer), tmp_path)
    assert list(fold.lost.values()) == [1]


def test_a_patient_without_tiles_is_named(planted, tmp_path):
    cohort = planted()
    patients = cohort.patients.copy()
    patients.at[8, "slide_ids"] = []
    fold, _ = load(cohort.with_(patients=patients), tmp_path)
    with pytest.raises(MorphomeError, match="P-008"):
        fold.bag("P-008")


def test_seeds_differ_and_are_fixed():
    assert derive_seed(1, 0, 0) == derive_seed(1, 0, 0) != derive_seed(1, 0, 1)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed("random", 1, "P-000") == 1884935978447862984


# -- scalers ------------------------------------------------------------------------------------------------


def test_column_scaler_by_hand():
    values = np.array([[1.0, 5, np.nan, 0.1], [2.0, 5, np.nan, 0.1], [3.0, 5, np.nan, 0.1], [np.nan, 5, np.nan, 0.1]])
    scaler = ColumnScaler.fit(values, clip=2.0)
    assert list(scaler.varies) == [True, False, False, False]
    z = scaler.transform(np.array([[2.0, 9, 7, 3], [1e6, 5, 5, 5], [np.nan, np.nan, np.nan, np.nan]]))
    assert list(z[0]) == [0, 0, 0, 0]
    assert list(z[1]) == [2, 0, 0, 0]
    assert list(z[2]) == [0, 0, 0, 0]
    sd = np.std([1.0, 2, 3, 2])
    assert scaler.transform(np.array([[1.0, 0, 0, 0]]))[0, 0] == -1 / sd
    again = ColumnScaler.restore(scaler.arrays("x"), "x")
    np.testing.assert_array_equal(again.transform(values), scaler.transform(values))


def test_clinical_encoder_uses_training_medians_flags_and_drops_what_does_not_vary():
    table = pd.DataFrame(
        {
            "age_years": [50.0, 60.0, 80.0, np.nan],
            "sex": ["female", "male", None, "male"],
            "stage": [2.0, 2.0, 2.0, 2.0],
            "grade": [np.nan] * 4,
        }
    )
    notes: list[str] = []
    encoder = ClinicalEncoder.fit(table, ["age", "sex", "stage", "grade"], notes, "fold 1")
    assert encoder.columns == ("age", "age_missing", "sex", "sex_missing")
    assert len(notes) == 1
    assert "stage, grade (fold 1)" in notes[0]
    design = encoder.transform(table)
    np.testing.assert_allclose(design.mean(axis=0), 0, atol=1e-12)
    assert design[3, 0] == 60.0 - encoder.mean[0]  # the median, not the mean
    new = table.assign(stage=4.0, grade=3.0)
    np.testing.assert_array_equal(encoder.transform(new), design)
    again = ClinicalEncoder.restore(encoder.arrays("c"), "c", encoder.facts())
    np.testing.assert_array_equal(again.transform(table), design)
    with pytest.raises(MorphomeError, match="fold 2: none of the clinical covariates stage"):
        ClinicalEncoder.fit(table, ["stage"], notes, "fold 2")


def test_time_grid():
    grid = time_grid(24, np.array([1.0]))
    assert len(grid) == 100
    np.testing.assert_allclose((grid[0], grid[-1]), (1.2, 24.0))
    np.testing.assert_allclose(time_grid(None, np.arange(11.0))[-1], 8.0)
