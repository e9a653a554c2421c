"""How a network of the catalogue is built from its settings and the sizes of the data."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from morphome.errors import MorphomeError
from morphome.models.catalog import info


@dataclass(frozen=True)
class Dims:
    """Sizes that come from the data, not from the settings.

    Args:
        d_in: width of the patch features (0 for a model without slides).
        group_sizes: columns per gene group, in the order of ``Batch.groups``.
        n_bins: time bins K.
        n_omic: molecular columns in ``Batch.omic_all`` (0 for a model that does not ask for them).
        n_rna, n_cnv, n_mut: width of ``Batch.rna``, ``.cnv``, ``.mut`` (0 where the model does not ask for them).
        router_seed: seed of routers that draw experts by a hash.
        parts: arrays that the model's ``fit_parts`` fitted on the training fold (centres, chosen genes ...).
        missing_tokens: build learned tokens for patients without genes.
    """

    d_in: int
    group_sizes: dict[str, int] = field(default_factory=dict)
    n_bins: int = 4
    n_omic: int = 0
    n_rna: int = 0
    n_cnv: int = 0
    n_mut: int = 0
    router_seed: int = 0
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)
    missing_tokens: bool = False


def network(key: str) -> type[nn.Module]:
    """The class of a network.

    Raises:
        MorphomeError: no such model, or not a network.
    """
    if info(key).kind != "neural":
        raise MorphomeError(f"models: '{key}' is a baseline, not a network", "it is fitted by the training room")
    return info(key).load()


def defaults(key: str) -> dict[str, Any]:
    """Settings of a network and their defaults, read from its constructor.

    Raises:
        MorphomeError: no such network.
    """
    given = set(Dims.__dataclass_fields__)
    parameters = inspect.signature(network(key)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in given}


def build(key: str, settings: Mapping[str, Any], dims: Dims) -> nn.Module:
    """A network with random weights from torch's default generator (seed it first).

    Args:
        settings: overrides of :func:`defaults`.
        dims: sizes from the data; the model takes those that it names.

    Raises:
        MorphomeError: unknown model or setting; sizes that the model needs and that are missing.
    """
    model = network(key)
    unknown = sorted(set(settings) - set(defaults(key)))
    if unknown:
        raise MorphomeError(
            f"models.{key}: unknown settings {', '.join(unknown)}", f"known: {', '.join(defaults(key))}"
        )
    if "path" in model.needs and dims.d_in < 1:
        raise MorphomeError(f"models.{key} needs patch features", "add wsi to cohort.require")
    if "omic_groups" in model.needs and not dims.group_sizes:
        raise MorphomeError(f"models.{key} needs gene groups", "configure molecular.groups")
    if "omic_all" in model.needs and dims.n_omic < 1:
        raise MorphomeError(f"models.{key} needs molecular columns", "configure molecular.rna, .mut or .cnv")
    names = set(inspect.signature(model).parameters)
    sizes = {name: getattr(dims, name) for name in Dims.__dataclass_fields__ if name in names}
    return model(**sizes, **settings)
