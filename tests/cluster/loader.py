"""Copy files into and out of a claim, through a pod that mounts it: works in any cluster."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from . import images


class Kubectl(Protocol):
    """Anything that runs kubectl."""

    def kubectl(self, *words: str, input: str | None = None, check: bool = True) -> str:
        """Run kubectl and return its output."""


@contextlib.contextmanager
def mounted(cluster: Kubectl, namespace: str, claim: str, **others: str) -> Iterator[str]:
    """A pod that has the claim at /volume, and others at the folders by whose names they are given; its name."""
    places = {"volume": claim, **others}
    name = f"loader-{claim}"
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "loader",
                    "image": images.trainer().reference,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["sleep", "3600"],
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "volumeMounts": [{"name": place, "mountPath": f"/{place}"} for place in places],
                }
            ],
            "volumes": [{"name": place, "persistentVolumeClaim": {"claimName": name}} for place, name in places.items()],
        },
    }
    cluster.kubectl("delete", "pod", name, "-n", namespace, "--ignore-not-found", "--wait")
    cluster.kubectl("apply", "-f", "-", input=json.dumps(pod))
    try:
        cluster.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "-n", namespace, "--timeout=300s")
        yield name
    finally:
        cluster.kubectl("delete", "pod", name, "-n", namespace, "--wait=false")


def put(cluster: Kubectl, namespace: str, claim: str, folder: Path) -> None:
    """Copy a folder into the claim, under its own name."""
    with mounted(cluster, namespace, claim) as pod:
        cluster.kubectl("cp", "--no-preserve", str(folder), f"{namespace}/{pod}:/volume/{folder.name}")
        cluster.kubectl("exec", "-n", namespace, pod, "--", "chmod", "-R", "a+rX", f"/volume/{folder.name}")


def listing(cluster: Kubectl, namespace: str, claim: str, path: str) -> list[str]:
    """Names in a folder of the claim."""
    with mounted(cluster, namespace, claim) as pod:
        return cluster.kubectl("exec", "-n", namespace, pod, "--", "ls", f"/volume/{path}").split()
