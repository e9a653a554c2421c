"""A wrong configuration is one message that names the key or file and the remedy."""

from __future__ import annotations

import copy

import pytest
import yaml

from morphome.config import check_config, load_config
from morphome.errors import MorphomeError


@pytest.fixture
def demo(repository):
    return yaml.safe_load((repository / "config.yaml").read_text())


def refused(config) -> str:
    with pytest.raises(MorphomeError) as caught:
        check_config(config)
    return str(caught.value)


def test_the_default_configuration_is_complete(repository, demo):
    full = load_config(repository / "config.yaml")
    assert full["tiling"]["mpp_target"] == 0.5
    assert full["simulate"]["sites"] == 6
    assert full["models"]["mome"]["settings"]["router"] == "straight_through"
    assert full["models"]["mome"]["training"]["epochs"] == demo["training"]["epochs"]
    assert full["cohort"]["clinical"]["path"] == "results/demo/simulated/clinical.tsv"


def test_the_input_is_not_changed(demo):
    before = copy.deepcopy(demo)
    check_config(demo)
    assert demo == before


@pytest.mark.parametrize(
    ("section", "content", "words"),
    [
        ("tiling", {"mpp": 0.5}, ["tiling.mpp", "unknown key", "did you mean 'mpp_target'", "Remedy"]),
        ("tiling", {"patch_px": "many"}, ["tiling.patch_px", "integer", "Remedy"]),
        ("tiling", {"mpp_target": 50}, ["tiling.mpp_target", "maximum", "Microns per pixel"]),
        ("cohort", {"clinical": {"format": "excel", "path": "x"}}, ["cohort.clinical.format", "gdc_clinical"]),
        ("cohort", {}, ["cohort", "'clinical' is missing"]),
        ("training", {"epochs": 0}, ["training.epochs", "minimum"]),
        ("models", {"mone": None}, ["models.mone", "no model 'mone'", "did you mean 'mome'"]),
        ("models", {"mome": {"router": "best"}}, ["models.mome.router", "Remedy"]),
        ("models", {"mome": {"training": {"lr": 1}}}, ["models.mome.training.lr", "unknown key"]),
        ("models", {"mome": 3}, ["models.mome"]),
        ("modells", {"mome": None}, ["modells: unknown key", "did you mean 'models'"]),
        ("features", {"path": "mine"}, ["features.path", "features.source: external"]),
        ("models", {"mome": {"epochs": 3}}, ["models.mome.epochs", "training"]),
        ("features", {"source": "external"}, ["features.path", "Remedy"]),
        ("splits", {"scheme": "published"}, ["splits.folder", "Remedy"]),
        ("simulate", {"tiles_min": 200, "tiles_max": 100}, ["simulate.tiles_min", "Remedy"]),
    ],
)
def test_what_is_wrong_is_named(demo, section, content, words):
    demo[section] = content
    message = refused(demo)
    for word in words:
        assert word in message


def test_two_mistakes_give_two_lines(demo):
    demo["tiling"] = {"mpp": 0.5}
    demo["models"]["mone"] = None
    message = refused(demo)
    assert "tiling.mpp" in message
    assert "models.mone" in message


def test_a_missing_file_is_named_with_its_key(demo):
    demo["cohort"]["clinical"]["path"] = "nowhere/clinical.tsv"
    message = refused(demo)
    assert "cohort.clinical.path" in message
    assert "nowhere/clinical.tsv" in message


def test_a_panel_that_a_model_needs_must_be_configured(demo):
    demo["models"] = {"coxnet_genes": {"panels": ["rna", "cnv"]}}
    del demo["molecular"]["cnv"]
    assert "models.coxnet_genes: needs molecular.cnv" in refused(demo)


def test_a_required_modality_must_be_configured(demo):
    demo["cohort"]["require"] = ["wsi", "mut"]
    del demo["molecular"]["mut"]
    assert "cohort.require" in refused(demo)


def test_a_panel_takes_only_its_own_formats(demo):
    demo["molecular"]["rna"]["format"] = "maf"
    assert "molecular.rna.format" in refused(demo)


def test_one_row_may_override_training_and_reuse_a_model(demo):
    demo["models"]["mome_frozen"] = {"model": "mome", "router": "frozen", "training": {"epochs": 3}}
    models = check_config(demo)["models"]
    assert models["mome_frozen"]["model"] == "mome"
    assert models["mome_frozen"]["training"]["epochs"] == 3
    assert models["mome"]["training"]["epochs"] == demo["training"]["epochs"]


def test_an_exponent_without_a_point_is_a_number(demo):
    demo["training"]["learning_rate"] = yaml.safe_load("1e-3")  # text, by YAML 1.1
    demo["models"]["mome"] = {"training": {"weight_decay": "1e-6"}}
    full = check_config(demo)
    assert full["training"]["learning_rate"] == 1e-3
    assert full["models"]["mome"]["training"]["weight_decay"] == 1e-6


def test_values_of_the_command_line_are_texts_and_mean_numbers(demo):
    demo["training"] = {"epochs": "3"}
    demo["evaluation"] = {"horizon_months": "18", "bootstrap": "10"}
    demo["models"]["mome"] = {"value_conv": "false"}
    full = check_config(demo)
    assert full["training"]["epochs"] == 3
    assert full["evaluation"]["horizon_months"] == 18
    assert full["models"]["mome"]["settings"]["value_conv"] is False
    demo["evaluation"] = {"horizon_months": "auto"}
    assert check_config(demo)["evaluation"]["horizon_months"] == "auto"


def test_a_wrong_training_value_is_one_line(demo):
    demo["training"]["epochs"] = 0
    assert refused(demo).count("training.epochs") == 1


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("training: {epochs: 1}\ntraining: {beta: 0}\n")
    with pytest.raises(MorphomeError, match="'training' stands twice"):
        load_config(path)


def test_not_yaml_and_not_there(tmp_path):
    with pytest.raises(MorphomeError, match="not found"):
        load_config(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(MorphomeError, match="not valid YAML"):
        load_config(broken)


def test_presets_are_valid_but_for_their_files(repository):
    for preset in (repository / "resources" / "cohorts").glob("*.yaml"):
        check_config(yaml.safe_load(preset.read_text()), files=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"molecular": {"rna": {"format": "csv", "path": "x.csv", "values": "tpm"}}},
            "molecular.rna.values: means nothing",
        ),
        ({"molecular": {"cnv": {"format": "csv", "path": "x.csv", "workflow": "ASCAT3"}}}, "molecular.cnv.workflow"),
        ({"gdc": {"projects": ["hnsc"]}}, "a project id of the GDC, such as TCGA-HNSC"),
        ({"gdc": {"projects": ["TCGA-HNSC"], "api": "api.gdc.cancer.gov"}}, "begins with https://"),
        (
            {"gdc": {"projects": ["TCGA-HNSC"]}, "slides": {"sheet": "{gdc}/sample_sheet.tsv", "folder": "."}},
            "{gdc_files}",
        ),
        ({"gdc": {"projects": ["TCGA-HNSC"], "pinned": "results/own/gdc"}}, "this run's own list"),
        ({"gdc": {"projects": ["TCGA-HNSC"], "folder": "results/own/gdc/slides"}}, "gdc.folder: lies in"),
        ({"gdc": {"projects": ["TCGA-HNSC"], "have": ["."]}}, "gdc.have[0]: . holds"),
        ({"cohort": {"clinical": {"format": "gdc_clinical", "path": "."}, "endpoint": "DSS"}}, "holds OS only"),
        ({"cohort": {"clinical": {"format": "csv", "path": "{gdc}/clinical.tsv"}}}, "only where the configuration has"),
    ],
)
def test_what_the_gdc_and_the_tables_cannot_mean_is_refused(change, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.csv").write_text("patient_id")
    config = {
        "name": "own",
        "cohort": {"clinical": {"format": "csv", "path": "x.csv"}},
        "slides": {"sheet": "x.csv"},
        "models": {"random": None},
    }
    with pytest.raises(MorphomeError) as caught:
        check_config({**config, **change})
    assert words in str(caught.value)
    assert "Remedy" in str(caught.value)
