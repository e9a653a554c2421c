"""Sharpness of tiles."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage

from morphome.slides.quality import laplacian_variance, sharpness


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
