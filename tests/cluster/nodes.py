"""Nodes: a network namespace, a containerd, a kubelet and a kube-proxy each, joined by a bridge on the host."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from . import binaries, images, processes, store
from .certificates import Authority
from .shell import run

BRIDGE = "ftobr0"
HOST = "172.30.0.1"
POD_RANGE = "10.244"


class Node:
    """One node of the local cluster; index 1, 2, ..."""

    def __init__(self, cluster: str, index: int, state: Path) -> None:
        self.cluster, self.index, self.state = cluster, index, state / f"node-{index}"
        self.name = f"node-{index}"
        self.address = f"172.30.0.{10 + index}"
        self.namespace = f"fto-node-{index}"
        self.root = self.state / "containerd"
        self.run_folder = Path(f"/run/finetune-local/{self.name}")
        self.socket = self.run_folder / "containerd.sock"

    def _inside(self, *command: str | Path) -> list[str | Path]:
        # nsenter, not `ip netns exec`: the latter makes a mount namespace too, and a kubelet's mounts must be seen by containerd
        return ["nsenter", f"--net=/run/netns/{self.namespace}", *command]

    def _apart(self, *command: str | Path) -> list[str | Path]:
        """With pod logs of its own: kubelets that share /var/log/pods delete each other's as those of pods that they do not know.

        Every other mount is seen by all, as separate_logs() has left it.
        """
        script = 'mount --bind "$0" /var/log/pods && exec "$@"'
        return ["unshare", "--mount", "--propagation", "unchanged", "sh", "-c", script, self.state / "pod-logs", *self._inside(*command)]

    def connect(self, nodes: list[Node]) -> None:
        """Make the network namespace, its link to the bridge, and routes to the pods of the other nodes."""
        link = f"fto{self.index}"
        run(["ip", "netns", "add", self.namespace])
        run(["ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", self.namespace])
        run(["ip", "link", "set", link, "master", BRIDGE, "up"])
        run(self._inside("ip", "address", "add", f"{self.address}/24", "dev", "eth0"))
        for device in ("lo", "eth0"):
            run(self._inside("ip", "link", "set", device, "up"))
        run(self._inside("ip", "route", "add", "default", "via", HOST))
        for other in nodes:
            if other is not self:
                run(self._inside("ip", "route", "add", f"{POD_RANGE}.{other.index}.0/24", "via", other.address))
        run(["ip", "route", "replace", f"{POD_RANGE}.{self.index}.0/24", "via", self.address])
        run(self._inside("sysctl", "-qw", "net.ipv4.ip_forward=1"))
        run(self._inside("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=1"), check=False)

    def start_runtime(self) -> None:
        """Start containerd, with the images of the store."""
        for folder in (self.run_folder, self.state, self.state / "pod-logs"):
            folder.mkdir(parents=True, exist_ok=True)
        store.copy(self.root)
        network = self.state / "net.d"
        network.mkdir()
        (network / "10-bridge.conflist").write_text(
            json.dumps(
                {
                    "cniVersion": "1.0.0",
                    "name": "pods",
                    "plugins": [
                        {
                            "type": "bridge",
                            "bridge": "cni0",
                            "isGateway": True,
                            "hairpinMode": True,
                            "ipam": {
                                "type": "host-local",
                                "dataDir": str(self.state / "ipam"),
                                "ranges": [[{"subnet": f"{POD_RANGE}.{self.index}.0/24"}]],
                                "routes": [{"dst": "0.0.0.0/0"}],
                            },
                        },
                        {"type": "portmap", "capabilities": {"portMappings": True}},
                    ],
                }
            )
        )
        config = self.state / "containerd.toml"
        config.write_text(
            store.configuration(self.root, self.run_folder / "containerd", self.socket)
            + f"""
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{images.PAUSE}"
[plugins."io.containerd.cri.v1.runtime"]
  # lowering oom_score_adj is forbidden in many sandboxes, and every pod would fail with it
  restrict_oom_score_adj = true
  # the pods' network namespaces lie where `down` finds them
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{binaries.ensure("cni")}"]
    conf_dir = "{network}"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""
        )
        folder = binaries.ensure("containerd")
        command = self._apart(folder / "containerd", "--config", config)
        path = {"PATH": f"{folder}:{os.environ['PATH']}"}  # its shim lies beside it
        processes.start(self.cluster, f"{self.name}-containerd", command, self.state.parent / "logs", env=path)
        store.wait(self.socket, self.state.parent / "logs")

    def start_kubelet(self, kubernetes: Path, authority: Authority, server: str) -> None:
        """Start the kubelet and kube-proxy."""
        certificate, key = authority.issue(self.name, f"system:node:{self.name}", "system:nodes", hosts=[self.address, self.name])
        kubeconfig = authority.kubeconfig(f"kubelet-{self.name}", server, f"system:node:{self.name}", "system:nodes")
        # the pods' resolver: what the machine's own resolv.conf names is not reachable from the node's namespace
        resolver = self.state / "resolv.conf"
        resolver.write_text("")
        config = self.state / "kubelet.json"
        config.write_text(
            json.dumps(
                {
                    "kind": "KubeletConfiguration",
                    "apiVersion": "kubelet.config.k8s.io/v1beta1",
                    "authentication": {
                        "anonymous": {"enabled": False},
                        "x509": {"clientCAFile": str(authority.path)},
                        "webhook": {"enabled": True},
                    },
                    "authorization": {"mode": "Webhook"},
                    "tlsCertFile": str(certificate),
                    "tlsPrivateKeyFile": str(key),
                    "cgroupDriver": "cgroupfs",
                    "cgroupsPerQOS": False,
                    "enforceNodeAllocatable": [],
                    "evictionHard": {
                        "memory.available": "100Mi",
                        "nodefs.available": "1%",
                        "imagefs.available": "1%",
                        "nodefs.inodesFree": "1%",
                    },
                    "imageGCHighThresholdPercent": 100,
                    "clusterDNS": [HOST],
                    "clusterDomain": "cluster.local",
                    "resolvConf": str(resolver),
                    "failSwapOn": False,
                    "failCgroupV1": False,
                    "nodeStatusUpdateFrequency": "5s",
                    "syncFrequency": "20s",
                    "volumePluginDir": str(self.state / "plugins"),
                    "registryPullQPS": 0,
                    "serializeImagePulls": False,
                    "maxPods": 110,
                }
            )
        )
        logs = self.state.parent / "logs"
        processes.start(
            self.cluster,
            f"{self.name}-kubelet",
            self._apart(
                kubernetes / "kubelet", f"--config={config}", f"--kubeconfig={kubeconfig}", f"--hostname-override={self.name}",
                f"--container-runtime-endpoint=unix://{self.socket}", f"--node-ip={self.address}",
                f"--root-dir={self.state}/kubelet", f"--cert-dir={self.state}/pki",
            ),
            logs,
        )  # fmt: skip
        proxy = authority.kubeconfig(f"proxy-{self.name}", server, f"proxy-{self.name}", "system:masters")
        proxy_config = self.state / "proxy.json"
        proxy_config.write_text(
            json.dumps(
                {
                    "kind": "KubeProxyConfiguration",
                    "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                    "clientConnection": {"kubeconfig": str(proxy)},
                    "mode": "iptables",
                    "clusterCIDR": f"{POD_RANGE}.0.0/16",
                    "hostnameOverride": self.name,
                    "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
                }
            )
        )
        command = self._inside(kubernetes / "kube-proxy", f"--config={proxy_config}")
        processes.start(self.cluster, f"{self.name}-kube-proxy", command, logs)

    def remove(self) -> None:
        """End every container, and undo the network and the mounts. Safe to call at any time."""
        # containers outlive their shims, in cgroups that all nodes share; each is in its pod's network or in its node's
        networks = [Path("/run/netns", self.namespace), *self.run_folder.glob("containerd/**/netns/*")]
        processes.end(lambda: processes.in_networks(networks), grace=2)
        run(["ip", "netns", "delete", self.namespace], check=False)
        run(["ip", "link", "delete", f"fto{self.index}"], check=False)
        run(["ip", "route", "delete", f"{POD_RANGE}.{self.index}.0/24"], check=False)
        for folder in (self.state, self.run_folder):
            processes.unmount_below(folder)
        shutil.rmtree(self.run_folder, ignore_errors=True)
        shutil.rmtree(self.state, ignore_errors=True)


def make_bridge() -> None:
    """The bridge that joins the host and all nodes."""
    run(["ip", "link", "add", BRIDGE, "type", "bridge"])
    run(["ip", "address", "add", f"{HOST}/24", "dev", BRIDGE])
    run(["ip", "link", "set", BRIDGE, "up"])


def remove_bridge() -> None:
    """Undo make_bridge."""
    run(["ip", "link", "delete", BRIDGE], check=False)


def separate_logs() -> None:
    """Let every node mount pod logs of its own: what is mounted there spreads to nobody, everything else to all."""
    run(["mount", "--make-rshared", "/"])
    Path("/var/log/pods").mkdir(parents=True, exist_ok=True)
    run(["mount", "--bind", "/var/log/pods", "/var/log/pods"])
    run(["mount", "--make-private", "/var/log/pods"])


def join_logs() -> None:
    """Undo separate_logs, also when it was done more than once."""
    while " /var/log/pods " in Path("/proc/mounts").read_text():
        run(["umount", "-l", "/var/log/pods"])
