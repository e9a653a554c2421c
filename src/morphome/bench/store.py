"""How fast bags of features are written and read: our layout against those of CLAM and TRIDENT.

Ours is float16 in one contiguous piece; theirs are float32 in chunks of 32 rows (CLAM) or one row (TRIDENT). Every way
goes from float32 vectors to a file and back to float32 in memory, so ours pays for two conversions; it also goes
through a temporary file that is flushed to disk, as every file of a run does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from morphome.bench.rounds import interleaved
from morphome.errors import MorphomeError
from morphome.features.encode import to_float16
from morphome.files import atomic_h5

#: Rows of a chunk by name; None is contiguous.
LAYOUTS: dict[str, int | None] = {"ours": None, "clam": 32, "trident": 1}
#: A sample of a bag, as a training step takes it.
SAMPLE = 2048


def bench_store(folder: Path | None = None, tiles: int = 10_000, dim: int = 1024, rounds: int = 5) -> dict[str, Any]:
    """Measure CPU milliseconds of writing, reading whole and reading a sample of one bag.

    Args:
        folder: where the files are written, on the disk that matters; None for the folder of temporary files. They
            are deleted at the end.
        tiles, dim: of the bag, which holds random numbers.
        rounds: interleaved rounds; medians are reported.

    Returns:
        JSON-able: ``n_tiles``, ``dim``, ``rounds``, ``sample`` (rows), ``ours`` and ``peer`` (CPU ms of writing and
        reading once; the peer is TRIDENT's layout), ``ratio``, ``peer_is`` (in words), ``max_difference`` (largest
        error of float16 relative to the largest value), and ``rows``, one a layout: ``name``, ``write_ms``,
        ``read_ms``, ``sample_ms``, the elapsed ``write_wall_ms`` and ``read_wall_ms``, ``mb``, and ``ratio`` to ours
        of writing and reading.
    """
    rng = np.random.default_rng(0)
    bag = rng.normal(size=(tiles, dim)).astype(np.float32)
    picked = np.sort(rng.permutation(tiles)[:SAMPLE])
    if folder is not None and not Path(folder).is_dir():
        raise MorphomeError(f"{folder}: there is no such folder", "name a folder on the disk to measure")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        files = {name: Path(place) / f"{name}.h5" for name in LAYOUTS}
        write = interleaved(rounds, {name: _writer(bag, files[name], name) for name in LAYOUTS})
        read = interleaved(rounds, {name: _reader(files[name]) for name in LAYOUTS})
        sample = interleaved(rounds, {name: _reader(files[name], picked) for name in LAYOUTS})
        sizes = {name: file.stat().st_size for name, file in files.items()}
        difference = np.abs(_reader(files["ours"])() - bag).max() / np.abs(bag).max() if bag.size else 0.0
    total = {name: 1000 * (write.median(name) + read.median(name)) for name in LAYOUTS}
    rows = [
        {
            "name": name,
            "write_ms": 1000 * write.median(name),
            "read_ms": 1000 * read.median(name),
            "sample_ms": 1000 * sample.median(name),
            "write_wall_ms": 1000 * write.median_wall(name),
            "read_wall_ms": 1000 * read.median_wall(name),
            "mb": sizes[name] / 1e6,
            "ratio": total[name] / total["ours"],
        }
        for name in LAYOUTS
    ]
    return {
        "n_tiles": tiles,
        "dim": dim,
        "rounds": rounds,
        "sample": len(picked),
        "ours": total["ours"],
        "peer": total["trident"],
        "peer_is": "float32 in chunks of one row, as TRIDENT writes; written without a temporary name and fsync",
        "ratio": total["trident"] / total["ours"],
        "max_difference": float(difference),
        "rows": rows,
    }


def _writer(bag: np.ndarray, path: Path, name: str) -> Callable[[], None]:
    rows = LAYOUTS[name]

    def ours() -> None:
        with atomic_h5(path) as handle:
            handle["features"] = to_float16(bag, "bench")

    def theirs() -> None:
        with h5py.File(path, "w") as handle:
            handle.create_dataset("features", data=bag, chunks=(rows, bag.shape[1]), maxshape=(None, bag.shape[1]))

    return ours if rows is None else theirs


def _reader(path: Path, picked: np.ndarray | None = None) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        with h5py.File(path, "r", locking=False) as handle:
            data = handle["features"]
            offset = data.id.get_offset()
            if picked is None:
                return data[()].astype(np.float32, copy=False)
            if offset is not None:  # a contiguous piece needs no HDF5 to pick rows
                return np.memmap(path, data.dtype, "r", offset, data.shape)[picked].astype(np.float32)
            return data[picked]

    return read
