"""The Job of the stage `catalog`: one at a time, named by what it is to do, tried again with back-off. Knows nothing of what its records mean."""

from __future__ import annotations

from datetime import timedelta

from finetune_api.contract import CatalogFile, read_stage_result
from finetune_api.names import ANNOTATION_HASH
from finetune_api.tuned_model import FineTunedModelSpec

from ...model.job import ChildJobView, PodView
from ...model.times import is_within, parse_time, rfc3339
from ...resources.tuned_model import catalog_config, catalog_job, catalog_job_name, catalog_policy
from ..plan import Apply, Create, Delete
from ..starting import why_not_running
from .draft import STORAGE_READY, Draft

_START_SECONDS = 60.0
"""A pod that has not started for so long is kept from it: before that there may be a node, or the image, in a moment."""
_REPORT_SECONDS = 10.0
"""A report comes before its pod ends; how long it may take here."""


def run_catalog(draft: Draft, spec: FineTunedModelSpec, wanted: CatalogFile) -> None:
    """Bring the storage in line by one step."""
    storage = draft.status.storage
    if not draft.settings.endpoint:
        draft.set(
            STORAGE_READY, "Unknown", "NoReports", "the operator takes no reports: what is at the storage is neither read nor removed"
        )
        return
    if not wanted.remove and wanted.digest == storage.written:
        return
    if draft.status.versions != draft.before.versions or storage != draft.before.storage:
        return  # it is put on record first
    name = catalog_job_name(wanted, spec, storage.retries)
    child = next((job for job in draft.observed.catalogs if job.name == name), None)
    others = [job for job in draft.observed.catalogs if job.name != name]
    if child is None:
        _start(draft, spec, wanted, others)
        return
    pods = [pod for pod in draft.observed.pods if pod.job_uid == child.uid]
    if child.deleting:
        return
    if trouble := _failure(draft, child, pods):
        _retry(draft, *trouble)
    elif not any(pod.running for pod in pods) and (kept := why_not_running(pods)) is not None:
        if is_within(_START_SECONDS, child.created, draft.now):
            draft.wait(_START_SECONDS)
        else:
            draft.set(STORAGE_READY, "False", *kept)


def _start(draft: Draft, spec: FineTunedModelSpec, wanted: CatalogFile, others: list[ChildJobView]) -> None:
    storage = draft.status.storage
    after = parse_time(storage.retry_after)
    longest = timedelta(seconds=draft.settings.backoff_limit_seconds)
    if after is not None and draft.now < after <= draft.now + longest:  # further away than that, a clock was set back
        draft.wait((after - draft.now).total_seconds())
        return
    if any(_runs(job, draft.observed.pods) for job in others):
        return  # its end wakes
    draft.actions += [Delete("Job", job.name, job.uid) for job in others if not job.deleting]
    for manifest in (catalog_policy(wanted, draft.settings), catalog_config(wanted, draft.settings)):
        if manifest is None:
            continue
        seen = draft.observed.applied.get((manifest["kind"], manifest["metadata"]["name"]))
        if seen != manifest["metadata"]["annotations"][ANNOTATION_HASH]:
            draft.actions.append(Apply(manifest))
    draft.actions.append(Create(catalog_job(wanted, spec, draft.settings, storage.retries)))
    if draft.status.condition(STORAGE_READY) is None:
        draft.set(STORAGE_READY, "Unknown", "Started", "its records are being read")


def _runs(job: ChildJobView, pods: tuple[PodView, ...]) -> bool:
    alive = any(pod.job_uid == job.uid and not pod.ended for pod in pods)
    return alive or not (job.complete or job.failed or job.deleting or any(pod.job_uid == job.uid for pod in pods))


def _failure(draft: Draft, child: ChildJobView, pods: list[PodView]) -> tuple[str, str] | None:
    """(reason, message) where a try has ended and its report is not on record."""
    failed = next((pod for pod in pods if pod.phase == "Failed"), None)
    if failed is not None:
        words = read_stage_result(failed.message)
        return (words.reason, words.message) if words is not None else (failed.reason or "CatalogFailed", failed.message or "no message")
    done = next((pod for pod in pods if pod.phase == "Succeeded"), None)
    if done is not None and done.finished is not None and is_within(_REPORT_SECONDS, done.finished, draft.now):
        draft.wait(_REPORT_SECONDS)
        return None
    if done is not None or child.complete:
        return "NoReport", f"Job {child.name} has ended, and what it found did not come here"
    return ("CatalogFailed", child.message or f"the pod of Job {child.name} is gone") if child.failed else None


def _retry(draft: Draft, reason: str, message: str) -> None:
    storage = draft.status.storage
    storage.retries += 1
    delay = min(draft.settings.backoff_limit_seconds, draft.settings.backoff_base_seconds * 2.0 ** min(storage.retries - 1, 30))
    storage.retry_after = rfc3339(draft.now + timedelta(seconds=delay))
    reason = reason if reason.isalnum() and reason[:1].isalpha() else "CatalogFailed"
    draft.set(STORAGE_READY, "False", reason, f"tried again at {storage.retry_after}: {message}")
    if storage.retries == 1:
        draft.event("Warning", reason, f"the storage cannot be read or written: {message}")
