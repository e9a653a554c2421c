"""Tissue masks out to GeoJSON and back in: a pathologist corrects them in QuPath and the run takes the correction.

Coordinates are pixels of level 0 with the origin at the upper left, as QuPath writes and reads them. A mask that is
written and read back unchanged is the same mask, pixel by pixel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from morphome.slides.reader import SlideError

if TYPE_CHECKING:
    from shapely import Geometry

#: Classes whose annotations are taken away from the tissue; compared in lower case, without a "*" at the end.
EXCLUDED = frozenset(
    ("ignore", "exclude", "excluded", "artefact", "artifact", "background", "glass", "pen", "fold", "blur")
)
#: Objects of QuPath that are no annotations: what it has detected or laid out by itself.
_NO_ANNOTATION = frozenset(("detection", "cell", "tile", "tma_core", "root"))


def outline(mask: np.ndarray, width_px: int, height_px: int) -> list[Geometry]:
    """Tissue as polygons with holes in level-0 pixels, one per connected piece, largest first.

    The polygons follow the edges of the mask's pixels: smoother ones would not give the same mask back.
    """
    import shapely

    if not mask.any():
        return []
    faces = shapely.get_parts(shapely.polygonize(shapely.linestrings(_borders(mask))))
    inside = shapely.get_coordinates(shapely.point_on_surface(faces)).astype(int)
    faces = shapely.simplify(faces[mask[inside[:, 1], inside[:, 0]]], 0, preserve_topology=True)
    scale = np.array([width_px / mask.shape[1], height_px / mask.shape[0]])
    polygons = shapely.transform(faces, lambda points: np.round(points * scale, 1))
    return sorted(polygons, key=lambda p: (-p.area, p.bounds))


def to_geojson(polygons: list[Geometry]) -> dict[str, Any]:
    """FeatureCollection that QuPath opens: one annotation of the class "Tissue" per polygon."""
    from shapely.geometry import mapping

    properties = {
        "objectType": "annotation",
        "classification": {"name": "Tissue", "color": [0, 128, 96]},
        "isLocked": False,
    }
    features = [
        {"type": "Feature", "id": f"tissue-{number}", "geometry": mapping(p), "properties": properties}
        for number, p in enumerate(polygons, start=1)
    ]
    return {"type": "FeatureCollection", "features": features}


def read_mask(path: Path, made: np.ndarray, width_px: int, height_px: int) -> np.ndarray:
    """Tissue mask from a GeoJSON file: a FeatureCollection, a Feature, a geometry, or a list of them.

    QuPath's conventions: an area of any class, or of none, is tissue, except that

    * classes ``Ignore*``, Exclude, Artefact, Background, Glass, Pen, Fold and Blur (any case, with or without ``*``)
      are taken away from it, whatever the order of the objects;
    * other classes that end in ``*`` are skipped, as QuPath itself skips them: ``Region*`` frames a region to look
      at and says nothing of what is in it;
    * detections, cells, tiles and TMA cores are skipped, and so are points and lines.

    A file with excluded areas only is taken away from the mask that morphome has made. A file with an empty list is
    a slide without tissue. Rings that cross themselves are repaired, and what lies outside the slide is cut off.

    Args:
        made: bool (h, w), the mask that the file replaces.
        width_px, height_px: level 0.

    Returns:
        bool (h, w); True where the centre of a mask pixel is tissue.

    Raises:
        SlideError: ``bad_mask``.
    """
    import shapely

    path = Path(path)
    tissue, excluded, skipped = [], [], 0
    for role, geometry in _areas(_load(path), path):
        if role == "skipped":
            skipped += 1
            continue
        (excluded if role == "excluded" else tissue).extend(geometry)
    if not tissue and not excluded:
        if not skipped:
            return np.zeros_like(made)
        raise _bad(path, f"none of its {skipped} objects is an area of tissue (points, lines, detections or classes "
                   "such as Region*)")  # fmt: skip
    rows, columns = made.shape
    scale = np.array([columns / width_px, rows / height_px])

    def raster(polygons: list[Geometry]) -> np.ndarray:
        merged = shapely.intersection(shapely.union_all(polygons), shapely.box(0, 0, width_px, height_px))
        return rasterise(shapely.transform(merged, lambda points: points * scale), rows, columns)

    mask = raster(tissue) if tissue else made
    if tissue and not mask.any():
        bounds = shapely.total_bounds(tissue)
        raise _bad(
            path,
            f"no mask pixel of the slide (0 to {width_px}, 0 to {height_px}) lies in it; its areas span "
            f"{bounds[0]:.6g} to {bounds[2]:.6g} and {bounds[1]:.6g} to {bounds[3]:.6g}. Was it drawn on another "
            "slide, or exported in microns?",
        )
    return mask & ~raster(excluded) if excluded else mask


def rasterise(geometry: Geometry, rows: int, columns: int) -> np.ndarray:
    """Pixels whose centre lies inside polygons, bool (rows, columns); exact, by crossings of each row's middle line.

    Args:
        geometry: valid polygons in pixel coordinates; several parts must not overlap.
    """
    import shapely

    rings = shapely.get_rings(shapely.get_parts(geometry))
    points, ring = shapely.get_coordinates(rings, return_index=True)
    if len(points) == 0:
        return np.zeros((rows, columns), bool)
    same = ring[1:] == ring[:-1]
    x0, y0 = points[:-1][same].T
    x1, y1 = points[1:][same].T
    low, high = np.minimum(y0, y1), np.maximum(y0, y1)
    first = np.clip(np.ceil(low - 0.5), 0, rows).astype(int)
    stop = np.clip(np.ceil(high - 0.5), 0, rows).astype(int)
    n = stop - first
    edge = np.repeat(np.arange(len(n)), n)
    row = np.arange(n.sum()) - np.repeat(n.cumsum() - n, n) + first[edge]
    x = x0[edge] + (row + 0.5 - y0[edge]) * (x1[edge] - x0[edge]) / (y1[edge] - y0[edge])
    column = np.clip(np.ceil(x - 0.5), 0, columns).astype(int)
    crossings = np.bincount(row * (columns + 1) + column, minlength=rows * (columns + 1))
    crossings = crossings.astype(np.int32).reshape(rows, columns + 1)
    return (crossings.cumsum(axis=1)[:, :columns] & 1).astype(bool)


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"not valid JSON ({error})") from None


def _areas(content: Any, path: Path) -> Iterator[tuple[str, list[Geometry]]]:
    """Role ("tissue", "excluded" or "skipped") and polygons of every object of a file."""
    if isinstance(content, list):
        for item in content:
            yield from _areas(item, path)
        return
    kind = content.get("type") if isinstance(content, dict) else None
    if kind == "FeatureCollection":
        features = content.get("features")
        if not isinstance(features, list):
            raise _bad(path, "its FeatureCollection has no list of features")
        yield from _areas(features, path)
    elif kind == "Feature":
        properties = content.get("properties")
        role = _role(properties if isinstance(properties, dict) else {})
        geometry = content.get("geometry")
        if role == "skipped" or geometry is None:
            yield "skipped", []
        else:
            yield from ((role if r == "tissue" else r, g) for r, g in _areas(geometry, path))
    elif kind == "GeometryCollection":
        yield from _areas(content.get("geometries") or [], path)
    elif kind in ("Polygon", "MultiPolygon"):
        coordinates = content.get("coordinates")
        parts = [coordinates] if kind == "Polygon" else coordinates
        if not isinstance(parts, list):
            raise _bad(path, f"a {kind} without coordinates")
        found = [p for part in parts for p in _polygon(part, path)]
        yield ("tissue" if found else "skipped"), found
    elif kind in ("Point", "MultiPoint", "LineString", "MultiLineString"):
        yield "skipped", []
    else:
        raise _bad(path, f"{kind!r} where GeoJSON has a Feature, FeatureCollection or geometry")


def _role(properties: dict[str, Any]) -> str:
    if str(properties.get("objectType", "annotation")).lower() in _NO_ANNOTATION:
        return "skipped"
    given = properties.get("classification")
    if isinstance(given, dict):
        names = given.get("names") if isinstance(given.get("names"), list) else [given.get("name")]
    else:
        names = [given]
    # "Tissue: Ignore" is QuPath's derived class; "Ignore pen" and "ignore_2" are what people write.
    parts = [part.strip().lower() for n in names if n for part in str(n).split(":")]
    words = [re.split(r"[\s_-]", part)[0] for part in parts if part]
    if any(w.rstrip("*") in EXCLUDED for w in words):
        return "excluded"
    return "skipped" if any(w.endswith("*") for w in words) else "tissue"


def _polygon(rings: Any, path: Path) -> list[Geometry]:
    """Valid polygons of the rings of one polygon; none where they enclose no area."""
    import shapely

    try:
        arrays = [np.asarray(ring, float).reshape(len(ring), -1)[:, :2] for ring in rings if len(ring)]
    except (TypeError, ValueError) as error:
        raise _bad(path, f"coordinates of a polygon are no numbers in pairs ({error})") from None
    if any(a.shape[1] != 2 or not np.isfinite(a).all() for a in arrays):
        raise _bad(path, "coordinates of a polygon are no finite numbers in pairs")
    if not arrays or len(arrays[0]) < 3:
        return []
    shell, *holes = arrays
    return _polygons(shapely.Polygon(shell, [h for h in holes if len(h) >= 3]))


def _polygons(geometry: Geometry) -> list[Geometry]:
    """The parts of a geometry that have an area, made valid."""
    import shapely

    parts = [geometry] if geometry.is_valid else shapely.get_parts(shapely.make_valid(geometry))
    flat = [q for p in parts for q in (shapely.get_parts(p) if p.geom_type.startswith("Multi") else [p])]
    return [p for p in flat if p.geom_type == "Polygon" and p.area > 0]


def _bad(path: Path, problem: str) -> SlideError:
    return SlideError(
        "bad_mask",
        f"{path}: {problem}",
        "export the annotations again from QuPath (File > Export objects as GeoJSON), or remove the file so that the "
        "mask is made anew",
    )


def _borders(mask: np.ndarray) -> np.ndarray:
    """Straight borders between tissue and the rest as lines, float (N, 2, 2) of x, y in mask pixels.

    A line ends where the border turns, and where four pixels meet crosswise: lines touch at their ends only.
    """
    lines = []
    for image in (mask, mask.T):
        step = np.diff(np.pad(image, 1).astype(np.int8), axis=0)[
            :, 1:-1
        ]  # 1 where tissue begins below, -1 where it ends
        turn = np.diff(np.pad(step, ((0, 0), (1, 1))), axis=1) != 0
        rows, ends = np.nonzero(turn)
        # Between two turns of a row lies one piece of border, or nothing.
        same = (rows[1:] == rows[:-1]) & (step[rows[:-1], np.minimum(ends[:-1], step.shape[1] - 1)] != 0)
        first = np.column_stack([ends[:-1], rows[:-1]])[same]
        last = np.column_stack([ends[1:], rows[1:]])[same]
        line = np.stack([first, last], axis=1)
        lines.append(line if image is mask else line[:, :, ::-1])
    return np.concatenate(lines).astype(float)
