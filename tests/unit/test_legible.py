"""One answer or object that cannot be read fails alone: the answer is asked for again, the object says so, all others go on."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import kopf
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio.client import ApiClient, Configuration
from prometheus_client import REGISTRY

from finetune_api import GROUP, KIND, PLURAL, VERSION, names
from finetune_api.lenient import read_status, rewritten
from finetune_operator import __main__ as main
from finetune_operator import handlers
from finetune_operator.cache.progress import ProgressBoard
from finetune_operator.cache.store import Store
from finetune_operator.cluster import transport
from finetune_operator.cluster.errors import APIError
from finetune_operator.cluster.kinds import StartOver
from finetune_operator.cluster.transport import KubernetesCluster
from finetune_operator.controllers import jobs as jobs_module
from finetune_operator.controllers.manager import Manager
from finetune_operator.model.legible import identified, legible_job
from finetune_operator.reconcile.job import reconcile
from finetune_operator.reconcile.job.immutability import may_have_changed
from finetune_operator.settings import Settings
from tests.factory import FULL, NOW, PLAN, UID, container_status, job, merged, stamp
from tests.listing import InMemory

WRONG: tuple[Any, ...] = (None, 3, -1.5, "text", [], {}, [3], ["text"], [[]], {"a": 3}, {"a": {"b": []}}, True)


def condition(type_: str, reason: str = "Yes") -> dict[str, Any]:
    return {"type": type_, "status": "True", "reason": reason, "message": "", "lastTransitionTime": stamp(NOW), "observedGeneration": 1}


STATUS: dict[str, Any] = {
    "phase": "Training",
    "observedGeneration": 1,
    "startedAt": stamp(NOW),
    "retryAfter": stamp(NOW),
    "attempt": 1,
    "totalGpus": 8,
    "conditions": [condition(t) for t in ("Accepted", "DataReady", "TargetsReady", "Admitted", "Running")],
    "restarts": [{"attempt": 0, "cause": "Hang", "reason": "Hang", "message": "", "time": stamp(NOW), "node": "node-1"}],
    "queue": {"name": "default", "position": 2, "message": "waits", "since": stamp(NOW)},
    "admission": {"queue": "default", "flavor": "any", "nodes": 2, "admittedAt": stamp(NOW), "topology": {"key": "rack", "value": "a"}},
    "gang": {"startedAt": stamp(NOW), "runningSince": stamp(NOW)},
    "progress": {"step": 3, "totalSteps": 10, "loss": 1.0, "reportedAt": stamp(NOW)},
    "checkpoint": {"step": 2, "savedAt": stamp(NOW)},
    "plan": PLAN,
    "usage": {"gpuSeconds": 5, "queuedSeconds": 1, "lostSeconds": 0},
    "stages": {"prepare": {"retries": 0, "startedAt": stamp(NOW)}},
    "artifacts": [{"uri": "pvc://published/support", "digest": "sha256:11", "bytes": 10}],
}
META = {"labels": {"a": "b"}, "annotations": {names.ANNOTATION_CREATED_BY: "ann"}, "ownerReferences": [{"uid": "u", "controller": True}]}


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*at, key)
        yield from paths(value[key], (*at, key))


def mangled(raw: dict[str, Any], *roots: str) -> Iterator[dict[str, Any]]:
    """The object with each of its parts replaced by each wrong value."""
    for path in paths(raw):
        if path[0] not in roots:
            continue
        for wrong in WRONG:
            changed = copy.deepcopy(raw)
            inner: Any = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = wrong
            yield changed


class Server(InMemory):
    """A queue with room for one job; takes every write."""

    async def list(self, kind: str, *_: str) -> Any:
        flavor = {"name": "any", "resourceName": "nvidia.com/gpu", "nominalQuota": 10**6, "nodes": "Autoscaled"}
        for raw in [{"metadata": {"name": "default", "uid": "q"}, "spec": {"flavors": [flavor]}}] if kind == "FineTuneQueue" else ():
            yield raw

    async def replace_status(self, raw: dict[str, Any], *, urgent: bool = True) -> dict[str, Any]:
        return raw

    def now(self) -> datetime:
        return NOW


async def test_a_job_of_any_shape_is_seen_decided_about_and_ranked() -> None:
    """Each part of a job's metadata, spec and status of each wrong type: nothing raises, and a good job beside them is admitted."""
    good = job(merged(FULL, scheduling={}), {"observedGeneration": 1, "conditions": [condition("DataReady")]}, name="good", uid="u-good")
    manager = Manager(Server(), Store(), ProgressBoard(), Settings())  # type: ignore[arg-type]
    store, count = manager.store, 0
    for raw in mangled(job(FULL, STATUS, name="bad", **META), "metadata", "spec", "status"):
        found = identified("FineTuneJob", raw)
        if found is None:
            continue
        count += 1
        if found["metadata"]["uid"] == UID:
            found["metadata"] |= {"uid": f"u-{count}", "name": f"bad-{count}"}
        manager.object_event("FineTuneJob", found, deleted=False)
        key = (found["metadata"]["namespace"], found["metadata"]["name"])
        observed = store.observe(key, NOW, None)
        assert observed is not None
        reconcile(observed, Settings())
        manager._jobs.rank(key)
        if may_have_changed(observed.job):  # its own pass finds out what it began with
            store.begun_with(found["metadata"]["uid"], None)
    assert count > 1000
    store.put_job(good)
    assert sum(store.phases().values()) == len(store.job_keys())
    decisions = await manager.admission.once()
    assert decisions.jobs["u-good"].action == "admit"


async def test_a_pod_of_any_shape_is_seen() -> None:
    owner = {"kind": "FineTuneJob", "uid": UID, "controller": True}
    labels = {names.LABEL_JOB_UID: UID, names.LABEL_STAGE: "train", names.LABEL_RANK: "0", names.LABEL_ATTEMPT: "1"}
    ended = {"terminated": {"exitCode": 1, "reason": "Error", "message": "words", "finishedAt": stamp(NOW)}}
    pod = {
        "metadata": {
            "name": "support-0",
            "namespace": "team-a",
            "uid": "p",
            "resourceVersion": "1",
            "labels": labels,
            "ownerReferences": [owner],
        },
        "spec": {"nodeName": "node-1", "priority": 5},
        "status": {
            "phase": "Failed",
            "conditions": [{"type": "PodScheduled", "status": "True"}],
            "containerStatuses": container_status(ended),
        },
    }
    child = {**copy.deepcopy(pod), "status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    count = 0
    for kind, raw in [("Pod", raw) for raw in mangled(pod, "metadata", "spec", "status")] + [
        ("Job", raw) for raw in mangled(child, "status")
    ]:
        store = Store()
        store.put_job(job(FULL, STATUS))
        if (found := identified(kind, raw)) is None:
            continue
        count += 1
        store.put_child(kind, found)
        observed = store.observe(("team-a", "support"), NOW, None)
        assert observed is not None
        reconcile(observed, Settings())
        store.gpu_pods(UID)
    assert count > 200


def test_one_condition_that_cannot_be_read_takes_no_other_with_it() -> None:
    """An end stays an end."""
    status = {"conditions": [{"type": "Wrong"}, 3, condition("Succeeded", "Completed")], "phase": "Succeeded", "progress": "much"}
    assert read_status(status).finished and read_status(status).phase == "Succeeded"
    store = Store()
    store.put_job(job(FULL, status))
    observed = store.observe(("team-a", "support"), NOW, None)
    assert observed is not None
    plan = reconcile(observed, Settings())
    assert plan.status is None and not plan.actions, "a terminal state is terminal"


def test_what_a_newer_release_wrote_stays_where_this_one_changes_nothing() -> None:
    """Two operators of different versions, one after the other; also where something else there cannot be read."""
    admission = {"nodes": 2, "admittedAt": stamp(NOW), "future": {"a": 1}}
    restart = {"attempt": 0, "reason": "PeerLost", "time": stamp(NOW), "counted": True, "future": 2}
    status = {"phase": "Training", "usage": {"gpuSeconds": 1, "future": 3}, "admission": admission, "restarts": [restart], "future": 4}
    for stored in (status, {**status, "checkpoint": "not an object"}):
        raw = legible_job(job(FULL, stored))
        before, after = read_status(raw["status"]), read_status(raw["status"])
        after.usage.gpu_seconds, after.attempt = 2, 1
        wire = rewritten(raw["status"], before, after)
        assert (wire["future"], wire["attempt"], wire["usage"]["gpuSeconds"]) == (4, 1, 2)
        assert wire["admission"] == {"attempt": 0, **admission} and wire["restarts"] == [restart]
        assert "future" not in wire["usage"], "what is said now is not what that was said of"


def unreadable(kind: str) -> float:
    return REGISTRY.get_sample_value("finetune_unreadable_objects_total", {"kind": kind}) or 0.0


@pytest.mark.parametrize(
    "broken", [b"", b'{"kind": "Pod", "metadata": {"na', b"<html>502</html>", b"[]", b'"text"', b'{"a": "\xff\xfe"}', b"[" * 5000]
)
async def test_a_broken_answer_is_asked_for_again(broken: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport.random, "random", lambda: -0.5)  # no back-off
    answers = [broken, b'{"kind": "Pod"}']

    async def serve(_: web.Request) -> web.Response:
        return web.Response(body=answers.pop(0) if len(answers) > 1 else answers[0], content_type="application/json")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", serve)
    async with TestServer(app) as server:
        cluster = KubernetesCluster(ApiClient(Configuration(host=str(server.make_url("")).rstrip("/"))))
        assert await cluster.get("Pod", "n", "p") == {"kind": "Pod"}
        answers[:] = [broken]
        with pytest.raises(APIError) as failure:
            await cluster.get("Pod", "n", "p")
        await cluster.close()
    assert failure.value.transient and failure.value.reason == "BrokenAnswer"


async def test_an_object_that_cannot_be_read_is_passed_by_in_a_list_and_in_a_watch() -> None:
    deep: Any = "bottom"
    for _ in range(300):
        deep = {"a": deep}
    items: list[Any] = [
        job(name="first", uid="u-1"),
        3,
        None,
        {},
        {"metadata": {"name": 5, "uid": []}},
        job(FULL, {"deep": deep}, name="last", uid="u-2"),
    ]

    async def serve(request: web.Request) -> web.Response:
        answer: Any = {"items": items if "FineTuneJob".lower() in request.path else [], "metadata": {}}
        if request.path.endswith("/pods"):
            answer = {"items": {"not": "a list"}}
        return web.json_response(answer)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", serve)
    before = unreadable("FineTuneJob")
    async with TestServer(app) as server:
        cluster = KubernetesCluster(ApiClient(Configuration(host=str(server.make_url("")).rstrip("/"))))
        assert [raw["metadata"]["name"] async for raw in cluster.list("FineTuneJob")] == ["first", "last"]
        with pytest.raises(APIError, match="items of type dict") as failure:
            _ = [raw async for raw in cluster.list("Pod")]
        assert failure.value.transient, "nothing is forgotten for it"
        await cluster.close()
    assert unreadable("FineTuneJob") == before + 4
    assert handlers._seen("FineTuneJob", {"type": "MODIFIED", "object": {"metadata": {"name": 5}}}) is None  # type: ignore[typeddict-item]
    assert unreadable("FineTuneJob") == before + 5


@pytest.mark.parametrize("line", [b'{"type": "ADDED", "object": {"metada', b'{"type": "ADDED"\xff}', b"<html>"])
async def test_a_watch_that_is_broken_off_starts_over_and_ends_no_process(line: bytes) -> None:
    """kopf itself, on a server whose watch brings half an object."""
    verbs = ["list", "watch", "get", "patch"]
    resources = {
        "/api/v1": [
            {"name": "namespaces", "kind": "Namespace", "namespaced": False},
            {"name": "events", "kind": "Event", "namespaced": True},
        ],
        f"/apis/{GROUP}/{VERSION}": [{"name": PLURAL, "kind": KIND, "namespaced": True}],
    }
    group = {"name": GROUP, "versions": [{"version": VERSION}], "preferredVersion": {"version": VERSION}}
    answers: dict[str, Any] = {"/api": {"versions": ["v1"]}, "/apis": {"groups": [group]}} | {
        path: {"resources": [{**found, "singularName": "", "verbs": verbs} for found in some]} for path, some in resources.items()
    }

    async def serve(request: web.Request) -> web.StreamResponse:
        if "watch" in request.query:
            return web.Response(body=line + b"\n")
        return web.json_response(answers.get(request.path, {"items": [], "metadata": {"resourceVersion": "1"}}))

    app = web.Application()
    app.router.add_get("/{path:.*}", serve)
    registry = kopf.OperatorRegistry()
    async with TestServer(app) as server:

        @kopf.on.login(registry=registry)
        async def login(**_: Any) -> kopf.ConnectionInfo:
            return kopf.ConnectionInfo(server=str(server.make_url("")).rstrip("/"))

        @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
        async def event(**_: Any) -> None: ...

        with pytest.raises(main._BROKEN_WATCH) as end:
            async with asyncio.timeout(20):
                await kopf.operator(registry=registry, settings=handlers.kopf_settings(), standalone=True, clusterwide=True)
    assert isinstance(main._ended("kopf", end.value), StartOver)
    assert not isinstance(main._ended("controller", end.value), StartOver), "what is broken here is no watch"


async def test_a_job_that_cannot_be_worked_on_says_so_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, dict[str, Any]] = {}

    class Takes(Server):
        async def replace_status(self, raw: dict[str, Any], *, urgent: bool = True) -> dict[str, Any]:
            written[raw["metadata"]["name"]] = raw["status"]
            meta = {**raw["metadata"], "resourceVersion": str(int(raw["metadata"]["resourceVersion"]) + 1)}
            return {**raw, "metadata": meta}

        async def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
            return {**manifest, "metadata": {**manifest["metadata"], "uid": manifest["metadata"].get("name", "e")}}

        apply = create

    def decide(observed: Any, settings: Settings) -> Any:
        if observed.job["metadata"]["name"] == "bad":
            raise TypeError("no such thing as [3]")
        return reconcile(observed, settings)

    monkeypatch.setattr(jobs_module, "reconcile", decide)
    manager = Manager(Takes(), Store(), ProgressBoard(), Settings(soon_seconds=0))  # type: ignore[arg-type]
    for name in ("bad", "good"):
        manager.object_event("FineTuneJob", job(name=name, uid=f"u-{name}"), deleted=False)
    for name in ("bad", "good", "bad"):
        await manager.jobs.process(("team-a", name))
    (told,) = [c for c in written["bad"]["conditions"] if c["type"] == "Accepted"]
    assert (told["status"], told["reason"]) == ("Unknown", "Unreadable") and "no such thing as [3]" in told["message"]
    assert json.dumps(written["good"]).count('"Valid"')
