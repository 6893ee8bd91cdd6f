"""Memory and time of the inventory at 5,000 nodes and 20,000 pods: `python -m tests.bench.inventory` prints one line of JSON.

Objects are as large as a managed Kubernetes has them: thirty labels, images, conditions, managed fields.
"""

from __future__ import annotations

import gc
import json
import time
import tracemalloc
import uuid
from collections.abc import Callable
from typing import Any

from finetune_operator.cache.inventory import Inventory
from finetune_operator.cluster.inventory import NODE, POD

GPU = "nvidia.com/gpu"


def node(number: int) -> dict[str, Any]:
    """A node with eight GPUs of one of ten pools."""
    name, pool = f"gke-cluster-pool-{number % 10}-{number:08x}-abcd", f"pool-{number % 10}"
    labels = {f"cloud.example.com/label-{n:02}": f"value-{n}-{pool}" for n in range(26)}
    labels |= {
        "kubernetes.io/hostname": name,
        "topology.kubernetes.io/zone": f"zone-{number % 3}",
        "pool": pool,
        "rack": f"rack-{number // 16}",
    }
    allocatable = {
        "cpu": "127610m",
        "memory": f"{1_320_000_000 + number % 7 * 4096}Ki",
        "ephemeral-storage": "2843556925871",
        "hugepages-1Gi": "0",
        "hugepages-2Mi": "0",
        "pods": "110",
        GPU: "8",
    }
    owned = {f"f:label-{n}": {} for n in range(60)}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "uid": str(uuid.UUID(int=number)),
            "resourceVersion": str(number + 1),
            "labels": labels,
            "annotations": {f"annotation-{n}": "x" * 80 for n in range(12)},
            "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:metadata": {"f:labels": owned}}} for _ in range(3)],
        },
        "spec": {"providerID": f"gce://project/zone/{name}", "taints": [{"key": GPU, "value": "present", "effect": "NoSchedule"}]},
        "status": {
            "allocatable": allocatable,
            "capacity": allocatable,
            "conditions": [{"type": kind, "status": "True", "message": "m" * 60} for kind in ("MemoryPressure", "DiskPressure", "Ready")],
            "images": [{"names": [f"registry.example.com/image-{n}@sha256:{n:064x}"], "sizeBytes": 10**9} for n in range(50)],
        },
    }


def pod(number: int, nodes: int) -> dict[str, Any]:
    """A pod of somebody else, bound to one of so many nodes."""
    requests = {"cpu": f"{number % 5 + 1}00m", "memory": f"{number % 3 + 1}28Mi", **({GPU: "1"} if number % 4 == 0 else {})}
    container = {"name": "main", "image": "registry.example.com/image", "env": [{"name": f"E{n}", "value": "v" * 30} for n in range(20)]}
    return {
        "metadata": {"name": f"pod-{number}", "namespace": "team", "uid": str(uuid.uuid5(uuid.NAMESPACE_URL, str(number)))},
        "spec": {"nodeName": node(number % nodes)["metadata"]["name"], "containers": [{**container, "resources": {"requests": requests}}]},
        "status": {"phase": "Running"},
    }


def filled(nodes: int, pods: int) -> Inventory:
    """An inventory of so many, as two LISTs make it."""
    inventory = Inventory()
    inventory.nodes.replace(NODE(json.dumps(node(n)).encode()) for n in range(nodes))
    inventory.pods().replace(POD(json.dumps(pod(n, nodes)).encode()) for n in range(pods))
    inventory.nodes_but_for(())
    return inventory


def allocated(nodes: int, pods: int) -> tuple[int, Inventory]:
    """Bytes that an inventory holds, and it."""
    filled(3, 3)  # what is made once
    gc.collect()
    tracemalloc.start()
    try:
        inventory = filled(nodes, pods)
        gc.collect()
        return tracemalloc.get_traced_memory()[0], inventory
    finally:
        tracemalloc.stop()


def _ms(what: Callable[[], object]) -> float:
    began = time.perf_counter()
    what()
    return round(1000 * (time.perf_counter() - began), 2)


def bench(nodes: int = 5000, pods: int = 20_000) -> dict[str, Any]:
    """Memory, beside that of the raw nodes; microseconds to decode an object; milliseconds of a LIST's end and of a view."""
    held, inventory = allocated(nodes, pods)
    encoded = [json.dumps(node(n)).encode() for n in range(nodes)]
    tracemalloc.start()
    whole = [json.loads(raw) for raw in encoded]
    raw = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del whole
    known, holdings = list(inventory.nodes.items.values()), list(inventory.pods().items.values())
    one = json.dumps(pod(0, nodes)).encode()
    ours = [holding.uid for holding in holdings[:5000]]
    return {
        "nodes": nodes,
        "pods": pods,
        "MiB": round(held / 2**20, 1),
        "rawNodesMiB": round(raw / 2**20, 1),
        "nodeUs": round(_ms(lambda: [NODE(raw) for raw in encoded]) * 1000 / nodes, 1),
        "podUs": round(_ms(lambda: [POD(one) for _ in range(1000)]), 1),
        "replaceNodesMs": _ms(lambda: inventory.nodes.replace(known)),
        "replacePodsMs": _ms(lambda: (inventory.pods().replace([]), inventory.pods().replace(holdings))),
        "viewMs": {
            "5000 pods are ours": _ms(lambda: inventory.nodes_but_for(ours)),
            "nothing has changed": _ms(lambda: inventory.nodes_but_for(ours)),
            "one has changed": _ms(lambda: inventory.nodes_but_for(ours[1:])),
        },
    }


if __name__ == "__main__":
    print(json.dumps(bench()))
