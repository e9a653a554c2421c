"""Geometry from microns per pixel to tiles: properties that must hold for every slide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphome.slides.grid import area_share, mpp_effective, round_half_up, side_px, tile_grid

sizes = st.integers(1, 700)
sides = st.integers(1, 200)


@given(width=sizes, height=sizes, side_x=sides, side_y=sides, overlap=st.floats(0, 0.95))
def test_tiles_are_inside_unique_and_row_major(width, height, side_x, side_y, overlap):
    coords = tile_grid(width, height, side_x, side_y, overlap=overlap)
    assert coords.dtype == np.int32
    assert (coords >= 0).all()
    assert (coords + np.array([side_x, side_y]) <= [width, height]).all()
    keys = coords[:, 1].astype(np.int64) * 10_000 + coords[:, 0]
    assert (np.diff(keys) > 0).all()


@given(width=sizes, height=sizes, side_x=sides, side_y=sides)
def test_without_overlap_tiles_are_all_that_fit(width, height, side_x, side_y):
    coords = tile_grid(width, height, side_x, side_y)
    assert len(coords) == (width // side_x) * (height // side_y)
    assert (coords % [side_x, side_y] == 0).all()


@given(
    bounds=st.tuples(st.integers(0, 300), st.integers(0, 300), st.integers(1, 400), st.integers(1, 400)),
    side=st.integers(15, 90),
)
def test_bounds_leave_out_tiles_but_do_not_move_the_grid(bounds, side):
    everything = {tuple(c) for c in tile_grid(500, 450, side, side).tolist()}
    inside = {tuple(c) for c in tile_grid(500, 450, side, side, bounds=bounds).tolist()}
    x, y, w, h = bounds
    expected = {(a, b) for a, b in everything if a >= x and b >= y and a + side <= x + w and b + side <= y + h}
    assert inside == expected


def test_overlap_shortens_the_stride():
    assert np.unique(tile_grid(400, 100, 100, 100, overlap=0.25)[:, 0]).tolist() == [0, 75, 150, 225, 300]


@pytest.mark.parametrize(("side", "overlap"), [(0, 0.0), (10, 1.0), (10, -0.1)])
def test_impossible_grids_are_refused(side, overlap):
    with pytest.raises(ValueError, match="overlap"):
        tile_grid(100, 100, side, side, overlap=overlap)


@given(mpp=st.floats(0.1, 1.2), patch=st.integers(16, 1024), target=st.floats(0.1, 4.0))
def test_the_side_is_the_nearest_whole_number_of_pixels(mpp, patch, target):
    side = side_px(patch, target, mpp)
    assert side >= 1
    exact = patch * target / mpp
    assert abs(side - exact) <= 0.5 + 1e-9 or side == 1
    assert mpp_effective(side, mpp, patch) == pytest.approx(side * mpp / patch)


@pytest.mark.parametrize(("mpp", "side"), [(0.5014, 223), (0.16437, 681), (0.252, 444)])
def test_sides_on_tcga_slides(mpp, side):
    """224 px at 0.5 microns per pixel on the finest and coarsest of 2,460 public slides."""
    assert side_px(224, 0.5, mpp) == side
    assert abs(mpp_effective(side, mpp, 224) / 0.5 - 1) <= 0.0022


def test_halves_round_up():
    assert [round_half_up(v) for v in (0.5, 1.5, 2.5, 2.49)] == [1, 2, 3, 2]


@given(seed=st.integers(0, 10_000), factor=st.integers(1, 6), side=st.integers(1, 23))
def test_area_share_is_the_mean_of_the_enlarged_mask(seed, factor, side):
    rng = np.random.default_rng(seed)
    mask = rng.random((9, 11)) < 0.5
    large = np.kron(mask, np.ones((factor, factor)))
    height, width = large.shape
    coords = tile_grid(width, height, side, side)
    expected = [large[y : y + side, x : x + side].mean() for x, y in coords]
    np.testing.assert_allclose(area_share(mask, coords, side, side, width, height), expected, atol=1e-6)


def test_area_share_counts_parts_of_mask_pixels():
    mask = np.array([[True, False]])
    share = area_share(mask, np.array([[4, 0]]), 4, 10, 12, 10)  # mask pixels are 6 px wide
    assert share[0] == pytest.approx(0.5)
    assert area_share(mask, np.zeros((0, 2), int), 4, 4, 12, 10).shape == (0,)
