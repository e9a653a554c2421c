"""Step ``simulate``: the planted demo cohort, slides and tables, with the truth beside them.

Bender's survival times with two latents: z1 shows in the share of aggressive tissue on the slides, z2 in twenty
genes. What a perfect model could reach stands in ``oracle.json``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from morphome.cohort import gdc_tables
from morphome.cohort.design import Design, SlideDesign, design
from morphome.cohort.gene_families import choose_genes, gene_groups
from morphome.cohort.outcome_model import Outcomes, draw_outcomes, harrell_c, uncensored_oracle_c
from morphome.cohort.paint import Layout, Pairs, draw_layout, paint_slide
from morphome.cohort.svs_writer import write_svs
from morphome.cohort.textures import BLOCK_PX, CLASSES, Stain, draw_stain, textures
from morphome.cohort.values import DAYS_PER_MONTH
from morphome.files import atomic_path, write_json, write_parquet, write_text

#: Share of aggressive blocks: expit(intercept + slope * z1).
SHARE_INTERCEPT, SHARE_SLOPE = -1.2, 1.2
MPP_RANGE = (0.2468, 0.2528)
_QUALITY = 62


def run_simulate(*, settings: Mapping[str, Any], folder: Path, threads: int = 1) -> None:
    """Write the simulated cohort; the same settings give the same bytes.

    Args:
        settings: ``{"simulate": {...}}`` with all defaults filled in.
        folder: gets the files that :func:`morphome.cohort.design.design` names.
        threads: processes that paint slides; the bytes do not depend on it.

    Raises:
        MorphomeError: settings that contradict each other.
    """
    simulate = settings["simulate"]
    plan, seed = design(simulate), simulate["seed"]
    outcomes = draw_outcomes(len(plan.patients), simulate["scenario"], simulate["censoring"], seed)
    folder = Path(folder)
    md5 = _write_slides(plan, outcomes, simulate, folder, settings, threads)
    md5 |= _write_molecular(plan, outcomes, simulate, folder)
    write_text(gdc_tables.clinical_tsv(plan, outcomes, seed), folder / "clinical.tsv")
    write_text(gdc_tables.sample_sheet_tsv(plan, md5), folder / "sample_sheet.tsv")
    groups = gene_groups(choose_genes(simulate["genes"]))
    lines = ["\t".join([name, "simulated cohort", *members]) + "\n" for name, members in groups.items()]
    write_text("".join(lines), folder / "gene_groups.gmt")
    _write_truth(plan, outcomes, simulate, folder, settings)


def aggressive_share(z1: np.ndarray) -> np.ndarray:
    """Expected share of aggressive tissue of a patient with latent ``z1``."""
    return 1 / (1 + np.exp(-(SHARE_INTERCEPT + SHARE_SLOPE * z1)))


def _write_slides(
    plan: Design,
    outcomes: Outcomes,
    simulate: Mapping[str, Any],
    folder: Path,
    settings: Mapping[str, Any],
    threads: int,
) -> dict[str, str]:
    """Paint and write all slides, hospital by hospital; md5 by relative path."""
    share = dict(zip(plan.patients, aggressive_share(outcomes.z1).tolist(), strict=True))
    sites = sorted(set(plan.sites.values()))
    work = [(plan, number, site, share, dict(simulate), folder) for number, site in enumerate(sites)]
    truth, md5 = [], {}
    with tqdm(total=len(plan.slides), desc="slides", disable=None) as progress, _pool(threads) as pool:
        for rows, sums in (pool.map if pool else map)(_write_site, *zip(*work, strict=True)):
            truth += rows
            md5 |= sums
            progress.update(len(rows))
    table = pd.DataFrame(truth).sort_values("slide_id")
    extra = {"classes": list(CLASSES), "block_px": BLOCK_PX}
    write_parquet(table, folder / "slide_truth.parquet", "morphome.slide_truth", settings, extra)
    return md5


def _pool(threads: int) -> AbstractContextManager[ProcessPoolExecutor | None]:
    """Processes beside this one; none for one thread."""
    return ProcessPoolExecutor(threads) if threads > 1 else nullcontext()


def _write_site(
    plan: Design, number: int, site: str, share: Mapping[str, float], simulate: Mapping[str, Any], folder: Path
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Slides of one hospital, from random numbers of their own: their truth, and md5 by relative path."""
    seed = simulate["seed"]
    rng = np.random.default_rng([seed, 6, number])
    # Hospitals scan with different scanners: their pixels differ by up to 2.4 % in size.
    mpp = round(float(np.interp(number, (0, len(set(plan.sites.values())) - 1), MPP_RANGE)), 4)
    stain, maps = draw_stain(rng), textures(rng, mpp)
    truth, md5 = [], {}
    for at, slide in enumerate(plan.slides):
        if plan.sites[slide.patient_id] != site:
            continue
        rng = np.random.default_rng([seed, 7, at])
        tiles = int(rng.integers(simulate["tiles_min"], simulate["tiles_max"] + 1))
        layout = draw_layout(rng, tiles, mpp, share[slide.patient_id])
        path = folder / "slides" / slide.file_name
        _write_slide(rng, slide, layout, maps, stain, mpp, path)
        md5[f"slides/{slide.file_name}"] = hashlib.md5(path.read_bytes()).hexdigest()
        truth.append(_slide_truth(slide, layout, mpp, tiles, share[slide.patient_id]))
    return truth, md5


def _write_slide(
    rng: np.random.Generator,
    slide: SlideDesign,
    layout: Layout,
    maps: list[Pairs],
    stain: Stain,
    mpp: float,
    path: Path,
) -> None:
    # Batches differ a little within a hospital; a patient's second slide was stained on another day.
    own = draw_stain(rng, stain, spread=1.0 if slide.number == 2 else 0.25)
    image = paint_slide(rng, layout, maps, own, mpp, pen=slide.pen, blurred=slide.blurred, damaged=slide.damaged)
    site = slide.patient_id[5:7]
    described = {"StripeWidth": "2040", "ScanScope ID": f"SIM{site}", "Filename": slide.slide_id}
    write_svs(path, image, properties=described, quality=_QUALITY)


def _slide_truth(slide: SlideDesign, layout: Layout, mpp: float, tiles: int, share: float) -> dict[str, Any]:
    counts = dict(zip((f"n_{name}" for name in CLASSES), layout.counts, strict=True))
    return {
        "slide_id": slide.slide_id,
        "patient_id": slide.patient_id,
        "mpp": mpp,
        "tissue_tiles": tiles,
        "share": share,
        "n_blocks": sum(layout.counts),
        **counts,
        "pen": slide.pen,
        "blurred": slide.blurred,
        "damaged": slide.damaged,
        # Class of every block, row by row: 0, 1, 2 as in the extra "classes", -1 glass.
        "block_columns": layout.classes.shape[1],
        "blocks": layout.classes.ravel().tolist(),
    }


def _write_molecular(plan: Design, outcomes: Outcomes, simulate: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write the files of the three panels; md5 by relative path."""
    paths = {(file.panel, file.patient_id): file.path for file in plan.molecular}
    genes, seed, md5 = gdc_tables.annotation(simulate["genes"]), simulate["seed"], {}
    makers = {"rna": gdc_tables.star_counts, "mut": gdc_tables.masked_mafs, "cnv": gdc_tables.copy_numbers}
    for panel, make in makers.items():
        for patient, content in make(plan, outcomes, genes, seed):
            raw = content if isinstance(content, bytes) else content.encode()
            relative = paths[panel, patient]
            with atomic_path(folder / relative) as temporary:
                temporary.write_bytes(raw)
            md5[relative] = hashlib.md5(raw).hexdigest()
    return md5


def _write_truth(
    plan: Design, outcomes: Outcomes, simulate: Mapping[str, Any], folder: Path, settings: Mapping[str, Any]
) -> None:
    table = pd.DataFrame(
        {
            "patient_id": plan.patients,
            "site": [plan.sites[patient] for patient in plan.patients],
            "z1": outcomes.z1,
            "z2": outcomes.z2,
            "eta": outcomes.eta,
            "aggressive_share": aggressive_share(outcomes.z1),
            "time_event_months": outcomes.time_event_months,
            "time_censor_months": outcomes.time_censor_months,
            "time_days": outcomes.days,
            "time_months": outcomes.days / DAYS_PER_MONTH,
            "event": outcomes.event,
        }
    )
    write_parquet(table, folder / "truth.parquet", "morphome.truth", settings)
    events = int(outcomes.event.sum())
    oracle = {
        "scenario": simulate["scenario"],
        "n_patients": len(plan.patients),
        "n_slides": len(plan.slides),
        "n_events": events,
        "events_per_site": table.groupby("site")["event"].sum().to_dict(),
        "oracle_c": harrell_c(outcomes.days.astype(float), outcomes.event, outcomes.eta),
        "oracle_c_uncensored": uncensored_oracle_c(simulate["scenario"]),
        "c_of_z1": harrell_c(outcomes.days.astype(float), outcomes.event, outcomes.z1),
        "c_of_z2": harrell_c(outcomes.days.astype(float), outcomes.event, outcomes.z2),
        "censoring_asked": simulate["censoring"],
        "censoring_actual": 1 - events / len(plan.patients),
        "seed": simulate["seed"],
    }
    write_json(oracle, folder / "oracle.json", "morphome.oracle", settings)
