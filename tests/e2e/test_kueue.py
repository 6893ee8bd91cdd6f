"""Real pods of real gangs that the real Kueue admits, preempts and puts in order, with the chart's `queueing.backend: kueue`."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_api import names
from tests.cluster import helm, kueue
from tests.cluster.kind import KindCluster
from tests.cluster.local import LocalCluster
from tests.e2e.conftest import User
from tests.e2e.test_cluster import gang, manifest

GPU = "nvidia.com/gpu"
QUEUE = "research"


@pytest.fixture(scope="module", autouse=True)
def installed(cluster: LocalCluster | KindCluster) -> Iterator[None]:
    """Kueue, and the operator that hands its gangs over; the way it was afterwards."""
    kueue.install(cluster)
    helm.install(cluster.kubeconfig, {**helm.local_values(), "queueing": {"backend": "kueue"}})
    yield
    helm.install(cluster.kubeconfig)
    kueue.uninstall(cluster)


@pytest.fixture
def team(user: User) -> Iterator[User]:
    """A user whose namespace has a LocalQueue with two GPUs behind it."""
    name = f"gpus-{uuid.uuid4().hex[:6]}"
    quota = {GPU: 2, "cpu": 64, "memory": "256Gi"}
    user.apply(kueue.flavor(name), kueue.cluster_queue(name, name, quota), kueue.local_queue(QUEUE, user.namespace, name))
    yield user
    user.kubectl("delete", "finetunejobs", "--all", "--wait=true", "--timeout=60s")
    user.until("no Workload is left", lambda: not workloads(user), 60)
    user.kubectl("delete", "localqueue", QUEUE)
    user.kubectl("delete", "clusterqueue,resourceflavor", name)


def workloads(user: User) -> dict[str, dict[str, Any]]:
    found = json.loads(user.kubectl("get", "workloads.kueue.x-k8s.io", "-o", "json"))["items"]
    return {raw["metadata"]["name"]: raw for raw in found}


def queued_gang(name: str, steps: int, **scheduling: Any) -> dict[str, Any]:
    document = gang(name, steps, scheduling={"queue": QUEUE, **scheduling})
    del document["spec"]["evaluation"], document["spec"]["publish"]
    return document


def condition(user: User, name: str, type_: str) -> dict[str, Any]:
    return next((c for c in user.status(name).get("conditions", []) if c["type"] == type_), {})


def phase(user: User, name: str) -> str | None:
    return user.status(name).get("phase")


def admitted_at(workload: dict[str, Any]) -> str:
    return next(c["lastTransitionTime"] for c in workload["status"]["conditions"] if c["type"] == "QuotaReserved" and c["status"] == "True")


def test_a_gang_is_admitted_whole_and_its_evaluation_goes_before_the_next(team: User) -> None:
    """The second waits with Kueue's reason, and starts when what came before it has ended, the evaluation included."""
    first = gang("first", steps=300, scheduling={"queue": QUEUE})
    del first["spec"]["publish"]
    team.apply(first)
    team.until("first trains", lambda: phase(team, "first") == "Training", 240)
    team.apply(queued_gang("second", steps=20))
    team.until("second waits", lambda: "insufficient unused quota" in condition(team, "second", "Admitted").get("message", ""), 180)
    assert condition(team, "second", "Admitted")["reason"] == "WaitsForKueue" and phase(team, "second") == "Queued"
    waiting = [p for p in team.pods("second") if p["metadata"]["labels"][names.LABEL_STAGE] == "train"]
    assert len(waiting) == 2 and all(p["spec"].get("schedulingGates") and "nodeName" not in p["spec"] for p in waiting)
    status = team.ended("first", 600)
    assert status["phase"] == "Succeeded" and status["evaluation"]["gate"] == "Passed", team.story()
    found = workloads(team)
    assert found["first-evaluate-0"]["metadata"]["creationTimestamp"] <= found["second-attempt-0"]["metadata"]["creationTimestamp"]
    assert team.ended("second", 300)["phase"] == "Succeeded", team.story()
    assert admitted_at(found["first-evaluate-0"]) <= admitted_at(workloads(team)["second-attempt-0"])


def test_f12_kueue_preempts_and_the_job_goes_on_where_it_was(team: User) -> None:
    urgent = f"urgent-{uuid.uuid4().hex[:6]}"
    team.apply({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": urgent}, "value": 1000})
    try:
        team.apply(queued_gang("slow", steps=100_000))  # it does not end before it is preempted, however fast the machine is
        team.until("it has a checkpoint", lambda: (team.status("slow").get("checkpoint") or {}).get("step", 0) >= 20, 300)
        team.apply(queued_gang("urgent", steps=20, priorityClassName=urgent))
        team.until("it is preempted", lambda: team.status("slow").get("restarts"), 240)
        restart = team.status("slow")["restarts"][0]
        assert (restart["cause"], restart["reason"], restart["counted"]) == ("Disruption", "Preempted", False)
        assert f"in favor of Workload {team.namespace}/urgent-attempt-0: Preempted to accommodate" in restart["message"]
        assert restart["checkpointStep"] > 20 and f"step {restart['checkpointStep']}" in restart["message"], restart
        assert team.ended("urgent", 300)["phase"] == "Succeeded", team.story()
        saved = restart["checkpointStep"]
        goes_on = team.until("it goes on", lambda: (s := team.status("slow"))["attempt"] == 1 and s["progress"]["step"] > saved and s, 300)
        assert goes_on["usage"]["lostSeconds"] == 0 and goes_on["checkpoint"]["resumedFrom"] == saved, goes_on
    finally:
        team.kubectl("delete", "priorityclass", urgent)


def test_a_target_that_is_taken_is_said_before_any_gpu_is_asked_for(team: User) -> None:
    """A job that is made again under its name: the same one has its result already, another one may not replace it."""
    document = manifest("again")
    document["spec"]["scheduling"] = {"queue": QUEUE}
    team.apply(document)
    assert team.ended("again")["phase"] == "Succeeded", team.story()
    team.kubectl("delete", "finetunejob", "again", "--wait=true", "--timeout=60s")
    team.until("it is gone", lambda: not team.pods("again"), 60)
    document["spec"]["distribution"] = {"gpusPerNode": 1}
    team.apply(document)
    restored = team.ended("again")
    ended = next(c for c in restored["conditions"] if c["type"] == "Succeeded")
    assert (restored["phase"], ended["reason"]) == ("Succeeded", "Restored") and restored["artifacts"], team.story()
    team.kubectl("delete", "finetunejob", "again", "--wait=true", "--timeout=60s")
    document["spec"]["tuning"]["hyperparameters"]["seed"] = 7
    team.apply(document)
    status = team.ended("again")
    failed = next(c for c in status["conditions"] if c["type"] == "Failed")
    assert (status["phase"], failed["reason"]) == ("Failed", "TargetTaken") and "holds the result of job" in failed["message"]
    assert not workloads(team) and status.get("usage", {}).get("gpuSeconds", 0) == 0
