"""F1: the operator dies after every single write of a full job, one after another; the end is always the same."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

from kubernetes.aio import client as aio_client
from kubernetes.aio import config as aio_config

from finetune_operator.cache.progress import ProgressBoard
from finetune_operator.cache.store import Store
from finetune_operator.cluster.transport import KubernetesCluster
from finetune_operator.controllers.manager import Manager
from finetune_operator.settings import Settings
from tests.component.conftest import Api, Kubelet
from tests.component.test_operator import WHOLE

WRITES = ("apply", "create", "delete", "replace_status")

#: events of states that may come and go between two looks: pods here start and end within milliseconds
PASSING = {"GangCreated", "GangRunning", "Unschedulable", "PrepareStarted", "EvaluateStarted", "PublishStarted"}


class Died(BaseException):
    """The operator's process is gone: nothing in it may catch this."""


class Mortal:
    """A cluster whose user dies right after its n-th write reached the API server."""

    def __init__(self, real: KubernetesCluster, life: int | None) -> None:
        self._real, self.left, self.written = real, life, 0
        self.dead = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._real, name)
        if name not in WRITES:
            return method

        async def write(*args: Any, **kwargs: Any) -> Any:
            if self.dead.is_set():
                raise Died
            result = await method(*args, **kwargs)
            self.written += 1
            if self.left is not None and self.written >= self.left:
                self.dead.set()
                raise Died
            return result

        return write


async def _live(api: Api, life: int | None, name: str) -> int:
    """Run an operator until it dies or the job has ended. Returns the number of its writes."""
    configuration = aio_client.Configuration()
    await aio_config.load_kube_config(str(api.cluster.kubeconfig), client_configuration=configuration)
    cluster = Mortal(KubernetesCluster(aio_client.ApiClient(configuration)), life)
    settings = Settings(
        progress_url="none",
        watch_namespaces=(api.namespace,),
        resync_seconds=0.1,
        status_interval_seconds=0.0,
        backoff_base_seconds=0.5,
        workers=2,
    )
    store = Store()
    manager = Manager(cluster, store, ProgressBoard(), settings)  # type: ignore[arg-type]
    task = asyncio.create_task(manager.run())
    try:
        for _ in range(1200):
            await asyncio.sleep(0.05)
            if cluster.dead.is_set() or task.done():
                break
            job = store.job((api.namespace, name))
            if job is not None and (job.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
                break
        else:
            raise AssertionError(f"no end: {store.job((api.namespace, name))}")
        for _ in range(200):  # what a calm life tells is what the others are held against, to its last word
            if not manager.events._some.is_set() or cluster.dead.is_set() or task.done():
                break
            await asyncio.sleep(0.05)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await cluster._real.close()
    return cluster.written


def _end_state(api: Api, name: str) -> dict[str, Any]:
    status = api.status(name)
    own = [o for o in api.owned() if o.partition("/")[2].startswith(f"{name}-")]  # the collector may not have taken the last one's yet
    return {
        "phase": status["phase"],
        "attempt": status["attempt"],
        "restarts": len(status.get("restarts", [])),
        "retries": {stage: s["retries"] for stage, s in status["stages"].items()},
        "conditions": {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]},
        "children": [o.replace(f"{name}-", "X-") for o in own if not o.startswith("Pod/") or "worker" in o],
        "pods": len([o for o in own if o.startswith("Pod/")]),
        "events": sorted(e for e in api.events() if e not in PASSING),
    }


def _clear(api: Api, name: str) -> None:
    api.delete_job(name)
    deadline = 200
    while [o for o in api.owned() if not o.startswith("PersistentVolumeClaim")] and deadline:
        deadline -= 1
        time.sleep(0.1)
    for claim in api.core.list_namespaced_persistent_volume_claim(api.namespace).items:
        api.core.patch_namespaced_persistent_volume_claim(claim.metadata.name, api.namespace, {"metadata": {"finalizers": None}})
    api.core.delete_collection_namespaced_event(api.namespace)


async def _count_kills(api: Api, writes: int, expected: dict[str, Any], events: Counter[str]) -> list[str]:
    wrong = []
    for life in range(1, writes):
        name = f"kill-{life}"
        api.create_job(WHOLE, name=name)
        await _live(api, life, name)
        await _live(api, None, name)
        found = _end_state(api, name)
        told = Counter(found.pop("events"))
        if found != expected or told - events:  # Events are best effort: one that waited is gone with its operator, none is told twice
            wrong.append(f"killed after write {life}: {found}, {told}\nexpected {expected}, {events}")
        await asyncio.to_thread(_clear, api, name)
    return wrong


async def test_f1_killed_after_every_single_write(api: Api, kubelet: Kubelet) -> None:
    api.create_job(WHOLE, name="calm")
    writes = await _live(api, None, "calm")
    expected = _end_state(api, "calm")
    events = Counter(expected.pop("events"))
    assert expected["phase"] == "Succeeded" and expected["attempt"] == 0 and expected["restarts"] == 0
    await asyncio.to_thread(_clear, api, "calm")
    wrong = await _count_kills(api, writes, expected, events)
    assert not wrong, "\n".join(wrong[:3])
    assert writes > 15
