"""Features that were made elsewhere: an index over a packed file or a folder of files, joined by slide id.

The files are read once in full, so that what is wrong shows here and not in training. See
:mod:`morphome.features.layouts` for the layouts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from morphome.cohort.barcode import cut_suffix
from morphome.cohort.slide_sheet import few_names
from morphome.errors import MorphomeError
from morphome.features.collect import AUDIT_FORMAT, index_facts, refuse_many_failed
from morphome.features.layouts import BagError, BagFacts, check_finite, inspect_bag
from morphome.features.store import INDEX_FORMAT, index_table
from morphome.files import file_head, read_parquet, write_parquet

SUFFIXES = (".h5", ".pt")


def run_import(*, settings: Mapping[str, Any], slides: Path, index_out: Path, audit_out: Path) -> None:
    """Index features that were made elsewhere, for the included slides of the cohort.

    A listed slide without features gets the status "failed" with the code ``no_features``: the patient may still
    have other slides. It does not count towards ``slides.max_failed_fraction``, which is about files that are
    there and cannot be used. Features of slides that the cohort does not list are counted and left alone.

    Args:
        settings: ``slides.max_failed_fraction`` and ``features.path``: a packed ``.h5`` (``features``,
            ``offsets``, ``slide_id`` and, if wanted, ``case_id``) or a folder of ``.h5`` or ``.pt`` files.
        slides: ``morphome.slides``.
        index_out, audit_out: ``morphome.feature_index`` and ``morphome.slide_audit``.

    Raises:
        MorphomeError: no features or none of a listed slide, a slide twice, another patient than the cohort says,
            features of several dimensions or encoders, or too many files that cannot be used.
    """
    path = Path(settings["features"]["path"])
    listed = read_parquet(slides, "morphome.slides")
    listed = listed[listed["included"]]
    patients = dict(zip(listed["slide_id"].astype(str), listed["patient_id"].astype(str), strict=True))
    if path.is_dir():
        rows, available = _folder_rows(path, patients)
    elif path.is_file():
        rows, available = _packed_rows(path, patients)
    else:
        raise MorphomeError(f"{path}: file not found (features.path)", "check features.path")
    matched = set(patients) & set(available)
    if patients and not matched:
        raise MorphomeError(
            f"{path}: none of its {len(available)} slides is one of the cohort's {len(patients)} "
            f"(features: {', '.join(sorted(available)[:2])} ...; cohort: {', '.join(sorted(patients)[:2])} ...)",
            "use the same slide ids in both; file endings do not matter",
        )
    _refuse_mixed(rows, path)
    refuse_many_failed(rows, settings["slides"]["max_failed_fraction"])
    missing = [_row(slide, path, "h5", None, "no_features", "features.path holds no features of this slide")
               for slide in sorted(set(patients) - matched)]  # fmt: skip
    index = index_table([*rows, *missing])
    counts = {"n_unused": len(set(available) - matched), "n_without_features": len(missing), "unit": "as imported"}
    write_parquet(index, index_out, INDEX_FORMAT, settings, {**index_facts(index), **counts})
    audit = index[["slide_id", "n_tiles", "status", "reason_code", "reason"]]
    write_parquet(audit, audit_out, AUDIT_FORMAT, settings, counts)


def _folder_rows(folder: Path, patients: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[str]]:
    files = sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES and f.name[0] != ".")
    by_id: dict[str, Path] = {}
    for file in files:
        slide = cut_suffix(file.name)
        if slide in by_id:
            raise MorphomeError(f"{file} and {by_id[slide].name}: two files for slide '{slide}'", "keep one of them")
        by_id[slide] = file
    if not by_id:
        raise MorphomeError(f"{folder}: no {' or '.join(SUFFIXES)} file in it (features.path)", "check features.path")
    rows = []
    for slide in tqdm(sorted(set(by_id) & set(patients)), desc="import", disable=None):
        file = by_id[slide]
        layout = file.suffix[1:]
        try:
            facts = inspect_bag(file)
        except BagError as error:
            rows.append(_row(slide, file, layout, None, error.code, f"{file.name}: {error}"))
            continue
        key = hashlib.sha256(file_head(file).encode()).hexdigest()[:32]
        rows.append(_row(slide, file, layout, facts, content_key=key))
    return rows, list(by_id)


def _packed_rows(path: Path, patients: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[str]]:
    try:
        with h5py.File(path, "r", locking=False) as handle:
            return _read_packed(handle, path, patients)
    except OSError as error:
        raise MorphomeError(f"{path}: cannot be read as HDF5: {error} (features.path)", "check the file") from None


def _read_packed(handle: h5py.File, path: Path, patients: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[str]]:
    if absent := [name for name in ("features", "offsets", "slide_id") if name not in handle]:
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
    if "case_id" in handle:
        cases = [str(case) for case in handle["case_id"].asstr()[()]]
        for slide, case in zip(ids, cases, strict=True):
            if patients.get(slide, case) != case:
                raise MorphomeError(
                    f"{path}: slide '{slide}' belongs to '{case}', but to '{patients[slide]}' in the cohort",
                    "correct case_id there or patient_id in the table of slides",
                )
    encoder = str(handle.attrs.get("encoder", "unknown"))
    head = file_head(path)
    rows = []
    for slide, start, stop in tqdm(list(zip(ids, offsets[:-1], offsets[1:], strict=True)), "import", disable=None):
        if slide not in patients:
            continue
        facts = BagFacts(int(stop - start), features.shape[1], None, "packed", encoder)
        try:
            check_finite(features[start:stop])
        except BagError as error:
            rows.append(_row(slide, path, "packed_h5", None, error.code, str(error)))
            continue
        key = hashlib.sha256(f"{head}:{start}:{stop}".encode()).hexdigest()[:32]
        row = _row(slide, path, "packed_h5", facts, content_key=key)
        rows.append({**row, "start": int(start), "stop": int(stop)})
    return rows, ids


def _row(
    slide: str,
    path: Path,
    layout: str,
    facts: BagFacts | None,
    code: str = "",
    reason: str = "",
    content_key: str = "",
) -> dict[str, Any]:
    """A row of the index; without ``facts`` the slide failed, and without a vector it is empty."""
    status = "failed" if facts is None else "ok" if facts.n_tiles else "empty"
    if status == "empty":
        code, reason = "empty", "the file holds no tile"
    n_tiles, dim = (facts.n_tiles, facts.dim) if facts else (0, 0)
    return {
        "slide_id": slide,
        "path": str(path),
        "layout": layout,
        "start": 0,
        "stop": n_tiles,
        "n_tiles": n_tiles,
        "dim": dim,
        "has_coords": facts is not None and facts.coords is not None,
        "encoder": facts.encoder if facts else "",
        "fingerprint": f"imported:{facts.producer}:{facts.encoder}:{facts.dim}" if facts else "",
        "content_key": content_key,
        "status": status,
        "reason_code": code,
        "reason": reason,
    }


def _refuse_mixed(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    usable = [row for row in rows if row["status"] == "ok"]
    for column in ("dim", "fingerprint"):
        counts = Counter(row[column] for row in usable)
        if len(counts) > 1:
            shown = ", ".join(f"{value} ({n} slide{'s' if n > 1 else ''})" for value, n in counts.most_common(4))
            fewer = [row["slide_id"] for row in usable if row[column] != counts.most_common(1)[0][0]]
            raise MorphomeError(
                f"{path}: features of more than one {column}: {shown}; the fewer are of "
                f"{few_names(fewer)} (features.path)",
                "keep the features of one encoder in the folder",
            )
