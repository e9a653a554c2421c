"""Figures as inline SVG. Text stays text, nothing is loaded, and equal input gives equal bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from morphome.report.inputs import Run

matplotlib.use("Agg")

from matplotlib.figure import Figure

# Okabe and Ito's palette, which stays apart for colour-blind readers; line styles and labels differ as well.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, GREY = "#CC79A7", "#56B4E9", "#6B7785"
FOLD_COLOURS = (BLUE, RED, GREEN, PINK, ORANGE, SKY)
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))

_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "morphome",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5a6675",
    "axes.labelcolor": "#1a2330",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e6eaee",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": "#5a6675",
    "ytick.color": "#5a6675",
    "xtick.labelcolor": "#1a2330",
    "ytick.labelcolor": "#1a2330",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def style():
    """The look of all figures, as a context."""
    return matplotlib.rc_context(_RC)


def to_svg(figure: Figure, key: str, title: str, description: str) -> Markup:
    """Inline SVG of a figure.

    Namespaces, metadata and the global style that Matplotlib writes are taken out (inside HTML they are not needed,
    and the style would change the whole page); ids get ``key`` as a prefix because they must be unique on the page.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, flags=re.S)
    text = re.sub(r'font-family: [^;"]*(; )?', "", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'href="#', f'href="#{key}-', text)
    text = text.replace("url(#", f"url(#{key}-")
    width, height = (float(v) for v in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups())
    head = (
        f'<svg class="figure" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-labelledby="{key}-title {key}-desc"><title id="{key}-title">{escape(title)}</title>'
        f'<desc id="{key}-desc">{escape(description)}</desc>'
    )
    text = re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
    # Coordinates to a hundredth of a point, and no line breaks inside paths: half the bytes, the same picture.
    text = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', lambda m: re.sub(r"(\d\.\d{2})\d+", r"\1", m[0]), text)
    return Markup(re.sub(r"\s*\n\s*", " ", text))


def kaplan_meier(
    curves: pd.DataFrame, people: pd.DataFrame, horizon: float | None, key: str, title: str, description: str
) -> Markup:
    """Survival of the high and the low risk group with intervals, and the numbers at risk.

    Args:
        curves: rows of ``morphome.km`` of one model (``group, time_months, survival, lower, upper``).
        people: rows of ``morphome.oof`` of that model, first repeat (``time_months, high_risk``), for the counts.
        horizon: months, drawn as a thin line.
    """
    with style():
        figure = Figure(figsize=(4.9, 3.75))
        axes, counts = figure.subplots(2, 1, gridspec_kw={"height_ratios": [5.2, 1]})
        longest = _last_time(people["time_months"].to_numpy(), horizon)
        ticks = _month_ticks(longest)
        if horizon is not None and horizon <= longest:
            axes.axvline(horizon, color=GREY, linewidth=0.8, linestyle=":")
            axes.text(horizon, 1.045, f"τ = {horizon:g}", ha="center", va="bottom", fontsize=8, color=GREY)
        for group, colour, line, high in (("low", BLUE, "-", False), ("high", RED, "--", True)):
            # Every curve starts at 1 in month 0, whether or not the file says so.
            part = curves[(curves["group"] == group) & (curves["time_months"] > 0)].sort_values("time_months")
            if part.empty:
                continue
            time = np.r_[0.0, part["time_months"]]
            level = np.r_[1.0, part["survival"]]
            n = int((people["high_risk"].astype(bool) == high).sum())
            low, up = np.r_[1.0, part["lower"]].astype(float), np.r_[1.0, part["upper"]].astype(float)
            mine = people[people["high_risk"].astype(bool) == high]
            members = np.sort(mine["time_months"].to_numpy())
            # Faint from where fewer than the floor are left: there one patient moves the curve by a third or more.
            floor = min(least_at_risk(len(people)), n)
            until = members[n - floor] if n else 0.0
            axes.fill_between(time, low, up, step="post", color=colour, alpha=0.13, linewidth=0)
            # Up to the last patient of the group, not only to the last event; the clipped axis ends it.
            end = max(members[-1] if n else 0.0, time[-1])
            time, level = np.r_[time, end], np.r_[level, level[-1]]
            firm = time <= until
            at = np.r_[time[firm], until], np.r_[level[firm], level[firm][-1]]
            axes.step(*at, where="post", color=colour, linestyle=line, linewidth=1.8, label=f"{group} risk (n = {n})")
            rest = np.r_[until, time[~firm]], np.r_[level[firm][-1], level[~firm]]
            axes.step(*rest, where="post", color=colour, linestyle=line, linewidth=1.1, alpha=0.45)
            if "event" in mine:
                left = mine.loc[mine["event"].astype(int) == 0, "time_months"].to_numpy()
                here = level[np.searchsorted(time, left, side="right") - 1]
                axes.plot(left, here, "|", color=colour, markersize=5, markeredgewidth=0.9, alpha=0.8)
        axes.set(ylim=(0, 1.03), xlim=(0, longest), ylabel="Survival", xticks=ticks)
        axes.set_xlabel("Months")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper right", handlelength=2.6, borderaxespad=0.2)
        counts.set(xlim=axes.get_xlim(), ylim=(0, 3), xticks=[], yticks=[])
        counts.grid(False)
        for spine in counts.spines.values():
            spine.set_visible(False)
        left = -0.045 * longest
        counts.text(left, 2.6, "Number at risk", fontsize=8, color=GREY, ha="left", va="center")
        for row, (label, colour, high) in enumerate((("low", BLUE, False), ("high", RED, True))):
            y = 1.55 - row
            counts.text(left, y, label, ha="right", va="center", color=colour, fontsize=8.5, fontweight="bold")
            members = people.loc[people["high_risk"].astype(bool) == high, "time_months"]
            for t in ticks:
                counts.text(t, y, str(int((members >= t).sum())), ha="center", va="center", fontsize=8.5)
        figure.subplots_adjust(left=0.125, right=0.97, top=0.935, bottom=0.005, hspace=0.33)
        return to_svg(figure, key, title, description)


def least_at_risk(n: int) -> int:
    """A curve of ``n`` patients is drawn while at least so many of them are left: 5 %, and at least three."""
    return max(3, round(0.05 * n))


def _last_time(times: np.ndarray, horizon: float | None) -> float:
    """Where the axis of a curve ends: with few patients left the rest is noise over most of the width."""
    ordered = np.sort(times)[::-1]
    end = float(ordered[min(least_at_risk(len(ordered)), len(ordered)) - 1]) if len(ordered) else 12.0
    return max(end, horizon or 0.0)


def _month_ticks(longest: float) -> list[float]:
    step = next((s for s in (3, 6, 12, 24, 36, 60) if longest / s <= 7), 120)
    return [float(t) for t in range(0, int(longest) + 1, step)]


def training(runs: Sequence[Run], key: str, title: str, description: str) -> Markup:
    """Losses and inner C over the epochs, one line per fold, the chosen epoch marked."""
    with style():
        figure = Figure(figsize=(9.9, 2.9))
        losses, inner = figure.subplots(1, 2)
        few = len(runs) <= 6
        for i, run in enumerate(runs):
            h = run.history.sort_values("epoch")
            colour = FOLD_COLOURS[i] if few else BLUE
            width = 1.5 if few else 0.7
            losses.plot(h["epoch"], h["train_loss"], color=colour, linewidth=width, alpha=1 if few else 0.5)
            losses.plot(
                h["epoch"],
                h["inner_loss"],
                color=colour,
                linewidth=width,
                linestyle=(0, (3, 1.5)),
                alpha=0.8 if few else 0.5,
            )
            inner.plot(
                h["epoch"],
                h["inner_c"],
                color=colour,
                linewidth=width,
                linestyle=_STYLES[i] if few else "-",
                alpha=1 if few else 0.4,
                label=_run_label(run, runs),
            )
            chosen = h[h["chosen"].astype(bool)]
            inner.plot(
                chosen["epoch"],
                chosen["inner_c"],
                "o",
                color=colour,
                markersize=6 if few else 3.5,
                markeredgecolor="white",
                markeredgewidth=0.8,
            )
        losses.plot([], [], color=GREY, label="training")
        losses.plot([], [], color=GREY, linestyle=(0, (3, 1.5)), label="inner validation")
        losses.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=2, borderaxespad=0.1)
        losses.set(xlabel="Epoch", ylabel="Loss")
        inner.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
        inner.set(xlabel="Epoch", ylabel="C, inner validation")
        if few:
            inner.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=2.6)
        for axes in (losses, inner):
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.subplots_adjust(left=0.06, right=0.9 if few else 0.99, top=0.91, bottom=0.165, wspace=0.22)
        return to_svg(figure, key, title, description)


def search(runs: Sequence[Run], key: str, title: str, description: str) -> Markup:
    """Inner score of every setting tried, one line per fold, the chosen one marked."""
    with style():
        figure = Figure(figsize=(4.9, 2.9))
        axes = figure.subplots()
        few = len(runs) <= 6
        name, logarithmic, labels = _setting_axis(runs)
        for i, run in enumerate(runs):
            h = run.history.sort_values("epoch")
            x = h["setting"].map(_setting_value) if name else h["setting"].map(labels.index)
            colour = FOLD_COLOURS[i] if few else BLUE
            order = np.argsort(np.asarray(x, dtype=float), kind="stable")
            axes.plot(
                np.asarray(x)[order],
                h["inner_c"].to_numpy()[order],
                color=colour,
                linewidth=1.4 if few else 0.7,
                linestyle=_STYLES[i] if few else "-",
                alpha=1 if few else 0.4,
                label=_run_label(run, runs),
            )
            chosen = h["chosen"].astype(bool).to_numpy()
            axes.plot(
                np.asarray(x)[chosen],
                h["inner_c"].to_numpy()[chosen],
                "o",
                color=colour,
                markersize=6 if few else 3.5,
                markeredgecolor="white",
                markeredgewidth=0.8,
            )
        axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(lambda value, _: "")
        if name is None:
            axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
        axes.set(xlabel=name or "Setting", ylabel="C, inner cross-validation")
        if few:
            # Above the axes: inside, it would hide lines.
            place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.1}
            axes.legend(
                ncols=3 if len(runs) > 5 else 5, handlelength=2.2, columnspacing=0.9, handletextpad=0.5, **place
            )
        top = 0.96 if not few else 0.83 if len(runs) > 5 else 0.9
        figure.subplots_adjust(left=0.145, right=0.97, top=top, bottom=0.165 if name else 0.33)
        return to_svg(figure, key, title, description)


def _setting_value(setting: str) -> float:
    return float(str(setting).split("=")[-1])


def _setting_axis(runs: Sequence[Run]) -> tuple[str | None, bool, list[str]]:
    """Name of the one number that the settings vary, whether to draw it as a logarithm, and all settings."""
    labels = list(dict.fromkeys(str(s) for run in runs for s in run.history["setting"]))
    names = {label.split("=")[0] for label in labels}
    try:
        values = [_setting_value(label) for label in labels]
    except ValueError:
        return None, False, labels
    if len(names) != 1:
        return None, False, labels
    return names.pop(), min(values) > 0 and max(values) / min(values) > 20, labels


def experts(routing: pd.DataFrame, key: str, title: str, description: str) -> Markup:
    """Share of the inner-validation patients that each expert got, over the epochs, one panel per layer.

    Args:
        routing: ``layer, epoch, expert, name, share, fold`` of one model, all runs; shares are averaged over runs.
    """
    role = "inner_val" if (routing["role"] == "inner_val").any() else routing["role"].iloc[0]
    part = routing[routing["role"] == role]
    layers = sorted(part["layer"].unique(), key=layer_order)
    names = part.drop_duplicates("expert").sort_values("expert")["name"].tolist()
    with style():
        figure = Figure(figsize=(9.9, 2.55))
        panels = np.atleast_1d(figure.subplots(1, len(layers), sharey=True))
        for axes, layer in zip(panels, layers, strict=True):
            shares = part[part["layer"] == layer].pivot_table(
                index="epoch", columns="expert", values="share", aggfunc="mean"
            )
            bottom = np.zeros(len(shares))
            for expert, colour in zip(shares.columns, (BLUE, ORANGE, GREEN, PINK, SKY, RED), strict=False):
                axes.bar(
                    shares.index,
                    shares[expert],
                    bottom=bottom,
                    color=colour,
                    width=0.86,
                    linewidth=0.6,
                    edgecolor="white",
                    label=names[int(expert)],
                )
                bottom = bottom + shares[expert].to_numpy()
            axes.set(xlabel="Epoch", ylim=(0, 1))
            axes.set_title(str(layer))
            axes.grid(False)
            axes.xaxis.get_major_locator().set_params(integer=True)
        panels[0].set_ylabel("Share of patients")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=len(labels), bbox_to_anchor=(0.5, -0.01))
        figure.subplots_adjust(left=0.06, right=0.99, top=0.91, bottom=0.29, wspace=0.12)
        return to_svg(figure, key, title, description)


def layer_order(layer: str) -> tuple[str, str]:
    """Round first, then pathology before genes: p1, g1, p2, g2."""
    digits = "".join(re.findall(r"\d+", str(layer)))
    letters = re.sub(r"\d+", "", str(layer))
    return digits, "0" if letters.startswith("p") else letters


def _run_label(run: Run, runs: Iterable[Run]) -> str:
    return f"fold {run.fold}" if len({r.repeat for r in runs}) == 1 else f"repeat {run.repeat}, fold {run.fold}"
