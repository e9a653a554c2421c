"""Section of the page on slides: what became of each, at what resolution it was read, and how fast.

Nothing is left out in silence: every slide that gave no features and every tile that could not be read is counted
in the first sentences, and named in a table or in the CSV that the table points to.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from morphome.features.throughput import summarise
from morphome.report import format as fmt
from morphome.report import slide_tables, words
from morphome.report.format import Column, View
from morphome.report.inputs import ReportData, Thumbnail
from morphome.report.resolution import resolution, short_slide
from morphome.report.slide_tables import SlideCounts

#: Thumbnails of slides that worked, and of slides that failed; the tables name all of them.
MOST_OK, MOST_FAILED = 12, 24
MOST_BYTES = 120_000
MOST_AUDIT_ROWS, MOST_LOST_ROWS, MOST_TILE_ROWS, MOST_READER_ROWS = 2000, 500, 50, 20


def slides(data: ReportData, audit: pd.DataFrame) -> dict[str, Any]:
    """Everything the section shows; ``audit`` is the table of ``slides.csv``."""
    lost = slide_tables.failed_slides(data)
    bad = dict(zip(lost["slide_id"], lost.itertuples(), strict=True))
    names = words.slide_names(audit["slide_id"]) if "slide_id" in audit else {}
    names = words.slide_names([*names, *(t.slide_id for t in data.thumbnails)])
    ok = [t for t in data.thumbnails if t.slide_id not in bad and t.qc.get("status") == "ok"]
    failed = [t for t in data.thumbnails if t.slide_id in bad or t.qc.get("status") != "ok"]
    # Evenly spread over the cohort, always the same.
    ok_shown = [ok[i] for i in np.unique(np.linspace(0, len(ok) - 1, min(MOST_OK, len(ok))).round().astype(int))]
    return {
        "summary": summary(data),
        "external": data.external,
        "failures": _failures(lost, names),
        "failed_tiles": _failed_tiles(data, names),
        "tiles_known": "n_tiles_failed" in audit and len(audit) > 0,
        "resolution": resolution(data, names),
        "readers": _readers(audit),
        "throughput": throughput(data, names),
        "ok": [_picture(t, names) for t in ok_shown],
        "n_ok": len(ok),
        "failed": [_picture(t, names, bad.get(t.slide_id)) for t in failed[:MOST_FAILED]],
        "audit": _audit(audit, names),
    }


def summary(data: ReportData) -> tuple[str, list[tuple[str, str]]]:
    """One sentence, and what became of files, resolutions, slides and tiles as (label, text); the counts add up."""
    counts = slide_tables.count_slides(data)
    if not counts.found:
        return "No slides.", []
    used = counts.found - counts.n_lost
    head = f"{fmt.count(used)} of {fmt.plural(counts.found, 'slide')} gave features"
    lines = []
    if slide_tables.audited(data):
        head += f", from {fmt.plural(counts.read, 'tile')}"
        lines.append(("Files", f"{fmt.count(counts.found)} found, {fmt.count(counts.opened)} could be opened."))
        lines.append(("Resolution", _resolution_counts(counts)))
    if counts.n_lost:
        lost = f"{fmt.plural(counts.n_lost, 'slide')} without features: {words.counted(counts.lost, words.CODES)}."
        lines.append(("Set aside", lost))
    lines.append(("Tiles", _tile_counts(data, counts)))
    return f"{head}.", lines


def _resolution_counts(counts: SlideCounts) -> str:
    verdicts = counts.verdicts
    parts = [f"{fmt.count(verdicts['ok'])} passed"]
    if verdicts["flag"]:
        parts.append(f"{fmt.count(verdicts['flag'])} kept with a flag ({words.counted(counts.flags, words.FLAGS)})")
    if verdicts["quarantine"]:
        parts.append(f"{fmt.count(verdicts['quarantine'])} set aside")
    return f"{'; '.join(parts)}."


def _tile_counts(data: ReportData, counts: SlideCounts) -> str:
    if "n_tiles_failed" not in data.audit:
        return f"{fmt.count(counts.read)} in all."
    text = f"{fmt.count(counts.planned)} planned, {fmt.count(counts.read)} encoded"
    if counts.failed:
        share = 100 * counts.failed / counts.planned if counts.planned else 0.0
        text += f"; {fmt.count(counts.failed)} ({share:.2g} %) could not be read and were left out"
    else:
        text += "; none failed"
    if counts.unused:
        text += f"; {fmt.count(counts.unused)} more could be read, of slides that were set aside"
    return f"{text}."


def _failures(lost: pd.DataFrame, names: dict[str, str]) -> View | None:
    """Every slide without features, with its reason and the remedy."""
    if lost.empty:
        return None
    more = f"; {MOST_LOST_ROWS} of {len(lost)}, all in slides.csv" if len(lost) > MOST_LOST_ROWS else ""
    view = View("failed", f"Slides without features{more}", [Column("Slide"), Column("Code"), Column("Reason")])
    for row in lost.head(MOST_LOST_ROWS).itertuples():
        what, remedy = words.failure(row.reason, row.slide_id)
        reason = Markup('{}<span class="remedy"><b>Remedy:</b> {}</span>').format(what, remedy) if remedy else what
        view.add([short_slide(row.slide_id, names), row.reason_code, reason])
    return view


def _failed_tiles(data: ReportData, names: dict[str, str]) -> View | None:
    """Slides with tiles that could not be read, worst first."""
    table = slide_tables.failed_tiles(data)
    if table.empty:
        return None
    more = (
        f"; the worst {MOST_TILE_ROWS} of {len(table)} slides, all in slides.csv" if len(table) > MOST_TILE_ROWS else ""
    )
    view = View(
        "failed-tiles",
        f"Tiles that could not be read{more}",
        [
            Column("Slide"),
            Column("Planned", "num"),
            Column("Failed", "num"),
            Column("Share", "num"),
            Column("Slide is"),
        ],
    )
    for row in table.head(MOST_TILE_ROWS).itertuples():
        kept = row.status == "ok"
        view.add(
            [
                short_slide(row.slide_id, names),
                fmt.count(row.planned),
                fmt.count(row.failed),
                f"{100 * row.share:.2g} %",
                "kept without them" if kept else "set aside",
            ],
            "" if kept else "failed",
        )
    return view


def _readers(audit: pd.DataFrame) -> View | None:
    """Which reader the slides got, and why not the direct one; only slides with tiles were read."""
    if "reader" not in audit:
        return None
    table = audit.assign(
        reader=slide_tables.texts(audit["reader"]),
        why=slide_tables.texts(audit["reader_reason"]) if "reader_reason" in audit else "",
        n=pd.to_numeric(audit["n_tiles"], errors="coerce").fillna(0) if "n_tiles" in audit else 0,
    )
    table = table[table["reader"] != ""]
    if table.empty:
        return None
    view = View(
        "readers",
        "How the slides were read",
        [
            Column("Reader"),
            Column("Slides", "num"),
            Column("Tiles", "num"),
            Column("Why not decoded directly"),
            Column("Compared with OpenSlide", "text", "regions that were read both ways before the reader was chosen"),
        ],
    )
    # Reasons that differ in numbers only are one.
    table["kind"] = table["why"].map(words.shape)
    groups = table.groupby(["reader", "kind"], sort=False)
    ordered = sorted(groups, key=lambda g: (-len(g[1]), g[0]))
    for (reader, _), part in ordered[:MOST_READER_ROWS]:
        why = words.merged(sorted(set(part["why"]))) if part["why"].iloc[0] else ""
        view.add(
            [words.READERS.get(reader, reader), fmt.count(len(part)), fmt.count(part["n"].sum()), why, _parity(part)]
        )
    if rest := ordered[MOST_READER_ROWS:]:
        n = sum(len(part) for _, part in rest)
        tiles = sum(part["n"].sum() for _, part in rest)
        view.add(["other reasons", fmt.count(n), fmt.count(tiles), f"{len(rest)} reasons, in slides.csv", ""])
    return view


def _parity(part: pd.DataFrame) -> str:
    """``8 regions per slide, no difference``; what was compared before the reader was chosen."""
    if "parity_n" not in part or "parity_max_difference" not in part:
        return ""
    n = pd.to_numeric(part["parity_n"], errors="coerce").fillna(0)
    worst = pd.to_numeric(part["parity_max_difference"], errors="coerce").max()
    if not n.sum():
        return ""
    found = "no difference" if worst == 0 else f"up to {fmt.count(worst)} grey levels apart"
    return f"{fmt.plural(int(n.sum()), 'region')}, {found}"


def throughput(data: ReportData, names: dict[str, str]) -> list[str]:
    """How fast slides were encoded and what it waited for, in sentences; empty without timings."""
    found = summarise(data.timings)
    if not found["n_slides_encoded"]:
        return []
    worked = [t for t in data.timings if t.get("n_tiles")]
    speed = [t["tiles_per_second"] for t in worked if not fmt.is_missing(t.get("tiles_per_second"))]
    spread = f"{fmt.spread(speed)}, median [quartiles]"
    if slow := found["slowest"]:
        spread += f"; slowest {names.get(slow['slide_id'], slow['slide_id'])}, {slow['tiles_per_second']:.3g}"
    where = ", ".join(f"{device} ({n})" for device, n in found["devices"].items())
    said = [
        f"{fmt.plural(found['n_slides_encoded'], 'slide')} with {fmt.plural(found['n_tiles'], 'tile')} were encoded in "
        f"{_hours(found['hours_total'])}, summed over slides{f', on {where}' if where else ''}: "
        f"{found['tiles_per_second']:.3g} tiles per second (per slide {spread})."
    ]
    if found["bound"] is None:
        return [*said, f"What limited the speed is not known: {found['reason']}."]
    limit = {"reader": "reading the slides", "encoder": "the encoder"}[found["bound"]]
    said.append(
        f"Reading took {_hours(found['hours_read'])}, summed over its threads; the encoder worked for "
        f"{_hours(found['hours_encode'])} and stood waiting for tiles for {_hours(found['hours_wait'])}. The slower "
        f"side, and so the limit, was {limit}."
    )
    cores = found["cores_per_encoder"]
    if not fmt.is_missing(cores):
        enough = "One processor core" if cores <= 1 else f"About {cores:.2g} processor cores"
        said.append(f"{enough} for reading would keep one such encoder busy.")
    return said


def _hours(hours: float) -> str:
    return fmt.duration(3600 * hours)


#: Columns of the audit: heading, and decimals (None for text).
_AUDIT: dict[str, tuple[str, int | None]] = {
    "slide_id": ("Slide", None),
    "status": ("Status", None),
    "vendor": ("Vendor", None),
    "mpp_x": ("µm/px x", 4),
    "mpp_y": ("µm/px y", 4),
    "mpp_source": ("Source", None),
    "objective_power": ("Power", 0),
    "power_ratio": ("µm × power / 10", 2),
    "side_x_px": ("Tile side, px", 0),
    "mpp_effective": ("µm/px of tiles", 4),
    "deviation_pct": ("Deviation, %", 2),
    "verdict": ("Resolution", None),
    "flags": ("Flags", None),
    "n_tiles": ("Tiles", 0),
    "n_tiles_failed": ("Failed tiles", 0),
    "tissue_mm2": ("Tissue, mm²", 1),
    "pen_fraction": ("Pen", 3),
    "fold_fraction": ("Folds", 3),
    "blood_fraction": ("Blood", 3),
    "sharpness_median": ("Sharpness", 0),
    "reader": ("Reader", None),
    "mask_source": ("Mask", None),
}


def _audit(audit: pd.DataFrame, names: dict[str, str]) -> View | None:
    known = [c for c in _AUDIT if c in audit and not audit[c].map(fmt.is_missing).all()]
    if "slide_id" not in known:
        return None
    more = f"; the first {MOST_AUDIT_ROWS}, all in slides.csv" if len(audit) > MOST_AUDIT_ROWS else ""
    view = View(
        "audit",
        f"All slides{more}",
        [Column(_AUDIT[c][0], "text" if _AUDIT[c][1] is None else "num") for c in known],
    )
    for row in audit.head(MOST_AUDIT_ROWS).to_dict("records"):
        cells = []
        for column in known:
            digits = _AUDIT[column][1]
            value = row[column]
            if column == "slide_id":
                cells.append(short_slide(value, names))
                continue
            cells.append(("" if fmt.is_missing(value) else str(value)) if digits is None else fmt.number(value, digits))
        view.add(cells, "failed" if row.get("status", "ok") != "ok" else "")
    return view


def _picture(thumbnail: Thumbnail, names: dict[str, str], lost: Any = None) -> dict[str, Any]:
    """A card of the gallery: picture and facts; without a picture where the slide could not be tiled."""
    qc = thumbnail.qc
    tiled = qc.get("status") == "ok"
    code = str(qc.get("reason_code") or "failed")
    text = (
        f"{fmt.count(qc.get('n_tiles'))} tiles, {fmt.number(qc.get('tissue_mm2'), 1)} mm² tissue, "
        f"{fmt.number(qc.get('mpp_x'), 3)} µm/px"
        if tiled
        else words.sentence(words.CODES.get(code, "reason in the table above"))
    )
    if tiled and lost is not None:
        text = f"tiled ({text}), then: {words.CODES.get(lost.reason_code, lost.reason_code or 'no features')}"
    return {
        "slide_id": thumbnail.slide_id,
        "name": names.get(thumbnail.slide_id, thumbnail.slide_id),
        "text": text,
        "tiled": tiled,
        "flagged": tiled and qc.get("verdict") == "flag",
        "uri": _data_uri(thumbnail.jpg) if tiled else None,
        "code": code.replace("_", " "),
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
