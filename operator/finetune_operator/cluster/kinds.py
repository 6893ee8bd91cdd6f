"""Which kinds the operator needs, and which of them the API server serves. Knows nothing of what the operator may look at.

A CustomResourceDefinition may come after the operator, go, and come again; kopf resolves its resources once. What is served
is asked of the discovery API, which every service account may read: also one that may not look at CustomResourceDefinitions.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from finetune_api.crd import definitions
from finetune_api.queue import QUEUE_KIND

from ..model.objects import RECONCILED, Object
from ..resources.backends import GROUP_KINDS
from ..settings import Settings
from .errors import APIError
from .resources import RESOURCES, Resource
from .transport import KubernetesCluster

log = logging.getLogger("finetune.kinds")
_SECONDS, _SECONDS_WHILE_MISSING = 10.0, 2.0
_COMPARE_SECONDS = 300.0


class StartOver(Exception):
    """What is watched is not what is served: a fresh start finds what is there. All state here can be lost at any time."""


class Kinds:
    """The custom resources that the operator needs. Those of Kubernetes itself are always there."""

    def __init__(self, cluster: KubernetesCluster, settings: Settings) -> None:
        self._cluster, self._settings = cluster, settings
        self.watched = tuple(RESOURCES[kind] for kind in RECONCILED)
        """What kopf watches where it is served; it resolves its kinds once. Queues come through a watch that waits for theirs (inventory.py)"""
        self.asked = tuple(RESOURCES[kind] for kind in GROUP_KINDS.get(settings.queueing_backend, ()))
        """Of these one is enough: a back-end's kind in its versions."""
        self.missing: tuple[str, ...] = tuple(map(_shown, self.needed))
        self._told: tuple[str, ...] | None = None
        self.differences: tuple[str, ...] = ()
        """Between the definitions that are served and those of this release"""
        self._compared = float("-inf")
        self._served: frozenset[Resource] = frozenset()

    @property
    def needed(self) -> tuple[Resource, ...]:
        """What the operator is not ready without."""
        backend = self._settings.queueing_backend
        queues = backend == "builtin" or (backend != "none" and not self._settings.watch_namespaces)
        return tuple(RESOURCES[kind] for kind in ("FineTuneJob", *([QUEUE_KIND] if queues else [])))

    def serves(self, kind: str) -> bool:
        """Whether it was there at the last look."""
        return RESOURCES[kind] in self._served

    async def look(self) -> None:
        """Ask what is served. Raises APIError when the API server does not say."""
        wanted = (*self.needed, *self.watched, *self.asked)
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

    async def compare(self) -> None:
        """Find what differs between the definitions that are served and those of this release; a warning for what is new.

        The API server drops what its definition does not have, without a word: an operator that is newer writes it in vain.
        """
        told: list[str] = []
        self._compared = time.monotonic()
        for own in definitions():
            resource = RESOURCES[own["spec"]["names"]["kind"]]
            if resource not in self._served:
                continue
            served = await self._cluster.served_schema(resource)
            ours = own["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
            if served is not None:
                told += [f"{resource.plural}.{resource.group}: {difference}" for difference in _differences(served, ours)]
        for text in set(told) - set(self.differences):
            log.warning("%s", text)
        self.differences = tuple(told)

    async def found(self) -> None:
        """Wait until jobs are served: there is nothing to do without them."""
        while True:
            try:
                await self.look()
                if self.serves("FineTuneJob"):
                    await self.compare()
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
                if time.monotonic() - self._compared >= _COMPARE_SECONDS:
                    await self.compare()
            except APIError as failure:
                log.warning("what is served is asked again: %s", failure)
                continue
            served, watching = self._served.intersection(self.watched), watches()
            if served != watching:
                come, gone = (", ".join(sorted(map(_shown, some))) for some in (served - watching, watching - served))
                raise StartOver("; ".join(part for part in (come and f"{come} is there now", gone and f"{gone} is gone") if part))


_MOST_TOLD = 5
"""Fields that are named of each definition"""


def _differences(served: Object, ours: Object) -> list[str]:
    """Whether a definition is of an older or of a newer release, by the fields that it has."""
    theirs, own = set(_fields(served)), set(_fields(ours))
    found = []
    if missing := _topmost(own - theirs):
        found.append(
            f"its definition is older than this operator: it lacks {_named(missing)}, which the API server drops. "
            "Apply the CustomResourceDefinitions of this release (crds/)"
        )
    if more := _topmost(theirs - own):
        found.append(f"its definition is newer than this operator: it has {_named(more)}, which are left as they are")
    return found


def _topmost(fields: set[str]) -> list[str]:
    """Without those inside of others of them."""
    return sorted(field for field in fields if field.rpartition(".")[0].removesuffix("[]") not in fields)


def _named(fields: list[str]) -> str:
    rest = len(fields) - _MOST_TOLD
    return ", ".join(fields[:_MOST_TOLD]) + (f" and {rest} more" if rest > 0 else "")


def _fields(node: Object, path: str = "") -> Iterator[str]:
    """Paths of the fields of spec and status; of one that is there no more, not what it had inside."""
    for name, child in (node.get("properties") or {}).items():
        if not path and name not in ("spec", "status"):
            continue
        yield (here := f"{path}.{name}".lstrip("."))
        yield from _fields(child, here)
    if isinstance(items := node.get("items"), dict):
        yield from _fields(items, f"{path}[]")


def _shown(resource: Resource) -> str:
    return f"{resource.plural}.{resource.group}/{resource.version}"
