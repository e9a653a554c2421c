"""The epochs of a neural model: windows of patients, one bag at a time, and the choice of the epoch."""

from __future__ import annotations

import math
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.fusion import BRANCHES, FusionModel
from morphome.training.ahead import ahead
from morphome.training.balance import Balance, BranchHeads, make_balance
from morphome.training.cox_objective import windows
from morphome.training.data import FoldData, Outcomes, derive_seed
from morphome.training.distil import Distiller, log_risk
from morphome.training.inputs import Inputs
from morphome.training.objective import EpochChoice, sampling_weights
from morphome.training.optim import learning_rate, make_optimizer, set_rates
from morphome.training.outputs import Objective, Outputs, Watch, evaluate
from morphome.training.resume import Resume

#: Autocast types by ``training.precision``.
PRECISIONS = {"bf16": torch.bfloat16}


@dataclass
class Trained:
    """What a run of the loop leaves: the chosen state and epoch, its score, one row per epoch, rows of routing.

    ``heads`` and ``balance`` are the states of what watches the branches, at the chosen epoch too.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    balance: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    score: tuple[float, float] = (-math.inf, -math.inf)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    routing: list[dict[str, Any]] = field(default_factory=list)


class Loop:
    """One setting of one model on one fold.

    Args:
        name: of the model and fold, for progress and messages.
        module: on its device. objective: of its head. inputs: fitted.
        train: patients trained on. chosen_on: patients on whose outcomes the epoch is chosen.
        training: the training section. seed: of the fold.
        distiller: prepared, or None.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        objective: Objective,
        inputs: Inputs,
        fold: FoldData,
        train: Outcomes,
        chosen_on: Outcomes,
        training: Mapping[str, Any],
        seed: int,
        distiller: Distiller | None = None,
    ) -> None:
        self.name, self.module, self.objective, self.inputs = name, module, objective, inputs
        self.fold, self.train, self.chosen_on, self.training, self.seed = fold, train, chosen_on, training, seed
        self.bins = objective.bins(train.time)
        self.distiller = distiller
        self.device = next(module.parameters()).device
        self.heads, self.balance = branches(module, objective.width, training, seed)
        beside = [*(self.heads.parameters() if self.heads is not None else ())]
        if distiller is not None:
            beside += distiller.head_parameters()
        self.optimizer = make_optimizer(module, beside, training)

    # -- epochs ---------------------------------------------------------------------------------------------
    def run(self, resume: Resume, extra: Mapping[str, Any]) -> Trained:
        """Train until the last epoch or until patience ends.

        Args:
            resume: where states are written; ``extra`` goes into them.
        """
        training = self.training
        choice = EpochChoice(training["epoch_rule"], training["patience"])
        done = Trained()
        first = self._take_up(resume, choice, done, extra) + 1
        epochs = training["epochs"]
        bar = tqdm(range(first, epochs + 1), desc=self.name, unit="epoch", disable=None, leave=False)
        for epoch in bar:
            if choice.stop:
                break
            start = clock.perf_counter()
            rate = learning_rate(epoch, training)
            train_loss = self._epoch(epoch, rate)
            found = self.evaluate(self.chosen_on.ids, epoch)
            inner_loss, inner_c = self.objective.score(found.main, self.chosen_on)
            row = {"epoch": epoch, "train_loss": train_loss, "inner_loss": inner_loss, "inner_c": inner_c}
            row |= self._branch_row(found)
            if found.pinv_error is not None:
                row["pinv_error"] = found.pinv_error
            done.routing += found.routing
            if choice.update(epoch, inner_c, inner_loss):
                done.state = _copied(self.module)
                if self.balance is not None:
                    done.heads, done.balance = _copied(self.heads), self.balance.state_dict()
            done.epochs.append({**row, "learning_rate": rate, "seconds": clock.perf_counter() - start})
            bar.set_postfix(train=f"{train_loss:.3f}", inner_c=f"{inner_c:.3f}")
            if bar.disable:  # no terminal: a line in the log
                print(f"{self.name}: epoch {epoch} of {epochs}, inner C {inner_c:.3f}", flush=True)
            if resume.due:
                resume.save({**extra, **self._state(choice, done)})
        bar.close()
        done.epoch, done.score = choice.epoch, choice.best
        return done

    def _branch_row(self, found: Outputs) -> dict[str, float]:
        if self.balance is None:
            return {}
        scored = {u: self.objective.score(outputs, self.chosen_on) for u, outputs in found.branches.items()}
        inner_c = {u: c for u, (_, c) in scored.items()}
        self.balance.end_epoch(inner_c)
        return self.balance.log() | {f"inner_c_{u}": c for u, c in inner_c.items()}

    def _epoch(self, epoch: int, rate: float) -> float:
        """One pass; the mean of the objective over the patients drawn."""
        self.module.train()
        if self.balance is not None:
            self.balance.start_epoch(epoch)
        total, place = 0.0, 0
        for members in self.windows(epoch):
            total += self._window(members, epoch, place, rate)
            place += len(members)
        return total / place

    def windows(self, epoch: int) -> list[np.ndarray]:
        """Patients (indices into ``train``) of each optimiser step of an epoch."""
        rng = np.random.default_rng(derive_seed(self.seed, "order", epoch))
        n = len(self.train.ids)
        if self.objective.whole_window:
            return windows(self.train.event, self.training["cox_window"], rng)
        if self.training["sampler"] == "shuffle":
            order = rng.permutation(n)
        else:
            order = rng.choice(n, size=n, replace=True, p=sampling_weights(self.bins, self.train.event))
        size = self.training["accumulation"]
        return [order[start : start + size] for start in range(0, n, size)]

    # -- one window -----------------------------------------------------------------------------------------
    def _window(self, members: np.ndarray, epoch: int, place: int, rate: float) -> float:
        """One optimiser step; the sum of the losses of its patients (Cox: without further losses)."""
        seeds = [derive_seed(self.seed, "step", epoch, place + k) for k in range(len(members))]
        self.optimizer.zero_grad(set_to_none=True)
        shared = self._first_pass(members, seeds, epoch)
        # The true size of the window: the last one of an epoch is shorter.
        n, total = len(members), 0.0
        alone: dict[str, list[float]] = {u: [] for u in BRANCHES}
        for k, output in enumerate(self._forward(members, seeds)):
            if output is None:
                continue
            terms = self._terms(output, int(members[k]), k, n, shared)
            total += self._finite(terms["main"], int(members[k]), epoch) * n
            for u in alone.keys() & terms.keys():
                alone[u].append(terms[u].item() * n)
            if self.balance is None:
                terms["main"].backward()
            else:
                self.balance.backward(terms)
        factors: dict[str, float] = {}
        if self.balance is not None:
            # Means over the patients that the rule has not left out; the surrogates of a second pass are no losses.
            means = {u: sum(x) / len(x) if x else math.nan for u, x in alone.items()}
            self.balance.end_window(shared.alone if self.objective.whole_window else means)
            factors = self.balance.multipliers()
        set_rates(self.optimizer, rate, factors)
        self.optimizer.step()
        return shared.main * n if self.objective.whole_window else total

    def _finite(self, value: Tensor, i: int, epoch: int) -> float:
        number = value.item()
        if not math.isfinite(number):
            raise MorphomeError(
                f"{self.name}, epoch {epoch}, patient {self.train.ids[i]}: the loss is {number}",
                "look for extreme features of this patient; try a lower training.learning_rate",
            )
        return number

    def _terms(self, output: dict[str, Any], i: int, k: int, n: int, shared: _Shared | None) -> dict[str, Tensor]:
        """Losses of one patient, divided by the size of the window, by "main" and branch."""
        patient, time, event = self.train.ids[i], self.train.time[i], self.train.event[i]
        outputs = {"main": output[self.objective.output], **output.get("branches", {})}
        if self.objective.whole_window:
            terms = {u: shared.coefficients[u][k] * out.float().squeeze() for u, out in outputs.items()}
        else:
            terms = {u: self.objective.loss(out.float(), time, event) / n for u, out in outputs.items()}
        extra = sum(output.get("extra_losses", {}).values())
        if self.distiller is not None and not self.distiller.pairwise:
            extra = extra + self.distiller.loss(output, patient)
        terms["main"] = terms["main"] + extra / n
        if self.distiller is not None and self.distiller.pairwise:
            terms["main"] = terms["main"] + shared.pairwise.get(k, 0.0) * log_risk(output)
        return terms

    def _first_pass(self, members: np.ndarray, seeds: Sequence[int], epoch: int) -> _Shared | None:
        """What the losses of a whole window need of all its patients, without gradient."""
        pairwise = self.distiller is not None and self.distiller.pairwise
        balanced = self.balance is not None and self.balance.pairwise
        if not self.objective.whole_window and not pairwise and not balanced:
            return None
        kept: dict[str, list[Tensor]] = {}
        risks, present = [], []
        with torch.no_grad():
            for k, output in enumerate(self._forward(members, seeds)):
                if output is None:  # a rule leaves this patient out of the step
                    continue
                present.append(k)
                # Here already: one patient's NaN would be in the loss of all others.
                self._finite(output[self.objective.output].sum(), int(members[k]), epoch)
                for u, out in {"main": output[self.objective.output], **output.get("branches", {})}.items():
                    kept.setdefault(u, []).append(out.float().squeeze(0))
                if pairwise:
                    risks.append(log_risk(output))
        time, event = self.train.time[members[present]], self.train.event[members[present]]
        shared = _Shared()
        if self.objective.whole_window and present:
            for u, h in kept.items():
                g, loss = self.objective.coefficients(torch.cat(h), time, event)
                shared.coefficients[u] = dict(zip(present, g.float().unbind(), strict=True))
                if u == "main":
                    shared.main = loss
                elif event.sum() > 1:  # a single event says too little of a branch
                    shared.alone[u] = loss
        if balanced and present:
            alone = {u: torch.stack(h) for u, h in kept.items() if u != "main"}
            self.balance.start_window(alone, *(torch.from_numpy(x).to(self.device) for x in (time, event)))
        if pairwise and len(present) > 1:
            risk = torch.stack(risks).requires_grad_()
            ids = [self.train.ids[i] for i in members[present]]
            loss = self.distiller.window_loss(risk, ids, time, event)
            g = torch.autograd.grad(loss, risk)[0] if loss.requires_grad else torch.zeros_like(risk)
            shared.pairwise = dict(zip(present, g.unbind(), strict=True))
        return shared

    def _forward(self, members: np.ndarray, seeds: Sequence[int]) -> Iterator[dict[str, Any] | None]:
        """Training outputs of the patients of a window; the next bag is made ready meanwhile."""

        def make(k: int) -> Batch:
            i = int(members[k])
            batch = self.inputs.batch(self.fold, self.train.ids[i], training=True, draw=seeds[k])
            return replace(batch, bin=int(self.bins[i]), event=int(self.train.event[i]))

        drop = self.training["modality_dropout"]
        for k, batch in enumerate(ahead(make, range(len(members)))):
            if drop and np.random.default_rng([seeds[k], 1]).uniform() < drop:
                batch = replace(batch, groups=None, omic_all=None, rna=None, cnv=None, mut=None)
            # Dropout depends on the epoch and the place in it, not on what was drawn before.
            self._seed(seeds[k])
            with self._autocast():
                output = self.module(batch) if self.balance is None else self.balance.forward(batch)
            # Outside: losses and gradients are not for the types of autocast.
            yield output

    def _seed(self, number: int) -> None:
        """Seed the device that is used; ``torch.manual_seed`` seeds all there are, which takes longer than a step of a
        small model."""
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)

    def _autocast(self) -> torch.autocast:
        kind = PRECISIONS.get(self.training["precision"])
        return torch.autocast(self.device.type, dtype=kind or torch.bfloat16, enabled=kind is not None)

    @property
    def watch(self) -> Watch | None:
        """Scores of each branch alone; None for a model without branches."""
        return self.balance.watch if self.balance is not None else None

    # -- evaluation -----------------------------------------------------------------------------------------
    @torch.no_grad()
    def evaluate(self, ids: Sequence[str], epoch: int) -> Outputs:
        """Outputs on whole bags, in fp32."""
        return evaluate(self.name, self.module, self.objective, self.inputs, self.fold, ids, epoch, self.watch)

    # -- going on after a kill ------------------------------------------------------------------------------
    def _state(self, choice: EpochChoice, done: Trained) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "heads": self.heads.state_dict() if self.heads is not None else {},
            "balance": self.balance.state_dict() if self.balance is not None else {},
            "distiller": self.distiller.state_dict() if self.distiller is not None else {},
            "choice": {"best": choice.best, "epoch": choice.epoch, "waited": choice.waited},
            "done": vars(done),
        }

    def _take_up(self, resume: Resume, choice: EpochChoice, done: Trained, extra: Mapping[str, Any]) -> int:
        """Put back the state of an earlier run of this trial; the last epoch it has done."""
        state = resume.load()
        if state is None or "module" not in state or state.get("trial") != extra["trial"]:
            return 0
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        for part in ("heads", "balance", "distiller"):
            if getattr(self, part) is not None:
                getattr(self, part).load_state_dict(state[part])
        choice.best, choice.epoch, choice.waited = (state["choice"][k] for k in ("best", "epoch", "waited"))
        vars(done).update(state["done"])
        print(f"{self.name}: going on after epoch {done.epochs[-1]['epoch']}", flush=True)
        return int(done.epochs[-1]["epoch"])


@dataclass
class _Shared:
    """What the first pass of a window found: dL/dh by output, L, L by branch, and the pairwise coefficients."""

    coefficients: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    main: float = 0.0
    alone: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BRANCHES, math.nan))
    pairwise: dict[int, Tensor] = field(default_factory=dict)


def branches(
    module: nn.Module, width: int, training: Mapping[str, Any], seed: int
) -> tuple[BranchHeads | None, Balance | None]:
    """Heads on the branches of a fusion model and the rule that balances them; None for other models."""
    if not isinstance(module, FusionModel):
        return None, None
    heads = BranchHeads(module, width, seed).to(next(module.parameters()).device)
    return heads, make_balance(module, heads, training["balance"], derive_seed(seed, "balance"))


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}
