"""Kronecker-product fusion of two vectors with gates, as in PORPOISE and MCAT.

Chen et al., "Pathomic Fusion", IEEE TMI 41 (2022) 757 (gates and Kronecker product of unimodal vectors); Chen et
al., Cancer Cell 40 (2022) 865 (the sizes used here). The low-rank variant of the public code is left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.models.layers import Dropout


class Reduce(nn.Module):
    """o = Dropout(ReLU(Lin(sigmoid(z) * ReLU(Lin own)))), z = Lin [u; v]; without a gate there is no sigmoid(z).

    The gate looks at both vectors and damps units of one of them.

    Args:
        own: which of the two vectors is reduced, 0 or 1.
        gate: ``"none"``, ``"linear"`` (z = Lin [u; v]) or ``"bilinear"`` (z = Bilinear(u, v)).
    """

    def __init__(self, dims: tuple[int, int], reduced: int, own: int, gate: str, dropout: float) -> None:
        super().__init__()
        self.own = own
        self.hidden = nn.Linear(dims[own], reduced)
        self.gate = None
        if gate == "linear":
            self.gate = nn.Linear(sum(dims), reduced)
        elif gate == "bilinear":
            self.gate = nn.Bilinear(*dims, reduced)
        self.out = nn.Linear(reduced, reduced)
        self.dropout = Dropout(dropout)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """u (dim_a,), v (dim_b,) -> (reduced,), not negative."""
        hidden = F.relu(self.hidden((u, v)[self.own]))
        if isinstance(self.gate, nn.Bilinear):
            hidden = torch.sigmoid(self.gate(u, v)) * hidden
        elif self.gate is not None:
            hidden = torch.sigmoid(self.gate(torch.cat([u, v]))) * hidden
        return self.dropout(F.relu(self.out(hidden)))


class KronFusion(nn.Module):
    """k = vec([o1; 1] x [o2; 1]); e = ReLU(Lin(Dropout k)); e = [e; u; v] if skip; out = ReLU(Lin e).

    o1 and o2 come from u and v by :class:`Reduce`. The appended ones keep o1, o2 and a constant in k beside their
    products.

    Args:
        dim_a: width of u.
        dim_b: width of v.
        out: width of both layers behind k and of the result.
        scale: o1 and o2 have width ``dim_a // scale`` and ``dim_b // scale``.
        gates: of o1 and of o2.
        skip: append u and v.
        bilinear_gate: z by a bilinear form instead of a linear map of [u; v].
        dropout: of o1, o2 and k.
        encoder_dropout: behind the ReLU of both layers; 0 in PORPOISE, 0.25 in MCAT.

    Raises:
        MorphomeError: ``scale`` leaves no unit.
    """

    def __init__(
        self,
        dim_a: int,
        dim_b: int,
        out: int,
        *,
        scale: int = 8,
        gates: tuple[bool, bool] = (True, True),
        skip: bool = True,
        bilinear_gate: bool = False,
        dropout: float = 0.25,
        encoder_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dims, reduced = (dim_a, dim_b), (dim_a // scale, dim_b // scale)
        if min(reduced) < 1:
            raise MorphomeError(
                f"Kronecker fusion: widths {dim_a} and {dim_b} over scale {scale} leave no unit",
                "choose a smaller scale or wider vectors",
            )
        kind = "bilinear" if bilinear_gate else "linear"
        self.skip = skip
        self.reduce = nn.ModuleList(
            Reduce(dims, reduced[own], own, kind if gates[own] else "none", dropout) for own in (0, 1)
        )
        self.dropout = Dropout(dropout)
        self.first = nn.Linear((reduced[0] + 1) * (reduced[1] + 1), out)
        self.second = nn.Linear(out + (dim_a + dim_b if skip else 0), out)
        self.encoder_dropout = Dropout(encoder_dropout)

    def product(self, u: Tensor, v: Tensor) -> Tensor:
        """k, ((dim_a // scale + 1) (dim_b // scale + 1),); the index of o2 runs fastest."""
        o1, o2 = (F.pad(part(u, v), (0, 1), value=1.0) for part in self.reduce)
        return torch.outer(o1, o2).flatten()

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """u (dim_a,), v (dim_b,) -> (out,)."""
        e = self.encoder_dropout(F.relu(self.first(self.dropout(self.product(u, v)))))
        if self.skip:
            e = torch.cat([e, u, v])
        return self.encoder_dropout(F.relu(self.second(e)))
