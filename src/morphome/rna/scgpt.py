"""scGPT as a frozen encoder, in plain PyTorch: the network, its files, and embeddings of bulk samples.

A gene's token is LN(embedding) of its symbol plus a small network of its bin; twelve post-norm transformer layers
without positions follow, and the vector of ``<cls>`` is the sample's. The package ``scgpt`` is not needed: it asks
for an old FlashAttention and for torchtext, which is no longer made.

Upstream loads what fits and drops the rest in silence, so that it can run on random weights. Here every name and
shape of the three parts (gene encoder, value encoder, transformer) must agree, or loading fails.

Reference: Cui et al. 2024, scGPT: toward building a foundation model for single-cell multi-omics using generative AI,
Nature Methods 21, doi 10.1038/s41592-024-02201-0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.features.state_dicts import load_strictly
from morphome.files import atomic_path
from morphome.rna.registry import SCGPT_WEIGHTS, identify
from morphome.rna.tokenise import CLS, BulkTokeniser, Panel, Vocabulary
from morphome.state_dict import read_state_dict

OUTPUTS = ("cls", "gene_mean")
PARTS = ("encoder.", "value_encoder.", "transformer_encoder.")
#: Bins above this count as this (the published value encoder).
_MOST = 512.0
#: Settings of a checkpoint that this network does not have; a file that names another value is refused.
_FIXED = {
    "input_emb_style": ("continuous",),
    "pre_norm": (False,),
    "domain_spec_batchnorm": (False,),
    "cell_emb_style": ("cls",),
}
_SOURCE = "source_sha256"


class _GeneEncoder(nn.Module):
    """LN(embedding): (B, L) ids -> (B, L, d)."""

    def __init__(self, n_tokens: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, dim)
        self.enc_norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> Tensor:
        return self.enc_norm(self.embedding(ids))


class _ValueEncoder(nn.Module):
    """LN(Lin(ReLU(Lin(value)))): (B, L) bins -> (B, L, d)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, values: Tensor) -> Tensor:
        hidden = F.relu(self.linear1(values.clamp(max=_MOST).unsqueeze(-1)))
        return self.norm(self.linear2(hidden))


class _Attention(nn.Module):
    """Multi-head self-attention with the names of torch's own module."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """x (B, L, d) to the same shape; keep (B, 1, 1, L), True = may be looked at."""
        n, length, dim = x.shape
        joint = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = joint.view(n, length, 3, self.n_heads, dim // self.n_heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return self.out_proj(out.transpose(1, 2).reshape(n, length, dim))


class _Layer(nn.Module):
    """Post-norm layer: x = LN(x + attention(x)), x = LN(x + Lin(ReLU(Lin(x))))."""

    def __init__(self, dim: int, n_heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = _Attention(dim, n_heads)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        x = self.norm1(x + self.self_attn(x, keep))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class _Layers(nn.Module):
    def __init__(self, dim: int, n_heads: int, hidden: int, n_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(dim, n_heads, hidden) for _ in range(n_layers))

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, keep)
        return x


class ScGPT(nn.Module):
    """The encoder of scGPT without its decoders; for evaluation only, so it has no dropout.

    Args:
        n_tokens, dim, n_heads, hidden, n_layers: published 60,697, 512, 8, 512, 12 (50,278,400 parameters).
    """

    def __init__(
        self, n_tokens: int = 60_697, dim: int = 512, n_heads: int = 8, hidden: int = 512, n_layers: int = 12
    ) -> None:
        super().__init__()
        self.encoder = _GeneEncoder(n_tokens, dim)
        self.value_encoder = _ValueEncoder(dim)
        self.transformer_encoder = _Layers(dim, n_heads, hidden, n_layers)

    def forward(self, ids: Tensor, values: Tensor, padding: Tensor | None = None) -> Tensor:
        """Contextual vectors of tokens.

        Args:
            ids: (B, L) int64. values: (B, L) float. padding: (B, L) bool, True = nothing there.

        Returns:
            (B, L, d); vectors at padded places mean nothing.
        """
        keep = None if padding is None else ~padding[:, None, None, :]
        return self.transformer_encoder(self.encoder(ids) + self.value_encoder(values), keep)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of a checkpoint to those of :class:`ScGPT`; decoders and training heads are left out.

    FlashAttention calls the joint projection ``Wqkv``, torch ``in_proj``; its rows are q, k, v in both. A wrapper
    puts ``_impl.`` in between.
    """
    out = {}
    for name, value in state.items():
        if name.startswith(PARTS):
            plain = name.replace("_impl.", "")
            out[re.sub(r"\.self_attn\.Wqkv\.(weight|bias)$", r".self_attn.in_proj_\1", plain)] = value
    return out


def read_vocabulary(folder: Path) -> tuple[Vocabulary, dict[str, Any]]:
    """Tokens and settings of a checkpoint folder.

    Returns:
        The vocabulary; ``args.json``.

    Raises:
        MorphomeError: naming the file and what is missing or not supported.
    """
    args_file, vocab_file = Path(folder) / "args.json", Path(folder) / "vocab.json"
    args, ids = _json_object(args_file), _json_object(vocab_file)
    needed = ("embsize", "nheads", "d_hid", "nlayers", "pad_token", "pad_value", "n_bins")
    if lacking := [name for name in needed if name not in args]:
        raise MorphomeError(f"{args_file}: no {', '.join(lacking)}", "take the folder of the checkpoint as published")
    for name, allowed in _FIXED.items():
        if name in args and args[name] not in allowed:
            raise MorphomeError(
                f"{args_file}: {name} is {args[name]!r}; this network has {allowed[0]!r}",
                "take a checkpoint of the published pretraining (whole-human, pan-cancer, an organ)",
            )
    numbers = list(ids.values())
    if not all(type(number) is int for number in numbers) or sorted(numbers) != list(range(len(numbers))):
        raise MorphomeError(f"{vocab_file}: its values are not 0 to {len(numbers) - 1}", "fetch the file again")
    pad = str(args["pad_token"])
    if lacking := [name for name in (CLS, pad) if name not in ids]:
        raise MorphomeError(f"{vocab_file}: no token {', '.join(lacking)}", "fetch the file again")
    special = frozenset(name for name in ids if name.startswith("<") and name.endswith(">"))
    return Vocabulary(ids, special, pad, float(args["pad_value"]), int(args["n_bins"])), args


def convert_checkpoint(folder: Path) -> Path:
    """Write ``model.safetensors`` beside ``best_model.pt``: the three parts that are used, under torch's names.

    The file says which checkpoint it was made from; it is read only while that checkpoint lies beside it.

    Returns:
        The new file.

    Raises:
        MorphomeError: the checkpoint cannot be read, or is not one of scGPT.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    network, source = _empty(folder)[0], folder / "best_model.pt"
    state = rename(read_state_dict(source))
    load_strictly(network, state, source, "scgpt")
    facts = {_SOURCE: identify("scgpt", [source], allow_unpinned=True)["files"][source.name]}
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file({name: value.contiguous() for name, value in state.items()}, temporary, metadata=facts)
    return folder / "model.safetensors"


class ScGPTEncoder:
    """A checkpoint on a device.

    Args:
        folder: ``args.json``, ``vocab.json`` and ``best_model.pt`` or ``model.safetensors``.
        allow_unpinned: use weights whose checksum is not known.
        device: ``cpu`` or ``cuda``.

    Attributes:
        vocabulary, dim: tokens; length of a vector.
        weights: checksums of the files and what they are worth (:func:`morphome.rna.registry.identify`).

    Raises:
        MorphomeError: files are absent, damaged, not of scGPT, or not known and not allowed.
    """

    def __init__(self, folder: Path, *, allow_unpinned: bool = False, device: str = "cpu") -> None:
        folder = Path(folder)
        weights = next((folder / name for name in SCGPT_WEIGHTS if (folder / name).is_file()), None)
        if weights is None:
            raise MorphomeError(f"{folder}: no {' or '.join(SCGPT_WEIGHTS)}", "set molecular.encoder.weights")
        self.weights = identify("scgpt", [folder / "args.json", folder / "vocab.json", weights], allow_unpinned)
        network, self.vocabulary = _empty(folder)
        # A converted copy is as good as the checkpoint whose checksum it carries, and opens faster.
        copy = folder / "model.safetensors"
        converted = weights.suffix == ".pt" and _source(copy) == self.weights["files"][weights.name]
        source = copy if converted else weights
        load_strictly(network, rename(read_state_dict(source)), source, "scgpt")
        self.device = device
        self.network = network.eval().requires_grad_(False).to(device)
        self.dim = network.encoder.embedding.embedding_dim

    @torch.inference_mode()
    def embed(
        self,
        tokeniser: BulkTokeniser,
        rows: Iterable[np.ndarray],
        output: str = "cls",
        batch: int = 16,
    ) -> np.ndarray:
        """Vectors of samples.

        A sequence of 1,200 tokens fills a CPU: there samples go through one at a time, and a vector is the same bit
        for bit whatever ``batch`` and whoever else is asked for. On a GPU ``batch`` samples go together and the last
        batch is filled up, so that a vector depends on its sample and on ``batch`` (in the last digits) alone.

        Args:
            tokeniser: made with this vocabulary.
            rows: amounts (m,) per sample, as ``tokeniser.rows`` gives them; taken as they come (progress bars).
            output: ``cls``: the vector of ``<cls>``, L2-normalised, averaged over panels; ``gene_mean``: mean over
                the measured genes of all panels.

        Returns:
            float32 (n, d).

        Raises:
            MorphomeError: no such output, values that have no bins, or no memory for a batch.
        """
        if output not in OUTPUTS:
            raise MorphomeError(f"molecular.encoder.output: '{output}'", f"one of {', '.join(OUTPUTS)}")
        step = 1 if self.device == "cpu" else batch
        found: list[np.ndarray] = []
        waiting: list[list[Panel]] = []
        for row in rows:
            waiting.append(tokeniser.encode(row))
            if len(waiting) == step:
                found.append(self._forward(waiting, output, batch))
                waiting = []
        if waiting:
            filled = waiting + [waiting[-1]] * (step - len(waiting))
            found.append(self._forward(filled, output, batch)[: len(waiting)])
        return np.concatenate(found) if found else np.zeros((0, self.dim), np.float32)

    def _forward(self, samples: list[list[Panel]], output: str, batch: int) -> np.ndarray:
        try:
            total = torch.zeros(len(samples), self.dim, device=self.device)
            parts = torch.zeros(len(samples), 1, device=self.device)
            for panels in zip(*samples, strict=True):
                vectors, count = self._one_panel(panels, output)
                total += vectors
                parts += count
            return (total / parts).float().cpu().numpy()
        except torch.OutOfMemoryError:
            raise MorphomeError(
                f"molecular.encoder: out of memory with batches of {batch} samples",
                f"set molecular.encoder.batch to {max(1, batch // 2)} or less, or device: cpu",
            ) from None

    def _one_panel(self, panels: tuple[Panel, ...], output: str) -> tuple[Tensor, Tensor]:
        ids = torch.from_numpy(np.stack([panel.ids for panel in panels])).to(self.device)
        values = torch.from_numpy(np.stack([panel.values for panel in panels])).to(self.device)
        padding = torch.from_numpy(np.stack([panel.padding for panel in panels])).to(self.device)
        hidden = self.network(ids, values, padding if bool(padding.any()) else None)
        if output == "cls":
            return F.normalize(hidden[:, 0], dim=-1), torch.ones(len(panels), 1, device=self.device)
        there = (~padding[:, 1:]).unsqueeze(-1)
        return (hidden[:, 1:] * there).sum(1), there.sum(1)


def _empty(folder: Path) -> tuple[ScGPT, Vocabulary]:
    """The network of a folder without weights, and its tokens."""
    vocabulary, args = read_vocabulary(folder)
    with torch.device("meta"):
        sizes = (int(args[name]) for name in ("embsize", "nheads", "d_hid", "nlayers"))
        return ScGPT(len(vocabulary.ids), *sizes), vocabulary


def _source(path: Path) -> str | None:
    """Checksum of the checkpoint that a converted file was made from; None where there is no such file."""
    if not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            return (handle.metadata() or {}).get(_SOURCE)
    except (SafetensorError, OSError):
        return None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MorphomeError(f"{path}: file not found", "the folder needs args.json, vocab.json and weights") from None
    except ValueError as error:
        raise MorphomeError(f"{path}: not valid JSON ({error})", "fetch the file again") from None
    if not isinstance(content, dict):
        raise MorphomeError(f"{path}: not a JSON object", "fetch the file again")
    return content
