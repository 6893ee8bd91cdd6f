"""The thin edge around queueing.decide(): look at the cluster, decide, wake the jobs that something was decided about.

What is decided here is an intention: the job's own pass puts it on record, conditionally, and only the record counts. Until
it is seen there, it is assumed to hold, so that nothing is given away twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from finetune_api.spec import FineTuneJobSpec

from .. import metrics, tracing
from ..cache.store import Store
from ..cluster.inventory import InventoryWatch
from ..cluster.transport import APIError, Cluster
from ..model.objects import Key, Object
from ..model.queueing import Admission, Allocation, Decision, Decisions, Queue, Request, Snapshot, Workload
from ..model.workload import has_ended, is_still, request_of, workload_of
from ..queueing import decide
from ..queueing.report import queue_status
from ..reconcile.job.immutability import may_have_changed, with_changes
from ..settings import Settings

log = logging.getLogger("finetune.scheduler")
_DEBOUNCE = 0.05
_IDLE_SECONDS = 60.0
_NEAR = 20
"""Places in a queue of which every change is told; farther back once a minute, or less often"""
_FAR_SECONDS = 60.0
_HEADS = 20
"""Places in a queue that may be admitted before the next pass over all"""
_HEADS_FIRST = 19
"""Passes over all take at most a twentieth of the time"""
_BACKLOG, _BACKLOG_SECONDS = 64, 1.0
"""Decisions that are not on record yet, and how long a pass waits for them"""
_STATUS_SECONDS = 5.0
_EVERYTHING_SECONDS = 60.0
_HISTORY_SECONDS = 60.0
_DOUBT_SECONDS = 10.0
"""How long nothing is given away while it is not known what a job holds"""
_REQUESTS = 4096


class Scheduler:
    """One per operator; only the one that acts runs it."""

    def __init__(
        self, cluster: Cluster, store: Store, settings: Settings, wake: Callable[[Key], None], busy: Callable[[], bool] = lambda: False
    ) -> None:
        """`wake`: a job is to be looked at. `busy`: whether jobs wait to be."""
        self._cluster, self._store, self._settings, self._wake, self._busy = cluster, store, settings, wake, busy
        self.watch = InventoryWatch(cluster, settings, self.poke)
        self._inventory = self.watch.inventory
        self._specs: dict[str, tuple[int, FineTuneJobSpec, Request]] = {}
        self._requests: dict[Request, Request] = {}
        """Equal ones are one: comparing them costs nothing then"""
        self._seen: dict[Key, Workload] = {}
        """What jobs look like; most of a long line has not changed since the last pass"""
        self._moving: set[Key] = set()
        """Jobs that look different as time passes"""
        self._front: set[Key] = set()
        """Those that were heads when all were looked at, and what has changed since"""
        self._pods_of: dict[Key, tuple[str, ...]] = {}
        """UIDs of the pods that hold something of a node for a job"""
        self._accepted: dict[str, FineTuneJobSpec | None] = {}
        """What jobs began with whose spec may have been changed since; None where the present one holds"""
        self._doubtful: dict[str, float] = {}
        """Jobs that hold something by a spec that may have been changed since; and since when their own passes are waited for"""
        self._decisions: dict[str, Decision] = {}
        self._intended: dict[str, Decision] = {}
        """Admissions and evictions that are not on record yet."""
        self._ready: set[str] = set()
        """Jobs that wait for their turn though their status does not say so yet"""
        self._told: dict[str, float] = {}
        self._looked_at = float("-inf")
        self._looked_with: tuple[Mapping[str, int], int] | None = None
        """When all jobs were looked at, and with which priorities"""
        self._dirty, self._recorded = asyncio.Event(), asyncio.Event()
        self._queue_written: dict[str, float] = {}
        self._took = 0.0
        self._all_due = float("-inf")
        """When all jobs are to be looked at again, not the heads of the lines alone"""
        self._owed = False
        """A queue's status is to be written, but not so soon after the last."""

    def place_seconds(self) -> float:
        """How often a job tells its place in the line, at most: of ten thousand that wait, each does so less often."""
        return len(self._store.job_keys()) / 20

    def decision(self, uid: str) -> Decision | None:
        """What is decided about a job; None before it was looked at."""
        return self._decisions.get(uid)

    def priority(self, name: str | None) -> int:
        """The value of a PriorityClass, or of the default one."""
        known = self._inventory.priorities
        return known.values.get(name, 0) if name is not None else known.default

    def begun_with(self, uid: str, spec: FineTuneJobSpec | None) -> None:
        """A job's spec may have been changed: it goes on, and is counted, with this one."""
        self._doubtful.pop(uid, None)
        if uid not in self._accepted or self._accepted[uid] != spec:
            self._accepted[uid] = spec
            self._specs.pop(uid, None)
            self._store.touch(uid)
            self.poke()

    def waits(self, uid: str) -> bool:
        """The job waits for its turn: to be put on record together with what is decided about it. Whether that is news."""
        if uid in self._ready:
            return False
        self._ready.add(uid)
        self._store.touch(uid)
        self.poke()
        return True

    def recorded(self, uid: str) -> None:
        """The job's status was written: what was decided before is used up."""
        self._ready.discard(uid)
        if self._intended.pop(uid, None) is not None or (v := self._decisions.get(uid)) is None or v.action == "resize":
            self._decisions.pop(uid, None)
        self._recorded.set()
        self.poke()

    def poke(self) -> None:
        """Something changed."""
        self._dirty.set()

    async def run(self) -> None:
        """Decide again whenever something changed, and every few seconds while somebody waits. Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.watch.run())
            group.create_task(self._run())

    async def _run(self) -> None:
        while True:
            heads = self._busy() and time.monotonic() < self._all_due
            try:
                await self.once(heads=heads)
            except APIError as failure:
                log.info("again soon: %s", failure)
            except Exception:
                log.exception("the scheduler's pass failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._all_due - time.monotonic()) if heads else self._patience()):
                    await self._dirty.wait()
            await asyncio.sleep(max(_DEBOUNCE, 4 * self._took) if heads else _DEBOUNCE)  # at most a fifth of the time is spent here
            await self._until_recorded()

    async def _until_recorded(self) -> None:
        """Wait a moment while many decisions are not on record yet: more of them would only wait behind these."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BACKLOG_SECONDS):
                while len(self._intended) > _BACKLOG:
                    self._recorded.clear()
                    await self._recorded.wait()

    def _patience(self) -> float:
        waits = self._owed or any(v.action == "wait" for v in self._decisions.values())
        return self._settings.snapshot_seconds if waits else _IDLE_SECONDS

    async def once(self, *, heads: bool = False) -> Decisions:
        """One pass; over the heads of the lines alone, of what may be admitted now, where a long line would take too much time.

        What those who wait are told, and what queues are, is said by the passes over all.
        """
        self._dirty.clear()
        await self.watch.look()
        began = time.monotonic()
        snapshot = self._snapshot(self._cluster.now(), heads=heads)
        if any(began - since < _DOUBT_SECONDS for since in self._doubtful.values()):
            asyncio.get_running_loop().call_later(1.0, self.poke)
            return Decisions(jobs={}, queues={})
        with tracing.span("schedule", jobs=len(snapshot.workloads)):
            decisions = decide(snapshot)
        self._took = time.monotonic() - began
        metrics.SCHEDULING_SECONDS.observe(self._took)
        self._note(snapshot, decisions, heads=heads)
        if not heads:
            self._all_due = time.monotonic() + _HEADS_FIRST * self._took
            self._front = {key for key, workload in self._seen.items() if self._is_head(workload)}
            await self._report(snapshot, decisions)
        return decisions

    # looking

    async def look(self) -> Snapshot:
        """The cluster as it is now; nothing is decided."""
        await self.watch.look()
        return self._snapshot(self._cluster.now())

    def _is_head(self, workload: Workload) -> bool:
        """Whether it holds something, or may be given it before the next pass over all: it stands near the front, or nobody knows where."""
        if workload.allocation is not None:
            return True
        decision = self._decisions.get(workload.uid)
        return workload.waits and (decision is None or decision.action != "wait" or decision.position <= _HEADS)

    def _snapshot(self, now: datetime, *, heads: bool = False) -> Snapshot:
        inventory = self._inventory
        self._look(now)
        if heads:
            near = [self._seen[key] for key in self._front if key in self._seen]
            workloads = [self._as_intended(workload, now) for workload in near if self._is_head(workload)]
        else:
            workloads = [self._as_intended(workload, now) for workload in self._seen.values()]
        # those are counted with their job, as they are now
        ours = {uid for uids in self._pods_of.values() for uid in uids}
        return Snapshot(
            now=now,
            workloads=tuple(sorted(workloads, key=lambda w: w.uid)),
            queues=tuple(inventory.queues.parsed.values()),
            nodes=inventory.nodes_but_for(ours),
            namespaces=dict(inventory.namespaces.items.values()),
            autoscaled=self._settings.autoscaled,
        )

    def _look(self, now: datetime) -> None:
        """At the jobs that changed; at all of them once a minute."""
        changed, priorities = self._store.changes(), (self._inventory.priorities.values, self._inventory.priorities.default)
        everything = priorities != self._looked_with or time.monotonic() - self._looked_at >= _EVERYTHING_SECONDS
        if everything:
            self._looked_at, self._looked_with, changed = time.monotonic(), priorities, set(self._store.job_keys())
            for known in (self._seen, self._moving, self._pods_of):
                known.clear()  # type: ignore[attr-defined]
        self._front |= changed
        for key in changed | self._moving:
            workload = self._workload(key, now)
            if workload is None:
                gone = self._seen.pop(key, None)
                self._moving.discard(key)
                if gone is not None:
                    self._forget(gone.uid)
                continue
            self._seen[key] = workload
            if is_still(self._store.job(key) or {}):
                self._moving.discard(key)
            else:
                self._moving.add(key)
        if everything:
            for uid in (self._specs.keys() | self._accepted.keys()) - {w.uid for w in self._seen.values()}:
                self._forget(uid)

    def _forget(self, uid: str) -> None:
        for known in (self._specs, self._accepted, self._doubtful, self._decisions, self._intended, self._told):
            known.pop(uid, None)  # type: ignore[attr-defined]
        self._ready.discard(uid)

    def _workload(self, key: Key, now: datetime) -> Workload | None:
        raw = self._store.job(key)
        self._pods_of.pop(key, None)
        if raw is None or raw["metadata"].get("deletionTimestamp"):
            return None
        uid = raw["metadata"]["uid"]
        pods = self._store.gpu_pods(uid)
        if not pods and has_ended(raw):  # most of them, on a cluster that has run for a while
            return None
        spec = self._spec(raw)
        if spec is None:
            return None
        if pods:
            self._pods_of[key] = tuple(pod.uid for pod in pods)
        return workload_of(
            raw, *spec, pods, self.priority(spec[0].scheduling.priority_class_name), self._settings, now, ready=uid in self._ready
        )

    def _spec(self, raw: Object) -> tuple[FineTuneJobSpec, Request] | None:
        uid, generation = raw["metadata"]["uid"], int(raw["metadata"].get("generation", 0))
        known = self._specs.get(uid)
        if known is None or known[0] != generation:
            changed = may_have_changed(raw)
            if changed and uid not in self._accepted:  # its own pass finds out what it began with
                if known is not None:
                    return known[1:]
                if "admission" not in (raw.get("status") or {}):
                    return None
                self._doubtful.setdefault(uid, time.monotonic())
            kept = self._accepted.get(uid) if changed else None
            spec = self._store.spec(raw) or kept
            if spec is None:
                return known[1:] if known is not None else None
            spec = with_changes(kept, spec) if kept is not None else spec
            request = request_of(spec)
            if len(self._requests) > _REQUESTS:
                self._requests.clear()
            known = self._specs[uid] = generation, spec, self._requests.setdefault(request, request)
        return known[1:]

    def _as_intended(self, workload: Workload, now: datetime) -> Workload:
        intended = self._intended.get(workload.uid)
        if intended is None:
            return workload
        allocation = workload.allocation
        if intended.action == "preempt" and allocation is not None and not allocation.stopping:
            return dataclasses.replace(workload, allocation=dataclasses.replace(allocation, stopping=True))
        if intended.action == "admit" and intended.admission is not None and workload.waits and allocation is None:
            granted = _assumed(intended.admission, workload.request, now)
            return dataclasses.replace(workload, allocation=granted, waits=False)
        del self._intended[workload.uid]
        return workload

    # telling

    def _note(self, snapshot: Snapshot, decisions: Decisions, *, heads: bool = False) -> None:
        now, far = time.monotonic(), max(_FAR_SECONDS, self.place_seconds())
        for workload in snapshot.workloads:
            uid = workload.uid
            new = self._intended.get(uid) or decisions.jobs.get(uid)
            old = self._decisions.get(uid)
            if new is None:
                self._decisions.pop(uid, None)
                continue
            if heads and new.action in ("wait", "resize", "refuse"):  # those not looked at have their say first
                continue
            if new.action in ("admit", "preempt"):
                self._intended[uid] = new
            self._decisions[uid] = new
            if new == old or (new.action == "wait" and uid in self._ready):  # that one looks again in a moment, to tell both
                continue
            moved = old is None or (new.action, new.reason) != (old.action, old.reason)
            if moved or new.position <= _NEAR or now - self._told.get(uid, float("-inf")) >= far:
                self._told[uid] = now
                self._wake((workload.namespace, workload.name))

    async def _report(self, snapshot: Snapshot, decisions: Decisions) -> None:
        self._owed = False
        metrics.PENDING.clear()
        metrics.QUEUE_USED.clear()
        for name, report in decisions.queues.items():
            metrics.PENDING.labels(queue=name).set(report.pending)
            for flavor, units in report.used.items():
                metrics.QUEUE_USED.labels(queue=name, flavor=flavor).set(units)
        await asyncio.gather(*(self._write(queue, snapshot, decisions) for queue in snapshot.queues))

    async def _write(self, queue: Queue, snapshot: Snapshot, decisions: Decisions) -> None:
        raw = self._inventory.queues.items.get(queue.name)
        if raw is None:  # gone meanwhile
            return
        since = time.monotonic() - self._queue_written.get(queue.name, float("-inf"))
        status = queue_status(queue, raw, snapshot, decisions)
        old = dict(raw.get("status") or {})
        new: dict[str, Any] = status.to_wire()
        if {**old, "history": None} == {**new, "history": None} and (since < _HISTORY_SECONDS or status.history.gpu_seconds < 1):
            return
        if since < _STATUS_SECONDS:
            self._owed = True
            return
        try:
            answer = await self._cluster.replace_status({**raw, "status": new}, urgent=False)
        except APIError as failure:
            if failure.transient:
                raise
            log.info("queue %s: status refused: %s", queue.name, failure)
            self._owed = True  # it changed, or is gone: the watch tells
            return
        self._queue_written[queue.name] = time.monotonic()
        self._inventory.queues.put(answer)


def _assumed(admission: Admission, request: Request, now: datetime) -> Allocation:
    return Allocation(
        queue=admission.queue,
        flavor=admission.flavor,
        pods=admission.pods,
        units=request.units,
        since=now,
        topology=admission.topology,
        bound=admission.place,
    )
