"""The one trainer of all neural models: the recipe of the MCAT family with its faults mended.

Adam with L2, one patient at a time, gradients accumulated over a window, sampling balanced over time bin × status.
The last window of an epoch is stepped like the others, a window is divided by its true size, auxiliary losses are
divided like the main one, an empty class gets weight 0, seeds differ per fold and repeat, the epoch is chosen on the
inner validation part of the training fold, and the survival curves are recalibrated to the event rates that the
balanced sampling hides. Evaluation sees whole bags.
"""

from __future__ import annotations

import contextlib
import math
import os
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from morphome import survival
from morphome.errors import MorphomeError
from morphome.models import hazard
from morphome.models.batch import Batch
from morphome.models.registry import NEURAL, Dims, build
from morphome.training.data import Column, FoldData, Outcomes, derive_seed
from morphome.training.diagnostics import diagnostics_table
from morphome.training.objective import EpochChoice, HazardObjective, sampling_weights
from morphome.training.preprocess import Arrays, ColumnScaler


@contextlib.contextmanager
def torch_state(threads: int, seed: int, device: str = "cpu") -> Iterator[None]:
    """Threads, deterministic algorithms and seed inside; the caller's state of torch is restored afterwards."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if device != "cpu":
        # cuBLAS is deterministic only with a fixed workspace, which it reads when it first starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with torch.random.fork_rng(devices=[] if device == "cpu" else None):
        try:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.manual_seed(seed)
            # Peaked attention makes denormal numbers, on which CPUs are far slower.
            torch.set_flush_denormal(True)
            yield
        finally:
            torch.set_flush_denormal(False)
            torch.set_num_threads(before[0])
            torch.use_deterministic_algorithms(before[1], warn_only=warn_only)


def choose_device(asked: str) -> str:
    """ "cpu" or "cuda"; "auto" takes CUDA where there is one.

    Raises:
        MorphomeError: CUDA is asked for and not there.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise MorphomeError("training.device is 'cuda' but no CUDA device is available", "use 'auto' or 'cpu'")
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"


class NeuralModel:
    """A model of the neural registry with everything that is fitted around it.

    The interface is that of :class:`morphome.training.baselines.Baseline`. Everything is fitted on the role "train"
    only: the inner validation part stays as unseen as the test part.
    """

    fit_roles = ("train",)

    def __init__(
        self,
        key: str,
        settings: Mapping[str, Any],
        training: Mapping[str, Any],
        seed: int,
        threads: int = 1,
        horizon_months: float | None = None,
    ) -> None:
        """Args:
        key: registry key; settings: the model's own settings; training: the training section.
        seed: derived from the training seed, repeat and fold.
        threads: CPU threads of torch; part of the result, since they order floating point sums.
        horizon_months: the last bin edge with ``bin_edges: horizon``; fixed before any model is fitted.
        """
        self.horizon_months = horizon_months
        self.key, self.settings, self.training = key, dict(settings), dict(training)
        self.seed, self.threads = seed, threads
        self.needs: frozenset[str] = NEURAL[key].needs
        self.experts: tuple[str, ...] = getattr(NEURAL[key], "experts", ())
        if NEURAL[key].head != "hazard":
            raise MorphomeError(
                f"model '{key}' has the head '{NEURAL[key].head}', which this version cannot train",
                "choose a model with a hazard head",
            )
        self.device = choose_device(self.training["device"])
        self.best_epoch: int | None = None
        self._epochs: list[dict[str, Any]] = []
        self._routing: list[dict[str, Any]] = []
        self._final_routing: list[dict[str, Any]] = []
        self._columns: tuple[Column, ...] = ()
        self._groups: dict[str, np.ndarray] = {}
        self._scaler: ColumnScaler | None = None
        self._genes: dict[str, np.ndarray] = {}

    # -- training -------------------------------------------------------------------------------------------
    def fit(self, fold: FoldData, notes: list[str]) -> None:
        """Train; remarks for the reader are appended to ``notes``.

        Raises:
            MorphomeError: no event or equal bin edges in training, an empty inner part under ``inner_best``, a loss
                that is not finite (named by epoch and patient).
        """
        train, inner = fold.outcomes("train"), fold.outcomes("inner_val")
        if self.training["epoch_rule"] == "inner_best" and not inner.ids:
            raise MorphomeError(
                f"{fold.where}: no patient has the role 'inner_val', so no epoch can be chosen",
                "set splits.inner_fraction, or training.epoch_rule: last",
            )
        self._fit_inputs(fold, train, notes)
        last_edge = self.horizon_months if self.training["bin_edges"] == "horizon" else None
        if self.training["bin_edges"] == "horizon" and last_edge is None:
            notes.append(f"there is no horizon: the time bins are quantiles of the training events ({fold.where})")
        edges = hazard.bin_edges(train.time, train.event, self.training["time_bins"], fold.where, last_edge)
        self.objective = HazardObjective(edges)
        d_in = fold.bag(train.ids[0])[0].shape[1] if "path" in self.needs else 0
        self.dims = self._dims(d_in, self.training["time_bins"])
        with torch_state(self.threads, derive_seed(self.seed, "weights"), self.device):
            self.module = build(self.key, self.settings, self.dims).to(self.device)
            self._train(fold, train, inner, notes)

    def _train(self, fold: FoldData, train: Outcomes, inner: Outcomes, notes: list[str]) -> None:
        training = self.training
        optimizer = torch.optim.Adam(
            self.module.parameters(),
            lr=training["learning_rate"],
            weight_decay=training["weight_decay"],
            fused=True,  # three times faster than the loop over parameters on a CPU, for MoME's 20 M
        )
        choice = EpochChoice(training["epoch_rule"], training["patience"])
        state: dict[str, torch.Tensor] = {}
        name = f"{self.key} {fold.where}"
        bar = tqdm(range(1, training["epochs"] + 1), desc=name, unit="epoch", disable=None, leave=False)
        for epoch in bar:
            start = clock.perf_counter()
            # Own seed per epoch: what evaluation does in between cannot shift the dropout of the next epoch.
            torch.manual_seed(derive_seed(self.seed, "epoch", epoch))
            train_loss = self._epoch(fold, train, optimizer, epoch)
            logits, routing = self._evaluate(fold, inner.ids, epoch)
            inner_loss, inner_c = self._score(logits, inner)
            self._routing += routing
            if choice.update(epoch, inner_c, inner_loss):
                state = {k: v.detach().cpu().clone() for k, v in self.module.state_dict().items()}
            self._epochs.append(
                {
                    "epoch": epoch,
                    "train_loss": train_loss,
                    "inner_loss": inner_loss,
                    "inner_c": inner_c,
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "seconds": clock.perf_counter() - start,
                }
            )
            bar.set_postfix(train=f"{train_loss:.3f}", inner_c=f"{inner_c:.3f}")
            if bar.disable:  # no terminal: a line in the log
                print(f"{name}: epoch {epoch} of {training['epochs']}, inner C {inner_c:.3f}", flush=True)
            if choice.stop:
                break
        bar.close()
        if training["epoch_rule"] == "inner_best" and all(math.isnan(row["inner_c"]) for row in self._epochs):
            notes.append(
                f"the inner validation part has no comparable pair: the epoch was chosen by its loss ({fold.where})"
            )
        self.best_epoch = choice.epoch
        self.module.load_state_dict(state)
        # Each training patient once, whatever the sampler drew.
        logits, _ = self._evaluate(fold, train.ids, choice.epoch)
        self.objective.recalibrate(logits, train.time, train.event)

    def _epoch(self, fold: FoldData, train: Outcomes, optimizer: torch.optim.Optimizer, epoch: int) -> float:
        """One pass; the mean of the objective over the patients drawn."""
        self.module.train()
        order = self._order(train, epoch)
        patches = np.random.default_rng(derive_seed(self.seed, "patches", epoch))
        window = self.training["accumulation"]
        bins = hazard.bin_index(train.time, self.objective.edges)
        total = 0.0
        for start in range(0, len(order), window):
            members = order[start : start + window]
            optimizer.zero_grad(set_to_none=True)
            for i in members:
                batch = self._batch(fold, train.ids[i], patches)
                output = self.module(replace(batch, bin=int(bins[i]), event=int(train.event[i])))
                loss = self.objective.loss(output, train.time[i], train.event[i], self.training["beta"])
                loss = loss + sum(output.get("extra_losses", {}).values())
                if not torch.isfinite(loss):
                    raise MorphomeError(
                        f"{self.key}, {fold.where}, epoch {epoch}, patient {train.ids[i]}: the loss is {loss.item()}",
                        "look for extreme features of this patient; try a lower training.learning_rate",
                    )
                # The true size of the window: the last one of an epoch is shorter.
                (loss / len(members)).backward()
                total += loss.item()
            optimizer.step()
        return total / len(order)

    def _order(self, train: Outcomes, epoch: int) -> np.ndarray:
        rng = np.random.default_rng(derive_seed(self.seed, "order", epoch))
        n = len(train.ids)
        if self.training["sampler"] == "shuffle":
            return rng.permutation(n)
        weights = sampling_weights(hazard.bin_index(train.time, self.objective.edges), train.event)
        return rng.choice(n, size=n, replace=True, p=weights)

    def _score(self, logits: np.ndarray, data: Outcomes) -> tuple[float, float]:
        """Mean loss (β = 0, so that settings compare) and Harrell's C; NaN without patients or pairs."""
        if not data.ids:
            return math.nan, math.nan
        losses = [
            self.objective.loss({"logits": torch.from_numpy(row[None])}, t, e, 0.0).item()
            for row, t, e in zip(logits, data.time, data.event, strict=True)
        ]
        risk, _ = self.objective.prediction(logits, np.empty(0))
        return float(np.mean(losses)), float(survival.harrell(data.time, data.event, risk).c)

    # -- inputs ---------------------------------------------------------------------------------------------
    def _fit_inputs(self, fold: FoldData, train: Outcomes, notes: list[str]) -> None:
        if not self.needs & {"omic_groups", "omic_all"}:
            return
        groups = fold.groups if "omic_groups" in self.needs else {}
        if "omic_groups" in self.needs and not groups:
            raise MorphomeError(
                f"model '{self.key}' needs gene groups and none is given",
                "add molecular.groups to the configuration, or leave this model out",
            )
        wanted = {column for columns in groups.values() for column in columns}
        if "omic_all" in self.needs:
            wanted |= set(fold.panel_columns(fold.gene_panels))
        if not wanted:
            raise MorphomeError(
                f"model '{self.key}' needs molecular columns and none is given",
                "add molecular.rna, .mut or .cnv to the configuration, or leave this model out",
            )
        self._columns = tuple(sorted(wanted))
        place = {column: i for i, column in enumerate(self._columns)}
        self._groups = {
            name: np.array([place[column] for column in columns], dtype=np.int64) for name, columns in groups.items()
        }
        self._scaler = ColumnScaler.fit(fold.gene_matrix(self._columns, train.ids))
        still = int((~self._scaler.varies).sum())
        if still:
            notes.append(f"{still} molecular columns do not vary in training and were set to 0 ({fold.where})")
        panels = sorted({column.panel for column in self._columns})
        for panel, count in fold.without_panel(panels, fold.ids()).items():
            if count:
                notes.append(f"{count} patients have no row in '{panel}': they get the training medians ({fold.where})")

    def _dims(self, d_in: int, n_bins: int) -> Dims:
        sizes = {name: len(at) for name, at in self._groups.items()}
        n_omic = len(self._columns) if "omic_all" in self.needs else 0
        return Dims(d_in, sizes, n_bins, n_omic, router_seed=derive_seed(self.seed, "router"))

    def _batch(self, fold: FoldData, patient: str, patches: np.random.Generator | None = None) -> Batch:
        """Input of one patient; with ``patches`` at most ``max_patches`` tiles, drawn without order lost."""
        path = position = groups = everything = None
        if "path" in self.needs:
            features, places = fold.bag(patient)
            most = self.training["max_patches"]
            if patches is not None and len(features) > most:
                drawn = np.sort(patches.choice(len(features), size=most, replace=False))
                features, places = features[drawn], places[drawn]
            path = torch.from_numpy(np.ascontiguousarray(features)).to(self.device)
            position = torch.from_numpy(np.ascontiguousarray(places)).to(self.device)
        if self._scaler is not None:
            if patient not in self._genes:
                z = self._scaler.transform(fold.gene_matrix(self._columns, [patient]))[0]
                self._genes[patient] = z.astype(np.float32)
            z = self._genes[patient]
            groups = tuple(torch.from_numpy(z[at]).to(self.device) for at in self._groups.values())
            everything = torch.from_numpy(z).to(self.device) if "omic_all" in self.needs else None
        return Batch(path=path, pos=position, groups=groups, omic_all=everything, patient_id=patient)

    # -- prediction -----------------------------------------------------------------------------------------
    def predict(self, fold: FoldData, ids: Sequence[str], times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Risk (n,) float64, higher = worse, and S(t) (n, len(times)); NaN after the last finite bin edge."""
        self._genes = {}  # another table may hold other values for the same ids
        with torch_state(self.threads, derive_seed(self.seed, "predict"), self.device):
            logits, self._final_routing = self._evaluate(fold, ids, self.best_epoch or 0)
        return self.objective.prediction(logits, times)

    @torch.no_grad()
    def _evaluate(self, fold: FoldData, ids: Sequence[str], epoch: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Logits (n, K) float64 on whole bags, and the rows of the routing table."""
        self.module.eval()
        logits = np.empty((len(ids), self.dims.n_bins))
        rows: list[dict[str, Any]] = []
        for i, patient in enumerate(ids):
            output = self.module(self._batch(fold, patient))
            logits[i] = output["logits"][0].double().cpu().numpy()
            for layer, routed in output.get("aux", {}).get("routing", {}).items():
                p = routed["pi"].detach().double().cpu().numpy().ravel()
                rows.append(
                    {
                        "epoch": epoch,
                        "layer": layer,
                        "patient_id": patient,
                        "role": fold.table.at[patient, "role"],
                        "expert": int(routed["expert"]),
                        **{f"p{e}": p[e] for e in range(len(p))},
                        "entropy": float(-(p[p > 0] * np.log(p[p > 0])).sum()),
                    }
                )
        if not np.isfinite(logits).all():
            bad = ids[int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])]
            raise MorphomeError(
                f"{self.key}, {fold.where}, epoch {epoch}, patient {bad}: the prediction is not finite",
                "look for extreme features of this patient; try a lower training.learning_rate",
            )
        return logits, rows

    # -- state ----------------------------------------------------------------------------------------------
    @property
    def n_parameters(self) -> int:
        """Number of weights, trained or frozen (as papers count them)."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def history(self) -> pd.DataFrame:
        """One row per epoch."""
        table = pd.DataFrame(self._epochs).astype({"epoch": "int32"})
        table["chosen"] = table["epoch"] == self.best_epoch
        return table

    @property
    def diagnostics(self) -> pd.DataFrame:
        """Routing of the inner patients in every epoch, and of those predicted last at the chosen epoch."""
        earlier = [row for row in self._routing if row["epoch"] != self.best_epoch or not self._final_routing]
        rows = sorted(earlier + self._final_routing, key=lambda r: (r["epoch"], r["layer"], r["patient_id"]))
        return diagnostics_table(rows)

    def arrays(self) -> Arrays:
        """Weights and fitted state as tensors."""
        state = {f"weights/{k}": v.detach().cpu().numpy() for k, v in self.module.state_dict().items()}
        state["fitted/bin_edges"] = self.objective.edges
        state["fitted/baseline_offsets"] = self.objective.offsets
        if self._scaler is not None:
            state |= self._scaler.arrays("fitted/genes")
        return state

    def facts(self) -> dict[str, Any]:
        """Shapes, column names and group membership."""
        return {
            "d_in": self.dims.d_in,
            "n_bins": self.dims.n_bins,
            "columns": [list(column) for column in self._columns],
            # A list of pairs: the order of the groups is part of the model, and JSON objects are sorted on saving.
            "groups": [[name, at.tolist()] for name, at in self._groups.items()],
            "best_epoch": self.best_epoch,
        }

    def restore(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Take up the state that :meth:`arrays` and :meth:`facts` gave."""
        self._columns = tuple(Column(*column) for column in facts["columns"])
        self._groups = {name: np.array(at, dtype=np.int64) for name, at in facts["groups"]}
        self._scaler = ColumnScaler.restore(arrays, "fitted/genes") if self._columns else None
        self.best_epoch = facts["best_epoch"]
        self.objective = HazardObjective(arrays["fitted/bin_edges"], arrays.get("fitted/baseline_offsets"))
        self.dims = self._dims(facts["d_in"], facts["n_bins"])
        with torch_state(self.threads, self.seed, self.device):
            self.module = build(self.key, self.settings, self.dims).to(self.device)
        state = {k.removeprefix("weights/"): v for k, v in arrays.items() if k.startswith("weights/")}
        self.module.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()})
