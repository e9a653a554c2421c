"""PORPOISE: slides and molecular columns fused by a gated Kronecker product; and its model of the slides alone.

Chen et al., "Pan-cancer integrative histology-genomic analysis via multimodal deep learning", Cancer Cell 40 (2022)
865-878, doi 10.1016/j.ccell.2022.07.004.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from morphome.models.batch import Batch, require
from morphome.models.fusion import Encoded, FusionModel
from morphome.models.kron import KronFusion
from morphome.models.layers import FC, Dropout, GatedAttention
from morphome.models.omic import OmicEncoder, l1_norm


class PORPOISE(FusionModel):
    """The multimodal network (MMF). Invariant to the order of the patches.

    ``h_P = FC(GA(FC(Dropout X)))``, ``h_G = SNN(SNN(x_all))``, ``logits = Lin(KronFusion(h_P, h_G))``. 2,078,661
    parameters at d_in = 1024, D = 2208, K = 4.

    The defaults are those of the published class. The published launch script turns gates, skip and input dropout
    off; ``launcher_legacy`` does the same. The published L1 penalty was not divided by the accumulation window of
    32 patients, the loss was; here the trainer divides both alike.

    Args:
        d_in: width of the patch features.
        n_omic: D, molecular columns.
        n_bins: K.
        dim: width of a projected patch.
        attention_dim: hidden width of the gated attention.
        fusion_dim: width of h_P, h_G and of the fused vector.
        scale: the fusion reduces h_P and h_G to width ``fusion_dim // scale``.
        gate_path: gate of the slides' part of the product.
        gate_omic: gate of the genes' part.
        skip: h_P and h_G enter the last layer beside the product.
        bilinear_gate: gates by a bilinear form of h_P and h_G.
        dropinput: dropout of the patch features themselves.
        dropout: of all other blocks.
        l1: weight of the sum of absolute parameters of gene network and fusion; 0 leaves it out.
        launcher_legacy: gates and skip off, no input dropout, whatever the four settings above say.
        missing_tokens: build a learned vector that stands in for h_G of a patient without molecular columns. The L1
            penalty leaves it out.
    """

    needs = frozenset({"path", "omic_all"})
    supports = frozenset({"missing_omic"})
    head = "hazard"
    order_sensitive = False

    def __init__(
        self,
        d_in: int,
        n_omic: int,
        n_bins: int,
        *,
        dim: int = 512,
        attention_dim: int = 256,
        fusion_dim: int = 256,
        scale: int = 8,
        gate_path: bool = True,
        gate_omic: bool = True,
        skip: bool = True,
        bilinear_gate: bool = False,
        dropinput: float = 0.1,
        dropout: float = 0.25,
        l1: float = 1e-5,
        launcher_legacy: bool = False,
        missing_tokens: bool = False,
    ) -> None:
        super().__init__()
        if launcher_legacy:
            gate_path, gate_omic, skip, dropinput = False, False, False, 0.0
        self.d_in, self.l1, self.width = d_in, l1, fusion_dim
        self.required = self.needs - {"omic_all"} if missing_tokens else self.needs
        self.dropinput = Dropout(dropinput)
        self.project = FC(d_in, dim, dropout)
        self.pool = GatedAttention(dim, attention_dim, 1, dropout)
        self.hidden = FC(dim, fusion_dim, dropout)
        self.genes = OmicEncoder(n_omic, fusion_dim, 2, dropout)
        self.fusion = KronFusion(
            fusion_dim,
            fusion_dim,
            fusion_dim,
            scale=scale,
            gates=(gate_path, gate_omic),
            skip=skip,
            bilinear_gate=bilinear_gate,
            dropout=dropout,
        )
        self.classifier = nn.Linear(fusion_dim, n_bins)
        if missing_tokens:
            self.genes.add_missing()

    def encode(self, batch: Batch) -> Encoded:
        """One patient -> ``z`` h_P and h_G, (1, fusion_dim) each, and ``attn["gated"]`` (N,), which sums to 1.

        ``extra_losses["l1"]`` in training when its weight is not 0.

        Raises:
            MorphomeError: the patient lacks patch features or molecular columns, or has them in another width.
        """
        require(batch, self.required, self.d_in)
        pooled, weights = self.pool(self.project(self.dropinput(batch.path)))
        z = {"path": self.hidden(pooled), "omic": self.genes(batch).unsqueeze(0)}
        penalty = {"l1": self.l1 * l1_norm(self.genes.layers, self.fusion)} if self.l1 and self.training else {}
        return Encoded(z, extra_losses=penalty, attn={"gated": weights.squeeze(1).detach()})

    def fuse(self, z: Mapping[str, Tensor]) -> Tensor:
        """h_P (1, fusion_dim), h_G (1, fusion_dim) -> logits (1, K)."""
        return self.classifier(self.fusion(z["path"].squeeze(0), z["omic"].squeeze(0))).unsqueeze(0)

    def branch_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Everything of one modality before the Kronecker product."""
        path = (self.project, self.pool, self.hidden)
        return {"path": [p for part in path for p in part.parameters()], "omic": list(self.genes.parameters())}

    @property
    def branch_widths(self) -> dict[str, int]:
        """h_P and h_G have the width of the fusion."""
        return {"path": self.width, "omic": self.width}


class PorpoiseAMIL(nn.Module):
    """The slides-only network (AMIL): gated attention pooling and one linear map. 789,765 parameters.

    It differs from :class:`~morphome.models.abmil.ABMIL` by the missing hidden layer and by its start: weights
    Xavier-normal, biases 0.

    Args:
        d_in: width of the patch features.
        n_bins: K.
        dim: width of a projected patch.
        attention_dim: hidden width of the gated attention.
        dropout: of both blocks.
    """

    needs = frozenset({"path"})
    supports = frozenset({"wsi_only_inference"})
    head = "hazard"
    order_sensitive = False

    def __init__(
        self, d_in: int, n_bins: int, *, dim: int = 512, attention_dim: int = 256, dropout: float = 0.25
    ) -> None:
        super().__init__()
        self.d_in = d_in
        self.project = FC(d_in, dim, dropout)
        self.pool = GatedAttention(dim, attention_dim, 1, dropout)
        self.classifier = nn.Linear(dim, n_bins)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_normal_(part.weight)
                nn.init.zeros_(part.bias)

    def forward(self, batch: Batch) -> dict:
        """One patient -> logits (1, K), ``attn["gated"]`` (N,), which sums to 1, and ``aux["pooled"]`` (1, dim).

        Raises:
            MorphomeError: the patient has no patch features, or of another width.
        """
        require(batch, self.needs, self.d_in)
        pooled, weights = self.pool(self.project(batch.path))
        return {
            "logits": self.classifier(pooled),
            "extra_losses": {},
            "attn": {"gated": weights.squeeze(1).detach()},
            "aux": {"pooled": pooled},
        }
