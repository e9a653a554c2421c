"""Bags by slide id, whoever wrote the files."""

from __future__ import annotations

import pickle

import h5py
import numpy as np
import pytest

from morphome.errors import MorphomeError
from morphome.features.store import INDEX_COLUMNS, INDEX_FORMAT, BagStore, index_table
from morphome.files import write_parquet


def row(slide, path, n, dim=4, **changes):
    base = {
        "slide_id": slide, "path": str(path), "layout": "h5", "start": 0, "stop": n, "n_tiles": n, "dim": dim,
        "has_coords": True, "encoder": "e", "fingerprint": "f", "content_key": slide, "status": "ok",
        "reason_code": "", "reason": "",
    }  # fmt: skip
    return {**base, **changes}


def bag(n, dim=4, seed=0):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float16)


def grid(n):
    return np.column_stack([np.arange(n) % 3, np.arange(n) // 3]).astype(np.int32) * 10


def write_h5(path, features, coords=None):
    with h5py.File(path, "w") as handle:
        handle["features"] = features
        if coords is not None:
            handle["coords"] = coords
    return path


@pytest.fixture
def store(tmp_path):
    """A store over rows; the index lies beside the files."""

    def make(*rows):
        write_parquet(index_table(rows), tmp_path / "index.parquet", INDEX_FORMAT, {})
        return BagStore(tmp_path / "index.parquet")

    return make


def test_slides_are_joined_in_the_order_of_their_ids(store, tmp_path):
    b, a = bag(5, seed=1), bag(4, seed=2)
    made = store(
        row("b", write_h5(tmp_path / "b.h5", b, grid(5)), 5), row("a", write_h5(tmp_path / "a.h5", a, grid(4)), 4)
    )
    features, places = made.bag(["b", "a"])
    assert features.dtype == np.float32
    assert places.dtype == np.int32
    np.testing.assert_array_equal(features, np.concatenate([a, b]).astype(np.float32))
    np.testing.assert_array_equal(places[:, 0], [0] * 4 + [1] * 5)
    np.testing.assert_array_equal(places[4:, 1:], grid(5))
    np.testing.assert_array_equal(made.bag(["a", "b"])[0], features)
    np.testing.assert_array_equal(made.bag(["b"])[1][:, 0], 0)
    assert made.has_coords
    assert made.dim == 4
    assert list(made.slides) == list(INDEX_COLUMNS)


def test_tiles_are_put_in_row_major_order(store, tmp_path):
    """TRIDENT goes column by column."""
    features, coords = bag(9), grid(9)
    mixed = np.random.default_rng(3).permutation(9)
    made = store(row("a", write_h5(tmp_path / "a.h5", features[mixed], coords[mixed]), 9))
    found, places = made.bag(["a"])
    np.testing.assert_array_equal(found, features)
    np.testing.assert_array_equal(places[:, 1:], coords)


def test_without_coordinates_places_are_zero(store, tmp_path):
    made = store(row("a", write_h5(tmp_path / "a.h5", bag(3)), 3, has_coords=False))
    assert not made.has_coords
    np.testing.assert_array_equal(made.bag(["a"])[1], np.zeros((3, 3)))


def test_old_trident_files_have_a_leading_axis(store, tmp_path):
    made = store(row("a", write_h5(tmp_path / "a.h5", bag(5)[None], grid(5)), 5))
    np.testing.assert_array_equal(made.bag(["a"])[0], bag(5))


def test_bags_of_other_tools(store, peers, tmp_path):
    """The index says which of several encoders, and how microns become pixels."""
    made = store(
        row("a", peers.atlaspatch(tmp_path / "a", encoders=("x", "y")), 12, dim=8, dataset="y"),
        row("b", peers.stamp(tmp_path / "b"), 12, dim=8, mpp_x=0.25, mpp_y=0.25),
        row("c", peers.slide2vec(tmp_path / "c"), 12, dim=8, layout="pt"),
    )
    features, places = made.bag(["a", "b", "c"])
    half = peers.features(dtype=np.float16)
    np.testing.assert_array_equal(features, np.concatenate([peers.features(seed=1), half, peers.features()]))
    np.testing.assert_array_equal(places[:, 1:], np.tile(peers.coords(), (3, 1)))


def test_an_index_of_before_these_columns(tmp_path):
    old = index_table([row("a", write_h5(tmp_path / "a.h5", bag(5), grid(5)), 5)])
    write_parquet(old.drop(columns=["dataset", "mpp_x", "mpp_y"]), tmp_path / "index.parquet", INDEX_FORMAT, {})
    np.testing.assert_array_equal(BagStore(tmp_path / "index.parquet").bag(["a"])[0], bag(5))


def test_an_empty_bag_of_another_dimension(store, tmp_path):
    path = write_h5(tmp_path / "a.h5", np.zeros((0, 9), np.float32), np.zeros((0, 2), np.int32))
    made = store(row("a", path, 0, dim=9, status="empty"), row("b", write_h5(tmp_path / "b.h5", bag(2), grid(2)), 2))
    assert made.bag(["a", "b"])[0].shape == (2, 4)


def test_a_store_can_be_sent_to_another_process(store, tmp_path):
    made = store(row("a", write_h5(tmp_path / "a.h5", bag(5), grid(5)), 5))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(made)).bag(["a"])[0], bag(5))


def test_results_may_be_moved(store, tmp_path):
    write_h5(tmp_path / "a.h5", bag(5), grid(5))
    assert len(store(row("a", "elsewhere/a.h5", 5)).bag(["a"])[0]) == 5


def test_no_slides_and_empty_slides_are_empty_bags(store, tmp_path):
    path = write_h5(tmp_path / "a.h5", np.zeros((0, 4), np.float16), np.zeros((0, 2), np.int32))
    made = store(row("a", path, 0, status="empty"), row("b", write_h5(tmp_path / "b.h5", bag(2), grid(2)), 2))
    assert made.bag([])[0].shape == (0, 4)
    assert made.bag(["a"])[0].shape == (0, 4)
    assert made.bag(["a", "b"])[1][:, 0].tolist() == [1, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(store, tmp_path, value):
    features = bag(5)
    features[2, 1] = value
    with pytest.raises(MorphomeError, match=r"'a'.*NaN or infinite"):
        store(row("a", write_h5(tmp_path / "a.h5", features, grid(5)), 5)).bag(["a"])


def test_what_cannot_be_given_is_named(store, tmp_path):
    path = write_h5(tmp_path / "a.h5", bag(5), grid(5))
    failed = row("f", path, 0, status="failed", reason_code="missing_mpp", reason="no microns per pixel")
    made = store(row("a", path, 5), failed, row("gone", tmp_path / "gone.h5", 5), row("short", path, 6))
    for slide, words in [("x", "not in the index"), ("f", "no microns"), ("gone", "gone.h5"), ("short", "index says")]:
        with pytest.raises(MorphomeError, match=words):
            made.bag([slide])
    with pytest.raises(MorphomeError, match="twice"):
        made.bag(["a", "a"])


def test_mixed_features_and_repeated_slides_are_refused(store, tmp_path):
    path = write_h5(tmp_path / "a.h5", bag(5), grid(5))
    with pytest.raises(MorphomeError, match="more than one dim"):
        store(row("a", path, 5), row("b", path, 5, dim=8))
    with pytest.raises(MorphomeError, match="more than one fingerprint"):
        store(row("a", path, 5), row("b", path, 5, fingerprint="g"))
    with pytest.raises(MorphomeError, match="twice"):
        store(row("a", path, 5), row("a", path, 5))
    assert store(row("a", path, 5), row("b", path, 0, dim=0, fingerprint="", status="failed")).dim == 4
