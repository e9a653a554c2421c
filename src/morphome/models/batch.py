"""What a model gets: one patient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from morphome.errors import MorphomeError


@dataclass(frozen=True)
class Batch:
    """One patient. Parts that a model does not need (its ``needs``) may be ``None``.

    Args:
        path: patch features of all slides of the patient, (N, d_in) float, sorted by (slide, y, x); N >= 1.
        pos: slide index, level-0 x, y per patch, (N, 3) integer.
        groups: standardised molecular features, one vector (|G_g|,) per gene group, in the order of
            ``Dims.group_sizes``.
        omic_all: all standardised molecular columns of the patient, (D,).
        rna: what the configured encoder of RNA makes of the patient, (n_rna,), standardised on the training fold.
        cnv, mut: standardised copy-number and mutation columns, (n_cnv,), (n_mut,).
        bin, event: time bin and event of a training patient, for losses of a model's own; None in evaluation.
        patient_id: only the ``random`` router of MoME reads it.
    """

    path: torch.Tensor | None = None
    pos: torch.Tensor | None = None
    groups: tuple[torch.Tensor, ...] | None = None
    omic_all: torch.Tensor | None = None
    rna: torch.Tensor | None = None
    cnv: torch.Tensor | None = None
    mut: torch.Tensor | None = None
    bin: int | None = None
    event: int | None = None
    patient_id: str = ""


def require(batch: Batch, needs: frozenset[str], d_in: int | None = None) -> None:
    """Check that a batch has what a model needs: ``path`` (N, d_in) with N >= 1, ``omic_groups`` as vectors,
    ``omic_all``, ``rna``, ``cnv``, ``mut`` as one vector each.

    Raises:
        MorphomeError: naming the patient and the missing or misshapen part.
    """
    who = f"patient {batch.patient_id or '(no id)'}"
    if "path" in needs:
        if batch.path is None:
            raise MorphomeError(f"{who}: no patch features", "add wsi to cohort.require")
        if batch.path.ndim != 2 or batch.path.shape[0] < 1 or batch.path.shape[1] != d_in:
            raise MorphomeError(
                f"{who}: patch features have shape {tuple(batch.path.shape)}, expected (N >= 1, {d_in})",
                "use the encoder that the model was trained with",
            )
    if "omic_groups" in needs and not batch.groups:
        raise MorphomeError(f"{who}: no gene groups", "configure molecular.groups and add rna to cohort.require")
    for part in ("omic_all", "rna", "cnv", "mut"):
        if part in needs and getattr(batch, part) is None:
            remedy = "configure molecular.rna, .mut or .cnv" if part == "omic_all" else f"configure molecular.{part}"
            raise MorphomeError(f"{who}: no molecular values ({part})", remedy)
