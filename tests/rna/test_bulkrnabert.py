"""BulkRNABert: the network against torch's own layers, its bins, strict loading."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from morphome.errors import MorphomeError
from morphome.rna.bulkrnabert import BulkRNABert, BulkRNABertEncoder, read_gene_order


@pytest.fixture
def folder(tmp_path, make):
    return make.write_bulkrnabert(tmp_path / "bert")


@pytest.fixture
def model(folder):
    return BulkRNABertEncoder(folder, allow_unpinned=True)


def test_parameter_count():
    """6.0 million with its head: 24 MB, the size of the published file."""
    with torch.device("meta"):
        model = BulkRNABert()
    layer = 4 * (256 * 256 + 256) + (256 * 512 + 512) + (512 * 256 + 256) + 4 * 256
    embeddings = 64 * 256 + 19_062 * 200 + (200 * 256 + 256)
    assert sum(p.numel() for p in model.parameters()) == embeddings + 4 * layer == 5_988_656


def test_network_agrees_with_torchs_own_encoder(model, folder):
    state = load_file(folder / "model.safetensors")
    layer = nn.TransformerEncoderLayer(64, 4, 96, 0.1, "gelu", batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    names = {"linear1": "fc1", "linear2": "fc2", "norm1": "layer_norm_self_attention", "norm2": "layer_norm_mlp"}
    theirs = {}
    for n in range(2):
        for part in ("weight", "bias"):
            mine = f"transformer_layers.{n}."
            joint = [state[f"{mine}mha.{w}.{part}"] for w in ("w_q", "w_k", "w_v")]
            theirs[f"layers.{n}.self_attn.in_proj_{part}"] = torch.cat(joint)
            theirs[f"layers.{n}.self_attn.out_proj.{part}"] = state[f"{mine}mha.output.{part}"]
            for to, name in names.items():
                theirs[f"layers.{n}.{to}.{part}"] = state[f"{mine}{name}.{part}"]
    stack.load_state_dict(theirs)
    bins = torch.randint(0, 16, (2, 40), generator=torch.Generator().manual_seed(0))
    gene = state["gene_embedding_layer.weight"] @ state["fc_gene_embedding.weight"].T + state["fc_gene_embedding.bias"]
    with torch.no_grad():
        expected = stack.eval()(state["expression_embedding_layer.weight"][bins] + gene)
        torch.testing.assert_close(model.network(bins), expected, atol=2e-5, rtol=1e-4)


def test_bins_agree_with_a_slow_count(model):
    tpm = np.array([[0.0, 1e-9, 0.5, 1.0, 10.0, 999.0, 99_999.0, 1e6, np.nan]])
    edges = [k / 15 for k in range(16)]
    expected = [0 if not v > 0 else min(15, sum(e <= np.log10(v + 1) / 5.0 for e in edges)) for v in tpm[0]]
    assert model.tokens(tpm)[0].tolist() == expected
    assert expected[1] == 1  # next to nothing is not zero
    with pytest.raises(MorphomeError, match="negative"):
        model.tokens(-tpm)


def test_vector_is_the_mean_over_genes_of_the_last_layer(model):
    random = np.random.default_rng(0)
    tpm = random.gamma(0.3, 50, (3, 45))
    columns = random.permutation(45)[:40]
    columns[7] = -1
    found = model.embed(tpm, columns)
    moved = tpm[:, columns].copy()
    moved[:, 7] = 0.0
    with torch.no_grad():
        expected = model.network(torch.from_numpy(model.tokens(moved))).mean(1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.array_equal(model.embed(tpm[1:2], columns), found[1:2])


def test_genes_are_found_by_id_and_sums_of_several_belong_to_none(model):
    ids = [f"ENSG{i:011d}" for i in range(40)]
    table = [f"S{i}" for i in range(35)] + [ids[36], "SUM"]
    known = {f"S{i}": f"{ids[i]}.12" for i in range(34)} | {"S34": f"ENSG99999999999;{ids[34]}.1"}
    columns, facts = model.columns(table, known | {"SUM": f"{ids[38]};{ids[39]}"})
    assert columns.tolist() == [*range(35), -1, 35, -1, -1, -1]
    assert facts == {
        "match_rate": 0.9,
        "n_unmatched": 4,
        "unmatched": [ids[i] for i in (35, 37, 38, 39)],
        "ambiguous": 1,
    }
    with pytest.raises(MorphomeError, match="0 of 40"):
        model.columns(["TP53"], {})


def test_unknown_weights_need_permission(folder):
    with pytest.raises(MorphomeError, match="allow_unpinned"):
        BulkRNABertEncoder(folder)


@pytest.mark.parametrize("change", ["missing", "unknown", "config", "tokens", "genes", "type"])
def test_folders_that_do_not_fit_are_refused(folder, change):
    if change in ("missing", "unknown"):
        state = load_file(folder / "model.safetensors")
        if change == "missing":
            del state["transformer_layers.1.mha.w_v.bias"]
        else:
            state["more"] = torch.ones(1)
        save_file(state, folder / "model.safetensors")
        said = "1 missing" if change == "missing" else "1 not known: more"
    elif change == "genes":
        (folder / "common_gene_id.txt").write_text("ENSG1\nENSG2\n")
        said = "2 genes in the list, but the model has 40"
    else:
        file = folder / ("tokenizer_config.json" if change == "tokens" else "config.json")
        content = json.loads(file.read_text())
        content |= {"tokens": {"n_expressions_bins": 64}, "type": {"model_type": "bert"}}.get(change, {})
        if change == "config":
            del content["num_layers"]
        file.write_text(json.dumps(content))
        said = {"config": "no num_layers", "tokens": "64 bins", "type": "not 'BulkRNABert'"}[change]
    with pytest.raises(MorphomeError, match=said):
        BulkRNABertEncoder(folder, allow_unpinned=True)


def test_the_order_of_genes_is_a_list_or_a_header(folder):
    header = read_gene_order(folder)
    assert (len(header), header[1]) == (40, "ENSG00000000001")
    (folder / "common_gene_id.txt").write_text("\n".join(f"{name}.2" for name in header[::-1]) + "\n")
    assert read_gene_order(folder) == header[::-1]
    (folder / "common_gene_id.txt").write_text("ENSG1\nENSG1\n")
    with pytest.raises(MorphomeError, match="twice"):
        read_gene_order(folder)
