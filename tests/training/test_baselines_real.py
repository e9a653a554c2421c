"""Linear rows on public data: TCGA-HNSC with the PORPOISE folds, against values computed independently."""

from __future__ import annotations

import zipfile

import h5py
import numpy as np
import pandas as pd
import pytest

from morphome.files import read_parquet
from morphome.survival import harrell
from morphome.training.run import run_train


@pytest.fixture(scope="module")
def hnsc(shared_data, planted, tmp_path_factory):
    """Files of the train step: 416 patients, five published folds, bags of HIPT region vectors."""
    with zipfile.ZipFile(shared_data / "tables/porpoise/tcga_hnsc_all_clean.csv.zip") as archive:
        name = next(n for n in archive.namelist() if ".csv" in n and not n.startswith("__"))
        with archive.open(name) as handle:
            wanted = ["case_id", "age", "survival_months", "censorship", "is_female"]
            table = pd.read_csv(handle, usecols=wanted).drop_duplicates("case_id").sort_values("case_id")
    with h5py.File(shared_data / "bags/tcga_hnsc.h5") as handle:
        cuts, values = handle["offsets"][:], handle["features"][:]
        slides = pd.DataFrame({"slide_id": handle["slide_id"].asstr()[:], "patient_id": handle["case_id"].asstr()[:]})
    bags = {s: values[a:b] for s, a, b in zip(slides["slide_id"], cuts, cuts[1:], strict=False)}
    by_patient = slides.groupby("patient_id")["slide_id"].agg(list)
    patients = pd.DataFrame(
        {
            "patient_id": table["case_id"],
            "site": table["case_id"].str[5:7],
            "time_months": table["survival_months"].clip(lower=0.01),
            "event": (1 - table["censorship"]).astype("int8"),
            "age_years": table["age"].astype(float),
            "sex": np.where(table["is_female"] == 1, "female", "male"),
            "slide_ids": [by_patient.get(p, []) for p in table["case_id"]],
        }
    )

    def write(which):
        chosen = patients if which == "all" else patients[patients["slide_ids"].map(len) > 0]
        folds = []
        for fold in range(5):
            published = pd.read_csv(shared_data / f"splits/porpoise_5foldcv/tcga_hnsc/splits_{fold}.csv")
            role = np.where(chosen["patient_id"].isin(published["val"].dropna()), "test", "train")
            folds.append(chosen[["patient_id"]].assign(repeat=0, fold=fold, role=role, seed=1))
        cohort = planted().with_(
            patients=chosen, panels={}, bags=bags, slides=slides, splits=pd.concat(folds), groups={}, horizon=36.0
        )
        return cohort.write(tmp_path_factory.mktemp(which))

    return write


def concordances(key, files, settings, settings_of, folder):
    """Harrell's C of each test fold, and the stratified C over folds."""
    counts = []
    for fold in range(5):
        whole = settings_of(key)
        whole["model"] = {**whole["model"], "settings": settings}
        run_train(settings=whole, **files, name=key, repeat=0, fold=fold, out=folder / str(fold))
        table = read_parquet(folder / str(fold) / "predictions.parquet", "morphome.predictions")
        test = table[table["role"] == "test"]
        counts.append(harrell(test["time_months"], test["event"], test["risk"]))
    right = sum(c.concordant + 0.5 * c.tied_risk for c in counts)
    return np.array([c.c for c in counts]), right / sum(c.comparable for c in counts)


def test_age_and_sex(hnsc, settings_of, tmp_path):
    """Reference: .555 ± .041 over folds (416 patients)."""
    settings = {"covariates": ["age", "sex"], "ridge": 1.0}
    folds, _ = concordances("clinical_cox", hnsc("all"), settings, settings_of, tmp_path)
    np.testing.assert_allclose(folds.mean(), 0.555, atol=0.003)
    np.testing.assert_allclose(folds.std(ddof=1), 0.041, atol=0.003)


def test_mean_pool(hnsc, settings_of, tmp_path):
    """Reference: stratified C .571 (401 patients; ridge on all columns, where ours takes 50 components)."""
    settings = {"statistics": "mean_sd", "components": 50, "ridges": [100.0, 1000.0], "inner_folds": 3}
    _, stratified = concordances("mean_pool_cox", hnsc("bags"), settings, settings_of, tmp_path)
    np.testing.assert_allclose(stratified, 0.571, atol=0.02)
