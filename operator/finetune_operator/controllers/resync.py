"""LIST everything now and then: what a dead watch hid is found, what is gone is forgotten, and the server's word counts.

Knows nothing of what is decided: it feeds the cache and wakes keys.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import NoReturn

from finetune_api import KIND, names

from ..cache.store import Store
from ..cluster.errors import APIError
from ..cluster.transport import Cluster
from ..model.objects import RECONCILED, Key, Object, child_kinds
from ..settings import Settings

log = logging.getLogger("finetune.controller")
SELECTOR = f"{names.LABEL_MANAGED_BY}={names.MANAGER}"


class Resync:
    """`wake`: an object of a kind is to be looked at. `seen`: a child was listed. `serves`: whether the API server has a kind of ours."""

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        settings: Settings,
        wake: Callable[[Key, str], None],
        seen: Callable[[str, Object], None] = lambda kind, raw: None,
        serves: Callable[[str], bool] = lambda kind: True,
    ) -> None:
        self._cluster, self._store, self._settings, self._wake = cluster, store, settings, wake
        self._seen, self._serves = seen, serves
        self.last = time.monotonic()

    async def once(self) -> None:
        """LIST everything, forget what is gone, and look at every object once. Raises APIError.

        An object that was not heard of since the LIST began is taken as listed, whatever its resourceVersion: etcd may have been
        restored to an older state.
        """
        spaces = self._settings.watch_namespaces or ("",)
        for kind in RECONCILED:
            await self._objects(kind, spaces)
        for kind in child_kinds(network_policies=self._settings.network_policies):
            children, began = set(), time.monotonic()
            for namespace in spaces:
                async for raw in self._cluster.list(kind, namespace, SELECTOR):
                    self._store.put_child(kind, raw, asked_at=began)
                    self._seen(kind, raw)
                    children.add(raw["metadata"]["uid"])
            for owner, key in self._store.prune(kind, children, began):
                self._wake(key, owner)
        for kind in RECONCILED:
            for key in self._store.of(kind).keys:
                self._wake(key, kind)
        self.last = time.monotonic()

    async def _objects(self, kind: str, spaces: tuple[str, ...]) -> None:
        """Those of one kind. Of the kinds that jobs can do without the definition, or the right to look, may come later."""
        objects, began = self._store.of(kind), time.monotonic()
        found: set[str] = set()
        if kind != KIND and not self._serves(kind):
            return objects.prune(found, began)
        try:
            for namespace in spaces:
                async for raw in self._cluster.list(kind, namespace):
                    objects.put(raw, asked_at=began)
                    found.add(raw["metadata"]["uid"])
        except APIError as failure:
            if kind == KIND or failure.transient:
                raise
            log.warning("%s cannot be listed: %s", kind, failure)
            return
        objects.prune(found, began)

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
