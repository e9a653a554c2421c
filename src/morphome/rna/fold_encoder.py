"""Encoders of RNA that are fitted inside the training fold: principal components, group means, the z-scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from morphome.errors import MorphomeError

Arrays = dict[str, np.ndarray]
KINDS = ("snn_raw", "pca", "pathway_mean")


@dataclass(frozen=True)
class FoldRnaEncoder:
    """z-scores of the training fold's scaler in, one vector per patient out.

    A patient's vector depends on nobody else who is asked for at the same time, to the last bit.

    Attributes:
        kind: ``pca``, ``pathway_mean`` or ``snn_raw``.
        mean: (p,) column means that are taken off; zeros but for ``pca``.
        matrix: (p, d) axes of ``pca``, divided by one common number (see :meth:`fit`); (p, d) weights of
            ``pathway_mean``; (0, 0) for ``snn_raw``.
        names: names of the d values where they mean something (gene groups), else empty.
    """

    kind: str
    mean: np.ndarray
    matrix: np.ndarray
    names: tuple[str, ...] = ()

    @classmethod
    def fit(
        cls, kind: str, z: np.ndarray, groups: Mapping[str, Sequence[int]] | None = None, components: int = 512
    ) -> FoldRnaEncoder:
        """Fit on training patients.

        ``pca``: axes of the centred z by falling variance, the largest entry of each positive. All scores are divided
        by one number, so that the mean variance of a component among training patients is 1: distances between
        patients stay what they are. Dividing each component by its own SD would not keep them: with as many
        components as patients it moves all patients equally far apart. So these scores need no scaler behind them.

        Args:
            z: (n, p) finite z-scores.
            groups: name to column numbers (``pathway_mean``).
            components: most components (``pca``); there are never more than n - 1, nor directions without variance.

        Raises:
            MorphomeError: no such encoder, no group with a column, or nothing varies.
        """
        z = np.asarray(z, dtype=np.float64)
        width = z.shape[1]
        if kind == "snn_raw":
            return cls(kind, np.zeros(width), np.zeros((0, 0)))
        if kind == "pathway_mean":
            kept = {name: list(dict.fromkeys(columns)) for name, columns in (groups or {}).items() if len(columns)}
            if not kept:
                raise MorphomeError(
                    "molecular.encoder: pathway_mean needs gene groups", "configure molecular.groups, or name: pca"
                )
            weights = np.zeros((width, len(kept)))
            for number, columns in enumerate(kept.values()):
                weights[columns, number] = 1.0 / len(columns)
            return cls(kind, np.zeros(width), weights, tuple(kept))
        if kind != "pca":
            raise MorphomeError(
                f"molecular.encoder.name: '{kind}' is not fitted in a fold", f"one of {', '.join(KINDS)}"
            )
        mean = z.mean(axis=0)
        _, size, axes = np.linalg.svd(z - mean, full_matrices=False)
        # Directions without variance would be numerical noise.
        rank = int((size > 1e-9 * max(size.max(initial=0.0), 1e-300)).sum())
        kept_axes = min(components, len(z) - 1, rank)
        if kept_axes < 1:
            raise MorphomeError("molecular.encoder: no column of RNA varies among training patients", "check the table")
        axes = axes[:kept_axes].T
        top = np.abs(axes).argmax(axis=0)
        axes = axes * np.where(axes[top, np.arange(kept_axes)] < 0, -1.0, 1.0)
        common = np.sqrt((size[:kept_axes] ** 2).mean() / len(z))
        return cls(kind, mean, axes / common)

    @property
    def width(self) -> int:
        """Length of a vector."""
        return len(self.mean) if self.kind == "snn_raw" else self.matrix.shape[1]

    def transform(self, z: np.ndarray) -> np.ndarray:
        """Vectors of patients: z (n, p) to float64 (n, :attr:`width`).

        Raises:
            ValueError: other columns than those of the fit.
        """
        z = np.asarray(z, dtype=np.float64)
        if z.ndim != 2 or z.shape[1] != len(self.mean):
            raise ValueError(f"z is {z.shape}; the encoder was fitted on {len(self.mean)} columns")
        if self.kind == "snn_raw":
            return z.copy()
        # Patient by patient: a product of two matrices gives other last bits with other numbers of rows.
        centred = z - self.mean
        found = [row.copy() @ self.matrix for row in centred]
        return np.stack(found) if found else np.zeros((0, self.width))

    def arrays(self, prefix: str) -> Arrays:
        """Fitted state under ``prefix/``, to be saved with the model; numbers only."""
        text = "\n".join((self.kind, *self.names)).encode()
        return {
            f"{prefix}/mean": self.mean,
            f"{prefix}/matrix": self.matrix,
            f"{prefix}/names": np.frombuffer(text, dtype=np.uint8).copy(),
        }

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> FoldRnaEncoder:
        """Inverse of :meth:`arrays`."""
        kind, *names = np.asarray(arrays[f"{prefix}/names"], dtype=np.uint8).tobytes().decode().split("\n")
        return cls(kind, arrays[f"{prefix}/mean"], arrays[f"{prefix}/matrix"], tuple(names))
