"""Every file of a results tree: atomic, stamped with format, version and the hash of its settings.

A stamp is the dictionary ``{format, format_version, morphome_version, config_hash}``. It lies in the schema
metadata of a Parquet file, under ``"stamp"`` in a JSON file and in the attributes of an HDF5 file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphome import __version__
from morphome.errors import MorphomeError

if TYPE_CHECKING:
    import h5py
    import pandas as pd

#: Newest version of each format that this code writes and reads. Older ones must still open.
FORMAT_VERSION = 1
_PARQUET_KEY = b"morphome"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MAKE_AGAIN = "delete the file and run the step that makes it again"


def settings_hash(settings: Mapping[str, Any]) -> str:
    """First 12 hex digits of the sha256 of the settings as canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def stamp(format_name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The stamp of a file of ``format_name`` that was made with ``settings``."""
    return {
        "format": format_name,
        "format_version": FORMAT_VERSION,
        "morphome_version": __version__,
        "config_hash": settings_hash(settings),
    }


def check_stamp(
    found: Mapping[str, Any], path: Path, format_name: str, settings: Mapping[str, Any] | None = None
) -> None:
    """Refuse a file of another format, of a future version, or (when ``settings`` is given) of other settings.

    Raises:
        MorphomeError: naming the file, what was found and what was expected.
    """
    if found.get("format") != format_name:
        raise MorphomeError(
            f"{path}: this is a '{found.get('format', 'file without a morphome stamp')}', not a '{format_name}'",
            "check the path in the configuration, or delete the file and run the step again",
        )
    version = int(found.get("format_version", 0))
    if version > FORMAT_VERSION:
        raise MorphomeError(
            f"{path}: format version {version} is newer than this morphome understands ({FORMAT_VERSION})",
            "update morphome, or delete the file and run the step again",
        )
    if settings is not None and found.get("config_hash") != settings_hash(settings):
        raise MorphomeError(
            f"{path}: made by other settings (hash {found.get('config_hash')}, expected {settings_hash(settings)})",
            "run the step that makes this file again (Snakemake does it by itself), or choose another 'name'",
        )


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` (same suffix); on success it replaces ``path``, else it is removed.

    Raises:
        MorphomeError: the folder cannot be written, or there is no room (disk, quota or largest size of a file).
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:80]}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp makes 0600; outputs follow the user's umask as if they had been opened plainly.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        number = _errno(error)
        if number not in _NO_ROOM and temporary is not None and getattr(error, "filename", None) != str(temporary):
            raise  # something else that the caller does while writing
        raise MorphomeError(
            f"{path}: cannot be written: {os.strerror(number) if number else error}",
            "make room (disk, quota or limit of file sizes) and run the step again"
            if number in _NO_ROOM
            else "check that the folder exists and that you may write there, then run the step again",
        ) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # a file system that became read-only keeps it
                temporary.unlink(missing_ok=True)


def _errno(error: Exception) -> int | None:
    """Number of a system error; HDF5 names it in a text of its own, sometimes of another class."""
    found = re.search(r"\berrno = (\d+)", str(error))
    return getattr(error, "errno", None) or (int(found.group(1)) if found else None)


@contextlib.contextmanager
def atomic_h5(path: Path) -> Iterator[h5py.File]:
    """Yield an HDF5 file in memory; on success its bytes are written atomically.

    HDF5 does not survive a full disk: its error leaves objects that cannot be closed, and the process crashes when
    it ends (seen with HDF5 2.0). Python writing the finished bytes fails in an orderly way. The memory
    is that of the file, once.
    """
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as handle:
        yield handle
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def write_text(text: str, path: Path) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(content: Mapping[str, Any], path: Path, format_name: str, settings: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, with its stamp under ``"stamp"``. NaN becomes null."""
    body = {"stamp": stamp(format_name, settings), **_plain(content)}
    write_text(json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n", path)


def read_json(path: Path, format_name: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON object written by :func:`write_json`, checking its stamp."""
    content = _load_json(path, format_name)
    check_stamp(content.get("stamp", {}), path, format_name, settings)
    return content


def write_parquet(
    table: pd.DataFrame,
    path: Path,
    format_name: str,
    settings: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a table atomically (no index), its stamp and ``extra`` in the schema metadata.

    Args:
        table: columns are written as they are; the index is dropped.
        extra: further JSON-able facts of the whole table (unit, value type, time grid ...).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrow = pa.Table.from_pandas(table, preserve_index=False)
    meta = json.dumps({"stamp": stamp(format_name, settings), **_plain(extra or {})})
    arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), _PARQUET_KEY: meta.encode()})
    # Dictionaries of tens of thousands of float columns (a gene panel) cost time and save nothing.
    texts = [
        field.name for field in arrow.schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    ]
    with atomic_path(path) as temporary:
        pq.write_table(arrow, temporary, compression="zstd", use_dictionary=texts or False)


def parquet_meta(path: Path) -> dict[str, Any]:
    """``{"stamp": …, **extra}`` of a table written by :func:`write_parquet`; empty for foreign files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        raw = (pq.read_schema(path).metadata or {}).get(_PARQUET_KEY)
    except pa.ArrowInvalid as error:
        raise MorphomeError(f"{path}: not a readable Parquet file ({error})", _MAKE_AGAIN) from None
    return json.loads(raw) if raw else {}


def read_parquet(
    path: Path, format_name: str, settings: Mapping[str, Any] | None = None, columns: list[str] | None = None
) -> pd.DataFrame:
    """Read a table written by :func:`write_parquet`, checking its stamp; ``extra`` is in ``.attrs``."""
    import pyarrow.parquet as pq

    if not Path(path).exists():
        raise _missing(path, format_name)
    meta = parquet_meta(path)
    check_stamp(meta.pop("stamp", {}), path, format_name, settings)
    # Without read-ahead buffers: a panel of 60,000 columns takes seconds and not a minute (measured).
    with pq.ParquetFile(path, pre_buffer=False, memory_map=True) as file:
        table = file.read(columns=columns, use_threads=False).to_pandas()
    table.attrs = meta
    return table


def read_stamp(path: Path, format_name: str) -> dict[str, Any]:
    """The stamp of a Parquet, HDF5 or JSON file; empty for foreign files.

    Raises:
        MorphomeError: the file is missing (``format_name`` says what it would be) or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise _missing(path, format_name)
    if path.suffix == ".parquet":
        return parquet_meta(path).get("stamp", {})
    if path.suffix == ".h5":
        import h5py

        try:
            with h5py.File(path) as handle:
                return dict(handle.attrs)
        except OSError as error:
            raise MorphomeError(f"{path}: not a readable HDF5 file ({error})", _MAKE_AGAIN) from None
    return _load_json(path, format_name).get("stamp", {})


def file_sample(path: Path) -> str:
    """sha256 of a sample of a file and its size, ``<hex>:<bytes>``: cheap, and changes with the file.

    The sample is the first MiB, the last, and 32 pieces of 32 KiB evenly between: a slide that was fetched again with
    the same size and another middle is seen without reading gigabytes.
    """
    size, digest = Path(path).stat().st_size, hashlib.sha256()
    with Path(path).open("rb") as handle:
        digest.update(handle.read(1 << 20))
        for piece in range(1, 33):
            if (at := (size - (1 << 15)) * piece // 33) > 1 << 20:
                handle.seek(at)
                digest.update(handle.read(1 << 15))
        handle.seek(max(0, size - (1 << 20)))
        digest.update(handle.read(1 << 20))
    return f"{digest.hexdigest()}:{size}"


def file_sha256(path: Path, limit_bytes: int | None = None) -> str:
    """sha256 of a file (of its first ``limit_bytes`` when given), as hex."""
    digest = hashlib.sha256()
    left = limit_bytes
    with Path(path).open("rb") as handle:
        while chunk := handle.read(1 << 20 if left is None else min(1 << 20, left)):
            digest.update(chunk)
            if left is not None:
                left -= len(chunk)
                if left <= 0:
                    break
    return digest.hexdigest()


def _load_json(path: Path, format_name: str) -> dict[str, Any]:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing(path, format_name) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MorphomeError(f"{path}: not valid JSON ({error})", _MAKE_AGAIN) from None


def _missing(path: Path, format_name: str) -> MorphomeError:
    return MorphomeError(f"{path}: file not found ({format_name})", "run the step that makes it first")


def _plain(value: Any) -> Any:
    """JSON-able copy: numpy scalars and arrays to Python, paths to text, NaN and infinities to None."""
    if isinstance(value, Mapping):
        return {_plain(str(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy scalar or array
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        # The name of a file may hold bytes that are no UTF-8; Python keeps them as lone surrogates.
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return value
