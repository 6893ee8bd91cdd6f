"""The same cluster on a machine with Docker and kind: current Kubernetes, images built from the Dockerfiles."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from . import images
from .local import kubectl
from .shell import CACHE, REPO, CommandFailed, run, step

_CONFIG = {
    "kind": "Cluster",
    "apiVersion": "kind.x-k8s.io/v1alpha4",
    "nodes": [{"role": "control-plane"}, {"role": "worker"}, {"role": "worker"}],
}


@dataclasses.dataclass(frozen=True)
class KindCluster:
    """A kind cluster with one control-plane node and two workers."""

    name: str

    @staticmethod
    def docker_answers() -> bool:
        """Whether a Docker engine runs (the client alone is not enough)."""
        if not shutil.which("docker"):
            return False
        try:
            run(["docker", "info"], timeout=20)
        except (CommandFailed, OSError, TimeoutError):
            return False
        return True

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
        """Build an image from its Dockerfile and load it into the nodes."""
        dockerfile = REPO / ("trainer_image" if image.reference.startswith(f"{images.TRAINER}:") else "operator") / "Dockerfile"
        with step(f"building {image.reference}"):
            run(["docker", "build", "--build-arg", "DEVICE=cpu", "-t", image.reference, "-f", dockerfile, REPO])
            run(["kind", "load", "docker-image", "--name", self.name, image.reference])

    def down(self) -> None:
        """Delete it."""
        run(["kind", "delete", "cluster", "--name", self.name])
