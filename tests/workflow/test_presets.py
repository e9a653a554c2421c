"""The cohorts that are ready to run: each is a whole configuration, and its graph is what it should be."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from morphome.cohort import clinical_cdr
from morphome.cohort.clinical import read_clinical
from morphome.cohort.flow import drop_unusable
from morphome.config import check_config
from morphome.download.published import published_file
from morphome.splits import make_splits

COHORTS = Path(__file__).resolve().parents[2] / "resources" / "cohorts"
PRESETS = sorted(path for path in COHORTS.glob("tcga_*.yaml") if "gdc" in yaml.safe_load(path.read_text()))
#: End point and horizon in months (Liu et al. 2018 and the horizon rule on site-preserved folds).
ASKED = {
    "hnsc": ("OS", 36), "blca": ("OS", 36), "brca": ("PFI", 36), "ucec": ("PFI", 36), "luad": ("OS", 36),
    "lusc": ("OS", 36), "gbmlgg": ("OS", 36), "kirc": ("OS", 60), "kirp": ("PFI", "auto"), "coadread": ("PFI", 24),
    "stad": ("OS", 24), "lihc": ("OS", 24), "paad": ("OS", "auto"), "skcm": ("OS", 60),
}  # fmt: skip


def test_the_cohorts_are_all_there():
    assert {path.stem.removeprefix("tcga_") for path in PRESETS} == set(ASKED)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_all_that_a_reader_asks(path):
    config = check_config(yaml.safe_load(path.read_text()))
    assert config["name"] == path.stem
    assert re.fullmatch(r"[0-9]+\.[0-9]+", config["gdc"]["data_release"])  # pinned
    asked = (config["cohort"]["endpoint"], config["evaluation"]["horizon_months"])
    assert asked == ASKED[path.stem.removeprefix("tcga_")]
    types = config["cohort"]["clinical"]["types"]
    assert config["gdc"]["projects"] == [f"TCGA-{name}" for name in types]
    assert config["cohort"]["sample_types"] == (["06", "01"] if types == ["SKCM"] else ["01"])
    assert published_file(Path(config["cohort"]["clinical"]["path"]).name)
    assert published_file(Path(config["molecular"]["groups"]["path"]).name)
    assert {"random", "clinical_cox"} <= set(config["models"])
    assert config["splits"]["scheme"] == "site"
    assert f"--configfile resources/cohorts/{path.name} " in path.read_text()


def test_the_folds_carry_the_horizons(shared_data, monkeypatch):
    """All patients of TCGA-CDR, so an upper bound: with slides and RNA there are fewer."""
    cdr = shared_data / "tables/tcga_cdr/TCGA-CDR-SupplementalTableS1.xlsx"
    monkeypatch.setattr(clinical_cdr, "_read_book", functools.cache(clinical_cdr._read_book))  # read once
    for path in PRESETS:
        config = check_config(yaml.safe_load(path.read_text()))
        cohort, horizon = config["cohort"], config["evaluation"]["horizon_months"]
        found = read_clinical("tcga_cdr", cdr, endpoint=cohort["endpoint"], types=cohort["clinical"]["types"])
        table = drop_unusable(found)[0].sort_values("patient_id").reset_index(drop=True)
        _, facts = make_splits(table, config["splits"], horizon)
        if horizon == "auto":
            assert facts["horizon_rule_months"] is None, path.name  # as its header says
        else:
            assert facts["horizon_accepted"], f"{path.name}: {facts['horizon_reason']}"


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
