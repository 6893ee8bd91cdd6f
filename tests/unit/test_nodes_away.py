"""Nodes that are away for repair are waited for by name; only what no node that was ever seen could hold is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest

from finetune_operator.cache.assumptions import Assumptions
from finetune_operator.cache.node_history import _NODES_EACH, _SHAPES, NodeHistory
from finetune_operator.cache.store import Store
from finetune_operator.controllers.admission import AdmissionLoop
from finetune_operator.model.queueing import Decision, Node, Taint
from finetune_operator.settings import Settings
from tests.factory import MINIMAL, NOW, job, merged, stamp
from tests.listing import InMemory
from tests.unit.test_queueing import GPU, admitted, decided, nodes, queue, request, running, waiting, why

BIG = Node(name="big", labels={"gpu": "h100"}, allocatable={GPU: 8, "cpu": 64_000})
SMALL = Node(name="small", labels={"gpu": "h100"}, allocatable={GPU: 4, "cpu": 64_000})


def big(**changes: Any) -> Node:
    return dataclasses.replace(BIG, **changes)


def waits_for(decision: Decision) -> str:
    assert (decision.action, decision.reason) == ("wait", "WaitingForNodes"), decision
    _, _, named = decision.message.partition("nodes that could hold its pods are away: ")
    return named


@pytest.mark.parametrize(
    ("there", "missing", "named"),
    [
        (big(away="not ready"), (), "big (not ready)"),
        (big(away="cordoned"), (), "big (cordoned)"),
        (big(taints=(Taint(key="repair"),)), (), "big (taint repair:NoSchedule)"),
        (big(taints=(Taint(key="repair", value="disk", effect="NoExecute"),)), (), "big (taint repair=disk:NoExecute)"),
        (big(allocatable={"cpu": 64_000}, unreadable={GPU: "lots"}), (), f"big (allocatable {GPU}: 'lots' is not a quantity)"),
        (None, (big(away="deleted"),), "big (deleted)"),
        (big(allocatable={GPU: 0, "cpu": 64_000}), (big(away=f"has 0 of 8 {GPU} now"),), f"big (has 0 of 8 {GPU} now)"),
        # those that could not hold a pod are not waited for
        (big(away="not ready", labels={"gpu": "a100"}), (), ""),
        (big(away="not ready", allocatable={GPU: 8, "cpu": 1000}), (), ""),
    ],
)
@pytest.mark.parametrize("has_run", [False, True])
def test_a_node_that_is_away_is_waited_for_by_name(there: Node | None, missing: tuple[Node, ...], named: str, has_run: bool) -> None:
    what = request(1, 8, also={"cpu": 2000}, selector=(("gpu", "h100"),))
    present = (SMALL, *([there] if there is not None else []))
    found = decided(waiting("a", what, has_run=has_run), on=present, missing=missing)
    if has_run or there is None or there.allocatable.get(GPU) == 8 or missing:
        assert waits_for(why(found, "a")) == named
    else:  # nothing tells of a node that could
        assert why(found, "a").action == "refuse"


@pytest.mark.parametrize("on", [(SMALL,), (), (dataclasses.replace(SMALL, away="not ready"),)])
def test_what_has_run_is_never_refused_for_its_size(on: tuple[Node, ...]) -> None:
    """An operator that has just started knows no node that is gone; the job's status says that there was one."""
    assert why(decided(waiting("a", request(1, 8), has_run=True), on=on), "a").action == "wait"
    assert why(decided(waiting("a", request(1, 8), has_run=True), waiting("b", request(1, 8)), on=on), "b").action == "wait", (
        "one like it has"
    )
    assert why(decided(waiting("a", request(1, 8), has_run=True), waiting("b", request(1, 16)), on=(SMALL,)), "b").action == "refuse"
    assert why(decided(running("a", request(1, 8), has_run=True), waiting("b", request(1, 8)), on=on), "b").action == "wait"


def test_f16_stays() -> None:
    found = decided(waiting("a", request(2, 16)), on=(SMALL, BIG), missing=(big(name="gone", away="deleted"),))
    assert why(found, "a").action == "refuse" and "no node has more than 8" in why(found, "a").message


def test_nobody_waits_for_nodes_that_are_not_needed() -> None:
    """Where those that are there would do once they are free, others are not named."""
    busy = tuple(dataclasses.replace(n, used={GPU: 8}) for n in nodes(2))
    assert waits_for(why(decided(waiting("a", request(2, 8)), on=(*busy, big(away="not ready"))), "a")) == ""
    assert waits_for(why(decided(waiting("a", request(3, 8)), on=(*busy, big(away="not ready"))), "a")) == "big (not ready)"
    pieces = tuple(dataclasses.replace(n, used={GPU: 4}) for n in nodes(2, 4))
    assert waits_for(why(decided(waiting("a", request(1, 8)), on=(*pieces, big(away="not ready"))), "a")) == "big (not ready)"


def test_a_flavors_nodes_are_those_that_are_waited_for() -> None:
    flavors = queue("team", 8, flavor={"nodeLabels": {"gpu": "h100"}, "tolerations": [{"key": "own", "operator": "Exists"}]})
    away = big(away="not ready", taints=(Taint(key="own"),))
    other = big(name="other", labels={"gpu": "a100"}, away="not ready")
    assert waits_for(why(decided(waiting("a", request(1, 8), queue="team"), queues=(flavors,), on=(away, other)), "a")) == "big (not ready)"


def test_many_nodes_are_counted() -> None:
    found = why(decided(waiting("a", request(1, 8)), on=tuple(big(name=f"n{i:02}", away="not ready") for i in range(20))), "a")
    assert "n07 (not ready) and 12 more" in found.message and "n08" not in found.message


# what is remembered


def names(history: NodeHistory, *nodes: Node) -> dict[str, str]:
    return {node.name: node.away for node in history.look(nodes)}


def test_a_deleted_node_is_remembered_until_it_is_back() -> None:
    history = NodeHistory()
    assert names(history, BIG, SMALL) == {}
    assert names(history, SMALL) == {"big": "deleted"} == names(history, SMALL)
    assert names(history, SMALL, BIG) == {}
    assert names(history, SMALL, big(away="not ready")) == {}, "it is listed, and says so itself"


def test_a_node_without_its_devices_is_known_for_what_it_had() -> None:
    """A driver or device plugin that is restarted shows no GPU for a while."""
    history = NodeHistory()
    history.look((BIG,))
    for lessened in (big(allocatable={GPU: 0, "cpu": 64_000}), big(allocatable={"cpu": 64_000})):
        [node] = history.look((lessened,))
        assert node.away == f"has 0 of 8 {GPU} now" and node.allocatable[GPU] == 8
    [node] = history.look((big(allocatable={"cpu": 32_000}, away="not ready"),))
    assert node.away == "not ready" and node.allocatable == {GPU: 8, "cpu": 32_000}
    [node] = history.look(())
    assert node.away == "deleted" and node.allocatable[GPU] == 8
    assert names(history, BIG) == {}


def test_nodes_that_come_and_go_do_not_make_it_forget_the_large_one() -> None:
    history = NodeHistory()
    history.look((big(allocatable={GPU: 16, "cpu": 128_000}),))
    for day in range(2000):
        missing = history.look((dataclasses.replace(SMALL, name=f"small-{day}"),))
    assert len(missing) == 1 + _NODES_EACH
    assert {"big": "deleted", "small-1998": "deleted"}.items() <= {n.name: n.away for n in missing}.items()
    for kind in range(200):
        missing = history.look((Node(name=f"kind-{kind}", allocatable={GPU: kind, "cpu": 1000}),))
    assert len(missing) <= _SHAPES * _NODES_EACH and len({tuple(n.allocatable.items()) for n in missing}) == _SHAPES


class Nodes(InMemory):
    """An API server with nodes and nothing else."""

    def __init__(self, *gpus: int) -> None:
        self.gpus = gpus

    async def list(self, kind: str, *_: str) -> AsyncIterator[dict[str, Any]]:
        ready = [{"type": "Ready", "status": "True"}]
        for number, gpus in enumerate(self.gpus) if kind == "Node" else ():
            yield {"metadata": {"name": f"node-{number}"}, "status": {"conditions": ready, "allocatable": {GPU: str(gpus)}}}

    def now(self) -> Any:
        return NOW


def ready(status: dict[str, Any] | None = None) -> dict[str, Any]:
    conditions = [{"type": "DataReady", "status": "True"}, {"type": "Admitted", "status": "False", "reason": "Preempted"}]
    common = {"observedGeneration": 1, "conditions": conditions, "queue": {"since": stamp(NOW)}}
    return job(merged(MINIMAL, distribution={"gpusPerNode": 8}), {**common, **(status or {})}, uid="uid")


@pytest.mark.parametrize(
    ("seen", "now", "status", "action"),
    [
        ((4, 8), (4,), {}, "wait"),  # the operator has seen it
        ((4, 8), (4, 0), {}, "wait"),
        ((4,), (4,), {"admission": {"nodes": 1, "admittedAt": stamp(NOW)}}, "wait"),  # the job's own record
        ((4,), (4,), {"usage": {"gpuSeconds": 7200}}, "wait"),
        ((4,), (4,), {}, "refuse"),
    ],
)
async def test_a_preempted_job_while_nodes_are_away(
    seen: tuple[int, ...], now: tuple[int, ...], status: dict[str, Any], action: str
) -> None:
    server, store = Nodes(*seen), Store()
    scheduler = AdmissionLoop(server, store, Assumptions(), Settings(), lambda key: None)  # type: ignore[arg-type]
    await scheduler.once()
    server.gpus = now
    store.put_job(ready(status))
    decision = (await scheduler.once()).jobs["uid"]
    assert decision.action == action, decision
    if seen != now:
        assert waits_for(decision) == ("node-1 (deleted)" if len(now) == 1 else f"node-1 (has 0 of 8 {GPU} now)")


def test_it_starts_when_the_node_is_back() -> None:
    assert admitted(decided(waiting("a", request(1, 8), has_run=True), on=(SMALL, BIG))) == {"a"}
