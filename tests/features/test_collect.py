"""One index over all slides, the audit, and the limit of failed slides."""

from __future__ import annotations

import numpy as np
import pytest

from morphome.errors import MorphomeError
from morphome.features.collect import run_collect
from morphome.features.encode import run_encode
from morphome.features.store import BagStore
from morphome.files import read_parquet
from morphome.slides.tile import run_tile


@pytest.fixture(scope="module")
def encoded(synthetic, painted, tmp_path_factory):
    """Three encoded slides (one failed, one empty would need other settings): files by slide id."""
    folder = tmp_path_factory.mktemp("encoded")
    good = synthetic.write_tiff(folder / "good.tif", painted)
    other = synthetic.write_tiff(folder / "other.tif", synthetic.paint(seed=9))
    bad = folder / "bad.svs"
    bad.write_bytes(b"<html>404</html>")
    glass = synthetic.write_tiff(folder / "glass.tif", np.full((400, 400, 3), 243, np.uint8))
    files = {}
    for slide, path in (("B", good), ("A", other), ("X", bad), ("G", glass)):
        settings = {"tiling": synthetic.tiling(min_tiles=0)}
        names = {"h5_out": ".tiles.h5", "qc_out": ".qc.json", "geojson_out": ".geojson", "thumbnail_out": ".jpg"}
        outputs = {key: folder / f"{slide}{end}" for key, end in names.items()}
        run_tile(slide_path=path, slide_id=slide, settings=settings, **outputs)
        files[slide] = (folder / f"{slide}.h5", outputs["qc_out"])
        run_encode(
            slide_path=path, slide_id=slide, tiles_h5=outputs["h5_out"], h5_out=files[slide][0],
            settings={**settings, "features": synthetic.FEATURES}, timing_out=folder / f"{slide}.json",
        )  # fmt: skip
    return files


@pytest.fixture
def collect(synthetic, encoded, tmp_path):
    def run(slides, limit=0.5, qc=None):
        settings = {
            "slides": {"max_failed_fraction": limit},
            "tiling": synthetic.tiling(min_tiles=0),
            "features": synthetic.FEATURES,
        }
        index, audit = tmp_path / "index.parquet", tmp_path / "audit.parquet"
        run_collect(
            settings=settings, feature_files=[encoded[s][0] for s in slides],
            qc_files=[encoded[s][1] for s in (slides if qc is None else qc)], index_out=index, audit_out=audit,
        )  # fmt: skip
        return (
            index,
            read_parquet(index, "morphome.feature_index", settings),
            read_parquet(audit, "morphome.slide_audit", settings),
        )

    return run


def test_index_and_audit_have_a_row_per_slide(collect, encoded):
    path, index, audit = collect(["X", "B", "G", "A"], qc=["A", "B", "G", "X"])
    assert index["slide_id"].tolist() == audit["slide_id"].tolist() == ["A", "B", "G", "X"]
    assert index["status"].tolist() == audit["status"].tolist() == ["ok", "ok", "empty", "failed"]
    assert index["reason_code"].tolist() == ["", "", "empty", "unreadable"]
    assert (index["dim"] == 64).all()
    assert index["fingerprint"].nunique() == 1
    assert (index["n_tiles"] == index["stop"] - index["start"]).all()
    assert index.attrs["fingerprint"] == index["fingerprint"][0]
    assert (index.attrs["encoder"], index.attrs["dim"]) == ("stain_texture", 64)
    assert (index.attrs["n_slides"], index.attrs["n_ok"]) == (4, 2)
    assert (audit["sharpness_median"][:2] > 0).all()
    assert audit["sharpness_median"][2:].isna().all()
    assert audit["n_tiles"].tolist() == index["n_tiles"].tolist()
    for column in ("mpp_x", "mpp_source", "verdict", "flags", "tissue_mm2", "n_dropped_pen", "all_sources"):
        assert column in audit
    assert audit["flags"][0] == "power_conflict"
    assert audit["all_sources"][0] == "openslide=0.5x0.5; tiff_resolution=0.5x0.5"
    features, places = BagStore(path).bag(["B", "A"])
    assert len(features) == index["n_tiles"][:2].sum()
    assert set(places[:, 0]) == {0, 1}


def test_too_many_failed_slides_stop_the_run_and_write_nothing(collect, tmp_path):
    with pytest.raises(MorphomeError, match=r"1 of 3 slides failed.*\n.*X: unreadable") as caught:
        collect(["A", "B", "X"], limit=0.3)
    assert "max_failed_fraction" in str(caught.value)
    assert not list(tmp_path.glob("*.parquet"))
    collect(["A", "B", "X"], limit=1 / 3)


def test_slides_are_joined_by_id(collect):
    with pytest.raises(MorphomeError, match="A, B"):
        collect(["A"], qc=["B"])
    with pytest.raises(MorphomeError, match="two feature files"):
        collect(["A", "A"], qc=["A"])
    with pytest.raises(MorphomeError, match="two quality records"):
        collect(["A"], qc=["A", "A"])
