"""A copy of the checkout in which tests may change code, and a way to run Snakemake there as a user would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

SMALL = {
    "name": "small",
    "simulate": {"patients": 16, "sites": 4, "genes": 60, "tiles_min": 20, "tiles_max": 24, "seed": 3},
    "cohort": {
        "clinical": {"format": "gdc_clinical", "path": "{simulated}/clinical.tsv"},
        "require": ["wsi", "rna"],
        "min_events": 4,
    },
    "slides": {"sheet": "{simulated}/sample_sheet.tsv", "folder": "{simulated}/slides"},
    "molecular": {
        "sheet": "{simulated}/sample_sheet.tsv",
        "rna": {"format": "star_counts", "path": "{simulated}/rna"},
        "groups": {"path": "{simulated}/gene_groups.gmt"},
    },
    "splits": {"folds": 2, "min_events_per_test_fold": 1, "scheme": "random"},
    "training": {"epochs": 1, "accumulation": 4, "time_bins": 2},
    "models": {
        "clinical_cox": None,
        "abmil": {"dim": 8, "attention_dim": 4, "head_dim": 4},
        "mome": {"dim": 8, "heads": 2, "landmarks": 4},
    },
    "evaluation": {"horizon_months": 18, "bootstrap": 20},
}


class Checkout:
    """A copy of the tracked parts of the repository below a temporary folder."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.folder = folder
        for part in ("src", "workflow", "envs", "profiles", "resources"):
            shutil.copytree(
                repository / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        for part in ("Snakefile", "config.yaml"):
            shutil.copy(repository / part, folder / part)

    def configure(self, **changes: dict | None) -> Path:
        """Write the small run's configuration, with some sections replaced, or left out where they are None."""
        path = self.folder / "small.yaml"
        sections = {key: section for key, section in {**SMALL, **changes}.items() if section is not None}
        path.write_text(yaml.safe_dump(sections, sort_keys=False))
        return path

    def snakemake(self, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        """Run Snakemake in the copy with two cores; output is text, stderr joined to stdout."""
        return subprocess.run(
            [str(Path(sys.executable).parent / "snakemake"), "--cores", "2", "--nocolor", *arguments],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def jobs(self, *arguments: str) -> set[str]:
        """What a dry run would do: ``{"train mome 0 1", "report", ...}`` (rule and wildcards)."""
        done = self.snakemake("-n", "--configfile", "small.yaml", *arguments)
        assert done.returncode == 0, done.stdout
        # The rules' messages: "tile SLIDE", "train MODEL, repeat R, fold F", "report: what it does".
        said = re.findall(r"^Job \d+: (.*)$", done.stdout, re.MULTILINE)
        jobs = {re.sub(r", repeat (\d+), fold (\d+)$", r" \1 \2", text).split(":")[0] for text in said}
        return jobs - {"all", "default"}
