"""The edge around decide(): a pass over the heads of the lines gives away the same, and says nothing to those that wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import pytest

from finetune_api import names
from finetune_api.validation import parse_spec
from finetune_operator.cache.assumptions import Assumptions
from finetune_operator.cache.progress import ProgressBoard
from finetune_operator.cache.store import Store
from finetune_operator.controllers import admission as scheduler_module
from finetune_operator.controllers.admission import _BACKLOG, _HEADS, AdmissionLoop
from finetune_operator.controllers.manager import Manager
from finetune_operator.model.objects import Key
from finetune_operator.model.queueing import Decision, Decisions, Snapshot
from finetune_operator.settings import Settings
from tests.factory import MINIMAL, NOW, job, merged, stamp
from tests.listing import InMemory

GPU = "nvidia.com/gpu"
QUOTA, JOBS = 2, _HEADS + 40


class Lists(InMemory):
    """An API server that has one queue, and takes every status."""

    def __init__(self) -> None:
        flavor = {"name": "any", "resourceName": GPU, "nominalQuota": QUOTA, "nodes": "Autoscaled"}
        self.queue = {"metadata": {"name": "default", "generation": 1}, "spec": {"flavors": [flavor]}}
        self.told: list[dict[str, Any]] = []

    async def list(self, kind: str, *_: str) -> AsyncIterator[dict[str, Any]]:
        found: dict[str, list[dict[str, Any]]] = {
            "FineTuneQueue": [self.queue],
            "Namespace": [{"metadata": {"name": "team-a"}}],
            "PriorityClass": [{"metadata": {"name": "urgent"}, "value": 100}],
        }
        for raw in found.get(kind, []):
            yield raw

    async def replace_status(self, raw: dict[str, Any], *, urgent: bool = True) -> dict[str, Any]:
        self.told.append(raw)
        return raw

    def now(self) -> datetime:
        return NOW


def waiting(number: int, **scheduling: str) -> dict[str, Any]:
    spec = merged(MINIMAL, distribution={"gpusPerNode": 1}, scheduling=scheduling)
    status = {
        "observedGeneration": 1,
        "queue": {"since": stamp(NOW)},
        "conditions": [{"type": "DataReady", "status": "True"}, {"type": "Admitted", "status": "False"}],
    }
    return job(spec, status, name=f"job-{number:03}", uid=f"uid-{number:03}", resourceVersion=str(number + 1))


def ended(raw: dict[str, Any]) -> dict[str, Any]:
    meta = {**raw["metadata"], "resourceVersion": str(int(raw["metadata"]["resourceVersion"]) + 1000)}
    return {**raw, "metadata": meta, "status": {"finishedAt": stamp(NOW), "conditions": [{"type": "Succeeded", "status": "True"}]}}


@pytest.fixture
def store() -> Store:
    known = Store()
    for number in range(JOBS):
        known.put_job(waiting(number))
    return known


async def test_heads_are_admitted_in_order_and_the_others_keep_their_word(store: Store) -> None:
    woken: list[Key] = []
    server = Lists()
    assumptions = Assumptions(lambda: scheduler.poke())
    scheduler = AdmissionLoop(server, store, assumptions, Settings(), woken.append)  # type: ignore[arg-type]
    first = await scheduler.once()
    assert [uid for uid, v in first.jobs.items() if v.action == "admit"] == ["uid-000", "uid-001"]
    assert assumptions.decision(f"uid-{JOBS - 1:03}").position == JOBS - QUOTA  # type: ignore[union-attr]
    before = {f"uid-{n:03}": assumptions.decision(f"uid-{n:03}") for n in range(QUOTA, JOBS)}
    store.put_job(ended(waiting(0)))
    assumptions.recorded("uid-000")
    woken.clear()
    told = len(server.told)

    heads = await scheduler.once(heads=True)
    assert len(heads.jobs) <= _HEADS + QUOTA, "those far back were not looked at"
    assert woken == [("team-a", "job-002")] and assumptions.decision("uid-002").action == "admit"  # type: ignore[union-attr]
    assert {uid: assumptions.decision(uid) for uid in before if uid != "uid-002"} == {u: v for u, v in before.items() if u != "uid-002"}
    assert len(server.told) == told, "a queue is told by the passes over all"

    everything = await scheduler.once()
    assert not [uid for uid, v in everything.jobs.items() if v.action == "admit"], "nothing is given twice"
    assert assumptions.decision(f"uid-{JOBS - 1:03}").position == JOBS - QUOTA - 1  # type: ignore[union-attr]


async def test_who_has_just_come_is_looked_at_with_the_heads(store: Store) -> None:
    woken: list[Key] = []
    assumptions = Assumptions(lambda: scheduler.poke())
    scheduler = AdmissionLoop(Lists(), store, assumptions, Settings(), woken.append)  # type: ignore[arg-type]
    await scheduler.once()
    store.put_job(ended(waiting(0)))
    assumptions.recorded("uid-000")
    store.put_job(waiting(900, priorityClassName="urgent"))
    store.put_job(waiting(901))
    woken.clear()
    await scheduler.once(heads=True)
    assert woken == [("team-a", "job-900")], "it goes first; the other is told its place by the next pass over all"
    assert assumptions.decision("uid-901") is None
    await scheduler.once()
    assert assumptions.decision("uid-901").position == JOBS - QUOTA + 1  # type: ignore[union-attr]


async def test_f24_nothing_is_given_away_before_it_is_known_what_a_changed_job_holds() -> None:
    began_with = merged(MINIMAL, distribution={"gpusPerNode": QUOTA})
    status = {
        "observedGeneration": 1,
        "admission": {"queue": "default", "flavor": "any", "nodes": 1, "admittedAt": stamp(NOW)},
        "conditions": [{"type": "DataReady", "status": "True"}, {"type": "Admitted", "status": "True"}],
    }
    changed = job(merged(MINIMAL, distribution={"gpusPerNode": 1}), status, name="first", uid="uid-first", generation=2)
    store = Store()  # of an operator that has just started
    for raw in (changed, waiting(1)):
        store.put_job(raw)
    assumptions = Assumptions(lambda: scheduler.poke())
    scheduler = AdmissionLoop(Lists(), store, assumptions, Settings(), lambda key: None)  # type: ignore[arg-type]
    await scheduler.once()
    assert assumptions.decision("uid-001") is None
    store.begun_with("uid-first", parse_spec(began_with))
    await scheduler.once()
    assert assumptions.decision("uid-001").reason == "WaitingForQuota", "the one that began holds all of it"  # type: ignore[union-attr]


@pytest.mark.parametrize("heads", [False, True], ids=["all", "heads"])
async def test_what_a_gang_is_to_grow_by_is_not_given_to_another(heads: bool) -> None:
    """Its own pass may be writing it down at this very moment."""
    spec = merged(
        MINIMAL,
        distribution={"gpusPerNode": 1, "nodes": 2, "minNodes": 1},
        tuning={"hyperparameters": {"globalBatchSize": 2}},
    )
    true = [{"type": type_, "status": "True"} for type_ in ("DataReady", "Admitted")]
    admission = {"queue": "default", "flavor": "any", "nodes": 1, "admittedAt": "2020-01-01T00:00:00Z"}
    small = job(spec, {"observedGeneration": 1, "admission": admission, "conditions": true}, name="small", uid="small")
    labels = {names.LABEL_JOB_UID: "small", names.LABEL_STAGE: "train", names.LABEL_RANK: "0", names.LABEL_ATTEMPT: "0"}
    owner = {"kind": "FineTuneJob", "uid": "small", "controller": True}
    meta = {"name": "w", "namespace": "team-a", "uid": "w", "resourceVersion": "1", "labels": labels, "ownerReferences": [owner]}
    known, assumptions = Store(), Assumptions()
    known.put_job(small)
    known.put_child("Pod", {"metadata": meta, "spec": {"nodeName": "node-1"}, "status": {"phase": "Running"}})
    loop = AdmissionLoop(Lists(), known, assumptions, Settings(), lambda key: None)  # type: ignore[arg-type]
    assert (await loop.once()).jobs["small"].action == "resize"
    known.put_job(waiting(1))
    assert (await loop.once(heads=heads)).jobs["uid-001"].action == "wait"
    decision = assumptions.decision("small")
    assert decision is not None and decision.action == "resize", "until it is on record"
    assumptions.recorded("small")
    assert assumptions.decision("small") is None, "and not carried out twice"


async def test_many_decisions_are_put_on_record_before_more_are_made(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assumptions = Assumptions(lambda: scheduler.poke())
    scheduler = AdmissionLoop(Lists(), store, assumptions, Settings(), lambda key: None)  # type: ignore[arg-type]
    for n in range(_BACKLOG + 1):
        assumptions.decide(f"uid-{n:03}", Decision(action="admit"))
    monkeypatch.setattr(scheduler_module, "_BACKLOG_SECONDS", 30.0)
    waiting = asyncio.create_task(scheduler._until_recorded())
    await asyncio.sleep(0.2)
    assert not waiting.done()
    assumptions.recorded("uid-000")
    await asyncio.wait_for(waiting, 5)
    for n in range(_BACKLOG + 1):
        assumptions.decide(f"uid-{n:03}", Decision(action="admit"))
    monkeypatch.setattr(scheduler_module, "_BACKLOG_SECONDS", 0.1)
    await asyncio.wait_for(scheduler._until_recorded(), 5)


def test_who_is_to_give_way_has_its_turn_first() -> None:
    """Somebody with a higher priority waits for it; then come those that hold something, by priority, then all others."""
    store = Store()
    for number in range(3):
        store.put_job(waiting(number))
    manager = Manager(Lists(), store, ProgressBoard(), Settings())  # type: ignore[arg-type]
    manager.assumptions.decide("uid-001", Decision(action="admit"))
    manager.assumptions.decide("uid-002", Decision(action="preempt"))
    rank = manager.jobs.kind.rank
    keys = sorted(store.job_keys(), key=rank, reverse=True)
    assert [name for _, name in keys] == ["job-002", "job-001", "job-000"]
    assert rank(keys[0]) > rank(keys[1]) > rank(keys[2])


async def test_the_loop_goes_on_while_all_jobs_are_decided_about(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over ten thousand jobs takes seconds, in which probes, progress and watches must be heard."""
    heard = threading.Event()
    real = scheduler_module.decide

    def decide(snapshot: Snapshot) -> Decisions:
        asyncio_loop.call_soon_threadsafe(heard.set)
        assert heard.wait(10), "nothing else had its turn meanwhile"
        return real(snapshot)

    asyncio_loop = asyncio.get_running_loop()
    monkeypatch.setattr(scheduler_module, "decide", decide)
    loop = AdmissionLoop(Lists(), store, Assumptions(), Settings(), lambda key: None)  # type: ignore[arg-type]
    found = await loop.once()
    assert sum(d.action == "admit" for d in found.jobs.values()) == QUOTA


async def test_what_changes_while_it_is_decided_is_not_decided_about_twice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job ends, another is gone, while the pass goes: what was decided about them comes to nothing with the next."""
    real = scheduler_module.decide

    def decide(snapshot: Snapshot) -> Decisions:
        store.put_job(ended(waiting(0)))
        store.drop_job(waiting(1))
        return real(snapshot)

    assumptions = Assumptions()
    loop = AdmissionLoop(Lists(), store, assumptions, Settings(), lambda key: None)  # type: ignore[arg-type]
    store.forgotten += [assumptions.forget, loop.forget]
    monkeypatch.setattr(scheduler_module, "decide", decide)
    first = await loop.once()
    assert {uid for uid, d in first.jobs.items() if d.action == "admit"} == {"uid-000", "uid-001"}
    monkeypatch.setattr(scheduler_module, "decide", real)
    second = await loop.once()
    assert {uid for uid, d in second.jobs.items() if d.action == "admit"} == {"uid-002", "uid-003"}
    assert assumptions.decision("uid-000") is None and assumptions.decision("uid-001") is None and assumptions.backlog == QUOTA
