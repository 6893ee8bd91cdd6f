"""The gang: starts together, fails together, restarts together from the last checkpoint."""

from __future__ import annotations

from datetime import timedelta

from finetune_api import names
from finetune_api.contract import PEER_LOST, ExitCode, StageResult, progress_of, read_stage_result
from finetune_api.scalars import human_duration, seconds
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import CheckpointStatus, Gang, Restart

from ..resources.gang import service, worker
from .draft import Draft
from .failures import NEAR_SECONDS, Failure, first_failure
from .model import Apply, Create, Delete, PodView, parse_time, rfc3339
from .stages import why_not_running

_RESTARTS_KEPT = 20


def workers(draft: Draft) -> list[PodView]:
    """All worker pods, of every attempt."""
    return [p for p in draft.observed.pods if p.stage == "train"]


def release(draft: Draft) -> bool:
    """Delete every worker pod that may still hold GPUs. Returns whether none is left."""
    left = [p for p in workers(draft) if p.phase not in ("Succeeded", "Failed")]
    draft.actions.extend(Delete("Pod", p.name, p.uid) for p in left if not p.deleting)
    return not left


def run_gang(draft: Draft, spec: FineTuneJobSpec) -> StageResult | None:
    """Bring the gang forward by one step. Returns rank 0's result when all workers succeeded, else None."""
    status, nodes = draft.status, spec.distribution.nodes
    pods = workers(draft)
    # pods know their attempt: a status that was wiped does not make the count start again
    status.attempt = max([status.attempt, *(p.attempt for p in pods)])
    stale = [p for p in pods if p.attempt < status.attempt or p.rank >= nodes]
    if stale:
        draft.actions.extend(Delete("Pod", p.name, p.uid) for p in stale if not p.deleting)
        draft.phase("Starting")
        return None
    by_rank = {p.rank: p for p in pods}

    if len(by_rank) == nodes and all(p.phase == "Succeeded" for p in pods):
        return _finish(draft, spec, by_rank[0])
    failure = _failure(draft, by_rank)
    if failure is not None:
        end_attempt(draft, spec, failure)
        return None
    after = parse_time(status.retry_after)
    if after is not None and after > draft.now:
        draft.phase("Queued")
        draft.requeue.append(after)
        return None
    status.retry_after = None
    _start_missing(draft, spec, by_rank)
    _follow(draft, spec, by_rank)
    return None


def _failure(draft: Draft, by_rank: dict[int, PodView]) -> Failure | None:
    failed = [p for p in by_rank.values() if p.phase == "Failed"]
    if failed:
        failure = first_failure(failed)
        age = (draft.now - max(p.finished or p.created for p in failed)).total_seconds()
        if failure.reason != PEER_LOST or len(failed) == len(by_rank) or age >= NEAR_SECONDS:
            return failure
        draft.wait(NEAR_SECONDS - age)  # the one that was lost has not had its last word yet
        return None
    gang = draft.status.gang
    known = gang.pod_uids if gang is not None and gang.attempt == draft.status.attempt else []
    for rank, uid in enumerate(known):
        pod = by_rank.get(rank)
        if pod is None or pod.uid != uid or (pod.deleting and pod.phase != "Succeeded"):
            name = pod.name if pod is not None else names.worker_name(draft.observed.job["metadata"]["name"], rank)
            disrupted = pod is not None and pod.disrupted
            return Failure("Disruption", "Disrupted" if disrupted else "PodDeleted", f"pod {name} was deleted", name)
    return None


def end_attempt(draft: Draft, spec: FineTuneJobSpec, failure: Failure) -> None:
    """Decide between failing the job and another attempt.

    Only the status changes here: the pods of the ended attempt are deleted in the next pass, when the decision is
    on record, so an operator that dies in between neither counts it twice nor forgets it.
    """
    status = draft.status
    message = failure.message
    if failure.kind == "UserError":
        _account(draft, spec)
        draft.set("Trained", "False", failure.reason, message)
        draft.fail(failure.reason, message)
        return
    if failure.kind == "OutOfMemory" and not _halve_batch(draft):
        _account(draft, spec)
        advice = "the smallest per-device batch does not fit: lower hyperparameters.maxLength, set gradientCheckpointing, or use more or larger GPUs"
        draft.set("Trained", "False", "OutOfMemory", f"{advice}. {message}")
        draft.fail("OutOfMemory", f"{advice}. {message}")
        return
    if failure.counted and status.restarts_counted >= spec.run_policy.max_restarts:
        _account(draft, spec)
        draft.set("Trained", "False", "TooManyRestarts", message)
        draft.fail("TooManyRestarts", f"failed after {status.restarts_counted} restarts (runPolicy.maxRestarts). {message}")
        return
    _account(draft, spec)
    next_attempt(draft, failure)


def next_attempt(draft: Draft, failure: Failure) -> None:
    """Put the end of this attempt on record and set the next one up."""
    status = draft.status
    status.restarts = [
        *status.restarts,
        Restart(
            attempt=status.attempt,
            reason=failure.reason if failure.reason in ("PodDeleted", "GangTimeout", "Suspended") else failure.kind,
            pod=failure.pod,
            message=failure.message[:2000],
            time=rfc3339(draft.now),
            counted=failure.counted,
        ),
    ][-_RESTARTS_KEPT:]
    status.restarts_counted += 1 if failure.counted else 0
    status.attempt += 1
    status.gang = None
    status.progress = None
    in_a_row = status.restarts_counted if failure.counted else sum(r.reason == failure.reason for r in status.restarts)
    delay = draft.backoff(in_a_row)
    status.retry_after = rfc3339(draft.now + timedelta(seconds=delay)) if delay else None
    step = f"checkpoint at step {status.checkpoint.step}" if status.checkpoint else "the start"
    draft.set("Running", "False", failure.reason, failure.message)
    draft.event("Warning", "GangRestarted", f"attempt {status.attempt} goes on from {step}: {failure.message}")
    draft.phase("Starting")
    draft.wait(delay or 1)


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


def _start_missing(draft: Draft, spec: FineTuneJobSpec, by_rank: dict[int, PodView]) -> None:
    status, job = draft.status, draft.job_ref(spec)
    assert status.plan is not None
    missing = [rank for rank in range(spec.distribution.nodes) if rank not in by_rank]
    headless = service(job)
    key = ("Service", headless["metadata"]["name"])
    if draft.observed.applied.get(key) != headless["metadata"]["annotations"][names.ANNOTATION_HASH]:
        draft.actions.append(Apply(headless))
    if missing:
        draft.actions.extend(Create(worker(job, draft.settings, status.plan, rank, status.attempt)) for rank in missing)
        draft.phase("Starting")
        draft.wait(5)
    elif status.gang is None or status.gang.attempt != status.attempt:
        status.gang = Gang(
            attempt=status.attempt,
            pod_uids=[by_rank[rank].uid for rank in sorted(by_rank)],
            started_at=rfc3339(min(p.created for p in by_rank.values())),
        )
        pods = "1 worker pod" if len(by_rank) == 1 else f"{len(by_rank)} worker pods"
        draft.event(
            "Normal", "GangCreated", f"attempt {status.attempt}: {pods} of {max(1, spec.distribution.gpus_per_node)} process(es) each"
        )


def _follow(draft: Draft, spec: FineTuneJobSpec, by_rank: dict[int, PodView]) -> None:
    status = draft.status
    started = [p for p in by_rank.values() if p.running or p.phase in ("Running", "Succeeded")]
    if len(started) == spec.distribution.nodes:
        if not status.is_true("Running"):
            draft.event("Normal", "GangRunning", f"attempt {status.attempt}: all {len(started)} worker(s) are running")
        draft.set("Running", "True", "GangRunning", f"all {len(started)} worker(s) are running")
        draft.phase("Training")
        _report(draft)
        return
    draft.phase("Starting")
    trouble = why_not_running(list(by_rank.values()))
    reason, message = trouble or ("Starting", f"{len(started)} of {spec.distribution.nodes} worker(s) running")
    if trouble is not None and (old := status.condition("Running")) is not None and old.reason != reason:
        draft.event("Warning", reason, message)
    draft.set("Running", "False", reason, message)
    if status.gang is None:
        return
    begun = parse_time(status.gang.started_at) or draft.now
    left = (begun + timedelta(seconds=seconds(spec.run_policy.gang_timeout)) - draft.now).total_seconds()
    if left > 0:
        draft.wait(left)
        return
    waited = human_duration(seconds(spec.run_policy.gang_timeout))
    text = f"gang not running after {waited} (runPolicy.gangTimeout), its resources are given back: {message}"
    _account(draft, spec)
    next_attempt(draft, Failure("Disruption", "GangTimeout", text, ""))


def _report(draft: Draft) -> None:
    report = draft.observed.report
    if report is None or report.attempt != draft.status.attempt:
        return
    old = draft.status.progress
    if old is not None and report.step < old.step:
        return
    draft.status.progress = progress_of(report, rfc3339(draft.observed.reported_at or draft.now))
    known = draft.status.checkpoint.step if draft.status.checkpoint else -1
    if report.checkpoint_step is not None and report.checkpoint_step > known:
        draft.status.checkpoint = CheckpointStatus(step=report.checkpoint_step, saved_at=rfc3339(draft.now))


def _finish(draft: Draft, spec: FineTuneJobSpec, rank_zero: PodView) -> StageResult | None:
    result = read_stage_result(rank_zero.message)
    if result is None:
        failure = Failure(
            "Infrastructure", "NoResult", f"pod {rank_zero.name} ended without a result (exit {ExitCode.DONE})", rank_zero.name
        )
        end_attempt(draft, spec, failure)
        return None
    _account(draft, spec)
    draft.set("Running", "False", "Completed", "all workers have ended")
    return result


def _account(draft: Draft, spec: FineTuneJobSpec) -> None:
    gang = draft.status.gang
    begun = parse_time(gang.started_at) if gang is not None else None
    if begun is None or not spec.distribution.gpus_per_node:
        return
    ends = [p.finished for p in workers(draft) if p.finished is not None]
    held = max(0.0, ((max(ends) if ends else draft.now) - begun).total_seconds())
    draft.status.usage.gpu_seconds += round(held * spec.distribution.nodes * spec.distribution.gpus_per_node)
