"""How fast tiles are read: our readers against OpenSlide and Pillow as most tools use them.

The same tiles are read in the order of a real run, block by block of neighbouring rows in the densest area of the
slide. Every round opens the slide anew for each way, so that no cache carries over; opening is not timed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openslide
from PIL import Image

from morphome.bench.rounds import Rounds, interleaved
from morphome.errors import MorphomeError
from morphome.slides.open import open_slide
from morphome.slides.openslide_reader import OpenSlideReader
from morphome.slides.patches import PatchShape, read_patch, row_blocks
from morphome.slides.reader import SlideReader

PATCH_PX = 256
#: Name and shape; the peer decodes in full for all of them.
ROWS = (
    ("256 px at level 0", PatchShape(256, 256, PATCH_PX)),
    ("256 px from 512 px, area mean", PatchShape(512, 512, PATCH_PX)),
    ("256 px from 508 px (0.252 microns per pixel), area mean", PatchShape(508, 508, PATCH_PX)),
    ("256 px from 512 px, half decode", PatchShape(512, 512, PATCH_PX, half=True)),
)
_PEER = (
    "openslide.read_region with OpenSlide's default cache, convert('RGB'), Pillow's reduce (or resize by the box "
    "filter where it does not divide), numpy"
)


def bench_read(slide: Path, rounds: int = 5, tiles: int = 200, threads: int = 1) -> dict[str, Any]:
    """Measure tiles per second and core.

    Args:
        slide: any slide that OpenSlide opens; a 40x SVS is what the rows mean.
        rounds: interleaved rounds; medians are reported.
        tiles: most tiles per row of the result.
        threads: worker threads, each with its own reader; more than one shows scaling, CPU time stays per tile.

    Returns:
        JSON-able: ``slide``, ``reader``, ``reason``, ``peer`` (in words), ``rounds``, ``threads`` and ``rows``. A
        row holds ``name``, ``n_tiles``, tiles per CPU second ``ours``, ``peer`` and ``our_openslide``, ``ratio``
        (median CPU time of the peer over ours), ``ratio_of_rounds`` (smallest and largest round), tiles per elapsed
        second ``ours_wall`` and ``peer_wall``, and ``max_difference`` in grey levels between ours and the peer (0
        for the exact rows) with ``psnr_db`` where it is not 0. A row that the slide's reader cannot do has None and
        a ``reason``.

    Raises:
        SlideError: the slide cannot be opened or read.
        MorphomeError: the slide is smaller than one tile.
    """
    slide = Path(slide)
    with open_slide(slide) as reader:
        choice, facts = reader.choice, reader.facts
        rows = [_row(reader, name, shape, rounds, tiles, threads) for name, shape in ROWS]
    return {
        "slide": slide.name,
        "width_px": facts.width_px,
        "height_px": facts.height_px,
        "reader": choice.name,
        "reason": choice.reason,
        "peer": _PEER,
        "rounds": rounds,
        "threads": threads,
        "rows": rows,
    }


def dense_area(reader: SlideReader, side_px: int, tiles: int) -> np.ndarray:
    """Tiles of the most textured square area of a slide, int (N, 2) level-0 x, y in row-major order.

    Raises:
        MorphomeError: the slide is smaller than one tile.
    """
    facts = reader.facts
    columns, rows = facts.width_px // side_px, facts.height_px // side_px
    if not columns or not rows:
        raise MorphomeError(
            f"{facts.path}: {facts.width_px} x {facts.height_px} px is smaller than a tile of {side_px} px",
            "measure with a larger slide",
        )
    across = min(columns, math.isqrt(tiles))
    down = min(rows, max(1, tiles // across))
    across = min(columns, tiles // down)
    # Four samples per tile: tissue is where neighbouring samples differ or are not white.
    small = reader.overview(columns * 2, rows * 2).astype(float)
    tissue = (255 - small.min(axis=2)).reshape(rows, 2, columns, 2).mean(axis=(1, 3))
    sums = np.pad(tissue.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    area = sums[down:, across:] - sums[:-down, across:] - sums[down:, :-across] + sums[:-down, :-across]
    top, left = np.unravel_index(int(area.argmax()), area.shape)
    y, x = np.mgrid[top : top + down, left : left + across]
    return np.stack([x.ravel(), y.ravel()], axis=1) * side_px


def _row(reader: SlideReader, name: str, shape: PatchShape, rounds: int, tiles: int, threads: int) -> dict[str, Any]:
    result: dict[str, Any] = {"name": name, "resize": shape.name}
    if shape.half and not getattr(reader, "can_halve", False):
        empty = ("n_tiles", "ours", "peer", "our_openslide", "ratio", "max_difference")
        return {**result, **dict.fromkeys(empty), "reason": f"the reader {reader.choice.name} has no half decode"}
    coords = dense_area(reader, shape.side_x_px, tiles)
    path = reader.facts.path
    exact = PatchShape(shape.side_x_px, shape.side_y_px, shape.patch_px)
    ours = _Way(reader.another, lambda r, x, y: read_patch(r, x, y, shape), coords, threads)
    peer = _Way(lambda: openslide.OpenSlide(path), lambda s, x, y: _peer_patch(s, x, y, shape), coords, threads)
    plain = _Way(lambda: OpenSlideReader(path), lambda r, x, y: read_patch(r, x, y, exact), coords, threads)
    ways = {"ours": ours, "peer": peer, "our_openslide": plain}
    difference = _difference(ours, peer)
    measured = interleaved(rounds, ways)
    return {**result, **_speeds(measured, len(coords)), **difference}


def _speeds(measured: Rounds, n: int) -> dict[str, Any]:
    pairs = zip(measured.seconds["peer"], measured.seconds["ours"], strict=True)
    ratios = [peer / ours for peer, ours in pairs if ours > 0]
    return {
        "n_tiles": n,
        **{name: n / measured.median(name) for name in ("ours", "peer", "our_openslide")},
        "ratio": measured.ratio(),
        "ratio_of_rounds": [min(ratios), max(ratios)] if ratios else None,
        "ratio_to_our_openslide": statistics.median(measured.seconds["our_openslide"]) / measured.median("ours"),
        "ours_wall": n / measured.median_wall("ours"),
        "peer_wall": n / measured.median_wall("peer"),
    }


def _difference(ours: _Way, peer: _Way) -> dict[str, Any]:
    """Largest difference of any tile, and the PSNR where there is one."""
    largest, squares, n = 0, 0.0, 0
    for a, b in zip(ours.tiles(), peer.tiles(), strict=True):
        difference = a.astype(np.int32) - b
        largest = max(largest, int(np.abs(difference).max()))
        squares += float((difference**2).sum())
        n += difference.size
    return {
        "max_difference": largest,
        "psnr_db": 10 * math.log10(255**2 * n / squares) if squares else None,
    }


class _Way:
    """One way to read the tiles: how to open, how to read one tile, and which tiles."""

    def __init__(
        self, open_one: Callable[[], Any], read: Callable[[Any, int, int], np.ndarray], coords: np.ndarray, threads: int
    ) -> None:
        self._open, self._read, self._threads = open_one, read, threads
        self._parts = [coords[block].tolist() for block in row_blocks(coords)]

    def tiles(self) -> list[np.ndarray]:
        """All tiles in order, read by one thread."""
        with self._open() as slide:
            return [self._read(slide, x, y) for part in self._parts for x, y in part]

    def __call__(self) -> None:
        """Read all tiles and forget them."""
        if self._threads == 1:
            self._work(self._parts)
            return
        with ThreadPoolExecutor(self._threads) as pool:
            shares = [self._parts[i :: self._threads] for i in range(self._threads)]
            list(pool.map(self._work, shares))

    def _work(self, parts: list[list[list[int]]]) -> None:
        with self._open() as slide:
            for part in parts:
                for x, y in part:
                    self._read(slide, x, y)


def _peer_patch(slide: openslide.OpenSlide, x: int, y: int, shape: PatchShape) -> np.ndarray:
    """The usual way: read the region, drop alpha, resize by an area mean, hand over an array."""
    image: Image.Image = slide.read_region((x, y), 0, (shape.side_x_px, shape.side_y_px)).convert("RGB")
    if shape.side_x_px % shape.patch_px:
        image = image.resize((shape.patch_px, shape.patch_px), Image.Resampling.BOX)
    elif shape.side_x_px > shape.patch_px:
        image = image.reduce(shape.side_x_px // shape.patch_px)
    return np.asarray(image)
