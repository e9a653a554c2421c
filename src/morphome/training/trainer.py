"""The one trainer of all neural models: the recipe of the MCAT family with its faults mended.

Adam with L2, one patient at a time, gradients accumulated over a window, sampling balanced over time bin × status.
The last window of an epoch is stepped like the others, a window is divided by its true size, auxiliary losses are
divided like the main one, an empty class gets weight 0, seeds differ per fold and repeat, the epoch is chosen on the
inner validation part of the training fold, and the survival curves are recalibrated to the event rates that the
balanced sampling hides. Models with a Cox head are trained on the exact loss of windows of patients. Evaluation sees
whole bags.

``protocol: published`` trains and selects as the original codes did: time bins of all patients, the inner part joined
to the training part, and the last epoch, or the best one on the very fold that is reported (``oracle_outer_best``).
Such a row is optimistic, and marked so.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from morphome import __version__
from morphome.errors import MorphomeError
from morphome.models import hazard
from morphome.models.batch import Batch
from morphome.models.registry import Dims, build, network
from morphome.models.registry import defaults as network_defaults
from morphome.training.cox_objective import CoxObjective
from morphome.training.data import FoldData, Outcomes, derive_seed
from morphome.training.diagnostics import diagnostics_table
from morphome.training.distil import Distiller
from morphome.training.inputs import Inputs
from morphome.training.loop import Loop, Trained, branches
from morphome.training.objective import HazardObjective
from morphome.training.outputs import Objective, Outputs, Watch, evaluate
from morphome.training.preprocess import Arrays
from morphome.training.resume import Resume


@contextlib.contextmanager
def torch_state(threads: int, seed: int, device: str = "cpu") -> Iterator[None]:
    """Threads, deterministic algorithms and seed inside; the caller's state of torch is restored afterwards."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    if device != "cpu":
        # cuBLAS is deterministic only with a fixed workspace, which it reads when it first starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with torch.random.fork_rng(devices=[] if device == "cpu" else None):
        try:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(True, warn_only=True)
            # Filling fresh memory finds reads of uninitialised values, at a tenth of MoME's step.
            torch.utils.deterministic.fill_uninitialized_memory = False
            torch.manual_seed(seed)
            # Peaked attention makes denormal numbers, on which CPUs are far slower.
            torch.set_flush_denormal(True)
            yield
        finally:
            torch.set_flush_denormal(False)
            torch.utils.deterministic.fill_uninitialized_memory = filled
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
    only: the inner validation part stays as unseen as the test part. (Not so with ``protocol: published``.)
    """

    def __init__(
        self,
        key: str,
        settings: Mapping[str, Any],
        training: Mapping[str, Any],
        seed: int,
        threads: int = 1,
        horizon_months: float | None = None,
        state_file: Path | None = None,
        inputs_key: str = "",
        edges: np.ndarray | None = None,
    ) -> None:
        """Args:
        key: registry key; settings: the model's own settings; training: the training section.
        seed: derived from the training seed, repeat and fold.
        threads: CPU threads of torch; part of the result, since they order floating point sums.
        horizon_months: the last bin edge with ``bin_edges: horizon``; fixed before any model is fitted.
        state_file: where training writes what it needs to go on after a kill; None: it does not.
        inputs_key: hash of the tables; a state of training on others is not taken up.
        edges: of the time bins, for a teacher that must have those of its student; fitted without it.
        """
        self.horizon_months, self.edges = horizon_months, edges
        self.state_file, self.inputs_key = state_file, inputs_key
        self.key, self.settings, self.training = key, dict(settings), dict(training)
        self.seed, self.threads = seed, threads
        self.network = network(key)
        self.needs: frozenset[str] = self.network.needs
        self.experts: tuple[str, ...] = getattr(self.network, "experts", ())
        self.published = training["protocol"] == "published"
        self.fit_roles = ("train", "inner_val") if self.published else ("train",)
        self.device = choose_device(self.training["device"])
        self.best_epoch: int | None = None
        #: Risks of the branches of a fusion model, of the patients predicted last; while its heads are known.
        self.branch_risks: dict[str, np.ndarray] = {}
        self._watch: Watch | None = None
        self._epochs: list[dict[str, Any]] = []
        self._routing: list[dict[str, Any]] = []
        self._final_routing: list[dict[str, Any]] = []
        self.inputs = Inputs(
            key,
            self.needs,
            getattr(self.network, "trains_with", frozenset()),
            training["max_patches"],
            training["modality_dropout"] > 0,
            self.device,
            seed,
        )
        self._refuse()

    def _refuse(self) -> None:
        training, supports = self.training, self.network.supports
        if training["modality_dropout"] > 0 and "missing_omic" not in supports:
            raise MorphomeError(
                f"model '{self.key}' has no learned tokens for patients without genes",
                "set training.modality_dropout: 0 for this row",
            )
        if training["distil"] and self.published:
            raise MorphomeError(
                f"model '{self.key}': distillation does not go with protocol published, whose training patients have "
                "no held-out teachers",
                "choose protocol honest",
            )

    # -- training -------------------------------------------------------------------------------------------
    def fit(self, fold: FoldData, notes: list[str], shown: Mapping[str, Outcomes] | None = None) -> None:
        """Train; remarks for the reader are appended to ``notes``.

        Args:
            shown: outcomes that only ``protocol: published`` may see: "test" and "all" patients.

        Raises:
            MorphomeError: no event or equal bin edges in training, an empty inner part where an epoch or a setting
                is chosen on it, a loss that is not finite (named by epoch and patient).
        """
        train = fold.outcomes(*self.fit_roles)
        chosen_on = shown["test"] if self.published else fold.outcomes("inner_val")
        trials = search_grid(self.training)
        if not chosen_on.ids and (self.training["epoch_rule"] != "last" or len(trials) > 1):
            raise MorphomeError(
                f"{fold.where}: no patient has the role 'inner_val', so no epoch and no setting can be chosen",
                "set splits.inner_fraction, or training.epoch_rule: last without training.search",
            )
        self.inputs.fit(fold, train, notes)
        self.objective = self._objective(fold, shown["all"] if self.published else train, notes)
        bins = self.objective.bins(train.time)
        self.inputs.fit_parts(self.network, self.settings, fold, train, bins)
        self.dims = self.inputs.dims(self.objective.width)
        resume = Resume(self.state_file, self._key(fold, train, chosen_on))
        # Known before a trial begins, and part of every state: targets of teachers, trials that are done.
        known = {k: v for k, v in (resume.load() or {}).items() if k in ("taught", "finished")}
        distiller = self._distiller(fold, notes, known, resume)
        best: Trained | None = None
        with torch_state(self.threads, derive_seed(self.seed, "weights"), self.device):
            for trial, changes in enumerate(trials):
                if trial < known.get("finished", {"trials": 0})["trials"]:
                    best = Trained(**known["finished"]["best"])
                    self.module = self._untrained()
                    continue
                found = self._trial(fold, train, chosen_on, changes, distiller, resume, {"trial": trial, **known})
                best = _better(best, found, changes)
                if len(trials) > 1:
                    known["finished"] = {"trials": trial + 1, "best": vars(best)}
                    resume.save({"trial": -1, **known})
            self._take(fold, train, best, notes)
        resume.done()

    def _trial(
        self,
        fold: FoldData,
        train: Outcomes,
        chosen_on: Outcomes,
        changes: Mapping[str, float],
        distiller: Distiller | None,
        resume: Resume,
        extra: Mapping[str, Any],
    ) -> Trained:
        """Train with one setting of the search; ``extra`` goes into the states that are written."""
        self.module = self._untrained()
        if distiller is not None:
            width = self._pooled_width(self.module, fold, train.ids[0]) if distiller.reads_pooled else 0
            distiller.build(width).to(self.device)
        loop = Loop(
            f"{self.key} {fold.where}",
            self.module,
            self.objective,
            self.inputs,
            fold,
            train,
            chosen_on,
            {**self.training, **changes},
            self.seed,
            distiller,
        )
        return loop.run(resume, extra)

    def _untrained(self) -> torch.nn.Module:
        """The network as every trial begins with it."""
        torch.manual_seed(derive_seed(self.seed, "weights"))
        return build(self.key, self.settings, self.dims).to(self.device)

    @torch.no_grad()
    def _pooled_width(self, module: torch.nn.Module, fold: FoldData, patient: str) -> int:
        """Width of what a model of slides pools a bag to; 0 where it does not say."""
        pooled = module.eval()(self.inputs.batch(fold, patient)).get("aux", {}).get("pooled")
        return 0 if pooled is None else pooled.shape[1]

    def _take(self, fold: FoldData, train: Outcomes, best: Trained, notes: list[str]) -> None:
        """Keep the chosen state, and put the curves on the level of the training patients."""
        self._epochs, self._routing, self.best_epoch = best.epochs, best.routing, best.epoch
        if self.training["epoch_rule"] == "inner_best" and all(math.isnan(row["inner_c"]) for row in self._epochs):
            how = "the last one" if math.isnan(self._epochs[0]["inner_loss"]) else "chosen by its loss"
            notes.append(f"the inner validation part has no comparable pair: the epoch was {how} ({fold.where})")
        self.module.load_state_dict(best.state)
        heads, balance = branches(self.module, self.objective.width, self.training, self.seed)
        if balance is not None:
            heads.load_state_dict(best.heads)
            balance.load_state_dict(best.balance)
            self._watch = balance.watch
        # Each training patient once, whatever the sampler drew.
        outputs = self._evaluate(fold, train.ids, best.epoch)
        self.objective.recalibrate(outputs.main, train.time, train.event)

    def _objective(self, fold: FoldData, binned: Outcomes, notes: list[str]) -> Objective:
        if self.network.head == "cox":
            if not fold.outcomes(*self.fit_roles).event.any():
                raise MorphomeError(f"{fold.where}: no event among the training patients", "use fewer or larger folds")
            return CoxObjective()
        last_edge = self.horizon_months if self.training["bin_edges"] == "horizon" else None
        if self.training["bin_edges"] == "horizon" and last_edge is None:
            notes.append(f"there is no horizon: the time bins are quantiles of the training events ({fold.where})")
        if self.edges is not None:
            return HazardObjective(self.edges, beta=self.training["beta"])
        bins = self.training["time_bins"]
        edges = hazard.bin_edges(binned.time, binned.event, bins, fold.where, last_edge)
        return HazardObjective(edges, beta=self.training["beta"])

    def _distiller(self, fold: FoldData, notes: list[str], known: dict[str, Any], resume: Resume) -> Distiller | None:
        """Teachers, trained within this training fold; what they say is kept in ``known``."""
        if not self.training["distil"]:
            return None
        distiller = Distiller(self.training["distil"], derive_seed(self.seed, "distil"))
        if "taught" in known:
            distiller.load_state_dict(known["taught"])
            notes += known["taught"]["notes"]
            return distiller
        edges = getattr(self.objective, "edges", None)
        remarks: list[str] = []

        def train_teacher(key: str, settings: Mapping[str, Any], part: FoldData, seed: int) -> NeuralModel:
            plain = {"distil": None, "search": {}, "protocol": "honest", "modality_dropout": 0.0}
            training = {**self.training, **plain}
            given = {**network_defaults(key), **settings}
            teacher = NeuralModel(key, given, training, seed, self.threads, self.horizon_months, edges=edges)
            teacher.fit(part, remarks)
            return teacher

        distiller.prepare(fold, train_teacher, remarks, edges)
        notes += remarks
        known["taught"] = {**distiller.state_dict(), "notes": remarks}
        resume.save({"trial": -1, **known})
        return distiller

    def _key(self, fold: FoldData, train: Outcomes, chosen_on: Outcomes) -> str:
        """Hash of what training depends on, for :class:`Resume`."""
        digest = hashlib.sha256()
        settings = {k: v for k, v in self.training.items() if k != "device"}
        versions = (__version__, torch.__version__)
        for part in (
            self.inputs_key,
            self.key,
            self.settings,
            settings,
            self.seed,
            self.threads,
            self.device,
            versions,
        ):
            digest.update(repr(part).encode())
        for part in (fold.where, fold.fingerprint, train.ids, chosen_on.ids, self.inputs.facts()):
            digest.update(repr(part).encode())
        edges = getattr(self.objective, "edges", np.empty(0))
        outcomes = (train.time, train.event, chosen_on.time, chosen_on.event)
        for numbers in (*outcomes, edges, *self.inputs.arrays().values()):
            digest.update(np.ascontiguousarray(numbers).tobytes())
        return digest.hexdigest()

    # -- prediction -----------------------------------------------------------------------------------------
    def predict(self, fold: FoldData, ids: Sequence[str], times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Risk (n,) float64, higher = worse, and S(t) (n, len(times)); NaN after the last finite bin edge."""
        self.inputs.forget()
        with torch_state(self.threads, derive_seed(self.seed, "predict"), self.device):
            outputs = self._evaluate(fold, ids, self.best_epoch or 0)
        self._final_routing = outputs.routing
        self.branch_risks = {u: self.objective.risk(found) for u, found in outputs.branches.items()}
        return self.objective.prediction(outputs.main, times)

    def _evaluate(self, fold: FoldData, ids: Sequence[str], epoch: int) -> Outputs:
        """Outputs on whole bags."""
        name = f"{self.key}, {fold.where}"
        return evaluate(name, self.module, self.objective, self.inputs, fold, ids, epoch, self._watch)

    @torch.no_grad()
    def read(
        self, fold: FoldData, ids: Sequence[str], reader: Callable[[torch.nn.Module, Batch], torch.Tensor]
    ) -> list[torch.Tensor]:
        """``reader(module, batch)`` of each patient, in evaluation mode: what a student learns from this model."""
        with torch_state(self.threads, derive_seed(self.seed, "predict"), self.device):
            self.module.eval()
            return [reader(self.module, self.inputs.batch(fold, patient)) for patient in ids]

    # -- state ----------------------------------------------------------------------------------------------
    @property
    def n_parameters(self) -> int:
        """Number of weights, trained or frozen (as papers count them)."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def history(self) -> pd.DataFrame:
        """One row per epoch, of every setting tried."""
        return pd.DataFrame(self._epochs).astype({"epoch": "int32", "chosen": "bool"})

    @property
    def diagnostics(self) -> pd.DataFrame:
        """Routing of the inner patients in every epoch, and of those predicted last at the chosen epoch."""
        earlier = [row for row in self._routing if row["epoch"] != self.best_epoch or not self._final_routing]
        rows = sorted(earlier + self._final_routing, key=lambda r: (r["epoch"], r["layer"], r["patient_id"]))
        return diagnostics_table(rows)

    def arrays(self) -> Arrays:
        """Weights and fitted state as tensors."""
        state = {f"weights/{k}": v.detach().cpu().numpy() for k, v in self.module.state_dict().items()}
        return state | self.objective.arrays() | self.inputs.arrays()

    def facts(self) -> dict[str, Any]:
        """Shapes, column names and group membership."""
        return {**self.inputs.facts(), "n_bins": self.dims.n_bins, "best_epoch": self.best_epoch}

    def restore(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Take up the state that :meth:`arrays` and :meth:`facts` gave."""
        self.best_epoch = facts["best_epoch"]
        self.inputs.restore(arrays, facts)
        if self.network.head == "cox":
            self.objective = CoxObjective.restore(arrays)
        else:
            self.objective = HazardObjective(
                arrays["fitted/bin_edges"], arrays.get("fitted/baseline_offsets"), self.training["beta"]
            )
        self.dims: Dims = self.inputs.dims(facts["n_bins"])
        with torch_state(self.threads, self.seed, self.device):
            self.module = build(self.key, self.settings, self.dims).to(self.device)
        state = {k.removeprefix("weights/"): v for k, v in arrays.items() if k.startswith("weights/")}
        self.module.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()})


def _better(best: Trained | None, found: Trained, changes: Mapping[str, float]) -> Trained:
    """The better one of two trials, with the epochs of both."""
    label = {"setting": ", ".join(f"{k}={v:g}" for k, v in changes.items())} if changes else {}
    kept = found if best is None or found.score > best.score else best
    earlier = [] if best is None else [row | {"chosen": row["chosen"] and kept is best} for row in best.epochs]
    chosen = found.epoch if kept is found else None
    kept.epochs = earlier + [row | label | {"chosen": row["epoch"] == chosen} for row in found.epochs]
    return kept


def search_grid(training: Mapping[str, Any]) -> list[dict[str, float]]:
    """Every combination of the values in ``training.search``, the same for every model; one empty one without it."""
    search = {name: values for name, values in training["search"].items() if values}
    return [dict(zip(search, values, strict=True)) for values in itertools.product(*search.values())]
