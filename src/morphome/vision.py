"""torchvision beside a torch that has no CUDA."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

#: Operators that torchvision's import expects to exist, with their schemas.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_DECLARED: list[object] = []  # a declaration lives as long as its library object


@functools.cache
def ensure_torchvision() -> None:
    """Make ``import torchvision`` (and so timm) work; call it before the first such import.

    The wheel of torchvision is linked against CUDA. Beside a CPU build of torch its compiled operators do not load,
    and its import stops at ``operator torchvision::nms does not exist``. Declaring the two operators that it asks for
    is enough for models and transforms; ``torchvision.ops.nms`` and its image codecs stay unusable there, and this
    project uses neither. Where the operators load, or without torchvision, nothing is done.
    """
    import torch

    found = importlib.util.find_spec("torchvision")  # finds it without importing it
    if found is None or not found.submodule_search_locations:
        return
    for compiled in sorted(Path(found.submodule_search_locations[0]).glob("_C.*")):
        try:
            torch.ops.load_library(str(compiled))
        except OSError:
            break
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(_SCHEMAS[name])
        _DECLARED.append(library)
