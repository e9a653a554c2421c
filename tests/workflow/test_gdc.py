"""A small cohort from the API of the GDC to the report: asked for, fetched through faults, encoded, deleted."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).parent
checkout = load(HERE / "checkout.py")
gdc_server = load(HERE.parent / "download" / "gdc_server.py")
Checkout, SMALL = checkout.Checkout, checkout.SMALL

pytestmark = pytest.mark.workflow

PROJECT = "SIM-DEMO"
GDC = {
    "cohort": {
        "clinical": {"format": "gdc_clinical", "path": "{gdc}/clinical.tsv"},
        "require": ["wsi", "rna"],
        "min_events": 4,
    },
    "slides": {"sheet": "{gdc}/sample_sheet.tsv", "folder": "{gdc_files}", "per_job": 5},
    "molecular": {
        "sheet": "{gdc}/sample_sheet.tsv",
        "rna": {"format": "star_counts", "path": "{gdc_files}"},
        "mut": {"format": "maf", "path": "{gdc_files}"},
        "expression": {"format": "star_counts", "path": "{gdc_files}"},
    },
    "models": {"clinical_cox": None, "coxnet_genes": None},
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A planted cohort on disk: its folder, and the records that the GDC would have of it."""
    from morphome.cohort.design import design
    from morphome.cohort.simulate import run_simulate
    from morphome.config import check_config

    folder = tmp_path_factory.mktemp("planted")
    settings = {"simulate": check_config({**SMALL, "output": str(folder)})["simulate"]}
    run_simulate(settings=settings, folder=folder, threads=2)
    plan = design(settings["simulate"])
    records, contents = [], {}
    for slide in plan.slides:
        contents[slide.file_id] = folder / "slides" / slide.file_name
        files = {"file_name": slide.file_name, "file_id": slide.file_id, "body": contents[slide.file_id]}
        records.append(gdc_server.slide_record(slide.patient_id, slide.number, project=PROJECT, **files))
    makers = {"rna": gdc_server.rna_record, "mut": gdc_server.maf_record, "cnv": gdc_server.cnv_record}
    for file in plan.molecular:
        if file.panel != "cnv":
            contents[file.file_id] = folder / file.path
            files = {"file_name": file.file_name, "file_id": file.file_id, "body": contents[file.file_id]}
            records.append(makers[file.panel](file.patient_id, project=PROJECT, **files))
    cases = {}
    for row in csv.DictReader((folder / "clinical.tsv").read_text().splitlines(), delimiter="\t"):
        number = {k: None if v.startswith("'--") else v for k, v in row.items()}
        cases[row["case_submitter_id"]] = gdc_server.case_record(
            row["case_submitter_id"],
            project=PROJECT,
            vital_status=row["vital_status"],
            days_to_death=int(number["days_to_death"]) if number["days_to_death"] else None,
            days_to_last_follow_up=int(number["days_to_last_follow_up"]) if number["days_to_last_follow_up"] else None,
            age_days=int(number["age_at_diagnosis"]) if number["age_at_diagnosis"] else None,
            stage=number["ajcc_pathologic_stage"],
        )
    return folder, plan, (records, list(cases.values()), contents)


def configure(copy, server, **changes):
    gdc = {"projects": [PROJECT], "api": server.url, "folder": "files", **changes.pop("gdc", {})}
    return copy.configure(**{**GDC, "simulate": None, "gdc": gdc, **changes})


def asked_for(server, file_ids):
    """How often the bytes of each file were asked for."""
    asked = [path.rsplit("/", 1)[-1] for method, path, _ in server.log if "/data/" in path]
    return {file_id: asked.count(file_id) for file_id in file_ids}


def test_from_the_api_to_the_report_and_slides_deleted_on_the_way(planted, repository, tmp_path):
    _, plan, served = planted
    slides = [slide.file_id for slide in plan.slides]
    tables = [file.file_id for file in plan.molecular if file.panel != "cnv"]
    faults = {
        slides[0]: ["503", "cut:5000"],
        slides[1]: ["corrupt"],
        slides[2]: ["cut:0", "short"],
        tables[0]: ["429", "wrongmd5"],
        "/files": ["503"],
        "/cases": ["500"],
    }
    copy = Checkout(repository, tmp_path / "checkout")
    with gdc_server.GdcServer(*served, faults=faults, max_page=7) as server:
        configure(copy, server, gdc={"delete_slides": True, "data_release": "45.0"})
        first = copy.jobs()
        assert {"manifest", "fetch_tables", "cohort", "genes", "collect", "report"} <= first
        assert not any(job.startswith(("tile", "encode")) for job in first)  # nobody knows yet which slides there are
        done = copy.snakemake("--configfile", "small.yaml")
        assert done.returncode == 0, done.stdout[-6000:]
        root = copy.folder / "results" / "small"
        page = (root / "report" / "report.html").read_text()
        assert "45.0" in page
        audit = pd.read_parquet(next(root.glob("features/*/audit.parquet")))
        assert len(audit) == len(slides)
        assert (audit["status"] != "ok").sum() == 1  # the planted bad slide
        query = json.loads((root / "gdc" / "query.json").read_text())
        assert "45.0" in json.dumps(query)
        patients = pd.read_parquet(root / "analysis" / "patients.parquet")
        assert sorted(patients["patient_id"]) == sorted(plan.patients)
        assert not list((copy.folder / "files").rglob("*.svs"))
        assert not list((copy.folder / "files").rglob("*.part"))
        assert set(asked_for(server, tables[1:]).values()) == {1}
        # A second run asks nobody for anything.
        before = len(server.log)
        assert copy.jobs() == set()
        assert len(server.log) == before
        # Slides are gone. A setting that does not need their pixels leaves them where they are ...
        options = {"delete_slides": True, "data_release": "45.0"}
        configure(copy, server, gdc=options, evaluation={"horizon_months": 18, "bootstrap": 10})
        assert copy.jobs() == {"evaluate", "report"}
        # ... and so does another question to the GDC that has the same slides for an answer.
        molecular = {key: table for key, table in GDC["molecular"].items() if key != "mut"}
        configure(copy, server, gdc=options, molecular=molecular)
        before = asked_for(server, slides)
        done = copy.snakemake("--configfile", "small.yaml")
        assert done.returncode == 0, done.stdout[-6000:]
        assert asked_for(server, slides) == before
        assert "mut" not in json.loads((root / "gdc" / "query.json").read_text())["kinds"]
        # One that needs them brings them back, in other groups too.
        more = {"tiling": {"min_tissue": 0.7}, "slides": {**GDC["slides"], "per_job": 9}}
        configure(copy, server, gdc=options, molecular=molecular, **more)
        again = copy.jobs()
        assert {job for job in again if job.startswith("fetch_slides")} == {
            f"fetch_slides {n}" for n in range(1, -(-len(slides) // 9) + 1)
        }
        assert not {"manifest", "fetch_tables"} & again
        done = copy.snakemake("--configfile", "small.yaml", "--until", "collect")
        assert done.returncode == 0, done.stdout[-6000:]
        assert not list(copy.folder.rglob("*.svs"))


def test_a_server_that_is_away_costs_no_list_and_is_asked_again(planted, repository, tmp_path):
    _, _, served = planted
    copy = Checkout(repository, tmp_path / "checkout")
    molecular = {key: table for key, table in GDC["molecular"].items() if key != "mut"}
    listed = "results/small/gdc/fetched/rna.json"
    with gdc_server.GdcServer(*served) as server:
        configure(copy, server, molecular=molecular)
        assert copy.snakemake(listed, "--configfile", "small.yaml").returncode == 0
        content = (copy.folder / "results/small/gdc/manifest.tsv").read_bytes()
        server.faults["/status"] = ["404"]
        configure(copy, server)
        done = copy.snakemake(listed, "--configfile", "small.yaml")
        assert done.returncode != 0
        kept = next((copy.folder / "results/small/gdc/lists").iterdir())
        assert f"gdc/lists/{kept.name}" in done.stdout
        assert (kept / "manifest.tsv").read_bytes() == content
        # The new question was not answered, so it is asked again.
        assert copy.snakemake("results/small/gdc/fetched/mut.json", "--configfile", "small.yaml").returncode == 0
        fetched = json.loads((copy.folder / "results/small/gdc/fetched/mut.json").read_text())
        assert len(fetched["files"]) > 5


def test_files_on_disk_are_used_where_they_are_and_never_deleted(planted, repository, tmp_path):
    folder, plan, served = planted
    copy = Checkout(repository, tmp_path / "checkout")
    slides = {slide.file_name: slide.file_id for slide in plan.slides}
    mine, first = copy.folder / "files" / "mine", plan.slides[0]
    shutil.copytree(folder / "slides", mine)
    place = copy.folder / "files" / first.file_id
    place.mkdir()
    (mine / first.file_name).rename(place / first.file_name)  # as gdc-client would have left it
    with gdc_server.GdcServer(*served) as server:
        configure(copy, server, gdc={"have": ["files/mine"], "delete_slides": True})
        done = copy.snakemake("--configfile", "small.yaml", "--until", "collect")
        assert done.returncode == 0, done.stdout[-6000:]
        assert set(asked_for(server, slides.values()).values()) == {0}
    audit = pd.read_parquet(next((copy.folder / "results/small/features").glob("*/audit.parquet")))
    assert len(audit) == len(slides)
    assert {path.name for path in mine.iterdir()} | {first.file_name} == set(slides)
    assert (place / first.file_name).exists()


def test_everything_that_needs_a_network_can_be_fetched_first(planted, repository, tmp_path):
    _, plan, served = planted
    copy = Checkout(repository, tmp_path / "checkout")
    with gdc_server.GdcServer(*served) as server:
        configure(copy, server)
        done = copy.snakemake("downloads", "--configfile", "small.yaml")
        assert done.returncode == 0, done.stdout[-6000:]
        assert {path.name for path in (copy.folder / "files").rglob("*.svs")} == {s.file_name for s in plan.slides}
    # The server is gone; the rest needs nobody.
    jobs = copy.jobs()
    assert not [job for job in jobs if job.startswith(("fetch", "manifest"))]
    assert [job for job in jobs if job.startswith("tile")]


def test_a_server_that_stays_away_is_one_message_and_leaves_nothing(planted, repository, tmp_path):
    _, _, served = planted
    copy = Checkout(repository, tmp_path / "checkout")
    with gdc_server.GdcServer(*served, faults={"/status": ["404", "always"]}) as server:
        configure(copy, server)
        done = copy.snakemake("--configfile", "small.yaml")
    assert done.returncode != 0
    assert server.url in done.stdout
    assert "Traceback" not in done.stdout
    assert not list((copy.folder / "results/small/gdc").glob("*.tsv"))
