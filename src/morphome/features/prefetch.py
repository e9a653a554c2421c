"""Fetch weights once, before a run: parallel tasks that fetch for themselves race, and nodes often have no network.

Files come into a hidden folder beside the target, so that an interrupted fetch goes on where it stopped; the folder
gets its name when everything is there and its checksums are right.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from morphome.errors import MorphomeError
from morphome.features.registry import EncoderSpec, encoder_spec
from morphome.features.weights import (
    RECORD_FORMAT,
    RECORD_NAME,
    check_checksums,
    checksum,
    find_files,
    remember,
    weights_folder,
    weights_id,
)
from morphome.files import write_json


def prefetch(key: str, *, revision: str = "", say: Callable[[str], None] = print) -> Path:
    """Fetch the weights of an encoder into its folder.

    Args:
        key: of the registry; a variant changes nothing.
        revision: commit, tag or branch of a hub repository instead of the registry's.
        say: gets one line of progress at a time.

    Returns:
        The folder, with ``weights.json``: source, resolved revision, and bytes and sha256 of every file.

    Raises:
        MorphomeError: nothing to fetch, no network, no access, no such revision, too little disk space, or other
            checksums than the registry's.
    """
    spec = encoder_spec(key)
    if not spec.has_weights:
        say(f"{spec.key}: has no weights, nothing to fetch")
        return weights_folder(spec.key)
    folder = weights_folder(spec.key)
    if _is_here(spec, folder, revision, say):  # also where the folder may only be read
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Two runs that begin together on a fresh machine: the second waits, and finds the weights there.
    with FileLock(folder.parent / f".{folder.name}.lock"):
        return _prefetch(spec, folder, revision, say)


def _prefetch(spec: EncoderSpec, folder: Path, revision: str, say: Callable[[str], None]) -> Path:
    if not spec.source:
        raise MorphomeError(
            f"encoder '{spec.key}': its weights have no public address that morphome knows",
            f"fetch {spec.files[0]} from {spec.licence_url or 'its authors'} and put it into {folder}",
        )
    if _is_here(spec, folder, revision, say):
        return folder
    part = folder.parent / f".{folder.name}.part"
    part.mkdir(parents=True, exist_ok=True)
    if spec.source.startswith("hf:"):
        resolved, names = _fetch_hub(spec, revision or spec.revision, part, say)
    else:
        resolved, names = "", [_fetch_url(spec, part, say)]
    _finish(spec, part, folder, resolved, names)
    say(f"{spec.key}: in {folder}" + (f", revision {resolved}" if resolved else ""))
    return folder


def _is_here(spec: EncoderSpec, folder: Path, revision: str, say: Callable[[str], None]) -> bool:
    """Whether the weights were fetched before; another revision is always fetched."""
    if revision or not find_files(spec, folder) or not (folder / RECORD_NAME).exists():
        return False
    check_checksums(spec, find_files(spec, folder), allow_unpinned=True)
    say(f"{spec.key}: already in {folder}, checksums right")
    return True


def run_weights(*, settings: Mapping[str, Any], features: Mapping[str, Any], out: Path) -> None:
    """Fetch the weights of a run's encoder unless they are there, and write what was found.

    Args:
        settings: ``features.encoder``.
        features: the whole section of the configuration.
        out: ``morphome.weights``: encoder and sha256 of the weights.

    Raises:
        MorphomeError: as :func:`prefetch`, or weights of another checksum.
    """
    spec = encoder_spec(features["encoder"])
    if not find_files(spec, weights_folder(spec.key)):
        prefetch(spec.key)
    write_json({"key": spec.key, "sha256": weights_id(features)}, out, RECORD_FORMAT, settings)


def _finish(spec: EncoderSpec, part: Path, folder: Path, resolved: str, names: list[str]) -> None:
    """Check what was fetched, write the record, and give the folder its name."""
    shutil.rmtree(part / ".cache", ignore_errors=True)  # the hub client's notes on unfinished files
    for file in part.rglob("*"):  # what an interrupted fetch of another revision left would be taken for weights
        if file.is_file() and file.relative_to(part).as_posix() not in names:
            file.unlink()
    try:
        check_checksums(spec, [part / name for name in names], allow_unpinned=True)
    except MorphomeError:
        for name in names:  # or the next fetch would go on with what is wrong
            (part / name).unlink()
        raise
    files = {n: {"bytes": (part / n).stat().st_size, "sha256": checksum(part / n)} for n in sorted(names)}
    facts = {"key": spec.key, "source": spec.source, "revision": resolved, "files": files}
    write_json(facts, part / RECORD_NAME, RECORD_FORMAT, {"key": spec.key})
    old = folder.parent / f".{folder.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    for name, found in files.items():
        remember(folder / name, "sha256", found["sha256"])
    shutil.rmtree(old, ignore_errors=True)


def _fetch_hub(spec: EncoderSpec, revision: str, part: Path, say: Callable[[str], None]) -> tuple[str, list[str]]:
    """Files of a hub repository into ``part``: the commit that was resolved, and their names, weights first."""
    import huggingface_hub
    from huggingface_hub import errors

    repository = spec.source.removeprefix("hf:")
    # Read now and not when the client is imported, so that a mirror can be set at any time.
    endpoint = os.environ.get("HF_ENDPOINT") or None
    where = f"{endpoint or 'https://huggingface.co'}/{repository}"
    try:
        api = huggingface_hub.HfApi(endpoint=endpoint, library_name="morphome")
        info = api.model_info(repository, revision=revision or None, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        names = _choose(spec, sorted(sizes))
        if not names:
            raise MorphomeError(
                f"{where} (revision {revision or 'newest'}) holds none of {', '.join(spec.files)}",
                "choose another --revision, or fetch the file by hand and set features.weights",
            )
        _require_space(part, sum(sizes[name] for name in names), spec)
        for name in names:
            say(f"{spec.key}: {name} ({sizes[name] / 1e6:.0f} MB) from {where} at {info.sha}")
            huggingface_hub.hf_hub_download(repository, name, revision=info.sha, local_dir=part, endpoint=endpoint)
    except errors.GatedRepoError:
        raise _no_access(spec, where) from None
    except errors.RevisionNotFoundError:
        raise MorphomeError(
            f"{where} has no revision '{revision}'", "give a commit, tag or branch that it has"
        ) from None
    except errors.RepositoryNotFoundError:
        # The hub answers so to strangers for private and gated repositories too.
        raise _no_access(spec, where) from None
    except (OSError, errors.EntryNotFoundError, errors.HTTPError) as error:
        # No connection, offline mode, a full disk, or an answer that the hub should not give.
        raise _no_network(spec, where, error) from None
    return str(info.sha), names


def _choose(spec: EncoderSpec, names: list[str]) -> list[str]:
    """What to fetch of a repository: the first alternative of the weights that is there, and all other files."""
    for pattern in spec.files:
        if weights := fnmatch.filter(names, pattern):
            extra = {name for pattern in spec.extra_files for name in fnmatch.filter(names, pattern)}
            return [*weights, *sorted(extra - set(weights))]
    return []


def _fetch_url(spec: EncoderSpec, part: Path, say: Callable[[str], None]) -> str:
    """The file at an address into ``part``; goes on where an earlier attempt stopped."""
    from morphome.download.remote import RemoteFile
    from morphome.download.transfer import fetch_file, make_client

    target = part / spec.files[0]
    known = {"sha256": "".join(spec.weights_sha256[:1]), "md5": "".join(spec.weights_md5[:1])}
    say(f"{spec.key}: {target.name} from {spec.source}")
    try:
        with make_client(connections=1) as client:
            fetch_file(RemoteFile(spec.source, target, None, **known, label=target.name), client, attempts=4, say=say)
    except MorphomeError as error:
        raise _no_network(spec, spec.source, error.problem) from None
    return target.name


def _require_space(folder: Path, n_bytes: int, spec: EncoderSpec) -> None:
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise MorphomeError(
            f"{folder}: {free / 1e9:.1f} GB free, but the weights of '{spec.key}' take {n_bytes / 1e9:.1f} GB",
            "make room, or set MORPHOME_WEIGHTS to a folder on another disk",
        )


def _no_access(spec: EncoderSpec, where: str) -> MorphomeError:
    return MorphomeError(
        f"encoder '{spec.key}': {where} does not let you in"
        + (" (its publisher asks for an account that accepted the licence)" if spec.gated else ""),
        f"open {spec.licence_url or where}, accept the licence ({spec.licence}), then set HF_TOKEN or run: "
        "hf auth login",
    )


def _no_network(spec: EncoderSpec, where: str, error: object) -> MorphomeError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return MorphomeError(
        f"encoder '{spec.key}': cannot fetch from {where}: {first}",
        f"run prefetch where there is a network and copy {weights_folder(spec.key)} here (licence: {spec.licence}, "
        f"{spec.licence_url or where}); unset HF_HUB_OFFLINE if it is set",
    )
