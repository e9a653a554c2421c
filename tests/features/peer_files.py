"""Feature files as other tools lay them out: names, types, chunks and attributes as their code writes them."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SLIDE = "TCGA-AA-0001-01Z-00-DX1.ABC"
SIDE = 512  # level-0 pixels of a tile


def features(n=12, dim=8, seed=0, dtype=np.float32):
    """Vectors (n, dim)."""
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(dtype)


def coords(n=12, dtype=np.int64, side=SIDE, columns=4):
    """Level-0 corners (n, 2) of tiles side by side, row by row."""
    i = np.arange(n)
    return np.column_stack([i % columns * side + 1024, i // columns * side + 2048]).astype(dtype)


def _grow(handle, name, array, chunk):
    data = handle.create_dataset(
        name, array.shape, array.dtype, maxshape=(None, *array.shape[1:]), chunks=(chunk, *array.shape[1:])
    )
    data[:] = array
    return data


def clam(folder, slide=SLIDE, values=None, places=None, attrs=True, pt=True):
    """CLAM: ``h5_files`` with growing datasets of 32 rows a chunk, and the same vectors as a tensor."""
    import torch

    values = features() if values is None else values
    places = coords(len(values), np.int32) if places is None else places
    path = folder / "h5_files" / f"{slide}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as handle:
        _grow(handle, "features", values, 32)
        if places is not False:
            data = _grow(handle, "coords", places, 32)
            if attrs:
                data.attrs.update({"patch_size": 256, "patch_level": 1, "downsample": np.array([2.0, 2.0]),
                                   "downsampled_level_dim": np.array([50_000, 40_000]), "name": slide,
                                   "level_dim": np.array([50_000, 40_000]), "save_path": "x"})  # fmt: skip
    if pt:
        (folder / "pt_files").mkdir(exist_ok=True)
        torch.save(torch.from_numpy(values), folder / "pt_files" / f"{slide}.pt")
    return path


def trident(folder, slide=SLIDE, encoder="uni_v1", values=None, places=None, **changes):
    """TRIDENT: one row a chunk; nine attributes at ``coords``; the text None for nothing."""
    values = features() if values is None else values
    places = coords(len(values)) if places is None else places
    path = folder / f"features_{encoder}" / f"{slide}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as handle:
        data = _grow(handle, "features", values, 1)
        data.attrs.update({"name": slide, "savetodir": str(folder), "encoder": encoder})
        attrs = {"patch_size": 256, "patch_size_level0": SIDE, "level0_magnification": 40,
                 "target_magnification": 20, "overlap": 0, "name": slide, "savetodir": str(folder),
                 "level0_width": 100_000, "level0_height": 80_000}  # fmt: skip
        _grow(handle, "coords", places, 1).attrs.update({**attrs, **changes})
    return path


def trident_slide(folder, slide=SLIDE, dim=768):
    """TRIDENT's embedding of a whole slide; shape (0,) for an empty one."""
    path = folder / "slide_features_titan" / f"{slide}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as handle:
        data = handle.create_dataset("features", (dim,), np.float32, maxshape=(None,), chunks=(1,))
        data.attrs.update({"name": slide, "savetodir": "", "encoder": "titan"})
        handle["coords"] = coords()
    return path


def stamp(folder, slide=SLIDE, values=None, mpp=0.25, version="2.4.0", kind="tile", **changes):
    """STAMP from 2.1 on: float16, microns."""
    values = features() if values is None else values
    path = folder / f"{slide}.h5"
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as handle:
        handle["coords"] = (coords(len(values)) * mpp).astype(np.float32)
        handle["feats"] = values.astype(np.float16)
        attrs = {"stamp_version": version, "extractor": "uni2", "unit": "um", "tile_size_um": SIDE * mpp,
                 "tile_size_px": 224, "code_hash": "1a2b3c4d", "feat_type": kind}  # fmt: skip
        attrs |= changes
        handle.attrs.update({name: value for name, value in attrs.items() if value is not None})
    return path


def stamp_historic(folder, slide=SLIDE):
    """The first STAMP: no unit, tiles 224 apart that mean 256 microns."""
    path = folder / f"{slide}.h5"
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as handle:
        handle["coords"] = coords(side=224)
        handle["feats"] = features(dtype=np.float16)
        handle.attrs["extractor"] = "xiyuewang-ctranspath-7c998680"
    return path


def atlaspatch(folder, slide=SLIDE, encoders=("uni_v2",)):
    """AtlasPatch: coordinates of five columns, a group with one dataset per encoder."""
    path = folder / f"{slide}.h5"
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as handle:
        five = np.column_stack([coords(), np.full((12, 2), 256), np.ones(12)]).astype(np.int32)
        _grow(handle, "coords", five, 8)
        _grow(handle, "passports", np.array([f"{slide}__x{x}" for x in range(12)], "S160"), 8)
        for i, encoder in enumerate(encoders):
            _grow(handle.require_group("features"), encoder, features(seed=i), 8)
        handle.attrs.update({"patch_size": 256, "patch_size_level0": SIDE, "level0_magnification": 40,
                             "target_magnification": 20, "overlap": 0, "level0_width": 100_000,
                             "level0_height": 80_000, "wsi_path": "x.svs", "passport_version": 2,
                             "creation_date": "2026-01-01", "num_patches": 12})  # fmt: skip
    return path


def slide2vec(root, slide=SLIDE, suffix=".pt", with_tiles=True, **meta):
    """slide2vec's embeddings and hs2p's coordinates of one run."""
    import torch

    folder, tiles = root / "tile_embeddings", root / "tiles"
    for one in (folder, tiles):
        one.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slide}{suffix}"
    if suffix == ".pt":
        torch.save(torch.from_numpy(features()), path)
    else:
        np.savez_compressed(path, features=features(), tile_index=np.arange(12))
    said = {"sample_id": slide, "artifact_type": "tile_embeddings", "format": suffix[1:], "feature_dim": 8,
            "num_tiles": 12, "encoder_name": "virchow2", "encoder_level": "tile", "tile_size_lv0": SIDE,
            "requested_tile_size_px": 224, "requested_spacing_um": 0.5,
            "coordinates_npz_path": f"/elsewhere/tiles/{slide}.coordinates.npz"}  # fmt: skip
    (folder / f"{slide}.meta.json").write_text(json.dumps(said | meta))
    if with_tiles:
        x, y = coords().T
        np.savez_compressed(tiles / f"{slide}.coordinates.npz", tile_index=np.arange(12, dtype=np.int32), x=x, y=y,
                            tissue_fractions=np.ones(12, np.float32))  # fmt: skip
        described = {"slide": {"base_spacing_um": 0.25}, "tiling": {"tile_size_lv0": SIDE, "overlap": 0.0}}
        (tiles / f"{slide}.coordinates.meta.json").write_text(json.dumps(described))
    return path


def wsidata(folder, slide=SLIDE, models=("uni",), version=3, shuffle=True, compressors="auto"):
    """A wsidata store: SpatialData's folders, an AnnData table per model, tiles as GeoParquet polygons."""
    import shapely
    import zarr

    path = folder / f"{slide}.zarr"
    root = zarr.open_group(str(path), mode="w", zarr_format=version)
    root.attrs.update({
        "spatialdata_attrs": {"version": "0.2"},
        "slide_properties": {"mpp": 0.25, "shape": [80_000, 100_000]},
        "tile_spec": {"tiles": {"height": 256, "width": 256, "stride_height": 256, "stride_width": 256, "mpp": 0.5,
                                "ops_level": 0, "ops_downsample": 2.0, "base_level": 0, "base_downsample": 2.0,
                                "tissue_name": "tissues"}},
    })  # fmt: skip
    order = np.random.default_rng(1).permutation(12) if shuffle else np.arange(12)
    tables = root.create_group("tables")
    for i, model in enumerate(models):
        table = tables.create_group(f"{model}_tiles")
        table.attrs.update({"encoding-type": "anndata", "region": "tiles", "region_key": "library_id",
                            "instance_key": "tile_id"})  # fmt: skip
        table.create_array("X", data=features(seed=i)[order], chunks=(5, 8), compressors=compressors)
        obs = table.create_group("obs")
        obs.attrs.update({"encoding-type": "dataframe", "_index": "_index", "column-order": ["tile_id", "library_id"]})
        obs.create_array("tile_id", data=order.astype(np.int64))
    shapes = path / "shapes" / "tiles"
    root.create_group("shapes").create_group("tiles")
    boxes = shapely.to_wkb([shapely.box(x, y, x + SIDE, y + SIDE) for x, y in coords().tolist()])
    pq.write_table(
        pa.table({"tile_id": np.arange(12), "tissue_id": np.zeros(12, int), "geometry": boxes.tolist()}),
        shapes / "shapes.parquet",
    )
    return path


def npy(folder, slide=SLIDE, with_coords=True):
    """Plain arrays; the coordinates in a folder of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(folder) / f"{slide}.npy"
    np.save(path, features())
    if with_coords:
        (folder / "coords").mkdir(exist_ok=True)
        np.save(folder / "coords" / f"{slide}.npy", coords(dtype=np.int32))
    return path


def packed(path, lengths=(3, 4, 5), slides=("a", "b", "c"), encoder="HIPT ViT_4K, one row per region"):
    """All slides in one file."""
    with h5py.File(path, "w") as handle:
        handle["features"] = features(sum(lengths), 192, dtype=np.float16)
        handle["offsets"] = np.concatenate([[0], np.cumsum(lengths)])
        handle["slide_id"] = np.array(slides, "S60")
        handle.attrs["encoder"] = encoder
    return path


def ours(folder, slide=SLIDE, values=None, mpp=0.25, mark="ab12cd34ef56"):
    """As the encode step writes it."""
    values = features(dtype=np.float16) if values is None else values
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slide}.h5"
    with h5py.File(path, "w") as handle:
        handle.attrs.update({"format": "morphome.tile-features", "format_version": 1, "morphome_version": "0.1.0",
                             "config_hash": "0", "slide_id": slide, "status": "ok", "reason_code": "", "reason": "",
                             "n_tiles_planned": len(values), "n_tiles_failed": 0, "content_key": "k",
                             "reader": "openslide", "dct_scale": 1})  # fmt: skip
        handle["features"] = values
        handle["features"].attrs.update({"name": slide, "savetodir": "", "encoder": "uni2_h",
                                         "encoder_fingerprint": mark, "weights_sha256": "0" * 64,
                                         "output_variant": "cls", "precision": "fp16"})  # fmt: skip
        handle["coords"] = coords(len(values), np.int32)
        handle["coords"].attrs.update({
            "patch_size": 256, "patch_size_level0": SIDE, "level0_magnification": 10 / mpp,
            "target_magnification": 20.0, "overlap": 0, "name": slide, "savetodir": "", "level0_width": 100_000,
            "level0_height": 80_000, "mpp_level0_x": mpp, "mpp_level0_y": mpp, "mpp_source": "aperio",
            "mpp_target": 0.5, "mpp_effective": 0.5, "side_x_px": SIDE, "side_y_px": SIDE, "min_tissue": 0.5,
            "mask_sha256": "m"})  # fmt: skip
    return path
