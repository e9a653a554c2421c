"""What feature files hold and what is wrong with them: ``morphome features inspect`` and ``features verify``."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from morphome.cohort.slide_sheet import few_names
from morphome.errors import MorphomeError
from morphome.features.bag import BagError, BagFacts, OpenBag, check_bag, grid_step
from morphome.features.bag_files import BAG_SUFFIXES, bag_folder, bag_paths, bag_slide_id
from morphome.features.layouts import open_bag
from morphome.features.packed import is_packed, open_packed

#: First bytes of a file and what they mean; a ``.zarr`` store is a folder.
_MAGIC = {b"\x89HDF\r\n\x1a\n": (".h5",), b"\x93NUMPY": (".npy",), b"PK\x03\x04": (".pt", ".npz")}
#: Names that tools give to files they have not finished, and to their locks.
_UNFINISHED = (".tmp", ".part", ".partial", ".lock", ".incomplete")
#: Share of tiles alone in row and column above which coordinates are doubted, and the fewest tiles to judge by.
_OFF_GRID, _FEW_TILES = 0.2, 10


@dataclass(frozen=True)
class Finding:
    """Something wrong with a file: ``level`` "error" or "warning", a stable ``code``, the file and a sentence."""

    level: str
    code: str
    file: str
    text: str


def inspect_features(path: Path, dataset: str | None = None) -> dict[str, Any]:
    """Facts of a bag, of a packed file or of a folder of bags, without judging them and without reading all vectors.

    Args:
        path: one bag, a packed ``.h5``, or a folder of one bag a slide.
        dataset: which features to look at in files with those of several encoders.

    Returns:
        For one bag ``path, slide_id, producer, encoder, n_tiles, dim, dtype, layout, storage, dataset, unit,
        coords_unit, coords_dtype, coords_range`` ([[x, y], [x, y]]), ``grid_step, patch_px, side_px, patch_um,
        overlap_px, mpp, fingerprint, warnings``. For more bags ``path, n_files, n_tiles, kinds`` (each combination of
        producer, encoder, dimension, type, storage, unit and coordinates with its count), ``tiles_per_slide`` (least,
        median, most), ``fingerprints``, ``unreadable`` and ``warnings``.

    Raises:
        MorphomeError: no such file, no bag in the folder, or one file that is no bag.
    """
    path = Path(path)
    described, unreadable = [], []
    with _bags(path, dataset) as bags:
        for name, opener in tqdm(bags.items(), desc="inspect", disable=None):
            try:
                with opener() as bag:
                    described.append(_describe(bag.facts, name))
            except BagError as error:
                unreadable.append(f"{name}: {error.code}: {error}")
    if len(bags) == 1 and not _is_folder(path):
        if unreadable:
            raise MorphomeError(f"{path}: {unreadable[0].split(': ', 1)[1]}", "check the file")
        return {"path": str(path), **described[0]}
    kinds = Counter(tuple(one[k] for k in _KIND) for one in described)
    tiles = [one["n_tiles"] for one in described]
    notes = Counter(note for one in described for note in one["warnings"])
    return {
        "path": str(path),
        "n_files": len(bags),
        "n_tiles": sum(tiles),
        "kinds": [{**dict(zip(_KIND, kind, strict=True)), "n_slides": n} for kind, n in kinds.most_common()],
        "tiles_per_slide": [min(tiles), float(np.median(tiles)), max(tiles)] if tiles else None,
        "side_px": _range([one["side_px"] for one in described]),
        "mpp": _range([value for one in described for value in one["mpp"] or ()]),
        "fingerprints": dict(Counter(one["fingerprint"] for one in described).most_common()),
        "unreadable": unreadable,
        "warnings": [f"{note} ({n} files)" for note, n in notes.most_common()],
    }


_KIND = ("producer", "encoder", "dim", "dtype", "storage", "unit", "coords_unit", "patch_px", "patch_um")


def _range(values: Iterable[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return [min(known), max(known)] if known else None


def verify_features(path: Path, slides: Iterable[str] | None = None, dataset: str | None = None) -> list[Finding]:
    """Read every bag in full and list what is wrong with it, and what is wrong between the bags.

    Args:
        path: as for :func:`inspect_features`.
        slides: slide ids that should be there, if wanted.
        dataset: as for :func:`inspect_features`.

    Returns:
        Errors first. Codes: those of :class:`morphome.features.bag.BagError`; ``mixed_dim``, ``mixed_fingerprint``,
        ``same_content``, ``slide_level``, ``two_files``, ``wrong_extension``, ``unfinished``, ``missing_slide``;
        as warnings ``empty``, ``off_grid``, ``outside_slide``, ``all_zero``, ``one_vector``, ``other_slide_id``,
        ``unlisted_slide`` and ``note``.

    Raises:
        MorphomeError: no such file, or no bag in the folder.
    """
    path = Path(path)
    found: list[Finding] = list(_stray_files(path)) if _is_folder(path) else []
    facts: dict[str, BagFacts] = {}
    hashes: dict[str, list[str]] = defaultdict(list)
    with _bags(path, dataset) as bags:
        for name, opener in tqdm(bags.items(), desc="verify", disable=None):
            seen = _Seen()
            try:
                with opener() as bag:
                    facts[name] = bag.facts
                    check_bag(bag, seen.add)
            except BagError as error:
                found.append(Finding("error", error.code, name, str(error)))
                found += _wrong_extension(path / name if _is_folder(path) else path, name, error.code)
                continue
            found += _judge(name, facts[name], seen)
            if facts[name].n_tiles:
                hashes[seen.digest()].append(name)
    found += _between(facts, hashes)
    packed = not _is_folder(path) and is_packed(path)
    ids = {name: name if packed else bag_slide_id(Path(name)) for name in bags}
    twice = [slide for slide, n in Counter(ids.values()).items() if n > 1]
    found += [Finding("error", "two_files", slide, f"several files of slide '{slide}'") for slide in twice]
    if slides is not None:
        wanted, there = {str(slide) for slide in slides}, set(ids.values())
        found += [Finding("error", "missing_slide", s, f"no features of slide '{s}'") for s in sorted(wanted - there)]
        found += [Finding("warning", "unlisted_slide", s, f"slide '{s}' is not among the slides that were listed")
                  for s in sorted(there - wanted)]  # fmt: skip
    return sorted(found, key=lambda one: (one.level, one.code, one.file))


Opener = Callable[[], AbstractContextManager[OpenBag]]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and path.suffix != ".zarr"


@contextmanager
def _bags(path: Path, dataset: str | None) -> Iterator[dict[str, Opener]]:
    """A way to open each bag below ``path``, by the name of its file, or its slide in a packed file."""
    if not path.exists():
        raise MorphomeError(f"{path}: file not found", "check the path")
    if path.is_file() and is_packed(path):
        with open_packed(path) as packed:
            yield {slide: partial(nullcontext, packed.bag(slide)) for slide in packed.bounds}
        return
    files = {path.name: path}
    if _is_folder(path):
        files = {str(file.relative_to(path)): file for file in bag_paths(bag_folder(path))}
        if not files:
            raise MorphomeError(f"{path}: no {', '.join(BAG_SUFFIXES)} file in it", "check the path")
    yield {name: partial(open_bag, file, dataset) for name, file in files.items()}


def _describe(facts: BagFacts, name: str) -> dict[str, Any]:
    """One bag as plain numbers and texts."""
    coords = facts.coords if facts.coords is not None else facts.coords_um
    extent = None if coords is None or not len(coords) else [coords.min(0).tolist(), coords.max(0).tolist()]
    return {
        "slide_id": facts.slide_id or bag_slide_id(Path(name)),
        "producer": facts.producer,
        "encoder": facts.encoder,
        "n_tiles": facts.n_tiles,
        "dim": facts.dim,
        "dtype": facts.dtype,
        "layout": facts.layout,
        "storage": facts.storage,
        "dataset": facts.dataset,
        "unit": facts.unit,
        "coords_unit": facts.coords_unit,
        "coords_dtype": facts.coords_dtype,
        "coords_range": extent,
        "grid_step": None if coords is None else grid_step(coords),
        "patch_px": facts.patch_px,
        "side_px": facts.side_px,
        "patch_um": _patch_um(facts),
        "overlap_px": facts.overlap_px,
        "mpp": None if facts.mpp is None else list(facts.mpp),
        "fingerprint": facts.fingerprint,
        "warnings": list(facts.notes),
    }


def _patch_um(facts: BagFacts) -> float | None:
    """Side of a tile in whole microns; None where the file does not tell."""
    if facts.tile_um is not None:
        return float(round(facts.tile_um))
    known = facts.side_px is not None and facts.mpp is not None
    return float(round(facts.side_px * facts.mpp[0])) if known else None


class _Seen:
    """What is gathered while a bag is read: a hash of its values, and rows that are all zero."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.n_zero = 0

    def add(self, rows: np.ndarray) -> None:
        """One piece of vectors; float16, so that a copy in another type is the same content."""
        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(rows, np.float16)
        self._hash.update(half.tobytes())
        self.n_zero += int((~half.any(axis=1)).sum())

    def digest(self) -> str:
        return self._hash.hexdigest()


def _judge(name: str, facts: BagFacts, seen: _Seen) -> Iterator[Finding]:
    """What is odd about one bag that can be read."""

    def warn(code: str, text: str) -> Finding:
        return Finding("warning", code, name, text)

    if facts.n_tiles == 0:
        yield warn("empty", "the bag holds no tile")
    if facts.n_tiles == 1:
        yield warn("one_vector", "one vector only: a slide with a single tile, or an embedding of the whole slide")
    if seen.n_zero:
        yield warn("all_zero", f"{seen.n_zero} of {facts.n_tiles} vectors are all zero")
    if facts.slide_id and facts.producer in ("morphome", "trident") and (
        bag_slide_id(Path(facts.slide_id)) != bag_slide_id(Path(name))
    ):  # fmt: skip
        yield warn("other_slide_id", f"the file says that it is of slide '{facts.slide_id}'")
    coords = facts.coords if facts.coords is not None else facts.coords_um
    if coords is not None and len(coords):
        if text := _off_grid(coords, facts):
            yield warn("off_grid", text)
        yield from _outside(name, facts)
    for note in facts.notes:
        yield warn("note", note)


def _off_grid(coords: np.ndarray, facts: BagFacts) -> str:
    """What is odd about the places of the tiles; empty when nothing is."""
    if facts.producer == "morphome" and facts.side_px and not facts.fingerprint.startswith("imported:"):
        # Our tiles lie on one grid. Other tools tile each piece of tissue from its own corner.
        sides = np.array([facts.side_px, facts.attrs.get("side_y_px") or facts.side_px])
        _, counts = np.unique(np.mod(coords, sides), axis=0, return_counts=True)
        off = len(coords) - int(counts.max())
        return f"{off} of {len(coords)} tiles are off the grid of the others" if off else ""
    if len(coords) < _FEW_TILES:
        return ""
    alone = _alone(coords)
    unit = "microns" if facts.coords_unit == "um" else "level-0 pixels"
    return f"{alone:.0%} of the tiles share no row and no column: are these {unit}?" if alone > _OFF_GRID else ""


def _alone(coords: np.ndarray) -> float:
    """Share of the tiles that are alone in their row and in their column of tiles."""
    single = np.ones(len(coords), bool)
    for axis in (0, 1):
        _, place, counts = np.unique(np.round(coords[:, axis]), return_inverse=True, return_counts=True)
        single &= counts[place.ravel()] == 1
    return float(single.mean())


def _outside(name: str, facts: BagFacts) -> Iterator[Finding]:
    if facts.coords is None:
        return
    if (facts.coords < 0).any():
        yield Finding("warning", "outside_slide", name, "some tiles begin left of or above the slide")
    size = [facts.attrs.get("level0_width"), facts.attrs.get("level0_height")]
    if all(isinstance(v, (int, float)) and v > 0 for v in size) and (facts.coords >= size).any():
        yield Finding("warning", "outside_slide", name, f"some tiles lie beyond the slide of {size[0]} x {size[1]} px")


def _between(facts: dict[str, BagFacts], hashes: dict[str, list[str]]) -> Iterator[Finding]:
    """What is wrong between bags of one folder."""
    full = {name: one for name, one in facts.items() if one.n_tiles}
    for code, key in (("mixed_dim", lambda one: one.dim), ("mixed_fingerprint", lambda one: one.fingerprint)):
        groups: dict[Any, list[str]] = defaultdict(list)
        for name, one in full.items():
            groups[key(one)].append(name)
        if len(groups) > 1:
            ranked = sorted(groups.items(), key=lambda item: -len(item[1]))
            shown = ", ".join(f"{value} ({len(names)} files)" for value, names in ranked[:4])
            fewer = [name for _, names in ranked[1:] for name in names]
            yield Finding("error", code, fewer[0], f"{shown}; the fewer are {few_names(fewer)}")
            break  # another dimension is another fingerprint: said once
    for names in hashes.values():
        if len(names) > 1:
            yield Finding("error", "same_content", names[0], f"the same vectors as {few_names(names[1:])}")
    if len(full) > 1 and all(one.n_tiles == 1 for one in full.values()):
        first = next(iter(full))
        yield Finding("error", "slide_level", first, "every file holds one vector: embeddings of slides, not bags")


def _stray_files(path: Path) -> Iterator[Finding]:
    """Files that look like bags, but are not read, and what tools left behind."""
    folder = bag_folder(path)
    for file in sorted(folder.iterdir()):
        name = str(file.relative_to(path))
        if file.suffix in _UNFINISHED or (file.name[0] == "." and file.suffix in BAG_SUFFIXES):
            yield Finding("error", "unfinished", name, "left behind by a run that was stopped, or still being written")
        elif file.is_file() and file.suffix not in BAG_SUFFIXES and (kinds := _kinds(file)) and (
            file.suffix.lower() not in (".zip", ".xlsx")
        ):  # fmt: skip
            yield Finding("error", "wrong_extension", name, f"is not read: its content is that of {' or '.join(kinds)}")


def _kinds(file: Path) -> Sequence[str]:
    """Endings that fit the first bytes of a file."""
    try:
        with file.open("rb") as handle:
            head = handle.read(8)
    except OSError:
        return ()
    return next((endings for magic, endings in _MAGIC.items() if head.startswith(magic)), ())


def _wrong_extension(file: Path, name: str, code: str) -> Iterator[Finding]:
    """A second finding where a file cannot be read because its ending lies."""
    if code in ("unreadable", "wrong_extension") and file.is_file():
        kinds = _kinds(file)
        if kinds and file.suffix not in kinds:
            yield Finding("error", "wrong_extension", name, f"ends in {file.suffix}, but holds {' or '.join(kinds)}")
