"""Networks that no library offers as their authors published them: CTransPath, and ResNet-50 cut after a layer.

CTransPath (Wang et al. 2022, Medical Image Analysis 81) is Swin-T (Liu et al. 2021, arXiv:2103.14030) whose first layer
is a small stack of convolutions. The published file follows the names of timm 0.5.4, where a stage shrinks its map at
its *end* (``layers.0.downsample`` belongs to the first stage); timm 1.x moved that layer to the beginning of the next
stage, so the file does not load there. Names here are those of the file. Checked against timm's own Swin-T with the
same stem and weights; not checked against the published file, which has no public address.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_MASKED = -100.0


class ConvStem(nn.Module):
    """Two strided 3 x 3 convolutions and one of 1 x 1: (B, 3, H, W) to tokens (B, H/4 * W/4, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n_in, n_out in ((3, dim // 8), (dim // 8, dim // 4)):
            layers += [nn.Conv2d(n_in, n_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(dim // 4, dim, 1))
        self.norm = nn.LayerNorm(dim)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.norm(self.proj(pixels).flatten(2).transpose(1, 2))


class WindowAttention(nn.Module):
    """Attention within windows of ``window`` x ``window`` tokens, with a bias per relative place."""

    def __init__(self, dim: int, n_heads: int, window: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, n_heads))
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """tokens (windows, N, dim) to the same shape; mask (windows of one image, N, N) or None."""
        n_windows, n, dim = tokens.shape
        q, k, v = self.qkv(tokens).reshape(n_windows, n, 3, self.n_heads, dim // self.n_heads).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).unsqueeze(0)
        if mask is not None:
            # Windows of one image follow one another, so the mask repeats for every image.
            bias = bias + mask.unsqueeze(1).repeat(n_windows // len(mask), 1, 1, 1)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(out.transpose(1, 2).reshape(n_windows, n, dim))


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(tokens)))


class SwinBlock(nn.Module):
    """Window attention and feed-forward layer; every second block of a stage shifts its windows by half."""

    def __init__(self, dim: int, n_heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.side, self.window, self.shift = side, window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, n_heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)
        mask = shift_mask(side, window, shift) if shift else None
        self.register_buffer("attn_mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        n_images, _, dim = tokens.shape
        maps = self.norm1(tokens).view(n_images, self.side, self.side, dim)
        if self.shift:
            maps = torch.roll(maps, (-self.shift, -self.shift), dims=(1, 2))
        maps = from_windows(self.attn(to_windows(maps, self.window), self.attn_mask), self.window, self.side)
        if self.shift:
            maps = torch.roll(maps, (self.shift, self.shift), dims=(1, 2))
        tokens = tokens + maps.reshape(n_images, -1, dim)
        return tokens + self.mlp(self.norm2(tokens))


class PatchMerging(nn.Module):
    """Four neighbouring tokens become one of twice the width."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        n_images, _, dim = tokens.shape
        maps = tokens.view(n_images, self.side, self.side, dim)
        corners = [maps[:, y::2, x::2] for x in (0, 1) for y in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1).reshape(n_images, -1, 4 * dim)))


class SwinStage(nn.Module):
    """Blocks of one resolution; ``downsample`` stands at the end, as in the published file."""

    def __init__(self, dim: int, depth: int, n_heads: int, side: int, window: int, last: bool) -> None:
        super().__init__()
        window = min(window, side)
        shifts = [0 if side <= window or number % 2 == 0 else window // 2 for number in range(depth)]
        self.blocks = nn.Sequential(*(SwinBlock(dim, n_heads, side, window, shift) for shift in shifts))
        self.downsample = nn.Identity() if last else PatchMerging(dim, side)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.downsample(self.blocks(tokens))


class CTransPath(nn.Module):
    """Swin-T with a convolutional stem: float (B, 3, side, side) to tokens (B, (side / 32)^2, 8 * dim).

    Args:
        side_px: side of the tiles; a multiple of 32 whose stages divide into windows.
        dim, depths, n_heads, window: as published (96; 2, 2, 6, 2; 3, 6, 12, 24; 7); smaller ones for tests.
    """

    def __init__(
        self,
        side_px: int = 224,
        dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        n_heads: tuple[int, ...] = (3, 6, 12, 24),
        window: int = 7,
    ) -> None:
        super().__init__()
        self.patch_embed = ConvStem(dim)
        last = len(depths) - 1
        self.layers = nn.Sequential(
            *(
                SwinStage(dim << i, depth, heads, (side_px // 4) >> i, window, last=i == last)
                for i, (depth, heads) in enumerate(zip(depths, n_heads, strict=True))
            )
        )
        self.norm = nn.LayerNorm(dim << last)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.norm(self.layers(self.patch_embed(pixels)))


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for every pair of tokens of a window, int64 (window^2, window^2)."""
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()])
    apart = places[:, :, None] - places[:, None, :] + window - 1
    return apart[0] * (2 * window - 1) + apart[1]


def shift_mask(side: int, window: int, shift: int) -> Tensor:
    """float (windows, N, N): after a shift, tokens that were not neighbours must not see one another."""
    regions = torch.zeros(1, side, side, 1)
    edges = (0, side - window, side - shift, side)
    for row in range(3):
        for column in range(3):
            regions[:, edges[row] : edges[row + 1], edges[column] : edges[column + 1]] = 3 * row + column
    of_token = to_windows(regions, window).squeeze(-1)
    return (of_token[:, :, None] != of_token[:, None, :]).float() * _MASKED


def to_windows(maps: Tensor, window: int) -> Tensor:
    """(B, S, S, C) to (B * (S / window)^2, window^2, C)."""
    n_images, side, _, dim = maps.shape
    parts = maps.view(n_images, side // window, window, side // window, window, dim).permute(0, 1, 3, 2, 4, 5)
    return parts.reshape(-1, window * window, dim)


def from_windows(windows: Tensor, window: int, side: int) -> Tensor:
    """The reverse of :func:`to_windows`."""
    n, dim = side // window, windows.shape[-1]
    return windows.view(-1, n, n, window, window, dim).permute(0, 1, 3, 2, 4, 5).reshape(-1, side, side, dim)


class Bottleneck(nn.Module):
    """Three convolutions around a skip connection; the stride is at the 3 x 3 one (torchvision's version)."""

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        n_out = 4 * width
        self.conv1 = nn.Conv2d(n_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, n_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU()
        if stride != 1 or n_in != n_out:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False), nn.BatchNorm2d(n_out))
        else:
            self.downsample = nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(maps)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + self.downsample(maps))


class TruncatedResNet50(nn.Module):
    """ResNet-50 (He et al. 2016) up to ``layer<layers>``: (B, 3, H, W) to maps, (B, 1024, H/16, W/16) for 3 layers.

    Names are those of torchvision's and timm's state dicts.
    """

    def __init__(self, layers: int = 3, width: int = 64, depths: tuple[int, ...] = (3, 4, 6, 3)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        n_in = width
        self.n_layers = layers
        for number, depth in enumerate(depths[:layers]):
            stride, blocks = 1 if number == 0 else 2, []
            for _ in range(depth):
                blocks.append(Bottleneck(n_in, width << number, stride))
                n_in, stride = 4 * (width << number), 1
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.maxpool(self.relu(self.bn1(self.conv1(pixels))))
        for number in range(self.n_layers):
            maps = getattr(self, f"layer{number + 1}")(maps)
        return maps
