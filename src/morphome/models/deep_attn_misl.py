"""DeepAttnMISL: patches of similar look share a network, attention weighs the looks.

Yao, Zhu, Jonnagaddala, Hawkins, Huang, "Whole slide images based cancer survival prediction using attention guided
deep multiple instance learning networks", Medical Image Analysis 65 (2020) 101789, with the hazard head of the MCAT
family. The clusters were never fully published; here k-means centres are fitted on training patches and every patch
belongs to the nearest. Written from the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.models.batch import Batch, require
from morphome.models.layers import FC, GatedAttention
from morphome.models.parts import TrainingSample


class DeepAttnMISL(nn.Module):
    """One network per cluster of patches, attention over the clusters; invariant to the order of the patches.

    Per cluster c: ``t_c = mean of FC(FC(x)) over its patches``, zeros when it has none; ``GA(FC(t))`` over the
    clusters; ``FC(dim -> head_dim)``; K hazard logits. 8,532,485 parameters at d_in = 1024, 10 clusters and K = 4.

    Args:
        d_in: width of the patch features.
        n_bins: K.
        parts: ``centres`` (clusters, d_in), from :meth:`fit_parts`.
        clusters: k of k-means.
        kmeans_patches: training patches that the centres are fitted on, drawn evenly over the patients.
        kmeans_starts: k-means runs from several starts; the tightest is kept.
        dim: width of a projected patch.
        attention_dim: hidden width of the gated attention.
        head_dim: width before the classifier.
        mask_empty: a cluster without a patch gets no attention; without it (as published code has it) its row of
            zeros takes part like the others.
        dropout: of all blocks.

    Raises:
        MorphomeError: no centres, or of another shape.
    """

    needs = frozenset({"path"})
    supports = frozenset({"wsi_only_inference"})
    head = "hazard"
    order_sensitive = False

    def __init__(
        self,
        d_in: int,
        n_bins: int,
        parts: Mapping[str, np.ndarray],
        *,
        clusters: int = 10,
        kmeans_patches: int = 20_000,
        kmeans_starts: int = 3,
        dim: int = 512,
        attention_dim: int = 256,
        head_dim: int = 256,
        mask_empty: bool = True,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        # What these settings do is done before the model is built, in fit_parts.
        del kmeans_patches, kmeans_starts
        shape = np.shape(parts["centres"]) if "centres" in parts else None
        if shape != (clusters, d_in):
            raise MorphomeError(
                f"deep_attn_misl: cluster centres of shape {shape}, expected ({clusters}, {d_in})",
                "fit the centres (fit_parts) with these settings on patches of this encoder",
            )
        self.d_in, self.mask_empty = d_in, mask_empty
        self.register_buffer("centres", torch.tensor(np.asarray(parts["centres"]), dtype=torch.float32))
        self.looks = nn.ModuleList(
            nn.Sequential(FC(d_in, dim, dropout), FC(dim, dim, dropout)) for _ in range(clusters)
        )
        self.project = FC(dim, dim, dropout)
        self.pool = GatedAttention(dim, attention_dim, 1, dropout)
        self.hidden = FC(dim, head_dim, dropout)
        self.classifier = nn.Linear(head_dim, n_bins)

    @classmethod
    def fit_parts(cls, settings: Mapping[str, Any], sample: TrainingSample) -> dict[str, np.ndarray]:
        """``centres`` (clusters, d_in) float32: k-means on patches of the training fold.

        Args:
            settings: the model's settings, with defaults.
            sample: of the training fold.

        Raises:
            MorphomeError: fewer distinct patches than clusters.
        """
        # Slow to import, and needed only here.
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        k = settings["clusters"]
        patches = np.asarray(sample.patches(settings["kmeans_patches"]), dtype=np.float32)
        distinct = len(np.unique(patches, axis=0))
        if distinct < k:
            raise MorphomeError(
                f"deep_attn_misl: {distinct} distinct training patches for {k} clusters",
                "lower models.deep_attn_misl.clusters, or raise kmeans_patches",
            )
        means = KMeans(k, n_init=settings["kmeans_starts"], random_state=sample.seed % 2**32)
        # Sums over several threads come in any order; one thread gives the same centres every time.
        with threadpool_limits(1):
            means.fit(patches)
        return {"centres": means.cluster_centers_.astype(np.float32)}

    def assign(self, x: Tensor) -> Tensor:
        """X (N, d_in) -> position of the nearest centre by Euclidean distance, (N,); ties go to the first."""
        # |x|^2 is the same for all centres. In fp32 also under autocast: a patch must not change its cluster by that.
        with torch.autocast(x.device.type, enabled=False):
            return (self.centres.square().sum(1) - 2 * x @ self.centres.T).argmin(1)

    def forward(self, batch: Batch) -> dict:
        """One patient -> logits (1, K) and attention.

        ``attn["clusters"]`` (clusters,) sums to 1; ``attn["gated"]`` (N,): the share of its cluster, split evenly
        over the cluster's patches. ``aux["pooled"]`` (1, dim): the pooled bag.

        Raises:
            MorphomeError: the patient has no patch features, or of another width.
        """
        require(batch, self.needs, self.d_in)
        cluster = self.assign(batch.path)
        counts = torch.bincount(cluster, minlength=len(self.looks))
        bags = batch.path[torch.argsort(cluster, stable=True)].split(counts.tolist())
        nothing = batch.path.new_zeros(self.project.linear.in_features)
        tokens = torch.stack(
            [look(bag).mean(0) if len(bag) else nothing for look, bag in zip(self.looks, bags, strict=True)]
        )
        # Tokens that are left out of the pooling get no attention.
        there = counts > 0 if self.mask_empty else torch.ones_like(counts, dtype=torch.bool)
        pooled, weights = self.pool(self.project(tokens[there]))
        shares = weights.new_zeros(len(counts))
        shares[there] = weights.detach().squeeze(1)
        return {
            "logits": self.classifier(self.hidden(pooled)),
            "extra_losses": {},
            "attn": {"clusters": shares, "gated": (shares / counts.clamp(min=1))[cluster]},
            "aux": {"pooled": pooled},
        }
