"""Patients of a project with their clinical facts, in the columns of the portal's newer ``clinical.tsv``.

One row per case, diagnosis and follow-up; ``'--`` for what is missing. Nothing is chosen or computed here: which
diagnosis counts and what the follow-up time is are questions for the reader of the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from morphome.download.api import Gdc
from morphome.download.listing import tsv
from morphome.errors import MorphomeError

#: The portal's word for a missing value.
MISSING = "'--"
_CASE = (
    *("project.project_id", "tissue_source_site.code", "tissue_source_site.name"),
    *("demographic.vital_status", "demographic.days_to_death", "demographic.sex_at_birth", "demographic.age_at_index"),
)
_DIAGNOSIS = (
    *("diagnosis_id", "diagnosis_is_primary_disease", "classification_of_tumor", "days_to_diagnosis"),
    *("age_at_diagnosis", "days_to_last_follow_up", "ajcc_pathologic_stage", "ajcc_clinical_stage", "figo_stage"),
    *("tumor_grade", "who_cns_grade", "primary_diagnosis", "morphology", "tissue_or_organ_of_origin"),
    "year_of_diagnosis",
)
_FOLLOW_UP = ("days_to_follow_up",)
FIELDS = (
    *("case_id", "submitter_id", *_CASE),
    *(f"diagnoses.{name}" for name in _DIAGNOSIS),
    *("follow_ups.follow_up_id", *(f"follow_ups.{name}" for name in _FOLLOW_UP)),
)
COLUMNS = (
    *("cases.case_id", "cases.submitter_id", *_CASE),
    *(f"diagnoses.{name}" for name in _DIAGNOSIS),
    *(f"follow_ups.{name}" for name in _FOLLOW_UP),
)


def case_filters(project: str) -> dict[str, Any]:
    """Filters of the search for the cases of a project, in the GDC's language."""
    return {"op": "=", "content": {"field": "project.project_id", "value": project}}


def find_cases(api: Gdc, project: str) -> list[dict[str, Any]]:
    """All cases of a project as the GDC answers.

    Raises:
        MorphomeError: no answer, no case at all (the project's name is wrong), or a case without a patient's id.
    """
    cases = list(api.search("cases", case_filters(project), FIELDS))
    if not cases:
        raise MorphomeError(
            f"gdc.projects: the GDC knows nobody in '{project}'",
            'write a project as the GDC does, with its programme: "TCGA-HNSC"',
        )
    for case in cases:
        if not case.get("submitter_id"):
            raise MorphomeError(f"{api.url}/cases: case {case.get('case_id')} has no submitter_id", "run it again")
    return cases


def clinical_tsv(cases: Iterable[Mapping[str, Any]]) -> str:
    """The table as text, sorted by patient; the primary diagnosis first, then by id; follow-ups by day."""
    rows = []
    for case in sorted(cases, key=lambda case: str(case["submitter_id"])):
        head = [_cell(case.get("case_id")), _cell(case["submitter_id"]), *(_cell(_at(case, name)) for name in _CASE)]
        for diagnosis in sorted(case.get("diagnoses") or [{}], key=_diagnosis_order):
            middle = [_cell(diagnosis.get(name)) for name in _DIAGNOSIS]
            for visit in sorted(case.get("follow_ups") or [{}], key=_visit_order):
                rows.append([*head, *middle, *(_cell(visit.get(name)) for name in _FOLLOW_UP)])
    return tsv([COLUMNS, *rows])


def _at(case: Mapping[str, Any], path: str) -> Any:
    """The value at ``"demographic.vital_status"``; None when any part is missing."""
    first, _, last = path.partition(".")
    part = case.get(first)
    return part.get(last) if isinstance(part, Mapping) else None


def _diagnosis_order(diagnosis: Mapping[str, Any]) -> tuple[bool, str]:
    primary = str(diagnosis.get("diagnosis_is_primary_disease")).lower() == "true"
    return not primary, str(diagnosis.get("diagnosis_id") or "")


def _visit_order(visit: Mapping[str, Any]) -> tuple[float, str]:
    days = visit.get("days_to_follow_up")
    return (float(days) if isinstance(days, (int, float)) else float("inf")), str(visit.get("follow_up_id") or "")


def _cell(value: Any) -> str:
    """Text of one line; whole numbers without ".0", truth values in lower case as the portal writes them."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return " ".join(str(value).split()) or MISSING
