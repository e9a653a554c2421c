"""A step sees only its own settings, and its code hash follows what it imports."""

from __future__ import annotations

import importlib.util

import pytest
import yaml

from morphome.config import check_config, load_config
from morphome.steps import STEPS, _closure, code_hash, step_key, step_settings, train_code_hash, write_resolved


@pytest.fixture
def config(repository):
    return yaml.safe_load((repository / "config.yaml").read_text())


def keys_that_changed(before, after, slides=("A", "B"), models=("mome", "abmil")):
    """Names of the jobs whose key differs between two configurations."""
    before, after = check_config(before), check_config(after)
    changed = set()
    for step in STEPS:
        wildcards = [{}]
        if step in {"tile", "encode"}:
            wildcards = [{"slide": s} for s in slides]
        if step == "train":
            wildcards = [{"model": m} for m in models]
        for wildcard in wildcards:
            if step_key(before, step, **wildcard) != step_key(after, step, **wildcard):
                changed.add(" ".join([step, *wildcard.values()]))
    return changed


def changed(config, section, **values):
    return {**config, section: {**(config.get(section) or {}), **values}}


def test_a_model_setting_touches_that_model_alone(config):
    after = changed(config, "models", mome={"router": "soft"})
    assert keys_that_changed(config, after) == {"train mome", "report"}


def test_a_training_setting_touches_all_models(config):
    assert keys_that_changed(config, changed(config, "training", epochs=3)) == {"train mome", "train abmil", "report"}


def test_one_slides_mpp_override_touches_that_slide(config):
    after = changed(config, "tiling", mpp_overrides={"A": 0.25})
    assert keys_that_changed(config, after) == {"tile A", "encode A", "collect", "report"}


def test_the_failure_limit_touches_the_index_alone(config):
    assert keys_that_changed(config, changed(config, "slides", max_failed_fraction=0.5)) == {
        "collect",
        "import",
        "report",
    }


def test_a_corrected_mask_touches_its_slide(config, tmp_path):
    (tmp_path / "A.geojson").write_text("{}")
    after = changed(config, "tiling", masks=str(tmp_path))
    assert keys_that_changed(config, after) == {"tile A", "encode A", "collect", "report"}
    assert step_settings(check_config(after), "tile", slide="A")["tiling"]["masks"] == str(tmp_path / "A.geojson")


def test_how_an_encoder_is_run_touches_no_features(config):
    after = changed(config, "features", device="cpu", batch=8, allow_unpinned=True)
    assert keys_that_changed(config, after) == {"report"}
    learned = changed(config, "features", encoder="tiny_random")
    after = changed(learned, "features", precision="bf16", runtime="openvino")
    assert keys_that_changed(learned, after) == {"encode A", "encode B", "collect", "report"}


def test_bootstrap_touches_the_evaluation_alone(config):
    assert keys_that_changed(config, changed(config, "evaluation", bootstrap=5)) == {"evaluate", "report"}


def test_settings_outside_a_step_are_not_handed_over(config):
    full = check_config(config)
    assert step_settings(full, "tile", slide="A") == {"tiling": full["tiling"], "slides": {"reader": "auto"}}
    assert set(step_settings(full, "train", model="mome")) == {"model"}


@pytest.fixture
def taught(config):
    """Rows with a teacher, with an encoder of RNA, and of the published protocol."""
    distil = {"teacher": "mcat", "settings": {"dim": 16}}
    own = {
        "abmil_taught": {"model": "abmil", "training": {"distil": distil}},
        "mcat": None,
        "mcat_published": {"model": "mcat", "training": {"protocol": "published"}},
        "path_gptomic": None,
    }
    encoder = {"name": "pca", "components": 8}
    with_encoder = {**config, "molecular": {**config["molecular"], "encoder": encoder}}
    return changed(with_encoder, "models", **own)


def encoder_changed(config, **values):
    molecular = config["molecular"]
    return {**config, "molecular": {**molecular, "encoder": {**molecular["encoder"], **values}}}


def test_an_encoder_touches_the_rows_that_read_rna_and_no_table(taught):
    rows = ("abmil", "mcat", "path_gptomic")
    after = encoder_changed(taught, components=4)
    assert keys_that_changed(taught, after, models=rows) == {"rna", "train path_gptomic", "report"}
    # What a frozen encoder does is seen in its vectors, which are a file.
    after = encoder_changed(taught, panel_size=100)
    assert keys_that_changed(taught, after, models=rows) == {"rna", "report"}
    # What would be done without its files is no reason to encode again.
    after = encoder_changed(taught, on_missing="fallback", fallback="snn_raw")
    assert keys_that_changed(taught, after, models=rows) == {"report"}


def test_a_teachers_setting_touches_its_student_alone(taught):
    rows = ("abmil", "abmil_taught", "mcat", "mcat_published")
    distil = {"teacher": "mcat", "settings": {"dim": 32}}
    after = changed(taught, "models", abmil_taught={"model": "abmil", "training": {"distil": distil}})
    assert keys_that_changed(taught, after, models=rows) == {"train abmil_taught", "report"}


def test_the_code_of_a_row_is_that_of_its_model_and_of_its_teacher(taught):
    full = check_config(taught)
    codes = {name: train_code_hash(full, name) for name in full["models"]}
    assert codes["mcat"] == codes["mcat_published"] == code_hash("train", "mcat")
    assert codes["abmil_taught"] == code_hash("train", "abmil", "mcat") != codes["abmil"]
    assert "mcat.py" in {path.name for path in _closure("morphome.models.mcat")}
    for module in ("morphome.models.abmil", "morphome.models.path_gptomic", STEPS["train"].module):
        assert "mcat.py" not in {path.name for path in _closure(module)}


@pytest.mark.parametrize("step", STEPS)
def test_every_step_has_code_that_exists(step):
    assert importlib.util.find_spec(STEPS[step].module) is not None
    assert len(code_hash(step)) == 12


def test_the_closure_follows_imports_and_stays_in_its_rooms():
    tile = {path.name for path in _closure("morphome.slides.tile")}
    assert {"tile.py", "grid.py", "files.py", "errors.py"} <= tile
    train = {path.parent.name for path in _closure("morphome.training.run")}
    assert "models" in train
    assert not train & {"report", "evaluation", "slides"}
    report = {path.parent.name for path in _closure("morphome.report.build")}
    assert "templates" in report
    assert not report & {"models", "training"}
    # The list of encoders counts where it is read.
    assert "encoders.yaml" in {path.name for path in _closure("morphome.features.encode")}
    assert "encoders.yaml" not in {path.name for path in _closure("morphome.training.run")}


def test_the_resolved_configuration_is_written_once_under_its_hash(config, tmp_path):
    full = check_config({**config, "output": str(tmp_path)})
    path = write_resolved(full)
    written = path.stat().st_mtime_ns
    assert write_resolved(full) == path
    assert load_config(path) == full
    assert path.stat().st_mtime_ns == written
    assert write_resolved({**full, "title": "x"}) != path
