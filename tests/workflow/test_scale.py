"""Ten thousand slides of all TCGA projects: how long the graph takes to build, and a run that has nothing to do.

Processor time is measured, since a clock counts the neighbours of a shared machine too.
"""

from __future__ import annotations

import importlib.util
import re
import resource
import uuid
from pathlib import Path

import pytest
import yaml

from morphome.config import check_config
from morphome.download.listing import GdcFile, tsv, write_manifest
from morphome.download.manifest import SHEET_COLUMNS, sheet_row
from morphome.download.published import published_names
from morphome.files import write_json, write_text
from morphome.paths import PUBLISHED, RUN_FILES, Paths
from morphome.workflow import run_folders, slide_jobs

spec = importlib.util.spec_from_file_location("checkout", Path(__file__).with_name("checkout.py"))
checkout = importlib.util.module_from_spec(spec)
spec.loader.exec_module(checkout)

pytestmark = pytest.mark.workflow

N_SLIDES = 10_000
PROJECTS = [
    f"TCGA-{name}"
    for name in [
        "BLCA",
        "BRCA",
        "COAD",
        "GBM",
        "HNSC",
        "KIRC",
        "KIRP",
        "LGG",
        "LIHC",
        "LUAD",
        "LUSC",
        "PAAD",
        "READ",
        "SKCM",
        "STAD",
        "UCEC",
    ]
]
DATA_TYPES = {
    "slides": "Slide Image",
    "rna": "Gene Expression Quantification",
    "mut": "Masked Somatic Mutation",
    "cnv": "Gene Level Copy Number",
}
BUILD_SECONDS, NOTHING_SECONDS = 30, 45


def seconds(run):
    """Processor seconds of the processes that ``run`` starts, and its result."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result


def listed(number, kind, name, code):
    """One file of the manifest; eight hospitals a project."""
    project = PROJECTS[number % len(PROJECTS)]
    patient = f"TCGA-{chr(65 + number % 26)}{number % 8}-{number:04X}"
    file_id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{kind}{number}"))
    return GdcFile(
        file_id=file_id,
        name=name.format(patient=patient, number=number),
        md5=f"{number:032x}",
        size=10**9,
        state="released",
        kind=kind,
        data_type=DATA_TYPES[kind],
        workflow="",
        project=project,
        case_ids=(patient,),
        sample_ids=(f"{patient}-{code}",),
        data_release="12.0 - 45.0",
    )


@pytest.fixture(scope="module")
def large(repository, tmp_path_factory):
    """A checkout whose configuration asks for 10,000 slides and their tables, with the GDC's answer."""
    copy = checkout.Checkout(repository, tmp_path_factory.mktemp("large"))
    config = yaml.safe_load((repository / "resources/cohorts/tcga_hnsc.yaml").read_text())
    config |= {"name": "small", "gdc": {"projects": PROJECTS, "data_release": "45.0"}}
    config["features"] = {"encoder": "stain_texture"}
    del config["cohort"]["clinical"]["types"]
    (copy.folder / "small.yaml").write_text(yaml.safe_dump(config))
    names = {
        "slides": ("{patient}-01Z-00-DX1.{number}.svs", "01Z"),
        "rna": ("{number}.augmented_star_gene_counts.tsv", "01A"),
        "mut": ("{number}.maf.gz", "01A"),
        "cnv": ("{number}.ascat3.gene_level_copy_number.v36.tsv", "01A"),
    }
    files = [listed(number, kind, *names[kind]) for kind in names for number in range(N_SLIDES)]
    resolved = check_config(config, files=False)
    paths = Paths({**resolved, "output": str(copy.folder / "results")})
    write_manifest(files, paths.gdc_manifest)
    rows = [sheet_row(file) for file in files]
    write_text(tsv([SHEET_COLUMNS, *([row.get(name, "") for name in SHEET_COLUMNS] for row in rows)]), paths.gdc_sheet)
    write_text("cases.submitter_id\n", paths.gdc / "clinical.tsv")
    write_json({}, paths.gdc_query, "morphome.gdc_query", {})
    return copy, resolved, paths


def everything(config, paths):
    """Every file that Snakemake looks for when all is done."""
    n_jobs = len(slide_jobs(config, range(N_SLIDES)))
    runs = [
        file
        for _, folder in run_folders({**config, "output": str(paths.root.parent)})
        for file in (folder / name for name in RUN_FILES)
    ]
    jobs = [
        make(job)
        for job in range(1, n_jobs + 1)
        for make in (paths.tile_job, paths.encode_job, lambda job: paths.fetched(f"slides_{job}"))
    ]
    return [
        *(paths.fetched(kind) for kind in ("rna", "mut", "cnv")),
        *jobs,
        paths.patients,
        paths.slides,
        paths.cohort_flow,
        *paths.panels.values(),
        paths.groups,
        paths.index,
        paths.audit,
        paths.analysis,
        paths.analysis_flow,
        paths.splits,
        paths.split_facts,
        *runs,
        *paths.evaluation_tables,
        paths.report,
        *paths.report_tables,
    ]


def test_the_graph_of_10000_slides_and_a_run_with_nothing_to_do(large):
    copy, config, paths = large
    published = [copy.folder / PUBLISHED / name for name in published_names()]
    for file in published:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    started = copy.snakemake("--configfile", "small.yaml", "--touch", "--until", "manifest")
    assert started.returncode == 0, started.stdout
    build, done = seconds(lambda: copy.snakemake("-n", "--configfile", "small.yaml", "--quiet", "all"))
    assert done.returncode == 0, done.stdout[-3000:]
    counts = {name: int(number) for name, number in re.findall(r"^(\w+) +(\d+)$", done.stdout, re.MULTILINE)}
    expected = -(-N_SLIDES // config["slides"]["per_job"])
    assert {counts[name] for name in ("fetch_slides", "tile", "encode")} == {expected}
    for file in everything(config, paths):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    touched = copy.snakemake("--configfile", "small.yaml", "--touch", "--quiet", "all")
    assert touched.returncode == 0, touched.stdout[-3000:]
    nothing, done = seconds(lambda: copy.snakemake("--configfile", "small.yaml"))
    assert "Nothing to be done" in done.stdout, done.stdout[-3000:]
    print(f"{N_SLIDES} slides: graph {build:.1f} s, nothing to do {nothing:.1f} s of processor time")
    assert build < BUILD_SECONDS
    assert nothing < NOTHING_SECONDS
