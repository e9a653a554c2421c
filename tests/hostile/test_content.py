"""Pictures that are no stained section: one colour, no colour, no light, no opacity. A reason, never a wrong tile."""

from __future__ import annotations

import numpy as np
import pytest

from morphome.slides.open import open_slide

BLACK, WHITE, GREY = (0, 0, 0), (255, 255, 255), (128, 128, 128)


def plain(colour):
    return np.full((384, 512, 3), colour, np.uint8)


def fluorescence():
    """Blue and green nuclei on black."""
    image = plain((4, 4, 6))
    y, x = np.mgrid[:384, :512]
    for number, (cx, cy) in enumerate(np.random.default_rng(1).uniform(0, 380, (60, 2))):
        image[(x - cx) ** 2 + (y - cy) ** 2 < 80] = (10, 20, 220) if number % 2 else (10, 200, 30)
    return image


def phase_contrast():
    return np.random.default_rng(2).normal(128, 20, (384, 512, 1)).clip(0, 255).astype(np.uint8).repeat(3, 2)


def noisy_glass():
    return np.random.default_rng(3).normal(243, 2, (384, 512, 3)).clip(0, 255).astype(np.uint8)


def half_black():
    """A scanner's black frame beside glass."""
    image = plain((243, 242, 244))
    image[:, :300] = 0
    return image


REFUSED = {
    "black": (lambda: plain(BLACK), {"not_brightfield"}),
    "nearly black": (lambda: plain((9, 8, 10)), {"not_brightfield"}),
    "grey": (lambda: plain(GREY), {"not_brightfield"}),
    "dark blue": (lambda: plain((0, 0, 60)), {"not_brightfield"}),
    "white": (lambda: plain(WHITE), {"no_tissue"}),
    "glass": (lambda: plain((243, 242, 244)), {"no_tissue"}),
    "noisy glass": (noisy_glass, {"no_tissue"}),
    "fluorescence": (fluorescence, {"not_brightfield"}),
    "phase contrast": (phase_contrast, {"not_brightfield"}),
    "half black": (half_black, {"not_brightfield", "no_tissue"}),
    "blue ink": (lambda: plain((30, 60, 200)), {"no_tissue", "too_few_tiles"}),
    "green ink": (lambda: plain((30, 180, 60)), {"no_tissue", "too_few_tiles"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_no_tile_and_a_reason(tile, files, tmp_path, name):
    make, codes = REFUSED[name]
    path = files.svs(tmp_path / "picture.svs", make())
    outcome = tile(path)
    assert outcome.result[1] in codes, outcome.attrs["reason"]
    outcome.refused(outcome.result[1], "slide 'S'", str(path))


@pytest.mark.parametrize("name", ["white", "glass", "noisy glass"])
def test_an_empty_bag_where_the_configuration_allows_it(tile, files, tmp_path, name):
    path = files.svs(tmp_path / "picture.svs", REFUSED[name][0]())
    assert tile(path, min_tiles=0).result == ("ok", "")


def test_a_refused_slide_stays_refused_in_the_encode_step(tile, encode, files, tmp_path):
    path = files.svs(tmp_path / "picture.svs", fluorescence())
    reason = tile(path).attrs["reason"]
    outcome = encode(path)
    assert outcome.refused("not_brightfield") == reason
    assert outcome.data["features"].shape == (0, 64)


def test_one_colour_of_tissue_is_finite(tile, encode, files, tmp_path):
    """No texture at all: no division by zero, no NaN in a vector."""
    path = files.svs(tmp_path / "flat.svs", plain(files.TISSUE))
    assert tile(path).record["n_tiles"] == 48
    features = encode(path).data["features"]
    assert len(features) == 48
    assert (features == features[0]).all()


@pytest.mark.parametrize("alpha", ["none", "half", "all", "edges"])
def test_alpha(tile, synthetic, files, tmp_path, alpha):
    """Transparent pixels are white glass, whatever colour lies under them."""
    image = np.dstack([files.board(), np.full((384, 512), 255, np.uint8)])
    if alpha == "all":
        image[..., 3] = 0
    elif alpha == "half":
        image[:, :256, 3] = 0
    elif alpha == "edges":
        image[:, :, 3] = np.random.default_rng(0).integers(0, 2, (384, 512)) * 255
    path = synthetic.write_tiff(tmp_path / "rgba.tif", image)
    with open_slide(path) as slide, open_slide(path, "openslide") as other:
        found = slide.read_level0(0, 0, 512, 384)
        np.testing.assert_array_equal(found, other.read_level0(0, 0, 512, 384))
    assert (found[image[..., 3] == 0] == 255).all()
    np.testing.assert_array_equal(found[image[..., 3] == 255], image[image[..., 3] == 255][:, :3])
    outcome = tile(path)
    if alpha == "all":
        outcome.refused("no_tissue")
    elif alpha == "half":
        assert outcome.data["coords"][:, 0].min() >= 256
    else:
        assert outcome.result == ("ok", "")
