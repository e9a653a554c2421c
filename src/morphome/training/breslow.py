"""Survival curves of models that give a log risk: Breslow's baseline hazard of the training patients.

The partial likelihood of Cox's model says nothing about the level of the hazard. Breslow's estimate puts it back:
H0(t) = Σ_{t_k ≤ t} d_k / Σ_{j: T_j ≥ t_k} exp(h_j), and S(t) = exp(−H0(t)·exp(h)) (Breslow, discussion of Cox, JRSS B
34 (1972) 216). It takes each training patient once, whatever a sampler drew. It sets the level only: log risks that
are spread too widely, as those of an overfitted network, stay so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from morphome import survival
from morphome.errors import MorphomeError
from morphome.training.preprocess import Arrays


@dataclass(frozen=True)
class BreslowBaseline:
    """A step function H0(t): 0 before the first training time, constant after the last.

    Attributes:
        times: (m,) unique observed training times, months, increasing; hazard: (m,) H0 there.
    """

    times: np.ndarray
    hazard: np.ndarray

    @classmethod
    def fit(cls, log_risk: ArrayLike, time: ArrayLike, event: ArrayLike, where: str = "") -> BreslowBaseline:
        """From the training patients, each once; without an event H0 is 0.

        Args:
            log_risk: h, (n,) or (n, 1); time: months, (n,); event: 1 = observed, (n,).
            where: what the patients are, for messages.

        Raises:
            MorphomeError: log risks so large that exp(h) leaves the range of numbers, as those of a diverged network.
        """
        h = np.asarray(log_risk, dtype=np.float64).reshape(-1)
        with np.errstate(over="ignore"):
            total = np.exp(h).sum()
        # exp(h) = 0 for everybody at risk would divide by 0, an infinite sum would make H0 vanish.
        if not np.isfinite(h).all() or not np.isfinite(total) or (len(h) and h.min() < -700.0):
            raise MorphomeError(
                f"{where + ': ' if where else ''}log risks of the training patients from {np.min(h):g} to "
                f"{np.max(h):g} give no survival curve",
                "the training has diverged; try a lower training.learning_rate",
            )
        times, hazard = survival.breslow(h, time, event)
        return cls(np.asarray(times, np.float64), np.asarray(hazard, np.float64))

    def cumulative_hazard(self, times: ArrayLike) -> np.ndarray:
        """H0 at ``times``, (T,)."""
        return survival.step(self.times, self.hazard, times, before=0.0)

    def survival(self, log_risk: ArrayLike, times: ArrayLike) -> np.ndarray:
        """S(t) = exp(−H0(t)·exp(h)), (n, T) float64.

        Args:
            log_risk: h, (n,) or (n, 1), on the scale of the training patients'.
            times: months, (T,).
        """
        h = np.asarray(log_risk, dtype=np.float64).reshape(-1)
        hazard = self.cumulative_hazard(times)
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.exp(h)[:, None] * hazard[None, :]
        # Before the first event S is 1 even for a log risk whose exponential is infinite.
        return np.exp(-np.where(hazard > 0, total, 0.0))

    def arrays(self, prefix: str = "fitted/baseline") -> Arrays:
        """Fitted state under ``prefix/``."""
        return {f"{prefix}/times": self.times, f"{prefix}/cumulative_hazard": self.hazard}

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray], prefix: str = "fitted/baseline") -> BreslowBaseline:
        """Inverse of :meth:`arrays`."""
        return cls(arrays[f"{prefix}/times"], arrays[f"{prefix}/cumulative_hazard"])
