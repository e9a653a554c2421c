"""Which reader a slide gets."""

from __future__ import annotations

from pathlib import Path

from morphome.slides.openslide_reader import OpenSlideReader
from morphome.slides.reader import SlideReader


def open_slide(path: Path, reader: str = "auto") -> SlideReader:
    """Open a slide with the fastest reader that shows the same pixels as OpenSlide.

    Args:
        reader: ``slides.reader`` of the configuration, ``auto`` or ``openslide``.

    Raises:
        SlideError: ``missing_file``, ``unsupported_format`` or ``unreadable``.
    """
    return OpenSlideReader(Path(path))
