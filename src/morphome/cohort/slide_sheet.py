"""Which slides there are and whose: own sheets and GDC sample sheets.

The standard library only, because the workflow reads the sheet while it builds its graph.

* **Own sheet**: TSV or CSV with the columns ``slide_id``, ``patient_id``, ``path`` and, if wanted,
  ``sample_type`` and ``slide_type``. Every row is taken: who lists a slide means it. A relative path is looked
  up in the working directory first, then in the sheet's folder.
* **GDC sample sheet** (with the folder of the files): rows of the data type "Slide Image"; the slide id is the
  file name without its ending; the file lies at ``<folder>/<File ID>/<File Name>`` (as gdc-client writes it) or
  ``<folder>/<File Name>``, or where a column "Local Path" says. Diagnostic slides (DX) of the tumour under study are
  chosen, the others come back with a reason.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from morphome.cohort.barcode import TUMOUR_CODES, cut_suffix, sample_name, try_barcode
from morphome.errors import MorphomeError

#: Slide ids become file names and wildcards of the workflow: letters, digits, . _ ( ) + - and inner spaces.
_SAFE_ID = re.compile(r"[A-Za-z0-9_(](?:[A-Za-z0-9._()+ -]*[A-Za-z0-9_()+-])?")
_MAX_ID = 150
_SLIDE_IMAGE = "slide image"
#: The sheet's own words for what the barcode says in digits (older and newer sheets).
_TEXT_CODES = {
    "primary tumor": "01",
    "primary": "01",
    "recurrent tumor": "02",
    "recurrence": "02",
    "primary blood derived cancer - peripheral blood": "03",
    "primary blood derived cancer - bone marrow": "03",
    "additional - new primary": "05",
    "new primary": "05",
    "metastatic": "06",
    "metastasis": "06",
    "additional metastatic": "07",
    "blood derived normal": "10",
    "solid tissue normal": "11",
    "normal": "11",
}


@dataclass(frozen=True)
class SlideRow:
    """One slide of a sheet.

    Attributes:
        slide_id: safe as a file name.
        patient_id: the case.
        path: as given or as found; empty when the sheet has none (features made elsewhere).
        sample_type: TCGA sample code ("01") or the sheet's words; may be empty.
        slide_type: "DX", "TS", "BS" or empty.
        reason: empty for a chosen slide, else why it was left out.
        file_id: of the GDC, where the sheet has it.
        size_bytes: as the sheet says; None when it does not.
    """

    slide_id: str
    patient_id: str
    path: str
    sample_type: str = ""
    slide_type: str = ""
    reason: str = ""
    file_id: str = ""
    size_bytes: int | None = None


def few_names(names: Iterable[object], most: int = 6) -> str:
    """The first names, each cut to 40 characters, and how many there are in all when some are left out."""
    listed = [str(name) for name in names]
    shown = ", ".join(name if len(name) <= 40 else name[:37] + "..." for name in listed[:most])
    return shown + (f", ... ({len(listed)} in all)" if len(listed) > most else "")


def check_utf8(raw: bytes, path: Path, setting: str) -> None:
    """Refuse bytes that are no UTF-8 text, naming the file and the line."""
    try:
        if not raw.isascii():
            raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise MorphomeError(
            f"{path}, line {line}: not UTF-8 text ({setting})", "save the table as UTF-8 (CSV or TSV)"
        ) from None


def delimiter_of(header: str, path: Path, setting: str) -> str:
    """A tab when the header line has one, else a comma; a header of one column with semicolons is refused."""
    if "\t" in header:
        return "\t"
    if "," not in header and ";" in header:
        raise MorphomeError(
            f"{path}: the header is one column, '{few_names([header.strip()])}': separated by semicolons? ({setting})",
            "save the table with commas or tabs",
        )
    return ","


def read_rows(sheet: Path, setting: str = "slides.sheet") -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a TSV or CSV (tabs in the header line decide), as text, with the line in ``""``.

    Raises:
        MorphomeError: missing, empty, not UTF-8, separated by semicolons, a column named twice, or a row of another
            length.
    """
    try:
        raw = Path(sheet).read_bytes()
    except FileNotFoundError:
        raise MorphomeError(f"{sheet}: file not found ({setting})", f"check the path in {setting}") from None
    except IsADirectoryError:
        raise MorphomeError(f"{sheet}: is a folder, not a table ({setting})", "name the file") from None
    check_utf8(raw, sheet, setting)
    text = raw.decode("utf-8-sig")
    first_line = text.split("\n", 1)[0]
    if not first_line.strip():
        raise MorphomeError(f"{sheet}: the table is empty ({setting})", "the first line holds the columns")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter_of(first_line, sheet, setting))
    header = [name.strip() for name in next(reader)]
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise MorphomeError(f"{sheet}: the column '{twice[0]}' occurs twice", "rename or remove one of them")
    rows = []
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise MorphomeError(
                f"{sheet}, line {reader.line_num}: {len(cells)} cells, but the header has {len(header)}",
                "a cell with a comma or a tab must stand in double quotes",
            )
        row = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
        rows.append({**row, "": str(reader.line_num)})
    return header, rows


def is_gdc(header: list[str]) -> bool:
    """True for the header of a GDC sample sheet."""
    return {"File ID", "File Name", "Case ID"} <= set(header)


def read_slide_sheet(
    sheet: Path,
    folder: Path | None = None,
    *,
    require_path: bool = True,
    codes: Sequence[str] = TUMOUR_CODES,
) -> tuple[list[SlideRow], list[SlideRow]]:
    """Chosen and left-out slides of a sheet, both in the order of the sheet.

    Args:
        sheet: own sheet or GDC sample sheet (see the module).
        folder: where the files of a GDC sample sheet lie.
        require_path: False when features come from elsewhere: the sheet then only says whose slide it is.
        codes: TCGA sample codes of the tumour under study.

    Returns:
        ``(chosen, left_out)``; the rows of ``left_out`` carry a ``reason``.

    Raises:
        MorphomeError: naming the sheet and line: a missing column, id or path, an unsafe or repeated slide id, a
            path with braces, or a file listed twice.
    """
    header, rows = read_rows(sheet)
    if is_gdc(header):
        if folder is None and require_path:
            raise MorphomeError(
                f"{sheet}: a GDC sample sheet needs the folder of its files",
                "set slides.folder to the folder that gdc-client filled",
            )
        rows = [row for row in rows if row.get("Data Type", _SLIDE_IMAGE).lower() == _SLIDE_IMAGE]
        slides = prefer_samples([_gdc_slide(row, sheet, folder, codes) for row in rows], codes)
    else:
        needed = ["slide_id", "patient_id", *(["path"] if require_path else [])]
        if missing := [name for name in needed if name not in header]:
            raise MorphomeError(
                f"{sheet}: no column '{missing[0]}' (slides.sheet); found: {few_names(header)}",
                f"a sheet of slides has the columns {', '.join(needed)}, or it is a GDC sample sheet "
                "(File ID, File Name, Case ID)",
            )
        slides = [_own_slide(row, sheet, require_path) for row in rows]
    if not slides:
        raise MorphomeError(f"{sheet}: no slides in the sheet (slides.sheet)", "check that it is the right sheet")
    seen: dict[str, int] = {}
    for number, slide in enumerate(slides):
        if slide.slide_id in seen:
            raise MorphomeError(
                f"{sheet}: slide id '{slide.slide_id}' occurs twice (patients "
                f"{slides[seen[slide.slide_id]].patient_id} and {slide.patient_id})",
                "give every slide its own id, or remove the repeated row",
            )
        seen[slide.slide_id] = number
    if require_path:
        _check_paths(slides, [row[""] for row in rows], sheet)
    return [s for s in slides if not s.reason], [s for s in slides if s.reason]


def _check_paths(slides: list[SlideRow], lines: list[str], sheet: Path) -> None:
    """Refuse a chosen slide whose path holds braces, which the workflow would read, or is that of another row."""
    seen: dict[str, tuple[SlideRow, str]] = {}
    for slide, line in zip(slides, lines, strict=True):
        if slide.reason:
            continue
        if "{" in slide.path or "}" in slide.path:
            raise MorphomeError(
                f"{sheet}, line {line}: the path of slide '{slide.slide_id}' holds braces, which the workflow takes "
                f"for wildcards: {slide.path}",
                "rename the file or its folder without { and }",
            )
        file = os.path.realpath(slide.path)
        if file in seen:
            other, before = seen[file]
            raise MorphomeError(
                f"{sheet}, lines {before} and {line}: the same file is listed twice, as slide '{other.slide_id}' of "
                f"patient {other.patient_id} and as slide '{slide.slide_id}' of patient {slide.patient_id}: {file}",
                "correct one of the paths, or remove one of the rows",
            )
        seen[file] = (slide, line)


def check_slide_id(slide_id: str, where: str) -> str:
    """``slide_id`` when it is safe as a file name.

    Raises:
        MorphomeError: it is empty, longer than 150 characters, holds "/", "..", other unusual characters, or
            starts with a dot, a dash or a space.
    """
    safe = _SAFE_ID.fullmatch(slide_id) and ".." not in slide_id and len(slide_id) <= _MAX_ID
    if not safe:
        shown = slide_id if len(slide_id) <= 80 else slide_id[:77] + "..."
        raise MorphomeError(
            f"{where}: slide id '{shown}' cannot be used as a file name",
            "use letters, digits, . _ ( ) + - and inner spaces, no '..', at most 150 characters, "
            "not starting with a dot or a dash",
        )
    return slide_id


def locate(folder: Path, file_id: str, file_name: str) -> Path:
    """``<folder>/<File Name>`` when only that exists, else ``<folder>/<File ID>/<File Name>`` (which may not)."""
    nested, flat = Path(folder) / file_id / file_name, Path(folder) / file_name
    return flat if not file_id or (flat.exists() and not nested.exists()) else nested


def check_file_name(row: dict[str, str], sheet: Path) -> tuple[str, str]:
    """File ID and File Name of a row of a GDC sheet; neither may lead out of the folder.

    Raises:
        MorphomeError: an empty file name, or a name with a folder in it.
    """
    file_id, name = row.get("File ID", ""), row.get("File Name", "")
    bad = not name or any(part in (".", "..") or "/" in part or "\\" in part for part in (file_id, name))
    if bad:
        raise MorphomeError(
            f"{sheet}, line {row['']}: '{name}' is not a plain file name", "use the sheet as the GDC wrote it"
        )
    return file_id, name


def cases_of(row: dict[str, str]) -> list[str]:
    """Distinct patients of a row of a GDC sheet (several are joined by commas), in their order."""
    cases = [cell.strip() for cell in row.get("Case ID", "").split(",")]
    return list(dict.fromkeys(case for case in cases if case))


def sample_codes(row: dict[str, str]) -> list[tuple[str, str]]:
    """Distinct ``(sample code, vial)`` of a row of a GDC sheet, in their order.

    From the sample barcodes; for other projects' ids from the sheet's words (Sample Type, or Tissue Type with
    Tumor Descriptor, which replaced it), without a vial. Empty when the sheet says nothing that is known.
    """
    found = []
    for cell in row.get("Sample ID", "").split(","):
        barcode = try_barcode(cell)
        if barcode and barcode.sample_code:
            found.append((barcode.sample_code, barcode.vial))
    if not found:
        for cell in row.get("Sample Type", "").split(","):
            if code := _TEXT_CODES.get(cell.strip().lower()):
                found.append((code, ""))
    if not found:
        tissues = [cell.strip().lower() for cell in row.get("Tissue Type", "").split(",")]
        descriptors = [cell.strip().lower() for cell in row.get("Tumor Descriptor", "").split(",")]
        for number, tissue in enumerate(tissues):
            descriptor = descriptors[number] if number < len(descriptors) else ""
            code = "11" if tissue == "normal" else _TEXT_CODES.get(descriptor)
            if code:
                found.append((code, ""))
    return list(dict.fromkeys(found))


def choose_slide(slide: SlideRow, codes: Sequence[str] = TUMOUR_CODES) -> SlideRow:
    """The slide with a reason when it is no diagnostic slide of the tumour under study (sample codes ``codes``).

    Slides whose type or sample is not known are kept: other projects have neither in their ids.
    """
    reason = slide.reason
    if not reason and slide.slide_type and slide.slide_type != "DX":
        reason = f"not a diagnostic slide ({slide.slide_type}: frozen section)"
    if not reason and slide.sample_type.isdigit() and slide.sample_type not in codes:
        reason = f"sample type {sample_name(slide.sample_type)}"
    return replace(slide, reason=reason)


def prefer_samples(slides: Sequence[SlideRow], codes: Sequence[str] = TUMOUR_CODES) -> list[SlideRow]:
    """The same slides; of a patient who has several kinds of tumour samples only the first of ``codes`` stays chosen.

    Molecular files follow the same order, so slides and genes are of the same kind of sample.
    """
    best: dict[str, int] = {}
    for slide in slides:
        if not slide.reason and slide.sample_type in codes:
            rank = codes.index(slide.sample_type)
            best[slide.patient_id] = min(rank, best.get(slide.patient_id, rank))
    out = []
    for slide in slides:
        first = codes[best[slide.patient_id]] if slide.patient_id in best else slide.sample_type
        if not slide.reason and slide.sample_type in codes and slide.sample_type != first:
            slide = replace(slide, reason=f"sample type {sample_name(slide.sample_type)}, the patient has {first}")
        out.append(slide)
    return out


def slide_from_id(slide_id: str, patient_id: str, path: str = "") -> SlideRow:
    """A slide whose sample and slide type are read from its own TCGA barcode (else left empty)."""
    barcode = try_barcode(slide_id)
    if barcode is None:
        return SlideRow(slide_id, patient_id, path)
    return SlideRow(slide_id, patient_id, path, barcode.sample_code, barcode.slide_type)


def _gdc_slide(row: dict[str, str], sheet: Path, folder: Path | None, codes: Sequence[str]) -> SlideRow:
    where = f"{sheet}, line {row['']}"
    file_id, name = check_file_name(row, sheet)
    slide_id = check_slide_id(cut_suffix(name), where)
    cases = cases_of(row)
    if not cases:
        raise MorphomeError(f"{where}: no Case ID for '{name}'", "use the sheet as the GDC wrote it")
    path = row.get("Local Path") or (str(locate(folder, file_id, name)) if folder is not None else "")
    size = row.get("File Size", "")
    slide = slide_from_id(slide_id, cases[0], path)
    slide = replace(slide, file_id=file_id, size_bytes=int(size) if size.isdigit() else None)
    if len(cases) > 1:
        return replace(slide, patient_id=", ".join(cases), reason="tissue of several patients")
    if not slide.sample_type:  # some slides hang on a portion, other projects have no barcode in the name
        found = [code for code, _ in sample_codes(row)]
        outside = [code for code in found if code not in codes]
        slide = replace(slide, sample_type=(outside or found or [row.get("Sample Type", "")])[0])
    return choose_slide(slide, codes)


def _own_slide(row: dict[str, str], sheet: Path, require_path: bool) -> SlideRow:
    where = f"{sheet}, line {row['']}"
    slide_id = check_slide_id(row["slide_id"], where)
    if not row["patient_id"]:
        raise MorphomeError(f"{where}: slide '{slide_id}' has no patient_id", "fill the cell or remove the row")
    path = row.get("path", "")
    if not path and require_path:
        raise MorphomeError(f"{where}: slide '{slide_id}' has no path", "fill the cell or remove the row")
    if path and not Path(path).is_absolute() and not Path(path).exists():
        beside = Path(sheet).parent / path
        path = str(beside) if beside.exists() else path
    slide = slide_from_id(slide_id, row["patient_id"], path)
    return replace(
        slide,
        sample_type=row.get("sample_type", "") or slide.sample_type,
        slide_type=row.get("slide_type", "") or slide.slide_type,
    )
