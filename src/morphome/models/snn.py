"""SNN: self-normalising network on the molecular columns alone.

Klambauer, Unterthiner, Mayr, Hochreiter, "Self-normalizing neural networks", NeurIPS 2017, with the sizes and the
hazard head of the MCAT family.
"""

from __future__ import annotations

from torch import nn

from morphome.models.batch import Batch, require
from morphome.models.omic import OmicEncoder, l1_norm, normal_start


class SNNModel(nn.Module):
    """Four SNN layers and K hazard logits. 982,532 parameters at D = 3062, K = 4.

    The published L1 penalty (1e-4 in MCAT, 1e-5 in PORPOISE) was added to every patient's loss undivided, while the
    loss was divided by the 32 patients of an optimiser step: 32 times too strong. Here the trainer divides both
    alike.

    Args:
        n_omic: D, molecular columns.
        n_bins: K.
        dim: width of every layer.
        layers: number of SNN layers; 4 in MCAT and PORPOISE, 2 in SurvPath.
        dropout: alpha dropout of every layer.
        l1: weight of the sum of absolute parameters; 0 leaves it out.
    """

    needs = frozenset({"omic_all"})
    supports: frozenset[str] = frozenset()
    head = "hazard"
    order_sensitive = False

    def __init__(
        self,
        n_omic: int,
        n_bins: int,
        *,
        dim: int = 256,
        layers: int = 4,
        dropout: float = 0.25,
        l1: float = 1e-5,
    ) -> None:
        super().__init__()
        self.l1 = l1
        self.encoder = OmicEncoder(n_omic, dim, layers, dropout)
        self.classifier = nn.Linear(dim, n_bins)
        normal_start(self)

    def forward(self, batch: Batch) -> dict:
        """One patient -> logits (1, K); ``extra_losses["l1"]`` in training when its weight is not 0.

        Raises:
            MorphomeError: the patient has no molecular columns, or another number of them.
        """
        require(batch, self.needs)
        logits = self.classifier(self.encoder(batch)).unsqueeze(0)
        penalty = {"l1": self.l1 * l1_norm(self)} if self.l1 and self.training else {}
        return {"logits": logits, "extra_losses": penalty, "attn": {}, "aux": {}}
