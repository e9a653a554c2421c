"""Bags in a wsidata (LazySlide) store: a SpatialData folder with one table of features per encoder.

Only the arrays that are asked for are opened, after their metadata were read as plain JSON: an array of Python
objects, or one behind a codec that is not a plain compressor, is refused before anything decodes it.
"""

from __future__ import annotations

import json
import lzma
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from morphome.cohort.slide_sheet import few_names
from morphome.errors import MorphomeError
from morphome.features.bag import (
    BagError,
    BagFacts,
    OpenBag,
    bag_shape,
    level0_coords,
    number,
    pair,
    read_small_json,
    whole,
)

#: Codecs that turn bytes into numbers and nothing else; names of zarr 2 and 3.
_CODECS = frozenset(
    {"blosc", "bytes", "bz2", "crc32c", "delta", "gzip", "lz4", "lzma", "sharding_indexed", "shuffle", "transpose"}
    | {"zlib", "zstd"}
    | {f"numcodecs.{name}" for name in ("blosc", "bz2", "delta", "gzip", "lz4", "lzma", "shuffle", "zlib", "zstd")}
)
#: Files of metadata; the first three say what a folder is.
_META = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
#: What zarr and its codecs raise for damaged stores.
_DAMAGED = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, OverflowError, MemoryError),
    *(AttributeError, SystemError, ZeroDivisionError, zlib.error, lzma.LZMAError),
)
#: Plain numbers as formats 2 and 3 name them.
_NUMBERS = re.compile(r"[<>|=][fiu][1248]|(float|int|uint)(8|16|32|64)")


@contextmanager
def open_zarr(
    path: Path, dataset: str | None = None, mpp: float | tuple[float, float] | None = None
) -> Iterator[OpenBag]:
    """Open the bag of one slide.

    Args:
        path: the ``.zarr`` folder, format 2 or 3.
        dataset: the table (``uni_tiles``) or encoder (``uni``) to take when there are several.
        mpp: microns per level-0 pixel, where the store does not say it.

    Raises:
        BagError: ``unreadable``, ``no_features``, ``several_encoders``, ``not_a_bag``, ``unequal_length`` or
            ``unsafe_store``.
        MorphomeError: the zarr package is not installed.
    """
    if not path.is_dir() or not _metadata(path):
        raise BagError("unreadable", "no zarr store: a folder with zarr.json or .zgroup is expected")
    name, region = _choose(path, dataset)
    table = path / "tables" / name
    if not (table / "X" / "zarr.json").exists() and not (table / "X" / ".zarray").exists():
        raise BagError("not_a_bag", f"table '{name}' has no dense array X (sparse tables are not read)")
    features = _array(table / "X")
    _refuse_unfinished(table / "X", features)
    n_tiles, dim, _ = bag_shape(tuple(features.shape), f"tables/{name}/X")
    root = _attrs(path)
    spec = _member(_member(root, "tile_spec"), region)
    own = number(_member(root, "slide_properties").get("mpp"))
    factor = number(spec.get("base_downsample"))
    coords, dtype, notes = _coords(path, table, region, n_tiles)
    facts = BagFacts(
        n_tiles,
        dim,
        coords,
        "lazyslide",
        name.removesuffix(f"_{region}") or "unknown",
        layout="zarr",
        dtype=str(features.dtype),
        dataset=f"tables/{name}/X",
        storage=f"chunks {' x '.join(str(n) for n in features.chunks)}",
        coords_dtype=dtype,
        coords_unit="" if coords is None else "px",
        mpp=(own, own) if own else pair(mpp),
        patch_px=whole(spec.get("width")),
        side_px=int(spec["width"] * factor) if factor and whole(spec.get("width")) else whole(spec.get("raw_width")),
        overlap_px=_overlap(spec),
        attrs=spec,
        notes=notes,
    )
    yield OpenBag(facts, lambda start, stop: _read(features, start, stop))


def _choose(path: Path, dataset: str | None) -> tuple[str, str]:
    """Name of a table of features and of the tiles (shapes) that it describes."""
    folder = path / "tables"
    tables: dict[str, str] = {}
    for table in sorted(folder.iterdir()) if folder.is_dir() else ():
        if table.is_dir() and _metadata(table):
            region = _attrs(table).get("region") or ("tiles" if table.name.endswith("_tiles") else "")
            region = region[0] if isinstance(region, list) and region else region
            # A table that describes whole tissues, or cells, is no bag of tiles.
            if isinstance(region, str) and table.name.endswith(f"_{region}") and "tile" in region:
                tables[table.name] = region
    chosen = [n for n in tables if dataset is None or dataset in (n, n.removesuffix(f"_{tables[n]}"))]
    if dataset is not None and not chosen:
        raise BagError("no_features", f"no table '{dataset}'; it has {few_names(tables) or 'none of tiles'}")
    if not chosen:
        raise BagError("no_features", "no table of features of tiles (tables/<encoder>_tiles)")
    if len(chosen) > 1:
        raise BagError("several_encoders", f"tables {few_names(chosen)}: name one (features.dataset, or --dataset)")
    return chosen[0], tables[chosen[0]]


def _coords(path: Path, table: Path, region: str, n_tiles: int) -> tuple[np.ndarray | None, str, tuple[str, ...]]:
    """Upper left corners of the tiles, level 0, in the order of the table: joined by ``tile_id``."""
    shapes = path / "shapes" / region / "shapes.parquet"
    if not shapes.is_file():
        return None, "", (f"no shapes/{region}/shapes.parquet: a bag without coordinates",)
    import pyarrow as pa
    import pyarrow.parquet as pq
    import shapely

    try:
        names = [n for n in ("tile_id", "geometry") if n in pq.read_schema(shapes).names]
        tiles = pq.read_table(shapes, columns=names)
        corners = shapely.bounds(shapely.from_wkb(tiles["geometry"].to_numpy()))[:, :2]
    except (pa.ArrowException, shapely.errors.ShapelyError, *_DAMAGED) as error:
        raise BagError("unreadable", f"shapes/{region}/shapes.parquet: {error}") from None
    xy = level0_coords(corners)
    ids = table / "obs" / "tile_id"
    if "tile_id" not in names or not _metadata(ids):
        if len(xy) != n_tiles:
            raise BagError("unequal_length", f"{n_tiles} vectors but {len(xy)} tiles, and no tile_id to join them")
        return xy, str(corners.dtype), ()
    numbers, known = _array(ids), tiles["tile_id"].to_numpy().astype(np.int64)
    if numbers.shape != (n_tiles,):
        raise BagError("unequal_length", f"{n_tiles} vectors, but {numbers.shape} numbers of tiles (tile_id)")
    wanted = _read(numbers, 0, n_tiles).astype(np.int64)
    order = np.argsort(known, kind="stable")
    place = np.searchsorted(known, wanted, sorter=order)
    if (place >= len(known)).any() or (known[order[place]] != wanted).any():
        raise BagError("unequal_length", f"{n_tiles} vectors, whose tile_id are not those of {len(known)} tiles")
    return xy[order[place]], str(corners.dtype), ()


def _array(path: Path) -> Any:
    """An array of a store, opened after its metadata were found harmless."""
    meta, version = _metadata(path), 3 if (path / "zarr.json").is_file() else 2
    kind = meta.get("data_type" if version == 3 else "dtype")
    if not isinstance(kind, str) or _NUMBERS.fullmatch(kind) is None:
        raise BagError("unsafe_store", f"array '{path.name}' holds {kind}, not plain numbers")
    codecs = [meta.get("compressor"), *(meta.get("filters") or []), *(meta.get("codecs") or [])]
    for name in _codec_names([codec for codec in codecs if codec is not None]):
        if name not in _CODECS:
            raise BagError("unsafe_store", f"array '{path.name}' needs the codec '{name}', which is not read")
    try:
        import zarr
    except ImportError:
        raise MorphomeError(
            f"{path}: reading wsidata stores needs the package zarr", "pip install 'morphome[zarr]'"
        ) from None
    try:
        return zarr.open_array(store=str(path), mode="r", zarr_format=version)
    except _DAMAGED as error:
        raise BagError("unreadable", f"array '{path.name}': {error}") from None


def _read(array: Any, start: int, stop: int) -> np.ndarray:
    try:
        return np.asarray(array[start:stop])
    except _DAMAGED as error:
        raise BagError("unreadable", f"'{array.name or array.path}': {error}") from None


def _refuse_unfinished(path: Path, array: Any) -> None:
    """Pieces that were never written would read as zeros."""
    pieces = getattr(array, "shards", None) or array.chunks
    wanted = math.prod(-(-n // c) for n, c in zip(array.shape, pieces, strict=True))
    there = sum(file.is_file() and file.name not in _META for file in path.rglob("*"))
    if there < wanted:
        raise BagError("unreadable", f"'{path.name}' is half-written: {there} of {wanted} chunks")


def _codec_names(codecs: Any) -> Iterator[str]:
    """Names of codecs, those inside a sharding codec included."""
    for codec in codecs if isinstance(codecs, list) else []:
        if not isinstance(codec, Mapping):
            yield str(codec)
            continue
        yield str(codec.get("name", codec.get("id")))
        inner = codec.get("configuration")
        if isinstance(inner, Mapping):
            for key in ("codecs", "index_codecs"):
                yield from _codec_names(inner.get(key))


def _metadata(path: Path) -> dict[str, Any]:
    """Metadata of a group or array: of format 3, else of format 2; empty where there is none."""
    for name in _META[:3]:
        if (path / name).is_file():
            return read_small_json(path / name)
    return {}


def _attrs(path: Path) -> dict[str, Any]:
    """Attributes of a group; texts that hold JSON objects are opened."""
    if (path / "zarr.json").is_file():
        found = _metadata(path).get("attributes")
    else:
        found = read_small_json(path / ".zattrs") if (path / ".zattrs").is_file() else {}
    return found if isinstance(found, dict) else {}


def _member(attrs: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = attrs.get(name)
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            found = None
    return found if isinstance(found, dict) else {}


def _overlap(spec: Mapping[str, Any]) -> float | None:
    width, stride = number(spec.get("width")), number(spec.get("stride_width"))
    return width - stride if width and stride else None
