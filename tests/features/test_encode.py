"""The encode step: order, failed tiles, attributes, determinism, several slides, kill and resume."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

from morphome.cohort.svs_writer import SlideImage, write_svs
from morphome.errors import MorphomeError
from morphome.features.encode import EncodeJob, rebatch, run_encode, to_float16
from morphome.features.encoders import load_encoder
from morphome.features.registry import fingerprint
from morphome.files import read_json
from morphome.slides import patches
from morphome.slides.openslide_reader import OpenSlideReader
from morphome.slides.patches import PatchShape, read_patch
from morphome.slides.reader import SlideError
from morphome.slides.tile import run_tile

CODE = "0123456789ab"


def contents(path):
    """Datasets, and attributes by dataset (``file`` for those of the file)."""
    with h5py.File(path) as handle:
        data = {key: handle[key][()] for key in handle}
        attrs = {key: dict(handle[key].attrs) for key in ("features", "coords")}
        attrs["file"] = dict(handle.attrs)
        attrs["contiguous"] = handle["features"].chunks is None
    return data, attrs


@pytest.fixture
def job(synthetic, tmp_path):
    """Tile a slide (once for each slide_id) and give its encode job."""

    def make(path, slide="S", name="f", tiled=None, features=None, **changes):
        tiling = synthetic.tiling(**changes)
        tiles = tmp_path / "tiles" / f"{slide}.h5"
        settings = {"tiling": tiling, "slides": synthetic.SLIDES}
        if not tiles.exists():
            ends = {"qc_out": ".json", "geojson_out": ".geojson", "thumbnail_out": ".jpg"}
            outputs = {key: tiles.with_suffix(end) for key, end in ends.items()}
            run_tile(slide_path=tiled or path, slide_id=slide, settings=settings, h5_out=tiles, **outputs)
        seen = {k: (features or {}).get(k, synthetic.FEATURES[k]) for k in ("encoder", "precision", "max_failed_tiles")}
        out = tmp_path / name / f"{slide}.h5"
        return EncodeJob(path, slide, tiles, {**settings, "features": seen}, out, out.with_suffix(".json"))

    return make


@pytest.fixture
def encode(job, synthetic):
    """Tile and encode a slide; data, attributes, the file, its timing and the settings."""

    def run(path, *args, features=None, threads=1, **changes):
        one = job(path, *args, features=features, **changes)
        full = {**synthetic.FEATURES, **(features or {})}
        (record,) = run_encode(jobs=[one], features=full, code=CODE, threads=threads)
        data, attrs = contents(one.h5_out)
        assert record["n_tiles"] == len(data["features"])
        assert {
            k: attrs["file"][k] for k in ("status", "reason_code", "reason", "content_key")
        }.items() <= record.items()
        return data, attrs, one.h5_out, read_json(one.timing_out, "morphome.timing", one.settings), one.settings

    return run


@pytest.fixture(scope="module")
def image(synthetic):
    return synthetic.paint(520, 400)


@pytest.fixture
def slide(synthetic, image, tmp_path):
    return synthetic.write_tiff(tmp_path / "a slide [1].tif", image)


def test_every_planned_tile_is_encoded_in_order(encode, slide, synthetic):
    data, attrs, _, timing, settings = encode(slide, "a slide (1)")
    n = len(data["coords"])
    assert data["features"].shape == (n, 64)
    assert data["features"].dtype == np.float16
    assert data["coords"].dtype == np.int32
    assert attrs["contiguous"]
    assert (data["sharpness"] > 0).all()
    assert len(data["failed_coords"]) == 0
    file = attrs["file"]
    assert (file["format"], file["status"], file["slide_id"]) == ("morphome.tile-features", "ok", "a slide (1)")
    assert (file["n_tiles_planned"], file["n_tiles_failed"], file["resize"]) == (n, 0, "none")
    assert (file["dct_scale"], file["code"]) == (1, CODE)
    assert file["reader"] in ("openslide", "tiled_jpeg")
    assert len(file["content_key"]) == 32
    assert attrs["features"]["encoder"] == "stain_texture"
    assert attrs["features"]["encoder_fingerprint"] == fingerprint(settings["features"], settings["tiling"])
    assert (attrs["features"]["precision"], attrs["features"]["arithmetic"]) == ("fp32", "fp32")
    assert attrs["features"]["name"] == attrs["coords"]["name"] == "a slide (1)"
    assert attrs["coords"]["patch_size_level0"] == 64
    assert timing["n_tiles"] == n
    assert 0 < timing["seconds_encode"] < timing["seconds_total"]
    assert timing["seconds_read"] > 0 <= timing["seconds_wait"] < timing["seconds_total"]
    assert (timing["bound"], timing["device"], timing["runtime"], timing["batch"]) == ("encoder", "cpu", "numpy", 64)
    assert timing["reader"] == file["reader"]
    with OpenSlideReader(slide) as reader:
        for i in (0, n // 2, n - 1):
            x, y = data["coords"][i].tolist()
            tile = read_patch(reader, x, y, PatchShape(64, 64, 64))
            expected = load_encoder(synthetic.FEATURES).encode(tile[None])[0]
            np.testing.assert_array_equal(data["features"][i], expected.astype(np.float16))


def test_bytes_do_not_depend_on_the_run_the_batch_or_the_threads(encode, slide):
    first = encode(slide, name="first")[2].read_bytes()
    assert encode(slide, name="second", features={"batch": 7}, threads=3)[2].read_bytes() == first


def test_a_failed_slide_stays_failed(encode, tmp_path):
    data, attrs, _, timing, _ = encode(tmp_path / "gone.svs")
    assert (attrs["file"]["status"], attrs["file"]["reason_code"]) == ("failed", "missing_file")
    assert data["features"].shape == (0, 64)
    assert timing["tiles_per_second"] is timing["bound"] is timing["reader"] is None


def test_an_empty_slide_is_an_empty_bag(encode, synthetic, tmp_path):
    path = synthetic.write_tiff(tmp_path / "glass.tif", np.full((400, 400, 3), 243, np.uint8))
    data, attrs, *_ = encode(path, min_tiles=0)
    assert attrs["file"]["status"] == "ok"
    assert data["features"].shape == (0, 64)


def test_a_tile_that_fails_once_is_read_again(encode, slide, monkeypatch):
    whole = encode(slide, name="whole")[0]
    calls = {"n": 0}

    def fails_once(reader, x, y, shape):
        calls["n"] += 1
        if calls["n"] == 5:
            raise SlideError("unreadable", "once")
        return read_patch(reader, x, y, shape)

    monkeypatch.setattr(patches, "read_patch", fails_once)
    data, attrs, *_ = encode(slide, name="again")
    assert calls["n"] == len(data["coords"]) + 1
    assert attrs["file"]["n_tiles_failed"] == 0
    np.testing.assert_array_equal(data["features"], whole["features"])


def failing(bad):
    def read(reader, x, y, shape):
        if (x, y) in bad:
            raise SlideError("unreadable", "always")
        return read_patch(reader, x, y, shape)

    return read


def test_a_tile_that_fails_twice_is_recorded_and_never_white(encode, slide, monkeypatch):
    whole, first, *_ = encode(slide, name="whole")
    bad = tuple(whole["coords"][3].tolist())
    monkeypatch.setattr(patches, "read_patch", failing({bad}))
    data, attrs, *_ = encode(slide, name="some", features={"max_failed_tiles": 0.1})
    n = len(whole["coords"])
    assert (attrs["file"]["n_tiles_planned"], attrs["file"]["n_tiles_failed"]) == (n, 1)
    assert data["failed_coords"].tolist() == [list(bad)]
    for name in ("features", "coords", "sharpness"):
        np.testing.assert_array_equal(data[name], np.delete(whole[name], 3, axis=0))
    assert attrs["file"]["content_key"] != first["file"]["content_key"]


def test_too_many_failed_tiles_fail_the_slide(encode, slide, monkeypatch):
    coords = encode(slide, name="whole")[0]["coords"]
    monkeypatch.setattr(patches, "read_patch", failing({tuple(c) for c in coords[:9].tolist()}))
    data, attrs, *_ = encode(slide, name="some", features={"max_failed_tiles": 0.05})
    file = attrs["file"]
    assert (file["status"], file["reason_code"], file["n_tiles_failed"]) == ("failed", "too_many_failed_tiles", 9)
    assert f"9 of {len(coords)} tiles" in file["reason"]
    assert len(data["features"]) == 0
    np.testing.assert_array_equal(data["failed_coords"], coords[:9])


def test_really_unreadable_tiles_are_found(encode, synthetic, painted, tmp_path):
    """OpenSlide keeps an error for the life of a handle: the tiles after a bad one must still be read."""
    large = np.kron(painted, np.ones((3, 3, 1), np.uint8))
    good, bad = (synthetic.write_tiff(tmp_path / name, large, tile=192) for name in ("good.tif", "bad.tif"))
    synthetic.damage_tiles(bad, [5 * 16 + 7])  # column 7, row 5 of 16 columns
    whole = encode(good, "good", patch_px=192)[0]
    data, attrs, *_ = encode(bad, "bad", patch_px=192, features={"max_failed_tiles": 0.1})
    assert attrs["file"]["status"] == "ok", attrs["file"]["reason"]
    assert data["failed_coords"].tolist() == [[7 * 192, 5 * 192]]
    kept = (whole["coords"] != [7 * 192, 5 * 192]).any(axis=1)
    np.testing.assert_array_equal(data["features"], whole["features"][kept])


def test_half_decode_of_a_slide_without_it_fails_that_slide(encode, slide, synthetic):
    attrs = encode(slide, half_decode=True, mpp_target=1.0)[1]
    assert (attrs["file"]["status"], attrs["file"]["dct_scale"]) == ("failed", 2)
    assert attrs["file"]["reason_code"] == "no_half_decode"


@pytest.fixture
def svs(synthetic, tmp_path):
    """A slide of JPEG tiles at 0.25 microns per pixel, which the direct reader takes."""
    image = np.kron(synthetic.paint(480, 480), np.ones((3, 3, 1), np.uint8))
    tiles = image.reshape(6, 240, 6, 240, 3).swapaxes(1, 2).reshape(36, 240, 240, 3)
    label = np.full((40, 40, 3), 200, np.uint8)
    picture = SlideImage(list(tiles), np.arange(36).reshape(6, 6), 1440, 1440, 0.25, label)
    write_svs(tmp_path / "aperio.svs", picture, properties={}, quality=90)
    return tmp_path / "aperio.svs"


def test_half_decode_is_recorded_and_near_the_exact_tiles(encode, svs):
    exact, whole, _, timing, _ = encode(svs, "A", mpp_target=0.5)
    data, attrs, *_ = encode(svs, "B", mpp_target=0.5, half_decode=True)
    assert timing["reader"] == attrs["file"]["reader"] == "tiled_jpeg"
    assert (whole["file"]["dct_scale"], attrs["file"]["dct_scale"]) == (1, 2)
    assert (whole["file"]["resize"], attrs["file"]["resize"]) == ("reduce", "half+none")
    assert whole["features"]["encoder_fingerprint"] != attrs["features"]["encoder_fingerprint"]
    np.testing.assert_array_equal(data["coords"], exact["coords"])
    assert not np.array_equal(data["features"], exact["features"])
    assert np.median(np.abs(data["features"] - exact["features"])) < 0.1


def test_the_direct_reader_gives_the_bytes_of_openslide(encode, svs, job, synthetic):
    direct, attrs, *_ = encode(svs, threads=3)
    one = job(svs, name="openslide")
    settings = {**one.settings, "slides": {"reader": "openslide"}}
    one = EncodeJob(svs, "S", one.tiles_h5, settings, one.h5_out, one.timing_out)
    run_encode(jobs=[one], features=synthetic.FEATURES, code=CODE)
    data, other = contents(one.h5_out)
    assert (attrs["file"]["reader"], other["file"]["reader"]) == ("tiled_jpeg", "openslide")
    assert other["file"]["reader_reason"]
    for name, values in direct.items():
        np.testing.assert_array_equal(values, data[name])


def test_the_reader_that_the_tile_step_fell_back_to_is_kept(job, svs, synthetic):
    one = job(svs)

    def run():
        (record,) = run_encode(jobs=[one], features=synthetic.FEATURES, code=CODE)
        return record["skipped"], {k: contents(one.h5_out)[1]["file"][k] for k in ("reader", "reader_reason")}

    assert run() == (False, {"reader": "tiled_jpeg", "reader_reason": ""})
    assert run()[0]
    found = {"reader": "openslide", "reader_reason": "the tile at (0, 0) differs"}
    with h5py.File(one.tiles_h5, "r+") as handle:
        handle.attrs.update(found)
    assert run() == (False, found)
    assert run() == (True, found)


def test_another_file_than_the_tiled_one_is_refused(encode, slide, synthetic, tmp_path):
    other = synthetic.write_tiff(tmp_path / "other.tif", synthetic.paint(seed=5))
    attrs = encode(other, tiled=slide)[1]
    assert (attrs["file"]["status"], attrs["file"]["reason_code"]) == ("failed", "slide_changed")


def test_a_file_that_vanishes_while_it_is_read_fails_that_slide(encode, slide, monkeypatch):
    calls = {"n": 0}

    def read(reader, x, y, shape):
        calls["n"] += 1
        if calls["n"] == 12:
            slide.unlink()
        return read_patch(reader, x, y, shape)

    encode(slide, name="whole")
    monkeypatch.setattr(patches, "read_patch", read)
    data, attrs, *_ = encode(slide, name="gone")
    assert attrs["file"]["status"] == "failed"
    assert attrs["file"]["reason_code"] in ("missing_file", "slide_changed")
    assert slide.name in attrs["file"]["reason"]
    assert len(data["features"]) == 0


def test_a_bad_slide_between_good_ones_fails_alone(job, synthetic, slide, image, tmp_path):
    twin = synthetic.write_tiff(tmp_path / "twin.tif", image)
    changed = synthetic.write_tiff(tmp_path / "changed.tif", synthetic.paint(seed=5))
    jobs = [job(slide, "A"), job(changed, "B", tiled=slide), job(tmp_path / "none.svs", "C"), job(twin, "D")]
    records = run_encode(jobs=jobs, features=synthetic.FEATURES, code=CODE, threads=2)
    assert [r["slide_id"] for r in records] == list("ABCD")
    assert [r["reason_code"] for r in records] == ["", "slide_changed", "missing_file", ""]
    (first, _), (last, _) = contents(jobs[0].h5_out), contents(jobs[3].h5_out)
    assert len(first["features"]) > 15
    np.testing.assert_array_equal(first["features"], last["features"])
    loads = [read_json(j.timing_out, "morphome.timing")["seconds_load"] for j in jobs]
    assert loads[0] > 0 == sum(loads[1:])


def test_tiles_of_another_slide_are_refused(job, synthetic, slide, tmp_path):
    right = job(slide, "A")
    wrong = EncodeJob(slide, "B", right.tiles_h5, right.settings, tmp_path / "B.h5", tmp_path / "B.json")
    with pytest.raises(MorphomeError, match="tiles of slide 'A', not 'B'"):
        run_encode(jobs=[wrong], features=synthetic.FEATURES, code=CODE)


def test_an_encoder_refuses_a_resolution_it_is_not_meant_for(encode, slide):
    with pytest.raises(MorphomeError, match="mpp_target: 4"):
        encode(slide, mpp_target=4.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, 70_000])
def test_values_beyond_float16_are_errors(value):
    features = np.zeros((3, 4), np.float32)
    features[1, 2] = value
    with pytest.raises(MorphomeError, match=r"slide 'S'.*\[2\]"):
        to_float16(features, "S")


def test_blocks_become_batches():
    tiles = np.arange(23, dtype=np.uint8).reshape(23, 1, 1, 1)
    blocks = np.split(tiles, [5, 5, 6, 20])
    batches = [batch.ravel().tolist() for batch in rebatch(blocks, 7)]
    assert [len(b) for b in batches] == [7, 7, 7, 2]
    assert [i for b in batches for i in b] == list(range(23))
    assert list(rebatch([], 7)) == []


def test_done_slides_are_passed_over_and_changed_ones_are_not(job, synthetic, slide, tmp_path):
    def run(code=CODE, features=None, **changes):
        jobs = [job(slide, "S", features=features, **changes)]
        full = {**synthetic.FEATURES, **(features or {})}
        return run_encode(jobs=jobs, features=full, code=code)[0]

    first = run()
    again = run()
    assert (first["skipped"], again["skipped"]) == (False, True)
    assert {**again, "skipped": False} == first
    assert run(features={"batch": 16})["skipped"], "how an encoder runs does not change vectors"
    assert not run(code="other")["skipped"]
    assert not run(code="other", features={"max_failed_tiles": 0.5})["skipped"]
    assert run(code="other", features={"max_failed_tiles": 0.5})["skipped"]
    run()
    (tmp_path / "f" / "S.json").unlink()
    assert not run()["skipped"]
    tiles = tmp_path / "tiles" / "S.h5"
    with h5py.File(tiles, "r+") as handle:
        coords, attrs = handle["coords"][:-1], dict(handle["coords"].attrs)
        del handle["coords"]
        handle["coords"] = coords
        handle["coords"].attrs.update(attrs)
    assert run()["n_tiles"] == first["n_tiles"] - 1
    with h5py.File(tmp_path / "f" / "S.h5", "r+") as handle:
        handle.attrs["n_tiles_failed"] = 1
    assert [run()["skipped"] for _ in range(2)] == [False, True], "tiles that could not be read are tried again"
    synthetic.write_tiff(slide, synthetic.paint(seed=5))
    assert (run()["reason_code"], run()["skipped"]) == ("slide_changed", False), "a failed slide is tried again"
    tiles.unlink()
    assert run()["status"] == "ok"


KILLED = """
import os, signal, sys
from morphome.features import encode
before = encode.write_features
def write(plan, *rest):
    if plan.job.slide_id == "B":
        os.kill(os.getpid(), signal.SIGKILL)
    return before(plan, *rest)
encode.write_features = write
import pickle
jobs, features, code = pickle.load(open(sys.argv[1], "rb"))
encode.run_encode(jobs=jobs, features=features, code=code, threads=2)
"""


def test_a_killed_job_goes_on_where_it_was(job, synthetic, slide, image, tmp_path):
    twin = synthetic.write_tiff(tmp_path / "twin.tif", image)
    jobs = [job(slide, "A"), job(twin, "B"), job(twin, "C")]
    arguments = tmp_path / "jobs.pickle"
    arguments.write_bytes(pickle.dumps((jobs, synthetic.FEATURES, CODE)))
    done = subprocess.run([sys.executable, "-c", KILLED, str(arguments)], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert jobs[0].h5_out.exists() and not jobs[1].h5_out.exists() and not jobs[2].h5_out.exists()
    kept = jobs[0].h5_out.read_bytes(), jobs[0].h5_out.stat().st_mtime_ns
    records = run_encode(jobs=jobs, features=synthetic.FEATURES, code=CODE)
    assert [r["skipped"] for r in records] == [True, False, False]
    assert (jobs[0].h5_out.read_bytes(), jobs[0].h5_out.stat().st_mtime_ns) == kept
    fresh = [job(slide, "A", "fresh"), job(twin, "B", "fresh"), job(twin, "C", "fresh")]
    run_encode(jobs=fresh, features=synthetic.FEATURES, code=CODE)
    assert [j.h5_out.read_bytes() for j in fresh] == [j.h5_out.read_bytes() for j in jobs]


def test_a_full_disk_names_the_file_and_leaves_nothing(job, synthetic, slide, monkeypatch):
    one = job(slide)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MorphomeError, match=r"f/S\.h5: cannot be written: .*No space left"):
        run_encode(jobs=[one], features=synthetic.FEATURES, code=CODE)
    assert list(one.h5_out.parent.iterdir()) == []


def test_a_write_that_really_fails_leaves_nothing(job, synthetic, slide, tmp_path):
    """A limit on the size of files fails in the middle of a write, as a full disk does."""
    one = job(slide)
    arguments = tmp_path / "jobs.pickle"
    arguments.write_bytes(pickle.dumps(([one], synthetic.FEATURES, CODE)))
    code = (
        "import pickle, resource, signal, sys\n"
        "from morphome.features.encode import run_encode\n"
        "jobs, features, code = pickle.load(open(sys.argv[1], 'rb'))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
        "run_encode(jobs=jobs, features=features, code=code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(arguments)], capture_output=True, text=True, timeout=60)
    assert "MorphomeError" in done.stderr and f"{one.h5_out}: cannot be written" in done.stderr, done.stderr
    assert done.returncode == 1
    assert list(one.h5_out.parent.iterdir()) == []


def test_ctrl_c_ends_soon_and_leaves_nothing(job, synthetic, slide, tmp_path):
    one = job(slide)
    arguments = tmp_path / "jobs.pickle"
    arguments.write_bytes(pickle.dumps(([one], synthetic.FEATURES, CODE)))
    code = (
        "import pickle, sys, time\n"
        "from morphome.features import encode\n"
        "begin = encode.begin\n"
        "def slow(encoder, tiles):\n"
        "    print('busy', flush=True)\n"
        "    time.sleep(30)\n"
        "    return begin(encoder, tiles)\n"
        "encode.begin = slow\n"
        "jobs, features, code = pickle.load(open(sys.argv[1], 'rb'))\n"
        "encode.run_encode(jobs=jobs, features=features, code=code, threads=2)\n"
    )
    command = [sys.executable, "-c", code, str(arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "busy\n"
        started = time.perf_counter()
        child.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in child.communicate(timeout=15)[1]
    assert time.perf_counter() - started < 10
    assert not one.h5_out.exists()


def test_the_encoder_without_weights_needs_no_torch(loaded_by):
    assert "torch" not in loaded_by("morphome.features.encode", "morphome.features.encoders")


def test_a_network_encodes_like_a_plain_loop(encode, slide, synthetic):
    features = {"encoder": "tiny_random", "batch": 5}
    data, attrs, *_ = encode(slide, features=features, threads=2)
    encoder = load_encoder({**synthetic.FEATURES, **features})
    with OpenSlideReader(slide) as reader:
        tiles = [read_patch(reader, x, y, PatchShape(64, 64, 64)) for x, y in data["coords"].tolist()]
    expected = encoder.encode(np.stack(tiles))
    np.testing.assert_array_equal(data["features"], expected.astype(np.float16))
    assert attrs["features"]["encoder"] == "tiny_random"
    assert len(attrs["features"]["weights_sha256"]) == 64
