"""Files that are no slides, and slides under names and places that trip programs up."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from morphome.slides.openslide_reader import OpenSlideReader

PAGE = b"<!DOCTYPE html>\n<html><head><title>503 Service Unavailable</title></head><body>Try again later.</body></html>"
NAMES = [
    "two words.svs", "it's \"quoted\".svs", "[1] (2) {3}.svs", "Präparat № 7 组织.svs", "-rf.svs", "a;b&c|d$e`f`.svs",
    "%20percent%s.svs", "100%.svs", "new\nline.svs", "trailing dot..svs", ".hidden.svs", "x" * 240 + ".svs", "noending",
]  # fmt: skip


def png(path: Path) -> None:
    Image.new("RGB", (300, 200), "pink").save(path, "PNG")


def jpg(path: Path) -> None:
    Image.new("RGB", (300, 200), "pink").save(path, "JPEG")


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("slide.svs", "not here")


def hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((3, 4))


#: What writes the file, and what the message shows of it: its first bytes and its size.
CONTENTS = {
    "empty": (lambda p: p.write_bytes(b""), "0 bytes"),
    "one byte": (lambda p: p.write_bytes(b"I"), "1 bytes, first bytes b'I'"),
    "random": (lambda p: p.write_bytes(np.random.default_rng(7).bytes(1001)), "1001 bytes"),
    "zeros": (lambda p: p.write_bytes(bytes(5000)), r"first bytes b'\x00\x00"),
    "web page": (lambda p: p.write_bytes(PAGE), "<!DOCTYPE html>"),
    "manifest line": (lambda p: p.write_text("id\tfilename\tmd5\tsize\tstate\n"), r"id\tfilename"),
    "png": (png, "PNG"),
    "jpeg": (jpg, "JFIF"),
    "zip": (archive, "PK"),
    "hdf5": (hdf5, "HDF"),
    "tiff magic": (lambda p: p.write_bytes(b"II*\0"), "4 bytes"),
    "tiff to nowhere": (lambda p: p.write_bytes(b"II*\0\xff\xff\xff\x7f" + bytes(100)), "108 bytes"),
    "tiff to itself": (lambda p: p.write_bytes(b"II*\0\x08\0\0\0" + b"\0\0\x08\0\0\0"), ""),
    "bigtiff magic": (lambda p: p.write_bytes(b"II+\0\x08\0\0\0" + b"\xff" * 8), "16 bytes"),
}


@pytest.mark.parametrize("reader", ["auto", "openslide"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_a_file_that_is_no_slide_is_named_with_its_size_and_first_bytes(tile, tmp_path, kind, reader):
    write, words = CONTENTS[kind]
    path = tmp_path / "TCGA-XX-0000-01Z-00-DX1.svs"
    write(path)
    outcome = tile(path, reader=reader)
    code = "unsupported_format" if "tiff" in kind else "unreadable"
    assert outcome.result[1] in {code, "unreadable"}
    outcome.refused(outcome.result[1], str(path), words)


def test_a_directory_that_points_at_itself_ends(tile, files, tmp_path):
    """A chain of directories that closes into a ring must not be followed for ever."""
    path = files.svs(tmp_path / "ring.svs")
    content = bytearray(path.read_bytes())
    first = int.from_bytes(content[4:8], "little")
    at = first + 2 + 12 * int.from_bytes(content[first : first + 2], "little")
    content[at : at + 4] = first.to_bytes(4, "little")
    path.write_bytes(content)
    outcome = tile(path)
    assert outcome.result in {("ok", ""), ("failed", "unreadable"), ("failed", "unsupported_format")}


def test_a_slide_with_a_wrong_ending_is_read_by_its_content(tile, files, tmp_path):
    path = files.svs(tmp_path / "slide.svs")
    whole = tile(path)
    for name in ("slide.jpg", "slide.h5", "slide.SVS", "slide.tiff"):
        other = tile(path.rename(tmp_path / name))
        path = tmp_path / name
        assert other.result == ("ok", ""), name
        np.testing.assert_array_equal(other.data["coords"], whole.data["coords"])


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_slide_of_any_name_gives_the_same_tiles_and_features(tile, encode, files, tmp_path, name):
    path = files.svs(tmp_path / "slides" / name)
    tiled = tile(path)
    assert tiled.result == ("ok", ""), tiled.attrs["reason"]
    encoded = encode(path)
    assert encoded.result == ("ok", ""), encoded.attrs["reason"]
    assert len(encoded.data["features"]) == len(tiled.data["coords"]) == 24


@pytest.mark.parametrize("slide", ["two words", "[1]", "Präparat № 7", "-rf", "x" * 200])
def test_a_slide_id_of_any_name_names_its_outputs(tile, encode, files, tmp_path, slide):
    path = files.svs(tmp_path / "slide.svs")
    assert tile(path, slide).path.name == f"{slide}.h5"
    assert encode(path, slide).attrs["slide_id"] == slide


def test_a_relative_name_with_a_leading_dash(tile, files, tmp_path, monkeypatch):
    files.svs(tmp_path / "-v.svs")
    monkeypatch.chdir(tmp_path)
    assert tile(Path("-v.svs")).result == ("ok", "")


def test_a_folder_instead_of_a_file(tile, tmp_path):
    folder = tmp_path / "slide.svs"
    folder.mkdir()
    tile(folder).refused("missing_file", str(folder), "empty")
    (folder / "notes.txt").write_text("nothing here")
    tile(folder).refused("unreadable", "notes.txt")
    (folder / "notes.txt").unlink()
    (folder / "deeper").mkdir()
    tile(folder).refused("missing_file", str(folder))


def test_a_symbolic_link(tile, files, tmp_path):
    link = tmp_path / "link.svs"
    link.symlink_to(tmp_path / "slides" / "slide.svs")
    tile(link).refused("missing_file", str(link))
    files.svs(tmp_path / "slides" / "slide.svs")
    assert tile(link).result == ("ok", "")
    link.unlink()
    link.symlink_to(link)
    outcome = tile(link)
    outcome.refused(outcome.result[1], str(link))
    assert outcome.result[1] in {"missing_file", "unreadable"}


def give_up_capabilities() -> None:
    """Let the rights of files hold for root too (Linux, capset of version 3 with nothing effective)."""
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, nothing) == 0


def test_no_right_to_read(tile, files, tmp_path, in_child):
    path = files.svs(tmp_path / "slides" / "locked.svs")
    path.chmod(0)

    def work() -> str:
        give_up_capabilities()
        return tile(path).refused("unreadable", str(path), "ermission denied")

    code, text = in_child(work)
    assert code == 0
    assert "rights" in text


def test_no_right_to_enter_the_folder(tile, files, tmp_path, in_child):
    path = files.svs(tmp_path / "slides" / "slide.svs")
    path.parent.chmod(0)

    def work() -> str:
        give_up_capabilities()
        outcome = tile(path)
        return outcome.refused(outcome.result[1], str(path))

    code, text = in_child(work)
    path.parent.chmod(0o755)
    assert code == 0
    assert "ermission denied" in text


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_ordinary_file_is_refused_and_never_waited_for(tile, tmp_path, in_child, kind, monkeypatch):
    path = tmp_path / "endless.svs"
    monkeypatch.chdir(tmp_path)  # the name of a socket is at most 108 bytes long
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(path.name)
    else:
        path.symlink_to("/dev/zero")
    code, text = in_child(lambda: tile(path).attrs["reason"], seconds=5)
    assert code == 0, "hangs or crashes"
    assert str(path) in text
    assert "Remedy" in text


def test_a_folder_with_a_pipe_in_it_does_not_hang(tile, files, tmp_path, in_child):
    folder = tmp_path / "series"
    folder.mkdir()
    os.mkfifo(folder / "0.dcm")
    files.svs(folder / "1.svs")
    code, text = in_child(lambda: str(tile(folder).result), seconds=5)
    assert (code, text) == (0, "('ok', '')")


def test_a_path_below_a_file(tile, files, tmp_path):
    path = files.svs(tmp_path / "slide.svs")
    tile(path / "below.svs").refused("missing_file", "below.svs")


def test_a_path_that_is_too_long(tile, tmp_path):
    outcome = tile(tmp_path / ("y" * 300 + ".svs"))
    outcome.refused(outcome.result[1], "y" * 300)
    assert outcome.result[1] in {"missing_file", "unreadable"}


def test_a_copy_gives_the_same_features(tile, encode, files, tmp_path):
    """The place of a slide is no part of its results."""
    first = files.svs(tmp_path / "a" / "slide.svs")
    second = tmp_path / "b" / "other name.svs"
    second.parent.mkdir()
    shutil.copy(first, second)
    tile(first)
    one, two = encode(first), encode(second, folder="again")
    assert one.result == two.result == ("ok", "")
    np.testing.assert_array_equal(one.data["features"], two.data["features"])
    with OpenSlideReader(first) as reader:
        assert reader.facts.width_px == 512
