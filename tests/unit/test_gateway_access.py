"""Who may ask what: Kubernetes tokens, API keys, their limits; and what is decided without any I/O."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest

from finetune_api.api_keys import digest_of_key
from finetune_gateway.access import Access
from finetune_gateway.catalog import Endpoint, asked, listed, read_endpoint
from finetune_gateway.choosing import MOST_PAUSE, Replicas
from finetune_gateway.counting import Limits, Meter
from finetune_gateway.keys import Keys, expired, read_keys
from finetune_gateway.settings import from_environment
from finetune_operator.cluster.errors import APIError
from tests.gateway import KEY, Replica, Reviews, Running, endpoint, running, served
from tests.unit.test_gateway import ASK, CHAT, ask


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with Replica().serving() as replica, running() as found:
        pod = served(replica.address, "support-bot@3")
        found.see(
            *(endpoint(pod, namespace=namespace) for namespace in ("team-a", "team-b")),
            endpoint(pod, name="other", model="only-b", namespace="team-b"),
        )
        yield found


async def test_a_kubernetes_token_reaches_what_its_user_may_use(gateway: Running) -> None:
    """Ambiguous is only what the caller may use twice; what they may not use does not exist for them."""
    reviews = gateway.reviews
    reviews.users = {"alice-token": "alice", "bob-token": "bob", "eve-token": "eve"}
    reviews.rights = {"alice": {("team-a", "chat")}, "bob": {("team-a", ""), ("team-b", "chat")}}
    assert (await ask(gateway, token="alice-token"))[2]["x-finetune-model"] == "team-a/support-bot@3"
    status, answer, _ = await ask(gateway, {**ASK, "model": "only-b"}, token="alice-token")
    assert status == 404 and "only-b@" not in answer["error"]["message"] and "support-bot" in answer["error"]["message"]
    assert (await ask(gateway, {**ASK, "model": "team-b/support-bot"}, token="alice-token"))[0] == 404
    status, answer, _ = await ask(gateway, token="bob-token")
    assert (status, answer["error"]["code"]) == (400, "ambiguous_model")
    assert "team-a/support-bot, team-b/support-bot" in answer["error"]["message"]
    assert (await ask(gateway, {**ASK, "model": "team-b/support-bot"}, token="bob-token"))[0] == 200
    assert (await ask(gateway, token="eve-token"))[0] == 404 and (await ask(gateway, token="nobody"))[0] == 401


async def test_reviews_are_kept_for_a_minute_and_asked_once(gateway: Running) -> None:
    reviews = gateway.reviews
    reviews.users, reviews.rights = {"t": "alice"}, {"alice": {("team-a", "chat")}}
    codes = [status for status, *_ in await asyncio.gather(*(ask(gateway, token="t") for _ in range(10)))]
    assert codes == [200] * 10 and reviews.tokens_asked == 2 and reviews.access_asked == 2, "by audience; by endpoint"


async def test_what_was_reviewed_is_asked_again_after_a_minute() -> None:
    now, reviews = [0.0], Reviews()
    reviews.users = {"t": "alice"}
    access = Access(reviews, Keys(), "finetune-gateway", lambda: now[0], lambda: datetime.now(UTC))
    caller = await access.caller(b"Bearer t")
    many = [Endpoint("team-a", f"e{number}") for number in range(9)]
    reviews.rights = {"alice": {("team-a", "")}}
    assert await access.permitted(caller, many) == many and reviews.access_asked == 2, "the cluster, the namespace"
    reviews.users.clear()
    now[0] = 59
    assert await access.caller(b"bearer t") == caller
    now[0] = 61
    with pytest.raises(Exception, match="neither an API key nor a Kubernetes token"):
        await access.caller(b"Bearer t")
    reviews.rights.clear()
    assert await access.permitted(caller, many) == []


async def test_an_api_server_that_is_away_is_no_refusal() -> None:
    class Away(Reviews):
        async def review_token(self, token: str, audience: str) -> dict[str, Any]:
            raise APIError(0, "Unreachable", "no route")

    access = Access(Away(), Keys(), "finetune-gateway", lambda: 0.0, lambda: datetime.now(UTC))
    with pytest.raises(Exception, match="cannot be checked now") as refused:
        await access.caller(b"Bearer t")
    assert refused.value.status == 503  # type: ignore[attr-defined]


async def test_a_key_is_of_one_namespace_and_can_be_revoked(gateway: Running) -> None:
    assert (await ask(gateway))[2]["x-finetune-model"] == "team-a/support-bot@3"
    status, answer, _ = await ask(gateway, {**ASK, "model": "only-b"})
    assert status == 404 and "only-b," not in answer["error"]["message"]
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session,
        session.get(gateway.url + "/v1/models") as response,
    ):
        assert [model["id"] for model in (await response.json())["data"]] == ["chat", "support-bot", "support-bot@3"]
    gateway.key(expires_at="2020-01-01T00:00:00Z")
    assert (await ask(gateway))[0] == 401
    gateway.parts.keys.replace([])
    status, answer, headers = await ask(gateway)
    assert (status, answer["error"]["code"], headers["WWW-Authenticate"]) == (401, "invalid_api_key", "Bearer")
    async with aiohttp.ClientSession() as session, session.post(gateway.url + CHAT, json=ASK) as response:
        assert response.status == 401


async def test_limits_of_a_key(gateway: Running) -> None:
    """By requests, and by the tokens that answers took; a key without limits is not held up."""
    gateway.key(requests_per_minute=2)
    codes = [(await ask(gateway))[0] for _ in range(3)]
    assert codes == [200, 200, 429]
    gateway.key("ftk_" + "t" * 43, "tokens", tokens_per_minute=20)
    answers = [await ask(gateway, token="ftk_" + "t" * 43) for _ in range(3)]
    assert [status for status, *_ in answers] == [200, 200, 429], "12 tokens each"
    assert answers[2][1]["error"]["type"] == "tokens" and 1 <= int(answers[2][2]["Retry-After"]) <= 20
    gateway.key("ftk_" + "f" * 43, "free")
    assert [(await ask(gateway, token="ftk_" + "f" * 43))[0] for _ in range(4)] == [200] * 4


def test_a_limit_fills_evenly_and_each_gateway_lets_its_part_through() -> None:
    now = [0.0]
    limits = Limits(lambda: now[0], share=0.5)
    assert [limits.admit("k", 4, None) for _ in range(3)] == [None, None, ("requests", 30.0)]
    now[0] = 30
    assert limits.admit("k", 4, None) is None and limits.admit("other", 4, None) is None
    limits.spend("k", 100, 500)
    assert limits.admit("k", None, 100) == ("tokens", pytest.approx(541.2))
    limits.forget(set())
    assert limits.admit("k", 4, 100) is None


def test_the_secret_is_read_and_broken_entries_are_left_out(caplog: Any) -> None:
    good = {"hash": digest_of_key(KEY), "namespace": "team-a", "expiresAt": "2027-01-01T00:00:00Z", "ofALaterRelease": 1}
    entries = {"good": good, "no-hash": {"namespace": "x"}, "bad-time": {**good, "expiresAt": "soon"}}
    data = {name: base64.b64encode(json.dumps(entry).encode()).decode() for name, entry in entries.items()}
    found = read_keys(json.dumps({"data": {**data, "no-json": "!!!"}}).encode())
    ((identifier, key),) = found.values()
    assert (identifier, key.namespace, [*found]) == ("good", "team-a", [digest_of_key(KEY)])
    assert not expired(key, datetime(2026, 12, 31, tzinfo=UTC)) and expired(key, datetime(2027, 1, 2, tzinfo=UTC))
    assert all(name in caplog.text for name in ("no-hash", "bad-time", "no-json"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a", (None, "a", None)),
        ("n/a.b@12", ("n", "a.b", 12)),
        ("a@0", None),
        ("a@", None),
        ("/a", None),
        ("n/m/a", None),
        ("A", None),
        ("a" * 500, None),
    ],
)
def test_names(text: str, told: Any) -> None:
    found = asked(text)
    assert (found and (found.namespace or None, found.name, found.version)) == told
    assert found is None or str(found) == text


def test_addresses_that_no_request_is_sent_to() -> None:
    bad = ["169.254.169.254:80", "localhost:8000", "10.0.0.1:0", "10.0.0.1:99999", "0.0.0.0:1", "evil.example.com", "10.0.0.1:80/x", ""]
    found = read_endpoint(json.dumps(endpoint(*(served(text, "support-bot@3") for text in [*bad, "10.0.0.7", "[::1]:90"]))).encode())
    assert found.base == ("10.0.0.7:8080", "[::1]:90") and found.models["support-bot"].versions == {3: found.base}
    plain = read_endpoint(b'{"metadata":{"name":"a","namespace":"b"}}')
    assert plain.base == () and listed([plain]) == {}


def test_a_replica_that_fails_is_left_alone_longer_each_time() -> None:
    now = [100.0]
    replicas = Replicas(lambda: now[0], lambda: 0.5)
    assert replicas.pick(["a", "b"]) == "a" and replicas.pick(["a", "b"]) == "b"
    replicas.done("b", failed=False)
    replicas.done("a", failed=True)
    assert [replicas.pick(["a", "b"]) for _ in range(3)] == ["b"] * 3 and replicas.paused == 1
    now[0] += 2.1
    assert replicas.pick(["a", "b"]) == "a", "one request shows whether it is well"
    assert replicas.pick(["a", "b"]) == "b"
    for _ in range(20):
        replicas.done("a", failed=True)
        assert replicas.pick(["a"]) == "a", "there is no other"
    now[0] += MOST_PAUSE + 0.1
    replicas.done("a", failed=False)
    assert replicas.paused == 0 and replicas.pick(["a"], tried=["a"]) is None
    replicas.forget([])
    assert replicas.pick(["b"]) == "b"


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_usage_is_found_however_the_bytes_come(size: int) -> None:
    """The text of an answer that looks like one is not it."""
    text = json.dumps('"usage":{"prompt_tokens":1,"completion_tokens":999}')
    usage = '"usage":{"prompt_tokens":11,"completion_tokens":22,"prompt_tokens_details":{"cached_tokens":3}}'
    answer = f'{{"choices":[{{"message":{{"content":{text}}}}}],{usage},"prompt_logprobs":null,"more":"{"x" * 3000}"}}'.encode()
    meter = Meter(stream=False)
    for start in range(0, len(answer), size):
        meter.feed(answer[start : start + size])
    found, told = meter.usage(4)
    assert (found.prompt_tokens, found.completion_tokens, told) == (11, 22, True)


def test_settings_are_named_when_they_are_wrong() -> None:
    assert from_environment({"FINETUNE_GATEWAY_WATCH_NAMESPACES": "a,b", "FINETUNE_GATEWAY_TRIES": "2"}).watch_namespaces == ("a", "b")
    for name, text in (("TRIES", "0"), ("IDLE_SECONDS", "-1"), ("PORT", "x")):
        with pytest.raises(ValueError, match=f"FINETUNE_GATEWAY_{name}"):
            from_environment({f"FINETUNE_GATEWAY_{name}": text})
