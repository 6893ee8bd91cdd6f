"""A hub or server that does not answer: the stage holds nothing meanwhile, and is tried again until runPolicy.stageTimeout is over.

What is known of the wait stands in the status, so it goes on whoever dies: the pod, the operator, or both.
Knows nothing of what the stage wants there.
"""

from __future__ import annotations

from datetime import timedelta

from finetune_api.contract import WAITING_FOR_SOURCE, ExitCode, Stage, StageResult, Unavailable, read_stage_result
from finetune_api.scalars import human_duration, printable, seconds
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ConditionType, SourceWait, StageRetry

from ...model.job import PodView
from ...model.times import is_within, parse_time, rfc3339
from .draft import RETRY_AFTER_LIMIT, Draft

ANSWER_SECONDS = 180
"""A try that has run for so long has got an answer: one that gets none ends sooner."""


def wait_for_source(draft: Draft, spec: FineTuneJobSpec, stage: Stage, condition: ConditionType, pod: PodView) -> bool:
    """Whether the pod ended because a source was away; then the next try is planned, or the job has failed."""
    if pod.exit_code != ExitCode.SOURCE_UNAVAILABLE:
        return False
    words = read_stage_result(pod.message) or StageResult(reason=WAITING_FOR_SOURCE, message=f"pod {pod.name} did not say more")
    told = _told(words)
    retry = draft.status.stages.get(stage, StageRetry())
    host = printable(told.host) or "its source"
    begun = parse_time(retry.waiting.since) if retry.waiting is not None else None
    since = min(begun or draft.now, draft.now)
    limit = seconds(spec.run_policy.stage_timeout)
    end = since + timedelta(seconds=limit)
    if draft.now >= end:
        message = f"{host} has not answered for {human_duration(limit)} (runPolicy.stageTimeout): {words.message}"
        draft.set(condition, "False", "SourceUnavailable", message)
        draft.fail(f"{stage.capitalize()}Failed", message)
        return True
    waits = retry.waits + 1
    delay = max(1.0, draft.backoff(waits + 1), min(told.retry_after_seconds or 0.0, RETRY_AFTER_LIMIT))
    following = min(draft.now + timedelta(seconds=delay), end)
    draft.more_follows = False  # the next try waits for this to be on record
    waiting = SourceWait(host=host, since=rfc3339(since))
    draft.status.stages[stage] = StageRetry(retries=retry.retries, waits=waits, waiting=waiting)
    draft.status.retry_after = rfc3339(following)
    draft.requeue.append(following)
    message = (
        f"{stage} waits for {host} since {waiting.since}; next try at {rfc3339(following)}, until {rfc3339(end)} "
        f"(runPolicy.stageTimeout): {words.message}"
    )
    draft.set(condition, "False", WAITING_FOR_SOURCE, message)
    if retry.waiting is None or retry.waiting.host != host:
        draft.event("Warning", WAITING_FOR_SOURCE, words.message)
    return True


def _told(words: StageResult) -> Unavailable:
    try:
        return Unavailable.model_validate(words.result)
    except ValueError:  # a pod wrote it
        return Unavailable()


def may_still_wait(draft: Draft, pods: list[PodView]) -> bool:
    """Whether a try that runs may yet end for the same cause, so that its condition stays."""
    begun = min(p.started or p.created for p in pods)
    waits = is_within(ANSWER_SECONDS, begun, draft.now)
    if waits:
        draft.wait((begun + timedelta(seconds=ANSWER_SECONDS) - draft.now).total_seconds())
    return waits


def end_wait(draft: Draft, stage: Stage) -> None:
    """The stage has its source, or is stopped: a later wait is counted anew."""
    retry = draft.status.stages.get(stage)
    if retry is not None and retry.waiting is not None:
        draft.status.stages[stage] = retry.model_copy(update={"waiting": None})
