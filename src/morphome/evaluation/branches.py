"""How well each branch of a fused model ranks patients alone: linear heads on what slides and genes hand to the fusion.

The heads learn beside the model. Compared with models of slides or genes alone, trained on the same folds, they say
whether fusion leaves a branch undertrained, which is what balancing the modalities could mend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from morphome.evaluation.intervals import Weights, percentile_interval, stratified_c

if TYPE_CHECKING:
    from morphome.evaluation.evaluate import Row

COLUMNS = ("name", "model", "branch", "harrell_c", "lower", "upper")


def branch_table(rows: Sequence[Row], weights: Weights | None) -> pd.DataFrame:
    """Stratified C of every branch on the test folds, with a patient bootstrap interval.

    Returns:
        ``name, model, branch, harrell_c, lower, upper``; no row for models without branches.
    """
    found = []
    for row in rows:
        branches = sorted(set.intersection(*(set(fold.branch_risk) for fold in row.folds.values())))
        for branch in branches:
            repeats = [
                [replace(fold, risk=fold.branch_risk[branch], branch_risk={}) for fold in folds]
                for folds in row.repeats
            ]
            value = float(stratified_c(repeats)[0])
            resampled = stratified_c(repeats, weights) if weights is not None else np.array([])
            interval = percentile_interval(resampled)
            found.append([row.name, row.model, branch, value, interval.lower, interval.upper])
    return pd.DataFrame(found, columns=list(COLUMNS)).astype(
        dict.fromkeys(("name", "model", "branch"), "str") | dict.fromkeys(("harrell_c", "lower", "upper"), "float64")
    )
