"""The loops at the edge: what they write in which order, what they assume, what they forget."""

from __future__ import annotations

import asyncio
import base64
import copy
import dataclasses
import json
import time
from dataclasses import dataclass
from typing import Any

import pytest

from finetune_api.base import APIModel
from finetune_api.contract import ProgressReport
from finetune_api.status import Condition, FineTuneJobStatus, Progress
from finetune_api.validation import parse_spec
from finetune_operator import metrics
from finetune_operator.cache import assumptions as assumptions_module
from finetune_operator.cache.assumptions import EXPIRES_SECONDS, Assumptions
from finetune_operator.cache.progress import ProgressBoard
from finetune_operator.cache.store import Store
from finetune_operator.cluster.errors import APIError
from finetune_operator.cluster.limits import AGEING_SECONDS, Priority, RateLimit
from finetune_operator.cluster.seal_key import ensure_seal_key
from finetune_operator.controllers.controller import Controller, Kind
from finetune_operator.controllers.events import Events
from finetune_operator.controllers.manager import Manager
from finetune_operator.controllers.writer import Writer
from finetune_operator.model.job import PodView
from finetune_operator.model.objects import Key, Object
from finetune_operator.model.queueing import Admission, Decision, Workload
from finetune_operator.model.seal import seal
from finetune_operator.model.workload import request_of, workload_of
from finetune_operator.reconcile.plan import Event, Plan
from finetune_operator.settings import Settings
from tests.factory import MINIMAL, NOW, UID, after, job, merged, stamp
from tests.unit.test_machine import Server

KEY = ("team-a", "support")
SETTINGS = Settings(progress_url="none", soon_seconds=0, status_interval_seconds=0, snapshot_seconds=0)
GPU = "nvidia.com/gpu"


class Cluster(Server):
    """A server that notes what is written, and refuses what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []
        self.refuses: dict[str, APIError] = {}
        self.reads: dict[str, list[Object]] = {}

    def _note(self, what: str, key: str) -> None:
        self.writes.append(what)
        if key in self.refuses:
            raise self.refuses[key]

    async def create(self, manifest: Object) -> Object:
        self._note(f"create {manifest['kind']}", manifest["kind"])
        return await super().create(manifest)

    async def replace_status(self, raw: Object, *, urgent: bool = True) -> Object:
        self._note(f"status {raw['kind']} {raw['metadata']['name']}", f"status {raw['metadata']['name']}")
        if raw["kind"] != "FineTuneJob":
            return raw
        return await super().replace_status(raw, urgent=urgent)

    def of(self, kind: str) -> list[Object]:
        return self.reads.get(kind, []) or super().of(kind)


@pytest.fixture
def cluster() -> Cluster:
    server = Cluster()
    server.put("FineTuneJob", job())
    return server


def manager(cluster: Cluster) -> Manager:
    return Manager(cluster, Store(), ProgressBoard(), SETTINGS)  # type: ignore[arg-type]


def dropped(reason: str) -> float:
    return float(metrics.EVENTS_DROPPED.labels(reason=reason)._value.get())


# what is written, and in which order


@pytest.mark.parametrize("failure", [APIError(503, "ServiceUnavailable", "overloaded"), APIError(403, "Forbidden", "no events")])
async def test_events_come_after_the_status_and_hold_nothing_up(cluster: Cluster, failure: APIError) -> None:
    cluster.refuses["Event"] = failure
    operator = manager(cluster)
    await operator.resync.once()
    await operator.jobs.process(KEY)
    assert cluster.objects["FineTuneJob", "support"]["status"]["phase"] == "Preparing", "though no Event can be posted"
    assert "create Event" not in cluster.writes, "they wait for a moment when there is time"
    before = dropped("Unreachable") + dropped("Refused")
    await operator.events.post()
    assert dropped("Unreachable") + dropped("Refused") == before + cluster.writes.count("create Event") > before
    assert cluster.writes.index("status FineTuneJob support") < cluster.writes.index("create Event")


async def test_what_an_older_definition_drops_is_not_written_over_and_over(cluster: Cluster) -> None:
    """Each write was taken for news, and acted on at once."""
    real, operator = cluster.replace_status, manager(cluster)

    async def replace_status(raw: Object, *, urgent: bool = True) -> Object:
        return await real({**raw, "status": {name: value for name, value in raw["status"].items() if name != "startedAt"}}, urgent=urgent)

    cluster.replace_status = replace_status  # type: ignore[method-assign]
    await operator.resync.once()
    for _ in range(3):
        await operator.jobs.process(KEY)
    assert operator.jobs.queue._pop() is None, "it comes to rest"
    assert cluster.objects["FineTuneJob", "support"]["status"]["phase"] == "Preparing"


async def test_events_that_wait_are_bounded(cluster: Cluster) -> None:
    events, before = Events(cluster, most=10), dropped("TooMany")  # type: ignore[arg-type]
    for number in range(25):
        events.add(job(), [Event("Normal", "Told", f"number {number}")])
    assert dropped("TooMany") == before + 15
    await events.post()
    assert cluster.writes == ["create Event"] * 10


async def test_an_event_told_twice_is_one(cluster: Cluster) -> None:
    made: list[str] = []

    async def create(manifest: Object) -> Object:
        made.append(manifest["metadata"]["name"])
        if made.count(made[-1]) > 1:
            raise APIError(409, "AlreadyExists", made[-1])
        return manifest

    cluster.create = create  # type: ignore[method-assign]
    events, before = Events(cluster), dropped("Refused")  # type: ignore[arg-type]
    told = Event("Normal", "Told", "once")
    events.add(job(), [told, told, dataclasses.replace(told, series=1)])
    await events.post()
    assert len(set(made)) == 2 and dropped("Refused") == before, "that of another attempt is another"


async def test_who_waits_long_is_not_passed_any_more() -> None:
    """Events and progress had no turn while pods and statuses kept coming."""
    now = [0.0]
    limit = RateLimit(1000, 1, lambda: now[0])
    order: list[str] = []

    async def ask(priority: Priority, name: str) -> None:
        await limit.acquire(priority)
        order.append(name)

    await limit.acquire(Priority.ACT)
    tasks = [asyncio.create_task(ask(Priority.LOOK, "old"))]
    await asyncio.sleep(0)
    now[0] = 1.0e-6
    tasks.append(asyncio.create_task(ask(Priority.ACT, "soon after")))
    await asyncio.sleep(0)
    limit._filled = now[0] = 2 * AGEING_SECONDS + 1  # the bucket stays empty meanwhile
    tasks.append(asyncio.create_task(ask(Priority.ACT, "much later")))
    await asyncio.sleep(0)
    for step in range(3):
        limit._tokens, now[0] = 1.0, now[0] + step
        await asyncio.sleep(0.02)
    await asyncio.gather(*tasks)
    assert order == ["soon after", "old", "much later"]


# a kind is a row


@dataclass(frozen=True)
class Seen:
    raw: Object


class Said(APIModel):
    """A status of another kind."""

    text: str = ""


async def test_a_new_kind_is_a_row_of_functions(cluster: Cluster) -> None:
    """It has no loop, no queue and no writer of its own."""
    store, done = Store(), asyncio.Event()

    async def observe(key: Key) -> Seen | None:
        return Seen({"kind": "FineTuneJob", **copy.deepcopy(cluster.objects["FineTuneJob", key[1]])})

    def decide(seen: Seen) -> Plan:
        return Plan(status=Said(text="seen"), events=(Event("Normal", "Seen", "by its kind"),))  # type: ignore[arg-type]

    events = Events(cluster)  # type: ignore[arg-type]
    writer = Writer(cluster, store, events, soon_seconds=0, interval=lambda plan: 0)  # type: ignore[arg-type]
    kind = Kind("Other", observe, decide, lambda seen, why: Plan(), recorded=lambda raw, plan: done.set())
    controller = Controller(kind, writer)
    controller.queue.add(KEY)
    running = asyncio.create_task(controller.run(2))
    async with asyncio.timeout(5):
        await done.wait()
    running.cancel()
    assert cluster.objects["FineTuneJob", "support"]["status"] == {"text": "seen"}
    await events.post()
    assert "create Event" in cluster.writes


@pytest.mark.parametrize(
    ("serves", "refusal"), [(False, None), (True, APIError(403, "Forbidden", "no")), (True, APIError(404, "NotFound", "no"))]
)
async def test_a_kind_that_is_absent_or_forbidden_does_not_hold_jobs_up(cluster: Cluster, serves: bool, refusal: APIError | None) -> None:
    """An operator is upgraded before its definitions, or before its rights."""
    real = cluster.list

    async def listed(kind: str, namespace: str = "", selector: str = "") -> Any:
        assert serves or kind not in ("FineTunedModel", "FineTuneEndpoint"), "what is not served is not asked for"
        if kind in ("FineTunedModel", "FineTuneEndpoint") and refusal is not None:
            raise refusal
        async for raw in real(kind, namespace, selector):
            yield raw

    cluster.list = listed  # type: ignore[method-assign]
    operator = Manager(cluster, Store(), ProgressBoard(), SETTINGS, serves=lambda kind: serves)  # type: ignore[arg-type]
    await operator.resync.once()
    await operator.jobs.process(KEY)
    assert cluster.objects["FineTuneJob", "support"]["status"]["phase"] == "Preparing"


# what is assumed


def waiting(number: int) -> Object:
    status = {
        "observedGeneration": 1,
        "queue": {"since": stamp(NOW)},
        "conditions": [
            Condition(type=type_, status=value, reason="Told", message="", last_transition_time=stamp(NOW)).to_wire()
            for type_, value in (("DataReady", "True"), ("Admitted", "False"))
        ],
    }
    spec = merged(MINIMAL, distribution={"gpusPerNode": 1}, scheduling={"queue": "default"})
    return job(spec, status, name=f"job-{number}", uid=f"uid-{number}", resourceVersion="1")


async def test_a_decision_that_never_comes_on_record_is_given_up_told_and_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The status of the first is refused for ever: it must not hold the only GPU for ever."""
    now = [1000.0]
    monkeypatch.setattr(assumptions_module.time, "monotonic", lambda: now[0])
    cluster = Cluster()
    flavor = {"name": "any", "resourceName": GPU, "nominalQuota": 1, "nodes": "Autoscaled"}
    cluster.reads["FineTuneQueue"] = [{"kind": "FineTuneQueue", "metadata": {"name": "default"}, "spec": {"flavors": [flavor]}}]
    cluster.reads["Namespace"] = [{"metadata": {"name": "team-a"}}]
    for number in range(2):
        raw = waiting(number)
        cluster.put("FineTuneJob", raw)
    cluster.refuses["status job-0"] = APIError(422, "Invalid", "status: too large")
    operator = manager(cluster)
    operator.assumptions._monotonic = lambda: now[0]
    await operator.resync.once()

    async def settle() -> None:
        await operator.admission.once()
        for name in ("job-0", "job-1"):
            for _ in range(4):
                await operator.jobs.process(("team-a", name))

    await settle()
    assert operator.assumptions.decision("uid-0").action == "admit"  # type: ignore[union-attr]
    assert operator.assumptions.decision("uid-1").action == "wait"  # type: ignore[union-attr]
    now[0] += EXPIRES_SECONDS
    await settle()
    await operator.admission.once()
    assert operator.assumptions.decision("uid-0") is None, "passed over for now"
    status = cluster.objects["FineTuneJob", "job-1"]["status"]
    assert next(c for c in status["conditions"] if c["type"] == "Admitted")["status"] == "True", "the GPU went to the next"
    await operator.events.post()
    assert metrics.ASSUMPTIONS_EXPIRED.labels(action="admit")._value.get() >= 1
    # the queue has room again, and the API server takes the status: it is decided about again after the back-off
    del cluster.refuses["status job-0"]
    cluster.reads["FineTuneQueue"][0]["spec"]["flavors"][0]["nominalQuota"] = 2
    cluster.reads["FineTuneQueue"][0]["metadata"]["resourceVersion"] = "2"
    await settle()
    assert operator.assumptions.decision("uid-0") is None, "not yet"
    now[0] += 61
    operator.store.touch("uid-0")
    await settle()
    status = cluster.objects["FineTuneJob", "job-0"]["status"]
    assert next(c for c in status["conditions"] if c["type"] == "Admitted")["status"] == "True"


def test_assumptions_are_a_jobs_own_and_back_off() -> None:
    now, poked = [0.0], []
    known = Assumptions(lambda: poked.append(1), lambda: now[0])
    admit = Decision(action="admit", admission=Admission(queue="q", flavor="f", pods=1))
    for failures, wait in ((0, 60), (1, 120), (2, 240)):
        known.decide("a", admit)
        known.decide("a", Decision(action="wait"))
        assert known.held("a") == admit, "what is assumed to hold stays until it is on record"
        known.not_recorded("a", "422 Invalid")
        now[0] += EXPIRES_SECONDS
        (gone,) = known.expire()
        assert (gone.uid, gone.decision, gone.why, gone.again_in) == ("a", admit, "422 Invalid", wait), failures
        assert known.held("a") is None and not known.may_be_decided("a") and known.may_be_decided("b")
        now[0] += wait
        assert known.may_be_decided("a")
    known.decide("a", admit)
    known.recorded("a")
    assert known.decision("a") is None and known.backlog == 0 and poked, "used up: it is not carried out twice"
    known.decide("a", admit)
    now[0] += EXPIRES_SECONDS
    assert known.expire()[0].again_in == 60, "what came on record ends the series"
    known.wait("a")
    known.forget("a")
    assert known.decision("a") is None and not known.is_ready("a") and known.may_be_decided("a")


# what is forgotten


def training() -> Object:
    status = FineTuneJobStatus(
        phase="Training",
        conditions=[Condition(type="Admitted", status="True", reason="NoQueue", message="", last_transition_time=stamp(NOW))],
        progress=Progress(step=3, total_steps=9, reported_at=stamp(NOW)),
    )
    return job(None, status.to_wire())


def samples() -> set[tuple[str, str]]:
    return {(s.labels["namespace"], s.labels["name"]) for m in metrics.TRAINING_STEP.collect() for s in m.samples}


@pytest.mark.parametrize("told_by", ["watch", "resync", "another"])
async def test_one_place_forgets_a_job_whatever_tells_of_its_end(cluster: Cluster, told_by: str) -> None:
    """A DELETED that no watch told of was taken out of the store by the next LIST, and nowhere else."""
    operator = manager(cluster)
    await operator.resync.once()
    raw = cluster.objects["FineTuneJob", "support"]
    operator.telemetry.wrote(raw, FineTuneJobStatus(), FineTuneJobStatus.model_validate(training()["status"]))
    report = ProgressReport(attempt=0, step=3, total_steps=9)
    board: ProgressBoard = operator.store.forgotten[0].__self__  # type: ignore[attr-defined]
    board.put(UID, report, NOW)
    operator.assumptions.decide(UID, Decision(action="admit"))
    operator.writer._written[UID] = 1.0
    assert KEY in samples()
    if told_by == "watch":
        operator.object_event("FineTuneJob", raw, deleted=True)
    elif told_by == "resync":
        cluster.objects.clear()
        await asyncio.sleep(0.01)
        await operator.resync.once()
    else:
        cluster.put("FineTuneJob", job(uid="uid-of-another"))
        operator.object_event("FineTuneJob", copy.deepcopy(cluster.objects["FineTuneJob", "support"]), deleted=False)
    assert KEY not in samples() and board.latest(UID) is None
    assert operator.assumptions.decision(UID) is None and operator.assumptions.backlog == 0
    assert UID not in operator.writer._written


async def test_a_job_made_anew_under_its_name_inherits_no_decision(cluster: Cluster) -> None:
    operator = manager(cluster)
    await operator.resync.once()
    operator.assumptions.decide(UID, Decision(action="admit", admission=Admission(queue="", flavor="", pods=1)))
    cluster.put("FineTuneJob", job(uid="uid-of-another"))
    operator.object_event("FineTuneJob", copy.deepcopy(cluster.objects["FineTuneJob", "support"]), deleted=False)
    seen = await operator.jobs.kind.observe(KEY)
    assert seen is not None and seen.decision is None


# the server's word


async def test_a_restored_etcd_is_believed(cluster: Cluster) -> None:
    """Its resourceVersions are lower than those that were seen before."""
    operator = manager(cluster)
    await operator.resync.once()
    await operator.jobs.process(KEY)
    backup = copy.deepcopy(cluster.objects)
    assert {kind for kind, _ in backup} >= {"FineTuneJob", "Job", "ConfigMap"}
    for _ in range(3):
        changed = cluster.objects["FineTuneJob", "support"]
        changed["metadata"]["labels"] = {"changed": "since"}
        operator.object_event("FineTuneJob", cluster.put("FineTuneJob", changed), deleted=False)
    child = next(name for kind, name in backup if kind == "Job")
    cluster.remove("Job", child)
    gone = cluster.watch[-1][1]
    operator.child_event("Job", gone, deleted=True)
    cluster.objects = backup  # of the hour before
    await asyncio.sleep(0.01)
    await operator.resync.once()
    known = operator.store.job(KEY)
    assert known is not None and "labels" not in known["metadata"], "the resync takes the server's word"
    seen = await operator.jobs.kind.observe(KEY)
    assert seen is not None and [j.name for j in seen.jobs] == [child], "what was deleted is there again"
    newer = copy.deepcopy(known)
    newer["metadata"] |= {"resourceVersion": "9999", "generation": 2, "labels": {"changed": "since"}}
    newer["spec"] = {**newer["spec"], "runPolicy": {"cancel": True}}
    operator.store.put_job(newer)
    cluster.writes.clear()
    await operator.jobs.process(KEY)
    assert cluster.writes, "a conflict: it looks, and takes what it sees"
    assert "labels" not in operator.store.job(KEY)["metadata"]  # type: ignore[index]


async def test_a_late_event_does_not_undo_what_was_heard_after_the_list_began(cluster: Cluster) -> None:
    operator = manager(cluster)
    await operator.resync.once()
    old = copy.deepcopy(cluster.objects["FineTuneJob", "support"])
    asked_at = time.monotonic()
    await asyncio.sleep(0.01)
    changed: dict[str, Any] = copy.deepcopy(old)
    changed["metadata"]["labels"] = {"new": "1"}
    operator.object_event("FineTuneJob", cluster.put("FineTuneJob", changed), deleted=False)
    operator.store.put_job(old, asked_at=asked_at)
    assert operator.store.job(KEY)["metadata"]["labels"] == {"new": "1"}  # type: ignore[index]


# the operator's own word


class Secrets:
    """An API server with one Secret, written by another operator first `conflicts` times."""

    def __init__(self, data: dict[str, str] | None, conflicts: int = 0, failure: APIError | None = None) -> None:
        self.data, self.conflicts, self.failure = data, conflicts, failure

    async def get(self, kind: str, namespace: str, name: str) -> Object:
        assert (kind, namespace, name) == ("Secret", "finetune-system", "finetune-operator-seal")
        if self.failure is not None:
            raise self.failure
        return {"metadata": {"name": name}, **({"data": self.data} if self.data is not None else {})}

    async def replace(self, manifest: Object) -> Object:
        if self.conflicts:
            self.conflicts -= 1
            self.data = {"key": base64.b64encode(b"of the other").decode()}
            raise APIError(409, "Conflict", "stale")
        self.data = manifest["data"]
        return manifest


async def test_the_key_of_seals_is_made_once_and_shared() -> None:
    settings = Settings(seal_secret="finetune-operator-seal")
    cluster = Secrets(None)
    key = await ensure_seal_key(cluster, settings)  # type: ignore[arg-type]
    assert len(key) == 64 and await ensure_seal_key(cluster, settings) == key  # type: ignore[arg-type]
    assert await ensure_seal_key(Secrets(None, conflicts=1), settings) == "of the other"  # type: ignore[arg-type]
    refused = Secrets(None, failure=APIError(403, "Forbidden", "secrets is forbidden"))
    assert await ensure_seal_key(refused, settings) != await ensure_seal_key(refused, settings), (
        "its own, which nobody can have sealed with"
    )  # type: ignore[arg-type]
    with pytest.raises(APIError):
        await ensure_seal_key(Secrets(None, failure=APIError(503, "Unavailable", "later")), settings)  # type: ignore[arg-type]


def test_a18_a_wiped_status_counts_towards_quota_by_what_is_sealed() -> None:
    settings, spec = Settings(seal_key="k"), parse_spec(merged(MINIMAL, distribution={"gpusPerNode": 2}))
    text = json.dumps({"queue": "q", "flavor": "a100", "nodes": 1, "attempt": 0, "admittedAt": stamp(NOW)})
    pod = PodView(name="support-worker-0", uid="p", stage="train", phase="Running", created=NOW, admission=text, seal=seal("k", UID, text))

    def seen(pod: PodView, status: Object | None = None) -> Workload:
        return workload_of(job(status=status), spec, request_of(spec), [pod], 0, settings, NOW)

    held = seen(pod).allocation
    assert seen(pod).recovers and held is not None and (held.queue, held.flavor, held.total, held.stopping) == ("q", "a100", 2, False)
    for other in (
        dataclasses.replace(pod, seal=seal("k", "uid-of-another", text)),
        dataclasses.replace(pod, admission="{}"),
        dataclasses.replace(pod, deleting=True),
    ):
        forged = seen(other)
        assert not forged.recovers and forged.allocation is not None and forged.allocation.stopping
    assert not seen(pod, {"finishedAt": stamp(NOW), "conditions": [{"type": "Failed", "status": "True"}]}).recovers


async def test_jobs_that_are_there_at_the_start_are_served_oldest_first() -> None:
    """What watches told of them before counts for nothing: kopf handles first events in any order."""
    cluster = Cluster()
    for number in range(40):
        raw = job(name=f"job-{(number * 7) % 40:02}", uid=f"uid-{number}")
        raw["metadata"]["creationTimestamp"] = stamp(after((number * 7) % 40))
        cluster.put("FineTuneJob", raw)
    operator, order = manager(cluster), []

    async def process(key: Key) -> None:
        order.append(key[1])

    operator.jobs.process = process  # type: ignore[method-assign]
    for raw in reversed(cluster.of("FineTuneJob")):
        operator.object_event("FineTuneJob", copy.deepcopy(raw), deleted=False)
    running = asyncio.create_task(operator.run())
    async with asyncio.timeout(5):
        while len(order) < 40:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    running.cancel()
    assert order[:40] == [f"job-{number:02}" for number in range(40)]
