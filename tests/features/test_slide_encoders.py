"""What slide encoders demand, and the runner with small stand-ins that ship their own code."""

from __future__ import annotations

import json
import textwrap

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from morphome.errors import MorphomeError
from morphome.features.registry import encoder_spec, registry_content
from morphome.features.slide_encoders import (
    SLIDE_ENCODERS,
    embed_slide,
    read_slide_encoders,
    require_bags,
    slide_encoder_spec,
)

#: Features, values of the slide's vector, and tiles that fit.
PUBLISHED = {
    "titan": (["conch_v15"], 768, (448, 4 / 7)),
    "prism": (["virchow"], 1280, (224, 0.5)),
    "chief": (["ctranspath_chief"], 768, (224, 1.0)),
    "gigapath_slide": (["gigapath"], 768, (224, 0.5)),
    "madeleine": (["conch_v1"], 512, (448, 1.0)),
    "feather": (["conch_v15", "uni2_h"], 512, (448, 0.5)),
    "care": (["conch_v15"], 512, (448, 0.5)),
    "cobra": (["conch_v1", "uni", "virchow2", "h_optimus_0"], None, (224, 0.5)),
    "eagle": (["ctranspath", "ctranspath_chief", "virchow2:cls"], None, (224, 0.5)),
}


def kind(name, patch_px, mpp_target):
    """What the files of an encoder say."""
    return {"encoder": name, "dim": encoder_spec(name).dim, "patch_um": float(round(patch_px * mpp_target))}


@pytest.mark.parametrize("key", PUBLISHED)
def test_each_takes_the_features_it_was_trained_on_and_no_others(key):
    names, dim, tiles = PUBLISHED[key]
    slide = slide_encoder_spec(key)
    assert (list(slide.patch_encoders), slide.dim) == (names, dim)
    for name in names:
        assert require_bags(key, [kind(name, *tiles)]) == []
    with pytest.raises(MorphomeError, match=f"'{key}' takes features of .*, not of phikon"):
        require_bags(key, [kind(names[0], *tiles), kind("phikon", *tiles)])
    if slide.patch_um:
        with pytest.raises(MorphomeError, match=f"'{key}' was trained on tiles of"):
            require_bags(key, [kind(names[0], tiles[0], 3 * tiles[1])])


def test_the_list_is_complete():
    assert set(SLIDE_ENCODERS) == set(PUBLISHED)
    with pytest.raises(MorphomeError, match="no slide encoder 'titanic'"):
        slide_encoder_spec("titanic")


def test_another_variant_and_the_same_network_with_other_weights_are_refused():
    with pytest.raises(MorphomeError, match=r"virchow2:cls \(1280 values\), not of virchow2 \(2560 values\)"):
        require_bags("eagle", [kind("virchow2", 224, 0.5)])
    with pytest.raises(MorphomeError, match="not of virchow:cls"):
        require_bags("prism", [kind("virchow:cls", 224, 0.5)])
    with pytest.raises(MorphomeError, match=r"ctranspath_chief \(768 values\), not of ctranspath "):
        require_bags("chief", [kind("ctranspath", 224, 1.0)])


def test_files_of_tools_that_do_not_say():
    """A file without a name of its encoder may be right if its dimension is; the caller says what was not checked."""
    silent = {"encoder": "unknown", "dim": 768, "patch_um": None}
    assert require_bags("titan", [silent]) == ["the size of a tile in microns", "which encoder made the features"]
    with pytest.raises(MorphomeError, match="not of unknown"):
        require_bags("titan", [{**silent, "dim": 1024}])


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"dims": 3}, "dims"), ({"patch_encoders": ["uni_9"]}, "uni_9"), ({"notes": [1.0]}, "a note is no text")],
)
def test_a_wrong_row_is_refused(changes, why, tmp_path):
    content = {**registry_content(), "encoders": []}
    content["slide_encoders"] = [{**content["slide_encoders"][0], **changes}]
    path = tmp_path / "encoders.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(MorphomeError, match=why):
        read_slide_encoders(path)
    content["slide_encoders"] = registry_content()["slide_encoders"][:1] * 2
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(MorphomeError, match="twice"):
        read_slide_encoders(path)


CODE = """
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    class SmallConfig(PretrainedConfig):
        model_type = "small_slide"

    class Small(PreTrainedModel):
        config_class = SmallConfig
        def __init__(self, config):
            super().__init__(config)
            self.scale = torch.nn.Parameter(torch.ones(1))
            self.post_init()
        def encode_slide_from_patch_features(self, tiles, places, side):
            assert tiles.shape[:2] == places.shape[:2] and places.dtype == torch.int64 and side == 512
            return self.scale * tiles.mean(1)
        def slide_representations(self, tiles):
            return {"image_embedding": self.scale * tiles.mean(1)[:, :1280]}
"""


@pytest.mark.parametrize("key", ["titan", "prism"])
def test_the_runner_hands_over_tiles_and_checks_the_vector(key, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "small_slide.py").write_text(textwrap.dedent(CODE))
    auto_map = {"AutoConfig": "small_slide.SmallConfig", "AutoModel": "small_slide.Small"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "small_slide", "auto_map": auto_map}))
    weights = tmp_path / "model.safetensors"
    save_file({"scale": torch.full((1,), 2.0)}, weights, metadata={"format": "pt"})
    dim_in = encoder_spec(SLIDE_ENCODERS[key].patch_encoders[0]).dim
    tiles = np.random.default_rng(0).normal(size=(7, dim_in)).astype(np.float16)
    places = np.arange(14).reshape(7, 2)
    vector = embed_slide(key, tmp_path, tiles, places, 512, trust_remote_code=True)
    assert vector.dtype == np.float32
    dim = SLIDE_ENCODERS[key].dim
    np.testing.assert_allclose(vector, 2 * tiles.astype(np.float32).mean(0)[:dim], rtol=1e-5, atol=1e-6)

    with pytest.raises(MorphomeError, match="trust_remote_code: true"):
        embed_slide(key, tmp_path, tiles, places, 512)
    with pytest.raises(MorphomeError, match=f"features \\(N, {dim_in}\\)"):
        embed_slide(key, tmp_path, tiles[:, :5], places, 512, trust_remote_code=True)
    save_file({"scale": torch.full((1,), float("nan"))}, weights, metadata={"format": "pt"})
    with pytest.raises(MorphomeError, match="finite: False"):
        embed_slide(key, tmp_path, tiles, places, 512, trust_remote_code=True)


def test_one_that_morphome_does_not_run_says_so(tmp_path):
    with pytest.raises(MorphomeError, match="not run by morphome"):
        embed_slide("chief", tmp_path, np.zeros((1, 768)), np.zeros((1, 2)), 224, trust_remote_code=True)
