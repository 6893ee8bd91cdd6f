"""Who gives way: the fewest jobs that lose the least, and only when the one they give way to fits for certain."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime

from finetune_api.queue import Flavour
from finetune_api.scalars import seconds

from .model import Workload
from .quota import Ledger


def candidates(
    wanting: Workload, priority: int, queue: str, flavour: Flavour, pods: int, running: Iterable[Workload], ledger: Ledger, now: datetime
) -> list[Workload]:
    """Jobs that may be asked to give way to this one, the cheapest first."""
    own = ledger.queues[queue].spec
    units = pods * wanting.ask.units
    reclaims = own.cohort is not None and not ledger.borrows(queue, flavour, units)
    found: list[tuple[tuple[object, ...], Workload]] = []
    for other in running:
        held = other.held
        if held is None or held.stopping or held.queue not in ledger.queues or other.ask.resource != wanting.ask.resource:
            continue
        theirs = ledger.queues[held.queue].spec
        if (now - held.since).total_seconds() < seconds(theirs.preemption.minimum_run_time):
            continue
        if held.queue == queue:
            if own.preemption.within_queue == "Never" or effective_priority(other, theirs.limits.max_priority) >= priority:
                continue
        else:
            policy = own.preemption.reclaim_within_cohort
            lower = effective_priority(other, theirs.limits.max_priority) < priority
            allowed = reclaims and theirs.cohort == own.cohort and held.flavour == flavour.name
            if not allowed or policy == "Never" or (policy == "LowerPriority" and not lower) or not _has_borrowed(other, ledger):
                continue
        found.append(((held.queue == queue, effective_priority(other, None), _cost(other, now), -held.since.timestamp(), other.uid), other))
    return [other for _, other in sorted(found, key=lambda item: item[0])]  # type: ignore[arg-type, return-value]


def victims(
    ordered: list[Workload],
    queue: str,
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
        if other.held is not None and other.held.queue != queue and not _has_borrowed(other, ledger):
            continue  # what its queue still has is its own
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


def _has_borrowed(workload: Workload, ledger: Ledger) -> bool:
    held = workload.held
    if held is None:
        return False
    flavour = next((f for f in ledger.queues[held.queue].spec.flavours if f.name == held.flavour), None)
    return flavour is not None and ledger.borrows(held.queue, flavour)


def _cost(workload: Workload, now: datetime) -> float:
    """GPU-seconds since its last checkpoint: what is lost if it cannot save in time, and what saving costs grows alike."""
    held = workload.held
    if held is None:
        return 0.0
    return max(0.0, (now - (held.saved_at or held.since)).total_seconds()) * held.total
