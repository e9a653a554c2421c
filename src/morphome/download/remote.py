"""A file that is to come from elsewhere: what it must be, and whether it is there."""

from __future__ import annotations

import errno
import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path

from morphome.errors import MorphomeError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class NoRoom(MorphomeError):
    """The disk, the quota or the largest size of a file is used up; every other file would fail as well."""


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch, and what it must be.

    Attributes:
        url: address, ``http`` or ``https``; redirects are followed.
        target: name that it gets, once it is there and right.
        size: bytes; None when unknown, then a checksum is needed.
        md5, sha256: hex; "" when unknown.
        label: how messages call it; the name of the target when empty.
    """

    url: str
    target: Path
    size: int | None
    md5: str = ""
    sha256: str = ""
    label: str = ""

    def __post_init__(self) -> None:
        if self.size is None and not self.md5 and not self.sha256:
            raise MorphomeError(
                f"{self.target}: neither size nor checksum of {self.url} is known",
                "give one of them: a file that nothing can be checked by is not fetched",
            )

    @property
    def name(self) -> str:
        return self.label or self.target.name

    @property
    def part(self) -> Path:
        return self.target.with_name(self.target.name + ".part")


def is_there(file: RemoteFile) -> bool:
    """Whether the target exists and has the right size (or, where that is unknown, the right checksum).

    A target got its name after it was checked, or by the user's own hand; its bytes are not read again here.

    Raises:
        MorphomeError: something else has the name. It is never overwritten.
    """
    wrong = ""
    try:
        found = file.target.stat()
        if not stat.S_ISREG(found.st_mode):
            wrong = "is not a file"
        elif file.size is None:
            wrong = wrong_checksum(file, file.target)
        elif found.st_size != file.size:
            wrong = f"has {found.st_size:,} bytes, expected {file.size:,}"
    except FileNotFoundError:
        if not file.target.is_symlink():
            return False
        wrong = "is a link to nowhere"
    except OSError as error:
        raise system_error(file, error) from None
    if wrong:
        raise MorphomeError(
            f"{file.target}: {wrong}",
            "it is not overwritten: move it away and run the step again, or put the right file there",
        )
    return True


def wrong_checksum(file: RemoteFile, path: Path) -> str:
    """What is wrong with the checksums of ``path``: found and expected; empty when they are those of ``file``."""
    # md5 is no question of security here; a machine in FIPS mode gives it only so.
    wanted = {name: value.lower() for name, value in (("md5", file.md5), ("sha256", file.sha256)) if value}
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in wanted}
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            for digest in digests.values():
                digest.update(chunk)
    for name, digest in digests.items():
        if digest.hexdigest() != wanted[name]:
            return f"has the {name} {digest.hexdigest()}, expected {wanted[name]}"
    return ""


def system_error(file: RemoteFile, error: OSError) -> MorphomeError:
    """A system error in words."""
    problem = f"{error.filename or file.part}: cannot be read or written: {error.strerror or error}"
    if error.errno in _NO_ROOM:
        return NoRoom(
            problem,
            "make room (disk, quota or limit of file sizes) and run the step again; it goes on where it stopped",
        )
    return MorphomeError(problem, "check that the folder exists and that you may write there, then run the step again")
