"""kopf wiring: events in, keys queued. Nothing is decided and nothing is written here.

Only `on.event` is used. kopf's change handlers keep their progress and a last-handled copy in annotations, add
finalizers and run again after restarts: a level-triggered reconcile wants none of that (docs/architecture.md).
"""

from __future__ import annotations

import logging
from typing import Any

import kopf
from kopf._cogs.structs.references import Insights as Insights  # what kopf.operator takes as `insights`; kopf 1.45 does not export it

from finetune_api import KIND, names

from . import metrics
from .cluster.kinds import Kinds
from .cluster.login import login
from .cluster.resources import RESOURCES, Resource
from .controllers.manager import Manager
from .controllers.resync import SELECTOR
from .model.legible import identified
from .model.objects import CHILD_KINDS, RECONCILED, Object, child_kinds
from .settings import Settings

log = logging.getLogger("finetune.handlers")


class _NoDiffBase(kopf.DiffBaseStorage):
    """Keeps nothing: every event would otherwise be copied for a diff that nobody reads."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        return None


class _NoProgress(kopf.ProgressStorage):
    """Keeps nothing: there are no handlers with progress."""

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        return None

    def purge(self, **_: Any) -> None:
        return None

    def touch(self, **_: Any) -> None:
        return None

    def clear(self, *, essence: Any) -> Any:
        return essence


def kopf_settings() -> kopf.OperatorSettings:
    """Settings that keep kopf's hands off the objects and its watches alive."""
    settings = kopf.OperatorSettings()
    settings.persistence.diffbase_storage = _NoDiffBase()
    settings.persistence.progress_storage = _NoProgress()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.watching.server_timeout = 570  # kopf then goes on from the last resourceVersion
    settings.watching.client_timeout = 600
    settings.watching.connect_timeout = 15
    settings.watching.chunk_size = 500
    settings.networking.request_timeout = 30
    settings.queueing.idle_timeout = 1
    for kind in CHILD_KINDS:
        resource = RESOURCES[kind]
        settings.watching.label_selectors[resource.group, resource.plural] = SELECTOR
    return settings


def watching(insights: Insights, kinds: Kinds) -> set[Resource]:
    """Of the kinds that may come and go, those that kopf watches."""
    seen = {(resource.group, resource.version, resource.plural) for resource in insights.watched_resources}
    return {r for r in kinds.watched if (r.group, r.version, r.plural) in seen}


def _seen(kind: str, event: kopf.RawEvent) -> Object | None:
    """The object of an event; None, and counted, where it cannot be told which it is."""
    found = identified(kind, dict(event["object"]))
    if found is None:
        metrics.UNREADABLE.labels(kind=kind).inc()
        log.warning("an event of a %s is passed by: it has no metadata that can be read", kind)
    return found


def register(registry: kopf.OperatorRegistry, manager: Manager, settings: Settings, kinds: Kinds) -> None:
    """Connect the watches of our kinds, and of what their objects own, to the manager."""
    kopf.on.login(registry=registry)(login)

    def watch_objects(kind: str) -> None:
        resource = RESOURCES[kind]

        @kopf.on.event(resource.group, resource.version, resource.plural, registry=registry, id=f"on_{kind}")
        async def on_object(event: kopf.RawEvent, **_: Any) -> None:
            if (raw := _seen(kind, event)) is not None:
                manager.object_event(kind, raw, deleted=event["type"] == "DELETED")

    def watch(kind: str) -> None:
        resource = RESOURCES[kind]

        @kopf.on.event(resource.group, resource.version, resource.plural, registry=registry, id=f"on_{kind}")
        async def on_child(event: kopf.RawEvent, **_: Any) -> None:
            raw = _seen(kind, event)
            if raw is not None and (raw["metadata"].get("labels") or {}).get(names.LABEL_MANAGED_BY) == names.MANAGER:
                manager.child_event(kind, raw, deleted=event["type"] == "DELETED")

    for kind in RECONCILED:
        if kind == KIND or kinds.serves(kind):  # of one that comes later a fresh start tells (cluster/kinds.py)
            watch_objects(kind)
    for kind in child_kinds(network_policies=settings.network_policies):
        watch(kind)
