"""Every real slide that stands beside the checkout gives tiles, or is refused for the right reason."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from morphome.files import read_json
from morphome.slides.tile import run_tile

DICOM = "dicom/CMU-1-Small-Region_jpeg/1.2.826.0.1.3680043.8.498."
REFUSED = {
    "broken/histolab_broken.svs": ("unreadable", "1001 bytes"),
    "broken/openslide_small_16x16.svs": ("no_tissue", "0 tiles"),
    "broken/openslide_unopenable.tiff": ("unreadable", "52479"),
    "broken/openslide_unreadable.svs": ("unreadable", "Bogus marker length"),
    DICOM + "35220404935377466417110411569853018212.dcm": ("unsupported_format", "YBR_FULL"),
    DICOM + "74255198296915566858533158243156409717.dcm": ("unsupported_format", "YBR_FULL"),
    DICOM + "86409284013638535769289481623834545874.dcm": ("unsupported_format", "YBR_FULL"),
    "dicom/cytomine_biopsy.dcm": ("too_coarse", "0.97119"),
    "dicom/google_j2k_camelyon.dcm": ("implausible_mpp", "28.96"),
    "dicom/google_jpeg_camelyon.dcm": ("implausible_mpp", "28.96"),
    "ndpi/test3-DAPI-2-(387).ndpi": ("not_brightfield", "dark"),
    "svs/TCGA-CR-7395-01A-01-TS1.svs": ("missing_mpp", "tiling.mpp_overrides"),
    "tiff/CMU-1-Small-Region.jpeg.tiff": ("implausible_mpp", "0.00499"),
    "tiff/XYC_jpeg.ome.tiff": ("missing_mpp", "tiling.mpp_overrides"),
    "tiff/slaid_patch_rgba_256.tif": ("missing_mpp", "slaid_patch_rgba_256"),
}
#: File, changes of the settings, least and most tiles, side in level-0 pixels, reader.
TILED = [
    ("svs/CMU-1-Small-Region.svs", {}, 30, 40, 257, "tiled_jpeg"),
    ("svs/TCGA-CR-7395-01A-01-TS1.svs", {"mpp_overrides": {"TCGA-CR-7395-01A-01-TS1": 0.25}}, 28, 42, 512, "openslide"),
    ("svs/TCGA-CR-7395-01A-01-TS1.svs", {"mpp_overrides": {"TCGA-CR-7395-01A-01-TS1": 0.5}}, 135, 170, 256,
     "openslide"),
    ("dicom/cytomine_biopsy.dcm", {"mpp_target": 1.0}, 105, 145, 264, "openslide"),
    ("tiff/CMU-1-Small-Region.jpeg.tiff", {"mpp_overrides": {"CMU-1-Small-Region.jpeg": 0.499}}, 30, 40, 257,
     "tiled_jpeg"),
    ("tiff/slaid_patch_rgba_256.tif", {"mpp_overrides": {"slaid_patch_rgba_256": 0.5}, "patch_px": 64,
                                       "min_fragment_mm2": 0.001}, 10, 16, 64, "openslide"),
]  # fmt: skip


@pytest.fixture
def tile(synthetic, tmp_path):
    def run(path: Path, **changes):
        defaults = {"patch_px": 256, "min_fragment_mm2": 0.05, "max_hole_mm2": 0.02}
        settings = {"tiling": synthetic.tiling(**{**defaults, **changes}), "slides": synthetic.SLIDES}
        ends = {"h5_out": ".h5", "qc_out": ".json", "geojson_out": ".geojson", "thumbnail_out": ".jpg"}
        outputs = {name: tmp_path / f"{path.stem}{end}" for name, end in ends.items()}
        run_tile(slide_path=path, slide_id=path.stem, settings=settings, **outputs)
        with h5py.File(outputs["h5_out"]) as handle:
            coords = handle["coords"][()]
        return read_json(outputs["qc_out"], "morphome.slide_qc", settings), coords

    return run


def test_every_real_slide_has_an_expectation(shared_data):
    """DICOM slides share folders and file suffixes vary: nothing may be left out here in silence."""
    known = set(REFUSED) | {name for name, *_ in TILED}
    assert {str(f.relative_to(shared_data / "wsi")) for f in (shared_data / "wsi").rglob("*.*") if f.is_file()} == known


@pytest.mark.parametrize("name", REFUSED)
def test_refused_for_the_right_reason(shared_data, tile, name):
    code, words = REFUSED[name]
    qc, coords = tile(shared_data / "wsi" / name)
    assert (qc["status"], qc["reason_code"]) == ("failed", code), qc["reason"]
    assert words in qc["reason"]
    assert len(coords) == 0


@pytest.mark.parametrize(("name", "changes", "least", "most", "side", "reader"), TILED)
def test_tiled(shared_data, tile, name, changes, least, most, side, reader):
    qc, coords = tile(shared_data / "wsi" / name, **changes)
    assert qc["status"] == "ok", qc["reason"]
    assert least <= len(coords) <= most
    assert (qc["side_x_px"], qc["side_y_px"]) == (side, side)
    assert abs(qc["deviation_pct"]) < 0.25
    assert qc["pen_fraction"] == 0
    assert qc["blood_fraction"] < 0.02
    assert qc["fold_fraction"] < 0.1
    assert (qc["reader"], bool(qc["reader_reason"])) == (reader, reader == "openslide")
    if reader == "tiled_jpeg":
        assert qc["parity_n"] > 8
        assert qc["parity_max_difference"] == 0
    assert (coords % side == 0).all()
    assert (coords + side <= [qc["width_px"], qc["height_px"]]).all()


def test_a_dicom_folder_is_one_slide(shared_data, tile, tmp_path):
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "image.dcm").symlink_to(shared_data / "wsi" / "dicom" / "cytomine_biopsy.dcm")
    qc, coords = tile(folder, mpp_target=1.0)
    assert (qc["status"], qc["vendor"]) == ("ok", "dicom")
    assert np.ptp(coords[:, 0]) > 8000


def test_an_image_that_openslide_refuses_is_tiled_by_libvips(shared_data, tile):
    """A test card of coloured squares in an OME-TIFF file, once its resolution is given; colour is all it takes."""
    path = shared_data / "wsi" / "tiff" / "XYC_jpeg.ome.tiff"
    qc, coords = tile(path, mpp_overrides={"XYC_jpeg.ome": 0.5}, patch_px=64)
    assert (qc["status"], qc["reader"], qc["vendor"]) == ("ok", "vips", "ome-tiff")
    assert "OpenSlide refuses" in qc["reader_reason"]
    assert qc["parity_max_difference"] is None
    assert len(coords) > 10


def test_a_mask_of_a_real_slide_comes_back_as_it_went(shared_data, tile, tmp_path):
    path = shared_data / "wsi" / "svs" / "CMU-1-Small-Region.svs"
    made, before = tile(path)
    again, after = tile(path, masks=str(tmp_path / f"{path.stem}.geojson"))
    assert (again["mask_source"], again["mask_sha256"]) == ("geojson", made["mask_sha256"])
    np.testing.assert_array_equal(before, after)
