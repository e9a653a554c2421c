"""Rows that every table needs: random score, clinical Cox, elastic-net Cox on genes, mean-pool ridge Cox on slides.

They are fitted on all training patients (roles "train" and "inner_val"); those with a penalty choose it by
cross-validation inside that set, with the scalers refitted in every inner fold and with whole sites held out when the
outer folds hold out whole sites.
"""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from morphome import survival
from morphome.errors import MorphomeError
from morphome.training.breslow import BreslowBaseline
from morphome.training.data import Column, FoldData, Outcomes, derive_seed
from morphome.training.diagnostics import diagnostics_table
from morphome.training.inner_cv import inner_cv_scores, inner_membership
from morphome.training.preprocess import Arrays, ClinicalEncoder, ColumnScaler

FIT_ROLES = ("train", "inner_val")
#: Smallest elastic-net penalty of the path, as a share of the one that removes every column.
ALPHA_MIN_RATIO = 0.01


class Baseline:
    """What all baselines share: the interface of a trainable model and the history of trials.

    A model has ``needs``, ``fit``, ``predict``, ``arrays``/``facts`` (its fitted state) and ``restore``.
    """

    key: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    experts: ClassVar[tuple[str, ...]] = ()
    fit_roles: ClassVar[tuple[str, ...]] = FIT_ROLES

    def __init__(self, settings: Mapping[str, Any], training: Mapping[str, Any], seed: int) -> None:
        """Args:
        settings: the model's own settings; training: the training section (only its seed is used).
        seed: derived from the training seed, repeat and fold; orders the inner folds.
        """
        self.settings, self.training, self.seed = dict(settings), dict(training), seed
        self._trials: list[dict[str, Any]] = []
        self.best_epoch: int | None = None
        self.device = "cpu"
        self.branch_risks: dict[str, np.ndarray] = {}

    def fit(self, fold: FoldData, notes: list[str]) -> None:
        """Fit on the training patients; remarks for the reader are appended to ``notes``."""
        raise NotImplementedError

    def predict(self, fold: FoldData, ids: Sequence[str], times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Risk (n,) float64, higher = worse, and S(t) (n, len(times)) of these patients."""
        raise NotImplementedError

    def arrays(self) -> Arrays:
        """Fitted state as tensors named ``fitted/…``."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """JSON-able part of the fitted state."""
        return {}

    def restore(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Take up the state that :meth:`arrays` and :meth:`facts` gave."""
        raise NotImplementedError

    @property
    def n_parameters(self) -> int:
        """Number of fitted coefficients that are not zero."""
        return 0

    @property
    def history(self) -> pd.DataFrame:
        """One row per setting tried: ``epoch`` is the number of the trial, ``inner_c`` its inner CV score."""
        columns = ["epoch", "train_loss", "inner_loss", "inner_c", "learning_rate", "seconds", "chosen", "setting"]
        table = pd.DataFrame(self._trials, columns=columns)
        return table.astype({"epoch": "int32", "chosen": "bool"})

    @property
    def diagnostics(self) -> pd.DataFrame:
        """Nothing to report about routing."""
        return diagnostics_table()

    def _record(self, settings: Sequence[str], scores: Sequence[float], chosen: int, seconds: float) -> None:
        self._trials = [
            {
                "epoch": i + 1,
                "train_loss": np.nan,
                "inner_loss": np.nan,
                "inner_c": float(score),
                "learning_rate": np.nan,
                "seconds": seconds / len(settings),
                "chosen": i == chosen,
                "setting": setting,
            }
            for i, (setting, score) in enumerate(zip(settings, scores, strict=True))
        ]


class RandomScore(Baseline):
    """A hash of seed and patient id in [0, 1): what any metric says about no information at all.

    The score of a patient is the same in every fold and repeat. S(t) is the training Kaplan-Meier curve.
    """

    key = "random"
    needs = frozenset()

    def fit(self, fold: FoldData, notes: list[str]) -> None:
        data = fold.outcomes(*FIT_ROLES)
        self._times, self._survival = survival.kaplan_meier(data.time, data.event)
        self._record(["hash"], [np.nan], 0, 0.0)

    def predict(self, fold: FoldData, ids: Sequence[str], times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        risk = np.array([derive_seed("random", self.training["seed"], i) / 2.0**63 for i in ids], dtype=np.float64)
        return risk, np.tile(survival.step(self._times, self._survival, times, before=1.0), (len(ids), 1))

    def arrays(self) -> Arrays:
        return {"fitted/km/times": np.asarray(self._times), "fitted/km/survival": np.asarray(self._survival)}

    def restore(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        self._times, self._survival = arrays["fitted/km/times"], arrays["fitted/km/survival"]


class _Cox(Baseline):
    """Linear risk x·β with the Breslow baseline of the training patients."""

    def predict(self, fold: FoldData, ids: Sequence[str], times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        risk = self.score(fold, ids)
        return risk, self._baseline.survival(risk, times)

    def score(self, fold: FoldData, ids: Sequence[str]) -> np.ndarray:
        """x·β (n,) of these patients."""
        return _linear(self._design(fold, ids), self._coef)

    def _design(self, fold: FoldData, ids: Sequence[str]) -> np.ndarray:
        raise NotImplementedError

    def _finish(self, coef: np.ndarray, design: np.ndarray, data: Outcomes) -> None:
        self._coef = np.asarray(coef, dtype=np.float64)
        self._baseline = BreslowBaseline.fit(_linear(design, self._coef), data.time, data.event)

    def arrays(self) -> Arrays:
        return {"weights/coef": self._coef, **self._baseline.arrays()}

    def restore(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        self._coef = arrays["weights/coef"]
        self._baseline = BreslowBaseline.restore(arrays)

    @property
    def n_parameters(self) -> int:
        return int(np.count_nonzero(self._coef))

    def _check_converged(self, fitted: survival.CoxFit, notes: list[str], where: str) -> None:
        if not fitted.converged:
            notes.append(f"the fit of the Cox model did not converge fully ({where})")

    def _choose(self, scores: np.ndarray, strictness: Sequence[float], notes: list[str], where: str) -> int:
        """The best inner C; of equal ones, and when none can be computed, the strongest penalty."""
        if np.isnan(scores).all():
            notes.append(f"no inner fold has a comparable pair: the strongest penalty was taken ({where})")
        ranked = np.where(np.isnan(scores), -np.inf, scores)
        return max(range(len(scores)), key=lambda i: (ranked[i], strictness[i]))


class ClinicalCox(_Cox):
    """Cox with Efron ties on age, sex, stage and grade; minimises −ℓ(β) + ½·ridge·‖β‖² (ℓ not divided by n)."""

    key = "clinical_cox"
    needs = frozenset({"clinical"})

    def fit(self, fold: FoldData, notes: list[str]) -> None:
        start = clock.perf_counter()
        data = fold.outcomes(*FIT_ROLES)
        rows = fold.table.loc[list(data.ids)]
        self._encoder = ClinicalEncoder.fit(rows, self.settings["covariates"], notes, fold.where)
        design = self._encoder.transform(rows)
        fitted = survival.fit_cox_ridge(design, data.time, data.event, self.settings["ridge"])
        self._check_converged(fitted, notes, fold.where)
        self._finish(fitted.coef, design, data)
        self._record([f"ridge={self.settings['ridge']:g}"], [np.nan], 0, clock.perf_counter() - start)

    def _design(self, fold: FoldData, ids: Sequence[str]) -> np.ndarray:
        return self._encoder.transform(fold.table.loc[list(ids)])

    def arrays(self) -> Arrays:
        return super().arrays() | self._encoder.arrays("fitted/clinical")

    def facts(self) -> dict[str, Any]:
        return {"clinical": self._encoder.facts()}

    def restore(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        super().restore(arrays, facts)
        self._encoder = ClinicalEncoder.restore(arrays, "fitted/clinical", facts["clinical"])


class CoxnetGenes(_Cox):
    """Elastic-net Cox on every column of the chosen panels (Simon et al. 2011, J Stat Softw 39(5)).

    Minimises −(1/n)·ℓ_Breslow(β) + λ(α‖β‖₁ + ½(1−α)‖β‖²) with α = l1_ratio; λ by inner stratified C.
    """

    key = "coxnet_genes"
    needs = frozenset({"panels"})

    def fit(self, fold: FoldData, notes: list[str]) -> None:
        start = clock.perf_counter()
        data = fold.outcomes(*FIT_ROLES)
        self._columns = fold.panel_columns(self.settings["panels"])
        for panel, count in fold.without_panel(self.settings["panels"], fold.ids()).items():
            if count:
                notes.append(f"{count} patients have no row in '{panel}': they get the training medians ({fold.where})")
        values = fold.gene_matrix(self._columns, data.ids)
        self._scaler, path = self._path(values, data.time, data.event, None)
        if not path:
            raise MorphomeError(
                f"{fold.where}: no column of {', '.join(self.settings['panels'])} varies among training patients",
                "check the molecular tables",
            )
        alphas = [alpha for alpha, _ in path]

        def score_fold(fit: np.ndarray, held: np.ndarray) -> np.ndarray:
            scaler, inner = self._path(values[fit], data.time[fit], data.event[fit], alphas)
            found = {round(np.log(alpha), 9): coef for alpha, coef in inner}
            design = scaler.transform(values[held])
            empty = np.full(len(held), np.nan)
            keys = [round(np.log(alpha), 9) for alpha in alphas]
            return np.stack([design @ found[key] if key in found else empty for key in keys])

        membership = inner_membership(fold, data, self.settings["inner_folds"], self.seed, notes)
        scores = inner_cv_scores(data, membership, len(alphas), score_fold)
        # The largest penalties leave no gene in the fit on all training patients, although some entered in the
        # smaller inner folds: an empty fit is no candidate, unless every fit is empty.
        filled = np.array([coef.any() for _, coef in path])
        candidates = np.where(filled, scores, np.nan) if filled.any() else scores
        best = self._choose(candidates, alphas, notes, fold.where)
        self._finish(path[best][1], self._scaler.transform(values), data)
        self._record([f"alpha={a:.6g}" for a in alphas], scores, best, clock.perf_counter() - start)

    def _path(
        self, values: np.ndarray, time: np.ndarray, event: np.ndarray, alphas: Sequence[float] | None
    ) -> tuple[ColumnScaler, list[tuple[float, np.ndarray]]]:
        """Scaler and (penalty, coefficients of all columns) pairs; columns that do not vary get 0."""
        scaler = ColumnScaler.fit(values, self.settings["clip"])
        kept = np.flatnonzero(scaler.varies)
        if len(kept) == 0 or not event.any():
            return scaler, []
        how = {"n_alphas": self.settings["n_alphas"]} if alphas is None else {"alphas": list(alphas)}
        fitted = survival.fit_coxnet(
            scaler.transform(values)[:, kept],
            time,
            event,
            l1_ratio=self.settings["l1_ratio"],
            alpha_min_ratio=ALPHA_MIN_RATIO,
            **how,
        )
        path = []
        for alpha, coef in fitted:
            full = np.zeros(values.shape[1])
            full[kept] = coef
            path.append((float(alpha), full))
        return scaler, path

    def _design(self, fold: FoldData, ids: Sequence[str]) -> np.ndarray:
        return self._scaler.transform(fold.gene_matrix(self._columns, ids))

    def arrays(self) -> Arrays:
        return super().arrays() | self._scaler.arrays("fitted/genes")

    def facts(self) -> dict[str, Any]:
        return {"columns": [list(column) for column in self._columns]}

    def restore(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        super().restore(arrays, facts)
        self._scaler = ColumnScaler.restore(arrays, "fitted/genes")
        self._columns = tuple(Column(*column) for column in facts["columns"])


class MeanPoolCox(_Cox):
    """Ridge Cox (Efron) on principal components of the bag's mean (and SD); the ridge by inner stratified C.

    ``weights/coef`` is the same model in standardised pooled features: axes times component coefficients.
    """

    key = "mean_pool_cox"
    needs = frozenset({"path"})

    def fit(self, fold: FoldData, notes: list[str]) -> None:
        self.fit_scores(fold, notes)

    def fit_scores(self, fold: FoldData, notes: list[str]) -> np.ndarray:
        """:meth:`fit`; the out-of-fold x·β (n,) of the training patients at the ridge chosen, for late fusion."""
        start = clock.perf_counter()
        data = fold.outcomes(*FIT_ROLES)
        pooled = self._pool(fold, data.ids)
        ridges = [float(ridge) for ridge in self.settings["ridges"]]

        def score_fold(fit: np.ndarray, held: np.ndarray) -> np.ndarray:
            scaler, axes = self._axes(pooled[fit])
            inner, outer = scaler.transform(pooled[fit]) @ axes, scaler.transform(pooled[held]) @ axes
            fits = [survival.fit_cox_ridge(inner, data.time[fit], data.event[fit], r) for r in ridges]
            return np.stack([outer @ np.asarray(f.coef) for f in fits])

        membership = inner_membership(fold, data, self.settings["inner_folds"], self.seed, notes)
        held_out = out_of_fold(data, membership, len(ridges), score_fold)
        scores = inner_cv_scores(data, membership, len(ridges), lambda _, held: held_out[:, held])
        best = self._choose(scores, ridges, notes, fold.where)
        self._scaler, self._components = self._axes(pooled)
        z = self._scaler.transform(pooled)
        fitted = survival.fit_cox_ridge(z @ self._components, data.time, data.event, ridges[best])
        self._check_converged(fitted, notes, fold.where)
        self._component_coef = np.asarray(fitted.coef, dtype=np.float64)
        self._finish(_linear(self._components, self._component_coef), z, data)
        self._record([f"ridge={r:g}" for r in ridges], scores, best, clock.perf_counter() - start)
        return held_out[best]

    def _pool(self, fold: FoldData, ids: Sequence[str]) -> np.ndarray:
        rows = []
        for patient in ids:
            features = fold.bag(patient)[0].astype(np.float64)
            parts = [features.mean(axis=0)]
            if self.settings["statistics"] == "mean_sd":
                parts.append(features.std(axis=0))
            rows.append(np.concatenate(parts))
        return np.stack(rows)

    def _axes(self, pooled: np.ndarray) -> tuple[ColumnScaler, np.ndarray]:
        """Scaler and principal axes (columns, components) of these patients; at most n − 1 components."""
        scaler = ColumnScaler.fit(pooled)
        return scaler, principal_axes(scaler.transform(pooled), self.settings["components"])

    def _design(self, fold: FoldData, ids: Sequence[str]) -> np.ndarray:
        return self._scaler.transform(self._pool(fold, ids))

    @property
    def n_parameters(self) -> int:
        return len(self._component_coef)

    def arrays(self) -> Arrays:
        state = super().arrays() | self._scaler.arrays("fitted/pooled")
        return state | {"fitted/pca/axes": self._components, "weights/component_coef": self._component_coef}

    def restore(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        super().restore(arrays, facts)
        self._scaler = ColumnScaler.restore(arrays, "fitted/pooled")
        self._components = arrays["fitted/pca/axes"]
        self._component_coef = arrays["weights/component_coef"]


def principal_axes(z: np.ndarray, components: int) -> np.ndarray:
    """Principal axes (p, ≤ components) of z (n, p), by falling variance, the largest entry of each positive."""
    _, size, axes = np.linalg.svd(z - z.mean(axis=0), full_matrices=False)
    # Directions without variance would be numerical noise; they carry nothing.
    rank = int((size > 1e-9 * max(size.max(initial=0.0), 1e-300)).sum())
    axes = axes[: max(1, min(components, len(z) - 1, rank))].T
    # The sign of an axis is arbitrary; fix it so that libraries agree.
    top = np.abs(axes).argmax(axis=0)
    return axes * np.where(axes[top, np.arange(axes.shape[1])] < 0, -1.0, 1.0)


def out_of_fold(
    data: Outcomes,
    membership: np.ndarray,
    n_settings: int,
    score_fold: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Scores (n_settings, n) of each training patient from the fits without its inner fold.

    Args:
        membership: (n,) inner fold of each patient.
        score_fold: ``(rows to fit, rows held out) -> (n_settings, held out)``.
    """
    found = np.zeros((n_settings, len(membership)))
    for k in np.unique(membership):
        fit, held = np.flatnonzero(membership != k), np.flatnonzero(membership == k)
        # All events lie in this fold: nothing can be said about it, and 0 is no information.
        if data.event[fit].any():
            found[:, held] = score_fold(fit, held)
    return found


def _linear(design: np.ndarray, coef: np.ndarray) -> np.ndarray:
    """x·β per row. Unlike a matrix product, a row's value does not depend on how many rows there are."""
    return (design * coef).sum(axis=1)
