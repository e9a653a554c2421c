"""The only place that knows file names of a results tree. The Snakefile and the command line both ask it.

Standard library only. A wildcard such as ``"{slide}"`` may stand for any name, which gives Snakemake its patterns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PANELS = ("rna", "mut", "cnv", "expression")
EVALUATION_TABLES = ("oof", "metrics", "summary", "km", "risk_groups", "comparisons", "branches")
REPORT_TABLES = (
    "model_table",
    "metrics_per_fold",
    "baseline",
    "flow",
    "splits",
    "slides",
    "mpp_audit",
    "risk_groups",
    "comparisons",
    "run_times",
    "expert_use",
    "gene_groups",
    "sources",
    "sites",
    "published_protocol",
    "branches",
)
#: Files that others published (TCGA-CDR, gene sets); all runs of a folder share them.
PUBLISHED = Path("resources/published")
GDC_TABLES = ("manifest.tsv", "sample_sheet.tsv", "clinical.tsv", "query.json")
RUN_FILES = ("predictions.parquet", "history.parquet", "diagnostics.parquet", "model.safetensors", "run.json")


@dataclass(frozen=True)
class TileFiles:
    """What the tile step writes for one slide."""

    h5: Path
    qc: Path
    geojson: Path
    thumbnail: Path


class Paths:
    """Names below ``<output>/<name>/`` for one checked configuration."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.root = Path(config["output"]) / config["name"]

    # -- the simulated cohort, and the record of the configuration ------------------------------------------
    @property
    def simulated(self) -> Path:
        return self.root / "simulated"

    @property
    def oracle(self) -> Path:
        return self.simulated / "oracle.json"

    def config(self, content_hash: str) -> Path:
        return self.root / "config" / f"{content_hash}.json"

    def log(self, step: str, *wildcards: str) -> Path:
        return self.root / "logs" / step / ("_".join(wildcards) + ".log" if wildcards else f"{step}.log")

    # -- what comes from the GDC ----------------------------------------------------------------------------
    @property
    def gdc(self) -> Path:
        return self.root / "gdc"

    @property
    def gdc_tables(self) -> list[Path]:
        return [self.gdc / name for name in GDC_TABLES]

    def gdc_list(self, content_hash: str) -> Path:
        """Copy of the GDC's answer to one question, which stays when another one fails."""
        return self.gdc / "lists" / content_hash

    @property
    def gdc_query(self) -> Path:
        return self.gdc / "query.json"

    @property
    def gdc_manifest(self) -> Path:
        return self.gdc / "manifest.tsv"

    @property
    def gdc_sheet(self) -> Path:
        return self.gdc / "sample_sheet.tsv"

    @property
    def passing_slides(self) -> Path:
        """Slides on their way, with ``gdc.delete_slides``; everything in it may be deleted."""
        return self.gdc / "slides"

    def fetched(self, part: str) -> Path:
        """List of the files of a panel (``rna``), or of a job of slides (``slides_1``), that were fetched."""
        return self.gdc / "fetched" / f"{part}.json"

    # -- cohort and molecular tables ------------------------------------------------------------------------
    @property
    def patients(self) -> Path:
        return self.root / "cohort" / "patients.parquet"

    @property
    def slides(self) -> Path:
        return self.root / "cohort" / "slides.parquet"

    @property
    def cohort_flow(self) -> Path:
        return self.root / "cohort" / "flow.json"

    @property
    def panels(self) -> dict[str, Path]:
        """Panels that the configuration asks for, by name."""
        asked = self._config["molecular"]
        return {panel: self.root / "genomics" / f"{panel}.parquet" for panel in PANELS if panel in asked}

    @property
    def encoded(self) -> Path:
        """Vectors that a frozen encoder of RNA makes of the patients."""
        return self.root / "genomics" / "encoded.parquet"

    @property
    def encoded_facts(self) -> Path:
        return self.root / "genomics" / "encoded.json"

    @property
    def groups(self) -> Path | None:
        return self.root / "genomics" / "groups.json" if "groups" in self._config["molecular"] else None

    # -- slides and features --------------------------------------------------------------------------------
    def tiles(self, slide: str) -> TileFiles:
        from morphome.features.registry import tiling_key

        folder = self.root / "tiles" / tiling_key(self._config["tiling"])
        return TileFiles(*(folder / f"{slide}{end}" for end in (".h5", ".json", ".geojson", ".jpg")))

    def tile_job(self, job: int | str) -> Path:
        return self.tiles("").h5.parent / "jobs" / f"{job}.json"

    @property
    def weights(self) -> Path:
        """That the weights of the encoder were fetched."""
        return self.feature_folder / "weights.json"

    @property
    def feature_folder(self) -> Path:
        from morphome.features.registry import fingerprint

        if self._config["features"]["source"] == "external":
            return self.root / "features" / "external"
        return self.root / "features" / fingerprint(self._config["features"], self._config["tiling"])

    def features(self, slide: str) -> Path:
        return self.feature_folder / f"{slide}.h5"

    def timing(self, slide: str) -> Path:
        return self.feature_folder / f"{slide}.json"

    def encode_job(self, job: int | str) -> Path:
        return self.feature_folder / "jobs" / f"{job}.json"

    @property
    def index(self) -> Path:
        return self.feature_folder / "index.parquet"

    @property
    def audit(self) -> Path:
        return self.feature_folder / "audit.parquet"

    # -- analysis -------------------------------------------------------------------------------------------
    @property
    def analysis(self) -> Path:
        return self.root / "analysis" / "patients.parquet"

    @property
    def analysis_flow(self) -> Path:
        return self.root / "analysis" / "flow.json"

    @property
    def splits(self) -> Path:
        return self.root / "splits" / f"{self._config['splits']['scheme']}.parquet"

    @property
    def split_facts(self) -> Path:
        return self.splits.with_suffix(".json")

    def run(self, model: str, repeat: int | str, fold: int | str) -> Path:
        return self.root / "runs" / model / f"r{repeat}" / f"f{fold}"

    def run_files(self, model: str, repeat: int | str, fold: int | str) -> list[Path]:
        return [self.run(model, repeat, fold) / name for name in RUN_FILES]

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    @property
    def evaluation_tables(self) -> list[Path]:
        return [self.evaluation / f"{name}.parquet" for name in EVALUATION_TABLES]

    @property
    def report(self) -> Path:
        return self.root / "report" / "report.html"

    @property
    def report_tables(self) -> list[Path]:
        return [self.report.parent / "tables" / f"{name}.csv" for name in REPORT_TABLES]
