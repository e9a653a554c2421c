"""Small inline SVG drawn by hand: forest plots inside tables. Only numbers and escaped text go in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from morphome.report import format as fmt

WIDTH, HEIGHT, PAD = 190, 26, 10


@dataclass(frozen=True)
class Scale:
    """A horizontal axis shared by the rows of one table."""

    low: float
    high: float
    step: float

    def x(self, value: float) -> float:
        """Position in pixels, clipped to the axis."""
        inner = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(PAD + inner * (WIDTH - 2 * PAD), 1)

    @property
    def ticks(self) -> list[float]:
        """Tick values."""
        n = round((self.high - self.low) / self.step)
        return [round(self.low + i * self.step, 6) for i in range(n + 1)]


def scale_for(values: Sequence[float], always: float) -> Scale:
    """An axis with round limits that holds ``values`` and ``always``, with at most six ticks."""
    known = [float(v) for v in values if not fmt.is_missing(v)] + [always]
    low, high = min(known), max(known)
    for step in (0.05, 0.1, 0.2, 0.5):
        a, b = np.floor(low / step + 1e-9) * step, np.ceil(high / step - 1e-9) * step
        if b - a < 2 * step:
            a, b = a - step, b + step
        if (b - a) / step <= 5.001:
            break
    return Scale(round(float(a), 6), round(float(b), 6), step)


def axis(scale: Scale, label: str, reference: float) -> Markup:
    """The axis for a table's head."""
    parts = [
        f'<text x="{scale.x(t)}" y="{HEIGHT - 8}" text-anchor="middle">{escape(_tick(t))}</text>'
        f'<line x1="{scale.x(t)}" x2="{scale.x(t)}" y1="{HEIGHT - 4}" y2="{HEIGHT}" class="tick"/>'
        for t in scale.ticks
    ]
    base = f'<line x1="{PAD}" x2="{WIDTH - PAD}" y1="{HEIGHT}" y2="{HEIGHT}" class="tick"/>'
    return Markup(
        f'<svg class="mark" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(label)}; dashed line at {escape(_tick(reference))}">{"".join(parts)}{base}</svg>'
    )


def forest(
    scale: Scale,
    value: float,
    lower: float,
    upper: float,
    reference: float,
    *,
    label: str,
    folds: Sequence[float] = (),
    ceiling: float | None = None,
    strong: bool = False,
) -> Markup:
    """One row: interval, estimate, values of the folds as faint ticks, dashed reference, dotted ceiling."""
    middle = HEIGHT / 2
    parts = [f'<line class="ref" x1="{scale.x(reference)}" x2="{scale.x(reference)}" y1="0" y2="{HEIGHT}"/>']
    if ceiling is not None:
        parts.append(f'<line class="ceiling" x1="{scale.x(ceiling)}" x2="{scale.x(ceiling)}" y1="0" y2="{HEIGHT}"/>')
    for fold in folds:
        if not fmt.is_missing(fold):
            parts.append(
                f'<line class="fold" x1="{scale.x(fold)}" x2="{scale.x(fold)}" y1="{middle - 7}" y2="{middle + 7}"/>'
            )
    if not fmt.is_missing(lower) and not fmt.is_missing(upper):
        parts.append(f'<line class="ci" x1="{scale.x(lower)}" x2="{scale.x(upper)}" y1="{middle}" y2="{middle}"/>')
    if not fmt.is_missing(value):
        parts.append(f'<circle class="dot" cx="{scale.x(value)}" cy="{middle}" r="{5 if strong else 4}"/>')
    return Markup(
        f'<svg class="mark" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(label)}"><title>{escape(label)}</title>{"".join(parts)}</svg>'
    )


def _tick(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".").replace("-", "−") if value else "0"
