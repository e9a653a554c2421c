"""Bags in HDF5 as morphome, CLAM, TRIDENT, STAMP and AtlasPatch write them.

Names of datasets and attributes were read from the code of each tool; see the table in
:mod:`morphome.features.layouts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from morphome.cohort.slide_sheet import few_names
from morphome.features.bag import (
    BagError,
    BagFacts,
    OpenBag,
    bag_shape,
    grid_step,
    level0_coords,
    number,
    pair,
    plain_attr,
    whole,
)

#: Historic STAMP files have no unit: their coordinates are pixels of 256 / 224 microns.
HISTORIC_UM, HISTORIC_PX = 256.0, 224


@contextmanager
def open_hdf5(
    path: Path, dataset: str | None = None, mpp: float | tuple[float, float] | None = None
) -> Iterator[OpenBag]:
    """Open the bag of one slide.

    Args:
        dataset: which features to take where a file holds those of several encoders (AtlasPatch).
        mpp: microns per level-0 pixel of the slide, for coordinates in microns; used where the file does not say it.

    Raises:
        BagError: ``unreadable``, ``no_features``, ``several_encoders``, ``not_a_bag`` or ``bad_coords``.
    """
    with _guard():
        handle = h5py.File(path, "r", locking=False)
    with handle:
        with _guard():
            data = find_features(handle, dataset)
            facts = _facts(handle, data, pair(mpp))
        squeeze = data.ndim == 3

        def rows(start: int, stop: int) -> np.ndarray:
            with _guard():
                return data[0, start:stop] if squeeze else data[start:stop]

        yield OpenBag(facts, rows)


@contextmanager
def _guard() -> Iterator[None]:
    """What h5py raises for damaged files becomes a :class:`BagError`."""
    try:
        yield
    except BagError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise BagError("unreadable", f"cannot be read as HDF5: {error}") from None


def find_features(handle: h5py.File, dataset: str | None = None) -> h5py.Dataset:
    """The dataset of vectors: (N, D), or (1, N, D) in old TRIDENT files.

    Raises:
        BagError: ``no_features``, ``several_encoders`` or ``not_a_bag`` (one vector for a slide or patient).
    """
    kind = str(plain_attr(handle.attrs.get("feat_type", "tile")))
    if kind != "tile":
        raise BagError("not_a_bag", f"holds {kind}-level features, not one vector a tile (feat_type)")
    found = handle.get("features", handle.get("feats"))
    if found is None:
        raise BagError("no_features", f"no dataset 'features' or 'feats'; it has {few_names(handle) or 'nothing'}")
    if isinstance(found, h5py.Group):
        found = _choose(found, dataset)
    if not isinstance(found, h5py.Dataset):
        raise BagError("no_features", "'features' is no dataset")
    _refuse_elsewhere(handle, found)
    bag_shape(found.shape, found.name)
    _refuse_unfinished(found)
    if found.dtype.kind not in "fiu":
        raise BagError("not_a_bag", f"'{found.name}' holds {found.dtype}, not numbers")
    return found


def _refuse_elsewhere(handle: h5py.File, data: h5py.Dataset) -> None:
    if data.is_virtual or data.external or data.file.filename != handle.filename:
        raise BagError("unsafe_store", f"'{data.name}' lies in another file, which is not followed")


def _refuse_unfinished(data: h5py.Dataset) -> None:
    """A dataset that was made at its full size, but of which a part was never written, would read as zeros."""
    there = data.id.get_storage_size()
    if data.chunks and data.id.get_create_plist().get_nfilters():
        wanted = math.prod(-(-n // c) for n, c in zip(data.shape, data.chunks, strict=True))
        there, unit = data.id.get_num_chunks(), "chunks"
    else:
        wanted, unit = math.prod(data.shape) * data.dtype.itemsize, "bytes"
    if there < wanted:
        raise BagError("unreadable", f"'{data.name}' is half-written: {there} of {wanted} {unit}")


def _choose(group: h5py.Group, dataset: str | None) -> h5py.Dataset:
    """One of the encoders of an AtlasPatch file; its names of unfinished datasets begin with ``__tmp_``."""
    names = [name for name in group if not name.startswith("__tmp_") and isinstance(group[name], h5py.Dataset)]
    if dataset is not None and dataset not in names:
        raise BagError("no_features", f"group 'features' has no '{dataset}'; it has {few_names(names) or 'nothing'}")
    if dataset is None and len(names) != 1:
        code = "several_encoders" if names else "no_features"
        raise BagError(code, f"group 'features' holds {few_names(names) or 'nothing'}: "
                             "name one of them (features.dataset, or --dataset)")  # fmt: skip
    return group[dataset or names[0]]


def _facts(handle: h5py.File, data: h5py.Dataset, mpp: tuple[float, float] | None) -> BagFacts:
    n_tiles, dim, _ = bag_shape(data.shape, data.name)
    producer, encoder = _producer(handle, data)
    coords = handle.get("coords")
    if coords is not None and not (isinstance(coords, h5py.Dataset) and coords.dtype.kind in "iuf"):
        raise BagError("bad_coords", "'coords' is no dataset of numbers")
    if coords is not None:
        _refuse_elsewhere(handle, coords)
        _refuse_unfinished(coords)
    # STAMP and AtlasPatch describe the tiles at the file, the others at the coordinates.
    described = handle if coords is None or producer in ("stamp", "atlaspatch") else coords
    attrs = {name: plain_attr(value) for name, value in described.attrs.items()}
    notes: list[str] = []
    if producer == "morphome" and plain_attr(handle.attrs.get("status")) == "failed":
        notes.append(f"the slide failed when it was encoded: {plain_attr(handle.attrs.get('reason_code'))}")
    known = _own_mpp(attrs)
    if known and mpp and max(abs(a / b - 1) for a, b in zip(known, mpp, strict=True)) > 0.01:
        notes.append(f"the file says {known[0]:g} microns per pixel: {mpp[0]:g} was not used")
    mpp = known or mpp
    facts: dict[str, Any] = {
        "dtype": str(data.dtype),
        "dataset": data.name.lstrip("/"),
        "storage": _storage(data),
        "unit": "region" if _is_region(attrs, encoder) else "tile",
        "mpp": mpp,
        "attrs": attrs,
        "slide_id": str(plain_attr(handle.attrs.get("slide_id")) or attrs.get("name") or ""),
        "mark": str(plain_attr(data.attrs.get("encoder_fingerprint")) or "") if producer == "morphome" else "",
        "patch_px": whole(attrs.get("patch_size")),
        "overlap_px": _overlap(attrs),
    }
    if coords is not None:
        facts["coords_dtype"] = str(coords.dtype)
        stored = coords[()]
        if producer == "stamp":
            facts.update(_stamp_coords(stored, attrs, mpp, notes))
        elif attrs.get("unit") == "um":
            facts.update(_microns(stored, number(attrs.get("tile_size_um")), mpp))
        else:
            facts.update(coords=level0_coords(stored), coords_unit="px", side_px=_side(attrs))
            if stored.dtype.kind == "f" and (stored != np.round(stored)).any():
                notes.append("coordinates are no whole numbers: are they level-0 pixels?")
    facts.setdefault("coords", None)
    return BagFacts(n_tiles, dim, producer=producer, encoder=encoder, notes=tuple(notes), **facts)


def _producer(handle: h5py.File, data: h5py.Dataset) -> tuple[str, str]:
    """Which tool wrote a file, and which encoder it names."""

    def text(value: object) -> str:
        return str(plain_attr(value) or "unknown")

    coords = handle["coords"].attrs if "coords" in handle else {}
    if "stamp_version" in handle.attrs or data.name == "/feats":
        return "stamp", text(handle.attrs.get("extractor"))
    if data.name.count("/") > 1:
        return "atlaspatch", data.name.rsplit("/", 1)[1]
    if "encoder_fingerprint" in data.attrs:
        return "morphome", text(data.attrs.get("encoder"))
    if "encoder" in data.attrs or "patch_size_level0" in coords:
        return "trident", text(data.attrs.get("encoder"))
    if "patch_level" in coords:
        return "clam", "unknown"
    return "h5", "unknown"


def _own_mpp(attrs: Mapping[str, Any]) -> tuple[float, float] | None:
    x, y = number(attrs.get("mpp_level0_x")), number(attrs.get("mpp_level0_y"))
    return (x, y) if x and y else None


def _side(attrs: Mapping[str, Any]) -> int | None:
    """Side of a tile in level-0 pixels; CLAM gives the side at a level and the level's downsampling."""
    if side := whole(attrs.get("patch_size_level0") or attrs.get("side_x_px")):
        return side
    down = attrs.get("downsample", 1 if attrs.get("patch_level") == 0 else None)
    down = number(down[0] if isinstance(down, list) and down else down)
    patch = number(attrs.get("patch_size"))
    more = number(attrs.get("custom_downsample")) or 1
    return None if down is None or patch is None else round(patch * down * more)


def _overlap(attrs: Mapping[str, Any]) -> float | None:
    return None if attrs.get("overlap") is None else (number(attrs["overlap"]) or 0.0)


def _stamp_coords(
    stored: np.ndarray, attrs: Mapping[str, Any], mpp: tuple[float, float] | None, notes: list[str]
) -> dict[str, Any]:
    """Microns of a STAMP file, whose way to say the unit changed twice, and pixels where the resolution is known."""
    tile = number(attrs.get("tile_size"))
    patch_px = whole(attrs.get("tile_size_px"))
    if tile and attrs.get("unit") == "um":  # 2.0
        tile_um = tile
    elif number(attrs.get("tile_size_um")):  # from 2.1 on
        tile_um = number(attrs["tile_size_um"])
    elif round(tile or grid_step(stored) or 0) == HISTORIC_PX:
        tile_um, patch_px = HISTORIC_UM, HISTORIC_PX
        stored = stored / HISTORIC_PX * HISTORIC_UM
        notes.append(f"no unit in the file and tiles {HISTORIC_PX} apart: taken as {HISTORIC_UM:g}/{HISTORIC_PX} um")
    elif len(stored):
        notes.append("the unit of the coordinates is not known: they are not used")
        return {"patch_px": patch_px}
    else:
        tile_um = None
    return {**_microns(stored, tile_um, mpp), "patch_px": patch_px}


def _microns(stored: np.ndarray, tile_um: float | None, mpp: tuple[float, float] | None) -> dict[str, Any]:
    microns = np.asarray(stored, np.float64).reshape(-1, stored.shape[-1] if stored.ndim > 1 else 2)[:, :2]
    if not np.isfinite(microns).all():
        raise BagError("bad_coords", "'coords' holds values that are no microns")
    return {
        "coords_unit": "um",
        "coords_um": microns,
        "coords": None if mpp is None else level0_coords(microns / np.asarray(mpp)),
        "tile_um": tile_um,
        "side_px": None if mpp is None or tile_um is None else round(tile_um / mpp[0]),
    }


def _is_region(attrs: Mapping[str, Any], encoder: str) -> bool:
    return str(attrs.get("unit_of_vectors", "")) == "region" or "hipt" in encoder.lower()


def _storage(data: h5py.Dataset) -> str:
    if data.chunks is None:
        return "contiguous"
    packed = f", {data.compression}" if data.compression else ""
    return f"chunks {' x '.join(str(n) for n in data.chunks)}{packed}"
