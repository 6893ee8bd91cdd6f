"""The gateway on real sockets before real servers: names, versions, replicas, canaries, limits, and what a client may do wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web

from tests.gateway import KEY, Replica, Running, endpoint, running, served, until

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "support-bot", "messages": [{"role": "user", "content": "the secret question"}]}


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with running(body_bytes=20_000) as found:
        yield found


@pytest.fixture
async def replicas() -> AsyncIterator[list[Replica]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Replica(name).serving()) for name in ("one", "two")]


def both(replicas: list[Replica], **more: Any) -> dict[str, Any]:
    return endpoint(*(served(replica.address, "support-bot@3", "support-bot@2") for replica in replicas), **more)


async def ask(gateway: Running, body: Any = ASK, *, token: str = KEY, path: str = CHAT, **headers: str) -> tuple[int, Any, Any]:
    """Status, answer and headers."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with (
        aiohttp.ClientSession() as session,
        session.post(gateway.url + path, data=data, headers={"Authorization": f"Bearer {token}", **headers}) as response,
    ):
        raw = await response.read()
        return response.status, json.loads(raw) if response.content_type == "application/json" else raw, response.headers


async def scraped(gateway: Running, path: str = "/metrics") -> str:
    async with aiohttp.ClientSession() as session, session.get(gateway.metrics_url + path) as response:
        return await response.text()


async def raw(gateway: Running, data: bytes, wait: float = 3.0) -> bytes:
    """What comes back for bytes, until the gateway closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
    writer.write(data)
    async with asyncio.timeout(wait):
        found = await reader.read()
    writer.close()
    return found


async def test_names_versions_and_the_base(gateway: Running, replicas: list[Replica]) -> None:
    """A replica is asked for the very version; the rest of the body arrives as it was, and of the headers nothing else."""
    gateway.see(both(replicas[:1]))
    number = "1.10000000000000000001"
    body = f'{{"messages":[],"model":"support-bot","x": {{"model":"y","n":{number}}}}}'.encode()
    status, answer, headers = await ask(gateway, body, Cookie="a=b", **{"X-Request-Id": "r-1", "X-Forwarded-For": "1.2.3.4"})
    assert (status, answer["model"], headers["x-finetune-model"]) == (200, "support-bot@3", "team-a/support-bot@3")
    one = replicas[0]
    assert one.bodies[0] == {"messages": [], "model": "support-bot@3", "x": {"model": "y", "n": float(number)}}
    assert set(one.headers[0]) == {"host", "content-type", "content-length", "x-request-id"}
    for name, told in (("support-bot@2", "support-bot@2"), ("team-a/support-bot@3", "support-bot@3"), ("chat", "chat")):
        assert (await ask(gateway, {**ASK, "model": name}))[0] == 200 and one.bodies[-1]["model"] == told
    status, answer, _ = await ask(gateway, {**ASK, "model": "suport-bot"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found") and "support-bot" in answer["error"]["message"]
    assert (await ask(gateway, {**ASK, "model": "support-bot@9"}))[0] == 404


@pytest.mark.parametrize("more", [{"prompt_logprobs": 0}, {"echo": True, "logprobs": 1}])
async def test_what_would_end_an_engine_is_refused(gateway: Running, replicas: list[Replica], more: dict[str, Any]) -> None:
    gateway.see(both(replicas[:1]))
    status, answer, _ = await ask(gateway, {**ASK, **more})
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "unsupported_parameter", next(iter(more)))
    assert not replicas[0].bodies
    assert (await ask(gateway, {**ASK, "prompt_logprobs": None, "echo": True}))[0] == 200


async def test_the_openai_sdk_streamed_and_whole(gateway: Running, replicas: list[Replica]) -> None:
    gateway.see(both(replicas[:1]))
    gateway.key(identifier="sdk")
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as client:
        assert {model.id for model in (await client.models.list()).data} == {"chat", "support-bot", "support-bot@2", "support-bot@3"}
        found = (await client.models.retrieve("support-bot@3")).to_dict()
        assert (found["owned_by"], found["parent"]) == ("team-a", "team-a/chat")
        assert "parent" not in (await client.models.retrieve("chat")).to_dict()
        whole = await client.chat.completions.create(model="support-bot", messages=[{"role": "user", "content": "x"}])
        assert whole.choices[0].message.content == "one" and whole.usage is not None and whole.usage.total_tokens == 12
        stream = await client.chat.completions.create(
            model="support-bot", messages=[{"role": "user", "content": "x"}], stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "one-0 one-1 one-2 "
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 3
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="nothing", prompt="x")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("nothing")
    status, passed, headers = await ask(gateway, {**ASK, "stream": True})
    assert (status, passed) == (200, replicas[0].sent) and headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert "x-secret" not in headers
    told = await scraped(gateway)
    model = 'endpoint="chat",key="sdk",{}model="support-bot",namespace="team-a",{}version="3"}}'
    assert "finetune_gateway_tokens_total{" + model.format('kind="completion",', 'source="usage",') in told
    assert "finetune_gateway_tokens_total{" + model.format('kind="completion",', 'source="estimate",') + " 3.0" in told
    assert 'finetune_gateway_requests_total{code="200",' + model.format("", "") + " 3.0" in told
    assert "finetune_leader" not in told


async def test_requests_go_to_the_replica_with_the_fewest(gateway: Running, replicas: list[Replica]) -> None:
    gateway.see(both(replicas))
    replicas[0].pause = replicas[1].pause = 0.3
    await asyncio.gather(*(ask(gateway) for _ in range(6)))
    assert [len(replica.bodies) for replica in replicas] == [3, 3]


async def test_what_waits_for_its_first_byte_is_counted(gateway: Running, replicas: list[Replica]) -> None:
    """By endpoint: autoscalers go by it."""
    waiting = 'finetune_gateway_waiting_requests{endpoint="chat",namespace="team-a"}'
    gateway.see(both(replicas))
    begun, answer = asyncio.Event(), asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        begun.set()
        await answer.wait()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"choices":[]}\n\n')
        await asyncio.sleep(30)
        return response

    replicas[0].instead = replicas[1].instead = stream
    async with aiohttp.ClientSession() as session:
        asking = asyncio.create_task(session.post(gateway.url + CHAT, json=ASK, headers={"Authorization": f"Bearer {KEY}"}))
        await begun.wait()
        assert f"{waiting} 1.0" in await scraped(gateway)
        answer.set()
        async with await asking as response:
            assert await response.content.readany()
            assert f"{waiting} 0.0" in (told := await scraped(gateway)) and "finetune_gateway_running_requests 1.0" in told


@pytest.mark.parametrize("fault", ["refused", "503", "404", "closed"])
async def test_another_replica_is_asked_before_the_first_byte(gateway: Running, replicas: list[Replica], fault: str) -> None:
    """And the one that failed is left alone for a while."""
    bad = replicas[0]
    pods = [served(replica.address, "support-bot@3") for replica in replicas]

    async def answer(request: web.Request) -> web.Response:
        if fault == "closed":
            assert request.transport is not None
            request.transport.close()
        return web.Response(status=int(fault) if fault.isdigit() else 200)

    bad.instead = answer
    if fault == "refused":
        pods[0]["address"] = "127.0.0.1:1"
    gateway.see(endpoint(*pods))
    for _ in range(12):
        status, found, _ = await ask(gateway)
        assert (status, found["choices"][0]["message"]["content"]) == (200, "two")
    assert len(bad.bodies) <= 2, "left alone"
    if fault != "refused":
        bad.instead = None
        replicas[1].instead = bad.instead = answer
        status, found, headers = await ask(gateway)
        assert (status, found["error"]["code"]) == (503, "no_replica") and headers["Retry-After"]


async def test_after_the_first_byte_nobody_else_is_asked(gateway: Running, replicas: list[Replica]) -> None:
    """A stream ends with an event that the SDK raises; any other answer is not whole for whoever reads it."""

    async def breaks(request: web.Request) -> web.StreamResponse:
        body = replicas[0].bodies[-1]
        kind = {"Content-Type": "text/event-stream"} if body.get("stream") else {"Content-Type": "application/json", "Content-Length": "99"}
        response = web.StreamResponse(headers=kind)
        await response.prepare(request)
        await response.write(b'data: {"choices":[]}\n\n')
        await asyncio.sleep(0.05)
        assert request.transport is not None
        request.transport.abort()
        return response

    replicas[0].instead = breaks
    gateway.see(endpoint(served(replicas[0].address, "support-bot@3")))
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as client:
        stream = await client.chat.completions.create(model="support-bot", messages=[], stream=True)
        with pytest.raises(openai.APIError, match="the replica stopped answering"):
            async for _ in stream:
                pass
    with pytest.raises(aiohttp.ClientError):
        await ask(gateway)
    assert len(replicas[0].bodies) == 2


async def test_who_hangs_up_ends_what_the_replica_does(gateway: Running, replicas: list[Replica]) -> None:
    replicas[0].tokens, replicas[0].pause = 1000, 0.02
    gateway.see(both(replicas[:1]))
    async with aiohttp.ClientSession() as session:
        response = await session.post(gateway.url + CHAT, json={**ASK, "stream": True}, headers={"Authorization": f"Bearer {KEY}"})
        await response.content.readany()
        response.close()
    await until(lambda: replicas[0].cancelled and not replicas[0].running)
    assert 'code="499"' in await scraped(gateway)
    assert "finetune_gateway_running_requests 0.0" in await scraped(gateway)


async def test_time_is_limited(replicas: list[Replica]) -> None:
    replicas[0].pause = 30
    async with running(first_byte_seconds=0.5) as gateway:
        gateway.see(both(replicas[:1]))
        status, answer, _ = await ask(gateway)
        assert (status, answer["error"]["code"]) == (504, "timeout")
    async with running(idle_seconds=0.1) as gateway:
        gateway.see(both(replicas[:1]))
        status, stream, _ = await ask(gateway, {**ASK, "stream": True})
        assert status == 200 and b"upstream_failed" in stream, "silent in the middle"


async def test_a_gateway_that_ends_lets_answers_end(replicas: list[Replica]) -> None:
    """Within its time; nobody new is taken."""
    replicas[0].tokens, replicas[0].pause = 10, 0.05
    async with running(drain_seconds=5.0) as gateway, aiohttp.ClientSession() as session:
        gateway.see(both(replicas[:1]))
        stream = await session.post(gateway.url + CHAT, json={**ASK, "stream": True}, headers={"Authorization": f"Bearer {KEY}"})
        begun = await stream.content.readany()
        for server in gateway.servers:
            server.should_exit = True
        assert begun + await stream.content.read() == replicas[0].sent and replicas[0].sent.endswith(b"[DONE]\n\n")
        with pytest.raises(aiohttp.ClientConnectorError):
            await ask(gateway)


async def test_only_verified_replicas_answer(gateway: Running, replicas: list[Replica]) -> None:
    name, (one, two) = "support-bot@3", (replica.address for replica in replicas)
    gateway.see(endpoint(served(one, name, state="Loaded"), served(two, name)))
    assert {(await ask(gateway))[1]["choices"][0]["message"]["content"] for _ in range(8)} == {"two"}
    gateway.see(endpoint(served(one, name, state="Unverifiable"), served(two, name, ready=False)))
    assert (await ask(gateway))[0] == 200, "of all that have it nothing can be told"
    gateway.see(endpoint(served(one, name, state="Unverifiable"), served(two, name, state="Mismatch")))
    status, answer, _ = await ask(gateway)
    assert (status, answer["error"]["code"]) == (503, "no_replica") and "-n team-a" in answer["error"]["message"]


async def test_a_canary_gets_its_share_and_both_are_counted(gateway: Running, replicas: list[Replica]) -> None:
    """Requests for a version by its number are no part of it."""
    canary = {"version": 4, "step": 0, "percent": 25, "since": "2026-11-29T06:00:00Z"}
    pods = [served(replica.address, "support-bot@3", "support-bot@4") for replica in replicas]
    gateway.see(endpoint(*pods, canary=canary))

    async def fails(request: web.Request) -> web.Response:
        return web.Response(status=500 if replicas[0].bodies[-1]["model"].endswith("@4") else 200)

    replicas[0].instead = fails
    for _ in range(10):
        await asyncio.gather(*(ask(gateway) for _ in range(20)))
    await ask(gateway, {**ASK, "model": "support-bot@4"})
    (counted,) = json.loads(await scraped(gateway, "/canary"))
    named = {field: counted[field] for field in ("namespace", "endpoint", "model", "version", "since")}
    assert named == {"namespace": "team-a", "endpoint": "chat", "model": "support-bot", "version": 4, "since": canary["since"]}
    assert counted["old"]["requests"] + counted["new"]["requests"] == 200
    assert 20 <= counted["new"]["requests"] <= 80, "25 % of 200, within 4.9 standard deviations"
    assert counted["old"]["errors"] == 0 and 0 < counted["new"]["errors"] < counted["new"]["requests"]
    assert counted["old"]["logSeconds"] < 0 < counted["old"]["logSecondsSquared"]
    gateway.see(endpoint(*pods, canary={**canary, "since": "2026-11-29T07:00:00Z", "percent": 50}))
    await ask(gateway)
    (counted,) = json.loads(await scraped(gateway, "/canary"))
    assert counted["old"]["requests"] + counted["new"]["requests"] == 1, "another step, other counts"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"[" * 100_000, "body_too_large"),
        (b'{"model":"support-bot","m":' + b"[" * 9000 + b"]" * 9000 + b"}", "invalid_json"),
        (b'{"model":"support-bot"', "invalid_json"),
        (b"[]", "invalid_json"),
        (b"{}", "missing_model"),
        (b'{"model":["support-bot"]}', "invalid_model"),
        (b'{"model":"../../etc/passwd"}', "invalid_model"),
        (b'{"model":"support-bot\\u0000"}', "invalid_model"),
        (b'{"model":"\xff"}', "invalid_model"),
        (b'{"model":"support-bot","stream":"yes"}', "invalid_value"),
    ],
)
async def test_bodies_that_are_refused(gateway: Running, replicas: list[Replica], body: bytes, code: str) -> None:
    gateway.see(both(replicas))
    status, answer, _ = await ask(gateway, body)
    assert (status, answer["error"]["code"]) == (413 if code == "body_too_large" else 400, code)
    assert not replicas[0].bodies and not replicas[1].bodies


async def test_what_is_no_request(replicas: list[Replica]) -> None:
    """Headers without an end, connections that say nothing, bodies that drip, smuggled lengths, other paths and methods."""
    async with running(header_seconds=0.3, body_seconds=0.3, header_bytes=4000) as gateway:
        gateway.see(both(replicas))
        start = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
        assert b"431" in await raw(gateway, start + b"X: " + b"a" * 6000)
        assert b"400" in await raw(gateway, start + b"X: " + b"a" * 6000 + b"\r\n\r\n")
        assert b"408" in await raw(gateway, b"")
        assert b"408" in await raw(gateway, b"POST /v1/chat/comp")
        assert b"408" in await raw(gateway, start + b"Content-Length: 10\r\n\r\n{")
        assert b" 400" in await raw(gateway, start + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}0\r\n\r\n")
        assert b" 400" in await raw(gateway, start + b"Bad\x00Name: x\r\n\r\n")
        assert b"413" in await raw(gateway, start + b"Content-Length: 99999999999\r\n\r\n")
        for path in ("/v1/load_lora_adapter", "/metrics", "/canary", "/v1/chat/completions/../x", "/openapi.json"):
            status, answer, _ = await ask(gateway, path=path)
            assert (status, answer["error"]["code"]) == (404, "not_found")
        async with aiohttp.ClientSession() as session, session.get(gateway.url + CHAT) as response:
            assert response.status == 405 and (await response.json())["error"]["message"]
        gateway.why = "not listed yet: FineTuneEndpoint"
        async with aiohttp.ClientSession() as session, session.get(gateway.url + "/readyz") as response:
            assert (response.status, await response.text()) == (503, gateway.why)
    assert not replicas[0].bodies and not replicas[1].bodies


async def test_too_many_connections_are_told_so(replicas: list[Replica]) -> None:
    async with running(connections=3) as gateway:
        gateway.see(both(replicas))
        replicas[0].pause = replicas[1].pause = 0.3
        codes = [status for status, *_ in await asyncio.gather(*(ask(gateway) for _ in range(6)))]
        assert 200 in codes and 503 in codes
        assert (await ask(gateway))[0] == 200


async def test_a_mistake_of_ours_tells_no_prompt(gateway: Running, replicas: list[Replica], caplog: Any, monkeypatch: Any) -> None:
    gateway.see(both(replicas))
    with caplog.at_level(logging.DEBUG):
        monkeypatch.setattr("finetune_gateway.proxy.choose", lambda *_: 1 / 0)
        status, answer, _ = await ask(gateway)
        monkeypatch.undo()
        await ask(gateway)
        await ask(gateway, {**ASK, "model": "x/support-bot"})
    assert (status, answer["error"]["code"]) == (500, "internal_error")
    assert "ZeroDivisionError" in caplog.text and "secret question" not in caplog.text and KEY not in caplog.text
