"""Rules that give a branch gradients of its own, beside or in place of those of the fused loss.

``L^u`` is the loss of branch u alone, ``L_m`` that of the fused model, ``f^u`` the mean over the rows of ``z[u]``. The
heads of the branches always learn their own loss in full, whatever weight it has for the encoders (not so where the
model itself is an exact sum of its branches: there are no heads then).

References: Wei and Hu, "MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance", ICML 2024; Fan et
al., "PMR: Prototypical Modal Rebalance for Multimodal Learning", CVPR 2023, 20029; the survival forms are derived.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from morphome.errors import MorphomeError
from morphome.models import hazard
from morphome.models.batch import Batch
from morphome.models.fusion import BRANCHES, Encoded
from morphome.training.balance import OTHER, Balance, section
from morphome.training.balance_settings import BALANCE_SETTINGS, EPOCHS

# Gradients whose common direction is shorter than this share of theirs are opposed: what is left is rounding.
_OPPOSED = 1e-6


class BranchGradients(Balance):
    """The graph is cut at ``z[u]``: the losses of the branches stop there and the rule takes them further."""

    defaults: ClassVar[Mapping[str, Any]] = EPOCHS

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._z: dict[str, Tensor] = {}
        self._cut: dict[str, Tensor] = {}
        self._branches: dict[str, Tensor] = {}

    def cut(self, encoded: Encoded) -> dict[str, Tensor]:
        """Scores of the branches on ``z`` cut off from the encoders; remembered until the backward of the patient."""
        cut = {key: value.detach() for key, value in encoded.z.items()}
        for u in BRANCHES:
            cut[u].requires_grad_()
        self._z, self._cut = dict(encoded.z), cut
        self._branches = self.heads(cut, detach=False)
        return self._branches

    def forward_rule(self, batch: Batch, encoded: Encoded) -> dict[str, Any]:
        return self.module.output(encoded) | {"branches": self.cut(encoded)}

    def at_cut(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """dL^u/dz[u] by branch; the heads take their gradient on the way. A branch that learns nothing is left out."""
        leaves = [self._cut[u] for u in BRANCHES]
        torch.autograd.backward([terms[u] for u in BRANCHES], inputs=[*leaves, *self.heads.parameters()])
        return {u: self._cut[u].grad for u in BRANCHES if self._z[u].requires_grad}

    def finish(self) -> None:
        """Let go of the patient."""
        self._z, self._cut, self._branches = {}, {}, {}

    def joint_backward(self, main: Tensor, at_cut: Mapping[str, Tensor]) -> None:
        """One pass through the model: the fused loss, and gradients that enter at ``z[u]``."""
        torch.autograd.backward([main, *(self._z[u] for u in at_cut)], [None, *at_cut.values()])
        self.finish()


class Aux(BranchGradients):
    """L = L_m + beta sum_u omega_u L^u: losses of the branches beside that of the fused model.

    ``omega: gap`` is omega_u = max(0, L^u - L^v) of the moving averages before the window, so that only the weaker
    branch is helped, the more the weaker it is; ``equal`` is 1 for both.
    """

    defaults: ClassVar[Mapping[str, Any]] = BALANCE_SETTINGS["aux"]

    def omega(self) -> dict[str, float]:
        """Weights of the losses of the branches, without beta."""
        if self.settings["omega"] == "equal":
            return dict.fromkeys(BRANCHES, 1.0)
        if not self.average:
            return dict.fromkeys(BRANCHES, 0.0)
        return {u: max(0.0, self.average[u] - self.average[OTHER[u]]) for u in BRANCHES}

    def backward_rule(self, terms: Mapping[str, Tensor]) -> None:
        weights = {u: self.settings["beta"] * value for u, value in self.omega().items()}
        gradients = self.at_cut(terms)
        self.joint_backward(terms["main"], {u: weights[u] * g for u, g in gradients.items() if weights[u] > 0})


class PMR(Balance):
    """Adds -weight log softmax_j(-||f^u - c_j^u||^2) at the patient's class j, for the weaker branch only.

    Classes are time bin x status; the prototype c_j^u is the mean of f^u over the patients of class j that were drawn
    in the epoch before, as they were encoded then. So the rule acts from the second epoch on. A class that was never
    drawn has no prototype, and its patients no such loss.
    """

    defaults: ClassVar[Mapping[str, Any]] = BALANCE_SETTINGS["pmr_surv"]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.prototypes: dict[int, dict[str, Tensor]] = {}
        self._totals: dict[int, dict[str, Tensor]] = {}
        self._drawn: dict[int, int] = {}

    def start_epoch(self, epoch: int) -> None:
        super().start_epoch(epoch)
        if self._totals:
            self.prototypes = {
                j: {u: total / self._drawn[j] for u, total in totals.items()} for j, totals in self._totals.items()
            }
        self._totals, self._drawn = {}, {}

    def forward(self, batch: Batch) -> dict[str, Any]:
        if batch.bin is None or batch.event is None:
            raise MorphomeError(
                f"patient {batch.patient_id or '(no id)'}: no time bin and status, which the rule 'pmr_surv' needs",
                "choose another training.balance.rule",
            )
        encoded = self.module.encode(batch)
        output = self.joint(encoded)
        label = 2 * batch.bin + batch.event
        features = {u: encoded.z[u].mean(0) for u in BRANCHES}
        weak = self.weaker()
        if self.active and self.settings["weight"] > 0 and weak is not None and label in self.prototypes:
            output["extra_losses"] = {**output["extra_losses"], "pmr": self._loss(features[weak], weak, label)}
        if torch.is_grad_enabled():
            self._collect(features, label)
        return output

    def _loss(self, feature: Tensor, branch: str, label: int) -> Tensor:
        classes = sorted(self.prototypes)
        centres = torch.stack([self.prototypes[j][branch] for j in classes]).to(feature)
        scores = -(feature - centres).square().sum(-1)
        return -self.settings["weight"] * scores.log_softmax(0)[classes.index(label)]

    def _collect(self, features: Mapping[str, Tensor], label: int) -> None:
        # Sums of hundreds of rows: in double precision.
        now = {u: feature.detach().double() for u, feature in features.items()}
        past = self._totals.get(label)
        self._totals[label] = now if past is None else {u: past[u] + now[u] for u in BRANCHES}
        self._drawn[label] = self._drawn.get(label, 0) + 1

    def state_dict(self) -> dict[str, Tensor | float | int]:
        state = super().state_dict() | {f"drawn/{j}": count for j, count in self._drawn.items()}
        for name, rows in (("prototype", self.prototypes), ("total", self._totals)):
            for j, row in rows.items():
                state |= {f"{name}_{u}/{j}": value.cpu() for u, value in row.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor | float | int]) -> None:
        super().load_state_dict(state)
        device = next(self.module.parameters()).device
        self._drawn = {int(j): int(count) for j, count in section(state, "drawn").items()}
        read = {
            name: {
                int(j): {u: state[f"{name}_{u}/{j}"].to(device) for u in BRANCHES}
                for j in section(state, f"{name}_path")
            }
            for name in ("prototype", "total")
        }
        self.prototypes, self._totals = read["prototype"], read["total"]


class MMPareto(BranchGradients):
    """Fuses the gradients g_m of L_m and g_u of L^u on the parameters of branch u so that neither loss must rise.

    cos(g_m, g_u) >= 0: h = g_m + g_u. Else h = 2 [a g_m + (1 - a) g_u] with a = clip((g_u - g_m) . g_u /
    ||g_m - g_u||^2, 0, 1), the shortest vector between both. Then h is rescaled to the length gamma ||g_m + g_u||.
    Gradients that cancel have no common direction: the branch gets h = 0. Parameters of no branch keep g_m.
    """

    defaults: ClassVar[Mapping[str, Any]] = BALANCE_SETTINGS["mmpareto"]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._own: dict[str, list[Tensor | None]] = {}

    def backward_rule(self, terms: Mapping[str, Tensor]) -> None:
        gradients = {u: g for u, g in self.at_cut(terms).items() if self.parameters[u]}
        terms["main"].backward(retain_graph=bool(gradients))
        for left, (u, gradient) in enumerate(gradients.items(), start=1 - len(gradients)):
            new = torch.autograd.grad(
                self._z[u], self.parameters[u], gradient, retain_graph=left < 0, allow_unused=True
            )
            old = self._own.get(u, [None] * len(new))
            self._own[u] = [b if a is None else a if b is None else a.add_(b) for a, b in zip(old, new, strict=True)]
        self.finish()

    def window_rule(self, values: Mapping[str, float]) -> None:
        for u, own in self._own.items():
            for p, g in zip(self.parameters[u], own, strict=True):
                if p.grad is None and g is not None:
                    p.grad = torch.zeros_like(p)
            pairs = [(p.grad, g) for p, g in zip(self.parameters[u], own, strict=True) if p.grad is not None]
            mm = sum(_dot(m, m) for m, _ in pairs)
            uu = sum(_dot(g, g) for _, g in pairs if g is not None)
            mu = sum(_dot(m, g) for m, g in pairs if g is not None)
            if mm > 0 and uu > 0:
                self.record(f"grad_cos_{u}", mu / math.sqrt(mm * uu))
            of_main, of_own = pareto(mm, uu, mu, self.settings["gamma"])
            for m, g in pairs:
                m.mul_(of_main)
                if g is not None:
                    m.add_(g, alpha=of_own)
        self._own = {}


def pareto(mm: float, uu: float, mu: float, gamma: float) -> tuple[float, float]:
    """Factors of g_m and g_u in h, from g_m . g_m, g_u . g_u and g_m . g_u."""
    if mu >= 0:
        return gamma, gamma
    a = min(max((uu - mu) / (mm - 2 * mu + uu), 0.0), 1.0)
    length = 2 * math.sqrt(max(a * a * mm + 2 * a * (1 - a) * mu + (1 - a) ** 2 * uu, 0.0))
    if length <= _OPPOSED * math.sqrt(mm + uu):
        return 0.0, 0.0
    scale = 2 * gamma * math.sqrt(max(mm + 2 * mu + uu, 0.0)) / length
    return scale * a, scale * (1 - a)


class DGL(BranchGradients):
    """Encoder u learns from L^u only; the fusion and its head learn from L_m on ``z`` cut off from the encoders.

    No settings. Parameters of no branch that lie before ``z[u]`` get the gradients of the losses of the branches that
    they feed. Extra losses of the model reach whatever they are made of, encoders too.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        exclusive = {id(p) for parameters in self.parameters.values() for p in parameters}
        self._rest = [p for p in self.module.parameters() if p.requires_grad and id(p) not in exclusive]
        self._shared: dict[str, Tensor] = {}

    def forward_rule(self, batch: Batch, encoded: Encoded) -> dict[str, Any]:
        branches = self.cut(encoded)
        # What belongs to no branch takes the gradient of the fused loss, but not into the encoders of the branches.
        self._shared = {
            key: value.detach().requires_grad_()
            for key, value in encoded.z.items()
            if key not in BRANCHES and value.requires_grad
        }
        fused = {key: value.detach() for key, value in encoded.z.items()} | self._shared
        return self.module.output(encoded, fused) | {"branches": branches}

    def backward_rule(self, terms: Mapping[str, Tensor]) -> None:
        gradients = self.at_cut(terms)
        # Extra losses may hang on the graph of the encoders, which the passes below need once more.
        terms["main"].backward(retain_graph=True)
        for key, leaf in self._shared.items():
            if leaf.grad is not None and self._rest:
                self._z[key].backward(leaf.grad, retain_graph=True, inputs=self._rest)
        for u, gradient in gradients.items():
            if inputs := [*self.parameters[u], *self._rest]:
                self._z[u].backward(gradient, retain_graph=True, inputs=inputs)
        self._shared = {}
        self.finish()


class RankDistill(BranchGradients):
    """One branch learns the order of the other: weight mean_pairs ((s_i - s_j) - (tau_i - tau_j))^2.

    Pairs are {i had the event, t_i < t_j} of a window, s the risk of the student branch alone, tau that of the teacher,
    without gradient: log risk of a Cox head, -sum_k S_k of a hazard head. ``teacher`` is a branch, or ``better``: the
    one with the lower moving average of L^u. The encoder of the student learns it, its head does not.
    """

    pairwise = True
    defaults: ClassVar[Mapping[str, Any]] = BALANCE_SETTINGS["rank_distill"]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._student: str | None = None
        self._coefficients: list[float] = []

    def start_window(self, branches: Mapping[str, Tensor], time: Tensor, event: Tensor) -> None:
        teacher = self.settings["teacher"]
        self._student = self.weaker() if teacher == "better" else OTHER[teacher]
        self._coefficients = []
        if self._student is None or not self.active:
            return
        risks = {u: self._risk(branches[u].detach()) for u in BRANCHES}
        loss, gradient = rank_loss(risks[self._student], risks[OTHER[self._student]], time, event)
        self.record("rank_loss", loss)
        self._coefficients = (self.settings["weight"] * gradient).tolist()

    def _risk(self, scores: Tensor) -> Tensor:
        return hazard.risk(scores) if self.module.head == "hazard" else scores.reshape(-1)

    def backward_rule(self, terms: Mapping[str, Tensor]) -> None:
        ranked: dict[str, Tensor] = {}
        if self._coefficients and self._student is not None:
            u, coefficient = self._student, self._coefficients.pop(0)
            if coefficient != 0 and self._z[u].requires_grad:
                score = self._risk(self._branches[u]).sum()
                (slope,) = torch.autograd.grad(score, self._cut[u], retain_graph=True)
                ranked[u] = coefficient * slope
        self.at_cut(terms)
        self.joint_backward(terms["main"], ranked)


def rank_loss(student: Tensor, teacher: Tensor, time: Tensor, event: Tensor) -> tuple[float, Tensor]:
    """Mean over the pairs {event_i, t_i < t_j} of ((s_i - s_j) - (tau_i - tau_j))^2, and its gradient for s.

    Args:
        student, teacher: risks (n,); time: months (n,); event: 1 = observed, (n,).

    Returns:
        The loss (0 without a pair) and (n,) float64.
    """
    d = (student - teacher).double()
    pairs = (event.bool()[:, None] & (time[:, None] < time[None, :])).double()
    count = pairs.sum().clamp(min=1)
    gaps = pairs * (d[:, None] - d[None, :])
    return float(gaps.square().sum() / count), 2 * (gaps.sum(1) - gaps.sum(0)) / count


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))


#: Rules of this module by key.
GRADIENT_RULES: dict[str, type[Balance]] = {
    "aux": Aux,
    "pmr_surv": PMR,
    "mmpareto": MMPareto,
    "dgl": DGL,
    "rank_distill": RankDistill,
}
