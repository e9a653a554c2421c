"""The quick box resize gives Pillow's numbers."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from morphome.slides.box import box_resize, can_box, taps


def region(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)


def pillow(pixels, patch_px):
    image = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    return np.asarray(image.resize((patch_px, patch_px), Image.Resampling.BOX))


@pytest.mark.parametrize("side", [(508, 508), (519, 519), (507, 516), (681, 667), (257, 256), (768, 767), (512, 511)])
def test_the_sides_of_real_slides(side):
    pixels = region(*side)
    assert np.array_equal(box_resize(pixels, 256), pillow(pixels, 256))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.integers(20, 60), st.integers(0, 120), st.integers(0, 3), st.booleans(), st.integers(0, 9))
def test_any_size_below_three_times(patch_px, more, unequal, wide, seed):
    side = min(patch_px + more, 3 * patch_px)
    other = max(patch_px, side - min(unequal, side // 21))
    width, height = (side, other) if wide else (other, side)
    assert can_box(width, height, patch_px)
    pixels = region(width, height, seed)
    assert np.array_equal(box_resize(pixels, patch_px), pillow(pixels, patch_px))


def test_every_ratio_of_224_and_256():
    """Rounding of the borders between output pixels is Pillow's, whatever the side."""
    for patch_px in (224, 256):
        for side in range(patch_px, 3 * patch_px + 1):
            line = np.random.default_rng(side).integers(0, 256, (1, side, 3), np.uint8)
            expected = np.asarray(Image.fromarray(line).resize((patch_px, 1), Image.Resampling.BOX))[0]
            first, second, three = taps(side, patch_px)
            values = line[0].astype(int)
            mean = (values[first] + values[second] + 1) >> 1
            mean[three] = np.round(sum(values[first[three] + i] for i in range(3)) / 3)
            assert np.array_equal(mean, expected), side


def test_what_is_left_to_pillow():
    assert not can_box(769, 760, 256)
    assert not can_box(256, 255, 256)
    assert not can_box(400, 500, 256)


def test_threads_have_buffers_of_their_own():
    pixels = [region(61, 61, seed) for seed in range(4)]
    wrong = []

    def work(seed):
        for _ in range(200):
            if not np.array_equal(box_resize(pixels[seed], 30), expected[seed]):
                wrong.append(seed)

    expected = [pillow(p, 30) for p in pixels]
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
