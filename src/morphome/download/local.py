"""Files of a manifest that are on disk already, and whether there is room for the others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from morphome.download.listing import GdcFile
from morphome.errors import MorphomeError


@dataclass
class Local:
    """What was found on disk.

    Attributes:
        files: the files asked for, in their order; ``local_path`` is set where a file lies outside its place.
        in_place: ids of the files at ``<folder>/<id>/<name>``.
        elsewhere: ids of the files found under another path.
        other_size: files of the right name with another number of bytes: (path, bytes found, bytes expected).
    """

    files: list[GdcFile]
    in_place: set[str] = field(default_factory=set)
    elsewhere: set[str] = field(default_factory=set)
    other_size: list[tuple[str, int, int]] = field(default_factory=list)

    def missing(self) -> list[GdcFile]:
        """Files that are still to be fetched."""
        here = self.in_place | self.elsewhere
        return [file for file in self.files if file.file_id not in here]


def find_local(files: Sequence[GdcFile], folder: Path, have: Sequence[Path] = ()) -> Local:
    """Look for files in their place, then by name anywhere below ``have`` and ``folder``.

    Size decides; checksums of hundreds of gigabytes would take hours. Of several places the one in a folder named as
    the file id goes first, then the order of ``have``, then the path. Links to folders are not followed.

    Raises:
        MorphomeError: a folder of ``have`` does not exist or holds none of the files, or a path cannot be written into
            a table.
    """
    folder = Path(folder)
    found = Local([])
    for number, place in enumerate(have):
        if not Path(place).is_dir():
            raise MorphomeError(f"gdc.have[{number}]: folder not found: {place}", "correct the path or remove it")
    waiting = []
    for file in files:
        place = file.path(folder)
        size = _size(place)
        if size == file.size:
            found.in_place.add(file.file_id)
            continue
        if size is not None:
            found.other_size.append((str(place), size, file.size))
        waiting.append(file)
    index = _index({file.name for file in (files if have else waiting)}, [*map(Path, have), folder])
    for number, place in enumerate(map(Path, have)):
        if not any(path.is_relative_to(place) for paths in index.values() for path in paths):
            raise MorphomeError(
                f"gdc.have[{number}]: none of the {len(files)} files of the cohort is below {place}",
                "correct the path, or take the folder out",
            )
    paths: dict[str, str] = {}
    for file in waiting:
        own = file.path(folder)
        places = [place for place in index.get(file.name, ()) if place != own]
        for place in sorted(places, key=lambda place: place.parent.name != file.file_id):
            size = _size(place)
            if size == file.size:
                paths[file.file_id] = _writable(place)
                break
            if size is not None:
                found.other_size.append((str(place), size, file.size))
    found.elsewhere = set(paths)
    found.files = [replace(file, local_path=paths.get(file.file_id, "")) for file in files]
    return found


def require_room(folder: Path, missing: Sequence[GdcFile], delete_slides: bool) -> None:
    """Refuse when the files still to be fetched do not fit on the disk of ``folder``.

    Args:
        delete_slides: slides are deleted one by one after use, so they do not count.

    Raises:
        MorphomeError: too little room.
    """
    wanted = sum(file.size for file in missing if not (delete_slides and file.kind == "slides"))
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if wanted > free:
        remedy = "make room, or set gdc.folder to a larger disk"
        if not delete_slides:
            remedy += ", or gdc.delete_slides: true (slides are then fetched and deleted one by one)"
        raise MorphomeError(
            f"gdc.folder: {folder} has {free / 1e9:.1f} GB free, but {wanted / 1e9:.1f} GB are still to be fetched",
            remedy,
        )


def _index(names: set[str], folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Wanted names to their paths, in the order of the folders."""
    index: dict[str, list[Path]] = {}
    if not names:
        return index
    for top in folders:
        for folder, below, here in os.walk(top):
            below.sort()
            for name in names.intersection(here):
                index.setdefault(name, []).append(Path(folder) / name)
    return index


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:  # a broken link, or a folder that may not be entered
        return None


def _writable(path: Path) -> str:
    text = str(path)
    if not text.isprintable():
        shown = text.encode("utf-8", "backslashreplace").decode()
        raise MorphomeError(f"gdc.have: '{shown}' holds characters that no table takes", "rename the folder")
    return text
