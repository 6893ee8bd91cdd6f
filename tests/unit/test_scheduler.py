"""The edge around decide(): a pass over the heads of the lines gives away the same, and says nothing to those that wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import pytest

from finetune_api.validation import parse_spec
from finetune_operator.cache.progress import ProgressBoard
from finetune_operator.cache.store import Store
from finetune_operator.controllers import admission as scheduler_module
from finetune_operator.controllers.admission import _BACKLOG, _HEADS, Scheduler
from finetune_operator.controllers.job import Controller
from finetune_operator.model.objects import Key
from finetune_operator.model.queueing import Decision
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
    scheduler = Scheduler(server, store, Settings(), woken.append)  # type: ignore[arg-type]
    first = await scheduler.once()
    assert [uid for uid, v in first.jobs.items() if v.action == "admit"] == ["uid-000", "uid-001"]
    assert scheduler.decision(f"uid-{JOBS - 1:03}").position == JOBS - QUOTA  # type: ignore[union-attr]
    before = {f"uid-{n:03}": scheduler.decision(f"uid-{n:03}") for n in range(QUOTA, JOBS)}
    store.put_job(ended(waiting(0)))
    scheduler.recorded("uid-000")
    woken.clear()
    told = len(server.told)

    heads = await scheduler.once(heads=True)
    assert len(heads.jobs) <= _HEADS + QUOTA, "those far back were not looked at"
    assert woken == [("team-a", "job-002")] and scheduler.decision("uid-002").action == "admit"  # type: ignore[union-attr]
    assert {uid: scheduler.decision(uid) for uid in before if uid != "uid-002"} == {u: v for u, v in before.items() if u != "uid-002"}
    assert len(server.told) == told, "a queue is told by the passes over all"

    everything = await scheduler.once()
    assert not [uid for uid, v in everything.jobs.items() if v.action == "admit"], "nothing is given twice"
    assert scheduler.decision(f"uid-{JOBS - 1:03}").position == JOBS - QUOTA - 1  # type: ignore[union-attr]


async def test_who_has_just_come_is_looked_at_with_the_heads(store: Store) -> None:
    woken: list[Key] = []
    scheduler = Scheduler(Lists(), store, Settings(), woken.append)  # type: ignore[arg-type]
    await scheduler.once()
    store.put_job(ended(waiting(0)))
    scheduler.recorded("uid-000")
    store.put_job(waiting(900, priorityClassName="urgent"))
    store.put_job(waiting(901))
    woken.clear()
    await scheduler.once(heads=True)
    assert woken == [("team-a", "job-900")], "it goes first; the other is told its place by the next pass over all"
    assert scheduler.decision("uid-901") is None
    await scheduler.once()
    assert scheduler.decision("uid-901").position == JOBS - QUOTA + 1  # type: ignore[union-attr]


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
    scheduler = Scheduler(Lists(), store, Settings(), lambda key: None)  # type: ignore[arg-type]
    await scheduler.once()
    assert scheduler.decision("uid-001") is None
    scheduler.begun_with("uid-first", parse_spec(began_with))
    await scheduler.once()
    assert scheduler.decision("uid-001").reason == "WaitingForQuota", "the one that began holds all of it"  # type: ignore[union-attr]


async def test_many_decisions_are_put_on_record_before_more_are_made(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(Lists(), store, Settings(), lambda key: None)  # type: ignore[arg-type]
    scheduler._intended = {f"uid-{n:03}": Decision(action="admit") for n in range(_BACKLOG + 1)}
    monkeypatch.setattr(scheduler_module, "_BACKLOG_SECONDS", 30.0)
    waiting = asyncio.create_task(scheduler._until_recorded())
    await asyncio.sleep(0.2)
    assert not waiting.done()
    scheduler.recorded("uid-000")
    await asyncio.wait_for(waiting, 5)
    scheduler._intended = {f"uid-{n:03}": Decision(action="admit") for n in range(_BACKLOG + 1)}
    monkeypatch.setattr(scheduler_module, "_BACKLOG_SECONDS", 0.1)
    await asyncio.wait_for(scheduler._until_recorded(), 5)


def test_who_is_to_give_way_has_its_turn_first() -> None:
    """Somebody with a higher priority waits for it; then come those that hold something, by priority, then all others."""
    store = Store()
    for number in range(3):
        store.put_job(waiting(number))
    controller = Controller(Lists(), store, ProgressBoard(), Settings())  # type: ignore[arg-type]
    decisions = {"uid-001": Decision(action="admit"), "uid-002": Decision(action="preempt")}
    controller.scheduler._decisions.update(decisions)
    keys = sorted(store.job_keys(), key=controller._rank, reverse=True)
    assert [name for _, name in keys] == ["job-002", "job-001", "job-000"]
    assert controller._rank(keys[0]) > controller._rank(keys[1]) > controller._rank(keys[2])
