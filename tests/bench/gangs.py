"""Two hundred gangs of two tenants on real kubelets, over pretended GPUs, while nodes are drained and crash.

Containers are real and take time, but do not train (tests/bench/played). Run it alone: it takes the local cluster for itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from finetune_api import API_VERSION, names
from finetune_api.queue import QUEUE_KIND
from tests.cluster import helm, images
from tests.cluster.local import GPUS_PER_NODE, LocalCluster
from tests.cluster.shell import CommandFailed

SEED, JOBS, LIMIT, BETWEEN = 20261121, 200, 2400.0, 30.0
SHAPES = ((1, 1), (1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (1, 8), (2, 8))
TENANTS = ("x", "y")
GPU = "nvidia.com/gpu"
_PLAYED = Path(__file__).parent / "played"


class Watch:
    """What always holds, looked at again and again."""

    def __init__(self, cluster: LocalCluster, shapes: dict[str, tuple[int, int]]) -> None:
        self.cluster, self.shapes = cluster, shapes
        self.broken: list[str] = []
        self.use: list[float] = []
        self.halves: dict[str, float] = {}
        self.longest_half = 0.0

    def pods(self) -> list[dict[str, Any]]:
        selector = f"{names.LABEL_MANAGED_BY}={names.MANAGER},{names.LABEL_STAGE}=train"
        return list(json.loads(self.cluster.kubectl("get", "pods", "-A", "-l", selector, "-o", "json"))["items"])

    def look(self, *, backlog: bool) -> None:
        node: Counter[str] = Counter()
        made: Counter[tuple[str, str]] = Counter()
        bound: dict[str, int] = defaultdict(int)
        for pod in self.pods():
            labels, where = pod["metadata"]["labels"], pod["spec"].get("nodeName")
            if pod["status"]["phase"] not in ("Pending", "Running"):
                continue
            job = labels[names.LABEL_JOB]
            made[job, labels[names.LABEL_RANK]] += 1
            if where:
                node[where] += self.shapes[job][1]
                bound[job] += 1
        self.broken += [f"{name} has {used} of {GPUS_PER_NODE} GPUs" for name, used in node.items() if used > GPUS_PER_NODE]
        self.broken += [f"{count} pods of {which}" for which, count in made.items() if count > 1]
        now = time.monotonic()
        self.halves = {job: self.halves.get(job, now) for job, count in bound.items() if count < self.shapes[job][0]}
        self.longest_half = max([self.longest_half, *(now - since for since in self.halves.values())])
        if backlog:
            self.use.append(sum(node.values()) / (self.cluster.size * GPUS_PER_NODE))

    def crash(self, node: str) -> int:
        """SIGKILL to the containers of every gang on a node, at once."""
        there = {p["metadata"]["name"] for p in self.pods() if p["spec"].get("nodeName") == node and p["status"]["phase"] == "Running"}
        killed = 0
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if b"played_trainer" not in (process / "cmdline").read_bytes():
                    continue
                words = (process / "environ").read_bytes().split(b"\0")
                if any(word.startswith(b"FINETUNE_POD_NAME=") and word.decode().partition("=")[2] in there for word in words):
                    os.kill(int(process.name), signal.SIGKILL)
                    killed += 1
        return killed


def bench(jobs: int = JOBS) -> dict[str, Any]:
    """Run it with so many jobs."""
    cluster, rng = LocalCluster("finetune"), random.Random(SEED)
    played = images.played(_PLAYED)
    cluster.down(quiet=True)
    try:
        cluster.up(load=[images.operator(), played])
        values = helm.local_values()
        repository, _, tag = played.reference.rpartition(":")
        values["trainer"].update(image={"repository": repository, "tag": tag}, stageResources={"cpu": "10m", "memory": "16Mi"})
        values["settings"].update(apiQps=200, snapshotSeconds=1)
        helm.install(cluster.kubeconfig, values)
        return _run(cluster, rng, jobs)
    finally:
        cluster.down(quiet=True)


def _run(cluster: LocalCluster, rng: random.Random, count: int) -> dict[str, Any]:
    shapes = {f"job-{n:03}": rng.choice(SHAPES) for n in range(count)}
    documents: list[dict[str, Any]] = []
    for tenant in TENANTS:
        documents += [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": tenant}}]
        flavor = {"name": "gpu", "resourceName": GPU, "nominalQuota": GPUS_PER_NODE}
        spec = {"cohort": "all", "flavors": [flavor], "namespaceSelector": {"matchLabels": {"tenant": tenant}}}
        documents[-1]["metadata"]["labels"] = {"tenant": tenant}
        documents += [{"apiVersion": API_VERSION, "kind": QUEUE_KIND, "metadata": {"name": tenant}, "spec": spec}]
        claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
        meta = {"name": "shared", "namespace": tenant}
        documents += [{"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta, "spec": claim}]
    for name, (nodes, gpus) in shapes.items():
        tenant = rng.choices(TENANTS, [3, 1])[0]
        spec = {
            "model": {"uri": "hf://org/tiny"},
            "dataset": {"train": {"uri": "hf://org/rows"}},
            "tuning": {"hyperparameters": {"maxSteps": rng.randint(5, 20), "globalBatchSize": 64}},
            "distribution": {"nodes": nodes, "gpusPerNode": gpus},
            "scheduling": {"queue": tenant},
            "workspace": {"persistentVolumeClaim": {"claimName": "shared"}},
        }
        meta = {"name": name, "namespace": tenant}
        documents += [{"apiVersion": API_VERSION, "kind": "FineTuneJob", "metadata": meta, "spec": spec}]
    cluster.kubectl("apply", "-f", "-", input="\n---\n".join(map(json.dumps, documents)))
    watch, began, struck, away = Watch(cluster, shapes), time.monotonic(), time.monotonic(), ""
    phases, faults, jobs = Counter[str](), Counter[str](), list[dict[str, Any]]()
    members = [f"{node.name}" for node in cluster._nodes()]
    while time.monotonic() - began < LIMIT:
        jobs = json.loads(cluster.kubectl("get", "finetunejobs", "-A", "-o", "json"))["items"]
        phases = Counter(str((job.get("status") or {}).get("phase", "Pending")) for job in jobs)
        if phases["Succeeded"] + phases["Failed"] == count:
            break
        watch.look(backlog=phases["Queued"] >= 10)
        if time.monotonic() - struck > (BETWEEN / 2 if away else BETWEEN):
            struck = time.monotonic()
            with contextlib.suppress(CommandFailed):
                if away:
                    cluster.kubectl("uncordon", away)
                    away = ""
                elif rng.random() < 0.5:
                    away = rng.choice(members)
                    cluster.kubectl(
                        "drain",
                        away,
                        "--ignore-daemonsets",
                        "--force",
                        "--delete-emptydir-data",
                        "--pod-selector",
                        f"{names.LABEL_STAGE}=train",
                    )
                    faults["drain"] += 1
                else:
                    faults["containers killed"] += watch.crash(rng.choice(members))
                    faults["crash"] += 1
        time.sleep(1)
    restarts = [r for job in jobs for r in job["status"].get("restarts", ())]
    return {
        "jobs": count,
        "phases": dict(phases),
        "seconds": round(time.monotonic() - began),
        "faults": dict(faults),
        "restarts": dict(Counter(r["cause"] for r in restarts)),
        "gpus_in_use_while_ten_or_more_waited": round(statistics.mean(watch.use or [0]), 3),
        "longest_half_gang_seconds": round(watch.longest_half, 1),
        "broken_invariants": watch.broken[:20],
    }


if __name__ == "__main__":
    print(json.dumps(bench(*map(int, sys.argv[1:])), indent=1))
