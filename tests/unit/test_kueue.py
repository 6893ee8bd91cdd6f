"""Decisions where Kueue decides: what its words become, what an eviction means, and how an evaluation keeps its place in line."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import Any

import pytest

from finetune_api import names
from finetune_api.contract import ExitCode, ProgressReport, StageResult
from finetune_api.validation import parse_spec
from finetune_operator.cache.store import Store
from finetune_operator.cluster.errors import APIError
from finetune_operator.controllers.external_queue import ExternalQueue
from finetune_operator.model.children import pod_view
from finetune_operator.model.job import Observed
from finetune_operator.reconcile.job.kueue import asks_for_place, preemptor_uid, standing
from finetune_operator.resources.backends import GROUP_LABEL, kept_place
from finetune_operator.settings import Settings
from tests.factory import CHECKED, COMPARED, PREPARED, TRAINED, UID, after, ref, stamp
from tests.unit.test_reconcile import EVALUATED, World, merged

PREEMPTOR = "0bd3c9d2-64f5-4ee0-b9b9-d4a1d2a7d0aa"
PREEMPTED = (
    f"Preempted to accommodate a workload (UID: {PREEMPTOR}, JobUID: UNKNOWN) due to prioritization in the ClusterQueue; "
    "preemptor path: /gpus; preemptee path: /gpus"
)
GANG = merged(EVALUATED, distribution={"nodes": 2, "gpusPerNode": 1}, scheduling={"queue": "research"})


def said(type_: str, status: str, message: str = "", reason: str = "R") -> dict[str, Any]:
    return {"type": type_, "status": status, "message": message, "reason": reason}


def workload(*told: dict[str, Any], active: bool = True, **status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "w", "uid": "w"}, "spec": {"active": active}, "status": {"conditions": list(told), **status}}


PENDING = workload(said("QuotaReserved", "False", "insufficient unused quota for nvidia.com/gpu", "Pending"))
ADMITTED = workload(
    said("QuotaReserved", "True"),
    said("Admitted", "True"),
    admission={"clusterQueue": "gpus", "podSetAssignments": [{"flavors": {"nvidia.com/gpu": "h100", "cpu": "any"}}]},
)


@pytest.mark.parametrize(
    ("group", "reason", "words"),
    [
        (None, "WaitsForKueue", "is there a LocalQueue q"),
        (PENDING, "WaitsForKueue", "insufficient unused quota for nvidia.com/gpu"),
        (workload(said("QuotaReserved", "True")), "WaitsForKueue", "admission check"),
        (workload(said("Evicted", "True", PREEMPTED)), "WaitsForKueue", "Preempted to accommodate"),
        (workload(said("QuotaReserved", "False", "LocalQueue q doesn't exist", "Inadmissible")), "Inadmissible", "or set scheduling.queue"),
        (workload(said("QuotaReserved", "False", "LocalQueue q is terminating or missing", "Inadmissible")), "Inadmissible", "make it in"),
        (workload(said("QuotaReserved", "False", "ClusterQueue c doesn't exist", "Inadmissible")), "Inadmissible", "points to nothing"),
        (workload(said("QuotaReserved", "False", "ClusterQueue c is inactive", "Inadmissible")), "Inadmissible", "spec.stopPolicy"),
        (workload(active=False), "WorkloadInactive", "until its spec.active is true"),
        (workload(said("Evicted", "True", "The workload is deactivated"), active=False), "WorkloadInactive", "w is inactive (The workload"),
    ],
)
def test_what_kueue_says_while_it_lets_nothing_start(group: dict[str, Any] | None, reason: str, words: str) -> None:
    found = standing(group, "q", "Workload")
    assert (found.admitted, found.reason) == (False, reason) and words in found.message


def test_what_kueue_says_when_it_admits_and_where_it_is_not() -> None:
    found = standing(ADMITTED, "q", "Workload/v1beta1")
    assert (found.admitted, found.queue, found.flavor) == (True, "gpus", "any, h100")
    leaving = workload(said("Admitted", "True"), said("Evicted", "True", "The ClusterQueue is stopped"))
    assert not standing(leaving, "q", "Workload").admitted, "what is admitted and evicted at once starts nothing"
    assert "install Kueue" in standing(None, "q", "").message


def test_the_preemptor_is_read_from_kueues_message() -> None:
    assert preemptor_uid(PREEMPTED) == PREEMPTOR
    assert preemptor_uid("The ClusterQueue is stopped") is None and preemptor_uid(PREEMPTED.replace(PREEMPTOR, "UNKNOWN")) is None


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ("WorkloadEvictedDueToPreempted", "Preempted"),
        ("WorkloadEvictedDueToDeactivatedDueToRequeuingLimitExceeded", "DeactivatedDueToRequeuingLimitExceeded"),
        ("WorkloadDeleted", "WorkloadDeleted"),
        ("", "Evicted"),
        ("what a pod may be made to say: \n", "whatapodmaybemadetosay"),
    ],
)
def test_a_pod_says_why_kueue_takes_it_away(told: str, found: str) -> None:
    condition = {"type": "TerminationTarget", "status": "True", "reason": told, "message": PREEMPTED}
    raw = {"metadata": {"name": "p", "uid": "u", "creationTimestamp": stamp(after(0))}, "status": {"conditions": [condition]}}
    view = pod_view(raw)
    assert (view.eviction, view.eviction_message, view.disrupted) == (found, PREEMPTED, True)
    condition["status"] = "False"
    assert pod_view(raw).eviction == ""


class KueueWorld(World):
    """A job whose gang and evaluation Kueue decides about."""

    settings = Settings(progress_url="none", backoff_base_seconds=10, queueing_backend="kueue")

    def __init__(self, spec: dict[str, Any] | None = None) -> None:
        super().__init__(spec or GANG)
        self.handed = {"served": "Workload", "place": None, "group": None}

    def observed(self) -> Observed:
        seen = asks_for_place(parse_spec(self.job["spec"]), self.status, self.settings)
        found = dataclasses.replace(super().observed(), spec=parse_spec(self.job["spec"]))
        return dataclasses.replace(found, place_seen=seen, place=self.place if seen else None)

    @property
    def place(self) -> Any:
        return self.handed["place"]

    def to_queue(self) -> KueueWorld:
        self.settle()
        self.succeed("prepare", PREPARED)
        self.succeed("check", CHECKED)
        self.settle()
        assert self.status.phase == "Queued" and len([p for p in self.pods.values() if p.stage == "train"]) == 2
        return self

    def admitted(self) -> KueueWorld:
        self.handed["group"] = ADMITTED
        self.settle()
        self.run("worker")
        self.settle()
        assert self.status.phase == "Training", self.status
        self.handed["group"] = None
        return self

    def progresses(self, step: int, eta: float | None) -> None:
        self.report = ProgressReport(attempt=self.status.attempt, step=step, total_steps=100, eta_seconds=eta)
        self.settle()

    def condition(self, type_: str) -> Any:
        return self.status.condition(type_)  # type: ignore[arg-type]


def evict(world: World, reason: str, message: str = PREEMPTED) -> None:
    for pod in [p for p in world.pods.values() if p.stage == "train"]:
        world.set(pod, deleting=True, disrupted=True, eviction=reason, eviction_message=message)


def end(world: World, code: int, message: str = "") -> None:
    for pod in [p for p in world.pods.values() if p.stage == "train"]:
        world.set(pod, phase="Failed", exit_code=code, message=message, finished=after(world.time))


def gone(world: World) -> None:
    world.pods = {name: p for name, p in world.pods.items() if p.stage != "train" or not p.deleting}


SAVED = StageResult(reason="Stopped", message="stopped on request at step 52", result={"checkpointStep": 52}).dumps()


@pytest.mark.parametrize(("code", "last_words", "step"), [(ExitCode.STOPPED, SAVED, 52), (137, "", None)])
def test_a_preemption_is_told_as_kueues_with_who_takes_the_place(code: int, last_words: str, step: int | None) -> None:
    world = KueueWorld().to_queue().admitted()
    first = world.pods["support-worker-0"]
    world.set(first, eviction="Preempted", eviction_message=PREEMPTED, disrupted=True)
    world.settle()
    assert world.status.phase == "Training", "it says why before it deletes: nothing has begun to save"
    evict(world, "Preempted")
    world.handed["preemptor"] = "team-b/urgent-attempt-0"
    world.settle()
    assert world.condition("Running").reason == "Stopping" and "team-b/urgent-attempt-0" in world.condition("Running").message
    world.time += 30
    end(world, code, last_words)
    world.set(world.pods["support-worker-1"], finished=after(world.time + 4))
    world.time += 5
    world.settle()
    gone(world)
    world.settle()
    restart = world.status.restarts[0]
    assert (restart.cause, restart.reason, restart.counted, restart.checkpoint_step) == ("Disruption", "Preempted", False, step)
    assert restart.message.startswith("evicted by Kueue (Preempted) in favor of Workload team-b/urgent-attempt-0: Preempted to accommodate")
    assert (world.status.phase, world.status.attempt) == ("Queued", 1) and world.condition("Admitted").status == "False"
    assert (world.status.usage.lost_seconds == 0) is (step == 52), "what was saved as it stopped is not lost"


def test_a_preemption_whose_preemptor_is_not_to_be_seen_is_told_all_the_same() -> None:
    world = KueueWorld().to_queue().admitted()
    evict(world, "ClusterQueueStopped", "The ClusterQueue is stopped")
    end(world, ExitCode.STOPPED, SAVED)
    world.settle()
    restart = world.status.restarts[0]
    assert (restart.reason, restart.message) == (
        "ClusterQueueStopped",
        "evicted by Kueue (ClusterQueueStopped): The ClusterQueue is stopped; stopped on request at step 52",
    )


def test_what_was_deactivated_does_not_come_back_by_itself() -> None:
    """A new attempt would be a new Workload, active, and whoever deactivated the old one would have done it in vain."""
    world = KueueWorld().to_queue().admitted()
    evict(world, "Deactivated", "The workload is deactivated")
    end(world, ExitCode.STOPPED, SAVED)
    world.settle()
    gone(world)
    world.time += 1000
    world.settle()
    assert (world.status.phase, world.condition("Admitted").reason) == ("Queued", "Deactivated")
    assert "suspend and resume the job" in world.condition("Admitted").message and world.status.queue is not None
    assert not [p for p in world.pods.values() if p.stage == "train"]
    world.job["spec"]["runPolicy"] = {"suspend": True}
    world.settle()
    world.job["spec"]["runPolicy"] = {"suspend": False}
    world.settle()
    assert world.condition("Admitted").reason == "WaitsForKueue" and len([p for p in world.pods.values() if p.attempt == 1]) == 2


def test_pods_that_wait_follow_the_job_to_another_queue() -> None:
    world = KueueWorld().to_queue()
    for pod in [p for p in world.pods.values() if p.stage == "train"]:
        world.set(pod, queue="research")
    before = {p.uid for p in world.pods.values() if p.stage == "train"}
    world.job["spec"]["scheduling"] = {"queue": "other"}
    world.settle()
    assert before.isdisjoint(p.uid for p in world.pods.values()) and world.status.queue.name == "other"  # type: ignore[union-attr]


# the evaluation's place in line


def test_an_evaluations_place_is_made_with_the_gang_and_opened_before_its_end() -> None:
    world = KueueWorld().to_queue()
    place = world.place
    assert place["metadata"]["name"] == "support-evaluate-0" and place["apiVersion"] == "kueue.x-k8s.io/v1beta2"
    assert place["spec"]["active"] is False and place["spec"]["queueName"] == "research"
    assert [o.get("controller") for o in place["metadata"]["ownerReferences"]] == [None], "Kueue makes the Job its controller"
    world.admitted()
    world.progresses(50, 600)
    assert world.place["spec"]["active"] is False, "what is open may be admitted, and would hold a GPU for nobody"
    world.progresses(97, 20)
    assert world.place["spec"]["active"] is True
    world.succeed("worker-0", TRAINED)
    world.succeed("worker-1", TRAINED)
    world.settle()
    job = world.made["support-evaluate-0"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/prebuilt-workload-name"] == "support-evaluate-0" and job["spec"]["suspend"]
    assert world.place["spec"]["podSets"][0]["template"] == job["spec"]["template"], "else Kueue would not take one for the other"
    world.place["metadata"]["ownerReferences"].append({"uid": world.jobs["support-evaluate-0"].uid, "controller": True})
    world.succeed("evaluate", COMPARED)
    world.settle()
    assert world.status.phase == "Publishing"


def test_a_training_that_ends_unannounced_opens_the_place_then() -> None:
    world = KueueWorld().to_queue().admitted()
    world.succeed("worker-0", TRAINED)
    world.succeed("worker-1", TRAINED)
    world.settle()
    assert world.place["spec"]["active"] is True and "support-evaluate-0" in world.jobs


def test_without_a_place_the_evaluation_queues_as_any_job() -> None:
    world = KueueWorld().to_queue().admitted()
    world.handed["place"] = None
    world.succeed("worker-0", TRAINED)
    world.succeed("worker-1", TRAINED)
    world.settle()
    labels = world.made["support-evaluate-0"]["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "research" and "kueue.x-k8s.io/prebuilt-workload-name" not in labels


@pytest.mark.parametrize("how", ["fails", "is suspended", "is evicted", "loses the quota"])
def test_no_open_place_is_left_where_no_evaluation_follows(how: str) -> None:
    """Kueue gives back what an admitted Workload holds only when its Job tells it so, and there is none yet."""
    world = KueueWorld().to_queue().admitted()
    world.progresses(97, 20)
    world.place["status"] = {"conditions": [said("QuotaReserved", "True")]}
    if how == "fails":
        world.fail("worker-0", ExitCode.USER_ERROR, StageResult(reason="NonFiniteLoss", message="diverged").dumps())
    elif how == "is suspended":
        world.job["spec"]["runPolicy"] = {"suspend": True}
    elif how == "is evicted":
        evict(world, "Preempted")
        end(world, ExitCode.STOPPED, SAVED)
    else:
        world.place["status"]["conditions"].append(said("Evicted", "True", PREEMPTED))
    uid = world.place["metadata"]["uid"]
    world.settle()
    gone(world)
    world.settle()
    assert world.place is None or (world.place["metadata"]["uid"] != uid and world.place["spec"]["active"] is (how == "loses the quota"))
    assert world.place is None or how in ("is evicted", "loses the quota")


def test_a_place_goes_with_the_job_of_a_try_that_ended() -> None:
    world = KueueWorld().to_queue().admitted()
    world.succeed("worker-0", TRAINED)
    world.succeed("worker-1", TRAINED)
    world.settle()
    first = world.jobs["support-evaluate-0"]
    world.place["metadata"]["ownerReferences"].append({"uid": first.uid, "controller": True})
    world.fail("evaluate", ExitCode.INFRASTRUCTURE, "lost")
    world.settle()
    assert "support-evaluate-1" in world.jobs and world.place is None
    assert "kueue.x-k8s.io/prebuilt-workload-name" not in world.made["support-evaluate-1"]["metadata"]["labels"]


def test_an_evaluation_that_waits_says_why_and_one_that_kueue_stops_is_no_failure() -> None:
    world = KueueWorld().to_queue().admitted()
    world.succeed("worker-0", TRAINED)
    world.succeed("worker-1", TRAINED)
    world.settle()
    name = "support-evaluate-0"
    world.jobs[name] = dataclasses.replace(world.jobs[name], suspended=True)
    world.place["metadata"]["ownerReferences"].append({"uid": world.jobs[name].uid, "controller": True})
    world.handed["group"] = PENDING
    world.settle()
    assert world.condition("Evaluated").reason == "Queued" and "insufficient unused quota" in world.condition("Evaluated").message
    world.jobs[name] = dataclasses.replace(world.jobs[name], suspended=False)
    world.run("evaluate")
    world.settle()
    world.set(world.pod("evaluate"), phase="Failed", exit_code=143, deleting=True)
    world.settle()
    assert not world.status.stages["evaluate"].retries, "its Job says in a moment whether it was suspended"
    world.jobs[name] = dataclasses.replace(world.jobs[name], suspended=True)
    world.settle()
    assert world.condition("Evaluated").reason == "Queued" and not world.status.stages["evaluate"].retries
    world.handed["group"] = workload(said("Finished", "True", "out of sync", "OutOfSync"))
    world.settle()
    assert world.status.stages["evaluate"].retries == 1 and world.condition("Evaluated").reason == "OutOfSync"


# what is asked of the API server


class Server:
    """Serves some versions, and says who is there."""

    def __init__(self, *versions: str) -> None:
        self.versions = versions
        self.asked: list[str] = []
        self.workloads = [{"metadata": {"name": "urgent-attempt-0", "namespace": "team-b", "uid": PREEMPTOR}}]
        self.refuses = False
        self.there: set[str] = set()

    async def serves(self, kind: str) -> bool:
        return (kind.partition("/")[2] or "v1beta2") in self.versions

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        self.asked.append(f"{kind} {name}")
        if name in self.there:
            return {"metadata": {"name": name, "uid": f"uid-of-{name}"}}
        raise APIError(404, "NotFound", name)

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        self.asked.append(f"delete {kind} {namespace}/{name} {uid}")
        self.there.discard(name)

    async def list(self, kind: str, namespace: str = "", selector: str = "") -> Any:
        self.asked.append(f"list {kind} {namespace} {selector}")
        if self.refuses:
            raise APIError(403, "Forbidden", "workloads")
        for raw in self.workloads:
            yield raw


def look(server: Server, world: KueueWorld, **settings: Any) -> dict[str, Any]:
    handed = ExternalQueue(server, Store(), dataclasses.replace(world.settings, **settings))  # type: ignore[arg-type]
    return asyncio.run(handed.look(world.job, world.observed()))


@pytest.mark.parametrize(
    ("versions", "kind"), [(("v1beta1", "v1beta2"), "Workload"), (("v1beta1",), "Workload/v1beta1"), ((), "")], ids=["both", "old", "none"]
)
def test_the_newest_version_that_is_served_is_read(versions: tuple[str, ...], kind: str) -> None:
    world, server = KueueWorld().to_queue(), Server(*versions)
    found = look(server, world)
    assert found["served"] == kind and found["place_seen"] and found["place"] is None
    assert server.asked == ([f"{kind} support-attempt-0", f"{kind} support-evaluate-0"] if kind else [])
    version = kept_place(ref(GANG), {"metadata": {"name": "n", "ownerReferences": [{}]}, "spec": {"template": {}}}, 0, kind)["apiVersion"]
    assert version == ("kueue.x-k8s.io/v1beta1" if kind.endswith("v1beta1") else "kueue.x-k8s.io/v1beta2")


def test_the_preemptor_is_looked_for_once_it_preempts_and_where_one_may_look() -> None:
    world, server = KueueWorld().to_queue().admitted(), Server("v1beta2")
    assert "preemptor" not in look(server, world) and not server.asked, "a training asks for nothing"
    evict(world, "Preempted")
    assert look(server, world)["preemptor"] == "team-b/urgent-attempt-0" and server.asked[-1] == "list Workload  "
    assert look(server, world, watch_namespaces=("team-a",))["preemptor"] == "team-b/urgent-attempt-0"
    assert server.asked[-1] == "list Workload team-a "
    server.refuses = True
    assert look(server, world)["preemptor"] == ""


def test_a_failed_job_is_asked_for_its_place_until_it_is_gone() -> None:
    world, server = KueueWorld().to_queue().admitted(), Server("v1beta2")
    world.fail("worker-0", ExitCode.USER_ERROR, StageResult(reason="NonFiniteLoss", message="diverged").dumps())
    world.settle()
    handed = ExternalQueue(server, Store(), world.settings)  # type: ignore[arg-type]
    ended = dataclasses.replace(world.observed(), spec=None)
    assert asyncio.run(handed.look(world.job, ended))["place_seen"]
    assert "place_seen" not in asyncio.run(handed.look(world.job, ended))


def kept_pod(**more: Any) -> dict[str, Any]:
    labels = {GROUP_LABEL: "support-attempt-0", names.LABEL_JOB_UID: UID}
    meta = {"name": "support-worker-0", "namespace": "team-a", "uid": "p", "resourceVersion": "1", "labels": labels}
    return {"metadata": {**meta, "deletionTimestamp": stamp(after(0))}, "spec": {}, "status": {"phase": "Pending"}, **more}


@pytest.mark.parametrize(
    ("pod", "gone", "freed"),
    [
        (kept_pod(), False, True),
        (kept_pod(), True, False),
        (kept_pod(spec={"nodeName": "n"}), False, False),
        (kept_pod(status={"phase": "Failed"}), False, False),
    ],
    ids=["never ran", "gone meanwhile", "has a node", "ended"],
)
def test_a_deleted_pod_that_never_ran_is_freed_by_its_groups_workload(pod: dict[str, Any], gone: bool, freed: bool) -> None:
    server, store = Server("v1beta2"), Store()
    server.there.add("support-attempt-0")
    handed = ExternalQueue(server, store, KueueWorld.settings)  # type: ignore[arg-type]
    store.put_child("Pod", pod)
    handed.pod_seen(pod)
    if gone:
        store.drop_child("Pod", pod)

    async def work() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(handed.run(), 0.05)

    asyncio.run(work())
    told = "delete Workload team-a/support-attempt-0 uid-of-support-attempt-0"
    assert server.asked == (["Workload support-attempt-0", told] if freed else [])
