"""Who and what is in the simulated cohort: patients, hospitals, slides and the name of every file.

A pure function of the settings, in the standard library only, because the workflow asks for the list of files
before anything has run. Everything is chosen by sha256, whose order no Python release changes.
"""

from __future__ import annotations

import hashlib
import string
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from morphome.errors import MorphomeError

PROJECT = "SIM-DEMO"
#: Site codes "0A".."0Z": TCGA has no site that begins with a zero and ends in a letter.
SITE_CODES = tuple("0" + letter for letter in string.ascii_uppercase)
PEN_SHARE, BLUR_SHARE, NO_MAF_SHARE = 0.15, 0.10, 0.04
#: Files beside the slides and the molecular tables.
TABLES = (
    *("clinical.tsv", "sample_sheet.tsv", "gene_groups.gmt"),
    *("oracle.json", "truth.parquet", "slide_truth.parquet"),
)


@dataclass(frozen=True)
class SlideDesign:
    """One slide.

    Attributes:
        slide_id: file name without its ending, as the GDC names diagnostic slides.
        number: 1 for the patient's first slide, 2 for the second.
        pen: colour of a pen mark, or empty.
        blurred: a part of the slide is out of focus.
        damaged: the file opens, but its level-0 tissue cannot be decoded.
    """

    slide_id: str
    patient_id: str
    file_name: str
    file_id: str
    number: int
    pen: str = ""
    blurred: bool = False
    damaged: bool = False


@dataclass(frozen=True)
class MolecularFile:
    """One molecular file: ``panel`` is rna, mut or cnv; ``path`` is relative to the folder of the cohort."""

    panel: str
    patient_id: str
    file_id: str
    file_name: str

    @property
    def path(self) -> str:
        return f"{self.panel}/{self.file_id}/{self.file_name}"


@dataclass(frozen=True)
class Design:
    """Everything about the cohort that its settings decide before a random number is drawn.

    Attributes:
        patients: the planted patients, sorted.
        without_slide: patients of the clinical table that have no file at all (the flow must show their loss).
        sites: site code of every patient, of those without a slide too.
        empty_maf: patients whose mutation file has no rows (no mutation, which differs from no file).
    """

    patients: list[str]
    without_slide: list[str]
    sites: dict[str, str]
    slides: list[SlideDesign]
    molecular: list[MolecularFile]
    empty_maf: list[str]

    @property
    def files(self) -> list[str]:
        """Relative paths of all files of the cohort."""
        return [
            *TABLES,
            *(f"slides/{slide.file_name}" for slide in self.slides),
            *(file.path for file in self.molecular),
        ]


def design(simulate: Mapping[str, Any]) -> Design:
    """The design of the cohort that the section ``simulate`` of a configuration describes.

    Slides that cannot be read are second slides as long as there are any, so that no patient is lost by them.

    Args:
        simulate: ``patients, sites, second_slide_share, bad_slides, seed`` (other keys change contents only).

    Raises:
        MorphomeError: more sites than site codes or patients, or more bad slides than slides.
    """
    count, site_count, seed = simulate["patients"], simulate["sites"], simulate["seed"]
    if site_count > min(count, len(SITE_CODES)):
        raise MorphomeError(
            f"simulate.sites: {site_count} sites for {count} patients",
            f"at most one site per patient, and at most {len(SITE_CODES)}",
        )
    ids = _patient_ids(count + 1, site_count, seed)
    patients, without_slide = sorted(ids[:count]), ids[count:]
    order = _shuffled(seed, "second slide", patients)
    second = set(order[: round(simulate["second_slide_share"] * count)])
    slides = _slides(patients, second, simulate["bad_slides"], seed)
    order = _shuffled(seed, "maf", patients)
    missing = round(NO_MAF_SHARE * count)
    no_maf, empty_maf = set(order[:missing]), order[missing : missing + 1]
    return Design(
        patients=patients,
        without_slide=without_slide,
        sites={patient: patient[5:7] for patient in ids},
        slides=slides,
        molecular=[
            _molecular(panel, patient, seed)
            for panel in ("rna", "mut", "cnv")
            for patient in patients
            if not (panel == "mut" and patient in no_maf)
        ],
        empty_maf=empty_maf,
    )


def made_up_uuid(seed: int, *parts: Any) -> str:
    """A version-4 UUID that depends on ``seed`` and ``parts`` only."""
    return str(uuid.UUID(bytes=_digest(seed, *parts)[:16], version=4))


def made_up_number(below: int, *parts: Any) -> int:
    """An integer in ``[0, below)`` that depends on ``parts`` only."""
    return int.from_bytes(_digest(*parts)[:8], "big") % below


def _patient_ids(count: int, sites: int, seed: int) -> list[str]:
    """Barcodes with made-up participants; the sites are filled in turn, so that they are equally large."""
    letters = string.digits + string.ascii_uppercase
    found: dict[str, None] = {}
    attempt = 0
    while len(found) < count:
        number = made_up_number(36**3, seed, "participant", attempt)
        code = "S" + letters[number // 1296] + letters[number // 36 % 36] + letters[number % 36]
        found.setdefault(code)
        attempt += 1
    return [f"TCGA-{SITE_CODES[i % sites]}-{code}" for i, code in enumerate(found)]


def _slides(patients: Sequence[str], second: set[str], bad: int, seed: int) -> list[SlideDesign]:
    keys = [(patient, number) for patient in patients for number in (1, 2) if number == 1 or patient in second]
    if bad > len(keys):
        raise MorphomeError(
            f"simulate.bad_slides: {bad} of only {len(keys)} slides", "ask for fewer bad slides or more patients"
        )
    damaged = sorted(_shuffled(seed, "bad", keys), key=lambda key: -key[1])[:bad]
    sound = [key for key in keys if key not in damaged]
    pen = _shuffled(seed, "pen", sound)[: round(PEN_SHARE * len(keys))]
    blurred = _shuffled(seed, "blur", sound)[: round(BLUR_SHARE * len(keys))]
    slides = []
    for patient, number in keys:
        slide_id = f"{patient}-01Z-00-DX{number}.{made_up_uuid(seed, 'slide', patient, number).upper()}"
        key = (patient, number)
        slides.append(
            SlideDesign(
                slide_id=slide_id,
                patient_id=patient,
                file_name=f"{slide_id}.svs",
                file_id=made_up_uuid(seed, "slide file", patient, number),
                number=number,
                pen=("blue", "green", "black")[pen.index(key) % 3] if key in pen else "",
                blurred=key in blurred,
                damaged=key in damaged,
            )
        )
    return slides


def _molecular(panel: str, patient: str, seed: int) -> MolecularFile:
    name = made_up_uuid(seed, panel, "name", patient)
    ending = {
        "rna": f"{name}.rna_seq.augmented_star_gene_counts.tsv",
        "mut": f"{name}.wxs.aliquot_ensemble_masked.maf.gz",
        "cnv": f"{PROJECT}.{name}.ascat3.gene_level_copy_number.v36.tsv",
    }[panel]
    return MolecularFile(panel, patient, made_up_uuid(seed, panel, patient), ending)


def _shuffled(seed: int, label: str, items: Sequence[Any]) -> list[Any]:
    return sorted(items, key=lambda item: _digest(seed, label, item))


def _digest(*parts: Any) -> bytes:
    return hashlib.sha256("|".join(map(str, parts)).encode()).digest()
