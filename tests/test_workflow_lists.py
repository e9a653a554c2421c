"""What the DAG is made of, where it depends on the GDC and on weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from morphome.config import check_config
from morphome.errors import MorphomeError
from morphome.workflow import (
    encodes_rna,
    fetched_weights,
    gdc_kinds,
    molecular_files,
    rna_files,
    rna_substitution,
    slide_jobs,
    slide_paths,
    slides_from_gdc,
)


@pytest.fixture
def preset(repository, monkeypatch, tmp_path):
    """The configuration of a preset, with changes, checked in an empty folder."""
    monkeypatch.chdir(tmp_path)
    given = yaml.safe_load((repository / "resources/cohorts/tcga_hnsc.yaml").read_text())

    def checked(**changes):
        return check_config({**given, **changes})

    return checked


def test_kinds_are_what_the_panels_read_from_the_gdc(preset):
    assert gdc_kinds(preset()) == ["slides", "rna", "mut", "cnv"]
    Path("own.maf").write_text("x")
    Path("bags").mkdir()
    only = {
        "sheet": "{gdc}/sample_sheet.tsv",
        "expression": {"format": "star_counts", "path": "{gdc_files}"},
        "mut": {"format": "maf", "path": "own.maf"},
    }
    few = {"random": None}
    cohort = {**preset()["cohort"], "require": ["wsi"]}
    assert gdc_kinds(preset(molecular=only, models=few, cohort=cohort)) == ["slides", "rna"]
    external = {"source": "external", "path": "bags"}
    assert gdc_kinds(preset(molecular=only, models=few, cohort=cohort, features=external, slides={})) == ["rna"]
    # The GDC's sheet may say whose slides ready-made features are of: listed, not fetched.
    listed = preset(molecular=only, models=few, cohort=cohort, features=external)
    assert gdc_kinds(listed) == ["slides", "rna"]
    assert not slides_from_gdc(listed)
    assert slide_paths(listed) == {}


def test_tables_of_the_gdc_stand_for_the_lists_of_what_was_fetched(preset):
    files = {str(path) for path in molecular_files(preset())}
    fetched = {f"results/tcga_hnsc/gdc/fetched/{kind}.json" for kind in ("rna", "mut", "cnv")}
    assert files == {*fetched, "results/tcga_hnsc/gdc/sample_sheet.tsv", "resources/published/six_families.csv"}


def test_weights_that_are_public_and_pinned_are_fetched_by_the_workflow(preset, monkeypatch, tmp_path):
    monkeypatch.setenv("MORPHOME_WEIGHTS", str(tmp_path / "no weights"))
    assert fetched_weights(preset())
    assert not fetched_weights(preset(features={"encoder": "stain_texture"}))
    (tmp_path / "mine.pth").write_bytes(b"x")
    assert not fetched_weights(preset(features={"encoder": "resnet50_trunc", "weights": str(tmp_path / "mine.pth")}))


def test_slides_of_the_gdc_need_not_be_there_yet(preset):
    config = preset()
    with pytest.raises(MorphomeError, match=r"sample_sheet\.tsv: file not found"):
        slide_paths(config)
    sheet = Path(config["slides"]["sheet"])
    sheet.parent.mkdir(parents=True)
    name = "TCGA-AA-0001-01Z-00-DX1.X.svs"
    columns = "File ID\tFile Name\tData Type\tCase ID\tSample ID\tLocal Path\n"
    other = "uuid-2\tTCGA-AA-0002-01Z-00-DX1.Y.svs\tSlide Image\tTCGA-AA-0002\tTCGA-AA-0002-01Z\t/have/it.svs\n"
    metastasis = "uuid-3\tTCGA-AA-0003-06Z-00-DX1.Z.svs\tSlide Image\tTCGA-AA-0003\tTCGA-AA-0003-06Z\t\n"
    sheet.write_text(columns + f"uuid-1\t{name}\tSlide Image\tTCGA-AA-0001\tTCGA-AA-0001-01Z\t\n" + other + metastasis)
    assert slide_paths(config) == {
        "TCGA-AA-0001-01Z-00-DX1.X": Path("resources/gdc/uuid-1") / name,
        "TCGA-AA-0002-01Z-00-DX1.Y": Path("/have/it.svs"),
    }


def test_groups_of_slides(preset):
    config = preset(slides={**preset()["slides"], "per_job": 3})
    assert slide_jobs(config, list("abcdefg")) == [["a", "b", "c"], ["d", "e", "f"], ["g"]]


def test_a_step_of_its_own_encodes_rna_where_a_row_reads_a_frozen_encoder(preset, tmp_path):
    for name in ("args.json", "vocab.json", "model.safetensors"):
        (tmp_path / name).write_text("x")
    tables = preset()["molecular"]
    tables = {key: table for key, table in tables.items() if key != "encoder"}
    tables["expression"] = {"format": "star_counts", "path": "{gdc_files}"}
    scgpt = {"name": "scgpt", "weights": str(tmp_path)}

    def checked(encoder, **models):
        return preset(molecular={**tables, "encoder": encoder}, models={"random": None, **models})

    config = checked(scgpt, path_gptomic=None)
    assert encodes_rna(config)
    assert {path.name for path in rna_files(config)} == {"args.json", "vocab.json", "model.safetensors"}
    assert not encodes_rna(checked(scgpt, mcat=None))
    assert not encodes_rna(checked({"name": "pca"}, path_gptomic=None))
    gone = {**scgpt, "weights": str(tmp_path / "nothing")}
    replaced = checked({**gone, "on_missing": "fallback"}, path_gptomic=None)
    assert not encodes_rna(replaced) and rna_substitution(replaced).startswith("RNA encoder pca in place of scgpt (the")
    skipped = checked({**gone, "on_missing": "skip"}, path_gptomic=None)
    assert not encodes_rna(skipped) and list(skipped["models"]) == ["random"]
    assert rna_substitution(skipped).startswith("left out without the RNA encoder scgpt: path_gptomic (the files")
    assert rna_substitution(config) == rna_substitution(preset()) == ""
    # A student reads what its teacher reads.
    distil = {"teacher": "path_gptomic", "loss": "kd_risk_rank"}
    assert encodes_rna(checked(scgpt, abmil={"training": {"distil": distil}}))
