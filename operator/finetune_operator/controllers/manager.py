"""All loops of one operator, and what they share. The truth is in the API server: all state here can be lost at any time.

Knows nothing of where events come from: `handlers.py` tells.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
from collections.abc import Callable
from typing import Any

from finetune_api import KIND
from finetune_api.endpoint import ENDPOINT_KIND
from finetune_api.status import FineTuneJobStatus
from finetune_api.tuned_model import MODEL_KIND

from ..cache.assumptions import Assumptions, Expired
from ..cache.catalog import CatalogBoard
from ..cache.progress import ProgressBoard
from ..cache.store import Store
from ..cluster.lease import Lease
from ..cluster.transport import Cluster
from ..model.objects import Key, Object, key_of
from ..reconcile.plan import Event, Plan
from ..settings import Settings
from .admission import AdmissionLoop, place_seconds
from .controller import Controller
from .endpoints import Endpoints
from .events import Events
from .external_queue import ExternalQueue
from .jobs import Jobs
from .resync import Resync
from .telemetry import Telemetry
from .tuned_models import TunedModels
from .writer import Writer

log = logging.getLogger("finetune.controller")


class Manager:
    """One per process. A kind is added by a row in `controllers`."""

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        board: ProgressBoard,
        settings: Settings,
        lease: Lease | None = None,
        serves: Callable[[str], bool] = lambda kind: True,
    ) -> None:
        self.store, self.settings, self.lease = store, settings, lease
        self.telemetry, self.events = Telemetry(), Events(cluster)
        self.assumptions = Assumptions(lambda: self.admission.poke())
        self.admission = AdmissionLoop(
            cluster,
            store,
            self.assumptions,
            settings,
            self.wake,
            lambda: len(self.jobs.queue) > 0,
            self._expired,
            lambda key: self.wake(key, ENDPOINT_KIND),
        )
        self.external_queue = ExternalQueue(cluster, store, settings)
        self.writer = Writer(cluster, store, self.events, soon_seconds=settings.soon_seconds, interval=self._interval)
        self._jobs = Jobs(
            cluster,
            store,
            self.assumptions,
            board,
            self.external_queue,
            self.telemetry,
            settings,
            priority=self.admission.priority,
            poke=self.admission.poke,
        )
        self.jobs = Controller(self._jobs.kind(), self.writer, lambda: lease is None or lease.held)
        self._endpoints = Endpoints(cluster, store, settings, self.admission.watch.inventory.queue_problem, self.admission.demands)
        self.endpoints = Controller(self._endpoints.kind(), self.writer, lambda: lease is None or lease.held)
        self.catalogs = CatalogBoard()
        self._models = TunedModels(cluster, store, self.catalogs, settings)
        self.models = Controller(self._models.kind(), self.writer, lambda: lease is None or lease.held)
        self.controllers: dict[str, Controller[Any]] = {KIND: self.jobs, MODEL_KIND: self.models, ENDPOINT_KIND: self.endpoints}
        self.resync = Resync(cluster, store, settings, self.wake, self._child_seen, serves)
        forget: tuple[Callable[[str], None], ...] = (
            board.forget,
            self.catalogs.forget,
            self.telemetry.forget,
            self.writer.forget,
            self.assumptions.forget,
            self.admission.forget,
            self._endpoints.forget,
        )
        store.forgotten.extend(forget)
        store.changed.append(self._touch)
        self.synced = asyncio.Event()
        self.acting = False
        """Whether this is the operator that acts, not one that stands by."""

    async def run(self) -> None:
        """List everything once, wait for the lease, then work until cancelled. Raises LeaseLost."""
        await self.resync.until_done()
        gc.collect()
        gc.freeze()  # what is there now stays: the collector need not walk through ten thousand jobs at each full look, for 0.6 s
        self.synced.set()
        log.info("in sync: %d jobs", len(self.store.job_keys()))
        async with asyncio.TaskGroup() as group:
            group.create_task(self.resync.forever())
            if self.lease is not None:
                await self.lease.acquire()
                await self.resync.until_done()  # what the one before wrote last
                group.create_task(self.lease.hold())
            self.acting = True
            self._wake_all()
            group.create_task(self.events.run())
            if self.settings.queueing_backend == "kueue":
                group.create_task(self.external_queue.run())
            if self.settings.admits_itself:
                group.create_task(self.admission.run())
            for controller in self.controllers.values():
                group.create_task(controller.run(self.settings.workers))

    async def close(self) -> None:
        """Close the connections of the loops' own."""
        await self._endpoints.replicas.close()

    @property
    def silent_seconds(self) -> float:
        """For how long nothing was heard of nodes, queues and what else the admission loop watches; 0 while it does not."""
        return self.admission.watch.silent_seconds if self.acting and self.settings.admits_itself else 0.0

    def wake(self, key: Key, kind: str = KIND) -> None:
        """An object is to be looked at. Before this operator acts nothing is: then all of them are, the oldest first."""
        if self.acting and (controller := self.controllers.get(kind)) is not None:
            controller.queue.add(key)

    def _wake_all(self) -> None:
        for kind in self.controllers:
            objects = self.store.of(kind)
            for raw in sorted(objects, key=lambda raw: (str(raw["metadata"].get("creationTimestamp", "")), key_of(raw))):
                self.wake(key_of(raw), kind)  # watches tell of those that are there in any order

    def _touch(self, kind: str, raw: Object) -> None:
        """An object is different now, or gone: objects of other kinds may depend on it."""
        for other, controller in self.controllers.items() if self.acting else ():
            depends_on = controller.kind.depends_on
            for key in controller.kind.touched(kind, raw) if other != kind and (depends_on is None or kind in depends_on) else ():
                controller.queue.add(key)

    def configure(self, **found: str) -> None:
        """Settings that are found after the start. Everything is looked at again where they are new."""
        new = dataclasses.replace(self.settings, **found)  # type: ignore[arg-type]
        if new != self.settings:
            self.settings = self._jobs.settings = self._models.settings = self._endpoints.settings = new
            self.admission.configure(new)
            self._wake_all()

    # events in

    def object_event(self, kind: str, raw: Object, *, deleted: bool) -> None:
        """An object of ours was seen, or is gone."""
        objects = self.store.of(kind)
        if not deleted and objects.is_known(raw):
            return  # the echo of what was written here
        self.wake(objects.drop(raw) if deleted else objects.put(raw), kind)
        if kind in (KIND, ENDPOINT_KIND):
            self.admission.poke()

    def child_event(self, kind: str, raw: Object, *, deleted: bool) -> None:
        """A child was seen, or is gone."""
        owner = self.store.drop_child(kind, raw) if deleted else self.store.put_child(kind, raw)
        if not deleted:
            self._child_seen(kind, raw)
        if kind == "Pod" and (deleted or (raw.get("status") or {}).get("phase") in ("Succeeded", "Failed")):
            self.admission.poke()  # something is free again
        if owner is not None:
            self.wake(owner[1], owner[0])

    def _child_seen(self, kind: str, raw: Object) -> None:
        if kind == "Pod":
            self.external_queue.pod_seen(raw)

    # what the loops ask

    def _interval(self, plan: Plan) -> float:
        """Seconds between two statuses of a job that only carry progress, or its place in a line."""
        waits = isinstance(plan.status, FineTuneJobStatus) and plan.status.queue is not None
        return max(self.settings.status_interval_seconds, place_seconds(self.store) if waits else 0.0)

    def _expired(self, job: Object, expired: Expired) -> None:
        """Say that a decision about a job was given up: not in its status, which cannot be written."""
        message = (
            f"what the queue decided ({expired.decision.action}) was not put on record in time and is given up; "
            f"decided about again in {expired.again_in:.0f} s: {expired.why}"
        )
        log.warning("%s/%s: %s", job["metadata"]["namespace"], job["metadata"]["name"], message)
        self.events.add(job, (Event("Warning", "AdmissionExpired", message),))
