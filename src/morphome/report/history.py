"""Sections of the page on how models were trained: curves, searches, and the experts that a router picked."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from morphome.report import figures
from morphome.report import format as fmt
from morphome.report.format import Column, View
from morphome.report.inputs import ReportData, Run


def training(data: ReportData) -> dict[str, Any]:
    """Curves of models trained by epochs, search paths of those with a search, and what has neither."""
    curves, paths, silent = [], [], []
    for name in data.names:
        runs = [r for r in data.runs_of(name) if len(r.history)]
        searched = [r for r in runs if "setting" in r.history and r.history["inner_c"].notna().sum() > 1]
        epochs = [r for r in runs if r.history["train_loss"].notna().any()]
        key = fmt.slug(name)
        if epochs:
            picked = [f"fold {r.fold}: {_chosen(r)} ({len(r.history)} run)" for r in epochs]
            text = f"{name}: chosen epoch {', '.join(picked)}" if len(epochs) <= 6 else f"{name}: {_epochs(epochs)}"
            curves.append(
                {
                    "name": name,
                    "text": text,
                    "figure": figures.training(epochs, f"train-{key}", f"Training of {name}", text),
                }
            )
        elif searched:
            picked = Counter(
                str(s) for r in searched for s in r.history.loc[r.history["chosen"].astype(bool), "setting"]
            )
            told = "; ".join(f"{s} ({n}x)" for s, n in sorted(picked.items(), key=lambda item: (-item[1], item[0]))[:5])
            text = f"{name}: chosen {told}"
            paths.append(
                {
                    "name": name,
                    "text": text,
                    "figure": figures.search(searched, f"search-{key}", f"Search of {name}", text),
                }
            )
        else:
            fixed = sorted({str(s) for r in runs for s in r.history.get("setting", []) if s})
            silent.append(f"{name} ({', '.join(fixed)})" if fixed else name)
    return {"curves": curves, "paths": paths, "silent": silent}


def _chosen(run: Run) -> str:
    epochs = run.history.loc[run.history["chosen"].astype(bool), "epoch"]
    return str(int(epochs.iloc[0])) if len(epochs) else "none"


def _epochs(runs: list[Run]) -> str:
    known = [int(_chosen(r)) for r in runs if _chosen(r) != "none"]
    return f"chosen epochs {min(known)} to {max(known)}, median {np.median(known):g}" if known else "no epoch chosen"


def experts(data: ReportData, use: pd.DataFrame) -> list[dict[str, Any]]:
    """Expert use per model that has a router: over the epochs, and at the chosen epoch on test patients."""
    cards = []
    for name in data.names:
        part = use[use["model_name"] == name]
        if part.empty:
            continue
        part = part.rename(columns={"expert_name": "name"})
        last = part[part["chosen"].astype(bool)] if part["chosen"].any() else part[part["epoch"] == part["epoch"].max()]
        role = "test" if (last["role"] == "test").any() else last["role"].iloc[0]
        last = last[last["role"] == role]
        names = part.drop_duplicates("expert").sort_values("expert")["name"].tolist()
        full = np.log(len(names))
        view = View(
            f"experts-{fmt.slug(name)}",
            f"{name}: share of {role} patients per expert at the chosen epoch, mean over runs",
            [
                Column("Layer"),
                *(Column(n, "num") for n in names),
                Column("Range of the top share", "num", "largest share of one expert, lowest and highest over runs"),
                Column("Gate entropy", "num", f"mean over patients, nats; {full:.2f} is a gate without preference"),
            ],
        )
        for layer in sorted(last["layer"].unique(), key=figures._layer_order):
            rows = last[last["layer"] == layer]
            shares = rows.groupby("expert")["share"].mean()
            top = rows.groupby(["repeat", "fold"])["share"].max()
            view.add(
                [
                    layer,
                    *(f"{100 * shares.get(e, np.nan):.0f} %" for e in range(len(names))),
                    f"{100 * top.min():.0f} to {100 * top.max():.0f} %",
                    fmt.number(rows["entropy"].mean(), 2),
                ]
            )
        several = part["epoch"].nunique() > 1
        figure = (
            figures.experts(
                part,
                f"experts-fig-{fmt.slug(name)}",
                f"Expert use of {name}",
                "Share of inner-validation patients per expert over the epochs",
            )
            if several
            else None
        )
        cards.append({"name": name, "view": view, "figure": figure})
    return cards
