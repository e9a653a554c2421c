"""Features from one tool's layout to another's: ``morphome features convert``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from morphome.cohort.slide_sheet import check_slide_id, few_names
from morphome.errors import MorphomeError
from morphome.features.bag import BagError, OpenBag, check_bag
from morphome.features.bag_files import bag_slide_id, find_bags
from morphome.features.layouts import open_bag
from morphome.features.packed import is_packed, open_packed
from morphome.features.peers_write import LAYOUTS, LOST, out_paths, write_bag
from morphome.features.slide_mpp import slide_mpp

Opener = Callable[[], AbstractContextManager[OpenBag]]


def convert_features(
    source: Path,
    layout: str,
    out: Path,
    *,
    mpp: float | str | Path | None = None,
    dataset: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the bags of one file or folder in the layout of another tool.

    What each layout has no place for, and so is lost:

    * ``clam`` (``h5_files/<slide>.h5``, ``pt_files/<slide>.pt``): encoder, fingerprint, tile size, overlap and
      resolution; slides without tiles, for which CLAM has no file. Vectors become float32.
    * ``trident`` (``features_<encoder>/<slide>.h5``): fingerprint and resolution; its magnifications are nominal.
      Vectors become float32. Needs coordinates.
    * ``stamp`` (``<slide>.h5``): fingerprint; slides without tiles. Vectors are rounded to float16, coordinates
      become microns (float32) and give the same pixels again with the same ``mpp``. Needs coordinates, the tile size
      and the resolution.
    * ``morphome`` (``<slide>.h5``): attributes that only the source tool has. Vectors are rounded to float16. The
      fingerprint is ``imported:<producer>:<encoder>:<dim>``; that of a file of ours stays.
    * ``npy`` (``<slide>.npy``, ``coords/<slide>.npy``): everything but vectors and level-0 coordinates. Vectors keep
      their type.

    Args:
        source: a bag, a folder of one bag a slide, or a packed ``.h5``; see :mod:`morphome.features.layouts`.
        layout: one of the above.
        out: folder to write into.
        mpp: microns per level-0 pixel where the source does not say it: a number for all slides, an audit
            (``audit.parquet``) or a folder of tile files of ours.
        dataset: which features to take of files that hold those of several encoders.
        overwrite: replace files that exist.

    Returns:
        ``layout``, ``out``, ``n_slides``, ``n_written`` (bags), ``n_files``, ``n_empty`` (slides without tiles),
        ``n_tiles``, ``dim``, ``producer``, ``encoder``, ``fingerprint`` (of the source), ``lost`` and ``notes``
        (what had to be supposed, with the number of slides).

    Raises:
        MorphomeError: no such source or layout, sources that are no bags or differ in encoder or dimension, files
            that exist, or facts that the layout needs and nobody knows. Every file that was written is complete.
    """
    source, out = Path(source), Path(out)
    if layout not in LAYOUTS:
        raise MorphomeError(f"there is no layout '{layout}'", f"choose one of: {', '.join(LAYOUTS)}")
    with _openers(source, dataset, mpp) as (bags, files):
        if not bags:
            raise MorphomeError(f"{source}: no slide in it", "check the path")
        plan = _plan(bags, source, layout, out)
        _refuse_existing(plan, files, overwrite)
        notes: Counter[str] = Counter()
        n_files = n_tiles = n_empty = n_written = 0
        for slide in tqdm(sorted(bags), desc=f"to {layout}", disable=None):
            with _named(slide, source), bags[slide]() as bag:
                check_bag(bag)
                notes.update(bag.facts.notes)
                notes.update(write_bag(layout, plan[slide], slide, bag.facts, bag.values()))
                facts = bag.facts
            n_files += len(plan[slide])
            n_written += bool(plan[slide])
            n_tiles += facts.n_tiles
            n_empty += facts.n_tiles == 0
    return {
        "layout": layout,
        "out": str(out),
        "n_slides": len(bags),
        "n_written": n_written,
        "n_files": n_files,
        "n_empty": n_empty,
        "n_tiles": n_tiles,
        "dim": facts.dim,
        "producer": facts.producer,
        "encoder": facts.encoder,
        "fingerprint": facts.fingerprint,
        "lost": LOST[layout],
        "notes": [f"{note} ({n} slide{'s' if n > 1 else ''})" for note, n in notes.most_common()],
    }


@contextmanager
def _openers(
    source: Path, dataset: str | None, mpp: float | str | Path | None
) -> Iterator[tuple[dict[str, Opener], set[Path]]]:
    """A way to open the bag of each slide of ``source``, and the files that are read."""
    if not source.exists():
        raise MorphomeError(f"{source}: file not found", "check the path")
    if source.is_file() and is_packed(source):
        with open_packed(source) as packed:
            for slide in packed.bounds:  # the file says them, and they become names of files
                check_slide_id(slide, str(source))
            yield {slide: partial(nullcontext, packed.bag(slide)) for slide in packed.bounds}, {source.resolve()}
        return
    single = source.is_file() or source.suffix == ".zarr"
    files = {bag_slide_id(source): source} if single else find_bags(source)
    resolution = slide_mpp(mpp)
    openers = {slide: partial(open_bag, file, dataset, resolution(slide)) for slide, file in files.items()}
    yield openers, {file.resolve() for file in files.values()}


def _plan(bags: dict[str, Opener], source: Path, layout: str, out: Path) -> dict[str, list[Path]]:
    """Files of each slide, after the heads of all bags were read: a mixture is refused before any write."""
    plan: dict[str, list[Path]] = {}
    kinds: dict[str, list[str]] = {}
    for slide, opener in bags.items():
        with _named(slide, source), opener() as bag:
            plan[slide] = out_paths(layout, out, slide, bag.facts)
            if bag.facts.n_tiles:
                kinds.setdefault(bag.facts.fingerprint, []).append(slide)
    if len(kinds) > 1:
        shown = "; ".join(f"{kind}: {few_names(slides, 2)}" for kind, slides in list(kinds.items())[:4])
        raise MorphomeError(f"{source}: features of more than one encoder: {shown}", "convert each kind by itself")
    return plan


def _refuse_existing(plan: dict[str, list[Path]], sources: set[Path], overwrite: bool) -> None:
    """Nothing that exists is replaced unless it was allowed, and never a file that is read."""
    wanted = [path for paths in plan.values() for path in paths]
    there = sorted(path for path in wanted if path.exists())
    if mine := [path for path in there if path.resolve() in sources]:
        raise MorphomeError(f"{mine[0]}: would replace a file that is read", "choose another folder")
    if there and not overwrite:
        raise MorphomeError(
            f"{there[0]}: exists already ({len(there)} of {len(wanted)} files)",
            "choose another folder, or allow it with --overwrite",
        )


@contextmanager
def _named(slide: str, source: Path) -> Iterator[None]:
    """A bag that cannot be used becomes an error that names the slide."""
    try:
        yield
    except BagError as error:
        raise MorphomeError(
            f"{source}: slide '{slide}': {error.code}: {error}",
            "mend this file or take it out of the folder; 'morphome features verify' lists all that is wrong",
        ) from None
