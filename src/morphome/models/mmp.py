"""MMP: a slide as a few Gaussian mixture components, a transcriptome as pathways, and attention among all of them.

Song et al., "Multimodal prototyping for cancer survival prediction", ICML 2024. Written from the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.models.batch import Batch, require
from morphome.models.fusion import OUTPUT, Encoded, FusionModel
from morphome.models.layers import Dropout, GroupEncoder, stand_in
from morphome.models.parts import TrainingSample
from morphome.models.transport import transport_cost, transport_plan

TOKEN_EMBEDDINGS = ("random", "modality", "proto")
FUSIONS = ("attention", "ot")
#: Patches that are widened to float64 at a time.
_CHUNK = 4096


@torch.no_grad()
def em_step(x: Tensor, centres: Tensor, tau: float, variance: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of expectation maximisation from spherical components of unit variance, with a conjugate prior.

    ``q_nk ∝ exp(-|x_n - m_k|^2 / 2)``, ``s_k = sum_n q_nk``, ``pi_k = (s_k + tau) / (N + K tau)``,
    ``mu_k = (sum q x + tau m_k) / (s_k + tau)``, ``Sigma_k = (sum q x^2 + tau (V + m_k^2)) / (s_k + tau) - mu_k^2``.
    Sums run in float64, so that the order of the patches does not show and the last difference stays accurate.

    Args:
        x: patches (N, d).
        centres: m, (K, d).
        tau: prior weight, in patches per component; above 0.
        variance: V, prior variance of every feature.

    Returns:
        pi (K,), mu (K, d), Sigma (K, d) and q (N, K), in the type of ``x``; no gradient.
    """
    m = centres.double()
    bias = -0.5 * m.square().sum(1)
    q, first, second = [], torch.zeros_like(m), torch.zeros_like(m)
    for chunk in x.split(_CHUNK):
        part = chunk.double()
        # |x|^2 is the same for all k.
        weights = torch.softmax(part @ m.T + bias, 1)
        first += weights.T @ part
        second += weights.T @ part.square()
        q.append(weights)
    q = torch.cat(q)
    s = q.sum(0)
    mass = (s + tau)[:, None]
    pi = (s + tau) / (len(x) + len(m) * tau)
    mu = (first + tau * m) / mass
    sigma = ((second + tau * (variance + m.square())) / mass - mu.square()).clamp(min=0)
    return pi.to(x.dtype), mu.to(x.dtype), sigma.to(x.dtype), q.to(x.dtype)


class TokenNetworks(nn.Module):
    """``Lin(Dropout(GELU(Lin(LN x))))`` with weights of its own for every token; (n, d) -> (n, d)."""

    def __init__(self, n: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(n, dim))
        self.shift = nn.Parameter(torch.zeros(n, dim))
        # The start of nn.Linear.
        bound = 1 / math.sqrt(dim)
        self.weights = nn.ParameterList(torch.empty(n, dim, dim).uniform_(-bound, bound) for _ in range(2))
        self.biases = nn.ParameterList(torch.empty(n, dim).uniform_(-bound, bound) for _ in range(2))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[1:]) * self.scale + self.shift
        x = torch.bmm(self.weights[0], x[:, :, None])[:, :, 0] + self.biases[0]
        x = self.dropout(F.gelu(x))
        return torch.bmm(self.weights[1], x[:, :, None])[:, :, 0] + self.biases[1]


class MMP(FusionModel):
    """T pathway tokens and K prototype tokens; invariant to the order of the patches.

    ``H_k = Lin [pi_k; mu_k; Sigma_k]`` from one EM step per patient, ``P_i = SNN(SNN(x_i))``; every token gets an
    embedding of which one it is; LN, one-head attention to half the width without output projection, a network per
    token, LN (one per modality); ``log_risk = Lin [mean_P; mean_H]`` without bias. 3,427,936 parameters outside the
    pathway networks with 50 pathways, 16 prototypes, d_in = 1024.

    Published: Cox loss, AdamW 1e-4 with decay 1e-5, cosine with 1 warm-up epoch, batch 64, 50 epochs, last epoch: all
    of them settings of the trainer.

    Args:
        d_in: width of the patch features.
        group_sizes: columns per pathway, in the order of ``Batch.groups``.
        parts: ``prototypes`` (K, d_in), from :meth:`fit_parts`.
        missing_tokens: learn one token per pathway that stands in for a patient without genes.
        dim: width of a token before its embedding.
        prototypes: K, number of k-means centres.
        kmeans_patches: training patches that k-means sees at most.
        kmeans_restarts: starts of k-means, of which the best is kept.
        tau: weight of the prior in the EM step, patches per component.
        prior_variance: V.
        token_embedding: ``random``: learned, ``embedding_dim`` wide; ``modality``: one-hot of the modality;
            ``proto``: one-hot of the token.
        embedding_dim: of ``random``.
        fusion: ``attention``: all tokens among each other; ``ot``: no attention, each token reads the other modality
            through an unbalanced optimal transport plan (:mod:`morphome.models.transport`, no gradient), of which
            every row is divided by its mass.
        epsilon, ot_tau: of the plan.
        double_softmax_legacy: as published, the scores of prototypes for pathways pass a softmax of their own
            before the joint one, which flattens them.
        dropout: alpha dropout of the pathway networks.
        feedforward_dropout: of the networks per token.

    Raises:
        MorphomeError: unknown choice, or no prototypes of the right width.
    """

    needs = frozenset({"path", "omic_groups"})
    supports = frozenset({"missing_omic"})
    head = "cox"
    order_sensitive = False

    def __init__(
        self,
        d_in: int,
        group_sizes: Mapping[str, int],
        parts: Mapping[str, np.ndarray],
        missing_tokens: bool = False,
        *,
        dim: int = 256,
        prototypes: int = 16,
        kmeans_patches: int = 50_000,
        kmeans_restarts: int = 3,
        tau: float = 1.0,
        prior_variance: float = 1.0,
        token_embedding: str = "random",
        embedding_dim: int = 32,
        fusion: str = "attention",
        epsilon: float = 0.1,
        ot_tau: float = 0.5,
        double_softmax_legacy: bool = False,
        dropout: float = 0.25,
        feedforward_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("token_embedding", token_embedding, TOKEN_EMBEDDINGS),
            ("fusion", fusion, FUSIONS),
        ):
            if value not in known:
                raise MorphomeError(f"models.mmp.{name}: {value!r} is not known", f"choose one of {', '.join(known)}")
        if np.shape(parts.get("prototypes")) != (prototypes, d_in):
            found = np.shape(parts["prototypes"]) if "prototypes" in parts else "none"
            raise MorphomeError(
                f"models.mmp: prototypes ({prototypes}, {d_in}) are needed, given: {found}",
                "fit them on the training fold first (fit_parts)",
            )
        self.d_in, self.tau, self.prior_variance = d_in, tau, prior_variance
        self.fusion, self.double_softmax = fusion, double_softmax_legacy
        self.transport = {"epsilon": epsilon, "tau": ot_tau}
        self.register_buffer("centres", torch.from_numpy(np.array(parts["prototypes"], dtype=np.float32)))
        t, k = len(group_sizes), prototypes
        self.dim, self.n_pathways = dim, t
        self.pathways = GroupEncoder(list(group_sizes.values()), dim, dropout)
        self.project = nn.Linear(2 * d_in + 1, dim)
        if token_embedding == "random":
            self.embedding = nn.Parameter(torch.randn(t + k, embedding_dim))
        elif token_embedding == "modality":
            self.register_buffer("embedding", F.one_hot(torch.tensor([0] * t + [1] * k), 2).float())
        else:
            self.register_buffer("embedding", torch.eye(t + k))
        width = dim + self.embedding.shape[1]
        half = width // 2
        self.norm = nn.LayerNorm(width)
        if fusion == "attention":
            self.query = nn.Linear(width, half, bias=False)
            self.key = nn.Linear(width, half, bias=False)
        self.value = nn.Linear(width, half, bias=False)
        self.networks = TokenNetworks(t + k, half, feedforward_dropout)
        self.norm_omic, self.norm_path = nn.LayerNorm(half), nn.LayerNorm(half)
        self.classifier = nn.Linear(2 * half, 1, bias=False)
        # Last, so that the weights of the model without it stay the same.
        self.missing = stand_in(t, dim) if missing_tokens else None

    @classmethod
    def fit_parts(cls, settings: Mapping[str, Any], sample: TrainingSample) -> dict[str, np.ndarray]:
        """``prototypes`` (K, d_in) float32: centres of k-means on training patches.

        Raises:
            MorphomeError: fewer different patches than prototypes.
        """
        # Nothing else in the models needs it, and it is slow to import.
        from sklearn.cluster import KMeans

        k = settings["prototypes"]
        patches = np.asarray(sample.patches(settings["kmeans_patches"]), dtype=np.float32)
        # Most bags differ in every row, so a few rows settle it.
        if len(np.unique(patches[: 10 * k], axis=0)) < k and len(np.unique(patches, axis=0)) < k:
            raise MorphomeError(
                f"models.mmp: {k} prototypes from {len(patches)} training patches, too few of them different",
                "lower models.mmp.prototypes",
            )
        means = KMeans(k, n_init=settings["kmeans_restarts"], random_state=sample.seed % 2**32)
        # Sums over several threads come in any order; one thread gives the same centres every time.
        with threadpool_limits(1):
            fit = means.fit(patches)
        return {"prototypes": fit.cluster_centers_.astype(np.float32)}

    def branch_parameters(self) -> dict[str, list[nn.Parameter]]:
        omic = list(self.pathways.parameters()) + ([] if self.missing is None else [self.missing])
        return {"path": list(self.project.parameters()), "omic": omic}

    @property
    def branch_widths(self) -> dict[str, int]:
        return {"path": self.dim, "omic": self.dim}

    def encode(self, batch: Batch) -> Encoded:
        """H (K, dim) and P (T, dim).

        ``attn["prototypes"]`` (N, K): how much of each patch belongs to each prototype, rows sum to 1;
        ``attn["mixture"]`` (K,): pi, sums to 1.
        """
        learned = self.missing is not None and batch.groups is None
        require(batch, self.needs - {"omic_groups"} if learned else self.needs, self.d_in)
        pi, mu, sigma, q = em_step(batch.path, self.centres, self.tau, self.prior_variance)
        path = self.project(torch.cat([pi[:, None], mu, sigma], 1))
        omic = self.missing if learned else self.pathways(batch.groups)
        return Encoded({"path": path, "omic": omic}, attn={"prototypes": q, "mixture": pi})

    def mix(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the tokens read of each other: (T + K, width), pathways first -> (T + K, width / 2) and the weights
        (T + K, T + K), whose rows sum to 1."""
        t, v = self.n_pathways, self.value(tokens)
        if self.fusion == "ot":
            a, b = (tokens.new_full((n,), 1 / n, dtype=torch.float64) for n in (t, len(tokens) - t))
            plan = transport_plan(transport_cost(tokens[:t], tokens[t:]), a, b, **self.transport)
            weights = tokens.new_zeros(len(tokens), len(tokens))
            weights[:t, t:] = (plan / plan.sum(1, keepdim=True)).to(weights.dtype)
            weights[t:, :t] = (plan / plan.sum(0)).T.to(weights.dtype)
        else:
            scores = self.query(tokens) @ self.key(tokens).T * v.shape[1] ** -0.5
            if self.double_softmax:
                legacy = torch.cat([torch.softmax(scores[t:, :t], 1), scores[t:, t:]], 1)
                scores = torch.cat([scores[:t], legacy])
            weights = torch.softmax(scores, 1)
        return weights @ v, weights

    def _fuse(self, z: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([z["omic"], z["path"]])
        out, weights = self.mix(self.norm(torch.cat([tokens, self.embedding], 1)))
        out = self.networks(out)
        t = self.n_pathways
        e = torch.cat([self.norm_omic(out[:t]).mean(0), self.norm_path(out[t:]).mean(0)])
        return self.classifier(e[None]), weights

    def fuse(self, z: Mapping[str, Tensor]) -> Tensor:
        """H and P -> log risk (1, 1)."""
        return self._fuse(z)[0]

    def output(self, encoded: Encoded, z: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """As for every fusion model, with ``attn["tokens"]`` (T + K, T + K): what each token reads, pathways first."""
        log_risk, weights = self._fuse(encoded.z if z is None else z)
        return {
            OUTPUT[self.head]: log_risk,
            "extra_losses": encoded.extra_losses,
            "attn": encoded.attn | {"tokens": weights.detach()},
            "aux": encoded.aux,
        }
