"""What is to be done about one object: plain values. Whoever carries them out knows no more of it than they say."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, Generic, Literal

from typing_extensions import TypeVar

from finetune_api.status import Status

from ..model.objects import Object


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
    """A Kubernetes Event on the object."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str
    series: int = 0
    """What sets it apart from one that says the same: a job's attempt"""


class WriteUrgency(Enum):
    """When a status has to be on record. Whatever the next step needs there is written now."""

    NOW = "now"
    SOON = "soon"
    """Within a second: the next step is near, and one write tells both."""
    LATER = "later"
    """It only carries progress, of which a later one tells more."""


S = TypeVar("S", bound=Status, default=Any)


@dataclass(frozen=True)
class Plan(Generic[S]):
    """What to do. Actions come first, then the status, then events; `status` None means: leave it."""

    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    status: S | None = None
    before: S | None = None
    """The status that it is derived from."""
    due: WriteUrgency = WriteUrgency.NOW
    """When status and events are written."""
    waits_anew: bool = False
    """What may be written soon waits from now on, however late this is: somebody has just been asked."""
    requeue_at: datetime | None = None
