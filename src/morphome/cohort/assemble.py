"""Who is analysed: patients of the manifest that have what ``cohort.require`` asks, joined by id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from morphome.cohort.flow import flow_step
from morphome.errors import MorphomeError
from morphome.files import read_json, read_parquet, write_json, write_parquet

_MODALITY = {"wsi": "a usable slide", "rna": "RNA", "mut": "mutations", "cnv": "copy number"}


def run_assemble(
    *,
    settings: Mapping[str, Any],
    patients: Path,
    slides: Path,
    flow: Path,
    index: Path,
    panels: Mapping[str, Path],
    patients_out: Path,
    flow_out: Path,
) -> None:
    """Join the manifest with features and molecular tables and write who is analysed.

    Args:
        settings: ``{"cohort": {"require": [...]}}``.
        patients, slides, flow: the cohort manifest.
        index: the feature index (one row per slide with its status).
        panels: molecular tables by panel name.
        patients_out: ``morphome.analysis``; one row per analysed patient, sorted by ``patient_id``, with
            ``slide_ids`` (usable slides, sorted), ``n_slides``, ``n_tiles`` and ``has_<panel>``.
        flow_out: the whole flow, from the source table to the analysed patients.

    Raises:
        MorphomeError: nobody is left.
    """
    people = read_parquet(patients, "morphome.patients")
    listed = read_parquet(slides, "morphome.slides")
    bags = read_parquet(index, "morphome.feature_index")
    manifest = read_json(flow, "morphome.flow")
    steps = list(manifest["steps"])

    listed = listed[listed["included"] & listed["patient_id"].isin(people["patient_id"])]
    joined = listed.merge(bags, on="slide_id", how="left", suffixes=("", "_feature"), validate="one_to_one")
    joined["reason_feature"] = joined["reason_feature"] if "reason_feature" in joined else joined["reason"]
    usable = joined[joined["status"] == "ok"]
    lost = joined[joined["status"] != "ok"]
    reasons = lost["reason_code"].fillna("no features").replace("", "no features").value_counts()
    why = "; ".join(f"{reason}: {count}" for reason, count in reasons.items())
    if len(joined):
        text = why or "every slide was read"
        steps.append(flow_step("slides with features", "slides", len(joined), lost["slide_id"], text))

    grouped = usable.sort_values("slide_id").groupby("patient_id")
    table = people.sort_values("patient_id").reset_index(drop=True)
    ids = grouped["slide_id"].agg(list)
    table["slide_ids"] = [ids.get(p, []) for p in table["patient_id"]]
    table["n_slides"] = table["slide_ids"].map(len).astype("int64")
    tiles = grouped["n_tiles"].sum()
    table["n_tiles"] = table["patient_id"].map(tiles).fillna(0).astype("int64")
    table["has_wsi"] = table["n_slides"] > 0
    having = {"wsi": usable["patient_id"].tolist()}
    for panel in ("rna", "mut", "cnv"):
        having[panel] = []
        if panel in panels:
            having[panel] = read_parquet(panels[panel], "morphome.panel", columns=["patient_id"])["patient_id"].tolist()
        table[f"has_{panel}"] = table["patient_id"].isin(having[panel])

    for need in settings["cohort"]["require"]:
        has = table[f"has_{need}"]
        steps.append(
            flow_step(
                f"patients with {_MODALITY[need]}",
                "patients",
                len(table),
                table.loc[~has, "patient_id"],
                f"no {_MODALITY[need].removeprefix('a ')} (cohort.require lists '{need}')",
            )
        )
        if not has.any():
            asked = ", ".join(settings["cohort"]["require"])
            raise MorphomeError(
                f"{patients}: no patient has all of {asked}: '{need}' left nobody; "
                f"patients until then: {_examples(table['patient_id'])}; "
                f"with {_MODALITY[need]}: {_examples(having[need])}"
                + (f" ({why or 'no slide of these patients is listed'})" if need == "wsi" and not usable.size else ""),
                "check that both name patients in the same way, or take it out of cohort.require",
            )
        table = table[has].reset_index(drop=True)
    write_parquet(table, patients_out, "morphome.analysis", settings)
    write_json(
        {
            "steps": steps,
            "sources": manifest.get("sources", []),
            "n_patients": len(table),
            "n_events": int(table["event"].sum()),
        },
        flow_out,
        "morphome.flow",
        settings,
    )


def _examples(ids: Iterable[str]) -> str:
    """``'A', 'B' (of 7)``, or ``nobody``."""
    known = sorted(set(ids))
    return ", ".join(f"'{one}'" for one in known[:2]) + f" (of {len(known)})" if known else "nobody"
