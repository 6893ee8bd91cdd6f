"""Who is admitted, who waits for what, who gives way. A table row per rule; then properties over random clusters."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.queue import FineTuneQueueSpec, UsageHistory
from finetune_operator.model.queueing import (
    RECOVERED,
    Allocation,
    Decision,
    Decisions,
    Namespace,
    Node,
    Queue,
    Request,
    Snapshot,
    Taint,
    Workload,
)
from finetune_operator.queueing import decide
from finetune_operator.queueing.placement import Fleet, never_fits, tolerates
from finetune_operator.queueing.quota import counted
from tests.bench.queueing import Arrival, simulate
from tests.factory import NOW, after, stamp

GPU = "nvidia.com/gpu"


def request(pods: int | tuple[int, ...] = 1, units: int = 1, **more: Any) -> Request:
    per_pod = tuple(sorted({GPU: units, **more.pop("also", {})}.items()))
    return Request(resource=GPU, units=units, pods=pods if isinstance(pods, tuple) else (pods,), per_pod=per_pod, **more)


def waiting(
    name: str, what: Request | None = None, queue: str | None = None, *, age: float = 0.5, priority: int = 0, **more: Any
) -> Workload:
    return Workload(
        **{
            "uid": name,
            "namespace": "team-a",
            "name": name,
            "queue": queue,
            "priority": priority,
            "since": after(-age),
            "waits_since": after(-age),
            "request": what or request(),
            "waits": True,
            **more,
        }
    )


def running(
    name: str, what: Request, queue: str = "", flavor: str = "nvidia-com-gpu", nodes: dict[str, int] | None = None, **more: Any
) -> Workload:
    allocation = {
        "queue": queue,
        "flavor": flavor,
        "pods": what.pods[0],
        "units": what.units,
        "since": after(-3600),
        "bound": tuple((nodes or {}).items()),
    }
    allocation.update({k: more.pop(k) for k in ("since", "saved_at", "stopping", "pods") if k in more})
    return waiting(name, what, queue or None, waits=False, allocation=Allocation(**allocation), **more)


def nodes(count: int = 2, gpus: int = 8, **more: Any) -> tuple[Node, ...]:
    return tuple(Node(name=f"node-{n}", **{"allocatable": {GPU: gpus}, **more}) for n in range(count))


def queue(name: str, nominal: int, cohort: str | None = None, flavor: dict[str, Any] | None = None, **more: Any) -> Queue:
    spec = {"flavors": [{"name": "any", "nominalQuota": nominal, **(flavor or {})}], **more}
    if cohort is not None:
        spec["cohort"] = cohort
    return Queue(name=name, spec=FineTuneQueueSpec.model_validate(spec))


def decided(*workloads: Workload, queues: tuple[Queue, ...] = (), on: tuple[Node, ...] | None = None, **more: Any) -> Decisions:
    return decide(Snapshot(now=NOW, workloads=workloads, queues=queues, nodes=on, **more))


def admitted(decisions: Decisions) -> set[str]:
    return {uid for uid, v in decisions.jobs.items() if v.action == "admit"}


def why(decisions: Decisions, uid: str) -> Decision:
    return decisions.jobs[uid]


# nodes


def test_a_gang_fits_as_a_whole_or_not_at_all() -> None:
    assert admitted(decided(waiting("a", request(2, 8)), on=nodes(2))) == {"a"}
    found = decided(waiting("a", request(3, 8)), on=nodes(2))
    assert not admitted(found)
    assert why(found, "a").reason == "WaitingForNodes" and "8 of 24" in why(found, "a").message
    assert why(found, "a").position == 1


def test_free_gpus_in_pieces_are_no_room() -> None:
    used = tuple(dataclasses.replace(n, used={GPU: 4}) for n in nodes(2))
    found = decided(waiting("a", request(1, 8)), on=used)
    assert "8 nvidia.com/gpu are free, but not 8 for each of 1 pod(s)" in why(found, "a").message


def test_two_gangs_never_share_what_is_there_for_one() -> None:
    found = decided(waiting("a", request(2, 8), age=2), waiting("b", request(2, 8), age=9), on=nodes(2))
    assert admitted(found) == {"b"}, "who has waited longer"
    assert why(found, "a").position == 1


def test_what_is_admitted_and_not_yet_bound_counts() -> None:
    there = running("old", request(2, 8), nodes={"node-0": 1})
    found = decided(there, waiting("a", request(1, 8)), on=nodes(2))
    assert not admitted(found) and why(found, "old").action == "keep"
    assert admitted(decided(there, waiting("a", request(1, 8)), on=nodes(3))) == {"a"}


@pytest.mark.parametrize(
    ("node", "what", "fits"),
    [
        ({"labels": {"gpu": "h100"}}, {"selector": (("gpu", "h100"),)}, True),
        ({"labels": {"gpu": "a100"}}, {"selector": (("gpu", "h100"),)}, False),
        ({"taints": (Taint(key="gpu", value="yes"),)}, {}, False),
        ({"taints": (Taint(key="gpu", value="yes"),)}, {"tolerations": (("gpu", "Equal", "yes", ""),)}, True),
        ({"taints": (Taint(key="gpu", value="yes"),)}, {"tolerations": (("gpu", "Equal", "no", ""),)}, False),
        ({"taints": (Taint(key="gpu", value="yes"),)}, {"tolerations": (("", "Exists", "", "NoSchedule"),)}, True),
        ({"taints": (Taint(key="gpu", effect="NoExecute"),)}, {"tolerations": (("gpu", "Exists", "", "NoSchedule"),)}, False),
        ({"away": "cordoned"}, {}, False),
        ({"allocatable": {GPU: 8, "cpu": 4000}}, {"also": {"cpu": 8000}}, False),
        ({"allocatable": {GPU: 8, "cpu": 8000}, "used": {"cpu": 1}}, {"also": {"cpu": 8000}}, False),
        ({"allocatable": {GPU: 8, "cpu": 8000}}, {"also": {"cpu": 8000}}, True),
    ],
)
def test_which_nodes_will_do(node: dict[str, Any], what: dict[str, Any], fits: bool) -> None:
    assert bool(admitted(decided(waiting("a", request(1, 1, **what)), on=nodes(1, **node)))) is fits


def test_tolerations_like_the_api() -> None:
    taint = Taint(key="a", value="b", effect="NoExecute")
    assert tolerates([("a", "Equal", "b", "NoExecute")], taint) and tolerates([("", "Exists", "", "")], taint)
    assert not tolerates([("a", "Equal", "", "")], taint) and not tolerates([], taint)


def test_full_nodes_are_filled_first_so_that_whole_ones_stay_whole() -> None:
    half = (dataclasses.replace(nodes(1)[0], name="half", used={GPU: 4}), *nodes(1))
    found = decided(waiting("small", request(1, 4), age=9), waiting("large", request(1, 8), age=1), on=half)
    assert admitted(found) == {"small", "large"}


def test_a_gang_within_one_rack() -> None:
    racks = tuple(
        Node(name=f"{rack}-{n}", allocatable={GPU: 8}, labels={"rack": rack})
        for rack, size in (("r1", 1), ("r2", 3), ("r3", 2))
        for n in range(size)
    )
    found = decided(waiting("a", request(2, 8, topology_key="rack")), on=racks)
    granted = why(found, "a").admission
    assert granted is not None and granted.topology == ("rack", "r3"), "the smallest that has room"
    found = decided(waiting("a", request(4, 8, topology_key="rack")), on=racks)
    assert not admitted(found) and "within one rack" in why(found, "a").message


def test_f16_what_no_node_can_ever_hold_is_refused_with_the_largest_shape() -> None:
    found = decided(waiting("a", request(2, 16), waits=False), on=nodes(4))
    assert why(found, "a").action == "refuse", "before anything is prepared"
    assert "no node has more than 8" in why(found, "a").message
    assert "distribution.gpusPerNode 8 with distribution.nodes 4" in why(found, "a").message
    busy = tuple(dataclasses.replace(n, used={GPU: 8}, away="not ready") for n in nodes(2))
    assert why(decided(waiting("a", request(1, 8)), on=busy), "a").action == "wait", "it will be free"
    assert never_fits(request(1, 1), Fleet(nodes(2, allocatable={"cpu": 4}))) is None, "nodes with GPUs may come"


def test_an_elastic_gang_starts_with_fewer_and_grows_when_nobody_waits() -> None:
    found = decided(waiting("a", request((4, 2, 1), 8)), on=nodes(3))
    granted = why(found, "a").admission
    assert granted is not None and granted.pods == 2, "3 does not divide its batch"
    small = running("a", request((4, 2, 1), 8), pods=2, nodes={"node-0": 1, "node-1": 1})
    grown = why(decided(small, on=nodes(4)), "a")
    assert grown.action == "resize" and grown.admission is not None and grown.admission.pods == 4
    assert why(decided(small, on=nodes(3)), "a").action == "keep"
    assert why(decided(small, waiting("b", request(9, 8)), on=nodes(4)), "a").action == "keep", "others first"
    mine, hopeless = running("a", request((4, 2, 1), 8), "p", "any", {"node-0": 1, "node-1": 1}, pods=2), waiting("b", request(1, 8), "q")
    grown = why(decided(mine, hopeless, queues=(queue("p", 32), queue("q", 4)), on=nodes(4)), "a")
    assert grown.action == "resize", "what can never run holds nobody back"
    fresh = running("a", request((4, 2, 1), 8), pods=2, nodes={"node-0": 1, "node-1": 1}, since=after(-60))
    assert why(decided(fresh, on=nodes(4)), "a").action == "keep", "not at once: each change costs a restart"


def test_autoscaled_clusters_get_pods_that_wait() -> None:
    assert admitted(decided(waiting("a", request(4, 8)), on=nodes(1), autoscaled=True)) == {"a"}
    pool = queue("q", 32, flavor={"nodes": "Autoscaled"})
    assert admitted(decided(waiting("a", request(4, 8), "q"), queues=(pool,), on=())) == {"a"}
    assert not admitted(decided(waiting("a", request(5, 8), "q"), queues=(pool,), on=()))


def test_jobs_without_gpus_hold_nothing_back() -> None:
    cpu = Request(resource="cpu", units=4, pods=(2,), per_pod=(("cpu", 4000),))
    assert admitted(decided(waiting("a", cpu), on=())) == {"a"}
    assert admitted(decided(waiting("a", cpu, "q"), queues=(queue("q", 1),), on=())) == {"a"}, "the queue counts no CPUs"
    counts = queue("q", 7, flavor={"resourceName": "cpu"})
    assert not admitted(decided(waiting("a", cpu, "q"), queues=(counts,), on=nodes(2, allocatable={"cpu": 8000})))


def test_without_a_look_at_nodes_quota_decides_alone() -> None:
    assert admitted(decided(waiting("a", request(64, 8)))) == {"a"}


# queues


def test_quota() -> None:
    found = decided(waiting("a", request(1, 8), "q", age=9), waiting("b", request(1, 8), "q"), queues=(queue("q", 12),))
    assert admitted(found) == {"a"}
    assert why(found, "b").message == "waits for 4 of 8 nvidia.com/gpu: quota has 4 left of any"
    never = decided(waiting("a", request(2, 8), "q"), waiting("b", request(1, 8), "q"), queues=(queue("q", 12, ordering="StrictFIFO"),))
    assert why(never, "a").reason == "NeverAdmitted" and admitted(never) == {"b"}, "what can never run blocks nobody"


def test_borrowing_and_lending() -> None:
    def one(mine: dict[str, Any], theirs: dict[str, Any], units: int) -> bool:
        pair = (queue("q", 8, "c", flavor=mine), queue("r", 8, "c", flavor=theirs))
        return bool(admitted(decided(waiting("a", request(1, units), "q"), queues=pair)))

    assert one({}, {}, 16) and not one({}, {}, 17)
    assert one({"borrowingLimit": 4}, {}, 12) and not one({"borrowingLimit": 4}, {}, 13)
    assert one({}, {"lendingLimit": 2}, 10) and not one({}, {"lendingLimit": 2}, 11)
    apart = (queue("q", 8, "c"), queue("r", 8, "d"))
    assert not admitted(decided(waiting("a", request(1, 9), "q"), queues=apart))
    keeps = (queue("q", 8, "c"), queue("r", 8, "c", flavor={"lendingLimit": 0}))
    busy = running("x", request(1, 8), "q", "any")
    assert admitted(decided(busy, waiting("a", request(1, 8), "r"), queues=keeps)) == {"a"}, "what is not lent is there"


def test_flavors_are_tried_in_order_and_the_job_goes_to_its_nodes() -> None:
    spec = FineTuneQueueSpec.model_validate(
        {
            "flavors": [
                {
                    "name": "spot",
                    "nominalQuota": 8,
                    "nodeLabels": {"pool": "spot"},
                    "tolerations": [{"key": "spot", "operator": "Exists"}],
                    "pricePerHour": "1.5",
                },
                {"name": "reserved", "nominalQuota": 8, "nodeLabels": {"pool": "reserved"}},
            ]
        }
    )
    machines = (
        Node(name="s", allocatable={GPU: 8}, labels={"pool": "spot"}, taints=(Taint(key="spot"),)),
        Node(name="r", allocatable={GPU: 8}, labels={"pool": "reserved"}),
    )
    both = decided(
        waiting("a", request(1, 8), "q", age=9), waiting("b", request(1, 8), "q"), queues=(Queue(name="q", spec=spec),), on=machines
    )
    first, second = why(both, "a").admission, why(both, "b").admission
    assert first is not None and first.flavor == "spot" and first.node_labels == (("pool", "spot"),) and first.price_per_hour == 1.5
    assert first.tolerations[0].key == "spot" and second is not None and second.flavor == "reserved"
    picky = decided(waiting("a", request(1, 8, selector=(("pool", "reserved"),)), "q"), queues=(Queue(name="q", spec=spec),), on=machines)
    chosen = why(picky, "a").admission
    assert chosen is not None and chosen.flavor == "reserved", "its own selector rules the first one out"


def test_mig_slices_and_shared_gpus_are_resources_of_their_own() -> None:
    mig = "nvidia.com/mig-1g.10gb"
    small = Request(resource=mig, units=1, pods=(1,), per_pod=((mig, 1),))
    slices = queue("q", 2, flavor={"resourceName": mig})
    on = nodes(1, allocatable={mig: 7, GPU: 1})
    found = decided(*(waiting(n, small, "q") for n in "abc"), queues=(slices,), on=on)
    assert len(admitted(found)) == 2
    assert "queue q has no flavor of nvidia.com/gpu" in why(decided(waiting("a", request(), "q"), queues=(slices,), on=on), "a").message


def test_a14_only_those_who_may_use_a_queue() -> None:
    closed = queue("gold", 8, namespaceSelector={"matchLabels": {"team": "gold"}})
    homes = {"team-a": Namespace(labels={"team": "a"}), "team-g": Namespace(labels={"team": "gold"})}
    found = decided(
        waiting("a", queue="gold"), waiting("g", queue="gold", namespace="team-g"), queues=(closed, queue("open", 1)), namespaces=homes
    )
    assert admitted(found) == {"g"}
    assert why(found, "a").reason == "QueueNotAllowed" and "may use: open" in why(found, "a").message
    unknown = decided(waiting("a", queue="gold", namespace="gone"), queues=(closed,), namespaces=homes)
    assert why(unknown, "a").reason == "QueueNotAllowed", "a namespace that is not known is not allowed"


def test_which_queue_a_job_waits_in() -> None:
    two = (queue("default", 8), queue("research", 8))
    home = {"team-a": Namespace(queue="research")}
    assert why(decided(waiting("a"), queues=two, namespaces=home), "a").queue == "research"
    assert why(decided(waiting("a"), queues=two), "a").queue == "default"
    assert why(decided(waiting("a", queue="research"), queues=two), "a").queue == "research"
    lost = why(decided(waiting("a", queue="reserch"), queues=two), "a")
    assert lost.reason == "QueueNotFound" and "default, research" in lost.message
    assert why(decided(waiting("a", queue="x")), "a").reason == "QueueNotFound"
    assert "there is none called default" in why(decided(waiting("a"), queues=two[1:]), "a").message


def test_a14_priorities_are_bounded_and_namespaces_limited() -> None:
    bounded = queue("q", 1, limits={"maxPriority": 100})
    high, low = waiting("high", queue="q", priority=10**9, age=1), waiting("low", queue="q", priority=100, age=9)
    assert admitted(decided(high, low, queues=(bounded,))) == {"low"}
    fair = queue("q", 8, limits={"maxGpusPerNamespace": 2, "maxJobsPerNamespace": 3})
    found = decided(*(waiting(f"a{n}", queue="q") for n in range(4)), waiting("b", queue="q", namespace="team-b"), queues=(fair,))
    assert len(admitted(found) - {"b"}) == 2 and "b" in admitted(found)
    limited = next(v for v in found.jobs.values() if v.reason == "NamespaceLimit")
    assert "holds 2 of 2" in limited.message


def test_a15_a_user_is_limited_in_all_namespaces_together() -> None:
    fair = queue("q", 8, limits={"maxJobsPerUser": 2, "maxGpusPerUser": 3})
    ann = [dataclasses.replace(waiting(f"a{n}", queue="q", namespace=f"team-{n}"), user="ann@example.com") for n in range(3)]
    bob = dataclasses.replace(waiting("b", request(1, 4), queue="q"), user="bob")
    found = decided(*ann, bob, waiting("nobody", queue="q"), queues=(fair,))
    assert len(admitted(found) & {w.uid for w in ann}) == 2 and "nobody" in admitted(found), "whom the webhook has not noted is not counted"
    assert why(found, "b").reason == "UserLimit" and "user bob holds 0 of 3" in why(found, "b").message
    third = next(v for v in found.jobs.values() if "ann@example.com" in v.message)
    assert third.reason == "UserLimit" and "has 2 jobs" in third.message


def test_stopped_queues() -> None:
    hold = decided(running("r", request(1, 8), "q", "any"), waiting("a", queue="q"), queues=(queue("q", 16, stopPolicy="Hold"),))
    assert why(hold, "a").reason == "QueueStopped" and why(hold, "r").action == "keep"
    drain = decided(running("r", request(1, 8), "q", "any"), queues=(queue("q", 16, stopPolicy="HoldAndDrain"),))
    assert why(drain, "r").action == "preempt"


# order


def test_priority_then_the_namespace_with_least_then_age() -> None:
    def jobs(*rows: tuple[str, str, int, float]) -> list[Workload]:
        return [waiting(n, queue="q", namespace=ns, priority=p, age=age) for n, ns, p, age in rows]

    one = (queue("q", 1),)
    assert admitted(decided(*jobs(("a", "x", 0, 9), ("b", "x", 5, 1)), queues=one)) == {"b"}
    holds = running("r", request(1, 1), "q", "any", namespace="x")
    assert admitted(decided(holds, *jobs(("a", "x", 0, 9), ("b", "y", 0, 1)), queues=(queue("q", 2),))) == {"b"}, "x has something already"
    assert admitted(decided(*jobs(("a", "x", 0, 1), ("b", "y", 0, 9)), queues=one)) == {"b"}
    flood = jobs(*((f"a{n:03}", "x", 0, 1000 - n) for n in range(50)), ("b0", "y", 0, 1), ("b1", "y", 0, 0.5))
    assert {"b0", "b1"} <= admitted(decided(*flood, queues=(queue("q", 4),))), "a15: a thousand tiny jobs win nothing"


def test_past_use_counts_and_is_forgotten() -> None:
    spent = UsageHistory.model_validate({"gpuSeconds": 9e5, "namespaces": [{"name": "x", "gpuSeconds": 9e5}], "updatedAt": stamp(NOW)})
    old = dataclasses.replace(queue("q", 1), history=spent)
    two = [waiting("a", queue="q", namespace="x", age=9), waiting("b", queue="q", namespace="y", age=1)]
    assert admitted(decided(*two, queues=(old,))) == {"b"}
    month_ago = spent.model_copy(update={"updated_at": stamp(after(-30 * 86400))})
    ancient = dataclasses.replace(old, history=month_ago)
    late = running("r", request(1, 1), "q", "any", namespace="y")
    assert admitted(decided(late, *two, queues=(dataclasses.replace(queue("q", 2), history=ancient.history),))) == {"a"}


def test_usage_is_counted_and_decays() -> None:
    spec = queue("q", 8).spec
    day = 86400
    one = counted(UsageHistory(), spec, {"x": 8}, NOW, after(3600), stamp(after(3600)))
    assert one.gpu_seconds == 8 * 3600 and one.namespaces[0].name == "x"
    later = counted(one, spec, {}, after(3600), after(3600 + day), stamp(after(3600 + day)))
    assert later.gpu_seconds == pytest.approx(4 * 3600)
    assert not counted(one, spec, {}, NOW, after(60 * day), stamp(NOW)).namespaces, "forgotten"


def test_queues_take_turns_by_their_weighted_share() -> None:
    cohort = (queue("q", 4, "c", weight="3"), queue("r", 4, "c", weight="1"), queue("idle", 8, "c"))
    jobs = [waiting(f"{q}{n}", request(1, 1), q) for q in ("q", "r") for n in range(20)]
    found = admitted(decided(*jobs, queues=cohort))
    mine = sum(1 for uid in found if uid.startswith("q"))
    assert len(found) == 16 and (mine, len(found) - mine) == (12, 4), "three to one, and each has its own"


def test_strict_and_best_effort_order() -> None:
    jobs = [waiting("large", request(1, 8), "q", age=9), waiting("small", request(1, 1), "q", age=1)]
    busy = running("r", request(1, 4), "q", "any")
    assert admitted(decided(busy, *jobs, queues=(queue("q", 8),))) == {"small"}
    strict = decided(busy, *jobs, queues=(queue("q", 8, ordering="StrictFIFO"),))
    assert not admitted(strict) and "behind team-a/large" in why(strict, "small").message and why(strict, "small").position == 2


def test_who_has_waited_too_long_is_not_passed_any_more() -> None:
    old = waiting("large", request(1, 8), "q", age=3600)
    busy = running("r", request(1, 4), "q", "any", nodes={"node-0": 1})
    found = decided(busy, old, waiting("small", request(1, 1), "q", age=1), queues=(queue("q", 16),), on=nodes(1))
    assert not admitted(found) and "what becomes free is kept for it" in why(found, "small").message
    other = decided(busy, old, waiting("else", request(1, 1), "r", age=1), queues=(queue("q", 16), queue("r", 8)), on=nodes(1))
    assert not admitted(other), "nor through another queue, on the nodes that it will have"
    beside = decided(
        busy,
        old,
        waiting("else", request(1, 1), "r", age=1),
        queues=(queue("q", 16), queue("r", 8)),
        on=(*nodes(1), Node(name="z", allocatable={GPU: 4})),
    )
    assert admitted(beside) == {"else"}, "other nodes go on"


# giving way


def test_f12_lower_priority_gives_way_the_cheapest_first() -> None:
    allocation = [
        running("dear", request(1, 4), "q", "any", {"node-0": 1}, saved_at=after(-3000)),
        running("cheap", request(1, 4), "q", "any", {"node-1": 1}, saved_at=after(-30)),
    ]
    found = decided(*allocation, waiting("high", request(1, 4), "q", priority=10), queues=(queue("q", 8),), on=nodes(2, gpus=4))
    assert why(found, "cheap").action == "preempt" and why(found, "dear").action == "keep"
    assert "gives way to team-a/high (priority 10)" in why(found, "cheap").message
    assert why(found, "high").reason == "WaitingForPreemption"
    equal = decided(*allocation, waiting("same", request(1, 4), "q"), queues=(queue("q", 8),), on=nodes(2, gpus=4))
    assert {v.action for v in equal.jobs.values()} == {"keep", "wait"}, "equal priority never"


def test_nobody_gives_way_in_vain() -> None:
    allocation = running("low", request(1, 4), "q", "any", {"node-0": 1})
    found = decided(allocation, waiting("high", request(1, 16), "q", priority=10), queues=(queue("q", 16),), on=nodes(1, gpus=8))
    assert why(found, "low").action == "keep"
    young = running("low", request(1, 8), "q", "any", {"node-0": 1}, since=after(-60))
    assert (
        why(decided(young, waiting("high", request(1, 8), "q", priority=1), queues=(queue("q", 8),), on=nodes(1)), "low").action == "keep"
    )
    never = queue("q", 8, preemption={"withinQueue": "Never"})
    old = running("low", request(1, 8), "q", "any", {"node-0": 1})
    assert why(decided(old, waiting("high", request(1, 8), "q", priority=1), queues=(never,), on=nodes(1)), "low").action == "keep"


def test_only_as_many_as_needed() -> None:
    allocation = [running(f"low{n}", request(1, 2), "q", "any", {"node-0": 1}, saved_at=after(-n * 60 - 60)) for n in range(4)]
    found = decided(*allocation, waiting("high", request(1, 4), "q", priority=1), queues=(queue("q", 8),), on=nodes(1))
    assert [uid for uid, v in found.jobs.items() if v.action == "preempt"] == ["low0", "low1"]
    mixed = [
        running("small", request(1, 1), "q", "any", {"node-0": 1}, saved_at=after(-1)),
        running("big", request(1, 7), "q", "any", {"node-0": 1}, saved_at=after(-600)),
    ]
    found = decided(*mixed, waiting("high", request(1, 7), "q", priority=1), queues=(queue("q", 8),), on=nodes(1))
    assert why(found, "small").action == "keep" and why(found, "big").action == "preempt", "the small one's end would not help"


def test_a_queue_takes_its_own_back_and_no_more() -> None:
    pair = (queue("q", 8, "c"), queue("r", 8, "c"))
    borrowed = [running(f"b{n}", request(1, 4), "r", "any", saved_at=after(-60 - n)) for n in range(4)]
    found = decided(*borrowed, waiting("mine", request(1, 8), "q"), queues=pair)
    assert sum(v.action == "preempt" for v in found.jobs.values()) == 2
    assert "queue q takes its quota back" in next(v.message for v in found.jobs.values() if v.action == "preempt")
    more = decided(*borrowed, waiting("mine", request(1, 12), "q"), queues=pair)
    assert not [v for v in more.jobs.values() if v.action == "preempt"], "borrowing itself, it displaces nobody"
    polite = (queue("q", 8, "c", preemption={"reclaimWithinCohort": "Never"}), queue("r", 8, "c"))
    assert not [v for v in decided(*borrowed, waiting("mine", request(1, 8), "q"), queues=polite).jobs.values() if v.action == "preempt"]


def test_what_is_borrowed_is_shared_where_a_queue_wants_that() -> None:
    """Two queues without a quota of their own borrow from a third that is idle."""

    def cohort(**preemption: Any) -> tuple[Queue, ...]:
        return queue("q", 0, "c", preemption=preemption), queue("r", 0, "c"), queue("idle", 8, "c")

    borrowed = [running(f"b{n}", request(1, 2), "r", "any", saved_at=after(-60 - n)) for n in range(4)]

    def displaced(found: Decisions) -> int:
        return sum(v.action == "preempt" for v in found.jobs.values())

    mine = waiting("mine", request(1, 4), "q")
    assert displaced(decided(*borrowed, mine, queues=cohort())) == 0, "not without being asked for"
    assert displaced(decided(*borrowed, mine, queues=cohort(fairSharing=True))) == 2, "half of it"
    assert displaced(decided(*borrowed, waiting("mine", request(1, 6), "q"), queues=cohort(fairSharing=True))) == 0, "no more than half"
    even = [*borrowed[:2], *(running(f"m{n}", request(1, 2), "q", "any") for n in range(2))]
    back = cohort(fairSharing=True)[0], queue("r", 0, "c", preemption={"fairSharing": True}), queue("idle", 8, "c")
    assert displaced(decided(*even, waiting("more", request(1, 2), "r"), queues=back)) == 0, "and nobody takes it back again"


def test_who_gives_way_is_waited_for_and_its_room_is_kept() -> None:
    leaving = running("low", request(1, 8), "q", "any", {"node-0": 1}, stopping=True)
    back = dataclasses.replace(leaving, waits=True)
    found = decided(
        back,
        waiting("high", request(1, 8), "q", priority=9),
        waiting("other", request(1, 8), "q", age=500),
        queues=(queue("q", 8),),
        on=nodes(1),
    )
    assert not admitted(found) and not [v for v in found.jobs.values() if v.action == "preempt"]
    assert why(found, "high").reason == "WaitingForPreemption" and why(found, "low").reason == "Stopping"
    gone = dataclasses.replace(back, allocation=None)
    found = decided(
        gone,
        waiting("high", request(1, 8), "q", priority=9),
        waiting("other", request(1, 8), "q", age=500),
        queues=(queue("q", 8),),
        on=nodes(1),
    )
    assert admitted(found) == {"high"}


def test_reports() -> None:
    found = decided(
        running("r", request(1, 4), "q", "any"),
        waiting("a", request(1, 8), "q", age=77),
        waiting("b", request(1, 9), "q"),
        queues=(queue("q", 8),),
    )
    report = found.queues["q"]
    assert (report.pending, report.admitted, dict(report.used)) == (2, 1, {"any": 4})
    assert report.oldest == ("team-a/a", after(-77)) and report.share == 0.5


# endpoints


def serving(name: str, what: Request, queue: str = "q", *, holds: bool = True, **more: Any) -> Workload:
    """Replicas that an endpoint holds, or wants besides."""
    made = running(name, what, queue, more.pop("flavor", "any"), **more) if holds else waiting(name, what, queue, **more)
    return dataclasses.replace(made, serves=True, request=dataclasses.replace(what, quota_alone=True))


def test_what_endpoints_hold_is_counted_told_and_never_taken() -> None:
    queues = (queue("q", 8, "c"), queue("own", 8, "c"))
    holder = serving("chat", request(10, 1))
    found = decided(holder, waiting("a", request(1, 8), "own", priority=9), queues=queues)
    assert why(found, "chat").action == "keep" and why(found, "a").reason == "WaitingForQuota"
    assert why(found, "a").message == "waits for 2 of 8 nvidia.com/gpu: quota has 6 left of any; endpoints hold 10 of any"
    assert admitted(decided(waiting("a", request(1, 6), "own"), holder, queues=queues)) == {"a"}
    report = found.queues["q"]
    assert (dict(report.used), dict(report.serving), report.admitted) == ({"any": 10}, {"any": 10}, 1)
    drained = decided(holder, queues=(queue("q", 8, "c", stopPolicy="HoldAndDrain"),))
    assert why(drained, "chat").action == "keep", "nor by an administrator who drains the queue"


def test_replicas_are_admitted_by_quota_one_by_one_and_wait_for_nodes_by_themselves() -> None:
    more = serving("chat/1", request((3, 2, 1), 2), holds=False)
    found = decided(more, queues=(queue("q", 5),), on=())
    assert why(found, "chat/1").admission.pods == 2  # type: ignore[union-attr]
    borrowed = decided(more, queues=(queue("q", 1, "c"), queue("other", 9, "c")), on=())
    assert why(borrowed, "chat/1").admission.pods == 3, "what others do not use, as jobs may"  # type: ignore[union-attr]
    full = decided(more, serving("chat", request(1, 5)), queues=(queue("q", 5),))
    assert why(full, "chat/1").message == (
        "waits for 2 of 2 nvidia.com/gpu: quota has 0 left of any; queue q uses 5 of 5 any; endpoints hold 5 of any"
    )
    limited = decided(
        more, running("r", request(1, 1), "q", "any"), queues=(queue("q", 9, limits={"maxGpusPerNamespace": 2, "maxJobsPerNamespace": 1}),)
    )
    assert why(limited, "chat/1").reason == "NamespaceLimit" and "holds 1 of 2" in why(limited, "chat/1").message


def test_a_node_is_kept_for_a_replica_that_has_none_yet_and_one_that_runs_is_seen_there() -> None:
    pending = serving("chat", request(1, 8))
    assert why(decided(pending, waiting("a", request(1, 1), "q"), queues=(queue("q", 99),), on=nodes(1)), "a").reason == "WaitingForNodes"
    bound = serving("chat", request(1, 4), nodes={"node-0": 1})
    used = tuple(dataclasses.replace(node, used={GPU: 4}) for node in nodes(1))
    assert admitted(decided(bound, waiting("a", request(1, 4), "q"), queues=(queue("q", 99),), on=used)) == {"a"}, "not counted twice"


def test_a_replica_of_higher_priority_asks_jobs_to_give_way() -> None:
    found = decided(
        running("low", request(1, 4), "q", "any"), serving("chat/1", request(1, 2), holds=False, priority=10), queues=(queue("q", 4),)
    )
    assert why(found, "low").action == "preempt" and "gives way to endpoint team-a/chat/1" in why(found, "low").message
    assert why(found, "chat/1").reason == "WaitingForPreemption"


@pytest.mark.parametrize(("flavor", "named"), [("", ""), ("gone", "q"), ("any", "deleted")])
def test_replicas_without_a_flavor_that_is_there_count_where_they_would_go(flavor: str, named: str) -> None:
    chat = dataclasses.replace(serving("chat", request(1, 4), named, flavor=flavor), queue=None)
    found = decided(chat, waiting("a", queue="default"), queues=(queue("default", 3), queue("q", 1)))
    told = why(found, "chat")
    assert (told.action, told.admission.queue, told.admission.flavor) == ("keep", "default", "any")  # type: ignore[union-attr]
    assert found.queues["default"].used == {"any": 4} and why(found, "a").reason == "WaitingForQuota"


# properties


@st.composite
def clusters(draw: st.DrawFn) -> Snapshot:
    """A few queues in two cohorts, nodes of different sizes, jobs that wait and jobs that run within quota and nodes."""
    names = ["q0", "q1", "q2"]
    made = tuple(
        queue(
            name,
            draw(st.integers(0, 12)),
            draw(st.sampled_from(["c", "c", None])),
            weight=draw(st.sampled_from(["1", "500m"])),
            ordering=draw(st.sampled_from(["StrictFIFO", "BestEffortFIFO"])),
        )
        for name in names
    )
    machines = tuple(
        Node(name=f"n{n}", allocatable={GPU: draw(st.sampled_from([2, 4, 8]))}, labels={"rack": draw(st.sampled_from("xy"))})
        for n in range(draw(st.integers(0, 5)))
    )
    jobs = tuple(
        waiting(
            f"j{n}",
            request(
                draw(st.sampled_from([1, 1, 2, 3, (2, 1), (4, 2, 1)])),
                draw(st.sampled_from([1, 2, 4, 8])),
                topology_key=draw(st.sampled_from(["", "", "rack"])),
            ),
            draw(st.sampled_from(names)),
            namespace=draw(st.sampled_from(["x", "y"])),
            priority=draw(st.sampled_from([0, 0, 10])),
            age=draw(st.integers(0, 5000)),
        )
        for n in range(draw(st.integers(0, 12)))
    )
    return Snapshot(now=NOW, workloads=jobs, queues=made, nodes=machines)


def test_a18_a_gang_whose_record_was_wiped_keeps_what_quota_has_room_for() -> None:
    other = running("other", request(1, 2), "q", "any")
    mine = running("mine", request(1, 2), "q", "any", recovers=True)
    found = decided(other, mine, queues=(queue("q", 4),))
    assert (why(found, "mine").action, why(found, "mine").reason) == ("keep", RECOVERED) and why(found, "other").reason == ""
    for queues, flavor in (((queue("q", 3),), "any"), ((queue("other", 9),), "any"), ((queue("q", 9),), "none such")):
        greedy = running("mine", request(1, 2), "q", flavor, recovers=True)
        found = decided(other, greedy, queues=queues)
        assert why(found, "mine").action == "wait" and why(found, "mine").reason in ("AdmissionLost", "QueueNotFound"), (queues, flavor)
    elsewhere = queue("q", 9, namespaceSelector={"matchLabels": {"team": "b"}})
    assert why(decided(mine, queues=(elsewhere,)), "mine").action == "wait"


def held_after(snapshot: Snapshot, decisions: Decisions) -> list[tuple[Workload, Allocation]]:
    allocation = []
    for w in snapshot.workloads:
        v = decisions.jobs[w.uid]
        if v.action in ("admit", "resize") and v.admission is not None:
            given = v.admission
            mine = Allocation(queue=given.queue, flavor=given.flavor, pods=given.pods, units=w.request.units, since=NOW, bound=given.place)
            allocation.append((w, mine))
        elif w.allocation is not None:
            allocation.append((w, w.allocation))
    return allocation


def check_quota(snapshot: Snapshot, allocation: list[tuple[Workload, Allocation]]) -> None:
    cohorts: dict[str, list[Queue]] = {}
    for q in snapshot.queues:
        cohorts.setdefault(q.spec.cohort or f"alone-{q.name}", []).append(q)
    for members in cohorts.values():
        total = sum(h.total for _, h in allocation if h.queue in {q.name for q in members})
        assert total <= sum(q.spec.flavors[0].nominal_quota for q in members), "never more than the cohort has"


def pack(snapshot: Snapshot, allocation: list[tuple[Workload, Allocation]]) -> bool:
    """Whether all pods fit on the nodes, by trying: a check that shares nothing with the code."""
    free = {n.name: n.allocatable[GPU] for n in snapshot.nodes or ()}
    pods = sorted((units for w, h in allocation for units in [h.units] * h.pods), reverse=True)
    for units in pods:
        name = min((n for n, left in free.items() if left >= units), key=lambda n: (free[n], n), default=None)
        if name is None:
            return False
        free[name] -= units
    return True


@settings(max_examples=300, deadline=None)
@given(clusters())
def test_quota_is_never_exceeded_and_gangs_fit(snapshot: Snapshot) -> None:
    decisions = decide(snapshot)
    allocation = held_after(snapshot, decisions)
    check_quota(snapshot, allocation)
    assert pack(snapshot, allocation), "sizes are powers of two, so that largest first always packs what fits at all"
    for w, h in allocation:
        assert h.pods in w.request.pods, "all of the gang, or a size that it allows"
    assert decisions == decide(snapshot), "the same answer for the same snapshot"
    assert decisions == decide(dataclasses.replace(snapshot, workloads=tuple(reversed(snapshot.workloads)))), "in whatever order it is told"


@settings(max_examples=300, deadline=None)
@given(clusters())
def test_nothing_idles_while_somebody_could_use_it(snapshot: Snapshot) -> None:
    loose = tuple(
        Queue(name=q.name, spec=q.spec.model_copy(update={"ordering": "BestEffortFIFO", "backfill_for": "30d"})) for q in snapshot.queues
    )
    snapshot = dataclasses.replace(snapshot, queues=loose)
    decisions = decide(snapshot)
    settled = tuple(dataclasses.replace(w, allocation=h, waits=False) for w, h in held_after(snapshot, decisions))
    for w in snapshot.workloads:
        if decisions.jobs[w.uid].action == "wait":
            again = decide(dataclasses.replace(snapshot, workloads=(*settled, w)))
            told = decisions.jobs[w.uid].message
            assert again.jobs[w.uid].action != "admit", f"{w.uid} waits although it fits: {told}"


@settings(max_examples=200, deadline=None)
@given(clusters(), st.integers(0, 2))
def test_more_quota_never_runs_less_of_a_single_queue(snapshot: Snapshot, which: int) -> None:
    """With one queue, jobs of one size and first come first served, a larger quota admits the same jobs and perhaps more."""
    q = snapshot.queues[which]
    same = tuple(dataclasses.replace(w, queue=q.name, request=request(1, 1), priority=0, namespace="x") for w in snapshot.workloads)
    small = dataclasses.replace(snapshot, workloads=same, queues=(q,))
    flavor = q.spec.flavors[0].model_copy(update={"nominal_quota": q.spec.flavors[0].nominal_quota + 3})
    large = dataclasses.replace(small, queues=(Queue(name=q.name, spec=q.spec.model_copy(update={"flavors": [flavor]})),))
    assert admitted(decide(small)) <= admitted(decide(large))


# over time, by simulation


def test_a_large_job_is_passed_for_so_long_and_no_longer() -> None:
    """Small jobs keep coming, more than there is room for; one needs every GPU."""
    stream = [Arrival(n * 15.0, waiting(f"s{n:03}", request(1, 1), "q"), 300.0) for n in range(400)]
    whole = Arrival(100.0, waiting("whole", request(2, 8), "q"), 300.0)
    done = simulate([*stream, whole], (queue("q", 16),), nodes(2))
    waited = done["whole"][0] - 100
    assert 1800 <= waited <= 1800 + 300 + 15, "backfillFor, and until those that ran then have ended"
    never = simulate([*stream, whole], (queue("q", 16, backfillFor="30d"),), nodes(2))
    assert never["whole"][0] >= 400 * 15, "this is what it is for"


def test_what_is_displaced_ends_too_and_nobody_goes_to_and_fro() -> None:
    urgent = [Arrival(600.0 + n * 100, waiting(f"u{n}", request(1, 8), "q", priority=10), 200.0) for n in range(3)]
    long = Arrival(0.0, waiting("long", request(2, 8), "q"), 3000.0)
    done = simulate([long, *urgent], (queue("q", 16),), nodes(2))
    assert all(done[f"u{n}"][0] - (600 + n * 100) < 100 for n in range(3)), "two at once"
    assert done["long"][1] <= 3000 + 600, "it lost its turn once, for as long as they ran"
