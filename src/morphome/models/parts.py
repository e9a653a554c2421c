"""What a model may see of the training fold before it is built: for k-means centres, chosen genes and their like.

A model with fitted parts has ``@classmethod fit_parts(cls, settings, sample) -> dict[str, ndarray]``. The arrays reach
its constructor as ``parts`` and are saved with it, so that a reloaded model has the same sizes and numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TrainingSample:
    """The training patients, each once, in the order of their ids.

    Args:
        time: (n,) months; event: (n,) 0 or 1; bins: (n,) time bins.
        groups: standardised gene groups, one (n, |G_g|) array per group; empty without groups. For a model that reads
            genes in training only NaN is what was not measured; else it has the training median.
        patches: ``patches(most)`` gives up to ``most`` patch features (m, d_in) float32, drawn evenly over patients.
        seed: of this fold, for what is drawn.
    """

    time: np.ndarray
    event: np.ndarray
    bins: np.ndarray
    groups: tuple[np.ndarray, ...]
    patches: Callable[[int], np.ndarray]
    seed: int
