"""The file of a trained model: weights and everything fitted, as named tensors, in one safetensors file.

Keys begin with ``weights/`` or ``fitted/``; column names and settings lie in the metadata as JSON. The file holds no
clock time and no path, so that equal training gives equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from morphome.errors import MorphomeError
from morphome.files import atomic_path, check_stamp, stamp

FORMAT = "morphome.model"


def save_model(
    path: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Write a trained model atomically.

    Args:
        arrays: tensors under ``weights/…`` and ``fitted/…``.
        facts: JSON-able facts that :func:`load_model` returns unchanged.
        settings: the settings of the step; their hash goes into the stamp.
    """
    wrong = [key for key in arrays if not key.startswith(("weights/", "fitted/"))]
    if wrong:
        raise ValueError(f"keys must begin with weights/ or fitted/: {wrong}")
    meta = json.dumps({"stamp": stamp(FORMAT, settings), **facts}, sort_keys=True, ensure_ascii=False)
    tensors = {key: np.ascontiguousarray(arrays[key]) for key in sorted(arrays)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"morphome": meta})


def load_model(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and facts of a file written by :func:`save_model`.

    Raises:
        MorphomeError: the file is missing, broken, or of another format or a newer version.
    """
    if not Path(path).exists():
        raise MorphomeError(f"{path}: file not found ({FORMAT})", "run the train step first")
    try:
        with safe_open(path, framework="numpy") as handle:
            facts = json.loads((handle.metadata() or {}).get("morphome", "{}"))
            check_stamp(facts.pop("stamp", {}), path, FORMAT)
            return {key: handle.get_tensor(key) for key in handle.keys()}, facts  # noqa: SIM118
    except SafetensorError as error:
        raise MorphomeError(f"{path}: not a readable safetensors file ({error})", "run the train step again") from error
