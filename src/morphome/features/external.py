"""Features that were made elsewhere: an index over a packed file or a folder of files, joined by slide id.

The files are read once in full, so that what is wrong shows here and not in training. See
:mod:`morphome.features.layouts` for the layouts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from math import nan
from pathlib import Path
from typing import Any

from tqdm import tqdm

from morphome.cohort.slide_sheet import few_names
from morphome.errors import MorphomeError
from morphome.features.bag import BagError, BagFacts, check_bag
from morphome.features.bag_files import find_bags
from morphome.features.collect import AUDIT_FORMAT, index_facts, refuse_many_failed
from morphome.features.layouts import content_key, inspect_bag
from morphome.features.packed import open_packed
from morphome.features.slide_mpp import slide_mpp
from morphome.features.store import INDEX_FORMAT, index_table
from morphome.files import file_sample, read_parquet, write_parquet


def run_import(*, settings: Mapping[str, Any], slides: Path, index_out: Path, audit_out: Path) -> None:
    """Index features that were made elsewhere, for the included slides of the cohort.

    A listed slide without features gets the status "failed" with the code ``no_features``: the patient may still
    have other slides. It does not count towards ``slides.max_failed_fraction``, which is about files that are
    there and cannot be used. Features of slides that the cohort does not list are counted and left alone.

    Args:
        settings: ``slides.max_failed_fraction`` and ``features.path``: a packed ``.h5`` (``features``,
            ``offsets``, ``slide_id`` and, if wanted, ``case_id``) or a folder of one bag a slide, see
            :mod:`morphome.features.layouts`; if wanted ``features.dataset``, which to take of several encoders in
            one file, and ``features.mpp``, microns per pixel for coordinates in microns, see
            :func:`morphome.features.slide_mpp.slide_mpp`.
        slides: ``morphome.slides``.
        index_out, audit_out: ``morphome.feature_index`` and ``morphome.slide_audit``.

    Raises:
        MorphomeError: no features or none of a listed slide, a slide twice, another patient than the cohort says,
            features of several dimensions or encoders, or too many files that cannot be used.
    """
    features = settings["features"]
    path = Path(features["path"])
    listed = read_parquet(slides, "morphome.slides")
    listed = listed[listed["included"]]
    patients = dict(zip(listed["slide_id"].astype(str), listed["patient_id"].astype(str), strict=True))
    if path.is_dir():
        rows, available = _folder_rows(path, patients, features.get("dataset"), features.get("mpp"))
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
    units = {row["unit"] for row in rows if row["status"] == "ok"}
    counts = {
        "n_unused": len(set(available) - matched),
        "n_without_features": len(missing),
        "unit": units.pop() if len(units) == 1 else "unknown",
    }
    write_parquet(index, index_out, INDEX_FORMAT, settings, {**index_facts(index), **counts})
    audit = index[["slide_id", "n_tiles", "status", "reason_code", "reason"]]
    write_parquet(audit, audit_out, AUDIT_FORMAT, settings, counts)


def _folder_rows(
    folder: Path, patients: Mapping[str, str], dataset: str | None, mpp: float | str | None
) -> tuple[list[dict[str, Any]], list[str]]:
    files, resolution = find_bags(folder), slide_mpp(mpp)
    rows = []
    for slide in tqdm(sorted(set(files) & set(patients)), desc="import", disable=None):
        file = files[slide]
        layout = file.suffix[1:]
        known = resolution(slide)
        try:
            facts = inspect_bag(file, dataset, known)
            key = content_key(file)
        except BagError as error:
            rows.append(_row(slide, file, layout, None, error.code, f"{file.name}: {error}"))
            continue
        row = _row(slide, file, layout, facts, content_key=key)
        # Only these two say how to read the file once more; what the file says itself is not repeated.
        used = known is not None and facts.coords is not None and facts.coords_unit == "um"
        rows.append({**row, "dataset": dataset or "", "mpp_x": known[0] if used else nan,
                     "mpp_y": known[1] if used else nan})  # fmt: skip
    return rows, list(files)


def _packed_rows(path: Path, patients: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[str]]:
    with open_packed(path) as packed:
        for slide, case in packed.cases.items():
            if patients.get(slide, case) != case:
                raise MorphomeError(
                    f"{path}: slide '{slide}' belongs to '{case}', but to '{patients[slide]}' in the cohort",
                    "correct case_id there or patient_id in the table of slides",
                )
        head = file_sample(path)
        rows = []
        for slide, (start, stop) in tqdm(list(packed.bounds.items()), "import", disable=None):
            if slide not in patients:
                continue
            bag = packed.bag(slide)
            try:
                check_bag(bag)
            except BagError as error:
                rows.append(_row(slide, path, "packed_h5", None, error.code, str(error)))
                continue
            key = hashlib.sha256(f"{head}:{start}:{stop}".encode()).hexdigest()[:32]
            row = _row(slide, path, "packed_h5", bag.facts, content_key=key)
            rows.append({**row, "start": start, "stop": stop})
        return rows, list(packed.bounds)


def _row(
    slide: str,
    path: Path,
    layout: str,
    facts: BagFacts | None,
    code: str = "",
    reason: str = "",
    content_key: str = "",
) -> dict[str, Any]:
    """A row of the index, and the unit of its vectors; without ``facts`` it failed, without a vector it is empty."""
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
        "fingerprint": facts.fingerprint if facts else "",
        "content_key": content_key,
        "unit": facts.unit if facts else "unknown",
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
