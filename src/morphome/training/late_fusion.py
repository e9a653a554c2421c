"""Late fusion of three linear rows: clinical covariates, the score of the genes and the score of the slides.

The linear counterpart of every network that reads slides and genes: what such a network gives beyond this row it owes
to the fusion or to non-linearity, not to the data it sees.
"""

from __future__ import annotations

import time as clock
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from morphome.training.baselines import FIT_ROLES, MeanPoolCox, _Cox
from morphome.training.baselines_genes import RidgeGenes, ScoreScaler, fuse_late
from morphome.training.data import FoldData
from morphome.training.preprocess import Arrays, ClinicalEncoder

#: The rows whose scores are fused, by the name in notes and in the model file.
PARTS: dict[str, type[RidgeGenes] | type[MeanPoolCox]] = {"genes": RidgeGenes, "slides": MeanPoolCox}


class LateFusion(_Cox):
    """Cox model (Efron ties, ridge) on clinical covariates and the scores of two rows: the ridge Cox model on genes and
    the one on the pooled features of the slides.

    The two are fitted on the training patients as the rows of that name. The Cox model over them learns from their
    out-of-fold scores, so that it sees what they say about patients they have not seen; later patients get the scores
    of the fits on all training patients. Each score is centred on its out-of-fold mean and divided by its out-of-fold
    SD. Both rows draw the same inner folds. Those folds also chose the two penalties: that choice is the only way in
    which a patient's outcome can touch its own scores.
    """

    key = "late_fusion"
    needs = frozenset({"clinical", "panels", "path"})

    def fit(self, fold: FoldData, notes: list[str]) -> None:
        start = clock.perf_counter()
        data = fold.outcomes(*FIT_ROLES)
        self._parts = self._unfitted()
        remarks: list[str] = []
        scores = [part.fit_scores(fold, remarks) for part in self._parts.values()]
        # Both parts draw the same inner folds and have the same to say about them.
        notes.extend(dict.fromkeys(remarks))
        self._scales = {
            name: ScoreScaler.fit(score, name, notes, fold.where)
            for name, score in zip(self._parts, scores, strict=True)
        }
        rows = fold.table.loc[list(data.ids)]
        self._encoder = ClinicalEncoder.fit(rows, self.settings["covariates"], notes, fold.where)
        design, fitted, coef = fuse_late(
            self._encoder.transform(rows), scores, list(self._scales.values()), data, self.settings["ridge"]
        )
        self._check_converged(fitted, notes, fold.where)
        self._finish(coef, design, data)
        # One row: the searches of the two parts have axes of their own and stand in the tables of those rows.
        chosen = [f"ridge={self.settings['ridge']:g}"]
        for name, part in self._parts.items():
            trials = part.history
            chosen.append(f"{name} {trials.loc[trials['chosen'], 'setting'].item()}")
        self._record(["; ".join(chosen)], [np.nan], 0, clock.perf_counter() - start)

    def _unfitted(self) -> dict[str, RidgeGenes | MeanPoolCox]:
        """Both rows; each reads its own among the settings of this one, and they share inner folds and seed."""
        return {name: row(self.settings, self.training, self.seed) for name, row in PARTS.items()}

    def _design(self, fold: FoldData, ids: Sequence[str]) -> np.ndarray:
        clinical = self._encoder.transform(fold.table.loc[list(ids)])
        scores = [self._scales[name].transform(part.score(fold, ids)) for name, part in self._parts.items()]
        return np.column_stack([clinical, *scores])

    @property
    def n_parameters(self) -> int:
        return super().n_parameters + sum(part.n_parameters for part in self._parts.values())

    def arrays(self) -> Arrays:
        state = super().arrays() | self._encoder.arrays("fitted/clinical")
        for name, part in self._parts.items():
            state[f"fitted/{name}_score/centre_spread"] = self._scales[name].array()
            # weights/coef of the genes becomes weights/genes/coef.
            state |= {key.replace("/", f"/{name}/", 1): values for key, values in part.arrays().items()}
        return state

    def facts(self) -> dict[str, Any]:
        return {"clinical": self._encoder.facts(), **{name: part.facts() for name, part in self._parts.items()}}

    def restore(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        super().restore(arrays, facts)
        self._encoder = ClinicalEncoder.restore(arrays, "fitted/clinical", facts["clinical"])
        self._parts, self._scales = self._unfitted(), {}
        for name, part in self._parts.items():
            self._scales[name] = ScoreScaler.restore(arrays[f"fitted/{name}_score/centre_spread"])
            own = {key.replace(f"/{name}/", "/", 1): v for key, v in arrays.items() if key.split("/")[1] == name}
            part.restore(own, facts[name])
