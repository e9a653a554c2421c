"""One file over HTTP, whole or not at all: resumed where it stopped, checked, and only then given its name.

Bytes come into ``<name>.part`` beside the target. The part is locked while a process writes it, survives a kill and a
full disk, and becomes the target when size and checksums are right. Nothing else is ever written.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import random
import re
import threading
import time
import warnings
from collections.abc import Callable

import httpx
import tenacity

from morphome import __version__
from morphome.download.answers import refused, retry_after_s, server_message
from morphome.download.remote import RemoteFile, is_there, system_error, wrong_checksum
from morphome.errors import MorphomeError, MorphomeWarning

#: Seconds before the second attempt; doubled with each further one, up to MOST_WAIT_S, half of it by chance.
FIRST_WAIT_S = 1.0
MOST_WAIT_S = 60.0
LOCK_POLL_S = 0.5
#: A connection that brings less than SLOWEST_BYTES in SLOW_WINDOW_S is given up and taken up again.
SLOW_WINDOW_S = 60.0
SLOWEST_BYTES = 60_000
#: An attempt that brought the file this much further than any before makes the count of failures start again.
_PROGRESS_BYTES = 1 << 20
#: Bodies with wrong checksums before the file is given up: the server's file, and not the way, is wrong then.
_MOST_MISMATCHES = 2
#: Refusals that pass by themselves.
_PASSING = {408, 425, 429}


class Unreachable(MorphomeError):
    """No attempt got a usable answer: the network, a proxy or the server is at fault, and not the file."""


class Stopped(Exception):
    """The caller asked to stop; the part stays for the next time."""


class _Again(Exception):
    """An attempt failed in a way that another one may mend. ``wait_s``: the pause that the server asked for."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        self.wait_s = wait_s
        super().__init__(reason)


class RateLimiter:
    """At most so many bytes a second for all threads together (a token bucket that holds half a second).

    Args:
        mb_per_second: 10^6 bytes a second; above 0.
    """

    BURST_S = 0.5

    def __init__(self, mb_per_second: float) -> None:
        if not mb_per_second > 0:
            raise MorphomeError(f"mb_per_second is {mb_per_second}", "give a number above 0, or no limit at all")
        self._bytes_s = mb_per_second * 1e6
        self._full_at = 0.0  # when the bucket would be full again
        self._lock = threading.Lock()

    def take(self, n_bytes: int, stop: threading.Event | None = None) -> None:
        """Wait until ``n_bytes`` may have come. Threads queue in the order of their calls; ``stop`` ends the wait."""
        with self._lock:
            now = time.monotonic()
            self._full_at = max(now, self._full_at) + n_bytes / self._bytes_s
            wait_s = self._full_at - now - self.BURST_S
        if wait_s > 0:
            _sleep(wait_s, stop)


def make_client(*, timeout_s: float = 60.0, connections: int = 4) -> httpx.Client:
    """A client for :func:`fetch_file`: proxies and certificates of the environment, no account.

    Args:
        timeout_s: longest silence of the server, and longest wait for a connection, in seconds.
        connections: kept open at most.
    """
    return httpx.Client(
        timeout=timeout_s,
        follow_redirects=True,
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        headers={"User-Agent": f"morphome/{__version__}"},
    )


def fetch_file(
    file: RemoteFile,
    client: httpx.Client,
    *,
    limiter: RateLimiter | None = None,
    progress: Callable[[int], object] | None = None,
    attempts: int = 8,
    say: Callable[[str], object] = print,
    stop: threading.Event | None = None,
) -> bool:
    """Fetch a file; goes on with what an earlier attempt left.

    Args:
        file: what to fetch, and where to.
        client: of :func:`make_client`; threads may share it.
        limiter: shared by the threads.
        progress: gets bytes as they come; bytes of an earlier attempt at once, thrown away ones as a negative number.
        attempts: failures in a row without progress before it gives up.
        say: gets a line for each failure that is tried again.
        stop: ends the transfer at the next chunk when set.

    Returns:
        False when the target was there already, or another process fetched it meanwhile.

    Raises:
        MorphomeError: the target's name is taken, the server refuses, or twice the checksum was wrong.
        Unreachable: all attempts failed. NoRoom: no room on the disk; the part is kept.
        Stopped: ``stop`` was set; the part is kept.
    """
    if stop and stop.is_set():
        raise Stopped
    if is_there(file):
        return False
    try:
        file.target.parent.mkdir(parents=True, exist_ok=True)
        part = _lock_part(file, say, stop)
        if part is None:
            return False
        with part:
            transfer = _Transfer(file, client, part, limiter, progress or (lambda n: None), attempts, say, stop)
            try:
                transfer.run()
            finally:
                if not os.fstat(part.fileno()).st_size:  # nothing to go on with
                    file.part.unlink(missing_ok=True)
    except OSError as error:
        raise system_error(file, error) from None
    return True


def _lock_part(file: RemoteFile, say: Callable[[str], object], stop: threading.Event | None) -> io.FileIO | None:
    """The part, locked until it is closed; None when another process had the lock and has finished the file."""
    told = False
    while not is_there(file):
        part = io.FileIO(os.open(file.part, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        with contextlib.ExitStack() as undo, contextlib.suppress(FileNotFoundError):
            undo.enter_context(part)
            if not _lock(part, file):
                if not told:
                    say(f"{file.name}: another process fetches it; waiting")
                told = True
                _sleep(LOCK_POLL_S, stop)
            # The one before may have renamed or deleted the part between our opening and our lock.
            elif os.path.samestat(os.fstat(part.fileno()), file.part.stat()):
                if not is_there(file):
                    undo.pop_all()
                    return part
                file.part.unlink()
    return None


def _lock(part: io.FileIO, file: RemoteFile) -> bool:
    """Whether the lock was free. A file system without locks (some of clusters) gives a warning, and no lock."""
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warnings.warn(
            f"{file.part}: cannot be locked ({error.strerror}); do not fetch the same file twice at a time",
            MorphomeWarning,
            stacklevel=2,
        )
    return True


class _Transfer:
    """One file on its way: what is there, and how often it failed."""

    def __init__(
        self,
        file: RemoteFile,
        client: httpx.Client,
        part: io.FileIO,
        limiter: RateLimiter | None,
        progress: Callable[[int], object],
        attempts: int,
        say: Callable[[str], object],
        stop: threading.Event | None,
    ) -> None:
        self.file, self.client, self.part, self.limiter = file, client, part, limiter
        self.progress, self.attempts, self.say, self.stop = progress, attempts, say, stop
        self.size = file.size
        self.have = self.furthest = part.seek(0, os.SEEK_END)
        self.received = self.failures = self.mismatches = 0
        self.use_ranges = True

    def run(self) -> None:
        """All attempts, then the name.

        Raises:
            MorphomeError, Stopped, OSError: see :func:`fetch_file`.
        """
        self.progress(self.have)
        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Again),
            stop=lambda state: self.failures >= self.attempts,
            wait=self._wait_s,
            before_sleep=self._tell,
            sleep=lambda seconds: _sleep(seconds, self.stop),
            reraise=True,
        )
        try:
            again(self._attempt)
        except _Again as error:
            raise Unreachable(
                f"{self.file.name}: cannot be fetched from {self.file.url}: {error} ({self.failures} failures)",
                "check the network (and HTTPS_PROXY, if your site has a proxy) and run the step again, which goes on "
                "where it stopped; if the file was replaced meanwhile, make the list of files anew",
            ) from None

    def _attempt(self) -> None:
        try:
            if self.size is not None and self.have > self.size:
                self._start_over()
            if self.have != self.size:
                self._receive()
            self._finish()
        except _Again:
            # A long file over a bad line may break often; only failures without progress count against it. The
            # furthest point ever reached is what counts, or a server without ranges would be asked for ever.
            if self.have >= self.furthest + _PROGRESS_BYTES:
                self.failures, self.furthest = 0, self.have
            self.failures += 1
            raise

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception()
        if error.wait_s is not None:
            return error.wait_s
        return random.uniform(0.5, 1) * min(MOST_WAIT_S, FIRST_WAIT_S * 2 ** (self.failures - 1))

    def _tell(self, state: tenacity.RetryCallState) -> None:
        self.say(
            f"{self.file.name}: {state.outcome.exception()}; again in {state.next_action.sleep:.0f} s "
            f"(failure {self.failures} of {self.attempts})"
        )

    def _receive(self) -> None:
        """Ask for what is missing and append it to the part."""
        start = self.have if self.use_ranges else 0
        # A compressed answer would have another length and could not be resumed.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        try:
            with self.client.stream("GET", self.file.url, headers=headers, follow_redirects=True) as answer:
                if self._accept(answer, start):
                    self._append(answer)
        except (httpx.UnsupportedProtocol, httpx.TooManyRedirects, httpx.InvalidURL) as error:
            raise MorphomeError(f"{self.file.name}: {self.file.url}: {error}", "correct the address") from None
        except httpx.TransportError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise MorphomeError(
                    f"{self.file.name}: {self.file.url}: the certificate is not trusted ({error})",
                    "if your site has a proxy of its own, set SSL_CERT_FILE to its certificates",
                ) from None
            got = f" after {self.have:,} bytes" if self.have else ""
            raise _Again(f"{type(error).__name__}: {str(error) or 'the server is silent'}{got}") from None
        if self.size is not None and self.have < self.size:
            raise _Again(f"the answer ended after {self.have:,} of {self.size:,} bytes")

    def _accept(self, answer: httpx.Response, start: int) -> bool:
        """Whether a body follows that goes on at ``have``; everything unfit is refused before a byte is written."""
        status = answer.status_code
        if status == 416 and start:
            total = re.fullmatch(r"bytes \*/(\d+)", answer.headers.get("Content-Range", ""))
            if self.size is None and total and int(total[1]) == self.have:
                self.size = self.have
                return False
            self.use_ranges = False
            raise _Again(f"the server has nothing after {start:,} bytes; beginning again")
        if status in _PASSING or status >= 500:
            raise _Again(f"the server answers {status}: {server_message(answer)}", retry_after_s(answer))
        if 400 <= status < 500:
            raise refused(self.file, answer)
        if status not in (200, 206):
            raise _Again(f"the server answers {status}")
        if (encoding := answer.headers.get("Content-Encoding", "identity")) != "identity":
            raise _Again(f"the server sends it as {encoding}, which was not asked for")
        if status == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
            total = int(found[2]) if found and found[2] != "*" else self.size
            if not start or not found or int(found[1]) != start or self.size not in (None, total):
                self.use_ranges = False
                raise _Again(
                    f"asked for bytes {start:,} and on, the server sends '{answer.headers.get('Content-Range', '')}'"
                )
            self.size = total
            return True
        announced = answer.headers.get("Content-Length")
        if announced is not None and self.file.size not in (None, int(announced)):
            kind = answer.headers.get("Content-Type", "")
            page = "; it is a web page, of a proxy or a login" if "html" in kind else ""
            raise _Again(f"the server announces {int(announced):,} bytes, expected {self.file.size:,}{page}")
        self._start_over()  # the whole file comes, whatever was asked for
        if announced is not None:
            self.size = int(announced)
        self.use_ranges = True
        return True

    def _append(self, answer: httpx.Response) -> None:
        self.part.seek(self.have)
        window_start, window_bytes = time.monotonic(), 0
        for chunk in answer.iter_raw():
            if self.size is not None and self.have + len(chunk) > self.size:
                expected = self.size
                self._start_over()
                raise _Again(f"the server sends more than the {expected:,} bytes expected")
            rest = memoryview(chunk)
            while rest:  # a nearly full disk takes a piece and refuses the rest at the next call
                written = self.part.write(rest)
                self.have += written
                self.received += written
                self.progress(written)
                rest = rest[written:]
            window_bytes += len(chunk)
            if self.limiter:
                self.limiter.take(len(chunk), self.stop)
            elif (seconds := time.monotonic() - window_start) > SLOW_WINDOW_S:
                if window_bytes < SLOWEST_BYTES:
                    raise _Again(f"only {window_bytes:,} bytes in {seconds:.0f} s")
                window_start, window_bytes = time.monotonic(), 0
            if self.stop and self.stop.is_set():
                raise Stopped

    def _start_over(self) -> None:
        self.part.truncate(0)  # not deleted: the lock is on this very file
        self.part.seek(0)
        self.progress(-self.have)
        self.have = self.received = 0
        self.size = self.file.size  # what another answer announced need not hold for the next

    def _finish(self) -> None:
        """Check the part and give it its name."""
        if wrong := wrong_checksum(self.file, self.file.part):
            # What a process before us left says nothing about what the server sends.
            self.mismatches += bool(self.received)
            n_bytes = self.have
            self._start_over()
            if self.mismatches < _MOST_MISMATCHES:
                raise _Again(f"what came {wrong}")
            self.file.part.unlink()
            raise MorphomeError(
                f"{self.file.name}: {self.file.url} {wrong} ({n_bytes:,} bytes, fetched {self.mismatches} times)",
                "a proxy may change files on the way: try another network; or the file was replaced: make the list of "
                "files anew",
            )
        os.fsync(self.part.fileno())
        if is_there(self.file):  # by the user's own hand, while we fetched
            self.file.part.unlink()
            return
        self.file.part.replace(self.file.target)
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            folder = os.open(self.file.target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _sleep(seconds: float, stop: threading.Event | None) -> None:
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise Stopped
