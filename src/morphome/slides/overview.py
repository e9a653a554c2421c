"""The whole slide, area-averaged, from blocks of one level: memory stays bounded whatever the level's size."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from morphome.slides.reader import SlideFacts

#: Longest side of a block that is read, in pixels of the level.
BLOCK_PX = 2048
#: A level this much coarser than asked still serves an overview: 16 for 15.9 saves reading the level of 4.
TOLERANCE = 1.05


def level_for(facts: SlideFacts, width: int, height: int) -> int:
    """Number of the coarsest level that is at least about as fine as an overview of ``width`` x ``height``."""
    factor = min(facts.width_px / width, facts.height_px / height)
    downs = facts.level_downsamples
    fine = [i for i, down in enumerate(downs) if down <= factor * TOLERANCE and min(facts.level_sizes[i])]
    return max(fine, key=lambda i: downs[i], default=0)


def area_mean(
    read: Callable[[int, int, int, int], Image.Image],
    level_w: float,
    level_h: float,
    width: int,
    height: int,
    block_px: int = BLOCK_PX,
) -> np.ndarray:
    """Area-average a level to uint8 (height, width, 3), block by block.

    Args:
        read: gives x, y, width, height of the level, in its pixels, as an RGB (or RGBX) image.
        level_w, level_h: size of the level; a fraction where its last pixels lie partly outside the slide.
    """
    scale_x, scale_y = level_w / width, level_h / height
    step_x, step_y = max(1, int(block_px / scale_x)), max(1, int(block_px / scale_y))
    out = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, step_y):
        bottom = min(top + step_y, height)
        y0, y1 = math.floor(top * scale_y), min(math.ceil(level_h), math.ceil(bottom * scale_y))
        for left in range(0, width, step_x):
            right = min(left + step_x, width)
            x0, x1 = math.floor(left * scale_x), min(math.ceil(level_w), math.ceil(right * scale_x))
            block = read(x0, y0, x1 - x0, y1 - y0)
            box = (left * scale_x - x0, top * scale_y - y0, right * scale_x - x0, bottom * scale_y - y0)
            box = (box[0], box[1], min(box[2], block.width), min(box[3], block.height))
            small = block.resize((right - left, bottom - top), Image.Resampling.BOX, box)
            out[top:bottom, left:right] = np.asarray(small)[..., :3]
    return out
