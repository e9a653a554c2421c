"""Learned tissue segmenters as plug-ins beside the saturation rule, which needs no weights and is the default.

A package offers one by an entry point of the group ``morphome.segmenters``: its name is what ``tiling.segmenter`` says,
and it names a function that takes the weights file (or None) and returns a :class:`Segmenter`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from morphome.errors import MorphomeError

if TYPE_CHECKING:
    from torch import nn

#: The segmenter of :mod:`morphome.slides.tissue`.
DEFAULT = "saturation"
GROUP = "morphome.segmenters"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Segmenter(Protocol):
    """Tells tissue from glass on an overview of the whole slide.

    Attributes:
        mpp: microns per pixel of the overview that it wants. The overview is held in memory: at 1.0, three bytes for
            each square micron (0.9 GB for 20 x 15 mm).
    """

    mpp: float

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """Tissue, bool (h, w), of uint8 (h, w, 3). Ink and small pieces are taken out afterwards."""


def load_segmenter(name: str, weights: Path | None) -> Segmenter:
    """The learned segmenter of a name.

    Args:
        name: ``tiling.segmenter``.
        weights: ``tiling.segmenter_weights``.

    Raises:
        MorphomeError: unknown name, or weights that are missing or of another network.
    """
    factories: dict[str, Callable[[Path | None], Segmenter]] = {"hest_deeplabv3": HestDeepLabV3}
    for entry in entry_points(group=GROUP):
        if entry.name == name and name not in factories:
            return entry.load()(weights)
    if name not in factories:
        known = sorted({DEFAULT, *factories, *(entry.name for entry in entry_points(group=GROUP))})
        raise MorphomeError(
            f"tiling.segmenter: '{name}' is unknown",
            f"one of {', '.join(known)}, or install the package that offers it",
        )
    return factories[name](weights)


class HestDeepLabV3:
    """DeepLabV3 with a ResNet-50 and two classes (glass, tissue) at 1 micron per pixel (Jaume et al., HEST-1k, 2024).

    The published weights are ``deeplabv3_seg_v4.ckpt`` of MahmoodLab/hest-tissue-seg (CC-BY-NC-SA-4.0: not for
    commercial use); any checkpoint of torchvision's ``deeplabv3_resnet50`` with two classes is read.

    Args:
        weights: ``.safetensors``, or a torch file of tensors alone (read with ``weights_only``).
    """

    mpp = 1.0
    window_px = 512

    def __init__(self, weights: Path | None) -> None:
        if weights is None or not Path(weights).is_file():
            raise MorphomeError(
                f"tiling.segmenter 'hest_deeplabv3' needs tiling.segmenter_weights ({weights or 'not set'})",
                "download deeplabv3_seg_v4.ckpt of MahmoodLab/hest-tissue-seg (non-commercial licence) and name its "
                "path there, or take tiling.segmenter: saturation",
            )
        import torch

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = _deeplab(Path(weights)).eval().to(self._device)

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """Tissue of uint8 (h, w, 3) at 1 micron per pixel, window by window; edges are filled up with white."""
        import torch

        height, width = rgb.shape[:2]
        side = self.window_px
        mask = np.zeros((height, width), bool)
        mean, std = (torch.tensor(v, device=self._device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        for top in range(0, height, side):
            for left in range(0, width, side):
                part = rgb[top : top + side, left : left + side]
                window = np.full((side, side, 3), 255, np.uint8)
                window[: part.shape[0], : part.shape[1]] = part
                pixels = torch.from_numpy(window).to(self._device).permute(2, 0, 1)[None]
                with torch.inference_mode():
                    scores = self._model((pixels / 255 - mean) / std)["out"][0]
                tissue = (scores[1] > scores[0]).cpu().numpy()
                mask[top : top + side, left : left + side] = tissue[: part.shape[0], : part.shape[1]]
        return mask


def _deeplab(weights: Path) -> nn.Module:
    from morphome.state_dict import mismatch, read_state_dict
    from morphome.vision import ensure_torchvision

    ensure_torchvision()
    from torchvision.models.segmentation import deeplabv3_resnet50

    model = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=2, aux_loss=False)
    state = read_state_dict(weights, ("state_dict",), ("module.", "model."))
    # The second head helps training only.
    state = {name: value for name, value in state.items() if not name.startswith("aux_classifier.")}
    if what := mismatch(model, state):
        raise MorphomeError(
            f"{weights}: not the weights of a deeplabv3_resnet50 with two classes ({what})",
            "check tiling.segmenter_weights; the published file is deeplabv3_seg_v4.ckpt",
        )
    model.load_state_dict(state)
    return model
