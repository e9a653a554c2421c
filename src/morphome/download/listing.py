"""Files of the GDC, and the manifest that lists them.

The standard library only: the workflow reads a manifest while it builds its graph, so 40,000 rows must be quick.

The first five columns of ``manifest.tsv`` are the GDC's own (``id filename md5 size state``), so that any client of
the GDC can use it; the further ones say what a file is and whose.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from morphome.errors import MorphomeError
from morphome.files import write_text

#: Where the GDC answers, unless the configuration says otherwise (gdc.api).
GDC_API = "https://api.gdc.cancer.gov"
#: What a run can take from the GDC.
KINDS = ("slides", "rna", "mut", "cnv")
#: Formats of molecular tables that are files of the GDC, and the kind of file that each reads.
KIND_OF_FORMAT = {"star_counts": "rna", "maf": "mut", "gdc_gene_level": "cnv"}
COLUMNS = (
    *("id", "filename", "md5", "size", "state"),
    *("kind", "data_type", "workflow", "project", "case_ids", "sample_ids", "data_release", "local_path"),
)
_MD5 = re.compile(r"[0-9a-f]{32}")
_ID = re.compile(r"[0-9A-Za-z-]{8,64}")


def data_url(api: str, file_id: str) -> str:
    """Address of the bytes of a file; ``api``: base address of the GDC."""
    return f"{api.rstrip('/')}/data/{file_id}"


@dataclass(frozen=True, slots=True)
class GdcFile:
    """One file of the GDC.

    Attributes:
        file_id: UUID; with ``name`` it gives the place of the file, ``<folder>/<file_id>/<name>``.
        name: file name.
        md5: of the whole file, 32 hex digits.
        size: bytes.
        state: as the GDC says ("released").
        kind: one of ``KINDS``.
        data_type: "Slide Image", "Gene Expression Quantification" ...
        workflow: ``analysis.workflow_type``; empty for slides.
        project: "TCGA-HNSC".
        case_ids: distinct patients.
        sample_ids: samples, in the GDC's order; tumour and blood for files that compare them.
        data_release: "12.0 - 45.0": first and last release with this version of the file.
        local_path: a file that is already on disk, outside its place; empty otherwise.
        tissue_types, descriptors, specimen_types, preservation, data_category, version: as the GDC says, one entry
            per sample where there are several; not in the manifest, so empty after :func:`read_manifest`.
    """

    file_id: str
    name: str
    md5: str
    size: int
    state: str
    kind: str
    data_type: str
    workflow: str
    project: str
    case_ids: tuple[str, ...]
    sample_ids: tuple[str, ...]
    data_release: str
    local_path: str = ""
    tissue_types: tuple[str, ...] = ()
    descriptors: tuple[str, ...] = ()
    specimen_types: tuple[str, ...] = ()
    preservation: tuple[str, ...] = ()
    data_category: str = ""
    version: str = ""

    def path(self, folder: Path) -> Path:
        """Where the file is, or will be: ``local_path``, else ``<folder>/<file_id>/<name>``."""
        return Path(self.local_path) if self.local_path else Path(folder) / self.file_id / self.name


def check_file(file: GdcFile, where: str) -> GdcFile:
    """``file`` when its id, name and checksum can be what they should be.

    A name becomes a path, so it may not lead out of its folder, whoever wrote it.

    Raises:
        MorphomeError: beginning with ``where``.
    """
    wrong = ""
    if not _ID.fullmatch(file.file_id):
        wrong = f"'{file.file_id}' is no file id"
    elif not file.name or file.name in (".", "..") or re.search(r"[/\\\x00-\x1f]", file.name):
        wrong = f"'{file.name}' is no plain file name (file {file.file_id})"
    elif not _MD5.fullmatch(file.md5):
        wrong = f"'{file.md5}' is no md5 checksum (file {file.file_id})"
    elif file.size < 0:
        wrong = f"{file.size} is no size in bytes (file {file.file_id})"
    elif file.kind not in KINDS:
        wrong = f"'{file.kind}' is none of {', '.join(KINDS)} (file {file.file_id})"
    if wrong:
        raise MorphomeError(f"{where}: {wrong}", "make the manifest again; do not edit it by hand")
    return file


def write_manifest(files: Iterable[GdcFile], path: Path) -> None:
    """Write ``manifest.tsv``, sorted by kind, file name and id."""
    order = {kind: number for number, kind in enumerate(KINDS)}
    rows = [
        (
            *(file.file_id, file.name, file.md5, str(file.size), file.state),
            *(file.kind, file.data_type, file.workflow, file.project),
            *(",".join(file.case_ids), ",".join(file.sample_ids), file.data_release, file.local_path),
        )
        for file in sorted(files, key=lambda file: (order[file.kind], file.name, file.file_id))
    ]
    write_text(tsv([COLUMNS, *rows]), path)


def read_manifest(path: Path) -> list[GdcFile]:
    """The files of a ``manifest.tsv`` of :func:`write_manifest`, in its order.

    Raises:
        MorphomeError: naming the file and line: missing, other columns, a damaged row, or an id listed twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MorphomeError(f"{path}: file not found (manifest of the GDC)", "run the step 'manifest' first") from None
    except UnicodeDecodeError as error:
        raise MorphomeError(f"{path}: not UTF-8 text ({error})", "run the step 'manifest' again") from None
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
    header = tuple(next(reader, ()))
    if header != COLUMNS:
        raise MorphomeError(
            f"{path}: the columns are not those of a manifest of morphome ({', '.join(header)[:120]})",
            f"run the step 'manifest' again; it writes {', '.join(COLUMNS)}",
        )
    files, seen = [], set()
    for cells in reader:
        where = f"{path}, line {reader.line_num}"
        if len(cells) != len(COLUMNS) or not cells[3].isascii() or not cells[3].isdigit():
            raise MorphomeError(f"{where}: a damaged row", "run the step 'manifest' again")
        file_id, name, md5, size, state, kind, data_type, workflow, project, cases, samples, release, local = cells
        file = GdcFile(
            *(file_id, name, md5, int(size), state, kind, data_type, workflow, project),
            *(_split(cases), _split(samples), release, local),
        )
        if file_id in seen:
            raise MorphomeError(f"{where}: file {file_id} is listed twice", "run the step 'manifest' again")
        seen.add(file_id)
        files.append(check_file(file, where))
    return files


def tsv(rows: Iterable[Iterable[str]]) -> str:
    """Rows as tab-separated text; a cell with a tab, a line end or a quote stands in quotes."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter="\t", lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _split(cell: str) -> tuple[str, ...]:
    return tuple(cell.split(",")) if cell else ()
