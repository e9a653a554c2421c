"""The registry as data, what changes a fingerprint, and whether an encoder fits a configuration."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import yaml

from morphome.errors import MorphomeError
from morphome.features import registry
from morphome.features.dimensions import DIMENSIONS
from morphome.features.encoders import load_encoder
from morphome.features.fit import check_fit, encoder_problems, requirement_problems, version_numbers
from morphome.features.registry import (
    ENCODERS,
    ENCODERS_PATH,
    encoder_spec,
    fingerprint,
    fingerprint_facts,
    fingerprint_sha256,
    read_registry,
    registry_content,
    spec_facts,
    tiling_key,
)

TILING = {"patch_px": 256, "mpp_target": 0.5, "min_tissue": 0.5, "mpp_overrides": {}, "allow_upsampling": False}
FEATURES = {"encoder": "stain_texture"}


# -- the rows -----------------------------------------------------------------------------------------------------
def test_the_encoder_without_weights_keeps_its_contract(painted):
    spec, encoder = encoder_spec("stain_texture"), load_encoder({"encoder": "stain_texture"})
    starts = [(x, y) for y in range(100, 570, 90) for x in range(100, 770, 110)][:9]
    tiles = np.stack([painted[y : y + 128, x : x + 128] for x, y in starts])
    vectors = encoder.encode(tiles)
    assert vectors.shape == (len(tiles), spec.dim)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors.astype(np.float16)).all()
    np.testing.assert_array_equal(encoder.encode(tiles), vectors)
    np.testing.assert_array_equal(np.concatenate([encoder.encode(tiles[i : i + 1]) for i in range(9)]), vectors)
    assert encoder.encode(tiles[:0]).shape == (0, spec.dim)


@pytest.mark.parametrize("key", ENCODERS)
def test_every_row_says_what_a_user_must_know(key):
    spec = ENCODERS[key]
    assert len(spec.dimension_names) == len(set(spec.dimension_names)) == spec.dim
    assert spec.supported_mpp[0] < 0.5 < spec.supported_mpp[1]
    assert spec.licence
    assert spec.loader in ("local", "random") or spec.licence_url.startswith("https://")
    assert (spec.mean is None) == (spec.std is None) == (spec.loader == "local")
    assert not spec.gated or spec.source.startswith("hf:")
    for variant in spec.variants:
        assert encoder_spec(f"{key}:{variant}").dim == spec.variants[variant][0]
    assert encoder_spec(f"{key}:{spec.variant}") == spec


def row(**changes):
    content = registry_content()
    content["encoders"] = [{**next(r for r in content["encoders"] if r["key"] == "uni"), **changes}]
    return content


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"licnce": "MIT"}, "licnce"),
        ({"input_px": 224}, "input_px"),
        ({"input_px": ["224"]}, "input_px"),
        ({"gated": "yes"}, "gated"),
        ({"prefix_tokens": True}, "prefix_tokens"),
        ({"notes": [10.0]}, "notes"),
        ({"loader": "magic"}, "magic"),
        ({"precision": "fp8"}, "fp8"),
        ({"norm": "none_such"}, "none_such"),
        ({"default_variant": "mean"}, "default_variant"),
        ({"weights_sha256": ["abc"]}, "64 hex"),
        ({"source": "MahmoodLab/UNI"}, "source"),
        ({"supported_mpp": [1.0, 0.5]}, "supported_mpp"),
        ({"key": "UNI:2"}, "small letters"),
        ({"files": []}, "names files"),
    ],
)
def test_a_row_that_is_wrong_is_refused_by_name(changes, why, tmp_path):
    path = tmp_path / "encoders.yaml"
    path.write_text(yaml.safe_dump(row(**changes)))
    with pytest.raises(MorphomeError, match=why):
        read_registry(path)


def test_a_row_that_stands_twice_or_lacks_a_key_is_refused(tmp_path):
    path = tmp_path / "encoders.yaml"
    content = row()
    path.write_text(yaml.safe_dump({**content, "encoders": content["encoders"] * 2}))
    with pytest.raises(MorphomeError, match="twice"):
        read_registry(path)
    del content["encoders"][0]["licence"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(MorphomeError, match="licence"):
        read_registry(path)
    path.write_text(yaml.safe_dump({"encoders": []}))
    with pytest.raises(MorphomeError, match="norms"):
        read_registry(path)


def test_the_registry_travels_with_the_package(repository):
    text = (repository / "pyproject.toml").read_text()
    assert "features/data/*" in text
    assert ENCODERS_PATH.parent.name == "data"


def test_an_unknown_encoder_is_refused_by_name():
    for call in (
        encoder_spec,
        lambda key: load_encoder({"encoder": key}),
        lambda key: fingerprint({"encoder": key}, TILING),
    ):
        with pytest.raises(MorphomeError, match="uni_9"):
            call("uni_9")
    with pytest.raises(MorphomeError, match="did you mean 'uni2_h'"):
        encoder_spec("uni2-h")
    with pytest.raises(MorphomeError, match="virchow2:cls_mean, virchow2:cls"):
        encoder_spec("virchow2:mean")


def test_a_variant_changes_dimension_and_name():
    spec = encoder_spec("virchow2:cls")
    assert (spec.key, spec.name, spec.dim) == ("virchow2", "virchow2:cls", 1280)
    assert encoder_spec("virchow2").name == encoder_spec("virchow2:cls_mean").name == "virchow2"
    assert spec.dimension_names[1] == "virchow2:cls_1"
    assert encoder_spec("musk:ms_aug").dim == 2048
    assert encoder_spec("midnight_12k:cls").dim == 1536


# -- fingerprints -------------------------------------------------------------------------------------------------
def test_a_fingerprint_is_about_vectors_alone():
    first = fingerprint(FEATURES, TILING)
    assert len(first) == 12
    assert fingerprint_sha256(FEATURES, TILING).startswith(first)
    how = {"device": "cuda", "runtime": "torch", "batch": 8, "max_failed_tiles": 0.5, "source": "encode"}
    same = [
        ({**FEATURES, **how, "precision": "declared", "allow_unpinned": True}, TILING),
        ({"encoder": "stain_texture:dimensions"}, TILING),
        (FEATURES, {**TILING, "min_tissue": 0.1, "mpp_overrides": {"a": 0.3}, "half_decode": False, "masks": "m"}),
        (FEATURES, {**TILING, "mpp_target": 0.50}),
    ]
    assert {fingerprint(*args) for args in same} == {first}
    others = [{**TILING, **change} for change in
              ({"patch_px": 224}, {"mpp_target": 1.0}, {"mpp_target": 1}, {"half_decode": True})]  # fmt: skip
    found = [fingerprint(FEATURES, tiling) for tiling in others]
    assert first not in found
    assert found[1] == found[2]
    assert len(set(found)) == 3


def test_a_variant_and_the_precision_are_part_of_a_fingerprint():
    names = (
        {"encoder": "tiny_random"},
        {"encoder": "tiny_random:cls_mean"},
        {"encoder": "tiny_random", "precision": "bf16"},
    )
    assert len({fingerprint(features, TILING) for features in names}) == 3
    assert fingerprint({**names[0], "precision": "fp32"}, TILING) == fingerprint(names[0], TILING)
    assert fingerprint({"encoder": "tiny_random:cls"}, TILING) == fingerprint(names[0], TILING)


def test_weights_are_part_of_a_fingerprint(tmp_path):
    features = {"encoder": "uni", "allow_unpinned": True, "weights": str(tmp_path / "pytorch_model.bin")}
    found = []
    for content in (b"one", b"three"):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        facts = fingerprint_facts(features, TILING)
        assert facts["weights_sha256"] == hashlib.sha256(content).hexdigest()
        found.append(fingerprint(features, TILING))
    assert found[0] != found[1]


def test_every_fact_of_a_row_is_in_the_fingerprint_or_known_to_shape_no_vector():
    spec = ENCODERS["uni"]
    shaping = {
        "key": "x", "version": "2", "dim": 5, "loader": "x", "variant": "x", "pooling": "x", "input_px": (1,),
        "mean": (0, 0, 0), "std": (1, 1, 1), "resize": "x", "precision": "x", "arch": "x", "arch_kwargs": {"a": 1},
        "prefix_tokens": 7, "unwrap": ("x",), "convert": "x",
    }  # fmt: skip
    plain = {"licence", "licence_url", "gated", "supported_mpp", "source", "revision", "weights_sha256", "weights_md5",
             "files", "extra_files", "pickled", "remote_code", "min_versions", "packages", "params_m", "gflop", "notes",
             "variants"}  # fmt: skip
    assert {f.name for f in fields(spec)} == set(shaping) | plain
    for name, value in shaping.items():
        assert spec_facts(replace(spec, **{name: value})) != spec_facts(spec), name
    assert not plain & set(spec_facts(spec))


def test_a_tiling_key_names_the_tiling_but_no_single_slide():
    key = tiling_key(TILING)
    assert key.startswith("256px_0.5mpp_")
    assert tiling_key({**TILING, "mpp_overrides": {"a": 0.3}, "masks": "corrected"}) == key
    assert tiling_key({**TILING, "min_tissue": 0.4}) != key
    assert tiling_key({**TILING, "allow_upsampling": True}) != key
    assert tiling_key({**TILING, "mpp_target": 1}) == tiling_key({**TILING, "mpp_target": 1.0})
    assert tiling_key({**TILING, "mpp_target": 1}).startswith("256px_1mpp_")


def test_a_change_of_the_constants_needs_a_new_version():
    """Whoever changes DIMENSIONS raises the version of the encoder, then writes both here."""
    text = "\n".join(f"{d.name} {d.centre!r} {d.scale!r}" for d in DIMENSIONS)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert (ENCODERS["stain_texture"].version, digest) == ("1", "e893a8036dd0593d")


def test_the_registry_needs_the_standard_library_alone():
    code = (
        "import sys; from morphome.features.registry import fingerprint, tiling_key;"
        "from morphome.features.fit import encoder_problems;"
        "fingerprint({'encoder': 'stain_texture'}, {'patch_px': 256, 'mpp_target': 0.5});"
        "print([m for m in ('numpy', 'h5py', 'PIL', 'skimage', 'pandas', 'torch', 'timm') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# -- does it fit a configuration? ---------------------------------------------------------------------------------
def problems(tiling=None, **features):
    full = {"features": {**FEATURES, **features}, "tiling": {**TILING, **(tiling or {})}}
    return encoder_problems(full)


def test_the_default_configuration_has_no_problem():
    assert problems() == []
    assert problems({"patch_px": 224}, encoder="uni", precision="bf16", runtime="openvino", device="cpu") == []
    assert problems({"patch_px": 448, "mpp_target": 0.571}, encoder="conch_v1") == []


@pytest.mark.parametrize(
    ("tiling", "features", "parts"),
    [
        ({}, {"encoder": "unni"}, ["did you mean 'uni'"]),
        ({}, {"encoder": "uni"}, ["takes 224", "128 um of your tiles set patch_px: 224 and mpp_target: 0.571"]),
        ({}, {"encoder": "uni"}, ["resolution of 0.5 set patch_px: 224 alone (112 um)"]),
        ({"patch_px": 200}, {"encoder": "resnet50_trunc"}, ["takes 224 or 256", "patch_px: 224 and mpp_target: 0.446"]),
        ({"patch_px": 32}, {"encoder": "uni"}, ["Remedy: set tiling.patch_px: 224"]),
        ({"mpp_target": 4.0}, {}, ["mpp_target: 4", "0.25 to 2"]),
        ({"patch_px": 224, "mpp_target": 1.3}, {"encoder": "uni"}, ["mpp_target: 1.3", "0.25 to 1.2"]),
        ({}, {"precision": "bf16"}, ["features.precision: bf16", "declared"]),
        ({}, {"runtime": "openvino"}, ["features.runtime: openvino has no use"]),
        ({}, {"weights": "w.bin"}, ["features.weights"]),
        ({"patch_px": 224}, {"encoder": "uni", "runtime": "openvino", "device": "cuda"}, ["openvino runs on CPUs"]),
        ({"patch_px": 224}, {"encoder": "hibou_b"}, ["code that its publisher ships", "trust_remote_code: true"]),
        ({"patch_px": 224}, {"encoder": "openmidnight"}, ["pickle", "trust_remote_code: true"]),
    ],
)
def test_a_contradiction_is_named_with_what_to_set(tiling, features, parts):
    found = problems(tiling, **features)
    assert len(found) == 1
    for part in parts:
        assert part in found[0]
    assert "Remedy: " in found[0]
    with pytest.raises(MorphomeError):
        check_fit({**FEATURES, **features}, {**TILING, **tiling})


def test_trust_is_enough_for_code_of_others():
    assert problems({"patch_px": 224}, encoder="hibou_b", trust_remote_code=True) == []
    check_fit({"encoder": "openmidnight", "trust_remote_code": True}, {**TILING, "patch_px": 224})


def test_missing_and_old_packages_are_named():
    spec = ENCODERS["uni"]
    assert requirement_problems(spec) == []
    [(problem, remedy)] = requirement_problems(replace(spec, min_versions={"no-such-package": "1.0"}))
    assert "no-such-package" in problem
    assert remedy == "pip install 'no-such-package>=1.0'"
    [(problem, remedy)] = requirement_problems(replace(spec, min_versions={"pyyaml": "99"}))
    assert "pyyaml 99 or newer" in problem
    assert version_numbers("1.0.31.dev0") > version_numbers("1.0.3")
    assert version_numbers("1.0") >= version_numbers("1")


def test_reading_the_registry_is_quick():
    """Every start of the command line reads it."""
    import time

    started = time.thread_time()
    assert len(registry.read_registry()) == len(ENCODERS)
    assert time.thread_time() - started < 0.5
