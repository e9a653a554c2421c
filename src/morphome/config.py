"""The configuration: read, filled with defaults, checked against the schema, and cut into sections per step.

Imports nothing beyond PyYAML and jsonschema, so that Snakemake can use it in an environment of its own.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from morphome.config_rows import inherited, rna_problems, row_problems
from morphome.errors import MorphomeError
from morphome.features.fit import encoder_problems
from morphome.models.catalog import info, row_needs
from morphome.paths import PANELS, PUBLISHED, Paths
from morphome.rna.registry import FROZEN, resolve
from morphome.schema import schema
from morphome.training.balance_settings import balance_problem

#: Keys of a molecular table that only some formats read.
_KEYS_OF_FORMATS = {
    "values": ("star_counts",),
    "workflow": ("gdc_gene_level",),
    "file": ("cbioportal",),
    "probemap": ("xena",),
    "unit": ("cbioportal", "xena", "csv"),
    "log2": ("cbioportal", "xena", "csv"),
    "consequences": ("maf", "cbioportal", "xena"),
}


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a key that stands twice is an error; plain YAML would keep the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.YAMLError(f"the key '{key}' stands twice{key_node.start_mark}")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def load_config(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON configuration, fill in the defaults and check it. A key that stands twice is refused.

    Raises:
        MorphomeError: file missing, not YAML, or content that :func:`check_config` refuses.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise MorphomeError(f"{path}: empty or not a mapping", "see config.yaml for an example")
    return check_config(content)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; a key that stands twice is refused.

    Raises:
        MorphomeError: file missing or not YAML.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except FileNotFoundError:
        raise MorphomeError(f"{path}: configuration file not found", "give an existing file") from None
    except yaml.YAMLError as error:
        raise MorphomeError(f"{path}: not valid YAML: {error}", "mend the file at that line") from None


def check_config(config: Mapping[str, Any], files: bool = True) -> dict[str, Any]:
    """Fill in defaults and check a configuration; the input stays as it is.

    Args:
        config: as read from YAML.
        files: also check that the tables and folders it names exist (those that the run makes itself excepted).

    Returns:
        A complete copy in which every model entry has ``name, model, settings, training``.

    Raises:
        MorphomeError: naming the key or file and the remedy, one line per problem.
    """
    full = _unshared(config)
    _fill(full, schema())
    problems = [_explain(error) for error in _validator(schema()).iter_errors(full)]
    if isinstance(full.get("models"), dict) and isinstance(full.get("training"), dict):
        full["models"], found = _resolve_models(full)
        problems += found
    if not problems and "encoder" in full["molecular"]:
        problems = _resolve_encoder(full)
    if not problems:
        full = _name_places(full, _places(full))
        problems = _unknown_places(full)
    if not problems:
        problems = _contradictions(full)
    if not problems and files:
        problems = _missing_files(full)
    if problems:
        raise MorphomeError("configuration: " + "\n  ".join(problems))
    return full


def _unshared(value: Any) -> Any:
    """A copy in which a mapping that stands in two places (a YAML anchor) is two, each with defaults of its own."""
    if isinstance(value, Mapping):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _validator(part: Mapping[str, Any]) -> jsonschema.Draft202012Validator:
    # Sub-schemas (models) refer to nothing outside themselves, so they validate alone.
    return jsonschema.Draft202012Validator(part)


def _resolve_ref(part: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in part:
        target: Any = schema()
        for step in part["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        part = target
    return part


def _fill(value: Any, part: Mapping[str, Any]) -> None:
    """Fill the defaults of ``part`` into ``value`` in place; absent sections are made when all in them is optional."""
    part = _resolve_ref(part)
    if "object" not in _types(part) or not isinstance(value, dict):
        return
    required = set(part.get("required", ()))
    for key, sub in part.get("properties", {}).items():
        sub = _resolve_ref(sub)
        if key not in value:
            if "default" in sub:
                value[key] = copy.deepcopy(sub["default"])
            elif sub.get("type") == "object" and key not in required and key != "simulate" and not sub.get("required"):
                value[key] = {}
        elif value[key] is None and sub.get("type") == "object":
            value[key] = {}  # "simulate:" with nothing behind it means all defaults
        if isinstance(value.get(key), str):
            value[key] = _from_text(value[key], sub)
        if key in value:
            _fill(value[key], sub)


def _types(part: Mapping[str, Any]) -> list[str]:
    """The types that a schema allows; an object that may be null has two."""
    found = part.get("type", [])
    return [found] if isinstance(found, str) else list(found)


def _from_text(text: str, part: Mapping[str, Any]) -> Any:
    """The number or truth value that a text stands for, where the schema asks for one.

    YAML 1.1 reads 1e-5 (without a point) as text, and Snakemake hands over nested values of ``--config`` as text.
    """
    wanted = [kind for option in (part, *part.get("oneOf", ())) for kind in _types(option)]
    with contextlib.suppress(ValueError):
        if "integer" in wanted:
            return int(text)
        if "number" in wanted:
            return float(text)
    if "boolean" in wanted and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return text


def _resolve_models(full: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    known = schema()["$defs"]["models"]
    models: dict[str, Any] = {}
    problems: list[str] = []
    for name, given in full["models"].items():
        if not isinstance(given, (dict, type(None))):
            continue  # the schema's own message stands
        entry = dict(given or {})
        key = entry.pop("model", name)
        own = entry.pop("training", None) or {}
        if key not in known:
            problems.append(
                f"models.{name}: there is no model '{key}'{_nearest(key, known)}; known: {', '.join(known)}"
            )
            continue
        if not isinstance(own, dict):
            problems.append(f"models.{name}.training: {own!r} is no mapping. Remedy: {{epochs: 10}} or the like")
            continue
        training = {**inherited(full["training"], key, own), **own}
        if info(key).kind == "baseline":
            if own.get("protocol") == "published":
                problems.append(
                    f"models.{name}.training.protocol: {key} is a baseline, which has no published protocol. "
                    "Remedy: take it out of this row"
                )
            training["protocol"] = "honest"
        if training.get("protocol") == "published":
            # What the row says stands before what the original code did, and that before the recipe of the lineage
            # (the schema's defaults). The section for all is about honest rows, but for how and where is computed.
            original = known[key].get("published", {})
            entry = {**original.get("settings", {}), **entry}
            recipe = {k: v for k, v in lineage_recipe().items() if k not in ("device", "seed", "precision")}
            training = {**training, **recipe, "epoch_rule": "last", **original.get("training", {}), **own}
        _fill(entry, known[key])
        _fill(training, schema()["$defs"]["training"])
        checks = [(f"models.{name}", entry, known[key])]
        distil = training.get("distil")
        if isinstance(distil, dict) and isinstance(distil.get("teacher"), str) and distil["teacher"] not in known:
            problems.append(
                f"models.{name}.training.distil.teacher: there is no model '{distil['teacher']}'"
                f"{_nearest(distil['teacher'], known)}. Remedy: mcat, mome or another network of morphome models"
            )
        if isinstance(distil, dict) and distil.get("teacher") in known and isinstance(distil.get("settings"), dict):
            _fill(distil["settings"], known[distil["teacher"]])
            checks.append((f"models.{name}.training.distil.settings", distil["settings"], known[distil["teacher"]]))
        if own:  # the section itself is checked once, for all
            checks.append((f"models.{name}.training", training, schema()["$defs"]["training"]))
        for prefix, content, part in checks:
            problems += [_explain(error, prefix) for error in _validator(part).iter_errors(content)]
        models[name] = {"name": name, "model": key, "settings": entry, "training": training}
    return models, problems


def lineage_recipe() -> dict[str, Any]:
    """The recipe of the MCAT family: the defaults of the section ``training``, but for its protocol."""
    properties = schema()["$defs"]["training"]["properties"]
    return {k: copy.deepcopy(v["default"]) for k, v in properties.items() if "default" in v and k != "protocol"}


def _resolve_encoder(full: dict[str, Any]) -> list[str]:
    """Decide which encoder of RNA the run uses, once: a configuration that says so already keeps its decision.

    ``name`` becomes the encoder used, ``requested`` the one asked for. Rows that need one go when it is skipped.
    """
    section = full["molecular"]["encoder"]
    readers = [name for name, row in full["models"].items() if "rna" in row_needs(row)]
    if "requested" in section or not readers:
        return []
    try:
        found = resolve(section)
    except MorphomeError as error:
        return [str(error).replace("\n ", "")]
    section |= {"requested": found.requested, "reason": found.reason}
    if found.used is not None:
        section["name"] = found.used
        return []
    section["left_out"] = readers
    full["models"] = {name: row for name, row in full["models"].items() if name not in readers}
    if full["models"]:
        return []
    return [
        f"models: every row needs the encoder of RNA that is skipped ({found.reason}). "
        "Remedy: add a row that needs none, or set molecular.encoder.on_missing: fallback"
    ]


def _contradictions(full: Mapping[str, Any]) -> list[str]:
    """Rules between keys that a JSON schema says poorly."""
    problems = []
    molecular = full["molecular"]
    for panel in set(full["cohort"]["require"]) - {"wsi"}:
        if panel not in molecular:
            problems.append(
                f"cohort.require: '{panel}' is required but molecular.{panel} is not configured. "
                f"Remedy: add molecular.{panel} or take '{panel}' out of cohort.require"
            )
    if full["cohort"]["endpoint"] != "OS" and full["cohort"]["clinical"]["format"] == "gdc_clinical":
        problems.append(
            f"cohort.endpoint: the GDC's clinical table holds OS only, not {full['cohort']['endpoint']}. "
            "Remedy: cohort.clinical.format tcga_cdr, or cohort.endpoint OS"
        )
    if full["features"]["source"] == "external" and "path" not in full["features"]:
        problems.append("features.path: needed with features.source 'external'. Remedy: name the file or folder")
    if full["features"]["source"] == "encode" and "path" in full["features"]:
        problems.append(
            "features.path: not used with features.source 'encode'. "
            "Remedy: set features.source: external to use these features, or take the path out"
        )
    needs_sheet = full["features"]["source"] == "encode"
    if needs_sheet and "sheet" not in full["slides"]:
        remedy = "{gdc}/sample_sheet.tsv" if "gdc" in full else "a TSV with slide_id, patient_id, path"
        problems.append(f"slides.sheet: needed to encode slides. Remedy: {remedy}")
    if "gdc" in full:
        own = Paths(full).gdc.resolve()
        for key, place in named_files(full).items():
            if key.startswith("gdc.have") and (
                own.is_relative_to(place.resolve()) or place.resolve().is_relative_to(own)
            ):
                problems.append(f"{key}: {place} holds this run's own gdc folder. Remedy: name the folder of the files")
        if Path(full["gdc"]["folder"]).resolve().is_relative_to(own):
            problems.append("gdc.folder: lies in this run's own gdc folder. Remedy: a folder of its own, resources/gdc")
    if needs_sheet and "gdc" in full and full["slides"].get("sheet") == str(Paths(full).gdc_sheet):
        folder = full["slides"].get("folder")
        if folder != full["gdc"]["folder"]:
            problems.append(f"slides.folder: {folder} is not where the GDC's slides go. Remedy: {{gdc_files}}")
    if Path(full.get("gdc", {}).get("pinned", "")) == Paths(full).gdc:
        problems.append(
            f"gdc.pinned: {Paths(full).gdc} is this run's own list. Remedy: copy the folder elsewhere first"
        )
    if "gdc" in full and "simulate" in full:
        problems.append("gdc: a simulated cohort takes nothing from the GDC. Remedy: remove 'gdc' or 'simulate'")
    if full["features"]["source"] == "encode":
        problems += encoder_problems(full)
    for panel in PANELS:
        table = molecular.get(panel)
        if not table:
            continue
        known = schema()["properties"]["molecular"]["properties"][panel]["properties"]
        for key in set(table) & set(_KEYS_OF_FORMATS):
            if table["format"] not in _KEYS_OF_FORMATS[key] and table[key] != known[key].get("default"):
                problems.append(
                    f"molecular.{panel}.{key}: means nothing for format {table['format']}. "
                    f"Remedy: take it out (it is for {', '.join(_KEYS_OF_FORMATS[key])})"
                )
        if table["format"] in {"star_counts", "gdc_gene_level"} and "sheet" not in molecular:
            problems.append(
                f"molecular.sheet: needed for molecular.{panel} with format {table['format']}. "
                "Remedy: name the GDC sample sheet that lists its files"
            )
    if full["splits"]["scheme"] == "published" and "folder" not in full["splits"]:
        problems.append(
            "splits.folder: needed with splits.scheme 'published'. Remedy: name the folder of splits_<k>.csv"
        )
    if "simulate" in full and full["simulate"]["tiles_min"] > full["simulate"]["tiles_max"]:
        problems.append("simulate.tiles_min: larger than simulate.tiles_max. Remedy: swap them")
    problems += rna_problems(molecular)
    if problem := balance_problem(full["training"]["balance"]):
        problems.append(f"training.balance{problem[0]}. Remedy: {problem[1]}")
    if all(entry["training"]["protocol"] == "published" for entry in full["models"].values()):
        problems.append(
            "models: every row has protocol published, and a report needs an honest one. "
            "Remedy: add a row with protocol honest, for example clinical_cox"
        )
    for name, entry in full["models"].items():
        problems += row_problems(name, entry, full["training"])
        needs = row_needs(entry)
        if "path" in needs and "wsi" not in full["cohort"]["require"]:
            problems.append(
                f"models.{name}: sees slides, but cohort.require does not list 'wsi'. "
                "Remedy: add 'wsi' to cohort.require or take the model out"
            )
        if "omic_all" in needs and not {"rna", "mut", "cnv"} & set(molecular):
            problems.append(
                f"models.{name}: needs molecular columns, and no table is configured. "
                "Remedy: add molecular.rna, .mut or .cnv, or take the model out"
            )
        encoder = molecular.get("encoder", {}).get("name", "snn_raw")
        wants = {"scgpt": ["expression"], "bulkrnabert": ["expression"], "pathway_mean": ["rna", "groups"]}
        for need in wants.get(encoder, [] if encoder in FROZEN else ["rna"]) if "rna" in needs else []:
            if need not in molecular:
                problems.append(
                    f"models.{name}: the encoder {encoder} needs molecular.{need}, which is not configured. "
                    f"Remedy: add molecular.{need}, choose another molecular.encoder or take the model out"
                )
        tables = list(entry["settings"]["panels"]) if "panels" in needs else []
        for need in [*tables, *(["groups"] if "omic_groups" in needs else [])]:
            if need not in molecular:
                problems.append(
                    f"models.{name}: needs molecular.{need}, which is not configured. "
                    f"Remedy: add molecular.{need} or take the model out"
                )
    return problems


def named_files(full: Mapping[str, Any]) -> dict[str, Path]:
    """Every file or folder that the configuration names, by key."""
    named = {
        "cohort.clinical.path": full["cohort"]["clinical"]["path"],
        "cohort.covariates.path": full["cohort"].get("covariates", {}).get("path"),
        "slides.sheet": full["slides"].get("sheet"),
        "slides.folder": full["slides"].get("folder"),
        "tiling.masks": full["tiling"].get("masks"),
        "tiling.segmenter_weights": full["tiling"].get("segmenter_weights"),
        "features.path": full["features"].get("path"),
        "features.weights": full["features"].get("weights"),
        "splits.folder": full["splits"].get("folder") if full["splits"]["scheme"] == "published" else None,
        "molecular.sheet": full["molecular"].get("sheet"),
        "gdc.pinned": full.get("gdc", {}).get("pinned"),
    }
    named |= {f"gdc.have[{number}]": folder for number, folder in enumerate(full.get("gdc", {}).get("have", ()))}
    for part in (*PANELS, "groups"):
        for key in ("path", "probemap"):
            named[f"molecular.{part}.{key}"] = full["molecular"].get(part, {}).get(key)
    return {key: Path(value) for key, value in named.items() if value}


def _places(full: Mapping[str, Any]) -> dict[str, str]:
    """What stands for a folder in a text of the configuration: ``{simulated}`` and the like."""
    paths = Paths(full)
    places = {"{published}": str(PUBLISHED)}
    if "simulate" in full:
        places["{simulated}"] = str(paths.simulated)
    if "gdc" in full:
        places |= {"{gdc}": str(paths.gdc), "{gdc_files}": full["gdc"]["folder"]}
    return places


def _name_places(value: Any, places: Mapping[str, str]) -> Any:
    """Replace the names of folders in every text by the folders."""
    if isinstance(value, dict):
        return {key: _name_places(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [_name_places(item, places) for item in value]
    if isinstance(value, str):
        for name, folder in places.items():
            value = value.replace(name, folder)
    return value


def _unknown_places(full: Mapping[str, Any]) -> list[str]:
    needs = {"{simulated}": "simulate", "{gdc}": "gdc", "{gdc_files}": "gdc"}
    return [
        f"{key}: '{name}' stands for a folder only where the configuration has a section '{section}'. "
        f"Remedy: add that section, or name the folder"
        for key, path in named_files(full).items()
        for name, section in needs.items()
        if name in str(path)
    ]


def _missing_files(full: Mapping[str, Any]) -> list[str]:
    paths = Paths(full)
    made_here = [paths.simulated] if "simulate" in full else []
    if "gdc" in full:
        made_here += [paths.gdc, Path(full["gdc"]["folder"])]
    return [
        f"{key}: {path} does not exist (looked from {Path.cwd()}). Remedy: correct the path"
        for key, path in named_files(full).items()
        if not path.exists() and not any(path.is_relative_to(place) for place in made_here) and not _published(path)
    ]


def _published(path: Path) -> bool:
    """True for a file that the workflow fetches from where it was published."""
    from morphome.download.published import published_file

    return path.parent == PUBLISHED and published_file(path.name) is not None


def _explain(error: jsonschema.ValidationError, prefix: str = "") -> str:
    """One line for one schema error: key, what is wrong, remedy."""
    key = ".".join([*([prefix] if prefix else []), *(str(p) for p in error.absolute_path)]) or "(top level)"
    if error.validator == "additionalProperties":
        known = list(error.schema.get("properties", {}))
        unknown = sorted(set(error.instance) - set(known))
        base = "" if key == "(top level)" else key + "."
        if prefix.count(".") == 1:  # a row of the model table
            known += ["model", "training"]
        return "; ".join(
            f"{base}{name}: unknown key{_nearest(name, known)}. Remedy: known keys are {', '.join(known) or 'none'}"
            for name in unknown
        )
    if error.validator == "required":
        missing = error.message.split("'")[1]
        return f"{key}: '{missing}' is missing. Remedy: add it"
    hint = error.schema.get("description", "")
    allowed = f"one of {error.schema['enum']}" if "enum" in error.schema else hint
    if error.validator == "type":
        kinds = error.validator_value
        kinds = kinds if isinstance(kinds, str) else " or ".join(kinds)
        allowed = f"give a value of type {kinds}" + (f" ({hint})" if hint else "")
    return f"{key}: {error.message}. Remedy: {allowed or 'give a value that the schema allows'}"


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1) or [k for k in known if k.startswith(word)]
    return f" (did you mean '{close[0]}'?)" if close else ""
