"""Annotated single cells from a user's ``.h5ad`` file: a balanced draw of cells as sparse counts.

The file is read with h5py. The layout is that of anndata 0.7 and later (encoding-version 0.1.0 / 0.2.0): ``X`` or a
layer as a dense array or as CSR or CSC parts, ``obs`` and ``var`` as groups of columns. The library itself is not
used: its releases for pandas 3 did not exist when this was written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from scipy import sparse

from morphome.errors import MorphomeError

LEAST_TYPES = 5
_WRITE_AGAIN = "open the file with a current anndata and write it again"


@dataclass(frozen=True)
class Cells:
    """Cells drawn from a file.

    Attributes:
        genes: names of the columns.
        types: names of the cell types, sorted.
        labels: (n,) number of each cell's type.
        counts: CSR float32 (n, genes), whole numbers.
        total: cells of the file that have a type.
    """

    genes: list[str]
    types: list[str]
    labels: np.ndarray
    counts: sparse.csr_matrix
    total: int


def read_cells(
    path: Path,
    cell_type: str,
    *,
    layer: str | None = None,
    symbols: str | None = None,
    per_type: int = 200,
    seed: int = 0,
) -> Cells:
    """Draw cells, at most ``per_type`` of each type, so that frequent types do not rule.

    Args:
        path: the file.
        cell_type: column of ``obs``; cells without a value are left out.
        layer: name of the layer that holds counts; ``X`` when None.
        symbols: column of ``var`` with gene symbols; the index when None.
        per_type: most cells of a type.
        seed: of the draw.

    Raises:
        MorphomeError: naming the file and what is missing: the column, five types, counts (negative values or
            fractions are none).
    """
    try:
        handle = h5py.File(path)
    except OSError as error:
        raise MorphomeError(
            f"{path}: not a readable .h5ad file ({error})", "check molecular.encoder.cells.path"
        ) from None
    with handle:
        labels, types = _labels(handle, cell_type, path)
        if len(types) < LEAST_TYPES:
            raise MorphomeError(
                f"{path}: {len(types)} cell types in '{cell_type}' ({', '.join(types)}); at least {LEAST_TYPES} needed",
                "name a finer annotation in molecular.encoder.cells.cell_type",
            )
        genes = _names(handle, "var", symbols, path)
        random = np.random.default_rng([seed, 1])
        chosen = np.sort(
            np.concatenate(
                [
                    random.choice(place, min(per_type, len(place)), replace=False)
                    for place in (np.flatnonzero(labels == number) for number in range(len(types)))
                ]
            )
        )
        where = f"layers/{layer}" if layer else "X"
        if where not in handle:
            raise MorphomeError(f"{path}: no {where}", f"its layers are {sorted(handle.get('layers', {}))}")
        counts = _rows(handle[where], chosen, (len(labels), len(genes)), f"{path}, {where}")
    values = counts.data
    if values.size and (values.min() < 0 or not np.array_equal(values, np.round(values))):
        raise MorphomeError(
            f"{path}: {where} holds values that are no counts (least {values.min():g}, or fractions)",
            "name the layer with raw counts in molecular.encoder.cells.layer",
        )
    full = np.asarray(counts.sum(axis=1)).ravel() > 0
    return Cells(genes, types, labels[chosen][full], counts[full], int((labels >= 0).sum()))


def _labels(handle: h5py.File, column: str, path: Path) -> tuple[np.ndarray, list[str]]:
    """Number of the type per cell (-1 = none), and the names of the types that occur, sorted."""
    names = _column(handle, "obs", column, path)
    known = sorted({name for name in names if name is not None and name not in ("", "nan", "NA")})
    number = {name: place for place, name in enumerate(known)}
    return np.array([number.get(name, -1) if name is not None else -1 for name in names], dtype=np.int64), known


def _names(handle: h5py.File, frame: str, column: str | None, path: Path) -> list[str]:
    """Gene names; an index where no column is named."""
    if column is None:
        group = _frame(handle, frame, path)
        column = group.attrs.get("_index", "_index")
        column = column.decode() if isinstance(column, bytes) else str(column)
    return ["" if name is None else name for name in _column(handle, frame, column, path)]


def _frame(handle: h5py.File, frame: str, path: Path) -> h5py.Group:
    group = handle.get(frame)
    if not isinstance(group, h5py.Group):
        raise MorphomeError(f"{path}: {frame} is not a table of columns (an old layout?)", _WRITE_AGAIN)
    return group


def _column(handle: h5py.File, frame: str, column: str, path: Path) -> list[str | None]:
    group = _frame(handle, frame, path)
    if column not in group:
        raise MorphomeError(
            f"{path}: {frame} has no column '{column}'; it has {', '.join(sorted(group)[:20])}",
            "correct molecular.encoder.cells",
        )
    found = group[column]
    if isinstance(found, h5py.Group) and "codes" in found and "categories" in found:
        categories = _text(found["categories"])
        return [categories[code] if code >= 0 else None for code in found["codes"][:].tolist()]
    if isinstance(found, h5py.Group) and "values" in found and "mask" in found:  # nullable strings
        return [
            None if lost else name for name, lost in zip(_text(found["values"]), found["mask"][:].tolist(), strict=True)
        ]
    if not isinstance(found, h5py.Dataset):
        raise MorphomeError(f"{path}: {frame}/{column} is stored in a way that is not known", _WRITE_AGAIN)
    return list(_text(found))


def _text(found: h5py.Dataset | h5py.Group) -> list[str]:
    if isinstance(found, h5py.Group):  # a nullable array of strings as categories
        found = found["values"]
    if h5py.check_string_dtype(found.dtype) is not None:
        return [str(name) for name in found.asstr()[:]]
    return [str(name) for name in found[:].tolist()]


def _rows(found: h5py.Dataset | h5py.Group, rows: np.ndarray, shape: tuple[int, int], where: str) -> sparse.csr_matrix:
    """Some rows (sorted) of a dense, CSR or CSC matrix as CSR float32."""
    if isinstance(found, h5py.Dataset):
        if found.shape != shape:
            raise MorphomeError(f"{where}: shape {found.shape}, but obs and var have {shape}", _WRITE_AGAIN)
        return sparse.csr_matrix(np.stack([found[int(row)] for row in rows]).astype(np.float32))
    kind = found.attrs.get("encoding-type", "")
    kind = kind.decode() if isinstance(kind, bytes) else str(kind)
    if kind not in ("csr_matrix", "csc_matrix") or tuple(int(n) for n in found.attrs["shape"]) != shape:
        raise MorphomeError(f"{where}: '{kind}' is no CSR, CSC or dense matrix of {shape}", _WRITE_AGAIN)
    starts = found["indptr"][:].astype(np.int64)
    if kind == "csc_matrix":
        whole = sparse.csc_matrix((found["data"][:], found["indices"][:], starts), shape=shape)
        return sparse.csr_matrix(whole.tocsr()[rows], dtype=np.float32)
    data = [found["data"][starts[row] : starts[row + 1]] for row in rows]
    columns = [found["indices"][starts[row] : starts[row + 1]] for row in rows]
    ends = np.concatenate([[0], np.cumsum([len(part) for part in data])])
    parts = (np.concatenate(data).astype(np.float32), np.concatenate(columns), ends)
    return sparse.csr_matrix(parts, shape=(len(rows), shape[1]))
