"""Step ``cohort``: the manifest of patients and slides, and who was left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from morphome.cohort.barcode import cut_suffix, try_barcode
from morphome.cohort.clinical import ClinicalTable, read_clinical, source_note
from morphome.cohort.flow import drop_unusable, fill_covariates, flow_step
from morphome.cohort.slide_sheet import (
    SlideRow,
    check_slide_id,
    choose_slide,
    prefer_samples,
    read_slide_sheet,
    slide_from_id,
)
from morphome.errors import MorphomeError
from morphome.features.bag_files import find_bags
from morphome.files import write_json, write_parquet

PATIENT_COLUMNS = (
    *("patient_id", "site", "time_months", "event", "endpoint", "age_years", "sex", "stage", "grade"),
    "histology",
)


def run_cohort(
    *, settings: Mapping[str, Any], patients_out: Path, slides_out: Path, flow_out: Path, on_demand: bool = False
) -> None:
    """Read outcomes and slides, join them by patient, and write the manifest.

    Args:
        settings: section ``cohort``, and of ``slides`` and ``features`` where slides or features come from.
        patients_out: ``morphome.patients``: one row per included patient, sorted by ``patient_id``; time in
            months, event 1 = happened, age in years, stage and grade 1-4.
        slides_out: ``morphome.slides``: every slide seen, included or not, with the reason.
        flow_out: ``morphome.flow``: the steps from all patients to those included, and the sources.

        on_demand: slides are fetched after this step, and may be deleted once they are encoded: what the sheet lists
            counts as found.

    Raises:
        MorphomeError: an input that cannot be read (named), nobody left, or fewer events than
            ``cohort.min_events``.
    """
    cohort = settings["cohort"]
    external = settings["features"]["source"] == "external"
    source = cohort["clinical"]
    clinical = read_clinical(
        source["format"],
        Path(source["path"]),
        endpoint=cohort["endpoint"],
        time_unit=cohort["time_unit"],
        types=source.get("types"),
    )
    sources = [source_note("clinical", source, clinical)]
    patients, steps = drop_unusable(clinical)
    if patients.empty:
        raise MorphomeError(
            f"{source['path']}: no patient has a usable outcome ({cohort['endpoint']}){_losses(steps)}",
            "choose another end point (cohort.endpoint), or another table (cohort.clinical)",
        )
    if "covariates" in cohort:
        second = cohort["covariates"]
        extra = read_clinical(second["format"], Path(second["path"]), outcome=False)
        patients, notes = fill_covariates(patients, extra)
        sources.append({**source_note("covariates", cohort["covariates"], extra), **notes})

    chosen, left_out, origin = _list_slides(settings, clinical, external)
    on_disk = not external and not on_demand
    slides = _slide_table(chosen, left_out, on_disk)
    slide_steps = _join(slides, patients, clinical, steps, check_files=on_disk)
    if origin is not None:
        sources.append({**origin, "slides": len(slides), "included": int(slides["included"].sum())})
        steps += slide_steps
    if "wsi" in cohort["require"]:
        with_slide = patients["patient_id"].isin(slides.loc[slides["included"], "patient_id"])
        lost = patients.loc[~with_slide, "patient_id"].tolist()
        steps.append(
            flow_step("with a slide", "patients", len(patients), lost, "no slide (cohort.require lists 'wsi')")
        )
        patients = patients[with_slide].reset_index(drop=True)
        if patients.empty:
            raise MorphomeError(
                f"no patient of {source['path']} has a slide: {_example(clinical.table['patient_id'])} in the "
                f"clinical table, {_example(slides['patient_id'])} with slides"
                + _commonest_reason(slides)
                + _losses(steps),
                "check that both name patients in the same way (slides.sheet, cohort.clinical.path) and that "
                "slides.folder is right",
            )
    events = int(patients["event"].sum())
    if events < cohort["min_events"]:
        raise MorphomeError(
            f"{source['path']}: {events} events ({cohort['endpoint']}) among {len(patients)} patients, fewer "
            f"than cohort.min_events = {cohort['min_events']}" + _losses(steps),
            "add patients, choose an end point with more events (cohort.endpoint), or lower cohort.min_events "
            "knowing that nothing can be learnt from so few",
        )
    patients = patients.assign(endpoint=cohort["endpoint"])[list(PATIENT_COLUMNS)]
    patients = patients.sort_values("patient_id").reset_index(drop=True)
    write_parquet(
        patients,
        patients_out,
        "morphome.patients",
        settings,
        {"endpoint": cohort["endpoint"], "n_patients": len(patients), "n_events": events},
    )
    write_parquet(slides, slides_out, "morphome.slides", settings)
    content = {"unit": "patients", "steps": steps, "sources": sources}
    write_json({**content, "n_patients": len(patients), "n_events": events}, flow_out, "morphome.flow", settings)


def external_slides(path: Path) -> list[SlideRow]:
    """Slides of features that were made elsewhere: a packed ``.h5`` or a folder of one bag a slide.

    The packed file names slides and patients in its datasets ``slide_id`` and ``case_id``. In a folder the file
    names are the slide ids, and the patient is read from the TCGA barcode.

    Raises:
        MorphomeError: naming the file: missing, without these datasets, or without a way to the patient.
    """
    remedy = "list slide_id and patient_id in a table and name it in slides.sheet"
    path = Path(path)
    if path.is_dir():
        pairs = []
        for slide_id, file in find_bags(path).items():
            barcode = try_barcode(slide_id)
            if barcode is None:
                raise MorphomeError(f"{file}: the name is no TCGA barcode, so its patient is not known", remedy)
            pairs.append((slide_id, barcode.patient))
    else:
        pairs = _packed_ids(path, remedy)
    slides = [slide_from_id(check_slide_id(slide, str(path)), patient) for slide, patient in pairs]
    repeated = [slide for slide, count in Counter(slide for slide, _ in pairs).items() if count > 1]
    if repeated:
        raise MorphomeError(f"{path}: slide id '{repeated[0]}' occurs twice", "keep one bag of features per slide")
    return slides


def _packed_ids(path: Path, remedy: str) -> list[tuple[str, str]]:
    import h5py

    if not path.exists():
        raise MorphomeError(f"{path}: file not found (features.path)", "check features.path")
    try:
        with h5py.File(path) as store:
            if missing := [name for name in ("slide_id", "case_id") if name not in store]:
                raise MorphomeError(f"{path}: no dataset '{missing[0]}' (features.path)", remedy)
            slides, cases = store["slide_id"].asstr()[:], store["case_id"].asstr()[:]
    except (OSError, TypeError) as error:
        raise MorphomeError(f"{path}: cannot be read as HDF5: {error} (features.path)", "check the file") from None
    if len(slides) != len(cases):
        raise MorphomeError(f"{path}: {len(slides)} slide ids but {len(cases)} case ids", "make the file again")
    return [(cut_suffix(str(slide)), str(case)) for slide, case in zip(slides, cases, strict=True)]


def _list_slides(
    settings: Mapping[str, Any], clinical: ClinicalTable, external: bool
) -> tuple[list[SlideRow], list[SlideRow], dict[str, Any] | None]:
    """Chosen and left-out slides, and where they came from (None when the run has no slides at all)."""
    slides, cohort = settings.get("slides") or {}, settings["cohort"]
    if "sheet" in slides:
        folder = Path(slides["folder"]) if "folder" in slides else None
        sheet = Path(slides["sheet"])
        chosen, left_out = read_slide_sheet(sheet, folder, require_path=not external, codes=cohort["sample_types"])
        return chosen, left_out, {"role": "slides", "path": slides["sheet"]}
    if external and clinical.slides is not None:
        where = cohort["clinical"]["path"]
        rows = [
            choose_slide(slide_from_id(check_slide_id(slide, where), patient), cohort["sample_types"])
            for slide, patient in clinical.slides.itertuples(index=False)
        ]
        if twice := clinical.slides.loc[clinical.slides["slide_id"].duplicated(), "slide_id"].tolist():
            raise MorphomeError(f"{where}: slide id '{twice[0]}' occurs twice", "remove the repeated row")
    elif external:
        where = (settings["features"] or {}).get("path")
        if where is None:
            raise MorphomeError("features.source is external, but features.path is not set", "set features.path")
        rows = [choose_slide(row, cohort["sample_types"]) for row in external_slides(Path(where))]
    elif "wsi" in cohort["require"]:
        raise MorphomeError(
            "cohort.require lists 'wsi', but slides.sheet is not set",
            "name a sheet of slides in slides.sheet, or take 'wsi' out of cohort.require",
        )
    else:
        return [], [], None
    origin = {"role": "slides", "path": where}
    rows = prefer_samples(rows, cohort["sample_types"])
    return [row for row in rows if not row.reason], [row for row in rows if row.reason], origin


def _slide_table(chosen: list[SlideRow], left_out: list[SlideRow], on_disk: bool) -> pd.DataFrame:
    """All slides, sorted by id; ``size_bytes`` is missing where no file was found, or none is needed and told."""
    rows = sorted([*chosen, *left_out], key=lambda row: row.slide_id)
    sizes = [_size(row.path) if on_disk else row.size_bytes for row in rows]
    columns = ("slide_id", "patient_id", "path", "sample_type", "slide_type", "file_id")
    table = pd.DataFrame({name: pd.Series([getattr(r, name) for r in rows], dtype=object) for name in columns})
    table["size_bytes"] = pd.array(sizes, dtype="Int64")
    table["found"] = np.array([not on_disk or size is not None for size in sizes], bool)
    table["reason"] = pd.Series([row.reason for row in rows], dtype=object)
    table["included"] = table["reason"] == ""
    return table[[*columns, "size_bytes", "found", "included", "reason"]].astype({"included": bool})


def _size(path: str) -> int | None:
    """Bytes of a slide file, of all files of a slide folder (DICOM), None when there is neither."""
    place = Path(path)
    if not path or not place.exists():
        return None
    if place.is_dir():
        return sum(file.stat().st_size for file in place.iterdir() if file.is_file())
    return place.stat().st_size


def _join(
    slides: pd.DataFrame,
    patients: pd.DataFrame,
    clinical: ClinicalTable,
    steps: list[dict[str, Any]],
    check_files: bool,
) -> list[dict[str, Any]]:
    """Mark slides that cannot be used (changes ``slides``); one step of the flow per reason."""
    dropped = {p: s["reason"].partition(" (")[0] for s in steps if s["unit"] == "patients" for p in s["excluded"]}
    out = [flow_step("listed", "slides", len(slides), [], "")]

    def close(name: str, bad: pd.Series, reason: Any, text: str) -> None:
        bad = bad & slides["included"]
        out.append(flow_step(name, "slides", int(slides["included"].sum()), slides.loc[bad, "slide_id"].tolist(), text))
        slides.loc[bad, "reason"] = reason if isinstance(reason, str) else reason[bad]
        slides.loc[bad, "included"] = False

    unwanted = slides["reason"] != ""
    counts = slides.loc[unwanted, "reason"].value_counts().sort_index()
    text = "; ".join(f"{reason}: {count}" for reason, count in counts.items())
    out.append(
        flow_step("of the tumour under study", "slides", len(slides), slides.loc[unwanted, "slide_id"].tolist(), text)
    )
    known = slides["patient_id"].isin(clinical.table["patient_id"])
    close("patient known", ~known, "patient not in the clinical table", "patient not in the clinical table")
    kept = slides["patient_id"].isin(patients["patient_id"])
    why = slides["patient_id"].map(lambda patient: f"patient left out: {dropped.get(patient, '')}")
    close("patient with outcome", ~kept, why, "patient left out by an earlier step")
    if check_files:
        close("file found", ~slides["found"], "file not found", "file not found")
    return out


def _losses(steps: list[dict[str, Any]]) -> str:
    """``"; 4 of 15 patients left out: time missing 1, no slide 3"``; empty when nobody was."""
    lost = [
        (step["reason"], len(step["excluded"])) for step in steps if step["unit"] == "patients" and step["excluded"]
    ]
    if not lost:
        return ""
    shown = ", ".join(f"{reason} {count}" for reason, count in lost)
    listed = next(step["before"] for step in steps if step["unit"] == "patients")
    return f"; {sum(count for _, count in lost)} of {listed} patients left out: {shown}"


def _example(ids: pd.Series) -> str:
    return f"'{ids.iloc[0]}' (of {ids.nunique()})" if len(ids) else "nobody"


def _commonest_reason(slides: pd.DataFrame) -> str:
    counts = slides.loc[slides["reason"] != "", "reason"].value_counts()
    return f"; {counts.iloc[0]} slides: {counts.index[0]}" if len(counts) else ""
