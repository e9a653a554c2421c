"""Sections of the page that document the run: slides, run times, provenance."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from markupsafe import Markup

from morphome import __version__
from morphome.report import format as fmt
from morphome.report import tables, words
from morphome.report.format import Column, View
from morphome.report.inputs import ReportData, Thumbnail

#: Thumbnails of slides that worked, and of slides that failed; the tables name all of them.
MOST_OK, MOST_FAILED = 12, 24
MOST_BYTES = 120_000
MOST_AUDIT_ROWS = 2000


def slides(data: ReportData, audit: pd.DataFrame) -> dict[str, Any]:
    """Gallery, failed slides and the audit of resolutions."""
    lost = tables.failed_slides(data)
    bad = dict(zip(lost["slide_id"], lost.itertuples(), strict=True))
    names = words.slide_names(audit["slide_id"]) if "slide_id" in audit else {}
    names = words.slide_names([*names, *(t.slide_id for t in data.thumbnails)])
    ok = [t for t in data.thumbnails if t.slide_id not in bad and t.qc.get("status") == "ok"]
    failed = [t for t in data.thumbnails if t.slide_id in bad or t.qc.get("status") != "ok"]
    # Evenly spread over the cohort, always the same.
    ok_shown = [ok[i] for i in np.unique(np.linspace(0, len(ok) - 1, min(MOST_OK, len(ok))).round().astype(int))]
    failures = View("failed", "Slides without features", [Column("Slide"), Column("Code"), Column("Reason")])
    for row in lost.itertuples():
        what, remedy = words.failure(row.reason, row.slide_id)
        reason = Markup('{}<span class="remedy"><b>Remedy:</b> {}</span>').format(what, remedy) if remedy else what
        failures.add([_slide(row.slide_id, names), row.reason_code, reason])
    return {
        "n": len(audit),
        "ok": [_picture(t, names) for t in ok_shown],
        "n_ok": len(ok),
        "failed": [_picture(t, names, bad.get(t.slide_id)) for t in failed[:MOST_FAILED]],
        "n_failed": len(lost),
        "failures": failures if len(lost) else None,
        "audit": _audit(audit, names),
        "sources": _mpp_sources(audit),
    }


#: Columns of the audit: heading, and decimals (None for text).
_AUDIT: dict[str, tuple[str, int | None]] = {
    "slide_id": ("Slide", None),
    "status": ("Status", None),
    "vendor": ("Vendor", None),
    "mpp_x": ("mpp x", 4),
    "mpp_y": ("mpp y", 4),
    "mpp_source": ("Source of mpp", None),
    "objective_power": ("Power", 0),
    "power_ratio": ("mpp x power / 10", 2),
    "side_x_px": ("Tile side, px", 1),
    "mpp_effective": ("mpp of tiles", 4),
    "deviation_pct": ("Deviation, %", 2),
    "n_tiles": ("Tiles", 0),
    "tissue_mm2": ("Tissue, mm²", 1),
    "pen_fraction": ("Pen", 3),
    "sharpness_median": ("Sharpness", 0),
    "verdict": ("Verdict", None),
    "flags": ("Flags", None),
}


def _audit(audit: pd.DataFrame, names: dict[str, str]) -> View | None:
    known = [c for c in _AUDIT if c in audit and not audit[c].map(fmt.is_missing).all()]
    if "slide_id" not in known:
        return None
    more = f"; the first {MOST_AUDIT_ROWS}, all in slides.csv" if len(audit) > MOST_AUDIT_ROWS else ""
    view = View(
        "audit",
        f"All slides{': microns per pixel (mpp) and tiling' if _mpp_sources(audit) else ''}{more}",
        [Column(_AUDIT[c][0], "text" if _AUDIT[c][1] is None else "num") for c in known],
    )
    for row in audit.head(MOST_AUDIT_ROWS).to_dict("records"):
        cells = []
        for column in known:
            digits = _AUDIT[column][1]
            value = row[column]
            if column == "slide_id":
                cells.append(_slide(value, names))
                continue
            cells.append(("" if fmt.is_missing(value) else str(value)) if digits is None else fmt.number(value, digits))
        view.add(cells, "failed" if row.get("status", "ok") != "ok" else "")
    return view


def _mpp_sources(audit: pd.DataFrame) -> str:
    if "mpp_source" not in audit:
        return ""
    counts = audit["mpp_source"].fillna("none").replace("", "none").value_counts()
    return ", ".join(f"{source} ({n})" for source, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _slide(slide_id: Any, names: dict[str, str]) -> Any:
    """Short name of a slide; the whole id shows when the pointer rests on it."""
    short = names.get(str(slide_id), str(slide_id))
    return short if short == slide_id else Markup('<span title="{}">{}</span>').format(slide_id, short)


def _picture(thumbnail: Thumbnail, names: dict[str, str], lost: Any = None) -> dict[str, Any]:
    """A card of the gallery: picture and facts; without a picture where the slide could not be tiled."""
    qc = thumbnail.qc
    tiled = qc.get("status") == "ok"
    text = (
        f"{fmt.count(qc.get('n_tiles'))} tiles, {fmt.number(qc.get('tissue_mm2'), 1)} mm² tissue, "
        f"{fmt.number(qc.get('mpp_x'), 3)} mpp"
        if tiled
        else "reason in the table above"
    )
    if tiled and lost is not None:
        text = f"tiled ({text}), then: {lost.reason_code or 'no features'}"
    return {
        "slide_id": thumbnail.slide_id,
        "name": names.get(thumbnail.slide_id, thumbnail.slide_id),
        "text": text,
        "tiled": tiled,
        "uri": _data_uri(thumbnail.jpg) if tiled else None,
        "code": str(qc.get("reason_code") or "failed").replace("_", " "),
    }


def _data_uri(path: Path) -> str | None:
    """The picture inside the page; a large one is made smaller, a missing or broken one is None."""
    try:
        content = path.read_bytes()
        if len(content) > MOST_BYTES:
            from PIL import Image

            with Image.open(io.BytesIO(content)) as image:
                small = image.convert("RGB")
                small.thumbnail((512, 512))
                buffer = io.BytesIO()
                small.save(buffer, "JPEG", quality=80)
                content = buffer.getvalue()
    except OSError:
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}" if content else None


def run_times(data: ReportData) -> dict[str, Any]:
    """Encoding speed in one line, training per model as a table."""
    encode = ""
    worked = [t for t in data.timings if t.get("n_tiles")]
    if worked:
        n = sum(t["n_tiles"] for t in worked)
        total = sum(t.get("seconds_total") or 0 for t in worked)
        read, code = (sum(t.get(k) or 0 for t in worked) for k in ("seconds_read", "seconds_encode"))
        speed = [t["tiles_per_second"] for t in worked if not fmt.is_missing(t.get("tiles_per_second"))]
        encode = (
            f"{fmt.plural(len(worked), 'slide')}, {fmt.count(n)} tiles in {fmt.duration(total)} of slide time; "
            f"per slide {fmt.spread(speed)} tiles/s (median [quartiles])"
        )
        if read + code > 0:
            encode += (
                f"; reading took {100 * read / (read + code):.0f} % and encoding {100 * code / (read + code):.0f} %"
            )
    view = View(
        "run-times",
        "Training: wall clock per run (one fold)",
        [
            Column("Model"),
            Column("Runs", "num"),
            Column("Total", "num"),
            Column("Per run, s", "num", "median [quartiles]"),
            Column("Epochs or trials", "num", "median [quartiles]"),
            Column("s per epoch or trial", "num"),
            Column("Parameters", "num"),
            Column("Device"),
            Column("Threads", "num"),
        ],
    )
    for name in data.names:
        facts = [r.facts for r in data.runs_of(name)]
        if not facts:
            continue
        view.add(
            [
                name,
                fmt.count(len(facts)),
                fmt.duration(sum(f.get("seconds_total") or 0 for f in facts)),
                fmt.spread([f.get("seconds_total") or np.nan for f in facts], 1),
                fmt.spread([f.get("epochs_run") or np.nan for f in facts]),
                fmt.number(np.median([f.get("seconds_per_epoch") or 0 for f in facts]), 2),
                fmt.count(np.median([f.get("n_parameters") or 0 for f in facts])),
                ", ".join(sorted({str(f.get("device") or "") for f in facts})),
                ", ".join(sorted({str(f.get("threads") or "") for f in facts})),
            ]
        )
    return {"encode": encode, "view": view if view.rows else None}


def provenance(data: ReportData, settings_hash: str) -> dict[str, Any]:
    """What the numbers were made with."""
    versions: dict[str, set[str]] = {}
    for run in data.runs:
        for package, version in (run.facts.get("versions") or {}).items():
            versions.setdefault(str(package), set()).add(str(version))
    versions.setdefault("morphome", set()).update({__version__, *(str(s.get("morphome_version")) for s in data.stamps)})
    prints = {str(r.facts.get("feature_fingerprint") or "") for r in data.runs} - {""}
    view = View(
        "files",
        "Files behind this page",
        [Column("File"), Column("Format"), Column("Settings hash"), Column("sha256 (first 16)")],
    )
    for stamp in data.stamps:
        view.add(
            [stamp["file"], f"{stamp['format']} {stamp['format_version']}", stamp["config_hash"], stamp["sha256"][:16]]
        )
    features = data.config.get("features", {})
    return {
        "versions": ", ".join(f"{k} {' / '.join(sorted(v))}" for k, v in sorted(versions.items())),
        "settings_hash": settings_hash,
        "fingerprints": sorted(prints),
        "encoder": "imported features" if features.get("source") == "external" else str(features.get("encoder", "")),
        "files": view,
        "sources": [words.source(s) for s in data.sources],
        "groups": _groups(data),
        "config": yaml.safe_dump(
            json.loads(json.dumps(data.config, default=str)), sort_keys=False, allow_unicode=True, width=100
        ),
        "seeds": _seeds(data),
    }


def _seeds(data: ReportData) -> str:
    found = []
    for section in ("simulate", "splits", "training", "evaluation"):
        seed = (data.config.get(section) or {}).get("seed")
        if seed is not None:
            found.append(f"{section} {seed}")
    return ", ".join(found)


def _groups(data: ReportData) -> View | None:
    if not data.groups:
        return None
    view = View(
        "groups",
        "Gene groups",
        [Column("Group"), Column("Genes asked", "num"), Column("Genes matched", "num"), Column("Columns", "num")],
    )
    for name, match in (data.groups.get("match") or {}).items():
        view.add([name, *(fmt.count(match.get(k)) for k in ("asked", "matched_genes", "columns"))])
    view.notes += [f"{name} was dropped: {reason}" for name, reason in (data.groups.get("dropped") or {}).items()]
    return view
