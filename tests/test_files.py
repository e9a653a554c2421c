"""Files are atomic, stamped, and refused by name when other settings made them."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from morphome.errors import MorphomeError
from morphome.files import (
    atomic_path,
    file_sample,
    parquet_meta,
    read_json,
    read_parquet,
    settings_hash,
    write_json,
    write_parquet,
)
from morphome.steps import require_made_by


def test_a_failure_leaves_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_settings_hash_ignores_order_but_not_values():
    assert settings_hash({"a": 1, "b": 2}) == settings_hash({"b": 2, "a": 1})
    assert settings_hash({"a": 1}) != settings_hash({"a": 2})


def test_parquet_round_trip_and_refusals(tmp_path):
    path = tmp_path / "t.parquet"
    table = pd.DataFrame({"patient_id": ["b", "a"], "value": [1.5, np.nan]})
    write_parquet(table, path, "morphome.test", {"k": 1}, extra={"unit": "months", "grid": np.arange(2)})
    back = read_parquet(path, "morphome.test", {"k": 1})
    pd.testing.assert_frame_equal(back, table, check_dtype=False)
    assert back.attrs == {"unit": "months", "grid": [0, 1]}
    with pytest.raises(MorphomeError, match="made by other settings"):
        read_parquet(path, "morphome.test", {"k": 2})
    with pytest.raises(MorphomeError, match=r"not a 'morphome\.other'"):
        read_parquet(path, "morphome.other")
    with pytest.raises(MorphomeError, match=r"gone\.parquet: file not found"):
        read_parquet(tmp_path / "gone.parquet", "morphome.test")


def test_a_foreign_parquet_file_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(path)
    assert parquet_meta(path) == {}
    with pytest.raises(MorphomeError, match="without a morphome stamp"):
        read_parquet(path, "morphome.test")


@pytest.mark.parametrize("name", ["t.json", "t.parquet", "t.h5"])
def test_a_damaged_or_missing_file_is_named_with_a_remedy(tmp_path, name):
    with pytest.raises(MorphomeError, match=rf"{name}: file not found \(morphome\.test\)"):
        require_made_by(tmp_path / name, "morphome.test", {})
    (tmp_path / name).write_bytes(b"half a fi")
    with pytest.raises(MorphomeError, match=rf"(?s){name}: not .*Remedy: delete the file"):
        require_made_by(tmp_path / name, "morphome.test", {})


def test_json_has_no_nan_and_a_future_version_is_refused(tmp_path):
    path = tmp_path / "t.json"
    write_json({"x": np.float64("nan"), "y": np.arange(2), "z": path}, path, "morphome.test", {})
    assert read_json(path, "morphome.test")["x"] is None
    content = json.loads(path.read_text())
    content["stamp"]["format_version"] = 99
    path.write_text(json.dumps(content))
    with pytest.raises(MorphomeError, match="newer than this morphome"):
        read_json(path, "morphome.test")


@pytest.mark.parametrize("at", [0, 1_500_000, 3_000_000, 4_999_999])
def test_a_sample_of_a_file_sees_a_change_of_a_piece_of_it(tmp_path, at):
    """A megabyte of another middle, under the same size."""
    path = tmp_path / "slide.svs"
    content = np.random.default_rng(0).integers(0, 256, 5_000_000, np.uint8)
    path.write_bytes(content.tobytes())
    before = file_sample(path)
    assert before.endswith(":5000000")
    assert file_sample(path) == before
    content[at : at + 1_000_000] ^= 255
    path.write_bytes(content.tobytes())
    assert file_sample(path) != before


@pytest.mark.parametrize("size", [0, 1, 32_768, 1 << 20, (1 << 20) + 1])
def test_a_sample_of_a_small_file(tmp_path, size):
    path = tmp_path / "small"
    path.write_bytes(b"x" * size)
    assert file_sample(path).endswith(f":{size}")
