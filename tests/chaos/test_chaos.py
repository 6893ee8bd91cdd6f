"""Random faults over twenty jobs at once, on a real control plane; the seed fixes them all.

Two operators (one acts, one stands by) serve jobs of every shape. A played kubelet runs the pods, so that hundreds of
gangs cost nothing; what real containers do when they are disturbed is tests/e2e's business. Struck are the operators,
their network, the API server, etcd, the controller manager, kubelets, pods, child objects and the jobs themselves. The
clocks of the operators are a day and three hours ahead.

FINETUNE_CHAOS_SEED and FINETUNE_CHAOS_FAULTS change the run; `make chaos` strikes 200 times.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import urllib3
from kubernetes import client

from finetune_api import names
from finetune_api.contract import ExitCode, StageResult
from tests.chaos.wire import Wire
from tests.cluster import debian
from tests.cluster.local import LocalCluster
from tests.cluster.shell import CommandFailed
from tests.component.conftest import Api, Operator, until
from tests.factory import MINIMAL, RESULTS, container_status, ended, merged

SEED = int(os.environ.get("FINETUNE_CHAOS_SEED", "20261121"))
FAULTS = int(os.environ.get("FINETUNE_CHAOS_FAULTS", "60"))
JOBS = 20
EVALUATED = {
    "dataset": {"train": {"uri": "configmap://rows/train.jsonl"}, "eval": {"splitFraction": 0.1}},
    "evaluation": {"gate": {"minImprovement": 0.1}},
    "publish": [{"uri": "pvc://published/support"}],
}
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"distribution": {"nodes": 2, "gpusPerNode": 0}},
    {"distribution": {"nodes": 4, "gpusPerNode": 0}},
    EVALUATED,
    {**EVALUATED, "distribution": {"nodes": 2, "gpusPerNode": 0}},
)
AWAY = (client.ApiException, urllib3.exceptions.HTTPError, CommandFailed)
POLICY = {"maxRestarts": 1000, "gangTimeout": "10m", "failurePolicy": {"rules": []}}


class World:
    """The jobs, the kubelet that runs them slowly, and what must always hold."""

    def __init__(self, api: Api, rng: random.Random) -> None:
        self.api, self.rng = api, rng
        self.shapes = {f"job-{n:02d}": SHAPES[n % len(SHAPES)] for n in range(JOBS)}
        self.told: list[str] = []
        """Faults so far."""
        self.due = {name: FAULTS * (n + 1) // JOBS for n, name in enumerate(self.shapes)}
        """Faults before a job's training may end: some are disturbed for long, whatever this machine's speed."""
        self.calm = False
        self.silent = 0
        """Rounds in which the kubelets do nothing."""
        self.attempts: Counter[str] = Counter()
        self.ended: dict[str, str] = {}
        self.struck: dict[str, list[str]] = {name: [] for name in self.shapes}
        """Faults that may cost a job an attempt: even one whose answer was lost may have happened."""
        self.broken: list[str] = []

    def create(self) -> None:
        for name, shape in self.shapes.items():
            self.api.create_job({**merged(MINIMAL, **shape), "runPolicy": dict(POLICY)}, name=name)

    def look(self) -> None:
        """One round of the kubelet, and of the invariants."""
        pods = self.api.pods()
        seen: set[tuple[str, str, str]] = set()
        live: Counter[str] = Counter()
        for pod in pods:
            labels = pod.metadata.labels
            job, stage = labels[names.LABEL_JOB], labels[names.LABEL_STAGE]
            if pod.status.phase in ("Pending", "Running") and stage == "train":
                key = (job, labels[names.LABEL_RANK], labels[names.LABEL_ATTEMPT])
                if key in seen:
                    self.broken.append(f"two pods of {key}")
                seen.add(key)
                live[job] += 1
            if not self.silent:
                with contextlib.suppress(client.ApiException):
                    self.move(pod, stage)
        self.silent = max(0, self.silent - 1)
        for job, count in live.items():
            if count > self.shapes[job].get("distribution", {}).get("nodes", 1):
                self.broken.append(f"{job} holds {count} pods")
        for name in self.shapes:
            self.check(name, self.api.status(name))

    def move(self, pod: Any, stage: str) -> None:
        if pod.metadata.deletion_timestamp is not None:
            if self.calm or self.rng.random() < 0.5:  # its kubelet confirms, now or later
                self.api.core.delete_namespaced_pod(pod.metadata.name, self.api.namespace, grace_period_seconds=0)
            return
        if pod.status.phase == "Pending" and (self.calm or self.rng.random() < 0.7):
            running = {"phase": "Running", "containerStatuses": container_status({"running": {"startedAt": "2026-11-21T12:00:00Z"}})}
            self.api.set_pod(pod.metadata.name, running)
        elif pod.status.phase == "Running" and (self.calm or self.rng.random() < 0.3) and self.may_end(pod, stage):
            self.api.set_pod(pod.metadata.name, ended(0, RESULTS[stage].dumps()))

    def may_end(self, pod: Any, stage: str) -> bool:
        return stage != "train" or len(self.told) >= self.due[pod.metadata.labels[names.LABEL_JOB]]

    def check(self, name: str, status: dict[str, Any]) -> None:
        attempt, phase = int(status.get("attempt", 0)), status.get("phase", "Pending")
        if attempt < self.attempts[name]:
            self.broken.append(f"{name}: attempt {self.attempts[name]} -> {attempt}")
        self.attempts[name] = attempt
        if name in self.ended and self.ended[name] != phase:
            self.broken.append(f"{name}: {self.ended[name]} -> {phase}")
        if phase in ("Succeeded", "Failed"):
            self.ended[name] = phase

    def running(self) -> list[str]:
        return [name for name in self.shapes if name not in self.ended]

    # faults

    def _pod(self) -> Any:
        pods = [p for p in self.api.pods() if p.status.phase in ("Pending", "Running") and p.metadata.deletion_timestamp is None]
        return self.rng.choice(pods) if pods else None

    def pod_fails(self) -> str:
        pod = self._pod()
        if pod is None:
            raise client.ApiException(404)
        code = self.rng.choice([1, 137, int(ExitCode.INFRASTRUCTURE), int(ExitCode.HANG), int(ExitCode.STOPPED)])
        words = self.rng.choice(["", StageResult(reason="Broken", message="words").dumps(), "\x00\xff NCCL error"])
        told = f"pod fails: {pod.metadata.name} exits {code}"
        self.struck[pod.metadata.labels[names.LABEL_JOB]].append(told)
        self.api.set_pod(pod.metadata.name, ended(code, words))
        return told

    def pod_deleted(self) -> str:
        pod = self._pod()
        if pod is None:
            raise client.ApiException(404)
        told, grace = f"pod deleted: {pod.metadata.name}", self.rng.choice([0, 30])
        self.struck[pod.metadata.labels[names.LABEL_JOB]].append(told)
        self.api.core.delete_namespaced_pod(pod.metadata.name, self.api.namespace, grace_period_seconds=grace)
        return told

    def child_deleted(self) -> str:
        kind = self.rng.choice(["job", "configmap", "service"])
        found = self.api.cluster.kubectl(
            "-n", self.api.namespace, "get", kind, "-l", f"{names.LABEL_MANAGED_BY}={names.MANAGER}", "-o", "name"
        )
        if not found.split():
            raise client.ApiException(404)
        name = self.rng.choice(found.split())
        self.api.cluster.kubectl("-n", self.api.namespace, "delete", name, "--wait=false")
        return f"child deleted: {name}"

    def kubelets_silent(self) -> str:
        self.silent = self.rng.randint(2, 12)
        return "kubelets are silent"

    def suspended(self) -> str:
        names_ = self.running()
        if not names_:
            raise client.ApiException(404)
        name, suspend = self.rng.choice(names_), self.rng.random() < 0.5
        told = f"suspend: {name} {suspend}"
        if suspend:
            self.struck[name].append(told)
        self.api.patch_job({"spec": {"runPolicy": {"suspend": suspend}}}, name=name)
        return told


class Operators:
    """Two of them; the test starts one anew when it has ended."""

    def __init__(self, api: Api, folder: Path) -> None:
        self.env = {"FINETUNE_LEASE": "operator", "FINETUNE_NAMESPACE": api.namespace, "FINETUNE_LEASE_SECONDS": "4"}
        self.env |= {"FINETUNE_RESYNC_SECONDS": "10", "FINETUNE_STAGE_RETRIES": "1000", "FINETUNE_BACKOFF_LIMIT_SECONDS": "2"}
        self.both = [Operator(api, folder / f"{n}.log") for n in range(2)]
        self.wires = []
        for n in range(2):
            (place := folder / str(n)).mkdir()
            self.wires.append(Wire(api.cluster.kubeconfig, place))
        debian.ensure(debian.TESTS)
        self.revive()

    def revive(self) -> None:
        for one, wire, ahead in zip(self.both, self.wires, ("+1d", "+3h"), strict=True):
            if one.process is None or one.process.poll() is not None:
                clock = {"LD_PRELOAD": str(debian.FAKETIME), "FAKETIME": ahead, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
                one.start(KUBECONFIG=str(wire.kubeconfig), **clock, **self.env)

    def end(self) -> None:
        for wire in self.wires:
            wire.close()
        for one in self.both:
            if one.process is not None and one.process.poll() is None:
                one.process.send_signal(signal.SIGCONT)
                one.kill()


@pytest.fixture
def operators(api: Api, tmp_path: Path) -> Iterator[Operators]:
    made = Operators(api, tmp_path)
    yield made
    made.end()


def faults(world: World, cluster: LocalCluster, operators: Operators, rng: random.Random) -> list[tuple[int, Callable[[], str]]]:
    """Each with its weight."""

    def operator_killed() -> str:
        one = rng.choice(operators.both)
        one.kill()
        return "an operator is killed"

    def operator_frozen() -> str:
        one = rng.choice(operators.both)
        assert one.process is not None
        one.process.send_signal(signal.SIGSTOP)
        time.sleep(rng.uniform(0.5, 6))
        one.process.send_signal(signal.SIGCONT)
        return "an operator was frozen"

    def network_cut() -> str:
        wire = rng.choice(operators.wires)
        wire.cut()
        time.sleep(rng.uniform(0.5, 5))
        wire.mend()
        return "an operator's network was cut"

    def frozen(name: str, most: float) -> Callable[[], str]:
        def strike() -> str:
            cluster.signal(name, signal.SIGSTOP)
            time.sleep(rng.uniform(0.5, most))
            cluster.signal(name, signal.SIGCONT)
            return f"{name} was frozen"

        return strike

    def restarted(name: str) -> Callable[[], str]:
        def strike() -> str:
            cluster.restart(name)
            return f"{name} is killed"

        return strike

    return [
        (40, world.pod_fails),
        (40, world.pod_deleted),
        (30, world.child_deleted),
        (30, world.suspended),
        (20, operator_killed),
        (10, operator_frozen),
        (12, network_cut),
        (10, world.kubelets_silent),
        (6, restarted("kube-apiserver")),
        (4, restarted("etcd")),
        (6, restarted("kube-controller-manager")),
        (6, frozen("kube-apiserver", 4)),
        (4, frozen("etcd", 3)),
    ]


def test_twenty_jobs_survive_random_faults(api: Api, operators: Operators, cluster: LocalCluster) -> None:
    rng = random.Random(SEED)
    world = World(api, random.Random(SEED + 1))
    world.create()
    table = faults(world, cluster, operators, rng)
    told = world.told
    while len(told) < FAULTS:
        strike = rng.choices([f for _, f in table], [w for w, _ in table])[0]
        try:
            told.append(strike())
        except AWAY:  # the API server is: nothing was struck
            time.sleep(0.5)
        operators.revive()
        for _ in range(rng.randint(1, 3)):
            with contextlib.suppress(*AWAY):
                world.look()
    counts = Counter(text.partition(": ")[0] for text in told)
    print(f"seed {SEED}: {len(told)} faults: " + ", ".join(f"{what} {count}" for what, count in counts.most_common()))
    world.calm = True
    waiting = set(world.shapes)

    def over() -> bool:
        operators.revive()
        with contextlib.suppress(*AWAY):
            for name in sorted(waiting):
                api.patch_job({"spec": {"runPolicy": {"suspend": False}}}, name=name)
                waiting.discard(name)
            world.look()
        return not waiting and not world.running()

    until("all jobs end", over, 240)
    assert not world.broken, world.broken[:5]
    wrong = {n: api.condition("Failed", n) for n, phase in world.ended.items() if phase != "Succeeded"}
    assert not wrong, wrong
    heard: list[bool] = []
    for name in world.shapes:
        status = api.status(name)
        restarts = status.get("restarts", [])
        assert status["attempt"] <= len(world.struck[name]), (name, restarts, world.struck[name])
        assert len(restarts) == min(20, status["attempt"]), "every attempt's end is on record"
        done = [c["type"] for c in status["conditions"] if c["status"] == "True"]
        assert "Trained" in done and ("Published" in done) == ("publish" in world.shapes[name])
        times = [c["lastTransitionTime"] for c in status["conditions"]] + [r["time"] for r in restarts] + [status["finishedAt"]]
        late = datetime.now(UTC) + timedelta(seconds=60)
        assert all(datetime.fromisoformat(t) < late for t in times), "the API server's time, whatever the operators' clocks say"
        story = [(e.reason, e.message) for e in api.core.list_namespaced_event(api.namespace).items if e.involved_object.name == name]
        restarted = [f"attempt {attempt} goes on" for attempt in range(1, status["attempt"] + 1)]
        due = ["DataReady", "Succeeded", *(["Trained"] if "publish" in world.shapes[name] else [])]  # else its end says so
        heard += [any(r == "GangRestarted" and m.startswith(begins) for r, m in story) for begins in restarted]
        heard += [any(r == reason for r, _ in story) for reason in due]
    # an Event that waited is gone with its operator; all that is told rests on nothing, but most of it is told
    assert heard.count(True) >= 0.8 * len(heard), f"{heard.count(False)} of {len(heard)} Events were not told"
