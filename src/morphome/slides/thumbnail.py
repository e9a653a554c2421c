"""The picture of a slide for the report: overview, tissue outline, tile grid. Labels are never opened."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from morphome.files import atomic_path

if TYPE_CHECKING:
    from shapely import Geometry

#: Longest side of the picture.
THUMBNAIL_PX = 512
_OUTLINE, _TILE = (0, 120, 90), (30, 60, 120)


def draw_thumbnail(
    overview: np.ndarray,
    polygons: Sequence[Geometry],
    coords: np.ndarray,
    side_x_px: int,
    side_y_px: int,
    width_px: int,
    height_px: int,
) -> Image.Image:
    """Overview with the outline of the tissue and a thin frame around each tile.

    Args:
        overview: uint8 (h, w, 3) of the whole slide.
        polygons: tissue in level-0 pixels.
        coords: int (N, 2), level-0 x, y of the tiles that were kept.
        width_px, height_px: level 0.
    """
    image = Image.fromarray(overview)
    scale = THUMBNAIL_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    shrinks = scale < 1
    image = image.resize(size, Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC)
    to_x, to_y = size[0] / width_px, size[1] / height_px
    frames = Image.new("RGBA", size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(frames)
    for x, y in coords.tolist():
        pen.rectangle((x * to_x, y * to_y, (x + side_x_px) * to_x, (y + side_y_px) * to_y), outline=(*_TILE, 90))
    for polygon in polygons:
        for ring in (polygon.exterior, *polygon.interiors):
            points = [(x * to_x, y * to_y) for x, y in ring.coords]
            pen.line(points, fill=(*_OUTLINE, 255), width=2, joint="curve")
    image.paste(frames, mask=frames.getchannel("A"))
    return image


def draw_refusal(slide_id: str, reason_code: str, reason: str) -> Image.Image:
    """A grey picture that says why a slide failed."""
    image = Image.new("RGB", (THUMBNAIL_PX, THUMBNAIL_PX // 2), (225, 225, 225))
    lines = [*textwrap.wrap(slide_id, 74), "", f"not used: {reason_code}", "", *textwrap.wrap(reason, 74)]
    printable = "\n".join(lines[:16]).encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(image).multiline_text((16, 14), printable, fill=(60, 60, 60), spacing=3)
    return image


def write_thumbnail(image: Image.Image, path: Path) -> None:
    """Write a JPEG atomically."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="JPEG", quality=88)
