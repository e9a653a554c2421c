"""The cohorts that are ready to run: each is a whole configuration, and its graph is what it should be."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from morphome.config import check_config
from morphome.download.published import published_file

COHORTS = Path(__file__).resolve().parents[2] / "resources" / "cohorts"
PRESETS = sorted(path for path in COHORTS.glob("tcga_*.yaml") if "gdc" in yaml.safe_load(path.read_text()))
ASKED = {
    "hnsc",
    "blca",
    "brca",
    "ucec",
    "luad",
    "lusc",
    "gbmlgg",
    "kirc",
    "kirp",
    "coadread",
    "stad",
    "lihc",
    "paad",
    "skcm",
}


def test_the_cohorts_are_all_there():
    assert {path.stem.removeprefix("tcga_") for path in PRESETS} == ASKED


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_all_that_a_reader_asks(path):
    config = check_config(yaml.safe_load(path.read_text()))
    assert config["name"] == path.stem
    assert re.fullmatch(r"[0-9]+\.[0-9]+", config["gdc"]["data_release"])  # pinned
    types = config["cohort"]["clinical"]["types"]
    assert config["gdc"]["projects"] == [f"TCGA-{name}" for name in types]
    assert config["cohort"]["sample_types"] == (["06", "01"] if types == ["SKCM"] else ["01"])
    assert published_file(Path(config["cohort"]["clinical"]["path"]).name)
    assert published_file(Path(config["molecular"]["groups"]["path"]).name)
    assert {"random", "clinical_cox"} <= set(config["models"])
    assert config["splits"]["scheme"] == "site"
    assert f"--configfile resources/cohorts/{path.name} " in path.read_text()


@pytest.mark.workflow
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_graph_of_a_preset(path, repository, tmp_path):
    """On a machine that has nothing yet, and without a network."""
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "snakemake"),
            "-n",
            "--cores",
            "2",
            "--nocolor",
            "--directory",
            str(tmp_path),
            "--snakefile",
            str(repository / "Snakefile"),
            "--configfile",
            str(path),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    counts = {name: int(number) for name, number in re.findall(r"^(\w+) +(\d+)$", said, re.MULTILINE)}
    models, folds = len(yaml.safe_load(path.read_text())["models"]), yaml.safe_load(path.read_text())["splits"]["folds"]
    assert counts["train"] == models * folds
    expected = {
        "manifest": 1,
        "published": 2,
        "fetch_tables": 3,
        "cohort": 1,
        "genes": 1,
        "collect": 1,
        "split": 1,
        "assemble": 1,
        "evaluate": 1,
        "report": 1,
    }
    assert {name: counts.get(name) for name in expected} == expected
