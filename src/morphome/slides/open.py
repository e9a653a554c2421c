"""Which reader a slide gets."""

from __future__ import annotations

from pathlib import Path

from morphome.errors import MorphomeError
from morphome.slides.openslide_reader import OpenSlideReader
from morphome.slides.parity import compare
from morphome.slides.reader import ReaderChoice, SlideError, SlideReader
from morphome.slides.tiff_directory import (
    NotDirectError,
    description,
    is_tiff,
    lossless_sub_directories,
    read_directory,
)
from morphome.slides.tiled_jpeg import TiledJpegReader

READERS = ("auto", "openslide")


def open_slide(path: Path, reader: str = "auto") -> SlideReader:
    """Open a slide with the fastest reader that shows the same pixels as OpenSlide.

    ``auto`` takes :class:`TiledJpegReader` where the TIFF directory allows it and some places read both ways are
    equal, :class:`OpenSlideReader` otherwise, and libvips for TIFF and OME-TIFF files that OpenSlide refuses. The
    reader's ``choice`` says which and why.

    Args:
        reader: ``slides.reader`` of the configuration, ``auto`` or ``openslide``.

    Raises:
        SlideError: ``missing_file``, ``unsupported_format``, ``unreadable`` or ``implausible_size``.
        MorphomeError: an unknown ``reader``.
    """
    if reader not in READERS:
        raise MorphomeError(f"slides.reader: '{reader}' is unknown", f"one of {', '.join(READERS)}")
    path = Path(path)
    try:
        reference = OpenSlideReader(path)
    except SlideError as error:
        refused = error.code == "unsupported_format" or "Unsupported TIFF compression" in error.problem
        if reader == "openslide" or not refused or not is_tiff(path):
            raise
        return _with_libvips(path, error)
    try:
        chosen = reference if reader == "openslide" else _fastest(reference)
    except BaseException:
        reference.close()
        raise
    if chosen is not reference:
        reference.close()
    return chosen


def _fastest(reference: OpenSlideReader) -> SlideReader:
    """The direct decoder where it shows the same pixels, otherwise the reference with the reason."""
    try:
        directory = read_directory(reference.facts)
    except NotDirectError as reason:
        reference.choice = ReaderChoice("openslide", str(reason))
        return _with_hidden_pyramid(reference) or reference
    direct = TiledJpegReader(directory, reference.facts, ReaderChoice("tiled_jpeg"))
    choice = compare(reference, direct, directory)
    if choice.name == "tiled_jpeg":
        direct.choice = choice
        return direct
    direct.close()
    reference.choice = choice
    return reference


def _with_hidden_pyramid(reference: OpenSlideReader) -> SlideReader | None:
    """libvips for OME-TIFF without loss: OpenSlide does not see its levels and reads all of level 0 for an overview."""
    facts = reference.facts
    if facts.vendor != "generic-tiff" or len(facts.level_sizes) > 1 or not lossless_sub_directories(facts.path):
        return None
    from morphome.slides.vips import VipsReader

    try:
        return VipsReader(facts.path, f"{reference.choice.reason}; its pyramid stands in sub-directories")
    except SlideError:
        return None


def _with_libvips(path: Path, refusal: SlideError) -> SlideReader:
    """An ordinary TIFF image that OpenSlide does not open."""
    from morphome.slides.vips import VipsReader

    why = refusal.problem.removeprefix(f"{path}: ")
    if refusal.code == "unsupported_format" and description(path).startswith("Aperio"):
        # OpenSlide knows Aperio's files: one that it does not recognise is cut off or damaged.
        raise SlideError(
            "unreadable",
            f"{path}: an Aperio slide whose TIFF directories are damaged or cut off: {why}",
            "fetch the file again and compare its md5, or take the slide out of the sheet",
        )
    try:
        return VipsReader(path, f"OpenSlide refuses the file: {why}")
    except SlideError as error:
        # Where OpenSlide knows the format and names the fault, its words say more.
        raise (error if refusal.code == "unsupported_format" else refusal) from None
