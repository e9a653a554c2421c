"""The planted cohort: its statistics against closed forms and other libraries, its files against the plan."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math

import numpy as np
import openslide
import pandas as pd
import pytest
from lifelines import KaplanMeierFitter
from lifelines.utils import concordance_index
from scipy import ndimage

from morphome.cohort.design import design
from morphome.cohort.gene_families import signal_genes
from morphome.cohort.outcome_model import (
    censoring_limit,
    draw_outcomes,
    harrell_c,
    uncensored_oracle_c,
)
from morphome.cohort.paint import draw_layout, paint_slide
from morphome.cohort.simulate import aggressive_share, run_simulate
from morphome.cohort.svs_writer import TILE_PX
from morphome.cohort.textures import AGGRESSIVE, BENIGN, STROMA, draw_stain, textures
from morphome.files import read_json, read_parquet

SETTINGS = {
    "simulate": {
        **{"patients": 12, "sites": 2, "genes": 60, "second_slide_share": 0.17, "scenario": "S3"},
        **{"censoring": 0.45, "tiles_min": 20, "tiles_max": 30, "bad_slides": 1, "seed": 3},
    }
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    run_simulate(settings=SETTINGS, folder=folder)
    return folder


@pytest.fixture(scope="module")
def truth(folder):
    return read_parquet(folder / "truth.parquet", "morphome.truth", SETTINGS)


@pytest.fixture(scope="module")
def maps():
    return textures(np.random.default_rng(0), 0.25)


# -- outcomes -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("scenario", "censoring", "months"), [("S1", 0.45, 58.1), ("S3", 0.45, 66.8), ("X1", 0.7, 14.0)]
)
def test_censoring_limit_has_the_published_values(scenario, censoring, months):
    assert censoring_limit(scenario, censoring) == pytest.approx(months, rel=0.015)


@pytest.mark.parametrize("scenario", ["S0", "S2", "S3", "X1"])
@pytest.mark.parametrize("censoring", [0.0, 0.45, 0.7])
def test_censoring_of_a_large_cohort(scenario, censoring):
    outcomes = draw_outcomes(20_000, scenario, censoring, seed=11)
    assert 1 - outcomes.event.mean() == pytest.approx(censoring, abs=0.012)


def test_uncensored_oracle_in_closed_form():
    """For eta ~ N(0, 2.366^2) C* is .85 and for 1.177^2 it is .75; S1 and S3 have the variances below."""
    assert uncensored_oracle_c("S0") == 0.5
    assert uncensored_oracle_c("S1") == pytest.approx(0.737, abs=0.001)
    assert uncensored_oracle_c("S2") == pytest.approx(0.733, abs=0.0015)
    assert uncensored_oracle_c("S3") == pytest.approx(0.8695, abs=0.001)
    assert uncensored_oracle_c("X1") == pytest.approx(0.25 + 0.5 / (1 + math.exp(-3.2)))


@pytest.mark.parametrize("scenario", ["S1", "S2", "S3", "X1"])
def test_closed_form_equals_simulation(scenario):
    outcomes = draw_outcomes(3_000, scenario, 0.0, seed=5)
    c = harrell_c(outcomes.time_event_months, outcomes.event, outcomes.eta)
    assert c == pytest.approx(uncensored_oracle_c(scenario), abs=0.012)


def test_x1_hides_from_single_latents():
    outcomes = draw_outcomes(3_000, "X1", 0.5, seed=6)
    for latent in (outcomes.z1, outcomes.z2, np.abs(outcomes.z1)):
        assert harrell_c(outcomes.days.astype(float), outcomes.event, latent) == pytest.approx(0.5, abs=0.03)
    oracle = harrell_c(outcomes.days.astype(float), outcomes.event, outcomes.eta)
    assert oracle == pytest.approx(0.774, abs=0.02)


def test_harrell_c_equals_lifelines():
    rng = np.random.default_rng(1)
    time, event = rng.integers(1, 30, 200).astype(float), rng.integers(0, 2, 200)
    risk = np.round(rng.normal(size=200), 1)  # with ties in both
    assert harrell_c(time, event, risk) == pytest.approx(concordance_index(time, -risk, event), abs=1e-12)
    assert math.isnan(harrell_c(time, np.zeros(200, int), risk))


def test_times_are_weibull_of_30_months():
    outcomes = draw_outcomes(20_000, "S0", 0.3, seed=2)
    fit = KaplanMeierFitter().fit(outcomes.days / 30.4375, outcomes.event)
    assert fit.median_survival_time_ == pytest.approx(30 * math.log(2) ** (1 / 1.2), rel=0.03)
    assert np.corrcoef(outcomes.z1, outcomes.z2)[0, 1] == pytest.approx(0.2, abs=0.02)


# -- tissue ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_class_counts_are_binomial(share):
    counts = np.array([draw_layout(np.random.default_rng(k), 60, 0.25, share).counts for k in range(400)])
    blocks = counts.sum(axis=1)
    assert set(blocks) == {round(60 * (128 / 0.25 / 480) ** 2)}
    n = int(blocks[0])
    assert counts[:, AGGRESSIVE].mean() == pytest.approx(n * share, abs=4 * math.sqrt(n * share * (1 - share) / 400))
    assert counts[:, AGGRESSIVE].var() == pytest.approx(n * share * (1 - share), rel=0.3)
    assert counts[:, BENIGN].mean() == pytest.approx(counts[:, STROMA].mean(), rel=0.06)


def test_share_of_aggressive_tissue():
    assert aggressive_share(np.array([0.0, 1.0]))[1] == 0.5
    assert aggressive_share(np.array([0.0]))[0] == pytest.approx(1 / (1 + math.exp(1.2)))


def test_textures_have_true_microns():
    """A benign nucleus covers the same area in square microns whatever the size of a pixel."""
    areas, densities = [], []
    for mpp in (0.22, 0.30):
        amount = textures(np.random.default_rng(4), mpp)[BENIGN] >> 8
        labels, _ = ndimage.label(ndimage.gaussian_filter(amount.astype(float), 0.5 / mpp) > 45)
        sizes = np.bincount(labels.ravel())[1:] * mpp**2
        areas.append(np.median(sizes[sizes > 8]))
        densities.append((sizes > 8).sum() / (1440 * mpp / 1000) ** 2)
    # In pixels the areas would differ by a factor of 1.9.
    assert areas[0] == pytest.approx(areas[1], rel=0.08)
    assert densities[0] == pytest.approx(densities[1], rel=0.3)


def test_classes_differ_in_haematoxylin(maps):
    amounts = [(part >> 8).mean() for part in maps]
    assert amounts[AGGRESSIVE] > 2.5 * amounts[BENIGN] > 2.5 * amounts[STROMA]


def test_pen_and_blur_change_only_their_tiles(maps):
    layout = draw_layout(np.random.default_rng(1), 25, 0.25, 0.4)
    stain = draw_stain(np.random.default_rng(2))
    plain, inked, soft = (
        paint_slide(np.random.default_rng(3), layout, maps, stain, 0.25, **kind)
        for kind in ({}, {"pen": "blue"}, {"blurred": True})
    )
    for other in (inked, soft):
        moved = plain.index != other.index
        assert 0 < moved.sum() < 0.4 * moved.size
    ink = np.concatenate([inked.tiles[k] for k in np.unique(inked.index[plain.index != inked.index])])
    assert ((ink[..., 2] > 110) & (ink[..., 0] < 90)).mean() > 0.1
    moved = plain.index != soft.index
    energy = [
        np.mean([ndimage.laplace(s.tiles[k][..., 1].astype(float)).var() for k in s.index[moved]])
        for s in (plain, soft)
    ]
    assert energy[1] < 0.5 * energy[0]


# -- files ----------------------------------------------------------------------------------------------------
def test_files_are_those_of_the_design(folder):
    found = {str(path.relative_to(folder)) for path in folder.glob("**/*") if path.is_file()}
    assert found == set(design(SETTINGS["simulate"]).files)


def test_same_settings_same_bytes(folder, tmp_path):
    run_simulate(settings=SETTINGS, folder=tmp_path, threads=2)  # the bytes do not depend on it
    for name in design(SETTINGS["simulate"]).files:
        assert hashlib.sha256((tmp_path / name).read_bytes()).digest() == (
            hashlib.sha256((folder / name).read_bytes()).digest()
        ), name


def test_slides_open_and_carry_their_scale(folder):
    facts = read_parquet(folder / "slide_truth.parquet", "morphome.slide_truth", SETTINGS).set_index("slide_id")
    assert facts["mpp"].nunique() == 2
    assert facts["damaged"].sum() == 1
    for slide in design(SETTINGS["simulate"]).slides:
        row = facts.loc[slide.slide_id]
        classes = np.array(row["blocks"]).reshape(-1, row["block_columns"])
        y, x = (np.argwhere(classes == STROMA)[0] * 480 + 120).tolist()
        with openslide.OpenSlide(folder / "slides" / slide.file_name) as opened:
            assert opened.properties["openslide.vendor"] == "aperio"
            assert opened.level_count == 3
            assert float(opened.properties["openslide.mpp-x"]) == row["mpp"]
            thumbnail = np.asarray(opened.get_thumbnail((300, 300)).convert("HSV"))[..., 1]
            tissue_um2 = (thumbnail > 15).mean() * np.prod(opened.dimensions) * row["mpp"] ** 2
            assert 0.6 < tissue_um2 / (row["tissue_tiles"] * 128**2) < 1.35
            if slide.damaged:
                with pytest.raises(openslide.OpenSlideError):
                    opened.read_region((x, y), 0, (TILE_PX, TILE_PX))
            else:
                opened.read_region((x, y), 0, (TILE_PX, TILE_PX))


def test_oracle_is_recomputed_from_the_tables(folder, truth):
    oracle = read_json(folder / "oracle.json", "morphome.oracle", SETTINGS)
    assert oracle["oracle_c"] == pytest.approx(
        concordance_index(truth["time_days"], -truth["eta"], truth["event"]), abs=1e-12
    )
    assert oracle["n_events"] == truth["event"].sum()
    assert sum(oracle["events_per_site"].values()) == oracle["n_events"]
    assert np.allclose(truth["eta"], 1.8 * truth["z1"] + 1.8 * truth["z2"])


def test_clinical_table(folder, truth):
    rows = list(csv.DictReader((folder / "clinical.tsv").open(), delimiter="\t"))
    cases = pd.DataFrame(rows)
    assert (cases.groupby("case_submitter_id").size() == 2).all()
    first = cases.drop_duplicates("case_submitter_id").set_index("case_submitter_id")
    assert list(first["case_id"]) == sorted(first["case_id"])
    extra = set(first.index) - set(truth["patient_id"])
    assert extra == set(design(SETTINGS["simulate"]).without_slide)
    for row in truth.itertuples():
        case = first.loc[row.patient_id]
        dead = case["vital_status"] == "Dead"
        assert dead == (row.event == 1)
        assert int(case["days_to_death" if dead else "days_to_last_follow_up"]) == row.time_days
        assert (case["days_to_death"] == "'--") != dead
    assert (first["ajcc_pathologic_stage"] == "'--").sum() == 1 + len(extra)
    assert (first["age_at_diagnosis"] == "'--").sum() == 1


def test_sample_sheet_names_every_file(folder):
    sheet = pd.read_csv(folder / "sample_sheet.tsv", sep="\t")
    plan = design(SETTINGS["simulate"])
    assert len(sheet) == len(plan.slides) + len(plan.molecular)
    where = {slide.file_id: f"slides/{slide.file_name}" for slide in plan.slides}
    where |= {file.file_id: file.path for file in plan.molecular}
    for row in sheet.to_dict("records"):
        path = folder / where[row["File ID"]]
        assert path.name == row["File Name"]
        assert hashlib.md5(path.read_bytes()).hexdigest() == row["md5"]


def test_star_counts(folder, truth):
    logs = {}
    for file in design(SETTINGS["simulate"]).molecular:
        if file.panel == "rna":
            table = pd.read_csv(folder / file.path, sep="\t", comment="#")
            assert table["gene_id"].head(4).str.startswith("N_").all()
            genes = table[table["gene_id"].str.startswith("ENSG")]
            assert len(genes) == 60
            assert genes["tpm_unstranded"].sum() == pytest.approx(1e6, abs=1)
            assert (genes["stranded_first"] + genes["stranded_second"] == genes["unstranded"]).all()
            logs[file.patient_id] = np.log1p(genes.set_index("gene_name")["tpm_unstranded"])
    logs = pd.DataFrame(logs)[truth["patient_id"]]
    signal = logs.loc[logs.index.isin(signal_genes())].mean()
    assert np.corrcoef(signal, truth["z2"])[0, 1] > 0.7


def test_par_copy_is_listed(tmp_path):
    from morphome.cohort.gdc_tables import PAR_GENE, annotation, star_counts

    plan = design({**SETTINGS["simulate"], "genes": 200})
    outcomes = draw_outcomes(len(plan.patients), "S3", 0.45, 3)
    _, text = next(iter(star_counts(plan, outcomes, annotation(200), 3)))
    rows = [line.split("\t") for line in text.splitlines() if f"\t{PAR_GENE}\t" in line]
    assert len(rows) == 2 and rows[1][0] == rows[0][0] + "_PAR_Y" and rows[1][3] == "0"


def test_mutation_and_copy_number_files(folder):
    plan = design({**SETTINGS["simulate"]})
    effects, empty_cells, cells = set(), 0, 0
    for file in plan.molecular:
        if file.panel == "mut":
            raw = (folder / file.path).read_bytes()
            lines = gzip.decompress(raw).decode().splitlines()
            body = [line.split("\t") for line in lines if not line.startswith("#")]
            assert (body[0][0], body[0][8], body[0][15]) == (
                *("Hugo_Symbol", "Variant_Classification", "Tumor_Sample_Barcode"),
            )
            assert all(row[15].startswith(file.patient_id + "-01A") for row in body[1:])
            if file.patient_id in plan.empty_maf:
                assert len(body) == 1
            effects |= {row[8] for row in body[1:]}
        elif file.panel == "cnv":
            values = pd.read_csv(folder / file.path, sep="\t")["copy_number"]
            empty_cells, cells = empty_cells + values.isna().sum(), cells + len(values)
            assert (values.dropna() >= 0).all() and (values.dropna() % 1 == 0).all()
    assert {"Missense_Mutation", "Silent"} <= effects
    assert 0 < empty_cells < 0.05 * cells


def test_groups_file(folder):
    lines = (folder / "gene_groups.gmt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines][:3] == [
        "Tumour suppressors",
        "Oncogenes",
        "Protein kinases",
    ]
    assert len(lines) == 6
    assert json.loads((folder / "oracle.json").read_text())["scenario"] == "S3"
