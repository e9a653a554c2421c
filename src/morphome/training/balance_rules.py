"""Rules that set the pace of each branch: by its learning rate, or by dropping what it hands to the fusion.

``l^u`` is the mean log-likelihood of the patients of a window under branch u alone (Cox: of its events), ``L^u = -l^u``
and v the other branch. With Adam a constant factor on the gradient cancels, since Adam divides by the scale of its own
gradients; a factor on the learning rate does not. So ``apply_to: lr`` is the default. With plain SGD both agree.

References: Peng et al., "Balanced Multimodal Learning via On-the-fly Gradient Modulation", CVPR 2022, 8238 (ogm); Li
et al., "Boosting Multi-modal Model Performance with Adaptive Gradient Modulation", ICCV 2023, 22214 (agm); Wei et al.,
"On-the-fly Modulation for Balanced Multimodal Learning", IEEE TPAMI 47 (2025) 469 (opm); the Cox forms are derived.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from morphome.models.batch import Batch
from morphome.models.fusion import BRANCHES, Encoded
from morphome.training.balance import OTHER, Balance, ratio, section
from morphome.training.balance_settings import BALANCE_SETTINGS, RATE
from morphome.training.data import derive_seed

# C - 0.5 of a branch without skill counts as this much, so that ratios stay finite.
_LEAST_SKILL = 0.01
# L^u below this counts as this much in ratios of losses.
_LEAST_LOSS = 1e-8


class RateRule(Balance):
    """A factor k^u per step on the learning rate or the gradient of the parameters of each branch.

    Parameters that both branches pass, the fusion and its head keep their pace.
    """

    defaults: ClassVar[Mapping[str, Any]] = RATE

    def factors(self, values: Mapping[str, float]) -> dict[str, float]:
        """k^u of this window."""
        raise NotImplementedError

    def window_rule(self, values: Mapping[str, float]) -> None:
        self.k = self.factors(values)
        if self.settings["apply_to"] == "grad":
            for u in BRANCHES:
                for p in self.parameters[u]:
                    if p.grad is not None:
                        p.grad.mul_(self.k[u])

    def multipliers(self) -> dict[str, float]:
        return dict(self.k) if self.settings["apply_to"] == "lr" else dict.fromkeys(BRANCHES, 1.0)


class OGM(RateRule):
    """k^u = 1 - tanh(alpha max(0, rho^u - 1)): the branch that is ahead slows down, the other keeps k = 1.

    ``rho``: ``log_ratio`` exp(L^v - L^u), whose product over the branches is 1; ``loss_ratio`` L^v / L^u; ``cindex``
    (C^u - 0.5) / (C^v - 0.5) with C of the epoch before on the inner part, k = 1 in the first epoch; ``shapley``
    log_ratio under the scores of :meth:`_attribution`, which suit any fusion; the heads then learn nothing.
    ``form: ogm`` is the published 1 - tanh(alpha rho^u) for rho^u > 1, which jumps at 1. L^u are moving averages.
    ``ge_noise: std`` adds N(0, std(g)^2) to the gradient of every tensor of both branches.
    """

    defaults: ClassVar[Mapping[str, Any]] = BALANCE_SETTINGS["ogm_cox"]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._skill: dict[str, float] = {}
        self._mean: dict[str, Tensor] = {}
        self._seen: dict[str, list[Tensor]] = {u: [] for u in BRANCHES}

    def rho(self) -> dict[str, float]:
        kind = self.settings["rho"]
        if kind in ("log_ratio", "shapley"):
            return ratio(self.average)
        strength = {
            "loss_ratio": lambda u: 1 / max(self.average[u], _LEAST_LOSS),
            "cindex": lambda u: max(self._skill.get(u, 0.5) - 0.5, _LEAST_SKILL),
        }[kind]
        return {u: strength(u) / strength(OTHER[u]) for u in BRANCHES}

    def factors(self, values: Mapping[str, float]) -> dict[str, float]:
        if not self.average:
            return dict.fromkeys(BRANCHES, 1.0)
        alpha = self.settings["alpha"]
        lead = {
            "continuous": lambda rho: max(0.0, rho - 1),
            "ogm": lambda rho: rho if rho > 1 else 0.0,
        }[self.settings["form"]]
        return {u: 1 - math.tanh(alpha * lead(rho)) for u, rho in self.rho().items()}

    def window_rule(self, values: Mapping[str, float]) -> None:
        noise = self._noise() if self.settings["ge_noise"] == "std" else {}
        super().window_rule(values)
        for p, drawn in noise.items():
            p.grad.add_(drawn)

    def _noise(self) -> dict[torch.nn.Parameter, Tensor]:
        """N(0, std(g)^2) per tensor, from its gradient before any factor; a single number has no spread."""
        drawn = {}
        generator: torch.Generator | None = None
        for p in (p for u in BRANCHES for p in self.parameters[u]):
            if p.grad is None or p.numel() < 2:
                continue
            if generator is None:
                generator = torch.Generator(p.device).manual_seed(derive_seed(self.seed, self.step, "noise"))
            normal = torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)
            drawn[p] = normal * p.grad.std()
        return drawn

    def end_epoch(self, inner_c: Mapping[str, float]) -> None:
        if all(math.isfinite(inner_c.get(u, math.nan)) for u in BRANCHES):
            self._skill = {u: float(inner_c[u]) for u in BRANCHES}

    # -- attribution ----------------------------------------------------------------------------------------
    def watch(self, encoded: Encoded) -> dict[str, Tensor]:
        return self._attribution(encoded.z) if self.settings["rho"] == "shapley" else super().watch(encoded)

    def forward(self, batch: Batch) -> dict[str, Any] | None:
        encoded = self.module.encode(batch)
        if self.settings["rho"] == "shapley" and torch.is_grad_enabled():
            for u in BRANCHES:
                self._seen[u].append(encoded.z[u].detach().mean(0))
        return self.joint(encoded)

    @torch.no_grad()
    def _attribution(self, z: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """h(0, 0) + 1/2 [h(u, v) - h(0, v) + h(u, 0) - h(0, 0)], {u: (1, w)}.

        0 stands for the moving average of the training embeddings (the zero vector in the first window). All four
        terms see the same dropout; the random state of the training is left alone.
        """
        absent = {u: self._mean.get(u, torch.zeros_like(z[u][0])).expand_as(z[u]) for u in BRANCHES}
        seed = derive_seed(self.seed, self.step, "shapley")
        device = z["path"].device
        h: dict[tuple[str, ...], Tensor] = {}
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            for there in ((), ("path",), ("omic",), BRANCHES):
                torch.manual_seed(seed)
                h[tuple(there)] = self.module.fuse({**z, **{u: absent[u] for u in BRANCHES if u not in there}})
        # h(0, 0) - 1/2 h(0, 0): what is common to all patients stays whole, since the level matters to a hazard.
        return {u: 0.5 * (h[BRANCHES] - h[(OTHER[u],)] + h[(u,)] + h[()]) for u in BRANCHES}

    def end_window(self, values: Mapping[str, float]) -> None:
        super().end_window(values)
        decay = self.settings["moving_average"]
        for u, rows in self._seen.items():
            if rows:
                now = torch.stack(rows).mean(0)
                self._mean[u] = decay * self._mean.get(u, now) + (1 - decay) * now
        self._seen = {u: [] for u in BRANCHES}

    def state_dict(self) -> dict[str, Tensor | float | int]:
        mean = {f"mean/{u}": value.cpu() for u, value in self._mean.items()}
        return super().state_dict() | {f"skill/{u}": value for u, value in self._skill.items()} | mean

    def load_state_dict(self, state: Mapping[str, Tensor | float | int]) -> None:
        super().load_state_dict(state)
        device = next(self.module.parameters()).device
        self._skill = section(state, "skill")
        self._mean = {u: value.to(device) for u, value in section(state, "mean").items()}


class AGM(RateRule):
    """k^u = exp(alpha min(R^u - r^u, 7)): a branch that is further ahead than it used to be slows down.

    r^u = exp(l^u - l^v) of the window, R^u the same of the means over all windows so far. ``sign: opposite`` takes
    losses in place of log-likelihoods, as a public benchmark does.
    """

    defaults: ClassVar[Mapping[str, Any]] = BALANCE_SETTINGS["agm"]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._total = dict.fromkeys(BRANCHES, 0.0)
        self._windows = 0

    def end_window(self, values: Mapping[str, float]) -> None:
        if all(math.isfinite(values[u]) for u in BRANCHES):
            self._total = {u: self._total[u] + values[u] for u in BRANCHES}
            self._windows += 1
        super().end_window(values)

    def factors(self, values: Mapping[str, float]) -> dict[str, float]:
        if not all(math.isfinite(values[u]) for u in BRANCHES):
            return dict.fromkeys(BRANCHES, 1.0)
        now, reference = ratio(values), ratio({u: self._total[u] / self._windows for u in BRANCHES})
        if self.settings["sign"] == "opposite":
            now, reference = ({u: r[OTHER[u]] for u in BRANCHES} for r in (now, reference))
        return {u: math.exp(self.settings["alpha"] * min(reference[u] - now[u], 7.0)) for u in BRANCHES}

    def state_dict(self) -> dict[str, Tensor | float | int]:
        totals = {f"total/{u}": value for u, value in self._total.items()}
        return super().state_dict() | totals | {"windows": self._windows}

    def load_state_dict(self, state: Mapping[str, Tensor | float | int]) -> None:
        super().load_state_dict(state)
        self._total, self._windows = section(state, "total"), int(state["windows"])


class PDMP(RateRule):
    """The branch with the better C on the inner part learns ``ratio`` times as fast; both alike before the first C."""

    defaults: ClassVar[Mapping[str, Any]] = BALANCE_SETTINGS["pdmp"]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._better: str | None = None

    def end_epoch(self, inner_c: Mapping[str, float]) -> None:
        c = {u: inner_c.get(u, math.nan) for u in BRANCHES}
        if all(math.isfinite(value) for value in c.values()):
            self._better = None if c["path"] == c["omic"] else max(c, key=c.__getitem__)

    def factors(self, values: Mapping[str, float]) -> dict[str, float]:
        return {u: self.settings["ratio"] if u == self._better else 1.0 for u in BRANCHES}

    def state_dict(self) -> dict[str, Tensor | float | int]:
        return super().state_dict() | {"better": -1 if self._better is None else BRANCHES.index(self._better)}

    def load_state_dict(self, state: Mapping[str, Tensor | float | int]) -> None:
        super().load_state_dict(state)
        at = int(state["better"])
        self._better = None if at < 0 else BRANCHES[at]


class OPM(Balance):
    """Drops what the branch that is ahead hands to the fusion, for some patients of some windows.

    q^u = clip(q_0 (1 + lambda tanh(rho^u - 1)), 0, 1) if rho^u = exp(L^v - L^u) > 1, else 0, in a share ``p_exe`` of
    the windows. What survives is divided by 1 - (sum_u q^u d_u) / (sum_u d_u). Only one branch can be ahead, so a
    patient always keeps the other one and none is skipped. The losses of the branches are those of everything.
    """

    defaults: ClassVar[Mapping[str, Any]] = BALANCE_SETTINGS["opm"]

    def drop_rates(self) -> dict[str, float]:
        """q^u of the window that runs."""
        if not self.average or self.uniform("execute") >= self.settings["p_exe"]:
            return dict.fromkeys(BRANCHES, 0.0)
        q0, strength = self.settings["q_0"], self.settings["lambda"]
        return {
            u: min(max(q0 * (1 + strength * math.tanh(rho - 1)), 0.0), 1.0) if rho > 1 else 0.0
            for u, rho in self.rho().items()
        }

    def forward_rule(self, batch: Batch, encoded: Encoded) -> dict[str, Any]:
        q = self.drop_rates()
        if not any(q.values()):
            return self.joint(encoded)
        width = self.module.branch_widths
        kept = 1 - sum(q[u] * width[u] for u in BRANCHES) / sum(width.values())
        z = dict(encoded.z)
        for u in BRANCHES:
            dropped = self.uniform("drop", u, batch.patient_id) < q[u]
            z[u] = torch.zeros_like(z[u]) if dropped else z[u] / kept
        return self.module.output(encoded, z) | {"branches": self.watch(encoded)}

    def end_window(self, values: Mapping[str, float]) -> None:
        if self.active:
            for u, q in self.drop_rates().items():
                self.record(f"drop_{u}", q)
        super().end_window(values)


#: Rules of this module by key.
RATE_RULES: dict[str, type[Balance]] = {"ogm_cox": OGM, "agm": AGM, "pdmp": PDMP, "opm": OPM}
