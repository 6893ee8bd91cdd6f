"""Events for people, posted when there is time: they hold nothing up, and nothing rests on them. Knows nothing of why they are told.

What cannot be posted is dropped with a count: too many at once, a refusal, a server that does not answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Iterable

from finetune_api import names

from .. import metrics
from ..cluster.errors import APIError
from ..cluster.transport import Cluster
from ..model.objects import Object
from ..reconcile.plan import Event
from ..resources.event import event_manifest

log = logging.getLogger("finetune.events")
MOST = 2000
"""Events that wait to be posted; the oldest go when there are more"""


class Events:
    """One for an operator. Their names follow from what they tell, so telling it twice is telling it once."""

    def __init__(self, cluster: Cluster, most: int = MOST) -> None:
        self._cluster, self._most = cluster, most
        self._waiting: deque[Object] = deque()
        self._some = asyncio.Event()

    def add(self, raw: Object, events: Iterable[Event]) -> None:
        """Post these about an object, in this order, when there is time."""
        meta = raw["metadata"]
        for event in events:
            log.info("%s/%s: %s: %s", meta.get("namespace", ""), meta["name"], event.reason, event.message)
            told = f"{meta['uid']}\0{event.reason}\0{event.message}\0{event.series}"
            digest = hashlib.sha256(told.encode()).hexdigest()[:16]
            self._waiting.append(event_manifest(raw, event.type, event.reason, event.message, f"{names.base_name(meta['name'])}.{digest}"))
            self._some.set()
        while len(self._waiting) > self._most:
            self._waiting.popleft()
            metrics.EVENTS_DROPPED.labels(reason="TooMany").inc()

    async def run(self) -> None:
        """Post until cancelled."""
        while True:
            await self._some.wait()
            await self.post()

    async def post(self) -> None:
        """Post what waits, one after the other: in the order in which it happened."""
        while self._waiting:
            manifest = self._waiting.popleft()
            try:
                await self._cluster.create(manifest)
            except APIError as failure:
                if not failure.conflict:  # else it was told already
                    metrics.EVENTS_DROPPED.labels(reason="Unreachable" if failure.transient else "Refused").inc()
                    log.info("event %s is dropped: %s", manifest["metadata"]["name"], failure)
        self._some.clear()
