"""The optimiser of the trainer: its kinds, its groups of parameters, and the learning rate of an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from morphome.models.fusion import FusionModel

#: Momentum of SGD, as in the lineage.
MOMENTUM = 0.9


def make_optimizer(
    module: nn.Module, beside: Iterable[nn.Parameter], training: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """An optimiser with one group per branch of a fusion model, one for the rest, one for what is trained beside it.

    Args:
        module: the model. beside: weights of heads that are not part of the model; without weight decay.
        training: ``optimizer`` (adam, adamw, radam, sgd), ``learning_rate``, ``weight_decay``.

    Returns:
        Each group has the key ``branch``: "path", "omic", "shared" or "beside".
    """
    branches = module.branch_parameters() if isinstance(module, FusionModel) else {}
    taken = {id(p) for parameters in branches.values() for p in parameters}
    rest = [p for p in module.parameters() if id(p) not in taken]
    decay = training["weight_decay"]
    groups = [
        {"params": list(parameters), "branch": branch, "weight_decay": decay}
        for branch, parameters in [*branches.items(), ("shared", rest)]
    ]
    groups.append({"params": list(beside), "branch": "beside", "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    rate = training["learning_rate"]
    match training["optimizer"]:
        # fused: three times faster than the loop over parameters on a CPU, for MoME's 20 M
        case "adam":
            return torch.optim.Adam(groups, lr=rate, fused=True)
        case "adamw":
            return torch.optim.AdamW(groups, lr=rate, fused=True)
        case "radam":
            return torch.optim.RAdam(groups, lr=rate)
        case "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, fused=True)
    raise ValueError(f"optimizer {training['optimizer']!r}")


def learning_rate(epoch: int, training: Mapping[str, Any]) -> float:
    """Learning rate of an epoch (1, 2, ...): linear warm-up, then constant or half a cosine down to 0."""
    rate, warm, epochs = training["learning_rate"], training["warmup_epochs"], training["epochs"]
    if epoch <= warm:
        return rate * epoch / (warm + 1)
    if training["schedule"] == "constant":
        return rate
    done = (epoch - warm - 1) / max(1, epochs - warm)
    return rate * 0.5 * (1 + math.cos(math.pi * done))


def set_rates(optimizer: torch.optim.Optimizer, rate: float, factors: Mapping[str, float]) -> None:
    """The learning rate of the next step, times the factor of a group's branch."""
    for group in optimizer.param_groups:
        group["lr"] = rate * factors.get(group["branch"], 1.0)
