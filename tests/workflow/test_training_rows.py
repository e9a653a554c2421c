"""Rows of the published protocol, of a teacher, of a balance rule, and an encoder of RNA, as a user starts them."""

from __future__ import annotations

import importlib.util
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from morphome.files import read_json, read_parquet


def neighbour(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem + "_of_rows", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).resolve().parent
Checkout = neighbour(HERE / "checkout.py").Checkout
tiny = neighbour(HERE.parent / "rna" / "conftest.py")

pytestmark = pytest.mark.workflow

MCAT = {"dim": 8, "heads": 2, "feedforward": 8, "attention_dim": 4}
ABMIL = {"dim": 8, "attention_dim": 4, "head_dim": 4}
MODELS = {
    "clinical_cox": None,
    "mcat": MCAT,
    "mcat_published": {
        "model": "mcat",
        **MCAT,
        "training": {"protocol": "published", "epoch_rule": "oracle_outer_best"},
    },
    "abmil_taught": {
        "model": "abmil",
        **ABMIL,
        "training": {"distil": {"teacher": "mcat", "settings": MCAT, "loss": "kd_logit", "folds": 2}},
    },
    "path_gptomic": {"training": {"balance": {"rule": "ogm_cox"}}},
}
PUBLISHED = "mcat_published"


def write_cohort(folder: Path, patients: int = 36) -> dict:
    """A cohort of ready-made features and own tables; the sections of the configuration that name them."""
    rng = np.random.default_rng(5)
    ids = [f"P{i:02d}" for i in range(patients)]
    hidden = rng.normal(size=patients)
    (folder / "bags").mkdir(parents=True)
    for name, shift in zip(ids, hidden, strict=True):
        np.save(folder / "bags" / f"{name}_s.npy", rng.normal(shift, 1, (12, 8)).astype(np.float32))
    time = rng.exponential(20 * np.exp(-hidden)) + 0.5
    clinical = {"patient_id": ids, "time": time.round(3), "event": (rng.random(patients) < 0.75).astype(int)}
    clinical |= {"site": [f"H{i % 4}" for i in range(patients)], "age": rng.integers(40, 80, patients)}
    pd.DataFrame(clinical).to_csv(folder / "clinical.csv", index=False)
    slides = {"slide_id": [f"{name}_s" for name in ids], "patient_id": ids, "path": [f"{name}_s.svs" for name in ids]}
    pd.DataFrame(slides).to_csv(folder / "slides.tsv", sep="\t", index=False)

    def table(name: str, values: np.ndarray) -> None:
        frame = pd.DataFrame(values, columns=tiny.GENES[: values.shape[1]])
        frame.insert(0, "patient_id", ids)
        frame.to_csv(folder / f"{name}.csv", index=False)

    counts = rng.poisson(rng.gamma(1.0, 20.0, 60) * np.exp(0.3 * hidden[:, None]), (patients, 60))
    table("expression", counts)
    table("rna", np.log2(counts + 1.0).round(4))
    table("mut", (rng.random((patients, 20)) < 0.3).astype(int))
    table("cnv", rng.integers(-2, 3, (patients, 20)))
    groups = pd.DataFrame({f"group {k}": tiny.GENES[10 * k : 10 * k + 10] for k in range(3)})
    groups.to_csv(folder / "groups.csv", index=False)
    tiny.write_scgpt(folder / "scgpt")
    own = {name: {"format": "csv", "path": f"own/{name}.csv"} for name in ("rna", "mut", "cnv")}
    return {
        "name": "small",
        "simulate": None,
        "cohort": {"clinical": {"format": "csv", "path": "own/clinical.csv"}, "time_unit": "months", "min_events": 4},
        "slides": {"sheet": "own/slides.tsv"},
        "features": {"source": "external", "path": "own/bags"},
        "molecular": {
            **own,
            "expression": {"format": "csv", "path": "own/expression.csv", "unit": "counts"},
            "groups": {"path": "own/groups.csv"},
            "encoder": {"name": "scgpt", "weights": "own/scgpt", "allow_unpinned": True, "panel_size": 40},
        },
        "splits": {"folds": 2, "min_events_per_test_fold": 1, "scheme": "random"},
        "training": {"epochs": 2, "accumulation": 4, "cox_window": 8, "time_bins": 2},
        "models": MODELS,
        "evaluation": {"horizon_months": 12, "bootstrap": 20},
    }


@pytest.fixture(scope="module")
def finished(repository, tmp_path_factory):
    """The run with all these rows, done once."""
    copy = Checkout(repository, tmp_path_factory.mktemp("rows") / "checkout")
    copy.sections = write_cohort(copy.folder / "own")
    copy.configure(**copy.sections)
    done = copy.snakemake("--configfile", "small.yaml")
    assert done.returncode == 0, done.stdout[-6000:]
    return copy


@pytest.fixture
def unchanged(finished):
    """The finished run; its configuration is put back."""
    yield finished
    finished.configure(**finished.sections)


@pytest.fixture
def elsewhere(finished, tmp_path):
    """A copy of the finished run in which more may be run."""
    copy = Checkout.__new__(Checkout)
    copy.folder, copy.sections = tmp_path / "checkout", finished.sections
    shutil.copytree(finished.folder, copy.folder)
    return copy


def results(checkout) -> Path:
    return checkout.folder / "results" / "small"


def section(page: str, name: str) -> str:
    """Text of a section of the page."""
    found = re.search(rf'<section id="{name}".*?</section>', page, re.S)
    return " ".join(unescape(re.sub(r"<svg.*?</svg>|<[^>]+>", " ", found[0], flags=re.S)).split())


def page_of(checkout) -> str:
    return (results(checkout) / "report" / "report.html").read_text(encoding="utf-8")


def with_encoder(sections: dict, **changes) -> dict:
    molecular = sections["molecular"]
    return {**sections, "molecular": {**molecular, "encoder": {**molecular["encoder"], **changes}}}


def with_row(sections: dict, name: str, row: dict) -> dict:
    return {**sections, "models": {**sections["models"], name: row}}


def trained(*rows: str) -> set[str]:
    return {f"train {row} 0 {fold}" for row in rows for fold in range(2)}


AFTER = {"evaluate", "report"}


def test_a_row_of_the_published_protocol_is_in_its_section_and_nowhere_else(finished):
    page = page_of(finished)
    shown = section(page, "published")
    assert "Published protocol (optimistic)" in shown and PUBLISHED in shown
    assert "best epoch on the reported fold" in shown
    rest = re.sub(r'<section id="published".*?</section>|<pre>.*?</pre>', "", page, flags=re.S)
    assert PUBLISHED not in rest
    tables = results(finished) / "report" / "tables"
    assert [path.name for path in sorted(tables.glob("*.csv")) if PUBLISHED in path.read_text()] == [
        "published_protocol.csv"
    ]
    summary = read_parquet(results(finished) / "evaluation" / "summary.parquet", "morphome.summary")
    found = summary[(summary["name"] == PUBLISHED) & (summary["metric"] == "harrell_c")]["value"].iloc[0]
    assert f"{found:.3f}" in shown
    run = read_json(results(finished) / "runs" / PUBLISHED / "r0" / "f0" / "run.json", "morphome.run")
    assert run["training"]["protocol"] == "published" and run["n_fitted"] == run["n_train"] + run["n_inner"]


def test_the_report_says_which_encoder_of_rna_was_used_and_how_rows_were_trained(finished):
    page = page_of(finished)
    said = section(page, "provenance")
    facts = read_json(results(finished) / "genomics" / "encoded.json", "morphome.encoder")
    assert "requested scgpt, used scgpt" in said and "code: MIT" in said
    assert f"sha256 {facts['weights']['sha256'][:16]}, checksum not known" in said
    assert "knows 100.0 % of the genes measured" in said and "pretraining saw TCGA: no" in said
    limits = section(page, "limits")
    assert "checksum of its weights is not one that morphome knows" in limits
    assert "requested features, used identity" in limits
    training = section(page, "training")
    assert "taught the hazards of every time bin by mcat" in training
    assert "slides and genes balanced by ogm_cox" in training


def test_a_second_run_does_nothing(finished):
    assert finished.jobs() == set()


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("mcat", {**MCAT, "dropout": 0.1}),
        ("abmil_taught", {**MODELS["abmil_taught"], "training": {"distil": {"teacher": "mcat", "folds": 2}}}),
        ("path_gptomic", {"training": {"balance": {"rule": "ogm_cox", "alpha": 0.5}}}),
    ],
)
def test_a_changed_row_repeats_that_row_alone(unchanged, name, row):
    unchanged.configure(**with_row(unchanged.sections, name, row))
    assert unchanged.jobs() == trained(name) | AFTER


def test_an_edit_of_a_model_repeats_its_rows_and_those_it_teaches(finished):
    module = finished.folder / "src/morphome/models/mcat.py"
    before = module.read_text()
    module.write_text(before + "\n# changed\n")
    try:
        assert finished.jobs() == trained("mcat", PUBLISHED, "abmil_taught") | AFTER
    finally:
        module.write_text(before)


def test_other_weights_repeat_the_encoder_and_the_rows_that_read_it(elsewhere):
    tiny.write_scgpt(elsewhere.folder / "own" / "scgpt", tiny.scgpt_state(63, seed=1))
    assert elsewhere.jobs() == {"rna", *AFTER} | trained("path_gptomic")


def test_weights_that_are_not_there_stop_the_run_or_are_replaced_or_leave_rows_out(elsewhere):
    def run(on_missing: str, *arguments: str):
        encoder = {"weights": "own/nothing", "on_missing": on_missing}
        elsewhere.configure(**with_encoder(elsewhere.sections, **encoder))
        return elsewhere.snakemake("--configfile", "small.yaml", *arguments)

    stopped = run("error", "-n")
    assert stopped.returncode != 0 and "Traceback" not in stopped.stdout
    for word in ("own/nothing does not exist", "put them there", "molecular.encoder.weights", "on_missing: fallback"):
        assert word in stopped.stdout

    replaced = run("fallback")
    assert replaced.returncode == 0, replaced.stdout[-4000:]
    assert "RNA encoder pca in place of scgpt (the files of scGPT are not there" in replaced.stdout
    page = page_of(elsewhere)
    words = "requested scGPT, used pca in its place (the files of scGPT are not there: the folder own/nothing does not"
    assert words in section(page, "limits") and words in section(page, "verdict")
    assert "requested scgpt, used pca" in section(page, "provenance")
    assert "What path_gptomic shows says nothing about scGPT." in section(page, "limits")

    left_out = run("skip")
    assert left_out.returncode == 0, left_out.stdout[-4000:]
    assert "left out without the RNA encoder scgpt: path_gptomic" in left_out.stdout
    page = page_of(elsewhere)
    words = "requested scGPT, used none (the files of scGPT are not there: the folder own/nothing does not exist)"
    assert words in section(page, "verdict")
    assert "path_gptomic needs it and was left out of this run" in section(page, "limits")
    assert "path_gptomic" not in section(page, "models")
