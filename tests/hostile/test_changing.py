"""Files that change under a reader's feet: removed, replaced, cut off while they are open or between the steps."""

from __future__ import annotations

import os

import numpy as np
import pytest

from morphome.errors import MorphomeError
from morphome.features import feed
from morphome.slides.open import open_slide
from morphome.slides.reader import SlideError

PLACES = [(x, y) for y in range(64, 320, 64) for x in range(64, 448, 64)]


def pixels_or_errors(slide) -> list[np.ndarray | str]:
    """Each tile of tissue: its pixels, or the code of the error."""
    found = []
    for x, y in PLACES:
        try:
            found.append(slide.read_level0(x, y, 64, 64))
        except SlideError as error:
            assert error.remedy
            found.append(error.code)
    return found


def check_true_or_error(found, expected) -> int:
    """No pixel but the true ones; how many tiles were read."""
    for one, other in zip(found, expected, strict=True):
        if not isinstance(one, str):
            np.testing.assert_array_equal(one, other)
        else:
            assert one in {"unreadable", "missing_file", "slide_changed"}
    return sum(not isinstance(one, str) for one in found)


@pytest.fixture
def original(files, tmp_path):
    """A slide, its pixels, and another slide of the same size and shape with other pixels."""
    path = files.svs(tmp_path / "slides" / "slide.svs", directories_first=True)
    other = files.svs(tmp_path / "slides" / "other.svs", files.board(seed=5), directories_first=True)
    with open_slide(path, "openslide") as slide:
        expected = pixels_or_errors(slide)
    assert not any(isinstance(e, str) for e in expected)
    return path, other, expected


@pytest.mark.parametrize(("reader", "change"), [
    ("auto", "removed"), ("auto", "replaced"), ("auto", "cut"), ("auto", "emptied"),
    # OpenSlide opens the path again when it likes; that a file was replaced is found by the steps (below).
    ("openslide", "removed"), ("openslide", "cut"), ("openslide", "emptied"),
])  # fmt: skip
@pytest.mark.parametrize("handle", ["first", "another"])
def test_while_it_is_open(original, in_child, reader, change, handle):
    """A handle shows the pixels of the file that was opened, or an error; a crash (a mapped file) is neither."""
    path, other, expected = original

    def work() -> str:
        with open_slide(path, reader) as slide:
            slide.read_level0(0, 0, 16, 16)
            if change == "removed":
                path.unlink()
            elif change == "replaced":
                other.replace(path)
            else:
                os.truncate(path, 0 if change == "emptied" else path.stat().st_size // 2)
            if handle == "first":
                return str(check_true_or_error(pixels_or_errors(slide), expected))
            try:
                with slide.another() as second:
                    return str(check_true_or_error(pixels_or_errors(second), expected))
            except SlideError as error:
                assert str(path) in error.problem
                return "0"

    code, shown = in_child(work)
    assert code == 0
    if change == "emptied" and handle == "another":
        assert shown == "0"


@pytest.mark.parametrize("change", ["removed", "replaced", "cut", "emptied", "longer", "one byte"])
def test_between_tile_and_encode(tile, encode, original, change):
    """What was tiled is what is encoded, or the slide fails and says that it is another file."""
    path, other, _ = original
    tiled = tile(path)
    if change == "removed":
        path.unlink()
    elif change == "replaced":
        other.replace(path)
    elif change == "longer":
        with path.open("ab") as file:
            file.write(b"\0")
    elif change == "one byte":
        content = bytearray(path.read_bytes())
        content[-2000] ^= 1
        path.write_bytes(content)
    else:
        os.truncate(path, 0 if change == "emptied" else path.stat().st_size // 2)
    outcome = encode(path)
    codes = {
        "removed": {"missing_file"},
        "emptied": {"unreadable", "slide_changed"},
        "cut": {"unreadable", "slide_changed"},
    }
    assert outcome.result[1] in codes.get(change, {"slide_changed"})
    outcome.refused(outcome.result[1], str(path))
    np.testing.assert_array_equal(outcome.data["failed_coords"], tiled.data["coords"])


def test_removed_before_it_is_tiled(tile, encode, original):
    path, _, _ = original
    path.unlink()
    tile(path).refused("missing_file", str(path))
    encode(path).refused("missing_file", str(path))


@pytest.mark.parametrize("reader", ["auto", "openslide"])
@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_in_the_middle_of_encoding(tile, encode, original, reader, change, monkeypatch):
    """The file is exchanged after the first tiles: no bag of two slides."""
    path, other, _ = original
    whole_tiles = tile(path, reader=reader)
    good = encode(path, folder="good", reader=reader)
    assert good.result == ("ok", "")
    real, calls = feed.read_block, {"n": 0}

    def exchanging(*arguments, **named):
        calls["n"] += 1
        if calls["n"] == 1:
            result = real(*arguments, **named)
            other.replace(path) if change == "replaced" else path.unlink()
            return result
        return real(*arguments, **named)

    monkeypatch.setattr(feed, "read_block", exchanging)
    outcome = encode(path, folder="mixed", reader=reader)
    assert calls["n"] >= 1
    if outcome.result == ("ok", ""):
        np.testing.assert_array_equal(outcome.data["features"], good.data["features"])
    else:
        assert outcome.result[1] in {"slide_changed", "unreadable", "missing_file", "too_many_failed_tiles"}
        outcome.refused(outcome.result[1], str(path))
        assert len(outcome.data["failed_coords"]) == len(whole_tiles.data["coords"])


def test_tiles_that_were_half_written(tile, encode, original):
    """A tile file that is cut off, empty or another HDF5 file is named, and the remedy is to tile again."""
    path, _, _ = original
    h5 = tile(path).path
    content = h5.read_bytes()
    for damage in (content[: len(content) // 2], content[:100], b"", b"\0" * len(content), content[:-1]):
        h5.write_bytes(damage)
        with pytest.raises(MorphomeError, match=r"S\.h5: ") as caught:
            encode(path)
        assert "tile step" in caught.value.remedy or "again" in caught.value.remedy
    h5.write_bytes(content)
    assert encode(path).result == ("ok", "")
