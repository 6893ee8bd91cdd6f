"""decide(): one pass over all that waits. Deterministic: the same snapshot gives the same answer.

Queues take turns: those within their own quota first, then the least weighted share (quota.py); within a queue line.py
decides. A gang is admitted when quota and nodes have room for all of it. What does not fit is passed by later jobs, until
it has waited for `backfillFor`: then what becomes free is kept for it, which bounds how long anybody is passed.
"""

from __future__ import annotations

import dataclasses
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack

from finetune_api.queue import DEFAULT_QUEUE, FineTuneQueueSpec, Flavour
from finetune_api.scalars import human_duration, seconds

from .line import Line
from .model import IMPLICIT, Admission, Ask, Decisions, Queue, QueueReport, Snapshot, Verdict, Workload
from .placement import Fleet, Place, never_fits
from .preemption import candidates, effective_priority, victims
from .quota import UNLIMITED, Ledger, namespace_use

_NOT_FOR_ROOM = ("NeverAdmitted", "QueueStopped", "NamespaceLimit")
"""Reasons of waiting that no free GPU would end."""
_PREEMPTION_TRIES = 8
"""Jobs per queue and pass that others are looked for to give way to."""


def decide(snapshot: Snapshot) -> Decisions:
    """What is decided about every job and every queue. Pure."""
    return _Pass(snapshot).run()


class _Pass:
    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        queues = snapshot.queues or (_implicit(snapshot),)
        self.ledger = Ledger(queues, snapshot.now)
        self.fleet = Fleet(snapshot.nodes) if snapshot.nodes is not None else None
        self.verdicts: dict[str, Verdict] = {}
        self.waiting: dict[str, list[Workload]] = defaultdict(list)
        self.stopping: list[Workload] = []
        self.running: list[Workload] = []
        self.later: tuple[Ledger, Fleet | None] | None = None
        """Quota and nodes as they will be when those that give way are gone"""
        self.failed: dict[tuple[object, ...], tuple[str, str]] = {}
        self.tries: Counter[str] = Counter()
        self.position: Counter[str] = Counter()

    def run(self) -> Decisions:
        for workload in self.snapshot.workloads:
            self._count(workload)
        for workload in sorted(self.snapshot.workloads, key=lambda w: (-w.ask.units, w.uid)):
            self._expect(workload)
        for workload in self.snapshot.workloads:
            self._sort(workload)
        self._drain()
        self._take_turns()
        self._grow()
        return Decisions(verdicts=self.verdicts, queues={name: self._report(name) for name in self.ledger.queues})

    # who has what, who wants what

    def _count(self, workload: Workload) -> None:
        if (held := workload.held) is not None:
            self.ledger.take(held.queue, held.flavour, workload.namespace, held.total)
            if self.fleet is not None:
                self.fleet.take(held.bound, workload.ask.per_pod)

    def _expect(self, workload: Workload) -> None:
        """Keep room for the pods of an admitted gang that have no node yet; the largest come first, they find room least."""
        held, ask = workload.held, workload.ask
        if held is None or held.stopping or self.fleet is None:
            return
        missing = held.pods - sum(pods for _, pods in held.bound)
        if held.topology is not None:
            ask = dataclasses.replace(ask, selector=(*ask.selector, held.topology), topology_key="")
        flavour = self._flavour(held.queue, held.flavour)
        while missing > 0:
            place = self.fleet.place(ask, missing, flavour) or self.fleet.place(ask, 1, flavour)
            if place is None:
                return
            self.fleet.take(place, ask.per_pod)
            missing -= sum(pods for _, pods in place)

    def _sort(self, workload: Workload) -> None:
        held = workload.held
        if held is not None and held.stopping:
            self.stopping.append(workload)
        elif held is not None:
            self.running.append(workload)
            self.verdicts[workload.uid] = Verdict(action="keep", queue=held.queue)
        if held is not None and not held.stopping:
            return
        name, problem = self._queue_of(workload)
        if name is None:
            self.verdicts[workload.uid] = Verdict(action="wait", reason=problem[0], message=problem[1], queue=workload.queue or IMPLICIT)
            return
        never = never_fits(workload.ask, self.fleet) if held is None and self.fleet is not None else None
        if never is not None and not self._autoscaled(name, workload):
            self.verdicts[workload.uid] = Verdict(action="refuse", reason="NoNodeFits", message=never, queue=name)
        elif workload.waits:
            self.waiting[name].append(workload)

    def _queue_of(self, workload: Workload) -> tuple[str | None, tuple[str, str]]:
        if not self.snapshot.queues:
            if workload.queue is None:
                return IMPLICIT, ("", "")
            return None, ("QueueNotFound", f"scheduling.queue: there is no FineTuneQueue {workload.queue!r}, nor any other; remove it")
        home = self.snapshot.namespaces.get(workload.namespace)
        name = workload.queue or (home.queue if home is not None else None) or DEFAULT_QUEUE
        if name in self.ledger.queues and self._may_use(self.ledger.queues[name], workload.namespace):
            return name, ("", "")
        allowed = [name for name, queue in sorted(self.ledger.queues.items()) if self._may_use(queue, workload.namespace)]
        known = f"this namespace may use: {', '.join(allowed[:8]) or 'none'}"
        if name not in self.ledger.queues:
            if workload.queue is None and name == DEFAULT_QUEUE:
                return None, ("QueueNotFound", f"the job names no queue, and there is none called {DEFAULT_QUEUE}; {known}")
            return None, ("QueueNotFound", f"there is no FineTuneQueue {name!r}; {known}")
        return None, ("QueueNotAllowed", f"jobs of namespace {workload.namespace} may not use queue {name}; {known}")

    def _may_use(self, queue: Queue, namespace: str) -> bool:
        selector = queue.spec.namespace_selector
        home = self.snapshot.namespaces.get(namespace)
        return selector is None or (home is not None and selector.selects(dict(home.labels)))

    def _flavour(self, queue: str, flavour: str) -> Flavour | None:
        known = self.ledger.queues.get(queue)
        return next((f for f in known.spec.flavours if f.name == flavour), None) if known is not None else None

    def _flavours(self, queue: str, workload: Workload) -> list[Flavour]:
        """Those with the job's resource whose nodes its selector does not rule out."""
        selector = dict(workload.ask.selector)
        return [
            flavour
            for flavour in self.ledger.queues[queue].spec.flavours
            if flavour.resource_name == workload.ask.resource and all(selector.get(k, v) == v for k, v in flavour.node_labels.items())
        ]

    def _autoscaled(self, queue: str, workload: Workload) -> bool:
        return any(flavour.nodes == "Autoscaled" for flavour in self._flavours(queue, workload))

    # turns

    def _drain(self) -> None:
        for workload in self.running:
            assert workload.held is not None
            queue = self.ledger.queues.get(workload.held.queue)
            if queue is not None and queue.spec.stop_policy == "HoldAndDrain":
                self._preempt(workload, f"queue {queue.name} is drained (stopPolicy)")

    def _take(self, ask: Ask, place: Place) -> None:
        for fleet in (self.fleet, self.later[1] if self.later is not None else None):
            if fleet is not None:
                fleet.take(place, ask.per_pod)

    def _after(self) -> tuple[Ledger, Fleet | None]:
        """Quota and nodes without those that give way. Made when it is first asked for."""
        if self.later is None:
            self.later = self.ledger.copy(), self.fleet.copy() if self.fleet is not None else None
            for workload in self.stopping:
                self._let_go(workload)
        return self.later

    def _let_go(self, workload: Workload, sign: int = -1) -> None:
        held = workload.held
        if held is not None and self.later is not None:
            ledger, fleet = self.later
            ledger.take(held.queue, held.flavour, workload.namespace, held.total, sign)
            if fleet is not None:
                fleet.take(held.bound, workload.ask.per_pod, sign)

    def _ledgers(self) -> Iterator[Ledger]:
        yield self.ledger
        if self.later is not None:
            yield self.later[0]

    def _preempt(self, workload: Workload, message: str) -> None:
        self.running = [w for w in self.running if w is not workload]
        self.stopping.append(workload)
        self.verdicts[workload.uid] = Verdict(action="preempt", reason="Preempted", message=message, queue=workload.held.queue)  # type: ignore[union-attr]

    def _take_turns(self) -> None:
        lines: dict[str, Line] = {}
        turns: list[tuple[tuple[object, ...], str]] = []
        for name, waiting in sorted(self.waiting.items()):
            queue = self.ledger.queues[name]
            past = namespace_use(queue.history, queue.spec, self.snapshot.now)
            use = {space: past.get(space, 0.0) + self.ledger.by_namespace[name, space] for space in {w.namespace for w in waiting}}
            lines[name] = Line(waiting, use, queue.spec.limits.max_priority)
        for _, name in sorted(
            (head.waits_since, name) for name, line in lines.items() if (head := line.peek()) and self._overdue(name, head)
        ):
            self._turn_of(name, lines[name])
        for name, line in lines.items():
            self._push(turns, name, line)
        while turns:
            key, name = heapq.heappop(turns)
            head = lines[name].peek()
            if head is not None and key == self._turn(name, head):
                self._turn_of(name, lines[name])
            # else what was admitted meanwhile has changed the shares
            self._push(turns, name, lines[name])

    def _turn_of(self, name: str, line: Line) -> None:
        workload = line.peek()
        assert workload is not None
        units, closed = self._look_at(name, workload)
        line.drop(workload, units)
        if closed:
            for other in line.rest():
                self._wait(name, other, "WaitingForTurn", closed)

    def _overdue(self, name: str, head: Workload) -> bool:
        """Whether a queue's own quota has room for its head, which others have passed for too long on the nodes: it goes first."""
        queue, units = self.ledger.queues[name], head.ask.pods[-1] * head.ask.units
        waited = (self.snapshot.now - head.waits_since).total_seconds()
        own = [f for f in self._flavours(name, head) if not self.ledger.borrows(name, f, units)]
        return bool(own) and waited >= seconds(queue.spec.backfill_for)

    def _push(self, turns: list[tuple[tuple[object, ...], str]], name: str, line: Line) -> None:
        if (head := line.peek()) is not None:
            heapq.heappush(turns, (self._turn(name, head), name))

    def _turn(self, name: str, head: Workload) -> tuple[object, ...]:
        queue = self.ledger.queues[name]
        flavours = self._flavours(name, head)
        borrows = bool(flavours) and all(self.ledger.borrows(name, f, head.ask.pods[-1] * head.ask.units) for f in flavours)
        return borrows, self.ledger.share(name), -effective_priority(head, queue.spec.limits.max_priority), head.since, head.uid

    def _look_at(self, name: str, workload: Workload) -> tuple[int, str]:
        """Admit it or say what it waits for: (units given, why nobody behind it has a turn now)."""
        queue = self.ledger.queues[name]
        if queue.spec.stop_policy != "None":
            self._wait(name, workload, "QueueStopped", f"queue {name} admits nothing now (stopPolicy {queue.spec.stop_policy})")
            return 0, ""
        if (limit := self._limit(queue, workload)) is not None:
            self._wait(name, workload, "NamespaceLimit", limit)
            return 0, ""
        if workload.held is not None:
            self._wait(name, workload, "Stopping", "its pods still save and end")
            return 0, ""
        priority = effective_priority(workload, queue.spec.limits.max_priority)
        kind = (name, workload.ask, priority)  # what did not fit does not fit later in this pass
        admission = self._fit(name, workload) if kind not in self.failed else None
        if admission is not None:
            units = admission.pods * workload.ask.units
            self.verdicts[workload.uid] = Verdict(
                action="admit", reason="Admitted", message=_granted(workload, admission), queue=name, admission=admission
            )
            return units, ""
        if kind in self.failed:
            reason, message = self.failed[kind]
        else:
            reason, message = self._make_room(name, workload, priority) or self._why(name, workload)
            self.failed[kind] = reason, message
        self._wait(name, workload, reason, message)
        if reason == "WaitingForPreemption":
            self.failed.pop(kind)  # the room was for this one
            return 0, ""
        if reason == "NeverAdmitted" or not workload.ask.units:
            return 0, ""
        if queue.spec.ordering == "StrictFIFO":
            return 0, f"behind {workload.label} (ordering StrictFIFO)"
        waited = (self.snapshot.now - workload.waits_since).total_seconds()
        if waited >= seconds(queue.spec.backfill_for):
            self._keep_for(name, workload)
            return 0, f"behind {workload.label}, which has waited {human_duration(waited)}: what becomes free is kept for it (backfillFor)"
        return 0, ""

    def _limit(self, queue: Queue, workload: Workload) -> str | None:
        limits, space = queue.spec.limits, (queue.name, workload.namespace)
        held, jobs = self.ledger.by_namespace[space], self.ledger.jobs[space]
        if limits.max_jobs_per_namespace is not None and jobs >= limits.max_jobs_per_namespace:
            return f"namespace {workload.namespace} has {jobs} jobs in queue {queue.name}, its limit (maxJobsPerNamespace)"
        need = workload.ask.pods[-1] * workload.ask.units
        if limits.max_gpus_per_namespace is not None and held + need > limits.max_gpus_per_namespace:
            return f"namespace {workload.namespace} holds {held} of {limits.max_gpus_per_namespace} in queue {queue.name} (maxGpusPerNamespace), this job needs {need}"
        return None

    def _fit(self, name: str, workload: Workload) -> Admission | None:
        """Admit it when all of it fits now, with as many pods as do."""
        ask = workload.ask
        if not self._flavours(name, workload):
            if ask.resource == "cpu" and all(f.resource_name != "cpu" for f in self.ledger.queues[name].spec.flavours):
                for ledger in self._ledgers():
                    ledger.take(name, "", workload.namespace, 0)
                return Admission(queue=name, flavour="", pods=ask.pods[0])
            return None
        for pods in ask.pods:
            found = self._find(name, workload, pods, self.ledger, self.fleet)
            if found is not None:
                flavour, place = found
                for ledger in self._ledgers():
                    ledger.take(name, flavour.name, workload.namespace, pods * ask.units)
                self._take(ask, place)
                return self._admission(name, flavour, pods, workload, place)
        return None

    def _find(self, name: str, workload: Workload, pods: int, ledger: Ledger, fleet: Fleet | None) -> tuple[Flavour, Place] | None:
        """The first flavour with room for so many pods, one of the queue's own quota before a borrowed one."""
        units = pods * workload.ask.units
        flavours = self._flavours(name, workload)
        for flavour in sorted(flavours, key=lambda f: ledger.borrows(name, f, units)):
            if units > ledger.available(name, flavour):
                continue
            if fleet is None or flavour.nodes == "Autoscaled" or not workload.ask.units:
                return flavour, ()
            place = fleet.place(workload.ask, pods, flavour)
            if place is not None:
                return flavour, place
        return None

    def _admission(self, queue: str, flavour: Flavour, pods: int, workload: Workload, place: Place) -> Admission:
        return Admission(
            queue=queue,
            flavour=flavour.name,
            pods=pods,
            node_labels=tuple(sorted(flavour.node_labels.items())),
            tolerations=tuple(flavour.tolerations),
            price_per_hour=flavour.price_per_hour,
            topology=self.fleet.domain(workload.ask, place) if self.fleet is not None else None,
            place=place,
        )

    def _make_room(self, name: str, workload: Workload, priority: int) -> tuple[str, str] | None:
        """Wait for those that give way already, or ask others to; None when that would not help."""
        pods = workload.ask.pods[-1]

        def room() -> tuple[Flavour, Place] | None:
            return self._find(name, workload, pods, *self._after())

        found = room() if self.stopping else None
        if found is None:
            if self.tries[name] >= _PREEMPTION_TRIES:
                return None
            self.tries[name] += 1
            ledger = self._after()[0]
            for flavour in self._flavours(name, workload):
                ordered = candidates(workload, priority, name, flavour, pods, self.running, ledger, self.snapshot.now)
                chosen = victims(ordered, name, ledger, self._let_go, lambda other: self._let_go(other, 1), lambda: room() is not None)
                for victim in chosen:
                    same = victim.held is not None and victim.held.queue == name
                    how = f"priority {priority}" if same else f"queue {name} takes its quota back"
                    self._preempt(victim, f"gives way to {workload.label} ({how})")
                if chosen:
                    found = room()
                    break
        if found is None:
            return None
        flavour, place = found
        for ledger in self._ledgers():
            ledger.reserve(name, flavour.name, pods * workload.ask.units)
        self._take(workload.ask, place)
        return "WaitingForPreemption", f"waits for {len(self.stopping)} job(s) that save their checkpoints and give way"

    def _keep_for(self, name: str, workload: Workload) -> None:
        ask, pods = workload.ask, workload.ask.pods[-1]
        flavours = self._flavours(name, workload)
        if not flavours:
            return
        flavour = max(flavours, key=lambda f: self.ledger.available(name, f))
        free = self.ledger.available(name, flavour)
        for ledger in self._ledgers():
            ledger.reserve(name, flavour.name, max(0, min(free, pods * ask.units)))
        if self.fleet is not None and flavour.nodes == "Existing":
            self._take(ask, self.fleet.soonest(ask, pods, flavour))

    # explanations

    def _wait(self, name: str, workload: Workload, reason: str, message: str) -> None:
        self.position[name] += 1
        self.verdicts[workload.uid] = Verdict(action="wait", reason=reason, message=message, queue=name, position=self.position[name])

    def _why(self, name: str, workload: Workload) -> tuple[str, str]:
        ask = workload.ask
        flavours = self._flavours(name, workload)
        if not flavours:
            offered = ", ".join(sorted({f.resource_name for f in self.ledger.queues[name].spec.flavours}))
            return "NeverAdmitted", f"queue {name} has no flavour of {ask.resource} for this job's nodeSelector; it has {offered}"
        need = ask.pods[-1] * ask.units
        most = max(self.ledger.most(name, f) for f in flavours)
        if need > most:
            return "NeverAdmitted", f"needs {need} {ask.resource}, queue {name} can have {most} at most, borrowed ones included"
        quota = {f.name: max(0, self.ledger.available(name, f)) for f in flavours}
        best = max(quota.values())
        if best < need:
            rest = ", ".join(f"{left} left of {flavour}" for flavour, left in quota.items())
            return "WaitingForQuota", f"waits for {need - best} of {need} {ask.resource}: quota has {rest}"
        fitting = [f for f in flavours if quota[f.name] >= need]
        free = max((self.fleet.free_units(ask, f) for f in fitting), default=0) if self.fleet is not None else 0
        if free < need:
            return "WaitingForNodes", f"waits for {need - free} of {need} {ask.resource}: {free} are free on the nodes that it may use"
        where = f" within one {ask.topology_key}" if ask.topology_key else ""
        return (
            "WaitingForNodes",
            f"{free} {ask.resource} are free, but not {ask.units} for each of {ask.pods[-1]} pod(s){where}, with the CPU and memory they ask for",
        )

    # gangs that may grow

    def _grow(self) -> None:
        wanted = {
            w.ask.resource
            for waiting in self.waiting.values()
            for w in waiting
            if (v := self.verdicts[w.uid]).action == "wait" and v.reason not in _NOT_FOR_ROOM
        }
        for workload in self.running:
            held, ask = workload.held, workload.ask
            assert held is not None
            queue = self.ledger.queues.get(held.queue)
            if queue is None or held.pods >= ask.pods[0] or ask.resource in wanted or sum(n for _, n in held.bound) < held.pods:
                continue
            if (self.snapshot.now - held.since).total_seconds() < seconds(queue.spec.preemption.minimum_run_time):
                continue
            for pods in (p for p in ask.pods if p > held.pods):
                with ExitStack() as stack:
                    stack.enter_context(self.ledger.given(held, workload.namespace))
                    if self.fleet is not None:
                        stack.enter_context(self.fleet.given(held, ask))
                    found = self._find(held.queue, workload, pods, self.ledger, self.fleet)
                if found is not None:
                    flavour, place = found
                    more = self._admission(held.queue, flavour, pods, workload, place)
                    message = f"there is room for {pods} of {ask.pods[0]} worker pods: it saves a checkpoint and goes on with them"
                    self.verdicts[workload.uid] = Verdict(
                        action="resize", reason="Resized", message=message, queue=held.queue, admission=more
                    )
                    self.ledger.take(held.queue, flavour.name, workload.namespace, (pods - held.pods) * ask.units)
                    if self.fleet is not None:
                        self.fleet.take(place, ask.per_pod)
                    break

    def _report(self, name: str) -> QueueReport:
        mine = [w for w in self.snapshot.workloads if w.held is not None and w.held.queue == name]
        used: Counter[str] = Counter()
        for workload in mine:
            assert workload.held is not None
            used[workload.held.flavour] += workload.held.total
        waiting = [w for w in self.waiting.get(name, ()) if self.verdicts[w.uid].action == "wait"]
        oldest = min(waiting, key=lambda w: (w.since, w.uid), default=None)
        return QueueReport(
            pending=len(waiting),
            admitted=sum(1 for w in mine if w.held is not None and not w.held.stopping),
            used=dict(used),
            share=round(self.ledger.share(name), 4),
            oldest=(oldest.label, oldest.since) if oldest is not None else None,
        )


def _granted(workload: Workload, admission: Admission) -> str:
    ask = workload.ask
    size = f"{admission.pods} of {ask.pods[0]} worker pods" if admission.pods < ask.pods[0] else f"{admission.pods} worker pod(s)"
    what = f"{admission.pods * ask.units} {ask.resource}" if ask.units else "no GPUs"
    where = (
        f"queue {admission.queue}" + (f", flavour {admission.flavour}" if admission.flavour else "")
        if admission.queue
        else "no FineTuneQueue"
    )
    return f"{size} with {what} ({where})"


def _implicit(snapshot: Snapshot) -> Queue:
    """One queue over everything there is."""
    resources = sorted({w.ask.resource for w in snapshot.workloads if w.ask.resource != "cpu"})
    flavours = [
        Flavour.model_construct(
            name=re.sub(r"[^a-z0-9]+", "-", resource.lower()),
            resource_name=resource,
            node_labels={},
            tolerations=[],
            nominal_quota=UNLIMITED,
            borrowing_limit=None,
            lending_limit=None,
            nodes="Autoscaled" if snapshot.autoscaled else "Existing",
            price_per_hour=None,
        )
        for resource in resources
    ]
    spec = FineTuneQueueSpec(flavours=[Flavour(name="none", nominal_quota=0)]).model_copy(update={"flavours": flavours})
    return Queue(name=IMPLICIT, spec=spec)
