"""Limitations of a run, written from its files: nothing here depends on somebody remembering to say it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from morphome.report import format as fmt
from morphome.report import slide_tables, tables, words
from morphome.report.inputs import ReportData, is_neural
from morphome.rna.registry import ENCODERS

#: Events per test fold below which results are hardly usable, and below which they are weak.
FEW_EVENTS_STOP, FEW_EVENTS_WARN = 10, 20
#: SE(C) is about this over the square root of the events, for C near 0.65.
SE_FACTOR = 0.30
#: Shares of slides without features, and of tiles that could not be read, above which the verdict says so.
MANY_LOST, MANY_FAILED_TILES = 0.05, 0.01
#: Share of the measured genes that an encoder of RNA knows, below which it is said.
FEW_MATCHED = 0.5


@dataclass
class Flag:
    """One limitation. ``level``: ``serious`` (shown in the verdict), ``caution`` or ``note``."""

    level: str
    text: str


def limitations(data: ReportData) -> list[Flag]:
    """Limitations that follow from the files, most serious first."""
    flags = [
        *_cohort_flags(data),
        *_split_flags(data),
        *_encoder_flags(data),
        *_model_flags(data),
        *_slide_flags(data),
        Flag(
            "note",
            "No external cohort: every estimate is internal cross-validation. Calibration curves, subgroups and "
            "decision thresholds are not part of this report.",
        ),
    ]
    order = {"serious": 0, "caution": 1, "note": 2}
    unique = {flag.text: flag for flag in flags}
    return sorted(unique.values(), key=lambda flag: order[flag.level])


def _cohort_flags(data: ReportData) -> list[Flag]:
    flags = []
    if data.simulated:
        flags.append(
            Flag(
                "serious",
                "Planted cohort, not patients: slides, genes and outcomes are simulated. Nothing here is "
                "a finding about a disease.",
            )
        )
    d = data.n_events
    if 0 < d < 100:
        se = SE_FACTOR / np.sqrt(d)
        flags.append(
            Flag(
                "serious" if d < 50 else "caution",
                f"Few events ({d}): the standard error of a C-index is about "
                f"{fmt.number(se, 2)}, so only differences much larger than that can be seen.",
            )
        )
    analysed = set(data.patients["patient_id"].astype(str))
    marking = [s for s in data.sources if isinstance(s, dict) and s.get("redacted")]
    redacted = sorted({str(i) for s in marking for i in s["redacted"]} & analysed)
    by = words.listed([f"the {s['role']} table" if s.get("role") else "a further table" for s in marking])
    if redacted:
        flags.append(
            Flag(
                "caution",
                f"{fmt.plural(len(redacted), 'analysed patient')} {'is' if len(redacted) == 1 else 'are'} marked as "
                f"redacted by {by} ({fmt.listing(redacted, 6)}); "
                "the check in the flow reads the clinical table only.",
            )
        )
    sites = data.patients["site"].value_counts()
    if len(sites) > 1 and sites.iloc[0] > 0.3 * data.n_patients:
        flags.append(
            Flag(
                "caution",
                f"Site imbalance: site {sites.index[0]} gave {fmt.share(int(sites.iloc[0]), data.n_patients)} "
                "of the patients.",
            )
        )
    if len(sites) == 1:
        flags.append(Flag("caution", "All patients come from one site (or the sites are unknown)."))
    for column in ("age_years", "sex", "stage", "grade"):
        if column in data.patients:
            gone = int(data.patients[column].isna().sum())
            if gone > 0.2 * data.n_patients:
                flags.append(
                    Flag("caution", f"{column} is missing for {fmt.share(gone, data.n_patients)} of the patients.")
                )
    return flags


def _split_flags(data: ReportData) -> list[Flag]:
    flags = []
    table = tables.splits(data)
    if len(table):
        least = int(table["test_events"].min())
        if least < FEW_EVENTS_STOP:
            flags.append(
                Flag(
                    "serious",
                    f"A test fold has only {fmt.plural(least, 'event')}; below {FEW_EVENTS_STOP} "
                    "the estimate of a fold is close to noise.",
                )
            )
        elif least < FEW_EVENTS_WARN:
            flags.append(
                Flag("caution", f"A test fold has only {fmt.plural(least, 'event')} (fewer than {FEW_EVENTS_WARN}).")
            )
        most = int(table["test_events"].max())
        if least and most > 2.5 * least:
            flags.append(
                Flag(
                    "caution",
                    f"Folds are uneven: {least} to {most} events per test fold, because whole sites are kept together."
                    if _scheme(data) == "site"
                    else f"Folds are uneven: {least} to {most} events per test fold.",
                )
            )
        shared = int(table["test_sites_also_in_training"].max())
        worst = table.loc[table["test_sites_also_in_training"].idxmax()]
        if shared and _scheme(data) == "site":
            flags.append(
                Flag(
                    "serious",
                    f"Up to {fmt.plural(shared, 'site')} of a test fold also lie in training although "
                    "the split should keep sites apart.",
                )
            )
        elif shared:
            flags.append(
                Flag(
                    "caution",
                    f"Folds share hospitals: up to {shared} of {fmt.plural(int(worst['test_sites']), 'site')} of a "
                    "test fold are also in training. Models that recognise the hospital are rewarded, slide models "
                    "most. Site-preserved folds (splits.scheme: site) avoid it.",
                )
            )
    if data.repeats == 1:
        flags.append(
            Flag(
                "serious",
                "Quick split: one partition of the cohort. Another partition would give other numbers.",
            )
        )
    else:
        flags.append(
            Flag(
                "note",
                "Intervals resample patients; they do not contain the variation of models between "
                "training sets, so they are somewhat too narrow.",
            )
        )
    if data.horizon is None and not any(str(text).startswith("horizon") for text in data.facts.get("warnings") or []):
        flags.append(
            Flag(
                "caution",
                f"No horizon: {data.facts.get('horizon_reason') or 'no reason given'}. Uno's C, AUC, "
                "IBS and IPA cannot be computed.",
            )
        )
    noted = [*(data.facts.get("warnings") or []), *(data.summary.attrs.get("warnings") or [])]
    # That a row is constant is said by _model_flags, more gravely.
    flags += [Flag("caution", words.sentence(text)) for text in noted if "the same risk in" not in str(text)]
    return flags


def _scheme(data: ReportData) -> str:
    return str(data.facts.get("scheme") or data.config.get("splits", {}).get("scheme") or "")


def _model_flags(data: ReportData) -> list[Flag]:
    flags = []
    models = {data.model_of(name) for name in data.names}
    if "clinical_cox" not in models:
        flags.append(Flag("serious", "No clinical Cox row: whether anything is added to clinical data is not known."))
    if "random" not in models:
        flags.append(Flag("caution", "No random-score row: the chain has no negative control in this run."))
    for name in data.names:
        c = data.metric(name, "harrell_c")
        side = fmt.excludes(c.get("lower"), c.get("upper"), 0.5)
        if data.model_of(name) == "random" and side:
            flags.append(
                Flag(
                    "serious",
                    f"Control out of range: the random score '{name}' has C "
                    f"{fmt.estimate(c['value'], c['lower'], c['upper'])}, which should contain 0.5.",
                )
            )
        elif side < 0:
            flags.append(
                Flag("caution", f"{name} ranks worse than chance: {fmt.estimate(c['value'], c['lower'], c['upper'])}.")
            )
        constant = len(tables.constant_folds(data, name))
        if constant:
            flags.append(
                Flag(
                    "serious",
                    f"{name} gave every patient the same risk in {constant} of "
                    f"{fmt.plural(data.repeats * data.folds, 'fold')}: it learned nothing, and its C there is 0.5 by "
                    "construction. It is left out of the verdict's comparison.",
                )
            )
        ceiling = (data.oracle or {}).get("oracle_c")
        if not fmt.is_missing(ceiling) and fmt.excludes(c.get("lower"), c.get("upper"), float(ceiling)) > 0:
            flags.append(Flag("serious", f"{name} lies above the oracle's C: look for a leak."))
    flags += _missing_values(data)
    flags += _fitted_on(data)
    for text, rows in _run_warnings(data).items():
        flags.append(Flag("note", f"{text} [{fmt.listing(rows, 3)}]"))
    return flags


_SAW = {
    "yes": "its pretraining saw TCGA, without outcomes",
    "depends": "some of its published weights were trained on TCGA, without outcomes",
    "unknown": "it is not known whether its pretraining saw TCGA",
}


def _encoder_flags(data: ReportData) -> list[Flag]:
    """Which encoder of RNA stands in for which, and what is known of the one that was used."""
    section = rna_encoder(data)
    if not section:
        return []
    asked, used = section["requested"], section["used"]
    title = ENCODERS[asked].title if asked in ENCODERS else asked
    why = re.sub(r"\.$", "", str(section.get("reason") or "no reason given"))
    if used is None:
        gone = section.get("left_out") or []
        rows = f"{words.listed(gone)} {'needs it and was' if len(gone) == 1 else 'need it and were'}"
        return [
            Flag("serious", f"RNA encoder: requested {title}, used none ({why}). {rows} left out of this run."),
        ]
    flags = []
    rows = [n for n in data.names if any("rna" in r.facts.get("needs", []) for r in data.runs_of(n))]
    if used != asked:
        of = f"What {words.listed(rows)} {'shows' if len(rows) == 1 else 'show'}" if rows else "What this run shows"
        flags.append(
            Flag(
                "serious",
                f"RNA encoder: requested {title}, used {used} in its place ({why}). {of} says nothing about {title}.",
            )
        )
    facts = data.encoder or {}
    title = str(facts.get("title") or used)
    saw = facts.get("pretraining_saw_tcga")
    if saw in _SAW:
        flags.append(Flag("caution", f"RNA encoder {title}: {_SAW[saw]}; it may know patients of TCGA."))
    if (facts.get("weights") or {}).get("grade") == "not known":
        flags.append(
            Flag("caution", f"RNA encoder {title}: the checksum of its weights is not one that morphome knows.")
        )
    rate = facts.get("match_rate")
    if rate is not None and rate < FEW_MATCHED:
        flags.append(Flag("caution", f"RNA encoder {title}: it knows only {100 * rate:.0f} % of the genes measured."))
    mlp = facts.get("mlp_a") or {}
    if mlp and mlp.get("requested") != mlp.get("used"):
        flags.append(
            Flag(
                "caution",
                f"MLP-A behind {title}: requested {mlp['requested']}, used {mlp['used']} ({mlp.get('reason')}).",
            )
        )
    flags += [Flag("note", f"RNA encoder {title}: {text}.") for text in facts.get("warnings") or []]
    return flags


def rna_encoder(data: ReportData) -> dict[str, Any]:
    """``requested``, ``used`` (None: rows left out), ``reason``, ``left_out``; empty where no row reads encoded RNA."""
    section = (data.config.get("molecular") or {}).get("encoder") or {}
    if "requested" not in section:
        return {}
    gone = list(section.get("left_out") or [])
    return {**section, "used": None if gone else section["name"], "left_out": gone}


def _fitted_on(data: ReportData) -> list[Flag]:
    """Linear rows see more patients than neural ones when these keep the inner part for choosing the epoch."""
    neural, linear = [], []
    for name in data.names:
        runs = data.runs_of(name)
        if data.model_of(name) == "random" or not runs:
            continue
        (neural if any(is_neural(r) for r in runs) else linear).append(name)
    sizes = [
        (int(r.facts["n_train"]), int(r.facts["n_inner"]))
        for name in neural
        for r in data.runs_of(name)
        if r.facts.get("n_train") and r.facts.get("n_inner")
    ]
    if not linear or not sizes:
        return []
    rules = {(r.facts.get("training") or {}).get("epoch_rule") for name in neural for r in data.runs_of(name)}
    use = "choosing the epoch" if "inner_best" in rules else "following the training"
    both, train, inner = (
        fmt.span(v) for v in ([t + i for t, i in sizes], [t for t, _ in sizes], [i for _, i in sizes])
    )
    return [
        Flag(
            "note",
            f"{words.listed(linear)} {'was' if len(linear) == 1 else 'were'} fitted on training and inner validation "
            f"patients together ({both}); {words.listed(neural)} on the training patients alone ({train}), because "
            f"the inner validation ({inner}) is kept for {use}.",
        )
    ]


_LABEL = {"harrell_c": "C", "uno_c": "Uno's C", "auc": "AUC", "ibs": "IBS", "ipa": "IPA"}


def _missing_values(data: ReportData) -> list[Flag]:
    """Metrics that could not be computed in some fold: which, of which models, why. Said once per reason."""
    gone = data.metrics[data.metrics["value"].isna()]
    if data.horizon is None:  # said above, with its reason
        gone = gone[gone["metric"] == "harrell_c"]
    runs = data.repeats * data.folds
    said: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}
    for (name, metric), part in gone.groupby(["name", "metric"], sort=False):
        why = tuple(words.reasons(part, data.horizon, repeats=data.repeats)) or ("no reason given",)
        names, metrics = said.setdefault((f"{len(part)} of {fmt.plural(runs, 'fold')}", *why), ([], []))
        names += [name] if name not in names else []
        metrics += [_LABEL.get(metric, str(metric))] if _LABEL.get(metric, str(metric)) not in metrics else []
    return [
        Flag(
            "caution",
            f"{words.listed(metrics)} of {words.listed(names)} could not be computed in {where}: {'; '.join(why)}. "
            "A mean over the other folds is not given.",
        )
        for (where, *why), (names, metrics) in said.items()
    ]


def _run_warnings(data: ReportData) -> dict[str, list[str]]:
    """Messages of the training runs; those that differ only in their numbers are one, with all the numbers."""
    kinds: dict[str, tuple[list[str], list[str]]] = {}
    for run in data.runs:
        for text in run.facts.get("warnings") or []:
            text = re.sub(r" \(repeat \d+, fold \d+\)", "", str(text))
            texts, rows = kinds.setdefault(words.shape(text), ([], []))
            texts.append(text)
            rows.append(f"{run.name}/r{run.repeat}/f{run.fold}")
    found = {words.merged(texts): rows for texts, rows in kinds.values()}
    # Long lists of one-off messages bury the rest; the run.json files have them all.
    kept = dict(sorted(found.items(), key=lambda item: -len(item[1]))[:12])
    if len(found) > 12:
        kept[f"{len(found) - 12} further messages of training runs (see their run.json)"] = ["all runs"]
    return kept


def _slide_flags(data: ReportData) -> list[Flag]:
    """Slides and tiles that are missing from the results, and resolutions that were assumed or look wrong."""
    flags = []
    counts = slide_tables.count_slides(data)
    if counts.n_lost:
        share = fmt.share(counts.n_lost, counts.found)
        flags.append(
            Flag(
                "serious" if counts.n_lost > MANY_LOST * counts.found else "caution",
                f"{share} of {fmt.plural(counts.found, 'slide')} gave no features: "
                f"{words.counted(counts.lost, words.CODES)}. They are listed under Slides.",
            )
        )
    for source, n in sorted(counts.assumed.items()):
        flags.append(
            Flag(
                "serious",
                f"The resolution of {fmt.plural(n, 'slide')} was not measured but assumed "
                f"{words.ASSUMED.get(source, source)}.",
            )
        )
    if counts.failed:
        share = counts.failed / max(1, counts.planned)
        flags.append(
            Flag(
                "serious" if share > MANY_FAILED_TILES else "caution",
                f"{fmt.plural(counts.failed, 'tile')} of {fmt.count(counts.planned)} ({100 * share:.2g} %) could not "
                "be read and are not among the features (listed under Slides).",
            )
        )
    if counts.flags["power_conflict"]:
        flags.append(
            Flag(
                "caution",
                f"In {fmt.plural(counts.flags['power_conflict'], 'slide')} the objective power contradicts the microns "
                "per pixel; the microns per pixel are used (listed under Slides).",
            )
        )
    if data.external:
        flags.append(
            Flag("caution", "Features were imported: tiling, microns per pixel and encoder cannot be checked here.")
        )
    return flags
