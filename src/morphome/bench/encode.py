"""How fast a network encodes tiles: our way against the loop that most tools run.

Both get the same tiles as bytes and the same number of threads. The usual loop turns each tile into a float tensor,
normalises it, joins 64 of them and calls the network in fp32. Ours is
:class:`morphome.features.torch_encoder.TorchEncoder`.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from morphome.bench.read import dense_area
from morphome.bench.rounds import interleaved
from morphome.errors import MorphomeError
from morphome.features.architectures import TruncatedResNet50
from morphome.features.build import PooledNetwork, TokenPooling, build_model, gap_of_maps, timm_network, tokens_of_timm
from morphome.features.registry import EncoderSpec, encoder_spec
from morphome.features.torch_encoder import TorchEncoder
from morphome.slides.open import open_slide
from morphome.slides.patches import PatchShape, read_patch
from morphome.vision import ensure_torchvision

PEER_BATCH = 64
_PEER = f"ToTensor and Normalize of torchvision per tile, batches of {PEER_BATCH}, fp32, inference mode"


def bench_encode(
    slide: Path,
    encoder: str = "resnet50_trunc",
    weights: Path | None = None,
    rounds: int = 3,
    tiles: int = 64,
    threads: int = 1,
) -> dict[str, Any]:
    """Measure tiles per CPU second.

    Args:
        slide: tiles come from its densest area, read once before the rounds.
        encoder: a row of the registry that has a network.
        weights: as :func:`morphome.features.build.build_model` takes them; None for random numbers, which take the
            same time.
        rounds: interleaved rounds; medians are reported.
        tiles: tiles of a round.
        threads: threads of the network, for both.

    Returns:
        JSON-able: ``slide``, ``encoder``, ``weights`` (in words), ``n_tiles``, ``patch_px``, ``rounds``,
        ``threads``, ``peer_is`` (in words), ``peer`` and ``ours`` (tiles per CPU second; ours in bf16 with torch),
        ``ratio``, and ``rows``, one a way of ours: ``runtime``, ``precision``, ``tiles_per_second``, ``ratio`` and
        ``cosine_min``, the least cosine between its vectors and those of the peer.

    Raises:
        MorphomeError: the encoder has no network, or none that can be made without its weights.
        SlideError: the slide cannot be read.
    """
    spec = encoder_spec(encoder)
    model = build_model(spec, Path(weights)) if weights is not None else random_network(spec)
    pixels = _tiles(Path(slide), spec.input_px[0], tiles)
    usual = _usual_loop(spec, copy.deepcopy(model))
    kinds = [(runtime, precision) for runtime in runtimes() for precision in ("bf16", "fp32")]
    ways: dict[str, Callable[[], np.ndarray]] = {"peer": lambda: usual(pixels)}
    for runtime, precision in kinds:
        # The last of them sets the threads of torch for the peer as well.
        ours = TorchEncoder(
            spec, copy.deepcopy(model), device="cpu", precision=precision, runtime=runtime, threads=threads
        )
        ways[f"{runtime} {precision}"] = lambda ours=ours: ours.encode(pixels)
    vectors = {name: way() for name, way in ways.items()}
    measured = interleaved(rounds, ways)
    rows = [
        {
            "runtime": runtime,
            "precision": precision,
            "tiles_per_second": len(pixels) / measured.median(f"{runtime} {precision}"),
            "ratio": measured.ratio(ours=f"{runtime} {precision}"),
            "cosine_min": least_cosine(vectors[f"{runtime} {precision}"], vectors["peer"]),
        }
        for runtime, precision in kinds
    ]
    return {
        "slide": Path(slide).name,
        "encoder": spec.name,
        "weights": str(weights) if weights is not None else "random numbers",
        "n_tiles": len(pixels),
        "patch_px": pixels.shape[1],
        "rounds": rounds,
        "threads": threads,
        "peer_is": _PEER,
        "peer": len(pixels) / measured.median("peer"),
        "ours": rows[0]["tiles_per_second"],
        "ratio": rows[0]["ratio"],
        "rows": rows,
    }


def runtimes() -> list[str]:
    """What can run a network here."""
    return ["torch", "openvino"] if importlib.util.find_spec("openvino") else ["torch"]


def random_network(spec: EncoderSpec) -> nn.Module:
    """The network of a row with random weights from a fixed seed, for measurements of time.

    Raises:
        MorphomeError: it is no network, or its code comes with its weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if spec.loader == "random":
            return build_model(spec, None)
        if spec.loader == "resnet":
            network: nn.Module = PooledNetwork(TruncatedResNet50(**spec.arch_kwargs), gap_of_maps)
        elif spec.loader == "timm":
            pooling = TokenPooling(tokens_of_timm, spec.pooling, spec.prefix_tokens)
            network = PooledNetwork(timm_network(spec), pooling)
        else:
            raise MorphomeError(
                f"encoder '{spec.key}' cannot be made without its weights",
                f"fetch them (morphome encoders prefetch {spec.key}) and name them, or measure resnet50_trunc",
            )
    return network.float().eval().requires_grad_(False)


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Smallest cosine of the angle between two vectors of the same row."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())


def _tiles(slide: Path, patch_px: int, n: int) -> np.ndarray:
    """uint8 (n, patch_px, patch_px, 3) at level 0; a small slide gives its tiles several times."""
    shape = PatchShape(patch_px, patch_px, patch_px)
    with open_slide(slide) as reader:
        coords = dense_area(reader, patch_px, n)
        found = np.stack([read_patch(reader, x, y, shape) for x, y in coords.tolist()])
    return found[np.arange(n) % len(found)]


def _usual_loop(spec: EncoderSpec, model: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    ensure_torchvision()
    from torchvision.transforms import Compose, Normalize, ToTensor

    transform = Compose([ToTensor(), Normalize(spec.mean, spec.std)])

    def encode(pixels: np.ndarray) -> np.ndarray:
        vectors = []
        with torch.inference_mode():
            for start in range(0, len(pixels), PEER_BATCH):
                batch = [transform(Image.fromarray(tile)) for tile in pixels[start : start + PEER_BATCH]]
                vectors.append(model(torch.stack(batch)).numpy())
        return np.concatenate(vectors)

    return encode
