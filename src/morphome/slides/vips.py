"""The third reader, libvips: ordinary TIFF images that OpenSlide refuses, and OME-TIFF pyramids that it does not see.

Stripped files, LZW, deflate or no compression, separate planes, and OME-TIFF with its pyramid in sub-directories.
Only 8-bit RGB (with or without alpha) is brightfield; fluorescence channels are refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyvips
import tifffile
from PIL import Image

from morphome.slides.overview import area_mean, level_for
from morphome.slides.reader import ReaderChoice, SlideError, SlideFacts, check_size
from morphome.slides.tiff_directory import TIFF_ERRORS, NotDirectError, first_page

#: A file without tiles is unpacked as a whole (libvips: to memory, or above 100 MB to a temporary file).
MAX_STRIPPED_BYTES = 4 << 30
_RGB_LIKE = (2, 6, 8)
_UNITS = {1: "none", 2: "inch", 3: "centimeter"}
_CONVERT = "convert it to a tiled pyramidal TIFF or SVS of 8-bit RGB that keeps its microns per pixel"
_FETCH = "fetch the file again and compare its md5, or take the slide out of the sheet"

# libvips would hand out a remembered image for a path whose file has changed, and keep files open.
pyvips.cache_set_max(0)


class VipsReader:
    """8-bit RGB TIFF and OME-TIFF files through libvips. Transparent pixels become white.

    Args:
        path: a TIFF file.
        reason: why not OpenSlide, for the record.

    Raises:
        SlideError: ``unsupported_format`` (another kind of pixels, or of compression) or ``unreadable``.
    """

    def __init__(self, path: Path, reason: str) -> None:
        self.choice = ReaderChoice("vips", reason)
        try:
            with first_page(path) as page:
                self.facts, sub_directories = _facts(path, page)
        except NotDirectError as error:
            raise SlideError("unreadable", f"{path}: {error}; {reason}", _FETCH) from None
        except TIFF_ERRORS as error:
            raise SlideError(
                "unreadable", f"{path}: its first TIFF directory is damaged ({error}); {reason}", _FETCH
            ) from None
        check_size(self.facts)
        try:
            self._levels = [_open(path)]
        except pyvips.Error as error:
            raise _unsupported(path, f"libvips does not open it: {_text(error)}; {reason}") from None
        if (self._levels[0].width, self._levels[0].height) != (self.facts.width_px, self.facts.height_px):
            raise _unsupported(path, "libvips and the TIFF directory differ on the size of the image")
        self._add_pyramid(path, sub_directories)
        self._regions = [pyvips.Region.new(level) for level in self._levels]

    def _add_pyramid(self, path: Path, sub_directories: int) -> None:
        """Coarser levels, until one is missing or no smaller than the one before."""
        for number in range(sub_directories):
            try:
                level = _open(path, subifd=number)
            except pyvips.Error:
                break
            if not 0 < level.width < self._levels[-1].width or not 0 < level.height < self._levels[-1].height:
                break
            self._levels.append(level)
        facts = self.facts
        sizes = tuple((level.width, level.height) for level in self._levels)
        downs = tuple((facts.width_px / w + facts.height_px / h) / 2 for w, h in sizes)
        self.facts = SlideFacts(
            facts.path, facts.vendor, *sizes[0], sizes, downs, (0, 0, *sizes[0]), facts.properties
        )  # fmt: skip

    def read_level0(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Region of level 0 as uint8 (height, width, 3); what lies outside the image is white.

        Raises:
            SlideError: ``unreadable``, the pixels are damaged or missing from the file.
        """
        return self._read(0, x, y, width, height)

    def overview(self, width: int, height: int) -> np.ndarray:
        """The whole image area-averaged to uint8 (height, width, 3), from its coarsest level that is fine enough."""
        level = level_for(self.facts, width, height)

        def read(x: int, y: int, w: int, h: int) -> Image.Image:
            return Image.fromarray(self._read(level, x, y, w, h))

        return area_mean(read, *self.facts.level_sizes[level], width, height)

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        image = self._levels[level]
        left, right = max(x, 0), min(x + width, image.width)
        top, bottom = max(y, 0), min(y + height, image.height)
        out = np.full((height, width, 3), 255, np.uint8)
        if left >= right or top >= bottom:
            return out
        try:
            pixels = self._regions[level].fetch(left, top, right - left, bottom - top)
        except pyvips.Error as error:
            raise SlideError(
                "unreadable",
                f"{self.facts.path}: opens, but the {width} x {height} px at ({x}, {y}) of level {level} cannot be "
                f"read: {_text(error)}",
                _FETCH,
            ) from None
        part = np.frombuffer(pixels, np.uint8).reshape(bottom - top, right - left, 3)
        out[top - y : bottom - y, left - x : right - x] = part
        return out

    def another(self) -> VipsReader:
        """A reader for another thread. The image and what libvips has unpacked are shared, the region is its own."""
        if not self._levels:  # closed, as after a block with a damaged tile
            return VipsReader(self.facts.path, self.choice.reason)
        twin = object.__new__(VipsReader)
        twin.facts, twin.choice, twin._levels = self.facts, self.choice, self._levels
        twin._regions = [pyvips.Region.new(level) for level in self._levels]
        return twin

    def close(self) -> None:
        """Let go of the file."""
        self._levels, self._regions = [], []

    def __enter__(self) -> VipsReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _facts(path: Path, page: tifffile.TiffPage) -> tuple[SlideFacts, int]:
    """Facts of level 0 and the number of sub-directories; the properties have OpenSlide's names."""
    width, height, samples = int(page.imagewidth), int(page.imagelength), int(page.samplesperpixel)
    bits = page.bitspersample if isinstance(page.bitspersample, int) else max(page.bitspersample)
    if bits != 8 or samples not in (3, 4) or int(page.photometric) not in _RGB_LIKE:
        name = getattr(page.photometric, "name", page.photometric)
        raise _unsupported(
            path,
            f"{samples} channel(s) of {bits} bits ({name}): not an 8-bit RGB picture of stained tissue; fluorescence "
            "and single channels are not read",
        )
    if not page.is_tiled and width * height * samples > MAX_STRIPPED_BYTES:
        raise _unsupported(path, f"{width} x {height} px without tiles cannot be read in parts")
    properties = {"openslide.vendor": "ome-tiff" if page.is_ome else "tiff"}
    if page.description:
        properties["tiff.ImageDescription"] = page.description
    tags = page.tags
    for name in ("XResolution", "YResolution"):
        value = tags.valueof(name)
        if value is not None and value[0] and value[1]:
            properties[f"tiff.{name}"] = repr(value[0] / value[1])
    if "tiff.XResolution" in properties:
        properties["tiff.ResolutionUnit"] = _UNITS.get(int(tags.valueof("ResolutionUnit", 2)), "unknown")
    size = (width, height)
    if page.is_tiled:
        names = ("openslide.level[0].tile-width", "openslide.level[0].tile-height")
        properties |= zip(names, (str(page.tilewidth), str(page.tilelength)), strict=True)
    facts = SlideFacts(
        path, properties["openslide.vendor"], *size, (size,), (1.0,), (0, 0, *size), properties
    )  # fmt: skip
    return facts, len(page.subifds or ())


def _open(path: Path, **options: int) -> pyvips.Image:
    """An image as three bands of 8 bits; nothing is decoded yet where the file has tiles."""
    image = pyvips.Image.new_from_file(str(path), page=0, access="random", fail_on="warning", **options)
    if image.format != "uchar" or image.bands not in (3, 4):
        raise pyvips.Error(f"{image.bands} bands of the type {image.format}")
    return image.flatten(background=[255, 255, 255]) if image.bands == 4 else image


def _unsupported(path: Path, problem: str) -> SlideError:
    return SlideError("unsupported_format", f"{path}: {problem}", _CONVERT)


def _text(error: pyvips.Error) -> str:
    """libvips' message in one line."""
    return "; ".join(dict.fromkeys(line.strip() for line in f"{error.message}\n{error.detail}".splitlines() if line))
