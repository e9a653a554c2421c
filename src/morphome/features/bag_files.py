"""Which files of a folder are bags, and of which slide. Standard library only: the workflow and the cohort ask too."""

from __future__ import annotations

from pathlib import Path

from morphome.cohort.barcode import FILE_SUFFIXES, cut_suffix
from morphome.errors import MorphomeError

#: Endings of bags; a ``.zarr`` store is a folder.
BAG_SUFFIXES = (".h5", ".pt", ".npy", ".npz", ".zarr")
#: Folders in which tools put their bags, best first. CLAM's ``.pt`` files lack the coordinates of its ``.h5`` files.
_USUAL = ("h5_files", "pt_files", "tile_embeddings")


def bag_slide_id(file: Path) -> str:
    """Slide id of a bag: its name without the ending of a bag or slide."""
    return cut_suffix(file.name, (*FILE_SUFFIXES, *BAG_SUFFIXES))


def bag_folder(folder: Path) -> Path:
    """``folder``, or the folder below it in which the tool that wrote it puts its bags.

    Raises:
        MorphomeError: several ``features_<encoder>`` folders (TRIDENT), of which one must be chosen.
    """
    if bag_paths(folder):
        return folder
    for name in _USUAL:
        if (folder / name).is_dir():
            return folder / name
    encoders = sorted(f for f in folder.glob("features_*") if f.is_dir())
    if len(encoders) > 1:
        raise MorphomeError(
            f"{folder}: features of several encoders: {', '.join(f.name for f in encoders[:6])}",
            f"name one of these folders, for example {encoders[0]}",
        )
    return encoders[0] if encoders else folder


def bag_paths(folder: Path) -> list[Path]:
    """The bags that lie in a folder itself, by name; hidden and unfinished files do not count."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix in BAG_SUFFIXES and file.name[0] != "." and file.is_dir() == (file.suffix == ".zarr")
    )


def find_bags(folder: Path) -> dict[str, Path]:
    """Bag of each slide in a folder, sorted by slide id; see :func:`bag_folder`.

    Raises:
        MorphomeError: no bag at all, or two files of one slide.
    """
    found: dict[str, Path] = {}
    for file in bag_paths(bag_folder(folder)):
        slide = bag_slide_id(file)
        if slide in found:
            raise MorphomeError(f"{file} and {found[slide].name}: two files for slide '{slide}'", "keep one of them")
        found[slide] = file
    if not found:
        raise MorphomeError(
            f"{folder}: no {', '.join(BAG_SUFFIXES[:-1])} or {BAG_SUFFIXES[-1]} file in it (features.path)",
            "check features.path",
        )
    return dict(sorted(found.items()))


def input_files(path: Path) -> list[Path]:
    """Files that an import of ``features.path`` reads: when one of them changes, it has to be repeated.

    Of a ``.zarr`` store only the metadata and shapes, which every writer touches: not thousands of chunks.
    """
    if not path.is_dir():
        return [path]
    folder = bag_folder(path)
    found = [*folder.glob("*.meta.json"), *folder.glob("coords/*.npy")]
    for bag in bag_paths(folder):
        if not bag.is_dir():
            found.append(bag)
            continue
        for pattern in ("*", "tables/*/X/*", "shapes/*/*.parquet"):
            found += [file for file in bag.glob(pattern) if file.is_file() and _is_head(file)]
    return sorted(found)


def _is_head(file: Path) -> bool:
    return file.suffix == ".parquet" or file.name in ("zarr.json", ".zattrs", ".zarray", ".zgroup")
