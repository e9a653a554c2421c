"""Fits on planted cohorts: a mini run, what is fitted at all, and going on after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from morphome.cli import app
from morphome.errors import MorphomeError
from morphome.files import read_parquet
from morphome.models.catalog import models
from morphome.survival import harrell
from morphome.validation import run, settings
from morphome.validation.planted import plant
from morphome.validation.run import COHORTS, fit_one, plan, validate
from morphome.validation.settings import settings_of

#: Small enough for a second: 40 patients with bags of a dozen patches.
SMALL = {"bag": (8, 14), "dim": 12, "genes": 60}


@pytest.fixture
def tiny_abmil(monkeypatch):
    """ABMIL of two epochs."""
    small = {"dim": 8, "attention_dim": 4, "head_dim": 4, "training": {"epochs": 2}}
    monkeypatch.setitem(settings.MODELS, "abmil", small)


@pytest.fixture
def counted(monkeypatch):
    """Every fit that was really done."""
    done = []

    def fit(task, out):
        done.append((task.model, task.cohort, task.scheme, task.fold))
        return fit_one(task, out)

    monkeypatch.setattr(run, "fit_one", fit)
    return done


def test_a_mini_run_of_two_models_and_its_continuation(tmp_path, tiny_abmil, counted, capsys):
    keys, cohorts = ["mean_pool_cox", "abmil"], ["S3", "S4"]
    table = validate(keys, cohorts, tmp_path, n=60, seeds=1, folds=2, cores=1, **SMALL)
    assert len(counted) == 2 * (2 + 4)
    assert set(table["model"]) == set(keys)
    assert set(table["scenario"]) == {"S3", "S4"}
    judged = table[table["verdict"] != "not applicable"]
    assert judged["value"].notna().all()
    stored = read_parquet(tmp_path / "validation.parquet", "morphome.validation")
    pd.testing.assert_frame_equal(stored, table, check_dtype=False)
    assert len(pd.read_csv(tmp_path / "validation.csv")) == len(table)
    assert "| abmil | slides |" in (tmp_path / "validation.md").read_text()

    # The value of the table is the C of the stored predictions, pairs within folds only.
    parts = [
        read_parquet(fit.path(tmp_path), "morphome.validation_fit")
        for fit in plan(["mean_pool_cox"], ["S3"], 60, 1, 2, **SMALL)
    ]
    assert sorted(pd.concat(parts)["patient_id"]) == sorted(plant(fit_design(60)).patients["patient_id"])
    found = [harrell(part["time_months"], part["event"], part["risk"]) for part in parts]
    want = sum(f.c * f.comparable for f in found) / sum(f.comparable for f in found)
    row = table[(table["model"] == "mean_pool_cox") & (table["check"] == "C at least")].iloc[0]
    assert row["value"] == pytest.approx(want)

    # Again: nothing to do. One fit gone, one broken, one with other settings: these and no others are done again.
    counted.clear()
    capsys.readouterr()
    again = validate(keys, cohorts, tmp_path, n=60, seeds=1, folds=2, cores=1, **SMALL)
    assert not counted
    assert "12 of 12 fits are there already" in capsys.readouterr().out
    pd.testing.assert_frame_equal(again, table)
    fits = plan(keys, cohorts, 60, 1, 2, **SMALL)
    fits[0].path(tmp_path).unlink()
    fits[3].path(tmp_path).write_bytes(b"half of a file")
    third = validate(keys, cohorts, tmp_path, n=60, seeds=1, folds=2, cores=1, **SMALL)
    assert counted == [(fit.model, fit.cohort, fit.scheme, fit.fold) for fit in (fits[0], fits[3])]
    pd.testing.assert_frame_equal(third, table)


def fit_design(n):
    return plan(["random"], ["S3"], n, 1, 2, **SMALL)[0].design


def test_changed_settings_or_code_repeat_a_fit(tmp_path, tiny_abmil, monkeypatch):
    fit = plan(["abmil"], ["S3"], 40, 1, 2, **SMALL)[0]
    plant(fit.design).write(fit.files(tmp_path).folder, ["random"], 2)
    assert not fit.done(tmp_path)
    assert fit_one(fit, tmp_path) == ""
    assert fit.done(tmp_path)
    with monkeypatch.context() as changed:
        changed.setitem(settings.MODELS, "abmil", {**settings.MODELS["abmil"], "dim": 16})
        assert not fit.done(tmp_path)
    with monkeypatch.context() as changed:
        changed.setattr(run, "code_hash", lambda *of: "other")
        assert not fit.done(tmp_path)
    assert fit.done(tmp_path)


def test_a_killed_run_goes_on_and_leaves_no_worker_behind(tmp_path):
    """SIGKILL after the first fit; the second run does the rest, with the same numbers as an undisturbed one."""
    keys = ["mean_pool_cox", "random"]
    code = (
        "import sys\nfrom pathlib import Path\nfrom morphome.validation.run import validate\n"
        "if __name__ == '__main__':\n"
        f"    validate({keys}, ['S0'], Path(sys.argv[1]), n=60, seeds=2, folds=2, cores=2, **{SMALL})\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    out = tmp_path / "out"
    started = subprocess.Popen(
        [sys.executable, str(script), str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("fits/*/*.parquet")) and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = _children(started.pid)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert list(out.glob("fits/*/*.parquet"))
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in workers)

    table = validate(keys, ["S0"], out, n=60, seeds=2, folds=2, cores=1, **SMALL)
    fits = plan(keys, ["S0"], 60, 2, 2, **SMALL)
    assert all(fit.done(out) for fit in fits)
    assert not list(out.rglob("*.tmp*"))
    whole = validate(keys, ["S0"], tmp_path / "whole", n=60, seeds=2, folds=2, cores=1, **SMALL)
    pd.testing.assert_frame_equal(table, whole)


def _children(pid: int) -> list[int]:
    """Processes that a process started, where the system says so."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    # A process that has ended and that nobody waits for is not alive.
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_model_that_cannot_be_fitted_is_a_failed_row_and_stops_nothing(tmp_path, monkeypatch):
    def refuse(key, *rest):
        if key == "clinical_cox":
            raise MorphomeError("the loss is nan", "lower the rate")
        return made(key, *rest)

    made = run.make_model
    monkeypatch.setattr(run, "make_model", refuse)
    table = validate(["clinical_cox", "random"], ["S0"], tmp_path, n=40, seeds=1, folds=2, cores=1, **SMALL)
    row = table[table["model"] == "clinical_cox"].iloc[0]
    assert row["verdict"] == "fail"
    assert "the loss is nan" in row["reason"]
    assert np.isfinite(table.loc[table["model"] == "random", "value"]).all()
    monkeypatch.setattr(run, "make_model", made)
    table = validate(["clinical_cox", "random"], ["S0"], tmp_path, n=40, seeds=1, folds=2, cores=1, **SMALL)
    assert np.isfinite(table["value"]).all()


def test_only_what_a_cohort_can_tell_is_fitted():
    fits = plan(["mean_pool_cox", "ridge_genes", "clinical_cox", "random"], list(COHORTS), 100, 2, 3)
    of = {name: {fit.model for fit in fits if fit.cohort == name} for name in COHORTS}
    assert of["S4"] == of["mixed"] == {"mean_pool_cox"}
    assert (
        of["S3"]
        == of["X1"]
        == of["S0"]
        == of["permuted"]
        == {
            "mean_pool_cox",
            "ridge_genes",
            "clinical_cox",
            "random",
        }
    )
    assert {fit.scheme for fit in fits if fit.cohort == "S4"} == {"random", "site"}
    assert len({fit.path(Path()) for fit in fits}) == len(fits)
    with pytest.raises(MorphomeError, match="no planted scenario"):
        plan(["random"], ["S7"], 100, 1, 2)
    with pytest.raises(MorphomeError, match="not a model"):
        plan(["magic"], ["S3"], 100, 1, 2)


@pytest.mark.parametrize("key", sorted(models()))
def test_every_model_has_complete_settings_that_the_schema_allows(key):
    import jsonschema

    from morphome.config import schema

    own, training = settings_of(key)
    jsonschema.validate(own, schema()["$defs"]["models"][key])
    jsonschema.validate(training, schema()["$defs"]["training"])
    assert set(own) == set(schema()["$defs"]["models"][key]["properties"])
    assert training["device"] == "cpu"


def test_small_settings_are_small_and_unknown_models_refused():
    own, _ = settings_of("transmil")
    assert own["dim"] <= 64
    assert own["landmarks"] <= 8
    assert own["attention_dropout"] <= 0.1
    with pytest.raises(MorphomeError, match="no model 'magic'"):
        settings_of("magic")


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["validate", str(tmp_path), "--model", "random", "--scenario", "S0", "--n", "40", "--folds", "2"]
    done = CliRunner().invoke(app, [*command, "--seeds", "1", "--strict"])
    assert done.exit_code == 0, done.output
    assert "| random | control |" in done.output
    assert (tmp_path / "validation.csv").exists()
    wrong = CliRunner().invoke(app, [*command, "--scenario", "S7"])
    assert wrong.exit_code == 1
