"""Bags by slide id: one way to read tile features, whoever wrote the files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from morphome.errors import MorphomeError
from morphome.features.bag import BagError, check_finite
from morphome.features.layouts import read_bag
from morphome.files import read_parquet

INDEX_FORMAT = "morphome.feature_index"
#: Columns of the index and their types.
INDEX_COLUMNS: dict[str, str] = {
    "slide_id": "str",
    "path": "str",
    "layout": "str",
    "start": "int64",
    "stop": "int64",
    "n_tiles": "int64",
    "dim": "int64",
    "has_coords": "bool",
    "encoder": "str",
    "fingerprint": "str",
    "content_key": "str",
    "status": "str",
    "reason_code": "str",
    "reason": "str",
    "dataset": "str",
    "mpp_x": "float64",
    "mpp_y": "float64",
}
#: Columns that came later; an index without them means this: the only features of a file, coordinates in pixels.
_DEFAULTS = {"dataset": "", "mpp_x": math.nan, "mpp_y": math.nan}


def index_table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Rows of the index as a table, sorted by ``slide_id``, with the contract's columns and types.

    ``dataset``, ``mpp_x`` and ``mpp_y`` say how an imported bag is to be read and may be left out of a row.
    """
    table = pd.DataFrame([{**_DEFAULTS, **row} for row in rows], columns=list(INDEX_COLUMNS)).astype(INDEX_COLUMNS)
    return table.sort_values("slide_id").reset_index(drop=True)


class BagStore:
    """Features of the slides of an index; no file stays open, so that a store may be copied to other processes.

    Args:
        index: ``morphome.feature_index``.

    Attributes:
        slides: the index, one row a slide.
        dim: length of a feature vector; 0 when no slide has features.
        has_coords: every slide with features has coordinates.

    Raises:
        MorphomeError: a slide occurs twice, or usable slides differ in dimension or fingerprint.
    """

    def __init__(self, index: Path) -> None:
        self._index = Path(index)
        self.slides = read_parquet(self._index, INDEX_FORMAT)
        if (twice := self.slides["slide_id"].duplicated()).any():
            raise MorphomeError(
                f"{index}: slide '{self.slides['slide_id'][twice].iloc[0]}' occurs twice", "make the index again"
            )
        self._rows: dict[str, dict[str, Any]] = {row["slide_id"]: row for row in self.slides.to_dict("records")}
        usable = self.slides[self.slides["status"] == "ok"]
        for column in ("dim", "fingerprint"):
            if usable[column].nunique() > 1:
                raise MorphomeError(
                    f"{index}: features of more than one {column}: {sorted(usable[column].unique())[:5]}",
                    "encode all slides with one encoder",
                )
        self.dim = int(usable["dim"].iloc[0]) if len(usable) else 0
        self.has_coords = bool(len(usable)) and bool(usable["has_coords"].all())

    def bag(self, slide_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Features and places of some slides as one bag, in the order slide id, then y, then x.

        Args:
            slide_ids: in any order; each once.

        Returns:
            Features float32 (N, D) and int32 (N, 3): number of the slide (from 0, by slide id), level-0 x and y;
            x and y are 0 where a slide has no coordinates.

        Raises:
            MorphomeError: unknown slide, a slide without features, a file that is gone or changed, NaN or infinity.
        """
        if len(set(slide_ids)) != len(slide_ids):
            raise MorphomeError(f"slides named twice for one bag: {sorted(slide_ids)}", "name each slide once")
        bags = [self._slide(slide) for slide in sorted(slide_ids)]
        joined = np.empty((sum(len(values) for values, _ in bags), self.dim), np.float32)
        places = np.zeros((len(joined), 3), np.int32)
        start = 0
        for index, (values, coords) in enumerate(bags):
            rows = slice(start, start + len(values))
            start = rows.stop
            if not len(values):
                continue  # its dimension may be another: some tools write (0, anything)
            joined[rows] = values  # the one pass that turns float16 into float32
            places[rows, 0] = index
            if coords is not None:
                places[rows, 1:] = coords
                order = np.lexsort((coords[:, 0], coords[:, 1]))
                if (np.diff(order) != 1).any():
                    joined[rows], places[rows] = joined[rows][order], places[rows][order]
        try:
            check_finite(joined)
        except BagError as error:
            raise self._broken(", ".join(sorted(slide_ids)), str(error)) from None
        return joined, places

    def _slide(self, slide: str) -> tuple[np.ndarray, np.ndarray | None]:
        row = self._rows.get(slide)
        if row is None or row["status"] == "failed":
            why = "is not in the index" if row is None else f"has no features: {row['reason']}"
            raise MorphomeError(f"{self._index}: slide '{slide}' {why}", "leave the slide out, or encode it")
        try:
            values, coords = self._read(row)
        except (OSError, KeyError, BagError) as error:
            raise self._broken(slide, str(error)) from None
        if values.shape != (row["n_tiles"], row["dim"]):
            raise self._broken(slide, f"shape {values.shape}, but the index says {(row['n_tiles'], row['dim'])}")
        return values, coords

    def _read(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
        path = self._path(row)
        if row["layout"] == "packed_h5":
            with h5py.File(path, "r", locking=False) as handle:
                return handle["features"][row["start"] : row["stop"]], None
        options = {**_DEFAULTS, **row}
        known = (options["mpp_x"], options["mpp_y"])
        values, coords = read_bag(path, options["dataset"] or None, None if math.isnan(known[0]) else known)
        return values, coords if row["has_coords"] else None

    def _path(self, row: dict[str, Any]) -> Path:
        """The file as the index names it; beside the index when the results were moved."""
        path = Path(row["path"])
        beside = self._index.parent / path.name
        return beside if not path.exists() and beside.exists() else path

    def _broken(self, slide: str, why: str) -> MorphomeError:
        path = self._rows[slide]["path"] if slide in self._rows else self._index
        return MorphomeError(f"{path}: features of slide '{slide}': {why}", "run the encode and collect steps again")
