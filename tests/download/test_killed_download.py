"""Processes that are killed in the middle of a download, and processes that fetch the same file at the same time."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from morphome.download.fetch import run_fetch
from morphome.download.remote import RemoteFile

SIZE = 400_000
CODE = """
import json, sys
from pathlib import Path
from morphome.download.fetch import run_fetch
from morphome.download.remote import RemoteFile
rows, out = json.loads(sys.argv[1]), Path(sys.argv[2])
files = [RemoteFile(url, Path(target), size, md5) for url, target, size, md5 in rows]
run_fetch(files=files, out=out, settings={}, connections=2, say=print)
"""


@pytest.fixture
def slow_server(gdc):
    """``slow_server(stall_s)``: two slides, each in eight pieces with stalls between them at the first asking."""
    servers = []

    def begin(stall_s: float):
        records = [gdc.slide_record(f"TCGA-AA-000{i}", size=SIZE) for i in range(2)]
        server = gdc.GdcServer(records, faults={record["file_id"]: [f"slow:{stall_s}"] for record in records})
        servers.append(server.__enter__())
        return server

    yield begin
    for server in servers:
        server.__exit__()


def listed(server, folder: Path) -> list[RemoteFile]:
    return [
        RemoteFile(f"{server.url}/data/{r['file_id']}", folder / r["file_id"] / r["file_name"], SIZE, r["md5sum"])
        for r in server.files
    ]


def start(files: list[RemoteFile], out: Path) -> subprocess.Popen:
    rows = json.dumps([(file.url, str(file.target), file.size, file.md5) for file in files])
    return subprocess.Popen([sys.executable, "-c", CODE, rows, str(out)], stdout=subprocess.PIPE, text=True)


def right(file: RemoteFile) -> bool:
    return hashlib.md5(file.target.read_bytes()).hexdigest() == file.md5 and not file.part.exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_download_goes_on_where_it_stopped(slow_server, tmp_path: Path, how: signal.Signals) -> None:
    server = slow_server(1.0)
    files, out = listed(server, tmp_path / "gdc"), tmp_path / "out.json"
    with start(files, out) as process:
        deadline = time.monotonic() + 30
        while not all(file.part.exists() and file.part.stat().st_size > 0 for file in files):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(how)
        assert process.wait(20) != 0
    assert not any(file.target.exists() for file in files) and not out.exists()
    left = {file.target: file.part.stat().st_size for file in files}
    assert all(0 < size < SIZE for size in left.values())

    before = len(server.log)
    run_fetch(files=files, out=out, settings={}, say=lambda line: None)
    assert all(right(file) for file in files) and out.exists()
    asked = {path: asked for _, path, asked in server.log[before:]}
    assert asked == {f"/data/{file.target.parent.name}": f"bytes={left[file.target]}-" for file in files}


def test_two_processes_do_not_destroy_one_anothers_part(slow_server, tmp_path: Path) -> None:
    server = slow_server(0.15)
    files = listed(server, tmp_path / "gdc")
    processes = [start(files, tmp_path / f"{number}.json") for number in range(2)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert all(right(file) for file in files)
    assert len(server.log) == 2  # each file was asked for once
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()


def test_the_second_process_takes_over_from_a_killed_first(slow_server, tmp_path: Path) -> None:
    server = slow_server(2.0)
    files = listed(server, tmp_path / "gdc")[:1]
    with start(files, tmp_path / "0.json") as first:
        deadline = time.monotonic() + 30
        while not files[0].part.exists() or not files[0].part.stat().st_size:
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        with start(files, tmp_path / "1.json") as second:
            for line in second.stdout:
                if "another process" in line:
                    break
            first.kill()
            assert second.wait(30) == 0
    assert right(files[0])
    ranges = server.ranges(files[0].target.parent.name)
    assert ranges[0] is None and len(ranges) == 2 and ranges[1] not in (None, "bytes=0-")
