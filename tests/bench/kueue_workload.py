"""Kueue's own scheduling workload against the operator on a real API server, with simulated execution.

15,000 jobs in 5 cohorts of 6 queues (kubernetes-sigs/kueue, test/performance/scheduler). Kueue's harness has no pods, its
runner marks Workloads as finished after their run time; here the operator's pods, child Jobs and ConfigMaps are simulated in
its own process, and end after the job's run time. FineTuneJobs, FineTuneQueues, status and Events are real.

`python -m tests.bench.kueue_workload baseline [SHARE]` runs it beside Kueue itself (kueue.py), `tas` Kueue's topology workload;
`operator` and `generate` are its two processes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import ssl
import statistics
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import kopf
import uvloop
import yaml

from finetune_api import API_VERSION, KIND, names
from finetune_api.contract import StageResult
from finetune_api.queue import QUEUE_KIND
from finetune_operator import handlers, metrics
from finetune_operator.__main__ import spare_the_collector
from finetune_operator.cache.progress import ProgressBoard
from finetune_operator.cache.store import Store
from finetune_operator.cluster.connect import connect
from finetune_operator.cluster.errors import APIError
from finetune_operator.cluster.kinds import Kinds
from finetune_operator.cluster.resources import RESOURCES
from finetune_operator.cluster.transport import KubernetesCluster
from finetune_operator.controllers.manager import Manager
from finetune_operator.model.objects import CHILD_KINDS, Object
from finetune_operator.settings import Settings
from tests.bench import kueue
from tests.bench.api_server import api_server
from tests.cluster import processes
from tests.cluster.shell import REPO
from tests.factory import MINIMAL, PLAN, PREPARED, TRAINED, ended, merged

NAME = "bench-kueue"
COHORTS, QUEUES, BORROWING = 5, 6, 5
"""Each queue may borrow so many times its quota"""
_GPU, _RACK = "example.com/unit", "example.com/rack"
RACKS, PER_RACK = 10, 64


@dataclass(frozen=True)
class Class:
    """Jobs of one size, in each queue."""

    name: str
    count: int
    pods: int
    units: int
    """Of each pod"""
    seconds: float
    priority: int
    every: float
    """Seconds between two"""

    @property
    def world(self) -> int:
        """Units of the gang."""
        return self.pods * self.units


@dataclass(frozen=True)
class Workload:
    """What is run, after one of Kueue's configurations."""

    classes: tuple[Class, ...]
    quota: int
    capacity: int = 0
    """Units of each of the nodes, where a gang goes to one rack; 0: nodes are not looked at"""


WORKLOADS = {
    "baseline": Workload(
        classes=(
            Class("small", 350, 1, 1, 0.2, 50, 0.1),
            Class("medium", 100, 1, 5, 0.5, 100, 0.5),
            Class("large", 50, 2, 10, 1.0, 200, 1.2),
        ),
        quota=20,
    ),
    # a unit is a quarter of Kueue's cpu there; all gangs require a rack, where Kueue's only prefer one in two of three
    "tas": Workload(
        classes=(
            Class("small", 350, 2, 2, 0.2, 50, 0.1),
            Class("medium", 100, 4, 5, 0.5, 100, 0.5),
            Class("large", 50, 8, 10, 1.0, 200, 1.2),
        ),
        quota=80,
        capacity=384,
    ),
}
_QPS, _BURST = 2000.0, 4000
_LIMIT = 1800.0


class Simulated(KubernetesCluster):
    """The API server for jobs, queues and events; what would run is played here."""

    manager: Manager
    notes: Any
    workload: Workload

    def prepare_to_play(self, manager: Manager, notes: Path, workload: Workload) -> None:
        """Events go to this controller; what happened when goes into a file."""
        self.manager, self.notes, self.workload = manager, notes.open("w", buffering=1), workload
        self._objects: dict[tuple[str, str, str], Object] = {}
        self._serial = itertools.count(1)

    def class_of(self, name: str) -> Class:
        """By the beginning of a job's name."""
        return next(c for c in self.workload.classes if name.startswith(c.name))

    def _made(self, manifest: Object) -> Object:
        meta = {**manifest["metadata"], "uid": str(uuid.uuid4()), "creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
        made = {**manifest, "metadata": {**meta, "resourceVersion": str(next(self._serial))}}
        self._objects[manifest["kind"], meta["namespace"], meta["name"]] = made
        return made

    def _becomes(self, made: Object, status: Object) -> None:
        key = (made["kind"], made["metadata"]["namespace"], made["metadata"]["name"])
        if self._objects.get(key, {}).get("metadata", {}).get("uid") != made["metadata"]["uid"]:
            return  # it gave way
        changed = {**made, "metadata": {**made["metadata"], "resourceVersion": str(next(self._serial))}, "status": status}
        self._objects[key] = changed
        self.manager.child_event(made["kind"], changed, deleted=False)

    async def apply(self, manifest: Object) -> Object:
        return self._made(manifest)

    async def create(self, manifest: Object) -> Object:
        kind, meta, loop = manifest["kind"], manifest["metadata"], asyncio.get_running_loop()
        if kind not in CHILD_KINDS:
            return await super().create(manifest)
        if (kind, meta["namespace"], meta["name"]) in self._objects:
            raise APIError(409, "AlreadyExists", meta["name"])
        made = self._made(manifest)
        if kind == "Job":
            world = self.class_of(meta["labels"][names.LABEL_JOB]).world
            plan = {**PLAN, "worldSize": world, "perDeviceBatchSize": 1, "gradientAccumulation": self.workload.quota // world}
            words = StageResult(reason="DataReady", message="100 rows", result={**PREPARED.result, "plan": plan})
            owner = [{"apiVersion": "batch/v1", "kind": "Job", "name": meta["name"], "uid": made["metadata"]["uid"], "controller": True}]
            pod_meta = {**meta, "name": f"{meta['name']}-x", "ownerReferences": owner}
            pod = self._made({"apiVersion": "v1", "kind": "Pod", "metadata": pod_meta, "spec": {}})
            loop.call_soon(self._becomes, pod, ended(0, words.dumps()))
        elif kind == "Pod":
            loop.call_later(self.class_of(meta["name"]).seconds, self._becomes, made, ended(0, TRAINED.dumps(), at=datetime.now(UTC)))
        return made

    async def delete(self, kind: str, namespace: str, name: str, uid: str, grace_seconds: int | None = None) -> Object | None:
        if kind not in CHILD_KINDS:
            return await super().delete(kind, namespace, name, uid, grace_seconds)
        if (gone := self._objects.pop((kind, namespace, name), None)) is not None:
            asyncio.get_running_loop().call_soon(lambda: self.manager.child_event(kind, gone, deleted=True))
        return None

    def list(self, kind: str, namespace: str = "", selector: str = "") -> AsyncIterator[Object]:
        if kind not in CHILD_KINDS:
            return super().list(kind, namespace, selector)

        async def played() -> AsyncIterator[Object]:
            for (found, *_), raw in list(self._objects.items()):
                if found == kind:
                    yield raw

        return played()

    async def replace_status(self, raw: Object, *, urgent: bool = True) -> Object:
        answer = await super().replace_status(raw, urgent=urgent)
        if raw["kind"] == KIND:
            status = answer["status"]
            since = {c["type"]: c["status"] for c in status.get("conditions", ())}
            if since.get("Admitted") == "True" or status.get("finishedAt"):
                told = {"name": raw["metadata"]["name"], "at": time.time(), "finished": status.get("phase")}
                self.notes.write(json.dumps(told) + "\n")
        return answer


async def operate(notes: Path, workload: Workload) -> None:
    """The operator over the simulated cluster."""
    spare_the_collector()
    found = await connect(_QPS, _BURST)
    found.__class__ = Simulated
    cluster: Any = found
    settings = Settings(progress_url="none", resync_seconds=3600, workers=32)
    manager = Manager(cluster, Store(), ProgressBoard(), settings)
    cluster.prepare_to_play(manager, notes, workload)
    registry = kopf.OperatorRegistry()
    kinds = Kinds(cluster, settings)
    await kinds.look()
    handlers.register(registry, manager, settings, kinds)
    watches = kopf.operator(registry=registry, settings=handlers.kopf_settings(), standalone=True, clusterwide=True)
    async with asyncio.TaskGroup() as group:
        group.create_task(watches)
        group.create_task(manager.run())
        group.create_task(_measure(cluster, notes.with_suffix(".calls")))


async def _measure(cluster: KubernetesCluster, into: Path) -> None:
    while True:
        await asyncio.sleep(2)
        passes = next(s.value for m in metrics.RECONCILE_SECONDS.collect() for s in m.samples if s.name.endswith("_count"))
        counted = json.dumps({**{f"{verb} {kind}": count for (verb, kind), count in cluster.calls.items()}, "passes": passes})
        await asyncio.to_thread(into.write_text, counted)


def _door() -> tuple[str, dict[str, str], ssl.SSLContext]:
    """Where jobs are created, as whom, and whom to trust."""
    known = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
    place, token = known["clusters"][0]["cluster"], known["users"][0]["user"]["token"]
    trust = ssl.create_default_context(cadata=base64.b64decode(place["certificate-authority-data"]).decode())
    return place["server"] + RESOURCES[KIND].path("bench"), {"Authorization": f"Bearer {token}"}, trust


async def generate(notes: Path, share: float, workload: Workload) -> None:
    """Create the jobs when they are due, as fast as the API server takes them; by plain requests, since it shares the machine."""
    url, headers, trust = _door()
    arrivals = []
    for cohort, number in itertools.product(range(COHORTS), range(QUEUES)):
        for kind in workload.classes:
            for n in range(round(kind.count * share)):
                arrivals.append((n * kind.every, f"{kind.name}-{cohort}-{number}-{n}", f"c{cohort}-q{number}", kind))
    began, turns = time.time(), asyncio.Semaphore(32)
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(ssl=trust)) as session:
        sink = notes.open("w", buffering=1)

        async def one(name: str, queue: str, kind: Class) -> None:
            near = {"topologyKey": _RACK} if workload.capacity and kind.pods > 1 else {}
            spec = merged(
                MINIMAL,
                tuning={"hyperparameters": {"globalBatchSize": workload.quota}},
                distribution={"nodes": kind.pods, "gpusPerNode": kind.units},
                resources={"gpuResourceName": _GPU},
                scheduling={"queue": queue, "priorityClassName": kind.name, **near},
            )
            body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name, "namespace": "bench"}, "spec": spec}
            async with turns, session.post(url, json=body) as answer:
                answer.raise_for_status()
                await answer.read()
            sink.write(json.dumps({"name": name, "at": time.time()}) + "\n")

        async with asyncio.TaskGroup() as group:
            for at, name, queue, kind in sorted(arrivals, key=lambda arrival: arrival[:2]):
                await asyncio.sleep(max(0.0, began + at - time.time()))
                group.create_task(one(name, queue, kind))


async def _set_up(admin: Path, workload: Workload) -> None:
    cluster = await connect(_QPS, _BURST, kubeconfig=str(admin))
    await cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "bench"}})
    for kind in workload.classes:
        meta = {"name": kind.name}
        await cluster.create({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": meta, "value": kind.priority})
    for rack, number in itertools.product(range(RACKS if workload.capacity else 0), range(PER_RACK)):
        meta = {"name": f"n{rack}-{number}", "labels": {_RACK: f"r{rack}"}}
        allocatable = {_GPU: str(workload.capacity), "cpu": "96", "memory": "256Gi", "pods": "250"}
        made = await cluster.create({"apiVersion": "v1", "kind": "Node", "metadata": meta})
        made = await cluster.patch("Node", "", meta["name"], {"spec": {"taints": None}})  # no controller here takes "not ready" away
        status = {"allocatable": allocatable, "capacity": allocatable, "conditions": [{"type": "Ready", "status": "True"}]}
        await cluster.replace_status({**made, "status": status})
    for cohort, number in itertools.product(range(COHORTS), range(QUEUES)):
        quota, nodes = workload.quota, "Existing" if workload.capacity else "Autoscaled"
        flavor = {"name": "any", "resourceName": _GPU, "nominalQuota": quota, "borrowingLimit": BORROWING * quota, "nodes": nodes}
        preemption = {"withinQueue": "LowerPriority", "reclaimWithinCohort": "Any", "minimumRunTime": "0s"}
        spec = {"cohort": f"c{cohort}", "flavors": [flavor], "preemption": preemption}
        await cluster.create({"apiVersion": API_VERSION, "kind": QUEUE_KIND, "metadata": {"name": f"c{cohort}-q{number}"}, "spec": spec})
    await cluster.close()


def bench(share: float = 1.0, config: str = "baseline") -> dict[str, Any]:
    """Run it; `share` is the part of each class's jobs. Wall time, least use of a queue, time to admission per class."""
    workload = WORKLOADS[config]
    with api_server(NAME) as server:
        created, told = server.state / "created.jsonl", server.state / "told.jsonl"

        def start(*words: object) -> subprocess.Popen[bytes]:
            sink = (server.state / f"{words[0]}.log").open("wb")
            command = [sys.executable, "-m", "tests.bench.kueue_workload", *map(str, words)]
            env = {**os.environ, "PYTHONPATH": f"{REPO}/operator:{REPO}", "KUBECONFIG": str(server.admin), processes.MARK: NAME}
            return subprocess.Popen(command, env=env, cwd=REPO, stdout=sink, stderr=subprocess.STDOUT)

        server.apply(REPO / "crds")
        asyncio.run(_set_up(server.admin, workload))
        operator = start("operator", told, config)
        time.sleep(6)
        generator = start("generate", created, share, config)
        _wait(operator, generator, created, told)
        used = server.used()
        return {**_summary(workload, created, told, json.loads(told.with_suffix(".calls").read_text())), "used": used}


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # half a line
            found.append(json.loads(line))
    return found


def _wait(operator: subprocess.Popen[bytes], generator: subprocess.Popen[bytes], created: Path, told: Path) -> None:
    deadline = time.monotonic() + _LIMIT
    while time.monotonic() < deadline:
        time.sleep(2)
        if operator.poll() is not None or generator.poll() not in (None, 0):
            last = "".join(f"\n{log.name}: {log.read_text()[-2000:]}" for log in sorted(told.parent.glob("*.log")))
            raise RuntimeError(f"a process has ended: {told.parent}{last}")
        done = {n["name"] for n in _lines(told) if n["finished"] in ("Succeeded", "Failed")}
        if generator.poll() == 0 and len(done) >= len(_lines(created)):
            time.sleep(2)
            return
    raise TimeoutError(f"not within {_LIMIT:.0f} s: {told.parent}")


def _summary(workload: Workload, created: Path, told: Path, calls: dict[str, int]) -> dict[str, Any]:
    began = {n["name"]: n["at"] for n in _lines(created)}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    final: dict[str, float] = {}
    for note in _lines(told):
        if note["finished"] in ("Succeeded", "Failed"):
            final[note["name"]] = note["at"]
        else:
            first.setdefault(note["name"], note["at"])
            last.setdefault(note["name"], note["at"])
    classes = {kind.name: kind for kind in workload.classes}
    waits: dict[str, list[float]] = defaultdict(list)
    used: dict[str, float] = defaultdict(float)
    """Unit-seconds from admission to an end that is on record; and of those, what the jobs themselves took"""
    work: dict[str, float] = defaultdict(float)
    for name, at in began.items():
        kind, cohort, number, _ = name.split("-")
        waits[kind].append(first.get(name, final[name]) - at)
        used[f"c{cohort}-q{number}"] += classes[kind].world * (final[name] - first.get(name, final[name]))
        work[f"c{cohort}-q{number}"] += classes[kind].world * classes[kind].seconds
    wall = max(final.values()) - min(began.values())
    return {
        "jobs": len(began),
        "seconds": round(wall, 1),
        "least_use_of_a_queue": round(min(used.values()) / (workload.quota * wall), 3),
        "least_work_in_a_queue": round(min(work.values()) / (workload.quota * wall), 3),
        "time_to_admission": {kind: round(statistics.mean(found), 1) for kind, found in waits.items()},
        "seconds_until_all_were_created": round(max(began.values()) - min(began.values()), 1),
        "api_calls_per_job": {call: round(count / len(began), 2) for call, count in sorted(calls.items()) if count > len(began) / 10},
    }


def main() -> None:
    """One of the two processes, or all of it with a share of the jobs."""
    match sys.argv[1:]:
        case ["operator", notes, config]:
            uvloop.run(operate(Path(notes), WORKLOADS[config]))
        case ["generate", notes, share, config]:
            asyncio.run(generate(Path(notes), float(share), WORKLOADS[config]))
        case [config, *share]:
            what = float(share[0]) if share else 1.0, config
            print(json.dumps({"operator": bench(*what), "kueue": kueue.bench(*what)}, indent=1))


if __name__ == "__main__":
    main()
