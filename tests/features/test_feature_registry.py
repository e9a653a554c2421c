"""One test over every encoder, and what changes a fingerprint."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import yaml

from morphome.errors import MorphomeError
from morphome.features.dimensions import DIMENSIONS
from morphome.features.registry import ENCODERS, encoder_spec, fingerprint, fingerprint_sha256, load, tiling_key

TILING = {"patch_px": 256, "mpp_target": 0.5, "min_tissue": 0.5, "mpp_overrides": {}, "allow_upsampling": False}
FEATURES = {"encoder": "stain_texture"}


@pytest.mark.parametrize("key", ENCODERS)
def test_every_encoder_keeps_its_contract(key, painted):
    spec = encoder_spec(key)
    encoder = load(key)
    side = spec.input_px or 128
    starts = [(x, y) for y in range(100, 700 - side, 90) for x in range(100, 900 - side, 110)][:9]
    tiles = np.stack([painted[y : y + side, x : x + side] for x, y in starts])
    vectors = encoder.encode(tiles)
    assert vectors.shape == (len(tiles), spec.dim)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors.astype(np.float16)).all()
    assert len(spec.dimension_names) == len(set(spec.dimension_names)) == spec.dim
    np.testing.assert_array_equal(encoder.encode(tiles), vectors)
    np.testing.assert_array_equal(np.concatenate([encoder.encode(tiles[i : i + 1]) for i in range(9)]), vectors)
    assert encoder.encode(tiles[:0]).shape == (0, spec.dim)
    assert spec.licence
    assert spec.supported_mpp[0] < spec.supported_mpp[1]


def test_the_configuration_offers_exactly_these_encoders(repository):
    schema = yaml.safe_load((repository / "src/morphome/schemas/config.schema.yaml").read_text())
    assert set(schema["properties"]["features"]["properties"]["encoder"]["enum"]) == set(ENCODERS)


def test_an_unknown_encoder_is_refused_by_name():
    for call in (encoder_spec, load, lambda key: fingerprint({"encoder": key}, TILING)):
        with pytest.raises(MorphomeError, match="uni_9"):
            call("uni_9")


def test_a_fingerprint_is_about_vectors_alone():
    first = fingerprint(FEATURES, TILING)
    assert len(first) == 12
    assert fingerprint_sha256(FEATURES, TILING).startswith(first)
    same = [
        ({**FEATURES, "max_failed_tiles": 0.5, "source": "encode"}, TILING),
        (FEATURES, {**TILING, "min_tissue": 0.1, "mpp_overrides": {"a": 0.3}}),
        (FEATURES, {**TILING, "mpp_target": 0.50}),
    ]
    assert {fingerprint(*args) for args in same} == {first}
    others = [{**TILING, "patch_px": 224}, {**TILING, "mpp_target": 1.0}, {**TILING, "mpp_target": 1}]
    found = [fingerprint(FEATURES, tiling) for tiling in others]
    assert first not in found
    assert found[1] == found[2]


def test_a_tiling_key_names_the_tiling_but_no_single_slide():
    key = tiling_key(TILING)
    assert key.startswith("256px_0.5mpp_")
    assert tiling_key({**TILING, "mpp_overrides": {"a": 0.3}}) == key
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
        "fingerprint({'encoder': 'stain_texture'}, {'patch_px': 256, 'mpp_target': 0.5});"
        "print([m for m in ('numpy', 'h5py', 'PIL', 'skimage', 'pandas') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
