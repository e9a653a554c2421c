"""The same at the command line: one readable message, exit code 0 for a bad slide and 1 for what the user can mend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from morphome.files import read_json

PAGE = b"<html><body>Your session has expired</body></html>"


class Command:
    """``morphome`` with a small configuration over two slides, the second of which is a web page."""

    def __init__(self, folder: Path, good: Path) -> None:
        self.folder, self.good, self.bad = folder, good, good.with_name("it's bad (2).svs")
        self.bad.write_bytes(PAGE)
        sheet, clinical = folder / "slides.csv", folder / "clinical.csv"
        sheet.write_text(f"slide_id,patient_id,path\ngood,P1,{self.good}\nbad,P2,{self.bad}\n")
        clinical.write_text("patient_id,time_months,event,site\nP1,10,1,A\nP2,20,0,B\n")
        config = {
            "name": "hostile",
            "output": str(folder / "results"),
            "cohort": {"clinical": {"format": "csv", "path": str(clinical)}, "endpoint": "OS"},
            "slides": {"sheet": str(sheet)},
            "tiling": {"patch_px": 64, "mpp_target": 0.5, "min_fragment_mm2": 0.0005, "min_tiles": 1},
            "features": {"encoder": "stain_texture"},
            "models": {"abmil": {}},
        }
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(config))

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "morphome", *arguments, "--config", str(self.config)],
            capture_output=True, text=True, timeout=60, cwd=self.folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


@pytest.fixture
def command(files, tmp_path):
    """The command over a slide in a folder whose name has spaces and brackets."""
    return Command(tmp_path, files.svs(tmp_path / "my slides [1]" / "good slide.svs"))


def test_both_steps_over_a_good_and_a_bad_slide(command):
    """A bad slide is a result, not an error: the cohort goes on."""
    assert command("tile", "good").returncode == 0
    done = command("tile")
    assert done.returncode == 0, done.stderr
    assert "good: as before" in done.stdout
    assert "bad: 0 tiles: failed, unreadable:" in done.stdout
    for words in (str(command.bad), f"{len(PAGE)} bytes", "<html><body>", "Remedy: fetch the file again"):
        assert words in done.stdout
    assert "Traceback" not in done.stderr
    made = list((command.folder / "results").rglob("bad.*"))
    assert len(made) == 4
    record = next(f for f in made if f.suffix == ".json")
    assert read_json(record, "morphome.slide_qc")["reason_code"] == "unreadable"
    done = command("encode", "good", "bad", "--threads", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "good: 24 tiles"
    assert lines[1].startswith("bad: 0 tiles: failed, unreadable: ")
    assert not list((command.folder / "results").rglob(".*"))


def test_a_missing_file_and_missing_tiles_are_errors(command):
    done = command("encode", "good")
    assert done.returncode == 1
    assert "good.h5: file not found" in done.stderr
    assert "Remedy" in done.stderr
    command.good.unlink()
    done = command("tile", "good")
    assert done.returncode == 1
    assert "slide 'good'" in done.stderr
    assert "gone" in done.stderr
    assert "Remedy" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written(command):
    (command.folder / "results").write_text("a file where the folder of results should be")
    done = command("tile", "good")
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert "Remedy: check" in done.stderr
    assert "Traceback" not in done.stderr
