"""The inventory's watches on a real API server: nodes, bound pods and queues come, change and go; nothing is listed twice."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from kubernetes import client

from finetune_api import GROUP, VERSION
from finetune_api.queue import QUEUE_KIND, QUEUE_PLURAL
from finetune_operator.cluster.connect import connect
from finetune_operator.cluster.inventory import InventoryWatch
from finetune_operator.cluster.transport import KubernetesCluster
from finetune_operator.model.queueing import Node
from finetune_operator.settings import Settings
from tests.component.conftest import Api
from tests.component.machines import GPU

READY = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": ""}


class Eyes:
    """An inventory that is kept up, and how often it was said to be different."""

    def __init__(self, cluster: KubernetesCluster) -> None:
        self.cluster, self.pokes = cluster, 0
        self.watch = InventoryWatch(cluster, Settings(), self._poked)

    def _poked(self) -> None:
        self.pokes += 1

    def node(self, name: str) -> Node | None:
        return next((found for found in self.watch.inventory.nodes_but_for(()) or () if found.name == name), None)

    def used(self, name: str) -> dict[str, int]:
        found = self.node(name)
        return dict(found.used) if found is not None else {}


async def until(what: str, condition: Callable[[], object]) -> None:
    for _ in range(300):
        if condition():
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"not within 30 s: {what}")


@pytest.fixture
async def eyes(api: Api) -> AsyncIterator[Eyes]:
    cluster = await connect(kubeconfig=str(api.cluster.kubeconfig))
    target = Eyes(cluster)
    task = asyncio.create_task(target.watch.run())
    await asyncio.sleep(0)  # it runs
    await target.watch.look()
    yield target
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await cluster.close()


@pytest.fixture
def node(api: Api) -> Iterator[str]:
    name = f"n-{uuid.uuid4().hex[:8]}"
    room = {"cpu": "63500m", "memory": "512Gi", "pods": "110", GPU: "8"}
    api.core.create_node({"metadata": {"name": name, "labels": {"rack": "r1"}}})
    api.core.patch_node_status(name, {"status": {"capacity": room, "allocatable": room, "conditions": [READY]}})
    yield name
    with contextlib.suppress(client.ApiException):
        api.core.delete_node(name)


def bound(api: Api, name: str, node: str, gpus: int) -> None:
    requests = {"cpu": "1500m", **({GPU: str(gpus)} if gpus else {})}
    container = {"name": "main", "image": "none", "resources": {"requests": requests, "limits": {GPU: str(gpus)} if gpus else {}}}
    # the taints that the node controller gives a node without a kubelet keep no bound pod away, and evict no tolerating one
    body = {"metadata": {"name": name}, "spec": {"nodeName": node, "containers": [container], "tolerations": [{"operator": "Exists"}]}}
    api.core.create_namespaced_pod(api.namespace, body)


async def test_nodes_and_what_pods_hold_of_them(api: Api, eyes: Eyes, node: str) -> None:
    await until("the node is seen", lambda: (found := eyes.node(node)) is not None and found.allocatable.get(GPU) == 8)
    found = eyes.node(node)
    assert found is not None and found.labels["rack"] == "r1" and found.allocatable["cpu"] == 63_500
    assert eyes.pokes > 0
    for name, gpus in (("a", 2), ("b", 0)):
        bound(api, name, node, gpus)
    await until("both count", lambda: eyes.used(node) == {"cpu": 3000, GPU: 2})
    api.core.patch_namespaced_pod_status("a", api.namespace, {"status": {"phase": "Succeeded"}})
    await until("one that has ended holds nothing", lambda: eyes.used(node) == {"cpu": 1500})
    api.core.delete_namespaced_pod("b", api.namespace, grace_period_seconds=0)
    await until("nothing is held", lambda: eyes.used(node) == {})
    api.core.patch_node(node, {"spec": {"unschedulable": True}, "metadata": {"labels": {"rack": "r2"}}})
    await until("it is cordoned", lambda: (now := eyes.node(node)) is not None and bool(now.away) and now.labels["rack"] == "r2")
    api.core.delete_node(node)
    await until("it is gone", lambda: eyes.node(node) is None)
    assert {reflector.lists for reflector in eyes.watch.reflectors} == {1}
    assert {state for state, _ in eyes.watch.states.values()} == {"synced"}


async def test_queues_priorities_and_namespaces(api: Api, eyes: Eyes) -> None:
    name, inventory = f"q-{uuid.uuid4().hex[:6]}", eyes.watch.inventory
    flavor = {"name": "any", "resourceName": GPU, "nominalQuota": 3}
    body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": QUEUE_KIND, "metadata": {"name": name}, "spec": {"flavors": [flavor]}}
    api.custom.create_cluster_custom_object(GROUP, VERSION, QUEUE_PLURAL, body)
    try:
        await until("the queue is seen", lambda: name in inventory.queues.parsed)
        pokes = eyes.pokes
        status = {"pending": 4, "admitted": 0, "used": 0, "nominal": 3, "borrowed": 0, "share": "0"}
        answer = await eyes.cluster.replace_status({**inventory.queues.items[name], "status": status})
        await until("its status comes back", lambda: inventory.queues.items[name].get("status") == answer["status"])
        assert eyes.pokes == pokes, "what the operator writes itself is no news"
    finally:
        api.custom.delete_cluster_custom_object(GROUP, VERSION, QUEUE_PLURAL, name)
    await until("it is gone", lambda: name not in inventory.queues.parsed)
    assert inventory.priorities.values["system-node-critical"] > 10**9
    assert api.namespace in dict(inventory.namespaces.items.values())


async def test_what_happened_while_no_watch_ran_is_told_when_it_is_resumed(api: Api, node: str) -> None:
    cluster = await connect(kubeconfig=str(api.cluster.kubeconfig))
    eyes = Eyes(cluster)
    reflector = next(r for r in eyes.watch.reflectors if r.kind == "Node")
    try:
        await reflector.list()
        assert eyes.node(node) is not None
        api.core.delete_node(node)
        await asyncio.sleep(1)
        task = asyncio.create_task(reflector.run())
        await until("the node is gone", lambda: eyes.node(node) is None)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert reflector.lists == 1 and reflector.state == "synced"
    finally:
        await cluster.close()
