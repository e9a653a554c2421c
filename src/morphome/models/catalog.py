"""All models by key: what they are called, what they need, where they come from, which class they are. No torch."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from morphome.errors import MorphomeError

CATALOG = Path(__file__).parent.parent / "schemas" / "models.schema.yaml"


@dataclass(frozen=True)
class ModelInfo:
    """One row of the model table.

    Args:
        key: registry key, the ``model`` of a row of the configuration.
        title: name for people.
        reference: paper, or definition for models without one.
        needs: ``path``, ``omic_groups``, ``omic_all``, ``rna``, ``cnv``, ``mut`` (neural), ``panels``, ``clinical``
            (baselines).
        module, name: of the class.
        trains_with: what it is given in training only.
        head: ``hazard`` or ``cox``.
    """

    key: str
    title: str
    reference: str
    needs: frozenset[str]
    module: str
    name: str
    trains_with: frozenset[str] = frozenset()
    head: str = "hazard"

    @property
    def kind(self) -> Literal["neural", "baseline"]:
        """``neural`` models are networks, ``baseline`` ones are fitted by the training room itself."""
        return "neural" if self.module.startswith("morphome.models.") else "baseline"

    def load(self) -> type:
        """The class; imports its module."""
        return getattr(importlib.import_module(self.module), self.name)


@functools.cache
def catalog() -> dict[str, dict[str, Any]]:
    """The rows of ``models.schema.yaml``: each a JSON schema of settings with further keys."""
    return yaml.safe_load(CATALOG.read_text(encoding="utf-8"))


def models() -> dict[str, ModelInfo]:
    """Every model in the order of the catalogue."""
    return {key: info(key) for key in catalog()}


def info(key: str) -> ModelInfo:
    """The row of ``key``.

    Raises:
        MorphomeError: no such model; lists the known ones.
    """
    if key not in catalog():
        raise MorphomeError(f"models: '{key}' is not a model", f"choose one of {', '.join(catalog())}")
    row = catalog()[key]
    module, name = row["class"].split(":")
    trains_with = frozenset(row.get("trains_with", ()))
    needs = frozenset(row["needs"])
    return ModelInfo(key, row["title"], row["reference"], needs, module, name, trains_with, row.get("head", "hazard"))


def row_needs(entry: Mapping[str, Any]) -> frozenset[str]:
    """Everything that training reads for a row of the model table: of its model, and of the teacher if it has one.

    Args:
        entry: ``model`` and ``training`` of the row.
    """
    distil = entry["training"].get("distil") or {}
    keys = [entry["model"], *([distil["teacher"]] if distil.get("teacher") else [])]
    needs = frozenset().union(*(info(key).needs | info(key).trains_with for key in keys))
    return needs | ({"omic_groups"} if distil.get("loss") == "gene_aux" else frozenset())
