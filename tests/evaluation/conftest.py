"""A planted cohort, folds, and predictions of made-up models, written as the training step writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from morphome.evaluation.metrics import FoldPredictions
from morphome.files import write_json, write_parquet


@dataclass
class Planted:
    """Weibull times with log hazard ``eta`` (shape 1.2, scale 30 months), uniform censoring, random folds.

    A model is a function of the rows asked for that gives their risk and S(t) on the grid.
    """

    n: int = 240
    folds: int = 3
    repeats: int = 1
    tau: float | None = 24.0
    spread: float = 1.2
    seed: int = 5
    ids: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.ids = np.array([f"P{i:04d}" for i in range(self.n)], dtype=object)
        self.eta = self.spread * rng.standard_normal(self.n)
        death = (-np.log(rng.random(self.n)) / (30.0**-1.2 * np.exp(self.eta))) ** (1 / 1.2)
        censored = rng.uniform(1.0, 70.0, self.n)
        self.time, self.event = np.minimum(death, censored), (death <= censored).astype(np.int8)
        self.fold = np.stack([rng.permutation(np.arange(self.n) % self.folds) for _ in range(self.repeats)])
        self.noise = rng.standard_normal(self.n)
        self.grid = np.linspace(0.05, 1.0, 100) * (self.tau or 24.0)

    def oracle(self, rows: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The truth."""
        hazard = (self.grid / 30.0) ** 1.2
        return self.eta[rows], np.exp(-np.exp(self.eta[rows])[:, None] * hazard[None, :])

    def random(self, rows: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Noise, with curves as spread as the oracle's: confident and wrong."""
        hazard = (self.grid / 30.0) ** 1.2
        return self.noise[rows], np.exp(-np.exp(self.noise[rows])[:, None] * hazard[None, :])

    def constant(self, rows: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One number for all, with the training fold's Kaplan-Meier curve."""
        from morphome.survival import kaplan_meier, step

        curve = step(*kaplan_meier(self.time[train], self.event[train]), self.grid, before=1.0)
        return np.full(len(rows), 0.3), np.tile(curve, (len(rows), 1))

    def role(self, repeat: int, fold: int) -> np.ndarray:
        role = np.where(self.fold[repeat] == fold, "test", "train").astype(object)
        role[np.flatnonzero(role == "train")[::5]] = "inner_val"
        return role

    def data(self, model: Callable, repeat: int = 0, fold: int = 0) -> FoldPredictions:
        """The fold as the evaluation sees it."""
        role = self.role(repeat, fold)
        test, train = np.flatnonzero(role == "test"), np.flatnonzero(role != "test")
        risk, survival = model(test, train)
        return FoldPredictions(
            patient_id=self.ids[test], time=self.time[test], event=self.event[test].astype(bool), risk=risk,
            survival=survival, grid=self.grid, train_time=self.time[train], train_event=self.event[train].astype(bool),
            train_risk=model(train, train)[0], horizon=self.tau, horizon_reason="" if self.tau else "no horizon passes",
        )  # fmt: skip

    def write(
        self, folder: Path, name: str, model: Callable, key: str = "abmil", change: Callable | None = None
    ) -> list[Path]:
        """Predictions of all folds; ``change(table, repeat, fold)`` may alter a table before it is written."""
        paths = []
        for repeat in range(self.repeats):
            for fold in range(self.folds):
                role = self.role(repeat, fold)
                rows = np.arange(self.n)
                risk, survival = model(rows, np.flatnonzero(role != "test"))
                table = pd.DataFrame(
                    {
                        "patient_id": self.ids,
                        "role": role,
                        "time_months": self.time,
                        "event": self.event,
                        "risk": risk,
                        "survival": list(survival),
                    }
                )
                extra: dict[str, Any] = {"name": name, "model": key, "repeat": repeat, "fold": fold}
                extra |= {"horizon_months": self.tau, "times_months": self.grid}
                if change is not None:
                    table = change(table, repeat, fold)
                path = folder / name / f"r{repeat}f{fold}" / "predictions.parquet"
                write_parquet(table, path, "morphome.predictions", {}, extra)
                paths.append(path)
        return paths

    def facts(self, folder: Path) -> Path:
        """The part of ``morphome.split_facts`` that the evaluation reads."""
        path = folder / "facts.json"
        body = {"horizon_months": self.tau, "horizon_reason": "" if self.tau else "no horizon passes the rule"}
        write_json(body, path, "morphome.split_facts", {})
        return path


@pytest.fixture(scope="session")
def planted_cohort() -> type[Planted]:
    """Class of planted cohorts."""
    return Planted


@pytest.fixture(scope="session")
def planted() -> Planted:
    """240 patients, 3 folds, horizon 24 months."""
    return Planted()
