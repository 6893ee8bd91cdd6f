"""What FineTuneQueues say of themselves: written when it changed, and not often."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from typing import Any

from .. import metrics
from ..cache.inventory import Inventory
from ..cluster.transport import APIError, Cluster
from ..model.queueing import Decisions, Queue, Snapshot
from ..queueing.report import queue_status

log = logging.getLogger("finetune.queues")
_STATUS_SECONDS = 5.0
_HISTORY_SECONDS = 60.0


class QueueStatusWriter:
    """Writes the statuses of all queues after a pass over all jobs."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._written: dict[str, float] = {}
        self.owed = False
        """A queue's status is to be written, but not so soon after the last."""

    async def write(self, inventory: Inventory, snapshot: Snapshot, decisions: Decisions) -> bool:
        """Say what changed. Whether a queue is another than it was taken for. Raises APIError when the server does not answer."""
        self.owed = False
        metrics.PENDING.clear()
        metrics.QUEUE_USED.clear()
        for name, report in decisions.queues.items():
            metrics.PENDING.labels(queue=name).set(report.pending)
            for flavor, units in report.used.items():
                metrics.QUEUE_USED.labels(queue=name, flavor=flavor).set(units)
        return any(
            await asyncio.gather(
                *(self._write(inventory, queue, snapshot, decisions) for queue in snapshot.queues if queue.name in decisions.queues)
            )
        )

    async def _write(self, inventory: Inventory, queue: Queue, snapshot: Snapshot, decisions: Decisions) -> bool:
        raw, since = inventory.queues[queue.name], time.monotonic() - self._written.get(queue.name, float("-inf"))
        status = queue_status(queue, raw, snapshot, decisions)
        old = dict(raw.get("status") or {})
        new: dict[str, Any] = status.to_wire()
        if {**old, "history": None} == {**new, "history": None} and (since < _HISTORY_SECONDS or status.history.gpu_seconds < 1):
            return False
        if since < _STATUS_SECONDS:
            self.owed = True
            return False
        try:
            answer = await self._cluster.replace_status({**raw, "status": new}, urgent=False)
        except APIError as failure:
            if failure.transient:
                raise
            log.info("queue %s: status refused: %s", queue.name, failure)
            return True  # it changed, or is gone
        self._written[queue.name] = time.monotonic()
        inventory.queues[queue.name] = answer
        inventory.parsed[queue.name] = dataclasses.replace(queue, history=status.history)
        return False
