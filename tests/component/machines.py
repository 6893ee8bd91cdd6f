"""Nodes without machines: objects of the API that stay ready as long as somebody renews their leases."""

from __future__ import annotations

import contextlib
import threading
from datetime import UTC, datetime
from typing import Any

import urllib3
from kubernetes import client

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
