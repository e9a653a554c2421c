"""Tables of the slides behind the page: audit, resolutions, what was set aside, and the counts of it all."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from morphome.report import format as fmt
from morphome.report.inputs import ReportData

#: Columns of ``mpp_audit.csv``: what a file says of its resolution, what was used and what it was judged to be.
MPP_COLUMNS = (
    "slide_id", "vendor", "width_px", "height_px", "mpp_x", "mpp_y", "mpp_source", "all_sources_json",
    "objective_power", "power_ratio", "anisotropy", "mpp_target", "side_x_px", "side_y_px", "mpp_effective",
    "deviation_pct", "verdict", "reason", "reason_code", "flags", "resolution_unit", "level_downsamples",
    "deviation_x_pct", "deviation_y_pct", "patient_id", "site",
)  # fmt: skip
#: Where the site of a slide's patient is not among the files of the report.
NO_SITE = "site not known"


def slides(data: ReportData) -> pd.DataFrame:
    """The audit of all slides; lists and mappings as text."""
    table = data.audit.copy()
    for column in table.columns:
        if table[column].map(lambda v: isinstance(v, (list, dict, tuple, np.ndarray))).any():
            table[column] = table[column].map(_plain_text)
        elif column.endswith("_px") or column.startswith("n_") or column in {"parity_n", "dct_scale"}:
            # A missing count turns a column into floats: whole numbers stay whole in the CSV.
            table[column] = pd.to_numeric(table[column], errors="coerce").astype("Int64")
    return table.sort_values("slide_id").reset_index(drop=True) if "slide_id" in table else table


def _plain_text(value: Any) -> Any:
    if isinstance(value, dict):
        return "; ".join(f"{k}={v}" for k, v in value.items() if v is not None)
    if isinstance(value, (list, tuple, np.ndarray)):
        return "; ".join(str(v) for v in value)
    return value


def failed_slides(data: ReportData) -> pd.DataFrame:
    """Slides of the audit that gave no features: ``slide_id, reason_code, reason``."""
    table = slides(data)
    if "status" not in table:
        return pd.DataFrame(columns=["slide_id", "reason_code", "reason"])
    lost = table[table["status"].astype(str) != "ok"]
    lost = lost.reindex(columns=["slide_id", "reason_code", "reason"]).astype(object)
    return lost.where(lost.notna(), "").reset_index(drop=True)


def audited(data: ReportData) -> bool:
    """Whether resolutions were audited: not for imported features, whose slides nobody opened here."""
    return "verdict" in data.audit and "mpp_x" in data.audit


def mpp_audit(data: ReportData) -> pd.DataFrame:
    """The audit of resolutions, one row per slide with its patient and site, every digit kept.

    ``verdict`` is "ok", "flag", "quarantine", "not opened", or "not audited" for imported features. ``reason`` is
    that of the verdict alone: a slide that was lost for another reason keeps its "ok".
    """
    table = slides(data)
    if "slide_id" not in table:
        return pd.DataFrame(columns=list(MPP_COLUMNS))
    known = audited(data)
    table = table.reindex(columns=[c for c in MPP_COLUMNS if c not in {"patient_id", "site"}])
    verdict = texts(table["verdict"])
    refused = verdict == "quarantine"
    opened = verdict.isin(["ok", "flag", "quarantine"])
    keep = refused | ~opened if known else pd.Series(False, index=table.index)
    table["reason"] = texts(table["reason"]).where(keep, "")
    table["reason_code"] = texts(table["reason_code"]).where(keep, "")
    table["verdict"] = verdict.where(opened, "not opened") if known else "not audited"
    if not known:
        table["reason"] = "the features were imported: nobody opened the slide here"
    table["flags"] = texts(table["flags"])
    places = [data.places.get(str(slide), ("", "")) for slide in table["slide_id"]]
    table["patient_id"] = [patient for patient, _ in places]
    table["site"] = [site or NO_SITE for _, site in places]
    return table[list(MPP_COLUMNS)]


def texts(column: pd.Series) -> pd.Series:
    """A column as text, "" where it is missing."""
    return column.map(lambda value: "" if fmt.is_missing(value) else str(value)).astype(object)


def flag_names(table: pd.DataFrame) -> list[list[str]]:
    """Flags of each row of :func:`mpp_audit`; a conflict with a power that is not there is named ``no_power``."""
    found = []
    for flags, power in zip(table["flags"], table["objective_power"], strict=True):
        names = [name.strip() for name in str(flags).split(";") if name.strip()]
        found.append(["no_power" if n == "power_conflict" and fmt.is_missing(power) else n for n in names])
    return found


def other_sources(sources_json: Any, used: str) -> list[tuple[str, float, float]]:
    """Sources beside the one that is used: name, x, y; empty where the audit does not hold them."""
    if fmt.is_missing(sources_json):
        return []
    return [(name, *map(float, xy)) for name, xy in json.loads(str(sources_json)).items() if name != used]


def deviations(table: pd.DataFrame) -> pd.Series:
    """Largest distance (of both axes) between what was read and what was asked, percent, without those unknown."""
    columns = table[["deviation_pct", "deviation_x_pct", "deviation_y_pct"]].apply(pd.to_numeric, errors="coerce")
    used = texts(table["verdict"]).isin(["ok", "flag"])
    return columns.abs().max(axis=1)[used].dropna()


@dataclass
class SlideCounts:
    """What became of the slides and their tiles.

    Attributes:
        found, opened: slides of the audit, and those whose file could be opened.
        verdicts: slides by verdict on their resolution.
        flags: slides by flag; a slide may have several.
        assumed: slides by source, for the sources that are assumptions.
        lost: slides without features by reason code.
        planned, read, failed: tiles. ``unused``: tiles that could be read, of slides that were set aside later.
    """

    found: int
    opened: int
    verdicts: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    assumed: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    planned: int = 0
    read: int = 0
    failed: int = 0

    @property
    def unused(self) -> int:
        """Tiles that could be read and are not among the features."""
        return max(0, self.planned - self.read - self.failed)

    @property
    def n_lost(self) -> int:
        """Slides without features."""
        return sum(self.lost.values())


def count_slides(data: ReportData) -> SlideCounts:
    """Counts over the audit; what an old or imported audit does not hold is 0."""
    audit, lost = data.audit, failed_slides(data)
    table = mpp_audit(data)
    opened = int((table["verdict"] != "not opened").sum())
    counts = SlideCounts(len(audit), opened)
    counts.lost = Counter(str(code) or "failed" for code in lost["reason_code"])
    if audited(data):
        counts.verdicts = Counter(table["verdict"])
        kept = table["verdict"].isin(["ok", "flag"]).tolist()
        counts.flags = Counter(f for names, ok in zip(flag_names(table), kept, strict=True) if ok for f in names)
        sources = texts(table["mpp_source"])
        counts.assumed = Counter(s for s, ok in zip(sources, kept, strict=True) if ok and s.startswith("assumed"))
    counts.read = _sum(audit, "n_tiles")
    counts.failed = _sum(audit, "n_tiles_failed")
    counts.planned = _sum(audit, "n_tiles_planned") if "n_tiles_planned" in audit else counts.read + counts.failed
    return counts


def _sum(table: pd.DataFrame, column: str) -> int:
    return int(pd.to_numeric(table[column], errors="coerce").fillna(0).sum()) if column in table else 0


def failed_tiles(data: ReportData) -> pd.DataFrame:
    """Slides with tiles that could not be read, worst first: ``slide_id, planned, failed, share, status, reader``."""
    columns = ["slide_id", "planned", "failed", "share", "status", "reader"]
    table = slides(data)
    if "n_tiles_failed" not in table or "n_tiles_planned" not in table:
        return pd.DataFrame(columns=columns)
    table = table.assign(
        planned=pd.to_numeric(table["n_tiles_planned"], errors="coerce"),
        failed=pd.to_numeric(table["n_tiles_failed"], errors="coerce"),
        reader=texts(table["reader"]) if "reader" in table else "",
    )
    table = table[table["failed"] > 0].assign(share=lambda t: t["failed"] / t["planned"])
    return table.sort_values(["share", "slide_id"], ascending=[False, True], ignore_index=True)[columns]
