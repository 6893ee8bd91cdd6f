"""What queues need has no namespace: an operator of some namespaces sees it where it may, and gives nothing away where it may not."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import pytest

from finetune_operator.cache.assumptions import Assumptions
from finetune_operator.cache.store import Store
from finetune_operator.cluster.errors import APIError
from finetune_operator.cluster.kinds import Kinds
from finetune_operator.cluster.resources import RESOURCES, plural_of
from finetune_operator.controllers.admission import AdmissionLoop
from finetune_operator.model.job import Observed
from finetune_operator.model.queueing import Decision
from finetune_operator.reconcile.job import reconcile
from finetune_operator.settings import Settings, from_environment
from tests.factory import FULL, NOW, PLAN, job, merged, stamp
from tests.listing import InMemory

GPU = "nvidia.com/gpu"
SOME = ("team-a",)


class Server(InMemory):
    """One queue of 2 GPUs, one node with 2, a priority; some LISTs are refused."""

    def __init__(self, *forbidden: str) -> None:
        self.forbidden = set(forbidden)
        self.listed: list[tuple[str, str]] = []
        self.objects: dict[str, list[dict[str, Any]]] = {
            "FineTuneQueue": [
                {"metadata": {"name": "default"}, "spec": {"flavors": [{"name": "any", "resourceName": GPU, "nominalQuota": 2}]}}
            ],
            "Node": [
                {
                    "metadata": {"name": "node-1"},
                    "status": {
                        "allocatable": {GPU: "2", "cpu": "64", "memory": "1Ti"},
                        "conditions": [{"type": "Ready", "status": "True"}],
                    },
                }
            ],
            "Namespace": [{"metadata": {"name": "team-a"}}],
            "PriorityClass": [{"metadata": {"name": "urgent"}, "value": 100}],
        }

    async def list(self, kind: str, namespace: str = "", *_: str) -> AsyncIterator[dict[str, Any]]:
        self.listed.append((kind, namespace))
        if kind in self.forbidden or (kind == "Pod" and not namespace and "Pod" in self.forbidden):
            raise APIError(403, "Forbidden", f"{plural_of(kind)} is forbidden")
        for raw in self.objects.get(kind, []):
            yield raw

    async def plurals(self, group: str, version: str) -> set[str]:
        return {r.plural for r in RESOURCES.values() if (r.group, r.version) == (group, version)}

    async def replace_status(self, raw: dict[str, Any], *, urgent: bool = True) -> dict[str, Any]:
        return raw

    def now(self) -> datetime:
        return NOW


def true(type_: str) -> dict[str, Any]:
    return {"type": type_, "status": "True", "reason": "Yes", "message": "", "lastTransitionTime": stamp(NOW), "observedGeneration": 1}


def waiting(name: str, gpus: int, **scheduling: str) -> dict[str, Any]:
    spec = {**merged(FULL, distribution={"gpusPerNode": gpus, "nodes": 1}), "scheduling": scheduling}
    return job(spec, {"observedGeneration": 1, "plan": PLAN, "conditions": [true("DataReady"), true("TargetsReady")]}, name=name, uid=name)


async def decided(server: Server, *jobs: dict[str, Any], **settings: Any) -> dict[str, Decision]:
    store = Store()
    for raw in jobs:
        store.put_job(raw)
    return dict((await AdmissionLoop(server, store, Assumptions(), Settings(**settings), lambda _: None).once()).jobs)  # type: ignore[arg-type]


async def test_an_operator_of_some_namespaces_sees_queues_nodes_and_priorities() -> None:
    """Quota, what nodes have, and priorities count as they do for one of the whole cluster."""
    server = Server()
    found = await decided(
        server, waiting("first", 2), waiting("urgent", 2, priorityClassName="urgent"), waiting("huge", 4), watch_namespaces=SOME
    )
    assert {name: decision.action for name, decision in found.items()} == {"urgent": "admit", "first": "wait", "huge": "refuse"}
    assert found["first"].reason == "WaitingForQuota" and found["huge"].reason == "NoNodeFits"
    assert ("Pod", "team-a") in server.listed and ("Pod", "") not in server.listed, "of pods those of its namespaces"


@pytest.mark.parametrize("kind", ["FineTuneQueue", "Node", "Namespace", "PriorityClass"])
@pytest.mark.parametrize("spaces", [SOME, ()], ids=["some", "all"])
async def test_what_may_not_be_seen_is_not_given_away(kind: str, spaces: tuple[str, ...]) -> None:
    """Jobs wait, and the condition says which right is missing; what runs goes on. Where it may look again, they start."""
    server = Server(kind)
    if kind == "Namespace":
        server.objects["FineTuneQueue"][0]["spec"]["namespaceSelector"] = {"matchLabels": {"a": "b"}}
    runs = waiting("runs", 1)
    runs["status"] |= {"admission": {"queue": "default", "flavor": "any", "nodes": 1, "admittedAt": stamp(NOW)}}
    runs["status"]["conditions"].append(true("Admitted"))
    raw = waiting("waits", 1)
    found = await decided(server, raw, runs, watch_namespaces=spaces)
    assert (found["runs"].action, found["waits"].action, found["waits"].reason) == ("keep", "wait", "RightsMissing")
    assert f"may not list {plural_of(kind)}," in found["waits"].message and "rbac.queueing" in found["waits"].message
    status = reconcile(Observed(job=raw, now=NOW, decision=found["waits"]), Settings()).status
    condition = status.condition("Admitted") if status is not None else None
    assert condition is not None and (condition.status, condition.reason) == ("False", "RightsMissing")
    assert plural_of(kind) in condition.message
    server.forbidden.clear()
    if kind == "Namespace":
        del server.objects["FineTuneQueue"][0]["spec"]["namespaceSelector"]
    assert (await decided(server, raw, runs, watch_namespaces=spaces))["waits"].action == "admit"


async def test_backend_none_starts_everything_at_once_and_asks_nobody() -> None:
    """Said aloud, and only then: no queue, node or priority is looked at."""
    server = Server("FineTuneQueue", "Node", "Namespace", "PriorityClass", "Pod")
    runs = waiting("runs", 1)
    runs["status"] |= {"admission": {"nodes": 1, "admittedAt": stamp(NOW)}}
    runs["status"]["conditions"].append(true("Admitted"))
    jobs = [waiting("first", 2), waiting("huge", 8), waiting("named", 2, queue="research"), runs]
    found = await decided(server, *jobs, watch_namespaces=SOME, queueing_backend="none")
    assert {name: decision.action for name, decision in found.items()} == {
        "first": "admit",
        "huge": "admit",
        "named": "admit",
        "runs": "keep",
    }
    assert found["first"].reason == "NoQueue" and server.listed == []
    settings = from_environment({"FINETUNE_QUEUEING_BACKEND": "none"})
    assert settings.admits_itself and not Settings(queueing_backend="kueue").admits_itself


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({}, {"FineTuneJob", "FineTuneQueue"}),
        ({"watch_namespaces": SOME}, {"FineTuneJob", "FineTuneQueue"}),
        ({"watch_namespaces": SOME, "queueing_backend": "none"}, {"FineTuneJob"}),
        ({"queueing_backend": "none"}, {"FineTuneJob"}),
        ({"watch_namespaces": SOME, "queueing_backend": "kueue"}, {"FineTuneJob"}),
    ],
)
def test_kinds_that_the_operator_is_not_ready_without(settings: dict[str, Any], needed: set[str]) -> None:
    assert {resource.kind for resource in Kinds(Server(), Settings(**settings)).needed} == needed  # type: ignore[arg-type]


@pytest.mark.parametrize("forbidden", [("FineTuneQueue",), ("Node", "PriorityClass"), ("Pod",), ()])
async def test_the_log_names_the_rights_that_are_missing(forbidden: tuple[str, ...], caplog: Any) -> None:
    """All of them at once, when it first looks; and that it may look, once it does."""
    server = Server(*forbidden)
    loop = AdmissionLoop(server, Store(), Assumptions(), Settings(), lambda _: None)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "finetune.scheduler"):
        for _ in range(2):
            await loop.once()
        said = [record.getMessage() for record in caplog.records if record.name == "finetune.scheduler"]
        server.forbidden.clear()
        await loop.once()
    named = ", ".join(plural_of(kind) for kind in forbidden)
    assert len(said) == bool(forbidden), "said once"
    assert all(f"may not list {named}, and gives away nothing" in text and "queueing.backend none" in text for text in said)
    assert not forbidden or "may list all that queues need now" in caplog.text
