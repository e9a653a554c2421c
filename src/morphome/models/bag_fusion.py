"""What the fusion rows of the bag models have in common: one vector of the slides, one of the genes, one fusion.

Chen et al., "Multimodal Co-Attention Transformer for Survival Prediction in Gigapixel Whole Slide Images", ICCV 2021,
compares with these: a bag network cut before its classifier, SNN(f -> f)(SNN(D -> f)) over all molecular columns, and
both fused by concatenation or by the gated Kronecker product.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.models.batch import Batch, require
from morphome.models.coattention import FUSIONS, make_fusion
from morphome.models.fusion import Encoded, FusionModel
from morphome.models.layers import FC
from morphome.models.omic import OmicEncoder


class BagFusion(FusionModel):
    """``logits = Lin(fusion(h_P, h_G))``, ``h_P = FC(dim -> f)(pool(FC(d_in -> dim)(X)))``, ``h_G = SNN(SNN(x_all))``.

    A subclass pools.

    Args:
        key: of the registry, for messages.
        d_in: width of the patch features.
        n_omic: D, molecular columns.
        n_bins: K.
        missing_tokens: own one learned vector that stands in for h_G where a patient has no molecular values.
        dim: width of a projected patch.
        fusion_dim: f, width of h_P, h_G and of the fused vector.
        fusion: ``concat``, two layers over [h_P; h_G], or ``bilinear``.
        dropout: of all blocks.

    Raises:
        MorphomeError: unknown fusion, or a width that the product cannot reduce; no molecular column.
    """

    needs = frozenset({"path", "omic_all"})
    supports = frozenset({"missing_omic"})
    head = "hazard"
    order_sensitive = False

    def __init__(
        self,
        key: str,
        d_in: int,
        n_omic: int,
        n_bins: int,
        missing_tokens: bool,
        *,
        dim: int,
        fusion_dim: int,
        fusion: str,
        dropout: float,
    ) -> None:
        super().__init__()
        if fusion not in FUSIONS:
            raise MorphomeError(f"models.{key}.fusion: {fusion!r} is not known", f"choose {' or '.join(FUSIONS)}")
        if fusion == "bilinear" and fusion_dim < 8:
            raise MorphomeError(
                f"models.{key}.fusion_dim: {fusion_dim} with fusion bilinear", "choose a fusion_dim of at least 8"
            )
        self.d_in, self.fusion_dim = d_in, fusion_dim
        self.project = FC(d_in, dim, dropout)
        self.hidden = FC(dim, fusion_dim, dropout)
        self.genes = OmicEncoder(n_omic, fusion_dim, 2, dropout)
        self.fusion = make_fusion(fusion, fusion_dim, dropout)
        self.classifier = nn.Linear(fusion_dim, n_bins)
        # Without a random number, so that all other weights are those of the plain model.
        self.missing = nn.Parameter(torch.zeros(1, fusion_dim)) if missing_tokens else None

    def pool_patches(self, h: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Projected patches (N, dim) -> (1, dim) and what goes into ``attn``."""
        raise NotImplementedError

    def encode(self, batch: Batch) -> Encoded:
        """``z["path"]`` and ``z["omic"]``, both (1, f).

        Raises:
            MorphomeError: the patient lacks patch features, or has no molecular values and the model no stand-in for
                them, or has either in another width.
        """
        require(batch, self.needs if self.missing is None else frozenset({"path"}), self.d_in)
        pooled, attn = self.pool_patches(self.project(batch.path))
        genes = self.missing if batch.omic_all is None else self.genes(batch).unsqueeze(0)
        return Encoded({"path": self.hidden(pooled), "omic": genes}, attn=attn)

    def fuse(self, z: Mapping[str, Tensor]) -> Tensor:
        """(1, f), (1, f) -> logits (1, K)."""
        return self.classifier(self.fusion(z["path"], z["omic"]))

    def branch_parameters(self) -> dict[str, list[nn.Parameter]]:
        """All but fusion and classifier."""
        both = {id(p) for part in (self.fusion, self.classifier) for p in part.parameters()}
        omic = list(self.genes.parameters()) + ([] if self.missing is None else [self.missing])
        rest = both | {id(p) for p in omic}
        return {"path": [p for p in self.parameters() if id(p) not in rest], "omic": omic}

    @property
    def branch_widths(self) -> dict[str, int]:
        """f for both."""
        return dict.fromkeys(("path", "omic"), self.fusion_dim)
