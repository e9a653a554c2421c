"""What a server says when it does not send what it was asked for."""

from __future__ import annotations

import contextlib
import email.utils
import json
import re
from datetime import UTC, datetime

import httpx

from morphome.download.remote import RemoteFile
from morphome.errors import MorphomeError

#: A server that asks for a longer pause (Retry-After) gets this one.
MOST_RETRY_AFTER_S = 120.0
_START_BYTES = 4096


def retry_after_s(answer: httpx.Response) -> float | None:
    """Pause that the server asks for, at most MOST_RETRY_AFTER_S; None when it names none that can be read."""
    text = answer.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        seconds = float(text)
    else:
        try:
            when = email.utils.parsedate_to_datetime(text)
        except ValueError:
            return None
        seconds = ((when if when.tzinfo else when.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), MOST_RETRY_AFTER_S)


def server_message(answer: httpx.Response) -> str:
    """What the server says in the body of an answer that is read as a stream; only its start is read."""
    body = b""
    for chunk in answer.iter_raw():
        body += chunk
        if len(body) > _START_BYTES:
            break
    return message_in(body, answer.reason_phrase)


def message_in(body: bytes, otherwise: str) -> str:
    """What the start of a body says: a JSON "message", or the text without markup; 200 letters.

    Args:
        otherwise: for a body without any text.
    """
    text = body[:_START_BYTES].decode("utf-8", "replace")
    with contextlib.suppress(ValueError):
        content = json.loads(text)
        text = str(content.get("message") or content) if isinstance(content, dict) else str(content)
    text = re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL | re.IGNORECASE)
    return " ".join(text.split())[:200] or otherwise or "(no text)"


def refused(file: RemoteFile, answer: httpx.Response) -> MorphomeError:
    remedy = {
        401: "only files that are open to everyone can be fetched; leave this one out",
        403: "only files that are open to everyone can be fetched; leave this one out (or your proxy refuses it)",
        404: "the file was withdrawn or replaced: delete gdc/manifest.tsv of the run, so that the GDC is asked again",
        410: "the file was withdrawn or replaced: delete gdc/manifest.tsv of the run, so that the GDC is asked again",
    }
    return MorphomeError(
        f"{file.name}: {file.url}: the server answers {answer.status_code}: {server_message(answer)}",
        remedy.get(answer.status_code, "open the address in a browser; correct it, or leave the file out"),
    )
