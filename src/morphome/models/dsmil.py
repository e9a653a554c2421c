"""DSMIL: dual-stream multiple instance learning on the slides alone.

Li, Li, Eliceiri, "Dual-stream multiple instance learning network for whole slide image classification with
self-supervised contrastive learning", CVPR 2021, with the K time bins in the place of the classes. The first stream
scores every patch for every bin and takes the maximum. The second attends, per bin, to the patches that resemble the
one with the maximum. The logits are the mean of both.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from morphome.models.batch import Batch, require
from morphome.models.layers import FC


class DSMIL(nn.Module):
    """Two streams over one projection; invariant to the order of the patches. 995,720 parameters (d_in = 1024, K = 4).

    With h = FC(d_in -> dim) and c = Lin(dim -> K)(h), the critical patch of bin k is the first of the largest c_nk.
    q = Lin(dim -> query_dim)(h), A_nk = softmax over n of q_n . q_crit(k) / sqrt(query_dim), and
    B_k = sum over n of A_nk Lin(dim -> dim)(h_n). A convolution over the whole width turns B, after a layer norm, into
    the K logits of the second stream.

    Args:
        d_in: width of the patch features.
        n_bins: K, of both streams.
        dim: width of a projected patch.
        query_dim: width of the queries.
        ln: layer norm of B, which later code added; false is the paper.
        dropout: of the projection.
    """

    needs = frozenset({"path"})
    supports = frozenset({"wsi_only_inference"})
    head = "hazard"
    order_sensitive = False

    def __init__(
        self,
        d_in: int,
        n_bins: int,
        *,
        dim: int = 512,
        query_dim: int = 384,
        ln: bool = True,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        self.d_in = d_in
        self.project = FC(d_in, dim, dropout)
        self.instance = nn.Linear(dim, n_bins)
        self.query = nn.Linear(dim, query_dim)
        self.value = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim) if ln else nn.Identity()
        self.bag = nn.Conv1d(n_bins, n_bins, dim)

    def forward(self, batch: Batch) -> dict:
        """One patient -> logits (1, K), ``attn["bag"]`` (K, N), whose rows sum to 1, and ``aux["critical"]`` (K,).

        ``aux["pooled"]`` (1, dim): mean over the bins of B, what the second stream classifies.

        Raises:
            MorphomeError: the patient has no patch features, or of another width.
        """
        require(batch, self.needs, self.d_in)
        h = self.project(batch.path)
        scores = self.instance(h)
        critical = scores.detach().argmax(0)
        # Neither queries nor values of all patches are computed: q_n . q_crit = h_n . (W^T q_crit) + a constant that
        # the softmax takes out, and the weights of a bin sum to 1, so that the values may be pooled first.
        query = self.query(h[critical]) @ self.query.weight / math.sqrt(self.query.out_features)
        weights = torch.softmax(h @ query.T, 0)
        values = self.norm(self.value(weights.T @ h))
        streams = scores.gather(0, critical.unsqueeze(0)), self.bag(values.unsqueeze(0)).squeeze(-1)
        return {
            "logits": (streams[0] + streams[1]) / 2,
            "extra_losses": {},
            "attn": {"bag": weights.T.detach()},
            "aux": {"critical": critical, "pooled": values.mean(0, keepdim=True)},
        }
