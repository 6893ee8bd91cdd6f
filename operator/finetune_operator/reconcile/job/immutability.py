"""What the job goes on with when its spec was changed: what may change, and what was refused nowhere though it may not.

API servers refuse the latter by the rules of `finetune_api.spec.transitions`. It comes here where they could not know: the
status that said so was wiped, or the definition is of another version.
Knows nothing of where it is remembered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.transitions import FROZEN, HOLDS
from finetune_api.status import StageRetry

from ...model.job import PodView
from .draft import Draft
from .failures import Failure
from .gang import next_attempt
from .models import as_written
from .usage import workers

REASON = "ChangeIgnored"
REPLANNED = "SpecChanged"
"""Reason of DataReady, and of an attempt's end, when the gang's shape was changed before it had GPUs"""
REMOTE_CODE_REFUSED = (
    "runs code of the model's repository, which an administrator has not allowed for this namespace "
    "(chart value trainer.remoteCodeNamespaces); set it to false or use a model without code of its own"
)
_PLANNED_FOR = ("distribution", "resources")
"""What prepare's plan depends on."""


def holds(status: Mapping[str, Any], pods: Iterable[PodView]) -> bool:
    """Whether the job's shape is fixed: it holds GPUs, or did to its end. A wiped status does not let a gang change that runs."""
    found = {c.get("type"): c.get("status") for c in status.get("conditions") or () if isinstance(c, Mapping)}
    alive = any(p.is_worker and not p.ended for p in pods)
    return any(found.get(type_) == "True" for type_ in HOLDS) or (alive and "Admitted" not in found)


def ignored_changes(kept: FineTuneJobSpec, wanted: FineTuneJobSpec, *, held: bool) -> str:
    """What to say of changes that come too late; empty when there are none."""
    before, now = kept.to_wire(), wanted.to_wire()
    late = [field.path for field in FROZEN if (held or not field.while_held) and field.changed(before, now)]
    if not late:
        return ""
    return f"{', '.join(late)} cannot change any more: ignored, the job goes on as it was. Undo the change, or create another job"


def as_accepted(draft: Draft, wanted: FineTuneJobSpec) -> FineTuneJobSpec | None:
    """The spec to go on with. None while a change of the gang's shape is put on record, to be acted on in the next pass."""
    kept = draft.observed.accepted
    if kept is None:
        draft.set("Accepted", "True", "Valid", "the spec is valid")
        return wanted
    kept = as_written(kept, wanted)
    held = holds(draft.before.to_wire(), draft.observed.pods)
    message = ignored_changes(kept, wanted, held=held)
    if message:
        old = draft.status.condition("Accepted")
        if old is None or old.message != message:
            draft.event("Warning", REASON, message)
        draft.set("Accepted", "True", REASON, message)
    else:
        draft.set("Accepted", "True", "Valid", "the spec is valid")
    spec = with_changes(kept, wanted, held=held)
    return None if not held and _begin_anew(draft, kept, spec) else spec


def _begin_anew(draft: Draft, kept: FineTuneJobSpec, spec: FineTuneJobSpec) -> bool:
    """Whether something was made for a gang of another shape, which is now out of date: the plan, prepare's pod, pods in a line."""
    before, now = kept.to_wire(), spec.to_wire()
    changed = [field.field for field in FROZEN if field.while_held and field.changed(before, now)]
    if not changed:
        return False
    draft.observed = dataclasses.replace(draft.observed, decision=None)  # it was made for another shape
    status, message = draft.status, f"{', '.join(f'spec.{field}' for field in changed)} changed"
    known, retry = status.condition("DataReady"), status.stages.get("prepare", StageRetry())
    if known is not None and known.reason == REPLANNED and retry.started_at is None:
        return False  # it is on record
    anew = False
    if any(p.attempt == status.attempt for p in workers(draft)):  # another scheduler has not let them start
        next_attempt(draft, kept, Failure("Stopped", REPLANNED, message, ""), message)
        status.retry_after = None
        anew = True
    begun = status.is_true("DataReady") or any(j.stage == "prepare" for j in draft.observed.jobs)
    if begun and set(changed) & set(_PLANNED_FOR):
        status.stages["prepare"] = StageRetry(retries=retry.retries, waits=retry.waits + 1)
        draft.set("DataReady", "Unknown", REPLANNED, f"{message}: prepare plans anew")
        draft.event("Normal", REPLANNED, f"{message}: prepare plans anew")
        status.plan = status.admission = status.retry_after = None
        anew = True
    return anew


def with_changes(kept: FineTuneJobSpec, wanted: FineTuneJobSpec, *, held: bool) -> FineTuneJobSpec:
    """The spec that a job began with, and of the present one what may change."""
    scheduling = wanted.scheduling
    if held:
        free = {"queue": scheduling.queue, "priority_class_name": scheduling.priority_class_name}
        scheduling = kept.scheduling.model_copy(update=free)
    shape = {} if held else {"distribution": wanted.distribution, "resources": wanted.resources}
    return kept.model_copy(update={"run_policy": wanted.run_policy, "scheduling": scheduling, **shape})


def may_have_changed(job: Mapping[str, Any]) -> bool:
    """Whether a job's spec was written again since the operator last looked, or differs from what it began with."""
    status = job.get("status")
    if not isinstance(status, dict) or not status.get("observedGeneration"):
        return int(job["metadata"].get("generation") or 1) > 1  # changed before its first status was written, or that was wiped
    ignored = any(c.get("reason") == REASON for c in status.get("conditions") or () if isinstance(c, dict))
    return ignored or status["observedGeneration"] != job["metadata"].get("generation")
