"""Admission webhooks: what is refused, what is warned of, what is noted, and what is never held up (attacks A14, A18, A19)."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from typing import Any

import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from finetune_api import KIND, names
from finetune_api.advice import advice
from finetune_api.queue import QUEUE_KIND
from finetune_api.validation import parse_spec
from finetune_operator.cluster.errors import APIError
from finetune_operator.servers import webhooks
from finetune_operator.servers.bundle import Bundle
from finetune_operator.servers.review import Rights, mutate, validate
from finetune_operator.servers.webhooks import BODY_LIMIT, MUTATE, VALIDATE, AdmissionServer
from finetune_operator.settings import Settings
from tests.cluster.helm import rendered
from tests.cluster.shell import REPO
from tests.factory import FULL, MINIMAL, job, merged

GOOD = merged(FULL, resources={"gpuMemory": "80Gi"}, model={"uri": "hf://org/model@1a2b3c4"})


def request(new: dict[str, Any] | None, old: dict[str, Any] | None = None, kind: str = KIND, **more: Any) -> dict[str, Any]:
    operation = "CREATE" if old is None else "UPDATE"
    base = {"uid": "u1", "operation": operation, "namespace": "team-a", "kind": {"kind": kind}, "userInfo": {"username": "ann"}}
    return {**base, "object": new, "oldObject": old, **more}


def test_a_bad_spec_is_refused_with_the_field_the_value_and_the_fix() -> None:
    answer = validate(request(job(merged(MINIMAL, tuning={"method": "lorra"}))), Rights())
    assert "spec.tuning.method: 'lorra' is not one of" in answer.errors[0] and "lora" in answer.errors[0]
    wire = answer.to_wire("u1")["response"]
    assert wire["allowed"] is False and wire["uid"] == "u1" and wire["status"]["code"] == 422


def test_nothing_that_is_being_deleted_is_held_up() -> None:
    broken = job({"model": 3}, deletionTimestamp="2026-11-21T12:00:00Z")
    assert validate(request(broken, job(MINIMAL)), Rights()).errors == []
    assert validate(request(None, job(MINIMAL), operation="DELETE"), Rights()).errors == []
    assert mutate(request(None, job(MINIMAL), operation="DELETE")).patch == []


def test_labels_of_a_job_that_would_be_refused_today_may_change() -> None:
    broken = job({"model": 3})
    labelled = job({"model": 3}, labels={"a": "b"})
    assert validate(request(labelled, broken), Rights()).errors == []


def test_remote_code_needs_an_administrator() -> None:
    spec = merged(MINIMAL, model={"uri": "hf://org/model@1a2b3c4", "trustRemoteCode": True})
    assert "spec.model.trustRemoteCode" in validate(request(job(spec)), Rights()).errors[0]
    assert validate(request(job(spec)), Rights(remote_code=True)).errors == []


def test_a_bad_queue_is_refused() -> None:
    bad = {"metadata": {"name": "q"}, "spec": {"flavors": [{"name": "f", "nominalQuota": 1, "borrowingLimit": 1}]}}
    assert "borrowingLimit needs a cohort" in validate(request(bad, kind=QUEUE_KIND), Rights()).errors[0]
    assert validate(request({"spec": {"any": "thing"}}, kind="Pod"), Rights()).errors == [], "other kinds are nobody's business here"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tuning": {"hyperparameters": {"learningRate": 0.1, "globalBatchSize": 32}}}, "learningRate 0.1 is very high for method lora"),
        (
            {"tuning": {"method": "full", "hyperparameters": {"learningRate": 1e-9, "globalBatchSize": 32}}},
            "learningRate 1e-09 is very low for method full",
        ),
        ({"tuning": {"hyperparameters": {"epochs": 40, "globalBatchSize": 32}}}, "epochs 40: so many passes"),
        ({"dataset": {"train": {"uri": "hf://org/rows"}}, "evaluation": None}, "spec.dataset.eval is not set"),
        ({"evaluation": None}, "spec.evaluation is not set"),
        ({"evaluation": {"metrics": ["loss"]}}, "published even when it is worse"),
        (
            {"dataset": {**FULL["dataset"], "checks": {"minExamples": 5}}},
            "minExamples 5: below 50 examples, prompting or retrieval",
        ),
        ({"resources": {}}, "spec.resources.gpuMemory is not set"),
        ({"model": {"uri": "hf://org/model"}}, "names no revision"),
    ],
)
def test_what_is_legal_but_unwise_is_warned_of(change: dict[str, Any], words: str) -> None:
    spec = {k: v for k, v in merged(GOOD, **change).items() if v is not None}
    found = validate(request(job(spec)), Rights()).warnings
    assert any(words in warning for warning in found), found


def test_good_jobs_get_no_warning() -> None:
    assert advice(parse_spec(GOOD)) == []
    found = advice(parse_spec(yaml.safe_load((REPO / "examples" / "quickstart.yaml").read_text())["spec"]))
    assert found == [], "the first job of a new user"


def test_who_created_a_job_is_noted_and_stays() -> None:
    (patch,) = mutate(request(job())).patch
    assert patch == {"op": "add", "path": "/metadata/annotations", "value": {names.ANNOTATION_CREATED_BY: "ann"}}
    (patch,) = mutate(request(job(annotations={names.ANNOTATION_CREATED_BY: "bob", "x": "y"}))).patch
    assert patch == {"op": "add", "path": "/metadata/annotations/finetune.dev~1created-by", "value": "ann"}, "nobody is somebody else"
    stamped = job(annotations={names.ANNOTATION_CREATED_BY: "ann"})
    assert mutate(request(stamped, stamped)).patch == []
    (patch,) = mutate(request(job(annotations={"x": "y"}), stamped)).patch
    assert patch["value"] == "ann"
    (patch,) = mutate(request(stamped, job())).patch
    assert patch["op"] == "remove", "one from before the webhook belongs to nobody"


class Queues:
    """A queue for team-b alone."""

    def __init__(self) -> None:
        self.down = False

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        if self.down or name == "absent":
            raise APIError(404, "NotFound", name)
        if kind == "Namespace":
            return {"metadata": {"name": name, "labels": {"team": name}}}
        flavor = {"name": "f", "nominalQuota": 4}
        return {"metadata": {"name": name}, "spec": {"flavors": [flavor], "namespaceSelector": {"matchLabels": {"team": "team-b"}}}}


@pytest.fixture
async def endpoint() -> Any:
    app = web.Application()
    app.add_routes(AdmissionServer(Queues(), Settings(remote_code_namespaces=("team-b",))).routes())  # type: ignore[arg-type]
    async with TestClient(TestServer(app)) as client:
        yield client


async def ask(client: Any, path: str, asked: Any) -> dict[str, Any]:
    response = await client.post(path, json={"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": asked})
    assert response.status == 200
    return dict((await response.json())["response"])


async def test_a14_another_teams_queue_is_refused(endpoint: Any) -> None:
    wanted = job(merged(GOOD, scheduling={"queue": "theirs"}))
    refused = await ask(endpoint, VALIDATE, request(wanted))
    assert not refused["allowed"] and "queue theirs is not for namespace team-a" in refused["status"]["message"]
    assert (await ask(endpoint, VALIDATE, request(wanted, namespace="team-b")))["allowed"]
    assert (await ask(endpoint, VALIDATE, request(job(merged(GOOD, scheduling={"queue": "absent"})))))["allowed"], "it may come later"
    suspended = job(merged(GOOD, scheduling={"queue": "theirs"}, runPolicy={"suspend": True}))
    assert (await ask(endpoint, VALIDATE, request(suspended, wanted)))["allowed"], "who is there may still be stopped"


class Slow(Queues):
    """An API server that answers late, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.hangs: set[str] = {QUEUE_KIND, "Namespace"}
        self.asked: list[str] = []
        self.given_up: list[str] = []

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        self.asked.append(kind)
        try:
            await asyncio.sleep(30 if kind in self.hangs else 0.25)
        except asyncio.CancelledError:
            self.given_up.append(kind)
            raise
        return await super().get(kind, namespace, name)


@pytest.mark.parametrize("hangs", [{QUEUE_KIND, "Namespace"}, {QUEUE_KIND}, {"Namespace"}], ids=str)
async def test_all_look_ups_have_one_budget_and_who_cannot_be_asked_refuses_nothing(hangs: set[str], monkeypatch: Any) -> None:
    """The API server waits five seconds for an answer; look-ups of half a minute, four tries each, would refuse every job."""
    assert webhooks.BUDGET_SECONDS <= 3 and all(
        webhook["timeoutSeconds"] > webhooks.BUDGET_SECONDS + 1
        for document in rendered({})
        if document["kind"].endswith("WebhookConfiguration")
        for webhook in document["webhooks"]
    )
    monkeypatch.setattr(webhooks, "BUDGET_SECONDS", 0.4)
    server = Slow()
    server.hangs = hangs
    app = web.Application()
    app.add_routes(AdmissionServer(server, Settings()).routes())  # type: ignore[arg-type]
    async with TestClient(TestServer(app)) as client:
        began = time.monotonic()
        answer = await ask(client, VALIDATE, request(job(merged(GOOD, scheduling={"queue": "theirs"}))))
        assert time.monotonic() - began < 2
        assert answer["allowed"], "nothing is known against it"
        (warning,) = answer["warnings"]
        assert warning.startswith("spec.scheduling.queue: whether namespace team-a may use queue theirs was not looked up"), warning
        assert set(server.given_up) == hangs, "what nobody waits for is not asked any longer"
        server.hangs = set()
        refused = await ask(client, VALIDATE, request(job(merged(GOOD, scheduling={"queue": "theirs"}))))
        assert not refused["allowed"], "two look-ups of 0.25 s within 0.4 s: side by side"
        bad = await ask(client, VALIDATE, request(job(merged(MINIMAL, tuning={"method": "lorra"}))))
        assert not bad["allowed"], "what needs no look-up is refused"


async def test_a_refused_look_up_is_warned_of(monkeypatch: Any) -> None:
    class Forbidden(Queues):
        async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
            raise APIError(403, "Forbidden", "finetunequeues is forbidden")

    app = web.Application()
    app.add_routes(AdmissionServer(Forbidden(), Settings()).routes())  # type: ignore[arg-type]
    async with TestClient(TestServer(app)) as client:
        answer = await ask(client, VALIDATE, request(job(merged(GOOD, scheduling={"queue": "theirs"}))))
    assert answer["allowed"] and "finetunequeues is forbidden" in answer["warnings"][0]


async def test_the_patch_is_json_patch(endpoint: Any) -> None:
    answer = await ask(endpoint, MUTATE, request(job()))
    assert answer["allowed"] and answer["patchType"] == "JSONPatch"
    assert json.loads(base64.b64decode(answer["patch"]))[0]["value"] == {names.ANNOTATION_CREATED_BY: "ann"}


async def test_what_is_no_review_is_refused(endpoint: Any) -> None:
    for body in (b"{}", b"[]", b"no json", b'{"request": {"uid": 3}}', b"[" * 100_000):
        assert (await endpoint.post(VALIDATE, data=body)).status == 400
    assert (await endpoint.post(VALIDATE, data=b"x" * (BODY_LIMIT + 1))).status == 413


async def test_the_authority_is_put_where_it_differs_and_nothing_else_is_changed() -> None:
    written: list[dict[str, Any]] = []

    class Configurations:
        found: dict[str, Any] = {"metadata": {"name": "x"}, "webhooks": [{"name": "a", "clientConfig": {"service": {"name": "s"}}}]}

        async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
            if kind.startswith("Mutating"):
                raise APIError(404, "NotFound", "none")
            return json.loads(json.dumps(self.found))  # type: ignore[no-any-return]

        async def replace(self, manifest: dict[str, Any]) -> dict[str, Any]:
            written.append(manifest)
            self.found = manifest
            return manifest

    bundle = Bundle(Configurations(), "x")  # type: ignore[arg-type]
    await bundle.put("PEM")
    await bundle.put("PEM")
    assert len(written) == 1
    assert written[0]["webhooks"] == [
        {"name": "a", "clientConfig": {"service": {"name": "s"}, "caBundle": base64.b64encode(b"PEM").decode()}}
    ]
