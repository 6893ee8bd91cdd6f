"""What is known of a FineTuneEndpoint, its pods, and the models that it names. Knows nothing of what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from finetune_api.base import shortened
from finetune_api.contract import VERSION_REFUSED, read_stage_result
from finetune_api.endpoint import FineTuneEndpointSpec, FineTuneEndpointStatus
from finetune_api.serving import CanaryTraffic, ReplicaReport
from finetune_api.tuned_model import FineTunedModelSpec, FineTunedModelStatus, ModelVersion

from .job import PodView
from .objects import Object
from .queueing import Decision


@dataclass(frozen=True, kw_only=True)
class ReplicaPod:
    """A pod of an endpoint, or an address behind the Service of external replicas, which is its name and its UID."""

    name: str
    uid: str
    ip: str = ""
    address: str = ""
    """HOST:PORT of one that somebody else runs."""
    ready: bool = False
    """By its kubelet."""
    restarts: int = 0
    """Of its containers: what was loaded is gone with a restart."""
    problem: str = ""
    """Why it does not start, where that is known."""
    version: str = ""
    """NAME@VERSION of the whole model that it is made with."""
    refused: str = ""
    """Why its base was not let in."""


@dataclass(frozen=True, kw_only=True)
class ModelLine:
    """A FineTunedModel."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    spec: FineTunedModelSpec
    status: FineTunedModelStatus

    @property
    def champion(self) -> ModelVersion | None:
        """The version that is to answer under its name."""
        return self.status.version(self.status.champion)


@dataclass(frozen=True, kw_only=True)
class Room:
    """What the FineTuneQueue of an endpoint has said to what it holds and wants (model/endpoint_demand.py)."""

    held: Decision | None = None
    """About what it holds: where it counts now, if that is not on record."""
    wanted: Decision | None = None
    """About the replicas that it wants besides; None while nothing is decided."""
    wants: int = 0
    """How many those are."""
    moves: bool = False
    """They are not of the kind that it holds: all of them are wanted beside, and what runs stays as it is until then."""
    holding: int = 0
    """Pods that have not ended."""


@dataclass(frozen=True, kw_only=True)
class ObservedEndpoint:
    """Everything a decision may depend on."""

    endpoint: Object
    spec: FineTuneEndpointSpec | None
    invalid: str = ""
    """What is wrong with the spec, where it cannot be read."""
    status: FineTuneEndpointStatus = field(default_factory=FineTuneEndpointStatus)
    lines: Mapping[str, ModelLine] = field(default_factory=dict)
    """FineTunedModels of its namespace, by name; those that are being deleted are not."""
    pods: tuple[ReplicaPod, ...] = ()
    """Those that are neither ended nor being deleted. Of engine external: the replicas, by their addresses."""
    not_told_apart: str = ""
    """Of engine external: why there is one address for all replicas."""
    no_replicas: tuple[str, str] | None = None
    """Of engine external: reason and message where it cannot be known where they are."""
    reports: Mapping[str, ReplicaReport] = field(default_factory=dict)
    """By the pod's UID: what it says it serves."""
    silent: Mapping[str, str] = field(default_factory=dict)
    """By the pod's UID: why it says nothing."""
    emptied: frozenset[str] = frozenset()
    """UIDs of pods that restarted since they were last heard of: what they served is not loaded any more."""
    traffic: tuple[CanaryTraffic, ...] = ()
    """What gateways counted."""
    canaries: bool = True
    """Whether there is a gateway that gives a version its share of the requests."""
    applied: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """(kind, name) -> digest, of what was applied lately."""
    identity: str = ""
    """Secret with the replicas' certificate."""
    no_identity: str = ""
    """Why its replicas cannot be given one."""
    queue_problem: str = ""
    """Why it may not have GPUs of the queue that it names."""
    room: Room | None = None
    """None where no FineTuneQueue is asked: on CPU, and with another scheduler."""
    now: datetime

    @property
    def raw(self) -> Object:
        """The object."""
        return self.endpoint


def replica_pod(pod: PodView) -> ReplicaPod | None:
    """A pod as a replica; None where it has ended or is on its way out."""
    if pod.deleting or pod.ended:
        return None
    waiting = f"{pod.waiting_reason}: {pod.waiting_message}".rstrip(": ") if pod.waiting_reason not in _USUAL else ""
    words = read_stage_result(pod.init_message)
    said = f"{words.reason}: {words.message}" if words is not None else ""
    return ReplicaPod(
        name=pod.name,
        uid=pod.uid,
        ip=pod.ip,
        ready=pod.ready,
        restarts=pod.restarts,
        problem=shortened(pod.unschedulable or said or waiting, 500),
        version=pod.version,
        refused=shortened(words.message, 500) if words is not None and words.reason == VERSION_REFUSED else "",
    )


_USUAL = ("", "ContainerCreating", "PodInitializing")
