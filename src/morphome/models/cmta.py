"""CMTA: cross-modal translation and alignment.

Zhou and Chen, "Cross-Modal Translation and Alignment for Survival Analysis", ICCV 2023, 21485-21494. Each modality
has an encoder and a decoder; the decoder sees the encoder's tokens after they have read the other modality, and its
class token is drawn towards the encoder's by an L1 loss. Written from the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.models.batch import Batch, require
from morphome.models.coattention import ConcatFusion, CrossAttention
from morphome.models.fusion import Encoded, FusionModel
from morphome.models.layers import FC, SNN, TransLayer, stand_in
from morphome.models.nystrom import NystromAttention, clear_pinv_errors, note_pinv_error
from morphome.models.pyramid import PyramidTransformer

COPIES = ("drop", "keep")


class GeneTransformer(nn.Module):
    """T_G: prepend CLS, two TransLayers, LayerNorm -> class token (1, d) and tokens (T, d)."""

    def __init__(self, dim: int, attention: dict, dropout: float = 0.1) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, dim) * 1e-6)
        self.first = TransLayer(dim, "layer", 1.0, attention, dropout)
        self.second = TransLayer(dim, "layer", 1.0, attention, dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(T, d) -> (1, d), (T, d)."""
        h = self.norm(self.second(self.first(torch.cat([self.cls.to(tokens.dtype), tokens]))))
        return h[:1], h[1:]


class CMTA(FusionModel):
    """Translation between slides and gene groups, and alignment of the class tokens; reads the order of the patches.

    ``P = FC(FC(X))``, ``G = stack_g SNN(hidden -> d)(SNN(|G_g| -> hidden)(x_g))``; encoders ``c_P, P1 = T_P(P)`` and
    ``c_G, G1 = T_G(G)``; translation ``P2 = MHA1(P1, G1)``, ``G2 = MHA1(G1, P1)``; decoders give ``d_P`` from P2 and
    ``d_G`` from G2; ``[(c_P + d_P) / 2; (c_G + d_G) / 2]`` through two ReLU layers to K hazard logits. Loss of its
    own: ``alpha (mean |sg(c_P) - d_P| + mean |sg(c_G) - d_G|)``, sg = without gradient. 8,259,140 parameters with
    the six families of the MCAT table of TCGA-BLCA, d_in = 1024 and K = 4. Linear layers start Xavier-normal with
    zero bias, as published.

    Args:
        d_in: width of the patch features.
        group_sizes: columns per gene group.
        n_bins: K.
        dim: d.
        gene_dim: hidden width of the gene encoders.
        heads: of the TransLayers; divides ``dim``.
        landmarks: of the Nyström attention.
        attention: ``auto``, ``nystrom_masked``, ``nystrom_compat`` (as published; the few gene tokens drown in
            padding) or ``exact``; see :mod:`morphome.models.nystrom`.
        value_conv: convolution of the values along the tokens.
        grid: ``sorted`` (as published, patches laid row by row on a square) or ``true_xy`` (true neighbours).
        copies: with ``grid: sorted``, what becomes of the copies that fill the square once an encoder is done:
            ``drop`` or ``keep`` (as published; they are translated and read by the genes too).
        alpha: weight of the alignment; published 1, tuned per cohort elsewhere (100, 1e-4). One value for all here.
        dropout: of the projections.
        attention_dropout: of the output of the TransLayers.
        missing_tokens: build learned tokens that stand in for G of a patient without genes.

    Raises:
        MorphomeError: unknown choice, or ``heads`` does not divide ``dim``.
    """

    needs = frozenset({"path", "omic_groups"})
    supports = frozenset({"missing_omic"})
    head = "hazard"
    order_sensitive = True

    def __init__(
        self,
        d_in: int,
        group_sizes: Mapping[str, int],
        n_bins: int,
        *,
        dim: int = 256,
        gene_dim: int = 1024,
        heads: int = 8,
        landmarks: int = 128,
        attention: str = "auto",
        value_conv: bool = True,
        grid: str = "sorted",
        copies: str = "drop",
        alpha: float = 1.0,
        dropout: float = 0.25,
        attention_dropout: float = 0.1,
        missing_tokens: bool = False,
    ) -> None:
        super().__init__()
        if copies not in COPIES:
            raise MorphomeError(f"models.cmta.copies: {copies!r} is not known", f"choose {' or '.join(COPIES)}")
        options = {"heads": heads, "landmarks": landmarks, "mode": attention, "value_conv": value_conv}
        # Without landmarks, convolution of values and square, nothing is left that reads the order.
        self.order_sensitive = value_conv or attention != "exact" or grid == "sorted"
        self.d_in, self.dim, self.alpha, self.keep_copies = d_in, dim, alpha, copies == "keep" and grid == "sorted"
        self.required = self.needs - {"omic_groups"} if missing_tokens else self.needs
        self.project = nn.Sequential(FC(d_in, dim, dropout), FC(dim, dim, dropout))
        self.groups = nn.ModuleList(
            nn.Sequential(SNN(size, gene_dim, dropout), SNN(gene_dim, dim, dropout)) for size in group_sizes.values()
        )
        self.path_encoder = PyramidTransformer(dim, options, grid, attention_dropout)
        self.path_decoder = PyramidTransformer(dim, options, grid, attention_dropout)
        self.gene_encoder = GeneTransformer(dim, options, attention_dropout)
        self.gene_decoder = GeneTransformer(dim, options, attention_dropout)
        self.path_from_genes, self.genes_from_path = CrossAttention(dim), CrossAttention(dim)
        self.fusion = ConcatFusion(dim)
        self.classifier = nn.Linear(dim, n_bins)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, NystromAttention):
                # Published as one matrix (3d, d), of which each part starts smaller than a matrix (d, d) does.
                for layer in (module.query, module.key, module.value):
                    nn.init.xavier_normal_(layer.weight, gain=0.5**0.5)
        tokens = stand_in(len(self.groups), dim) if missing_tokens else None
        self.register_parameter("missing", tokens)

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """P (N, d) and G (T, d) of one patient.

        Raises:
            MorphomeError: the patient has no patch features or gene groups, or of other shapes.
        """
        require(batch, self.required, self.d_in)
        if batch.groups is None:
            return self.project(batch.path), self.missing
        if len(batch.groups) != len(self.groups):
            raise MorphomeError(
                f"{len(batch.groups)} gene groups given, the model was built for {len(self.groups)}",
                "train and predict with the same gene groups",
            )
        genes = torch.stack([encoder(x) for encoder, x in zip(self.groups, batch.groups, strict=True)])
        return self.project(batch.path), genes

    def forward(self, batch: Batch) -> dict:
        """One patient -> the output of :meth:`encode` and :meth:`fuse`.

        ``aux["pinv_error"]`` in evaluation where Nyström attention was used: see :mod:`morphome.models.nystrom`.
        """
        clear_pinv_errors(self)
        return note_pinv_error(self, super().forward(batch))

    def encode(self, batch: Batch) -> Encoded:
        """One patient -> ``z`` the mean class tokens (1, d), attention, and in training the loss ``alignment``.

        ``attn["path_from_genes"]`` (N, T) and ``attn["genes_from_path"]`` (T, N): rows sum to 1; with
        ``copies: keep`` a copy's share is added to its original. ``aux["alignment"]``: the alignment term without
        ``alpha``, a scalar without gradient.

        Raises:
            MorphomeError: the patient has no patch features or gene groups, or of other shapes; ``grid: true_xy``
                without positions.
        """
        path, genes = self.embed(batch)
        n = len(path)
        c_path, path = self.path_encoder(path, batch.pos, keep_copies=self.keep_copies)
        c_genes, genes = self.gene_encoder(genes)
        path_translated, on_genes, _ = self.path_from_genes(path, genes)
        genes_translated, on_path, _ = self.genes_from_path(genes, path)
        d_path, _ = self.path_decoder(path_translated, batch.pos, cls_only=True)
        d_genes, _ = self.gene_decoder(genes_translated)
        alignment = F.l1_loss(d_path, c_path.detach()) + F.l1_loss(d_genes, c_genes.detach())
        on_path = on_path.detach()
        copied = on_path.shape[1] - n
        on_path, extra = on_path[:, :n].clone(), on_path[:, n:]
        on_path[:, :copied] += extra
        return Encoded(
            {"path": (c_path + d_path) / 2, "omic": (c_genes + d_genes) / 2},
            extra_losses={"alignment": self.alpha * alignment} if self.training and self.alpha else {},
            attn={"path_from_genes": on_genes.detach()[:n], "genes_from_path": on_path},
            aux={"alignment": alignment.detach()},
        )

    def fuse(self, z: Mapping[str, Tensor]) -> Tensor:
        """Both mean class tokens (1, d) -> logits (1, K)."""
        return self.classifier(self.fusion(z["path"], z["omic"]))

    def branch_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Projections and encoders; translation and decoders see both modalities."""
        missing = [self.missing] if self.missing is not None else []
        return {
            "path": [*self.project.parameters(), *self.path_encoder.parameters()],
            "omic": [*self.groups.parameters(), *self.gene_encoder.parameters(), *missing],
        }

    @property
    def branch_widths(self) -> dict[str, int]:
        """Class tokens are as wide as all tokens."""
        return {"path": self.dim, "omic": self.dim}
