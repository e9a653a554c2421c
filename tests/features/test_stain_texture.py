"""The encoder without weights: its measures against scikit-image, and against what a reader would expect."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter
from skimage.color import hed_from_rgb, rgb2hed
from skimage.feature import graycomatrix, graycoprops
from skimage.filters import threshold_otsu

from morphome.features import stain_texture as st
from morphome.features.dimensions import DIMENSIONS
from morphome.features.registry import ENCODERS

ENCODER = st.StainTexture(ENCODERS["stain_texture"])
INDEX = {d.name: i for i, d in enumerate(DIMENSIONS)}


def raw(tile):
    return dict(zip(INDEX, st.raw_values(tile), strict=True))


@pytest.fixture(scope="module")
def tile(painted):
    return np.ascontiguousarray(painted[250:506, 350:606])


def test_there_are_64_named_dimensions_with_units():
    assert len(DIMENSIONS) == len(INDEX) == 64
    assert all(d.unit and d.meaning and d.scale > 0 for d in DIMENSIONS)


def test_stains_as_scikit_image_separates_them(painted):
    rgb = painted[::4, ::4]
    np.testing.assert_allclose(np.linalg.inv(st.STAINS), hed_from_rgb, rtol=1e-12)
    # scikit-image divides by the logarithm of 1e-6 and does not add one grey level.
    expected = np.clip(rgb2hed(rgb) * 6, 0, None)
    for i, code in enumerate(st.stain_codes(rgb)):
        amount = (code / 255.0) ** 2 * st.CODE_MAX[i]
        assert np.abs(amount - expected[..., i]).max() < 0.02


def test_cooccurrence_as_scikit_image_computes_it():
    code = np.random.default_rng(0).integers(0, 256, (60, 70), dtype=np.uint8)
    values = st._cooccurrence(code, (1, 4))
    # The matrix is summed over directions before it is normalised.
    counts = graycomatrix(code // 16, [1, 4], st._ANGLES, levels=16, symmetric=True).sum(axis=3, keepdims=True)
    pooled = counts / counts.sum(axis=(0, 1), keepdims=True)
    for i in range(2):
        for at, name in ((0, "contrast"), (1, "homogeneity"), (2, "correlation"), (4, "energy")):
            assert values[5 * i + at] == pytest.approx(graycoprops(pooled, name)[i, 0], rel=1e-9), name
        p = pooled[:, :, i, 0]
        assert values[5 * i + 3] == pytest.approx(-(p[p > 0] * np.log2(p[p > 0])).sum(), rel=1e-9)


def test_local_patterns_by_hand():
    luma = np.random.default_rng(1).integers(0, 9, (12, 14), dtype=np.uint8)
    ring = [(-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0)]
    counts = np.zeros(10)
    for y in range(1, 11):
        for x in range(1, 13):
            bits = [int(luma[y + dy, x + dx] >= luma[y, x]) for dy, dx in ring]
            changes = sum(a != b for a, b in zip(bits, bits[1:] + bits[:1], strict=True))
            counts[sum(bits) if changes <= 2 else 9] += 1
    np.testing.assert_allclose(st._local_patterns(luma), counts / 120)


def test_otsu_as_scikit_image_computes_it(tile):
    code = st.stain_codes(tile)[0]
    assert abs(st._otsu(np.bincount(code.ravel(), minlength=256)) - threshold_otsu(code)) <= 1


def test_nuclei_are_counted_and_measured():
    """Ten nuclei of 10 x 10 px of the work image on stroma."""
    rgb = np.full((256, 256, 3), (228, 158, 190), np.uint8)
    for i in range(10):
        x, y = 20 + 44 * (i % 5), 60 + 100 * (i // 5)
        rgb[y : y + 20, x : x + 20] = (92, 62, 138)
    found = raw(rgb)
    assert found["nuclei_density"] == pytest.approx(1000 * 10 / 128**2)
    assert found["nuclei_share"] == pytest.approx(1000 / 128**2, rel=0.25)
    assert np.exp(found["nuclei_log_area"]) == pytest.approx(100, rel=0.25)
    assert found["nuclei_log_area_sd"] == pytest.approx(0, abs=1e-9)
    assert found["nuclei_elongation"] == pytest.approx(0, abs=1e-6)
    assert found["nuclei_gap"] == pytest.approx(22)
    assert found["nuclei_gap_cv"] == pytest.approx(0, abs=1e-9)
    assert found["nuclei_largest"] == pytest.approx(0.1)
    assert found["nuclei_contrast"] > 0.2


def test_larger_nuclei_and_long_nuclei_are_seen(synthetic):
    small, large = (synthetic.paint(seed=3, scale=s)[250:506, 350:606] for s in (0.8, 1.6))
    assert raw(large)["nuclei_log_area"] > raw(small)["nuclei_log_area"] + 0.5
    assert raw(large)["nuclei_share"] > 2 * raw(small)["nuclei_share"]
    stretched = np.asarray(Image.fromarray(small).resize((768, 256)))[:, 256:512]
    assert raw(stretched)["nuclei_elongation"] > raw(small)["nuclei_elongation"] + 0.1


def test_blur_and_fibres_are_seen(tile):
    blurred = np.asarray(Image.fromarray(tile).filter(ImageFilter.GaussianBlur(4)))
    assert raw(blurred)["detail"] < raw(tile)["detail"] - 0.5
    assert raw(blurred)["h_glcm1_homogeneity"] > raw(tile)["h_glcm1_homogeneity"]
    wave = (127 + 60 * np.sin(np.arange(256) / 5))[None, :, None]
    stripes = np.broadcast_to(wave, (256, 256, 3)).astype(np.uint8)
    assert raw(stripes)["fibre_global"] > 0.95
    assert raw(tile)["fibre_global"] < 0.3


@pytest.mark.parametrize("value", [0, 127, 255])
def test_even_tiles_give_finite_vectors(value):
    vector = ENCODER.encode(np.full((1, 256, 256, 3), value, np.uint8))
    assert np.isfinite(vector).all()
    assert np.abs(vector).max() <= st.CLIP


@pytest.mark.parametrize("side", [16, 64, 100, 224, 256, 512, 1024])
def test_tiles_of_any_size(side):
    noise = np.random.default_rng(side).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    vector = ENCODER.encode(noise)
    assert vector.shape == (1, 64)
    assert np.isfinite(vector).all()


def test_stained_tiles_lie_in_the_middle_of_the_range(painted):
    tiles = np.stack([painted[y : y + 128, x : x + 128] for y in (200, 330, 460) for x in (250, 400, 550)])
    vectors = ENCODER.encode(tiles)
    assert np.median(np.abs(vectors)) < 2
    assert (np.abs(vectors) < st.CLIP).mean() > 0.97


def test_the_vector_of_a_stored_tile_does_not_change(synthetic):
    """Golden values of version 1; float32, to the last digit that float16 keeps."""
    y, x = np.mgrid[:64, :64]
    tile = np.stack([(x * 3 + y) % 200 + 40, (x * y) % 180 + 30, (x + 2 * y) % 150 + 90], axis=-1).astype(np.uint8)
    vector = ENCODER.encode(tile[None])[0]
    np.testing.assert_allclose(vector[::6], GOLDEN, atol=2e-3)


GOLDEN = [1.3061, 4.1296, 1.8657, 0.5745, -0.3186, 8.0, -0.0229, -2.58, 6.5119, 5.0577, 2.212]


def test_what_is_no_tile_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        ENCODER.encode(np.zeros((1, 8, 8, 3), np.float32))
