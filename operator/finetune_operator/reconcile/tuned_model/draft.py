"""A FineTunedModel's plan in the making: actions, conditions, Events and the time of the next look. Knows nothing of versions."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Literal

from finetune_api.base import shortened
from finetune_api.lenient import read
from finetune_api.scalars import printable
from finetune_api.tuned_model import FineTunedModelStatus

from ...model.tuned_model import ObservedModel
from ...settings import Settings
from ..conditions import set_condition
from ..plan import Action, Event, Plan

_EVENT_LIMIT = 1000
READY, STORAGE_READY = "Ready", "StorageReady"


class Draft:
    """Mutable within one reconcile call, and nowhere else."""

    def __init__(self, observed: ObservedModel, settings: Settings) -> None:
        self.observed, self.settings, self.now = observed, settings, observed.now
        self.before = read(FineTunedModelStatus, observed.raw.get("status"))
        self.status = self.before.model_copy(deep=True)
        self.name = str(observed.raw["metadata"]["name"])
        self.generation = int(observed.raw["metadata"].get("generation") or 0)
        self.actions: list[Action] = []
        self._events: list[Event] = []
        self._again: list[datetime] = []

    @property
    def synced(self) -> bool:
        """Whether the records at the storage have been read, or never will be: nothing is decided about versions before."""
        return bool(self.status.storage.written) or not self.settings.endpoint

    def set(self, type_: str, value: Literal["True", "False", "Unknown"], reason: str, message: str = "") -> None:
        """Set a condition."""
        set_condition(self.status, type_, value, reason, message, now=self.now, generation=self.generation)

    def event(self, type_: Literal["Normal", "Warning"], reason: str, message: str) -> None:
        """Tell the user; posted once however often this pass is repeated."""
        self._events.append(Event(type_, reason, printable(shortened(message, _EVENT_LIMIT))))

    def wait(self, seconds: float) -> None:
        """Look again after so many seconds, whatever happens."""
        self._again.append(self.now + timedelta(seconds=max(1.0, seconds)))

    def plan(self) -> Plan[FineTunedModelStatus]:
        """The finished plan; without a status when nothing changed."""
        self.status.observed_generation = self.generation
        changed = self.status != self.before
        return Plan(
            actions=tuple(self.actions),
            events=tuple(self._events),
            status=self.status if changed else None,
            before=self.before,
            requeue_at=min(self._again, default=None),
        )
