"""A disk that is full, a quota, a folder that may not be written: one sentence for the user, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import h5py
import pytest

from morphome.errors import MorphomeError
from morphome.files import atomic_path, read_json, write_json, write_text

TEXTS = {"tmpfs": "No space left on device", "rlimit": "File too large"}
OUTPUTS = {"tile": {"S.geojson", "S.h5", "S.jpg", "S.json"}, "encode": {"S.h5", "S.json"}}
NAMESPACE = ("unshare", "--map-root-user", "--mount")


def may_mount(folder) -> bool:
    """Whether this machine lets a process mount a file system in a namespace of its own."""
    if not shutil.which("unshare"):
        return False
    command = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize("kind", ["tmpfs", "rlimit"])
def test_no_room(python, files, tmp_path, kind):
    if kind == "tmpfs" and not may_mount(tmp_path):
        pytest.skip("this machine does not let tests mount a small file system; the limit on file sizes is tested")
    work = tmp_path / "work"
    work.mkdir()
    path = files.svs(tmp_path / "slide.svs")
    done = python("full_disk.py", kind, str(work), str(path), prefix=NAMESPACE if kind == "tmpfs" else ())
    assert done.returncode == 0, done.stderr[-3000:]
    for step, rows in json.loads(done.stdout).items():
        stopped = set()
        for row in rows:
            if row["error"] is None:
                assert set(row["left"]) - {"other.bin"} == OUTPUTS[step]
            else:
                stopped.add(check_stopped(row, OUTPUTS[step], TEXTS[kind]))
            assert row["after"] is None, "with room again the step must succeed"
            assert set(row["files"]) - {"other.bin"} == OUTPUTS[step]
        # Every file of the step was stopped at least once (a limit on file sizes stops the largest).
        assert stopped == OUTPUTS[step] if kind == "tmpfs" else "S.h5" in stopped
        # All second runs made the same files.
        assert len({row["files"]["S.h5"] for row in rows}) == 1


def check_stopped(row: dict, outputs: set[str], text: str) -> str:
    """Name of the file that could not be written, after checking the message and what was left."""
    assert row["error"] == "MorphomeError", row
    problem, _, remedy = row["text"].partition("\n  Remedy: ")
    named = problem.partition(": ")[0].rpartition("/")[2]
    assert problem.endswith(f"{named}: cannot be written: {text}"), row
    assert "room" in remedy
    # What is there was finished before; the file that failed is not, and no temporary one.
    assert set(row["left"]) <= outputs - {named} | {"other.bin"}, row
    return named


def test_an_old_result_survives_a_full_disk(tile, files, tmp_path, monkeypatch):
    """The old files stay whole until the new ones are."""
    before = tile(files.svs(tmp_path / "slide.svs"))
    content = before.path.read_bytes()
    real = os.fsync

    def full(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").readlink().suffix == ".h5":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MorphomeError, match=r"S\.h5: cannot be written: No space left on device\n  Remedy: make room"):
        tile(files.svs(tmp_path / "slide.svs", files.board(seed=3)))
    assert before.path.read_bytes() == content
    assert sorted(f.suffix for f in before.path.parent.iterdir()) == [".geojson", ".h5", ".jpg", ".json"]


def test_the_text_of_hdf5_becomes_a_sentence(tmp_path):
    """HDF5 raises RuntimeError or OSError with its own number and text, depending on where the disk ran full."""
    for error in (
        RuntimeError("Set slist enabled failed (file write failed: errno = 28, error message = 'No space left')"),
        OSError(errno.EDQUOT, "Can't close file (file write failed: errno = 122)"),
        OSError("Can't close file (errno = 27, error message = 'File too large')"),
    ):
        with pytest.raises(MorphomeError, match=r"out\.h5: cannot be written: [A-Z]") as caught, \
                atomic_path(tmp_path / "out.h5") as temporary:  # fmt: skip
            with h5py.File(temporary, "w") as handle:
                handle["a"] = 1
            raise error
        assert "errno" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file for a folder", "folder for a file", "name too long"])
def test_places_that_cannot_be_written(tmp_path, kind):
    path = tmp_path / "out.json"
    if kind == "file for a folder":
        path.write_text("")
        path = path / "below.json"
    elif kind == "folder for a file":
        path.mkdir()
    else:
        path = tmp_path / ("y" * 300)
    with pytest.raises(MorphomeError, match=r"cannot be written: .*\n  Remedy: check") as caught:
        write_text("text", path)
    assert str(path) in str(caught.value)
    assert len(list(tmp_path.iterdir())) == (0 if kind == "name too long" else 1)


def test_another_error_while_writing_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "out.json"):
        (tmp_path / "gone.csv").read_text()
    with pytest.raises(RuntimeError, match=r"^something else$"), atomic_path(tmp_path / "out.json"):
        raise RuntimeError("something else")
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_no_text_can_be_written_about(tile, files, tmp_path):
    """File names are bytes: Latin-1 names from an old share are no UTF-8."""
    path = tmp_path / os.fsdecode(b"Pr\xe4parat.svs")
    outcome = tile(path)
    outcome.refused("missing_file")
    assert "Pr\\udce4parat.svs" in outcome.record["reason"]
    assert tile(files.svs(path)).result == ("ok", "")
    write_json({os.fsdecode(b"\xff"): path}, tmp_path / "x.json", "morphome.test", {})
    assert read_json(tmp_path / "x.json", "morphome.test")["\\udcff"].endswith("Pr\\udce4parat.svs")
