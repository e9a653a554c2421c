"""Published files: the registry is whole, a file is fetched and checked, a copy put there by hand is checked too."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import yaml

from morphome.download import published, transfer
from morphome.download.published import check_published, published_file, published_names, run_published
from morphome.errors import MorphomeError

SETS = b"SET_A\tna\tTP53\tKRAS\nSET_B\tna\tEGFR\n"
TABLE = b"a table\n" * 500
UUID = "99999999-aaaa-bbbb-cccc-dddddddddddd"


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_WAIT_S", 0.0)


@pytest.fixture
def registry(gdc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A server of one file at an address and one of the GDC, and a registry that names them."""
    with gdc.GdcServer([], contents={UUID: TABLE}, plain={"/sets/a.gmt": SETS}) as server:
        rows = {
            "sets.gmt": {
                "what": "two sets",
                "url": f"{server.url}/sets/a.gmt",
                "bytes": len(SETS),
                "sha256": hashlib.sha256(SETS).hexdigest(),
                "licence": "CC0",
                "cite": "Nobody 2020",
            },
            "table.xlsx": {
                "what": "a table",
                "gdc_uuid": UUID,
                "bytes": len(TABLE),
                "md5": hashlib.md5(TABLE).hexdigest(),
                "licence": "open",
                "cite": "Somebody 2018",
            },
        }
        path = tmp_path / "published_files.yaml"
        path.write_text(yaml.safe_dump({"files": rows}))
        monkeypatch.setattr(published, "REGISTRY_PATH", path)
        yield server


def test_every_row_of_the_registry_is_whole() -> None:
    assert len(published_names()) >= 5
    for name in published_names():
        row = published_file(name)
        assert row.what and row.licence and row.cite and row.bytes > 0
        assert re.fullmatch(r"[0-9a-f]{32}|", row.md5) and re.fullmatch(r"[0-9a-f]{64}|", row.sha256)
        if row.url:  # a branch would change under our feet
            assert re.fullmatch(r"https://raw\.githubusercontent\.com/[^/]+/[^/]+/[0-9a-f]{40}/.+", row.url)
        else:
            assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", row.gdc_uuid)
    assert published_file("no_such.gmt") is None


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("six_families.csv", "mcat_signatures.csv"),
        ("hallmark_v7.0.gmt", "h.all.v7.0.symbols.gmt"),
        ("reactome_2020.gmt", "ReactomePathways.gmt"),
        ("pathways_331.csv", "survpath/combine_signatures.csv"),
    ],
)
def test_the_rows_are_those_of_the_real_files(shared_data: Path, name: str, path: str) -> None:
    check_published(name, shared_data / "genesets" / path)


def test_a_copy_saved_anew_is_refused(shared_data: Path) -> None:
    """A copy of the table that went through a spreadsheet has other bytes than the one that was published."""
    with pytest.raises(MorphomeError, match=r"has 2,750,027 bytes, expected 2,945,129.*another edition"):
        check_published(
            "TCGA-CDR-SupplementalTableS1.xlsx",
            shared_data / "tables" / "tcga_cdr" / "TCGA-CDR-SupplementalTableS1.xlsx",
        )


@pytest.mark.parametrize(("name", "body", "words"), [("sets.gmt", SETS, "CC0"), ("table.xlsx", TABLE, "Somebody 2018")])
def test_a_file_is_fetched_with_its_licence(registry, tmp_path: Path, name: str, body: bytes, words: str) -> None:
    out, said = tmp_path / "published" / name, []
    run_published(name=name, out=out, api=registry.url + "/", say=said.append)
    assert out.read_bytes() == body and list(out.parent.iterdir()) == [out]
    assert words in said[-1] and "Licence: " in said[-1] and "Cite: " in said[-1]
    run_published(name=name, out=out, api=registry.url, say=said.append)
    assert len(registry.log) == 1 and "already in" in said[-2]


def test_a_copy_put_there_by_hand_is_checked(registry, tmp_path: Path) -> None:
    out = tmp_path / "sets.gmt"
    out.write_bytes(SETS)
    run_published(name="sets.gmt", out=out, say=lambda line: None)
    assert registry.log == []
    for wrong in (SETS.replace(b"TP53", b"TP63"), SETS + b"more"):
        out.write_bytes(wrong)
        with pytest.raises(MorphomeError, match=r"sets\.gmt: has .* expected .*another edition") as caught:
            run_published(name="sets.gmt", out=out, say=lambda line: None)
        assert "another name" in caught.value.remedy
        assert out.read_bytes() == wrong
    with pytest.raises(MorphomeError, match="No such file"):
        check_published("sets.gmt", tmp_path / "absent.gmt")


@pytest.mark.parametrize("fault", ["404", "503", "corrupt", "html"])
def test_an_unreachable_file_says_how_to_get_it_by_hand(registry, tmp_path: Path, fault: str) -> None:
    registry.faults = {"/sets/a.gmt": [fault, "always"]}
    out = tmp_path / "published" / "sets.gmt"
    with pytest.raises(MorphomeError, match=r"sets\.gmt: ") as caught:
        run_published(name="sets.gmt", out=out, say=lambda line: None)
    for words in (f"{registry.url}/sets/a.gmt", hashlib.sha256(SETS).hexdigest(), f"put it at {out}"):
        assert words in caught.value.remedy
    assert not out.exists() and list(out.parent.iterdir()) == []


def test_an_unknown_name_is_told_with_those_there_are(registry, tmp_path: Path) -> None:
    with pytest.raises(MorphomeError, match="'hallmark' is no published file") as caught:
        run_published(name="hallmark", out=tmp_path / "x")
    assert "sets.gmt" in caught.value.remedy


def test_a_row_without_checksum_or_with_two_addresses_is_refused() -> None:
    facts = {"name": "a", "what": "a", "bytes": 1, "licence": "", "cite": ""}
    for more in ({"url": "https://x"}, {"url": "https://x", "gdc_uuid": UUID, "md5": "0" * 32}, {"md5": "0" * 32}):
        with pytest.raises(MorphomeError, match="md5 or sha256 are needed"):
            published.PublishedFile(**facts, **more)
