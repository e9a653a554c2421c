"""scGPT: the network against torch's own layers, strict loading, embeddings that depend on their patient alone."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from morphome.errors import MorphomeError
from morphome.rna.scgpt import ScGPT, ScGPTEncoder, convert_checkpoint, read_vocabulary
from morphome.rna.tokenise import BulkTokeniser


def test_parameter_count():
    with torch.device("meta"):
        model = ScGPT()
    assert sum(p.numel() for p in model.parameters()) == 50_278_400


class Referee(nn.Module):
    """The same network from torch's modules, put together and fed independently."""

    def __init__(self, state):
        super().__init__()
        dim = state["encoder.embedding.weight"].shape[1]
        self.embedding = nn.Embedding.from_pretrained(state["encoder.embedding.weight"])
        self.state = state
        self.values = nn.Sequential(nn.Linear(1, dim), nn.ReLU(), nn.Linear(dim, dim), nn.LayerNorm(dim))
        layer = nn.TransformerEncoderLayer(dim, 4, dim, dropout=0.2, batch_first=True)
        self.stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        prefix = "transformer_encoder."
        self.stack.load_state_dict({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})
        names = {"0": "linear1", "2": "linear2", "3": "norm"}
        self.values.load_state_dict(
            {
                f"{to}.{part}": state[f"value_encoder.{name}.{part}"]
                for to, name in names.items()
                for part in ("weight", "bias")
            }
        )
        self.eval()

    @torch.no_grad()
    def forward(self, ids, values, padding):
        gene = self.embedding(ids)
        gene = nn.functional.layer_norm(
            gene, gene.shape[-1:], self.state["encoder.enc_norm.weight"], self.state["encoder.enc_norm.bias"]
        )
        value = self.values(torch.clamp(values, max=512)[..., None])
        return self.stack(gene + value, src_key_padding_mask=padding)


@pytest.mark.parametrize("padded", [False, True])
def test_network_agrees_with_torchs_own_encoder(tiny, make, padded):
    referee = Referee(make.scgpt_state(63))
    random = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 63, (3, 20), generator=random)
    values = torch.randint(-2, 800, (3, 20), generator=random).float()
    padding = torch.rand(3, 20, generator=random) < 0.3
    padding[:, 0] = False
    with torch.no_grad():
        ours = tiny.network(ids, values, padding if padded else None)
    theirs = referee(ids, values, padding if padded else torch.zeros_like(padding))
    kept = ~padding if padded else torch.ones_like(padding)
    torch.testing.assert_close(ours[kept], theirs[kept], atol=2e-5, rtol=1e-4)


def test_embeddings_agree_with_a_plain_recomputation(tiny, make):
    rows = np.random.default_rng(0).poisson(3, (2, 60)).astype(float)
    tokeniser = BulkTokeniser(tiny.vocabulary, make.genes, panel_size=25)
    referee, expected, means = Referee(make.scgpt_state(63)), [], []
    for row in tokeniser.rows(rows):
        cls, genes = [], []
        for panel in tokeniser.encode(row):
            hidden = referee(torch.tensor(panel.ids)[None], torch.tensor(panel.values)[None], None)[0]
            cls.append(hidden[0] / hidden[0].norm())
            genes.extend(hidden[1:])
        expected.append(torch.stack(cls).mean(0))
        means.append(torch.stack(genes).mean(0))
    assert len(tokeniser.panels) == 3
    found = tiny.embed(tokeniser, tokeniser.rows(rows))
    np.testing.assert_allclose(found, torch.stack(expected), atol=1e-5)
    np.testing.assert_allclose(tiny.embed(tokeniser, tokeniser.rows(rows), "gene_mean"), torch.stack(means), atol=2e-5)


@pytest.mark.parametrize("output", ["cls", "gene_mean"])
def test_a_vector_depends_on_its_patient_alone(tiny, make, output):
    random = np.random.default_rng(1)
    values = random.poisson(3, (5, 60)).astype(float)
    values[2, 7] = np.nan
    tokeniser = BulkTokeniser(tiny.vocabulary, make.genes, panel_size=30)
    rows = tokeniser.rows(values)
    whole = tiny.embed(tokeniser, rows, output, batch=16)
    assert np.array_equal(whole, tiny.embed(tokeniser, rows, output, batch=1))
    assert np.array_equal(whole[[3, 1]], tiny.embed(tokeniser, rows[[3, 1]], output, batch=2))
    assert np.array_equal(whole, tiny.embed(tokeniser, rows * 12.5, output))
    order = random.permutation(60)
    other = BulkTokeniser(tiny.vocabulary, [make.genes[i] for i in order], panel_size=30)
    assert np.array_equal(whole, tiny.embed(other, other.rows(values[:, order]), output))
    assert not np.allclose(whole[0], whole[1], atol=1e-3)


def test_batches_of_several_patients_agree(tiny, make, monkeypatch):
    """What a GPU does, on a CPU: several patients in one pass, the last pass filled up."""
    values = np.random.default_rng(2).poisson(3, (5, 60)).astype(float)
    values[4, 3] = np.nan
    tokeniser = BulkTokeniser(tiny.vocabulary, make.genes, panel_size=30)
    alone = tiny.embed(tokeniser, tokeniser.rows(values))
    monkeypatch.setattr(tiny, "device", torch.device("cpu"))  # is not the text "cpu"
    together = tiny.embed(tokeniser, tokeniser.rows(values), batch=3)
    assert together.shape == alone.shape
    np.testing.assert_allclose(together, alone, atol=2e-6)


def test_genes_that_were_not_measured_do_not_count(tiny, make):
    """Dropping columns from the table is the same as cells without a value in them."""
    values = np.random.default_rng(4).poisson(3, (1, 60)).astype(float)
    values[0, 50:] = np.nan
    tokeniser = BulkTokeniser(tiny.vocabulary, make.genes)
    short = BulkTokeniser(tiny.vocabulary, make.genes[:50])
    for output in ("cls", "gene_mean"):
        a = tiny.embed(tokeniser, tokeniser.rows(values), output)
        b = tiny.embed(short, short.rows(values[:, :50]), output)
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_length_of_cls_is_one_for_one_panel(tiny, make):
    tokeniser = BulkTokeniser(tiny.vocabulary, make.genes)
    rows = np.random.default_rng(0).poisson(3, (2, 60)).astype(float)
    np.testing.assert_allclose(np.linalg.norm(tiny.embed(tokeniser, rows), axis=1), 1, atol=1e-6)
    with pytest.raises(MorphomeError, match="one of cls, gene_mean"):
        tiny.embed(tokeniser, rows, "mean")


@pytest.mark.parametrize("form", ["flash", "wrapped", "data_parallel"])
def test_other_names_of_the_same_weights_are_understood(tmp_path, tiny, make, form):
    state = make.scgpt_state(63)
    if form == "flash":
        state = {n.replace("self_attn.in_proj_", "self_attn.Wqkv."): v for n, v in state.items()}
    elif form == "wrapped":
        state = {n.replace("self_attn.in_proj_", "self_attn._impl.Wqkv."): v for n, v in state.items()}
        state = {n.replace("self_attn.out_proj", "self_attn._impl.out_proj"): v for n, v in state.items()}
    else:
        state = {f"module.{n}": v for n, v in state.items()}
    other = ScGPTEncoder(make.write_scgpt(tmp_path, state), allow_unpinned=True)
    assert all(torch.equal(v, other.network.state_dict()[n]) for n, v in tiny.network.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("transformer_encoder.layers.1.norm2.bias"), "1 missing: transformer_encoder.layers.1.norm2"),
        (lambda s: s.update({"encoder.extra": torch.ones(2)}), "1 not known: encoder.extra"),
        (lambda s: s.update({"value_encoder.norm.bias": torch.ones(2)}), "1 of another shape"),
        (lambda s: [s.pop(n) for n in list(s) if n.startswith("transformer")], "24 missing"),
    ],
    ids=["missing", "unknown", "shape", "no transformer"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, make, change, said):
    state = make.scgpt_state(63)
    change(state)
    with pytest.raises(MorphomeError, match=said):
        ScGPTEncoder(make.write_scgpt(tmp_path, state), allow_unpinned=True)


def test_unknown_weights_need_permission(scgpt_folder):
    with pytest.raises(MorphomeError, match="allow_unpinned") as error:
        ScGPTEncoder(scgpt_folder)
    assert "best_model.pt has sha256" in error.value.problem


def test_known_checksums_are_accepted_and_graded(monkeypatch, scgpt_folder):
    from morphome.features.weights import checksum
    from morphome.rna import registry

    files = ("args.json", "vocab.json", "best_model.pt")
    monkeypatch.setitem(registry.KNOWN_SHA256, "scgpt", {name: checksum(scgpt_folder / name) for name in files})
    assert ScGPTEncoder(scgpt_folder).weights["grade"] == "to be verified"


class _Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_files_that_hold_code_are_refused(tmp_path, make, capsys):
    folder = make.write_scgpt(tmp_path)
    torch.save({"encoder.embedding.weight": _Evil()}, folder / "best_model.pt", pickle_module=pickle)
    with pytest.raises(MorphomeError, match="more than tensors"):
        ScGPTEncoder(folder, allow_unpinned=True)
    assert "code ran" not in capsys.readouterr().out


def test_converted_weights_give_the_same_and_count_only_beside_their_source(tmp_path, make, tiny):
    folder = make.write_scgpt(tmp_path)
    written = convert_checkpoint(folder)
    assert set(load_file(written)) == set(tiny.network.state_dict())
    one = ScGPTEncoder(folder, allow_unpinned=True)
    assert all(torch.equal(v, one.network.state_dict()[n]) for n, v in tiny.network.state_dict().items())
    assert set(one.weights["files"]) == {"args.json", "vocab.json", "best_model.pt"}
    # Another checkpoint beside it: the converted copy is stale.
    make.write_scgpt(folder, make.scgpt_state(63, seed=9))
    two = ScGPTEncoder(folder, allow_unpinned=True)
    assert not torch.equal(two.network.encoder.embedding.weight, one.network.encoder.embedding.weight)
    # Alone it is a file like any other, with a checksum of its own.
    (folder / "best_model.pt").unlink()
    three = ScGPTEncoder(folder, allow_unpinned=True)
    assert torch.equal(three.network.encoder.embedding.weight, one.network.encoder.embedding.weight)
    assert "model.safetensors" in three.weights["files"]


def test_a_safetensors_file_of_the_publisher_is_read(tmp_path, make, tiny):
    folder = make.write_scgpt(tmp_path)
    (folder / "best_model.pt").unlink()
    save_file(make.scgpt_state(63), folder / "model.safetensors")
    other = ScGPTEncoder(folder, allow_unpinned=True)
    assert torch.equal(other.network.encoder.embedding.weight, tiny.network.encoder.embedding.weight)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"nheads": None}, "no nheads"),
        ({"pre_norm": True}, "pre_norm"),
        ({"input_emb_style": "category"}, "continuous"),
    ],
    ids=["lacking", "pre-norm", "category"],
)
def test_settings_that_this_network_does_not_have_are_refused(tmp_path, make, args, said):
    with pytest.raises(MorphomeError, match=said):
        read_vocabulary(make.write_scgpt(tmp_path, {"x": torch.ones(1)}, **args))


@pytest.mark.parametrize("content", [{"A": 1, "<pad>": 2, "<cls>": 3}, {"A": 0, "<pad>": 1}, ["A"]], ids=str)
def test_damaged_vocabularies_are_refused(tmp_path, make, content):
    folder = make.write_scgpt(tmp_path, {"x": torch.ones(1)})
    (folder / "vocab.json").write_text(json.dumps(content))
    with pytest.raises(MorphomeError, match=r"vocab\.json"):
        read_vocabulary(folder)
