"""What is kept of nodes, pods, queues and the rest: kept up by events, no more of it than decisions need."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_operator.cache.inventory import Inventory
from finetune_operator.cluster.errors import APIError
from finetune_operator.cluster.inventory import NAMESPACE, NODE, POD, PRIORITY, QUEUE, InventoryWatch
from finetune_operator.model.queueing import Namespace, Node
from finetune_operator.settings import Settings
from tests.bench.inventory import GPU, allocated, node, pod
from tests.listing import InMemory

Object = dict[str, Any]


def read(reader: Any, raw: Object) -> Any:
    return reader(json.dumps(raw).encode())


def holding(name: str, on: str, cpu: str) -> Any:
    resources = {"requests": {"cpu": cpu}, "limits": {"cpu": "99"}}
    return read(POD, {"metadata": {"uid": name}, "spec": {"nodeName": on, "containers": [{"resources": resources}]}})


class Pokes:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@pytest.fixture
def pokes() -> Pokes:
    return Pokes()


@pytest.fixture
def inventory(pokes: Pokes) -> Inventory:
    found = Inventory(pokes)
    found.nodes.replace([read(NODE, {**node(n), "metadata": {"name": f"n{n}", "labels": {"zone": f"z{n}"}}}) for n in range(3)])
    return found


def cpu_used(inventory: Inventory, *ours: str) -> dict[str, int]:
    nodes = inventory.nodes_but_for(ours)
    assert nodes is not None
    return {found.name: found.used.get("cpu", 0) for found in nodes if found.used}


def test_five_thousand_nodes_and_what_their_pods_hold_are_small() -> None:
    """Ten megabytes for 5,000 nodes with four pods each; in raw objects it was 177. A tenth of them here, with room to spare."""
    held, inventory = allocated(500, 2000)
    assert held / 500 < 2400, f"{held / 500:.0f} bytes per node, its pods included"
    assert len(inventory.nodes.items) == 500 and len(inventory.pods().items) == 2000


def test_a_node_is_what_decisions_need_and_nothing_else() -> None:
    raw = node(7)
    found = read(NODE, raw)
    assert dict(found.labels) == raw["metadata"]["labels"] and found.labels.get("pool") == "pool-7" and found.labels.get("none") is None
    assert found.labels == read(NODE, raw).labels and found.labels != read(NODE, node(8)).labels and found.labels == dict(found.labels)
    assert (found.allocatable["cpu"], found.allocatable[GPU]) == (127_610, 8)
    assert [taint.key for taint in found.taints] == [GPU]
    assert read(NODE, node(17)).taints is found.taints, "kept once"
    assert isinstance(found, Node) and not hasattr(found, "__dict__")
    for broken in (b"{}", b'{"metadata": {"name": "n", "labels": 5}}', b'{"metadata"'):
        with pytest.raises((ValueError, KeyError)):
            NODE(broken)


def test_pods_come_change_and_go(inventory: Inventory, pokes: Pokes) -> None:
    before, pods = pokes.count, inventory.pods()
    for found in (holding("a", "n0", "2"), holding("b", "n0", "500m"), holding("c", "n1", "1"), holding("d", "unknown", "1")):
        pods.put(found)
        pods.put(found)  # events may come twice
    assert cpu_used(inventory) == {"n0": 2500, "n1": 1000}
    pods.put(holding("a", "n0", "1"))  # resized in place
    pods.drop(holding("c", "n1", "1"))
    pods.drop(holding("c", "n1", "1"))
    assert cpu_used(inventory) == {"n0": 1500}
    pods.replace([holding("e", "n2", "3")])
    assert cpu_used(inventory) == {"n2": 3000}
    assert pokes.count == before, "they come and go all the time: seen by the next pass, not a reason for one"


def test_pods_of_ours_are_counted_with_their_job(inventory: Inventory) -> None:
    pods = inventory.pods()
    pods.replace([holding(uid, "n0", "1") for uid in ("a", "b", "c")])
    assert cpu_used(inventory, "a", "b", "not seen yet") == {"n0": 1000}
    pods.put(holding("not seen yet", "n1", "1"))
    pods.put(holding("a", "n0", "4"))
    pods.drop(holding("b", "n0", "1"))
    assert cpu_used(inventory, "a", "not seen yet") == {"n0": 1000}
    assert cpu_used(inventory) == {"n0": 5000, "n1": 1000}, "their job is gone: they hold it still"


def test_the_end_of_a_pod_that_was_ours_pokes(inventory: Inventory, pokes: Pokes) -> None:
    """The store may have heard of it first: a pass that came in between took it for somebody else's."""
    pods = inventory.pods()
    pods.replace([holding(uid, "n0", "1") for uid in ("a", "b", "c")])
    assert cpu_used(inventory, "a", "b") == {"n0": 1000}
    assert cpu_used(inventory) == {"n0": 3000}
    before = pokes.count
    pods.drop(holding("c", "n0", "1"))
    assert pokes.count == before, "never ours"
    pods.drop(holding("a", "n0", "1"))
    assert pokes.count == before + 1
    pods.replace([])
    assert pokes.count == before + 2 and cpu_used(inventory) == {}


def test_a_view_is_made_anew_only_where_something_changed(inventory: Inventory) -> None:
    first = inventory.nodes_but_for(())
    assert first is inventory.nodes_but_for(())
    inventory.pods().put(holding("a", "n1", "1"))
    second = inventory.nodes_but_for(())
    assert first is not None and second is not None
    assert [old is new for old, new in zip(first, second, strict=True)] == [True, False, True]
    inventory.nodes.drop(second[0])
    assert [found.name for found in inventory.nodes_but_for(()) or ()] == ["n1", "n2"]
    assert [found.name for found in first] == ["n0", "n1", "n2"], "a snapshot stays what it was"


def test_a_node_pokes_when_it_is_different_and_not_with_each_heartbeat(inventory: Inventory, pokes: Pokes) -> None:
    raw = {**node(0), "metadata": {"name": "n0", "labels": {"zone": "z0"}}}
    before = pokes.count
    inventory.nodes.put(read(NODE, {**raw, "status": {**raw["status"], "images": []}}))
    assert pokes.count == before
    inventory.nodes.put(read(NODE, {**raw, "spec": {"unschedulable": True}}))
    assert pokes.count == before + 1


def test_nodes_that_may_not_be_seen_are_none_not_no_nodes(inventory: Inventory) -> None:
    inventory.nodes.refuse(403, "nodes is forbidden")
    assert inventory.nodes_but_for(()) is None and inventory.nodes.refused == (403, "nodes is forbidden")
    inventory.nodes.replace([])
    assert inventory.nodes_but_for(()) == ()


def test_namespaces_and_priorities(inventory: Inventory) -> None:
    raw = {"metadata": {"name": "team", "labels": {"a": "b"}, "annotations": {"finetune.dev/queue": "q", "other": "x"}}}
    inventory.namespaces.put(read(NAMESPACE, raw))
    (found,) = dict(inventory.namespaces.items.values()).values()
    assert isinstance(found, Namespace) and found.labels == {"a": "b"}
    for name, value, default in (("low", 1, True), ("high", 9, False)):
        inventory.priorities.put(read(PRIORITY, {"metadata": {"name": name}, "value": value, "globalDefault": default}))
    before = inventory.priorities.values
    assert before == {"low": 1, "high": 9} and inventory.priorities.default == 1
    inventory.priorities.drop(read(PRIORITY, {"metadata": {"name": "low"}, "value": 1}))
    assert inventory.priorities.values == {"high": 9} and inventory.priorities.default == 0
    assert before == {"low": 1, "high": 9}, "who has looked with it sees that it is another now"


def queue(version: int, quota: int = 1, **status: Any) -> Object:
    flavor = {"name": "any", "resourceName": GPU, "nominalQuota": quota}
    meta = {"name": "q", "uid": "u", "resourceVersion": str(version), "managedFields": [{}]}
    found: Object = read(QUEUE, {"metadata": meta, "spec": {"flavors": [flavor]}, "status": status})
    return found


def test_a_queue_is_parsed_and_its_own_status_pokes_nobody(inventory: Inventory, pokes: Pokes) -> None:
    queues, before = inventory.queues, pokes.count
    queues.put(queue(5))
    assert queues.parsed["q"].spec.flavors[0].nominal_quota == 1 and "managedFields" not in queues.items["q"]["metadata"]
    queues.put(queue(7, pending=1))  # the answer to the operator's own write
    queues.put(queue(6))  # an older event comes late
    assert queues.items["q"]["status"] == {"pending": 1}
    assert pokes.count == before + 1
    queues.put(queue(8, quota=4))
    assert queues.parsed["q"].spec.flavors[0].nominal_quota == 4 and pokes.count == before + 2
    queues.replace([queue(3, quota=2)])
    assert queues.parsed["q"].spec.flavors[0].nominal_quota == 2, "a server that was restored from a backup is right all the same"
    queues.replace([])
    assert not queues.items and not queues.parsed


class Server(InMemory):
    async def list(self, kind: str, namespace: str = "", selector: str = "") -> Any:
        for raw in {"Node": [node(0)], "Pod": [pod(0, 1), {"metadata": {"uid": "no node"}, "spec": {}}]}.get(kind, []):
            yield raw


async def test_who_does_not_watch_looks() -> None:
    watch = InventoryWatch(Server(), Settings())  # type: ignore[arg-type]
    (found,) = (await watch.look()).nodes_but_for(()) or ()
    assert found.used == {"cpu": 100, "memory": 128 * 2**20, GPU: 1}
    assert {state for state, _ in watch.states.values()} == {"synced"} and watch.silent_seconds < 60
    assert len((await watch.look()).pods().items) == 1 and [r.lists for r in watch.reflectors] == [2] * 5


async def test_an_operator_of_some_namespaces_sees_their_pods_and_all_nodes() -> None:
    class Some(Server):
        async def list(self, kind: str, namespace: str = "", selector: str = "") -> Any:
            if kind == "Pod":
                if namespace == "b":
                    raise APIError(403, "Forbidden", "pods is forbidden")
                yield pod(0, 1)
            elif kind == "Namespace":
                raise APIError(403, "Forbidden", "namespaces is forbidden")
            else:
                async for raw in super().list(kind):
                    yield raw

    watch = InventoryWatch(Some(), Settings(watch_namespaces=("a", "b")))  # type: ignore[arg-type]
    (found,) = (await watch.look()).nodes_but_for(()) or ()
    assert found.used["cpu"] == 100
    assert watch.forbidden == ("pods",), "namespaces matter to queues alone"
    watch.inventory.queues.put(queue(1))
    assert watch.forbidden == ("namespaces", "pods")
    uid = next(iter(watch.inventory.pods("a").items))
    assert watch.inventory.requests_of([uid, "unknown"]) == {uid: found.used}


async def test_where_nothing_is_counted_nothing_is_watched() -> None:
    watch = InventoryWatch(Server(), Settings(queueing_backend="none"))  # type: ignore[arg-type]
    assert (await watch.look()).nodes_but_for(()) is None and not watch.reflectors and not watch.forbidden
    assert watch.silent_seconds == 0 and not watch.inventory.is_lost("any")


def test_a_node_is_lost_that_is_gone_or_not_ready_as_far_as_is_known(inventory: Inventory) -> None:
    raw = {**node(0), "metadata": {"name": "n0"}}
    assert inventory.is_lost("gone") and not inventory.is_lost("n0")
    inventory.nodes.put(read(NODE, {**raw, "spec": {"unschedulable": True}}))
    assert not inventory.is_lost("n0"), "its kubelet still answers"
    inventory.nodes.put(read(NODE, {**raw, "status": {**raw["status"], "conditions": []}}))
    assert inventory.is_lost("n0")
    assert not Inventory().is_lost("n0"), "nothing is known yet"
    inventory.nodes.refuse(403, "nodes is forbidden")
    assert not inventory.is_lost("gone")


def test_a_queue_that_an_endpoint_names(inventory: Inventory) -> None:
    assert inventory.queue_problem("team-a", "serving") == "", "it is not known what there is"
    spec = {"flavors": [{"name": "any", "nominalQuota": 4}], "namespaceSelector": {"matchLabels": {"tier": "chat"}}}
    serving = {"metadata": {"name": "serving", "generation": 1}, "spec": spec}
    inventory.queues.replace([read(QUEUE, serving)])
    inventory.namespaces.replace([read(NAMESPACE, {"metadata": {"name": name, "labels": {"tier": name}}}) for name in ("chat", "batch")])
    assert inventory.queue_problem("chat", "serving") == ""
    assert "is not for namespace batch" in inventory.queue_problem("batch", "serving")
    assert "there is no FineTuneQueue other" in inventory.queue_problem("chat", "other")
