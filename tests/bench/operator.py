"""API writes per job, and time from apply to all pods created, beside a plain batch/v1 Job of as many pods.

Both are read from the API server's audit log, so neither side measures itself. The arms take turns. The control
plane has no nodes; pods of prepare are ended by hand at once. The controller manager's client limits are raised
(see control_plane.py), else it would be the slower side by its default of 20 requests a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client, config

from finetune_api import GROUP, PLURAL, VERSION, names
from finetune_api.crd import crd
from tests.cluster import binaries, control_plane, debian, processes
from tests.cluster.shell import CACHE, REPO
from tests.factory import MINIMAL, PREPARED, container_status, ended, merged

NAME = "bench"
PODS, ROUNDS = 8, 7
OPERATOR = "bench-operator"
_WRITES = {"create", "update", "patch", "delete", "deletecollection"}
_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "None", "verbs": ["get", "list", "watch"]}, {"level": "Metadata"}],
}


def bench() -> dict[str, Any]:
    """Median and spread of both arms, and their ratios."""
    state = CACHE / "clusters" / NAME
    processes.end(lambda: processes.of(NAME))
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    (state / "policy.yaml").write_text(yaml.safe_dump(_POLICY))
    audit = state / "audit.log"
    debian.ensure(debian.RUNTIME)
    flags = [f"--audit-policy-file={state}/policy.yaml", f"--audit-log-path={audit}", "--audit-log-mode=blocking"]
    operator: subprocess.Popen[bytes] | None = None
    try:
        authority, admin = control_plane.start(
            NAME, state, binaries.ensure(binaries.NEWEST), "127.0.0.1", extra_apiserver=flags, controllers=control_plane.WITHOUT_NODES
        )
        server = yaml.safe_load(admin.read_text())["clusters"][0]["cluster"]["server"]
        own = authority.kubeconfig("operator", server, OPERATOR, "system:masters")
        connection = config.new_client_from_config(str(admin))
        core, batch, custom = client.CoreV1Api(connection), client.BatchV1Api(connection), client.CustomObjectsApi(connection)
        custom.create_cluster_custom_object("apiextensions.k8s.io", "v1", "customresourcedefinitions", crd())
        env = {
            **os.environ,
            "PYTHONPATH": f"{REPO}/operator",
            "KUBECONFIG": str(own),
            "FINETUNE_PROGRESS_URL": "none",
            "FINETUNE_PROGRESS_PORT": str(control_plane.free_port()),
            "FINETUNE_PROBE_PORT": str(control_plane.free_port()),
        }
        time.sleep(3)
        operator = subprocess.Popen(
            [sys.executable, "-m", "finetune_operator"], env=env, stdout=(state / "operator.log").open("wb"), stderr=subprocess.STDOUT
        )
        time.sleep(4)
        ours, theirs = [], []
        for index in range(ROUNDS + 1):  # the first round warms both up and is not counted
            ours.append(_finetune_job(core, custom, audit, f"ours-{index}"))
            theirs.append(_plain_job(core, batch, audit, f"plain-{index}"))
        return _summary(ours[1:], theirs[1:])
    finally:
        if operator is not None:
            operator.kill()
        processes.end(lambda: processes.of(NAME))
        shutil.rmtree(state, ignore_errors=True)


def _namespace(core: client.CoreV1Api, name: str) -> None:
    core.create_namespace({"metadata": {"name": name}})
    while True:
        with contextlib.suppress(client.ApiException):
            core.read_namespaced_service_account("default", name)
            return
        time.sleep(0.05)


def _finetune_job(core: client.CoreV1Api, custom: client.CustomObjectsApi, audit: Path, name: str) -> dict[str, float]:
    _namespace(core, name)
    spec = merged(MINIMAL, distribution={"nodes": PODS, "gpusPerNode": 0})
    body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "FineTuneJob", "metadata": {"name": "job"}, "spec": spec}
    custom.create_namespaced_custom_object(GROUP, VERSION, name, PLURAL, body)
    prepared = None
    while True:
        pods = core.list_namespaced_pod(name).items
        for pod in pods:
            if pod.metadata.labels.get(names.LABEL_STAGE) == "prepare" and pod.status.phase == "Pending":
                core.patch_namespaced_pod_status(pod.metadata.name, name, {"status": ended(0, PREPARED.dumps())})
                prepared = pod.metadata.name
        workers = [p for p in pods if p.metadata.labels.get(names.LABEL_STAGE) == "train"]
        if len(workers) == PODS:
            break
        time.sleep(0.01)
    running = {"phase": "Running", "containerStatuses": container_status({"running": {"startedAt": "2026-11-21T12:00:00Z"}})}
    for worker in workers:
        core.patch_namespaced_pod_status(worker.metadata.name, name, {"status": running})
    _until(
        lambda: (custom.get_namespaced_custom_object(GROUP, VERSION, name, PLURAL, "job").get("status") or {}).get("phase") == "Training"
    )
    time.sleep(1)
    events = _events(audit, name)
    applied = _time(next(e for e in events if e["objectRef"]["resource"] == PLURAL and e["verb"] == "create"))
    done = _time(next(e for e in events if e["objectRef"].get("name") == prepared and e["objectRef"].get("subresource") == "status"))
    created = [
        _time(e) for e in events if e["user"]["username"] == OPERATOR and e["objectRef"]["resource"] == "pods" and e["verb"] == "create"
    ]
    assert len(created) == PODS
    writes = [e for e in events if e["user"]["username"] == OPERATOR]
    return {"writes": len(writes), "seconds": max(created) - applied, "gang_seconds": max(created) - done}


def _plain_job(core: client.CoreV1Api, batch: client.BatchV1Api, audit: Path, name: str) -> dict[str, float]:
    _namespace(core, name)
    container = {"name": "c", "image": "i"}
    spec = {
        "parallelism": PODS,
        "completions": PODS,
        "template": {"spec": {"restartPolicy": "Never", "containers": [container]}},
    }
    batch.create_namespaced_job(name, {"metadata": {"name": "job"}, "spec": spec})
    _until(lambda: len(core.list_namespaced_pod(name).items) == PODS)
    time.sleep(1)
    events = _events(audit, name)
    applied = _time(next(e for e in events if e["objectRef"]["resource"] == "jobs" and e["verb"] == "create"))
    made = [e for e in events if e["userAgent"].startswith("kube-controller-manager")]
    created = [_time(e) for e in made if e["objectRef"]["resource"] == "pods" and e["verb"] == "create"]
    assert len(created) == PODS
    mine = [e for e in made if e["objectRef"]["resource"] in ("pods", "jobs", "events")]
    return {"writes": len(mine), "seconds": max(created) - applied}


def _until(check: Any) -> None:
    deadline = time.monotonic() + 60
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError("not within 60 s")
        time.sleep(0.01)


def _events(audit: Path, namespace: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in audit.read_text().splitlines()]
    return [
        e
        for e in found
        if (e.get("objectRef") or {}).get("namespace") == namespace and e["verb"] in _WRITES and e["responseStatus"]["code"] < 400
    ]


def _time(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["stageTimestamp"]).timestamp()


def _summary(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, Any]:
    def median(rows: list[dict[str, float]], key: str) -> float:
        return round(statistics.median(row[key] for row in rows), 4)

    return {
        "pods": PODS,
        "rounds": ROUNDS,
        "api_writes": {"finetune": median(ours, "writes"), "job": median(theirs, "writes")},
        "api_writes_ratio": round(median(ours, "writes") / median(theirs, "writes"), 2),
        "seconds_apply_to_pods": {"finetune": median(ours, "seconds"), "job": median(theirs, "seconds")},
        "seconds_prepared_to_pods": median(ours, "gang_seconds"),
        "seconds_ratio_of_the_gang": round(median(ours, "gang_seconds") / median(theirs, "seconds"), 2),
        "spread": {
            "finetune": [round(min(r["gang_seconds"] for r in ours), 4), round(max(r["gang_seconds"] for r in ours), 4)],
            "job": [round(min(r["seconds"] for r in theirs), 4), round(max(r["seconds"] for r in theirs), 4)],
        },
    }
