"""decide(): one pass over all that waits. Deterministic: the same snapshot gives the same answer.

Queues take turns: those within their own quota first, then the least weighted share (quota.py); within a queue ordering.py
decides. A gang is admitted when quota and nodes have room for all of it. What does not fit is passed by later jobs, until
it has waited for `backfillFor`: then what becomes free is kept for it, which bounds how long anybody is passed.
Knows nothing of how a decision comes on record.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter, defaultdict

from finetune_api.queue import Flavor
from finetune_api.scalars import human_duration, quantity, seconds

from ..model.queueing import (
    IMPLICIT,
    RECOVERED,
    Admission,
    Decision,
    Decisions,
    Snapshot,
    Workload,
)
from ..queueing import explain
from .blind import admit_all, admit_none
from .eligibility import Eligibility
from .ordering import Ordering
from .placement import Fleet, Place, never_fits
from .preemption import Preemptor, candidates, effective_priority, victims
from .quota import Ledger, implicit_queue, namespace_use
from .report import queue_report
from .usage import Fit, Usage

_NO_GPU_HELPS = ("NeverAdmitted", "QueueStopped", "QueueUnreadable", "NamespaceLimit", "UserLimit")
"""Reasons of waiting that no free GPU would end."""
_PREEMPTION_TRIES = 8
"""Jobs per queue and pass that others are looked for to give way to."""


def decide(snapshot: Snapshot) -> Decisions:
    """What is decided about every job and every queue. Pure."""
    if snapshot.unlimited or snapshot.forbidden:
        return admit_all(snapshot) if snapshot.unlimited else admit_none(snapshot)
    return _Pass(snapshot).run()


class _Pass:
    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        queues = snapshot.queues or (implicit_queue(snapshot),)
        self.usage = Usage(Ledger(queues, snapshot.now), Fleet(snapshot.nodes, snapshot.missing) if snapshot.nodes is not None else None)
        self.ledger, self.fleet = self.usage.ledger, self.usage.fleet
        self.decisions: dict[str, Decision] = {}
        self.waiting: dict[str, list[Workload]] = defaultdict(list)
        self.running: list[Workload] = []
        self.proven: Counter[str] = Counter()
        """The most that pods had of each resource which have run: some node could hold them, wherever it is now."""
        self.failed: dict[tuple[object, ...], tuple[str, str]] = {}
        self.tries: Counter[str] = Counter()
        self.position: Counter[str] = Counter()
        self.eligibility = Eligibility(snapshot, self.ledger)

    def run(self) -> Decisions:
        self.workloads = [self._placed(w) for w in self.snapshot.workloads if not w.recovers]
        for workload in self.workloads:
            self._count(workload)
        self.workloads += [self._recovered(w) for w in self.snapshot.workloads if w.recovers]
        for workload in sorted((w for w in self.workloads if w.allocation is not None), key=lambda w: (-w.request.units, w.uid)):
            self._expect(workload)
        for workload in sorted(self.workloads, key=lambda w: w.uid):
            self._sort(workload)
        self._drain()
        self._take_turns()
        self._grow()
        holding: dict[str, list[Workload]] = defaultdict(list)
        for workload in self.workloads:
            if workload.allocation is not None:
                holding[workload.allocation.queue].append(workload)
        reports = {name: queue_report(self.ledger.share(name), self._still_wait(name), holding[name]) for name in self.ledger.queues}
        return Decisions(jobs=self.decisions, queues=reports)

    def _still_wait(self, name: str) -> list[Workload]:
        return [w for w in self.waiting.get(name, ()) if self.decisions[w.uid].action == "wait"]

    # who has what, who wants what

    def _count(self, workload: Workload) -> None:
        request = workload.request
        if workload.has_run:
            self.proven[request.resource] = max(self.proven[request.resource], request.units)
        if (allocation := workload.allocation) is not None:
            self.ledger.take(allocation.queue, allocation.flavor, workload.owners, allocation.total, jobs=0 if workload.serves else 1)
            if workload.serves:  # what its pods hold of nodes is seen there
                self.ledger.serving[allocation.queue, allocation.flavor] += allocation.total
            elif self.fleet is not None:
                self.fleet.take(allocation.bound, request.per_pod)

    def _placed(self, workload: Workload) -> Workload:
        """Replicas that run without a queue and flavor that are there, or on record, count where they would go to now, room or no room."""
        held = workload.allocation
        if not workload.serves or held is None or self.eligibility.flavor(held.queue, held.flavor) is not None:
            return workload
        name, _ = self.eligibility.queue_of(workload)
        flavors = self.eligibility.flavors(name, workload) if name is not None and not self.ledger.queues[name].unreadable else []
        if name is None or not flavors:
            return workload
        more = self._admission(name, flavors[0], held.pods, workload, ())
        self.decisions[workload.uid] = Decision(action="keep", reason=RECOVERED, queue=name, admission=more)
        return dataclasses.replace(workload, allocation=dataclasses.replace(held, queue=name, flavor=flavors[0].name))

    def _recovered(self, workload: Workload) -> Workload:
        """One whose record was wiped: it keeps what quota has room for beside all others, else it gives way."""
        self._count(workload)
        held = workload.allocation
        assert held is not None
        flavor = self.eligibility.flavor(held.queue, held.flavor)
        counted = flavor is not None or (not held.flavor and workload.request.resource == "cpu")
        may = held.queue in self.ledger.queues and self.eligibility.may_use(self.ledger.queues[held.queue], workload.namespace)
        if may and counted and (flavor is None or self.ledger.available(held.queue, flavor) >= 0):
            return workload
        message = f"the record of its admission was lost, and queue {held.queue or 'none'} has no room for it: its pods save and end"
        self.decisions[workload.uid] = Decision(action="wait", reason="AdmissionLost", message=message, queue=held.queue)
        return dataclasses.replace(workload, allocation=dataclasses.replace(held, stopping=True))

    def _expect(self, workload: Workload) -> None:
        """Keep room for the pods of an admitted gang that have no node yet; the largest come first, they find room least."""
        allocation, request = workload.allocation, workload.request
        if allocation is None or allocation.stopping or self.fleet is None:
            return
        missing = allocation.pods - sum(pods for _, pods in allocation.bound)
        if allocation.topology is not None:
            request = dataclasses.replace(request, selector=(*request.selector, allocation.topology), topology_key="")
        flavor = self.eligibility.flavor(allocation.queue, allocation.flavor)
        while missing > 0:
            place = self.fleet.place(request, missing, flavor) or self.fleet.place(request, 1, flavor)
            if place is None:
                return
            self.fleet.take(place, request.per_pod)
            missing -= sum(pods for _, pods in place)

    def _sort(self, workload: Workload) -> None:
        allocation = workload.allocation
        if allocation is not None and allocation.stopping:
            self.usage.stopping.append(workload)
        elif allocation is not None and workload.serves:  # nobody's candidate to give way
            self.decisions.setdefault(workload.uid, Decision(action="keep", queue=allocation.queue))
        elif allocation is not None:
            self.running.append(workload)
            reason = RECOVERED if workload.recovers else ""
            self.decisions[workload.uid] = Decision(action="keep", reason=reason, queue=allocation.queue)
        if allocation is not None and not allocation.stopping:
            return
        name, problem = self.eligibility.queue_of(workload)
        if name is None:
            self.decisions[workload.uid] = Decision(action="wait", reason=problem[0], message=problem[1], queue=workload.queue or IMPLICIT)
            return
        if (never := self._never_fits(name, workload)) is not None:
            self.decisions[workload.uid] = Decision(action="refuse", reason="NoNodeFits", message=never, queue=name)
        elif workload.waits:
            self.waiting[name].append(workload)

    def _never_fits(self, name: str, workload: Workload) -> str | None:
        """Why no node that was ever seen could hold one of its pods, or None. What has run once is never too large."""
        request = workload.request
        if self.fleet is None or request.quota_alone or workload.allocation is not None or request.units <= self.proven[request.resource]:
            return None
        if self.ledger.queues[name].unreadable or self.eligibility.autoscaled(name, workload):
            return None
        return never_fits(request, self.fleet)

    # turns

    def _drain(self) -> None:
        for workload in self.running:
            assert workload.allocation is not None
            queue = self.ledger.queues.get(workload.allocation.queue)
            if queue is not None and queue.spec.stop_policy == "HoldAndDrain":
                self._preempt(workload, f"queue {queue.name} is drained (stopPolicy)")

    def _preempt(self, workload: Workload, message: str) -> None:
        self.running = [w for w in self.running if w is not workload]
        self.usage.stopping.append(workload)
        self.decisions[workload.uid] = Decision(action="preempt", reason="Preempted", message=message, queue=workload.allocation.queue)  # type: ignore[union-attr]

    def _take_turns(self) -> None:
        orderings: dict[str, Ordering] = {}
        turns: list[tuple[tuple[object, ...], str]] = []
        for name, waiting in sorted(self.waiting.items()):
            queue = self.ledger.queues[name]
            past = namespace_use(queue.history, queue.spec, self.snapshot.now)
            use = {
                space: past.get(space, 0.0) + self.ledger.by_owner[name, f"namespace {space}"] for space in {w.namespace for w in waiting}
            }
            orderings[name] = Ordering(waiting, use, queue.spec.limits.max_priority)
        for _, name in sorted(
            (head.waits_since, name) for name, ordering in orderings.items() if (head := ordering.peek()) and self._overdue(name, head)
        ):
            self._turn_of(name, orderings[name])
        for name, ordering in orderings.items():
            self._push(turns, name, ordering)
        while turns:
            key, name = heapq.heappop(turns)
            head = orderings[name].peek()
            if head is not None and key == self._turn(name, head):
                self._turn_of(name, orderings[name])
            # else what was admitted meanwhile has changed the shares
            self._push(turns, name, orderings[name])

    def _turn_of(self, name: str, ordering: Ordering) -> None:
        workload = ordering.peek()
        while workload is not None:
            units, closed = self._nominate(name, workload)
            ordering.drop(workload, units)
            if closed:
                for other in ordering.rest():
                    self._wait(name, other, "WaitingForTurn", closed)
            before, workload = workload, ordering.peek()
            if workload is None or units or not self._fails_like(name, before, workload):
                return

    def _fails_like(self, name: str, before: Workload, workload: Workload) -> bool:
        """Whether the next in the queue wants what the one before it did not get: it needs no turn of its own to be told so."""
        if workload.request is not before.request and workload.request != before.request:
            return False
        return (
            workload.priority == before.priority
            and (name, workload.request, effective_priority(workload, self.ledger.queues[name].spec.limits.max_priority)) in self.failed
        )

    def _overdue(self, name: str, head: Workload) -> bool:
        """Whether a queue's own quota has room for its head, which others have passed for too long on the nodes: it goes first."""
        queue, units = self.ledger.queues[name], head.request.pods[-1] * head.request.units
        waited = (self.snapshot.now - head.waits_since).total_seconds()
        own = [f for f in self.eligibility.flavors(name, head) if not self.ledger.borrows(name, f, units)]
        return bool(own) and waited >= seconds(queue.spec.backfill_for)

    def _push(self, turns: list[tuple[tuple[object, ...], str]], name: str, ordering: Ordering) -> None:
        if (head := ordering.peek()) is not None:
            heapq.heappush(turns, (self._turn(name, head), name))

    def _turn(self, name: str, head: Workload) -> tuple[object, ...]:
        queue = self.ledger.queues[name]
        flavors = self.eligibility.flavors(name, head)
        borrows = bool(flavors) and all(self.ledger.borrows(name, f, head.request.pods[-1] * head.request.units) for f in flavors)
        return borrows, self.ledger.share(name), -effective_priority(head, queue.spec.limits.max_priority), head.since, head.uid

    def _nominate(self, name: str, workload: Workload) -> tuple[int, str]:
        """Admit it or say what it waits for: (units given, why nobody behind it has a turn now)."""
        queue = self.ledger.queues[name]
        if queue.unreadable:
            self._wait(name, workload, "QueueUnreadable", explain.unreadable(queue))
            return 0, ""
        if queue.spec.stop_policy != "None":
            self._wait(name, workload, "QueueStopped", f"queue {name} admits nothing now (stopPolicy {queue.spec.stop_policy})")
            return 0, ""
        if (limit := explain.limit(self.usage, queue, workload)) is not None:
            self._wait(name, workload, *limit)
            return 0, ""
        if workload.allocation is not None:
            self._wait(name, workload, "Stopping", "its pods still save and end")
            return 0, ""
        priority = effective_priority(workload, queue.spec.limits.max_priority)
        kind = (name, workload.request, priority)  # what did not fit does not fit later in this pass
        admission = self._fit(name, workload) if kind not in self.failed else None
        if admission is not None:
            units = admission.pods * workload.request.units
            self.decisions[workload.uid] = Decision(
                action="admit", reason="Admitted", message=explain.granted(workload, admission), queue=name, admission=admission
            )
            return units, ""
        if kind in self.failed:
            reason, message = self.failed[kind]
        else:
            reason, message = self._try_preemption(name, workload, priority) or explain.shortage(
                self.usage, queue, workload, self.eligibility.flavors(name, workload)
            )
            self.failed[kind] = reason, message
        self._wait(name, workload, reason, message)
        if reason == "WaitingForPreemption":
            self.failed.pop(kind)  # the room was for this one
            return 0, ""
        if reason == "NeverAdmitted" or not workload.request.units:
            return 0, ""
        if queue.spec.ordering == "StrictFIFO":
            return 0, f"behind {workload.label} (ordering StrictFIFO)"
        waited = (self.snapshot.now - workload.waits_since).total_seconds()
        if waited >= seconds(queue.spec.backfill_for):
            self._reserve_for(name, workload)
            return 0, f"behind {workload.label}, which has waited {human_duration(waited)}: what becomes free is kept for it (backfillFor)"
        return 0, ""

    def _fit(self, name: str, workload: Workload) -> Admission | None:
        """Admit it when all of it fits now, with as many pods as do."""
        request, flavors = workload.request, self.eligibility.flavors(name, workload)
        if not flavors:
            if request.resource == "cpu" and all(f.resource_name != "cpu" for f in self.ledger.queues[name].spec.flavors):
                self.usage.give(name, "", workload, 0, ())
                return Admission(queue=name, flavor="", pods=request.pods[0])
            return None
        for pods in request.pods:
            found = self.usage.fit(name, workload, pods, flavors)
            if found is not None:
                flavor, place = found
                self.usage.give(name, flavor.name, workload, pods, place)
                return self._admission(name, flavor, pods, workload, place)
        return None

    def _admission(self, queue: str, flavor: Flavor, pods: int, workload: Workload, place: Place) -> Admission:
        return Admission(
            queue=queue,
            flavor=flavor.name,
            pods=pods,
            node_labels=tuple(sorted(flavor.node_labels.items())),
            tolerations=tuple(flavor.tolerations),
            price_per_hour=_number(flavor.price_per_hour),
            teraflops=_number(flavor.teraflops),
            topology=self.fleet.domain(workload.request, place) if self.fleet is not None else None,
            place=place,
        )

    def _try_preemption(self, name: str, workload: Workload, priority: int) -> tuple[str, str] | None:
        """Wait for those that give way already, or ask others to; None when that would not help."""
        usage, pods, flavors = self.usage, workload.request.pods[-1], self.eligibility.flavors(name, workload)

        def fit() -> Fit | None:
            return usage.fit(name, workload, pods, flavors, later=True)

        found = fit() if usage.stopping else None
        if found is None:
            if self.tries[name] >= _PREEMPTION_TRIES:
                return None
            self.tries[name] += 1
            ledger = usage.later[0]
            for flavor in flavors:
                preemptor = Preemptor(workload=workload, priority=priority, queue=name, flavor=flavor, pods=pods)
                ordered = candidates(preemptor, self.running, ledger, self.snapshot.now)
                chosen = victims(preemptor, ordered, ledger, usage.let_go, usage.keep, lambda: fit() is not None)
                for victim in chosen:
                    same = victim.allocation is not None and victim.allocation.queue == name
                    back = (
                        f"queue {name} takes its quota back"
                        if not ledger.borrows(name, flavor, preemptor.units)
                        else f"queue {name} has less"
                    )
                    how = f"priority {priority}" if same else back
                    self._preempt(victim, f"gives way to {workload.label} ({how})")
                if chosen:
                    found = fit()
                    break
        if found is None:
            return None
        flavor, place = found
        usage.reserve(name, flavor.name, pods * workload.request.units, workload.request, place)
        return "WaitingForPreemption", f"waits for {len(usage.stopping)} job(s) that save their checkpoints and give way"

    def _reserve_for(self, name: str, workload: Workload) -> None:
        """Keep what becomes free for a job: of quota what is its queue's own, and the nodes that it would have soonest."""
        request, pods, flavors = workload.request, workload.request.pods[-1], self.eligibility.flavors(name, workload)
        flavor = max(flavors, key=lambda f: self.ledger.available(name, f))
        own = flavor.nominal_quota - self.ledger.used[name, flavor.name]
        units = max(0, min(self.ledger.available(name, flavor), own, pods * request.units))
        on_nodes = self.fleet is not None and flavor.nodes == "Existing" and not request.quota_alone
        place = self.fleet.soonest(request, pods, flavor) if self.fleet is not None and on_nodes else ()
        self.usage.reserve(name, flavor.name, units, request, place)

    def _wait(self, name: str, workload: Workload, reason: str, message: str) -> None:
        self.position[name] += 1
        self.decisions[workload.uid] = Decision(action="wait", reason=reason, message=message, queue=name, position=self.position[name])

    # gangs that may grow

    def _grow(self) -> None:
        able = [w for w in self.running if w.allocation is not None and w.allocation.pods < w.request.pods[0]]
        wanted = {
            w.request.resource
            for name in (self.waiting if able else ())
            for w in self._still_wait(name)
            if self.decisions[w.uid].reason not in _NO_GPU_HELPS
        }
        for workload in able:
            allocation, request = workload.allocation, workload.request
            assert allocation is not None
            queue = self.ledger.queues.get(allocation.queue)
            if queue is None or queue.unreadable or request.resource in wanted or sum(n for _, n in allocation.bound) < allocation.pods:
                continue
            if (self.snapshot.now - allocation.since).total_seconds() < seconds(queue.spec.preemption.minimum_run_time):
                continue
            for pods in (p for p in request.pods if p > allocation.pods):
                found = self.usage.fit_instead(allocation.queue, workload, pods, self.eligibility.flavors(allocation.queue, workload))
                if found is not None:
                    flavor, place = found
                    more = self._admission(allocation.queue, flavor, pods, workload, place)
                    message = f"there is room for {pods} of {request.pods[0]} worker pods: it saves a checkpoint and goes on with them"
                    self.decisions[workload.uid] = Decision(
                        action="resize", reason="Resized", message=message, queue=allocation.queue, admission=more
                    )
                    self.ledger.take(allocation.queue, flavor.name, workload.owners, (pods - allocation.pods) * request.units, jobs=0)
                    if self.fleet is not None:
                        self.fleet.take(place, request.per_pod)
                    break


def _number(text: str | None) -> float | None:
    return None if text is None else float(quantity(text))
