"""Fit models on planted cohorts, fold by fold, and judge what they reach.

Every fit goes the way of the step ``train``: files, :func:`~morphome.training.data.load_fold`,
:func:`~morphome.training.run.make_model`. Its predictions are one small file, so a run that was killed goes on where
it stopped, and a fit whose settings, cohort or code changed is done again.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import threading
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from morphome.errors import MorphomeError
from morphome.files import parquet_meta, read_json, read_parquet, write_parquet, write_text
from morphome.models.catalog import info
from morphome.steps import code_hash
from morphome.training.data import derive_seed, load_fold
from morphome.training.preprocess import time_grid
from morphome.training.run import make_model
from morphome.validation.judge import Kind, judge, kind_of, markdown
from morphome.validation.planted import Design, PlantedFiles, plant, stratified_c
from morphome.validation.settings import settings_of

#: The same truth in fewer columns: of 28 molecular ones 24 carry z2, and a patch tells its kind without noise columns.
EASY = {"genes": 24, "loaded": (6, 4), "other": 2, "dim": 12, "shift": 4.0}
#: Name on the command line -> what its design is made of. Folds are random, in S4 also of whole sites.
COHORTS: dict[str, dict[str, Any]] = {
    "S3": {"scenario": "S3"},
    "X1": {"scenario": "X1"},
    "X1_easy": {"scenario": "X1", **EASY},
    "S0": {"scenario": "S0"},
    "mixed": {"scenario": "S3", "twist": "mixed"},
    "permuted": {"scenario": "S3", "twist": "permuted"},
    "S4": {"scenario": "S4"},
}
#: Cohorts that say nothing about a kind of model, which is then not fitted on them.
NOT_FITTED: dict[str, frozenset[Kind]] = {
    "S4": frozenset({"genes", "clinical", "control"}),  # hospitals show in slides only
    "mixed": frozenset({"genes", "clinical", "control"}),  # bags are all that changes
}
FIT_FORMAT = "morphome.validation_fit"
TABLE_FORMAT = "morphome.validation"


@dataclass(frozen=True)
class Fit:
    """One model on one fold of one planted cohort.

    Attributes:
        cohort: key of :data:`COHORTS`; scheme: "random" or "site"; folds: of the whole.
    """

    model: str
    cohort: str
    design: Design
    scheme: str
    fold: int
    folds: int

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the result."""
        own, training = settings_of(self.model)
        return {**asdict(self), "settings": own, "training": training, "code": code_hash("train", self.model)}

    @property
    def name(self) -> str:
        """Of the cohort; unique within a run."""
        return f"{self.cohort}-seed{self.design.seed}-n{self.design.n}"

    def path(self, out: Path) -> Path:
        """File of the predictions."""
        return out / "fits" / self.model / f"{self.name}-{self.scheme}-{self.fold}.parquet"

    def files(self, out: Path) -> PlantedFiles:
        """The cohort on disk."""
        return PlantedFiles(out / "cohorts" / self.name)

    def done(self, out: Path) -> bool:
        """Whether the predictions are there and were made with these settings."""
        path = self.path(out)
        if not path.exists():
            return False
        try:
            read_parquet(path, FIT_FORMAT, self.settings, columns=["patient_id"])
        except MorphomeError:
            return False
        return True


def plan(models: Sequence[str], cohorts: Sequence[str], n: int, seeds: int, folds: int, **design: Any) -> list[Fit]:
    """All fits, cohort by cohort, so that a killed run leaves whole cohorts behind.

    Args:
        models: registry keys; cohorts: keys of :data:`COHORTS`.
        n: patients; seeds: number of cohorts drawn; folds: of the cross-validation.
        design: further fields of :class:`~morphome.validation.planted.Design`.

    Raises:
        MorphomeError: no such model or cohort.
    """
    for name in cohorts:
        if name not in COHORTS:
            raise MorphomeError(f"there is no planted scenario '{name}'", f"choose from {', '.join(COHORTS)}")
    kinds = {model: kind_of(info(model)) for model in models}
    fits = []
    for name in dict.fromkeys(cohorts):
        for seed in range(seeds):
            drawn = Design(**{**design, **COHORTS[name], "n": n, "seed": seed})
            for model in dict.fromkeys(models):
                if kinds[model] not in NOT_FITTED.get(name, frozenset()):
                    fits += [
                        Fit(model, name, drawn, scheme, k, folds) for scheme in _schemes(name) for k in range(folds)
                    ]
    return fits


def validate(
    models: Sequence[str],
    scenarios: Sequence[str],
    out: Path,
    n: int = 400,
    seeds: int = 3,
    folds: int = 5,
    cores: int = 1,
    **design: Any,
) -> pd.DataFrame:
    """Fit every model on every planted cohort and write what was found beside the stated bounds.

    Args:
        models: registry keys; scenarios: keys of :data:`COHORTS`.
        out: folder of the cohorts, the fits, and ``validation.parquet``, ``.csv`` and ``.md``.
        n: patients of a cohort; seeds: cohorts of each scenario; folds: of the cross-validation.
        cores: processes, each with one thread.
        design: further fields of :class:`~morphome.validation.planted.Design`.

    Returns:
        The table of :func:`morphome.validation.judge.judge`.

    Raises:
        MorphomeError: no such model or scenario.
    """
    out = Path(out)
    fits = plan(models, scenarios, n, seeds, folds, **design)
    _plant_all(fits, out)
    waiting = [fit for fit in fits if not fit.done(out)]
    if len(waiting) < len(fits):
        print(f"{len(fits) - len(waiting)} of {len(fits)} fits are there already", flush=True)
    failed = _run(waiting, out, cores)
    table = judge(scores(fits, out, failed), n, seeds, folds)
    settings = {"models": list(models), "scenarios": list(scenarios), "n": n, "seeds": seeds, "folds": folds, **design}
    write_parquet(table, out / "validation.parquet", TABLE_FORMAT, settings)
    write_text(table.to_csv(index=False), out / "validation.csv")
    write_text(markdown(table, n, seeds, folds), out / "validation.md")
    return table


def scores(fits: Sequence[Fit], out: Path, failed: Mapping[Fit, str] | None = None) -> pd.DataFrame:
    """Stratified C of every model, cohort, scheme and data seed, pooled over the folds.

    Returns:
        ``model, kind, cohort, scheme, seed, c, events, seconds, problem``; ``c`` is NaN where a fit failed, and
        ``problem`` says why.
    """
    failed = dict(failed or {})
    groups: dict[tuple[str, str, str, int], list[Fit]] = {}
    for fit in fits:
        groups.setdefault((fit.model, fit.cohort, fit.scheme, fit.design.seed), []).append(fit)
    rows = []
    for (model, cohort, scheme, seed), members in groups.items():
        row = {"model": model, "kind": kind_of(info(model)), "cohort": cohort, "scheme": scheme, "seed": seed}
        problems = [failed[fit] for fit in members if fit in failed]
        if problems:
            rows.append({**row, "c": np.nan, "events": 0, "seconds": np.nan, "problem": problems[0]})
            continue
        parts = [read_parquet(fit.path(out), FIT_FORMAT).assign(fold=fit.fold) for fit in members]
        seconds = sum(parquet_meta(fit.path(out))["seconds"] for fit in members)
        whole = pd.concat(parts, ignore_index=True)
        time, event, risk, fold = (whole[c].to_numpy() for c in ("time_months", "event", "risk", "fold"))
        c = stratified_c(time, event, risk, fold)
        rows.append({**row, "c": c, "events": int(event.sum()), "seconds": seconds, "problem": ""})
    return pd.DataFrame(rows)


def fit_one(fit: Fit, out: Path) -> str:
    """Train and predict; writes :meth:`Fit.path`. Returns what went wrong, or nothing."""
    files, settings = fit.files(out), fit.settings
    start = clock.perf_counter()
    data, outcomes = load_fold(
        patients=files.patients,
        index=files.index,
        panels=files.panels,
        groups=files.groups,
        splits=files.splits(fit.scheme),
        repeat=0,
        fold=fit.fold,
    )
    horizon = read_json(files.split_facts(fit.scheme), "morphome.split_facts")["horizon_months"]
    training = settings["training"]
    seed = derive_seed(training["seed"], fit.design.seed, fit.fold)
    test = outcomes[outcomes["role"] == "test"]
    try:
        # The trainer says a line per epoch, which many fits at once turn into noise.
        with contextlib.redirect_stdout(io.StringIO()), threadpool_limits(1, user_api="blas"):
            model = make_model(fit.model, settings["settings"], training, seed, 1, horizon)
            model.fit(data, [])
            times = time_grid(horizon, data.outcomes("train", "inner_val").time)
            risk, _ = model.predict(data, list(test["patient_id"]), times)
    except MorphomeError as error:
        return str(error)
    write_parquet(
        test.drop(columns="role").assign(risk=np.asarray(risk, dtype=np.float64)),
        fit.path(out),
        FIT_FORMAT,
        settings,
        {"seconds": clock.perf_counter() - start, "best_epoch": model.best_epoch, "model": fit.model},
    )
    return ""


def _schemes(cohort: str) -> tuple[str, ...]:
    return ("random", "site") if cohort == "S4" else ("random",)


def _plant_all(fits: Sequence[Fit], out: Path) -> None:
    wanted: dict[PlantedFiles, Fit] = {}
    for fit in fits:
        wanted.setdefault(fit.files(out), fit)
    for files, fit in tqdm(wanted.items(), desc="planting", unit="cohort", disable=None, leave=False):
        schemes = _schemes(fit.cohort)
        if not files.complete(fit.design, schemes, fit.folds):
            plant(fit.design).write(files.folder, schemes, fit.folds)


def _run(fits: Sequence[Fit], out: Path, cores: int) -> dict[Fit, str]:
    """Do the fits; those that could not be done, and why."""
    failed: dict[Fit, str] = {}
    bar = tqdm(total=len(fits), desc="validation", unit="fit", disable=None)

    def finished(fit: Fit, problem: str) -> None:
        if problem:
            failed[fit] = problem
        bar.update()
        if bar.disable:  # no terminal: a line in the log
            what = f": {problem}" if problem else ""
            print(f"{fit.model} {fit.path(out).stem}{what}", flush=True)

    with bar:
        if cores == 1 or len(fits) < 2:
            for fit in fits:
                finished(fit, fit_one(fit, out))
            return failed
        with (
            _one_thread_each(),
            ProcessPoolExecutor(
                min(cores, len(fits)), multiprocessing.get_context("spawn"), _end_with_parent, (os.getpid(),)
            ) as pool,
        ):
            running = {pool.submit(fit_one, fit, out): fit for fit in fits}
            try:
                while running:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        finished(running.pop(future), future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return failed


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes that start inside get one thread each; torch and BLAS read this when they are loaded."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _end_with_parent(parent: int) -> None:
    """Start a watch in a worker: when the run is killed, its workers must not go on for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            clock.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
