"""The edge towards the API server: whose turn a request is, and what time it is."""

from __future__ import annotations

import asyncio
import copy
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from kubernetes.aio.client import ApiClient, Configuration

from finetune_api import names
from finetune_api.crd import crd
from finetune_operator.__main__ import _probes
from finetune_operator.cluster.clock import ServerClock
from finetune_operator.cluster.errors import APIError
from finetune_operator.cluster.kinds import Kinds
from finetune_operator.cluster.limits import Priority, RateLimit
from finetune_operator.cluster.resources import Resource
from finetune_operator.cluster.transport import KubernetesCluster
from finetune_operator.settings import Settings
from tests.factory import NOW


async def test_a_burst_then_so_many_a_second_the_urgent_first() -> None:
    limit = RateLimit(200, 4)
    order: list[tuple[str, int]] = []

    async def ask(priority: Priority, number: int) -> None:
        await limit.acquire(priority)
        order.append((priority.name, number))

    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.TaskGroup() as group:
        for number in range(12):
            for priority in (Priority.LOOK, Priority.TELL, Priority.ACT):
                group.create_task(ask(priority, number))
    took = loop.time() - began
    assert took >= (36 - 4) / 200 * 0.9, "the bucket holds 4, the other 32 come at 200 a second"
    assert sorted(order) == sorted((p.name, n) for p in Priority for n in range(12)), "everybody gets a turn"
    waited = order[4:]
    assert waited == sorted(waited, key=lambda turn: (Priority[turn[0]], turn[1])), "by priority, then by age"


async def test_the_limit_that_is_set_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle limit had no length, and was taken for none: the default's fifty a second held, whatever was set."""
    turns: list[Priority] = []

    class Noted(RateLimit):
        async def acquire(self, priority: Priority) -> None:
            turns.append(priority)

    async def answer(*_: object) -> dict[str, object]:
        return {}

    cluster = KubernetesCluster(ApiClient(Configuration(host="http://localhost")), Noted(1, 1))
    monkeypatch.setattr(cluster, "_once", answer)
    await cluster.get("Pod", "n", "p")
    assert turns == [Priority.LOOK]
    await cluster.close()


async def test_who_gives_up_waiting_takes_no_turn() -> None:
    limit = RateLimit(20, 1)
    await limit.acquire(Priority.ACT)
    given_up = asyncio.create_task(limit.acquire(Priority.ACT))
    await asyncio.sleep(0)
    given_up.cancel()
    async with asyncio.timeout(2):
        await limit.acquire(Priority.LOOK)
    assert limit.waiting == 0


def test_f31_the_api_servers_time_whatever_the_local_clock_says() -> None:
    ticks = [1000.0]
    clock = ServerClock(lambda: ticks[0])
    clock.heard(NOW.strftime("%a, %d %b %Y %H:%M:%S GMT"))
    assert clock.now() == NOW
    ticks[0] += 90
    assert clock.now() == NOW + timedelta(seconds=90)
    clock.heard((NOW + timedelta(seconds=89)).strftime("%a, %d %b %Y %H:%M:%S GMT"))
    assert clock.now() == NOW + timedelta(seconds=90), "whole seconds and a slow answer do not set it back"
    clock.heard((NOW + timedelta(seconds=60)).strftime("%a, %d %b %Y %H:%M:%S GMT"))
    assert clock.now() == NOW + timedelta(seconds=60)
    for nonsense in (None, "", "yesterday"):
        clock.heard(nonsense)
    assert clock.now() == NOW + timedelta(seconds=60)


async def test_a_request_carries_the_present_token_and_a_refusal_its_words() -> None:
    """Tokens of service accounts are renewed in their file: each request asks for the one that is good now."""
    seen: list[tuple[str, str, dict[str, str], object]] = []

    async def serve(request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        seen.append((request.method, request.headers["Authorization"], dict(request.query), body))
        if request.method == "DELETE":
            return web.json_response({"reason": "Forbidden", "message": "pods is forbidden"}, status=403)
        return web.json_response({"kind": "Pod"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", serve)
    async with TestServer(app) as server:
        configuration = Configuration(host=str(server.make_url("")).rstrip("/"))
        configuration.api_key["authorization"] = "Bearer old"
        cluster = KubernetesCluster(ApiClient(configuration))
        assert await cluster.get("Pod", "n", "p") == {"kind": "Pod"}
        configuration.api_key["authorization"] = "Bearer new"
        assert [pod async for pod in cluster.list("Pod", "n", "a=b,c")] == []
        await cluster.create({"kind": "Pod", "metadata": {"namespace": "n", "name": "ü"}})
        await cluster.replace_status({"kind": "FineTuneJob", "metadata": {"namespace": "n", "name": "j"}, "spec": {"a": 1}, "status": {}})
        with pytest.raises(APIError, match="403 Forbidden: pods is forbidden"):
            await cluster.delete("Pod", "n", "p", "uid")
    with pytest.raises(APIError, match="cannot be reached") as failure:
        await cluster._once("GET", "/", "Pod", "get", None, None, "application/json")
    assert failure.value.transient
    await cluster.close()
    assert [token for _, token, *_ in seen] == ["Bearer old", *["Bearer new"] * 4]
    assert seen[1][2]["labelSelector"] == "a=b,c"
    assert seen[2][2:] == ({"fieldManager": names.MANAGER}, {"kind": "Pod", "metadata": {"namespace": "n", "name": "ü"}})
    assert seen[3][3] == {"kind": "FineTuneJob", "metadata": {"namespace": "n", "name": "j"}, "status": {}}, (
        "a status is written, and nothing else"
    )


async def test_definitions_of_other_releases_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    schema = copy.deepcopy(crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    del schema["properties"]["status"]["properties"]["gang"], schema["properties"]["spec"]["properties"]["runPolicy"]
    schema["properties"]["spec"]["properties"]["future"] = {"type": "array", "items": {"type": "object", "properties": {"a": {}}}}

    class Served:
        found: dict[str, object] | None = schema

        async def may(self, verb: str, kind: str) -> bool:
            return True

        async def plurals(self, group: str, version: str) -> set[str]:
            return {"finetunejobs"}

        async def served_schema(self, resource: Resource) -> dict[str, object] | None:
            assert resource.plural == "finetunejobs", "what is not served has no definition"
            return self.found

    cluster = Served()
    kinds = Kinds(cluster, Settings())  # type: ignore[arg-type]
    for _ in range(2):
        await kinds.found()
    older, newer = kinds.differences
    assert "older than this operator: it lacks spec.runPolicy, status.gang, which the API server drops" in older
    assert "newer than this operator: it has spec.future, which are left as they are" in newer
    assert [r.message for r in caplog.records].count(older) == 1
    cluster.found = None
    await kinds.compare()
    assert kinds.differences == (), "where it may not be read, nothing is said"


@pytest.mark.parametrize(("silent", "code", "says"), [(0.0, 200, "ok"), (1300.0, 503, "no word of nodes and queues for 1300 s")])
async def test_an_operator_that_hears_nothing_of_nodes_is_not_healthy(silent: float, code: int, says: str) -> None:
    synced = asyncio.Event()
    synced.set()
    manager = SimpleNamespace(resync=SimpleNamespace(last=time.monotonic()), silent_seconds=silent, synced=synced)
    app = _probes(manager, None, None, Settings(resync_seconds=300), None, None)  # type: ignore[arg-type]
    async with TestServer(app) as server, TestClient(server) as client:
        answer = await client.get("/healthz")
        assert (answer.status, await answer.text()) == (code, says)
