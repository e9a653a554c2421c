"""Building blocks that several models share.

Dropout draws its masks from torch's default generator of the device, 16 random bits per element: several times
faster on a CPU than ``torch.dropout``, whose masks cost as much there as the matrix products around them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from morphome.errors import MorphomeError
from morphome.models.nystrom import NystromAttention

#: Admin residual weight of MoME's eight-layer setting: sqrt((n + 1) / ln(n + 1) - 1), n = 8 (Liu et al. 2020).
ADMIN_OMEGA = math.sqrt(9 / math.log(9) - 1)
#: Standard deviation of learned tokens that stand for missing genes, at the start.
MISSING_SD = 0.02
# Value that saturated SELU units tend to: -scale * alpha (Klambauer et al. 2017).
_ALPHA = -1.7580993408473766
_LEVELS = 1 << 16


def keep_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Random 0/1 mask with the shape, dtype and device of ``x``, and the exact probability of a 1.

    ``p`` is rounded to a multiple of 2^-16 (0.25 is exact); callers scale by the returned probability, so
    expectations are exact.
    """
    dropped = min(max(round(p * _LEVELS), 1), _LEVELS - 1)
    count = x.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    bits = words.view(torch.int16)[:count].view(x.shape)
    return (bits >= dropped - _LEVELS // 2).to(x.dtype), 1 - dropped / _LEVELS


class Dropout(nn.Module):
    """Inverted dropout of probability ``p``; identity in evaluation and for p = 0."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = _probability(p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        mask, kept = keep_mask(x, self.p)
        return x * mask.mul_(1 / kept)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class AlphaDropout(Dropout):
    """Dropout that keeps mean 0 and variance 1 of SELU-like units (Klambauer et al. 2017, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        mask, kept = keep_mask(x, self.p)
        a = (kept + _ALPHA**2 * kept * (1 - kept)) ** -0.5
        b = -a * _ALPHA * (1 - kept)
        # a (x m + alpha (1 - m)) + b with few passes over memory
        shift = mask.mul(-a * _ALPHA).add_(a * _ALPHA + b)
        return torch.addcmul(shift, x, mask.mul_(a))


def _probability(p: float) -> float:
    if not 0 <= p < 1:
        raise MorphomeError(f"dropout {p} is not in [0, 1)", "choose a value from 0 to below 1")
    return float(p)


class RMSNorm(nn.Module):
    """x (mean x^2 + 1e-6)^(-1/2) * gamma over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # At least float32 inside an autocast region, like the layer norm of torch.
        return _RMS.apply(x.to(torch.promote_types(x.dtype, self.weight.dtype)), self.weight, self.eps)


class _RMS(torch.autograd.Function):
    """The norm with the gradient written out: a third of the time of autograd's, and one saved tensor fewer."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scale, weight = ctx.saved_tensors
        product = g * x
        d_weight = (product * scale).reshape(-1, x.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        # d scale / d x = -x scale^3 / D
        along = (product @ weight).unsqueeze(-1) * scale.pow(3) / -x.shape[-1]
        return (g * weight).mul_(scale).addcmul_(x, along), d_weight, None


class FC(nn.Module):
    """FC(a -> b) = Dropout(ReLU(Lin)); (..., a) -> (..., b)."""

    def __init__(self, d_in: int, d_out: int, dropout: float = 0.25) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(F.relu(self.linear(x)))


class SNN(nn.Module):
    """SNN(a -> b) = AlphaDropout(ELU(Lin)); (..., a) -> (..., b) (Klambauer et al. 2017)."""

    def __init__(self, d_in: int, d_out: int, dropout: float = 0.25) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out)
        self.dropout = AlphaDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(F.elu(self.linear(x)))


def stand_in(*shape: int) -> nn.Parameter:
    """Learned stand-in for what the encoder of the genes gives, N(0, :data:`MISSING_SD`^2) at the start.

    Drawn apart, so that no two groups start alike; build it last, so that the other weights stay as without it.
    """
    return nn.Parameter(torch.randn(*shape) * MISSING_SD)


class GroupEncoder(nn.Module):
    """Two SNN layers per gene group, G = stack_g SNN(dim -> dim)(SNN(|G_g| -> dim)(x_g)).

    Every group has its own weights; activation and dropout run once on the stack. After :meth:`add_missing` learned
    tokens stand in for a patient without genes.

    Args:
        sizes: number of columns of each group.
        skip: add what the first layer gives to what the second makes of it.
    """

    def __init__(self, sizes: list[int], dim: int, dropout: float = 0.25, skip: bool = False) -> None:
        super().__init__()
        self.skip = skip
        self.first = nn.ModuleList(nn.Linear(size, dim) for size in sizes)
        self.second = nn.ModuleList(nn.Linear(dim, dim) for _ in sizes)
        self.dropout = AlphaDropout(dropout)
        self.dim = dim
        self.register_parameter("missing", None)

    def add_missing(self) -> None:
        """Own the tokens of :func:`stand_in`, (T, dim)."""
        self.missing = stand_in(len(self.first), self.dim)

    def forward(self, groups: tuple[Tensor, ...] | None) -> Tensor:
        """T vectors (|G_g|,), or None for a patient without genes -> (T, dim).

        Raises:
            MorphomeError: another number of groups than the model was built for; None without tokens for it.
        """
        if groups is None and self.missing is not None:
            return self.missing
        groups = groups or ()
        if len(groups) != len(self.first):
            raise MorphomeError(
                f"{len(groups)} gene groups given, the model was built for {len(self.first)}",
                "train and predict with the same gene groups",
            )
        first = torch.stack([layer(x) for layer, x in zip(self.first, groups, strict=True)])
        first = self.dropout(F.elu(first))
        second = torch.stack([layer(x) for layer, x in zip(self.second, first.unbind(0), strict=True)])
        second = self.dropout(F.elu(second))
        return second + first if self.skip else second


class GatedAttention(nn.Module):
    """GA(d, D, C): gated attention pooling (Ilse, Tomczak, Welling, ICML 2018, eq. 9).

    a = tanh(Lin h), b = sigmoid(Lin h), score = Lin(a * b); weights = softmax over the patches.
    """

    def __init__(self, dim: int, hidden: int, n_scores: int = 1, dropout: float = 0.25) -> None:
        super().__init__()
        self.tanh = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden)
        self.score = nn.Linear(hidden, n_scores)
        self.dropout = Dropout(dropout)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h (N, d) -> pooled (C, d) and weights (N, C), each column of which sums to 1."""
        a = self.dropout(torch.tanh(self.tanh(h)))
        b = self.dropout(torch.sigmoid(self.gate(h)))
        weights = torch.softmax(self.score(a * b), 0)
        return weights.T @ h, weights


class TransLayer(nn.Module):
    """omega x + Nys(norm x): attention with a weighted residual and no feed-forward block.

    Args:
        dim: width D.
        norm: ``"rms"`` or ``"layer"``.
        omega: residual weight; 1 in TransMIL, :data:`ADMIN_OMEGA` in MoME.
        attention: keyword arguments of :class:`~morphome.models.nystrom.NystromAttention`.
        dropout: of the attention's output.
    """

    def __init__(self, dim: int, norm: str, omega: float, attention: dict, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = RMSNorm(dim) if norm == "rms" else nn.LayerNorm(dim)
        self.omega = omega
        self.attention = NystromAttention(dim, **attention)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, keep: tuple[int, int] | None = None) -> Tensor:
        """x (n, D) -> rows ``keep[0]`` ... ``keep[1] - 1`` of the output (all rows by default)."""
        start, stop = keep or (0, x.shape[0])
        out = self.attention(self.norm(x).unsqueeze(0), keep=(start, stop)).squeeze(0)
        return torch.add(self.dropout(out), x[start:stop], alpha=self.omega)
