"""All models by key: what they are called, what they need, where they come from; and how to build the neural ones."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from morphome.errors import MorphomeError
from morphome.models.abmil import ABMIL
from morphome.models.clam import CLAMMB, CLAMSB
from morphome.models.cmta import CMTA
from morphome.models.deep_sets import DeepSets
from morphome.models.dsmil import DSMIL
from morphome.models.mcat import MCAT
from morphome.models.mome import MoME
from morphome.models.mome_ablations import MoMEGenes, MoMENoMoE, MoMEWSI
from morphome.models.motcat import MOTCat
from morphome.models.porpoise import PORPOISE, PorpoiseAMIL
from morphome.models.snn import SNNModel
from morphome.models.survpath import SurvPath
from morphome.models.transmil import TransMIL


@dataclass(frozen=True)
class Dims:
    """Sizes that come from the data, not from the settings.

    Args:
        d_in: width of the patch features (0 for a model without slides).
        group_sizes: columns per gene group, in the order of ``Batch.groups``.
        n_bins: time bins K.
        n_omic: molecular columns in ``Batch.omic_all`` (0 for a model that does not ask for them).
        router_seed: seed of routers that draw experts by a hash.
    """

    d_in: int
    group_sizes: dict[str, int] = field(default_factory=dict)
    n_bins: int = 4
    n_omic: int = 0
    router_seed: int = 0


@dataclass(frozen=True)
class ModelInfo:
    """One row of the model table.

    Args:
        key: registry key, the ``model`` of a row of the configuration.
        title: name for people.
        reference: paper, or definition for models without one.
        needs: ``path``, ``omic_groups``, ``omic_all`` (neural), ``panels``, ``clinical`` (baselines).
        kind: ``neural`` models are built here, ``baseline`` ones by the training room.
    """

    key: str
    title: str
    reference: str
    needs: frozenset[str]
    kind: Literal["neural", "baseline"]


NEURAL: dict[str, type[nn.Module]] = {
    "deep_sets": DeepSets,
    "abmil": ABMIL,
    "clam_sb": CLAMSB,
    "clam_mb": CLAMMB,
    "dsmil": DSMIL,
    "transmil": TransMIL,
    "porpoise_amil": PorpoiseAMIL,
    "snn": SNNModel,
    "porpoise": PORPOISE,
    "mcat": MCAT,
    "motcat": MOTCat,
    "cmta": CMTA,
    "survpath": SurvPath,
    "mome": MoME,
    "mome_no_moe": MoMENoMoE,
    "mome_wsi": MoMEWSI,
    "mome_genes": MoMEGenes,
}

_PORPOISE = (
    "Chen et al., Pan-cancer integrative histology-genomic analysis via multimodal deep learning, Cancer Cell 40 "
    "(2022) 865, doi 10.1016/j.ccell.2022.07.004"
)
_CLAM = (
    "Lu et al., Data-efficient and weakly supervised computational pathology on whole-slide images, Nat Biomed Eng 5 "
    "(2021) 555"
)
_MOME = "Xiong et al., MoME: Mixture of Multimodal Experts for Cancer Survival Prediction, MICCAI 2024"

_BASELINES = (
    ("random", "Random score", "Hash of the patient id; no information", ()),
    (
        "clinical_cox",
        "Clinical Cox",
        "Cox, JRSS B 34 (1972) 187, ties by Efron, JASA 72 (1977) 557, ridge penalty",
        ("clinical",),
    ),
    (
        "coxnet_genes",
        "Coxnet on genes",
        "Simon, Friedman, Hastie, Tibshirani, J Stat Softw 39(5) (2011)",
        ("panels",),
    ),
    (
        "ridge_genes",
        "Ridge Cox on genes",
        "Cox, JRSS B 34 (1972) 187, with a ridge penalty chosen by inner cross-validation; Verweij, van Houwelingen, "
        "Stat Med 13 (1994) 2427",
        ("panels",),
    ),
    (
        "clinical_genes",
        "Clinical + genes",
        "Late fusion: Cox on clinical covariates and the out-of-fold score of the ridge Cox on genes",
        ("clinical", "panels"),
    ),
    (
        "rsf",
        "Random survival forest",
        "Ishwaran, Kogalur, Blackstone, Lauer, Ann Appl Stat 2(3) (2008) 841; on clinical covariates and principal "
        "components of genes",
        ("clinical", "panels"),
    ),
    (
        "mean_pool_cox",
        "Mean-pool Cox",
        "Ridge Cox on principal components of the mean and SD of a patient's patch features",
        ("path",),
    ),
)
_NETWORKS = (
    ("deep_sets", "Deep Sets", "Zaheer et al., Deep Sets, NeurIPS 2017"),
    ("abmil", "ABMIL", "Ilse, Tomczak, Welling, Attention-based deep multiple instance learning, ICML 2018"),
    ("clam_sb", "CLAM-SB", _CLAM),
    ("clam_mb", "CLAM-MB", _CLAM),
    (
        "dsmil",
        "DSMIL",
        "Li, Li, Eliceiri, Dual-stream multiple instance learning network for whole slide image classification, "
        "CVPR 2021",
    ),
    ("transmil", "TransMIL", "Shao et al., TransMIL, NeurIPS 2021"),
    ("porpoise_amil", "PORPOISE AMIL", f"{_PORPOISE}; its network of slides alone"),
    ("snn", "SNN", "Klambauer, Unterthiner, Mayr, Hochreiter, Self-normalizing neural networks, NeurIPS 2017"),
    ("porpoise", "PORPOISE", _PORPOISE),
    (
        "mcat",
        "MCAT",
        "Chen et al., Multimodal Co-Attention Transformer for Survival Prediction in Gigapixel Whole Slide Images, "
        "ICCV 2021",
    ),
    (
        "motcat",
        "MOTCat",
        "Xu, Chen, Multimodal Optimal Transport-based Co-Attention Transformer with Global Structure Consistency for "
        "Survival Prediction, ICCV 2023",
    ),
    ("cmta", "CMTA", "Zhou, Chen, Cross-Modal Translation and Alignment for Survival Analysis, ICCV 2023"),
    (
        "survpath",
        "SurvPath",
        "Jaume et al., Modeling dense multimodal interactions between biological pathways and histology for survival "
        "prediction, CVPR 2024",
    ),
    ("mome", "MoME", f"{_MOME}, doi 10.1007/978-3-031-72083-3_30"),
    (
        "mome_no_moe",
        "MoME without experts",
        f"Ablation of {_MOME}: slides and genes meet in the last attention layer only",
    ),
    ("mome_wsi", "MoME, slides alone", f"Ablation of {_MOME}"),
    ("mome_genes", "MoME, genes alone", f"Ablation of {_MOME}"),
)
MODELS: dict[str, ModelInfo] = {
    **{key: ModelInfo(key, title, text, frozenset(needs), "baseline") for key, title, text, needs in _BASELINES},
    **{key: ModelInfo(key, title, text, NEURAL[key].needs, "neural") for key, title, text in _NETWORKS},
}


def info(key: str) -> ModelInfo:
    """The row of ``key``.

    Raises:
        MorphomeError: no such model; lists the known ones.
    """
    if key not in MODELS:
        raise MorphomeError(f"models: '{key}' is not a model", f"choose one of {', '.join(MODELS)}")
    return MODELS[key]


def defaults(key: str) -> dict[str, Any]:
    """Settings of a neural model and their defaults, read from its constructor.

    Raises:
        MorphomeError: no such neural model.
    """
    given = set(Dims.__dataclass_fields__)
    parameters = inspect.signature(_neural(key)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in given}


def build(key: str, settings: Mapping[str, Any], dims: Dims) -> nn.Module:
    """A neural model with random weights from torch's default generator (seed it first).

    Args:
        settings: overrides of :func:`defaults`.
        dims: sizes from the data; the model takes those that it names.

    Raises:
        MorphomeError: unknown model or setting; sizes that the model needs and that are missing.
    """
    model = _neural(key)
    unknown = sorted(set(settings) - set(defaults(key)))
    if unknown:
        raise MorphomeError(
            f"models.{key}: unknown settings {', '.join(unknown)}", f"known: {', '.join(defaults(key))}"
        )
    if "path" in model.needs and dims.d_in < 1:
        raise MorphomeError(f"models.{key} needs patch features", "add wsi to cohort.require")
    if "omic_groups" in model.needs and not dims.group_sizes:
        raise MorphomeError(f"models.{key} needs gene groups", "configure molecular.groups")
    if "omic_all" in model.needs and dims.n_omic < 1:
        raise MorphomeError(f"models.{key} needs molecular columns", "configure molecular.rna, .mut or .cnv")
    names = set(inspect.signature(model).parameters)
    sizes = {name: getattr(dims, name) for name in Dims.__dataclass_fields__ if name in names}
    return model(**sizes, **settings)


def _neural(key: str) -> type[nn.Module]:
    if info(key).kind != "neural":
        raise MorphomeError(f"models: '{key}' is a baseline, not a network", "it is fitted by the training room")
    return NEURAL[key]
