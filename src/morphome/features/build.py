"""A row of the registry and its weights to a network that gives one vector a tile."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.features.architectures import CTransPath, TruncatedResNet50, relative_position_index
from morphome.features.fit import requirement_problems
from morphome.features.poolings import CALLS, TOKEN_POOLINGS, gap
from morphome.features.registry import EncoderSpec
from morphome.features.state_dicts import CONVERSIONS, drop, load_strictly
from morphome.state_dict import read_state_dict
from morphome.vision import ensure_torchvision

_RANDOM_SCALE = 0.02


class PooledNetwork(nn.Module):
    """A network and how its vectors are taken: normalised float (B, 3, H, W) to (B, dim)."""

    def __init__(self, network: nn.Module, take: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.take = network, take

    def forward(self, pixels: Tensor) -> Tensor:
        return self.take(self.network, pixels)


class TokenPooling:
    """Takes vectors from the tokens of a transformer: ``tokens_of`` gives (B, T, D), ``pooling`` names a function."""

    def __init__(self, tokens_of: Callable[[nn.Module, Tensor], Tensor], pooling: str, n_prefix: int) -> None:
        self.tokens_of, self.pool, self.n_prefix = tokens_of, TOKEN_POOLINGS[pooling], n_prefix

    def __call__(self, network: nn.Module, pixels: Tensor) -> Tensor:
        return self.pool(self.tokens_of(network, pixels), self.n_prefix)


def build_model(spec: EncoderSpec, weights: Path | None, *, trust_remote_code: bool = False) -> nn.Module:
    """The network of an encoder with its weights, in eval mode, float32, on the CPU.

    Args:
        spec: row of the registry, in the variant wanted.
        weights: as :func:`morphome.features.weights.weights_path` gives it; None for an encoder without a file.
            Checksums are not looked at here, but by :func:`morphome.features.weights.weights_id`.
        trust_remote_code: lets a row with ``remote_code`` or ``pickled`` be used.

    Returns:
        Maps normalised float (B, 3, H, W) to (B, ``spec.dim``).

    Raises:
        MorphomeError: a package is missing or too old, the row needs trust, or the weights are not those of the row.
    """
    if (spec.remote_code or spec.pickled) and not trust_remote_code:
        raise MorphomeError(
            f"encoder '{spec.key}' runs its publisher's code or is published as a pickle",
            "read what it ships; if you trust it, set features.trust_remote_code: true",
        )
    for problem in requirement_problems(spec):
        raise MorphomeError(*problem)
    if spec.loader not in _BUILDERS:
        raise MorphomeError(f"encoder '{spec.key}' is no network", "it needs no weights and is loaded by itself")
    model = _BUILDERS[spec.loader](spec, weights)
    return model.float().eval().requires_grad_(False)


def tokens_of_timm(network: nn.Module, pixels: Tensor) -> Tensor:
    """Tokens after the last norm, (B, T, D), of a vision transformer of timm."""
    return network.forward_features(pixels)


def tokens_of_transformers(network: nn.Module, pixels: Tensor) -> Tensor:
    """Tokens after the last norm, (B, T, D), of a vision model of transformers."""
    return network(pixel_values=pixels).last_hidden_state


def gap_of_maps(network: nn.Module, pixels: Tensor) -> Tensor:
    """Mean over places of what a network gives."""
    return gap(network(pixels))


def timm_network(spec: EncoderSpec, device: str = "cpu") -> nn.Module:
    """The transformer of a timm row without head and pooling, with random weights (none on the meta device)."""
    ensure_torchvision()
    import timm
    from timm.layers import SwiGLUPacked

    layers = {"SwiGLUPacked": SwiGLUPacked, "SiLU": nn.SiLU}
    kwargs = {name: layers.get(value, value) if isinstance(value, str) else value
              for name, value in spec.arch_kwargs.items()}  # fmt: skip
    if device == "meta":
        kwargs["weight_init"] = "skip"  # without memory there is nothing to draw numbers into
    with torch.device(device):
        return timm.create_model(spec.arch, pretrained=False, num_classes=0, global_pool="", **kwargs)


def _timm(spec: EncoderSpec, weights: Path | None) -> nn.Module:
    # Made without memory: the tensors of the file become the weights, so a large model is held once.
    network = timm_network(spec, "meta")
    path = _file(spec, weights)
    state = read_state_dict(path, spec.unwrap)
    if spec.convert:
        state = CONVERSIONS[spec.convert](state)
    load_strictly(network, drop(state, ("head.",)), path, spec.key)
    return PooledNetwork(network, TokenPooling(tokens_of_timm, spec.pooling, spec.prefix_tokens))


def _random(spec: EncoderSpec, weights: Path | None) -> nn.Module:
    """Fixed random numbers; see ``RANDOM_RECIPE`` of the weights module, which stands for them."""
    network = timm_network(spec, "meta")
    rng = np.random.Generator(np.random.PCG64(0))
    state = {}
    for name, value in sorted(network.state_dict().items()):
        drawn = rng.normal(size=tuple(value.shape)) * _RANDOM_SCALE
        if "norm" in name:
            drawn = np.full(tuple(value.shape), float(name.endswith("weight")))
        elif name.endswith("bias"):
            drawn = np.zeros(tuple(value.shape))
        state[name] = torch.from_numpy(drawn.astype(np.float32))
    load_strictly(network, state, Path("(random numbers)"), spec.key)
    return PooledNetwork(network, TokenPooling(tokens_of_timm, spec.pooling, spec.prefix_tokens))


def _resnet(spec: EncoderSpec, weights: Path | None) -> nn.Module:
    network = TruncatedResNet50(**spec.arch_kwargs)
    path = _file(spec, weights)
    behind = tuple(f"layer{number}." for number in range(network.n_layers + 1, 5))
    state = drop(read_state_dict(path, spec.unwrap), ("fc.", *behind))
    # Files from before torch 0.4.1 lack the counters of batch norms, which nothing uses outside training.
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, torch.zeros_like(value))
    load_strictly(network, state, path, spec.key)
    return PooledNetwork(network, gap_of_maps)


def _ctranspath(spec: EncoderSpec, weights: Path | None) -> nn.Module:
    network = CTransPath(**{k: v for k, v in spec.arch_kwargs.items() if k != "stem"})
    path = _file(spec, weights)
    state = drop(read_state_dict(path, spec.unwrap), ("head.",))
    kept = {}
    for name, value in state.items():
        if name.endswith("relative_position_index"):
            side = round(len(value) ** 0.5)
            if not torch.equal(value, relative_position_index(side)):
                raise MorphomeError(
                    f"{path}: {name} numbers relative places in another order than CTransPath does",
                    "name the published file",
                )
        elif not name.endswith("attn_mask"):  # follows from the sizes; files differ in whether they hold it
            kept[name] = value
    load_strictly(network, kept, path, spec.key)
    return PooledNetwork(network, gap_of_maps)


def _transformers(spec: EncoderSpec, weights: Path | None) -> nn.Module:
    network = _from_folder(spec, _folder(spec, weights))
    if spec.pooling in TOKEN_POOLINGS:
        return PooledNetwork(network, TokenPooling(tokens_of_transformers, spec.pooling, spec.prefix_tokens))
    return PooledNetwork(network, CALLS[spec.pooling])


def _from_folder(spec: EncoderSpec, folder: Path) -> nn.Module:
    """A model of transformers from a local folder, every weight of it found there."""
    ensure_torchvision()
    import transformers

    try:
        network, info = getattr(transformers, spec.arch).from_pretrained(
            folder, local_files_only=True, trust_remote_code=spec.remote_code, output_loading_info=True,
            **spec.arch_kwargs,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        raise MorphomeError(
            f"{folder}: transformers {transformers.__version__} cannot load encoder '{spec.key}' from it: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
            f"fetch it again (morphome encoders prefetch {spec.key}) and try the version of transformers that its "
            "model card names",
        ) from error
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if lost:
        raise MorphomeError(
            f"{folder}: these are not weights of encoder '{spec.key}': {len(lost)} missing or of another shape: "
            f"{', '.join(lost[:6])}",
            f"fetch it again: morphome encoders prefetch {spec.key}",
        )
    return network


def _titan_conch(spec: EncoderSpec, weights: Path | None) -> nn.Module:
    """CONCH v1.5 as TITAN's own code hands it out."""
    titan = _from_folder(spec, _folder(spec, weights))
    network, _ = titan.return_conch()
    return PooledNetwork(network, CALLS[spec.pooling])


def _conch(spec: EncoderSpec, weights: Path | None) -> nn.Module:
    path = _file(spec, weights)
    read_state_dict(path, spec.unwrap)  # refuses a file that holds more than tensors before the package opens it
    module = importlib.import_module("conch.open_clip_custom")
    network, _ = module.create_model_from_pretrained(spec.arch, str(path))
    return PooledNetwork(network, CALLS[spec.pooling])


def _musk(spec: EncoderSpec, weights: Path | None) -> nn.Module:
    ensure_torchvision()
    import timm

    importlib.import_module("musk.modeling")  # registers the network with timm
    path = _file(spec, weights)
    network = timm.create_model(spec.arch)
    load_strictly(network, read_state_dict(path, ("model", "module")), path, spec.key)
    return PooledNetwork(network, CALLS[spec.pooling])


def _file(spec: EncoderSpec, weights: Path | None) -> Path:
    if weights is None or not Path(weights).is_file():
        raise MorphomeError(
            f"encoder '{spec.key}' needs a file of weights ({' or '.join(spec.files)}), not {weights}",
            f"run: morphome encoders prefetch {spec.key}, or set features.weights",
        )
    return Path(weights)


def _folder(spec: EncoderSpec, weights: Path | None) -> Path:
    if weights is None or not (Path(weights) / "config.json").is_file():
        raise MorphomeError(
            f"encoder '{spec.key}' needs a folder with config.json and {spec.files[0]}, not {weights}",
            f"run: morphome encoders prefetch {spec.key}, or set features.weights",
        )
    return Path(weights)


_BUILDERS: Mapping[str, Callable[[EncoderSpec, Path | None], Any]] = {
    "timm": _timm,
    "random": _random,
    "resnet": _resnet,
    "ctranspath": _ctranspath,
    "transformers": _transformers,
    "titan_conch": _titan_conch,
    "conch": _conch,
    "musk": _musk,
}
