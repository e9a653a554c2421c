"""The planted cohorts: what a perfect reader reaches, what one modality reaches, sizes and joins."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from morphome.cohort import simulate
from morphome.cohort.outcome_model import draw_outcomes
from morphome.errors import MorphomeError
from morphome.survival import harrell
from morphome.training.data import load_fold
from morphome.validation import planted
from morphome.validation.planted import SCENARIOS, Design, PlantedFiles, oracle_c, plant, stratified_c


@pytest.fixture(scope="module")
def cohorts():
    """One cohort of 100 patients of every scenario."""
    return {scenario: plant(Design(scenario, n=100)) for scenario in SCENARIOS}


@pytest.mark.parametrize(
    ("scenario", "n", "middle", "low", "high"),
    [
        # Means and central 95 % of the reference simulation; the edges are rounded to .01 there.
        ("S3", 400, 0.890, 0.868, 0.911),
        ("S3", 40, 0.891, 0.824, 0.957),
        ("X1", 400, 0.774, None, None),
    ],
)
def test_the_true_hazard_reaches_what_the_reference_says(scenario, n, middle, low, high):
    values = oracle_c(scenario, n, 1)
    assert values.mean() == pytest.approx(middle, abs=0.004)
    if low:
        assert np.quantile(values, [0.025, 0.975]) == pytest.approx([low, high], abs=0.012)


def test_a_single_cohort_has_an_oracle_in_its_interval(cohorts):
    cohort = cohorts["S3"]
    values = oracle_c("S3", 100, 1)
    patients = cohort.patients
    c = harrell(patients["time_months"], patients["event"], cohort.truth["eta"]).c
    assert np.quantile(values, 0.005) < c < np.quantile(values, 0.995)


def test_in_x1_one_latent_alone_knows_nothing():
    # 40 cohorts of 500: the standard error of the mean is about .004.
    drawn = draw_outcomes(20_000, "X1", 0.5, 7)
    fold = np.arange(20_000) // 500
    days = drawn.days.astype(float)
    for risk in (drawn.z1, drawn.z2, np.abs(drawn.z1), drawn.z1 + drawn.z2):
        assert stratified_c(days, drawn.event, risk, fold) == pytest.approx(0.5, abs=0.015)
    assert stratified_c(days, drawn.event, drawn.z1 * drawn.z2, fold) > 0.7


def test_nothing_matters_in_s0_and_only_the_site_in_s4(cohorts):
    assert (cohorts["S0"].truth["eta"] == 0).all()
    s4 = cohorts["S4"].truth.merge(cohorts["S4"].patients[["patient_id", "site"]], on="patient_id")
    assert (s4.groupby("site")["eta"].nunique() == 1).all()
    assert s4["eta"].nunique() == planted.SITES


def test_the_stain_of_a_site_shows_in_its_bags_in_s4_only(cohorts):
    def between_sites(cohort):
        means = {slide: bag[:, 12:].astype(float).mean(axis=0) for slide, bag in cohort.bags.items()}
        table = pd.DataFrame(means).T
        site = [slide[5:7] for slide in table.index]
        return table.groupby(site).mean().std().mean()

    assert between_sites(cohorts["S4"]) > 0.3
    assert between_sites(cohorts["S3"]) < 0.1


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_sizes_and_ids(cohorts, scenario):
    cohort = cohorts[scenario]
    ids = list(cohort.patients["patient_id"])
    assert len(set(ids)) == 100
    assert list(cohort.truth["patient_id"]) == ids
    named = [slide for slides in cohort.patients["slide_ids"] for slide in slides]
    assert sorted(named) == sorted(cohort.bags)
    assert (cohort.patients["n_slides"] == 2).sum() == 20
    patches = [sum(len(cohort.bags[slide]) for slide in slides) for slides in cohort.patients["slide_ids"]]
    assert min(patches) >= 64 and max(patches) <= 100
    assert {bag.shape[1] for bag in cohort.bags.values()} == {32}
    for panel, width in (("rna", 120), ("mut", 12), ("cnv", 12)):
        assert list(cohort.panels[panel]["patient_id"]) == ids
        assert cohort.panels[panel].shape[1] == 1 + width
    assert 0.005 < cohort.panels["rna"].isna().to_numpy().mean() < 0.03
    members = [(m["panel"], m["gene"]) for group in cohort.groups.values() for m in group]
    assert len(cohort.groups) == 6
    assert len(members) == len(set(members)) == 144
    assert all(gene in cohort.panels[panel] for panel, gene in members)
    assert 0.3 < cohort.patients["event"].mean() < 0.75


def test_slides_and_genes_show_their_own_latent(cohorts):
    cohort = cohorts["X1"]
    z1, z2 = cohort.truth["z1"], cohort.truth["z2"]
    mean = [
        np.concatenate([cohort.bags[slide] for slide in slides])[:, :4].astype(float).mean()
        for slides in cohort.patients["slide_ids"]
    ]
    genes = [f"G{i:04d}" for group in range(2) for i in range(group * 20, group * 20 + 10)]
    score = cohort.panels["rna"][genes].mean(axis=1)
    assert np.corrcoef(mean, z1)[0, 1] > 0.85
    assert np.corrcoef(score, z2)[0, 1] > 0.9
    assert abs(np.corrcoef(mean, z2)[0, 1]) < 0.3
    assert abs(np.corrcoef(score, z1)[0, 1]) < 0.3


def test_the_constants_of_the_images_hold_here_too():
    assert (planted.SHARE_INTERCEPT, planted.SHARE_SLOPE) == (simulate.SHARE_INTERCEPT, simulate.SHARE_SLOPE)


def test_equal_designs_give_equal_cohorts_and_seeds_others(cohorts):
    again, other = plant(Design("S3", n=100)), plant(Design("S3", n=100, seed=1))
    pd.testing.assert_frame_equal(again.patients, cohorts["S3"].patients)
    assert all(np.array_equal(bag, cohorts["S3"].bags[slide]) for slide, bag in again.bags.items())
    assert not np.array_equal(other.patients["time_months"], cohorts["S3"].patients["time_months"])


@pytest.mark.parametrize("twist", ["mixed", "permuted"])
def test_a_twist_moves_one_thing_and_leaves_nobody_in_place(cohorts, twist):
    plain, twisted = cohorts["S3"], plant(Design("S3", twist, n=100))
    moved = ["slide_ids", "n_slides"] if twist == "mixed" else ["time_months", "event"]
    kept = [column for column in plain.patients if column not in moved]
    pd.testing.assert_frame_equal(plain.patients[kept], twisted.patients[kept])
    pairs = list(zip(plain.patients[moved[0]], twisted.patients[moved[0]], strict=True))
    if twist == "mixed":
        assert all(before != after for before, after in pairs)
    assert sorted(map(str, (a for a, _ in pairs))) == sorted(map(str, (b for _, b in pairs)))
    pd.testing.assert_frame_equal(plain.panels["rna"], twisted.panels["rna"])
    c = harrell(twisted.patients["time_months"], twisted.patients["event"], twisted.truth["eta"]).c
    assert c == pytest.approx(harrell(plain.patients["time_months"], plain.patients["event"], plain.truth["eta"]).c)


def test_the_files_are_those_of_the_train_step(cohorts, tmp_path):
    cohort = cohorts["X1"]
    files = cohort.write(tmp_path / "x1", ["random", "site"], 3)
    for scheme in ("random", "site"):
        fold, outcomes = load_fold(
            patients=files.patients,
            index=files.index,
            panels=files.panels,
            groups=files.groups,
            splits=files.splits(scheme),
            repeat=0,
            fold=1,
        )
        assert len(fold.ids()) == len(outcomes) == 100
        patient = fold.ids()[0]
        whole = np.concatenate(
            [cohort.bags[s] for s in cohort.patients.set_index("patient_id").at[patient, "slide_ids"]]
        )
        assert np.array_equal(fold.bag(patient)[0], whole.astype(np.float32))
        assert len(fold.groups) == 6
    sites = outcomes.merge(cohort.patients[["patient_id", "site"]], on="patient_id")
    tested = set(sites.loc[sites["role"] == "test", "site"])
    assert not tested & set(sites.loc[sites["role"] != "test", "site"])
    assert files.complete(cohort.design, ["random", "site"], 3)
    assert not files.complete(Design("X1", n=100, seed=1), ["random", "site"], 3)
    assert not PlantedFiles(tmp_path / "nothing").complete(cohort.design, ["random"], 3)


def test_what_cannot_be_planted_is_refused():
    for wrong in ({"scenario": "S9"}, {"twist": "turned"}, {"n": 5}, {"dim": 4}, {"genes": 54}):
        with pytest.raises(MorphomeError, match=r"choose one of|at least"):
            Design(**wrong)


def test_stratified_c_is_harrells_within_one_fold_and_ignores_shifts_between_folds():
    rng = np.random.default_rng(3)
    time, event, risk = rng.exponential(size=60).round(1), rng.integers(0, 2, 60), rng.normal(size=60).round(1)
    fold = np.arange(60) % 3
    assert stratified_c(time, event, risk, np.zeros(60)) == pytest.approx(harrell(time, event, risk).c)
    parts = [harrell(time[fold == k], event[fold == k], risk[fold == k]) for k in range(3)]
    want = sum(p.c * p.comparable for p in parts) / sum(p.comparable for p in parts)
    assert stratified_c(time, event, risk, fold) == pytest.approx(want)
    assert stratified_c(time, event, risk + 100 * fold, fold) == pytest.approx(want)
    assert np.isnan(stratified_c(time, np.zeros(60, dtype=int), risk, fold))
