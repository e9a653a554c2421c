"""Feature files as several tools write them: where the vectors and coordinates lie, and what is wrong with them.

| producer | vectors | coordinates |
|---|---|---|
| morphome, CLAM, TRIDENT | ``features`` (N, D), in old TRIDENT files (1, N, D) | ``coords`` (N, 2), level-0 pixels |
| STAMP | ``feats`` (N, D) | ``coords`` in microns: not used, they need the slide's resolution |
| AtlasPatch | the only dataset in the group ``features`` | ``coords`` (N, 5), the first two in level-0 pixels |
| CLAM ``.pt`` | a tensor (N, D), or {"features", "coords"} | none |
| packed ``.h5`` | ``features`` of all slides, cut by ``offsets`` | none |
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from morphome.cohort.slide_sheet import few_names

#: Numbers read at once when a whole bag is checked: 64 MiB of float32.
_CHUNK_VALUES = 1 << 24


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
        coords: int32 (N, 2) level-0 x, y; None where the file has none that can be used.
        producer, encoder: as far as the file tells.
        dataset: path of the vectors in an HDF5 file.
        squeeze: the vectors have a leading axis of length 1.
    """

    n_tiles: int
    dim: int
    coords: np.ndarray | None
    producer: str
    encoder: str
    dataset: str = "features"
    squeeze: bool = False


def find_features(handle: h5py.File) -> tuple[h5py.Dataset, bool]:
    """The dataset of vectors and whether it has a leading axis to drop.

    Raises:
        BagError: ``no_features``, ``several_encoders`` or ``not_a_bag`` (one vector for a slide or patient).
    """
    kind = str(handle.attrs.get("feat_type", "tile"))
    if kind != "tile":
        raise BagError("not_a_bag", f"holds {kind}-level features, not one vector a tile (feat_type)")
    found = handle.get("features", handle.get("feats"))
    if found is None:
        raise BagError("no_features", f"no dataset 'features' or 'feats'; it has {few_names(handle) or 'nothing'}")
    if isinstance(found, h5py.Group):
        names = list(found)
        if len(names) != 1:
            raise BagError("several_encoders", f"group 'features' holds {few_names(names) or 'nothing'}: keep one")
        found = found[names[0]]
    if found.ndim == 1:
        raise BagError("not_a_bag", f"'{found.name}' has shape {found.shape}: one vector for the whole slide")
    if found.ndim == 3 and found.shape[0] == 1:
        return found, True
    if found.ndim != 2:
        raise BagError("not_a_bag", f"'{found.name}' has shape {found.shape}, not (tiles, dimensions)")
    return found, False


def read_coords(handle: h5py.File) -> np.ndarray | None:
    """Level-0 coordinates int32 (N, 2); None without them or where they are in microns."""
    if "coords" not in handle or handle.attrs.get("unit", "") == "um" or "feats" in handle:
        return None
    coords = handle["coords"][()]
    coords = coords[0] if coords.ndim == 3 and coords.shape[0] == 1 else coords
    if coords.size == 0:
        return np.zeros((0, 2), np.int32)
    if coords.ndim != 2 or coords.shape[1] < 2:
        raise BagError("bad_coords", f"'coords' has shape {coords.shape}, not (tiles, 2)")
    limits = np.iinfo(np.int32)
    if not np.isfinite(coords).all() or coords.min() < limits.min or coords.max() > limits.max:
        raise BagError("bad_coords", "'coords' holds values that are no level-0 pixels")
    return coords[:, :2].astype(np.int32)


def inspect_bag(path: Path) -> BagFacts:
    """Facts of one slide's feature file, after reading all of it once.

    Raises:
        BagError: ``unreadable``, ``no_features``, ``several_encoders``, ``not_a_bag``, ``unequal_length``,
            ``duplicate_coords``, ``bad_coords`` or ``not_finite``.
    """
    if path.suffix == ".pt":
        features, coords = load_pt(path)
        check_finite(features)
        facts = BagFacts(*features.shape, coords, "pt", "unknown")
    else:
        try:
            with h5py.File(path, "r", locking=False) as handle:
                data, squeeze = find_features(handle)
                n_tiles, dim = data.shape[-2:]
                step = max(1, _CHUNK_VALUES // max(dim, 1))
                for start in range(0, n_tiles, step):
                    check_finite(data[0, start : start + step] if squeeze else data[start : start + step])
                producer, encoder = _producer(handle, data)
                facts = BagFacts(n_tiles, dim, read_coords(handle), producer, encoder, data.name, squeeze)
        except OSError as error:
            raise BagError("unreadable", f"cannot be read as HDF5: {error}") from None
    coords = facts.coords
    if coords is not None and len(coords) != facts.n_tiles:
        raise BagError("unequal_length", f"{facts.n_tiles} vectors but {len(coords)} coordinates")
    if coords is not None and len(np.unique(coords, axis=0)) != len(coords):
        raise BagError("duplicate_coords", f"{len(coords) - len(np.unique(coords, axis=0))} tiles occur twice")
    return facts


def check_finite(features: np.ndarray) -> None:
    """Raise :class:`BagError` ``not_finite`` where a value is NaN or infinite."""
    bad = ~np.isfinite(features)
    if bad.any():
        raise BagError("not_finite", f"{int(bad.sum())} values are NaN or infinite")


def load_pt(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Vectors float32 (N, D) and coordinates of a ``.pt`` file, loaded without running code from it.

    Raises:
        BagError: ``unreadable`` or ``not_a_bag``.
    """
    import pickle
    import struct

    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BagError("unreadable", f"cannot be read: {error}") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError, LookupError, ValueError, TypeError, AttributeError,
            struct.error):  # fmt: skip
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
    features = content.detach().to(torch.float32).numpy()
    features = features[0] if features.ndim == 3 and features.shape[0] == 1 else features
    if features.ndim != 2:
        raise BagError("not_a_bag", f"has shape {tuple(features.shape)}, not (tiles, dimensions)")
    return features, None if coords is None else np.asarray(coords)[:, :2].astype(np.int32)


def _producer(handle: h5py.File, data: h5py.Dataset) -> tuple[str, str]:
    """Which tool wrote a file, and which encoder it names."""

    def text(value: object) -> str:
        return value.decode() if isinstance(value, bytes) else str(value)

    if "stamp_version" in handle.attrs or data.name.endswith("feats"):
        return "stamp", text(handle.attrs.get("extractor", "unknown"))
    if data.name.count("/") > 1:
        return "atlaspatch", data.name.rsplit("/", 1)[1]
    if "encoder_fingerprint" in data.attrs:
        return "morphome", text(data.attrs.get("encoder", "unknown"))
    if "encoder" in data.attrs:
        return "trident", text(data.attrs["encoder"])
    return "h5", "unknown"
