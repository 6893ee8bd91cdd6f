"""decide(): one pass over all that waits. Deterministic: the same snapshot gives the same answer.

Queues take turns: those within their own quota first, then the least weighted share (quota.py); within a queue line.py
decides. A gang is admitted when quota and nodes have room for all of it. What does not fit is passed by later jobs, until
it has waited for `backfillFor`: then what becomes free is kept for it, which bounds how long anybody is passed.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter, defaultdict

from finetune_api.queue import DEFAULT_QUEUE, Flavour
from finetune_api.scalars import human_duration, seconds

from . import explain
from .books import Books, Room
from .line import Line
from .model import IMPLICIT, Admission, Decisions, Held, Queue, QueueReport, Snapshot, Verdict, Workload, may_use
from .placement import Fleet, Place, never_fits
from .preemption import Wish, candidates, effective_priority, victims
from .quota import Ledger, implicit_queue, namespace_use

_NOT_FOR_ROOM = ("NeverAdmitted", "QueueStopped", "NamespaceLimit", "UserLimit")
"""Reasons of waiting that no free GPU would end."""
_PREEMPTION_TRIES = 8
"""Jobs per queue and pass that others are looked for to give way to."""


def decide(snapshot: Snapshot) -> Decisions:
    """What is decided about every job and every queue. Pure."""
    return _Pass(snapshot).run()


class _Pass:
    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        queues = snapshot.queues or (implicit_queue(snapshot),)
        self.books = Books(Ledger(queues, snapshot.now), Fleet(snapshot.nodes) if snapshot.nodes is not None else None)
        self.ledger, self.fleet = self.books.ledger, self.books.fleet
        self.verdicts: dict[str, Verdict] = {}
        self.waiting: dict[str, list[Workload]] = defaultdict(list)
        self.running: list[Workload] = []
        self.failed: dict[tuple[object, ...], tuple[str, str]] = {}
        self.tries: Counter[str] = Counter()
        self.position: Counter[str] = Counter()
        self._offers: dict[tuple[object, ...], list[Flavour]] = {}
        self._homes: dict[tuple[str, str | None], tuple[str | None, tuple[str, str]]] = {}

    def run(self) -> Decisions:
        for workload in self.snapshot.workloads:
            self._count(workload)
        for workload in sorted((w for w in self.snapshot.workloads if w.held is not None), key=lambda w: (-w.ask.units, w.uid)):
            self._expect(workload)
        for workload in self.snapshot.workloads:
            self._sort(workload)
        self._drain()
        self._take_turns()
        self._grow()
        held: dict[str, list[tuple[str, Held]]] = defaultdict(list)
        for workload in self.snapshot.workloads:
            if workload.held is not None:
                held[workload.held.queue].append((workload.namespace, workload.held))
        return Decisions(verdicts=self.verdicts, queues={name: self._report(name, held[name]) for name in self.ledger.queues})

    # who has what, who wants what

    def _count(self, workload: Workload) -> None:
        if (held := workload.held) is not None:
            self.ledger.take(held.queue, held.flavour, workload.owners, held.total)
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
            self.books.stopping.append(workload)
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
        key = workload.namespace, workload.queue
        if key not in self._homes:
            self._homes[key] = self._find_queue(workload)
        return self._homes[key]

    def _find_queue(self, workload: Workload) -> tuple[str | None, tuple[str, str]]:
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
        return may_use(queue, self.snapshot.namespaces.get(namespace))

    def _flavour(self, queue: str, flavour: str) -> Flavour | None:
        known = self.ledger.queues.get(queue)
        return next((f for f in known.spec.flavours if f.name == flavour), None) if known is not None else None

    def _flavours(self, queue: str, workload: Workload) -> list[Flavour]:
        """Those with the job's resource whose nodes its selector does not rule out."""
        key = queue, workload.ask.resource, workload.ask.selector
        if key not in self._offers:
            selector = dict(workload.ask.selector)
            self._offers[key] = [
                flavour
                for flavour in self.ledger.queues[queue].spec.flavours
                if flavour.resource_name == workload.ask.resource and all(selector.get(k, v) == v for k, v in flavour.node_labels.items())
            ]
        return self._offers[key]

    def _autoscaled(self, queue: str, workload: Workload) -> bool:
        return any(flavour.nodes == "Autoscaled" for flavour in self._flavours(queue, workload))

    # turns

    def _drain(self) -> None:
        for workload in self.running:
            assert workload.held is not None
            queue = self.ledger.queues.get(workload.held.queue)
            if queue is not None and queue.spec.stop_policy == "HoldAndDrain":
                self._preempt(workload, f"queue {queue.name} is drained (stopPolicy)")

    def _preempt(self, workload: Workload, message: str) -> None:
        self.running = [w for w in self.running if w is not workload]
        self.books.stopping.append(workload)
        self.verdicts[workload.uid] = Verdict(action="preempt", reason="Preempted", message=message, queue=workload.held.queue)  # type: ignore[union-attr]

    def _take_turns(self) -> None:
        lines: dict[str, Line] = {}
        turns: list[tuple[tuple[object, ...], str]] = []
        for name, waiting in sorted(self.waiting.items()):
            queue = self.ledger.queues[name]
            past = namespace_use(queue.history, queue.spec, self.snapshot.now)
            use = {
                space: past.get(space, 0.0) + self.ledger.by_owner[name, f"namespace {space}"] for space in {w.namespace for w in waiting}
            }
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
        while workload is not None:
            units, closed = self._look_at(name, workload)
            line.drop(workload, units)
            if closed:
                for other in line.rest():
                    self._wait(name, other, "WaitingForTurn", closed)
            before, workload = workload, line.peek()
            if workload is None or units or not self._fails_like(name, before, workload):
                return

    def _fails_like(self, name: str, before: Workload, workload: Workload) -> bool:
        """Whether the next in line wants what the one before it did not get: it needs no turn of its own to be told so."""
        if workload.ask is not before.ask and workload.ask != before.ask:
            return False
        return (
            workload.priority == before.priority
            and (name, workload.ask, effective_priority(workload, self.ledger.queues[name].spec.limits.max_priority)) in self.failed
        )

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
        if (limit := explain.limit(self.books, queue, workload)) is not None:
            self._wait(name, workload, *limit)
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
                action="admit", reason="Admitted", message=explain.granted(workload, admission), queue=name, admission=admission
            )
            return units, ""
        if kind in self.failed:
            reason, message = self.failed[kind]
        else:
            reason, message = self._make_room(name, workload, priority) or explain.shortage(
                self.books, queue, workload, self._flavours(name, workload)
            )
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

    def _fit(self, name: str, workload: Workload) -> Admission | None:
        """Admit it when all of it fits now, with as many pods as do."""
        ask, flavours = workload.ask, self._flavours(name, workload)
        if not flavours:
            if ask.resource == "cpu" and all(f.resource_name != "cpu" for f in self.ledger.queues[name].spec.flavours):
                self.books.give(name, "", workload, 0, ())
                return Admission(queue=name, flavour="", pods=ask.pods[0])
            return None
        for pods in ask.pods:
            found = self.books.room(name, workload, pods, flavours)
            if found is not None:
                flavour, place = found
                self.books.give(name, flavour.name, workload, pods, place)
                return self._admission(name, flavour, pods, workload, place)
        return None

    def _admission(self, queue: str, flavour: Flavour, pods: int, workload: Workload, place: Place) -> Admission:
        return Admission(
            queue=queue,
            flavour=flavour.name,
            pods=pods,
            node_labels=tuple(sorted(flavour.node_labels.items())),
            tolerations=tuple(flavour.tolerations),
            price_per_hour=flavour.price_per_hour,
            teraflops=flavour.teraflops,
            topology=self.fleet.domain(workload.ask, place) if self.fleet is not None else None,
            place=place,
        )

    def _make_room(self, name: str, workload: Workload, priority: int) -> tuple[str, str] | None:
        """Wait for those that give way already, or ask others to; None when that would not help."""
        books, pods, flavours = self.books, workload.ask.pods[-1], self._flavours(name, workload)

        def room() -> Room | None:
            return books.room(name, workload, pods, flavours, later=True)

        found = room() if books.stopping else None
        if found is None:
            if self.tries[name] >= _PREEMPTION_TRIES:
                return None
            self.tries[name] += 1
            ledger = books.later[0]
            for flavour in flavours:
                wish = Wish(workload=workload, priority=priority, queue=name, flavour=flavour, pods=pods)
                ordered = candidates(wish, self.running, ledger, self.snapshot.now)
                chosen = victims(wish, ordered, ledger, books.let_go, books.keep, lambda: room() is not None)
                for victim in chosen:
                    same = victim.held is not None and victim.held.queue == name
                    back = (
                        f"queue {name} takes its quota back" if not ledger.borrows(name, flavour, wish.units) else f"queue {name} has less"
                    )
                    how = f"priority {priority}" if same else back
                    self._preempt(victim, f"gives way to {workload.label} ({how})")
                if chosen:
                    found = room()
                    break
        if found is None:
            return None
        flavour, place = found
        books.reserve(name, flavour.name, pods * workload.ask.units, workload.ask, place)
        return "WaitingForPreemption", f"waits for {len(books.stopping)} job(s) that save their checkpoints and give way"

    def _keep_for(self, name: str, workload: Workload) -> None:
        """Keep what becomes free for a job: of quota what is its queue's own, and the nodes that it would have soonest."""
        ask, pods, flavours = workload.ask, workload.ask.pods[-1], self._flavours(name, workload)
        flavour = max(flavours, key=lambda f: self.ledger.available(name, f))
        own = flavour.nominal_quota - self.ledger.used[name, flavour.name]
        units = max(0, min(self.ledger.available(name, flavour), own, pods * ask.units))
        place = self.fleet.soonest(ask, pods, flavour) if self.fleet is not None and flavour.nodes == "Existing" else ()
        self.books.reserve(name, flavour.name, units, ask, place)

    def _wait(self, name: str, workload: Workload, reason: str, message: str) -> None:
        self.position[name] += 1
        self.verdicts[workload.uid] = Verdict(action="wait", reason=reason, message=message, queue=name, position=self.position[name])

    # gangs that may grow

    def _grow(self) -> None:
        able = [w for w in self.running if w.held is not None and w.held.pods < w.ask.pods[0]]
        wanted = {
            w.ask.resource
            for waiting in (self.waiting.values() if able else ())
            for w in waiting
            if (v := self.verdicts[w.uid]).action == "wait" and v.reason not in _NOT_FOR_ROOM
        }
        for workload in able:
            held, ask = workload.held, workload.ask
            assert held is not None
            queue = self.ledger.queues.get(held.queue)
            if queue is None or ask.resource in wanted or sum(n for _, n in held.bound) < held.pods:
                continue
            if (self.snapshot.now - held.since).total_seconds() < seconds(queue.spec.preemption.minimum_run_time):
                continue
            for pods in (p for p in ask.pods if p > held.pods):
                found = self.books.room_instead(held.queue, workload, pods, self._flavours(held.queue, workload))
                if found is not None:
                    flavour, place = found
                    more = self._admission(held.queue, flavour, pods, workload, place)
                    message = f"there is room for {pods} of {ask.pods[0]} worker pods: it saves a checkpoint and goes on with them"
                    self.verdicts[workload.uid] = Verdict(
                        action="resize", reason="Resized", message=message, queue=held.queue, admission=more
                    )
                    self.ledger.take(held.queue, flavour.name, workload.owners, (pods - held.pods) * ask.units, jobs=0)
                    if self.fleet is not None:
                        self.fleet.take(place, ask.per_pod)
                    break

    def _report(self, name: str, mine: list[tuple[str, Held]]) -> QueueReport:
        used: Counter[str] = Counter()
        by_namespace: Counter[str] = Counter()
        for namespace, held in mine:
            used[held.flavour] += held.total
            by_namespace[namespace] += held.total
        waiting = [w for w in self.waiting.get(name, ()) if self.verdicts[w.uid].action == "wait"]
        oldest = min(waiting, key=lambda w: (w.waits_since, w.uid), default=None)
        return QueueReport(
            pending=len(waiting),
            admitted=sum(1 for _, held in mine if not held.stopping),
            used=dict(used),
            by_namespace=dict(by_namespace),
            share=round(self.ledger.share(name), 4),
            oldest=(oldest.label, oldest.waits_since) if oldest is not None else None,
        )
