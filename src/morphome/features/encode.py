"""The encode step: features of the tiles of slides.

Each tile is read once at level 0, brought to the encoder's size by one resize, measured for sharpness and encoded.
Slides are taken in the order given; the encoder is loaded once, and the tiles of the next slide are read while this
one is encoded. A tile that cannot be read is tried once more with a fresh OpenSlide reader, then recorded as failed;
it is never replaced by white and never dropped without a count. The files do not depend on the number of threads.

A slide's files are written whole, as soon as it is encoded: a job that is killed loses the slide it was at, and the
next one passes over every slide that is done and unchanged.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from morphome.errors import MorphomeError
from morphome.features.encode_files import Encoded, Planned, finished, read_tiles, write_features
from morphome.features.encoders import Encoder, begin, how_run, load_encoder, reading_threads
from morphome.features.feed import TileFeed
from morphome.features.fit import check_fit
from morphome.files import write_json
from morphome.slides.reader import ReaderChoice, SlideError

#: Batches that may be on the device before the oldest is fetched.
IN_FLIGHT = 2


@dataclass(frozen=True)
class EncodeJob:
    """One slide to encode.

    Attributes:
        slide_path: the slide that was tiled: a file, or the folder of a DICOM series.
        slide_id: as in the slide sheet.
        tiles_h5: ``morphome.tiles`` of the slide.
        settings: what the outputs are stamped with: sections ``tiling`` (of this slide), ``slides`` (``reader``) and
            ``features`` (``encoder``, ``precision``, ``max_failed_tiles``).
        h5_out: ``morphome.tile-features``; ``features`` float16 (N, D), ``coords`` int32 (N, 2), ``sharpness``
            float32 (N,), ``failed_coords`` int32 (M, 2). A slide that failed has N = 0 and says why.
        timing_out: ``morphome.timing``.
    """

    slide_path: Path
    slide_id: str
    tiles_h5: Path
    settings: Mapping[str, Any]
    h5_out: Path
    timing_out: Path


def run_encode(
    *, jobs: Sequence[EncodeJob], features: Mapping[str, Any], code: str, threads: int = 1
) -> list[dict[str, Any]]:
    """Encode slides.

    Args:
        jobs: slides in the order in which they are encoded.
        features: the whole section ``features``; how the encoder runs (``weights``, ``device``, ``runtime``,
            ``batch``) stands only here.
        code: hash of the code of this step; a slide that other code encoded is encoded again.
        threads: threads for reading, and for a network on the CPU.

    Returns:
        One record a slide: ``slide_id``, ``n_tiles``, ``status``, ``reason_code``, ``reason``, ``content_key`` and
        ``skipped`` (it was done before and nothing changed since).

    Raises:
        MorphomeError: tiles are of another slide or format, the encoder does not fit the tiling or cannot be loaded,
            a vector is not finite, or an output cannot be written. Slides before that one are done.
    """
    for job in jobs:
        check_fit(features, job.settings["tiling"])
    plans = [read_tiles(job, features, code) for job in jobs]
    done = [finished(plan) for plan in plans]
    waiting = [plan for plan, record in zip(plans, done, strict=True) if record is None]
    work = [plan.work for plan in waiting if plan.work is not None]
    started = time.perf_counter()
    encoder = load_encoder(features, threads) if work else None
    seconds_load = time.perf_counter() - started
    n_readers = reading_threads(encoder, threads) if encoder else 1
    records: list[dict[str, Any]] = []
    with TileFeed(work, n_readers) as feed:
        number = 0
        for plan, record in zip(plans, done, strict=True):
            if record is None:
                at = number if plan.work is not None else None
                number += plan.work is not None
                facts = {"threads": threads, "reading_threads": n_readers, "seconds_load": seconds_load}
                record = _encode_slide(plan, encoder, feed, at, features, facts)
                seconds_load = 0.0  # loading counts once
            records.append(record)
    return records


def to_float16(features: np.ndarray, slide_id: str) -> np.ndarray:
    """Cast vectors to float16 and check them.

    Raises:
        MorphomeError: a value is NaN, infinite or beyond the largest float16 (65,504).
    """
    with np.errstate(over="ignore"):  # becomes infinite, which is what is looked for
        half = features.astype(np.float16)
    bad = ~np.isfinite(half)
    if bad.any():
        raise MorphomeError(
            f"slide '{slide_id}': {int(bad.sum())} feature values are not finite in float16 "
            f"(dimensions {sorted(set(np.nonzero(bad)[1].tolist()))[:5]})",
            "this is a fault of the encoder, or of features.precision: try fp32, and report it with the slide",
        )
    return half


def rebatch(blocks: Iterable[np.ndarray], batch: int) -> Iterator[np.ndarray]:
    """Cut tiles that come in blocks of any size, uint8 (n, H, W, 3), into batches of ``batch``; the last is shorter.

    Each batch is a view of one buffer, which the next one overwrites.
    """
    buffer: np.ndarray | None = None
    filled = 0
    for tiles in blocks:
        if buffer is None:
            buffer = np.empty((batch, *tiles.shape[1:]), tiles.dtype)
        while len(tiles):
            n = min(batch - filled, len(tiles))
            buffer[filled : filled + n] = tiles[:n]
            filled, tiles = filled + n, tiles[n:]
            if filled == batch:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def _encode_slide(
    plan: Planned,
    encoder: Encoder | None,
    feed: TileFeed,
    number: int | None,
    features: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Encode a slide, write its two files and give its record; ``number`` is its place in the feed, if it has one."""
    started, waited = time.perf_counter(), feed.seconds_wait
    encoded, status, choice = Encoded.none(plan.spec.dim), dict(plan.status), None
    how = how_run(encoder, features["batch"])
    if number is not None:
        try:
            encoded = _encode_tiles(plan, encoder, feed, number, how["batch"])
            _refuse_many_failed(plan, encoded)
        except SlideError as error:
            status = {"status": "failed", "reason_code": error.code, "reason": str(error)}
            failed = encoded.failed if len(encoded.failed) else plan.coords
            seconds = encoded.seconds_read, encoded.seconds_encode
            encoded = Encoded.none(plan.spec.dim)
            encoded.failed = failed
            encoded.seconds_read, encoded.seconds_encode = seconds
        choice = feed.choice(number)
    content_key = write_features(plan, encoded, status, choice, how["arithmetic"] or "")
    seconds = time.perf_counter() - started
    timing = _timing(plan, encoded, choice, seconds, feed.seconds_wait - waited, {**how, **facts})
    write_json(timing, plan.job.timing_out, "morphome.timing", plan.job.settings)
    n_tiles = len(encoded.features)
    return {
        "slide_id": plan.job.slide_id, "n_tiles": n_tiles, **status, "content_key": content_key, "skipped": False
    }  # fmt: skip


def _encode_tiles(plan: Planned, encoder: Encoder, feed: TileFeed, number: int, batch: int) -> Encoded:
    """Vectors of every tile that can be read, in order.

    Raises:
        SlideError: the slide cannot be opened, or is not (or no longer) the file that was tiled.
    """
    out = Encoded.none(plan.spec.dim)
    vectors = np.empty((len(plan.coords), plan.spec.dim), np.float16)
    sharp: list[np.ndarray] = [out.sharpness]
    read = np.zeros(len(plan.coords), bool)
    in_flight: deque[Callable[[], np.ndarray]] = deque()
    n_done = 0

    def tiles() -> Iterator[np.ndarray]:
        with tqdm(total=len(plan.coords), desc=plan.job.slide_id, disable=None) as bar:
            for fed in feed.blocks(number):
                read[fed.at] = fed.block.ok
                sharp.append(fed.sharpness)
                out.seconds_read += fed.seconds
                yield fed.block.tiles
                bar.update(fed.at.stop - fed.at.start)

    def fetch() -> None:
        nonlocal n_done
        found = to_float16(in_flight.popleft()(), plan.job.slide_id)
        vectors[n_done : n_done + len(found)] = found
        n_done += len(found)

    spent, busy = 0.0, getattr(encoder, "seconds_busy", None)
    for tile_batch in rebatch(tiles(), batch):
        started = time.perf_counter()
        in_flight.append(begin(encoder, tile_batch))
        if len(in_flight) > IN_FLIGHT:
            fetch()
        spent += time.perf_counter() - started
    started = time.perf_counter()
    while in_flight:
        fetch()
    spent += time.perf_counter() - started
    # A GPU computes while this thread does other things: it is asked how long it was busy.
    out.seconds_encode = spent if busy is None else encoder.seconds_busy - busy
    out.features, out.sharpness = vectors[:n_done], np.concatenate(sharp)
    out.coords, out.failed = plan.coords[read], plan.coords[~read]
    return out


def _refuse_many_failed(plan: Planned, encoded: Encoded) -> None:
    limit, n_planned = plan.job.settings["features"]["max_failed_tiles"], len(plan.coords)
    if len(encoded.failed) > limit * n_planned:
        raise SlideError(
            "too_many_failed_tiles",
            f"slide '{plan.job.slide_id}' ({plan.job.slide_path}): {len(encoded.failed)} of {n_planned} tiles cannot "
            f"be read; features.max_failed_tiles allows {limit:g}",
            "fetch the file again and compare its md5, or raise features.max_failed_tiles",
        )


def _timing(
    plan: Planned,
    encoded: Encoded,
    choice: ReaderChoice | None,
    seconds: float,
    seconds_wait: float,
    how: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of where the time of a slide went."""
    n_read = len(encoded.features)
    slower_reader = encoded.seconds_read / how["reading_threads"] > encoded.seconds_encode
    return {
        "slide_id": plan.job.slide_id,
        "n_tiles": n_read,
        "seconds_total": seconds,
        "seconds_read": encoded.seconds_read,
        "seconds_wait": seconds_wait,
        "seconds_encode": encoded.seconds_encode,
        "tiles_per_second": n_read / seconds if n_read else None,
        "bound": ("reader" if slower_reader else "encoder") if n_read else None,
        "reader": choice.name if choice else None,
        "dct_scale": plan.dct_scale,
        "encoder": plan.spec.name,
        **how,
    }
