"""Nyström attention (Xiong et al., AAAI 2021) without padding, as published, or exact.

Modes
    ``nystrom_masked``
        No padding at all. n <= m tokens: exact softmax attention. Else token t belongs to landmark
        floor(t m / n), so that every landmark is the mean of at least one real token, and the start of the
        pseudo-inverse is scaled per matrix, so that a patient's output does not depend on batch mates.
    ``nystrom_compat``
        The layer of the nystrom-attention package 0.0.12: zero tokens are put at the front up to a multiple of
        m and are not masked; the pseudo-inverse starts from maxima over all heads and items. Only to
        reproduce published runs: short sequences drown in padding.
    ``exact``
        Softmax attention for every n.
    ``auto``
        The faster of ``exact`` and ``nystrom_masked``: exact up to :data:`EXACT_PER_LANDMARK` tokens per
        landmark, and at any length where few rows of the output are asked for (a class token, a handful of genes).

All modes may add a depth-wise convolution of the values along the sequence (``value_conv``, 33 taps), which makes
the layer depend on the order of the tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morphome.errors import MorphomeError

MODES = ("auto", "nystrom_masked", "nystrom_compat", "exact")
#: Tokens per landmark up to which ``auto`` attends exactly. Measured forward and backward on one thread of a CPU, 8
#: heads: exact attention is the faster one up to 2250 tokens at width 512 with 256 landmarks (.90 of the time at
#: 2048), and up to 1200 at width 256 with 128 landmarks (.82 of the time at 1024).
EXACT_PER_LANDMARK = 8
# Directions along which a layer measures the error of its pseudo-inverse: below 1 % of its time, where the whole
# matrices would cost 4 %.
_PROBES = 16
# Up to this many rows a banded matrix product beats the depth-wise convolution on a CPU.
_BAND_ROWS = 96


class NystromAttention(nn.Module):
    """Multi-head self-attention; parameters 3 D^2 + D^2 + D (+ taps * H with the value convolution).

    Args:
        dim: width D, a multiple of ``heads``.
        heads: H.
        landmarks: m.
        mode: one of :data:`MODES`.
        value_conv: add the convolution of the values.
        taps: length of its kernel, odd.
        iterations: of the pseudo-inverse.

    After an evaluation forward that used the pseudo-inverse, ``pinv_error`` holds :func:`pinv_error`, estimated
    along 16 directions (a float, largest over heads); it is ``None`` otherwise. See :func:`note_pinv_error`.

    Raises:
        MorphomeError: unknown mode, ``heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        landmarks: int = 256,
        mode: str = "nystrom_masked",
        value_conv: bool = True,
        taps: int = 33,
        iterations: int = 6,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise MorphomeError(f"attention: {mode!r} is not known", f"choose one of {', '.join(MODES)}")
        if dim % heads:
            raise MorphomeError(f"heads: {heads} does not divide dim {dim}", "choose a divisor of dim")
        self.heads, self.landmarks, self.mode, self.iterations = heads, landmarks, mode, iterations
        # Apart, not one matrix: layers that need few output rows project few queries.
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.value_kernel = nn.Parameter(torch.empty(heads, taps)) if value_conv else None
        if self.value_kernel is not None:
            bound = 1 / math.sqrt(taps)
            nn.init.uniform_(self.value_kernel, -bound, bound)
        self.pinv_error: float | None = None

    def forward(self, x: Tensor, keep: tuple[int, int] | None = None, lengths: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (B, n, D), normed by the caller.
            keep: first and one-past-last row of the output to compute; all rows by default.
            lengths: valid tokens of each item, (B,); the tokens after them are padding, which neither attends
                nor is attended to: their outputs are zero. Not with ``keep``.

        Returns:
            (B, n, D), or (B, stop - start, D) with ``keep``.

        Raises:
            MorphomeError: ``lengths`` in mode ``nystrom_compat`` (which has no mask) or with ``keep``.
        """
        self.pinv_error = None
        if lengths is None:
            return self._attend(x, keep or (0, x.shape[1]))
        if self.mode == "nystrom_compat" or keep is not None:
            raise MorphomeError(
                "lengths are refused in mode nystrom_compat and together with keep",
                "use attention: nystrom_masked",
            )
        # Segments, normalisation and convolution of an item use its own length: items one by one are exact.
        rows = []
        for item, length in zip(x, lengths.tolist(), strict=True):
            valid = item.new_zeros(0, x.shape[2])
            if length:
                valid = self._attend(item[None, :length], (0, length))[0]
            rows.append(F.pad(valid, (0, 0, 0, x.shape[1] - length)))
        return torch.stack(rows)

    def _attend(self, x: Tensor, keep: tuple[int, int]) -> Tensor:
        batch, n, dim = x.shape
        few = 2 * (keep[1] - keep[0]) * (dim + self.heads * n) < n * dim
        exact = self._exact(n, few)
        if self.mode == "nystrom_compat":
            front = -n % self.landmarks
            x = F.pad(x, (0, 0, front, 0))
            keep = (keep[0] + front, keep[1] + front)
        start, stop = keep
        # Landmarks are means of tokens, which are projected after averaging: no other row's query is needed.
        q = self._split(self.query(x[:, start:stop]))
        # Few rows of many tokens: cheaper to carry the queries to the tokens than to project every token.
        if exact and few:
            out = self._few_rows(q, x, start, stop)
            return self.out(out.transpose(1, 2).reshape(batch, stop - start, dim).to(x.dtype))
        k, v = self._split(self.key(x)), self._split(self.value(x))
        out = F.scaled_dot_product_attention(q, k, v) if exact else self._nystrom(q, k, v, x)
        if self.value_kernel is not None:
            out = out + _value_conv(v, self.value_kernel, start, stop)
        return self.out(out.transpose(1, 2).reshape(batch, stop - start, dim).to(x.dtype))

    def _exact(self, n: int, few: bool) -> bool:
        """Exact attention to n tokens? ``few``: so few rows are wanted that its cost is linear in n."""
        if self.mode == "auto":
            return few or n <= EXACT_PER_LANDMARK * self.landmarks
        return self.mode == "exact" or (self.mode == "nystrom_masked" and n <= self.landmarks)

    def _split(self, x: Tensor) -> Tensor:
        """(B, n, D) -> (B, H, n, D / H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _few_rows(self, q: Tensor, x: Tensor, start: int, stop: int) -> Tensor:
        """Exact attention and convolution of the values with keys and values never formed.

        q k^T = (q Wk) x^T and (A + T) v = ((A + T) x) Wv^T, with T the convolution as a banded matrix.
        q (B, H, r, d), x (B, n, D) -> (B, H, r, d).
        """
        head_dim = q.shape[-1]
        carried = (q * head_dim**-0.5) @ self.key.weight.unflatten(0, (self.heads, head_dim))
        # x on the left: the small factor is the one to transpose, and to copy where types differ.
        scores = (x @ carried.flatten(1, 2).transpose(1, 2)).transpose(1, 2)
        weights = torch.softmax(scores.unflatten(1, (self.heads, stop - start)), -1)
        if self.value_kernel is not None:
            band, first, last = _band(self.value_kernel, start, stop, x.shape[1])
            weights = weights + F.pad(band, (first, x.shape[1] - last))
        pooled = (weights.flatten(1, 2) @ x.to(weights.dtype)).unflatten(1, (self.heads, stop - start))
        return pooled @ self.value.weight.unflatten(0, (self.heads, head_dim)).transpose(1, 2)

    def _nystrom(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Steps 2 to 5 of the layer without the convolution, at least in float32. (B, H, rows, D / H).

        q (B, H, rows, D / H) of the rows wanted, k and v (B, H, n, D / H) of all tokens x (B, n, D).
        """
        with torch.autocast(q.device.type, enabled=False):
            dtype = torch.promote_types(q.dtype, torch.float32)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
            means = _segment_means(x.to(dtype), self.landmarks)
            landmark_q, landmark_k = self._split(self.query(means)), self._split(self.key(means))
            middle = (landmark_q @ landmark_k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
            gathered = F.scaled_dot_product_attention(landmark_q, k, v)
            per_matrix = self.mode != "nystrom_compat"
            if self.training:
                carried = apply_pseudo_inverse(middle, gathered, self.iterations, per_matrix=per_matrix)
            else:
                inverse = pseudo_inverse(middle, self.iterations, per_matrix=per_matrix)
                self.pinv_error = pinv_error(middle, inverse, _PROBES)
                carried = inverse @ gathered
            # The two factors n x m are never formed: each is a softmax attention, to or from the landmarks.
            return F.scaled_dot_product_attention(q, landmark_k, carried)


def _segment_means(x: Tensor, m: int) -> Tensor:
    """(B, n, D) -> (B, m, D): mean of the tokens t with floor(t m / n) = landmark; n >= m."""
    n = x.shape[1]
    if n % m == 0:
        return x.unflatten(1, (m, n // m)).mean(2)
    segment = torch.arange(n, device=x.device) * m // n
    counts = torch.bincount(segment, minlength=m).to(x.dtype)
    sums = x.new_zeros(x.shape[0], m, x.shape[2]).index_add(1, segment, x)
    return sums / counts[:, None]


def pseudo_inverse(a: Tensor, iterations: int = 6, *, per_matrix: bool = True) -> Tensor:
    """Moore-Penrose inverse of (..., m, m) by the iteration of Razavi et al. 2014, as in the Nyströmformer.

    Z0 = A^T / (largest row sum * largest column sum), then Z <- Z (13 I - AZ (15 I - AZ (7 I - AZ))) / 4.

    Args:
        per_matrix: take the two maxima of each matrix; the published code takes them over all matrices.
    """
    z = _first_inverse(a, per_matrix)
    shape, m = a.shape, a.shape[-1]
    a, z = a.reshape(-1, m, m), z.reshape(-1, m, m)
    for _ in range(iterations):
        # The same polynomial with the identity folded into fused multiply-adds.
        az = a @ z
        inner = torch.baddbmm(az, az, az, beta=7, alpha=-1)
        inner = torch.baddbmm(az, az, inner, beta=15, alpha=-1)
        z = torch.baddbmm(z, z, inner, beta=3.25, alpha=-0.25)
    return z.reshape(shape)


def apply_pseudo_inverse(a: Tensor, g: Tensor, iterations: int = 6, *, per_matrix: bool = True) -> Tensor:
    """``pseudo_inverse(a) @ g`` for narrow g (..., m, d), with fewer products of whole matrices.

    With X_k = A Z_k and p(X) = (13 I - X (15 I - X (7 I - X))) / 4 the iteration says Z_{k+1} = Z_k p(X_k), hence
    Z g = Z_0 p(X_0) ... p(X_last) g, and X_{k+1} = X_k p(X_k). The latter takes two products, Y = X X and
    (13 X - Y (15 I - 7 X + Y)) / 4; the factors p(X_k) are applied to g alone.
    """
    z = _first_inverse(a, per_matrix)
    if iterations == 0:
        return z @ g
    shape, m = g.shape, a.shape[-1]
    a, z, g = a.reshape(-1, m, m), z.reshape(-1, m, m), g.reshape(-1, *g.shape[-2:])
    powers = [a @ z]
    for _ in range(iterations - 1):
        x = powers[-1]
        y = x @ x
        # y (y - 7 x + 15) - 13 x, the identity folded into the product as before
        inner = torch.add(y, x, alpha=-7)
        powers.append(torch.baddbmm(torch.add(x.mul(3.25), y, alpha=-3.75), y, inner, alpha=-0.25))
    for x in reversed(powers):
        inner = torch.baddbmm(g, x, g, beta=7, alpha=-1)
        inner = torch.baddbmm(g, x, inner, beta=15, alpha=-1)
        g = torch.baddbmm(g, x, inner, beta=3.25, alpha=-0.25)
    return (z @ g).reshape(shape)


def _first_inverse(a: Tensor, per_matrix: bool) -> Tensor:
    """Z0 of :func:`pseudo_inverse`."""
    magnitude = a.abs()
    rows, columns = magnitude.sum(-1), magnitude.sum(-2)
    scale = rows.amax(-1) * columns.amax(-1) if per_matrix else rows.max() * columns.max()
    return a.transpose(-1, -2) / scale[..., None, None]


def pinv_error(a: Tensor, z: Tensor, probes: int | None = None) -> float:
    """||A Z A - A|| / ||A|| (Frobenius), largest over the matrices (..., m, m).

    Args:
        probes: estimate ||E||, E = A Z A - A, by the root mean square of ||E w|| over this many fixed sign vectors w
            (Hutchinson 1989), which costs m / probes times less and is off by a few per cent with 16 of them.
    """
    scale = torch.linalg.matrix_norm(a)
    if probes is not None:
        # Drawn on the CPU by a private generator: the same on every device, and no random state is touched.
        signs = torch.randint(0, 2, (a.shape[-1], probes), generator=torch.Generator().manual_seed(0)) * 2 - 1
        part = a @ (signs * probes**-0.5).to(a)
        error = torch.linalg.matrix_norm(a @ (z @ part) - part)
    else:
        error = torch.linalg.matrix_norm(a @ z @ a - a)
    return float((error / scale).detach().max())


def clear_pinv_errors(model: nn.Module) -> None:
    """Forget the errors of earlier forward passes: a layer that does not run keeps its last one."""
    for layer in model.modules():
        if isinstance(layer, NystromAttention):
            layer.pinv_error = None


def largest_pinv_error(model: nn.Module) -> float | None:
    """The largest error of the layers since :func:`clear_pinv_errors`; None where no pseudo-inverse was used."""
    layers = [layer for layer in model.modules() if isinstance(layer, NystromAttention)]
    return max((layer.pinv_error for layer in layers if layer.pinv_error is not None), default=None)


def note_pinv_error(model: nn.Module, output: dict[str, Any]) -> dict[str, Any]:
    """The output of a model with ``aux["pinv_error"]``, the largest of its layers, where one used a pseudo-inverse.

    In evaluation only; call :func:`clear_pinv_errors` before the forward pass.
    """
    error = largest_pinv_error(model)
    return output if error is None else output | {"aux": output["aux"] | {"pinv_error": error}}


def _band(kernel: Tensor, start: int, stop: int, n: int) -> tuple[Tensor, int, int]:
    """The convolution of rows ``start`` ... ``stop`` of n tokens as a matrix over the tokens that it touches.

    kernel (H, taps) -> (H, stop - start, last - first), first, last.
    """
    half = kernel.shape[1] // 2
    first, last = max(0, start - half), min(n, stop + half)
    rows = torch.arange(start, stop, device=kernel.device)
    tap = torch.arange(first, last, device=kernel.device) - rows[:, None] + half
    outside = (tap < 0) | (tap >= kernel.shape[1])
    # one more tap that is always 0 serves all tokens out of reach
    return F.pad(kernel, (0, 1))[:, tap.masked_fill(outside, kernel.shape[1])], first, last


def _value_conv(v: Tensor, kernel: Tensor, start: int, stop: int) -> Tensor:
    """Rows ``start`` ... ``stop`` of one kernel per head along the sequence, zero-padded at its true ends.

    v (B, H, n, d), kernel (H, taps) -> (B, H, stop - start, d). The kernel slides as in ``torch.conv1d``.
    """
    heads, taps = kernel.shape
    if stop - start <= _BAND_ROWS:
        band, first, last = _band(kernel.to(v.dtype), start, stop, v.shape[2])
        return band @ v[:, :, first:last]
    half = taps // 2
    first, last = max(0, start - half), min(v.shape[2], stop + half)
    missing = (first - (start - half), stop + half - last)
    rows = F.pad(v[:, :, first:last], (0, 0, *missing))
    return F.conv2d(rows, kernel[:, None, :, None].to(v.dtype), groups=heads)
