"""MoME with parts taken out: without its experts, on the slides alone, on the genes alone.

All keep the encoders, the class token, the last attention layer and the head of :class:`~morphome.models.mome.MoME`,
so that they differ from it in nothing but the part that is gone. What "without MoME" and "slides alone" leave in
its place is not published; the readings are the settings ``variant``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.models.batch import Batch, require
from morphome.models.fusion import Encoded
from morphome.models.layers import ADMIN_OMEGA, GroupEncoder, TransLayer
from morphome.models.mome import MoME, MoMEBody, add_tokens
from morphome.models.nystrom import clear_pinv_errors, note_pinv_error

NO_MOE = {"identity": "fixed:DropX2Fusion", "fixed:TransFusion": "fixed:TransFusion"}
WSI = ("plain", "learned_ref")


def _variant(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise MorphomeError(f"models.{key}.variant: {value!r} is not known", f"choose one of {', '.join(known)}")


class MoMENoMoE(MoME):
    """MoME without a choice of experts.

    Args:
        variant: ``identity``: P2 = P0, G2 = G0, logits = Lin(TransLayer([CLS; P0; G0])[0]). ``fixed:TransFusion``:
            the four layers stay, each with this one expert.
        d_in, group_sizes, n_bins, dim, heads, landmarks, tokens, attention, value_conv, dropout, attention_dropout,
            missing_tokens: as in :class:`~morphome.models.mome.MoME`.

    Raises:
        MorphomeError: a setting that is not known.
    """

    def __init__(
        self,
        d_in: int,
        group_sizes: Mapping[str, int],
        n_bins: int,
        *,
        variant: str = "identity",
        dim: int = 512,
        heads: int = 8,
        landmarks: int = 256,
        tokens: str = "parameter",
        attention: str = "auto",
        value_conv: bool = True,
        dropout: float = 0.25,
        attention_dropout: float = 0.1,
        missing_tokens: bool = False,
    ) -> None:
        _variant("mome_no_moe", variant, tuple(NO_MOE))
        super().__init__(
            d_in,
            group_sizes,
            n_bins,
            dim=dim,
            heads=heads,
            landmarks=landmarks,
            router=NO_MOE[variant],
            tokens=tokens,
            attention=attention,
            value_conv=value_conv,
            dropout=dropout,
            attention_dropout=attention_dropout,
            missing_tokens=missing_tokens,
        )

    def encode(self, batch: Batch) -> Encoded:
        """One patient -> ``z`` P2 (N, D) and G2 (T, D). There is no routing to report.

        Raises:
            MorphomeError: the patient has no patch features or gene groups, or of other shapes.
        """
        return Encoded(super().encode(batch).z)


class MoMEWSI(MoMEBody):
    """MoME on the slides alone; genes are neither needed nor read.

    Args:
        variant: ``plain``: logits = Lin(TransLayer([CLS; P0])[0]). ``learned_ref``: the whole of MoME with one
            learned token (1, D), uniform in [0, 1) at the start, in place of the gene groups.
        router, bottlenecks: of ``learned_ref``.
        d_in, n_bins, dim, heads, landmarks, tokens, attention, value_conv, dropout, attention_dropout, router_seed:
            as in :class:`~morphome.models.mome.MoME`.

    Raises:
        MorphomeError: a setting that is not known.
    """

    needs = frozenset({"path"})
    supports = frozenset({"wsi_only_inference"})

    def __init__(
        self,
        d_in: int,
        n_bins: int,
        *,
        variant: str = "plain",
        dim: int = 512,
        heads: int = 8,
        landmarks: int = 256,
        bottlenecks: int = 2,
        router: str = "straight_through",
        tokens: str = "parameter",
        attention: str = "auto",
        value_conv: bool = True,
        dropout: float = 0.25,
        attention_dropout: float = 0.1,
        router_seed: int = 0,
    ) -> None:
        _variant("mome_wsi", variant, WSI)
        super().__init__(
            d_in,
            {},
            n_bins,
            dim=dim,
            heads=heads,
            landmarks=landmarks,
            bottlenecks=bottlenecks,
            router="fixed:DropX2Fusion" if variant == "plain" else router,
            tokens=tokens,
            attention=attention,
            value_conv=value_conv,
            dropout=dropout,
            attention_dropout=attention_dropout,
            router_seed=router_seed,
        )
        self.variant = variant
        if variant == "learned_ref":
            self.ref = nn.Parameter(torch.rand(1, dim))

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """P0 (N, D) and what stands for the genes: the learned token (1, D), or nothing (0, D)."""
        require(batch, self.needs, self.d_in)
        path = self.project(batch.path)
        return path, self.ref if self.variant == "learned_ref" else path[:0]

    def forward(self, batch: Batch) -> dict:
        """One patient -> logits (1, K) and ``aux["pooled"]`` (1, D), the class token.

        ``aux["routing"]`` as in MoME with ``learned_ref``; ``aux["pinv_error"]`` as in MoME.

        Raises:
            MorphomeError: the patient has no patch features, or of another width.
        """
        clear_pinv_errors(self)
        path, genes, routing, _ = self.exchange(*self.embed(batch), batch.patient_id)
        token = self.read(path, genes)
        aux = {"pooled": token} | ({"routing": routing} if self.variant == "learned_ref" else {})
        return note_pinv_error(self, {"logits": self.classifier(token), "extra_losses": {}, "attn": {}, "aux": aux})


class MoMEGenes(nn.Module):
    """MoME on the genes alone: logits = Lin(TransLayer([CLS; G0])[0]), G0 = stack_g SNN(SNN(x_g)).

    Slides are neither needed nor read.

    Args:
        group_sizes, n_bins, dim, heads, landmarks, tokens, attention, value_conv, dropout, attention_dropout: as in
            :class:`~morphome.models.mome.MoME`. There are a few tokens only: fewer than ``landmarks`` means exact
            attention, except with ``nystrom_compat``.

    Raises:
        MorphomeError: a setting that is not known.
    """

    needs = frozenset({"omic_groups"})
    supports: frozenset[str] = frozenset()
    head = "hazard"
    order_sensitive = False

    def __init__(
        self,
        group_sizes: Mapping[str, int],
        n_bins: int,
        *,
        dim: int = 512,
        heads: int = 8,
        landmarks: int = 256,
        tokens: str = "parameter",
        attention: str = "auto",
        value_conv: bool = True,
        dropout: float = 0.25,
        attention_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        options = {"heads": heads, "landmarks": landmarks, "mode": attention, "value_conv": value_conv}
        self.groups = GroupEncoder(list(group_sizes.values()), dim, dropout)
        add_tokens(self, "cls", 1, dim, tokens)
        self.fusion = TransLayer(dim, "layer", ADMIN_OMEGA, options, attention_dropout)
        self.classifier = nn.Linear(dim, n_bins)

    def forward(self, batch: Batch) -> dict:
        """One patient -> logits (1, K).

        Raises:
            MorphomeError: the patient has no gene groups, or another number of them.
        """
        require(batch, self.needs)
        token = self.fusion(torch.cat([self.cls, self.groups(batch.groups)]), keep=(0, 1))
        return {"logits": self.classifier(token), "extra_losses": {}, "attn": {}, "aux": {}}
