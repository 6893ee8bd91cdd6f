"""The scheduler alone: how long a pass takes, how it grows, and what its policy does to a trace, against FIFO and priorities."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
from datetime import timedelta

from finetune_api.queue import FineTuneQueueSpec
from finetune_operator.model.queueing import Admission, Allocation, Node, Queue, Request, Snapshot, Workload
from finetune_operator.queueing import decide
from tests.factory import NOW

GPU = "nvidia.com/gpu"


def request(pods: int, units: int) -> Request:
    return Request(resource=GPU, units=units, pods=(pods,), per_pod=(("cpu", 4000 * units), (GPU, units)))


def job(name: str, queue: str, what: Request, age: float, *, namespace: str = "a", priority: int = 0) -> Workload:
    since = NOW - timedelta(seconds=age)
    return Workload(
        uid=name, namespace=namespace, name=name, queue=queue, priority=priority, since=since, waits_since=since, request=what, waits=True
    )


def queue(name: str, quota: int, cohort: str | None = None, **spec: object) -> Queue:
    body = {"flavors": [{"name": "any", "nominalQuota": quota}], **({"cohort": cohort} if cohort else {}), **spec}
    return Queue(name=name, spec=FineTuneQueueSpec.model_validate(body))


# how long a pass takes


def crowd(pending: int, nodes: int, queues: int, seed: int = 1) -> Snapshot:
    """Half of the nodes are in use; queues in cohorts of ten."""
    rng = random.Random(seed)
    machines = [Node(name=f"n{n}", allocatable={GPU: 8, "cpu": 64000}) for n in range(nodes)]
    names = [f"q{n}" for n in range(queues)]
    quota = max(1, nodes * 8 // queues)
    running = []
    for n in range(0, nodes, 2):
        allocation = Allocation(
            queue=rng.choice(names), flavor="any", pods=1, units=8, since=NOW - timedelta(hours=1), bound=((f"n{n}", 1),)
        )
        running.append(dataclasses.replace(job(f"r{n}", allocation.queue, request(1, 8), 4000), allocation=allocation, waits=False))
    waiting = [
        job(
            f"w{n}",
            rng.choice(names),
            request(rng.choice([1, 1, 1, 2, 4]), rng.choice([1, 1, 2, 4, 8])),
            rng.uniform(0, 1500),
            namespace=f"ns{rng.randrange(50)}",
            priority=rng.choice([0, 0, 0, 10]),
        )
        for n in range(pending)
    ]
    made = tuple(queue(name, quota, f"c{index // 10}") for index, name in enumerate(names))
    return Snapshot(now=NOW, workloads=(*running, *waiting), queues=made, nodes=tuple(machines))


def passes() -> list[dict[str, float]]:
    """Milliseconds of a pass by size, and the exponent of its growth."""
    rows: list[dict[str, float]] = []
    for pending, nodes, queues in ((100, 10, 5), (1000, 100, 10), (10_000, 1000, 100)):
        snapshot = crowd(pending, nodes, queues)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            decisions = decide(snapshot)
            times.append(time.perf_counter() - began)
        typical = statistics.median(times)
        row = {"pending": pending, "nodes": nodes, "queues": queues, "milliseconds": round(typical * 1000, 1)}
        row |= {"worst": round(max(times) * 1000, 1), "decisions_per_second": round(pending / typical)}
        if rows:
            row["exponent"] = round(math.log(row["milliseconds"] / rows[-1]["milliseconds"]) / math.log(pending / rows[-1]["pending"]), 2)
        rows.append({**row, "admitted": sum(v.action == "admit" for v in decisions.jobs.values())})
    return rows


# what the policy does


@dataclasses.dataclass
class Arrival:
    """A job of a trace."""

    at: float
    work: Workload
    seconds: float


def _allocation(work: Workload, given: Admission, snapshot: Snapshot) -> Allocation:
    return Allocation(
        queue=given.queue, flavor=given.flavor, pods=given.pods, units=work.request.units, since=snapshot.now, bound=given.place
    )


def simulate(
    arrivals: Iterable[Arrival], queues: tuple[Queue, ...], nodes: tuple[Node, ...] | None, tick: float = 0.0
) -> dict[str, tuple[float, float]]:
    """Run a trace in its own time: uid -> (started, ended). What gives way goes on later with what is left to do."""
    coming = sorted(arrivals, key=lambda a: (a.at, a.work.uid))
    left = {a.work.uid: a.seconds for a in coming}
    waiting: dict[str, Workload] = {}
    running: dict[str, tuple[Workload, float]] = {}
    first: dict[str, float] = {}
    done: dict[str, tuple[float, float]] = {}
    ends: list[tuple[float, int, str]] = []
    serial, index, clock = itertools.count(), 0, 0.0
    while index < len(coming) or waiting or running:
        upcoming = [coming[index].at] if index < len(coming) else []
        while ends and (ends[0][2] not in running or running[ends[0][2]][1] + left[ends[0][2]] != ends[0][0]):
            heapq.heappop(ends)  # it gave way meanwhile
        if ends:
            upcoming.append(ends[0][0])
        if not upcoming:
            break
        clock = max(clock, min(upcoming) + tick)
        while index < len(coming) and coming[index].at <= clock:
            work, since = coming[index].work, NOW + timedelta(seconds=coming[index].at)
            waiting[work.uid] = dataclasses.replace(work, since=since, waits_since=since)
            index += 1
        while ends and ends[0][0] <= clock:
            end, _, uid = heapq.heappop(ends)
            if uid in running and running[uid][1] + left[uid] == end:
                del running[uid]
                done[uid] = (first[uid], end)
        changed = True
        while changed:  # what gives way is gone at once here, and whoever it made room for starts
            changed = False
            snapshot = Snapshot(
                now=NOW + timedelta(seconds=clock),
                workloads=(*(w for w, _ in running.values()), *waiting.values()),
                queues=queues,
                nodes=nodes,
            )
            for uid, decision in decide(snapshot).jobs.items():
                if decision.action == "admit" and decision.admission is not None:
                    work = waiting.pop(uid)
                    running[uid] = dataclasses.replace(work, allocation=_allocation(work, decision.admission, snapshot), waits=False), clock
                    first.setdefault(uid, clock)
                    heapq.heappush(ends, (clock + left[uid], next(serial), uid))
                elif decision.action == "preempt":
                    work, began = running.pop(uid)
                    left[uid] = max(1.0, left[uid] - (clock - began))
                    waiting[uid] = dataclasses.replace(work, allocation=None, waits=True, waits_since=snapshot.now)
                    changed = True
    return done


def baseline() -> dict[str, object]:
    """Kueue's own workload (test/performance/scheduler): 5 cohorts of 6 queues, 15,000 jobs; here in simulated time, without API calls."""
    arrivals, serial = [], itertools.count()
    queues = []
    classes = (("small", 350, 1, 0.2, 50, 0.1), ("medium", 100, 5, 0.5, 100, 0.5), ("large", 50, 20, 1.0, 200, 1.2))
    for cohort in range(5):
        for number in range(6):
            name = f"c{cohort}-q{number}"
            spec = {"preemption": {"withinQueue": "LowerPriority", "reclaimWithinCohort": "Any", "minimumRunTime": "0s"}}
            body = {"flavors": [{"name": "any", "nominalQuota": 20, "borrowingLimit": 100}], "cohort": f"c{cohort}", **spec}
            queues.append(Queue(name=name, spec=FineTuneQueueSpec.model_validate(body)))
            for kind, count, units, seconds, priority, every in classes:
                for n in range(count):
                    uid = f"{kind}-{next(serial)}"
                    arrivals.append(Arrival(n * every, job(uid, name, request(1, units), 0, priority=priority), seconds))
    began = time.perf_counter()
    done = simulate(arrivals, tuple(queues), None)
    took = time.perf_counter() - began
    by_kind: dict[str, list[float]] = {}
    units = {kind: u for kind, _, u, *_ in classes}
    for arrival in arrivals:
        kind = arrival.work.uid.partition("-")[0]
        by_kind.setdefault(kind, []).append(done[arrival.work.uid][0] - arrival.at)
    wall = max(end for _, end in done.values())
    busy = sum(units[a.work.uid.partition("-")[0]] * a.seconds for a in arrivals) / (wall * 5 * 6 * 20)
    return {
        "seconds": round(wall, 1),
        "use_of_nominal": round(busy, 3),
        "time_to_admission": {kind: round(statistics.mean(found), 1) for kind, found in by_kind.items()},
        "seconds_in_the_scheduler": round(took, 1),
        "published_by_kueue_on_a_real_server": {"seconds": 351, "use_of_nominal": 0.559, "large": 16.5, "medium": 76.8, "small": 215},
    }


def trace(count: int = 1500, seed: int = 7) -> list[Arrival]:
    """Sizes and durations as published of Microsoft's Philly cluster (Jeon et al., ATC 2019): most jobs use one GPU, durations
    are log-normal over four orders of magnitude. Arrivals are Poisson for a load of about 90 %.
    """
    rng = random.Random(seed)
    shapes, weights = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (4, 8)), (70, 8, 8, 9, 3, 2)
    made, at = [], 0.0
    mean = sum(p * u * w for (p, u), w in zip(shapes, weights, strict=True)) / sum(weights)
    typical = math.exp(math.log(900) + 1.7**2 / 2)
    gap = mean * typical / (0.9 * 16 * 8)
    for n in range(count):
        at += rng.expovariate(1 / gap)
        pods, units = rng.choices(shapes, weights)[0]
        seconds = min(86_400.0, max(20.0, rng.lognormvariate(math.log(900), 1.7)))
        tenant = rng.choices(["x", "y", "z"], [6, 3, 1])[0]
        urgent = 10 if rng.random() < 0.1 else 0
        made.append(Arrival(at, job(f"j{n:05}", tenant, request(pods, units), 0, namespace=tenant, priority=urgent), seconds))
    return made


def policies() -> list[dict[str, object]]:
    """The same trace and code under three policies."""
    nodes = tuple(Node(name=f"n{n:02}", allocatable={GPU: 8, "cpu": 64000}) for n in range(16))
    never = {"withinQueue": "Never", "reclaimWithinCohort": "Never"}
    fair = tuple(queue(name, quota, "all") for name, quota in (("x", 43), ("y", 43), ("z", 42)))
    one = (queue("all", 128, ordering="StrictFIFO", preemption=never),)
    priorities = (queue("all", 128, preemption=never),)

    def together(arrivals: list[Arrival], *, urgent: bool) -> list[Arrival]:
        return [
            dataclasses.replace(
                a, work=dataclasses.replace(a.work, queue="all", namespace="one", priority=a.work.priority if urgent else 0)
            )
            for a in arrivals
        ]

    def same(arrivals: list[Arrival]) -> list[Arrival]:
        return arrivals

    cases: tuple[tuple[str, tuple[Queue, ...], Callable[[list[Arrival]], list[Arrival]]], ...] = (
        ("FIFO", one, lambda a: together(a, urgent=False)),
        ("priority, back-filling, no preemption", priorities, lambda a: together(a, urgent=True)),
        ("queues of three tenants", fair, same),
    )
    arrivals, rows = trace(), []
    for name, queues, shape in cases:
        done = simulate(shape(arrivals), queues, nodes)
        took = {a.work.uid: done[a.work.uid][1] - a.at for a in arrivals}
        slow = [took[a.work.uid] / a.seconds for a in arrivals]
        tenants = {t: round(statistics.median(took[a.work.uid] / a.seconds for a in arrivals if a.work.namespace == t), 2) for t in "xyz"}
        wall = max(end for _, end in done.values())
        used = sum(a.seconds * a.work.request.pods[0] * a.work.request.units for a in arrivals) / (wall * 128)
        ordered = sorted(took.values())
        rows.append(
            {
                "policy": name,
                "completion_mean": round(statistics.mean(ordered)),
                "completion_p95": round(ordered[int(len(ordered) * 0.95)]),
                "urgent_mean": round(statistics.mean(took[a.work.uid] for a in arrivals if a.work.priority)),
                "slowdown_median": round(statistics.median(slow), 2),
                "slowdown_by_tenant_of_60_30_10_percent": tenants,
                "jain_of_slowdowns": round(sum(tenants.values()) ** 2 / (3 * sum(t * t for t in tenants.values())), 2),
                "use": round(used, 3),
            }
        )
    return rows


def bench() -> dict[str, object]:
    """All three. No API server: what a real one adds is in the operator's benchmark."""
    return {"passes": passes(), "policies_on_a_trace": policies(), "kueues_workload_simulated": baseline()}
