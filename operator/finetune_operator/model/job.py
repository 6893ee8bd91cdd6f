"""What is observed and what is planned: plain values, no I/O. Knows nothing of where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from finetune_api.contract import ProgressReport
from finetune_api.spec import FineTuneJobSpec

from .objects import Object
from .queueing import Decision

if TYPE_CHECKING:
    from .tuned_model import TunedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class PodView:
    """A pod, as far as anything depends on it."""

    name: str
    uid: str
    namespace: str = ""
    owner: str = ""
    """UID of its controlling owner, or empty."""
    owner_kind: str = ""
    job_name: str = ""
    """Name of its job, by its label: to be shown, and for nothing else."""
    stage: str
    """By its label."""
    attempt: int = 0
    rank: int = 0
    job_uid: str = ""
    """UID of the Job that owns it; empty for workers."""
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
    seal: str = ""
    """That the operator wrote that (model/seal.py)."""
    ip: str = ""
    ready: bool = False
    """By its kubelet."""
    restarts: int = 0
    """Of all its containers."""
    version: str = ""
    """NAME@VERSION of the whole model that it serves, by its annotation."""
    init_message: str = ""
    """Termination message of an init container's last try, where that failed."""

    @property
    def is_worker(self) -> bool:
        """Whether it is one of the gang's: those of stages belong to Jobs."""
        return self.stage == "train" and not self.job_uid

    @property
    def ended(self) -> bool:
        """None of its containers runs, nor will again."""
        return self.phase in ("Succeeded", "Failed")


@dataclass(frozen=True, kw_only=True, slots=True)
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
    models: Mapping[str, TunedModel] = field(default_factory=dict)
    """FineTunedModels that the job names and that are there."""
    continues_from: int | None = None
    """Version that tuning.continueFrom meant when the job began, where its status does not say so any more."""
    suspect_nodes: tuple[str, ...] = ()
    """Nodes that jobs kept failing on lately."""
    decision: Decision | None = None
    """What the scheduler has decided, unless it has not looked yet."""
    now: datetime

    @property
    def raw(self) -> Object:
        """The job."""
        return self.job
