"""The admission loop, as Kueue's: look at what was seen and what is assumed, decide, assume, wake the jobs it is about.

Knows nothing of how a decision comes on record: a job's own pass reads it in `Assumptions`, and writes it on condition.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime

from finetune_api.spec import FineTuneJobSpec

from .. import metrics, tracing
from ..cache.assumptions import Assumptions, Expired
from ..cache.node_history import NodeHistory
from ..cache.store import Store
from ..cluster.errors import APIError
from ..cluster.inventory import InventoryWatch
from ..cluster.transport import Cluster
from ..model.job import PodView
from ..model.objects import Key, Object
from ..model.queueing import Admission, Allocation, Decisions, Request, Snapshot, Workload
from ..model.workload import has_ended, is_still, leaving, left_behind, request_of, workload_of
from ..queueing import decide, missing_rights
from ..reconcile.job.immutability import holds, may_have_changed, with_changes
from ..settings import Settings
from .endpoint_demands import EndpointDemands
from .queue_status import QueueStatusWriter

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
_SLICE_SECONDS = 0.01
"""How long jobs are looked at before others have their turn"""
_BACKLOG, _BACKLOG_SECONDS = 64, 1.0
"""Decisions that are not on record yet, and how long a pass waits for them"""
_EVERYTHING_SECONDS = 60.0
_DOUBT_SECONDS = 10.0
"""How long nothing is given away while it is not known what a job holds"""
_REQUESTS = 4096


class AdmissionLoop:
    """One per operator; only the one that acts runs it."""

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        assumptions: Assumptions,
        settings: Settings,
        wake: Callable[[Key], None],
        busy: Callable[[], bool] = lambda: False,
        expired: Callable[[Object, Expired], None] = lambda job, expired: None,
        wake_endpoint: Callable[[Key], None] = lambda key: None,
    ) -> None:
        """`wake`: a job is to be looked at. `busy`: whether jobs wait to be. `expired`: a decision about a job was given up."""
        self._cluster, self._store, self._assumptions, self._settings = cluster, store, assumptions, settings
        self._wake, self._busy, self._expired, self._wake_endpoint = wake, busy, expired, wake_endpoint
        self._queue_status = QueueStatusWriter(cluster)
        self.watch = InventoryWatch(cluster, settings, self.poke)
        self._inventory, self._history = self.watch.inventory, NodeHistory()
        self.demands = EndpointDemands(store, self._inventory, assumptions, self.priority, self.forget)
        self._specs: dict[str, tuple[int, FineTuneJobSpec | None, FineTuneJobSpec, Request]] = {}
        """By UID: generation, what it began with if that is another, what holds, what it requests"""
        self._requests: dict[Request, Request] = {}
        """Equal ones are one: comparing them costs nothing then"""
        self._seen: dict[Key, Workload] = {}
        """What jobs look like; most of a long line has not changed since the last pass"""
        self._moving: set[Key] = set()
        """Jobs that look different as time passes"""
        self._front: set[Key] = set()
        """Those that were heads when all were looked at, and what has changed since"""
        self._leaving: dict[str, Workload] = {}
        """By UID: jobs that are gone, whose pods still hold something"""
        self._pods_of: dict[Key, tuple[str, ...]] = {}
        """UIDs of the pods that hold something of a node for a job"""
        self._doubtful: dict[str, float] = {}
        """Jobs that hold something by a spec that may have been changed since; and since when their own passes are waited for"""
        self._told: dict[str, float] = {}
        self._looked_at = float("-inf")
        self._looked_with: tuple[Mapping[str, int], int] | None = None
        """When all jobs were looked at, and with which priorities"""
        self._dirty, self._recorded = asyncio.Event(), asyncio.Event()
        self._forbidden: tuple[str, ...] = ()
        """What it was last said of that it may not be listed"""
        self._took = 0.0
        self._all_due = float("-inf")
        """When all jobs are to be looked at again, not the heads of the lines alone"""

    def priority(self, name: str | None) -> int:
        """The value of a PriorityClass, or of the default one."""
        known = self._inventory.priorities
        return known.values.get(name, 0) if name is not None else known.default

    def configure(self, settings: Settings) -> None:
        """Settings that are found after the start."""
        self._settings = settings
        self.poke()

    def poke(self) -> None:
        """Something changed, or came on record."""
        self._dirty.set()
        self._recorded.set()

    def forget(self, uid: str) -> None:
        """The job is gone, or has ended."""
        for known in (self._specs, self._doubtful, self._told):
            known.pop(uid, None)  # type: ignore[attr-defined]

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
                while self._assumptions.backlog > _BACKLOG:
                    self._recorded.clear()
                    await self._recorded.wait()

    def _patience(self) -> float:
        waits = self._queue_status.owed or self._assumptions.waits_for_decisions()
        return self._settings.snapshot_seconds if waits else _IDLE_SECONDS

    async def once(self, *, heads: bool = False) -> Decisions:
        """One pass; over the heads of the lines alone, of what may be admitted now, where a long line would take too much time.

        What those who wait are told, and what queues are, is said by the passes over all.
        """
        self._dirty.clear()
        # 1. what did not come on record is given up
        self._give_up()
        # 2. a snapshot of what was seen, with what is assumed
        await self.watch.look()
        self._tell_of_rights()
        began = time.monotonic()
        await self._look(self._cluster.now())
        snapshot = self._snapshot(self._cluster.now(), heads=heads)
        if any(began - since < _DOUBT_SECONDS for since in self._doubtful.values()):
            asyncio.get_running_loop().call_later(1.0, self.poke)
            return Decisions(jobs={}, queues={})
        # 3. decide
        with tracing.span("schedule", jobs=len(snapshot.workloads)):
            # in a thread: it takes seconds for ten thousand jobs, and what comes in meanwhile is looked at in the next pass
            decisions = await asyncio.to_thread(decide, snapshot)
        self._took = time.monotonic() - began
        metrics.SCHEDULING_SECONDS.observe(self._took)
        # 4. assume it, and wake whom it is about
        self._assume(snapshot, decisions, heads=heads)
        # 5. say what the queues are
        if not heads:
            self._all_due = time.monotonic() + _HEADS_FIRST * self._took
            self._front = {key for key, workload in self._seen.items() if self._is_head(workload)}
            await self._queue_status.write(self._inventory.queues, snapshot, decisions)
        return decisions

    def _give_up(self) -> None:
        for expired in self._assumptions.expire():
            metrics.ASSUMPTIONS_EXPIRED.labels(action=expired.decision.action).inc()
            if (job := self._store.job_of_uid(expired.uid)) is not None:
                self._expired(job, expired)
            self._store.touch(expired.uid)
            asyncio.get_running_loop().call_later(expired.again_in, self._look_again, expired.uid)

    def _look_again(self, uid: str) -> None:
        self._store.touch(uid)
        self.poke()

    def _tell_of_rights(self) -> None:
        if self.watch.forbidden != self._forbidden:
            self._forbidden = self.watch.forbidden
            log.warning("%s", missing_rights(self._forbidden) if self._forbidden else "the operator may list all that queues need now")

    # looking

    async def look(self) -> Snapshot:
        """The cluster as it is now; nothing is decided."""
        await self.watch.look()
        await self._look(self._cluster.now())
        return self._snapshot(self._cluster.now())

    def _is_head(self, workload: Workload) -> bool:
        """Whether it holds something, or may be given it before the next pass over all: it stands near the front, or nobody knows where."""
        if workload.allocation is not None:
            return True
        decision = self._assumptions.decision(workload.uid)
        return workload.waits and (decision is None or decision.action != "wait" or decision.position <= _HEADS)

    def _snapshot(self, now: datetime, *, heads: bool = False) -> Snapshot:
        inventory = self._inventory
        if heads:
            near = [self._seen[key] for key in self._front if key in self._seen]
            workloads = [self._as_assumed(workload, now) for workload in near if self._is_head(workload)]
        else:
            workloads = [self._as_assumed(workload, now) for workload in self._seen.values()]
        if self._settings.counts_quota:
            workloads += [self._as_assumed(workload, now) for workload in self.demands.workloads(now)]
        left = self._left(now)
        workloads += left
        ours = {uid for uids in self._pods_of.values() for uid in uids}
        ours |= {pod.uid for workload in left for pod in self._store.gpu_pods(workload.uid)}
        nodes = inventory.nodes_but_for(ours)  # those are counted with their job, as they are now
        return Snapshot(
            now=now,
            workloads=tuple(sorted(workloads, key=lambda w: w.uid)),
            queues=tuple(inventory.queues.parsed.values()),
            nodes=nodes,
            missing=self._history.look(nodes) if nodes is not None else (),
            namespaces=dict(inventory.namespaces.items.values()),
            forbidden=self.watch.forbidden,
            unlimited=self._settings.queueing_backend == "none",
            autoscaled=self._settings.autoscaled,
        )

    async def _look(self, now: datetime) -> None:
        """At the jobs that changed; at all of them once a minute, some at a time."""
        changed, priorities = self._store.changes(), (self._inventory.priorities.values, self._inventory.priorities.default)
        everything = priorities != self._looked_with or time.monotonic() - self._looked_at >= _EVERYTHING_SECONDS
        if everything:
            self._looked_at, self._looked_with, changed = time.monotonic(), priorities, {*self._store.job_keys(), *self._seen}
        self._front |= changed
        began = time.monotonic()
        for key in changed | self._moving:
            if time.monotonic() - began > _SLICE_SECONDS:
                await asyncio.sleep(0)
                began = time.monotonic()
            before, workload = self._seen.get(key), self._workload(key, now)
            if before is not None and (workload is None or workload.uid != before.uid):
                self._leaving[before.uid] = before
                self.forget(before.uid)
                self._assumptions.forget(before.uid)
            if workload is None:
                self._seen.pop(key, None)
                self._moving.discard(key)
                continue
            self._seen[key] = workload
            self._leaving.pop(workload.uid, None)
            if is_still(self._store.job(key) or {}):
                self._moving.discard(key)
            else:
                self._moving.add(key)

    def _workload(self, key: Key, now: datetime) -> Workload | None:
        raw = self._store.job(key)
        self._pods_of.pop(key, None)
        if raw is None:
            return None
        uid = raw["metadata"]["uid"]
        deleting = bool(raw["metadata"].get("deletionTimestamp"))
        pods = self._holding(uid) if deleting else self._store.gpu_pods(uid)
        if not pods and (deleting or has_ended(raw)):  # most of them, on a cluster that has run for a while
            return None
        spec = self._spec(raw)
        if spec is None:
            return None
        workload = workload_of(
            raw,
            *spec,
            pods,
            self.priority(spec[0].scheduling.priority_class_name),
            self._settings,
            now,
            ready=self._assumptions.is_ready(uid),
        )
        if pods and workload.allocation is not None:
            self._pods_of[key] = tuple(pod.uid for pod in pods)
        return workload

    def _left(self, now: datetime) -> list[Workload]:
        """Jobs that are gone while pods of theirs still save: what those hold is free when they have ended, and not before."""
        unseen = {uid: pods for uid, pods in self._store.left_behind().items() if uid not in self._leaving}
        if unseen:  # they were deleted while no operator ran, or since jobs were looked at
            for workload in self._seen.values():
                unseen.pop(workload.uid, None)
            requests = self._inventory.requests_of(pod.uid for pods in unseen.values() for pod in pods)
            flavors = {
                (queue.name, flavor.name): flavor for queue in self._inventory.queues.parsed.values() for flavor in queue.spec.flavors
            }
            for uid, pods in unseen.items():
                if (found_by_pods := left_behind(uid, pods, requests, flavors, self._settings, now)) is not None:
                    self._leaving[uid] = found_by_pods
        found = {uid: left for uid, gone in self._leaving.items() if (left := leaving(gone, self._holding(uid))) is not None}
        self._leaving = found
        return list(found.values())

    def _holding(self, uid: str) -> list[PodView]:
        """Pods that hold something for a job that goes. Nobody will hear the end of one that is deleted on a node that is lost."""
        return [p for p in self._store.gpu_pods(uid) if not (p.deleting and p.node and self._inventory.is_lost(p.node))]

    def _spec(self, raw: Object) -> tuple[FineTuneJobSpec, Request] | None:
        uid, generation = raw["metadata"]["uid"], int(raw["metadata"].get("generation", 0))
        known, changed = self._specs.get(uid), may_have_changed(raw)
        if changed and not self._store.knows_beginning(uid):  # its own pass finds out what it began with
            if known is not None:
                return known[2:]
            if "admission" not in (raw.get("status") or {}):
                return None
            self._doubtful.setdefault(uid, time.monotonic())
        elif uid in self._doubtful:
            del self._doubtful[uid]
        kept = self._store.beginning(uid) if changed else None
        if known is None or known[:2] != (generation, kept):
            spec = self._store.spec(raw) or kept
            if spec is None:
                return known[2:] if known is not None else None
            if kept is not None:
                spec = with_changes(kept, spec, held=holds(raw.get("status") or {}, self._store.gpu_pods(uid)))
            request = request_of(spec)
            if len(self._requests) > _REQUESTS:
                self._requests.clear()
            known = self._specs[uid] = generation, kept, spec, self._requests.setdefault(request, request)
        return known[2:]

    def _as_assumed(self, workload: Workload, now: datetime) -> Workload:
        if not self._assumptions.may_be_decided(workload.uid):
            return dataclasses.replace(workload, waits=False)
        assumed = self._assumptions.held(workload.uid)
        if assumed is None:
            return workload
        allocation = workload.allocation
        if assumed.action == "preempt" and allocation is not None and not allocation.stopping:
            return dataclasses.replace(workload, allocation=dataclasses.replace(allocation, stopping=True))
        if assumed.action == "admit" and assumed.admission is not None and workload.waits and allocation is None:
            granted = _assumed(assumed.admission, workload.request, now)
            return dataclasses.replace(workload, allocation=granted, waits=False)
        more = assumed.admission if assumed.action == "resize" else None
        if more is not None and allocation is not None and not allocation.stopping and allocation.pods < more.pods:
            return dataclasses.replace(workload, allocation=dataclasses.replace(allocation, pods=more.pods, flavor=more.flavor))
        self._assumptions.confirm(workload.uid)
        return workload

    # deciding

    def _assume(self, snapshot: Snapshot, decisions: Decisions, *, heads: bool = False) -> None:
        now, far = time.monotonic(), max(_FAR_SECONDS, place_seconds(self._store))
        for workload in snapshot.workloads:
            uid = workload.uid
            new = self._assumptions.held(uid) or decisions.jobs.get(uid)
            old = self._assumptions.decision(uid)
            if heads and new is not None and new.action in ("wait", "resize", "refuse"):  # those not looked at have their say first
                continue
            self._assumptions.decide(uid, new)
            if new is None or new == old or (new.action == "wait" and self._assumptions.is_ready(uid)):  # looks again soon, to tell both
                continue
            moved = old is None or (new.action, new.reason) != (old.action, old.reason)
            if moved or new.position <= _NEAR or now - self._told.get(uid, float("-inf")) >= far:
                self._told[uid] = now
                (self._wake_endpoint if workload.serves else self._wake)((workload.namespace, workload.name))


def place_seconds(store: Store) -> float:
    """How often a job tells its place in the line, at most: of ten thousand that wait, each does so less often."""
    return store.job_count / 20


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
