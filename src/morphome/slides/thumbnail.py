"""The picture of a slide for the report: overview, tissue outline, tiles kept and left out. Labels are never opened."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
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
#: Colours of tiles that were left out: of Okabe and Ito's set, which colour-blind readers tell apart.
DROPPED = {"pen": (0, 114, 178), "fold": (204, 121, 167), "blood": (213, 94, 0), "blur": (230, 159, 0)}


def draw_thumbnail(
    overview: np.ndarray,
    polygons: Sequence[Geometry],
    coords: np.ndarray,
    side_x_px: int,
    side_y_px: int,
    width_px: int,
    height_px: int,
    dropped: Mapping[str, np.ndarray] | None = None,
) -> Image.Image:
    """Overview with the outline of the tissue, a thin frame around each tile and a tint on tiles left out.

    Args:
        overview: uint8 (h, w, 3) of the whole slide.
        polygons: tissue in level-0 pixels.
        coords: int (N, 2), level-0 x, y of the tiles that were kept.
        width_px, height_px: level 0.
        dropped: coordinates of tiles left out, by reason (keys of :data:`DROPPED`); a legend says how many.
    """
    image = Image.fromarray(overview)
    scale = THUMBNAIL_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    shrinks = scale < 1
    image = image.resize(size, Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC)
    to_x, to_y = size[0] / width_px, size[1] / height_px
    frames = Image.new("RGBA", size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(frames)

    def box(x: int, y: int) -> tuple[float, float, float, float]:
        return x * to_x, y * to_y, (x + side_x_px) * to_x, (y + side_y_px) * to_y

    for reason, places in (dropped or {}).items():
        for x, y in places.tolist():
            pen.rectangle(box(x, y), fill=(*DROPPED[reason], 110), outline=(*DROPPED[reason], 220))
    for x, y in coords.tolist():
        pen.rectangle(box(x, y), outline=(*_TILE, 90))
    for polygon in polygons:
        for ring in (polygon.exterior, *polygon.interiors):
            points = [(x * to_x, y * to_y) for x, y in ring.coords]
            pen.line(points, fill=(*_OUTLINE, 255), width=2, joint="curve")
    image.paste(frames, mask=frames.getchannel("A"))
    _legend(image, {reason: len(places) for reason, places in (dropped or {}).items() if len(places)})
    return image


def _legend(image: Image.Image, counts: Mapping[str, int]) -> None:
    """Swatch, reason and number of tiles in the upper left corner; nothing where no tile was left out."""
    pen = ImageDraw.Draw(image)
    for line, (reason, n) in enumerate(counts.items()):
        top = 4 + 13 * line
        pen.rectangle((4, top, 92, top + 12), fill=(255, 255, 255))
        pen.rectangle((6, top + 2, 14, top + 10), fill=DROPPED[reason])
        pen.text((18, top), f"{reason}: {n}", fill=(40, 40, 40))


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
