"""FineTuneQueue on a real API server: turns, explanations, giving way, nodes. The test plays kubelet."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from finetune_api import GROUP, VERSION
from finetune_api.queue import QUEUE_KIND, QUEUE_PLURAL
from tests.cluster.local import LocalCluster
from tests.component.cli import finetune
from tests.component.conftest import Api, Kubelet, Operator, until
from tests.component.machines import GPU, Leaving, Machines, gpu_job

SCARCE = "example.com/scarce-gpu"
"""Of GPU there are many, for what quotas decide; of this one as many as a test says"""
pytestmark = pytest.mark.operator(FINETUNE_SNAPSHOT_SECONDS="0.5", FINETUNE_SEAL_KEY="of every start")
MakeQueue = Callable[..., str]


@pytest.fixture(scope="module", autouse=True)
def plenty(cluster: LocalCluster) -> Iterator[None]:
    """A node with more GPUs than all queues give away: an operator of the whole cluster starts nothing that fits nowhere."""
    made = Machines(Api(cluster, "default").core, ["plenty"], {GPU: "64"})
    yield
    made.close()


@pytest.fixture
def make_queue(api: Api) -> Iterator[MakeQueue]:
    """FineTuneQueues of this test; they are cluster-scoped."""
    made: list[str] = []

    def make(quota: int, **spec: Any) -> str:
        name = f"q-{uuid.uuid4().hex[:6]}"
        flavor = {"name": "any", "resourceName": GPU, "nominalQuota": quota, **spec.pop("flavor", {})}
        selector = {"matchLabels": {"kubernetes.io/metadata.name": api.namespace}} if spec.pop("ours", False) else None
        body = {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": QUEUE_KIND,
            "metadata": {"name": name},
            "spec": {"flavors": [flavor], **({"namespaceSelector": selector} if selector else {}), **spec},
        }
        api.custom.create_cluster_custom_object(GROUP, VERSION, QUEUE_PLURAL, body)
        made.append(name)
        return name

    yield make
    for name in made:
        with contextlib.suppress(client.ApiException):
            api.custom.delete_cluster_custom_object(GROUP, VERSION, QUEUE_PLURAL, name)


def set_quota(api: Api, queue: str, quota: int) -> None:
    flavors = [{"name": "any", "resourceName": GPU, "nominalQuota": quota}]
    api.custom.patch_cluster_custom_object(GROUP, VERSION, QUEUE_PLURAL, queue, {"spec": {"flavors": flavors}})


def queue_status(api: Api, name: str) -> dict[str, Any]:
    found: dict[str, Any] = api.custom.get_cluster_custom_object(GROUP, VERSION, QUEUE_PLURAL, name)
    return dict(found.get("status") or {})


def phase_of(api: Api, name: str) -> str:
    return str(api.status(name).get("phase"))


def test_jobs_wait_for_their_turn_and_say_what_for(api: Api, kubelet: Kubelet, operator: Operator, make_queue: MakeQueue) -> None:
    queue = make_queue(6)
    kubelet.hold = {"train"}
    api.create_job(gpu_job(queue, nodes=2, gpus=2), name="first")
    until("first trains", lambda: phase_of(api, "first") == "Training")
    api.create_job(gpu_job(queue, gpus=4), name="second")
    until("second waits", lambda: phase_of(api, "second") == "Queued" and api.condition("Admitted", "second"))
    told = api.condition("Admitted", "second")
    assert (told["status"], told["reason"]) == ("False", "WaitingForQuota") and "waits for 2 of 4 example.com/gpu" in told["message"]
    place = api.status("second")["queue"]
    assert (place["name"], place["position"]) == (queue, 1) and place["message"].startswith(f"position 1 in queue {queue}")
    assert not [name for name, _ in api.workers() if name.startswith("second")], "no pod before its turn"
    until("the queue's status", lambda: queue_status(api, queue).get("pending") == 1, 20)
    status = queue_status(api, queue)
    assert (status["used"], status["nominal"], status["admitted"]) == (4, 6, 1)
    assert status["oldestWaiting"]["job"] == f"{api.namespace}/second"
    table = api.cluster.kubectl("get", "ftq", queue).splitlines()
    assert table[0].split()[:7] == ["NAME", "COHORT", "USED", "QUOTA", "BORROWED", "SERVING", "ADMITTED"]
    kubelet.hold = set()
    until("both end", lambda: phase_of(api, "first") == phase_of(api, "second") == "Succeeded")
    usage = api.status("second")["usage"]
    assert usage["queuedSeconds"] >= 1
    assert api.status("second")["admission"]["queue"] == queue
    until("all is free", lambda: (queue_status(api, queue).get("used"), queue_status(api, queue).get("pending")) == (0, 0), 30)


def test_f12_urgent_work_displaces_and_the_displaced_goes_on_from_its_checkpoint(
    api: Api, kubelet: Kubelet, leaving: Leaving, operator: Operator, make_queue: MakeQueue, priority: str
) -> None:
    queue = make_queue(2, preemption={"minimumRunTime": "1s"})
    kubelet.hold = {"train"}
    api.create_job(gpu_job(queue, nodes=2), name="long")
    until("long trains", lambda: phase_of(api, "long") == "Training")

    until("its pods have nodes", lambda: all(p.spec.node_name for p in api.pods() if p.status.phase == "Running"))
    api.create_job(gpu_job(queue, priorityClassName=priority), name="urgent")
    until("long gave way", lambda: phase_of(api, "long") == "Queued")
    until("urgent trains", lambda: phase_of(api, "urgent") == "Training")
    until("the checkpoint is known", lambda: api.status("long").get("checkpoint"))
    status = api.status("long")
    assert status["restarts"][0]["reason"] == "Preempted" and status["restarts"][0]["counted"] is False
    assert "gives way to" in status["restarts"][0]["message"] and status["checkpoint"]["step"] == 7
    assert status["usage"]["lostSeconds"] == 0
    assert api.condition("Admitted", "long")["status"] == "False"
    kubelet.hold = set()
    until("both end", lambda: phase_of(api, "long") == phase_of(api, "urgent") == "Succeeded")
    assert api.status("long")["attempt"] == 1 and api.status("long")["restartsCounted"] == 0


@pytest.mark.parametrize("restarted", [False, True])
def test_f22_what_a_deleted_job_holds_is_free_when_its_pods_have_ended(
    api: Api, kubelet: Kubelet, leaving: Leaving, operator: Operator, make_queue: MakeQueue, restarted: bool
) -> None:
    """Also by an operator that did not run when it was deleted."""
    queue = make_queue(2)
    kubelet.hold = {"train"}
    api.create_job(gpu_job(queue, nodes=2), name="first")
    until("first trains", lambda: phase_of(api, "first") == "Training")
    until("its pods have nodes", lambda: all(p.spec.node_name for p in api.pods() if p.status.phase == "Running"))
    api.create_job(gpu_job(queue, nodes=2), name="second")
    until("second waits", lambda: api.condition("Admitted", "second").get("reason") == "WaitingForQuota")
    leaving.saving = True
    if restarted:
        operator.kill()
    api.delete_job("first")
    workers = [name for name, _ in api.workers()]
    until("its pods are told to end", lambda: all(p.metadata.deletion_timestamp for p in api.pods() if p.metadata.name in workers))
    with pytest.raises(client.ApiException, match="404"):
        api.job("first")
    if restarted:
        operator.start()
    with pytest.raises(AssertionError):
        until("second starts too soon", lambda: phase_of(api, "second") != "Queued", 6)
    assert queue_status(api, queue)["used"] == 2 and [name for name, _ in api.workers()] == workers
    leaving.saving = False
    until("second trains", lambda: phase_of(api, "second") == "Training")


def test_a14_another_teams_queue(api: Api, operator: Operator, kubelet: Kubelet, make_queue: MakeQueue) -> None:
    closed = make_queue(8, namespaceSelector={"matchLabels": {"team": "somebody-else"}})
    api.create_job(gpu_job(closed))
    until("it waits", lambda: api.condition("Admitted").get("reason") == "QueueNotAllowed")
    assert f"namespace {api.namespace} may not use queue {closed}" in api.condition("Admitted")["message"]
    api.patch_job({"spec": {"scheduling": {"queue": "nowhere"}}})
    until("it says so", lambda: api.condition("Admitted").get("reason") == "QueueNotFound")
    open_ = make_queue(8)
    api.patch_job({"spec": {"scheduling": {"queue": open_}}})
    until("it ends", lambda: phase_of(api, "support") == "Succeeded")


def test_a_namespaces_default_queue(api: Api, operator: Operator, kubelet: Kubelet, make_queue: MakeQueue) -> None:
    queue = make_queue(8)
    api.core.patch_namespace(api.namespace, {"metadata": {"annotations": {"finetune.dev/queue": queue}}})
    api.create_job(gpu_job(None))
    until("it ends", lambda: phase_of(api, "support") == "Succeeded")
    assert api.status()["admission"]["queue"] == queue


def test_suspended_jobs_hold_nothing(api: Api, operator: Operator, kubelet: Kubelet, leaving: Leaving, make_queue: MakeQueue) -> None:
    queue = make_queue(1)
    kubelet.hold = {"train"}
    api.create_job(gpu_job(queue), name="first")
    until("first trains", lambda: phase_of(api, "first") == "Training")
    api.create_job(gpu_job(queue), name="second")
    until("second waits", lambda: api.condition("Admitted", "second").get("reason") == "WaitingForQuota")
    api.patch_job({"spec": {"runPolicy": {"suspend": True}}}, name="first")
    until("second trains", lambda: phase_of(api, "second") == "Training")
    assert api.condition("Admitted", "first")["reason"] == "Suspended"
    api.patch_job({"spec": {"runPolicy": {"suspend": False}}}, name="first")
    until("first waits", lambda: phase_of(api, "first") == "Queued")
    kubelet.hold = set()
    until("both end", lambda: phase_of(api, "first") == phase_of(api, "second") == "Succeeded")


def test_the_operator_dies_between_deciding_and_writing(api: Api, operator: Operator, kubelet: Kubelet, make_queue: MakeQueue) -> None:
    """Quota is never given twice, however often the operator starts anew."""
    queue = make_queue(2)
    for n in range(6):
        api.create_job(gpu_job(queue), name=f"job-{n}")
    most = 0

    def over() -> bool:
        nonlocal most
        live = [
            p for p in api.pods() if p.metadata.labels.get("finetune.dev/stage") == "train" and p.status.phase in ("Pending", "Running")
        ]
        most = max(most, len(live))
        return all(phase_of(api, f"job-{n}") == "Succeeded" for n in range(6))

    for _ in range(4):
        with contextlib.suppress(AssertionError):
            until("a while", over, 2.0)
        operator.kill()
        operator.start()
    until("all end", over, 90)
    assert most <= 2, "never more than the quota"


@pytest.fixture
def machines(api: Api) -> Iterator[None]:
    """Two nodes with 4 scarce GPUs each."""
    made = Machines(api.core, [f"{api.namespace}-{n}" for n in range(2)], {SCARCE: "4"})
    yield
    made.close()


def test_f16_nodes_decide_without_any_queue(api: Api, kubelet: Kubelet, operator: Operator, machines: None) -> None:
    """Gangs wait until they fit as a whole, and what never fits is refused at once."""
    api.create_job(gpu_job(None, nodes=2, gpus=8, resource=SCARCE), name="never")
    until("refused", lambda: phase_of(api, "never") == "Failed")
    failed = api.condition("Failed", "never")
    assert failed["reason"] == "NoNodeFits" and "distribution.gpusPerNode 4 with distribution.nodes 4" in failed["message"]
    kubelet.hold = {"train"}
    api.create_job(gpu_job(None, nodes=2, gpus=2, resource=SCARCE), name="first")
    until("first trains", lambda: phase_of(api, "first") == "Training")
    api.create_job(gpu_job(None, nodes=2, gpus=4, resource=SCARCE), name="second")
    until("second waits", lambda: api.condition("Admitted", "second").get("reason") == "WaitingForNodes")
    assert "waits for 4 of 8 example.com/scarce-gpu: 4 are free" in api.condition("Admitted", "second")["message"]
    api.create_job(gpu_job(None, gpus=1, resource=SCARCE), name="third")
    until("third passes it", lambda: phase_of(api, "third") == "Training")
    kubelet.hold = set()
    until("all end", lambda: all(phase_of(api, name) == "Succeeded" for name in ("first", "second", "third")))


def test_f20_an_elastic_gang_starts_small_and_grows_at_a_checkpoint(
    api: Api, kubelet: Kubelet, leaving: Leaving, operator: Operator, make_queue: MakeQueue
) -> None:
    """By an operator of some namespaces, which sees quotas, nodes, and of pods those of its own."""
    operator.kill()
    operator.start(FINETUNE_WATCH_NAMESPACES=api.namespace)
    queue = make_queue(1, preemption={"minimumRunTime": "1s"})
    kubelet.hold = {"train"}
    api.create_job(gpu_job(queue, nodes=2, min_nodes=1))
    until("it trains", lambda: phase_of(api, "support") == "Training")
    status = api.status()
    assert (status["admission"]["nodes"], status["totalGpus"], len(api.workers())) == (1, 1, 1)
    assert "1 of 2 worker pods" in api.condition("Admitted")["message"]
    before = status["plan"]
    until("its pod has a node", lambda: all(p.spec.node_name for p in api.pods() if p.status.phase == "Running"))
    set_quota(api, queue, 2)
    # an idle operator looks at quotas once a minute; another job's coming makes it look at once
    api.create_job(gpu_job(queue, gpus=4), name="never")
    until("it grows", lambda: len(api.workers()) == 2 and phase_of(api, "support") == "Training", 90)
    status = api.status()
    assert status["admission"]["nodes"] == 2 and status["restarts"][0]["reason"] == "Resized" and status["restartsCounted"] == 0
    assert status["checkpoint"]["step"] == 7 and status["usage"]["lostSeconds"] == 0
    after = status["plan"]
    batch = [p["worldSize"] * p["perDeviceBatchSize"] * p["gradientAccumulation"] for p in (before, after)]
    assert (before["worldSize"], after["worldSize"]) == (1, 2) and batch[0] == batch[1]
    kubelet.hold = set()
    until("it ends", lambda: phase_of(api, "support") == "Succeeded")


def test_the_command_line_says_who_waits_for_what(
    api: Api, kubelet: Kubelet, operator: Operator, make_queue: MakeQueue, tmp_path: Path
) -> None:
    queue = make_queue(2)
    kubelet.hold = {"train"}
    api.create_job(gpu_job(queue, gpus=2), name="first")
    until("first trains", lambda: phase_of(api, "first") == "Training")
    api.create_job(gpu_job(queue, gpus=1), name="second")
    until("second waits", lambda: phase_of(api, "second") == "Queued")

    told = finetune(api, "queues")
    assert f"queue {queue}: 1 admitted, 1 waiting" in told and "2 of 2" in told
    assert f"1. {api.namespace}/second: waits for 1 of 1 {GPU}" in told
    told = finetune(api, "why", "second")
    assert "second: Queued" in told and f"position 1 in queue {queue}: waits for 1 of 1" in told
    told = finetune(api, "simulate", "--quota", f"{queue}/any=3")
    assert "second" in told and "starts" in told
    job = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "FineTuneJob", "metadata": {"name": "third"}, "spec": gpu_job(queue)}
    (tmp_path / "third.yaml").write_text(yaml.safe_dump(job))
    told = finetune(api, "simulate", "-f", str(tmp_path / "third.yaml"))
    assert "third (simulated)" in told and "waits for 1 of 1" in told
    assert finetune(api, "simulate", "--quota", f"{queue}/any=2").strip() == "nothing would change"


def test_f24_a_waiting_job_may_ask_for_less_and_a_running_one_may_not(
    api: Api, kubelet: Kubelet, operator: Operator, make_queue: MakeQueue
) -> None:
    """What waits is planned anew, and counted as it is now; what holds GPUs keeps its shape until it has given them back."""
    queue = make_queue(3)
    kubelet.hold = {"train"}
    api.create_job(gpu_job(queue, gpus=2), name="first")
    until("first trains", lambda: phase_of(api, "first") == "Training")
    api.create_job(gpu_job(queue, gpus=2), name="second")
    until("second waits", lambda: phase_of(api, "second") == "Queued")
    with pytest.raises(client.ApiException) as refused:
        api.patch_job({"spec": {"distribution": {"gpusPerNode": 1}}}, name="first")
    assert "spec.distribution can change only while the job holds no GPUs" in refused.value.body
    api.patch_job({"spec": {"distribution": {"gpusPerNode": 1}}}, name="second")
    until("second trains", lambda: phase_of(api, "second") == "Training")
    until("it is told", lambda: "SpecChanged" in api.events())
    api.patch_job({"spec": {"runPolicy": {"suspend": True}}}, name="first")
    until("first has given its GPUs back", lambda: api.condition("Admitted", "first").get("status") == "False")
    api.patch_job({"spec": {"distribution": {"gpusPerNode": 1}, "runPolicy": {"suspend": False}}}, name="first")
    kubelet.hold = set()
    until("both end", lambda: phase_of(api, "first") == phase_of(api, "second") == "Succeeded", 60)
    assert [api.status(name)["totalGpus"] for name in ("first", "second")] == [1, 1]


@pytest.mark.operator(FINETUNE_SNAPSHOT_SECONDS="3600")
def test_a_changed_quota_acts_at_once(api: Api, kubelet: Kubelet, operator: Operator, make_queue: MakeQueue) -> None:
    """An operator of the whole cluster watches queues: nobody waits for its next look around."""
    queue = make_queue(0)
    api.create_job(gpu_job(queue))
    until("it waits", lambda: api.condition("Admitted").get("reason") == "NeverAdmitted")
    set_quota(api, queue, 1)
    until("it ends", lambda: phase_of(api, "support") == "Succeeded", 30)


def test_what_ran_waits_for_its_nodes_by_name(api: Api, kubelet: Kubelet, operator: Operator, machines: None) -> None:
    """Those that could hold it are away for repair: it is not refused, also by an operator that has just started."""
    first, second = (f"{api.namespace}-{n}" for n in range(2))
    kubelet.hold = {"train"}
    api.create_job(gpu_job(None, gpus=4, resource=SCARCE))
    until("it trains", lambda: phase_of(api, "support") == "Training")
    api.patch_job({"spec": {"runPolicy": {"suspend": True}}})
    until("it is suspended", lambda: phase_of(api, "support") == "Suspended" and not api.workers())
    api.core.patch_node(first, {"spec": {"unschedulable": True}})
    api.core.patch_node(second, {"spec": {"taints": [{"key": "repair", "effect": "NoSchedule"}]}})
    operator.kill()
    operator.start()
    api.patch_job({"spec": {"runPolicy": {"suspend": False}}})
    until("it waits", lambda: api.condition("Admitted").get("reason") == "WaitingForNodes")
    message = api.condition("Admitted")["message"]
    assert f"nodes that could hold its pods are away: {first} (cordoned), {second} (taint repair:NoSchedule)" in message
    small = {"status": {"capacity": {SCARCE: "2"}, "allocatable": {SCARCE: "2"}}}
    for name in (first, second):
        api.core.patch_node_status(name, small)
    until("its nodes are known for what they had", lambda: "has 2 of 4" in api.condition("Admitted")["message"])
    assert phase_of(api, "support") == "Queued"
    api.core.patch_node_status(second, {"status": {"capacity": {SCARCE: "4"}, "allocatable": {SCARCE: "4"}}})
    api.core.patch_node(second, {"spec": {"taints": []}})
    until("it goes on", lambda: phase_of(api, "support") == "Training")
