"""Settings of every model for planted cohorts of a few hundred patients with bags of about eighty patches.

The published sizes are for 1024-dimensional features and many thousand patches; on these small data they only cost
time and learn the noise. One mapping says what differs from the schema's defaults, and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morphome.errors import MorphomeError
from morphome.schema import schema

#: Training of all networks, where it differs from the schema.
TRAINING: dict[str, Any] = {
    # Passes over 256 to 320 training patients; in X1_easy an interaction appears after 15 at the earliest.
    "epochs": 30,
    # Small networks bear a larger step than the published 2e-4, with which 30 passes end before anything is learned.
    "learning_rate": 0.001,
    # 256 patients in windows of 32 would be 8 steps a pass.
    "accumulation": 8,
    # A hundred times more left the interaction of X1_easy unlearned (pooled bags, product of both).
    "weight_decay": 1e-4,
    # The C of an inner part of 64 patients has a standard error of .05: choosing by it took epochs before the
    # interaction was learned (porpoise, X1_easy: C .565 so chosen, over three folds).
    "epoch_rule": "last",
    # Half of the patients have an event: nothing to balance.
    "sampler": "shuffle",
    # Whole bags: the largest has 100 patches.
    "max_patches": 128,
    # Results must not depend on the machine that runs them.
    "device": "cpu",
}
#: What differs for one model: its own settings, and under "training" those of its training.
MODELS: dict[str, dict[str, Any]] = {
    # The range of the ridge penalty follows 64 columns, not thousands; the PCA keeps what the planted kinds span.
    "mean_pool_cox": {"components": 16, "ridges": [1.0, 10.0, 100.0, 1000.0]},
    # Few trees do for 400 patients.
    "rsf": {"trees": 100},
    # A small product and a large step begin to find the interaction; it still rises after 30 epochs.
    "porpoise": {
        "fusion_dim": 64,
        "scale": 4,
        "dropinput": 0.0,
        "dropout": 0.25,
        "l1": 0.0,
        "training": {"learning_rate": 0.003, "epochs": 60},
    },
}
#: Names of settings that are widths, and the width that does here; smaller defaults stay.
WIDTHS = {"attention_dim": 32, "query_dim": 32, "head_dim": 32, "fusion_dim": 64}
WIDTH = 64
#: Counts that are cut: landmarks of attention, prototypes and clusters of patches, heads, repeated instances.
COUNTS = {"landmarks": 8, "heads": 4}


def settings_of(key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and training of a model, complete with the schema's defaults.

    A model without an entry in :data:`MODELS` gets its defaults with widths, counts and dropout cut.

    Raises:
        MorphomeError: no such model.
    """
    known: Mapping[str, Any] = schema()["$defs"]["models"]
    if key not in known:
        raise MorphomeError(f"there is no model '{key}'", f"models are {', '.join(known)}")
    own = dict(MODELS.get(key, {}))
    training = {**_defaults(schema()["$defs"]["training"]), **TRAINING, **own.pop("training", {})}
    properties = known[key]["properties"]
    settings = {name: _small(name, part) for name, part in properties.items() if "default" in part}
    return {**settings, **own}, training


def _small(name: str, part: Mapping[str, Any]) -> Any:
    """A default of the schema, cut to small data, and never below what the schema allows."""
    value = part["default"]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    least = part.get("minimum", value)
    if name in COUNTS:
        return max(least, min(value, COUNTS[name]))
    if name in WIDTHS or name == "dim" or name.endswith("_dim") or name == "feedforward":
        return max(least, min(value, WIDTHS.get(name, WIDTH)))
    if "dropout" in name:
        return max(least, min(value, 0.1))
    return value


def _defaults(part: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of a section and of the sections in it."""
    found: dict[str, Any] = {}
    for name, sub in part["properties"].items():
        if sub.get("type") == "object" and "properties" in sub:
            found[name] = _defaults(sub)
        elif "default" in sub:
            found[name] = sub["default"]
    return found
