"""A planted cohort at feature level in the files that the train step reads, small enough for every model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import yaml

from morphome.config import schema
from morphome.files import stamp, write_json, write_parquet


def small_models() -> dict[str, dict[str, Any]]:
    """Settings that make the models small, shared by all tests."""
    return yaml.safe_load((Path(__file__).parents[1] / "data" / "small_models.yaml").read_text(encoding="utf-8"))


TRAINING = {
    **{name: part.get("default") for name, part in schema()["$defs"]["training"]["properties"].items()},
    "search": {},
    "epochs": 2,
    "learning_rate": 0.005,
    "weight_decay": 1e-5,
    "accumulation": 8,
    "time_bins": 3,
    "bin_edges": "quantile",
    "beta": 0.0,
    "sampler": "class_balanced",
    "epoch_rule": "inner_best",
    "patience": 6,
    "max_patches": 12,
    "device": "cpu",
    "seed": 1,
}
#: Small settings of every model: the defaults of the schema, and over them what makes it small.
MODELS: dict[str, dict[str, Any]] = {
    key: {**{name: part["default"] for name, part in row["properties"].items()}, **small_models().get(key, {})}
    for key, row in schema()["$defs"]["models"].items()
}


def model_settings(key: str, name: str | None = None, **training: Any) -> dict[str, Any]:
    """Settings of the train step for a small model."""
    entry = {"name": name or key, "model": key, "settings": MODELS[key], "training": {**TRAINING, **training}}
    return {"model": entry}


@dataclass(frozen=True)
class Cohort:
    """Tables and bags in memory; :meth:`write` makes the files."""

    patients: pd.DataFrame
    panels: dict[str, pd.DataFrame]
    bags: dict[str, np.ndarray]
    slides: pd.DataFrame
    splits: pd.DataFrame
    groups: dict[str, list[dict[str, str]]]
    horizon: float | None = 12.0

    def write(self, folder: Path) -> dict[str, Any]:
        """Write everything; the file arguments of ``run_train``."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for slide, patient in zip(self.slides["slide_id"], self.slides["patient_id"], strict=True):
            path = folder / f"{slide}.h5"
            features = self.bags[slide].astype(np.float16)
            grid = np.arange(len(features), dtype=np.int32)
            with h5py.File(path, "w") as handle:
                handle.attrs.update(stamp("morphome.tile-features", {}))
                handle.attrs["status"] = "ok"
                handle["features"] = features
                handle["coords"] = np.column_stack([grid % 5, grid // 5]).astype(np.int32) * 256
            rows.append(
                {
                    "slide_id": slide,
                    "patient_id": patient,
                    "path": str(path),
                    "layout": "h5",
                    "start": 0,
                    "stop": len(features),
                    "n_tiles": len(features),
                    "dim": features.shape[1],
                    "has_coords": True,
                    "encoder": "planted",
                    "fingerprint": "0123456789ab",
                    "content_key": slide,
                    "status": "ok",
                    "reason_code": "",
                    "reason": "",
                }
            )
        files = {name: folder / f"{name}.parquet" for name in ("patients", "index", "splits", *self.panels)}
        facts = {"fingerprint": "0123456789ab", "encoder": "planted", "dim": rows[0]["dim"]}
        index = pd.DataFrame(rows).drop(columns="patient_id")
        write_parquet(index, files["index"], "morphome.feature_index", {}, facts)
        write_parquet(self.patients, files["patients"], "morphome.analysis", {})
        write_parquet(self.splits, files["splits"], "morphome.splits", {})
        for panel, table in self.panels.items():
            write_parquet(table, files[panel], "morphome.panel", {}, {"panel": panel})
        write_json({"groups": self.groups}, folder / "groups.json", "morphome.groups", {})
        write_json({"horizon_months": self.horizon}, folder / "facts.json", "morphome.split_facts", {})
        return {
            "patients": files["patients"],
            "index": files["index"],
            "panels": {panel: files[panel] for panel in self.panels},
            "groups": folder / "groups.json",
            "splits": files["splits"],
            "split_facts": folder / "facts.json",
        }

    def with_(self, **parts: Any) -> Cohort:
        """A copy with other parts."""
        return replace(self, **parts)


def plant(n: int = 36, seed: int = 3, dim: int = 8, tiles: tuple[int, int] = (6, 16)) -> Cohort:
    """A cohort whose hazard depends on morphology z1 and genes z2 (strong effects, about 40 % censored)."""
    rng = np.random.default_rng(seed)
    ids = [f"P-{i:03d}" for i in range(n)]
    z1, z2 = rng.normal(size=(2, n))
    time = 20.0 * (rng.exponential(size=n) / np.exp(1.8 * (z1 + z2))) ** (1 / 1.2) + 0.1
    cens = rng.uniform(1.0, 60.0, size=n)
    patients = pd.DataFrame(
        {
            "patient_id": ids,
            "site": [f"S{i % 4}" for i in range(n)],
            "time_months": np.minimum(time, cens),
            "event": (time <= cens).astype("int8"),
            "endpoint": "OS",
            "age_years": 60 + 5 * rng.normal(size=n),
            "sex": [("female", "male", None)[i % 3] for i in range(n)],
            "stage": np.clip(np.round(2.5 + (z1 + z2 + rng.normal(size=n)) / 2), 1, 4),
            "grade": np.nan,
            "histology": None,
        }
    )
    patients.loc[::9, "stage"] = np.nan
    bags, slides = {}, []
    for i, patient in enumerate(ids):
        for k in range(2 if i % 6 == 0 else 1):
            slide = f"{patient}-{k}"
            share = 1 / (1 + np.exp(1.2 - 1.2 * z1[i]))
            bag = rng.normal(size=(rng.integers(*tiles), dim))
            bag[rng.uniform(size=len(bag)) < share, :3] += 3.0
            bags[slide] = bag
            slides.append({"slide_id": slide, "patient_id": patient})
    slides = pd.DataFrame(slides)
    patients["slide_ids"] = [list(slides.loc[slides["patient_id"] == p, "slide_id"]) for p in ids]
    patients["n_slides"] = patients["slide_ids"].map(len)
    panels = {}
    for panel in ("rna", "mut"):
        values = rng.normal(size=(n, 9)) if panel == "rna" else (rng.uniform(size=(n, 5)) < 0.3).astype(float)
        if panel == "rna":
            values[:, :4] += 0.9 * z2[:, None]
            values[1, 7] = np.nan
        genes = [f"G{j}" for j in range(values.shape[1])]
        panels[panel] = pd.DataFrame({"patient_id": ids, **dict(zip(genes, values.T.astype("f4"), strict=True))})
    groups = {
        "kinases": [{"panel": p, "gene": g} for g in ("G0", "G1", "G4") for p in ("mut", "rna")],
        "growth": [{"panel": "rna", "gene": g} for g in ("G2", "G3", "G5")],
        "other": [{"panel": "rna", "gene": g} for g in ("G6", "G7", "G8")],
    }
    order = np.array(sorted(range(n), key=lambda i: (patients["event"][i], i)))
    role = np.empty(n, dtype=object)
    for place, i in enumerate(order):
        role[i] = "test" if place % 3 == 0 else "inner_val" if place % 6 == 1 else "train"
    other = np.where(role == "test", "train", np.where(role == "inner_val", "inner_val", "test"))
    splits = pd.concat(
        pd.DataFrame({"patient_id": ids, "repeat": 0, "fold": f, "role": r, "seed": 1})
        for f, r in enumerate((role, other))
    )
    return Cohort(patients, panels, bags, slides, splits, groups)


@pytest.fixture(scope="session")
def planted() -> Callable[..., Cohort]:
    """The maker of planted cohorts."""
    return plant


@pytest.fixture(scope="session")
def settings_of() -> Callable[..., Mapping[str, Any]]:
    """``settings_of(model key, **training)``: settings of the train step for a small model."""
    return model_settings


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, dict[str, Any]]:
    """Small settings of every model."""
    return MODELS
