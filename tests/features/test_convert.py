"""Features from one tool's layout to another's and back."""

from __future__ import annotations

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from morphome.errors import MorphomeError
from morphome.features.convert import convert_features
from morphome.features.layouts import inspect_bag, read_bag
from morphome.features.peers_write import LAYOUTS
from morphome.files import check_stamp, write_parquet

SOURCES = {
    "clam": {}, "trident": {}, "stamp": {}, "atlaspatch": {}, "slide2vec": {}, "npy": {}, "ours": {},
}  # fmt: skip


def vectors(layout, out, slide):
    """The file of vectors that a bag became."""
    return {"clam": out / "h5_files" / f"{slide}.h5", "npy": out / f"{slide}.npy"}.get(
        layout, next(iter(out.glob("features_*/*.h5")), out / f"{slide}.h5")
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_layout_from_every_tool(peers, tmp_path, source, layout):
    """Vectors to float16, coordinates to the pixel, and what both tools can say about the tiles."""
    path = getattr(peers, source)(tmp_path / "in")
    facts = inspect_bag(path, mpp=0.25)
    out = tmp_path / "out"
    said = convert_features(path, layout, out, mpp=0.25)
    assert (said["n_slides"], said["n_written"], said["n_tiles"], said["dim"]) == (1, 1, 12, 8)
    assert said["fingerprint"] == facts.fingerprint
    made = vectors(layout, out, peers.SLIDE)
    back = inspect_bag(made, mpp=0.25)
    values, coords = read_bag(made, mpp=0.25)
    np.testing.assert_array_equal(coords, peers.coords())
    rounded = np.float16 if layout in ("stamp", "morphome") else facts.dtype
    np.testing.assert_array_equal(values, peers.features().astype(facts.dtype).astype(rounded))
    if layout in ("trident", "stamp", "morphome"):
        assert back.encoder == facts.encoder
        assert back.side_px == peers.SIDE
    if layout in ("trident", "morphome"):
        assert back.patch_px == (facts.patch_px or peers.SIDE)
        assert back.slide_id == peers.SLIDE
    if layout == "morphome":
        assert back.mpp == (0.25, 0.25)
        assert back.fingerprint == facts.fingerprint


def test_clam_files_are_as_clam_writes_them(peers, tmp_path):
    convert_features(peers.ours(tmp_path / "in"), "clam", tmp_path)
    tensor = torch.load(tmp_path / "pt_files" / f"{peers.SLIDE}.pt", weights_only=True)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, (12, 8))
    with h5py.File(tmp_path / "h5_files" / f"{peers.SLIDE}.h5") as handle:
        assert set(handle) == {"features", "coords"}
        assert (handle["features"].dtype, handle["features"].chunks) == (np.float32, (32, 8))
        assert (handle["coords"].dtype, handle["coords"].maxshape) == (np.int32, (None, 2))
        np.testing.assert_array_equal(handle["features"][:], tensor.numpy())
        assert not dict(handle["coords"].attrs)


def test_trident_files_are_as_trident_writes_them(peers, tmp_path):
    convert_features(peers.ours(tmp_path / "in"), "trident", tmp_path)
    with h5py.File(tmp_path / "features_uni2_h" / f"{peers.SLIDE}.h5") as handle:
        assert (handle["features"].dtype, handle["features"].chunks) == (np.float32, (1, 8))
        assert dict(handle["features"].attrs) == {"name": peers.SLIDE, "savetodir": "", "encoder": "uni2_h"}
        assert (handle["coords"].dtype, handle["coords"].chunks) == (np.int64, (1, 2))
        attrs = dict(handle["coords"].attrs)
    assert attrs == {
        "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40.0, "target_magnification": 20.0,
        "overlap": 0, "name": peers.SLIDE, "savetodir": "", "level0_width": 100_000, "level0_height": 80_000,
    }  # fmt: skip
    said = convert_features(peers.npy(tmp_path / "n"), "trident", tmp_path / "out")
    with h5py.File(tmp_path / "out" / "features_unknown" / f"{peers.SLIDE}.h5") as handle:
        assert handle["coords"].attrs["level0_magnification"] == handle["coords"].attrs["overlap"] == "None"
        assert handle["coords"].attrs["patch_size_level0"] == 512
    assert "512 px, the step between tiles" in " ".join(said["notes"])


def test_stamp_files_are_as_stamp_writes_them(peers, tmp_path):
    convert_features(peers.ours(tmp_path / "in", mpp=0.2527), "stamp", tmp_path)
    with h5py.File(tmp_path / f"{peers.SLIDE}.h5") as handle:
        assert (handle["feats"].dtype, handle["coords"].dtype) == (np.float16, np.float32)
        assert handle["feats"].chunks is None
        np.testing.assert_allclose(handle["coords"][:], peers.coords() * 0.2527, rtol=1e-6)
        attrs = dict(handle.attrs)
    assert attrs.pop("tile_size_um") == pytest.approx(512 * 0.2527)
    assert attrs == {"stamp_version": "2.1.0", "extractor": "uni2_h", "unit": "um", "tile_size_px": 256,
                     "code_hash": "morphome", "feat_type": "tile"}  # fmt: skip


def test_coordinates_far_out_survive_microns(peers, tmp_path):
    """float32 microns give the pixel again up to the largest slides."""
    places = np.random.default_rng(0).integers(0, 400_000, (12, 2))
    convert_features(peers.trident(tmp_path / "in", places=places), "stamp", tmp_path, mpp=0.1213)
    np.testing.assert_array_equal(read_bag(tmp_path / f"{peers.SLIDE}.h5", mpp=0.1213)[1], places)


def test_our_files_are_as_the_encode_step_writes_them(peers, tmp_path):
    convert_features(peers.trident(tmp_path / "in"), "morphome", tmp_path)
    path = tmp_path / f"{peers.SLIDE}.h5"
    with h5py.File(path) as handle:
        check_stamp(dict(handle.attrs), path, "morphome.tile-features")
        assert (handle["features"].dtype, handle["features"].chunks) == (np.float16, None)
        assert (handle["coords"].dtype, handle["coords"].chunks) == (np.int32, None)
        assert handle.attrs["status"] == "ok"
        assert handle["features"].attrs["encoder_fingerprint"] == "imported:trident:uni_v1:8"
        assert np.isnan(handle["coords"].attrs["mpp_level0_x"])
        key = handle.attrs["content_key"]
    before = path.read_bytes()
    convert_features(peers.trident(tmp_path / "in"), "morphome", tmp_path, overwrite=True)
    assert path.read_bytes() == before
    other = peers.trident(tmp_path / "in", values=peers.features(seed=1))
    convert_features(other, "morphome", tmp_path, overwrite=True)
    with h5py.File(path) as handle:
        assert handle.attrs["content_key"] != key


def test_files_of_ours_keep_their_fingerprint(peers, tmp_path):
    convert_features(peers.ours(tmp_path / "in"), "morphome", tmp_path)
    facts = inspect_bag(tmp_path / f"{peers.SLIDE}.h5")
    assert facts.fingerprint == "ab12cd34ef56"
    assert (facts.attrs["mpp_target"], facts.attrs["mask_sha256"], facts.overlap_px) == (0.5, "m", 0)


def test_a_folder_and_the_summary(peers, tmp_path):
    slides = ["c", "a", "b"]
    for i, slide in enumerate(slides):
        peers.trident(tmp_path / "in", slide, values=peers.features(4 + i, seed=i))
    peers.trident(tmp_path / "in", "empty", values=np.zeros((0, 8), np.float32), places=np.zeros((0, 2), int))
    said = convert_features(tmp_path / "in", "clam", tmp_path / "clam")  # features_uni_v1 below it is found
    assert said["n_files"] == 6
    assert (said["n_slides"], said["n_written"], said["n_empty"], said["n_tiles"]) == (4, 3, 1, 15)
    assert sorted(f.stem for f in (tmp_path / "clam" / "h5_files").iterdir()) == ["a", "b", "c"]
    assert "encoder" in said["lost"]
    said = convert_features(tmp_path / "in", "morphome", tmp_path / "ours")
    assert (said["n_written"], said["n_empty"]) == (4, 1)
    assert inspect_bag(tmp_path / "ours" / "empty.h5").n_tiles == 0


def test_a_packed_file_becomes_one_file_a_slide(peers, tmp_path):
    path = peers.packed(tmp_path / "bags.h5")
    said = convert_features(path, "npy", tmp_path / "npy")
    assert (said["n_written"], said["n_files"], said["n_tiles"]) == (3, 3, 12)
    with h5py.File(path) as handle:
        np.testing.assert_array_equal(np.load(tmp_path / "npy" / "b.npy"), handle["features"][3:7])
    said = convert_features(path, "clam", tmp_path / "clam")
    assert not (tmp_path / "clam" / "h5_files").exists()
    assert "only pt_files" in said["notes"][0]
    convert_features(path, "morphome", tmp_path / "ours")
    assert inspect_bag(tmp_path / "ours" / "a.h5").unit == "region"
    with pytest.raises(MorphomeError, match=r"'a': no_coords: .*needs coordinates"):
        convert_features(path, "trident", tmp_path / "t")


@pytest.mark.parametrize("name", ["../b", "/tmp/b", "..", ""])
def test_a_packed_file_names_no_place_outside_the_folder(peers, tmp_path, name):
    path = peers.packed(tmp_path / "bags.h5", slides=("a", name, "c"))
    with pytest.raises(MorphomeError, match="cannot be used as a file name"):
        convert_features(path, "npy", tmp_path / "out" / "deep")
    assert [p.name for p in tmp_path.rglob("*")] == ["bags.h5"]


def test_wsidata_stores_are_converted(peers, tmp_path):
    pytest.importorskip("zarr")
    path = peers.wsidata(tmp_path / "in", models=("uni", "conch"), shuffle=False)
    with pytest.raises(MorphomeError, match="several_encoders"):
        convert_features(path, "morphome", tmp_path / "out")
    convert_features(tmp_path / "in", "morphome", tmp_path / "out", dataset="uni")
    facts = inspect_bag(tmp_path / "out" / f"{peers.SLIDE}.h5")
    assert (facts.fingerprint, facts.mpp) == ("imported:lazyslide:uni:8", (0.25, 0.25))
    np.testing.assert_array_equal(facts.coords, peers.coords())


@pytest.mark.parametrize(("source", "layout", "words"), [
    ("trident", "stamp", "no_mpp.*--mpp"),
    ("stamp", "morphome", "no_mpp.*--mpp"),
    ("stamp", "clam", "no_mpp.*--mpp"),
])  # fmt: skip
def test_what_is_not_known_is_asked_for(peers, tmp_path, source, layout, words):
    path = getattr(peers, source)(tmp_path / "in")
    with pytest.raises(MorphomeError, match=words):
        convert_features(path, layout, tmp_path / "out")
    assert not list(tmp_path.glob("out/**/*.h5"))
    convert_features(path, layout, tmp_path / "out", mpp=0.25)


def test_the_resolution_may_come_from_a_run_of_ours(peers, tmp_path):
    path = peers.stamp(tmp_path / "in", mpp=0.5)
    peers.ours(tmp_path / "tiles", mpp=0.5)
    convert_features(path, "npy", tmp_path / "a", mpp=tmp_path / "tiles")
    np.testing.assert_array_equal(np.load(tmp_path / "a" / "coords" / f"{peers.SLIDE}.npy"), peers.coords())
    audit = pd.DataFrame({"slide_id": [peers.SLIDE, "x"], "mpp_x": [0.5, np.nan], "mpp_y": [0.5, np.nan]})
    write_parquet(audit, tmp_path / "audit.parquet", "morphome.slide_audit", {})
    convert_features(path, "npy", tmp_path / "b", mpp=tmp_path / "audit.parquet")
    np.testing.assert_array_equal(np.load(tmp_path / "b" / "coords" / f"{peers.SLIDE}.npy"), peers.coords())
    with pytest.raises(MorphomeError, match="no_mpp"):
        convert_features(peers.stamp(tmp_path / "x", "x"), "npy", tmp_path / "c", mpp=tmp_path / "audit.parquet")
    for wrong in (0, -1.0):
        with pytest.raises(MorphomeError, match="above zero"):
            convert_features(path, "npy", tmp_path / "d", mpp=wrong)


def test_nothing_is_replaced_in_silence(peers, tmp_path):
    path = peers.ours(tmp_path / "in")
    convert_features(path, "npy", tmp_path / "out")
    before = (tmp_path / "out" / f"{peers.SLIDE}.npy").stat().st_mtime_ns
    with pytest.raises(MorphomeError, match=r"exists already \(2 of 2 files\)"):
        convert_features(path, "npy", tmp_path / "out")
    assert (tmp_path / "out" / f"{peers.SLIDE}.npy").stat().st_mtime_ns == before
    convert_features(path, "npy", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / f"{peers.SLIDE}.npy").stat().st_mtime_ns > before
    with pytest.raises(MorphomeError, match="would replace a file that is read"):
        convert_features(path, "morphome", tmp_path / "in", overwrite=True)
    assert inspect_bag(path).n_tiles == 12


def test_mixtures_and_bad_files_are_refused_by_name(peers, tmp_path):
    peers.trident(tmp_path, "a", values=peers.features())
    peers.trident(tmp_path, "b", values=peers.features(dim=9))
    with pytest.raises(MorphomeError, match=r"more than one encoder: .*uni_v1:8: a; .*uni_v1:9: b"):
        convert_features(tmp_path, "npy", tmp_path / "out")
    large = np.full((12, 8), 7e4, np.float32)
    with pytest.raises(MorphomeError, match="'c': too_large: the value 70000"):
        convert_features(peers.trident(tmp_path / "x", "c", values=large), "morphome", tmp_path / "out")
    with pytest.raises(MorphomeError, match="'d': not_finite"):
        convert_features(peers.trident(tmp_path / "x", "d", values=large * np.nan), "npy", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not [f for f in (tmp_path / "out").rglob("*") if f.is_file()]
    with pytest.raises(MorphomeError, match=r"no layout 'slideflow'.*\n.*clam, trident"):
        convert_features(tmp_path, "slideflow", tmp_path / "out")
    with pytest.raises(MorphomeError, match="not found"):
        convert_features(tmp_path / "none", "npy", tmp_path / "out")
