"""What a neural model is trained on: the weights of the sampler, the choice of the epoch, loss, risk and curve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from morphome.models import hazard


def sampling_weights(bins: np.ndarray, event: np.ndarray) -> np.ndarray:
    """Probability of each patient such that every class (bin × status) that has members is drawn equally often.

    Args:
        bins, event: (n,) integers.

    Returns:
        (n,) float64, sum 1. Proportional to N/|class|, as in the lineage.
    """
    classes = 2 * np.asarray(bins) + np.asarray(event)
    _, place, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    weight = len(classes) / sizes[place]
    return weight / weight.sum()


class EpochChoice:
    """Which epoch is kept, and when to stop.

    ``inner_best``: the highest inner C, of equal ones the lower inner loss; stop after ``patience`` epochs without a
    higher C. While C cannot be computed the inner loss decides. ``last``: the last epoch.
    """

    def __init__(self, rule: str, patience: int) -> None:
        self.rule, self.patience = rule, patience
        self.best: tuple[float, float] | None = None
        self.epoch = 0
        self._waited = 0

    def update(self, epoch: int, c: float, loss: float) -> bool:
        """Take in an epoch; True when its state is the one to keep."""
        if self.rule == "last":
            self.epoch = epoch
            return True
        score = (-math.inf if math.isnan(c) else c, -loss)
        kept = self.best is None or score > self.best
        higher = self.best is None or score[0] > self.best[0] or (score[0] == -math.inf and kept)
        self._waited = 0 if higher else self._waited + 1
        if kept:
            self.best, self.epoch = score, epoch
        return kept

    @property
    def stop(self) -> bool:
        """True after ``patience`` epochs without a higher C."""
        return self.rule != "last" and self._waited >= self.patience


class HazardObjective:
    """Loss, risk and survival curve of models with a discrete-hazard head (time bins fitted on "train").

    A class-balanced sampler shows the model other event rates than the cohort has, so its hazards are those of the
    resampled patients. One offset per bin, refitted on the training patients as they are, puts the level back:
    recalibration in the large on the training fold, in the place of the prior correction for choice-based samples
    (King and Zeng, Political Analysis 9 (2001) 137). It is applied after either sampler; with "shuffle" it is close
    to 0. Only curves use it: loss and risk stay on the raw logits. It does not mend too wide a spread of the hazards.
    Patients censored within a bin count half in it (:func:`morphome.models.hazard.baseline_offsets`), while the loss
    counts them whole, which would lift S above Kaplan-Meier's where a bin is wide and censoring frequent.

    Attributes:
        edges: (K-1,) inner edges, months; offsets: (K,) added to the logits for curves, 0 until
            :meth:`recalibrate`.
    """

    def __init__(self, edges: np.ndarray, offsets: np.ndarray | None = None) -> None:
        self.edges = edges
        self.offsets = np.zeros(len(edges) + 1) if offsets is None else offsets

    def loss(self, output: Mapping[str, Any], time: float, event: int, beta: float) -> torch.Tensor:
        """Negative log-likelihood of one patient."""
        logits = output["logits"]
        bins = torch.as_tensor(hazard.bin_index([time], self.edges), device=logits.device)
        status = torch.tensor([event], device=logits.device)
        return hazard.nll_loss(logits, bins, status, beta)

    def recalibrate(self, logits: np.ndarray, time: np.ndarray, event: np.ndarray) -> None:
        """Refit the offsets on these patients, logits (n, K), each of them once."""
        self.offsets = hazard.baseline_offsets(logits, hazard.bin_index(time, self.edges), event)

    def prediction(self, logits: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Risk (n,) from raw and S(t) (n, T) from recalibrated logits (n, K) float64."""
        raw, level = torch.from_numpy(logits), torch.from_numpy(logits + self.offsets)
        curves = hazard.survival_curve(hazard.log_survival(level), self.edges, times).numpy()
        return hazard.risk(raw).numpy().copy(), curves
