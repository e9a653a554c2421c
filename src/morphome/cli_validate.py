"""The command that shows on planted data what the models find, and what they must not find."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from morphome.errors import MorphomeError


def validate(
    out: Annotated[Path, typer.Argument(help="Folder of cohorts, fits and the table; a killed run goes on there.")],
    models: Annotated[
        list[str] | None, typer.Option("--model", help="Registry key, repeatable; all models by default.")
    ] = None,
    scenarios: Annotated[
        list[str] | None,
        typer.Option("--scenario", help="S3, X1, X1_easy, S0, mixed, permuted or S4, repeatable; all by default."),
    ] = None,
    n: Annotated[int, typer.Option(min=40, help="Patients of a planted cohort.")] = 400,
    seeds: Annotated[int, typer.Option(min=1, help="Cohorts of each scenario.")] = 3,
    folds: Annotated[int, typer.Option(min=2, help="Folds of the cross-validation.")] = 5,
    cores: Annotated[int, typer.Option(min=1, help="Fits side by side, one thread each.")] = 1,
    strict: Annotated[bool, typer.Option(help="Exit with code 1 when a check fails.")] = False,
) -> None:
    """Train models on planted cohorts whose truth is known, and hold what they reach against stated bounds."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are loaded
    from morphome.models.catalog import models as known
    from morphome.validation.run import COHORTS
    from morphome.validation.run import validate as run

    table = run(models or list(known()), scenarios or list(COHORTS), out, n, seeds, folds, cores)
    print((out / "validation.md").read_text(encoding="utf-8"))
    failed = int((table["verdict"] == "fail").sum())
    if strict and failed:
        raise MorphomeError(f"{failed} checks failed", f"see {out / 'validation.md'}")
