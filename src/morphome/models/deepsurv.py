"""DeepSurv: a feed-forward network on the molecular columns with a Cox head.

Katzman et al., "DeepSurv: personalized treatment recommender system using a Cox proportional hazards deep neural
network", BMC Med Res Methodol 18 (2018) 24. Written from the formulas.
"""

from __future__ import annotations

from torch import nn

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.layers import Dropout
from morphome.models.molecular import vector

NORMS = ("layer", "none")


class DeepSurv(nn.Module):
    """``layers`` times Lin, norm, ReLU, Dropout, then one linear unit: the log risk. Genes alone.

    Without normalisation D·dim + dim + (layers - 1)(dim² + dim) + dim parameters, layer norm adds 2·dim per layer:
    200,512 at D = 3062 and the defaults.

    The published networks have SELU and no normalisation, or batch normalisation, as the search finds. Here patients
    come one at a time, and a mean and SD over one patient do not exist; layer normalisation, over the units of one
    patient, takes its place, so that a patient's log risk does not depend on who else is in the window. The published
    weight decay is the trainer's. The last layer has no bias: Cox's likelihood does not change when a constant is added
    to every log risk, so it would never be trained.

    Args:
        n_omic: D, molecular columns.
        dim: width of every hidden layer.
        layers: number of hidden layers; 1 to 4 were searched.
        dropout: of every hidden layer.
        norm: ``layer`` or ``none``.

    Raises:
        MorphomeError: no molecular column, no layer, or an unknown norm.
    """

    needs = frozenset({"omic_all"})
    supports: frozenset[str] = frozenset()
    head = "cox"
    order_sensitive = False

    def __init__(
        self, n_omic: int, *, dim: int = 64, layers: int = 2, dropout: float = 0.25, norm: str = "layer"
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise MorphomeError(f"models.deepsurv.norm: {norm!r} is not known", f"choose {' or '.join(NORMS)}")
        if n_omic < 1 or layers < 1:
            raise MorphomeError(
                f"models.deepsurv: {n_omic} molecular columns and {layers} layers",
                "configure a molecular panel and at least 1 layer",
            )
        self.n_omic = n_omic
        parts: list[nn.Module] = []
        for i in range(layers):
            parts.append(nn.Linear(dim if i else n_omic, dim))
            if norm == "layer":
                parts.append(nn.LayerNorm(dim))
            parts += [nn.ReLU(), Dropout(dropout)]
        self.hidden = nn.Sequential(*parts)
        self.classifier = nn.Linear(dim, 1, bias=False)

    def forward(self, batch: Batch) -> dict:
        """One patient -> log risk (1, 1).

        Raises:
            MorphomeError: the patient has no molecular columns, or another number of them.
        """
        x = vector(batch, "omic_all", self.n_omic).unsqueeze(0)
        return {"log_risk": self.classifier(self.hidden(x)), "extra_losses": {}, "attn": {}, "aux": {}}
