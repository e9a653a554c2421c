"""Small tiled JPEG TIFF files of every kind that scanners write, for the tests of the readers."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

#: Chroma subsampling: Pillow's number and the TIFF tag.
SUBSAMPLING = {"444": (0, (1, 1)), "422": (1, (2, 1)), "420": (2, (2, 2))}


def texture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with edges and noise, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = np.stack([128 + 90 * np.sin(x / 9 + k) * np.cos(y / (7 + k)) for k in range(3)], axis=-1)
    image[(x // 13 + y // 17) % 5 == 0] = (90, 60, 140)
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def encode(tile: np.ndarray, ycbcr: bool = True, subsampling: str = "422", quality: int = 80) -> bytes:
    """One tile as a complete JPEG stream; ``ycbcr=False`` keeps red, green and blue as they are."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(tile)).save(
        file, "JPEG", quality=quality, subsampling=SUBSAMPLING[subsampling][0], keep_rgb=not ycbcr
    )
    return file.getvalue()


def split(stream: bytes) -> tuple[bytes, bytes]:
    """(tables, abbreviated stream) of a complete stream; application segments are dropped."""
    tables, image, at = b"\xff\xd8", b"\xff\xd8", 2
    while stream[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        if stream[at + 1] in (0xDB, 0xC4):
            tables += stream[at:end]
        elif not 0xE0 <= stream[at + 1] <= 0xEF:
            image += stream[at:end]
        at = end
    return tables + b"\xff\xd9", image + stream[at:]


def write(
    path: Path,
    image: np.ndarray,
    tile: tuple[int, int] = (64, 64),
    *,
    ycbcr: bool = True,
    subsampling: str = "422",
    tables: bool = True,
    quality: int = 80,
    levels: tuple[int, ...] = (),
    description: str | None = None,
    bigtiff: bool = False,
    mpp: float | None = 0.25,
) -> Path:
    """Write a tiled JPEG TIFF.

    Args:
        image: uint8 (H, W, 3).
        tile: height, width of native tiles, multiples of 16.
        tables: whether quantisation and Huffman tables stand once, in the tag JPEGTables.
        levels: factors of coarser levels (every so many pixels of the image).
    """
    data = bytearray(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0) if bigtiff else struct.pack("<2sHI", b"II", 42, 0))
    link = 8 if bigtiff else 4

    def place(block: bytes) -> int:
        data.extend(b"\0" * (len(data) % 2))
        data.extend(block)
        return len(data) - len(block)

    for factor in (1, *levels):
        level = image[::factor, ::factor]
        height, width = level.shape[:2]
        rows, columns = -(-height // tile[0]), -(-width // tile[1])
        padded = np.pad(level, ((0, rows * tile[0] - height), (0, columns * tile[1] - width), (0, 0)), mode="edge")
        cut = padded.reshape(rows, tile[0], columns, tile[1], 3).swapaxes(1, 2).reshape(-1, *tile, 3)
        streams = [encode(part, ycbcr, subsampling, quality) for part in cut]
        common = split(streams[0])[0]
        streams = [split(s)[1] if tables else s for s in streams]
        tags = {
            254: ("I", [int(factor > 1)]), 256: ("I", [width]), 257: ("I", [height]), 258: ("H", [8, 8, 8]),
            259: ("H", [7]), 262: ("H", [6 if ycbcr else 2]), 277: ("H", [3]), 284: ("H", [1]),
            322: ("I", [tile[1]]), 323: ("I", [tile[0]]), 324: ("I", [place(s) for s in streams]),
            325: ("I", [len(s) for s in streams]),
        }  # fmt: skip
        if tables:
            tags[347] = ("B", list(common))
        if ycbcr:
            tags[530] = ("H", list(SUBSAMPLING[subsampling][1]))
        if factor == 1 and description is not None:
            tags[270] = ("s", list(description.encode() + b"\0"))
        if factor == 1 and mpp is not None:
            ratio = [round(1e7 / mpp), 1000]
            tags |= {282: ("r", ratio), 283: ("r", ratio), 296: ("H", [3])}
        link = _directory(data, place, link, tags, bigtiff)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(data))
    return path


def _directory(
    data: bytearray, place: Callable[[bytes], int], link: int, tags: dict[int, tuple[str, list[int]]], bigtiff: bool
) -> int:
    """Append a directory; returns where the offset of the next one is to be written."""
    word, room = ("Q", 8) if bigtiff else ("I", 4)
    types = {"B": (7, "B", 1), "s": (2, "B", 1), "H": (3, "H", 1), "I": (4, "I", 1), "r": (5, "I", 2)}
    entries = b""
    for tag, (kind, values) in sorted(tags.items()):
        code, letter, per_value = types[kind]
        raw = struct.pack(f"<{len(values)}{letter}", *values)
        inline = raw if len(raw) <= room else struct.pack(f"<{word}", place(raw))
        entries += struct.pack(f"<HH{word}", tag, code, len(values) // per_value) + inline.ljust(room, b"\0")
    count = struct.pack("<Q" if bigtiff else "<H", len(tags))
    at = place(count + entries + bytes(room))
    data[link : link + room] = struct.pack(f"<{word}", at)
    return at + len(count) + len(entries)
