"""The workflow as a user starts it: one small run end to end, then what each change repeats."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

spec = importlib.util.spec_from_file_location("checkout", Path(__file__).parent / "checkout.py")
checkout_module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(checkout_module)
Checkout, SMALL = checkout_module.Checkout, checkout_module.SMALL

pytestmark = pytest.mark.workflow

RUNS = {f"train {model} 0 {fold}" for model in SMALL["models"] for fold in range(2)}
AFTER_TRAINING = {"evaluate", "report"}


@pytest.fixture(scope="module")
def finished(repository, tmp_path_factory):
    """The small run, done once."""
    copy = Checkout(repository, tmp_path_factory.mktemp("checkout with space"))
    copy.configure()
    done = copy.snakemake("--configfile", "small.yaml")
    assert done.returncode == 0, done.stdout[-6000:]
    assert "The report is ready" in done.stdout
    return copy


@pytest.fixture
def unchanged(finished):
    """The finished run; what a test changes is put back."""
    kept = {path: path.read_bytes() for path in (finished.folder / "src").rglob("*") if path.is_file()}
    yield finished
    for path, content in kept.items():
        if path.read_bytes() != content:
            path.write_bytes(content)
    finished.configure()


def results(checkout) -> Path:
    return checkout.folder / "results" / "small"


def test_every_product_is_there_and_the_bad_slide_is_listed(finished):
    root = results(finished)
    page = (root / "report" / "report.html").read_text()
    audit = pd.read_parquet(next(root.glob("features/*/audit.parquet")))
    bad = audit[audit["status"] != "ok"]
    assert len(bad) == 1
    assert bad["slide_id"].iloc[0] in page
    assert bad["reason"].iloc[0]
    oof = pd.read_parquet(root / "evaluation" / "oof.parquet")
    analysed = pd.read_parquet(root / "analysis" / "patients.parquet")
    for _, rows in oof.groupby("name"):
        assert sorted(rows["patient_id"]) == sorted(analysed["patient_id"])
    oracle = json.loads((root / "simulated" / "oracle.json").read_text())
    assert f"{oracle['oracle_c']:.3f}" in page


def test_a_second_run_does_nothing(finished):
    assert finished.jobs() == set()
    assert "Nothing to be done" in finished.snakemake("--configfile", "small.yaml").stdout


def test_a_changed_model_setting_retrains_that_model_alone(unchanged):
    unchanged.configure(models={**SMALL["models"], "mome": {**SMALL["models"]["mome"], "router": "soft"}})
    assert unchanged.jobs() == {run for run in RUNS if "mome" in run} | AFTER_TRAINING


def test_a_changed_report_template_redoes_the_report_alone(unchanged):
    template = next((unchanged.folder / "src/morphome/report/templates").glob("*.html*"))
    template.write_text(template.read_text() + "\n<!-- changed -->\n")
    assert unchanged.jobs() == {"report"}


def test_a_changed_metric_redoes_evaluation_and_report(unchanged):
    module = unchanged.folder / "src/morphome/evaluation/metrics.py"
    module.write_text(module.read_text() + "\n# changed\n")
    assert unchanged.jobs() == AFTER_TRAINING


def test_an_added_row_trains_that_row_alone(unchanged):
    unchanged.configure(models={**SMALL["models"], "random": None})
    assert unchanged.jobs() == {"train random 0 0", "train random 0 1"} | AFTER_TRAINING


def test_another_tiling_redoes_every_slide_but_no_table(unchanged):
    unchanged.configure(tiling={"min_tissue": 0.7})
    jobs = unchanged.jobs()
    assert {job.split()[0] for job in jobs} == {
        "tile", "encode", "collect", "assemble", "split", "train", "evaluate", "report",
    }  # fmt: skip


def test_a_changed_slide_redoes_its_own_chain_and_what_depends_on_it(unchanged):
    """Only its own group of slides is looked at again, and in it only this slide is worked on."""
    root = results(unchanged)
    marker = json.loads(next(root.glob("tiles/*/jobs/1.json")).read_text())
    by_name = {path.stem: path for path in (root / "simulated" / "slides").rglob("*.svs")}
    group = sorted(marker["slides"])
    changed, other = by_name[group[0]], by_name[group[1]]
    kept = changed.stat()
    content = changed.read_bytes()
    try:
        changed.write_bytes(other.read_bytes())
        expected = {"tile 1", "encode 1", "collect", "assemble", "split"}
        assert unchanged.jobs() == expected | RUNS | AFTER_TRAINING
        before = {path: path.stat().st_mtime_ns for path in root.glob("*/*/*.h5")}
        assert unchanged.snakemake("--configfile", "small.yaml", "--until", "encode").returncode == 0
        again = {path.stem for path, time in before.items() if path.stat().st_mtime_ns != time}
        audit = pd.read_parquet(next(root.glob("features/*/audit.parquet")))
        assert again - set(audit["slide_id"][audit["status"] == "failed"]) == {changed.stem}
    finally:
        changed.write_bytes(content)
        os.utime(changed, ns=(kept.st_atime_ns, kept.st_mtime_ns))
        assert unchanged.snakemake("--configfile", "small.yaml").returncode == 0


def test_a_corrected_mask_redoes_its_slide_alone(unchanged):
    """Slides share an encode job; those that did not change are passed over, and one that failed is tried again."""
    root = results(unchanged)
    audit = pd.read_parquet(next(root.glob("features/*/audit.parquet")))
    failed = set(audit["slide_id"][audit["status"] == "failed"])
    outline = min(root.glob("tiles/*/*.geojson"), key=lambda path: (path.stat().st_size < 1000, path.name))
    masks = unchanged.folder / "masks"
    masks.mkdir()
    (masks / outline.name).write_text(outline.read_text())
    before = {path: path.stat().st_mtime_ns for path in root.glob("features/*/*.h5")}
    unchanged.configure(tiling={"masks": "masks"})
    try:
        done = unchanged.snakemake("--configfile", "small.yaml", "--until", "collect")
        assert done.returncode == 0, done.stdout[-4000:]
        again = {path.stem for path, time in before.items() if path.stat().st_mtime_ns != time}
        assert again - failed == {outline.stem}
        qc = json.loads((outline.with_suffix(".json")).read_text())
        assert qc["mask_source"] == "geojson"
    finally:
        shutil.rmtree(masks)
        unchanged.configure()
        assert unchanged.snakemake("--configfile", "small.yaml").returncode == 0


def test_a_step_runs_by_hand_and_refuses_a_file_of_other_settings(unchanged):
    def by_hand(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "morphome", *arguments],
            cwd=unchanged.folder,
            env={**os.environ, "PYTHONPATH": str(unchanged.folder / "src")},
            capture_output=True,
            text=True,
            check=False,
        )

    page = results(unchanged) / "report" / "report.html"
    before = page.stat().st_mtime_ns
    done = by_hand("report", "--config", "small.yaml")
    assert done.returncode == 0, done.stderr
    assert page.stat().st_mtime_ns > before
    unchanged.configure(splits={**SMALL["splits"], "seed": 9})
    refused = by_hand("train", "--config", "small.yaml", "--model", "clinical_cox")
    assert refused.returncode == 1
    assert "made by other settings" in refused.stderr
    assert "random.parquet" in refused.stderr


def test_a_wrong_configuration_stops_before_the_dag(unchanged):
    unchanged.configure(tiling={"mpp": 0.5})
    done = unchanged.snakemake("-n", "--configfile", "small.yaml")
    assert done.returncode != 0
    assert "tiling.mpp: unknown key (did you mean 'mpp_target'?)" in done.stdout
    assert "Traceback" not in done.stdout


def test_single_keys_are_changed_on_the_command_line(repository, tmp_path):
    """As config/README.md says, on the default configuration."""
    copy = Checkout(repository, tmp_path / "checkout")
    done = copy.snakemake("-n", "--config", "training={epochs: 3}", "cohort={min_events: 5}")
    assert done.returncode == 0, done.stdout
    assert "train mome, repeat 0, fold 2" in done.stdout
    written = json.loads(next((copy.folder / "results/demo/config").glob("*.json")).read_text())
    assert written["training"]["epochs"] == 3
    assert written["cohort"]["min_events"] == 5


def test_tables_come_before_slides(repository):
    """A table that cannot be read must not be found after hours of slides."""
    rules = (repository / "workflow" / "rules" / "cohort.smk").read_text()
    assert rules.count("priority: 100") == 2  # cohort and genes; slides have 10 and 20


def test_too_few_events_is_one_message_in_the_output(unchanged):
    unchanged.configure(cohort={**SMALL["cohort"], "min_events": 15})
    done = unchanged.snakemake("--configfile", "small.yaml", "--until", "cohort")
    assert done.returncode != 0
    assert "cohort.min_events" in done.stdout
    # The manifest of the good configuration was taken away by Snakemake; make it again for the tests that follow.
    unchanged.configure()
    assert unchanged.snakemake("--configfile", "small.yaml").returncode == 0


def test_the_same_rules_run_in_conda_environments(repository, tmp_path):
    copy = Checkout(repository, tmp_path / "checkout")
    copy.configure()
    stand_in = Path(__file__).parent / "conda_stand_in" / "bin"
    log = tmp_path / "conda.log"
    path = f"{stand_in}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = copy.snakemake(
        "--configfile", "small.yaml", "--use-conda", "results/small/cohort/patients.parquet",
        environment={"PATH": path, "CONDA_STAND_IN_LOG": str(log)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert len(log.read_text().splitlines()) == 2  # slides.yaml and models.yaml, each made once
    assert (copy.folder / "results/small/cohort/patients.parquet").exists()


def test_the_graph_of_the_readme_is_the_graph_of_the_rules(finished, repository):
    """Every rule stands in it, and every arrow is one that Snakemake draws too."""
    drawn = finished.snakemake("--rulegraph", "mermaid-js", "--configfile", "small.yaml").stdout
    name = dict(re.findall(r"(id\d+)\[(\w+)\]", drawn))
    arrows = {(name[a], name[b]) for a, b in re.findall(r"(id\d+) --> (id\d+)", drawn)}
    shown = re.findall(r"^    (\w+) --> (\w+)$", (repository / "README.md").read_text(), re.MULTILINE)
    assert {rule for arrow in shown for rule in arrow} == set(name.values()) - {"all", "default"}
    assert set(shown) <= arrows


def test_the_dag_is_built_with_nothing_but_snakemake(repository):
    """An environment that only has Snakemake has PyYAML and jsonschema, and nothing of the sciences."""
    program = f"""
import sys
class Only:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in {{"numpy", "pandas", "typer", "rich", "torch", "h5py", "PIL", "skimage", "scipy", "pyarrow", "tqdm",
                    "openslide", "shapely", "sksurv", "matplotlib", "safetensors"}}:
            raise ImportError(f"the DAG must not need {{name}}")
sys.meta_path.insert(0, Only())
sys.path.insert(0, {str(repository / "src")!r})
from morphome.config import load_config
from morphome.paths import Paths
from morphome.steps import STEPS, code_hash, step_key
from morphome.workflow import *
import morphome.workflow as w
config = load_config({str(repository / "config.yaml")!r})
paths = Paths(config)
assert len(w.slide_paths(config)) > 50 and paths.features("x") and w.molecular_files(config)
assert all(code_hash(s) for s in STEPS) and step_key(config, "tile", slide="x")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
