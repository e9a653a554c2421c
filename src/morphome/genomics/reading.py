"""Text of molecular files: comment lines cut, columns by name, symbols to columns."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd

from morphome.cohort.slide_sheet import check_utf8
from morphome.cohort.tables import read_bytes
from morphome.errors import MorphomeError


def body_of(path: Path, setting: str, comments: bool = True) -> bytes:
    """Bytes from the header line on: leading comment lines are cut ('#' inside a line is text).

    Args:
        comments: False where "#" may begin the header itself, as in data sets of Xena.

    Raises:
        MorphomeError: naming the file: missing, a damaged archive, or a pointer of Git LFS instead of the data.
    """
    raw = read_bytes(path, setting)
    if raw.startswith(b"version https://git-lfs"):
        raise MorphomeError(
            f"{path}: only a pointer of Git LFS, not the data ({setting})", "fetch the file itself (git lfs pull)"
        )
    start = 3 if raw[:3] == b"\xef\xbb\xbf" else 0
    while comments and raw[start : start + 1] == b"#":
        end = raw.find(b"\n", start)
        if end < 0:
            return b""
        start = end + 1
    return raw[start:]


def header_line(body: bytes) -> list[str]:
    """Column names of a tab separated body."""
    return body.split(b"\n", 1)[0].decode("utf-8", "replace").rstrip("\r").split("\t")


def read_columns(
    path: Path, setting: str, wanted: list[str], optional: tuple[str, ...] = (), comments: bool = True
) -> pd.DataFrame:
    """Columns of a tab separated file as text; quotes are text.

    Args:
        wanted: columns that must be there.
        optional: columns that are read when they are there.
        comments: as for :func:`body_of`.

    Raises:
        MorphomeError: naming the file: missing, not UTF-8, a missing column, not a table.
    """
    body = body_of(path, setting, comments)
    check_utf8(body, path, setting)
    header = header_line(body)
    if missing := [name for name in wanted if name not in header]:
        raise MorphomeError(
            f"{path}: no column '{missing[0]}' (file of {len(body)} bytes after its comments)",
            "the file is damaged or of another kind: download it again, or check the format in the configuration",
        )
    chosen = [*wanted, *(name for name in optional if name in header)]
    try:
        return pd.read_csv(
            io.BytesIO(body), sep="\t", usecols=chosen, dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE
        )
    except (ValueError, pd.errors.ParserError) as error:
        raise MorphomeError(f"{path}: cannot be read as a table: {error}", "download the file again") from None


def places_of(symbols: np.ndarray, ids: np.ndarray) -> tuple[list[str], np.ndarray, dict[str, str]]:
    """Sorted unique symbols, each row's place in them, and symbol to ids joined by ";"."""
    genes, order = np.unique(symbols, return_inverse=True)
    found: dict[str, list[str]] = {}
    for symbol, gene_id in zip(symbols.tolist(), ids.tolist(), strict=True):
        if gene_id and gene_id not in found.setdefault(symbol, []):
            found[symbol].append(gene_id)
    return genes.tolist(), order, {symbol: ";".join(found[symbol]) for symbol in genes.tolist() if found.get(symbol)}
