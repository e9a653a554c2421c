"""Where weights lie, what they are, and when they are refused."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import replace

import pytest

from morphome.errors import MorphomeError
from morphome.features import registry, weights
from morphome.features.registry import ENCODERS, encoder_spec
from morphome.features.weights import check_checksums, find_files, weights_folder, weights_id, weights_path

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """An empty folder of weights of its own."""
    monkeypatch.setenv("MORPHOME_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def put(path, content=CONTENT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def pinned(monkeypatch):
    """The row of uni as if the checksum of ``CONTENT`` were known."""

    def pin(**checksums):
        monkeypatch.setitem(ENCODERS, "uni", replace(ENCODERS["uni"], **checksums))
        encoder_spec.cache_clear()
        weights._identify.cache_clear()

    yield pin
    monkeypatch.undo()
    encoder_spec.cache_clear()
    weights._identify.cache_clear()


def test_weights_lie_below_the_variable_or_the_home(root, monkeypatch, tmp_path):
    assert weights_folder("virchow2:cls") == root / "virchow2"
    monkeypatch.delenv("MORPHOME_WEIGHTS")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights_folder("uni") == tmp_path / ".cache" / "morphome" / "encoders" / "uni"


def test_absent_weights_say_how_to_get_them(root, tmp_path):
    with pytest.raises(MorphomeError, match="morphome encoders prefetch uni"):
        weights_id({"encoder": "uni"})
    with pytest.raises(MorphomeError, match=r"features.weights.*gone.*does not exist"):
        weights_id({"encoder": "uni", "weights": str(tmp_path / "gone")})
    (tmp_path / "empty").mkdir()
    with pytest.raises(MorphomeError, match=r"holds no pytorch_model\.bin"):
        weights_id({"encoder": "uni", "weights": str(tmp_path / "empty")})
    with pytest.raises(MorphomeError, match="no public address") as caught:
        weights_id({"encoder": "ctranspath"})
    assert "features.weights" in caught.value.remedy
    assert "prefetch" not in caught.value.remedy


def test_unknown_checksums_need_the_opt_in(root):
    path = put(root / "uni" / "pytorch_model.bin")
    with pytest.raises(MorphomeError, match="allow_unpinned: true") as caught:
        weights_id({"encoder": "uni"})
    assert SHA256 in caught.value.problem
    assert str(path) in caught.value.problem
    assert weights_id({"encoder": "uni", "allow_unpinned": True}) == SHA256


@pytest.mark.parametrize("known", [{"weights_sha256": (SHA256,)}, {"weights_md5": ("0" * 32, MD5)}])
def test_the_registrys_checksum_is_enough(known, root, pinned):
    pinned(**known)
    put(root / "uni" / "pytorch_model.bin")
    assert weights_id({"encoder": "uni"}) == SHA256


@pytest.mark.parametrize("known", [{"weights_sha256": ("0" * 64,)}, {"weights_md5": ("0" * 32,)}])
def test_another_checksum_than_the_registrys_is_always_refused(known, root, pinned):
    pinned(**known)
    put(root / "uni" / "pytorch_model.bin")
    for allow in (False, True):
        with pytest.raises(MorphomeError, match="the weights of 'uni' have 0000"):
            weights_id({"encoder": "uni", "allow_unpinned": allow})


def test_the_same_file_has_the_same_identity_wherever_it_lies(root, tmp_path):
    put(root / "uni" / "pytorch_model.bin")
    file = put(tmp_path / "mine" / "model.safetensors")
    features = {"encoder": "uni", "allow_unpinned": True}
    ids = [weights_id({**features, "weights": place}) for place in ("", str(file), str(file.parent))]
    assert ids == [SHA256] * 3
    assert weights_path({**features, "weights": str(file.parent)}) == file


def test_all_files_of_a_model_count(root):
    folder = root / "phikon"
    put(folder / "config.json", b"{}")
    put(folder / "model.safetensors")
    put(folder / "README.md", b"a")
    features = {"encoder": "phikon", "allow_unpinned": True}
    first = weights_id(features)
    lines = f"config.json:{hashlib.sha256(b'{}').hexdigest()}\nmodel.safetensors:{SHA256}"
    assert first == hashlib.sha256(lines.encode()).hexdigest()
    assert weights_path(features) == folder
    put(folder / "README.md", b"b")
    assert weights_id(features) == first
    put(folder / "config.json", b'{"layers": 3}')
    assert weights_id(features) != first
    with pytest.raises(MorphomeError, match="needs its folder"):
        weights_id({**features, "weights": str(folder / "model.safetensors")})


def test_the_first_alternative_is_taken(root):
    put(root / "uni" / "model.safetensors", b"other")
    assert [p.name for p in find_files(ENCODERS["uni"], root / "uni")] == ["model.safetensors"]
    put(root / "uni" / "pytorch_model.bin")
    assert [p.name for p in find_files(ENCODERS["uni"], root / "uni")] == ["pytorch_model.bin"]


def test_a_remembered_checksum_counts_for_the_same_size_and_time_only(root):
    path = put(root / "uni" / "pytorch_model.bin")
    features = {"encoder": "uni", "allow_unpinned": True}
    assert weights_id(features) == SHA256
    sidecar = root / "checksums.json"
    kept = json.loads(sidecar.read_text())
    assert kept[str(path)]["sha256"] == SHA256

    # A new process would trust the sidecar: shown with a wrong digest in it.
    weights._identify.cache_clear()
    weights._checksum.cache_clear()
    sidecar.write_text(json.dumps({str(path): {**kept[str(path)], "sha256": "f" * 64}}))
    assert weights_id(features) == "f" * 64
    # ... but not for a file of another time, nor of another size.
    os.utime(path, ns=(time.time_ns(), time.time_ns()))
    assert weights_id(features) == SHA256
    put(path, CONTENT + b"!")
    assert weights_id(features) == hashlib.sha256(CONTENT + b"!").hexdigest()


def test_a_damaged_sidecar_or_a_folder_that_is_read_only_costs_time_only(root, monkeypatch):
    put(root / "uni" / "pytorch_model.bin")
    put(root / "checksums.json", b"{nonsense")
    assert weights_id({"encoder": "uni", "allow_unpinned": True}) == SHA256

    def refuse(*_):
        raise PermissionError("read-only")

    weights._identify.cache_clear()
    weights._checksum.cache_clear()
    (root / "checksums.json").unlink()
    monkeypatch.setattr(weights, "write_text", refuse)
    assert weights_id({"encoder": "uni", "allow_unpinned": True}) == SHA256
    assert not (root / "checksums.json").exists()


def test_a_folder_that_cannot_even_be_made_costs_time_only(tmp_path, monkeypatch):
    path = put(tmp_path / "mine.pth")
    put(tmp_path / "file")
    monkeypatch.setenv("MORPHOME_WEIGHTS", str(tmp_path / "file" / "below"))
    assert weights.checksum(path) == SHA256


def test_a_file_that_is_not_what_was_fetched_is_refused(root):
    path = put(root / "uni" / "pytorch_model.bin")
    record = {"files": {"pytorch_model.bin": {"sha256": "a" * 64}}}
    put(root / "uni" / "weights.json", json.dumps(record).encode())
    with pytest.raises(MorphomeError, match="damaged or replaced"):
        check_checksums(ENCODERS["uni"], [path], allow_unpinned=True)


def test_encoders_without_weights_have_no_file():
    assert weights_id({"encoder": "stain_texture"}) == ""
    assert len(weights_id({"encoder": "tiny_random"})) == 64
    with pytest.raises(MorphomeError, match="no weights"):
        weights_path({"encoder": "stain_texture"})


def test_asking_again_is_cheap(root):
    """The graph of a cohort asks thousands of times."""
    put(root / "uni" / "pytorch_model.bin", b"x" * 2_000_000)
    features = {"encoder": "uni", "allow_unpinned": True}
    tiling = {"patch_px": 224, "mpp_target": 0.5}
    registry.fingerprint(features, tiling)
    started = time.thread_time()
    for _ in range(1000):
        registry.fingerprint(features, tiling)
    assert time.thread_time() - started < 1.0
