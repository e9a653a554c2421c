"""Step ``train``: one model, one repeat, one fold; trains, predicts everybody, writes what later steps read."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
import time as clock
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from morphome import __version__
from morphome.errors import MorphomeError, MorphomeWarning
from morphome.files import read_json, write_json, write_parquet
from morphome.models.catalog import info
from morphome.schema import schema
from morphome.survival import TIED_TOLERANCE
from morphome.training.checkpoint import load_model, save_model
from morphome.training.data import FoldData, Outcomes, derive_seed, load_fold
from morphome.training.preprocess import time_grid

if TYPE_CHECKING:
    from morphome.training.baselines import Baseline
    from morphome.training.trainer import NeuralModel


@dataclass
class TrainedModel:
    """A trained model with everything that was fitted around it.

    Attributes:
        name: row of the model table; key: registry key.
        times_months: (T,) grid of the survival curves.
        facts: what the model file says (settings, dims, column names, feature fingerprint).
    """

    name: str
    key: str
    model: Baseline | NeuralModel
    times_months: np.ndarray
    facts: dict[str, Any]

    def predict(self, fold_data: FoldData, ids: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Predict patients from their features only.

        Args:
            fold_data: patients with bags and molecular values of the kinds the model needs.
            ids: patients in the order wanted; all of ``fold_data``, sorted, by default.

        Returns:
            Risk (n,) float64, higher = worse, and S(t) (n, T) on ``times_months``.

        Raises:
            MorphomeError: features of another encoder than the model was trained with.
        """
        trained_on = self.facts["feature_fingerprint"]
        if "path" in self.model.needs and trained_on != fold_data.fingerprint:
            raise MorphomeError(
                f"model '{self.name}' was trained on features {trained_on or 'without a fingerprint'}, "
                f"these are {fold_data.fingerprint or 'without a fingerprint'}",
                "encode the slides with the encoder and tiling of the training run",
            )
        with _one_blas_thread():
            return self.model.predict(fold_data, fold_data.ids() if ids is None else ids, self.times_months)


def make_model(
    key: str,
    settings: Mapping[str, Any],
    training: Mapping[str, Any],
    seed: int,
    threads: int = 1,
    horizon_months: float | None = None,
    state_file: Path | None = None,
    inputs_key: str = "",
) -> Baseline | NeuralModel:
    """An untrained model of the registry (baselines and neural models alike).

    Raises:
        MorphomeError: there is no such model.
    """
    if info(key).kind == "baseline":
        return info(key).load()(settings, training, seed)
    # Baselines must not wait for torch.
    from morphome.training.trainer import NeuralModel

    return NeuralModel(key, settings, training, seed, threads, horizon_months, state_file, inputs_key)


def run_train(
    *,
    settings: Mapping[str, Any],
    patients: Path,
    index: Path,
    panels: Mapping[str, Path],
    groups: Path | None,
    splits: Path,
    split_facts: Path,
    name: str,
    repeat: int,
    fold: int,
    out: Path,
    threads: int = 1,
    resume: bool = True,
) -> None:
    """Train one model on one fold and write its predictions, history, diagnostics, weights and facts.

    A network that was killed goes on where its last state was written (``training.state`` in the folder).

    Args:
        settings: ``{"model": {"name", "model", "settings", "training"}}``.
        patients: ``morphome.analysis``; index: ``morphome.feature_index``; panels: ``morphome.panel`` by name;
            groups: ``morphome.groups``; splits: ``morphome.splits``; split_facts: ``morphome.split_facts``.
        name: row of the model table; repeat, fold: of the splits.
        out: folder of the five files.
        threads: CPU threads of torch. Sums are ordered by them, so equal threads give equal bits.
        resume: write and take up states of training.

    Raises:
        MorphomeError: inputs that do not fit together, a loss that is not finite.
    """
    start = clock.perf_counter()
    entry, out = settings["model"], Path(out)
    key, training = entry["model"], entry["training"]
    seed = derive_seed(training["seed"], repeat, fold)
    data, outcomes = load_fold(
        patients=patients,
        index=index,
        panels=panels,
        groups=groups,
        splits=splits,
        repeat=repeat,
        fold=fold,
        rna_encoder=settings.get("encoder"),
    )
    horizon = read_json(split_facts, "morphome.split_facts")["horizon_months"]
    notes: list[str] = []
    times = time_grid(horizon, data.outcomes("train", "inner_val").time)

    tables = [patients, index, splits, split_facts, *([groups] if groups is not None else []), *panels.values()]
    state = (out / "training.state", _content(tables)) if resume and info(key).kind == "neural" else ()
    model = make_model(key, entry["settings"], training, seed, threads, horizon, *state)
    # Only the published protocol, which is marked as optimistic, may see them.
    shown = {"shown": _shown(outcomes)} if training["protocol"] == "published" and info(key).kind == "neural" else {}
    with _one_blas_thread():
        fit_start = clock.perf_counter()
        model.fit(data, notes, **shown)
        fit_seconds = clock.perf_counter() - fit_start
        ids = data.ids()
        risk, survival = model.predict(data, ids, times)
    constant = bool(len(risk) > 1 and np.ptp(risk) <= TIED_TOLERANCE)
    if constant:
        message = f"every patient gets the same risk: the model has learned nothing ({data.where})"
        notes.append(message)
    notes += [f"{count} {reason} ({data.where})" for reason, count in data.lost.items() if count]

    history = model.history
    extra = {"name": name, "model": key, "repeat": repeat, "fold": fold}
    outcomes = outcomes.set_index("patient_id").loc[list(ids)].reset_index()
    predictions = outcomes.astype({"time_months": "float64", "event": "int8"}).assign(
        risk=risk.astype(np.float64),
        survival=list(survival.astype(np.float64)),
        **{f"risk_{branch}": values for branch, values in model.branch_risks.items()},
    )
    facts = {
        **extra,
        "settings": entry["settings"],
        "training": training,
        "seed": seed,
        "threads": threads,
        "needs": sorted(model.needs),
        "head": info(key).head if info(key).kind == "neural" else None,
        "feature_fingerprint": data.fingerprint if "path" in model.needs else "",
    }
    arrays = model.arrays() | {"fitted/times_months": times}
    save_model(out / "model.safetensors", arrays, {**facts, "fitted": model.facts()}, settings)
    write_parquet(
        predictions,
        out / "predictions.parquet",
        "morphome.predictions",
        settings,
        {**extra, "horizon_months": horizon, "times_months": times},
    )
    write_parquet(history, out / "history.parquet", "morphome.history", settings, extra)
    routers = {**extra, "experts": model.experts}
    write_parquet(model.diagnostics, out / "diagnostics.parquet", "morphome.diagnostics", settings, routers)
    roles = outcomes["role"].value_counts()
    write_json(
        {
            **facts,
            "n_train": int(roles.get("train", 0)),
            "n_inner": int(roles.get("inner_val", 0)),
            "n_test": int(roles.get("test", 0)),
            "n_fitted": len(data.ids(*model.fit_roles)),
            "n_parameters": model.n_parameters,
            "best_epoch": model.best_epoch,
            "epochs_run": len(history),
            "chosen": list(history.loc[history["chosen"], "setting"]) if "setting" in history else None,
            "seconds_total": clock.perf_counter() - start,
            "seconds_per_epoch": fit_seconds / max(1, len(history)),
            "device": model.device,
            "versions": _versions(),
            "warnings": notes,
            "constant_prediction": constant,
        },
        out / "run.json",
        "morphome.run",
        settings,
    )
    if constant:
        warnings.warn(MorphomeWarning(f"{name}: {message}"), stacklevel=2)


def load_run(folder: Path, threads: int | None = None) -> TrainedModel:
    """Load the model of a run folder; its predictions repeat those of the run bit for bit (same device).

    Args:
        folder: as written by :func:`run_train`; only ``model.safetensors`` is read.
        threads: CPU threads; those of the run by default, which is what makes the bits equal.

    Raises:
        MorphomeError: the file is missing, broken or of another format.
    """
    arrays, facts = load_model(Path(folder) / "model.safetensors")
    # What a model of an earlier version does not say had the value that is the default now.
    known = {name: part["default"] for name, part in schema()["$defs"]["training"]["properties"].items()}
    # A model trained on a GPU also predicts without one.
    device = "cpu" if facts["training"]["device"] == "cpu" else "auto"
    training = {**known, **facts["training"], "device": device}
    model = make_model(facts["model"], facts["settings"], training, facts["seed"], threads or int(facts["threads"]))
    times = arrays.pop("fitted/times_months")
    model.restore(arrays, facts["fitted"])
    return TrainedModel(facts["name"], facts["model"], model, times, facts)


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    """NumPy's linear algebra on one thread: its sums then do not depend on the machine's cores."""
    with threadpool_limits(1, user_api="blas"):
        yield


def _content(paths: Sequence[Path]) -> str:
    """Hash of the bytes of files."""
    digest = hashlib.sha256()
    for path in paths:
        with Path(path).open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _shown(outcomes: pd.DataFrame) -> dict[str, Outcomes]:
    """Outcomes of the test patients and of all, for the published protocol."""
    rows = {"test": outcomes[outcomes["role"] == "test"], "all": outcomes}
    return {
        name: Outcomes(
            tuple(part["patient_id"]), part["time_months"].to_numpy("float64"), part["event"].to_numpy("int64")
        )
        for name, part in rows.items()
    }


def _versions() -> dict[str, str]:
    found = {"morphome": __version__, "python": platform.python_version()}
    for package in ("numpy", "torch", "scikit-survival", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
