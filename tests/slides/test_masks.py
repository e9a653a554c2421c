"""Masks out to GeoJSON and back in, as QuPath writes and reads them."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from shapely.geometry import mapping, shape

from morphome.files import read_json
from morphome.slides.masks import outline, rasterise, read_mask, to_geojson
from morphome.slides.reader import SlideError
from morphome.slides.tile import run_tile

SQUARE = [[100, 100], [500, 100], [500, 400], [100, 400], [100, 100]]
HOLE = [[200, 200], [300, 200], [300, 300], [200, 300], [200, 200]]


def speckled(seed, height=60, width=80, sigma=2.0):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(height, width)), sigma)
    return noise > noise.std() * 0.2


def feature(geometry, name=None, **properties):
    classification = {} if name is None else {"classification": {"name": name, "color": [200, 0, 0]}}
    return {"type": "Feature", "geometry": geometry, "properties": {**classification, **properties}}


def polygon(*rings):
    return {"type": "Polygon", "coordinates": list(rings)}


@pytest.fixture
def read(tmp_path):
    """Mask of a GeoJSON content on a slide of 800 x 600 px with mask pixels of 10 px; tissue was made at the left."""
    made = np.zeros((60, 80), bool)
    made[:, :30] = True

    def run(content):
        path = tmp_path / "S.geojson"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return read_mask(path, made, 800, 600)

    run.made = made
    return run


def box(x0, y0, x1, y1):
    mask = np.zeros((60, 80), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_polygons_follow_the_mask_with_its_holes():
    mask = np.zeros((80, 120), bool)
    y, x = np.mgrid[:80, :120]
    mask[(x - 40) ** 2 + (y - 40) ** 2 < 30**2] = True
    mask[(x - 40) ** 2 + (y - 40) ** 2 < 10**2] = False
    mask[10:30, 90:110] = True
    polygons = outline(mask, 1200, 800)
    assert [len(p.interiors) for p in polygons] == [1, 0]
    assert polygons[0].area > polygons[1].area
    assert all(p.is_valid for p in polygons)
    assert sum(p.area for p in polygons) == pytest.approx(100 * mask.sum(), rel=0.01)
    assert polygons[1].bounds == (900, 100, 1100, 300)
    assert not shapely.contains_xy(polygons[0], 405, 405)
    assert outline(np.zeros((20, 30), bool), 300, 200) == []


def test_geojson_is_what_qupath_reads():
    mask = np.zeros((20, 20), bool)
    mask[5:15, 4:16] = True
    content = to_geojson(outline(mask, 200, 200))
    assert content["type"] == "FeatureCollection"
    found = content["features"][0]
    assert found["type"] == "Feature"
    assert found["properties"]["objectType"] == "annotation"
    assert found["properties"]["classification"]["name"] == "Tissue"
    assert shape(found["geometry"]).area == 12_000


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), sigma=st.floats(0.4, 4), width_px=st.integers(300, 40_000))
def test_a_mask_written_and_read_back_is_the_same_mask(tmp_path_factory, seed, sigma, width_px):
    mask = speckled(seed, sigma=sigma)
    height_px = round(width_px * 0.75) + seed % 7  # mask pixels need not be square
    path = tmp_path_factory.mktemp("masks") / "S.geojson"
    path.write_text(json.dumps(to_geojson(outline(mask, width_px, height_px))))
    np.testing.assert_array_equal(read_mask(path, ~mask, width_px, height_px), mask)


@given(points=st.lists(st.tuples(st.floats(-5, 25), st.floats(-5, 18)), min_size=3, max_size=9))
@settings(max_examples=60, deadline=None)
def test_pixels_are_those_whose_centre_lies_inside(points):
    drawn = shapely.make_valid(shapely.Polygon(points))
    drawn = shapely.union_all([p for p in shapely.get_parts(drawn) if "Polygon" in p.geom_type])
    found = rasterise(drawn, 14, 20)
    if drawn.is_empty:
        assert not found.any()
        return
    x, y = np.meshgrid(np.arange(20) + 0.5, np.arange(14) + 0.5)
    inside = shapely.contains_xy(drawn, x, y)
    # On the border itself either answer is right.
    with np.errstate(divide="ignore"):
        clear = shapely.distance(shapely.boundary(drawn), shapely.points(x, y)) > 1e-9
    np.testing.assert_array_equal(found[clear], inside[clear])


QUPATH = {  # as QuPath 0.5 exports: a collection, or a list of features where "FeatureCollection" is unticked
    "collection": {
        "type": "FeatureCollection",
        "features": [feature(polygon(SQUARE), "Tissue", objectType="annotation")],
    },
    "list": [feature(polygon(SQUARE), objectType="annotation", isLocked=False)],
    "feature": feature(polygon(SQUARE), "Tumor"),
    "geometry": polygon(SQUARE),
    "geometries": [polygon(SQUARE)],
    "multi": {"type": "MultiPolygon", "coordinates": [[SQUARE]]},
    "nested": {"type": "GeometryCollection", "geometries": [polygon(SQUARE), {"type": "Point", "coordinates": [1, 2]}]},
    "derived class": feature(polygon(SQUARE), classification={"names": ["Tumor", "Positive"]}),
    "old colour": feature(polygon(SQUARE), classification={"name": "Stroma", "colorRGB": -3140401}),
    "three numbers": polygon([[x, y, 0] for x, y in SQUARE]),
    "open ring": polygon(SQUARE[:-1]),
    "cells too": [feature(polygon(SQUARE)), feature(polygon([[0, 0], [9, 0], [9, 9], [0, 0]]), objectType="cell")],
    "twice": [polygon(SQUARE), polygon(SQUARE)],
}  # fmt: skip


@pytest.mark.parametrize("form", QUPATH)
def test_every_form_of_the_file_is_read(read, form):
    np.testing.assert_array_equal(read(QUPATH[form]), box(10, 10, 50, 40))


def test_a_byte_order_mark_is_no_obstacle(read):
    np.testing.assert_array_equal(read("\ufeff" + json.dumps(polygon(SQUARE))), box(10, 10, 50, 40))


def test_holes_and_excluded_areas_are_no_tissue(read):
    expected = box(10, 10, 50, 40) & ~box(20, 20, 30, 30)
    np.testing.assert_array_equal(read(polygon(SQUARE, HOLE)), expected)
    for name in ("Ignore*", "Exclude", "artefact", "PEN", "Background", "Ignore pen", "Tissue: Ignore", "ignore_2"):
        both = [feature(polygon(HOLE), name), feature(polygon(SQUARE), "Tumor")]
        np.testing.assert_array_equal(read(both), expected)


def test_a_file_with_excluded_areas_only_corrects_the_mask_that_was_made(read):
    np.testing.assert_array_equal(read(feature(polygon(HOLE), "Ignore*")), read.made & ~box(20, 20, 30, 30))


def test_frames_are_no_tissue_and_an_empty_list_is_a_slide_without_any(read):
    frame = feature(polygon([[0, 0], [800, 0], [800, 600], [0, 600], [0, 0]]), "Region*")
    np.testing.assert_array_equal(read([frame, polygon(SQUARE)]), box(10, 10, 50, 40))
    assert not read({"type": "FeatureCollection", "features": []}).any()


def test_broken_rings_are_mended_and_what_is_outside_is_cut(read):
    bow_tie = polygon([[100, 100], [500, 400], [500, 100], [100, 400], [100, 100]])
    assert read(bow_tie).sum() == pytest.approx(600, rel=0.05)
    beyond = polygon([[-300, -200], [150, -200], [150, 5000], [-300, 5000], [-300, -200]])
    np.testing.assert_array_equal(read(beyond), box(0, 0, 15, 60))


@pytest.mark.parametrize("properties", ['"text"', "[1]", "null"])
def test_properties_that_are_no_object_say_nothing(read, properties):
    geometry = '{"type": "Polygon", "coordinates": [[[0, 0], [150, 0], [150, 150], [0, 150]]]}'
    content = f'{{"type": "Feature", "properties": {properties}, "geometry": {geometry}}}'
    np.testing.assert_array_equal(read(content), read(geometry))


BROKEN = {
    "": "not valid JSON",
    "<html>": "not valid JSON",
    "[" * 100_000: "not valid JSON",
    '{"type": "FeatureCollection"}': "no list of features",
    '{"features": []}': "None where GeoJSON has",
    "3": "None where GeoJSON has",
    '{"type": "Polygon", "coordinates": [[["a", "b"], [1, 2], [3, 4]]]}': "no numbers in pairs",
    '{"type": "Polygon", "coordinates": [[[1], [2], [3]]]}': "no finite numbers in pairs",
    '{"type": "Polygon", "coordinates": [[[NaN, 1], [2, 2], [3, 9]]]}': "no finite numbers",
    '{"type": "Polygon", "coordinates": [[[1, 2], [3, 4, 5]]]}': "no numbers in pairs",
    '{"type": "Polygon", "coordinates": 7}': "no numbers in pairs",
    '{"type": "MultiPolygon"}': "without coordinates",
    '{"type": "Point", "coordinates": [1, 2]}': "none of its 1 objects",
    '{"type": "Polygon", "coordinates": [[[9000, 9000], [9100, 9000], [9100, 9100]]]}': "span 9000 to 9100",
    '{"type": "Polygon", "coordinates": [[[0.1, 0.1], [0.4, 0.1], [0.4, 0.4]]]}': "exported in microns",
}


@pytest.mark.parametrize("content", BROKEN, ids=lambda c: c[:40] or "empty")
def test_a_broken_file_says_what_is_wrong(read, content):
    with pytest.raises(SlideError) as caught:
        read(content)
    assert caught.value.code == "bad_mask"
    assert BROKEN[content] in str(caught.value)
    assert "S.geojson" in str(caught.value)
    assert "QuPath" in caught.value.remedy


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SlideError, match=r"gone\.geojson: cannot be read: No such file"):
        read_mask(tmp_path / "gone.geojson", np.zeros((2, 2), bool), 20, 20)


@pytest.fixture
def tile(synthetic, tmp_path):
    """Run the tile step; the quality record, the coordinates and the exported mask."""

    def run(path, name, **changes):
        ends = {"h5_out": "h5", "qc_out": "json", "geojson_out": "geojson", "thumbnail_out": "jpg"}
        outputs = {key: tmp_path / f"{name}.{end}" for key, end in ends.items()}
        chosen = {"tiling": synthetic.tiling(**changes), "slides": synthetic.SLIDES}
        run_tile(slide_path=path, slide_id="S", settings=chosen, **outputs)
        with h5py.File(outputs["h5_out"]) as handle:
            coords = handle["coords"][()]
            source = handle.attrs["mask_source"]
        qc = read_json(outputs["qc_out"], "morphome.slide_qc")
        assert source == (qc["mask_source"] or "")
        return qc, {tuple(c) for c in coords.tolist()}, outputs["geojson_out"]

    return run


def test_a_correction_changes_the_tiles_of_the_corrected_area_and_no_other(tile, synthetic, painted, tmp_path):
    slide = synthetic.write_tiff(tmp_path / "s.tif", painted)
    made, before, exported = tile(slide, "made")
    again, same, _ = tile(slide, "again", masks=str(exported))
    assert (made["mask_source"], again["mask_source"]) == ("made", "geojson")
    assert again["mask_sha256"] == made["mask_sha256"]
    assert same == before

    content = json.loads(exported.read_text())
    content["features"].append(feature(mapping(shapely.box(512, 256, 640, 448)), "Ignore*"))
    content["features"].append(feature(mapping(shapely.box(0, 0, 128, 64)), "Tissue"))
    edited = tmp_path / "edited.geojson"
    edited.write_text(json.dumps(content))
    qc, after, _ = tile(slide, "edited", masks=str(edited))
    assert before - after == {(x, y) for x in (512, 576) for y in (256, 320, 384)}
    assert after - before == {(0, 0), (64, 0)}
    assert qc["mask_sha256"] != made["mask_sha256"]


def test_a_drawn_mask_wins_over_ink(tile, synthetic, painted, tmp_path):
    marked = painted.copy()
    marked[320:448, 192:768] = (28, 58, 158)
    slide = synthetic.write_tiff(tmp_path / "s.tif", marked)
    drawn = tmp_path / "drawn.geojson"
    drawn.write_text(json.dumps(polygon([[192, 320], [768, 320], [768, 448], [192, 448]])))
    found, coords, _ = tile(slide, "made")
    qc, kept, _ = tile(slide, "drawn", masks=str(drawn))
    assert found["n_dropped_pen"] >= 18
    assert (192, 320) not in coords
    assert qc["n_dropped_pen"] == 0
    assert qc["pen_fraction"] == pytest.approx(found["pen_fraction"])
    assert {(x, y) for x in range(192, 704, 64) for y in (320, 384)} <= kept


def test_a_broken_mask_fails_its_slide_alone(tile, synthetic, painted, tmp_path):
    slide = synthetic.write_tiff(tmp_path / "s.tif", painted)
    broken = tmp_path / "broken.geojson"
    broken.write_text("{")
    qc, coords, _ = tile(slide, "broken", masks=str(broken))
    assert (qc["status"], qc["reason_code"]) == ("failed", "bad_mask")
    assert str(broken) in qc["reason"]
    assert not coords
