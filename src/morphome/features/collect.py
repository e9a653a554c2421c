"""The collect step: one index over the features of all slides, and the audit of all slides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from morphome.errors import MorphomeError
from morphome.features.store import INDEX_FORMAT, index_table
from morphome.files import check_stamp, read_json, write_parquet

AUDIT_FORMAT = "morphome.slide_audit"
_QC_DROPPED = ("stamp",)


def run_collect(
    *,
    settings: Mapping[str, Any],
    feature_files: Sequence[Path],
    qc_files: Sequence[Path],
    index_out: Path,
    audit_out: Path,
) -> None:
    """Index encoded slides; features stay where they are.

    Args:
        settings: ``slides.max_failed_fraction``, ``tiling`` and ``features``.
        feature_files: ``morphome.tile-features``, one a slide.
        qc_files: ``morphome.slide_qc``, one a slide, in any order: they are joined by slide id.
        index_out: ``morphome.feature_index``; status "ok", "empty" (no tile, allowed by ``tiling.min_tiles: 0``)
            or "failed".
        audit_out: ``morphome.slide_audit``, the quality record of every slide with the counts of the encode step.

    Raises:
        MorphomeError: a slide twice or in one list only, more than one fingerprint or dimension, or more failed
            slides than ``slides.max_failed_fraction``. Nothing is written then.
    """
    rows, encoded = [], {}
    for path in feature_files:
        row, facts = _index_row(Path(path))
        if row["slide_id"] in encoded:
            raise MorphomeError(f"{path}: slide '{row['slide_id']}' has two feature files", "remove one of them")
        rows.append(row)
        encoded[row["slide_id"]] = facts
    audits = {}
    for path in qc_files:
        qc = read_json(Path(path), "morphome.slide_qc")
        if qc["slide_id"] in audits:
            raise MorphomeError(f"{path}: slide '{qc['slide_id']}' has two quality records", "remove one of them")
        audits[qc["slide_id"]] = {k: v for k, v in qc.items() if k not in _QC_DROPPED}
    if alone := sorted(set(encoded) ^ set(audits)):
        raise MorphomeError(
            f"slides with features or a quality record only: {', '.join(alone[:5])} ({len(alone)} in all)",
            "run the tile and encode steps for them again",
        )
    for column in ("fingerprint", "dim"):
        if len(values := sorted({row[column] for row in rows})) > 1:
            raise MorphomeError(
                f"the feature files have more than one {column}: {', '.join(map(str, values[:5]))}",
                "encode all slides with the same settings",
            )
    refuse_many_failed(rows, settings["slides"]["max_failed_fraction"])
    index = index_table(rows)
    write_parquet(index, index_out, INDEX_FORMAT, settings, index_facts(index))
    records = [_audit_row(audits[row["slide_id"]], row, encoded[row["slide_id"]]) for row in rows]
    table = pd.DataFrame(records).sort_values("slide_id").reset_index(drop=True) if records else _empty_audit()
    write_parquet(table, audit_out, AUDIT_FORMAT, settings)


def index_facts(index: pd.DataFrame) -> dict[str, Any]:
    """What holds for the whole index: fingerprint, encoder, dimension and counts."""
    usable = index[index["status"] == "ok"]
    first = (usable if len(usable) else index).head(1)
    facts = {name: first[name].iloc[0] if len(first) else None for name in ("fingerprint", "encoder", "dim")}
    return {**facts, "n_slides": len(index), "n_ok": len(usable), "n_tiles": int(usable["n_tiles"].sum())}


def refuse_many_failed(rows: Sequence[Mapping[str, Any]], limit: float) -> None:
    """Stop when the share of failed slides passes ``limit``; the message lists them with their reasons.

    Raises:
        MorphomeError: too many slides failed.
    """
    failed = sorted((row for row in rows if row["status"] == "failed"), key=lambda row: row["slide_id"])
    if len(failed) <= limit * len(rows):
        return
    shown = "\n".join(f"    {row['slide_id']}: {row['reason_code']}: {row['reason']}" for row in failed[:50])
    more = f"\n    ... and {len(failed) - 50} more" if len(failed) > 50 else ""
    raise MorphomeError(
        f"{len(failed)} of {len(rows)} slides failed; slides.max_failed_fraction allows {limit:g}:\n{shown}{more}",
        "mend the slides or take them out of the sheet, or raise slides.max_failed_fraction",
    )


def _index_row(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Row of the index, and what the encode step counted for the audit."""
    try:
        with h5py.File(path, "r", locking=False) as handle:
            attrs = {k: _plain(v) for k, v in handle.attrs.items()}
            check_stamp(attrs, path, "morphome.tile-features")
            n_tiles, dim = handle["features"].shape
            feature_attrs = {k: _plain(v) for k, v in handle["features"].attrs.items()}
            sharpness = handle["sharpness"][()] if "sharpness" in handle else np.zeros(0, np.float32)
    except (OSError, KeyError) as error:
        raise MorphomeError(f"{path}: cannot be read as a feature file: {error}", "run the encode step again") from None
    status = "empty" if attrs["status"] == "ok" and n_tiles == 0 else attrs["status"]
    row = {
        "slide_id": attrs["slide_id"],
        "path": str(path),
        "layout": "h5",
        "start": 0,
        "stop": n_tiles,
        "n_tiles": n_tiles,
        "dim": dim,
        "has_coords": True,
        "encoder": feature_attrs["encoder"],
        "fingerprint": feature_attrs["encoder_fingerprint"],
        "content_key": attrs["content_key"],
        "status": status,
        "reason_code": attrs["reason_code"] or ("empty" if status == "empty" else ""),
        "reason": attrs["reason"] or ("no tile with enough tissue" if status == "empty" else ""),
    }
    facts = {
        "n_tiles_planned": attrs["n_tiles_planned"],
        "n_tiles_failed": attrs["n_tiles_failed"],
        "sharpness_median": float(np.median(sharpness)) if len(sharpness) else None,
        "sharpness_p05": float(np.quantile(sharpness, 0.05)) if len(sharpness) else None,
        "resize": attrs.get("resize", ""),
    }
    return row, facts


def _audit_row(qc: dict[str, Any], row: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    out = {**qc, **facts, "n_tiles": row["n_tiles"], "status": row["status"]}
    out["reason_code"], out["reason"] = row["reason_code"], row["reason"]
    out["all_sources"] = "; ".join(f"{k}={v[0]:g}x{v[1]:g}" for k, v in (qc.get("all_sources") or {}).items())
    out["flags"] = "; ".join(qc.get("flags") or [])
    return out


def _empty_audit() -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(dtype="str") for name in ("slide_id", "status", "reason_code", "reason")})


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value
