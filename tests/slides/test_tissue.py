"""Tissue, ink and what is no brightfield slide, on painted overviews."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from shapely.geometry import shape

from morphome.slides.reader import SlideError
from morphome.slides.tissue import (
    SATURATION_CEILING,
    SATURATION_FLOOR,
    check_brightfield,
    drop_fragments,
    fill_holes,
    find_tissue,
    outline,
    saturation_threshold,
    to_geojson,
)

GLASS, PINK, PURPLE, PALE = (243, 242, 244), (228, 158, 190), (120, 80, 150), (238, 210, 228)
INK = {
    "blue": (30, 60, 160),
    "green": (22, 118, 66),
    "red": (205, 25, 35),
    "black": (34, 33, 38),
    "cyan": (20, 150, 170),
}
STAINED = {
    "pink": PINK,
    "purple": PURPLE,
    "blood": (190, 60, 80),
    "deep": (70, 40, 110),
    "pale": PALE,
    "grey-blue": (140, 130, 175),
}
SETTINGS = {"min_fragment_mm2": 0.05, "max_hole_mm2": 0.02}


def canvas(height=200, width=300, colour=GLASS, seed=0):
    noise = np.random.default_rng(seed).integers(-2, 3, (height, width, 1))
    return np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)


def disc(image, x, y, radius, colour):
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    inside = (columns - x) ** 2 + (rows - y) ** 2 < radius**2
    image[inside] = colour
    return inside


def find(image, **changes):
    return find_tissue(image, 8.0, 8.0, {**SETTINGS, **changes})


def test_a_disc_of_tissue_has_its_area():
    image = canvas()
    inside = disc(image, 150, 100, 60, PINK)
    found = find(image)
    assert found.n_fragments == 1
    assert found.tissue_mm2 == pytest.approx(inside.sum() * 64e-6, rel=0.02)
    assert found.tissue_fraction == pytest.approx(inside.mean(), rel=0.02)
    assert found.pen_fraction == 0


def test_areas_are_physical_also_when_pixels_are_not_square():
    image = canvas()
    inside = disc(image, 150, 100, 60, PINK)
    found = find_tissue(image, 8.0, 16.0, SETTINGS)
    assert found.tissue_mm2 == pytest.approx(inside.sum() * 128e-6, rel=0.02)


def test_pale_tissue_beside_strong_tissue_is_kept():
    image = canvas()
    image[:, :140] = PURPLE
    image[:, 140:240] = PALE
    found = find(image)
    assert found.mask[:, :238].mean() > 0.99
    assert found.mask[:, 245:].mean() == 0


def test_small_fragments_go_and_small_holes_are_filled():
    image = canvas()
    disc(image, 100, 100, 70, PINK)
    disc(image, 100, 100, 7, GLASS)  # 0.0099 mm2
    disc(image, 60, 100, 20, GLASS)  # 0.08 mm2
    disc(image, 260, 40, 9, PINK)  # 0.016 mm2
    found = find(image)
    assert found.n_fragments == 1
    assert found.mask[100, 100]
    assert not found.mask[100, 60]
    assert not found.mask[40, 260]
    with_all = find(image, min_fragment_mm2=0.0, max_hole_mm2=0.2)
    assert with_all.n_fragments == 2
    assert with_all.mask[100, 60]


@pytest.mark.parametrize("colour", INK)
def test_ink_is_no_tissue(colour):
    image = canvas()
    disc(image, 100, 100, 60, PINK)
    image[20:28, 180:280] = INK[colour]
    image[90:98, 80:130] = INK[colour]
    found = find(image)
    assert found.pen[24, 200:270].all()
    assert found.pen[94, 85:125].all()
    assert not (found.mask & found.pen).any()
    assert not found.mask[24, 200:270].any()


@pytest.mark.parametrize("colour", STAINED)
def test_stained_tissue_is_no_ink(colour):
    image = canvas()
    inside = disc(image, 150, 100, 60, STAINED[colour])
    found = find(image)
    assert found.pen_fraction == 0
    assert found.mask[inside].mean() > 0.98


def test_small_dark_spots_are_no_ink():
    image = canvas()
    disc(image, 150, 100, 60, PINK)
    disc(image, 150, 100, 5, INK["black"])
    assert find(image).pen_fraction == 0


def test_glass_alone_gives_no_tissue():
    found = find(canvas())
    assert not found.mask.any()
    assert (found.n_fragments, found.tissue_mm2) == (0, 0)
    assert outline(found.mask, 3000, 2000) == []


def test_fluorescence_and_unstained_slides_are_refused():
    dark = canvas(colour=(4, 4, 8))
    disc(dark, 100, 100, 60, (20, 40, 230))
    unstained = canvas()
    disc(unstained, 100, 100, 60, (150, 150, 151))
    for image in (dark, unstained):
        with pytest.raises(SlideError) as caught:
            check_brightfield(image)
        assert caught.value.code == "not_brightfield"
    check_brightfield(canvas())


def test_the_threshold_is_held_between_floor_and_ceiling():
    rng = np.random.default_rng(0)
    assert saturation_threshold(rng.uniform(0, 0.02, 1000).astype(np.float32)) == SATURATION_FLOOR
    strong = np.concatenate([np.full(500, 0.3), np.full(500, 0.8)]).astype(np.float32)
    assert saturation_threshold(strong) == SATURATION_CEILING
    between = np.concatenate([rng.normal(0.02, 0.01, 900), rng.normal(0.25, 0.02, 100)]).clip(0, 1)
    assert SATURATION_FLOOR <= saturation_threshold(between.astype(np.float32)) <= SATURATION_CEILING
    assert saturation_threshold(np.zeros(0, np.float32)) == SATURATION_FLOOR


def test_holes_at_the_border_stay_and_diagonals_join():
    mask = np.ones((6, 6), bool)
    mask[0, 0] = mask[3, 3] = False
    filled = fill_holes(mask, 4)
    assert filled[3, 3]
    assert not filled[0, 0]
    two = np.zeros((6, 6), bool)
    two[1, 1] = two[2, 2] = two[5, 5] = True
    kept, n = drop_fragments(two, 2)
    assert (n, int(kept.sum())) == (1, 2)


def test_polygons_follow_the_mask_with_its_holes():
    mask = np.zeros((80, 120), bool)
    y, x = np.mgrid[:80, :120]
    mask[(x - 40) ** 2 + (y - 40) ** 2 < 30**2] = True
    mask[(x - 40) ** 2 + (y - 40) ** 2 < 10**2] = False
    mask[10:30, 90:110] = True
    polygons = outline(mask, 1200, 800)
    assert [len(p.interiors) for p in polygons] == [1, 0]
    assert polygons[0].area > polygons[1].area
    assert all(p.is_valid for p in polygons)
    assert sum(p.area for p in polygons) == pytest.approx(100 * mask.sum(), rel=0.03)
    assert polygons[1].bounds == (900, 100, 1100, 300)
    assert not shapely.contains_xy(polygons[0], 405, 405)


def test_geojson_is_what_qupath_reads():
    mask = np.zeros((20, 20), bool)
    mask[5:15, 4:16] = True
    content = to_geojson(outline(mask, 200, 200))
    assert content["type"] == "FeatureCollection"
    feature = content["features"][0]
    assert feature["type"] == "Feature"
    assert feature["properties"]["objectType"] == "annotation"
    assert feature["properties"]["classification"]["name"] == "Tissue"
    assert shape(feature["geometry"]).area == 12_000


def test_the_hash_tells_masks_apart():
    image = canvas()
    disc(image, 150, 100, 60, PINK)
    first, again = find(image), find(image)
    disc(image, 150, 100, 61, PINK)
    assert first.sha256 == again.sha256
    assert first.sha256 != find(image).sha256
