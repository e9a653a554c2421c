"""Tiny random checkpoints, cells and tables in the file formats of the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from scipy import sparse

from morphome.files import write_json, write_parquet

DIM, HEADS, LAYERS = 64, 4, 2
GENES = [f"GENE{i}" for i in range(60)]


@pytest.fixture(autouse=True)
def _own_weights_folder(monkeypatch, tmp_path_factory):
    """Checksums are kept beside the weights: never in the home of whoever runs the tests."""
    monkeypatch.setenv("MORPHOME_WEIGHTS", str(tmp_path_factory.getbasetemp() / "weights"))


def scgpt_state(n_tokens: int, dim: int = DIM, layers: int = LAYERS, seed: int = 0) -> dict[str, torch.Tensor]:
    """Names of the published file as torch's layers have them, a decoder and a flag embedding among them."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random) * 0.2

    shapes = {
        "encoder.embedding.weight": (n_tokens, dim),
        "encoder.enc_norm.weight": (dim,),
        "encoder.enc_norm.bias": (dim,),
        "flag_encoder.weight": (2, dim),
        "value_encoder.linear1.weight": (dim, 1),
        "value_encoder.linear1.bias": (dim,),
        "value_encoder.linear2.weight": (dim, dim),
        "value_encoder.linear2.bias": (dim,),
        "value_encoder.norm.weight": (dim,),
        "value_encoder.norm.bias": (dim,),
        "decoder.fc.0.weight": (dim, dim),
    }
    for number in range(layers):
        layer = f"transformer_encoder.layers.{number}"
        shapes |= {
            f"{layer}.self_attn.in_proj_weight": (3 * dim, dim),
            f"{layer}.self_attn.in_proj_bias": (3 * dim,),
            f"{layer}.self_attn.out_proj.weight": (dim, dim),
            f"{layer}.self_attn.out_proj.bias": (dim,),
            f"{layer}.linear1.weight": (dim, dim),
            f"{layer}.linear1.bias": (dim,),
            f"{layer}.linear2.weight": (dim, dim),
            f"{layer}.linear2.bias": (dim,),
            f"{layer}.norm1.weight": (dim,),
            f"{layer}.norm1.bias": (dim,),
            f"{layer}.norm2.weight": (dim,),
            f"{layer}.norm2.bias": (dim,),
        }
    return {name: draw(*shape) for name, shape in shapes.items()}


def write_scgpt(folder: Path, state: dict[str, torch.Tensor] | None = None, **args) -> Path:
    """A folder of scGPT; ``args`` overwrite settings in args.json (None takes one out)."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {name: number for number, name in enumerate([*GENES, "<pad>", "<cls>", "<eoc>"])}
    content = {"embsize": DIM, "nheads": HEADS, "d_hid": DIM, "nlayers": LAYERS, "n_layers_cls": 3, "dropout": 0.2}
    content |= {"pad_token": "<pad>", "pad_value": -2, "n_bins": 51, "mask_value": -1, **args}
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "args.json").write_text(json.dumps(content))
    (folder / "vocab.json").write_text(json.dumps(ids))
    torch.save(state if state is not None else scgpt_state(len(ids)), folder / "best_model.pt")
    return folder


def write_bulkrnabert(folder: Path, n_genes: int = 40, seed: int = 0) -> Path:
    """A folder laid out as the hub's; 2 layers, 64-d, gene embedding of 12."""
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    dim, hidden, bins = 64, 96, 16
    shapes = {
        "expression_embedding_layer.weight": (bins, dim),
        "gene_embedding_layer.weight": (n_genes, 12),
        "fc_gene_embedding.weight": (dim, 12),
        "fc_gene_embedding.bias": (dim,),
        "lm_head.weight": (bins, dim),
        "lm_head.bias": (bins,),
    }
    for number in range(2):
        layer = f"transformer_layers.{number}"
        for name in ("w_q", "w_k", "w_v", "output"):
            shapes |= {f"{layer}.mha.{name}.weight": (dim, dim), f"{layer}.mha.{name}.bias": (dim,)}
        for name in ("layer_norm_self_attention", "layer_norm_mlp"):
            shapes |= {f"{layer}.{name}.weight": (dim,), f"{layer}.{name}.bias": (dim,)}
        shapes |= {f"{layer}.fc1.weight": (hidden, dim), f"{layer}.fc1.bias": (hidden,)}
        shapes |= {f"{layer}.fc2.weight": (dim, hidden), f"{layer}.fc2.bias": (dim,)}
    state = {name: torch.randn(*shape, generator=random) * 0.2 for name, shape in shapes.items()}
    save_file(state, folder / "model.safetensors")
    config = {"model_type": "BulkRNABert", "n_genes": n_genes, "n_expressions_bins": bins, "embed_dim": dim}
    config |= {"init_gene_embed_dim": 12, "project_gene_embedding": True, "use_gene_embedding": True}
    config |= {"num_attention_heads": 4, "key_size": 16, "ffn_embed_dim": hidden, "num_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    tokens = {"n_expressions_bins": bins, "min_omic_value": 0.0, "max_omic_value": 1.0, "use_max_normalization": True}
    tokens |= {"normalization_factor": 5.0, "prepend_cls_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "data").mkdir(exist_ok=True)
    header = [f"ENSG{i:011d}" for i in range(n_genes)]
    (folder / "data" / "tcga_sample.csv").write_text(",".join([*header, "identifier"]) + "\n" + "0," * n_genes + "x\n")
    return folder


def write_cells(path: Path, *, form: str = "csr_matrix", types: int = 6, per_type: int = 12, log: bool = False) -> Path:
    """Single cells whose types have genes of their own: type t has many counts at genes with number % types == t.

    The first cell has no type; genes lie in the column "symbol" of ``var``; GENE59 is not among them, GENE0 is twice.
    """
    random = np.random.default_rng(1)
    labels = np.repeat(np.arange(types), per_type)
    own = np.arange(59)[None, :] % types == labels[:, None]
    counts = random.poisson(np.where(own, 30.0, 0.7)).astype(np.float32)
    counts = np.column_stack([counts, np.zeros(len(counts), np.float32)])
    counts[:, 59] = random.poisson(2.0, len(counts))
    symbols = [*GENES[:59], "GENE0"]
    if log:
        counts = np.log1p(counts)
    with h5py.File(path, "w") as handle:
        if form == "dense":
            handle["X"] = counts
        else:
            parts = sparse.csr_matrix(counts) if form == "csr_matrix" else sparse.csc_matrix(counts)
            group = handle.create_group("X")
            group.attrs["encoding-type"], group.attrs["shape"] = form, counts.shape
            group["data"], group["indices"], group["indptr"] = parts.data, parts.indices, parts.indptr
        obs = handle.create_group("obs")
        obs.attrs["_index"] = "_index"
        obs["_index"] = [f"cell{i}" for i in range(len(labels))]
        kind = obs.create_group("kind")
        kind["categories"] = [f"type {name}" for name in "abcdefghij"[:types]]
        kind["codes"] = np.where(np.arange(len(labels)) == 0, -1, labels).astype(np.int8)
        obs["plain"] = [f"type {'abcdefghij'[label]}" for label in labels]
        var = handle.create_group("var")
        var.attrs["_index"] = "ids"
        var["ids"] = [f"ENSG{i}" for i in range(60)]
        var["symbol"] = symbols
    return path


def write_expression(path: Path, *, n: int = 6, genes: list[str] | None = None, value_type: str = "counts") -> Path:
    """A ``morphome.panel`` of counts or TPM with zeros; patients are not in order."""
    genes = genes or GENES
    random = np.random.default_rng(2)
    values = random.poisson(random.gamma(1.0, 20.0, len(genes)), (n, len(genes))).astype(np.float32)
    table = pd.DataFrame(values, columns=genes)
    table.insert(0, "patient_id", [f"P{n - i}" for i in range(n)])
    extra = {
        "value_type": value_type,
        "unit": value_type,
        "gene_ids": {g: f"ENSG{i:011d}.3" for i, g in enumerate(genes)},
    }
    write_parquet(table, path, "morphome.panel", {}, extra)
    return path


def write_groups(path: Path, genes: dict[str, list[str]]) -> Path:
    """A ``morphome.groups`` with columns in two panels."""
    groups = {
        name: [{"panel": panel, "gene": gene} for gene in members for panel in ("rna", "mut")]
        for name, members in genes.items()
    }
    write_json({"groups": groups}, path, "morphome.groups", {})
    return path


@pytest.fixture(scope="session")
def make():
    """The writers of this file by name."""
    names = ("scgpt_state", "write_scgpt", "write_bulkrnabert", "write_cells", "write_expression", "write_groups")
    return type("Make", (), {name: staticmethod(globals()[name]) for name in names} | {"genes": GENES})


@pytest.fixture(scope="session")
def scgpt_folder(tmp_path_factory):
    return write_scgpt(tmp_path_factory.mktemp("scgpt"))


@pytest.fixture
def tiny(scgpt_folder):
    """The tiny scGPT, loaded."""
    from morphome.rna.scgpt import ScGPTEncoder

    return ScGPTEncoder(scgpt_folder, allow_unpinned=True)
