"""A small GDC on 127.0.0.1 for tests: status, files, cases, history, versions and data, with faults on order.

The shapes are those of the GDC's API guide. Records are made by the builders below; a record without contents of its
own is served as made-up bytes that agree with its size and md5, so that a test needs no files at all::

    with GdcServer([slide_record("TCGA-AA-0001")], [case_record("TCGA-AA-0001")]) as gdc:
        httpx.get(f"{gdc.url}/status")

Faults are keyed by file id, or by path ("/files", "/status", "/cases", "/history", a path of ``plain``) and are used
up in order; a list that ends with "always" repeats its last fault:

=============== ======================================================================================
"429"           too many requests, with ``Retry-After: 0``; "500", "503", "403", "404" likewise
"slow", "slow:S" stalls between chunks (S seconds each, else 0.05)
"hang:S"        says nothing for S seconds, then answers
"cut:K"         announces the whole body, closes the connection after K bytes of it
"corrupt"       one byte in the middle of what is sent is flipped
"short", "long" announces and sends half the bytes, or 1,000 bytes more
"wrongmd5"      the header Content-Md5 is wrong
"norange"       ignores Range: 200 and the whole body
"badrange"      206 and the body from another place, as its Content-Range says
"html"          200 and an HTML page; "badjson": 200 and half a JSON object
"redirect:/p"   302 to the path /p
"ok"            no fault
=============== ======================================================================================
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

CHUNK = 64 * 1024
_MESSAGES = {
    403: "You don't have access to the data: Please specify a X-Auth-Token",
    404: "not found",
    429: "Too Many Requests",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
_PAGE = b"<!DOCTYPE html><html><head><title>Log in</title></head><body>Please log in to the network</body></html>\n"
#: Fields that the API no longer knows: asking for one is answered with a warning, and without the field.
REMOVED_FIELDS = ("demographic.gender", "cases.demographic.gender")


class GdcServer:
    """The stand-in, as a context manager; ``url`` is its base.

    Args:
        files: records of ``/files`` (see the builders); one with ``superseded_by`` is no longer found by a search,
            but known to ``/files/versions`` and ``/data``.
        cases: records of ``/cases``.
        contents: file id to body; files without an entry are served as :func:`made_up_body`.
        faults: see the module.
        max_page: most hits of one answer, whatever was asked for.
        release: of ``/status``.
        history: file id to the array of ``/history/<id>``; without an entry one version is derived from the record.
        plain: path to body, for files outside the API.

    Attributes:
        log: (method, path, Range header) of every request, in order.
        bodies: (path, JSON) of every search, in order.
    """

    def __init__(
        self,
        files: Sequence[dict],
        cases: Sequence[dict] = (),
        contents: Mapping[str, bytes | Path] | None = None,
        *,
        faults: Mapping[str, Sequence[str]] | None = None,
        max_page: int | None = None,
        release: str = "45.0",
        history: Mapping[str, list[dict]] | None = None,
        plain: Mapping[str, bytes] | None = None,
    ) -> None:
        self.files, self.cases = list(files), list(cases)
        self.contents, self.plain = dict(contents or {}), dict(plain or {})
        self.faults = {key: list(value) for key, value in (faults or {}).items()}
        self.max_page, self.release, self.history = max_page, release, dict(history or {})
        self.log: list[tuple[str, str, str | None]] = []
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.lock, self.over = threading.Lock(), threading.Event()
        handler = type("Handler", (_Handler,), {"gdc": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> GdcServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def next_fault(self, *keys: str) -> str:
        """The next fault of the first key that has any, used up unless "always" follows it."""
        with self.lock:
            for key in keys:
                queue = self.faults.get(key)
                if queue and queue != ["always"]:
                    return queue[0] if queue[1:] == ["always"] else queue.pop(0)
        return "ok"

    def ranges(self, file_id: str) -> list[str | None]:
        """The Range headers of all requests for a file, in order."""
        return [asked for _, path, asked in self.log if path == f"/data/{file_id}"]

    def record(self, file_id: str) -> dict | None:
        """The record of a file id."""
        return next((record for record in self.files if record["file_id"] == file_id), None)

    def body(self, file_id: str) -> bytes | Path | None:
        """What is served for a file id."""
        if file_id in self.contents:
            return self.contents[file_id]
        record = self.record(file_id)
        return made_up_body(file_id, record["file_size"]) if record else None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """A client that goes away is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    gdc: GdcServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.send_response(405)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        gdc, asked = self.gdc, urlparse(self.path)
        path = re.sub(r"^/v0(?=/)", "", asked.path)
        args: dict[str, Any] = {key: value[0] for key, value in parse_qs(asked.query).items()}
        if length := int(self.headers.get("Content-Length") or 0):
            args.update(json.loads(self.rfile.read(length)))
        with gdc.lock:
            gdc.log.append((self.command, path, self.headers.get("Range")))
            if path in ("/files", "/cases"):
                gdc.bodies.append((path, args))
        parts = path.strip("/").split("/")
        fault = gdc.next_fault(parts[-1], path, f"/{parts[0]}")
        if fault.startswith("hang:"):
            gdc.over.wait(float(fault[5:]))
            fault = "ok"
        if fault.isdigit():
            return self._json({"message": _MESSAGES.get(int(fault), "fault")}, int(fault))
        if fault.startswith("redirect:"):
            self.send_response(302)
            self.send_header("Location", fault[9:])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if fault == "html":
            return self._send(_PAGE, "text/html; charset=utf-8")
        if fault == "badjson":
            return self._send(b'{"data": {"hits": [', "application/json")
        if path in gdc.plain:
            return self._file(gdc.plain[path], path.rsplit("/", 1)[-1], fault)
        if path == "/status":
            text = f"Data Release {gdc.release} - December 04, 2025"
            status = {"commit": "0" * 40, "data_release": text, "status": "OK", "tag": "8.5.0", "version": 1}
            return self._json(status, fault=fault)
        if path in ("/files", "/cases"):
            return self._search(path[1:], args, fault)
        if parts[0] == "history" and len(parts) == 2:
            return self._history(parts[1], fault)
        if path.startswith("/files/versions"):
            ids = args.get("ids") or (parts[2].split(",") if len(parts) > 2 else [])
            known = [gdc.record(file_id) for file_id in ids]
            return self._json([_version(record, gdc.record) for record in known if record], fault=fault)
        if parts[0] == "files" and len(parts) == 2 and (record := gdc.record(parts[1])):
            return self._json({"data": record, "warnings": {}}, fault=fault)
        if parts[0] == "data" and len(parts) == 2:
            record, body = gdc.record(parts[1]), gdc.body(parts[1])
            if body is None:
                return self._json({"message": f"{parts[1]} not found"}, 404)
            if record and record.get("access") == "controlled":
                return self._json({"message": _MESSAGES[403]}, 403)
            return self._file(body, record["file_name"] if record else parts[1], fault)
        return self._json({"message": "The requested URL was not found on the server."}, 404)

    def _search(self, root: str, args: dict[str, Any], fault: str) -> None:
        gdc, filters = self.gdc, args.get("filters")
        filters = json.loads(filters) if isinstance(filters, str) and filters else filters
        records = gdc.files if root == "files" else gdc.cases
        hits = [r for r in records if "superseded_by" not in r and (not filters or _match(r, filters, root))]
        if sort := args.get("sort"):
            key, _, order = sort.partition(":")
            hits.sort(key=lambda record: str(next(iter(_values(record, key)), "")), reverse=order == "desc")
        size, start = int(args.get("size", 10)), int(args.get("from", 0))
        size = min(size, gdc.max_page or size)
        page = hits[start : start + size]
        warnings = {}
        if fields := [name for name in args.get("fields", "").split(",") if name]:
            if lost := sorted(set(fields) & set(REMOVED_FIELDS)):
                warnings = {"fields": f"unrecognized values: [{', '.join(lost)}]"}
            page = [_pick(record, [name for name in fields if name not in lost]) for record in page]
        pagination = {
            **{"count": len(page), "total": len(hits), "size": size, "from": start, "sort": args.get("sort", "")},
            **{"page": start // size + 1 if size else 0, "pages": -(-len(hits) // size) if size else 0},
        }
        self._json({"data": {"hits": page, "pagination": pagination}, "warnings": warnings}, fault=fault)

    def _history(self, file_id: str, fault: str) -> None:
        record = self.gdc.record(file_id)
        found = self.gdc.history.get(file_id)
        if found is None and record is None:
            return self._json({"message": f"{file_id} not found"}, 404)
        if found is None:
            first = re.match(r"[\d.]+", record.get("data_release") or "12.0")
            entry = {"uuid": file_id, "version": "1", "file_change": "released", "release_date": "2018-06-13"}
            found = [{**entry, "data_release": first[0] if first else "12.0"}]
        return self._json(found, fault=fault)

    def _json(self, content: Any, code: int = 200, fault: str = "ok") -> None:
        headers = {"Retry-After": "0"} if code == 429 else {}
        self._send(json.dumps(content).encode(), "application/json", code, headers, fault)

    def _file(self, body: bytes | Path, name: str, fault: str) -> None:
        """A file, or the part of it that is asked for."""
        size = body.stat().st_size if isinstance(body, Path) else len(body)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, stop, code = 0, size, 200
        if asked and fault != "norange":
            start, stop, code = int(asked[1]), min(int(asked[2] or size) + bool(asked[2]), size), 206
            if start >= size:
                headers = {"Content-Range": f"bytes */{size}"}
                return self._send(b"", "application/octet-stream", 416, headers)
        if fault == "badrange":
            start, code = start // 2 if start > 1 else min(1, size), 206
        headers = {"Content-Disposition": f"attachment; filename={name}", "Content-Md5": _md5(body)}
        if fault == "wrongmd5":
            headers["Content-Md5"] = "0" * 32
        if fault == "short":
            stop = start + (stop - start) // 2
        extra = 1000 if fault == "long" else 0
        if code == 206:
            total = stop if fault == "short" else size + extra
            headers["Content-Range"] = f"bytes {start}-{stop + extra - 1}/{total}"
        return self._stream(_pieces(body, start, stop), stop - start, "application/octet-stream", code, headers, fault)

    def _send(
        self, body: bytes, kind: str, code: int = 200, headers: Mapping[str, str] | None = None, fault: str = "ok"
    ) -> None:
        body = body[: len(body) // 2] if fault == "short" else body
        self._stream(_pieces(body, 0, len(body)), len(body), kind, code, headers or {}, fault)

    def _stream(
        self, pieces: Iterable[bytes], size: int, kind: str, code: int, headers: Mapping[str, str], fault: str
    ) -> None:
        extra = 1000 if fault == "long" else 0
        self.send_response(code)
        for key, value in {"Content-Type": kind, "Content-Length": str(size + extra), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        left = int(fault[4:]) if fault.startswith("cut:") else size
        wrong = size // 2 if fault == "corrupt" and size else -1
        stall = float(fault[5:] or 0.05) if re.match(r"slow(:|$)", fault) else 0.0
        sent = 0
        with contextlib.suppress(ConnectionError):  # the client may have gone
            for piece in pieces:
                if sent <= wrong < sent + len(piece):
                    at = wrong - sent
                    piece = piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
                for part in _cut(piece[:left], max(1, size // 8) if stall else CHUNK):
                    self.wfile.write(part)
                    if stall and self.gdc.over.wait(stall):
                        left = 0
                        break
                sent, left = sent + len(piece), max(0, left - len(piece))
                if not left:
                    break
            if extra:
                self.wfile.write(b"x" * extra)
            self.wfile.flush()
        if fault.startswith("cut:"):
            self.close_connection = True


def _cut(piece: bytes, length: int) -> Iterator[bytes]:
    for start in range(0, len(piece), length):
        yield piece[start : start + length]


def _pieces(body: bytes | Path, start: int, stop: int) -> Iterator[bytes]:
    if not isinstance(body, Path):
        yield from _cut(body[start:stop], CHUNK)
        return
    with body.open("rb") as handle:
        handle.seek(start)
        while start < stop and (piece := handle.read(min(CHUNK, stop - start))):
            start += len(piece)
            yield piece


def _md5(body: bytes | Path) -> str:
    digest = hashlib.md5()
    size = body.stat().st_size if isinstance(body, Path) else len(body)
    for piece in _pieces(body, 0, size):
        digest.update(piece)
    return digest.hexdigest()


def _values(record: Any, path: str) -> list[Any]:
    """All values at a dotted path, through lists."""
    found = [record]
    for key in path.split("."):
        level = [item for value in found for item in (value if isinstance(value, list) else [value])]
        found = [item[key] for item in level if isinstance(item, dict) and key in item]
    return [item for value in found for item in (value if isinstance(value, list) else [value])]


def _match(record: dict, filters: dict, root: str) -> bool:
    operator, content = filters["op"].lower(), filters["content"]
    if operator == "and":
        return all(_match(record, one, root) for one in content)
    if operator == "or":
        return any(_match(record, one, root) for one in content)
    have = {str(value) for value in _values(record, content["field"].removeprefix(f"{root}."))}
    want = content["value"] if isinstance(content["value"], list) else [content["value"]]
    same = bool(have & {str(value) for value in want})
    if operator in ("=", "in"):
        return same
    if operator in ("!=", "exclude"):
        return not same
    raise AssertionError(f"the test server does not know the operator {operator}")


def _pick(record: dict, fields: Sequence[str]) -> dict:
    """The dotted fields of a record; the GDC always adds ``id``."""
    found: dict[str, Any] = {"id": record["id"]}
    for field in fields:
        _put(record, found, field.split("."))
    return found


def _put(source: Any, target: dict, keys: list[str]) -> None:
    if not isinstance(source, dict) or keys[0] not in source:
        return
    value = source[keys[0]]
    if len(keys) == 1:
        target[keys[0]] = value
    elif isinstance(value, list):
        below = target.setdefault(keys[0], [{} for _ in value])
        for item, copy in zip(value, below, strict=True):
            _put(item, copy, keys[1:])
    else:
        _put(value, target.setdefault(keys[0], {}), keys[1:])


def _version(record: dict, find: Any) -> dict:
    """An entry of ``/files/versions``."""
    latest = find(record["superseded_by"]) if "superseded_by" in record else record
    release = re.findall(r"\d+\.\d+", record["data_release"])
    own = {"id": record["file_id"], "filename": record["file_name"], "version": record["version"]}
    own |= {"md5": record["md5sum"], "size": record["file_size"], "state": "validated", "release": release[0]}
    newest = {"latest_id": latest["file_id"], "latest_filename": latest["file_name"], "latest_md5": latest["md5sum"]}
    newest |= {"latest_version": latest["version"], "latest_size": latest["file_size"], "latest_state": "validated"}
    return {**own, **newest, "latest_release": re.findall(r"\d+\.\d+", latest["data_release"])[-1:]}


# -- builders ---------------------------------------------------------------------------------------------------
def made_up_uuid(*words: object) -> str:
    """A UUID that depends on the words only."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(map(str, words))))


def made_up_body(file_id: str, size: int) -> bytes:
    """``size`` bytes that depend on the id only and do not repeat within 64 KiB."""
    block = b"".join(hashlib.sha256(f"{file_id}:{n}".encode()).digest() for n in range(min(2048, size // 32 + 1)))
    return (block * (size // len(block) + 1))[:size]


def sample(barcode: str, tissue: str = "Tumor", descriptor: str = "Primary", **more: Any) -> dict:
    """A sample of a case in the fields since 2023 (``tissue_type``, ``tumor_descriptor`` ...)."""
    kind = {"specimen_type": "Solid Tissue", "preservation_method": "FFPE" if barcode.endswith("Z") else "Frozen"}
    return {
        **{"sample_id": made_up_uuid("sample", barcode), "submitter_id": barcode, "tissue_type": tissue},
        **{"tumor_descriptor": descriptor, **kind, **more},
    }


def _record(
    case: str, file_name: str, what: dict, samples: Sequence[dict] | None, project: str, options: dict[str, Any]
) -> dict:
    """A record of ``/files``; ``options``: file_id, body, size and any top-level key to be set."""
    options = dict(options)
    file_id = options.pop("file_id", None) or made_up_uuid(case, file_name)
    size, body = options.pop("size", 1000), options.pop("body", None)
    if body is None:
        body = made_up_body(file_id, size)
    size = body.stat().st_size if isinstance(body, Path) else len(body)
    owner: dict[str, Any] = {"case_id": made_up_uuid("case", case), "submitter_id": case}
    owner["project"] = {"project_id": project}
    if samples is not None:
        owner["samples"] = list(samples)
    return {
        **{"id": file_id, "file_id": file_id, "file_name": file_name, "file_size": size, "md5sum": _md5(body)},
        **{"state": "released", "access": "open", "version": "1", "data_release": "12.0 - 45.0", **what},
        **{"cases": [owner], **options},
    }


def slide_record(
    case: str = "TCGA-AA-0001",
    number: int = 1,
    *,
    project: str = "TCGA-COAD",
    code: str = "01",
    frozen: bool = False,
    on_portion: bool = False,
    **more: Any,
) -> dict:
    """A slide; ``on_portion``: one of those whose record has no path to a sample.

    Args:
        more: ``body`` (bytes or path) or ``size``, ``file_id``, ``file_name``, or any other key of the record.
    """
    name = f"{case}-{code}A-01-TS{number}" if frozen else f"{case}-{code}Z-00-DX{number}"
    tail = made_up_uuid("slide", name).upper()
    file_name = more.pop("file_name", f"{name}.{tail}.svs")
    what = {
        "data_type": "Slide Image",
        "data_category": "Biospecimen",
        "data_format": "SVS",
        "experimental_strategy": "Tissue Slide" if frozen else "Diagnostic Slide",
        "associated_entities": [{"entity_submitter_id": name, "entity_type": "slide"}],
    }
    descriptor = {"01": "Primary", "02": "Recurrence", "06": "Metastatic"}.get(code, "Not Applicable")
    own = sample(f"{case}-{code}{'A' if frozen else 'Z'}", "Normal" if code == "11" else "Tumor", descriptor)
    return _record(case, file_name, what, None if on_portion else [own], project, more)


def rna_record(
    case: str = "TCGA-AA-0001", *, project: str = "TCGA-COAD", barcode: str | None = None, **more: Any
) -> dict:
    """STAR counts of one sample (``barcode``: of the sample, else ``<case>-01A``)."""
    barcode = barcode or f"{case}-01A"
    default = f"{made_up_uuid('rna', barcode)}.rna_seq.augmented_star_gene_counts.tsv"
    file_name = more.pop("file_name", default)
    what = {
        "data_type": "Gene Expression Quantification",
        "data_category": "Transcriptome Profiling",
        "data_format": "TSV",
        "experimental_strategy": "RNA-Seq",
        "analysis": {"workflow_type": "STAR - Counts"},
        "associated_entities": [{"entity_submitter_id": f"{barcode}-11R-A000-07", "entity_type": "aliquot"}],
    }
    normal = barcode.rsplit("-", 1)[-1].startswith("11")
    own = sample(barcode, *(("Normal", "Not Applicable") if normal else ("Tumor", "Primary")))
    return _record(case, file_name, what, [own], project, more)


def _pair(case: str) -> list[dict]:
    """Tumour and blood: both belong to a file that compares them."""
    blood = sample(f"{case}-10A", "Normal", "Not Applicable", specimen_type="Peripheral Blood NOS")
    return [sample(f"{case}-01A"), blood]


def maf_record(case: str = "TCGA-AA-0001", *, project: str = "TCGA-COAD", **more: Any) -> dict:
    """A masked MAF; its samples are the tumour and the normal one."""
    file_name = more.pop("file_name", f"{made_up_uuid('maf', case)}.wxs.aliquot_ensemble_masked.maf.gz")
    what = {
        "data_type": "Masked Somatic Mutation",
        "data_category": "Simple Nucleotide Variation",
        "data_format": "MAF",
        "experimental_strategy": "WXS",
        "analysis": {"workflow_type": "Aliquot Ensemble Somatic Variant Merging and Masking"},
    }
    return _record(case, file_name, what, _pair(case), project, more)


def cnv_record(
    case: str = "TCGA-AA-0001", *, project: str = "TCGA-COAD", workflow: str = "ASCAT3", **more: Any
) -> dict:
    """Gene-level copy numbers of one workflow."""
    word = workflow.lower().replace(" ", "_")
    tail = f"{word}.gene_level_copy_number.v36.tsv"
    file_name = more.pop("file_name", f"{project}.{made_up_uuid('cnv', case, workflow)}.{tail}")
    what = {
        "data_type": "Gene Level Copy Number",
        "data_category": "Copy Number Variation",
        "data_format": "TSV",
        "experimental_strategy": "Genotyping Array",
        "analysis": {"workflow_type": workflow},
    }
    return _record(case, file_name, what, _pair(case), project, more)


def case_record(
    case: str = "TCGA-AA-0001",
    *,
    project: str = "TCGA-COAD",
    vital_status: str = "Alive",
    days_to_death: int | None = None,
    days_to_last_follow_up: int | None = 500,
    age_days: int | None = 22_000,
    sex: str = "female",
    stage: str | None = "Stage II",
    grade: str | None = None,
    site_name: str = "Greenfield Hospital",
    follow_ups: Sequence[int] = (),
    diagnoses: Sequence[dict] | None = None,
    **more: Any,
) -> dict:
    """A case with its demographic data, diagnoses and follow-ups.

    Args:
        follow_ups: days to each follow-up.
        diagnoses: instead of the one diagnosis that the other arguments make.
        more: any further key of the record.
    """
    demographic: dict[str, Any] = {"vital_status": vital_status, "sex_at_birth": sex}
    if days_to_death is not None:
        demographic["days_to_death"] = days_to_death
    if diagnoses is None:
        own = {
            "age_at_diagnosis": age_days,
            "days_to_last_follow_up": None if vital_status == "Dead" else days_to_last_follow_up,
            "ajcc_pathologic_stage": stage,
            "tumor_grade": grade,
            "primary_diagnosis": "Adenocarcinoma, NOS",
            "diagnosis_is_primary_disease": True,
        }
        diagnoses = [{key: value for key, value in own.items() if value is not None}]
    case_id = made_up_uuid("case", case)
    visits = [
        {"follow_up_id": made_up_uuid(case, "visit", n), "days_to_follow_up": d} for n, d in enumerate(follow_ups)
    ]
    return {
        **{"id": case_id, "case_id": case_id, "submitter_id": case, "project": {"project_id": project}},
        "tissue_source_site": {"code": case[5:7], "name": site_name},
        "demographic": demographic,
        "diagnoses": [{"diagnosis_id": made_up_uuid(case, "diagnosis", n), **d} for n, d in enumerate(diagnoses)],
        **({"follow_ups": visits} if visits else {}),
        **more,
    }
