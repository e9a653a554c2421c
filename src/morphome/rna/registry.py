"""Encoders of RNA: what each is, whether its files are there, and which one a run uses.

The choice is made once, while the workflow builds its graph, so that one experiment never mixes encoders. Standard
library only (and the helpers of the slide encoders' weights): no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morphome.errors import MorphomeError
from morphome.features.weights import checksum, weights_folder

#: Alternatives for the weights of scGPT, the preferred one first.
SCGPT_WEIGHTS = ("best_model.pt", "model.safetensors")
#: Where BulkRNABert's order of genes may stand: one id a line, or the header of the published sample.
BULKRNABERT_GENES = ("common_gene_id.txt", "bulkrnabert_gene_ids.txt", "data/tcga_sample.csv", "tcga_sample.csv")
#: What is known of published files, by encoder and name. From the card of a mirror of the whole-human model; nobody
#: has compared them with the authors' own copy yet.
KNOWN_SHA256: dict[str, dict[str, str]] = {
    "scgpt": {
        "args.json": "c18e075e018140cb8b2d9029387b9de26607a5ce6a8ccabd6ead70cd76b95d60",
        "best_model.pt": "6cb5d451ab5c4b33eb673adbe4fddc61d2389df1b89b7651a9fe2e557572b922",
        "vocab.json": "acca93d114ca62c3f0f50debbd23e8c87f0714f4737764454f6b2b13f2e8580f",
    }
}
KNOWN_GRADE = "to be verified"
UNKNOWN_GRADE = "not known"
ON_MISSING = ("error", "fallback", "skip")


@dataclass(frozen=True)
class RnaEncoder:
    """One row of the registry.

    Attributes:
        key, title: name in the configuration; name for people.
        kind: ``fold``: fitted inside the training fold; ``frozen``: run once for all patients; ``table``: vectors
            that the user brings.
        width: length of the vector, in words.
        licence, weights_licence: of the code as published, and of the weights.
        pretraining_saw_tcga: "no", "yes", "depends" (on the checkpoint) or "unknown"; without labels in all cases.
        reference: paper.
        files: groups of names of which one each must be in the folder of weights.
        warnings: for the reader of a report.
    """

    key: str
    title: str
    kind: str
    width: str
    licence: str
    weights_licence: str
    pretraining_saw_tcga: str
    reference: str = ""
    files: tuple[tuple[str, ...], ...] = ()
    warnings: tuple[str, ...] = ()


_SINGLE_CELL = "models of single cells, used as they are, are often below simple baselines (Kedzierska et al.)"
ENCODERS: dict[str, RnaEncoder] = {
    row.key: row
    for row in (
        RnaEncoder("snn_raw", "z-scores as they are", "fold", "number of columns", "none needed", "none needed", "no"),
        RnaEncoder("pca", "principal components", "fold", "at most components", "none needed", "none needed", "no"),
        RnaEncoder(
            "pathway_mean", "mean per gene group", "fold", "number of gene groups", "none needed", "none needed", "no"
        ),
        RnaEncoder(
            "scgpt",
            "scGPT",
            "frozen",
            "512 (128 or the number of cell types behind MLP-A)",
            "MIT",
            "not stated apart from the code",
            "no",
            "Cui et al. 2024, Nature Methods 21, doi 10.1038/s41592-024-02201-0",
            (("args.json",), ("vocab.json",), SCGPT_WEIGHTS),
            (
                "trained on single cells, read here with bulk samples",
                _SINGLE_CELL,
                "TPM is divided by transcript length, UMI counts of its training are not",
            ),
        ),
        RnaEncoder(
            "bulkrnabert",
            "BulkRNABert",
            "frozen",
            "256",
            "CC BY-NC-SA 4.0",
            "CC BY-NC-SA 4.0 (non-commercial)",
            "depends",
            "Gélard et al. 2025, Proceedings of Machine Learning Research 259",
            (("config.json",), ("tokenizer_config.json",), ("model.safetensors",), BULKRNABERT_GENES),
            (
                "the PyTorch weights on the hub were trained on TCGA: they saw the test patients (without labels); "
                "the checkpoint of GTEx and ENCODE is published for JAX only",
                "19,062 tokens a patient: about a minute each on one CPU core",
            ),
        ),
        RnaEncoder(
            "bulkformer",
            "BulkFormer",
            "table",
            "columns of the table",
            "MIT",
            "MIT",
            "unknown",
            "Kang et al. 2026, Cell Systems",
            (),
            (
                "precomputed embeddings only: compute them with the authors' code of one release (code, data and "
                "weights belong together) and name the table in molecular.encoder.path",
                "its gene graph comes from co-expression in TCGA",
            ),
        ),
        RnaEncoder(
            "precomputed",
            "embeddings of your own",
            "table",
            "columns of the table",
            "yours to state",
            "yours to state",
            "unknown",
            "",
            (),
            ("whatever made the table must not have seen outcomes, nor have been fitted on test patients",),
        ),
    )
}
#: Encoders that :func:`morphome.rna.step.run_encode_rna` runs; the others are fitted with the model.
FROZEN = tuple(row.key for row in ENCODERS.values() if row.kind != "fold")
FALLBACKS = tuple(row.key for row in ENCODERS.values() if row.kind == "fold")


@dataclass(frozen=True)
class Resolution:
    """Which encoder a run uses.

    Attributes:
        requested: as configured.
        used: the same, the fallback, or None where the rows that need it are left out.
        reason: why it is not the one asked for; empty when it is.
        files: what the step reads, for the workflow; empty for encoders that are fitted with the model.
    """

    requested: str
    used: str | None
    reason: str
    files: tuple[Path, ...]

    @property
    def frozen(self) -> bool:
        """The vectors come from a step of their own."""
        return self.used in FROZEN


def encoder(key: str) -> RnaEncoder:
    """The row of an encoder.

    Raises:
        MorphomeError: no such encoder.
    """
    if key not in ENCODERS:
        raise MorphomeError(f"molecular.encoder.name: there is no encoder '{key}'", f"one of {', '.join(ENCODERS)}")
    return ENCODERS[key]


def resolve(section: Mapping[str, Any]) -> Resolution:
    """Decide which encoder a run uses; asked once, while the graph is built.

    Args:
        section: ``molecular.encoder`` of a checked configuration (with its defaults): ``name``, ``on_missing``,
            ``fallback``; ``weights``, ``path``, ``mlp_a``, ``cells`` where they are set.

    Raises:
        MorphomeError: no such encoder; files that the configuration names are absent (single cells); or the weights
            are absent and ``on_missing`` is ``error``.
    """
    row = encoder(section["name"])
    if section["on_missing"] not in ON_MISSING or section["fallback"] not in FALLBACKS:
        raise MorphomeError(
            f"molecular.encoder: on_missing '{section['on_missing']}', fallback '{section['fallback']}'",
            f"on_missing is one of {', '.join(ON_MISSING)}; fallback one of {', '.join(FALLBACKS)}",
        )
    if row.kind == "fold":
        return Resolution(row.key, row.key, "", ())
    found, reason, remedy = _table(section) if row.kind == "table" else _weights(row, section)
    if not reason:
        return Resolution(row.key, row.key, "", (*found, *_cells(row, section)))
    if section["on_missing"] == "error":
        raise MorphomeError(
            f"molecular.encoder: {reason}", f"{remedy}, or set molecular.encoder.on_missing: fallback (or skip)"
        )
    return Resolution(row.key, section["fallback"] if section["on_missing"] == "fallback" else None, reason, ())


def folder_of(section: Mapping[str, Any]) -> Path:
    """Folder of the weights: ``weights`` of the section, else ``$MORPHOME_WEIGHTS/<name>``."""
    named = section.get("weights")
    return Path(named).expanduser() if named else weights_folder(section["name"])


def identify(key: str, files: Sequence[Path], allow_unpinned: bool) -> dict[str, Any]:
    """Checksums of the files of an encoder, and whether they may be used.

    Args:
        files: all that shape the vectors.
        allow_unpinned: ``molecular.encoder.allow_unpinned``.

    Returns:
        ``files``: name to sha256; ``sha256`` of the sorted lines ``name:sha256``; ``grade``: what the comparison with
        published checksums is worth.

    Raises:
        MorphomeError: a file whose checksum is not known, without ``allow_unpinned``.
    """
    sums = {file.name: checksum(file) for file in files}
    known = KNOWN_SHA256.get(key, {})
    unknown = [file for file in files if known.get(file.name) != sums[file.name]]
    if unknown and not allow_unpinned:
        listed = "; ".join(f"{file} has sha256 {sums[file.name]}" for file in unknown)
        raise MorphomeError(
            f"the registry knows no such checksum for encoder '{key}': {listed}",
            "compare with what the publisher states, then set molecular.encoder.allow_unpinned: true",
        )
    lines = "\n".join(sorted(f"{name}:{digest}" for name, digest in sums.items()))
    return {
        "files": sums,
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "grade": UNKNOWN_GRADE if unknown else KNOWN_GRADE,
    }


def facts(resolution: Resolution) -> dict[str, Any]:
    """What a report says of the encoder: ``requested``, ``used``, ``reason``, licences, warnings, width, TCGA."""
    said: dict[str, Any] = {
        "requested": resolution.requested,
        "used": resolution.used,
        "reason": resolution.reason,
        "substituted": resolution.used != resolution.requested,
    }
    if resolution.used is None:
        return said
    row = encoder(resolution.used)
    return said | {
        "title": row.title,
        "kind": row.kind,
        "licence": row.licence,
        "weights_licence": row.weights_licence,
        "pretraining_saw_tcga": row.pretraining_saw_tcga,
        "reference": row.reference,
        "warnings": list(row.warnings),
    }


def find_files(row: RnaEncoder, folder: Path) -> tuple[list[Path], list[str]]:
    """The files of an encoder in a folder, the first alternative of each; names of what is absent."""
    found: list[Path] = []
    absent = []
    for names in row.files:
        there = [folder / name for name in names if (folder / name).is_file()]
        if there:
            found.append(there[0])
        else:
            absent.append(" or ".join(names))
    return found, absent


def _weights(row: RnaEncoder, section: Mapping[str, Any]) -> tuple[list[Path], str, str]:
    """Files; why the encoder cannot be used (empty when it can), and what to do."""
    folder = folder_of(section)
    found, absent = find_files(row, folder)
    if not absent:
        return found, "", ""
    where = f"{folder} holds no {', no '.join(absent)}" if folder.is_dir() else f"the folder {folder} does not exist"
    return [], f"the files of {row.title} are not there: {where}", "put them there, or set molecular.encoder.weights"


def _table(section: Mapping[str, Any]) -> tuple[list[Path], str, str]:
    if not section.get("path"):
        return [], f"{section['name']} needs a table of embeddings", "set molecular.encoder.path"
    path = Path(section["path"]).expanduser()
    if path.is_file():
        return [path], "", ""
    return [], f"{path} (molecular.encoder.path) does not exist", "correct the path"


def _cells(row: RnaEncoder, section: Mapping[str, Any]) -> list[Path]:
    """The annotated single cells of MLP-A, where they are used."""
    cells = section.get("cells") or {}
    if row.key != "scgpt" or section.get("mlp_a") == "identity" or not cells.get("path"):
        return []
    path = Path(cells["path"]).expanduser()
    if not path.is_file():
        raise MorphomeError(f"{path} (molecular.encoder.cells.path) does not exist", "correct the path")
    return [path]
