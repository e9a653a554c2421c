"""Published tables and gene sets: where they are, what they must be, under which licence, and how they get here.

The rows are data (``data/published_files.yaml``). Standard library and PyYAML only up to the fetching itself: the
workflow asks for names while it builds its graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from morphome.download.listing import GDC_API, data_url
from morphome.download.remote import RemoteFile, system_error, wrong_checksum
from morphome.errors import MorphomeError

REGISTRY_PATH = Path(__file__).parent / "data" / "published_files.yaml"


@dataclass(frozen=True)
class PublishedFile:
    """One row of the registry.

    Attributes:
        name: file name in the folder of published files.
        what: content, in words.
        bytes: size. md5, sha256: hex, one of them at least; "" when unknown.
        licence: as the source states it. cite: what to cite.
        gdc_uuid: id at the GDC; url: address of any other file. One of the two.
    """

    name: str
    what: str
    bytes: int
    licence: str
    cite: str
    gdc_uuid: str = ""
    url: str = ""
    md5: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        if bool(self.gdc_uuid) == bool(self.url) or not (self.md5 or self.sha256):
            raise MorphomeError(
                f"{REGISTRY_PATH}, {self.name}: one of gdc_uuid and url, and md5 or sha256 are needed", "mend the row"
            )

    def remote(self, target: Path, api: str) -> RemoteFile:
        """What to fetch, where to; ``api``: base address of the GDC."""
        url = self.url or data_url(api, self.gdc_uuid)
        return RemoteFile(url, Path(target), self.bytes, self.md5, self.sha256, self.name)


@functools.cache
def _registry(path: Path) -> dict[str, PublishedFile]:
    rows = yaml.safe_load(path.read_text(encoding="utf-8"))["files"]
    return {name: PublishedFile(name=name, **row) for name, row in rows.items()}


def published_names() -> list[str]:
    """Names of all published files that can be fetched."""
    return sorted(_registry(REGISTRY_PATH))


def published_file(name: str) -> PublishedFile | None:
    """The row of a file name; None when it is none of the registry."""
    return _registry(REGISTRY_PATH).get(name)


def check_published(name: str, path: Path) -> None:
    """Refuse a file that has the name of a published one and other bytes.

    Raises:
        MorphomeError: naming the file, what it has and what was expected; or the name is none of the registry.
    """
    row, path = _row(name), Path(path)
    file = row.remote(path, "")
    try:
        n_bytes = path.stat().st_size
        wrong = wrong_checksum(file, path) if n_bytes == row.bytes else f"has {n_bytes:,} bytes, expected {row.bytes:,}"
    except OSError as error:
        raise system_error(file, error) from None
    if wrong:
        raise MorphomeError(
            f"{path}: {wrong}: this is another edition of {name}, or it was saved anew",
            "move it away and run the step again; to use this very file, give it another name in the configuration",
        )


def run_published(
    *,
    name: str,
    out: Path,
    api: str = GDC_API,
    attempts: int = 5,
    say: Callable[[str], object] = print,
) -> None:
    """Fetch one published file, or check the copy that lies there.

    Args:
        name: of the registry.
        out: the file.
        api: base address of the GDC.
        attempts: failures in a row before it gives up.
        say: gets the licence, the citation and a line for each failure.

    Raises:
        MorphomeError: the name is unknown, a copy put there by hand has other bytes, or the file cannot be fetched:
            then it says from where, how it is checked, and where to put a copy.
    """
    row, out = _row(name), Path(out)
    if out.exists():
        check_published(name, out)
        say(f"{name}: already in {out.parent}, checksum right")
    else:
        _fetch(row, out, api, attempts, say)
        say(f"{name}: in {out.parent}, {row.bytes / 1e6:.1f} MB, checksum right")
    say(f"{name}: {row.what}. Licence: {row.licence}. Cite: {row.cite}.")


def _fetch(row: PublishedFile, out: Path, api: str, attempts: int, say: Callable[[str], object]) -> None:
    from morphome.download.transfer import fetch_file, make_client

    file = row.remote(out, api)
    try:
        with make_client(connections=1) as client:
            fetch_file(file, client, attempts=attempts, say=say)
    except MorphomeError as error:
        checksum = f"sha256 {row.sha256}" if row.sha256 else f"md5 {row.md5}"
        raise MorphomeError(
            error.problem,
            f"{error.remedy}. Or fetch {file.url} elsewhere ({row.bytes:,} bytes, {checksum}) and put it at {out}",
        ) from None


def _row(name: str) -> PublishedFile:
    if row := published_file(name):
        return row
    raise MorphomeError(f"'{name}' is no published file that morphome knows", f"take one of {published_names()}")
