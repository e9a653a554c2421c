"""Blocks of PIBD: prototype bottleneck, product of experts, disentangling layer, bound of mutual information.

Zhang et al., "Prototypical information bottlenecking and disentangling for multimodal cancer survival prediction",
ICLR 2024. Cheng et al., "CLUB: a contrastive log-ratio upper bound of mutual information", ICML 2020. Written from the
formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morphome.models.layers import Dropout

POE_VARIANCES = ("sigma2", "sigma_legacy")


def kl_standard_normal(mean: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mean, sigma^2) || N(0, 1)), summed over the last axis; (..., d) -> (...)."""
    return 0.5 * (mean.square() + sigma.square() - 1).sum(-1) - sigma.log().sum(-1)


def product_of_experts(means: Tensor, sigmas: Tensor, alpha: Tensor, variance: str) -> tuple[Tensor, Tensor]:
    """``mu = sum alpha T m / sum alpha T`` and ``v = 1 / sum alpha T`` with T = 1 / sigma^2 (``sigma2``).

    ``sigma_legacy``, as published, has T = 1 / sigma and multiplies noise by v instead of its root.

    Args:
        means, sigmas: (U, ..., d) of U experts.
        alpha: weights of the experts, (U,), sum 1.
        variance: ``sigma2`` or ``sigma_legacy``.

    Returns:
        The mean and what noise is multiplied by, both (..., d).
    """
    precision = 1 / (sigmas.square() if variance == "sigma2" else sigmas)
    weighted = alpha.reshape(-1, *[1] * (means.ndim - 1)) * precision
    total = weighted.sum(0)
    return (weighted * means).sum(0) / total, total.rsqrt() if variance == "sigma2" else 1 / total


@dataclass(frozen=True)
class Bottleneck:
    """What :class:`PrototypeBottleneck` keeps of S sub-bags.

    Args:
        tokens: the kept instances, (S, k, d).
        rows: rows of the input that they are, (S, k); a row may be kept once per prototype.
        chosen: the prototype of each sub-bag, (S,).
        similarity: mean over the k best instances, by sub-bag and prototype, (S, 2K).
        prototypes: z~, (2K, d).
    """

    tokens: Tensor
    rows: Tensor
    chosen: Tensor
    similarity: Tensor
    prototypes: Tensor


class PrototypeBottleneck(nn.Module):
    """Keep the instances of a bag that resemble prototypes of outcome classes; 2K of them, one per bin × status.

    ``z_n = MLP x_n`` (ReLU and dropout behind the hidden layers), ``z~_j = mean of n samples of N(mu_j, sigma_j^2)``,
    similarity = cos(z_n, z~_j). Kept are the instances of the k best pairs (n, j), in training as in evaluation.

    Evaluation takes a draw of the noise that is fixed with the model and saved with it.

    Args:
        d_in: width of an instance.
        hidden: width of the two hidden layers.
        dim: d.
        n_bins: K.
        keep: k as a share of the instances; at least one is kept.
        samples: n; only their mean matters, which is drawn at once: N(mu, sigma^2 / n).
        noise_seed: of the fixed draw.
        dropout: of the MLP.
    """

    def __init__(
        self,
        d_in: int,
        hidden: int,
        dim: int,
        n_bins: int,
        *,
        keep: float,
        samples: int,
        noise_seed: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.keep, self.samples = keep, samples
        self.encoder = nn.Sequential(
            nn.Linear(d_in, hidden),
            nn.ReLU(),
            Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            Dropout(dropout),
            nn.Linear(hidden, dim),
        )
        self.mean = nn.Parameter(torch.randn(2 * n_bins, dim))
        self.spread = nn.Parameter(torch.zeros(2 * n_bins, dim))
        self.decoder = nn.Linear(dim, n_bins)
        self.register_buffer("noise", fixed_noise((2 * n_bins, dim), noise_seed))

    @property
    def sigma(self) -> Tensor:
        """Standard deviations of the prototypes, (2K, d)."""
        return F.softplus(self.spread)

    def forward(self, x: Tensor, bags: Tensor, own: int | None) -> Bottleneck:
        """Choose.

        Args:
            x: instances (n, d_in).
            bags: rows of x in each sub-bag, (S, m).
            own: the patient's prototype K (1 - event) + bin in training; None: the most frequent one among the
                kept pairs, by sub-bag; of equal ones the first.
        """
        count = len(self.mean)
        z = self.encoder(x)
        noise = torch.randn_like(self.mean) if self.training else self.noise
        prototypes = self.mean + self.sigma * noise * self.samples**-0.5
        similarity = (F.normalize(z, dim=1) @ F.normalize(prototypes, dim=1).T)[bags]
        k = max(1, int(self.keep * bags.shape[1] + 1e-9))
        pairs = similarity.flatten(1).topk(k, 1).indices
        rows = bags.gather(1, pairs // count)
        if own is None:
            votes = F.one_hot(pairs % count, count).sum(1)
            chosen = (votes * count - torch.arange(count, device=x.device)).argmax(1)
        else:
            chosen = torch.full((len(bags),), own, device=x.device)
        return Bottleneck(z[rows], rows, chosen, similarity.topk(k, 1).values.mean(1), prototypes)


def fixed_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal draw from a generator of its own, on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def proxy_loss(similarity: Tensor, own: int) -> Tensor:
    """Minus similarity to the own prototype, plus the mean over the others; (S, 2K) -> scalar, mean over sub-bags."""
    others = (similarity.sum(1) - similarity[:, own]) / (similarity.shape[1] - 1)
    return (others - similarity[:, own]).mean()


class DisentanglingLayer(nn.Module):
    """One pre-norm transformer layer whose weights serve three sets: H and P attend to themselves, the global token
    to itself, H and P.

    Args:
        dim: width; heads: divides it.
        ratio: hidden width of the MLP over ``dim``.
        dropout: behind attention and in the MLP.
    """

    def __init__(self, dim: int, heads: int, ratio: float, dropout: float) -> None:
        super().__init__()
        hidden = round(dim * ratio)
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.first, self.second = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout = Dropout(dropout)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (S, heads, n, d / heads)."""
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def _finish(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
        x = x + self.dropout(self.out((weights @ v).transpose(1, 2).flatten(2)))
        hidden = self.dropout(F.gelu(self.first(self.norm_mlp(x))))
        return x + self.dropout(self.second(hidden))

    def forward(self, h: Tensor, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """H (S, n, d), P (1 or S, m, d), global (S, 1, d) -> the same shapes."""
        of_h, of_p, of_g = self._project(h), self._project(p), self._project(g)
        parts = [[x.expand(len(g), -1, -1, -1) for x in (of_g[i], of_h[i], of_p[i])] for i in (1, 2)]
        keys, values = (torch.cat(part, 2) for part in parts)
        return self._finish(h, *of_h), self._finish(p, *of_p), self._finish(g, of_g[0], keys, values)


class CLUB(nn.Module):
    """Upper bound of the mutual information of x and y with the predictor ``mu = Lin(ReLU(Lin x))``."""

    def __init__(self, d_x: int, d_y: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(d_x, hidden), nn.ReLU(), nn.Linear(hidden, d_y))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """n pairs x (n, d_x), y (n, d_y) -> two scalars.

        ``mean_i [-|mu(x_i) - y_i|^2 / 2 + mean_j |mu(x_i) - y_j|^2 / 2]``, 0 for a single pair, and the predictor's
        loss ``mean_i |mu(x_i) - y_i|^2``.
        """
        mu = self.net(x)
        fit = (mu - y).square().sum(1).mean()
        # The mean over j splits into the distance to the mean and the spread around it.
        centre = y.mean(0)
        crossed = (mu - centre).square().sum(1).mean() + (y - centre).square().sum(1).mean()
        return 0.5 * (crossed - fit), fit
