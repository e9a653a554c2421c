"""One test over every encoder with small random stand-ins; networks against others' networks; checkpoints."""

from __future__ import annotations

import functools
import importlib
import json
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from morphome.errors import MorphomeError
from morphome.features.architectures import ConvStem, CTransPath, TruncatedResNet50
from morphome.features.build import build_model, timm_network
from morphome.features.encoders import load_encoder
from morphome.features.registry import ENCODERS, EncoderSpec, encoder_spec, with_variant
from morphome.features.torch_encoder import TorchEncoder
from morphome.state_dict import read_state_dict
from morphome.vision import ensure_torchvision

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
HIBOU = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
LUNIT = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))
GENBIO = ((0.697, 0.575, 0.728), (0.188, 0.24, 0.187))
#: As published: values of every variant (the default first), normalisation, side, arithmetic.
PUBLISHED = {
    "resnet50_trunc": ([1024], IMAGENET, 224, "fp32"),
    "ctranspath": ([768], IMAGENET, 224, "fp32"),
    "ctranspath_chief": ([768], IMAGENET, 224, "fp32"),
    "phikon": ([768, 1536], IMAGENET, 224, "fp32"),
    "phikon_v2": ([1024, 2048], IMAGENET, 224, "fp32"),
    "uni": ([1024], IMAGENET, 224, "fp16"),
    "uni2_h": ([1536], IMAGENET, 224, "bf16"),
    "conch_v1": ([512], CLIP, 448, "fp32"),
    "conch_v15": ([768], IMAGENET, 448, "fp16"),
    "virchow": ([2560, 1280], IMAGENET, 224, "fp16"),
    "virchow2": ([2560, 1280], IMAGENET, 224, "fp16"),
    "gigapath": ([1536], IMAGENET, 224, "fp16"),
    "h_optimus_0": ([1536, 3072], OPTIMUS, 224, "fp16"),
    "h_optimus_1": ([1536, 3072], OPTIMUS, 224, "fp16"),
    "h0_mini": ([768, 1536], OPTIMUS, 224, "fp16"),
    "hibou_b": ([768], HIBOU, 224, "fp32"),
    "hibou_l": ([1024], HIBOU, 224, "fp32"),
    "kaiko_s8": ([384], HALF, 224, "fp32"),
    "kaiko_s16": ([384], HALF, 224, "fp32"),
    "kaiko_b8": ([768], HALF, 224, "fp32"),
    "kaiko_b16": ([768], HALF, 224, "fp32"),
    "kaiko_l14": ([1024], HALF, 224, "fp32"),
    "lunit_s8": ([384], LUNIT, 224, "fp32"),
    "lunit_s16": ([384], LUNIT, 224, "fp32"),
    "musk": ([1024, 2048], HALF, 384, "fp16"),
    "midnight_12k": ([3072, 1536], HALF, 224, "fp16"),
    "openmidnight": ([1536], IMAGENET, 224, "fp16"),
    "gpfm": ([1024], IMAGENET, 224, "fp16"),
    "keep": ([768], IMAGENET, 224, "fp16"),
    "mstar": ([1024], IMAGENET, 224, "fp16"),
    "plip": ([512], CLIP, 224, "fp32"),
    "genbio_pathfm": ([4608], GENBIO, 224, "bf16"),
}
#: Class token and registers before the patch tokens; 1 for all others.
PREFIX = {"uni2_h": 9, "virchow2": 5, "h_optimus_0": 5, "h_optimus_1": 5, "h0_mini": 5, "openmidnight": 5}
PREFIX |= {"kaiko_l14": 5}
#: Millions of parameters as published, and width of a token.
TRUE_SIZE = {
    "uni": (303.4, 1024), "uni2_h": (681, 1536), "virchow": (631.2, 1280), "virchow2": (631.2, 1280),
    "gigapath": (1135, 1536), "h_optimus_0": (1134.8, 1536), "h_optimus_1": (1134.8, 1536), "h0_mini": (86, 768),
    "kaiko_s8": (21.7, 384), "kaiko_s16": (21.7, 384), "kaiko_b8": (85.8, 768), "kaiko_b16": (85.8, 768),
    "kaiko_l14": (304, 1024), "lunit_s8": (21.7, 384), "lunit_s16": (21.7, 384), "openmidnight": (1134.8, 1536),
    "gpfm": (303, 1024), "mstar": (303.4, 1024),
}  # fmt: skip
WIDTH = 48
VARIANTS = [(key, variant) for key in PUBLISHED for variant in ENCODERS[key].variants]


def randomise(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random numbers in every weight, so that no layer is zero or one by chance of its initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator) * 0.1
                value.copy_(noise.abs() + 1 if name.endswith("weight") and value.ndim == 1 else noise)
                if name.endswith("running_var"):
                    value.copy_(noise.abs() + 0.5)
    return network.eval()


# -- stand-ins: the row's own structure, few and narrow layers ----------------------------------------------------
class Standins:
    """Writes a small model for a row; gives the row that describes it and where it lies."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch

    def make(self, spec: EncoderSpec) -> tuple[EncoderSpec, Path]:
        return getattr(self, spec.loader)(spec)

    def timm(self, spec):
        spec = replace(
            spec,
            arch_kwargs={**spec.arch_kwargs, "embed_dim": WIDTH, "depth": 2, "num_heads": 3},
            dim=spec.dim // TRUE_SIZE[spec.key][1] * WIDTH,
        )
        state = randomise(timm_network(spec)).state_dict()
        if spec.convert:
            state = as_dinov2_names(state)
        for key in reversed(spec.unwrap):
            state = {key: {f"backbone.{name}": value for name, value in state.items()}}
        return spec, write(state, self.folder / spec.files[0])

    def resnet(self, spec):
        spec = replace(spec, arch_kwargs={"layers": 3, "width": 8, "depths": (1, 1, 1, 1)}, dim=128)
        whole = randomise(TruncatedResNet50(4, 8, (1, 1, 1, 1))).state_dict()
        return spec, write({**whole, "fc.weight": torch.ones(5, 256)}, self.folder / spec.files[0])

    def ctranspath(self, spec):
        small = {"dim": 16, "depths": (2, 2), "n_heads": (2, 4)}
        spec = replace(spec, arch_kwargs={**spec.arch_kwargs, **small}, dim=32)
        network = randomise(CTransPath(**small))
        state = dict(network.state_dict())
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):  # buffers that the published file holds
            place = f"layers.{i}.blocks.{j}"
            state[f"{place}.attn.relative_position_index"] = network.get_submodule(place).attn.relative_position_index
        state["layers.0.blocks.1.attn_mask"] = network.layers[0].blocks[1].attn_mask
        return spec, write({"model": state}, self.folder / spec.files[0])

    def transformers(self, spec):
        import transformers

        small = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
        if spec.remote_code:
            return self.remote(spec)
        if spec.key == "plip":
            text = {**small, "vocab_size": 50, "max_position_embeddings": 8}
            vision = {**small, "image_size": 224, "patch_size": 32}
            config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
            network, dim = transformers.CLIPModel(config), 32
        elif spec.key == "phikon":
            config = transformers.ViTConfig(**small, image_size=224, patch_size=16)
            network, dim = transformers.ViTModel(config, add_pooling_layer=False), spec.dim // 768 * WIDTH
        else:
            full = {"phikon_v2": 1024, "midnight_12k": 1536}[spec.key]
            config = transformers.Dinov2Config(**small, image_size=224, patch_size=14)
            network, dim = transformers.Dinov2Model(config), spec.dim // full * WIDTH
        randomise(network).save_pretrained(self.folder)
        return replace(spec, dim=dim), self.folder

    def remote(self, spec):
        """A folder that ships its own code, as the publisher's does."""
        code = textwrap.dedent(REMOTE_CODE)
        (self.folder / "standin_code.py").write_text(code)
        auto_map = {"AutoConfig": "standin_code.StandinConfig", "AutoModel": "standin_code.Standin"}
        config = {"model_type": "standin", "auto_map": auto_map, "dim": 24, "architectures": ["Standin"]}
        (self.folder / "config.json").write_text(json.dumps(config))
        save_file({"patch.weight": torch.randn(24, 3, 32, 32) * 0.01, "patch.bias": torch.zeros(24)},
                  self.folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
        self.monkeypatch.setenv("HF_MODULES_CACHE", str(self.folder / "modules"))
        return replace(spec, dim=24), self.folder

    def titan_conch(self, spec):
        return self.remote(replace(spec, packages={}))  # needs a package for the publisher's own code alone

    def conch(self, spec):
        self.package("conch", "open_clip_custom", CONCH_CODE)
        return replace(spec, dim=6), write({"bias": torch.arange(6.0)}, self.folder / spec.files[0])

    def musk(self, spec):
        self.package("musk", "modeling", MUSK_CODE)
        n_scales = spec.dim // 1024
        state = {"visual.weight": torch.randn(4, 3), "visual.bias": torch.randn(4)}
        return replace(spec, dim=4 * n_scales), write(state, self.folder / spec.files[0])

    def package(self, name: str, module: str, code: str) -> None:
        place = self.folder / "packages" / name
        place.mkdir(parents=True)
        (place / "__init__.py").touch()
        (place / f"{module}.py").write_text(textwrap.dedent(code))
        self.monkeypatch.syspath_prepend(place.parent)
        importlib.import_module(f"{name}.{module}")
        for loaded in (name, f"{name}.{module}"):  # set by monkeypatch, so that they are gone after the test
            self.monkeypatch.setitem(sys.modules, loaded, sys.modules.pop(loaded))


REMOTE_CODE = """
    import torch
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    class StandinConfig(PretrainedConfig):
        model_type = "standin"
        def __init__(self, dim=24, **kwargs):
            super().__init__(**kwargs)
            self.dim = dim

    class Standin(PreTrainedModel):
        config_class = StandinConfig
        def __init__(self, config):
            super().__init__(config)
            self.patch = torch.nn.Conv2d(3, config.dim, 32, stride=32)
            self.post_init()
        def forward(self, pixel_values):
            tokens = self.patch(pixel_values).flatten(2).transpose(1, 2)
            return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens.amax(1))
        def encode_image(self, pixels):
            return self(pixels).pooler_output * 3
        def return_conch(self):
            return _Vectors(self), None

    class _Vectors(torch.nn.Module):
        def __init__(self, whole):
            super().__init__()
            self.patch = whole.patch
        def forward(self, pixels):
            return self.patch(pixels).amax((2, 3))
"""
CONCH_CODE = """
    import torch

    class Conch(torch.nn.Module):
        def encode_image(self, pixels, proj_contrast=True, normalize=True):
            if proj_contrast or normalize:
                raise ValueError("another vector was asked for")
            return torch.cat([pixels.amax((2, 3)), pixels.amin((2, 3))], 1)

    def create_model_from_pretrained(name, path):
        assert name == "conch_ViT-B-16" and path.endswith("pytorch_model.bin")
        return Conch(), None
"""
MUSK_CODE = """
    import timm
    import torch

    class Musk(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = torch.nn.Linear(3, 4)
        def forward(self, image, with_head=True, out_norm=True, ms_aug=True, return_global=False):
            assert not with_head and not out_norm and return_global
            vectors = self.visual(image.mean((2, 3)))
            return (torch.cat([vectors, 2 * vectors], 1) if ms_aug else vectors), None

    def musk_large_patch16_384(pretrained=False, **kwargs):
        return Musk()

    if not timm.is_model("musk_large_patch16_384"):
        timm.models.register_model(musk_large_patch16_384)
"""


def write(state: dict, path: Path) -> Path:
    """A state dict, nested or not, in the format that the name of the file says."""
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def as_dinov2_names(state: dict) -> dict:
    """timm's names to those of DINOv2's training code: grouped blocks, w12 and w3, register_tokens, mask_token."""
    out = {"mask_token": torch.zeros(1, WIDTH)}
    for name, value in state.items():
        new = name.replace("blocks.", "blocks.0.", 1) if name.startswith("blocks.") else name
        if "reg_token" in state:
            new = new.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
        out[new.replace("reg_token", "register_tokens")] = value
    if "reg_token" in state:  # DINOv2 adds a position to the class token, timm's network with registers does not
        place = torch.full((1, 1, WIDTH), 0.25)
        out["cls_token"] = out["cls_token"] - place
        out["pos_embed"] = torch.cat([place, out["pos_embed"]], 1)
    return out


def by_hand(spec: EncoderSpec, model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """The published way from the network's output to the vector."""
    network, n = model.network, PREFIX.get(spec.key, 1)
    if spec.loader == "timm" or spec.variant in ("cls", "cls_mean"):
        tokens = network.forward_features(pixels) if spec.loader == "timm" else network(pixels).last_hidden_state
        # A network of 14-px patches has 256 patch tokens for 224 px: registers are counted apart.
        assert tokens.shape[1] - n in (14**2, 16**2, 28**2)
        return {"cls": tokens[:, 0], "cls_mean": torch.cat([tokens[:, 0], tokens[:, n:].mean(1)], 1)}[spec.variant]
    if spec.loader == "resnet":
        return network(pixels).mean((2, 3))
    if spec.loader == "ctranspath":
        return network(pixels).mean(1)
    if spec.loader == "musk":
        vectors = network.visual(pixels.mean((2, 3)))
        return vectors if spec.variant == "single" else torch.cat([vectors, 2 * vectors], 1)
    if spec.loader == "conch":
        return torch.cat([pixels.amax((2, 3)), pixels.amin((2, 3))], 1)
    if spec.key == "plip":
        return network.visual_projection(network.vision_model(pixels).pooler_output)
    vectors = network.patch(pixels).amax((2, 3))
    return vectors / vectors.norm(dim=1, keepdim=True) if spec.key == "keep" else vectors


# -- every encoder ------------------------------------------------------------------------------------------------
def test_the_registry_holds_what_is_published():
    assert set(PUBLISHED) == set(ENCODERS) - {"stain_texture", "tiny_random"}


@pytest.mark.parametrize(("key", "variant"), VARIANTS)
def test_every_encoder_gives_the_published_vector(key, variant, tmp_path, monkeypatch, timm):
    published = encoder_spec(f"{key}:{variant}")
    dims, (mean, std), side, precision = PUBLISHED[key]
    assert [dim for dim, _ in ENCODERS[key].variants.values()] == dims
    assert published.dim == ENCODERS[key].variants[variant][0]
    assert (published.mean, published.std, published.precision) == (mean, std, precision)
    assert side in published.input_px
    assert published.prefix_tokens == PREFIX.get(key, 5 if key.startswith("hibou") else 1)

    spec, weights = Standins(tmp_path, monkeypatch).make(published)
    model = build_model(spec, weights, trust_remote_code=True)
    assert not model.training
    assert {p.dtype for p in model.parameters()} <= {torch.float32}
    noise = np.random.default_rng(0).integers(0, 200, (2, side, side, 3))
    tiles = (noise * np.array([1.0, 0.5])[:, None, None, None] + 30).astype(np.uint8)
    encoder = TorchEncoder(spec, model, device="cpu", precision="fp32", batch=2)
    vectors = encoder.encode(tiles)
    assert vectors.shape == (2, spec.dim)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-6
    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)
    pixels = pixels / torch.tensor(std).view(3, 1, 1)
    with torch.inference_mode():
        expected = by_hand(spec, model, pixels).numpy()
    np.testing.assert_allclose(vectors, expected, atol=2e-4 * np.abs(expected).max())


@functools.cache
def network_without_memory(arch: str, arch_kwargs: str) -> torch.nn.Module:
    return timm_network(replace(ENCODERS["uni"], arch=arch, arch_kwargs=json.loads(arch_kwargs)), "meta")


@pytest.mark.parametrize("key", TRUE_SIZE)
def test_networks_have_the_published_size(key, timm):
    spec = ENCODERS[key]
    params_m, width = TRUE_SIZE[key]
    network = network_without_memory(spec.arch, json.dumps(spec.arch_kwargs))
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(params_m, rel=0.005)
    assert spec.params_m == pytest.approx(params_m, rel=0.02)
    assert network.embed_dim == width
    assert network.num_prefix_tokens == spec.prefix_tokens
    assert all(dim in (width, 2 * width) for dim, _ in spec.variants.values())


def test_own_networks_have_the_published_size():
    with torch.device("meta"):
        networks = ((TruncatedResNet50(), 8.54), (CTransPath(), 27.52))
    for network, params_m in networks:
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(params_m, rel=0.001)


# -- own networks against others' ---------------------------------------------------------------------------------
def test_resnet_equals_timms(timm):
    theirs = randomise(timm.create_model("resnet50", features_only=True, out_indices=(3,)))
    ours = TruncatedResNet50().eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith(("layer4.", "fc."))})
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(ours(pixels), theirs(pixels)[0], rtol=1e-4, atol=1e-6)


def test_ctranspath_equals_timms_swin_behind_the_same_stem(timm):
    from timm.models.swin_transformer import SwinTransformer

    ours = randomise(CTransPath(224, 16, (2, 2, 2), (1, 2, 4)))
    theirs = SwinTransformer(
        img_size=224, embed_dim=16, depths=(2, 2, 2), num_heads=(1, 2, 4), num_classes=0, global_pool=""
    )
    theirs.patch_embed = torch.nn.Identity()
    state = {}
    for name, value in ours.state_dict().items():
        if not name.startswith("patch_embed."):
            stage = int(name.split(".")[1]) if name.startswith("layers.") else 0
            state[name.replace(f"layers.{stage}.downsample", f"layers.{stage + 1}.downsample")] = value
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if "attn_mask" not in name]
    theirs.eval()
    stem: ConvStem = ours.patch_embed
    pixels = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        stemmed = stem(pixels)
        assert stemmed.shape == (2, 56 * 56, 16)
        expected = theirs(stemmed.view(2, 56, 56, 16)).flatten(1, 2)
        assert torch.allclose(ours(pixels), expected, rtol=1e-3, atol=1e-4)


# -- checkpoints --------------------------------------------------------------------------------------------------
@pytest.fixture
def small_uni(timm):
    spec = encoder_spec("uni")
    spec = replace(spec, arch_kwargs={**spec.arch_kwargs, "embed_dim": WIDTH, "depth": 1, "num_heads": 3}, dim=WIDTH)
    return spec, randomise(timm_network(spec)).state_dict()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.bin"])
def test_a_state_dict_comes_back_from_every_format(name, small_uni, tmp_path):
    spec, state = small_uni
    half = {key: value.half() for key, value in state.items()}
    model = build_model(spec, write(half, tmp_path / name))
    for key, value in model.network.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, half[key].float())


def test_wrappers_of_training_are_taken_off(small_uni, tmp_path):
    spec, state = small_uni
    wrapped = {f"module._orig_mod.{key}": value for key, value in state.items()}
    model = build_model(spec, write(wrapped, tmp_path / "w.pth"))
    assert torch.equal(model.network.state_dict()["norm.weight"], state["norm.weight"])


def test_wrong_weights_are_refused_by_name(small_uni, tmp_path):
    spec, state = small_uni
    changes = {
        "1 missing: norm.weight": {k: v for k, v in state.items() if k != "norm.weight"},
        "1 not known: extra.bias": {**state, "extra.bias": torch.zeros(1)},
        r"cls_token is \(1, 1, 5\), not \(1, 1, 48\)": {**state, "cls_token": torch.zeros(1, 1, 5)},
    }
    for message, changed in changes.items():
        with pytest.raises(MorphomeError, match=message) as caught:
            build_model(spec, write(changed, tmp_path / "w.pth"))
        assert "uni" in caught.value.problem


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(tmp_path):
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (mark,)

    path = tmp_path / "evil.pth"
    torch.save({"model": Evil()}, path)
    with pytest.raises(MorphomeError, match="holds more than tensors"):
        read_state_dict(path)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_damaged_and_empty_files_are_refused(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"nonsense" * 10)
    with pytest.raises(MorphomeError, match=name):
        read_state_dict(path)
    torch.save({"epoch": 3}, tmp_path / "e.pth")
    with pytest.raises(MorphomeError, match="epoch"):
        read_state_dict(tmp_path / "e.pth")


def test_ctranspath_refuses_another_order_of_relative_places(tmp_path, monkeypatch):
    spec, path = Standins(tmp_path, monkeypatch).ctranspath(encoder_spec("ctranspath"))
    state = torch.load(path)["model"]
    name = "layers.1.blocks.0.attn.relative_position_index"
    state[name] = state[name].T
    with pytest.raises(MorphomeError, match="relative_position_index"):
        build_model(spec, write({"model": state}, path))


def test_a_transformers_folder_without_all_weights_is_refused(tmp_path, monkeypatch):
    spec, folder = Standins(tmp_path, monkeypatch).transformers(encoder_spec("phikon_v2"))
    state = read_state_dict(folder / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MorphomeError, match=r"layernorm\.weight"):
        build_model(spec, folder)


@pytest.mark.parametrize("key", ["hibou_b", "conch_v15", "openmidnight"])
def test_code_and_pickles_of_others_need_trust(key, tmp_path):
    with pytest.raises(MorphomeError, match="trust_remote_code: true"):
        build_model(encoder_spec(key), tmp_path)


def test_a_missing_package_is_named_with_the_command_that_brings_it(tmp_path):
    spec = replace(encoder_spec("uni"), packages={"no_such_package": "git+https://example.org/no"})
    with pytest.raises(MorphomeError, match=r"pip install 'git\+https://example\.org/no'"):
        build_model(spec, tmp_path)
    old = replace(encoder_spec("uni"), min_versions={"timm": "99.0"})
    with pytest.raises(MorphomeError, match=r"timm 99\.0 or newer"):
        build_model(old, tmp_path)


def test_absent_weights_are_named(tmp_path):
    for key in ("uni", "ctranspath", "phikon"):
        with pytest.raises(MorphomeError, match=key):
            build_model(encoder_spec(key), tmp_path / "nothing")


def test_torchvision_can_be_imported_beside_a_torch_without_cuda(timm):
    import torchvision

    ensure_torchvision()
    assert hasattr(torch.ops.torchvision, "nms")
    assert torchvision.models.resnet18(num_classes=2)(torch.zeros(2, 3, 64, 64)).shape == (2, 2)


def test_a_vector_of_the_random_encoder_depends_on_its_tile_alone(painted, timm):
    tiles = np.stack([painted[y : y + 64, 300:364] for y in range(100, 600, 70)])
    encoder = load_encoder({"encoder": "tiny_random:cls_mean", "device": "cpu", "batch": 3})
    vectors = encoder.encode(tiles)
    assert vectors.shape == (8, 96)
    np.testing.assert_allclose(encoder.encode(tiles[5:6]), vectors[5:6], atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_the_random_encoder_is_the_same_everywhere(timm):
    """Written down once: other numbers would need another recipe in the fingerprint."""
    model = build_model(encoder_spec("tiny_random"), None)
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    vector = model(pixels)[0]
    assert vector[:3].tolist() == pytest.approx(RANDOM_VECTOR, abs=1e-4)
    both = build_model(with_variant(encoder_spec("tiny_random"), "cls_mean"), None)(pixels)[0]
    assert torch.equal(both[:48], vector)


RANDOM_VECTOR = [0.40283, -1.52513, -0.33331]
