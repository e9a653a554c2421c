"""Balance of the modalities: what a training loop asks a plug-in, the rule ``none`` and the choice of a rule.

Once one branch of a fused model orders the patients well, the common loss hands both branches small gradients, and the
other branch stays undertrained. Rules against it either change the learning rate of a branch
(:mod:`morphome.training.balance_rules`) or its gradient (:mod:`morphome.training.balance_gradients`). All of them, and
``none`` too, measure each branch alone: linear heads on what a branch hands to the fusion, which learn their own loss
and pass no gradient into the model unless the rule says so.

A loop per patient calls :meth:`Balance.forward` and :meth:`Balance.backward`, per optimiser step
:meth:`Balance.end_window` and :meth:`Balance.multipliers`. Whatever is drawn at random depends on the seed, the number
of the step and the patient only, so that the two passes of a Cox window draw the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.fusion import BRANCHES, Encoded, FusionModel
from morphome.training.balance_settings import BALANCE_SETTINGS, MOVING_AVERAGE, balance_problem
from morphome.training.data import derive_seed

#: The branch that a branch is compared with.
OTHER = {"path": "omic", "omic": "path"}
# Differences of losses beyond this are no longer told apart; exp() stays finite.
_MOST = 50.0


def ratio(losses: Mapping[str, float]) -> dict[str, float]:
    """rho^u = exp(L^v - L^u), v the other branch: above 1 for the branch that alone fits better; product 1."""
    gap = max(-_MOST, min(_MOST, losses["omic"] - losses["path"]))
    return {"path": math.exp(gap), "omic": math.exp(-gap)}


class BranchHeads(nn.Module):
    """One linear head per branch, on the mean over the rows of ``z[u]``.

    A model whose head is a sum of one part per branch says so by ``branch_scores(z) -> {u: (1, w)}``. That exact
    split is used instead, and there is nothing to learn here.

    Args:
        module: the fused model; it does not become a part of this module.
        width: w, the width of the model's head (K, or 1 for Cox).
        seed: of the weights at the start; torch's own random state is left alone.
    """

    def __init__(self, module: FusionModel, width: int, seed: int = 0) -> None:
        super().__init__()
        self._split = getattr(module, "branch_scores", None)
        self.linear = nn.ModuleDict()
        if self._split is not None:
            return
        generator = torch.Generator().manual_seed(derive_seed(seed, "branch heads"))
        for u in BRANCHES:
            # skip_init: the constructor of nn.Linear would draw from torch's default generator.
            head = nn.utils.skip_init(nn.Linear, module.branch_widths[u], width)
            bound = 1 / math.sqrt(module.branch_widths[u])
            for weight in head.parameters():
                nn.init.uniform_(weight, -bound, bound, generator=generator)
            self.linear[u] = head

    def forward(self, z: Mapping[str, Tensor], detach: bool) -> dict[str, Tensor]:
        """Scores of each branch alone, ``{u: (1, w)}``.

        Args:
            z: what the branches hand to the fusion.
            detach: let no gradient into the model; with an exact split its weights are the model's own, so that no
                gradient is left at all.
        """
        if self._split is not None:
            scores = self._split(z)
            return {u: scores[u].detach() if detach else scores[u] for u in BRANCHES}
        return {u: self.linear[u]((z[u].detach() if detach else z[u]).mean(0, keepdim=True)) for u in BRANCHES}


class Balance:
    """The rule ``none``: joint training, the branches are watched only. Base class of all rules.

    A rule overrides :meth:`forward_rule`, :meth:`backward_rule` and :meth:`window_rule`, which are asked in the epochs
    from ``start_epoch`` to ``end_epoch``; in the others this class trains jointly.

    Args:
        module: the model; heads: of its branches.
        settings: complete settings of the rule, see :func:`make_balance`.
        seed: of everything that the rule draws.

    Attributes:
        average: moving averages of L^u, empty before the first window.
        k: factors of the last window by branch.
        step: number of windows so far.
    """

    #: The loop runs every window twice and calls :meth:`start_window` in between, with a hazard head too.
    pairwise = False
    #: Settings with their defaults.
    defaults: ClassVar[Mapping[str, Any]] = BALANCE_SETTINGS["none"]

    def __init__(self, module: FusionModel, heads: BranchHeads, settings: Mapping[str, Any], seed: int) -> None:
        self.module, self.heads, self.settings, self.seed = module, heads, dict(settings), seed
        self.parameters = {u: list(ps) for u, ps in module.branch_parameters().items()}
        self.average: dict[str, float] = {}
        self.k = dict.fromkeys(BRANCHES, 1.0)
        self.step, self.epoch = 0, 0
        self._sum: dict[str, float] = {}
        self._count: dict[str, int] = {}

    # -- what the loop calls --------------------------------------------------------------------------------
    @property
    def active(self) -> bool:
        """True in the epochs in which the rule acts."""
        last = self.settings.get("end_epoch")
        return self.settings.get("start_epoch", 1) <= self.epoch and (last is None or self.epoch <= last)

    def start_epoch(self, epoch: int) -> None:
        """Epochs count from 1."""
        self.epoch = epoch
        self._sum, self._count = {}, {}

    def forward(self, batch: Batch) -> dict[str, Any] | None:
        """Training forward of one patient: the model's output and ``branches`` = {u: (1, w)}; None: skip the patient.

        Without gradient (the first pass of a window) it gives the same numbers and leaves no trace.
        """
        encoded = self.module.encode(batch)
        return self.forward_rule(batch, encoded) if self.active else self.joint(encoded)

    def start_window(self, branches: Mapping[str, Tensor], time: Tensor, event: Tensor) -> None:
        """Between the two passes of a window, asked of ``pairwise`` rules only.

        Args:
            branches: {u: (n, w)} of the first pass, in the order in which the second pass will run.
            time: months, (n,); event: 1 = observed, (n,).
        """

    def backward(self, terms: Mapping[str, Tensor]) -> None:
        """Add the gradients of one patient to ``.grad``.

        Args:
            terms: ``main``, the loss with its extra losses, and ``path``, ``omic``, the losses of ``branches``; all
                are divided by the size of the window already. Cox: the score times its coefficient of the window.
        """
        if self.active:
            self.backward_rule(terms)
        else:
            _backward(terms.values())

    def end_window(self, values: Mapping[str, float]) -> None:
        """After the last backward of a window and before the step; the rule changes ``.grad`` and its factors here.

        Args:
            values: L^u of the window, the mean negative log-likelihood of its patients under branch u alone (Cox: of
                its events); NaN where it has none, for example with fewer than two events: the averages stay.
        """
        if all(math.isfinite(values[u]) for u in BRANCHES):
            decay = self.settings.get("moving_average", MOVING_AVERAGE)
            for u in BRANCHES:
                past = self.average.get(u, values[u])
                self.average[u] = decay * past + (1 - decay) * values[u]
                self.record(f"loss_{u}", values[u])
        for u in BRANCHES:
            self.record(f"grad_norm_{u}", _norm(self.parameters[u]))
        self.k = dict.fromkeys(BRANCHES, 1.0)
        if self.active:
            self.window_rule(values)
        if self.average:
            self.record("rho", self.rho()["path"])
        for u in BRANCHES:
            self.record(f"k_{u}", self.k[u])
        self.step += 1

    def watch(self, encoded: Encoded) -> dict[str, Tensor]:
        """Scores of each branch alone, {u: (1, w)}, that pass no gradient into the model; also for evaluation."""
        return self.heads(encoded.z, detach=True)

    def multipliers(self) -> dict[str, float]:
        """Factors of the learning rates of this step, by branch."""
        return dict.fromkeys(BRANCHES, 1.0)

    def end_epoch(self, inner_c: Mapping[str, float]) -> None:
        """C of each branch alone on the inner validation part; NaN where there is none."""

    def log(self) -> dict[str, float]:
        """Means over the windows of this epoch: ``rho`` (of the slides' branch), ``k_u``, ``loss_u``, ``grad_norm_u``
        (before the rule changes the gradient), and what the rule adds (``grad_cos_u`` between g_m and g_u)."""
        return {name: total / self._count[name] for name, total in self._sum.items()}

    def state_dict(self) -> dict[str, Tensor | float | int]:
        """Everything a resumed run needs beside model, heads and optimiser: flat, tensors and numbers."""
        state: dict[str, Tensor | float | int] = {"step": self.step, "epoch": self.epoch}
        state |= {f"average/{u}": value for u, value in self.average.items()}
        state |= {f"sum/{name}": value for name, value in self._sum.items()}
        state |= {f"count/{name}": value for name, value in self._count.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor | float | int]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.step, self.epoch = int(state["step"]), int(state["epoch"])
        self.average = section(state, "average")
        self._sum, self._count = section(state, "sum"), section(state, "count")

    # -- what a rule overrides --------------------------------------------------------------------------------
    def forward_rule(self, batch: Batch, encoded: Encoded) -> dict[str, Any] | None:
        """:meth:`forward` from the encoded patient."""
        return self.joint(encoded)

    def backward_rule(self, terms: Mapping[str, Tensor]) -> None:
        """:meth:`backward`."""
        _backward(terms.values())

    def window_rule(self, values: Mapping[str, float]) -> None:
        """Set ``self.k`` and change ``.grad``; the averages are up to date."""

    def rho(self) -> dict[str, float]:
        """How far each branch is ahead: rho^u by branch, from the moving averages."""
        return ratio(self.average)

    # -- what rules share -------------------------------------------------------------------------------------
    def record(self, name: str, value: float) -> None:
        """One more value of a mean of :meth:`log`; not finite ones are left out."""
        if math.isfinite(value):
            self._sum[name] = self._sum.get(name, 0.0) + value
            self._count[name] = self._count.get(name, 0) + 1

    def weaker(self) -> str | None:
        """The branch with the larger moving average of L^u; None before the first window and when both are equal."""
        if not self.average or self.average["path"] == self.average["omic"]:
            return None
        return max(BRANCHES, key=lambda u: self.average[u])

    def uniform(self, *parts: object) -> float:
        """A number in [0, 1) that depends on the seed, the step and ``parts`` only."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.step, *parts))
        return float(torch.rand((), generator=generator, dtype=torch.float64))

    def joint(self, encoded: Encoded) -> dict[str, Any]:
        """Joint training: the plain output of the model, and the branches watched from outside."""
        return self.module.output(encoded) | {"branches": self.watch(encoded)}


def make_balance(module: FusionModel, heads: BranchHeads, settings: Mapping[str, Any], seed: int) -> Balance:
    """The rule that the section ``training.balance`` asks for.

    Args:
        module: the model; heads: of its branches.
        settings: ``rule`` and settings of that rule; what is left out takes the rule's default.
        seed: of everything that the rule draws.

    Raises:
        MorphomeError: an unknown rule, a setting that is not one of the rule, or epochs that leave it nothing to do.
    """
    if problem := balance_problem(settings):
        raise MorphomeError(f"training.balance{problem[0]}", problem[1])
    given = dict(settings)
    rule = given.pop("rule", "none")
    return balance_rules()[rule](module, heads, {**BALANCE_SETTINGS[rule], **given}, seed)


def balance_rules() -> dict[str, type[Balance]]:
    """Every rule by its key."""
    # The rules derive from the class above, so they can be imported only once it is there.
    from morphome.training.balance_gradients import GRADIENT_RULES
    from morphome.training.balance_rules import RATE_RULES

    return {"none": Balance, **RATE_RULES, **GRADIENT_RULES}


def section(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The entries ``name/...`` of a flat state, without that prefix."""
    return {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}


def _backward(terms: Any) -> None:
    # Scores of an exact split are detached: nothing learns from them.
    torch.autograd.backward([term for term in terms if term.requires_grad])


def _norm(parameters: list[nn.Parameter]) -> float:
    norms = [torch.linalg.vector_norm(p.grad) for p in parameters if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
