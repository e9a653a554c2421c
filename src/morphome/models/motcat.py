"""MOTCat: co-attention by optimal transport between patches and gene groups.

Xu and Chen, "Multimodal Optimal Transport-based Co-Attention Transformer with Global Structure Consistency for
Survival Prediction", ICCV 2023, 21241-21251. MCAT with another co-attention. Written from the formulas; the plan of
the public code depends on the version of its transport library, here ``ot_reg_type`` says which is meant.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from morphome.errors import MorphomeError
from morphome.models import hazard
from morphome.models.batch import Batch
from morphome.models.coattention import CoAttentionModel
from morphome.models.fusion import Encoded
from morphome.models.transport import REGULARISERS, transport_cost, transport_plan

BAGS = ("whole", "micro")


class MOTCat(CoAttentionModel):
    """MCAT with ``C = plan^T H`` for its co-attention; 4,228,870 parameters at the sizes of :class:`MCAT`.

    The plan (N, T) is entropic unbalanced optimal transport from N patches of mass 1/N to T groups of mass 1/T at
    the squared distance of H and G. It carries no gradient. Column t of the plan holds a mass of about 1/T.

    Args:
        d_in: width of the patch features.
        group_sizes: columns per gene group.
        n_bins: K.
        dim: d.
        heads: of the encoder layers; divides ``dim``.
        feedforward: hidden width of the encoder layers.
        attention_dim: hidden width of the gated attention.
        fusion: ``concat`` or ``bilinear`` (gated Kronecker product).
        epsilon: weight of the entropy; published .05 (BLCA, LUAD) and .1 (other cohorts).
        tau: weight of the marginals.
        ot_reg_type: ``entropy`` (as published with its pinned library) or ``kl`` (what later versions compute).
        renormalise: divide each column of the plan by its mass, so that each group reads a mean of patches.
        bag: ``whole``: one plan per patient; invariant to the order of the patches. ``micro``: as published, the
            bag is split into parts of at most ``micro_size`` patches, drawn at random in training, each part is
            scored, and S_k is averaged over the parts, which averages the risk. In evaluation patch n belongs to
            part n mod (number of parts), so that two evaluations agree. The published loss is the mean of the
            parts' losses; ours is the loss of the averaged curve, which is never larger.
        micro_size: patches per part.
        dropout: of all blocks.
        missing_tokens: build learned tokens that stand in for G of a patient without genes.

    Raises:
        MorphomeError: unknown choice, or ``heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        d_in: int,
        group_sizes: Mapping[str, int],
        n_bins: int,
        *,
        dim: int = 256,
        heads: int = 8,
        feedforward: int = 512,
        attention_dim: int = 256,
        fusion: str = "concat",
        epsilon: float = 0.1,
        tau: float = 0.5,
        ot_reg_type: str = "entropy",
        renormalise: bool = False,
        bag: str = "whole",
        micro_size: int = 256,
        dropout: float = 0.25,
        missing_tokens: bool = False,
    ) -> None:
        super().__init__(
            "motcat",
            d_in,
            group_sizes,
            n_bins,
            dim=dim,
            heads=heads,
            feedforward=feedforward,
            attention_dim=attention_dim,
            fusion=fusion,
            dropout=dropout,
            missing_tokens=missing_tokens,
        )
        for name, value, known in (("ot_reg_type", ot_reg_type, REGULARISERS), ("bag", bag, BAGS)):
            if value not in known:
                raise MorphomeError(f"models.motcat.{name}: {value!r} is not known", f"choose {' or '.join(known)}")
        self.renormalise, self.bag, self.micro_size = renormalise, bag, micro_size
        self.transport = {"epsilon": epsilon, "tau": tau, "regulariser": ot_reg_type}
        self.order_sensitive = bag == "micro"
        if missing_tokens:
            self.groups.add_missing()

    def plan(self, path: Tensor, genes: Tensor) -> Tensor:
        """H (N, d), G (T, d) -> the transport plan (N, T), float64, without gradient."""
        a, b = (x.new_full((len(x),), 1 / len(x), dtype=torch.float64) for x in (path, genes))
        plan = transport_plan(transport_cost(path, genes), a, b, **self.transport)
        return plan / plan.sum(0) if self.renormalise else plan

    def parts(self, n: int, device: torch.device) -> list[Tensor]:
        """Indices of the patches of each part of a bag of n patches."""
        count = -(-n // self.micro_size)
        order = torch.randperm(n, device=device) if self.training else torch.arange(n, device=device)
        return [order[start::count] for start in range(count)]

    def encode(self, batch: Batch) -> Encoded:
        """One patient -> ``z`` h_P and h_G, (1, d) each with ``bag: whole``, else a row per part, and attention.

        ``attn["coattention"]`` (T, N): the plan, rows of mass about 1/T (1 with ``renormalise``); with ``bag: micro``
        each part's plan divided by the number of parts, so that the mass stays. ``attn["gated_path"]`` and
        ``attn["gated_genes"]`` (T,): weights of the two poolings, means over the parts; they sum to 1.

        Raises:
            MorphomeError: the patient has no patch features or gene groups, or of other shapes.
        """
        path, genes = self.embed(batch)
        parts = self.parts(len(path), path.device) if self.bag == "micro" else [slice(None)]
        plan = torch.zeros(len(genes), len(path), device=path.device)
        u, v, path_weights, gene_weights = [], [], [], []
        for part in parts:
            weights = self.plan(path[part], genes).to(path.dtype).T
            plan[:, part] = weights.float() / len(parts)
            of_path, on_path = self.path_pool(weights @ path[part])
            of_genes, on_genes = self.gene_pool(genes)
            u.append(of_path)
            v.append(of_genes)
            path_weights.append(on_path.detach())
            gene_weights.append(on_genes.detach())
        return Encoded(
            {"path": torch.cat(u), "omic": torch.cat(v)},
            attn={
                "coattention": plan,
                "gated_path": torch.stack(path_weights).mean(0),
                "gated_genes": torch.stack(gene_weights).mean(0),
            },
        )

    def fuse(self, z: Mapping[str, Tensor]) -> Tensor:
        """h_P and h_G -> logits (1, K): S_k is the mean over the parts. One row meets every row of the other."""
        parts = zip(*(rows.split(1) for rows in torch.broadcast_tensors(z["path"], z["omic"])), strict=True)
        return mean_survival(torch.cat([self.classifier(self.fusion(u, v)) for u, v in parts]))


def mean_survival(logits: Tensor) -> Tensor:
    """Logits (1, K) whose survival is the mean of the survival curves of ``logits`` (P, K), so the risk is the mean.

    In log space: log h_k = log of the mean of S_{k-1} h_k, minus log of the mean of S_{k-1}.
    """
    if len(logits) == 1:
        return logits
    log_s = hazard.log_survival(logits)
    before = F.pad(log_s[:, :-1], (1, 0))
    died = torch.logsumexp(before + hazard.log_hazard(logits), 0)
    alive = torch.logsumexp(log_s, 0)
    return (died - alive)[None]
