"""What a neural model is given: bags, molecular columns and gene groups of one patient, scaled on the training fold."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.parts import TrainingSample
from morphome.models.registry import Dims
from morphome.rna.fold_encoder import FoldRnaEncoder
from morphome.training.data import ENCODED, Column, FoldData, Outcomes, derive_seed
from morphome.training.preprocess import Arrays, ColumnScaler

#: Parts of a batch that are molecular.
MOLECULAR = frozenset({"omic_groups", "omic_all", "rna", "cnv", "mut"})
#: Patches shown to a model that fits parts on them.
SAMPLED_PATCHES = 100_000
#: Patients whose genes are read at a time.
PATIENTS_READ = 64


class Inputs:
    """Scalers, columns and fitted parts of one model and fold; makes the batches.

    Args:
        key: registry key, for messages. needs: what the model reads; trains_with: what it reads in training only.
        max_patches: patches drawn per bag in training.
        missing_tokens: a patient without any molecular row gets none, instead of the training medians.
        device: of the batches. seed: of the fold.
    """

    def __init__(
        self,
        key: str,
        needs: frozenset[str],
        trains_with: frozenset[str],
        max_patches: int,
        missing_tokens: bool,
        device: str,
        seed: int,
    ) -> None:
        self.key, self.needs, self.trains_with = key, needs, trains_with
        self.wanted = needs | trains_with
        self.max_patches, self.missing_tokens, self.device, self.seed = max_patches, missing_tokens, device, seed
        self.columns: tuple[Column, ...] = ()
        self.groups: dict[str, np.ndarray] = {}
        self.panels: dict[str, np.ndarray] = {}
        self.scaler: ColumnScaler | None = None
        self.encoder: FoldRnaEncoder | None = None
        self.parts: dict[str, np.ndarray] = {}
        self.d_in = 0
        self._values: dict[str, dict[str, Any]] = {}

    # -- fitting --------------------------------------------------------------------------------------------
    def fit(self, fold: FoldData, train: Outcomes, notes: list[str]) -> None:
        """Fit scalers and the encoder of RNA on these patients.

        Raises:
            MorphomeError: the model needs gene groups or molecular columns, and there are none.
        """
        self.d_in = fold.stored_bag(train.ids[0])[0].shape[1] if "path" in self.needs else 0
        if self.wanted & MOLECULAR:
            self._fit_molecular(fold, train, notes)

    def _fit_molecular(self, fold: FoldData, train: Outcomes, notes: list[str]) -> None:
        by_pathway = "rna" in self.wanted and fold.rna_encoder.get("name") == "pathway_mean"
        groups = fold.groups if "omic_groups" in self.wanted or by_pathway else {}
        if "omic_groups" in self.wanted and not groups:
            raise MorphomeError(
                f"model '{self.key}' needs gene groups and none is given",
                "add molecular.groups to the configuration, or leave this model out",
            )
        wanted = {column for columns in groups.values() for column in columns}
        if "omic_all" in self.wanted:
            wanted |= set(fold.panel_columns(fold.gene_panels))
        panels = {part for part in ("rna", "cnv", "mut") if part in self.wanted}
        if fold.encoded:
            panels -= {"rna"}
        for panel in sorted(panels & set(fold.gene_panels)):
            wanted |= set(fold.panel_columns([panel]))
        if "rna" in self.wanted and fold.encoded:
            wanted |= set(fold.panel_columns([ENCODED]))
        if not wanted:
            raise MorphomeError(
                f"model '{self.key}' needs molecular columns and none is given",
                "add molecular.rna, .mut or .cnv to the configuration, or leave this model out",
            )
        self.columns = tuple(sorted(wanted))
        place = {column: i for i, column in enumerate(self.columns)}
        self.groups = {
            name: np.array([place[column] for column in columns], dtype=np.int64) for name, columns in groups.items()
        }
        source = {"rna": ENCODED if fold.encoded else "rna", "cnv": "cnv", "mut": "mut"}
        self.panels = {
            part: np.array([i for i, column in enumerate(self.columns) if column.panel == source[part]], dtype=np.int64)
            for part in ("rna", "cnv", "mut")
            if part in self.wanted
        }
        ids = [i for i in train.ids if not (self.missing_tokens and fold.without_genes(i, self.columns))]
        if not ids:
            raise MorphomeError(
                f"{fold.where}: no training patient has a row in the molecular tables that model '{self.key}' needs",
                "look at the patient ids of molecular.rna, .mut and .cnv, or leave this model out",
            )
        values = fold.gene_matrix(self.columns, ids)
        self.scaler = ColumnScaler.fit(values)
        if "rna" in self.wanted:
            self._fit_rna(fold, self.scaler.transform(values)[:, self.panels["rna"]])
        still = int((~self.scaler.varies).sum())
        if still:
            notes.append(f"{still} molecular columns do not vary in training and were set to 0 ({fold.where})")
        tables = sorted({column.panel for column in self.columns})
        stand_in = "a learned token" if self.missing_tokens else "the training medians"
        for panel, count in fold.without_panel(tables, fold.ids()).items():
            if count:
                notes.append(f"{count} patients have no row in '{panel}': they get {stand_in} ({fold.where})")

    def _fit_rna(self, fold: FoldData, z: np.ndarray) -> None:
        # What a frozen encoder has made is not encoded again.
        kind = "snn_raw" if fold.encoded else fold.rna_encoder.get("name", "snn_raw")
        where = {int(column): i for i, column in enumerate(self.panels["rna"])}
        groups = {
            name: np.array([where[int(i)] for i in columns if int(i) in where], dtype=np.int64)
            for name, columns in self.groups.items()
        }
        self.encoder = FoldRnaEncoder.fit(kind, z, groups, fold.rna_encoder.get("components", 64))

    def fit_parts(self, model: type, settings: Mapping[str, Any], fold: FoldData, train: Outcomes, bins: Any) -> None:
        """Fit what the model itself wants fitted on the training fold, if anything."""
        if not hasattr(model, "fit_parts"):
            return
        groups: tuple[np.ndarray, ...] = ()
        if self.groups:
            z = self._scaled(fold, train.ids)
            groups = tuple(z[:, at] for at in self.groups.values())
        sample = TrainingSample(
            train.time,
            train.event,
            bins,
            groups,
            functools.partial(self._patches, fold, train),
            derive_seed(self.seed, "parts"),
        )
        self.parts = {name: np.ascontiguousarray(part) for name, part in model.fit_parts(settings, sample).items()}

    def _patches(self, fold: FoldData, train: Outcomes, most: int = SAMPLED_PATCHES) -> np.ndarray:
        """Up to ``most`` patches, equally many of each training patient."""
        rng = np.random.default_rng(derive_seed(self.seed, "sampled patches"))
        each = max(1, most // len(train.ids))
        drawn = []
        for patient in train.ids:
            features = fold.stored_bag(patient)[0]
            rows = np.sort(rng.choice(len(features), size=min(each, len(features)), replace=False))
            drawn.append(features[rows].astype(np.float32))
        return np.concatenate(drawn)[:most]

    # -- use ------------------------------------------------------------------------------------------------
    def dims(self, n_bins: int) -> Dims:
        """Sizes for the constructor of the model."""
        # The panels of a part that is not measured have no column.
        sizes = {part: len(at) for part, at in self.panels.items()}
        return Dims(
            self.d_in,
            {name: len(at) for name, at in self.groups.items()} if "omic_groups" in self.wanted else {},
            n_bins,
            len(self.columns) if "omic_all" in self.wanted else 0,
            n_rna=self.encoder.width if self.encoder is not None else 0,
            n_cnv=sizes.get("cnv", 0),
            n_mut=sizes.get("mut", 0),
            router_seed=derive_seed(self.seed, "router"),
            parts=self.parts,
            missing_tokens=self.missing_tokens,
        )

    def batch(self, fold: FoldData, patient: str, training: bool = False, draw: int = 0) -> Batch:
        """Input of one patient.

        Args:
            training: at most ``max_patches`` tiles, drawn without order lost; genes that training alone may see.
            draw: seed of the tiles drawn.
        """
        path = position = None
        if "path" in self.needs:
            features, places = fold.stored_bag(patient)
            if training and len(features) > self.max_patches:
                drawn = np.random.default_rng(draw).choice(len(features), size=self.max_patches, replace=False)
                drawn.sort()
                features, places = features[drawn], places[drawn]
            path = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32)).to(self.device)
            position = torch.from_numpy(np.ascontiguousarray(places)).to(self.device)
        parts = self._molecular(fold, patient) if self.needs & MOLECULAR or training else {}
        return Batch(path=path, pos=position, **parts, patient_id=patient)

    def _molecular(self, fold: FoldData, patient: str) -> dict[str, Any]:
        if self.scaler is None:
            return {}
        if patient not in self._values:
            # Many at once: looking up the columns takes longer than reading them.
            ids = fold.ids()
            for start in range(0, len(ids), PATIENTS_READ):
                some = ids[start : start + PATIENTS_READ]
                z = self._scaled(fold, some).astype(np.float32)
                self._values |= {i: self._parts_of(fold, i, row) for i, row in zip(some, z, strict=True)}
        return self._values[patient]

    def _scaled(self, fold: FoldData, ids: Sequence[str]) -> np.ndarray:
        """z-scores (n, p); what was not measured has the training median, or is NaN where genes are targets only."""
        raw = fold.gene_matrix(self.columns, ids)
        z = self.scaler.transform(raw)
        return np.where(np.isnan(raw), np.nan, z) if self.trains_with & MOLECULAR else z

    def _parts_of(self, fold: FoldData, patient: str, z: np.ndarray) -> dict[str, Any]:
        """Molecular parts of a batch from the z-scores of a patient, (p,) float32."""
        if self.missing_tokens and fold.without_genes(patient, self.columns):
            return {}
        found: dict[str, Any] = {}
        if "omic_groups" in self.wanted:
            found["groups"] = tuple(torch.from_numpy(z[at]).to(self.device) for at in self.groups.values())
        if "omic_all" in self.wanted:
            found["omic_all"] = torch.from_numpy(z.copy()).to(self.device)
        for part, at in self.panels.items():
            values = z[at]
            if part == "rna":
                values = self.encoder.transform(values[None].astype(np.float64))[0].astype(np.float32)
            if len(at):
                found[part] = torch.from_numpy(values).to(self.device)
        return found

    def forget(self) -> None:
        """Forget the values of patients: another table may hold others for the same ids."""
        self._values = {}

    # -- state ----------------------------------------------------------------------------------------------
    def arrays(self) -> Arrays:
        """Fitted state, as saved with the model."""
        state = self.scaler.arrays("fitted/genes") if self.scaler is not None else {}
        if self.encoder is not None:
            state |= self.encoder.arrays("fitted/rna")
        return state | {f"fitted/parts/{name}": part for name, part in self.parts.items()}

    def facts(self) -> dict[str, Any]:
        """Column names and group membership."""
        return {
            "d_in": self.d_in,
            "columns": [list(column) for column in self.columns],
            # Lists of pairs: the order of the groups is part of the model, and JSON objects are sorted on saving.
            "groups": [[name, at.tolist()] for name, at in self.groups.items()],
            "panels": [[part, at.tolist()] for part, at in self.panels.items()],
        }

    def restore(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Take up the state that :meth:`arrays` and :meth:`facts` gave."""
        self.d_in = facts["d_in"]
        self.columns = tuple(Column(*column) for column in facts["columns"])
        self.groups = {name: np.array(at, dtype=np.int64) for name, at in facts["groups"]}
        self.panels = {part: np.array(at, dtype=np.int64) for part, at in facts.get("panels", ())}
        self.scaler = ColumnScaler.restore(arrays, "fitted/genes") if self.columns else None
        self.encoder = FoldRnaEncoder.restore(arrays, "fitted/rna") if "rna" in self.wanted else None
        prefix = "fitted/parts/"
        self.parts = {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}
