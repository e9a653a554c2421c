"""CLAM: attention pooling with an auxiliary loss on the patches of highest and lowest attention.

Lu et al., "Data-efficient and weakly supervised computational pathology on whole-slide images", Nature Biomedical
Engineering 5 (2021) 555, with the K time bins in the place of the classes and the hazard loss in that of the
cross-entropy of the bag. The published loss is (1 - w) bag + w instance, w = 0.3. Here the loss of the bag has weight
1, as for every model, and the instance loss w / (1 - w): the same sum divided by 1 - w, for all patients alike.

The instance loss needs a class. A patient whose event was seen in bin Y has one; a censored patient has none and
adds nothing to it. Survival code that took CLAM over leaves the branch out: ``instance_loss: false``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.models.batch import Batch, require
from morphome.models.layers import FC, GatedAttention


class _CLAM(nn.Module):
    """What both variants share: FC(d_in -> dim), gated attention, one instance classifier per time bin.

    Args:
        d_in: width of the patch features.
        n_bins: K.
        dim: width of a projected patch.
        attention_dim: hidden width of the gated attention.
        instance_loss: train the instance classifiers; without it they are not built.
        instance_weight: w, share of the instance loss in the total, between 0 and 1.
        instance_patches: k patches of each end are labelled, at most half of the bag.
        instance_margin: added to the score of the wrong label in the cross-entropy. 1 gives the smooth top-1 SVM of
            temperature 1 (Berrada, Zisserman, Kumar, ICLR 2018), an option of the paper's code.
        dropout: of the projection and the attention.

    Raises:
        MorphomeError: ``instance_weight`` not inside (0, 1), ``instance_patches`` below 1.
    """

    needs = frozenset({"path"})
    supports = frozenset({"wsi_only_inference"})
    head = "hazard"
    order_sensitive = False
    key: str
    per_bin: bool  # one row of attention per time bin, or one for all

    def __init__(
        self,
        d_in: int,
        n_bins: int,
        *,
        dim: int = 512,
        attention_dim: int = 256,
        instance_loss: bool = True,
        instance_weight: float = 0.3,
        instance_patches: int = 8,
        instance_margin: float = 0.0,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        if not 0 < instance_weight < 1:
            raise MorphomeError(
                f"models.{self.key}.instance_weight: {instance_weight} is not between 0 and 1",
                "choose a value between, or set instance_loss: false",
            )
        if instance_patches < 1:
            raise MorphomeError(
                f"models.{self.key}.instance_patches: {instance_patches} is below 1",
                "choose at least 1, or set instance_loss: false",
            )
        self.d_in = d_in
        self.scale = instance_weight / (1 - instance_weight)
        self.instance_patches = instance_patches
        self.instance_margin = instance_margin
        self.project = FC(d_in, dim, dropout)
        self.pool = GatedAttention(dim, attention_dim, n_bins if self.per_bin else 1, dropout)
        # Lin(dim -> K) on the one pooled vector, or Lin(dim -> 1) on the vector of each bin.
        self.classifiers = nn.ModuleList(
            nn.Linear(dim, 1 if self.per_bin else n_bins) for _ in range(n_bins if self.per_bin else 1)
        )
        count = n_bins if instance_loss else 0
        self.instance_classifiers = nn.ModuleList(nn.Linear(dim, 2) for _ in range(count))

    def forward(self, batch: Batch) -> dict:
        """One patient -> logits (1, K) and ``attn["gated"]``, each row of which sums to 1.

        The attention is (N,) in CLAM-SB and (K, N) in CLAM-MB. ``extra_losses["instance"]`` is there in training,
        when the patient's event was seen and the bag has at least two patches. Labels are not read in evaluation.
        ``aux["pooled"]`` (1, dim): the pooled vector; in CLAM-MB the mean of those of the bins.

        Raises:
            MorphomeError: the patient has no patch features, or of another width.
        """
        require(batch, self.needs, self.d_in)
        h = self.project(batch.path)
        pooled, weights = self.pool(h)
        attention = weights.T.detach()
        losses = {}
        labelled = self.training and batch.event == 1 and batch.bin is not None
        if labelled and self.instance_classifiers and h.shape[0] > 1:
            row = attention[batch.bin if self.per_bin else 0]
            losses["instance"] = self.scale * self._instance_loss(h, row, batch.bin)
        logits = torch.cat([layer(row) for layer, row in zip(self.classifiers, pooled, strict=True)])
        return {
            "logits": logits.unsqueeze(0),
            "extra_losses": losses,
            "attn": {"gated": attention if self.per_bin else attention[0]},
            "aux": {"pooled": pooled.mean(0, keepdim=True)},
        }

    def _instance_loss(self, h: Tensor, attention: Tensor, y: int) -> Tensor:
        """h (N, dim), attention (N,), bin y -> mean loss of classifier y on its 2 k patches.

        Label 1 for the k patches of highest attention, 0 for the k of lowest. One stable sort gives both ends, so
        that no patch is in both, and ties go by the order of the patches.
        """
        k = min(self.instance_patches, h.shape[0] // 2)
        order = torch.argsort(attention, descending=True, stable=True)
        scores = self.instance_classifiers[y](h[torch.cat([order[:k], order[-k:]])])
        labels = torch.cat([torch.ones_like(order[:k]), torch.zeros_like(order[:k])])
        if self.instance_margin:
            scores = scores + self.instance_margin * (1 - F.one_hot(labels, 2))
        return F.cross_entropy(scores, labels)


class CLAMSB(_CLAM):
    """CLAM with one row of attention and Lin(dim -> K). 793,869 parameters at d_in = 1024, K = 4."""

    key = "clam_sb"
    per_bin = False


class CLAMMB(_CLAM):
    """CLAM with a row of attention and Lin(dim -> 1) for each time bin. 794,640 parameters at d_in = 1024, K = 4."""

    key = "clam_mb"
    per_bin = True
