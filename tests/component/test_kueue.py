"""Gangs and evaluations that the real Kueue decides about, beside a control plane without nodes. The test plays kubelet."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes import client

from finetune_api import names
from tests.cluster import kueue
from tests.cluster.local import LocalCluster
from tests.component.conftest import Api, Kubelet, Operator, control_plane, until
from tests.component.machines import GPU, Leaving, Machines, gpu_job
from tests.factory import merged

pytestmark = pytest.mark.operator(FINETUNE_QUEUEING_BACKEND="kueue")
QUEUES = ("localqueues", "clusterqueues", "resourceflavors")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A control plane of its own: Kueue's webhooks see every pod of it."""
    with control_plane("kueue") as target:
        kueue.start(target)
        machines = Machines(Api(target, "default").core, ["gpus"], {GPU: "64"})
        yield target
        machines.close()


class Kueue:
    """An administrator of Kueue, with a ClusterQueue of two GPUs and a LocalQueue `research` in the test's namespace."""

    def __init__(self, api: Api) -> None:
        self.api, self.name = api, f"cq-{uuid.uuid4().hex[:6]}"
        self.create("resourceflavors", kueue.flavor(self.name))
        self.create("clusterqueues", kueue.cluster_queue(self.name, self.name, {GPU: 2, "cpu": 16, "memory": "64Gi"}))
        self.create("localqueues", kueue.local_queue("research", api.namespace, self.name))

    def create(self, plural: str, body: dict[str, Any]) -> None:
        if "namespace" in body["metadata"]:
            self.api.custom.create_namespaced_custom_object(kueue.GROUP, kueue.VERSION, self.api.namespace, plural, body)
        else:
            self.api.custom.create_cluster_custom_object(kueue.GROUP, kueue.VERSION, plural, body)

    def stop(self, policy: str) -> None:
        body = {"spec": {"stopPolicy": policy}}
        self.api.custom.patch_cluster_custom_object(kueue.GROUP, kueue.VERSION, "clusterqueues", self.name, body)

    def delete_local_queue(self, name: str) -> None:
        self.api.custom.delete_namespaced_custom_object(kueue.GROUP, kueue.VERSION, self.api.namespace, "localqueues", name)

    def workloads(self) -> dict[str, dict[str, Any]]:
        found = self.api.custom.list_namespaced_custom_object(kueue.GROUP, kueue.VERSION, self.api.namespace, "workloads")["items"]
        return {raw["metadata"]["name"]: raw for raw in found}

    def patch_workload(self, name: str, spec: dict[str, Any]) -> None:
        self.api.custom.patch_namespaced_custom_object(kueue.GROUP, kueue.VERSION, self.api.namespace, "workloads", name, {"spec": spec})

    def close(self) -> None:
        for plural in ("clusterqueues", "resourceflavors"):
            with contextlib.suppress(client.ApiException):
                self.api.custom.delete_cluster_custom_object(kueue.GROUP, kueue.VERSION, plural, self.name)


@pytest.fixture
def admin(api: Api) -> Iterator[Kueue]:
    made = Kueue(api)
    yield made
    made.close()


def evaluated(nodes: int = 2, **scheduling: Any) -> dict[str, Any]:
    return merged(
        gpu_job("research", nodes, **scheduling),
        dataset={"train": {"uri": "configmap://rows/train.jsonl"}, "eval": {"splitFraction": 0.1}},
        evaluation={"gate": {"minImprovement": 0.1}},
    )


def phases(api: Api, *jobs: str) -> list[str]:
    return [str(api.status(name).get("phase")) for name in jobs]


def runs(pod: Any) -> bool:
    return bool(pod.metadata.labels[names.LABEL_STAGE] == "train" and pod.status.phase == "Running")


def admitted_at(workload: dict[str, Any]) -> str:
    found = [c["lastTransitionTime"] for c in workload["status"]["conditions"] if c["type"] == "QuotaReserved" and c["status"] == "True"]
    return next(iter(found), "9")


def release(kubelet: Kubelet, stage: str) -> None:
    kubelet.hold.discard(stage)


def test_a_gang_is_admitted_whole_and_the_next_waits_with_kueues_words(
    api: Api, kubelet: Kubelet, admin: Kueue, leaving: Leaving, operator: Operator
) -> None:
    kubelet.hold.add("train")
    api.create_job(gpu_job("research", nodes=2), "first")
    until("first trains", lambda: phases(api, "first") == ["Training"])
    status = api.status("first")
    assert (status["admission"]["queue"], status["admission"]["flavor"]) == (admin.name, admin.name)
    assert status["gang"]["startedAt"] >= status["admission"]["admittedAt"] and "queue" not in status
    api.create_job(gpu_job("research", nodes=2), "second")
    until("Kueue's words", lambda: "insufficient unused quota" in api.condition("Admitted", "second").get("message", ""))
    assert api.condition("Admitted", "second")["reason"] == "WaitsForKueue" and phases(api, "second") == ["Queued"]
    assert "gang" not in api.status("second")
    pods = [p for p in api.pods() if p.metadata.labels[names.LABEL_JOB] == "second" and p.metadata.labels[names.LABEL_STAGE] == "train"]
    assert len(pods) == 2 and all(p.spec.scheduling_gates and p.spec.node_name is None for p in pods), "none of it starts"
    release(kubelet, "train")
    until("both end", lambda: phases(api, "first", "second") == ["Succeeded", "Succeeded"], 60)
    assert not api.status("second").get("restarts")
    for name in ("first", "second"):
        api.delete_job(name)
    until("nothing of them is left, Workloads included", lambda: not api.owned() and not admin.workloads(), 60)


def test_f12_a_preemption_is_told_as_kueues_and_the_job_comes_back(
    api: Api, kubelet: Kubelet, admin: Kueue, leaving: Leaving, operator: Operator, priority: str
) -> None:
    kubelet.hold.add("train")
    api.create_job(gpu_job("research", nodes=2), "slow")
    until("slow trains", lambda: phases(api, "slow") == ["Training"])
    api.create_job(gpu_job("research", nodes=2, priorityClassName=priority), "urgent")
    until("urgent trains", lambda: phases(api, "urgent") == ["Training"], 60)
    until("slow waits again", lambda: phases(api, "slow") == ["Queued"] and len(api.status("slow").get("restarts", [])) == 1)
    restart = api.status("slow")["restarts"][0]
    assert (restart["cause"], restart["reason"], restart["counted"], restart["checkpointStep"]) == ("Disruption", "Preempted", False, 7)
    assert f"in favor of Workload {api.namespace}/urgent-attempt-0: Preempted to accommodate a workload" in restart["message"]
    assert "saved" in restart["message"] and api.status("slow")["usage"].get("lostSeconds", 0) == 0
    until("its new group waits", lambda: "insufficient" in api.condition("Admitted", "slow").get("message", ""))
    release(kubelet, "train")
    until("both end", lambda: phases(api, "slow", "urgent") == ["Succeeded", "Succeeded"], 60)
    assert len(api.status("slow")["restarts"]) == 1


def test_an_evaluation_is_admitted_before_what_came_after_its_training(
    api: Api, kubelet: Kubelet, admin: Kueue, leaving: Leaving, operator: Operator
) -> None:
    """The training ends without a word beforehand: what is freed may go to the next gang, but not to the one after it."""
    held = {"early", "late", "later"}
    kubelet.override = lambda pod: {"phase": "Running"} if pod.metadata.labels[names.LABEL_JOB] in held and runs(pod) else None
    api.create_job(evaluated(), "early")
    until("early trains", lambda: phases(api, "early") == ["Training"])
    place = until("its place", lambda: admin.workloads().get("early-evaluate-0"))
    assert place["spec"]["active"] is False and "admission" not in place.get("status", {}), "it holds nothing"
    for name in ("late", "later"):
        api.create_job(gpu_job("research", nodes=2), name)
        until(f"{name} waits", lambda n=name: "insufficient" in api.condition("Admitted", n).get("message", ""))
    held.remove("early")
    until("one of both is next", lambda: phases(api, "early") == ["Succeeded"] or phases(api, "late") == ["Training"], 60)
    held.remove("late")
    until("early has ended", lambda: phases(api, "early") == ["Succeeded"], 60)
    assert admin.workloads()["early-evaluate-0"]["metadata"]["uid"] == place["metadata"]["uid"], "admitted by its old place"
    admitted = {name: admitted_at(raw) for name, raw in admin.workloads().items()}
    assert admitted["early-evaluate-0"] <= admitted.get("later-attempt-0", "9")
    held.clear()
    until("all end", lambda: phases(api, "late", "later") == ["Succeeded"] * 2, 60)
    api.delete_job("early")
    until("nothing of it is left", lambda: not [w for w in admin.workloads() if w.startswith("early")], 60)


def test_queues_that_are_missing_or_stopped_say_what_to_do(
    api: Api, kubelet: Kubelet, admin: Kueue, leaving: Leaving, operator: Operator
) -> None:
    kubelet.hold.add("train")
    api.create_job(gpu_job("nowhere", nodes=1))
    until("it says so", lambda: "LocalQueue nowhere doesn't exist" in api.condition("Admitted").get("message", ""))
    condition = api.condition("Admitted")
    assert condition["reason"] == "Inadmissible" and "set scheduling.queue to one that is there" in condition["message"]
    admin.stop("Hold")
    api.patch_job({"spec": {"scheduling": {"queue": "research"}}})
    until("it has moved and says so", lambda: f"ClusterQueue {admin.name} is inactive" in api.condition("Admitted").get("message", ""))
    assert api.condition("Admitted")["reason"] == "Inadmissible" and "spec.stopPolicy" in api.condition("Admitted")["message"]
    admin.stop("None")
    until("it trains", lambda: phases(api, "support") == ["Training"])
    admin.stop("HoldAndDrain")
    until("it waits again", lambda: phases(api, "support") == ["Queued"] and len(api.status().get("restarts", [])) == 1)
    restart = api.status()["restarts"][0]
    assert restart["reason"] == "ClusterQueueStopped" and "The ClusterQueue is stopped" in restart["message"]
    admin.stop("None")
    until("it trains again", lambda: phases(api, "support") == ["Training"], 60)
    admin.delete_local_queue("research")
    release(kubelet, "train")
    until("what runs is left alone", lambda: phases(api, "support") == ["Succeeded"], 60)


def test_a_workload_that_is_made_inactive_stays_so_until_the_user_resumes(
    api: Api, kubelet: Kubelet, admin: Kueue, leaving: Leaving, operator: Operator
) -> None:
    kubelet.hold.add("train")
    admin.stop("Hold")
    api.create_job(gpu_job("research", nodes=2))
    until("it waits", lambda: "support-attempt-0" in admin.workloads())
    admin.patch_workload("support-attempt-0", {"active": False})
    until("it says so", lambda: api.condition("Admitted").get("reason") == "WorkloadInactive", 60)
    admin.patch_workload("support-attempt-0", {"active": True})
    admin.stop("None")
    until("it trains", lambda: phases(api, "support") == ["Training"], 60)
    admin.patch_workload("support-attempt-0", {"active": False})
    until("it has stopped", lambda: api.condition("Admitted").get("reason") == "Deactivated", 60)
    until("its pods are gone", lambda: not api.workers())
    assert phases(api, "support") == ["Queued"] and api.status()["restarts"][0]["reason"] == "Deactivated"
    api.patch_job({"spec": {"runPolicy": {"suspend": True}}})
    until("suspended", lambda: phases(api, "support") == ["Suspended"])
    api.patch_job({"spec": {"runPolicy": {"suspend": False}}})
    until("it trains again", lambda: phases(api, "support") == ["Training"], 60)
    api.delete_job()
    until("nothing of it is left", lambda: not api.owned() and not admin.workloads(), 60)


def test_a_job_that_waits_can_be_suspended_and_deleted(
    api: Api, kubelet: Kubelet, admin: Kueue, leaving: Leaving, operator: Operator
) -> None:
    """Kueue's finalizer is on pods that never ran, too."""
    admin.stop("Hold")
    api.create_job(evaluated())
    until("it waits", lambda: {"support-attempt-0", "support-evaluate-0"} <= set(admin.workloads()))
    api.patch_job({"spec": {"runPolicy": {"suspend": True}}})
    until("its pods are gone", lambda: not api.workers(), 60)
    api.patch_job({"spec": {"runPolicy": {"suspend": False}}})
    until("it waits again", lambda: "support-attempt-1" in admin.workloads() and len(api.workers()) == 2, 60)
    api.delete_job()
    until("nothing of it is left", lambda: not api.owned() and not admin.workloads(), 60)
