"""Going on after a kill: what the training loop writes beside its outputs, and takes up again.

Every random number of training is derived from the seed, the epoch and the place of the patient in it, so a loop that
is put back to the end of an epoch continues bit for bit (on a CPU).
"""

from __future__ import annotations

import hashlib
import io
import time as clock
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from morphome.files import atomic_path

#: A state is written at the end of an epoch when the last one is this old.
EVERY_SECONDS = 60.0
# Bytes in front of the state.
_SEAL = hashlib.sha256().digest_size


class Resume:
    """The file of one training run.

    Args:
        path: of the file; None: nothing is written or read.
        key: hash of everything that the run depends on; a state with another key is not taken up.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key = path, key
        self._last = clock.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state of an earlier run with the same key; None without one, or where the file is damaged."""
        if self.path is None or not self.path.exists():
            return None
        found = memoryview(self.path.read_bytes())
        seal, content = found[:_SEAL], found[_SEAL:]
        if seal != self._sealed(content):
            return None
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def _sealed(self, content: memoryview) -> bytes:
        """Hash of key and content: torch itself reads damaged tensors without a word."""
        digest = hashlib.sha256(self.key.encode())
        digest.update(content)
        return digest.digest()

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return self.path is not None and clock.monotonic() - self._last >= EVERY_SECONDS

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a state (tensors, numbers, texts, lists and dictionaries of them)."""
        if self.path is None:
            return
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getbuffer()
        with atomic_path(self.path) as temporary, temporary.open("wb") as handle:
            handle.write(self._sealed(content))
            handle.write(content)
        self._last = clock.monotonic()

    def done(self) -> None:
        """The run is complete: the file goes, and what a kill in the middle of writing has left."""
        if self.path is None:
            return
        for left in (self.path, *self.path.parent.glob(f".{self.path.stem}.*{self.path.suffix}")):
            left.unlink(missing_ok=True)
