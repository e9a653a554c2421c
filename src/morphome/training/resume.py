"""Going on after a kill: what the training loop writes beside its outputs, and takes up again.

Every random number of training is derived from the seed, the epoch and the place of the patient in it, so a loop that
is put back to the end of an epoch continues bit for bit (on a CPU).
"""

from __future__ import annotations

import pickle
import time as clock
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from morphome.files import atomic_path

#: A state is written at the end of an epoch when the last one is this old.
EVERY_SECONDS = 60.0


class Resume:
    """The file of one training run.

    Args:
        path: of the file; None: nothing is written or read.
        key: hash of everything that the run depends on; a state with another key is not taken up.
    """

    def __init__(self, path: Path | None, key: str, every_seconds: float = EVERY_SECONDS) -> None:
        self.path, self.key, self.every_seconds = path, key, every_seconds
        self._last = clock.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state of an earlier run with the same key; None without one."""
        if self.path is None or not self.path.exists():
            return None
        try:
            found = torch.load(self.path, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError):
            return None  # an incomplete file of another version; training starts anew
        return found["state"] if isinstance(found, dict) and found.get("key") == self.key else None

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return self.path is not None and clock.monotonic() - self._last >= self.every_seconds

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a state (tensors, numbers, texts, lists and dictionaries of them)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as temporary:
            torch.save({"key": self.key, "state": dict(state)}, temporary)
        self._last = clock.monotonic()

    def done(self) -> None:
        """The run is complete: the file goes."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
