"""Bags as plain arrays: ``.pt`` of CLAM, HIPT and slide2vec, ``.npz`` of slide2vec, ``.npy``.

Nothing in these files may run code: ``.pt`` is loaded with ``weights_only=True``, NumPy files without pickles.
"""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

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

#: HIPT's published vectors: 192 numbers for each region of 4,096 pixels, at most a few hundred of them a slide.
_HIPT_DIM, _HIPT_MOST = 192, 254
_META = ".meta.json"
#: What NumPy, zipfile and torch raise for damaged files.
_DAMAGED = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError),
    *(MemoryError, SyntaxError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


@contextmanager
def open_array(path: Path, mpp: float | tuple[float, float] | None = None) -> Iterator[OpenBag]:
    """Open a ``.pt``, ``.npy`` or ``.npz`` bag; ``<name>.meta.json`` beside it (slide2vec) is read too.

    Args:
        mpp: microns per level-0 pixel, where the files do not say it.

    Raises:
        BagError: ``unreadable``, ``no_features``, ``not_a_bag``, ``unequal_length`` or ``bad_coords``.
    """
    content = {".pt": _load_pt, ".npy": _load_npy, ".npz": _load_npz}[path.suffix](path)
    features = content["features"]
    n_tiles, dim, squeeze = bag_shape(features.shape, "features")
    features = features[0] if squeeze else features
    if features.dtype.kind not in "fiu":
        raise BagError("not_a_bag", f"holds {features.dtype}, not numbers")
    facts: dict[str, Any] = {
        "producer": path.suffix[1:],
        "encoder": "unknown",
        "dtype": content.get("dtype", str(features.dtype)),
        "dataset": "",
        "layout": path.suffix[1:],
        "storage": "compressed" if path.suffix == ".npz" else "contiguous",
        "coords": None,
        "mpp": pair(mpp),
    }
    beside = path.with_name(path.stem + _META)
    if beside.exists():
        facts.update(_slide2vec(path, read_small_json(beside), n_tiles))
    else:
        facts.update(_unit(n_tiles, dim))
    if (stored := content.get("coords")) is not None:
        facts.update(coords=level0_coords(stored), coords_dtype=str(stored.dtype))
    if facts["coords"] is not None and content.get("tile_index") is not None:
        facts["coords"] = _take(facts["coords"], content["tile_index"])
    if facts["coords"] is not None:
        facts["coords_unit"] = "px"
    yield OpenBag(BagFacts(n_tiles, dim, **facts), lambda start, stop: np.asarray(features[start:stop]))


def _load_pt(path: Path) -> dict[str, Any]:
    """A tensor, or {"features" or "feats", "coords"}; bfloat16 becomes float32, which loses nothing."""
    import pickle

    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BagError("unreadable", f"cannot be read: {error}") from None
    except (pickle.UnpicklingError, *_DAMAGED):
        # What torch says is not passed on: it advises to load the file in a way that runs code from it.
        raise BagError(
            "unreadable", "damaged, or no tensor that torch.save wrote (other objects are not loaded from it)"
        ) from None
    coords = None
    if isinstance(content, dict):
        coords = content.get("coords")
        content = content.get("features", content.get("feats"))
    if not isinstance(content, torch.Tensor):
        raise BagError("not_a_bag", "holds no tensor of features")
    dtype = str(content.dtype).removeprefix("torch.")
    content = content.detach().to(torch.float32) if content.dtype == torch.bfloat16 else content.detach()
    return {"features": content.numpy(), "coords": None if coords is None else np.asarray(coords), "dtype": dtype}


def _load_npy(path: Path) -> dict[str, Any]:
    """One array; int (N, 2) coordinates may lie in ``coords/<same name>``."""
    content = {"features": _numpy(path, mmap_mode="r")}
    beside = path.parent / "coords" / path.name
    return {**content, "coords": _numpy(beside)} if beside.exists() else content


def _load_npz(path: Path) -> dict[str, Any]:
    """Arrays ``features`` and, if wanted, ``coords`` or ``x`` and ``y``, and ``tile_index``."""
    content = _numpy_members(path, ("features", "coords", "x", "y", "tile_index"))
    if "features" not in content:
        raise BagError("no_features", "no array 'features' in it")
    if "x" in content and "y" in content:
        content.setdefault("coords", np.column_stack([content["x"], content["y"]]))
    return content


def _numpy(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False, mmap_mode=mmap_mode)
    except _DAMAGED as error:
        raise BagError("unreadable", f"{path.name} is no NumPy array that runs no code: {error}") from None
    if not isinstance(found, np.ndarray):
        raise BagError("unreadable", f"{path.name} holds several arrays: it is an .npz file")
    return found


def _numpy_members(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names if name in archive.files}
    except _DAMAGED as error:
        raise BagError("unreadable", f"{path.name} is no archive of NumPy arrays: {error}") from None


def _take(coords: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Coordinates of the vectors; slide2vec names the tile of each vector by its number."""
    if index.ndim != 1 or index.dtype.kind not in "iu" or (len(index) and not 0 <= index.min() <= index.max() < len(
        coords)):  # fmt: skip
        raise BagError("unequal_length", f"'tile_index' does not fit {len(coords)} coordinates")
    return coords[index]


def _unit(n_tiles: int, dim: int) -> dict[str, Any]:
    """What a vector stands for when nobody says it."""
    if dim == _HIPT_DIM and n_tiles <= _HIPT_MOST:
        return {"unit": "region", "notes": (
            f"{dim} numbers a vector and few vectors: taken as HIPT's regions of 4,096 pixels",)}  # fmt: skip
    notes = ("one vector only: is it an embedding of the whole slide?",) if n_tiles == 1 else ()
    return {"unit": "unknown", "notes": notes}


def _slide2vec(path: Path, meta: Mapping[str, Any], n_tiles: int) -> dict[str, Any]:
    """Facts from the JSON of slide2vec and from the coordinates that hs2p wrote."""
    kind = str(meta.get("artifact_type", "tile_embeddings"))
    if kind != "tile_embeddings":
        raise BagError("not_a_bag", f"holds {kind.replace('_', ' ')}, not one vector a tile ({path.stem}{_META})")
    if whole(meta.get("num_tiles")) not in (None, n_tiles):
        raise BagError("unequal_length", f"{n_tiles} vectors, but {path.stem}{_META} says {meta['num_tiles']}")
    facts: dict[str, Any] = {
        "producer": "slide2vec",
        "encoder": str(meta.get("encoder_name") or "unknown"),
        "unit": "tile",
        "slide_id": str(meta.get("sample_id") or ""),
        "patch_px": whole(meta.get("requested_tile_size_px")),
        "side_px": whole(meta.get("tile_size_lv0")),
        "attrs": dict(meta),
    }
    tiles = _hs2p_file(path, meta)
    if tiles is None:
        return facts
    arrays = _numpy_members(tiles, ("x", "y"))
    if len(arrays) == 2:
        xy = np.column_stack([arrays["x"], arrays["y"]])
        facts.update(coords=level0_coords(xy), coords_dtype=str(arrays["x"].dtype))
    described = tiles.with_name(tiles.stem + _META)
    if described.exists():
        content = read_small_json(described)
        slide, tiling = (content.get(name) if isinstance(content.get(name), dict) else {} for name in
                         ("slide", "tiling"))  # fmt: skip
        if base := number(slide.get("base_spacing_um")):
            facts["mpp"] = (base, base)
        facts["side_px"] = facts["side_px"] or whole(tiling.get("tile_size_lv0"))
        facts["overlap_px"] = (number(tiling.get("overlap")) or 0.0) * (facts["patch_px"] or 0)
    return facts


def _hs2p_file(path: Path, meta: Mapping[str, Any]) -> Path | None:
    """The coordinates of a bag: a file of the same run, wherever its folder was moved; no other path is followed."""
    named = str(meta.get("coordinates_npz_path") or "").replace("\\", "/").rsplit("/", 1)[-1]
    names = [name for name in (named, f"{path.stem}.coordinates.npz", f"{path.stem}.npz") if name.endswith(".npz")]
    for folder in (path.parent.parent / "tiles", path.parent.parent / "coordinates", path.parent):
        for name in names:
            if (folder / name).is_file() and folder / name != path:
                return folder / name
    return None
