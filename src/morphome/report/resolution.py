"""Section part of the page on microns per pixel: histogram by site, what deviates, what was flagged or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from morphome.report import figures, slide_tables, words
from morphome.report import format as fmt
from morphome.report.format import Column, View
from morphome.report.inputs import ReportData

#: Sites with a row of their own in the histogram; the table of flags names this many slides.
MOST_SITES, MOST_ROWS = 14, 200
#: The axis holds values that a scanner can have; others are counted beside the row.
AXIS = (0.1, 1.2)
#: Letters of a site's name in the histogram.
MOST_LETTERS = 34
#: Colours and hatches differ together: either alone tells the verdicts apart.
_KINDS = {
    "ok": ("passed", figures.BLUE, None),
    "flag": ("kept with a flag", figures.ORANGE, "////"),
    "quarantine": ("set aside", figures.RED, "xxxx"),
}


def resolution(data: ReportData, names: dict[str, str]) -> dict[str, Any] | None:
    """Figure, sentences and table; None for imported features, which were not audited."""
    if not slide_tables.audited(data):
        return None
    table = slide_tables.mpp_audit(data)
    targets = sorted(table["mpp_target"].dropna().unique())
    return {
        "target": " and ".join(f"{t:g}" for t in targets),
        "figure": _figure(table, targets),
        "sentences": [s for s in (_values(table), _deviation(table, targets), _power(table), _assumed(data)) if s],
        "flagged": _flagged(table, names),
    }


def _values(table: pd.DataFrame) -> str:
    known = table["mpp_x"].dropna()
    if not len(known):
        return "No slide has a value."
    return (
        f"Level 0 lies between {known.min():.4g} and {known.max():.4g} µm per pixel in "
        f"{fmt.plural(len(known), 'slide')} (median {known.median():.4g}); sources: {_sources(table)}."
    )


def _sources(table: pd.DataFrame) -> str:
    counts = slide_tables.texts(table["mpp_source"]).replace("", "none").value_counts()
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{words.mpp_source(source)} ({n})" for source, n in ordered)


def _deviation(table: pd.DataFrame, targets: list[float]) -> str:
    far = slide_tables.deviations(table)
    if not len(far):
        return ""
    asked = f"the {targets[0]:g} µm per pixel asked for" if len(targets) == 1 else "what was asked for"
    return (
        f"Tiles were read within {far.max():.2g} % of {asked} (largest of {fmt.plural(len(far), 'slide')}; "
        f"median {far.median():.2g} %): a tile is a whole number of pixels, so a little remains."
        if far.max() > 0
        else f"Tiles were read at exactly {asked} in all {fmt.plural(len(far), 'slide')}."
    )


def _power(table: pd.DataFrame) -> str:
    """What was found on objective power, which is compared and never used as a resolution."""
    flags = slide_tables.flag_names(table)
    against = sum("power_conflict" in f for f in flags)
    without = sum("no_power" in f for f in flags)
    parts = []
    if against:
        parts.append(f"in {fmt.plural(against, 'slide')} the objective power contradicts the microns per pixel")
    if without:
        parts.append(f"in {fmt.plural(without, 'slide')} the file names no objective power to compare with")
    if not parts:
        return "Objective power agrees with the microns per pixel in every slide that was audited."
    return words.sentence(f"{words.listed(parts)}; the microns per pixel are used, the power is not")


def _assumed(data: ReportData) -> str:
    found = slide_tables.count_slides(data).assumed
    said = [f"{fmt.plural(n, 'slide')} {words.ASSUMED.get(source, source)}" for source, n in sorted(found.items())]
    return f"Not measured but assumed: {words.listed(said)}." if said else ""


def _flagged(table: pd.DataFrame, names: dict[str, str]) -> View | None:
    """Slides whose resolution was flagged or refused, refused ones first."""
    found = table[table["verdict"].isin(["flag", "quarantine"])]
    if found.empty:
        return None
    found = found.sort_values(["verdict", "slide_id"], ascending=[False, True], kind="stable")
    shown = found.head(MOST_ROWS)
    more = "" if len(shown) == len(found) else f"; {MOST_ROWS} of {len(found)}, all in mpp_audit.csv"
    view = View(
        "flagged",
        f"Slides whose resolution was flagged or refused{more}",
        [
            Column("Slide"),
            Column("Site"),
            Column("Verdict"),
            Column("µm per pixel", "num", "of level 0, x × y"),
            Column("Source"),
            Column("Power", "num", "objective power that the file names"),
            Column("µm × power / 10", "num", "1 when the objective power fits the resolution; 0.85 to 1.15 passes"),
            Column("What was found"),
        ],
    )
    flags = slide_tables.flag_names(shown)
    for row, mine in zip(shown.itertuples(), flags, strict=True):
        refused = row.verdict == "quarantine"
        found_text = [words.CODES.get(row.reason_code, str(row.reason_code))] if refused else []
        found_text += [words.FLAGS.get(flag, flag) for flag in mine]
        others = slide_tables.other_sources(row.all_sources_json, row.mpp_source)
        if others and (refused or row.mpp_source == "override"):
            beside = (f"{words.mpp_source(name)} {_xy(x, y)}" for name, x, y in others)
            found_text.append(f"also in the file: {', '.join(beside)}")
        view.add(
            [
                short_slide(row.slide_id, names),
                row.site,
                "set aside" if refused else "kept",
                _xy(row.mpp_x, row.mpp_y),
                words.mpp_source(row.mpp_source),
                fmt.count(row.objective_power),
                fmt.number(row.power_ratio, 2),
                words.sentence("; ".join(found_text)),
            ],
            "failed" if refused else "",
        )
    return view


def _xy(x: Any, y: Any) -> str:
    if fmt.is_missing(x):
        return fmt.MISSING
    return f"{float(x):.5g}" if x == y or fmt.is_missing(y) else f"{float(x):.5g} × {float(y):.5g}"


def short_slide(slide_id: Any, names: dict[str, str]) -> Any:
    """Short name of a slide; the whole id shows when the pointer rests on it."""
    short = names.get(str(slide_id), str(slide_id))
    return short if short == slide_id else Markup('<span title="{}">{}</span>').format(slide_id, short)


def _figure(table: pd.DataFrame, targets: list[float]) -> Markup | None:
    """One row of bars per site over a common axis of microns per pixel, all slides first."""
    mpp = table[["mpp_x", "mpp_y"]].apply(pd.to_numeric, errors="coerce").mean(axis=1)
    inside = mpp.between(*AXIS)
    if not inside.any():
        return None
    groups = [("all slides", pd.Series(True, index=table.index))]
    # Sites without a name come last, then the small ones together.
    order = sorted(table["site"].value_counts().items(), key=lambda i: (i[0] == slide_tables.NO_SITE, -i[1], i[0]))
    if len(order) > 1:
        sites = [site for site, _ in order]
        head = sites if len(sites) <= MOST_SITES else sites[: MOST_SITES - 1]
        groups += [(site, table["site"] == site) for site in head]
        if rest := sites[len(head) :]:
            groups.append((f"{len(rest)} other sites", table["site"].isin(rest)))
    # Hospitals may have long names: the margin grows with the longest, and what does not fit is cut.
    names = {name: name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1].rstrip() + "…" for name, _ in groups}
    left = max(0.12, 0.0066 * max(map(len, names.values())))
    low, high = min(0.2, mpp[inside].min() - 0.01), max(0.55, mpp[inside].max() + 0.01, *targets)
    width = 0.0025 if high - low <= 0.6 else 0.005
    edges = np.arange(np.floor(low / width), np.ceil(high / width) + 1) * width
    with figures.style():
        figure = Figure(figsize=(9.9, 1.15 + 0.36 * len(groups)))
        axes = figure.subplots()
        for target in targets:
            axes.axvline(target, color=figures.GREY, linewidth=0.9, linestyle=":")
            axes.text(target, 0.35, f"asked: {target:g}", ha="center", va="bottom", fontsize=8, color=figures.GREY)
        seen: dict[str, Any] = {}
        for row, (name, members) in enumerate(groups):
            base = -(row + 1.0)
            at = {kind: members & inside & (table["verdict"] == kind) for kind in _KINDS}
            counts = {kind: np.histogram(mpp[mask], edges)[0] for kind, mask in at.items()}
            tallest = max(1, max(sum(counts.values())))
            bottom = np.zeros(len(edges) - 1)
            for kind, (_, colour, hatch) in _KINDS.items():
                full = counts[kind] > 0
                if not full.any():
                    continue
                height = counts[kind] / tallest * 0.8
                bars = axes.bar(
                    edges[:-1][full], height[full], width=width, bottom=base + bottom[full], align="edge",
                    color=colour, hatch=hatch, edgecolor="white" if hatch else colour, linewidth=0.3,
                )  # fmt: skip
                seen.setdefault(kind, bars)
                bottom = bottom + height
            axes.axhline(base, color="#c9d1d9", linewidth=0.7)
            outside = int((members & ~inside & mpp.notna()).sum())
            without = int((members & mpp.isna()).sum())
            notes = [f"{outside} off the axis"] * bool(outside) + [f"{without} without a value"] * bool(without)
            label = f"n = {int(members.sum())}" + (f" ({', '.join(notes)})" if notes else "")
            axes.text(edges[-1] + width, base + 0.12, label, ha="left", va="bottom", fontsize=8.5)
            weight = "bold" if row == 0 else "normal"
            axes.text(
                edges[0] - width, base + 0.12, names[name], ha="right", va="bottom", fontsize=8.5, fontweight=weight
            )
        axes.set(xlim=(edges[0], edges[-1]), ylim=(-len(groups) - 0.05, 0.3), yticks=[])
        axes.set_xlabel("Microns per pixel of level 0")
        axes.spines["left"].set_visible(False)
        handles = [seen[kind] for kind in _KINDS if kind in seen]
        labels = [_KINDS[kind][0] for kind in _KINDS if kind in seen]
        height = figure.get_size_inches()[1]
        figure.legend(handles, labels, loc="upper left", ncols=3, bbox_to_anchor=(left - 0.01, 1.0), handlelength=1.4)
        figure.subplots_adjust(left=left, right=0.8, top=1 - 0.42 / height, bottom=0.5 / height)
        described = "; ".join(f"{name}: {int(members.sum())}" for name, members in groups)
        return figures.to_svg(
            figure,
            "mpp",
            "Microns per pixel of level 0, by tissue source site",
            f"Histogram of {int(inside.sum())} slides between {mpp[inside].min():.4g} and {mpp[inside].max():.4g} "
            f"microns per pixel. Slides per row: {described}.",
        )
