"""The command line: reads like a table of contents, and says in one line what a user can mend."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from morphome.cli import app
from morphome.config import check_config
from morphome.steps import STEPS

runner = CliRunner()


def test_help_lists_the_steps_in_the_order_of_the_data():
    text = runner.invoke(app, ["--help"]).output
    commands = re.findall(r"^│ (\w+)  ", text, re.MULTILINE)
    steps = [step for step in STEPS if step != "import"]
    assert commands == ["check", *steps, "models", "validate", "encoders", "features", "bench"]


def test_check_says_where_the_report_will_be(repository, monkeypatch):
    monkeypatch.chdir(repository)
    done = runner.invoke(app, ["check"])
    assert done.exit_code == 0
    assert "results/demo/report/report.html" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "--config", "absent.yaml"], ["absent.yaml", "not found", "Remedy"]),
        (["train", "--model", "mone"], ["models.mone", "mome", "Remedy"]),
        (["split"], ["patients.parquet", "not found", "Remedy"]),
    ],
)
def test_an_error_is_one_message_and_exit_code_1(repository, tmp_path, arguments, words):
    config = yaml.safe_load((repository / "config.yaml").read_text())
    config["output"] = str(tmp_path / "out")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "morphome", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_the_readmes_own_cohort_is_a_valid_configuration(repository):
    readme = (repository / "README.md").read_text()
    block = re.search(r"```yaml\n# mine\.yaml\n(.*?)```", readme, re.DOTALL)[1]
    full = check_config(yaml.safe_load(block), files=False)
    assert full["name"] == "mine"
    assert set(full["models"]) == {"random", "clinical_cox", "coxnet_genes", "mean_pool_cox", "abmil", "mome"}


def test_the_readmes_table_names_every_model(repository):
    from morphome.models.catalog import models

    rows = re.findall(r"^\| `(\w+)` \|", (repository / "README.md").read_text(), re.MULTILINE)
    assert set(models()) <= set(rows)


def test_models_are_listed_with_what_they_see(repository):
    text = runner.invoke(app, ["models"]).output
    for line in (
        "mome: MoME (sees gene groups, slides; can do without genes)",
        "ghanet: G-HANet (sees slides and genes in training)",
        "snn: SNN (sees genes)",
        "random: Random score (sees nothing)",
    ):
        assert line in text
