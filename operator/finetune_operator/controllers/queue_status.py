"""What FineTuneQueues say of themselves: written when it changed, and not often. Knows nothing of how it was decided."""

from __future__ import annotations

import asyncio
import logging
import time

from finetune_api.lenient import rewritten
from finetune_api.queue import FineTuneQueueStatus

from .. import metrics
from ..cache.inventory import Queues
from ..cluster.errors import APIError
from ..cluster.transport import Cluster
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

    async def write(self, queues: Queues, snapshot: Snapshot, decisions: Decisions) -> None:
        """Say what changed. Raises APIError when the server does not answer."""
        self.owed = False
        self._written = {name: at for name, at in self._written.items() if name in queues.items}
        metrics.PENDING.clear()
        metrics.QUEUE_USED.clear()
        for name, report in decisions.queues.items():
            metrics.PENDING.labels(queue=name).set(report.pending)
            for flavor, units in report.used.items():
                metrics.QUEUE_USED.labels(queue=name, flavor=flavor).set(units)
        await asyncio.gather(
            *(self._write(queues, queue, snapshot, decisions) for queue in snapshot.queues if queue.name in decisions.queues)
        )

    async def _write(self, queues: Queues, queue: Queue, snapshot: Snapshot, decisions: Decisions) -> None:
        raw = queues.items.get(queue.name)
        if raw is None:  # gone meanwhile
            return
        since = time.monotonic() - self._written.get(queue.name, float("-inf"))
        status = queue_status(queue, raw, snapshot, decisions)
        old = dict(raw.get("status") or {})
        new = rewritten(old, FineTuneQueueStatus(), status)
        if {**old, "history": None} == {**new, "history": None} and (since < _HISTORY_SECONDS or status.history.gpu_seconds < 1):
            return
        if since < _STATUS_SECONDS:
            self.owed = True
            return
        try:
            answer = await self._cluster.replace_status({**raw, "status": new}, urgent=False)
        except APIError as failure:
            if failure.transient:
                raise
            log.info("queue %s: status refused: %s", queue.name, failure)
            self.owed = True  # it changed, or is gone: the watch tells
            return
        self._written[queue.name] = time.monotonic()
        queues.put(answer)
