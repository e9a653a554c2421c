"""The JSON schema of the configuration, with that of each model; the only place of its defaults."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

from morphome.models.catalog import catalog

SCHEMA = Path(__file__).parent / "schemas" / "config.schema.yaml"


@functools.cache
def schema() -> dict[str, Any]:
    """The schema of the configuration; that of each model's settings is in ``$defs.models``."""
    whole = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    whole["$defs"]["models"] = catalog()
    return whole
