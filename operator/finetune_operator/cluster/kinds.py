"""Which kinds the operator needs, and which of them the API server serves.

A CustomResourceDefinition may come after the operator, go, and come again; kopf resolves its resources once. What is served
is asked of the discovery API, which every service account may read: also one that may not look at CustomResourceDefinitions.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NoReturn

from finetune_api.queue import QUEUE_KIND

from ..resources.backends import GROUP_KINDS
from ..settings import Settings
from .resources import RESOURCES, Resource
from .transport import APIError, KubernetesCluster

log = logging.getLogger("finetune.kinds")
_SECONDS, _SECONDS_WHILE_MISSING = 10.0, 2.0


class StartOver(Exception):
    """What is watched is not what is served: a fresh start finds what is there. All state here can be lost at any time."""


class Kinds:
    """The custom resources that the operator needs. Those of Kubernetes itself are always there."""

    def __init__(self, cluster: KubernetesCluster, settings: Settings) -> None:
        self._cluster = cluster
        self.watched = (RESOURCES["FineTuneJob"],)
        """What kopf watches; queues come through a watch that waits for their kind (inventory.py)."""
        self.needed = self.watched if settings.watch_namespaces else (*self.watched, RESOURCES[QUEUE_KIND])
        self.asked = tuple(RESOURCES[kind] for kind in GROUP_KINDS.get(settings.queueing_backend, ()))
        """Of these one is enough: a back-end's kind in its versions."""
        self.missing: tuple[str, ...] = tuple(map(_shown, self.needed))
        self._told: tuple[str, ...] | None = None
        self._served: frozenset[Resource] = frozenset()

    def serves(self, kind: str) -> bool:
        """Whether it was there at the last look."""
        return RESOURCES[kind] in self._served

    async def look(self) -> None:
        """Ask what is served. Raises APIError when the API server does not say."""
        wanted = (*self.needed, *self.asked)
        versions = sorted({(resource.group, resource.version) for resource in wanted})
        plurals = {version: await self._cluster.plurals(*version) for version in versions}
        self._served = frozenset(r for r in wanted if r.plural in plurals[r.group, r.version])
        missing = [_shown(r) for r in self.needed if r not in self._served]
        if self.asked and not self._served.intersection(self.asked):
            missing.append(" or ".join(map(_shown, self.asked)))
        self.missing = tuple(missing)
        if self.missing != self._told:
            log.warning("not served: %s", ", ".join(missing)) if missing else log.info("every kind that is needed is served")
            self._told = self.missing

    async def found(self) -> None:
        """Wait until jobs are served: there is nothing to do without them."""
        while True:
            try:
                await self.look()
                if self.serves("FineTuneJob"):
                    return
            except APIError as failure:
                log.warning("what is served is asked again: %s", failure)
            await asyncio.sleep(_SECONDS_WHILE_MISSING)

    async def keep(self, watches: Callable[[], set[Resource]]) -> NoReturn:
        """Look again and again. Raises StartOver when a kind that is served is not watched, or one that is watched is gone."""
        while True:
            await asyncio.sleep(_SECONDS_WHILE_MISSING if self.missing else _SECONDS)
            try:
                await self.look()
            except APIError as failure:
                log.warning("what is served is asked again: %s", failure)
                continue
            served, watching = self._served.intersection(self.watched), watches()
            if served != watching:
                come, gone = (", ".join(sorted(map(_shown, some))) for some in (served - watching, watching - served))
                raise StartOver("; ".join(part for part in (come and f"{come} is there now", gone and f"{gone} is gone") if part))


def _shown(resource: Resource) -> str:
    return f"{resource.plural}.{resource.group}/{resource.version}"
