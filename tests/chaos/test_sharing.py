"""Two tenants share 32 GPUs: gangs of many shapes, a real scheduler that binds their pods, nodes that fail on the way.

The nodes are objects of the API without machines; the test plays their kubelets. What always holds is looked at in every
round, and how much of the GPUs was in use while somebody waited is printed and must be most of it.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import urllib3
from kubernetes import client

from finetune_api import GROUP, VERSION, names
from finetune_api.queue import QUEUE_KIND, QUEUE_PLURAL
from tests.component.conftest import Api, Operator
from tests.component.machines import Machines
from tests.factory import RESULTS, container_status, ended

SEED, JOBS, NODES, GPUS = 20261121, 60, 4, 8
GPU = "example.com/gpu"
SHAPES = ((1, 1), (1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (1, 8), (2, 8))
AWAY = (client.ApiException, urllib3.exceptions.HTTPError)


@pytest.fixture
def machines(api: Api) -> Iterator[Machines]:
    made = Machines(api.core, [f"{api.namespace}-{n}" for n in range(NODES)], {GPU: str(GPUS)})
    yield made
    made.close()


@pytest.fixture
def tenants(api: Api) -> Iterator[list[str]]:
    """Two queues of 16 in one cohort."""
    made = [f"{api.namespace}-{tenant}" for tenant in "xy"]
    for name in made:
        spec = {"cohort": api.namespace, "flavors": [{"name": "gpu", "resourceName": GPU, "nominalQuota": 16}]}
        body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": QUEUE_KIND, "metadata": {"name": name}, "spec": spec}
        api.custom.create_cluster_custom_object(GROUP, VERSION, QUEUE_PLURAL, body)
    yield made
    for name in made:
        api.custom.delete_cluster_custom_object(GROUP, VERSION, QUEUE_PLURAL, name)


@pytest.fixture
def volume(api: Api) -> Iterator[str]:
    """A claim that all jobs share; pods with an unbound one are not scheduled."""
    spec = {"accessModes": ["ReadWriteMany"], "storageClassName": "none"}
    volume = {
        **spec,
        "capacity": {"storage": "1Gi"},
        "hostPath": {"path": "/nowhere"},
        "claimRef": {"namespace": api.namespace, "name": "shared"},
    }
    api.core.create_persistent_volume({"metadata": {"name": api.namespace}, "spec": volume})
    claim = {**spec, "resources": {"requests": {"storage": "1Gi"}}, "volumeName": api.namespace}
    api.core.create_namespaced_persistent_volume_claim(api.namespace, {"metadata": {"name": "shared"}, "spec": claim})
    yield "shared"
    api.core.delete_persistent_volume(api.namespace)


class Played:
    """The kubelets of all nodes, and what must always hold."""

    def __init__(self, api: Api, shapes: dict[str, tuple[int, int]], queues: dict[str, str], rng: random.Random) -> None:
        self.api, self.shapes, self.queues, self.rng = api, shapes, queues, rng
        self.until: dict[str, float] = {}
        self.halves: dict[str, float] = {}
        self.longest_half = 0.0
        self.broken: list[str] = []
        self.use: list[float] = []

    def round(self, *, backlog: bool) -> None:
        pods = self.api.pods()
        self.look(pods, backlog=backlog)
        for pod in pods:
            with contextlib.suppress(client.ApiException):
                self.move(pod)

    def look(self, pods: list[Any], *, backlog: bool) -> None:
        node: Counter[str] = Counter()
        queue: Counter[str] = Counter()
        made: Counter[str] = Counter()
        bound: dict[str, int] = defaultdict(int)
        for pod in pods:
            job = pod.metadata.labels[names.LABEL_JOB]
            if pod.metadata.labels[names.LABEL_STAGE] != "train" or pod.status.phase not in ("Pending", "Running"):
                continue
            _, gpus = self.shapes[job]
            made[job] += 1
            queue[self.queues[job]] += gpus
            if pod.spec.node_name:
                node[pod.spec.node_name] += gpus
                bound[job] += 1
        self.broken += [f"{name} has {used} of {GPUS}" for name, used in node.items() if used > GPUS]
        self.broken += [f"{job} has {count} pods" for job, count in made.items() if count > self.shapes[job][0]]
        if sum(queue.values()) > NODES * GPUS:
            self.broken.append(f"{sum(queue.values())} GPUs of {NODES * GPUS} were given away")
        now = time.monotonic()
        self.halves = {job: self.halves.get(job, now) for job, count in bound.items() if 0 < count < self.shapes[job][0]}
        self.longest_half = max([self.longest_half, *(now - since for since in self.halves.values())])
        if backlog:
            self.use.append(sum(queue.values()) / (NODES * GPUS))

    def move(self, pod: Any) -> None:
        name, stage = pod.metadata.name, pod.metadata.labels[names.LABEL_STAGE]
        if pod.metadata.deletion_timestamp is not None:
            self.api.core.delete_namespaced_pod(name, self.api.namespace, grace_period_seconds=0)
        elif pod.status.phase == "Pending" and pod.spec.node_name:
            running = {"phase": "Running", "containerStatuses": container_status({"running": {"startedAt": "2026-11-21T12:00:00Z"}})}
            self.api.set_pod(name, running)
            self.until[pod.metadata.uid] = time.monotonic() + (self.rng.uniform(2, 6) if stage == "train" else 0)
        elif pod.status.phase == "Running" and time.monotonic() >= self.until.get(pod.metadata.uid, 0):
            self.api.set_pod(name, ended(0, RESULTS[stage].dumps()))

    def node_fails(self, node: str) -> None:
        """Everything on it ends, and nothing new comes."""
        self.api.core.patch_node(node, {"spec": {"unschedulable": True}})
        for pod in self.api.pods():
            if pod.spec.node_name == node and pod.status.phase in ("Pending", "Running"):
                with contextlib.suppress(client.ApiException):
                    self.api.set_pod(pod.metadata.name, {**ended(137), "reason": "NodeShutdown"})


@pytest.mark.timeout(900)
def test_two_tenants_share_nodes_that_fail(api: Api, operator: Operator, machines: Machines, tenants: list[str], volume: str) -> None:
    operator.kill()
    operator.start(FINETUNE_WATCH_NAMESPACES="", FINETUNE_SNAPSHOT_SECONDS="1", FINETUNE_API_QPS="200", FINETUNE_BACKOFF_LIMIT_SECONDS="5")
    rng = random.Random(SEED)
    shapes = {f"job-{n:03}": rng.choice(SHAPES) for n in range(JOBS)}
    queues = {name: rng.choices(tenants, [3, 1])[0] for name in shapes}
    for name, (nodes, gpus) in shapes.items():
        spec = {
            "model": {"uri": "hf://org/tiny"},
            "dataset": {"train": {"uri": "hf://org/rows"}},
            "distribution": {"nodes": nodes, "gpusPerNode": gpus},
            "resources": {"gpuResourceName": GPU},
            "scheduling": {"queue": queues[name]},
            "workspace": {"persistentVolumeClaim": {"claimName": volume}},
            "runPolicy": {"maxRestarts": 100},
        }
        api.create_job(spec, name=name)
    played = Played(api, shapes, queues, rng)
    began, failed_at, away, phases = time.monotonic(), time.monotonic(), "", Counter[str]()
    while time.monotonic() - began < 600:
        with contextlib.suppress(*AWAY):
            items = api.custom.list_namespaced_custom_object(GROUP, VERSION, api.namespace, "finetunejobs")["items"]
            phases = Counter(str((item.get("status") or {}).get("phase", "Pending")) for item in items)
            if phases["Succeeded"] + phases["Failed"] == JOBS:
                break
            played.round(backlog=phases["Queued"] >= 10)
            if time.monotonic() - failed_at > 8 and phases["Queued"]:
                if away:
                    api.core.patch_node(away, {"spec": {"unschedulable": None}})
                away = "" if away else rng.choice(machines.names)
                if away:
                    played.node_fails(away)
                failed_at = time.monotonic()
    took, use = time.monotonic() - began, statistics.mean(played.use or [0])
    print(
        f"{JOBS} jobs in {took:.0f} s; {use * 100:.0f} % of the GPUs in use while ten or more waited; half a gang for {played.longest_half:.1f} s at most"
    )
    assert phases == {"Succeeded": JOBS}, phases
    assert not played.broken, played.broken[:5]
    assert played.longest_half < 60, "gangs are bound as a whole, or give their place back"
    assert use > 0.4, "with a node away half of the time, and gangs that end within seconds"
    statuses = [api.status(name) for name in shapes]
    assert all(s["restartsCounted"] == 0 for s in statuses), "a node's failure is not the job's"
