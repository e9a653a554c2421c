"""Encoders with weights: a network that takes tiles as bytes and gives vectors, on a CPU or a GPU.

Tiles stay uint8 until they are on the device (a 224 px tile is 150 kB as bytes, 602 kB as float32) and are normalised
there with the operations of the usual ToTensor and Normalize. Normalisation is not folded into the first
convolution: with zero padding that would change the border. Every forward pass has one shape: the last batch is
filled up, and the vectors of the filling are thrown away, so that a vector depends on its tile alone.

On a GPU a ring of pinned buffers and a second stream copy the next batch while this one is computed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from morphome.errors import MorphomeError

if TYPE_CHECKING:
    from morphome.features.registry import EncoderSpec

#: Batches in flight: one computed, one copied, one filled.
LANES = 3
#: Most tiles of one pass on a CPU: activations of more do not stay in its caches (ResNet-50 to layer 3 in bf16 ran at
#: 46 tiles/s and core in passes of 4 to 8, 25 in passes of 64; vision transformers do not care).
CPU_BATCH = 8
#: Folding batch norms may change vectors by rounding only: largest difference as a share of the largest value.
FOLD_TOLERANCE = 1e-4
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEncoder:
    """A network as an encoder.

    Args:
        spec: row of the registry: dimension, mean and standard deviation, declared precision.
        model: maps normalised float (B, 3, H, W) to (B, dim).
        device: ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``.
        precision: ``declared`` (of the row), ``fp32``, ``bf16`` or ``fp16``.
        batch: tiles of one forward pass, on a CPU no more than :data:`CPU_BATCH`.
        runtime: ``torch``, or ``openvino`` (CPU only; converted at the first batch).
        threads: threads of the network on a CPU.

    Attributes:
        device, runtime, batch, threads: what is used.
        arithmetic: ``fp32``, ``bf16`` or ``fp16`` as computed; fp16 is computed in fp32 on a CPU, where few
            processors have it.
        n_folded: batch norms that were folded into convolutions.
        seconds_busy: time that the device computed so far; on a GPU of the batches that were fetched.

    Raises:
        MorphomeError: the device or the runtime is not there.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        model: nn.Module,
        *,
        device: str = "auto",
        precision: str = "declared",
        batch: int = 64,
        runtime: str = "torch",
        threads: int = 1,
    ) -> None:
        self.spec, self.runtime, self.threads = spec, runtime, threads
        self.device = choose_device(device, runtime)
        self.batch = min(batch, CPU_BATCH) if self.device == "cpu" else batch
        asked = spec.precision if precision == "declared" else precision
        self.arithmetic = "fp32" if asked == "fp16" and self.device == "cpu" else asked
        if self.device == "cuda" and self.arithmetic == "fp32":
            # PyTorch lets convolutions use 10-bit mantissas by default, which is not the fp32 of the fingerprint.
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        if self.device == "cpu":
            torch.set_num_threads(threads)
        sides = spec.input_px or (224,)
        model, self.n_folded = fold_batch_norms(model.eval().requires_grad_(False), sides[0])
        # OpenVINO lowers the precision itself; it is given the network in fp32.
        dtype = _DTYPES["fp32" if runtime == "openvino" else self.arithmetic]
        self._network = _Network(model, spec, dtype, self.device)
        self.seconds_busy = 0.0
        self._compiled: Callable[[np.ndarray], Any] | None = None
        self._lanes: list[_Lane] = []
        self._next: Iterator[_Lane] = iter(())
        self._copies = torch.cuda.Stream() if self.device == "cuda" else None

    def encode(self, tiles: np.ndarray) -> np.ndarray:
        """Vectors float32 (B, dim) of tiles uint8 (B, H, W, 3), any B.

        Raises:
            MorphomeError: the device has no memory for a batch, or the network gives vectors of another length.
        """
        # All batches are begun before the first is fetched: at most LANES are in flight, older ones are kept.
        parts = [self.start(tiles[i : i + self.batch]) for i in range(0, len(tiles), self.batch)]
        return np.concatenate([fetch() for fetch in parts]) if parts else np.zeros((0, self.spec.dim), np.float32)

    def start(self, tiles: np.ndarray) -> Callable[[], np.ndarray]:
        """Begin a batch of 1 to ``batch`` tiles; the function returned waits for its vectors, float32 (B, dim).

        ``tiles`` may be overwritten as soon as this returns.
        """
        if tiles.ndim != 4 or tiles.shape[-1] != 3 or tiles.dtype != np.uint8 or not 0 < len(tiles) <= self.batch:
            raise ValueError(f"tiles are {tiles.dtype} {tiles.shape}, not uint8 (1 to {self.batch}, H, W, 3)")
        explained = functools.partial(self._explained, tiles.shape[1:3])
        with explained():
            if not self._lanes or self._lanes[0].host.shape[1:] != tiles.shape[1:]:
                self._prepare(tiles.shape[1], tiles.shape[2])
            lane = next(self._next)
            lane.fill(tiles)
            started = time.perf_counter()
            out = self._forward(lane)
            if self.device == "cpu":
                self.seconds_busy += time.perf_counter() - started
            if out.shape != (self.batch, self.spec.dim):
                raise MorphomeError(
                    f"features.encoder '{self.spec.key}': the network gives {tuple(out.shape)} for {self.batch} tiles, "
                    f"but its vectors have {self.spec.dim} values",
                    "the weights or the variant do not belong to this row of the registry",
                )
            lane.give(out)
        return _Result(self, lane, len(tiles), explained)

    def _forward(self, lane: _Lane) -> torch.Tensor:
        if self._compiled is not None:
            return torch.from_numpy(np.array(self._compiled(lane.host.numpy())[0], np.float32))
        with torch.inference_mode():
            if self._copies is None:
                return self._network(lane.host)
            with torch.cuda.stream(self._copies):
                lane.device.copy_(lane.host, non_blocking=True)
                lane.copied.record(self._copies)
            torch.cuda.current_stream().wait_event(lane.copied)
            lane.begun.record()
            return self._network(lane.device)

    def _prepare(self, height: int, width: int) -> None:
        """Buffers, and for OpenVINO the compiled network, for tiles of one size."""
        for lane in self._lanes:
            lane.keep()
        shape = (self.batch, height, width, 3)
        self._lanes = [_Lane(shape, self.spec.dim, self.device) for _ in range(LANES)]
        self._next = itertools.cycle(self._lanes)
        if self.runtime == "openvino":
            self._compiled = _compile_openvino(self._network, shape, self.arithmetic, self.threads)

    @contextlib.contextmanager
    def _explained(self, size: tuple[int, ...]) -> Iterator[None]:
        """Turn a device that ran out of memory, or failed, into an error with a remedy."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            text = str(error)
            where = f"features.encoder '{self.spec.key}' on {self.device}"
            short = ("out of memory", "can't allocate memory", "not enough memory")
            if isinstance(error, MemoryError) or any(words in text for words in short):
                raise MorphomeError(
                    f"{where}: out of memory with batches of {self.batch} tiles of {size[1]} x {size[0]} px",
                    f"set features.batch to {max(1, self.batch // 2)} or less",
                ) from error
            if "CUDA error" in text:
                raise MorphomeError(
                    f"{where}: {text.splitlines()[0]}",
                    "run the step again; if it happens again, check the driver, or set features.device: cpu",
                ) from error
            raise


class _Network(nn.Module):
    """uint8 (B, H, W, 3) to float32 (B, dim)."""

    def __init__(self, model: nn.Module, spec: EncoderSpec, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        # A convolutional network is in the low precision throughout. Networks with layer norms or attention run under
        # autocast, which keeps what is delicate in fp32; their large weights are converted here, once, and not in
        # every pass.
        kinds = (nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention, nn.GroupNorm)
        modules = list(model.modules())
        self.convolutional = any(isinstance(m, nn.Conv2d) for m in modules) and not any(
            isinstance(m, kinds) for m in modules
        )
        self.model, self.dtype, self.kind = model, dtype, device
        mean, std = spec.mean or (0.0, 0.0, 0.0), spec.std or (1.0, 1.0, 1.0)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))
        if self.convolutional:
            self.model.to(dtype=dtype, memory_format=torch.channels_last)
        elif dtype != torch.float32:
            for module in modules:
                if type(module) in (nn.Linear, nn.Conv2d):
                    module.to(dtype)
        self.to(device)

    def normalise(self, tiles: torch.Tensor) -> torch.Tensor:
        """float32 (B, 3, H, W) as ToTensor and Normalize give it; channels_last, without a copy to get there."""
        return tiles.permute(0, 3, 1, 2).to(torch.float32).div(255).sub(self.mean).div(self.std)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        pixels = self.normalise(tiles)
        if self.dtype == torch.float32:
            return self.model(pixels).float()
        if self.convolutional:
            return self.model(pixels.to(self.dtype)).float()
        with torch.autocast(self.kind, self.dtype):
            return self.model(pixels).float()


class _Lane:
    """Buffers of one batch in flight: bytes and vectors on the host (pinned for a GPU), bytes on the device."""

    def __init__(self, shape: tuple[int, ...], dim: int, device: str) -> None:
        self.cuda = device == "cuda"
        self.host = torch.zeros(shape, dtype=torch.uint8, pin_memory=self.cuda)
        self.out = torch.empty((shape[0], dim), dtype=torch.float32, pin_memory=self.cuda)
        if self.cuda:
            self.device = torch.empty(shape, dtype=torch.uint8, device=device)
            self.copied = torch.cuda.Event()
            self.begun, self.done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.waiting: _Result | None = None

    def keep(self) -> None:
        """Save the vectors that nobody has fetched yet: this lane is about to be used again."""
        if self.waiting is not None:
            self.waiting()

    def fill(self, tiles: np.ndarray) -> None:
        self.keep()
        host = self.host.numpy()
        host[: len(tiles)] = tiles
        host[len(tiles) :] = 0

    def give(self, out: torch.Tensor) -> None:
        """Send vectors to the host; on a GPU without waiting for them."""
        self.out.copy_(out, non_blocking=True)
        if self.cuda:
            self.done.record()

    def fetch(self, n: int) -> tuple[np.ndarray, float]:
        """Vectors of the first ``n`` tiles and the seconds that a GPU took; waits for both."""
        self.waiting = None
        seconds = 0.0
        if self.cuda:
            self.done.synchronize()
            seconds = self.begun.elapsed_time(self.done) / 1000
        return self.out[:n].numpy().copy(), seconds


class _Result:
    """Vectors that are being computed; calling it waits for them."""

    def __init__(self, encoder: TorchEncoder, lane: _Lane, n: int, explained: Callable[[], Any]) -> None:
        self._encoder, self._lane, self._n, self._explained = encoder, lane, n, explained
        self._vectors: np.ndarray | None = None
        lane.waiting = self

    def __call__(self) -> np.ndarray:
        if self._vectors is None:
            with self._explained():
                self._vectors, seconds = self._lane.fetch(self._n)
            self._encoder.seconds_busy += seconds
        return self._vectors


def choose_device(device: str, runtime: str) -> str:
    """``cpu`` or ``cuda``, checked.

    Raises:
        MorphomeError: no such device here, or a runtime that does not run on it.
    """
    if runtime == "openvino":
        if device == "cuda":
            raise MorphomeError("features.runtime: openvino runs on CPUs, but features.device is cuda",
                                "set features.runtime: torch, or features.device: cpu")  # fmt: skip
        try:
            import openvino  # noqa: F401
        except ImportError as error:
            raise MorphomeError(
                f"features.runtime: openvino cannot be imported ({error})",
                "pip install 'morphome[openvino]', or set features.runtime: torch",
            ) from None
        return "cpu"
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise MorphomeError(
            "features.device: cuda, but torch sees no GPU here",
            "set features.device: auto, or install a torch build for your GPU and its driver",
        )
    return "cuda"


def fold_batch_norms(model: nn.Module, side_px: int) -> tuple[nn.Module, int]:
    """Put batch norms into the convolutions before them, which saves a pass over every activation.

    Which convolution feeds which batch norm is seen in one forward pass, not guessed from names. The folded network
    is kept only if it gives the same vectors.

    Args:
        model: in eval mode, fp32.
        side_px: side of the tiles of the test.

    Returns:
        The network (the one given where nothing was folded) and the number of batch norms folded.
    """
    if not any(type(m) is nn.BatchNorm2d for m in model.modules()):
        return model, 0
    example = torch.rand(2, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))
    expected, pairs = _conv_then_norm(model, example)
    folded = copy.deepcopy(model)
    for conv, norm in pairs:
        fused = fuse_conv_bn_eval(folded.get_submodule(conv), folded.get_submodule(norm))
        _replace(folded, conv, fused)
        _replace(folded, norm, nn.Identity())
    with torch.inference_mode():
        difference = (folded(example) - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    return (folded, len(pairs)) if difference <= FOLD_TOLERANCE else (model, 0)


def _conv_then_norm(model: nn.Module, example: torch.Tensor) -> tuple[torch.Tensor, list[tuple[str, str]]]:
    """Vectors of the example, and names of the convolutions whose output goes straight into a batch norm."""
    made: dict[int, tuple[str, torch.Tensor]] = {}  # holds the outputs, so that an id means one tensor
    calls: dict[str, int] = {}
    pairs: list[tuple[str, str]] = []

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(module, nn.Conv2d):
                made[id(output)] = (name, output)
            elif id(inputs[0]) in made:
                pairs.append((made[id(inputs[0])][0], name))

        return hook

    chosen = [(name, m) for name, m in model.named_modules() if type(m) in (nn.Conv2d, nn.BatchNorm2d)]
    hooks = [module.register_forward_hook(count(name)) for name, module in chosen]
    try:
        with torch.inference_mode():
            expected = model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return expected, [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _compile_openvino(
    network: nn.Module, shape: tuple[int, ...], arithmetic: str, threads: int
) -> Callable[[np.ndarray], Any]:
    """The network, normalisation included, compiled for one shape."""
    import openvino

    # As many tiles as there will be: the tracer turns the size of the batch into a constant.
    example = torch.zeros(shape, dtype=torch.uint8)
    with torch.inference_mode(), warnings.catch_warnings():
        # What the tracer warns of (sizes become constants) is what is wanted: the shape is fixed.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit itself, which OpenVINO calls
        converted = openvino.convert_model(network, example_input=example, input=[list(shape)])
    hints = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[arithmetic],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    return openvino.compile_model(converted, "CPU", hints)
