"""Commands that fetch: from the GDC, from where files were published, and the weights of the encoder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from morphome.cli_base import DEFAULT, Config, Run
from morphome.errors import MorphomeError
from morphome.files import settings_hash
from morphome.paths import PUBLISHED
from morphome.workflow import gdc_kinds, slide_jobs, slide_paths

Limit = Annotated[float, typer.Option("--mb-per-second", min=0, help="Megabytes per second at most; 0 is no limit.")]


def manifest(config: Config = DEFAULT) -> None:
    """Ask the GDC which slides and molecular files a cohort has, and write the list that the run keeps to."""
    from morphome.download.manifest import run_manifest

    run = Run(config)
    gdc, settings = _gdc(run, config), run.settings("manifest")
    earlier = sorted(run.paths.gdc_list("*").parent.glob("*"), key=lambda folder: folder.stat().st_mtime)
    try:
        run_manifest(settings=settings, gdc=gdc, kinds=gdc_kinds(run.config), out=run.paths.gdc)
    except MorphomeError as error:
        if not earlier:
            raise
        remedy = f"{error.remedy}; the list of before is in {earlier[-1]}, and gdc.pinned keeps to a copy of it"
        raise MorphomeError(error.problem, remedy) from None
    # Snakemake deletes the tables before it asks again, whether or not the GDC answers.
    kept = run.paths.gdc_list(settings_hash(settings))
    kept.mkdir(parents=True, exist_ok=True)
    for table in run.paths.gdc_tables:
        shutil.copyfile(table, kept / table.name)


def fetch(
    job: Annotated[int | None, typer.Option(help="Slides of a job (slides.per_job slides), from 1.")] = None,
    panel: Annotated[str | None, typer.Option(help="Molecular files: rna, mut or cnv.")] = None,
    mb_per_second: Limit = 0,
    config: Config = DEFAULT,
) -> None:
    """Fetch slides or molecular files of the manifest. Files that are there are passed over, broken ones resumed."""
    from morphome.download.fetch import run_fetch
    from morphome.download.listing import data_url, read_manifest
    from morphome.download.remote import RemoteFile

    run = Run(config)
    gdc = _gdc(run, config)
    if (job is None) == (panel is None):
        raise MorphomeError("fetch: give either --job or --panel", "--job 1, or --panel rna")
    run.made(run.paths.gdc_query, "morphome.gdc_query", "manifest")
    listed = read_manifest(run.paths.gdc_manifest)
    kinds = gdc_kinds(run.config)
    if panel is not None:
        panels = [kind for kind in kinds if kind != "slides"]
        if panel not in panels:
            raise MorphomeError(f"--panel {panel}: not taken from the GDC", f"one of {', '.join(panels) or 'none'}")
        places = {file.file_id: file.path(Path(gdc["folder"])) for file in listed if file.kind == panel}
    else:
        paths = slide_paths(run.config) if "slides" in kinds else {}
        jobs = slide_jobs(run.config, list(paths))
        if not 1 <= job <= len(jobs):
            raise MorphomeError(f"--job {job}: there are {len(jobs)} jobs", "give a number of these")
        by_name = {paths[slide].name: paths[slide] for slide in jobs[job - 1]}  # a slide's id is its file's name
        places = {f.file_id: by_name[f.name] for f in listed if f.kind == "slides" and f.name in by_name}
    files = [
        RemoteFile(
            url=data_url(gdc["api"], file.file_id),
            target=places[file.file_id],
            size=file.size,
            md5=file.md5,
            label=file.name,
        )
        for file in listed
        if file.file_id in places and not file.local_path
    ]
    run_fetch(
        files=files,
        out=run.paths.fetched(panel or f"slides_{job}"),
        settings=run.settings("fetch"),
        connections=gdc["connections"],
        mb_per_second=mb_per_second,
    )


def published(
    name: Annotated[str, typer.Argument(help="File name; without one, what there is.")] = "", config: Config = DEFAULT
) -> None:
    """Fetch a file that others published (TCGA-CDR, gene sets) and check it; without a name, list them."""
    from morphome.download.published import published_file, published_names, run_published

    if not name:
        for one in published_names():
            file = published_file(one)
            print(f"{one}: {file.what}. Licence: {file.licence}. Cite: {file.cite}.")
        return
    run_published(name=name, out=PUBLISHED / name, **_mirror(config))


def weights(config: Config = DEFAULT) -> None:
    """Fetch the weights of the encoder of a run, where they are public and their checksum is known."""
    from morphome.features.prefetch import run_weights

    run = Run(config)
    run_weights(settings=run.settings("weights"), features=run.config["features"], out=run.paths.weights)


def _gdc(run: Run, config: Path) -> dict:
    if "gdc" not in run.config:
        raise MorphomeError(f"{config}: there is no section 'gdc'", "add it, or skip this step for a local cohort")
    return run.config["gdc"]


def _mirror(config: Path) -> dict[str, str]:
    """Address of the GDC, where the configuration says it."""
    gdc = Run(config).config.get("gdc")
    return {"api": gdc["api"]} if gdc else {}
