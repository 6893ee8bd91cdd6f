"""The one place that writes: actions, then the status, then Events. Conflicts, retries and what is ours already are handled here.

Knows neither kinds nor why: a plan says what is to be done.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from finetune_api import KIND
from finetune_api.lenient import rewritten

from ..cache.store import Store
from ..cluster.errors import APIError
from ..cluster.transport import Cluster
from ..model.children import owner_uid
from ..model.objects import CHILD_KINDS, Object
from ..reconcile.plan import Action, Apply, Create, Delete, Patch, Plan, WriteUrgency
from .events import Events

Recorded = Callable[[Object, Plan], None]
"""Told after a status was written: the object as it was before, and the plan"""


class Writer:
    """Carries plans out. `interval`: seconds between two statuses of an object that only carry progress, by its plan."""

    def __init__(self, cluster: Cluster, store: Store, events: Events, *, soon_seconds: float, interval: Callable[[Plan], float]) -> None:
        self._cluster, self._store, self._events = cluster, store, events
        self.soon_seconds, self._interval = soon_seconds, interval
        self._written: dict[str, float] = {}
        self._untold: dict[str, float] = {}
        """By UID: since when a status waits for what follows soon"""

    async def write(self, raw: Object, plan: Plan, refused: Callable[[str], Plan], recorded: Recorded) -> float | None:
        """Seconds until the object is to be looked at again; None: when something happens. Raises APIError.

        `refused`: what to say when the API server refuses an action for good.
        """
        try:
            await self._act(raw, plan.actions)
        except APIError as failure:
            if not failure.transient:
                await self._tell(raw, refused(failure.message), recorded)
            raise
        return await self._tell(raw, plan, recorded)

    def forget(self, uid: str) -> None:
        """The object is gone."""
        self._written.pop(uid, None)
        self._untold.pop(uid, None)

    # actions

    async def _act(self, raw: Object, actions: tuple[Action, ...]) -> None:
        """Shared objects and changes first, then pods all at once."""
        for action in actions:
            if isinstance(action, Patch):
                await self._cluster.patch(action.kind, raw["metadata"]["namespace"], action.name, action.body)
            elif isinstance(action, Apply):
                self._made(action.manifest["kind"], await self._cluster.apply(action.manifest))
        rest = [self._one(raw, action) for action in actions if isinstance(action, Create | Delete)]
        for result in await asyncio.gather(*rest, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def _one(self, raw: Object, action: Create | Delete) -> None:
        namespace = raw["metadata"]["namespace"]
        if isinstance(action, Delete):
            lingering = await self._cluster.delete(action.kind, namespace, action.name, action.uid, action.grace_seconds)
            if lingering is not None:
                self._made(action.kind, lingering)
            return
        kind, name = action.manifest["kind"], action.manifest["metadata"]["name"]
        try:
            made = await self._cluster.create(action.manifest)
        except APIError as failure:
            if not failure.conflict:
                raise
            made = await self._cluster.get(kind, namespace, name)
            if owner_uid(made) != raw["metadata"]["uid"]:
                one = "job" if raw["kind"] == KIND else raw["kind"]
                message = f"{kind} {name} exists and does not belong to this {one}; delete it or rename the {one}"
                raise APIError(409, "NameTaken", message) from None
        self._made(kind, made)  # its watch event wakes the owner

    def _made(self, kind: str, raw: Object) -> None:
        if kind in CHILD_KINDS:
            self._store.put_child(kind, raw)

    # status and Events

    async def _tell(self, raw: Object, plan: Plan, recorded: Recorded) -> float | None:
        again = [] if plan.requeue_at is None else [(plan.requeue_at - self._cluster.now()).total_seconds()]
        delay = self._may_wait(raw["metadata"]["uid"], plan)
        if delay > 0:
            return min([delay, *again])
        written = await self._write_status(raw, plan, recorded)
        self._events.add(raw, plan.events)
        if written and plan.due is WriteUrgency.NOW:
            return 0.0  # what was decided is on record: act on it
        return min(again, default=None)

    def _may_wait(self, uid: str, plan: Plan) -> float:
        """Seconds that the status may wait, and its Events with it."""
        now = time.monotonic()
        if plan.status is None or plan.due is WriteUrgency.NOW:
            return 0.0
        if plan.due is WriteUrgency.SOON:
            if plan.waits_anew:
                self._untold[uid] = now
            return self._untold.setdefault(uid, now) + self.soon_seconds - now
        return self._written.get(uid, float("-inf")) + self._interval(plan) - now

    async def _write_status(self, raw: Object, plan: Plan, recorded: Recorded) -> bool:
        """Whether it is different now. Written on condition of the state that it is derived from."""
        if plan.status is None:
            return False
        meta = raw["metadata"]
        self._untold.pop(meta["uid"], None)
        wire = rewritten(raw.get("status"), plan.before or type(plan.status)(), plan.status)
        if wire == raw.get("status"):
            return False
        began = time.monotonic()
        try:
            answer = await self._cluster.replace_status({**raw, "status": wire}, urgent=plan.due is not WriteUrgency.LATER)
        except APIError as failure:
            if failure.not_found:
                return False
            if failure.conflict:  # somebody changed it meanwhile: look again and derive anew
                with contextlib.suppress(APIError):
                    self._store.of(raw["kind"]).put(await self._cluster.get(raw["kind"], meta["namespace"], meta["name"]), asked_at=began)
            raise
        self._written[meta["uid"]] = time.monotonic()
        self._store.of(raw["kind"]).put(answer)
        recorded(raw, plan)
        return bool(answer.get("status") != raw.get("status"))  # a definition of an older release drops what it does not know
