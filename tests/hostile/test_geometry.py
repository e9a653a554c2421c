"""Directories that lie: sizes, levels, offsets and byte counts that fit neither each other nor the file."""

from __future__ import annotations

import numpy as np
import pytest

from morphome.slides.open import open_slide
from morphome.slides.openslide_reader import OpenSlideReader
from morphome.slides.reader import SlideError


def test_a_slide_of_16_by_16_px(tile, files, tmp_path):
    image = files.board(64, 64)[24:40, 24:40]
    outcome = tile(files.svs(tmp_path / "tiny.svs", image, tile=16, levels=()))
    outcome.refused("no_tissue", "0 tiles")
    assert tile(tmp_path / "tiny.svs", min_tiles=0, min_fragment_mm2=0.0).result == ("ok", "")


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (63, 4096), (64, 64)])
def test_thin_and_tiny_slides(tile, files, tmp_path, size):
    image = np.full((*size, 3), files.TISSUE, np.uint8)
    outcome = tile(files.svs(tmp_path / "thin.svs", image, levels=()), min_fragment_mm2=0.0, min_tiles=0)
    assert outcome.result in {("ok", ""), ("failed", "no_tissue")}, outcome.attrs["reason"]
    assert len(outcome.data["coords"]) == (1 if size == (64, 64) else 0)


def test_levels_of_one_pixel(tile, files, tmp_path):
    outcome = tile(files.svs(tmp_path / "deep.svs", levels=(4, 16, 64, 384)))
    assert outcome.result == ("ok", "")
    assert len(outcome.data["coords"]) == 24
    assert "level_sizes" not in outcome.record["flags"] or outcome.record["verdict"] == "flag"


def lying(files, path, **sizes):
    """A slide whose second level claims another size (its tiles are there)."""
    image = files.board()
    tiles = [files.jpeg(t) for t in files.cut(image, 64)]
    second = [files.jpeg(np.full((64, 64, 3), files.TISSUE, np.uint8))] * 400
    width, height = sizes["width"], sizes["height"]
    count = (-(-width // 64)) * (-(-height // 64))
    return files.write_tiff(path, [
        files.page(512, 384, tiles, description=files.aperio(512, 384)),
        files.page(width, height, second[:count], description="Aperio Image Library\r\n1x1 -> 1x1", reduced=True),
    ])  # fmt: skip


@pytest.mark.parametrize(("width", "height"), [(1024, 768), (512, 385), (600, 96), (128, 800)])
def test_a_level_larger_than_level_0(tile, files, tmp_path, width, height):
    """OpenSlide sorts levels by size, and level 0 is then the false one: never tiled without a word."""
    outcome = tile(lying(files, tmp_path / "large.svs", width=width, height=height))
    if outcome.result != ("ok", ""):
        outcome.refused(outcome.result[1], "large.svs")
        assert outcome.result[1] in {"bad_levels", "unreadable", "unsupported_format"}
        return
    assert (outcome.record["width_px"], outcome.record["height_px"]) in {(512, 384), (width, height)}
    assert outcome.record["verdict"] == "flag"
    assert "level_sizes" in outcome.record["flags"]


def test_a_level_of_another_shape_is_flagged(tile, files, tmp_path):
    outcome = tile(lying(files, tmp_path / "odd.svs", width=128, height=300))
    assert outcome.result == ("ok", "")
    assert "level_sizes" in outcome.record["flags"]


@pytest.mark.parametrize("tag", ["WIDTH", "HEIGHT", "TILE_WIDTH", "TILE_HEIGHT"])
@pytest.mark.parametrize("value", [0, None, 2**31 - 1, 2**32 - 1])
def test_a_size_that_is_zero_missing_or_huge(tile, files, tmp_path, tag, value, in_child):
    changes = {getattr(files, tag): None if value is None else (files.LONG, [value])}
    path = files.svs(tmp_path / "size.svs", changes=changes)
    code, text = in_child(lambda: str(tile(path).refused(tile(path).result[1], str(path))))
    assert code == 0
    assert "Remedy" in text


@pytest.mark.parametrize("tile_px", [(48, 64), (64, 72), (128, 128), (32, 64)])
def test_a_tile_size_that_the_streams_contradict(tile, files, tmp_path, tile_px):
    changes = {files.TILE_WIDTH: (files.SHORT, [tile_px[0]]), files.TILE_HEIGHT: (files.SHORT, [tile_px[1]])}
    outcome = tile(files.svs(tmp_path / "size.svs", changes=changes))
    outcome.refused("unreadable", "size.svs", "bytes")


@pytest.mark.parametrize("reader", ["auto", "openslide"])
@pytest.mark.parametrize("offset", [1 << 30, (1 << 32) - 1, -1])
def test_offsets_behind_the_end_of_the_file(tile, files, tmp_path, offset, reader):
    """``-1`` is the last byte of the file: the stream begins inside and ends outside."""
    path = tmp_path / "far.svs"
    size = files.svs(path).stat().st_size

    def far(streams):
        return [(size + offset if offset < 0 else offset) if n in (18, 21, 28) else s for n, s in enumerate(streams)]

    def near(streams):
        return [600] * len(streams) if offset < 0 else streams

    changes = {files.COUNTS: (files.LONG8, near([len(files.jpeg(t)) for t in files.cut(files.board(), 64)]))}
    path = files.svs(path, streams=far, changes=changes)
    with open_slide(path, reader) as slide:
        for x, y in ((2 * 64, 2 * 64), (5 * 64, 2 * 64)):
            with pytest.raises(SlideError, match=r"far\.svs") as caught:
                slide.read_level0(x, y, 64, 64)
            assert caught.value.code == "unreadable"
    # Every tile is read where sharpness is asked: the whole slide fails, or just these tiles are left out.
    outcome = tile(path, reader=reader, min_sharpness=1e-9)
    if outcome.result == ("ok", ""):
        assert len(outcome.data["coords"]) == 21
    else:
        outcome.refused("unreadable", str(path))


@pytest.mark.parametrize("counts", [[1 << 31] * 48, [(1 << 32) - 1] * 48, [1] * 48])
def test_byte_counts_that_lie(tile, files, tmp_path, counts, in_child):
    """A forged length must neither be allocated nor believed."""
    path = files.svs(tmp_path / "counts.svs", changes={files.COUNTS: (files.LONG, counts)})
    code, text = in_child(lambda: tile(path).attrs["reason"] or "ok")
    assert code == 0
    if counts[0] == 1:
        assert str(path) in text
        return
    assert text == "ok" or str(path) in text


@pytest.mark.parametrize("number", [0, 5, 47, 49])
def test_too_few_or_too_many_tiles_in_the_tables(tile, files, tmp_path, number):
    """The size asks for 48 tiles: those without an entry are missing tiles, or the slide is refused."""
    path = files.svs(tmp_path / "few.svs", streams=lambda streams: [*streams, *streams][:number])
    outcomes = [tile(path, folder=reader, reader=reader) for reader in ("auto", "openslide")]
    assert outcomes[0].result[0] == outcomes[1].result[0]
    np.testing.assert_array_equal(outcomes[0].data["coords"], outcomes[1].data["coords"])
    if outcomes[0].result == ("ok", ""):
        same_pixels(path)
        assert number > 40
    else:
        outcomes[0].refused(outcomes[0].result[1], "few.svs")


def same_pixels(path) -> None:
    """Reader auto shows what OpenSlide shows."""
    with open_slide(path) as one, OpenSlideReader(path) as other:
        for y in range(0, 384, 64):
            for x in range(0, 512, 64):
                np.testing.assert_array_equal(one.read_level0(x, y, 64, 64), other.read_level0(x, y, 64, 64))


def test_tiles_that_lie_over_each_other(tile, encode, files, tmp_path):
    """All tiles share one stream, as glass does, and one begins inside another."""
    stream = files.jpeg(np.full((64, 64, 3), files.TISSUE, np.uint8))
    path = files.svs(tmp_path / "same.svs", streams=lambda streams: [stream] * len(streams))
    assert tile(path).result == ("ok", "")
    features = encode(path).data["features"]
    assert (features == features[0]).all()
    # A stream in the middle of another one: a JPEG with a thumbnail in it would look like this.
    outer = files.insert_segments(stream, (0xE2, stream))
    path = files.svs(tmp_path / "nested.svs", streams=lambda streams: [outer] * len(streams))
    outcome = tile(path)
    assert outcome.result == ("ok", "")
    same_pixels(path)


@pytest.mark.parametrize("vendor", ["aperio", "generic"])
@pytest.mark.parametrize("missing", ["glass", "tissue", "all"])
def test_tiles_of_no_bytes(tile, files, tmp_path, vendor, missing):
    """Byte count 0 is glass that was not stored, or data that were lost: the pixels are those of OpenSlide.

    For Aperio files OpenSlide fills such a tile from another level; in generic ones it is transparent, which is
    white. Tissue seen in the overview whose level-0 tiles are white or enlarged must not become a silent success
    with other pixels than the reference.
    """
    places = {"glass": {0, 1, 47}, "tissue": {18, 19, 27}, "all": set(range(48))}[missing]

    def holes(streams):
        return [None if number in places else s for number, s in enumerate(streams)]

    path = files.svs(
        tmp_path / "holes.svs", streams=holes, description=None if vendor == "aperio" else "", mpp="0.5000"
    )
    with open_slide(path) as slide:
        assert slide.choice.name == "openslide", "the directory decides this, not a probe"
    same_pixels(path)
    outcomes = [tile(path, folder=reader, reader=reader, mpp_overrides={"S": 0.5}) for reader in ("auto", "openslide")]
    assert outcomes[0].result == outcomes[1].result
    np.testing.assert_array_equal(outcomes[0].data["coords"], outcomes[1].data["coords"])
