"""What the DAG is made of: the slides, runs and input files that a checked configuration stands for.

Asked by the Snakefile and by the commands, so that both see the same lists. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morphome.cohort.slide_sheet import SlideRow, read_slide_sheet
from morphome.config import named_files
from morphome.download.listing import KIND_OF_FORMAT, KINDS
from morphome.errors import MorphomeError
from morphome.models.catalog import row_needs
from morphome.paths import GDC_TABLES, PANELS, PUBLISHED, Paths
from morphome.rna.registry import FROZEN, resolve


def slides_from_gdc(config: Mapping[str, Any]) -> bool:
    """Whether the slides are those of the GDC's sheet, and not of a sheet or features of the user's own."""
    return "slides" in gdc_kinds(config) and config["features"]["source"] == "encode"


def slide_paths(config: Mapping[str, Any]) -> dict[str, Path]:
    """``{slide_id: file}`` of every slide that can be tiled, in the order of the sheet.

    Slides that the sheet lists without a file on disk stay out; the cohort manifest names them. Slides of the GDC are
    all there: they are fetched when they are needed. Those that are to be deleted after use have a folder of the run to
    themselves, so that nothing else can be in it.

    Raises:
        MorphomeError: as :func:`morphome.cohort.slide_sheet.read_slide_sheet`, or no slide of the sheet was found.
    """
    if config["features"]["source"] == "external":
        return {}
    if "simulate" in config:
        from morphome.cohort.design import design

        folder = Paths(config).simulated / "slides"
        return {slide.slide_id: folder / slide.file_name for slide in design(config["simulate"]).slides}
    sheet, folder = Path(config["slides"]["sheet"]), config["slides"].get("folder")
    rows, _ = read_slide_sheet(sheet, Path(folder) if folder else None, codes=config["cohort"]["sample_types"])
    if slides_from_gdc(config):
        passing = Paths(config).passing_slides if config["gdc"]["delete_slides"] else None
        return {row.slide_id: _gdc_place(row, passing) for row in rows}
    found = {row.slide_id: Path(row.path) for row in rows if Path(row.path).exists()}
    if not found:
        raise MorphomeError(
            f"{sheet}: none of its {len(rows)} slides was found on disk",
            "check the paths in the sheet, or slides.folder",
        )
    return found


def _gdc_place(row: SlideRow, passing: Path | None) -> Path:
    path = Path(row.path)
    return path if passing is None or path.exists() else passing / row.file_id / path.name


def slide_jobs(config: Mapping[str, Any], slides: Sequence[str]) -> list[list[str]]:
    """Slides in groups of ``slides.per_job``: one job takes a group."""
    size = config["slides"]["per_job"]
    return [list(slides[start : start + size]) for start in range(0, len(slides), size)]


def gdc_kinds(config: Mapping[str, Any]) -> list[str]:
    """Kinds of files that are taken from the GDC: ``slides``, ``rna``, ``mut``, ``cnv``; empty for local cohorts."""
    if "gdc" not in config:
        return []
    wanted = {KIND_OF_FORMAT[table["format"]] for table in config["molecular"].values() if _from_gdc(config, table)}
    if config["slides"].get("sheet") == str(Paths(config).gdc_sheet):
        wanted.add("slides")  # listed; with features from elsewhere none is fetched
    return [kind for kind in KINDS if kind in wanted]


def _from_gdc(config: Mapping[str, Any], table: Any) -> bool:
    """Whether a molecular table is made of files that are fetched from the GDC."""
    known = isinstance(table, Mapping) and table.get("format") in KIND_OF_FORMAT and "gdc" in config
    return known and Path(table["path"]) == Path(config["gdc"]["folder"])


def pinned_files(config: Mapping[str, Any]) -> list[Path]:
    """The tables of the earlier run that ``gdc.pinned`` names; empty without it."""
    folder = config.get("gdc", {}).get("pinned")
    return [Path(folder) / name for name in GDC_TABLES] if folder else []


def published_inputs(config: Mapping[str, Any]) -> list[Path]:
    """Files that others published and that the configuration names (``{published}/NAME``)."""
    return sorted({path for path in named_files(config).values() if path.parent == PUBLISHED})


def fetched_weights(config: Mapping[str, Any]) -> bool:
    """Whether the workflow fetches the weights of the encoder: they are public, and their checksum is known."""
    if config["features"]["source"] == "external":
        return False
    from morphome.features.weights import promised_sha256

    return promised_sha256(config["features"]) is not None


def encodes_rna(config: Mapping[str, Any]) -> bool:
    """Whether a step of its own makes vectors of RNA: a frozen encoder is used, and a row needs it."""
    used = config["molecular"].get("encoder", {}).get("name") in FROZEN
    return used and any("rna" in row_needs(row) for row in config["models"].values())


def rna_substitution(config: Mapping[str, Any]) -> str:
    """What becomes of the rows that read RNA when their encoder is not there; empty when it is."""
    section = config["molecular"].get("encoder", {})
    if gone := section.get("left_out"):
        return f"left out without the RNA encoder {section['requested']}: {', '.join(gone)} ({section['reason']})"
    if section.get("requested", section.get("name")) != section.get("name"):
        return f"RNA encoder {section['name']} in place of {section['requested']} ({section['reason']})"
    return ""


def rna_files(config: Mapping[str, Any]) -> list[Path]:
    """What the encoder of RNA reads beside the molecular tables: its weights, single cells or a table of vectors."""
    return list(resolve(config["molecular"]["encoder"]).files)


def run_folders(config: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """``(row name, folder)`` of every model x repeat x fold."""
    paths = Paths(config)
    return [
        (name, paths.run(name, repeat, fold))
        for name in config["models"]
        for repeat in range(config["splits"]["repeats"])
        for fold in range(config["splits"]["folds"])
    ]


def simulated_files(config: Mapping[str, Any]) -> list[Path]:
    """Every file that ``morphome simulate`` writes."""
    from morphome.cohort.design import design

    folder = Paths(config).simulated
    return [folder / name for name in design(config["simulate"]).files]


def molecular_files(config: Mapping[str, Any]) -> list[Path]:
    """Input files of the molecular tables and gene groups; of the GDC's, the lists of those that were fetched."""
    molecular, paths = config["molecular"], Paths(config)
    named = [Path(molecular["sheet"])] if "sheet" in molecular else []
    named += [paths.fetched(kind) for kind in gdc_kinds(config) if kind != "slides"]
    for part in (*PANELS, "groups"):
        if part in molecular and not _from_gdc(config, molecular[part]):
            named += _files_of(config, Path(molecular[part]["path"]), depth=2)
            named += [Path(molecular[part]["probemap"])] if "probemap" in molecular[part] else []
    return sorted(set(named))


def external_feature_files(config: Mapping[str, Any]) -> list[Path]:
    """The files of ``features.path``, and of ``features.mpp``, with ``features.source: external``; empty otherwise."""
    features = config["features"]
    if features["source"] != "external":
        return []
    from morphome.features.bag_files import input_files

    mpp = Path(str(features.get("mpp", "")))
    return [*input_files(Path(features["path"])), *([mpp] if mpp.is_file() else [])]


def split_files(config: Mapping[str, Any]) -> list[Path]:
    """Published fold files with ``splits.scheme: published``; empty otherwise."""
    if config["splits"]["scheme"] != "published":
        return []
    return sorted(Path(config["splits"]["folder"]).glob("splits_*.csv"))


def _files_of(config: Mapping[str, Any], path: Path, depth: int) -> list[Path]:
    """``path`` itself if it is a file, else the files in it down to ``depth``; of a simulated folder, those to come."""
    if "simulate" in config and path.is_relative_to(Paths(config).simulated):
        return [file for file in simulated_files(config) if file == path or path in file.parents]
    if not path.is_dir():
        return [path]
    patterns = ["*", "*/*"][:depth]
    return sorted(f for pattern in patterns for f in path.glob(pattern) if f.is_file() and f.name[0] != ".")
