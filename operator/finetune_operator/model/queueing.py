"""What the queue sees of the cluster, and what it decides: plain values, no I/O. Knows nothing of how either comes about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Literal

from finetune_api.queue import DEFAULT_QUEUE, FineTuneQueueSpec, UsageHistory
from finetune_api.spec.run import Toleration

IMPLICIT = ""
"""Name of the queue of all jobs in a cluster without a FineTuneQueue."""
RECOVERED = "Recovered"
"""Reason of keeping a gang whose record was wiped: quota has room for it"""
Amounts = Mapping[str, int]
"""Resource name -> amount: CPUs in thousandths, memory in bytes, extended resources in units."""


@dataclass(frozen=True, kw_only=True)
class Taint:
    """A taint that keeps pods away (NoSchedule or NoExecute)."""

    key: str
    value: str = ""
    effect: str = "NoSchedule"


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node, and what pods that are not workers of a job hold of it."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Taint, ...] = ()
    allocatable: Amounts
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Resource name -> what it says it has of it, where that is no quantity."""
    used: Amounts = field(default_factory=dict)
    away: str = ""
    """Why no pod may come now: not ready, cordoned, deleted; empty where pods may."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a job's gang needs. Equal ones fit or do not fit alike."""

    resource: str
    """What its quota is counted in: its GPUs' resource name, or cpu."""
    units: int
    """Of that, per pod."""
    pods: tuple[int, ...]
    """Numbers of pods that it can run with, the largest first."""
    per_pod: tuple[tuple[str, int], ...]
    """Everything that one pod requests."""
    selector: tuple[tuple[str, str], ...] = ()
    tolerations: tuple[tuple[str, str, str, str], ...] = ()
    """(key, operator, value, effect)"""
    topology_key: str = ""
    flavor: str = ""
    """The only one that it may have, where the rest of it has that already."""
    quota_alone: bool = False
    """Its pods may wait for nodes, each for itself: what is free there decides nothing."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # a pass over ten thousand jobs asks for it as often
        where = self.selector, self.tolerations, self.topology_key, self.flavor, self.quota_alone
        return hash((self.resource, self.units, self.pods, self.per_pod, where))


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What a job has been admitted to, or still holds while it gives way."""

    queue: str
    flavor: str
    pods: int
    units: int
    """Per pod."""
    since: datetime
    saved_at: datetime | None = None
    """When its newest checkpoint was saved, or its gang began to run."""
    bound: tuple[tuple[str, int], ...] = ()
    """(node, worker pods) of those that have a node."""
    topology: tuple[str, str] | None = None
    """(node label, value) that its pods are kept together by."""
    stopping: bool = False
    """It gives way: what it holds will be free."""

    @property
    def total(self) -> int:
        """Units in all."""
        return self.pods * self.units


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A job as the queue sees it; or an endpoint, by what its replicas hold, or by those that it wants besides."""

    uid: str
    namespace: str
    name: str
    queue: str | None
    """The queue that it names."""
    user: str = ""
    """Who created it, where the webhook has noted that."""
    priority: int = 0
    since: datetime
    """Its age, which gives it its place; a job that gave way keeps it."""
    waits_since: datetime
    """Since when it has waited this time."""
    request: Request
    waits: bool
    """It is ready to take its GPUs now."""
    allocation: Allocation | None = None
    has_run: bool = False
    """It was admitted before: some node could hold its pods."""
    serves: bool = False
    """Replicas of an endpoint: each may start for itself, and they give way to nobody."""
    recovers: bool = False
    """It runs without a record of its admission, which was wiped: what it holds is the operator's own word, to be checked against quota."""

    @property
    def label(self) -> str:
        """namespace/name."""
        return f"{'endpoint ' if self.serves else ''}{self.namespace}/{self.name}"

    @property
    def owners(self) -> tuple[str, ...]:
        """Whose limits it counts towards."""
        return (f"namespace {self.namespace}", *([f"user {self.user}"] if self.user else []))


@dataclass(frozen=True, kw_only=True)
class Queue:
    """A FineTuneQueue."""

    name: str
    spec: FineTuneQueueSpec
    history: UsageHistory = field(default_factory=UsageHistory)
    unreadable: str = ""
    """Which field of its spec cannot be read, and why: `spec` is a stand-in then, of which nothing is given away."""


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """What of a namespace matters to queues."""

    labels: Mapping[str, str] = field(default_factory=dict)
    queue: str | None = None
    """Its default queue."""


def may_use(queue: Queue, home: Namespace | None) -> bool:
    """Whether a queue is for the jobs of a namespace."""
    selector = queue.spec.namespace_selector
    return selector is None or (home is not None and selector.selects(dict(home.labels)))


def name_of_queue(named: str | None, home: Namespace | None) -> str:
    """The queue of what names this one, or none, where there are queues: the named one, that of its namespace, the default."""
    return named or (home.queue if home is not None else None) or DEFAULT_QUEUE


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything that a decision depends on."""

    now: datetime
    workloads: tuple[Workload, ...]
    queues: tuple[Queue, ...] = ()
    nodes: tuple[Node, ...] | None = None
    """None when they were not looked at: quota alone decides then."""
    missing: tuple[Node, ...] = ()
    """Nodes that were there and are no more, or have less now, as they were; `away` says which."""
    namespaces: Mapping[str, Namespace] = field(default_factory=dict)
    forbidden: tuple[str, ...] = ()
    """What the operator may not list, and would have to see: nobody is admitted then."""
    unlimited: bool = False
    """Nothing is counted (queueing.backend none): everybody is admitted at once."""
    autoscaled: bool = False
    """Without a FineTuneQueue: nodes come when pods wait, so gangs need not fit on those that are there."""


@dataclass(frozen=True, kw_only=True)
class Admission:
    """A gang's right to its GPUs."""

    queue: str
    flavor: str
    pods: int
    node_labels: tuple[tuple[str, str], ...] = ()
    tolerations: tuple[Toleration, ...] = ()
    price_per_hour: float | None = None
    teraflops: float | None = None
    topology: tuple[str, str] | None = None
    """(node label, value) that the pods are kept together by."""
    place: tuple[tuple[str, int], ...] = ()
    """(node, pods): where there is room. Pods are not tied to it; the cluster's scheduler may know better."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is decided about a job."""

    action: Literal["admit", "wait", "keep", "preempt", "resize", "refuse"]
    reason: str = ""
    message: str = ""
    queue: str = IMPLICIT
    position: int = 0
    """From 1 among those that wait in its queue."""
    admission: Admission | None = None


@dataclass(frozen=True, kw_only=True)
class QueueReport:
    """What a queue's status is made from."""

    pending: int = 0
    admitted: int = 0
    used: Mapping[str, int] = field(default_factory=dict)
    """By flavor."""
    serving: Mapping[str, int] = field(default_factory=dict)
    """Of those, what endpoints hold."""
    by_namespace: Mapping[str, int] = field(default_factory=dict)
    """The same by namespace."""
    share: float = 0.0
    oldest: tuple[str, datetime] | None = None
    """(namespace/name, since when) of the job that waits longest."""


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """By the job's UID and the queue's name."""

    jobs: Mapping[str, Decision] = field(default_factory=dict)
    queues: Mapping[str, QueueReport] = field(default_factory=dict)
