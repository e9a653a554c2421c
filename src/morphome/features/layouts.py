"""Feature files as several tools write them: one way to open a bag, whoever wrote it.

| producer | vectors | coordinates |
|---|---|---|
| morphome, CLAM, TRIDENT | ``features`` (N, D), in old TRIDENT files (1, N, D) | ``coords`` (N, 2), level-0 pixels |
| STAMP | ``feats`` (N, D) | ``coords`` in microns: pixels where the slide's resolution is known |
| AtlasPatch | a dataset per encoder in the group ``features`` | ``coords`` (N, 5), the first two in level-0 pixels |
| CLAM, HIPT ``.pt`` | a tensor (N, D), or {"features", "coords"} | none |
| slide2vec | ``.pt`` or ``.npz`` with ``.meta.json`` | ``../tiles/<id>.coordinates.npz`` of hs2p |
| ``.npy`` | an array (N, D) | ``coords/<same name>`` |
| wsidata, LazySlide | ``tables/<encoder>_tiles`` in a ``.zarr`` folder | corners of ``shapes/tiles`` |
| packed ``.h5`` | ``features`` of all slides, cut by ``offsets`` | none |

Files with one vector for a slide or a patient are refused as no bags. The readers are in
:mod:`morphome.features.peers_hdf5`, :mod:`morphome.features.peers_arrays` and :mod:`morphome.features.peers_zarr`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from morphome.features.bag import BagError, BagFacts, OpenBag, check_bag
from morphome.features.bag_files import BAG_SUFFIXES
from morphome.features.peers_arrays import open_array
from morphome.features.peers_hdf5 import open_hdf5
from morphome.features.peers_zarr import open_zarr
from morphome.files import file_sample


@contextmanager
def open_bag(
    path: Path, dataset: str | None = None, mpp: float | tuple[float, float] | None = None
) -> Iterator[OpenBag]:
    """Open the bag of one slide.

    Args:
        path: a file, or a ``.zarr`` folder; its ending says what it is.
        dataset: which features to take where a file holds those of several encoders.
        mpp: microns per level-0 pixel of the slide, used where the file does not say it.

    Raises:
        BagError: it cannot be used; the code says why.
    """
    path = Path(path)
    if path.suffix == ".h5":
        opened = open_hdf5(path, dataset, mpp)
    elif path.suffix == ".zarr":
        opened = open_zarr(path, dataset, mpp)
    elif path.suffix in BAG_SUFFIXES:
        opened = open_array(path, mpp)
    else:
        raise BagError("wrong_extension", f"ends in '{path.suffix}', not in one of {', '.join(BAG_SUFFIXES)}")
    with opened as bag:
        yield bag


def inspect_bag(
    path: Path,
    dataset: str | None = None,
    mpp: float | tuple[float, float] | None = None,
    on_rows: Callable[[np.ndarray], None] | None = None,
) -> BagFacts:
    """Facts of one slide's feature file, after reading all of it once; arguments as for :func:`open_bag`.

    Args:
        on_rows: called with every piece of vectors that was read.

    Raises:
        BagError: the file cannot be used.
    """
    with open_bag(path, dataset, mpp) as bag:
        check_bag(bag, on_rows)
        return bag.facts


def read_bag(
    path: Path, dataset: str | None = None, mpp: float | tuple[float, float] | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Vectors (N, D) in the stored dtype and level-0 coordinates int32 (N, 2) or None, unchecked.

    Raises:
        BagError: the file cannot be read.
    """
    with open_bag(path, dataset, mpp) as bag:
        return bag.values(), bag.facts.coords


def content_key(path: Path) -> str:
    """32 hex digits that change with a bag: from the head and size of a file, or from all files of a store."""
    path = Path(path)
    if not path.is_dir():
        return hashlib.sha256(file_sample(path).encode()).hexdigest()[:32]
    digest = hashlib.sha256()
    for file in sorted(f for part in ("tables", "shapes") for f in (path / part).rglob("*") if f.is_file()):
        digest.update(f"{file.relative_to(path)}:{file_sample(file)}\n".encode())
    return digest.hexdigest()[:32]
