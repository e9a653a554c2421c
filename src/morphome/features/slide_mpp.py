"""Microns per pixel of slides, for features whose coordinates are microns: a number, an audit or a tiling of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py

from morphome.cohort.barcode import cut_suffix
from morphome.errors import MorphomeError
from morphome.features.bag import number
from morphome.files import read_parquet

Mpp = tuple[float, float] | None


def slide_mpp(source: float | str | Path | None) -> Callable[[str], Mpp]:
    """Microns per level-0 pixel (x, y) by slide id; None for slides that ``source`` does not know.

    Args:
        source: one number for all slides; a ``morphome.slide_audit`` (columns ``slide_id``, ``mpp_x``, ``mpp_y``);
            a folder of tile or feature files of ours (``<slide_id>.h5`` with ``mpp_level0_x`` and ``_y`` at
            ``coords``); or None.

    Raises:
        MorphomeError: no number above zero, no such file, or a table without these columns.
    """
    if source is None:
        return lambda slide: None
    if isinstance(source, (int, float)) or number(source) is not None:
        if (value := number(source)) is None:
            raise MorphomeError(f"{source} microns per pixel", "give a number above zero, for example 0.25")
        return lambda slide: (value, value)
    path = Path(source)
    if path.is_dir():
        return lambda slide: _tiling_mpp(path / f"{slide}.h5")
    table = read_parquet(path, "morphome.slide_audit")
    if absent := [name for name in ("slide_id", "mpp_x", "mpp_y") if name not in table]:
        raise MorphomeError(f"{path}: no column '{absent[0]}'", "name the audit of a run that tiled these slides")
    rows = table[["slide_id", "mpp_x", "mpp_y"]].itertuples(index=False)
    known = {cut_suffix(str(slide)): (number(x), number(y)) for slide, x, y in rows}
    return lambda slide: known[slide] if all(known.get(slide, (None,))) else None


def _tiling_mpp(path: Path) -> Mpp:
    """Resolution in a tile or feature file of ours; None without the file."""
    if not path.exists():
        return None
    try:
        with h5py.File(path, "r", locking=False) as handle:
            attrs = handle["coords"].attrs
            x, y = number(attrs.get("mpp_level0_x")), number(attrs.get("mpp_level0_y"))
    except (OSError, KeyError) as error:
        raise MorphomeError(f"{path}: cannot be read as a tile file: {error}", "run the tile step again") from None
    return (x, y) if x and y else None
