"""PURE: raw API objects -> the few fields that decisions need. Knows nothing of what follows from them."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from finetune_api import names
from finetune_api.base import shortened

from .job import ChildJobView, PodView
from .times import parse_time

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_EPOCH = datetime.fromtimestamp(0, UTC)


def _owner(raw: dict[str, Any]) -> tuple[str, str]:
    """(UID, kind) of the controlling owner, or empty ones. Ownership is by UID: labels can be set by anyone."""
    for reference in raw["metadata"].get("ownerReferences") or ():
        if reference.get("controller"):
            return str(reference.get("uid", "")), str(reference.get("kind", ""))
    return "", ""


def owner_uid(raw: dict[str, Any]) -> str:
    """UID of the controlling owner, or empty."""
    return _owner(raw)[0]


def _number(labels: dict[str, str], label: str) -> int:
    value = labels.get(label, "")
    return int(value) if value.isdigit() and len(value) < 10 else 0


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None


def _eviction(reason: str) -> str:
    """Kueue's reason for taking pods away (Preempted, ClusterQueueStopped, ...), from that of the pod's condition."""
    return re.sub(r"[^A-Za-z0-9_]", "", reason.removeprefix("WorkloadEvictedDueTo"))[:128] or "Evicted"


def pod_view(raw: dict[str, Any]) -> PodView:
    """A pod."""
    metadata, status = raw["metadata"], raw.get("status") or {}
    labels = metadata.get("labels") or {}
    owner, owner_kind = _owner(raw)
    container: dict[str, Any] = next(iter(status.get("containerStatuses") or ()), {})
    state = container.get("state") or {}
    ended, waiting = state.get("terminated") or {}, state.get("waiting") or {}
    conditions = {c.get("type"): c for c in status.get("conditions") or ()}
    scheduled = conditions.get("PodScheduled") or {}
    stopped = found if (found := conditions.get("TerminationTarget") or {}).get("status") == "True" else {}
    return PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        namespace=str(metadata.get("namespace") or ""),
        owner=owner,
        owner_kind=owner_kind,
        job_name=str(labels.get(names.LABEL_JOB, "")),
        stage=str(labels.get(names.LABEL_STAGE, "")),
        attempt=_number(labels, names.LABEL_ATTEMPT),
        rank=_number(labels, names.LABEL_RANK),
        job_uid=owner if owner_kind == "Job" else "",
        phase=str(status.get("phase") or "Pending"),
        created=parse_time(metadata.get("creationTimestamp")) or _EPOCH,
        deleting=bool(metadata.get("deletionTimestamp")),
        running="running" in state or bool(ended),
        started=parse_time((state.get("running") or {}).get("startedAt")),
        exit_code=_whole(ended.get("exitCode")),
        finished=parse_time(ended.get("finishedAt")),
        reason=str(status.get("reason") or ended.get("reason") or ""),  # an evicted pod's container only says Error
        message=str(ended.get("message") or status.get("message") or ""),
        waiting_reason=str(waiting.get("reason") or ""),
        waiting_message=str(waiting.get("message") or ""),
        unschedulable=str(scheduled.get("message") or "") if scheduled.get("status") == "False" else "",
        node=str((raw.get("spec") or {}).get("nodeName") or ""),
        admission=str((metadata.get("annotations") or {}).get(names.ANNOTATION_ADMISSION, "")),
        seal=str((metadata.get("annotations") or {}).get(names.ANNOTATION_SEAL, "")),
        disrupted=bool(stopped) or (conditions.get("DisruptionTarget") or {}).get("status") == "True",
        eviction=_eviction(str(stopped.get("reason") or "")) if stopped else "",
        eviction_message=shortened(str(stopped.get("message") or ""), 1000),
        queue=str(labels.get(QUEUE_LABEL, "")),
        priority=_whole((raw.get("spec") or {}).get("priority")) or 0,
        ip=str(status.get("podIP") or ""),
        ready=(conditions.get("Ready") or {}).get("status") == "True",
        restarts=sum(_whole(c.get("restartCount")) or 0 for c in status.get("containerStatuses") or ()),
        version=str((metadata.get("annotations") or {}).get(names.ANNOTATION_VERSION, "")),
        init_message=_failed_init(status),
    )


def _failed_init(status: dict[str, Any]) -> str:
    """The last words of an init container that has not succeeded; empty where none has failed."""
    for container in status.get("initContainerStatuses") or ():
        for state in (container.get("state") or {}, container.get("lastState") or {}):
            if (ended := state.get("terminated") or {}).get("exitCode"):
                return str(ended.get("message") or "")
            if ended:
                break  # it has succeeded since
    return ""


def job_view(raw: dict[str, Any]) -> ChildJobView:
    """A child Job."""
    metadata = raw["metadata"]
    conditions = {c.get("type"): c for c in (raw.get("status") or {}).get("conditions") or () if c.get("status") == "True"}
    return ChildJobView(
        name=metadata["name"],
        uid=metadata["uid"],
        stage=str((metadata.get("labels") or {}).get(names.LABEL_STAGE, "")),
        created=parse_time(metadata.get("creationTimestamp")) or _EPOCH,
        complete="Complete" in conditions,
        failed="Failed" in conditions,
        message=str((conditions.get("Failed") or {}).get("message") or ""),
        suspended=bool((raw.get("spec") or {}).get("suspend")),
        deleting=bool(metadata.get("deletionTimestamp")),
    )
