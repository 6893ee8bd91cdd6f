"""Quota and nodes together, twice: as they are, and as they will be when those that give way are gone.

Knows nothing of whose turn it is.
"""

from __future__ import annotations

from contextlib import ExitStack

from finetune_api.queue import Flavor

from ..model.queueing import Request, Workload
from .placement import Fleet, Place
from .quota import Ledger

Fit = tuple[Flavor, Place]


class Usage:
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
        allocation = workload.allocation
        if allocation is not None:
            ledger, fleet = self.later
            ledger.take(allocation.queue, allocation.flavor, workload.owners, allocation.total, sign)
            if fleet is not None:
                fleet.take(allocation.bound, workload.request.per_pod, sign)

    def keep(self, workload: Workload) -> None:
        """It is not gone after all."""
        self.let_go(workload, 1)

    def give(self, queue: str, flavor: str, workload: Workload, pods: int, place: Place) -> None:
        """A job gets so many pods."""
        for ledger, fleet in self._both():
            ledger.take(queue, flavor, workload.owners, pods * workload.request.units, jobs=0 if workload.serves else 1)
            if fleet is not None:
                fleet.take(place, workload.request.per_pod)
        if workload.serves:
            self.ledger.serving[queue, flavor] += pods * workload.request.units

    def reserve(self, queue: str, flavor: str, units: int, request: Request, place: Place) -> None:
        """Keep quota and room for a job that has to wait for them."""
        for ledger, fleet in self._both():
            ledger.reserve(queue, flavor, units)
            if fleet is not None:
                fleet.take(place, request.per_pod)

    def fit(self, queue: str, workload: Workload, pods: int, flavors: list[Flavor], *, later: bool = False) -> Fit | None:
        """The first flavor with room for so many pods, one of the queue's own quota before a borrowed one."""
        ledger, fleet = self.later if later else (self.ledger, self.fleet)
        units = pods * workload.request.units
        for flavor in sorted(flavors, key=lambda f: ledger.borrows(queue, f, units)):
            if units > ledger.available(queue, flavor):
                continue
            if fleet is None or flavor.nodes == "Autoscaled" or not workload.request.units or workload.request.quota_alone:
                return flavor, ()
            place = fleet.place(workload.request, pods, flavor)
            if place is not None:
                return flavor, place
        return None

    def fit_instead(self, queue: str, workload: Workload, pods: int, flavors: list[Flavor]) -> Fit | None:
        """The same for a job that holds some, as if it held none."""
        allocation = workload.allocation
        assert allocation is not None
        with ExitStack() as stack:
            stack.enter_context(self.ledger.without(allocation, workload.owners))
            if self.fleet is not None:
                stack.enter_context(self.fleet.without(allocation, workload.request))
            return self.fit(queue, workload, pods, flavors)
