"""The table of routing diagnostics: one row per epoch, layer and patient; empty for models without a router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

#: Columns and types: the expert taken, the gate's probabilities p0 ... p3 and their entropy in nats.
TYPES = {
    "epoch": "int32",
    "layer": "str",
    "patient_id": "str",
    "role": "str",
    "expert": "int32",
    **dict.fromkeys(("p0", "p1", "p2", "p3", "entropy"), "float64"),
}


def diagnostics_table(rows: Sequence[Mapping[str, Any]] = ()) -> pd.DataFrame:
    """``rows`` as a table with the columns and types of the format, also when there is none."""
    return pd.DataFrame(list(rows), columns=list(TYPES)).astype(TYPES)
