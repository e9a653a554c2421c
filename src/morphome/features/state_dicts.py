"""Checkpoints: read without running code, unwrapped, with names brought to those of the network, loaded strictly."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from morphome.errors import MorphomeError

#: Prefixes that training wrappers put before every name.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_N_SHOWN = 6


def read_state_dict(path: Path, unwrap: Iterable[str] = ()) -> dict[str, Tensor]:
    """Tensors of a weights file by name.

    Args:
        path: ``.safetensors``, or a file of torch (.bin, .pth, .pt), which is read with ``weights_only``: tensors
            and plain containers alone, so that no code in it can run.
        unwrap: keys to descend where they are present, such as ``teacher`` or ``model``.

    Raises:
        MorphomeError: the file is damaged, holds more than tensors, or holds no tensors by name.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            content: object = load_file(path)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise MorphomeError(
                f"{path}: holds more than tensors, so opening it could run code; refused ({_first_line(error)})",
                "take the weights in safetensors format, or a file of tensors alone, from the publisher",
            ) from None
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise _damaged(path, error) from None
    for key in unwrap:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise MorphomeError(f"{path}: holds {type(content).__name__}, not tensors by name", "take another file")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise MorphomeError(
            f"{path}: holds no tensors by name; its keys are {sorted(map(str, content))[:_N_SHOWN]}",
            "the weights lie deeper or elsewhere: take the publisher's plain checkpoint",
        )
    return without_wrapper(tensors)


def without_wrapper(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take ``module.`` (data parallel) and ``_orig_mod.`` (compiled) off when every name has it."""
    for prefix in _WRAPPER_PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def from_dinov2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of DINOv2's own network to those of timm's.

    The network may lie below ``backbone.`` beside training heads, blocks may be grouped (``blocks.<chunk>.<n>.``),
    the mask token is for training only, registers and the gated feed-forward layer have other names. In a network
    with registers timm adds no position to the class token, so its position is added to it here.
    """
    if any(name.startswith("backbone.") for name in state):
        state = {n.removeprefix("backbone."): v for n, v in state.items() if n.startswith("backbone.")}
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "mask_token":
            continue
        new = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        new = new.replace("register_tokens", "reg_token").replace(".mlp.w12.", ".mlp.fc1.")
        out[new.replace(".mlp.w3.", ".mlp.fc2.")] = value
    if "reg_token" in out and "pos_embed" in out:
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


CONVERSIONS: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {"dinov2": from_dinov2}


def drop(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Without the names that begin with one of ``prefixes`` (classification heads, layers behind a cut)."""
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], path: Path, key: str) -> None:
    """Put weights into a network; every name and shape must agree. Weights become float32.

    The network may have been made on the meta device: it takes the tensors as they are.

    Raises:
        MorphomeError: naming the names or shapes that do not agree.
    """
    own = network.state_dict()
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(set(own) & set(state))
        if own[name].shape != state[name].shape
    ]
    parts = (("missing", missing), ("not known", unexpected), ("of another shape", shapes))
    if any(found for _, found in parts):
        listed = "; ".join(f"{len(found)} {what}: {_some(found)}" for what, found in parts if found)
        raise MorphomeError(
            f"{path}: these are not weights of encoder '{key}': {listed}",
            "name the file that belongs to this encoder, or choose the encoder that belongs to the file",
        )
    floats = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    network.load_state_dict(floats, strict=True, assign=True)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _N_SHOWN} more" if len(names) > _N_SHOWN else ""
    return ", ".join(names[:_N_SHOWN]) + more


def _damaged(path: Path, error: Exception) -> MorphomeError:
    return MorphomeError(f"{path}: cannot be read as weights ({_first_line(error)})", "fetch the file again")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
