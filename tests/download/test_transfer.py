"""One file over a line that fails in every way: the target is absent or right, and a part is gone on with."""

from __future__ import annotations

import email.utils
import errno
import hashlib
import os
import random
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from morphome.download import answers, transfer
from morphome.download.remote import NoRoom, RemoteFile, is_there
from morphome.download.transfer import RateLimiter, Stopped, Unreachable, fetch_file, make_client
from morphome.errors import MorphomeError, MorphomeWarning

SIZE = 300_000
ID = "11111111-2222-3333-4444-555555555555"
BODY = b"".join(hashlib.sha256(str(n).encode()).digest() for n in range(SIZE // 32 + 1))[:SIZE]
MD5, SHA256 = hashlib.md5(BODY).hexdigest(), hashlib.sha256(BODY).hexdigest()


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(transfer, "LOCK_POLL_S", 0.01)


@pytest.fixture
def serve(gdc):
    """A server of one file with the faults given; closed at the end."""
    servers = []

    def start(*faults: str, **more):
        server = gdc.GdcServer([], contents={ID: BODY}, faults={ID: faults} if faults else None, **more)
        servers.append(server.__enter__())
        return server

    yield start
    for server in servers:
        server.__exit__()


def remote(server, folder: Path, **changes) -> RemoteFile:
    facts = {"url": f"{server.url}/data/{ID}", "target": folder / ID / "a.svs", "size": SIZE, "md5": MD5, "label": "a"}
    return RemoteFile(**{**facts, **changes})


def fetch(file: RemoteFile, *, timeout_s: float = 5.0, **options) -> bool:
    with make_client(timeout_s=timeout_s) as client:
        return fetch_file(file, client, say=options.pop("say", lambda line: None), **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def right(file: RemoteFile) -> bool:
    """The target is right, and nothing lies beside it."""
    return file.target.read_bytes() == BODY and names(file.target.parent) == [file.target.name]


def begun(file: RemoteFile, content: bytes) -> None:
    file.part.parent.mkdir(parents=True)
    file.part.write_bytes(content)


# -- the plain case ---------------------------------------------------------------------------------------------
def test_a_file_comes_whole_and_is_not_asked_for_again(serve, tmp_path: Path) -> None:
    server, seen = serve(), []
    file = remote(server, tmp_path, sha256=SHA256.upper())
    assert fetch(file, progress=seen.append) is True
    assert right(file) and sum(seen) == SIZE
    assert fetch(file) is False
    assert server.ranges(ID) == [None]
    mask = os.umask(0)
    os.umask(mask)
    assert file.target.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_file_of_unknown_size_is_checked_by_its_checksum(serve, tmp_path: Path) -> None:
    file = remote(serve("cut:1000", "html", "ok"), tmp_path, size=None)
    assert fetch(file) is True
    assert right(file)


def test_an_empty_file_and_one_that_nothing_is_known_of(serve, tmp_path: Path) -> None:
    server = serve()
    file = remote(server, tmp_path, size=0, md5=hashlib.md5(b"").hexdigest())
    assert fetch(file) is True
    assert file.target.read_bytes() == b""
    with pytest.raises(MorphomeError, match="neither size nor checksum"):
        remote(server, tmp_path, size=None, md5="")


def test_redirects_are_followed_and_a_circle_is_an_error(serve, tmp_path: Path) -> None:
    server = serve(f"redirect:/data/{ID}")
    file = remote(server, tmp_path)
    assert fetch(file) is True and right(file)
    file = remote(serve(f"redirect:/data/{ID}", "always"), tmp_path / "b")
    with pytest.raises(MorphomeError, match="redirect"):
        fetch(file)
    with pytest.raises(MorphomeError, match="unsupported protocol"):
        fetch(remote(server, tmp_path / "c", url="gopher://127.0.0.1/x"))


# -- faults that pass -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kept", [0, 1, 1000, 65_536, SIZE // 2, SIZE - 1])
def test_a_cut_is_gone_on_with_where_it_stopped(serve, tmp_path: Path, kept: int) -> None:
    server, said = serve(f"cut:{kept}"), []
    file = remote(server, tmp_path)
    assert fetch(file, say=said.append) is True
    assert right(file)
    assert server.ranges(ID) == [None, f"bytes={kept}-" if kept else None]
    assert len(said) == 1 and said[0].startswith("a: ") and "failure 1 of 8" in said[0]


@pytest.mark.parametrize(
    "faults",
    [
        ["503"] * 7,
        ["429", "500", "503", "cut:10", "429", "cut:0"],
        ["short"],
        ["long"],
        ["html"],
        ["corrupt"],
        ["slow:0.01"],
        ["cut:1000", "badrange"],
        ["cut:1000", "norange"],
        ["cut:1000", "short", "long", "html", "badrange", "cut:500", "norange"],
        ["wrongmd5"],
        ["cut:1000", "corrupt"],
        ["badrange"],
        ["badjson"],
    ],
    ids="-".join,
)
def test_faults_that_pass(serve, tmp_path: Path, faults: list[str]) -> None:
    file, seen = remote(serve(*faults), tmp_path), []
    assert fetch(file, progress=seen.append) is True
    assert right(file) and sum(seen) == SIZE


def test_silence_is_cut_short_by_the_timeout(serve, tmp_path: Path) -> None:
    file = remote(serve("hang:30"), tmp_path)
    started = time.monotonic()
    assert fetch(file, timeout_s=0.3) is True
    assert right(file) and time.monotonic() - started < 5


def test_a_trickle_is_given_up_and_taken_up_again(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SLOW_WINDOW_S", 0.05)
    monkeypatch.setattr(transfer, "SLOWEST_BYTES", SIZE)
    server, said = serve("slow:0.1"), []
    file = remote(server, tmp_path)
    assert fetch(file, say=said.append) is True
    assert right(file) and "bytes in 0 s" in said[0]
    assert server.ranges(ID)[1] not in (None, "bytes=0-")


def test_breaks_with_progress_do_not_count(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [f"cut:{SIZE // 20}"] * 15
    monkeypatch.setattr(transfer, "_PROGRESS_BYTES", 5_000)
    file = remote(serve(*faults), tmp_path)
    assert fetch(file, attempts=2) is True
    assert right(file)
    monkeypatch.setattr(transfer, "_PROGRESS_BYTES", SIZE)
    file = remote(serve(*faults), tmp_path / "b")
    with pytest.raises(Unreachable):
        fetch(file, attempts=2)
    assert not file.target.exists() and BODY.startswith(file.part.read_bytes())


class Broken(httpx.SyncByteStream):
    """Half of the body, then the connection breaks."""

    def __iter__(self):
        yield BODY[: SIZE // 2]
        raise httpx.ReadError("connection reset")


def test_breaks_of_a_server_without_ranges_are_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("Range"))
        return httpx.Response(200, headers={"Content-Length": str(SIZE)}, stream=Broken())

    monkeypatch.setattr(transfer, "_PROGRESS_BYTES", 1000)
    file = RemoteFile("https://example.org/x", tmp_path / "x", SIZE, MD5)
    with httpx.Client(transport=httpx.MockTransport(answer)) as client, pytest.raises(Unreachable, match="reset"):
        fetch_file(file, client, attempts=4, say=lambda line: None)
    assert asked == [None] + [f"bytes={SIZE // 2}-"] * 3
    assert not file.target.exists()


# -- faults that stay -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", ["503", "429", "cut:0", "short", "long", "html", "badrange"])
def test_faults_that_stay_end_with_an_error(serve, tmp_path: Path, fault: str) -> None:
    server = serve(fault, "always")
    file = remote(server, tmp_path)
    with pytest.raises(Unreachable, match=r"a: cannot be fetched from http.*3 failures") as caught:
        fetch(file, attempts=3)
    assert len(server.log) == 3
    assert names(file.target.parent) == []  # nothing to go on with
    expected = {"503": "503: Service Unavailable", "html": "it is a web page", "short": "announces 150,000 bytes, exp"}
    assert expected.get(fault, "") in caught.value.problem


def test_a_wrong_checksum_twice_is_an_error_and_deletes_the_part(serve, tmp_path: Path) -> None:
    server = serve("corrupt", "always")
    file, seen = remote(server, tmp_path), []
    with pytest.raises(MorphomeError, match=rf"a: .*has the md5 [0-9a-f]{{32}}, expected {MD5}.*fetched 2 times"):
        fetch(file, progress=seen.append)
    assert len(server.log) == 2 and sum(seen) == 0
    assert names(file.target.parent) == []
    file = remote(serve(), tmp_path / "b", sha256="0" * 64)
    with pytest.raises(MorphomeError, match=f"has the sha256 {SHA256}, expected 0000"):
        fetch(file)
    assert names(file.target.parent) == []


@pytest.mark.parametrize(("fault", "words"), [("403", "You don't have access"), ("404", "not found")])
def test_a_refusal_is_told_at_once(serve, tmp_path: Path, fault: str, words: str) -> None:
    server = serve(fault, "always")
    file = remote(server, tmp_path)
    with pytest.raises(MorphomeError, match=f"a: .*answers {fault}: {words}") as caught:
        fetch(file)
    assert not isinstance(caught.value, Unreachable) and caught.value.remedy
    assert len(server.log) == 1
    assert names(file.target.parent) == []


def test_nobody_listens(tmp_path: Path) -> None:
    file = RemoteFile("http://127.0.0.1:9/data/x", tmp_path / "x", 5, MD5)
    with pytest.raises(Unreachable, match=r"ConnectError.*3 failures"):
        fetch(file, attempts=3)
    assert names(tmp_path) == []


def test_an_untrusted_certificate_is_told_at_once(tmp_path: Path) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate in certificate chain")

    file = RemoteFile("https://example.org/x", tmp_path / "x", 5, MD5)
    with (
        httpx.Client(transport=httpx.MockTransport(refuse)) as client,
        pytest.raises(MorphomeError, match="certificate is not trusted") as caught,
    ):
        fetch_file(file, client)
    assert "SSL_CERT_FILE" in caught.value.remedy


def test_an_answer_that_was_compressed_is_not_taken(tmp_path: Path) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers["Accept-Encoding"])
        return httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=httpx.ByteStream(b"1234567"))

    file = RemoteFile("https://example.org/x", tmp_path / "x", None, MD5)
    with httpx.Client(transport=httpx.MockTransport(answer)) as client, pytest.raises(Unreachable, match="as gzip"):
        fetch_file(file, client, attempts=2, say=asked.append)
    assert asked[0] == asked[2] == "identity" and names(tmp_path) == []


ALL_FAULTS = [
    *("ok", "503", "429", "500", "403", "404", "slow:0.001", "corrupt", "short", "long", "wrongmd5", "norange"),
    *("badrange", "html", "badjson", "cut:0", "cut:1", "cut:1000", "cut:70000", f"cut:{SIZE - 1}"),
]


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_the_target_is_absent_or_right(serve, tmp_path: Path, seed: int) -> None:
    chance, server, ends = random.Random(seed), serve(), set()
    for number in range(12):
        file, seen = remote(server, tmp_path / str(number)), []
        server.faults[ID] = chance.choices(ALL_FAULTS, k=6)
        try:
            ends.add(fetch(file, attempts=3, progress=seen.append))
        except MorphomeError:
            ends.add("failed")
            assert not file.target.exists()
            assert sum(seen) == (file.part.stat().st_size if file.part.exists() else 0)
            server.faults.clear()
            assert fetch(file) is True
        assert right(file)
    assert ends == {True, "failed"}


# -- what an earlier attempt left -------------------------------------------------------------------------------
def test_a_whole_part_is_checked_and_not_fetched(serve, tmp_path: Path) -> None:
    server = serve()
    file = remote(server, tmp_path)
    begun(file, BODY)
    assert fetch(file) is True
    assert right(file) and server.log == []


@pytest.mark.parametrize(
    ("left", "ranges"),
    [(b"x" * SIZE, [None]), (b"x" * (SIZE + 5), [None]), (b"x" * 1000, ["bytes=1000-", None])],
    ids=["wrong", "long", "other start"],
)
def test_a_bad_part_is_thrown_away(serve, tmp_path: Path, left: bytes, ranges: list) -> None:
    server = serve()
    file, seen = remote(server, tmp_path), []
    begun(file, left)
    assert fetch(file, progress=seen.append) is True
    assert right(file) and sum(seen) == SIZE and server.ranges(ID) == ranges


def test_a_bad_part_is_not_held_against_the_server(serve, tmp_path: Path) -> None:
    file = remote(serve("corrupt"), tmp_path)
    begun(file, b"x" * SIZE)
    assert fetch(file) is True
    assert right(file)


def answering(answer, file: RemoteFile, **options) -> list[str | None]:
    """Fetch from ``answer(number of the request, first byte asked for)``; the Range headers it saw."""
    asked: list[str | None] = []

    def respond(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("Range"))
        return answer(len(asked), int((asked[-1] or "bytes=0-")[6:-1]))

    with httpx.Client(transport=httpx.MockTransport(respond)) as client:
        assert fetch_file(file, client, say=options.pop("say", lambda line: None), **options) is True
    return asked


def stream(status: int, body: bytes, **headers: str) -> httpx.Response:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, headers=sent, stream=httpx.ByteStream(body))


def test_a_server_with_wrong_ranges_is_asked_for_the_whole(tmp_path: Path) -> None:
    def answer(number: int, first: int) -> httpx.Response:
        if first:
            return stream(206, BODY[500:], Content_Range=f"bytes 500-{SIZE - 1}/{SIZE}")
        return stream(200, BODY)

    file, said = RemoteFile("https://example.org/x", tmp_path / "d" / "x", SIZE, MD5), []
    begun(file, BODY[:1000])
    assert answering(answer, file, say=said.append) == ["bytes=1000-", None]
    assert right(file)
    assert said[0].startswith("x: asked for bytes 1,000 and on, the server sends 'bytes 500-")


def test_a_server_that_sends_less_than_asked_for_is_asked_again(tmp_path: Path) -> None:
    def answer(number: int, first: int) -> httpx.Response:
        body = BODY[first : first + 100_000]
        return stream(206, body, Content_Range=f"bytes {first}-{first + len(body) - 1}/{SIZE}")

    file = RemoteFile("https://example.org/x", tmp_path / "d" / "x", SIZE, MD5)
    begun(file, BODY[:1000])
    assert answering(answer, file) == ["bytes=1000-", "bytes=101000-", "bytes=201000-"]
    assert right(file)


def test_what_a_wrong_page_announced_is_forgotten(tmp_path: Path) -> None:
    def answer(number: int, first: int) -> httpx.Response:
        return stream(200, b"log in", Content_Length="6") if number == 1 else stream(200, BODY)

    file = RemoteFile("https://example.org/x", tmp_path / "d" / "x", None, MD5)
    assert answering(answer, file) == [None, None]
    assert right(file)


def test_a_part_that_is_deleted_before_its_lock_is_made_anew(serve, tmp_path: Path, monkeypatch) -> None:
    real, n_locks = transfer._lock, []

    def late(part, file: RemoteFile) -> bool:
        n_locks.append(part)
        if len(n_locks) == 1:
            file.part.unlink()
        return real(part, file)

    monkeypatch.setattr(transfer, "_lock", late)
    file = remote(serve(), tmp_path)
    assert fetch(file) is True
    assert right(file) and len(n_locks) == 2


def test_a_part_of_a_file_of_unknown_size(serve, tmp_path: Path) -> None:
    server = serve()
    file = remote(server, tmp_path, size=None)
    begun(file, BODY)
    assert fetch(file) is True  # 416 says that nothing is left
    assert right(file) and server.ranges(ID) == [f"bytes={SIZE}-"]
    server = serve()
    file = remote(server, tmp_path / "b", size=None)
    begun(file, BODY + b"more")
    assert fetch(file) is True
    assert right(file) and server.ranges(ID) == [f"bytes={SIZE + 4}-", None]


# -- what has the name already ----------------------------------------------------------------------------------
def test_what_has_the_name_is_never_touched(serve, tmp_path: Path) -> None:
    server = serve()
    file = remote(server, tmp_path)
    file.target.parent.mkdir(parents=True)
    file.target.write_bytes(b"mine")
    with pytest.raises(MorphomeError, match=r"a\.svs: has 4 bytes, expected 300,000") as caught:
        fetch(file)
    assert "not overwritten" in caught.value.remedy
    assert file.target.read_bytes() == b"mine"
    file.target.unlink()
    file.target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(MorphomeError, match="a link to nowhere"):
        fetch(file)
    file.target.unlink()
    file.target.mkdir()
    with pytest.raises(MorphomeError, match="is not a file"):
        fetch(file)
    assert server.log == []


def test_a_file_of_the_users_own_hand_is_there(serve, tmp_path: Path) -> None:
    server = serve()
    file = remote(server, tmp_path)
    (tmp_path / "elsewhere.svs").write_bytes(BODY)
    file.target.parent.mkdir(parents=True)
    file.target.symlink_to(tmp_path / "elsewhere.svs")
    assert fetch(file) is False and is_there(file)
    by_checksum = remote(server, tmp_path, size=None)
    assert is_there(by_checksum)
    (tmp_path / "elsewhere.svs").write_bytes(b"other")
    with pytest.raises(MorphomeError, match="has the md5"):
        is_there(by_checksum)


def test_a_file_that_appears_meanwhile_is_kept(serve, tmp_path: Path) -> None:
    server = serve("slow:0.03")
    file = remote(server, tmp_path)

    def appears(n_bytes: int) -> None:
        if n_bytes and not file.target.exists():
            file.target.write_bytes(BODY)
            os.utime(file.target, (1, 1))

    assert fetch(file, progress=appears) is True
    assert right(file) and file.target.stat().st_mtime == 1


# -- the disk ---------------------------------------------------------------------------------------------------
def test_a_full_disk_keeps_the_part(serve, tmp_path: Path) -> None:
    server = serve()
    file = remote(server, tmp_path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(NoRoom, match=r"a\.svs\.part: cannot be read or written: File too large"):
            fetch(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not file.target.exists() and file.part.read_bytes() == BODY[:100_000]
    assert fetch(file) is True
    assert right(file) and server.ranges(ID) == [None, "bytes=100000-"]


def test_a_folder_that_cannot_be_made(serve, tmp_path: Path) -> None:
    (tmp_path / ID).write_text("a file where a folder should be")
    with pytest.raises(MorphomeError, match=r"File exists|Not a directory"):
        fetch(remote(serve(), tmp_path))


def test_a_failing_sync_gives_no_name(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    file = remote(serve(), tmp_path)
    with pytest.raises(MorphomeError, match="Input/output error"):
        fetch(file)
    assert not file.target.exists()


def test_a_file_system_without_locks_gives_a_warning(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: object, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(transfer.fcntl, "flock", fail)
    file = remote(serve(), tmp_path)
    with pytest.warns(MorphomeWarning, match="cannot be locked"):
        assert fetch(file) is True
    assert right(file)


# -- threads and stopping ---------------------------------------------------------------------------------------
def test_two_fetches_of_one_file_share_the_work(serve, tmp_path: Path) -> None:
    server = serve("slow:0.05")
    file, came, said = remote(server, tmp_path), [], []
    threads = [threading.Thread(target=lambda: came.append(fetch(file, say=said.append))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(came) == [False, False, True] and right(file)
    assert server.ranges(ID) == [None]
    assert said == ["a: another process fetches it; waiting"] * 2


def test_the_second_goes_on_where_the_first_gave_up(serve, tmp_path: Path) -> None:
    server = serve("cut:5000", "503")
    file = remote(server, tmp_path)
    with pytest.raises(Unreachable):
        fetch(file, attempts=2)
    assert fetch(file) is True
    assert right(file) and server.ranges(ID) == [None, "bytes=5000-", "bytes=5000-"]


def test_stop_ends_a_transfer_and_a_wait(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, stop = remote(serve("slow:0.05"), tmp_path), threading.Event()
    with pytest.raises(Stopped):
        fetch(file, stop=stop, progress=lambda n_bytes: n_bytes and stop.set())
    assert 0 < file.part.stat().st_size < SIZE and not file.target.exists()
    monkeypatch.setattr(transfer, "FIRST_WAIT_S", 60.0)
    file, stop = remote(serve("503", "always"), tmp_path / "b"), threading.Event()
    started = time.monotonic()
    with pytest.raises(Stopped):
        fetch(file, stop=stop, say=lambda line: stop.set())
    assert time.monotonic() - started < 5
    with pytest.raises(Stopped):
        fetch(file, stop=stop)


def test_waits_double_up_to_the_longest(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(transfer, "FIRST_WAIT_S", 8.0)
    monkeypatch.setattr(transfer, "_sleep", lambda seconds, stop: waits.append(seconds))
    assert fetch(remote(serve(*["503"] * 5, "429"), tmp_path)) is True
    bounds = [(4, 8), (8, 16), (16, 32), (30, 60), (30, 60), (0, 0)]  # the last as Retry-After says
    assert all(low <= wait <= high for wait, (low, high) in zip(waits, bounds, strict=True)), waits


def test_retry_after_in_seconds_and_as_a_date() -> None:
    def ask(text: str) -> float | None:
        return answers.retry_after_s(httpx.Response(503, headers={"Retry-After": text} if text else {}))

    assert ask("7") == 7 and ask("999999") == answers.MOST_RETRY_AFTER_S
    assert ask("") is None and ask("soon") is None
    assert 25 < ask(email.utils.formatdate(time.time() + 30, usegmt=True)) <= 30
    assert ask("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_what_a_server_says_in_a_page() -> None:
    def ask(status: int, body: bytes) -> str:
        return answers.server_message(httpx.Response(status, stream=httpx.ByteStream(body)))

    page = b"<html><style>p {color: red}</style><p>The file\n was <b>withdrawn</b></p></html>"
    assert ask(404, page) == "The file was withdrawn"
    assert ask(404, b"") == "Not Found"
    assert ask(500, b"\xff" * 9000) == "\ufffd" * 200
    assert ask(403, b'["a"]') == "['a']"


def test_a_limit_holds_for_all_threads_together() -> None:
    limiter = RateLimiter(1.0)
    started = time.monotonic()
    threads = [threading.Thread(target=lambda: [limiter.take(50_000) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.45 < time.monotonic() - started < 5  # a million bytes, of which half a second's are in the bucket
    with pytest.raises(MorphomeError, match="above 0"):
        RateLimiter(0)


def test_a_limited_transfer_is_slower_and_right(serve, tmp_path: Path) -> None:
    file = remote(serve(), tmp_path)
    limiter, started = RateLimiter(0.3), time.monotonic()
    assert fetch(file, limiter=limiter) is True
    assert right(file) and time.monotonic() - started > 0.4


def test_the_room_is_light() -> None:
    code = "import sys, morphome.download.fetch, morphome.download.published; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "httpx" in found and not {"numpy", "pandas", "torch", "h5py", "pyarrow"} & set(found)
