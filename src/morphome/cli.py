"""The command line: arguments in, one function call, exit code out. Every step of the workflow is one command."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from morphome import __version__, cli_download, cli_tools, cli_validate
from morphome.cli_base import DEFAULT, Config, Run, readable_errors
from morphome.errors import MorphomeError
from morphome.files import write_json
from morphome.models.catalog import row_needs
from morphome.steps import code_hash
from morphome.workflow import encodes_rna, run_folders, slide_jobs, slide_paths, slides_from_gdc

app = typer.Typer(
    name="morphome",
    help="Whole-slide images and molecular tables to survival models and one report.\n\n"
    "The steps stand in the order of the data. Snakemake runs them all; each also runs by hand with the same "
    "configuration file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)

Slides = Annotated[list[str] | None, typer.Argument(help="slide_id of each slide; all when none is given.")]
Job = Annotated[int | None, typer.Option(help="Number of a group of slides.per_job slides, from 1.")]
START, SLIDES, MODELS, RESULTS = "1 Cohort", "2 Slides and features", "3 Splits and models", "4 Results"
TOOLS = "5 Tools beside the steps"
for name in ("encoders", "features", "bench"):
    app.add_typer(getattr(cli_tools, name), name=name, rich_help_panel=TOOLS, no_args_is_help=True)


def step(panel: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command under a heading of ``morphome --help``."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        return app.command(rich_help_panel=panel)(readable_errors(function))

    return register


def _version(value: bool) -> None:
    if value:
        print(f"morphome {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@step(START)
def check(config: Config = DEFAULT) -> None:
    """Check a configuration and its tables, without touching a slide or writing a result."""
    from morphome.check import check_tables

    run = Run(config)
    for line in check_tables(run.config):
        print(line)
    print(f"{config}: fine. {len(run.config['models'])} models; the report will be {run.paths.report}")


@step(START)
def simulate(
    threads: Annotated[int, typer.Option(min=1, help="Processes that paint slides.")] = 1, config: Config = DEFAULT
) -> None:
    """Write the planted demo cohort: slides on disk and tables in the GDC's shapes."""
    from morphome.cohort.simulate import run_simulate

    run = Run(config)
    if "simulate" not in run.config:
        raise MorphomeError(f"{config}: there is no section 'simulate'", "add it, or skip this step for real data")
    run_simulate(settings=run.settings("simulate"), folder=run.paths.simulated, threads=threads)


for command in (cli_download.manifest, cli_download.fetch, cli_download.published):
    step(START)(command)


@step(START)
def cohort(config: Config = DEFAULT) -> None:
    """Patients, slides and end point; the flow of who was dropped and why."""
    from morphome.check import check_published_files
    from morphome.cohort.manifest import run_cohort

    run = Run(config)
    check_published_files(run.config)
    run_cohort(
        settings=run.settings("cohort"),
        on_demand=slides_from_gdc(run.config),
        patients_out=run.paths.patients,
        slides_out=run.paths.slides,
        flow_out=run.paths.cohort_flow,
    )


@step(START)
def genes(config: Config = DEFAULT) -> None:
    """Molecular tables per panel (one row per patient) and gene groups."""
    from morphome.check import check_published_files
    from morphome.genomics.panels import run_genes

    run = Run(config)
    check_published_files(run.config)
    run_genes(settings=run.settings("genes"), panels_out=run.paths.panels, groups_out=run.paths.groups)


@step(START)
def rna(config: Config = DEFAULT) -> None:
    """Vectors of RNA by a frozen encoder (scGPT, BulkRNABert, or a table of your own)."""
    from morphome.rna.step import run_encode_rna

    run = Run(config)
    run_encode_rna(
        settings=run.settings("rna"),
        expression=run.panels.get("expression"),
        groups=run.groups,
        out=run.paths.encoded,
        facts=run.paths.encoded_facts,
        cache=run.paths.encoded.with_name("mixed_cells.npz"),
    )


step(SLIDES)(cli_download.weights)


@step(SLIDES)
def tile(slides: Slides = None, job: Job = None, config: Config = DEFAULT) -> None:
    """Tissue mask and tile grid of slides at a true target mpp. Slides that are done and unchanged are passed over."""
    from morphome.slides.tile_job import TileJob, run_tiles

    run = Run(config)
    paths, chosen = _choose(run, slides, job)
    files = {slide: run.paths.tiles(slide) for slide in chosen}
    records = run_tiles(
        jobs=[
            TileJob(
                slide_path=paths[slide],
                slide_id=slide,
                settings=run.settings("tile", slide=slide),
                h5_out=files[slide].h5,
                qc_out=files[slide].qc,
                geojson_out=files[slide].geojson,
                thumbnail_out=files[slide].thumbnail,
            )
            for slide in chosen
        ],
        code=code_hash("tile"),
    )
    _say(records)
    if job is not None:
        _write_job(run, "tile", job, records)


@step(SLIDES)
def encode(
    slides: Slides = None,
    job: Job = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads: for reading tiles, and for the encoder.")] = 1,
    config: Config = DEFAULT,
) -> None:
    """Features of the tiles of slides, one HDF5 file a slide. Slides that are done and unchanged are passed over."""
    run = Run(config)
    paths, chosen = _choose(run, slides, job)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before numpy and torch are loaded
    from morphome.features.encode import EncodeJob, run_encode

    records = run_encode(
        jobs=[
            EncodeJob(
                slide_path=paths[slide],
                slide_id=slide,
                tiles_h5=run.made(run.paths.tiles(slide).h5, "morphome.tiles", "tile", slide=slide),
                settings=run.settings("encode", slide=slide),
                h5_out=run.paths.features(slide),
                timing_out=run.paths.timing(slide),
            )
            for slide in chosen
        ],
        features=run.config["features"],
        code=code_hash("encode"),
        threads=threads,
    )
    _say(records)
    if job is not None:
        _write_job(run, "encode", job, records)
        _delete_passing(run, job, [paths[slide] for slide in chosen])


def _choose(run: Run, slides: list[str] | None, job: int | None) -> tuple[dict[str, Path], list[str]]:
    """Files of all slides, and the slides that a command is for: those named, those of a job, or all."""
    paths = slide_paths(run.config)
    if job is not None:
        groups = slide_jobs(run.config, list(paths))
        if slides or not 1 <= job <= len(groups):
            raise MorphomeError(f"--job {job}: there are {len(groups)} jobs", "give a number of these, or slides")
        slides = groups[job - 1]
    chosen = slides or list(paths)
    if unknown := [slide for slide in chosen if slide not in paths]:
        raise MorphomeError(f"slide '{unknown[0]}': not in the slide sheet, or its file is gone", "correct the name")
    if gone := [slide for slide in chosen if not paths[slide].exists()]:
        fetched = run.paths.fetched(f"slides_{job or '*'}")
        raise MorphomeError(
            f"{paths[gone[0]]}: the slide is not there ({len(gone)} of {len(chosen)})",
            f"delete {fetched} and run Snakemake, which fetches them again; for a slide of gdc.have put it back, or "
            f"delete {run.paths.gdc_manifest}, so that it is looked for anew"
            if slides_from_gdc(run.config)
            else "put the file back, or take the slide out of the sheet",
        )
    return paths, chosen


def _say(records: list[dict[str, Any]]) -> None:
    """One line a slide; a bad slide is a result (the run goes on), not an error."""
    for record in records:
        said = "as before" if record["skipped"] else f"{record['n_tiles']} tiles"
        why = "" if record["status"] == "ok" else f": {record['status']}, {record['reason_code']}: {record['reason']}"
        print(f"{record['slide_id']}: {said}{why}")


def _write_job(run: Run, name: str, job: int, records: list[dict[str, Any]]) -> None:
    """The output of a job that Snakemake sees.

    The code stands in it too: Snakemake looks at the content of small files, and new code may give new values under
    old keys.
    """
    path = {"tile": run.paths.tile_job, "encode": run.paths.encode_job}[name](job)
    keys = {record["slide_id"]: record["content_key"] for record in records}
    content = {"job": job, "code": code_hash(name), "slides": keys}
    write_json(content, path, f"morphome.{name}_job", run.settings(name))


def _delete_passing(run: Run, job: int, slides: list[Path]) -> None:
    """Delete the slides of a job that were fetched to be deleted; they have a folder of the run to themselves.

    The list that says that they are there goes first: Snakemake, which deletes it too, may have been killed.
    """
    if slides_from_gdc(run.config) and run.config["gdc"]["delete_slides"]:
        run.paths.fetched(f"slides_{job}").unlink(missing_ok=True)
    for slide in slides:
        if slide.is_relative_to(run.paths.passing_slides):
            shutil.rmtree(slide.parent, ignore_errors=True)


@step(SLIDES)
def collect(config: Config = DEFAULT) -> None:
    """Index the features of all slides (or of an external source) and list the slides that failed."""
    run = Run(config)
    outputs = {"index_out": run.paths.index, "audit_out": run.paths.audit}
    if run.external:
        from morphome.features.external import run_import

        run_import(settings=run.settings("import"), slides=run.slides, **outputs)
        return
    from morphome.features.collect import run_collect

    ids = slide_paths(run.config)
    run_collect(
        settings=run.settings("collect"),
        feature_files=[run.made(run.paths.features(s), "morphome.tile-features", "encode", slide=s) for s in ids],
        qc_files=[run.made(run.paths.tiles(s).qc, "morphome.slide_qc", "tile", slide=s) for s in ids],
        **outputs,
    )


@step(MODELS)
def assemble(config: Config = DEFAULT) -> None:
    """Join patients, features and molecular tables by id: who is analysed."""
    from morphome.cohort.assemble import run_assemble

    run = Run(config)
    run_assemble(
        settings=run.settings("assemble"),
        patients=run.patients,
        slides=run.slides,
        flow=run.flow,
        index=run.index,
        panels=run.panels,
        patients_out=run.paths.analysis,
        flow_out=run.paths.analysis_flow,
    )


@step(MODELS)
def split(config: Config = DEFAULT) -> None:
    """Folds, inner validation and horizon: written once, read by every model."""
    from morphome.splits import run_split

    run = Run(config)
    run_split(
        settings=run.settings("split"),
        patients=run.analysis,
        splits_out=run.paths.splits,
        facts_out=run.paths.split_facts,
    )


@step(MODELS)
def train(
    model: Annotated[str, typer.Option(help="Name of a row of the section 'models'.")],
    repeat: Annotated[int, typer.Option(help="Repeat, from 0.")] = 0,
    fold: Annotated[int, typer.Option(help="Outer test fold, from 0.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads of this job.")] = 1,
    config: Config = DEFAULT,
) -> None:
    """Fit one model for one repeat and fold; predict its test fold."""
    run = Run(config)
    if model not in run.config["models"]:
        raise MorphomeError(f"models.{model}: no such row", f"one of {', '.join(run.config['models'])}")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before numpy and torch are loaded
    from morphome.training.run import run_train

    run_train(
        settings=run.settings("train", model=model),
        patients=run.analysis,
        index=run.index,
        panels={**run.panels, **(run.encoded if "rna" in row_needs(run.config["models"][model]) else {})},
        groups=run.groups,
        splits=run.splits,
        split_facts=run.split_facts,
        name=model,
        repeat=repeat,
        fold=fold,
        out=run.paths.run(model, repeat, fold),
        threads=threads,
    )


@step(RESULTS)
def evaluate(config: Config = DEFAULT) -> None:
    """Metrics with intervals, risk groups and paired comparisons from all out-of-fold predictions."""
    from morphome.evaluation.evaluate import run_evaluate

    run = Run(config)
    run_evaluate(
        settings=run.settings("evaluate"),
        predictions=[
            run.made(folder / "predictions.parquet", "morphome.predictions", "train", model=name)
            for name, folder in run_folders(run.config)
        ],
        split_facts=run.split_facts,
        out=run.paths.evaluation,
    )


@step(RESULTS)
def report(config: Config = DEFAULT) -> None:
    """The one HTML page and its tables as CSV."""
    from morphome.report.build import run_report
    from morphome.report.inputs import ReportInputs

    run = Run(config)
    paths = run.paths
    ids = list(slide_paths(run.config))
    for table in paths.evaluation_tables:
        run.made(table, f"morphome.{table.stem}", "evaluate")
    for name, folder in run_folders(run.config):
        run.made(folder / "run.json", "morphome.run", "train", model=name)
    inputs = ReportInputs(
        cohort_flow=run.flow,
        analysis_flow=run.made(paths.analysis_flow, "morphome.flow", "assemble"),
        patients=run.analysis,
        audit=run.made(paths.audit, "morphome.slide_audit", "import" if run.external else "collect"),
        thumbnails=[
            (s, paths.tiles(s).thumbnail, run.made(paths.tiles(s).qc, "morphome.slide_qc", "tile", slide=s))
            for s in ids
        ],
        timings=[run.made(paths.timing(s), "morphome.timing", "encode", slide=s) for s in ids],
        splits=run.splits,
        split_facts=run.split_facts,
        evaluation=paths.evaluation,
        runs=[folder for _, folder in run_folders(run.config)],
        groups=run.groups,
        panels=run.panels,
        query=run.made(paths.gdc_query, "morphome.gdc_query", "manifest") if "gdc" in run.config else None,
        oracle=run.made(paths.oracle, "morphome.oracle", "simulate") if "simulate" in run.config else None,
        cohort_slides=run.slides,
        cohort_patients=run.patients,
        encoder=run.made(paths.encoded_facts, "morphome.encoder", "rna") if encodes_rna(run.config) else None,
        config=run.config,
    )
    run_report(settings=run.settings("report"), inputs=inputs, out=paths.report.parent)
    print(f"report: {paths.report.resolve()}")


step(TOOLS)(cli_tools.models)
step(TOOLS)(cli_validate.validate)


def main() -> None:
    """Entry point of ``morphome`` and ``python -m morphome``."""
    # One thread, unless the user or --threads says otherwise: jobs run side by side, and two busy processes with two
    # threads each are slower than with one. Before numpy is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.showwarning = lambda message, *_, **__: print(f"morphome: warning: {message}", file=sys.stderr)
    app()
