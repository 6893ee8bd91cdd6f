"""Single-pod stages: prepare, check, evaluate, publish. Knows nothing of the gang, nor of what a result means."""

from __future__ import annotations

from datetime import timedelta

from finetune_api import names
from finetune_api.contract import WAITING_FOR_SOURCE, Stage, StageResult, read_stage_result
from finetune_api.scalars import human_duration, seconds
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ConditionType, StageRetry

from ...model.job import PodView
from ...model.times import is_within, parse_time, rfc3339
from ...resources.backends import local_queue, take_place
from ...resources.stage import stage_job
from ..plan import Create, Delete
from ..starting import why_not_running
from .draft import Draft
from .failures import Failure, classify
from .kueue import OUT_OF_SYNC, finished_as, keeps_place, standing
from .models import champion_of
from .waiting import end_wait, may_still_wait, wait_for_source

LOOK_AGAIN = 10.0
"""Seconds between two looks at what another scheduler says"""
QUEUED = "Queued"
"""Reason of a stage whose Job Kueue has not let start yet"""
#: a finished Job whose pod is not in sight for so long has lost it
_POD_GRACE_SECONDS = 20


def run_stage(draft: Draft, spec: FineTuneJobSpec, stage: Stage, condition: ConditionType) -> StageResult | None:
    """Bring a stage forward by one step. Returns its result when it is done, else None."""
    retry = draft.status.stages.get(stage, StageRetry())
    name = names.stage_name(draft.observed.job["metadata"]["name"], stage, retry.tries)
    child = next((j for j in draft.observed.jobs if j.name == name), None)
    _drop_other_tries(draft, stage, name, ended=retry.waits > 0 and child is not None)
    external = stage == "evaluate" and keeps_place(spec, draft.settings)
    if child is None and external and not draft.observed.place_seen:
        draft.wait(1)  # the next pass will have looked
        return None
    if child is None or child.deleting:
        if still_there := _runs_still(draft, stage, name):
            draft.set(condition, "Unknown", "Stopping", f"pod {still_there.name} of the last try has not ended yet")
        elif child is None:
            _start(draft, spec, stage, condition, retry)
        return None

    pods = [p for p in draft.observed.pods if p.job_uid == child.uid]
    done = next((p for p in pods if p.phase == "Succeeded"), None)
    if retry.started_at is None:  # not on record yet
        _note_start(draft, stage, condition, retry, name, rfc3339(child.created), tell=done is None)
    if done is not None:
        result = read_stage_result(done.message)
        if result is not None:
            end_wait(draft, stage)
            return result
        _retry(draft, spec, stage, condition, Failure("Infrastructure", "NoResult", f"pod {done.name} ended without a result", done.name))
        return None
    failed = next((p for p in pods if p.phase == "Failed"), None)
    if failed is not None and external and failed.deleting and not (child.complete or child.failed):
        failed = None  # Kueue takes the quota away and suspends the Job, which it lets go on later
        draft.wait(1)
    if failed is not None:
        if not wait_for_source(draft, spec, stage, condition, failed):
            _retry(draft, spec, stage, condition, classify(failed))
    elif child.complete or child.failed:
        if is_within(_POD_GRACE_SECONDS, child.created, draft.now):
            draft.wait(_POD_GRACE_SECONDS)
        else:
            message = child.message or f"the pod of Job {name} is gone"
            _retry(draft, spec, stage, condition, Failure("Disruption", "PodDeleted", message, name))
    elif child.suspended:
        _wait_in_queue(draft, spec, stage, condition, name)
    else:
        if (known := draft.status.condition(condition)) is not None and known.reason == QUEUED:  # it has waited long enough
            draft.set(condition, "Unknown", "Started", f"{stage} was started")
            draft.status.stages[stage] = retry.model_copy(update={"started_at": rfc3339(draft.now)})
        _watch_start(draft, spec, stage, condition, pods)
    return None


def _wait_in_queue(draft: Draft, spec: FineTuneJobSpec, stage: Stage, condition: ConditionType, name: str) -> None:
    """A Job that another scheduler has not let start."""
    text, group = f"Job {name} waits in queue {local_queue(spec)} for its GPU", draft.observed.group
    if draft.settings.queueing_backend == "kueue":
        if finished_as(group) == OUT_OF_SYNC:  # something changes Jobs or Workloads of this cluster
            message = f"Kueue found Job {name} to differ from the Workload that kept its place: it waits again, behind the others"
            _retry(draft, spec, stage, condition, Failure("Infrastructure", OUT_OF_SYNC, message, name))
            return
        text = f"{text}: {standing(group, local_queue(spec), draft.observed.served).message}"
    draft.set(condition, "Unknown", QUEUED, text)
    draft.wait(LOOK_AGAIN)


def _start(draft: Draft, spec: FineTuneJobSpec, stage: Stage, condition: ConditionType, retry: StageRetry) -> None:
    if draft.held_back():
        return
    champion = champion_of(draft, spec) if stage == "evaluate" else None
    manifest = stage_job(draft.job_ref(spec), draft.settings, stage, retry.tries, draft.status.admission, champion)
    if draft.place == manifest["metadata"]["name"]:
        take_place(manifest, draft.place)
    draft.actions.append(Create(manifest))
    _note_start(draft, stage, condition, retry, manifest["metadata"]["name"], rfc3339(draft.now), tell=True)


def _note_start(draft: Draft, stage: Stage, condition: ConditionType, retry: StageRetry, name: str, started_at: str, *, tell: bool) -> None:
    draft.status.stages[stage] = retry.model_copy(update={"started_at": started_at})
    if stage in ("prepare", "check"):
        draft.more_follows = True  # in a moment its pod says how it fares
    if draft.status.condition(condition) is None:
        draft.set(condition, "Unknown", "Started", f"{stage} was started")
        if tell and stage != "check":  # of which one hears when it fails
            draft.event("Normal", f"{stage.capitalize()}Started", f"{stage} runs as Job {name}")


def _runs_still(draft: Draft, stage: Stage, current: str) -> PodView | None:
    """A pod of another try, which may write to the workspace until it has ended: a Job that is deleted goes before its pods."""
    others = {job.uid for job in draft.observed.jobs if job.stage == stage and job.name != current}
    pods = [p for p in draft.observed.pods if p.job_uid in others] + [p for p in draft.observed.left if p.stage == stage]
    lost = draft.observed.lost_nodes
    return next((p for p in pods if not p.ended and not (p.deleting and p.node in lost)), None)


def _drop_other_tries(draft: Draft, stage: Stage, current: str, *, ended: bool) -> None:
    """Delete those that still run; `ended`: also those that ended, of which a long wait makes many."""
    for job in draft.observed.jobs:
        if job.stage == stage and job.name != current and not job.deleting and (ended or not (job.complete or job.failed)):
            draft.actions.append(Delete("Job", job.name, job.uid))


def _retry(draft: Draft, spec: FineTuneJobSpec, stage: Stage, condition: ConditionType, failure: Failure) -> None:
    """Fail the job, or try the stage again under a new name."""
    retry = draft.status.stages.get(stage, StageRetry())
    again = failure.cause not in ("UserError", "OutOfMemory") and retry.retries < draft.settings.stage_retries
    if not again:
        draft.set(condition, "False", failure.reason, failure.message)
        reason = failure.reason if failure.cause == "UserError" else f"{stage.capitalize()}Failed"
        draft.fail(reason, failure.message)
        return
    draft.more_follows = False  # the next try waits for this to be on record
    retries = retry.retries + 1
    delay = draft.backoff(retries)
    draft.status.stages[stage] = retry.model_copy(update={"retries": retries, "started_at": None})
    draft.status.retry_after = rfc3339(draft.now + timedelta(seconds=delay)) if delay else None
    draft.set(
        condition, "False", failure.reason, f"{stage} is tried again ({retries} of {draft.settings.stage_retries}): {failure.message}"
    )
    draft.event("Warning", f"{stage.capitalize()}Retried", f"retry {retries} of {draft.settings.stage_retries}: {failure.message}")
    draft.wait(delay)


def _watch_start(draft: Draft, spec: FineTuneJobSpec, stage: Stage, condition: ConditionType, pods: list[PodView]) -> None:
    """Say why a pod does not start, and give its place back after gangTimeout."""
    if any(p.running for p in pods):
        old = draft.status.condition(condition)
        answered = old is not None and old.reason == WAITING_FOR_SOURCE and not may_still_wait(draft, pods)
        if old is None or old.status == "Unknown" or old.reason in START_TROUBLE or answered:
            draft.set(condition, "Unknown", "Running", f"{stage} is running")
        _watch_run(draft, spec, stage, condition, pods)
        return
    trouble = why_not_running(pods)
    if trouble is not None:
        draft.set(condition, "False", *trouble)
    started = parse_time(draft.status.stages.get(stage, StageRetry()).started_at)
    if started is None:
        return
    left = (started + timedelta(seconds=seconds(spec.run_policy.gang_timeout)) - draft.now).total_seconds()
    if left > 0:
        draft.wait(left)
    else:
        reason, message = trouble or ("StartTimeout", "no reason given")
        waited = human_duration(seconds(spec.run_policy.gang_timeout))
        _retry(draft, spec, stage, condition, Failure("Infrastructure", reason, f"not running after {waited}: {message}", ""))


def _watch_run(draft: Draft, spec: FineTuneJobSpec, stage: Stage, condition: ConditionType, pods: list[PodView]) -> None:
    """End a try that takes too long: whatever it waits for, the job must not wait for ever."""
    limit = seconds(spec.run_policy.stage_timeout)
    left = (min(p.created for p in pods) + timedelta(seconds=limit) - draft.now).total_seconds()
    if left > 0:
        draft.wait(left)
        return
    message = f"{stage} did not end in {human_duration(limit)} (runPolicy.stageTimeout)"
    _retry(draft, spec, stage, condition, Failure("Hang", "StageTimeout", message, pods[0].name))


START_TROUBLE = frozenset({"ImagePullFailed", "Unschedulable", "ContainerNotStarted", "StartTimeout"})
