"""What may be concluded from a run: the verdict and the limitations, in words that claim no more than the intervals.

A difference is read off a paired bootstrap interval only. Where it contains 0 no difference can be called; where it
does not, the wording stays at "indication": the interval ignores that models vary with their training patients, and
the model looked at is the best of several.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from morphome.report import format as fmt
from morphome.report import slide_tables, tables
from morphome.report.inputs import ReportData
from morphome.report.limits import limitations


@dataclass
class Fact:
    """One figure of the verdict box."""

    label: str
    value: str
    detail: str


@dataclass
class Verdict:
    """The box at the top."""

    headline: str
    sentences: list[str] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def judge(data: ReportData) -> Verdict:
    """The verdict of a run."""
    scored = [n for n in data.names if data.model_of(n) != "random" and not fmt.is_missing(_c(data, n).get("value"))]
    flags = limitations(data)
    warnings = [flag.text for flag in flags if flag.level == "serious"]
    if not scored:
        reasons = sorted({str(_c(data, n).get("reason") or "no reason given") for n in data.names})
        return Verdict(
            f"No model could be scored: {'; '.join(reasons)}.", facts=[_events(data), *_slides(data)], warnings=warnings
        )

    # A row that is constant somewhere has C = 0.5 there whatever it saw: it is no rival and not the best.
    sound = [n for n in scored if not tables.constant_folds(data, n)]
    best = max(sound or scored, key=lambda n: _c(data, n)["value"])
    top = _c(data, best)
    verdict = Verdict("", warnings=warnings)
    verdict.facts.append(
        Fact(
            "Largest stratified C" if len(scored) > 1 else "Stratified C",
            f"{fmt.number(top['value'])}",
            f"{best}, {_sees(data, best)}; {_ci(top['lower'], top['upper'])}",
        )
    )
    chance = fmt.excludes(top["lower"], top["upper"], 0.5)
    verdict.headline = _headline(data, verdict, best, scored, sound, chance)
    if len(scored) > 2:
        verdict.sentences.append(
            f"{best} has the largest C of {len(scored)} models. The largest of several estimates is too high on "
            "average, so expect less of it in new patients."
        )
    ipa = data.metric(best, "ipa").get("value")
    if not fmt.is_missing(ipa) and ipa <= 0:
        verdict.sentences.append(
            f"The survival probabilities of {best} are no better than one survival curve for everybody "
            f"(IPA {fmt.number(ipa, 2)} at the horizon): it may rank patients, but do not read risks off it."
        )
    verdict.facts.append(_events(data))
    verdict.facts += _slides(data)
    control = _control(data)
    if control:
        verdict.facts.append(control)
    if data.oracle and not fmt.is_missing(data.oracle.get("oracle_c")):
        verdict.facts.append(
            Fact(
                "Ceiling (oracle)",
                fmt.number(data.oracle["oracle_c"]),
                "C of the planted risk itself on these patients",
            )
        )
    return verdict


def _headline(data: ReportData, verdict: Verdict, best: str, scored: list[str], sound: list[str], chance: int) -> str:
    clinical = [n for n in scored if data.model_of(n) == "clinical_cox"]
    rivals = [n for n in sound if n not in clinical]
    nothing = (
        f"No model can be told from chance: the interval of the best, {best}, contains 0.5."
        if len(scored) > 1
        else f"{best} cannot be told from chance: its interval contains 0.5."
    )
    if not clinical:
        verdict.facts.append(Fact("Over clinical Cox", "not known", "this run has no clinical Cox row"))
        verdict.sentences.append(
            "Without a clinical Cox row it is not known whether slides or genes add to what age, sex, stage and "
            "grade already say."
        )
        if chance > 0:
            return f"{best} ranks patients better than chance; its value over clinical data is not known."
        return nothing if chance == 0 else f"{best} ranks patients worse than chance."
    if not sound:
        verdict.facts.append(Fact("Over clinical Cox", "not known", "every row is constant in some fold"))
        return "No model can be judged: each gave all patients the same risk in some fold."
    if not set(clinical) & set(sound):
        verdict.facts.append(Fact("Over clinical Cox", "not known", "the clinical row is constant in some fold"))
        return "Nothing can be compared: the clinical Cox row gave all patients the same risk in some fold."
    if not rivals and len(scored) > len(clinical):
        verdict.facts.append(Fact("Over clinical Cox", "not known", "every other row is constant in some fold"))
        return "Nothing can be compared: every model but clinical Cox gave all patients the same risk in some fold."
    if not rivals:
        verdict.facts.append(Fact("Over clinical Cox", "not known", "only clinical rows were run"))
        return nothing if chance == 0 else "Only clinical models were run."

    rival = max(rivals, key=lambda n: _c(data, n)["value"])
    paired = tables.against_clinical(data)
    found = paired[(paired["name"] == rival) & paired["reference"].isin(clinical)]
    if found.empty:
        verdict.facts.append(Fact("Over clinical Cox", "not compared", f"no paired comparison of {rival}"))
        return nothing if chance == 0 else f"{best} has the largest C; it was not compared with clinical Cox in pairs."
    row = found.iloc[0]
    side = fmt.excludes(row["lower"], row["upper"], 0.0)
    verdict.facts.append(
        Fact(
            f"{rival} − clinical Cox",
            fmt.number(row["delta_c"], sign=True),
            f"paired ΔC; {_ci(row['lower'], row['upper'], sign=True)}; {fmt.reading(row['lower'], row['upper'])}",
        )
    )
    if "clinical" not in tables.sees(data, rival):
        verdict.sentences.append(
            f"{rival} does not see the clinical data, so this compares it in place of the clinical model. What it "
            "would add on top of clinical data needs a row that sees both."
        )
    if not fmt.is_missing(row["detectable_delta_c"]):
        verdict.sentences.append(
            f"With these patients a true difference below about {fmt.number(row['detectable_delta_c'], 2)} in C would "
            "usually be missed (power 80 %)."
        )
    if side == 0:
        tail = "" if chance > 0 else f" {nothing}"
        return f"No difference can be called between {rival}, the best other model, and the clinical Cox model.{tail}"
    where = "on one partition of the cohort" if data.repeats == 1 else f"over {data.repeats} partitions of the cohort"
    better = "better" if side > 0 else "worse"
    return f"{rival} ranks patients {better} than the clinical Cox model {where}: an indication, not a proof."


def _c(data: ReportData, name: str) -> dict[str, Any]:
    return data.metric(name, "harrell_c")


def _ci(lower: Any, upper: Any, sign: bool = False) -> str:
    return f"95 % interval {fmt.interval(lower, upper, sign=sign)}" if not fmt.is_missing(lower) else "no interval"


def _sees(data: ReportData, name: str) -> str:
    kinds = tables.sees(data, name)
    return f"sees {' + '.join(kinds)}" if kinds else "sees nothing"


def _events(data: ReportData) -> Fact:
    table = tables.splits(data)
    least = f"; fewest in a test fold: {int(table['test_events'].min())}" if len(table) else ""
    times = "" if data.repeats == 1 else f" x {data.repeats} repeats"
    return Fact(
        "Events",
        fmt.count(data.n_events),
        f"of {fmt.plural(data.n_patients, 'patient')}; {data.folds} folds{times}{least}",
    )


def _slides(data: ReportData) -> list[Fact]:
    """Slides with features, and what is missing or assumed; nothing for a run without slides."""
    counts = slide_tables.count_slides(data)
    if not counts.found:
        return []
    details = [f"{counts.n_lost} gave none" if counts.n_lost else "every slide"]
    if assumed := sum(counts.assumed.values()):
        details.append(f"{fmt.count(assumed)} with an assumed resolution")
    if counts.failed:
        details.append(f"{fmt.count(counts.failed)} of {fmt.count(counts.planned)} tiles could not be read")
    elif "n_tiles_failed" in data.audit:
        details.append("no tile failed")
    return [Fact("Slides with features", f"{fmt.count(counts.found - counts.n_lost)}", "; ".join(details))]


def _control(data: ReportData) -> Fact | None:
    rows = [n for n in data.names if data.model_of(n) == "random"]
    if not rows:
        return None
    c = _c(data, rows[0])
    if fmt.is_missing(c.get("value")):
        return None
    fine = fmt.excludes(c["lower"], c["upper"], 0.5) == 0
    return Fact(
        "Control: random score",
        fmt.number(c["value"]),
        f"{_ci(c['lower'], c['upper'])}; {'contains 0.5, as it should' if fine else 'does NOT contain 0.5'}",
    )
