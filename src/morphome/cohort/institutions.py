"""Which institution a TCGA patient comes from.

The two-letter site code of a barcode (characters 6-7) stands for an institution *and* a project: one hospital has
several codes in merged cohorts such as COADREAD and GBMLGG, and its name is written in several ways. Folds that are
to keep a hospital together need the institution, so names are put together by a list of aliases
(``data/institutions.yaml``).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import yaml

from morphome.cohort.barcode import site_of
from morphome.cohort.values import is_missing
from morphome.errors import MorphomeError

ALIASES = Path(__file__).parent / "data" / "institutions.yaml"
CDR_SITES_SHEET = "TSS_Info"
_CODE_COLUMN, _NAME_COLUMN = "tss code", "source site"


def institution_of(code: str, name: object) -> str:
    """One name per institution; the site code itself when the site has no name.

    Args:
        code: tissue source site, as "CV" or "05".
        name: as a table of sites writes it; brokers and biobanks are institutions too.
    """
    if is_missing(name):
        return str(code).strip()
    text = " ".join(str(name).split())
    return _aliases().get(_key(text), text)


def sites(patients: Iterable[object], names: Iterable[object]) -> list[str]:
    """Site of every patient: the institution that the source names, else the code in the barcode."""
    return [institution_of(site_of(str(patient)), name) for patient, name in zip(patients, names, strict=True)]


def institutions_of_sheet(sheet: pd.DataFrame, path: Path) -> dict[str, str]:
    """Institution of every site code, from the sheet ``TSS_Info`` of TCGA-CDR (Liu et al. 2018, Table S1).

    The header stands a few lines below the top and is looked for. Codes that Excel made numbers get their zero back.

    Args:
        sheet: its cells, read without a header.
        path: the book, for messages.

    Raises:
        MorphomeError: no header line, or one code with two institutions.
    """
    found: dict[str, str] = {}
    columns: tuple[int, int] | None = None
    for row in sheet.itertuples(index=False):
        words = [str(cell).strip().lower() for cell in row]
        if columns is None:
            if _CODE_COLUMN in words and _NAME_COLUMN in words:
                columns = (words.index(_CODE_COLUMN), words.index(_NAME_COLUMN))
            continue
        # "NA" is a site code here and no missing word.
        code, name = str(row[columns[0]]).strip().upper().zfill(2), row[columns[1]]
        if is_missing(name):
            continue
        institution = institution_of(code, name)
        if found.setdefault(code, institution) != institution:
            raise MorphomeError(
                f"{path}: site code '{code}' has two names, '{found[code]}' and '{institution}'",
                "correct the sheet of sites, or add the names to one entry of data/institutions.yaml",
            )
    if columns is None:
        raise MorphomeError(
            f"{path}: no columns 'TSS Code' and 'Source Site' in sheet '{CDR_SITES_SHEET}'",
            "take TCGA-CDR-SupplementalTableS1.xlsx",
        )
    return found


def _key(name: str) -> str:
    """A name as it is compared: lower case, no apostrophes, anything but letters and digits as one space."""
    plain = re.sub(r"['’`]", "", name.lower())
    return " ".join(re.findall(r"[^\W_]+", plain))


@functools.cache
def _aliases() -> dict[str, str]:
    raw = yaml.safe_load(ALIASES.read_text(encoding="utf-8"))
    table: dict[str, str] = {}
    for institution, names in raw.items():
        for name in (institution, *names):
            if table.setdefault(_key(name), institution) != institution:
                raise MorphomeError(
                    f"{ALIASES}: '{name}' stands under '{table[_key(name)]}' and under '{institution}'",
                    "keep it in one of the two",
                )
    return table
