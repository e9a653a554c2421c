"""Weights of encoders: where they lie, what they are (a checksum), and whether they may be used.

A vector is only worth keeping if the weights that made it are known. A checksum that contradicts the registry is
always refused; where the registry knows none, ``features.allow_unpinned`` must be set, and the checksum still goes
into the fingerprint. Checksums are kept beside the weights (by path, size and time of change), since the workflow asks
for them while it builds its graph. Standard library only.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morphome.errors import MorphomeError
from morphome.features.registry import EncoderSpec, encoder_spec
from morphome.files import write_text

#: Overrides the folder of all weights.
WEIGHTS_VARIABLE = "MORPHOME_WEIGHTS"
#: What prefetch writes beside the weights of an encoder: where they came from and their checksums.
RECORD_NAME = "weights.json"
RECORD_FORMAT = "morphome.weights"
_SIDECAR = "checksums.json"
#: Weights that nobody published: numbers drawn from a fixed seed, whose recipe is their identity.
RANDOM_RECIPE = "numpy PCG64 seed 0, normal * 0.02, norms 1, biases 0, in the order of the names"


def weights_root() -> Path:
    """``$MORPHOME_WEIGHTS``, or ``~/.cache/morphome/encoders``."""
    root = os.environ.get(WEIGHTS_VARIABLE)
    return Path(root).expanduser() if root else Path.home() / ".cache" / "morphome" / "encoders"


def weights_folder(key: str) -> Path:
    """Where the weights of an encoder lie when ``features.weights`` does not say; ``key`` without a variant."""
    return weights_root() / key.partition(":")[0]


def weights_path(features: Mapping[str, Any]) -> Path:
    """What :func:`morphome.features.build.build_model` takes: a file, or a folder for a model of several files.

    Args:
        features: section of the configuration; ``encoder`` and ``weights`` count.

    Raises:
        MorphomeError: the weights are absent, or the encoder has none.
    """
    spec = encoder_spec(features["encoder"])
    if not spec.has_weights:
        raise MorphomeError(f"features.encoder: '{spec.key}' has no weights", "do not ask for them")
    place, named = _place(spec, features)
    if place.is_file():
        if spec.extra_files:
            raise MorphomeError(
                f"features.weights: {place} is a file, but '{spec.key}' needs its folder "
                f"({', '.join((spec.files[0], *spec.extra_files))})",
                f"set features.weights: {place.parent}",
            )
        return place
    found = find_files(spec, place)
    if not found:
        raise _absent(spec, place, named)
    return place if spec.extra_files or len(found) > 1 else found[0]


def find_files(spec: EncoderSpec, folder: Path) -> list[Path]:
    """The files of an encoder in a folder: weights (the first alternative that is there), then the others.

    Empty when the weights are not there.
    """
    for pattern in spec.files:
        weights = sorted(path for path in folder.glob(pattern) if path.is_file())
        if weights:
            extra = {path for extra in spec.extra_files for path in folder.glob(extra) if path.is_file()}
            return [*weights, *sorted(extra - set(weights))]
    return []


def weights_id(features: Mapping[str, Any]) -> str:
    """sha256 of the weights: of the file, or of the sorted lines ``name:sha256`` of a model of several files.

    Empty for an encoder without weights.

    Args:
        features: section of the configuration; ``encoder``, ``weights`` and ``allow_unpinned`` count.

    Raises:
        MorphomeError: the weights are absent and not promised (:func:`promised_sha256`); their checksum is not one
            that the registry or the record of prefetch knows; or none is known and ``allow_unpinned`` is not set.
    """
    spec = encoder_spec(features["encoder"])
    if spec.loader == "random":
        return hashlib.sha256(RANDOM_RECIPE.encode()).hexdigest()
    if not spec.has_weights:
        return ""
    promised = promised_sha256(features)
    if promised and not find_files(spec, weights_folder(spec.key)):
        return promised  # the workflow fetches them, and takes no others
    path = weights_path(features)
    files = [path] if path.is_file() else find_files(spec, path)
    # A folder changes its time when a file in it is replaced, which catches a new record of prefetch.
    facts = tuple((str(file), *_size_and_time(file)) for file in (path.parent if path.is_file() else path, *files))
    return _identify(spec.key, facts, bool(features.get("allow_unpinned")))


def promised_sha256(features: Mapping[str, Any]) -> str | None:
    """sha256 of weights that can be fetched without asking anybody: one public file, one known checksum; else None.

    Args:
        features: section of the configuration; ``encoder`` and ``weights`` count.
    """
    spec = encoder_spec(features["encoder"])
    single = len(spec.files) == 1 and not spec.extra_files and len(spec.weights_sha256) == 1
    known = spec.has_weights and single and spec.source.startswith("https://")
    return spec.weights_sha256[0] if known and not features.get("weights") else None


@functools.cache
def _identify(key: str, facts: tuple[tuple[str, int, int], ...], allow_unpinned: bool) -> str:
    """Checked identity of a folder (first of ``facts``) and files; kept, as the graph of a run asks for it often."""
    files = [Path(path) for path, _, _ in facts[1:]]
    check_checksums(encoder_spec(key), files, allow_unpinned)
    if len(files) == 1:
        return checksum(files[0])
    lines = sorted(f"{file.name}:{checksum(file)}" for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_checksums(spec: EncoderSpec, files: list[Path], allow_unpinned: bool) -> None:
    """Refuse weights that are not those of the registry, or not those that were fetched.

    Args:
        files: as :func:`find_files` gives them; the first one is what the registry's checksums are of.

    Raises:
        MorphomeError: naming the file, what was found and what was expected.
    """
    for file in files:
        recorded = _recorded(file.parent).get(file.name)
        if recorded is not None and recorded != checksum(file):
            raise MorphomeError(
                f"{file}: its sha256 is {checksum(file)}, but {recorded} was fetched; the file is damaged or replaced",
                f"delete the folder {file.parent} and run: morphome encoders prefetch {spec.key}",
            )
    first = files[0]
    if not spec.pinned:
        if not allow_unpinned:
            raise MorphomeError(
                f"{first}: the registry knows no checksum of the weights of '{spec.key}' "
                f"(this file has sha256 {checksum(first)})",
                "compare it with what the publisher states, then set features.allow_unpinned: true",
            )
        return
    known = {"sha256": spec.weights_sha256, "md5": spec.weights_md5}
    for name, accepted in known.items():
        if accepted and (found := checksum(first, name)) not in accepted:
            raise MorphomeError(
                f"{first}: its {name} is {found}, but the weights of '{spec.key}' have {' or '.join(accepted)}",
                "fetch the file again, or choose the encoder whose weights these are (morphome encoders list)",
            )


def checksum(path: Path, name: str = "sha256") -> str:
    """Hex digest of a file, remembered in this process and in a file of the weights folder.

    A remembered digest counts only while size and time of change of the file are the same.

    Args:
        name: ``sha256`` or ``md5``.
    """
    # Absolute, not resolved: a link that points elsewhere tomorrow has another size or time of change.
    path = path.absolute()
    return _checksum(str(path), *_size_and_time(path), name)


def _size_and_time(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


@functools.cache
def _checksum(path: str, size: int, mtime_ns: int, name: str) -> str:
    entry = _read_object(weights_root() / _SIDECAR).get(path)
    fresh = isinstance(entry, dict) and entry.get("size") == size and entry.get("mtime_ns") == mtime_ns
    if fresh and isinstance(entry.get(name), str):
        return entry[name]
    with Path(path).open("rb") as handle:
        digest = hashlib.file_digest(handle, name).hexdigest()
    remember(Path(path), name, digest)
    return digest


def remember(path: Path, name: str, digest: str) -> None:
    """Keep a digest of a file as it is now; digests of files that are gone are forgotten."""
    path, sidecar = path.absolute(), weights_root() / _SIDECAR
    size, mtime_ns = _size_and_time(path)
    kept = {p: e for p, e in _read_object(sidecar).items() if isinstance(e, dict) and Path(p).exists()}
    entry = kept.get(str(path), {})
    if (entry.get("size"), entry.get("mtime_ns")) != (size, mtime_ns):
        entry = {"size": size, "mtime_ns": mtime_ns}
    # A folder that cannot be written to costs time, nothing else: the digest is taken again in the next process.
    with contextlib.suppress(OSError, MorphomeError):
        write_text(json.dumps({**kept, str(path): {**entry, name: digest}}, indent=1) + "\n", sidecar)


def _recorded(folder: Path) -> dict[str, str]:
    """sha256 by file name as prefetch recorded them; empty without a record."""
    files = _read_object(folder / RECORD_NAME).get("files", {})
    return {name: facts["sha256"] for name, facts in files.items()}


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object that may be absent; a damaged one counts as absent, as it can always be made again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _place(spec: EncoderSpec, features: Mapping[str, Any]) -> tuple[Path, bool]:
    """Where to look, and whether the configuration named it."""
    if features.get("weights"):
        return Path(features["weights"]).expanduser(), True
    return weights_folder(spec.key), False


def _absent(spec: EncoderSpec, place: Path, named: bool) -> MorphomeError:
    wanted = " or ".join(spec.files)
    where = f"features.weights: {place}" if named else str(place)
    if named and not place.exists():
        return MorphomeError(f"{where} does not exist ({wanted} for encoder '{spec.key}')", "correct the path")
    if named:
        return MorphomeError(f"{where} holds no {wanted} (encoder '{spec.key}')", "name the folder that does")
    if not spec.source:
        return MorphomeError(
            f"{where}: the weights of encoder '{spec.key}' are not there ({wanted})",
            f"they have no public address that morphome knows: fetch them from {spec.licence_url or 'their authors'} "
            "and set features.weights to the file",
        )
    return MorphomeError(
        f"{where}: the weights of encoder '{spec.key}' are not there ({wanted})",
        f"run: morphome encoders prefetch {spec.key}   (or set features.weights to a file or folder that you have)",
    )
