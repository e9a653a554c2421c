"""What the rows of the model table may say of their training, and what an encoder of RNA can read.

Rules between keys that a JSON schema says poorly. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morphome.models.catalog import info
from morphome.training.balance_settings import balance_problem


def inherited(section: Mapping[str, Any], key: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """What a row takes of the section ``training``: not what its model cannot have, nor what no original code had."""
    published = own.get("protocol", section.get("protocol")) == "published"
    gone = {"distil"} if published or not is_student(key) else set()
    gone |= {"balance", "modality_dropout"} if published or not is_fused(key) else set()
    gone |= {"search"} if published else set()
    return {name: value for name, value in section.items() if name not in gone}


def is_fused(key: str) -> bool:
    """A network with a branch of slides and one of genes."""
    needs = info(key).needs
    return info(key).kind == "neural" and "path" in needs and len(needs) > 1


def is_student(key: str) -> bool:
    """A network of slides alone, which may be taught by one that has genes."""
    return info(key).kind == "neural" and info(key).needs == {"path"}


def rna_problems(molecular: Mapping[str, Any]) -> list[str]:
    """What an encoder of RNA cannot read."""
    section, problems = molecular.get("encoder", {}), []
    if "requested" not in section:  # no row reads it
        return []
    if section["name"] == "scgpt" and section["genes"] == "families" and "groups" not in molecular:
        problems.append(
            "molecular.encoder.genes: families are the genes of molecular.groups, which is not configured. "
            "Remedy: add molecular.groups, or set molecular.encoder.genes: disjoint_panels"
        )
    table = molecular.get("expression", {})
    if section["name"] == "bulkrnabert" and table.get("format") == "star_counts" and table["values"] != "tpm":
        problems.append(
            f"molecular.expression.values: bulkrnabert reads TPM, not {table['values']}. "
            "Remedy: set molecular.expression.values: tpm"
        )
    return problems


def row_problems(name: str, entry: Mapping[str, Any], section: Mapping[str, Any]) -> list[str]:
    """Training settings of a row that do not go together, or not with its model.

    Args:
        name: of the row; entry: its ``model``, ``settings`` and ``training``.
        section: ``training`` for all rows; a balance rule that a row has from there is checked once, there.
    """
    problems = _distil_problems(name, entry)
    if entry["training"]["balance"] != section["balance"] or not is_fused(entry["model"]):
        problems += _balance_problems(name, entry)
    return problems + _protocol_problems(name, entry)


def _balance_problems(name: str, entry: Mapping[str, Any]) -> list[str]:
    """What is wrong with the balance rule of a row."""
    key, balance = f"models.{name}.training.balance", entry["training"]["balance"]
    if balance.get("rule", "none") != "none" and not is_fused(entry["model"]):
        return [
            f"{key}: {entry['model']} has no branches of slides and of genes to balance. "
            "Remedy: take it out of this row"
        ]
    problem = balance_problem(balance)
    return [f"{key}{problem[0]}. Remedy: {problem[1]}"] if problem else []


def _protocol_problems(name: str, entry: Mapping[str, Any]) -> list[str]:
    """What does not go with the protocol, and genes that are left out of a model without tokens for them."""
    key, training = f"models.{name}.training", entry["training"]
    published, rule, problems = training["protocol"] == "published", training["epoch_rule"], []
    if (rule == "oracle_outer_best") > published or (rule == "inner_best" and published):
        problems.append(
            f"{key}.epoch_rule: {rule} does not go with protocol {training['protocol']}. "
            "Remedy: honest takes inner_best or last, published takes last or oracle_outer_best"
        )
    if published and any(training["search"].values()):
        problems.append(f"{key}.search: the best would be chosen on the reported fold. Remedy: take it out of this row")
    if training["modality_dropout"] > 0 and not is_fused(entry["model"]):
        problems.append(
            f"{key}.modality_dropout: {entry['model']} has no tokens for patients without genes. "
            "Remedy: take it out of this row"
        )
    return problems


def _distil_problems(name: str, entry: Mapping[str, Any]) -> list[str]:
    """What a student and its teacher must be."""
    distil, key = entry["training"]["distil"], f"models.{name}.training.distil"
    if not distil:
        return []
    if not is_student(entry["model"]):
        return [f"{key}: {entry['model']} is no network of slides alone. Remedy: take distil out of this row"]
    if entry["training"]["protocol"] == "published":
        return [f"{key}: does not go with protocol published. Remedy: protocol honest"]
    teacher = distil["teacher"]
    if distil["loss"] == "gene_aux":
        if teacher is None and not distil["settings"]:
            return []
        return [
            f"{key}.teacher: gene_aux has no teacher. Remedy: take teacher and settings out, or choose another loss"
        ]
    if teacher is None:
        return [f"{key}.teacher: missing, and {distil['loss']} needs one. Remedy: mcat, mome or another network"]
    if info(teacher).kind != "neural":
        return [f"{key}.teacher: {teacher} is no network. Remedy: mcat, mome or another network of morphome models"]
    if distil["loss"] == "kd_logit" and "cox" in (info(entry["model"]).head, info(teacher).head):
        return [f"{key}.loss: kd_logit compares time bins, which a Cox head has not. Remedy: kd_risk_rank"]
    return []
