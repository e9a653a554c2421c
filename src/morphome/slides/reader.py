"""What every reader of whole-slide files gives, and the error that all of them raise.

A reader gives facts (size, levels, properties), level-0 regions as RGB and area-averaged overviews. Everything that
a file can do wrong becomes a :class:`SlideError` with a short reason code, so that one bad slide is listed and never
ends a run. :func:`morphome.slides.open.open_slide` chooses the reader of a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from morphome.errors import MorphomeError

#: No slide is larger: 2^21 px are half a metre at 0.25 microns per pixel, and 2^38 px a square of 524,288.
MAX_SIDE_PX, MAX_AREA_PX = 1 << 21, 1 << 38
#: Native tiles of OpenSlide take 4 bytes a pixel; 2^27 px are 512 MiB.
MAX_TILE_PX = 1 << 27


class SlideError(MorphomeError):
    """A slide that cannot be used. ``code`` is short and stable, the message names the file and the remedy."""

    def __init__(self, code: str, problem: str, remedy: str = "") -> None:
        self.code = code
        super().__init__(problem, remedy)


@dataclass(frozen=True)
class SlideFacts:
    """What a file says about itself before any pixel is read.

    Attributes:
        path: the file that was opened (one file of the folder for DICOM).
        vendor: OpenSlide's name of the format.
        width_px, height_px: level 0.
        level_sizes: (width, height) per level, level 0 first.
        level_downsamples: real factors per level; 2.001 is not 2.
        bounds: x, y, width, height in level-0 px of the scanned area; the whole slide where the file gives none.
        properties: all text properties of the file.
    """

    path: Path
    vendor: str
    width_px: int
    height_px: int
    level_sizes: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    bounds: tuple[int, int, int, int]
    properties: dict[str, str]


def check_size(facts: SlideFacts) -> None:
    """Refuse sizes that only a forged or damaged header claims, before anything of that size is allocated.

    OpenSlide allocates a whole native tile at once and ends the process when it cannot.

    Raises:
        SlideError: ``implausible_size``.
    """
    sizes = {"": (facts.width_px, facts.height_px)}
    too_large = max(sizes[""]) > MAX_SIDE_PX or facts.width_px * facts.height_px > MAX_AREA_PX
    for level in range(len(facts.level_sizes)):
        try:
            tile = tuple(int(facts.properties[f"openslide.level[{level}].tile-{n}"]) for n in ("width", "height"))
        except (KeyError, ValueError):
            continue
        if tile[0] * tile[1] > MAX_TILE_PX:
            too_large, sizes = True, {f"native tiles of level {level}: ": tile}
    if too_large:
        (what, (width, height)), *_ = sizes.items()
        raise SlideError(
            "implausible_size",
            f"{facts.path}: {what}{width} x {height} px is no size that a scanner writes",
            "fetch the file again and compare its md5, or take the slide out of the sheet",
        )


@dataclass(frozen=True)
class ReaderChoice:
    """Which reader a slide got and why.

    Attributes:
        name: ``openslide``, ``tiled_jpeg`` or ``vips``.
        reason: why not the direct decoder; empty where it is the one.
        n_probed: regions read both ways before the choice.
        max_difference: largest absolute difference of these regions in grey levels; None where nothing was probed.
    """

    name: str
    reason: str = ""
    n_probed: int = 0
    max_difference: int | None = None


class SlideReader(Protocol):
    """What the tile and encode steps need of a slide. A reader is used by one thread at a time."""

    facts: SlideFacts
    choice: ReaderChoice

    def read_level0(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Region of level 0 as uint8 (height, width, 3); raises :class:`SlideError` when it cannot be read."""

    def overview(self, width: int, height: int) -> np.ndarray:
        """The whole slide area-averaged to uint8 (height, width, 3)."""

    def another(self) -> Self:
        """A second reader of the same file and kind for another thread, without choosing anew."""

    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> Self:
        """The reader itself."""

    def __exit__(self, *_: object) -> None:
        """Close it."""
