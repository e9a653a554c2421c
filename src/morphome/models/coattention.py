"""What MCAT, MOTCat and CMTA share: one-head attention between modalities, and the head over tokens of both.

Chen et al., "Multimodal Co-Attention Transformer for Survival Prediction in Gigapixel Whole Slide Images", ICCV
2021. Written from the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.models.batch import Batch, require
from morphome.models.fusion import FusionModel
from morphome.models.kron import KronFusion
from morphome.models.layers import FC, Dropout, GatedAttention, GroupEncoder

FUSIONS = ("concat", "bilinear")


class CrossAttention(nn.Module):
    """MHA1(Q, M): one head, biased projections of queries, keys, values and output, scale d^(-1/2).

    The longer side is never projected: q k^T = (q Wk) M^T + q bk where the memory is long, and Q (Wq^T k^T) + bq k^T
    where the queries are; the same in exact arithmetic, at the cost of the shorter side. Parameters 4 (d^2 + d).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Queries, keys and values in one layer: the bias of the keys alone has no gradient (softmax cancels it).
        self.inputs = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        for layer in (self.inputs, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, queries: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attend from Q to M.

        Args:
            queries: (n, d).
            memory: (t, d).

        Returns:
            Output (n, d), weights (n, t), whose rows sum to 1, and the scores before the softmax (n, t).
        """
        (wq, wk, wv), (bq, bk, bv) = self.inputs.weight.chunk(3), self.inputs.bias.chunk(3)
        scale = queries.shape[-1] ** -0.5
        if queries.shape[0] <= memory.shape[0]:
            q = F.linear(queries, wq, bq) * scale
            scores = (q @ wk) @ memory.T + (q @ bk)[:, None]
            weights = scores.softmax(-1)
            return self.out(F.linear(weights @ memory, wv, bv)), weights, scores
        k = F.linear(memory, wk, bk) * scale
        scores = queries @ (k @ wq).T + k @ bq
        weights = scores.softmax(-1)
        values = F.linear(F.linear(memory, wv, bv), self.out.weight)
        return weights @ values + self.out.bias, weights, scores


class EncoderLayer(nn.Module):
    """Post-norm Transformer encoder layer (Vaswani et al. 2017) over the tokens of one patient, ReLU.

    x <- LN(x + Drop(MHA(x))); x <- LN(x + Drop(Lin(Drop(ReLU(Lin x))))), dropout on the attention weights as well.
    """

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float = 0.25) -> None:
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.inputs.weight)
        for layer in (self.inputs, self.out):
            nn.init.zeros_(layer.bias)
        self.first, self.second = nn.Linear(dim, feedforward), nn.Linear(feedforward, dim)
        self.norm_attention, self.norm_feedforward = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(t, d) -> (t, d)."""
        q, k, v = self.inputs(x).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        weights = self.dropout(torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1))
        attended = self.out((weights @ v).transpose(0, 1).flatten(1))
        x = self.norm_attention(x + self.dropout(attended))
        hidden = self.dropout(F.relu(self.first(x)))
        return self.norm_feedforward(x + self.dropout(self.second(hidden)))


class TokenPool(nn.Module):
    """FC(d -> d)(GA(Enc(tokens))): two encoder layers, gated attention over the tokens, one layer."""

    def __init__(self, dim: int, heads: int, feedforward: int, attention_dim: int, dropout: float = 0.25) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*(EncoderLayer(dim, heads, feedforward, dropout) for _ in range(2)))
        self.pool = GatedAttention(dim, attention_dim, 1, dropout)
        self.hidden = FC(dim, dim, dropout)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(t, d) -> (1, d) and the weights of the pooling (t,), which sum to 1."""
        pooled, weights = self.pool(self.encoder(tokens))
        return self.hidden(pooled), weights.squeeze(1)


class ConcatFusion(nn.Module):
    """h = ReLU(Lin d -> d (ReLU(Lin 2d -> d ([u; v]))))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2 * dim, dim), nn.Linear(dim, dim)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """(1, d), (1, d) -> (1, d)."""
        return F.relu(self.second(F.relu(self.first(torch.cat([u, v], -1)))))


class BilinearFusion(nn.Module):
    """The gated Kronecker product of PORPOISE with dropout after both of its last layers."""

    def __init__(self, dim: int, dropout: float = 0.25) -> None:
        super().__init__()
        self.product = KronFusion(dim, dim, dim, dropout=dropout, encoder_dropout=dropout)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """(1, d), (1, d) -> (1, d)."""
        return self.product(u.squeeze(0), v.squeeze(0)).unsqueeze(0)


def check_sizes(key: str, dim: int, heads: int, fusion: str) -> None:
    """Refuse what :class:`TokenPool` and :func:`make_fusion` cannot build, in the words of the configuration.

    Raises:
        MorphomeError: ``heads`` does not divide ``dim``; unknown fusion; a width that the product cannot reduce.
    """
    if dim % heads:
        raise MorphomeError(f"models.{key}.heads: {heads} does not divide dim {dim}", "choose a divisor of dim")
    if fusion not in FUSIONS:
        raise MorphomeError(f"models.{key}.fusion: {fusion!r} is not known", f"choose {' or '.join(FUSIONS)}")
    if fusion == "bilinear" and dim < 8:
        raise MorphomeError(f"models.{key}.dim: {dim} with fusion bilinear", "choose a dim of at least 8")


def make_fusion(fusion: str, dim: int, dropout: float) -> nn.Module:
    """``concat`` or ``bilinear``: (1, d), (1, d) -> (1, d)."""
    return ConcatFusion(dim) if fusion == "concat" else BilinearFusion(dim, dropout)


class CoAttentionModel(FusionModel):
    """What MCAT and MOTCat have in common: both encoders, both pools over T tokens, the fusion and the head.

    The branches meet before the fusion too: the groups query the patches. A subclass that builds weights of its own
    calls ``groups.add_missing`` behind them (see ``missing_tokens``).

    Args:
        key: of the registry, for messages. The others as for :class:`morphome.models.mcat.MCAT`.

    Raises:
        MorphomeError: unknown fusion, or ``heads`` does not divide ``dim``.
    """

    needs = frozenset({"path", "omic_groups"})
    supports = frozenset({"missing_omic"})
    head = "hazard"
    order_sensitive = False

    def __init__(
        self,
        key: str,
        d_in: int,
        group_sizes: Mapping[str, int],
        n_bins: int,
        *,
        dim: int,
        heads: int,
        feedforward: int,
        attention_dim: int,
        fusion: str,
        dropout: float,
        missing_tokens: bool,
    ) -> None:
        super().__init__()
        check_sizes(key, dim, heads, fusion)
        self.d_in, self.dim = d_in, dim
        self.required = self.needs - {"omic_groups"} if missing_tokens else self.needs
        self.project = FC(d_in, dim, dropout)
        self.groups = GroupEncoder(list(group_sizes.values()), dim, dropout)
        self.path_pool = TokenPool(dim, heads, feedforward, attention_dim, dropout)
        self.gene_pool = TokenPool(dim, heads, feedforward, attention_dim, dropout)
        self.fusion = make_fusion(fusion, dim, dropout)
        self.classifier = nn.Linear(dim, n_bins)

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """H (N, d) and G (T, d) of one patient.

        Raises:
            MorphomeError: the patient has no patch features or gene groups, or of other shapes.
        """
        require(batch, self.required, self.d_in)
        return self.project(batch.path), self.groups(batch.groups)

    def fuse(self, z: Mapping[str, Tensor]) -> Tensor:
        """h_P (1, d), h_G (1, d) -> logits (1, K)."""
        return self.classifier(self.fusion(z["path"], z["omic"]))

    def branch_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Projection and pool of the slides, networks and pool of the genes; the co-attention belongs to both."""
        return {
            "path": [*self.project.parameters(), *self.path_pool.parameters()],
            "omic": [*self.groups.parameters(), *self.gene_pool.parameters()],
        }

    @property
    def branch_widths(self) -> dict[str, int]:
        """h_P and h_G are as wide as the tokens."""
        return {"path": self.dim, "omic": self.dim}
