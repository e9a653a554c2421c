"""What the report reads: paths in, tables out. Every stamp is checked and kept for the provenance section."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from morphome.files import file_sha256, parquet_meta, read_json, read_parquet


@dataclass(frozen=True)
class ReportInputs:
    """Files of one run.

    Attributes:
        cohort_flow, analysis_flow: ``morphome.flow``; patients: ``morphome.analysis``;
        audit: ``morphome.slide_audit``; splits: ``morphome.splits``; split_facts: ``morphome.split_facts``.
        evaluation: folder with oof, metrics, summary, km, risk_groups, comparisons and branches (parquet).
        runs: one folder per model x repeat x fold.
        config: the complete, checked configuration.
        thumbnails: ``(slide_id, jpg, qc json)``; empty for imported features, like ``timings``.
        groups, oracle: absent without gene groups, and for a cohort that was not simulated.
        cohort_slides, cohort_patients: ``morphome.slides`` and ``morphome.patients``; with them the sites of slides
            are known whose patients are not analysed.
        panels: molecular tables (``morphome.panel``) by panel.
        query: ``morphome.gdc_query``, what was asked of the GDC; absent for cohorts from elsewhere.
        encoder: ``morphome.encoder``, facts of a frozen encoder of RNA; absent without one.
    """

    cohort_flow: Path
    analysis_flow: Path
    patients: Path
    audit: Path
    splits: Path
    split_facts: Path
    evaluation: Path
    runs: Sequence[Path]
    config: Mapping[str, Any]
    thumbnails: Sequence[tuple[str, Path, Path]] = ()
    timings: Sequence[Path] = ()
    groups: Path | None = None
    oracle: Path | None = None
    cohort_slides: Path | None = None
    cohort_patients: Path | None = None
    panels: Mapping[str, Path] = field(default_factory=dict)
    query: Path | None = None
    encoder: Path | None = None


@dataclass
class Run:
    """One model on one fold. ``routing`` holds shares per expert, aggregated over patients (see below)."""

    name: str
    model: str
    repeat: int
    fold: int
    facts: dict[str, Any]
    history: pd.DataFrame
    routing: pd.DataFrame


def is_neural(run: Run) -> bool:
    """Trained by epochs: its history has losses."""
    return "train_loss" in run.history and bool(run.history["train_loss"].notna().any())


@dataclass
class Thumbnail:
    """A picture of one slide and the facts of its tiling."""

    slide_id: str
    jpg: Path
    qc: dict[str, Any]


@dataclass
class Optimistic:
    """Rows trained under the published protocol: their part of the summary, and their runs."""

    summary: pd.DataFrame
    runs: list[Run]


@dataclass
class ReportData:
    """Everything that the sections need, read once.

    Rows of the published protocol are in ``optimistic`` and nowhere else, so that no table, figure or verdict can mix
    them with honest ones. ``encoder`` says which encoder of RNA was asked for and which was used.

    ``places`` holds (patient, site) by slide id, "" where unknown; ``listed`` and ``everybody`` are the slides and
    patients of the cohort where their files were given; ``panels`` holds what every molecular table says of itself,
    with ``patients`` (ids) and ``n_genes``.
    """

    config: dict[str, Any]
    flow: list[dict[str, Any]]
    sources: list[Any]
    patients: pd.DataFrame
    audit: pd.DataFrame
    splits: pd.DataFrame
    facts: dict[str, Any]
    oof: pd.DataFrame
    metrics: pd.DataFrame
    summary: pd.DataFrame
    km: pd.DataFrame
    risk_groups: pd.DataFrame
    comparisons: pd.DataFrame
    branches: pd.DataFrame
    runs: list[Run]
    thumbnails: list[Thumbnail]
    timings: list[dict[str, Any]]
    groups: dict[str, Any] | None
    oracle: dict[str, Any] | None
    stamps: list[dict[str, Any]] = field(default_factory=list)
    places: dict[str, tuple[str, str]] = field(default_factory=dict)
    listed: pd.DataFrame | None = None
    everybody: pd.DataFrame | None = None
    panels: dict[str, dict[str, Any]] = field(default_factory=dict)
    query: dict[str, Any] | None = None
    optimistic: Optimistic | None = None
    encoder: dict[str, Any] | None = None

    @property
    def names(self) -> list[str]:
        """Rows of the model table in the order of the configuration, then any other."""
        known = list(dict.fromkeys(self.summary["name"]))
        asked = [name for name in self.config.get("models", {}) if name in known]
        return asked + [name for name in known if name not in asked]

    def model_of(self, name: str) -> str:
        """Registry key of a row."""
        found = self.summary.loc[self.summary["name"] == name, "model"]
        return str(found.iloc[0]) if len(found) else name

    def runs_of(self, name: str) -> list[Run]:
        """Runs of a row, by repeat and fold."""
        return sorted((r for r in self.runs if r.name == name), key=lambda r: (r.repeat, r.fold))

    def metric(self, name: str, metric: str) -> dict[str, Any]:
        """The summary's row of a metric; empty when it is not there."""
        rows = self.summary[(self.summary["name"] == name) & (self.summary["metric"] == metric)]
        return rows.iloc[0].to_dict() if len(rows) else {}

    @property
    def repeats(self) -> int:
        """How many times the cohort was partitioned."""
        return max(1, int(self.splits["repeat"].nunique()))

    @property
    def folds(self) -> int:
        """Outer folds of one repeat."""
        return int(self.splits["fold"].nunique())

    @property
    def n_patients(self) -> int:
        """Analysed patients."""
        return len(self.patients)

    @property
    def n_events(self) -> int:
        """Events among the analysed patients."""
        return int(self.patients["event"].sum())

    @property
    def external(self) -> bool:
        """The features were made elsewhere and imported."""
        return self.config.get("features", {}).get("source") == "external"

    @property
    def simulated(self) -> bool:
        """The outcomes were planted."""
        return self.oracle is not None or "simulate" in self.config

    @property
    def horizon(self) -> float | None:
        """Horizon in months, None when no horizon was possible."""
        value = self.facts.get("horizon_months")
        return None if value is None else float(value)


_EVALUATION = ("oof", "metrics", "summary", "km", "risk_groups", "comparisons", "branches")


def load_report(inputs: ReportInputs) -> ReportData:
    """Read and check everything.

    Raises:
        MorphomeError: a needed file is missing or of another format (names the file).
    """
    stamps: list[dict[str, Any]] = []

    def table(path: Path, format_name: str) -> pd.DataFrame:
        content = read_parquet(path, format_name)
        stamps.append({"file": _short(path), "sha256": file_sha256(path), **parquet_meta(path)["stamp"]})
        return content

    def text(path: Path, format_name: str) -> dict[str, Any]:
        content = read_json(path, format_name)
        stamps.append({"file": _short(path), "sha256": file_sha256(path), **content["stamp"]})
        return content

    def panel(path: Path) -> dict[str, Any]:
        """Facts of a molecular table; of its columns only the patients are read."""
        patients = read_parquet(path, "morphome.panel", columns=["patient_id"])["patient_id"].astype(str).tolist()
        facts = parquet_meta(path)
        stamps.append({"file": _short(path), "sha256": file_sha256(path), **facts.pop("stamp")})
        facts.pop("gene_ids", None)
        return {**facts, "patients": patients, "n_genes": len(pq.read_schema(path).names) - 1}

    cohort = text(inputs.cohort_flow, "morphome.flow")
    analysis = text(inputs.analysis_flow, "morphome.flow")
    tables = {name: table(Path(inputs.evaluation) / f"{name}.parquet", f"morphome.{name}") for name in _EVALUATION}
    patients = table(inputs.patients, "morphome.analysis")
    listed = table(inputs.cohort_slides, "morphome.slides") if inputs.cohort_slides else None
    everybody = table(inputs.cohort_patients, "morphome.patients") if inputs.cohort_patients else None
    runs = [_read_run(Path(folder)) for folder in inputs.runs]
    tables, runs, optimistic = _set_apart(tables, runs)
    return ReportData(
        config=dict(inputs.config),
        flow=_whole_flow(cohort.get("steps", []), analysis.get("steps", [])),
        sources=list(analysis.get("sources") or cohort.get("sources") or []),
        patients=patients,
        places=slide_places(patients, listed, everybody),
        listed=listed,
        everybody=everybody,
        panels={name: panel(Path(path)) for name, path in inputs.panels.items() if Path(path).exists()},
        query=text(inputs.query, "morphome.gdc_query") if inputs.query and Path(inputs.query).exists() else None,
        audit=table(inputs.audit, "morphome.slide_audit"),
        splits=table(inputs.splits, "morphome.splits"),
        facts=text(inputs.split_facts, "morphome.split_facts"),
        runs=runs,
        optimistic=optimistic,
        encoder=text(inputs.encoder, "morphome.encoder") if inputs.encoder else None,
        thumbnails=[
            Thumbnail(slide_id, Path(jpg), read_json(qc, "morphome.slide_qc"))
            for slide_id, jpg, qc in inputs.thumbnails
            if Path(qc).exists()
        ],
        timings=[read_json(path, "morphome.timing") for path in inputs.timings if Path(path).exists()],
        groups=text(inputs.groups, "morphome.groups") if inputs.groups and Path(inputs.groups).exists() else None,
        oracle=text(inputs.oracle, "morphome.oracle") if inputs.oracle and Path(inputs.oracle).exists() else None,
        stamps=stamps,
        **tables,
    )


#: Columns that name a row of the model table.
_NAMES = ("name", "name_a", "name_b")


def _set_apart(
    tables: dict[str, pd.DataFrame], runs: list[Run]
) -> tuple[dict[str, pd.DataFrame], list[Run], Optimistic | None]:
    """The evaluation and the runs without the rows of the published protocol, and these rows."""
    names = {run.name for run in runs if (run.facts.get("training") or {}).get("protocol") == "published"}
    if not names:
        return tables, runs, None
    apart = Optimistic(
        tables["summary"][tables["summary"]["name"].isin(names)], [run for run in runs if run.name in names]
    )
    honest = {}
    for name, table in tables.items():
        gone = table[[key for key in _NAMES if key in table]].isin(names).any(axis=1)
        honest[name] = table[~gone].reset_index(drop=True)
        said = table.attrs.get("warnings") or []
        told = [text for text in said if not any(str(text).startswith(f"'{row}' ") for row in names)]
        honest[name].attrs = {**table.attrs, "warnings": told}
    return honest, [run for run in runs if run.name not in names], apart


def slide_places(
    patients: pd.DataFrame, listed: pd.DataFrame | None = None, everybody: pd.DataFrame | None = None
) -> dict[str, tuple[str, str]]:
    """``(patient, site)`` by slide id.

    Args:
        patients: the analysis table (``patient_id, site, slide_ids``): its slides are those with features only.
        listed: all slides of the cohort (``slide_id, patient_id``), where they are known.
        everybody: all patients of the cohort (``patient_id, site``), where they are known.
    """
    people = [patients] if everybody is None else [everybody, patients]
    sites = {str(p): str(s) for t in people for p, s in zip(t["patient_id"], t["site"], strict=True) if pd.notna(s)}
    pairs = [] if listed is None else list(zip(listed["slide_id"], listed["patient_id"], strict=True))
    if "slide_ids" in patients:
        rows = zip(patients["patient_id"], patients["slide_ids"], strict=True)
        pairs += [(slide, patient) for patient, ids in rows if ids is not None for slide in ids]
    return {str(slide): (str(patient), sites.get(str(patient), "")) for slide, patient in pairs}


def _whole_flow(cohort: list[dict[str, Any]], analysis: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps of both files in order; those that the second repeats are not shown twice."""
    seen = {json.dumps(step, sort_keys=True) for step in cohort}
    return [*cohort, *(step for step in analysis if json.dumps(step, sort_keys=True) not in seen)]


def _read_run(folder: Path) -> Run:
    facts = read_json(folder / "run.json", "morphome.run")
    history = read_parquet(folder / "history.parquet", "morphome.history")
    rows = read_parquet(folder / "diagnostics.parquet", "morphome.diagnostics")
    return Run(
        name=facts["name"],
        model=facts["model"],
        repeat=int(facts["repeat"]),
        fold=int(facts["fold"]),
        facts=facts,
        history=history,
        routing=routing_shares(rows, history, rows.attrs.get("experts", ())),
    )


def routing_shares(rows: pd.DataFrame, history: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Share of patients that each expert got, and the mean entropy of the gate; ``names`` are the experts by index.

    Returns:
        One row per epoch, layer, role and expert: ``epoch, layer, role, expert, name, n, share, probability``
        (mean gate probability), ``entropy`` (nats, mean over patients), ``chosen`` (epoch of the predictions).
        Kept aggregated because the patients' rows of all runs together are many.
    """
    columns = ["epoch", "layer", "role", "expert", "name", "n", "share", "probability", "entropy", "chosen"]
    if rows.empty:
        return pd.DataFrame(columns=columns)
    # Files of the first days do not name the experts.
    names = names or [f"expert {i}" for i in range(sum(c.startswith("p") and c[1:].isdigit() for c in rows.columns))]
    chosen = set(history.loc[history["chosen"].astype(bool), "epoch"]) if "chosen" in history else set()
    found = []
    for (epoch, layer, role), part in rows.groupby(["epoch", "layer", "role"], sort=True):
        for expert in range(len(names)):
            probability = part[f"p{expert}"].mean() if f"p{expert}" in part else float("nan")
            share = float((part["expert"] == expert).mean())
            found.append(
                [
                    epoch,
                    layer,
                    role,
                    expert,
                    names[expert],
                    len(part),
                    share,
                    probability,
                    part["entropy"].mean(),
                    epoch in chosen,
                ]
            )
    return pd.DataFrame(found, columns=columns)


def _short(path: Path) -> str:
    """The last three parts of a path: enough to find the file, nothing about the machine."""
    return "/".join(Path(path).parts[-3:])
