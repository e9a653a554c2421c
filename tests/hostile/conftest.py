"""What the tests of hostile inputs share: the builders, and one run of a step with all its outputs checked."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from morphome.features.encode import EncodeJob, run_encode
from morphome.files import read_json, stamp
from morphome.slides.tile import run_tile

HERE = Path(__file__).parent
ENDS = {"h5_out": ".h5", "qc_out": ".json", "geojson_out": ".geojson", "thumbnail_out": ".jpg"}


@pytest.fixture(scope="session")
def files() -> ModuleType:
    """The module ``files.py`` of this folder."""
    spec = importlib.util.spec_from_file_location("hostile_files", HERE / "files.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Outcome:
    """What a step left: its record, the data of its HDF5 file, the attributes, and where they lie."""

    record: dict[str, Any]
    data: dict[str, np.ndarray]
    attrs: dict[str, Any]
    path: Path

    @property
    def result(self) -> tuple[str, str]:
        """(status, reason code)."""
        return self.attrs["status"], self.attrs["reason_code"]

    def refused(self, code: str, *words: str) -> str:
        """Check that the slide failed with this code and a message with a remedy and these words; the message."""
        reason = self.attrs["reason"]
        assert self.result == ("failed", code), reason
        problem, _, remedy = reason.partition("\n  Remedy: ")
        assert remedy, reason
        for word in words:
            assert word in problem, reason
        assert problem.isprintable(), reason
        assert "Traceback" not in reason
        assert len(reason) < 900, reason
        assert all(len(values) == 0 for name, values in self.data.items() if name != "failed_coords")
        return reason


def whole_tiles(h5: Path, settings: dict[str, Any]) -> Outcome:
    """Open all outputs of a tile step to the last byte; any that is half written fails here."""
    record = read_json(h5.with_suffix(".json"), "morphome.slide_qc", settings)
    with h5py.File(h5, "r", locking=False) as handle:
        data, attrs = {name: handle[name][()] for name in handle}, dict(handle.attrs)
    assert attrs["config_hash"] == stamp("morphome.tiles", settings)["config_hash"]
    assert (attrs["status"], attrs["reason_code"]) == (record["status"], record["reason_code"])
    assert {len(values) for values in data.values()} == {record["n_tiles"]}
    assert json.loads(h5.with_suffix(".geojson").read_text())["type"] == "FeatureCollection"
    with Image.open(h5.with_suffix(".jpg")) as picture:
        picture.load()
    return Outcome(record, data, attrs, h5)


def whole_features(h5: Path, settings: dict[str, Any]) -> Outcome:
    """The same for the outputs of an encode step."""
    record = read_json(h5.with_suffix(".json"), "morphome.timing", settings)
    with h5py.File(h5, "r", locking=False) as handle:
        data, attrs = {name: handle[name][()] for name in handle}, dict(handle.attrs)
    assert attrs["config_hash"] == stamp("morphome.tile-features", settings)["config_hash"]
    assert len(data["features"]) == len(data["coords"]) == len(data["sharpness"]) == record["n_tiles"]
    assert len(data["failed_coords"]) == attrs["n_tiles_failed"]
    if attrs["status"] == "ok":
        assert len(data["coords"]) + len(data["failed_coords"]) == attrs["n_tiles_planned"]
    assert np.isfinite(data["features"]).all()
    return Outcome(record, data, attrs, h5)


def assert_clean(folder: Path) -> None:
    """Nothing lies in the folder but outputs: no temporary file under a hidden or another name."""
    assert not [f.name for f in folder.iterdir() if f.name[0] == "." or f.suffix not in ENDS.values()]


@pytest.fixture
def tile(synthetic, tmp_path) -> Callable[..., Outcome]:
    """Run the tile step and check that its outputs are whole and alone."""

    def run(path: Path, slide: str = "S", folder: str = "tiles", reader: str = "auto", **changes: Any) -> Outcome:
        settings = {"tiling": synthetic.tiling(**{"min_fragment_mm2": 0.0005, **changes}), "slides": {"reader": reader}}
        outputs = {name: tmp_path / folder / f"{slide}{end}" for name, end in ENDS.items()}
        run_tile(slide_path=path, slide_id=slide, settings=settings, **outputs)
        assert_clean(tmp_path / folder)
        return whole_tiles(outputs["h5_out"], settings)

    return run


@pytest.fixture
def encode(synthetic, tmp_path) -> Callable[..., Outcome]:
    """Run the encode step on the outputs of ``tile`` and check that its outputs are whole and alone."""

    def run(
        path: Path,
        slide: str = "S",
        folder: str = "features",
        tiles: str = "tiles",
        reader: str = "auto",
        max_failed_tiles: float = 0.01,
    ) -> Outcome:
        features = {**synthetic.FEATURES, "max_failed_tiles": max_failed_tiles}
        stamped = {name: features[name] for name in ("encoder", "precision", "max_failed_tiles")}
        tiling = synthetic.tiling(min_fragment_mm2=0.0005)
        settings = {"tiling": tiling, "features": stamped, "slides": {"reader": reader}}
        out = tmp_path / folder / f"{slide}.h5"
        job = EncodeJob(
            slide_path=path,
            slide_id=slide,
            tiles_h5=tmp_path / tiles / f"{slide}.h5",
            h5_out=out,
            timing_out=out.with_suffix(".json"),
            settings=settings,
        )
        run_encode(jobs=[job], features=features, code="0123456789ab", threads=2)
        assert_clean(out.parent)
        return whole_features(out, settings)

    return run


@pytest.fixture
def in_child() -> Callable[..., tuple[int, str]]:
    """Run a function in a forked process: (exit code, or minus the signal that ended it; the text it returned).

    A crash of a decoder, an endless read or a process that kills itself then ends the child and not the tests.
    """

    def run(work: Callable[[], str], seconds: float = 20.0) -> tuple[int, str]:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(read_end)
                signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends a child that hangs
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                os.write(write_end, work().encode()[:60_000])
                code = 0
            finally:
                if code:
                    traceback.print_exc()
                os._exit(code)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            text = pipe.read().decode()
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), text

    return run


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess]:
    """Run a script of this folder in a fresh interpreter, for limits and peaks of memory that are its own."""

    def run(script: str, *arguments: str, prefix: tuple[str, ...] = (), timeout: float = 60) -> Any:
        command = [*prefix, sys.executable, str(HERE / script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout)

    return run
