"""Versions of a FineTunedModel, read from where it keeps them. Starts no torch; finetune_api/versions.py says what lies there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from finetune_api.contract import SUMS
from finetune_api.uris import URI
from finetune_api.versions import VersionPaths, VersionRecord

from ..job.context import Context
from ..job.files import damaged_file, parse_digests, write_bytes
from ..process.errors import UserError
from ..remote.storage import Storage, storage_of

Prompts = np.ndarray[Any, Any]
"""Digests of prompts as uint64, sorted, each once."""
_READERS = 8
VERSION_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", SUMS)
"""What serving a version, or going on from it, takes of its files."""


class UnreadableRecord(ValueError):
    """A record that is no VersionRecord of its number."""


def read_record(storage: Storage, number: int) -> VersionRecord | None:
    """The record of a version, or None where there is none. Raises UnreadableRecord."""
    body = storage.read(VersionPaths.record(number))
    return None if body is None else parse_record(number, body)


def parse_record(number: int, body: bytes) -> VersionRecord:
    """A record's content. Raises UnreadableRecord."""
    name = VersionPaths.record(number)
    try:
        found = VersionRecord.model_validate(json.loads(body))
    except (ValueError, RecursionError) as failure:
        raise UnreadableRecord(f"{name} cannot be read: {str(failure).splitlines()[0][:200]}") from None
    if found.number != number:
        raise UnreadableRecord(f"{name} is the record of version {found.number}")
    return found


def recorded_numbers(storage: Storage) -> list[int]:
    """Versions that have a record."""
    return _numbers(name.removesuffix(".json") for name in storage.names(VersionPaths.RECORDS) if name.endswith(".json"))


def claimed_numbers(storage: Storage) -> list[int]:
    """Versions that have a folder."""
    return _numbers(storage.names(VersionPaths.VERSIONS))


def read_bodies(storage: Storage, names: Sequence[str]) -> list[bytes | None]:
    """The contents of several files, a few at a time."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(storage.read, names))


def _numbers(names: Iterable[str]) -> list[int]:
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def learned_prompts(storage: Storage, number: int, others: Sequence[int] = ()) -> Prompts | None:
    """What a version and those that it descends from learned from; None where that of one is not known. `others`: that it descends from, too."""
    line: list[int] = list(others)
    at: int | None = number
    try:
        while at is not None and at not in line[len(others) :]:
            line.append(at)
            if (record := read_record(storage, at)) is None:
                return None
            at = record.parent
        bodies = read_bodies(storage, [VersionPaths.prompts(one) for one in dict.fromkeys(line)])
        known = [parse_prompts(body) for body in bodies if body is not None]
    except UnreadableRecord:
        return None
    return np.unique(np.concatenate(known)) if len(known) == len(bodies) else None


def parse_prompts(body: bytes) -> Prompts:
    """Digests as they lie in prompts/NUMBER.bin. Raises UnreadableRecord where it was cut off."""
    if len(body) % 8:
        raise UnreadableRecord(f"{len(body)} bytes are no list of prompts' digests")
    return np.frombuffer(body, ">u8").astype(np.uint64)


def joined_prompts(*bodies: bytes) -> bytes:
    """Several prompts/NUMBER.bin as one."""
    return write_prompts(np.unique(np.concatenate([parse_prompts(body) for body in bodies])))


def write_prompts(prompts: Prompts) -> bytes:
    """As they lie in prompts/NUMBER.bin."""
    return bytes(prompts.astype(">u8").tobytes())


def fetch_version(storage: Storage, record: VersionRecord, cache: str) -> Path:
    """A local folder with a version's files, compared with its record. Raises UserError where they are gone or are not those."""
    shown = f"version {record.number} at {storage.uri}"
    if record.removed_at is not None:
        raise UserError("VersionNotFound", f"{shown} was removed at {record.removed_at}; name one that is kept")
    key = hashlib.sha256(storage.uri.encode()).hexdigest()[:16]
    copy = Path(cache, "versions", f"{key}-{record.number}")
    folder = storage.fetch(VersionPaths.artifact(record.number), copy, VERSION_FILES)
    if (wrong := _difference(folder, record)) is not None:
        shutil.rmtree(copy, ignore_errors=True)  # a later try reads it anew
        raise UserError("VersionDamaged", f"{shown}: {wrong}; name another version, or publish it again")
    return folder


def _difference(folder: Path, record: VersionRecord) -> str | None:
    sums = folder / SUMS
    if not sums.is_file() or f"sha256:{hashlib.sha256(sums.read_bytes()).hexdigest()}" != record.digest:
        return f"{SUMS} is not what its record says"
    listed = [name for name in parse_digests(sums.read_text()) if "/" not in name and any(fnmatch(name, one) for one in VERSION_FILES)]
    if (name := next((name for name in listed if not (folder / name).is_file()), None)) is not None:
        return f"{name} is not there"
    name = damaged_file(folder, sums.read_text())
    return None if name is None else f"{name} is not what {SUMS} says"


def fetch_parent(context: Context, uri: URI) -> Path:
    """In prepare: the files of the version that `tuning.continueFrom` names; and what it learned from is noted for evaluate."""
    field = f"tuning.continueFrom: model://{uri.name}" + (f"@{uri.revision}" if uri.revision else "")
    if not uri.revision:
        raise UserError("VersionNotFound", f"{field} names no version, and the model has no champion yet; write model://{uri.name}@NUMBER")
    storage = storage_of(context, uri.name, context.job.sources)
    number = int(uri.revision)
    try:
        record = read_record(storage, number)
        if record is None:
            known = recorded_numbers(storage)
            told = f"there are {', '.join(map(str, known[-10:]))}" if known else "there is none"
            raise UserError("VersionNotFound", f"{field}: {storage.uri} has no such version; {told}")
        _check_parent(context, field, record)
        folder = fetch_version(storage, record, context.layout.cache)
    except UnreadableRecord as failure:
        raise UserError("VersionDamaged", f"{field}: {failure}; name another version") from None
    prompts = learned_prompts(storage, number)
    noted = Path(context.layout.parent_prompts)
    noted.unlink(missing_ok=True)
    if prompts is not None:
        write_bytes(noted, write_prompts(prompts))
    return folder


def _check_parent(context: Context, field: str, record: VersionRecord) -> None:
    base = context.read_json(context.layout.reference("model"))
    if record.form == "Model":
        raise UserError("WrongAdapter", f"{field} is a whole model, no adapter; remove continueFrom and set model.uri to {record.uri}")
    if record.base.fingerprint and record.base.fingerprint != base["fingerprint"]:
        raise UserError(
            "WrongAdapter", f"{field} was tuned from {record.base.uri}, whose weights are others than model.uri's; set model.uri to it"
        )
