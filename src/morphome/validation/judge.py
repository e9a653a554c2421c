"""What a model must reach on planted data, by scenario and class of model, and whether it did.

The bounds are stated for cohorts of 400 patients and three data seeds. With fewer patients a lower bound falls by
two standard errors of the difference, and the band around one half grows like 1/sqrt(n); with more they stay.
References (five folds, 400 patients, half of them censored): a ridge Cox model on mean patches reaches .76 (SD .02)
in S3, one on genes .73 (.02), one on both .86 (.015); the true hazard .890 in S3 and .774 in X1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
import pandas as pd

from morphome.models.catalog import ModelInfo
from morphome.validation.planted import oracle_c

Kind = Literal["fusion", "late fusion", "slides", "genes", "clinical", "control"]
Verdict = Literal["pass", "fail", "not applicable"]

#: Parts of a fusion model's input that are genes.
GENES = frozenset({"omic_groups", "omic_all", "rna", "cnv", "mut", "panels"})
#: Fusion of two scores or of additive parts: no interaction can be asked of these.
LATE_FUSION = frozenset({"late_fusion"})
#: Patients and data seeds that the bounds are stated for.
PATIENTS, SEEDS = 400, 3
#: Least C in S3. Both modalities together must pass what either could reach alone (.78 for a perfect reader).
#: Those of one modality stand about 2.5 standard deviations below the ridge models; stage is a weak hint at both.
S3_LEAST: dict[Kind, float] = {"fusion": 0.80, "late fusion": 0.80, "slides": 0.70, "genes": 0.66, "clinical": 0.55}
S3_GAIN = 0.05
X1_LEAST = 0.65
#: Half the width of the band around one half; three standard deviations of one cohort's cross-validated null C.
NULL_BAND = 0.09
MIXED_EXCESS = 0.04
S4_DROP, S4_BAND = 0.05, 0.15
#: Cohorts in which something can be known, and the scenario whose true hazard limits it.
ORACLES = {"S3": "S3", "X1": "X1", "X1_easy": "X1", "S4": "S4"}
#: Why a model without slides is not fitted there.
NOT_TOLD = {"S4": "reads no slides, where the sites show", "mixed": "reads no slides, which are all that changes"}
COLUMNS = ("model", "kind", "scenario", "check", "value", "bound", "verdict", "reason")


def kind_of(row: ModelInfo) -> Kind:
    """Class of a model by what it reads at prediction; models of clinical columns are "clinical" whatever else.

    Late fusion is a class of its own, with clinical columns or without.
    """
    if not row.needs:
        return "control"
    if row.key in LATE_FUSION:
        return "late fusion"
    if "clinical" in row.needs:
        return "clinical"
    slides, genes = "path" in row.needs, bool(row.needs & GENES)
    if slides and genes:
        return "fusion"
    return "slides" if slides else "genes"


def judge(scores: pd.DataFrame, n: int, seeds: int, folds: int) -> pd.DataFrame:
    """Hold scores against the bounds.

    Args:
        scores: one row per model, cohort, scheme of folds and data seed: ``model, kind, cohort, scheme, seed, c,
            problem``, as :func:`morphome.validation.run.scores` gives them.
        n: patients of a cohort; seeds: cohorts per scenario; folds: of the cross-validation.

    Returns:
        One row per model and check, in the columns :data:`COLUMNS`: ``value`` and ``bound`` are NaN where there is
        none, ``verdict`` is "pass", "fail" or "not applicable", and ``reason`` says why for the last two.
    """
    rows: list[dict[str, object]] = []
    for model in dict.fromkeys(scores["model"]):
        mine = scores[scores["model"] == model]
        rows += _Judge(scores, model, mine["kind"].iloc[0], n, seeds, folds).rows()
    return pd.DataFrame(rows, columns=list(COLUMNS))


def slack(n: int, seeds: int) -> float:
    """How far lower bounds fall with fewer patients than 400 in three cohorts.

    Two standard errors more than those have; SE(C) = .42 / sqrt(n) for half of the patients with an event.
    """
    return max(0.0, 2 * 0.42 * (1 / math.sqrt(n * seeds) - 1 / math.sqrt(PATIENTS * SEEDS)))


def band(width: float, n: int) -> float:
    """Half the width of a band around one half, for cohorts of ``n`` patients."""
    return width * max(1.0, math.sqrt(PATIENTS / n))


def oracle_limit(scenario: str, n: int, seeds: int, folds: int) -> float:
    """97.5 % point of the true hazard's C, averaged over ``seeds`` cohorts."""
    draws = oracle_c(scenario, n, folds)
    rng = np.random.default_rng(20_260_102)
    return float(np.quantile(rng.choice(draws, size=(4000, seeds)).mean(axis=1), 0.975))


class _Judge:
    """The checks of one model."""

    def __init__(self, scores: pd.DataFrame, model: str, kind: Kind, n: int, seeds: int, folds: int) -> None:
        self.scores, self.model, self.kind = scores, model, kind
        self.n, self.seeds, self.folds = n, seeds, folds

    def rows(self) -> Iterable[dict[str, object]]:
        cohorts = dict.fromkeys(self.scores["cohort"])
        checks = {
            "S3": (self._s3, self._gain),
            "X1": (lambda: self._x1("X1"),),
            "X1_easy": (lambda: self._x1("X1_easy"),),
            "S0": (self._s0,),
            "mixed": (self._mixed,),
            "permuted": (self._permuted,),
            "S4": (self._site_drop, self._site_preserved),
        }
        fitted = set(self.scores.loc[self.scores["model"] == self.model, "cohort"])
        for cohort in cohorts:
            if cohort not in fitted:
                yield self._not(cohort, "every check", NOT_TOLD.get(cohort, "not fitted on this cohort"))
                continue
            for check in checks[cohort]:
                yield check()
            if cohort in ORACLES:
                yield self._oracle(cohort)

    # -- values ---------------------------------------------------------------------------------------------
    def _value(self, cohort: str, scheme: str = "random", model: str | None = None) -> tuple[float, str]:
        """Mean C over the data seeds, and the problem of a fit that failed."""
        found = self.scores[
            (self.scores["model"] == (model or self.model))
            & (self.scores["cohort"] == cohort)
            & (self.scores["scheme"] == scheme)
        ]
        problems = [text for text in found["problem"] if text]
        return (float(found["c"].mean()) if len(found) else math.nan), (problems[0] if problems else "")

    def _best(self, kinds: tuple[Kind, ...]) -> tuple[float, str]:
        """Highest C in S3 of the models of these kinds, and its model."""
        models = dict.fromkeys(self.scores.loc[self.scores["kind"].isin(kinds), "model"])
        values = {model: self._value("S3", model=model)[0] for model in models}
        values = {model: value for model, value in values.items() if not math.isnan(value)}
        best = max(values, key=values.__getitem__, default="")
        return (values[best] if best else math.nan), best

    # -- rows -----------------------------------------------------------------------------------------------
    def _row(
        self, scenario: str, check: str, value: float, bound: float, verdict: Verdict, reason: str = ""
    ) -> dict[str, object]:
        whole = (self.model, self.kind, scenario, check, value, bound, verdict, reason)
        return dict(zip(COLUMNS, whole, strict=True))

    def _not(self, scenario: str, check: str, reason: str, value: float = math.nan) -> dict[str, object]:
        return self._row(scenario, check, value, math.nan, "not applicable", reason)

    def _least(self, scenario: str, check: str, value: float, bound: float, problem: str) -> dict[str, object]:
        return self._compare(scenario, check, value, bound, value >= bound, f"below {bound:.3f}", problem)

    def _most(self, scenario: str, check: str, value: float, bound: float, problem: str) -> dict[str, object]:
        return self._compare(scenario, check, value, bound, value <= bound, f"above {bound:.3f}", problem)

    def _null(self, scenario: str, check: str, value: float, problem: str, width: float) -> dict[str, object]:
        width = band(width, self.n)
        why = f"further than {width:.3f} from one half"
        return self._compare(scenario, check, value, width, abs(value - 0.5) <= width, why, problem)

    def _compare(
        self, scenario: str, check: str, value: float, bound: float, passed: bool, why: str, problem: str
    ) -> dict[str, object]:
        if problem or math.isnan(value):
            return self._row(scenario, check, value, bound, "fail", problem or "there is no value")
        return self._row(scenario, check, value, bound, "pass" if passed else "fail", "" if passed else why)

    # -- checks ---------------------------------------------------------------------------------------------
    def _s3(self) -> dict[str, object]:
        value, problem = self._value("S3")
        if self.kind == "control":
            return self._null("S3", "C near one half", value, problem, NULL_BAND)
        return self._least("S3", "C at least", value, S3_LEAST[self.kind] - slack(self.n, self.seeds), problem)

    def _gain(self) -> dict[str, object]:
        check = "C above the best single modality by"
        if self.kind not in ("fusion", "late fusion"):
            return self._not("S3", check, "reads one modality" if self.kind != "clinical" else "reads no slides")
        best, name = self._best(("slides", "genes"))
        if not name:
            return self._not("S3", check, "no model of slides or genes alone was run")
        value, problem = self._value("S3")
        row = self._least("S3", check, value - best, S3_GAIN - slack(self.n, self.seeds), problem)
        row["reason"] = row["reason"] and f"{row['reason']} ({name} {best:.3f})"
        return row

    def _x1(self, cohort: str) -> dict[str, object]:
        value, problem = self._value(cohort)
        if self.kind == "fusion":
            return self._least(cohort, "C at least", value, X1_LEAST - slack(self.n, self.seeds), problem)
        if self.kind == "late fusion":
            return self._not(cohort, "C at least", problem or "late fusion adds scores; reported only", value)
        if self.kind == "clinical":
            reason = "a stage at either end makes equal signs of the latents likelier; reported only"
            return self._not(cohort, "C at least", problem or reason, value)
        return self._null(cohort, "C near one half", value, problem, NULL_BAND)

    def _s0(self) -> dict[str, object]:
        return self._null("S0", "C near one half", *self._value("S0"), NULL_BAND)

    def _permuted(self) -> dict[str, object]:
        return self._null("permuted", "C near one half", *self._value("permuted"), NULL_BAND)

    def _mixed(self) -> dict[str, object]:
        check, (value, problem) = "C at most that of genes alone plus", self._value("mixed")
        if self.kind == "slides":
            return self._null("mixed", "C near one half", value, problem, NULL_BAND)
        # Late fusion may read clinical columns, which stay right.
        best, name = self._best(("genes", "clinical") if self.kind == "late fusion" else ("genes",))
        if not name:
            return self._not("mixed", check, "no model of genes alone was run in S3", value)
        row = self._most("mixed", check, value - best, MIXED_EXCESS + slack(self.n, self.seeds), problem)
        row["reason"] = row["reason"] and f"{row['reason']} ({name} {best:.3f})"
        return row

    def _site_drop(self) -> dict[str, object]:
        check = "C of random folds above that of whole sites by"
        (random, one), (preserved, two) = self._value("S4"), self._value("S4", "site")
        return self._least("S4", check, random - preserved, S4_DROP - slack(self.n, self.seeds), one or two)

    def _site_preserved(self) -> dict[str, object]:
        check = "C of whole sites near one half"
        return self._null("S4", check, *self._value("S4", "site"), S4_BAND)

    def _oracle(self, cohort: str) -> dict[str, object]:
        check = "C at most that of the true hazard (97.5 % point)"
        value, problem = self._value(cohort)
        return self._most(cohort, check, value, oracle_limit(ORACLES[cohort], self.n, self.seeds, self.folds), problem)


def markdown(table: pd.DataFrame, n: int, seeds: int, folds: int) -> str:
    """The table as Markdown: one line per model with its values, then every check that failed."""
    columns = list(dict.fromkeys(zip(table["scenario"], table["check"], strict=True)))
    by = {(row.model, row.scenario, row.check): row for row in table.itertuples()}
    kinds = dict(zip(table["model"], table["kind"], strict=True))
    text = [
        "# Models on planted data",
        "",
        f"{n} patients, {seeds} data seeds, {folds} folds; Harrell's C over pairs within folds, mean over the seeds. "
        "A failed check is bold; a check that does not apply is in brackets or a dash.",
        "",
        "| model | class | " + " | ".join(f"{scenario}: {check}" for scenario, check in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for model in kinds:
        cells = [_cell(by.get((model, *column))) for column in columns]
        text.append(f"| {model} | {kinds[model]} | " + " | ".join(cells) + " |")
    counts = table["verdict"].value_counts()
    said = ", ".join(f"{counts.get(v, 0)} {v}" for v in ("pass", "fail", "not applicable"))
    text += ["", f"Checks: {said}.", ""]
    for row in table[table["verdict"] == "fail"].itertuples():
        value = "no value" if math.isnan(row.value) else f"{row.value:.3f}"
        text.append(f"- {row.model}, {row.scenario}, {row.check}: {value}; {row.reason}.")
    return "\n".join(text) + "\n"


def _cell(row: object) -> str:
    if row is None:
        return "–"
    value = "–" if math.isnan(row.value) else f"{row.value:.3f}"
    if row.verdict == "fail":
        return f"**{value}** (bound {row.bound:.3f})"
    return value if row.verdict == "pass" or value == "–" else f"({value})"
