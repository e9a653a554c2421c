"""Tables as text: CSV, TSV, gzip and zip of one member, and the PORPOISE tables with one row per slide."""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from morphome.cohort.barcode import cut_suffix
from morphome.cohort.slide_sheet import check_utf8, delimiter_of
from morphome.errors import MorphomeError

_PORPOISE_COLUMNS = ("case_id", "slide_id", "survival_months", "censorship")
#: Read where they are: tables of SurvPath carry two more end points.
_PORPOISE_MORE = (
    *("survival_months_dss", "censorship_dss", "survival_months_pfi", "censorship_pfi"),
    *("age", "is_female", "oncotree_code"),
)


def read_bytes(path: Path, setting: str) -> bytes:
    """Content of a file, unpacked in memory when it is gzip or a zip with a single member.

    The *name* of the zip's member is never used: published tables have names with "../" in them.

    Raises:
        MorphomeError: naming the file and the setting.
    """
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise MorphomeError(f"{path}: file not found ({setting})", f"check {setting}") from None
    except IsADirectoryError:
        raise MorphomeError(f"{path}: is a folder, not a table ({setting})", f"name the file in {setting}") from None
    try:
        if raw[:2] == b"\x1f\x8b":
            return gzip.decompress(raw)
        if raw[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                members = [item for item in archive.infolist() if not item.is_dir()]
                if len(members) != 1:
                    raise MorphomeError(
                        f"{path}: the zip holds {len(members)} files, expected one table ({setting})",
                        "unpack it and name the table itself",
                    )
                return archive.read(members[0])
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise MorphomeError(f"{path}: damaged archive ({error})", "download the file again") from None
    return raw


def read_facts(path: Path) -> dict[str, str]:
    """``key: value`` lines, as the meta files, case lists and gene panels of cBioPortal have them; "#": a remark."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = (line.partition(":") for line in lines if not line.startswith("#"))
    return {key.strip(): value.strip() for key, _, value in pairs if value.strip()}


def header_of(raw: bytes, path: Path, setting: str) -> tuple[list[str], str]:
    """Column names and delimiter of a table (a tab in the header line decides), after a check of all its text.

    Raises:
        MorphomeError: naming the file: not UTF-8 (with the line), empty, or separated by semicolons.
    """
    check_utf8(raw, path, setting)
    line = raw.split(b"\n", 1)[0].decode("utf-8-sig").rstrip("\r")
    if not line.strip():
        raise MorphomeError(f"{path}: the table is empty ({setting})", "the first line holds the columns")
    delimiter = delimiter_of(line, path, setting)
    return [name.strip().strip('"') for name in line.split(delimiter)], delimiter


def read_text_table(path: Path, setting: str, columns: set[str] | None = None) -> pd.DataFrame:
    """A table with every cell as text ("" for empty cells); ``columns`` limits what is read.

    Raises:
        MorphomeError: naming the file: missing, damaged, not a table.
    """
    raw = read_bytes(path, setting)
    _, delimiter = header_of(raw, path, setting)
    try:
        table = pd.read_csv(
            io.BytesIO(raw),
            sep=delimiter,
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
            usecols=(lambda name: name.strip() in columns) if columns is not None else None,
        )
    except (ValueError, pd.errors.ParserError) as error:
        raise MorphomeError(f"{path}: cannot be read as a table: {error}", f"check {setting}") from None
    return table.rename(columns=str.strip).astype(object)


def read_porpoise(path: Path, setting: str, suffix: str | None = None) -> pd.DataFrame:
    """One row per slide of a table in the shape of PORPOISE and MCAT, slide ids without ".svs".

    Columns are chosen by name: published tables begin with none, one or two unnamed columns.

    Args:
        path: CSV or a zip of one.
        suffix: read the gene columns that end so ("_rnaseq", ...) as numbers, and only the ids besides; None
            reads the clinical columns as text.

    Raises:
        MorphomeError: naming the file and the column or cell.
    """
    raw = read_bytes(path, setting)
    header, delimiter = header_of(raw, path, setting)
    if missing := [name for name in _PORPOISE_COLUMNS if name not in header]:
        raise MorphomeError(
            f"{path}: no column '{missing[0]}' ({setting})",
            "a table of format porpoise has one row per slide and the columns " + ", ".join(_PORPOISE_COLUMNS),
        )
    ids = {"case_id": str, "slide_id": str}
    if suffix is None:
        clinical = {*_PORPOISE_COLUMNS, *_PORPOISE_MORE}
        wanted = [name for name in header if name in clinical]
        kinds: object = str
    else:
        genes = [name for name in header if name.endswith(suffix)]
        wanted, kinds = [*ids, *genes], {**ids, **dict.fromkeys(genes, np.float32)}
    try:
        table = pd.read_csv(
            io.BytesIO(raw), sep=delimiter, usecols=wanted, dtype=kinds, keep_default_na=suffix is not None
        )
    except ValueError as error:
        raise MorphomeError(f"{path}: cannot be read: {error} ({setting})", "gene columns hold numbers") from None
    for name in ids:
        if (empty := table[name].isna() | (table[name] == "")).any():
            row = int(np.flatnonzero(empty.to_numpy())[0])
            raise MorphomeError(f"{path}, line {row + 2}: '{name}' is empty ({setting})", "fill or remove the row")
    return table.assign(slide_id=[cut_suffix(name) for name in table["slide_id"]])


def one_row_per_patient(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """First row of every ``case_id`` (sorted), after a check that a patient's rows agree in all other columns.

    Args:
        table: one row per slide; ``slide_id`` is left out of the comparison and of the result.

    Raises:
        MorphomeError: naming the file, a patient and a column whose values differ.
    """
    table = table.drop(columns="slide_id")
    patients, first, codes = np.unique(table["case_id"].to_numpy(str), return_index=True, return_inverse=True)
    values = table.drop(columns="case_id")
    for kind in {str(dtype) for dtype in values.dtypes}:
        block = values.loc[:, [str(dtype) == kind for dtype in values.dtypes]]
        cells = block.to_numpy()
        base = cells[first][codes]
        same = (cells == base) | (pd.isna(cells) & pd.isna(base))
        if not same.all():
            row, column = (int(place[0]) for place in np.nonzero(~same))
            raise MorphomeError(
                f"{path}: rows of patient {patients[codes[row]]} differ in column '{block.columns[column]}'",
                "a patient has one outcome and one molecular profile; correct or remove the row",
            )
    return table.iloc[first].reset_index(drop=True)
