"""reconcile(): which versions a FineTunedModel has, which is the champion, which are kept, and what its storage has to say of that.

Level-triggered, and what is decided is put on record before anything is done about it: a catalog Job begins when the states and
removals that it carries out stand in the status. Knows nothing of how anything is carried out.
"""

from __future__ import annotations

from collections.abc import Iterable

from finetune_api.contract import CatalogFile
from finetune_api.tuned_model import FineTunedModelSpec, FineTunedModelStatus, ModelVersion, StorageStatus
from finetune_api.validation import InvalidDocument, parse_model
from finetune_api.versions import VersionState

from ...model.objects import Object
from ...model.times import rfc3339
from ...model.tuned_model import ObservedModel, continued_version, pinned_by
from ...model.workload import has_ended
from ...resources.tuned_model import catalog_file, catalog_job_name
from ...settings import Settings
from ..plan import Plan
from .catalog import run_catalog
from .champion import decide, present_champion
from .draft import READY, STORAGE_READY, Draft
from .retention import next_end, outdated
from .versions import new_from_jobs, published, version_of_record

_MOST_TOLD = 10


def reconcile(observed: ObservedModel, settings: Settings) -> Plan[FineTunedModelStatus]:
    """Decide the next actions and the status of one model. Pure."""
    if observed.raw["metadata"].get("deletionTimestamp"):
        return Plan()  # the garbage collector takes what it owns; what is at the storage stays
    draft = Draft(observed, settings)
    try:
        spec = parse_model(observed.raw, strict=False)
    except InvalidDocument as failure:
        draft.set(READY, "False", "InvalidSpec", str(failure))
        return draft.plan()
    _begin(draft, spec)
    recorded = _take_report(draft, spec)
    jobs = published(observed.jobs, draft.name, spec.storage)
    _add_from_jobs(draft, jobs)
    if draft.synced:
        _decide(draft, spec, restored=set(recorded))
        _retain(draft, spec, jobs)
        if recorded == states(draft.status) and not draft.status.storage.removing and draft.status.storage.written:
            draft.status.storage.written = _file(draft, spec, draft.status).digest  # they say so already
    _forget_removed(draft, jobs)
    run_catalog(draft, spec, _file(draft, spec, draft.status))
    _summarise(draft, spec)
    return draft.plan()


def refused(observed: ObservedModel, settings: Settings, message: str) -> Plan[FineTunedModelStatus]:
    """Say that the API server refused an action (quota, admission, a name that is taken). Nothing else is decided."""
    draft = Draft(observed, settings)
    draft.set(STORAGE_READY, "False", "APIRefused", f"the API server refused, tried again with back-off: {message}")
    if draft.before.condition(STORAGE_READY) != draft.status.condition(STORAGE_READY):
        draft.event("Warning", "APIRefused", message)
    return draft.plan()


def unreadable(observed: ObservedModel, settings: Settings, problem: str) -> Plan[FineTunedModelStatus]:
    """Say that the object cannot be worked on as it is. Nothing else is decided: what it has, it keeps."""
    draft = Draft(observed, settings)
    text = f"the operator cannot work on this object as it is, and tries again with back-off: {problem}"
    draft.set(READY, "Unknown", "Unreadable", text)
    return draft.plan()


def states(status: FineTunedModelStatus) -> dict[int, VersionState]:
    """What the records are to say."""
    return {version.number: version.state for version in status.versions}


def _file(draft: Draft, spec: FineTunedModelSpec, status: FineTunedModelStatus) -> CatalogFile:
    meta = draft.observed.raw["metadata"]
    removing = sorted(status.storage.removing)
    return catalog_file(meta["name"], meta["namespace"], meta["uid"], spec, states(status), removing)


def _begin(draft: Draft, spec: FineTunedModelSpec) -> None:
    """A new object, or one that was told another storage, has the versions that are there."""
    status, storage = draft.status, draft.status.storage
    if storage.uri != spec.storage:
        moved = bool(storage.uri)
        status.versions, status.champion, status.storage = [], None, StorageStatus(uri=spec.storage)
        if moved:
            draft.event("Normal", "StorageChanged", f"versions are those at {spec.storage} now")
    elif draft.generation != status.observed_generation:
        storage.retry_after = None  # what was wrong may have been mended


def _take_report(draft: Draft, spec: FineTunedModelSpec) -> dict[int, VersionState]:
    """What the records say, by number, of versions that are kept; empty where nothing was reported."""
    report, status, storage = draft.observed.report, draft.status, draft.status.storage
    expected = _file(draft, spec, draft.before)
    by = catalog_job_name(expected, spec, draft.before.storage.retries)
    if report is None or (draft.observed.reported_by, report.done) != (by, expected.digest):
        return {}  # of another storage, or of what was wanted before: the next one tells more
    gone = {record.number for record in report.records if record.removed_at is not None}
    alive = [record for record in report.records if record.number not in {*gone, *storage.removing, *storage.removed}]
    known = {version.number for version in status.versions}
    found = [version_of_record(record) for record in alive if record.number not in known]
    if not storage.written:  # a job that was made again from a backup says less than the record of its version
        told = {record.number: version_of_record(record) for record in alive}
        status.versions = [told.get(version.number, version) for version in status.versions]
    status.versions = [version for version in [*status.versions, *found] if version.number not in gone]
    if found:
        draft.event("Normal", "VersionsRestored", f"found at {spec.storage}: {_numbers(v.number for v in found)}")
    storage.removed = sorted({*storage.removed, *gone})
    storage.highest = max([storage.highest, *(record.number for record in report.records)])
    if report.unreadable:
        why = f"records that cannot be read are left as they are: {'; '.join(report.unreadable)}"
        draft.set(STORAGE_READY, "True", "RecordsUnreadable", why)
    else:
        draft.set(STORAGE_READY, "True", "Synced", "its records say what was decided")
    if storage.removing:
        draft.event("Normal", "VersionRemoved", f"files are removed of {_numbers(storage.removing)}")
        storage.removed, storage.removing = sorted({*storage.removed, *storage.removing}), []
    storage.written = _file(draft, spec, FineTunedModelStatus(versions=draft.before.versions)).digest
    storage.retries, storage.retry_after = 0, None
    return {record.number: record.state for record in alive}


def _add_from_jobs(draft: Draft, jobs: dict[int, Object]) -> None:
    for version in new_from_jobs(draft.status, jobs, draft.name, synced=draft.synced):
        if not draft.synced:
            version.message = "not decided yet: the records at the storage have not been read"
        draft.status.versions.append(version)
        draft.event("Normal", "VersionAdded", f"version {version.number} by FineTuneJob {version.job}")


def _decide(draft: Draft, spec: FineTunedModelSpec, *, restored: set[int]) -> None:
    status = draft.status
    before = present_champion(status.champion, status.versions)
    decision = decide(status.champion, status.versions, spec)
    for version in status.versions:
        if version.number not in decision.states:
            continue
        state, why = decision.states[version.number]
        if state == "Rejected" and version.state != state:
            draft.event("Normal", "Rejected", f"version {version.number}: {why}")
        version.state, version.message = state, why
    if decision.champion != before:
        champion = status.version(decision.champion)
        assert champion is not None
        champion.promoted_at = rfc3339(draft.now)
        by = pinned_by(draft.observed.raw) if spec.champion == decision.champion else ""
        who = f", set by {by}" if by else ""
        back = before is not None and champion.number < before
        told = f"version {champion.number} took over from {before}" if before is not None else f"version {champion.number}"
        draft.event("Normal", "RolledBack" if back else "Promoted", f"{told}: {champion.message}{who}")
    status.champion = decision.champion
    if decision.pin_missing:
        kept = _numbers(v.number for v in status.versions) or "none"
        stays = f"version {status.champion} stays the champion" if status.champion is not None else "there is no champion"
        draft.set(
            READY, "False", "VersionNotFound", f"spec.champion names version {spec.champion}, which is not kept (kept: {kept}); {stays}"
        )


def _retain(draft: Draft, spec: FineTunedModelSpec, jobs: dict[int, Object]) -> None:
    status = draft.status
    protected = {number for serving in draft.observed.serving for number in serving.versions}
    protected |= {number for number, job in jobs.items() if not has_ended(job)}  # it ends when its version is on record
    protected |= {number for job in draft.observed.jobs if (number := continued_version(job, draft.name)) is not None}
    protected |= {number for number in (status.champion, spec.champion) if number is not None}
    out = set(outdated(status.versions, spec.retention, protected, draft.now))
    if out:
        status.storage.removing = sorted({*status.storage.removing, *out})
        status.versions = [version for version in status.versions if version.number not in out]
    if (left := next_end(status.versions, spec.retention, draft.now)) is not None:
        draft.wait(left)


def _forget_removed(draft: Draft, jobs: dict[int, Object]) -> None:
    """What was removed is remembered while its job could bring it back."""
    storage = draft.status.storage
    storage.removed = [number for number in storage.removed if number in jobs]


def _summarise(draft: Draft, spec: FineTunedModelSpec) -> None:
    status = draft.status
    status.versions.sort(key=lambda version: version.number, reverse=True)
    status.latest = status.versions[0].number if status.versions else None
    status.count = len(status.versions)
    status.storage.highest = max([status.storage.highest, *(version.number for version in status.versions)])
    champion = status.version(status.champion)
    status.score = score(champion) if champion is not None else ""
    status.served = sorted(serving.endpoint for serving in draft.observed.serving if serving.answers)[:64]
    if spec.champion is not None and status.version(spec.champion) is None and draft.synced:
        return  # said above
    if champion is not None:
        draft.set(READY, "True", "HasChampion", f"version {champion.number} is the champion: {champion.message or 'as it was'}")
    elif not draft.synced:
        draft.set(READY, "False", "StorageNotRead", f"{spec.storage} has not been read yet")
    elif status.versions:
        newest = status.versions[0]
        draft.set(READY, "False", "NoChampion", f"no version is the champion; version {newest.number}: {newest.message}")
    else:
        draft.set(READY, "False", "NoVersions", "no job has published a version yet: name it in publish[].model of a FineTuneJob")


def score(version: ModelVersion) -> str:
    """The first metric of a version for people, beside the best of its base: `exact-match 0.91 (base 0.24)`."""
    evaluation = version.evaluation
    if evaluation is None or not evaluation.metrics:
        return ""
    metric = evaluation.metrics[0]
    tuned, base = evaluation.arm("Tuned"), evaluation.arm(evaluation.compared_with or "Base")
    if tuned is None or metric not in tuned.metrics:
        return ""
    beside = f" (base {base.metrics[metric]:.4g})" if base is not None and metric in base.metrics else ""
    return f"{metric} {tuned.metrics[metric]:.4g}{beside}"


def _numbers(numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    more = f" and {len(found) - _MOST_TOLD} more" if len(found) > _MOST_TOLD else ""
    return ", ".join(map(str, found[:_MOST_TOLD])) + more
