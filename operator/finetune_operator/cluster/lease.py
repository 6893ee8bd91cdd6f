"""One operator acts at a time: a coordination.k8s.io/v1 Lease, taken, renewed and given back.

The rules are client-go's leader election's: who holds it is judged by how long the record has not changed on one's own
monotonic clock, so that other machines' clocks do not matter; every write is conditional on the resourceVersion.
Knows nothing of what is done while it is held.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime

from ..model.objects import Object
from .errors import APIError
from .transport import Cluster

log = logging.getLogger("finetune.lease")
KIND = "Lease"


class LeaseLost(Exception):
    """It could not be renewed in time: another operator may act now, so this one must not."""


class Lease:
    """This process's claim on the lease."""

    def __init__(self, cluster: Cluster, namespace: str, name: str, identity: str, *, seconds: float = 15.0) -> None:
        self._cluster, self._namespace, self._name, self._identity = cluster, namespace, name, identity
        self._seconds = seconds
        self._period = seconds / 6
        self._record: Object | None = None
        self._seen: Object | None = None
        self._changed = time.monotonic()
        self._until = float("-inf")

    @property
    def held(self) -> bool:
        """Whether this process may act: it renewed the lease less than two thirds of its duration ago."""
        return time.monotonic() < self._until

    async def acquire(self) -> None:
        """Wait until it is held."""
        told = ""
        while not await self._try():
            holder = str((self._record or {}).get("spec", {}).get("holderIdentity") or "")
            if holder != told:
                log.info("standing by: %s acts", holder or "nobody yet")
                told = holder
            await asyncio.sleep(self._period)
        log.info("this operator acts: %s", self._identity)

    async def hold(self) -> None:
        """Renew for ever. Raises LeaseLost."""
        while True:
            await asyncio.sleep(self._period)
            if not await self._try() and not self.held:
                raise LeaseLost(f"the lease {self._name} could not be renewed in {self._seconds:.0f} s")

    async def release(self) -> None:
        """Let the next one act at once."""
        if not self.held or self._record is None:
            return
        self._until = float("-inf")
        try:
            async with asyncio.timeout(self._period):
                await self._cluster.replace(self._renewed("", 1))
        except (APIError, TimeoutError) as failure:
            log.info("the lease was not given back, it runs out: %s", failure)

    async def _try(self) -> bool:
        """Take or renew it; whether it is held now."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._seconds / 3):
                return await self._take(began)
        except (APIError, TimeoutError) as failure:
            self._record = None  # what was answered is not known: read it again
            log.info("lease %s: %s", self._name, str(failure) or type(failure).__name__)
            return False

    async def _take(self, began: float) -> bool:
        if self._record is None or not self.held:
            await self._read()
        spec = self._record["spec"] if self._record is not None else {}
        holder = spec.get("holderIdentity") or ""
        wait = min(float(spec.get("leaseDurationSeconds") or self._seconds), 10 * self._seconds)
        if holder not in ("", self._identity) and time.monotonic() - self._changed < wait:
            return False
        if self._record is None:
            self._record = await self._cluster.create(self._renewed(self._identity, round(self._seconds)))
        else:
            self._record = await self._cluster.replace(self._renewed(self._identity, round(self._seconds)))
        self._until = began + self._seconds * 2 / 3
        return True

    async def _read(self) -> None:
        try:
            found = await self._cluster.get(KIND, self._namespace, self._name)
        except APIError as failure:
            if not failure.not_found:
                raise
            self._record = None
            return
        if found.get("spec") != self._seen:
            self._changed, self._seen = time.monotonic(), found.get("spec")
        self._record = {**found, "spec": found.get("spec") or {}}

    def _renewed(self, holder: str, seconds: int) -> Object:
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        old: Object = self._record["spec"] if self._record is not None else {}
        same = old.get("holderIdentity") == holder
        spec = {
            "holderIdentity": holder,
            "leaseDurationSeconds": seconds,
            "acquireTime": old.get("acquireTime") if same else stamp,
            "renewTime": stamp,
            "leaseTransitions": int(old.get("leaseTransitions") or 0) + (0 if same or not holder else 1),
        }
        metadata = self._record["metadata"] if self._record is not None else {"name": self._name, "namespace": self._namespace}
        return {"apiVersion": "coordination.k8s.io/v1", "kind": KIND, "metadata": metadata, "spec": spec}
