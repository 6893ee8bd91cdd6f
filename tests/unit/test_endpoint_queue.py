"""What endpoints hold of a FineTuneQueue: counted with what jobs hold, waited for, never lost, and given up only when it is not wanted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from finetune_api import API_VERSION, names
from finetune_api.endpoint import ENDPOINT_KIND, FineTuneEndpointStatus
from finetune_api.lenient import read
from finetune_api.queue import ANNOTATION_QUEUE
from finetune_api.validation import parse_endpoint
from finetune_operator.cache.assumptions import Assumptions
from finetune_operator.cache.store import Store
from finetune_operator.controllers.admission import AdmissionLoop
from finetune_operator.model.endpoint import ObservedEndpoint, replica_pod
from finetune_operator.model.objects import Key
from finetune_operator.model.queueing import Decisions
from finetune_operator.reconcile.endpoint import reconcile
from finetune_operator.reconcile.plan import Apply
from finetune_operator.settings import Settings
from tests.factory import MINIMAL, NOW, job, merged, stamp
from tests.listing import InMemory

GPU = "nvidia.com/gpu"
SPEC: dict[str, Any] = {"base": {"uri": "pvc://models/tiny"}, "replicas": 2}
H100 = {"name": "h100", "nominalQuota": 4, "nodeLabels": {"gpu": "h100"}, "tolerations": [{"key": GPU, "operator": "Exists"}]}


class World(InMemory):
    """An API server with queues and one endpoint, the operator's memory of it, and the Deployment's controller."""

    def __init__(self, *queues: dict[str, Any], settings: Settings | None = None, namespace_queue: str = "default", **spec: Any) -> None:
        self.settings = settings or Settings()
        self.space = {"metadata": {"name": "team-a", "annotations": {ANNOTATION_QUEUE: namespace_queue}}}
        self.queues = {queue["metadata"]["name"]: queue for queue in queues}
        self.spec, self.status, self.version, self.generation = {**SPEC, **spec}, dict[str, Any](), 1, 1
        self.pods: list[str] = []
        self.deployment: dict[str, Any] = {}
        self.clock = NOW
        self.restart()

    def restart(self, *queues: dict[str, Any]) -> None:
        """Another operator, which knows what it is told; and queues that are other ones now."""
        self.queues |= {queue["metadata"]["name"]: queue for queue in queues}
        self.store, self.assumptions, self.woken = Store(), Assumptions(), list[Key]()
        self.loop = AdmissionLoop(
            self,  # type: ignore[arg-type]
            self.store,
            self.assumptions,
            self.settings,
            lambda key: None,
            wake_endpoint=self.woken.append,
        )
        for raw in (pod(name) for name in self.pods):
            self.store.put_child("Pod", raw)

    async def list(self, kind: str, *_: str) -> AsyncIterator[dict[str, Any]]:
        found = {"FineTuneQueue": list(self.queues.values()), "Namespace": [self.space]}
        for raw in found.get(kind, []):
            yield raw

    async def replace_status(self, raw: dict[str, Any], *, urgent: bool = True) -> dict[str, Any]:
        self.queues[raw["metadata"]["name"]] = raw
        return raw

    def now(self) -> datetime:
        return self.clock

    @property
    def raw(self) -> dict[str, Any]:
        meta = {"name": "chat", "namespace": "team-a", "uid": "uid-chat", "generation": self.generation, "finalizers": [names.FINALIZER]}
        meta |= {"creationTimestamp": stamp(NOW), "resourceVersion": str(self.version)}
        return {"apiVersion": API_VERSION, "kind": ENDPOINT_KIND, "metadata": meta, "spec": self.spec, "status": self.status}

    def edit(self, **spec: Any) -> None:
        self.spec, self.generation = {**self.spec, **spec}, self.generation + 1

    def runs(self, count: int) -> None:
        """So many pods."""
        while len(self.pods) < count:
            self.pods.append(f"chat-{len(self.pods)}")
            self.store.put_child("Pod", pod(self.pods[-1]))
        while len(self.pods) > count:
            self.store.drop_child("Pod", pod(self.pods.pop()))

    def own_pass(self) -> None:
        """The endpoint's: what it says goes on record, and the Deployment's controller does as it is told."""
        self.version += 1
        self.store.endpoints.put(self.raw)
        pods = [found for view in self.store.labelled_pods("uid-chat") if (found := replica_pod(view)) is not None]
        observed = ObservedEndpoint(
            endpoint=self.raw,
            spec=parse_endpoint(self.raw, strict=False),
            status=read(FineTuneEndpointStatus, self.status),
            pods=tuple(pods),
            room=self.loop.demands.room(self.raw, self.clock) if self.settings.counts_quota else None,
            identity="tls",
            now=self.clock,
        )
        plan = reconcile(observed, self.settings)
        for action in plan.actions:
            if isinstance(action, Apply) and action.manifest["kind"] == "Deployment":
                self.deployment = action.manifest["spec"]
                self.runs(self.deployment["replicas"])
        if plan.status is not None:
            self.status, self.version = plan.status.to_wire(), self.version + 1
            self.store.endpoints.put(self.raw)
            self.loop.demands.recorded(self.raw)

    async def goes(self, passes: int = 4) -> Decisions:
        for _ in range(passes):
            self.own_pass()
            decisions = await self.loop.once()
            self.clock += timedelta(seconds=1)
        self.own_pass()
        return decisions

    def waits(self, nodes: int = 1, **scheduling: str) -> str:
        """A job that waits for so many GPUs."""
        conditions = [{"type": "DataReady", "status": "True"}, {"type": "Admitted", "status": "False"}]
        status = {"observedGeneration": 1, "queue": {"since": stamp(NOW)}, "conditions": conditions}
        spec = merged(MINIMAL, distribution={"nodes": nodes, "gpusPerNode": 1}, scheduling=scheduling)
        self.store.put_job(job(spec, status, name="tune", uid="uid-tune"))
        return "uid-tune"

    @property
    def admission(self) -> dict[str, Any]:
        found: dict[str, Any] = self.status["admission"]
        return found

    def says(self) -> tuple[str, str, str]:
        said = next(c for c in self.status["conditions"] if c["type"] == "Admitted")
        return said["status"], said["reason"], said.get("message", "")


def pod(name: str) -> dict[str, Any]:
    meta = {"name": name, "namespace": "team-a", "uid": f"pod-{name}", "resourceVersion": "1", "creationTimestamp": stamp(NOW)}
    labels = {names.LABEL_OWNER_UID: "uid-chat"}
    owners = [{"kind": "ReplicaSet", "uid": "uid-set", "controller": True}]
    return {"metadata": {**meta, "labels": labels, "ownerReferences": owners}, "spec": {}, "status": {"phase": "Running"}}


def queue(quota: int = 4, name: str = "default", **spec: Any) -> dict[str, Any]:
    flavors = [{"name": "any", "nominalQuota": quota, "nodes": "Autoscaled"}]
    return {"metadata": {"name": name, "generation": 1}, "spec": {"flavors": flavors, **spec}}


async def test_replicas_start_when_their_queue_has_room_and_count_as_use_of_it() -> None:
    world = World(queue(flavors=[H100]))
    world.own_pass()
    assert not world.deployment, "nothing is started before its queue has been asked"
    await world.goes()
    assert (world.deployment["replicas"], world.says()[:2]) == (2, ("True", "Admitted"))
    assert world.says()[2] == "2 of 2 replicas with 2 nvidia.com/gpu (queue default, flavor h100)"
    template = world.deployment["template"]["spec"]
    assert template["nodeSelector"] == {"gpu": "h100"} and template["tolerations"] == [{"key": GPU, "operator": "Exists"}]

    tune = world.waits(4)
    found = await world.goes(1)
    assert found.jobs[tune].reason == "WaitingForQuota" and "endpoints hold 2 of h100" in found.jobs[tune].message
    world.restart()
    world.waits(4)
    await world.goes(1)
    status = world.queues["default"]["status"]
    assert (status["used"], status["serving"], status["admitted"], status["pending"]) == (2, 2, 1, 1)


async def test_what_has_no_room_waits_and_says_for_what() -> None:
    world = World(queue(3), replicas=2, gpusPerReplica=2)
    await world.goes()
    assert (world.deployment["replicas"], world.admission["replicas"]) == (1, 1), "those that have room start"
    assert world.says()[:2] == ("False", "WaitingForQuota")
    assert "1 of 2 replicas may run; queue default: waits for 1 of 2 nvidia.com/gpu: quota has 1 left of any" in world.says()[2]
    assert "queue default uses 2 of 3 any; endpoints hold 2 of any" in world.says()[2]
    world.restart(queue(4))
    await world.goes()
    assert (world.deployment["replicas"], world.says()[0]) == (2, "True") and ("team-a", "chat") in world.woken


async def test_without_room_for_one_it_is_not_ready_for_that_reason() -> None:
    world = World(queue(1), gpusPerReplica=2)
    await world.goes()
    ready = next(c for c in world.status["conditions"] if c["type"] == "Ready")
    assert ready["reason"] == "NeverAdmitted" and "can have 1 at most" in ready["message"] and not world.deployment
    other = World(queue(4, "other"))
    await other.goes()
    assert other.says()[1] == "QueueNotFound" and "this namespace may use: other" in other.says()[2]


async def test_a_restart_loses_nothing_and_gives_nothing_twice() -> None:
    world = World(queue(2, "research"), namespace_queue="research")
    await world.goes()
    world.restart()
    tune = world.waits()
    world.own_pass()
    assert world.says()[0] == "True" and world.deployment["replicas"] == 2, "what its queue is may not be known yet"
    found = await world.goes(1)
    assert found.jobs[tune].reason == "WaitingForQuota" and found.queues["research"].used == {"any": 2}
    assert world.deployment["replicas"] == 2


async def test_what_runs_without_a_record_goes_on_and_is_counted_room_or_no_room() -> None:
    """A status that was wiped; and the first queue of a cluster."""
    world = World()
    await world.goes()
    assert (world.deployment["replicas"], world.admission.get("queue")) == (2, None)
    world.restart(queue(flavors=[{**H100, "nominalQuota": 1}]))
    found = await world.goes()
    assert found.queues["default"].used == {"h100": 2}
    assert (world.admission["queue"], world.admission["flavor"], world.deployment["replicas"]) == ("default", "h100", 2)
    world.status, world.deployment = {}, {}
    world.restart()
    tune = world.waits()
    world.own_pass()
    assert not world.deployment and len(world.pods) == 2, "nothing is taken down for want of a record"
    found = await world.goes()
    assert found.jobs[tune].reason == "WaitingForQuota" and world.admission["replicas"] == world.deployment["replicas"] == 2


async def test_scaled_down_it_is_free_when_the_pods_have_ended() -> None:
    world = World(queue(4), replicas=4)
    await world.goes()
    world.edit(replicas=1)
    world.version += 1
    world.store.endpoints.put(world.raw)
    observed_pods = list(world.pods)
    world.runs(4)
    assert world.pods == observed_pods
    # its controller has not done it yet
    runs, world.runs = world.runs, lambda count: None  # type: ignore[method-assign]
    found = await world.goes(2)
    assert world.deployment["replicas"] == 1 and found.queues["default"].used == {"any": 4}
    world.runs = runs  # type: ignore[method-assign]
    world.runs(1)
    found = await world.goes(2)
    assert found.queues["default"].used == {"any": 1} and world.says()[0] == "True"
    world.edit(replicas=0)
    found = await world.goes(3)
    assert found.queues["default"].used == {} and world.deployment["replicas"] == 0


async def test_replicas_of_another_size_keep_what_they_have_and_wait_for_the_rest() -> None:
    world = World(queue(4), replicas=4)
    await world.goes()
    world.edit(gpusPerReplica=2)
    found = await world.goes()
    assert (world.admission["replicas"], world.admission["gpusPerReplica"], world.deployment["replicas"]) == (2, 2, 2)
    assert world.says()[1] == "WaitingForQuota" and found.queues["default"].used == {"any": 4}
    roomy = World(queue(8), replicas=4)
    await roomy.goes()
    seen = []
    roomy.edit(gpusPerReplica=2)
    for _ in range(6):
        await roomy.goes(1)
        seen.append(roomy.deployment["replicas"])
    assert set(seen) == {4} and roomy.admission["gpusPerReplica"] == 2, "none is taken away where there is room"


async def test_a_replica_that_runs_is_not_taken_down_for_a_larger_one_that_has_no_room() -> None:
    world = World(queue(2), replicas=1)
    await world.goes()
    world.edit(gpusPerReplica=2)
    await world.goes()
    assert world.says()[1] == "WaitingForQuota" and "1 run as they are meanwhile" in world.says()[2]
    assert (world.deployment["replicas"], world.admission["gpusPerReplica"]) == (1, 1)
    world.restart(queue(3))
    await world.goes()
    assert world.says()[0] == "True" and world.admission["gpusPerReplica"] == 2
    engine = world.deployment["template"]["spec"]["containers"][0]
    assert engine["resources"]["limits"][GPU] == "2" and world.deployment["replicas"] == 1


async def test_another_queue_is_waited_for_while_the_replicas_run_on() -> None:
    world = World(queue(2), queue(1, "serving"))
    await world.goes()
    world.edit(scheduling={"queue": "serving"})
    found = await world.goes()
    assert world.says()[:2] == ("False", "NeverAdmitted") and "2 run as they are meanwhile; queue serving" in world.says()[2]
    assert found.queues["default"].used == {"any": 2} and len(world.pods) == 2
    world.restart(queue(2, "serving"))
    found = await world.goes()
    assert (world.admission["queue"], world.says()[0]) == ("serving", "True")
    assert (found.queues["default"].used, found.queues["serving"].used) == ({}, {"any": 2})


@pytest.mark.parametrize(
    ("settings", "spec"),
    [
        (Settings(queueing_backend="kueue"), {"scheduling": {"queue": "gpus"}}),
        (Settings(queueing_backend="volcano"), {}),
        (Settings(queueing_backend="none"), {}),
        (Settings(allow_cpu=True), {"gpusPerReplica": 0}),
    ],
)
async def test_no_queue_of_ours_is_asked_for_others_nor_on_cpu(settings: Settings, spec: dict[str, Any]) -> None:
    world = World(queue(1), settings=settings, **spec)
    world.own_pass()
    assert world.deployment["replicas"] == 2 and "admission" not in world.status
    assert "Admitted" not in {c["type"] for c in world.status["conditions"]}
    if settings.counts_quota:
        assert (await world.goes(1)).queues["default"].used == {}


async def test_what_is_refused_for_another_reason_is_kept_no_room() -> None:
    world = World(queue(2))
    world.own_pass()
    assert world.says()[:2] == ("False", "Pending")
    world.spec = {**world.spec, "base": {"uri": "hf://a/b", "trustRemoteCode": True}}
    found = await world.goes(2)
    assert found.queues["default"].used == {} and "Admitted" not in {c["type"] for c in world.status["conditions"]}


async def test_one_that_is_deleted_wants_nothing_and_holds_what_it_held() -> None:
    world = World(queue(4))
    await world.goes()
    world.edit(replicas=4)
    raw = {**world.raw, "metadata": {**world.raw["metadata"], "deletionTimestamp": stamp(NOW), "resourceVersion": "99"}}
    world.store.endpoints.put(raw)
    found = await world.loop.once()
    assert found.queues["default"].used == {"any": 2} and found.queues["default"].pending == 0
    world.store.endpoints.drop(raw)
    assert (await world.loop.once()).queues["default"].used == {}


def test_a_replacement_beside_what_was_admitted_is_counted_too() -> None:
    world = World(queue(4))
    world.status = {"admission": {"queue": "default", "flavor": "any", "replicas": 2, "gpusPerReplica": 1, "resourceName": GPU}}
    world.runs(3)
    world.store.endpoints.put(world.raw)
    [held, *_] = world.loop.demands.workloads(NOW)
    assert held.allocation is not None and held.allocation.total == 3 and held.label == "endpoint team-a/chat"
