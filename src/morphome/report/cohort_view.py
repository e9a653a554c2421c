"""Sections of the page on the cohort: the flow, where its tables come from, gene groups, hospitals."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd
from markupsafe import Markup

from morphome.report import cohort_tables, tables, words
from morphome.report import format as fmt
from morphome.report.format import Column, View
from morphome.report.inputs import ReportData

#: Rows of a table on the page; the CSV has all.
MOST_SITES, MOST_GROUPS = 15, 30
#: Excluded ids that a box of the flow lists.
MOST_IDS = 40
_PANELS = {**tables.PANELS, "expression": "expression for encoders"}
#: Formats that are files of the GDC, where the run asked it.
_OF_GDC = ("star_counts", "maf", "gdc_gene_level")
_ROLES = {"clinical": "outcomes", "covariates": "covariates", "slides": "slides", "source": "source"}


def flow(data: ReportData) -> list[dict[str, Any]]:
    """Boxes of the flow diagram: a start per unit, one per real loss, and the end.

    Steps that left nobody out are named in ``checked`` of the box whose number they leave as it is: the last one of
    their unit, or the end for the patients' steps that come last of all. Records are rows of the clinical table that
    were joined to patients: nobody is left out there, so they open the diagram in a box of their own, and only where
    some patient has several.
    """
    boxes: list[dict[str, Any]] = []
    started: set[str] = set()
    told = f"analysed, {fmt.plural(data.n_events, 'event')}"
    if "n_slides" in data.patients and (n_slides := int(data.patients["n_slides"].sum())):
        told += f", {fmt.plural(n_slides, 'slide')}"
    end = _box("end", "patients", data.n_patients, told)
    steps = list(zip(data.flow, tables.flow(data).itertuples(), strict=True))
    boxes += [_records(step, row) for step, row in steps if row.unit == "records" and row.excluded]
    steps = [(step, row) for step, row in steps if row.unit != "records"]
    # The steps from here on are of patients and left nobody out.
    closing = 1 + max((i for i, (_, r) in enumerate(steps) if r.unit != "patients" or r.excluded), default=-1)
    for number, (step, row) in enumerate(steps):
        listing = not row.excluded and str(row.step).startswith("listed")
        if row.unit not in started:
            started.add(row.unit)
            name = str(row.step) if listing and row.step != "listed" else "listed"
            boxes.append(_box("start", row.unit, row.before, name))
            if listing:
                continue
        if row.excluded:
            name = str(row.step).removeprefix(f"{row.unit} ")
            boxes.append(
                _box("loss", row.unit, row.after, name)
                | {"before": row.before, "excluded": row.excluded, "reason": words.codes(row.reason)}
                | _ids(step)
            )
            continue
        last = next(box for box in reversed(boxes) if box["unit"] == row.unit)
        if row.unit == "patients" and last is not boxes[-1] and number >= closing:
            last = end
        last["checked"].append(words.check(row.step, row.unit))
    return _with_lanes([*boxes, end])


def _with_lanes(boxes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``lane``: patients go down one line; slides (any other unit) down a second, from their first box to the last."""
    beside = [i for i, box in enumerate(boxes) if box["unit"] not in ("patients", "records")]
    for i, box in enumerate(boxes):
        inside = bool(beside) and beside[0] <= i <= beside[-1]
        names = {"branch": i in beside, "lane": inside, "lane-first": inside and i == beside[0]}
        box["lane"] = " ".join(name for name, holds in names.items() if holds)
    return boxes


def _box(kind: str, unit: str, n: int, name: str) -> dict[str, Any]:
    return {"kind": kind, "unit": unit, "n": n, "name": name, "checked": [], "excluded": 0, "ids": [], "more": 0}


def _ids(step: dict[str, Any]) -> dict[str, Any]:
    """The first excluded ids, and how many more there are."""
    ids = list(dict.fromkeys(str(i) for i in step.get("excluded", [])))
    return {"ids": ids[:MOST_IDS], "more": max(0, len(ids) - MOST_IDS)}


def _records(step: dict[str, Any], row: Any) -> dict[str, Any]:
    """The opening box of records: how many rows there were, and whose were joined."""
    people = len({str(i) for i in step.get("excluded", [])})
    text = f"{fmt.plural(row.excluded, 'further record')} of {fmt.plural(people, 'patient')} joined"
    return _box("start", "records", row.before, "in the clinical table") | {"joined": text} | _ids(step)


def sources(data: ReportData, table: pd.DataFrame) -> dict[str, Any]:
    """Where the tables come from, and what was asked of the GDC in sentences."""
    cohort, panels = table[table["kind"] == "cohort"], table[table["kind"] == "panel"]
    view = View(
        "sources",
        "Tables of patients, slides and genes",
        [
            Column("Table"),
            Column("Source"),
            Column("Files", "num"),
            Column("Patients", "num", "in the table; below, how many of them are analysed"),
            Column("Genes", "num"),
            Column("Values"),
            Column("Left out, and what else is known"),
        ],
    )
    for row in [*cohort.itertuples(), *panels.itertuples()]:
        label = _PANELS.get(row.table, row.table) if row.kind == "panel" else _ROLES.get(row.table, row.table)
        people = fmt.count(row.patients) if pd.notna(row.patients) else ""
        if pd.notna(row.patients_analysed):
            people = Markup('{}<span class="sub">{} analysed</span>').format(people, fmt.count(row.patients_analysed))
        view.add(
            [
                _marked(view, label, data.panels[row.table] if row.kind == "panel" else {}),
                _under("GDC" if row.format in _OF_GDC and data.query else _path(row.source), row.format),
                "" if pd.isna(row.files) else fmt.count(row.files),
                people,
                "" if pd.isna(row.genes) else fmt.count(row.genes),
                _values(row.value_type, row.unit),
                _lines(f"Left out: {row.left_out}" if row.left_out else "", row.notes),
            ]
        )
    return {"view": view if view.rows else None, "gdc": _gdc(data)}


def _marked(view: View, label: str, facts: Mapping[str, Any]) -> Any:
    """The name of a table with a letter per rule; tables that were read by the same rule share its letter."""
    cell: Any = label
    for rule in cohort_tables.rules(facts.get("notes") or {}).values():
        cell = view.mark(cell, words.sentence(rule))
    return cell


def _text(value: Any) -> str:
    return "" if fmt.is_missing(value) else str(value)


def _path(text: Any) -> Markup:
    """A path that may break behind its slashes."""
    return Markup("/<wbr>").join(_text(text).split("/"))


def _under(text: Any, below: Any) -> Any:
    if not _text(below):
        return text
    return Markup('{}<span class="sub">{}</span>').format(text, _text(below))


def _values(value_type: Any, unit: Any) -> Any:
    kind = _text(value_type)
    if not kind:
        return ""
    said, unit = words.VALUE_TYPES.get(kind, kind.replace("_", " ")), _text(unit)
    if unit.lower() == kind.replace("_", " ") or unit.lower() in said.lower():
        return said
    return unit if unit.lower().startswith(said.lower().removesuffix("s")) else _under(said, unit)


def _lines(*texts: Any) -> Any:
    shown = [words.sentence(t) for t in map(_text, texts) if t]
    return Markup("").join(Markup('<span class="line">{}</span>').format(t) for t in shown)


def _gdc(data: ReportData) -> list[str]:
    """What was asked of the GDC, as sentences; empty for cohorts from elsewhere."""
    query = data.query
    if not query:
        return []
    release, projects = _text(query.get("data_release")), [str(p) for p in query.get("projects") or []]
    told = f"{words.listed(projects) or 'The files'} of the Genomic Data Commons"
    told += f", data release {release}" if release else ""
    api = _text(query.get("api"))
    told += f", from {api}" if api and "api.gdc.cancer.gov" not in api else ""
    if query.get("time"):
        told += f", asked {words.moment(query['time'])}"
    newer = _text(query.get("server_release"))
    told += f" (the server was at {newer})" if newer and newer != release else ""
    pin = _text(query.get("pin"))
    if pin and pin != "latest":
        told += f". The release is pinned (gdc.data_release: {pin})"
    elif pin:
        told += ". The release is not pinned: asked again later, the GDC may give other files (gdc.data_release)"
    sentences = [words.sentence(told)]
    kinds = {str(k): v for k, v in (query.get("kinds") or {}).items()}
    if kinds:
        cases = sum(n for n in (query.get("cases") or {}).values())
        parts = [f"{fmt.plural(cases, 'patient')}"] if cases else []
        parts += [
            f"{_kind(k)} {fmt.plural(int(v.get('files') or 0), 'file')}"
            + (f", {words.size(v['bytes'])}" if v.get("bytes") else "")
            for k, v in kinds.items()
        ]
        total = sum(v.get("bytes") or 0 for v in kinds.values())
        sentences.append(words.sentence(f"{'; '.join(parts)}; {words.size(total)} in all"))
    by_kind, overall = cohort_tables.left_out_of_query(query)
    lost = [f"{_kind(k)}: {words.counted(counts, {})}" for k, counts in by_kind.items() if counts]
    lost += [words.counted(overall, {})] if overall else []
    if lost:
        sentences.append(words.sentence(f"Left out, or taken in an older version: {'; '.join(lost)}"))
    if query.get("pin_note"):
        sentences.append(words.sentence(query["pin_note"]))
    if query.get("pinned"):
        sentences.append("Nothing was asked anew: the tables are those of an earlier run (gdc.pinned).")
    return sentences


def _kind(name: str) -> str:
    return {"slides": "slides", **_PANELS}.get(name, name)


def gene_groups(data: ReportData, table: pd.DataFrame) -> dict[str, Any] | None:
    """Gene groups and how many of their genes have a column: dropped ones first where not all are shown."""
    if table.empty:
        return None
    per_panel = [p for p in ("rna", "mut", "cnv") if table[f"columns_{p}"].notna().any()]
    shown = table
    if len(table) > MOST_GROUPS:
        found = (table["matched_genes"] / table["asked"]).astype("Float64").fillna(0.0)
        shown = table.assign(share=found).sort_values(["kept", "share"], kind="stable").head(MOST_GROUPS)
    part = len(shown) < len(table)
    view = View(
        "gene-groups",
        "Gene groups, and how many of their genes have a column in the molecular tables"
        + (f"; the {MOST_GROUPS} that lost most, all in gene_groups.csv" if part else ""),
        [
            Column("Group"),
            Column("Genes", "num", "genes that the group asks for"),
            Column("Found", "num", "genes with a column in at least one table"),
            Column("Columns", "num", "a gene has up to one column per table"),
            *(Column(f"… {tables.PANELS[p]}", "num") for p in per_panel),
            Column("Not found"),
        ],
    )
    for row in shown.to_dict("records"):
        name = row["group"] if row["kept"] else view.mark(row["group"], _dropped(row["reason"]))
        cells = [_number(row[c]) for c in ("columns", *(f"columns_{p}" for p in per_panel))]
        found = fmt.share(int(row["matched_genes"]), int(row["asked"])) if pd.notna(row["asked"]) else fmt.MISSING
        view.add([name, _number(row["asked"]), found, *cells, _lost(row)], "" if row["kept"] else "failed")
    return {"view": view, "sentences": _group_sentences(data, table), "folded": len(shown) > 8}


def _dropped(reason: str) -> str:
    """Why a group is not used, without its own counts: they stand in its row, and many groups share the text."""
    few = re.fullmatch(r"\d+ of \d+ genes matched a column, fewer than (.+)", reason)
    return f"Dropped: fewer genes with a column than {few[1]}" if few else f"Dropped: {reason}"


def _number(value: Any) -> str:
    return fmt.MISSING if pd.isna(value) else fmt.count(value)


def _lost(row: dict[str, Any]) -> str:
    """``ABC1, DEF2 and 71 more; no gene symbols: 18S rRNA``."""
    parts = []
    for names, count, head in (("unmatched", "n_unmatched", ""), ("not_symbols", "n_not_symbols", "no symbols: ")):
        listed = [n for n in str(row[names] or "").split(";") if n]
        n = 0 if pd.isna(row[count]) else int(row[count])
        if listed:
            more = n - len(listed[:6])
            parts.append(head + ", ".join(listed[:6]) + (f" and {fmt.count(more)} more" if more > 0 else ""))
    return "; ".join(parts)


def _group_sentences(data: ReportData, table: pd.DataFrame) -> list[str]:
    content = data.groups or {}
    kept = int(table["kept"].sum())
    told = f"{kept} of {fmt.plural(len(table), 'gene group')} {'is' if kept == 1 else 'are'} used"
    told += f" ({content['source']})" if content.get("source") else ""
    overall = content.get("overall") or {}
    if overall:
        told += (
            f". Together they ask for {fmt.plural(overall['asked'], 'gene')}; "
            f"{fmt.share(overall['matched_genes'], overall['asked'])} have a column"
        )
    sentences = [words.sentence(told), "Names are compared letter by letter; aliases are not guessed."]
    if repeated := {k: v for k, v in (content.get("repeated") or {}).items() if v}:
        sentences.append(f"Entries that a group lists twice count once: {words.counted(repeated, {})}.")
    return sentences


def sites(table: pd.DataFrame) -> View | None:
    """Counts per hospital, most patients first; the small ones are summed when they are many."""
    if table.empty:
        return None
    few = len(table) <= MOST_SITES + 1
    shown = table if few else table.head(MOST_SITES)
    with_patients = int((table["patients_analysed"] > 0).sum())
    view = View(
        "sites",
        f"{fmt.plural(len(table), 'hospital')} (tissue source {'site' if len(table) == 1 else 'sites'})"
        + (f", {with_patients} of them with analysed patients" if with_patients < len(table) else "")
        + ("" if few else f"; the {MOST_SITES} with most patients, all in sites.csv"),
        [
            Column("Hospital"),
            Column("Patients", "num", "analysed, of those listed"),
            Column("Events", "num", "among the analysed patients"),
            Column("Slides", "num", "used, of those listed"),
            Column("Patients left out"),
            Column("Slides left out"),
        ],
    )
    for row in shown.to_dict("records"):
        codes = [c for c in row["site_codes"].split(";") if c and c != row["site"]]
        view.add([_under(row["site"], fmt.listing(codes, 6)), *_site_cells(row)])
    if not few:
        rest = table.iloc[MOST_SITES:]
        row = rest.select_dtypes("number").sum().to_dict()
        row |= {
            "patient_reasons": f"{fmt.count(row['patients_left_out'])} patients" if row["patients_left_out"] else "",
            "slide_reasons": f"{fmt.count(row['slides_left_out'])} slides" if row["slides_left_out"] else "",
        }
        view.add([f"{len(rest)} other hospitals", *_site_cells(row)])
    return view


def _site_cells(row: dict[str, Any]) -> list[str]:
    events = fmt.share(int(row["events"]), int(row["patients_analysed"]))
    return [
        _of(row["patients_analysed"], row["patients_listed"]),
        events,
        _of(row["slides_used"], row["slides_listed"]),
        row["patient_reasons"],
        row["slide_reasons"],
    ]


def _of(part: int, whole: int) -> str:
    """``12``, or ``12 of 15`` where some are missing."""
    return fmt.count(part) if part == whole else f"{fmt.count(part)} of {fmt.count(whole)}"
