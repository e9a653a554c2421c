"""Technical texts of the files in a reader's words: reasons, remedies, slide names, steps, sources.

Nothing is invented here: numbers are rounded, equal texts are said once, names are shortened where they stay unique.
The files and the CSV tables keep the originals.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from morphome.report import format as fmt

#: A decimal number that stands alone, not a part of a name or a version.
_DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?:e[+-]?\d+)?(?![\w.])")
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.])")
_UNIDENTIFIED = re.compile(r"survival is not identified from (\S+) on")
#: Barcode of a TCGA slide: patient, sample, portion, slide, and the file's UUID.
_TCGA_SLIDE = re.compile(r"(TCGA-\w{2}-\w{4})-(\d{2}[A-Z]?)-\w{2}-([A-Z]{2}\w*)(?:\.[0-9A-Fa-f-]{36})?")

#: Why a slide gave no features, by reason code.
CODES = {
    "missing_file": "the file is not there",
    "unreadable": "the file cannot be read",
    "unsupported_format": "the format is not supported",
    "implausible_size": "a size that no slide has",
    "missing_mpp": "the file does not say its microns per pixel",
    "implausible_mpp": "microns per pixel that no scanner has",
    "conflicting_mpp": "two sources of microns per pixel disagree",
    "anisotropic_mpp": "pixels too far from square",
    "too_coarse": "scanned coarser than asked",
    "bad_levels": "damaged pyramid of levels",
    "half_decode_too_fine": "too few pixels per tile for half-size decoding",
    "no_half_decode": "half-size decoding is not possible",
    "bad_mask": "the corrected tissue mask cannot be used",
    "not_brightfield": "not a brightfield slide",
    "no_tissue": "no tissue found",
    "too_few_tiles": "too few tiles with tissue",
    "too_many_failed_tiles": "too many tiles could not be read",
    "slide_changed": "the file changed after tiling",
    "no_features": "no features among those imported",
    "empty": "no tile with enough tissue",
}
#: What was noted on the resolution of a slide that is kept, by flag.
FLAGS = {
    "power_conflict": "objective power contradicts the microns per pixel",
    "no_power": "no objective power to compare with",
    "anisotropic": "pixels not quite square (1 to 5 % apart)",
    "upsampled": "scanned coarser than asked, tiles enlarged",
    "screen_resolution": "the resolution tag says 72 or 96 dpi, which is no scanner's; not used",
    "level_sizes": "sizes of the pyramid's levels do not fit their factors",
    "assumed_from_power": "microns per pixel assumed from the objective power",
    "assumed_for_cohort": "microns per pixel set by hand for all slides that do not say theirs",
}
#: How assumed microns per pixel came about, by source; follows "3 slides".
ASSUMED = {
    "assumed_from_power": "from the objective power (tiling.mpp_missing: assume_from_power)",
    "assumed_for_cohort": "by one value for every slide that does not say its own (tiling.mpp_missing)",
}
#: Readers, by the name that the audit holds.
READERS = {
    "tiled_jpeg": "JPEG tiles decoded directly (tiled_jpeg)",
    "openslide": "OpenSlide",
    "vips": "libvips",
}
#: What the values of a molecular table are, by its value type.
VALUE_TYPES = {
    "log2_tpm_plus_1": "logarithms",
    "log2_plus_1": "logarithms",
    "tpm": "TPM",
    "counts": "read counts",
    "zscore": "z-scores",
    "binary": "mutated or not",
    "gistic": "GISTIC levels",
    "copy_number": "copy numbers",
    "log2_ratio": "log ratios",
    "as_given": "as given",
}
#: Rules of molecular tables whose value is a list.
RULES = {"rule_for_mutated": "counted as mutated"}
_MPP_SOURCES = {
    "override": "set by hand for this slide",
    "assumed_from_power": "assumed from power",
    "assumed_for_cohort": "assumed for the cohort",
    "openslide": "OpenSlide",
    "aperio": "Aperio header",
    "mirax": "MIRAX header",
    "dicom": "DICOM header",
    "ome": "OME header",
    "tiff_resolution": "TIFF resolution",
    "none": "no source",
}


def mpp_source(source: Any) -> str:
    """Where microns per pixel came from, in a reader's words."""
    return _MPP_SOURCES.get(str(source), str(source)) if not fmt.is_missing(source) else "no source"


def counted(counts: Mapping[str, int], said: Mapping[str, str]) -> str:
    """``the file cannot be read (2), no tissue found (1)``: most first; an unknown code loses its underscores."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{said.get(code, code.replace('_', ' '))} ({fmt.count(n)})" for code, n in ordered)


def size(n_bytes: float) -> str:
    """``320 GB``, ``2.1 GB``, ``14 MB``, ``< 1 MB``; decimal units."""
    if n_bytes < 1e6:
        return "< 1 MB"
    n, unit = (n_bytes / 1e9, "GB") if n_bytes >= 1e9 else (n_bytes / 1e6, "MB")
    return f"{fmt.number(n, 0 if n >= 10 else 1)} {unit}"


def moment(text: Any) -> str:
    """``2026-11-21T19:20:05+00:00`` becomes ``2026-11-21 19:20 UTC``; any other text stays as it is."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\d(?:\.\d+)?(?:\+00:00|Z)", str(text))
    return f"{found[1]} {found[2]} UTC" if found else str(text)


def tidy(text: Any) -> str:
    """A text with its decimal numbers rounded to three digits."""
    return _DECIMAL.sub(lambda m: f"{float(m[0]):.3g}" if float(m[0]) < 1000 else f"{float(m[0]):.0f}", str(text))


def slide_names(ids: Iterable[str]) -> dict[str, str]:
    """Short names: ``TCGA-0A-S18A-01Z-00-DX1.<uuid>`` becomes ``TCGA-0A-S18A DX1``.

    A name that two slides would share, and any other id, stays as it is.
    """
    ids = list(dict.fromkeys(str(i) for i in ids))
    short = {i: f"{m[1]} {m[3]}" if (m := _TCGA_SLIDE.fullmatch(i)) else i for i in ids}
    taken = Counter(short.values())
    return {i: name if taken[name] == 1 else i for i, name in short.items()}


def failure(reason: Any, slide_id: str) -> tuple[str, str]:
    """``(what happened, remedy)`` of a failed slide; the path of the slide itself is left out of the first."""
    what, _, remedy = str(reason).partition("Remedy:")
    start = re.match(r"\s*(\S+): ", what)
    if start and str(slide_id) and re.split(r"[\\/]", start[1])[-1].startswith(str(slide_id)):
        what = what[start.end() :]
    return " ".join(what.split()), " ".join(remedy.split())


def reasons(rows: pd.DataFrame, horizon: float | None, folds: int | None = None, repeats: int = 1) -> list[str]:
    """Why values of single folds are missing, each kind of reason once.

    Args:
        rows: ``repeat, fold, reason`` of the missing values; several metrics of one fold may be among them.
        horizon: months.
        folds: of how many folds; given, a reason that holds for only some of them says so and names them.
        repeats: with more than one, folds are named with their repeat.
    """
    kinds: dict[str, list[tuple[tuple[int, int], str]]] = {}
    rows = rows[rows["reason"].astype(str) != ""]
    for row in rows.sort_values(["repeat", "fold"], kind="stable").itertuples():
        kinds.setdefault(shape(row.reason), []).append(((row.repeat, row.fold), str(row.reason)))
    found = []
    for told in kinds.values():
        per_fold = list({key: text for key, text in told}.items())
        texts = [text for _, text in per_fold]
        unidentified = _UNIDENTIFIED.fullmatch(texts[0])
        if unidentified:
            until = f"; the horizon is {fmt.months(horizon)}" if horizon is not None else ""
            starts = [_UNIDENTIFIED.fullmatch(t)[1] for t in texts]
            text = f"the model gives no survival probability after month {_values(starts, per_fold, repeats)}{until}"
        else:
            text = merged(texts)
        if folds is not None and len(per_fold) < folds:
            named = (
                f" ({_keys([key for key, _ in per_fold], repeats)})"
                if len(per_fold) <= 5 and "(fold" not in text
                else ""
            )
            text = f"missing in {len(per_fold)} of {folds} folds{named}: {text}"
        found.append(text)
    return found


def _values(values: Sequence[str], per_fold: Sequence[tuple[tuple[int, int], str]], repeats: int) -> str:
    """``16.9, 16.4 and 22.4 (folds 0, 1 and 2)``, or a range when they are many."""
    try:
        numbers = [float(v) for v in values]
    except ValueError:
        return listed(list(dict.fromkeys(values)))
    if len(set(numbers)) == 1:
        return f"{numbers[0]:.3g}"
    if len(numbers) > 5:
        return f"{min(numbers):.3g} to {max(numbers):.3g} ({len(numbers)} folds)"
    return f"{listed([f'{n:.3g}' for n in numbers])} ({_keys([key for key, _ in per_fold], repeats)})"


def _keys(keys: Sequence[tuple[int, int]], repeats: int) -> str:
    """``fold 1``, ``folds 0 and 2``; with repeats ``r0 f1``."""
    several = repeats > 1 or len({repeat for repeat, _ in keys}) > 1
    names = [f"r{repeat} f{fold}" if several else str(fold) for repeat, fold in keys]
    return f"{'fold' if len(names) == 1 else 'folds'} {listed(names)}"


def shape(text: Any) -> str:
    """A text without its numbers: two texts of one shape differ in their numbers only."""
    return _NUMBER.sub("#", str(text))


def merged(texts: Sequence[str]) -> str:
    """Texts that differ in their numbers only, as one text."""
    columns = list(zip(*(_NUMBER.findall(t) for t in texts), strict=True))
    shown = []
    for values in columns:
        numbers = sorted({float(v) for v in values})
        if len(numbers) <= 4:
            shown.append(listed([tidy(v) for v in sorted(set(values), key=float)]))
        else:
            shown.append(f"{numbers[0]:g} to {numbers[-1]:g}")
    at = iter(shown)
    return tidy(_NUMBER.sub(lambda _: next(at), texts[0]))


def listed(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    items = list(items)
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else "".join(items)


def sentence(text: str) -> str:
    """A remark of a file as a sentence: capital first, full stop last."""
    text = str(text).strip()
    return text[:1].upper() + text[1:] + ("" if not text or text[-1] in ".!?" else ".")


def check(name: str, unit: str) -> str:
    """What a step of the flow asked for: ``with event status`` becomes ``event status``."""
    name = re.sub(rf"^{re.escape(unit)} ", "", str(name))
    return re.sub(r"^with (an? )?", "", name)


def codes(reason: Any) -> str:
    """A count of reason codes, ``no_features: 3``, without underscores; any other text as it is."""
    text = str(reason)
    return text.replace("_", " ") if re.fullmatch(r"\w+: \d+([,;] \w+: \d+)*", text) else text


def held(facts: Mapping[str, Any]) -> list[str]:
    """``98 rows``, ``odd: GX 109``: one text per fact; what is empty is left out."""
    return [_held(key, value) for key, value in facts.items() if not _empty(value)]


def rule(key: str, value: Any) -> str:
    """A rule that a table was read by, as a text: ``rule_for_mutated`` may be the list of what counts."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return f"{RULES.get(key, key.replace('_', ' '))}: {', '.join(str(v).replace('_', ' ') for v in value)}"
    return _held(key, value)


def _held(key: Any, value: Any) -> str:
    name = str(key).replace("_", " ")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{fmt.count(value) if float(value).is_integer() else tidy(value)} {name}"
    return f"{name}: {_inside(value)}"


def _inside(value: Any) -> str:
    if isinstance(value, Mapping):
        parts = [
            f"{k} ({_inside(v)})" if isinstance(v, Mapping) else f"{k} {_inside(v)}"
            for k, v in value.items()
            if not _empty(v)
        ]
        return ", ".join(parts)
    if isinstance(value, (list, tuple)):
        return fmt.listing(value, 10)
    return str(value)


def _empty(value: Any) -> bool:
    """Nothing to tell: None, no text, 0, and collections of nothing else."""
    if isinstance(value, Mapping):
        return all(_empty(v) for v in value.values())
    return value is None or value == "" or value == 0 or (isinstance(value, (list, tuple)) and not value)
