"""Does the direct decoder show the pixels that OpenSlide shows? Some places of a slide are read both ways."""

from __future__ import annotations

import numpy as np

from morphome.slides.reader import ReaderChoice, SlideError, SlideReader
from morphome.slides.tiff_directory import JpegDirectory

#: Places that are compared.
PLACES = 8
#: Each place is a native tile and this many pixels of its right and lower neighbours.
_MARGIN_PX = 16


def compare(reference: SlideReader, direct: SlideReader, directory: JpegDirectory) -> ReaderChoice:
    """Read some native tiles with both readers.

    Returns:
        The choice: ``tiled_jpeg`` where the largest difference is 0, ``openslide`` with the reason otherwise.
    """
    n_read = largest = 0
    for x, y, width, height in probe_places(directory):
        try:
            expected = reference.read_level0(x, y, width, height)
        except SlideError:
            continue  # a damaged place says nothing about the decoder
        try:
            found = direct.read_level0(x, y, width, height)
        except SlideError as error:
            return ReaderChoice("openslide", f"direct decoding failed where OpenSlide reads: {error.problem}", n_read)
        n_read += 1
        largest = max(largest, int(np.abs(expected.astype(np.int16) - found).max()))
    if not n_read:
        return ReaderChoice("openslide", "no place that OpenSlide reads was found to compare")
    if largest:
        return ReaderChoice("openslide", f"direct decoding differs by up to {largest} grey levels", n_read, largest)
    return ReaderChoice("tiled_jpeg", "", n_read, 0)


def probe_places(directory: JpegDirectory) -> list[tuple[int, int, int, int]]:
    """Places to compare as x, y, width, height in level-0 pixels: the same ones for the same file.

    Tissue makes long JPEG streams and glass short ones, so tiles of more than half the length of the longest (but
    for single outliers) are taken, evenly over the slide from top to bottom; and the last tile, which reaches over
    two borders.
    """
    counts = np.asarray(directory.counts)
    candidates = np.flatnonzero(counts > np.quantile(counts, 0.99) / 2)
    picks = candidates[np.linspace(0, len(candidates) - 1, min(PLACES - 1, len(candidates))).round().astype(int)]
    places = []
    for number in np.unique([*picks.tolist(), len(counts) - 1]).tolist():
        row, column = divmod(number, directory.columns)
        x, y = column * directory.tile_w, row * directory.tile_h
        right = min(x + directory.tile_w + _MARGIN_PX, directory.width_px)
        bottom = min(y + directory.tile_h + _MARGIN_PX, directory.height_px)
        places.append((x, y, right - x, bottom - y))
    return places
