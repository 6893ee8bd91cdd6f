"""The thin edge around reconcile(): observe, decide, act, write the status, ask to be woken."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import time
from typing import Any

from finetune_api import names
from finetune_api.contract import JobFile
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus

from .. import metrics, tracing
from ..cache.progress import ProgressBoard
from ..cache.store import Store
from ..cluster.lease import Lease
from ..cluster.transport import APIError, Cluster
from ..logs import JOB
from ..model.children import owner_uid
from ..model.job import Observed
from ..model.objects import CHILD_KINDS, Key, Object, child_kinds
from ..model.workload import priority_class_of
from ..reconcile.job import reconcile, refused, unreadable
from ..reconcile.job.failures import suspects
from ..reconcile.job.immutability import may_have_changed
from ..reconcile.plan import Action, Apply, Create, Delete, Event, Patch, Plan, WriteUrgency
from ..resources.event import event_manifest
from ..settings import Settings
from .admission import Scheduler
from .external_queue import ExternalQueue
from .telemetry import Telemetry
from .workqueue import WorkQueue

log = logging.getLogger("finetune.controller")
_SUSPECTS_SECONDS = 5.0
SELECTOR = f"{names.LABEL_MANAGED_BY}={names.MANAGER}"


class Controller:
    """One per process. All state in it can be lost at any time: the truth is in the API server."""

    def __init__(self, cluster: Cluster, store: Store, board: ProgressBoard, settings: Settings, lease: Lease | None = None) -> None:
        self.cluster, self.store, self.board, self.settings, self.lease = cluster, store, board, settings, lease
        self.queue: WorkQueue[Key] = WorkQueue(self._rank)
        self.scheduler = Scheduler(cluster, store, settings, self.queue.add, lambda: len(self.queue) > 0)
        self.external_queue = ExternalQueue(cluster, store, settings)
        self.telemetry = Telemetry()
        self._written: dict[str, float] = {}
        self._untold: dict[str, float] = {}
        """By UID: since when a status waits for what follows soon"""
        self._suspects: tuple[str, ...] = ()
        self._suspects_at = float("-inf")
        self.synced = asyncio.Event()
        self.acting = False
        """Whether this is the operator that acts, not one that stands by."""
        self.last_resync = time.monotonic()

    async def run(self) -> None:
        """List everything once, wait for the lease, then work until cancelled. Raises LeaseLost."""
        await self._resync_until_done()
        self.synced.set()
        log.info("in sync: %d jobs", len(self.store.job_keys()))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._resync_forever())
            if self.lease is not None:
                await self.lease.acquire()
                await self._resync_until_done()  # what the one before wrote last
                group.create_task(self.lease.hold())
            self.acting = True
            if self.settings.queueing_backend == "kueue":
                group.create_task(self.external_queue.run())
            if self.settings.admits_itself:
                group.create_task(self.scheduler.run())
            group.create_task(self.queue.run(self.process, self.settings.workers))

    async def process(self, key: Key) -> None:
        """One pass over one job. Any failure puts the key back with back-off."""
        if self.lease is not None and not self.lease.held:  # this process was frozen: the next renewal tells
            self.queue.add_after(key, 1.0)
            return
        started = time.monotonic()
        JOB.set("/".join(key))
        try:
            with tracing.span("reconcile", namespace=key[0], job=key[1]):
                await self._pass(key)
            self.queue.forget(key)
        except APIError as failure:
            self._failed(key, metrics.api_reason(failure.reason), str(failure), expected=failure.conflict or failure.transient)
        except Exception as failure:
            log.exception("%s/%s: pass failed", *key)
            await self._tell_unreadable(key, failure)
            self._failed(key, type(failure).__name__, str(failure), expected=False)
        finally:
            metrics.RECONCILE_SECONDS.observe(time.monotonic() - started)
            metrics.QUEUE_DEPTH.set(len(self.queue))

    async def _tell_unreadable(self, key: Key, failure: Exception) -> None:
        """One job that cannot be worked on says so; that this may fail, too, must not hide why."""
        job = self.store.job(key)
        if job is not None:
            with contextlib.suppress(Exception):
                plan = unreadable(Observed(job=job, now=self.cluster.now()), self.settings, f"{type(failure).__name__}: {failure}"[:500])
                await self._say(key, job, plan)

    def _rank(self, key: Key) -> tuple[int, ...]:
        """Jobs that others wait for to give way go first, then those that have GPUs or are about to. Then by priority."""
        job = self.store.job(key)
        if job is None:
            return 0, 0
        status, decision = job.get("status") or {}, self.scheduler.decision(job["metadata"]["uid"])
        holds = decision is not None and decision.action in ("admit", "preempt", "resize")
        if not holds and not status.get("finishedAt"):
            holds = any(c.get("type") == "Admitted" and c.get("status") == "True" for c in status.get("conditions") or ())
        gives_way = decision is not None and decision.action == "preempt"
        return int(holds) + int(gives_way), self.scheduler.priority(priority_class_of(job))

    def trust(self, ca_bundle: str, authorities: str = "") -> None:
        """Let the jobs' pods trust these certificates; their ConfigMaps are written again where that is new."""
        if (ca_bundle, authorities) != (self.settings.ca_bundle, self.settings.authorities):
            self.settings = dataclasses.replace(self.settings, ca_bundle=ca_bundle, authorities=authorities)
            for key in self.store.job_keys():
                self.queue.add(key)

    def _failed(self, key: Key, reason: str, message: str, *, expected: bool) -> None:
        metrics.RECONCILE_ERRORS.labels(reason=reason).inc()
        delay = self.queue.retry(key)
        log.log(logging.INFO if expected else logging.WARNING, "%s/%s: again in %.1f s: %s", *key, delay, message)

    async def _pass(self, key: Key) -> None:
        job = self.store.job(key)
        if job is None:
            return
        uid = job["metadata"]["uid"]
        observed = self.store.observe(key, self.cluster.now(), self.board.latest(uid))
        assert observed is not None
        accepted = await self._accepted(job)
        if may_have_changed(job):
            self.scheduler.begun_with(uid, accepted)
        observed = dataclasses.replace(
            observed,
            accepted=accepted,
            lost_nodes=await self._lost_nodes(observed),
            suspect_nodes=self._suspect_nodes(),
            **await self._external(job, observed),
            decision=self.scheduler.decision(uid),
        )
        with tracing.span("decide"):
            plan = reconcile(observed, self.settings)
        if plan.due is WriteUrgency.SOON and plan.status is not None and plan.status.phase == "Queued" and self.scheduler.waits(uid):
            self._untold[uid] = time.monotonic()  # it answers in a moment, however late this pass is: one write tells both
        try:
            await self._act(job, plan.actions)
        except APIError as failure:
            if not failure.transient:
                await self._say(key, job, refused(observed, self.settings, failure.message))
            raise
        await self._say(key, job, plan)
        if plan.requeue_at is not None:
            self.queue.add_after(key, (plan.requeue_at - self.cluster.now()).total_seconds())

    async def _accepted(self, job: Object) -> FineTuneJobSpec | None:
        """The spec that the job began with, from its ConfigMap. Asked for only when the present one may be another."""
        if not may_have_changed(job):
            return None
        meta = job["metadata"]
        try:
            found = await self.cluster.get("ConfigMap", meta["namespace"], names.config_map_name(meta["name"]))
            if owner_uid(found) == meta["uid"]:
                return JobFile.model_validate(json.loads(found["data"]["job.json"])).spec
        except APIError as failure:
            if not failure.not_found:
                raise
        except (ValueError, KeyError, TypeError):
            log.warning("%s/%s: its job.json cannot be read", meta["namespace"], meta["name"])
        return None

    async def _external(self, job: Object, observed: Observed) -> dict[str, Any]:
        """What another scheduler says of the job. Asked for only while something waits for it."""
        if self.settings.admits_itself:
            return {}
        return await self.external_queue.look(job, observed)

    def _suspect_nodes(self) -> tuple[str, ...]:
        """Nodes that any jobs kept failing on; looked through at most every few seconds."""
        if time.monotonic() - self._suspects_at > _SUSPECTS_SECONDS:
            self._suspects, self._suspects_at = suspects(self.store.restarts(), self.cluster.now()), time.monotonic()
            metrics.SUSPECT_NODES.clear()
            for node in self._suspects:
                metrics.SUSPECT_NODES.labels(node=node).set(1)
        return self._suspects

    async def _lost_nodes(self, observed: Observed) -> frozenset[str]:
        """Nodes of lingering pods that are gone or not ready. Asked for only while a pod lingers."""
        lost = set()
        for node in sorted(
            {p.node for p in (*observed.pods, *observed.left) if p.deleting and p.node and p.phase not in ("Succeeded", "Failed")}
        ):
            try:
                conditions = ((await self.cluster.get("Node", "", node)).get("status") or {}).get("conditions") or ()
            except APIError as failure:
                if failure.transient:
                    raise
                if failure.not_found:
                    lost.add(node)
                continue  # not allowed to look: its pods are waited for
            if not any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions):
                lost.add(node)
        return frozenset(lost)

    async def _say(self, key: Key, job: Object, plan: Plan) -> None:
        """Post the events and write the status; all of it later where the status may wait."""
        delay = self._may_wait(job, plan)
        if delay > 0:
            self.queue.add_after(key, delay)
            return
        for event in plan.events:  # one after the other: in the order in which it happened
            await self._tell(job, event, plan.status)
        await self._write_status(key, job, plan)

    def _may_wait(self, job: Object, plan: Plan) -> float:
        """Seconds that the status may wait."""
        uid, now = job["metadata"]["uid"], time.monotonic()
        if plan.status is None or plan.due is WriteUrgency.NOW:
            return 0.0
        if plan.due is WriteUrgency.SOON:
            return self._untold.setdefault(uid, now) + self.settings.soon_seconds - now
        interval = self.settings.status_interval_seconds
        if plan.status.queue:
            interval = max(interval, self.scheduler.place_seconds())
        return self._written.get(uid, float("-inf")) + interval - now

    async def _act(self, job: Object, actions: tuple[Action, ...]) -> None:
        """Carry the actions out: shared objects and changes first, then pods all at once."""
        for action in actions:
            if isinstance(action, Patch):
                await self.cluster.patch(action.kind, job["metadata"]["namespace"], action.name, action.body)
            elif isinstance(action, Apply):
                made = await self.cluster.apply(action.manifest)
                if action.manifest["kind"] in CHILD_KINDS:
                    self.store.put_child(action.manifest["kind"], made)
        rest = [self._one(job, action) for action in actions if isinstance(action, Create | Delete)]
        for result in await asyncio.gather(*rest, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def _one(self, job: Object, action: Create | Delete) -> None:
        namespace = job["metadata"]["namespace"]
        if isinstance(action, Delete):
            lingering = await self.cluster.delete(action.kind, namespace, action.name, action.uid, action.grace_seconds)
            if lingering is not None and action.kind in CHILD_KINDS:
                self.store.put_child(action.kind, lingering)
            return
        kind, meta = action.manifest["kind"], action.manifest["metadata"]
        try:
            made = await self.cluster.create(action.manifest)
        except APIError as failure:
            if not failure.conflict:
                raise
            made = await self.cluster.get(kind, namespace, meta["name"])
            if owner_uid(made) != job["metadata"]["uid"]:
                message = f"{kind} {meta['name']} exists and does not belong to this job; delete it or rename the job"
                raise APIError(409, "NameTaken", message) from None
        if kind in CHILD_KINDS:
            self.store.put_child(kind, made)  # its watch event wakes the job

    async def _tell(self, job: Object, event: Event, status: FineTuneJobStatus | None) -> None:
        meta = job["metadata"]
        attempt = status.attempt if status is not None else 0
        digest = hashlib.sha256(f"{meta['uid']}\0{event.reason}\0{event.message}\0{attempt}".encode()).hexdigest()[:16]
        manifest = event_manifest(job, event.type, event.reason, event.message, f"{names.base_name(meta['name'])}.{digest}")
        log.info("%s/%s: %s: %s", meta["namespace"], meta["name"], event.reason, event.message)
        try:
            await self.cluster.create(manifest)
        except APIError as failure:
            if failure.transient:
                raise
            if not failure.conflict:  # an Event is for people: that it cannot be posted must not hold the job up
                log.info("%s/%s: event %s refused: %s", meta["namespace"], meta["name"], event.reason, failure)

    async def _write_status(self, key: Key, job: Object, plan: Plan) -> None:
        if plan.status is None:
            return
        uid = job["metadata"]["uid"]
        self._untold.pop(uid, None)
        wire = plan.status.to_wire()
        if wire == job.get("status"):
            return
        try:
            answer = await self.cluster.replace_status({**job, "status": wire}, urgent=plan.due is not WriteUrgency.LATER)
        except APIError as failure:
            if failure.not_found:
                return
            if failure.conflict:  # somebody changed the job meanwhile: look again and derive anew
                meta = job["metadata"]
                with contextlib.suppress(APIError):
                    self.store.put_job(await self.cluster.get("FineTuneJob", meta["namespace"], meta["name"]))
            raise
        self._written[uid] = time.monotonic()
        self.telemetry.wrote(job, plan.before or FineTuneJobStatus(), plan.status)
        self.store.put_job(answer)
        self.scheduler.recorded(uid)
        if plan.due is WriteUrgency.NOW:
            self.queue.add(key)  # what was decided is on record: act on it

    # events in

    def job_event(self, raw: Object, *, deleted: bool) -> None:
        """A FineTuneJob was seen, or is gone."""
        if deleted:
            uid = raw["metadata"]["uid"]
            self.board.forget(uid)
            self._written.pop(uid, None)
            self._untold.pop(uid, None)
            self.telemetry.forget(uid)
            key = self.store.drop_job(raw)
        elif self.store.is_known(raw):
            return  # the echo of what was written here
        else:
            key = self.store.put_job(raw)
        self.queue.add(key)
        self.scheduler.poke()

    def child_event(self, kind: str, raw: Object, *, deleted: bool) -> None:
        """A child was seen, or is gone."""
        key = self.store.drop_child(kind, raw) if deleted else self.store.put_child(kind, raw)
        if kind == "Pod" and not deleted:
            self.external_queue.pod_seen(raw)
        if kind == "Pod" and (deleted or (raw.get("status") or {}).get("phase") in ("Succeeded", "Failed")):
            self.scheduler.poke()  # something is free again
        if key is not None:
            self.queue.add(key)

    # periodic LIST

    async def resync(self) -> None:
        """LIST everything, forget what is gone, and look at every job once."""
        spaces = self.settings.watch_namespaces or ("",)
        began = time.monotonic()
        jobs = set()
        for namespace in spaces:
            async for raw in self.cluster.list("FineTuneJob", namespace):
                self.store.put_job(raw)
                jobs.add(raw["metadata"]["uid"])
        self.store.prune_jobs(jobs, began)
        for kind in child_kinds(network_policies=self.settings.network_policies):
            seen = set()
            for namespace in spaces:
                async for raw in self.cluster.list(kind, namespace, SELECTOR):
                    self.store.put_child(kind, raw)
                    if kind == "Pod":
                        self.external_queue.pod_seen(raw)
                    seen.add(raw["metadata"]["uid"])
            for key in self.store.prune(kind, seen, began):
                self.queue.add(key)
        for key in self.store.job_keys():
            self.queue.add(key)
        self.last_resync = time.monotonic()

    async def _resync_until_done(self) -> None:
        delay = 1.0
        while True:
            try:
                return await self.resync()
            except APIError as failure:
                log.warning("first LIST failed, again in %.0f s: %s", delay, failure)
                await asyncio.sleep(delay)
                delay = min(30.0, delay * 2)

    async def _resync_forever(self) -> None:
        while True:
            await asyncio.sleep(self.settings.resync_seconds)
            try:
                await self.resync()
            except APIError as failure:
                log.warning("resync failed: %s", failure)
