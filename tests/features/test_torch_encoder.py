"""Networks as encoders: normalisation, padding, precision, folding, runtimes, errors."""

from __future__ import annotations

import builtins
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from morphome.errors import MorphomeError
from morphome.features import torch_encoder as module
from morphome.features.torch_encoder import TorchEncoder, fold_batch_norms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def spec(dim=24, **changes):
    row = {"key": "net", "dim": dim, "mean": MEAN, "std": STD, "precision": "fp32", "input_px": (32,)}
    return SimpleNamespace(**{**row, **changes})


class Residual(nn.Module):
    """Convolutions and batch norms as in a residual network: a shortcut, and one norm that stands alone."""

    def __init__(self, dim=24):
        super().__init__()
        self.bn_other = nn.BatchNorm2d(dim)  # names and order say nothing about who feeds whom
        self.conv1, self.bn1 = nn.Conv2d(3, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim)
        self.conv2, self.bn2 = nn.Conv2d(dim, dim, 3, padding=1, stride=2), nn.BatchNorm2d(dim)
        self.shortcut = nn.Sequential(nn.Conv2d(dim, dim, 1, stride=2, bias=False), nn.BatchNorm2d(dim))

    def forward(self, x):
        x = torch.relu_(self.bn1(self.conv1(x)))
        x = torch.relu_(self.bn2(self.conv2(x)) + self.shortcut(x))
        return self.bn_other(x).mean((2, 3))


class Transformer(nn.Module):
    """Patches, one block of attention, a class token."""

    def __init__(self, dim=24):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 8, stride=8)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return (x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v)))[:, 0]


def network(kind, seed=0):
    torch.manual_seed(seed)
    model = kind().eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for values in (m.weight, m.bias, m.running_mean):
                nn.init.normal_(values, 0.5, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return model.requires_grad_(False)


@pytest.fixture
def tiles():
    return np.random.default_rng(0).integers(0, 256, (21, 32, 32, 3), np.uint8)


def plain(model, tiles):
    """The usual loop: ToTensor and Normalize tile by tile, fp32."""
    vectors = []
    with torch.inference_mode():
        for tile in tiles:
            pixels = torch.from_numpy(tile).permute(2, 0, 1).float() / 255
            pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
            vectors.append(model(pixels[None])[0].numpy())
    return np.stack(vectors)


def cosine(a, b):
    return ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min()


@pytest.mark.parametrize("kind", [Residual, Transformer])
def test_vectors_equal_those_of_a_plain_loop(kind, tiles):
    encoder = TorchEncoder(spec(), network(kind), device="cpu", batch=4)
    found = encoder.encode(tiles)
    assert (found.shape, found.dtype) == ((21, 24), np.float32)
    np.testing.assert_allclose(found, plain(network(kind), tiles), rtol=1e-4, atol=1e-5)
    assert encoder.seconds_busy > 0


def test_normalisation_equals_totensor_and_normalize(tiles):
    from morphome.vision import ensure_torchvision

    ensure_torchvision()
    from torchvision.transforms import Compose, Normalize, ToTensor

    usual = Compose([ToTensor(), Normalize(MEAN, STD)])
    expected = torch.stack([usual(tile) for tile in tiles])
    net = module._Network(nn.Identity(), spec(), torch.float32, "cpu")
    assert torch.equal(net.normalise(torch.from_numpy(tiles)), expected)


def test_without_mean_and_std_pixels_lie_between_0_and_1(tiles):
    net = module._Network(nn.Identity(), spec(mean=None, std=None), torch.float32, "cpu")
    pixels = net.normalise(torch.from_numpy(tiles))
    np.testing.assert_array_equal(pixels.permute(0, 2, 3, 1).numpy(), tiles.astype(np.float32) / 255)


@pytest.mark.parametrize("kind", [Residual, Transformer])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_vector_depends_on_its_tile_alone(kind, precision, tiles):
    encoder = TorchEncoder(spec(), network(kind), device="cpu", batch=8, precision=precision)
    whole = encoder.encode(tiles)
    np.testing.assert_array_equal(encoder.encode(tiles[:5]), whole[:5], "the rest of the batch is padding")
    others = tiles.copy()
    others[1:8] = 255 - others[1:8]
    np.testing.assert_array_equal(encoder.encode(others)[0], whole[0])
    assert encoder.encode(tiles[:0]).shape == (0, 24)


def test_every_pass_has_one_shape(tiles):
    shapes = []
    model = network(Transformer)
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    TorchEncoder(spec(), model, device="cpu", batch=8).encode(tiles)
    assert shapes == [(8, 3, 32, 32)] * 3


def test_a_cpu_computes_in_small_passes(tiles):
    assert TorchEncoder(spec(), network(Transformer), device="cpu", batch=512).batch == module.CPU_BATCH


@pytest.mark.parametrize("kind", [Residual, Transformer])
def test_bf16_is_near_fp32_and_not_the_same(kind, tiles):
    exact = TorchEncoder(spec(), network(kind), device="cpu").encode(tiles)
    for declared, precision in (("bf16", "declared"), ("fp32", "bf16")):
        encoder = TorchEncoder(spec(precision=declared), network(kind), device="cpu", precision=precision)
        assert encoder.arithmetic == "bf16"
        found = encoder.encode(tiles)
        assert not np.array_equal(found, exact)
        assert cosine(found, exact) > 0.999


def test_large_weights_in_bf16_are_what_autocast_gives(tiles):
    model = network(Transformer)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        pixels = module._Network(nn.Identity(), spec(), torch.float32, "cpu").normalise(torch.from_numpy(tiles[:8]))
        expected = model(pixels).float().numpy()
    encoder = TorchEncoder(spec(), network(Transformer), device="cpu", batch=8, precision="bf16")
    np.testing.assert_array_equal(encoder.encode(tiles[:8]), expected)


def test_fp16_is_computed_in_fp32_on_a_cpu(tiles):
    encoder = TorchEncoder(spec(precision="fp16"), network(Transformer), device="cpu")
    assert encoder.arithmetic == "fp32"
    exact = TorchEncoder(spec(), network(Transformer), device="cpu").encode(tiles)
    np.testing.assert_array_equal(encoder.encode(tiles), exact)


def test_batch_norms_are_folded_where_a_convolution_feeds_them(tiles):
    model = network(Residual)
    folded, n = fold_batch_norms(model, 32)
    assert n == 3
    assert [name for name, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["bn_other"]
    assert isinstance(model.bn1, nn.BatchNorm2d), "the network that was given stays as it was"
    x = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_folding_that_changes_vectors_is_not_done():
    class Trap(Residual):
        def forward(self, x):
            raw = self.conv1(x)  # used beside its norm: the folded convolution would change it
            return (self.bn1(raw) + raw).mean((2, 3))

    model = network(Trap)
    folded, n = fold_batch_norms(model, 32)
    assert (folded is model, n) == (True, 0)


def test_timm_resnet_is_folded_whole():
    from morphome.vision import ensure_torchvision

    ensure_torchvision()
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False, num_classes=0).eval().requires_grad_(False)
    n_norms = sum(type(m) is nn.BatchNorm2d for m in model.modules())
    folded, n = fold_batch_norms(model, 64)
    assert n == n_norms > 10
    encoder = TorchEncoder(spec(512, input_px=(64,)), model, device="cpu", precision="bf16")
    assert encoder._network.convolutional
    tiles = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), np.uint8)
    assert cosine(encoder.encode(tiles), plain(model, tiles)) > 0.999
    assert folded is not model


def test_batches_may_be_fetched_late_and_in_any_order(tiles):
    encoder = TorchEncoder(spec(), network(Residual), device="cpu", batch=4)
    whole = encoder.encode(tiles)
    buffer = np.empty((4, 32, 32, 3), np.uint8)
    fetches = []
    for i in range(0, 20, 4):  # more than there are buffers, and the caller's own one is used again
        buffer[:] = tiles[i : i + 4]
        fetches.append(encoder.start(buffer))
    found = [fetch() for fetch in reversed(fetches)][::-1]
    np.testing.assert_array_equal(np.concatenate(found), whole[:20])
    np.testing.assert_array_equal(fetches[0](), whole[:4])


def test_tiles_of_another_size_get_buffers_of_their_own(tiles):
    encoder = TorchEncoder(spec(), network(Residual), device="cpu", batch=4)
    late = encoder.start(tiles[:4])
    small = encoder.encode(np.ascontiguousarray(tiles[:, :16, :16]))
    assert small.shape == (21, 24)
    np.testing.assert_array_equal(late(), encoder.encode(tiles[:4]))


def test_a_wrong_length_is_an_error(tiles):
    with pytest.raises(MorphomeError, match=r"network gives \(4, 24\).*have 23 values"):
        TorchEncoder(spec(23), network(Residual), device="cpu", batch=4).encode(tiles)


@pytest.mark.parametrize("bad", [np.zeros((2, 3, 32, 32), np.uint8), np.zeros((2, 32, 32, 3), np.float32)])
def test_anything_but_bytes_in_rgb_is_refused(bad):
    with pytest.raises(ValueError, match="not uint8"):
        TorchEncoder(spec(), network(Residual), device="cpu").encode(bad)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_which_batch_would_do(error, tiles):
    model = network(Residual)

    def fail(*_):
        raise error

    encoder = TorchEncoder(spec(), model, device="cpu", batch=6)
    encoder._network.model.register_forward_pre_hook(fail)
    with pytest.raises(
        MorphomeError, match=r"'net' on cpu: out of memory with batches of 6 tiles of 32 x 32 px"
    ) as caught:
        encoder.encode(tiles)
    assert caught.value.remedy == "set features.batch to 3 or less"


def test_faults_of_the_network_stay_what_they_are(tiles):
    encoder = TorchEncoder(spec(), network(Residual), device="cpu")
    encoder._network.model = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        encoder.encode(tiles)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_and_auto_takes_the_cpu():
    assert TorchEncoder(spec(), network(Residual)).device == "cpu"
    with pytest.raises(MorphomeError, match=r"features\.device: cuda"):
        TorchEncoder(spec(), network(Residual), device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", [Residual, Transformer])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gpu_gives_the_vectors_of_the_cpu(kind, precision, tiles):
    exact = TorchEncoder(spec(), network(kind), device="cpu").encode(tiles)
    encoder = TorchEncoder(spec(), network(kind), device="cuda", batch=4, precision=precision)
    assert encoder.arithmetic == precision
    assert cosine(encoder.encode(tiles), exact) > 0.999
    assert encoder.seconds_busy > 0


def test_threads_are_those_asked_for():
    before = torch.get_num_threads()
    try:
        TorchEncoder(spec(), network(Transformer), device="cpu", threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("kind", "precision", "least"), [(Residual, "fp32", 0.999999), (Transformer, "bf16", 0.999)])
def test_openvino_gives_the_same_vectors(kind, precision, least, tiles):
    pytest.importorskip("openvino")
    encoder = TorchEncoder(spec(), network(kind), runtime="openvino", precision=precision, batch=4)
    found, exact = encoder.encode(tiles), plain(network(kind), tiles)
    assert cosine(found, exact) > least
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(exact, axis=1), rtol=0.02)
    np.testing.assert_array_equal(encoder.encode(tiles[:3]), found[:3])


def test_openvino_that_is_not_there_is_an_error(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "openvino":
            raise ImportError("No module named 'openvino'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MorphomeError, match="openvino cannot be imported"):
        TorchEncoder(spec(), network(Residual), runtime="openvino")


def test_openvino_runs_on_no_gpu():
    with pytest.raises(MorphomeError, match="openvino runs on CPUs"):
        TorchEncoder(spec(), network(Residual), runtime="openvino", device="cuda")
