"""Keeps what is known of one kind up to date, as client-go's Reflector does: LIST once, then WATCH from there.

A watch that ends is resumed from the last resourceVersion, bookmarks included; only a server that no longer knows that
version (410), or does not know it yet (an etcd that was restored), is listed again. Knows nothing of what the objects mean: a decoder makes values of them, a sink keeps those.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterable
from typing import Generic, Literal, NoReturn, Protocol, TypeVar

import msgspec

from .. import metrics
from .errors import APIError
from .transport import LIST_CHUNK, Cluster

log = logging.getLogger("finetune.reflector")
_LEAST_WATCH_SECONDS, _MOST_WATCH_SECONDS = 300, 600
_FIRST_DELAY, _MOST_DELAY = 0.5, 30.0
FORBIDDEN_SECONDS, UNSERVED_SECONDS = 10.0, 5.0
"""A kind that may not be looked at, or is not served, is asked for again so often."""
UNWATCHED_SECONDS = 300.0
"""One that may be listed but not watched is listed so often."""
T = TypeVar("T")
Contra = TypeVar("Contra", contravariant=True)
State = Literal["starting", "synced", "not allowed", "not served", "not watched"]


class Sink(Protocol[Contra]):
    """Where the values of a kind are kept."""

    def replace(self, values: Iterable[Contra]) -> None:
        """These, and no others, are there."""

    def put(self, value: Contra) -> None:
        """One has come, or is different now."""

    def drop(self, value: Contra) -> None:
        """One is gone; as it was last."""

    def refuse(self, status: int, why: str) -> None:
        """Nothing can be known of the kind: 403, the operator may not look; 404, it is not served."""


class SharedSink(Sink[Contra], Protocol[Contra]):
    """A sink that several reflectors fill, each those of its namespace."""

    def replace(self, values: Iterable[Contra], namespace: str = "") -> None:
        """These, and no others, are there (of a namespace, or of all)."""


class OfNamespace(Generic[Contra]):
    """The part of such a sink that one namespace fills."""

    def __init__(self, shared: SharedSink[Contra], namespace: str) -> None:
        self._shared, self._namespace = shared, namespace
        self.put, self.drop, self.refuse = shared.put, shared.drop, shared.refuse

    def replace(self, values: Iterable[Contra]) -> None:
        """These, and no others, are there."""
        self._shared.replace(values, self._namespace)


class _Meta(msgspec.Struct):
    resourceVersion: str = ""
    continue_: str = msgspec.field(name="continue", default="")


class _Listed(msgspec.Struct):
    metadata: _Meta
    items: list[msgspec.Raw] | None = None


class _Versioned(msgspec.Struct):
    metadata: _Meta


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct):
    code: int = 0
    reason: str = ""
    message: str = ""


_LISTED, _VERSIONED = msgspec.json.Decoder(_Listed), msgspec.json.Decoder(_Versioned)
_EVENT, _STATUS = msgspec.json.Decoder(_Event), msgspec.json.Decoder(_Status)


class Reflector(Generic[T]):
    """One per kind, or per kind and namespace."""

    def __init__(
        self,
        cluster: Cluster,
        kind: str,
        decode: Callable[[bytes], T],
        sink: Sink[T],
        *,
        namespace: str = "",
        field_selector: str = "",
    ) -> None:
        """`decode`: an object's JSON to what is kept of it; a ValueError, KeyError or TypeError leaves the object out."""
        self._cluster, self._decode, self._sink = cluster, decode, sink
        self.kind, self._namespace = kind, namespace
        self._query = {"fieldSelector": field_selector} if field_selector else {}
        self._version = ""
        """Of the last LIST or event; empty when a LIST is due."""
        self._broken = False
        """A line of the watch could not be read: whatever it told is only found by a LIST."""
        self.state: State = "starting"
        self.why = ""
        """What the server said that refuses."""
        self.synced = asyncio.Event()
        """It is known what is there, or that it cannot be known."""
        self.seen = time.monotonic()
        """When the server was last heard of the kind."""
        self.skipped = 0
        """Objects and lines that could not be read."""
        self.lists = self._lines = 0

    @property
    def silent_seconds(self) -> float:
        """How long ago the server was last heard of the kind."""
        return time.monotonic() - self.seen

    async def run(self) -> NoReturn:
        """Until cancelled."""
        delay = _FIRST_DELAY
        while True:
            before = self._lines
            try:
                if not self._version:
                    await self.list()
                if self._version:
                    await self._watch()
                    pause = 0.0  # the server ends each watch after a while
                else:
                    pause = UNSERVED_SECONDS if self.state == "not served" else FORBIDDEN_SECONDS
            except APIError as failure:
                pause = self._after(failure, delay)
            delay = _FIRST_DELAY if self._lines > before else min(_MOST_DELAY, 2 * delay)
            await asyncio.sleep(max(_FIRST_DELAY, pause) * (1 + random.random() / 2))

    def _after(self, failure: APIError, delay: float) -> float:
        """Seconds to wait after a failure."""
        if failure.status == 410:
            log.info("%s: listed again: %s", self.kind, failure)
            self._version = ""
        elif failure.status == 404:
            self._version = ""
            return 0.0
        elif failure.status == 403:  # may list, may not watch
            self._say("not watched", str(failure))
            self._version = ""
            return UNWATCHED_SECONDS
        else:
            log.info("%s: again in a moment: %s", self.kind, failure)
        return failure.retry_after or delay

    async def list(self) -> None:
        """LIST in pages of one state of the server, and put it in the place of what was known. Raises APIError."""
        query = {**self._query, "limit": str(LIST_CHUNK)}
        values: list[T] = []
        version = ""
        self.lists += 1
        while True:
            try:
                page = _LISTED.decode(await self._cluster.list_page(self.kind, self._namespace, query))
            except msgspec.MsgspecError as failure:
                raise APIError(0, "BrokenAnswer", f"a LIST of {self.kind} cannot be read: {failure}") from failure
            except APIError as failure:
                if failure.status not in (403, 404):
                    raise
                self._refused(failure)
                return
            version = version or page.metadata.resourceVersion
            values.extend(value for raw in page.items or () if (value := self._read(raw)) is not None)
            self.seen = time.monotonic()
            if not page.metadata.continue_:
                break
            query["continue"] = page.metadata.continue_
        self._version, self._broken = version, False
        self._sink.replace(values)
        if self.state != "not watched":
            self._say("synced")
        self.synced.set()

    def _refused(self, failure: APIError) -> None:
        self._version, self.seen = "", time.monotonic()
        self._say("not allowed" if failure.status == 403 else "not served", str(failure))
        self._sink.refuse(failure.status, str(failure))
        self.synced.set()

    def _say(self, state: State, why: str = "") -> None:
        if state != self.state and (state != "synced" or self.state != "starting"):
            log.log(logging.INFO if state == "synced" else logging.WARNING, "%s: %s%s", self.kind, state, f": {why}" if why else "")
        self.state, self.why = state, why

    async def _watch(self) -> None:
        """Take events until the server ends the watch. Raises APIError."""
        seconds = random.randint(_LEAST_WATCH_SECONDS, _MOST_WATCH_SECONDS)
        query = {
            **self._query,
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(seconds),
        }
        try:
            async with contextlib.aclosing(self._cluster.watch(self.kind, self._namespace, query)) as lines:  # type: ignore[type-var]
                async for line in lines:
                    if line:
                        self._take(line)
                    self._lines += 1
                    self.seen = time.monotonic()
        finally:
            if self._broken:
                self._version = ""
        if self.state == "not watched":
            self._say("synced")

    def _take(self, line: bytes) -> None:
        try:
            event = _EVENT.decode(line)
            if event.type == "ERROR":
                status = _STATUS.decode(event.object)
                raise APIError(410 if status.reason in ("Expired", "Gone") else status.code, status.reason, status.message)
            version = _VERSIONED.decode(event.object).metadata.resourceVersion
        except msgspec.MsgspecError as failure:
            self._broken = True
            self._skip(failure)
            return
        if version.isdigit() and self._version.isdigit() and int(version) < int(self._version):
            raise APIError(410, "Restored", f"version {version} after {self._version}: etcd was restored to an older state")
        if event.type != "BOOKMARK":
            value, deleted = self._read(event.object), event.type == "DELETED"
            if value is None:
                self._broken |= deleted  # which one is gone, a LIST tells
            elif deleted:
                self._sink.drop(value)
            else:
                self._sink.put(value)
        self._version = version or self._version

    def _read(self, raw: msgspec.Raw) -> T | None:
        try:
            return self._decode(bytes(raw))
        except (ValueError, KeyError, TypeError, AttributeError) as failure:
            self._skip(failure)
            return None

    def _skip(self, failure: Exception) -> None:
        self.skipped += 1
        metrics.UNREADABLE.labels(kind=self.kind).inc()
        log.warning("%s: left out, cannot be read: %s", self.kind, str(failure)[:300])
