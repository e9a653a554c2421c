"""Random damage: any file gives a stamped result and leaves the process alive, and damaged tiles never differ."""

from __future__ import annotations

import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from morphome.slides.open import open_slide
from morphome.slides.reader import SlideError

#: What a damaged file may ask for on top of the process as it is.
MEMORY_BYTES = 1 << 30
#: Values that counts, sizes and offsets get: borders of 8, 16 and 32 bits, small numbers, and anything.
NUMBERS = st.sampled_from([0, 1, 2, 3, 7, 8, 255, 256, 32_767, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1]) | (
    st.integers(0, 2**32 - 1)
)
#: In the first bytes lie the directories (the streams follow): most of the damage goes there.
PLACES = st.integers(0, 1800) | st.integers(0, 1800) | st.integers(0, 34_000)
DAMAGE = st.lists(
    st.one_of(
        st.tuples(st.just("bit"), PLACES, st.integers(0, 7)),
        st.tuples(st.just("number"), PLACES, NUMBERS),
        st.tuples(st.just("half"), PLACES, NUMBERS),
        st.tuples(st.just("zeros"), PLACES, st.integers(1, 4000)),
        st.tuples(st.just("cut"), PLACES, st.just(0)),
        st.tuples(st.just("copy"), PLACES, PLACES),
        st.tuples(st.just("tag"), st.integers(0, 30), NUMBERS),
        st.tuples(st.just("count"), st.integers(0, 30), NUMBERS),
        st.tuples(st.just("kind"), st.integers(0, 30), st.integers(0, 20)),
    ),
    min_size=1,
    max_size=4,
)
FEW = settings(
    max_examples=40, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def damaged(content: bytes, damage: list[tuple[str, int, int]]) -> bytes:
    """The file with each kind of damage in turn; ``tag``, ``count`` and ``kind`` change entries of directories."""
    data = bytearray(content)
    entries = directory_entries(content)
    for kind, at, value in damage:
        if kind in ("tag", "count", "kind"):
            at = entries[at % len(entries)] + {"tag": 8, "count": 4, "kind": 2}[kind]
        at = min(at, len(data))
        if kind == "bit" and at < len(data):
            data[at] ^= 1 << value
        elif kind in ("number", "tag", "count"):
            data[at : at + 4] = struct.pack("<I", value)
        elif kind in ("half", "kind"):
            data[at : at + 2] = struct.pack("<H", value & 0xFFFF)
        elif kind == "zeros":
            data[at : at + value] = bytes(len(data[at : at + value]))
        elif kind == "cut":
            del data[at:]
        elif kind == "copy":
            data[at : at + 200] = data[value : value + 200]
    return bytes(data)


def directory_entries(content: bytes) -> list[int]:
    """Places of all entries of all directories of the sound file."""
    places, at = [], int.from_bytes(content[4:8], "little")
    while at:
        n = int.from_bytes(content[at : at + 2], "little")
        places += [at + 2 + 12 * i for i in range(n)]
        at = int.from_bytes(content[at + 2 + 12 * n : at + 6 + 12 * n], "little")
    return places


@pytest.fixture(scope="module")
def sound(files, tmp_path_factory) -> bytes:
    """A valid slide with its directories first."""
    return files.svs(tmp_path_factory.mktemp("sound") / "sound.svs", directories_first=True).read_bytes()


def test_any_damage_gives_a_stamped_result(tile, sound, tmp_path, in_child):
    """No exception, no hang, no crash and no gigabyte, whatever the header claims."""
    seen = set()

    def check(damage):
        path = tmp_path / "damaged.svs"
        path.write_bytes(damaged(sound, damage))

        def work() -> str:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, -1))
            outcome = tile(path)  # checks that all four files are whole, stamped and alone
            if outcome.result[0] == "failed":
                outcome.refused(outcome.result[1])
                assert str(path) in outcome.attrs["reason"]
            else:
                assert outcome.result == ("ok", "")
            return outcome.result[1]

        code, reason = in_child(work, seconds=10)
        assert code == 0, damage
        seen.add(reason)

    FEW(given(DAMAGE)(check))()
    # What is drawn depends on what else is loaded; these two reach the directory and the text for certain.
    check([("cut", 500, 0)])
    check([("half", sound.index(b"MPP = ") + 6, int.from_bytes(b"99", "little"))])
    assert {"unreadable", "implausible_mpp"} <= seen, seen


def test_a_damaged_tile_is_an_error_or_the_picture_that_openslide_shows(files, tmp_path, in_child):
    """A tile that the probe of the fast reader does not look at, damaged at some places of its stream."""
    outcomes = []

    @FEW
    @given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3))
    def check(changes):
        def some(plain):
            stream = bytearray(plain[29])
            for share, value in changes:
                stream[int(share * len(stream))] = value
            return [*plain[:29], bytes(stream), *plain[30:]]

        path = files.svs(tmp_path / "some.svs", streams=some)

        def work() -> str:
            found = []
            for reader in ("auto", "openslide"):
                with open_slide(path, reader) as slide:
                    try:
                        found.append(slide.read_level0(5 * 64, 3 * 64, 64, 64))
                    except SlideError as error:
                        assert str(path) in error.problem
                        found.append(None)
            if found[0] is None:
                return "error"
            assert found[1] is not None, "auto shows what OpenSlide calls an error"
            np.testing.assert_array_equal(*found)
            return "equal"

        code, outcome = in_child(work)
        assert code == 0, changes
        outcomes.append(outcome)

    check()
    assert {"equal", "error"} <= set(outcomes)
