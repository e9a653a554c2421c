"""Self-normalising network over all molecular columns of a patient, and the L1 penalty that goes with it.

Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017; with ELU, as the MCAT family has it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.models.batch import Batch
from morphome.models.layers import SNN, stand_in


class OmicEncoder(nn.Module):
    """``layers`` SNN layers, n_omic -> dim -> ... -> dim.

    After :meth:`add_missing` a learned vector stands in for a patient without molecular columns.

    Args:
        n_omic: D, molecular columns.
        dim: width of every layer.
        layers: number of layers, >= 1.
        dropout: of every layer.

    Raises:
        MorphomeError: no molecular column, or no layer.
    """

    def __init__(self, n_omic: int, dim: int, layers: int, dropout: float) -> None:
        super().__init__()
        if n_omic < 1 or layers < 1:
            raise MorphomeError(
                f"a network over molecular columns with {n_omic} columns and {layers} layers",
                "configure a molecular panel and at least 1 layer",
            )
        self.n_omic, self.dim = n_omic, dim
        self.layers = nn.Sequential(*(SNN(dim if i else n_omic, dim, dropout) for i in range(layers)))
        self.register_parameter("missing", None)

    def add_missing(self) -> None:
        """Own the vector of :func:`~morphome.models.layers.stand_in`, (dim,)."""
        self.missing = stand_in(self.dim)

    def forward(self, batch: Batch) -> Tensor:
        """x_all (D,), or None for a patient without molecular columns -> (dim,).

        Raises:
            MorphomeError: another number of columns than the model was built for; None without a vector for it.
        """
        x = batch.omic_all
        if x is None and self.missing is not None:
            return self.missing
        if x is None or x.shape != (self.n_omic,):
            found = "no molecular columns" if x is None else f"molecular columns of shape {tuple(x.shape)}"
            raise MorphomeError(
                f"patient {batch.patient_id or '(no id)'}: {found}, expected ({self.n_omic},)",
                "train and predict with the same molecular columns",
            )
        return self.layers(x)


def normal_start(module: nn.Module) -> None:
    """Weights of every linear layer from N(0, 1 / fan_in), biases 0: the start that keeps SNN units standardised."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, 0.0, 1 / math.sqrt(part.in_features))
            nn.init.zeros_(part.bias)


def l1_norm(*modules: nn.Module) -> Tensor:
    """Sum of the absolute values of all trainable parameters of the modules, a scalar."""
    return torch.stack([p.abs().sum() for module in modules for p in module.parameters() if p.requires_grad]).sum()
