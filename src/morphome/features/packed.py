"""One HDF5 file with the bags of many slides: ``features`` cut by ``offsets``, named by ``slide_id``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from morphome.cohort.barcode import cut_suffix
from morphome.errors import MorphomeError
from morphome.features.bag import BagFacts, OpenBag, plain_attr

_NAMES = ("features", "offsets", "slide_id")


@dataclass(frozen=True)
class Packed:
    """A packed file that is open.

    Attributes:
        bounds: first and one past the last row of each slide, in file order.
        cases: patient of each slide; empty where the file does not say it.
        encoder, unit: as far as the file tells; the unit is "region" or "unknown".
    """

    bounds: dict[str, tuple[int, int]]
    cases: dict[str, str]
    encoder: str
    unit: str
    features: h5py.Dataset

    def facts(self, slide: str) -> BagFacts:
        """Facts of one slide's bag; it has no coordinates."""
        start, stop = self.bounds[slide]
        chunks = self.features.chunks
        return BagFacts(
            stop - start,
            self.features.shape[1],
            None,
            "packed",
            self.encoder,
            layout="packed_h5",
            dtype=str(self.features.dtype),
            storage=f"chunks {' x '.join(map(str, chunks))}" if chunks else "contiguous",
            unit=self.unit,
            slide_id=slide,
        )

    def bag(self, slide: str) -> OpenBag:
        """The bag of one slide."""
        first = self.bounds[slide][0]
        return OpenBag(self.facts(slide), lambda start, stop: self.features[first + start : first + stop])


def is_packed(path: Path) -> bool:
    """Whether a file is an HDF5 file that holds the bags of many slides."""
    try:
        with h5py.File(path, "r", locking=False) as handle:
            return "offsets" in handle and "slide_id" in handle
    except OSError:
        return False


@contextmanager
def open_packed(path: Path) -> Iterator[Packed]:
    """Open a packed file.

    Raises:
        MorphomeError: no HDF5 file, a dataset is missing, a slide occurs twice, or the offsets do not fit.
    """
    try:
        handle = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise MorphomeError(f"{path}: cannot be read as HDF5: {error} (features.path)", "check the file") from None
    with handle:
        if absent := [name for name in _NAMES if name not in handle]:
            raise MorphomeError(
                f"{path}: no dataset '{absent[0]}' (features.path)",
                "a packed file has features, offsets and slide_id; for one file a slide, name the folder instead",
            )
        features, offsets = handle["features"], handle["offsets"][()].astype(np.int64)
        ids = [cut_suffix(str(name)) for name in handle["slide_id"].asstr()[()]]
        if twice := [slide for slide, count in Counter(ids).items() if count > 1]:
            raise MorphomeError(f"{path}: slide '{twice[0]}' occurs twice", "keep one bag of features per slide")
        fits = features.ndim == 2 and len(offsets) == len(ids) + 1 and offsets[0] == 0 and offsets[-1] == len(features)
        if not fits or (np.diff(offsets) < 0).any():
            raise MorphomeError(
                f"{path}: offsets do not cut {features.shape} features into {len(ids)} slides", "make the file again"
            )
        cases = handle["case_id"].asstr()[()] if "case_id" in handle else []
        encoder = str(plain_attr(handle.attrs.get("encoder")) or "unknown")
        yield Packed(
            {slide: (int(a), int(b)) for slide, a, b in zip(ids, offsets[:-1], offsets[1:], strict=True)},
            {slide: str(case) for slide, case in zip(ids, cases, strict=False)},
            encoder,
            "region" if "hipt" in encoder.lower() or "region" in encoder.lower() else "unknown",
            features,
        )
