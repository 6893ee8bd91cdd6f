"""The progress endpoint: who may report what (fault F36, attack A13)."""

from __future__ import annotations

import asyncio
import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from finetune_api import names
from finetune_api.contract import PROGRESS_BODY_LIMIT, ProgressReport, StageResult, progress_audience, read_stage_result
from finetune_operator.cache.progress import ProgressBoard
from finetune_operator.cache.store import Store
from finetune_operator.cluster.errors import APIError
from finetune_operator.servers import certificate
from finetune_operator.servers import progress as progress_server
from finetune_operator.servers.progress import ProgressServer
from finetune_operator.settings import Settings
from tests.factory import UID, job
from tests.unit.test_store_and_queue import KEY, child

PATH = "/v1/namespaces/team-a/finetunejobs/support/progress"
REPORT = {"attempt": 0, "step": 3, "totalSteps": 10, "loss": 1.5}
NOW = datetime.now(UTC)


class Reviews:
    """Stands for the API server's TokenReview: `token-<pod uid>` is good for the audience of its job."""

    def __init__(self) -> None:
        self.count = 0
        self.down = False

    def now(self) -> datetime:
        return NOW

    async def review_token(self, token: str, audience: str) -> dict[str, Any]:
        self.count += 1
        if self.down:
            raise APIError(503, "Unavailable", "down")
        if not token.startswith("token-") or audience != progress_audience("team-a", "support"):
            return {"authenticated": False}
        extra = {"authentication.kubernetes.io/pod-uid": [token.removeprefix("token-")]}
        return {"authenticated": True, "audiences": [audience], "user": {"extra": extra}}


@pytest.fixture
async def endpoint(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(progress_server, "_LEAST_INTERVAL", 0.0)
    store, board, reviews = Store(), ProgressBoard(), Reviews()
    woken: list[Any] = []
    store.put_job(job())
    store.put_child("Pod", child("Pod", "support-worker-0", "rank-0", UID))
    other = child("Pod", "support-worker-1", "rank-1", UID)
    other["metadata"]["labels"][names.LABEL_RANK] = "1"
    store.put_child("Pod", other)
    store.put_child("Pod", child("Pod", "intruder", "foreign", "another-owner"))
    server = ProgressServer(reviews, store, board, woken.append)  # type: ignore[arg-type]
    async with TestClient(TestServer(server.application())) as client:
        client.reviews, client.board, client.woken, client.store = reviews, board, woken, store  # type: ignore[attr-defined]
        yield client


async def post(client: Any, token: str | None = "token-rank-0", body: Any = REPORT, path: str = PATH, **kwargs: Any) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    response = await client.post(path, headers=headers, **(kwargs or {"json": body}))
    return int(response.status)


async def test_rank_zero_reports(endpoint: Any) -> None:
    assert await post(endpoint) == 204
    report, _ = endpoint.board.latest(UID)
    assert (report.step, report.loss) == (3, 1.5)
    assert endpoint.woken == [KEY]
    assert await post(endpoint) == 204
    assert endpoint.reviews.count == 1, "a good token is remembered"


@pytest.mark.parametrize(
    ("token", "code"),
    [(None, 401), ("", 401), ("garbage", 401), ("token-rank-1", 403), ("token-foreign", 403), ("token-gone", 403), ("x" * 9000, 400)],
)
async def test_a13_others_may_not(endpoint: Any, token: str | None, code: int) -> None:
    assert await post(endpoint, token) == code
    assert endpoint.board.latest(UID) is None


async def test_a13_a_token_of_another_job(endpoint: Any) -> None:
    assert await post(endpoint, path="/v1/namespaces/team-a/finetunejobs/other/progress") == 401


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"attempt": -1, "step": 1, "totalSteps": 1}', b'{"attempt": "0"}', b"\xff", b"[" * 10_000])
async def test_a13_malformed_bodies(endpoint: Any, body: bytes) -> None:
    assert await post(endpoint, data=body) == 400


async def test_a13_a_large_body_is_refused(endpoint: Any) -> None:
    assert await post(endpoint, data=b"x" * (PROGRESS_BODY_LIMIT + 1)) == 413


async def test_a13_too_many_reports(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_server, "_LEAST_INTERVAL", 30.0)
    codes = [await post(endpoint) for _ in range(5)]
    assert codes == [204, 429, 429, 429, 429]


async def test_reports_of_another_attempt_are_refused(endpoint: Any) -> None:
    assert await post(endpoint, body={**REPORT, "attempt": 1}) == 403
    endpoint.store.put_job(job(status={"attempt": 2}, resourceVersion="9"))
    assert await post(endpoint) == 403


async def test_when_tokens_cannot_be_checked(endpoint: Any) -> None:
    endpoint.reviews.down = True
    assert await post(endpoint) == 503


def test_a_report_with_everything_goes_over_the_wire() -> None:
    """The models are strict: what one side writes, the other must read."""
    report = ProgressReport(
        attempt=1, step=5, total_steps=9, epoch=0.5, loss=1.0, eval_loss=2.0, learning_rate=1e-4, tokens_per_second=10.0, eta_seconds=3.0,
        checkpoint_step=4, checkpoint_every=60.0, resumed_from=2, skipped_checkpoints=[3],
    )  # fmt: skip
    assert set(report.model_fields_set) == set(ProgressReport.model_fields)
    assert ProgressReport.model_validate(json.loads(json.dumps(report.to_wire()))) == report


def test_newest_wins() -> None:
    board = ProgressBoard()
    assert board.put("j", ProgressReport(attempt=1, step=5, total_steps=9), NOW)
    assert not board.put("j", ProgressReport(attempt=1, step=4, total_steps=9), NOW)
    assert not board.put("j", ProgressReport(attempt=0, step=8, total_steps=9), NOW)
    assert board.put("j", ProgressReport(attempt=2, step=0, total_steps=9), NOW)
    board.forget("j")
    assert board.latest("j") is None


def test_the_certificate_names_the_service_and_is_renewed_in_time() -> None:
    hosts = certificate.hosts_of(Settings())
    made = certificate.generate(hosts, NOW)
    assert made.fits(hosts, NOW)
    assert made.ssl_context().get_ca_certs() == []
    assert not made.fits(["elsewhere.svc"], NOW)
    assert not made.fits(hosts, NOW + timedelta(days=3650 - 300))
    assert not certificate.Certificate("", "").fits(hosts, NOW)


async def test_the_certificate_is_kept_in_its_secret() -> None:
    class Secrets:
        def __init__(self) -> None:
            self.secret: dict[str, Any] = {"metadata": {"name": "tls", "namespace": "ns", "resourceVersion": "1"}}
            self.lost = 1

        async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
            return dict(self.secret)

        async def replace(self, manifest: dict[str, Any]) -> dict[str, Any]:
            if self.lost:
                self.lost -= 1
                raise APIError(409, "Conflict", "changed")
            self.secret = manifest
            return manifest

    secrets, settings = Secrets(), Settings(tls_secret="tls", namespace="ns")
    first = await certificate.ensure(secrets, settings)  # type: ignore[arg-type]
    assert await certificate.ensure(secrets, settings) == first  # type: ignore[arg-type]


def test_last_words_fit_the_kubelets_limit_and_keep_the_result() -> None:
    words = StageResult(reason="InvalidRows", message="ü" * 3000, result={"dataset": {"train": 1}})
    text = words.dumps()
    assert len(text.encode()) <= 4096
    back = read_stage_result(text)
    assert back is not None and back.result == words.result and back.reason == "InvalidRows"
    assert read_stage_result("Traceback (most recent call last):") is None


async def test_a_new_certificate_is_trusted_before_it_is_served_and_beside_the_one_before() -> None:
    hosts, held = certificate.hosts_of(Settings(namespace="ns")), {}
    old = certificate.generate(hosts, NOW - timedelta(days=3600))

    class Secrets:
        async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
            return {"metadata": {"name": name, "namespace": namespace}, "data": dict(held)}

        async def replace(self, manifest: dict[str, Any]) -> dict[str, Any]:
            held.update(manifest["data"])
            return manifest

    held.update({"tls.crt": _encoded(old.certificate), "tls.key": _encoded(old.key)})
    settings = Settings(tls_secret="tls", namespace="ns", certificate_seconds=0.01)
    identity = certificate.Identity(Secrets(), settings)  # type: ignore[arg-type]
    identity.certificate, identity.context = old, old.ssl_context()
    seen: list[tuple[str, bool]] = []

    twice = asyncio.Event()

    async def look(new: certificate.Certificate) -> None:
        seen.append((new.authorities, identity.certificate == new))
        if len(seen) == 2:
            twice.set()

    task = asyncio.create_task(identity.keep(look))
    await asyncio.wait_for(twice.wait(), 10)
    task.cancel()
    new = identity.certificate
    assert new.fits(hosts, NOW) and new.authorities == new.certificate + old.certificate
    assert seen[0] == (new.authorities, False), "trusted before it is served"
    assert seen[1] == (new.authorities, True), "and no newer one is made"


async def test_a_certificate_that_is_not_there_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """cert-manager may come, or answer, after the operator: no Secret, an empty one, half of one, then a good one."""
    monkeypatch.setattr(certificate, "_SECONDS_WHILE_MISSING", 0.001)
    good = certificate.generate(certificate.hosts_of(Settings(namespace="ns")), NOW)
    broken = {"tls.crt": _encoded(good.certificate), "tls.key": _encoded("no key")}
    whole = {"tls.crt": _encoded(good.certificate), "tls.key": _encoded(good.key), "ca.crt": _encoded("the authority")}
    answers: list[Any] = [
        APIError(404, "NotFound", 'secrets "tls" not found'),
        APIError(0, "Unreachable", "the API server cannot be reached"),
        APIError(403, "Forbidden", "secrets is forbidden"),
        None,
        {"tls.crt": _encoded(good.certificate)},
        broken,
        whole,
    ]
    told: list[str] = []

    class Secrets:
        async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
            told.append(identity.waits_for)
            answer = answers.pop(0)
            if isinstance(answer, APIError):
                raise answer
            return {"metadata": {"name": name, "namespace": namespace}, "data": answer}

    identity = certificate.Identity(Secrets(), Settings(tls_secret="tls", tls_managed=True, namespace="ns"))  # type: ignore[arg-type]
    assert identity.waits_for, "it is not ready before it looked"
    await asyncio.wait_for(identity.found(), 10)
    assert identity.waits_for == "" and identity.certificate.authorities == "the authority" and identity.context is not None
    assert all(text.startswith("waiting for Secret ns/tls: ") for text in told[1:]), told
    for text, words in zip(
        told[1:], ("cert-manager makes it", "cannot be reached", "forbidden", "no tls.crt", "no tls.crt", "PEM"), strict=True
    ):
        assert words in text, text


async def test_a_certificate_that_is_taken_away_is_served_on(monkeypatch: pytest.MonkeyPatch) -> None:
    good = certificate.generate(certificate.hosts_of(Settings(namespace="ns")), NOW)
    asked = asyncio.Event()

    class Secrets:
        times = 0

        async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
            self.times += 1
            if self.times > 3:
                asked.set()
            raise APIError(404, "NotFound", "gone")

    settings = Settings(tls_secret="tls", tls_managed=True, namespace="ns", certificate_seconds=0.001)
    identity = certificate.Identity(Secrets(), settings)  # type: ignore[arg-type]
    identity.certificate, identity.context = good, good.ssl_context()

    async def look(new: certificate.Certificate) -> None:
        raise AssertionError("there is no new one")

    task = asyncio.create_task(identity.keep(look))
    await asyncio.wait_for(asked.wait(), 10)
    assert not task.done() and identity.certificate == good
    task.cancel()


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
