"""Sections of the page on how models were trained: curves, searches, and the experts that a router picked."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from morphome.report import figures, words
from morphome.report import format as fmt
from morphome.report.format import Column, View
from morphome.report.inputs import ReportData, Run, is_neural


def training(data: ReportData) -> dict[str, Any]:
    """Curves of models trained by epochs, search paths of those with a search, and what has neither."""
    curves, paths, silent = [], [], []
    for name in data.names:
        runs = [r for r in data.runs_of(name) if len(r.history)]
        searched = [r for r in runs if "setting" in r.history and r.history["inner_c"].notna().sum() > 1]
        epochs = [r for r in runs if is_neural(r)]
        key = fmt.slug(name)
        if epochs:
            several = data.repeats > 1
            picked = [
                f"{f'repeat {r.repeat}, ' if several else ''}fold {r.fold}: {_chosen(r)} of {len(r.history)}"
                for r in epochs
            ]
            text = f"{name}: chosen epoch: {'; '.join(picked)}" if len(epochs) <= 6 else f"{name}: {_epochs(epochs)}"
            curves.append(
                {
                    "name": name,
                    "text": text,
                    "how": how(epochs),
                    "figure": figures.training(epochs, f"train-{key}", f"Training of {name}", text),
                }
            )
        elif searched:
            picked = Counter(
                str(s) for r in searched for s in r.history.loc[r.history["chosen"].astype(bool), "setting"]
            )
            order = sorted(picked.items(), key=lambda item: (-item[1], item[0]))[:5]
            told = "; ".join(words.tidy(s.replace("=", " = ")) + (f" ({n} runs)" if n > 1 else "") for s, n in order)
            text = f"{name}: chosen {told}{_edge(searched)}"
            paths.append(
                {
                    "name": name,
                    "text": text,
                    "figure": figures.search(searched, f"search-{key}", f"Search of {name}", text),
                }
            )
        else:
            fixed = sorted({str(s).replace("=", " = ") for r in runs for s in r.history.get("setting", []) if s})
            silent.append(f"{name} ({', '.join(fixed)})" if fixed else name)
    return {"curves": curves, "paths": paths, "silent": silent}


_EDGES = {
    "quantile": "edges at quantiles of the training events",
    "horizon": "last edge at the horizon",
}
_RULES = {"inner_best": "epoch with the best inner validation", "last": "last epoch"}
_SAMPLERS = {"class_balanced": "patients drawn evenly over time bins and outcomes", "shuffle": ""}


def how(runs: list[Run]) -> str:
    """Time bins, inner validation and how the epoch was chosen, as far as the runs say; first run's settings."""
    facts = runs[0].facts
    given = facts.get("training") or {}
    parts = []
    bins, edges = given.get("time_bins"), given.get("bin_edges")
    if bins is not None:
        text = fmt.plural(int(bins), "time bin")
        if isinstance(edges, str):
            text += f", {_EDGES.get(edges, f'edges: {edges}')}"
        parts.append(text)
    inner, train = ([int(r.facts[k]) for r in runs if r.facts.get(k)] for k in ("n_inner", "n_train"))
    if inner and train:
        parts.append(f"{fmt.span(inner)} patients of inner validation, {fmt.span(train)} to train on")
    rule = given.get("epoch_rule")
    if rule is not None:
        text = _RULES.get(rule, str(rule))
        patience = given.get("patience")
        parts.append(f"{text}, patience {patience}" if rule == "inner_best" and patience is not None else text)
    sampler = given.get("sampler")
    if sampler is not None and _SAMPLERS.get(sampler, sampler):
        parts.append(_SAMPLERS.get(sampler, str(sampler)))
    return "; ".join(parts)


def _edge(runs: list[Run]) -> str:
    """A warning where the setting chosen is the first or last that was tried: a better one may lie beyond."""
    n = 0
    for run in runs:
        history = run.history.sort_values("epoch")
        at = np.flatnonzero(history["chosen"].astype(bool))
        n += bool(len(history) > 2 and len(at) and at[0] in (0, len(history) - 1))
    return f"; at the edge of what was tried in {n} of {fmt.plural(len(runs), 'run')}" if n else ""


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
        for layer in sorted(last["layer"].unique(), key=figures.layer_order):
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
