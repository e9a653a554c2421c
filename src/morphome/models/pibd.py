"""PIBD: prototypes of outcome classes choose patches and pathways, their product makes a shared token.

Zhang et al., "Prototypical information bottlenecking and disentangling for multimodal cancer survival prediction",
ICLR 2024. Written from the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.models import hazard
from morphome.models.batch import Batch, require
from morphome.models.fusion import OUTPUT, Encoded, FusionModel
from morphome.models.layers import GroupEncoder, stand_in
from morphome.models.pibd_blocks import (
    CLUB,
    POE_VARIANCES,
    Bottleneck,
    DisentanglingLayer,
    PrototypeBottleneck,
    fixed_noise,
    kl_standard_normal,
    product_of_experts,
    proxy_loss,
)

TRAINING_PROTOTYPES = ("own", "voted")
#: Seeds of the noise that evaluation uses.
_NOISE = {"path": 1, "omic": 2, "global": 3}


class PIBD(FusionModel):
    """A patient is up to ``sub_bags`` sub-bags of at most ``sub_bag`` patches, whose logits are averaged.

    Two bottlenecks (:class:`~morphome.models.pibd_blocks.PrototypeBottleneck`) keep patches H and pathways P; the
    product of their two chosen prototypes gives the global token; one layer of attention within H, within P and of
    the global token over all; ``logits = Lin(ReLU(Lin [mean_H; mean_P; global]))``. 2,574,094 parameters outside the
    pathway networks at d_in = 768, K = 4.

    Losses in training: ``proxy`` (similarity to the own prototype against the others), ``prototype_nll`` and
    ``prototype_kl`` (of both bottlenecks), ``club`` (mutual information between H and P and of both with the global
    token, and the fit of its predictors). They need bin and event, which nothing reads in evaluation; without them a
    training forward has no such losses.

    CLUB compares patients, and bags arrive one at a time. So the model keeps means of H, P and the global token of
    the last ``club_batch`` - 1 training patients, without gradient; the patient of the moment carries the gradient
    that a whole batch would have. With 1 the bound is 0 and only the fit of the predictors is left.

    More patches than ``sub_bag`` x ``sub_bags``: training draws, evaluation takes evenly spread ones. A shorter bag
    has fewer and shorter sub-bags, equal in length, some of whose patches come twice. Beyond one sub-bag the order
    of the patches matters.

    Published: ``training.beta`` .5, Adam 5e-4 with decay 1e-3, batch 32, 30 epochs: settings of the trainer.

    Args:
        d_in: width of the patch features.
        group_sizes: columns per pathway, in the order of ``Batch.groups``.
        n_bins: K.
        missing_tokens: learn one token per pathway that stands in for a patient without genes.
        dim: width of a token.
        hidden: width of the bottlenecks' hidden layers and of CLUB's predictors.
        head_dim: width before the classifier.
        heads: of the attention layer; divides ``dim``.
        mlp_ratio: of the attention layer.
        keep_path, keep_omic: shares of patches and pathways that are kept; rounded down, at least 1.
        samples: draws of a prototype that are averaged.
        sub_bag, sub_bags: as above.
        poe_variance: ``sigma2``: precision 1 / sigma^2 and noise times a standard deviation; ``sigma_legacy``: as
            published, 1 / sigma and noise times a variance.
        training_prototype: ``own``: as published, the global token is made of the prototypes of the patient's class
            in training, so that the head can read the label off it there; ``voted``: of those that evaluation
            would choose.
        proxy_weight, nll_weight, kl_weight, club_weight: weights of the losses; 0 leaves one out.
        prototype_beta: beta of ``prototype_nll``.
        club_batch: patients that CLUB compares.
        dropout: alpha dropout of the pathway networks.
        bottleneck_dropout: of the bottlenecks.
        attention_dropout: of the attention layer.

    Raises:
        MorphomeError: unknown choice, a share outside (0, 1], a number below 1, or ``heads`` does not divide ``dim``.
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
        missing_tokens: bool = False,
        *,
        dim: int = 256,
        hidden: int = 512,
        head_dim: int = 256,
        heads: int = 4,
        mlp_ratio: float = 1.0,
        keep_path: float = 0.5,
        keep_omic: float = 0.8,
        samples: int = 50,
        sub_bag: int = 512,
        sub_bags: int = 8,
        poe_variance: str = "sigma2",
        training_prototype: str = "own",
        proxy_weight: float = 1.0,
        nll_weight: float = 0.1,
        kl_weight: float = 0.01,
        club_weight: float = 0.1,
        prototype_beta: float = 0.5,
        club_batch: int = 32,
        dropout: float = 0.25,
        bottleneck_dropout: float = 0.2,
        attention_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("poe_variance", poe_variance, POE_VARIANCES),
            ("training_prototype", training_prototype, TRAINING_PROTOTYPES),
        ):
            if value not in known:
                raise MorphomeError(f"models.pibd.{name}: {value!r} is not known", f"choose {' or '.join(known)}")
        for name, share in (("keep_path", keep_path), ("keep_omic", keep_omic)):
            if not 0 < share <= 1:
                raise MorphomeError(f"models.pibd.{name}: {share} is not a share", "choose above 0, at most 1")
        if dim % heads or min(samples, sub_bag, sub_bags, club_batch) < 1:
            raise MorphomeError(
                f"models.pibd: {heads} heads of width {dim}, {samples} samples, {sub_bags} sub-bags of {sub_bag}, "
                f"club_batch {club_batch}",
                "choose heads that divide dim, and numbers of at least 1",
            )
        self.d_in, self.dim, self.n_bins = d_in, dim, n_bins
        self.sub_bag, self.sub_bags, self.samples = sub_bag, sub_bags, samples
        self.poe_variance, self.training_prototype = poe_variance, training_prototype
        self.proxy_weight, self.nll_weight = proxy_weight, nll_weight
        self.kl_weight, self.club_weight, self.prototype_beta = kl_weight, club_weight, prototype_beta
        shared: dict[str, Any] = {"samples": samples, "dropout": bottleneck_dropout}
        self.pathways = GroupEncoder(list(group_sizes.values()), dim, dropout)
        self.path = PrototypeBottleneck(d_in, hidden, dim, n_bins, keep=keep_path, noise_seed=_NOISE["path"], **shared)
        self.omic = PrototypeBottleneck(dim, hidden, dim, n_bins, keep=keep_omic, noise_seed=_NOISE["omic"], **shared)
        self.expert_scores = nn.Parameter(torch.zeros(2))
        self.register_buffer("noise", fixed_noise((dim,), _NOISE["global"]))
        self.layer = DisentanglingLayer(dim, heads, mlp_ratio, attention_dropout)
        self.hidden = nn.Linear(3 * dim, head_dim)
        self.classifier = nn.Linear(head_dim, n_bins)
        self.club_pair = CLUB(dim, dim, hidden)
        self.club_global = CLUB(2 * dim, dim, hidden)
        # Means of earlier training patients, the oldest is overwritten; part of the state, so a resumed run agrees.
        self.register_buffer("earlier", torch.zeros(club_batch - 1, 3 * dim))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        # Last, so that the weights of the model without it stay the same.
        self.missing = stand_in(len(group_sizes), dim) if missing_tokens else None

    def branch_parameters(self) -> dict[str, list[nn.Parameter]]:
        omic = [*self.pathways.parameters(), *self.omic.parameters()]
        return {"path": list(self.path.parameters()), "omic": omic + ([] if self.missing is None else [self.missing])}

    @property
    def branch_widths(self) -> dict[str, int]:
        return {"path": self.dim, "omic": self.dim}

    def bags(self, n: int, device: torch.device) -> Tensor:
        """Rows of each sub-bag of a bag of n patches, (S, m), m <= ``sub_bag``; random in training only."""
        most = min(n, self.sub_bag * self.sub_bags)
        if self.training:
            order = torch.randperm(n, device=device)[:most]
        else:
            order = torch.arange(most, device=device) * n // most
        count = -(-most // self.sub_bag)
        length = -(-most // count)
        # Sub-bag s takes every count-th patch from s on; the first patches fill up the last sub-bags.
        return order[torch.arange(count * length, device=device) % most].reshape(length, count).T

    def global_token(self, path: Bottleneck, omic: Bottleneck) -> Tensor:
        """Mean of draws from the product of the two chosen prototypes, (S, dim)."""
        count = len(path.chosen)
        chosen = path.chosen, omic.chosen.expand(count)
        means = torch.stack([part.mean[j] for part, j in zip((self.path, self.omic), chosen, strict=True)])
        sigmas = torch.stack([part.sigma[j] for part, j in zip((self.path, self.omic), chosen, strict=True)])
        alpha = torch.softmax(self.expert_scores, 0)
        mean, scale = product_of_experts(means, sigmas, alpha, self.poe_variance)
        noise = torch.randn_like(mean) if self.training else self.noise
        return mean + scale * noise * self.samples**-0.5

    def encode(self, batch: Batch) -> Encoded:
        """H (S k, dim), the sub-bags one after the other, P (k', dim) and the global token of each sub-bag (S, dim).

        ``attn["path_kept"]`` (N,) and ``attn["omic_kept"]`` (T,): share of the kept pairs of instance and prototype
        that each patch and each pathway has; each sums to 1. ``aux["prototype"]``: those chosen, K (1 - event) + bin.
        """
        learned = self.missing is not None and batch.groups is None
        require(batch, self.needs - {"omic_groups"} if learned else self.needs, self.d_in)
        labelled = self.training and batch.bin is not None and batch.event is not None
        label = self.n_bins * (1 - int(batch.event)) + int(batch.bin) if labelled else None
        own = label if self.training_prototype == "own" else None
        device = batch.path.device

        bags = self.bags(len(batch.path), device)
        # A sampled bag is encoded without what was left out.
        used, bags = bags.unique(return_inverse=True)
        path = self.path(batch.path[used], bags, own)
        tokens = self.missing if learned else self.pathways(batch.groups)
        omic = self.omic(tokens, torch.arange(len(tokens), device=device)[None], own)
        losses = self._prototype_losses(path, omic, label, batch) if labelled else {}
        if labelled and self.club_weight:
            losses["club"] = tokens.new_zeros(())  # known after the attention layer: see output
        return Encoded(
            {"path": path.tokens.flatten(0, 1), "omic": omic.tokens[0], "global": self.global_token(path, omic)},
            losses,
            {"path_kept": _kept(used[path.rows], len(batch.path)), "omic_kept": _kept(omic.rows, len(tokens))},
            {"prototype": {"path": path.chosen, "omic": omic.chosen}},
        )

    def _prototype_losses(self, path: Bottleneck, omic: Bottleneck, own: int, batch: Batch) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        pairs = ((self.path, path), (self.omic, omic))
        bins, event = (torch.tensor([x], device=batch.path.device) for x in (batch.bin, batch.event))
        if self.proxy_weight:
            losses["proxy"] = self.proxy_weight * sum(proxy_loss(kept.similarity, own) for _, kept in pairs)
        if self.nll_weight:
            # The decoder is linear: that of the mean of the samples is the mean over the samples.
            logits = [part.decoder(kept.prototypes[own])[None] for part, kept in pairs]
            nll = sum(hazard.nll_loss(x, bins, event, self.prototype_beta) for x in logits)
            losses["prototype_nll"] = self.nll_weight * nll
        if self.kl_weight:
            kl = sum(kl_standard_normal(part.mean, part.sigma).mean() for part, _ in pairs)
            losses["prototype_kl"] = self.kl_weight * kl
        return losses

    def means(self, z: Mapping[str, Tensor]) -> Tensor:
        """[mean_H; mean_P; global] behind the attention layer, (S, 3 dim)."""
        g = z["global"][:, None]
        count = len(g)
        # One row in the place of the tokens serves every sub-bag.
        h = z["path"].reshape(count, -1, self.dim) if len(z["path"]) % count == 0 else z["path"].expand(count, -1, -1)
        h, p, g = self.layer(h, z["omic"][None], g)
        return torch.cat([h.mean(1), p.mean(1).expand(count, -1), g[:, 0]], 1)

    def _logits(self, means: Tensor) -> Tensor:
        return self.classifier(F.relu(self.hidden(means))).mean(0, keepdim=True)

    def fuse(self, z: Mapping[str, Tensor]) -> Tensor:
        """H, P and the global tokens -> logits (1, K), the mean over the sub-bags."""
        return self._logits(self.means(z))

    def _club(self, live: Tensor) -> Tensor:
        """CLUB of the patient of the moment (3 dim,) among earlier ones, which this call then joins to them."""
        rows = len(self.earlier)
        earlier = self.earlier[: min(int(self.seen), rows)].clone()
        # Only this row of the batch carries a gradient to the encoders: it gets that of all rows in their turn.
        batch = torch.cat([(live + len(earlier) * (live - live.detach()))[None], earlier])
        h, p, g = batch.split(self.dim, 1)
        pair, pair_fit = self.club_pair(h, p)
        both, both_fit = self.club_global(torch.cat([h, p], 1), g)
        if rows and torch.is_grad_enabled():
            self.earlier[self.seen % rows] = live.detach()
            self.seen += 1
        return pair + both + pair_fit + both_fit

    def output(self, encoded: Encoded, z: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """As for every fusion model; the loss ``club`` is added here, where the attention layer has run."""
        means = self.means(encoded.z if z is None else z)
        if "club" in encoded.extra_losses:
            club = self.club_weight * self._club(means.mean(0))
            encoded = replace(encoded, extra_losses=encoded.extra_losses | {"club": club})
        return {
            OUTPUT[self.head]: self._logits(means),
            "extra_losses": encoded.extra_losses,
            "attn": encoded.attn,
            "aux": encoded.aux,
        }


def _kept(rows: Tensor, n: int) -> Tensor:
    """How often each of n instances is among the kept ones, as shares that sum to 1, (n,)."""
    share = torch.ones(rows.numel(), device=rows.device) / rows.numel()
    return torch.zeros(n, device=rows.device).index_add(0, rows.flatten(), share)
