"""A real control plane without nodes; the test plays kubelet."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import urllib3
from kubernetes import client, config

from finetune_api import GROUP, KIND, PLURAL, VERSION, names
from finetune_api.contract import StageResult
from tests.cluster import binaries
from tests.cluster.control_plane import free_port
from tests.cluster.local import LocalCluster, kubectl
from tests.cluster.shell import REPO, digest_of
from tests.component.machines import Leaving, Machines
from tests.factory import MINIMAL, RESULTS, container_status, ended, merged

SELECTOR = f"{names.LABEL_MANAGED_BY}={names.MANAGER}"
CRDS = sorted((REPO / "crds").glob("*.yaml"))


@contextlib.contextmanager
def control_plane(name: str, kubernetes: str = binaries.NEWEST, *, definitions: Sequence[Path] = CRDS) -> Iterator[LocalCluster]:
    """etcd, API server, controller manager, scheduler; no nodes. Two checkouts on one machine have one each of a name."""
    target = LocalCluster(f"{name}-{digest_of(str(REPO))[:6]}", size=0, kubernetes=kubernetes)
    target.down(quiet=True)
    target.up()
    for definition in definitions:
        target.define(definition)
    if CRDS[0] in definitions:
        until(
            "the policy of jobs is in force",
            lambda: "dataset.eval takes exactly one" in _told_of(target, dataset={**MINIMAL["dataset"], "eval": {}}),
        )
    yield target
    target.down(quiet=True)


def _told_of(cluster: LocalCluster, **changes: Any) -> str:
    """What an API server says of a job, without keeping it."""
    probe = {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, "metadata": {"name": "probe"}, "spec": merged(MINIMAL, **changes)}
    words = [kubectl(), "--kubeconfig", str(cluster.kubeconfig), "create", "--dry-run=server", "-f", "-"]
    return subprocess.run(words, input=json.dumps(probe), capture_output=True, text=True, check=False).stderr


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    """What most tests share."""
    with control_plane("component") as target:
        yield target


class Api:
    """The API as a user and as a kubelet, in one namespace."""

    def __init__(self, cluster: LocalCluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace
        connection = config.new_client_from_config(str(cluster.kubeconfig))
        self.core, self.batch, self.custom = (
            client.CoreV1Api(connection),
            client.BatchV1Api(connection),
            client.CustomObjectsApi(connection),
        )

    def create_job(self, spec: dict[str, Any], name: str = "support") -> dict[str, Any]:
        body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}
        made: dict[str, Any] = self.custom.create_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, body)
        return made

    def job(self, name: str = "support") -> dict[str, Any]:
        found: dict[str, Any] = self.custom.get_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name)
        return found

    def status(self, name: str = "support") -> dict[str, Any]:
        return dict(self.job(name).get("status") or {})

    def condition(self, type_: str, name: str = "support") -> dict[str, Any]:
        return next((c for c in self.status(name).get("conditions", []) if c["type"] == type_), {})

    def patch_job(self, body: dict[str, Any], name: str = "support") -> None:
        self.custom.patch_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name, body)

    def delete_job(self, name: str = "support") -> None:
        self.custom.delete_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name)

    def pods(self) -> list[Any]:
        return list(self.core.list_namespaced_pod(self.namespace, label_selector=SELECTOR).items)

    def workers(self) -> list[tuple[str, str]]:
        """(name, attempt) of the worker pods."""
        found = [p for p in self.pods() if p.metadata.labels.get(names.LABEL_STAGE) == "train"]
        return sorted((p.metadata.name, p.metadata.labels[names.LABEL_ATTEMPT]) for p in found)

    def events(self) -> list[str]:
        items = self.core.list_namespaced_event(self.namespace).items
        return [
            e.reason
            for e in sorted(items, key=lambda e: (e.metadata.creation_timestamp, e.metadata.resource_version))
            if e.source.component == names.MANAGER
        ]

    def owned(self) -> list[str]:
        """Everything of ours in the namespace, besides jobs."""
        found = [f"Pod/{p.metadata.name}" for p in self.pods()]
        found += [f"Job/{j.metadata.name}" for j in self.batch.list_namespaced_job(self.namespace, label_selector=SELECTOR).items]
        found += [
            f"ConfigMap/{c.metadata.name}" for c in self.core.list_namespaced_config_map(self.namespace, label_selector=SELECTOR).items
        ]
        found += [f"Service/{s.metadata.name}" for s in self.core.list_namespaced_service(self.namespace, label_selector=SELECTOR).items]
        claims = self.core.list_namespaced_persistent_volume_claim(self.namespace, label_selector=SELECTOR).items
        return sorted([*found, *(f"PersistentVolumeClaim/{c.metadata.name}" for c in claims)])

    def set_pod(self, name: str, status: dict[str, Any]) -> None:
        """Write a pod's status, as its kubelet would."""
        self.core.patch_namespaced_pod_status(name, self.namespace, {"status": status})


@pytest.fixture
def api(cluster: LocalCluster) -> Iterator[Api]:
    """A namespace of its own."""
    name = f"t-{uuid.uuid4().hex[:8]}"
    target = Api(cluster, name)
    target.core.create_namespace({"metadata": {"name": name}})
    until("pods' service account", lambda: target.core.read_namespaced_service_account("default", name))
    yield target
    with contextlib.suppress(client.ApiException):
        for job in target.custom.list_namespaced_custom_object(GROUP, VERSION, name, PLURAL)["items"]:
            target.delete_job(job["metadata"]["name"])
    with contextlib.suppress(client.ApiException):  # those with a played node have nobody else who would confirm it
        target.core.delete_collection_namespaced_pod(name, grace_period_seconds=0)
    with contextlib.suppress(client.ApiException):
        target.core.delete_namespace(name)


@pytest.fixture
def priority(api: Api) -> Iterator[str]:
    """A PriorityClass of 1000."""
    name = f"urgent-{uuid.uuid4().hex[:6]}"
    scheduling = client.SchedulingV1Api(api.core.api_client)
    scheduling.create_priority_class({"metadata": {"name": name}, "value": 1000})
    yield name
    scheduling.delete_priority_class(name)


@pytest.fixture
def leaving(api: Api) -> Iterator[Leaving]:
    """A node, and pods that leave it as asked."""
    made, played = Machines(api.core, [api.namespace], {}), Leaving(api)
    yield played
    played.end()
    made.close()


Behaviour = Callable[[Any], dict[str, Any] | None]


class Kubelet:
    """Moves pods through their phases in a thread. `behaviour(pod)` gives a status to write, or None to wait."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.hold: set[str] = set()
        """Stages whose pods run and do not end."""
        self.results: dict[str, StageResult] = dict(RESULTS)
        self.override: Behaviour | None = None
        self.live: dict[str, set[str]] = {}
        self.broken: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            with contextlib.suppress(client.ApiException, urllib3.exceptions.HTTPError):
                pods = self.api.pods()
                self._check(pods)
                for pod in pods:
                    status = self._next(pod)
                    if status is not None:
                        with contextlib.suppress(client.ApiException):
                            self.api.set_pod(pod.metadata.name, status)

    def _check(self, pods: list[Any]) -> None:
        """Invariant: never two pods of one stage try, or of one rank."""
        seen: set[tuple[str, str]] = set()
        for pod in pods:
            labels = pod.metadata.labels
            owner = labels.get(names.LABEL_JOB_UID) or labels[names.LABEL_OWNER_UID]
            key = (owner, labels[names.LABEL_STAGE] + labels.get(names.LABEL_RANK, ""))
            if pod.metadata.deletion_timestamp is None and pod.status.phase in ("Pending", "Running"):
                if key in seen:
                    self.broken.append(f"two live pods of {key}")
                seen.add(key)

    def _next(self, pod: Any) -> dict[str, Any] | None:
        if pod.status.phase in ("Succeeded", "Failed") or pod.metadata.deletion_timestamp is not None or pod.spec.scheduling_gates:
            return None
        if self.override is not None and (status := self.override(pod)) is not None:
            return status
        if pod.status.phase == "Pending":
            running = {"phase": "Running", "containerStatuses": container_status({"running": {"startedAt": "2026-11-21T12:00:00Z"}})}
            return running
        stage = pod.metadata.labels[names.LABEL_STAGE]
        return None if stage in self.hold or stage not in self.results else ended(0, self.results[stage].dumps())

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        assert not self.broken, self.broken[0]


@pytest.fixture
def kubelet(api: Api) -> Iterator[Kubelet]:
    played = Kubelet(api)
    yield played
    played.stop()


class Operator:
    """The real operator as a process outside the cluster; for the test's namespace alone, if not told otherwise."""

    def __init__(self, api: Api, logs: Path, watch: str | None = None) -> None:
        self.api, self.logs = api, logs
        self.process: subprocess.Popen[bytes] | None = None
        self.probes, self.port = free_port(), free_port()
        self.usual = {"FINETUNE_WATCH_NAMESPACES": api.namespace if watch is None else watch}
        """Settings of every start, if not told otherwise."""
        self.running: dict[str, str] = {}
        """Settings of the last start."""

    def start(self, **settings: str) -> None:
        self.running = {**self.usual, **settings}
        env = {
            **os.environ,
            "PYTHONPATH": f"{REPO}/operator",
            "KUBECONFIG": str(self.api.cluster.kubeconfig),
            "FINETUNE_PROGRESS_URL": "none",
            "FINETUNE_PROGRESS_PORT": str(self.port),
            "FINETUNE_PROBE_PORT": str(self.probes),
            "FINETUNE_STATUS_INTERVAL_SECONDS": "0",
            "FINETUNE_BACKOFF_BASE_SECONDS": "0.5",
            **self.running,
        }
        with self.logs.open("ab") as sink:
            self.process = subprocess.Popen([sys.executable, "-m", "finetune_operator"], env=env, stdout=sink, stderr=subprocess.STDOUT)

    def ensure(self, usual: dict[str, str]) -> None:
        """Have it run with these settings: started anew when it has ended, or was started with others."""
        self.usual = usual
        alive = self.process is not None and self.process.poll() is None
        if alive and self.running != usual:
            self.kill()
        if not alive or self.running != usual:
            self.start()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def module_operator(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """Not started yet: tests that start others of their own belong into a module without it."""
    target = Operator(Api(cluster, "default"), tmp_path_factory.mktemp("operator") / "operator.log", watch="")
    yield target
    if target.process is not None and target.process.poll() is None:
        target.kill()


@pytest.fixture
def operator(module_operator: Operator, request: pytest.FixtureRequest) -> Iterator[Operator]:
    """The operator of the whole cluster, one process for a module's tests: what a test ends or starts otherwise, the next starts anew.

    `@pytest.mark.operator(FINETUNE_NAME="value")` changes its settings.
    """
    settings = {"FINETUNE_WATCH_NAMESPACES": ""}
    for mark in reversed([*request.node.iter_markers("operator")]):  # the closest one has the last word
        settings |= mark.kwargs
    before = module_operator.logs.stat().st_size if module_operator.logs.exists() else 0
    module_operator.ensure(settings)
    yield module_operator
    print(module_operator.logs.read_bytes()[before:].decode()[-6000:])


def until(what: str, check: Callable[[], Any], seconds: float = 40) -> Any:
    """Poll until `check()` is truthy; returns its value."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(client.ApiException):
            if value := check():
                return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.1)


def dump(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True)
