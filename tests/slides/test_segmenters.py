"""Learned segmenters as plug-ins, with random weights of the published form."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint

import numpy as np
import pytest

from morphome.errors import MorphomeError
from morphome.files import file_sha256, read_json
from morphome.slides import choose, segmenters
from morphome.slides.segmenters import HestDeepLabV3, load_segmenter
from morphome.slides.tile import run_tile


@pytest.fixture(scope="module")
def network():
    """A DeepLabV3 with two classes and random weights."""
    torch = pytest.importorskip("torch")
    from morphome.vision import ensure_torchvision

    ensure_torchvision()
    models = pytest.importorskip("torchvision.models.segmentation")
    torch.manual_seed(0)
    return models.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=2, aux_loss=True).eval()


@pytest.fixture(scope="module")
def checkpoint(network, tmp_path_factory):
    """The weights as a training framework saves them: below ``state_dict``, each name with ``model.``, second head."""
    import torch

    path = tmp_path_factory.mktemp("weights") / "seg.ckpt"
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    assert any(name.startswith("model.aux_classifier") for name in state)
    torch.save({"state_dict": state, "epoch": 3}, path)
    return path


def test_the_network_says_what_torchvisions_says(network, checkpoint):
    import torch

    segmenter = load_segmenter("hest_deeplabv3", checkpoint)
    segmenter.window_px = 64
    rgb = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    found = segmenter(rgb)
    assert (found.shape, found.dtype, segmenter.mpp) == ((70, 50), bool, 1.0)
    padded = np.full((64, 64, 3), 255, np.uint8)
    padded[:, :50] = rgb[:64]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = torch.tensor(((padded / 255 - mean) / std).transpose(2, 0, 1)[None], dtype=torch.float32)
    with torch.inference_mode():
        scores = network(pixels)["out"][0]
    margin = (scores[1] - scores[0])[:, :50].numpy()
    clear = np.abs(margin) > 1e-4
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(found[:64][clear], (margin > 0)[clear])


def test_safetensors_are_read_as_well(network, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "seg.safetensors"
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    assert HestDeepLabV3(path).mpp == 1.0


def test_other_weights_are_refused_and_named(network, tmp_path):
    import torch

    state = {"classifier.4.weight": torch.zeros(21, 256, 1, 1), "head.bias": torch.zeros(2)}
    path = tmp_path / "other.pt"
    torch.save(state, path)
    with pytest.raises(MorphomeError) as caught:
        HestDeepLabV3(path)
    wanted = len([name for name in network.state_dict() if not name.startswith("aux_classifier")])
    for words in (f"{wanted - 1} missing: backbone.bn1.bias", "1 not known: head.bias",
                  "1 of another shape: classifier.4.weight is (21, 256, 1, 1), not", "other.pt"):  # fmt: skip
        assert words in str(caught.value)


class Harmful:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (print, ("code of a weights file ran",))


@pytest.mark.parametrize("content", ["code", "text", "empty", "list"])
def test_files_that_are_no_weights_are_refused_and_run_nothing(tmp_path, content, capsys):
    torch = pytest.importorskip("torch")
    path = tmp_path / "weights.ckpt"
    if content == "code":
        torch.save({"state_dict": {}, "extra": Harmful()}, path)
    elif content == "list":
        torch.save([torch.zeros(2)], path)
    else:
        path.write_text("<html>" if content == "text" else "")
    with pytest.raises(MorphomeError, match=r"weights\.ckpt"):
        HestDeepLabV3(path)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("weights", [None, "gone.ckpt"])
def test_missing_weights_say_where_they_come_from(weights):
    with pytest.raises(MorphomeError, match=r"deeplabv3_seg_v4\.ckpt"):
        load_segmenter("hest_deeplabv3", weights)


class Middle:
    """A stand-in for somebody's segmenter: the middle third of the slide is tissue."""

    mpp = 2.0
    seen: tuple[int, ...] = ()

    def __init__(self, weights):
        self.weights = weights

    def __call__(self, rgb):
        Middle.seen = rgb.shape
        mask = np.zeros(rgb.shape[:2], bool)
        mask[:, mask.shape[1] // 3 : 2 * mask.shape[1] // 3] = True
        return mask


@pytest.fixture
def plugin(monkeypatch):
    """An installed package offers the segmenter ``middle``."""
    entry = EntryPoint("middle", "unused:unused", segmenters.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: Middle)
    monkeypatch.setattr(segmenters, "entry_points", lambda group: [entry] if group == segmenters.GROUP else [])


def test_unknown_names_list_the_known_ones(plugin):
    with pytest.raises(MorphomeError, match="hest_deeplabv3, middle, saturation"):
        load_segmenter("nobody", None)


@pytest.fixture
def tile(synthetic, tmp_path):
    def run(path, **changes):
        ends = {"h5_out": "h5", "qc_out": "json", "geojson_out": "geojson", "thumbnail_out": "jpg"}
        outputs = {key: tmp_path / f"S.{end}" for key, end in ends.items()}
        settings = {"tiling": synthetic.tiling(**changes), "slides": synthetic.SLIDES}
        run_tile(slide_path=path, slide_id="S", settings=settings, **outputs)
        return read_json(outputs["qc_out"], "morphome.slide_qc", settings), json.loads(
            outputs["geojson_out"].read_text()
        )

    return run


def test_a_plug_in_makes_the_mask_and_ink_is_still_taken_out(plugin, tile, synthetic, painted, tmp_path):
    marked = painted.copy()
    marked[300:420, 100:900] = (28, 58, 158)
    slide = synthetic.write_tiff(tmp_path / "s.tif", marked)
    weights = tmp_path / "w.bin"
    weights.write_bytes(b"1")
    qc, geojson = tile(slide, segmenter="middle", segmenter_weights=str(weights))
    assert (qc["status"], qc["mask_source"]) == ("ok", "middle")
    assert qc["segmenter_weights_sha256"] == file_sha256(weights)
    assert qc["saturation_threshold"] is None
    assert Middle.seen == (190, 250, 3)  # 1000 x 760 px of 0.5 microns at 2 microns
    assert qc["tissue_fraction"] == pytest.approx((1 - 120 / 760) / 3, abs=0.03)
    assert qc["n_fragments"] == len(geojson["features"]) == 2
    assert qc["n_dropped_pen"] >= 5


def test_a_plug_in_that_gives_no_mask_is_told_so(plugin, tile, synthetic, painted, tmp_path, monkeypatch):
    slide = synthetic.write_tiff(tmp_path / "s.tif", painted)
    monkeypatch.setattr(Middle, "__call__", lambda self, rgb: rgb[..., 0])
    with pytest.raises(TypeError, match="'middle' gave uint8"):
        tile(slide, segmenter="middle")


def test_a_wrong_segmenter_stops_the_step_and_is_no_bad_slide(tile, synthetic, painted, tmp_path):
    slide = synthetic.write_tiff(tmp_path / "s.tif", painted)
    with pytest.raises(MorphomeError, match=r"tiling\.segmenter: 'nobody' is unknown"):
        tile(slide, segmenter="nobody")


def test_the_default_needs_no_torch(loaded_by):
    assert not loaded_by(choose.__name__) & {"torch", "torchvision", "shapely", "safetensors"}
