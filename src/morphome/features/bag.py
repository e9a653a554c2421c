"""What a bag of features is, whoever wrote the file: its facts, its rows, and the checks every bag must pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

#: Numbers read at once when a whole bag is checked: 64 MiB of float32.
CHUNK_VALUES = 1 << 24
#: Largest JSON file beside a bag that is read; those of slide2vec, hs2p and zarr have a few KiB.
MAX_JSON_BYTES = 16 << 20


class BagError(ValueError):
    """A bag that cannot be used. ``code`` is short and stable."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


@dataclass(frozen=True)
class BagFacts:
    """What a feature file holds.

    Attributes:
        n_tiles, dim: shape of the bag.
        coords: int32 (N, 2) level-0 x, y; None where the file has none, or has microns and the resolution is unknown.
        producer, encoder: as far as the file tells; "unknown" where it does not.
        layout: kind of file: "h5", "pt", "npy", "npz" or "zarr".
        dtype: of the vectors as stored.
        dataset: path of the vectors in an HDF5 file or a zarr store.
        storage: how the vectors lie on disk: "contiguous", "chunks 32 x 1024, gzip" ...
        unit: what one vector stands for: "tile", "region" or "unknown".
        coords_dtype, coords_unit: as stored: "px" (level 0), "um" or "" (no coordinates).
        coords_um: float64 (N, 2) microns of a file that stores microns, else None.
        mpp: microns per level-0 pixel (x, y) as the file or the caller says, else None. Never taken from nominal
            magnifications nor from ``patch_size_level0``, which is floored.
        patch_px: side of a tile as the encoder saw it; side_px: the same in level-0 pixels; tile_um: in microns.
        overlap_px: overlap of neighbouring tiles in pixels of the patch.
        attrs: attributes of the coordinates (or what stands for them), in plain Python.
        slide_id: as the file says; empty where it does not.
        mark: the fingerprint that the file carries itself; empty for files of other tools.
        notes: what a user should know, one sentence each.
    """

    n_tiles: int
    dim: int
    coords: np.ndarray | None
    producer: str
    encoder: str
    layout: str = "h5"
    dtype: str = "float32"
    dataset: str = "features"
    storage: str = "contiguous"
    unit: str = "tile"
    coords_dtype: str = ""
    coords_unit: str = ""
    coords_um: np.ndarray | None = None
    mpp: tuple[float, float] | None = None
    patch_px: int | None = None
    side_px: int | None = None
    tile_um: float | None = None
    overlap_px: float | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    slide_id: str = ""
    mark: str = ""
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """The file's own fingerprint, or ``imported:<producer>:<encoder>:<dim>`` for files of other tools."""
        return self.mark or f"imported:{self.producer}:{self.encoder}:{self.dim}"


@dataclass(frozen=True)
class OpenBag:
    """A bag whose file is open: its facts and ``rows(start, stop)``, vectors (n, D) in the stored dtype."""

    facts: BagFacts
    rows: Callable[[int, int], np.ndarray]

    def values(self) -> np.ndarray:
        """All vectors (N, D) in the stored dtype."""
        return self.rows(0, self.facts.n_tiles)


def check_bag(bag: OpenBag, on_rows: Callable[[np.ndarray], None] | None = None) -> None:
    """Read a bag once and refuse what no model may be trained on.

    Args:
        on_rows: called with every piece that was read, for example to hash it.

    Raises:
        BagError: ``not_finite``, ``unequal_length`` or ``duplicate_coords``.
    """
    facts = bag.facts
    step = max(1, CHUNK_VALUES // max(facts.dim, 1))
    for start in range(0, facts.n_tiles, step):
        rows = bag.rows(start, min(start + step, facts.n_tiles))
        check_finite(rows)
        if on_rows is not None:
            on_rows(rows)
    for coords in (facts.coords, facts.coords_um):
        if coords is None:
            continue
        if len(coords) != facts.n_tiles:
            raise BagError("unequal_length", f"{facts.n_tiles} vectors but {len(coords)} coordinates")
        if repeated := len(coords) - len(np.unique(coords, axis=0)):
            raise BagError("duplicate_coords", f"{repeated} tiles occur twice")


def check_finite(features: np.ndarray) -> None:
    """Raise :class:`BagError` ``not_finite`` where a value is NaN or infinite."""
    with np.errstate(all="ignore"):
        # NaN and infinity survive a sum, and one sum is faster than a mask of the same size.
        if np.isfinite(features.sum(dtype=np.float32)):
            return
    bad = ~np.isfinite(features)
    if bad.any():
        raise BagError("not_finite", f"{int(bad.sum())} values are NaN or infinite")


def level0_coords(coords: np.ndarray) -> np.ndarray:
    """Stored coordinates of any kind as int32 (N, 2) level-0 pixels.

    Args:
        coords: (N, 2 or more) or (1, N, 2), x and y first; microns have been divided by the resolution.

    Raises:
        BagError: ``bad_coords``.
    """
    coords = coords[0] if coords.ndim == 3 and coords.shape[0] == 1 else coords
    if coords.size == 0:
        return np.zeros((0, 2), np.int32)
    if coords.ndim != 2 or coords.shape[1] < 2 or coords.dtype.kind not in "iuf":
        raise BagError("bad_coords", f"'coords' has shape {coords.shape} and type {coords.dtype}, not (tiles, 2)")
    limits = np.iinfo(np.int32)
    if not np.isfinite(coords).all() or coords.min() < limits.min or coords.max() > limits.max:
        raise BagError("bad_coords", "'coords' holds values that are no level-0 pixels")
    return np.round(coords[:, :2]).astype(np.int32)


def bag_shape(shape: tuple[int, ...], name: str) -> tuple[int, int, bool]:
    """(N, D, whether a leading axis of length 1 is to be dropped) of an array of vectors.

    Raises:
        BagError: ``not_a_bag``: one vector for the slide, or some other shape.
    """
    if len(shape) == 1:
        raise BagError("not_a_bag", f"'{name}' has shape {shape}: one vector for the whole slide, not one a tile")
    if len(shape) == 3 and shape[0] == 1:
        return shape[1], shape[2], True
    if len(shape) != 2:
        raise BagError("not_a_bag", f"'{name}' has shape {shape}, not (tiles, dimensions)")
    return shape[0], shape[1], False


def grid_step(coords: np.ndarray) -> float | None:
    """The commonest distance between neighbours of one row of tiles; None with fewer than two in every row.

    Tools that tile each piece of tissue from its own corner have several grids, but one step.
    """
    if len(coords) < 2:
        return None
    order = np.lexsort((coords[:, 0], coords[:, 1]))
    x, y = coords[order, 0].astype(np.float64), coords[order, 1]
    steps = np.diff(x)[(np.diff(y) == 0) & (np.diff(x) > 0)]
    if not len(steps):
        return None
    # Microns are no whole numbers: steps that differ in the third decimal are one step.
    values, counts = np.unique(np.round(steps, 2), return_counts=True)
    return float(values[counts == counts.max()].min())


def plain_attr(value: Any) -> Any:
    """An attribute as Python sees it; the text "None", which TRIDENT writes for nothing, becomes None."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if hasattr(value, "tolist"):
        value = value.tolist()
    return None if isinstance(value, str) and value == "None" else value


def number(value: Any) -> float | None:
    """A finite number above zero, or None."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if 0 < found < float("inf") else None


def whole(value: Any) -> int | None:
    """As :func:`number`, rounded."""
    found = number(value)
    return None if found is None else round(found)


def pair(mpp: float | tuple[float, float] | None) -> tuple[float, float] | None:
    """Microns per pixel as (x, y)."""
    if mpp is None or isinstance(mpp, tuple):
        return mpp
    return float(mpp), float(mpp)


def read_small_json(path: Path) -> dict[str, Any]:
    """A JSON object of a few KiB that lies beside a bag.

    Raises:
        BagError: ``unreadable``: too large, or no JSON object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise BagError("unreadable", f"{path.name} has more than {MAX_JSON_BYTES >> 20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BagError("unreadable", f"{path.name} cannot be read: {error}") from None
    except (ValueError, RecursionError):
        raise BagError("unreadable", f"{path.name} is not valid JSON") from None
    if not isinstance(content, dict):
        raise BagError("unreadable", f"{path.name} holds no JSON object")
    return content


def to_half(features: np.ndarray) -> np.ndarray:
    """Vectors as float16.

    Raises:
        BagError: ``not_finite``, or ``too_large``: a value beyond the largest float16 (65,504).
    """
    check_finite(features)
    if features.dtype != np.float16 and features.size:
        largest = float(max(features.max(), -features.min()))
        if largest > float(np.finfo(np.float16).max):
            raise BagError("too_large", f"the value {largest:g} is beyond the largest float16 (65,504)")
    return features.astype(np.float16, copy=False)
