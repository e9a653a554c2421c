"""One vector of molecular values of a patient, checked."""

from __future__ import annotations

from torch import Tensor

from morphome.errors import MorphomeError
from morphome.models.batch import Batch


def vector(batch: Batch, part: str, size: int) -> Tensor:
    """The values of a patient in one part of the batch.

    Args:
        part: ``omic_all``, ``rna``, ``cnv`` or ``mut``.
        size: number of columns that the model was built for.

    Returns:
        (size,).

    Raises:
        MorphomeError: the patient has none, or another number of them.
    """
    who, x = f"patient {batch.patient_id or '(no id)'}", getattr(batch, part)
    if x is None:
        remedy = "configure molecular.rna, .mut or .cnv" if part == "omic_all" else f"configure molecular.{part}"
        raise MorphomeError(f"{who}: no molecular values ({part})", remedy)
    if x.shape != (size,):
        raise MorphomeError(
            f"{who}: molecular values ({part}) of shape {tuple(x.shape)}, expected ({size},)",
            "train and predict with the same molecular columns",
        )
    return x
