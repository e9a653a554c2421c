"""Commands that fetch, against the server of the tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from morphome.cli import app
from morphome.paths import PUBLISHED

SERVER = Path(__file__).parent / "download" / "gdc_server.py"
runner = CliRunner()


@pytest.fixture
def server():
    spec = importlib.util.spec_from_file_location("gdc_server", SERVER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cases = ["TCGA-AA-0001", "TCGA-AA-0002"]
    records = [module.slide_record(case) for case in cases] + [module.rna_record(case) for case in cases]
    with module.GdcServer(records, [module.case_record(case) for case in cases]) as running:
        yield running


@pytest.fixture
def morphome(server, tmp_path, monkeypatch):
    """A command over a small configuration, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    config = {
        "name": "own",
        "gdc": {"projects": ["TCGA-COAD"], "api": server.url, "folder": "files"},
        "cohort": {"clinical": {"format": "tcga_cdr", "path": "{published}/TCGA-CDR-SupplementalTableS1.xlsx"}},
        "slides": {"sheet": "{gdc}/sample_sheet.tsv", "folder": "{gdc_files}"},
        "molecular": {
            "sheet": "{gdc}/sample_sheet.tsv",
            "rna": {"format": "star_counts", "path": "{gdc_files}"},
        },
        "models": {"random": None},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))

    def run(*arguments):
        return runner.invoke(app, [*arguments, "--config", "config.yaml"])

    return run


def test_a_manifest_and_its_files(morphome, server):
    done = morphome("manifest")
    assert done.exit_code == 0, done.output
    assert morphome("fetch", "--panel", "rna").exit_code == 0
    assert morphome("fetch", "--job", "1").exit_code == 0
    assert len(list(Path("files").rglob("*.svs"))) == 2
    asked = len(server.log)
    assert morphome("fetch", "--job", "1").exit_code == 0  # all is there
    assert len(server.log) == asked


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fetch"], "either --job or --panel"),
        (["fetch", "--job", "2"], "there are 1 jobs"),
        (["fetch", "--panel", "cnv"], "one of rna"),
        (["fetch", "--panel", "slides"], "one of rna"),
    ],
)
def test_what_cannot_be_fetched_is_one_message(morphome, arguments, words):
    assert morphome("manifest").exit_code == 0
    done = morphome(*arguments)
    assert done.exit_code == 1
    assert words in done.output
    assert "Remedy" in done.output


def test_the_limit_of_a_download_reaches_it(morphome, monkeypatch):
    seen = {}
    monkeypatch.setattr("morphome.download.fetch.run_fetch", lambda **options: seen.update(options))
    assert morphome("manifest").exit_code == 0
    assert morphome("fetch", "--panel", "rna", "--mb-per-second", "2.5").exit_code == 0
    assert (seen["mb_per_second"], seen["connections"]) == (2.5, 4)


def test_a_published_file_of_other_bytes_is_refused_where_it_is_read(morphome):
    assert morphome("manifest").exit_code == 0
    PUBLISHED.mkdir(parents=True)
    (PUBLISHED / "TCGA-CDR-SupplementalTableS1.xlsx").write_bytes(b"saved anew")
    for command in ("cohort", "check"):
        done = morphome(command)
        assert done.exit_code == 1
        assert "another edition" in done.output


def test_published_files_are_listed_with_licence_and_what_to_cite(morphome):
    done = morphome("published")
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert len(lines) >= 5
    assert all("Licence: " in line and "Cite: " in line for line in lines)
