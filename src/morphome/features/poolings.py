"""From what a network gives to one vector a tile; the registry names these functions.

``n_prefix`` counts the class token and the registers that stand before the patch tokens. Registers carry no place in
the image and never go into a mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def cls(tokens: Tensor, n_prefix: int) -> Tensor:
    """The class token, (B, D) of tokens (B, T, D)."""
    return tokens[:, 0]


def mean(tokens: Tensor, n_prefix: int) -> Tensor:
    """The mean of the patch tokens, (B, D) of tokens (B, T, D)."""
    return tokens[:, n_prefix:].mean(dim=1)


def cls_mean(tokens: Tensor, n_prefix: int) -> Tensor:
    """The class token, then the mean of the patch tokens: (B, 2 D) of tokens (B, T, D)."""
    return torch.cat([cls(tokens, n_prefix), mean(tokens, n_prefix)], dim=-1)


#: Poolings of tokens (B, T, D), by the name that the registry uses.
TOKEN_POOLINGS: dict[str, Callable[[Tensor, int], Tensor]] = {"cls": cls, "mean": mean, "cls_mean": cls_mean}


def gap(maps: Tensor) -> Tensor:
    """The mean over places: (B, C) of maps (B, C, H, W), or of tokens (B, T, C) without a class token."""
    return maps.mean(dim=(2, 3)) if maps.ndim == 4 else maps.mean(dim=1)


def pooler(network: nn.Module, pixels: Tensor) -> Tensor:
    """What a transformers model calls its pooled output, (B, D)."""
    return network(pixel_values=pixels).pooler_output


def image_features(network: nn.Module, pixels: Tensor) -> Tensor:
    """Projected image features of a CLIP model, (B, D), not normalised."""
    found = network.get_image_features(pixel_values=pixels)
    # transformers 5 wraps them in an output object, as its pooled output.
    return found if isinstance(found, Tensor) else found.pooler_output


def encode_image(network: nn.Module, pixels: Tensor) -> Tensor:
    """Image features of length 1, (B, D), of a model whose own code offers ``encode_image``."""
    return functional.normalize(network.encode_image(pixels), dim=-1)


def tensor(network: nn.Module, pixels: Tensor) -> Tensor:
    """What the network gives, which must be vectors (B, D) already."""
    found: Any = network(pixels)
    return found if isinstance(found, Tensor) else found.pooler_output


def conch_attention(network: nn.Module, pixels: Tensor) -> Tensor:
    """CONCH's attention-pooled vector before the projection to the space it shares with text, not normalised."""
    return network.encode_image(pixels, proj_contrast=False, normalize=False)


def musk_single(network: nn.Module, pixels: Tensor) -> Tensor:
    """MUSK's image vector of one scale, without head and output norm, (B, 1024)."""
    return _musk(network, pixels, several_scales=False)


def musk_ms_aug(network: nn.Module, pixels: Tensor) -> Tensor:
    """MUSK's image vector of several scales, without head and output norm, (B, 2048)."""
    return _musk(network, pixels, several_scales=True)


def _musk(network: nn.Module, pixels: Tensor, several_scales: bool) -> Tensor:
    found = network(image=pixels, with_head=False, out_norm=False, ms_aug=several_scales, return_global=True)
    return found[0]


#: Ways to call a network and take its vectors, by the name that the registry uses.
CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "pooler": pooler,
    "image_features": image_features,
    "encode_image": encode_image,
    "tensor": tensor,
    "conch_attention": conch_attention,
    "musk_single": musk_single,
    "musk_ms_aug": musk_ms_aug,
}
