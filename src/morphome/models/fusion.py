"""What models of slides and genes have in common: two branches that meet in a fusion.

The trainer's plug-ins (balance of the modalities, diagnostics per branch) see a model only through this interface.

What fusion means here: both modalities are read together. A pure interaction, risk = sign(z1 z2) without any effect of
slides or genes alone, was not found by a model of this interface in planted cohorts of 400 patients with 144 molecular
columns (scenario X1 of ``morphome validate``; figures in docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from morphome.models.batch import Batch

#: Key of a model's output by head.
OUTPUT = {"hazard": "logits", "cox": "log_risk"}
BRANCHES = ("path", "omic")


@dataclass(frozen=True)
class Encoded:
    """What the branches hand to the fusion.

    Args:
        z: ``path`` (n_p, d_p) and ``omic`` (n_g, d_g), one row or tokens; further keys belong to no branch.
        extra_losses, attn, aux: as in a model's output.
    """

    z: dict[str, Tensor]
    extra_losses: dict[str, Tensor] = field(default_factory=dict)
    attn: dict[str, Tensor] = field(default_factory=dict)
    aux: dict[str, Any] = field(default_factory=dict)


class FusionModel(nn.Module):
    """A model of slides and genes in two parts: ``forward = fuse(encode)``."""

    head = "hazard"

    def encode(self, batch: Batch) -> Encoded:
        """One patient up to the fusion."""
        raise NotImplementedError

    def fuse(self, z: Mapping[str, Tensor]) -> Tensor:
        """What the branches hand over -> logits (1, K), or log risk (1, 1) with the head "cox"."""
        raise NotImplementedError

    def branch_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters that only one modality passes before fusion, by branch."""
        raise NotImplementedError

    @property
    def branch_widths(self) -> dict[str, int]:
        """Width d_u of ``z[u]`` by branch."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> dict[str, Any]:
        """One patient -> the output of a model.

        Raises:
            MorphomeError: a part that the model needs is missing or misshapen.
        """
        return self.output(self.encode(batch))

    def output(self, encoded: Encoded, z: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """The output of a model from its encoded patient; with ``z`` that is fused instead of the encoder's own."""
        return {
            OUTPUT[self.head]: self.fuse(encoded.z if z is None else z),
            "extra_losses": encoded.extra_losses,
            "attn": encoded.attn,
            "aux": encoded.aux,
        }
