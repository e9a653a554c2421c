"""One index over all slides, the audit, and the limit of failed slides."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from morphome.errors import MorphomeError
from morphome.features.collect import AUDIT_COLUMNS, run_collect
from morphome.features.store import BagStore
from morphome.files import read_parquet, stamp, write_json

ARCHIVE = Path(__file__).parents[1] / "data" / "archives" / "v1"
PRINT = "0123456789ab"


class Slides:
    """Writes what the tile and encode steps leave of a slide."""

    def __init__(self, folder: Path, tiling) -> None:
        self.folder, self.tiling, self.files = folder, tiling, {}

    def add(self, slide, *, tiles=3, failed=0, status="ok", code="", why="", qc=None, attrs=None, **features):
        """``qc`` and ``attrs`` are further entries of the quality record and of the feature file."""
        facts = {
            "status": status, "slide_id": slide, "reason_code": code, "reason": why, "vendor": "aperio",
            "width_px": 4000, "height_px": 3000, "mpp_target": 0.5, "mpp_x": 0.2527, "mpp_y": 0.25271234567890123,
            "mpp_source": "openslide", "all_sources": {"openslide": [0.2527, 0.25271234567890123]}, "flags": [],
            "verdict": "ok", "n_tiles": tiles, "tissue_mm2": 1.5, "n_dropped_pen": 2, "sharpness_median": None,
            "side_x_px": 443, "side_y_px": 443,
            **(qc or {}),
        }  # fmt: skip
        record, path = self.folder / f"{slide}.json", self.folder / f"{slide}.h5"
        write_json(facts, record, "morphome.slide_qc", {})
        with h5py.File(path, "w") as handle:
            handle.attrs.update(stamp("morphome.tile-features", {}))
            own = {"status": status, "slide_id": slide, "reason_code": code, "reason": why, "content_key": slide}
            counts = {"n_tiles_planned": tiles + failed, "n_tiles_failed": failed, "resize": "box", "dct_scale": 1}
            handle.attrs.update({**own, **counts, **(attrs or {})})
            handle["features"] = np.full((tiles, features.get("dim", 4)), ord(slide[0]), np.float16)
            mark = {"encoder": "toy", "encoder_fingerprint": PRINT}
            handle["features"].attrs.update({**mark, **{k: v for k, v in features.items() if k != "dim"}})
            handle["coords"] = np.arange(2 * tiles, dtype=np.int32).reshape(tiles, 2)
            handle["sharpness"] = np.arange(tiles, dtype=np.float32) * 10
        self.files[slide] = (path, record)

    def collect(self, slides=None, limit=0.5, qc=None):
        """``(index path, index, audit)`` of some slides."""
        slides = list(self.files) if slides is None else slides
        settings = {"slides": {"max_failed_fraction": limit}, "tiling": self.tiling, "features": {"encoder": "toy"}}
        index, audit = self.folder / "index.parquet", self.folder / "audit.parquet"
        run_collect(
            settings=settings, feature_files=[self.files[s][0] for s in slides],
            qc_files=[self.files[s][1] for s in (slides if qc is None else qc)], index_out=index, audit_out=audit,
        )  # fmt: skip
        return (
            index,
            read_parquet(index, "morphome.feature_index", settings),
            read_parquet(audit, "morphome.slide_audit", settings),
        )


@pytest.fixture
def slides(synthetic, tmp_path):
    made = Slides(tmp_path, synthetic.tiling(min_tiles=0))
    made.add("B", tiles=5, failed=2, qc={"flags": ["power_conflict", "anisotropic"], "verdict": "flag"})
    made.add("A")
    made.add("X", tiles=0, status="failed", code="unreadable", why="<html>404</html>", qc={"mpp_x": None})
    made.add("G", tiles=0)
    return made


def test_index_and_audit_have_a_row_per_slide(slides):
    path, index, audit = slides.collect(["X", "B", "G", "A"], qc=["A", "B", "G", "X"])
    assert index["slide_id"].tolist() == audit["slide_id"].tolist() == ["A", "B", "G", "X"]
    assert index["status"].tolist() == audit["status"].tolist() == ["ok", "ok", "empty", "failed"]
    assert index["reason_code"].tolist() == audit["reason_code"].tolist() == ["", "", "empty", "unreadable"]
    assert (index["dim"] == 4).all()
    assert (index["n_tiles"] == index["stop"] - index["start"]).all()
    assert index.attrs["fingerprint"] == index["fingerprint"][0] == audit["fingerprint"][0] == PRINT
    assert (index.attrs["encoder"], index.attrs["dim"]) == ("toy", 4)
    assert (index.attrs["n_slides"], index.attrs["n_ok"]) == (4, 2)
    features, places = BagStore(path).bag(["B", "A"])
    assert len(features) == 8
    assert set(places[:, 0]) == {0, 1}


def test_the_audit_holds_every_column_whatever_the_files_know(slides):
    _, _, audit = slides.collect()
    assert list(audit)[: len(AUDIT_COLUMNS)] == list(AUDIT_COLUMNS)
    assert audit["flags"].tolist() == ["", "power_conflict; anisotropic", "", ""]
    assert json.loads(audit["all_sources_json"][0]) == {"openslide": [0.2527, 0.25271234567890123]}
    assert audit["mpp_y"][0] == 0.25271234567890123
    assert audit["mpp_x"].isna().tolist() == [False, False, False, True]
    assert audit["n_tiles_planned"].tolist() == [3, 7, 0, 0]
    assert audit["n_tiles"].tolist() == [3, 5, 0, 0]
    assert audit["n_tiles_failed"].tolist() == [0, 2, 0, 0]
    assert audit.loc[1, ["sharpness_p05", "sharpness_median", "sharpness_p95"]].tolist() == [2, 20, 38]
    assert audit["sharpness_median"][2:].isna().all()
    for unknown in ("reader", "fold_fraction", "parity_n", "mask_source", "resolution_unit", "deviation_x_pct"):
        assert audit[unknown].isna().all()


def test_reader_parity_and_quality_come_from_both_steps(slides):
    qc = {
        "reader": "openslide", "reader_reason": "asked for", "parity_n": 8, "parity_max_difference": 0,
        "mask_source": "geojson", "fold_fraction": 0.01, "blood_fraction": 0.25, "level_downsamples": [1.0, 2.001],
        "resolution_unit": "inch", "all_sources": {}, "site_of_scanning": "basement",
    }  # fmt: skip
    slides.add("R", qc=qc, attrs={"reader": "tiled_jpeg", "reader_reason": "", "dct_scale": 2})
    slides.add("Q", tiles=0, status="failed", code="no_tissue", qc=qc, attrs={"reader": "none", "dct_scale": 1})
    _, _, audit = slides.collect()
    audit = audit.set_index("slide_id")
    read, lost = audit.loc["R"], audit.loc["Q"]
    # The features were made by the encode step's reader; a slide without tiles has only the tile step's.
    assert (read["reader"], read["reader_reason"], read["dct_scale"]) == ("tiled_jpeg", "", 2)
    assert (lost["reader"], lost["reader_reason"]) == ("openslide", "asked for")
    assert (read["parity_n"], read["parity_max_difference"], read["mask_source"]) == (8, 0, "geojson")
    assert (read["fold_fraction"], read["blood_fraction"]) == (0.01, 0.25)
    assert read["level_downsamples"] == "1.0; 2.001"
    assert read["resolution_unit"] == "inch"
    assert pd.isna(read["all_sources_json"])
    # What the contract does not know is kept too.
    assert read["site_of_scanning"] == "basement" and pd.isna(audit.loc["A", "site_of_scanning"])


def test_no_slide_gives_an_empty_audit_with_its_columns(slides):
    _, index, audit = slides.collect([])
    assert len(index) == len(audit) == 0
    assert list(audit) == list(AUDIT_COLUMNS)


def test_mixed_features_are_refused_with_counts_and_names(slides, tmp_path):
    slides.add("C", encoder_fingerprint="ffffffffffff", encoder="other")
    with pytest.raises(MorphomeError) as caught:
        slides.collect()
    assert "more than one fingerprint" in str(caught.value)
    assert f"{PRINT} (toy) in 4 of 5 slides\n" in str(caught.value)
    assert "ffffffffffff (other) in 1 of 5 slides: C" in str(caught.value)
    assert not list(tmp_path.glob("*.parquet"))
    for number in range(12):
        slides.add(f"D{number:02}", encoder_fingerprint="eeeeeeeeeeee")
    with pytest.raises(MorphomeError, match=r"0123456789ab \(toy\) in 4 of 17 slides: A, B, G, X\n.* in 1 of 17"):
        slides.collect()
    for number in range(12):
        slides.add(f"E{number:02}", encoder_fingerprint="dddddddddddd")
    with pytest.raises(MorphomeError) as caught:
        slides.collect()
    # Of two groups of one size neither is the odd one.
    assert "slides: D00, D01, D02, D03, D04, D05, D06, D07, D08, D09 and 2 more" in str(caught.value)
    assert "slides: E00, E01" in str(caught.value)


def test_mixed_dimensions_are_refused(slides):
    slides.add("C", dim=8)
    with pytest.raises(MorphomeError, match=r"more than one dim(.|\n)*8 \(toy\) in 1 of 5 slides: C"):
        slides.collect()


def test_too_many_failed_slides_stop_the_run_and_write_nothing(slides, tmp_path):
    with pytest.raises(MorphomeError, match=r"1 of 3 slides failed.*\n.*X: unreadable") as caught:
        slides.collect(["A", "B", "X"], limit=0.3)
    assert "max_failed_fraction" in str(caught.value)
    assert not list(tmp_path.glob("*.parquet"))
    slides.collect(["A", "B", "X"], limit=1 / 3)


def test_slides_are_joined_by_id(slides):
    with pytest.raises(MorphomeError, match="A, B"):
        slides.collect(["A"], qc=["B"])
    with pytest.raises(MorphomeError, match="two feature files"):
        slides.collect(["A", "A"], qc=["A"])
    with pytest.raises(MorphomeError, match="two quality records"):
        slides.collect(["A"], qc=["A", "A"])


def test_files_of_the_first_version_are_still_collected(slides):
    slide = next((ARCHIVE / "features").glob("*.h5")).stem
    slides.files = {slide: (ARCHIVE / "features" / f"{slide}.h5", ARCHIVE / "tiles" / f"{slide}.json")}
    _, index, audit = slides.collect()
    before = read_parquet(ARCHIVE / "features" / "audit.parquet", "morphome.slide_audit").set_index("slide_id")
    assert index["n_tiles"].tolist() == [21]
    for column in ("mpp_x", "mpp_effective", "sharpness_median", "sharpness_p05", "n_tiles_planned", "mask_sha256"):
        assert audit[column][0] == before.loc[slide, column]
    assert audit["reader"].tolist() == ["openslide"]
    for column in ("reader_reason", "fold_fraction", "parity_n", "deviation_x_pct", "mask_source", "resolution_unit"):
        assert audit[column].isna().all()
