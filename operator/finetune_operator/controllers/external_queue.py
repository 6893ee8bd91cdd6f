"""What Kueue or Volcano say of a job that they decide about: asked for only while something of it waits for them.

Knows nothing of what follows from it (`reconcile/job/kueue.py`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

from finetune_api import names
from finetune_api.lenient import read_status
from finetune_api.validation import InvalidDocument, parse_spec

from ..cache.store import Store
from ..cluster.errors import APIError
from ..cluster.transport import Cluster
from ..model.job import Observed
from ..model.objects import Object
from ..reconcile.job.kueue import asks_for_place, preemptor_uid
from ..resources.backends import GROUP_KINDS, GROUP_LABEL, JOB_UID_LABEL
from ..settings import Settings
from .workqueue import WorkQueue

log = logging.getLogger("finetune.external_queue")
_SERVED_SECONDS = 300.0
_ABSENT_SECONDS = 10.0


class ExternalQueue:
    """Reads the objects of another scheduler, and takes away those that hold pods back."""

    def __init__(self, cluster: Cluster, store: Store, settings: Settings) -> None:
        self.cluster, self.store, self.settings = cluster, store, settings
        self._kind, self._kind_until = "", float("-inf")
        self._preemptors: dict[str, str] = {}
        self._gone: dict[str, str] = {}
        """UIDs of failed jobs that keep no place any more"""
        self._kept: WorkQueue[tuple[str, str, str]] = WorkQueue()
        """(namespace, group, UID) of deleted pods that Kueue does not let go of"""

    async def run(self) -> None:
        """Free deleted pods until cancelled."""
        await self._kept.run(self._let_go, 2)

    def pod_seen(self, raw: Object) -> None:
        """Kueue keeps a deleted pod that never ran, for another to come in its place, until its group's Workload is deleted.

        Of pods that ran it lets go when all have ended. The job may be gone by now, so this is not its business.
        """
        meta = raw["metadata"]
        group = (meta.get("labels") or {}).get(GROUP_LABEL)
        ran = (raw.get("spec") or {}).get("nodeName") or (raw.get("status") or {}).get("phase", "Pending") != "Pending"
        if group and meta.get("deletionTimestamp") and not ran and self.settings.queueing_backend == "kueue":
            self._kept.add((meta["namespace"], group, meta["uid"]))

    async def _let_go(self, key: tuple[str, str, str]) -> None:
        namespace, name, pod = key
        try:
            if self.store.pod(pod) is not None and (served := await self._served()):
                uid = (await self.cluster.get(served, namespace, name))["metadata"]["uid"]
                await self.cluster.delete(served, namespace, name, uid)
            self._kept.forget(key)
        except APIError as failure:
            if failure.not_found:
                self._kept.forget(key)
                return
            delay = self._kept.retry(key)
            log.log(
                logging.INFO if failure.transient else logging.WARNING,
                "Workload %s/%s: again in %.1f s: %s",
                namespace,
                name,
                delay,
                failure,
            )

    async def look(self, job: Object, observed: Observed) -> dict[str, Any]:
        """The fields of Observed that tell of it. Raises APIError when the server does not answer."""
        status, meta = read_status(job.get("status")), job["metadata"]
        served = await self._served()
        found: dict[str, Any] = {"served": served}
        made = not status.is_true("Admitted") and any(p.is_worker and p.attempt == status.attempt for p in observed.pods)
        if served and (status.phase == "Queued" or made):
            found["group"] = await self._get(served, meta["namespace"], names.group_name(meta["name"], status.attempt))
        elif served and (child := next((j for j in observed.jobs if j.stage == "evaluate" and j.suspended and not j.deleting), None)):
            found["group"] = await self._of_job(served, meta["namespace"], child.uid)
        spec = observed.spec
        if spec is None and status.phase == "Failed" and meta["uid"] not in self._gone:  # of an ended job nobody else wants to know
            with contextlib.suppress(InvalidDocument):
                spec = found["spec"] = parse_spec(job.get("spec"), strict=False)
        if asks_for_place(spec, status, self.settings):
            found["place_seen"] = True
            found["place"] = await self._get(served, meta["namespace"], names.stage_name(meta["name"], "evaluate", 0)) if served else None
            if status.phase == "Failed" and found["place"] is None:
                _remember(self._gone, meta["uid"], "")
        for pod in observed.pods:
            if pod.attempt == status.attempt and (uid := preemptor_uid(pod.eviction_message)):
                found["preemptor"] = await self._preemptor(served, uid)
                break
        return found

    async def _served(self) -> str:
        """The kind in which the back-end says where things stand, in the newest version that the API server knows; empty for none."""
        if time.monotonic() > self._kind_until:
            self._kind = ""
            for kind in GROUP_KINDS[self.settings.queueing_backend]:
                if await self.cluster.serves(kind):
                    self._kind = kind
                    break
            self._kind_until = time.monotonic() + (_SERVED_SECONDS if self._kind else _ABSENT_SECONDS)
        return self._kind

    async def _get(self, kind: str, namespace: str, name: str) -> Object | None:
        with _where_allowed():
            return await self.cluster.get(kind, namespace, name)
        return None

    async def _of_job(self, kind: str, namespace: str, uid: str) -> Object | None:
        with _where_allowed():
            found = [raw async for raw in self.cluster.list(kind, namespace, f"{JOB_UID_LABEL}={uid}")]
            return found[0] if found else None
        return None

    async def _preemptor(self, kind: str, uid: str) -> str:
        """namespace/name of a Workload; only its UID is in what Kueue says. Empty where it may not be looked for."""
        if uid not in self._preemptors and kind:
            with _where_allowed():
                for namespace in self.settings.watch_namespaces or ("",):
                    async for raw in self.cluster.list(kind, namespace):
                        meta = raw["metadata"]
                        if meta["uid"] == uid:
                            _remember(self._preemptors, uid, f"{meta['namespace']}/{meta['name']}")
        return self._preemptors.get(uid, "")


@contextlib.contextmanager
def _where_allowed() -> Iterator[None]:
    """Pass over what may not be looked at, or is not there: the pods will tell."""
    try:
        yield
    except APIError as failure:
        if failure.transient:
            raise


def _remember(known: dict[str, str], key: str, value: str) -> None:
    known[key] = value
    while len(known) > 10_000:
        known.pop(next(iter(known)))
