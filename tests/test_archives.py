"""Files of earlier format versions must open for ever. One small file per format and version, made by the workflow."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from morphome.features.store import BagStore
from morphome.files import FORMAT_VERSION, check_stamp, parquet_meta, read_json, read_parquet
from morphome.training.run import load_run

ARCHIVES = Path(__file__).parent / "data" / "archives"
FILES = sorted(path for path in ARCHIVES.glob("v*/**/*") if path.is_file())


def test_there_is_an_archive_of_the_version_that_is_written():
    assert (ARCHIVES / f"v{FORMAT_VERSION}").is_dir()
    assert len(FILES) > 15


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.relative_to(ARCHIVES).parts))
def test_it_opens(path):
    if path.suffix == ".parquet":
        table = read_parquet(path, parquet_meta(path)["stamp"]["format"])
        assert len(table.columns)
    elif path.suffix == ".json":
        content = read_json(path, json.loads(path.read_text())["stamp"]["format"])
        assert len(content) > 1
    elif path.suffix == ".h5":
        with h5py.File(path) as file:
            check_stamp(dict(file.attrs), path, file.attrs["format"])
            assert file["coords"].dtype == np.int32
    elif path.suffix == ".safetensors":
        model = load_run(path.parent)
        assert np.isfinite(model.times_months).all()
    else:
        pytest.fail(f"nobody reads {path}")


@pytest.mark.parametrize("folder", sorted(ARCHIVES.glob("v*")), ids=lambda folder: folder.name)
def test_bags_of_an_archive_are_read(folder):
    """The index names files as the run wrote them; the archive keeps one of those slides beside it."""
    store = BagStore(folder / "features" / "index.parquet")
    slide = next((folder / "features").glob("*.h5")).stem
    store._rows[slide]["path"] = str(folder / "features" / f"{slide}.h5")
    features, places = store.bag([slide])
    assert features.shape == (len(places), 64)
    assert np.isfinite(features).all()
