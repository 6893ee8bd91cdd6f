"""The memory of the cluster and the work queue."""

from __future__ import annotations

import asyncio
from typing import Any

from finetune_api import names
from finetune_operator.cache.store import Store
from finetune_operator.controllers.workqueue import WorkQueue
from finetune_operator.model.children import pod_view
from finetune_operator.reconcile.job.failures import classify
from tests.factory import MINIMAL, NOW, UID, container_status, ended, job, stamp

KEY = ("team-a", "support")


def child(kind: str, name: str, uid: str, owner: str, version: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": "team-a",
            "uid": uid,
            "resourceVersion": str(version),
            "creationTimestamp": stamp(NOW),
            "labels": {names.LABEL_JOB_UID: UID, names.LABEL_STAGE: "train", names.LABEL_RANK: "0", names.LABEL_ATTEMPT: "0"},
            "ownerReferences": [{"kind": "FineTuneJob" if owner == UID else "Job", "uid": owner, "controller": True}],
        },
        **more,
    }


def test_children_are_found_by_owner_uid_through_child_jobs() -> None:
    store = Store()
    store.put_job(job())
    store.put_child("Job", child("Job", "support-prepare-0", "j1", UID))
    store.put_child("Pod", child("Pod", "prepare-pod", "p1", "j1", status={"containerStatuses": container_status({"running": {}})}))
    store.put_child("Pod", child("Pod", "support-worker-0", "p2", UID))
    seen = store.observe(KEY, NOW, None)
    assert seen is not None
    assert [(p.name, p.job_uid, p.running) for p in seen.pods] == [("prepare-pod", "j1", True), ("support-worker-0", "", False)]


def test_a18_foreign_pods_with_our_labels_are_not_adopted() -> None:
    store = Store()
    store.put_job(job())
    assert store.put_child("Pod", child("Pod", "support-worker-0", "evil", "somebody-else")) == ("FineTuneJob", KEY), "it may wake the job"
    seen = store.observe(KEY, NOW, None)
    assert seen is not None and not seen.pods, "but it is none of its pods"


def test_pods_whose_job_is_gone_are_seen_until_they_are_too() -> None:
    store = Store()
    store.put_job(job())
    made = child("Job", "support-prepare-0", "j1", UID)
    pod = child("Pod", "support-prepare-0-x7k2p", "p1", "j1", status={"phase": "Running"})
    for kind, raw in (("Job", made), ("Pod", pod)):
        store.put_child(kind, raw)
    store.drop_child("Job", made)
    seen = store.observe(KEY, NOW, None)
    assert seen is not None and not seen.pods and [p.uid for p in seen.left] == ["p1"]
    restarted = Store()
    restarted.put_job(job())
    restarted.put_child("Pod", pod)
    assert restarted.observe(KEY, NOW, None).left == seen.left, "an operator that has just started sees them, too"  # type: ignore[union-attr]
    orphan = {**pod, "metadata": {**pod["metadata"], "resourceVersion": "2", "ownerReferences": []}}
    store.put_child("Pod", orphan)
    assert len(store.observe(KEY, NOW, None).left) == 1  # type: ignore[union-attr]
    store.drop_child("Pod", orphan)
    assert not store.observe(KEY, NOW, None).left  # type: ignore[union-attr]


def test_f5_an_older_event_does_not_undo_a_newer_state() -> None:
    store = Store()
    store.put_job(job(resourceVersion="7"))
    store.put_job(job(resourceVersion="3", generation=99))
    assert store.job(KEY)["metadata"]["generation"] == 1  # type: ignore[index]
    store.put_child("Pod", child("Pod", "w", "p", UID, version=9, status={"phase": "Running"}))
    store.put_child("Pod", child("Pod", "w", "p", UID, version=2, status={"phase": "Pending"}))
    seen = store.observe(KEY, NOW, None)
    assert seen is not None and seen.pods[0].phase == "Running"


def test_a_late_event_does_not_raise_the_dead() -> None:
    store = Store()
    store.put_job(job())
    pod = child("Pod", "w", "p", UID)
    store.put_child("Pod", pod)
    assert store.drop_child("Pod", pod) == ("FineTuneJob", KEY)
    store.put_child("Pod", pod)
    seen = store.observe(KEY, NOW, None)
    assert seen is not None and not seen.pods
    store.drop_job(job())
    store.put_job(job())
    assert store.observe(KEY, NOW, None) is None


def test_a_job_made_anew_under_the_same_name_is_another_job() -> None:
    store = Store()
    store.put_job(job(resourceVersion="9"))
    store.put_job(job(uid="new", resourceVersion="4"))
    assert store.job(KEY)["metadata"]["uid"] == "new"  # type: ignore[index]
    assert store.job_of_uid(UID) is None and store.job_of_uid("new") is not None


def test_f4_a_list_prunes_what_a_dead_watch_hid() -> None:
    store = Store()
    store.put_job(job())
    store.put_child("Pod", child("Pod", "w", "p", UID))
    assert store.prune("Pod", set(), float("inf")) == {("FineTuneJob", KEY)}
    seen = store.observe(KEY, NOW, None)
    assert seen is not None and not seen.pods
    store.jobs.prune(set(), float("inf"))
    assert store.job_keys() == []


def test_a_list_does_not_prune_what_came_after_it_began() -> None:
    store = Store()
    store.put_job(job())
    store.put_child("Pod", child("Pod", "w", "p", UID))
    assert store.prune("Pod", set(), 0.0) == set()
    store.jobs.prune(set(), 0.0)
    assert store.job_keys() == [KEY], "created while the pages came in: it is not in them"


def other(kind: str, name: str, version: int = 1, **more: Any) -> dict[str, Any]:
    meta = {"name": name, "namespace": "team-a", "uid": f"uid-{name}", "resourceVersion": str(version)}
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": kind, "metadata": meta, "spec": {}, **more}


def test_every_reconciled_kind_is_remembered_as_jobs_are() -> None:
    """By key and UID; an older state is not taken up, a late event raises no dead; and jobs do not hear of it."""
    store, told, forgotten = Store(), list[tuple[str, str]](), list[str]()
    store.changed.append(lambda kind, raw: told.append((kind, raw["metadata"]["name"])))
    store.forgotten.append(forgotten.append)
    models = store.of("FineTunedModel")
    key = models.put(other("FineTunedModel", "bot", 5, status={"count": 2}))
    models.put(other("FineTunedModel", "bot", 4))
    assert models.get(key) == models.of_uid("uid-bot") and (models.get(key) or {})["status"] == {"count": 2}
    assert told == [("FineTunedModel", "bot")] and not store.changes() and store.endpoints.keys == [] == store.job_keys()
    models.prune(set(), float("inf"))
    models.put(other("FineTunedModel", "bot", 9))
    assert models.get(key) is None and forgotten == ["uid-bot"] and told[1:] == [("FineTunedModel", "bot")]


def test_what_another_kind_owns_wakes_it_by_its_label() -> None:
    store = Store()
    store.models.put(other("FineTunedModel", "bot"))
    labels = {names.LABEL_OWNER_UID: "uid-bot", names.LABEL_STAGE: "catalog"}
    made, pod = child("Job", "bot-catalog", "j1", "uid-bot"), child("Pod", "bot-catalog-x", "p1", "j1", status={"phase": "Running"})
    for kind, raw in (("Job", made), ("Pod", pod)):
        raw["metadata"]["labels"] = labels
        assert store.put_child(kind, raw) == ("FineTunedModel", ("team-a", "bot"))
    owned = store.owned("uid-bot")
    assert [j.name for j in owned.jobs] == ["bot-catalog"] and [p.phase for p in owned.pods] == ["Running"]
    assert not store.left_behind(), "they hold nothing of a queue"


def test_jobs_are_found_by_the_models_that_they_name() -> None:
    store, bot, old = Store(), ("team-a", "bot"), ("team-a", "old")
    store.put_job(job({**MINIMAL, "publish": [{"model": "bot"}], "tuning": {"continueFrom": "model://old@3"}}))
    assert [len(store.jobs_naming(key)) for key in (bot, old, ("team-b", "bot"))] == [1, 1, 0]
    store.put_job(job({**MINIMAL, "publish": [{"model": "bot"}, {"model": 5}, 7]}, resourceVersion="2"))
    assert [len(store.jobs_naming(key)) for key in (bot, old)] == [1, 0]
    store.drop_job(job())
    assert not store.jobs_naming(bot)


async def _run(queue: WorkQueue[str], work: Any, seconds: float, workers: int = 4) -> None:
    task = asyncio.create_task(queue.run(work, workers))
    await asyncio.sleep(seconds)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_one_key_is_never_worked_on_twice_at_once_and_no_wake_up_is_lost() -> None:
    queue: WorkQueue[str] = WorkQueue()
    active: set[str] = set()
    counts: dict[str, int] = {}

    async def work(key: str) -> None:
        assert key not in active
        active.add(key)
        await asyncio.sleep(0.01)
        active.discard(key)
        counts[key] = counts.get(key, 0) + 1
        if counts[key] == 1:
            for _ in range(5):
                queue.add(key)

    for key in "abcabcabc":
        queue.add(key)
    await _run(queue, work, 0.3)
    assert counts == {"a": 2, "b": 2, "c": 2}
    assert len(queue) == 0


async def test_a_slow_key_does_not_hold_the_others_up() -> None:
    queue: WorkQueue[str] = WorkQueue()
    done: list[str] = []

    async def work(key: str) -> None:
        if key == "slow":
            await asyncio.sleep(5)
        done.append(key)

    for key in ("slow", "a", "b", "c"):
        queue.add(key)
    await _run(queue, work, 0.2, workers=2)
    assert sorted(done) == ["a", "b", "c"]


async def test_keys_that_go_first_do_and_leave_the_others_a_turn() -> None:
    urgent: set[str] = set()
    queue: WorkQueue[str] = WorkQueue(lambda key: (int(key in urgent), int(key in ("hold5", "wait4", "wait3"))))
    done: list[str] = []

    async def work(key: str) -> None:
        done.append(key)

    for n in range(6):
        queue.add(f"wait{n}")
    urgent |= {f"hold{n}" for n in range(20)} | {"wait5"}
    for key in (*(f"hold{n}" for n in range(20)), "wait5", "wait5"):
        queue.add(key)
    assert len(queue) == 26
    await _run(queue, work, 0.2, workers=1)
    assert done[:5] == ["hold5", "wait5", "hold0", "hold1", "wait3"], "four that are urgent in a row, then the highest of the others"
    assert [key for key in done if key.startswith("wait")] == ["wait5", "wait3", "wait4", "wait0", "wait1", "wait2"]
    assert done.index("wait1") == 19, "every fourth turn of the others is the oldest's"
    assert sorted(done) == sorted({*urgent, *(f"wait{n}" for n in range(6))}), "each once"
    assert len(queue) == 0


async def test_the_oldest_has_its_turn_whatever_its_rank() -> None:
    queue: WorkQueue[str] = WorkQueue(lambda key: (0, int(key != "low")))
    done: list[str] = []

    async def work(key: str) -> None:
        done.append(key)
        if len(done) < 50:
            queue.add(f"high{len(done)}")

    for key in ("low", "high"):
        queue.add(key)
    await _run(queue, work, 0.2, workers=1)
    assert done.index("low") == 3, done


async def test_delays_and_back_off() -> None:
    queue: WorkQueue[str] = WorkQueue()
    done: list[str] = []

    async def work(key: str) -> None:
        done.append(key)

    queue.add_after("later", 0.1)
    queue.add_after("later", 30)
    queue.add_after("never", 30)
    await _run(queue, work, 0.3)
    assert done == ["later"], "the earlier of two times counts"
    delays = [queue.retry("bad") for _ in range(12)]
    assert delays[0] < 1 and max(delays) <= 180 and delays[-1] > 50
    queue.forget("bad")
    assert queue.retry("bad") < 1


async def test_workers_end_when_cancelled_in_the_very_moment_of_a_wake_up() -> None:
    async def work(key: str) -> None:
        await asyncio.sleep(0)

    for _ in range(50):
        queue: WorkQueue[str] = WorkQueue()
        queue.add_after("later", 30)
        task = asyncio.create_task(queue.run(work, 8))
        await asyncio.sleep(0.001)
        queue.add("now")
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=2)
        assert done, "a worker swallowed its cancellation"


def test_an_evicted_pod_is_told_by_its_own_reason_not_by_its_containers() -> None:
    raw = {
        "metadata": {"name": "support-worker-0", "uid": "p", "labels": {names.LABEL_STAGE: "train"}},
        "spec": {"nodeName": "node-1"},
        "status": {**ended(137), "reason": "Terminated", "message": "Pod was terminated in response to imminent node shutdown."},
    }
    seen = pod_view(raw)
    assert (seen.reason, seen.exit_code, seen.node) == ("Terminated", 137, "node-1")
    assert classify(seen).cause == "Disruption"
    raw["status"] = ended(137, reason="OOMKilled")
    assert pod_view(raw).reason == "OOMKilled"


def test_another_controllers_job_is_not_there() -> None:
    """Neither for reconciliation nor for queues nor for metrics: all of them ask the store."""
    store = Store()
    theirs = job({**MINIMAL, "managedBy": "kueue.x-k8s.io/multikueue"})
    assert store.put_job(theirs) == KEY
    assert store.job(KEY) is None and not store.job_keys() and not store.changes()
    store.put_job(job({**MINIMAL, "managedBy": names.MANAGED_BY}))
    assert set(store.job_keys()) == {KEY}
    store.put_job({**theirs, "metadata": {**theirs["metadata"], "uid": "another", "resourceVersion": "2"}})
    assert store.job(KEY) is None, "made anew for another controller while nobody looked"
