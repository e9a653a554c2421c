"""A complete small run in the contracts' formats, written file by file: what the report is tested and drawn with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from morphome.files import write_json, write_parquet
from morphome.genomics.groups import match_groups
from morphome.report.inputs import ReportInputs

HORIZON = 24.0
#: A reason with everything that would break a page that forgets to escape.
NASTY = """<script>alert("x")</script> 'unreadable' & cut off at 12 % "of" the file"""
ROWS = {
    "random": ("random", [], 0.0),
    "clinical_cox": ("clinical_cox", ["clinical"], 0.9),
    "mean_pool_cox": ("mean_pool_cox", ["path"], 0.5),
    "coxnet_genes": ("coxnet_genes", ["panels"], 0.6),
    "mome": ("mome", ["omic_groups", "path"], 1.0),
}
RUN = {"made": "by the factory"}


def _pairs(time: np.ndarray, event: np.ndarray, fold: np.ndarray) -> np.ndarray:
    return (event[:, None] == 1) & (time[:, None] < time[None, :]) & (fold[:, None] == fold[None, :])


def _c(risk: np.ndarray, pairs: np.ndarray, weight: np.ndarray | None = None) -> float:
    w = np.ones(len(risk)) if weight is None else weight
    good = (risk[:, None] > risk[None, :]) + 0.5 * (risk[:, None] == risk[None, :])
    both = np.outer(w, w) * pairs
    return float((both * good).sum() / both.sum())


EXPERTS = ["TransFusion", "BottleneckTransFusion", "AddFusion", "DropX2Fusion"]


#: What the scanners of the sites give: microns per pixel and objective power. The third is the well-known conflict.
_SCANNERS = {
    "AB": (0.2521, 40.0), "CD": (0.2468, 40.0), "EF": (0.2325, 20.0), "GH": (0.5014, 20.0), "JK": (0.2527, 40.0),
    "LM": (0.2480, None),
}  # fmt: skip


def _mixed(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """What is odd about the slide of this number: most sites have a flag, some slides a trouble of their own."""
    no_tiles = {"status": "failed", "n_tiles_planned": 0, "n_tiles": 0, "verdict": "quarantine"}
    missing = "the file does not say its microns per pixel (no objective power)"
    wrong = "'openslide' says 0.2521 x 0.2521 microns per pixel, 'tiff_resolution' says 25.21 x 25.21: a factor of 100"
    own: dict[int, dict[str, Any]] = {
        0: {**no_tiles, "reason_code": "missing_mpp", "mpp_x": None, "mpp_y": None, "mpp_source": "",
            "all_sources_json": None, "reason": f"slide 'a': {missing}\n  Remedy: set it in tiling.mpp_overrides"},
        1: {"mpp_source": "assumed_from_power", "mpp_x": 0.25, "mpp_y": 0.25, "flags": "assumed_from_power",
            "verdict": "flag"},
        4: {"mpp_source": "assumed_for_cohort", "mpp_x": 0.25, "mpp_y": 0.25, "flags": "assumed_for_cohort",
            "verdict": "flag"},
        6: {**no_tiles, "reason_code": "conflicting_mpp", "reason": f"slide 'b': {wrong}\n  Remedy: see",
            "all_sources_json": '{"openslide": [0.2521, 0.2521], "tiff_resolution": [25.21, 25.21]}'},
        7: {"n_tiles": row["n_tiles"] - 2, "n_tiles_failed": 2, "reader": "openslide",
            "reader_reason": "2 of 8 regions differ from OpenSlide", "parity_max_difference": 3.0},
        8: {"reader": "openslide", "reader_reason": "the file is no TIFF", "parity_n": 0,
            "parity_max_difference": None},
        10: {"status": "failed", "reason_code": "too_many_failed_tiles", "reason": "slide 'c': 9 of 90 tiles",
             "n_tiles_planned": 90, "n_tiles": 0, "n_tiles_failed": 9},
        12: {"mpp_y": 0.2560, "side_y_px": 500, "flags": "anisotropic", "verdict": "flag"},
        13: {"reader": "openslide", "reader_reason": "1 of 8 regions differ from OpenSlide",
             "parity_max_difference": 1.0},
    }  # fmt: skip
    if number in own:
        return own[number]
    power, ratio = row["objective_power"], (row["objective_power"] or 0) * row["mpp_x"] / 10
    odd = not power or not 0.85 <= ratio <= 1.15
    return {"flags": "power_conflict", "verdict": "flag"} if odd else {}


class Factory:
    """Writes one run. ``external``: no thumbnails, no timings; ``only``: names of the rows to keep.

    ``mixed``: slides of several scanners with flags, refusals, assumptions and failed tiles of every kind.
    ``gdc``: a cohort as the GDC gives it: a long flow with joined records, hospitals with several codes, all slides
    listed, four molecular tables, many gene groups, and the query.
    """

    def __init__(
        self,
        root: Path,
        *,
        patients=40,
        repeats=1,
        folds=3,
        only=None,
        external=False,
        oracle=True,
        groups=True,
        horizon: float | None = HORIZON,
        mixed=False,
        gdc=False,
        seed=3,
    ) -> None:
        self.root, self.n, self.repeats, self.folds = root, patients, repeats, folds
        self.rows = {k: v for k, v in ROWS.items() if only is None or k in only}
        self.mixed, self.gdc = mixed, GdcCohort(self) if gdc else None
        self.external, self.oracle, self.groups, self.horizon = external, oracle, groups, horizon
        self.rng = np.random.default_rng(seed)
        self.config: dict[str, Any] = {
            "name": "factory",
            "title": "Demo <cohort> & its report",
            "output": "results",
            "models": {
                k: {"name": k, "model": v[0], "settings": {}, "training": {"epochs": 6}} for k, v in self.rows.items()
            },
            "splits": {"scheme": "site", "folds": folds, "repeats": repeats, "seed": 1},
            "features": {"source": "external" if external else "encode", "encoder": "stain_texture"},
            "evaluation": {"horizon_months": HORIZON, "bootstrap": 100, "seed": 1},
        }
        if oracle:
            self.config["simulate"] = {"patients": patients, "seed": 7}

    def write(self) -> ReportInputs:
        self._patients()
        self._slides()
        self._splits()
        self._runs()
        self._evaluation()
        r = self.root
        extra = self.gdc.write() if self.gdc else {}
        return ReportInputs(
            **extra,
            cohort_flow=r / "cohort/flow.json",
            analysis_flow=r / "analysis/flow.json",
            patients=r / "analysis/patients.parquet",
            audit=r / "features/audit.parquet",
            splits=r / "splits/site.parquet",
            split_facts=r / "splits/site.json",
            evaluation=r / "evaluation",
            runs=[
                r / "runs" / n / f"r{i}" / f"f{k}"
                for n in self.rows
                for i in range(self.repeats)
                for k in range(self.folds)
            ],
            config=self.config,
            thumbnails=[]
            if self.external
            else [(s, r / f"tiles/{s}.jpg", r / f"tiles/{s}.json") for s in self.slide_ids],
            timings=[] if self.external else [r / f"features/{s}.json" for s in self.slide_ids],
            groups=r / "groups.json" if self.groups else None,
            oracle=r / "oracle.json" if self.oracle else None,
        )

    def _json(self, name: str, format_name: str, content: dict[str, Any]) -> None:
        write_json(content, self.root / name, format_name, RUN)

    def _table(self, file: str, format_name: str, table: pd.DataFrame, **extra: Any) -> None:
        write_parquet(table, self.root / file, format_name, RUN, extra)

    def _patients(self) -> None:
        n, rng = self.n, self.rng
        ids = [f"TCGA-{['AB', 'CD', 'EF', 'GH', 'JK', 'LM'][i % 6]}-{1000 + i}" for i in range(n)]
        self.eta = rng.normal(size=n)
        happens, censored = rng.exponential(30 * np.exp(-0.8 * self.eta)), rng.exponential(45, size=n)
        self.time, self.event = np.minimum(happens, censored).round(2) + 0.5, (happens <= censored).astype("int8")
        self.ids, self.sites = ids, [i.split("-")[1] for i in ids]
        stage = np.where(rng.random(n) < 0.1, np.nan, rng.integers(1, 5, n))
        table = pd.DataFrame(
            {
                "patient_id": ids,
                "site": self.sites,
                "time_months": self.time,
                "event": self.event,
                "endpoint": "OS",
                "age_years": rng.normal(63, 9, n).round(1),
                "sex": [None if i == 3 else ("female", "male")[i % 2] for i in range(n)],
                "stage": stage,
                "grade": rng.integers(1, 4, n).astype(float),
                "histology": ["Adenocarcinoma, NOS"] * n,
                "n_slides": 0 if self.external else 1,
                "n_tiles": rng.integers(120, 300, n),
                "has_rna": True,
                "has_mut": rng.random(n) < 0.9,
                "has_cnv": True,
                "slide_ids": [[f"{i}-01Z-00-DX1"] for i in ids],
            }
        )
        self._table("analysis/patients.parquet", "morphome.analysis", table)
        first = {
            "name": "follow-up above 0",
            "unit": "patients",
            "before": n + 3,
            "after": n + 1,
            "excluded": ["TCGA-XX-1", "TCGA-XX-2"],
            "reason": "no time or time 0",
        }
        last = {
            "name": "patients with a usable slide",
            "unit": "patients",
            "before": n + 1,
            "after": n,
            "excluded": ["TCGA-AB-9999"],
            "reason": f"no usable slide; {NASTY}",
        }
        kept = {
            "name": "slides with features",
            "unit": "slides",
            "before": n + 1,
            "after": n,
            "excluded": ["TCGA-AB-9999-01Z-00-DX1"],
            "reason": "unreadable: 1",
        }
        rna = {"name": "patients with RNA", "unit": "patients", "before": n, "after": n, "excluded": [], "reason": ""}
        self._json(
            "cohort/flow.json", "morphome.flow", {"unit": "patients", "steps": [first], "sources": ["clinical.tsv"]}
        )
        self._json("analysis/flow.json", "morphome.flow", {"steps": [first, kept, last, rna]})

    def _slides(self) -> None:
        self.slide_ids = [f"{i}-01Z-00-DX1" for i in self.ids[:18]] + ["TCGA-AB-9999-01Z-00-DX1"]
        audit = []
        for number, s in enumerate(self.slide_ids):
            qc = self._audit_row(number, s)
            audit.append(qc)
            record = {k: v for k, v in qc.items() if k not in {"all_sources_json", "fingerprint"}}
            self._json(f"tiles/{s}.json", "morphome.slide_qc", record)
            read = qc["n_tiles"]
            timing = {"slide_id": s, "n_tiles": read, "seconds_total": 1.4, "seconds_read": 0.5, "seconds_wait": 0.2}
            timing |= {
                "seconds_encode": 0.8,
                "tiles_per_second": read / 1.4,
                "threads": 2,
                "reading_threads": 2,
                "device": "cpu",
            }
            self._json(f"features/{s}.json", "morphome.timing", {**timing, "bound": "encoder", "batch": 64})
            self._thumbnail(self.root / f"tiles/{s}.jpg", qc["status"] != "ok")
        table = pd.DataFrame(audit)
        if self.external:
            table = table[["slide_id", "n_tiles", "status", "reason"]]
        self._table("features/audit.parquet", "morphome.slide_audit", table)
        match = {g: {"asked": 30, "matched_genes": 28, "columns": 71} for g in ("Tumour suppressors", "Oncogenes")}
        self._json(
            "groups.json",
            "morphome.groups",
            {"groups": {}, "match": match, "dropped": {"Empty <group>": "no gene matched"}},
        )
        self._json(
            "oracle.json",
            "morphome.oracle",
            {"scenario": "S3", "oracle_c": 0.83, "n_patients": self.n, "n_events": int(self.event.sum())},
        )

    def _audit_row(self, number: int, slide: str) -> dict[str, Any]:
        """Row of the audit. ``mixed`` gives every kind of flag, refusal, assumption and failed tile."""
        site = slide.split("-")[1]
        mpp, power = _SCANNERS[site] if self.mixed else (0.2521, 40.0)
        n = int(self.rng.integers(120, 300))
        row: dict[str, Any] = {
            "slide_id": slide, "status": "ok", "reason_code": "", "reason": "", "vendor": "aperio", "width_px": 12000,
            "height_px": 9600, "mpp_x": mpp, "mpp_y": mpp, "mpp_source": "openslide", "resolution_unit": "",
            "all_sources_json": f'{{"openslide": [{mpp}, {mpp}], "aperio": [{mpp}, {mpp}]}}', "objective_power": power,
            "mpp_target": 0.5, "side_x_px": round(128 / mpp), "side_y_px": round(128 / mpp), "verdict": "ok",
            "flags": "", "level_downsamples": "1.0; 4.0", "tissue_mm2": float(self.rng.uniform(3, 9)),
            "pen_fraction": 0.01, "fold_fraction": 0.002, "blood_fraction": 0.0, "sharpness_median": 312.0,
            "reader": "tiled_jpeg", "reader_reason": "", "parity_n": 8, "parity_max_difference": 0.0,
            "mask_source": "made", "n_tiles_planned": n, "n_tiles": n, "n_tiles_failed": 0,
            "fingerprint": "ab12cd34ef56",
        }  # fmt: skip
        if self.mixed:
            row |= _mixed(number, row)
        if "9999" in slide:
            gone = dict.fromkeys(("width_px", "height_px", "mpp_x", "mpp_y", "side_x_px", "side_y_px", "reader"))
            row |= {**gone, "status": "failed", "reason_code": "unreadable", "verdict": "", "mpp_source": None}
            row |= {"reason": f"slides/{slide}.svs: {NASTY}\n  Remedy: fetch the file again", "tissue_mm2": 0.0}
            row |= {"n_tiles_planned": 0, "n_tiles": 0, "all_sources_json": None}
        x, y = row["mpp_x"], row["mpp_y"]
        power = row["objective_power"]
        row["power_ratio"] = None if not x or not power else (x + y) / 2 * power / 10
        row["anisotropy"] = None if not x else abs(x / y - 1)
        for axis, mpp in (("x", x), ("y", y)):
            row[f"deviation_{axis}_pct"] = 100 * (row[f"side_{axis}_px"] * mpp / 256 / 0.5 - 1) if mpp else None
        row["deviation_pct"] = None if not x else (row["deviation_x_pct"] + row["deviation_y_pct"]) / 2
        row["mpp_effective"] = None if not x else 0.5 * (1 + row["deviation_pct"] / 100)
        return row

    def _thumbnail(self, path: Path, bad: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (320, 256), (205, 205, 205) if bad else (244, 242, 245))
        draw = ImageDraw.Draw(image)
        if not bad:
            x, y = self.rng.integers(30, 90, 2)
            draw.ellipse([x, y, x + 170, y + 120], fill=(222, 160, 190), outline=(0, 114, 178), width=2)
            for i in range(6):
                draw.rectangle([x + 30 + 18 * i, y + 40, x + 48 + 18 * i, y + 58], outline=(0, 158, 115))
        image.save(path, "JPEG", quality=70)

    def _splits(self) -> None:
        names = sorted(set(self.sites))
        rows, self.fold = [], []
        for repeat in range(self.repeats):
            fold = np.array([(names.index(s) + repeat) % self.folds for s in self.sites])
            self.fold.append(fold)
            for k in range(self.folds):
                inner = self.rng.random(self.n) < 0.2
                for i, patient in enumerate(self.ids):
                    role = "test" if fold[i] == k else "inner_val" if inner[i] else "train"
                    rows.append([patient, repeat, k, role, 1])
        table = pd.DataFrame(rows, columns=["patient_id", "repeat", "fold", "role", "seed"]).astype(
            {"repeat": "int32", "fold": "int32"}
        )
        self._table("splits/site.parquet", "morphome.splits", table)
        self._json(
            "splits/site.json",
            "morphome.split_facts",
            {
                "horizon_months": self.horizon,
                "horizon_reason": "asked in the configuration"
                if self.horizon
                else "too few events beyond any candidate",
                "horizon_table": [
                    {"horizon_months": 12, "G": 0.81, "cases": 9, "controls": 25, "passes": False},
                    {"horizon_months": 24, "G": 0.6, "cases": 15, "controls": 12, "passes": True},
                ],
                "warnings": ["fold 2: few <events> in the test fold"],
                "scheme": "site",
            },
        )

    def _runs(self) -> None:
        rng = self.rng
        self.risk = {}
        for name, (model, needs, signal) in self.rows.items():
            for repeat in range(self.repeats):
                self.risk[name, repeat] = signal * self.eta + rng.normal(size=self.n)
                for fold in range(self.folds):
                    folder = f"runs/{name}/r{repeat}/f{fold}"
                    extra = {"name": name, "model": model, "repeat": repeat, "fold": fold}
                    history, chosen = self._history(model)
                    self._table(f"{folder}/history.parquet", "morphome.history", history, **extra)
                    self._table(
                        f"{folder}/diagnostics.parquet",
                        "morphome.diagnostics",
                        self._diagnostics(model, fold, repeat, chosen),
                        **extra,
                        experts=EXPERTS if model == "mome" else [],
                    )
                    self._json(
                        f"{folder}/run.json",
                        "morphome.run",
                        {
                            **extra,
                            "settings": {"panels": ["rna"]} if model == "coxnet_genes" else {},
                            "training": {"time_bins": 4, "bin_edges": "horizon", "epoch_rule": "inner_best"},
                            "seed": 1,
                            "threads": 1,
                            "needs": needs,
                            "feature_fingerprint": "ab12cd34ef56" if "path" in needs else "",
                            "n_train": 20,
                            "n_inner": 7,
                            "n_test": 13,
                            "n_parameters": 21716348 if model == "mome" else 8,
                            "best_epoch": chosen,
                            "epochs_run": len(history),
                            "seconds_total": 42.5 if model == "mome" else 0.4,
                            "seconds_per_epoch": 6.9 if model == "mome" else 0.1,
                            "device": "cpu",
                            "versions": {"python": "3.11.7", "numpy": "2.4.6"},
                            "warnings": [f"stage missing: <median> taken ({fold})"] if model == "clinical_cox" else [],
                            "constant_prediction": model == "coxnet_genes" and fold == 1,
                        },
                    )

    def _history(self, model: str) -> tuple[pd.DataFrame, int]:
        rng = self.rng
        if model == "random":
            columns = {
                "epoch": "int32",
                "train_loss": float,
                "inner_loss": float,
                "inner_c": float,
                "learning_rate": float,
                "seconds": float,
                "chosen": bool,
                "setting": str,
            }
            return pd.DataFrame({k: pd.Series(dtype=t) for k, t in columns.items()}), 0
        neural = model == "mome"
        n = {"mome": 6, "clinical_cox": 1}.get(model, 8)
        table = pd.DataFrame(
            {
                "epoch": np.arange(n, dtype="int32"),
                "train_loss": 1.4 * 0.9 ** np.arange(n) if neural else np.nan,
                "inner_loss": 1.4 * 0.95 ** np.arange(n) + rng.normal(0, 0.03, n) if neural else np.nan,
                "inner_c": np.nan
                if model == "clinical_cox"
                else 0.55 + 0.1 * np.sin(np.arange(n) / 2) + rng.normal(0, 0.02, n),
                "learning_rate": 2e-4,
                "seconds": 1.0,
            }
        )
        chosen = 0 if model == "clinical_cox" else int(table["inner_c"].idxmax())
        table["chosen"] = table["epoch"] == chosen
        if not neural:
            key = {"clinical_cox": "ridge", "mean_pool_cox": "ridge"}.get(model, "alpha")
            table["setting"] = [f"{key}={v:g}" for v in np.geomspace(1, 3000, n)]
        return table, chosen

    def _diagnostics(self, model: str, fold: int, repeat: int, chosen: int) -> pd.DataFrame:
        rows = []
        if model == "mome":
            role = {0: "test", 1: "inner_val", 2: "train"}
            for epoch in range(6):
                for layer in ("p1", "g1", "p2", "g2"):
                    for i in range(0, self.n, 2):
                        p = self.rng.dirichlet([1 + epoch, 1, 1, 0.5])
                        who = "test" if self.fold[repeat][i] == fold else role[1 + i % 4 // 2]
                        if epoch == chosen or who == "inner_val":
                            rows.append(
                                [epoch, layer, self.ids[i], who, int(p.argmax()), *p, float(-(p * np.log(p)).sum())]
                            )
        columns = ["epoch", "layer", "patient_id", "role", "expert", "p0", "p1", "p2", "p3", "entropy"]
        return pd.DataFrame(rows, columns=columns).astype({"epoch": "int32", "expert": "int32"})

    def _evaluation(self) -> None:
        weights = [np.bincount(self.rng.integers(0, self.n, self.n), minlength=self.n) for _ in range(100)]
        oof, metrics, summary, km, groups, draws, value = [], [], [], [], [], {}, {}
        for name, (model, _, _) in self.rows.items():
            per_fold = []
            for repeat in range(self.repeats):
                risk, fold = self.risk[name, repeat], self.fold[repeat]
                pairs = _pairs(self.time, self.event, fold)
                for k in range(self.folds):
                    at = fold == k
                    c = _c(risk[at], pairs[np.ix_(at, at)])
                    per_fold.append(c)
                    metrics.append([name, model, repeat, k, "harrell_c", None, c, ""])
                    for m, v in (
                        ("uno_c", c - 0.01),
                        ("auc", c + 0.02),
                        ("ibs", 0.21),
                        ("ipa", 0.05 if name == "mome" else -0.02),
                    ):
                        gone = self.horizon is None or (m == "auc" and name == "coxnet_genes")
                        metrics.append(
                            [
                                name,
                                model,
                                repeat,
                                k,
                                m,
                                self.horizon,
                                np.nan if gone else v,
                                "no <control> beyond the horizon" if gone else "",
                            ]
                        )
            value[name] = float(
                np.mean(
                    [_c(self.risk[name, r], _pairs(self.time, self.event, self.fold[r])) for r in range(self.repeats)]
                )
            )
            draws[name] = np.array(
                [_c(self.risk[name, 0], _pairs(self.time, self.event, self.fold[0]), w) for w in weights]
            )
            low, high = np.quantile(draws[name], [0.025, 0.975])
            summary.append(
                [
                    name,
                    model,
                    "harrell_c",
                    None,
                    value[name],
                    low,
                    high,
                    np.std(per_fold, ddof=1),
                    self.folds,
                    0,
                    "patient bootstrap, stratified by fold, 100 draws",
                    "",
                ]
            )
            table = pd.DataFrame(
                metrics, columns=["name", "model", "repeat", "fold", "metric", "horizon_months", "value", "reason"]
            )
            for m in ("uno_c", "auc", "ibs", "ipa"):
                part = table[(table["name"] == name) & (table["metric"] == m)]
                missing = int(part["value"].isna().sum())
                mean = part["value"].mean() if not missing else np.nan
                low_m = mean - 0.1 if m == "uno_c" else np.nan
                summary.append(
                    [
                        name,
                        model,
                        m,
                        self.horizon,
                        mean,
                        low_m,
                        low_m + 0.2,
                        part["value"].std(),
                        self.folds,
                        missing,
                        "mean over folds",
                        "no <control> beyond the horizon" if missing else "",
                    ]
                )
            risk = self.risk[name, 0]
            high_risk = risk > np.median(risk)
            for i, patient in enumerate(self.ids):
                for repeat in range(self.repeats):
                    oof.append(
                        [
                            name,
                            model,
                            repeat,
                            int(self.fold[repeat][i]),
                            patient,
                            self.time[i],
                            int(self.event[i]),
                            self.risk[name, repeat][i],
                            float(np.median(risk)),
                            bool(high_risk[i]),
                            0.6,
                        ]
                    )
            for group, at in (("high", high_risk), ("low", ~high_risk)):
                level = 1.0
                for t in np.sort(self.time[at]):
                    risk_set, d = (
                        int((self.time[at] >= t).sum()),
                        int(((self.time == t) & (self.event == 1) & at).sum()),
                    )
                    level *= 1 - d / risk_set
                    km.append(
                        [name, model, group, t, level, max(0.0, level - 0.15), min(1.0, level + 0.12), risk_set, d]
                    )
            hr = float(np.exp(1.5 * (value[name] - 0.5) / 0.2))
            groups.append(
                [
                    name,
                    model,
                    int(high_risk.sum()),
                    int((~high_risk).sum()),
                    int(self.event[high_risk].sum()),
                    int(self.event[~high_risk].sum()),
                    hr,
                    hr / 2,
                    hr * 2,
                    4.2,
                    0.0404,
                    "",
                ]
            )
        self._table(
            "evaluation/oof.parquet",
            "morphome.oof",
            pd.DataFrame(
                oof,
                columns=[
                    "name",
                    "model",
                    "repeat",
                    "fold",
                    "patient_id",
                    "time_months",
                    "event",
                    "risk",
                    "threshold",
                    "high_risk",
                    "survival_at_horizon",
                ],
            ),
        )
        self._table("evaluation/metrics.parquet", "morphome.metrics", table)
        self._table(
            "evaluation/summary.parquet",
            "morphome.summary",
            pd.DataFrame(
                summary,
                columns=[
                    "name",
                    "model",
                    "metric",
                    "horizon_months",
                    "value",
                    "lower",
                    "upper",
                    "sd_folds",
                    "n_folds",
                    "n_missing",
                    "method",
                    "reason",
                ],
            ),
        )
        self._table(
            "evaluation/km.parquet",
            "morphome.km",
            pd.DataFrame(
                km, columns=["name", "model", "group", "time_months", "survival", "lower", "upper", "at_risk", "events"]
            ),
        )
        self._table(
            "evaluation/risk_groups.parquet",
            "morphome.risk_groups",
            pd.DataFrame(
                groups,
                columns=[
                    "name",
                    "model",
                    "n_high",
                    "n_low",
                    "events_high",
                    "events_low",
                    "hazard_ratio",
                    "hr_lower",
                    "hr_upper",
                    "logrank_chi2",
                    "logrank_p",
                    "reason",
                ],
            ),
        )
        paired = []
        for name in self.rows:
            if "clinical_cox" in self.rows and name != "clinical_cox":
                low, high = np.quantile(draws[name] - draws["clinical_cox"], [0.025, 0.975])
                paired.append([name, "clinical_cox", value[name] - value["clinical_cox"], low, high])
        columns = ["name_a", "name_b", "delta_c", "lower", "upper"]
        empty = pd.DataFrame({c: pd.Series(dtype=str if c.startswith("name") else float) for c in columns})
        self._table(
            "evaluation/comparisons.parquet",
            "morphome.comparisons",
            pd.DataFrame(paired, columns=columns) if paired else empty,
        )
        fused = [name for name, (model, _, _) in self.rows.items() if model == "mome"]
        columns = ["name", "model", "branch", "harrell_c", "lower", "upper"]
        branches = [
            [name, "mome", branch, c, c - 0.08, c + 0.08]
            for name in fused
            for branch, c in (("omic", 0.55), ("path", 0.58))
        ]
        branches = pd.DataFrame(branches, columns=columns)
        self._table("evaluation/branches.parquet", "morphome.branches", branches)


class GdcCohort:
    """What a cohort from the GDC adds to a run: the files before the analysis, and what they say of themselves."""

    LEFT = 1000

    def __init__(self, factory: Factory) -> None:
        self.run = factory
        long = "Institute of the Longest Name that any Broker of Tissue ever had, Department of Everything"
        self.hospitals = {"AB": "Hospital <A> & Sons", "CD": "Hospital <A> & Sons", "EF": long}

    def write(self) -> dict[str, Any]:
        root = self.run.root
        self._places()
        self._flow()
        self._groups()
        panels = {name: root / f"genomics/{name}.parquet" for name in ("rna", "mut", "cnv", "expression")}
        for name in panels:
            self._panel(name)
        self._query()
        return {
            "panels": panels,
            "query": root / "gdc/query.json",
            "cohort_slides": root / "cohort/slides.parquet",
            "cohort_patients": root / "cohort/patients.parquet",
        }

    def _places(self) -> None:
        """Hospitals by name, and all slides that the sheet lists, also those of patients without an outcome."""
        run = self.run
        people = pd.read_parquet(run.root / "analysis/patients.parquet")
        people["site"] = [self.hospitals.get(code, code) for code in people["site"]]
        people["slide_ids"] = [list(ids) for ids in people["slide_ids"]]
        run._table("analysis/patients.parquet", "morphome.analysis", people)
        ids = list(people["patient_id"])
        lost = people.iloc[:1].assign(patient_id="TCGA-AB-9999", site="Hospital <A> & Sons")
        everybody = pd.concat([people, lost]).drop(columns=["slide_ids", "n_slides", "n_tiles"])
        run._table("cohort/patients.parquet", "morphome.patients", everybody)
        self.left = [f"TCGA-{['AB', 'QQ', 'ZZ'][i % 3]}-{i:04d}" for i in range(self.LEFT)]
        rows = [[slide, slide[:12], True, ""] for slide in run.slide_ids]
        rows += [[f"{p}-01A-01-TS1", p, False, "not a diagnostic slide (TS: frozen section)"] for p in ids]
        rows += [[f"{p}-01Z-00-DX1", p, False, "patient left out: time missing (x)"] for p in self.left[:30]]
        table = pd.DataFrame(rows, columns=["slide_id", "patient_id", "included", "reason"])
        run._table("cohort/slides.parquet", "morphome.slides", table)

    def _flow(self) -> None:
        run, n = self.run, self.run.n
        steps: list[dict[str, Any]] = []

        def step(name: str, unit: str, before: int, excluded: list[str], reason: str = "") -> int:
            after = before - len(excluded)
            keys = ("name", "unit", "before", "after", "excluded", "reason")
            steps.append(dict(zip(keys, (name, unit, before, after, sorted(excluded), reason), strict=True)))
            return after

        many, gone = self.left[:900], [f"TCGA-AB-{i}" for i in range(7000, 7005)]
        twice = [f"TCGA-AB-{1000 + 6 * i}" for i in range(3)]
        total = n + 1 + 5 + self.LEFT
        why = "further rows of a patient who is listed already"
        total = step("records joined by patient", "records", total + 6, [*twice, *twice], why)
        step("listed in the clinical table", "patients", total, [])
        left = step("not redacted", "patients", total, self.left[980:], "redacted by TCGA")
        left = step("with event status", "patients", left, gone, "event status missing (Not Reported: 5)")
        why = "time missing (dead without days to death: 500; alive without follow-up: 400)"
        left = step("with follow-up time", "patients", left, many, why)
        left = step("with time not below zero", "patients", left, [])
        left = step("with time above zero", "patients", left, self.left[900:960], "time zero")
        slides = len(run.slide_ids) + n + 30
        step("listed", "slides", slides, [])
        frozen = [f"{p}-01A-01-TS1" for p in run.ids]
        text = f"not a diagnostic slide (TS: frozen section): {n}"
        slides = step("of the tumour under study", "slides", slides, frozen, text)
        step("patient known", "slides", slides, [])
        lost = [f"{p}-01Z-00-DX1" for p in self.left[:30]]
        slides = step("patient with outcome", "slides", slides, lost, "patient left out by an earlier step")
        step("file found", "slides", slides, [])
        why = "no slide (cohort.require lists 'wsi')"
        left = step("with a slide", "patients", left, self.left[960:980], why)
        sources = [
            {"role": "clinical", "format": "gdc_clinical", "path": "results/demo/gdc/clinical.tsv", "patients": total,
             "time_zero": "diagnosis", "words": {"Not Reported": 5}, "surplus": ["x", "y"]},
            {"role": "covariates", "format": "tcga_cdr", "path": "resources/published/TCGA-CDR.xlsx",
             "patients": 11160, "matched": n, "redacted": []},
            {"role": "slides", "path": "results/demo/gdc/sample_sheet.tsv", "slides": n + 49, "included": 19},
        ]  # fmt: skip
        run._json("cohort/flow.json", "morphome.flow", {"steps": steps, "sources": sources})
        slide = "TCGA-AB-9999-01Z-00-DX1"
        step("slides with features", "slides", slides, [slide], "unreadable: 1")
        left = step("patients with a usable slide", "patients", left, ["TCGA-AB-9999"], "no usable slide")
        step("patients with RNA", "patients", left, [])
        assert left == n
        run._json("analysis/flow.json", "morphome.flow", {"steps": steps, "sources": sources})

    def _panel(self, name: str) -> None:
        said = {
            "rna": ("log2_tpm_plus_1", "log2(TPM + 1)", "star_counts", {"rule_for_symbols": "TPM are summed"}),
            "mut": ("binary", "1 = protein-changing variant", "maf",
                    {"rule_for_mutated": ["Missense_Mutation", "Splice_Site"], "by_class": {"Silent": 9667}}),
            "cnv": ("copy_number", "total copies", "gdc_gene_level", {"odd": NASTY}),
            "expression": ("counts", "reads", "star_counts", {"rounded": "to 7 digits; 3 counts"}),
        }  # fmt: skip
        value_type, unit, format_name, notes = said[name]
        patients = [*self.run.ids[: self.run.n - 3], "TCGA-ZZ-0000"] if name == "mut" else self.run.ids
        table = pd.DataFrame({"patient_id": patients} | {f"G{i}": np.float32(i) for i in range(5)})
        rule = "of a patient's samples 01 before 03 before 06, then the lowest vial, then the smallest file id"
        notes |= {"rule_for_samples": rule, "patients_without_value": []}
        notes |= {"left_out": {"further file of the same patient": 12, "several patients in one file": 0}}
        extra = {"panel": name, "value_type": value_type, "unit": unit, "n_files": len(patients), "notes": notes}
        extra |= {"source": "resources/gdc", "format": format_name, "gene_ids": {"G0": "ENSG0"}}
        self.run._table(f"genomics/{name}.parquet", "morphome.panel", table, **extra)

    def _groups(self) -> None:
        groups = {f"PATH_{i:02d}/<x>": [f"G{j}" for j in range(i % 7)] + ["18S rRNA", f"Z{i}"] for i in range(40)}
        groups["Aromatic_amines_can_be_N-hydroxylated_or_N-dealkylated_by_CYP1A2"] = [
            "G1",
            *(f"W{i}" for i in range(90)),
        ]
        found = match_groups(groups, {"rna": [f"G{i}" for i in range(5)], "mut": ["G1"], "cnv": []}, 2)
        self.run._json(
            "groups.json", "morphome.groups", {**found, "source": "sets/h.gmt", "repeated": {"PATH_01/<x>": 2}}
        )

    def _query(self) -> None:
        kinds = {"slides": (71, 42.5e9, 0), "rna": (52, 220e6, 52), "mut": (37, 4.1e5, 0), "cnv": (40, 12e6, 0)}
        kinds = {k: dict(zip(("files", "bytes", "here"), v, strict=True)) for k, v in kinds.items()}
        left_out = {"slides": {"first released after 45.0": 3}, "cnv": {"workflow AscatNGS": 40, "ABSOLUTE": 0}}
        content = {"data_release": "45.0", "pin": "45.0", "server_release": "46.1", "cases": {"TCGA-HNSC": 528}}
        content |= {"time": "2026-11-21T19:20:05+00:00", "projects": ["TCGA-HNSC"], "pin_note": "withdrawn <files>"}
        self.run._json("gdc/query.json", "morphome.gdc_query", {**content, "kinds": kinds, "left_out": left_out})


@pytest.fixture(scope="session")
def make_inputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ReportInputs]:
    """``make_inputs(patients=40, repeats=1, only=[...], external=False, ...)`` writes a run and returns its paths."""

    def make(**options: Any) -> ReportInputs:
        return Factory(tmp_path_factory.mktemp("report-inputs"), **options).write()

    return make
