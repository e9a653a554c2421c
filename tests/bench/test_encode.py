"""The measurement of encoders: what it compares gives the same vectors, and it says what it did."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from morphome.bench import encode
from morphome.bench.encode import bench_encode, least_cosine, random_network
from morphome.errors import MorphomeError
from morphome.features.registry import encoder_spec


def test_every_way_gives_the_vectors_of_the_usual_loop(synthetic, painted, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "runtimes", lambda: ["torch"])  # compiling for OpenVINO takes seconds
    slide = synthetic.write_tiff(tmp_path / "slide.tif", painted)
    found = json.loads(json.dumps(bench_encode(slide, "tiny_random", rounds=1, tiles=5, threads=2)))
    assert torch.get_num_threads() == found["threads"] == 2
    assert (found["n_tiles"], found["patch_px"], found["weights"]) == (5, 64, "random numbers")
    rows = {(row["runtime"], row["precision"]): row for row in found["rows"]}
    assert {("torch", "bf16"), ("torch", "fp32")} == set(rows)
    for (_, precision), row in rows.items():
        assert row["cosine_min"] > (0.999 if precision == "bf16" else 0.99999)
        assert math.isclose(row["tiles_per_second"] / found["peer"], row["ratio"], rel_tol=1e-6)
    assert found["ratio"] == rows["torch", "bf16"]["ratio"]


def test_random_networks_are_the_same_each_time_and_leave_the_generator_alone():
    spec = encoder_spec("resnet50_trunc")
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second = random_network(spec).state_dict(), random_network(spec).state_dict()
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_network_that_comes_with_its_weights_needs_them():
    with pytest.raises(MorphomeError, match="'phikon' cannot be made without its weights"):
        random_network(encoder_spec("phikon"))


def test_least_cosine():
    a = np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)
    b = np.array([[2.0, 0.0], [1.0, 0.0]], np.float32)
    assert math.isclose(least_cosine(a, b), math.sqrt(0.5))
