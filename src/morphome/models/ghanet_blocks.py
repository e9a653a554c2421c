"""The two branches of G-HANet and their blocks.

Wang et al., "Histo-Genomic Knowledge Association for Cancer Prognosis From Histopathology Whole Slide Images", IEEE
TMI 44 (2025) 2170. Feed-forward: Shazeer, "GLU variants improve Transformer", arXiv 2002.05202. Written from the
formulas.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morphome.models.layers import FC, Dropout


class HeadAttention(nn.Module):
    """Attention of several heads from a few queries to a memory of any length.

    Projections of queries, keys and values without bias, scale (d / heads)^(-1/2), dropout on the weights, biased
    output layer: 4 d^2 + d parameters. The memory is never projected: per head q (W_k m) = (q W_k) m and
    sum_n w_n (W_v m_n) = W_v (sum_n w_n m_n), the same in exact arithmetic at the cost of the few queries.

    Args:
        dim: d; heads: divides ``dim``; dropout: of the attention weights.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, queries: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Attend from queries (t, d) to memory (n, d).

        Returns:
            Output (t, d), and the scaled scores before the softmax (heads, t, n).
        """
        t, d = queries.shape
        h = self.heads
        q = self.query(queries).unflatten(-1, (h, -1)).transpose(0, 1) * (d // h) ** -0.5  # (h, t, d / h)
        read_by = q @ self.key.weight.unflatten(0, (h, -1))  # (h, t, d)
        scores = (read_by.flatten(0, 1) @ memory.T).unflatten(0, (h, t))
        weights = self.dropout(scores.softmax(-1))
        read = (weights.flatten(0, 1) @ memory).unflatten(0, (h, t))
        values = read @ self.value.weight.unflatten(0, (h, -1)).transpose(1, 2)  # (h, t, d / h)
        return self.out(values.transpose(0, 1).flatten(1)), scores


class GatedFeedForward(nn.Module):
    """Dropout(Lin hidden -> d (a * GELU(b))) with [a; b] = Lin d -> 2 hidden; (..., d) -> (..., d)."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.first(x).chunk(2, -1)
        return self.dropout(self.second(value * F.gelu(gate)))


class GeneDecoder(nn.Module):
    """Lin d -> n_genes (Dropout(ELU(LN(Lin d -> d)))), no activation at the end; (d,) -> (n_genes,)."""

    def __init__(self, dim: int, n_genes: int, dropout: float) -> None:
        super().__init__()
        self.hidden, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)
        self.out = nn.Linear(dim, n_genes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(F.elu(self.norm(self.hidden(x)))))


def scaled_cosine_error(predicted: Tensor, target: Tensor, gamma: float) -> Tensor:
    """SCE = (1 - cos)^gamma of two vectors (m,), a scalar >= 0; the cosine with a vector of zeros counts as 0."""
    # Rounding can take the cosine past 1, whose broken power would be NaN.
    return (1 - F.cosine_similarity(predicted, target, dim=0)).clamp(min=0) ** gamma


def top_share(scores: Tensor, ratio: float) -> Tensor:
    """Weights of the best scored share of the columns: softmax over the k best of every row, 0 elsewhere.

    Args:
        scores: (t, n).
        ratio: share in (0, 1]; k = max(1, int(ratio n)). Ties with the k-th best are kept.

    Returns:
        (t, n); rows sum to 1.
    """
    k = max(1, int(ratio * scores.shape[1]))
    bound = scores.topk(k, dim=1).values[:, -1:]
    return scores.masked_fill(scores < bound, -torch.inf).softmax(-1)


class AssociatingBranch(nn.Module):
    """CAB: learned tokens, one per gene group, read the patches twice; what they read predicts the genes.

    ``Hr = FC(X)``; ``A1 = MHCA(LN Q, LN Hr)``; ``F1 = A1 + FFN(LN A1)``; ``A2, M = MHCA(LN(Q + F1), LN Hr)``;
    ``Fg = LN(A2 + FFN(LN A2))``; ``x_g = Decoder_g(Fg[g])``. 9,465,856 + 513 sum_g m_g parameters at d_in = 1024,
    d = 512 and six groups; 1,049,088 more when the two readings have weights of their own.

    Args:
        sizes: genes to predict per group; a group with 0 has no decoder.
        The others as for :class:`~morphome.models.ghanet.GHANet`.
    """

    def __init__(
        self, d_in: int, sizes: list[int], dim: int, heads: int, feedforward: int, share: bool, dropout: float
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.project = FC(d_in, dim, dropout)
        self.tokens = nn.Parameter(torch.randn(len(sizes), dim))
        self.attention = HeadAttention(dim, heads, dropout)
        self.second_attention = None if share else HeadAttention(dim, heads, dropout)
        self.first_feedforward = GatedFeedForward(dim, feedforward, dropout)
        self.second_feedforward = GatedFeedForward(dim, feedforward, dropout)
        self.norm_tokens, self.norm_patches = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm_first, self.norm_again = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm_second, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.decoders = nn.ModuleDict({str(g): GeneDecoder(dim, m, dropout) for g, m in enumerate(sizes) if m})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """X (N, d_in) -> Fg (T, d) and the scores M (heads, T, N) of the second reading, before any softmax."""
        patches = self.norm_patches(self.project(x))
        first, _ = self.attention(self.norm_tokens(self.tokens), patches)
        first = first + self.first_feedforward(self.norm_first(first))
        second_attention = self.attention if self.second_attention is None else self.second_attention
        second, scores = second_attention(self.norm_again(self.tokens + first), patches)
        second = second + self.second_feedforward(self.norm_second(second))
        return self.norm_out(second), scores

    def decode(self, genes: Tensor) -> tuple[Tensor, ...]:
        """Fg (T, d) -> the predicted z-scores of the chosen columns of each group, (m_g,)."""
        return tuple(self.decoders[str(g)](genes[g]) if m else genes.new_zeros(0) for g, m in enumerate(self.sizes))


class SurvivalBranch(nn.Module):
    """HSB: pools the patches once per group, by morphology and by where the genes look; 5,654,533 parameters.

    ``H = Dropout(ReLU(LN(Lin X)))``; ``Z = mean of the given weights (T, N) times H``; ``HM(Z) = ReLU(LN(W_b
    ReLU(LN(W_a Z)))) + Z``; F = HM(Z), averaged with Fg when there is one; ``F <- F + MHSA(F)``; ``F <- F +
    FFN(LN F)``; ``v = flatten(Dropout(ReLU(LN(Lin F))))``; ``logits = Lin v``.
    """

    def __init__(
        self,
        d_in: int,
        n_groups: int,
        n_bins: int,
        dim: int,
        heads: int,
        feedforward: int,
        attention_dim: int,
        head_dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.n_groups = n_groups
        self.project, self.norm_patches = nn.Linear(d_in, dim), nn.LayerNorm(dim)
        # Without morphology in the pooling nothing would train these.
        self.tanh = nn.Linear(dim, attention_dim) if attention_dim else None
        self.gate = nn.Linear(dim, attention_dim) if attention_dim else None
        self.score = nn.Linear(attention_dim, 1) if attention_dim else None
        self.mix_first, self.mix_second = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_mix_first, self.norm_mix_second = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = HeadAttention(dim, heads, dropout)
        self.norm_feedforward = nn.LayerNorm(dim)
        self.feedforward = GatedFeedForward(dim, feedforward, dropout)
        self.hidden, self.norm_hidden = nn.Linear(dim, head_dim), nn.LayerNorm(head_dim)
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(n_groups * head_dim, n_bins)

    def forward(
        self, x: Tensor, gene_weights: Tensor | None, genes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One bag -> logits.

        Args:
            x: X (N, d_in).
            gene_weights: W_gen (T, N), or None to pool by morphology alone.
            genes: Fg (T, d), or None to leave it out.

        Returns:
            logits (1, K), v (1, T head_dim), and W_morph (1, N), None when there is no morphology in the pooling.
        """
        h = self.dropout(F.relu(self.norm_patches(self.project(x))))
        morphology = None
        weights = gene_weights
        if self.score is not None:
            scores = self.score(torch.tanh(self.tanh(h)) * torch.sigmoid(self.gate(h)))
            morphology = scores.T.softmax(-1)
            weights = morphology if gene_weights is None else (morphology + gene_weights) / 2
        z = (weights @ h).expand(self.n_groups, -1)
        mixed = F.relu(self.norm_mix_first(self.mix_first(z)))
        f = F.relu(self.norm_mix_second(self.mix_second(mixed))) + z
        if genes is not None:
            f = (f + genes) / 2
        f = self.attention(f, f)[0] + f
        f = self.feedforward(self.norm_feedforward(f)) + f
        v = self.dropout(F.relu(self.norm_hidden(self.hidden(f)))).flatten().unsqueeze(0)
        return self.classifier(v), v, morphology
