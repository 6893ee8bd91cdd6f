"""Gangs handed to Kueue and Volcano, on a real API server. The test plays both of them, by their conventions, and kubelet."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from finetune_api import names
from tests.cluster.local import LocalCluster
from tests.component.conftest import Api, Kubelet, Operator, until
from tests.component.test_queues import GPU, Leaving, gpu_job

WORKLOAD = ("kueue.x-k8s.io", "v1beta1", "workloads")
POD_GROUP = ("scheduling.volcano.sh", "v1beta1", "podgroups")


@pytest.fixture(scope="module", autouse=True)
def definitions(cluster: LocalCluster) -> None:
    cluster.define(Path(__file__).with_name("backends.yaml"))


class Gate:
    """Pods of gangs that are not let through stay Pending: what the scheduling gate, or Volcano's scheduler, does."""

    def __init__(self, kubelet: Kubelet) -> None:
        self.through: set[str] = set()
        kubelet.override = self._hold

    def _hold(self, pod: Any) -> dict[str, Any] | None:
        labels = pod.metadata.labels
        if labels.get(names.LABEL_STAGE) == "train" and labels[names.LABEL_ATTEMPT] not in self.through:
            return {"phase": "Pending"}
        return None


def conditions(*told: tuple[str, str, str]) -> list[dict[str, str]]:
    when = "2026-11-21T12:00:00Z"
    return [{"type": t, "status": s, "reason": "Told", "message": m, "lastTransitionTime": when} for t, s, m in told]


def workload(api: Api, name: str, queue: str) -> None:
    """What Kueue makes when a group is complete."""
    group, version, plural = WORKLOAD
    body = {"apiVersion": f"{group}/{version}", "kind": "Workload", "metadata": {"name": name}, "spec": {"queueName": queue}}
    api.custom.create_namespaced_custom_object(group, version, api.namespace, plural, body)


def say(api: Api, resource: tuple[str, str, str], name: str, status: dict[str, Any]) -> None:
    group, version, plural = resource
    api.custom.patch_namespaced_custom_object_status(group, version, api.namespace, plural, name, {"status": status})


def groups(api: Api) -> list[dict[str, Any]]:
    group, version, plural = POD_GROUP
    found: list[dict[str, Any]] = api.custom.list_namespaced_custom_object(group, version, api.namespace, plural)["items"]
    return found


def test_kueue_decides_when_a_gang_starts(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    """Waiting is told in its words; when it takes the pods away, the next attempt waits as a group of its own."""
    operator.kill()
    operator.start(FINETUNE_QUEUEING_BACKEND="kueue")
    gate, leaving = Gate(kubelet), Leaving(api)
    kubelet.hold.add("train")
    try:
        api.create_job(gpu_job("research", nodes=2))
        until("the gang's pods", lambda: len(api.workers()) == 2)
        pods = [p for p in api.pods() if p.metadata.labels[names.LABEL_STAGE] == "train"]
        assert {p.metadata.labels["kueue.x-k8s.io/pod-group-name"] for p in pods} == {"support-attempt-0"}
        until("no Workload yet", lambda: "LocalQueue research" in api.status().get("queue", {}).get("message", ""))
        workload(api, "support-attempt-0", "research")
        say(api, WORKLOAD, "support-attempt-0", {"conditions": conditions(("QuotaReserved", "False", "insufficient quota for h100"))})
        until("Kueue's words", lambda: api.status().get("queue", {}).get("message") == "insufficient quota for h100")
        status = api.status()
        assert status["phase"] == "Queued" and api.condition("Admitted")["reason"] == "WaitsForKueue"
        assert "gang" not in status and status["queue"]["name"] == "research"

        admission = {"clusterQueue": "gpus", "podSetAssignments": [{"name": "main", "count": 2, "flavors": {GPU: "h100"}}]}
        say(api, WORKLOAD, "support-attempt-0", {"admission": admission, "conditions": conditions(("Admitted", "True", "admitted"))})
        gate.through.add("0")
        until("training", lambda: api.status().get("phase") == "Training")
        status = api.status()
        assert (status["admission"]["queue"], status["admission"]["flavour"]) == ("gpus", "h100")
        assert status["gang"]["startedAt"] >= status["admission"]["admittedAt"] and "queue" not in status

        for name, _ in api.workers():  # preempted: Kueue deletes the pods
            with contextlib.suppress(client.ApiException):
                api.core.delete_namespaced_pod(name, api.namespace)
        until("the next group", lambda: [a for _, a in api.workers()] == ["1", "1"])
        until("it waits again", lambda: api.status().get("phase") == "Queued" and api.condition("Admitted").get("status") == "False")
        workload(api, "support-attempt-1", "research")
        say(api, WORKLOAD, "support-attempt-1", {"admission": admission, "conditions": conditions(("Admitted", "True", "admitted"))})
        kubelet.hold.clear()
        gate.through.add("1")
        until("success", lambda: api.status().get("phase") == "Succeeded", 60)
        final = api.status()
        assert len(final["restarts"]) == 1
        assert final["restarts"][0]["cause"] == "Disruption" and not final["restarts"][0]["counted"]
    finally:
        leaving.end()


def test_volcano_decides_when_a_gang_starts(api: Api, kubelet: Kubelet, operator: Operator) -> None:
    """Its PodGroup is made for the whole gang, and goes with its pods; the operator may be killed while it waits."""
    operator.kill()
    operator.start(FINETUNE_QUEUEING_BACKEND="volcano")
    gate = Gate(kubelet)
    api.create_job(gpu_job("research", nodes=2, gpus=2))
    made = until("the PodGroup", lambda: groups(api))[0]
    assert made["spec"] == {"minMember": 2, "queue": "research", "minResources": {GPU: "4"}}
    first = next(p for p in api.pods() if p.metadata.name == "support-worker-0")
    assert made["metadata"]["ownerReferences"][0]["uid"] == first.metadata.uid
    told = conditions(("Unschedulable", "True", "2/2 tasks in gang unschedulable"))
    say(api, POD_GROUP, made["metadata"]["name"], {"phase": "Pending", "conditions": told})
    until("Volcano's words", lambda: api.status().get("queue", {}).get("message") == "2/2 tasks in gang unschedulable", 60)
    operator.kill()
    operator.start(FINETUNE_QUEUEING_BACKEND="volcano")
    assert api.status()["phase"] == "Queued"
    gate.through.add("0")
    for name, _ in api.workers():
        Leaving.bind_to(api, name)
    until("success", lambda: api.status().get("phase") == "Succeeded", 60)
    assert api.condition("Admitted")["message"] == "its pods were let through"
    assert len(groups(api)) == 1, "one group an attempt"
    # suspended while it waits, nothing reserves a place
    api.create_job(gpu_job("research", nodes=1), "later")
    until("its group", lambda: len(groups(api)) == 2)
    api.patch_job({"spec": {"runPolicy": {"suspend": True}}}, "later")
    until("its group is gone", lambda: len(groups(api)) == 1, 60)
