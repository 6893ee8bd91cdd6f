"""LIST everything now and then: what a dead watch hid is found, what is gone is forgotten, and the server's word counts.

Knows nothing of what is decided: it feeds the cache and wakes keys.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import NoReturn

from finetune_api import names

from ..cache.store import Store
from ..cluster.errors import APIError
from ..cluster.transport import Cluster
from ..model.objects import Key, Object, child_kinds
from ..settings import Settings

log = logging.getLogger("finetune.controller")
SELECTOR = f"{names.LABEL_MANAGED_BY}={names.MANAGER}"


class Resync:
    """`wake`: an object is to be looked at. `seen`: a child was listed."""

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        settings: Settings,
        wake: Callable[[Key], None],
        seen: Callable[[str, Object], None] = lambda kind, raw: None,
    ) -> None:
        self._cluster, self._store, self._settings, self._wake = cluster, store, settings, wake
        self._seen = seen
        self.last = time.monotonic()

    async def once(self) -> None:
        """LIST everything, forget what is gone, and look at every job once. Raises APIError.

        An object that was not heard of since the LIST began is taken as listed, whatever its resourceVersion: etcd may have been
        restored to an older state.
        """
        spaces = self._settings.watch_namespaces or ("",)
        began = time.monotonic()
        jobs = set()
        for namespace in spaces:
            async for raw in self._cluster.list("FineTuneJob", namespace):
                self._store.put_job(raw, asked_at=began)
                jobs.add(raw["metadata"]["uid"])
        self._store.prune_jobs(jobs, began)
        for kind in child_kinds(network_policies=self._settings.network_policies):
            children, began = set(), time.monotonic()
            for namespace in spaces:
                async for raw in self._cluster.list(kind, namespace, SELECTOR):
                    self._store.put_child(kind, raw, asked_at=began)
                    self._seen(kind, raw)
                    children.add(raw["metadata"]["uid"])
            for key in self._store.prune(kind, children, began):
                self._wake(key)
        for key in self._store.job_keys():
            self._wake(key)
        self.last = time.monotonic()

    async def until_done(self) -> None:
        """Try until it succeeds."""
        delay = 1.0
        while True:
            try:
                return await self.once()
            except APIError as failure:
                log.warning("first LIST failed, again in %.0f s: %s", delay, failure)
                await asyncio.sleep(delay)
                delay = min(30.0, delay * 2)

    async def forever(self) -> NoReturn:
        """Every settings.resync_seconds, until cancelled."""
        while True:
            await asyncio.sleep(self._settings.resync_seconds)
            try:
                await self.once()
            except APIError as failure:
                log.warning("resync failed: %s", failure)
