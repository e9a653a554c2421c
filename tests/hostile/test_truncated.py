"""Downloads that stopped: a slide cut off anywhere fails with a reason, or gives the true pixels of what is there."""

from __future__ import annotations

import numpy as np
import pytest

from morphome.slides.open import open_slide
from morphome.slides.reader import SlideError

CODES = {("failed", "unreadable"), ("failed", "unsupported_format")}


@pytest.mark.parametrize("big", [False, True])
def test_cut_off_where_the_directory_is_lost(tile, files, tmp_path, big):
    """Streams first, directories at the end, as a scanner writes: any cut loses them."""
    content = files.svs(tmp_path / "whole.svs", big=big).read_bytes()
    path = tmp_path / "cut.svs"
    for length in (2, 3, 4, 7, 8, 9, 15, 16, 100, len(content) // 2, len(content) - 300, len(content) - 1):
        path.write_bytes(content[:length])
        outcome = tile(path)
        if length == len(content) - 1:
            # Only the last byte of the empty link to a next directory is gone.
            assert outcome.result in CODES | {("ok", "")}
            continue
        assert outcome.result in CODES, length
        outcome.refused(outcome.result[1], str(path), f"{length} bytes")


@pytest.mark.parametrize("big", [False, True])
def test_cut_off_within_a_directory(tile, files, tmp_path, big):
    """Directories first: every cut inside them, with the streams behind them gone as well."""
    content = files.svs(tmp_path / "whole.svs", big=big, directories_first=True).read_bytes()
    start = content.index(b"\xff\xd8")
    path = tmp_path / "cut.svs"
    for length in range(16, start, 107):
        path.write_bytes(content[:length])
        outcome = tile(path)
        assert outcome.result[0] == "failed", length
        outcome.refused(outcome.result[1], str(path))


@pytest.mark.parametrize("reader", ["auto", "openslide"])
def test_cut_off_within_the_tiles(tile, files, tmp_path, reader):
    """The directory is whole and the slide opens: the lost tiles must be an error, never white and never grey."""
    whole = files.svs(tmp_path / "whole.svs", directories_first=True)
    content = whole.read_bytes()
    start = content.index(b"\xff\xd8")
    with open_slide(whole, "openslide") as slide:
        expected = {(x, y): slide.read_level0(x, y, 64, 64) for y in (0, 64, 192, 320) for x in (0, 192, 384)}
    path = tmp_path / "cut.svs"
    for share in (0.0, 0.05, 0.4, 0.8, 0.97):
        path.write_bytes(content[: start + int(share * (len(content) - start))])
        lost = 0
        for (x, y), pixels in expected.items():
            # A handle keeps an error for its life: each tile gets its own.
            try:
                with open_slide(path, reader) as slide:
                    found = slide.read_level0(x, y, 64, 64)
            except SlideError as error:
                assert error.code == "unreadable"
                assert str(path) in error.problem
                lost += 1
            else:
                np.testing.assert_array_equal(found, pixels)
        assert 0 < lost <= 12, share
        assert (lost < 12) == (share > 0.3), (share, lost)
        outcome = tile(path, reader=reader)
        if lost > 6:
            outcome.refused("unreadable", str(path), "bytes")


def test_tiles_lost_after_tiling_are_failed_tiles(tile, encode, files, tmp_path):
    """Half of the streams become zeros between the steps; the first MiB and the size would give it away at once."""
    path = files.svs(tmp_path / "slide.svs", directories_first=True)
    tiled = tile(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    outcome = encode(path)
    outcome.refused("slide_changed", str(path))
    assert len(outcome.data["failed_coords"]) == len(tiled.data["coords"])


@pytest.mark.parametrize("limit", [0.01, 0.5])
def test_zeroed_streams_are_counted_and_left_out(tile, encode, files, tmp_path, limit):
    """A disk that returned zeros for some tiles, none of which the tile step looks at."""
    # Three neighbours of the first row of tissue; each native tile is a tile, and the overview comes from level 4.
    lost = {10: [512, 256], 11: [768, 256], 12: [1024, 256]}
    image = files.board().repeat(4, 0).repeat(4, 1)
    common = {"tile": 256, "mpp": "0.1250", "power": "80"}

    def holes(streams):
        return [bytes(len(s)) if number in lost else s for number, s in enumerate(streams)]

    whole = files.svs(tmp_path / "whole.svs", image, **common)
    broken = files.svs(tmp_path / "broken.svs", image, streams=holes, **common)
    tile(whole, "whole")
    good = encode(whole, "whole")
    assert tile(broken, "broken").result == ("ok", "")
    found = encode(broken, "broken", max_failed_tiles=limit)
    assert found.data["failed_coords"].tolist() == list(lost.values())
    if limit < 0.1:
        found.refused("too_many_failed_tiles", "3 of 24 tiles", str(broken))
        return
    assert found.result == ("ok", "")
    kept = [c not in lost.values() for c in good.data["coords"].tolist()]
    np.testing.assert_array_equal(found.data["features"], good.data["features"][kept])
    np.testing.assert_array_equal(found.data["coords"], good.data["coords"][kept])
