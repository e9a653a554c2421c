"""List, doctor and prefetch, the last against a small server that speaks what a hub client needs."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from huggingface_hub import constants

from morphome.download import transfer
from morphome.errors import MorphomeError
from morphome.features import prefetch as prefetch_module
from morphome.features import weights
from morphome.features.build import build_model
from morphome.features.encoder_tools import doctor, encoder_rows, slide_encoder_rows, table_text
from morphome.features.prefetch import prefetch, run_weights
from morphome.features.registry import ENCODERS, encoder_spec
from morphome.features.weights import promised_sha256, weights_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BODY = bytes(range(256)) * 40
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """An empty folder of weights, and no token."""
    monkeypatch.setenv("MORPHOME_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "weights"


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories with files, some gated; and plain files that may break off half-way."""

    protocol_version = "HTTP/1.1"
    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
    gated: ClassVar[set[str]] = set()
    breaks_at: int | None = None
    seen: ClassVar[list[tuple[str, str, str | None]]] = []

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send: bool) -> None:
        self.seen.append((self.command, self.path, self.headers.get("Range")))
        path = self.path.split("?")[0].strip("/")
        for repository, files in self.repositories.items():
            if path.startswith(f"api/models/{repository}"):
                revision = path.partition("/revision/")[2] or "main"
                if revision not in ("main", COMMIT, "v1"):
                    return self.reply(404, b"{}", send, {"X-Error-Code": "RevisionNotFound"})
                siblings = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
                body = json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
                return self.reply(200, body.encode(), send, {"Content-Type": "application/json"})
            if path.startswith(f"{repository}/resolve/"):
                if repository in self.gated and "authorization" not in {k.lower() for k in self.headers}:
                    return self.reply(401, b"", send, {"X-Error-Code": "GatedRepo"})
                name = path.split("/resolve/")[1].partition("/")[2]
                body = files[name]
                etag = hashlib.sha256(body).hexdigest()
                return self.reply(200, body, send, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        if path == "file.pth":
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            part = {"Content-Range": f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"} if start else {}
            return self.reply(206 if start else 200, BODY[start:], send, part)
        return self.reply(404, b"{}", send, {"X-Error-Code": "RepoNotFound"})

    def reply(self, status: int, body: bytes, send: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not send:
            return
        if self.breaks_at is not None:
            self.wfile.write(body[: self.breaks_at])
            self.close_connection = True
            return
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch):
    """Address of the running server; the class holds what it serves and has seen."""
    Hub.repositories, Hub.gated, Hub.breaks_at, Hub.seen = {}, set(), None, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    yield address
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def change(monkeypatch):
    """Change a row of the registry for one test."""

    def apply(key, **facts):
        monkeypatch.setitem(ENCODERS, key, replace(ENCODERS[key], **facts))
        encoder_spec.cache_clear()
        weights._identify.cache_clear()

    yield apply
    monkeypatch.undo()
    encoder_spec.cache_clear()
    weights._identify.cache_clear()


# -- prefetch from a hub ------------------------------------------------------------------------------------------
def test_prefetch_takes_what_the_model_needs_and_records_it(hub, root):
    Hub.repositories["owkin/phikon"] = {
        "README.md": b"words",
        "config.json": b"{}",
        "model.safetensors": BODY,
        "pytorch_model.bin": b"the same again",
    }
    said: list[str] = []
    folder = prefetch("phikon", say=said.append)
    assert folder == root / "phikon"
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "weights.json"}
    assert (folder / "model.safetensors").read_bytes() == BODY
    record = json.loads((folder / "weights.json").read_text())
    assert record["revision"] == COMMIT
    assert record["source"] == "hf:owkin/phikon"
    assert record["files"]["model.safetensors"] == {"bytes": len(BODY), "sha256": SHA256}
    assert any(COMMIT in line for line in said)
    assert [path.name for path in root.iterdir() if path.name.startswith(".phikon")] == [".phikon.lock"]
    assert weights_id({"encoder": "phikon", "allow_unpinned": True})
    # A second time nothing is fetched.
    n_seen = len(Hub.seen)
    assert prefetch("phikon:cls_mean", say=said.append) == folder
    assert len(Hub.seen) == n_seen
    assert "already" in said[-1]


def test_prefetch_takes_the_revision_asked_for_and_replaces(hub, root):
    Hub.repositories["MahmoodLab/UNI"] = {"pytorch_model.bin": b"old"}
    prefetch("uni", say=str)
    Hub.repositories["MahmoodLab/UNI"]["pytorch_model.bin"] = BODY
    folder = prefetch("uni", revision="v1", say=str)
    assert (folder / "pytorch_model.bin").read_bytes() == BODY
    assert any("/revision/v1" in path for _, path, _ in Hub.seen)
    assert weights_id({"encoder": "uni", "allow_unpinned": True}) == SHA256
    with pytest.raises(MorphomeError, match="no revision 'v9'"):
        prefetch("uni", revision="v9", say=str)
    assert (folder / "pytorch_model.bin").read_bytes() == BODY


def test_prefetch_keeps_nothing_of_an_interrupted_fetch_of_something_else(hub, root):
    Hub.repositories["MahmoodLab/UNI"] = {"model.safetensors": BODY}
    (root / ".uni.part").mkdir(parents=True)
    (root / ".uni.part" / "pytorch_model.bin").write_bytes(b"of another revision, and the first alternative")
    folder = prefetch("uni", say=str)
    assert [path.name for path in sorted(folder.iterdir())] == ["model.safetensors", "weights.json"]


def test_prefetch_says_where_to_accept_a_licence(hub, root):
    Hub.repositories["MahmoodLab/UNI"] = {"pytorch_model.bin": BODY}
    Hub.gated = {"MahmoodLab/UNI"}
    for repositories in (Hub.repositories, {}):  # a hub hides what it does not give
        Hub.repositories = repositories
        with pytest.raises(MorphomeError, match="does not let you in") as caught:
            prefetch("uni", say=str)
        assert "https://huggingface.co/MahmoodLab/UNI" in caught.value.remedy
        assert "CC-BY-NC-ND-4.0" in caught.value.remedy
    assert not (root / "uni").exists()


def test_prefetch_without_network_says_what_to_do(root, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MorphomeError, match=r"cannot fetch from http://127\.0\.0\.1:9/MahmoodLab/UNI") as caught:
        prefetch("uni", say=str)
    assert str(root / "uni") in caught.value.remedy


def test_prefetch_refuses_another_checksum_and_a_full_disk(hub, root, change, monkeypatch):
    Hub.repositories["MahmoodLab/UNI"] = {"pytorch_model.bin": BODY}
    change("uni", weights_sha256=("0" * 64,))
    with pytest.raises(MorphomeError, match="have 0000"):
        prefetch("uni", say=str)
    assert not (root / "uni").exists()
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(prefetch_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(MorphomeError, match="GB free"):
        prefetch("uni", say=str)


def test_prefetch_of_a_repository_without_the_file_says_so(hub):
    Hub.repositories["MahmoodLab/UNI"] = {"README.md": b"words"}
    with pytest.raises(MorphomeError, match=r"holds none of pytorch_model\.bin"):
        prefetch("uni", say=str)


# -- prefetch from an address -------------------------------------------------------------------------------------
def test_prefetch_from_an_address_goes_on_where_it_stopped(hub, root, change, monkeypatch):
    monkeypatch.setattr(transfer, "FIRST_WAIT_S", 0.0)
    change("resnet50_trunc", source=f"{hub}/file.pth", weights_sha256=(SHA256,))
    Hub.breaks_at = 1000
    with pytest.raises(MorphomeError, match="cannot fetch"):
        prefetch("resnet50_trunc", say=str)
    assert not (root / "resnet50_trunc").exists()
    Hub.breaks_at = None
    folder = prefetch("resnet50_trunc", say=str)
    assert Hub.seen[-1] == ("GET", "/file.pth", "bytes=4000-")  # after four attempts of 1,000 bytes
    assert [path.name for path in sorted(folder.iterdir())] == ["resnet50-0676ba61.pth", "weights.json"]
    assert weights_id({"encoder": "resnet50_trunc"}) == SHA256


def test_a_wrong_file_from_an_address_is_fetched_anew(hub, root, change, monkeypatch):
    monkeypatch.setattr(transfer, "FIRST_WAIT_S", 0.0)
    change("resnet50_trunc", source=f"{hub}/file.pth", weights_sha256=("0" * 64,))
    for _ in range(2):
        Hub.seen.clear()
        with pytest.raises(MorphomeError, match="expected 0000"):
            prefetch("resnet50_trunc", say=str)
        assert [method for method, *_ in Hub.seen] == ["GET", "GET"]
    change("resnet50_trunc", source=f"{hub}/file.pth", weights_sha256=(SHA256,))
    assert prefetch("resnet50_trunc", say=str) == root / "resnet50_trunc"


def test_nothing_to_fetch_is_said(capsys):
    prefetch("stain_texture")
    assert "nothing to fetch" in capsys.readouterr().out
    with pytest.raises(MorphomeError, match="no public address") as caught:
        prefetch("ctranspath")
    assert "ctranspath.pth" in caught.value.remedy


def test_a_second_prefetch_waits_and_finds_the_weights(hub, root, change):
    change("resnet50_trunc", source=f"{hub}/file.pth", weights_sha256=(SHA256,))
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: prefetch("resnet50_trunc", say=str), range(4)))
    assert set(folders) == {root / "resnet50_trunc"}
    assert [path for _, path, _ in Hub.seen] == ["/file.pth"]


def test_weights_of_a_run_are_fetched_once_and_promised_before(hub, root, change, tmp_path):
    change("resnet50_trunc", source="https://example.org/file.pth", weights_sha256=(SHA256,))
    features, settings = {"encoder": "resnet50_trunc"}, {"features": {"encoder": "resnet50_trunc"}}
    assert promised_sha256(features) == SHA256 == weights_id(features)
    change("resnet50_trunc", source=f"{hub}/file.pth", weights_sha256=(SHA256,))
    for _ in range(2):
        run_weights(settings=settings, features=features, out=tmp_path / "weights.json")
    assert [path for _, path, _ in Hub.seen] == ["/file.pth"]
    (root / "resnet50_trunc" / "resnet50-0676ba61.pth").write_bytes(b"another")
    with pytest.raises(MorphomeError, match="damaged or replaced"):
        weights_id(features)


# -- list ---------------------------------------------------------------------------------------------------------
def test_the_list_shows_every_encoder_and_where_its_weights_are(root):
    rows = {row["key"]: row for row in encoder_rows()}
    assert set(rows) == set(ENCODERS)
    assert rows["virchow2"]["dim"] == "2560 1280:cls"
    assert (rows["uni"]["gated"], rows["uni"]["weights"], rows["uni"]["pinned"]) == ("yes", "prefetch", "no")
    assert rows["ctranspath"]["weights"] == "by hand"
    assert rows["stain_texture"]["weights"] == "none needed"
    (root / "uni").mkdir(parents=True)
    (root / "uni" / "pytorch_model.bin").write_bytes(BODY)
    assert {row["key"]: row for row in encoder_rows()}["uni"]["weights"] == "here"
    lines = table_text(list(rows.values())).splitlines()
    assert len(lines) == len(rows) + 1
    assert lines[0].split()[:3] == ["key", "dim", "input_px"]
    column = lines[0].index("licence")
    assert all(line[column - 1] == " " for line in lines[1:])
    assert "titan" in table_text(slide_encoder_rows())


# -- doctor -------------------------------------------------------------------------------------------------------
def found(checks):
    return {check.name: check for check in checks}


def test_doctor_of_an_encoder_without_weights():
    checks = found(doctor(["stain_texture"]))
    assert {check.status for check in checks.values()} == {"ok"}
    assert "64 finite values" in checks["forward"].detail


def test_doctor_names_what_is_missing_and_never_a_token(monkeypatch):
    checks = found(doctor(["uni"]))
    assert checks["weights"].status == checks["access"].status == "fail"
    assert "prefetch uni" in checks["weights"].remedy
    assert "https://huggingface.co/MahmoodLab/UNI" in checks["access"].remedy
    assert checks["disk"].status == "ok"
    assert "forward" not in checks
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    again = doctor(["uni", "conch_v1"])
    assert found(again[:4])["access"].status == "ok"
    assert "secret" not in "\n".join(map(str, again))
    assert "CONCH.git" in "\n".join(map(str, again))


def test_doctor_tries_the_weights_that_are_here(root, change, tmp_path, timm):
    spec = encoder_spec("tiny_random")
    change("uni", arch=spec.arch, arch_kwargs=spec.arch_kwargs, variants={"cls": (48, "cls")}, dim=48, params_m=0.1)
    state = build_model(spec, None).network.state_dict()
    (root / "uni").mkdir(parents=True)
    path = root / "uni" / "pytorch_model.bin"
    torch.save(state, path)
    checks = found(doctor(["uni"]))
    assert [check.status for check in checks.values()] == ["ok", "ok", "warn", "ok"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() in checks["checksum"].detail
    assert "48 finite values" in checks["forward"].detail

    state["norm.weight"] = state["norm.weight"] * float("nan")
    torch.save(state, path)
    assert "finite: False" in found(doctor(["uni"]))["forward"].detail
    torch.save({"a": torch.zeros(1)}, path)
    assert found(doctor(["uni"]))["forward"].status == "fail"
    change("uni", weights_sha256=("0" * 64,))
    checks = found(doctor(["uni"], {"weights": str(path)}))
    assert checks["checksum"].status == "fail"
    assert "forward" not in checks


def test_doctor_runs_no_code_of_others_unasked(root):
    folder = root / "hibou_b"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(BODY)
    checks = found(doctor(["hibou_b"]))
    assert checks["code"].status == checks["forward"].status == "warn"
    assert "trust_remote_code" in checks["code"].remedy
