"""Branches of fused models beside models of slides or genes alone: can balancing the modalities help at all?"""

from __future__ import annotations

import pandas as pd

from morphome.report import format as fmt
from morphome.report import tables
from morphome.report.format import Column, View
from morphome.report.inputs import ReportData, is_neural

#: What a branch sees, in the words of the table of models.
SEES = {"path": ["slides"], "omic": ["genes"]}
#: A branch that is this close to the network trained alone is not undertrained.
SMALL_GAP = 0.01
COLUMNS = ["name", "model", "branch", "harrell_c", "lower", "upper", "alone", "alone_c", "gap"]


def table(data: ReportData) -> pd.DataFrame:
    """One row per branch of a fused model: its C on the test folds, and the best network of that modality alone."""
    rows = []
    for found in data.branches.to_dict("records"):
        alone = _alone(data, SEES.get(found["branch"], []))
        alone_c = data.metric(alone, "harrell_c")["value"] if alone else float("nan")
        rows.append({**found, "alone": alone, "alone_c": alone_c, "gap": alone_c - found["harrell_c"]})
    return pd.DataFrame(rows, columns=COLUMNS)


def _alone(data: ReportData, sees: list[str]) -> str | None:
    """The network with the largest C among those that see this and nothing else."""
    networks = {run.name for run in data.runs if is_neural(run)}
    known = {
        name: data.metric(name, "harrell_c").get("value")
        for name in data.names
        if name in networks and tables.sees(data, name) == sees
    }
    known = {name: value for name, value in known.items() if not fmt.is_missing(value)}
    return max(known, key=known.__getitem__) if known else None


def section(table: pd.DataFrame) -> View | None:
    """The table as it is shown; None without fused models."""
    if table.empty:
        return None
    view = View(
        "branch-table",
        "What each branch of a fused model ranks alone, and the best network trained on that modality alone",
        [
            Column("Model"),
            Column("Branch"),
            Column("C of the branch [95 % CI]", "num", "linear head on what the branch hands to the fusion"),
            Column("Network alone"),
            Column("C alone", "num"),
            Column("Gap", "num", "alone minus branch"),
            Column("Reading"),
        ],
    )
    words = {"path": "slides", "omic": "genes"}
    for row in table.itertuples():
        known = not fmt.is_missing(row.gap)
        reading = "no network to compare with"
        if known:
            reading = "balancing cannot help" if row.gap < SMALL_GAP else "behind the network alone"
        view.add(
            [
                row.name,
                words.get(row.branch, row.branch),
                fmt.estimate(row.harrell_c, row.lower, row.upper),
                row.alone if known else fmt.MISSING,
                fmt.number(row.alone_c, 3),
                fmt.number(row.gap, 3, sign=True),
                reading,
            ]
        )
    return view
