"""The pool of reading threads: order, bounds, several slides, failures, a clean end."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from morphome.features import feed as module
from morphome.features.feed import SlideWork, TileFeed
from morphome.files import file_sample
from morphome.slides import patches
from morphome.slides.patches import PatchShape
from morphome.slides.quality import sharpness
from morphome.slides.reader import ReaderChoice, SlideError, SlideFacts

SHAPE = PatchShape(8, 8, 8)


class FakeReader:
    """Tiles whose pixels tell their place; counts readers and notices two threads in one."""

    def __init__(self, path, log, delay=0.0, bad=()):
        self.facts = SlideFacts(path, "fake", 800, 800, ((800, 800),), (1.0,), (0, 0, 800, 800), {})
        self.choice = ReaderChoice("fake")
        self._log, self._delay, self._bad, self._busy = log, delay, bad, threading.Lock()
        log["open"] += 1

    def read_level0(self, x, y, width, height):
        assert self._busy.acquire(blocking=False), "two threads in one reader"
        try:
            self._log["reads"].append((self.facts.path.name, x, y))
            if self._delay:
                time.sleep(self._delay)
            if (x, y) in self._bad:
                raise SlideError("unreadable", "bad tile")
            return np.full((height, width, 3), (x // 8 + y // 8) % 251, np.uint8)
        finally:
            self._busy.release()

    def another(self):
        return FakeReader(self.facts.path, self._log, self._delay, self._bad)

    def close(self):
        self._log["closed"] += 1

    __enter__ = lambda self: self  # noqa: E731

    def __exit__(self, *_):
        self.close()


@pytest.fixture
def log():
    return {"open": 0, "closed": 0, "reads": []}


@pytest.fixture
def works(tmp_path, monkeypatch, log):
    """Make works of fake slides; ``settings`` by name: delay, bad."""

    def make(n_slides=2, n_tiles=100, **settings):
        def open_fake(path, reader="auto"):
            return FakeReader(path, log, **settings)

        monkeypatch.setattr(module, "open_slide", open_fake)
        monkeypatch.setattr(module, "OpenSlideReader", open_fake)
        made = []
        for number in range(n_slides):
            path = tmp_path / f"{number}.svs"
            path.write_text(str(number))
            y, x = np.divmod(np.arange(n_tiles), 10)
            coords = np.stack([x, y], 1).astype(np.int32) * 8
            made.append(SlideWork(str(number), path, coords, SHAPE, "auto", file_sample(path)))
        return made

    return make


def no_threads_left():
    return not [t for t in threading.enumerate() if t.name.startswith("morphome-tiles")]


def all_tiles(works, threads, block_tiles):
    with TileFeed(works, threads, block_tiles) as feed:
        return [[fed for fed in feed.blocks(number)] for number in range(len(works))]


@pytest.mark.parametrize(("threads", "block_tiles"), [(1, 64), (1, 7), (4, 10), (7, 1)])
def test_order_and_values_do_not_depend_on_threads_and_blocks(works, threads, block_tiles, log):
    slides = works(3, delay=0.0002)
    for work, blocks in zip(slides, all_tiles(slides, threads, block_tiles), strict=True):
        tiles = np.concatenate([fed.block.tiles for fed in blocks])
        np.testing.assert_array_equal(tiles[:, 0, 0, 0], (work.coords // 8).sum(1) % 251)
        assert [i for fed in blocks for i in range(fed.at.start, fed.at.stop)] == list(range(100))
        found = np.concatenate([fed.sharpness for fed in blocks])
        np.testing.assert_array_equal(found, [sharpness(tile) for tile in tiles])
    assert log["open"] == log["closed"] <= 3 * (threads + 1)
    assert len(log["reads"]) == 300
    assert no_threads_left()


def test_memory_is_bounded_by_the_window(works, log):
    slides = works(2, n_tiles=500)
    with TileFeed(slides, threads=2, block_tiles=10) as feed:
        assert feed.window == 6
        blocks = feed.blocks(0)
        next(blocks)
        time.sleep(0.3)  # the pool has all the time to run ahead
        assert len(log["reads"]) <= (feed.window + 1) * 10
        for count, _ in enumerate(blocks, 2):
            time.sleep(0.001)
            assert len(log["reads"]) <= (feed.window + count) * 10


def test_the_next_slide_is_read_while_this_one_is_used(works, log):
    slides = works(2, n_tiles=40)
    with TileFeed(slides, threads=2, block_tiles=10) as feed:
        blocks = feed.blocks(0)
        next(blocks)
        deadline = time.perf_counter() + 5
        while not any(name == "1.svs" for name, *_ in log["reads"]) and time.perf_counter() < deadline:
            time.sleep(0.005)
        assert any(name == "1.svs" for name, *_ in log["reads"])


def test_waiting_is_measured(works):
    slow = works(1, n_tiles=10, delay=0.01)
    with TileFeed(slow, 1) as feed:
        (fed,) = feed.blocks(0)
        assert 0.09 < fed.seconds < 5
        assert feed.seconds_wait > 0.09


def test_a_slide_that_cannot_be_opened_fails_alone(works, log):
    slides = works(3)
    slides[1].path.write_text("another file")
    with TileFeed(slides, 2, 10) as feed:
        assert sum(len(fed.block.tiles) for fed in feed.blocks(0)) == 100
        assert feed.choice(0).name == "fake"
        with pytest.raises(SlideError, match=r"slide '1': .*1\.svs is not the file that was tiled") as caught:
            list(feed.blocks(1))
        assert caught.value.code == "slide_changed"
        assert feed.choice(1) is None
        assert sum(len(fed.block.tiles) for fed in feed.blocks(2)) == 100
    assert not [name for name, *_ in log["reads"] if name == "1.svs"]
    assert log["open"] == log["closed"]


def test_a_file_that_is_replaced_while_it_is_read_fails(works):
    slides = works(1)
    with TileFeed(slides, 1, 10) as feed, pytest.raises(SlideError, match="removed or replaced while it was read"):
        for _ in feed.blocks(0):
            slides[0].path.write_text("another file")


def test_a_disk_that_fails_is_an_error_of_that_slide(works, monkeypatch):
    slides = works(2)
    read = FakeReader.read_level0

    def fails(self, *place):
        if self.facts.path.name == "0.svs":
            raise OSError(5, "Input/output error")
        return read(self, *place)

    monkeypatch.setattr(FakeReader, "read_level0", fails)
    with TileFeed(slides, 2, 10) as feed:
        with pytest.raises(SlideError, match=r"slide '0': .*0\.svs: Input/output error") as caught:
            list(feed.blocks(0))
        assert caught.value.code == "unreadable"
        assert sum(len(fed.block.tiles) for fed in feed.blocks(1)) == 100


def test_bad_tiles_are_left_out_and_the_reader_is_replaced(works, log):
    slides = works(1, bad={(16, 0)})
    ((first, *rest),) = all_tiles(slides, 1, 10)
    assert np.flatnonzero(~first.block.ok).tolist() == [2]
    assert (first.block.n_retried, len(first.block.tiles), len(first.sharpness)) == (1, 9, 9)
    assert all(fed.block.ok.all() for fed in rest)
    assert log["open"] == log["closed"] == 3, "the first reader, the one that tried again, the one after it"


def test_faults_of_the_code_are_raised_and_the_pool_ends(works, monkeypatch, log):
    slides = works(2)

    def broken(*_):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(patches, "read_patch", broken)
    with pytest.raises(ZeroDivisionError), TileFeed(slides, 3, 10) as feed:
        list(feed.blocks(0))
    assert no_threads_left()
    assert log["open"] == log["closed"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_leaving_in_the_middle_ends_all_threads_soon(works, error, log):
    slides = works(3, n_tiles=1000, delay=0.002)
    started = time.perf_counter()
    with pytest.raises(error), TileFeed(slides, 3, 10) as feed:
        for _ in feed.blocks(0):
            raise error
    assert time.perf_counter() - started < 2, "what waits is never begun"
    assert no_threads_left()
    assert log["open"] == log["closed"]
    assert len(log["reads"]) < 300


def test_slides_are_asked_for_in_order(works):
    with TileFeed(works(2), 1) as feed, pytest.raises(RuntimeError, match="not next"):
        list(feed.blocks(1))


def test_no_slides_need_no_threads():
    with TileFeed([], 4):
        assert no_threads_left()
