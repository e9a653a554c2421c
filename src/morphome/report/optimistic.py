"""Rows trained under the published protocol, beside the honest rows of the same models."""

from __future__ import annotations

from typing import Any

import pandas as pd
from markupsafe import Markup

from morphome.report import format as fmt
from morphome.report.format import Column, View
from morphome.report.inputs import ReportData

COLUMNS = [
    *("name", "model", "epoch_rule", "optimistic_c", "optimistic_lower", "optimistic_upper"),
    *("honest_name", "honest_c", "honest_lower", "honest_upper", "difference"),
    "runs_constant",
]
_RULES = {"last": "last epoch", "oracle_outer_best": "best epoch on the reported fold"}


def table(data: ReportData) -> pd.DataFrame:
    """One row per row of the published protocol; the honest row is the first one of the same model, if there is one."""
    if data.optimistic is None:
        return pd.DataFrame(columns=COLUMNS)
    rows = []
    summary = data.optimistic.summary
    for found in summary[summary["metric"] == "harrell_c"].to_dict("records"):
        runs = [run for run in data.optimistic.runs if run.name == found["name"]]
        honest = next((name for name in data.names if data.model_of(name) == found["model"]), None)
        beside: dict[str, Any] = data.metric(honest, "harrell_c") if honest else {}
        rows.append(
            {
                "name": found["name"],
                "model": found["model"],
                "epoch_rule": runs[0].facts["training"]["epoch_rule"],
                **{f"optimistic_{k}": found[v] for k, v in (("c", "value"), ("lower", "lower"), ("upper", "upper"))},
                "honest_name": honest,
                **{f"honest_{k}": beside.get(v) for k, v in (("c", "value"), ("lower", "lower"), ("upper", "upper"))},
                "difference": found["value"] - beside["value"] if beside else None,
                "runs_constant": sum(bool(run.facts.get("constant_prediction")) for run in runs),
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def section(table: pd.DataFrame) -> View | None:
    """The table as it is shown; None without rows."""
    if table.empty:
        return None
    view = View(
        "published-protocol",
        "Optimistic: stratified C under the published protocol, and the honest row of the same model",
        [
            Column("Row"),
            Column("Epoch"),
            Column("C, optimistic [95 % CI]", "num"),
            Column("Honest row"),
            Column("C, honest [95 % CI]", "num"),
            Column("Difference", "num", "optimistic minus honest"),
        ],
    )
    for row in table.itertuples():
        alone = fmt.is_missing(row.honest_name)
        known = not alone and not fmt.is_missing(row.honest_c)
        view.add(
            [
                Markup('{}<span class="sub">optimistic</span>').format(row.name),
                _RULES.get(row.epoch_rule, row.epoch_rule),
                view.mark(fmt.estimate(row.optimistic_c, row.optimistic_lower, row.optimistic_upper), _doubt(row)),
                "none in this run" if alone else row.honest_name,
                fmt.estimate(row.honest_c, row.honest_lower, row.honest_upper) if known else fmt.MISSING,
                fmt.number(row.difference, 3, sign=True) if known else fmt.MISSING,
            ]
        )
    return view


def _doubt(row: Any) -> str:
    """Why C says little; empty where it does not."""
    if not row.runs_constant:
        return ""
    where = fmt.plural(row.runs_constant, "run")
    return f"every patient got the same risk in {where}: C is 0.5 there whatever the model saw"
