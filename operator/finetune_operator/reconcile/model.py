"""What is observed and what is planned: plain values, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Literal

from finetune_api.contract import ProgressReport
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus

from ..queueing.model import Verdict

Object = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PodView:
    """A pod of the job, whose ownership was checked by UID."""

    name: str
    uid: str
    stage: str
    attempt: int = 0
    rank: int = 0
    job_uid: str = ""
    """UID of the child Job that owns it; empty for workers."""
    phase: str = "Pending"
    created: datetime
    deleting: bool = False
    running: bool = False
    """The container has started."""
    started: datetime | None = None
    exit_code: int | None = None
    finished: datetime | None = None
    reason: str = ""
    """The pod's or the container's reason: OOMKilled, Evicted, ..."""
    message: str = ""
    """The termination message, or the pod's own message."""
    waiting_reason: str = ""
    waiting_message: str = ""
    unschedulable: str = ""
    """The scheduler's message while it finds no node."""
    disrupted: bool = False
    """The DisruptionTarget condition is set, or Kueue takes it away."""
    eviction: str = ""
    """Kueue's reason for taking it away: Preempted, ClusterQueueStopped, ..."""
    eviction_message: str = ""
    queue: str = ""
    """Kueue's LocalQueue that it waits in."""
    priority: int = 0
    """Of its priority class."""
    node: str = ""
    """The node it was bound to."""
    admission: str = ""
    """What its gang was admitted to, as JSON."""


@dataclass(frozen=True, kw_only=True)
class ChildJobView:
    """A child Job of a single-pod stage."""

    name: str
    uid: str
    stage: str
    created: datetime
    complete: bool = False
    failed: bool = False
    message: str = ""
    deleting: bool = False
    suspended: bool = False
    """Kueue has not let it start yet."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Everything a decision may depend on."""

    job: Object
    spec: FineTuneJobSpec | None = None
    """The job's spec where somebody has parsed it already."""
    pods: tuple[PodView, ...] = ()
    jobs: tuple[ChildJobView, ...] = ()
    left: tuple[PodView, ...] = ()
    """Pods of stages whose Job is gone already. By label, which anyone may set: good to wait for, and for nothing else."""
    applied: dict[tuple[str, str], str] = field(default_factory=dict)
    """(kind, name) -> applied hash, of the ConfigMaps, Services and claims that the job owns."""
    report: ProgressReport | None = None
    reported_at: datetime | None = None
    accepted: FineTuneJobSpec | None = None
    """The spec that the job began with, when the present one may be another."""
    lost_nodes: frozenset[str] = frozenset()
    """Nodes of pods that are being deleted which are gone or not ready: their kubelets will not confirm anything."""
    served: str = ""
    """Kind in which another scheduler says where a gang stands (settings.queueing_backend), in the version that is served; or empty."""
    group: Object | None = None
    """What another scheduler says of what waits for it, gang or evaluation: Kueue's Workload or Volcano's PodGroup."""
    place: Object | None = None
    """Kueue's Workload that keeps the evaluation's place in line."""
    place_seen: bool = False
    """Whether it was looked for."""
    preemptor: str = ""
    """namespace/name of the Workload that Kueue took the gang's pods away for."""
    suspect_nodes: tuple[str, ...] = ()
    """Nodes that jobs kept failing on lately."""
    verdict: Verdict | None = None
    """What the scheduler has decided, unless it has not looked yet."""
    now: datetime


@dataclass(frozen=True)
class Apply:
    """Server-side apply of a ConfigMap, Service or claim."""

    manifest: Object


@dataclass(frozen=True)
class Create:
    """Create a Pod or Job; when it is there already, nothing happens."""

    manifest: Object


@dataclass(frozen=True)
class Patch:
    """Change a few fields of an object that others write, too (JSON merge patch); before anything is created."""

    kind: str
    name: str
    body: Object


@dataclass(frozen=True)
class Delete:
    """Delete an object if it is still the one that was observed."""

    kind: Literal["Pod", "Job", "Workload", "FineTuneJob"]
    name: str
    uid: str
    grace_seconds: int | None = None
    """Seconds between SIGTERM and SIGKILL; None is the pod's own, 0 takes the object away without its kubelet."""


Action = Apply | Create | Patch | Delete


@dataclass(frozen=True)
class Event:
    """A Kubernetes Event on the job."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


class Due(Enum):
    """When a status has to be on record. Whatever the next step needs there is written now."""

    NOW = "now"
    SOON = "soon"
    """Within a second: the next step is near, and one write tells both."""
    LATER = "later"
    """It only carries progress, of which a later one tells more."""


@dataclass(frozen=True)
class Plan:
    """What to do. Actions come first, then events, then the status; `status` None means: leave it."""

    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    status: FineTuneJobStatus | None = None
    before: FineTuneJobStatus | None = None
    """The status that it is derived from."""
    due: Due = Due.NOW
    """When status and events are written."""
    requeue_at: datetime | None = None


_SKEW = 60.0
"""Seconds that clocks of nodes may be ahead."""


def is_within(seconds: float, since: datetime, now: datetime) -> bool:
    """Whether it began less than so many seconds ago. What seems to lie in the future was told by a wrong clock: not waited for."""
    return -_SKEW <= (now - since).total_seconds() < seconds


def rfc3339(moment: datetime) -> str:
    """A time as the Kubernetes API writes it, whole seconds in UTC."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str | None) -> datetime | None:
    """A time from the Kubernetes API, or None when absent or unreadable."""
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
