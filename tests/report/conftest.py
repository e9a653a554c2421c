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


class Factory:
    """Writes one run. ``external``: no thumbnails, no timings; ``only``: names of the rows to keep."""

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
        seed=3,
    ) -> None:
        self.root, self.n, self.repeats, self.folds = root, patients, repeats, folds
        self.rows = {k: v for k, v in ROWS.items() if only is None or k in only}
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
        return ReportInputs(
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
        rng = self.rng
        self.slide_ids = [f"{i}-01Z-00-DX1" for i in self.ids[:18]] + ["TCGA-AB-9999-01Z-00-DX1"]
        audit = []
        for s in self.slide_ids:
            bad = "9999" in s
            qc = {
                "slide_id": s,
                "status": "failed" if bad else "ok",
                "reason_code": "unreadable" if bad else "",
                "reason": f"slides/{s}.svs: {NASTY}\n  Remedy: fetch the file again" if bad else "",
                "vendor": "aperio",
                "width_px": 12000,
                "height_px": 9600,
                "mpp_x": None if bad else 0.2521,
                "mpp_y": None if bad else 0.2521,
                "mpp_source": None if bad else "aperio.MPP",
                "all_sources": {"aperio.MPP": 0.2521, "tiff.XResolution": None},
                "objective_power": 40.0,
                "power_ratio": 1.01,
                "mpp_target": 0.5,
                "side_x_px": 508,
                "mpp_effective": 0.4999,
                "deviation_pct": -0.02,
                "verdict": "refused" if bad else "fine",
                "flags": [],
                "tissue_mm2": 0.0 if bad else float(rng.uniform(3, 9)),
                "pen_fraction": 0.01,
                "n_tiles": 0 if bad else int(rng.integers(120, 300)),
                "sharpness_median": 312.0,
            }
            audit.append(qc)
            self._json(f"tiles/{s}.json", "morphome.slide_qc", qc)
            self._json(
                f"features/{s}.json",
                "morphome.timing",
                {
                    "slide_id": s,
                    "n_tiles": qc["n_tiles"],
                    "seconds_total": 1.4,
                    "seconds_read": 0.5,
                    "seconds_encode": 0.8,
                    "tiles_per_second": qc["n_tiles"] / 1.4,
                },
            )
            self._thumbnail(self.root / f"tiles/{s}.jpg", bad)
        table = pd.DataFrame(audit).assign(all_sources=lambda t: t["all_sources"].map(str))
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


@pytest.fixture(scope="session")
def make_inputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ReportInputs]:
    """``make_inputs(patients=40, repeats=1, only=[...], external=False, ...)`` writes a run and returns its paths."""

    def make(**options: Any) -> ReportInputs:
        return Factory(tmp_path_factory.mktemp("report-inputs"), **options).write()

    return make
