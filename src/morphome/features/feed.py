"""Tiles for the encoder: one bounded pool of reading threads over all slides of a list.

A work item is a block of tiles of one slide. Blocks are handed out in the order of the slides and of their tiles,
whatever the number of threads, and the tiles of the next slide are read while this one is encoded. Only a few blocks
are in memory at a time: memory grows with the number of threads, not with the slide. What is wrong with one slide
fails that slide alone.

Threads are enough: decoding and resizing let go of Python's lock. Each thread has readers of its own, because a
second thread gains nothing on one OpenSlide handle.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from morphome.files import file_sample
from morphome.slides.open import open_slide
from morphome.slides.openslide_reader import OpenSlideReader
from morphome.slides.patches import BLOCK_TILES, Block, PatchShape, read_block, read_patch, row_blocks
from morphome.slides.quality import sharpness
from morphome.slides.reader import ReaderChoice, SlideError, SlideReader


@dataclass(frozen=True)
class SlideWork:
    """The tiles of one slide that are to be read.

    Attributes:
        slide_id: for messages.
        path: the slide file, or the folder of a DICOM series.
        coords: int32 (N, 2) level-0 x, y, row-major, at least one.
        shape: how a tile is read and resized.
        reader: ``slides.reader`` of the configuration.
        head: :func:`morphome.files.file_sample` of the file that was tiled.
    """

    slide_id: str
    path: Path
    coords: np.ndarray
    shape: PatchShape
    reader: str
    head: str


@dataclass(frozen=True)
class FedBlock:
    """A block of tiles in its place.

    Attributes:
        at: rows of the slide's ``coords``.
        block: the tiles that could be read.
        sharpness: float32 (n,) of these tiles.
        seconds: time that a thread spent on reading and measuring.
    """

    at: slice
    block: Block
    sharpness: np.ndarray
    seconds: float


@dataclass
class _Slide:
    """A slide in the pool: its first reader, and those that no thread uses at the moment."""

    work: SlideWork
    blocks: list[slice]
    opened: Future[SlideReader] | None = None
    idle: list[SlideReader] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    dropped: bool = False


class TileFeed:
    """A context manager that reads the tiles of slides ahead of their use; leaving it ends all threads.

    Args:
        works: slides in the order in which they are encoded.
        threads: threads that read, at least 1.
        block_tiles: most tiles of a block.

    Attributes:
        window: most blocks that are being read, or wait behind the one in use.
        seconds_wait: time for which :meth:`blocks` waited for tiles so far.
    """

    def __init__(self, works: Sequence[SlideWork], threads: int = 1, block_tiles: int = BLOCK_TILES) -> None:
        self._slides = [_Slide(work, row_blocks(work.coords, block_tiles)) for work in works]
        self.window = 2 * threads + 2
        self.seconds_wait = 0.0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="morphome-tiles")
        self._plan = self._in_order()
        self._ahead: deque[tuple[_Slide, Future[FedBlock]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Also after Ctrl-C: a block that is being read is waited for, the others are never begun.
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        for slide in self._slides:
            _close(slide)

    def blocks(self, number: int) -> Iterator[FedBlock]:
        """The blocks of slide ``number`` of the list in the order of its tiles; slides are asked for in order.

        Raises:
            SlideError: the slide cannot be opened, is not the file that was tiled (``slide_changed``), or was
                removed or replaced while it was read.
        """
        slide = self._slides[number]
        try:
            for _ in slide.blocks:
                self._fill()
                if self._ahead[0][0] is not slide:
                    raise RuntimeError(f"slide {number} is not next in the feed")
                future = self._ahead.popleft()[1]
                self._fill()
                started = time.perf_counter()
                try:
                    fed = future.result()
                finally:
                    self.seconds_wait += time.perf_counter() - started
                yield fed
            _same_file(slide.work, slide.opened.result().facts.path, "was removed or replaced while it was read")
        finally:
            self._drop(slide)

    def choice(self, number: int) -> ReaderChoice | None:
        """Which reader slide ``number`` got; None before it was opened, or where it could not be."""
        opened = self._slides[number].opened
        if opened is None or not opened.done() or opened.cancelled() or opened.exception() is not None:
            return None
        return opened.result().choice

    def _in_order(self) -> Iterator[tuple[_Slide, slice]]:
        """Every block of every slide; a slide is opened one slide ahead, while the blocks before it are read."""
        for number, slide in enumerate(self._slides):
            for count, at in enumerate(slide.blocks):
                if slide.dropped:
                    break
                yield slide, at
                if count == 0 and number + 1 < len(self._slides):
                    self._begin_open(self._slides[number + 1])

    def _begin_open(self, slide: _Slide) -> None:
        if slide.opened is None:
            slide.opened = self._pool.submit(_open, slide)

    def _fill(self) -> None:
        while len(self._ahead) < self.window and (item := next(self._plan, None)):
            slide, at = item
            # Threads take items in the order given: whoever waits for a slide to be opened waits for a running item.
            self._begin_open(slide)
            self._ahead.append((slide, self._pool.submit(_read, slide, at)))

    def _drop(self, slide: _Slide) -> None:
        """Let go of a slide: nothing of it is left in the queue, and its readers are closed."""
        slide.dropped = True
        left = []
        while self._ahead and self._ahead[0][0] is slide:
            left.append(self._ahead.popleft()[1])
        wait([future for future in left if not future.cancel()])
        _close(slide)


def _open(slide: _Slide) -> SlideReader:
    """The first reader of a slide.

    Raises:
        SlideError: it cannot be opened, is another file than the tiled one, or cannot be read as asked.
    """
    work = slide.work
    try:
        reader = open_slide(work.path, work.reader)
    except OSError as error:
        raise _gone(work, error) from None
    with slide.lock:
        slide.idle.append(reader)
    _same_file(work, reader.facts.path, "is not the file that was tiled")
    if work.shape.half and not getattr(reader, "can_halve", False):
        read_patch(reader, *work.coords[0].tolist(), work.shape)  # raises, and says why this reader cannot
    return reader


def _read(slide: _Slide, at: slice) -> FedBlock:
    """Read and measure one block with a reader that no other thread uses."""
    work, first = slide.work, slide.opened.result()
    started = time.perf_counter()
    with slide.lock:
        reader = slide.idle.pop() if slide.idle else None
    try:
        reader = reader or first.another()
        block = read_block(reader, work.coords[at], work.shape, lambda: OpenSlideReader(work.path))
    except BaseException as error:
        if reader is not None:
            reader.close()
        if isinstance(error, OSError):
            raise _gone(work, error) from None
        raise
    # OpenSlide keeps an error for the rest of a handle's life: after a failure the next block gets a new one.
    if block.n_retried:
        reader.close()
    else:
        with slide.lock:
            slide.idle.append(reader)
    sharp = np.array([sharpness(tile) for tile in block.tiles], np.float32)
    return FedBlock(at, block, sharp, time.perf_counter() - started)


def _close(slide: _Slide) -> None:
    with slide.lock:
        for reader in slide.idle:
            reader.close()
        slide.idle.clear()


def _same_file(work: SlideWork, path: Path, otherwise: str) -> None:
    try:
        same = file_sample(path) == work.head
    except OSError:
        same = False
    if not same:
        raise SlideError(
            "slide_changed",
            f"slide '{work.slide_id}': {work.path} {otherwise}",
            "run the tile step again, once the file no longer changes",
        )


def _gone(work: SlideWork, error: OSError) -> SlideError:
    return SlideError(
        "unreadable",
        f"slide '{work.slide_id}': {work.path}: {error.strerror or error}",
        "check the disk and the rights of the file, or fetch it again",
    )
