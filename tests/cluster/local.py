"""A cluster of plain processes: control plane, two nodes, DNS, volumes, images."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from . import addons, binaries, control_plane, debian, images, machine, nodes, processes, store
from .control_plane import wait_for
from .environment import site_packages
from .shell import CACHE, REPO, CommandFailed, digest_of, run, say, step

GPUS_PER_NODE = 8
_STORAGE_CLASS = {
    "apiVersion": "storage.k8s.io/v1",
    "kind": "StorageClass",
    "metadata": {
        "name": addons.STORAGE_CLASS,
        "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
    },
    "provisioner": "finetune.dev/local",
}


@dataclasses.dataclass(frozen=True)
class LocalCluster:
    """A cluster of this machine; `size` nodes, none for a bare control plane; which Kubernetes: a folder of `go/`."""

    name: str
    size: int = 2
    kubernetes: str = binaries.NEWEST

    @property
    def state(self) -> Path:
        """Everything of the running cluster; gone when it is down."""
        return CACHE / "clusters" / self.name

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.state / "pki" / "admin.kubeconfig"

    @property
    def _made_of(self) -> Path:
        return self.state / "made-of"

    @property
    def volumes(self) -> Path:
        """Folders behind the claims."""
        return self.state / "volumes"

    def kubectl(self, *words: str, input: str | None = None, check: bool = True) -> str:
        """Run kubectl as the administrator."""
        return run([kubectl(), "--kubeconfig", self.kubeconfig, *words], input=input, check=check)

    def define(self, resources: Path) -> None:
        """Apply CustomResourceDefinitions, and what comes with them, and wait until they are served (`kubectl wait` fails while a status is still empty)."""

        def served() -> bool:
            found = json.loads(self.kubectl("get", "-f", str(resources), "-o", "json"))
            return all(
                any(c["type"] == "Established" and c["status"] == "True" for c in item.get("status", {}).get("conditions") or [])
                for item in found.get("items", [found])
                if item["kind"] == "CustomResourceDefinition"
            )

        self.kubectl("apply", "--server-side", "-f", str(resources))  # the client's copy in an annotation would be too long
        wait_for(f"the resources of {resources.name}", served, 60, self.state / "logs")

    def is_up(self) -> bool:
        """Whether it runs as this checkout would start it, and its nodes are ready."""
        if not self.kubeconfig.exists() or not processes.of(self.name):
            return False
        if not self._made_of.exists() or self._made_of.read_text() != _sources():
            return False
        try:
            found = json.loads(self.kubectl("get", "nodes", "-o", "json", "--request-timeout=5s"))["items"]
        except (CommandFailed, ValueError):
            return False
        ready = [n for n in found if any(c["type"] == "Ready" and c["status"] == "True" for c in n["status"]["conditions"])]
        return len(ready) == self.size

    def up(self, *, load: list[images.Image] | None = None) -> None:
        """Bring it up, from whatever state a killed run left; keep it when it is up already."""
        load = [images.pause(), *(load or [])] if self.size else []
        if self.is_up():
            say(f"local cluster {self.name} is up")
            store.ensure(load)
            for image in load:
                self.load(image)
        else:
            machine.check()
            if self.size:
                debian.ensure(debian.RUNTIME)
                store.ensure(load)
            built = binaries.ensure(self.kubernetes)
            self.down(quiet=True)
            with step(f"starting Kubernetes {binaries.version(self.kubernetes)} ({self.size} nodes)"):
                self._start(built)

    def _running(self, name: str) -> dict[int, list[str]]:
        """Commands of the processes of that name."""
        found = {}
        for pid in processes.of(self.name):
            with contextlib.suppress(OSError):
                words = [word.decode() for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") if word]
                if words and Path(words[0]).name == name:
                    found[pid] = words
        return found

    def signal(self, name: str, number: signal.Signals, argument: str = "") -> None:
        """Send a signal to the processes of that name, of those only that have such an argument."""
        for pid, words in self._running(name).items():
            if any(argument in word for word in words):
                os.kill(pid, number)

    def restart(self, name: str) -> None:
        """Kill a process of the control plane, and start it again with the same command until it stays: its port may be taken."""
        commands = list(self._running(name).values())
        self.signal(name, signal.SIGKILL)
        wait_for(f"the end of {name}", lambda: not self._running(name), 10)

        def stays(words: list[str]) -> bool:
            processes.start(self.name, name, [*words], self.state / "logs")
            time.sleep(0.5)
            return bool(self._running(name))

        for words in commands:
            wait_for(f"{name} again", functools.partial(stays, words), 60, self.state / "logs")

    def load(self, image: images.Image) -> None:
        """Put an image on every node that lacks it; its lower layers are there from the start."""
        store.ensure([image])
        for node in self._nodes():
            if image.reference not in run([*store.ctr(node.socket), "images", "ls", "--quiet"]).split():
                store.put(image, node.socket)

    def _nodes(self) -> list[nodes.Node]:
        return [nodes.Node(self.name, index, self.state) for index in range(1, self.size + 1)]

    def _start(self, built: Path) -> None:
        self.state.mkdir(parents=True)
        self._made_of.write_text(_sources())
        self.volumes.mkdir()
        address = "127.0.0.1"
        if self.size:
            address = nodes.HOST
            nodes.separate_logs()
            nodes.make_bridge()
        controllers = "*" if self.size else control_plane.WITHOUT_NODES
        authority, kubeconfig = control_plane.start(self.name, self.state, built, address, controllers=controllers)
        if not self.size:
            return
        members = self._nodes()
        for node in members:
            node.connect(members)
            node.start_runtime()
            node.start_kubelet(built, authority, f"https://{address}:6443")
        processes.start(
            self.name,
            "addons",
            [sys.executable, "-m", "tests.cluster.addons", kubeconfig, address, self.volumes],
            self.state / "logs",
            env={"PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])},
        )
        self.kubectl("apply", "--validate=false", "-f", "-", input=json.dumps(_STORAGE_CLASS))
        wait_for("nodes", self.is_up, 120, self.state / "logs")
        for node in members:
            self._pretend_gpus(node.name)

    def _pretend_gpus(self, node: str) -> None:
        patch = [
            {"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": str(GPUS_PER_NODE)},
            {"op": "add", "path": "/status/allocatable/nvidia.com~1gpu", "value": str(GPUS_PER_NODE)},
        ]
        script = (
            "import sys, json; from kubernetes import client, config; config.load_kube_config(sys.argv[1]);"
            "client.CoreV1Api().patch_node_status(sys.argv[2], json.loads(sys.argv[3]))"
        )
        run([sys.executable, "-c", script, self.kubeconfig, node, json.dumps(patch)])

    def down(self, *, quiet: bool = False) -> None:
        """End everything that belongs to it, in whatever state it is. Images stay cached."""
        if not quiet:
            say(f"stopping local cluster {self.name}")
        processes.end(lambda: processes.of(self.name))
        if self.size:
            for node in self._nodes():
                node.remove()
            nodes.remove_bridge()
            nodes.join_logs()
        processes.unmount_below(self.state)
        shutil.rmtree(self.state, ignore_errors=True)


def _sources() -> str:
    """What decides how it is started."""
    return digest_of(*(Path(__file__).with_name(name) for name in ("control_plane.py", "nodes.py", "local.py", "store.py")))


def kubectl() -> Path:
    """The kubectl binary of the environment."""
    return site_packages("dev") / "bin" / "kubectl"
