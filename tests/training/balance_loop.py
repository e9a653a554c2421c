"""A plain training loop for the balance plug-ins, and small fused models that obey the contract."""

from __future__ import annotations

import copy
import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from morphome.models import hazard
from morphome.models.batch import Batch
from morphome.models.fusion import BRANCHES, OUTPUT, Encoded, FusionModel
from morphome.models.layers import Dropout
from morphome.training.balance import BranchHeads, make_balance

K = 3


class Tokens(FusionModel):
    """Two tokens of genes, patches as tokens, a shared layer behind both encoders, a token of no branch, dropout."""

    head = "hazard"
    extra = 0.0

    def __init__(self):
        super().__init__()
        self.path = nn.Linear(6, 4)
        self.omic = nn.Linear(5, 6)
        self.shared = nn.Parameter(torch.full((2,), 0.9))
        self.register = nn.Linear(4, 4)
        self.hidden = nn.Linear(11, 8)
        self.out = nn.Linear(8, K if self.head == "hazard" else 1)
        self.dropout = Dropout(0.25)

    @property
    def branch_widths(self):
        return {"path": 4, "omic": 3}

    def branch_parameters(self):
        return {u: list(getattr(self, u).parameters()) for u in BRANCHES}

    def encode(self, batch):
        path = self.dropout(torch.tanh(self.path(batch.path))) * self.shared[0]
        omic = self.dropout(torch.tanh(self.omic(batch.omic_all))).view(2, 3) * self.shared[1]
        # Belongs to no branch, but the slides' encoder lies before it.
        z = {"path": path, "omic": omic, "register": self.register(path.mean(0, keepdim=True))}
        extra = {"l2": self.extra * self.path.weight.square().sum()} if self.extra else {}
        return Encoded(z, extra)

    def fuse(self, z):
        joined = torch.cat([z["path"].mean(0), z["omic"].mean(0), z["register"][0]])
        return self.out(self.dropout(F.relu(self.hidden(joined)))).unsqueeze(0)


class CoxTokens(Tokens):
    head = "cox"


class Woven(Tokens):
    """The slides' tokens are made with a look at the genes, as in co-attention."""

    def encode(self, batch):
        encoded = super().encode(batch)
        encoded.z["path"] = encoded.z["path"] * (1 + encoded.z["omic"].mean())
        return encoded


class Split(FusionModel):
    """A Cox model whose head is linear in the concatenation, so that its score splits exactly."""

    head = "cox"

    def __init__(self):
        super().__init__()
        self.path = nn.Linear(6, 4)
        self.omic = nn.Linear(5, 3)
        self.out = nn.Linear(7, 1)

    branch_widths = Tokens.branch_widths
    branch_parameters = Tokens.branch_parameters

    def encode(self, batch):
        path = torch.tanh(self.path(batch.path).mean(0, keepdim=True))
        return Encoded({"path": path, "omic": torch.tanh(self.omic(batch.omic_all)).unsqueeze(0)})

    def fuse(self, z):
        return self.out(torch.cat([z["path"], z["omic"]], dim=1))

    def branch_scores(self, z):
        return {"path": z["path"] @ self.out.weight[:, :4].T, "omic": z["omic"] @ self.out.weight[:, 4:].T}


class SplitHazard(Split):
    head = "hazard"

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(7, K)


@cache
def patients(n=8):
    """n patients whose risk is written in the slides strongly, in the genes weakly; about a third is censored."""
    g = torch.Generator().manual_seed(3)
    made = []
    for i in range(n):
        risk, genes = torch.randn((), generator=g), torch.randn(5, generator=g)
        time = float(torch.exp(1.0 - risk - 0.3 * genes[0]) + 0.05 * i)
        path = torch.randn((3 + i % 4, 6), generator=g) + risk
        event = int(torch.rand((), generator=g) < 0.65)
        bins = int(time > 2.0) + int(time > 5.0)
        made.append((Batch(path=path, omic_all=genes, bin=bins, event=event, patient_id=f"P{i}"), time))
    return made


def model(kind, seed=0):
    """A model with weights of its own seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind()


OPTIMISERS = {
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, weight_decay=1e-3),
    "plain_adam": lambda groups: torch.optim.Adam(groups, lr=0.01, eps=1e-12),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.5),
}


class Loop:
    """What the trainer does, as plainly as possible. ``settings`` None: no plug-in at all."""

    def __init__(self, kind, settings, optimiser="adam", accumulation=4, seed=7):
        self.module = model(kind)
        self.cox = kind.head == "cox"
        self.window, self.seed = accumulation, seed
        self.balance = self.heads = None
        if settings is None:
            self.optimiser = OPTIMISERS[optimiser]([{"params": list(self.module.parameters())}])
            return
        self.heads = BranchHeads(self.module, 1 if self.cox else K, seed=1)
        self.balance = make_balance(self.module, self.heads, settings, seed=5)
        branches = self.module.branch_parameters()
        exclusive = {id(p) for ps in branches.values() for p in ps}
        rest = [p for p in self.module.parameters() if id(p) not in exclusive]
        groups = [{"params": branches[u], "branch": u} for u in BRANCHES]
        groups += [{"params": list(part)} for part in (rest, self.heads.parameters())]
        groups = [{"branch": None, **group} for group in groups if group["params"]]
        self.optimiser = OPTIMISERS[optimiser](groups)

    def run(self, epochs, first=1, inner_c=None):
        """Train; the log of the last epoch."""
        with torch.random.fork_rng(devices=[]):
            for epoch in range(first, first + epochs):
                torch.manual_seed(1000 * self.seed + epoch)
                if self.balance:
                    self.balance.start_epoch(epoch)
                order = torch.randperm(len(patients()), generator=torch.Generator().manual_seed(epoch)).tolist()
                for start in range(0, len(order), self.window):
                    self.step([patients()[i] for i in order[start : start + self.window]])
                if self.balance and inner_c:
                    self.balance.end_epoch(inner_c)
        return self.balance.log() if self.balance else {}

    def step(self, members):
        self.gradients(members)
        rates = self.balance.multipliers() if self.balance else {}
        base = [group["lr"] for group in self.optimiser.param_groups]
        for group in self.optimiser.param_groups:
            group["lr"] *= rates.get(group.get("branch"), 1.0)
        self.optimiser.step()
        for group, lr in zip(self.optimiser.param_groups, base, strict=True):
            group["lr"] = lr

    def forward(self, batch):
        return self.balance.forward(batch) if self.balance else self.module(batch)

    def gradients(self, members, finish=True):
        """Everything of a window up to the step."""
        self.module.train()
        self.optimiser.zero_grad(set_to_none=True)
        n = len(members)
        time = torch.tensor([t for _, t in members])
        event = torch.tensor([b.event for b, _ in members])
        states, slopes, values = [], {}, {}
        if self.cox or (self.balance and self.balance.pairwise):
            scores = {"main": [], **{u: [] for u in BRANCHES}}
            with torch.no_grad():
                for batch, _ in members:
                    states.append(torch.get_rng_state())
                    output = self.forward(batch)
                    scores["main"].append(output[OUTPUT[self.module.head]])
                    for u in BRANCHES if self.balance else ():
                        scores[u].append(output["branches"][u])
            rows = {key: torch.cat(s) for key, s in scores.items() if s}
            if self.cox:
                for key, s in rows.items():
                    h = s.reshape(-1).requires_grad_()
                    loss = hazard.cox_loss(h, time, event, "breslow") if n > 1 and event.any() else h.sum() * 0
                    (slopes[key],) = torch.autograd.grad(loss, h)
                    values[key] = loss.item() if event.sum() > 1 else math.nan
            if self.balance and self.balance.pairwise:
                self.balance.start_window({u: rows[u].detach() for u in BRANCHES}, time, event)
        for i, (batch, _) in enumerate(members):
            if states:
                torch.set_rng_state(states[i])
            output = self.forward(batch)
            seen = {"main": output[OUTPUT[self.module.head]], **output.get("branches", {})}
            if self.cox:
                terms = {key: slopes[key][i] * s.sum() for key, s in seen.items()}
            else:
                at = torch.tensor([batch.bin]), torch.tensor([batch.event])
                terms = {key: hazard.nll_loss(s, *at) / n for key, s in seen.items()}
                for key, term in terms.items():
                    values[key] = values.get(key, 0.0) + term.item()
            terms["main"] = terms["main"] + sum(output["extra_losses"].values()) / n
            if self.balance:
                self.balance.backward(terms)
            else:
                terms["main"].backward()
        if self.balance and finish:
            self.balance.end_window(values)
        return values

    def weights(self):
        return {key: value.clone() for key, value in self.module.state_dict().items()}

    def state(self):
        return copy.deepcopy(
            [self.module.state_dict(), self.heads.state_dict(), self.optimiser.state_dict(), self.balance.state_dict()]
        )

    def load(self, state):
        for part, content in zip((self.module, self.heads, self.optimiser, self.balance), state, strict=True):
            part.load_state_dict(content)


@cache
def plain_weights(kind, optimiser="adam", accumulation=4, epochs=2):
    """The weights that training without plug-ins ends in."""
    trained = Loop(kind, None, optimiser, accumulation)
    trained.run(epochs)
    return trained.weights()


def gradient(parameters):
    """All gradients in one vector."""
    return torch.cat([p.grad.reshape(-1) for p in parameters])


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def near(a, b, **tolerance):
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], **tolerance) for key in a)
