"""Questions to the GDC, hits as files, the choice of samples, workflow and release."""

from __future__ import annotations

import csv
from collections import Counter

import pytest

from morphome.cohort.barcode import TUMOUR_CODES
from morphome.download import api as api_module
from morphome.download.api import Gdc
from morphome.download.query import (
    CONDITIONS,
    FIELDS,
    count_reasons,
    file_filters,
    find_files,
    keep_tumours,
    one_workflow,
    read_hit,
    release_number,
    release_text,
    sheet_row,
)
from morphome.download.release import files_of_release, pinned_release
from morphome.errors import MorphomeError


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(api_module, "FIRST_WAIT_S", 0.001)


def read(record, kind):
    return read_hit(record, kind, "TCGA-COAD", "here")


def asked(gdc, records, kind, project="TCGA-COAD"):
    with gdc.GdcServer(records) as server, Gdc(server.url) as api:
        return find_files(api, project, kind)


def test_each_kind_asks_for_its_own_open_files_of_its_project(gdc):
    case = "TCGA-AA-0001"
    own = [gdc.slide_record(case), gdc.rna_record(case), gdc.maf_record(case), gdc.cnv_record(case)]
    others = [
        gdc.slide_record(case, frozen=True),
        gdc.slide_record(case, 2, access="controlled"),
        gdc.slide_record("TCGA-BB-0001", project="TCGA-READ"),
        gdc.rna_record(case, file_name="x.tsv", analysis={"workflow_type": "HTSeq - FPKM"}),
        gdc.maf_record(case, file_name="y.maf.gz", analysis={"workflow_type": "MuTect2 Annotation"}),
        gdc.cnv_record(case, file_name="z.tsv", data_type="Copy Number Segment"),
    ]
    for kind, record in zip(CONDITIONS, own, strict=True):
        assert [file.file_id for file in asked(gdc, own + others, kind)] == [record["file_id"]]


def test_a_hit_as_a_file(gdc):
    file = asked(gdc, [gdc.maf_record("TCGA-AA-0001", size=4321)], "mut")[0]
    record = gdc.maf_record("TCGA-AA-0001", size=4321)
    assert (file.file_id, file.name, file.md5) == (record["file_id"], record["file_name"], record["md5sum"])
    assert (file.size, file.state, file.version, file.data_release) == (4321, "released", "1", "12.0 - 45.0")
    assert file.case_ids == ("TCGA-AA-0001",)
    assert file.sample_ids == ("TCGA-AA-0001-01A", "TCGA-AA-0001-10A")
    assert file.tissue_types == ("Tumor", "Normal")
    assert file.workflow.startswith("Aliquot Ensemble")
    row = sheet_row(file)
    assert row["Case ID"] == "TCGA-AA-0001, TCGA-AA-0001"
    assert row["Sample ID"] == "TCGA-AA-0001-01A, TCGA-AA-0001-10A"
    assert row["Tissue Type"] == "Tumor, Normal"
    assert row["Data Category"] == "Simple Nucleotide Variation"


def test_a_slide_on_a_portion_is_known_by_its_barcode(gdc):
    file = asked(gdc, [gdc.slide_record("TCGA-AA-0001", on_portion=True)], "slides")[0]
    assert file.sample_ids == ("TCGA-AA-0001-01Z",)
    assert file.tissue_types == ("Tumor",)
    record = gdc.slide_record("TCGA-AA-0001", code="11", on_portion=True)
    del record["associated_entities"]
    assert read(record, "slides").sample_ids == ("TCGA-AA-0001-11Z",)
    assert read(record, "slides").tissue_types == ("Normal",)


def test_real_slides_in_the_columns_of_the_real_sheet(gdc, shared_data):
    """940 diagnostic slides of three kidney projects; 36 of them carry a frozen sample beside their own."""
    rows = list(csv.DictReader((shared_data / "gdc/gdc_sample_sheet.tsv").open(encoding="utf-8"), delimiter="\t"))
    names = ("File ID", "File Name", "Data Category", "Data Type", "Project ID", "Case ID", "Sample ID")
    other = 0
    for row in rows:
        own = {"file_id": row["File ID"], "file_name": row["File Name"], "project": row["Project ID"], "size": 1}
        case, _, _ = row["Case ID"].partition(",")
        record = gdc.slide_record(case, **own)
        record["cases"][0]["samples"] = [gdc.sample(barcode) for barcode in row["Sample ID"].split(", ")]
        made = sheet_row(read(record, "slides"))
        assert {name: made[name] for name in names} == {name: row[name] for name in names}
        # The same slide as if it hung on a portion: its barcode says which sample it is of.
        del record["cases"][0]["samples"], record["associated_entities"]
        (sample,) = read(record, "slides").sample_ids
        assert sample in row["Sample ID"]
        other += sample != row["Sample ID"]
        assert {barcode[13:15] for barcode in row["Sample ID"].split(", ")} == {sample[13:15]}
    assert (len(rows), other) == (940, 36)


def test_real_slides_of_normal_tissue_are_left_out(gdc, shared_data):
    """3,220 slides of the two lung projects: 591 of normal tissue."""
    path = shared_data / "gdc/manifests/gdc_manifest_LUAD_LUSC_slides.txt"
    files = []
    for row in csv.DictReader(path.open(encoding="utf-8"), delimiter="\t"):
        own = {"file_id": row["id"], "file_name": row["filename"], "md5sum": row["md5"], "size": 1}
        files.append(read(gdc.slide_record(row["filename"][:12], on_portion=True, **own), "slides"))
    kept, left_out = keep_tumours(files, TUMOUR_CODES)
    reasons = Counter(one.reason for one in left_out)
    assert len(kept) + len(left_out) == 3220
    assert reasons["sample type 11 (solid tissue normal)"] == 591
    assert all("-11" not in file.name[12:15] for file in kept)
    assert sum("-DX" in file.name for file in kept) == 1053 - sum("-DX" in one.name for one in left_out)


def test_samples_in_the_words_of_before_2023(gdc):
    record = gdc.rna_record("X-1")
    record["cases"][0]["samples"] = [{"submitter_id": "X-1-A", "sample_type": "Solid Tissue Normal"}]
    file = read(record, "rna")
    assert (file.tissue_types, file.descriptors) == (("Normal",), ("Solid Tissue Normal",))
    assert keep_tumours([file], TUMOUR_CODES)[0] == []
    record["cases"][0]["samples"][0]["sample_type"] = "Primary Tumor"
    assert keep_tumours([read(record, "rna")], TUMOUR_CODES)[1] == []


def test_removed_and_deprecated_fields_are_not_asked_for(gdc):
    assert not {field.rpartition(".")[2] for field in FIELDS} & {"gender", "sample_type", "is_ffpe"}
    with gdc.GdcServer([gdc.slide_record()]) as server, Gdc(server.url) as api:
        find_files(api, "TCGA-COAD", "slides")  # a warning of the server would be an error here
    assert server.bodies[0][1]["filters"] == file_filters("TCGA-COAD", "slides")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_name": "../../x.svs"}, "no plain file name"),
        ({"file_name": ".."}, "no plain file name"),
        ({"file_name": ""}, "no plain file name"),
        ({"file_id": "../x", "id": "../x"}, "is no file id"),
        ({"md5sum": None}, "is no md5"),
        ({"file_size": None}, "without its size"),
        ({"file_size": -1}, "no size in bytes"),
        ({"cases": []}, "without its patient"),
        ({"cases": None}, "without its patient"),
    ],
)
def test_a_hit_that_cannot_be_fetched_is_named(gdc, change, message):
    with pytest.raises(MorphomeError, match=message):
        read({**gdc.slide_record(), **change}, "slides")


def test_a_server_that_ignores_the_question_is_found_out(gdc, monkeypatch):
    monkeypatch.setattr(gdc, "_match", lambda *_: True)
    with pytest.raises(MorphomeError, match=r"asked for TCGA-READ, the answer holds .* of TCGA-COAD"):
        asked(gdc, [gdc.slide_record()], "slides", "TCGA-READ")


def test_samples_of_the_tumour_under_study(gdc):
    case = "TCGA-AA-0001"
    slides = [read(gdc.slide_record(case, code=code), "slides") for code in ("01", "06", "02", "11")]
    kept, left_out = keep_tumours(slides, TUMOUR_CODES)
    assert [file.name[13:15] for file in kept] == ["01", "06"]
    assert count_reasons(left_out) == {
        "slides": {"sample type 02 (recurrent solid tumour)": 1, "sample type 11 (solid tissue normal)": 1}
    }
    kept, left_out = keep_tumours(slides, ["02"])
    assert [file.name[13:15] for file in kept] == ["02"]
    # The slide's own barcode decides, whatever sample hangs on it besides.
    own = gdc.slide_record(case, code="01")
    own["cases"][0]["samples"] = [gdc.sample(f"{case}-11A")]
    normal = gdc.slide_record(case, code="11")
    normal["cases"][0]["samples"] = [gdc.sample(f"{case}-01A")]
    kept, left_out = keep_tumours([read(own, "slides"), read(normal, "slides")], TUMOUR_CODES)
    assert [file.file_id for file in kept] == [own["file_id"]]
    assert [(one.file_id, one.reason[:14]) for one in left_out] == [(normal["file_id"], "sample type 11")]
    # Blood beside the tumour is no reason; a comparison is judged by its tumour.
    assert keep_tumours([read(gdc.maf_record(case), "mut")], ["01"])[1] == []
    assert keep_tumours([read(gdc.maf_record(case), "mut")], ["06"])[1][0].reason.startswith("sample type 01")
    # Nothing known about the sample: kept.
    unknown = read(gdc.rna_record("X-1", cases=[{"submitter_id": "X-1"}]), "rna")
    assert keep_tumours([unknown], ["01"]) == ([unknown], [])


def test_one_workflow_of_copy_numbers(gdc):
    def files(*names):
        return [read(gdc.cnv_record("TCGA-AA-0001", workflow=name), "cnv") for name in names]

    kept, left_out = one_workflow(files("ASCAT2", "ASCAT3", "ABSOLUTE LiftOver"), None)
    assert [file.workflow for file in kept] == ["ASCAT3"]
    assert sorted(one.reason for one in left_out) == ["other workflow (ABSOLUTE LiftOver)", "other workflow (ASCAT2)"]
    assert one_workflow(files("ASCAT2", "ASCAT3"), "ascat-2")[0][0].workflow == "ASCAT2"
    assert one_workflow(files("AscatNGS"), None)[0][0].workflow == "AscatNGS"
    assert one_workflow([], None) == ([], [])
    with pytest.raises(MorphomeError, match=r"several workflows and no choice; the GDC has: ABSOLUTE LiftOver, ASCAT2"):
        one_workflow(files("ASCAT2", "ABSOLUTE LiftOver"), None)
    with pytest.raises(MorphomeError, match="no file of workflow 'GISTIC'; the GDC has: ASCAT3"):
        one_workflow(files("ASCAT3"), "GISTIC")


def test_release_numbers():
    assert release_number("Data Release 45.0 - December 04, 2025") == (45, 0)
    assert release_number("12.0 - 45.0") == (12, 0)
    assert release_number("33.1") == (33, 1) < release_number("34")
    assert release_number("") is release_number(None) is None
    assert release_text((9, 1)) == "9.1"


def test_the_release_wanted_and_that_of_the_server():
    status = {"data_release": "Data Release 45.0 - December 04, 2025"}
    assert pinned_release("latest", status) == ((45, 0), (45, 0))
    assert pinned_release("44.0", status) == ((44, 0), (45, 0))
    assert pinned_release("45", status) == ((45, 0), (45, 0))
    with pytest.raises(MorphomeError, match=r"data_release is 46.0, but the server has 45.0"):
        pinned_release("46.0", status)
    with pytest.raises(MorphomeError, match="'newest' is no release"):
        pinned_release("newest", status)
    with pytest.raises(MorphomeError, match="the server's release is 'n/a'"):
        pinned_release("latest", {"data_release": "n/a"})


@pytest.fixture
def versions(gdc):
    """Four slides: from the start; new in 46.0; replaced in 46.0; replaced, the old one forgotten by the server."""
    since = {"data_release": "46.0 - 46.0", "version": "2"}
    start = gdc.slide_record("TCGA-AA-0001", data_release="12.0 - 46.0")
    fresh = gdc.slide_record("TCGA-AA-0002", data_release="46.0 - 46.0")
    newer = gdc.slide_record("TCGA-AA-0003", size=500, **since)
    older = gdc.slide_record(
        *("TCGA-AA-0003", 1), size=700, file_id=gdc.made_up_uuid("old"), superseded_by=newer["file_id"]
    )
    lost = gdc.slide_record("TCGA-AA-0004", **since)
    history = {
        newer["file_id"]: [
            {"uuid": "0" * 36, "version": "1", "data_release": "12.0", "file_change": "superseded"},
            {"uuid": older["file_id"], "version": "2", "data_release": "30.0", "file_change": "superseded"},
            {"uuid": newer["file_id"], "version": "3", "data_release": "46.0", "file_change": "released"},
        ],
        lost["file_id"]: [
            {"uuid": "1" * 36, "version": "1", "data_release": "12.0", "file_change": "superseded"},
            {"uuid": lost["file_id"], "version": "2", "data_release": "46.0", "file_change": "released"},
        ],
        fresh["file_id"]: [{"uuid": fresh["file_id"], "version": "1", "data_release": "46.0"}],
    }
    return start, fresh, newer, older, lost, history


def test_files_as_they_were_in_an_earlier_release(gdc, versions):
    start, fresh, newer, older, lost, history = versions
    with gdc.GdcServer([start, fresh, newer, older, lost], history=history) as server, Gdc(server.url) as api:
        now = find_files(api, "TCGA-COAD", "slides")
        assert {file.file_id for file in now} == {r["file_id"] for r in (start, fresh, newer, lost)}
        kept, changed = files_of_release(api, now, (45, 0))
        assert files_of_release(api, now, (46, 0)) == (now, [])
    by_id = {file.file_id: file for file in kept}
    assert set(by_id) == {start["file_id"], older["file_id"]}
    then = by_id[older["file_id"]]
    assert (then.size, then.md5, then.name) == (700, older["md5sum"], older["file_name"])
    assert (then.case_ids, then.data_release) == (("TCGA-AA-0003",), "30.0 - 45.0")
    assert {one.file_id: one.reason for one in changed} == {
        fresh["file_id"]: "first released in 46.0",
        newer["file_id"]: "taken in the older version of this release",
        lost["file_id"]: "replaced since, and the version of then is no longer known",
    }
    # The history is asked for where it matters only.
    assert sum(path.startswith("/history") for _, path, _ in server.log) == 3


def test_a_file_that_does_not_say_its_release_is_judged_by_its_history(gdc):
    silent = gdc.slide_record(data_release=None)
    history = {silent["file_id"]: [{"uuid": silent["file_id"], "version": "1", "data_release": "20.0"}]}
    with gdc.GdcServer([silent], history=history) as server, Gdc(server.url) as api:
        now = find_files(api, "TCGA-COAD", "slides")
        assert files_of_release(api, now, (45, 0)) == files_of_release(api, now, (20, 0)) == (now, [])
        kept, changed = files_of_release(api, now, (19, 0))
    assert (kept, changed[0].reason) == ([], "no release known")
