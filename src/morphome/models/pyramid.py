"""The pyramid transformer T_P of TransMIL and CMTA: two attention layers with a convolution over the patches between.

Shao et al., "TransMIL", NeurIPS 2021; used again by Zhou and Chen, "Cross-modal translation and alignment for
survival analysis" (CMTA), ICCV 2023. Written from the formulas.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.models.layers import TransLayer

GRIDS = ("sorted", "true_xy")
KERNELS = (7, 5, 3)


class PPEG(nn.Module):
    """Pyramid position encoding: y = x + DWConv7(x) + DWConv5(x) + DWConv3(x), depth-wise, biased, zero-padded.

    The identity and the three kernels are summed to one 7 x 7 kernel per channel, which gives the same values.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim) for size in KERNELS)

    def kernel(self) -> tuple[Tensor, Tensor]:
        """The sum of the kernels with the identity, (D, 7, 7), and of the biases, (D,)."""
        half = KERNELS[0] // 2
        padded = [F.pad(conv.weight[:, 0], (half - conv.kernel_size[0] // 2,) * 4) for conv in self.convs]
        identity = padded[0].new_zeros(KERNELS[0], KERNELS[0])
        identity[half, half] = 1
        return sum(padded) + identity, sum(conv.bias for conv in self.convs)

    def forward(self, x: Tensor, side: int) -> Tensor:
        """Tokens on a full square grid, row by row: x (side * side, D) -> the same shape."""
        weight, bias = self.kernel()
        image = x.T.reshape(1, -1, side, side)
        image = F.conv2d(image, weight[:, None], bias, padding=KERNELS[0] // 2, groups=weight.shape[0])
        return image.flatten(2)[0].T

    def scattered(self, x: Tensor, neighbours: Tensor) -> Tensor:
        """Tokens anywhere: x (n, D), neighbours (49, n) from :func:`grid_neighbours` -> (n, D)."""
        weight, bias = self.kernel()
        return _NeighbourSum.apply(x, weight.flatten(1).T.to(x.dtype), neighbours) + bias


class _NeighbourSum(torch.autograd.Function):
    """sum_o k_o * x[neighbour_o], one offset at a time: plain indexing would keep 49 copies of x for the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, kernel: Tensor, neighbours: Tensor) -> Tensor:
        """x (n, D), kernel (O, D), neighbours (O, n), -1 = none -> (n, D)."""
        ctx.save_for_backward(x, kernel, neighbours)
        out = torch.zeros_like(x)
        for weight, index in zip(kernel, neighbours, strict=True):
            here = (index >= 0).nonzero()[:, 0]
            out.index_add_(0, here, x[index[here]] * weight)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, kernel, neighbours = ctx.saved_tensors
        to_x, to_kernel = torch.zeros_like(x), torch.zeros_like(kernel)
        for offset, (weight, index) in enumerate(zip(kernel, neighbours, strict=True)):
            here = (index >= 0).nonzero()[:, 0]
            there = index[here]
            part = gradient[here]
            to_x.index_add_(0, there, part * weight)
            to_kernel[offset] = (part * x[there]).sum(0)
        return to_x, to_kernel, None


def grid_neighbours(pos: Tensor, half: int = KERNELS[0] // 2) -> Tensor:
    """For each patch and each offset (dy, dx) of a square window, the patch of the same slide that lies there.

    Cells are level-0 coordinates divided by the stride of the slide: the most frequent distance of neighbours in a
    row or column of patches. Of several patches in one cell the first stands for the cell; the centre of a
    window is always the patch itself. Slides do not touch.

    Args:
        pos: slide index, level-0 x, y, (n, 3) integer.
        half: the window has (2 half + 1)^2 cells.

    Returns:
        ((2 half + 1)^2, n) int64, row by row (dy first), -1 where the cell holds no patch.
    """
    pos = pos.long()
    n, device = pos.shape[0], pos.device
    cells = torch.empty_like(pos)
    for slide in pos[:, 0].unique().tolist():
        rows = (pos[:, 0] == slide).nonzero()[:, 0]
        xy = pos[rows, 1:]
        step = _stride(xy)
        # Halves are rounded up, always, so that a shift of the origin by whole strides changes nothing.
        cells[rows, 1:] = torch.div(2 * (xy - xy.amin(0)) + step, 2 * step, rounding_mode="floor")
        cells[rows, 0] = slide
    # One number per cell; the margin before each row and slide keeps windows from reaching into others.
    x, y = cells[:, 1] + half, cells[:, 2] + half
    width, height = int(x.max()) + 1, int(y.max()) + 1
    slide = cells[:, 0].unique(return_inverse=True)[1]
    key = (slide * height + y) * width + x
    order = torch.argsort(key, stable=True)
    ordered = key[order]
    window = range(-half, half + 1)
    shift = torch.tensor([dy * width + dx for dy in window for dx in window], device=device)
    wanted = key + shift[:, None]
    place = torch.searchsorted(ordered, wanted).clamp(max=n - 1)
    neighbours = torch.where(ordered[place] == wanted, order[place], -1)
    neighbours[neighbours.shape[0] // 2] = torch.arange(n, device=device)
    return neighbours


def _stride(xy: Tensor) -> int:
    """Most frequent positive distance of consecutive patches in rows and columns; 1 where there is none."""
    steps = []
    for along, across in ((0, 1), (1, 0)):
        by_line = xy[torch.argsort(xy[:, along], stable=True)]
        by_line = by_line[torch.argsort(by_line[:, across], stable=True)]
        gap = by_line[1:, along] - by_line[:-1, along]
        steps.append(gap[(by_line[1:, across] == by_line[:-1, across]) & (gap > 0)])
    values, counts = torch.cat(steps).unique(return_counts=True)
    # The smallest of equally frequent distances (argmax takes the first of sorted values on every device).
    return int(values[counts == counts.max()].min()) if values.numel() else 1


class PyramidTransformer(nn.Module):
    """T_P: tokens (n, D) -> class token (1, D) and tokens (n, D).

    ``sorted``: the tokens are laid row by row on a square of side s = ceil(sqrt n), filled up with copies of the
    first ones; [CLS; tokens] -> TransLayer -> PPEG on the square, CLS untouched -> TransLayer -> LayerNorm.
    ``true_xy``: no copies; PPEG convolves over the true neighbours on the slide.

    ``PyramidTransformer(dim, attention, grid="sorted", dropout=0.1)``; then
    ``cls, tokens = transformer(tokens, pos=None)``, or ``cls, _ = transformer(tokens, cls_only=True)`` which is
    cheaper. Copies take part in attention, as published, and are not returned, so whatever follows (and every
    exported attention) sees the n tokens only; ``keep_copies=True`` returns all s * s of them as published.

    Args:
        dim: width D.
        attention: keyword arguments of :class:`~morphome.models.nystrom.NystromAttention`, for example
            ``{"heads": 8, "landmarks": 256, "mode": "nystrom_masked", "value_conv": True}``.
        grid: ``sorted`` (as published; depends on the order of the tokens) or ``true_xy`` (needs ``pos``).
        dropout: of the output of attention.

    Raises:
        MorphomeError: unknown grid.
    """

    def __init__(self, dim: int, attention: dict, grid: str = "sorted", dropout: float = 0.1) -> None:
        super().__init__()
        if grid not in GRIDS:
            raise MorphomeError(f"grid: {grid!r} is not known", f"choose one of {', '.join(GRIDS)}")
        self.grid = grid
        self.cls = nn.Parameter(torch.randn(1, dim) * 1e-6)
        self.first = TransLayer(dim, "layer", 1.0, attention, dropout)
        self.position = PPEG(dim)
        self.second = TransLayer(dim, "layer", 1.0, attention, dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, tokens: Tensor, pos: Tensor | None = None, *, cls_only: bool = False, keep_copies: bool = False
    ) -> tuple[Tensor, Tensor]:
        """tokens (n, D), n >= 1 -> class token (1, D) and tokens (n, D), both normed.

        Args:
            pos: slide index, level-0 x, y, (n, 3); read with ``grid: true_xy`` only.
            cls_only: compute the class token only; the tokens come back empty, (0, D).
            keep_copies: with ``grid: sorted``, return (s * s, D) tokens, the last ones made from the copies.

        Raises:
            MorphomeError: ``grid: true_xy`` without positions.
        """
        n = tokens.shape[0]
        if self.grid == "true_xy" and (pos is None or pos.shape != (n, 3)):
            raise MorphomeError(
                "grid: true_xy needs the position of every patch, which this patient does not have",
                "use features with coordinates, or grid: sorted",
            )
        side = math.isqrt(n - 1) + 1
        if self.grid == "sorted":
            tokens = torch.cat([tokens, tokens[: side * side - n]])
        h = self.first(torch.cat([self.cls.to(tokens.dtype), tokens]))
        cls, h = h[:1], h[1:]
        h = self.position(h, side) if self.grid == "sorted" else self.position.scattered(h, grid_neighbours(pos))
        rows = 0 if cls_only else h.shape[0] if keep_copies else n
        h = self.norm(self.second(torch.cat([cls, h]), keep=(0, 1 + rows)))
        return h[:1], h[1:]
