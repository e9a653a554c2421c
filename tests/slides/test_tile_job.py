"""Groups of slides: what is done and unchanged is passed over, everything else is done again."""

from __future__ import annotations

import json

import h5py
import pytest

from morphome.slides.tile_job import TileJob, run_tiles


@pytest.fixture
def job(synthetic, painted, tmp_path):
    path = tmp_path / "S.svs"
    synthetic.write_tiff(path, painted)

    def make(name="S", slide=path, **tiling):
        outputs = {f"{key}_out": tmp_path / f"{name}{end}" for key, end in
                   (("h5", ".h5"), ("qc", ".json"), ("geojson", ".geojson"), ("thumbnail", ".jpg"))}  # fmt: skip
        settings = {"tiling": {**synthetic.TILING, **tiling}, "slides": synthetic.SLIDES}
        return TileJob(slide_path=slide, slide_id=name, settings=settings, **outputs)

    return make


def one(job, code="c"):
    return run_tiles(jobs=[job], code=code)[0]


def test_a_second_run_passes_over_and_says_the_same(job):
    first, second = one(job()), one(job())
    assert first["status"] == "ok"
    assert first["n_tiles"] > 0
    assert (first["skipped"], second["skipped"]) == (False, True)
    assert {**first, "skipped": 0} == {**second, "skipped": 0}


def test_other_code_settings_or_files_are_done_again(job, tmp_path):
    one(job())
    assert not one(job(), code="d")["skipped"]
    assert not one(job(min_tissue=0.9), code="d")["skipped"]
    assert not one(job(), code="d")["skipped"]  # the files are those of 0.9 now
    assert one(job(), code="d")["skipped"]
    for end in (".h5", ".json", ".geojson", ".jpg"):
        (tmp_path / f"S{end}").unlink()
        assert not one(job(), code="d")["skipped"], end


def test_another_slide_under_the_same_name_is_done_again(job, synthetic, painted):
    chosen = job()
    first = one(chosen)
    synthetic.write_tiff(chosen.slide_path, painted[:, ::-1].copy())
    second = one(chosen)
    assert not second["skipped"]
    assert second["content_key"] != first["content_key"]


def test_a_mask_that_was_edited_is_read_again(job, tmp_path):
    one(job())
    mask = tmp_path / "mask.geojson"
    mask.write_text((tmp_path / "S.geojson").read_text())
    assert not one(job(masks=str(mask)))["skipped"]
    assert one(job(masks=str(mask)))["skipped"]
    mask.write_text(json.dumps(json.loads(mask.read_text()), indent=1))
    assert not one(job(masks=str(mask)))["skipped"]


def test_a_slide_that_failed_is_tried_again(job, tmp_path):
    broken = tmp_path / "broken.svs"
    broken.write_bytes(b"no slide")
    for _ in range(2):
        record = one(job("B", broken))
        assert record["status"] == "failed"
        assert not record["skipped"]


def test_a_slide_that_opened_and_gave_too_few_tiles_is_tried_again(job):
    for _ in range(2):
        record = one(job(min_tiles=10_000))
        assert record["reason_code"] == "too_few_tiles"
        assert not record["skipped"]


def test_a_tile_file_of_other_tiles_is_written_again(job, tmp_path):
    first = one(job())
    with h5py.File(tmp_path / "S.h5", "r+") as handle:
        coords = handle["coords"][1:]
        attrs = dict(handle["coords"].attrs)
        del handle["coords"]
        handle["coords"] = coords
        handle["coords"].attrs.update(attrs)
    second = one(job())
    assert not second["skipped"]
    assert second["n_tiles"] == first["n_tiles"]
