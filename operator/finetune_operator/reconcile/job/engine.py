"""reconcile(): where a job stands and what comes next. Knows nothing of how anything is carried out.

Level-triggered: every call derives the next step from what is observed, so it may run twice, late, or after any
crash. A decision that deletes evidence is put into the status first and acted on in the next pass.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar, get_args

from finetune_api.base import APIModel
from finetune_api.contract import RESTORED, Prepared, Published, Stage, StageResult, TrainingResult
from finetune_api.evaluation_status import PROMPTING_MAY_DO, EvaluationStatus
from finetune_api.gating import shut_gate
from finetune_api.scalars import human_duration, seconds
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import CheckpointStatus, ConditionType, FineTuneJobStatus, Progress
from finetune_api.validation import InvalidDocument, parse_spec

from ...model.job import Observed
from ...model.times import parse_time, rfc3339
from ...resources.shared import digests, shared
from ...settings import Settings
from ..plan import Apply, Delete, Plan
from .admission import admitted, fit_plan
from .draft import Draft
from .external_queue import admitted_externally
from .failures import Failure
from .gang import drop_stale, next_attempt, note_checkpoints, release, run_gang
from .immutability import REASON, REMOTE_CODE_REFUSED, as_accepted
from .kueue import DEACTIVATED, keep_place
from .models import versions_recorded, with_models
from .stages import run_stage
from .usage import workers
from .waiting import end_wait


def reconcile(observed: Observed, settings: Settings) -> Plan[FineTuneJobStatus]:
    """Decide the next actions and the status of one job. Pure."""
    metadata = observed.job["metadata"]
    if metadata.get("deletionTimestamp"):
        return Plan()  # the garbage collector takes everything that the job owns
    draft = Draft(observed, settings)
    if draft.status.finished:
        return _after_the_end(draft)
    draft.status.started_at = draft.status.started_at or rfc3339(observed.now)
    try:
        spec = observed.spec or parse_spec(observed.job.get("spec"), strict=False)
    except InvalidDocument as failure:
        if observed.accepted is not None:
            return _invalid_change(draft, observed.accepted, failure)
        draft.set("Accepted", "False", "InvalidSpec", str(failure))
        draft.fail("InvalidSpec", str(failure))
        release(draft)
        return draft.plan()
    if spec.runs_remote_code and not settings.allows_remote_code(str(metadata.get("namespace"))):
        message = f"model.trustRemoteCode {REMOTE_CODE_REFUSED}"
        draft.set("Accepted", "False", "RemoteCodeNotAllowed", message)
        draft.fail("RemoteCodeNotAllowed", message)
        release(draft)
        return draft.plan()
    return _go_on(draft, as_accepted(draft, spec))


def _invalid_change(draft: Draft, kept: FineTuneJobSpec, failure: InvalidDocument) -> Plan[FineTuneJobStatus]:
    """A running job is not ended by a change that cannot be read: it goes on as it was."""
    message = f"the changed spec is not valid and ignored, the job goes on as it was: {failure}"
    draft.set("Accepted", "True", REASON, message)
    return _go_on(draft, kept)


def _go_on(draft: Draft, spec: FineTuneJobSpec | None) -> Plan[FineTuneJobStatus]:
    if spec is None:
        return draft.plan()
    note_checkpoints(draft)
    keep_place(draft, spec)
    draft.status.total_gpus = draft.nodes(spec) * spec.distribution.gpus_per_node
    if not _cancelled(draft, spec) and not _past_deadline(draft, spec) and not _suspended(draft, spec):
        _walk(draft, spec)
    if draft.status.finished:
        release(draft)
    return draft.plan()


def refused(observed: Observed, settings: Settings, message: str) -> Plan[FineTuneJobStatus]:
    """Say that the API server refused an action (quota, admission, a name that is taken). Nothing else is decided."""
    draft = Draft(observed, settings)
    if draft.status.finished:
        return Plan()
    known = draft.status.condition("Accepted")
    text = f"the API server refused, tried again with back-off: {message}"
    draft.set("Accepted", "True", "APIRefused", text)
    if known is None or known.message != text:
        draft.event("Warning", "APIRefused", message)
    return draft.plan()


def unreadable(observed: Observed, settings: Settings, problem: str) -> Plan[FineTuneJobStatus]:
    """Say that the job cannot be worked on as it is. Nothing else is decided: what it has, it keeps."""
    draft = Draft(observed, settings)
    if draft.status.finished:
        return Plan()
    text = f"the operator cannot work on this job as it is, and tries again with back-off: {problem}"
    draft.set("Accepted", "Unknown", "Unreadable", text)
    if draft.before.condition("Accepted") != draft.status.condition("Accepted"):
        draft.event("Warning", "Unreadable", text)
    return draft.plan()


def _walk(draft: Draft, spec: FineTuneJobSpec) -> None:
    """Prepare, train, evaluate, publish: do the first that is not done."""
    status, decision = draft.status, draft.observed.decision
    if decision is not None and decision.action == "refuse" and not status.is_true("Admitted"):
        draft.fail(decision.reason, decision.message)
        return
    if _is_restored(status):
        _end_restored(draft)
        return
    resolved = with_models(draft, spec)
    if resolved is None:
        return
    spec = resolved
    _apply_shared(draft, spec)
    may_publish = _may_publish(draft, spec)
    if status.finished or _is_restored(status):
        return
    if not status.is_true("DataReady"):
        drop_stale(draft, spec)  # planned anew: pods of the old shape would keep a place in another scheduler's line
        draft.phase("Preparing")
        prepared = _stage(draft, spec, "prepare", "DataReady", Prepared)
        if prepared is None:
            # what has just ended is put on record while the other goes on
            draft.more_follows &= status.is_true("TargetsReady") == draft.before.is_true("TargetsReady")
            return
        status.base, status.dataset, status.plan = prepared.base, prepared.dataset, prepared.plan
        draft.more_follows = True
    if not may_publish:
        draft.phase("Preparing")
        draft.more_follows &= draft.before.is_true("DataReady")
        return
    if not status.is_true("Trained"):
        if not (admitted if draft.settings.admits_itself else admitted_externally)(draft, spec):
            return
        if status.plan is None:
            draft.set("DataReady", "Unknown", "PlanLost", "the plan is not on record any more: prepare says it again")
            return
        if not fit_plan(draft, draft.nodes(spec) * max(1, spec.distribution.gpus_per_node)):
            return
        result = run_gang(draft, spec)
        if result is None:
            return
        if not _trained(draft, spec, result):
            return
    if spec.evaluation is not None and not status.is_true("Evaluated"):
        draft.phase("Evaluating")
        status.evaluation = _stage(draft, spec, "evaluate", "Evaluated", EvaluationStatus)
        if status.evaluation is None:
            return
    if (shut := shut_gate(spec, status.evaluation)) is not None:
        condition = status.condition("Evaluated")
        message = f"training succeeded, but {shut.message}: {condition.message if condition else ''}; nothing was published, the result is kept in the workspace"
        draft.set("Published", "False", shut.reason, message)
        draft.fail(shut.reason, message)
        return
    if spec.publish and not status.is_true("Published"):
        draft.phase("Publishing")
        published = _stage(draft, spec, "publish", "Published", Published)
        if published is None:
            return
        status.artifacts, status.forms = published.artifacts, published.forms
    if not versions_recorded(draft):
        return
    draft.succeed("Completed", _summary(status), event="Succeeded")


def _may_publish(draft: Draft, spec: FineTuneJobSpec) -> bool:
    """Whether the targets can take the result, as far as that can be known before GPUs are taken. Whoever was in a queue was asked."""
    status = draft.status
    if not spec.publish or status.is_true("TargetsReady") or status.condition("Admitted") is not None or status.is_true("Trained"):
        return True
    result = run_stage(draft, spec, "check", "TargetsReady")
    if result is not None:
        draft.more_follows = True
        draft.set("TargetsReady", "True", result.reason, result.message)
        if result.reason == RESTORED:
            _restored(draft, result)
    return result is not None


def _restored(draft: Draft, result: StageResult) -> None:
    """The job has ended before: its targets hold its result, whatever became of its status. It is not trained again."""
    published = _found(draft, "check", Published, result.result)
    if published is None:
        return
    draft.status.artifacts, draft.status.forms = published.artifacts, published.forms
    draft.set("Published", "True", RESTORED, result.message)
    _end_restored(draft)


def _is_restored(status: FineTuneJobStatus) -> bool:
    published = status.condition("Published")
    return published is not None and (published.status, published.reason) == ("True", RESTORED)


def _end_restored(draft: Draft) -> None:
    published = draft.status.condition("Published")
    if published is not None and versions_recorded(draft):
        draft.succeed(RESTORED, published.message, event=RESTORED)
    _stop_jobs(draft)


def _apply_shared(draft: Draft, spec: FineTuneJobSpec) -> None:
    job, applied = draft.job_ref(spec), draft.observed.applied
    wrong = {
        key
        for key, digest in digests(job, draft.settings).items()
        # a claim's spec cannot change once made: only a missing one is applied
        if (seen := applied.get(key)) is None or (seen != digest and key[0] != "PersistentVolumeClaim")
    }
    if wrong:
        every = shared(job, draft.settings)
        draft.actions.extend(Apply(manifest) for manifest in every if (manifest["kind"], manifest["metadata"]["name"]) in wrong)


def _trained(draft: Draft, spec: FineTuneJobSpec, result: StageResult) -> bool:
    status, final = draft.status, _found(draft, "train", TrainingResult, result.result)
    if final is None:
        return False
    old = status.progress or Progress()
    status.progress = old.model_copy(
        update={
            "step": final.steps,
            "total_steps": final.steps,
            "percent": 100,
            "loss": old.loss if final.loss is None else final.loss,
            "epoch": old.epoch if final.epoch is None else final.epoch,
            "tokens_per_second": old.tokens_per_second if final.tokens_per_second is None else final.tokens_per_second,
            "eta": "0s",
            "reported_at": rfc3339(draft.now),
        }
    )
    if final.checkpoint_step is not None:
        status.checkpoint = CheckpointStatus(step=final.checkpoint_step, saved_at=rfc3339(draft.now))
    draft.set("Trained", "True", result.reason, result.message)
    if spec.evaluation is not None or spec.publish:
        draft.event("Normal", "Trained", result.message)  # else its end says so
    return True


Words = TypeVar("Words", bound=APIModel)


def _stage(draft: Draft, spec: FineTuneJobSpec, stage: Stage, condition: ConditionType, model: type[Words]) -> Words | None:
    """Bring a stage forward by one step. What it found, once it has ended, with its condition set; else None."""
    result = run_stage(draft, spec, stage, condition)
    found = _found(draft, stage, model, result.result) if result is not None else None
    if result is None or found is None:
        return None
    draft.set(condition, "True", result.reason, result.message)
    doubted = result.reason == PROMPTING_MAY_DO
    draft.event("Warning" if doubted else "Normal", PROMPTING_MAY_DO if doubted else condition, result.message)
    return found


def _found(draft: Draft, stage: Stage, model: type[Words], raw: dict[str, Any]) -> Words | None:
    """What a stage says it found. The job fails when it is not what the stage of this release says: a pod wrote it."""
    try:
        return model.model_validate(raw)
    except ValueError as failure:
        draft.fail(f"{stage.capitalize()}Failed", f"{stage} ended with a result that the operator cannot read: {failure}")
        return None


def _summary(status: FineTuneJobStatus) -> str:
    parts = []
    if status.evaluation is not None and status.evaluation.metrics:
        metric = status.evaluation.metrics[0]
        parts.append(f"{metric} {status.evaluation.told(metric)}")
    if status.artifacts:
        parts.append("published to " + ", ".join(a.uri for a in status.artifacts))
    if parts:
        return "; ".join(parts)
    trained = status.condition("Trained")
    return f"{trained.message if trained is not None else 'training completed'}; the result is in the workspace"


def _cancelled(draft: Draft, spec: FineTuneJobSpec) -> bool:
    if not spec.run_policy.cancel:
        return False
    draft.fail("Cancelled", "runPolicy.cancel is true: the job has ended, its checkpoints are kept until it is deleted")
    _stop_jobs(draft)
    return True


def _past_deadline(draft: Draft, spec: FineTuneJobSpec) -> bool:
    created = parse_time(draft.observed.job["metadata"].get("creationTimestamp"))
    if spec.run_policy.active_deadline is None or created is None:
        return False
    limit = seconds(spec.run_policy.active_deadline)
    left = (created + timedelta(seconds=limit) - draft.now).total_seconds()
    if left > 0:
        draft.wait(left)
        return False
    draft.fail("DeadlineExceeded", f"not finished {human_duration(limit)} after its creation (runPolicy.activeDeadline)")
    _stop_jobs(draft)
    return True


def _suspended(draft: Draft, spec: FineTuneJobSpec) -> bool:
    if not spec.run_policy.suspend:
        if draft.status.is_true("Suspended"):
            draft.set("Suspended", "False", "Resumed", "runPolicy.suspend is false")
            draft.event("Normal", "Resumed", "runPolicy.suspend is false")
        return False
    if not draft.status.is_true("Suspended"):
        draft.set("Suspended", "True", "Suspended", "runPolicy.suspend is true")
        draft.event("Normal", "Suspended", "runPolicy.suspend is true: pods are stopped, checkpoints kept")
        if workers(draft) and not draft.status.is_true("Trained"):
            next_attempt(draft, spec, Failure("Stopped", "Suspended", "runPolicy.suspend is true", ""), "runPolicy.suspend is true")
            draft.status.retry_after = None
        known = draft.status.condition("Admitted")
        held = known is not None and (known.status == "True" or known.reason == DEACTIVATED)
        if held and not draft.status.is_true("Trained"):
            draft.set("Admitted", "False", "Suspended", "a suspended job holds nothing; it keeps its place")
        draft.status.queue = None
        for stage in get_args(Stage):
            end_wait(draft, stage)
    elif not draft.status.is_true("Trained"):
        release(draft)
    _stop_jobs(draft)
    draft.phase("Suspended")
    return True


def _stop_jobs(draft: Draft) -> None:
    """Delete child Jobs that still run. One whose pod has ended stays, with its log."""
    ended = {p.job_uid for p in draft.observed.pods if p.ended}
    for job in draft.observed.jobs:
        if not (job.complete or job.failed or job.deleting or job.uid in ended):
            draft.actions.append(Delete("Job", job.name, job.uid))


def _after_the_end(draft: Draft) -> Plan[FineTuneJobStatus]:
    """Give back what still runs, and delete the job after its TTL. The status never changes again."""
    release(draft)
    _stop_jobs(draft)
    if draft.observed.spec is not None:
        keep_place(draft, draft.observed.spec)
    actions = list(draft.actions)
    requeue = None
    finished = parse_time(draft.status.finished_at)
    policy = (draft.observed.job.get("spec") or {}).get("runPolicy") or {}
    ttl = policy.get("ttlAfterFinished") if isinstance(policy, dict) else None
    if isinstance(ttl, str) and finished is not None:
        try:
            due = finished + timedelta(seconds=seconds(ttl))
        except ValueError:
            return Plan(actions=tuple(actions))
        if due <= draft.now:
            metadata = draft.observed.job["metadata"]
            actions.append(Delete("FineTuneJob", metadata["name"], metadata["uid"]))
        else:
            requeue = due
    return Plan(actions=tuple(actions), requeue_at=requeue)
