"""Which sample stands for a patient. A rule over ids, nothing fitted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from morphome.cohort.barcode import TUMOUR_CODES, sample_name, try_barcode
from morphome.errors import MorphomeError


def rule_for_samples(codes: Sequence[str]) -> str:
    """The rule of :func:`choose_samples` in words."""
    order = ", then ".join(codes)
    return f"sample code {order}; the lowest vial; the highest portion, then plate; the smallest id"


def choose_samples(
    ids: Iterable[str], codes: Sequence[str] = TUMOUR_CODES, patient_of: Mapping[str, str] | None = None
) -> tuple[dict[str, str], dict[str, int]]:
    """One sample per patient: the first of ``codes``; lowest vial; highest portion, then plate; smallest id.

    The lowest vial prefers frozen (A) to FFPE (B); portion and plate follow the usual choice among aliquots of one
    sample. An id without a sample code is taken, after those that have one. Text that is no TCGA barcode is a
    patient of its own unless ``patient_of`` says whose it is.

    Args:
        ids: sample or aliquot ids.
        codes: TCGA sample codes of the tumour under study, preferred first.
        patient_of: sample to patient, where the source has such a table.

    Returns:
        patient to id, sorted by patient; counts of ids left out, by reason.
    """
    best: dict[str, tuple[int, str, tuple[int, ...], tuple[int, ...], str]] = {}
    left_out: Counter[str] = Counter()
    for text in sorted(set(ids)):
        parts = try_barcode(text)
        code = parts.sample_code if parts else ""
        if code and code not in codes:
            left_out[f"sample type {sample_name(code)}"] += 1
            continue
        patient = (patient_of or {}).get(text) or (parts.patient if parts else text)
        rank = (
            codes.index(code) if code else len(codes),
            parts.vial if parts else "",
            _descending(parts.portion if parts else ""),
            _descending(parts.plate if parts else ""),
            text,
        )
        if patient in best:
            left_out["further sample of the same patient"] += 1
        if patient not in best or rank < best[patient]:
            best[patient] = rank
    return {patient: best[patient][-1] for patient in sorted(best)}, dict(sorted(left_out.items()))


def require_samples(
    ids: Iterable[str], codes: Sequence[str], path: Path, setting: str, patient_of: Mapping[str, str] | None = None
) -> tuple[dict[str, str], dict[str, int]]:
    """As :func:`choose_samples`, but a table without any sample of the tumour under study is an error.

    Raises:
        MorphomeError: naming the file, the codes and what the table has instead.
    """
    chosen, left_out = choose_samples(ids, codes, patient_of)
    if not chosen:
        raise MorphomeError(
            f"{path}: no sample of the tumour under study (codes {', '.join(codes)}): {left_out} ({setting})",
            "check the file and cohort.sample_types",
        )
    return chosen, left_out


def _descending(text: str) -> tuple[int, ...]:
    """A key that sorts longer and later texts first."""
    return (*(-ord(letter) for letter in text), 0)
