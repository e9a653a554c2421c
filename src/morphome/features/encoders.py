"""An encoder that is ready to run: tiles in, vectors out.

This module imports no network library; the encoder without weights needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from morphome.features.registry import EncoderSpec, encoder_spec, precision_of
from morphome.features.weights import weights_id, weights_path

#: One of this many threads reads tiles where the network runs on the same CPU: it needs 10 to 1,000 times the time
#: of reading, and more busy threads than cores slow it down.
CPU_THREADS_PER_READER = 4


class Encoder(Protocol):
    """What the encode step needs. An encoder may also have ``start``, see :func:`begin`."""

    spec: EncoderSpec

    def encode(self, tiles: np.ndarray) -> np.ndarray:
        """Vectors float32 (B, dim) of tiles uint8 (B, H, W, 3), any B; a vector depends on its tile alone."""


def load_encoder(features: Mapping[str, Any], threads: int = 1) -> Encoder:
    """The encoder of a configuration.

    Args:
        features: section of the configuration: ``encoder``, and for one with weights ``weights``, ``device``,
            ``precision``, ``runtime`` and ``batch``.
        threads: threads of a network on a CPU.

    Raises:
        MorphomeError: no such encoder, its weights are absent or do not fit it, or the device or the runtime is not
            there.
    """
    spec = encoder_spec(features["encoder"])
    # Plain imports: the hash of the code behind the encode step follows them.
    if spec.loader == "local":
        from morphome.features.stain_texture import StainTexture

        return StainTexture(spec)
    from morphome.features.build import build_model
    from morphome.features.torch_encoder import TorchEncoder

    weights_id(features)  # refuses weights that are not those of the row
    model = build_model(
        spec,
        weights_path(features) if spec.has_weights else None,
        trust_remote_code=bool(features.get("trust_remote_code")),
    )
    return TorchEncoder(
        spec,
        model,
        device=features.get("device", "auto"),
        precision=precision_of(features),
        batch=features.get("batch", 64),
        runtime=features.get("runtime", "torch"),
        threads=threads,
    )


def begin(encoder: Encoder, tiles: np.ndarray) -> Callable[[], np.ndarray]:
    """Begin to encode tiles; the function returned waits for the vectors, float32 (B, dim).

    On a GPU the batch is computed while the caller goes on; else it is ready at once. ``tiles`` may be overwritten
    as soon as this returns.
    """
    start = getattr(encoder, "start", None)
    if start is not None and len(tiles) <= encoder.batch:
        return start(tiles)
    vectors = encoder.encode(tiles)
    return lambda: vectors


def how_run(encoder: Encoder | None, batch: int) -> dict[str, Any]:
    """Device, runtime, arithmetic and tiles of one pass, for the record; all None when no encoder was needed."""
    if encoder is None:
        return dict.fromkeys(("device", "runtime", "arithmetic", "batch"))
    return {
        "device": getattr(encoder, "device", "cpu"),
        "runtime": getattr(encoder, "runtime", "numpy"),
        "arithmetic": getattr(encoder, "arithmetic", encoder.spec.precision),
        "batch": getattr(encoder, "batch", batch),
    }


def reading_threads(encoder: Encoder, threads: int) -> int:
    """How many of ``threads`` read tiles.

    All of them beside a GPU or an encoder of one thread; a quarter, at least one, beside a network on the CPU. With
    one thread, tiles are read by a thread beside the encoder as well.
    """
    if getattr(encoder, "runtime", "numpy") == "numpy" or how_run(encoder, 0)["device"] != "cpu":
        return threads
    return max(1, threads // CPU_THREADS_PER_READER)
