"""The reference reader: OpenSlide, for every format that it opens."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from morphome.files import file_sample
from morphome.slides.overview import area_mean, level_for
from morphome.slides.reader import ReaderChoice, SlideError, SlideFacts, check_size
from morphome.slides.tiff_directory import TIFF_STARTS

#: Decoded tiles that OpenSlide keeps: neighbouring tiles of a row share native tiles, the default 32 MiB is too few.
CACHE_BYTES = 128 << 20


def slide_sample(path: Path) -> str:
    """:func:`morphome.files.file_sample` of a slide as it is now; of a DICOM series, of the file that is read.

    Raises:
        OSError, SlideError: it is not there, or no slide.
    """
    if not path.is_dir():
        return file_sample(path)
    with OpenSlideReader(path) as reader:
        return file_sample(reader.facts.path)


class OpenSlideReader:
    """Reference reader: every format that OpenSlide 4 opens. Transparent pixels become white.

    Args:
        path: a slide file, or a folder holding one DICOM series.

    Raises:
        SlideError: ``missing_file``, ``unsupported_format`` (an image, but of a kind that OpenSlide refuses),
            ``unreadable`` (the message holds the file size and its first bytes) or ``implausible_size``.
    """

    def __init__(self, path: Path, choice: ReaderChoice | None = None) -> None:
        self.choice = choice or ReaderChoice("openslide", "asked for")
        self._path, self._slide = _open(Path(path))
        self._slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
        properties = dict(self._slide.properties)
        width, height = self._slide.dimensions
        self.facts = SlideFacts(
            path=self._path,
            vendor=properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown"),
            width_px=width,
            height_px=height,
            level_sizes=tuple(self._slide.level_dimensions),
            level_downsamples=tuple(float(d) for d in self._slide.level_downsamples),
            bounds=_bounds(properties, width, height),
            properties=properties,
        )
        try:
            check_size(self.facts)
        except SlideError:
            self._slide.close()
            raise

    def read_level0(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Region of level 0 as uint8 (height, width, 3)."""
        return np.asarray(self._read(x, y, 0, width, height))

    def overview(self, width: int, height: int) -> np.ndarray:
        """The whole slide area-averaged to uint8 (height, width, 3).

        Reads the coarsest level that is at least about as fine as asked, block by block: a thumbnail of a file
        without a pyramid would otherwise hold all of level 0 in memory.
        """
        facts = self.facts
        level = level_for(facts, width, height)
        level_w, level_h = facts.level_sizes[level]

        def read(x: int, y: int, w: int, h: int) -> Image.Image:
            at = round(x * facts.width_px / level_w), round(y * facts.height_px / level_h)
            return self._read(*at, level, w, h)

        return area_mean(read, level_w, level_h, width, height)

    def _read(self, x: int, y: int, level: int, width: int, height: int) -> Image.Image:
        try:
            region = self._slide.read_region((x, y), level, (width, height))
        except openslide.OpenSlideError as error:
            self._reopen()
            raise SlideError(
                "unreadable",
                f"{self._path}: opens, but the {width} x {height} px at ({x}, {y}) of level {level} cannot be read: "
                f"{error} ({_head(self._path)})",
                "fetch the file again and compare its md5, or take the slide out of the sheet",
            ) from None
        alpha = region.getchannel("A")
        if alpha.getextrema()[0] == 255:
            return region.convert("RGB")
        white = Image.new("RGB", region.size, (255, 255, 255))
        white.paste(region, mask=alpha)
        return white

    def _reopen(self) -> None:
        """OpenSlide keeps an error for the rest of a handle's life: only a fresh one reads the next region."""
        path, fresh = _open(self._path)  # first: where the file is gone the old handle stays, and is closed once
        self._slide.close()
        self._path, self._slide = path, fresh
        self._slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))

    def another(self) -> OpenSlideReader:
        """A second handle on the same file."""
        return OpenSlideReader(self._path, self.choice)

    def close(self) -> None:
        """Let go of the file."""
        self._slide.close()

    def __enter__(self) -> OpenSlideReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(path: Path) -> tuple[Path, openslide.OpenSlide]:
    """The opened slide and its file; of a folder, the first file (by name) that opens."""
    files = _files(path)
    first: SlideError | None = None
    for file in files:
        try:
            return file, openslide.OpenSlide(file)
        except (openslide.OpenSlideError, OSError) as error:
            first = first or _refusal(file, error)
    raise first


def _files(path: Path) -> list[Path]:
    """The file itself, or all files of a folder by name; nothing that could be waited for without end."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return [path]
        files = sorted(f for f in path.iterdir() if f.is_file() and f.name[0] != ".") if stat.S_ISDIR(mode) else []
    except (FileNotFoundError, NotADirectoryError):
        raise SlideError("missing_file", f"{path}: file not found", "check the path in the sheet") from None
    except OSError as error:
        raise SlideError(
            "unreadable", f"{path}: {error.strerror}", "check the path in the sheet, the rights and the disk"
        ) from None
    if not stat.S_ISDIR(mode):
        raise SlideError(
            "unreadable",
            f"{path}: a pipe, socket or device and not an ordinary file",
            "copy the slide to a disk and correct the path in the sheet",
        )
    if not files:
        raise SlideError("missing_file", f"{path}: the folder is empty", "check the path in the sheet")
    return files


def _refusal(path: Path, error: Exception) -> SlideError:
    try:
        with path.open("rb") as handle:
            start = handle.read(132)
    except OSError as failed:
        return SlideError("unreadable", f"{path}: {failed.strerror}", "check the rights of the file and its disk")
    is_tiff, is_dicom = start[:4] in TIFF_STARTS, start[128:] == b"DICM"
    unknown = isinstance(error, openslide.OpenSlideUnsupportedFormatError)
    if is_dicom or (unknown and is_tiff):
        kind = "DICOM" if is_dicom else "TIFF"
        return SlideError(
            "unsupported_format",
            f"{path}: a {kind} file of a kind that OpenSlide does not open: {error} ({_head(path)})",
            "convert it to a tiled pyramidal TIFF or SVS that keeps its microns per pixel"
            + ("" if is_dicom else " (OME-TIFF is not among OpenSlide's formats)"),
        )
    return SlideError(
        "unreadable",
        f"{path}: cannot be opened as a slide: {error} ({_head(path)})",
        "fetch the file again and compare its md5, or take the slide out of the sheet",
    )


def _head(path: Path) -> str:
    """Size and first bytes of a file, for messages: an HTML error page saved as .svs is seen at once."""
    with path.open("rb") as handle:
        start = handle.read(24)
    return f"{path.stat().st_size} bytes, first bytes {start!r}"


def _bounds(properties: dict[str, str], width: int, height: int) -> tuple[int, int, int, int]:
    """Scanned area in level-0 px, clipped to the slide; the whole slide without (or with broken) bounds."""
    names = (
        openslide.PROPERTY_NAME_BOUNDS_X,
        openslide.PROPERTY_NAME_BOUNDS_Y,
        openslide.PROPERTY_NAME_BOUNDS_WIDTH,
        openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
    )
    try:
        x, y, w, h = (int(properties[name]) for name in names)
    except (KeyError, ValueError):
        return 0, 0, width, height
    left, top = min(max(x, 0), width), min(max(y, 0), height)
    right, bottom = min(x + w, width), min(y + h, height)
    if right <= left or bottom <= top:
        return 0, 0, width, height
    return left, top, right - left, bottom - top
