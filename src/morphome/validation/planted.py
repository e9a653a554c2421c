"""Planted cohorts at feature level: bags, genes and clinical columns drawn from two known latents.

The outcome is that of :mod:`morphome.cohort.outcome_model`. z1 sets the share of aggressive patches of a bag, z2 the
expression of twenty genes in two of six groups, and the stage hints at their sum. Scenarios: S3 (both latents add
up), X1 (only whether their signs agree matters, so one modality alone knows nothing), S0 (nothing matters), S4 (only
the hospital matters, and its stain shows in the slides). ``mixed`` gives every patient the bags of another one,
``permuted`` the outcome of another one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from morphome.cohort.outcome_model import (
    CENSOR_FROM_MONTHS,
    LATENT_CORRELATION,
    NU,
    SCALE_MONTHS,
    Outcomes,
    draw_outcomes,
    harrell_c,
)
from morphome.cohort.values import DAYS_PER_MONTH
from morphome.errors import MorphomeError
from morphome.features.store import INDEX_FORMAT, index_table
from morphome.files import read_json, stamp, write_json, write_parquet
from morphome.splits import make_splits

#: Share of aggressive patches: expit(intercept + slope * z1), as in the cohort of images.
SHARE_INTERCEPT, SHARE_SLOPE = -1.2, 1.2
#: Dimensions of a patch that tell each of the three kinds.
DIMS_PER_KIND = 4
#: A gene that is loaded is GENE_LOADING * z2 + N(0, 1).
GENE_LOADING = 0.9
GROUPS = ("tumour_suppressors", "oncogenes", "kinases", "differentiation", "transcription_factors", "cytokines")
SCENARIOS = ("S3", "X1", "S0", "S4")
#: What a scenario may be changed into; ``none`` leaves it as it is.
TWISTS = ("none", "mixed", "permuted")
SITES, SITE_SD, SITE_CENSORING_MONTHS = 12, 0.8, 60.0
#: Standard deviation of a hospital's shift of each dimension: half of a patch's noise.
STAIN_SD = 0.5
FILE_FORMAT = "morphome.planted"
_FINGERPRINT = "0123456789ab"


@dataclass(frozen=True)
class Design:
    """What a planted cohort is made of.

    Attributes:
        scenario: one of :data:`SCENARIOS`; twist: one of :data:`TWISTS`.
        n: patients; seed: other seeds give other patients of the same population.
        dim: width of a patch; bag: fewest and most patches of a patient.
        genes: expression columns, in six groups of equal size.
        loaded: (groups, genes of each): those that carry z2.
        other: columns of mutations, and as many of copy number; they carry nothing.
        shift: how far the dimensions of a patch's kind are shifted, in standard deviations of the noise.
        censoring: share of censored patients (S4 has its own censoring).
    """

    scenario: str = "S3"
    twist: str = "none"
    n: int = 400
    seed: int = 0
    dim: int = 32
    bag: tuple[int, int] = (64, 100)
    genes: int = 120
    loaded: tuple[int, int] = (2, 10)
    other: int = 12
    shift: float = 2.0
    censoring: float = 0.5

    def __post_init__(self) -> None:
        for value, known, name in ((self.scenario, SCENARIOS, "scenario"), (self.twist, TWISTS, "twist")):
            if value not in known:
                raise MorphomeError(f"{name} '{value}' is not known", f"choose one of {', '.join(known)}")
        genes = len(GROUPS) * self.loaded[1]
        if self.n < 20 or self.dim < 3 * DIMS_PER_KIND or self.genes < genes:
            raise MorphomeError(
                f"a planted cohort of {self.n} patients, {self.dim} dimensions and {self.genes} genes is too small",
                f"at least 20 patients, {3 * DIMS_PER_KIND} dimensions, {genes} genes",
            )


@dataclass(frozen=True)
class PlantedCohort:
    """Tables and bags of a planted cohort, joined by ``patient_id`` and ``slide_id``.

    Attributes:
        patients: columns of ``morphome.analysis``.
        truth: ``patient_id, z1, z2, eta`` of what decided the outcome of that row (also after a twist).
        panels: rna, mut, cnv: ``patient_id`` and one column a gene.
        bags: (N, dim) float16 by slide id.
        groups: members of each gene group.
    """

    design: Design
    patients: pd.DataFrame
    truth: pd.DataFrame
    panels: dict[str, pd.DataFrame]
    bags: dict[str, np.ndarray]
    groups: dict[str, list[dict[str, str]]]

    def folds(self, scheme: str, folds: int) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Splits ("random" or "site") and facts about them by :func:`morphome.splits.make_splits`."""
        settings = {
            "scheme": scheme,
            "folds": folds,
            "repeats": 1,
            "inner_fraction": 0.2,
            "min_events_per_test_fold": 2,
            "seed": self.design.seed,
        }
        return make_splits(self.patients, settings, "auto")

    def write(self, folder: Path, schemes: Sequence[str] = ("random",), folds: int = 5) -> PlantedFiles:
        """Write the files that the train step reads, and the truth; ``done.json`` comes last.

        Args:
            schemes: of folds; each becomes ``splits-<scheme>.parquet`` and ``facts-<scheme>.json``.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = PlantedFiles(folder)
        settings = {**asdict(self.design), "schemes": list(schemes), "folds": folds}
        write_parquet(self.patients, files.patients, "morphome.analysis", settings)
        write_parquet(self.truth, files.truth, "morphome.planted_truth", settings)
        self._write_bags(files, settings)
        for panel, table in self.panels.items():
            write_parquet(table, files.panels[panel], "morphome.panel", settings, {"panel": panel})
        write_json({"groups": self.groups}, files.groups, "morphome.groups", settings)
        for scheme in schemes:
            splits, facts = self.folds(scheme, folds)
            write_parquet(splits, files.splits(scheme), "morphome.splits", settings, {"scheme": scheme})
            write_json(facts, files.split_facts(scheme), "morphome.split_facts", settings)
        write_json({}, files.done, FILE_FORMAT, settings)
        return files

    def _write_bags(self, files: PlantedFiles, settings: Mapping[str, Any]) -> None:
        rows = []
        for slide, features in self.bags.items():
            path = files.folder / f"{slide}.h5"
            grid = np.arange(len(features), dtype=np.int32)
            with h5py.File(path, "w") as handle:
                handle.attrs.update(stamp("morphome.tile-features", settings))
                handle.attrs["status"] = "ok"
                handle["features"] = features
                handle["coords"] = np.column_stack([grid % 10, grid // 10]).astype(np.int32) * 256
            rows.append(
                {
                    "slide_id": slide,
                    "path": str(path),
                    "layout": "h5",
                    "start": 0,
                    "stop": len(features),
                    "n_tiles": len(features),
                    "dim": features.shape[1],
                    "has_coords": True,
                    "encoder": "planted",
                    "fingerprint": _FINGERPRINT,
                    "content_key": slide,
                    "status": "ok",
                    "reason_code": "",
                    "reason": "",
                }
            )
        facts = {"fingerprint": _FINGERPRINT, "encoder": "planted", "dim": self.design.dim}
        write_parquet(index_table(rows), files.index, INDEX_FORMAT, settings, facts)


@dataclass(frozen=True)
class PlantedFiles:
    """Names of the files of one planted cohort."""

    folder: Path

    patients = property(lambda self: self.folder / "patients.parquet")
    truth = property(lambda self: self.folder / "truth.parquet")
    index = property(lambda self: self.folder / "index.parquet")
    groups = property(lambda self: self.folder / "groups.json")
    done = property(lambda self: self.folder / "done.json")
    panels = property(lambda self: {panel: self.folder / f"{panel}.parquet" for panel in ("rna", "mut", "cnv")})

    def splits(self, scheme: str) -> Path:
        """Splits of a scheme."""
        return self.folder / f"splits-{scheme}.parquet"

    def split_facts(self, scheme: str) -> Path:
        """Facts about the splits of a scheme."""
        return self.folder / f"facts-{scheme}.json"

    def complete(self, design: Design, schemes: Sequence[str], folds: int) -> bool:
        """Whether all was written, with these settings and this version."""
        if not self.done.exists():
            return False
        settings = {**asdict(design), "schemes": list(schemes), "folds": folds}
        try:
            read_json(self.done, FILE_FORMAT, settings)
        except MorphomeError:
            return False
        return True


def plant(design: Design) -> PlantedCohort:
    """Draw a planted cohort; equal designs give equal cohorts, whatever their twist changes afterwards."""
    outcomes, sites = _outcomes(design.n, design)
    rng = np.random.default_rng([design.seed, 2])
    stain = np.zeros((SITES, design.dim))
    if design.scenario == "S4":
        stain = np.random.default_rng([design.seed, 3]).normal(0, STAIN_SD, size=stain.shape)
    ids = [f"TCGA-{site:02d}-{i:04d}" for i, site in enumerate(sites)]
    bags, slides = {}, []
    for i, patient in enumerate(ids):
        bag = _bag(outcomes.z1[i], design, rng) + stain[sites[i]]
        # Every fifth patient has two slides of the same tumour.
        parts = np.array_split(bag, 2) if i % 5 == 0 else [bag]
        names = [f"{patient}-DX{k + 1}" for k in range(len(parts))]
        bags.update(zip(names, (part.astype(np.float16) for part in parts), strict=True))
        slides.append(names)
    patients = _clinical(ids, sites, outcomes, rng)
    patients["slide_ids"], patients["n_slides"] = slides, [len(names) for names in slides]
    panels = _panels(ids, outcomes.z2, design, rng)
    truth = pd.DataFrame({"patient_id": ids, "z1": outcomes.z1, "z2": outcomes.z2, "eta": outcomes.eta})
    cohort = PlantedCohort(design, patients, truth, panels, bags, _groups(design))
    return _twisted(cohort)


def _twisted(cohort: PlantedCohort) -> PlantedCohort:
    design, patients, truth = cohort.design, cohort.patients, cohort.truth
    if design.twist == "none":
        return cohort
    # One cycle through all patients: nobody keeps the own bags or outcome.
    order = np.random.default_rng([design.seed, 4]).permutation(design.n)
    other = np.empty(design.n, dtype=np.int64)
    other[order] = np.roll(order, 1)
    columns = ["slide_ids", "n_slides"] if design.twist == "mixed" else ["time_months", "event"]
    changed = patients.copy()
    for column in columns:
        changed[column] = patients[column].to_numpy()[other]
    if design.twist == "permuted":
        # The truth that made an outcome goes with it, so that the oracle's C stays what it was.
        truth = truth.assign(**{name: truth[name].to_numpy()[other] for name in ("z1", "z2", "eta")})
    return replace(cohort, patients=changed, truth=truth)


@functools.lru_cache(maxsize=32)
def oracle_c(scenario: str, n: int, folds: int, censoring: float = 0.5, draws: int = 400) -> np.ndarray:
    """Harrell's C of the true log hazard in simulated cohorts of ``n``, pairs within folds only; sorted.

    Args:
        folds: random parts of the cohort; draws: number of cohorts.

    Returns:
        (draws,) float64: the sampling distribution that no honest model's C should lie above.
    """
    rng = np.random.default_rng(20_260_101)
    if scenario == "S4":  # hospitals are drawn anew for every cohort
        pieces = [_outcomes(n, Design(scenario, n=n, seed=100_000 + i))[0] for i in range(draws)]
    else:  # one large draw: each call solves for the censoring time
        whole = draw_outcomes(n * draws, scenario, censoring, 100_000)
        names = whole.__dataclass_fields__
        pieces = [Outcomes(**{k: getattr(whole, k)[i * n : (i + 1) * n] for k in names}) for i in range(draws)]
    fold = np.arange(n) % folds
    values = [stratified_c(piece.days.astype(float), piece.event, piece.eta, rng.permutation(fold)) for piece in pieces]
    return np.sort(np.array(values))


def stratified_c(time: np.ndarray, event: np.ndarray, risk: np.ndarray, fold: np.ndarray) -> float:
    """Harrell's C over the pairs within folds, each pair counted once; NaN without a comparable pair.

    Risks of different folds come from different models and are not compared.
    """
    concordant = pairs = 0.0
    for k in np.unique(fold):
        at = fold == k
        before = time[at][:, None] < time[at][None, :]
        tied = (time[at][:, None] == time[at][None, :]) & (event[at][None, :] == 0)
        n = float(((event[at][:, None] == 1) & (before | tied)).sum())
        if n:
            concordant += harrell_c(time[at], event[at], risk[at]) * n
            pairs += n
    return concordant / pairs if pairs else float("nan")


def _outcomes(n: int, design: Design) -> tuple[Outcomes, np.ndarray]:
    """Outcomes and hospital numbers (n,); in S4 the hospital is all that matters."""
    rng = np.random.default_rng([design.seed, 5])
    sites = rng.permutation(np.arange(n) % SITES)
    if design.scenario != "S4":
        return draw_outcomes(n, design.scenario, design.censoring, design.seed), sites
    z1, other = rng.standard_normal((2, n))
    z2 = LATENT_CORRELATION * z1 + np.sqrt(1 - LATENT_CORRELATION**2) * other
    eta = (SITE_SD * rng.standard_normal(SITES))[sites]
    # The formula of the outcome model, with the scenario's own hazard and censoring.
    time = SCALE_MONTHS * (rng.exponential(size=n) * np.exp(-eta)) ** (1 / NU)
    censored = rng.uniform(CENSOR_FROM_MONTHS, SITE_CENSORING_MONTHS, size=n)
    days = np.maximum(1, np.rint(np.minimum(time, censored) * DAYS_PER_MONTH)).astype(np.int64)
    return Outcomes(z1, z2, eta, time, censored, days, (time <= censored).astype(np.int64)), sites


def _bag(z1: float, design: Design, rng: np.random.Generator) -> np.ndarray:
    """(N, dim) N(0, 1), shifted in the four dimensions of the patch's kind: aggressive, benign, stroma."""
    count = rng.integers(design.bag[0], design.bag[1], endpoint=True)
    share = 1 / (1 + np.exp(-(SHARE_INTERCEPT + SHARE_SLOPE * z1)))
    kind = np.where(rng.random(count) < share, 0, rng.integers(1, 3, size=count))
    bag = rng.standard_normal((count, design.dim))
    for k in range(3):
        bag[kind == k, k * DIMS_PER_KIND : (k + 1) * DIMS_PER_KIND] += design.shift
    return bag


def _clinical(ids: list[str], sites: np.ndarray, outcomes: Outcomes, rng: np.random.Generator) -> pd.DataFrame:
    """The analysis table without slides: stage = quartile cut of z1 + z2 + noise; age leans on z2 a little."""
    n = len(ids)
    stage = np.digitize(outcomes.z1 + outcomes.z2 + 1.5 * rng.standard_normal(n), [-1.4, 0.0, 1.4]) + 1.0
    stage[rng.random(n) < 0.03] = np.nan
    return pd.DataFrame(
        {
            "patient_id": ids,
            "site": [f"{site:02d}" for site in sites],
            "time_months": outcomes.days / DAYS_PER_MONTH,
            "event": outcomes.event.astype(np.int8),
            "endpoint": "OS",
            "age_years": 62 + 9 * rng.standard_normal(n) + 1.5 * outcomes.z2,
            "sex": np.where(rng.random(n) < 0.5, "female", "male"),
            "stage": stage,
            "grade": np.nan,
            "histology": None,
        }
    )


def _panels(ids: list[str], z2: np.ndarray, design: Design, rng: np.random.Generator) -> dict[str, pd.DataFrame]:
    """Expression (about 1.5 % not measured), mutations and copy number; the latter two carry nothing."""
    n, per_group = len(ids), design.genes // len(GROUPS)
    rna = rng.standard_normal((n, per_group * len(GROUPS)))
    for group in range(design.loaded[0]):
        rna[:, group * per_group : group * per_group + design.loaded[1]] += GENE_LOADING * z2[:, None]
    rna[rng.random(rna.shape) < 0.015] = np.nan
    mutated = (rng.random((n, design.other)) < 0.15).astype(float)
    tables = {"rna": rna, "mut": mutated, "cnv": np.rint(rng.standard_normal((n, design.other)))}
    frames = {}
    for panel, values in tables.items():
        frames[panel] = pd.DataFrame(values.astype(np.float32), columns=_genes(panel, values.shape[1]))
        frames[panel].insert(0, "patient_id", ids)
    return frames


def _groups(design: Design) -> dict[str, list[dict[str, str]]]:
    """Every gene in one group; mutations and copy number are dealt out among the groups."""
    per_group = design.genes // len(GROUPS)
    members: dict[str, list[dict[str, str]]] = {group: [] for group in GROUPS}
    for k, gene in enumerate(_genes("rna", per_group * len(GROUPS))):
        members[GROUPS[k // per_group]].append({"panel": "rna", "gene": gene})
    for panel in ("mut", "cnv"):
        for k, gene in enumerate(_genes(panel, design.other)):
            members[GROUPS[k % len(GROUPS)]].append({"panel": panel, "gene": gene})
    return members


def _genes(panel: str, count: int) -> list[str]:
    letter = {"rna": "G", "mut": "M", "cnv": "C"}[panel]
    return [f"{letter}{i:04d}" for i in range(count)]
