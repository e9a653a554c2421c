"""MoME: mixture of multimodal experts.

Xiong et al., "MoME: Mixture of Multimodal Experts for Cancer Survival Prediction", MICCAI 2024, LNCS 15004,
318-328, doi 10.1007/978-3-031-72083-3_30. Patches P and gene groups G are encoded in turn by four MoME layers
(two rounds, pathology first); in each a gate looks at both modalities and hands the patient to one of four
experts. Written from the paper's formulas, with options where the public code departs from them: the published
router gets no gradient (``router: frozen`` here), its tokens are never trained nor saved
(``tokens: frozen_random`` saves them), and its attention is not masked (``attention: nystrom_compat``).
The skip connections of ``residual`` are not in the paper: they are our reading of "MoME with residual connections".
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from morphome.errors import MorphomeError
from morphome.models.batch import Batch, require
from morphome.models.fusion import Encoded, FusionModel
from morphome.models.layers import ADMIN_OMEGA, FC, SNN, GroupEncoder, RMSNorm, TransLayer
from morphome.models.nystrom import clear_pinv_errors, note_pinv_error

EXPERTS = ("TransFusion", "BottleneckTransFusion", "AddFusion", "DropX2Fusion")
ROUTERS = ("straight_through", "frozen", "switch", "soft", "random", *(f"fixed:{name}" for name in EXPERTS))
LAYERS = ("path1", "gene1", "path2", "gene2")
RESIDUALS = ("none", "moe_skip", "proj_skip", "both")


class TransFusion(nn.Module):
    """Expert 0: one TransLayer over [x; ref], of which the rows of x are kept."""

    def __init__(self, dim: int, attention: dict, dropout: float) -> None:
        super().__init__()
        self.layer = TransLayer(dim, "rms", ADMIN_OMEGA, attention, dropout)

    def forward(self, x: Tensor, ref: Tensor) -> Tensor:
        """x (n, D), ref (t, D) -> (n, D), as all experts."""
        return self.layer(torch.cat([x, ref]), keep=(0, x.shape[0]))


class BottleneckTransFusion(nn.Module):
    """Expert 1: a few bottleneck tokens read ref; x then reads them.

    The published module also owns a norm of D values that it never uses. It is kept, not trainable, so that
    parameter counts and published checkpoints agree.
    """

    def __init__(self, dim: int, attention: dict, dropout: float, bottlenecks: int, tokens: str) -> None:
        super().__init__()
        self.read = TransLayer(dim, "layer", ADMIN_OMEGA, attention, dropout)
        self.write = TransLayer(dim, "layer", ADMIN_OMEGA, attention, dropout)
        self.unused_norm = RMSNorm(dim).requires_grad_(False)
        add_tokens(self, "bottlenecks", bottlenecks, dim, tokens)

    def forward(self, x: Tensor, ref: Tensor) -> Tensor:
        read = self.read(torch.cat([self.bottlenecks, ref]), keep=(0, self.bottlenecks.shape[0]))
        return self.write(torch.cat([x, read]), keep=(0, x.shape[0]))


class AddFusion(nn.Module):
    """Expert 2: SNN(RMS x) + mean over tokens of SNN(RMS ref), broadcast over the rows of x."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm_x, self.norm_ref = RMSNorm(dim), RMSNorm(dim)
        self.snn_x, self.snn_ref = SNN(dim, dim, dropout), SNN(dim, dim, dropout)

    def forward(self, x: Tensor, ref: Tensor) -> Tensor:
        return self.snn_x(self.norm_x(x)) + self.snn_ref(self.norm_ref(ref)).mean(0)


class DropX2Fusion(nn.Module):
    """Expert 3: x itself; the other modality is dropped."""

    def forward(self, x: Tensor, ref: Tensor) -> Tensor:
        return x


class Gate(nn.Module):
    """pi = softmax((Wc u + bc) / tau), u = mean GELU(RMS(W1 x)) + mean GELU(RMS(W2 ref)); order-invariant."""

    def __init__(self, dim: int, temperature: float) -> None:
        super().__init__()
        self.linear_x, self.linear_ref = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_x, self.norm_ref = RMSNorm(dim), RMSNorm(dim)
        self.classifier = nn.Linear(dim, len(EXPERTS))
        self.temperature = temperature

    def forward(self, x: Tensor, ref: Tensor) -> Tensor:
        """x (n, D), ref (t, D) -> pi (4,)."""
        u = F.gelu(self.norm_x(self.linear_x(x))).mean(0) + F.gelu(self.norm_ref(self.linear_ref(ref))).mean(0)
        with torch.autocast(u.device.type, enabled=False):
            # A choice hangs on it: at least float32, whatever the precision of training.
            u = u.to(torch.promote_types(u.dtype, self.classifier.weight.dtype))
            return torch.softmax(self.classifier(u) / self.temperature, -1)


class _StraightThrough(torch.autograd.Function):
    """y as it is; its gradient G goes on to y, and <G, E_e> to pi_e."""

    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, pi: Tensor, *outputs: Tensor) -> Tensor:
        ctx.save_for_backward(pi, *outputs)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        pi, *outputs = ctx.saved_tensors
        # At least float32: products of bfloat16 vectors are slow on a CPU, and long sums of them are rough.
        dtype = torch.promote_types(g.dtype, torch.float32)
        flat = g.reshape(-1).to(dtype)
        found = torch.stack([torch.dot(flat, output.reshape(-1).to(dtype)) for output in outputs])
        return g, found.to(pi), *(None for _ in outputs)


class MoMELayer(nn.Module):
    """One gate and its experts. See :class:`MoME` for the routers and for ``skip`` and ``learned_scale``."""

    def __init__(
        self,
        name: str,
        dim: int,
        attention: dict,
        *,
        router: str,
        router_seed: int,
        temperature: float,
        bottlenecks: int,
        tokens: str,
        track_share: bool,
        dropout: float,
        attention_dropout: float,
        skip: bool = False,
        learned_scale: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.router, self.skip = name, router, skip
        self.fixed = EXPERTS.index(router.removeprefix("fixed:")) if router.startswith("fixed:") else None
        make = {
            "TransFusion": lambda: TransFusion(dim, attention, attention_dropout),
            "BottleneckTransFusion": lambda: BottleneckTransFusion(
                dim, attention, attention_dropout, bottlenecks, tokens
            ),
            "AddFusion": lambda: AddFusion(dim, dropout),
            "DropX2Fusion": DropX2Fusion,
        }
        # An expert or gate that can never be used is not built, so that parameter counts are honest.
        used = EXPERTS if self.fixed is None else (EXPERTS[self.fixed],)
        self.experts = nn.ModuleDict({expert: make[expert]() for expert in used})
        self.gate = Gate(dim, temperature) if self.fixed is None and router != "random" else None
        if router == "frozen":
            self.gate.requires_grad_(False)
        if router == "random":
            # A saved buffer: whoever loads the weights draws the same experts.
            self.register_buffer("router_seed", torch.tensor(router_seed, dtype=torch.int64))
        if track_share:
            self.register_buffer("share", torch.full((len(EXPERTS),), 1 / len(EXPERTS)))
        self.scale = nn.Parameter(torch.zeros(())) if learned_scale else None

    def forward(self, x: Tensor, ref: Tensor, patient_id: str = "") -> tuple[Tensor, int, Tensor]:
        """x (n, D), ref (t, D) -> y (n, D), index of the chosen expert, pi (4,).

        pi is the gate's output; the uniform distribution for ``random``, one-hot for ``fixed``. Only the chosen
        expert is evaluated, except with ``soft``, and with ``straight_through`` in training.
        """
        pi, chosen = self.route(x, ref, patient_id)
        y = self._mix(x, ref, pi, chosen)
        if self.skip:
            y = x + (y if self.scale is None else self.scale * y)
        return y, chosen, pi

    def _mix(self, x: Tensor, ref: Tensor, pi: Tensor, chosen: int) -> Tensor:
        """What the router makes of the experts, (n, D)."""
        if self.router == "soft":
            return sum(p * self._expert(e, x, ref) for e, p in enumerate(pi))
        y = self._expert(chosen, x, ref)
        if self.router == "switch":
            y = pi[chosen] * y
        elif self.router == "straight_through" and self.training and torch.is_grad_enabled():
            # y = sum_e g_e E_e with g = onehot - sg(pi) + pi: in value E_chosen; d y / d pi_e = E_e; and the
            # gradient into every other expert is exactly zero, so the others need values but no graph.
            with torch.no_grad():
                outputs = [y if e == chosen else self._expert(e, x, ref) for e in range(len(EXPERTS))]
            y = _StraightThrough.apply(y, pi, *outputs)
        return y

    def route(self, x: Tensor, ref: Tensor, patient_id: str = "") -> tuple[Tensor, int]:
        """pi (4,) and the index of the expert of largest pi (``random``: drawn once per layer and patient)."""
        if self.fixed is not None:
            return F.one_hot(torch.tensor(self.fixed), len(EXPERTS)).to(x), self.fixed
        if self.router == "random":
            text = f"{int(self.router_seed)}|{self.name}|{patient_id}"
            drawn = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % len(EXPERTS)
            return x.new_full((len(EXPERTS),), 1 / len(EXPERTS)), drawn
        pi = self.gate(x, ref)
        return pi, int(pi.argmax())

    def balance(self, chosen: int, pi: Tensor) -> Tensor:
        """4 sum_e f_e pi_e, f a moving average (0.9) of the routing share; 1 when both are uniform.

        Updates f, so call it once per training step of a patient.
        """
        share = pi.detach() if self.router == "soft" else F.one_hot(torch.tensor(chosen), len(EXPERTS)).to(pi)
        self.share.mul_(0.9).add_(0.1 * share)
        return len(EXPERTS) * (self.share.clone() @ pi)

    def _expert(self, index: int, x: Tensor, ref: Tensor) -> Tensor:
        if self.skip and EXPERTS[index] == "DropX2Fusion":
            # The skip connection is this expert already; it would return 2 x.
            return torch.zeros_like(x)
        return self.experts[EXPERTS[index]](x, ref)


class MoMEBody(nn.Module):
    """Slides and gene groups through four MoME layers and one attention layer with a class token.

    ``P0 = FC(X)``, ``G0 = stack_g SNN(SNN(x_g))``; P1 = M(P0, G0), G1 = M(G0, P1), P2 = M(P1, G1),
    G2 = M(G1, P2); logits = Lin(TransLayer([CLS; P2; G2])[0]). This class holds the parts,
    which :class:`MoME` puts together.

    Args:
        d_in: width of the patch features.
        group_sizes: columns per gene group, in the order of ``Batch.groups``.
        n_bins: K.
        dim: width D.
        heads: attention heads; divides ``dim``.
        landmarks: of the Nyström attention.
        bottlenecks: tokens of expert 1.
        router: pi = gate(x, ref), e* = argmax pi.
            ``straight_through``: y = sum_e g_e E_e, g = onehot(e*) - sg(pi) + pi: the gate learns, y = E_e*.
            ``frozen``: y = E_e*, the gate stays at its random start (as the public code behaves).
            ``switch``: y = pi_e* E_e*. ``soft``: y = sum_e pi_e E_e.
            ``random``: e* from a hash of ``router_seed``, layer and patient. ``fixed:<expert>``: one for all.
        tokens: class and bottleneck tokens start uniform in [0, 1); ``parameter`` trains them,
            ``frozen_random`` keeps them as a saved buffer.
        attention: see :mod:`morphome.models.nystrom`.
        value_conv: convolution of the values over the token order.
        temperature: tau of the gate.
        residual: ``moe_skip``: y = x + s M(x, ref), to which the expert that returns x contributes 0.
            ``proj_skip``: P0 = FC(X) + Ws X without bias, and per gene group G = SNN2(a) + a, a = SNN1(x).
            ``both``, or ``none`` (as published).
        residual_scale: s; 1, or ``learned``: one scalar per layer that starts at 0, so that y = x at the start.
        balance_loss: weight of the sum over layers of :meth:`MoMELayer.balance`; 0 leaves it out.
        dropout: of the FC and SNN blocks.
        attention_dropout: of the output of attention.
        router_seed: of ``random``.
        missing_tokens: build learned tokens that stand in for G0 of a patient without genes.

    Raises:
        MorphomeError: a setting that is not known, a balance loss for a router that does not learn, or a learned
            scale of skip connections that are not there.
    """

    needs = frozenset({"path", "omic_groups"})
    supports = frozenset({"missing_omic"})
    head = "hazard"
    order_sensitive = True
    experts = EXPERTS

    def __init__(
        self,
        d_in: int,
        group_sizes: Mapping[str, int],
        n_bins: int,
        *,
        dim: int = 512,
        heads: int = 8,
        landmarks: int = 256,
        bottlenecks: int = 2,
        router: str = "straight_through",
        tokens: str = "parameter",
        attention: str = "auto",
        value_conv: bool = True,
        temperature: float = 1.0,
        residual: str = "none",
        residual_scale: int | str = 1,
        balance_loss: float = 0.0,
        dropout: float = 0.25,
        attention_dropout: float = 0.1,
        router_seed: int = 0,
        missing_tokens: bool = False,
    ) -> None:
        super().__init__()
        if router not in ROUTERS:
            raise MorphomeError(f"models.mome.router: {router!r} is not known", f"one of {', '.join(ROUTERS)}")
        if balance_loss and router not in ("straight_through", "switch", "soft"):
            raise MorphomeError(
                f"models.mome.balance_loss: {balance_loss} with router {router}, whose gate does not learn",
                "set balance_loss: 0, or router: straight_through, switch or soft",
            )
        if residual not in RESIDUALS or residual_scale not in (1, "learned"):
            raise MorphomeError(
                f"models.mome: residual {residual!r} with residual_scale {residual_scale!r} is not known",
                f"residual: one of {', '.join(RESIDUALS)}; residual_scale: 1 or learned",
            )
        moe_skip, proj_skip = residual in ("moe_skip", "both"), residual in ("proj_skip", "both")
        if residual_scale == "learned" and (not moe_skip or router == "fixed:DropX2Fusion"):
            raise MorphomeError(
                f"models.mome.residual_scale: learned with residual {residual} and router {router}, "
                "which leave nothing to scale",
                "set residual_scale: 1, or residual: moe_skip or both with another router",
            )
        options = {"heads": heads, "landmarks": landmarks, "mode": attention, "value_conv": value_conv}
        self.d_in, self.dim, self.balance_loss = d_in, dim, balance_loss
        self.required = self.needs - {"omic_groups"} if missing_tokens else self.needs
        self.order_sensitive = value_conv or attention != "exact"
        self.project = FC(d_in, dim, dropout)
        self.skip = nn.Linear(d_in, dim, bias=False) if proj_skip else None
        self.groups = GroupEncoder(list(group_sizes.values()), dim, dropout, skip=proj_skip)
        self.layers = nn.ModuleDict(
            {
                name: MoMELayer(
                    name,
                    dim,
                    options,
                    router=router,
                    router_seed=router_seed,
                    temperature=temperature,
                    bottlenecks=bottlenecks,
                    tokens=tokens,
                    track_share=balance_loss > 0,
                    dropout=dropout,
                    attention_dropout=attention_dropout,
                    skip=moe_skip,
                    learned_scale=residual_scale == "learned",
                )
                for name in LAYERS
            }
        )
        add_tokens(self, "cls", 1, dim, tokens)
        self.fusion = TransLayer(dim, "layer", ADMIN_OMEGA, options, attention_dropout)
        self.classifier = nn.Linear(dim, n_bins)
        if missing_tokens:
            self.groups.add_missing()

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """P0 (N, D) and G0 (T, D) of one patient.

        Raises:
            MorphomeError: the patient has no patch features or gene groups, or of other shapes.
        """
        require(batch, self.required, self.d_in)
        return self._project(batch.path), self.groups(batch.groups)

    def _project(self, path: Tensor) -> Tensor:
        return self.project(path) if self.skip is None else self.project(path) + self.skip(path)

    def exchange(self, path: Tensor, genes: Tensor, patient_id: str = "") -> tuple[Tensor, Tensor, dict, list[Tensor]]:
        """The four MoME layers: P2 (N, D), G2 (T, D), routing per layer, balance terms of the layers."""
        routing, balance = {}, []
        for name, layer in self.layers.items():
            x, ref = (path, genes) if name.startswith("path") else (genes, path)
            y, chosen, pi = layer(x, ref, patient_id)
            path, genes = (y, genes) if name.startswith("path") else (path, y)
            routing[name] = {"expert": chosen, "pi": pi.detach()}
            if self.balance_loss and self.training:
                balance.append(layer.balance(chosen, pi))
        return path, genes, routing, balance

    def read(self, path: Tensor, genes: Tensor) -> Tensor:
        """P2 (N, D), G2 (T, D) -> the class token that has read both, (1, D)."""
        return self.fusion(torch.cat([self.cls, path, genes]), keep=(0, 1))


class MoME(MoMEBody, FusionModel):
    """The published model; formulas and settings are those of :class:`MoMEBody`."""

    def forward(self, batch: Batch) -> dict:
        """One patient -> the output of :meth:`encode` and :meth:`fuse`.

        ``aux["pinv_error"]`` in evaluation where Nyström attention was used: see :mod:`morphome.models.nystrom`.
        """
        clear_pinv_errors(self)
        return note_pinv_error(self, super().forward(batch))

    def encode(self, batch: Batch) -> Encoded:
        """One patient -> ``z`` P2 (N, D) and G2 (T, D), ``aux["routing"][layer] = {"expert": int, "pi": (4,)}``.

        ``extra_losses`` holds ``balance`` in training when its weight is not 0.

        Raises:
            MorphomeError: the patient has no patch features or gene groups, or of other shapes.
        """
        path, genes, routing, balance = self.exchange(*self.embed(batch), batch.patient_id)
        return Encoded(
            {"path": path, "omic": genes},
            extra_losses={"balance": self.balance_loss * sum(balance)} if balance else {},
            aux={"routing": routing},
        )

    def fuse(self, z: Mapping[str, Tensor]) -> Tensor:
        """P2 (N, D), G2 (T, D) -> logits (1, K)."""
        return self.classifier(self.read(z["path"], z["omic"]))

    def branch_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Encoder and expert layers of a modality. The layers interleave: each sees the other modality too."""
        path = [self.project, *([] if self.skip is None else [self.skip]), self.layers["path1"], self.layers["path2"]]
        omic = [self.groups, self.layers["gene1"], self.layers["gene2"]]
        parts = {"path": path, "omic": omic}
        return {u: [p for part in parts[u] for p in part.parameters() if p.requires_grad] for u in parts}

    @property
    def branch_widths(self) -> dict[str, int]:
        """Patches and gene groups are tokens of one width."""
        return {"path": self.dim, "omic": self.dim}


def add_tokens(module: nn.Module, name: str, count: int, dim: int, tokens: str) -> None:
    """``count`` tokens (count, dim), uniform in [0, 1), as a parameter or as a saved buffer."""
    if tokens not in ("parameter", "frozen_random"):
        raise MorphomeError(f"models.mome.tokens: {tokens!r} is not known", "parameter or frozen_random")
    values = torch.rand(count, dim)
    if tokens == "parameter":
        setattr(module, name, nn.Parameter(values))
    else:
        module.register_buffer(name, values)
