"""What feature files hold, and what is wrong with them."""

from __future__ import annotations

import shutil

import h5py
import numpy as np
import pytest
import torch

from morphome.errors import MorphomeError
from morphome.features.inspect import inspect_features, verify_features


def codes(path, **options):
    """(level, code, file) of every finding."""
    return [(one.level, one.code, one.file) for one in verify_features(path, **options)]


def test_one_file(peers, tmp_path):
    found = inspect_features(peers.trident(tmp_path))
    assert {k: found[k] for k in ("slide_id", "producer", "encoder", "n_tiles", "dim", "dtype", "storage")} == {
        "slide_id": peers.SLIDE, "producer": "trident", "encoder": "uni_v1", "n_tiles": 12, "dim": 8,
        "dtype": "float32", "storage": "chunks 1 x 8",
    }  # fmt: skip
    assert found["coords_range"] == [[1024, 2048], [2560, 3072]]
    assert (found["coords_unit"], found["grid_step"], found["side_px"], found["mpp"]) == ("px", 512, 512, None)
    assert found["fingerprint"] == "imported:trident:uni_v1:8"
    stamp = inspect_features(peers.stamp(tmp_path / "s"))
    assert (stamp["coords_unit"], stamp["patch_um"], stamp["storage"]) == ("um", 128.0, "contiguous")
    assert stamp["coords_range"][0] == [256.0, 512.0]
    ours = inspect_features(peers.ours(tmp_path / "o"))
    assert (ours["mpp"], ours["fingerprint"]) == ([0.25, 0.25], "ab12cd34ef56")


def test_a_folder(peers, tmp_path):
    for i, slide in enumerate("abc"):
        peers.clam(tmp_path, slide, values=peers.features(4 + i))
    found = inspect_features(tmp_path)
    assert (found["n_files"], found["n_tiles"], found["tiles_per_slide"]) == (3, 15, [4, 5.0, 6])
    assert [(kind["producer"], kind["dim"], kind["n_slides"]) for kind in found["kinds"]] == [("clam", 8, 3)]
    (tmp_path / "h5_files" / "c.h5").write_bytes(b"no")
    peers.clam(tmp_path, "d", attrs=False, pt=False)
    found = inspect_features(tmp_path)
    assert found["unreadable"][0].startswith("h5_files/c.h5: unreadable")
    assert [kind["n_slides"] for kind in found["kinds"]] == [2, 1]


def test_a_folder_of_ours_whose_slides_differ_in_resolution(peers, tmp_path):
    peers.ours(tmp_path, "a", mpp=0.25)
    peers.ours(tmp_path, "b", mpp=0.2504)
    found = inspect_features(tmp_path)
    assert [(kind["encoder"], kind["n_slides"]) for kind in found["kinds"]] == [("uni2_h", 2)]
    assert found["mpp"] == [0.25, 0.2504]


def test_a_packed_file(peers, tmp_path):
    path = peers.packed(tmp_path / "bags.h5")
    found = inspect_features(path)
    assert (found["n_files"], found["n_tiles"]) == (3, 12)
    assert found["kinds"][0]["unit"] == "region"
    assert verify_features(path) == []
    assert codes(path, slides=["a", "b", "z"]) == [
        ("error", "missing_slide", "z"), ("warning", "unlisted_slide", "c"),
    ]  # fmt: skip


def test_what_is_no_bag(peers, tmp_path):
    with pytest.raises(MorphomeError, match="not_a_bag"):
        inspect_features(peers.trident_slide(tmp_path))
    with pytest.raises(MorphomeError, match="not found"):
        inspect_features(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    for function in (inspect_features, verify_features):
        with pytest.raises(MorphomeError, match=r"no \.h5"):
            function(tmp_path / "empty")
    for encoder in ("uni_v1", "conch_v15"):
        peers.trident(tmp_path / "t", encoder=encoder)
    with pytest.raises(MorphomeError, match="features_conch_v15, features_uni_v1"):
        verify_features(tmp_path / "t")


@pytest.mark.parametrize("writer", ["clam", "trident", "atlaspatch", "stamp", "slide2vec", "npy", "ours"])
def test_sound_files_have_no_findings(peers, tmp_path, writer):
    for i, slide in enumerate("ab"):
        path = getattr(peers, writer)(tmp_path, slide)
        if writer in ("npy", "slide2vec"):
            values = peers.features(seed=i)
            np.save(path, values) if writer == "npy" else torch.save(torch.from_numpy(values), path)
        else:
            with h5py.File(path, "a") as handle:
                data = handle.get("feats", handle.get("features"))
                data = data["uni_v2"] if writer == "atlaspatch" else data
                data[...] = peers.features(seed=i)
    assert verify_features(tmp_path, slides=["a", "b"]) == []


def test_every_fault_is_found(peers, tmp_path):
    folder = tmp_path / "features_uni_v1"

    def write(slide, n=12, seed=None, **changes):
        values = changes.pop("values", peers.features(n, seed=seed or len(slide) * 100 + ord(slide[0])))
        return peers.trident(tmp_path, slide, values=values, **changes)

    write("a")
    write("nan", values=np.where(np.arange(96).reshape(12, 8) == 5, np.nan, 1).astype(np.float32))
    write("short", places=peers.coords(11))
    write("twice", places=peers.coords()[[0, *range(11)]])
    write("dim", values=peers.features(dim=9))
    write("void", values=np.zeros((0, 8), np.float32), places=np.zeros((0, 2), int))
    path = write("cut")
    path.write_bytes(path.read_bytes()[:3000])
    shutil.copy(folder / "a.h5", folder / "copy.h5")
    torch.save(torch.ones(3, 8), folder / "tensor.h5")
    write("one", n=1)
    write("zero", values=np.vstack([peers.features(11, seed=5), np.zeros((1, 8), np.float32)]))
    write("odd", seed=1, places=np.random.default_rng(0).integers(0, 70_000, (12, 2)))
    write("out", places=np.add(peers.coords(), [99_000, 0]))
    shutil.copy(write("h5"), folder / "h5.hdf5")
    (folder / "left.h5.lock").write_text("")
    (folder / ".half.h5").write_bytes(b"")
    with h5py.File(peers.trident_slide(tmp_path / "s"), "r") as slide, h5py.File(folder / "slide.h5", "w") as handle:
        slide.copy("features", handle)
    found = verify_features(tmp_path)
    assert {(one.level, one.code, one.file.rsplit("/", 1)[-1]) for one in found} == {
        ("error", "not_finite", "nan.h5"),
        ("error", "unequal_length", "short.h5"),
        ("error", "duplicate_coords", "twice.h5"),
        ("error", "mixed_dim", "dim.h5"),
        ("error", "unreadable", "cut.h5"),
        ("error", "same_content", "a.h5"),
        ("error", "unreadable", "tensor.h5"),
        ("error", "wrong_extension", "tensor.h5"),
        ("error", "wrong_extension", "h5.hdf5"),
        ("error", "unfinished", "left.h5.lock"),
        ("error", "unfinished", ".half.h5"),
        ("error", "not_a_bag", "slide.h5"),
        ("warning", "empty", "void.h5"),
        ("warning", "one_vector", "one.h5"),
        ("warning", "all_zero", "zero.h5"),
        ("warning", "off_grid", "odd.h5"),
        ("warning", "outside_slide", "out.h5"),
        ("warning", "other_slide_id", "copy.h5"),
    }
    assert [one.level for one in found] == sorted(one.level for one in found)
    assert "copy.h5" in next(one.text for one in found if one.code == "same_content")


def test_one_tile_off_our_grid(peers, tmp_path):
    path = peers.ours(tmp_path)
    with h5py.File(path, "a") as handle:
        handle["coords"][3] += [7, 0]
    found = verify_features(path)
    assert [(one.code, one.text) for one in found] == [("off_grid", "1 of 12 tiles are off the grid of the others")]


def test_a_slide_that_failed(peers, tmp_path):
    path = peers.ours(tmp_path, values=np.zeros((0, 8), np.float16))
    with h5py.File(path, "a") as handle:
        handle.attrs.update({"status": "failed", "reason_code": "missing_mpp"})
    found = verify_features(path)
    assert [one.code for one in found] == ["empty", "note"]
    assert "missing_mpp" in found[1].text


def test_two_encoders_of_one_dimension_and_two_files_of_a_slide(peers, tmp_path):
    for i, (slide, encoder) in enumerate([("a", "uni"), ("b", "uni"), ("c", "gigapath")]):
        path = peers.trident(tmp_path / "x", slide, encoder=encoder, values=peers.features(seed=i))
        (tmp_path / "all").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "all" / path.name)
    torch.save(torch.ones(3, 8), tmp_path / "all" / "a.pt")
    found = {one.code: one for one in verify_features(tmp_path / "all")}
    assert "imported:trident:uni:8 (2 files)" in found["mixed_fingerprint"].text
    assert found["two_files"].file == "a"


def test_a_folder_of_slide_embeddings(tmp_path):
    for i in range(3):
        torch.save(torch.full((1, 768), float(i + 1)), tmp_path / f"{i}.pt")
    assert ("error", "slide_level", "0.pt") in codes(tmp_path)


def test_real_files(shared_data):
    """Ten tensors and a packed file, as published."""
    found = inspect_features(shared_data / "bags" / "pt_sample")
    assert (found["n_files"], found["kinds"][0]["unit"], found["kinds"][0]["dim"]) == (10, "region", 192)
    assert {one.level for one in verify_features(shared_data / "bags" / "pt_sample")} == {"warning"}
    packed = inspect_features(shared_data / "bags" / "tcga_hnsc.h5")
    assert (packed["n_files"], packed["n_tiles"], packed["kinds"][0]["unit"]) == (418, 15_899, "region")
    assert {one.code for one in verify_features(shared_data / "bags" / "tcga_hnsc.h5")} <= {"one_vector"}
