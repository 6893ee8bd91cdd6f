"""Nodes without machines, which are ready as long as somebody renews their leases, jobs for them, and pods that leave them."""

from __future__ import annotations

import contextlib
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import urllib3
from kubernetes import client

from finetune_api.contract import ExitCode, StageResult
from tests.factory import MINIMAL, ended, merged

if TYPE_CHECKING:
    from tests.component.conftest import Api

GPU = "example.com/gpu"
SAVED = ended(int(ExitCode.STOPPED), StageResult(reason="Stopped", message="saved", result={"checkpointStep": 7}).dumps())
AWAY = (client.ApiException, urllib3.exceptions.HTTPError)


class Machines:
    """Nodes of these names, each with the resources given (such as GPUs) beside enough of everything else."""

    def __init__(self, core: client.CoreV1Api, names: list[str], resources: dict[str, str]) -> None:
        self.core, self.names = core, names
        self.leases = client.CoordinationV1Api(core.api_client)
        room = {"cpu": "64", "memory": "512Gi", "pods": "110", **resources}
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": ""}
        for name in names:
            core.create_node({"metadata": {"name": name}})
            core.patch_node_status(name, {"status": {"capacity": room, "allocatable": room, "conditions": [ready]}})
            self.leases.create_namespaced_lease("kube-node-lease", {"metadata": {"name": name}, "spec": self._renewed(name)})
            core.patch_node(name, {"spec": {"taints": []}})
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    @staticmethod
    def _renewed(name: str) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": now}

    def _renew(self) -> None:
        while not self._stop.wait(5):
            for name in self.names:
                with contextlib.suppress(*AWAY):
                    self.leases.patch_namespaced_lease(name, "kube-node-lease", {"spec": self._renewed(name)})

    def close(self) -> None:
        """Delete them."""
        self._stop.set()
        self._thread.join()
        for name in self.names:
            self.core.delete_node(name)


class Leaving:
    """Pods that are deleted save, say so and vanish, as with a kubelet and a trainer."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.saving = False
        """They do not come to an end with it"""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            with contextlib.suppress(client.ApiException):
                for pod in self.api.pods():
                    if pod.metadata.deletion_timestamp is None:
                        if pod.spec.node_name is None and pod.status.phase == "Running":
                            self.bind_to(self.api, pod.metadata.name)
                    elif self.saving:
                        continue
                    elif pod.status.phase == "Running":
                        self.api.set_pod(pod.metadata.name, SAVED)
                    else:
                        self.api.core.delete_namespaced_pod(pod.metadata.name, self.api.namespace, grace_period_seconds=0)

    @staticmethod
    def bind_to(api: Api, name: str) -> None:
        """A pod without a node would be gone at once when it is deleted."""
        target = client.V1ObjectReference(kind="Node", name=api.namespace)
        body = client.V1Binding(metadata=client.V1ObjectMeta(name=name), target=target)
        api.core.create_namespaced_pod_binding(name, api.namespace, body, _preload_content=False)

    def end(self) -> None:
        self._stop.set()
        self._thread.join()


def gpu_job(
    queue: str | None, nodes: int = 1, gpus: int = 1, min_nodes: int | None = None, resource: str = GPU, **scheduling: Any
) -> dict[str, Any]:
    fewest = {"minNodes": min_nodes} if min_nodes is not None else {}
    return merged(
        MINIMAL,
        distribution={"nodes": nodes, "gpusPerNode": gpus, **fewest},
        resources={"gpuResourceName": resource},
        scheduling={**({"queue": queue} if queue is not None else {}), **scheduling},
    )
