"""Questions to the API of the GDC: status, searches page by page, the history of a file.

Every question is asked again after a broken connection, a timeout, 429 or 5xx, with growing waits and jitter; any
other refusal is an error that quotes the server. Nothing here needs or knows a token: only open files are used.
"""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx
import tenacity

from morphome import __version__
from morphome.download.answers import message_in, retry_after_s
from morphome.download.listing import GDC_API
from morphome.errors import MorphomeError, MorphomeWarning

#: Wait before the second attempt; it doubles from attempt to attempt up to the longest, with a jitter of half.
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
#: Versions asked for at once: the ids go into one body.
_VERSIONS_AT_ONCE = 200
_NO_NETWORK = (
    "check the network and its proxy (HTTPS_PROXY); compute nodes of a cluster often have no way out: run this step on "
    "a login node, or set gdc.pinned to the gdc/ folder of an earlier run"
)


class _Again(Exception):
    """An attempt that is worth repeating; ``after_s`` is what the server asked for."""

    def __init__(self, cause: str, after_s: float | None = None) -> None:
        super().__init__(cause)
        self.after_s = after_s


def wait_s(state: tenacity.RetryCallState) -> float:
    """Seconds to wait before the next attempt: what the server asked for, else doubling with jitter; capped."""
    error = state.outcome.exception() if state.outcome else None
    asked = getattr(error, "after_s", None)
    if asked is not None:
        return min(asked, LONGEST_WAIT_S)
    grown = FIRST_WAIT_S * 2 ** (state.attempt_number - 1)
    return min(grown, LONGEST_WAIT_S) * random.uniform(0.5, 1.5)


class Gdc:
    """The API at ``url``; a context manager, as it holds connections.

    Args:
        url: base of the API.
        timeout_s: for connecting and between two pieces of an answer.
        attempts: how often a question is asked in all.
        client: an own client (its timeouts then hold); it is not closed here.

    Raises:
        MorphomeError: ``url`` is no address.
    """

    def __init__(
        self, url: str = GDC_API, *, timeout_s: float = 60, attempts: int = 6, client: httpx.Client | None = None
    ) -> None:
        self.url = str(url).rstrip("/")
        if not re.match(r"https?://[^/\s]+", self.url):
            raise MorphomeError(f"gdc.api: '{url}' is no address", f"an address looks like {GDC_API}")
        self.attempts = attempts
        self._own = client is None
        self._client = client or httpx.Client(timeout=timeout_s, headers={"User-Agent": f"morphome/{__version__}"})
        self._warned: set[str] = set()

    def __enter__(self) -> Gdc:
        return self

    def __exit__(self, *_: object) -> None:
        if self._own:
            self._client.close()

    def status(self) -> dict[str, Any]:
        """Answer of ``/status``: ``data_release`` ("Data Release 45.0 - December 04, 2025"), ``tag``, ``commit`` ...

        Raises:
            MorphomeError: not reachable, or something that is not the GDC.
        """
        found = self._ask("GET", "/status")
        if not isinstance(found, dict) or not isinstance(found.get("data_release"), str):
            raise self._no_gdc("/status", "no data_release in the answer")
        return found

    def search(
        self, endpoint: str, filters: Mapping[str, Any], fields: Sequence[str], *, page: int = 500
    ) -> Iterator[dict[str, Any]]:
        """All hits of a search, page by page in a fixed order.

        Args:
            endpoint: ``files`` or ``cases``.
            filters: in the GDC's language.
            fields: dotted names.
            page: hits asked for at once; the server may send fewer.

        Raises:
            MorphomeError: as :meth:`status`; or the pages do not fit together (a total that changes, a hit that
                comes twice, an end before the total), as may be while the GDC puts a new release in place.
        """
        key = {"files": "file_id", "cases": "case_id"}[endpoint]
        total: int | None = None
        seen: set[str] = set()
        while total is None or len(seen) < total:
            body = {"filters": filters, "fields": ",".join(fields), "format": "JSON", "sort": f"{key}:asc"}
            answer = self._ask("POST", f"/{endpoint}", {**body, "size": page, "from": len(seen)})
            hits, now = self._page(endpoint, answer)
            if total is not None and now != total:
                raise self._unfit(endpoint, f"the total changed from {total} to {now} between two pages")
            total = now
            if not hits and len(seen) < total:
                raise self._unfit(endpoint, f"the pages ended after {len(seen)} of {total}")
            for hit in hits:
                name = str(hit.get(key) or hit.get("id") or "")
                if not name or name in seen:
                    raise self._unfit(endpoint, f"'{name}' came twice" if name else "a hit has no id")
                seen.add(name)
            if len(seen) > total:
                raise self._unfit(endpoint, f"{len(seen)} hits came, but the total is {total}")
            yield from hits

    def history(self, file_id: str) -> list[dict[str, Any]]:
        """All versions of a file: ``uuid, version, file_change, release_date, data_release``."""
        found = self._ask("GET", f"/history/{file_id}")
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise self._no_gdc(f"/history/{file_id}", "the answer is no list of versions")
        return found

    def versions(self, file_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """``filename, md5, size, state, release ...`` by file id, also of files that newer ones have replaced.

        Ids that the server does not know are absent.
        """
        found: dict[str, dict[str, Any]] = {}
        for start in range(0, len(file_ids), _VERSIONS_AT_ONCE):
            ids = list(file_ids[start : start + _VERSIONS_AT_ONCE])
            answer = self._ask("POST", "/files/versions", {"ids": ids})
            if not isinstance(answer, list) or not all(isinstance(entry, dict) for entry in answer):
                raise self._no_gdc("/files/versions", "the answer is no list of versions")
            found.update({str(entry.get("id")): entry for entry in answer})
        return found

    def _page(self, endpoint: str, answer: Any) -> tuple[list[dict[str, Any]], int]:
        data = answer.get("data") if isinstance(answer, dict) else None
        hits = data.get("hits") if isinstance(data, dict) else None
        pagination = data.get("pagination") if isinstance(data, dict) else None
        total = pagination.get("total") if isinstance(pagination, dict) else None
        if not isinstance(hits, list) or not isinstance(total, int) or not all(isinstance(hit, dict) for hit in hits):
            raise self._no_gdc(f"/{endpoint}", "no data.hits and data.pagination.total in the answer")
        if answer.get("warnings"):
            text = f"{self.url}/{endpoint}: the GDC warns: {json.dumps(answer['warnings'])[:300]}"
            if text not in self._warned:  # every page says it again
                self._warned.add(text)
                warnings.warn(MorphomeWarning(text), stacklevel=3)
        return hits, total

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=wait_s,
            retry=tenacity.retry_if_exception_type(_Again),
            reraise=True,
        )
        try:
            return retrying(self._once, method, path, body)
        except _Again as error:
            raise MorphomeError(
                f"{self.url}{path}: no answer after {self.attempts} attempts; the last one: {error}", _NO_NETWORK
            ) from None

    def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        try:
            # A redirected POST would become a GET without its filters: every file of the GDC.
            answer = self._client.request(method, self.url + path, json=body, follow_redirects=False)
        except httpx.RequestError as error:
            raise _Again(f"{type(error).__name__}: {error}") from None
        said = f"{answer.status_code}: {message_in(answer.content, answer.reason_phrase)}"
        if answer.status_code == 429 or answer.status_code >= 500:
            raise _Again(said, retry_after_s(answer))
        if answer.is_redirect:
            raise MorphomeError(
                f"{self.url}{path}: the server points to {answer.headers.get('Location')}",
                "set gdc.api to the address that it points to, when you trust it",
            )
        if answer.status_code >= 400:
            raise MorphomeError(
                f"{self.url}{path}: the server refused with {said}",
                "check gdc.api and gdc.projects; when both are right, the API has changed: please report it",
            )
        try:
            return answer.json()
        except ValueError:
            kind = answer.headers.get("Content-Type", "no type")
            raise _Again(f"no JSON but {kind}: {' '.join(answer.text.split())[:80]}") from None

    def _no_gdc(self, path: str, why: str) -> MorphomeError:
        return MorphomeError(f"{self.url}{path}: {why}", f"check gdc.api (the GDC is {GDC_API})")

    def _unfit(self, endpoint: str, why: str) -> MorphomeError:
        return MorphomeError(
            f"{self.url}/{endpoint}: {why}",
            "run the step again; the GDC may be putting a new release in place",
        )
