"""The same cluster on a machine with Docker and kind: the same version of Kubernetes, and images from the same Dockerfiles."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from . import binaries, images
from .local import kubectl
from .shell import CACHE, run, step

_CONFIG = {
    "kind": "Cluster",
    "apiVersion": "kind.x-k8s.io/v1alpha4",
    "nodes": [
        {"role": role, "image": f"kindest/node:{binaries.version(binaries.NEWEST)}"} for role in ("control-plane", "worker", "worker")
    ],
}


@dataclasses.dataclass(frozen=True)
class KindCluster:
    """A kind cluster with one control-plane node and two workers."""

    name: str

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return CACHE / "clusters" / f"{self.name}.kubeconfig"

    def kubectl(self, *words: str, input: str | None = None, check: bool = True) -> str:
        """Run kubectl as the administrator."""
        return run([kubectl(), "--kubeconfig", self.kubeconfig, *words], input=input, check=check)

    def is_up(self) -> bool:
        """Whether kind knows it."""
        return self.name in run(["kind", "get", "clusters"], check=False).split()

    def up(self, *, load: list[images.Image] | None = None) -> None:
        """Create it unless it exists, and load the images."""
        self.kubeconfig.parent.mkdir(parents=True, exist_ok=True)
        if not self.is_up():
            with step("creating a kind cluster"):
                run(
                    ["kind", "create", "cluster", "--name", self.name, "--kubeconfig", self.kubeconfig, "--config", "-", "--wait", "180s"],
                    input=json.dumps(_CONFIG),
                )
        run(["kind", "export", "kubeconfig", "--name", self.name, "--kubeconfig", self.kubeconfig])
        for image in load or []:
            self.load(image)

    def load(self, image: images.Image) -> None:
        """Load an image into the nodes."""
        with step(f"loading {image.reference}"):
            run(["kind", "load", "docker-image", "--name", self.name, image.reference])

    def down(self) -> None:
        """Delete it."""
        run(["kind", "delete", "cluster", "--name", self.name])
