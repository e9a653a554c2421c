"""What is fitted before a model: column scalers and the clinical encoding, on training patients only.

Fitted state is a set of named arrays (saved with the model) plus column names; both rebuild the same object, so that
a reloaded model repeats its predictions bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from morphome.errors import MorphomeError

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class ColumnScaler:
    """z = (x − mean) / SD per column, clipped; missing values take the training median first.

    Attributes:
        median, mean, sd: (p,) float64; ``sd`` is 0 for a column that does not vary in training, whose z is 0.
        clip: z lies in [−clip, clip].
    """

    median: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    clip: float

    @classmethod
    def fit(cls, values: np.ndarray, clip: float = 6.0) -> ColumnScaler:
        """Fit on training values (n, p); NaN = missing. A column without any value counts as not varying."""
        values = np.asarray(values, dtype=np.float64)
        median = np.zeros(values.shape[1])
        known = ~np.isnan(values).all(axis=0)
        median[known] = np.nanmedian(values[:, known], axis=0)
        filled = np.where(np.isnan(values), median, values)
        mean, sd = filled.mean(axis=0), filled.std(axis=0)
        # Rounding leaves a constant column with an SD of about 1e-16 of its level.
        sd[sd <= 1e-9 * np.maximum(1.0, np.abs(mean))] = 0.0
        return cls(median, mean, sd, float(clip))

    @property
    def varies(self) -> np.ndarray:
        """(p,) bool: columns that vary in training."""
        return self.sd > 0

    def transform(self, values: np.ndarray) -> np.ndarray:
        """(n, p) float64 z-scores."""
        values = np.asarray(values, dtype=np.float64)
        filled = np.where(np.isnan(values), self.median, values)
        z = (filled - self.mean) / np.where(self.varies, self.sd, 1.0)
        return np.where(self.varies, np.clip(z, -self.clip, self.clip), 0.0)

    def arrays(self, prefix: str) -> Arrays:
        """Fitted state under ``prefix/``."""
        return {
            f"{prefix}/median": self.median,
            f"{prefix}/mean": self.mean,
            f"{prefix}/sd": self.sd,
            f"{prefix}/clip": np.array([self.clip]),
        }

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> ColumnScaler:
        """Inverse of :meth:`arrays`."""
        median, mean, sd = (arrays[f"{prefix}/{part}"] for part in ("median", "mean", "sd"))
        return cls(median, mean, sd, float(arrays[f"{prefix}/clip"][0]))


@dataclass(frozen=True)
class ClinicalEncoder:
    """Age (years), sex (male = 1), stage and grade (ordinal 1–4) as numbers, each with a flag for "missing".

    Attributes:
        columns: names of the columns kept, e.g. ``("age", "stage", "stage_missing")``.
        median: (covariates,) training medians used for missing values.
        mean: (columns,) training means, subtracted so that the baseline hazard is that of an average patient.
    """

    covariates: tuple[str, ...]
    columns: tuple[str, ...]
    median: np.ndarray
    mean: np.ndarray

    @classmethod
    def fit(cls, table: pd.DataFrame, covariates: Sequence[str], notes: list[str], where: str = "") -> ClinicalEncoder:
        """Fit on the rows of training patients; columns that do not vary among them are dropped with a note.

        Raises:
            MorphomeError: no covariate varies.
        """
        raw = _clinical_values(table, covariates)
        medians = np.array([np.nanmedian(v) if (~np.isnan(v)).any() else 0.0 for v in raw.T])
        names, full = _with_flags(raw, covariates, medians)
        varies = full.max(axis=0) > full.min(axis=0)
        dropped = [n for n, v in zip(names, varies, strict=True) if not v and not n.endswith("_missing")]
        if dropped:
            notes.append(f"clinical columns that do not vary in training were left out: {', '.join(dropped)} ({where})")
        if not varies.any():
            raise MorphomeError(
                f"{where}: none of the clinical covariates {', '.join(covariates)} varies among the training patients",
                "give cohort.covariates, choose other covariates, or leave this model out",
            )
        kept = tuple(n for n, v in zip(names, varies, strict=True) if v)
        return cls(tuple(covariates), kept, medians, full[:, varies].mean(axis=0))

    def transform(self, table: pd.DataFrame) -> np.ndarray:
        """(n, columns) float64, centred on the training means."""
        names, full = _with_flags(_clinical_values(table, self.covariates), self.covariates, self.median)
        return full[:, [names.index(column) for column in self.columns]] - self.mean

    def arrays(self, prefix: str) -> Arrays:
        """Fitted numbers under ``prefix/``; the names travel in :meth:`facts`."""
        return {f"{prefix}/median": self.median, f"{prefix}/mean": self.mean}

    def facts(self) -> dict[str, list[str]]:
        """Names of covariates and columns."""
        return {"covariates": list(self.covariates), "columns": list(self.columns)}

    @classmethod
    def restore(
        cls, arrays: Mapping[str, np.ndarray], prefix: str, facts: Mapping[str, Sequence[str]]
    ) -> ClinicalEncoder:
        """Inverse of :meth:`arrays` and :meth:`facts`."""
        return cls(
            tuple(facts["covariates"]),
            tuple(facts["columns"]),
            arrays[f"{prefix}/median"],
            arrays[f"{prefix}/mean"],
        )


def _clinical_values(table: pd.DataFrame, covariates: Sequence[str]) -> np.ndarray:
    columns = []
    for name in covariates:
        if name == "sex":
            # map() on a column of all None keeps dtype object; NaN is what "not known" must become.
            values = table["sex"].map({"female": 0.0, "male": 1.0})
        else:
            values = table["age_years" if name == "age" else name]
        columns.append(pd.to_numeric(values).to_numpy(dtype="float64", na_value=np.nan))
    return np.column_stack(columns)


def _with_flags(raw: np.ndarray, covariates: Sequence[str], medians: np.ndarray) -> tuple[list[str], np.ndarray]:
    names, columns = [], []
    for i, name in enumerate(covariates):
        missing = np.isnan(raw[:, i])
        names += [name, f"{name}_missing"]
        columns += [np.where(missing, medians[i], raw[:, i]), missing.astype(np.float64)]
    return names, np.column_stack(columns)


def time_grid(horizon_months: float | None, training_times: np.ndarray) -> np.ndarray:
    """100 months from 5 % of the horizon to the horizon; without one, up to the 80 % quantile of training times."""
    end = float(horizon_months) if horizon_months is not None else float(np.quantile(training_times, 0.8))
    return np.linspace(0.05 * end, end, 100)
