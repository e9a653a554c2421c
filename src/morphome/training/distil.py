"""Distillation: what a model of slides alone learns beside its own loss, from a teacher or from the genes themselves.

``kd_logit``      T² mean_k BCE(sigmoid(l_k^S / T), sigmoid(l_k^T / T)): Hinton, Vinyals, Dean, arXiv 1503.02531
                  (2015), on the hazards of each time bin.
``kd_risk_rank``  mean over pairs {event_i, t_i < t_j} of ((s_i - s_j) - (τ_i - τ_j))², s and τ log risks of student
                  and teacher: relations instead of values, Park et al., CVPR 2019.
``kd_feature``    1 - cos(W z_S, z_T), or the mean squared error: Romero et al., ICLR 2015.
``gene_aux``      mean squared error of pathway scores read from the pooled bag, without a teacher.

Teachers are fitted on the role "train" alone. For the first two losses they are cross-fitted: the target of a patient
comes from a teacher that saw neither this patient's outcome nor genes, since a teacher knows its own training patients
by heart. ``kd_feature`` has one teacher, for the spaces of two cannot be compared; its targets are not out-of-fold.
The student is given targets by patient id and nothing else; in evaluation nothing of this module is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morphome import survival
from morphome.errors import MorphomeError
from morphome.models import hazard
from morphome.models.batch import Batch
from morphome.models.fusion import BRANCHES, FusionModel
from morphome.training.data import FoldData, Outcomes, derive_seed
from morphome.training.inner_cv import inner_folds, inner_site_folds
from morphome.training.preprocess import ColumnScaler

LOSSES = ("kd_logit", "kd_risk_rank", "kd_feature", "gene_aux")


class Teacher(Protocol):
    """What is asked of a trained neural model."""

    objective: Any  # with ``edges`` (K - 1,) where the head is the hazard head

    def read(self, fold: FoldData, ids: Sequence[str], reader: Callable[[nn.Module, Batch], Tensor]) -> list[Tensor]:
        """``reader(module, batch)`` of each patient, in evaluation mode and without gradient."""


#: (registry key, settings, fold, seed) -> fitted model.
TrainModel = Callable[[str, Mapping[str, Any], FoldData, int], Teacher]


def log_risk(output: Mapping[str, Any]) -> Tensor:
    """Log risk of one patient, 0-dim: that of a Cox head, or log of the cumulative hazard -log S_{K-1}.

    Both heads then speak of the same scale, so that either may teach the other.

    Args:
        output: of a model, with ``log_risk`` (1, 1) or ``logits`` (1, K).
    """
    if "log_risk" in output:
        return output["log_risk"].float().reshape(())
    # Double: a hazard of e^-100 is still not 0.
    return F.softplus(output["logits"].double()).sum().log().float()


class Distiller:
    """Targets by patient, heads that read them from the student, and the loss.

    The order of use: :meth:`prepare` (before the state of torch is set for the student: teachers set their own),
    :meth:`build`, then :meth:`loss` of each patient, or :meth:`window_loss` where ``pairwise``.

    Attributes:
        pairwise: the loss is one of pairs of patients; :meth:`loss` is then 0.
        reads_pooled: the student's ``aux["pooled"]`` is read, and :meth:`build` needs its width.
        targets: (width,) float32 by patient id; the role "train" only.
        teacher_c: out-of-fold Harrell's C of the teachers on the training role; NaN without cross-fitting.
    """

    def __init__(self, settings: Mapping[str, Any], seed: int) -> None:
        """Args:
        settings: ``training.distil``, complete: ``teacher``, ``settings`` (of the teacher), ``loss``, ``weight``,
            ``temperature``, ``folds``, ``bin_weights`` (equal, survival), ``feature_loss`` (cosine, mse), ``hidden``.
        seed: of this fold.

        Raises:
            MorphomeError: an unknown loss, or one that needs a teacher and has none.
        """
        self.settings, self.seed = dict(settings), seed
        self.kind, self.weight = str(settings["loss"]), float(settings["weight"])
        if self.kind not in LOSSES:
            raise MorphomeError(f"training.distil.loss is '{self.kind}'", f"choose one of {', '.join(LOSSES)}")
        if self.kind != "gene_aux" and not settings["teacher"]:
            raise MorphomeError(
                f"training.distil: the loss '{self.kind}' needs a teacher",
                "give training.distil.teacher, for example mcat, or choose the loss gene_aux",
            )
        self.pairwise = self.weight > 0 and self.kind == "kd_risk_rank"
        self.reads_pooled = self.weight > 0 and self.kind in ("kd_feature", "gene_aux")
        self.targets: dict[str, Tensor] = {}
        self.teacher_c = math.nan
        self.heads = nn.Module()

    # -- targets --------------------------------------------------------------------------------------------
    def prepare(
        self, fold: FoldData, train_model: TrainModel, notes: list[str], edges: np.ndarray | None = None
    ) -> None:
        """Fit the teachers and keep their targets; nothing with weight 0.

        Args:
            fold: of the student. Only the patients of its role "train" reach a teacher.
            train_model: fits a teacher. For ``kd_logit`` it must hand the student's bin edges to the teacher, whose
                own would differ from part to part: hazards of other bins cannot be compared.
            notes: gets a remark where the teachers rank no better than chance, and on groups without a score.
            edges: the student's bin edges, against which those of the teachers are checked.

        Raises:
            MorphomeError: a teacher with other bins or without hazards (``kd_logit``), without an embedding
                (``kd_feature``), no gene groups (``gene_aux``), too few patients for the parts.
        """
        self.targets, self.teacher_c = {}, math.nan
        if not self.weight:
            return
        train = fold.outcomes("train")
        if self.kind == "gene_aux":
            self._gene_scores(fold, train, notes)
        elif self.kind == "kd_feature":
            self._embeddings(fold, train, train_model)
        else:
            self._cross_fit(fold, train, train_model, notes, edges)

    def _cross_fit(
        self, fold: FoldData, train: Outcomes, train_model: TrainModel, notes: list[str], edges: np.ndarray | None
    ) -> None:
        part = _parts(fold, train, int(self.settings["folds"]), derive_seed(self.seed, "teacher parts"))
        risk = np.empty(len(train.ids))
        for k in np.unique(part):
            held = part == k
            sub = self._sub_fold(fold, train, ~held, f"teacher {k + 1}")
            teacher = self._train(train_model, sub, int(k))
            ids = [train.ids[i] for i in np.flatnonzero(held)]
            found = torch.stack(teacher.read(sub, ids, _logits if self.kind == "kd_logit" else _log_risk))
            found = found.detach().cpu().double()
            if self.kind == "kd_logit":
                edges = teacher.objective.edges if edges is None else edges
                if not np.array_equal(teacher.objective.edges, edges):
                    raise MorphomeError(
                        f"{sub.where}: the time bins of the teacher are not those of the student",
                        "report this as a fault of morphome",
                    )
                risk[held] = hazard.risk(found).numpy()
            else:
                # The level of a log risk is each teacher's own (Cox leaves it open), and so no part of a difference.
                found = found - found.mean(0)
                risk[held] = found[:, 0].numpy()
            self._keep(ids, found.float(), sub.where)
        self.teacher_c = float(survival.harrell(train.time, train.event, risk).c)
        if self.teacher_c <= 0.5:
            notes.append(
                f"the teacher '{self.settings['teacher']}' ranks held-out training patients no better than chance "
                f"(C {self.teacher_c:.3f}): there is little to distil ({fold.where})"
            )

    def _embeddings(self, fold: FoldData, train: Outcomes, train_model: TrainModel) -> None:
        sub = self._sub_fold(fold, train, np.ones(len(train.ids), dtype=bool), "teacher")
        found = torch.stack(self._train(train_model, sub, 0).read(sub, train.ids, _embedding)).detach().cpu()
        # What is common to all patients fills the cosine of raw features and teaches nothing.
        values = found.double().numpy()
        self._keep(train.ids, torch.from_numpy(ColumnScaler.fit(values).transform(values)).float(), sub.where)

    def _gene_scores(self, fold: FoldData, train: Outcomes, notes: list[str]) -> None:
        if not fold.groups:
            raise MorphomeError(
                "training.distil: the loss 'gene_aux' needs gene groups and none is given",
                "add molecular.groups to the configuration, or choose another loss",
            )
        columns = sorted({column for group in fold.groups.values() for column in group})
        place = {column: i for i, column in enumerate(columns)}
        raw = fold.gene_matrix(columns, train.ids)
        scaler = ColumnScaler.fit(raw)
        measured = ~np.isnan(raw) & scaler.varies
        z = np.where(measured, scaler.transform(raw), 0.0)
        values = np.full((len(train.ids), len(fold.groups)), np.nan)
        for g, group in enumerate(fold.groups.values()):
            at = [place[column] for column in group]
            count = measured[:, at].sum(axis=1)
            # NaN stays where nothing of the group was measured in a patient; such a score is not asked for.
            np.divide(z[:, at].sum(axis=1), count, out=values[:, g], where=count > 0)
        scale = ColumnScaler.fit(values)
        if not scale.varies.any():
            raise MorphomeError(
                f"{fold.where}: no gene group varies among the training patients",
                "look at the molecular tables, or choose another training.distil.loss",
            )
        still = [name for name, varies in zip(fold.groups, scale.varies, strict=True) if not varies]
        if still:
            notes.append(f"gene groups without variation were left out of gene_aux: {', '.join(still)} ({fold.where})")
        target = np.where(np.isnan(values), np.nan, scale.transform(values))[:, scale.varies]
        self.targets = dict(zip(train.ids, torch.from_numpy(target).float().unbind(0), strict=True))

    def _sub_fold(self, fold: FoldData, train: Outcomes, fitted: np.ndarray, name: str) -> FoldData:
        """The training role alone: ``fitted`` patients train, the others are test patients without an outcome.

        A teacher that chooses its epoch needs inner patients of its own: as large a share as the student's.
        """
        ids = tuple(train.ids[i] for i in np.flatnonzero(fitted))
        roles = {i: "test" for i in train.ids} | {i: "train" for i in ids}
        if n_inner := len(fold.ids("inner_val")):
            mine = Outcomes(ids, train.time[fitted], train.event[fitted])
            folds = max(2, round((n_inner + len(train.ids)) / n_inner))
            part = _parts(fold, mine, folds, derive_seed(self.seed, "teacher inner", name))
            roles |= {ids[i]: "inner_val" for i in np.flatnonzero(part == 0)}
        sub = fold.with_roles(roles)
        sub.where = f"{fold.where}, {name}"
        return sub

    def _train(self, train_model: TrainModel, sub: FoldData, k: int) -> Teacher:
        settings = dict(self.settings["settings"] or {})
        return train_model(self.settings["teacher"], settings, sub, derive_seed(self.seed, "teacher", k))

    def _keep(self, ids: Sequence[str], values: Tensor, where: str) -> None:
        bad = [i for i, row in zip(ids, values, strict=True) if not bool(row.isfinite().all())]
        if bad:
            raise MorphomeError(
                f"{where}: a target of distillation is not finite (patient {bad[0]})",
                "look for extreme features of this patient; try a lower training.learning_rate",
            )
        self.targets |= dict(zip(ids, values.unbind(0), strict=True))

    # -- heads ----------------------------------------------------------------------------------------------
    def build(self, student_width: int = 0, generator: torch.Generator | None = None) -> nn.Module:
        """Heads that are trained beside the student; without weights where the loss has none.

        Args:
            student_width: of ``aux["pooled"]``, 0 where there is none; read only where ``reads_pooled``.
            generator: of the starting weights; one of the distiller's own by default. Torch's is never touched.

        Raises:
            MorphomeError: the student gives no pooled bag, and the loss reads it.
        """
        self.heads = nn.Module()
        if not self.reads_pooled:
            return self.heads
        if student_width < 1:
            raise self._no_pooled()
        if generator is None:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "distil heads"))
        width = len(next(iter(self.targets.values())))
        sizes = [student_width, width]
        if self.kind == "gene_aux":
            sizes.insert(1, int(self.settings["hidden"]))
        layers = [_linear(a, b, generator) for a, b in itertools.pairwise(sizes)]
        self.heads = nn.Sequential(*layers[:1], *(part for layer in layers[1:] for part in (nn.ReLU(), layer)))
        return self.heads

    def head_parameters(self) -> list[nn.Parameter]:
        """Weights of the heads, for the optimiser."""
        return list(self.heads.parameters())

    def state_dict(self) -> dict[str, Any]:
        """Heads and targets: what a resumed run needs."""
        return {"heads": self.heads.state_dict(), "targets": dict(self.targets), "teacher_c": self.teacher_c}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, after :meth:`build`."""
        self.heads.load_state_dict(state["heads"])
        self.targets, self.teacher_c = dict(state["targets"]), state["teacher_c"]

    # -- losses ---------------------------------------------------------------------------------------------
    def loss(self, output: Mapping[str, Any], patient_id: str) -> Tensor:
        """Weighted loss of one training patient, 0-dim; 0 with weight 0 and for losses of pairs.

        Args:
            output: of the student.

        Raises:
            MorphomeError: the student has no hazards or other bins (``kd_logit``), no ``aux["pooled"]``; the patient
                has no target, that is, is no training patient.
        """
        if not self.weight or self.pairwise:
            return torch.zeros(())
        if self.kind == "kd_logit":
            return self.weight * self._logit_loss(_logits_of(output, "student"), patient_id)
        pooled = output.get("aux", {}).get("pooled")
        if pooled is None:
            raise self._no_pooled()
        read = self.heads(pooled.float()).reshape(-1)
        target = self._target(patient_id, read)
        if self.kind == "gene_aux":
            known = ~target.isnan()
            if not bool(known.any()):
                return read.sum() * 0.0
            return self.weight * F.mse_loss(read[known], target[known])
        cosine = self.settings["feature_loss"] == "cosine"
        return self.weight * (1 - F.cosine_similarity(read, target, dim=0) if cosine else F.mse_loss(read, target))

    def _no_pooled(self) -> MorphomeError:
        return MorphomeError(
            f"training.distil: the loss '{self.kind}' reads the pooled bag, which this model does not give",
            "choose the loss kd_logit or kd_risk_rank, or another model, for example abmil",
        )

    def _logit_loss(self, logits: Tensor, patient_id: str) -> Tensor:
        target = self._target(patient_id, logits)
        if target.shape != logits.shape:
            raise MorphomeError(
                f"training.distil: the student has {len(logits)} time bins, the teacher {len(target)}",
                "report this as a fault of morphome",
            )
        t = float(self.settings["temperature"])
        terms = F.binary_cross_entropy_with_logits(logits / t, torch.sigmoid(target / t), reduction="none")
        if self.settings["bin_weights"] == "survival":
            # S_{k-1}: how much of the teacher's distribution reaches the bin. With T = 1 this is the cross-entropy of
            # the two distributions of the time bin, over K.
            terms = terms * (hazard.log_survival(target) - F.logsigmoid(-target)).exp()
        return t * t * terms.mean()

    def window_loss(self, risks: Tensor, ids: Sequence[str], time: np.ndarray, event: np.ndarray) -> Tensor:
        """Weighted loss of a window of patients, 0-dim, mean over its pairs; 0 where it has none.

        Args:
            risks: (n,) :func:`log_risk` of the student; what this is differentiated with respect to.
            ids, time, event: of the same patients; months, 1 = observed. A patient may appear twice.
        """
        tau = torch.cat([self._target(i, risks) for i in ids])
        time, event = np.asarray(time), np.asarray(event).astype(bool)
        pairs = torch.from_numpy(event[:, None] & (time[:, None] < time[None, :])).to(risks.device)
        if not bool(pairs.any()):
            return risks.sum() * 0.0
        off = risks - tau
        return self.weight * (off[:, None] - off[None, :])[pairs].square().mean()

    def _target(self, patient_id: str, like: Tensor) -> Tensor:
        if patient_id not in self.targets:
            raise MorphomeError(
                f"patient {patient_id} has no target of distillation: only training patients do",
                "report this as a fault of morphome",
            )
        return self.targets[patient_id].to(like)


def _parts(fold: FoldData, data: Outcomes, folds: int, seed: int) -> np.ndarray:
    """Part (n,) of each patient, 0, 1, ...: by site if the outer folds are and there are sites enough."""
    folds = min(folds, int(data.event.sum()), len(data.ids) // 2)
    if folds < 2:
        raise MorphomeError(
            f"{fold.where}: {len(data.ids)} training patients with {int(data.event.sum())} events are too few for "
            "teachers of distillation",
            "use fewer splits, or leave training.distil out",
        )
    if fold.scheme == "site":
        site = fold.table.loc[list(data.ids), "site"].astype(str).to_numpy()
        if len(set(site)) >= folds:
            return inner_site_folds(data, site, folds, seed)
    return inner_folds(data, folds, seed)


def _logits_of(output: Mapping[str, Any], who: str) -> Tensor:
    if "logits" not in output:
        raise MorphomeError(
            f"training.distil: the {who} has no time bins, which the loss 'kd_logit' compares",
            "choose the loss kd_risk_rank, or a model with a hazard head",
        )
    return output["logits"].float().reshape(-1)


def _logits(module: nn.Module, batch: Batch) -> Tensor:
    """(K,)"""
    return _logits_of(module(batch), "teacher")


def _log_risk(module: nn.Module, batch: Batch) -> Tensor:
    """(1,)"""
    return log_risk(module(batch)).reshape(1)


def _embedding(module: nn.Module, batch: Batch) -> Tensor:
    """(d_T,): the mean of each branch before fusion, or the pooled bag of a model of slides alone."""
    if isinstance(module, FusionModel):
        z = module.encode(batch).z
        return torch.cat([z[branch].float().mean(0) for branch in BRANCHES if branch in z])
    pooled = module(batch).get("aux", {}).get("pooled")
    if pooled is None:
        raise MorphomeError(
            "training.distil: the teacher gives no embedding, which the loss 'kd_feature' needs",
            "choose a teacher of slides and genes, for example mcat, or the loss kd_logit",
        )
    return pooled.float().reshape(-1)


def _linear(d_in: int, d_out: int, generator: torch.Generator) -> nn.Linear:
    """A layer with torch's usual start, U(±1/sqrt(d_in)), from this generator."""
    layer = nn.utils.skip_init(nn.Linear, d_in, d_out)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=generator)
    return layer
