"""Path-GPTOmic (re-derived): an image branch and a genomic branch behind one linear layer, trained by Cox's likelihood.

Wang et al., "Path-GPTOmic: A Balanced Multi-modal Learning Framework for Survival Outcome Prediction", ISBI 2024, doi
10.1109/ISBI56570.2024.10635171, arXiv 2403.11375. The authors published no code. This is its second stage, written
from what is known of the paper; sizes that the paper leaves open are ours. Its first stage (features of a language
model of single cells, passed through a small network trained on mixed cells) reaches this one as the RNA vector of
the batch; the balance of the branches is a plug-in of the trainer, which needs the exact split of the log risk here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.models.batch import Batch, require
from morphome.models.fusion import Encoded, FusionModel
from morphome.models.layers import FC, SNN, GatedAttention
from morphome.models.molecular import vector

POOLS = ("attention", "mean")
#: RNA vectors wider than this are raw expression, not what an encoder gives (512 at most), and go through an SNN.
RNA_DIRECT = 1024
#: Width of that SNN unless ``rna_hidden`` says otherwise.
RNA_HIDDEN = 256


class PathGPTOmic(FusionModel):
    """``h = w_P · f_P + w_G · f_G``, ``f_G = MLP_B([SNN(cnv); SNN(mut); z_rna])``. Invariant to the order of patches.

    ``f_P = FC(GA(FC(d_in -> dim)(X)))`` with ``pool: attention``, ``FC(mean_n X)`` with ``pool: mean``, for features
    of a foundation model. MLP_B is FC(-> mlp_dim), FC(-> gene_dim). The head is linear in the concatenation and has no
    bias: Cox's likelihood does not change when a constant is added to every log risk, so a bias would never be trained
    and belongs to no branch. The log risk is therefore exactly the sum of :meth:`branch_scores`.

    1,068,673 parameters at d_in = 1024, n_rna = 128, n_cnv = 477, n_mut = 174 and the defaults.

    Args:
        d_in: width of the patch features.
        n_rna: width of the RNA vector: 128 or 512 from an encoder of cells, the number of components, or all genes.
        n_cnv, n_mut: copy-number and mutation columns; the SNN of a part with 0 columns is not built.
        missing_tokens: own one learned vector that stands in for f_G where a patient has no molecular values at all.
        pool: ``attention`` or ``mean``.
        dim: width of a projected patch, with ``pool: attention``.
        attention_dim: hidden width of the gated attention.
        path_dim: width of f_P.
        snn_dim: width of SNN(cnv) and SNN(mut).
        rna_hidden: width of an SNN in front of MLP_B for the RNA vector; 0: none up to 1024 values, 256 above.
        mlp_dim: hidden width of MLP_B.
        gene_dim: width of f_G; 32 to 256 in the paper's kind of model.
        dropout: of all blocks.

    Raises:
        MorphomeError: no RNA value, or an unknown pool.
    """

    needs = frozenset({"path", "rna", "cnv", "mut"})
    supports = frozenset({"missing_omic"})
    head = "cox"
    order_sensitive = False

    def __init__(
        self,
        d_in: int,
        n_rna: int,
        n_cnv: int = 0,
        n_mut: int = 0,
        missing_tokens: bool = False,
        *,
        pool: str = "attention",
        dim: int = 512,
        attention_dim: int = 256,
        path_dim: int = 128,
        snn_dim: int = 128,
        rna_hidden: int = 0,
        mlp_dim: int = 256,
        gene_dim: int = 128,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise MorphomeError(f"models.path_gptomic.pool: {pool!r} is not known", f"choose {' or '.join(POOLS)}")
        if n_rna < 1:
            raise MorphomeError("models.path_gptomic needs RNA", "configure molecular.rna")
        self.d_in, self.n_rna = d_in, n_rna
        self.sizes = {part: n for part, n in (("cnv", n_cnv), ("mut", n_mut)) if n}
        if pool == "attention":
            self.project, self.pool = FC(d_in, dim, dropout), GatedAttention(dim, attention_dim, 1, dropout)
        else:
            self.project = self.pool = None
        self.hidden = FC(dim if self.pool else d_in, path_dim, dropout)
        self.panels = nn.ModuleDict({part: SNN(n, snn_dim, dropout) for part, n in self.sizes.items()})
        width = rna_hidden or (RNA_HIDDEN if n_rna > RNA_DIRECT else 0)
        self.rna = SNN(n_rna, width, dropout) if width else None
        self.mlp = nn.Sequential(
            FC(snn_dim * len(self.panels) + (width or n_rna), mlp_dim, dropout), FC(mlp_dim, gene_dim, dropout)
        )
        self.classifier = nn.Linear(path_dim + gene_dim, 1, bias=False)
        self._widths = {"path": path_dim, "omic": gene_dim}
        # Without a random number, so that all other weights are those of the plain model.
        self.missing = nn.Parameter(torch.zeros(1, gene_dim)) if missing_tokens else None

    def encode(self, batch: Batch) -> Encoded:
        """``z["path"]`` (1, path_dim), ``z["omic"]`` (1, gene_dim); ``attn["gated"]`` (N,) with ``pool: attention``.

        Raises:
            MorphomeError: the patient lacks patch features or one of the molecular parts, or has one in another width.
        """
        require(batch, frozenset({"path"}), self.d_in)
        attn: dict[str, Tensor] = {}
        if self.pool is None:
            pooled = batch.path.mean(0, keepdim=True)
        else:
            pooled, weights = self.pool(self.project(batch.path))
            attn["gated"] = weights.squeeze(1).detach()
        nothing = all(getattr(batch, part) is None for part in ("rna", *self.sizes))
        genes = self.missing if nothing and self.missing is not None else self._genes(batch)
        return Encoded({"path": self.hidden(pooled), "omic": genes}, attn=attn)

    def _genes(self, batch: Batch) -> Tensor:
        """f_G, (1, gene_dim)."""
        parts = [self.panels[part](vector(batch, part, n)) for part, n in self.sizes.items()]
        rna = vector(batch, "rna", self.n_rna)
        return self.mlp(torch.cat([*parts, rna if self.rna is None else self.rna(rna)]).unsqueeze(0))

    def branch_scores(self, z: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """w_u · f_u by branch, (1, 1) each; their sum is the log risk."""
        weights = self.classifier.weight.split(list(self._widths.values()), 1)
        pairs = zip(self._widths, weights, strict=True)
        return {u: z[u].mean(0, keepdim=True) @ w.T for u, w in pairs}

    def fuse(self, z: Mapping[str, Tensor]) -> Tensor:
        """Log risk (1, 1)."""
        scores = self.branch_scores(z)
        return scores["path"] + scores["omic"]

    def branch_parameters(self) -> dict[str, list[nn.Parameter]]:
        """All but the head, the stand-in for the genes among theirs."""
        path = [m for m in (self.project, self.pool, self.hidden) if m is not None]
        omic = [m for m in (self.panels, self.rna, self.mlp) if m is not None]
        missing = [] if self.missing is None else [self.missing]
        return {
            "path": [p for m in path for p in m.parameters()],
            "omic": [p for m in omic for p in m.parameters()] + missing,
        }

    @property
    def branch_widths(self) -> dict[str, int]:
        """Width of f_P and f_G."""
        return dict(self._widths)
