"""The step manifest: four files, what is on disk, an earlier run's list, room on the disk."""

from __future__ import annotations

import csv
import shutil
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from morphome.cohort.clinical import read_clinical
from morphome.cohort.slide_sheet import read_slide_sheet
from morphome.download import api as api_module
from morphome.download.listing import COLUMNS, KINDS, GdcFile, read_manifest, write_manifest
from morphome.download.local import find_local
from morphome.download.manifest import run_manifest
from morphome.download.pinned import QUERY_FORMAT
from morphome.errors import MorphomeError, MorphomeWarning
from morphome.files import read_json
from morphome.genomics.gdc_files import choose_files
from morphome.paths import GDC_TABLES

PANELS = {"rna": {"format": "star_counts"}, "mut": {"format": "maf"}, "cnv": {"format": "gdc_gene_level"}}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch, tmp_path):
    monkeypatch.setattr(api_module, "FIRST_WAIT_S", 0.001)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def files(gdc):
    """Two projects: five patients, a recurrence, a slide on a portion, normal tissue, two callers of copy numbers."""
    records = []
    for case in ("TCGA-AA-0001", "TCGA-AA-0002", "TCGA-AA-0003"):
        records += [gdc.slide_record(case, size=3000), gdc.rna_record(case, size=200), gdc.maf_record(case, size=50)]
        records += [gdc.cnv_record(case, size=70), gdc.cnv_record(case, workflow="ASCAT2")]
    for case in ("TCGA-BB-0004", "TCGA-BB-0005"):
        records += [gdc.slide_record(case, project="TCGA-READ", on_portion=True, size=4000)]
        records += [record(case, project="TCGA-READ") for record in (gdc.rna_record, gdc.maf_record, gdc.cnv_record)]
    return [
        *records,
        gdc.slide_record("TCGA-AA-0001", 2, size=3000),
        gdc.slide_record("TCGA-AA-0002", code="02"),
        gdc.rna_record("TCGA-AA-0002", barcode="TCGA-AA-0002-11A"),
    ]


@pytest.fixture(scope="module")
def cases(gdc):
    own = [gdc.case_record(f"TCGA-AA-000{number}") for number in (1, 2, 3, 8)]
    return own + [gdc.case_record(f"TCGA-BB-000{number}", project="TCGA-READ") for number in (4, 5)]


@pytest.fixture
def server(gdc, files, cases):
    with gdc.GdcServer(files, cases, max_page=4) as running:
        yield running


def run(server, out="out", *, panels=PANELS, codes=("01", "03", "06"), **options):
    section = {"projects": ["TCGA-COAD", "TCGA-READ"], "data_release": "45.0", "folder": "files"}
    section |= {"have": [], "delete_slides": False, "api": server.url if server else "http://127.0.0.1:1", **options}
    settings = {
        "gdc": {key: section[key] for key in ("projects", "data_release")},
        "cohort": {"sample_types": list(codes)},
        "molecular": panels,
    }
    run_manifest(settings=settings, gdc=section, kinds=["slides", *panels], out=Path(out))
    return read_manifest(Path(out) / "manifest.tsv"), read_json(Path(out) / "query.json", QUERY_FORMAT, settings)


def test_the_manifest_lists_every_file_once(server, files):
    listed, _ = run(server)
    assert [(file.kind, file.name) for file in listed] == sorted(
        ((file.kind, file.name) for file in listed), key=lambda pair: (KINDS.index(pair[0]), pair[1])
    )
    by_id = {record["file_id"]: record for record in files}
    for file in listed:
        record = by_id.pop(file.file_id)
        assert (file.md5, file.size, file.state) == (record["md5sum"], record["file_size"], "released")
    # Two callers' files, a recurrence and normal tissue stay out.
    assert len(by_id) == 3 + 1 + 1
    assert [file.kind for file in listed].count("slides") == 6
    lines = Path("out/manifest.tsv").read_text().splitlines()
    assert lines[0].split("\t")[:5] == ["id", "filename", "md5", "size", "state"]
    assert {line.count("\t") for line in lines} == {len(COLUMNS) - 1}


def test_the_query_says_what_was_asked_found_and_left_out(server, capsys):
    listed, query = run(server)
    assert query["data_release"] == query["server_release"] == query["pin"] == "45.0"
    assert query["status"]["data_release"].startswith("Data Release 45.0")
    assert query["time"].endswith("+00:00")
    assert query["projects"] == ["TCGA-COAD", "TCGA-READ"]
    assert query["cases"] == {"TCGA-COAD": 4, "TCGA-READ": 2}
    assert query["kinds"]["slides"] == {"files": 6, "bytes": 4 * 3000 + 2 * 4000, "patients": 5, "here": 0}
    assert query["by_project"]["TCGA-COAD"]["cnv"] == {"files": 3, "bytes": 210, "patients": 3, "here": 0}
    assert query["left_out"] == {
        "cnv": {"other workflow (ASCAT2)": 3},
        "rna": {"sample type 11 (solid tissue normal)": 1},
        "slides": {"sample type 02 (recurrent solid tumour)": 1},
    }
    assert [one["name"][:19] for one in query["left_out_files"] if one["kind"] == "slides"] == ["TCGA-AA-0002-02Z-00"]
    assert query["to_fetch"] == {"files": len(listed), "bytes": sum(file.size for file in listed)}
    assert query["asked"]["cnv_workflow"] == "ASCAT3"
    assert query["pinned"] is None
    asked = {(path, str(body["filters"])) for path, body in server.bodies}
    written = query["filters"]
    assert asked == {
        ("/cases" if kind == "cases" else "/files", str(one)) for own in written.values() for kind, one in own.items()
    }
    said = capsys.readouterr().out
    assert "GDC data release 45.0" in said
    assert "TCGA-COAD: 4 cases; slides: 4 files of 3 patients, 0.00 GB" in said
    assert "1 sample type 02 (recurrent solid tumour)" in said


def test_the_readers_of_slides_genes_and_outcomes_take_the_tables(server, gdc, files):
    listed, _ = run(server)
    sheet = Path("out/sample_sheet.tsv")
    chosen, left_out = read_slide_sheet(sheet, Path("files"))
    assert [slide.patient_id for slide in chosen] == ["TCGA-AA-0001"] * 2 + [
        *("TCGA-AA-0002", "TCGA-AA-0003", "TCGA-BB-0004", "TCGA-BB-0005")
    ]
    assert left_out == []
    assert {Path(slide.path) for slide in chosen} == {f.path(Path("files")) for f in listed if f.kind == "slides"}
    for file in listed:
        if file.kind != "slides":
            target = file.path(Path("files"))
            target.parent.mkdir(parents=True)
            target.write_bytes(gdc.made_up_body(file.file_id, file.size))
    for panel, table in PANELS.items():
        found, reasons = choose_files(table["format"], Path("files"), sheet, f"molecular.{panel}")
        files = {patient: file for patient, (file, _) in found.items()}
        assert files == {f.case_ids[0]: f.path(Path("files")) for f in listed if f.kind == panel}
        assert reasons == {}
        assert len(found) == 5
    patients = read_clinical("gdc_clinical", Path("out/clinical.tsv")).table
    assert len(patients) == 6


def test_only_what_is_wanted_is_asked_for(server):
    listed, query = run(server, panels={})
    assert {file.kind for file in listed} == {"slides"}
    assert list(query["filters"]["TCGA-COAD"]) == ["cases", "slides"]


def test_other_samples_and_workflows_can_be_the_tumour_under_study(server):
    panels = {"cnv": {"format": "gdc_gene_level", "workflow": "ascat2"}}
    with pytest.warns(MorphomeWarning, match="no open file of kind cnv in TCGA-READ"):
        listed, query = run(server, panels=panels, codes=["02", "01"])
    assert sum(file.kind == "slides" for file in listed) == 7
    assert {file.workflow for file in listed if file.kind == "cnv"} == {"ASCAT2"}
    assert query["asked"]["cnv_workflow"] == "ASCAT2"


def test_a_project_without_a_kind_is_warned_of_and_a_panel_without_files_an_error(gdc, cases):
    with gdc.GdcServer([gdc.slide_record("TCGA-AA-0001")], cases) as server:
        with pytest.warns(MorphomeWarning, match="no open file of kind slides in TCGA-READ"):
            run(server, panels={})
        with (
            pytest.warns(MorphomeWarning, match="kind slides in TCGA-READ"),
            pytest.raises(MorphomeError, match="no open file of kind mut in TCGA-COAD, TCGA-READ") as caught,
        ):
            run(server, "out2", panels={"mut": PANELS["mut"]})
        assert "leave molecular.mut out" in caught.value.remedy
        with pytest.raises(MorphomeError, match="no open file of kind slides in TCGA-READ"):
            run(server, "out2", panels={}, projects=["TCGA-READ"])
        with pytest.raises(MorphomeError, match="knows nobody in 'TCGA-HNSCC'"):
            run(server, "out2", projects=["TCGA-HNSCC"])
    assert not Path("out2").exists()


def test_a_release_of_before(gdc, files, cases):
    fresh = gdc.slide_record("TCGA-AA-0003", 7, data_release="46.0 - 46.0")
    with gdc.GdcServer([*files, fresh], cases, release="46.0") as server:
        then, query = run(server, panels={})
        now, _ = run(server, "now", panels={}, data_release="latest")
        with pytest.raises(MorphomeError, match=r"data_release is 47.0, but the server has 46.0"):
            run(server, "later", data_release="47.0")
    assert {file.file_id for file in now} - {file.file_id for file in then} == {fresh["file_id"]}
    assert (query["data_release"], query["server_release"]) == ("45.0", "46.0")
    assert query["left_out"]["slides"]["first released in 46.0"] == 1
    assert "withdrawn" in query["pin_note"]


def test_a_failing_server_leaves_no_half_a_list(gdc, files, cases):
    faults = {"/files": ["ok"] * 3 + ["403"]}
    with gdc.GdcServer(files, cases, faults=faults, max_page=2) as server, pytest.raises(MorphomeError, match="403"):
        run(server)
    assert not Path("out").exists()


# -- what is on disk --------------------------------------------------------------------------------------------
def place(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)


def test_files_on_disk_are_found_by_name_and_size(server, capsys):
    listed, _ = run(server)
    one, two, three, four, five, six = [file for file in listed if file.kind == "slides"]
    place(Path("files") / one.file_id / one.name, one.size)  # in its place
    place(Path("files") / two.file_id / two.name, two.size - 1)  # in its place, cut off
    place(Path("old/deep/down") / three.name, three.size)  # elsewhere, by name
    place(Path("old/a") / four.name, four.size)  # elsewhere, twice: as gdc-client lays it goes first
    place(Path("old/z") / four.file_id / four.name, four.size)
    place(Path("old") / five.name, five.size + 5)  # elsewhere, another size
    place(Path("files") / six.name, six.size)  # beside its place
    again, query = run(server, "again", have=["old"])
    local = {file.file_id: file.local_path for file in again}
    assert [local[file.file_id] for file in (one, two, three, four, five, six)] == [
        *("", "", f"old/deep/down/{three.name}", f"old/z/{four.file_id}/{four.name}", "", f"files/{six.name}")
    ]
    assert query["local"] == {
        "in_place": 1,
        "elsewhere": 3,
        "bytes": one.size + three.size + four.size + six.size,
        "checked_by": "name and size",
        "other_size": 2,
        "other_size_files": [
            {"path": f"files/{two.file_id}/{two.name}", "bytes": two.size - 1, "expected": two.size},
            {"path": f"old/{five.name}", "bytes": five.size + 5, "expected": five.size},
        ],
    }
    assert query["kinds"]["slides"]["here"] == 4
    assert query["to_fetch"]["files"] == len(listed) - 4
    assert "not used, as their size is another: 2 files" in capsys.readouterr().out
    paths = {slide.file_id: slide.path for slide in read_slide_sheet(Path("again/sample_sheet.tsv"), Path("files"))[0]}
    assert paths[three.file_id] == f"old/deep/down/{three.name}"
    assert paths[one.file_id] == f"files/{one.file_id}/{one.name}"


def test_a_folder_of_files_that_is_not_there_is_named(server):
    with pytest.raises(MorphomeError, match=r"gdc.have\[1\]: folder not found: nowhere"):
        run(server, have=[".", "nowhere"])


def test_a_path_that_no_table_takes_is_refused(gdc, server):
    listed, _ = run(server, panels={})
    place(Path("old\ttab") / listed[0].name, listed[0].size)
    with pytest.raises(MorphomeError, match="holds characters that no table takes"):
        find_local(listed, Path("files"), [Path("old\ttab")])


def test_room_on_the_disk(server, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10, 0, 10_000))
    with pytest.raises(MorphomeError, match=r"0.0 GB free, but 0.0 GB are still to be fetched") as caught:
        run(server)
    assert "gdc.delete_slides: true" in caught.value.remedy
    assert not Path("out").exists()
    listed, _ = run(server, delete_slides=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10, 0, 2999))
    with pytest.raises(MorphomeError, match="still to be fetched") as caught:
        run(server, delete_slides=True)
    assert "delete_slides" not in caught.value.remedy
    for file in listed:  # what is here needs no room
        place(file.path(Path("files")), file.size)
    run(server)


# -- an earlier run's list --------------------------------------------------------------------------------------
def test_a_pinned_list_is_taken_over_without_a_server(server):
    first, before = run(server)
    place(Path("old") / first[0].name, first[0].size)
    second, query = run(None, "second", pinned="out", have=["old"])
    assert second == [replace(first[0], local_path=f"old/{first[0].name}"), *first[1:]]
    assert Path("second/clinical.tsv").read_bytes() == Path("out/clinical.tsv").read_bytes()
    assert query["pinned"] == "out"
    assert (query["time"], query["left_out"]) == (before["time"], before["left_out"])
    assert (query["kinds"]["slides"]["here"], query["local"]["elsewhere"]) == (1, 1)
    old, new = (
        list(csv.DictReader((Path(folder) / "sample_sheet.tsv").read_text().splitlines(), delimiter="\t"))
        for folder in ("out", "second")
    )
    assert [{**row, "Local Path": ""} for row in new] == old
    # Where the earlier run found its files does not matter here.
    shutil.rmtree("old")
    third, _ = run(None, "third", pinned="second")
    assert third == first
    assert Path("third/sample_sheet.tsv").read_bytes() == Path("out/sample_sheet.tsv").read_bytes()
    # Fewer kinds than were asked for then.
    fewer, query = run(None, "fewer", pinned="out", panels={"rna": PANELS["rna"]}, data_release="latest")
    assert {file.kind for file in fewer} == {"slides", "rna"}
    assert list(query["kinds"]) == ["slides", "rna"]
    assert run(None, "fewer2", pinned="fewer", panels={"rna": PANELS["rna"]})[0] == fewer
    with pytest.raises(MorphomeError, match="no files of kind mut, cnv"):
        run(None, "more", pinned="fewer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projects": ["TCGA-COAD"]}, "it is of TCGA-COAD, TCGA-READ; gdc.projects is TCGA-COAD"),
        ({"panels": PANELS}, "no files of kind mut, cnv"),
        ({"codes": ["01", "02"]}, "no files of sample type 02"),
        ({"data_release": "44.0"}, "of data release 45.0; gdc.data_release is 44.0"),
        (
            {"panels": {"cnv": {"format": "gdc_gene_level", "workflow": "ASCAT2"}}, "full": True},
            "workflow ASCAT3, not ASCAT2",
        ),
    ],
)
def test_a_pinned_list_of_another_question_is_refused(server, options, message):
    options = {"panels": {"rna": PANELS["rna"]}, **options}
    run(server, panels=PANELS if options.pop("full", False) else {"rna": PANELS["rna"]})
    with pytest.raises(MorphomeError, match=message):
        run(None, "second", pinned="out", **options)


def drop_line(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        *((name, Path.unlink, f"{name} not found") for name in GDC_TABLES),
        ("manifest.tsv", drop_line, "manifest.tsv lists"),
        ("sample_sheet.tsv", drop_line, "sample_sheet.tsv lists other files"),
        ("clinical.tsv", drop_line, "clinical.tsv lists 5 patients, query.json says 6"),
        ("query.json", lambda path: path.write_text(path.read_text()[:-50]), "not valid JSON"),
        ("query.json", lambda path: path.write_text(path.read_text().replace('"cases": {', '"c": {')), "no 'cases'"),
        ("manifest.tsv", lambda path: path.write_text(path.read_text().replace("\t3000\t", "\t3001\t")), "the bytes"),
    ],
)
def test_a_damaged_pinned_folder_is_refused(server, name, damage, message):
    run(server)
    damage(Path("out") / name)
    with pytest.raises(MorphomeError, match=message):
        run(None, "second", pinned="out")
    assert not Path("second").exists()


# -- the list itself --------------------------------------------------------------------------------------------
def made_up(number):
    identity = f"{number:08d}-0000-0000-0000-000000000000"
    return GdcFile(
        *(identity, f"TCGA-AA-{number % 10000:04d}.svs", f"{number:032x}", number, "released", "slides", "Slide Image"),
        *("", "TCGA-COAD", (f"TCGA-AA-{number}",), (), "12.0 - 45.0"),
    )


def test_forty_thousand_rows_are_read_quickly(tmp_path):
    path = tmp_path / "manifest.tsv"
    files = [made_up(number) for number in range(40_000)]
    write_manifest(files, path)
    started = time.process_time()
    found = read_manifest(path)
    assert time.process_time() - started < 3
    assert sorted(found, key=lambda file: file.file_id) == files


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("id\tfilename", "id\tname", "columns are not those of a manifest"),
        ("\t1\treleased", "\t1.5\treleased", "line 2: a damaged row"),
        ("\t1\treleased", "\treleased", "line 2: a damaged row"),
        ("TCGA-AA-0001.svs", "../TCGA-AA-0001.svs", "no plain file name"),
        ("00000001-", "00000002-", "listed twice"),
        ("\tslides\t", "\tslide\t", "'slide' is none of slides, rna, mut, cnv"),
        (f"{1:032x}", "abc", "no md5"),
    ],
)
def test_a_manifest_that_was_edited_is_refused(tmp_path, old, new, message):
    path = tmp_path / "manifest.tsv"
    write_manifest([made_up(1), made_up(2)], path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(MorphomeError, match=message):
        read_manifest(path)


def test_no_manifest_and_odd_bytes(tmp_path):
    with pytest.raises(MorphomeError, match="file not found") as caught:
        read_manifest(tmp_path / "manifest.tsv")
    assert "manifest" in caught.value.remedy
    (tmp_path / "manifest.tsv").write_bytes(b"id\xff\n")
    with pytest.raises(MorphomeError, match="not UTF-8"):
        read_manifest(tmp_path / "manifest.tsv")
    write_manifest([], tmp_path / "manifest.tsv")
    assert read_manifest(tmp_path / "manifest.tsv") == []


def test_the_room_imports_no_science(loaded_by):
    loaded = loaded_by("morphome.download.manifest")
    assert not loaded & {"numpy", "pandas", "torch", "h5py"}
    assert "httpx" not in loaded_by("morphome.download.listing")


def test_a_folder_that_holds_none_of_the_files_is_refused(server, tmp_path):
    """Who names a folder of slides does not want them fetched."""
    (tmp_path / "wrong").mkdir()
    with pytest.raises(MorphomeError, match=r"gdc\.have\[0\]: none of the \d+ files"):
        run(server, have=[str(tmp_path / "wrong")])
