"""What is asked of the GDC, and what its answers are read as.

One search per project and kind, of open files. A hit becomes a :class:`GdcFile`. What an answer may lack is tolerated:
some diagnostic slides of TCGA hang on a portion, so that there is no path to their sample; samples are described by
``tissue_type``, ``tumor_descriptor``, ``specimen_type`` and ``preservation_method`` since 2023, by ``sample_type``
before. Only fields that exist today are asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from morphome.cohort.barcode import sample_name, try_barcode
from morphome.cohort.slide_sheet import sample_codes
from morphome.download.api import Gdc
from morphome.download.listing import GdcFile, check_file
from morphome.errors import MorphomeError

#: Conditions of a search besides the project and open access.
CONDITIONS: dict[str, dict[str, str]] = {
    "slides": {"data_type": "Slide Image", "experimental_strategy": "Diagnostic Slide"},
    "rna": {"data_type": "Gene Expression Quantification", "analysis.workflow_type": "STAR - Counts"},
    "mut": {
        "data_type": "Masked Somatic Mutation",
        "analysis.workflow_type": "Aliquot Ensemble Somatic Variant Merging and Masking",
    },
    "cnv": {"data_type": "Gene Level Copy Number"},
}
FIELDS = (
    *("file_id", "file_name", "file_size", "md5sum", "state", "version", "data_release", "data_type", "data_category"),
    *("analysis.workflow_type", "associated_entities.entity_submitter_id"),
    *("cases.submitter_id", "cases.project.project_id", "cases.samples.submitter_id", "cases.samples.tissue_type"),
    *("cases.samples.tumor_descriptor", "cases.samples.specimen_type", "cases.samples.preservation_method"),
)
#: Columns of the sample sheet: the GDC's own, and three besides.
SHEET_COLUMNS = (
    *("File ID", "File Name", "Data Category", "Data Type", "Project ID", "Case ID", "Sample ID", "Tissue Type"),
    *("Tumor Descriptor", "Specimen Type", "Preservation Method", "Workflow Type", "File Size", "Local Path"),
)
#: Copy numbers come from several callers, whose numbers cannot be mixed; this one is taken when nobody chose.
DEFAULT_WORKFLOW = "ASCAT3"
_RELEASE = re.compile(r"(\d+)(?:\.(\d+))?")


@dataclass(frozen=True)
class LeftOut:
    """A file that was found and not taken, or taken in an older version."""

    kind: str
    project: str
    file_id: str
    name: str
    reason: str


def file_filters(project: str, kind: str) -> dict[str, Any]:
    """Filters of the search for the files of a kind in a project, in the GDC's language."""
    conditions = {"cases.project.project_id": project, **CONDITIONS[kind], "access": "open"}
    content = [{"op": "=", "content": {"field": field, "value": value}} for field, value in conditions.items()]
    return {"op": "and", "content": content}


def find_files(api: Gdc, project: str, kind: str) -> list[GdcFile]:
    """All open files of a kind in a project, as the server has them now.

    Raises:
        MorphomeError: no answer, a hit without what a download needs (named), or one of another project.
    """
    hits = api.search("files", file_filters(project, kind), FIELDS)
    files = [read_hit(hit, kind, project, f"{api.url}/files") for hit in hits]
    if strangers := [file for file in files if file.project != project]:
        raise MorphomeError(
            f"{api.url}/files: asked for {project}, the answer holds {strangers[0].name} of {strangers[0].project}",
            "something between here and the GDC drops the question; check gdc.api and the proxy",
        )
    return files


def read_hit(hit: Mapping[str, Any], kind: str, project: str, where: str) -> GdcFile:
    """One hit of ``/files`` as a :class:`GdcFile`.

    Args:
        where: begins an error's text.

    Raises:
        MorphomeError: no id, name, md5 or size, no patient, or a name that leads out of its folder.
    """
    file_id, name = str(hit.get("file_id") or hit.get("id") or ""), str(hit.get("file_name") or "")
    size = hit.get("file_size")
    cases = [case for case in hit.get("cases") or [] if case.get("submitter_id")]
    if not isinstance(size, int) or not cases:
        raise MorphomeError(
            f"{where}: file {file_id or '?'} ({name}) comes without its {'patient' if not cases else 'size'}",
            "run the step again; if it stays, report it to the GDC's help desk",
        )
    samples = [sample for case in cases for sample in case.get("samples") or [] if sample.get("submitter_id")]
    if not samples:
        samples = _samples_from_names(hit, name)
    described = {
        "tissue_types": [_tissue(sample) for sample in samples],
        "descriptors": [str(sample.get("tumor_descriptor") or sample.get("sample_type") or "") for sample in samples],
        "specimen_types": [str(sample.get("specimen_type") or "") for sample in samples],
        "preservation": [str(sample.get("preservation_method") or "") for sample in samples],
    }
    file = GdcFile(
        file_id=file_id,
        name=name,
        md5=str(hit.get("md5sum") or "").lower(),
        size=size,
        state=str(hit.get("state") or ""),
        kind=kind,
        data_type=str(hit.get("data_type") or CONDITIONS[kind]["data_type"]),
        workflow=str((hit.get("analysis") or {}).get("workflow_type") or ""),
        project=str((cases[0].get("project") or {}).get("project_id") or project),
        case_ids=tuple(dict.fromkeys(str(case["submitter_id"]) for case in cases)),
        sample_ids=tuple(str(sample["submitter_id"]) for sample in samples),
        data_release=str(hit.get("data_release") or ""),
        data_category=str(hit.get("data_category") or ""),
        version=str(hit.get("version") or ""),
        **{key: tuple(values) if any(values) else () for key, values in described.items()},
    )
    return check_file(file, where)


def _samples_from_names(hit: Mapping[str, Any], name: str) -> list[dict[str, str]]:
    """Samples read from the barcodes of the associated entities, or of the file name."""
    entities = [str(entity.get("entity_submitter_id") or "") for entity in hit.get("associated_entities") or []]
    found = {}
    for text in [*entities, *([] if any(map(try_barcode, entities)) else [name])]:
        barcode = try_barcode(text)
        if barcode and barcode.sample_code:
            sample = f"{barcode.patient}-{barcode.sample_code}{barcode.vial}"
            found[sample] = {
                "submitter_id": sample,
                "tissue_type": "Normal" if barcode.sample_code >= "10" else "Tumor",
            }
    return list(found.values())


def _tissue(sample: Mapping[str, Any]) -> str:
    known = sample.get("tissue_type")
    if known is None and (old := sample.get("sample_type")):
        return "Normal" if "normal" in str(old).lower() else "Tumor"
    return str(known or "")


# -- what is taken --------------------------------------------------------------------------------------------------
def sheet_row(file: GdcFile) -> dict[str, str]:
    """The row of a file in the sample sheet, by ``SHEET_COLUMNS``.

    Patients are repeated per sample, as the GDC does it.
    """
    cases = file.case_ids * max(1, len(file.sample_ids)) if len(file.case_ids) == 1 else file.case_ids
    cells = (
        *(file.file_id, file.name, file.data_category, file.data_type, file.project),
        *map(", ".join, (cases, file.sample_ids, file.tissue_types, file.descriptors)),
        *map(", ".join, (file.specimen_types, file.preservation)),
        *(file.workflow, str(file.size), file.local_path),
    )
    return dict(zip(SHEET_COLUMNS, cells, strict=True))


def keep_tumours(files: Iterable[GdcFile], codes: Sequence[str]) -> tuple[list[GdcFile], list[LeftOut]]:
    """Files of a sample with one of the codes; the others with their reason.

    The code of a slide is that of its own barcode. A file that says nothing about its sample is kept.
    """
    kept, left_out = [], []
    for file in files:
        own = try_barcode(file.name) if file.kind == "slides" else None
        found = [own.sample_code] if own and own.sample_code else [code for code, _ in sample_codes(sheet_row(file))]
        if not found or set(found) & set(codes):
            kept.append(file)
            continue
        # A comparison of tumour and blood is left out for its tumour.
        telling = [code for code in found if code < "10"] or found
        left_out.append(leave_out(file, f"sample type {sample_name(telling[0])}"))
    return kept, left_out


def one_workflow(files: Iterable[GdcFile], wanted: str | None) -> tuple[list[GdcFile], list[LeftOut]]:
    """Copy-number files of one workflow; the others with their reason.

    Args:
        wanted: name of the workflow, in any spelling of its letters and digits; None takes ASCAT3, else the only one.

    Raises:
        MorphomeError: the workflow wanted is not there, or there are several and none was chosen.
    """
    files = list(files)
    names = sorted({file.workflow for file in files})
    if not names:
        return [], []
    chosen = [name for name in names if same_workflow(name, wanted or DEFAULT_WORKFLOW)]
    if not chosen and wanted is None and len(names) == 1:
        chosen = names
    if not chosen:
        problem = f"no file of workflow '{wanted}'" if wanted else "copy numbers of several workflows and no choice"
        raise MorphomeError(
            f"molecular.cnv.workflow: {problem}; the GDC has: {', '.join(names)}",
            "set molecular.cnv.workflow to one of them; their numbers cannot be mixed",
        )
    left_out = [leave_out(file, f"other workflow ({file.workflow})") for file in files if file.workflow not in chosen]
    return [file for file in files if file.workflow in chosen], left_out


def same_workflow(one: str | None, other: str | None) -> bool:
    """True for two spellings of one workflow ("ASCAT3", "ascat-3"): letters and digits decide."""
    return _plain(one) == _plain(other)


def _plain(name: str | None) -> str:
    return re.sub(r"[^a-z0-9]", "", (name or "").lower())


def leave_out(file: GdcFile, reason: str) -> LeftOut:
    """The file with the reason why it is not taken, or not as it is."""
    return LeftOut(file.kind, file.project, file.file_id, file.name, reason)


def count_reasons(left_out: Iterable[LeftOut]) -> dict[str, dict[str, int]]:
    """Kind to reason to number of files, sorted."""
    counts: dict[str, Counter[str]] = {}
    for one in left_out:
        counts.setdefault(one.kind, Counter())[one.reason] += 1
    return {kind: dict(sorted(counts[kind].items())) for kind in sorted(counts)}


# -- the release ----------------------------------------------------------------------------------------------------
def release_number(text: object) -> tuple[int, int] | None:
    """(45, 0) of "45.0", "45", "Data Release 45.0 - December 04, 2025" or "45.0 - 46.0" (the first); None without."""
    match = _RELEASE.search(str(text or ""))
    return (int(match[1]), int(match[2] or 0)) if match else None


def release_text(number: tuple[int, int]) -> str:
    """ "45.0" of (45, 0)."""
    return f"{number[0]}.{number[1]}"
