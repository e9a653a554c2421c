"""JPEG tiles as no scanner should write them: reader auto shows the pixels of OpenSlide, or the slide fails aloud."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from morphome.slides.open import open_slide
from morphome.slides.reader import SlideError

EXIF = b"Exif\0\0" + b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + bytes(4)  # turned by 90 degrees
ADOBE = {kind: b"Adobe\0d\0\0\0\0" + bytes([kind]) for kind in (0, 1, 2)}  # RGB or CMYK, YCbCr, YCCK
JFIF = b"JFIF\0\x01\x01\0\0\x01\0\x01\0\0"


def application_segments_off(stream: bytes) -> bytes:
    """The stream without its APPn segments, as tiles of an SVS are: its colours stand in the TIFF tags alone."""
    kept, at = [stream[:2]], 2
    while stream[at + 1] != 0xDA:
        segment = stream[at : at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")]
        if not 0xE0 <= segment[1] <= 0xEF:
            kept.append(segment)
        at += len(segment)
    return b"".join(kept) + stream[at:]


def noise(n: int) -> bytes:
    return np.random.default_rng(n).bytes(n)


def turned(files, pixels):
    """Stream of the pixels with every junk segment that cameras and scanners write."""
    return files.insert_segments(
        files.jpeg(pixels), (0xE1, EXIF), (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"), (0xE2, noise(60_000)),
        (0xED, noise(500)), (0xFE, b"comment \xff\xd8\xff\xd9 with markers"), (0xE5, b""),
    )  # fmt: skip


def icc(files, pixels):
    """A profile that swaps colours must not be applied: OpenSlide gives the stored numbers."""
    return files.jpeg(pixels, icc_profile=b"\0\0\x02\0lcms\x02\x10\0\0mntrRGB XYZ " + bytes(484))


def stripped_rgb(files, pixels):
    return application_segments_off(files.jpeg(pixels, keep_rgb=True))


def adobe(kind):
    def make(files, pixels):
        return files.insert_segments(application_segments_off(files.jpeg(pixels)), (0xEE, ADOBE[kind]))

    return make


def behind(place: str, *segments: tuple[int, bytes], **options):
    """Application segments that do not follow the start at once, where a quick look does not find them."""

    def make(files, pixels):
        stream = application_segments_off(files.jpeg(pixels, **options))
        if place == "comment":
            return files.insert_segments(stream, (0xFE, b"hello"), *segments)
        if place == "fill":
            return stream[:2] + b"\xff\xff" + files.insert_segments(stream, *segments)[2:]
        at = stream.index(b"\xff\xc0" if place == "tables" else b"\xff\xda")
        return (
            stream[:at]
            + files.insert_segments(stream, *segments)[2 : 2 + sum(4 + len(b) for _, b in segments)]
            + stream[at:]
        )

    return make


def jfif_rgb(files, pixels):
    """RGB components in a stream that says JFIF, which means YCbCr."""
    return files.insert_segments(stripped_rgb(files, pixels), (0xE0, JFIF))


def grey(files, pixels):
    return files.jpeg(pixels, "L")


def cmyk(files, pixels):
    return files.jpeg(pixels, "CMYK")


def padded(before: bytes = b"", after: bytes = b""):
    def make(files, pixels):
        return before + files.jpeg(pixels) + after

    return make


def no_end(files, pixels):
    return files.jpeg(pixels)[:-2]


def two(files, pixels):
    """Two pictures in one stream, the first of another colour."""
    return files.jpeg(np.full_like(pixels, 90)) + files.jpeg(pixels)


def cut(share: float):
    def make(files, pixels):
        stream = files.jpeg(pixels)
        return stream[: int(len(stream) * share)]

    return make


def cropped(width: int, height: int):
    def make(files, pixels):
        larger = np.pad(pixels, ((0, 64), (0, 64), (0, 0)), mode="edge")
        return files.jpeg(larger[:height, :width])

    return make


def forged(width: int, height: int):
    """The frame header claims another size than the data hold."""

    def make(files, pixels):
        stream = bytearray(files.jpeg(pixels))
        at = stream.index(b"\xff\xc0")
        stream[at + 5 : at + 9] = struct.pack(">HH", height, width)
        return bytes(stream)

    return make


def coded(**options):
    return lambda files, pixels: files.jpeg(pixels, **options)


STREAMS = {
    "plain": coded(), "4:2:0": coded(subsampling=2), "4:2:2": coded(subsampling=1), "quality 1": coded(quality=1),
    "quality 100": coded(quality=100), "progressive": coded(progressive=True), "optimised": coded(optimize=True),
    "restart rows": coded(restart_marker_rows=1), "restart blocks": coded(restart_marker_blocks=3),
    "progressive restart": coded(progressive=True, restart_marker_rows=1),
    "junk segments": turned, "icc": icc, "jfif and rgb": jfif_rgb, "rgb without a word": stripped_rgb,
    "adobe rgb flag on ycc": adobe(0), "adobe ycc flag": adobe(1), "adobe ycck flag": adobe(2),
    "adobe behind a comment": behind("comment", (0xEE, ADOBE[0])),
    "adobe behind fill": behind("fill", (0xEE, ADOBE[0])),
    "adobe behind tables": behind("tables", (0xEE, ADOBE[0])),
    "adobe behind frame": behind("frame", (0xEE, ADOBE[0])),
    "jfif behind comment": behind("comment", (0xE0, JFIF), keep_rgb=True),
    "jfif behind fill": behind("fill", (0xE0, JFIF), keep_rgb=True),
    "jfif behind tables": behind("tables", (0xE0, JFIF), keep_rgb=True),
    "ycc behind tables": behind("tables", (0xEE, ADOBE[1]), keep_rgb=True),
    "pillow rgb": coded(keep_rgb=True), "grey": grey, "cmyk": cmyk,
    "zeros before": padded(before=bytes(4)), "zeros behind": padded(after=bytes(300)),
    "fill bytes": padded(before=b"\xff\xff"), "noise behind": padded(after=noise(300)), "no end": no_end, "two": two,
    "half": cut(0.5), "nearly whole": cut(0.97), "header only": cut(0.15),
    "smaller": cropped(48, 48), "narrower": cropped(48, 64), "larger": cropped(128, 128), "wider": cropped(80, 64),
    "says smaller": forged(32, 32), "says larger": forged(64, 96), "says huge": forged(65_500, 65_500),
    "says nothing": forged(0, 0),
    "arithmetic": lambda files, pixels: files.ARITHMETIC, "12 bits": lambda files, pixels: files.TWELVE_BIT,
    "noise": lambda files, pixels: noise(600), "png": lambda files, pixels: files.encoded(pixels, "PNG"),
    "start and end": lambda files, pixels: b"\xff\xd8\xff\xd9",
}  # fmt: skip
#: These are whole pictures of the size that the directory says: OpenSlide must not lose them either.
SOUND = (
    "plain", "4:2:0", "4:2:2", "quality 1", "quality 100", "progressive", "optimised", "restart rows",
    "restart blocks", "progressive restart", "junk segments", "icc", "adobe ycc flag",
)  # fmt: skip


#: Streams whose names have these words say something about their colours.
COLOUR_WORDS = ("rgb", "ycc", "jfif", "adobe", "plain", "grey", "cmyk")
#: Tiles that may be odd where others are plain, which the fast reader does not probe, and all that are looked at.
ODD = (19, 29, 36)
SEEN = (0, 10, *ODD, 28, 47)


def tiles_of(path, reader) -> list[np.ndarray | None]:
    """The tiles of :data:`SEEN`, None for one that cannot be read; the one after that gets a handle of its own."""
    found = []
    slide = open_slide(path, reader)
    try:
        for number in SEEN:
            try:
                found.append(slide.read_level0(number % 8 * 64, number // 8 * 64, 64, 64))
            except SlideError as error:
                assert str(path) in error.problem
                assert error.remedy
                found.append(None)
                slide.close()
                slide = open_slide(path, reader)
    finally:
        slide.close()
    return found


def agree(path, tile=None) -> int:
    """Check that reader auto shows what OpenSlide shows, also in the tile step where that is given; how many tiles."""
    try:
        expected = tiles_of(path, "openslide")
    except SlideError:
        expected = [None] * len(SEEN)
    try:
        found = tiles_of(path, "auto")
    except SlideError:
        found = [None] * len(SEEN)
    for one, other in zip(found, expected, strict=True):
        assert one is None or other is not None, "auto shows what OpenSlide calls an error"
        if one is not None:
            np.testing.assert_array_equal(one, other)
    if tile is None:
        return sum(one is not None for one in found)
    outcomes = [tile(path, folder=reader, reader=reader) for reader in ("auto", "openslide")]
    assert outcomes[0].result == outcomes[1].result
    np.testing.assert_array_equal(outcomes[0].data["coords"], outcomes[1].data["coords"])
    if outcomes[0].result != ("ok", ""):
        assert outcomes[0].result[1] in {"unreadable", "unsupported_format", "no_tissue", "not_brightfield"}
        outcomes[0].refused(outcomes[0].result[1])
    return sum(one is not None for one in found)


@pytest.mark.parametrize(("name", "photometric"), [
    *((name, "YCBCR") for name in STREAMS),
    *((name, "RGB") for name in STREAMS if any(word in name for word in COLOUR_WORDS)),
])  # fmt: skip
def test_every_tile_is_odd(tile, files, tmp_path, name, photometric, in_child):
    path = files.svs(
        tmp_path / "odd.svs", encode=lambda p: STREAMS[name](files, p), photometric=getattr(files, photometric)
    )
    # In a child: a decoder that crashes on one of these must not take the other tests with it.
    step = tile if photometric == "YCBCR" else None
    code, shown = in_child(lambda: str(agree(path, step)))
    assert code == 0
    if name in SOUND:
        assert int(shown) == len(SEEN)


@pytest.mark.parametrize("photometric", ["YCBCR", "RGB"])
@pytest.mark.parametrize("name", STREAMS)
def test_some_tiles_are_odd(files, tmp_path, name, photometric, in_child):
    """A probe of a few tiles does not see them: three of 48 are odd, the rest are plain."""
    plain = files.jpeg if photometric == "YCBCR" else (lambda pixels: stripped_rgb(files, pixels))

    def some(streams):
        pixels = files.cut(files.board(), 64)
        return [STREAMS[name](files, pixels[n]) if n in ODD else s for n, s in enumerate(streams)]

    kind = getattr(files, photometric)
    path = files.svs(tmp_path / "some.svs", streams=some, encode=plain, photometric=kind)
    code, shown = in_child(lambda: str(agree(path)))
    assert code == 0
    assert int(shown) >= len(SEEN) - (0 if name in SOUND else len(ODD))


@pytest.mark.parametrize("name", ["plain", "4:2:0", "progressive", "restart rows"])
@pytest.mark.parametrize("big", [False, True])
def test_tables_in_a_tag_of_their_own(tile, files, tmp_path, name, big, in_child):
    """Abbreviated streams, as scanners write them."""
    if name == "progressive":
        name = "quality 100"  # a progressive stream has tables between its scans
    tables = files.split_tables(STREAMS[name](files, files.cut(files.board(), 64)[18]))[0]

    def abbreviated(pixels):
        return files.split_tables(STREAMS[name](files, pixels))[1]

    changes = {files.TABLES: (files.UNDEFINED, tables)}
    path = files.svs(tmp_path / "tables.svs", encode=abbreviated, changes=changes, big=big, levels=())
    code, shown = in_child(lambda: str(agree(path, tile)))
    assert (code, shown) == (0, str(len(SEEN)))


@pytest.mark.parametrize("tables", [
    b"", b"\xff\xd8\xff\xd9", b"\xff\xd8", b"\0" * 64, b"\xff\xd8\xff\xdb\x00\x43" + b"\x01" * 10, noise(289), None,
])  # fmt: skip
def test_tables_that_are_none(tile, files, tmp_path, tables, in_child):
    """Complete streams need no tables, abbreviated ones cannot do without: never another picture than OpenSlide's."""
    for complete in (True, False):
        encode = files.jpeg if complete else (lambda p: files.split_tables(files.jpeg(p))[1])
        changes = {files.TABLES: None if tables is None else (files.UNDEFINED, tables)}
        path = files.svs(tmp_path / "tables.svs", encode=encode, changes=changes, levels=())
        code, shown = in_child(lambda path=path: str(agree(path, tile)))
        assert code == 0
        if not complete:
            assert shown == "0"


@pytest.mark.parametrize("samples", [1, 2, 4])
@pytest.mark.parametrize("bits", [1, 12, 16])
def test_samples_and_bits_that_the_streams_contradict(tile, files, tmp_path, samples, bits, in_child):
    changes = {258: (files.SHORT, [bits] * samples), 277: (files.SHORT, [samples])}
    path = files.svs(tmp_path / "bits.svs", changes=changes)
    code, _ = in_child(lambda: str(agree(path, tile)))
    assert code == 0


@pytest.mark.parametrize("photometric", [0, 1, 3, 5, 8, 32_844, None])
def test_photometric_values_that_no_scanner_writes(tile, files, tmp_path, photometric, in_child):
    changes = {files.PHOTOMETRIC: None if photometric is None else (files.SHORT, [photometric])}
    path = files.svs(tmp_path / "photometric.svs", changes=changes)
    code, _ = in_child(lambda: str(agree(path, tile)))
    assert code == 0


def test_a_file_of_grey_and_of_cmyk_tiles(tile, files, tmp_path, in_child):
    """The directory says so: one or four samples, photometric black-is-zero or separated."""
    for mode, samples, photometric in (("L", 1, 1), ("CMYK", 4, 5)):
        changes = {
            258: (files.SHORT, [8] * samples),
            277: (files.SHORT, [samples]),
            files.PHOTOMETRIC: (files.SHORT, [photometric]),
        }
        path = files.svs(tmp_path / f"{mode}.svs", encode=lambda p, mode=mode: files.jpeg(p, mode), changes=changes)
        code, _ = in_child(lambda path=path: str(agree(path, tile)))
        assert code == 0


def test_the_parity_of_the_fixtures(files):
    """The two streams that Pillow cannot write are what they say."""
    assert b"\xff\xc9" in files.ARITHMETIC
    frame = files.TWELVE_BIT.index(b"\xff\xc1")
    assert files.TWELVE_BIT[frame + 4] == 12
    with Image.open(io.BytesIO(files.ARITHMETIC)) as picture:
        assert picture.size == (64, 64)
        assert np.ptp(np.asarray(picture)) > 100
