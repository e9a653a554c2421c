"""ABMIL: attention-based multiple instance learning on the slides alone.

Ilse, Tomczak, Welling, "Attention-based deep multiple instance learning", ICML 2018, with the hazard head of the
MCAT family: FC(d_in -> dim), gated attention pooling, FC(dim -> head_dim), K hazard logits.
"""

from __future__ import annotations

from torch import nn

from morphome.models.batch import Batch, require
from morphome.models.layers import FC, GatedAttention


class ABMIL(nn.Module):
    """Gated attention pooling; invariant to the order of the patches. 920,069 parameters at d_in = 1024, K = 4.

    Args:
        d_in: width of the patch features.
        n_bins: K.
        dim: width of a projected patch.
        attention_dim: hidden width of the gated attention.
        head_dim: width before the classifier.
        dropout: of all three blocks.
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
        attention_dim: int = 256,
        head_dim: int = 256,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        self.d_in = d_in
        self.project = FC(d_in, dim, dropout)
        self.pool = GatedAttention(dim, attention_dim, 1, dropout)
        self.hidden = FC(dim, head_dim, dropout)
        self.classifier = nn.Linear(head_dim, n_bins)

    def forward(self, batch: Batch) -> dict:
        """One patient -> logits (1, K), ``attn["gated"]`` (N,), which sums to 1, and ``aux["pooled"]`` (1, dim).

        Raises:
            MorphomeError: the patient has no patch features, or of another width.
        """
        require(batch, self.needs, self.d_in)
        pooled, weights = self.pool(self.project(batch.path))
        logits = self.classifier(self.hidden(pooled))
        return {
            "logits": logits,
            "extra_losses": {},
            "attn": {"gated": weights.squeeze(1).detach()},
            "aux": {"pooled": pooled},
        }
