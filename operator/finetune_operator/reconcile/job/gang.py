"""The gang: starts together, fails together, restarts together from the last checkpoint. Knows nothing of why it was admitted."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

from finetune_api import names
from finetune_api.base import shortened
from finetune_api.contract import PEER_LOST, ExitCode, StageResult, progress_of, read_stage_result
from finetune_api.scalars import human_duration, printable, seconds
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import CheckpointStatus, Gang, Restart

from ...model.job import PodView
from ...model.times import is_within, parse_time, rfc3339
from ...resources.common import Manifest
from ...resources.gang import service, worker
from ..plan import Apply, Create, Delete
from ..starting import why_not_running
from .draft import Draft
from .failures import FROM_OUTSIDE, NEAR_SECONDS, Failure, action_for, first_failure
from .kueue import DEACTIVATED, taken_away
from .usage import account, holds_since, lost_seconds, workers

_RESTARTS_KEPT = 20
_LOOK_AGAIN = 10.0
_TAKEN_SECONDS = 60
"""How long a gang waits for the scheduler on nodes that had room when it was admitted."""
GANG_TIMEOUT = "GangTimeout"
"""Reason of an attempt whose pods did not all start: it gives its admission back."""
STOPPING = "Stopping"
"""Reason of Running while a gang that lost a pod saves its checkpoint."""
_QUICK_SECONDS = 10
"""Grace of pods whose gang broke: without one of them the others can save nothing."""


def _delete(draft: Draft, pods: list[PodView]) -> None:
    """Delete worker pods; those that can still save a checkpoint get the time for it."""
    trained, last = draft.status.condition("Trained"), draft.status.restarts[-1] if draft.status.restarts else None
    failed = trained is not None and trained.status == "False"
    for pod in pods:
        if not pod.deleting:
            broken = last is not None and pod.attempt <= last.attempt and last.cause not in FROM_OUTSIDE
            grace = _QUICK_SECONDS if broken or failed else None
            draft.actions.append(Delete("Pod", pod.name, pod.uid, grace))
        elif pod.node in draft.observed.lost_nodes:
            # nothing will confirm that it ended: should it live on, the fence in the workspace keeps it from writing
            draft.actions.append(Delete("Pod", pod.name, pod.uid, 0))
            draft.event("Warning", "PodForceDeleted", f"pod {pod.name} is taken away: its node {pod.node} does not answer")
        else:
            draft.wait(_LOOK_AGAIN)


def release(draft: Draft) -> bool:
    """Delete every worker pod that may still hold GPUs. Returns whether none is left."""
    left = [p for p in workers(draft) if not p.ended]
    _delete(draft, left)
    return not left


def note_checkpoints(draft: Draft) -> None:
    """Take the newest checkpoint from the last words of pods: they may have saved it when they were stopped."""
    for pod in workers(draft):
        words = read_stage_result(pod.message) if pod.ended else None
        step = words.result.get("checkpointStep") if words is not None else None
        if type(step) is int and 0 <= step <= 2**53 and (draft.status.checkpoint is None or step > draft.status.checkpoint.step):
            _checkpoint(draft, step, rfc3339(pod.finished or draft.now))
            draft.last_words = True


def _checkpoint(draft: Draft, step: int, saved_at: str) -> None:
    old = draft.status.checkpoint or CheckpointStatus(step=step)
    draft.status.checkpoint = old.model_copy(update={"step": step, "saved_at": saved_at})


def drop_stale(draft: Draft, spec: FineTuneJobSpec) -> bool:
    """Delete the pods of earlier attempts. Returns whether none is left."""
    status, pods, nodes = draft.status, workers(draft), draft.nodes(spec)
    # pods know their attempt: a status that was wiped does not make the count start again
    status.attempt = max([status.attempt, *(p.attempt for p in pods)])
    stale = [p for p in pods if p.attempt < status.attempt or p.rank >= nodes]
    _delete(draft, stale)
    return not stale


def run_gang(draft: Draft, spec: FineTuneJobSpec) -> StageResult | None:
    """Bring the gang forward by one step. Returns rank 0's result when all workers succeeded, else None."""
    status, nodes = draft.status, draft.nodes(spec)
    if not drop_stale(draft, spec):
        draft.phase("Starting")
        return None
    pods = workers(draft)
    by_rank = {p.rank: p for p in pods}
    new = _put_on_record(draft, spec, by_rank)
    _report(draft)

    if len(by_rank) == nodes and all(p.phase == "Succeeded" for p in pods):
        return _finish(draft, spec, by_rank[0])
    failure = _failure(draft, by_rank)
    if failure is not None:
        end_attempt(draft, spec, failure)
        return None
    if (running := status.condition("Running")) is not None and running.reason == STOPPING:
        return None
    if draft.held_back():
        draft.phase("Queued")
        return None
    draft.more_follows = True
    if create_missing(draft, spec, by_rank):
        draft.phase("Starting")
        draft.wait(5)
    elif new:
        _tell_of_gang(draft, spec)
    _follow(draft, spec, by_rank)
    return None


def _put_on_record(draft: Draft, spec: FineTuneJobSpec, by_rank: dict[int, PodView]) -> bool:
    """Which pods the gang has, once all are there. Returns whether that is new; what comes next may tell it too."""
    status = draft.status
    if (status.gang is not None and status.gang.attempt == status.attempt) or not by_rank or len(by_rank) < draft.nodes(spec):
        return False
    status.gang = Gang(
        attempt=status.attempt,
        pod_uids=[by_rank[rank].uid for rank in sorted(by_rank)],
        started_at=rfc3339(holds_since(draft, by_rank)),
        avoided_nodes=list(draft.observed.suspect_nodes[:16]),
    )
    return True


def _tell_of_gang(draft: Draft, spec: FineTuneJobSpec) -> None:
    gang = draft.status.gang
    assert gang is not None
    pods = "1 worker pod" if len(gang.pod_uids) == 1 else f"{len(gang.pod_uids)} worker pods"
    avoided = f"; avoiding nodes that jobs kept failing on: {', '.join(gang.avoided_nodes)}" if gang.avoided_nodes else ""
    message = f"attempt {gang.attempt}: {pods} of {max(1, spec.distribution.gpus_per_node)} process(es) each{avoided}"
    draft.event("Normal", "GangCreated", message)


def _failure(draft: Draft, by_rank: dict[int, PodView]) -> Failure | None:
    failed = [p for p in by_rank.values() if p.phase == "Failed"]
    evicted = taken_away(draft, list(by_rank.values()))
    lost = evicted or _lost_pods(draft, by_rank)
    if failed:
        failure = first_failure(failed)
        if evicted is not None and (failure.from_outside or failure.reason == PEER_LOST):
            return dataclasses.replace(evicted, message=f"{evicted.message}; {failure.message}")
        last = max(p.finished or p.created for p in failed)
        if failure.cause == "Stopped" and lost is not None:
            return dataclasses.replace(lost, message=f"{lost.message}; {failure.message}")
        if failure.reason != PEER_LOST or len(failed) == len(by_rank) or not is_within(NEAR_SECONDS, last, draft.now):
            return failure
        draft.wait(NEAR_SECONDS - (draft.now - last).total_seconds())  # the one that was lost has not had its last word yet
        return None
    if lost is not None and not _saves_first(draft, by_rank, lost):
        return lost
    return None


def _lost_pods(draft: Draft, by_rank: dict[int, PodView]) -> Failure | None:
    """The first of the gang's pods that is gone or being deleted. Only a gang on record has lost one: others were never made."""
    gang = draft.status.gang
    known = gang.pod_uids if gang is not None and gang.attempt == draft.status.attempt else []
    for rank, uid in enumerate(known):
        pod = by_rank.get(rank)
        if pod is None or pod.uid != uid or (pod.deleting and pod.phase != "Succeeded"):
            name = pod.name if pod is not None else names.worker_name(draft.observed.job["metadata"]["name"], rank)
            disrupted = pod is not None and pod.disrupted
            node = pod.node if pod is not None else ""
            return Failure("Disruption", "Disrupted" if disrupted else "PodDeleted", f"pod {name} was deleted", name, node)
    return None


def _saves_first(draft: Draft, by_rank: dict[int, PodView], lost: Failure) -> bool:
    """Whether a gang that lost a pod is still saving a checkpoint: SIGTERM to one of its pods makes all of them do so, and end."""
    running, answer = draft.status.condition("Running"), [p for p in by_rank.values() if p.node not in draft.observed.lost_nodes]
    if running is None or len(answer) < len(by_rank) or not any(p.phase == "Running" for p in answer):
        return False
    if running.status == "True" and any(p.deleting and p.phase == "Running" for p in answer):
        draft.set("Running", "False", STOPPING, f"{lost.message}: the gang saves a checkpoint and ends")
        draft.wait(_LOOK_AGAIN)
        return True
    since = parse_time(running.last_transition_time)
    limit = draft.settings.termination_grace_seconds + NEAR_SECONDS
    if running.reason != STOPPING or since is None or not is_within(limit, since, draft.now):
        return False
    draft.wait(_LOOK_AGAIN)
    if any(p.deleting for p in answer):
        return True
    # the pod has ended, and the others should have ended with it
    near = timedelta(seconds=NEAR_SECONDS)
    draft.status.retry_after = draft.status.retry_after or rfc3339(draft.now + near)
    until = parse_time(draft.status.retry_after)
    return until is not None and is_within(NEAR_SECONDS, until - near, draft.now)


def end_attempt(draft: Draft, spec: FineTuneJobSpec, failure: Failure) -> None:
    """Decide between failing the job and another attempt.

    Only the status changes here: the pods of the ended attempt are deleted in the next pass, when the decision is
    on record, so an operator that dies in between neither counts it twice nor forgets it.
    """
    status, policy = draft.status, spec.run_policy
    action, rule = action_for(failure, policy.failure_policy)
    message = failure.message + (f" (runPolicy.failurePolicy rule {rule}: {action})" if rule is not None else "")
    ending = failure.reason if action == "FailJob" else None
    if failure.cause == "OutOfMemory" and action != "FailJob" and not _halve_batch(draft):
        ending = "OutOfMemory"
        estimate = (
            f" (estimated: {status.plan.estimated_memory_per_gpu} per GPU)" if status.plan and status.plan.estimated_memory_per_gpu else ""
        )
        message = (
            f"the smallest per-device batch does not fit{estimate}: lower hyperparameters.maxLength, set gradientCheckpointing, "
            f"or use more or larger GPUs. {message}"
        )
    counted = action == "RestartGang"
    if counted:
        if _progressed(draft):
            status.restarts_counted = 0
        if status.restarts_counted >= policy.max_restarts and ending is None:
            ending = "TooManyRestarts"
            message = (
                f"failed after {status.restarts_counted} restarts without a new checkpoint between them (runPolicy.maxRestarts). {message}"
            )
    if ending is not None:
        account(draft, spec)
        draft.set("Trained", "False", ending, message)
        draft.fail(ending, message)
        return
    next_attempt(draft, spec, failure, message, counted=counted)
    if failure.reason == GANG_TIMEOUT:
        draft.set("Admitted", "False", GANG_TIMEOUT, message)
    elif failure.reason.startswith(DEACTIVATED):  # whoever did that does not want it to begin anew by itself
        told = f"{message}; suspend and resume the job (runPolicy.suspend) to let it wait in Kueue's queue again"
        draft.set("Admitted", "False", DEACTIVATED, told)


def _progressed(draft: Draft) -> bool:
    """Whether a newer checkpoint was saved since the last restart that counted: the budget refills."""
    saved = draft.status.checkpoint
    last = next((r for r in reversed(draft.status.restarts) if r.counted), None)
    return saved is not None and last is not None and saved.step > (last.checkpoint_step or 0)


def next_attempt(draft: Draft, spec: FineTuneJobSpec, failure: Failure, message: str, *, counted: bool = False) -> None:
    """Put the end of this attempt on record and set the next one up."""
    status = draft.status
    account(draft, spec)
    saved = status.checkpoint.step if status.checkpoint is not None else None
    if failure.cause != "Stopped":  # on request: the gang saves a checkpoint now
        status.usage.lost_seconds += lost_seconds(draft)
    status.restarts = [
        *status.restarts,
        Restart(
            attempt=status.attempt,
            cause=failure.cause,
            reason=failure.reason,
            pod=failure.pod,
            node=failure.node,
            checkpoint_step=saved,
            message=printable(shortened(message, 2000)),
            time=rfc3339(draft.now),
            counted=counted,
        ),
    ][-_RESTARTS_KEPT:]
    status.restarts_counted += counted
    draft.more_follows = False
    status.attempt += 1
    status.gang = None
    status.progress = None
    if status.checkpoint is not None:  # the next attempt says where it began
        status.checkpoint = status.checkpoint.model_copy(update={"resumed_from": None, "skipped": []})
    delay = draft.backoff(status.restarts_counted if counted else _same_in_a_row(status.restarts))
    status.retry_after = rfc3339(draft.now + timedelta(seconds=delay)) if delay else None
    step = f"checkpoint at step {status.checkpoint.step}" if status.checkpoint else "the start"
    step = "the checkpoint that is being saved" if failure.cause == "Stopped" else step
    draft.set("Running", "False", failure.reason, message)
    draft.event(
        "Normal" if failure.cause == "Stopped" else "Warning", "GangRestarted", f"attempt {status.attempt} goes on from {step}: {message}"
    )
    draft.phase("Starting")
    draft.wait(delay or 1)


def _same_in_a_row(restarts: list[Restart]) -> int:
    """How often the last reason came without a checkpoint in between."""
    last = restarts[-1]
    count = 0
    for restart in reversed(restarts):
        if (restart.reason, restart.checkpoint_step) != (last.reason, last.checkpoint_step):
            break
        count += 1
    return count


def _halve_batch(draft: Draft) -> bool:
    plan = draft.status.plan
    if plan is None or plan.per_device_batch_size % 2:
        return False
    draft.status.plan = plan.model_copy(
        update={
            "per_device_batch_size": plan.per_device_batch_size // 2,
            "gradient_accumulation": plan.gradient_accumulation * 2,
            "reason": "the per-device batch was halved after running out of memory; the global batch is the same",
        }
    )
    return True


def manifest_of(draft: Draft, spec: FineTuneJobSpec, rank: int) -> Manifest:
    """The worker pod of a rank in this attempt."""
    status = draft.status
    assert status.plan is not None
    return worker(draft.job_ref(spec), draft.settings, status.plan, rank, status.attempt, draft.observed.suspect_nodes, status.admission)


def create_missing(draft: Draft, spec: FineTuneJobSpec, by_rank: dict[int, PodView]) -> bool:
    """Make the pods that are not there yet, all at once. Returns whether any was missing."""
    headless = service(draft.job_ref(spec))
    key = ("Service", headless["metadata"]["name"])
    if draft.observed.applied.get(key) != headless["metadata"]["annotations"][names.ANNOTATION_HASH]:
        draft.actions.append(Apply(headless))
    missing = [rank for rank in range(draft.nodes(spec)) if rank not in by_rank]
    draft.actions.extend(Create(manifest_of(draft, spec, rank)) for rank in missing)
    return bool(missing)


def _follow(draft: Draft, spec: FineTuneJobSpec, by_rank: dict[int, PodView]) -> None:
    status = draft.status
    started = [p for p in by_rank.values() if p.running or p.phase in ("Running", "Succeeded")]
    if len(started) == draft.nodes(spec):
        if not status.is_true("Running"):
            draft.event("Normal", "GangRunning", f"attempt {status.attempt}: all {len(started)} worker(s) are running")
        draft.set("Running", "True", "GangRunning", f"all {len(started)} worker(s) are running")
        if status.gang is not None and status.gang.running_since is None:
            status.gang = status.gang.model_copy(update={"running_since": rfc3339(draft.now)})
        draft.phase("Training")
        return
    draft.phase("Starting")
    trouble = why_not_running(list(by_rank.values()))
    reason, message = trouble or ("Starting", f"{len(started)} of {draft.nodes(spec)} worker(s) running")
    if trouble is not None and (old := status.condition("Running")) is not None and old.reason != reason:
        draft.event("Warning", reason, message)
    draft.set("Running", "False", reason, message)
    if status.gang is None:
        return
    begun = parse_time(status.gang.started_at) or draft.now
    limit, which = seconds(spec.run_policy.gang_timeout), "runPolicy.gangTimeout"
    planned = status.admission is not None and status.admission.planned_nodes
    if reason == "Unschedulable" and planned and limit > _TAKEN_SECONDS:  # no node is on its way, and half a gang holds GPUs in vain
        limit, which = _TAKEN_SECONDS, "somebody else took its place"
    left = (begun + timedelta(seconds=limit) - draft.now).total_seconds()
    if left > 0:
        draft.wait(left)
        return
    text = f"gang not running after {human_duration(limit)} ({which}), its resources are given back: {message}"
    end_attempt(draft, spec, Failure("Disruption", GANG_TIMEOUT, text, ""))


def _report(draft: Draft) -> None:
    report = draft.observed.report
    if report is None or report.attempt != draft.status.attempt:
        return
    old = draft.status.progress
    if old is not None and report.step < old.step:
        return
    draft.status.progress = progress_of(report, rfc3339(draft.observed.reported_at or draft.now))
    known = draft.status.checkpoint
    if report.checkpoint_step is not None and (known is None or report.checkpoint_step > known.step):
        _checkpoint(draft, report.checkpoint_step, rfc3339(draft.observed.reported_at or draft.now))
    if draft.status.checkpoint is not None:
        details: dict[str, object] = {"resumed_from": report.resumed_from, "skipped": report.skipped_checkpoints}
        if report.checkpoint_every is not None:
            details["every"] = human_duration(report.checkpoint_every)
        if report.skipped_checkpoints and draft.status.checkpoint.skipped != details["skipped"]:
            steps = ", ".join(map(str, report.skipped_checkpoints))
            draft.event(
                "Warning",
                "CheckpointSkipped",
                f"attempt {report.attempt} goes on from step {report.resumed_from}: the checkpoint(s) of step {steps} are incomplete or damaged",
            )
        draft.status.checkpoint = draft.status.checkpoint.model_copy(update=details)


def _finish(draft: Draft, spec: FineTuneJobSpec, rank_zero: PodView) -> StageResult | None:
    result = read_stage_result(rank_zero.message)
    if result is None:
        failure = Failure(
            "Infrastructure", "NoResult", f"pod {rank_zero.name} ended without a result (exit {ExitCode.DONE})", rank_zero.name
        )
        end_attempt(draft, spec, failure)
        return None
    account(draft, spec)
    draft.set("Running", "False", "Completed", "all workers have ended")
    return result
