"""A queue that cannot be read gives nothing away and takes nothing from others; what its jobs hold stays counted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from finetune_operator.cluster.errors import APIError
from finetune_operator.cluster.inventory import InventoryWatch
from finetune_operator.model.nodes import queue_of
from finetune_operator.model.queueing import Namespace, Queue, Snapshot
from finetune_operator.queueing import decide
from finetune_operator.queueing.report import queue_status
from finetune_operator.settings import Settings
from tests.factory import NOW
from tests.listing import InMemory
from tests.unit.test_queueing import admitted, decided, nodes, queue, request, running, waiting, why

GOOD: dict[str, Any] = {"flavors": [{"name": "any", "nominalQuota": 8}]}


def raw_queue(spec: Any, name: str = "team", status: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"metadata": {"name": name, "generation": 3}, "spec": spec, **({"status": status} if status is not None else {})}


BAD = [
    ({"flavors": [{"name": "any", "nominalQuota": "lots"}]}, "spec.flavors[0].nominalQuota: 'lots'"),
    ({"flavors": [{"name": "any", "nominalQuota": -8}]}, "spec.flavors[0].nominalQuota: -8"),
    ({"flavors": [{"name": "any", "nominalQuota": 8.5}]}, "spec.flavors[0].nominalQuota: 8.5"),
    ({"flavors": [{"name": "any"}]}, "spec.flavors[0].nominalQuota: is required"),
    ({"flavors": [{"name": "any", "nominalQuota": 8, "borrowingLimit": "2"}], "cohort": "all"}, "spec.flavors[0].borrowingLimit: '2'"),
    ({**GOOD, "ordering": "Lottery"}, "spec.ordering: 'Lottery' is not one of StrictFIFO, BestEffortFIFO"),
    ({**GOOD, "backfillFor": "soon"}, 'spec.backfillFor: "soon" is not a duration'),
    ({**GOOD, "namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "Near"}]}}, "'Near' is not one of"),
    ({**GOOD, "limits": {"maxGpusPerUser": "few"}}, "spec.limits.maxGpusPerUser: 'few'"),
    ({"flavors": []}, "spec.flavors: []"),
    ({"flavors": "many"}, "spec.flavors: 'many'"),
    ({"flavors": [7]}, "spec.flavors[0]: 7"),
    ({}, "spec.flavors: is required"),
    (None, "spec: None"),
    (7, "spec: 7"),
]


@pytest.mark.parametrize(("spec", "named"), BAD)
def test_jobs_of_a_queue_that_cannot_be_read_wait_and_say_why(spec: Any, named: str) -> None:
    """Also where it is the cluster's only queue: there is quota then, nobody knows how much."""
    found = decided(
        waiting("a", queue="team"), waiting("b", request(1, 16), queue="team"), queues=(queue_of(raw_queue(spec)),), on=nodes(2)
    )
    for uid in ("a", "b"):
        decision = why(found, uid)
        assert (decision.action, decision.reason) == ("wait", "QueueUnreadable")
        assert decision.message.startswith("FineTuneQueue team cannot be read") and named in decision.message, decision.message
        assert "correct it" in decision.message
    assert found.queues["team"].pending == 2


@pytest.mark.parametrize(("spec", "named"), BAD)
def test_the_queue_says_so_itself(spec: Any, named: str) -> None:
    broken = queue_of(raw_queue(spec))
    snapshot = Snapshot(now=NOW, workloads=(running("a", request(1, 4), "team", "any"),), queues=(broken,))
    status = queue_status(broken, raw_queue(spec), snapshot, decide(snapshot))
    [active] = status.conditions
    assert (active.status, active.reason) == ("False", "Unreadable") and named in active.message
    assert status.admitted == 1


def broken(cohort: str | None = "all", recorded: int = 8) -> Queue:
    spec = {"flavors": [{"name": "any", "nominalQuota": "lots"}], **({"cohort": cohort} if cohort else {})}
    return queue_of(raw_queue(spec, "broken", {"flavors": [{"name": "any", "nominal": recorded}]}))


@pytest.mark.parametrize(
    ("held", "asked", "fits"),
    [
        (0, 8, True),  # its own
        (0, 9, False),  # nothing is borrowed from who cannot say what it has
        (8, 8, True),  # what the other held by its last word was its own
        (12, 4, True),
        (12, 5, False),  # the rest it has borrowed
    ],
)
def test_others_of_its_cohort_have_what_it_cannot_have_borrowed(held: int, asked: int, fits: bool) -> None:
    there = [running("r", request(1, held), "broken", "any")] if held else []
    found = decided(*there, waiting("a", request(1, asked), queue="good"), queues=(broken(), queue("good", 8, "all")), on=nodes(3, 16))
    assert ("a" in admitted(found)) is fits
    assert "r" not in found.jobs or why(found, "r").action == "keep"


def test_its_running_jobs_go_on_as_they_are() -> None:
    """Nobody takes from them what may be their own, and they do not grow."""
    there = running("r", request((4, 2), 4), "broken", "any", {"node-0": 2}, pods=2, priority=-5)
    urgent = waiting("a", request(1, 8), queue="good", priority=100)
    found = decided(there, urgent, queues=(broken(recorded=0), queue("good", 8, "all")), on=nodes(2, 16))
    assert why(found, "r").action == "keep" and why(found, "a").reason == "WaitingForQuota"


def test_other_queues_are_served_as_ever() -> None:
    found = decided(
        waiting("a", queue="broken"),
        waiting("b", queue="good"),
        waiting("c", queue="gone"),
        queues=(broken(), queue("good", 8)),
        on=nodes(1),
    )
    assert admitted(found) == {"b"}
    assert why(found, "a").reason == "QueueUnreadable" and why(found, "c").reason == "QueueNotFound"
    home = {"team-a": Namespace(queue="broken")}
    assert why(decided(waiting("a"), queues=(broken(),), namespaces=home), "a").reason == "QueueUnreadable", "by its namespace's default"


class Refusing(InMemory):
    """An API server that answers one LIST with an error."""

    def __init__(self, kind: str, status: int) -> None:
        self.kind, self.status = kind, status

    async def list(self, kind: str, *_: str) -> AsyncIterator[dict[str, Any]]:
        if kind == self.kind:
            raise APIError(self.status, "Forbidden", f"{kind} is forbidden: user cannot list")
        for raw in [raw_queue(GOOD), raw_queue(7, "broken")] if kind == "FineTuneQueue" else []:
            yield raw


async def test_a_cluster_without_the_kind_has_no_queues() -> None:
    seen = await InventoryWatch(Refusing("FineTuneQueue", 404), Settings()).look()  # type: ignore[arg-type]
    assert not seen.queues.parsed
    assert admitted(decided(waiting("a"), on=nodes(1))) == {"a"}


async def test_a_server_that_does_not_answer_is_asked_again() -> None:
    with pytest.raises(APIError):
        await InventoryWatch(Refusing("FineTuneQueue", 503), Settings()).look()  # type: ignore[arg-type]


async def test_one_broken_queue_does_not_hide_the_others() -> None:
    seen = await InventoryWatch(Refusing("Node", 403), Settings()).look()  # type: ignore[arg-type]
    assert not seen.queues.parsed["team"].unreadable and seen.queues.parsed["broken"].unreadable
