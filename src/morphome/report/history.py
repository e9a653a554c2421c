"""Sections of the page on how models were trained: curves, searches, and the experts that a router picked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from morphome.report import figures, words
from morphome.report import format as fmt
from morphome.report.format import Column, View
from morphome.report.inputs import ReportData, Run, is_neural


def training(data: ReportData) -> dict[str, Any]:
    """Curves of models trained by epochs, search paths of those with a search, and what has neither.

    A network that was searched has a history per setting tried: the curves are those of the setting that was kept.
    """
    curves, paths, silent = [], [], []
    for name in data.names:
        runs = [r for r in data.runs_of(name) if len(r.history)]
        searched = [r for r in runs if "setting" in r.history and r.history["inner_c"].notna().sum() > 1]
        tried = [r for r in runs if is_neural(r)]
        epochs = [replace(r, history=_kept(r)) for r in tried]
        key = fmt.slug(name)
        if epochs:
            several = data.repeats > 1
            picked = [
                f"{f'repeat {r.repeat}, ' if several else ''}fold {r.fold}: {_chosen(r)} of {len(r.history)}"
                for r in epochs
            ]
            text = f"{name}: chosen epoch: {'; '.join(picked)}" if len(epochs) <= 6 else f"{name}: {_epochs(epochs)}"
            text += _branches(epochs)
            draw = _losses if len(_without_c(epochs)) == len(epochs) else figures.training
            curves.append(
                {
                    "name": name,
                    "text": text,
                    "how": how(epochs),
                    "search": _searched(tried, key),
                    "figure": draw(epochs, f"train-{key}", f"Training of {name}", text),
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


_TAUGHT = {
    "kd_logit": "the hazards of every time bin",
    "kd_risk_rank": "the differences of log risks",
    "kd_feature": "the features before fusion",
}


def how(runs: list[Run]) -> str:
    """Time bins, inner validation and how the epoch was chosen, as far as the runs say; first run's settings."""
    facts = runs[0].facts
    given = facts.get("training") or {}
    cox = facts.get("head") == "cox"
    parts = []
    bins, edges = given.get("time_bins"), given.get("bin_edges")
    if cox:
        text = f"Cox head: exact partial likelihood of windows of {given.get('cox_window')} patients"
        parts.append(f"{text}, whose level grows with the patients: the two losses are not comparable")
    elif bins is not None:
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
        blind = len(_without_c(runs)) if rule == "inner_best" else 0
        if blind:
            lowest = "epoch with the lowest loss of inner validation, which has no comparable pair for C"
            some = f"{text}; in {blind} of {fmt.plural(len(runs), 'run')} {lowest}"
            text = lowest if blind == len(runs) else some
        patience = given.get("patience")
        parts.append(f"{text}, patience {patience}" if rule == "inner_best" and patience is not None else text)
    sampler = None if cox else given.get("sampler")
    if sampler is not None and _SAMPLERS.get(sampler, sampler):
        parts.append(_SAMPLERS.get(sampler, str(sampler)))
    return "; ".join([*parts, *_beside(given, runs)])


def _beside(given: Mapping[str, Any], runs: list[Run]) -> list[str]:
    """A teacher, a rule of balance, missing genes: what a plain row has not."""
    parts = []
    distil = given.get("distil") or {}
    if distil.get("loss") == "gene_aux":
        parts.append(
            f"also learns scores of the gene groups, weight {distil['weight']:g}, which the training loss holds"
        )
    elif distil:
        parts.append(
            f"taught {_TAUGHT[distil['loss']]} by {distil['teacher']}, weight {distil['weight']:g}, which the training "
            "loss holds and that of inner validation does not"
        )
    rule = (given.get("balance") or {}).get("rule", "none")
    if rule != "none" and any("rho" in r.history for r in runs):
        parts.append(f"slides and genes balanced by {rule}")
    if given.get("modality_dropout"):
        parts.append(f"genes left out in {100 * given['modality_dropout']:g} % of the training steps")
    return parts


def _kept(run: Run) -> pd.DataFrame:
    """The epochs of the setting that was kept, of a search; all epochs without one."""
    h = run.history
    if "setting" not in h:
        return h
    chosen = h.loc[h["chosen"].astype(bool), "setting"]
    return h[h["setting"] == chosen.iloc[0]] if len(chosen) else h


def _searched(runs: list[Run], key: str) -> View | None:
    """The settings that a search of a network tried, and which it kept; None without a search."""
    runs = [r for r in runs if "setting" in r.history and r.history["setting"].nunique() > 1]
    if not runs:
        return None
    kept = Counter(str(_kept(r)["setting"].iloc[0]) for r in runs)
    best: dict[str, list[float]] = {}
    for run in runs:
        for setting, c in run.history.groupby("setting", sort=False)["inner_c"].max().items():
            best.setdefault(str(setting), []).append(float(c))
    view = View(
        f"searched-{key}",
        "Settings tried; each fold keeps the one with the best C of inner validation",
        [Column("Setting"), Column("Best C, inner validation", "num", "mean over runs"), Column("Kept in", "num")],
    )
    for setting, c in best.items():
        label = words.tidy(setting.replace("=", " = "))
        known = [value for value in c if np.isfinite(value)]
        view.add([label, fmt.number(np.mean(known) if known else np.nan), fmt.plural(kept[setting], "run")])
    return view


def _branches(runs: list[Run]) -> str:
    """How far one branch of a fused model was ahead at the chosen epoch, and what its rule made of it."""
    rows = [r.history[r.history["chosen"].astype(bool)] for r in runs if "rho" in r.history]
    chosen = pd.concat([row for row in rows if len(row)]) if any(len(row) for row in rows) else pd.DataFrame()
    if chosen.empty:
        return ""
    alone = [f"{label} {fmt.number(chosen[f'inner_c_{u}'].mean())}" for u, label in _BRANCHES.items()]
    text = f". C of each branch alone on inner validation, mean over runs: {', '.join(alone)}"
    if not ((chosen["k_path"] == 1) & (chosen["k_omic"] == 1)).all():
        factors = [f"{label} {fmt.number(chosen[f'k_{u}'].mean(), 2)}" for u, label in _BRANCHES.items()]
        text += f"; factors of the learning rates: {', '.join(factors)}"
    return text


_BRANCHES = {"path": "slides", "omic": "genes"}


def _without_c(runs: list[Run]) -> list[Run]:
    """Runs whose inner validation gave no C in any epoch."""
    return [r for r in runs if len(r.history) and r.history["inner_c"].isna().all()]


def _losses(runs: list[Run], key: str, title: str, description: str) -> Markup:
    """Losses over the epochs without the panel of C, where C cannot be computed; the chosen epoch marked."""
    with figures.style():
        figure = figures.Figure(figsize=(9.9, 2.9))
        axes = figure.subplots()
        few = len(runs) <= len(figures.FOLD_COLOURS)
        for i, run in enumerate(runs):
            h = run.history.sort_values("epoch")
            look = {"color": figures.FOLD_COLOURS[i] if few else figures.BLUE, "linewidth": 1.5 if few else 0.7}
            axes.plot(h["epoch"], h["train_loss"], alpha=1 if few else 0.5, **look)
            axes.plot(h["epoch"], h["inner_loss"], linestyle=(0, (3, 1.5)), alpha=0.8 if few else 0.5, **look)
            chosen = h[h["chosen"].astype(bool)]
            level = chosen["inner_loss"].fillna(chosen["train_loss"])
            axes.plot(chosen["epoch"], level, "o", color=look["color"], markersize=6 if few else 3.5)
            if few:
                several = len({r.repeat for r in runs}) > 1
                label = f"{f'repeat {run.repeat}, ' if several else ''}fold {run.fold}"
                figure.text(0.91, 0.85 - 0.08 * i, label, color=look["color"], fontsize=8.5)
        axes.plot([], [], color=figures.GREY, label="training")
        axes.plot([], [], color=figures.GREY, linestyle=(0, (3, 1.5)), label="inner validation")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=2, borderaxespad=0.1)
        axes.set(xlabel="Epoch", ylabel="Loss")
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.subplots_adjust(left=0.06, right=0.9 if few else 0.99, top=0.91, bottom=0.165)
        return figures.to_svg(figure, key, title, description)


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
