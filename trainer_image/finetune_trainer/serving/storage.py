"""A version's files, from the storage of its FineTunedModel into the replica's own folder: whole and as they were published, or not at all.

The copy bears its digest as its name, so that a name stands for one content for ever: an engine keeps what it computed by path.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

from finetune_api.contract import SUMS, ModelStorage
from finetune_api.serving import OrderedModel
from finetune_api.versions import VersionPaths

from ..job.context import Context
from ..job.files import parse_digests
from ..models.versions import VERSION_FILES
from ..models.weights import ADAPTER, ADAPTER_CONFIG
from ..remote.storage import Storage, open_storage

_MOST_SUMS, _MOST_PROBES = 1 << 20, 16 << 20
_LOADED = ("*.json", "*.jinja", "*.model", "*.txt", ADAPTER)
"""Of an adapter's folder: what engines read. Merged weights and other forms beside it stay where they are."""
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Refused(Exception):
    """A version's files are not let in: file, tensor and fix, for people."""


def storage_of(context: Context, model: OrderedModel) -> Storage:
    """Where a model's versions are kept. Raises StageError where that is not mounted, or its keys are not."""
    kept = ModelStorage(storage=model.storage, s3_endpoint=model.s3_endpoint)
    return open_storage(kept, context.job.sources, context.job.secrets.get(f"model-{model.model}"))


def copy_name(model: OrderedModel) -> str:
    """Name of a version's folder here. Raises Refused for a digest that is none."""
    found = _DIGEST.fullmatch(model.digest)
    if found is None:
        raise Refused(f"digest {model.digest!r} is no sha256:...; the version's record names it")
    return found[1]


def fetch_version(storage: Storage, model: OrderedModel, to: Path) -> Path:
    """Copy what engines read of an adapter, unless it is here; its folder.

    Raises Refused where it is not what was ordered, StageError where the storage cannot be asked now.
    """
    folder = to / copy_name(model)
    if folder.is_dir():
        return folder
    place = VersionPaths.artifact(model.number)
    sums = read(storage, f"{place}/{SUMS}", _MOST_SUMS)
    if sums is None:
        raise Refused(f"{place}/{SUMS} is not there: the version was removed, or publishing it has not ended; order another one")
    listed = _listed(sums, model, f"{place}/{SUMS}")
    wanted = {name: digest for name, digest in listed.items() if _FILE.fullmatch(name) and any(fnmatch(name, kind) for kind in _LOADED)}
    if missing := {ADAPTER, ADAPTER_CONFIG} - set(wanted):
        raise Refused(f"{place} holds no {min(missing)}: it is no adapter; serve it as a whole model, or publish the adapter")
    partial = to / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, digest in sorted(wanted.items()):
            _copy(storage, f"{place}/{name}", partial / name, digest)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def fetch_whole(storage: Storage, model: OrderedModel, to: Path, *more: str) -> Path:
    """The folder of a whole model's files: on a volume its own, from a bucket a copy. `more`: patterns of files that it needs besides.

    Raises Refused where they are not what was published, StageError where the storage cannot be asked now.
    """
    patterns = (*VERSION_FILES, *more)
    place, below = VersionPaths.artifact(model.number), f"{model.folder}/" if model.folder else ""
    sums = read(storage, f"{place}/{SUMS}", _MOST_SUMS)
    if sums is None:
        raise Refused(f"{place}/{SUMS} is not there: the version was removed, or publishing it has not ended; name another one")
    listed = {
        name.removeprefix(below): digest for name, digest in _listed(sums, model, f"{place}/{SUMS}").items() if name.startswith(below)
    }
    copy = to / f"{copy_name(model)}{'-' + model.folder if model.folder else ''}"
    folder = storage.fetch(f"{place}/{below}".rstrip("/"), copy, patterns)
    wanted = {name: digest for name, digest in listed.items() if _FILE.fullmatch(name) and any(fnmatch(name, kind) for kind in patterns)}
    if "config.json" not in wanted:
        raise Refused(f"{place}/{below} holds no config.json: it is no whole model; publish one with output.merged or tuning.method full")
    try:
        if added := sorted(name for name in _files(folder) - {*listed, SUMS} if not name.startswith(".")):  # an engine might read it
            raise Refused(
                f"{place}/{below}{added[0]} is not listed in {SUMS}: it came there later; remove it, or publish the version again"
            )
        _check_files(folder, wanted, f"{place}/{below}")
    except Refused:
        shutil.rmtree(copy, ignore_errors=True)  # a later try reads it anew
        raise
    return folder


def _files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.is_file()} if folder.is_dir() else set()


def _check_files(folder: Path, wanted: dict[str, str], place: str) -> None:
    if missing := sorted(set(wanted) - _files(folder)):
        raise Refused(f"{place}{missing[0]} is not there, though {SUMS} lists it: publish the version again")
    for name, digest in sorted(wanted.items()):
        with (folder / name).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                size = (folder / name).stat().st_size
                raise Refused(f"{place}{name} ({size} bytes) is not what {SUMS} says: it is damaged or cut off; publish the version again")


def read(storage: Storage, name: str, most: int = _MOST_PROBES) -> bytes | None:
    """A small file, or None where there is none. Raises Refused for one that is too large, StageError as `chunks` does."""
    content = b""
    try:
        for chunk in storage.chunks(name):
            content += chunk
            if len(content) > most:
                raise Refused(f"{name} has more than {most >> 20} MiB, which none that was published has")
    except FileNotFoundError:
        return None
    return content


def _listed(sums: bytes, model: OrderedModel, name: str) -> dict[str, str]:
    found = hashlib.sha256(sums).hexdigest()
    if found != copy_name(model):
        raise Refused(f"{name} is sha256:{found}, not {model.digest} as published: its files were changed; publish the version again")
    return parse_digests(sums.decode(errors="replace"))


def _copy(storage: Storage, name: str, to: Path, digest: str) -> None:
    written = hashlib.sha256()
    with to.open("wb") as sink:
        try:
            for chunk in storage.chunks(name):
                written.update(chunk)
                sink.write(chunk)
        except FileNotFoundError:
            raise Refused(f"{name} is not there, though {SUMS} lists it: publish the version again") from None
    if written.hexdigest() != digest:
        raise Refused(f"{name} ({to.stat().st_size} bytes) is not what {SUMS} says: it is damaged or cut off; publish the version again")


def probes_of(storage: Storage, model: OrderedModel) -> bytes | None:
    """The version's probes, or None where it has none."""
    return read(storage, VersionPaths.probes(model.number))
