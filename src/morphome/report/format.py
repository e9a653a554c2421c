"""How numbers and tables look: rounding, signs, missing values with footnotes. Knows no survival analysis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

#: What stands for a value that is not there.
MISSING = "–"
_MINUS = "−"


def is_missing(value: Any) -> bool:
    """True for None, NaN, infinities and pandas' own missing values."""
    if value is None or value is False or value is True:
        return value is None
    try:
        return not math.isfinite(float(value))
    except (TypeError, ValueError):
        return str(value) in {"", "nan", "<NA>", "None"}


def number(value: Any, digits: int = 3, sign: bool = False) -> str:
    """A number with a fixed count of decimals, a real minus sign, thousands commas; a dash when missing."""
    if is_missing(value):
        return MISSING
    text = f"{float(value):{'+' if sign else ''},.{digits}f}"
    if float(text.replace(",", "")) == 0:  # no "-0.000"
        text = text.lstrip("+-")
    return text.replace("-", _MINUS)


def interval(lower: Any, upper: Any, digits: int = 3, sign: bool = False) -> str:
    """``[lower, upper]``; empty when a limit is missing."""
    if is_missing(lower) or is_missing(upper):
        return ""
    return f"[{number(lower, digits, sign)}, {number(upper, digits, sign)}]"


def estimate(value: Any, lower: Any, upper: Any, digits: int = 3, sign: bool = False) -> str:
    """``value [lower, upper]``."""
    return f"{number(value, digits, sign)} {interval(lower, upper, digits, sign)}".strip()


def count(value: Any) -> str:
    """A whole number with thousands commas."""
    return number(value, 0)


def brief(value: Any) -> str:
    """A large number in a few characters: 8, 41.6 k, 21.7 M."""
    if is_missing(value) or abs(float(value)) < 10_000:
        return count(value)
    v = float(value)
    return f"{v / 1e3:.1f} k" if v < 1e6 else f"{v / 1e6:.1f} M"


def share(part: int, whole: int) -> str:
    """``part (percent)``."""
    return f"{count(part)} ({100 * part / whole:.0f} %)" if whole else count(part)


def spread(values: Any, digits: int = 0) -> str:
    """``median [lower quartile, upper quartile]`` of the values present."""
    import numpy as np

    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    if not len(known):
        return MISSING
    low, middle, high = np.quantile(known, [0.25, 0.5, 0.75])
    return f"{number(middle, digits)} [{number(low, digits)}, {number(high, digits)}]"


def excludes(lower: Any, upper: Any, value: float) -> int:
    """+1 when the whole interval lies above ``value``, −1 below, 0 when it contains it or is missing."""
    if is_missing(lower) or is_missing(upper):
        return 0
    return 1 if lower > value else -1 if upper < value else 0


def reading(lower: Any, upper: Any) -> str:
    """What a paired difference allows one to say."""
    side = excludes(lower, upper, 0.0)
    if is_missing(lower) or is_missing(upper):
        return "no interval: no difference can be called"
    if side == 0:
        return "no difference can be called"
    return f"{'higher' if side > 0 else 'lower'} (an indication; the interval excludes 0)"


def duration(seconds: Any) -> str:
    """Seconds as ``12 s``, ``3.4 min`` or ``2.1 h``."""
    if is_missing(seconds):
        return MISSING
    s = float(seconds)
    if s < 1:
        return "< 1 s"
    if s < 100:
        return f"{s:.0f} s"
    if s < 6000:
        return f"{s / 60:.1f} min"
    return f"{s / 3600:.1f} h"


def plural(n: int, one: str, many: str | None = None) -> str:
    """``1 patient``, ``2 patients``."""
    return f"{count(n)} {one if n == 1 else many or one + 's'}"


def span(values: Sequence[int]) -> str:
    """``59``, or ``237 to 238``."""
    low, high = min(values), max(values)
    return count(low) if low == high else f"{count(low)} to {count(high)}"


def months(value: Any) -> str:
    """A time in months without needless decimals."""
    return MISSING if is_missing(value) else f"{float(value):g} months"


def listing(items: Sequence[str], most: int = 6) -> str:
    """``a, b, c and 4 more``."""
    items = [str(item) for item in items]
    if len(items) <= most:
        return ", ".join(items)
    return f"{', '.join(items[:most])} and {len(items) - most} more"


def slug(text: str) -> str:
    """A name that can stand in an HTML id."""
    return "".join(c if (c.isalnum() and c.isascii()) or c == "_" else "-" for c in text) or "x"


@dataclass
class Column:
    """A column of a displayed table. ``kind`` is ``text``, ``num`` or ``plot``; ``help`` becomes a tooltip."""

    label: str | Markup
    kind: str = "text"
    help: str = ""


@dataclass
class View:
    """A table to display: plain texts are escaped by the template, ``Markup`` is taken as it is."""

    id: str
    caption: str
    columns: list[Column]
    rows: list[list[Any]] = field(default_factory=list)
    row_classes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, cells: Sequence[Any], css: str = "") -> None:
        """Append a row; its first cell is the row's heading."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{self.id}: {len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(list(cells))
        self.row_classes.append(css)

    def mark(self, cell: str, note: str) -> Markup:
        """``cell`` with a superscript letter that leads to ``note`` below the table; equal notes share a letter."""
        if not note:
            return Markup(escape(cell))
        if note not in self.notes:
            self.notes.append(note)
        at = self.notes.index(note)
        return Markup('{}<sup><a href="#{}-n{}" title="{}">{}</a></sup>').format(
            cell, self.id, at, note, self.letter(at)
        )

    @staticmethod
    def letter(index: int) -> str:
        """a ... z, then a1, b1 ..."""
        return chr(ord("a") + index % 26) + (str(index // 26) if index >= 26 else "")
