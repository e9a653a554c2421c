"""TransMIL: a transformer over the patches of a patient, slides alone.

Shao et al., "TransMIL: transformer based correlated multiple instance learning for whole slide image
classification", NeurIPS 2021, with the hazard head of the MCAT family. Written from the formulas. The published
attention fills short bags with zero tokens and does not mask them (``attention: nystrom_compat``), and its position
encoding lays the patches on a square in the order of the bag, wherever they lie on the slide (``grid: sorted``).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from morphome.models.batch import Batch, require
from morphome.models.nystrom import clear_pinv_errors, note_pinv_error
from morphome.models.pyramid import PyramidTransformer


class TransMIL(nn.Module):
    """logits = Lin(class token of T_P(ReLU(Lin(X)))). 2,673,172 parameters at d_in = 1024, K = 4.

    T_P: :class:`~morphome.models.pyramid.PyramidTransformer`. Depends on the order of the patches.

    Args:
        d_in: width of the patch features.
        n_bins: K.
        dim: width D.
        heads: attention heads; divides ``dim``.
        landmarks: of the Nyström attention.
        attention: see :mod:`morphome.models.nystrom`; ``nystrom_compat`` is as published.
        value_conv: convolution of the values over the token order.
        grid: ``sorted``, as published, or ``true_xy``, neighbours on the slide. In training a bag is thinned to
            ``max_patches``; with ``true_xy`` the patches left out are holes, with ``sorted`` the others close up.
        attention_dropout: of the output of attention.

    Raises:
        MorphomeError: a setting that is not known.
    """

    needs = frozenset({"path"})
    supports = frozenset({"wsi_only_inference"})
    head = "hazard"
    order_sensitive = True

    def __init__(
        self,
        d_in: int,
        n_bins: int,
        *,
        dim: int = 512,
        heads: int = 8,
        landmarks: int = 256,
        attention: str = "auto",
        value_conv: bool = True,
        grid: str = "sorted",
        attention_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        options = {"heads": heads, "landmarks": landmarks, "mode": attention, "value_conv": value_conv}
        self.d_in = d_in
        # Without landmarks, convolution of values and square, nothing is left that reads the order.
        self.order_sensitive = value_conv or attention != "exact" or grid == "sorted"
        self.project = nn.Linear(d_in, dim)
        self.transformer = PyramidTransformer(dim, options, grid, attention_dropout)
        self.classifier = nn.Linear(dim, n_bins)

    def forward(self, batch: Batch) -> dict:
        """One patient -> logits (1, K) and ``aux["pooled"]`` (1, D), the class token.

        ``aux["pinv_error"]``, in evaluation where a bag was long enough for Nyström attention: see there.

        Raises:
            MorphomeError: the patient has no patch features, or of another width; ``grid: true_xy`` without
                positions.
        """
        require(batch, self.needs, self.d_in)
        clear_pinv_errors(self)
        token, _ = self.transformer(F.relu(self.project(batch.path)), batch.pos, cls_only=True)
        out = {"logits": self.classifier(token), "extra_losses": {}, "attn": {}, "aux": {"pooled": token}}
        return note_pinv_error(self, out)
