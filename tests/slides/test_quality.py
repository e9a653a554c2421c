"""Sharpness of tiles; folds and blood on painted overviews."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage

from morphome.slides.artefacts import find_blood, find_folds
from morphome.slides.quality import laplacian_variance, sharpness
from morphome.slides.tissue import find_tissue

SETTINGS = {"min_fragment_mm2": 0.05, "max_hole_mm2": 0.02}


def test_variance_of_the_laplacian_as_scipy_computes_it():
    grey = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)
    expected = ndimage.laplace(grey.astype(float))[1:-1, 1:-1].var()
    assert laplacian_variance(grey) == pytest.approx(expected, rel=1e-12)


def test_blur_lowers_sharpness(painted):
    tile = painted[300:428, 400:528]
    blurred = np.asarray(Image.fromarray(tile).filter(ImageFilter.GaussianBlur(2)))
    assert sharpness(blurred) < 0.2 * sharpness(tile)
    assert sharpness(np.full((32, 32, 3), 200, np.uint8)) == 0
    assert sharpness(np.zeros((2, 2, 3), np.uint8)) == 0


def painting(synthetic, seed, glass=(243, 242, 244), *, fold=False, blood=False, fade=1.0, **stain):
    """Two pieces of tissue; folds and blood where asked, and what is found of them."""
    painter = synthetic.Painter(seed, glass)
    painter.tissue(painter.blob(120, 150, 85, 105), **stain)
    painter.tissue(painter.blob(290, 110, 50, 60), **stain)
    if fold:
        painter.fold(painter.line([(60, 80), (170, 200)], 90))
    if blood:
        painter.bleed(painter.blob(290, 100, 18, 22))
    painter.fade(fade)
    overview = painter.finish()
    found = find_tissue(overview.rgb, 8.0, 8.0, SETTINGS)
    return overview, find_folds(found.overview, found.mask), find_blood(found.overview, found.mask)


@pytest.mark.parametrize(
    ("stain", "least"),
    [({"h": 0.3, "e": 0.25}, 0.6), ({"h": 0.6, "e": 0.5}, 0.4), ({"h": 0.3, "e": 0.25, "fade": 0.9}, 0.5)],
)
def test_a_fold_is_found_on_slides_of_any_strength(synthetic, stain, least):
    """A dark section is not all fold: the limit is twice this slide's own tissue, not a colour."""
    overview, folds, _ = painting(synthetic, 13, fold=True, **stain)
    assert folds[overview.fold].mean() > least
    assert folds[overview.tissue & ~overview.fold].mean() < 0.03


@pytest.mark.parametrize("stain", [{}, {"h": 0.6, "e": 0.5}, {"fade": 0.25, "glass": (240, 236, 222)}])
def test_whole_tissue_has_neither_folds_nor_blood(synthetic, stain):
    overview, folds, blood = painting(synthetic, 21, **stain)
    assert folds[overview.tissue].mean() < 0.02
    assert blood.sum() == 0


@pytest.mark.parametrize("glass", [(243, 242, 244), (238, 228, 200)])
def test_blood_is_found_and_is_no_fold(synthetic, glass):
    overview, folds, blood = painting(synthetic, 22, glass, blood=True)
    assert synthetic.iou(blood, overview.blood) > 0.75
    assert not (folds & overview.blood).any()


def test_without_tissue_there_is_nothing_to_find(synthetic):
    rgb = np.full((60, 80, 3), 240, np.uint8)
    found = find_tissue(rgb, 8.0, 8.0, SETTINGS)
    assert find_folds(found.overview, found.mask).sum() == find_blood(found.overview, found.mask).sum() == 0
