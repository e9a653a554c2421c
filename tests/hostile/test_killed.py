"""A process killed at any moment (a cluster's time limit, the out-of-memory killer) leaves whole files or none."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from PIL import Image

from morphome.files import read_json, read_stamp

FORMATS = {"tile": {".h5": "morphome.tiles", ".json": "morphome.slide_qc"},
           "encode": {".h5": "morphome.tile-features", ".json": "morphome.timing"}}  # fmt: skip
#: What Python tells an audit hook about files: opening, renaming, removing, changing rights.
EVENTS = ("open", "os.rename", "os.remove", "os.chmod", "tempfile.mkstemp", "os.mkdir")


def die_at(number: int) -> None:
    """Kill this process when it touches a file for the ``number``-th time from now on."""
    left = [number]

    def hook(event: str, arguments: tuple) -> None:
        if event in EVENTS:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed(work: Callable[[], object], before: Callable[[], None], delay: float | None = None) -> bool:
    """Run in a forked process that is killed; whether it came to its end before."""
    child = os.fork()
    if child == 0:
        try:
            before()
            work()
        finally:
            os._exit(7)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in {7, -signal.SIGKILL}
    return code == 7


def check_absent_or_whole(folder: Path, step: str) -> list[str]:
    """Every file under a final name is readable to its end and stamped; these names."""
    found = sorted(f for f in folder.glob("*") if not f.name.startswith("."))
    for file in found:
        if file.suffix == ".jpg":
            with Image.open(file) as picture:
                picture.load()
        elif file.suffix == ".geojson":
            assert file.read_text().endswith("}\n")
        else:
            assert read_stamp(file, "")["format"] == FORMATS[step][file.suffix]
        if file.suffix == ".json":
            read_json(file, FORMATS[step][".json"])
        if file.suffix == ".h5":
            with h5py.File(file, locking=False) as handle:
                lengths = {len(handle[name][()]) for name in handle if name != "failed_coords"}
            assert lengths == {24}
    return [f.name for f in found]


@pytest.fixture
def steps(tile, encode, files, tmp_path):
    """Both steps on one slide, each into a folder of that name; the tiles for the encode step are there."""
    path = files.svs(tmp_path / "slide.svs")
    tile(path, folder="tiles")
    encode(path, folder="first")  # what is imported late is here now, and not in every child
    return {"tile": lambda: tile(path, folder="out"), "encode": lambda: encode(path, folder="out")}


@pytest.mark.parametrize("step", ["tile", "encode"])
def test_killed_at_every_touch_of_a_file(steps, tmp_path, step):
    """Deterministic: before each opening, renaming and removing in turn, until the step comes to its end."""
    out, seen = tmp_path / "out", set()
    for number in range(1, 400):
        ended = killed(steps[step], lambda number=number: die_at(number))
        if out.exists():
            seen.add(tuple(check_absent_or_whole(out, step)))
        if ended:
            break
        # Leftovers of the killed run stay beside; the next run must neither trip over them nor count them.
        for file in out.glob("[!.]*"):
            file.unlink()
    else:
        pytest.fail("the step never came to its end")
    assert number > 4
    assert len(seen) >= (4 if step == "tile" else 2), "killed between the files as well"
    hidden = [f for f in out.iterdir() if f.name.startswith(".")]
    for file in hidden:
        file.unlink()
    assert steps[step]().result == ("ok", "")


@pytest.mark.parametrize("step", ["tile", "encode"])
def test_killed_at_random_moments(steps, tmp_path, step):
    """By the clock, so also inside compiled code; the results of the run before stay or are replaced as a whole."""
    out = tmp_path / "out"
    started = time.perf_counter()
    steps[step]()
    seconds = time.perf_counter() - started
    names = check_absent_or_whole(out, step)
    for number in range(8):
        killed(steps[step], lambda: None, delay=seconds * number / 7)
        assert check_absent_or_whole(out, step) == names


def test_leftovers_do_not_count_as_results(steps, tmp_path):
    """Temporary files of a killed run have hidden names: nothing that lists results may take them."""
    out = tmp_path / "out"
    killed(steps["tile"], lambda: None, delay=0)
    out.mkdir(exist_ok=True)
    (out / ".S.abcd1234.h5").write_bytes(b"half")
    (out / ".S.abcd1234.json").write_bytes(b"{")
    with pytest.raises(AssertionError):  # the fixture lists them
        steps["tile"]()
    assert check_absent_or_whole(out, "tile") == ["S.geojson", "S.h5", "S.jpg", "S.json"]
