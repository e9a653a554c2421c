"""What one fold offers a model: patients with their roles, bags, molecular values, and no test outcome.

Everything is joined by ``patient_id``. The outcomes of test patients are removed on reading, so that nothing behind
this module can use them.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from morphome.errors import MorphomeError
from morphome.features.store import BagStore
from morphome.files import parquet_meta, read_json, read_parquet

ROLES = ("train", "inner_val", "test")
#: Name of the panel of vectors that a frozen encoder of RNA made.
ENCODED = "encoded"
#: Bags kept in memory up to this size; those beyond it are read again when needed.
CACHE_BYTES = 6 * 2**30


class Column(NamedTuple):
    """One molecular column: the panel it lies in and its gene symbol."""

    panel: str
    gene: str


class Outcomes(NamedTuple):
    """Follow-up of some patients, in the order of ``ids``."""

    ids: tuple[str, ...]
    time: np.ndarray  # (n,) float64, months
    event: np.ndarray  # (n,) int64, 1 = happened


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2^63) from the hash of ``parts``: equal parts give equal seeds on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class FoldData:
    """Patients of one (repeat, fold) with roles, bags and molecular values.

    Attributes:
        table: one row per patient, indexed and sorted by ``patient_id``; the columns of the analysis table and
            ``role``. ``time_months`` and ``event`` are NaN for the role "test".
        groups: columns of each gene group, in file order of the groups.
        where: "repeat r, fold f", for messages.
        lost: rows that a join left out, by reason.
        scheme: how the outer folds were drawn ("site", "random", "published"); empty when it is not known.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        *,
        index: Path | None = None,
        panels: Mapping[str, Path] | None = None,
        groups: Mapping[str, Sequence[Column]] | None = None,
        where: str = "",
        lost: Mapping[str, int] | None = None,
        scheme: str = "",
        rna_encoder: Mapping[str, Any] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Args:
        table: one row per patient with ``patient_id``, ``slide_ids`` and, for training, ``role``,
            ``time_months``, ``event``; without ``role`` everybody is a test patient.
        index: the feature index; None when no model asks for bags.
        panels: molecular tables by panel name; "encoded" is what a frozen encoder of RNA made of the patients.
        rna_encoder: the configured encoder (``name``, ``components``), for models that read one.
        cache_bytes: bags up to this many bytes stay in memory.

        Raises:
            MorphomeError: a patient appears twice.
        """
        _unique(table, "the table of patients")
        table = table.copy()
        if "role" not in table:
            table["role"] = "test"
        self.table = table.sort_values("patient_id").set_index("patient_id", drop=False)
        test = self.table["role"] == "test"
        for column in ("time_months", "event"):
            if column in self.table:
                self.table[column] = self.table[column].astype("float64").mask(test)
        self.where = where
        self.lost = dict(lost or {})
        self.scheme = scheme
        self.groups = {name: tuple(Column(*c) for c in columns) for name, columns in (groups or {}).items()}
        self.rna_encoder = dict(rna_encoder or {})
        self._index = index
        self._panels = dict(panels or {})
        self._frames: dict[str, pd.DataFrame] = {}
        self._store: BagStore | None = None
        self._cache: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        # An array, so that what with_roles() makes counts down the same number.
        self._cache_left = np.array(cache_bytes, dtype=np.int64)

    # -- patients -------------------------------------------------------------------------------------------
    def ids(self, *roles: str) -> tuple[str, ...]:
        """Sorted ids of the patients with these roles; of all patients when no role is given."""
        table = self.table if not roles else self.table[self.table["role"].isin(roles)]
        return tuple(table["patient_id"])

    def outcomes(self, *roles: str) -> Outcomes:
        """Follow-up of the patients with these roles.

        Raises:
            MorphomeError: the role "test" is asked for: nothing that is fitted may see those outcomes.
        """
        if not roles or "test" in roles:
            raise MorphomeError(
                "outcomes of test patients were asked for during training", "report this as a fault of morphome"
            )
        ids = self.ids(*roles)
        rows = self.table.loc[list(ids)]
        return Outcomes(ids, rows["time_months"].to_numpy("float64"), rows["event"].to_numpy("float64").astype("int64"))

    def with_roles(self, roles: Mapping[str, str]) -> FoldData:
        """The same fold with these patients only, in other roles; bags and molecular tables are shared.

        Args:
            roles: role by patient id. Who gets the role "test" loses time and event.

        Raises:
            MorphomeError: an unknown patient or role; a test patient of this fold, whose outcome is not known here,
                is to be fitted on.
        """
        table = self.table[self.table["patient_id"].isin(list(roles))].copy()
        table["role"] = table["patient_id"].map(dict(roles))
        fitted = table["role"] != "test"
        if len(table) != len(roles) or not table["role"].isin(ROLES).all() or table.loc[fitted, "event"].isna().any():
            raise MorphomeError(
                f"{self.where}: new roles name patients that are unknown or without an outcome, or roles that are not "
                f"{', '.join(ROLES)}",
                "report this as a fault of morphome",
            )
        for column in ("time_months", "event"):
            table[column] = table[column].where(fitted)
        if self._store is None and self._index is not None:
            self._store = BagStore(self._index)
        fold = copy.copy(self)
        fold.table = table
        return fold

    # -- bags -----------------------------------------------------------------------------------------------
    @property
    def fingerprint(self) -> str:
        """Fingerprint of the features, empty without an index."""
        return str(parquet_meta(self._index).get("fingerprint", "")) if self._index else ""

    def bag(self, patient_id: str) -> tuple[np.ndarray, np.ndarray]:
        """All tiles of a patient: features (N, D) float32, and (N, 3) int32 slide index, level-0 x, y.

        The order is (slide id, y, x); some layers depend on it.

        Raises:
            MorphomeError: the patient has no tile.
        """
        features, position = self.stored_bag(patient_id)
        return features.astype(np.float32), position

    def stored_bag(self, patient_id: str) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`bag`, with the features as they are kept in memory (float16 as a rule); not to be changed."""
        if patient_id not in self._cache:
            features, position = self._read_bag(patient_id)
            half = features.astype(np.float16)
            # Stored features are float16 as a rule: half the memory, the same numbers.
            kept = half if np.array_equal(half.astype(np.float32), features) else features
            if kept.nbytes + position.nbytes > self._cache_left:
                return features, position
            self._cache_left -= kept.nbytes + position.nbytes
            self._cache[patient_id] = (kept, position)
        return self._cache[patient_id]

    def _read_bag(self, patient_id: str) -> tuple[np.ndarray, np.ndarray]:
        if self._store is None:
            if self._index is None:
                raise MorphomeError(
                    "the model needs bags of tile features but no feature index was given",
                    "run the collect step, or leave this model out",
                )
            self._store = BagStore(self._index)
        slides = sorted(self.table.at[patient_id, "slide_ids"])
        features, position = self._store.bag(slides) if slides else (np.empty((0, 0)), np.empty((0, 3)))
        if len(features) == 0:
            raise MorphomeError(
                f"patient {patient_id} has no tile ({len(slides)} slides), and the model needs slides",
                "put 'wsi' into cohort.require, or leave this model out",
            )
        return np.asarray(features, dtype=np.float32), np.asarray(position, dtype=np.int32)

    # -- molecular values -----------------------------------------------------------------------------------
    @property
    def gene_panels(self) -> tuple[str, ...]:
        """The panels that models of genes read; counts for encoders of RNA are not among them."""
        return tuple(panel for panel in self._panels if panel not in ("expression", ENCODED))

    @property
    def encoded(self) -> bool:
        """Whether a frozen encoder of RNA has made vectors of the patients (the panel ``encoded``)."""
        return ENCODED in self._panels

    def panel_columns(self, panels: Iterable[str]) -> tuple[Column, ...]:
        """Every column of these panels, by panel in the order given, then by gene."""
        return tuple(Column(p, g) for p in panels for g in sorted(self._panel(p).columns))

    def gene_matrix(self, columns: Sequence[Column], ids: Sequence[str]) -> np.ndarray:
        """Values (len(ids), len(columns)) float64 in the order asked; NaN = not measured.

        Raises:
            MorphomeError: a panel or one of its genes is not there.
        """
        values = np.full((len(ids), len(columns)), np.nan)
        for panel in dict.fromkeys(column.panel for column in columns):
            at = [i for i, column in enumerate(columns) if column.panel == panel]
            frame = self._panel(panel)
            places = frame.columns.get_indexer([columns[i].gene for i in at])
            if (places < 0).any():
                missing = [columns[i].gene for i, place in zip(at, places, strict=True) if place < 0]
                raise MorphomeError(
                    f"{self._panels[panel]}: {len(missing)} genes of the model are not in the table "
                    f"({', '.join(missing[:5])})",
                    "use the table that the model was trained with, or one with the same genes",
                )
            values[:, at] = frame.reindex(list(ids)).to_numpy("float64")[:, places]
        return values

    def without_genes(self, patient_id: str, columns: Sequence[Column]) -> bool:
        """True for a patient with no row in any of the tables of these columns."""
        return all(patient_id not in self._panel(panel).index for panel in {column.panel for column in columns})

    def without_panel(self, panels: Iterable[str], ids: Sequence[str]) -> dict[str, int]:
        """Number of these patients that have no row in each of the panels."""
        return {panel: int((~pd.Index(ids).isin(self._panel(panel).index)).sum()) for panel in panels}

    def _panel(self, panel: str) -> pd.DataFrame:
        if panel not in self._frames:
            if panel not in self._panels:
                raise MorphomeError(
                    f"the model needs the molecular table '{panel}', which is not configured",
                    f"add molecular.{panel} to the configuration, or leave this model out",
                )
            frame = read_parquet(self._panels[panel], "morphome.encoded" if panel == ENCODED else "morphome.panel")
            _unique(frame, str(self._panels[panel]))
            self._frames[panel] = frame.set_index("patient_id")
        return self._frames[panel]


def load_fold(
    *,
    patients: Path,
    index: Path | None,
    panels: Mapping[str, Path],
    groups: Path | None,
    splits: Path,
    repeat: int,
    fold: int,
    rna_encoder: Mapping[str, Any] | None = None,
) -> tuple[FoldData, pd.DataFrame]:
    """Read what a run needs, joined by ``patient_id``.

    Args:
        patients: ``morphome.analysis``; index: ``morphome.feature_index``; panels: ``morphome.panel`` by name;
            groups: ``morphome.groups`` or None; splits: ``morphome.splits``.

    Returns:
        The fold without the test outcomes, and apart from it the outcomes of all its patients
        (``patient_id, role, time_months, event``), for writing predictions only.

    Raises:
        MorphomeError: a patient twice in a table, a split of other patients, an empty role, an outcome that is
            missing or not positive.
    """
    table = read_parquet(patients, "morphome.analysis")
    _unique(table, str(patients))
    roles = read_parquet(splits, "morphome.splits")
    scheme = str(roles.attrs.get("scheme", ""))
    where = f"repeat {repeat}, fold {fold}"
    roles = roles[(roles["repeat"] == repeat) & (roles["fold"] == fold)]
    if roles.empty:
        raise MorphomeError(f"{splits}: there is no {where}", "ask for a repeat and fold that the splits have")
    _unique(roles, f"{splits} ({where})")
    unknown = sorted(set(roles["patient_id"]) - set(table["patient_id"]))
    if unknown:
        raise MorphomeError(
            f"{splits} ({where}): {len(unknown)} patients are not in {patients} ({', '.join(unknown[:5])})",
            "run the split step again for this table of patients",
        )
    strange = sorted(set(roles["role"]) - set(ROLES))
    if strange:
        raise MorphomeError(f"{splits} ({where}): unknown role '{strange[0]}'", f"roles are {', '.join(ROLES)}")
    joined = table.merge(roles[["patient_id", "role"]], on="patient_id", how="inner", validate="one_to_one")
    for role in ("train", "test"):
        if not (joined["role"] == role).any():
            raise MorphomeError(f"{splits} ({where}): no patient has the role '{role}'", "use fewer folds")
    bad = joined[~(joined["time_months"] > 0) | ~joined["event"].isin([0, 1])]
    if len(bad):
        raise MorphomeError(
            f"{patients}: {len(bad)} patients have a time that is not positive or an event that is not 0 or 1 "
            f"({', '.join(bad['patient_id'][:5])})",
            "run the cohort step again; it leaves such patients out",
        )
    named = read_json(groups, "morphome.groups")["groups"] if groups is not None else {}
    fold_data = FoldData(
        joined,
        index=index,
        panels=panels,
        groups={name: [Column(c["panel"], c["gene"]) for c in columns] for name, columns in named.items()},
        where=where,
        lost={"analysed patients without a role in this fold": len(table) - len(joined)},
        scheme=scheme,
        rna_encoder=rna_encoder,
    )
    outcomes = joined.sort_values("patient_id")[["patient_id", "role", "time_months", "event"]]
    return fold_data, outcomes.reset_index(drop=True)


def _unique(table: pd.DataFrame, source: str) -> None:
    twice = sorted(set(table.loc[table["patient_id"].duplicated(), "patient_id"]))
    if twice:
        raise MorphomeError(
            f"{source}: {len(twice)} patients appear more than once ({', '.join(twice[:5])})",
            "every table must have one row per patient; run the step that makes it again",
        )
