"""Bags written as other tools expect them: same names, types, chunks and attributes as in files of these tools."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from morphome.features.bag import BagError, BagFacts, grid_step, to_half
from morphome.files import atomic_path, stamp

#: The first STAMP version whose files name the tile size ``tile_size_um``; STAMP refuses files newer than itself.
_STAMP_VERSION = "2.1.0"
#: What each layout has no place for.
LOST = {
    "clam": "encoder, fingerprint, tile size, overlap and resolution; slides without tiles (CLAM writes no file); "
    "float16 is widened to float32",
    "trident": "fingerprint and resolution (magnifications are nominal, 10 / mpp); float16 is widened to float32",
    "stamp": "fingerprint, level-0 pixels (exact again with the same mpp) and slides without tiles (STAMP writes no "
    "file); float32 is rounded to float16",
    "morphome": "attributes that only the source tool has; float32 is rounded to float16",
    "npy": "encoder, fingerprint, tile size, overlap and resolution",
}
LAYOUTS = tuple(LOST)


def out_paths(layout: str, out: Path, slide: str, facts: BagFacts) -> list[Path]:
    """Files that a bag becomes: the one of vectors first; none where the tool writes nothing for an empty slide."""
    if layout == "clam":
        pt = out / "pt_files" / f"{slide}.pt"
        with_h5 = [pt, out / "h5_files" / f"{slide}.h5"] if facts.coords_unit else [pt]
        return with_h5 if facts.n_tiles else []
    if layout == "trident":
        return [out / f"features_{file_part(facts.encoder)}" / f"{slide}.h5"]
    if layout == "npy":
        coords = [out / "coords" / f"{slide}.npy"] if facts.coords_unit else []
        return [out / f"{slide}.npy", *coords]
    return [out / f"{slide}.h5"] if layout == "morphome" or facts.n_tiles else []


def file_part(text: str) -> str:
    """``text`` with nothing in it that a file name cannot hold."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in text)[:80] or "unknown"


def write_bag(layout: str, paths: list[Path], slide: str, facts: BagFacts, values: np.ndarray) -> list[str]:
    """Write one bag, atomically file by file; returns notes on what had to be supposed.

    Raises:
        BagError: the layout needs coordinates, a resolution or a tile size that are not known, or a value does not
            fit into float16.
    """
    if not paths:
        return []
    return _WRITERS[layout](paths, slide, facts, values)


def _clam(paths: list[Path], slide: str, facts: BagFacts, values: np.ndarray) -> list[str]:
    import torch

    single = _single(values)
    coords = _pixels(facts, "clam") if len(paths) == 2 else None
    with atomic_path(paths[0]) as temporary:
        torch.save(torch.from_numpy(single), temporary)
    if coords is None:
        return ["without coordinates only pt_files are written"]
    with atomic_path(paths[1]) as temporary, h5py.File(temporary, "w", locking=False) as handle:
        _growing(handle, "features", single, 32)
        _growing(handle, "coords", coords, 32)
    return []


def _trident(paths: list[Path], slide: str, facts: BagFacts, values: np.ndarray) -> list[str]:
    coords = _pixels(facts, "trident")
    attrs, notes = _nine(slide, facts, coords)
    with atomic_path(paths[0]) as temporary, h5py.File(temporary, "w", locking=False) as handle:
        data = _growing(handle, "features", _single(values), 1)
        data.attrs.update({"name": slide, "savetodir": "", "encoder": facts.encoder})
        places = _growing(handle, "coords", coords.astype(np.int64), 1)
        # TRIDENT writes the text None for what it does not know.
        places.attrs.update({name: "None" if value is None else value for name, value in attrs.items()})
    return notes


def _stamp(paths: list[Path], slide: str, facts: BagFacts, values: np.ndarray) -> list[str]:
    side, notes = _side(facts)
    if facts.coords_um is not None:
        microns, tile_um = facts.coords_um, facts.tile_um
    elif facts.coords is None:
        raise BagError("no_coords", "STAMP's layout needs coordinates, and the bag has none")
    elif facts.mpp is None:
        raise BagError("no_mpp", "STAMP's coordinates are microns, and the slide's microns per pixel are not known: "
                                 "give --mpp")  # fmt: skip
    else:
        microns = facts.coords * np.asarray(facts.mpp)
        tile_um = None if side is None else side * facts.mpp[0]
    if tile_um is None:
        raise BagError("no_tile_size", "STAMP's layout needs the size of a tile, which the file does not say")
    with atomic_path(paths[0]) as temporary, h5py.File(temporary, "w", locking=False) as handle:
        handle["coords"] = microns.astype(np.float32)
        handle["feats"] = to_half(values)
        handle.attrs.update({
            "stamp_version": _STAMP_VERSION,
            "extractor": facts.encoder,
            "unit": "um",
            "tile_size_um": float(tile_um),
            "tile_size_px": int(facts.patch_px or round(tile_um)),
            "code_hash": "morphome",
            "feat_type": "tile",
        })  # fmt: skip
    return notes if facts.patch_px else [*notes, "tile_size_px is not known: the size in microns was written"]


def _morphome(paths: list[Path], slide: str, facts: BagFacts, values: np.ndarray) -> list[str]:
    half = to_half(values)
    coords = None if not facts.coords_unit else _pixels(facts, "morphome")
    attrs, notes = _nine(slide, facts, coords)
    mark, side = facts.fingerprint, attrs["patch_size_level0"]
    key = hashlib.sha256(f"{mark}:{slide}:{half.shape}".encode())
    key.update(half.tobytes())
    if coords is not None:
        key.update(coords.tobytes())
    empty = facts.n_tiles == 0
    with atomic_path(paths[0]) as temporary, h5py.File(temporary, "w", locking=False) as handle:
        handle.attrs.update(stamp("morphome.tile-features", {"converted": mark}))
        handle.attrs.update({
            "slide_id": slide,
            "status": "ok",
            "reason_code": "empty" if empty else "",
            "reason": "the imported file holds no tile" if empty else "",
            "n_tiles_planned": facts.n_tiles,
            "n_tiles_failed": 0,
            "content_key": key.hexdigest()[:32],
            "reader": "unknown",
            "dct_scale": 1,
        })  # fmt: skip
        handle["features"] = half
        handle["features"].attrs.update({
            "name": slide,
            "savetodir": "",
            "encoder": facts.encoder,
            "encoder_fingerprint": mark,
            "weights_sha256": "",
            "output_variant": "unknown",
            "precision": "unknown",
        })  # fmt: skip
        if coords is not None:
            handle["coords"] = coords
            mpp = facts.mpp or (np.nan, np.nan)
            ours = {
                "mpp_level0_x": mpp[0],
                "mpp_level0_y": mpp[1],
                "mpp_source": "imported" if facts.mpp else "",
                "side_x_px": side or 0,
                "side_y_px": side or 0,
            }
            # A number that is not known is NaN (or 0 for sizes), as in files that the encode step writes.
            texts = ("name", "savetodir")
            known = {n: v if v is not None else "" if n in texts else 0 if "size" in n else np.nan
                     for n, v in attrs.items()}  # fmt: skip
            handle["coords"].attrs.update({**_more_of_ours(facts), **known, **ours})
    return notes


def _npy(paths: list[Path], slide: str, facts: BagFacts, values: np.ndarray) -> list[str]:
    arrays = [values, _pixels(facts, "npy")] if len(paths) == 2 else [values]
    for path, array in zip(paths, arrays, strict=True):
        with atomic_path(path) as temporary:
            np.save(temporary, array, allow_pickle=False)
    return []


_WRITERS = {"clam": _clam, "trident": _trident, "stamp": _stamp, "morphome": _morphome, "npy": _npy}


def _single(values: np.ndarray) -> np.ndarray:
    # Writeable, for torch: a bag in an .npy file is a read-only map of it.
    return np.require(values, np.float32, ["C", "W"])


def _growing(handle: h5py.File, name: str, array: np.ndarray, rows: int) -> h5py.Dataset:
    """A dataset that can grow, as CLAM and TRIDENT make them; written in one piece."""
    shape = (rows, *array.shape[1:])
    data = handle.create_dataset(name, array.shape, array.dtype, maxshape=(None, *array.shape[1:]), chunks=shape)
    data[:] = array
    return data


def _pixels(facts: BagFacts, layout: str) -> np.ndarray:
    """Level-0 coordinates int32 (N, 2)."""
    if facts.coords is not None:
        return facts.coords
    if facts.coords_um is not None:
        raise BagError("no_mpp", "the coordinates are microns, and the slide's microns per pixel are not known: "
                                 "give --mpp")  # fmt: skip
    raise BagError("no_coords", f"the layout '{layout}' needs coordinates, and the bag has none")


def _side(facts: BagFacts) -> tuple[int | None, list[str]]:
    """Side of a tile in level-0 pixels: as said, else the step between neighbours, which says so."""
    if facts.side_px or facts.coords is None or facts.coords_um is not None:
        return facts.side_px, []
    step = grid_step(facts.coords)
    if step is None:
        return None, []
    return round(step), [f"the tile size is not in the file: {step:g} px, the step between tiles, was taken"]


def _nine(slide: str, facts: BagFacts, coords: np.ndarray | None) -> tuple[dict[str, Any], list[str]]:
    """TRIDENT's nine attributes of coordinates; None for what is not known. Magnifications are nominal."""
    side, notes = _side(facts)
    own: Mapping[str, Any] = facts.attrs
    level0 = own.get("level0_magnification")
    target = own.get("target_magnification")
    if facts.mpp is not None:
        level0 = 10 / facts.mpp[0] if level0 is None else level0
        if target is None and side and facts.patch_px:
            target = 10 * facts.patch_px / (side * facts.mpp[0])
    overlap = facts.overlap_px
    return {
        "patch_size": facts.patch_px or side,
        "patch_size_level0": side,
        "level0_magnification": level0,
        "target_magnification": target,
        "overlap": None if overlap is None else round(overlap),
        "name": slide,
        "savetodir": "",
        "level0_width": own.get("level0_width"),
        "level0_height": own.get("level0_height"),
    }, notes


def _more_of_ours(facts: BagFacts) -> dict[str, Any]:
    """Attributes of our own coordinates, kept when a file of ours is written again."""
    names = ("mpp_target", "mpp_effective", "min_tissue", "mask_sha256")
    return {name: facts.attrs[name] for name in names if facts.attrs.get(name) is not None}
