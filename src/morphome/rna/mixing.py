"""Regulating scGPT's embedding space for bulk samples: a perceptron that reads the cell types of mixed single cells.

Bulk tissue is a mixture of cells, and scGPT has only seen single ones. Annotated cells of the user are mixed, the
mixtures are embedded with the frozen scGPT, and MLP-A learns the mixed types; its hidden layer then stands in for the
embedding. Mixing comes before tokenising, and binning is by rank, so a mixture's embedding is not the mean of its
cells' embeddings: that is what MLP-A is to learn. No survival label is used.

Stage A of Path-GPTOmic, re-derived: Wang et al. 2024, Path-GPTOmic: a balanced multi-modal learning framework for
survival outcome prediction, ISBI, doi 10.1109/ISBI56570.2024.10635171. Its training settings were not published;
those here are defaults of this package. ``pairs`` is the published mixture; bulk tissue is nearer to ``dirichlet``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor, nn
from tqdm import tqdm

from morphome.errors import MorphomeError
from morphome.files import read_parquet, read_stamp, settings_hash, write_parquet
from morphome.models.layers import Dropout
from morphome.rna.cells import Cells, read_cells
from morphome.rna.scgpt import ScGPTEncoder
from morphome.rna.tokenise import BulkTokeniser

MIXING = ("pairs", "dirichlet")
EXPORTS = ("features", "logits", "identity")
HIDDEN = 128
#: Counts of a cell are scaled to this sum before mixing, so that large cells do not rule a mixture.
_LIBRARY = 1e4
_HELD_OUT = 0.1
_FORMAT = "morphome.mixed_cells"


class MLPA(nn.Module):
    """d -> 128 -> 128 -> C with ReLU and dropout .1.

    Embeddings of unit length differ little from one another (their mean is most of each), so they are standardised
    on the mixtures first. The first layer could learn the same, but hardly does.

    Args:
        dim: length of an embedding. n_types: cell types C.
    """

    mean: Tensor
    sd: Tensor

    def __init__(self, dim: int, n_types: int, hidden: int = HIDDEN, dropout: float = 0.1) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("sd", torch.ones(dim))
        self.first = nn.Linear(dim, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, n_types)
        self.dropout = Dropout(dropout)

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """e (B, d) to the last hidden layer (B, 128) and the logits (B, C)."""
        hidden = self.dropout(F.relu(self.first((e - self.mean) / self.sd)))
        features = F.relu(self.second(hidden))
        return features, self.last(self.dropout(features))


def draw_mixtures(n_cells: int, mixes: int, mixing: str, most_cells: int, seed: int) -> sparse.csr_matrix:
    """Weights of mixtures, each row summing to 1.

    Args:
        n_cells: cells to draw from.
        mixing: ``pairs``: two cells, weights λ and 1 − λ, λ ~ U(0, 1); ``dirichlet``: K cells, K uniform in 2 ...
            ``most_cells``, weights Dirichlet(1).

    Returns:
        CSR float64 (mixes, n_cells).
    """
    if mixing not in MIXING:
        raise MorphomeError(f"molecular.encoder.cells.mixing: '{mixing}'", f"one of {', '.join(MIXING)}")
    random = np.random.default_rng([seed, 2])
    most = 2 if mixing == "pairs" else min(most_cells, n_cells)
    starts, places, weights = [0], [], []
    for _ in range(mixes):
        count = 2 if mixing == "pairs" else int(random.integers(2, most + 1))
        places.append(np.sort(random.choice(n_cells, count, replace=False)))
        if mixing == "pairs":
            share = random.uniform()
            weights.append(np.array([share, 1.0 - share]))
        else:
            weights.append(random.dirichlet(np.ones(count)))
        starts.append(starts[-1] + count)
    return sparse.csr_matrix((np.concatenate(weights), np.concatenate(places), starts), shape=(mixes, n_cells))


def mix(cells: Cells, weights: sparse.csr_matrix) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Mixtures of cells that were scaled to one library size.

    Returns:
        CSR float64 (mixes, genes); mixed one-hot types (mixes, C), rows summing to 1.
    """
    totals = np.asarray(cells.counts.sum(axis=1, dtype=np.float64)).ravel()
    scaled = sparse.diags(_LIBRARY / totals) @ cells.counts.astype(np.float64)
    one_hot = np.eye(len(cells.types))[cells.labels]
    return sparse.csr_matrix(weights @ scaled), np.asarray(weights @ one_hot)


@dataclass(frozen=True)
class MixtureRows:
    """Mixtures at the genes of a bulk table; dense one row at a time, float64 (m,), NaN where cells lack the gene."""

    values: sparse.csr_matrix
    columns: np.ndarray

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, number: int) -> np.ndarray:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return np.append(self.values[[number]].toarray()[0], np.nan)[self.columns]  # column -1 is the NaN


def mixture_rows(
    mixtures: sparse.csr_matrix, genes: Sequence[str], tokeniser: BulkTokeniser
) -> tuple[MixtureRows, float]:
    """Mixtures at the genes of a bulk table; columns of one name are added up.

    Returns:
        The rows; the share of the panels' genes that the cells have.

    Raises:
        MorphomeError: the cells lack too many genes.
    """
    names = sorted({name for name in genes if name})
    place = {name: number for number, name in enumerate(names)}
    kept = [(column, place[name]) for column, name in enumerate(genes) if name]
    fold = sparse.csr_matrix(
        (np.ones(len(kept)), ([c for c, _ in kept], [p for _, p in kept])), shape=(len(genes), len(names))
    )
    columns, rate = tokeniser.align(names)
    summed = sparse.csr_matrix(mixtures @ fold)

    return MixtureRows(summed, columns), rate


@dataclass(frozen=True)
class Regulated:
    """A trained MLP-A.

    Attributes:
        network: in evaluation mode, on the CPU.
        types: names of its outputs.
        facts: for the record.
    """

    network: MLPA
    types: tuple[str, ...]
    facts: dict[str, Any]

    @torch.inference_mode()
    def apply(self, vectors: np.ndarray, export: str) -> np.ndarray:
        """Vectors (n, d) of patients to ``features`` (n, 128) or ``logits`` (n, C); ``identity`` leaves them."""
        if export not in EXPORTS:
            raise MorphomeError(f"molecular.encoder.mlp_a: '{export}'", f"one of {', '.join(EXPORTS)}")
        if export == "identity":
            return vectors
        # One at a time: the last bits of a product depend on how many rows it has.
        rows = F.normalize(torch.tensor(np.ascontiguousarray(vectors), dtype=torch.float32), dim=-1).split(1)
        found = [self.network(row)[0 if export == "features" else 1] for row in rows]
        return torch.cat(found).numpy()


def train_mlp_a(vectors: np.ndarray, types: np.ndarray, settings: Mapping[str, Any]) -> tuple[MLPA, dict[str, Any]]:
    """Fit MLP-A: mean squared error to the mixed types, Adam; a tenth of the mixtures only measures.

    Args:
        vectors: (n, d) embeddings of mixtures. types: (n, C).
        settings: ``seed``, ``epochs``, ``batch``, ``learning_rate``.

    Returns:
        The network in evaluation mode; ``mse_train``, ``mse_held_out`` (sum over types, mean over mixtures) and
        ``mse_constant`` (predicting the mean types) of the held-out tenth.
    """
    # Contiguous: the order of sums, and so the last bits, follow the layout in memory.
    e = F.normalize(torch.tensor(np.ascontiguousarray(vectors), dtype=torch.float32), dim=-1)
    y = torch.tensor(np.ascontiguousarray(types), dtype=torch.float32)
    order = torch.from_numpy(np.random.default_rng([settings["seed"], 3]).permutation(len(e)))
    n_held = max(1, round(_HELD_OUT * len(e)))
    held, fit = order[:n_held], order[n_held:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])
        network = MLPA(e.shape[1], y.shape[1])
        network.mean.copy_(e[fit].mean(0))
        network.sd.copy_(e[fit].std(0, unbiased=False).clamp(min=1e-6))
        optimiser = torch.optim.Adam(network.parameters(), lr=settings["learning_rate"])
        for _ in range(settings["epochs"]):
            for part in fit[torch.randperm(len(fit))].split(settings["batch"]):
                optimiser.zero_grad()
                _error(network, e[part], y[part]).backward()
                optimiser.step()
    network.eval().requires_grad_(False)
    facts = {
        "mse_train": _error(network, e[fit], y[fit]).item(),
        "mse_held_out": _error(network, e[held], y[held]).item(),
        "mse_constant": (y[held] - y[fit].mean(0)).square().sum(1).mean().item(),
    }
    return network, facts


def _error(network: MLPA, e: Tensor, y: Tensor) -> Tensor:
    return (network(e)[1] - y).square().sum(1).mean()


def regulate(
    encoder: ScGPTEncoder,
    tokeniser: BulkTokeniser,
    settings: Mapping[str, Any],
    *,
    output: str = "cls",
    batch: int = 16,
    cache: Path | None = None,
) -> Regulated:
    """Stage A: draw cells, mix them, embed the mixtures, train MLP-A.

    Args:
        encoder, tokeniser: those of the bulk samples.
        settings: ``molecular.encoder.cells``: ``path``, ``cell_type``, ``layer``, ``symbols``, ``per_type``,
            ``mixing``, ``mixes``, ``most_cells``, ``epochs``, ``batch``, ``learning_rate``, ``seed``.
        output, batch: as for bulk samples.
        cache: a file for the mixtures' embeddings; read when it was made by the same weights, cells, genes and
            mixtures, written otherwise.

    Raises:
        MorphomeError: as :func:`morphome.rna.cells.read_cells`, or the cells lack too many genes.
    """
    path, seed = Path(settings["path"]).expanduser(), settings["seed"]
    cells = read_cells(
        path,
        settings["cell_type"],
        layer=settings.get("layer"),
        symbols=settings.get("symbols"),
        per_type=settings["per_type"],
        seed=seed,
    )
    weights = draw_mixtures(len(cells.labels), settings["mixes"], settings["mixing"], settings["most_cells"], seed)
    mixtures, types = mix(cells, weights)
    rows, rate = mixture_rows(mixtures, cells.genes, tokeniser)
    drawn = ("cell_type", "layer", "symbols", "per_type", "mixing", "mixes", "most_cells", "seed")
    made_of = {
        "weights": encoder.weights["sha256"],
        "cells": _digest(cells),
        "tokens": settings_hash({"panels": [tokeniser.match.tokens[p].tolist() for p in tokeniser.panels]}),
        "bins": [tokeniser.bin_scope, output, encoder.device, batch],
        **{key: settings.get(key) for key in drawn},
    }
    embedded = _cached(cache, made_of)
    if embedded is None:
        bar = tqdm(rows, desc="mixed cells", unit="mixture", disable=None, leave=False)
        embedded = encoder.embed(tokeniser, bar, output, batch)
        if cache is not None:
            table = pd.DataFrame(embedded, columns=[f"e{i}" for i in range(embedded.shape[1])])
            write_parquet(table, cache, _FORMAT, made_of)
    network, found = train_mlp_a(embedded, types, settings)
    facts = {
        "cells_file": path.name,
        "cells": len(cells.labels),
        "cells_with_a_type": cells.total,
        "types": cells.types,
        "genes_match_rate": rate,
        "mixing": settings["mixing"],
        "mixtures": settings["mixes"],
        "seed": seed,
        **found,
    }
    return Regulated(network, tuple(cells.types), facts)


def _digest(cells: Cells) -> str:
    """sha256 of the drawn cells: genes, types and counts."""
    digest = hashlib.sha256("\n".join((*cells.genes, "", *cells.types)).encode())
    for part in (cells.labels, cells.counts.indptr, cells.counts.indices, cells.counts.data):
        digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()


def _cached(cache: Path | None, made_of: Mapping[str, Any]) -> np.ndarray | None:
    """Embeddings of an earlier call that was given the same; None otherwise."""
    if cache is None or not cache.exists():
        return None
    if read_stamp(cache, _FORMAT).get("config_hash") != settings_hash(made_of):
        return None
    return read_parquet(cache, _FORMAT).to_numpy(np.float32)
