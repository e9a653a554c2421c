"""Weights of encoders: names brought to those of the network, loaded strictly."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.state_dict import mismatch


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
    if listed := mismatch(network, state):
        raise MorphomeError(
            f"{path}: these are not weights of encoder '{key}': {listed}",
            "name the file that belongs to this encoder, or choose the encoder that belongs to the file",
        )
    floats = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    network.load_state_dict(floats, strict=True, assign=True)
