"""Rows on genes on public data: TCGA-BLCA and TCGA-HNSC, PORPOISE folds, against values computed independently."""

from __future__ import annotations

import zipfile

import h5py
import numpy as np
import pandas as pd
import pytest

from morphome import survival
from morphome.cohort.values import grade_of, stage_of
from morphome.files import write_parquet
from morphome.models.catalog import models
from morphome.training.data import FoldData

REAL = {
    "clinical_genes": {
        "covariates": ["age", "sex", "stage", "grade"],
        "ridge": 1.0,
        "panels": ["rna"],
        "ridges_per_column": [0.02, 0.06, 0.2, 0.6, 2.0, 6.0, 20.0],
        "inner_folds": 5,
        "clip": 5.0,
    },
    "rsf": {
        "covariates": ["age", "sex", "stage", "grade"],
        "panels": ["rna"],
        "components": 20,
        "trees": 300,
        "min_leaf": 15,
        "clip": 5.0,
    },
}


@pytest.fixture(scope="module")
def real(shared_data, tmp_path_factory):
    """``real(cohort, stage column, only those with a bag)``: patients, their five published folds, their outcomes."""
    cdr = pd.read_excel(shared_data / "tables/tcga_cdr/TCGA-CDR-SupplementalTableS1.xlsx")
    cdr = cdr.set_index("bcr_patient_barcode")

    def get(name, stage, with_bag):
        with zipfile.ZipFile(shared_data / f"tables/porpoise/tcga_{name}_all_clean.csv.zip") as archive:
            member = next(n for n in archive.namelist() if ".csv" in n and not n.startswith("__"))
            with archive.open(member) as handle:
                table = pd.read_csv(handle, low_memory=False).drop_duplicates("case_id").sort_values("case_id")
        if with_bag:
            with h5py.File(shared_data / f"bags/tcga_{name}.h5") as handle:
                table = table[table["case_id"].isin(handle["case_id"].asstr()[:])]
        rows = cdr.reindex(table["case_id"])
        patients = pd.DataFrame(
            {
                "patient_id": table["case_id"].to_numpy(),
                "slide_ids": [[]] * len(table),
                "time_months": table["survival_months"].clip(lower=0.01).to_numpy(),
                "event": (1 - table["censorship"]).to_numpy(),
                "age_years": table["age"].to_numpy(dtype=float),
                "sex": np.where(table["is_female"] == 1, "female", "male"),
                "stage": rows[stage].map(stage_of).to_numpy(),
                "grade": rows["histological_grade"].map(grade_of).to_numpy(),
            }
        )
        genes = table.filter(regex="_rnaseq$").rename(columns=lambda c: c.removesuffix("_rnaseq"))
        genes = pd.concat([table["case_id"].rename("patient_id"), genes], axis=1)
        path = tmp_path_factory.mktemp(name) / "rna.parquet"
        write_parquet(genes, path, "morphome.panel", {}, {})
        truth = patients.set_index("patient_id")
        folds = []
        for k in range(5):
            published = pd.read_csv(shared_data / f"splits/porpoise_5foldcv/tcga_{name}/splits_{k}.csv")
            role = np.where(patients["patient_id"].isin(published["val"].dropna()), "test", "train")
            folds.append(FoldData(patients.assign(role=role), panels={"rna": path}, where=f"fold {k}"))
        return folds, truth

    return get


def c_of_folds(folds, truth, key, scores):
    """For each score ``(model, fold, ids) -> risk``: mean C over the test folds and stratified C."""
    counts = []
    for k, fold in enumerate(folds):
        model = models()[key].load()(REAL[key], {"seed": 1}, k)
        model.fit(fold, [])
        ids = fold.ids("test")
        y = truth.loc[list(ids)]
        counts.append([survival.harrell(y["time_months"], y["event"], score(model, fold, ids)) for score in scores])
    return [
        (
            np.mean([c.c for c in found]),
            sum(c.concordant + 0.5 * c.tied_risk for c in found) / sum(c.comparable for c in found),
        )
        for found in zip(*counts, strict=True)
    ]


def risk_of(model, fold, ids):
    return model.predict(fold, ids, np.array([12.0]))[0]


def gene_risk(model, fold, ids):
    return model._genes.transform(fold, ids) @ model._gene_coef


def test_bladder_with_published_folds(real):
    """Reference, stratified C of 371 patients: ridge on genes .629, with clinical covariates .677."""
    folds, truth = real("blca", "ajcc_pathologic_tumor_stage", True)
    assert len(truth) == 371
    genes, both = c_of_folds(folds, truth, "clinical_genes", [gene_risk, risk_of])
    np.testing.assert_allclose(genes[1], 0.629, atol=0.01)
    np.testing.assert_allclose(both[1], 0.677, atol=0.01)


def test_head_and_neck_with_published_folds(real):
    """Reference, mean C of 416 patients: ridge on genes .575, with clinical covariates .596, forest .595."""
    folds, truth = real("hnsc", "clinical_stage", False)
    assert len(truth) == 416
    genes, both = c_of_folds(folds, truth, "clinical_genes", [gene_risk, risk_of])
    (forest,) = c_of_folds(folds, truth, "rsf", [risk_of])
    np.testing.assert_allclose([genes[0], both[0], forest[0]], [0.575, 0.596, 0.595], atol=0.02)
