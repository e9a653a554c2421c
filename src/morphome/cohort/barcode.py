"""TCGA barcodes, read by their parts and never by searching for letters.

A barcode is ``TCGA-<site>-<participant>[-<sample code><vial>[-<portion>[<analyte>][-<slide>|-<plate>-<centre>]]]``
(TCGA barcode page of the GDC encyclopaedia). The standard library only: the workflow reads barcodes while it
builds its graph.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from morphome.errors import MorphomeError

#: Sample codes that count as the tumour under study, best first: primary solid tumour, primary blood tumour,
#: metastasis (most of SKCM has no other). Recurrences (02), new primaries (05) and normals (10-14) do not.
TUMOUR_CODES = ("01", "03", "06")

#: What a sample code means, for reasons shown to a reader.
SAMPLE_CODES = {
    "01": "primary solid tumour",
    "02": "recurrent solid tumour",
    "03": "primary blood tumour",
    "05": "additional new primary",
    "06": "metastasis",
    "07": "additional metastasis",
    "10": "blood normal",
    "11": "solid tissue normal",
    "12": "buccal normal",
}

#: Endings of slide and feature files; only these are cut from a name to make a slide id.
FILE_SUFFIXES = (
    *(".ome.tiff", ".ome.tif", ".svs", ".svslide", ".tiff", ".tif", ".ndpi", ".mrxs", ".scn"),
    *(".vms", ".vmu", ".bif", ".czi", ".dcm", ".isyntax", ".h5", ".pt"),
)

_PATTERN = re.compile(
    r"^TCGA-(?P<site>[A-Z0-9]{2})-(?P<participant>[A-Z0-9]{4})"
    r"(?:-(?P<sample_code>\d{2})(?P<vial>[A-Z])?"
    r"(?:-(?P<portion>\d{2})(?P<analyte>[A-Z])?"
    r"(?:-(?:(?P<slide>(?:DX|TS|BS|MS)[A-Z0-9]{0,3})|(?P<plate>[A-Z0-9]{4})(?:-(?P<centre>\d{2}))?))?"
    r")?)?(?P<rest>$|[.].*$)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Barcode:
    """The parts of a TCGA barcode; parts that the text does not have are empty."""

    site: str
    participant: str
    sample_code: str = ""
    vial: str = ""
    portion: str = ""
    analyte: str = ""
    slide: str = ""
    plate: str = ""
    centre: str = ""

    @property
    def patient(self) -> str:
        """The first twelve characters: ``TCGA-<site>-<participant>``."""
        return f"TCGA-{self.site}-{self.participant}"

    @property
    def slide_type(self) -> str:
        """``DX`` (diagnostic), ``TS``/``BS``/``MS`` (top, bottom, middle of a frozen block) or empty."""
        return self.slide[:2]


def try_barcode(text: str) -> Barcode | None:
    """The barcode at the start of ``text`` (a file name or ``….uuid`` may follow after a dot), or None."""
    match = _PATTERN.match(text.strip())
    if match is None:
        return None
    parts = {key: (value or "").upper() for key, value in match.groupdict().items() if key != "rest"}
    return Barcode(**parts)


def parse_barcode(text: str) -> Barcode:
    """As :func:`try_barcode`, but anything else is an error.

    Raises:
        MorphomeError: ``text`` is no TCGA barcode.
    """
    found = try_barcode(text)
    if found is None:
        raise MorphomeError(
            f"'{text}' is not a TCGA barcode",
            "a barcode looks like TCGA-2F-A9KO or TCGA-2F-A9KO-01Z-00-DX1; check the column of ids",
        )
    return found


def site_of(patient_id: str) -> str:
    """Tissue source site (characters 6-7 of the barcode, kept as text), or ``"unknown"`` for other ids."""
    found = try_barcode(patient_id)
    return found.site if found else "unknown"


def cut_suffix(name: str, suffixes: tuple[str, ...] = FILE_SUFFIXES) -> str:
    """``name`` without one known file ending (any case). Other dots, as before a UUID, stay.

    Stripping the *characters* of ".svs" would eat ids that end in s or v.
    """
    lowered = name.lower()
    for suffix in suffixes:
        if lowered.endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def sample_name(code: str) -> str:
    """``"02 (recurrent solid tumour)"``: a sample code with its meaning."""
    return f"{code} ({SAMPLE_CODES[code]})" if code in SAMPLE_CODES else code
