"""Words of clinical tables to values: missing words, numbers, sex, stage, grade."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pandas as pd

#: Average month of the Gregorian calendar; every time given in days is divided by it.
DAYS_PER_MONTH = 30.4375
DAYS_PER_YEAR = 365.25

_MISSING = {
    *("", "'--", "--", "-", ".", "nan", "na", "n/a", "#n/a", "none", "null", "<na>"),
    *("not reported", "unknown", "not applicable", "not available", "not evaluated", "unspecified"),
}
_BRACKETED = re.compile(r"\[[^\]]*\](?:\s*\|\s*\[[^\]]*\])*")
#: Words that are understood and have no place in 1-4.
_NO_NUMBER = re.compile(r"(?:stage\s*)?(?:x|0[a-z]{0,2}|tis|i{1,3}/i[iv]{1,2} nos)|(?:grade\s*)?g?[xb]")
_EVENT_WORDS = {"true": 1.0, "false": 0.0}
_VITAL_WORDS = {"dead": 1.0, "alive": 0.0, "deceased": 1.0, "living": 0.0, "1:deceased": 1.0, "0:living": 0.0}
#: Words of cBioPortal's status columns; studies of before 2020 have them without the number.
_STATUS_WORDS = {
    **{"living": 0.0, "alive": 0.0, "alive or dead tumor free": 0.0, "diseasefree": 0.0, "censored": 0.0},
    **{"deceased": 1.0, "dead": 1.0, "dead with tumor": 1.0, "recurred/progressed": 1.0, "recurred": 1.0},
    **{"progressed": 1.0, "progression": 1.0},
}
_STATUS = re.compile(r"([01])\s*(?::\s*(.*))?")
_ROMAN = {"i": 1.0, "ii": 2.0, "iii": 3.0, "iv": 4.0}
_STAGE = re.compile(r"(?:stage\s*)?(iv|i{1,3})(?:\s*[abc]?[1-3]?|s)?")
_GRADE = re.compile(r"(?:g|grade\s*|who grade\s*)([1-4]|iv|i{1,3})")


def is_missing(text: object) -> bool:
    """True for an empty cell and for the words that stand for one, as ``'--`` and ``[Not Available]|[Unknown]``."""
    if text is None or (isinstance(text, float) and math.isnan(text)):
        return True
    plain = str(text).strip().lower()
    return plain in _MISSING or _BRACKETED.fullmatch(plain) is not None


def number(text: object) -> float:
    """A finite number, NaN for a missing word; other text raises ValueError."""
    if is_missing(text):
        return math.nan
    value = float(str(text).strip())
    if not math.isfinite(value):
        raise ValueError(f"not a finite number: {text}")
    return value


def event_of(text: object, vital: bool = False) -> float:
    """1 or 0 from a number or TRUE/FALSE, NaN for a missing word; anything else raises ValueError.

    Args:
        vital: read the words of the vital status too (Dead/Alive, 1:DECEASED/0:LIVING); right for overall survival
            only, and wrong for a column in which 1 means censored.
    """
    words = {**_EVENT_WORDS, **(_VITAL_WORDS if vital else {})}
    plain = "".join(str(text).lower().split())
    value = words[plain] if plain in words else number(text)
    if value not in (0.0, 1.0) and not math.isnan(value):
        raise ValueError(f"not 0 or 1: {text}")
    return value


def status_of(text: object) -> float:
    """1 or 0 from a status of cBioPortal ("1:DECEASED", "0:DiseaseFree", "LIVING"), NaN for a missing word.

    The number before the colon decides; a known word that contradicts it, and an unknown word without a number,
    raise ValueError.
    """
    if is_missing(text):
        return math.nan
    plain = " ".join(str(text).lower().split())
    match = _STATUS.fullmatch(plain)
    word = (match.group(2) or "" if match else plain).strip()
    if match and is_missing(word):
        return float(match.group(1))
    value = float(match.group(1)) if match else _STATUS_WORDS.get(word)
    if value is None or _STATUS_WORDS.get(word, value) != value:
        raise ValueError(f"not a status: {text}")
    return value


def stage_of(text: object) -> float:
    """Stage group 1-4 of AJCC and FIGO text, substages folded in ("Stage IIIC1" -> 3, "IS" of germ cells -> 1).

    NaN for what has no place in 1-4: "Stage X", "Stage 0", a range as "I/II NOS", missing words. Plain numbers
    1-4 are taken as they are.
    """
    if is_missing(text):
        return math.nan
    plain = str(text).strip().lower()
    if plain in {"1", "2", "3", "4", "1.0", "2.0", "3.0", "4.0"}:
        return float(plain)
    match = _STAGE.fullmatch(plain)
    return _ROMAN[match.group(1)] if match else math.nan


def grade_of(text: object) -> float:
    """Grade 1-4: "G1".."G4", "Grade II", plain numbers; "Low Grade" -> 1 and "High Grade" -> 3 (two-tier systems).

    NaN for "GX", "GB" and missing words.
    """
    if is_missing(text):
        return math.nan
    plain = str(text).strip().lower()
    if plain in {"1", "2", "3", "4", "1.0", "2.0", "3.0", "4.0"}:
        return float(plain)
    if plain in {"low grade", "high grade"}:
        return 1.0 if plain == "low grade" else 3.0
    match = _GRADE.fullmatch(plain)
    if not match:
        return math.nan
    return _ROMAN.get(match.group(1)) or float(match.group(1))


def sex_of(text: object) -> str | None:
    """``"female"``, ``"male"`` or None."""
    return {"female": "female", "f": "female", "male": "male", "m": "male"}.get(str(text).strip().lower())


def word_of(text: object) -> str | None:
    """The text itself, None for a missing word."""
    return None if is_missing(text) else str(text).strip()


def convert(cells: pd.Series, rule: Callable[[object], float]) -> tuple[pd.Series, dict[str, int]]:
    """Every cell by ``rule``; with the counts of words that are not missing and gave nothing.

    Returns:
        float64 series, ``{"Stage X": 11, ...}``.
    """
    values = pd.Series([rule(cell) for cell in cells], index=cells.index, dtype=np.float64)
    lost = Counter(str(c).strip() for c, v in zip(cells, values, strict=True) if math.isnan(v) and not is_missing(c))
    return values, dict(sorted(lost.items()))


def not_understood(lost: dict[str, int]) -> dict[str, int]:
    """Of the words that gave nothing (see :func:`convert`) those that are no known word for "not staged"."""
    return {word: count for word, count in lost.items() if not _NO_NUMBER.fullmatch(word.lower())}
