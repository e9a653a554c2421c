"""Commands beside the steps: encoders, feature files of other tools, and measurements."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from morphome.cli_base import DEFAULT, Config, Run, readable_errors
from morphome.errors import MorphomeError

encoders = typer.Typer(help="Encoders: which there are, whether they work here, and their weights.")
features = typer.Typer(help="Feature files of this and other tools: look at them, check them, convert them.")
bench = typer.Typer(help="Speed on this machine, against the usual way of doing the same; prints one JSON object.")

Keys = Annotated[list[str] | None, typer.Argument(help="Encoder keys; that of the configuration when none is given.")]
Rounds = Annotated[int, typer.Option(min=1, help="Interleaved rounds; medians are reported.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
Tiles = Annotated[int, typer.Option(min=1, help="Tiles of a round.")]
Dataset = Annotated[
    str | None, typer.Option(help="Which features to take of files that hold those of several encoders.")
]


def _register(group: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        return group.command(name)(readable_errors(function))

    return register


@_register(encoders, "list")
def list_encoders(notes: Annotated[bool, typer.Option(help="Also print what to know of each.")] = False) -> None:
    """All encoders of tiles and of slides: size, input, licence, and whether the weights are here."""
    from morphome.features.encoder_tools import encoder_rows, slide_encoder_rows, table_text

    for heading, rows in (("Encoders of tiles", encoder_rows()), ("Encoders of slides", slide_encoder_rows())):
        print(f"{heading}\n\n{table_text(rows)}\n")
        for row in rows if notes else ():
            if row["notes"]:
                print(f"{row['key']}: {row['notes']}")


@_register(encoders, "doctor")
def doctor_encoders(keys: Keys = None, config: Config = DEFAULT) -> None:
    """Whether encoders can be used here: packages, access, weights, checksum, and one tile through them."""
    from morphome.features.encoder_tools import doctor

    chosen, section = _chosen(keys, config)
    checks = doctor(chosen, section)
    for check in checks:
        print(check)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


@_register(encoders, "prefetch")
def prefetch_encoders(
    keys: Keys = None,
    revision: Annotated[str, typer.Option(help="Commit, tag or branch instead of the registry's.")] = "",
    config: Config = DEFAULT,
) -> None:
    """Fetch weights ahead of a run; gated ones need the account's token (HF_TOKEN, or hf auth login)."""
    from morphome.features.prefetch import prefetch

    chosen, _ = _chosen(keys, config)
    for key in chosen:
        prefetch(key, revision=revision)


@_register(features, "convert")
def convert(
    source: Annotated[Path, typer.Argument(help="A feature file, a folder of one file a slide, or a packed .h5.")],
    layout: Annotated[str, typer.Argument(help="clam, trident, stamp, morphome or npy.")],
    out: Annotated[Path, typer.Argument(help="Folder to write into.")],
    mpp: Annotated[
        str | None,
        typer.Option(help="Microns per level-0 pixel if the source does not say: a number or audit.parquet"),
    ] = None,
    dataset: Dataset = None,
    overwrite: Annotated[bool, typer.Option(help="Replace files that exist.")] = False,
) -> None:
    """Write features in the layout of another tool; says what the layout has no place for."""
    from morphome.features.convert import convert_features

    _print_facts(convert_features(source, layout, out, mpp=_number_or_path(mpp), dataset=dataset, overwrite=overwrite))


@_register(features, "inspect")
def inspect(path: Path, dataset: Dataset = None) -> None:
    """What a feature file or a folder of them holds."""
    from morphome.features.inspect import inspect_features

    _print_facts(inspect_features(path, dataset))


@_register(features, "verify")
def verify(
    path: Path,
    sheet: Annotated[Path | None, typer.Option(help="Slide sheet: its slides must all be there.")] = None,
    slide_encoder: Annotated[
        str | None, typer.Option("--for", help="Slide encoder that is to take these features.")
    ] = None,
    dataset: Dataset = None,
) -> None:
    """What is wrong with a feature file or a folder of them; exit code 1 when something is."""
    from morphome.cohort.slide_sheet import read_slide_sheet
    from morphome.features.inspect import inspect_features, verify_features
    from morphome.features.slide_encoders import require_bags

    if slide_encoder:
        facts = inspect_features(path, dataset)
        for what in require_bags(slide_encoder, facts.get("kinds", [facts])):
            print(f"not checked, as the files do not say: {what}")
    slides = [row.slide_id for row in read_slide_sheet(sheet, None)[0]] if sheet else None
    findings = verify_features(path, slides, dataset)
    for found in findings:
        print(f"{found.level}  {found.code}  {found.file}: {found.text}")
    n_errors = sum(found.level == "error" for found in findings)
    print(f"{path}: {n_errors} errors, {len(findings) - n_errors} warnings")
    if n_errors:
        raise typer.Exit(1)


@_register(bench, "read")
def bench_read(slide: Path, rounds: Rounds = 5, tiles: Tiles = 200, threads: Threads = 1) -> None:
    """Tiles per second and core out of a slide, against OpenSlide and PIL."""
    from morphome.bench.read import bench_read

    _print_json(bench_read(slide, rounds=rounds, tiles=tiles, threads=threads))


@_register(bench, "encode")
def bench_encode(
    slide: Path,
    encoder: Annotated[str, typer.Option(help="Encoder key; random weights unless --weights.")] = "resnet50_trunc",
    weights: Annotated[Path | None, typer.Option(help="Weights file or folder.")] = None,
    rounds: Rounds = 3,
    tiles: Tiles = 64,
    threads: Threads = 1,
) -> None:
    """Tiles per second through an encoder, against a plain fp32 loop."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is loaded
    from morphome.bench.encode import bench_encode

    _print_json(bench_encode(slide, encoder, weights, rounds=rounds, tiles=tiles, threads=threads))


@_register(bench, "store")
def bench_store(
    folder: Annotated[Path, typer.Argument(help="Folder on the disk to measure; files are removed again.")] = Path(),
    tiles: Tiles = 10_000,
    dim: Annotated[int, typer.Option(min=1, help="Values of a vector.")] = 1024,
    rounds: Rounds = 5,
) -> None:
    """Writing and reading a bag of features, against the chunked layouts of other tools."""
    from morphome.bench.store import bench_store

    _print_json(bench_store(folder, tiles=tiles, dim=dim, rounds=rounds))


@_register(bench, "train")
def bench_train(
    model: Annotated[str, typer.Argument(help="Model key.")] = "mome",
    patients: Annotated[int, typer.Option(min=12, help="Patients of an epoch.")] = 300,
    bag: Annotated[int, typer.Option(min=1, help="Patches of each.")] = 4096,
    dim: Annotated[int, typer.Option(min=1, help="Values of a patch.")] = 1024,
    rounds: Rounds = 3,
    precision: Annotated[str, typer.Option(help="Of our loop: fp32 or bf16; the plain loop is in fp32.")] = "fp32",
    timed: Annotated[int | None, typer.Option(min=1, help="Patients of a round; 8 to 32 by the size of a bag.")] = None,
    settings: Annotated[str, typer.Option(help='Of the model for both, as JSON: \'{"router": "frozen"}\'.')] = "{}",
    threads: Threads = 1,
) -> None:
    """Seconds of an epoch and peak of memory, against a plain fp32 loop over the same patients."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is loaded
    from morphome.bench.train import bench_train, read_settings

    sizes = {"patients": patients, "bag": bag, "dim": dim, "rounds": rounds, "timed": timed, "threads": threads}
    _print_json(bench_train(model, precision=precision, settings=read_settings(settings), **sizes))


def _chosen(keys: list[str] | None, config: Path) -> tuple[list[str], Mapping[str, Any] | None]:
    """Encoders asked for and the configuration's section of features, where there is a configuration."""
    section = Run(config).config["features"] if config.exists() or not keys else None
    return keys or [section["encoder"]], section


def _number_or_path(text: str | None) -> float | Path | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        path = Path(text)
    if not path.exists():
        raise MorphomeError(f"--mpp {text}: neither a number nor a file", "give microns per pixel, or audit.parquet")
    return path


def _print_facts(facts: Mapping[str, Any]) -> None:
    for key, value in facts.items():
        print(f"{key}: {json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value}")


def _print_json(result: Mapping[str, Any]) -> None:
    json.dump(result, sys.stdout, indent=1, ensure_ascii=False, default=str)
    print()


def models() -> None:
    """The models that a configuration can name: what each sees, its settings with their defaults, and its paper."""
    from morphome.config import schema
    from morphome.models.catalog import models as all_models

    words = {"path": "slides", "omic_groups": "gene groups", "omic_all": "genes", "panels": "genes", "rna": "RNA"}
    for key, row in all_models().items():
        sees = ", ".join(sorted(words.get(need, need) for need in row.needs)) or "nothing"
        properties = schema()["$defs"]["models"][key]["properties"]
        defaults = ", ".join(f"{name}: {part['default']}" for name, part in properties.items())
        more = " and genes in training" if row.trains_with else ""
        more += "; can do without genes" if "missing_omic" in getattr(row.load(), "supports", ()) else ""
        print(f"{key}: {row.title} (sees {sees}{more}). {row.reference}")
        if defaults:
            print(f"    {defaults}")
