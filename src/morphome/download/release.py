"""A fixed data release on a server that has moved on.

The GDC's search knows the newest release only. A file that came later is left out; one that replaced an older version
is taken in the version of then, which stays downloadable by its own id. What was withdrawn since cannot be found
again by a search: only an earlier run's manifest brings it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from morphome.download.api import Gdc
from morphome.download.listing import GdcFile, check_file
from morphome.download.query import LeftOut, leave_out, release_number, release_text
from morphome.errors import MorphomeError

#: Said beside every manifest of a fixed release that is not the server's.
WITHDRAWN = (
    "files that the GDC has withdrawn since this release are not found by a search, and clinical.tsv is the GDC's of "
    "the day it was asked: a release pins files only"
)


def pinned_release(wanted: object, status: dict[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(release wanted, release of the server); the server's own for "latest".

    Raises:
        MorphomeError: ``wanted`` is no release, the server does not say its own, or the server is older.
    """
    server = release_number(status["data_release"])
    if server is None:
        raise MorphomeError(f"gdc.api: the server's release is '{status['data_release']}'", "check gdc.api")
    if str(wanted).strip().lower() == "latest":
        return server, server
    pin = release_number(wanted)
    if pin is None:
        raise MorphomeError(f"gdc.data_release: '{wanted}' is no release", 'write "45.0" (in quotes), or latest')
    if server < pin:
        raise MorphomeError(
            f"gdc.data_release is {release_text(pin)}, but the server has {release_text(server)} "
            f"({status['data_release']})",
            f"set gdc.data_release to {release_text(server)} or latest, or check gdc.api",
        )
    return pin, server


def files_of_release(api: Gdc, files: Sequence[GdcFile], pin: tuple[int, int]) -> tuple[list[GdcFile], list[LeftOut]]:
    """The files as they were in the release ``pin``.

    Args:
        files: what the server has now.

    Returns:
        the files of then; one entry for each file that is left out or taken in an older version (file id and name
        are those of the newer one).

    Raises:
        MorphomeError: no answer, or an answer that cannot be read.
    """
    kept: list[GdcFile] = []
    changed: list[LeftOut] = []
    older: list[tuple[GdcFile, str, tuple[int, int]]] = []
    later = []
    for file in files:
        first = release_number(file.data_release)
        (kept if first is not None and first <= pin else later).append(file)
    if later:  # one question each, so it may take minutes
        print(
            f"Asking for the history of {len(later)} files, to take them as of release {release_text(pin)}", flush=True
        )
    for file in later:
        found = _version_of_then(api.history(file.file_id), pin)
        if found is None:
            first = release_number(file.data_release)
            since = f"first released in {release_text(first)}" if first else "no release known"
            changed.append(leave_out(file, since))
        elif found[0] == file.file_id:
            kept.append(file)
        else:
            older.append((file, *found))
    known = api.versions([file_id for _, file_id, _ in older])
    for file, file_id, release in older:
        entry = known.get(file_id)
        size = entry.get("size") if entry else None
        if entry is None or not isinstance(size, int):
            changed.append(leave_out(file, "replaced since, and the version of then is no longer known"))
            continue
        then = replace(
            file,
            file_id=file_id,
            name=str(entry.get("filename") or ""),
            md5=str(entry.get("md5") or "").lower(),
            size=size,
            state=str(entry.get("state") or ""),
            version=str(entry.get("version") or ""),
            data_release=f"{release_text(release)} - {release_text(pin)}",
        )
        kept.append(check_file(then, f"{api.url}/files/versions"))
        changed.append(leave_out(file, "taken in the older version of this release"))
    return kept, changed


def _version_of_then(history: Sequence[dict[str, Any]], pin: tuple[int, int]) -> tuple[str, tuple[int, int]] | None:
    """(file id, first release) of the newest version that was out in the release ``pin``."""
    out = []
    for entry in history:
        release = release_number(entry.get("data_release"))
        if release is not None and release <= pin and entry.get("uuid"):
            version = release_number(entry.get("version")) or (0, 0)
            out.append((release, version, str(entry["uuid"])))
    return (max(out)[2], max(out)[0]) if out else None
