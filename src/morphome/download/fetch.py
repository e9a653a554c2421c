"""All files of a list: room looked for first, several at a time, one failure does not stop the others."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from morphome.download.remote import NoRoom, RemoteFile, is_there
from morphome.download.transfer import RateLimiter, Stopped, Unreachable, fetch_file, make_client
from morphome.errors import MorphomeError
from morphome.files import write_json

FETCHED_FORMAT = "morphome.fetched"
#: Files in a row that could not be reached, without one that came, after which the rest is not tried.
_MOST_UNREACHABLE = 10


def require_space(folder: Path, bytes_needed: int, what: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: where it goes; need not exist yet.
        bytes_needed: of what is still missing.
        what: in words, for the message ("120 slides").

    Raises:
        MorphomeError: naming the folder, what is free and what is needed.
    """
    disk = _existing(folder)
    free = shutil.disk_usage(disk).free
    if bytes_needed > free:
        raise MorphomeError(
            f"{folder}: {free / 1e9:.1f} GB free, but {what} need {bytes_needed / 1e9:.1f} GB",
            "make room, choose a folder on another disk, or ask for fewer files",
        )


def run_fetch(
    *,
    files: Sequence[RemoteFile],
    out: Path,
    settings: Mapping[str, Any],
    connections: int = 4,
    mb_per_second: float = 0,
    say: Callable[[str], object] = tqdm.write,
) -> None:
    """Fetch all files of a list and write down that they are there.

    Args:
        files: in the order of fetching; each has a target of its own.
        out: written when all files are there: ``{"files": [{"name", "bytes", "md5"}], "bytes"}``, by name. It holds no
            times, so that an unchanged list is an unchanged file.
        settings: what the stamp of ``out`` stands for.
        connections: files at a time.
        mb_per_second: 10^6 bytes a second for all together; 0 sets no limit.
        say: gets a line for each file.

    Raises:
        MorphomeError: too little room (before anything is fetched), or files that could not be fetched (after all
            others came); it names the first five. What came stays, what is half there is gone on with next time.
    """
    missing, failed = _missing(files)
    _require_room(missing)
    here = len(files) - len(missing) - len(failed)
    to_come = sum(file.size or 0 for file in missing)
    say(f"{here} of {len(files)} files are here; {len(missing)} to fetch, {to_come / 1e9:.2f} GB")
    if missing:
        limiter = RateLimiter(mb_per_second) if mb_per_second else None
        failed += _fetch_all(missing, max(1, connections), limiter, say)
    if failed:
        raise _failures(failed, len(files))
    facts = [
        {"name": file.target.name, "bytes": file.target.stat().st_size, "md5": file.md5}
        for file in sorted(files, key=lambda file: (file.target.name, file.md5))
    ]
    write_json({"files": facts, "bytes": sum(fact["bytes"] for fact in facts)}, out, FETCHED_FORMAT, settings)


def _missing(files: Sequence[RemoteFile]) -> tuple[list[RemoteFile], list[MorphomeError]]:
    """Files that are to be fetched, and errors of those whose name is taken by something else."""
    missing, failed = [], []
    for file in files:
        try:
            if not is_there(file):
                missing.append(file)
        except MorphomeError as error:
            failed.append(error)
    return missing, failed


def _require_room(missing: Sequence[RemoteFile]) -> None:
    """:func:`require_space` for each disk that files go to; what a part holds already is not needed again."""
    needs: dict[int, list[Any]] = {}
    for file in missing:
        with contextlib.suppress(OSError):  # a folder that cannot be entered is named when its file is fetched
            disk = _existing(file.target.parent).stat().st_dev
            have = file.part.stat().st_size if file.part.exists() else 0
            need = needs.setdefault(disk, [file.target.parent, 0, 0])
            need[1] += max(0, (file.size or 0) - have)
            need[2] += 1
    for folder, n_bytes, n_files in needs.values():
        require_space(folder, n_bytes, f"{n_files} files that are still missing")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = Path(folder).absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _fetch_all(
    missing: Sequence[RemoteFile], connections: int, limiter: RateLimiter | None, say: Callable[[str], object]
) -> list[MorphomeError]:
    """Fetch what is missing; the errors of what failed. One without a remedy stands for a file that was not tried."""
    failed: list[MorphomeError] = []
    stop, in_a_row, n_done = threading.Event(), 0, 0
    with (
        make_client(connections=connections) as client,
        _bar(missing) as progress,
        ThreadPoolExecutor(connections) as pool,
    ):

        def fetch_one(file: RemoteFile) -> None:
            try:
                fetch_file(file, client, limiter=limiter, progress=progress, say=say, stop=stop)
            except NoRoom:  # here, before this thread takes the next file
                stop.set()
                raise

        tasks = {pool.submit(fetch_one, file): file for file in missing}
        try:
            for task in as_completed(tasks):
                file = tasks[task]
                try:
                    task.result()
                    in_a_row, n_done = 0, n_done + 1
                    say(f"{file.name}: here ({n_done} of {len(missing)})")
                except Stopped:
                    failed.append(MorphomeError(f"{file.name}: not tried to its end"))
                except MorphomeError as error:
                    failed.append(error)
                    say(f"{file.name}: failed: {error.problem}")
                    in_a_row = in_a_row + 1 if isinstance(error, Unreachable) else 0
                    if in_a_row >= _MOST_UNREACHABLE:
                        stop.set()
        finally:  # also on Ctrl-C: running transfers stop at their next chunk, their parts stay
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
    return failed


@contextlib.contextmanager
def _bar(missing: Sequence[RemoteFile]) -> Iterator[Callable[[int], object]]:
    """A bar over bytes where a person looks on, safe for threads."""
    lock = threading.Lock()
    total = sum(file.size or 0 for file in missing)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, disable=None) as bar:

        def progress(n_bytes: int) -> None:
            with lock:
                bar.update(n_bytes)

        yield progress


def _failures(failed: Sequence[MorphomeError], n_files: int) -> MorphomeError:
    """One error of all: the real ones first, then those that were never tried."""
    real = [error for error in failed if error.remedy]
    lines = [f"  {error.problem}" for error in real[:5]]
    if len(real) > 5:
        lines.append(f"  and {len(real) - 5} more")
    if untried := len(failed) - len(real):
        lines.append(f"  {untried} were not tried to their end, as every further one would fail too")
    remedies = list(dict.fromkeys(error.remedy for error in real[:5] if error.remedy))
    return MorphomeError(
        f"{len(failed)} of {n_files} files could not be fetched:\n" + "\n".join(lines),
        "; or: ".join(remedies) + ". What came stays",
    )
