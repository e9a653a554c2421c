"""The API's answers, good and bad, page by page."""

from __future__ import annotations

import time

import httpx
import pytest

from morphome.download import api as api_module
from morphome.download.api import Gdc, wait_s
from morphome.download.listing import data_url
from morphome.errors import MorphomeError, MorphomeWarning

EVERYTHING = {"op": "=", "content": {"field": "access", "value": "open"}}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(api_module, "FIRST_WAIT_S", 0.001)


@pytest.fixture(scope="module")
def records(gdc):
    return [gdc.slide_record(f"TCGA-AA-{number:04d}") for number in range(23)]


def search(api, **options):
    return list(api.search("files", EVERYTHING, ["file_id", "file_name"], **options))


def test_status_tells_the_release(gdc):
    with gdc.GdcServer([], release="44.0") as server, Gdc(server.url + "/") as api:
        assert api.status()["data_release"] == "Data Release 44.0 - December 04, 2025"
        assert data_url(server.url + "/", "abc") == f"{server.url}/data/abc"


@pytest.mark.parametrize(("page", "cap", "requests"), [(500, None, 1), (10, None, 3), (500, 7, 4), (23, None, 1)])
def test_all_pages_come_whatever_the_server_allows(gdc, records, page, cap, requests):
    with gdc.GdcServer(records, max_page=cap) as server, Gdc(server.url) as api:
        hits = search(api, page=page)
    assert [hit["file_id"] for hit in hits] == sorted(record["file_id"] for record in records)
    assert len(server.log) == requests
    assert {body["sort"] for _, body in server.bodies} == {"file_id:asc"}


def test_nothing_found_is_an_empty_answer(gdc):
    with gdc.GdcServer([]) as server, Gdc(server.url) as api:
        assert search(api) == []


@pytest.mark.parametrize("fault", ["503", "500", "429", "badjson", "html", "cut:20", "short"])
def test_what_passes_is_asked_again(gdc, records, fault):
    faults = {"/files": ["ok", fault, fault]}
    with gdc.GdcServer(records, faults=faults, max_page=10) as server, Gdc(server.url) as api:
        assert len(search(api)) == 23
    assert len(server.log) == 3 + 2


def test_a_hanging_server_is_asked_again_after_the_timeout(gdc, records):
    with gdc.GdcServer(records, faults={"/files": ["hang:5"]}) as server, Gdc(server.url, timeout_s=0.2) as api:
        started = time.monotonic()
        assert len(search(api)) == 23
    assert time.monotonic() - started < 3
    assert len(server.log) == 2


def test_it_ends_after_the_last_attempt_and_names_the_cause(gdc):
    faults = {"/status": ["503", "always"]}
    with (
        gdc.GdcServer([], faults=faults) as server,
        Gdc(server.url, attempts=3) as api,
        pytest.raises(MorphomeError, match=r"after 3 attempts; the last one: 503: Service Unavailable") as caught,
    ):
        api.status()
    assert len(server.log) == 3
    assert "gdc.pinned" in caught.value.remedy


def test_nobody_listens(gdc):
    with gdc.GdcServer([]) as server:
        url = server.url
    with (
        Gdc(url, attempts=2) as api,
        pytest.raises(MorphomeError, match="after 2 attempts; the last one: ConnectError"),
    ):
        api.status()


@pytest.mark.parametrize(("fault", "message"), [("403", "You don't have access"), ("404", "not found")])
def test_a_refusal_is_not_repeated_and_quotes_the_server(gdc, fault, message):
    faults = {"/files": [fault, "always"]}
    with (
        gdc.GdcServer([], faults=faults) as server,
        Gdc(server.url) as api,
        pytest.raises(MorphomeError, match=f"refused with {fault}: {message}"),
    ):
        search(api)
    assert len(server.log) == 1


def test_a_redirect_is_not_followed_as_it_would_lose_the_filters(gdc):
    with (
        gdc.GdcServer([], faults={"/files": ["redirect:/elsewhere"]}) as server,
        Gdc(server.url) as api,
        pytest.raises(MorphomeError, match="points to /elsewhere"),
    ):
        search(api)
    assert [path for _, path, _ in server.log] == ["/files"]


def answers(*pages):
    """A client that gives these answers to /files in turn."""
    queue = list(pages)
    return httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(200, json=queue.pop(0))))


def page(ids, total):
    return {"data": {"hits": [{"file_id": name} for name in ids], "pagination": {"total": total}}, "warnings": {}}


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([page("ab", 4), page("cd", 5)], "the total changed from 4 to 5"),
        ([page("ab", 4), page("bc", 4)], "'b' came twice"),
        ([page("ab", 4), page("", 4)], "the pages ended after 2 of 4"),
        ([page("abc", 2)], "3 hits came, but the total is 2"),
        ([page(["a", ""], 2)], "a hit has no id"),
        ([{"data": {"hits": []}}], "no data.hits and data.pagination.total"),
        ([["a"]], "no data.hits and data.pagination.total"),
        ([{"data": None}], "no data.hits and data.pagination.total"),
    ],
)
def test_pages_that_do_not_fit_together_are_refused(pages, message):
    with pytest.raises(MorphomeError, match=message):
        search(Gdc("http://127.0.0.1", client=answers(*pages)))


def test_something_else_than_the_gdc():
    api = Gdc("http://127.0.0.1", client=answers({"hello": 1}, {"message": "no"}, ["x"]))
    with pytest.raises(MorphomeError, match=r"/status: no data_release in the answer") as caught:
        api.status()
    assert "https://api.gdc.cancer.gov" in caught.value.remedy
    with pytest.raises(MorphomeError, match="no list of versions"):
        api.history("x")
    with pytest.raises(MorphomeError, match="no list of versions"):
        api.versions(["x"])


@pytest.mark.parametrize("url", ["api.gdc.cancer.gov", "ftp://x", "", "https://"])
def test_an_address_is_checked_at_once(url):
    with pytest.raises(MorphomeError, match=r"gdc\.api: "):
        Gdc(url)


def test_warnings_of_the_server_are_passed_on_once(gdc, records):
    with (
        gdc.GdcServer(records, max_page=10) as server,
        Gdc(server.url) as api,
        pytest.warns(MorphomeWarning, match=r"unrecognized values: \[demographic.gender\]") as caught,
    ):
        list(api.search("files", EVERYTHING, ["file_id", "demographic.gender"]))
    assert len(caught) == 1


def test_history_and_versions(gdc):
    new = gdc.rna_record("TCGA-AA-0001", version="2", data_release="32.0 - 45.0")
    old = gdc.rna_record("TCGA-AA-0001", file_name="old.tsv", superseded_by=new["file_id"], data_release="12.0 - 31.0")
    history = [{"uuid": old["file_id"], "version": "1", "data_release": "12.0"}]
    with gdc.GdcServer([new, old], history={new["file_id"]: history}) as server, Gdc(server.url) as api:
        assert api.history(new["file_id"]) == history
        assert api.history(old["file_id"])[0]["data_release"] == "12.0"
        found = api.versions([old["file_id"], "00000000-unknown"])
        assert list(found) == [old["file_id"]]
        assert found[old["file_id"]]["filename"] == "old.tsv"
        assert found[old["file_id"]]["latest_id"] == new["file_id"]
        assert [hit["file_id"] for hit in search(api)] == [new["file_id"]]


class State:
    """What tenacity tells of the attempt before."""

    def __init__(self, number, error):
        self.attempt_number = number
        self.outcome = self
        self.exception = lambda: error


def test_waits_grow_with_jitter_and_heed_the_server(monkeypatch):
    monkeypatch.setattr(api_module, "FIRST_WAIT_S", 1.0)
    again = api_module._Again("503")
    for number, middle in [(1, 1), (2, 2), (5, 16), (12, 60)]:
        waits = {wait_s(State(number, again)) for _ in range(50)}
        assert 0.5 * middle <= min(waits) < max(waits) <= 1.5 * middle
    assert wait_s(State(5, api_module._Again("429", 3.0))) == 3.0
    assert wait_s(State(1, api_module._Again("429", 4000.0))) == 60.0
