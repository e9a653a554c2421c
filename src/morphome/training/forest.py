"""A fitted random survival forest as plain arrays: what is saved, and how it predicts.

The trees are grown by the library behind :func:`morphome.survival.fit_survival_forest`; nothing of it is needed to
predict. A leaf keeps the jumps of its cumulative hazard, which is a few numbers instead of a curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class SurvivalForest:
    """Nodes of all trees, one tree after the other; children are given by place in these arrays, −1 for a leaf.

    Attributes:
        root: (trees,) int64 place of each tree's first node.
        left, right: (nodes,) int64; left is taken where ``x[feature] <= threshold``, x rounded to float32.
        feature: (nodes,) int64; threshold: (nodes,) float64.
        event_times: (m,) times of the training events.
        jump_node, jump_time: (jumps,) int64 leaf and place in ``event_times``; jump: (jumps,) float64 rise of the
            leaf's Nelson-Aalen estimate there. Sorted by leaf.
    """

    root: np.ndarray
    left: np.ndarray
    right: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    event_times: np.ndarray
    jump_node: np.ndarray
    jump_time: np.ndarray
    jump: np.ndarray

    def leaves(self, X: np.ndarray) -> np.ndarray:
        """(n, trees) int64: the leaf in which each row of X (n, p) ends."""
        # The trees were grown on float32; a value next to a threshold must fall on the same side again.
        x = np.asarray(X, dtype=np.float32)
        node = np.tile(self.root, (len(x), 1))
        row = np.arange(len(x))[:, None]
        while (inside := self.left[node] >= 0).any():
            goes_left = x[row, self.feature[node]] <= self.threshold[node]
            node = np.where(inside, np.where(goes_left, self.left[node], self.right[node]), node)
        return node

    def cumulative_hazard(self, X: np.ndarray) -> np.ndarray:
        """H(t) (n, m) at the event times: mean over trees of the leaf's Nelson-Aalen estimate."""
        leaf = self.leaves(X)
        bounds = np.searchsorted(self.jump_node, [*self.root, len(self.left)])
        rises = np.zeros((len(leaf), len(self.event_times)))
        for tree, start in enumerate(self.root):
            stop = self.root[tree + 1] if tree + 1 < len(self.root) else len(self.left)
            own = slice(bounds[tree], bounds[tree + 1])
            table = np.zeros((stop - start, len(self.event_times)))
            table[self.jump_node[own] - start, self.jump_time[own]] = self.jump[own]
            rises += table[leaf[:, tree] - start]
        return np.cumsum(rises, axis=1) / len(self.root)

    def risk(self, X: np.ndarray) -> np.ndarray:
        """Ensemble mortality (n,): H summed over the event times (Ishwaran et al. 2008); higher = worse."""
        # Row by row along time, so that a patient's risk does not depend on who else is asked for.
        return np.cumsum(self.cumulative_hazard(X), axis=1)[:, -1]

    def survival(self, X: np.ndarray, times: np.ndarray) -> np.ndarray:
        """S(t) = exp(−H(t)) (n, len(times)); 1 before the first event, level after the last."""
        hazard = np.column_stack([np.zeros(len(X)), self.cumulative_hazard(X)])
        return np.exp(-hazard[:, np.searchsorted(self.event_times, np.asarray(times), side="right")])

    @property
    def n_splits(self) -> int:
        """Number of nodes that split."""
        return int((self.left >= 0).sum())

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """All parts under ``prefix/``."""
        return {f"{prefix}/{field.name}": getattr(self, field.name) for field in fields(self)}

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> SurvivalForest:
        """Inverse of :meth:`arrays`."""
        return cls(**{field.name: arrays[f"{prefix}/{field.name}"] for field in fields(cls)})
