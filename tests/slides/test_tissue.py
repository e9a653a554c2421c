"""Tissue, ink and what is no brightfield slide, on painted overviews."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from morphome.slides.reader import SlideError
from morphome.slides.tissue import (
    SATURATION_CEILING,
    SATURATION_FLOOR,
    check_brightfield,
    count_holes,
    divide_glass,
    drop_fragments,
    drop_lines,
    find_tissue,
    glass_colour,
    saturation_threshold,
    small_holes,
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


def test_holes_at_the_border_are_none_and_diagonals_join():
    mask = np.ones((6, 6), bool)
    mask[0, 0] = mask[3, 3] = False
    labels, small = small_holes(mask, 4)
    assert small[labels[3, 3]]
    assert not small[labels[0, 0]]
    assert count_holes(mask) == 1
    two = np.zeros((6, 6), bool)
    two[1, 1] = two[2, 2] = two[5, 5] = True
    kept, n = drop_fragments(two, 2)
    assert (n, int(kept.sum())) == (1, 2)


def test_pieces_near_one_another_are_one_fragment():
    mask = np.zeros((40, 60), bool)
    mask[5:10, 5:55:4] = True  # 13 bars of 5 px, 3 px of glass between them
    mask[30:35, 30:33] = True
    kept, n = drop_fragments(mask, 40, join=(5, 5))
    assert n == 1
    assert kept[5:10].sum() == 65
    assert not kept[30:].any()
    assert drop_fragments(mask, 40)[1] == 0


def test_long_thin_straight_pieces_are_no_tissue():
    mask = np.zeros((400, 400), bool)
    for row in range(400):
        mask[row, 380 + row // 100 : 383 + row // 100] = True  # edge of a cover slip, a little tilted
    mask[20:380, 100:160] = True  # a needle biopsy of 0.5 mm
    mask[200:202, 10:60] = True  # a short strip
    kept = drop_lines(mask, 8.0, 8.0)
    assert not kept[:, 370:].any()
    np.testing.assert_array_equal(kept[:, :370], mask[:, :370])


def test_the_hash_tells_masks_apart():
    image = canvas()
    disc(image, 150, 100, 60, PINK)
    first, again = find(image), find(image)
    disc(image, 150, 100, 61, PINK)
    assert first.sha256 == again.sha256
    assert first.sha256 != find(image).sha256


@pytest.mark.parametrize("cast", [(240, 224, 190), (214, 230, 244), (222, 236, 220), (200, 203, 202)])
def test_the_cast_of_the_glass_is_no_stain(cast):
    image = canvas(colour=cast)
    inside = disc(image, 150, 100, 60, np.array(PALE) * np.array(cast) / 243)
    assert glass_colour(image) == pytest.approx(cast, abs=2)
    found = find(image)
    assert found.mask[inside].mean() > 0.98
    assert found.mask[~inside].mean() < 0.01


def test_pale_tissue_that_covers_the_picture_is_not_taken_for_glass():
    image = canvas(colour=PALE)
    assert glass_colour(image) == (255, 255, 255)
    assert divide_glass(image, (255.0, 255.0, 255.0)) is image
    assert find(image).mask.all()


def test_what_was_not_scanned_is_not_the_glass():
    image = canvas(colour=(236, 224, 196))
    image[:, :150] = 255
    assert glass_colour(image) == pytest.approx((236, 224, 196), abs=2)


# --- Painted slides with known truth ---


@pytest.fixture(scope="module")
def painted_case(synthetic):
    """A painted overview and its tissue, by name; each is painted once."""

    @functools.cache
    def make(name):
        overview = CASES[name](synthetic)
        return overview, find_tissue(overview.rgb, 8.0, 8.0, SETTINGS)

    return make


def two_pieces(painter, fade=1.0, **stain):
    painter.tissue(painter.blob(120, 150, 85, 105), **stain)
    painter.tissue(painter.blob(290, 110, 50, 60), **stain)
    painter.fade(fade)
    return painter


@functools.cache
def under_ink(synthetic):
    return two_pieces(synthetic.Painter(8))


def inked(synthetic, colour, fade=1.0):
    painter = under_ink(synthetic).copy()
    painter.fade(fade)
    painter.pen(painter.line([(30, 40), (210, 60), (215, 250), (60, 280)], 180), colour)
    painter.pen(painter.line([(250, 210), (380, 215)], 240), colour)
    return painter.finish()


def dirty(synthetic, tissue):
    painter = synthetic.Painter(10, (236, 238, 234))
    if tissue:
        two_pieces(painter, 0.6)
    painter.dust()
    painter.cover_slip()
    return painter.finish()


def contrasts(synthetic):
    painter = synthetic.Painter(5)
    painter.tissue(painter.blob(120, 150, 85, 105))
    painter.tissue(painter.blob(290, 110, 50, 60), h=0.05, e=0.05)
    painter.tissue(painter.blob(280, 230, 40, 30), h=0.7, e=0.25)
    return painter.finish()


def fatty(synthetic):
    painter = synthetic.Painter(6)
    painter.tissue(painter.blob(70, 90, 55, 60))
    painter.adipose(painter.blob(170, 160, 95, 110))
    painter.adipose(painter.blob(330, 120, 50, 80), e=0.16)
    return painter.finish()


def fat_alone(synthetic):
    painter = synthetic.Painter(7, (240, 238, 230))
    painter.adipose(painter.blob(190, 150, 150, 110), cell_um=90, wall_um=4, e=0.14)
    return painter.finish()


def filled(synthetic):
    painter = synthetic.Painter(19)
    painter.tissue(np.ones(painter.shape, bool))
    painter.fade(0.2)
    return painter.finish()


CASES = {
    "normal": lambda s: two_pieces(s.Painter(1)).finish(),
    "pale": lambda s: two_pieces(s.Painter(2), 0.35).finish(),
    "faded, yellow": lambda s: two_pieces(s.Painter(3, (240, 237, 226)), 0.18).finish(),
    "faded, blue": lambda s: two_pieces(s.Painter(4, (224, 233, 243)), 0.22).finish(),
    "old mount": lambda s: two_pieces(s.Painter(16, (236, 222, 190)), 0.4).finish(),
    "dark stain": lambda s: two_pieces(s.Painter(14), h=0.6, e=0.5).finish(),
    "contrasts": contrasts,
    "dirty": lambda s: dirty(s, tissue=True),
    "filled, faded": filled,
    "dirt alone": lambda s: dirty(s, tissue=False),
    "fatty": fatty,
    "fat alone": fat_alone,
    "blue pen, pale": lambda s: inked(s, "blue", 0.35),
    **{f"{c} pen": functools.partial(inked, colour=c) for c in ("blue", "sky", "green", "lime", "red", "black")},
}


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("dirt alone", "fatty", "fat alone")])
def test_tissue_of_painted_slides(painted_case, synthetic, name):
    overview, found = painted_case(name)
    assert synthetic.iou(found.mask, overview.tissue) > 0.95
    if "pen" not in name:
        assert found.pen_fraction == 0


@pytest.mark.parametrize("name", [n for n in CASES if n.endswith("pen")] + ["blue pen, pale"])
def test_ink_of_painted_slides(painted_case, synthetic, name):
    overview, found = painted_case(name)
    # The finder takes two pixels of margin; transparent ink over tissue has the colour of haematoxylin.
    assert found.pen[overview.ink].mean() > 0.93
    assert synthetic.iou(found.pen, overview.ink) > 0.78
    assert not (found.mask & found.pen).any()


def test_dust_and_a_cover_slip_are_no_tissue(painted_case):
    _, found = painted_case("dirt alone")
    assert (int(found.mask.sum()), found.n_fragments) == (0, 0)


@pytest.mark.parametrize("name", ["fatty", "fat alone"])
def test_fat_has_walls_of_tissue_and_open_lumens(painted_case, name):
    overview, found = painted_case(name)
    walls, lumens = overview.fat & (overview.strands > 0.4), overview.fat & (overview.strands == 0)
    assert found.mask[walls].mean() > 0.93
    assert found.mask[lumens].mean() < 0.3
    assert 0.25 < found.mask[overview.fat].mean() < 0.55
    pieces = {"fatty": [overview.fat[:, :265], overview.fat[:, 265:]], "fat alone": [overview.fat]}[name]
    assert found.n_fragments >= len(pieces)


def test_holes_of_dense_tissue_are_filled_and_lumens_of_fat_are_not(synthetic):
    painter = synthetic.Painter(20)
    dense = painter.blob(100, 150, 80, 110)
    vessel = painter.blob(100, 150, 7, 7)  # 0.0099 mm2
    painter.tissue(dense & ~vessel)
    painter.adipose(painter.blob(300, 150, 80, 110))
    overview = painter.finish()
    found = find_tissue(overview.rgb, 8.0, 8.0, SETTINGS)
    assert found.mask[140:160, 90:110].all()
    assert found.mask[overview.fat].mean() < 0.55
    assert found.n_holes > 50
