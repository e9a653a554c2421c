"""Bags as each tool writes them, and the traps in their layouts."""

from __future__ import annotations

import json
import sys

import h5py
import numpy as np
import pytest
import torch

from morphome.errors import MorphomeError
from morphome.features.bag import BagError, check_finite, grid_step, to_half
from morphome.features.bag_files import find_bags, input_files
from morphome.features.layouts import content_key, inspect_bag, read_bag
from morphome.workflow import external_feature_files

#: Name of the writer in peer_files, with arguments; then producer, encoder, layout, dtype, unit, mpp known.
FILES = {
    "clam": (("clam", {}), "clam", "unknown", "h5", "float32", False),
    "clam without attributes": (("clam", {"attrs": False}), "h5", "unknown", "h5", "float32", False),
    "trident": (("trident", {}), "trident", "uni_v1", "h5", "float32", False),
    "stamp": (("stamp", {}), "stamp", "uni2", "h5", "float16", False),
    "atlaspatch": (("atlaspatch", {}), "atlaspatch", "uni_v2", "h5", "float32", False),
    "slide2vec pt": (("slide2vec", {}), "slide2vec", "virchow2", "pt", "float32", True),
    "slide2vec npz": (("slide2vec", {"suffix": ".npz"}), "slide2vec", "virchow2", "npz", "float32", True),
    "npy": (("npy", {}), "npy", "unknown", "npy", "float32", False),
    "ours": (("ours", {}), "morphome", "uni2_h", "h5", "float16", True),
}


@pytest.mark.parametrize("name", FILES)
def test_every_tool_is_read(peers, tmp_path, name):
    (writer, changes), producer, encoder, layout, dtype, knows_mpp = FILES[name]
    path = getattr(peers, writer)(tmp_path / "f", **changes)
    facts = inspect_bag(path, mpp=None if knows_mpp else 0.25)
    assert (facts.producer, facts.encoder, facts.layout, facts.dtype) == (producer, encoder, layout, dtype)
    assert (facts.n_tiles, facts.dim) == (12, 8)
    assert facts.mpp == (0.25, 0.25)
    assert facts.coords.dtype == np.int32
    np.testing.assert_array_equal(facts.coords, peers.coords())
    values, coords = read_bag(path, mpp=0.25)
    assert str(values.dtype) == dtype
    np.testing.assert_array_equal(values, peers.features().astype(dtype))
    np.testing.assert_array_equal(coords, peers.coords())
    if name not in ("npy", "clam without attributes"):
        assert facts.side_px == peers.SIDE
        assert facts.unit == "tile"
    expected = "ab12cd34ef56" if name == "ours" else f"imported:{producer}:{encoder}:8"
    assert facts.fingerprint == expected


def test_trap_1_features_may_be_feats_or_a_group(peers, tmp_path):
    several = peers.atlaspatch(tmp_path / "a", encoders=("uni_v2", "conch_v15"))
    with pytest.raises(BagError, match=r"conch_v15, uni_v2.*features.dataset") as caught:
        inspect_bag(several)
    assert caught.value.code == "several_encoders"
    facts = inspect_bag(several, dataset="conch_v15")
    assert (facts.encoder, facts.dataset) == ("conch_v15", "features/conch_v15")
    np.testing.assert_array_equal(read_bag(several, "uni_v2")[0], peers.features(seed=0))
    with pytest.raises(BagError, match="no 'virchow'"):
        inspect_bag(several, dataset="virchow")
    with h5py.File(several, "a") as handle:  # an encoder that was being written when the run was stopped
        handle["features"].move("conch_v15", "__tmp_conch_v15")
    assert inspect_bag(several).encoder == "uni_v2"


def test_trap_2_old_trident_files_have_a_leading_axis(peers, tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as handle:
        handle["features"], handle["coords"] = peers.features()[None], peers.coords()[None]
    facts = inspect_bag(path)
    assert (facts.n_tiles, facts.dim) == (12, 8)
    values, coords = read_bag(path)
    np.testing.assert_array_equal(values, peers.features())
    np.testing.assert_array_equal(coords, peers.coords())


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.float64])
def test_trap_3_coordinates_of_every_type(peers, tmp_path, dtype):
    path = peers.trident(tmp_path, places=peers.coords(dtype=dtype))
    facts = inspect_bag(path)
    assert (facts.coords.dtype, facts.coords_dtype) == (np.int32, np.dtype(dtype).name)
    np.testing.assert_array_equal(facts.coords, peers.coords())
    assert not facts.notes


def test_coordinates_that_are_no_pixels(peers, tmp_path):
    half = inspect_bag(peers.trident(tmp_path, places=peers.coords(dtype=np.float32) + 0.5))
    assert "no whole numbers" in half.notes[0]
    for bad in (np.full((12, 2), 1 << 40), np.full((12, 2), np.nan), np.zeros(12)):
        with pytest.raises(BagError) as caught:
            inspect_bag(peers.trident(tmp_path, places=bad))
        assert caught.value.code == "bad_coords"


def test_trap_4_microns_become_pixels_where_the_resolution_is_known(peers, tmp_path):
    path = peers.stamp(tmp_path, mpp=0.2527)
    unknown = inspect_bag(path)
    assert unknown.coords is None
    assert (unknown.coords_unit, unknown.side_px, unknown.patch_px) == ("um", None, 224)
    assert unknown.tile_um == pytest.approx(512 * 0.2527)
    np.testing.assert_allclose(unknown.coords_um, peers.coords() * 0.2527, rtol=1e-6)
    known = inspect_bag(path, mpp=0.2527)
    np.testing.assert_array_equal(known.coords, peers.coords())
    assert known.side_px == 512
    uneven = inspect_bag(path, mpp=(0.2527, 0.50540))
    np.testing.assert_array_equal(uneven.coords, peers.coords() // [1, 2])


def test_older_stamp_files(peers, tmp_path):
    second = peers.stamp(tmp_path / "2.0", version="2.0.0", tile_size_um=None, tile_size_px=None, tile_size=128.0)
    facts = inspect_bag(second, mpp=0.25)
    assert (facts.tile_um, facts.patch_px, facts.side_px) == (128.0, None, 512)
    np.testing.assert_array_equal(facts.coords, peers.coords())
    historic = inspect_bag(peers.stamp_historic(tmp_path / "1"), mpp=0.5)
    np.testing.assert_allclose(historic.coords_um, peers.coords(side=224) / 224 * 256)
    np.testing.assert_array_equal(historic.coords, np.round(peers.coords(side=224) / 224 * 512))
    assert (historic.tile_um, historic.patch_px, historic.producer) == (256.0, 224, "stamp")
    assert "no unit" in historic.notes[0]
    odd = peers.stamp(tmp_path / "odd", unit=None, tile_size_um=None)
    facts = inspect_bag(odd, mpp=0.25)
    assert facts.coords is None and facts.coords_um is None
    assert "unit of the coordinates is not known" in facts.notes[0]


@pytest.mark.parametrize("kind", ["slide", "patient"])
def test_stamp_slides_and_patients_are_no_bags(peers, tmp_path, kind):
    with pytest.raises(BagError, match=f"{kind}-level") as caught:
        inspect_bag(peers.stamp(tmp_path, kind=kind))
    assert caught.value.code == "not_a_bag"


def test_trap_5_the_floored_side_is_no_resolution(peers, tmp_path):
    """256 px at 15x are 682.67 px at 40x; TRIDENT writes 682. Only what says microns gives microns."""
    places = peers.coords(side=682)
    facts = inspect_bag(peers.trident(tmp_path, places=places, patch_size_level0=682, target_magnification=15))
    assert facts.side_px == 682
    assert facts.mpp is None
    assert inspect_bag(peers.trident(tmp_path, places=places, patch_size_level0=682), mpp=0.25).mpp == (0.25, 0.25)


def test_trap_6_no_tiles(peers, tmp_path):
    empty, nowhere = np.zeros((0, 8), np.float32), np.zeros((0, 2), np.int64)
    facts = inspect_bag(peers.trident(tmp_path, values=empty, places=nowhere))
    assert (facts.n_tiles, facts.dim, facts.encoder) == (0, 8, "uni_v1")
    assert facts.coords.shape == (0, 2)


def test_texts_that_mean_nothing(peers, tmp_path):
    path = peers.trident(tmp_path, encoder="None", level0_magnification="None", overlap="None")
    facts = inspect_bag(path)
    assert facts.encoder == "unknown"
    assert facts.attrs["level0_magnification"] is None
    assert facts.overlap_px is None


def test_trap_7_pt_and_h5_and_what_is_refused(peers, tmp_path):
    path = peers.clam(tmp_path)
    np.testing.assert_array_equal(read_bag(tmp_path / "pt_files" / f"{peers.SLIDE}.pt")[0], read_bag(path)[0])
    bad = {
        "not_finite": {"values": np.where(np.arange(96).reshape(12, 8) == 50, np.inf, 1.0)},
        "unequal_length": {"places": peers.coords(11)},
        "duplicate_coords": {"places": peers.coords()[[0, *range(11)]]},
    }
    for code, changes in bad.items():
        with pytest.raises(BagError) as caught:
            inspect_bag(peers.trident(tmp_path, **changes))
        assert caught.value.code == code


def test_trap_8_the_unit_is_said(peers, tmp_path):
    torch.save(torch.zeros(30, 192) + torch.arange(30)[:, None], tmp_path / "hipt.pt")
    facts = inspect_bag(tmp_path / "hipt.pt")
    assert facts.unit == "region" and "HIPT" in facts.notes[0]
    torch.save(torch.zeros(1, 768), tmp_path / "one.pt")
    facts = inspect_bag(tmp_path / "one.pt")
    assert facts.unit == "unknown" and "whole slide" in facts.notes[0]
    torch.save(torch.zeros(768), tmp_path / "slide.pt")
    with pytest.raises(BagError, match="one vector for the whole slide"):
        inspect_bag(tmp_path / "slide.pt")
    for dim in (768, 0):
        with pytest.raises(BagError, match="one vector for the whole slide"):
            inspect_bag(peers.trident_slide(tmp_path, dim=dim))
    with pytest.raises(BagError, match="slide embeddings"):
        inspect_bag(peers.slide2vec(tmp_path / "s", artifact_type="slide_embeddings"))


def test_tensors_of_other_types(peers, tmp_path):
    values = torch.from_numpy(peers.features())
    torch.save(values.to(torch.bfloat16), tmp_path / "b.pt")
    facts = inspect_bag(tmp_path / "b.pt")
    assert facts.dtype == "bfloat16"
    np.testing.assert_array_equal(read_bag(tmp_path / "b.pt")[0], values.to(torch.bfloat16).float().numpy())
    torch.save({"feats": values.half()[None], "coords": torch.from_numpy(peers.coords())}, tmp_path / "d.pt")
    found, places = read_bag(tmp_path / "d.pt")
    assert found.dtype == np.float16
    np.testing.assert_array_equal(places, peers.coords())


def test_slide2vec_looks_only_into_its_own_run(peers, tmp_path):
    secret = tmp_path / "secret" / "tiles.npz"
    secret.parent.mkdir()
    np.savez(secret, x=np.arange(12), y=np.arange(12))
    path = peers.slide2vec(tmp_path / "run", with_tiles=False, coordinates_npz_path=str(secret))
    assert inspect_bag(path).coords is None
    with pytest.raises(BagError, match="says 13"):
        inspect_bag(peers.slide2vec(tmp_path / "run", num_tiles=13))
    (tmp_path / "run" / "tile_embeddings" / f"{peers.SLIDE}.meta.json").write_text("[1")
    with pytest.raises(BagError, match="not valid JSON"):
        inspect_bag(path)


def test_slide2vec_rows_may_be_numbered(peers, tmp_path):
    path = peers.slide2vec(tmp_path, suffix=".npz")
    np.savez(path, features=peers.features(), tile_index=np.arange(12)[::-1])
    np.testing.assert_array_equal(inspect_bag(path).coords, peers.coords()[::-1])
    np.savez(path, features=peers.features(), tile_index=np.arange(12) + 1)
    with pytest.raises(BagError, match="tile_index"):
        inspect_bag(path)


class Evil:
    def __reduce__(self):
        return (print, ("code was run",))


def test_arrays_run_no_code(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.array([Evil()]), allow_pickle=True)
    np.savez(tmp_path / "a.npz", features=np.array([Evil()]))
    torch.save(Evil(), tmp_path / "a.pt")
    for suffix in (".npy", ".npz", ".pt"):
        with pytest.raises(BagError) as caught:
            inspect_bag(tmp_path / f"a{suffix}")
        assert caught.value.code == "unreadable"
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".h5", ".npy", ".npz", ".pt", ".zarr"])
def test_damaged_files(peers, tmp_path, suffix):
    whole = {".h5": peers.trident, ".npy": peers.npy, ".npz": peers.slide2vec, ".pt": peers.slide2vec}
    if suffix != ".zarr":
        path = whole[suffix](tmp_path, **({"suffix": suffix} if whole[suffix] is peers.slide2vec else {}))
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], content[:10], b"", b"<html>" * 20):
            path.write_bytes(damaged)
            with pytest.raises(BagError) as caught:
                inspect_bag(path)
            assert caught.value.code == "unreadable"
    else:
        (tmp_path / "a.zarr").write_text("no")
        with pytest.raises(BagError, match="no zarr store"):
            inspect_bag(tmp_path / "a.zarr")


@pytest.mark.parametrize("packing", [None, "gzip"])
@pytest.mark.parametrize("name", ["features", "coords"])
def test_files_of_a_run_that_was_stopped(peers, tmp_path, name, packing):
    """A dataset of full size, of which a part was never written, would read as zeros."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as handle:
        for other in {"features", "coords"} - {name}:
            handle[other] = {"features": peers.features(), "coords": peers.coords()}[other]
        whole = peers.features() if name == "features" else peers.coords()
        data = handle.create_dataset(name, whole.shape, whole.dtype, chunks=(4, whole.shape[1]), compression=packing)
        data[:8] = whole[:8]
    with pytest.raises(BagError, match="half-written"):
        inspect_bag(path)
    with h5py.File(path, "a") as handle:
        handle[name][8:] = whole[8:]
    assert inspect_bag(path).n_tiles == 12


def test_other_files_are_not_followed(peers, tmp_path):
    (tmp_path / "secret.bin").write_bytes(bytes(96))
    layout = h5py.VirtualLayout((12, 8), np.float32)
    layout[:] = h5py.VirtualSource(tmp_path / "b.h5", "features", (12, 8))
    for way in ("coords", "external", "virtual", "link"):
        with h5py.File(tmp_path / "a.h5", "w") as handle, h5py.File(tmp_path / "b.h5", "w") as other:
            other["features"] = peers.features()
            if way == "external":
                handle.create_dataset("features", (12, 8), np.uint8, external=[(tmp_path / "secret.bin", 0, 96)])
            elif way == "virtual":
                handle.create_virtual_dataset("features", layout)
            elif way == "coords":
                handle["features"] = peers.features()
                handle.create_dataset("coords", (12, 2), np.int32, external=[(tmp_path / "secret.bin", 0, 96)])
            else:
                handle["features"] = h5py.ExternalLink("b.h5", "features")
        with pytest.raises(BagError) as caught:
            inspect_bag(tmp_path / "a.h5")
        assert caught.value.code == "unsafe_store"


def test_parts_of_a_store_that_were_never_written(peers, tmp_path):
    pytest.importorskip("zarr")
    path = peers.wsidata(tmp_path)
    (path / "tables" / "uni_tiles" / "X" / "c" / "1" / "0").unlink()
    with pytest.raises(BagError, match="half-written: 2 of 3 chunks"):
        inspect_bag(path)


@pytest.mark.parametrize("version", [2, 3])
def test_wsidata_stores(peers, tmp_path, version):
    pytest.importorskip("zarr")
    path = peers.wsidata(tmp_path, version=version)
    facts = inspect_bag(path)
    assert (facts.producer, facts.encoder, facts.layout) == ("lazyslide", "uni", "zarr")
    assert (facts.mpp, facts.side_px, facts.patch_px, facts.overlap_px) == ((0.25, 0.25), 512, 256, 0)
    values, coords = read_bag(path)
    order = np.lexsort((coords[:, 0], coords[:, 1]))
    np.testing.assert_array_equal(coords[order], peers.coords())  # rows of the table come in any order
    np.testing.assert_array_equal(values[order], peers.features())
    before = content_key(path)
    peers.wsidata(tmp_path, version=version, models=("uni", "conch"))
    assert content_key(path) != before
    with pytest.raises(BagError, match="conch_tiles, uni_tiles"):
        inspect_bag(path)
    assert inspect_bag(path, dataset="conch").encoder == inspect_bag(path, dataset="conch_tiles").encoder == "conch"


def test_wsidata_stores_run_no_code(peers, tmp_path):
    """Metadata are read before any codec; a second file of metadata does not hide the first."""
    pytest.importorskip("zarr")
    old, new = peers.wsidata(tmp_path / "2", version=2), peers.wsidata(tmp_path / "3")
    array = old / "tables" / "uni_tiles" / "X"
    meta = json.loads((array / ".zarray").read_text())
    pickled = {"filters": [{"id": "pickle"}]}
    hidden = {"compressor": {"id": "json2"}, "codecs": [{"name": "zstd"}]}
    evil = [meta | pickled | {"dtype": "|O"}, meta | pickled, meta | hidden, meta | {"dtype": [["a", "<f4"]]}]
    for content in evil:
        (array / ".zarray").write_text(json.dumps(content))
        with pytest.raises(BagError) as caught:
            inspect_bag(old)
        assert caught.value.code == "unsafe_store"
    array = new / "tables" / "uni_tiles" / "X"
    meta = json.loads((array / "zarr.json").read_text())
    inner = {"name": "sharding_indexed", "configuration": {"codecs": [{"name": "numcodecs.pickle"}]}}
    for content in (meta | {"codecs": [inner]}, meta | {"data_type": "string"}):
        (array / "zarr.json").write_text(json.dumps(content))
        with pytest.raises(BagError) as caught:
            inspect_bag(new)
        assert caught.value.code == "unsafe_store"


def test_without_zarr_the_remedy_is_named(tmp_path, monkeypatch):
    """Only names of folders and plain JSON are needed to come this far."""
    array = tmp_path / "a.zarr" / "tables" / "uni_tiles" / "X"
    array.mkdir(parents=True)
    meta = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [3, 4],
        "data_type": "float32",
        "codecs": [{"name": "bytes"}],
    }
    group = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"region": "tiles"}})
    for folder in (array.parents[2], array.parent):
        (folder / "zarr.json").write_text(group)
    (array / "zarr.json").write_text(json.dumps(meta))
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(MorphomeError, match=r"pip install 'morphome\[zarr\]'"):
        inspect_bag(tmp_path / "a.zarr")


def test_bags_of_a_folder(peers, tmp_path):
    folder = peers.npy(tmp_path / "n", "b.svs").parent
    peers.npy(tmp_path / "n", "a")
    (folder / ".c.npy").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    assert find_bags(folder) == {"a": folder / "a.npy", "b.svs": folder / "b.svs.npy"}
    assert input_files(folder) == [folder / "a.npy", folder / "b.svs.npy", folder / "coords" / "a.npy",
                                   folder / "coords" / "b.svs.npy"]  # fmt: skip
    peers.clam(tmp_path / "c", "a")
    assert find_bags(tmp_path / "c") == {"a": tmp_path / "c" / "h5_files" / "a.h5"}
    peers.trident(tmp_path / "t", "a")
    assert input_files(tmp_path / "t") == [tmp_path / "t" / "features_uni_v1" / "a.h5"]
    peers.slide2vec(tmp_path / "s", "a")
    assert [f.name for f in input_files(tmp_path / "s")] == ["a.meta.json", "a.pt"]
    (folder / "a.h5").write_bytes(b"")
    with pytest.raises(MorphomeError, match="two files for slide 'a'"):
        find_bags(folder)
    store = tmp_path / "z" / "a.zarr" / "tables" / "uni_tiles" / "X"
    store.mkdir(parents=True)
    for name in ("zarr.json", "0.0"):
        (store / name).write_text("")
    assert input_files(tmp_path / "z") == [store / "zarr.json"]


def test_small_helpers():
    assert grid_step(np.array([[0, 0], [256, 0], [512, 0], [700, 9]])) == 256
    assert grid_step(np.array([[0, 0], [5, 7]])) is None
    check_finite(np.full((4, 4), 3e38, np.float32))  # the sum is infinite, the values are not
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(BagError, match="1 values"):
            check_finite(np.array([[1.0, bad]], np.float32))
    assert to_half(np.array([[65504.0]])).dtype == np.float16
    with pytest.raises(BagError, match="65,504"):
        to_half(np.array([[-70000.0]]))


def test_an_audit_that_gives_the_resolution_is_read_anew_when_it_changes(peers, tmp_path):
    bag, audit = peers.ours(tmp_path / "bags"), tmp_path / "audit.parquet"
    audit.touch()
    features = {"source": "external", "path": str(bag.parent)}
    assert external_feature_files({"features": {**features, "mpp": str(audit)}}) == [bag, audit]
    assert external_feature_files({"features": {**features, "mpp": 0.25}}) == [bag]
    assert external_feature_files({"features": features}) == [bag]
    assert external_feature_files({"features": {**features, "source": "encode"}}) == []
