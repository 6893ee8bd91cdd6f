"""FineTuneEndpoints against a real API server: promoted, verified, canary, full; a mismatch; a roll-back; a deletion; another operator.

Pods are played; their replicas are HTTPS servers that take nobody's word but the operator's. FineTunedModels' statuses are written by
the test: an operator that takes no reports leaves them alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from finetune_api import API_VERSION, GROUP, VERSION, names
from finetune_api.endpoint import ENDPOINT_KIND, ENDPOINT_PLURAL
from finetune_api.queue import QUEUE_KIND, QUEUE_PLURAL
from finetune_api.tuned_model import MODEL_KIND, MODEL_PLURAL
from tests.cluster.shell import REPO
from tests.component.conftest import Api, Operator, until
from tests.component.replicas import Gateway, Replica, Replicas

STORAGE = "pvc://published/support"
SPEC: dict[str, Any] = {
    "base": {"uri": "pvc://models/tiny"},
    "models": [{"name": "support"}],
    "replicas": 2,
    "gpusPerReplica": 0,
    "rollout": {"steps": [10, 50], "interval": "1s", "minRequests": 50},
}


class Serving:
    """What the test's user sees."""

    def __init__(self, api: Api, replicas: Replicas, gateway: Gateway) -> None:
        self.api, self.replicas, self.gateway = api, replicas, gateway

    def create(self, kind: str, plural: str, name: str, spec: dict[str, Any]) -> None:
        body = {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}
        self.api.custom.create_namespaced_custom_object(GROUP, VERSION, self.api.namespace, plural, body)

    def champion(self, number: int, **version: Any) -> None:
        versions = [{"number": n, "job": "j", "digest": f"sha256:{n}", "rank": 8, **version} for n in (3, 2, 1)]
        status = {"champion": number, "versions": versions, "storage": {"uri": STORAGE, "highest": 3}}
        self.api.custom.patch_namespaced_custom_object_status(
            GROUP, VERSION, self.api.namespace, MODEL_PLURAL, "support", {"status": status}
        )

    @property
    def endpoint(self) -> dict[str, Any]:
        found: dict[str, Any] = self.api.custom.get_namespaced_custom_object(GROUP, VERSION, self.api.namespace, ENDPOINT_PLURAL, "chat")
        return found

    @property
    def model(self) -> dict[str, Any]:
        return next(iter(self.endpoint.get("status", {}).get("models", [])), {})

    def condition(self, type_: str) -> dict[str, Any]:
        return next((c for c in self.endpoint.get("status", {}).get("conditions", []) if c["type"] == type_), {})

    @property
    def both(self) -> list[Replica]:
        return self.replicas.all

    def starts(self) -> None:
        """Two replicas that answer as version 1."""
        self.create(MODEL_KIND, MODEL_PLURAL, "support", {"storage": STORAGE})
        self.create(ENDPOINT_KIND, ENDPOINT_PLURAL, "chat", SPEC)
        until("it says that there is no champion", lambda: self.condition("ModelsServed").get("reason") == "NoChampion")
        self.champion(1)
        until("verified on both", lambda: self.endpoint["status"].get("modelsVerified") == "1/1" and len(self.both) == 2)
        until("under its own name", lambda: all(replica.answers == {"support": "support@1"} for replica in self.both))


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    played = Gateway()
    yield played
    played.close()


@pytest.fixture
def serving(api: Api, gateway: Gateway, operator: Operator, tmp_path: Path) -> Iterator[Serving]:
    operator.ensure(
        {**operator.usual, "FINETUNE_ALLOW_CPU": "true", "FINETUNE_SERVING_GATEWAYS": gateway.address, "FINETUNE_SNAPSHOT_SECONDS": "0.5"}
    )
    gateway.api, replicas = api, Replicas(api, tmp_path)
    yield Serving(api, replicas, gateway)
    try:
        api.custom.delete_namespaced_custom_object(GROUP, VERSION, api.namespace, ENDPOINT_PLURAL, "chat")
    except client.ApiException:
        pass
    until("it is gone", lambda: not api.custom.list_namespaced_custom_object(GROUP, VERSION, api.namespace, ENDPOINT_PLURAL)["items"])
    replicas.close()


def test_from_promoted_to_served_by_everybody_and_back(serving: Serving, operator: Operator) -> None:
    serving.starts()
    meta, status = serving.endpoint["metadata"], serving.endpoint["status"]
    assert meta["finalizers"] == [names.FINALIZER] and status["readyReplicas"] == 2
    assert {pod["address"].rpartition(":")[0] for pod in status["pods"]} == {replica.address for replica in serving.both}

    serving.gateway.counts = lambda: ({"requests": 90}, {"requests": 10})
    serving.champion(2)
    until("a tenth", lambda: serving.model.get("canary", {}).get("percent") == 10)
    until("it says what it waits for", lambda: "10 of 50 requests" in serving.model["canary"].get("message", ""))
    assert all(replica.answers == {"support": "support@1"} for replica in serving.both)
    operator.kill()
    operator.start(**operator.running)
    serving.gateway.counts = lambda: ({"requests": 900}, {"requests": 100})
    until("a half, and all of it", lambda: serving.model["version"] == 2 and "canary" not in serving.model)
    until("under its own name", lambda: all(replica.answers == {"support": "support@2"} for replica in serving.both))
    assert serving.model["kept"] == [1] and {m.name for m in serving.both[0].order.models} == {"support@1", "support@2"}
    until("verified", lambda: serving.condition("Verified").get("status") == "True")

    began = time.monotonic()
    serving.champion(1)
    until("rolled back", lambda: all(replica.answers == {"support": "support@1"} for replica in serving.both))
    print(f"rolled back on both replicas in {time.monotonic() - began:.2f} s")
    until("each was told", lambda: [serving.api.events().count(reason) for reason in ("CanaryStep", "TookOver")] == [2, 3])


def test_a_new_champion_that_is_worse_or_not_itself_goes_back(serving: Serving) -> None:
    serving.starts()
    serving.both[1].states["support@2"] = "Mismatch"
    serving.champion(2)
    until("it went back", lambda: serving.condition("RolledBack").get("status") == "True")
    assert "Mismatch: as Mismatch as can be" in serving.condition("RolledBack")["message"]
    until("it is unloaded", lambda: all({m.name for m in r.order.models} == {"support@1"} for r in serving.both))
    assert serving.model["version"] == 1 and serving.model["verified"] == 2

    serving.gateway.counts = lambda: ({"requests": 900, "errors": 3}, {"requests": 100, "errors": 40})
    serving.champion(3)
    until("it went back, too", lambda: "40.0% of 100 requests failed" in serving.condition("RolledBack").get("message", ""))
    assert serving.model["version"] == 1 and serving.model["rolledBack"]["version"] == 3
    until("it is unloaded", lambda: all({m.name for m in r.order.models} == {"support@1"} for r in serving.both))


def test_scaled_restarted_and_deleted(serving: Serving) -> None:
    serving.starts()
    serving.api.custom.patch_namespaced_custom_object_scale(
        GROUP, VERSION, serving.api.namespace, ENDPOINT_PLURAL, "chat", {"spec": {"replicas": 3}}
    )
    until("three", lambda: serving.model.get("verified") == 3 and serving.endpoint["status"]["readyReplicas"] == 3)
    assert len(serving.both) == 3
    name, replica = next(iter(serving.replicas.by_pod.items()))
    replica.states["support@1"] = "Mismatch"
    replica.served.clear()
    serving.api.set_pod(name, Replicas.running(replica.address, restarts=1))
    until("one of three is something else now", lambda: serving.condition("Verified").get("reason") == "Mismatch")
    assert serving.model["mismatch"].startswith(f"{name}: Mismatch") and serving.model["verified"] == 2
    assert serving.model["version"] == 1, "the others go on"

    for one in serving.both:
        one.keeps = True
    serving.api.custom.delete_namespaced_custom_object(GROUP, VERSION, serving.api.namespace, ENDPOINT_PLURAL, "chat")
    until("told to unload", lambda: all(not one.order.models for one in serving.both))
    assert serving.endpoint["metadata"]["deletionTimestamp"]
    for one in serving.both:
        one.keeps = False

    def gone() -> bool:
        found = serving.api.custom.list_namespaced_custom_object(GROUP, VERSION, serving.api.namespace, ENDPOINT_PLURAL)
        return not found["items"]

    until("it is gone when nothing is loaded", gone)
    until("its pods, too", lambda: not serving.api.pods())


def test_replicas_wait_for_room_in_their_queue_which_outlives_the_operator(serving: Serving, operator: Operator) -> None:
    custom, name = serving.api.custom, f"q-{serving.api.namespace}"
    flavors = [{"name": "any", "nominalQuota": 1}]
    body = {"apiVersion": API_VERSION, "kind": QUEUE_KIND, "metadata": {"name": name}, "spec": {"flavors": flavors}}
    custom.create_cluster_custom_object(GROUP, VERSION, QUEUE_PLURAL, body)

    def used() -> tuple[Any, Any]:
        status = custom.get_cluster_custom_object(GROUP, VERSION, QUEUE_PLURAL, name).get("status", {})
        return status.get("used"), status.get("serving")

    try:
        spec = {"base": {"uri": "pvc://models/tiny"}, "replicas": 2, "scheduling": {"queue": name}}
        until("the queue is seen", lambda: used() == (0, 0))
        serving.create(ENDPOINT_KIND, ENDPOINT_PLURAL, "chat", spec)
        until("one of two answers", lambda: serving.endpoint.get("status", {}).get("readyReplicas") == 1)
        until("it says what the other waits for", lambda: serving.condition("Admitted").get("reason") == "WaitingForQuota")
        assert f"queue {name} uses 1 of 1 any" in serving.condition("Admitted")["message"]
        until("the queue says so, too", lambda: used() == (1, 1))

        operator.kill()
        operator.start(**operator.running)
        custom.patch_cluster_custom_object(GROUP, VERSION, QUEUE_PLURAL, name, {"spec": {"flavors": [{**flavors[0], "nominalQuota": 2}]}})
        until("both", lambda: serving.endpoint["status"]["readyReplicas"] == 2 and serving.condition("Admitted")["status"] == "True")
        custom.patch_namespaced_custom_object_scale(
            GROUP, VERSION, serving.api.namespace, ENDPOINT_PLURAL, "chat", {"spec": {"replicas": 0}}
        )
        until("given back", lambda: used() == (0, 0))
    finally:
        custom.delete_cluster_custom_object(GROUP, VERSION, QUEUE_PLURAL, name)


def test_a_whole_model_is_replaced_replica_by_replica_and_one_that_is_another_goes_back(serving: Serving) -> None:
    """The Deployment's controller is the real one; a pod is ready when its replica was found to serve its version."""
    spec = {"base": {"uri": "model://support"}, "replicas": 2, "gpusPerReplica": 0}
    for wrong in ({"models": [{"name": "support"}]}, {"engine": "external", "external": {"service": "vllm"}}):
        with pytest.raises(client.ApiException, match="remove it from models|set engine to vllm"):
            serving.create(ENDPOINT_KIND, ENDPOINT_PLURAL, "chat", {**spec, **wrong})
    serving.create(MODEL_KIND, MODEL_PLURAL, "support", {"storage": STORAGE})
    serving.create(ENDPOINT_KIND, ENDPOINT_PLURAL, "chat", spec)
    until("it waits for a champion", lambda: serving.condition("Ready").get("reason") == "NoChampion")
    serving.champion(1, form="Model")
    until("verified on both", lambda: serving.endpoint["status"].get("modelsVerified") == "1/1" and len(serving.both) == 2)
    first = set(serving.replicas.by_pod)
    assert serving.model["version"] == 1 and {replica.base.name for replica in serving.both if replica.base} == {"support@1"}

    serving.replicas.whole["support@2"] = "Mismatch"
    serving.champion(2, form="Model")
    until("another one goes back", lambda: serving.condition("RolledBack").get("status") == "True")
    until("its replica is gone", lambda: set(serving.replicas.by_pod) == first)
    assert serving.model["version"] == 1 and "support@2 went back" in serving.condition("RolledBack")["message"]

    serving.champion(3, form="Model")
    until("replaced", lambda: serving.model["version"] == 3 and serving.endpoint["status"].get("modelsVerified") == "1/1")
    assert not first & set(serving.replicas.by_pod) and {r.base.name for r in serving.both if r.base} == {"support@3"}
    assert serving.condition("RolledBack")["status"] == "False" and "canary" not in serving.model


def test_replicas_that_somebody_else_runs_are_those_behind_their_service(serving: Serving) -> None:
    """One pod of ours is their agent. There are no nodes here, so the test says in the controllers' place which addresses are ready."""
    api, space = serving.api, serving.api.namespace
    slices = client.DiscoveryV1Api(api.core.api_client)

    def behind(*ready: bool) -> dict[str, Any]:
        found = [{"addresses": [f"10.77.0.{number}"], "conditions": {"ready": is_ready}} for number, is_ready in enumerate(ready, 1)]
        labels = {"kubernetes.io/service-name": "vllm"}
        return {"metadata": {"name": "vllm-1", "labels": labels}, "addressType": "IPv4", "endpoints": found, "ports": [{"port": 8000}]}

    api.core.create_namespaced_service(space, {"metadata": {"name": "vllm"}, "spec": {"ports": [{"port": 80, "targetPort": 8000}]}})
    slices.create_namespaced_endpoint_slice(space, behind(True, True, False))
    serving.create(MODEL_KIND, MODEL_PLURAL, "support", {"storage": STORAGE})
    others = {**SPEC, "engine": "external", "external": {"service": "vllm", "adaptersPath": "/mnt"}}
    serving.create(ENDPOINT_KIND, ENDPOINT_PLURAL, "chat", others)
    until("it is looked at", lambda: serving.condition("ModelsServed"))
    serving.champion(1)
    until("verified on both", lambda: (serving.model.get("version"), serving.model.get("verified")) == (1, 2))
    assert [pod["address"] for pod in serving.endpoint["status"]["pods"]] == ["10.77.0.1:8000", "10.77.0.2:8000"]
    [agent] = serving.both
    until("by its name", lambda: agent.answers == {"support": "support@1"})
    assert agent.order.external is not None and agent.order.external.adapters_path == "/mnt"
    assert [s.metadata.name for s in api.core.list_namespaced_service(space).items] == ["vllm"]

    def look() -> None:  # sooner than it would
        body = {"metadata": {"labels": {"looked": str(time.monotonic_ns())}}}
        api.custom.patch_namespaced_custom_object(GROUP, VERSION, space, ENDPOINT_PLURAL, "chat", body)

    slices.replace_namespaced_endpoint_slice("vllm-1", space, behind(True, False, False))
    look()
    until("one is left", lambda: serving.model["replicas"] == 1 and len(serving.endpoint["status"]["pods"]) == 1)
    api.core.delete_namespaced_service("vllm", space)
    look()
    until("that is told", lambda: serving.condition("Ready").get("reason") == "ServiceNotFound")


def test_f23_an_operator_that_is_uninstalled_leaves_nothing_that_cannot_be_deleted(serving: Serving, operator: Operator) -> None:
    """As the chart's hook does it (templates/leaving.yaml), here while another one has the Lease for another moment."""
    serving.starts()
    operator.kill()
    space = serving.api.namespace
    leases = client.CoordinationV1Api(serving.api.core.api_client)
    held = {"holderIdentity": "the-operator", "leaseDurationSeconds": 3}
    leases.create_namespaced_lease(space, {"metadata": {"name": "acts"}, "spec": held})
    settings = {"FINETUNE_NAMESPACE": space, "FINETUNE_LEASE": "acts", "FINETUNE_WATCH_NAMESPACES": space, "FINETUNE_LEASE_SECONDS": "6"}
    env = {**os.environ, **settings, "PYTHONPATH": f"{REPO}/operator", "KUBECONFIG": str(serving.api.cluster.kubeconfig)}
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "finetune_operator", "leave"], env=env, check=True, timeout=60)
    assert time.monotonic() - began > 2, "nobody else acts any more"
    assert "finalizers" not in serving.endpoint["metadata"]
    serving.api.custom.delete_namespaced_custom_object(GROUP, VERSION, space, ENDPOINT_PLURAL, "chat")
    assert not serving.api.custom.list_namespaced_custom_object(GROUP, VERSION, space, ENDPOINT_PLURAL)["items"]
