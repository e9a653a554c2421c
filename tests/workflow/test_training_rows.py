"""Rows of the published protocol, of a teacher, of a balance rule, and an encoder of RNA, as a user starts them."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml


def neighbour(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem + "_of_rows", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).resolve().parent
Checkout = neighbour(HERE / "checkout.py").Checkout
tiny = neighbour(HERE.parent / "rna" / "conftest.py")

pytestmark = pytest.mark.workflow

SMALL = {"dim": 8, "heads": 2, "feedward": 8, "attention_dim": 4}
MCAT = {"dim": 8, "heads": 2, "feedforward": 8, "attention_dim": 4}
ABMIL = {"dim": 8, "attention_dim": 4, "head_dim": 4}
MODELS = {
    "clinical_cox": None,
    "abmil": ABMIL,
    "mcat": MCAT,
    "mcat_published": {
        "model": "mcat",
        **MCAT,
        "training": {"protocol": "published", "epoch_rule": "oracle_outer_best"},
    },
    "mcat_ogm": {"model": "mcat", **MCAT, "training": {"balance": {"rule": "ogm_cox"}}},
    "abmil_taught": {
        "model": "abmil",
        **ABMIL,
        "training": {"distil": {"teacher": "mcat", "settings": MCAT, "loss": "kd_logit", "folds": 2}},
    },
    "path_gptomic": None,
}
PUBLISHED = "mcat_published"


def write_cohort(folder: Path, patients: int = 24) -> dict:
    """A cohort of ready-made features and own tables; the sections of the configuration that name them."""
    rng = np.random.default_rng(5)
    ids = [f"P{i:02d}" for i in range(patients)]
    hidden = rng.normal(size=patients)
    (folder / "bags").mkdir(parents=True)
    for name, shift in zip(ids, hidden, strict=True):
        np.save(folder / "bags" / f"{name}_s.npy", rng.normal(shift, 1, (12, 8)).astype(np.float32))
    time = rng.exponential(20 * np.exp(-hidden)) + 0.5
    clinical = {"patient_id": ids, "time": time.round(3), "event": (rng.random(patients) < 0.75).astype(int)}
    clinical |= {"site": [f"H{i % 4}" for i in range(patients)], "age": rng.integers(40, 80, patients)}
    pd.DataFrame(clinical).to_csv(folder / "clinical.csv", index=False)
    slides = {"slide_id": [f"{name}_s" for name in ids], "patient_id": ids, "path": [f"{name}_s.svs" for name in ids]}
    pd.DataFrame(slides).to_csv(folder / "slides.tsv", sep="\t", index=False)

    def table(name: str, values: np.ndarray) -> None:
        frame = pd.DataFrame(values, columns=tiny.GENES[: values.shape[1]])
        frame.insert(0, "patient_id", ids)
        frame.to_csv(folder / f"{name}.csv", index=False)

    counts = rng.poisson(rng.gamma(1.0, 20.0, 60) * np.exp(0.3 * hidden[:, None]), (patients, 60))
    table("expression", counts)
    table("rna", np.log2(counts + 1.0).round(4))
    table("mut", (rng.random((patients, 20)) < 0.3).astype(int))
    table("cnv", rng.integers(-2, 3, (patients, 20)))
    groups = pd.DataFrame({f"group {k}": tiny.GENES[10 * k : 10 * k + 10] for k in range(3)})
    groups.to_csv(folder / "groups.csv", index=False)
    tiny.write_scgpt(folder / "scgpt")
    own = {name: {"format": "csv", "path": f"own/{name}.csv"} for name in ("rna", "mut", "cnv")}
    return {
        "name": "small",
        "simulate": None,
        "cohort": {"clinical": {"format": "csv", "path": "own/clinical.csv"}, "time_unit": "months", "min_events": 4},
        "slides": {"sheet": "own/slides.tsv"},
        "features": {"source": "external", "path": "own/bags"},
        "molecular": {
            **own,
            "expression": {"format": "csv", "path": "own/expression.csv", "unit": "counts"},
            "groups": {"path": "own/groups.csv"},
            "encoder": {"name": "scgpt", "weights": "own/scgpt", "allow_unpinned": True, "panel_size": 40},
        },
        "splits": {"folds": 2, "min_events_per_test_fold": 1, "scheme": "random"},
        "training": {"epochs": 2, "accumulation": 4, "cox_window": 8, "time_bins": 2},
        "models": MODELS,
        "evaluation": {"horizon_months": 12, "bootstrap": 20},
    }
