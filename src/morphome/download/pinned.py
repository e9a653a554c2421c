"""The manifest of an earlier run, taken over without asking the GDC."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morphome.cohort.slide_sheet import read_rows
from morphome.download.listing import GdcFile, read_manifest
from morphome.download.query import release_number, same_workflow
from morphome.errors import MorphomeError
from morphome.files import read_json
from morphome.paths import GDC_TABLES

QUERY_FORMAT = "morphome.gdc_query"
_NEEDED = {"asked", "by_project", "cases", "data_release", "kinds", "left_out", "projects", "server_release", "time"}


@dataclass(frozen=True)
class Pinned:
    """The four files of an earlier run: files and rows of the kinds asked for, the clinical text, the query."""

    files: list[GdcFile]
    rows: list[dict[str, str]]
    clinical: str
    query: dict[str, Any]


def read_pinned(
    folder: Path,
    projects: Sequence[str],
    kinds: Sequence[str],
    codes: Sequence[str],
    workflow: str | None,
    release: str,
) -> Pinned:
    """Read and check the ``gdc/`` folder of an earlier run.

    Args:
        folder: holds the four files of ``morphome.paths.GDC_TABLES``.
        projects, kinds, codes, workflow, release: what this run asks for; the folder may hold further kinds, which
            are passed over.

    Raises:
        MorphomeError: a file is missing or damaged, the files do not belong together, or they answer another
            question than this run's.
    """
    folder = Path(folder)
    for name in GDC_TABLES:
        if not (folder / name).is_file():
            raise MorphomeError(
                f"gdc.pinned: {folder / name} not found",
                f"name the gdc/ folder of a run; it holds {', '.join(GDC_TABLES)}",
            )
    query = read_json(folder / "query.json", QUERY_FORMAT)
    if lacking := sorted(_NEEDED - set(query)):
        raise MorphomeError(
            f"gdc.pinned: {folder / 'query.json'}: no '{lacking[0]}' in it",
            "take the files of a finished run, unchanged",
        )
    _same_question(folder, query, projects, kinds, codes, workflow, release)
    files = read_manifest(folder / "manifest.tsv")
    _, rows = read_rows(folder / "sample_sheet.tsv", "gdc.pinned")
    clinical = (folder / "clinical.tsv").read_text(encoding="utf-8")
    counts = Counter(file.kind for file in files)
    expected = {kind: entry["files"] for kind, entry in query["kinds"].items()}
    n_cases = sum(query["cases"].values())
    header, _, body = clinical.partition("\n")
    place = header.split("\t").index("cases.submitter_id") if "cases.submitter_id" in header.split("\t") else 0
    patients = {line.split("\t")[place] for line in body.splitlines() if line.count("\t") >= place}
    problem = ""
    if dict(counts) != expected:
        problem = f"manifest.tsv lists {dict(counts)}, query.json says {expected}"
    elif sum(file.size for file in files) != sum(entry["bytes"] for entry in query["kinds"].values()):
        problem = "the bytes of manifest.tsv are not those of query.json"
    elif {row.get("File ID") for row in rows} != {file.file_id for file in files} or len(rows) != len(files):
        problem = f"sample_sheet.tsv lists other files ({len(rows)}) than manifest.tsv ({len(files)})"
    elif len(patients) != n_cases:
        problem = f"clinical.tsv lists {len(patients)} patients, query.json says {n_cases}"
    if problem:
        raise MorphomeError(f"gdc.pinned: {folder}: {problem}", "take all four files of one finished run, unchanged")
    wanted = {file.file_id for file in files if file.kind in kinds}
    return Pinned(
        [file for file in files if file.file_id in wanted],
        [{key: cell for key, cell in row.items() if key} for row in rows if row["File ID"] in wanted],
        clinical,
        query,
    )


def _same_question(
    folder: Path,
    query: dict[str, Any],
    projects: Sequence[str],
    kinds: Sequence[str],
    codes: Sequence[str],
    workflow: str | None,
    release: str,
) -> None:
    asked = query["asked"]
    problem = ""
    if sorted(asked["projects"]) != sorted(projects):
        problem = f"it is of {', '.join(asked['projects'])}; gdc.projects is {', '.join(projects)}"
    elif lacking := [kind for kind in kinds if kind not in asked["kinds"]]:
        problem = f"it has no files of kind {', '.join(lacking)}"
    elif lacking := [code for code in codes if code not in asked["sample_types"]]:
        problem = f"it has no files of sample type {', '.join(lacking)}"
    elif "cnv" in kinds and workflow is not None and not same_workflow(workflow, asked["cnv_workflow"]):
        problem = f"its copy numbers are of workflow {asked['cnv_workflow']}, not {workflow}"
    elif release.lower() != "latest" and release_number(release) != release_number(query["data_release"]):
        problem = f"it is of data release {query['data_release']}; gdc.data_release is {release}"
    if problem:
        raise MorphomeError(
            f"gdc.pinned: {folder}: {problem}", "take the settings of that run, or leave gdc.pinned out and ask the GDC"
        )
