"""What a neural model is trained on: the weights of the sampler, the choice of the epoch; loss, risk and curve of a
discrete-hazard head. The Cox head's objective is :mod:`morphome.training.cox_objective`.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from morphome import survival
from morphome.models import hazard
from morphome.training.data import Outcomes
from morphome.training.preprocess import Arrays


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
    higher C. Where C cannot be computed the inner loss decides; where that cannot either, the last epoch is kept.
    ``last``: the last epoch. ``oracle_outer_best``: as ``inner_best`` without patience, for the published protocol,
    whose "inner" part is the reported fold.
    """

    def __init__(self, rule: str, patience: int) -> None:
        self.rule, self.patience = rule, patience
        self.best: tuple[float, float] | None = None
        self.epoch = 0
        self.waited = 0

    def update(self, epoch: int, c: float, loss: float) -> bool:
        """Take in an epoch; True when its state is the one to keep."""
        score = (-math.inf if math.isnan(c) else c, -math.inf if math.isnan(loss) else -loss)
        if self.rule == "last" or score == (-math.inf, -math.inf):
            self.best, self.epoch = score, epoch
            return True
        kept = self.best is None or score > self.best
        higher = self.best is None or score[0] > self.best[0] or (score[0] == -math.inf and kept)
        self.waited = 0 if higher else self.waited + 1
        if kept:
            self.best, self.epoch = score, epoch
        return kept

    @property
    def stop(self) -> bool:
        """True after ``patience`` epochs without a higher C."""
        return self.rule == "inner_best" and self.waited >= self.patience


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
        output: key of the model's output; width: its columns K.
        whole_window: False: the loss of a patient stands for itself.
    """

    output = "logits"
    whole_window = False

    def __init__(self, edges: np.ndarray, offsets: np.ndarray | None = None, beta: float = 0.0) -> None:
        self.edges, self.beta = edges, beta
        self.width = len(edges) + 1
        self.offsets = np.zeros(self.width) if offsets is None else offsets

    def bins(self, time: np.ndarray) -> np.ndarray:
        """Time bin of each patient, (n,)."""
        return hazard.bin_index(time, self.edges)

    def loss(self, output: torch.Tensor, time: float, event: int, beta: float | None = None) -> torch.Tensor:
        """Negative log-likelihood of one patient from logits (1, K); β of the training section unless given."""
        bins = torch.as_tensor(hazard.bin_index([time], self.edges), device=output.device)
        status = torch.tensor([event], device=output.device)
        return hazard.nll_loss(output, bins, status, self.beta if beta is None else beta)

    def score(self, outputs: np.ndarray, data: Outcomes) -> tuple[float, float]:
        """Mean loss (β = 0, so that settings compare) and Harrell's C; NaN without patients or pairs."""
        if not data.ids:
            return math.nan, math.nan
        bins, event = torch.from_numpy(self.bins(data.time)), torch.from_numpy(data.event)
        loss = hazard.nll_loss(torch.from_numpy(outputs), bins, event)
        return loss.item(), float(survival.harrell(data.time, data.event, self.risk(outputs)).c)

    def risk(self, outputs: np.ndarray) -> np.ndarray:
        """Risk (n,), higher = worse, from logits (n, K) float64."""
        return hazard.risk(torch.from_numpy(outputs)).numpy().copy()

    def recalibrate(self, outputs: np.ndarray, time: np.ndarray, event: np.ndarray) -> None:
        """Refit the offsets on these patients, logits (n, K), each of them once."""
        self.offsets = hazard.baseline_offsets(outputs, self.bins(time), event)

    def prediction(self, outputs: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Risk (n,) from raw and S(t) (n, T) from recalibrated logits (n, K) float64."""
        level = torch.from_numpy(outputs + self.offsets)
        curves = hazard.survival_curve(hazard.log_survival(level), self.edges, times).numpy()
        return self.risk(outputs), curves

    def arrays(self) -> Arrays:
        """Fitted state, as saved with the model."""
        return {"fitted/bin_edges": self.edges, "fitted/baseline_offsets": self.offsets}
