"""What of a spec may change while its job runs, and what the job goes on with when something else was changed."""

from __future__ import annotations

from typing import Any

from finetune_api.spec import FineTuneJobSpec

from .draft import Draft

REASON = "ChangeIgnored"
REMOTE_CODE_REFUSED = (
    "runs code of the model's repository, which an administrator has not allowed for this namespace "
    "(chart value trainer.remoteCodeNamespaces); set it to false or use a model without code of its own"
)


def _frozen(spec: FineTuneJobSpec) -> dict[str, Any]:
    """The blocks that are fixed once a job has begun."""
    wire: dict[str, Any] = spec.to_wire()
    wire.pop("runPolicy", None)
    for field in ("queue", "priorityClassName"):
        wire.get("scheduling", {}).pop(field, None)
    return wire


def ignored_changes(kept: FineTuneJobSpec, wanted: FineTuneJobSpec) -> str:
    """What to say of changes to blocks that are fixed once a job has begun; empty when there are none."""
    before, now = _frozen(kept), _frozen(wanted)
    changed = sorted(block for block in {*before, *now} if before.get(block) != now.get(block))
    if not changed:
        return ""
    return (
        f"{', '.join(f'spec.{block}' for block in changed)} cannot change once the job has begun: ignored, it goes on as it was. "
        "Undo the change, or create another job"
    )


def as_accepted(draft: Draft, wanted: FineTuneJobSpec) -> FineTuneJobSpec:
    """The spec as the job began with it, with the present run policy, queue and priority.

    Where no webhook refuses a change, it is ignored and said so: pods that are made later must fit those that are there.
    """
    kept = draft.observed.accepted
    if kept is None:
        draft.set("Accepted", "True", "Valid", "the spec is valid")
        return wanted
    message = ignored_changes(kept, wanted)
    if message:
        old = draft.status.condition("Accepted")
        if old is None or old.message != message:
            draft.event("Warning", REASON, message)
        draft.set("Accepted", "True", REASON, message)
    else:
        draft.set("Accepted", "True", "Valid", "the spec is valid")
    return with_changes(kept, wanted)


def with_changes(kept: FineTuneJobSpec, wanted: FineTuneJobSpec) -> FineTuneJobSpec:
    """The spec that a job began with, and of the present one what may change."""
    scheduling = {"queue": wanted.scheduling.queue, "priority_class_name": wanted.scheduling.priority_class_name}
    return kept.model_copy(update={"run_policy": wanted.run_policy, "scheduling": kept.scheduling.model_copy(update=scheduling)})


def may_have_changed(job: dict[str, Any]) -> bool:
    """Whether a job's spec was written again since the operator last looked, or differs from what it began with."""
    status = job.get("status")
    if not isinstance(status, dict) or not status.get("observedGeneration"):
        return int(job["metadata"].get("generation") or 1) > 1  # changed before its first status was written, or that was wiped
    ignored = any(c.get("reason") == REASON for c in status.get("conditions") or () if isinstance(c, dict))
    return ignored or status["observedGeneration"] != job["metadata"].get("generation")
