"""The step ``manifest``: which files and patients the GDC has, written down before anything is fetched.

Four files: ``manifest.tsv`` (any client of the GDC can use it), ``sample_sheet.tsv`` (whose the files are),
``clinical.tsv`` and ``query.json`` (what was asked, when, of which release; what was left out and why). They are small
and public: committed beside a paper they let a reader take the very same files (``gdc.pinned``).
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from morphome.download.api import Gdc
from morphome.download.cases import case_filters, clinical_tsv, find_cases
from morphome.download.listing import KINDS, GdcFile, tsv, write_manifest
from morphome.download.local import Local, find_local, require_room
from morphome.download.pinned import QUERY_FORMAT, read_pinned
from morphome.download.query import (
    SHEET_COLUMNS,
    LeftOut,
    count_reasons,
    file_filters,
    find_files,
    keep_tumours,
    one_workflow,
    release_text,
    sheet_row,
)
from morphome.download.release import WITHDRAWN, files_of_release, pinned_release
from morphome.errors import MorphomeError, MorphomeWarning
from morphome.files import write_json, write_text

#: Files of another size that are named in full; the rest are counted.
_MOST_NAMED = 20
#: The remedy of an empty kind.
_PANEL_OF = {"rna": "molecular.rna (or .expression)", "mut": "molecular.mut", "cnv": "molecular.cnv"}


def run_manifest(*, settings: Mapping[str, Any], gdc: Mapping[str, Any], kinds: Sequence[str], out: Path) -> None:
    """Ask the GDC (or take an earlier answer) and write the four files into the folder ``out``.

    Args:
        settings: what decides which files there are: ``gdc`` (``projects``, ``data_release``), ``cohort``
            (``sample_types``) and ``molecular`` (formats, ``cnv.workflow``); stamped into ``query.json``.
        gdc: the whole section ``gdc`` of the configuration (``api``, ``folder``, ``have``, ``pinned`` ...).
        kinds: what to ask for, of ``KINDS``: ``slides``, ``rna``, ``mut``, ``cnv``.
        out: folder of the run's ``gdc`` files.

    Raises:
        MorphomeError: no answer, an unknown project, a release that the server does not have yet, a panel without
            any file, several copy-number workflows without a choice, a damaged pinned folder, or too little room.
    """
    projects = list(dict.fromkeys(gdc["projects"]))
    codes = list(settings["cohort"]["sample_types"])
    molecular = settings.get("molecular") or {}
    kinds = [kind for kind in KINDS if kind in kinds]
    workflow = (molecular.get("cnv") or {}).get("workflow")
    release = gdc["data_release"]
    folder, have = Path(gdc["folder"]), [Path(place) for place in gdc["have"]]
    if gdc.get("pinned"):
        pinned = read_pinned(Path(gdc["pinned"]), projects, kinds, codes, workflow, release)
        local = find_local(pinned.files, folder, have)
        query = {key: value for key, value in pinned.query.items() if key != "stamp"}
        query["asked"] = {**query["asked"], "kinds": kinds}
        query["pinned"] = str(gdc["pinned"])
        clinical, by_id = pinned.clinical, {row["File ID"]: row for row in pinned.rows}
        rows = [{**by_id[file.file_id], "Local Path": file.local_path} for file in local.files]
    else:
        with Gdc(gdc["api"]) as api:
            files, cases, query = ask(api, projects, kinds, codes, workflow, release)
        local = find_local(files, folder, have)
        clinical, rows = clinical_tsv(cases), [sheet_row(file) for file in local.files]
    missing = local.missing()
    query |= {**_counts(local, projects), "local": _local_facts(local)}
    query["to_fetch"] = {"files": len(missing), "bytes": sum(file.size for file in missing)}
    _say(query)
    require_room(folder, missing, gdc["delete_slides"])
    out = Path(out)
    write_manifest(local.files, out / "manifest.tsv")
    order = {kind: number for number, kind in enumerate(KINDS)}
    rank = {file.file_id: (order[file.kind], file.name, file.file_id) for file in local.files}
    rows.sort(key=lambda row: rank[row["File ID"]])
    cells = [[row.get(name, "") for name in SHEET_COLUMNS] for row in rows]
    write_text(tsv([SHEET_COLUMNS, *cells]), out / "sample_sheet.tsv")
    write_text(clinical, out / "clinical.tsv")
    write_json(query, out / "query.json", QUERY_FORMAT, settings)


def ask(
    api: Gdc, projects: Sequence[str], kinds: Sequence[str], codes: Sequence[str], workflow: str | None, release: str
) -> tuple[list[GdcFile], list[dict[str, Any]], dict[str, Any]]:
    """Files, cases and the content of ``query.json`` as the server answers.

    Args:
        codes: TCGA sample codes of the tumour under study.
        workflow: of copy numbers, or None.
        release: a data release, or "latest".

    Raises:
        MorphomeError: as :func:`run_manifest`.
    """
    status = api.status()
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    pin, server = pinned_release(release, status)
    files: list[GdcFile] = []
    left_out: list[LeftOut] = []
    cases: list[dict[str, Any]] = []
    n_cases: dict[str, int] = {}
    filters: dict[str, Any] = {}
    for project in projects:
        found = find_cases(api, project)
        n_cases[project] = len(found)
        cases += found
        filters[project] = {"cases": case_filters(project)}
        for kind in kinds:
            filters[project][kind] = file_filters(project, kind)
            kept, others = keep_tumours(find_files(api, project, kind), codes)
            files += kept
            left_out += others
    if pin != server:
        files, changed = files_of_release(api, files, pin)
        left_out += changed
    if "cnv" in kinds:  # after the release: its workflows are those of then
        rest = [file for file in files if file.kind != "cnv"]
        numbers, passed = one_workflow([file for file in files if file.kind == "cnv"], workflow)
        files, left_out = rest + numbers, left_out + passed
    _check_kinds(files, projects, kinds, release_text(pin))
    found_workflows = sorted({file.workflow for file in files if file.kind == "cnv"})
    query: dict[str, Any] = {
        "data_release": release_text(pin),
        "server_release": release_text(server),
        "pin": release,
        "pin_note": WITHDRAWN if pin != server else "",
        "pinned": None,
        "status": status,
        "time": time,
        "api": api.url,
        "projects": list(projects),
        "cases": n_cases,
        "asked": {
            "projects": list(projects),
            "kinds": list(kinds),
            "sample_types": list(codes),
            "cnv_workflow": found_workflows[0] if found_workflows else None,
        },
        "left_out": count_reasons(left_out),
        # Another workflow's files are many and of no interest by name.
        "left_out_files": [asdict(one) for one in left_out if not one.reason.startswith("other workflow")],
        "filters": filters,
    }
    return files, cases, query


def _check_kinds(files: Iterable[GdcFile], projects: Sequence[str], kinds: Sequence[str], release: str) -> None:
    there = {(file.project, file.kind) for file in files}
    for kind in kinds:
        empty = [project for project in projects if (project, kind) not in there]
        if len(empty) == len(projects) and (kind in _PANEL_OF or not there):
            leave_out = f"leave {_PANEL_OF[kind]} out, or " if kind in _PANEL_OF else ""
            raise MorphomeError(
                f"gdc.projects: no open file of kind {kind} in {', '.join(projects)} (release {release})",
                f"{leave_out}check gdc.data_release and cohort.sample_types",
            )
        if empty:
            warnings.warn(
                MorphomeWarning(f"no open file of kind {kind} in {', '.join(empty)} (release {release})"), stacklevel=3
            )


def _counts(local: Local, projects: Sequence[str]) -> dict[str, Any]:
    """``kinds`` and ``by_project``: files, bytes, patients, and how many files are here already."""
    here = local.in_place | local.elsewhere

    def count(chosen: list[GdcFile]) -> dict[str, int]:
        patients = {case for file in chosen for case in file.case_ids}
        there = sum(file.file_id in here for file in chosen)
        size = sum(file.size for file in chosen)
        return {"files": len(chosen), "bytes": size, "patients": len(patients), "here": there}

    groups: dict[tuple[str, str], list[GdcFile]] = {}
    for file in local.files:
        groups.setdefault((file.project, file.kind), []).append(file)
        groups.setdefault(("", file.kind), []).append(file)
    return {
        "kinds": {kind: count(groups["", kind]) for kind in KINDS if ("", kind) in groups},
        "by_project": {
            project: {kind: count(groups[project, kind]) for kind in KINDS if (project, kind) in groups}
            for project in projects
        },
    }


def _local_facts(local: Local) -> dict[str, Any]:
    sizes = {file.file_id: file.size for file in local.files}
    return {
        "in_place": len(local.in_place),
        "elsewhere": len(local.elsewhere),
        "bytes": sum(sizes[file_id] for file_id in local.in_place | local.elsewhere),
        "checked_by": "name and size",
        "other_size": len(local.other_size),
        "other_size_files": [
            {"path": path, "bytes": size, "expected": expected}
            for path, size, expected in local.other_size[:_MOST_NAMED]
        ],
    }


def _say(query: Mapping[str, Any]) -> None:
    """What a user wants to know before hundreds of gigabytes are fetched."""
    source = f"taken from {query['pinned']}" if query["pinned"] else f"asked {query['time']}"
    server = f", server at {query['server_release']}" if query["server_release"] != query["data_release"] else ""
    print(f"GDC data release {query['data_release']}{server} ({source})")
    for project, kinds in query["by_project"].items():
        parts = [f"{query['cases'][project]} cases"]
        for kind, number in kinds.items():
            size = f"{number['bytes'] / 1e9:.2f} GB"
            parts.append(f"{kind}: {number['files']} files of {number['patients']} patients, {size}")
        print(f"  {project}: {'; '.join(parts)}")
    for kind, reasons in query["left_out"].items():
        print(f"  left out or changed ({kind}): " + "; ".join(f"{n} {reason}" for reason, n in reasons.items()))
    local, fetch = query["local"], query["to_fetch"]
    print(
        f"  on disk: {local['in_place'] + local['elsewhere']} files, {local['bytes'] / 1e9:.2f} GB; "
        f"to fetch: {fetch['files']} files, {fetch['bytes'] / 1e9:.2f} GB"
    )
    if local["other_size"]:
        first = local["other_size_files"][0]
        print(
            f"  not used, as their size is another: {local['other_size']} files, as {first['path']} "
            f"({first['bytes']} bytes, expected {first['expected']})"
        )
