"""The measurement of layouts: each is what it says, nothing stays behind."""

from __future__ import annotations

import json
import math

import h5py
import numpy as np
import pytest

from morphome.bench import store
from morphome.bench.store import bench_store


def test_layouts_are_measured_and_nothing_stays(tmp_path):
    found = json.loads(json.dumps(bench_store(tmp_path, tiles=300, dim=16, rounds=2)))
    assert list(tmp_path.iterdir()) == []
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["ours", "clam", "trident"]
    assert rows["ours"]["mb"] < 0.6 * rows["clam"]["mb"]
    for row in rows.values():
        assert min(row["write_ms"], row["read_ms"], row["sample_ms"]) > 0
        total = row["write_ms"] + row["read_ms"]
        assert math.isclose(row["ratio"], total / found["ours"], rel_tol=1e-9)
    assert found["ratio"] == rows["trident"]["ratio"]
    assert 0 < found["max_difference"] < 1e-3
    assert (found["n_tiles"], found["dim"], found["sample"]) == (300, 16, 300)


@pytest.mark.parametrize(("name", "chunks", "dtype"), [("ours", None, "f2"), ("clam", (32, 8), "f4"), ("trident", (1, 8), "f4")])  # fmt: skip  # noqa: E501
def test_each_layout_is_what_it_says(name, chunks, dtype, tmp_path):
    bag = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    path = tmp_path / "bag.h5"
    store._writer(bag, path, name)()
    with h5py.File(path) as handle:
        assert (handle["features"].chunks, handle["features"].dtype) == (chunks, np.dtype(dtype))
    picked = np.array([3, 50, 99])
    np.testing.assert_allclose(store._reader(path)(), bag, rtol=1e-3, atol=1e-4)
    sample = store._reader(path, picked)()
    np.testing.assert_allclose(sample, bag[picked], rtol=1e-3, atol=1e-4)
    assert sample.dtype == np.float32
