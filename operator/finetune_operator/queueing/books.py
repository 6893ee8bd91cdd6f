"""Quota and nodes together, twice: as they are, and as they will be when those that give way are gone."""

from __future__ import annotations

from contextlib import ExitStack

from finetune_api.queue import Flavour

from .model import Ask, Workload
from .placement import Fleet, Place
from .quota import Ledger

Room = tuple[Flavour, Place]


class Books:
    """What a pass gives and keeps is entered into both."""

    def __init__(self, ledger: Ledger, fleet: Fleet | None) -> None:
        self.ledger, self.fleet = ledger, fleet
        self.stopping: list[Workload] = []
        """Jobs that give way and still hold what they had."""
        self._later: tuple[Ledger, Fleet | None] | None = None

    def _both(self) -> list[tuple[Ledger, Fleet | None]]:
        return [(self.ledger, self.fleet), *([self._later] if self._later is not None else [])]

    @property
    def later(self) -> tuple[Ledger, Fleet | None]:
        """As they will be. Made when it is first asked for: most passes need it for few jobs."""
        if self._later is None:
            self._later = self.ledger.copy(), self.fleet.copy() if self.fleet is not None else None
            for workload in self.stopping:
                self.let_go(workload)
        return self._later

    def let_go(self, workload: Workload, sign: int = -1) -> None:
        """Later, this one is gone."""
        held = workload.held
        if held is not None:
            ledger, fleet = self.later
            ledger.take(held.queue, held.flavour, workload.owners, held.total, sign)
            if fleet is not None:
                fleet.take(held.bound, workload.ask.per_pod, sign)

    def keep(self, workload: Workload) -> None:
        """It is not gone after all."""
        self.let_go(workload, 1)

    def give(self, queue: str, flavour: str, workload: Workload, pods: int, place: Place) -> None:
        """A job gets so many pods."""
        for ledger, fleet in self._both():
            ledger.take(queue, flavour, workload.owners, pods * workload.ask.units)
            if fleet is not None:
                fleet.take(place, workload.ask.per_pod)

    def reserve(self, queue: str, flavour: str, units: int, ask: Ask, place: Place) -> None:
        """Keep quota and room for a job that has to wait for them."""
        for ledger, fleet in self._both():
            ledger.reserve(queue, flavour, units)
            if fleet is not None:
                fleet.take(place, ask.per_pod)

    def room(self, queue: str, workload: Workload, pods: int, flavours: list[Flavour], *, later: bool = False) -> Room | None:
        """The first flavour with room for so many pods, one of the queue's own quota before a borrowed one."""
        ledger, fleet = self.later if later else (self.ledger, self.fleet)
        units = pods * workload.ask.units
        for flavour in sorted(flavours, key=lambda f: ledger.borrows(queue, f, units)):
            if units > ledger.available(queue, flavour):
                continue
            if fleet is None or flavour.nodes == "Autoscaled" or not workload.ask.units:
                return flavour, ()
            place = fleet.place(workload.ask, pods, flavour)
            if place is not None:
                return flavour, place
        return None

    def room_instead(self, queue: str, workload: Workload, pods: int, flavours: list[Flavour]) -> Room | None:
        """The same for a job that has some, as if it had none."""
        held = workload.held
        assert held is not None
        with ExitStack() as stack:
            stack.enter_context(self.ledger.given(held, workload.owners))
            if self.fleet is not None:
                stack.enter_context(self.fleet.given(held, workload.ask))
            return self.room(queue, workload, pods, flavours)
