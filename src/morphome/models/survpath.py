"""SurvPath: pathway tokens and patch tokens in one attention layer that leaves patch-to-patch attention out.

Jaume et al., "Modeling dense multimodal interactions between biological pathways and histology for survival
prediction", CVPR 2024, 11579-11590.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morphome.models.batch import Batch, require
from morphome.models.fusion import Encoded, FusionModel
from morphome.models.layers import Dropout, GroupEncoder


class PathwayPatchAttention(nn.Module):
    """One-head attention without output projection and residual; cost (T + N) T + N T instead of (T + N)^2.

    ``out_P = softmax([q_P k_P^T, q_P k_H^T] / sqrt d) [v_P; v_H]``, ``out_H = softmax(q_H k_P^T / sqrt d) v_P``.

    Args:
        dim: width of a token.
        attention_dim: d, width of q, k, v.
    """

    def __init__(self, dim: int, attention_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, attention_dim, bias=False)
        self.key = nn.Linear(dim, attention_dim, bias=False)
        self.value = nn.Linear(dim, attention_dim, bias=False)

    def forward(self, tokens: Tensor, n_pathways: int) -> tuple[Tensor, Tensor, Tensor]:
        """Attend.

        Args:
            tokens: (T + N, dim), the T pathways first.
            n_pathways: T.

        Returns:
            Output (T + N, d); attention of the pathways (T, T + N) and of the patches over the pathways (N, T).
            Every row of both sums to 1.
        """
        q, k, v = self.query(tokens), self.key(tokens), self.value(tokens)
        q = q * q.shape[-1] ** -0.5
        pathways = torch.softmax(q[:n_pathways] @ k.T, -1)
        patches = torch.softmax(q[n_pathways:] @ k[:n_pathways].T, -1)
        out = torch.cat([pathways @ v, patches @ v[:n_pathways]])
        return out, pathways, patches


class FeedForward(nn.Module):
    """LN(Lin(Dropout(GELU(Lin(LN x))))) of one width, without residual."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(dim)
        self.first = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)
        self.second = nn.Linear(dim, dim)
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_out(self.second(self.dropout(F.gelu(self.first(self.norm_in(x))))))


class SurvPath(FusionModel):
    """Gene groups as pathway tokens. Invariant to the order of the patches; no padding, so no mask.

    ``P_i = SNN(SNN(x_i))``, ``H = Lin X``, ``z = FeedForward(attention(LN [P; H]))``, ``logits =
    Lin(ReLU(Lin [mean_P z; mean_H z]))``. 24,768,068 parameters with the published 331 pathways (9,745 columns) at
    d_in = 1024, K = 4, of them 411,460 outside the pathway networks.

    The published training takes the expression of another patient (rows by position) and lets zero vectors that
    fill short bags take part; here rows are joined by patient id and a bag has the length that it has. Published
    were also ``training.beta`` 0.5 and at most 4096 patches per bag in training: both are settings of the trainer.

    Args:
        d_in: width of the patch features.
        group_sizes: columns per pathway, in the order of ``Batch.groups``.
        n_bins: K.
        dim: width of a token.
        attention_dim: width of queries, keys, values and of everything behind them.
        head_dim: width before the classifier.
        dropout: alpha dropout of the pathway networks.
        feedforward_dropout: of the feed-forward block.
        missing_tokens: build learned tokens that stand in for P of a patient without genes.
    """

    needs = frozenset({"path", "omic_groups"})
    supports = frozenset({"missing_omic"})
    head = "hazard"
    order_sensitive = False

    def __init__(
        self,
        d_in: int,
        group_sizes: Mapping[str, int],
        n_bins: int,
        *,
        dim: int = 256,
        attention_dim: int = 128,
        head_dim: int = 64,
        dropout: float = 0.25,
        feedforward_dropout: float = 0.1,
        missing_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.d_in, self.width = d_in, attention_dim
        self.required = self.needs - {"omic_groups"} if missing_tokens else self.needs
        self.pathways = GroupEncoder(list(group_sizes.values()), dim, dropout)
        self.project = nn.Linear(d_in, dim)
        self.norm = nn.LayerNorm(dim)
        self.attention = PathwayPatchAttention(dim, attention_dim)
        self.feedforward = FeedForward(attention_dim, feedforward_dropout)
        self.hidden = nn.Linear(2 * attention_dim, head_dim)
        self.classifier = nn.Linear(head_dim, n_bins)
        if missing_tokens:
            self.pathways.add_missing()

    def encode(self, batch: Batch) -> Encoded:
        """One patient -> ``z`` mean_H z and mean_P z, (1, attention_dim) each.

        ``attn["pathways"]`` (T, T + N) is what each pathway reads, the pathways first; ``attn["patches"]`` (N, T) is
        what each patch reads. Rows sum to 1.

        Raises:
            MorphomeError: the patient has no patch features or gene groups, or of other shapes.
        """
        require(batch, self.required, self.d_in)
        pathways, patches = self.pathways(batch.groups), self.project(batch.path)
        n = pathways.shape[0]
        out, of_pathways, of_patches = self.attention(self.norm(torch.cat([pathways, patches])), n)
        z = self.feedforward(out)
        return Encoded(
            {"path": z[n:].mean(0, keepdim=True), "omic": z[:n].mean(0, keepdim=True)},
            attn={"pathways": of_pathways.detach(), "patches": of_patches.detach()},
        )

    def fuse(self, z: Mapping[str, Tensor]) -> Tensor:
        """Both means (1, attention_dim) -> logits (1, K)."""
        e = torch.cat([z["omic"], z["path"]], 1).squeeze(0)
        return self.classifier(F.relu(self.hidden(e))).unsqueeze(0)

    def branch_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Projection of the patches, networks of the pathways; from the first norm on both share all weights."""
        return {"path": list(self.project.parameters()), "omic": list(self.pathways.parameters())}

    @property
    def branch_widths(self) -> dict[str, int]:
        """Both means have the width of the attention."""
        return {"path": self.width, "omic": self.width}
