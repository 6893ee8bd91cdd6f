"""Who gives way: the fewest jobs that lose the least, and only when the one they give way to fits for certain.

Knows nothing of how a job is stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime

from finetune_api.queue import Flavor
from finetune_api.scalars import seconds

from ..model.queueing import Allocation, Workload
from .quota import Ledger


@dataclass(frozen=True, kw_only=True)
class Preemptor:
    """A job that does not fit, and what it would take for it."""

    workload: Workload
    priority: int
    """The one that counts in its queue."""
    queue: str
    flavor: Flavor
    pods: int

    @property
    def units(self) -> int:
        """Units in all."""
        return self.pods * self.workload.request.units


def candidates(preemptor: Preemptor, running: Iterable[Workload], ledger: Ledger, now: datetime) -> list[Workload]:
    """Jobs that may be asked to give way: those of other queues first, then the lowest priority, then who loses least."""
    found: list[tuple[tuple[object, ...], Workload]] = []
    for other in running:
        allocation = other.allocation
        if (
            allocation is None
            or allocation.stopping
            or allocation.queue not in ledger.queues
            or ledger.queues[allocation.queue].unreadable  # nobody knows what is its own
            or other.request.resource != preemptor.workload.request.resource
        ):
            continue
        shortest = seconds(ledger.queues[allocation.queue].spec.preemption.minimum_run_time)
        if (now - allocation.since).total_seconds() < shortest or not _may_displace(preemptor, other, allocation, ledger):
            continue
        order = (
            allocation.queue == preemptor.queue,
            effective_priority(other, None),
            _cost(other, allocation, now),
            -allocation.since.timestamp(),
            other.uid,
        )
        found.append((order, other))
    return [other for _, other in sorted(found, key=lambda item: item[0])]  # type: ignore[arg-type, return-value]


def _may_displace(preemptor: Preemptor, other: Workload, allocation: Allocation, ledger: Ledger) -> bool:
    own, theirs = ledger.queues[preemptor.queue].spec, ledger.queues[allocation.queue].spec
    lower = effective_priority(other, theirs.limits.max_priority) < preemptor.priority
    if allocation.queue == preemptor.queue:
        return own.preemption.within_queue == "LowerPriority" and lower
    if (
        own.cohort is None
        or theirs.cohort != own.cohort
        or allocation.flavor != preemptor.flavor.name
        or not _has_borrowed(allocation, ledger)
    ):
        return False  # what its queue still has is its own
    if ledger.borrows(preemptor.queue, preemptor.flavor, preemptor.units):
        return own.preemption.fair_sharing and _is_fairer(preemptor, other, allocation, ledger)
    policy = own.preemption.reclaim_within_cohort
    return policy == "Any" or (policy == "LowerPriority" and lower)


def _is_fairer(preemptor: Preemptor, other: Workload, allocation: Allocation, ledger: Ledger) -> bool:
    """Whether the other queue still has no smaller share after the exchange: then nobody would want to undo it."""
    with ledger.without(allocation, other.owners):
        theirs = ledger.share(allocation.queue)
        ledger.take(preemptor.queue, preemptor.flavor.name, preemptor.workload.owners, preemptor.units)
        own = ledger.share(preemptor.queue)
        ledger.take(preemptor.queue, preemptor.flavor.name, preemptor.workload.owners, preemptor.units, -1)
    return own <= theirs


def victims(
    preemptor: Preemptor,
    ordered: list[Workload],
    ledger: Ledger,
    let_go: Callable[[Workload], None],
    keep: Callable[[Workload], None],
    fits: Callable[[], bool],
) -> list[Workload]:
    """The fewest of the candidates, cheapest first, without which the gang fits; none when it would not fit without all of them.

    `let_go` and `keep` change what `ledger` and `fits` look at; those that are returned have been let go.
    """
    chosen: list[Workload] = []
    for other in ordered:
        if other.allocation is None or not _may_displace(
            preemptor, other, other.allocation, ledger
        ):  # those before it have changed the shares
            continue
        let_go(other)
        chosen.append(other)
        if fits():
            break
    else:
        for other in chosen:
            keep(other)
        return []
    for other in reversed(chosen[:-1]):  # the last one made it fit
        keep(other)
        if fits():
            chosen.remove(other)
        else:
            let_go(other)
    return chosen


def effective_priority(workload: Workload, limit: int | None) -> int:
    """The priority that counts in a queue."""
    return workload.priority if limit is None else min(workload.priority, limit)


def _has_borrowed(allocation: Allocation, ledger: Ledger) -> bool:
    flavor = next((f for f in ledger.queues[allocation.queue].spec.flavors if f.name == allocation.flavor), None)
    return flavor is not None and ledger.borrows(allocation.queue, flavor)


def _cost(workload: Workload, allocation: Allocation, now: datetime) -> float:
    """GPU-seconds since its last checkpoint: what is lost if it cannot save in time, and what saving costs grows alike."""
    return max(0.0, (now - (allocation.saved_at or allocation.since)).total_seconds()) * allocation.total
