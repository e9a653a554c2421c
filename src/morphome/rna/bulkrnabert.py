"""BulkRNABert as a frozen encoder: a pre-norm transformer over 19,062 genes of a bulk sample.

Read from a folder laid out as the hub's ``InstaDeepAI/BulkRNABert``: ``config.json``, ``tokenizer_config.json``,
``model.safetensors``, and the order of the genes (``data/tcga_sample.csv``, whose header it is, or a list of ids).
Names and shapes must all agree, or loading fails; no code of the publisher is run.

What comes in is log10(TPM + 1) divided by a constant of the checkpoint, cut into 64 bins of equal width; zero is bin
0. A value at the upper end or beyond would be a 65th bin, for which the checkpoint has no embedding: it counts as the
last one here. The vector of a patient is the mean of the last layer over genes.

The PyTorch weights on the hub were trained on TCGA. Weights of GTEx and ENCODE alone are published for JAX in a file
that runs code when it is opened; they are not read here.

Reference: Gélard et al. 2025, BulkRNABert: cancer prognosis from bulk RNA-seq based language models, Proceedings of
Machine Learning Research 259.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morphome.errors import MorphomeError
from morphome.features.state_dicts import load_strictly
from morphome.rna.registry import BULKRNABERT_GENES, encoder, find_files, identify
from morphome.rna.tokenise import check_match
from morphome.state_dict import read_state_dict

_N_SHOWN = 20


class _Attention(nn.Module):
    def __init__(self, dim: int, n_heads: int, key_size: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.w_q, self.w_k, self.w_v = (nn.Linear(dim, n_heads * key_size) for _ in range(3))
        self.output = nn.Linear(n_heads * key_size, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in (self.w_q, self.w_k, self.w_v))
        return self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Layer(nn.Module):
    """Pre-norm layer: x + attention(LN(x)), then x + Lin(GELU(Lin(LN(x))))."""

    def __init__(self, dim: int, n_heads: int, key_size: int, hidden: int) -> None:
        super().__init__()
        self.layer_norm_self_attention = nn.LayerNorm(dim)
        self.mha = _Attention(dim, n_heads, key_size)
        self.layer_norm_mlp = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mha(self.layer_norm_self_attention(x))
        return x + self.fc2(F.gelu(self.fc1(self.layer_norm_mlp(x))))


class BulkRNABert(nn.Module):
    """The encoder without its head: bins (B, G) of all genes in their fixed order to vectors (B, G, d).

    Args:
        n_genes, n_bins, dim: published 19,062, 64, 256. gene_dim: width of the gene embedding (200) before its
            projection. n_heads, key_size, hidden, n_layers: 8, 32, 512, 4.
    """

    def __init__(
        self,
        n_genes: int = 19_062,
        n_bins: int = 64,
        dim: int = 256,
        gene_dim: int = 200,
        n_heads: int = 8,
        key_size: int = 32,
        hidden: int = 512,
        n_layers: int = 4,
    ) -> None:
        super().__init__()
        self.expression_embedding_layer = nn.Embedding(n_bins, dim)
        self.gene_embedding_layer = nn.Embedding(n_genes, gene_dim)
        self.fc_gene_embedding = nn.Linear(gene_dim, dim)
        self.transformer_layers = nn.ModuleList(_Layer(dim, n_heads, key_size, hidden) for _ in range(n_layers))

    def forward(self, bins: Tensor) -> Tensor:
        x = self.expression_embedding_layer(bins) + self.fc_gene_embedding(self.gene_embedding_layer.weight)
        for layer in self.transformer_layers:
            x = layer(x)
        return x


class BulkRNABertEncoder:
    """A checkpoint on a device.

    Args:
        folder: laid out as the hub's.
        allow_unpinned: must be set, as no checksum is known.
        device: ``cpu`` or ``cuda``.

    Attributes:
        genes: Ensembl ids without version, in the order of the model.
        dim: length of a vector.
        weights: checksums (:func:`morphome.rna.registry.identify`).

    Raises:
        MorphomeError: files are absent, damaged, of another layout, or not known and not allowed.
    """

    def __init__(self, folder: Path, *, allow_unpinned: bool = False, device: str = "cpu") -> None:
        folder = Path(folder)
        files, absent = find_files(encoder("bulkrnabert"), folder)
        if absent:
            raise MorphomeError(f"{folder}: no {', no '.join(absent)}", "set molecular.encoder.weights")
        self.weights = identify("bulkrnabert", files, allow_unpinned)
        config, tokens = _read(folder / "config.json"), _read(folder / "tokenizer_config.json")
        with torch.device("meta"):
            network = _network(config, folder / "config.json")
        self._edges, self._divisor = _bins(tokens, network, folder / "tokenizer_config.json")
        self.genes = read_gene_order(folder)
        if len(self.genes) != network.gene_embedding_layer.num_embeddings:
            raise MorphomeError(
                f"{folder}: {len(self.genes)} genes in the list, but the model has "
                f"{network.gene_embedding_layer.num_embeddings}",
                "take list and weights of one release",
            )
        source = folder / "model.safetensors"
        state = read_state_dict(source)
        load_strictly(network, {n: v for n, v in state.items() if not n.startswith("lm_head.")}, source, "bulkrnabert")
        self.device = device
        self.network = network.eval().requires_grad_(False).to(device)
        self.dim = network.expression_embedding_layer.embedding_dim

    def columns(self, genes: Sequence[str], gene_ids: Mapping[str, str]) -> tuple[np.ndarray, dict[str, Any]]:
        """Column of the table for each gene of the model; -1 where there is none, which counts as TPM 0.

        Args:
            genes: of the table, symbols or Ensembl ids. gene_ids: symbol to Ensembl ids, joined by ";".

        Raises:
            MorphomeError: too few genes match.
        """
        found: dict[str, int] = {}
        asked, several = set(self.genes), 0
        for column, gene in enumerate(genes):
            ids = {part.partition(".")[0] for part in (gene_ids.get(gene) or gene).split(";")} & asked
            if len(ids) == 1:
                found.setdefault(ids.pop(), column)
            else:
                several += len(ids) > 1  # one symbol, several genes of the model: their sum belongs to none
        columns = np.array([found.get(gene, -1) for gene in self.genes], dtype=np.int64)
        lost = [gene for gene in self.genes if gene not in found]
        rate = check_match(
            len(found), len(self.genes), "genes of BulkRNABert and of the expression table (Ensembl ids)"
        )
        facts = {"match_rate": rate, "n_unmatched": len(lost), "unmatched": lost[:_N_SHOWN], "ambiguous": several}
        return columns, facts

    def tokens(self, tpm: np.ndarray) -> np.ndarray:
        """Bins (n, G) int64 of TPM (n, G); NaN counts as 0.

        Raises:
            MorphomeError: a value is negative or infinite.
        """
        tpm = np.nan_to_num(np.asarray(tpm, dtype=np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
        if tpm.size and (tpm.min() < 0 or np.isinf(tpm).any()):
            raise MorphomeError("values of the expression table are negative or infinite", "give TPM")
        scaled = np.log10(tpm + 1.0) / self._divisor
        bins = np.minimum(np.digitize(scaled, self._edges), len(self._edges) - 1)
        return np.where(tpm == 0, 0, bins)

    @torch.inference_mode()
    def embed(self, rows: Iterable[np.ndarray], columns: np.ndarray) -> np.ndarray:
        """Vectors of patients, one at a time (19,062 tokens fill any device).

        Args:
            rows: TPM per patient as the table has them. columns: of :meth:`columns`.

        Returns:
            float32 (n, d).
        """
        found = []
        for row in rows:
            tpm = np.append(np.asarray(row, dtype=np.float64), 0.0)[columns]  # column -1 is the zero
            bins = torch.from_numpy(self.tokens(tpm[None])).to(self.device)
            found.append(self.network(bins).mean(1).float().cpu().numpy())
        return np.concatenate(found) if found else np.zeros((0, self.dim), np.float32)


def read_gene_order(folder: Path) -> list[str]:
    """Ensembl ids in the order of the model: a list, one a line, or the header of the published sample of patients.

    Raises:
        MorphomeError: no such file, or ids that occur twice.
    """
    path = next((folder / name for name in BULKRNABERT_GENES if (folder / name).is_file()), None)
    if path is None:
        raise MorphomeError(f"{folder}: no {' or '.join(BULKRNABERT_GENES)}", "fetch data/tcga_sample.csv too")
    with path.open(encoding="utf-8-sig") as handle:
        names = handle.readline().split(",") if path.suffix == ".csv" else handle.read().splitlines()
    ids = [name.strip().strip('"').partition(".")[0] for name in names]
    ids = [name for name in ids if name and name != "identifier"]
    if len(set(ids)) != len(ids):
        raise MorphomeError(f"{path}: gene ids occur twice", "fetch the file again")
    return ids


def _network(config: Mapping[str, Any], path: Path) -> BulkRNABert:
    if config.get("model_type") != "BulkRNABert":
        raise MorphomeError(f"{path}: model_type is {config.get('model_type')!r}, not 'BulkRNABert'", "take its folder")
    if not config.get("use_gene_embedding", True) or not config.get("project_gene_embedding", True):
        raise MorphomeError(f"{path}: a model without projected gene embeddings", "take the published checkpoint")
    names = ("n_genes", "n_expressions_bins", "embed_dim", "init_gene_embed_dim", "num_attention_heads")
    if lacking := [name for name in (*names, "ffn_embed_dim", "num_layers") if name not in config]:
        raise MorphomeError(f"{path}: no {', '.join(lacking)}", "take config.json of the checkpoint")
    sizes = [int(config[name]) for name in names]
    key_size = int(config.get("key_size") or sizes[2] // sizes[4])
    return BulkRNABert(*sizes, key_size, int(config["ffn_embed_dim"]), int(config["num_layers"]))


def _bins(tokens: Mapping[str, Any], network: BulkRNABert, path: Path) -> tuple[np.ndarray, float]:
    """Edges of the bins, and what log10(TPM + 1) is divided by."""
    names = ("n_expressions_bins", "min_omic_value", "max_omic_value", "use_max_normalization", "normalization_factor")
    if lacking := [name for name in names if name not in tokens]:
        raise MorphomeError(f"{path}: no {', '.join(lacking)}", "take tokenizer_config.json of the checkpoint")
    count, least, most = int(tokens[names[0]]), float(tokens[names[1]]), float(tokens[names[2]])
    if count != network.expression_embedding_layer.num_embeddings or tokens.get("prepend_cls_token"):
        raise MorphomeError(f"{path}: {count} bins or a <cls> token, which the model does not have", "take its folder")
    divisor = float(tokens["normalization_factor"]) if tokens["use_max_normalization"] else 1.0
    return np.linspace(least, most, count), divisor


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MorphomeError(f"{path}: not valid JSON ({error})", "fetch the file again") from None
    if not isinstance(content, dict):
        raise MorphomeError(f"{path}: not a JSON object", "fetch the file again")
    return content
