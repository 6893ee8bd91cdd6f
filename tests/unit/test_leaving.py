"""F22, F25: what a job holds is free when its pods have ended, not when it, its evaluation or its Job is deleted."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Any
from unittest import mock

import pytest

from finetune_api import names
from finetune_operator.cache.assumptions import Assumptions
from finetune_operator.cache.inventory import read_pod
from finetune_operator.cache.store import Store
from finetune_operator.controllers.admission import AdmissionLoop
from finetune_operator.model.queueing import Decisions
from finetune_operator.model.seal import seal
from finetune_operator.settings import Settings
from tests.factory import MINIMAL, NOW, after, job, merged, stamp
from tests.listing import InMemory

GPU = "nvidia.com/gpu"
HELD, QUOTA = 4, 4
EVALUATED = merged(
    MINIMAL, dataset={"train": {"uri": "configmap://rows/train.jsonl"}, "eval": {"splitFraction": 0.1}}, evaluation={"metrics": ["loss"]}
)
SPEC = merged(EVALUATED, distribution={"nodes": 2, "gpusPerNode": 2})


class Server(InMemory):
    """One queue over two nodes, and the pods that a LIST would show."""

    def __init__(self) -> None:
        self.pods: list[dict[str, Any]] = []
        self.ready = {"node-0": True, "node-1": True}
        self.queue = {
            "metadata": {"name": "default", "generation": 1},
            "spec": {"flavors": [{"name": "any", "nominalQuota": QUOTA}]},
        }

    async def list(self, kind: str, *_: str) -> AsyncIterator[dict[str, Any]]:
        nodes = [
            {
                "metadata": {"name": name},
                "status": {
                    "conditions": [{"type": "Ready", "status": str(ready)}],
                    "allocatable": {GPU: "2", "cpu": "8", "memory": "64Gi"},
                },
            }
            for name, ready in self.ready.items()
        ]
        found = {"FineTuneQueue": [self.queue], "Namespace": [{"metadata": {"name": "team-a"}}], "Node": nodes, "Pod": self.pods}
        for raw in found.get(kind, []):
            yield raw

    async def replace_status(self, raw: dict[str, Any], *, urgent: bool = True) -> dict[str, Any]:
        self.queue = raw
        return raw

    def now(self) -> datetime:
        return NOW


def holder(*true: str, **more: Any) -> dict[str, Any]:
    """A job that was admitted to all there is."""
    status = {
        "observedGeneration": 1,
        "admission": {"queue": "default", "flavor": "any", "nodes": 2, "admittedAt": stamp(after(-3600))},
        "conditions": [{"type": type_, "status": "True"} for type_ in ("DataReady", "Admitted", *true)],
        **more.pop("status", {}),
    }
    return job(more.pop("spec", SPEC), status, **{"name": "first", "uid": "uid-first", **more})


def other(uid: str = "uid-second", gpus: int = 2, nodes: int = 2, **more: Any) -> dict[str, Any]:
    """A job that waits for all there is."""
    conditions = [{"type": "DataReady", "status": "True"}, {"type": "Admitted", "status": "False"}]
    status = {"observedGeneration": 1, "queue": {"since": stamp(NOW)}, "conditions": conditions}
    return job(merged(MINIMAL, distribution={"nodes": nodes, "gpusPerNode": gpus}), status, **{"name": "second", "uid": uid, **more})


def pod(rank: int, owner: str = "uid-first", stage: str = "train", version: int = 1, **more: Any) -> dict[str, Any]:
    name = f"{stage}-{rank}"
    labels = {names.LABEL_JOB_UID: "uid-first", names.LABEL_STAGE: stage, names.LABEL_RANK: str(rank), names.LABEL_ATTEMPT: "0"}
    meta = {"name": name, "namespace": "team-a", "uid": f"pod-{name}", "resourceVersion": str(version), "labels": labels}
    meta |= {
        "creationTimestamp": stamp(NOW),
        "ownerReferences": [{"kind": "Job" if owner == "job-uid" else "FineTuneJob", "uid": owner, "controller": True}],
    }
    requests = {GPU: "2" if stage == "train" else "1"}
    spec = {"nodeName": f"node-{rank}", "containers": [{"name": "trainer", "resources": {"requests": requests}}]}
    return {"metadata": {**meta, **more}, "spec": spec, "status": {"phase": "Running"}}


def child_job() -> dict[str, Any]:
    meta = pod(0, stage="evaluate")["metadata"]
    return {"metadata": {**meta, "name": "first-evaluate-0", "uid": "job-uid"}}


class Scene:
    """The operator's memory and its scheduler over that server."""

    def __init__(self, *pods: dict[str, Any], first: dict[str, Any] | None) -> None:
        self.server, self.store = Server(), Store()
        self.server.pods = list(pods)
        for raw in (*([first] if first is not None else []), other()):
            self.store.put_job(raw)
        for raw in pods:
            self.store.put_child("Pod", raw)
        self.admission = AdmissionLoop(self.server, self.store, Assumptions(), Settings(), lambda key: None)  # type: ignore[arg-type]

    async def decide(self, *, heads: bool = False, anew: bool = True) -> Decisions:
        with contextlib.nullcontext() if anew else mock.patch.object(self.admission.watch, "look", mock.AsyncMock()):
            return await self.admission.once(heads=heads)

    async def waits(self, held: int = HELD, **how: bool) -> None:
        """The other job waits, and the queue says how much is in use."""
        found = await self.decide(**how)
        assert found.jobs["uid-second"].action == "wait", found.jobs["uid-second"]
        assert found.queues["default"].used == {"any": held}

    async def starts(self, uid: str = "uid-second") -> None:
        found = await self.decide()
        assert found.jobs[uid].action == "admit", found.jobs[uid]
        assert found.queues["default"].used == {}

    def ends(self, raw: dict[str, Any]) -> None:
        self.server.pods.remove(raw)
        self.store.drop_child("Pod", raw)
        self.admission.watch.inventory.pods().drop(read_pod(raw))


def deleted(scene: Scene, first: dict[str, Any]) -> None:
    scene.store.drop_job(first)


def pruned(scene: Scene, first: dict[str, Any]) -> None:
    """A watch that was dead: a LIST shows that it is gone."""
    scene.store.jobs.prune({"uid-second"}, float("inf"))


def made_anew(scene: Scene, first: dict[str, Any]) -> None:
    """And another of its name is there already."""
    scene.store.put_job(other("uid-third", name="first", creationTimestamp=stamp(after(60)), resourceVersion="9"))


def foreground(scene: Scene, first: dict[str, Any]) -> None:
    meta = {**first["metadata"], "deletionTimestamp": stamp(NOW), "resourceVersion": "9"}
    scene.store.put_job({**first, "metadata": meta})


def cancelled(scene: Scene, first: dict[str, Any]) -> None:
    """Its end is on record while its pods still save."""
    conditions = [*first["status"]["conditions"], {"type": "Failed", "status": "True", "reason": "Cancelled"}]
    status = {**first["status"], "conditions": conditions, "finishedAt": stamp(NOW)}
    scene.store.put_job({**first, "metadata": {**first["metadata"], "resourceVersion": "9"}, "status": status})


END = [deleted, pruned, made_anew, foreground, cancelled]


@pytest.mark.parametrize("end", END, ids=lambda end: end.__name__)
@pytest.mark.parametrize("everything", [False, True])
async def test_gpus_are_free_when_the_pods_have_ended(end: Callable[[Scene, dict[str, Any]], None], everything: bool) -> None:
    pods, first = (pod(0), pod(1)), holder()
    scene = Scene(*pods, first=first)
    await scene.waits()
    end(scene, first)
    if everything:
        scene.admission._looked_at = float("-inf")  # the pass that looks at all jobs anew
    await scene.waits(anew=False)
    await scene.waits()
    found = await scene.decide(heads=True)
    assert not [uid for uid, decision in found.jobs.items() if decision.action == "admit"]
    scene.ends(pods[0])
    await scene.waits(HELD // 2)
    scene.ends(pods[1])
    await scene.starts()


@pytest.mark.parametrize("end", END, ids=lambda end: end.__name__)
@pytest.mark.parametrize("job_first", [False, True], ids=["its Job is still there", "its Job is gone"])
async def test_an_evaluations_gpu_is_free_when_its_pod_has_ended(end: Callable[[Scene, dict[str, Any]], None], job_first: bool) -> None:
    evaluating, first = pod(0, "job-uid", "evaluate"), holder("Trained")
    scene = Scene(first=first)
    scene.store.put_child("Job", child_job())
    scene.store.put_child("Pod", evaluating)
    scene.server.pods = [evaluating]
    await scene.waits(1)
    if job_first:
        scene.store.drop_child("Job", child_job())
        await scene.waits(1)
    end(scene, first)
    await scene.waits(1)
    scene.store.drop_child("Job", child_job())
    await scene.waits(1)
    scene.ends(evaluating)
    await scene.starts()
    assert not scene.store._evaluations_left and not scene.admission._leaving, "nothing is remembered of it"


def sealed(rank: int, uid: str = "uid-first", **admission: Any) -> dict[str, Any]:
    """A worker with the operator's word on what it was admitted to."""
    found = pod(rank, deletionTimestamp=stamp(NOW))
    text = json.dumps({"queue": "default", "flavor": "any", "nodes": 2, "admittedAt": stamp(NOW), **admission})
    found["metadata"]["annotations"] = {names.ANNOTATION_ADMISSION: text, names.ANNOTATION_SEAL: seal("secret", uid, text)}
    return found


def started_after_it_was_gone(*pods: dict[str, Any]) -> Scene:
    """An operator that did not run when the job was deleted."""
    scene = Scene(*pods, first=None)
    scene.admission._settings = Settings(seal_key="secret")
    return scene


async def test_f1_a_job_that_went_while_no_operator_ran_is_counted_by_its_pods() -> None:
    pods = sealed(0), sealed(1)
    scene = started_after_it_was_gone(*pods)
    await scene.waits()
    [gone] = [w for w in (await scene.admission.look()).workloads if w.uid == "uid-first"]
    assert gone.allocation is not None and gone.allocation.bound == (("node-0", 1), ("node-1", 1)) and gone.request.units == 2
    scene.ends(pods[0])
    await scene.waits(HELD // 2)
    scene.ends(pods[1])
    await scene.starts()
    assert not scene.store._unowned


@pytest.mark.parametrize("forged", [{"uid": "uid-of-another"}, {"queue": "nobodys"}, {"flavor": "other"}])
async def test_a18_nobody_elses_word_counts_towards_a_queue(forged: dict[str, str]) -> None:
    """What the pods hold of their nodes does, whoever owns them."""
    scene = started_after_it_was_gone(sealed(0, **forged), sealed(1, **forged))
    found = await scene.decide()
    assert found.queues["default"].used == {} and found.jobs["uid-second"].reason == "WaitingForNodes"


async def test_a_job_that_goes_while_others_are_looked_at_is_counted_once() -> None:
    pods, first = (sealed(0), sealed(1)), holder()
    scene = started_after_it_was_gone(*pods)
    scene.store.put_job(first)
    await scene.waits()
    scene.store.drop_job(first)
    await scene.admission.watch.look()  # its pods are listed as somebody's
    snapshot = scene.admission._snapshot(NOW)
    assert [w.uid for w in snapshot.workloads] == ["uid-first", "uid-second"]
    await scene.waits()


async def test_a_job_that_is_seen_after_its_pods_is_counted_as_it_is() -> None:
    pods = sealed(0), sealed(1)
    scene = started_after_it_was_gone(*pods)
    await scene.waits()
    scene.store.put_job(holder())
    await scene.waits()
    assert not scene.admission._leaving and not scene.store.left_behind()


async def test_what_a_gone_jobs_pods_hold_of_nodes_is_counted_once() -> None:
    """Before and after the LIST that takes them for pods of somebody else."""
    pods, first = (pod(0), pod(1)), holder()
    scene = Scene(*pods, first=first)
    scene.server.queue["spec"]["flavors"][0]["nominalQuota"] = 2 * QUOTA
    await scene.decide()
    scene.store.drop_job(first)
    scene.ends(pods[0])
    await scene.admission._look(NOW)
    snapshots = [scene.admission._snapshot(NOW)]
    snapshots.append(await scene.admission.look())
    for snapshot in snapshots:
        [gone] = [w for w in snapshot.workloads if w.uid == "uid-first"]
        assert gone.allocation is not None and gone.allocation.bound == (("node-1", 1),) and gone.allocation.stopping and not gone.waits
        assert all(not node.used.get(GPU) for node in snapshot.nodes or ())
    found = await scene.decide()
    assert found.jobs["uid-second"].reason == "WaitingForPreemption", "for the rest of it"
    assert found.queues["default"].used["any"] == HELD // 2


async def test_a_pod_that_has_ended_holds_nothing() -> None:
    first, done = holder(), pod(0)
    done["status"]["phase"] = "Succeeded"
    scene = Scene(done, pod(1), first=first)
    await scene.waits()
    scene.store.drop_job(first)
    await scene.waits(HELD // 2)


@pytest.mark.parametrize("end", [deleted, foreground], ids=lambda end: end.__name__)
async def test_a_pod_on_a_lost_node_is_not_waited_for(end: Callable[[Scene, dict[str, Any]], None]) -> None:
    """Its kubelet will not say that it has ended: what it held is out of reach with the node, and quota is not held for it."""
    pods, first = [pod(rank, deletionTimestamp=stamp(NOW)) for rank in range(2)], holder()
    scene = Scene(*pods, first=first)
    await scene.waits()
    end(scene, first)
    scene.server.ready["node-1"] = False
    scene.admission._looked_at = float("-inf")
    await scene.waits(HELD, anew=False)
    scene.admission._looked_at = float("-inf")
    await scene.waits(HELD // 2)


async def test_pods_of_an_evaluation_without_gpus_count_for_their_nodes() -> None:
    """They are none of the queue's, but a node has less for them."""
    evaluating = pod(0, "job-uid", "evaluate")
    evaluating["spec"]["containers"][0]["resources"]["requests"] = {"cpu": "3"}
    scene = Scene(first=holder("Trained", spec=EVALUATED))
    scene.store.put_child("Job", child_job())
    scene.store.put_child("Pod", evaluating)
    scene.server.pods = [evaluating]
    [node, _] = (await scene.admission.look()).nodes or ()
    assert node.used == {"cpu": 3000}
