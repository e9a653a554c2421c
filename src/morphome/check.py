"""What `morphome check` does after the configuration itself: reads the tables as the run would, and counts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from morphome.errors import MorphomeError
from morphome.features.registry import fingerprint
from morphome.paths import Paths
from morphome.steps import step_settings
from morphome.workflow import gdc_kinds, published_inputs, slide_paths, slides_from_gdc


def _check_slides(config: Mapping[str, Any]) -> None:
    """Slides are there, settings for single slides name slides, and the encoder's weights can be used.

    Raises:
        MorphomeError: naming what is not there.
    """
    slides = slide_paths(config)
    if config["features"]["source"] == "external":
        return
    fingerprint(config["features"], config["tiling"])  # asks for the weights, and refuses those that it may not use
    folder = config["tiling"].get("masks")
    masks = {path.stem: path.name for path in Path(folder).glob("*.geojson")} if folder else {}
    for key, names in (("tiling.mpp_overrides", config["tiling"]["mpp_overrides"]), ("tiling.masks", masks)):
        if unknown := sorted(set(names) - set(slides)):
            raise MorphomeError(
                f"{key}: '{unknown[0]}' is no slide of {config['slides']['sheet']} ({len(unknown)} such)",
                "names are slide_ids, as in the sheet"
                + (", with .geojson behind them" if key.endswith("masks") else ""),
            )


def check_published_files(config: Mapping[str, Any]) -> None:
    """Refuse a published file of other bytes: one put there by hand is one that no rule has fetched and checked.

    Raises:
        MorphomeError: naming the file, what it has and what was expected.
    """
    from morphome.download.published import check_published

    for path in published_inputs(config):
        if path.exists():
            check_published(path.name, path)


def _fetched(config: Mapping[str, Any]) -> list[Path]:
    """What the workflow fetches before tables can be read: published files, the manifest, files of the panels."""
    tables = published_inputs(config)
    if "gdc" in config:
        paths = Paths(config)
        tables += [*paths.gdc_tables, *(paths.fetched(kind) for kind in gdc_kinds(config) if kind != "slides")]
    return tables


def check_tables(config: Mapping[str, Any]) -> Iterator[str]:
    """Run the cohort and genes steps into a temporary folder and say what they found, one line each.

    Slides are looked for and not opened. Nothing is kept. A simulated cohort that does not exist yet is passed over.

    Raises:
        MorphomeError: as the steps would: no slide found, a table that cannot be read, too few events ...
    """
    from morphome.cohort.manifest import run_cohort
    from morphome.files import parquet_meta, read_json, read_parquet
    from morphome.genomics.panels import run_genes

    if "simulate" in config and not Path(config["cohort"]["clinical"]["path"]).exists():
        yield "the simulated cohort is not there yet: its tables are checked when it is made"
        return
    check_published_files(config)
    if lacking := [path for path in _fetched(config) if not path.exists()]:
        yield f"not fetched yet: {lacking[0]} ({len(lacking)} such); the tables are checked when all are there"
        return
    _check_slides(config)
    with tempfile.TemporaryDirectory() as folder:
        paths = Paths({**config, "output": folder})
        run_cohort(
            settings=step_settings(config, "cohort"),
            on_demand=slides_from_gdc(config),
            patients_out=paths.patients,
            slides_out=paths.slides,
            flow_out=paths.cohort_flow,
        )
        flow = read_json(paths.cohort_flow, "morphome.flow")
        patients = read_parquet(paths.patients, "morphome.patients")
        slides = read_parquet(paths.slides, "morphome.slides")
        yield f"{len(patients)} patients, {int(patients['event'].sum())} events, {patients['site'].nunique()} sites"
        yield f"{int(slides['included'].sum())} of {len(slides)} slides"
        for step in flow["steps"]:
            if step["excluded"]:
                some = ", ".join(step["excluded"][:3]) + (" ..." if len(step["excluded"]) > 3 else "")
                yield f"  left out: {len(step['excluded'])} {step['unit']}, {step['reason']} ({some})"
        if paths.panels:
            run_genes(settings=step_settings(config, "genes"), panels_out=paths.panels, groups_out=paths.groups)
        for name, path in paths.panels.items():
            ids = read_parquet(path, "morphome.panel", columns=["patient_id"])["patient_id"]
            known = int(ids.isin(patients["patient_id"]).sum())
            yield f"{name}: {known} of {len(patients)} patients, values as {parquet_meta(path)['value_type']}"
        if paths.groups:
            match = read_json(paths.groups, "morphome.groups")["match"]
            sizes = ", ".join(f"{group} {facts['columns']}" for group, facts in list(match.items())[:8])
            yield f"{len(match)} gene groups, columns: {sizes}" + (" ..." if len(match) > 8 else "")
