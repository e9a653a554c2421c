"""Runs that are killed and started again: bit for bit what an uninterrupted run gives (on a CPU)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from morphome.files import read_json, read_parquet
from morphome.training import resume as resume_module
from morphome.training.resume import Resume
from morphome.training.run import run_train

#: A distilled student, whose teacher is trained before its first epoch.
DISTIL = {
    "teacher": "deep_sets_fusion",
    "settings": {"dim": 8, "fusion_dim": 8},
    "loss": "kd_feature",
    "weight": 1.0,
    "temperature": 2.0,
    "folds": 2,
    "bin_weights": "equal",
    "feature_loss": "cosine",
    "hidden": 8,
}
OGM = {"rule": "ogm_cox", "rho": "shapley", "alpha": 3.0, "ge_noise": "std"}
#: Model, training settings, and the write of a state after which the run is killed.
CASES = {
    "hazard": ("abmil", {"epochs": 4}, 2),
    "cox": ("deepsurv", {"epochs": 4, "learning_rate": 0.05}, 3),
    "balanced": ("deep_sets_fusion", {"epochs": 4, "balance": OGM, "optimizer": "radam"}, 2),
    # Writes: two epochs and the end of the first trial, one epoch of the second. The first trial is the better one.
    "search": ("deep_sets_fusion", {"balance": OGM, "search": {"learning_rate": [0.03, 1e-6]}}, 4),
    # After the last trial, before anything is predicted.
    "searched": ("deep_sets_fusion", {"search": {"learning_rate": [1e-6, 0.03], "weight_decay": [0.1]}}, 6),
    # Writes: targets of the teacher, two epochs and the end of the first trial, one epoch of the second.
    "student": ("abmil", {"distil": DISTIL, "search": {"learning_rate": [0.001, 0.002]}}, 5),
}
#: Runs every case in a process of its own, which kills itself right after that many states were written.
KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
import morphome.training.trainer
from morphome.training import resume
from morphome.training.run import run_train

torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])  # imports much; here once for all processes
resume.EVERY_SECONDS = 0.0
files, cases = json.loads(sys.argv[1])
files = {k: {n: Path(p) for n, p in v.items()} if isinstance(v, dict) else Path(v) for k, v in files.items()}
save = resume.Resume.save
for name, settings, out, last in cases:
    left = last

    def counted(self, state):
        global left
        save(self, state)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    resume.Resume.save = counted
    child = os.fork()
    if child == 0:
        run_train(settings=settings, **files, name=name, repeat=0, fold=0, out=Path(out), threads=1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, status)
"""


def settings_for(case, settings_of, **changes):
    key, training, _ = CASES[case]
    return settings_of(key, **{"epochs": 2, **training, **changes})


@pytest.fixture(scope="module")
def files(planted, tmp_path_factory):
    return planted().write(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def killed(files, settings_of, tmp_path_factory):
    """Folder of the killed run of each case; copies, so that each test can go on with it."""
    base = tmp_path_factory.mktemp("killed")
    cases = [(case, settings_for(case, settings_of), str(base / case), CASES[case][2]) for case in CASES]
    child = [sys.executable, "-c", KILLED, json.dumps([files, cases], default=str)]
    done = subprocess.run(child, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def copy(case, to):
        assert [p.name for p in (base / case).iterdir()] == ["training.state"]
        shutil.copytree(base / case, to)
        return to

    return copy


@pytest.fixture
def run(files, settings_of, capfd):
    """Train in this process; the five outputs without clock times, and what was printed."""

    def start(case, out, cohort=files, **changes):
        capfd.readouterr()
        settings = settings_for(case, settings_of, **changes)
        run_train(settings=settings, **cohort, name=case, repeat=0, fold=0, out=out, threads=1)
        assert not list(out.glob("*.state"))
        facts = read_json(out / "run.json", "morphome.run")
        return {
            "model": (out / "model.safetensors").read_bytes(),
            "run": {k: v for k, v in facts.items() if not k.startswith("seconds")},
            "predictions": read_parquet(out / "predictions.parquet", "morphome.predictions"),
            "history": read_parquet(out / "history.parquet", "morphome.history").drop(columns="seconds"),
            "diagnostics": read_parquet(out / "diagnostics.parquet", "morphome.diagnostics"),
        }, capfd.readouterr().out

    return start


def assert_same(a, b):
    assert a["model"] == b["model"]
    assert a["run"] == b["run"]
    for table in ("predictions", "history", "diagnostics"):
        pd.testing.assert_frame_equal(a[table], b[table], check_exact=True)


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_bit_for_bit(case, killed, run, tmp_path):
    whole, _ = run(case, tmp_path / "whole")
    again, said = run(case, killed(case, tmp_path / "again"))
    assert_same(whole, again)
    epochs = said.count(": epoch ")
    # What was done before the kill is not done again, the teacher least of all.
    assert epochs == {"hazard": 2, "cox": 1, "balanced": 2, "search": 1, "searched": 0, "student": 1}[case]
    assert ("going on after epoch" in said) == (case != "searched")
    if case == "search":
        assert whole["run"]["chosen"] == ["learning_rate=0.03"]
    if case == "searched":
        assert whole["run"]["chosen"] == ["learning_rate=0.03, weight_decay=0.1"]
    if "risk_path" in whole["predictions"]:
        assert whole["predictions"]["risk_path"].nunique() > 10


def test_a_state_of_another_run_is_not_taken_up(killed, run, planted, tmp_path):
    """Other settings, other outcomes of the training or of the inner patients, other bags behind the same ids."""
    cohort = planted()
    roles = cohort.splits[cohort.splits["fold"] == 0].set_index("patient_id")["role"]
    changed = {}
    for role in ("train", "inner_val"):
        patients = cohort.patients.copy()
        rows = patients["patient_id"].map(roles) == role
        patients.loc[rows, "time_months"] = patients.loc[rows, "time_months"] * 0.9
        changed[role] = cohort.with_(patients=patients).write(tmp_path / role)
    cases = [{"learning_rate": 0.004}, {"seed": 2}, *({"cohort": changed[role]} for role in changed)]
    for number, changes in enumerate(cases):
        again, said = run("hazard", killed("hazard", tmp_path / f"again {number}"), **changes)
        assert "going on" not in said
        assert said.count(": epoch ") == 4
    whole, _ = run("hazard", tmp_path / "whole", **changes)
    assert_same(whole, again)


def test_other_tables_with_the_same_outcomes_are_another_run(killed, run, planted, tmp_path):
    cohort = planted()
    slides = {slide: bag[::2] for slide, bag in cohort.bags.items()}
    _, said = run("hazard", killed("hazard", tmp_path / "out"), cohort=cohort.with_(bags=slides).write(tmp_path / "c"))
    assert "going on" not in said


def test_resume_false_neither_reads_nor_writes(killed, files, settings_of, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(resume_module, "EVERY_SECONDS", 0.0)
    out = killed("hazard", tmp_path / "out")
    before = (out / "training.state").read_bytes()
    settings = settings_for("hazard", settings_of)
    run_train(settings=settings, **files, name="hazard", repeat=0, fold=0, out=out, threads=1, resume=False)
    assert "going on" not in capfd.readouterr().out
    assert (out / "training.state").read_bytes() == before


def test_a_damaged_state_trains_anew(killed, run, tmp_path):
    whole, _ = run("hazard", tmp_path / "whole")
    out = killed("hazard", tmp_path / "out")
    path = out / "training.state"
    path.write_bytes(path.read_bytes()[:-200])
    again, said = run("hazard", out)
    assert "going on" not in said
    assert_same(whole, again)


def test_no_damage_of_the_file_is_an_error_or_overlooked(tmp_path):
    path = tmp_path / "x.state"
    resume = Resume(path, "key")
    state = {"module": {"w": torch.arange(300.0)}, "trial": 1, "epochs": [{"epoch": 1, "c": float("nan")}]}
    resume.save(state)
    whole = path.read_bytes()
    assert torch.equal(resume.load()["module"]["w"], state["module"]["w"])
    assert Resume(path, "other").load() is None
    rng = np.random.default_rng(0)
    damaged = [whole[: len(whole) * k // 8] for k in range(8)]
    damaged += [b"text", b"\x80\x02.", b"PK\x03\x04", b"\x00" * 500, whole[::-1]]
    for at in rng.integers(0, len(whole), size=150):
        damaged.append(whole[:at] + bytes([whole[at] ^ int(rng.integers(1, 256))]) + whole[at + 1 :])
    for content in damaged:
        path.write_bytes(content)
        assert resume.load() is None


def test_the_file_goes_with_what_a_kill_while_writing_left(tmp_path):
    resume = Resume(tmp_path / "training.state", "key")
    resume.save({"trial": 0})
    for name in (".training.abc123.state", "other.state", ".model.x.safetensors"):
        (tmp_path / name).touch()
    resume.done()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".model.x.safetensors", "other.state"]
    nowhere = Resume(None, "key")
    nowhere.save({})
    nowhere.done()
    assert nowhere.load() is None
    assert not nowhere.due


def test_a_state_is_written_at_most_once_in_a_while(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(resume_module.clock, "monotonic", lambda: now[0])
    resume = Resume(tmp_path / "s.state", "key")
    assert not resume.due
    now[0] += 59
    assert not resume.due
    now[0] += 2
    assert resume.due
    resume.save({})
    assert not resume.due
