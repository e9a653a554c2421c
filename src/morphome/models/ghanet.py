"""G-HANet: genes guide the training, slides alone predict.

Wang et al., "Histo-Genomic Knowledge Distillation For Cancer Prognosis From Histopathology Whole Slide Images", arXiv
2403.10040; in print as "Histo-Genomic Knowledge Association for Cancer Prognosis From Histopathology Whole Slide
Images", IEEE Transactions on Medical Imaging 44(5) (2025) 2170-2181, doi 10.1109/TMI.2025.3526816. One branch reads
the patches with one learned token per gene group and predicts the genes of the group; where it looks, and what it
read, feeds the survival branch. Written from the formulas.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.models.batch import Batch, require
from morphome.models.ghanet_blocks import AssociatingBranch, SurvivalBranch, scaled_cosine_error, top_share
from morphome.models.parts import TrainingSample

#: Name of the fitted part that holds the target columns of group g.
PART = "group_{}"


def differing_columns(values: np.ndarray, high: np.ndarray, low: np.ndarray, p_value: float, least: int) -> np.ndarray:
    """Columns whose means differ between two classes of patients by Welch's t-test.

    Args:
        values: (n, p), NaN where nothing was measured. high, low: (n,) bool, the classes; who is in neither is ignored.
        p_value: columns below it are chosen.
        least: where fewer are, the ``least`` columns of smallest p are chosen; ties by position.

    Returns:
        Sorted positions (m,) int64. A column that is constant over both classes has no p and is never chosen.
    """
    values = np.asarray(values, dtype=np.float64)
    a, b = values[high], values[low]
    both = values[high | low]
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        # A column that nobody of a class has is no candidate; NumPy and SciPy warn of it.
        warnings.simplefilter("ignore", RuntimeWarning)
        p = np.ma.filled(stats.ttest_ind(a, b, equal_var=False, nan_policy="omit").pvalue, np.nan)
        varies = np.nanmax(both, axis=0) > np.nanmin(both, axis=0)
    p = np.where(varies, p, np.nan)
    chosen = np.flatnonzero(p < p_value)
    if len(chosen) < least:
        order = np.argsort(p, kind="stable")  # NaN comes last
        chosen = np.sort(order[~np.isnan(p[order])][:least])
    return chosen.astype(np.int64)


def reconstruction_r(
    predicted: Sequence[np.ndarray], groups: Sequence[np.ndarray], targets: Sequence[np.ndarray]
) -> np.ndarray:
    """How well genes are read off the slides: per group the mean over its genes of Pearson's r over patients.

    Args:
        predicted: per group (n, m_g), rows of ``aux["reconstruction"]``.
        groups: per group the z-scores of the same patients, (n, |G_g|).
        targets: per group the columns that the decoder predicts, (m_g,) integers (``GHANet.columns``).

    Returns:
        (T,) float64. A gene that is constant on either side has no r and is left out; NaN for a group without any.
    """
    rows = []
    for x, z, at in zip(predicted, groups, targets, strict=True):
        x, z = np.asarray(x, dtype=np.float64), np.asarray(z, dtype=np.float64)[:, at]
        varies = (np.ptp(x, axis=0) > 0) & (np.ptp(z, axis=0) > 0)
        if not varies.any():
            rows.append(np.nan)
            continue
        x, z = x[:, varies] - x[:, varies].mean(axis=0), z[:, varies] - z[:, varies].mean(axis=0)
        r = (x * z).sum(axis=0) / np.sqrt((x**2).sum(axis=0) * (z**2).sum(axis=0))
        rows.append(r.mean())
    return np.array(rows)


class GHANet(nn.Module):
    """Prediction from slides, guided in training by the genes; invariant to the order of the patches.

    The associating branch (CAB) predicts the z-scores of genes that differ between patients of high and low risk;
    its scores choose the patches that the survival branch (HSB) pools for each group:
    ``W_gen = sg(softmax(top share of mean_heads M))``, sg = without gradient. Losses of its own, only in training:
    ``reconstruction_weight * sum_g (MSE + (1 - cos)^gamma)``. 16,859,972 parameters at d_in = 1024, K = 4 and the
    six families of the MCAT table of TCGA-BLCA with all 3,391 genes as targets; with ``share_cross_attention: false``
    17,909,060. That is the published count too, but the public code builds the second attention and never uses it.

    Genes are read in training alone: predictions depend on the patches only, whatever else a batch holds.

    Args:
        d_in: width of the patch features.
        group_sizes: columns per gene group; only their number matters once ``parts`` are there.
        n_bins: K.
        parts: ``group_<g>``, the target columns of group g (:meth:`fit_parts`). Without any all columns are targets.
        dim: d.
        heads: of the three attentions; divides ``dim``.
        feedforward: hidden width of the gated feed-forward blocks.
        attention_dim: hidden width of the gated attention.
        head_dim: width of a group before the classifier.
        share_cross_attention: both readings of the patches with the same weights (as the public code does).
        ratio: share of the patches that W_gen keeps, at least one.
        reconstruction_weight: lambda; 0 leaves the decoders untrained.
        gamma: power of the cosine error.
        mse, sce: parts of the reconstruction loss.
        gene_attention: W_gen takes part in the pooling.
        morph_attention: the gated attention takes part in the pooling.
        gene_fusion: Fg enters the survival branch; its loss reaches the associating branch through nothing else.
        cab: build the associating branch; without it, neither genes nor W_gen nor Fg.
        p_value: level of the t-test.
        min_genes: a group with fewer significant genes gets this many of smallest p; 0 leaves a group without any
            significant gene out of the loss.
        low_risk_bin: patients who reach this time bin are of low risk; of high risk are those who die before it.
        dropout: of all blocks.

    Raises:
        MorphomeError: a setting that cannot be built, no gene group, or parts that do not fit the groups.
    """

    needs = frozenset({"path"})
    trains_with = frozenset({"omic_groups"})
    supports = frozenset({"wsi_only_inference"})
    head = "hazard"
    order_sensitive = False

    def __init__(
        self,
        d_in: int,
        group_sizes: Mapping[str, int],
        n_bins: int,
        parts: Mapping[str, np.ndarray],
        *,
        dim: int = 512,
        heads: int = 4,
        feedforward: int = 2048,
        attention_dim: int = 256,
        head_dim: int = 256,
        share_cross_attention: bool = True,
        ratio: float = 0.2,
        reconstruction_weight: float = 0.3,
        gamma: float = 3.0,
        mse: bool = True,
        sce: bool = True,
        gene_attention: bool = True,
        morph_attention: bool = True,
        gene_fusion: bool = True,
        cab: bool = True,
        p_value: float = 0.05,
        min_genes: int = 8,
        low_risk_bin: int = 2,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise MorphomeError(f"models.ghanet.heads: {heads} does not divide dim {dim}", "choose a divisor of dim")
        if not 0 < ratio <= 1:
            raise MorphomeError(f"models.ghanet.ratio: {ratio} is not in (0, 1]", "choose a share of the patches")
        if not morph_attention and not (gene_attention and cab):
            raise MorphomeError(
                "models.ghanet: neither morphology nor genes weight the patches",
                "set morph_attention: true, or gene_attention and cab: true",
            )
        #: Per group the columns that its decoder predicts, (m_g,) int64.
        self.columns = _target_columns(dict(group_sizes), parts)
        sizes = [len(at) for at in self.columns]
        # What these settings do is done before the model is built, in fit_parts.
        del p_value, min_genes, low_risk_bin
        self.d_in, self.ratio, self.gamma, self.mse, self.sce = d_in, ratio, gamma, mse, sce
        self.weight = reconstruction_weight if cab and (mse or sce) else 0.0
        self.gene_attention, self.gene_fusion = gene_attention, gene_fusion
        self.cab = (
            AssociatingBranch(d_in, sizes, dim, heads, feedforward, share_cross_attention, dropout) if cab else None
        )
        self.hsb = SurvivalBranch(
            d_in,
            len(sizes),
            n_bins,
            dim,
            heads,
            feedforward,
            attention_dim if morph_attention else 0,
            head_dim,
            dropout,
        )

    @classmethod
    def fit_parts(cls, settings: Mapping[str, Any], sample: TrainingSample) -> dict[str, np.ndarray]:
        """Target genes: Welch's t-test between high and low risk, each training patient once.

        High risk: event before ``low_risk_bin``; low risk: ``low_risk_bin`` reached, event or not; who is censored
        before it is in neither class. The public code tests over the sampler's draws, in which patients recur.

        Args:
            settings: the model's settings, with defaults.
            sample: of the training fold.

        Returns:
            ``group_<g>`` -> positions in the group, (m_g,) int64, for every group.

        Raises:
            MorphomeError: no gene group, or fewer than two patients in a class.
        """
        if not sample.groups:
            raise MorphomeError(
                "model 'ghanet' trains with gene groups and none is given", "configure molecular.groups"
            )
        reached = np.asarray(sample.bins) >= settings["low_risk_bin"]
        high, low = ~reached & (np.asarray(sample.event) == 1), reached
        if min(high.sum(), low.sum()) < 2:
            raise MorphomeError(
                f"ghanet: {high.sum()} training patients of high and {low.sum()} of low risk, too few for a t-test",
                "use fewer or larger folds, or another models.ghanet.low_risk_bin",
            )
        return {
            PART.format(g): differing_columns(values, high, low, settings["p_value"], settings["min_genes"])
            for g, values in enumerate(sample.groups)
        }

    def forward(self, batch: Batch) -> dict:
        """One patient -> logits (1, K) from the patches alone; in training the losses of the reconstruction too.

        ``attn["genes"]`` (T, N), W_gen, where the genes of each group look: rows sum to 1, 0 outside the best share;
        ``attn["gated"]`` (N,), W_morph. ``aux["reconstruction"]``: per group the predicted z-scores (m_g,) of
        ``columns``, without gradient; they mean nothing with ``reconstruction_weight: 0``. ``aux["pooled"]``: v
        (1, T head_dim). ``extra_losses``: ``mse`` and ``sce``, weighted sums over the groups.

        Raises:
            MorphomeError: the patient has no patch features, or of another width; in training no genes or others
                than the model was built for.
        """
        require(batch, self.needs, self.d_in)
        genes, gene_weights, predicted = None, None, ()
        losses, attention, aux = {}, {}, {}
        if self.cab is not None:
            genes, scores = self.cab(batch.path)
            predicted = self.cab.decode(genes)
            aux["reconstruction"] = tuple(x.detach() for x in predicted)
            if self.gene_attention:
                # No gradient of the survival loss through where the genes look.
                gene_weights = top_share(scores.detach().mean(0), self.ratio)
                attention["genes"] = gene_weights
        if self.training and self.weight:
            losses = self._losses(predicted, batch)
        logits, pooled, morphology = self.hsb(batch.path, gene_weights, genes if self.gene_fusion else None)
        if morphology is not None:
            attention["gated"] = morphology[0].detach()
        aux["pooled"] = pooled
        return {"logits": logits, "extra_losses": losses, "attn": attention, "aux": aux}

    def _losses(self, predicted: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        """Weighted sums over the groups of the mean squared and of the scaled cosine error."""
        require(batch, self.trains_with)
        who = f"patient {batch.patient_id or '(no id)'}"
        remedy = "train with the gene groups that the targets were chosen from"
        if len(batch.groups) != len(self.columns):
            raise MorphomeError(f"{who}: {len(batch.groups)} gene groups, expected {len(self.columns)}", remedy)
        pairs = []
        for g, (x, z, at) in enumerate(zip(predicted, batch.groups, self.columns, strict=True)):
            if len(at) and at[-1] >= len(z):
                raise MorphomeError(
                    f"{who}: gene group {g} has {len(z)} columns, expected {at[-1] + 1} or more", remedy
                )
            if len(at):
                target = z[torch.as_tensor(at, device=z.device)]
                measured = ~target.isnan()
                if bool(measured.all()):
                    pairs.append((x, target))
                elif bool(measured.any()):
                    pairs.append((x[measured], target[measured]))
        losses = {}
        if self.mse and pairs:
            losses["mse"] = self.weight * torch.stack([F.mse_loss(x, z) for x, z in pairs]).sum()
        if self.sce and pairs:
            losses["sce"] = self.weight * torch.stack([scaled_cosine_error(x, z, self.gamma) for x, z in pairs]).sum()
        return losses


def _target_columns(group_sizes: dict[str, int], parts: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Target columns of each group from the fitted parts; all columns where nothing was fitted."""
    if not parts:
        columns = tuple(np.arange(size) for size in group_sizes.values())
    else:
        columns = tuple(np.asarray(parts[PART.format(g)], dtype=np.int64) for g in range(len(parts)))
    if not columns:
        raise MorphomeError("model 'ghanet' trains with gene groups and none is given", "configure molecular.groups")
    if group_sizes and (
        len(group_sizes) != len(columns)
        or any(len(at) and at[-1] >= size for at, size in zip(columns, group_sizes.values(), strict=True))
    ):
        raise MorphomeError(
            f"ghanet: the chosen genes do not fit the gene groups {group_sizes}",
            "choose them again on the training fold with these gene groups",
        )
    return columns
