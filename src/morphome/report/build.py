"""Step ``report``: one HTML page that opens offline, and its tables as CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from morphome.files import settings_hash, stamp, write_text
from morphome.report import branches, cohort_view, figures, history, optimistic, records, sections
from morphome.report import format as fmt
from morphome.report.inputs import ReportData, ReportInputs, load_report
from morphome.report.judge import judge
from morphome.report.limits import limitations
from morphome.report.slides import slides
from morphome.report.tables import all_tables

TEMPLATES = Path(__file__).parent / "templates"

LICENCES = (
    "morphome is Apache-2.0. It uses scikit-survival, which is GPL-3: an image or bundle that contains it must honour "
    "GPL-3. Encoders and cohort data keep their own licences."
)


def run_report(*, settings: Mapping[str, Any], inputs: ReportInputs, out: Path) -> None:
    """Write ``report.html`` and ``tables/*.csv``.

    Args:
        settings: the complete, checked configuration; its hash is the stamp of the page.
        inputs: files of the run.
        out: folder of the report.

    Raises:
        MorphomeError: a needed file is missing or of another format.
    """
    data = load_report(inputs)
    tables = {**all_tables(data), "branches": branches.table(data)}
    out = Path(out)
    for name, table in tables.items():
        write_text(table.to_csv(index=False, lineterminator="\n"), out / "tables" / f"{name}.csv")
    write_text(_page(data, tables, settings), out / "report.html")


def _page(data: ReportData, tables: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["letter"] = fmt.View.letter
    name = str(data.config.get("name") or settings.get("name") or "run")
    content = {
        "title": str(data.config.get("title") or name),
        "name": name,
        "endpoint": ", ".join(sorted({str(e) for e in data.patients["endpoint"].dropna()}))
        if "endpoint" in data.patients
        else "",
        "simulated": data.simulated,
        "quick": data.repeats == 1,
        "verdict": judge(data),
        "flow": cohort_view.flow(data),
        "sources": cohort_view.sources(data, tables["sources"]),
        "groups": cohort_view.gene_groups(data, tables["gene_groups"]),
        "sites": cohort_view.sites(tables["sites"]),
        "baseline": sections.baseline(tables["baseline"]),
        "splits": sections.splits(data, tables["splits"]),
        "models": sections.models(data, tables["model_table"], tables["comparisons"]),
        "optimistic": optimistic.section(tables["published_protocol"]),
        "risk": sections.risk(data),
        "risk_floor": figures.least_at_risk(data.n_patients),
        "training": history.training(data),
        "branches": branches.section(tables["branches"]),
        "experts": history.experts(data, tables["expert_use"]),
        "slides": slides(data, tables["slides"]),
        "times": records.run_times(data),
        "limitations": limitations(data),
        "provenance": records.provenance(data, settings_hash(settings)),
        "licences": LICENCES,
        "csv": sorted(tables),
        "stamp": json.dumps(stamp("morphome.report", settings)),
        "css": Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
    }
    return environment.get_template("report.html.j2").render(content)
