"""A list of files: room first, one failure does not stop the others, the record comes when all are there."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from morphome.download import fetch, transfer
from morphome.download.fetch import FETCHED_FORMAT, require_space, run_fetch
from morphome.download.remote import RemoteFile
from morphome.errors import MorphomeError
from morphome.files import read_json

N, SIZE = 6, 50_000
SETTINGS = {"gdc": {"projects": ["TCGA-AA"]}}


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_WAIT_S", 0.0)


@pytest.fixture
def cohort(gdc):
    """A server of six slides, and the list of them below a folder: ``cohort(tmp_path, faults) -> (server, files)``."""
    servers = []

    def start(folder: Path, faults: dict[int, list[str]] | None = None, n: int = N):
        records = [gdc.slide_record(f"TCGA-AA-{i:04d}", size=SIZE) for i in range(n)]
        by_id = {records[i]["file_id"]: queue for i, queue in (faults or {}).items()}
        server = gdc.GdcServer(records, faults=by_id)
        servers.append(server.__enter__())
        files = [
            RemoteFile(
                f"{server.url}/data/{record['file_id']}",
                folder / record["file_id"] / record["file_name"],
                record["file_size"],
                record["md5sum"],
            )
            for record in records
        ]
        return server, files

    yield start
    for server in servers:
        server.__exit__()


def right(file: RemoteFile) -> bool:
    """The target is right, and nothing lies beside it."""
    found = hashlib.md5(file.target.read_bytes()).hexdigest()
    return found == file.md5 and list(file.target.parent.iterdir()) == [file.target]


def quiet(line: str) -> None:
    """Says nothing."""


def test_all_come_and_the_record_says_so(cohort, tmp_path: Path) -> None:
    server, files = cohort(tmp_path / "gdc", {1: ["503"], 2: ["cut:7"], 3: ["corrupt"]})
    out, said = tmp_path / "fetched.json", []
    run_fetch(files=files, out=out, settings=SETTINGS, say=said.append)
    assert all(right(file) for file in files)
    record = read_json(out, FETCHED_FORMAT, SETTINGS)
    names = sorted(file.target.name for file in files)
    assert [row["name"] for row in record["files"]] == names and record["bytes"] == N * SIZE
    assert {row["name"]: (row["bytes"], row["md5"]) for row in record["files"]} == {
        file.target.name: (SIZE, file.md5) for file in files
    }
    assert said[0] == "0 of 6 files are here; 6 to fetch, 0.00 GB"
    assert sum(line.endswith(" of 6)") and ": here (" in line for line in said) == N

    # Once more, in another order: no question, and the same bytes.
    before, n_asked = out.read_bytes(), len(server.log)
    run_fetch(files=files[::-1], out=out, settings=SETTINGS, connections=1, say=said.append)
    assert out.read_bytes() == before and len(server.log) == n_asked
    assert said[-1] == "6 of 6 files are here; 0 to fetch, 0.00 GB"


def test_one_failure_does_not_stop_the_others(cohort, tmp_path: Path) -> None:
    server, files = cohort(tmp_path / "gdc", {0: ["403"], 1: ["404"], 4: ["corrupt", "corrupt"]})
    files[5].target.parent.mkdir(parents=True)
    files[5].target.write_bytes(b"mine")
    out = tmp_path / "fetched.json"
    with pytest.raises(MorphomeError, match="4 of 6 files could not be fetched") as caught:
        run_fetch(files=files, out=out, settings=SETTINGS, connections=2, say=quiet)
    for file, word in zip((files[0], files[1], files[4], files[5]), ("403", "404", "md5", "4 bytes"), strict=True):
        assert any(file.target.name in line and word in line for line in caught.value.problem.splitlines())
    assert "What came stays" in caught.value.remedy and "open to everyone" in caught.value.remedy
    assert right(files[2]) and right(files[3]) and not out.exists()
    assert not any(files[i].target.exists() for i in (0, 1, 4)) and files[5].target.read_bytes() == b"mine"

    # The faults have passed; the user moved his file away.
    files[5].target.unlink()
    n_asked = len(server.log)
    run_fetch(files=files, out=out, settings=SETTINGS, say=quiet)
    assert all(right(file) for file in files) and out.exists()
    assert len(server.log) == n_asked + 4


def test_only_the_first_five_failures_are_named(cohort, tmp_path: Path) -> None:
    _, files = cohort(tmp_path / "gdc", {i: ["404"] for i in range(8)}, n=8)
    with pytest.raises(MorphomeError, match="8 of 8 files") as caught:
        run_fetch(files=files, out=tmp_path / "out.json", settings=SETTINGS, say=quiet)
    assert caught.value.problem.count("answers 404") == 5
    assert caught.value.problem.endswith("and 3 more") and caught.value.remedy.count("withdrawn") == 1


def test_a_server_that_is_gone_is_not_asked_for_every_file(cohort, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fetch, "_MOST_UNREACHABLE", 3)
    server, files = cohort(tmp_path / "gdc", {i: ["503", "always"] for i in range(20)}, n=20)
    with pytest.raises(MorphomeError, match="20 of 20 files could not be fetched") as caught:
        run_fetch(files=files, out=tmp_path / "out.json", settings=SETTINGS, connections=1, say=quiet)
    assert "were not tried to their end" in caught.value.problem
    assert {path for _, path, _ in server.log} < {f"/data/{file.target.parent.name}" for file in files}
    assert not list(tmp_path.rglob("*.svs*"))


def test_no_room_is_told_before_anything_is_fetched(cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, files = cohort(tmp_path / "deep" / "gdc")
    usage = fetch.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: usage._replace(free=N * SIZE - 1))
    with pytest.raises(MorphomeError, match=r"6 files that are still missing need 0\.0 GB") as caught:
        run_fetch(files=files, out=tmp_path / "out.json", settings=SETTINGS, say=quiet)
    assert str(tmp_path / "deep" / "gdc") in caught.value.problem and server.log == []
    # What is half there needs less.
    files[0].part.parent.mkdir(parents=True)
    files[0].part.write_bytes(b"x")
    run_fetch(files=files, out=tmp_path / "out.json", settings=SETTINGS, say=quiet)
    assert all(right(file) for file in files)


def test_a_disk_that_runs_full_stops_the_rest(cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, files = cohort(tmp_path / "gdc")
    real, n_synced = os.fsync, []

    def full_at_the_second(handle: int) -> None:
        n_synced.append(handle)
        if len(n_synced) > 2:  # the first file and its folder
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full_at_the_second)
    with pytest.raises(MorphomeError, match="No space left on device") as caught:
        run_fetch(files=files, out=tmp_path / "out.json", settings=SETTINGS, connections=1, say=quiet)
    assert "make room" in caught.value.remedy and "4 were not tried to their end" in caught.value.problem
    assert right(files[0]) and files[1].part.exists() and len(server.log) <= 3
    monkeypatch.setattr(os, "fsync", real)
    run_fetch(files=files, out=tmp_path / "out.json", settings=SETTINGS, say=quiet)
    assert all(right(file) for file in files)


def test_several_at_a_time_and_a_limit_for_all(cohort, tmp_path: Path) -> None:
    _, files = cohort(tmp_path / "gdc", {i: ["slow:0.05"] for i in range(N)})
    started = time.monotonic()
    run_fetch(files=files, out=tmp_path / "out.json", settings=SETTINGS, connections=6, say=quiet)
    assert time.monotonic() - started < 6 * 8 * 0.05  # one after the other would take longer
    _, files = cohort(tmp_path / "again")
    started = time.monotonic()
    run_fetch(files=files, out=tmp_path / "out.json", settings=SETTINGS, mb_per_second=0.3, say=quiet)
    assert time.monotonic() - started > 0.4  # 0.3 MB, of which half a second's are in the bucket
    assert all(right(file) for file in files)


def test_an_empty_list_is_a_record_of_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run_fetch(files=[], out=out, settings=SETTINGS, say=quiet)
    assert read_json(out, FETCHED_FORMAT, SETTINGS)["files"] == []


def test_interrupting_keeps_what_came(cohort, tmp_path: Path) -> None:
    server, files = cohort(tmp_path / "gdc", {i: ["slow:0.3"] for i in range(1, N)})

    def interrupt(line: str) -> None:
        if ": here (" in line:
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_fetch(files=files, out=tmp_path / "out.json", settings=SETTINGS, connections=3, say=interrupt)
    assert time.monotonic() - started < 5 and len(server.log) <= 4
    assert right(files[0]) and not (tmp_path / "out.json").exists()
    server.faults.clear()
    run_fetch(files=files, out=tmp_path / "out.json", settings=SETTINGS, say=quiet)
    assert all(right(file) for file in files)


def test_require_space_asks_the_folder_that_exists(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 0, "nothing")
    with pytest.raises(MorphomeError, match=r"not/yet: [\d.]+ GB free, but 12 slides need 1000000000.0 GB"):
        require_space(tmp_path / "not" / "yet", 10**18, "12 slides")
    assert not (tmp_path / "not").exists()
