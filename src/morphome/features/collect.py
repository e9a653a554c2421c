"""The collect step: one index over the features of all slides, and the audit of all slides."""

from __future__ import annotations

import json
from collections import Counter
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
#: Columns of the audit and what they hold; a file that does not know a value leaves it empty. Kept in this order.
AUDIT_COLUMNS: dict[str, str] = {
    "slide_id": "text", "status": "text", "reason_code": "text", "reason": "text",
    # Resolution: what the file says, what was used, what it was judged to be.
    "vendor": "text", "width_px": "count", "height_px": "count", "mpp_x": "number", "mpp_y": "number",
    "mpp_source": "text", "all_sources_json": "text", "resolution_unit": "text", "objective_power": "number",
    "power_ratio": "number", "anisotropy": "number", "level_downsamples": "text", "mpp_target": "number",
    "side_x_px": "count", "side_y_px": "count", "mpp_effective": "number", "deviation_pct": "number",
    "deviation_x_pct": "number", "deviation_y_pct": "number", "verdict": "text", "flags": "text",
    # How it was read: by the encode step where it read tiles, else by the tile step.
    "reader": "text", "reader_reason": "text", "parity_n": "count", "parity_max_difference": "number",
    "resize": "text", "dct_scale": "count",
    # Tissue and quality.
    "mask_source": "text", "mask_sha256": "text", "segmenter_weights_sha256": "text", "saturation_threshold": "number",
    "glass_rgb": "text", "tissue_mm2": "number", "tissue_fraction": "number", "n_fragments": "count",
    "n_holes": "count", "white_fraction": "number", "grey_fraction": "number", "black_fraction": "number",
    "stain_saturation": "number", "pen_fraction": "number", "fold_fraction": "number", "blood_fraction": "number",
    "sharpness_p05": "number", "sharpness_median": "number", "sharpness_p95": "number",
    # Tiles: found on tissue less those left out is planned; planned less failed is what the features hold.
    "n_dropped_pen": "count", "n_dropped_blur": "count", "n_dropped_fold": "count", "n_dropped_blood": "count",
    "n_tiles_planned": "count", "n_tiles": "count", "n_tiles_failed": "count",
    "encoder": "text", "fingerprint": "text", "slide_sha256_head": "text", "seconds": "number",
}  # fmt: skip
_DTYPES = {"text": "string", "number": "float64", "count": "Int64"}
_QC_DROPPED = ("stamp", "made_from")


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
        audit_out: ``morphome.slide_audit``, one row a slide: :data:`AUDIT_COLUMNS`, then whatever else the quality
            records hold. Values that a file does not know are null.

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
        _refuse_mixed(rows, column)
    refuse_many_failed(rows, settings["slides"]["max_failed_fraction"])
    index = index_table(rows)
    write_parquet(index, index_out, INDEX_FORMAT, settings, index_facts(index))
    records = [_audit_row(audits[row["slide_id"]], row, encoded[row["slide_id"]]) for row in rows]
    write_parquet(_audit_table(records), audit_out, AUDIT_FORMAT, settings)


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


def _refuse_mixed(rows: Sequence[Mapping[str, Any]], column: str) -> None:
    """Stop when features differ in a column; each value is counted, the slides outside the largest group are named.

    Raises:
        MorphomeError: more than one value.
    """
    counts = Counter((row[column], row["encoder"]) for row in rows)
    if len({value for value, _ in counts}) < 2:
        return
    ordered = sorted(counts, key=lambda key: (-counts[key], str(key)))
    lines = []
    for value, encoder in ordered:
        odd = sorted(r["slide_id"] for r in rows if (r[column], r["encoder"]) == (value, encoder))
        more = f" and {len(odd) - 10} more" if len(odd) > 10 else ""
        largest = (value, encoder) == ordered[0] and counts[ordered[1]] < len(odd)
        named = "" if largest else f": {', '.join(odd[:10])}{more}"
        lines.append(f"\n    {value} ({encoder}) in {len(odd)} of {len(rows)} slides{named}")
    raise MorphomeError(
        f"the feature files have more than one {column}:{''.join(lines)}",
        "encode all slides with the same settings, or run the encode step again for the slides named",
    )


def _index_row(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Row of the index, and what the encode step counted for the audit."""
    try:
        with h5py.File(path, "r", locking=False) as handle:
            attrs = {k: _plain(v) for k, v in handle.attrs.items()}
            check_stamp(attrs, path, "morphome.tile-features")
            n_tiles, dim = handle["features"].shape
            feature_attrs = {k: _plain(v) for k, v in handle["features"].attrs.items()}
            sharp = handle["sharpness"][()] if "sharpness" in handle else np.zeros(0, np.float32)
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
    sharp = sharp[np.isfinite(sharp)]
    low, median, high = np.quantile(sharp, [0.05, 0.5, 0.95]).tolist() if len(sharp) else (None, None, None)
    facts = {
        "n_tiles_planned": attrs["n_tiles_planned"],
        "n_tiles_failed": attrs["n_tiles_failed"],
        "sharpness_p05": low,
        "sharpness_median": median,
        "sharpness_p95": high,
        "resize": attrs.get("resize", ""),
        "dct_scale": attrs.get("dct_scale"),
    }
    if n_tiles:
        facts |= {name: attrs[name] for name in ("reader", "reader_reason") if name in attrs}
    return row, facts


def _audit_row(qc: dict[str, Any], row: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Row of the audit; lists and mappings as text, with every digit."""
    own = ("n_tiles", "status", "reason_code", "reason", "encoder", "fingerprint")
    out = {**qc, **facts, **{name: row[name] for name in own}}
    sources = out.pop("all_sources", None)
    out["all_sources_json"] = json.dumps(sources) if sources else None
    for name, value in out.items():
        if isinstance(value, (list, tuple)):
            out[name] = "; ".join(str(v) for v in value)
        elif isinstance(value, Mapping):
            out[name] = json.dumps(value)
    return out


def _audit_table(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """All rows, with the columns that are always there first and in their types."""
    table = pd.DataFrame(records, columns=None if records else list(AUDIT_COLUMNS))
    table = table.reindex(columns=[*AUDIT_COLUMNS, *(c for c in table if c not in AUDIT_COLUMNS)])
    # Without a type a column of nothing but nulls would have none in the file either.
    table = table.astype({name: _DTYPES[kind] for name, kind in AUDIT_COLUMNS.items()})
    return table.sort_values("slide_id", ignore_index=True)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value
