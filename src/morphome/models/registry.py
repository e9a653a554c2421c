"""All models by key: what they are called, what they need, where they come from; and how to build the neural ones."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from morphome.errors import MorphomeError
from morphome.models.abmil import ABMIL
from morphome.models.mome import MoME


@dataclass(frozen=True)
class Dims:
    """Sizes that come from the data, not from the settings.

    Args:
        d_in: width of the patch features (0 for a model without slides).
        group_sizes: columns per gene group, in the order of ``Batch.groups``.
        n_bins: time bins K.
        router_seed: seed of routers that draw experts by a hash.
    """

    d_in: int
    group_sizes: dict[str, int] = field(default_factory=dict)
    n_bins: int = 4
    router_seed: int = 0


@dataclass(frozen=True)
class ModelInfo:
    """One row of the model table.

    Args:
        key: registry key, the ``model`` of a row of the configuration.
        title: name for people.
        reference: paper, or definition for models without one.
        needs: ``path``, ``omic_groups`` (neural), ``panels``, ``clinical`` (baselines).
        kind: ``neural`` models are built here, ``baseline`` ones by the training room.
    """

    key: str
    title: str
    reference: str
    needs: frozenset[str]
    kind: Literal["neural", "baseline"]


NEURAL: dict[str, type[nn.Module]] = {"abmil": ABMIL, "mome": MoME}

MODELS: dict[str, ModelInfo] = {
    info.key: info
    for info in (
        ModelInfo("random", "Random score", "Hash of the patient id; no information", frozenset(), "baseline"),
        ModelInfo(
            "clinical_cox",
            "Clinical Cox",
            "Cox, JRSS B 34 (1972) 187, ties by Efron, JASA 72 (1977) 557, ridge penalty",
            frozenset({"clinical"}),
            "baseline",
        ),
        ModelInfo(
            "coxnet_genes",
            "Coxnet on genes",
            "Simon, Friedman, Hastie, Tibshirani, J Stat Softw 39(5) (2011)",
            frozenset({"panels"}),
            "baseline",
        ),
        ModelInfo(
            "mean_pool_cox",
            "Mean-pool Cox",
            "Ridge Cox on principal components of the mean and SD of a patient's patch features",
            frozenset({"path"}),
            "baseline",
        ),
        ModelInfo(
            "abmil",
            "ABMIL",
            "Ilse, Tomczak, Welling, Attention-based deep multiple instance learning, ICML 2018",
            ABMIL.needs,
            "neural",
        ),
        ModelInfo(
            "mome",
            "MoME",
            "Xiong et al., MoME: Mixture of Multimodal Experts for Cancer Survival Prediction, MICCAI 2024, "
            "doi 10.1007/978-3-031-72083-3_30",
            MoME.needs,
            "neural",
        ),
    )
}


def info(key: str) -> ModelInfo:
    """The row of ``key``.

    Raises:
        MorphomeError: no such model; lists the known ones.
    """
    if key not in MODELS:
        raise MorphomeError(f"models: '{key}' is not a model", f"choose one of {', '.join(MODELS)}")
    return MODELS[key]


def defaults(key: str) -> dict[str, Any]:
    """Settings of a neural model and their defaults, read from its constructor.

    Raises:
        MorphomeError: no such neural model.
    """
    given = set(Dims.__dataclass_fields__)
    parameters = inspect.signature(_neural(key)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in given}


def build(key: str, settings: Mapping[str, Any], dims: Dims) -> nn.Module:
    """A neural model with random weights from torch's default generator (seed it first).

    Args:
        settings: overrides of :func:`defaults`.
        dims: sizes from the data; the model takes those that it names.

    Raises:
        MorphomeError: unknown model or setting; sizes that the model needs and that are missing.
    """
    model = _neural(key)
    unknown = sorted(set(settings) - set(defaults(key)))
    if unknown:
        raise MorphomeError(
            f"models.{key}: unknown settings {', '.join(unknown)}", f"known: {', '.join(defaults(key))}"
        )
    if "path" in model.needs and dims.d_in < 1:
        raise MorphomeError(f"models.{key} needs patch features", "add wsi to cohort.require")
    if "omic_groups" in model.needs and not dims.group_sizes:
        raise MorphomeError(f"models.{key} needs gene groups", "configure molecular.groups")
    names = set(inspect.signature(model).parameters)
    sizes = {name: getattr(dims, name) for name in Dims.__dataclass_fields__ if name in names}
    return model(**sizes, **settings)


def _neural(key: str) -> type[nn.Module]:
    if info(key).kind != "neural":
        raise MorphomeError(f"models: '{key}' is a baseline, not a network", "it is fitted by the training room")
    return NEURAL[key]
