"""The storage of a FineTunedModel: probes and digests of prompts without those of the rows, and which versions learned from them.

Records and versions stay as they are: weights, a model card, scores. What was erased is on record before it goes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial

from finetune_api.erasure import ERASURES, Erased, Erasure, ErasureReport, Learned, TrainedOn, read_erasures
from finetune_api.versions import VersionPaths, VersionRecord

from ..models.versions import UnreadableRecord, claimed_numbers, parse_record, read_bodies, recorded_numbers
from ..process.errors import InfrastructureError
from ..remote.storage import Storage
from .match import Match
from .workspace import erase_keys, erase_probes, now

_CARDS = ("README.md", "finetune.json", "gguf/Modelfile")


def erase_from_storage(storage: Storage, match: Match, trained: Sequence[TrainedOn], *, dry_run: bool) -> ErasureReport:
    """Look through what is kept of each version. Again is the same; it may be killed anywhere."""
    report = ErasureReport(dry_run=dry_run)
    records, unreadable = _records(storage)
    report.notes += unreadable
    numbers = sorted({*recorded_numbers(storage), *claimed_numbers(storage)})
    report.looked = [f"version {number}" for number in numbers]
    wanted = match.keys | {
        bytes.fromhex(key) for one in trained for key in one.erased
    }  # a version may hold what another's job learned from
    own = {number: _of_job(records.get(number), trained) for number in numbers}
    gone = {number: wanted - {bytes.fromhex(key) for one in own[number] for key in one.still_used} for number in numbers}

    # 1. What each learned from, and that it is erased, goes on record first
    found: dict[int, int] = {}
    bodies = read_bodies(storage, [VersionPaths.prompts(number) for number in numbers])
    for number, body in zip(numbers, bodies, strict=True):
        if body is not None:
            here = {body[at : at + 8] for at in range(0, len(body), 8)}
            found[number] = len(here & (gone[number] | {bytes.fromhex(key) for one in own[number] for key in one.erased}))
        elif number in records:
            report.notes.append(f"version {number} has no {VersionPaths.prompts(number)}: what it learned from is not known")
    earlier = _note(storage, {number: count for number, count in found.items() if count}, dry_run=dry_run)

    # 2. The files
    for number in numbers:
        _erase(storage, VersionPaths.prompts(number), partial(erase_keys, gone[number]), report, dry_run=dry_run)
        try:
            _erase(storage, VersionPaths.probes(number), partial(erase_probes, match), report, dry_run=dry_run)
        except ValueError:
            report.notes.append(f"{VersionPaths.probes(number)} cannot be read and was not looked into")
        for card in _CARDS:
            name = f"{VersionPaths.artifact(number)}/{card}"
            body = storage.read(name) if match.containing else None
            if body is not None and match.text(body.decode(errors="replace")):
                report.files.append(Erased(file=name, what="mentions", count=1, kept=True))
    if match.containing and not match.keys and not trained:
        report.notes.append(
            "prompts/ hold digests alone: whether a text stands in one cannot be seen there; name the jobs that trained, too, or give --rows"
        )

    # 3. Who learned from them
    report.learned = _learned(numbers, records, found, earlier)
    return report


def _erase(storage: Storage, name: str, make: Callable[[bytes], tuple[int, bytes]], report: ErasureReport, *, dry_run: bool) -> None:
    body = storage.read(name)
    count = make(body)[0] if body is not None else 0
    if not count:
        return
    if not dry_run:
        storage.change(name, lambda held: None if held is None else make(held)[1])
    report.files.append(Erased(file=name, what="probes" if name.startswith("probes/") else "prompt digests", count=count))


def _records(storage: Storage) -> tuple[dict[int, VersionRecord], list[str]]:
    numbers = recorded_numbers(storage)
    found, unreadable = {}, []
    for number, body in zip(numbers, read_bodies(storage, [VersionPaths.record(number) for number in numbers]), strict=True):
        try:
            if body is not None:
                found[number] = parse_record(number, body)
        except UnreadableRecord as failure:
            unreadable.append(str(failure))
    return found, unreadable


def _of_job(record: VersionRecord | None, trained: Sequence[TrainedOn]) -> list[TrainedOn]:
    """What the folder of the version's own job said."""
    return [one for one in trained if record is not None and record.job.uid.startswith(one.job)]


def _note(storage: Storage, found: dict[int, int], *, dry_run: bool) -> dict[int, int]:
    """Put on record how many prompts of each version are erased; returns how many were earlier."""
    body = storage.read(ERASURES)
    try:
        known = read_erasures(json.loads(body)) if body is not None else []
    except (ValueError, TypeError):
        raise InfrastructureError("StorageFailed", f"{storage.uri}/{ERASURES} cannot be read; mend it, or move it away") from None
    if found and not dry_run:
        entry = Erasure(at=now(), prompts={str(number): count for number, count in found.items()}).to_wire()

        def add(held: bytes | None) -> bytes:
            return (json.dumps([*(json.loads(held) if held else []), entry], indent=1) + "\n").encode()

        storage.change(ERASURES, add)
    earlier: dict[int, int] = {}
    for one in known:
        for number, count in one.prompts.items():
            earlier[int(number)] = earlier.get(int(number), 0) + count
    return earlier


def _learned(numbers: Sequence[int], records: dict[int, VersionRecord], found: dict[int, int], earlier: dict[int, int]) -> list[Learned]:
    told: dict[int, Learned] = {}
    for number in numbers:  # a parent's number is the smaller one
        record = records.get(number)
        if record is not None and record.removed_at is not None:
            continue
        job = f"{record.job.namespace}/{record.job.name}" if record is not None else ""
        if found.get(number) or earlier.get(number):
            told[number] = Learned(job=job, version=number, rows=found.get(number, 0), earlier=earlier.get(number, 0))
    for number in numbers:
        record = records.get(number)
        if number in told or record is None or record.removed_at is not None:
            continue
        at, seen = record.parent, {number}
        while at is not None and at not in seen:
            if found.get(at) or earlier.get(at):
                told[number] = Learned(job=f"{record.job.namespace}/{record.job.name}", version=number, through=at)
                break
            seen.add(at)
            at = records[at].parent if at in records else None
    return [told[number] for number in sorted(told)]
