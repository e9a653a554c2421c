"""Sections of the page on patients and models: data in, what the template shows out. Rounding happens here only."""

from __future__ import annotations

from typing import Any

import pandas as pd
from markupsafe import Markup

from morphome.report import figures, marks, words
from morphome.report import format as fmt
from morphome.report.format import Column, View
from morphome.report.inputs import ReportData, is_neural
from morphome.splits import HORIZON_NOTE


def baseline(table: pd.DataFrame) -> View:
    """The baseline table; the first column of a repeated characteristic is left empty."""
    groups = [c for c in table.columns if c not in {"characteristic", "level"}]
    view = View(
        "baseline",
        "Patients at baseline: all, by outcome, and by test fold"
        if any(g.startswith("Fold") for g in groups)
        else "Patients at baseline: all, and by outcome",
        [Column("Characteristic"), Column("")] + [Column(g, "num") for g in groups],
    )
    before = None
    for row in table.to_dict("records"):
        new = row["characteristic"] != before
        view.add(
            [row["characteristic"] if new else "", row["level"], *(row[g] for g in groups)], "first" if new else ""
        )
        before = row["characteristic"]
    return view


def splits(data: ReportData, table: pd.DataFrame) -> dict[str, Any]:
    """Folds of the first repeat (of all when few), the horizon and its candidates."""
    shown = table if len(table) <= 12 else table[table["repeat"] == table["repeat"].min()]
    several = shown["repeat"].nunique() > 1
    tau = data.horizon
    view = View(
        "folds",
        "Patients (events) per fold" + ("" if len(shown) == len(table) else "; first repeat, all in splits.csv"),
        [
            Column("Fold"),
            Column("Training", "num"),
            Column("Inner validation", "num"),
            Column("Test", "num"),
            Column("Test sites", "num"),
            Column("… also in training", "num"),
        ]
        + (
            [
                Column(f"Events by {tau:g} mo", "num", "test patients with the event up to the horizon"),
                Column(f"Beyond {tau:g} mo", "num", "test patients observed beyond the horizon"),
            ]
            if tau is not None
            else []
        )
        + [Column("Sites of the test fold (patients)")],
    )
    for row in shown.itertuples():
        cells = [
            f"{row.repeat} / {row.fold}" if several else str(row.fold),
            *(
                f"{getattr(row, f'{r}_patients')} ({getattr(row, f'{r}_events')})"
                for r in ("train", "inner_val", "test")
            ),
            fmt.count(row.test_sites),
            fmt.count(row.test_sites_also_in_training),
        ]
        if tau is not None:
            cells += [fmt.count(row.test_cases_by_horizon), fmt.count(row.test_controls_beyond_horizon)]
        sites = [item.replace(":", " (") + ")" for item in row.test_site_list.split(";") if item]
        view.add([*cells, fmt.listing(sites, 6)])
    return {
        "view": view,
        "scheme": data.facts.get("scheme") or data.config.get("splits", {}).get("scheme", ""),
        "repeats": data.repeats,
        "folds": data.folds,
        "horizon": tau,
        "reason": words.sentence(data.facts.get("horizon_reason") or ""),
        "note": _horizon_note(data),
        "candidates": _candidates(data.facts.get("horizon_table")),
    }


def _horizon_note(data: ReportData) -> str:
    """That the horizon was there before the models, and which of them use it as their last bin edge."""
    if data.horizon is None:
        return ""
    note = str(data.facts.get("horizon_note") or HORIZON_NOTE)
    with_it = [
        name
        for name in data.names
        for run in data.runs_of(name)[:1]
        if is_neural(run) and (run.facts.get("training") or {}).get("bin_edges") == "horizon"
    ]
    return f"{note} It is also the last edge of the time bins of {words.listed(with_it)}." if with_it else note


def _candidates(table: Any) -> View | None:
    """The horizon rule's table, with whatever columns it has."""
    if not table:
        return None
    names = list(dict.fromkeys(key for row in table for key in row))
    numeric = {n for n in names if all(isinstance(r.get(n), (int, float)) for r in table if r.get(n) is not None)}
    view = View(
        "horizons",
        "Candidate horizons",
        [Column(n.replace("_", " "), "num" if n in numeric else "text") for n in names],
    )
    for row in table:
        view.add([_plain(row.get(n)) for n in names])
    return view


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return fmt.count(value)
    if isinstance(value, float):
        return fmt.count(value) if value == int(value) else fmt.number(value, 3)
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(v) for v in value)
    return fmt.MISSING if value is None else str(value)


def models(data: ReportData, table: pd.DataFrame, paired: pd.DataFrame) -> dict[str, Any]:
    """The main table, the paired differences and the folds' values."""
    tau = fmt.months(data.horizon) if data.horizon is not None else "τ"
    ceiling = data.oracle.get("oracle_c") if data.oracle else None
    per_fold = data.metrics[data.metrics["metric"] == "harrell_c"]
    c_values = [*table["harrell_c_lower"], *table["harrell_c_upper"], *table["harrell_c"], *per_fold["value"]]
    scale = marks.scale_for(c_values + ([ceiling] if ceiling else []), 0.5)
    view = View(
        "main",
        "Models on folds they have not seen"
        + (f"; Uno C, AUC, IBS and IPA at {tau}" if data.horizon is not None else ""),
        [
            Column("Model"),
            Column("Sees"),
            Column("C [95 % CI]", "num", "fold-stratified Harrell C, averaged over repeats"),
            Column(marks.axis(scale, "stratified C", 0.5), "plot"),
            Column("Uno C", "num", f"Uno's C up to {tau}"),
            Column("AUC", "num", f"cumulative/dynamic AUC at {tau}"),
            Column("IBS", "num", "integrated Brier score up to the horizon; lower is better"),
            Column("IPA", "num", "1 − IBS / IBS of one Kaplan-Meier curve for everybody; 0 or less is no gain"),
            Column("SD folds", "num", "standard deviation of C over folds; descriptive, not a standard error"),
            Column("Size, time", "num", "trained parameters; wall clock of training, all folds and repeats"),
        ],
    )
    rankable = table[(table["model"] != "random") & (table["runs_constant"] == 0)]["harrell_c"]
    best = rankable.idxmax() if rankable.notna().any() else None
    for index, row in table.iterrows():
        values = per_fold.loc[per_fold["name"] == row["name"], "value"].tolist()
        label = f"{row['name']}: C {fmt.estimate(row['harrell_c'], row['harrell_c_lower'], row['harrell_c_upper'])}"
        plot = marks.forest(
            scale,
            row["harrell_c"],
            row["harrell_c_lower"],
            row["harrell_c_upper"],
            0.5,
            label=label,
            folds=values,
            ceiling=ceiling,
            strong=index == best,
        )
        name = Markup("<b>{}</b>").format(row["name"]) if index == best else row["name"]
        if row["model"] != row["name"]:
            name = Markup('{}<span class="sub">{}</span>').format(name, row["model"])
        view.add(
            [
                name,
                _sees(row),
                _metric(data, view, row, "harrell_c", 3),
                plot,
                *(_metric(data, view, row, m, d) for m, d in (("uno_c", 3), ("auc", 3), ("ibs", 3), ("ipa", 2))),
                fmt.number(row["harrell_c_sd_folds"], 3),
                Markup('{}<span class="sub">{}</span>').format(
                    fmt.brief(row["n_parameters"]), fmt.duration(row["train_seconds"])
                ),
            ],
            "best" if index == best else "",
        )
    return {
        "view": view,
        "ceiling": ceiling,
        "methods": sorted({m for m in table["harrell_c_method"] if m}),
        "paired": _paired(paired) if len(paired) else None,
        "per_fold": _per_fold(data, per_fold),
    }


def _sees(row: pd.Series) -> Any:
    """What a model sees, and below it which gene tables."""
    kinds = row["sees"] or "nothing"
    if not row["gene_tables"]:
        return kinds
    return Markup('{}<span class="sub">{}</span>').format(kinds, row["gene_tables"].replace(" + ", ", "))


def _metric(data: ReportData, view: View, row: pd.Series, metric: str, digits: int) -> Any:
    """A cell of a metric: value and interval, with a note when something could not be computed."""
    at = (data.metrics["name"] == row["name"]) & (data.metrics["metric"] == metric)
    gone = data.metrics[at & data.metrics["value"].isna()]
    whole = str(row[f"{metric}_reason"] or "")
    parts = words.reasons(gone, data.horizon, int(at.sum()), data.repeats)
    if parts:
        # The summary names one reason of the folds and counts the rest; what it says on the interval is kept.
        parts += [words.tidy(t) for t in whole.split("; ") if t.startswith("no interval: ")]
    elif whole:
        parts = [words.tidy(whole)]
    elif not fmt.is_missing(row[f"{metric}_n_missing"]) and row[f"{metric}_n_missing"] > 0:
        parts = [f"{fmt.plural(int(row[f'{metric}_n_missing']), 'fold')} without a value"]
    note = "; ".join(parts)
    value = fmt.number(row[metric], digits)
    limits = fmt.interval(row[f"{metric}_lower"], row[f"{metric}_upper"], digits)
    cell = view.mark(value, note)
    return Markup('{}<span class="sub">{}</span>').format(cell, limits) if limits else cell


def _paired(paired: pd.DataFrame) -> View:
    scale = marks.scale_for([*paired["lower"], *paired["upper"], *paired["delta_c"]], 0.0)
    references = sorted(set(paired["reference"]))
    one = len(references) == 1
    view = View(
        "paired",
        f"Difference in stratified C to {references[0]}, same patients"
        if one
        else "Differences in stratified C, same patients",
        [
            Column("Model" if one else "Model − reference"),
            Column("ΔC [95 % CI]", "num"),
            Column(marks.axis(scale, "difference in C", 0.0), "plot"),
            Column("Detectable ΔC", "num", "true difference found with power 80 %: 2.80 standard errors"),
            Column("Reading"),
        ],
    )
    for row in paired.itertuples():
        name = row.name if one else f"{row.name} − {row.reference}"
        text = fmt.estimate(row.delta_c, row.lower, row.upper, sign=True)
        plot = marks.forest(
            scale,
            row.delta_c,
            row.lower,
            row.upper,
            0.0,
            label=f"{name}: ΔC {text}",
            strong=fmt.excludes(row.lower, row.upper, 0) != 0,
        )
        view.add(
            [
                name,
                view.mark(text, words.tidy(row.reason)),
                plot,
                fmt.number(row.detectable_delta_c, 2),
                fmt.reading(row.lower, row.upper),
            ]
        )
    return view


def _per_fold(data: ReportData, per_fold: pd.DataFrame) -> View | None:
    keys = sorted(set(zip(per_fold["repeat"], per_fold["fold"], strict=True)))
    if not keys or len(keys) > 10:
        return None
    several = len({r for r, _ in keys}) > 1
    view = View(
        "per-fold",
        "C per test fold",
        [Column("Model")] + [Column(f"r{r} f{f}" if several else f"Fold {f}", "num") for r, f in keys],
    )
    for name in data.names:
        mine = per_fold[per_fold["name"] == name].set_index(["repeat", "fold"])
        cells: list[Any] = [name]
        for key in keys:
            found = mine.loc[key] if key in mine.index else None
            gone = found is not None and fmt.is_missing(found["value"])
            reason = words.tidy(found["reason"] or "no reason given") if gone else ""
            cells.append(view.mark(fmt.number(None if found is None else found["value"]), reason))
        view.add(cells)
    return view


def risk(data: ReportData) -> list[dict[str, Any]]:
    """One Kaplan-Meier figure per model with the facts below it; the random score comes too, as a control."""
    cards = []
    for name in data.names:
        curves = data.km[data.km["name"] == name]
        people = data.oof[(data.oof["name"] == name) & (data.oof["repeat"] == data.oof["repeat"].min())]
        found = data.risk_groups[data.risk_groups["name"] == name]
        facts = found.iloc[0].to_dict() if len(found) else {}
        hr = fmt.estimate(facts.get("hazard_ratio"), facts.get("hr_lower"), facts.get("hr_upper"), 2)
        lines = [
            f"Hazard ratio high : low {hr}" if not fmt.is_missing(facts.get("hazard_ratio")) else "No hazard ratio"
        ]
        if not fmt.is_missing(facts.get("logrank_chi2")):
            lines.append(f"log-rank χ² {fmt.number(facts['logrank_chi2'], 1)} (descriptive)")
        if not fmt.is_missing(facts.get("rmst_high_months")) and data.horizon is not None:
            lines.append(
                f"restricted mean survival to {data.horizon:g} months: "
                f"{fmt.number(facts['rmst_high_months'], 1)} high, {fmt.number(facts.get('rmst_low_months'), 1)} low"
            )
        if facts.get("reason"):
            lines.append(words.tidy(facts["reason"]))
        if facts:
            lines.append(
                f"events: {fmt.count(facts.get('events_high'))} high, {fmt.count(facts.get('events_low'))} low"
            )
        figure = None
        if len(curves) and len(people):
            figure = figures.kaplan_meier(
                curves,
                people,
                data.horizon,
                f"km-{fmt.slug(name)}",
                f"Kaplan-Meier curves of {name}",
                f"Survival of the high and the low risk group by {name}. {'; '.join(lines)}.",
            )
        cards.append({"name": name, "figure": figure, "text": "; ".join(lines)})
    return cards
