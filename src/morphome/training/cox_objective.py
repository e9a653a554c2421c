"""Loss, risk and survival curve of models with a Cox head, and the windows that its loss needs.

The partial likelihood compares patients, so the loss is that of a window of patients while bags come one at a time:
a first pass without gradient gives every log risk h_k, the loss of the window gives g_k = dL/dh_k, and a second pass
back-propagates g_k h_k of each patient. The gradient is exact and the memory that of one bag.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from morphome import survival
from morphome.models import hazard
from morphome.training.breslow import BreslowBaseline
from morphome.training.data import Outcomes
from morphome.training.preprocess import Arrays

#: Events that a window has, where the fold has them.
EVENTS_PER_WINDOW = 8


class CoxObjective:
    """Cox partial likelihood (ties by Efron) over windows; curves by Breslow's baseline of the training patients.

    Attributes:
        output: key of the model's output; width: its columns, 1.
        whole_window: True: the loss is one of a window of patients.
    """

    output = "log_risk"
    width = 1
    whole_window = True

    def __init__(self, baseline: BreslowBaseline | None = None) -> None:
        self.baseline = baseline

    def bins(self, time: np.ndarray) -> np.ndarray:
        """No time bins: 0 for everybody, (n,)."""
        return np.zeros(len(time), dtype=np.int64)

    def loss(self, log_risk: torch.Tensor, time: np.ndarray, event: np.ndarray) -> torch.Tensor:
        """Negative partial log-likelihood per event of a window: log risks (n,), months (n,), events (n,)."""
        months, status = (torch.tensor(values, device=log_risk.device) for values in (time, event))
        return hazard.cox_loss(log_risk, months, status, ties="efron")

    def coefficients(self, log_risk: torch.Tensor, time: np.ndarray, event: np.ndarray) -> tuple[torch.Tensor, float]:
        """g = dL/dh (n,) of a window, and L; 0 where nobody can be compared."""
        h = log_risk.detach().double().requires_grad_()
        if len(h) < 2 or not event.any():
            return torch.zeros_like(h), 0.0
        with torch.enable_grad():
            loss = self.loss(h, time, event)
        return torch.autograd.grad(loss, h)[0], loss.item()

    def score(self, outputs: np.ndarray, data: Outcomes) -> tuple[float, float]:
        """Loss per event and Harrell's C of log risks (n, 1); NaN without events or pairs."""
        if len(data.ids) < 2 or not data.event.any():
            return math.nan, math.nan
        loss = self.loss(torch.from_numpy(outputs[:, 0]), data.time, data.event)
        return loss.item(), float(survival.harrell(data.time, data.event, self.risk(outputs)).c)

    def risk(self, outputs: np.ndarray) -> np.ndarray:
        """Log risk (n,), from (n, 1) float64."""
        return outputs[:, 0].copy()

    def recalibrate(self, outputs: np.ndarray, time: np.ndarray, event: np.ndarray) -> None:
        """Fit the baseline hazard on these patients, log risks (n, 1), each of them once."""
        self.baseline = BreslowBaseline.fit(outputs[:, 0], time, event)

    def prediction(self, outputs: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Risk (n,) and S(t) (n, T) from log risks (n, 1) float64."""
        return self.risk(outputs), self.baseline.survival(outputs[:, 0], times)

    def arrays(self) -> Arrays:
        """Fitted state, as saved with the model."""
        return self.baseline.arrays("fitted/breslow")

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray]) -> CoxObjective:
        """Inverse of :meth:`arrays`."""
        return cls(BreslowBaseline.restore(arrays, "fitted/breslow"))


def windows(event: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """All patients once, dealt into windows of about ``size`` with about equally many events each.

    There are fewer and larger windows where ``size`` patients would have less than :data:`EVENTS_PER_WINDOW` events.

    Args:
        event: (n,) 0 or 1.

    Returns:
        Indices of the patients of each window, in random order.
    """
    died, others = rng.permutation(np.flatnonzero(event)), rng.permutation(np.flatnonzero(event == 0))
    count = max(1, min(len(event) // size, len(died) // EVENTS_PER_WINDOW))
    # Those without event are dealt from the other end, so that sizes differ by one at most.
    dealt = [np.concatenate([died[k::count], others[count - 1 - k :: count]]) for k in range(count)]
    return [rng.permutation(window) for window in dealt]
