"""The tile step for a group of slides: slides that are done and unchanged are passed over.

A slide's files are written whole, so a job that is killed loses the slide it was at and nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
from tqdm import tqdm

from morphome.errors import MorphomeError
from morphome.files import check_stamp, file_sha256, read_json
from morphome.slides.openslide_reader import slide_sample
from morphome.slides.tile import run_tile

#: Parts of a quality record that differ between two runs over the same slide.
_NOT_CONTENT = ("seconds", "stamp")


@dataclass(frozen=True)
class TileJob:
    """One slide to tile.

    Attributes:
        slide_path: the slide file, or the folder of a DICOM series.
        slide_id: as in the slide sheet.
        settings: section ``tiling`` (of this slide) and ``slides.reader``; the outputs are stamped with them.
        h5_out, qc_out, geojson_out, thumbnail_out: as for :func:`morphome.slides.tile.run_tile`.
    """

    slide_path: Path
    slide_id: str
    settings: Mapping[str, Any]
    h5_out: Path
    qc_out: Path
    geojson_out: Path
    thumbnail_out: Path


def run_tiles(*, jobs: Sequence[TileJob], code: str) -> list[dict[str, Any]]:
    """Tile slides, one after the other.

    Args:
        code: hash of the code of this step; a slide that other code tiled is tiled again.

    Returns:
        One record a slide: ``slide_id``, ``status``, ``reason_code``, ``reason``, ``n_tiles``, ``content_key`` (hash of
        the quality record without its time) and ``skipped`` (it was done before and nothing changed since).

    Raises:
        MorphomeError: as :func:`morphome.slides.tile.run_tile`. Slides before that one are done.
    """
    records = []
    for job in tqdm(jobs, desc="slides", disable=None):
        made_from = _made_from(job, code)
        qc = _finished(job, made_from)
        skipped = qc is not None
        if qc is None:
            run_tile(
                slide_path=job.slide_path,
                slide_id=job.slide_id,
                settings=job.settings,
                h5_out=job.h5_out,
                qc_out=job.qc_out,
                geojson_out=job.geojson_out,
                thumbnail_out=job.thumbnail_out,
                made_from=made_from,
            )
            qc = read_json(job.qc_out, "morphome.slide_qc", job.settings)
        content = {key: value for key, value in qc.items() if key not in _NOT_CONTENT}
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
        facts = {name: qc[name] for name in ("status", "reason_code", "reason", "n_tiles")}
        records.append({"slide_id": job.slide_id, **facts, "content_key": key, "skipped": skipped})
    return records


def _made_from(job: TileJob, code: str) -> dict[str, str]:
    """What a slide's files depend on beside its pixels and the settings they are stamped with."""
    tiling = job.settings["tiling"]
    files = {key: _digest(tiling[key]) for key in ("masks", "segmenter_weights") if tiling.get(key)}
    return {"code": code, **files}


def _digest(path: str) -> str:
    # A file that is not there fails in the step itself, with a message of its own.
    file = Path(path)
    if not file.is_file():
        return ""
    facts = file.stat()
    return _sha256(path, facts.st_size, facts.st_mtime_ns)


@functools.cache
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    return file_sha256(Path(path))


def _finished(job: TileJob, made_from: Mapping[str, str]) -> dict[str, Any] | None:
    """The quality record of a slide whose files are there and belong to this file, settings and code; else None.

    A slide that failed is tried again: its file may have been fetched anew, or a disk have come back.
    """
    try:
        qc = read_json(job.qc_out, "morphome.slide_qc", job.settings)
        with h5py.File(job.h5_out, "r", locking=False) as handle:
            check_stamp(dict(handle.attrs), job.h5_out, "morphome.tiles", job.settings)
            same = handle.attrs["slide_id"] == job.slide_id and len(handle["coords"]) == qc["n_tiles"]
        same = same and qc["status"] == "ok" and qc["made_from"] == dict(made_from)
        same = same and job.geojson_out.exists() and job.thumbnail_out.exists()
        return qc if same and qc["slide_sha256_head"] == slide_sample(Path(job.slide_path)) else None
    except (OSError, KeyError, MorphomeError):
        return None
