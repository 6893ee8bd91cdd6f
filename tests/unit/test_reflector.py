"""The reflector against an HTTP server that plays API server: lists, watches, and everything that can go wrong between them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio.client import ApiClient, Configuration

from finetune_operator.cluster import reflector as module
from finetune_operator.cluster import transport
from finetune_operator.cluster.errors import APIError
from finetune_operator.cluster.reflector import Reflector
from finetune_operator.cluster.transport import KubernetesCluster

Object = dict[str, Any]
CUT = b"cut"
"""The connection breaks here"""


def named(name: str, version: int, value: Any = "") -> Object:
    return {"metadata": {"name": name, "resourceVersion": str(version)}, "value": value}


def event(type_: str, raw: Object) -> bytes:
    return json.dumps({"type": type_, "object": raw}).encode() + b"\n"


def bookmark(version: int) -> bytes:
    return event("BOOKMARK", {"kind": "Node", "metadata": {"resourceVersion": str(version)}})


def gone(code: int = 410, reason: str = "Expired") -> bytes:
    return event("ERROR", {"kind": "Status", "code": code, "reason": reason, "message": "too old resource version"})


class Script:
    """What the server has, and what each watch brings before it ends; the last watch stays open."""

    def __init__(self) -> None:
        self.objects: list[Object] = []
        self.version = 10
        self.page = 500
        self.refusal: int | None = None
        self.watches: list[list[bytes]] = []
        self.asked: list[dict[str, str]] = []
        self.bad_continue = 0
        """So many pages after the first are too old"""

    async def serve(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        self.asked.append(query)
        if self.refusal:
            return web.json_response({"reason": "No", "message": "not you"}, status=self.refusal)
        return await self._watch(request) if "watch" in query else self._list(query)

    def _list(self, query: dict[str, str]) -> web.Response:
        start = int(query.get("continue", 0))
        if start and self.bad_continue:
            self.bad_continue -= 1
            return web.json_response({"reason": "Expired", "message": "the continue parameter is too old"}, status=410)
        rest = start + self.page < len(self.objects)
        meta = {"resourceVersion": str(self.version), **({"continue": str(start + self.page)} if rest else {})}
        return web.json_response({"metadata": meta, "items": self.objects[start : start + self.page]})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        if not self.watches:
            await asyncio.sleep(30)
            return response
        for part in self.watches.pop(0):
            if part == CUT:
                assert request.transport is not None
                request.transport.close()
                break
            await response.write(part)
        return response

    @property
    def lists(self) -> int:
        return sum("watch" not in query for query in self.asked)

    @property
    def resumed_from(self) -> list[str]:
        return [query["resourceVersion"] for query in self.asked if "watch" in query]


class Values:
    """A sink."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}
        self.told: list[str] = []
        self.refused = 0

    def replace(self, values: Iterable[Object]) -> None:
        self.known = {raw["metadata"]["name"]: raw["value"] for raw in values}
        self.told.append("replace")

    def put(self, raw: Object) -> None:
        self.known[raw["metadata"]["name"]] = raw["value"]
        self.told.append(f"put {raw['metadata']['name']}")

    def drop(self, raw: Object) -> None:
        self.known.pop(raw["metadata"]["name"], None)
        self.told.append(f"drop {raw['metadata']['name']}")

    def refuse(self, status: int, why: str) -> None:
        self.known, self.refused = {}, status


def decode(raw: bytes) -> Object:
    found: Object = msgspec.json.decode(raw)
    if found["value"] == "unreadable":
        raise ValueError("it cannot be read")
    return found


Started = Callable[..., Reflector[Object]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    for name in ("_FIRST_DELAY", "_MOST_DELAY", "FORBIDDEN_SECONDS", "UNSERVED_SECONDS", "UNWATCHED_SECONDS"):
        monkeypatch.setattr(module, name, 0.02)
    return Script()


@pytest.fixture
async def cluster(script: Script) -> AsyncIterator[KubernetesCluster]:
    app = web.Application()
    app.router.add_get("/{path:.*}", script.serve)
    async with TestServer(app) as server:
        target = KubernetesCluster(ApiClient(Configuration(host=str(server.make_url("")).rstrip("/"))))
        yield target
        await target.close()


@contextlib.asynccontextmanager
async def running(cluster: KubernetesCluster, sink: Values, **more: Any) -> AsyncIterator[Reflector[Object]]:
    target = Reflector(cluster, "Node", decode, sink, **more)
    task = asyncio.create_task(target.run())
    yield target
    assert not task.done(), task.result()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_listed_once_in_pages_then_watched_from_there(script: Script, cluster: KubernetesCluster) -> None:
    script.page, script.objects = 2, [named(f"n{n}", n, n) for n in range(5)]
    script.watches = [
        [event("ADDED", named("new", 11, 11)), event("MODIFIED", named("n0", 12, 12)), event("DELETED", named("n1", 13)), b""]
    ]
    sink = Values()
    async with running(cluster, sink, field_selector="status.phase!=Failed") as target:
        await target.synced.wait()
        await until(lambda: script.resumed_from == ["10", "13"])
        assert sink.known == {"n0": 12, "n2": 2, "n3": 3, "n4": 4, "new": 11}
        assert sink.told == ["replace", "put new", "put n0", "drop n1"], "pages are put in place at once"
        assert (target.state, script.lists, target.lists) == ("synced", 3, 1)
    assert all(query["fieldSelector"] == "status.phase!=Failed" for query in script.asked)
    watch = script.asked[-1]
    assert watch["allowWatchBookmarks"] == "true" and 300 <= int(watch["timeoutSeconds"]) <= 600


async def test_a_watch_is_resumed_from_its_last_bookmark_and_nothing_is_listed_again(script: Script, cluster: KubernetesCluster) -> None:
    script.watches = [[bookmark(20)], [bookmark(30), event("ADDED", named("a", 31))], []]
    sink = Values()
    async with running(cluster, sink):
        await until(lambda: len(script.resumed_from) == 4)
    assert script.resumed_from == ["10", "20", "31", "31"]
    assert script.lists == 1 and list(sink.known) == ["a"], "a bookmark is no object"


@pytest.mark.parametrize("how", ["event", "answer"])
async def test_410_lists_again_and_drops_what_vanished(script: Script, cluster: KubernetesCluster, how: str) -> None:
    script.objects = [named("stays", 1, "old"), named("vanishes", 2)]
    script.watches = [[event("ADDED", named("more", 11)), gone()]] if how == "event" else [[event("ADDED", named("more", 11))]]
    sink = Values()
    async with running(cluster, sink):
        await until(lambda: "put more" in sink.told)
        script.objects, script.version = [named("stays", 40, "new")], 50
        if how == "answer":
            script.refusal = 410
            await until(lambda: len(script.asked) >= 4)
            script.refusal = None
        await until(lambda: script.resumed_from[-1] == "50")
        assert sink.known == {"stays": "new"}


@pytest.mark.parametrize("how", ["an older version", "silence"])
async def test_a_restored_etcd_is_listed_again(
    script: Script, cluster: KubernetesCluster, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server filters what is older than the version that a watch began from: nothing would be heard for as long as it takes to get there."""
    monkeypatch.setattr(transport, "_SILENT_SECONDS", 0.2 if how == "silence" else 30)
    script.version, script.objects = 100, [named("old", 90, 1)]
    script.watches = [[event("ADDED", named("new", 101, 2)), *([bookmark(40)] if how == "an older version" else [])]]

    class Restored(Values):
        def put(self, raw: Object) -> None:
            super().put(raw)
            script.version, script.objects = 50, [named("old", 45, 0)]

    sink = Restored()
    async with running(cluster, sink):
        await until(lambda: sink.known == {"old": 0} and script.resumed_from[-1] == "50")
    told = sink.told[sink.told.index("put new") :]
    assert set(told[1:]) == {"replace"}  # a slow machine is silent more often than once


async def test_a_continue_that_is_too_old_begins_the_list_anew(script: Script, cluster: KubernetesCluster) -> None:
    script.page, script.objects, script.bad_continue = 1, [named("a", 1), named("b", 2)], 1
    sink = Values()
    async with running(cluster, sink) as target:
        await until(lambda: bool(script.resumed_from))
        assert sink.told == ["replace"] and set(sink.known) == {"a", "b"} and target.lists == 2


async def test_a_broken_line_is_counted_and_what_it_told_is_found_by_a_list(script: Script, cluster: KubernetesCluster) -> None:
    script.watches = [[b'{"type": "ADDED", "obj\n', b"\n", event("ADDED", named("after", 12))]]
    sink = Values()
    async with running(cluster, sink) as target:
        await until(lambda: "put after" in sink.told)
        script.objects, script.version = [named("after", 12), named("missed", 11)], 13
        await until(lambda: script.resumed_from[-1] == "13")
        assert set(sink.known) == {"after", "missed"}
        assert target.skipped == 1


async def test_an_object_that_cannot_be_read_is_left_out_alone(script: Script, cluster: KubernetesCluster) -> None:
    script.objects = [named("good", 1), named("bad", 2, "unreadable")]
    script.watches = [[event("MODIFIED", named("bad", 11, "unreadable")), event("ADDED", named("next", 12)), CUT]]
    sink = Values()
    async with running(cluster, sink) as target:
        await until(lambda: script.resumed_from == ["10", "12"])
        assert set(sink.known) == {"good", "next"} and target.skipped == 2 and script.lists == 1


async def test_one_that_goes_unread_does_not_stay_for_ever(script: Script, cluster: KubernetesCluster) -> None:
    script.objects = [named("a", 1)]
    script.watches = [[event("DELETED", named("a", 11, "unreadable"))]]
    sink = Values()
    async with running(cluster, sink):
        await sink_has(sink, "a")
        script.objects, script.version = [], 12
        await until(lambda: sink.known == {})


async def sink_has(sink: Values, name: str) -> None:
    await until(lambda: name in sink.known)


async def test_a_connection_that_breaks_in_mid_line_is_resumed_before_that_line(script: Script, cluster: KubernetesCluster) -> None:
    whole = event("ADDED", named("b", 12, "x" * 300_000))
    script.watches = [[event("ADDED", named("a", 11)), whole[:1000], CUT], [whole[:70_000], whole[70_000:], CUT]]
    sink = Values()
    async with running(cluster, sink) as target:
        await until(lambda: len(script.resumed_from) == 3)
        assert script.resumed_from == ["10", "11", "12"]
        assert set(sink.known) == {"a", "b"} and target.skipped == 0 and script.lists == 1, "also a line longer than a reader's buffer"


async def test_a_kind_that_may_not_be_looked_at_is_asked_for_again(script: Script, cluster: KubernetesCluster) -> None:
    script.refusal, sink = 403, Values()
    async with running(cluster, sink) as target:
        await target.synced.wait()
        assert (target.state, sink.refused) == ("not allowed", 403) and "not you" in target.why
        script.refusal = 404
        await until(lambda: target.state == "not served" and sink.refused == 404)
        script.refusal, script.objects = None, [named("a", 1)]
        await sink_has(sink, "a")
        assert target.state == "synced" and target.why == ""


async def test_a_kind_that_is_not_served_any_more_is_forgotten(script: Script, cluster: KubernetesCluster) -> None:
    script.objects, script.watches, sink = [named("a", 1)], [[bookmark(11)]], Values()
    async with running(cluster, sink) as target:
        await sink_has(sink, "a")
        script.refusal = 404
        await until(lambda: target.state == "not served" and not sink.known)


async def test_what_may_be_listed_but_not_watched_is_listed_now_and_then(script: Script, cluster: KubernetesCluster) -> None:
    script.objects, sink = [named("a", 1)], Values()
    real = cluster.watch

    async def refused(*_: Any) -> AsyncIterator[bytes]:
        raise APIError(403, "Forbidden", "watch nodes")
        yield b""

    cluster.watch = refused  # type: ignore[method-assign]
    async with running(cluster, sink) as target:
        await until(lambda: script.lists > 2)
        assert target.state == "not watched" and set(sink.known) == {"a"}
        cluster.watch = real  # type: ignore[method-assign]
        script.watches = [[bookmark(11)]]
        await until(lambda: target.state == "synced")


async def test_a_server_that_is_away_leaves_what_is_known(script: Script, cluster: KubernetesCluster) -> None:
    script.objects, script.watches, sink = [named("a", 1)], [[CUT]], Values()
    async with running(cluster, sink) as target:
        await sink_has(sink, "a")
        script.refusal = 503
        seen = len(script.asked)
        await until(lambda: len(script.asked) > seen + 2)
        assert set(sink.known) == {"a"} and target.silent_seconds < 30
        script.refusal, script.watches = None, [[event("ADDED", named("b", 11))]]
        await sink_has(sink, "b")
        assert script.lists == 1, "the same watch goes on"


async def test_an_answer_that_is_no_list_is_a_failure_not_an_empty_cluster(script: Script, cluster: KubernetesCluster) -> None:
    async def page(*_: Any) -> bytes:
        return b'{"items": ['

    cluster.list_page = page  # type: ignore[method-assign]
    with pytest.raises(APIError, match="a LIST of Node cannot be read"):
        await Reflector(cluster, "Node", decode, Values()).list()
