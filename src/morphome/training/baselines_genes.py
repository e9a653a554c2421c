"""Rows on molecular columns: ridge Cox on genes, clinical Cox with the genes' score, random survival forest on both.

As in :mod:`morphome.training.baselines` they are fitted on all training patients (roles "train" and "inner_val"), and
what is chosen or scaled is so inside that set.
"""

from __future__ import annotations

import time as clock
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from morphome import survival
from morphome.errors import MorphomeError
from morphome.training.baselines import FIT_ROLES, Baseline, _Cox, _linear, out_of_fold, principal_axes
from morphome.training.data import Column, FoldData, Outcomes
from morphome.training.forest import SurvivalForest
from morphome.training.inner_cv import inner_cv_scores, inner_membership
from morphome.training.preprocess import Arrays, ClinicalEncoder, ColumnScaler
from morphome.training.wide_cox import fit_ridge_path


@dataclass(frozen=True)
class GeneTable:
    """Columns of some panels with the scaler of the training patients."""

    columns: tuple[Column, ...]
    scaler: ColumnScaler

    @classmethod
    def fit(
        cls, fold: FoldData, ids: Sequence[str], settings: Mapping[str, Any], notes: list[str]
    ) -> tuple[GeneTable, np.ndarray]:
        """Fit on these patients; also returns their values as read (n, p), NaN = not measured.

        Raises:
            MorphomeError: no column varies among them.
        """
        columns = fold.panel_columns(settings["panels"])
        for panel, count in fold.without_panel(settings["panels"], fold.ids()).items():
            if count:
                notes.append(f"{count} patients have no row in '{panel}': they get the training medians ({fold.where})")
        values = fold.gene_matrix(columns, ids)
        scaler = ColumnScaler.fit(values, settings["clip"])
        if not scaler.varies.any():
            raise MorphomeError(
                f"{fold.where}: no column of {', '.join(settings['panels'])} varies among training patients",
                "check the molecular tables",
            )
        return cls(columns, scaler), values

    def transform(self, fold: FoldData, ids: Sequence[str]) -> np.ndarray:
        """z-scores (n, p) of these patients."""
        return self.scaler.transform(fold.gene_matrix(self.columns, ids))

    def arrays(self) -> Arrays:
        """Fitted state; the names travel in :meth:`facts`."""
        return self.scaler.arrays("fitted/genes")

    def facts(self) -> list[list[str]]:
        """Panel and gene of each column."""
        return [list(column) for column in self.columns]

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray], facts: Sequence[Sequence[str]]) -> GeneTable:
        """Inverse of :meth:`arrays` and :meth:`facts`."""
        return cls(tuple(Column(*column) for column in facts), ColumnScaler.restore(arrays, "fitted/genes"))


class RidgeGenes(_Cox):
    """Ridge Cox (Breslow ties) on every column of the chosen panels, z-scores clipped; the ridge by inner stratified C.

    Minimises −ℓ(β) + ½·ridge·‖β‖², ridge = ``ridges_per_column`` times the number of columns that vary in training:
    for z-scores that hardly correlate 1 / ``ridges_per_column`` is the variance of x·β that the penalty expects,
    whatever the number of genes.
    """

    key = "ridge_genes"
    needs = frozenset({"panels"})

    def fit(self, fold: FoldData, notes: list[str]) -> None:
        self.fit_scores(fold, notes)

    def fit_scores(self, fold: FoldData, notes: list[str]) -> np.ndarray:
        """:meth:`fit`; the out-of-fold x·β (n,) of the training patients at the ridge chosen, for late fusion."""
        data = fold.outcomes(*FIT_ROLES)
        design, coef, held_out = self._fit_genes(fold, data, notes)
        self._finish(coef, design, data)
        return held_out

    def _fit_genes(self, fold: FoldData, data: Outcomes, notes: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """z-scores (n, p), coefficients (p,) and the out-of-fold x·β (n,) at the ridge chosen."""
        start = clock.perf_counter()
        self._genes, values = GeneTable.fit(fold, data.ids, self.settings, notes)
        columns = int(self._genes.scaler.varies.sum())
        shares = sorted((float(s) for s in self.settings["ridges_per_column"]), reverse=True)
        ridges = [share * columns for share in shares]
        membership = inner_membership(fold, data, self.settings["inner_folds"], self.seed, notes)
        held_out = self._held_out(values, data, membership, ridges)
        scores = inner_cv_scores(data, membership, len(ridges), lambda fit, held: held_out[:, held])
        best = self._choose(scores, ridges, notes, fold.where)
        z = self._genes.scaler.transform(values)
        fitted = fit_ridge_path(z, data.time, data.event, [ridges[best]])
        if not fitted.converged[0]:
            notes.append(f"the fit of the ridge Cox model on genes did not converge fully ({fold.where})")
        settings = [f"ridge={ridge:.6g} ({share:g} per column)" for ridge, share in zip(ridges, shares, strict=True)]
        self._record(settings, scores, best, clock.perf_counter() - start)
        return z, fitted.coef[0], held_out[best]

    def _held_out(
        self, values: np.ndarray, data: Outcomes, membership: np.ndarray, ridges: Sequence[float]
    ) -> np.ndarray:
        """x·β (ridges, n) of each training patient from the fits without its inner fold; scalers refitted there."""

        def score_fold(fit: np.ndarray, held: np.ndarray) -> np.ndarray:
            scaler = ColumnScaler.fit(values[fit], self.settings["clip"])
            path = fit_ridge_path(scaler.transform(values[fit]), data.time[fit], data.event[fit], ridges)
            return path.coef @ scaler.transform(values[held]).T

        return out_of_fold(data, membership, len(ridges), score_fold)

    def _design(self, fold: FoldData, ids: Sequence[str]) -> np.ndarray:
        return self._genes.transform(fold, ids)

    def arrays(self) -> Arrays:
        return super().arrays() | self._genes.arrays()

    def facts(self) -> dict[str, Any]:
        return {"columns": self._genes.facts()}

    def restore(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        super().restore(arrays, facts)
        self._genes = GeneTable.restore(arrays, facts["columns"])


@dataclass(frozen=True)
class ScoreScaler:
    """(score − centre) / spread, both of the out-of-fold scores of the training patients.

    Attributes:
        spread: infinite for a score that does not vary: it becomes 0 for everybody.
    """

    centre: float
    spread: float

    @classmethod
    def fit(cls, score: np.ndarray, of: str, notes: list[str], where: str) -> ScoreScaler:
        """From out-of-fold scores (n,) of ``of``; one that does not vary is left out with a note."""
        centre, spread = float(score.mean()), float(score.std())
        if spread <= survival.TIED_TOLERANCE:
            notes.append(f"the score of the {of} does not vary out of fold: it was left out ({where})")
            spread = np.inf
        return cls(centre, spread)

    @property
    def varies(self) -> bool:
        """False for a score that is left out."""
        return bool(np.isfinite(self.spread))

    def transform(self, score: np.ndarray) -> np.ndarray:
        """(n,) -> (n,), in SDs."""
        return (score - self.centre) / self.spread

    def array(self) -> np.ndarray:
        """Centre and spread, (2,)."""
        return np.array([self.centre, self.spread])

    @classmethod
    def restore(cls, array: np.ndarray) -> ScoreScaler:
        """Inverse of :meth:`array`."""
        return cls(*(float(v) for v in array))


def fuse_late(
    clinical: np.ndarray, scores: Sequence[np.ndarray], scalers: Sequence[ScoreScaler], data: Outcomes, ridge: float
) -> tuple[np.ndarray, survival.CoxFit, np.ndarray]:
    """Cox model (Efron ties) on clinical covariates and out-of-fold scores.

    Args:
        clinical: (n, c); scores: (n,) each, out of fold, unscaled; scalers: one per score; ridge: >= 0.

    Returns:
        The design (n, c + scores), the fit on the columns that vary, and the coefficients of all columns of the design.
    """
    design = np.column_stack([clinical, *(s.transform(v) for s, v in zip(scalers, scores, strict=True))])
    used = np.array([True] * clinical.shape[1] + [s.varies for s in scalers])
    fitted = survival.fit_cox_ridge(design[:, used], data.time, data.event, ridge)
    coef = np.zeros(design.shape[1])
    coef[used] = fitted.coef
    return design, fitted, coef


class ClinicalGenes(RidgeGenes):
    """Clinical Cox (Efron ties) with the score of :class:`RidgeGenes` as one more covariate: late fusion.

    The Cox model is fitted with the out-of-fold scores of the training patients, so that it learns what the genes say
    about patients that their model has not seen; later patients get the score of the fit on all training patients.
    Both are centred on the out-of-fold mean and divided by the out-of-fold SD. The ridge of the genes was chosen by
    the same inner folds; that choice among a few penalties is the only way in which a patient's outcome can touch its
    own score.
    """

    key = "clinical_genes"
    needs = frozenset({"clinical", "panels"})

    def fit(self, fold: FoldData, notes: list[str]) -> None:
        data = fold.outcomes(*FIT_ROLES)
        _, self._gene_coef, score = self._fit_genes(fold, data, notes)
        self._scale = ScoreScaler.fit(score, "genes", notes, fold.where)
        rows = fold.table.loc[list(data.ids)]
        self._encoder = ClinicalEncoder.fit(rows, self.settings["covariates"], notes, fold.where)
        clinical = self._encoder.transform(rows)
        design, fitted, coef = fuse_late(clinical, [score], [self._scale], data, self.settings["ridge"])
        self._check_converged(fitted, notes, fold.where)
        self._finish(coef, design, data)

    def _design(self, fold: FoldData, ids: Sequence[str]) -> np.ndarray:
        score = _linear(self._genes.transform(fold, ids), self._gene_coef)
        return np.column_stack([self._encoder.transform(fold.table.loc[list(ids)]), self._scale.transform(score)])

    @property
    def n_parameters(self) -> int:
        return super().n_parameters + int(np.count_nonzero(self._gene_coef))

    def arrays(self) -> Arrays:
        own = {"weights/gene_coef": self._gene_coef, "fitted/gene_score/centre_spread": self._scale.array()}
        return super().arrays() | self._encoder.arrays("fitted/clinical") | own

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"clinical": self._encoder.facts()}

    def restore(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        super().restore(arrays, facts)
        self._encoder = ClinicalEncoder.restore(arrays, "fitted/clinical", facts["clinical"])
        self._gene_coef = arrays["weights/gene_coef"]
        self._scale = ScoreScaler.restore(arrays["fitted/gene_score/centre_spread"])


class RandomForest(Baseline):
    """Random survival forest on clinical covariates and principal components of the chosen panels.

    Log-rank splits among √p columns; risk is the ensemble cumulative hazard summed over the training event times,
    S(t) = exp(−H(t)). Nothing is tuned.
    """

    key = "rsf"
    needs = frozenset({"clinical", "panels"})

    def fit(self, fold: FoldData, notes: list[str]) -> None:
        start = clock.perf_counter()
        data = fold.outcomes(*FIT_ROLES)
        self._genes, values = GeneTable.fit(fold, data.ids, self.settings, notes)
        self._axes = principal_axes(self._genes.scaler.transform(values), self.settings["components"])
        rows = fold.table.loc[list(data.ids)]
        self._encoder = ClinicalEncoder.fit(rows, self.settings["covariates"], notes, fold.where)
        trees, min_leaf = self.settings["trees"], self.settings["min_leaf"]
        self._forest = SurvivalForest(
            **survival.fit_survival_forest(
                self._design(fold, data.ids), data.time, data.event, trees=trees, min_leaf=min_leaf, seed=self.seed
            )
        )
        if not self._forest.n_splits:
            notes.append(f"no tree of the survival forest has a split: too few patients for min_leaf ({fold.where})")
        self._record([f"trees={trees}"], [np.nan], 0, clock.perf_counter() - start)

    def predict(self, fold: FoldData, ids: Sequence[str], times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        design = self._design(fold, ids)
        return self._forest.risk(design), self._forest.survival(design, times)

    def _design(self, fold: FoldData, ids: Sequence[str]) -> np.ndarray:
        z = self._genes.transform(fold, ids)
        # Component by component: a matrix product's last bits depend on how many patients are asked for.
        scores = [_linear(z, axis) for axis in self._axes.T]
        return np.column_stack([self._encoder.transform(fold.table.loc[list(ids)]), *scores])

    @property
    def n_parameters(self) -> int:
        """Number of splits in all trees."""
        return self._forest.n_splits

    def arrays(self) -> Arrays:
        state = self._genes.arrays() | self._encoder.arrays("fitted/clinical") | {"fitted/pca/axes": self._axes}
        return state | self._forest.arrays("weights/forest")

    def facts(self) -> dict[str, Any]:
        return {"columns": self._genes.facts(), "clinical": self._encoder.facts()}

    def restore(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        self._genes = GeneTable.restore(arrays, facts["columns"])
        self._encoder = ClinicalEncoder.restore(arrays, "fitted/clinical", facts["clinical"])
        self._axes = arrays["fitted/pca/axes"]
        self._forest = SurvivalForest.restore(arrays, "weights/forest")
