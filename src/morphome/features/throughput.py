"""Where the time of encoding went, summed over the slides of a cohort."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_SUMS = ("seconds_total", "seconds_load", "seconds_read", "seconds_wait", "seconds_encode")


def summarise(timings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Throughput of a cohort from its records ``morphome.timing``.

    Slides without tiles (failed, or empty) count as slides and give their time to the sums. Records of older
    versions lack some numbers; what cannot be told from the slides that have them is None, with the reason.

    Returns:
        ``n_slides``, ``n_slides_encoded``, ``n_tiles``; ``tiles_per_second`` (tiles over the elapsed time of their
        slides); ``hours_total``, ``hours_load`` and ``hours_encode`` (elapsed), ``hours_wait`` (the encoder waited
        for tiles) and ``hours_read`` (summed over reading threads); ``busy_fraction`` (encoder busy, of the elapsed
        time) and ``wait_fraction``; ``bound``, ``reader`` or ``encoder``, whichever is slower with the threads that
        were used; ``cores_per_encoder``, reading threads that would keep one encoder busy; ``n_bound``, ``readers``,
        ``devices``, ``runtimes``, ``encoders``: number of slides by value; ``slowest``, ``slide_id`` and
        ``tiles_per_second`` of the slowest slide; ``reason``, why a number is None, else empty.
    """
    encoded = [t for t in timings if t.get("n_tiles")]
    whole = [t for t in encoded if all(t.get(name) is not None for name in ("seconds_wait", "reading_threads"))]
    sums = {name: sum(t.get(name) or 0.0 for t in timings) for name in _SUMS}
    n_tiles = sum(t["n_tiles"] for t in encoded)
    elapsed = sum(t["seconds_total"] for t in encoded)
    reason = ""
    if not encoded:
        reason = "no slide has tiles"
    elif len(whole) < len(encoded):
        reason = f"{len(encoded) - len(whole)} of {len(encoded)} slides have records of an older version"
    rates = _rates(whole) if whole and not reason else dict.fromkeys(_RATES)
    return {
        "n_slides": len(timings),
        "n_slides_encoded": len(encoded),
        "n_tiles": n_tiles,
        "tiles_per_second": n_tiles / elapsed if elapsed else None,
        **{name.replace("seconds", "hours"): sums[name] / 3600 for name in _SUMS},
        **rates,
        "n_bound": _counts(encoded, "bound"),
        "readers": _counts(encoded, "reader"),
        "devices": _counts(encoded, "device"),
        "runtimes": _counts(encoded, "runtime"),
        "encoders": _counts(encoded, "encoder"),
        "slowest": _slowest(encoded),
        "reason": reason,
    }


_RATES = ("busy_fraction", "wait_fraction", "cores_per_encoder", "bound")


def _rates(timings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    read, encode = (sum(t[name] for t in timings) for name in ("seconds_read", "seconds_encode"))
    elapsed = sum(t["seconds_total"] for t in timings)
    read_elapsed = sum(t["seconds_read"] / t["reading_threads"] for t in timings)
    return {
        "busy_fraction": encode / elapsed if elapsed else None,
        "wait_fraction": sum(t["seconds_wait"] for t in timings) / elapsed if elapsed else None,
        "cores_per_encoder": read / encode if encode else None,
        "bound": "reader" if read_elapsed > encode else "encoder",
    }


def _counts(timings: Sequence[Mapping[str, Any]], name: str) -> dict[str, int]:
    found = Counter(str(t[name]) for t in timings if t.get(name))
    return dict(sorted(found.items()))


def _slowest(timings: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    timed = [t for t in timings if t.get("tiles_per_second")]
    if not timed:
        return None
    slow = min(timed, key=lambda t: (t["tiles_per_second"], t["slide_id"]))
    return {name: slow[name] for name in ("slide_id", "tiles_per_second")}
