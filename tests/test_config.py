"""A wrong configuration is one message that names the key or file and the remedy."""

from __future__ import annotations

import copy

import pytest
import yaml

from morphome.config import check_config, load_config, read_yaml
from morphome.errors import MorphomeError
from morphome.models.catalog import catalog


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


def test_an_anchor_of_yaml_stands_for_two_mappings(demo):
    """Each place has defaults of its own: values are log2_tpm of RNA and counts of expression."""
    demo["molecular"]["expression"] = demo["molecular"]["rna"]
    molecular = check_config(demo)["molecular"]
    assert (molecular["rna"]["values"], molecular["expression"]["values"]) == ("log2_tpm", "counts")


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


_ALONE = {"models": {"path_gptomic": None}}


def _taught(**distil):
    return {"models": {"abmil": {"training": {"distil": distil}}}}


#: What a user may get wrong in molecular.encoder and in the training of a row: the change, and words of the message.
_MISTAKES = [
    # -- the encoder of RNA
    ({"encoder": "scgpt"}, ["molecular.encoder", "type object"]),
    ({"encoder": {}}, ["molecular.encoder: 'name' is missing"]),
    ({"encoder": {"name": "scGPT"}}, ["molecular.encoder.name", "'scgpt'"]),
    ({"encoder": {"name": "scgpt", "weight": "w"}}, ["molecular.encoder.weight", "did you mean 'weights'"]),
    ({"encoder": {"name": "scgpt"}}, ["the folder", "scgpt does not exist", "molecular.encoder.weights", "on_missing"]),
    ({"encoder": {"name": "scgpt", "weights": "half"}}, ["half holds no vocab.json", "put them there"]),
    ({"encoder": {"name": "scgpt", "on_missing": "stop"}}, ["molecular.encoder.on_missing", "'skip'"]),
    ({"encoder": {"name": "scgpt", "on_missing": "fallback", "fallback": "scgpt"}}, ["encoder.fallback", "'pca'"]),
    ({"encoder": {"name": "precomputed"}}, ["needs a table of embeddings", "set molecular.encoder.path"]),
    ({"encoder": {"name": "precomputed", "path": "no.csv"}}, ["no.csv (molecular.encoder.path) does not exist"]),
    ({"encoder": {"name": "scgpt", "weights": "full", "panel_size": 1}}, ["molecular.encoder.panel_size", "minimum"]),
    ({"encoder": {"name": "scgpt", "weights": "full", "cells": {"path": "c.h5ad"}}}, ["encoder.cells.path) does not"]),
    (
        {"encoder": {"name": "scgpt", "weights": "full", "cells": {"mixing": "all"}}},
        ["encoder.cells.mixing", "'pairs'"],
    ),
    (
        {"encoder": {"name": "scgpt", "weights": "full", "genes": "families"}, "groups": None, **_ALONE},
        ["encoder.genes: families"],
    ),
    ({"encoder": {"name": "scgpt", "weights": "full"}, "expression": None}, ["scgpt needs molecular.expression"]),
    ({"encoder": {"name": "pathway_mean"}, "groups": None, **_ALONE}, ["pathway_mean needs molecular.groups"]),
    ({"encoder": {"name": "pca", "components": 0}}, ["molecular.encoder.components", "minimum"]),
    ({"rna": None}, ["models.path_gptomic: the encoder snn_raw needs molecular.rna"]),
    (
        {"encoder": {"name": "scgpt", "on_missing": "skip"}, "models": {"path_gptomic": None}},
        ["models: every row needs the encoder", "on_missing: fallback"],
    ),
    # -- the published protocol
    ({"mcat": {"protocol": "optimistic"}}, ["models.mcat.training.protocol", "'published'"]),
    ({"mcat": {"epoch_rule": "oracle_outer_best"}}, ["models.mcat.training.epoch_rule", "does not go with", "honest"]),
    ({"mcat": {"protocol": "published", "epoch_rule": "inner_best"}}, ["epoch_rule: inner_best", "published takes"]),
    ({"mcat": {"protocol": "published", "search": {"learning_rate": [0.1]}}}, ["training.search", "reported fold"]),
    ({"random": {"protocol": "published"}}, ["models.random.training.protocol: random is a baseline"]),
    (
        {"models": {"mcat": {"training": {"protocol": "published"}}}},
        ["every row has protocol published", "clinical_cox"],
    ),
    ({"mcat": "published"}, ["models.mcat.training: 'published' is no mapping"]),
    # -- teachers
    ({"mcat": {"distil": {"teacher": "mome"}}}, ["models.mcat.training.distil: mcat is no network of slides alone"]),
    ({"abmil": {"distil": {}}}, ["models.abmil.training.distil.teacher: missing", "mcat"]),
    ({"abmil": {"distil": "mcat"}}, ["models.abmil.training.distil", "type object or null"]),
    ({"abmil": {"distil": {"techer": "mcat"}}}, ["distil.techer: unknown key (did you mean 'teacher'?)"]),
    ({"abmil": {"distil": {"teacher": "mact"}}}, ["no model 'mact' (did you mean 'mcat'?)"]),
    ({"abmil": {"distil": {"teacher": "random"}}}, ["distil.teacher: random is no network"]),
    ({"abmil": {"distil": {"teacher": "mcat", "settings": {"dims": 8}}}}, ["distil.settings.dims", "'dim'"]),
    ({"abmil": {"distil": {"teacher": "path_gptomic"}}}, ["distil.loss: kd_logit compares", "kd_risk_rank"]),
    ({"abmil": {"distil": {"teacher": "mcat", "folds": 1}}}, ["training.distil.folds", "minimum"]),
    ({"abmil": {"distil": {"teacher": "mcat", "loss": "gene_aux"}}}, ["distil.teacher: gene_aux has no teacher"]),
    ({**_taught(teacher="mcat"), "groups": None}, ["models.abmil: needs molecular.groups"]),
    ({**_taught(loss="gene_aux"), "groups": None}, ["models.abmil: needs molecular.groups"]),
    ({"abmil": {"distil": {"teacher": "mcat"}, "protocol": "published"}}, ["distil: does not go with protocol"]),
    # -- balance, missing genes
    ({"mcat": {"balance": {"rule": "ogm"}}}, ["models.mcat.training.balance.rule", "'ogm_cox'"]),
    ({"mcat": {"balance": {"rule": "dgl", "alpha": 1}}}, ["alpha means nothing for the rule 'dgl'", "start_epoch"]),
    ({"mcat": {"balance": {"alpha": 0.5}}}, ["alpha means nothing for the rule 'none'"]),
    ({"mcat": {"balance": {"rule": "agm", "start_epoch": 5, "end_epoch": 2}}}, ["end_epoch 2 lies before"]),
    ({"mcat": {"balance": {"rule": "agm", "strength": 2}}}, ["training.balance.strength: unknown key"]),
    ({"abmil": {"balance": {"rule": "agm"}}}, ["models.abmil.training.balance: abmil has no branches"]),
    ({"training": {"balance": {"rule": "agm", "gamma": 1}}}, ["training.balance: gamma means nothing"]),
    ({"abmil": {"modality_dropout": 0.2}}, ["models.abmil.training.modality_dropout", "take it out"]),
    ({"mcat": {"modality_dropout": 1}}, ["models.mcat.training.modality_dropout", "1"]),
]


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """A configuration of a small cohort of one's own, with some of it changed: tables, encoder, training of rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MORPHOME_WEIGHTS", str(tmp_path / "weights"))
    for name in ("full/args.json", "full/vocab.json", "full/best_model.pt", "half/args.json", "half/best_model.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "x.csv").write_text("patient_id")

    def make(**change):
        table = {"format": "csv", "path": "x.csv"}
        molecular = {"rna": table, "expression": table, "groups": {"path": "x.csv"}}
        molecular |= {key: change.pop(key) for key in ("rna", "expression", "groups", "encoder") if key in change}
        models = {"random": None, "abmil": None, "mcat": None, "path_gptomic": None}
        models = change.pop("models", models)
        config = {"name": "own", "training": change.pop("training", {})}
        models |= {name: {"training": training} for name, training in change.items()}
        return {
            **config,
            "cohort": {"clinical": table},
            "slides": {"sheet": "x.csv"},
            "molecular": {key: part for key, part in molecular.items() if part is not None},
            "models": models,
        }

    return make


@pytest.mark.parametrize(("change", "words"), _MISTAKES)
def test_a_mistake_in_the_encoder_or_in_the_training_of_a_row_is_named(rows, change, words):
    message = refused(rows(**change))
    for word in [*words, "Remedy"]:
        assert word in message
    assert message.count("Remedy") == 1


def test_the_rows_without_mistakes_are_accepted_and_stay_as_they_are(rows):
    config = rows(
        encoder={"name": "scgpt", "weights": "full"},
        mcat={"protocol": "published", "epoch_rule": "oracle_outer_best"},
        abmil={"distil": {"teacher": "mcat", "settings": {"dim": 8}, "folds": 2}},
        path_gptomic={"balance": {"rule": "ogm_cox", "alpha": 0.5}, "modality_dropout": 0.2},
    )
    full = check_config(config)
    distil = full["models"]["abmil"]["training"]["distil"]
    assert (distil["weight"], distil["folds"], distil["loss"]) == (1.0, 2, "kd_logit")
    assert distil["settings"] == {**full["models"]["mcat"]["settings"], "dim": 8}
    assert full["models"]["path_gptomic"]["training"]["balance"] == {"rule": "ogm_cox", "alpha": 0.5}
    assert full["molecular"]["encoder"]["requested"] == full["molecular"]["encoder"]["name"] == "scgpt"
    written = {
        name: {"model": row["model"], "training": row["training"], **row["settings"]}
        for name, row in full["models"].items()
    }
    assert check_config({**full, "models": written}) == full


def test_what_a_model_cannot_have_it_does_not_take_from_the_section_for_all(rows):
    section = {"balance": {"rule": "agm"}, "modality_dropout": 0.2, "distil": {"teacher": "mcat"}}
    section["search"] = {"learning_rate": [0.1, 0.2]}
    config = rows(training=section)
    config["models"]["mcat_published"] = {"model": "mcat", "training": {"protocol": "published"}}
    training = {name: row["training"] for name, row in check_config(config)["models"].items()}
    assert training["mcat"]["balance"] == {"rule": "agm"} and training["mcat"]["modality_dropout"] == 0.2
    assert training["mcat"]["distil"] is None and training["abmil"]["distil"]["teacher"] == "mcat"
    assert training["abmil"]["balance"] == {"rule": "none"} and training["abmil"]["modality_dropout"] == 0
    plain = training["mcat_published"]
    assert (plain["balance"], plain["modality_dropout"], plain["distil"]) == ({"rule": "none"}, 0, None)
    assert plain["search"] == {"learning_rate": [], "weight_decay": []}


def test_fusion_models_are_those_with_slides_and_genes():
    from morphome.config_rows import is_fused
    from morphome.models.catalog import models
    from morphome.models.fusion import FusionModel

    for key, model in models().items():
        if model.kind == "neural":
            fused = issubclass(model.load(), FusionModel)
            assert is_fused(key) == fused == ("missing_omic" in model.load().supports), key


def test_an_encoder_that_nobody_reads_need_not_be_there(rows):
    config = rows(encoder={"name": "scgpt"})
    del config["models"]["path_gptomic"]
    assert "requested" not in check_config(config)["molecular"]["encoder"]


@pytest.mark.parametrize(("on_missing", "name", "left"), [("fallback", "pca", []), ("skip", "scgpt", ["path_gptomic"])])
def test_an_encoder_that_is_not_there_is_replaced_or_its_rows_left_out(rows, on_missing, name, left):
    full = check_config(rows(encoder={"name": "scgpt", "weights": "half", "on_missing": on_missing}))
    section = full["molecular"]["encoder"]
    assert (section["requested"], section["name"], section.get("left_out", [])) == ("scgpt", name, left)
    assert "half holds no vocab.json" in section["reason"]
    assert ("path_gptomic" in full["models"]) == (not left)


def test_a_published_row_takes_the_recipe_of_the_original_and_not_the_section_of_honest_rows(demo):
    section = {"epochs": 3, "bin_edges": "horizon", "sampler": "shuffle", "seed": 9, "device": "cpu"}
    rows = {
        "mcat": None,
        "old": {"model": "mcat", "training": {"protocol": "published", "time_bins": 5}},
        "cmta_old": {"model": "cmta", "training": {"protocol": "published"}},
    }
    full = check_config({**demo, "training": section, "models": rows})["models"]
    assert {k: full["mcat"]["training"][k] for k in section} == section
    old = full["old"]["training"]
    assert (old["epochs"], old["bin_edges"], old["sampler"], old["epoch_rule"]) == (
        20,
        "quantile",
        "class_balanced",
        "last",
    )
    assert (old["time_bins"], old["seed"], old["device"]) == (5, 9, "cpu")
    cmta = full["cmta_old"]
    assert (cmta["training"]["optimizer"], cmta["training"]["epochs"]) == ("sgd", 30)
    assert cmta["settings"]["attention"] == "nystrom_compat"


def test_the_benchmarks_name_every_model_and_are_sound(repository):
    cohort = read_yaml(repository / "resources/cohorts/tcga_hnsc_regions.yaml")
    every, published = (read_yaml(repository / f"resources/benchmarks/{n}.yaml") for n in ("all_models", "published"))
    merged = {**cohort, "training": {**cohort["training"], **every["training"]}}
    merged["molecular"] = {**cohort["molecular"], **every["molecular"]}
    merged["models"] = {**every["models"], **published["models"]}
    full = check_config(merged, files=False)["models"]
    honest = {row["model"] for row in full.values() if row["training"]["protocol"] == "honest"}
    assert honest == set(catalog())
    assert {row["training"]["protocol"] for name, row in full.items() if name in published["models"]} == {"published"}
