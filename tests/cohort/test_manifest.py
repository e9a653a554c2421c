"""Step cohort: who is in, who is out, and why."""

from __future__ import annotations

from pathlib import Path

import h5py
import pytest

from morphome.cohort.manifest import external_slides, run_cohort
from morphome.errors import MorphomeError
from morphome.files import parquet_meta, read_json, read_parquet


def make_settings(clinical, **more):
    cohort = {
        "clinical": clinical,
        "endpoint": "OS",
        "time_unit": "months",
        "sample_types": ["01", "03", "06"],
        "require": more.pop("require", ["wsi"]),
        "min_events": more.pop("min_events", 1),
    }
    if "covariates" in more:
        cohort["covariates"] = more.pop("covariates")
    return {"cohort": cohort, "slides": {}, "molecular": {}, "features": {"source": "encode"}, **more}


def run(tmp_path, settings):
    out = tmp_path / "out"
    paths = {"patients_out": out / "p.parquet", "slides_out": out / "s.parquet", "flow_out": out / "f.json"}
    run_cohort(settings=settings, **paths)
    return (
        read_parquet(paths["patients_out"], "morphome.patients", settings),
        read_parquet(paths["slides_out"], "morphome.slides", settings),
        read_json(paths["flow_out"], "morphome.flow", settings),
    )


@pytest.fixture
def own(tmp_path):
    """Three usable patients, one with time 0; five slides, one file missing, one of a stranger."""
    (tmp_path / "clinical.csv").write_text(
        "patient_id,time,event,age\nP3,5,1,60\nP1,10,1,50\nP2,7,0,\nP0,0,1,40\nP4,3,0,70\n"
    )
    for name in ("a", "b", "c", "d", "f"):
        (tmp_path / f"{name}.svs").write_bytes(b"12345")
    (tmp_path / "slides.csv").write_text(
        "slide_id,patient_id,path\nc,P2,c.svs\na,P1,a.svs\nb,P1,b.svs\nd,P0,d.svs\ne,P3,e.svs\nf,STRANGER,f.svs\n"
    )
    return make_settings(
        {"format": "csv", "path": str(tmp_path / "clinical.csv")}, slides={"sheet": str(tmp_path / "slides.csv")}
    )


def test_manifest_of_an_own_cohort(tmp_path, own):
    patients, slides, flow = run(tmp_path, own)
    assert patients["patient_id"].tolist() == ["P1", "P2"]
    assert patients.columns.tolist() == [
        *("patient_id", "site", "time_months", "event", "endpoint", "age_years", "sex", "stage", "grade"),
        "histology",
    ]
    assert patients["endpoint"].tolist() == ["OS", "OS"] and patients["event"].tolist() == [1, 0]
    assert slides["slide_id"].tolist() == list("abcdef")
    assert slides["included"].tolist() == [True, True, True, False, False, False]
    assert slides["reason"].tolist() == [
        *("", "", "", "patient left out: time zero", "file not found"),
        "patient not in the clinical table",
    ]
    assert slides["found"].tolist() == [True, True, True, True, False, True]
    assert slides["size_bytes"].fillna(-1).tolist() == [5, 5, 5, 5, -1, 5]
    lost = {step["name"]: step["excluded"] for step in flow["steps"] if step["excluded"]}
    assert lost == {
        "with time above zero": ["P0"],
        "patient known": ["f"],
        "patient with outcome": ["d"],
        "file found": ["e"],
        "with a slide": ["P3", "P4"],
    }
    for step in flow["steps"]:
        assert step["before"] - len(step["excluded"]) == step["after"]
    assert (flow["n_patients"], flow["n_events"]) == (2, 1)


def test_patients_without_slides_stay_when_slides_are_not_required(tmp_path, own):
    own["cohort"]["require"] = ["rna"]
    patients, slides, _ = run(tmp_path, own)
    assert patients["patient_id"].tolist() == ["P1", "P2", "P3", "P4"]
    own["slides"] = {}
    patients, slides, flow = run(tmp_path, own)
    assert len(patients) == 4 and len(slides) == 0
    assert {step["unit"] for step in flow["steps"]} == {"patients"}


def test_output_does_not_depend_on_the_order_of_rows(tmp_path, own):
    before = run(tmp_path, own)
    for name in ("clinical.csv", "slides.csv"):
        header, *rows = (tmp_path / name).read_text().splitlines()
        (tmp_path / name).write_text("\n".join([header, *reversed(rows)]) + "\n")
    after = run(tmp_path, own)
    assert before[0].equals(after[0]) and before[1].equals(after[1])


def test_too_few_events_and_nobody_left(tmp_path, own):
    own["cohort"]["min_events"] = 2
    with pytest.raises(
        MorphomeError, match=r"1 events(.|\n)*cohort\.min_events = 2; 3 of 5 patients left out: .*(.|\n)*Remedy"
    ) as caught:
        run(tmp_path, own)
    assert "time zero 1, no slide (cohort.require lists 'wsi') 2" in str(caught.value)
    (tmp_path / "slides.csv").write_text("slide_id,patient_id,path\na,p1,a.svs\n")
    with pytest.raises(MorphomeError, match=r"'P0' \(of 5\)(.|\n)*'p1' \(of 1\)(.|\n)*slides\.sheet"):
        run(tmp_path, own)
    own["slides"] = {}
    with pytest.raises(MorphomeError, match=r"slides\.sheet is not set"):
        run(tmp_path, own)
    assert not (tmp_path / "out").exists()


def test_slides_of_a_porpoise_table_leave_the_recurrence_out(tmp_path):
    path = tmp_path / "t.csv"
    head = "case_id,slide_id,survival_months,censorship\n"
    path.write_text(
        head
        + "TCGA-50-5066,TCGA-50-5066-01Z-00-DX1.svs,9,0\nTCGA-50-5066,TCGA-50-5066-02Z-00-DX1.svs,9,0\n"
        + "TCGA-50-5067,TCGA-50-5067-02Z-00-DX1.svs,9,1\n"
    )
    settings = make_settings({"format": "porpoise", "path": str(path)}, features={"source": "external", "path": "x"})
    patients, slides, _ = run(tmp_path, settings)
    assert patients["patient_id"].tolist() == ["TCGA-50-5066"]
    assert slides["included"].tolist() == [True, False, False]
    assert slides["reason"][1] == "sample type 02 (recurrent solid tumour)"
    assert slides["found"].all() and (slides["path"] == "").all()
    path.write_text(head + "TCGA-50-5066,TCGA-50-5066-01Z-00-DX1.svs,9,0\n" * 2)
    with pytest.raises(MorphomeError, match="occurs twice"):
        run(tmp_path, settings)


def test_external_slides_from_a_packed_file_and_a_folder(tmp_path):
    names = ["TCGA-50-5066-01Z-00-DX1.U", "TCGA-50-5067-01Z-00-DX1.U"]
    with h5py.File(tmp_path / "bags.h5", "w") as store:
        store["slide_id"] = [name.encode() for name in names]
        store["case_id"] = [name[:12].encode() for name in names]
    folder = tmp_path / "bags"
    folder.mkdir()
    for name, ending in zip(names, ("pt", "h5"), strict=True):
        (folder / f"{name}.{ending}").write_bytes(b"")
    packed = external_slides(tmp_path / "bags.h5")
    assert [(row.slide_id, row.patient_id) for row in packed] == [(name, name[:12]) for name in names]
    assert external_slides(folder) == packed
    (folder / "mine.pt").write_bytes(b"")
    with pytest.raises(MorphomeError, match=r"mine\.pt(.|\n)*slides\.sheet"):
        external_slides(folder)


def test_bad_external_features_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.h5").write_bytes(b"no HDF5")
    with h5py.File(tmp_path / "no_cases.h5", "w") as store:
        store["slide_id"] = [b"a"]
    with h5py.File(tmp_path / "twice.h5", "w") as store:
        store["slide_id"], store["case_id"] = [b"a", b"a"], [b"p", b"q"]
    cases = {
        "empty": r"no \.h5, \.pt, .* file in it",
        "text.h5": "cannot be read as HDF5",
        "no_cases.h5": "no dataset 'case_id'",
        "twice.h5": "'a' occurs twice",
        "nowhere.h5": "file not found",
    }
    for name, words in cases.items():
        with pytest.raises(MorphomeError, match=words) as caught:
            external_slides(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_real_blca(tmp_path, shared_data):
    settings = make_settings(
        {"format": "porpoise", "path": str(shared_data / "tables/porpoise/tcga_blca_all_clean.csv.zip")},
        covariates={
            "format": "tcga_cdr",
            "path": str(shared_data / "tables/tcga_cdr/TCGA-CDR-SupplementalTableS1.xlsx"),
        },
        features={"source": "external", "path": str(shared_data / "bags/tcga_blca.h5")},
        min_events=20,
    )
    patients, slides, flow = run(tmp_path, settings)
    assert (len(patients), patients["event"].sum(), len(slides)) == (373, 169, 437)
    assert patients["stage"].notna().sum() == 371 and patients["site"].str.len().gt(2).all()  # institutions
    assert patients["time_months"].min() > 0
    covariates = next(source for source in flow["sources"] if source["role"] == "covariates")
    assert covariates["unmatched"] == [] and covariates["redacted"] == ["TCGA-C4-A0EZ"]
    assert parquet_meta(tmp_path / "out" / "p.parquet")["n_events"] == 169


def test_real_gdc_clinical_with_packed_bags(tmp_path, shared_data):
    settings = make_settings(
        {"format": "gdc_clinical", "path": str(shared_data / "gdc/clinical_tsv/BLCA_clinical.tsv.gz")},
        features={"source": "external", "path": str(shared_data / "bags/tcga_blca.h5")},
    )
    patients, slides, _ = run(tmp_path, settings)
    assert (len(patients), len(slides), slides["included"].sum()) == (367, 434, 430)
    assert set(slides.loc[slides["included"], "patient_id"]) == set(patients["patient_id"])


def test_real_sample_sheet_without_files(tmp_path, shared_data):
    """No slide of the sheet is on the disk and no patient of it is in the table: the error says so."""
    settings = make_settings(
        {"format": "gdc_clinical", "path": str(shared_data / "gdc/clinical_tsv/BLCA_clinical.tsv.gz")},
        slides={"sheet": str(shared_data / "gdc/gdc_sample_sheet.tsv"), "folder": str(Path("nowhere"))},
    )
    with pytest.raises(MorphomeError, match="927 slides: patient not in the clinical table"):
        run(tmp_path, settings)
