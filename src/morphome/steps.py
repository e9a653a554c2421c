"""The steps of a run: which settings each may see, which code stands behind it, and what a file was made with.

A step receives only the keys listed here, so that a key outside the list can neither change its result nor make
Snakemake repeat it. Standard library only (used while the DAG is built).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morphome.files import check_stamp, read_stamp, settings_hash, write_text
from morphome.models.catalog import info, row_needs
from morphome.paths import PANELS, Paths
from morphome.rna.registry import FALLBACKS, ON_MISSING

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Step:
    """One step: the dotted keys of the configuration that it may see, and the module that does the work."""

    keys: tuple[str, ...]
    module: str


_ENCODER = ("features.encoder", "features.precision")
STEPS: dict[str, Step] = {
    "simulate": Step(("simulate",), "morphome.cohort.simulate"),
    # Which files there are, and which are here already. How they are fetched is no reason to ask the GDC again.
    "manifest": Step(
        (
            *("gdc.projects", "gdc.data_release", "gdc.have", "gdc.pinned", "cohort.sample_types"),
            *(f"molecular.{panel}.{key}" for panel in PANELS for key in ("format", "path")),
            *("features.source", "slides.sheet"),
            "molecular.cnv.workflow",
        ),
        "morphome.download.manifest",
    ),
    "fetch": Step((), "morphome.download.fetch"),
    "published": Step((), "morphome.download.published"),
    "cohort": Step(
        ("cohort", "slides.sheet", "slides.folder", "features.source", "features.path"),
        "morphome.cohort.manifest",
    ),
    "genes": Step(
        ("molecular.sheet", *(f"molecular.{part}" for part in (*PANELS, "groups")), "cohort.sample_types"),
        "morphome.genomics.panels",
    ),
    "rna": Step(("molecular.encoder",), "morphome.rna.step"),
    "weights": Step(("features.encoder",), "morphome.features.prefetch"),
    "tile": Step(("tiling", "slides.reader"), "morphome.slides.tile_job"),
    # How an encoder is run (weights, device, runtime, batch) is not among its settings: the vectors are the same, and
    # other weights give another fingerprint and so another folder.
    "encode": Step(
        ("tiling", "slides.reader", "features.source", *_ENCODER, "features.max_failed_tiles"),
        "morphome.features.encode",
    ),
    "collect": Step(
        ("slides.max_failed_fraction", "tiling", "features.source", *_ENCODER), "morphome.features.collect"
    ),
    "import": Step(
        ("slides.max_failed_fraction", "features.source", "features.path", "features.dataset", "features.mpp"),
        "morphome.features.external",
    ),
    "assemble": Step(("cohort.require",), "morphome.cohort.assemble"),
    "split": Step(("splits", "evaluation.horizon_months"), "morphome.splits"),
    "train": Step((), "morphome.training.run"),
    "evaluate": Step(("evaluation",), "morphome.evaluation.evaluate"),
    "report": Step(("*",), "morphome.report.build"),
}


def step_settings(
    config: Mapping[str, Any], step: str, *, slide: str | None = None, model: str | None = None
) -> dict[str, Any]:
    """The part of a checked configuration that ``step`` may see.

    Args:
        slide: for per-slide steps; only this slide's ``mpp_overrides`` and corrected mask are passed on.
        model: for ``train``; only this row's entry is passed on.
    """
    if step == "train":
        entry = config["models"][model]
        # Of a frozen encoder training reads the vectors, not how they were made.
        encoder = {k: v for k, v in config["molecular"].get("encoder", {}).items() if k in ("name", "components")}
        return {"model": entry, **({"encoder": encoder} if "rna" in row_needs(entry) else {})}
    keys = STEPS[step].keys
    if keys == ("*",):
        return dict(config)
    chosen: dict[str, Any] = {}
    for key in keys:
        _copy(config, chosen, key.split("."))
    if step == "rna" and "encoder" in chosen["molecular"]:
        # The files are there: what would have been done without them is no reason to encode again.
        plain = {"on_missing": ON_MISSING[0], "fallback": FALLBACKS[0]}
        chosen["molecular"] = {"encoder": {**chosen["molecular"]["encoder"], **plain}}
    if slide is not None and "tiling" in chosen:
        overrides = chosen["tiling"]["mpp_overrides"]
        mine = {slide: overrides[slide]} if slide in overrides else {}
        tiling = {**chosen["tiling"], "mpp_overrides": mine}
        tiling.pop("masks", None)
        if mask := mask_file(config, slide):
            tiling["masks"] = str(mask)
        chosen["tiling"] = tiling
    return chosen


def mask_file(config: Mapping[str, Any], slide: str) -> Path | None:
    """The corrected tissue mask of a slide below ``tiling.masks``; None where there is none."""
    folder = config["tiling"].get("masks")
    path = Path(folder) / f"{slide}.geojson" if folder else None
    return path if path and path.exists() else None


def _copy(source: Mapping[str, Any], target: dict[str, Any], key: list[str]) -> None:
    head, *rest = key
    if head not in source:
        return
    if not rest:
        target[head] = source[head]
    else:
        _copy(source[head], target.setdefault(head, {}), rest)


def step_key(config: Mapping[str, Any], step: str, **wildcards: str) -> str:
    """Hash of the settings of one job; a Snakemake parameter, so that a changed setting repeats the job."""
    return settings_hash(step_settings(config, step, **wildcards))


def write_resolved(config: Mapping[str, Any]) -> Path:
    """Write the checked configuration under its own hash (never overwritten, so that running jobs keep theirs).

    It has the form that a user writes, so that checking it again gives the same configuration.
    """
    models = {
        name: {"model": entry["model"], "training": entry["training"], **entry["settings"]}
        for name, entry in config["models"].items()
    }
    written = {**config, "models": models}
    path = Paths(config).config(settings_hash(written))
    if not path.exists():
        write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", path)
    return path


@functools.cache
def code_hash(step: str, *models: str) -> str:
    """Hash of every module of morphome that the step's module imports, directly or not, and the data files they name.

    Snakemake does not notice edits of a package; as a parameter of the rule this repeats what they touch. Training
    imports no model by name, so that the edit of one repeats its own rows only.

    Args:
        models: for ``train``, the registry keys of the models of the row.
    """
    digest = hashlib.sha256()
    files = _closure(STEPS[step].module).union(*(_closure(info(key).module) for key in models))
    for path in sorted(files):
        digest.update(str(path.relative_to(PACKAGE)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _closure(module: str) -> set[Path]:
    seen: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file_of(name)
        if name in seen or path is None:
            continue
        seen[name] = path
        waiting += _imports(path)
    files = set(seen.values())
    for module_file in [path for path in files if path.name != "__init__.py" and path.parent != PACKAGE]:
        files |= {p for p in (module_file.parent / "templates").glob("*") if p.is_file()}
        # Training reads features, but not the list of encoders beside the module that does.
        files |= {p for p in (module_file.parent / "data").glob("*") if f'"{p.name}"' in _text(module_file)}
    return files


@functools.cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def _imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(_text(path))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.split(".")[0] == "morphome"]


def _file_of(module: str) -> Path | None:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file() and candidate != PACKAGE / "__init__.py":
            return candidate
    return None


def train_code_hash(config: Mapping[str, Any], model: str) -> str:
    """:func:`code_hash` of the step ``train`` for one row: of its model, and of the teacher if it has one."""
    entry = config["models"][model]
    teacher = (entry["training"]["distil"] or {}).get("teacher")
    return code_hash("train", entry["model"], *([teacher] if teacher else []))


def require_made_by(path: Path, format_name: str, settings: Mapping[str, Any]) -> Path:
    """Return ``path`` if its stamp says that it was made with ``settings``; otherwise refuse it by name."""
    check_stamp(read_stamp(path, format_name), path, format_name, settings)
    return path
