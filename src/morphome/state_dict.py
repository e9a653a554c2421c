"""Files of weights: read without running code, unwrapped, and compared with the network they are for."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from morphome.errors import MorphomeError

#: Prefixes that training wrappers put before every name: data parallel and compiled networks.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
#: What torch raises for damaged files.
_DAMAGED = (
    *(OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError),
    *(struct.error, zipfile.BadZipFile),
)
_N_SHOWN = 6


def read_state_dict(
    path: Path, unwrap: Iterable[str] = (), prefixes: Iterable[str] = WRAPPER_PREFIXES
) -> dict[str, Tensor]:
    """Tensors of a weights file by name.

    Args:
        path: ``.safetensors``, or a file of torch (.bin, .pth, .pt), which is read with ``weights_only``: tensors
            and plain containers alone, so that no code in it can run.
        unwrap: keys to descend where they are present, such as ``teacher`` or ``model``.
        prefixes: taken off, one after the other, where every name has them.

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
        except _DAMAGED as error:
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
    for prefix in prefixes:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def mismatch(network: nn.Module, state: Mapping[str, Tensor]) -> str:
    """In which names and shapes weights differ from those of a network; empty where they fit."""
    own = network.state_dict()
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(set(own) & set(state))
        if own[name].shape != state[name].shape
    ]
    parts = (("missing", missing), ("not known", unexpected), ("of another shape", shapes))
    return "; ".join(f"{len(found)} {what}: {_some(found)}" for what, found in parts if found)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _N_SHOWN} more" if len(names) > _N_SHOWN else ""
    return ", ".join(names[:_N_SHOWN]) + more


def _damaged(path: Path, error: Exception) -> MorphomeError:
    return MorphomeError(f"{path}: cannot be read as weights ({_first_line(error)})", "fetch the file again")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
