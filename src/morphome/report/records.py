"""Sections of the page that document the run: run times and provenance."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import yaml

from morphome import __version__
from morphome.features.registry import ENCODERS, encoder_spec
from morphome.report import format as fmt
from morphome.report.format import Column, View
from morphome.report.inputs import ReportData
from morphome.report.limits import rna_encoder


def run_times(data: ReportData) -> dict[str, Any]:
    """Training per model as a table; how fast slides were encoded stands with the slides."""
    view = View(
        "run-times",
        "Training: wall clock per run (one fold)",
        [
            Column("Model"),
            Column("Runs", "num"),
            Column("Total", "num"),
            Column("Per run, s", "num", "median [quartiles]"),
            Column("Epochs or trials", "num", "median [quartiles]"),
            Column("s per epoch or trial", "num"),
            Column("Parameters", "num"),
            Column("Device"),
            Column("Threads", "num"),
        ],
    )
    for name in data.names:
        facts = [r.facts for r in data.runs_of(name)]
        if not facts:
            continue
        view.add(
            [
                name,
                fmt.count(len(facts)),
                fmt.duration(sum(f.get("seconds_total") or 0 for f in facts)),
                fmt.spread([f.get("seconds_total") or np.nan for f in facts], 1),
                fmt.spread([f.get("epochs_run") or np.nan for f in facts]),
                fmt.number(np.median([f.get("seconds_per_epoch") or 0 for f in facts]), 2),
                fmt.count(np.median([f.get("n_parameters") or 0 for f in facts])),
                ", ".join(sorted({str(f.get("device") or "") for f in facts})),
                ", ".join(sorted({str(f.get("threads") or "") for f in facts})),
            ]
        )
    return {"view": view if view.rows else None}


def provenance(data: ReportData, settings_hash: str) -> dict[str, Any]:
    """What the numbers were made with."""
    versions: dict[str, set[str]] = {}
    for run in data.runs:
        for package, version in (run.facts.get("versions") or {}).items():
            versions.setdefault(str(package), set()).add(str(version))
    versions.setdefault("morphome", set()).update({__version__, *(str(s.get("morphome_version")) for s in data.stamps)})
    prints = {str(r.facts.get("feature_fingerprint") or "") for r in data.runs} - {""}
    view = View(
        "files",
        "Files behind this page",
        [Column("File"), Column("Format"), Column("Settings hash"), Column("sha256 (first 16)")],
    )
    for stamp in data.stamps:
        view.add(
            [stamp["file"], f"{stamp['format']} {stamp['format_version']}", stamp["config_hash"], stamp["sha256"][:16]]
        )
    features = data.config.get("features", {})
    return {
        "versions": ", ".join(f"{k} {' / '.join(sorted(v))}" for k, v in sorted(versions.items())),
        "settings_hash": settings_hash,
        "fingerprints": sorted(prints),
        "encoder": "imported features" if data.external else _encoder(str(features.get("encoder", ""))),
        "rna_encoder": _rna_encoder(data),
        "files": view,
        "config": yaml.safe_dump(
            json.loads(json.dumps(data.config, default=str)), sort_keys=False, allow_unicode=True, width=100
        ),
        "seeds": _seeds(data),
    }


def _encoder(name: str) -> str:
    """The encoder and the licence of its weights, which are never shipped."""
    if name.partition(":")[0] not in ENCODERS:
        return name
    spec = encoder_spec(name)
    where = f", {spec.licence_url.partition('//')[2]}" if spec.licence_url else ""
    gate = "; its weights are given to accounts that accepted the licence" if spec.gated else ""
    return f"{name} (licence {spec.licence}{where}{gate})"


def _rna_encoder(data: ReportData) -> str:
    """Which encoder of RNA was asked for and used, its licence, weights, and what of the genes it knows."""
    section = rna_encoder(data)
    if not section:
        return ""
    asked, used = section["requested"], section["used"]
    if used is None:
        return f"requested {asked}, used none: {section.get('reason')}"
    facts = data.encoder
    parts = [f"requested {asked}, used {used}" + (f" ({section.get('reason')})" if used != asked else "")]
    if facts is None:
        return "; ".join([*parts, "fitted inside each training fold"])
    parts.append(f"code: {facts['licence']}; weights: {facts['weights_licence']}")
    weights = facts.get("weights") or {}
    if weights:
        parts.append(f"sha256 {weights['sha256'][:16]}, checksum {weights['grade']}")
    if facts.get("match_rate") is not None:
        parts.append(f"knows {100 * facts['match_rate']:.1f} % of the genes measured")
    parts.append(f"pretraining saw TCGA: {facts['pretraining_saw_tcga']}")
    mlp = facts.get("mlp_a")
    if mlp:
        parts.append(f"MLP-A: {mlp['used']}")
    parts.append(f"{fmt.plural(facts['width'], 'number')} for each of {fmt.plural(facts['patients'], 'patient')}")
    return "; ".join(parts) + (f". {facts['reference']}" if facts.get("reference") else "")


def _seeds(data: ReportData) -> str:
    found = []
    for section in ("simulate", "splits", "training", "evaluation"):
        seed = (data.config.get(section) or {}).get("seed")
        if seed is not None:
            found.append(f"{section} {seed}")
    return ", ".join(found)
