"""Step ``encode_rna``: one vector per patient from a frozen encoder of RNA, or from a table of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from morphome.errors import MorphomeError
from morphome.features.weights import checksum
from morphome.files import read_json, read_parquet, write_json, write_parquet
from morphome.rna.bulkrnabert import BulkRNABertEncoder
from morphome.rna.mixing import regulate
from morphome.rna.registry import encoder, folder_of, resolve
from morphome.rna.registry import facts as registry_facts
from morphome.rna.scgpt import ScGPTEncoder
from morphome.rna.tokenise import BulkTokeniser

FORMAT = "morphome.encoded"
FACTS_FORMAT = "morphome.encoder"
#: Kinds of values by what a message calls them; "as_given" is a linear unit that has no name here (FPKM, RSEM).
_AMOUNTS = {"tpm": "TPM", "counts": "counts", "as_given": "other amounts"}


def run_encode_rna(
    *,
    settings: Mapping[str, Any],
    expression: Path | None,
    groups: Path | None,
    out: Path,
    facts: Path,
    cache: Path | None = None,
) -> None:
    """Encode every patient of the expression table.

    Nothing is fitted on patients: the encoder is frozen, a sample's bins are its own, and MLP-A learns from single
    cells alone. Encoders that are fitted belong into the fold (:mod:`morphome.rna.fold_encoder`).

    Args:
        settings: ``{"molecular": {"encoder": {...}}}`` with all defaults.
        expression: ``morphome.panel`` of counts or TPM; not read for a table of the user's own.
        groups: ``morphome.groups``; read with ``genes: families`` only.
        out: ``morphome.encoded``: ``patient_id``, ``e0`` ...; float32, sorted by patient. Extra: ``encoder``,
            ``width``.
        facts: ``morphome.encoder``: ``requested``, ``used``, ``reason``, licences and warnings of the registry,
            ``weights`` (checksums and their grade), ``match``, ``preprocessing``, ``mlp_a``, ``width``, ``patients``.
        cache: a file that keeps the embeddings of mixed cells for later runs.

    Raises:
        MorphomeError: naming the file or key: weights absent or not known, values of another kind, too few genes.
    """
    section = settings["molecular"]["encoder"]
    resolution = resolve(section)
    if not resolution.frozen:
        raise MorphomeError(
            f"molecular.encoder: {resolution.reason or resolution.used + ' is fitted inside each training fold'}",
            "build the workflow's graph again; this step is not part of it",
        )
    row = encoder(resolution.used)
    if row.kind == "table":
        patients, vectors, found = _from_table(resolution.files[0])
    elif expression is None:
        raise MorphomeError(f"molecular.expression: needed for encoder '{row.key}'", "configure molecular.expression")
    else:
        encode = {"scgpt": _scgpt, "bulkrnabert": _bulkrnabert}[row.key]
        patients, vectors, found = encode(section, Path(expression), groups, cache)
    if not np.isfinite(vectors).all():
        raise MorphomeError(f"encoder '{row.key}' gave values that are not finite", "check weights and expression")
    table = pd.DataFrame(vectors.astype(np.float32), columns=[f"e{i}" for i in range(vectors.shape[1])])
    table.insert(0, "patient_id", patients)
    table = table.sort_values("patient_id", ignore_index=True)
    write_parquet(table, out, FORMAT, settings, {"encoder": row.key, "width": vectors.shape[1]})
    said = {**registry_facts(resolution), **found, "width": vectors.shape[1], "patients": len(table)}
    write_json(said, facts, FACTS_FORMAT, settings)


_Encoded = tuple[list[str], np.ndarray, dict[str, Any]]


def _scgpt(section: Mapping[str, Any], expression: Path, groups: Path | None, cache: Path | None) -> _Encoded:
    table, unit = _amounts(expression, tuple(_AMOUNTS))
    genes = list(table.columns[1:])
    model = ScGPTEncoder(
        folder_of(section), allow_unpinned=section["allow_unpinned"], device=_device(section["device"])
    )
    tokeniser = BulkTokeniser(
        model.vocabulary,
        genes,
        table.attrs.get("gene_ids"),
        mode=section["genes"],
        chosen=_families(groups) if section["genes"] == "families" else (),
        panel_size=section["panel_size"],
        bin_scope=section["bin_scope"],
    )
    output, batch = section["output"], section["batch"]
    regulated, mlp_a = None, {"requested": section["mlp_a"], "used": section["mlp_a"], "reason": ""}
    if section["mlp_a"] != "identity" and not (section.get("cells") or {}).get("path"):
        mlp_a |= {"used": "identity", "reason": "no annotated single cells (molecular.encoder.cells.path)"}
    if mlp_a["used"] != "identity":
        regulated = regulate(model, tokeniser, section["cells"], output=output, batch=batch, cache=cache)
        mlp_a |= regulated.facts
    rows = tokeniser.rows(table[genes].to_numpy(np.float32))
    bar = tqdm(rows, desc="scgpt", unit="patient", disable=None, leave=False)
    vectors = model.embed(tokeniser, bar, output, batch)
    if regulated is not None:
        vectors = regulated.apply(vectors, mlp_a["used"])
    found = {
        "weights": model.weights,
        "match_rate": tokeniser.facts["match_rate"],
        "match": tokeniser.facts,
        "preprocessing": {
            "values": unit,
            "genes": section["genes"],
            "panel_size": section["panel_size"],
            "bin_scope": section["bin_scope"],
            "output": output,
            "zeros": "included",
            "device": model.device,
        },
        "mlp_a": mlp_a,
    }
    return table["patient_id"].tolist(), vectors, found


def _bulkrnabert(section: Mapping[str, Any], expression: Path, groups: Path | None, cache: Path | None) -> _Encoded:
    table, unit = _amounts(expression, ("tpm",))
    genes = list(table.columns[1:])
    model = BulkRNABertEncoder(
        folder_of(section), allow_unpinned=section["allow_unpinned"], device=_device(section["device"])
    )
    columns, match = model.columns(genes, table.attrs.get("gene_ids") or {})
    bar = tqdm(table[genes].to_numpy(np.float32), desc="bulkrnabert", unit="patient", disable=None, leave=False)
    found = {
        "weights": model.weights,
        "match_rate": match["match_rate"],
        "match": match,
        "preprocessing": {
            "values": unit,
            "rule": "log10(TPM + 1) in bins of equal width; genes that are absent or not measured count as 0",
            "output": "mean of the last layer over genes",
            "device": model.device,
        },
        "mlp_a": None,
    }
    return table["patient_id"].tolist(), model.embed(bar, columns), found


def _from_table(path: Path) -> _Encoded:
    """Vectors of a CSV, TSV or Parquet file: ``patient_id`` and numbers.

    Raises:
        MorphomeError: naming the file: no column ``patient_id``, a patient twice, or a cell that is no number.
    """
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            separator = "\t" if path.suffix in (".tsv", ".txt") else ","
            table = pd.read_csv(path, sep=separator, dtype={"patient_id": str})
    except (ValueError, OSError) as error:
        first = str(error).splitlines()[0]
        raise MorphomeError(f"{path}: cannot be read as a table ({first})", "give CSV, TSV or Parquet") from None
    if "patient_id" not in table.columns or len(table.columns) < 2 or not len(table):
        raise MorphomeError(f"{path}: needs a column patient_id and columns of numbers", "one row per patient")
    patients = table.pop("patient_id").astype(str)
    if patients.duplicated().any():
        raise MorphomeError(f"{path}: patient {patients[patients.duplicated()].iloc[0]} occurs twice", "keep one row")
    numbers = table.apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    bad = np.argwhere(~np.isfinite(numbers))
    if bad.size:
        place, column = (int(number) for number in bad[0])
        raise MorphomeError(
            f"{path}: patient {patients.iloc[place]}, column {table.columns[column]}: not a finite number",
            "every patient of the table needs all values; leave a patient without RNA out",
        )
    found = {
        "weights": {"files": {path.name: checksum(path)}, "sha256": checksum(path), "grade": "a table, not weights"},
        "match_rate": None,
        "preprocessing": {"columns": [str(name) for name in table.columns][:20], "n_columns": table.shape[1]},
        "mlp_a": None,
    }
    return patients.tolist(), numbers, found


def _amounts(path: Path, allowed: tuple[str, ...]) -> tuple[pd.DataFrame, str]:
    """The expression table, and what its values are.

    Raises:
        MorphomeError: values of another kind (logarithms, z-scores; counts where TPM are needed), or negative ones.
    """
    table = read_parquet(path, "morphome.panel")
    kind = table.attrs.get("value_type")
    if kind not in allowed:
        raise MorphomeError(
            f"{path}: its values are {table.attrs.get('unit', kind)}; this encoder takes "
            f"{' or '.join(_AMOUNTS[name] for name in allowed)}",
            "give such values as molecular.expression (with star_counts set .values)",
        )
    values = table.iloc[:, 1:].to_numpy(np.float32)
    if (below := np.argwhere(values < 0)).size:
        row, column = (int(number) for number in below[0])
        patient = table["patient_id"].iloc[row]
        raise MorphomeError(
            f"{path}: {values[row, column]:g} of {table.columns[column + 1]} for patient {patient} is negative: "
            "z-scores or logarithms?",
            "give counts or TPM as molecular.expression",
        )
    return table, kind


def _families(groups: Path | None) -> list[str]:
    """Genes of all gene groups, sorted."""
    if groups is None:
        raise MorphomeError(
            "molecular.encoder.genes: families needs gene groups",
            "configure molecular.groups, or set molecular.encoder.genes: disjoint_panels",
        )
    content = read_json(groups, "morphome.groups")["groups"]
    return sorted({column["gene"] for columns in content.values() for column in columns})


def _device(asked: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` takes a GPU where there is one."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise MorphomeError("molecular.encoder.device: cuda, but torch sees no GPU here", "set device: auto")
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"
