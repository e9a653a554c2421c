"""Features made elsewhere: the layouts of several tools, and what is wrong with some files."""

from __future__ import annotations

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from morphome.errors import MorphomeError
from morphome.features.external import run_import
from morphome.features.store import BagStore
from morphome.files import read_parquet, write_parquet

SLIDES = ["TCGA-AA-0001-01Z-00-DX1.ABC", "TCGA-AA-0002-01Z-00-DX1.DEF", "TCGA-AA-0002-01Z-00-DX2.svsv"]


def features(n=5, dim=8, seed=0):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


def coords(n=5):
    return np.column_stack([np.arange(n) * 256, np.full(n, 512)])


def write_h5(path, attrs=None, data_attrs=None, **data):
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as handle:
        for name, value in data.items():
            handle[name.replace("__", "/")] = value
        handle.attrs.update(attrs or {})
        for name, value in (data_attrs or {}).items():
            handle["features"].attrs[name] = value
    return path


@pytest.fixture
def imported(tmp_path):
    """Run the import for slides of a cohort; index, audit and a store."""

    def run(path, slides=SLIDES, limit=0.0, excluded=(), **more):
        table = pd.DataFrame({"slide_id": slides, "patient_id": [s[:12] for s in slides], "path": ""})
        table["included"] = ~table["slide_id"].isin(excluded)
        write_parquet(table, tmp_path / "slides.parquet", "morphome.slides", {})
        features = {"source": "external", "path": str(path), **more}
        settings = {"slides": {"max_failed_fraction": limit}, "features": features}
        outputs = {"index_out": tmp_path / "index.parquet", "audit_out": tmp_path / "audit.parquet"}
        run_import(settings=settings, slides=tmp_path / "slides.parquet", **outputs)
        index = read_parquet(outputs["index_out"], "morphome.feature_index", settings)
        audit = read_parquet(outputs["audit_out"], "morphome.slide_audit", settings)
        return index.set_index("slide_id"), audit, BagStore(outputs["index_out"])

    return run


def packed(path, lengths=(3, 4, 5), slides=SLIDES, **changes):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    data = {
        "features": features(int(offsets[-1])).astype(np.float16), "offsets": offsets,
        "slide_id": np.array(slides, "S60"), "case_id": np.array([s[:12] for s in slides], "S12"),
    }  # fmt: skip
    return write_h5(path, attrs={"encoder": "hipt"}, **{**data, **changes})


def test_a_packed_file(imported, tmp_path):
    path = packed(tmp_path / "bags.h5")
    index, audit, store = imported(path)
    assert index["status"].tolist() == ["ok"] * 3
    assert index["layout"].tolist() == ["packed_h5"] * 3
    assert index["n_tiles"].tolist() == [3, 4, 5]
    assert set(index["fingerprint"]) == {"imported:packed:hipt:8"}
    assert not index["has_coords"].any()
    assert list(audit) == ["slide_id", "n_tiles", "status", "reason_code", "reason"]
    bag, places = store.bag(SLIDES[1:])
    np.testing.assert_array_equal(bag, features(12).astype(np.float16)[3:].astype(np.float32))
    assert not store.has_coords
    assert places[:, 1:].max() == 0


def test_endings_of_ids_are_cut_as_endings(imported, tmp_path):
    """Stripping the characters of ".svs" would eat the id that ends in "svsv"."""
    index, *_ = imported(packed(tmp_path / "bags.h5", slide_id=np.array([f"{s}.svs" for s in SLIDES], "S70")))
    assert (index["status"] == "ok").all()


def test_slides_without_features_are_listed_and_others_counted(imported, tmp_path):
    other = [SLIDES[0], "TCGA-ZZ-0009-01Z-00-DX1.XYZ", SLIDES[2]]
    index, _, _ = imported(packed(tmp_path / "bags.h5", slides=other))
    assert index.loc[SLIDES[1], ["status", "reason_code"]].tolist() == ["failed", "no_features"]
    assert index.attrs["n_without_features"] == 1
    assert index.attrs["n_unused"] == 1
    index, *_ = imported(packed(tmp_path / "bags2.h5"), excluded=[SLIDES[0]])
    assert SLIDES[0] not in index.index


@pytest.mark.parametrize(("changes", "words"), [
    ({"offsets": np.array([0, 3, 12])}, "do not cut"),
    ({"offsets": np.array([0, 5, 3, 12])}, "do not cut"),
    ({"slide_id": np.array([SLIDES[0]] * 3, "S60")}, "occurs twice"),
    ({"case_id": np.array(["TCGA-BB-0001"] * 3, "S12")}, "belongs to 'TCGA-BB-0001'"),
    ({"slide_id": np.array(["a", "b", "c"], "S60"), "case_id": np.array(["a", "b", "c"], "S12")}, "none of its 3"),
])  # fmt: skip
def test_a_packed_file_that_does_not_fit_is_refused(imported, tmp_path, changes, words):
    with pytest.raises(MorphomeError, match=words):
        imported(packed(tmp_path / "bags.h5", **changes))


def test_other_files_are_refused_by_name(imported, tmp_path):
    with pytest.raises(MorphomeError, match="no dataset 'offsets'"):
        imported(write_h5(tmp_path / "one.h5", features=features()))
    with pytest.raises(MorphomeError, match="not found"):
        imported(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(MorphomeError, match="HDF5"):
        imported(tmp_path / "text.h5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MorphomeError, match=r"no \.h5, \.pt"):
        imported(tmp_path / "empty")


#: Writer in peer_files, its arguments, fingerprint, and whether level-0 coordinates are known without more.
FOLDERS = {
    "clam": ({}, "imported:clam:unknown:8", True),
    "trident": ({}, "imported:trident:uni_v1:8", True),
    "stamp": ({}, "imported:stamp:uni2:8", False),
    "atlaspatch": ({}, "imported:atlaspatch:uni_v2:8", True),
    "slide2vec": ({}, "imported:slide2vec:virchow2:8", True),
    "npy": ({"with_coords": False}, "imported:npy:unknown:8", False),
    "wsidata": ({"shuffle": False}, "imported:lazyslide:uni:8", True),
    "ours": ({}, "ab12cd34ef56", True),
}


@pytest.mark.parametrize("writer", FOLDERS)
def test_folders_of_each_tool(imported, peers, tmp_path, writer):
    """The folder that the tool made may be named, or the one below it that holds the files."""
    if writer == "wsidata":
        pytest.importorskip("zarr")
    changes, fingerprint, has_coords = FOLDERS[writer]
    for slide in SLIDES:
        getattr(peers, writer)(tmp_path / "f", slide, **changes)
    index, _, store = imported(tmp_path / "f")
    assert (index["status"] == "ok").all(), index["reason"].tolist()
    assert (index["dim"] == 8).all()
    assert set(index["fingerprint"]) == {fingerprint}
    assert index["has_coords"].all() == has_coords
    bag, places = store.bag(SLIDES[:1])
    assert bag.shape == (12, 8)
    assert np.abs(bag - peers.features()).max() < 0.002
    np.testing.assert_array_equal(places[:, 1:], peers.coords() if has_coords else np.zeros((12, 2)))


def test_trap_9_slides_of_a_patient_are_joined_by_id(imported, peers, tmp_path):
    for seed, slide in [(1, SLIDES[2]), (2, SLIDES[1])]:
        peers.trident(tmp_path, slide, values=peers.features(seed=seed))
    *_, store = imported(tmp_path, slides=SLIDES[1:])
    bag, places = store.bag([SLIDES[2], SLIDES[1]])
    np.testing.assert_array_equal(bag, np.concatenate([peers.features(seed=2), peers.features(seed=1)]))
    np.testing.assert_array_equal(places[:, 0], [0] * 12 + [1] * 12)


def test_old_trident_files(imported, tmp_path):
    for slide in SLIDES:
        write_h5(tmp_path / "f" / f"{slide}.h5", features=features()[None], coords=coords().astype(np.int32))
    _, _, store = imported(tmp_path / "f")
    bag, places = store.bag(SLIDES[:1])
    np.testing.assert_array_equal(bag, features())
    np.testing.assert_array_equal(places[:, 1:], coords())


def test_one_of_several_encoders_is_chosen(imported, peers, tmp_path):
    for slide in SLIDES:
        peers.atlaspatch(tmp_path, slide, encoders=("uni_v2", "conch_v15"))
    with pytest.raises(MorphomeError, match=r"several_encoders.*features\.dataset"):
        imported(tmp_path)
    index, _, store = imported(tmp_path, dataset="conch_v15")
    assert set(index["fingerprint"]) == {"imported:atlaspatch:conch_v15:8"}
    np.testing.assert_array_equal(store.bag(SLIDES[:1])[0], peers.features(seed=1))


def test_microns_become_pixels_where_the_resolution_is_known(imported, peers, tmp_path):
    for slide, mpp in zip(SLIDES, (0.25, 0.5, 0.2527), strict=True):
        peers.stamp(tmp_path / "stamp", slide, mpp=mpp)
        peers.ours(tmp_path / "tiles", slide, mpp=mpp)
    index, _, store = imported(tmp_path / "stamp", mpp=str(tmp_path / "tiles"))
    assert store.has_coords
    assert index["mpp_x"].tolist() == [0.25, 0.5, 0.2527]
    for slide in SLIDES:
        np.testing.assert_array_equal(store.bag([slide])[1][:, 1:], peers.coords())
    *_, store = imported(tmp_path / "stamp", mpp=0.25)
    np.testing.assert_array_equal(store.bag(SLIDES[1:2])[1][:, 1:], peers.coords() * 2)


def test_the_unit_of_the_vectors_is_stated(imported, peers, tmp_path):
    path = packed(tmp_path / "bags.h5")
    assert imported(path)[0].attrs["unit"] == "region"
    for slide in SLIDES:
        peers.trident(tmp_path, slide)
    assert imported(tmp_path / "features_uni_v1")[0].attrs["unit"] == "tile"


def test_folders_of_pt_files(imported, tmp_path):
    folder = tmp_path / "pt"
    folder.mkdir()
    torch.save(torch.from_numpy(features()), folder / f"{SLIDES[0]}.pt")
    torch.save(torch.from_numpy(features()[None]), folder / f"{SLIDES[1]}.pt")
    torch.save(
        {"features": torch.from_numpy(features()), "coords": torch.from_numpy(coords())}, folder / f"{SLIDES[2]}.pt"
    )
    index, _, store = imported(folder)
    assert index["layout"].tolist() == ["pt"] * 3
    assert index["has_coords"].tolist() == [False, False, True]
    for slide in SLIDES:
        np.testing.assert_array_equal(store.bag([slide])[0], features())


class Evil:
    def __reduce__(self):
        return (print, ("code was run",))


BAD = {
    "not_finite": lambda p: write_h5(p, features=np.where(np.arange(40).reshape(5, 8) == 9, np.nan, 1.0)),
    "unequal_length": lambda p: write_h5(p, features=features(), coords=coords(4)),
    "duplicate_coords": lambda p: write_h5(p, features=features(), coords=np.zeros((5, 2), int)),
    "bad_coords": lambda p: write_h5(p, features=features(), coords=np.full((5, 2), np.nan)),
    "not_a_bag": lambda p: write_h5(p, features=features()[0]),
    "no_features": lambda p: write_h5(p, coords=coords()),
    "several_encoders": lambda p: write_h5(p, features__a=features(), features__b=features()),
    "unreadable": lambda p: p.write_bytes(b"<html>"),
}


@pytest.mark.parametrize("code", BAD)
def test_a_file_that_cannot_be_used_says_why(imported, tmp_path, code):
    for slide in SLIDES:
        write_h5(tmp_path / "f" / f"{slide}.h5", features=features(), coords=coords())
    BAD[code](tmp_path / "f" / f"{SLIDES[1]}.h5")
    index, audit, _ = imported(tmp_path / "f", limit=0.4)
    assert index.loc[SLIDES[1], ["status", "reason_code"]].tolist() == ["failed", code]
    assert SLIDES[1] in index.loc[SLIDES[1], "reason"]
    assert audit["status"].tolist() == ["ok", "failed", "ok"]
    with pytest.raises(MorphomeError, match=code):
        imported(tmp_path / "f", limit=0.3)


def test_stamp_slide_features_are_no_bag(imported, tmp_path):
    for slide in SLIDES:
        write_h5(tmp_path / "f" / f"{slide}.h5", feats=features(), attrs={"feat_type": "slide"})
    with pytest.raises(MorphomeError, match="slide-level"):
        imported(tmp_path / "f")


def test_pt_files_run_no_code(imported, tmp_path, capsys):
    (tmp_path / "pt").mkdir()
    for slide in SLIDES:
        torch.save(torch.from_numpy(features()), tmp_path / "pt" / f"{slide}.pt")
    torch.save(Evil(), tmp_path / "pt" / f"{SLIDES[0]}.pt")
    index, *_ = imported(tmp_path / "pt", limit=0.5)
    assert index.loc[SLIDES[0], "reason_code"] == "unreadable"
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"\x80\x02\x80", b"\x80\x02j\x00\x00\x00\x00.", b"X\x01\x00\x00\x00\xff", b"."]
)
def test_garbage_in_a_pt_file_fails_the_slide_without_unsafe_advice(imported, tmp_path, content):
    (tmp_path / "pt").mkdir()
    for slide in SLIDES[1:]:
        torch.save(torch.from_numpy(features()), tmp_path / "pt" / f"{slide}.pt")
    (tmp_path / "pt" / f"{SLIDES[0]}.pt").write_bytes(content)
    index, *_ = imported(tmp_path / "pt", limit=0.5)
    assert index.loc[SLIDES[0], "reason_code"] == "unreadable"
    assert "damaged" in index.loc[SLIDES[0], "reason"] and "weights_only" not in index.loc[SLIDES[0], "reason"]


def test_mixed_features_are_refused(imported, tmp_path):
    for i, slide in enumerate(SLIDES):
        write_h5(tmp_path / "f" / f"{slide}.h5", features=features(dim=8 if i else 16))
    with pytest.raises(MorphomeError, match=f"more than one dim: 8 .2 slides., 16 .1 slide.; .*{SLIDES[0]}"):
        imported(tmp_path / "f")
    for slide, encoder in zip(SLIDES, "aab", strict=True):
        write_h5(tmp_path / "f" / f"{slide}.h5", features=features(), data_attrs={"encoder": encoder})
    with pytest.raises(MorphomeError, match="more than one fingerprint"):
        imported(tmp_path / "f")


def test_two_files_of_a_slide_are_refused(imported, tmp_path):
    write_h5(tmp_path / "f" / f"{SLIDES[0]}.h5", features=features())
    torch.save(torch.zeros(5, 8), tmp_path / "f" / f"{SLIDES[0]}.pt")
    with pytest.raises(MorphomeError, match="two files"):
        imported(tmp_path / "f")


def test_an_empty_bag_is_empty_and_not_failed(imported, tmp_path):
    for slide in SLIDES[:2]:
        write_h5(tmp_path / "f" / f"{slide}.h5", features=features())
    write_h5(tmp_path / "f" / f"{SLIDES[2]}.h5", features=np.zeros((0, 8), np.float32), coords=np.zeros((0, 2)))
    index, *_ = imported(tmp_path / "f")
    assert index["status"].tolist() == ["ok", "ok", "empty"]


@pytest.mark.parametrize(("cohort", "n_slides", "n_vectors"), [("hnsc", 418, 15_899), ("gbmlgg", 907, 31_367)])
def test_real_bags(imported, shared_data, cohort, n_slides, n_vectors):
    path = shared_data / "bags" / f"tcga_{cohort}.h5"
    with h5py.File(path) as handle:
        slides = handle["slide_id"].asstr()[()].tolist()
        some = handle["features"][handle["offsets"][1] : handle["offsets"][2]].astype(np.float32)
    index, _, store = imported(path, slides=[*slides, "TCGA-XX-0000-01Z-00-DX1"])
    assert (len(index), int((index["status"] == "ok").sum())) == (n_slides + 1, n_slides)
    assert index["n_tiles"].sum() == n_vectors
    assert index.attrs["dim"] == 192
    np.testing.assert_array_equal(store.bag([slides[1]])[0], some)


def test_real_pt_files_equal_the_packed_bags(imported, shared_data):
    """The float32 originals of ten BLCA bags, rounded to float16, equal the packed file bit for bit."""
    files = sorted((shared_data / "bags" / "pt_sample").glob("*.pt"))
    ids = [f.name[: -len(".pt")] for f in files]
    _, _, originals = imported(shared_data / "bags" / "pt_sample", slides=ids)
    found = {slide: originals.bag([slide])[0] for slide in ids}
    _, _, rounded = imported(shared_data / "bags" / "tcga_blca.h5", slides=ids)
    assert len(ids) == 10
    for slide in ids:
        np.testing.assert_array_equal(found[slide].astype(np.float16), rounded.bag([slide])[0].astype(np.float16))
