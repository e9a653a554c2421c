"""The sums of timing records, by hand."""

from __future__ import annotations

import pytest

from morphome.features.throughput import summarise


def record(slide, n_tiles=100, total=10.0, read=8.0, wait=1.0, encode=4.0, threads=2, **more):
    return {
        "slide_id": slide, "n_tiles": n_tiles, "seconds_total": total, "seconds_read": read, "seconds_wait": wait,
        "seconds_encode": encode, "seconds_load": 0.0, "reading_threads": threads,
        "tiles_per_second": n_tiles / total if n_tiles else None, "bound": "encoder" if n_tiles else None,
        "reader": "tiled_jpeg" if n_tiles else None, "device": "cpu", "runtime": "torch", "encoder": "uni", **more,
    }  # fmt: skip


def test_sums_by_hand():
    records = [record("A", seconds_load=3.6), record("B", n_tiles=300, total=20.0, read=24.0, encode=16.0, wait=0.5)]
    found = summarise([*records, record("C", n_tiles=0, total=6.0, read=4.0, wait=4.0, encode=0.0)])
    assert (found["n_slides"], found["n_slides_encoded"], found["n_tiles"]) == (3, 2, 400)
    assert found["tiles_per_second"] == pytest.approx(400 / 30)
    assert found["hours_total"] == pytest.approx(36 / 3600)
    assert found["hours_read"] == pytest.approx(36 / 3600)
    assert found["hours_wait"] == pytest.approx(5.5 / 3600)
    assert found["hours_load"] == pytest.approx(0.001)
    assert found["busy_fraction"] == pytest.approx(20 / 30)
    assert found["wait_fraction"] == pytest.approx(1.5 / 30)
    assert found["cores_per_encoder"] == pytest.approx(32 / 20)
    assert found["bound"] == "encoder", "16 s on two threads against 20 s"
    assert found["readers"] == {"tiled_jpeg": 2}
    assert found["slowest"] == {"slide_id": "A", "tiles_per_second": 10.0}
    assert found["reason"] == ""


def test_a_slow_reader_is_found():
    assert summarise([record("A", read=9.0)])["bound"] == "reader"


def test_nothing_encoded_is_none_with_a_reason():
    for records in ([], [record("A", n_tiles=0)]):
        found = summarise(records)
        assert found["reason"] == "no slide has tiles"
        assert found["tiles_per_second"] is found["bound"] is found["cores_per_encoder"] is found["slowest"] is None


def test_older_records_give_what_they_hold():
    old = {
        "slide_id": "O", "n_tiles": 50, "seconds_total": 5.0, "seconds_read": 2.0, "seconds_encode": 2.0,
        "tiles_per_second": 10.0, "reader": "openslide", "encoder": "stain_texture",
    }  # fmt: skip
    found = summarise([old, record("A")])
    assert found["tiles_per_second"] == pytest.approx(150 / 15)
    assert found["bound"] is found["busy_fraction"] is None
    assert found["reason"] == "1 of 2 slides have records of an older version"
